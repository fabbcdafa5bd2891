//! That one partner's messages cost nobody else: who sent lately, how much the side room holds, and whose
//! messages of a batch go there instead of being judged at once.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use tokio::sync::{Notify, OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use crate::{
    config::Settings,
    domain::{
        delivery::Delivery,
        message::{Facts, Message},
        share,
    },
    settle::{
        Batch,
        blocked::{KnownLocks, SideRoom},
    },
    store::held::{HeldTotal, HeldWhy, Pack, bytes_of},
};

/// Messages in a pack at most: a pack is judged in one transaction, and others wait while it is.
const PACK_MAX: usize = 64;
/// Rates that are remembered at most.
const RATES_MAX: usize = 10_000;
/// A pause for others is never longer: whoever sent may have stopped.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Who sent within this is waited for by whoever has time.
const LIVE: Duration = Duration::from_secs(1);

/// How much of something.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    messages: u64,
    bytes: u64,
}

/// Messages that may go at a rate: as many as a second's are saved up, and more is a debt.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

/// What the tasks of a worker know of who sends, waits and is in the way. Everything in it is bounded: by the registry, by the
/// room's own bounds, by `RATES_MAX`.
#[derive(Debug)]
pub struct Fairness {
    settings: Settings,
    roster: RwLock<HashSet<String>>,
    seen: Mutex<HashMap<String, Instant>>,
    room: Mutex<HashMap<Option<String>, Load>>,
    /// What is counted in the room is on its way there; or the room is being measured. Never both: what is not stored yet
    /// would be forgotten, and the room take more than it may.
    storing: Arc<tokio::sync::RwLock<()>>,
    rates: Mutex<HashMap<Option<String>, Bucket>>,
    /// Something was put into the room.
    pub(crate) put: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fairness {
    pub fn new(settings: &Settings) -> Self {
        Self {
            settings: settings.clone(),
            roster: RwLock::default(),
            seen: Mutex::default(),
            room: Mutex::default(),
            storing: Arc::default(),
            rates: Mutex::default(),
            put: Notify::new(),
        }
    }

    /// The partners that are registered now.
    pub fn enrol(&self, partners: HashSet<String>) {
        lock(&self.seen).retain(|partner, _| partners.contains(partner));
        *self.roster.write().unwrap_or_else(PoisonError::into_inner) = partners;
    }

    /// To have from before something is counted in the room until it is stored there.
    pub async fn storing(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.storing).read_owned().await
    }

    /// Whether something of a batch may be put into the room. What may not waits for no measurement.
    pub fn may_hold(&self, batch: &Batch, known: &KnownLocks) -> bool {
        known.any_quarantined() || self.may_be_too_many(batch.len())
    }

    /// Whether so many messages may be more than somebody's share or rate. A few are nobody's surplus.
    fn may_be_too_many(&self, messages: usize) -> bool {
        let worker = &self.settings.worker;
        worker.partner_rate > 0 || messages > worker.batch_max / 16
    }

    /// To have while the room is measured. Waits for what is on its way there, and what comes later waits for it.
    pub async fn measuring(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.storing).write_owned().await
    }

    /// How much the room holds, as the database says.
    pub fn measured(&self, totals: &[HeldTotal]) {
        let mut room = lock(&self.room);
        room.clear();
        for total in totals {
            let amount = room.entry(total.whose.clone()).or_default();
            amount.messages += total.messages;
            amount.bytes += total.bytes;
        }
    }

    /// Whom a message counts for.
    fn owner<'f>(roster: &HashSet<String>, facts: &'f Facts) -> Option<&'f str> {
        let enterprise = facts.enterprise_id.as_deref().filter(|_| facts.content.is_ok())?;
        roster.contains(enterprise).then_some(enterprise)
    }

    /// Whether somebody sent something just now, other than these.
    pub fn others_live(&self, but: &BTreeSet<Option<String>>) -> bool {
        let seen = lock(&self.seen);
        seen.iter()
            .any(|(partner, at)| at.elapsed() < LIVE && !but.contains(&Some(partner.clone())))
    }

    /// How long whoever worked so long lets others go first: nothing, where no others sent anything just now.
    pub fn pause_for_others(&self, owners: &BTreeSet<Option<String>>, took: Duration) -> Duration {
        if !self.others_live(owners) {
            return Duration::ZERO;
        }
        let share = self.settings.held.share;
        took.mul_f64((1.0 - share) / share).min(PAUSE_MAX)
    }

    /// What of a batch from a queue is judged now, and what is held instead.
    pub fn triage(&self, batch: Batch, known: &KnownLocks) -> (Batch, Vec<Pack>) {
        let (batch, mut packs) = self.quarantined(batch, known);
        let (batch, more) = self.shared(batch);
        packs.extend(more);
        (batch, packs)
    }

    /// Takes out what partners in quarantine sent.
    fn quarantined(&self, batch: Batch, known: &KnownLocks) -> (Batch, Vec<Pack>) {
        if !known.any_quarantined() {
            return (batch, Vec::new());
        }
        let waits: Vec<Option<HeldWhy>> = {
            let roster = self.roster.read().unwrap_or_else(PoisonError::into_inner);
            let owners = batch
                .messages()
                .iter()
                .map(|message| Self::owner(&roster, &message.facts));
            owners
                .map(|owner| {
                    owner
                        .is_some_and(|owner| known.is_quarantined(owner))
                        .then_some(HeldWhy::Quarantine)
                })
                .collect()
        };
        self.apart(batch, &waits)
    }

    /// What is within everybody's share and rate.
    fn shared(&self, batch: Batch) -> (Batch, Vec<Pack>) {
        let worker = &self.settings.worker;
        let now = Instant::now();
        let waits: Vec<Option<HeldWhy>> = {
            let roster = self.roster.read().unwrap_or_else(PoisonError::into_inner);
            let messages = batch.messages().iter();
            let owners: Vec<Option<&str>> = messages.map(|message| Self::owner(&roster, &message.facts)).collect();
            let mut seen = lock(&self.seen);
            let mut last = None;
            for owner in owners.iter().flatten() {
                if last != Some(owner) {
                    match seen.get_mut(*owner) {
                        Some(at) => *at = now,
                        None => drop(seen.insert((*owner).to_owned(), now)),
                    }
                    last = Some(owner);
                }
            }
            if !self.may_be_too_many(owners.len()) {
                return (batch.clone(), Vec::new());
            }
            let about: BTreeSet<&str> = seen
                .iter()
                .filter(|(_, at)| at.elapsed() < self.settings.held.others_within)
                .map(|(partner, _)| partner.as_str())
                .collect();
            let surplus = share::surplus(&owners, &about, worker.batch_max);
            owners
                .iter()
                .zip(surplus)
                .map(|(owner, is_surplus)| {
                    if is_surplus {
                        Some(HeldWhy::Share)
                    } else {
                        (!self.may_go(*owner, now)).then_some(HeldWhy::Rate)
                    }
                })
                .collect()
        };
        self.apart(batch, &waits)
    }

    /// Takes out what waits; what can not be held stays.
    fn apart(&self, batch: Batch, waits: &[Option<HeldWhy>]) -> (Batch, Vec<Pack>) {
        if waits.iter().all(Option::is_none) {
            return (batch, Vec::new());
        }
        let mut stays: Vec<bool> = vec![true; waits.len()];
        let mut packs: BTreeMap<(Option<String>, HeldWhy), Vec<usize>> = BTreeMap::new();
        {
            let roster = self.roster.read().unwrap_or_else(PoisonError::into_inner);
            let mut room = lock(&self.room);
            for (index, why) in waits.iter().enumerate() {
                let (Some(why), Some(Message { delivery, facts })) = (why, batch.messages().get(index)) else {
                    continue;
                };
                let owner = match why {
                    HeldWhy::Share | HeldWhy::Rate => Self::owner(&roster, facts).map(str::to_owned),
                    HeldWhy::Locked | HeldWhy::Quarantine => facts.enterprise_id.clone(),
                };
                if !self.put_one(&mut room, owner.as_ref(), delivery) {
                    continue;
                }
                if let Some(stays) = stays.get_mut(index) {
                    *stays = false;
                }
                packs.entry((owner, *why)).or_default().push(index);
            }
        }
        let packs = packs
            .into_iter()
            .flat_map(|((whose, why), indexes)| {
                let deliveries: Vec<Delivery> = indexes
                    .into_iter()
                    .filter_map(|index| batch.messages().get(index).map(|message| message.delivery.clone()))
                    .collect();
                self.in_packs(whose, why, deliveries)
            })
            .collect();
        (batch.part(|index| stays.get(index).copied().unwrap_or(true)), packs)
    }

    /// Of messages that are in the way those that partners in quarantine sent, and the others.
    pub fn blocked_apart(&self, batch: &Batch, known: &KnownLocks) -> (Batch, Batch) {
        let messages = batch.messages();
        let is_quarantined = |index: usize| {
            let whose = messages
                .get(index)
                .and_then(|message| message.facts.enterprise_id.as_deref());
            whose.is_some_and(|whose| known.is_quarantined(whose))
        };
        (batch.part(is_quarantined), batch.part(|index| !is_quarantined(index)))
    }

    /// Messages that need what is locked, as packs. None of them, unless there is room for all.
    pub fn packs_of_locked(&self, batch: &Batch) -> Option<Vec<Pack>> {
        let waits = vec![Some(HeldWhy::Locked); batch.len()];
        let (rest, packs) = self.apart(batch.clone(), &waits);
        rest.is_empty().then_some(packs)
    }

    /// Messages of partners in quarantine, as packs; and those for which there is no room.
    pub fn packs_of_quarantined(&self, batch: &Batch) -> (Batch, Vec<Pack>) {
        let waits = vec![Some(HeldWhy::Quarantine); batch.len()];
        self.apart(batch.clone(), &waits)
    }

    /// Whether the room would take something of these: the rest waits its turn.
    pub fn room_for(&self, batch: &Batch) -> SideRoom {
        let mut room = lock(&self.room).clone();
        let fits = batch
            .messages()
            .iter()
            .any(|message| self.put_one(&mut room, message.facts.enterprise_id.as_ref(), &message.delivery));
        if fits { SideRoom::Free } else { SideRoom::Full }
    }

    fn in_packs(&self, whose: Option<String>, why: HeldWhy, deliveries: Vec<Delivery>) -> Vec<Pack> {
        let rate = usize::try_from(self.settings.worker.partner_rate).unwrap_or(PACK_MAX);
        let most = if rate == 0 { PACK_MAX } else { PACK_MAX.min(rate) };
        let most_bytes = u64::try_from(self.settings.worker.batch_max_bytes).unwrap_or(u64::MAX);
        let mut packs: Vec<Pack> = Vec::new();
        let mut bytes = 0_u64;
        for delivery in deliveries {
            let size = bytes_of(&delivery);
            match packs.last_mut() {
                // What is cut goes by itself: a worker of an earlier version leaves such a pack alone.
                Some(pack)
                    if pack.deliveries.len() < most
                        && bytes.saturating_add(size) <= most_bytes
                        && pack
                            .deliveries
                            .iter()
                            .all(|one| one.cut.is_some() == delivery.cut.is_some()) =>
                {
                    bytes = bytes.saturating_add(size);
                    pack.deliveries.push(delivery);
                }
                Some(_) | None => {
                    bytes = size;
                    packs.push(Pack {
                        whose: whose.clone(),
                        why,
                        deliveries: vec![delivery],
                        due_in: match why {
                            HeldWhy::Share | HeldWhy::Rate | HeldWhy::Quarantine => Duration::ZERO,
                            HeldWhy::Locked => self.settings.held.first_retry,
                        },
                        attempts: 0,
                    });
                }
            }
        }
        packs
    }

    /// Whether the room takes one more, and if so counts it.
    fn put_one(&self, room: &mut HashMap<Option<String>, Load>, owner: Option<&String>, delivery: &Delivery) -> bool {
        let held = &self.settings.held;
        let size = bytes_of(delivery);
        let all = room.values().fold(Load::default(), |sum, one| Load {
            messages: sum.messages + one.messages,
            bytes: sum.bytes + one.bytes,
        });
        let fits = |amount: Load, messages: u64, bytes: u64| amount.messages < messages && amount.bytes + size <= bytes;
        let one = room.entry(owner.cloned()).or_default();
        if !fits(all, held.max_messages, held.max_bytes)
            || !fits(*one, held.max_messages_per_partner, held.max_bytes_per_partner)
        {
            return false;
        }
        one.messages += 1;
        one.bytes += size;
        true
    }

    /// Whether one more message of an owner may go now, and if so counts it.
    fn may_go(&self, owner: Option<&str>, now: Instant) -> bool {
        let rate = f64::from(self.settings.worker.partner_rate);
        if rate == 0.0 {
            return true;
        }
        let mut rates = lock(&self.rates);
        // Owners are of the registry; who has saved up all there is to save is as good as new.
        if rates.len() > RATES_MAX {
            rates.retain(|_, bucket| filled(*bucket, rate, now).tokens < rate);
        }
        let owner = owner.map(str::to_owned);
        let bucket = rates.entry(owner).or_insert(Bucket { tokens: rate, at: now });
        *bucket = filled(*bucket, rate, now);
        let may = bucket.tokens >= 1.0;
        if may {
            bucket.tokens -= 1.0;
        }
        may
    }

    /// The owners whose held messages must wait, since they are at their rate.
    pub fn at_their_rate(&self) -> Vec<String> {
        let rate = f64::from(self.settings.worker.partner_rate);
        if rate == 0.0 {
            return Vec::new();
        }
        let now = Instant::now();
        let rates = lock(&self.rates);
        rates
            .iter()
            .filter(|(_, bucket)| filled(**bucket, rate, now).tokens < 1.0)
            .filter_map(|(owner, _)| owner.clone())
            .collect()
    }

    /// So many of an owner's held messages went.
    pub fn went(&self, owner: Option<String>, messages: usize) {
        let rate = f64::from(self.settings.worker.partner_rate);
        if rate == 0.0 {
            return;
        }
        let now = Instant::now();
        let mut rates = lock(&self.rates);
        let bucket = rates.entry(owner).or_insert(Bucket { tokens: rate, at: now });
        *bucket = filled(*bucket, rate, now);
        bucket.tokens -= f64::from(u32::try_from(messages).unwrap_or(u32::MAX));
    }
}

fn filled(bucket: Bucket, rate: f64, now: Instant) -> Bucket {
    let more = now.saturating_duration_since(bucket.at).as_secs_f64() * rate;
    Bucket {
        tokens: (bucket.tokens + more).min(rate),
        at: now,
    }
}

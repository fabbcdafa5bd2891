//! The third intake: messages of the side room, judged by the same batch walk, at a bounded share of the time while others
//! send; and the watch over locks that batches did not wait for.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::timeout;
use uuid::Uuid;

use super::{
    Worker,
    driver::{Holder, Trying, drive},
    fill::{Fill, FillWatch},
    in_hand::Settler,
    patience::{Gate, HandBack, Patience},
    publish::{Entrance, Owned, send_all},
};
use crate::{
    domain::{
        delivery::{Delivery, Source},
        message::Message,
        names::UPDATES,
    },
    retry::{self, Backoff, Waited},
    settle::{Answered, Batch, next_step::Terms},
    store::{
        StoreError,
        held::{HeldPack, HeldWhy, Pack},
    },
    telemetry::{Dependency, Door, HeldOf, Signal, Stage},
};

/// How often the room is measured, and the registry read.
const MEASURE: Duration = Duration::from_secs(1);
/// How often it is looked whether locks are gone.
const WATCH: Duration = Duration::from_millis(100);

/// Measures the room, reads who is registered, and looks whether locks are gone, until the program stops.
pub(crate) async fn watch(mut worker: Worker) {
    let mut measured: Option<Instant> = None;
    let mut room = FillWatch::default();
    loop {
        let store = &worker.clerk.store;
        if measured.is_none_or(|at| at.elapsed() >= MEASURE) {
            measured = Some(Instant::now());
            // A database that is away is the lanes' to tell.
            if let Ok(roster) = store.roster().await {
                worker.locks.quarantine(roster.quarantined);
                worker.fairness.enrol(roster.partners);
            }
            drop(store.count_parked_bytes().await);
            if let Some(totals) = worker.measure_room().await {
                let held = HeldWhy::ALL.map(|why| {
                    let of = totals.iter().filter(|total| total.why == why);
                    HeldOf {
                        why: why.as_str(),
                        messages: of.clone().map(|total| total.messages).sum(),
                        bytes: of.clone().map(|total| total.bytes).sum(),
                        oldest: of.map(|total| total.oldest).max().unwrap_or_default(),
                    }
                });
                Signal::HeldMeasured { held: &held }.emit();
                let now = Fill::measure(&worker.settings.held, &totals);
                room.look(&now);
                worker.health.set_held(now.sentence());
            }
        }
        if worker.locks.any() {
            let asked = worker.locks.all();
            if let Ok(still) = store.still_locked(&asked).await
                && worker.locks.forget(&asked, &still)
                && store.wake_held().await.is_ok()
            {
                worker.fairness.put.notify_one();
            }
        }
        if retry::sleep(WATCH, &mut worker.stop).await == Waited::Stopping {
            break;
        }
    }
}

/// Judges what is held until the program stops. It publishes where due messages do.
pub(crate) async fn judge_held(worker: &mut Worker, owned: &Owned, entrance: &Entrance) {
    let settings = Arc::clone(&worker.settings);
    let mut backoff = Backoff::new(&settings.retry);
    loop {
        let began = Instant::now();
        let waited = match judge_some(worker, owned, entrance).await {
            Ok(_) if *worker.stop.borrow() => Waited::Stopping,
            Ok(Some(owners)) => {
                backoff.reset();
                pause(worker, &owners, began.elapsed()).await
            }
            Ok(None) => {
                backoff.reset();
                let put = timeout(settings.held.poll, worker.fairness.put.notified());
                let mut stop = worker.stop.clone();
                tokio::select! {
                    biased;
                    () = retry::stopped(&mut stop) => Waited::Stopping,
                    _ = put => Waited::Over,
                }
            }
            Err(error) => {
                let error = error.to_string();
                worker.wait_for(Dependency::Database, &error, &mut backoff).await
            }
        };
        if waited == Waited::Stopping {
            break;
        }
    }
}

/// While others send, what took a while is followed by a pause that leaves them their share.
async fn pause(worker: &mut Worker, owners: &BTreeSet<Option<String>>, took: Duration) -> Waited {
    let pause = worker.fairness.pause_for_others(owners, took);
    retry::sleep(pause, &mut worker.stop).await
}

/// Claims and judges what is due, and says whose it was; None where there was nothing.
async fn judge_some(
    worker: &Worker,
    owned: &Owned,
    entrance: &Entrance,
) -> Result<Option<BTreeSet<Option<String>>>, StoreError> {
    let settings = &worker.settings;
    // A place in the publish stage first: the outbox must not grow while the broker takes nothing. It closes with the program.
    let Ok(place) = entrance.reserve().await else {
        return Ok(None);
    };
    let wait = worker.fairness.at_their_rate();
    // As little at a time as others would notice, where there are others; and where there is a rate, it is kept pack by pack.
    let max = if settings.worker.partner_rate > 0 || worker.fairness.others_live(&BTreeSet::new()) {
        1
    } else {
        settings.worker.batch_max
    };
    let claimed = worker.clerk.store.claim_held(max, settings.held.lease, &wait).await?;
    for id in &claimed.unreadable {
        Signal::HeldUnreadable { id: *id }.emit();
    }
    if claimed.packs.is_empty() {
        return Ok((!claimed.unreadable.is_empty()).then(BTreeSet::new));
    }
    let owners: BTreeSet<Option<String>> = claimed.packs.iter().map(|held| held.pack.whose.clone()).collect();
    let received = Instant::now();
    for held in claimed.packs.iter() {
        worker
            .fairness
            .went(held.pack.whose.clone(), held.pack.deliveries.len());
    }
    let deliveries = claimed.packs.iter().flat_map(|held| &held.pack.deliveries);
    let trace = worker.traces.begin(UPDATES, Door::Held, deliveries);
    let judged = async {
        let done = judge(worker, claimed.packs, owned).await;
        send_all(place, entrance, done, received).await;
    };
    trace.within(judged).await;
    Ok(Some(owners))
}

/// Packs that are judged together: a batch leaves the room as whole packs, and one that has to be taken apart is cut in the
/// room first, and comes again.
#[derive(Clone)]
struct Packs {
    packs: Vec<HeldPack>,
    /// All their messages.
    batch: Batch,
}

impl Packs {
    async fn read(packs: Vec<HeldPack>) -> Self {
        let deliveries = packs.iter().flat_map(|held| held.pack.deliveries.clone());
        let batch = Batch::read(deliveries.collect()).await;
        Self { packs, batch }
    }

    /// Some of the packs, with their messages.
    fn part(&self, picks: impl Fn(Uuid) -> bool) -> Self {
        let messages = self.batch.messages();
        Self {
            packs: self.packs.iter().filter(|held| picks(held.id)).cloned().collect(),
            batch: self
                .batch
                .part(|index| messages.get(index).and_then(pack_of).is_some_and(&picks)),
        }
    }

    /// Each pack by itself, the last first.
    fn apart(&self) -> Vec<Self> {
        let ids = self.packs.iter().rev().map(|held| held.id);
        ids.map(|one| self.part(|id| id == one)).collect()
    }
}

/// The pack that a message is of.
fn pack_of(message: &Message) -> Option<Uuid> {
    match message.delivery.source {
        Source::Held { id } => Some(id),
        Source::Queue { .. } | Source::Parked { .. } | Source::Replayed { .. } | Source::Plain => None,
    }
}

/// The side room, from which packs are judged. It never waits with them in hand: what can not be judged now is due again when
/// its lease runs out.
struct Room<'a> {
    settler: Settler<'a>,
    patience: Patience<Packs>,
}

impl Room<'_> {
    /// The room could not be changed: what is in it comes again as it is.
    fn tell(&self, changed: Result<(), StoreError>) {
        if let Err(error) = changed {
            let (lane, why) = (self.settler.number, error.to_string());
            Signal::HandedBack { lane, why: &why }.emit();
        }
    }
}

impl Holder for Room<'_> {
    type Part = Packs;

    fn terms(&self) -> Terms {
        Terms::HELD
    }

    fn worker(&self) -> &Worker {
        self.settler.worker
    }

    fn number(&self) -> usize {
        self.settler.number
    }

    fn patience(&mut self) -> &mut Patience<Packs> {
        &mut self.patience
    }

    fn count(part: &Packs) -> usize {
        part.batch.len()
    }

    /// Packs that need nothing that is locked go on together; the others each by itself, and then not at all.
    async fn attempt(&mut self, trying: &mut Trying, part: &Packs) -> Result<Vec<Packs>, StoreError> {
        let places = self.settler.attempt(trying, &part.batch).await?;
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let blocked = part.batch.part(|index| places.binary_search(&index).is_ok());
        if let [held] = part.packs.as_slice() {
            self.tell(wait_on(self.settler.worker, held, &blocked).await);
            return Ok(Vec::new());
        }
        let ids: BTreeSet<Uuid> = blocked.messages().iter().filter_map(pack_of).collect();
        let mut left = part.part(|id| ids.contains(&id)).apart();
        left.push(part.part(|id| !ids.contains(&id)));
        Ok(left)
    }

    async fn cut(&mut self, part: Packs) -> Vec<Packs> {
        let [held] = part.packs.as_slice() else {
            return part.apart();
        };
        let middle = held.pack.deliveries.len() / 2;
        let halves = held.pack.deliveries.split_at_checked(middle);
        if let Some((left, right)) = halves {
            let half = |deliveries: &[Delivery]| Pack {
                deliveries: deliveries.to_vec(),
                ..held.pack.clone()
            };
            let halves = [half(left), half(right)];
            self.tell(self.settler.worker.clerk.store.split_held(held.id, &halves).await);
        }
        Vec::new()
    }

    fn blame(&self, trying: &Trying, part: &Packs, error: &StoreError) {
        self.settler.blame(trying, &part.batch, error);
    }

    async fn reject(&mut self, trying: &mut Trying, part: &Packs, _: &StoreError) -> Result<(), StoreError> {
        self.settler.reject(trying, &part.batch).await
    }

    async fn finds_locks(&self, part: &Packs) -> bool {
        self.settler.finds_locks(&part.batch).await
    }

    /// The same id is tried again: where it is there already, what it came to is known.
    fn commit_unknown(&mut self, _: &mut Trying, _: &mut Packs) {}

    /// Nothing of it needs that room.
    async fn wait_for_room(&mut self, error: &StoreError, _: &Packs) -> Result<(), HandBack<Packs>> {
        Err(HandBack::because(error.to_string()))
    }
}

/// Judges packs together, and each alone where that does not go.
async fn judge(worker: &Worker, packs: Vec<HeldPack>, owned: &Owned) -> Vec<Answered> {
    let lane = worker.settings.worker.lanes;
    let mut room = Room {
        settler: Settler::new(worker, lane, Door::Held, owned),
        patience: Patience::new(worker, &Gate::default(), "the side room".to_owned()),
    };
    let reading = Instant::now();
    let packs = Packs::read(packs).await;
    Signal::stage(Stage::Facts, reading).emit();
    if let Err(back) = drive(&mut room, packs).await {
        Signal::HandedBack { lane, why: &back.why }.emit();
    }
    room.settler.done
}

/// What needs a lock waits on, longer each time; the rest of its pack does not.
async fn wait_on(worker: &Worker, held: &HeldPack, blocked: &Batch) -> Result<(), StoreError> {
    let settings = &worker.settings.held;
    let doublings = u32::try_from(held.pack.attempts.clamp(0, 16)).unwrap_or_default();
    let wait = settings
        .first_retry
        .saturating_mul(2_u32.saturating_pow(doublings))
        .min(settings.max_interval);
    if blocked.len() == held.pack.deliveries.len() {
        return worker.clerk.store.postpone_held(&[held.id], wait).await;
    }
    let is_blocked = |delivery: &Delivery| blocked.messages().iter().any(|message| message.delivery == *delivery);
    let (waits, goes): (Vec<_>, Vec<_>) = held.pack.deliveries.iter().cloned().partition(is_blocked);
    let part = |deliveries: Vec<Delivery>, why, due_in, attempts| Pack {
        whose: held.pack.whose.clone(),
        why,
        deliveries,
        due_in,
        attempts,
    };
    let mut parts = Vec::new();
    if !waits.is_empty() {
        parts.push(part(waits, HeldWhy::Locked, wait, held.pack.attempts.saturating_add(1)));
    }
    if !goes.is_empty() {
        parts.push(part(goes, held.pack.why, Duration::ZERO, 0));
    }
    worker.clerk.store.split_held(held.id, &parts).await
}

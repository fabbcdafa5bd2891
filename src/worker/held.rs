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
    patience::Patience,
    publish::{Entrance, Owned, send_all},
};
use crate::{
    domain::delivery::{Delivery, Source},
    retry::{self, Backoff, Waited},
    settle::{Attempt, Batch, Settled, attempt, reject_culprit},
    store::{
        Fate, StoreError,
        held::{HeldPack, Pack, Why},
    },
    telemetry::{Dependency, HeldOf, Intake as Door, Signal},
};

/// How often the room is measured, and the registry read.
const MEASURE: Duration = Duration::from_secs(1);
/// How often it is looked whether locks are gone.
const WATCH: Duration = Duration::from_millis(100);

/// Measures the room, reads who is registered, and looks whether locks are gone, until the program stops.
pub(crate) async fn watch(mut worker: Worker) {
    let mut measured: Option<Instant> = None;
    loop {
        let store = &worker.clerk.store;
        if measured.is_none_or(|at| at.elapsed() >= MEASURE) {
            measured = Some(Instant::now());
            // A database that is away is the lanes' to tell.
            if let Ok(partners) = store.enterprises().await {
                worker.fairness.enrol(partners);
            }
            drop(store.count_parked_bytes().await);
            if let Ok(totals) = store.count_held().await {
                worker.fairness.measured(&totals);
                let held = Why::ALL.map(|why| {
                    let of = totals.iter().filter(|total| total.why == why);
                    HeldOf {
                        why: why.as_str(),
                        messages: of.clone().map(|total| total.messages).sum(),
                        bytes: of.clone().map(|total| total.bytes).sum(),
                        oldest: of.map(|total| total.oldest).max().unwrap_or_default(),
                    }
                });
                Signal::HeldMeasured { held: &held }.emit();
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
    let mut done = Vec::new();
    for held in claimed.packs.iter() {
        worker
            .fairness
            .went(held.pack.whose.clone(), held.pack.deliveries.len());
    }
    judge(worker, claimed.packs, owned, &mut done).await?;
    send_all(place, entrance, done, received).await;
    Ok(Some(owners))
}

/// Judges packs together, and each alone where that does not go: a batch leaves the room as whole packs, and one that has to
/// be taken apart is cut in the room first, and comes again.
async fn judge(
    worker: &Worker,
    packs: Vec<HeldPack>,
    owned: &Owned,
    done: &mut Vec<Settled>,
) -> Result<(), StoreError> {
    let mut rounds = vec![packs];
    while let Some(mut packs) = rounds.pop() {
        let deliveries: Vec<Delivery> = packs.iter().flat_map(|held| held.pack.deliveries.clone()).collect();
        let batch = Batch::read(deliveries).await;
        match worker.settle_held(batch, owned, done).await {
            Kept::Nothing => {}
            Kept::All => {
                // Handed back: due again when the lease runs out.
            }
            Kept::Apart(blocked) if packs.len() > 1 => {
                // Those that need nothing that is locked go on together.
                let blocked: BTreeSet<Uuid> = blocked
                    .deliveries
                    .iter()
                    .filter_map(|delivery| match delivery.source {
                        Source::Held { id } => Some(id),
                        Source::Queue { .. } | Source::Parked { .. } | Source::Replayed { .. } | Source::Plain => None,
                    })
                    .collect();
                let (apart, rest): (Vec<_>, Vec<_>) = packs.into_iter().partition(|held| blocked.contains(&held.id));
                rounds.extend(apart.into_iter().map(|held| vec![held]));
                if !rest.is_empty() {
                    rounds.push(rest);
                }
            }
            Kept::Apart(blocked) => {
                if let Some(held) = packs.pop() {
                    wait_on(worker, held, &blocked).await?;
                }
            }
            Kept::Halves if packs.len() > 1 => rounds.extend(packs.into_iter().map(|held| vec![held])),
            Kept::Halves => {
                if let Some(held) = packs.pop() {
                    let mut left = held.pack;
                    let right = left.deliveries.split_off(left.deliveries.len() / 2);
                    let right = Pack {
                        deliveries: right,
                        ..left.clone()
                    };
                    worker.clerk.store.split_held(held.id, &[left, right]).await?;
                }
            }
        }
    }
    Ok(())
}

/// What needs a lock waits on, longer each time; the rest of its pack does not.
async fn wait_on(worker: &Worker, held: HeldPack, blocked: &Batch) -> Result<(), StoreError> {
    let settings = &worker.settings.held;
    let doublings = u32::try_from(held.pack.attempts.clamp(0, 16)).unwrap_or_default();
    let wait = settings
        .first_retry
        .saturating_mul(2_u32.saturating_pow(doublings))
        .min(settings.max_interval);
    if blocked.deliveries.len() == held.pack.deliveries.len() {
        return worker.clerk.store.postpone_held(&[held.id], wait).await;
    }
    let is_blocked = |delivery: &Delivery| blocked.deliveries.contains(delivery);
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
        parts.push(part(waits, Why::Locked, wait, held.pack.attempts.saturating_add(1)));
    }
    if !goes.is_empty() {
        parts.push(part(goes, held.pack.why, Duration::ZERO, 0));
    }
    worker.clerk.store.split_held(held.id, &parts).await
}

impl Worker {
    /// Judges packs of the side room.
    pub async fn settle_held(&self, batch: Batch, owned: &Owned, done: &mut Vec<Settled>) -> Kept {
        let lane = self.settings.worker.lanes;
        let mut patience = Patience::new(self, &self.gate, "the side room".to_owned(), None);
        let id = Uuid::now_v7();
        let mut earlier = None;
        let (mut culprit, mut attempts) = (false, 0);
        let began = Instant::now();
        loop {
            if *self.stop.borrow() && attempts > 0 {
                return Kept::All;
            }
            let published = owned.deletable();
            let outcome = if culprit {
                let rejected = reject_culprit(&self.clerk, id, &batch, &mut earlier).await;
                rejected.map(Attempt::Settled)
            } else {
                attempt(&self.clerk, &self.locks, id, &batch, &published, &mut earlier).await
            };
            let error = match outcome {
                Ok(Attempt::Blocked(places)) => {
                    return Kept::Apart(batch.part(|index| places.binary_search(&index).is_ok()));
                }
                Ok(Attempt::Settled(settled)) => {
                    owned.deleted(&settled.deleted);
                    if !settled.publications.is_empty() {
                        owned.add(id);
                    }
                    self.tell(lane, Door::Held, &batch, &settled, began.elapsed());
                    done.push(settled);
                    return Kept::Nothing;
                }
                Err(error) => error,
            };
            match error.fate {
                Fate::Overtaken => return Kept::Nothing,
                Fate::Retry if attempts < self.settings.retry.transient_attempts => {
                    attempts += 1;
                    if error.is_lock_wait() && self.finds_locks(&batch).await {
                        continue;
                    }
                    patience.short(id, lane, attempts, &error).await;
                }
                Fate::Bisect if !culprit => {
                    if batch.deliveries.len() > 1 {
                        return Kept::Halves;
                    }
                    if !self.culprits.blame(self.settings.worker.culprits_per_minute) {
                        return Kept::All;
                    }
                    let digest = batch.facts.first().map(|facts| hex::encode(facts.message_digest));
                    let (digest, sqlstate) = (digest.unwrap_or_default(), error.sqlstate.as_deref());
                    let error = error.to_string();
                    Signal::CulpritIsolated {
                        batch: id,
                        digest: &digest,
                        sqlstate,
                        error: &error,
                    }
                    .emit();
                    culprit = true;
                }
                // Intake learns of it by itself; what is held is due again when its lease runs out.
                Fate::Away | Fate::Retry | Fate::Bisect | Fate::Ours | Fate::CommittedBefore => {
                    let error = error.to_string();
                    Signal::HandedBack { lane, why: &error }.emit();
                    return Kept::All;
                }
            }
        }
    }
}

/// What became of packs of the side room.
pub enum Kept {
    /// They are judged.
    Nothing,
    /// They are due again when their lease runs out.
    All,
    /// These need what is locked; nothing was done.
    Apart(Batch),
    /// The database refuses it for something that one message can cause; nothing was done.
    Halves,
}

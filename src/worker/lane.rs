//! A lane: it takes updates, settles them, acknowledges and has them published.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    Worker,
    consumer::{Consumer, Work, dispose, tag_of},
    patience::{HandBack, Patience},
    publish::{Committed, Entrance, Owned, PublishStage, place_within, send_all},
};
use crate::{
    broker::{intake::Disposer, topology},
    domain::delivery::Delivery,
    fail::{self, Point},
    settle::{self, Attempt, Batch, Settled, attempt, reject_culprit},
    store::{Fate, StoreError, held::Pack},
    telemetry::{Cause, Intake as Door, Signal, Stage, Tally},
};

/// A lane: a consumer, a database connection and a publisher, with queues of depth one between the stages.
pub(super) async fn lane(worker: Worker, number: usize, queue: String) {
    let owned = Owned::default();
    let publisher = worker.row_publisher(&format!("lane {number}"));
    let mut stage = PublishStage::start(publisher, &owned, &worker.settings.outbox);
    let mut consumer = Consumer {
        number,
        name: format!("lane {number}"),
        prefetch: worker.settings.worker.prefetch,
        batch_max: worker.settings.worker.batch_max,
        linger: Duration::ZERO,
        gate: worker.gate.clone(),
        work: Settling {
            worker: worker.clone(),
            number,
            is_common: queue == topology::UPDATES,
            owned,
            committed: stage.entrance(),
        },
        queue,
        worker,
        misfit: None,
        unseen_told: false,
    };
    tokio::select! {
        () = stage.failed() => {}
        () = consumer.run() => {}
    }
    drop(consumer);
    stage.finish().await;
}

/// What a lane does: it settles.
struct Settling {
    worker: Worker,
    number: usize,
    /// It serves the common queue, which readiness is about.
    is_common: bool,
    owned: Owned,
    committed: Entrance,
}

impl Settling {
    /// Settles what stays of a batch, once the publish stage has a place for it: the outbox must not grow while the broker
    /// takes nothing.
    async fn settle(
        &self,
        batch: Batch,
        patience: Option<Duration>,
        done: &mut Vec<Settled>,
    ) -> Result<(mpsc::Permit<'_, Committed>, Result<(), HandBack>), HandBack> {
        let limit = self.worker.settings.outbox.stuck_after;
        let place = match place_within(&self.committed, limit).await {
            Some(Ok(place)) => place,
            Some(Err(_)) => return Err(HandBack::no_publisher()),
            None => return Err(HandBack::stuck(limit)),
        };
        let (worker, owned) = (&self.worker, &self.owned);
        let count = batch.deliveries.len();
        let settled = match worker
            .settle(self.number, Door::Queue, batch, owned, patience, done)
            .await
        {
            Ok(blocked) => {
                debug_assert_eq!(
                    count,
                    done.iter().map(|part| part.judgements.len()).sum::<usize>()
                        + blocked.iter().map(|part| part.deliveries.len()).sum::<usize>(),
                    "one verdict for each delivery that needs nothing that is locked"
                );
                worker.keep(self.number, blocked, owned, patience, done).await
            }
            Err(why) => Err(why),
        };
        Ok((place, settled))
    }
}

impl Work for Settling {
    type Batch = Batch;

    async fn read(&self, deliveries: Vec<Delivery>) -> Batch {
        fail::point(Point::AfterReceive).await;
        let began = Instant::now();
        let batch = Batch::read(deliveries).await;
        Signal::Stage {
            stage: Stage::Facts,
            elapsed: began.elapsed(),
        }
        .emit();
        batch
    }

    async fn finish(&self, batch: Batch, received: Instant, disposer: &Disposer) -> Result<(), HandBack> {
        let all: Vec<u64> = batch.deliveries.iter().map(tag_of).collect();
        let patience = Some(self.worker.settings.worker.pause_release);
        let (batch, packs) = self.worker.fairness.triage(batch);
        let mut done = Vec::new();
        let (is_held, settled) = tokio::join!(self.worker.hold(&packs), self.settle(batch, patience, &mut done));
        let (place, mut settled) = settled?;
        if settled.is_ok() && !is_held {
            // What could not be held is judged in line.
            let deliveries = packs.into_iter().flat_map(|pack| pack.deliveries).collect();
            let batch = Batch::read(deliveries).await;
            let (worker, owned) = (&self.worker, &self.owned);
            settled = worker
                .settle_in_line(self.number, batch, owned, patience, &mut done)
                .await;
        }
        if settled.is_ok() {
            // Whatever they came to: what is refused is dead-lettered by us, never by the broker.
            dispose(disposer, self.number, &[], &all).await;
            fail::point(Point::AfterAck).await;
        }
        send_all(place, &self.committed, done, received).await;
        settled
    }

    async fn rehearse(&self, batch: &Batch) -> Result<(), StoreError> {
        settle::rehearse(&self.worker.clerk, batch).await
    }

    fn attached(&self, is: bool) {
        if is {
            self.worker.health.consumer_attached(self.is_common);
        } else {
            self.worker.health.consumer_gone(self.is_common);
        }
    }

    /// Without a consumer a lane is not ready, and without a database the worker is not.
    fn held_up(&self, _: Option<String>) {}

    /// A partner's own queue holds up nobody else.
    fn misfit(&self, why: Option<String>) {
        if self.is_common {
            self.worker.health.set_paused_by("queue settlement.updates", why);
        }
    }

    async fn detached(&self) {
        self.worker.wait_for_detached().await;
    }

    async fn has_place(&self) {
        drop(self.committed.reserve().await);
    }
}

impl Worker {
    /// Waits, for a moment, until no lane has a consumer: what goes back must not go to a neighbour, which would only give it
    /// back once more. Once intake is open again there is nothing to wait for.
    async fn wait_for_detached(&self) {
        let detached = async {
            while self.health.consumers_attached() > 0 && self.gate.is_closed() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        // A neighbour that takes longer costs its messages one delivery more.
        drop(tokio::time::timeout(Duration::from_secs(2), detached).await);
    }

    /// Settles a batch, however long the database is away, or until `patience` is over. A batch that is refused for
    /// something that one message can cause is cut in two until the culprit stands alone.
    ///
    /// What is committed goes to `done` at once, so that it is told even if a later part has to be handed back. Messages that
    /// need what somebody's open transaction has locked are not waited for: they come back.
    pub async fn settle(
        &self,
        lane: usize,
        door: Door,
        batch: Batch,
        owned: &Owned,
        patience: Option<Duration>,
        done: &mut Vec<Settled>,
    ) -> Result<Vec<Batch>, HandBack> {
        let mut blocked = Vec::new();
        let mut parts = if batch.deliveries.is_empty() {
            Vec::new()
        } else {
            vec![batch]
        };
        let mut patience = Patience::new(self, &self.gate, format!("lane {lane}"), patience);
        while let Some(part) = parts.pop() {
            let began = Instant::now();
            let id = Uuid::now_v7();
            let mut earlier = None;
            let mut culprit = false;
            let mut attempts = 0;
            loop {
                let published = owned.deletable();
                let outcome = if culprit {
                    let rejected = reject_culprit(&self.clerk, id, &part, &mut earlier).await;
                    rejected.map(Attempt::Settled)
                } else {
                    attempt(&self.clerk, &self.locks, id, &part, &published, &mut earlier).await
                };
                let error = match outcome {
                    Ok(Attempt::Blocked(places)) => {
                        let is_blocked = |index: usize| places.binary_search(&index).is_ok();
                        blocked.push(part.part(is_blocked));
                        let rest = part.part(|index| !is_blocked(index));
                        if !rest.deliveries.is_empty() {
                            parts.push(rest);
                        }
                        break;
                    }
                    Ok(Attempt::Settled(settled)) => {
                        owned.deleted(&settled.deleted);
                        if !settled.publications.is_empty() {
                            owned.add(id);
                        }
                        patience.over();
                        self.tell(lane, door, &part, &settled, began.elapsed());
                        done.push(settled);
                        break;
                    }
                    Err(error) => error,
                };
                match error.fate {
                    Fate::Retry if attempts < self.settings.retry.transient_attempts => {
                        attempts += 1;
                        // Somebody may hold a lock for long. Who needs it is found out once, and waits without us.
                        if error.is_lock_wait() && self.finds_locks(&part).await {
                            continue;
                        }
                        patience.short(id, lane, attempts, &error).await;
                    }
                    Fate::Bisect if !culprit => {
                        if let Some((left, right)) = part.halves() {
                            parts.extend([right, left]);
                            break;
                        }
                        if self.culprits.blame(self.settings.worker.culprits_per_minute) {
                            let digest = part.facts.first().map(|facts| hex::encode(facts.message_digest));
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
                        } else {
                            patience.wait(Cause::Culprits, &error, &part).await?;
                        }
                    }
                    // Its messages are somebody else's by now.
                    Fate::Overtaken => break,
                    Fate::Away | Fate::Retry => patience.wait(Cause::Database, &error, &part).await?,
                    Fate::Bisect | Fate::Ours | Fate::CommittedBefore => {
                        patience.wait(Cause::Schema, &error, &part).await?;
                    }
                }
            }
        }
        Ok(blocked)
    }

    /// Whether somebody's open transaction has locked what a batch needs; then that is remembered.
    pub(super) async fn finds_locks(&self, batch: &Batch) -> bool {
        match settle::find_locked(&self.clerk, batch).await {
            Ok(locks) if !locks.is_empty() => {
                Signal::LocksFound { locks: locks.len() }.emit();
                self.locks.remember(locks);
                true
            }
            Ok(_) | Err(_) => false,
        }
    }

    /// Stores packs in the side room, and says whether that is known to have been done.
    async fn hold(&self, packs: &[Pack]) -> bool {
        if packs.is_empty() {
            return true;
        }
        let began = Instant::now();
        let mut attempts = 0;
        loop {
            match self.clerk.store.hold(packs).await {
                Ok(()) => {
                    for pack in packs {
                        let messages = u64::try_from(pack.deliveries.len()).unwrap_or(u64::MAX);
                        Signal::Held {
                            why: pack.why.as_str(),
                            messages,
                        }
                        .emit();
                    }
                    Signal::Stage {
                        stage: Stage::Hold,
                        elapsed: began.elapsed(),
                    }
                    .emit();
                    self.fairness.put.notify_one();
                    return true;
                }
                Err(error) if error.fate == Fate::Retry && attempts < self.settings.retry.transient_attempts => {
                    attempts += 1;
                }
                Err(error) => {
                    let error = error.to_string();
                    Signal::HoldFailed { error: &error }.emit();
                    return false;
                }
            }
        }
    }

    /// Keeps messages of a queue that need what is locked, in the side room; where that has no room, they wait in line.
    async fn keep(
        &self,
        lane: usize,
        blocked: Vec<Batch>,
        owned: &Owned,
        patience: Option<Duration>,
        done: &mut Vec<Settled>,
    ) -> Result<(), HandBack> {
        for batch in blocked {
            let packs = self.fairness.packs_of_locked(&batch);
            if let Some(packs) = packs
                && self.hold(&packs).await
            {
                continue;
            }
            self.settle_in_line(lane, batch, owned, patience, done).await?;
        }
        Ok(())
    }

    /// Waits for what is locked, as long as it takes, and pauses intake meanwhile: nothing is dropped.
    async fn settle_in_line(
        &self,
        lane: usize,
        batch: Batch,
        owned: &Owned,
        limit: Option<Duration>,
        done: &mut Vec<Settled>,
    ) -> Result<(), HandBack> {
        let mut patience = Patience::new(self, &self.gate, format!("lane {lane}"), limit);
        let mut blocked = vec![batch];
        while let Some(batch) = blocked.pop() {
            let again = self.settle(lane, Door::Queue, batch, owned, limit, done).await?;
            for batch in again {
                let error = StoreError::room_is_full();
                patience.wait(Cause::Database, &error, &batch).await?;
                blocked.push(batch);
            }
        }
        patience.over();
        Ok(())
    }

    pub(super) fn tell(&self, lane: usize, door: Door, batch: &Batch, settled: &Settled, elapsed: Duration) {
        let mut tally = Tally::new();
        for (facts, judgement) in batch.facts.iter().zip(&settled.judgements) {
            let (verdict, enterprise_id) = (&judgement.verdict, facts.enterprise_id.as_deref());
            tally.add(&self.labels, enterprise_id, verdict.kind(), verdict.reason());
        }
        Signal::BatchJudged {
            batch: settled.id,
            lane,
            from: door,
            tally: &tally,
        }
        .emit();
        Signal::Stage {
            stage: Stage::Settle,
            elapsed,
        }
        .emit();
    }
}

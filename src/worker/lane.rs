//! A lane: it takes updates, settles them, acknowledges and has them published.

use std::{
    pin::{Pin, pin},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    Worker,
    consumer::{Consumer, Work, acknowledge},
    driver::drive,
    in_hand::{InHand, Settler},
    patience::HandBack,
    publish::{Committed, Entrance, Owned, PublishStage, place_in, send_all},
};
use crate::{
    broker::{intake::Disposer, topology},
    domain::delivery::Delivery,
    fail::{self, Point},
    settle::{self, Batch, next_step::Terms},
    store::{
        Fate, StoreError,
        held::{HeldTotal, Pack, new_ids},
    },
    telemetry::{Door, Signal, Stage},
};

/// A worker that could settle nothing for so long is not ready.
const UNREADY_AFTER: Duration = Duration::from_secs(5);
/// How often it is looked again whether the other lanes settle.
const WATCHED_EVERY: Duration = Duration::from_millis(500);

/// A lane: a consumer, a database connection and a publisher, with queues of depth one between the stages.
pub(super) async fn lane(worker: Worker, number: usize, queue: String) {
    let _at_work = worker.running.begin(format!("lane {number} of {queue}"));
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
        unseen: false,
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

impl Work for Settling {
    type Batch = Batch;

    const DOOR: Door = Door::Queue;

    async fn read(&self, deliveries: Vec<Delivery>) -> Batch {
        fail::point(Point::AfterReceive).await;
        let began = Instant::now();
        let batch = Batch::read(deliveries).await;
        Signal::stage(Stage::Facts, began).emit();
        batch
    }

    /// The walk of a batch from take to ack. The consumer has taken it and read it while the one before was in the database.
    async fn finish(&self, taken: Batch, received: Instant, disposer: &Disposer) -> Result<(), HandBack> {
        let (worker, number) = (&self.worker, self.number);
        // A place in the publish stage first: the outbox must not grow while the broker takes nothing.
        let place = self.place().await?;
        // Who sends more than his share, or faster than he may, waits in the side room; everybody else is judged now.
        let storing = if worker.fairness.may_hold(&taken, &worker.locks) {
            Some(worker.fairness.storing().await)
        } else {
            None
        };
        let (batch, packs) = worker.fairness.triage(taken.clone(), &worker.locks);
        let mut settler = Settler::new(worker, number, Door::Queue, &self.owned);
        settler.is_common = self.is_common;
        let mut hand = InHand::new(settler, Terms::LANE);
        let settled = {
            let settling = pin!(async {
                let hold = async {
                    let is_held = worker.hold(&packs).await;
                    drop(storing);
                    is_held
                };
                // Load, decide, write, commit, and again and in parts where that fails: `settle::attempt`, `settle::next_step`.
                let (is_held, settled) = tokio::join!(hold, drive(&mut hand, batch));
                settled?;
                // What needs what somebody's open transaction has locked is kept, or waits in line where it can not be kept.
                hand.keep_blocked().await?;
                if is_held {
                    hand.note_held(&packs);
                } else {
                    let deliveries = packs.into_iter().flat_map(|pack| pack.deliveries).collect();
                    hand.settle_in_line(Batch::read(deliveries).await).await?;
                }
                hand.account_for(&taken).await
            });
            self.watched(settling).await
        };
        if settled.is_ok() && self.is_common {
            worker.health.note_settled();
        }
        // What is committed is told, even if the rest goes back, and while it is acknowledged: neither waits for the other.
        let telling = send_all(place, &self.committed, hand.settler.done, received);
        let acknowledging = async {
            if settled.is_ok() {
                // Whatever they came to: what is refused is dead-lettered by us, never by the broker.
                acknowledge(disposer, number, taken.sources()).await;
                fail::point(Point::AfterAck).await;
            }
        };
        tokio::join!(telling, acknowledging);
        settled
    }

    async fn rehearse(&self, batch: &Batch) -> Result<(), StoreError> {
        self.worker.ask_books().await?;
        let room = self.worker.fairness.room_for(batch);
        settle::rehearse(&self.worker.clerk, batch, room).await
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

impl Settling {
    /// Waits for the database to settle a batch. While neither this one nor any other comes through for long the worker is not
    /// ready: COMMIT waits for a standby that is frozen, say, which the server itself does not call an error.
    async fn watched<T>(&self, mut settling: Pin<&mut impl Future<Output = T>>) -> T {
        let health = &self.worker.health;
        let who = format!("settling of lane {}", self.number);
        let mut wait = UNREADY_AFTER;
        loop {
            if let Ok(settled) = tokio::time::timeout(wait, &mut settling).await {
                health.set_paused_by(&who, None);
                return settled;
            }
            let is_stuck = self.is_common && !health.settled_within(UNREADY_AFTER);
            let why = || {
                format!(
                    "nothing was settled for {UNREADY_AFTER:?}: a batch waits for the database, which may wait for a lock or for \
                     its standby"
                )
            };
            health.set_paused_by(&who, is_stuck.then(why));
            wait = WATCHED_EVERY;
        }
    }

    /// A place in the publish stage. Who waits for one for long settles nothing meanwhile, which readiness is about.
    async fn place(&self) -> Result<mpsc::Permit<'_, Committed>, HandBack> {
        let mut placing = pin!(place_in(&self.committed, self.worker.settings.outbox.stuck_after));
        if let Ok(placed) = tokio::time::timeout(UNREADY_AFTER, &mut placing).await {
            return placed;
        }
        let who = format!("publishing of lane {}", self.number);
        let why = format!("what was settled before could not be published for {UNREADY_AFTER:?}, so nothing more is");
        if self.is_common {
            self.worker.health.set_paused_by(&who, Some(why));
        }
        let placed = placing.await;
        self.worker.health.set_paused_by(&who, None);
        placed
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

    /// Asks the database how much the side room holds; None if it does not say.
    pub(super) async fn measure_room(&self) -> Option<Vec<HeldTotal>> {
        let measuring = self.fairness.measuring().await;
        let totals = self.clerk.store.count_held().await.ok()?;
        self.fairness.measured(&totals);
        drop(measuring);
        Some(totals)
    }

    /// Stores packs in the side room, and says whether that is known to have been done.
    pub(super) async fn hold(&self, packs: &[Pack]) -> bool {
        if packs.is_empty() {
            return true;
        }
        let began = Instant::now();
        let ids = new_ids(packs);
        let mut attempts = 0;
        let mut cut_off = false;
        loop {
            match self.clerk.store.hold(&ids, packs).await {
                Ok(()) => {
                    for pack in packs {
                        let messages = u64::try_from(pack.deliveries.len()).unwrap_or(u64::MAX);
                        Signal::Held {
                            why: pack.why.as_str(),
                            messages,
                        }
                        .emit();
                    }
                    Signal::stage(Stage::Hold, began).emit();
                    self.fairness.put.notify_one();
                    return true;
                }
                Err(error) if error.fate == Fate::Retry && attempts < self.settings.retry.transient_attempts => {
                    attempts += 1;
                }
                // It may have been stored: it is asked once, under the same ids.
                Err(error) if error.fate == Fate::Away && !cut_off => cut_off = true,
                Err(error) => {
                    let error = error.to_string();
                    Signal::HoldFailed { error: &error }.emit();
                    return false;
                }
            }
        }
    }
}

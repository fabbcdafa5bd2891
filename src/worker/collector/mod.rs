//! The collector: dead letters from their queue into the database, acknowledged once they are stored.

mod filing;
mod letters;
mod second;
mod space;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use uuid::Uuid;

pub use self::{filing::rehearse, second::collect as collect_second, space::SpaceWatch};
use self::{
    filing::{Stored, file, rehearse_with, tellings},
    letters::{Effects, Letters},
    space::{RESUME_BELOW, bounds},
};
use super::{
    Worker,
    consumer::{Consumer, Work, dispose, tag_of},
    patience::{Culprits, Gate, HandBack, Patience},
    publish::{Entrance, Owned, PublishStage, place_within, send_all},
};
use crate::{
    broker::{
        BrokerError, Connection,
        intake::Disposer,
        publisher::{Fate as Routed, Publisher},
        topology,
    },
    domain::{
        dead_letter::{self, Arrival, Cause, Trusted},
        delivery::{BatchId, Delivery, Publication},
        event,
    },
    fail::{self, Point},
    retry::{self, Backoff, Waited},
    settle::{Batch, Settled},
    store::{Fate, StoreError},
    telemetry::{Cause as PauseCause, Intake as Door, Signal, Stage, Tally},
};

/// Who pauses, as /readyz tells it.
const WHO: &str = "collector";

/// What became of the dead letters taken so far.
#[derive(Debug, Default)]
pub struct Account {
    /// Messages that had no row.
    pub new: AtomicU64,
    /// Further failures of messages that had one.
    pub again: AtomicU64,
    /// Copies of what was stored before.
    pub copies: AtomicU64,
    /// Set apart in `settlement.unreadable`.
    pub unreadable: AtomicU64,
    /// There is no room for more.
    pub full: AtomicBool,
}

/// Moves dead letters until the program stops.
pub async fn run(worker: Worker) {
    collect(worker, &Arc::default()).await;
}

/// The same, and keeps count.
pub async fn collect(mut worker: Worker, account: &Arc<Account>) {
    // Its own: what the collector can not store must not hold up the lanes, nor use up their blame.
    worker.culprits = Culprits::default();
    let settings = Arc::clone(&worker.settings);
    let owned = Owned::default();
    let mut stage = PublishStage::start(worker.row_publisher(WHO), &owned, &settings.outbox);
    // Lanes count from zero, and the second intake is the one after them.
    let number = settings.worker.lanes + 1;
    let second = second::collect(worker.clone(), Arc::clone(account));
    let batch_max = settings.dead_letters.batch_max;
    let gate = Gate::default();
    let mut consumer = Consumer {
        number,
        name: WHO.to_owned(),
        queue: topology::DEAD.to_owned(),
        // While one batch is being stored the next one arrives.
        prefetch: u16::try_from(batch_max.saturating_mul(2))
            .map_or(PREFETCH_MAX, |prefetch| prefetch.min(PREFETCH_MAX)),
        batch_max,
        linger: settings.dead_letters.linger,
        gate: gate.clone(),
        work: Storing {
            worker: worker.clone(),
            gate,
            number,
            owned,
            committed: stage.entrance(),
            account: Arc::clone(account),
            trusted: trusted(&worker),
        },
        worker,
        misfit: None,
        unseen_told: false,
    };
    tokio::select! {
        () = stage.failed() => {}
        ((), ()) = async { tokio::join!(consumer.run(), second) } => {}
    }
    drop(consumer);
    stage.finish().await;
}

/// Whose letters say why: our own login's, and whose else the settings name.
fn trusted(worker: &Worker) -> Trusted {
    let others = worker.settings.broker.trusted_users.iter().cloned();
    Trusted::new(worker.broker.login().into_iter().chain(others))
}

/// A quorum queue's limit.
const PREFETCH_MAX: u16 = 2_000;

/// What the collector does: it stores.
struct Storing {
    worker: Worker,
    gate: Gate<Letters>,
    number: usize,
    owned: Owned,
    committed: Entrance,
    account: Arc<Account>,
    trusted: Trusted,
}

impl Storing {
    /// One attempt: what is known, how these join it, write, commit.
    async fn store(&self, id: BatchId, letters: &Letters) -> Result<Stored, StoreError> {
        let clerk = &self.worker.clerk;
        let effects = letters.effects(clerk).await?;
        let arrivals = letters.arrivals(&effects);
        let ids: Vec<Uuid> = arrivals.iter().map(Arrival::id).collect();
        let bounds = bounds(&self.worker.settings.dead_letters);
        let (open, known, now) = clerk.store.open_filing(&ids, bounds).await?;
        let firsts = open.remember(id, &tellings(&arrivals, now)).await?;
        let filed = file(clerk, id, &arrivals, &effects, &known, &firsts, now)?;
        open.write(&filed.outcome(clerk, &arrivals)).await?;
        Ok(filed.stored())
    }

    /// The same in the long run: patient with the database, and bisecting down to what it refuses.
    async fn store_all(
        &self,
        letters: Letters,
        done: &mut Vec<Settled>,
        apart: &mut Vec<Publication>,
    ) -> Result<(), HandBack<Letters>> {
        let settings = &self.worker.settings;
        let mut parts = vec![letters];
        let limit = Some(settings.worker.pause_release);
        let mut patience = Patience::new(&self.worker, &self.gate, WHO.to_owned(), limit);
        let mut full_since = None;
        let mut backoff = Backoff::new(&settings.retry);
        while let Some(mut part) = parts.pop() {
            let began = Instant::now();
            let mut id = Uuid::now_v7();
            let mut attempts = 0;
            loop {
                if part.causes.is_empty() {
                    break;
                }
                let error = match self.store(id, &part).await {
                    Ok(stored) => {
                        if !stored.settled.publications.is_empty() {
                            self.owned.add(id);
                        }
                        patience.over();
                        full_since = None;
                        self.tell_room(None);
                        self.tell(&part, &stored, began.elapsed());
                        done.push(stored.settled);
                        break;
                    }
                    Err(error) => error,
                };
                // What is stored by now must not count as another failure; its events are in the outbox, for the relay, and
                // those of the next attempt need a row of their own beside them.
                if error.at_commit {
                    part.again = true;
                    id = Uuid::now_v7();
                }
                if error.is_full() {
                    self.wait_for_room(&error, &mut full_since, &mut backoff, &part).await?;
                    continue;
                }
                match error.fate {
                    Fate::Retry | Fate::CommittedBefore if attempts < settings.retry.transient_attempts => {
                        attempts += 1;
                        patience.short(id, self.number, attempts, &error).await;
                    }
                    Fate::Bisect => {
                        if let Some((left, right)) = part.halves() {
                            parts.extend([right, left]);
                            break;
                        }
                        if !self.worker.culprits.blame(settings.worker.culprits_per_minute) {
                            patience.wait(PauseCause::Culprits, &error, &part).await?;
                            continue;
                        }
                        let sqlstate = error.sqlstate.clone();
                        self.set_apart(&part, sqlstate.as_deref(), |_| error.to_string(), apart);
                        break;
                    }
                    Fate::Away | Fate::Retry => patience.wait(PauseCause::Database, &error, &part).await?,
                    Fate::Ours | Fate::CommittedBefore | Fate::Overtaken => {
                        patience.wait(PauseCause::Schema, &error, &part).await?
                    }
                }
            }
        }
        Ok(())
    }

    /// Holds what is in hand while there is no room for it, as long as a pause may last; then it goes back, once, and the
    /// consumer with it. Settling goes on meanwhile.
    async fn wait_for_room(
        &self,
        error: &StoreError,
        since: &mut Option<Instant>,
        backoff: &mut Backoff,
        part: &Letters,
    ) -> Result<(), HandBack<Letters>> {
        self.tell_room(Some(error));
        let since = since.get_or_insert_with(Instant::now);
        let mut stop = self.worker.stop.clone();
        let is_over = since.elapsed() >= self.worker.settings.worker.pause_release;
        if is_over || retry::sleep(backoff.next(), &mut stop).await == Waited::Stopping {
            return Err(HandBack::of(error.to_string(), part.clone()));
        }
        Ok(())
    }

    /// Says once that there is no room, and once that there is again.
    fn tell_room(&self, full: Option<&StoreError>) {
        let was_full = self.account.full.swap(full.is_some(), Ordering::Relaxed);
        match full {
            Some(error) => {
                let why = error.to_string();
                if !was_full {
                    Signal::DeadLettersFull { why: &why }.emit();
                }
                self.worker.health.set_collector(Some(why));
            }
            None if was_full => {
                Signal::DeadLettersHaveRoom.emit();
                self.worker.health.set_collector(None);
            }
            None => {}
        }
    }

    /// Leaves letters to `settlement.unreadable`: they are published there by us, since what the broker does with them when
    /// they are rejected depends on what is in them.
    fn set_apart(
        &self,
        letters: &Letters,
        sqlstate: Option<&str>,
        why: impl Fn(&Delivery) -> String,
        apart: &mut Vec<Publication>,
    ) {
        for arrival in letters.arrivals(&Effects::default()) {
            let message = arrival.message;
            let (digest, error) = (hex::encode(message.facts.message_digest), why(message.delivery));
            Signal::DeadLetterSetApart {
                digest: &digest,
                sqlstate,
                error: &error,
            }
            .emit();
            self.account.unreadable.fetch_add(1, Ordering::Relaxed);
            let Cause { reason, detail, .. } = arrival.cause;
            let failed_at = dead_letter::failed_at(&arrival, Timestamp::now());
            apart.push(event::set_apart(message, *reason, detail, failed_at));
        }
    }

    /// Publishes what is set apart, on a connection of its own: there is next to never any. Without its confirms nothing of
    /// the batch is acknowledged.
    async fn publish_apart(&self, apart: &[Publication]) -> Result<(), HandBack<Letters>> {
        if apart.is_empty() {
            return Ok(());
        }
        let name = format!("{} {WHO} set apart", self.worker.settings.worker.name);
        let published = async {
            let connection = Connection::open_without_consumer(&self.worker.broker, &name).await?;
            let mut publisher = Publisher::open(&connection).await?;
            let mut fates = Vec::with_capacity(apart.len());
            for publication in apart {
                fates.extend(publisher.publish(std::slice::from_ref(publication)).await?);
            }
            drop(connection.close().await);
            Ok::<_, BrokerError>(fates)
        };
        match published.await {
            Ok(fates) if fates.iter().all(|fate| *fate == Routed::Confirmed) => Ok(()),
            Ok(_) => Err(HandBack::because(
                "settlement.unreadable does not take what can not be stored",
            )),
            Err(error) => Err(HandBack::because(format!(
                "what can not be stored could not be published to settlement.unreadable: {error}"
            ))),
        }
    }

    fn tell(&self, letters: &Letters, stored: &Stored, elapsed: Duration) {
        let total = u64::try_from(letters.causes.len()).unwrap_or(u64::MAX);
        let counted = u64::try_from(stored.filing.counted.len()).unwrap_or(u64::MAX);
        let new = stored.filing.entries.values().filter(|entry| entry.is_new).count();
        let new = u64::try_from(new).unwrap_or(u64::MAX);
        let (again, copies) = (counted.saturating_sub(new), total.saturating_sub(counted));
        self.account.new.fetch_add(new, Ordering::Relaxed);
        self.account.again.fetch_add(again, Ordering::Relaxed);
        self.account.copies.fetch_add(copies, Ordering::Relaxed);
        Signal::DeadLettersCollected {
            new,
            again,
            copies,
            lag: stored.lag,
        }
        .emit();
        Signal::Stage {
            stage: Stage::Collect,
            elapsed,
        }
        .emit();
        if stored.settled.judgements.is_empty() {
            return;
        }
        let mut tally = Tally::new();
        for judgement in &stored.settled.judgements {
            let verdict = &judgement.verdict;
            tally.add(&self.worker.labels, None, verdict.kind(), verdict.reason());
        }
        Signal::BatchJudged {
            batch: stored.settled.id,
            lane: self.number,
            from: Door::Dead,
            tally: &tally,
        }
        .emit();
    }
}

impl Work for Storing {
    type Batch = Letters;

    async fn read(&self, deliveries: Vec<Delivery>) -> Letters {
        fail::point(Point::CollectorReceived).await;
        let now = Timestamp::now();
        let (deliveries, causes): (Vec<_>, Vec<Cause>) = deliveries
            .into_iter()
            .map(|mut delivery| {
                // What comes both ways is one failure.
                delivery.redelivered |= dead_letter::may_be_cut(&delivery);
                dead_letter::open(delivery, &self.trusted, now)
            })
            .unzip();
        let is_untold = |index: usize| causes.get(index).is_some_and(Cause::is_untold);
        let batch = Batch::read_signed_where(deliveries, is_untold).await;
        let causes = causes
            .into_iter()
            .zip(&batch.facts)
            .map(|(cause, facts)| dead_letter::explain(cause, facts))
            .collect();
        Letters {
            batch,
            causes,
            again: false,
        }
    }

    async fn finish(&self, letters: Letters, received: Instant, disposer: &Disposer) -> Result<(), HandBack<Letters>> {
        // A place in the publish stage first: the outbox must not grow while the broker takes nothing.
        let limit = self.worker.settings.outbox.stuck_after;
        let place = match place_within(&self.committed, limit).await {
            Some(Ok(place)) => place,
            Some(Err(_)) => return Err(HandBack::no_publisher()),
            None => return Err(HandBack::stuck(limit)),
        };
        let tags: Vec<u64> = letters.batch.deliveries.iter().map(tag_of).collect();
        let (letters, unstorable) = letters.sort();
        let (mut done, mut apart) = (Vec::new(), Vec::new());
        let why = |delivery: &Delivery| dead_letter::unstorable(delivery).unwrap_or_default().to_owned();
        self.set_apart(&unstorable, None, why, &mut apart);
        let mut stored = self.store_all(letters, &mut done, &mut apart).await;
        if stored.is_ok() {
            fail::point(Point::CollectorCommitted).await;
            stored = self.publish_apart(&apart).await;
        }
        if stored.is_ok() {
            dispose(disposer, self.number, &[], &tags).await;
            fail::point(Point::CollectorAcked).await;
        }
        done.retain(|settled| !settled.publications.is_empty());
        send_all(place, &self.committed, done, received).await;
        stored
    }

    async fn rehearse(&self, letters: &Letters) -> Result<(), StoreError> {
        let clerk = &self.worker.clerk;
        rehearse_with(clerk, letters).await?;
        let most = if self.account.full.load(Ordering::Relaxed) {
            RESUME_BELOW
        } else {
            1.0
        };
        let bounds = bounds(&self.worker.settings.dead_letters);
        let room = clerk.store.check_dead_letter_space(bounds, most).await;
        match &room {
            Err(error) if error.is_full() => self.tell_room(Some(error)),
            Err(_) => {}
            Ok(()) => self.tell_room(None),
        }
        room
    }

    /// Readiness is about settling: it asks for the lanes' consumers.
    fn attached(&self, _: bool) {}

    fn held_up(&self, why: Option<String>) {
        // Where there is no room it says so, and settling goes on.
        let is_full = self.account.full.load(Ordering::Relaxed);
        let why = why
            .filter(|_| !is_full)
            .map(|why| format!("the collector of dead letters: {why}"));
        self.worker.health.set_paused_by(WHO, why);
    }

    fn misfit(&self, why: Option<String>) {
        self.worker.health.set_paused_by("queue settlement.dead", why);
    }

    /// There is one collector a process.
    async fn detached(&self) {}

    async fn has_place(&self) {
        drop(self.committed.reserve().await);
    }
}

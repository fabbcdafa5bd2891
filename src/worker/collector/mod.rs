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

pub use self::{filing::rehearse, space::SpaceWatch};
use self::{
    filing::{StoredLetters, file, rehearse_with, tellings},
    letters::{Effects, Letter, Letters},
    space::{RESUME_BELOW, bounds},
};
use super::{
    Worker,
    consumer::{Consumer, Work, acknowledge},
    driver::{Holder, Trying, drive},
    in_hand::each_once,
    patience::{Culprits, Gate, HandBack, Patience},
    publish::{Entrance, Owned, PublishStage, place_in, send_all},
};
use crate::{
    broker::{
        BrokerError, Connection,
        intake::Disposer,
        publisher::{BrokerAnswer, Publisher},
        topology,
    },
    domain::{
        dead_letter::{self, Arrival, Cause, Trusted},
        delivery::{BatchId, Delivery, Publication, Source},
    },
    fail::{self, Point},
    retry::{self, Backoff, Waited},
    settle::{Answered, next_step::Terms, read_signed_where},
    store::StoreError,
    telemetry::{Dependency, Door, PauseCause, Signal, Stage, Tally},
};

/// Who pauses, as /readyz tells it.
const WHO: &str = "collector";

/// What became of the dead letters taken so far.
#[derive(Debug, Default)]
pub struct Collected {
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
pub async fn collect(worker: Worker, account: &Arc<Collected>) {
    let way = Way {
        who: WHO,
        queue: topology::DEAD.to_owned(),
        linger: worker.settings.dead_letters.linger,
    };
    let first = serve(worker.clone(), account, &way, |storing| (storing.gate.clone(), storing));
    let others = second::collect(worker, Arc::clone(account), true);
    tokio::join!(first, others);
}

/// Where dead letters are left in their queue: what the broker may keep away from it is stored all the same.
pub async fn collect_others(worker: Worker) {
    second::collect(worker, Arc::default(), false).await;
}

/// One of the ways by which dead letters come.
struct Way {
    /// As logs and connections name it.
    who: &'static str,
    queue: String,
    /// How long it waits for more once a letter is there.
    linger: Duration,
}

/// Consumes one way, with a publish stage of its own, until the program stops.
async fn serve<W: Work>(
    mut worker: Worker,
    account: &Arc<Collected>,
    way: &Way,
    work: impl FnOnce(Storing) -> (Gate<W::Batch>, W),
) {
    // Its own: what the collector can not store must not hold up the lanes, nor use up their blame.
    worker.culprits = Culprits::default();
    let owned = Owned::default();
    let mut stage = PublishStage::start(worker.row_publisher(way.who), &owned, &worker.settings.outbox);
    // Lanes count from zero, and the second intake is the one after them.
    let number = worker.settings.worker.lanes + 1;
    let (gate, work) = work(Storing {
        worker: worker.clone(),
        gate: Gate::default(),
        number,
        owned,
        committed: stage.entrance(),
        account: Arc::clone(account),
        trusted: trusted(&worker),
    });
    let batch_max = worker.settings.dead_letters.batch_max;
    let mut consumer = Consumer {
        number,
        name: way.who.to_owned(),
        queue: way.queue.clone(),
        // While one batch is being stored the next one arrives.
        prefetch: u16::try_from(batch_max.saturating_mul(2)).map_or(PREFETCH_MAX, |most| most.min(PREFETCH_MAX)),
        batch_max,
        linger: way.linger,
        gate,
        work,
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
    account: Arc<Collected>,
    trusted: Trusted,
}

impl Storing {
    /// One attempt: what is known, how these join it, write, commit.
    async fn store(&self, id: BatchId, letters: &Letters) -> Result<StoredLetters, StoreError> {
        let clerk = &self.worker.clerk;
        let loading = Instant::now();
        let effects = letters.effects(clerk).await?;
        let arrivals = letters.arrivals(&effects);
        let ids: Vec<Uuid> = arrivals.iter().map(Arrival::id).collect();
        let bounds = bounds(&self.worker.settings.dead_letters);
        let (open, known, now) = clerk.store.open_filing(&ids, bounds).await?;
        let firsts = open.remember(id, &tellings(&arrivals, now)).await?;
        Signal::stage(Stage::Load, loading).emit();
        let deciding = Instant::now();
        let filed = file(clerk, id, &arrivals, &effects, &known, &firsts, now)?;
        Signal::stage(Stage::Decide, deciding).emit();
        let writing = Instant::now();
        open.write(&filed.outcome(clerk, &arrivals)).await?;
        // Its commit is a part of it.
        Signal::stage(Stage::Write, writing).emit();
        Ok(filed.stored())
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

    fn tell(&self, letters: &Letters, stored: &StoredLetters, began: Instant) {
        let total = u64::try_from(letters.len()).unwrap_or(u64::MAX);
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
        Signal::stage(Stage::Collect, began).emit();
        if stored.answered.answers.is_empty() {
            return;
        }
        let mut tally = Tally::new();
        for answer in &stored.answered.answers {
            let verdict = &answer.judgement.verdict;
            tally.add(&self.worker.labels, None, verdict.kind(), verdict.reason());
        }
        Signal::BatchJudged {
            batch: stored.answered.id,
            lane: self.number,
            from: Door::Dead,
            tally: &tally,
        }
        .emit();
    }
}

/// Dead letters in hand, on their way into the database.
struct Filer<'a> {
    storing: &'a Storing,
    patience: Patience<Letters>,
    /// What is committed: it is told even if the rest has to be handed back.
    done: Vec<Answered>,
    /// What is published to `settlement.unreadable` instead of being stored.
    apart: Vec<Publication>,
    /// Where they came from, those that are stored and those that are set apart.
    seen_to: Vec<Source>,
    full_since: Option<Instant>,
    backoff: Backoff,
}

impl<'a> Filer<'a> {
    fn new(storing: &'a Storing) -> Self {
        let worker = &storing.worker;
        Self {
            storing,
            patience: Patience::new(worker, &storing.gate, WHO.to_owned()),
            done: Vec::new(),
            apart: Vec::new(),
            seen_to: Vec::new(),
            full_since: None,
            backoff: Backoff::new(&worker.settings.retry),
        }
    }

    /// Leaves letters to `settlement.unreadable`: they are published there by us, since what the broker does with them when
    /// they are rejected depends on what is in them.
    fn set_apart(&mut self, letters: &Letters, sqlstate: Option<&str>, why: impl Fn(&Delivery) -> String) {
        for arrival in letters.arrivals(&Effects::default()) {
            let message = arrival.message;
            let (digest, error) = (hex::encode(message.facts.message_digest), why(message.delivery));
            Signal::DeadLetterSetApart {
                digest: &digest,
                sqlstate,
                error: &error,
            }
            .emit();
            self.storing.account.unreadable.fetch_add(1, Ordering::Relaxed);
            let Cause { reason, detail, .. } = arrival.cause;
            let failed_at = dead_letter::failed_at(&arrival, Timestamp::now());
            self.apart
                .push(dead_letter::set_apart(message, *reason, detail, failed_at));
            self.seen_to.push(message.delivery.source);
        }
    }

    /// Publishes what is set apart, and waits as for a database that is away while that does not go. Without its confirms
    /// nothing of the batch is acknowledged.
    async fn publish_apart(&mut self, taken: &Letters) -> Result<(), HandBack<Letters>> {
        while let Err(why) = self.try_publish_apart().await {
            self.patience
                .wait_for(Dependency::Broker, PauseCause::Broker, why, taken)
                .await?;
        }
        Ok(())
    }

    /// On a connection of its own: there is next to never any.
    async fn try_publish_apart(&self) -> Result<(), String> {
        if self.apart.is_empty() {
            return Ok(());
        }
        let worker = &self.storing.worker;
        let name = format!("{} {WHO} set apart", worker.settings.worker.name);
        let published = async {
            let connection = Connection::open_without_consumer(&worker.broker, &name).await?;
            let mut publisher = Publisher::open(&connection).await?;
            let mut fates = Vec::with_capacity(self.apart.len());
            for publication in &self.apart {
                fates.extend(publisher.publish(std::slice::from_ref(publication)).await?);
            }
            // They are confirmed; a connection that does not close in order is cut.
            drop(connection.close().await);
            Ok::<_, BrokerError>(fates)
        };
        match published.await {
            Ok(fates)
                if fates.len() == self.apart.len() && fates.iter().all(|fate| *fate == BrokerAnswer::Confirmed) =>
            {
                Ok(())
            }
            Ok(_) => Err("settlement.unreadable does not take what can not be stored".to_owned()),
            Err(error) => Err(format!(
                "what can not be stored could not be published to settlement.unreadable: {error}"
            )),
        }
    }

    /// Whether each letter that was taken is stored or set apart, once. If not it is a mistake of ours, and nothing may be
    /// acknowledged.
    async fn account_for(&mut self, taken: &Letters) -> Result<(), HandBack<Letters>> {
        let Err(error) = each_once(taken.sources(), self.seen_to.iter().copied()) else {
            return Ok(());
        };
        loop {
            self.patience.wait(PauseCause::Schema, &error, taken).await?;
        }
    }
}

impl Holder for Filer<'_> {
    type Part = Letters;

    fn terms(&self) -> Terms {
        Terms::COLLECTOR
    }

    fn worker(&self) -> &Worker {
        &self.storing.worker
    }

    fn number(&self) -> usize {
        self.storing.number
    }

    fn patience(&mut self) -> &mut Patience<Letters> {
        &mut self.patience
    }

    fn count(part: &Letters) -> usize {
        part.len()
    }

    async fn attempt(&mut self, trying: &mut Trying, part: &Letters) -> Result<Vec<Letters>, StoreError> {
        let stored = self.storing.store(trying.id, part).await?;
        if !stored.answered.publications.is_empty() {
            self.storing.owned.add(stored.answered.id);
        }
        self.patience.over();
        self.full_since = None;
        self.storing.tell_room(None);
        self.storing.tell(part, &stored, trying.began);
        self.seen_to.extend(part.sources());
        self.done.push(stored.answered);
        Ok(Vec::new())
    }

    async fn cut(&mut self, part: Letters) -> Vec<Letters> {
        part.halves().map_or_else(Vec::new, |[left, right]| vec![right, left])
    }

    /// It is said where it is set apart.
    fn blame(&self, _: &Trying, _: &Letters, _: &StoreError) {}

    /// What the database does not take can not be told to it either.
    async fn reject(&mut self, _: &mut Trying, part: &Letters, why: &StoreError) -> Result<(), StoreError> {
        self.set_apart(part, why.sqlstate.as_deref(), |_| why.to_string());
        Ok(())
    }

    async fn finds_locks(&self, _: &Letters) -> bool {
        false
    }

    /// What is stored by now must not count as another failure; its events are in the outbox, for the relay, and those of the
    /// next attempt need a row of their own beside them.
    fn commit_unknown(&mut self, trying: &mut Trying, part: &mut Letters) {
        part.again = true;
        trying.begin_another();
    }

    /// Holds what is in hand while there is no room for it, as long as a pause may last; then it goes back, once, and the
    /// consumer with it. Settling goes on meanwhile.
    async fn wait_for_room(&mut self, error: &StoreError, part: &Letters) -> Result<(), HandBack<Letters>> {
        self.storing.tell_room(Some(error));
        let worker = &self.storing.worker;
        let since = self.full_since.get_or_insert_with(Instant::now);
        let mut stop = worker.stop.clone();
        let is_over = since.elapsed() >= worker.settings.worker.pause_release;
        if is_over || retry::sleep(self.backoff.next(), &mut stop).await == Waited::Stopping {
            return Err(HandBack::of(error.to_string(), part.clone()));
        }
        Ok(())
    }
}

impl Work for Storing {
    type Batch = Letters;

    const DOOR: Door = Door::Dead;

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
        let messages = read_signed_where(deliveries, is_untold).await;
        let letters = messages.into_iter().zip(causes);
        Letters::new(
            letters
                .map(|(message, cause)| Letter {
                    cause: dead_letter::explain(cause, &message.facts),
                    message,
                })
                .collect(),
        )
    }

    async fn finish(&self, taken: Letters, received: Instant, disposer: &Disposer) -> Result<(), HandBack<Letters>> {
        // A place in the publish stage first: the outbox must not grow while the broker takes nothing.
        let place = place_in(&self.committed, self.worker.settings.outbox.stuck_after).await?;
        let (letters, unstorable) = taken.clone().sort();
        let mut filer = Filer::new(self);
        let why = |delivery: &Delivery| dead_letter::unstorable(delivery).unwrap_or_default().to_owned();
        filer.set_apart(&unstorable, None, why);
        let stored = async {
            drive(&mut filer, letters).await?;
            fail::point(Point::CollectorCommitted).await;
            filer.publish_apart(&taken).await?;
            filer.account_for(&taken).await
        };
        let stored = stored.await;
        if stored.is_ok() {
            acknowledge(disposer, self.number, taken.sources()).await;
            fail::point(Point::CollectorAcked).await;
        }
        // What is committed is told, even if the rest goes back.
        let mut done = filer.done;
        done.retain(|answered| !answered.publications.is_empty());
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

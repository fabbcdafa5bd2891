//! The collector: dead letters from their queue into the database, acknowledged once they are stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use uuid::Uuid;

use crate::{
    broker::{
        BrokerError, Connection,
        intake::Disposer,
        publisher::{Fate as Routed, Publisher},
        topology,
    },
    config::DeadLetterSettings,
    domain::{
        allocation::Allocation,
        dead_letter::{self, Arrival, Cause, Filing, Known, MadeBy, Trusted},
        decide::{Judged, Judgement, Verdict},
        delivery::{BatchId, Delivery, Publication},
        event,
        told::{Firsts, Tellings},
    },
    fail::{self, Point},
    publish::{Entrance, Owned, PublishStage, place_within, send_all},
    retry::{self, Backoff, Waited},
    settle::{self, Batch, Clerk, Settled},
    store::{Fate, Store, StoreError, dead_letter_space::Bounds, dead_letters::FilingOutcome},
    telemetry::{Cause as PauseCause, Intake as Door, Signal, Stage, Tally},
    worker::{Consumer, Culprits, Gate, HandBack, Patience, Work, Worker, dispose, tag_of},
};

pub mod second;

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

/// Dead letters with the message in each as its partner sent it, and why it is here.
#[derive(Clone, Default)]
struct Letters {
    batch: Batch,
    causes: Vec<Cause>,
    /// An earlier commit of theirs is unknown: they may be stored.
    again: bool,
}

/// Of each dead letter that nobody told yet, what it asks for, where that is there already. By their place.
type Effects = BTreeMap<usize, Arc<Allocation>>;

impl Letters {
    fn arrivals(&self, effects: &Effects) -> Vec<Arrival<'_>> {
        let messages = self.batch.deliveries.iter().zip(&self.batch.facts).zip(&self.causes);
        messages
            .enumerate()
            .map(|(index, ((delivery, facts), cause))| Arrival {
                message: Judged { delivery, facts },
                cause,
                again: self.again || delivery.redelivered,
                has_effect: effects.contains_key(&index),
            })
            .collect()
    }

    /// Money that moved is never called rejected: before it is told that the broker gave a message up, the receipts are
    /// asked. What settles after that was given up before,
    /// and is found by [`crate::settled_since`].
    async fn effects(&self, clerk: &Clerk) -> Result<Effects, StoreError> {
        let messages = self.batch.deliveries.iter().zip(&self.batch.facts).zip(&self.causes);
        let (places, untold): (Vec<usize>, Vec<Judged<'_>>) = messages
            .enumerate()
            .filter(|(_, (_, cause))| cause.is_untold())
            .map(|(index, ((delivery, facts), _))| (index, Judged { delivery, facts }))
            .unzip();
        let effects = settle::effects(clerk, &untold).await?;
        let effects = places.into_iter().zip(effects);
        Ok(effects.filter_map(|(index, effect)| Some((index, effect?))).collect())
    }

    /// Two halves, unless a single one is left.
    fn halves(&self) -> Option<(Self, Self)> {
        let (left, right) = self.batch.halves()?;
        let (left_causes, right_causes) = self.causes.split_at_checked(left.deliveries.len())?;
        let half = |batch: Batch, causes: &[Cause]| Self {
            batch,
            causes: causes.to_vec(),
            again: self.again,
        };
        Some((half(left, left_causes), half(right, right_causes)))
    }

    /// What can be stored, and what no database could hold.
    fn sort(self) -> (Self, Self) {
        let mut unstorable = Self::default();
        if !self
            .batch
            .deliveries
            .iter()
            .any(|delivery| dead_letter::unstorable(delivery).is_some())
        {
            return (self, unstorable);
        }
        let mut kept = Self {
            again: self.again,
            ..Self::default()
        };
        let (mut storable, mut others) = (Vec::new(), Vec::new());
        let facts = self.batch.facts.into_iter().zip(self.causes);
        for (delivery, (facts, cause)) in self.batch.deliveries.iter().zip(facts) {
            let (deliveries, letters) = match dead_letter::unstorable(delivery) {
                Some(_) => (&mut others, &mut unstorable),
                None => (&mut storable, &mut kept),
            };
            deliveries.push(delivery.clone());
            letters.batch.facts.push(facts);
            letters.causes.push(cause);
        }
        kept.batch.deliveries = Arc::new(storable);
        unstorable.batch.deliveries = Arc::new(others);
        (kept, unstorable)
    }
}

/// Dead letters that are stored.
struct Stored {
    settled: Settled,
    filing: Filing,
    /// From the failure of the last one to its being stored.
    lag: Duration,
}

/// Does, and undoes, everything that storing dead letters asks of the database.
///
/// # Errors
/// What it would meet.
pub async fn rehearse(clerk: &Clerk) -> Result<(), StoreError> {
    rehearse_with(clerk, &Letters::default()).await
}

async fn rehearse_with(clerk: &Clerk, letters: &Letters) -> Result<(), StoreError> {
    let effects = letters.effects(clerk).await?;
    let arrivals = letters.arrivals(&effects);
    let ids: Vec<Uuid> = arrivals.iter().map(Arrival::id).collect();
    // Whether there is room is another question.
    let anything = Bounds {
        max_rows: u64::MAX,
        max_bytes: u64::MAX,
    };
    let (open, known, now) = clerk.store.open_filing_rehearsal(&ids, anything).await?;
    let id = Uuid::now_v7();
    let firsts = open.remember(id, &tellings(&arrivals, now)).await?;
    let filed = file(clerk, id, &arrivals, &effects, &known, &firsts, now)?;
    open.rehearse(&filed.outcome(clerk, &arrivals)).await
}

/// What is told of those that nobody judged.
fn tellings(arrivals: &[Arrival<'_>], now: Timestamp) -> Tellings {
    // What has its effect is not told to be refused.
    let untold = arrivals
        .iter()
        .filter(|arrival| arrival.cause.is_untold() && !arrival.has_effect);
    Tellings::of_given_up(untold.map(|arrival| {
        let Cause { reason, detail, .. } = arrival.cause;
        (
            arrival.message,
            *reason,
            detail.as_str(),
            dead_letter::failed_at(arrival, now),
        )
    }))
}

/// How these join what is known, and what is to be told of it.
fn file(
    clerk: &Clerk,
    id: BatchId,
    arrivals: &[Arrival<'_>],
    effects: &Effects,
    known: &BTreeMap<Uuid, Known>,
    firsts: &Firsts,
    now: Timestamp,
) -> Result<Filed, StoreError> {
    let filed = catch_unwind(AssertUnwindSafe(|| {
        let mut filed = Filed {
            id,
            now,
            filing: dead_letter::file(known, arrivals, now),
            taken: dead_letter::taken(known, arrivals),
            judgements: Vec::new(),
            publications: Vec::new(),
            lag: Duration::ZERO,
        };
        for (index, arrival) in arrivals.iter().enumerate() {
            let is_counted = filed.filing.counted.binary_search(&index).is_ok();
            let failed_at = dead_letter::failed_at(arrival, now);
            // A broker's record may be forged; the worker's word counts where there is one.
            if is_counted && (arrival.cause.made_by == MadeBy::Settled || filed.lag.is_zero()) {
                filed.lag = Duration::try_from(now.duration_since(failed_at)).unwrap_or_default();
            }
            if !arrival.cause.is_untold() {
                continue;
            }
            let Cause { reason, detail, .. } = arrival.cause;
            let effect = effects.get(&index);
            if is_counted {
                filed.judgements.push(Judgement {
                    verdict: match effect {
                        Some(allocation) => Verdict::Duplicate {
                            allocation: Arc::clone(allocation),
                        },
                        None => Verdict::Rejected {
                            reason: *reason,
                            detail: detail.clone(),
                        },
                    },
                    proven: effect.is_some(),
                });
            }
            // Told also where it looks like a copy: one that was handed out before is not for certain stored, and nobody
            // else tells of it. Told twice it is the same event, with the same id.
            filed.publications.extend(match effect {
                Some(allocation) => event::told_again(arrival.message, allocation, &clerk.rules),
                None => {
                    let event = event::given_up(arrival.message, *reason, detail, failed_at, firsts, &clerk.rules);
                    Some(event)
                }
            });
        }
        filed.publications = event::in_format(filed.publications, clerk.event_format);
        filed
    }));
    filed.map_err(|_| StoreError::blame_the_batch("filing the batch panicked"))
}

/// Until so much of the room is free again a collector that had to stop takes nothing: each time it stops, what is in its
/// hands goes back, and counts against its delivery limit.
const RESUME_BELOW: f64 = 0.95;

/// What dead letters may take in all.
fn bounds(settings: &DeadLetterSettings) -> Bounds {
    Bounds {
        max_rows: settings.max_rows,
        max_bytes: settings.max_bytes,
    }
}

/// Watches what dead letters take, and says once when it is most of what they may.
#[derive(Debug, Default)]
pub struct SpaceWatch {
    /// Those that were said to be near their bound; an empty name with a star before it is all of them together.
    near: BTreeSet<String>,
}

impl SpaceWatch {
    /// From this share on there is an alarm.
    pub const NEAR: f64 = 0.8;
    /// Partners that are looked at, those with the most bytes first.
    const PARTNERS: i64 = 1_000;
    /// In the set, and in words.
    const ALL: &str = "all of them";

    /// Sums up, measures and says.
    pub async fn measure(&mut self, store: &Store, settings: &DeadLetterSettings) {
        // A database that is away is the lanes' to tell.
        let summed = store.sum_dead_letter_space().await;
        let Ok(space) = store.dead_letter_space(Self::PARTNERS).await else {
            return;
        };
        drop(summed);
        let filled = bounds(settings).filled(space.rows, space.bytes);
        let of_one = Bounds {
            max_rows: settings.max_rows_per_partner,
            max_bytes: settings.max_bytes_per_partner,
        };
        let mut near = BTreeSet::new();
        let all = (Self::ALL, space.rows, space.bytes, filled);
        let partners = space.partners.iter().map(|(partner, rows, bytes)| {
            let name = if partner.is_empty() {
                "nobody that can be read"
            } else {
                partner
            };
            (name, *rows, *bytes, of_one.filled(*rows, *bytes))
        });
        for (of, rows, bytes, filled) in std::iter::once(all).chain(partners) {
            // Again at 100 %, where of one partner nothing else changes.
            for (level, word) in [(Self::NEAR, ""), (1.0, " (full)")] {
                if filled >= level {
                    let name = format!("{of}{word}");
                    if !self.near.contains(&name) {
                        let of = name.as_str();
                        Signal::DeadLettersNearBound {
                            of,
                            rows,
                            bytes,
                            filled,
                        }
                        .emit();
                    }
                    near.insert(name);
                }
            }
        }
        let partners_near = space
            .partners
            .iter()
            .filter(|(_, rows, bytes)| of_one.filled(*rows, *bytes) >= Self::NEAR)
            .count();
        Signal::DeadLetterSpace {
            rows: space.rows,
            bytes: space.bytes,
            filled,
            partners_near,
        }
        .emit();
        self.near = near;
    }
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

/// Dead letters, filed and not written yet.
struct Filed {
    id: BatchId,
    now: Timestamp,
    filing: Filing,
    taken: BTreeMap<Timestamp, u32>,
    judgements: Vec<Judgement>,
    publications: Vec<Publication>,
    lag: Duration,
}

impl Filed {
    fn outcome<'a>(&'a self, clerk: &'a Clerk, arrivals: &'a [Arrival<'a>]) -> FilingOutcome<'a> {
        FilingOutcome {
            id: self.id,
            worker: &clerk.worker,
            now: self.now,
            arrivals,
            filing: &self.filing,
            taken: &self.taken,
            judgements: &self.judgements,
            publications: &self.publications,
            lease: clerk.outbox_lease,
        }
    }

    fn stored(self) -> Stored {
        Stored {
            settled: Settled {
                id: self.id,
                judgements: self.judgements,
                publications: self.publications,
                replies: Vec::new(),
                deleted: Vec::new(),
                replies_ignored: 0,
            },
            filing: self.filing,
            lag: self.lag,
        }
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

//! The worker: lanes that take, settle, acknowledge and publish; the relay, due messages, the collector and gauges beside
//! them.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use jiff::SignedDuration;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use uuid::Uuid;

use crate::{
    broker::{
        BrokerError, BrokerSettings, Connection,
        intake::{Disposer, Intake, IntakeEnd},
        topology,
    },
    collector,
    config::{ConfigError, EventFormat, Settings},
    domain::{
        decide::Rules,
        delivery::{BatchId, Delivery, Source},
        event::Format,
    },
    due,
    fail::{self, Point},
    fairness::Fairness,
    health::Health,
    held, http,
    pause::Paused,
    publish::{Committed, Entrance, Owned, PublishStage, RowPublisher, place_within, send_all},
    relay,
    retry::{self, Backoff, Waited},
    settle::{self, Attempt, Batch, Clerk, Settled, attempt, reject_culprit},
    settled_since,
    store::{self, Fate, Store, StoreError, held::Pack},
    telemetry::{self, Cause, Dependency, Intake as Door, PartnerLabels, Signal, Stage, Tally},
};

/// How often the gauges are measured.
const GAUGE_INTERVAL: Duration = Duration::from_secs(5);

/// How often the dead letters are counted, which takes as long as there are many.
const DESK_INTERVAL: Duration = Duration::from_secs(30);

/// How often a consumer asks whether its queue still has one.
const CONSUMER_LOOK: Duration = Duration::from_secs(3);

/// How long a queue that is not what it must be is left alone before it is looked at again.
const MISFIT_INTERVAL: Duration = Duration::from_secs(5);

/// Who pauses, as /readyz tells it, where what is committed is not told.
const OUTBOX: &str = "outbox";
/// A pause for others is never longer: whoever sent may have stopped.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Who pauses, as /readyz tells it, before there are lanes.
const STARTING: &str = "start";

/// Why the worker can not run. Nothing that passes by waiting.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A setting is wrong.
    #[error("{}", .0.message())]
    Config(ConfigError),
    /// A setting is wrong in a way that only its user finds out.
    #[error("{0}")]
    Setting(String),
    /// The HTTP address can not be had.
    #[error("{}", .0.message())]
    Http(http::HttpError),
    /// The schema is missing, older or newer than this program.
    #[error("{0}")]
    Schema(String),
    /// Exchanges or queues are missing.
    #[error("{0}")]
    Topology(String),
    /// A task of ours panicked.
    #[error("{0}")]
    Ours(String),
}

/// The judging rules that the settings give.
pub fn rules(settings: &Settings) -> Rules {
    let signed = |duration: Duration| SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    Rules {
        park_deadline: signed(settings.park.deadline),
        park_first_retry: signed(settings.park.first_retry),
        park_max_interval: signed(settings.park.max_interval),
        park_max_per_partner: u64::from(settings.park.max_per_partner),
        park_max_bytes: settings.park.max_bytes,
        park_max_bytes_per_partner: settings.park.max_bytes_per_partner,
        event_source: settings.events.source.clone(),
    }
}

/// Who settles by these settings.
pub fn clerk(settings: &Settings, store: Store) -> Clerk {
    Clerk {
        store,
        rules: rules(settings),
        worker: settings.worker.name.clone(),
        outbox_lease: settings.outbox.lease,
        event_format: match settings.events.format {
            EventFormat::Single => Format::Single,
            EventFormat::Batched => Format::Batched {
                max_bytes: settings.events.batch_max_bytes,
            },
        },
    }
}

/// Runs until SIGTERM or SIGINT; then stops in order: intake, batches in hand, acknowledgements, outbox, connections.
/// A second signal, or the end of `worker.drain_deadline`, stops at once: what was not acknowledged is delivered again.
///
/// # Errors
/// What waiting can not mend.
pub async fn run(settings: &Settings) -> Result<(), Failure> {
    let metrics = telemetry::install_metrics();
    let store = Store::new(settings).map_err(Failure::Setting)?;
    let broker = BrokerSettings::from_settings(settings).map_err(Failure::Config)?;
    broker.check().map_err(|error| Failure::Setting(error.to_string()))?;
    let (stopper, stop) = watch::channel(false);
    let mut signals = Signals::new().map_err(|error| Failure::Ours(format!("signals can not be caught: {error}")))?;
    let health = Arc::new(Health::new());
    let (http_stopper, http_stop) = watch::channel(false);
    http::serve(&settings.http, Arc::clone(&health), metrics, http_stop)
        .await
        .map_err(Failure::Http)?;
    Signal::Started {
        worker: &settings.worker.name,
        lanes: settings.worker.lanes,
        version: env!("CARGO_PKG_VERSION"),
    }
    .emit();

    let worker = Worker {
        health,
        ..Worker::new(settings, store, broker, stop)
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(worker.clone().work());
    let ended = tokio::select! {
        ended = tasks.join_next() => ended,
        name = signals.next() => {
            Signal::Stopping { why: name }.emit();
            let began = Instant::now();
            stopper.send_replace(true);
            let ended = tokio::select! {
                ended = tokio::time::timeout(settings.worker.drain_deadline, tasks.join_next()) => ended.unwrap_or(None),
                _ = signals.next() => None,
            };
            // What is aborted is not lost: unacknowledged messages come again, outbox rows are the relay's.
            tasks.shutdown().await;
            Signal::Drained { elapsed: began.elapsed() }.emit();
            ended
        }
    };
    stopper.send_replace(true);
    http_stopper.send_replace(true);
    Signal::Stopped.emit();
    match ended {
        None => Ok(()),
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(Failure::Ours(format!("the worker's own code failed: {error}"))),
    }
}

/// The signals that end the worker.
pub struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    /// # Errors
    /// They can not be caught.
    pub fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The name of the next one.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Messages that the database alone refused, lately. Several within a minute say that the fault is ours.
#[derive(Clone, Debug, Default)]
pub struct Culprits(Arc<Mutex<VecDeque<Instant>>>);

impl Culprits {
    /// Whether one more would still be a message's fault.
    pub fn have_room(&self, most: usize) -> bool {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        times.retain(|time| now.duration_since(*time) < Duration::from_secs(60));
        times.len() + 1 < most
    }

    /// Counts one more, and says whether that is still a message's fault.
    ///
    /// One that is not blamed counts as well: the pause ends only after a minute in which none came.
    pub fn blame(&self, most: usize) -> bool {
        let room = self.have_room(most);
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.push_back(Instant::now());
        while times.len() > most {
            times.pop_front();
        }
        room
    }
}

/// Intake as a whole. When one lane can not settle, no lane takes more: what one hands back would only go to another's
/// consumer, and count against its delivery limit once more for each. The collector has a gate of its own: what stops it
/// does not stop the lanes.
pub struct Gate<B = Batch> {
    closed: watch::Sender<bool>,
    /// What was handed back, until it would go through.
    handed_back: Arc<Mutex<Vec<Arc<HandBack<B>>>>>,
}

impl<B> Clone for Gate<B> {
    fn clone(&self) -> Self {
        Self {
            closed: self.closed.clone(),
            handed_back: Arc::clone(&self.handed_back),
        }
    }
}

impl<B> Default for Gate<B> {
    fn default() -> Self {
        Self {
            closed: watch::Sender::new(false),
            handed_back: Arc::default(),
        }
    }
}

impl<B> Gate<B> {
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    fn open(&self) {
        self.closed.send_replace(false);
    }

    fn handed_back(&self) -> std::sync::MutexGuard<'_, Vec<Arc<HandBack<B>>>> {
        self.handed_back.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every task of the worker needs.
#[derive(Clone)]
pub struct Worker {
    pub clerk: Clerk,
    pub settings: Arc<Settings>,
    pub broker: BrokerSettings,
    pub health: Arc<Health>,
    pub culprits: Culprits,
    pub gate: Gate,
    pub labels: Arc<PartnerLabels>,
    pub fairness: Arc<Fairness>,
    pub stop: watch::Receiver<bool>,
}

impl Worker {
    /// What a task needs that runs until `stop`.
    pub fn new(settings: &Settings, store: Store, broker: BrokerSettings, stop: watch::Receiver<bool>) -> Self {
        Self {
            clerk: clerk(settings, store),
            settings: Arc::new(settings.clone()),
            broker,
            health: Arc::new(Health::new()),
            culprits: Culprits::default(),
            gate: Gate::default(),
            labels: Arc::new(PartnerLabels::new(settings.http.partner_labels_max)),
            fairness: Arc::new(Fairness::new(settings)),
            stop,
        }
    }

    async fn work(mut self) -> Result<(), Failure> {
        if self.wait_for_schema().await? == Waited::Stopping || self.wait_for_topology().await? == Waited::Stopping {
            return Ok(());
        }
        let mut tasks = JoinSet::new();
        for number in 0..self.settings.worker.lanes {
            tasks.spawn(lane(self.clone(), number, topology::UPDATES.to_owned()));
        }
        if self.settings.dead_letters.collect {
            tasks.spawn(collector::run(self.clone()));
        } else {
            // Dead letters stay in their queue; what the broker may have kept away from it would be in no place.
            tasks.spawn(collector::second::collect(self.clone(), Arc::default()));
        }
        tasks.spawn(settled_since::run(self.clone()));
        tasks.spawn(self.clone().serve_own_queues());
        tasks.spawn(due::run(self.clone()));
        tasks.spawn(held::watch(self.clone()));
        tasks.spawn(relay::run(
            self.clerk.store.clone(),
            self.row_publisher("relay"),
            self.settings.outbox.lease,
            self.settings.outbox.relay_interval,
            Backoff::new(&self.settings.retry),
            self.stop.clone(),
        ));
        tasks.spawn(self.clone().measure());
        let mut readiness = JoinSet::new();
        readiness.spawn(self.clone().tell_readiness());
        // Every task ends when the worker stops. One that ends by itself has panicked: better no worker than half a one.
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                return Err(Failure::Ours(format!("a task of the worker failed: {error}")));
            }
        }
        Ok(())
    }

    /// A lane for each partner's own queue: consumer, publisher and their connections are its own, so that a partner whose
    /// messages break connections breaks nobody else's, and a backlog of one partner's is nobody else's wait. What the lanes
    /// share is the pool of database connections, the gate and the count of culprits: a batch that can not be settled closes
    /// intake for every lane, whoever sent it.
    async fn serve_own_queues(mut self) {
        let mut lanes = JoinSet::new();
        let mut seen = BTreeSet::new();
        loop {
            // A database that is away is the lanes' to tell; the next look finds what this one missed.
            for enterprise_id in self.clerk.store.own_queues().await.unwrap_or_default() {
                let queue = topology::own_queue(&enterprise_id);
                if !seen.insert(queue.clone()) {
                    continue;
                }
                let most = self.settings.worker.own_queues_max;
                if lanes.len() < most {
                    // In logs these come after the lanes of the common queue, the second intake and the collector.
                    let number = self.settings.worker.lanes + 1 + seen.len();
                    lanes.spawn(lane(self.clone(), number, queue));
                } else {
                    Signal::OwnQueueUnserved { queue: &queue, most }.emit();
                }
            }
            let ended = tokio::select! {
                Some(ended) = lanes.join_next() => Some(ended),
                waited = retry::sleep(self.settings.worker.own_queue_poll, &mut self.stop) => match waited {
                    Waited::Over => None,
                    Waited::Stopping => break,
                },
            };
            escalate(ended);
        }
        while let Some(ended) = lanes.join_next().await {
            escalate(Some(ended));
        }
    }

    /// A publisher of its own for a task.
    pub fn row_publisher(&self, task: &str) -> RowPublisher {
        let name = format!("{} {task} publish", self.settings.worker.name);
        RowPublisher::new(
            &self.settings,
            self.broker.clone(),
            name,
            self.clerk.store.clone(),
            Arc::clone(&self.health),
        )
    }

    /// Waits for the database; a schema of another version is not a thing that passes.
    async fn wait_for_schema(&mut self) -> Result<Waited, Failure> {
        let mut backoff = Backoff::new(&self.settings.retry);
        loop {
            match self.clerk.store.schema_version().await {
                Ok(version) => {
                    self.health.set_database_ok(true);
                    return match store::check_schema(version) {
                        Ok(()) => Ok(Waited::Over),
                        Err(sentence) => Err(Failure::Schema(sentence)),
                    };
                }
                Err(error) => {
                    self.health.set_database_trouble(error.trouble().sentence());
                    if self
                        .wait_for(Dependency::Database, &error.to_string(), &mut backoff)
                        .await
                        == Waited::Stopping
                    {
                        return Ok(Waited::Stopping);
                    }
                }
            }
        }
    }

    /// Waits for the broker; queues that were never declared do not appear by waiting.
    async fn wait_for_topology(&mut self) -> Result<Waited, Failure> {
        let mut backoff = Backoff::new(&self.settings.retry);
        loop {
            let looked = async {
                let connection = Connection::open(&self.broker, &self.settings.worker.name).await?;
                let depths = topology::depths(&connection).await;
                drop(connection.close().await);
                depths
            };
            match looked.await {
                Ok(_) => {
                    self.health.set_paused_by(STARTING, None);
                    return Ok(Waited::Over);
                }
                Err(BrokerError::Refused { code: 404, text }) => {
                    return Err(Failure::Topology(format!(
                        "the broker does not have our queues ({text}); run `settled topology` first"
                    )));
                }
                Err(BrokerError::Config(sentence)) => return Err(Failure::Setting(sentence)),
                Err(error) => {
                    self.health.set_paused_by(STARTING, Some(error.trouble().to_owned()));
                    if self
                        .wait_for(Dependency::Broker, &error.to_string(), &mut backoff)
                        .await
                        == Waited::Stopping
                    {
                        return Ok(Waited::Stopping);
                    }
                }
            }
        }
    }

    /// Says that a dependency is away, and waits a little longer each time.
    pub async fn wait_for(&mut self, dependency: Dependency, error: &str, backoff: &mut Backoff) -> Waited {
        let wait = backoff.next();
        Signal::Retrying {
            dependency,
            attempt: backoff.attempts(),
            wait,
            error,
        }
        .emit();
        retry::sleep(wait, &mut self.stop).await
    }

    /// Measures what nobody's work shows: backlog, parked messages, queues.
    async fn measure(mut self) {
        let mut connection: Option<Connection> = None;
        let mut desk_measured: Option<Instant> = None;
        let mut space = collector::SpaceWatch::default();
        let mut unreadable = 0;
        loop {
            let store = &self.clerk.store;
            if desk_measured.is_none_or(|time| time.elapsed() >= DESK_INTERVAL) {
                // One that takes longer than statements may is not asked for again at once.
                desk_measured = Some(Instant::now());
                // What it could not do now, it does the next time.
                let events = &self.settings.events;
                drop(store.forget_told(events.remember, events.remember_max).await);
                if let Ok(desk) = store.measure_desk().await {
                    Signal::DeskMeasured {
                        open: &desk.open,
                        oldest: desk.oldest,
                        runs: &desk.runs,
                    }
                    .emit();
                }
            }
            space.measure(store, &self.settings.dead_letters).await;
            let measured = async { Ok::<_, StoreError>((store.backlog().await?, store.count_parked().await?)) };
            match measured.await {
                Ok((backlog, parked)) => {
                    self.health.set_database_ok(true);
                    let oldest = (backlog.rows > 0).then_some(backlog.oldest);
                    let stuck = oldest.filter(|oldest| *oldest >= self.settings.outbox.stuck_after);
                    let why = stuck.map(|oldest| {
                        format!(
                            "the oldest row of the outbox waits for {} s to be published",
                            oldest.as_secs()
                        )
                    });
                    self.health.set_paused_by(OUTBOX, why);
                    Signal::OutboxMeasured {
                        pending: backlog.publications,
                        oldest,
                    }
                    .emit();
                    Signal::ParkedMeasured { parked }.emit();
                }
                Err(error) => {
                    self.health.set_database_trouble(error.trouble().sentence());
                    // Idle lanes would learn of it only from messages that another worker hands back.
                    if error.fate == Fate::Away {
                        self.gate.close();
                    }
                }
            }
            // Those too that nobody consumes.
            let own_queues = self.clerk.store.own_queues().await.unwrap_or_default();
            let mut is_missing = false;
            let depths = async {
                let link = match connection.take().filter(Connection::is_connected) {
                    Some(link) => link,
                    None => {
                        let name = format!("{} gauges", self.settings.worker.name);
                        Connection::open_without_consumer(&self.broker, &name).await?
                    }
                };
                let link = connection.insert(link);
                let common = topology::depths(link).await?;
                let mut depths = vec![
                    (topology::UPDATES.to_owned(), common.updates),
                    (topology::DEAD.to_owned(), common.dead),
                    (topology::UNREADABLE.to_owned(), common.unreadable),
                ];
                for queue in own_queues
                    .iter()
                    .map(|enterprise_id| topology::own_queue(enterprise_id))
                    .chain([topology::BROKER_MADE.to_owned()])
                {
                    match topology::depth_of(link, &queue).await {
                        Ok(depth) => depths.push((queue, depth)),
                        // One that is missing hides no other.
                        Err(BrokerError::Refused { .. }) => is_missing = true,
                        Err(error @ (BrokerError::Away(_) | BrokerError::Config(_))) => return Err(error),
                    }
                }
                Ok::<_, BrokerError>(depths)
            };
            let depths = depths.await;
            if depths.is_err() || is_missing {
                // A refused question costs the connection a channel number for good.
                connection = None;
            }
            if let Ok(depths) = depths {
                for (queue, messages) in &depths {
                    Signal::QueueMeasured {
                        queue,
                        messages: u64::from(*messages),
                    }
                    .emit();
                }
                let ready = |queue: &str| {
                    let depth = depths.iter().find(|(name, _)| name == queue);
                    depth.map_or(0, |(_, messages)| *messages)
                };
                if ready(topology::DEAD) == 0 {
                    Signal::CollectorIdle.emit();
                }
                let now = ready(topology::UNREADABLE);
                if now > unreadable {
                    let messages = u64::from(now);
                    Signal::UnreadableGrew { messages }.emit();
                }
                unreadable = now;
            }
            if retry::sleep(GAUGE_INTERVAL, &mut self.stop).await == Waited::Stopping {
                break;
            }
        }
        if let Some(connection) = connection {
            drop(connection.close().await);
        }
    }

    /// Waits, for a moment, until no lane has a consumer: what goes back must not go to a neighbour, which would only give it
    /// back once more. Once intake is open again there is nothing to wait for.
    async fn wait_for_detached(&self) {
        let detached = async {
            while self.health.consumers_attached() > 0 && *self.gate.closed.borrow() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        // A neighbour that takes longer costs its messages one delivery more.
        drop(tokio::time::timeout(Duration::from_secs(2), detached).await);
    }

    /// Says when readiness changes.
    async fn tell_readiness(mut self) {
        let mut ready = false;
        loop {
            if self.health.is_ready() != ready {
                ready = !ready;
                if ready {
                    Signal::Ready.emit();
                } else {
                    Signal::NotReady {
                        reasons: &self.health.reasons(),
                    }
                    .emit();
                }
            }
            if retry::sleep(Duration::from_millis(100), &mut self.stop).await == Waited::Stopping {
                return;
            }
        }
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
                    attempt(&self.clerk, &self.fairness, id, &part, &published, &mut earlier).await
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
    async fn finds_locks(&self, batch: &Batch) -> bool {
        match settle::find_locked(&self.clerk, batch).await {
            Ok(locks) if !locks.is_empty() => {
                Signal::LocksFound { locks: locks.len() }.emit();
                self.fairness.remember_locks(locks);
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
                attempt(&self.clerk, &self.fairness, id, &batch, &published, &mut earlier).await
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

    /// How long whoever worked so long lets others go first: nothing, where no others sent anything just now.
    pub fn pause_for_others(&self, owners: &BTreeSet<Option<String>>, took: Duration) -> Duration {
        if !self.fairness.others_live(owners) {
            return Duration::ZERO;
        }
        let share = self.settings.held.share;
        took.mul_f64((1.0 - share) / share).min(PAUSE_MAX)
    }

    fn tell(&self, lane: usize, door: Door, batch: &Batch, settled: &Settled, elapsed: Duration) {
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

/// The fault lasts for too long: what is in hand goes back to the broker, once.
pub struct HandBack<B = Batch> {
    pub why: String,
    /// Only this lane is held up: the others go on, and may have what it held.
    alone: bool,
    /// What could not be settled: intake begins again only when this would go through.
    refused: Option<B>,
    /// Lives until then.
    _paused: Option<Paused>,
}

impl<B> HandBack<B> {
    /// The same of another kind of batch.
    pub fn map<C>(self, convert: impl FnOnce(B) -> C) -> HandBack<C> {
        HandBack {
            why: self.why,
            alone: self.alone,
            refused: self.refused.map(convert),
            _paused: self._paused,
        }
    }

    /// Nothing is paused by it; only its own consumer waits until it would go through.
    pub fn of(why: String, refused: B) -> Self {
        Self {
            why,
            refused: Some(refused),
            _paused: None,
            alone: false,
        }
    }

    /// Who publishes what is committed is gone: only a stop does that.
    pub fn no_publisher() -> Self {
        Self::because("the publish stage is gone")
    }

    /// Nothing of it is refused by the database.
    pub fn because(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            alone: false,
            refused: None,
            _paused: None,
        }
    }

    /// The publish stage takes nothing.
    pub fn stuck(limit: Duration) -> Self {
        Self {
            why: format!("what was committed before could not be published for {limit:?}"),
            alone: true,
            refused: None,
            _paused: None,
        }
    }
}

/// Patience in the middle of a batch.
pub struct Patience<'a, B> {
    worker: &'a Worker,
    gate: &'a Gate<B>,
    who: String,
    limit: Option<Duration>,
    backoff: Backoff,
    paused: Option<Paused>,
}

impl<'a, B: Clone> Patience<'a, B> {
    /// Of `who`, as /readyz tells it, who closes this gate while waiting.
    pub fn new(worker: &'a Worker, gate: &'a Gate<B>, who: String, limit: Option<Duration>) -> Self {
        let backoff = Backoff::new(&worker.settings.retry);
        Self {
            worker,
            gate,
            who,
            limit,
            backoff,
            paused: None,
        }
    }

    /// A jittered moment before the batch is tried again, for a fault that passes by itself.
    pub async fn short(&mut self, batch: BatchId, lane: usize, attempt: u32, error: &StoreError) {
        let sqlstate = error.sqlstate.as_deref();
        let error = error.to_string();
        Signal::BatchRetried {
            batch,
            lane,
            attempt,
            sqlstate,
            error: &error,
        }
        .emit();
        tokio::time::sleep(self.backoff.next()).await;
    }

    /// Waits with growing pauses; once the limit is over the batch is handed back.
    pub async fn wait(&mut self, cause: Cause, error: &StoreError, part: &B) -> Result<(), HandBack<B>> {
        let why = error.to_string();
        if error.fate == Fate::Away {
            self.worker.health.set_database_trouble(error.trouble().sentence());
        }
        let paused = self.paused.get_or_insert_with(|| {
            self.gate.close();
            Paused::begin(&self.worker.health, &self.who, cause, &why)
        });
        if self.limit.is_some_and(|limit| paused.since().elapsed() >= limit) {
            return Err(HandBack {
                why,
                alone: false,
                refused: Some(part.clone()),
                _paused: self.paused.take(),
            });
        }
        let wait = self.backoff.next();
        let attempt = self.backoff.attempts();
        Signal::Retrying {
            dependency: Dependency::Database,
            attempt,
            wait,
            error: &why,
        }
        .emit();
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// It went through.
    pub fn over(&mut self) {
        self.backoff.reset();
        self.worker.health.set_database_ok(true);
        self.paused = None;
    }
}

/// What a consumer's messages are taken for: a lane settles updates, the collector stores dead letters.
pub(crate) trait Work: Sized {
    /// Messages that were read.
    type Batch: Clone + Default;

    /// Reads what each message tells by itself.
    async fn read(&self, deliveries: Vec<Delivery>) -> Self::Batch;

    /// Commits what the messages come to and disposes of them, however long that takes; or hands them back.
    async fn finish(
        &self,
        batch: Self::Batch,
        received: Instant,
        disposer: &Disposer,
    ) -> Result<(), HandBack<Self::Batch>>;

    /// Does, and undoes, everything that a batch does.
    async fn rehearse(&self, batch: &Self::Batch) -> Result<(), StoreError>;

    /// A consumer is attached, or gone.
    fn attached(&self, is: bool);

    /// Why no consumer is attached yet; None: nothing is in the way.
    fn held_up(&self, why: Option<String>);

    /// What is wrong with the queue, or with what stands around it: nothing is taken until it is mended. None: nothing is.
    fn misfit(&self, why: Option<String>);

    /// Waits until what goes back goes to none of our own consumers.
    async fn detached(&self);

    /// Waits until there is a place for what is committed next.
    async fn has_place(&self);
}

/// Takes what is in one queue, session after session with the broker, and has it worked on, one batch after the other.
pub(crate) struct Consumer<W: Work> {
    pub worker: Worker,
    /// In logs.
    pub number: usize,
    /// The connection's name, behind the worker's.
    pub name: String,
    pub queue: String,
    pub prefetch: u16,
    pub batch_max: usize,
    /// How long it waits for more once a message is there.
    pub linger: Duration,
    pub gate: Gate<W::Batch>,
    pub work: W,
    /// What was wrong with the queue when it was looked at last.
    pub misfit: Option<String>,
    /// That not everything can be looked at is said once.
    pub unseen_told: bool,
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

/// A batch on its way from intake to being worked on.
struct Taken<B> {
    batch: B,
    received: Instant,
}

/// Why a session with the broker ended.
enum SessionEnd {
    Stopping,
    Lost,
    /// Intake is closed: what was delivered is settled or handed back.
    Closed,
    /// It never began: with a queue or an exchange like that the broker may lose what it dead-letters.
    Misfit,
    /// This lane alone can not go on: what it held is handed back.
    Stuck,
}

/// A lane: a consumer, a database connection and a publisher, with queues of depth one between the stages.
async fn lane(worker: Worker, number: usize, queue: String) {
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

impl<W: Work> Consumer<W> {
    /// One session with the broker after another, until the program stops.
    pub(crate) async fn run(&mut self) {
        let mut backoff = Backoff::new(&self.worker.settings.retry);
        // Never attach a consumer before the database does all that a batch needs of it: every message handed back counts
        // against its delivery limit.
        while self.rehearse(&mut backoff).await == Waited::Over {
            let waited = match self.session().await {
                Ok(SessionEnd::Stopping) => return,
                Ok(SessionEnd::Closed) => continue,
                Ok(SessionEnd::Stuck) => {
                    let mut stop = self.worker.stop.clone();
                    tokio::select! {
                        _ = stop.wait_for(|stop| *stop) => return,
                        () = self.work.has_place() => continue,
                    }
                }
                // The broker answered, and ended this consumer or connection: a queue that was deleted, or a message that
                // breaks the connection. Such a poison comes first again until its delivery limit, and everybody else waits
                // behind it: so not for long, and not longer each time.
                Ok(SessionEnd::Lost) => {
                    backoff.reset();
                    retry::sleep(self.worker.settings.retry.initial, &mut self.worker.stop).await
                }
                Ok(SessionEnd::Misfit) => {
                    // Whoever mends it should not wait for us.
                    let wait = backoff.next().min(MISFIT_INTERVAL);
                    retry::sleep(wait, &mut self.worker.stop).await
                }
                Err(error) => {
                    let error = error.to_string();
                    self.work.held_up(Some(error.clone()));
                    self.worker.wait_for(Dependency::Broker, &error, &mut backoff).await
                }
            };
            if waited == Waited::Stopping {
                return;
            }
        }
    }

    /// Waits until the database lets us do, and undo, everything that a batch does; and, after a hand-back, until the very
    /// batch that was refused would go through.
    async fn rehearse(&mut self, backoff: &mut Backoff) -> Waited {
        loop {
            match self.rehearse_once().await {
                Ok(()) => {
                    self.worker.health.set_database_ok(true);
                    self.gate.open();
                    return if *self.worker.stop.borrow() {
                        Waited::Stopping
                    } else {
                        Waited::Over
                    };
                }
                Err(error) => {
                    match error.fate {
                        Fate::Away => self.worker.health.set_database_trouble(error.trouble().sentence()),
                        Fate::Retry | Fate::Bisect | Fate::Ours | Fate::CommittedBefore | Fate::Overtaken => {
                            self.worker.health.set_database_ok(true);
                        }
                    }
                    // It has said so, once.
                    if error.is_full() {
                        self.work.held_up(Some(error.to_string()));
                        if retry::sleep(backoff.next(), &mut self.worker.stop).await == Waited::Stopping {
                            return Waited::Stopping;
                        }
                        continue;
                    }
                    let error = error.to_string();
                    self.work.held_up(Some(error.clone()));
                    if self.worker.wait_for(Dependency::Database, &error, backoff).await == Waited::Stopping {
                        return Waited::Stopping;
                    }
                }
            }
        }
    }

    async fn rehearse_once(&self) -> Result<(), StoreError> {
        self.work.rehearse(&W::Batch::default()).await?;
        let handed_back = self.gate.handed_back().clone();
        for hand_back in handed_back {
            if let Some(refused) = &hand_back.refused {
                match self.work.rehearse(refused).await {
                    Ok(()) => {}
                    // One message's fault: that is what bisecting is for, once blame is to be had again.
                    Err(error) if error.fate == Fate::Bisect && self.may_blame() => {}
                    Err(error) => return Err(error),
                }
            }
            self.gate.handed_back().retain(|other| !Arc::ptr_eq(other, &hand_back));
        }
        Ok(())
    }

    fn may_blame(&self) -> bool {
        self.worker
            .culprits
            .have_room(self.worker.settings.worker.culprits_per_minute)
    }

    /// Consumes until the program stops, the broker is lost, or the database is away for too long.
    async fn session(&mut self) -> Result<SessionEnd, BrokerError> {
        let settings = Arc::clone(&self.worker.settings);
        let name = format!("{} {} consume", settings.worker.name, self.name);
        let connection = Connection::open(&self.worker.broker, &name).await?;
        if !self.fits(&connection).await? {
            drop(connection.close().await);
            return Ok(SessionEnd::Misfit);
        }
        let intake = Intake::attach(
            &connection,
            &self.queue,
            self.prefetch,
            self.batch_max,
            settings.worker.batch_max_bytes,
        )
        .await?
        .lingering(self.linger);
        let disposer = intake.disposer();
        self.work.attached(true);
        self.work.held_up(None);
        Signal::ConsumerAttached {
            lane: self.number,
            queue: &self.queue,
        }
        .emit();

        let (taken, mut to_finish) = mpsc::channel::<Taken<W::Batch>>(1);
        let (over, is_over) = watch::channel(false);
        let taking = self.take(&connection, intake, taken, is_over);
        let finishing = async {
            let mut handed_back = None;
            while let Some(Taken { batch, received }) = to_finish.recv().await {
                if let Err(why) = self.work.finish(batch, received, &disposer).await {
                    handed_back = Some(why);
                    over.send_replace(true);
                    break;
                }
            }
            drop(to_finish);
            handed_back
        };
        let ((end, intake), handed_back) = tokio::join!(taking, finishing);
        drop(intake);
        let end = match handed_back {
            None => end,
            Some(handed_back) => {
                let lane = self.number;
                Signal::HandedBack {
                    lane,
                    why: &handed_back.why,
                }
                .emit();
                if handed_back.alone {
                    SessionEnd::Stuck
                } else {
                    self.gate.handed_back().push(Arc::new(handed_back));
                    self.gate.close();
                    SessionEnd::Closed
                }
            }
        };
        // Also where nothing is handed back: what was on its way to the consumer while it was cancelled goes back too.
        if matches!(end, SessionEnd::Closed) {
            self.work.detached().await;
        }
        // Closing the connection gives back, once, whatever is not acknowledged. One that can not close in order is cut.
        drop(connection.close().await);
        Ok(end)
    }

    /// Whether the queue and what stands around it are as they must be, as far as this user may look.
    async fn fits(&mut self, connection: &Connection) -> Result<bool, BrokerError> {
        let fitness = topology::fitness(connection, &self.queue).await?;
        if fitness.problem != self.misfit {
            if let Some(problem) = &fitness.problem {
                let (lane, queue) = (self.number, self.queue.as_str());
                Signal::TopologyMisfit { lane, queue, problem }.emit();
            }
            self.work.misfit(fitness.problem.clone());
            self.misfit = fitness.problem;
        }
        Signal::TopologyLooked {
            queue: &self.queue,
            fits: self.misfit.is_none(),
        }
        .emit();
        if !fitness.unseen.is_empty() && !std::mem::replace(&mut self.unseen_told, true) {
            let (queue, unseen) = (self.queue.as_str(), fitness.unseen.as_slice());
            Signal::TopologyUnseen { queue, unseen }.emit();
        }
        Ok(self.misfit.is_none())
    }

    /// Takes batches and reads them, while the one before is in the database.
    async fn take(
        &self,
        connection: &Connection,
        mut intake: Intake,
        taken: mpsc::Sender<Taken<W::Batch>>,
        mut is_over: watch::Receiver<bool>,
    ) -> (SessionEnd, Intake) {
        let (lane, queue) = (self.number, self.queue.as_str());
        let end = self.take_until(connection, &mut intake, &taken, &mut is_over).await;
        if matches!(end, SessionEnd::Lost) {
            self.work.attached(false);
        } else {
            Signal::ConsumerDetached { lane, queue }.emit();
            let cancelled = intake.cancel().await;
            self.work.attached(false);
            if cancelled.is_ok() {
                // What was delivered before the consumer was cancelled is settled as well.
                while let Some(batch) = intake.drain() {
                    if taken.send(self.read(batch.deliveries).await).await.is_err() {
                        break;
                    }
                }
            }
        }
        (end, intake)
    }

    /// Resolves once the queue has no consumer, ours included, or is not what it must be any more. A queue that is deleted and
    /// declared anew in the same moment may leave its consumers without a word: they would wait for ever and be told as
    /// attached, or go on with the new one, whatever that is.
    async fn forgotten(&self, connection: &Connection) {
        let mut strikes = 0;
        loop {
            tokio::time::sleep(CONSUMER_LOOK).await;
            // Each refusal costs the connection a channel for good: who may not look was told so when it attached.
            if !self.unseen_told {
                match topology::fitness(connection, &self.queue).await {
                    Ok(fitness) if fitness.problem.is_none() => {}
                    Ok(_) => return,
                    Err(_) => std::future::pending().await,
                }
            }
            match topology::backlog(connection, &self.queue).await {
                Ok((_, 0)) => strikes += 1,
                Ok(_) => strikes = 0,
                Err(BrokerError::Refused { code: 404, .. }) => return,
                // Not ours to look at, or the session ends by itself.
                Err(BrokerError::Refused { .. } | BrokerError::Away(_) | BrokerError::Config(_)) => {
                    std::future::pending().await
                }
            }
            // One is exchanged for another when the first message that is no redelivery comes.
            if strikes > 1 {
                return;
            }
        }
    }

    async fn read(&self, deliveries: Vec<Delivery>) -> Taken<W::Batch> {
        let received = Instant::now();
        let undecodable = deliveries
            .iter()
            .filter(|delivery| delivery.properties.undecodable.is_some());
        let messages = undecodable.count();
        if messages > 0 {
            let (lane, queue) = (self.number, self.queue.as_str());
            Signal::Undecodable { lane, queue, messages }.emit();
        }
        let batch = self.work.read(deliveries).await;
        Taken { batch, received }
    }

    /// Until the program stops, intake closes, or the consumer is lost.
    async fn take_until(
        &self,
        connection: &Connection,
        intake: &mut Intake,
        taken: &mpsc::Sender<Taken<W::Batch>>,
        is_over: &mut watch::Receiver<bool>,
    ) -> SessionEnd {
        let mut stop = self.worker.stop.clone();
        let mut closed = self.gate.closed.subscribe();
        let (lane, queue) = (self.number, self.queue.as_str());
        let forgotten = std::pin::pin!(self.forgotten(connection));
        let mut forgotten = forgotten.fuse();
        let told_forgotten = || {
            let error = "the queue was made anew without a word to its consumer";
            Signal::ConsumerLost { lane, queue, error }.emit();
            SessionEnd::Lost
        };
        loop {
            // A place for the batch first: the one before may be held up for long, and while it is nothing is taken, a
            // consumer that must go goes, and a connection that breaks is told.
            let place = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return SessionEnd::Stopping,
                _ = is_over.wait_for(|over| *over) => return SessionEnd::Closed,
                _ = closed.wait_for(|closed| *closed) => return SessionEnd::Closed,
                place = taken.reserve() => place,
                () = &mut forgotten => return told_forgotten(),
                () = connection.closed() => {
                    let error = "the connection broke while the batch before was being settled";
                    Signal::ConsumerLost { lane, queue, error }.emit();
                    return SessionEnd::Lost;
                }
            };
            let Ok(place) = place else {
                return SessionEnd::Closed;
            };
            let next = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return SessionEnd::Stopping,
                _ = is_over.wait_for(|over| *over) => return SessionEnd::Closed,
                _ = closed.wait_for(|closed| *closed) => return SessionEnd::Closed,
                next = intake.next() => next,
                () = &mut forgotten => return told_forgotten(),
            };
            match next {
                Ok(batch) => place.send(self.read(batch.deliveries).await),
                Err(IntakeEnd::Cancelled) => {
                    Signal::ConsumerCancelled { lane, queue }.emit();
                    return SessionEnd::Lost;
                }
                Err(IntakeEnd::Away(error)) => {
                    Signal::ConsumerLost {
                        lane,
                        queue,
                        error: &error.to_string(),
                    }
                    .emit();
                    return SessionEnd::Lost;
                }
            }
        }
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

/// Better no worker than half a one.
fn escalate(ended: Option<Result<(), tokio::task::JoinError>>) {
    if let Some(Err(error)) = ended
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}

/// Rejects and acknowledges. Where the channel is gone, the messages come again, and are known then.
pub async fn dispose(disposer: &Disposer, lane: usize, rejects: &[u64], acks: &[u64]) {
    if let Err(error) = disposer.dispose(rejects, acks.iter().max().copied()).await {
        let error = error.to_string();
        Signal::AckLost { lane, error: &error }.emit();
    }
}

/// The tag of a message that came from a queue.
pub fn tag_of(delivery: &Delivery) -> u64 {
    match delivery.source {
        Source::Queue { delivery_tag } => delivery_tag,
        Source::Parked { .. } | Source::Replayed { .. } | Source::Held { .. } | Source::Plain => 0,
    }
}

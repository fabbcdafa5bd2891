//! Takes what is in one queue, session after session with the broker.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio::sync::{mpsc, watch};

use super::{
    Worker,
    forgotten::{Attendance, Forgotten},
    patience::{Gate, HandBack},
    sight::Sighted,
};
use crate::{
    broker::{
        BrokerError, Connection,
        intake::{Disposer, Intake, IntakeEnd},
        topology,
    },
    domain::delivery::{Delivery, Source},
    retry::{self, Backoff, Waited},
    store::{Fate, StoreError},
    telemetry::{BatchTrace, Dependency, Door, Signal},
};

/// How often a consumer asks whether its queue still has one.
const CONSUMER_LOOK: Duration = Duration::from_millis(1_800);
/// By then a broker answers such a question.
const ANSWER_EXPECTED: Duration = Duration::from_secs(2);

/// How long a queue that is not what it must be is left alone before it is looked at again.
pub(super) const MISFIT_INTERVAL: Duration = Duration::from_secs(5);

/// What a consumer's messages are taken for: a lane settles updates, the collector stores dead letters.
pub(crate) trait Work: Sized {
    /// Messages that were read.
    type Batch: Clone + Default;

    /// The door that they come through.
    const DOOR: Door;

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
    /// Not everything can be looked at over AMQP.
    pub unseen: bool,
    /// That nobody else sees it either was said.
    pub unseen_told: bool,
}

/// A batch on its way from intake to being worked on.
struct Taken<B> {
    batch: B,
    received: Instant,
    trace: BatchTrace,
}

/// That the broker does not answer for a queue, as long as it is so and somebody looks.
struct Silent<'a, W: Work> {
    work: &'a W,
    told: Cell<bool>,
}

impl<'a, W: Work> Silent<'a, W> {
    fn of(work: &'a W) -> Self {
        Self {
            work,
            told: Cell::new(false),
        }
    }

    fn tell(&self, queue: &str) {
        if !self.told.replace(true) {
            self.work.misfit(Some(format!(
                "the broker does not answer for queue {queue}: its leader is frozen, or too few of its members are there"
            )));
        }
    }

    fn over(&self) {
        if self.told.replace(false) {
            self.work.misfit(None);
        }
    }
}

impl<W: Work> Drop for Silent<'_, W> {
    fn drop(&mut self) {
        self.over();
    }
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
                        Fate::Retry
                        | Fate::Bisect
                        | Fate::Ours
                        | Fate::CommittedBefore
                        | Fate::Overtaken
                        | Fate::Full => {
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
        // Somebody may have closed it since the rehearsal: what would come now went back once more.
        if self.gate.is_closed() {
            drop(connection.close().await);
            return Ok(SessionEnd::Closed);
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
            queue: topology::shown(&self.queue),
        }
        .emit();

        let (taken, mut to_finish) = mpsc::channel::<Taken<W::Batch>>(1);
        let (over, is_over) = watch::channel(false);
        let taking = self.take(&connection, intake, taken, is_over);
        let finishing = async {
            let mut handed_back = None;
            while let Some(Taken { batch, received, trace }) = to_finish.recv().await {
                let finished = async {
                    let finished = self.work.finish(batch, received, &disposer).await;
                    if let Err(HandBack { why, .. }) = &finished {
                        Signal::HandedBack { lane: self.number, why }.emit();
                    }
                    finished
                };
                if let Err(why) = trace.within(finished).await {
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
        let mut fitness = topology::fitness(connection, &self.queue).await?;
        let sighted = match fitness.problem {
            None => Box::pin(self.worker.sight.look(&self.queue)).await,
            Some(_) => Sighted::Unknown,
        };
        if let Sighted::Wrong(problem) = &sighted {
            fitness.problem = Some(problem.clone());
        }
        if fitness.problem.is_none() && self.queue.starts_with(topology::UPDATES) {
            // On the heap: what a session's own future holds lies below every batch on the stack.
            fitness.problem = Box::pin(self.worker.missing_right()).await?;
        }
        if fitness.problem != self.misfit {
            if let Some(problem) = &fitness.problem {
                let (lane, queue) = (self.number, topology::shown(&self.queue));
                Signal::TopologyMisfit { lane, queue, problem }.emit();
            }
            self.work.misfit(fitness.problem.clone());
            self.misfit = fitness.problem;
        }
        Signal::TopologyLooked {
            queue: topology::shown(&self.queue),
            fits: self.misfit.is_none(),
        }
        .emit();
        self.unseen = !fitness.unseen.is_empty();
        let is_unseen = self.unseen && self.misfit.is_none() && sighted == Sighted::Unknown;
        if is_unseen && !std::mem::replace(&mut self.unseen_told, true) {
            let (queue, unseen) = (topology::shown(&self.queue), fitness.unseen.as_slice());
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
        let (lane, queue) = (self.number, topology::shown(&self.queue));
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

    /// Resolves once the queue has no consumer, ours included, or is not what it must be any more, and says why. A queue that is
    /// deleted and declared anew in the same moment may leave its consumers without a word: they would wait for ever and be told
    /// as attached, or go on with the new one, whatever that is.
    async fn forgotten(&self, connection: &Connection) -> &'static str {
        let mut forgotten = Forgotten::new(self.worker.settings.worker.consumer_missing_after);
        // Whether it was told that nobody answers: then nothing can be settled, whoever is attached.
        let silent = Silent::of(&self.work);
        loop {
            let wait = match forgotten.is_attended() {
                true => CONSUMER_LOOK,
                false => CONSUMER_LOOK / 6,
            };
            tokio::time::sleep(wait).await;
            // A queue whose members are no majority has nobody who could answer for it.
            let mut asked = std::pin::pin!(topology::backlog(connection, &self.queue));
            let answered = match tokio::time::timeout(ANSWER_EXPECTED, &mut asked).await {
                Ok(answered) => answered,
                Err(_) => {
                    silent.tell(topology::shown(&self.queue));
                    asked.await
                }
            };
            match answered {
                Ok((ready, consumers)) => match forgotten.told(ready, consumers, Instant::now()) {
                    Attendance::Attended => silent.over(),
                    Attendance::Again => {}
                    Attendance::Silent => silent.tell(topology::shown(&self.queue)),
                    Attendance::MadeAnew => return "the queue was made anew without a word to its consumer",
                    Attendance::SilentTooLong => {
                        return "the queue said for too long that it has no consumer: it was made anew without a word, or its \
                                leader does not answer";
                    }
                },
                Err(BrokerError::Refused { code: 404, .. }) => {
                    return "the queue is gone, without a word to its consumer";
                }
                // On a connection that lives: it is asked again.
                Err(BrokerError::Away(_)) if connection.is_connected() => silent.tell(topology::shown(&self.queue)),
                // Not ours to look at, or the session ends by itself. A refusal is an answer, however late.
                Err(BrokerError::Refused { .. } | BrokerError::Away(_) | BrokerError::Config(_)) => {
                    silent.over();
                    std::future::pending().await
                }
            }
            // Each refusal costs the connection a channel for good: who may not look was told so when it attached.
            if forgotten.is_attended()
                && let Sighted::Wrong(_) = Box::pin(self.worker.sight.look_again(&self.queue)).await
            {
                return "the management API shows that the queue, or an exchange, is not what it must be";
            }
            if forgotten.is_attended() && !self.unseen && !silent.told.get() {
                match topology::fitness(connection, &self.queue).await {
                    Ok(fitness) if fitness.problem.is_none() => {}
                    Ok(_) => return "the queue, or an exchange, is not what it was when the consumer was attached",
                    Err(BrokerError::Away(_)) if connection.is_connected() => silent.tell(topology::shown(&self.queue)),
                    Err(_) => std::future::pending().await,
                }
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
            let (lane, queue) = (self.number, topology::shown(&self.queue));
            Signal::Undecodable { lane, queue, messages }.emit();
        }
        let trace = self
            .worker
            .traces
            .begin(topology::shown(&self.queue), W::DOOR, deliveries.iter());
        let batch = trace.within(self.work.read(deliveries)).await;
        Taken { batch, received, trace }
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
        let (lane, queue) = (self.number, topology::shown(&self.queue));
        let forgotten = std::pin::pin!(self.forgotten(connection));
        let mut forgotten = forgotten.fuse();
        let told_forgotten = |error| {
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
                error = &mut forgotten => return told_forgotten(error),
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
                error = &mut forgotten => return told_forgotten(error),
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

/// Acknowledges what came from a queue, all up to the last. Where the channel is gone it comes again, and is known then.
pub(crate) async fn acknowledge(disposer: &Disposer, lane: usize, sources: impl Iterator<Item = Source>) {
    let Some(last) = sources.filter_map(Source::delivery_tag).max() else {
        return;
    };
    if let Err(error) = disposer.acknowledge(Some(last)).await {
        let error = error.to_string();
        Signal::AckLost { lane, error: &error }.emit();
    }
}

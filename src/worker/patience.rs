//! Waiting with messages in hand: the gate that closes intake, the pause that is told, the blame that has a bound, and how
//! long what was taken is kept before it goes back.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::Worker;
use crate::{
    domain::delivery::BatchId,
    health::Health,
    retry::Backoff,
    settle::{Batch, next_step::Step},
    store::{Fate, StoreError},
    telemetry::{Dependency, PauseCause, Signal},
};

/// Messages that the database alone refused, lately. Several within a minute say that the fault is ours.
#[derive(Clone, Debug, Default)]
pub struct Culprits(Arc<Mutex<VecDeque<Instant>>>);

impl Culprits {
    /// Those of the last minute.
    fn lately(&self) -> MutexGuard<'_, VecDeque<Instant>> {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        times.retain(|time| now.duration_since(*time) < Duration::from_secs(60));
        times
    }

    /// Whether one more would still be a message's fault.
    pub fn have_room(&self, most: usize) -> bool {
        is_room(&self.lately(), most)
    }

    /// Counts one more, and says whether that is still a message's fault.
    ///
    /// One that is not blamed counts as well: the pause ends only after a minute in which none came.
    pub fn blame(&self, most: usize) -> bool {
        let mut times = self.lately();
        let room = is_room(&times, most);
        count_one(&mut times, most);
        room
    }

    /// What comes next where it depends on whether one more would still be a message's fault. Nobody else is blamed between
    /// the question and the count.
    pub fn decide(&self, most: usize, next: impl FnOnce(bool) -> Step) -> Step {
        let mut times = self.lately();
        let step = next(is_room(&times, most));
        if step.accuses() {
            count_one(&mut times, most);
        }
        step
    }
}

fn is_room(times: &VecDeque<Instant>, most: usize) -> bool {
    times.len() + 1 < most
}

fn count_one(times: &mut VecDeque<Instant>, most: usize) {
    times.push_back(Instant::now());
    while times.len() > most {
        times.pop_front();
    }
}

/// Intake as a whole. When one lane can not settle, no lane takes more: what one hands back would only go to another's
/// consumer, and count against its delivery limit once more for each. The collector has a gate of its own: what stops it
/// does not stop the lanes.
pub struct Gate<B = Batch> {
    pub closed: watch::Sender<bool>,
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

    pub fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    pub fn open(&self) {
        self.closed.send_replace(false);
    }

    pub fn handed_back(&self) -> MutexGuard<'_, Vec<Arc<HandBack<B>>>> {
        self.handed_back.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fault lasts for too long: what is in hand goes back to the broker, once.
pub struct HandBack<B = Batch> {
    pub why: String,
    /// Only this lane is held up: the others go on, and may have what it held.
    pub alone: bool,
    /// What could not be settled: intake begins again only when this would go through.
    pub refused: Option<B>,
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
pub(crate) struct Patience<B> {
    health: Arc<Health>,
    gate: Gate<B>,
    who: String,
    limit: Duration,
    backoff: Backoff,
    paused: Option<Paused>,
}

impl<B: Clone> Patience<B> {
    /// Of `who`, as /readyz tells it, who closes this gate while waiting.
    pub(crate) fn new(worker: &Worker, gate: &Gate<B>, who: String) -> Self {
        Self {
            health: Arc::clone(&worker.health),
            gate: gate.clone(),
            who,
            limit: worker.settings.worker.pause_release,
            backoff: Backoff::new(&worker.settings.retry),
            paused: None,
        }
    }

    /// A jittered moment before the batch is tried again, for a fault that passes by itself.
    pub(crate) async fn short(&mut self, batch: BatchId, lane: usize, attempt: u32, error: &StoreError) {
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
    pub(crate) async fn wait(&mut self, cause: PauseCause, error: &StoreError, part: &B) -> Result<(), HandBack<B>> {
        if error.fate == Fate::Away {
            self.health.set_database_trouble(error.trouble().sentence());
        }
        self.wait_for(Dependency::Database, cause, error.to_string(), part)
            .await
    }

    /// The same for another dependency than the database.
    pub(crate) async fn wait_for(
        &mut self,
        dependency: Dependency,
        cause: PauseCause,
        why: String,
        part: &B,
    ) -> Result<(), HandBack<B>> {
        let paused = self.paused.get_or_insert_with(|| {
            self.gate.close();
            Paused::begin(&self.health, &self.who, cause, &why)
        });
        if paused.since().elapsed() >= self.limit {
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
            dependency,
            attempt,
            wait,
            error: &why,
        }
        .emit();
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// It went through.
    pub(crate) fn over(&mut self) {
        self.backoff.reset();
        self.health.set_database_ok(true);
        self.paused = None;
    }
}

/// Somebody takes no more work while this lives.
pub(crate) struct Paused {
    health: Arc<Health>,
    who: String,
    cause: PauseCause,
    since: Instant,
}

impl Paused {
    /// Begins a pause of `who`; others may pause on their own.
    pub(crate) fn begin(health: &Arc<Health>, who: &str, cause: PauseCause, why: &str) -> Self {
        health.set_paused_by(who, Some(format!("{cause}: {why}")));
        Signal::Paused { cause, why }.emit();
        Self {
            health: Arc::clone(health),
            who: who.to_owned(),
            cause,
            since: Instant::now(),
        }
    }

    /// When it began.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.health.set_paused_by(&self.who, None);
        Signal::Resumed {
            cause: self.cause,
            paused_for: self.since.elapsed(),
        }
        .emit();
    }
}

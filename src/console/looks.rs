//! How things stand, looked at once for everybody: the database, the broker and the workers, each by itself, so that one that
//! does not answer keeps nobody from seeing the others.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Mutex as Turn;

use super::{
    shared::{PATIENCE, Shared, Told},
    workers::{Workers, WorkersSeen},
};
use crate::{
    config::ConsoleSettings,
    desk::{Desk, QueueStanding, QueueWatch, Refusal, Standing},
};

/// What was seen so lately is not looked at again.
const FRESH: Duration = Duration::from_secs(1);
/// For how long workers are counted on after somebody looked, and how often, so that who comes again sees what a minute was like.
const COUNTED_ON: Duration = Duration::from_secs(300);
const COUNTED_EVERY: Duration = Duration::from_secs(10);

/// What is seen.
pub(super) struct Look {
    pub(super) standing: Told<Standing>,
    pub(super) queues: Told<Vec<QueueStanding>>,
    pub(super) workers: Told<WorkersSeen>,
    /// Whether any worker is named in the settings.
    pub(super) watched: bool,
}

/// Whoever looks, for everybody.
pub(super) struct Looks {
    desk: Desk,
    fresh: Duration,
    watched: bool,
    standing: Arc<Shared<Standing>>,
    queues: Arc<Shared<Vec<QueueStanding>>>,
    broker: Arc<Turn<Broker>>,
    workers: Arc<Shared<WorkersSeen>>,
    crew: Arc<Turn<Workers>>,
    /// When somebody looked last.
    looked: Mutex<Option<Instant>>,
}

/// Who looks at queues, and the partners that have one of their own, as they were known last.
struct Broker {
    desk: Desk,
    watch: QueueWatch,
    own: Vec<String>,
}

impl Broker {
    async fn look(&mut self) -> Result<Vec<QueueStanding>, Refusal> {
        // A database that does not answer is no reason not to ask the broker.
        if let Ok(Ok(own)) = tokio::time::timeout(PATIENCE / 2, self.desk.own_queues()).await {
            self.own = own;
        }
        self.watch.look(&self.own).await
    }
}

impl Looks {
    pub(super) fn new(desk: &Desk, settings: &ConsoleSettings) -> Self {
        Self {
            fresh: FRESH.min(settings.live_interval),
            watched: !settings.workers.is_empty(),
            standing: Arc::default(),
            queues: Arc::default(),
            broker: Arc::new(Turn::new(Broker {
                desk: desk.clone(),
                watch: desk.queue_watch(),
                own: Vec::new(),
            })),
            workers: Arc::default(),
            crew: Arc::new(Turn::new(Workers::new(&settings.workers))),
            looked: Mutex::new(None),
            desk: desk.clone(),
        }
    }

    /// What is away is said; what is not is shown.
    pub(super) async fn look(&self) -> Look {
        let (desk, broker) = (self.desk.clone(), Arc::clone(&self.broker));
        let (standing, queues, workers) = tokio::join!(
            self.standing.ask(self.fresh, async move { desk.standing().await }),
            self.queues
                .ask(self.fresh, async move { broker.lock().await.look().await }),
            self.workers(),
        );
        Look {
            standing,
            queues,
            workers,
            watched: self.watched,
        }
    }

    /// What the workers say.
    pub(super) async fn workers(&self) -> Told<WorkersSeen> {
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.count(self.fresh).await
    }

    async fn count(&self, fresh: Duration) -> Told<WorkersSeen> {
        let crew = Arc::clone(&self.crew);
        self.workers
            .ask(fresh, async move { Ok(crew.lock().await.look().await) })
            .await
    }

    /// Counts on for a while after somebody looked.
    pub(super) async fn count_on(&self) {
        let looked = *self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if self.watched && looked.is_some_and(|at| at.elapsed() < COUNTED_ON) {
            self.count(COUNTED_EVERY).await;
        }
    }
}

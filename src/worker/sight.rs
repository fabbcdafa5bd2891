//! What AMQP does not show of a queue and of what leads to it and away from it: asked of the management API, where somebody said
//! where that is. Bindings are seen there, and arguments whatever the rights of the worker's user are.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use crate::{
    broker::{management::Management, topology},
    config::Settings,
};

/// For so long what was seen counts for the next consumer that is about to be attached: lanes begin together.
pub(super) const FRESH: Duration = Duration::from_millis(500);
/// One look may take so long: a consumer waits for it.
const LOOK: Duration = Duration::from_secs(5);

/// What a look came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sighted {
    Well,
    /// What is wrong, as `settled doctor` says it.
    Wrong(String),
    /// Nobody said where to ask, or there is no answer: `broker_watch` says that once.
    Unknown,
}

/// What was seen last, by queue. One asks at a time: what another has just seen need not be asked again.
#[derive(Clone)]
pub struct Sight {
    management: Option<Management>,
    interval: Duration,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    queues: BTreeMap<String, (Instant, Sighted)>,
    /// When there was no answer last.
    silent: Option<Instant>,
}

impl Sight {
    pub fn new(settings: &Settings) -> Self {
        Self {
            // What is wrong with the setting is said by `broker_watch`.
            management: Management::from_settings(settings).ok().flatten(),
            interval: settings.broker.management_interval,
            seen: Arc::default(),
        }
    }

    /// Looks at a queue and what is around it, before a consumer is attached.
    pub(super) async fn look(&self, queue: &str) -> Sighted {
        self.look_after(queue, FRESH).await
    }

    /// Looks again while it is consumed, now and then.
    pub(super) async fn look_again(&self, queue: &str) -> Sighted {
        self.look_after(queue, self.interval).await
    }

    async fn look_after(&self, queue: &str, age: Duration) -> Sighted {
        let Some(management) = &self.management else {
            return Sighted::Unknown;
        };
        // One who asks may take so long, and so no one waits longer for another.
        let Ok(mut seen) = tokio::time::timeout(LOOK, self.seen.lock()).await else {
            return Sighted::Unknown;
        };
        if let Some((at, sighted)) = seen.queues.get(queue)
            && at.elapsed() < age
        {
            return sighted.clone();
        }
        // Whoever is silent holds up one consumer once in a while, not each of them.
        if seen.silent.is_some_and(|at| at.elapsed() < self.interval) {
            return Sighted::Unknown;
        }
        let sighted = match tokio::time::timeout(LOOK, topology::wrong(management, queue)).await {
            Ok(Ok(None)) => Sighted::Well,
            Ok(Ok(Some(problem))) => Sighted::Wrong(problem),
            Ok(Err(_)) | Err(_) => {
                seen.silent = Some(Instant::now());
                // Or a consumer that is attached, since nobody can say what is wrong, is dropped for what was.
                seen.queues.remove(queue);
                return Sighted::Unknown;
            }
        };
        seen.queues.insert(queue.to_owned(), (Instant::now(), sighted.clone()));
        sighted
    }
}

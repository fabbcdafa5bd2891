//! The signals that end the worker, and what is left when its time is over.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use super::Worker;
use crate::settle::Batch;

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

/// The tasks that are at work, by name.
#[derive(Clone, Debug, Default)]
pub struct Running(Arc<Mutex<BTreeSet<String>>>);

/// A task is at work for as long as it has this.
pub(super) struct AtWork {
    running: Running,
    name: String,
}

impl Running {
    pub(super) fn begin(&self, name: impl Into<String>) -> AtWork {
        let name = name.into();
        self.names().insert(name.clone());
        AtWork {
            running: self.clone(),
            name,
        }
    }

    /// The same for a whole task.
    pub(super) async fn task<T>(self, name: &str, task: impl Future<Output = T>) -> T {
        let _at_work = self.begin(name);
        Box::pin(task).await
    }

    fn names(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.running.names().remove(&self.name);
    }
}

impl Worker {
    /// What is not done, in a sentence; None: everything is.
    pub(super) fn left(&self) -> Option<String> {
        let mut left = Vec::new();
        let names: Vec<String> = self.running.names().iter().cloned().collect();
        if !names.is_empty() {
            left.push(format!(
                "still at work: {} (messages that were not acknowledged come again, publications are the relay's)",
                names.join(", ")
            ));
        }
        let handed_back: usize = self
            .gate
            .handed_back()
            .iter()
            .filter_map(|handed_back| handed_back.refused.as_ref())
            .map(Batch::len)
            .sum();
        if handed_back > 0 {
            left.push(format!("{handed_back} messages went back to the queue unsettled"));
        }
        (!left.is_empty()).then(|| left.join("; "))
    }
}

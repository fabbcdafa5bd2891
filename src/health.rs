//! What the worker knows of itself: whether it is ready, and why not. `/readyz` tells it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;

pub(crate) const NO_CONSUMER: &str = "no consumer is attached to settlement.updates";

/// What the worker knows of itself, and `/readyz` tells.
#[derive(Debug, Default)]
pub struct Health {
    consumers_attached: AtomicUsize,
    /// Those of them that consume the common queue.
    common_attached: AtomicUsize,
    database_ok: AtomicBool,
    /// What keeps us from it, where that is known.
    database_trouble: Mutex<Option<&'static str>>,
    /// By whom, and why.
    paused: Mutex<BTreeMap<String, String>>,
    /// When a batch of the common queue was settled last.
    settled_at: Mutex<Option<Instant>>,
    /// Why the collector of dead letters takes none. Readiness is about settling, which goes on.
    collector: Mutex<Option<String>>,
    /// What is held to be judged later, in words.
    held: Mutex<Option<String>>,
}

/// The answer of `/readyz`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Readiness {
    pub ready: bool,
    consumers_attached: usize,
    database: bool,
    paused: Option<String>,
    /// Why no dead letters are collected, where settling goes on all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    collector: Option<String>,
    /// What is held to be judged later, where anything is; settling goes on all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<String>,
    reasons: Vec<String>,
}

impl Health {
    pub fn new() -> Self {
        Self::default()
    }

    /// A lane's consumer is attached, to the common queue or to a partner's own.
    pub fn consumer_attached(&self, is_common: bool) {
        self.consumers_attached.fetch_add(1, Ordering::AcqRel);
        if is_common {
            self.common_attached.fetch_add(1, Ordering::AcqRel);
        }
    }

    pub fn consumer_gone(&self, is_common: bool) {
        // Saturating: a consumer that is reported gone twice must not make the worker look ready for ever.
        let less = |counter: &AtomicUsize| {
            counter
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1))
                .unwrap_or_default();
        };
        less(&self.consumers_attached);
        if is_common {
            less(&self.common_attached);
        }
    }

    /// Of all queues.
    pub fn consumers_attached(&self) -> usize {
        self.consumers_attached.load(Ordering::Acquire)
    }

    pub fn set_database_ok(&self, ok: bool) {
        self.database_ok.store(ok, Ordering::Release);
    }

    /// The database can not be used, and why: a sentence.
    pub fn set_database_trouble(&self, sentence: &'static str) {
        let mut trouble = self.database_trouble.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = Some(sentence);
        self.set_database_ok(false);
    }

    pub fn database_ok(&self) -> bool {
        self.database_ok.load(Ordering::Acquire)
    }

    /// Why intake is paused; None: it is not. Shown to whoever asks `/readyz`, so no secrets.
    pub fn set_paused(&self, why: Option<String>) {
        self.set_paused_by("", why);
    }

    /// The same for one of several who pause on their own: paused while any of them is.
    pub fn set_paused_by(&self, who: &str, why: Option<String>) {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => paused.insert(who.to_owned(), why),
            None => paused.remove(who),
        };
    }

    /// A batch of the common queue was settled.
    pub fn note_settled(&self) {
        *self.settled_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether any was within so long.
    pub fn settled_within(&self, within: Duration) -> bool {
        let settled_at = *self.settled_at.lock().unwrap_or_else(PoisonError::into_inner);
        settled_at.is_some_and(|at| at.elapsed() < within)
    }

    /// Why the collector takes no dead letters; None: it takes them.
    pub fn set_collector(&self, why: Option<String>) {
        *self.collector.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    fn collector(&self) -> Option<String> {
        self.collector.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is held to be judged later; None: nothing.
    pub fn set_held(&self, what: Option<String>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    fn held(&self) -> Option<String> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The reasons of all who paused, each once.
    pub fn paused(&self) -> Option<String> {
        let paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        let why: BTreeSet<&str> = paused.values().map(String::as_str).collect();
        if why.is_empty() {
            return None;
        }
        Some(why.into_iter().collect::<Vec<_>>().join("; "))
    }

    /// Why the worker is not ready; empty if it is.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        // A partner's own queue settles that partner alone: everybody else waits for the common one.
        if self.common_attached.load(Ordering::Acquire) == 0 {
            reasons.push(NO_CONSUMER.to_owned());
        }
        if !self.database_ok() {
            let trouble = *self.database_trouble.lock().unwrap_or_else(PoisonError::into_inner);
            reasons.push(trouble.unwrap_or("the database does not answer").to_owned());
        }
        if let Some(why) = self.paused() {
            reasons.push(format!("paused: {why}"));
        }
        reasons
    }

    pub fn is_ready(&self) -> bool {
        self.reasons().is_empty()
    }

    /// All of it, of one moment.
    pub fn readiness(&self) -> Readiness {
        let reasons = self.reasons();
        Readiness {
            ready: reasons.is_empty(),
            consumers_attached: self.consumers_attached(),
            database: self.database_ok(),
            paused: self.paused(),
            collector: self.collector(),
            held: self.held(),
            reasons,
        }
    }
}

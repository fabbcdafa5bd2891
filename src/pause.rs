//! A pause, told once when it begins and once when it ends, however it ends.

use std::{sync::Arc, time::Instant};

use crate::{
    health::Health,
    telemetry::{Cause, Signal},
};

/// Somebody takes no more work while this lives.
pub struct Paused {
    health: Arc<Health>,
    who: String,
    cause: Cause,
    since: Instant,
}

impl Paused {
    /// Begins a pause of `who`; others may pause on their own.
    pub fn begin(health: &Arc<Health>, who: &str, cause: Cause, why: &str) -> Self {
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
    pub fn since(&self) -> Instant {
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

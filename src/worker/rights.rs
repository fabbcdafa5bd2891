//! Whether this worker's user may publish what a batch comes to: asked before a message is taken, not when money has moved.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use super::{STARTING, Worker, consumer::MISFIT_INTERVAL};
use crate::{
    broker::{
        BrokerError, Connection,
        rights::{self, Mend},
        topology,
    },
    retry::{self, Backoff, Waited},
    telemetry::{Dependency, Signal},
};

/// For so long the rights that were there are taken to be there still: lanes begin together, and some sessions are short.
const FRESH: Duration = Duration::from_millis(500);
/// How often it is looked whether the broker takes nothing just now.
const ALARM_LOOK: Duration = Duration::from_millis(50);

/// When the rights were there last. One asks at a time, on one connection.
#[derive(Clone, Debug, Default)]
pub struct Rights(Arc<Mutex<Option<Instant>>>);

impl Worker {
    /// What keeps a lane from telling what it settles, as `settled doctor` says it. On a connection of its own, for a broker
    /// under an alarm answers nobody who publishes; then nothing is known, and nothing is said.
    pub(super) async fn missing_right(&self) -> Result<Option<String>, BrokerError> {
        let mut seen = self.rights.0.lock().await;
        if seen.is_some_and(|seen| seen.elapsed() < FRESH) {
            return Ok(None);
        }
        let name = format!("{} rights", self.settings.worker.name);
        let connection = Connection::open_without_consumer(&self.broker, &name).await?;
        let mend = Mend::of(&self.broker);
        let blocked = async {
            while !connection.is_blocked() {
                tokio::time::sleep(ALARM_LOOK).await;
            }
        };
        let missing = tokio::select! {
            missing = rights::missing_for_a_lane(&connection, &mend) => missing?,
            () = blocked => return Ok(None),
        };
        drop(connection.close().await);
        *seen = missing.is_none().then(Instant::now);
        Ok(missing)
    }

    /// Waits until what is settled can be told: no lane, no due and no held message moves money before.
    pub(super) async fn wait_for_rights(&mut self) -> Waited {
        let mut backoff = Backoff::new(&self.settings.retry);
        let mut told = None;
        loop {
            let waited = match self.missing_right().await {
                Ok(None) => {
                    self.health.set_paused_by(STARTING, None);
                    return Waited::Over;
                }
                Ok(Some(problem)) => {
                    self.health.set_paused_by(STARTING, Some(problem.clone()));
                    if told.as_ref() != Some(&problem) {
                        let queue = topology::UPDATES;
                        Signal::TopologyMisfit {
                            lane: 0,
                            queue,
                            problem: &problem,
                        }
                        .emit();
                        told = Some(problem);
                    }
                    retry::sleep(backoff.next().min(MISFIT_INTERVAL), &mut self.stop).await
                }
                Err(error) => {
                    self.health.set_paused_by(STARTING, Some(error.trouble().to_owned()));
                    self.wait_for(Dependency::Broker, &error.to_string(), &mut backoff)
                        .await
                }
            };
            if waited == Waited::Stopping {
                return waited;
            }
        }
    }
}

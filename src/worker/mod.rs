//! The worker: lanes that take, settle, acknowledge and publish; the relay, due messages, the collector and gauges beside
//! them.

mod broker_watch;
pub mod collector;
mod consumer;
mod context;
mod driver;
mod due;
mod fairness;
pub mod fill;
mod forgotten;
mod gauges;
mod held;
mod in_hand;
mod key_watch;
mod lane;
mod own_queues;
mod patience;
pub mod publish;
mod pulse;
mod relay;
mod rights;
pub mod settled_since;
mod sight;
mod stop;
mod witness;

use std::{sync::Arc, time::Instant};

use tokio::{sync::watch, task::JoinSet};

use self::lane::lane;
pub use self::{context::Worker, stop::Signals};
use crate::{
    broker::{BrokerError, BrokerSettings, Connection, topology},
    config::{ConfigError, Settings},
    health::Health,
    http,
    retry::{Backoff, Waited},
    store::{self, Store, StoreError, vitals::check_limits},
    telemetry::{self, Dependency, Signal, Traces},
};

/// Who pauses, as /readyz tells it, before there are lanes.
const STARTING: &str = "start";

/// Why the worker can not run. Nothing that passes by waiting.
#[derive(Debug, thiserror::Error)]
pub enum WorkerFailure {
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
    /// The database is older than what was told of it.
    #[error("{0}")]
    Loss(String),
    /// A task of ours panicked.
    #[error("{0}")]
    Ours(String),
}

/// Runs until SIGTERM or SIGINT; then stops in order: intake, batches in hand, acknowledgements, outbox, connections.
/// A second signal, or the end of `worker.drain_deadline`, stops at once: what was not acknowledged is delivered again.
///
/// # Errors
/// What waiting can not mend.
pub async fn run(settings: &Settings) -> Result<(), WorkerFailure> {
    let metrics = telemetry::install_metrics();
    let store = Store::new(settings).map_err(WorkerFailure::Setting)?;
    let broker = BrokerSettings::from_settings(settings).map_err(WorkerFailure::Config)?;
    broker
        .check()
        .map_err(|error| WorkerFailure::Setting(error.to_string()))?;
    let (stopper, stop) = watch::channel(false);
    let mut signals =
        Signals::new().map_err(|error| WorkerFailure::Ours(format!("signals can not be caught: {error}")))?;
    let health = Arc::new(Health::new());
    let (http_stopper, http_stop) = watch::channel(false);
    http::serve(&settings.http, Arc::clone(&health), metrics, http_stop)
        .await
        .map_err(WorkerFailure::Http)?;
    Signal::Started {
        worker: &settings.worker.name,
        lanes: settings.worker.lanes,
        version: env!("CARGO_PKG_VERSION"),
    }
    .emit();

    let name = &settings.worker.name;
    let (traces, export) = Traces::start(&settings.traces, name, || http::outlet::outlet(settings));
    let worker = Worker {
        health,
        traces,
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
            let left = worker.left();
            // What is aborted is not lost: unacknowledged messages come again, outbox rows are the relay's.
            tasks.shutdown().await;
            let elapsed = began.elapsed();
            match left {
                None => Signal::Drained { elapsed }.emit(),
                Some(left) => Signal::NotDrained { elapsed, left: &left }.emit(),
            }
            ended
        }
    };
    stopper.send_replace(true);
    if let Some(export) = export {
        export.finish().await;
    }
    http_stopper.send_replace(true);
    Signal::Stopped.emit();
    match ended {
        None => Ok(()),
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(WorkerFailure::Ours(format!("the worker's own code failed: {error}"))),
    }
}

impl Worker {
    async fn work(mut self) -> Result<(), WorkerFailure> {
        if self.wait_for_schema().await? == Waited::Stopping
            || self.wait_for_topology().await? == Waited::Stopping
            || Box::pin(self.wait_for_books()).await? == Waited::Stopping
            || Box::pin(self.wait_for_rights()).await == Waited::Stopping
        {
            return Ok(());
        }
        let mut tasks = JoinSet::new();
        let running = || self.running.clone();
        for number in 0..self.settings.worker.lanes {
            tasks.spawn(lane(self.clone(), number, topology::UPDATES.to_owned()));
        }
        if self.settings.dead_letters.collect {
            tasks.spawn(running().task("collector", collector::run(self.clone())));
        } else {
            // Dead letters stay in their queue; what the broker may have kept away from it would be in no place.
            tasks.spawn(running().task("collector", collector::collect_others(self.clone())));
        }
        tasks.spawn(settled_since::run(self.clone()));
        tasks.spawn(running().task("own queues", self.clone().serve_own_queues()));
        tasks.spawn(running().task("due messages", due::run(self.clone())));
        tasks.spawn(running().task("held messages", held::watch(self.clone())));
        tasks.spawn(running().task(
            "relay",
            relay::run(
                self.clerk.store.clone(),
                self.row_publisher("relay"),
                self.settings.events.source.clone(),
                self.settings.outbox.lease,
                self.settings.outbox.relay_interval,
                Backoff::new(&self.settings.retry),
                self.stop.clone(),
            ),
        ));
        tasks.spawn(self.clone().measure());
        tasks.spawn(pulse::run(self.clone()));
        tasks.spawn(broker_watch::run(self.clone()));
        tasks.spawn(key_watch::run(self.clone()));
        tasks.spawn(witness::run(self.clone()));
        let mut readiness = JoinSet::new();
        readiness.spawn(http::tell_readiness(Arc::clone(&self.health), self.stop.clone()));
        // Every task ends when the worker stops. One that ends by itself has panicked: better no worker than half a one.
        let ended = loop {
            tokio::select! {
                ended = tasks.join_next() => match ended {
                    None => break Ok(()),
                    Some(Ok(())) => {}
                    Some(Err(error)) => {
                        break Err(WorkerFailure::Ours(format!("a task of the worker failed: {error}")));
                    }
                },
                why = self.witness.loss() => break Err(WorkerFailure::Loss(why)),
            }
        };
        // What is aborted is not lost: unacknowledged messages come again.
        tasks.shutdown().await;
        self.last_word().await;
        ended
    }

    /// Waits for the database; a schema of another version is not a thing that passes, nor are limits that do not hold.
    async fn wait_for_schema(&mut self) -> Result<Waited, WorkerFailure> {
        let mut backoff = Backoff::new(&self.settings.retry);
        loop {
            let store = &self.clerk.store;
            let looked = async { Ok::<_, StoreError>((store.schema_version().await?, store.limits().await?)) };
            match looked.await {
                Ok((version, limits)) => {
                    self.health.set_database_ok(true);
                    store::check_schema(version).map_err(WorkerFailure::Schema)?;
                    check_limits(&limits).map_err(WorkerFailure::Setting)?;
                    return Ok(Waited::Over);
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
    async fn wait_for_topology(&mut self) -> Result<Waited, WorkerFailure> {
        let mut backoff = Backoff::new(&self.settings.retry);
        loop {
            let looked = async {
                let connection = Connection::open(&self.broker, &self.settings.worker.name).await?;
                let queues = [topology::UPDATES, topology::DEAD, topology::UNREADABLE];
                let seen = topology::look_at_each(&connection, &queues).await;
                drop(connection.close().await);
                Ok::<_, BrokerError>(queues.into_iter().zip(seen?).collect::<Vec<_>>())
            };
            match looked.await {
                Ok(seen) => {
                    if let Some((queue, _)) = seen.iter().find(|(_, seen)| *seen == topology::Seen::Missing) {
                        return Err(WorkerFailure::Topology(format!(
                            "the broker does not have our queue {queue}; run `settled topology` first"
                        )));
                    }
                    // What may not be looked at may be consumed all the same.
                    self.health.set_paused_by(STARTING, None);
                    return Ok(Waited::Over);
                }
                Err(BrokerError::Config(sentence)) => return Err(WorkerFailure::Setting(sentence)),
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
}

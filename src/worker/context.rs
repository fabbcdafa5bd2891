//! What every task of the worker needs.

use std::sync::Arc;

use tokio::sync::watch;

use super::{
    fairness::Fairness,
    key_watch::KeyUses,
    patience::{Culprits, Gate},
    publish::RowPublisher,
    rights::Rights,
    sight::Sight,
    stop::Running,
    witness::Witness,
};
use crate::{
    broker::BrokerSettings,
    config::Settings,
    health::Health,
    retry::{self, Backoff, Waited},
    settle::{Clerk, blocked::KnownLocks},
    store::Store,
    telemetry::{Dependency, PartnerLabels, Signal, Traces},
};

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
    pub locks: Arc<KnownLocks>,
    pub key_uses: Arc<KeyUses>,
    pub rights: Rights,
    pub sight: Sight,
    pub witness: Arc<Witness>,
    pub running: Running,
    pub traces: Traces,
    pub stop: watch::Receiver<bool>,
}

impl Worker {
    /// What a task needs that runs until `stop`.
    pub fn new(settings: &Settings, store: Store, broker: BrokerSettings, stop: watch::Receiver<bool>) -> Self {
        Self {
            clerk: Clerk::new(settings, store),
            settings: Arc::new(settings.clone()),
            broker,
            health: Arc::new(Health::new()),
            culprits: Culprits::default(),
            gate: Gate::default(),
            labels: Arc::new(PartnerLabels::new(settings.http.partner_labels_max)),
            fairness: Arc::new(Fairness::new(settings)),
            locks: Arc::default(),
            key_uses: Arc::default(),
            rights: Rights::default(),
            sight: Sight::new(settings),
            witness: Arc::default(),
            running: Running::default(),
            traces: Traces::default(),
            stop,
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
}

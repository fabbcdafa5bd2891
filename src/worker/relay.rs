//! The relay: publishes outbox rows whose lane is gone, and those that never had one.

use std::time::Duration;

use tokio::sync::watch;

use super::publish::{Owned, RowPublisher, renew_leases};
use crate::{
    fail::{self, Point},
    retry::{self, Backoff, Waited},
    store::{Store, StoreError},
    telemetry::{Dependency, Signal},
};

/// Takes rows whose lease ran out, one at a time, and publishes them outside any transaction, until the program stops. `source`
/// is that of events that are made only now.
pub(crate) async fn run(
    store: Store,
    mut publisher: RowPublisher,
    source: String,
    lease: Duration,
    interval: Duration,
    mut backoff: Backoff,
    mut stop: watch::Receiver<bool>,
) {
    let owned = Owned::default();
    let mut renewal = tokio::task::JoinSet::new();
    renewal.spawn(renew_leases(store.clone(), owned.clone(), lease));
    loop {
        let waited = match take_one(&store, &mut publisher, &owned, &source, lease).await {
            Ok(true) if !*stop.borrow() => {
                backoff.reset();
                continue;
            }
            Ok(true) => Waited::Stopping,
            Ok(false) => retry::sleep(interval, &mut stop).await,
            Err(error) => {
                let (wait, error) = (backoff.next(), error.to_string());
                let attempt = backoff.attempts();
                Signal::Retrying {
                    dependency: Dependency::Database,
                    attempt,
                    wait,
                    error: &error,
                }
                .emit();
                retry::sleep(wait, &mut stop).await
            }
        };
        if waited == Waited::Stopping {
            break;
        }
    }
    publisher.close().await;
}

async fn take_one(
    store: &Store,
    publisher: &mut RowPublisher,
    owned: &Owned,
    source: &str,
    lease: Duration,
) -> Result<bool, StoreError> {
    let Some(row) = store.take_abandoned(lease, source).await? else {
        return Ok(false);
    };
    Signal::RelayTook {
        batch: row.batch_id,
        age: row.age,
    }
    .emit();
    owned.add(row.row);
    publisher.publish_row(row.batch_id, &row.publications).await;
    let deleted = async {
        fail::fallible(Point::RelayPublished).await?;
        store.delete_published(&[row.row]).await
    };
    let deleted = deleted.await;
    // Deleted or not, it is no longer ours: a row that is still there is taken again when its lease runs out.
    owned.forget(row.row);
    deleted.map(|()| true)
}

//! The publish stage: a batch's outbox row is published from memory until every confirm is in, and only then deleted.

mod answers;
mod row;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinSet};

pub use self::row::RowPublisher;
use super::patience::HandBack;
use crate::{
    config::OutboxSettings,
    domain::delivery::BatchId,
    settle::Answered,
    store::{Store, StoreError},
    telemetry::{BatchTrace, Dependency, Signal},
};

/// The outbox rows that a lane owns: to publish, or published and still to delete.
#[derive(Clone, Debug, Default)]
pub struct Owned(Arc<Mutex<Rows>>);

#[derive(Debug, Default)]
struct Rows {
    unpublished: BTreeSet<BatchId>,
    published: BTreeSet<BatchId>,
}

impl Owned {
    fn rows(&self) -> std::sync::MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A row was committed.
    pub fn add(&self, id: BatchId) {
        self.rows().unpublished.insert(id);
    }

    fn published(&self, id: BatchId) {
        let mut rows = self.rows();
        rows.unpublished.remove(&id);
        rows.published.insert(id);
    }

    /// What may be deleted now. It stays ours until [`Owned::deleted`]: only a commit that is known frees a row.
    pub fn deletable(&self) -> Vec<BatchId> {
        self.rows().published.iter().copied().collect()
    }

    /// A commit that carried their DELETE is known.
    pub fn deleted(&self, ids: &[BatchId]) {
        let mut rows = self.rows();
        for id in ids {
            rows.published.remove(id);
        }
    }

    /// It is not ours any more.
    pub fn forget(&self, id: BatchId) {
        let mut rows = self.rows();
        rows.unpublished.remove(&id);
        rows.published.remove(&id);
    }

    fn all(&self) -> Vec<BatchId> {
        let rows = self.rows();
        rows.unpublished.union(&rows.published).copied().collect()
    }
}

/// Renews the leases of a lane's rows while it lives. Runs until it is aborted.
pub async fn renew_leases(store: Store, owned: Owned, lease: Duration) {
    let mut ticks = tokio::time::interval(lease / 3);
    loop {
        ticks.tick().await;
        let ids = owned.all();
        if ids.is_empty() {
            continue;
        }
        // A lease that runs out costs a second copy of an event, no more; the next tick tries again.
        if let Err(error) = store.renew_leases(&ids, lease).await {
            let error = error.to_string();
            Signal::Retrying {
                dependency: Dependency::Database,
                attempt: 1,
                wait: lease / 3,
                error: &error,
            }
            .emit();
        }
    }
}

/// A committed batch on its way to the publish stage.
#[derive(Debug)]
pub struct Committed {
    pub answered: Answered,
    /// When its messages were taken from the queue.
    pub received: Instant,
    /// What becomes of its publications is said in it.
    pub trace: BatchTrace,
}

/// A lane's publish stage: takes committed batches, one waiting while one is published.
pub struct PublishStage {
    committed: mpsc::Sender<Committed>,
    publishing: JoinSet<()>,
    renewal: JoinSet<()>,
}

/// Where committed batches go in.
pub type Entrance = mpsc::Sender<Committed>;

impl PublishStage {
    /// Depth one: while the broker takes no events, a lane has at most two batches in the outbox.
    pub fn start(publisher: RowPublisher, owned: &Owned, settings: &OutboxSettings) -> Self {
        let (committed, receiver) = mpsc::channel(1);
        let mut renewal = JoinSet::new();
        renewal.spawn(renew_leases(publisher.store.clone(), owned.clone(), settings.lease));
        let mut publishing = JoinSet::new();
        publishing.spawn(publish_batches(
            publisher,
            receiver,
            owned.clone(),
            settings.idle_delete,
        ));
        Self {
            committed,
            publishing,
            renewal,
        }
    }

    pub fn entrance(&self) -> Entrance {
        self.committed.clone()
    }

    /// Waits for a task of the stage to end by itself, which only a panic makes it do.
    pub async fn failed(&mut self) {
        let ended = tokio::select! {
            ended = self.publishing.join_next() => ended,
            ended = self.renewal.join_next() => ended,
        };
        if let Some(Err(error)) = ended
            && error.is_panic()
        {
            // Better no worker than one that settles and does not tell.
            std::panic::resume_unwind(error.into_panic());
        }
    }

    /// Publishes and deletes what is left. Every entrance must be gone.
    pub async fn finish(self) {
        let Self {
            committed,
            mut publishing,
            renewal,
        } = self;
        drop(committed);
        if let Some(Err(error)) = publishing.join_next().await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
        drop(renewal);
    }
}

/// A place in the publish stage. Where there is none for too long what was taken goes back.
pub async fn place_in<B>(entrance: &Entrance, limit: Duration) -> Result<mpsc::Permit<'_, Committed>, HandBack<B>> {
    match tokio::time::timeout(limit, entrance.reserve()).await {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(_)) => Err(HandBack::no_publisher()),
        Err(_) => Err(HandBack::stuck(limit)),
    }
}

/// Hands the parts of a batch to the publish stage; nearly always there is one.
pub async fn send_all(place: mpsc::Permit<'_, Committed>, entrance: &Entrance, done: Vec<Answered>, received: Instant) {
    let trace = BatchTrace::current();
    let mut parts = done.into_iter().map(|answered| Committed {
        answered,
        received,
        trace: trace.clone(),
    });
    if let Some(first) = parts.next() {
        place.send(first);
    }
    for part in parts {
        if entrance.send(part).await.is_err() {
            // The stage ends only with the program; the relay publishes the row.
            return;
        }
    }
}

/// Publishes batches in the order they were committed, until no more come. Rows are deleted with the next batch, or by
/// a statement of their own after `idle_delete` of quiet and at the end.
async fn publish_batches(
    mut publisher: RowPublisher,
    mut committed: mpsc::Receiver<Committed>,
    owned: Owned,
    idle_delete: Duration,
) {
    loop {
        let next = if owned.deletable().is_empty() {
            committed.recv().await
        } else {
            match tokio::time::timeout(idle_delete, committed.recv()).await {
                Ok(next) => next,
                Err(_) => {
                    // What fails now is deleted with the next batch, or at the next quiet moment.
                    if let Err(error) = delete_published(&publisher.store, &owned).await {
                        let (attempt, wait) = (1, idle_delete);
                        let error = error.to_string();
                        Signal::Retrying {
                            dependency: Dependency::Database,
                            attempt,
                            wait,
                            error: &error,
                        }
                        .emit();
                        tokio::time::sleep(publisher.backoff.next()).await;
                    }
                    continue;
                }
            }
        };
        let Some(Committed {
            answered,
            received,
            trace,
        }) = next
        else {
            break;
        };
        let told = async {
            if !answered.publications.is_empty() {
                publisher.publish_row(answered.id, &answered.publications).await;
                owned.published(answered.id);
            }
            publisher.reply(&answered).await;
        };
        trace.within(told).await;
        let elapsed = vec![received.elapsed(); answered.answers.len()];
        Signal::EndToEnd { elapsed: &elapsed }.emit();
    }
    while let Err(error) = delete_published(&publisher.store, &owned).await {
        let wait = publisher.backoff.next();
        let error = error.to_string();
        Signal::Retrying {
            dependency: Dependency::Database,
            attempt: publisher.backoff.attempts(),
            wait,
            error: &error,
        }
        .emit();
        tokio::time::sleep(wait).await;
    }
    publisher.close().await;
}

async fn delete_published(store: &Store, owned: &Owned) -> Result<(), StoreError> {
    let ids = owned.deletable();
    if ids.is_empty() {
        return Ok(());
    }
    store.delete_published(&ids).await?;
    owned.deleted(&ids);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_ours_until_its_deletion_is_known() {
        let owned = Owned::default();
        let (first, second) = (BatchId::from_u128(1), BatchId::from_u128(2));
        owned.add(first);
        owned.add(second);
        assert!(owned.deletable().is_empty());
        owned.published(first);
        let carried = owned.deletable();
        owned.published(second);
        assert_eq!(owned.all(), vec![first, second]);
        owned.deleted(&carried);
        assert_eq!(owned.deletable(), vec![second]);
        owned.forget(second);
        assert!(owned.all().is_empty());
    }
}

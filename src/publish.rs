//! The publish stage: a batch's outbox row is published from memory until every confirm is in, and only then deleted.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use crate::{
    broker::{
        BrokerError, BrokerSettings, Connection,
        publisher::{Fate, Publisher},
    },
    config::Settings,
    domain::delivery::{BatchId, Publication, PublicationKind},
    fail::{self, Point},
    http::Health,
    pause::Paused,
    retry::Backoff,
    settle::Settled,
    store::{Store, StoreError},
    telemetry::{Cause, Dependency, EventType, Fate as Routed, Published, ReplyResult, Signal, Stage},
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
    pub settled: Settled,
    /// When its messages were taken from the queue.
    pub received: Instant,
}

/// Publishes rows on a connection of its own, which it rebuilds.
pub struct RowPublisher {
    broker: BrokerSettings,
    name: String,
    store: Store,
    health: Arc<Health>,
    backoff: Backoff,
    link: Option<(Connection, Publisher)>,
    /// While the broker takes something from nobody: a dead letter has no queue, or we may not publish.
    stuck: Option<Paused>,
}

impl RowPublisher {
    pub fn new(settings: &Settings, broker: BrokerSettings, name: String, store: Store, health: Arc<Health>) -> Self {
        Self {
            broker,
            name,
            store,
            health,
            backoff: Backoff::new(&settings.retry),
            link: None,
            stuck: None,
        }
    }

    /// Publishes everything of a row until every confirm is in, however long that takes.
    pub async fn publish_row(&mut self, id: BatchId, publications: &[Publication]) {
        let began = Instant::now();
        let mut told = Published::new();
        let mut pending: Vec<usize> = (0..publications.len()).collect();
        // The broker closed the channel over one of them: which, only publishing each alone can tell.
        let mut alone = false;
        let mut attempt = 0;
        while !pending.is_empty() {
            attempt += 1;
            if attempt > 1 {
                let wait = self.backoff.next();
                tokio::time::sleep(wait).await;
                Signal::RowRepublished { batch: id, attempt }.emit();
            }
            let outcome = if alone {
                self.publish_each_alone(id, publications, &mut pending, &mut told).await
            } else {
                self.publish_together(id, publications, &mut pending, &mut told).await
            };
            if let Err(error) = outcome {
                // After an error nothing is known of the channel; a refusal may have ended the connection too.
                self.link = None;
                alone = alone || error.is_of_the_message();
                if error.code().is_some() && !error.is_of_the_message() {
                    let why = format!("publishing is refused: {error}");
                    self.stuck
                        .get_or_insert_with(|| Paused::begin(&self.health, &self.name, Cause::Broker, &why));
                }
                Signal::PublishFailed {
                    batch: id,
                    error: &error.to_string(),
                }
                .emit();
            }
        }
        self.backoff.reset();
        Signal::Published {
            batch: id,
            published: &told,
        }
        .emit();
        Signal::Stage {
            stage: Stage::Publish,
            elapsed: began.elapsed(),
        }
        .emit();
    }

    async fn publisher(&mut self) -> Result<&mut Publisher, BrokerError> {
        let link = match self.link.take().filter(|(connection, _)| connection.is_connected()) {
            Some(link) => link,
            None => {
                let connection = Connection::open(&self.broker, &self.name).await?;
                let publisher = Publisher::open(&connection).await?;
                (connection, publisher)
            }
        };
        Ok(&mut self.link.insert(link).1)
    }

    async fn publish_together(
        &mut self,
        id: BatchId,
        publications: &[Publication],
        pending: &mut Vec<usize>,
        told: &mut Published,
    ) -> Result<(), BrokerError> {
        let publisher = self.publisher().await?;
        fail::point(Point::BeforePublish);
        if fail::is_armed(Point::HalfPublished) {
            publisher
                .publish(publications.split_at(publications.len().div_ceil(2)).0)
                .await?;
            fail::point(Point::HalfPublished);
        }
        let fates = if pending.len() == publications.len() {
            publisher.publish(publications).await?
        } else {
            let rest: Vec<Publication> = pending
                .iter()
                .filter_map(|index| publications.get(*index).cloned())
                .collect();
            publisher.publish(&rest).await?
        };
        fail::point(Point::AfterConfirm);
        let fates: Vec<(usize, Fate)> = pending.iter().copied().zip(fates).collect();
        pending.retain(|index| {
            let fate = fates.iter().find_map(|(of, fate)| (of == index).then_some(*fate));
            publications
                .get(*index)
                .zip(fate)
                .is_some_and(|(publication, fate)| !is_done(id, publication, fate, told))
        });
        self.note_returns(publications, pending);
        Ok(())
    }

    async fn publish_each_alone(
        &mut self,
        id: BatchId,
        publications: &[Publication],
        pending: &mut Vec<usize>,
        told: &mut Published,
    ) -> Result<(), BrokerError> {
        let mut left = Vec::new();
        let mut rest = std::mem::take(pending).into_iter();
        while let Some((index, publication)) = rest.next().and_then(|index| Some((index, publications.get(index)?))) {
            let published = match self.publisher().await {
                Ok(publisher) => publisher.publish(std::slice::from_ref(publication)).await,
                // Nothing was sent: that is nobody's message's fault.
                Err(error) => {
                    left.push(index);
                    left.extend(rest);
                    *pending = left;
                    return Err(error);
                }
            };
            match published {
                Ok(fates) => {
                    if !fates.first().is_some_and(|fate| is_done(id, publication, *fate, told)) {
                        left.push(index);
                    }
                }
                Err(error) if error.is_of_the_message() => {
                    self.link = None;
                    let refusal = error.to_string();
                    match self.store.set_aside(id, publication, &refusal).await {
                        Ok(()) => {
                            let routing_key = &publication.routing_key;
                            Signal::PublicationRefused {
                                batch: id,
                                routing_key,
                                error: &refusal,
                            }
                            .emit();
                        }
                        Err(_) => left.push(index),
                    }
                }
                Err(error) => {
                    left.push(index);
                    left.extend(rest);
                    *pending = left;
                    return Err(error);
                }
            }
        }
        *pending = left;
        self.note_returns(publications, pending);
        Ok(())
    }

    /// A dead letter without a queue would be lost: the lane stops here until someone declares the topology.
    fn note_returns(&mut self, publications: &[Publication], pending: &[usize]) {
        let stuck = pending
            .iter()
            .filter_map(|index| publications.get(*index))
            .any(|publication| publication.kind == PublicationKind::DeadLetter);
        if stuck {
            let why = "a dead letter was returned or refused: run `settled topology`";
            self.stuck
                .get_or_insert_with(|| Paused::begin(&self.health, &self.name, Cause::DeadLetterReturned, why));
        } else {
            self.stuck = None;
        }
    }

    /// Answers partners that asked for it. Best effort: no retry, no confirm.
    async fn reply(&mut self, settled: &Settled) {
        for reply in &settled.replies {
            let sent = match self.publisher().await {
                Ok(publisher) => publisher.reply(reply).await,
                Err(_) => false,
            };
            let result = if sent { ReplyResult::Sent } else { ReplyResult::Failed };
            Signal::Reply {
                enterprise_id: "",
                result,
            }
            .emit();
        }
        for _ in 0..settled.replies_ignored {
            Signal::Reply {
                enterprise_id: "",
                result: ReplyResult::Ignored,
            }
            .emit();
        }
    }

    /// Closes the connection in order.
    pub async fn close(self) {
        if let Some((connection, publisher)) = self.link {
            drop(publisher);
            // It is on its way out; a connection that can not even close is cut when it is dropped.
            if let Err(error) = connection.close().await {
                let error = error.to_string();
                Signal::Retrying {
                    dependency: Dependency::Broker,
                    attempt: 0,
                    wait: Duration::ZERO,
                    error: &error,
                }
                .emit();
            }
        }
    }
}

/// Whether a publication needs no further try.
fn is_done(id: BatchId, publication: &Publication, fate: Fate, told: &mut Published) -> bool {
    match (publication.kind, fate) {
        (PublicationKind::Event | PublicationKind::Reply, Fate::Confirmed) => {
            told.event(EventType::of_routing_key(&publication.routing_key), Routed::Confirmed);
            true
        }
        // Nobody subscribed: counted, and done.
        (PublicationKind::Event | PublicationKind::Reply, Fate::Returned) => {
            told.event(EventType::of_routing_key(&publication.routing_key), Routed::Unrouted);
            true
        }
        (PublicationKind::DeadLetter, Fate::Confirmed) => {
            told.dead_letter();
            true
        }
        (PublicationKind::DeadLetter, Fate::Returned) => {
            let message_id = publication.properties.message_id.as_deref();
            Signal::DeadLetterReturned {
                batch: id,
                routing_key: &publication.routing_key,
                message_id,
            }
            .emit();
            false
        }
        (PublicationKind::Event | PublicationKind::DeadLetter | PublicationKind::Reply, Fate::Nacked) => false,
    }
}

/// Publishes batches in the order they were committed, until no more come. Rows are deleted with the next batch, or by
/// a statement of their own after `idle_delete` of quiet and at the end.
pub async fn publish_stage(
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
        let Some(Committed { settled, received }) = next else {
            break;
        };
        if !settled.publications.is_empty() {
            publisher.publish_row(settled.id, &settled.publications).await;
            owned.published(settled.id);
        }
        publisher.reply(&settled).await;
        let elapsed = vec![received.elapsed(); settled.judgements.len()];
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
    fail::point(Point::BeforeOutboxDelete);
    store.delete_published(&ids).await?;
    fail::point(Point::AfterOutboxDelete);
    owned.deleted(&ids);
    Ok(())
}

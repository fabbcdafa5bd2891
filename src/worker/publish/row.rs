//! Publishes a row on a connection of its own until every confirm is in.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use super::answers::Answers;
use crate::{
    broker::{
        BrokerError, BrokerSettings, Connection,
        publisher::{BrokerAnswer, Publisher},
    },
    config::Settings,
    domain::{
        delivery::{BatchId, Publication, PublicationKind},
        event,
    },
    fail::{self, Point},
    health::Health,
    retry::Backoff,
    settle::Answered,
    store::Store,
    telemetry::{Dependency, EventFate, EventType, PauseCause, Published, ReplyResult, Signal, Stage},
    worker::patience::{Culprits, Paused},
};

/// Bytes of bodies published under one deadline. A usual batch fits; a large one makes progress slice by slice.
const SLICE_BYTES: usize = 1 << 20;

/// Connections that a row may lose before its publications are tried one by one.
const LOST_BEFORE_ALONE: u32 = 3;

/// Publications that end good connections, found one by one. A strike counts where something else passed on the very connection
/// that the publication then ended; before it is set aside something else must pass once more. So nothing is set aside because the
/// broker is away, restarts, or a way to it that cuts everything.
#[derive(Default)]
struct Suspects(BTreeMap<usize, u32>);

impl Suspects {
    /// Those without a strike first: they must not wait behind one that can not be published.
    fn in_order(&self, pending: &BTreeSet<usize>) -> Vec<usize> {
        let mut order: Vec<usize> = pending.iter().copied().collect();
        order.sort_by_key(|index| (self.strikes(*index), *index));
        order
    }

    fn strikes(&self, index: usize) -> u32 {
        self.0.get(&index).copied().unwrap_or_default()
    }

    fn strike(&mut self, index: usize) {
        let strikes = self.0.entry(index).or_default();
        *strikes = strikes.saturating_add(1);
    }

    /// Nothing passes: it was not them.
    fn clear(&mut self) {
        self.0.clear();
    }
}

/// Publishes rows on a connection of its own, which it rebuilds.
pub struct RowPublisher {
    broker: BrokerSettings,
    name: String,
    pub(super) store: Store,
    health: Arc<Health>,
    pub(super) backoff: Backoff,
    link: Option<(Connection, Publisher)>,
    answers: Answers,
    /// The broker refused a dead letter that carried our login: it may know us by another name.
    without_login: bool,
    /// Whether something passed on that connection.
    has_passed: bool,
    /// Connections that a publication must have ended.
    strikes: u32,
    /// What was set aside for that lately: where it is too many the fault is not theirs.
    culprits: Culprits,
    culprits_per_minute: usize,
    /// While the broker takes something from nobody: a dead letter has no queue, or we may not publish.
    stuck: Option<Paused>,
    /// Whether a full queue is why.
    is_full: bool,
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
            answers: Answers::new(settings),
            without_login: false,
            has_passed: false,
            strikes: settings.outbox.strikes,
            culprits: Culprits::default(),
            culprits_per_minute: settings.worker.culprits_per_minute,
            stuck: None,
            is_full: false,
        }
    }

    /// Publishes everything of a row until every confirm is in, however long that takes.
    pub async fn publish_row(&mut self, id: BatchId, publications: &[Publication]) {
        let began = Instant::now();
        let mut told = Published::new();
        let mut pending: BTreeSet<usize> = (0..publications.len()).collect();
        // The broker closed the channel over one of them: which, only publishing each alone can tell.
        let mut alone = false;
        let mut lost = 0;
        let mut attempt = 0;
        let mut suspects = Suspects::default();
        while !pending.is_empty() {
            attempt += 1;
            if attempt > 1 {
                let wait = self.backoff.next();
                tokio::time::sleep(wait).await;
                Signal::RowRepublished { batch: id, attempt }.emit();
            }
            if let Err(error) = self
                .publish_once(
                    id,
                    publications,
                    &mut pending,
                    alone.then_some(&mut suspects),
                    &mut told,
                )
                .await
            {
                // After an error nothing is known of the channel; a refusal may have ended the connection too. One that ends
                // a good connection again and again is suspected like one that is refused.
                let was_open = self.link.take().is_some();
                lost += u32::from(was_open && error.code().is_none());
                alone = alone || error.is_of_the_message() || lost >= LOST_BEFORE_ALONE;
                if error.code().is_some() && !error.is_of_the_message() {
                    let why = format!("publishing is refused: {error}");
                    self.stuck
                        .get_or_insert_with(|| Paused::begin(&self.health, &self.name, PauseCause::Broker, &why));
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
        Signal::stage(Stage::Publish, began).emit();
    }

    async fn publisher(&mut self) -> Result<&mut Publisher, BrokerError> {
        let link = match self.link.take().filter(|(connection, _)| connection.is_connected()) {
            Some(link) => link,
            None => {
                self.has_passed = false;
                let connection = Connection::open_without_consumer(&self.broker, &self.name).await?;
                let mut publisher = Publisher::open(&connection).await?;
                if self.without_login {
                    publisher = publisher.without_login();
                }
                (connection, publisher)
            }
        };
        Ok(&mut self.link.insert(link).1)
    }

    /// Publishes what is pending, slice by slice, so that what is confirmed stays confirmed whatever comes after.
    async fn publish_once(
        &mut self,
        id: BatchId,
        publications: &[Publication],
        pending: &mut BTreeSet<usize>,
        mut suspects: Option<&mut Suspects>,
        told: &mut Published,
    ) -> Result<(), BrokerError> {
        let slices = match &suspects {
            Some(suspects) => {
                let order = suspects.in_order(pending).into_iter();
                order.map(|index| index..index + 1).collect()
            }
            None if fail::is_armed(Point::HalfPublished) => slices(publications, pending, 0),
            None => slices(publications, pending, SLICE_BYTES),
        };
        let mut is_full = false;
        for slice in slices {
            if let Some(suspects) = suspects.as_deref_mut()
                && suspects.strikes(slice.start) > 0
            {
                let passes = self.something_passes().await.inspect_err(|_| suspects.clear())?;
                if passes
                    && suspects.strikes(slice.start) >= self.strikes
                    && self.culprits.have_room(self.culprits_per_minute)
                    && self.culprits.blame(self.culprits_per_minute)
                {
                    let refusal = format!(
                        "it ended {} good connections, while others passed before and after it",
                        self.strikes
                    );
                    self.set_aside(id, publications, slice, &refusal, pending).await;
                    continue;
                }
            }
            let publisher = match self.publisher().await {
                Ok(publisher) => publisher,
                Err(error) => {
                    if let Some(suspects) = suspects {
                        suspects.clear();
                    }
                    return Err(error);
                }
            };
            match publisher
                .publish(publications.get(slice.clone()).unwrap_or_default())
                .await
            {
                Ok(fates) => {
                    self.has_passed |= fates.contains(&BrokerAnswer::Confirmed);
                    for (index, fate) in slice.zip(fates) {
                        let Some(publication) = publications.get(index) else {
                            continue;
                        };
                        is_full |= fate == BrokerAnswer::Nacked && publication.kind == PublicationKind::DeadLetter;
                        if is_done(id, publication, fate, told) {
                            pending.remove(&index);
                        }
                    }
                }
                Err(error) if suspects.is_some() && error.is_of_the_message() => {
                    // The channel, and perhaps the connection, went with it.
                    self.link = None;
                    let is_dead_letter = publications
                        .get(slice.clone())
                        .unwrap_or_default()
                        .iter()
                        .any(|publication| publication.kind == PublicationKind::DeadLetter);
                    // Where the broker knows us by another name than the one we log in with, it takes a dead letter only
                    // without it. The collector then believes it if broker.trusted_users says so.
                    if is_dead_letter && error.code() == Some(406) && !self.without_login {
                        self.without_login = true;
                        return Err(error);
                    }
                    self.without_login = false;
                    self.set_aside(id, publications, slice, &error.to_string(), pending)
                        .await;
                }
                Err(error) => {
                    // One that takes too long leaves the connection as it is.
                    let was_ended = self
                        .link
                        .as_ref()
                        .is_some_and(|(connection, _)| !connection.is_connected());
                    if let Some(suspects) = suspects
                        && was_ended
                        && (self.has_passed || suspects.strikes(slice.start) == 0)
                    {
                        suspects.strike(slice.start);
                    }
                    return Err(error);
                }
            }
            fail::fallible(Point::HalfPublished).await?;
        }
        fail::point(Point::AfterConfirm).await;
        self.note_returns(publications, pending, is_full);
        Ok(())
    }

    /// Whether anything else passes on the connection that there is, or on a new one. Where we may not try, only what passed
    /// by itself can tell.
    async fn something_passes(&mut self) -> Result<bool, BrokerError> {
        let publisher = self.publisher().await?;
        match publisher.probe().await {
            Ok(()) => self.has_passed = true,
            Err(BrokerError::Refused { .. }) => self.link = None,
            Err(error @ (BrokerError::Away(_) | BrokerError::Config(_))) => {
                self.link = None;
                return Err(error);
            }
        }
        Ok(self.has_passed)
    }

    /// What the broker does not take is kept for an operator. Where it can not be stored, it is tried again.
    async fn set_aside(
        &self,
        id: BatchId,
        publications: &[Publication],
        slice: Range<usize>,
        refusal: &str,
        pending: &mut BTreeSet<usize>,
    ) {
        for index in slice {
            let Some(publication) = publications.get(index) else {
                continue;
            };
            if self.store.set_aside(id, publication, refusal).await.is_ok() {
                Signal::PublicationRefused {
                    batch: id,
                    routing_key: &publication.routing_key,
                    error: refusal,
                }
                .emit();
                pending.remove(&index);
            }
        }
    }

    /// A dead letter without a queue would be lost, and so would one whose queue is full: the lane stops here until someone
    /// declares the topology, or makes room.
    fn note_returns(&mut self, publications: &[Publication], pending: &BTreeSet<usize>, is_full: bool) {
        let stuck = pending
            .iter()
            .filter_map(|index| publications.get(*index))
            .any(|publication| publication.kind == PublicationKind::DeadLetter);
        if stuck {
            if std::mem::replace(&mut self.is_full, is_full) != is_full {
                // It is told anew, for what it is now.
                self.stuck = None;
            }
            let why = if is_full {
                "a queue of dead letters takes no more: it is full (a policy bounds it), or has no majority of its members; \
                 nothing is lost, and it goes on once what waits in settlement.dead is collected"
            } else {
                "a dead letter was returned: run `settled topology`"
            };
            self.stuck
                .get_or_insert_with(|| Paused::begin(&self.health, &self.name, PauseCause::DeadLetterReturned, why));
        } else {
            self.stuck = None;
        }
    }

    /// Answers partners that asked for it. Best effort: no retry, no confirm.
    pub(super) async fn reply(&mut self, answered: &Answered) {
        // Not where events are known not to pass: none waits for a broker that is away because of a reply. A lane that has
        // published nothing yet knows nothing of that, and a copy of what waits may be the first that it answers.
        let is_there = self
            .link
            .as_ref()
            .is_none_or(|(connection, _)| connection.is_connected());
        for reply in &answered.replies {
            let publisher = if is_there {
                self.answers.publisher(&self.broker, &self.name).await
            } else {
                None
            };
            let sent = match publisher {
                Some(publisher) => publisher.reply(reply).await,
                None => false,
            };
            let result = if sent { ReplyResult::Sent } else { ReplyResult::Failed };
            Signal::Reply { result }.emit();
        }
        for _ in 0..answered.replies_ignored {
            Signal::Reply {
                result: ReplyResult::Ignored,
            }
            .emit();
        }
    }

    /// Closes the connection in order.
    pub async fn close(self) {
        for (connection, publisher) in [self.link, self.answers.link].into_iter().flatten() {
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
            // After the connection: lapin closes a dropped channel by itself, in the middle of ours closing everything.
            drop(publisher);
        }
    }
}

/// Runs of neighbours among the pending, each of at most so many bytes, or of one publication.
fn slices(publications: &[Publication], pending: &BTreeSet<usize>, most_bytes: usize) -> Vec<Range<usize>> {
    let mut slices: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for &index in pending {
        let size = publications.get(index).map_or(0, |publication| publication.body.len());
        match slices.last_mut() {
            Some(slice) if slice.end == index && bytes + size <= most_bytes => {
                slice.end = index + 1;
                bytes += size;
            }
            Some(_) | None => {
                slices.push(index..index + 1);
                bytes = size;
            }
        }
    }
    slices
}

/// Whether a publication needs no further try.
fn is_done(id: BatchId, publication: &Publication, fate: BrokerAnswer, told: &mut Published) -> bool {
    match (publication.kind, fate) {
        (PublicationKind::Event | PublicationKind::Reply, BrokerAnswer::Confirmed) => {
            told.events(
                EventType::of_routing_key(&publication.routing_key),
                EventFate::Confirmed,
                event::count_of(publication),
            );
            true
        }
        // Nobody subscribed: counted, and done.
        (PublicationKind::Event | PublicationKind::Reply, BrokerAnswer::Returned) => {
            told.events(
                EventType::of_routing_key(&publication.routing_key),
                EventFate::Unrouted,
                event::count_of(publication),
            );
            true
        }
        (PublicationKind::DeadLetter, BrokerAnswer::Confirmed) => {
            told.dead_letter();
            true
        }
        (PublicationKind::DeadLetter, BrokerAnswer::Returned) => {
            let message_id = publication.properties.message_id.as_deref();
            Signal::DeadLetterReturned {
                batch: id,
                routing_key: &publication.routing_key,
                message_id,
            }
            .emit();
            false
        }
        (PublicationKind::Event | PublicationKind::DeadLetter | PublicationKind::Reply, BrokerAnswer::Nacked) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::Properties;

    #[test]
    fn slices_are_runs_within_the_bound() {
        let publications: Vec<Publication> = [3, 3, 3, 9, 1, 1]
            .into_iter()
            .map(|size| Publication {
                kind: PublicationKind::Event,
                exchange: String::new(),
                routing_key: String::new(),
                properties: Properties::default(),
                body: vec![0; size],
            })
            .collect();
        let all: BTreeSet<usize> = (0..6).collect();
        assert_eq!(slices(&publications, &all, 100), vec![0..6]);
        assert_eq!(slices(&publications, &all, 6), vec![0..2, 2..3, 3..4, 4..6]);
        assert_eq!(slices(&publications, &all, 0).len(), 6);
        let some = BTreeSet::from([0, 1, 3, 5]);
        assert_eq!(slices(&publications, &some, 100), vec![0..2, 3..4, 5..6]);
        assert!(slices(&publications, &BTreeSet::new(), 100).is_empty());
    }

    #[test]
    fn suspects_wait_behind_the_others() {
        let all: BTreeSet<usize> = (0..4).collect();
        let mut suspects = Suspects::default();
        assert_eq!(suspects.in_order(&all), [0, 1, 2, 3]);
        suspects.strike(0);
        suspects.strike(0);
        suspects.strike(2);
        assert_eq!(suspects.in_order(&all), [1, 3, 2, 0]);
        assert_eq!((suspects.strikes(0), suspects.strikes(1)), (2, 0));
        suspects.clear();
        assert_eq!(suspects.in_order(&all), [0, 1, 2, 3]);
    }
}

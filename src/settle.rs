//! The walk of one batch: facts, load, decide, write. Worker, parked messages and tests settle by [`process_batch`];
//! `explain` runs the same steps without the write.

pub mod plan;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use uuid::Uuid;

use crate::{
    domain::{
        allocation::{Allocation, Status},
        decide::{self, Changeset, Judged, Judgement, Reason, ReceiptKey, Rules, Snapshot, Verdict, VerdictKind},
        delivery::{BatchId, Delivery, Publication, PublicationKind, Source},
        event::{self, Format},
        message::{self, Facts, Refusal},
        told::{Firsts, Tellings},
    },
    fail::{self, Point},
    fairness::{self, Fairness},
    store::{
        Fate, Store, StoreError,
        batch::{OpenBatch, Outcome},
        locked::Locks,
    },
};

/// Messages that are read where they are, which holds up an I/O thread for a tenth of a millisecond: to have another thread
/// wake up and answer takes as long.
const READ_AT_ONCE: usize = 3;

/// Messages with what each tells by itself.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub deliveries: Arc<Vec<Delivery>>,
    pub facts: Vec<Facts>,
}

impl Batch {
    /// Decodes, checks agreement and recovers signers: a few messages where they are, more off the I/O threads and on as many
    /// cores as there are.
    pub async fn read(deliveries: Vec<Delivery>) -> Self {
        Self::read_by(deliveries, message::facts).await.shortened()
    }

    /// The same without the signers, for what is only kept.
    pub async fn read_unsigned(deliveries: Vec<Delivery>) -> Self {
        Self::read_by(deliveries, message::unsigned_facts).await
    }

    /// The same with the signers of some: whoever is asked whether its effect is there must be known.
    pub async fn read_signed_where(deliveries: Vec<Delivery>, is_signed: impl Fn(usize) -> bool) -> Self {
        let mut batch = Self::read_unsigned(deliveries).await;
        let asked: Vec<usize> = (0..batch.deliveries.len()).filter(|index| is_signed(*index)).collect();
        let deliveries = asked.iter().filter_map(|index| batch.deliveries.get(*index).cloned());
        let signed = Self::read(deliveries.collect()).await;
        for (index, facts) in asked.into_iter().zip(signed.facts) {
            if let Some(place) = batch.facts.get_mut(index) {
                *place = facts;
            }
        }
        batch
    }

    async fn read_by(deliveries: Vec<Delivery>, read: Reader) -> Self {
        let deliveries = Arc::new(deliveries);
        let bytes = deliveries.iter().map(|delivery| delivery.body.len()).sum::<usize>();
        let facts = if deliveries.len() <= READ_AT_ONCE && bytes <= READ_AT_ONCE * message::BODY_MAX {
            deliveries.iter().map(|delivery| read_one(delivery, read)).collect()
        } else {
            read_apart(&deliveries, read).await
        };
        fail::point(Point::AfterFacts).await;
        Self { deliveries, facts }
    }

    /// Of a message that is too large the head only: all that becomes of it is a dead letter with that.
    fn shortened(mut self) -> Self {
        if self.facts.iter().any(is_too_large) {
            for (delivery, facts) in Arc::make_mut(&mut self.deliveries).iter_mut().zip(&self.facts) {
                message::shorten(delivery, facts);
            }
        }
        self
    }

    fn judged(&self) -> Vec<Judged<'_>> {
        self.deliveries
            .iter()
            .zip(&self.facts)
            .map(|(delivery, facts)| Judged { delivery, facts })
            .collect()
    }

    /// Those at the places that are picked.
    pub fn part(&self, picks: impl Fn(usize) -> bool) -> Self {
        let picked = |index: &usize| picks(*index);
        let indexes: Vec<usize> = (0..self.deliveries.len()).filter(picked).collect();
        if indexes.len() == self.deliveries.len() {
            return self.clone();
        }
        let deliveries = indexes.iter().filter_map(|index| self.deliveries.get(*index).cloned());
        Self {
            deliveries: Arc::new(deliveries.collect()),
            facts: indexes
                .iter()
                .filter_map(|index| self.facts.get(*index).cloned())
                .collect(),
        }
    }

    /// The two halves, where there is more than one message: for a search for the one that the database refuses.
    pub fn halves(&self) -> Option<(Self, Self)> {
        let middle = self.deliveries.len() / 2;
        let (left, right) = self
            .deliveries
            .split_at_checked(middle)
            .filter(|(left, _)| !left.is_empty())?;
        let (left_facts, right_facts) = self.facts.split_at_checked(middle)?;
        let half = |deliveries: &[Delivery], facts: &[Facts]| Self {
            deliveries: Arc::new(deliveries.to_vec()),
            facts: facts.to_vec(),
        };
        Some((half(left, left_facts), half(right, right_facts)))
    }
}

fn is_too_large(facts: &Facts) -> bool {
    let refusal = facts.content.as_ref().err();
    refusal.is_some_and(|refusal| refusal.reason == Reason::MessageTooLarge)
}

type Reader = fn(&Delivery) -> Facts;

/// Reads messages on other threads, each a share of them.
async fn read_apart(deliveries: &Arc<Vec<Delivery>>, read: Reader) -> Vec<Facts> {
    // As many as the runtime has threads, which is as many as there are cores: to ask the system again reads its files.
    let cores = tokio::runtime::Handle::current().metrics().num_workers();
    // A signature takes 30 us: below a handful a second thread costs more than it brings.
    let share = deliveries.len().div_ceil(cores).max(8);
    let tasks: Vec<_> = (0..deliveries.len())
        .step_by(share)
        .map(|start| {
            let deliveries = Arc::clone(deliveries);
            tokio::task::spawn_blocking(move || {
                deliveries
                    .iter()
                    .skip(start)
                    .take(share)
                    .map(|delivery| read_one(delivery, read))
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    let mut facts = Vec::with_capacity(deliveries.len());
    for (index, task) in tasks.into_iter().enumerate() {
        match task.await {
            Ok(some) => facts.extend(some),
            // Only a runtime that shuts down ends here (a panic is caught message by message): read them here then.
            Err(_) => {
                let rest = deliveries.iter().skip(index * share).take(share);
                facts.extend(rest.map(|delivery| read_one(delivery, read)));
            }
        }
    }
    facts
}

/// A panic of ours in reading a message is that message's own fate, not the batch's.
fn read_one(delivery: &Delivery, read: Reader) -> Facts {
    catch_unwind(AssertUnwindSafe(|| read(delivery))).unwrap_or_else(|_| unreadable(delivery))
}

fn unreadable(delivery: &Delivery) -> Facts {
    Facts {
        message_digest: delivery
            .cut
            .as_ref()
            .map_or_else(|| message::sha256(&delivery.body), |cut| cut.digest),
        enterprise_id: message::parse_routing_key(&delivery.routing_key).map(|(enterprise, _)| enterprise.to_owned()),
        content: Err(Refusal {
            reason: Reason::Internal,
            detail: "this version failed to read the message".into(),
        }),
    }
}

/// A batch that is committed: what became of each message and what has to be published for it.
#[derive(Debug)]
pub struct Settled {
    pub id: BatchId,
    pub judgements: Vec<Judgement>,
    /// What the outbox row of the same id holds.
    pub publications: Vec<Publication>,
    /// Best effort, not in the outbox.
    pub replies: Vec<Publication>,
    /// Outbox rows that the same commit deleted.
    pub deleted: Vec<BatchId>,
    /// Proven messages whose `reply_to` is a name that is not answered to.
    pub replies_ignored: usize,
}

/// Who settles, and by what rules.
#[derive(Clone, Debug)]
pub struct Clerk {
    pub store: Store,
    pub rules: Rules,
    /// The name in `batches`.
    pub worker: String,
    /// How long the writer owns an outbox row.
    pub outbox_lease: Duration,
    pub event_format: Format,
}

/// One attempt: load, decide, write, commit. `earlier` holds what an attempt whose commit is unknown came to: if the
/// batch's id turns out to be there, that is what was committed.
///
/// # Errors
/// An error of ours; never a verdict.
pub async fn process_batch(
    clerk: &Clerk,
    id: BatchId,
    batch: &Batch,
    published: &[BatchId],
    earlier: &mut Option<Settled>,
) -> Result<Settled, StoreError> {
    let messages = batch.judged();
    let (open, snapshot) = clerk.store.open_batch(&messages).await?;
    let (settled, changes, now) = judge(clerk, id, &messages, snapshot, &open).await?;
    commit(clerk, open, &messages, settled, &changes, now, published, earlier).await
}

/// What an attempt came to.
#[derive(Debug)]
pub enum Attempt {
    Settled(Settled),
    /// Nothing was done: the messages at these places need what is known to be locked.
    Blocked(Vec<usize>),
}

/// The same as [`process_batch`], but it does not wait for what is known to be locked.
///
/// # Errors
/// An error of ours; never a verdict.
pub async fn attempt(
    clerk: &Clerk,
    fairness: &Fairness,
    id: BatchId,
    batch: &Batch,
    published: &[BatchId],
    earlier: &mut Option<Settled>,
) -> Result<Attempt, StoreError> {
    let messages = batch.judged();
    let blocked = fairness.blocked(&messages);
    if !blocked.is_empty() {
        return Ok(Attempt::Blocked(blocked));
    }
    let (open, snapshot) = clerk.store.open_batch(&messages).await?;
    let (settled, changes, now) = judge(clerk, id, &messages, snapshot, &open).await?;
    let blocked = fairness.blocked_by_accounts(&messages, &changes);
    if !blocked.is_empty() {
        open.leave().await;
        return Ok(Attempt::Blocked(blocked));
    }
    commit(clerk, open, &messages, settled, &changes, now, published, earlier)
        .await
        .map(Attempt::Settled)
}

/// What of a batch is locked by a transaction that does not let go of it soon.
///
/// # Errors
/// The database is away, or a whole table is locked.
pub async fn find_locked(clerk: &Clerk, batch: &Batch) -> Result<Locks, StoreError> {
    clerk.store.find_locked(&fairness::wanted(&batch.judged())).await
}

/// The same, and everything is taken back: whether a batch would go through now. Of an empty one, every statement runs.
///
/// # Errors
/// What the batch would meet.
pub async fn rehearse(clerk: &Clerk, batch: &Batch) -> Result<(), StoreError> {
    let messages = batch.judged();
    let (open, snapshot) = clerk.store.open_rehearsal(&messages).await?;
    let (settled, changes, now) = judge(clerk, Uuid::now_v7(), &messages, snapshot, &open).await?;
    open.rehearse(&outcome(clerk, &messages, &settled, &changes, now, &[]))
        .await
}

async fn judge(
    clerk: &Clerk,
    id: BatchId,
    messages: &[Judged<'_>],
    snapshot: Snapshot,
    open: &OpenBatch,
) -> Result<(Settled, Changeset, Timestamp), StoreError> {
    let now = snapshot.now;
    let (judgements, changes) = catch_unwind(AssertUnwindSafe(|| decide::decide(snapshot, messages, &clerk.rules)))
        .map_err(|_| StoreError::blame_the_batch("deciding the batch panicked"))?;
    let tellings = Tellings::of(messages, &judgements, now);
    let firsts = open.remember(id, &tellings).await?;
    let settled = say(clerk, id, messages, judgements, &firsts, &changes, now);
    Ok((settled, changes, now))
}

/// Gives one message the verdict `internal`: the database refused it alone. Only the batch's own row and what is
/// published are written, since anything else may be what was refused.
///
/// # Errors
/// An error of ours.
pub async fn reject_culprit(
    clerk: &Clerk,
    id: BatchId,
    batch: &Batch,
    earlier: &mut Option<Settled>,
) -> Result<Settled, StoreError> {
    let messages = batch.judged();
    let (open, snapshot) = clerk.store.open_batch(&[]).await?;
    let now = snapshot.now;
    let detail = "the message could not be processed; it is kept for the operator";
    let judgements: Vec<Judgement> = messages
        .iter()
        .map(|_| Judgement {
            verdict: Verdict::Rejected {
                reason: Reason::Internal,
                detail: detail.into(),
            },
            proven: false,
        })
        .collect();
    let mut changes = Changeset::default();
    for message in &messages {
        if let Source::Parked { key, seq, .. } = message.delivery.source {
            changes.unparked.insert(ReceiptKey(key), seq);
        }
    }
    let firsts = open.remember(id, &Tellings::of(&messages, &judgements, now)).await?;
    let settled = say(clerk, id, &messages, judgements, &firsts, &changes, now);
    commit(clerk, open, &messages, settled, &changes, now, &[], earlier).await
}

/// Everything there is to say about a judged batch.
fn say(
    clerk: &Clerk,
    id: BatchId,
    messages: &[Judged<'_>],
    judgements: Vec<Judgement>,
    firsts: &Firsts,
    changes: &Changeset,
    now: Timestamp,
) -> Settled {
    let mut settled = Settled {
        id,
        judgements,
        publications: Vec::new(),
        replies: Vec::new(),
        deleted: Vec::new(),
        replies_ignored: 0,
    };
    for (index, (message, judgement)) in messages.iter().zip(&settled.judgements).enumerate() {
        let also = changes.also_answered.get(&index);
        for publication in event::publications_after(*message, judgement, now, firsts, also, &clerk.rules) {
            match publication.kind {
                PublicationKind::Event | PublicationKind::DeadLetter => settled.publications.push(publication),
                PublicationKind::Reply => settled.replies.push(publication),
            }
        }
        let properties = &message.delivery.properties;
        if let (true, Some(name), Some(enterprise_id)) =
            (judgement.proven, &properties.reply_to, &message.facts.enterprise_id)
            && !event::is_reply_queue(name, enterprise_id)
        {
            settled.replies_ignored += 1;
        }
    }
    settled.publications = event::in_format(settled.publications, clerk.event_format);
    settled
}

#[expect(
    clippy::too_many_arguments,
    reason = "one row each of what a commit needs; a struct would only rename them"
)]
async fn commit(
    clerk: &Clerk,
    open: OpenBatch,
    messages: &[Judged<'_>],
    mut settled: Settled,
    changes: &Changeset,
    now: Timestamp,
    published: &[BatchId],
    earlier: &mut Option<Settled>,
) -> Result<Settled, StoreError> {
    let written = open
        .write(&outcome(clerk, messages, &settled, changes, now, published))
        .await;
    settled.deleted = published.to_vec();
    match written {
        Ok(()) => Ok(settled),
        Err(error) if error.fate == Fate::CommittedBefore && earlier.is_some() => earlier.take().ok_or(error),
        Err(error) => {
            if error.at_commit {
                *earlier = Some(settled);
            }
            Err(error)
        }
    }
}

fn outcome<'a>(
    clerk: &'a Clerk,
    messages: &'a [Judged<'a>],
    settled: &'a Settled,
    changes: &'a Changeset,
    now: Timestamp,
    published: &'a [BatchId],
) -> Outcome<'a> {
    let source = messages.first().map(|message| message.delivery.source);
    Outcome {
        id: settled.id,
        worker: &clerk.worker,
        source: match source {
            Some(Source::Parked { .. }) => "parked",
            Some(Source::Replayed { .. }) => "replayed",
            // What was held came from a queue, and is counted once, when it is judged.
            Some(Source::Queue { .. } | Source::Held { .. } | Source::Plain) | None => "queue",
        },
        now,
        batch: messages,
        judgements: &settled.judgements,
        changes,
        publications: &settled.publications,
        lease: clerk.outbox_lease,
        published,
    }
}

/// What a single message would come to now, with the movement it would make. Nothing is written.
///
/// # Errors
/// The database is away.
pub async fn explain(
    store: &Store,
    rules: &Rules,
    delivery: Delivery,
) -> Result<(Judgement, Changeset, Facts), StoreError> {
    let batch = Batch::read(vec![delivery]).await;
    let messages = batch.judged();
    let snapshot = match batch.facts.first().map(|facts| &facts.content) {
        Some(Ok(_)) => store.snapshot(&messages).await?,
        // Steps 1 to 3 ask nothing of the registry, so they can be explained without a database.
        Some(Err(_)) | None => Snapshot::default(),
    };
    let (judgements, changes) = decide::decide(snapshot, &messages, rules);
    let judgement = judgements.into_iter().next();
    let facts = batch.facts.into_iter().next();
    judgement
        .zip(facts)
        .map(|(judgement, facts)| (judgement, changes, facts))
        .ok_or_else(|| StoreError::blame_the_batch("a batch of one came to no verdict"))
}

/// Of each message, read with its signer, the allocation that has what the message asks for: what would be a duplicate if it
/// were judged now. Each is judged alone, and nothing is written.
///
/// # Errors
/// The database is away.
pub async fn effects(clerk: &Clerk, messages: &[Judged<'_>]) -> Result<Vec<Option<Arc<Allocation>>>, StoreError> {
    if messages.is_empty() {
        return Ok(Vec::new());
    }
    let snapshot = clerk.store.snapshot(messages).await?;
    let effect = |message: &Judged<'_>| {
        let content = message.facts.content.as_ref().ok()?;
        // Where nothing has settled nothing needs to be judged.
        let is_settled = |allocation: &Arc<Allocation>| allocation.status != Status::Reserved;
        let is_asked_for = snapshot.allocations.get(&content.update.id).is_some_and(is_settled);
        let has_receipt = ReceiptKey::of(content).any(|key| {
            let receipt = snapshot.receipts.get(&key);
            receipt.is_some_and(|receipt| receipt.verdict == VerdictKind::Settled)
        });
        if !is_asked_for && !has_receipt {
            return None;
        }
        let (judgements, _) = decide::decide(snapshot.clone(), &[*message], &clerk.rules);
        match judgements.into_iter().next()?.verdict {
            Verdict::Duplicate { allocation } => Some(allocation),
            Verdict::Settled { .. } | Verdict::Parked { .. } | Verdict::Rejected { .. } => None,
        }
    };
    catch_unwind(AssertUnwindSafe(|| messages.iter().map(effect).collect()))
        .map_err(|_| StoreError::blame_the_batch("looking for an effect panicked"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::Properties;

    fn numbered(count: u8) -> Batch {
        let deliveries: Vec<Delivery> = (0..count)
            .map(|number| Delivery {
                exchange: String::new(),
                routing_key: String::new(),
                body: vec![number],
                properties: Properties::default(),
                cut: None,
                redelivered: false,
                source: Source::Plain,
            })
            .collect();
        let facts = deliveries.iter().map(message::facts).collect();
        Batch {
            deliveries: Arc::new(deliveries),
            facts,
        }
    }

    /// A batch cut in two until every message stands alone, by their numbers in the order they are found.
    fn cut(batch: &Batch, most: u32) -> Vec<u8> {
        assert_eq!(batch.deliveries.len(), batch.facts.len());
        match batch.halves() {
            Some((left, right)) => {
                assert!(most > 0, "a search that does not end");
                [cut(&left, most - 1), cut(&right, most - 1)].concat()
            }
            None => {
                let [delivery] = batch.deliveries.as_slice() else {
                    panic!("{} messages in one piece", batch.deliveries.len());
                };
                assert_eq!(batch.facts[0].message_digest, message::sha256(&delivery.body));
                delivery.body.clone()
            }
        }
    }

    #[test]
    fn halves_are_never_empty_and_together_the_whole() {
        for count in 1..=65 {
            assert_eq!(
                cut(&numbered(count), 7),
                (0..count).collect::<Vec<_>>(),
                "{count} messages"
            );
        }
        assert!(numbered(0).halves().is_none());
    }
}

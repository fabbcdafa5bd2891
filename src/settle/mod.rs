//! The walk of one batch: facts, load, decide, write. Worker, parked messages and tests settle by [`process_batch`];
//! `explain` runs the same steps without the write.

mod ask;
mod batch;
pub mod blocked;
pub mod plan;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use self::blocked::KnownLocks;
pub use self::{
    ask::{effects, explain},
    batch::Batch,
};
use crate::{
    config::{EventFormat, Settings},
    domain::{
        decide::{self, Changeset, Judged, Judgement, Reason, ReceiptKey, Rules, Snapshot, Verdict},
        delivery::{BatchId, Publication, PublicationKind, Source},
        event::{self, Format},
        told::{Firsts, Tellings},
    },
    store::{
        Fate, Store, StoreError,
        batch::{OpenBatch, Outcome},
        locked::Locks,
    },
};

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

impl Clerk {
    /// Who settles by these settings.
    pub fn new(settings: &Settings, store: Store) -> Self {
        Self {
            store,
            rules: rules(settings),
            worker: settings.worker.name.clone(),
            outbox_lease: settings.outbox.lease,
            event_format: match settings.events.format {
                EventFormat::Single => Format::Single,
                EventFormat::Batched => Format::Batched {
                    max_bytes: settings.events.batch_max_bytes,
                },
            },
        }
    }
}

/// The judging rules that the settings give.
pub fn rules(settings: &Settings) -> Rules {
    let signed = |duration: Duration| SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    Rules {
        park_deadline: signed(settings.park.deadline),
        park_first_retry: signed(settings.park.first_retry),
        park_max_interval: signed(settings.park.max_interval),
        park_max_per_partner: u64::from(settings.park.max_per_partner),
        park_max_bytes: settings.park.max_bytes,
        park_max_bytes_per_partner: settings.park.max_bytes_per_partner,
        event_source: settings.events.source.clone(),
    }
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
    locks: &KnownLocks,
    id: BatchId,
    batch: &Batch,
    published: &[BatchId],
    earlier: &mut Option<Settled>,
) -> Result<Attempt, StoreError> {
    let messages = batch.judged();
    let blocked = locks.blocked(&messages);
    if !blocked.is_empty() {
        return Ok(Attempt::Blocked(blocked));
    }
    let (open, snapshot) = clerk.store.open_batch(&messages).await?;
    let (settled, changes, now) = judge(clerk, id, &messages, snapshot, &open).await?;
    let blocked = locks.blocked_by_accounts(&messages, &changes);
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
    clerk.store.find_locked(&blocked::wanted(&batch.judged())).await
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

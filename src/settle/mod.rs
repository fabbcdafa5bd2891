//! The walk of one batch: facts, load, decide, write ([`attempt`]). `explain` and `plan` run the same steps without the write;
//! what comes after an attempt that failed is said by [`next_step::next_step`].

mod ask;
mod batch;
pub mod blocked;
pub mod next_step;
pub mod plan;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use self::blocked::{KnownLocks, SideRoom};
pub use self::{
    ask::{effects, explain},
    batch::{Batch, read_signed_where},
};
use crate::{
    config::{EventFormat, Settings},
    domain::{
        allocation::Allocation,
        changeset::Changeset,
        decide,
        delivery::{BatchId, Publication, PublicationKind, Source},
        event::Format,
        kept::{self, Kept, Named},
        message::MessageRef,
        publications,
        reason::Reason,
        receipt::ReceiptKey,
        reply,
        snapshot::{Rules, Snapshot},
        told::Tellings,
        verdict::{Judgement, Verdict},
    },
    store::{Fate, Store, StoreError, batch::OpenBatch, judged::JudgedBatch, locked::Locks},
    telemetry::{Signal, Stage},
};

/// What one message came to, with where it came from: whoever acknowledges it needs no second list to look that up in.
#[derive(Clone, Debug)]
pub struct Answer {
    pub source: Source,
    pub judgement: Judgement,
}

/// A batch that is committed: what became of each message and what has to be published for it.
#[derive(Debug)]
pub struct Answered {
    pub id: BatchId,
    /// One for each message, in their order.
    pub answers: Vec<Answer>,
    /// What the outbox row of the same id holds.
    pub publications: Vec<Publication>,
    /// What it keeps of each of them.
    pub kept: Vec<Kept>,
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
        api_users: settings.broker.api_users.clone(),
    }
}

/// What an attempt came to.
#[derive(Debug)]
pub enum Attempt {
    Answered(Answered),
    /// Nothing was done: the messages at these places need what is known to be locked, or are of a partner in quarantine.
    Blocked(Vec<usize>),
}

/// One attempt: load, decide, write, commit. It does not wait for what is known to be locked, and judges nothing that a
/// partner in quarantine sent, unless there is no room to hold it. `earlier` holds what an attempt
/// whose commit is unknown came to: if the batch's id turns out to be there, that is what was committed.
///
/// # Errors
/// An error of ours; never a verdict.
pub async fn attempt(
    clerk: &Clerk,
    locks: &KnownLocks,
    room: SideRoom,
    id: BatchId,
    batch: &Batch,
    published: &[BatchId],
    earlier: &mut Option<Answered>,
) -> Result<Attempt, StoreError> {
    let messages = batch.refs();
    let blocked = locks.blocked(&messages);
    if !blocked.is_empty() {
        return Ok(Attempt::Blocked(blocked));
    }
    let loading = Instant::now();
    let (open, snapshot) = clerk.store.open_batch(&messages).await?;
    Signal::stage(Stage::Load, loading).emit();
    let blocked = locks.blocked_by_quarantine(&messages, &snapshot, room);
    if !blocked.is_empty() {
        open.leave().await;
        return Ok(Attempt::Blocked(blocked));
    }
    let deciding = Instant::now();
    let decided = Decided::of(clerk, messages, snapshot)?;
    Signal::stage(Stage::Decide, deciding).emit();
    let blocked = locks.blocked_by_accounts(&decided.messages, &decided.changes);
    if !blocked.is_empty() {
        open.leave().await;
        return Ok(Attempt::Blocked(blocked));
    }
    let said = decided.say(clerk, id, &open).await?;
    let answered = said.commit(clerk, open, published, earlier).await?;
    Ok(Attempt::Answered(answered))
}

/// What of a batch is locked by a transaction that does not let go of it soon.
///
/// # Errors
/// The database is away, or a whole table is locked.
pub async fn find_locked(clerk: &Clerk, batch: &Batch) -> Result<Locks, StoreError> {
    clerk.store.find_locked(&blocked::wanted(&batch.refs())).await
}

/// One attempt, and everything is taken back: whether a batch would go through now. Of an empty one, every statement runs. What
/// is another cell's goes through if the side room takes it.
///
/// # Errors
/// What the batch would meet.
pub async fn rehearse(clerk: &Clerk, batch: &Batch, room: SideRoom) -> Result<(), StoreError> {
    let (open, snapshot) = clerk.store.open_rehearsal(&batch.refs()).await?;
    if room == SideRoom::Full && blocked::waits_for_a_move(&batch.refs(), &snapshot) {
        open.leave().await;
        return Err(StoreError::no_room_for_another_cell());
    }
    let decided = Decided::of(clerk, batch.refs(), snapshot)?;
    let said = decided.say(clerk, Uuid::now_v7(), &open).await?;
    open.rehearse(&said.outcome(clerk, &said.judged()?, &[])).await
}

/// Gives one message the verdict `internal`: the database refused it alone. What has its effect already is never told to be
/// refused: it is a duplicate, and its event goes out again. Only the batch's own row and what is published are written, since
/// anything else may be what was refused.
///
/// # Errors
/// An error of ours.
pub async fn reject_culprit(
    clerk: &Clerk,
    id: BatchId,
    batch: &Batch,
    earlier: &mut Option<Answered>,
) -> Result<Answered, StoreError> {
    let messages = batch.refs();
    let effects = match ask::effects(clerk, &messages).await {
        Ok(effects) => effects,
        // It can not even be asked for: what the database refuses may be to read its receipt.
        Err(error) if error.fate == Fate::Bisect => vec![None; messages.len()],
        Err(error) => return Err(error),
    };
    let (open, snapshot) = clerk.store.open_batch(&[]).await?;
    let detail = "the message could not be processed; it is kept for the operator";
    let judgement = |effect: Option<Arc<Allocation>>| Judgement {
        proven: effect.is_some(),
        verdict: match effect {
            Some(allocation) => Verdict::Duplicate { allocation },
            None => Verdict::Rejected {
                reason: Reason::Internal,
                detail: detail.into(),
            },
        },
    };
    let mut changes = Changeset::default();
    for message in &messages {
        if let Source::Parked { key, seq, .. } = message.delivery.source {
            changes.unparked.insert(ReceiptKey(key), seq);
        }
    }
    let decided = Decided {
        judgements: effects.into_iter().map(judgement).collect(),
        messages,
        changes,
        now: snapshot.now,
    };
    let said = decided.say(clerk, id, &open).await?;
    said.commit(clerk, open, &[], earlier).await
}

/// A batch that is judged.
struct Decided<'a> {
    messages: Vec<MessageRef<'a>>,
    /// One for each message, in their order.
    judgements: Vec<Judgement>,
    changes: Changeset,
    now: Timestamp,
}

impl<'a> Decided<'a> {
    /// One verdict each.
    fn of(clerk: &Clerk, messages: Vec<MessageRef<'a>>, snapshot: Snapshot) -> Result<Self, StoreError> {
        let now = snapshot.now;
        let decided = catch_unwind(AssertUnwindSafe(|| decide::decide(snapshot, &messages, &clerk.rules)));
        let (judgements, changes) = decided.map_err(|_| StoreError::blame_the_batch("deciding the batch panicked"))?;
        one_each(messages.len(), judgements.len())?;
        Ok(Self {
            messages,
            judgements,
            changes,
            now,
        })
    }

    /// Everything there is to say about it, in the words in which it was said first.
    async fn say(self, clerk: &Clerk, id: BatchId, open: &OpenBatch) -> Result<Said<'a>, StoreError> {
        let Self {
            messages,
            judgements,
            changes,
            now,
        } = self;
        let firsts = open.remember(id, &Tellings::of(&messages, &judgements, now)).await?;
        let mut answered = Answered {
            id,
            answers: Vec::with_capacity(messages.len()),
            publications: Vec::new(),
            kept: Vec::new(),
            replies: Vec::new(),
            deleted: Vec::new(),
            replies_ignored: 0,
        };
        let mut names = Vec::with_capacity(messages.len());
        for (index, (message, judgement)) in messages.iter().zip(judgements).enumerate() {
            let also = changes.also_answered.get(&index);
            let record = match &judgement.verdict {
                Verdict::Settled { allocation } | Verdict::Duplicate { allocation } => Some(allocation),
                Verdict::Parked { .. } | Verdict::Rejected { .. } => None,
            };
            for publication in publications::publications_after(*message, &judgement, now, &firsts, also, &clerk.rules)
            {
                in_words(&publication)?;
                match publication.kind {
                    PublicationKind::Event | PublicationKind::DeadLetter => {
                        names.push(record.and_then(|record| Named::of(&publication, record)));
                        answered.publications.push(publication);
                    }
                    PublicationKind::Reply => answered.replies.push(publication),
                }
            }
            let properties = &message.delivery.properties;
            if let (true, Some(name), Some(enterprise_id)) =
                (judgement.proven, &properties.reply_to, &message.facts.enterprise_id)
                && !reply::is_reply_queue(name, enterprise_id)
            {
                answered.replies_ignored += 1;
            }
            let source = message.delivery.source;
            answered.answers.push(Answer { source, judgement });
        }
        (answered.publications, answered.kept) =
            kept::in_format_and_kept(answered.publications, names, clerk.event_format);
        Ok(Said {
            messages,
            changes,
            now,
            answered,
        })
    }
}

/// What can not be put into words is a fault of ours, and never an event with an empty body.
///
/// # Errors
/// [`Fate::Ours`].
pub fn in_words(publication: &Publication) -> Result<(), StoreError> {
    match publication.kind {
        PublicationKind::Event if publication.body.is_empty() => Err(StoreError::ours(
            "settle_batch",
            "an event could not be written as JSON",
        )),
        PublicationKind::Event | PublicationKind::Reply | PublicationKind::DeadLetter => Ok(()),
    }
}

/// A batch that is judged and told, and not written yet.
struct Said<'a> {
    messages: Vec<MessageRef<'a>>,
    changes: Changeset,
    now: Timestamp,
    answered: Answered,
}

impl Said<'_> {
    async fn commit(
        mut self,
        clerk: &Clerk,
        open: OpenBatch,
        published: &[BatchId],
        earlier: &mut Option<Answered>,
    ) -> Result<Answered, StoreError> {
        let written = open.write(&self.outcome(clerk, &self.judged()?, published)).await;
        self.answered.deleted = published.to_vec();
        match written {
            Ok(()) => Ok(self.answered),
            Err(error) if error.fate == Fate::CommittedBefore && earlier.is_some() => {
                // It is there, on this server. Whoever cut us off may have cut off its wait for a standby too.
                clerk.store.catch_up(self.answered.id).await?;
                earlier.take().ok_or(error)
            }
            Err(error) => {
                if error.at_commit {
                    *earlier = Some(self.answered);
                }
                Err(error)
            }
        }
    }

    /// Each message with what it came to.
    fn judged(&self) -> Result<Vec<(MessageRef<'_>, &Judgement)>, StoreError> {
        one_each(self.messages.len(), self.answered.answers.len())?;
        let judgements = self.answered.answers.iter().map(|answer| &answer.judgement);
        Ok(self.messages.iter().copied().zip(judgements).collect())
    }

    fn outcome<'b>(
        &'b self,
        clerk: &'b Clerk,
        judged: &'b [(MessageRef<'b>, &'b Judgement)],
        published: &'b [BatchId],
    ) -> JudgedBatch<'b> {
        JudgedBatch {
            id: self.answered.id,
            worker: &clerk.worker,
            source: match self.messages.first().map(|message| message.delivery.source) {
                Some(Source::Parked { .. }) => "parked",
                Some(Source::Replayed { .. }) => "replayed",
                // What was held came from a queue, and is counted once, when it is judged.
                Some(Source::Queue { .. } | Source::Held { .. } | Source::Plain) | None => "queue",
            },
            now: self.now,
            judged,
            changes: &self.changes,
            publications: &self.answered.publications,
            kept: &self.answered.kept,
            event_source: &clerk.rules.event_source,
            lease: clerk.outbox_lease,
            published,
        }
    }
}

/// One delivery in, one verdict out. Where that does not hold nothing is written, and nothing acknowledged.
fn one_each(messages: usize, verdicts: usize) -> Result<(), StoreError> {
    if messages == verdicts {
        return Ok(());
    }
    let sentence = format!("{messages} messages came to {verdicts} verdicts; that is a mistake in this program");
    Err(StoreError::ours("settle_batch", sentence))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::Properties;

    /// A dead letter has the body that its message has, none too.
    #[test]
    fn an_event_without_words_is_a_fault_of_ours() {
        let publication = |kind, body: &[u8]| Publication {
            kind,
            exchange: String::new(),
            routing_key: String::new(),
            properties: Properties::default(),
            body: body.to_vec(),
        };
        let refused = in_words(&publication(PublicationKind::Event, b"")).expect_err("refused");
        assert_eq!(refused.fate, Fate::Ours);
        assert!(in_words(&publication(PublicationKind::Event, b"{}")).is_ok());
        assert!(in_words(&publication(PublicationKind::DeadLetter, b"")).is_ok());
    }

    #[test]
    fn one_delivery_in_one_verdict_out_or_nothing_is_written() {
        assert!(one_each(0, 0).is_ok() && one_each(512, 512).is_ok());
        for (messages, verdicts) in [(1, 0), (0, 1), (512, 511)] {
            let error = one_each(messages, verdicts).expect_err("a fault of ours");
            assert!(error.fate == Fate::Ours && !error.at_commit, "{error}");
        }
    }
}

//! What a batch came to, as every part of the room writes its share of it.

use jiff::Timestamp;

use crate::domain::{
    changeset::Changeset,
    delivery::{BatchId, Publication},
    kept::Kept,
    message::MessageRef,
    verdict::Judgement,
};

/// A batch's outcome, ready to be written.
pub struct JudgedBatch<'a> {
    /// Made before the transaction; the first row written carries it.
    pub id: BatchId,
    pub worker: &'a str,
    /// The door it came through: `queue` (also of what was held since), `parked` or `replayed`.
    pub source: &'static str,
    pub now: Timestamp,
    /// Each message with what it came to.
    pub judged: &'a [(MessageRef<'a>, &'a Judgement)],
    pub changes: &'a Changeset,
    /// Events and dead letters to publish once this is committed.
    pub publications: &'a [Publication],
    /// What is kept of each of them, in their order; of those without a word, all.
    pub kept: &'a [Kept],
    /// The `source` of the events that are made again.
    pub event_source: &'a str,
    /// How long the writer owns the outbox row.
    pub lease: std::time::Duration,
    /// Outbox rows whose publications are all confirmed.
    pub published: &'a [BatchId],
}

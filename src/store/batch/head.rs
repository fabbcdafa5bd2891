//! A batch's own row and what it publishes: written before everything else.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;

use crate::{
    domain::{
        delivery::{BatchId, Publication},
        kept::Kept,
        reason::Reason,
        verdict::{Verdict, VerdictKind},
    },
    fail::Point,
    store::{
        StoreError, outbox,
        write::{Rows, Write, params},
    },
};

/// A batch of which nothing was judged has no row. What is deleted from the outbox is not counted: a relay may have been
/// quicker, or the commit that deleted it was not known to have succeeded.
const WRITE: &str = "\
    /* batch::head */
    WITH published AS (
        DELETE FROM settled.outbox WHERE batch_id = ANY ($12::uuid[])
    ), to_publish AS (
        INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
        SELECT $1, $13::smallint, $14::bytea, $15::integer, clock_timestamp(),
               clock_timestamp() + make_interval(secs => $16::float8)
        WHERE $17::boolean
    )
    INSERT INTO settled.batches (
        id, worker, source, at, received, settled, duplicate, parked, rejected, reasons, letters
    )
    SELECT $1::uuid, $2::text, $3::text, $4::timestamptz, $5::integer, $6::integer, $7::integer, $8::integer,
           $9::integer, $10::text::jsonb, $11::integer
    WHERE $5 > 0";

/// How many messages came and to what, and everything that is published once this is committed.
pub(in crate::store) struct BatchHead<'a, 'b> {
    pub(in crate::store) id: BatchId,
    pub(in crate::store) worker: &'a str,
    pub(in crate::store) source: &'static str,
    pub(in crate::store) now: Timestamp,
    pub(in crate::store) verdicts: &'b [&'b Verdict],
    /// Dead letters among the publications.
    pub(in crate::store) letters: usize,
    pub(in crate::store) publications: &'b [Publication],
    pub(in crate::store) kept: &'b [Kept],
    pub(in crate::store) event_source: &'b str,
    /// How long the writer owns the outbox row.
    pub(in crate::store) lease: Duration,
    /// Outbox rows whose publications are all confirmed.
    pub(in crate::store) published: &'b [BatchId],
}

impl<'a> BatchHead<'a, '_> {
    /// # Errors
    /// What is to be published can not be written: a fault of ours.
    pub(in crate::store) fn write(self) -> Result<Write<'a>, StoreError> {
        let mut kinds = BTreeMap::<VerdictKind, i32>::new();
        let mut reasons = BTreeMap::<Reason, u32>::new();
        for verdict in self.verdicts {
            *kinds.entry(verdict.kind()).or_default() += 1;
            if verdict.kind() == VerdictKind::Rejected
                && let Some(reason) = verdict.reason()
            {
                *reasons.entry(reason).or_default() += 1;
            }
        }
        let count = |kind| kinds.get(&kind).copied().unwrap_or_default();
        let reasons = serde_json::to_string(&reasons)
            .map_err(|error| StoreError::ours("settle_batch", format!("the reasons can not be written: {error}")))?;
        let mut published = self.published.to_vec();
        published.sort_unstable();
        let (format, content, told) = outbox::row(self.publications, self.kept, self.event_source)?;
        let (publishes, deletes, received) = (
            !self.publications.is_empty(),
            !published.is_empty(),
            self.verdicts.len(),
        );
        let write = Write::unless(
            received == 0 && !publishes && !deletes,
            WRITE,
            Rows::Certain(usize::from(received > 0)),
            params![
                self.id,
                self.worker,
                self.source,
                self.now,
                i32::try_from(received).unwrap_or(i32::MAX),
                count(VerdictKind::Settled),
                count(VerdictKind::Duplicate),
                count(VerdictKind::Parked),
                count(VerdictKind::Rejected),
                reasons,
                i32::try_from(self.letters).unwrap_or(i32::MAX),
                published,
                format,
                content,
                told,
                self.lease.as_secs_f64(),
                publishes,
            ],
        );
        Ok(write
            .then_if(publishes, Point::OutboxInserted)
            .then_if(deletes, Point::OutboxDeleted))
    }
}

//! Stored dead letters: claimed for their replay, ruled on by the batch that judges them, and closed where what they ask for
//! has settled since.

use std::{collections::BTreeMap, time::Duration};

use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Store, StoreError,
    due::Claimed,
    judged::JudgedBatch,
    write::{Rows, Write, params},
};
use crate::{
    domain::{
        dead_letter::{Ruling, ruling},
        delivery::{Cut, Source},
    },
    fail::Point,
};

/// What was left out of a row's message.
pub(super) fn cut(row: &Row) -> Option<Cut> {
    let body_len = row.get::<_, Option<i64>>("body_length")?;
    Some(Cut {
        body_len: u64::try_from(body_len).ok()?,
        digest: row.get::<_, &[u8]>("digest").try_into().ok()?,
        detail: row.get::<_, Option<String>>("too_large")?,
        without_headers: false,
    })
}

/// An UPDATE FROM takes its rows in any order: in order of id they are locked before.
const LOCK: &str = "\
    /* dead_letters::lock */
    SELECT FROM settled.dead_letters WHERE id = ANY ($1) ORDER BY id FOR UPDATE";

/// What settled stays settled, with the verdict and the batch that the money is found by: a slower worker finds a duplicate
/// at best, and that is not what became of it. Of what is discarded, or parked by a replay, a further
/// replay's refusal is noted, and it stays where it is.
const JUDGE: &str = "\
    /* dead_letters::judge */
    WITH judged AS (
        UPDATE settled.dead_letters AS d
        SET state = CASE WHEN n.state = 'open' AND (d.state = 'discarded' OR d.state = 'parked' AND n.is_replay)
                         THEN d.state ELSE n.state END,
            discarded_at = CASE WHEN n.state = 'open' THEN d.discarded_at END,
            leased_until = NULL,
            note = NULL,
            checked_at = NULL,
            reason = CASE WHEN n.verdict = 'rejected' THEN n.reason ELSE d.reason END,
            detail = coalesce(n.detail, d.detail),
            group_id = coalesce(n.group_id, d.group_id),
            last_failed_at = CASE WHEN n.verdict = 'rejected' THEN greatest(d.last_failed_at, $8)
                                  ELSE d.last_failed_at END,
            times_seen = d.times_seen + CASE WHEN n.verdict = 'rejected' THEN 1 ELSE 0 END,
            replays = d.replays + CASE WHEN n.is_replay THEN 1 ELSE 0 END,
            verdict = n.verdict,
            judged_at = $8,
            batch_id = $9
        FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::boolean[])
             AS n (id, state, verdict, reason, detail, group_id, is_replay)
        WHERE d.id = n.id
          AND d.state <> 'settled'
        RETURNING d.id, d.run_id, n.verdict, n.reason
    )
    UPDATE settled.run_items AS i
    SET state = 'judged',
        verdict = j.verdict,
        reason = j.reason,
        judged_at = $8
    FROM judged AS j
    WHERE i.run_id = j.run_id
      AND i.dead_letter_id = j.id
      AND i.state IN ('waiting', 'due')";

/// What a batch says of stored dead letters, one ruling a row, in order of id.
pub(super) fn rulings<'a>(outcome: &JudgedBatch<'a>) -> Vec<Ruling<'a>> {
    let rulings: BTreeMap<Uuid, Ruling<'_>> = outcome
        .judged
        .iter()
        .filter_map(|(message, judgement)| ruling(*message, judgement))
        .map(|ruling| (ruling.id, ruling))
        .collect();
    rulings.into_values().collect()
}

pub(super) fn lock<'a>(rulings: &[Ruling<'_>]) -> Write<'a> {
    let ids: Vec<Uuid> = rulings.iter().map(|ruling| ruling.id).collect();
    Write::unless(ids.is_empty(), LOCK, Rows::Any, params![ids])
}

/// Gives rows their verdict, and the items of their runs. Rows are not counted: one may have been purged.
pub(super) fn judge<'a>(outcome: &JudgedBatch<'_>, rulings: Vec<Ruling<'a>>) -> Write<'a> {
    let is_empty = rulings.is_empty();
    let ids: Vec<Uuid> = rulings.iter().map(|ruling| ruling.id).collect();
    let states: Vec<&str> = rulings.iter().map(|ruling| ruling.state.as_str()).collect();
    let verdicts: Vec<&str> = rulings.iter().map(|ruling| ruling.verdict.as_str()).collect();
    let reasons: Vec<Option<String>> = rulings
        .iter()
        .map(|ruling| ruling.reason.map(|reason| reason.to_string()))
        .collect();
    let details: Vec<Option<&str>> = rulings.iter().map(|ruling| ruling.detail).collect();
    let groups: Vec<Option<String>> = rulings.iter().map(|ruling| ruling.group.clone()).collect();
    let are_replays: Vec<bool> = rulings.iter().map(|ruling| ruling.is_replay).collect();
    Write::unless(
        is_empty,
        JUDGE,
        Rows::Any,
        params![
            ids,
            states,
            verdicts,
            reasons,
            details,
            groups,
            are_replays,
            outcome.now,
            outcome.id,
        ],
    )
    .then(Point::ReplayJudged)
}

impl Store {
    /// Claims dead letters that a running run asks to be replayed, in order of arrival: at most so many, and so many bytes,
    /// except that one always fits. Until the lease ends no other worker takes them.
    ///
    /// # Errors
    /// The database is away.
    pub async fn claim_replays(&self, max: usize, max_bytes: usize, lease: Duration) -> Result<Claimed, StoreError> {
        let session = self.session("claim_replays").await?;
        let limit = i64::try_from(max).unwrap_or(i64::MAX);
        let bytes = i64::try_from(max_bytes).unwrap_or(i64::MAX);
        let mut rows = session
            .query(
                "/* dead_letters::claim_replays */
                WITH due AS MATERIALIZED (
                    SELECT d.id, d.seq, octet_length(d.body) + octet_length(d.properties) AS size
                    FROM settled.dead_letters AS d
                    JOIN settled.runs AS r ON r.id = d.run_id AND r.state = 'running'
                    WHERE d.state = 'due'
                      AND (d.leased_until IS NULL OR d.leased_until <= statement_timestamp())
                      AND NOT EXISTS (
                          SELECT
                          FROM settled.partners AS p
                          WHERE p.enterprise_id = d.enterprise_id
                            AND p.moving IS NOT NULL
                      )
                    ORDER BY d.seq
                    LIMIT $1
                    FOR UPDATE OF d SKIP LOCKED
                ), total AS (
                    SELECT id, size, sum(size) OVER (ORDER BY seq) AS bytes
                    FROM due
                )
                UPDATE settled.dead_letters AS d
                SET leased_until = statement_timestamp() + make_interval(secs => $3)
                FROM total AS t
                WHERE d.id = t.id
                  AND (t.bytes <= $2 OR t.bytes = t.size)
                RETURNING d.seq, d.id, d.exchange, d.routing_key, d.format, d.properties, d.body, d.digest, d.body_length,
                          d.too_large",
                &[&limit, &bytes, &lease.as_secs_f64()],
            )
            .await?;
        if !rows.is_empty() {
            session.pass(Point::ReplayClaimed).await?;
        }
        rows.sort_by_key(|row| row.get::<_, i64>("seq"));
        let mut claimed = Claimed::default();
        for row in rows {
            let id: Uuid = row.get("id");
            claimed.take(&row, id, Source::Replayed { id }, cut(&row));
        }
        Ok(claimed)
    }
}

/// Open rows that may have settled since: what they name is settled, and nobody has looked since then.
#[derive(Clone, Debug, Default)]
pub struct MaybeSettled {
    pub ids: Vec<Uuid>,
    /// Where to go on; none: all have been looked through.
    pub next: Option<i64>,
}

impl Store {
    /// Looks through so many open rows after a place, for so many suspects at most.
    ///
    /// # Errors
    /// The database is away.
    pub async fn suspects(&self, after: i64, page: i64, most: i64) -> Result<MaybeSettled, StoreError> {
        let rows = self
            .session("settled_since")
            .await?
            .query(
                "/* dead_letters::suspects */
                WITH page AS MATERIALIZED (
                    SELECT d.id, d.seq, d.allocation_id, d.checked_at
                    FROM settled.dead_letters AS d
                    WHERE d.state = 'open' AND d.seq > $1
                    ORDER BY d.seq
                    LIMIT $2
                ), found AS (
                    SELECT p.id, p.seq
                    FROM page AS p
                    JOIN settled.allocations AS a ON a.id = p.allocation_id AND a.status <> 'reserved'
                    WHERE p.checked_at IS NULL OR p.checked_at < statement_timestamp() - interval '1 minute'
                    ORDER BY p.seq
                    LIMIT $3
                )
                SELECT w.many, w.last, f.id, f.seq
                FROM (SELECT count(*) AS many, max(seq) AS last FROM page) AS w
                LEFT JOIN found AS f ON true
                ORDER BY f.seq",
                &[&after, &page, &most],
            )
            .await?;
        let ids: Vec<Uuid> = rows.iter().filter_map(|row| row.get("id")).collect();
        let last_found: Option<i64> = rows.last().and_then(|row| row.get("seq"));
        let many: i64 = rows.first().map_or(0, |row| row.get("many"));
        let is_cut = i64::try_from(ids.len()).unwrap_or(i64::MAX) >= most;
        let next = if is_cut {
            last_found
        } else if many >= page {
            rows.first().and_then(|row| row.get("last"))
        } else {
            None
        };
        Ok(MaybeSettled { ids, next })
    }

    /// Writes down which of these have settled since, each with why, and that the others have been looked at. Only open rows
    /// change: what a run asked for it judges itself, and what is discarded stays so. How many were closed.
    ///
    /// # Errors
    /// The database is away.
    pub async fn close_settled(&self, settled: &[(Uuid, String)], others: &[Uuid]) -> Result<u64, StoreError> {
        let ids: Vec<Uuid> = settled
            .iter()
            .map(|(id, _)| *id)
            .chain(others.iter().copied())
            .collect();
        let notes: Vec<Option<&str>> = settled
            .iter()
            .map(|(_, note)| Some(note.as_str()))
            .chain(others.iter().map(|_| None))
            .collect();
        let rows = self
            .session("settled_since")
            .await?
            .query(
                "/* dead_letters::close_settled */
                WITH mine AS MATERIALIZED (
                    SELECT d.id
                    FROM settled.dead_letters AS d
                    WHERE d.id = ANY ($1) AND d.state = 'open'
                    ORDER BY d.id
                    FOR NO KEY UPDATE
                )
                UPDATE settled.dead_letters AS d
                SET checked_at = clock_timestamp(),
                    state = CASE WHEN n.note IS NULL THEN d.state ELSE 'settled' END,
                    verdict = CASE WHEN n.note IS NULL THEN d.verdict ELSE 'duplicate' END,
                    judged_at = CASE WHEN n.note IS NULL THEN d.judged_at
                                     ELSE date_trunc('milliseconds', clock_timestamp()) END,
                    note = coalesce(n.note, d.note)
                FROM mine, unnest($1::uuid[], $2::text[]) AS n (id, note)
                WHERE d.id = mine.id AND n.id = mine.id
                RETURNING n.note IS NOT NULL AS closed",
                &[&ids, &notes],
            )
            .await?;
        let closed = rows.iter().filter(|row| row.get("closed")).count();
        Ok(u64::try_from(closed).unwrap_or(u64::MAX))
    }
}

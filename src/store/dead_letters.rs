//! Dead letters: taken in from the queue, one row a message; claimed for their replay, and ruled on by the batch that
//! judges it.

use std::{collections::BTreeMap, time::Duration};

use futures_util::join;
use jiff::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Fate, Session, Store, StoreError,
    batch::{self, Outcome},
    dead_letter_space::{self, Bounds},
    due::Claimed,
    outbox, told,
};
use crate::{
    domain::{
        dead_letter::{Arrival, Entry, Filing, Known, Ruling, State, group_of, ruling},
        decide::{Judgement, Reason, VerdictKind},
        delivery::{BatchId, Cut, Publication, Source},
        told::{Firsts, Tellings},
    },
    fail::Point,
};

const LOAD: &str = "\
    /* dead_letters::load */
    SELECT id, state, first_failed_at, last_failed_at, discarded_at
    FROM settled.dead_letters
    WHERE id = ANY ($1)
    ORDER BY id
    FOR UPDATE";

const LOAD_NOW: &str = "\
    /* dead_letters::load now */
    SELECT date_trunc('milliseconds', clock_timestamp())";

const INSERT: &str = "\
    /* dead_letters::insert */
    INSERT INTO settled.dead_letters (
        id, exchange, routing_key, digest, properties, body, enterprise_id, nonce, allocation_id, reason, detail,
        group_id, made_by, first_failed_at, last_failed_at, times_seen, body_length, too_large, state, verdict, note,
        judged_at, format, collected_at
    )
    SELECT n.*, $23, $24
    FROM unnest(
        $1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::text[], $6::bytea[], $7::text[], $8::text[],
        $9::uuid[], $10::text[], $11::text[], $12::text[], $13::text[], $14::timestamptz[], $15::timestamptz[],
        $16::bigint[], $17::bigint[], $18::text[], $19::text[], $20::text[], $21::text[], $22::timestamptz[]
    ) AS n";

/// Where the row itself tells of the last failure, the new reason is null.
const UPDATE: &str = "\
    /* dead_letters::update */
    UPDATE settled.dead_letters AS d
    SET state = n.state,
        first_failed_at = n.first_failed_at,
        last_failed_at = n.last_failed_at,
        discarded_at = n.discarded_at,
        times_seen = d.times_seen + n.seen,
        reason = coalesce(n.reason, d.reason),
        detail = coalesce(n.detail, d.detail),
        group_id = coalesce(n.group_id, d.group_id),
        made_by = coalesce(n.made_by, d.made_by),
        checked_at = NULL,
        verdict = coalesce(n.verdict, d.verdict),
        note = coalesce(n.note, d.note),
        judged_at = coalesce(n.judged_at, d.judged_at)
    FROM unnest(
        $1::uuid[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::bigint[], $7::text[],
        $8::text[], $9::text[], $10::text[], $11::text[], $12::text[], $13::timestamptz[]
    ) AS n (
        id, state, first_failed_at, last_failed_at, discarded_at, seen, reason, detail, group_id, made_by, verdict, note,
        judged_at
    )
    WHERE d.id = n.id";

const COUNT_TAKEN: &str = "\
    /* dead_letters::count_taken */
    INSERT INTO settled.letters_taken AS t (failed_at, letters)
    SELECT n.failed_at, n.letters
    FROM unnest($1::timestamptz[], $2::bigint[]) AS n (failed_at, letters)
    ORDER BY n.failed_at
    ON CONFLICT (failed_at) DO UPDATE SET letters = t.letters + excluded.letters";

/// The transaction between load and write. Dropped, it leaves no trace.
pub struct OpenFiling {
    session: Session,
}

/// A filing, ready to be written.
pub struct FilingOutcome<'a> {
    /// Of the batch, where there is one, and of the outbox row.
    pub id: BatchId,
    pub worker: &'a str,
    pub now: Timestamp,
    pub arrivals: &'a [Arrival<'a>],
    pub filing: &'a Filing,
    /// Dead letters of workers that are taken with it, by when they failed.
    pub taken: &'a BTreeMap<Timestamp, u32>,
    /// Of what the broker gave up: messages that are in no batch yet.
    pub judgements: &'a [Judgement],
    /// Their events.
    pub publications: &'a [Publication],
    /// How long the writer owns the outbox row.
    pub lease: Duration,
}

impl Store {
    /// Opens the transaction `file_dead_letters`, locks what is known of these messages, and says what time it is.
    ///
    /// # Errors
    /// No connection, or the load failed.
    pub async fn open_filing(
        &self,
        ids: &[Uuid],
        bounds: Bounds,
    ) -> Result<(OpenFiling, BTreeMap<Uuid, Known>, Timestamp), StoreError> {
        self.open("file_dead_letters", false, ids, bounds).await
    }

    /// The same for a transaction that will be undone: every statement runs, even one without rows.
    ///
    /// # Errors
    /// What a filing would meet.
    pub async fn open_filing_rehearsal(
        &self,
        ids: &[Uuid],
        bounds: Bounds,
    ) -> Result<(OpenFiling, BTreeMap<Uuid, Known>, Timestamp), StoreError> {
        self.open("rehearse_filing", true, ids, bounds).await
    }

    async fn open(
        &self,
        name: &'static str,
        rehearsal: bool,
        ids: &[Uuid],
        bounds: Bounds,
    ) -> Result<(OpenFiling, BTreeMap<Uuid, Known>, Timestamp), StoreError> {
        let mut session = self.session(name).await?;
        session.rehearsal = rehearsal;
        for sql in [LOAD, LOAD_NOW, dead_letter_space::SUM] {
            session.prepare(sql).await?;
        }
        // One that is full says so, and not where it begins: another collector may have filled it just now.
        let (begun, rows, now, room) = join!(
            session.begin(),
            async { session.query(LOAD, &[&ids]).await },
            async { session.query(LOAD_NOW, &[]).await },
            dead_letter_space::check(&session, bounds, 1.0),
        );
        begun?;
        if let Err(full) = room {
            session.rollback().await;
            return Err(full);
        }
        let mut known = BTreeMap::new();
        for row in rows? {
            let state = State::parse(row.get("state")).ok_or_else(|| {
                let sentence = "the database holds a dead letter in a state that this version does not know";
                StoreError::new(name, Fate::Ours, sentence)
            })?;
            let one = Known {
                state,
                first_failed_at: row.get("first_failed_at"),
                last_failed_at: row.get("last_failed_at"),
                discarded_at: row.get("discarded_at"),
            };
            known.insert(row.get("id"), one);
        }
        let now = now?.first().map_or(Timestamp::UNIX_EPOCH, |row| row.get(0));
        Ok((OpenFiling { session }, known, now))
    }
}

impl OpenFiling {
    /// What was told before of what the broker gave up again; the rest is told by this filing, and remembered.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn remember(&self, id: BatchId, tellings: &Tellings) -> Result<Firsts, StoreError> {
        told::remember(&self.session, id, tellings).await
    }

    /// Writes the filing and takes it back.
    ///
    /// # Errors
    /// What it would meet.
    pub async fn rehearse(self, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
        let done = write_all(&self.session, outcome).await;
        self.session.rollback().await;
        done
    }

    /// Writes the filing and commits.
    ///
    /// # Errors
    /// With `at_commit` set, whether it committed is unknown: file the same again as seen before.
    pub async fn write(self, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
        if let Err(error) = write_all(&self.session, outcome).await {
            self.session.rollback().await;
            return Err(error);
        }
        self.session.pass(Point::DeadLettersFiled).await?;
        self.session.commit().await
    }
}

async fn write_all(session: &Session, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
    // On a fresh connection too they leave in this order, so that the first error is the cause.
    for sql in [batch::INSERT_BATCH, INSERT, UPDATE, outbox::INSERT, COUNT_TAKEN] {
        session.prepare(sql).await?;
    }
    let written = join!(
        insert_batch(session, outcome),
        insert(session, outcome),
        update(session, outcome),
        outbox::insert(session, outcome.id, outcome.publications, outcome.lease),
        count_taken(session, outcome),
    );
    [written.0, written.1, written.2, written.3, written.4]
        .into_iter()
        .collect()
}

/// What the broker gave up came to us here for the first time: it is received, and rejected.
async fn insert_batch(session: &Session, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
    if session.skips(outcome.judgements.is_empty()) {
        return Ok(());
    }
    let FilingOutcome { id, worker, now, .. } = *outcome;
    // What it counts is in hand, and is published to nobody's queue.
    batch::count_batch(session, id, worker, "dead", now, outcome.judgements, 0).await
}

async fn count_taken(session: &Session, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
    if session.skips(outcome.taken.is_empty()) {
        return Ok(());
    }
    let times: Vec<Timestamp> = outcome.taken.keys().copied().collect();
    let letters: Vec<i64> = outcome.taken.values().map(|letters| i64::from(*letters)).collect();
    session
        .execute_exactly(times.len(), COUNT_TAKEN, &[&times, &letters])
        .await
}

/// The entries that are new, or those that are not, in order of id.
fn entries<'a>(outcome: &'a FilingOutcome<'_>, are_new: bool) -> Vec<(Uuid, &'a Entry)> {
    let entries = outcome.filing.entries.iter().map(|(id, entry)| (*id, entry));
    entries.filter(|(_, entry)| entry.is_new == are_new).collect()
}

async fn insert(session: &Session, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
    let entries = entries(outcome, true);
    if session.skips(entries.is_empty()) {
        return Ok(());
    }
    let mut rows: Vec<(Uuid, &Entry, &Arrival<'_>)> = entries
        .into_iter()
        .filter_map(|(id, entry)| Some((id, entry, outcome.arrivals.get(entry.last?)?)))
        .collect();
    // In order of arrival, which seq keeps: pages and replays go by it. Two collectors with the same new messages, which
    // only a broken connection brings about, may be in each other's way then; one of them loads again.
    rows.sort_by_key(|(_, entry, _)| entry.last);
    let each = || rows.iter().map(|(_, _, arrival)| arrival);
    let deliveries = || each().map(|arrival| arrival.message.delivery);
    let facts = || each().map(|arrival| arrival.message.facts);
    let updates = || facts().map(|facts| facts.content.as_ref().ok().map(|content| &content.update));
    let ids: Vec<Uuid> = rows.iter().map(|(id, _, _)| *id).collect();
    let exchanges: Vec<&str> = deliveries().map(|delivery| delivery.exchange.as_str()).collect();
    let routing_keys: Vec<&str> = deliveries().map(|delivery| delivery.routing_key.as_str()).collect();
    let digests: Vec<&[u8]> = facts().map(|facts| facts.message_digest.as_slice()).collect();
    let properties: Vec<String> = deliveries()
        .map(|delivery| outbox::properties_text(&delivery.properties))
        .collect();
    let bodies: Vec<&[u8]> = deliveries().map(|delivery| delivery.body.as_slice()).collect();
    let enterprises: Vec<Option<&str>> = facts().map(|facts| facts.enterprise_id.as_deref()).collect();
    let nonces: Vec<Option<&str>> = updates()
        .map(|update| update.map(|update| update.nonce.as_str()))
        .collect();
    let allocations: Vec<Option<Uuid>> = updates().map(|update| update.map(|update| update.id)).collect();
    let reasons: Vec<&str> = each().map(|arrival| arrival.cause.reason.as_str()).collect();
    let details: Vec<String> = each().map(|arrival| storable(&arrival.cause.detail)).collect();
    let groups: Vec<String> = each().map(|arrival| group(arrival)).collect();
    let makers: Vec<&str> = each().map(|arrival| arrival.cause.made_by.as_str()).collect();
    let first: Vec<Timestamp> = rows.iter().map(|(_, entry, _)| entry.first_failed_at).collect();
    let last: Vec<Timestamp> = rows.iter().map(|(_, entry, _)| entry.last_failed_at).collect();
    let seen: Vec<i64> = rows.iter().map(|(_, entry, _)| i64::from(entry.seen)).collect();
    let cuts = || deliveries().map(|delivery| delivery.cut.as_deref());
    let lengths: Vec<Option<i64>> = cuts()
        .map(|cut| cut.map(|cut| i64::try_from(cut.body_len).unwrap_or(i64::MAX)))
        .collect();
    let too_large: Vec<Option<String>> = cuts().map(|cut| cut.map(|cut| storable(&cut.detail))).collect();
    let states: Vec<&str> = rows.iter().map(|(_, entry, _)| entry.state.as_str()).collect();
    let (verdicts, notes, judged) = closings(rows.iter().map(|(_, entry, _)| *entry), outcome.now);
    session
        .execute_exactly(
            rows.len(),
            INSERT,
            &[
                &ids,
                &exchanges,
                &routing_keys,
                &digests,
                &properties,
                &bodies,
                &enterprises,
                &nonces,
                &allocations,
                &reasons,
                &details,
                &groups,
                &makers,
                &first,
                &last,
                &seen,
                &lengths,
                &too_large,
                &states,
                &verdicts,
                &notes,
                &judged,
                &outbox::FORMAT,
                &outcome.now,
            ],
        )
        .await
}

async fn update(session: &Session, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
    let rows = entries(outcome, false);
    if session.skips(rows.is_empty()) {
        return Ok(());
    }
    let last: Vec<Option<&Arrival<'_>>> = rows
        .iter()
        .map(|(_, entry)| entry.last.and_then(|index| outcome.arrivals.get(index)))
        .collect();
    let each = || rows.iter().map(|(_, entry)| entry);
    let ids: Vec<Uuid> = rows.iter().map(|(id, _)| *id).collect();
    let states: Vec<&str> = each().map(|entry| entry.state.as_str()).collect();
    let first_failed: Vec<Timestamp> = each().map(|entry| entry.first_failed_at).collect();
    let last_failed: Vec<Timestamp> = each().map(|entry| entry.last_failed_at).collect();
    let discarded: Vec<Option<Timestamp>> = each().map(|entry| entry.discarded_at).collect();
    let seen: Vec<i64> = each().map(|entry| i64::from(entry.seen)).collect();
    let reasons: Vec<Option<&str>> = last
        .iter()
        .map(|last| last.map(|arrival| arrival.cause.reason.as_str()))
        .collect();
    let details: Vec<Option<String>> = last
        .iter()
        .map(|last| last.map(|arrival| storable(&arrival.cause.detail)))
        .collect();
    let groups: Vec<Option<String>> = last.iter().map(|last| last.map(group)).collect();
    let makers: Vec<Option<&str>> = last
        .iter()
        .map(|last| last.map(|arrival| arrival.cause.made_by.as_str()))
        .collect();
    let (verdicts, notes, judged) = closings(each().copied(), outcome.now);
    session
        .execute_exactly(
            rows.len(),
            UPDATE,
            &[
                &ids,
                &states,
                &first_failed,
                &last_failed,
                &discarded,
                &seen,
                &reasons,
                &details,
                &groups,
                &makers,
                &verdicts,
                &notes,
                &judged,
            ],
        )
        .await
}

/// Why a row is settled that nobody replayed, where its effect was there when it came.
const HAD_ITS_EFFECT: &str = "what it asks for had been settled before it came here: the settlement was told again";

type Closings<'a> = (Vec<Option<&'a str>>, Vec<Option<&'a str>>, Vec<Option<Timestamp>>);

/// Verdict, note and time of rows whose effect was there.
fn closings<'a>(entries: impl Iterator<Item = &'a Entry>, now: Timestamp) -> Closings<'static> {
    let mut closings = Closings::default();
    for entry in entries {
        let closed = entry.is_closed;
        closings.0.push(closed.then_some(VerdictKind::Duplicate.as_str()));
        closings.1.push(closed.then_some(HAD_ITS_EFFECT));
        closings.2.push(closed.then_some(now));
    }
    closings
}

fn group(arrival: &Arrival<'_>) -> String {
    group_of(
        arrival.message.facts.enterprise_id.as_deref(),
        arrival.cause.reason,
        &arrival.cause.detail,
    )
}

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

/// A detail comes in a header: one made by hand may hold what PostgreSQL can not.
fn storable(detail: &str) -> String {
    detail.replace('\0', "\u{fffd}")
}

/// An UPDATE FROM takes its rows in any order: in order of id they are locked before.
pub(super) const LOCK: &str = "\
    /* dead_letters::lock */
    SELECT FROM settled.dead_letters WHERE id = ANY ($1) ORDER BY id FOR UPDATE";

/// What settled stays settled, with the verdict and the batch that the money is found by: a slower worker finds a duplicate
/// at best, and that is not what became of it. Of what is discarded, or parked by a replay, a further
/// replay's refusal is noted, and it stays where it is.
pub(super) const JUDGE: &str = "\
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
pub(super) fn rulings<'a>(outcome: &Outcome<'a>) -> Vec<Ruling<'a>> {
    let judged = outcome.batch.iter().zip(outcome.judgements);
    let rulings: BTreeMap<Uuid, Ruling<'_>> = judged
        .filter_map(|(message, judgement)| ruling(*message, judgement))
        .map(|ruling| (ruling.id, ruling))
        .collect();
    rulings.into_values().collect()
}

pub(super) async fn lock(session: &Session, rulings: &[Ruling<'_>]) -> Result<(), StoreError> {
    if session.skips(rulings.is_empty()) {
        return Ok(());
    }
    let ids: Vec<Uuid> = rulings.iter().map(|ruling| ruling.id).collect();
    session.query(LOCK, &[&ids]).await.map(drop)
}

/// Gives rows their verdict, and the items of their runs. Rows are not counted: one may have been purged.
pub(super) async fn judge(session: &Session, outcome: &Outcome<'_>, rulings: &[Ruling<'_>]) -> Result<(), StoreError> {
    if session.skips(rulings.is_empty()) {
        return Ok(());
    }
    let ids: Vec<Uuid> = rulings.iter().map(|ruling| ruling.id).collect();
    let states: Vec<&str> = rulings.iter().map(|ruling| ruling.state.as_str()).collect();
    let verdicts: Vec<&str> = rulings.iter().map(|ruling| ruling.verdict.as_str()).collect();
    let reasons: Vec<Option<&str>> = rulings.iter().map(|ruling| ruling.reason.map(Reason::as_str)).collect();
    let details: Vec<Option<&str>> = rulings.iter().map(|ruling| ruling.detail).collect();
    let groups: Vec<Option<&str>> = rulings.iter().map(|ruling| ruling.group.as_deref()).collect();
    let are_replays: Vec<bool> = rulings.iter().map(|ruling| ruling.is_replay).collect();
    session
        .execute(
            JUDGE,
            &[
                &ids,
                &states,
                &verdicts,
                &reasons,
                &details,
                &groups,
                &are_replays,
                &outcome.now,
                &outcome.id,
            ],
        )
        .await?;
    session.pass(Point::ReplayJudged).await
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
pub struct Suspects {
    pub ids: Vec<Uuid>,
    /// Where to go on; none: all have been looked through.
    pub next: Option<i64>,
}

impl Store {
    /// Looks through so many open rows after a place, for so many suspects at most.
    ///
    /// # Errors
    /// The database is away.
    pub async fn suspects(&self, after: i64, page: i64, most: i64) -> Result<Suspects, StoreError> {
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
                    WHERE p.checked_at IS NULL OR p.checked_at < statement_timestamp() - interval '1 hour'
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
        Ok(Suspects { ids, next })
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

/// How many dead letters wait, and what is being replayed.
#[derive(Clone, Debug, Default)]
pub struct Desk {
    /// Open ones by reason.
    pub open: Vec<(Reason, u64)>,
    /// How long ago the oldest open one was collected.
    pub oldest: Option<Duration>,
    /// Runs by state.
    pub runs: Vec<(String, u64)>,
}

impl Store {
    /// Measures the desk. One index is read from end to end: not for every few seconds.
    ///
    /// # Errors
    /// The database is away.
    pub async fn measure_desk(&self) -> Result<Desk, StoreError> {
        let session = self.session("measure_desk").await?;
        let natural = |number: i64| u64::try_from(number).unwrap_or_default();
        let rows = session
            .query(
                "/* dead_letters::measure_desk open */
                SELECT reason, count(*)
                FROM settled.dead_letters
                WHERE state = 'open'
                GROUP BY reason",
                &[],
            )
            .await?;
        let open = rows
            .iter()
            .filter_map(|row| Some((Reason::parse(row.get(0))?, natural(row.get(1)))))
            .collect();
        let rows = session
            .query(
                "/* dead_letters::measure_desk oldest */
                SELECT extract(epoch FROM clock_timestamp() - collected_at)::float8
                FROM settled.dead_letters
                WHERE state = 'open'
                ORDER BY seq
                LIMIT 1",
                &[],
            )
            .await?;
        let oldest = rows
            .first()
            .map(|row| Duration::from_secs_f64(row.get::<_, f64>(0).max(0.0)));
        let rows = session
            .query(
                "/* dead_letters::measure_desk runs */ SELECT state, count(*) FROM settled.runs GROUP BY state",
                &[],
            )
            .await?;
        let runs = rows.iter().map(|row| (row.get(0), natural(row.get(1)))).collect();
        Ok(Desk { open, oldest, runs })
    }
}

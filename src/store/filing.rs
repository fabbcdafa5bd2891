//! Dead letters, taken in from their queue: one row a message.

use std::{collections::BTreeMap, time::Duration};

use futures_util::join;
use jiff::Timestamp;
use uuid::Uuid;

use super::{
    Fate, Session, Store, StoreError,
    batch::BatchHead,
    dead_letter_space::{self, SpaceBounds},
    outbox, told,
    write::{Rows, Write, params, write_all},
};
use crate::{
    domain::{
        dead_letter::{Arrival, FiledRow, Filing, Known, State, group_of},
        delivery::{BatchId, Publication},
        told::{Firsts, Tellings},
        verdict::{Verdict, VerdictKind},
    },
    fail::Point,
};

const LOAD: &str = "\
    /* filing::load */
    SELECT id, state, first_failed_at, last_failed_at, discarded_at
    FROM settled.dead_letters
    WHERE id = ANY ($1)
    ORDER BY id
    FOR UPDATE";

const LOAD_NOW: &str = "\
    /* filing::load now */
    SELECT date_trunc('milliseconds', clock_timestamp())";

const INSERT: &str = "\
    /* filing::insert */
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
    /* filing::update */
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
    /* filing::count_taken */
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
    pub verdicts: Vec<&'a Verdict>,
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
        bounds: SpaceBounds,
    ) -> Result<(OpenFiling, BTreeMap<Uuid, Known>, Timestamp), StoreError> {
        self.open("file_dead_letters", false, ids, bounds).await
    }

    /// When each of these failed last, as far as that is stored.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn filed(&self, ids: &[Uuid]) -> Result<BTreeMap<Uuid, Timestamp>, StoreError> {
        let rows = self
            .session("filed")
            .await?
            .query(
                "/* filing::filed */ SELECT id, last_failed_at FROM settled.dead_letters WHERE id = ANY ($1)",
                &[&ids],
            )
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// The same for a transaction that will be undone: every statement runs, even one without rows.
    ///
    /// # Errors
    /// What a filing would meet.
    pub async fn open_filing_rehearsal(
        &self,
        ids: &[Uuid],
        bounds: SpaceBounds,
    ) -> Result<(OpenFiling, BTreeMap<Uuid, Known>, Timestamp), StoreError> {
        self.open("rehearse_filing", true, ids, bounds).await
    }

    async fn open(
        &self,
        name: &'static str,
        rehearsal: bool,
        ids: &[Uuid],
        bounds: SpaceBounds,
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
        let now = session.one(&now?)?.get(0);
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
        let done = write_all(&self.session, writes(outcome)?).await;
        self.session.rollback().await;
        done
    }

    /// Writes the filing and commits.
    ///
    /// # Errors
    /// With `at_commit` set, whether it committed is unknown: file the same again as seen before.
    pub async fn write(self, outcome: &FilingOutcome<'_>) -> Result<(), StoreError> {
        if let Err(error) = write_all(&self.session, writes(outcome)?).await {
            self.session.rollback().await;
            return Err(error);
        }
        self.session.pass(Point::DeadLettersFiled).await?;
        self.session.commit_and_hear().await
    }
}

/// Everything that a filing writes, in the order in which it is sent.
fn writes<'a>(outcome: &'a FilingOutcome<'_>) -> Result<Vec<Write<'a>>, StoreError> {
    // What the broker gave up came to us here for the first time: it is received, and rejected. What it counts is in hand, and
    // is published to nobody's queue.
    let head = BatchHead {
        id: outcome.id,
        worker: outcome.worker,
        source: "dead",
        now: outcome.now,
        verdicts: &outcome.verdicts,
        letters: 0,
        publications: outcome.publications,
        kept: &[],
        event_source: "",
        lease: outcome.lease,
        published: &[],
    };
    Ok(vec![
        head.write()?,
        insert(outcome)?,
        update(outcome),
        count_taken(outcome),
    ])
}

fn count_taken<'a>(outcome: &FilingOutcome<'_>) -> Write<'a> {
    let times: Vec<Timestamp> = outcome.taken.keys().copied().collect();
    let letters: Vec<i64> = outcome.taken.values().map(|letters| i64::from(*letters)).collect();
    let rows = Rows::Exactly(times.len());
    Write::unless(times.is_empty(), COUNT_TAKEN, rows, params![times, letters])
}

/// The entries that are new, or those that are not, in order of id.
fn entries<'a>(outcome: &'a FilingOutcome<'_>, are_new: bool) -> Vec<(Uuid, &'a FiledRow)> {
    let entries = outcome.filing.entries.iter().map(|(id, entry)| (*id, entry));
    entries.filter(|(_, entry)| entry.is_new == are_new).collect()
}

fn insert<'a>(outcome: &'a FilingOutcome<'_>) -> Result<Write<'a>, StoreError> {
    let entries = entries(outcome, true);
    let count = entries.len();
    let mut rows: Vec<(Uuid, &FiledRow, &Arrival<'_>)> = entries
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
    let properties: Result<Vec<String>, StoreError> = deliveries()
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
    Ok(Write::unless(
        count == 0,
        INSERT,
        // Of each that is new there is a message, or it is a mistake of ours: a letter that is not stored is not acknowledged.
        Rows::Exactly(count),
        params![
            ids,
            exchanges,
            routing_keys,
            digests,
            properties?,
            bodies,
            enterprises,
            nonces,
            allocations,
            reasons,
            details,
            groups,
            makers,
            first,
            last,
            seen,
            lengths,
            too_large,
            states,
            verdicts,
            notes,
            judged,
            outbox::FORMAT,
            outcome.now,
        ],
    ))
}

fn update<'a>(outcome: &'a FilingOutcome<'_>) -> Write<'a> {
    let rows = entries(outcome, false);
    let count = rows.len();
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
    Write::unless(
        count == 0,
        UPDATE,
        Rows::Exactly(count),
        params![
            ids,
            states,
            first_failed,
            last_failed,
            discarded,
            seen,
            reasons,
            details,
            groups,
            makers,
            verdicts,
            notes,
            judged,
        ],
    )
}

/// Why a row is settled that nobody replayed, where its effect was there when it came.
const HAD_ITS_EFFECT: &str = "what it asks for had been settled before it came here: the settlement was told again";

type Closings<'a> = (Vec<Option<&'a str>>, Vec<Option<&'a str>>, Vec<Option<Timestamp>>);

/// Verdict, note and time of rows whose effect was there.
fn closings<'a>(entries: impl Iterator<Item = &'a FiledRow>, now: Timestamp) -> Closings<'static> {
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

/// A detail comes in a header: one made by hand may hold what PostgreSQL can not.
fn storable(detail: &str) -> String {
    detail.replace('\0', "\u{fffd}")
}

//! A partner's rows come to the target: copied from one moment of the source, compared with it row by row, and committed at once
//! or not at all.

use std::collections::{BTreeMap, VecDeque};

use serde_json::json;
use uuid::Uuid;

use super::{
    CellMove, MovePhase,
    tables::{ACTS, Copied, TABLES},
};
use crate::{
    fail::{self, Point},
    store::{
        Session, Store, StoreError,
        registry::{By, note},
    },
};

/// Rows that travel at a time: each may be as large as a message.
const PAGE: usize = 200;

/// What an arrival came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arriving {
    /// Everything is there and equal: so many rows of each table.
    Arrived(BTreeMap<&'static str, i64>),
    /// The target has a word of this move already.
    Decided(MovePhase),
    /// Something is in the way; nothing was changed.
    Stopped(String),
}

/// Rows under a cursor, a page at a time.
struct Lines<'a> {
    session: &'a Session,
    fetch: String,
    page: VecDeque<(String, Vec<u8>)>,
}

impl<'a> Lines<'a> {
    async fn open(session: &'a Session, name: &str, sql: &str) -> Result<Self, StoreError> {
        let declare = format!("/* moves::lines */ DECLARE {name} NO SCROLL CURSOR FOR {sql}");
        session.execute(&declare, &[]).await?;
        Ok(Self {
            session,
            fetch: format!("/* moves::lines */ FETCH {PAGE} FROM {name}"),
            page: VecDeque::new(),
        })
    }

    /// The next row: its key, or all of it, and its digest.
    async fn next(&mut self) -> Result<Option<(String, Vec<u8>)>, StoreError> {
        if self.page.is_empty() {
            let rows = self.session.query(&self.fetch, &[]).await?;
            self.page.extend(rows.iter().map(|row| (row.get(0), row.get(1))));
        }
        Ok(self.page.pop_front())
    }
}

fn of(sql: &str, whose: &str) -> String {
    // An enterprise's id has letters, digits, _ and - only.
    sql.replace("{whose}", whose)
}

/// Copies the rows of a table, and says how many there are.
async fn copy(from: &Session, to: &Session, table: &Copied, whose: &str) -> Result<i64, StoreError> {
    let sql = format!(
        "SELECT to_jsonb(n)::text, ''::bytea FROM ({}) AS n ORDER BY {}",
        of(table.source, whose),
        table.key
    );
    let mut lines = Lines::open(from, &format!("copied_{}", table.name), &sql).await?;
    let mut copied = 0_i64;
    loop {
        let mut page = Vec::new();
        while page.len() < PAGE
            && let Some((line, _)) = lines.next().await?
        {
            page.push(line);
        }
        if page.is_empty() {
            return Ok(copied);
        }
        let rows = format!("[{}]", page.join(","));
        let insert = format!("/* moves::copy {} */ {}", table.name, table.insert);
        if table.may_have_more {
            to.execute(&insert, &[&rows]).await?;
        } else {
            to.execute_exactly(page.len(), &insert, &[&rows]).await?;
        }
        copied = copied.saturating_add(i64::try_from(page.len()).unwrap_or(i64::MAX));
    }
}

/// The first row that is not the same on both sides; none: all are.
async fn difference(from: &Session, to: &Session, table: &Copied, whose: &str) -> Result<Option<String>, StoreError> {
    let digests = |rows: &str| {
        format!(
            "SELECT ({}) COLLATE \"C\" AS name, sha256(convert_to(n::text, 'UTF8')) FROM ({}) AS n ORDER BY 1, 2",
            table.key,
            of(rows, whose)
        )
    };
    let name = format!("compared_{}", table.name);
    let mut here = Lines::open(from, &name, &digests(table.source)).await?;
    let mut there = Lines::open(to, &name, &digests(table.target)).await?;
    let mut other = there.next().await?;
    let differs = |what: &str, key: &str| Some(format!("{} {key:?} {what}", table.name));
    while let Some((key, digest)) = here.next().await? {
        while table.may_have_more && other.as_ref().is_some_and(|(other, of)| (other, of) < (&key, &digest)) {
            other = there.next().await?;
        }
        match &other {
            Some((same, equal)) if *same == key && *equal == digest => other = there.next().await?,
            Some((same, _)) if *same == key => return Ok(differs("is another one there", &key)),
            Some(_) | None => return Ok(differs("is not there", &key)),
        }
    }
    Ok(other
        .filter(|_| !table.may_have_more)
        .and_then(|(key, _)| differs("is there, and not here", &key)))
}

/// Whose funds there are in the source, as JSON: `{connection_id, client_id, currency, held, allocated}`.
const FUNDS: &str = "\
    /* moves::arrive funds of the source */
    SELECT coalesce(jsonb_agg(to_jsonb(n)), '[]')::text
    FROM (
        SELECT f.owner AS connection_id, c.client_id, f.currency, f.held, f.allocated
        FROM settled.funds AS f
        JOIN settled.connections AS c ON c.connection_id = f.owner
        WHERE f.holder = 'connection'
          AND c.enterprise_id = $1
    ) AS n";

const OPEN: &str = "\
    /* moves::arrive open funds */
    SELECT settled.open_funds(array_agg(k.holder), array_agg(k.owner), array_agg(k.currency))
    FROM jsonb_to_recordset($1::text::jsonb) AS n (connection_id uuid, client_id uuid, currency text)
    CROSS JOIN LATERAL (VALUES
        ('world', '00000000-0000-0000-0000-000000000000'::uuid, n.currency),
        ('client', n.client_id, n.currency),
        ('connection', n.connection_id, n.currency)
    ) AS k (holder, owner, currency)
    HAVING count(*) > 0";

/// Comes in from the world outside, to the client; the partner's own transfers take it from there to where it was.
const COME: &str = "\
    /* moves::arrive money */
    WITH came AS (
        INSERT INTO settled.moved_funds (move_id, connection_id, currency, quantity, created_at)
        SELECT $1, n.connection_id, n.currency, p.part, date_trunc('milliseconds', clock_timestamp())
        FROM jsonb_to_recordset($2::text::jsonb) AS n (
            connection_id uuid, client_id uuid, currency text, held numeric, allocated numeric
        )
        CROSS JOIN LATERAL settled.parts_of(n.held + n.allocated) AS p (part)
        RETURNING id, connection_id, currency, quantity, created_at
    )
    INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
    SELECT m.id, 0, 'arrived', settled.account(w.id, 'external'), settled.account(v.id, 'available'), m.quantity, m.created_at
    FROM came AS m
    JOIN settled.connections AS c ON c.connection_id = m.connection_id
    JOIN settled.funds AS w
      ON (w.holder, w.owner, w.currency) = ('world', '00000000-0000-0000-0000-000000000000'::uuid, m.currency)
    JOIN settled.funds AS v ON (v.holder, v.owner, v.currency) = ('client', c.client_id, m.currency)";

/// What each account changes by, in the order in which every writer locks them.
const BALANCE: &str = "\
    /* moves::arrive balances */
    WITH n AS (
        SELECT *
        FROM jsonb_to_recordset($1::text::jsonb) AS n (
            connection_id uuid, client_id uuid, currency text, held numeric, allocated numeric
        )
    ), change AS (
        SELECT h.id, n.held, n.allocated, 0::numeric AS external
        FROM n
        JOIN settled.funds AS h ON (h.holder, h.owner, h.currency) = ('connection', n.connection_id, n.currency)
        UNION ALL
        SELECT w.id, 0, 0, -sum(n.held + n.allocated)
        FROM n
        JOIN settled.funds AS w
          ON (w.holder, w.owner, w.currency) = ('world', '00000000-0000-0000-0000-000000000000'::uuid, n.currency)
        GROUP BY w.id
    ), locked AS MATERIALIZED (
        SELECT f.id FROM settled.funds AS f WHERE f.id IN (SELECT id FROM change) ORDER BY f.id FOR NO KEY UPDATE
    )
    UPDATE settled.funds AS f
    SET held = f.held + c.held,
        allocated = f.allocated + c.allocated,
        external = f.external + c.external
    FROM locked AS l
    JOIN change AS c ON c.id = l.id
    WHERE f.id = l.id";

async fn text(session: &Session, sql: &str, whose: &str) -> Result<String, StoreError> {
    let rows = session.query(sql, &[&whose]).await?;
    Ok(session.one(&rows)?.get(0))
}

impl Store {
    /// Brings a partner that is paused in these books to those of another cell, where nothing of it is judged yet. Said again it
    /// is found as it is.
    ///
    /// # Errors
    /// A database is away or refuses. With `at_commit` set it is unknown whether it arrived.
    pub async fn arrive(&self, target: &Store, going: &CellMove, by: By<'_>) -> Result<Arriving, StoreError> {
        fail::point(Point::MoveDrained).await;
        let whose = going.enterprise_id.as_str();
        let mut from = self.session("move_from").await?;
        from.begin_copy(true).await?;
        let funds = text(&from, FUNDS, whose).await?;
        // By themselves, and so not locked for as long as the copying takes; they are empty.
        target.session("move_to").await?.query(OPEN, &[&funds]).await?;
        let mut to = target.session("move_to").await?;
        to.begin_copy(false).await?;
        let arrived = bring(&from, &to, going, &funds, self.books_epoch().await?.books, by).await;
        from.rollback().await;
        match arrived? {
            Arriving::Arrived(counted) => {
                to.pass(Point::MoveCopied).await?;
                to.commit().await?;
                fail::point(Point::MoveArrived).await;
                Ok(Arriving::Arrived(counted))
            }
            Arriving::Decided(phase) => {
                to.rollback().await;
                Ok(Arriving::Decided(phase))
            }
            Arriving::Stopped(why) => {
                to.rollback().await;
                Ok(Arriving::Stopped(why))
            }
        }
    }
}

async fn bring(
    from: &Session,
    to: &Session,
    going: &CellMove,
    funds: &str,
    source: Uuid,
    by: By<'_>,
) -> Result<Arriving, StoreError> {
    let whose = going.enterprise_id.as_str();
    // First: whoever takes the move back writes the same row, and waits here for the end of this transaction.
    let written = to
        .execute(
            "/* moves::arrive */
            INSERT INTO settled.moves (
                id, enterprise_id, way, other, phase, begun_at, changed_at, quarantined_at, quarantine_reason
            )
            VALUES ($1, $2, 'in', $3, 'arrived', $4, clock_timestamp(), $5, $6)
            ON CONFLICT DO NOTHING",
            &[
                &going.id,
                &whose,
                &source,
                &going.begun_at,
                &going.quarantined_at,
                &going.quarantine_reason,
            ],
        )
        .await?;
    if written == 0 {
        return Ok(match super::find(to, going.id).await? {
            Some(found) => Arriving::Decided(found.phase),
            None => Arriving::Stopped(format!("another move of partner {whose} is under way there")),
        });
    }
    let there = to
        .query(
            "/* moves::arrive partner */ SELECT FROM settled.partners WHERE enterprise_id = $1",
            &[&whose],
        )
        .await?;
    if !there.is_empty() {
        return Ok(Arriving::Stopped(format!(
            "partner {whose} is registered there already"
        )));
    }
    let mut counted = BTreeMap::new();
    for table in TABLES.iter().chain([&ACTS]) {
        match copy(from, to, table, whose).await {
            Ok(copied) => counted.insert(table.name, copied),
            // Somebody else has the same key, connection or id there.
            Err(error) if error.breaks_a_rule() => {
                return Ok(Arriving::Stopped(format!(
                    "what it has in {} does not fit there: {}",
                    table.name,
                    error.sentence()
                )));
            }
            Err(error) => return Err(error),
        };
    }
    for table in TABLES.iter().chain([&ACTS]) {
        if let Some(difference) = difference(from, to, table, whose).await? {
            return Ok(Arriving::Stopped(format!(
                "what was copied is not the same: {difference}"
            )));
        }
    }
    to.execute(COME, &[&going.id, &funds]).await?;
    to.execute(BALANCE, &[&funds]).await?;
    to.execute_exactly(
        1,
        "/* moves::arrive waits */
        UPDATE settled.partners SET moving = $2 WHERE enterprise_id = $1",
        &[&whose, &going.id],
    )
    .await?;
    to.execute_exactly(
        1,
        "/* moves::arrive counted */
        UPDATE settled.moves SET counted = $2::text::jsonb WHERE id = $1",
        &[&going.id, &json!(counted).to_string()],
    )
    .await?;
    let about = json!({"enterpriseId": whose, "moveId": going.id, "from": source});
    note(
        to,
        by,
        "partner move",
        &about,
        &json!({"phase": "arrived", "rows": counted}),
    )
    .await?;
    Ok(Arriving::Arrived(counted))
}

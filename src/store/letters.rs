//! Stored dead letters as they are asked for; in the rooms below, by which filter, and what is done to them directly.
//!
//! Whatever is asked names its states: one branch each, so that every branch walks an index in its order.

pub mod acts;
mod filter;
mod waiting;

use jiff::Timestamp;
use serde::Serialize;
use tokio_postgres::Row;
use uuid::Uuid;

use self::filter::{Asked, Parameters};
pub use self::{filter::Filter, waiting::LettersWaiting};
use super::{
    Session, Store, StoreError,
    audit::{self, AuditRecord},
    outbox,
    subject::Subject,
    time::{maybe_time, time},
};
use crate::domain::{delivery::Properties, reason::Reason};

/// A dead letter without its body.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    pub id: Uuid,
    /// Where a list goes on: `--after`.
    pub cursor: i64,
    pub state: String,
    #[serde(flatten)]
    pub why: ReasonShown,
    pub enterprise_id: Option<String>,
    pub nonce: Option<String>,
    pub allocation_id: Option<Uuid>,
    /// The same for all of one partner, reason and kind of detail: `--group`.
    pub group: String,
    pub exchange: String,
    pub routing_key: String,
    pub message_digest: String,
    /// As received.
    pub body_bytes: i64,
    /// Of a message that was too large: the head that is kept. None: all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_bytes_kept: Option<i64>,
    pub made_by: String,
    #[serde(serialize_with = "time")]
    pub first_failed_at: Timestamp,
    #[serde(serialize_with = "time")]
    pub last_failed_at: Timestamp,
    pub times_seen: i64,
    #[serde(serialize_with = "time")]
    pub collected_at: Timestamp,
    pub run_id: Option<i64>,
    pub replays: i32,
    /// What the last replay came to.
    pub verdict: Option<String>,
    #[serde(serialize_with = "maybe_time")]
    pub judged_at: Option<Timestamp>,
    pub batch_id: Option<Uuid>,
    #[serde(serialize_with = "maybe_time")]
    pub discarded_at: Option<Timestamp>,
    /// Why it is settled, where nobody replayed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A reason with everything that follows from it.
#[derive(Clone, Debug, Serialize)]
pub struct ReasonShown {
    pub reason: Reason,
    pub class: u16,
    #[serde(rename = "final")]
    pub is_final: bool,
    pub detail: String,
}

impl ReasonShown {
    fn new(reason: Reason, detail: String) -> Self {
        Self {
            reason,
            class: reason.class(),
            is_final: reason.is_final(),
            detail,
        }
    }
}

const COLUMNS: &str = "\
    d.id, d.seq, d.state, d.reason, d.detail, d.enterprise_id, d.nonce, d.allocation_id, d.group_id, d.exchange,
    d.routing_key, d.digest, octet_length(d.body)::bigint AS body_bytes, d.body_length, d.made_by, d.first_failed_at,
    d.last_failed_at, d.times_seen, d.collected_at, d.run_id, d.replays, d.verdict, d.judged_at, d.batch_id,
    d.discarded_at, d.note";

/// Reads a reason, whichever version wrote it.
fn reason(row: &Row) -> Reason {
    Reason::written(row.get("reason"))
}

fn dead_letter(row: &Row) -> DeadLetter {
    let (kept, received): (i64, Option<i64>) = (row.get("body_bytes"), row.get("body_length"));
    DeadLetter {
        id: row.get("id"),
        cursor: row.get("seq"),
        state: row.get("state"),
        why: ReasonShown::new(reason(row), row.get("detail")),
        enterprise_id: row.get("enterprise_id"),
        nonce: row.get("nonce"),
        allocation_id: row.get("allocation_id"),
        group: row.get("group_id"),
        exchange: row.get("exchange"),
        routing_key: row.get("routing_key"),
        message_digest: hex::encode(row.get::<_, &[u8]>("digest")),
        body_bytes: received.unwrap_or(kept),
        body_bytes_kept: received.is_some().then_some(kept),
        made_by: row.get("made_by"),
        first_failed_at: row.get("first_failed_at"),
        last_failed_at: row.get("last_failed_at"),
        times_seen: row.get("times_seen"),
        collected_at: row.get("collected_at"),
        run_id: row.get("run_id"),
        replays: row.get("replays"),
        verdict: row.get("verdict"),
        judged_at: row.get("judged_at"),
        batch_id: row.get("batch_id"),
        discarded_at: row.get("discarded_at"),
        note: row.get("note"),
    }
}

/// A dead letter with the message itself: complete enough to publish it again.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Exported {
    #[serde(flatten)]
    pub dead_letter: DeadLetter,
    pub properties: Option<Properties>,
    /// In base64.
    pub body: String,
}

const BODY_COLUMNS: &str = "d.format, d.properties, translate(encode(d.body, 'base64'), E'\\n', '') AS body";

fn exported(row: &Row) -> Exported {
    Exported {
        dead_letter: dead_letter(row),
        properties: outbox::properties(row),
        body: row.get("body"),
    }
}

/// Messages of one partner, reason and kind of detail.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Group {
    pub group: String,
    pub enterprise_id: Option<String>,
    #[serde(flatten)]
    pub why: ReasonShown,
    pub messages: i64,
    #[serde(serialize_with = "time")]
    pub first_failed_at: Timestamp,
    #[serde(serialize_with = "time")]
    pub last_failed_at: Timestamp,
    /// The message that the detail is of.
    pub example: Uuid,
    /// The key that made its signature, where the group is refused for that. Nobody stored it: who has the message reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovered_key: Option<String>,
}

/// How many there are of something.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Count {
    pub messages: i64,
    #[serde(serialize_with = "time")]
    pub first_failed_at: Timestamp,
    #[serde(serialize_with = "time")]
    pub last_failed_at: Timestamp,
}

/// A count of one state and one reason; or of one partner.
#[derive(Clone, Debug)]
pub struct Stat {
    pub state: Option<String>,
    pub reason: Option<Reason>,
    pub partner: Option<String>,
    pub count: Count,
}

/// What an operator named.
#[derive(Clone, Debug)]
pub enum Name {
    /// All ids between the two: what begins with a prefix.
    Ids(Uuid, Uuid),
    /// SHA-256 of the body.
    Digest([u8; 32]),
}

/// A replay of a message, as its run has it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Replayed {
    pub run: i64,
    pub plan: i64,
    pub operator: String,
    pub why: String,
    pub planned: String,
    pub state: String,
    pub verdict: Option<String>,
    pub reason: Option<String>,
    pub note: Option<String>,
    #[serde(serialize_with = "maybe_time")]
    pub judged_at: Option<Timestamp>,
}

impl Store {
    /// A page of dead letters, oldest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn dead_letters(&self, filter: &Filter, after: i64, limit: i64) -> Result<Vec<DeadLetter>, StoreError> {
        let session = self.session("dead_letters").await?;
        let rows = page(&session, "dead_letters", COLUMNS, filter, after, limit).await?;
        Ok(rows.iter().map(dead_letter).collect())
    }

    /// The same with the messages themselves.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn exported(&self, filter: &Filter, after: i64, limit: i64) -> Result<Vec<Exported>, StoreError> {
        let session = self.session("exported").await?;
        let columns = format!("{COLUMNS}, {BODY_COLUMNS}");
        let rows = page(&session, "exported", &columns, filter, after, limit).await?;
        Ok(rows.iter().map(exported).collect())
    }

    /// How many there are.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_dead_letters(&self, filter: &Filter) -> Result<i64, StoreError> {
        let asked = Asked::of(filter);
        let mut parameters = Parameters::new();
        let conditions = asked.conditions(&mut parameters);
        let branches = asked.branches(|state| {
            format!("SELECT count(*) AS n FROM settled.dead_letters AS d WHERE d.state = '{state}'{conditions}")
        });
        let sql = format!("/* letters::count_dead_letters */ SELECT sum(n)::bigint FROM ({branches}) AS b");
        let session = self.session("count_dead_letters").await?;
        let rows = session.query(&sql, &parameters).await?;
        // No state at all is a sum of nothing.
        Ok(session.one(&rows)?.get::<_, Option<i64>>(0).unwrap_or_default())
    }

    /// The same, up to a number.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_dead_letters_upto(&self, filter: &Filter, most: i64) -> Result<i64, StoreError> {
        let asked = Asked::of(filter);
        let mut parameters: Parameters<'_> = vec![&most];
        let conditions = asked.conditions(&mut parameters);
        let branches = asked.branches(|state| {
            format!("SELECT 1 FROM settled.dead_letters AS d WHERE d.state = '{state}'{conditions} LIMIT $1")
        });
        let sql = format!(
            "/* letters::count_dead_letters_upto */ SELECT count(*) FROM (SELECT 1 FROM ({branches}) AS b LIMIT $1) AS a"
        );
        let session = self.session("count_dead_letters_upto").await?;
        let rows = session.query(&sql, &parameters).await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// How many of them came after one, up to a number.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn arrived_after(&self, filter: &Filter, cursor: i64, most: i64) -> Result<i64, StoreError> {
        let asked = Asked::of(filter);
        let mut parameters: Parameters<'_> = vec![&cursor, &most];
        let conditions = asked.conditions(&mut parameters);
        let branches = asked.branches(|state| {
            format!(
                "SELECT 1 FROM settled.dead_letters AS d WHERE d.state = '{state}' AND d.seq > $1{conditions} LIMIT $2"
            )
        });
        let sql = format!(
            "/* letters::arrived_after */ SELECT count(*) FROM (SELECT 1 FROM ({branches}) AS b LIMIT $2) AS a"
        );
        let session = self.session("arrived_after").await?;
        let rows = session.query(&sql, &parameters).await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// The ids of a selection in order of arrival, up to a number.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn select_dead_letters(&self, filter: &Filter, limit: i64) -> Result<Vec<Uuid>, StoreError> {
        let asked = Asked::of(filter);
        let mut parameters: Parameters<'_> = vec![&0_i64, &limit];
        let conditions = asked.conditions(&mut parameters);
        let sql = format!("/* letters::select_dead_letters */ {}", asked.page(&conditions));
        let rows = self
            .session("select_dead_letters")
            .await?
            .query(&sql, &parameters)
            .await?;
        Ok(rows.iter().map(|row| row.get("id")).collect())
    }

    /// The largest groups, and how many groups there are.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn dead_letter_groups(&self, filter: &Filter, limit: i64) -> Result<(Vec<Group>, i64), StoreError> {
        let asked = Asked::of(filter);
        let mut parameters: Parameters<'_> = vec![&limit];
        let conditions = asked.conditions(&mut parameters);
        let sql = format!(
            "/* letters::dead_letter_groups */
            SELECT g.*, e.id AS example, e.detail
            FROM (
                SELECT b.group_id, b.enterprise_id, b.reason, sum(b.messages)::bigint AS messages,
                       min(b.first_failed_at) AS first_failed_at, max(b.last_failed_at) AS last_failed_at,
                       count(*) OVER () AS groups
                FROM ({}) AS b
                GROUP BY b.group_id, b.enterprise_id, b.reason
                ORDER BY messages DESC, b.group_id
                LIMIT $1
            ) AS g
            CROSS JOIN LATERAL (
                SELECT d.id, d.detail
                FROM settled.dead_letters AS d
                WHERE d.state = ANY ('{{{}}}') AND d.group_id = g.group_id{conditions}
                LIMIT 1
            ) AS e
            ORDER BY g.messages DESC, g.group_id",
            asked.branches(|state| grouped(state, &conditions)),
            asked
                .filter
                .states
                .iter()
                .map(|state| state.as_str())
                .collect::<Vec<_>>()
                .join(",")
        );
        let session = self.session("dead_letter_groups").await?;
        let rows = session.query(&sql, &parameters).await?;
        let groups = rows.iter().map(|row| Group {
            group: row.get("group_id"),
            enterprise_id: row.get("enterprise_id"),
            why: ReasonShown::new(reason(row), row.get("detail")),
            messages: row.get("messages"),
            first_failed_at: row.get("first_failed_at"),
            last_failed_at: row.get("last_failed_at"),
            example: row.get("example"),
            recovered_key: None,
        });
        Ok((groups.collect(), rows.first().map_or(0, |row| row.get("groups"))))
    }

    /// Counts by state and reason, and of the partners with the most, the largest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn dead_letter_stats(&self, filter: &Filter, partners: i64) -> Result<Vec<Stat>, StoreError> {
        let asked = Asked::of(filter);
        let mut parameters: Parameters<'_> = vec![&partners];
        let conditions = asked.conditions(&mut parameters);
        let sql = format!(
            "/* letters::dead_letter_stats */
            WITH grouped AS MATERIALIZED ({})
            SELECT state, reason, NULL::text AS enterprise_id, sum(messages)::bigint AS messages,
                   min(first_failed_at) AS first_failed_at, max(last_failed_at) AS last_failed_at
            FROM grouped
            GROUP BY state, reason
            UNION ALL (
                SELECT NULL, NULL, enterprise_id, sum(messages)::bigint, min(first_failed_at), max(last_failed_at)
                FROM grouped
                GROUP BY enterprise_id
                ORDER BY 4 DESC, 3
                LIMIT $1
            )",
            asked.branches(|state| grouped(state, &conditions))
        );
        let session = self.session("dead_letter_stats").await?;
        let rows = session.query(&sql, &parameters).await?;
        Ok(rows
            .iter()
            .map(|row| Stat {
                state: row.get("state"),
                reason: row.get::<_, Option<&str>>("reason").map(Reason::written),
                partner: row.get("enterprise_id"),
                count: Count {
                    messages: row.get("messages"),
                    first_failed_at: row.get("first_failed_at"),
                    last_failed_at: row.get("last_failed_at"),
                },
            })
            .collect())
    }

    /// The dead letters that a name may mean, up to a number.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn find_dead_letters(&self, name: &Name, limit: i64) -> Result<Vec<Uuid>, StoreError> {
        let session = self.session("find_dead_letters").await?;
        let rows = match name {
            Name::Ids(first, last) => {
                let sql = "/* letters::find_dead_letters by id */
                    SELECT id FROM settled.dead_letters WHERE id BETWEEN $1 AND $2 ORDER BY id LIMIT $3";
                session.query(sql, &[first, last, &limit]).await?
            }
            Name::Digest(digest) => {
                let sql = "/* letters::find_dead_letters by digest */
                    SELECT id FROM settled.dead_letters WHERE digest = $1 ORDER BY id LIMIT $2";
                session.query(sql, &[&digest.as_slice(), &limit]).await?
            }
        };
        Ok(rows.iter().map(|row| row.get("id")).collect())
    }

    /// The dead letter of a message: its id and state. Copies that differ in what is judged (another login, another content
    /// type) are rows of their own; this is the row of the receipt's sender: no row that nobody known made, then the one
    /// that was settled or has the receipt's reason, then the oldest.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn dead_letter_of(
        &self,
        enterprise_id: &str,
        nonce: &str,
        digest: &[u8; 32],
        reason: Option<&str>,
    ) -> Result<Option<(Uuid, String)>, StoreError> {
        let rows = self
            .session("dead_letter_of")
            .await?
            .query(
                "/* letters::dead_letter_of */
                SELECT id, state
                FROM settled.dead_letters
                WHERE digest = $1 AND enterprise_id = $2 AND nonce = $3
                ORDER BY made_by = 'unknown',
                         CASE WHEN $4::text IS NULL THEN state = 'settled' ELSE reason = $4 END DESC,
                         seq
                LIMIT 1",
                &[&digest.as_slice(), &enterprise_id, &nonce, &reason],
            )
            .await?;
        Ok(rows.first().map(|row| (row.get("id"), row.get("state"))))
    }

    /// One dead letter with its message, and the body's bytes.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn dead_letter(&self, id: Uuid) -> Result<Option<(Exported, Vec<u8>)>, StoreError> {
        let sql = format!(
            "/* letters::dead_letter */
            SELECT {COLUMNS}, {BODY_COLUMNS}, d.body AS bytes FROM settled.dead_letters AS d WHERE d.id = $1"
        );
        let rows = self.session("dead_letter").await?.query(&sql, &[&id]).await?;
        Ok(rows.first().map(|row| (exported(row), row.get("bytes"))))
    }

    /// What became of a dead letter at people's hands: its replays, and the acts on it. The newest ones, in order.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn lineage(&self, id: Uuid, limit: i64) -> Result<(Vec<Replayed>, Vec<AuditRecord>), StoreError> {
        let session = self.session("lineage").await?;
        let replays = replays_of(&session, &[id], limit).await?;
        let replays: Vec<Replayed> = replays.into_iter().map(|(_, replay)| replay).collect();
        let runs: Vec<i64> = replays.iter().map(|replay| replay.run).collect();
        let acts = audit::acts_on(&session, id, &runs, limit).await?;
        Ok((replays, acts))
    }
}

/// The groups of one state, summed along the index in its order.
fn grouped(state: &str, conditions: &str) -> String {
    format!(
        "SELECT '{state}' AS state, d.group_id, d.enterprise_id, d.reason, count(*) AS messages,
                min(d.first_failed_at) AS first_failed_at, max(d.last_failed_at) AS last_failed_at
        FROM settled.dead_letters AS d
        WHERE d.state = '{state}'{conditions}
        GROUP BY d.group_id, d.enterprise_id, d.reason"
    )
}

async fn page(
    session: &Session,
    function: &str,
    columns: &str,
    filter: &Filter,
    after: i64,
    limit: i64,
) -> Result<Vec<Row>, StoreError> {
    let asked = Asked::of(filter);
    let mut parameters: Parameters<'_> = vec![&after, &limit];
    let conditions = asked.conditions(&mut parameters);
    let sql = format!(
        "/* letters::{function} */
        SELECT {columns}
        FROM ({}) AS page
        JOIN settled.dead_letters AS d ON d.id = page.id
        ORDER BY page.seq",
        asked.page(&conditions)
    );
    session.query(&sql, &parameters).await
}

/// The newest replays of some messages, in order.
async fn replays_of(session: &Session, ids: &[Uuid], limit: i64) -> Result<Vec<(Uuid, Replayed)>, StoreError> {
    let rows = session
        .query(
            "/* letters::replays_of */
            SELECT i.dead_letter_id, i.run_id, r.plan_id, r.operator, r.why, i.planned, i.state, i.verdict, i.reason,
                   i.note, i.judged_at
            FROM settled.run_items AS i
            JOIN settled.runs AS r ON r.id = i.run_id
            WHERE i.dead_letter_id = ANY ($1)
            ORDER BY i.run_id DESC, i.position DESC
            LIMIT $2",
            &[&ids, &limit],
        )
        .await?;
    let replay = |row: &Row| Replayed {
        run: row.get("run_id"),
        plan: row.get("plan_id"),
        operator: row.get("operator"),
        why: row.get("why"),
        planned: row.get("planned"),
        state: row.get("state"),
        verdict: row.get("verdict"),
        reason: row.get("reason"),
        note: row.get("note"),
        judged_at: row.get("judged_at"),
    };
    Ok(rows
        .iter()
        .rev()
        .map(|row| (row.get("dead_letter_id"), replay(row)))
        .collect())
}

/// The dead letters of some subjects, in order of arrival, and their replays.
pub(super) async fn refusals(
    session: &Session,
    subjects: &[Subject],
    limit: i64,
) -> Result<(Vec<DeadLetter>, Vec<(Uuid, Replayed)>), StoreError> {
    let (mut allocations, mut nonces, mut digests) = (Vec::new(), Vec::new(), Vec::new());
    for subject in subjects {
        match subject {
            Subject::Allocation(id) => allocations.push(*id),
            Subject::Nonce(nonce) => nonces.push(nonce.as_str()),
            Subject::Digest(digest) => digests.push(digest.as_slice()),
        }
    }
    let rows = session
        .query(
            &format!(
                "/* letters::refusals */
                SELECT {COLUMNS}
                FROM settled.dead_letters AS d
                WHERE d.allocation_id = ANY ($1) OR d.nonce = ANY ($2) OR d.digest = ANY ($3)
                ORDER BY d.seq
                LIMIT $4"
            ),
            &[&allocations, &nonces, &digests, &limit],
        )
        .await?;
    let dead_letters: Vec<DeadLetter> = rows.iter().map(dead_letter).collect();
    let ids: Vec<Uuid> = dead_letters.iter().map(|dead_letter| dead_letter.id).collect();
    let replays = replays_of(session, &ids, limit).await?;
    Ok((dead_letters, replays))
}

//! What operators did: every act writes its row in its own transaction, and nobody changes it.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Session, Store, StoreError, time::time};
use crate::domain::calendar::CalendarTime;

/// Subjects that one statement writes.
const SLICE: usize = 5_000;

/// Who does what, and why.
#[derive(Clone, Copy, Debug)]
pub struct Act<'a> {
    pub name: &'static str,
    pub operator: &'a str,
    /// Looking needs no why.
    pub why: Option<&'a str>,
    pub filters: &'a Value,
    /// Who vouches for the operator's name, of acts that may take two people.
    pub voucher: Option<&'a str>,
}

/// What somebody did.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditRecord {
    /// Also where a list goes on: `--after`.
    pub id: i64,
    #[serde(serialize_with = "time")]
    pub at: Timestamp,
    pub operator: String,
    pub act: String,
    pub why: Option<String>,
    pub filters: Value,
    pub outcome: Value,
    pub run_id: Option<i64>,
    /// The database's user who wrote it, and from where; None: before these were kept, or through a local socket.
    pub session_user: Option<String>,
    pub client_address: Option<String>,
}

impl AuditRecord {
    /// `user@address`, as the database knows who did it.
    pub fn signed(&self) -> Option<String> {
        let user = self.session_user.as_deref()?;
        Some(match &self.client_address {
            Some(address) => format!("{user}@{address}"),
            None => user.to_owned(),
        })
    }
}

const AUDIT_COLUMNS: &str = "\
    a.id, a.at, a.operator, a.act, a.why, a.filters::text AS filters, a.outcome::text AS outcome, a.run_id,
    a.session_name, host(a.client_address) AS client_address";

fn audit_record(row: &Row) -> AuditRecord {
    let json = |column: &str| serde_json::from_str(row.get(column)).unwrap_or_default();
    AuditRecord {
        id: row.get("id"),
        at: row.get("at"),
        operator: row.get("operator"),
        act: row.get("act"),
        why: row.get("why"),
        filters: json("filters"),
        outcome: json("outcome"),
        run_id: row.get("run_id"),
        session_user: row.get("session_name"),
        client_address: row.get("client_address"),
    }
}

/// Every act of this version, by name.
pub const ACTS: [&str; 37] = [
    "cancel",
    "client add",
    "connection add",
    "currency map",
    "currency unmap",
    "deposit",
    "discard",
    "export",
    "key add",
    "key challenge",
    "key reinstate",
    "key revoke",
    "key rotate",
    "nonce void",
    "outbox retry",
    "partner add",
    "partner move",
    "partner move cancel",
    "partner quarantine",
    "partner resume",
    "partner set",
    "partner suspend",
    "plan",
    "plan approve",
    "purge",
    "purge propose",
    "recover",
    "recover propose",
    "replay",
    "replay ended",
    "reserve",
    "restore",
    "resume",
    "show body",
    "token add",
    "token revoke",
    "withdraw",
];

/// Which acts.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter {
    pub operator: Option<String>,
    pub act: Option<String>,
    pub since: Option<CalendarTime>,
    pub until: Option<CalendarTime>,
}

impl Store {
    /// A page of acts, the newest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn audit(&self, filter: &AuditFilter, before: i64, limit: i64) -> Result<Vec<AuditRecord>, StoreError> {
        let rows = self
            .session("audit")
            .await?
            .query(
                &format!(
                    "/* audit::audit */
                    SELECT {AUDIT_COLUMNS}
                    FROM settled.audit AS a
                    WHERE a.id < $1
                      AND ($3::text IS NULL OR a.operator = $3)
                      AND ($4::text IS NULL OR a.act = $4)
                      AND ($5::timestamptz IS NULL OR a.at >= $5)
                      AND ($6::timestamptz IS NULL OR a.at < $6)
                    ORDER BY a.id DESC
                    LIMIT $2"
                ),
                &[
                    &before,
                    &limit,
                    &filter.operator,
                    &filter.act,
                    &filter.since,
                    &filter.until,
                ],
            )
            .await?;
        Ok(rows.iter().map(audit_record).collect())
    }

    /// Writes down an act that changes nothing.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn record(&self, act: Act<'_>, outcome: &Value) -> Result<i64, StoreError> {
        let session = self.session("record").await?;
        write_audit(&session, act, outcome, None).await
    }
}

/// Writes down an act, in the transaction that did it.
pub(super) async fn write_audit(
    session: &Session,
    act: Act<'_>,
    outcome: &Value,
    run_id: Option<i64>,
) -> Result<i64, StoreError> {
    let rows = session
        .query(
            "/* audit::write_audit */
            INSERT INTO settled.audit (at, operator, act, why, filters, outcome, run_id, voucher)
            VALUES (date_trunc('milliseconds', clock_timestamp()), $1, $2, $3, $4::text::jsonb, $5::text::jsonb, $6, $7)
            RETURNING id",
            &[
                &act.operator,
                &act.name,
                &act.why,
                &act.filters.to_string(),
                &outcome.to_string(),
                &run_id,
                &act.voucher,
            ],
        )
        .await?;
    Ok(session.one(&rows)?.get("id"))
}

/// Writes down whom an act was on.
pub(super) async fn write_subjects(session: &Session, audit_id: i64, ids: &[Uuid]) -> Result<(), StoreError> {
    for slice in ids.chunks(SLICE) {
        session
            .execute_exactly(
                slice.len(),
                "/* audit::write_subjects */
                INSERT INTO settled.audit_subjects (dead_letter_id, audit_id)
                SELECT id, $1 FROM unnest($2::uuid[]) AS s (id)",
                &[&audit_id, &slice],
            )
            .await?;
    }
    Ok(())
}

/// The acts on a dead letter, and the runs' that replayed it: the newest ones, in order.
pub(super) async fn acts_on(
    session: &Session,
    id: Uuid,
    runs: &[i64],
    limit: i64,
) -> Result<Vec<AuditRecord>, StoreError> {
    let rows = session
        .query(
            &format!(
                "/* audit::acts_on */
                SELECT {AUDIT_COLUMNS}
                FROM settled.audit AS a
                WHERE a.run_id = ANY ($2)
                   OR a.id IN (SELECT s.audit_id FROM settled.audit_subjects AS s WHERE s.dead_letter_id = $1)
                ORDER BY a.id DESC
                LIMIT $3"
            ),
            &[&id, &runs, &limit],
        )
        .await?;
    let mut acts: Vec<AuditRecord> = rows.iter().map(audit_record).collect();
    acts.reverse();
    Ok(acts)
}

//! Who else wants a plan to be done.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tokio_postgres::Row;

use super::{
    Store, StoreError,
    audit::{Act, write_audit},
    time::time,
};
use crate::domain::person::Person;

/// That somebody approved a plan.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalRecord {
    pub id: i64,
    /// For what: `replay`, `discard` or `restore`.
    pub act: String,
    pub operator: String,
    pub why: String,
    #[serde(serialize_with = "time")]
    pub at: Timestamp,
    #[serde(serialize_with = "time")]
    pub expires_at: Timestamp,
    /// Whether it counts now, by the database's clock.
    pub valid: bool,
    #[serde(skip)]
    pub by: Person,
}

/// An approval to be written down.
#[derive(Clone, Copy, Debug)]
pub struct NewApproval<'a> {
    pub plan: i64,
    pub for_act: &'static str,
    pub lasts_ms: i64,
    pub voucher: Option<&'a str>,
}

const APPROVAL_COLUMNS: &str = "\
    id, act, operator, why, at, expires_at, expires_at > clock_timestamp() AS valid, voucher, session_name";

fn approval(row: &Row) -> ApprovalRecord {
    ApprovalRecord {
        id: row.get("id"),
        act: row.get("act"),
        operator: row.get("operator"),
        why: row.get("why"),
        at: row.get("at"),
        expires_at: row.get("expires_at"),
        valid: row.get("valid"),
        by: Person {
            operator: row.get("operator"),
            voucher: row.get("voucher"),
            session: row.get("session_name"),
        },
    }
}

impl Store {
    /// The database's user that we are.
    ///
    /// # Errors
    /// The database is away.
    pub async fn session_user(&self) -> Result<String, StoreError> {
        let session = self.session("session_user").await?;
        let rows = session
            .query("/* approvals::session_user */ SELECT session_user::text", &[])
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// Writes down that somebody approves a plan.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn approve(
        &self,
        act: Act<'_>,
        new: NewApproval<'_>,
        outcome: &Value,
    ) -> Result<(ApprovalRecord, i64), StoreError> {
        let session = self.session("approve").await?;
        session.begin().await?;
        let rows = session
            .query(
                &format!(
                    "/* approvals::approve */
                    INSERT INTO settled.approvals (plan_id, act, at, expires_at, operator, why, voucher)
                    SELECT $1, $2, m.at, m.at + $3::bigint * interval '1 millisecond', $4, $5, $6
                    FROM (SELECT date_trunc('milliseconds', clock_timestamp()) AS at) AS m
                    RETURNING {APPROVAL_COLUMNS}"
                ),
                &[
                    &new.plan,
                    &new.for_act,
                    &new.lasts_ms,
                    &act.operator,
                    &act.why.unwrap_or_default(),
                    &new.voucher,
                ],
            )
            .await?;
        let approved = approval(session.one(&rows)?);
        let audit_id = write_audit(&session, act, outcome, None).await?;
        session.commit().await?;
        Ok((approved, audit_id))
    }

    /// The approvals of a plan, the oldest first; the newest of them, if there are very many.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn approvals(&self, plan: i64) -> Result<Vec<ApprovalRecord>, StoreError> {
        const MOST: i64 = 100;
        let rows = self
            .session("approvals")
            .await?
            .query(
                &format!(
                    "/* approvals::approvals */
                    SELECT {APPROVAL_COLUMNS}
                    FROM settled.approvals
                    WHERE plan_id = $1
                    ORDER BY id DESC
                    LIMIT $2"
                ),
                &[&plan, &MOST],
            )
            .await?;
        Ok(rows.iter().rev().map(approval).collect())
    }
}

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

/// What takes two people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApprovalLimits {
    /// More messages do; 0: however many.
    pub messages: i64,
    /// More of a currency does, in base units.
    pub amounts: Vec<(String, String)>,
}

impl ApprovalLimits {
    /// The SQL that keeps them in the database, where whoever acts can not lower them.
    pub fn statement(&self) -> String {
        let amounts: serde_json::Map<String, Value> = self
            .amounts
            .iter()
            .map(|(currency, quantity)| (currency.clone(), Value::from(quantity.as_str())))
            .collect();
        let amounts = Value::Object(amounts).to_string().replace('\'', "''");
        format!(
            "INSERT INTO settled.approval_limits (messages, amounts) VALUES ({}, '{amounts}')\n    \
             ON CONFLICT (one) DO UPDATE SET messages = excluded.messages, amounts = excluded.amounts;",
            self.messages
        )
    }
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
    /// The database's user that we are, and whether the names count that we vouch for.
    ///
    /// # Errors
    /// The database is away.
    pub async fn session_user(&self) -> Result<(String, bool), StoreError> {
        let session = self.session("session_user").await?;
        let rows = session
            .query(
                "/* approvals::session_user */ SELECT session_user::text, settled.may_vouch()",
                &[],
            )
            .await?;
        let row = session.one(&rows)?;
        Ok((row.get(0), row.get(1)))
    }

    /// What takes two people, as far as the database itself says it: messages, 0 for however many, and amounts by currency.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn approval_limits(&self) -> Result<Option<ApprovalLimits>, StoreError> {
        let rows = self
            .session("approval_limits")
            .await?
            .query(
                "/* approvals::approval_limits */
                SELECT l.messages, a.key AS currency, a.value AS quantity
                FROM settled.approval_limits AS l
                LEFT JOIN LATERAL jsonb_each_text(l.amounts) AS a ON true
                ORDER BY a.key",
                &[],
            )
            .await?;
        let amounts = rows
            .iter()
            .filter_map(|row| Some((row.get::<_, Option<String>>("currency")?, row.get("quantity"))));
        Ok(rows.first().map(|row| ApprovalLimits {
            messages: row.get("messages"),
            amounts: amounts.collect(),
        }))
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

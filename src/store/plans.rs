//! Plans: a selection, frozen, with what each message would come to.

use std::collections::HashMap;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Session, Store, StoreError,
    audit::{Act, write_audit},
    dead_letters, due,
    time::time,
};
use crate::domain::{
    delivery::{Delivery, Source},
    ledger::Amount,
    person::Person,
    reason::Reason,
    verdict::VerdictKind,
};

/// Items that one statement writes.
const SLICE: usize = 5_000;

/// What a message would come to.
#[derive(Clone, Debug)]
pub struct PlanItem {
    pub id: Uuid,
    pub verdict: VerdictKind,
    pub reason: Option<Reason>,
    pub detail: Option<String>,
    /// What would move.
    pub amount: Option<Amount>,
}

/// A plan, as it was made.
#[derive(Clone, Debug, Serialize)]
pub struct PlanRecord {
    pub id: i64,
    #[serde(serialize_with = "time")]
    pub at: Timestamp,
    pub operator: String,
    pub filters: Value,
    pub messages: i32,
    /// Those that would settle.
    pub settled: i64,
    /// Who made it.
    #[serde(skip)]
    pub by: Person,
}

/// How many of a plan would come to what, when it was made.
#[derive(Clone, Debug)]
pub struct PlannedVerdicts {
    pub verdict: VerdictKind,
    pub reason: Option<Reason>,
    pub messages: i64,
}

/// Messages of a plan that are in a state now.
#[derive(Clone, Debug, Serialize)]
pub struct StateNow {
    pub state: String,
    pub messages: i64,
    /// Those of them that would settle when the plan was made.
    #[serde(skip)]
    pub would_settle: i64,
}

const PLAN: &str = "\
    SELECT p.id, p.at, p.operator, p.filters::text AS filters, p.messages, p.voucher, p.session_name
    FROM settled.plans AS p";

/// How many messages of some plans would settle; a plan without one is missing.
async fn settling(session: &Session, plans: &[i64]) -> Result<HashMap<i64, i64>, StoreError> {
    if plans.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = session
        .query(
            "/* plans::settling */
            SELECT plan_id, count(*) FROM settled.plan_items WHERE plan_id = ANY ($1) AND verdict = 'settled' GROUP BY plan_id",
            &[&plans],
        )
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Whether a plan was made of the messages of these partners ($3) alone; of none: of whomsoever.
pub(super) const WITHIN: &str = "\
    ($3::text[] IS NULL
        OR p.filters ->> 'partner' = ANY ($3)
        OR (p.filters ->> 'partner' IS NULL AND p.filters -> 'partners' <@ to_jsonb($3::text[])))";

fn plan_record(row: &Row, settled: i64) -> PlanRecord {
    PlanRecord {
        id: row.get("id"),
        at: row.get("at"),
        operator: row.get("operator"),
        filters: serde_json::from_str(row.get("filters")).unwrap_or_default(),
        messages: row.get("messages"),
        settled,
        by: Person {
            operator: row.get("operator"),
            voucher: row.get("voucher"),
            session: row.get("session_name"),
        },
    }
}

/// A stored message for judgement: none where this version does not read its format.
pub type StoredMessage = (Uuid, Option<Delivery>);

impl Store {
    /// Messages as they were received, in the order asked. What is gone meanwhile is left out.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn dead_letter_deliveries(&self, ids: &[Uuid]) -> Result<Vec<StoredMessage>, StoreError> {
        let rows = self
            .session("dead_letter_deliveries")
            .await?
            .query(
                "/* plans::dead_letter_deliveries */
                SELECT id, exchange, routing_key, format, properties, body, digest, body_length, too_large
                FROM settled.dead_letters
                WHERE id = ANY ($1)",
                &[&ids],
            )
            .await?;
        let mut stored: HashMap<Uuid, Option<Delivery>> = rows
            .iter()
            .map(|row| {
                let id = row.get("id");
                (id, due::delivery(row, Source::Replayed { id }, dead_letters::cut(row)))
            })
            .collect();
        Ok(ids.iter().filter_map(|id| Some((*id, stored.remove(id)?))).collect())
    }

    /// Keeps a plan, and answers its number.
    ///
    /// # Errors
    /// The database is away or refuses; nothing is kept then, unless `at_commit` says that it is unknown.
    pub async fn save_plan(&self, act: Act<'_>, voucher: Option<&str>, items: &[PlanItem]) -> Result<i64, StoreError> {
        let session = self.session("save_plan").await?;
        session.begin().await?;
        let messages = i32::try_from(items.len()).unwrap_or(i32::MAX);
        let rows = session
            .query(
                "/* plans::save_plan */
                INSERT INTO settled.plans (at, operator, filters, messages, voucher)
                VALUES (date_trunc('milliseconds', now()), $1, $2::text::jsonb, $3, $4)
                RETURNING id",
                &[&act.operator, &act.filters.to_string(), &messages, &voucher],
            )
            .await?;
        let plan_id: i64 = session.one(&rows)?.get("id");
        let mut position = 0_i32;
        for slice in items.chunks(SLICE) {
            let ids: Vec<Uuid> = slice.iter().map(|item| item.id).collect();
            let verdicts: Vec<&str> = slice.iter().map(|item| item.verdict.as_str()).collect();
            let reasons: Vec<Option<&str>> = slice
                .iter()
                .map(|item| item.reason.as_ref().map(Reason::as_str))
                .collect();
            let details: Vec<Option<&str>> = slice.iter().map(|item| item.detail.as_deref()).collect();
            let amounts = || slice.iter().map(|item| item.amount.as_ref());
            let currencies: Vec<Option<&str>> = amounts()
                .map(|amount| amount.map(|amount| amount.currency.as_str()))
                .collect();
            let quantities: Vec<Option<String>> = amounts()
                .map(|amount| amount.map(|amount| amount.quantity.to_string()))
                .collect();
            session
                .execute_exactly(
                    slice.len(),
                    "/* plans::save_plan items */
                    INSERT INTO settled.plan_items (
                        plan_id, position, dead_letter_id, verdict, reason, detail, currency, quantity
                    )
                    SELECT $1, $2 + n.position, n.id, n.verdict, n.reason, n.detail, n.currency, n.quantity::numeric
                    FROM unnest(
                        $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[]
                    ) WITH ORDINALITY AS n (id, verdict, reason, detail, currency, quantity, position)",
                    &[
                        &plan_id,
                        &i64::from(position),
                        &ids,
                        &verdicts,
                        &reasons,
                        &details,
                        &currencies,
                        &quantities,
                    ],
                )
                .await?;
            position = position.saturating_add(i32::try_from(slice.len()).unwrap_or(i32::MAX));
        }
        let outcome = json!({"plan": plan_id, "messages": items.len()});
        write_audit(&session, act, &outcome, None).await?;
        session.commit().await?;
        Ok(plan_id)
    }

    /// A plan.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn plan(&self, id: i64) -> Result<Option<PlanRecord>, StoreError> {
        let session = self.session("plan").await?;
        let rows = session
            .query(&format!("/* plans::plan */ {PLAN} WHERE p.id = $1"), &[&id])
            .await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let settled = settling(&session, &[id]).await?;
        Ok(Some(plan_record(row, settled.get(&id).copied().unwrap_or_default())))
    }

    /// A page of plans, the newest first: of all, or of those that were made of these partners' messages alone.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn plans(
        &self,
        before: i64,
        partners: Option<&[String]>,
        limit: i64,
    ) -> Result<Vec<PlanRecord>, StoreError> {
        let session = self.session("plans").await?;
        let rows = session
            .query(
                &format!("/* plans::plans */ {PLAN} WHERE p.id < $1 AND {WITHIN} ORDER BY p.id DESC LIMIT $2"),
                &[&before, &limit, &partners],
            )
            .await?;
        // A plan is what it was when it was made.
        let kept = |row: &Row| self.plans_counted.get(row.get("id"), row.get("at"));
        let asked: Vec<i64> = rows
            .iter()
            .filter(|row| kept(row).is_none())
            .map(|row| row.get("id"))
            .collect();
        let counted = settling(&session, &asked).await?;
        let settled = |row: &Row| {
            let id: i64 = row.get("id");
            kept(row).unwrap_or_else(|| counted.get(&id).copied().unwrap_or_default())
        };
        let plans: Vec<PlanRecord> = rows.iter().map(|row| plan_record(row, settled(row))).collect();
        for plan in &plans {
            self.plans_counted.keep(plan.id, plan.at, plan.settled);
        }
        Ok(plans)
    }

    /// What a plan's messages would have come to when it was made; and the money, by currency.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn plan_verdicts(&self, id: i64) -> Result<(Vec<PlannedVerdicts>, Vec<(String, String)>), StoreError> {
        let session = self.session("plan_verdicts").await?;
        // One walk through the messages: what would settle has a currency, and no reason.
        let rows = session
            .query(
                "/* plans::plan_verdicts */
                SELECT verdict, reason, currency, count(*) AS messages, sum(quantity)::text AS quantity
                FROM settled.plan_items
                WHERE plan_id = $1
                GROUP BY verdict, reason, currency
                ORDER BY currency",
                &[&id],
            )
            .await?;
        let mut verdicts: Vec<PlannedVerdicts> = Vec::new();
        let mut money: Vec<(String, String)> = Vec::new();
        for row in &rows {
            let verdict: &str = row.get("verdict");
            let verdict = VerdictKind::parse(verdict).ok_or_else(|| {
                StoreError::ours("plan_verdicts", format!("this version knows no verdict {verdict:?}"))
            })?;
            let (reason, messages) = (
                row.get::<_, Option<&str>>("reason").map(Reason::written),
                row.get("messages"),
            );
            let line = verdicts
                .iter_mut()
                .find(|line| line.verdict == verdict && line.reason == reason);
            match line {
                Some(line) => line.messages += messages,
                None => verdicts.push(PlannedVerdicts {
                    verdict,
                    reason,
                    messages,
                }),
            }
            let sum = row.get::<_, Option<String>>("currency").zip(row.get("quantity"));
            money.extend(sum);
        }
        Ok((verdicts, money))
    }

    /// What the messages of a plan could move at most, whatever was planned of them: what is reserved under the ids that they
    /// name, by currency; and how many name an id that is not there yet.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn plan_at_most(&self, id: i64) -> Result<(Vec<(String, String)>, i64), StoreError> {
        let rows = self
            .session("plan_at_most")
            .await?
            .query(
                "/* plans::plan_at_most */
                WITH named AS MATERIALIZED (
                    SELECT DISTINCT d.allocation_id
                    FROM settled.plan_items AS i
                    JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
                    WHERE i.plan_id = $1
                      AND d.allocation_id IS NOT NULL
                )
                SELECT a.currency, sum(a.quantity)::text AS quantity, count(*) FILTER (WHERE a.id IS NULL) AS unknown
                FROM named AS n
                LEFT JOIN settled.allocations AS a ON a.id = n.allocation_id
                WHERE a.id IS NULL OR a.status = 'reserved'
                GROUP BY a.currency
                ORDER BY a.currency",
                &[&id],
            )
            .await?;
        let money = rows
            .iter()
            .filter_map(|row| Some((row.get::<_, Option<String>>(0)?, row.get(1))));
        let unknown = rows.iter().map(|row| row.get::<_, i64>("unknown")).sum();
        Ok((money.collect(), unknown))
    }

    /// How the messages of a plan stand now, by state; `purged` for those that are gone.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn plan_now(&self, id: i64) -> Result<Vec<StateNow>, StoreError> {
        let rows = self
            .session("plan_now")
            .await?
            .query(
                "/* plans::plan_now */
                SELECT coalesce(d.state, 'purged') AS state, count(*) AS messages,
                       count(*) FILTER (WHERE i.verdict = 'settled') AS would_settle
                FROM settled.plan_items AS i
                LEFT JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
                WHERE i.plan_id = $1
                GROUP BY 1
                ORDER BY 1",
                &[&id],
            )
            .await?;
        let now = rows.iter().map(|row| StateNow {
            state: row.get("state"),
            messages: row.get("messages"),
            would_settle: row.get("would_settle"),
        });
        Ok(now.collect())
    }

    /// The replays of a plan, the newest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn plan_runs(&self, id: i64) -> Result<Vec<i64>, StoreError> {
        const MOST: i64 = 100;
        let rows = self
            .session("plan_runs")
            .await?
            .query(
                "/* plans::plan_runs */ SELECT id FROM settled.runs WHERE plan_id = $1 ORDER BY id DESC LIMIT $2",
                &[&id, &MOST],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// The messages of a plan, in its order.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn plan_messages(&self, id: i64) -> Result<Vec<Uuid>, StoreError> {
        let rows = self
            .session("plan_messages")
            .await?
            .query(
                "/* plans::plan_messages */
                SELECT dead_letter_id FROM settled.plan_items WHERE plan_id = $1 ORDER BY position",
                &[&id],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get("dead_letter_id")).collect())
    }
}

//! What replays came to: of a run, and of messages that were replayed often.

use serde::Serialize;

use super::{RUN, Run, RunCounts, run};
use crate::store::{Store, StoreError};

/// How many messages of a run, planned so, came to what.
#[derive(Clone, Debug, Serialize)]
pub struct Came {
    pub planned: String,
    /// `waiting`, `due`, `judged` or `skipped`.
    pub state: String,
    pub verdict: Option<String>,
    pub reason: Option<String>,
    pub note: Option<String>,
    pub messages: i64,
}

/// Money of a currency, as the plan has it and as it moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Moved {
    pub currency: String,
    pub planned: String,
    pub moved: String,
}

impl Store {
    /// Messages of a plan that are open and were replayed so often already.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_replayed(&self, plan: i64, all_verdicts: bool, times: u32) -> Result<i64, StoreError> {
        let session = self.session("count_replayed").await?;
        let times = i32::try_from(times).unwrap_or(i32::MAX);
        let rows = session
            .query(
                "/* runs::count_replayed */
                SELECT count(*)
                FROM settled.plan_items AS i
                JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
                WHERE i.plan_id = $1
                  AND ($2 OR i.verdict = 'settled')
                  AND d.state = 'open'
                  AND d.replays >= $3",
                &[&plan, &all_verdicts, &times],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// Messages of a run that wait in it, are open and were replayed so often already; none where whoever began it or went on
    /// with it said that this is meant.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_waiting_worn(&self, run: i64, times: u32) -> Result<i64, StoreError> {
        let session = self.session("count_waiting_worn").await?;
        let times = i32::try_from(times).unwrap_or(i32::MAX);
        let rows = session
            .query(
                "/* runs::count_waiting_worn */
                SELECT count(*)
                FROM settled.run_items AS i
                JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
                WHERE i.run_id = $1
                  AND i.state = 'waiting'
                  AND d.state = 'open'
                  AND d.replays >= $2
                  AND NOT EXISTS (
                      SELECT
                      FROM settled.audit AS a
                      WHERE a.run_id = $1 AND a.act IN ('replay', 'resume') AND a.filters -> 'yesAgain' = 'true'
                  )",
                &[&run, &times],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// Messages of a run that wait in it and would be replayed: open ones, of partners that live here.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_going_on(&self, run: i64) -> Result<i64, StoreError> {
        let session = self.session("count_going_on").await?;
        let rows = session
            .query(
                "/* runs::count_going_on moving */ SELECT EXISTS (SELECT FROM settled.partners WHERE moving IS NOT NULL)",
                &[],
            )
            .await?;
        // Without one that moves an index says it all.
        let elsewhere = match session.one(&rows)?.get(0) {
            true => {
                "AND NOT EXISTS (
                    SELECT FROM settled.partners AS p WHERE p.enterprise_id = d.enterprise_id AND p.moving IS NOT NULL
                )"
            }
            false => "",
        };
        let rows = session
            .query(
                &format!(
                    "/* runs::count_going_on */
                    SELECT count(*)
                    FROM settled.run_items AS i
                    JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
                    WHERE i.run_id = $1 AND i.state = 'waiting' AND d.state = 'open' {elsewhere}"
                ),
                &[&run],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// A run with what its messages came to.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn run_came(&self, id: i64) -> Result<Option<(Run, Vec<Came>)>, StoreError> {
        let session = self.session("run_came").await?;
        // Of one moment. What they come to is few things, which the planner can not know.
        session.begin_sum().await?;
        let heads = session
            .query(&format!("/* runs::run_came run */ {RUN} WHERE r.id = $1"), &[&id])
            .await?;
        let rows = session
            .query(
                "/* runs::run_came */
                SELECT planned, state, verdict, reason, note, count(*) AS messages
                FROM settled.run_items
                WHERE run_id = $1
                GROUP BY planned, state, verdict, reason, note
                ORDER BY planned, state, verdict, reason, note",
                &[&id],
            )
            .await?;
        session.rollback().await;
        let came = rows
            .iter()
            .map(|row| Came {
                planned: row.get("planned"),
                state: row.get("state"),
                verdict: row.get("verdict"),
                reason: row.get("reason"),
                note: row.get("note"),
                messages: row.get("messages"),
            })
            .collect::<Vec<Came>>();
        Ok(heads.first().map(|head| (run(head, RunCounts::of_came(&came)), came)))
    }

    /// The money of a run, as the plan has it and as it moved.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn run_money(&self, id: i64) -> Result<Vec<Moved>, StoreError> {
        let session = self.session("run_money").await?;
        // What moved is asked of the transfers, not of the plan: of those that the judging batches made.
        let rows = session
            .query(
                "/* runs::run_money */
                SELECT m.currency, sum(m.planned)::text AS planned, sum(m.moved)::text AS moved
                FROM (
                    SELECT p.currency, p.quantity AS planned, 0 AS moved
                    FROM settled.run_items AS i
                    JOIN settled.runs AS r ON r.id = i.run_id
                    JOIN settled.plan_items AS p ON p.plan_id = r.plan_id AND p.position = i.position
                    WHERE i.run_id = $1 AND p.quantity IS NOT NULL
                    UNION ALL
                    SELECT a.currency, 0, t.amount
                    FROM settled.run_items AS i
                    JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
                    JOIN settled.transfers AS t
                      ON t.subject_id = d.allocation_id AND t.step = 1 AND t.batch_id = d.batch_id
                    JOIN settled.funds AS a ON a.id = t.debit_account / 4
                    WHERE i.run_id = $1 AND i.verdict = 'settled'
                ) AS m
                GROUP BY m.currency
                ORDER BY m.currency",
                &[&id],
            )
            .await?;
        Ok(rows
            .iter()
            .map(|row| Moved {
                currency: row.get("currency"),
                planned: row.get("planned"),
                moved: row.get("moved"),
            })
            .collect())
    }
}

impl RunCounts {
    /// The same numbers, of what the messages came to.
    fn of_came(came: &[Came]) -> Self {
        let mut counts = Self::default();
        for line in came {
            counts.messages += line.messages;
            match line.state.as_str() {
                "waiting" => counts.waiting += line.messages,
                "due" => counts.due += line.messages,
                "judged" => counts.judged += line.messages,
                _ => counts.skipped += line.messages,
            }
            if line.verdict.as_ref().is_some_and(|verdict| *verdict != line.planned) {
                counts.differ += line.messages;
            }
        }
        counts
    }
}

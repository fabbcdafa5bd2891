//! Replays of plans. A run's messages wait, are due, and are judged or skipped; the worker that judges a due one writes the
//! verdict. Locks are taken in one order: the run, dead letters by id, items.

mod counts;
mod outcome;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_postgres::Row;
use uuid::Uuid;

pub(super) use self::counts::RunCounts;
use self::counts::counts;
pub use self::outcome::{Came, Moved};
use super::{
    Session, Store, StoreError,
    audit::{Act, write_audit},
    plans::WITHIN,
    time::{maybe_time, time},
};

/// A run's state as its row has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    Running,
    Cancelled,
    /// By itself.
    Stopped,
    Done,
}

impl RunState {
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::Running => "running",
            RunState::Cancelled => "cancelled",
            RunState::Stopped => "stopped",
            RunState::Done => "done",
        }
    }

    fn of(row: &Row) -> Self {
        match row.get("state") {
            "running" => RunState::Running,
            "cancelled" => RunState::Cancelled,
            "stopped" => RunState::Stopped,
            _ => RunState::Done,
        }
    }
}

/// A run as it is asked for.
#[derive(Clone, Debug)]
pub struct NewRun {
    pub plan: i64,
    pub canary: Option<i32>,
    /// Messages a second.
    pub rate: Option<f64>,
    pub all_verdicts: bool,
    /// Who vouches for the name of whoever begins it.
    pub voucher: Option<Arc<str>>,
}

/// A program that drives a run, and for how long it is believed to live without a sign.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    pub id: Uuid,
    pub lease: Duration,
}

/// A run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    pub id: i64,
    pub plan: i64,
    /// `running`, `stalled` (running, and its program is gone), `cancelled`, `stopped` or `done`.
    pub state: &'static str,
    pub note: Option<String>,
    pub operator: String,
    pub why: String,
    pub canary: Option<i32>,
    pub rate: Option<f64>,
    pub all_verdicts: bool,
    #[serde(serialize_with = "time")]
    pub started_at: Timestamp,
    #[serde(serialize_with = "time")]
    pub changed_at: Timestamp,
    /// Until when its program is taken to be alive.
    #[serde(serialize_with = "maybe_time")]
    pub driven_until: Option<Timestamp>,
    pub messages: i64,
    pub waiting: i64,
    pub due: i64,
    pub judged: i64,
    pub skipped: i64,
    /// Judged, and not as planned.
    pub differ: i64,
}

const RUN: &str = "\
    SELECT r.id, r.plan_id, r.state, r.note, r.operator, r.why, r.canary, r.rate, r.all_verdicts, r.started_at,
           r.changed_at, r.driven_until, coalesce(r.driven_until < clock_timestamp(), true) AS stalled
    FROM settled.runs AS r";

fn run(row: &Row, counts: RunCounts) -> Run {
    let state = RunState::of(row);
    Run {
        id: row.get("id"),
        plan: row.get("plan_id"),
        state: if state == RunState::Running && row.get("stalled") {
            "stalled"
        } else {
            state.as_str()
        },
        note: row.get("note"),
        operator: row.get("operator"),
        why: row.get("why"),
        canary: row.get("canary"),
        rate: row.get("rate"),
        all_verdicts: row.get("all_verdicts"),
        started_at: row.get("started_at"),
        changed_at: row.get("changed_at"),
        driven_until: row.get("driven_until"),
        messages: counts.messages,
        waiting: counts.waiting,
        due: counts.due,
        judged: counts.judged,
        skipped: counts.skipped,
        differ: counts.differ,
    }
}

async fn one(session: &Session, id: i64) -> Result<Option<Run>, StoreError> {
    let rows = session
        .query(&format!("/* runs::one */ {RUN} WHERE r.id = $1"), &[&id])
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let counted = counts(session, &[id]).await?;
    Ok(Some(run(row, counted.get(&id).copied().unwrap_or_default())))
}

/// What became of a slice of waiting messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marked {
    pub due: usize,
    /// They are not open any more.
    pub skipped: usize,
}

/// Whether a run is still ours to drive.
#[derive(Clone, Copy, Debug)]
pub enum Driven<T> {
    Ours(T),
    /// Cancelled, or taken over.
    Lost,
}

/// What came of an attempt to take up or cancel a run.
#[derive(Clone, Debug)]
pub enum RunChange {
    /// It was in this state, and is changed.
    From(RunState),
    /// It is as it was: its state, and until when its program is believed to live.
    Refused(RunState, Option<Timestamp>),
    NoSuchRun,
}

impl Store {
    /// Begins a run of a plan, and answers its number. None if there is no such plan.
    ///
    /// # Errors
    /// The database is away or refuses; nothing has begun then, unless `at_commit` says that it is unknown.
    pub async fn begin_run(&self, act: Act<'_>, wish: &NewRun, driver: Driver) -> Result<Option<i64>, StoreError> {
        let session = self.session("begin_run").await?;
        session.begin().await?;
        // Held against a purge.
        let plan = session
            .query(
                "/* runs::begin_run plan */ SELECT FROM settled.plans WHERE id = $1 FOR KEY SHARE",
                &[&wish.plan],
            )
            .await?;
        if plan.is_empty() {
            session.rollback().await;
            return Ok(None);
        }
        let rows = session
            .query(
                "/* runs::begin_run */
                INSERT INTO settled.runs (
                    plan_id, state, operator, why, canary, rate, all_verdicts, started_at, changed_at, driver, driven_until,
                    voucher
                )
                VALUES (
                    $1, 'running', $2, $3, $4, $5, $6, date_trunc('milliseconds', now()),
                    date_trunc('milliseconds', now()), $7, clock_timestamp() + make_interval(secs => $8), $9
                )
                RETURNING id",
                &[
                    &wish.plan,
                    &act.operator,
                    &act.why.unwrap_or_default(),
                    &wish.canary,
                    &wish.rate,
                    &wish.all_verdicts,
                    &driver.id,
                    &driver.lease.as_secs_f64(),
                    &wish.voucher.as_deref(),
                ],
            )
            .await?;
        let run_id: i64 = session.one(&rows)?.get("id");
        let messages = session
            .execute(
                "/* runs::begin_run items */
                INSERT INTO settled.run_items (run_id, position, dead_letter_id, planned)
                SELECT $1, position, dead_letter_id, verdict
                FROM settled.plan_items
                WHERE plan_id = $2
                  AND ($3 OR verdict = 'settled')",
                &[&run_id, &wish.plan, &wish.all_verdicts],
            )
            .await?;
        let outcome = json!({"run": run_id, "plan": wish.plan, "messages": messages});
        write_audit(&session, act, &outcome, Some(run_id)).await?;
        session.commit().await?;
        Ok(Some(run_id))
    }

    /// Takes up a run that was cancelled, stopped, or whose program is gone; at another rate, if one is given.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn resume_run(
        &self,
        act: Act<'_>,
        id: i64,
        rate: Option<f64>,
        driver: Driver,
    ) -> Result<RunChange, StoreError> {
        let session = self.session("resume_run").await?;
        session.begin().await?;
        let Some((state, until, stalled)) = lock_run(&session, id).await? else {
            session.rollback().await;
            return Ok(RunChange::NoSuchRun);
        };
        let free = match state {
            RunState::Cancelled | RunState::Stopped => true,
            RunState::Running => stalled,
            RunState::Done => false,
        };
        if !free {
            session.rollback().await;
            return Ok(RunChange::Refused(state, until));
        }
        session
            .execute_exactly(
                1,
                "/* runs::resume_run */
                UPDATE settled.runs
                SET state = 'running',
                    note = NULL,
                    changed_at = date_trunc('milliseconds', now()),
                    driver = $2,
                    driven_until = clock_timestamp() + make_interval(secs => $3),
                    rate = coalesce($4, rate)
                WHERE id = $1",
                &[&id, &driver.id, &driver.lease.as_secs_f64(), &rate],
            )
            .await?;
        let was = if state == RunState::Running {
            "stalled"
        } else {
            state.as_str()
        };
        write_audit(&session, act, &json!({"run": id, "was": was}), Some(id)).await?;
        session.commit().await?;
        Ok(RunChange::From(state))
    }

    /// Cancels a run: what is due waits again. What a worker judges at this moment gets its verdict all the same.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn cancel_run(&self, act: Act<'_>, id: i64) -> Result<RunChange, StoreError> {
        let session = self.session("cancel_run").await?;
        session.begin().await?;
        let Some((state, until, _)) = lock_run(&session, id).await? else {
            session.rollback().await;
            return Ok(RunChange::NoSuchRun);
        };
        if state != RunState::Running {
            session.rollback().await;
            return Ok(RunChange::Refused(state, until));
        }
        end(&session, act, id, RunState::Cancelled, None).await?;
        session.commit().await?;
        Ok(RunChange::From(state))
    }

    /// Ends a run that is ours: done, or stopped or cancelled, and then what is due waits again.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn end_run(
        &self,
        act: Act<'_>,
        id: i64,
        driver: Uuid,
        state: RunState,
        note: Option<&str>,
    ) -> Result<Driven<()>, StoreError> {
        let session = self.session("end_run").await?;
        session.begin().await?;
        let ours = session
            .query(
                "/* runs::end_run */
                SELECT FROM settled.runs WHERE id = $1 AND driver = $2 AND state = 'running' FOR NO KEY UPDATE",
                &[&id, &driver],
            )
            .await?;
        if ours.is_empty() {
            session.rollback().await;
            return Ok(Driven::Lost);
        }
        end(&session, act, id, state, note).await?;
        session.commit().await?;
        Ok(Driven::Ours(()))
    }

    /// Marks the next waiting messages of a run as due. One that is not open any more is skipped, and one whose partner moves to
    /// another cell, or did: nobody would judge it.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn mark_due(&self, id: i64, driver: Driver, limit: usize) -> Result<Driven<Marked>, StoreError> {
        let session = self.session("mark_due").await?;
        session.begin().await?;
        if !sign_of_life(&session, id, driver).await? {
            session.rollback().await;
            return Ok(Driven::Lost);
        }
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = session
            .query(
                "/* runs::mark_due next */
                SELECT dead_letter_id
                FROM settled.run_items
                WHERE run_id = $1 AND state = 'waiting'
                ORDER BY position
                LIMIT $2",
                &[&id, &limit],
            )
            .await?;
        let next: Vec<Uuid> = rows.iter().map(|row| row.get("dead_letter_id")).collect();
        let rows = session
            .query(
                "/* runs::mark_due lock */
                SELECT d.id, d.state,
                       EXISTS (
                           SELECT FROM settled.partners AS p WHERE p.enterprise_id = d.enterprise_id AND p.moving IS NOT NULL
                       ) AS is_elsewhere
                FROM settled.dead_letters AS d
                WHERE d.id = ANY ($1)
                ORDER BY d.id
                FOR NO KEY UPDATE OF d",
                &[&next],
            )
            .await?;
        // Items change only under the locks of their messages. Before this one was had, a worker may have judged what it
        // claimed before the run was cancelled: its item waits no more, whatever became of the message.
        let waiting = session
            .query(
                "/* runs::mark_due still waiting */
                SELECT dead_letter_id
                FROM settled.run_items
                WHERE run_id = $1 AND state = 'waiting' AND dead_letter_id = ANY ($2)",
                &[&id, &next],
            )
            .await?;
        let next: Vec<Uuid> = waiting.iter().map(|row| row.get("dead_letter_id")).collect();
        let open: Vec<Uuid> = rows
            .iter()
            .filter(|row| row.get::<_, &str>("state") == "open" && !row.get::<_, bool>("is_elsewhere"))
            .map(|row| row.get("id"))
            .filter(|id| next.contains(id))
            .collect();
        session
            .execute_exactly(
                open.len(),
                "/* runs::mark_due */
                UPDATE settled.dead_letters SET state = 'due', run_id = $1 WHERE id = ANY ($2)",
                &[&id, &open],
            )
            .await?;
        session
            .execute_exactly(
                next.len(),
                "/* runs::mark_due items */
                UPDATE settled.run_items AS i
                SET state = CASE WHEN w.id = ANY ($3) THEN 'due' ELSE 'skipped' END,
                    note = CASE
                        WHEN w.id = ANY ($3) THEN NULL
                        WHEN d.id IS NULL THEN 'it was purged'
                        WHEN d.state = 'due' THEN 'it is due in run ' || d.run_id
                        WHEN d.state = 'open' THEN 'its partner is on its way to another cell, or lives there'
                        ELSE 'it is ' || d.state
                    END
                FROM unnest($2::uuid[]) AS w (id)
                LEFT JOIN settled.dead_letters AS d ON d.id = w.id
                WHERE i.run_id = $1 AND i.dead_letter_id = w.id",
                &[&id, &next, &open],
            )
            .await?;
        session.commit().await?;
        Ok(Driven::Ours(Marked {
            due: open.len(),
            skipped: next.len() - open.len(),
        }))
    }

    /// Says that the program that drives a run is alive, and asks how far the run is.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn drive_on(&self, id: i64, driver: Driver) -> Result<Driven<Run>, StoreError> {
        let session = self.session("drive_on").await?;
        if !sign_of_life(&session, id, driver).await? {
            return Ok(Driven::Lost);
        }
        Ok(one(&session, id).await?.map_or(Driven::Lost, Driven::Ours))
    }

    /// One run.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn run(&self, id: i64) -> Result<Option<Run>, StoreError> {
        one(&self.session("run").await?, id).await
    }

    /// A page of runs, the newest first: of all, or of plans of these partners alone.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn runs(&self, before: i64, partners: Option<&[String]>, limit: i64) -> Result<Vec<Run>, StoreError> {
        let session = self.session("runs").await?;
        let rows = session
            .query(
                &format!(
                    "/* runs::runs */ {RUN} WHERE r.id < $1
                        AND ($3::text[] IS NULL OR EXISTS (SELECT FROM settled.plans AS p WHERE p.id = r.plan_id AND {WITHIN}))
                    ORDER BY r.id DESC LIMIT $2"
                ),
                &[&before, &limit, &partners],
            )
            .await?;
        // Nothing of a run that is over changes any more.
        let kept = |row: &Row| match RunState::of(row) {
            RunState::Done => self.runs_counted.get(row.get("id"), row.get("changed_at")),
            _ => None,
        };
        let asked: Vec<i64> = rows
            .iter()
            .filter(|row| kept(row).is_none())
            .map(|row| row.get("id"))
            .collect();
        let counted = counts(&session, &asked).await?;
        let counts_of = |row: &Row| {
            let id: i64 = row.get("id");
            kept(row).unwrap_or_else(|| counted.get(&id).copied().unwrap_or_default())
        };
        let runs: Vec<Run> = rows.iter().map(|row| run(row, counts_of(row))).collect();
        for (run, row) in runs
            .iter()
            .zip(&rows)
            .filter(|(run, _)| run.state == RunState::Done.as_str())
        {
            self.runs_counted.keep(run.id, run.changed_at, counts_of(row));
        }
        Ok(runs)
    }
}

async fn lock_run(session: &Session, id: i64) -> Result<Option<(RunState, Option<Timestamp>, bool)>, StoreError> {
    let rows = session
        .query(
            "/* runs::lock_run */
            SELECT state, driven_until, coalesce(driven_until < clock_timestamp(), true) AS stalled
            FROM settled.runs
            WHERE id = $1
            FOR NO KEY UPDATE",
            &[&id],
        )
        .await?;
    Ok(rows
        .first()
        .map(|row| (RunState::of(row), row.get("driven_until"), row.get("stalled"))))
}

/// Renews the driver's lease. False if the run is no longer its own.
async fn sign_of_life(session: &Session, id: i64, driver: Driver) -> Result<bool, StoreError> {
    let renewed = session
        .execute(
            "/* runs::sign_of_life */
            UPDATE settled.runs
            SET driven_until = clock_timestamp() + make_interval(secs => $3)
            WHERE id = $1 AND driver = $2 AND state = 'running'",
            &[&id, &driver.id, &driver.lease.as_secs_f64()],
        )
        .await?;
    Ok(renewed == 1)
}

/// Ends a locked run; what is due waits again.
async fn end(session: &Session, act: Act<'_>, id: i64, state: RunState, note: Option<&str>) -> Result<(), StoreError> {
    session
        .execute_exactly(
            1,
            "/* runs::end */
            UPDATE settled.runs
            SET state = $2,
                note = $3,
                changed_at = date_trunc('milliseconds', now()),
                driver = NULL,
                driven_until = NULL
            WHERE id = $1",
            &[&id, &state.as_str(), &note],
        )
        .await?;
    session
        .query(
            "/* runs::end lock */
            SELECT
            FROM settled.dead_letters
            WHERE id IN (SELECT dead_letter_id FROM settled.run_items WHERE run_id = $1 AND state = 'due')
            ORDER BY id
            FOR NO KEY UPDATE",
            &[&id],
        )
        .await?;
    session
        .execute(
            "/* runs::end messages */
            UPDATE settled.dead_letters AS d
            SET state = 'open'
            FROM settled.run_items AS i
            WHERE i.run_id = $1 AND i.state = 'due' AND d.id = i.dead_letter_id AND d.state = 'due' AND d.run_id = $1",
            &[&id],
        )
        .await?;
    session
        .execute(
            "/* runs::end items */
            UPDATE settled.run_items SET state = 'waiting' WHERE run_id = $1 AND state = 'due'",
            &[&id],
        )
        .await?;
    let rows = session
        .query(
            "/* runs::end outcome */
            SELECT coalesce(verdict, state) AS word, count(*) AS messages
            FROM settled.run_items
            WHERE run_id = $1
            GROUP BY 1",
            &[&id],
        )
        .await?;
    let mut outcome: serde_json::Map<String, Value> = rows
        .iter()
        .map(|row| (row.get("word"), json!(row.get::<_, i64>("messages"))))
        .collect();
    outcome.insert("run".into(), json!(id));
    outcome.insert("state".into(), json!(state.as_str()));
    if let Some(note) = note {
        outcome.insert("note".into(), json!(note));
    }
    write_audit(session, act, &Value::Object(outcome), Some(id))
        .await
        .map(drop)
}

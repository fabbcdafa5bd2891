//! How many messages of a run are where.

use std::collections::HashMap;

use tokio_postgres::Row;

use super::{Session, StoreError};

/// How many messages of some runs ($1) are where.
const COUNTS: &str = "\
    SELECT i.run_id, count(*) AS messages,
           count(*) FILTER (WHERE i.state = 'waiting') AS waiting,
           count(*) FILTER (WHERE i.state = 'due') AS due,
           count(*) FILTER (WHERE i.state = 'judged') AS judged,
           count(*) FILTER (WHERE i.state = 'skipped') AS skipped,
           count(*) FILTER (WHERE i.verdict <> i.planned) AS differ
    FROM settled.run_items AS i
    WHERE i.run_id = ANY ($1)
    GROUP BY i.run_id";

/// How many messages of a run are where.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::store) struct RunCounts {
    pub(super) messages: i64,
    pub(super) waiting: i64,
    pub(super) due: i64,
    pub(super) judged: i64,
    pub(super) skipped: i64,
    pub(super) differ: i64,
}

impl RunCounts {
    fn of(row: &Row) -> Self {
        Self {
            messages: row.get("messages"),
            waiting: row.get("waiting"),
            due: row.get("due"),
            judged: row.get("judged"),
            skipped: row.get("skipped"),
            differ: row.get("differ"),
        }
    }
}

/// The counts of some runs; what has no message is missing.
pub(super) async fn counts(session: &Session, ids: &[i64]) -> Result<HashMap<i64, RunCounts>, StoreError> {
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = session.query(&format!("/* runs::counts */ {COUNTS}"), &[&ids]).await?;
    Ok(rows.iter().map(|row| (row.get("run_id"), RunCounts::of(row))).collect())
}

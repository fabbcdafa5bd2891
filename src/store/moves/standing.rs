//! What would move, what is in the way, and what is under way still.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::tables::TABLES;
use crate::store::{Store, StoreError};

/// What was held and allocated on a connection, in one currency.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MovedBalance {
    pub connection_id: Uuid,
    pub currency: String,
    pub quantity: String,
}

/// What a partner would take along, and what it would leave.
#[derive(Clone, Debug, Default)]
pub struct MoveCounts {
    pub rows: BTreeMap<&'static str, i64>,
    pub funds: Vec<MovedBalance>,
    /// Messages in the side room: they are handed over.
    pub held: i64,
    /// Open dead letters: they stay.
    pub open_dead_letters: i64,
    /// Dead letters that are being replayed: they are in the way.
    pub replays: i64,
}

impl Store {
    /// Counts what a move would take along.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_for_move(&self, enterprise_id: &str) -> Result<MoveCounts, StoreError> {
        let mut session = self.session("count_for_move").await?;
        session.begin_long().await?;
        let mut counts = MoveCounts::default();
        for table in TABLES {
            let sql = format!(
                "/* moves::count_for_move */ SELECT count(*) FROM ({}) AS n",
                table.source.replace("{whose}", enterprise_id)
            );
            let rows = session.query(&sql, &[]).await?;
            counts.rows.insert(table.name, session.one(&rows)?.get(0));
        }
        let rows = session
            .query(
                "/* moves::count_for_move funds */
                SELECT c.connection_id, f.currency, (f.held + f.allocated)::text AS quantity
                FROM settled.connections AS c
                JOIN settled.funds AS f ON f.holder = 'connection' AND f.owner = c.connection_id
                WHERE c.enterprise_id = $1
                  AND f.held + f.allocated > 0
                ORDER BY f.currency, c.connection_id",
                &[&enterprise_id],
            )
            .await?;
        counts.funds = rows.iter().map(balance).collect();
        let rows = session
            .query(
                "/* moves::count_for_move messages */
                SELECT (SELECT coalesce(sum(messages), 0)::bigint FROM settled.held WHERE whose = $1),
                       count(*) FILTER (WHERE state = 'open'),
                       count(*) FILTER (WHERE state IN ('due', 'parked'))
                FROM settled.dead_letters
                WHERE enterprise_id = $1",
                &[&enterprise_id],
            )
            .await?;
        let row = session.one(&rows)?;
        (counts.held, counts.open_dead_letters, counts.replays) = (row.get(0), row.get(1), row.get(2));
        session.rollback().await;
        Ok(counts)
    }

    /// What came in with a move.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn arrived_funds(&self, id: Uuid) -> Result<Vec<MovedBalance>, StoreError> {
        let rows = self
            .session("arrived_funds")
            .await?
            .query(
                "/* moves::arrived_funds */
                SELECT connection_id, currency, sum(quantity)::text AS quantity
                FROM settled.moved_funds
                WHERE move_id = $1
                  AND left_from IS NULL
                GROUP BY connection_id, currency
                ORDER BY currency, connection_id",
                &[&id],
            )
            .await?;
        Ok(rows.iter().map(balance).collect())
    }

    /// The transactions that run now: whatever one of them read may be from before the pause.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn running_transactions(&self) -> Result<Vec<String>, StoreError> {
        self.running(None).await
    }

    /// Which of them run still.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn still_running(&self, before: &[String]) -> Result<Vec<String>, StoreError> {
        self.running(Some(before)).await
    }

    /// Everybody may see these locks, whoever's they are. Processes of the server's own have no user. What is prepared to commit
    /// has no process.
    async fn running(&self, of: Option<&[String]>) -> Result<Vec<String>, StoreError> {
        let rows = self
            .session("running_transactions")
            .await?
            .query(
                "/* moves::running_transactions */
                SELECT r.name
                FROM (
                    SELECT l.virtualtransaction AS name
                    FROM pg_locks AS l
                    JOIN pg_stat_activity AS a ON a.pid = l.pid
                    WHERE l.locktype = 'virtualxid'
                      AND a.datname = current_database()
                      AND a.usesysid IS NOT NULL
                      AND l.pid <> pg_backend_pid()
                    UNION ALL
                    SELECT 'prepared ' || p.gid FROM pg_prepared_xacts AS p WHERE p.database = current_database()
                ) AS r
                WHERE $1::text[] IS NULL OR r.name = ANY ($1)",
                &[&of],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Dead letters of a partner that are being replayed.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn replays_under_way(&self, enterprise_id: &str) -> Result<i64, StoreError> {
        let session = self.session("replays_under_way").await?;
        let rows = session
            .query(
                "/* moves::replays_under_way */
                SELECT count(*)
                FROM settled.dead_letters
                WHERE enterprise_id = $1
                  AND state IN ('due', 'parked')",
                &[&enterprise_id],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// Batches from before a moment that have something to publish still: so many. What waits to be told of partners themselves
    /// (format 3) needs nothing that moves.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn unpublished_before(&self, at: Timestamp) -> Result<i64, StoreError> {
        let session = self.session("unpublished_before").await?;
        let rows = session
            .query(
                "/* moves::unpublished_before */
                SELECT count(*) FROM settled.outbox WHERE created_at <= $1 AND format <> 3",
                &[&at],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }
}

fn balance(row: &tokio_postgres::Row) -> MovedBalance {
    MovedBalance {
        connection_id: row.get("connection_id"),
        currency: row.get("currency"),
        quantity: row.get("quantity"),
    }
}

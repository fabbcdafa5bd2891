//! Parked messages that are due, claimed for judgement.

use std::time::Duration;

use tokio_postgres::Row;
use uuid::Uuid;

use super::{Store, StoreError, outbox};
use crate::{
    domain::delivery::{Cut, Delivery, Source},
    fail::Point,
};

/// Stored messages that are ours to judge, for as long as the lease runs.
#[derive(Debug, Default)]
pub struct Claimed {
    /// Oldest first.
    pub deliveries: Vec<Delivery>,
    /// Rows of a format that this version can not read: they wait for a version that can.
    pub unreadable: Vec<Uuid>,
}

impl Claimed {
    pub fn is_empty(&self) -> bool {
        self.deliveries.is_empty() && self.unreadable.is_empty()
    }

    /// One row, with its message.
    pub(super) fn take(&mut self, row: &Row, id: Uuid, source: Source, cut: Option<Cut>) {
        match delivery(row, source, cut) {
            Some(delivery) => self.deliveries.push(delivery),
            None => self.unreadable.push(id),
        }
    }
}

/// A row as the message it is, for judgement. None where this version does not read its format.
pub(super) fn delivery(row: &Row, source: Source, cut: Option<Cut>) -> Option<Delivery> {
    Some(Delivery {
        exchange: row.get("exchange"),
        routing_key: row.get("routing_key"),
        properties: outbox::properties(row)?,
        body: row.get("body"),
        cut: cut.map(Box::new),
        redelivered: false,
        source,
    })
}

impl Store {
    /// Claims parked messages that are due, oldest first, and none of partners in quarantine: at most so many, and so many bytes, except that one always fits.
    /// Until the lease ends no other worker takes them. Both times are the statement's, and so equal: a `due_at` below
    /// `leased_until` says that the message was woken.
    ///
    /// # Errors
    /// The database is away.
    pub async fn claim_due(&self, max: usize, max_bytes: usize, lease: Duration) -> Result<Claimed, StoreError> {
        let session = self.session("claim_due").await?;
        let limit = i64::try_from(max).unwrap_or(i64::MAX);
        let bytes = i64::try_from(max_bytes).unwrap_or(i64::MAX);
        let mut rows = session
            .query(
                "/* due::claim_due */
                WITH due AS MATERIALIZED (
                    SELECT key, seq, octet_length(body) + octet_length(properties) AS size
                    FROM settled.parked
                    WHERE due_at <= statement_timestamp()
                      AND NOT EXISTS (
                          SELECT
                          FROM settled.partners AS q
                          WHERE q.enterprise_id = parked.enterprise_id
                            AND q.quarantined_at IS NOT NULL
                      )
                    ORDER BY seq
                    LIMIT $1
                    FOR UPDATE OF parked SKIP LOCKED
                ), total AS (
                    SELECT key, size, sum(size) OVER (ORDER BY seq) AS bytes
                    FROM due
                )
                UPDATE settled.parked AS p
                SET due_at = statement_timestamp() + make_interval(secs => $3),
                    leased_until = statement_timestamp() + make_interval(secs => $3)
                FROM total AS t
                WHERE p.key = t.key
                  AND (t.bytes <= $2 OR t.bytes = t.size)
                RETURNING p.seq, p.key, p.exchange, p.routing_key, p.format, p.properties, p.body, p.dead_letter_id",
                &[&limit, &bytes, &lease.as_secs_f64()],
            )
            .await?;
        if !rows.is_empty() {
            session.pass(Point::DueClaimed).await?;
        }
        rows.sort_by_key(|row| row.get::<_, i64>("seq"));
        let mut claimed = Claimed::default();
        for row in rows {
            let key: Uuid = row.get("key");
            let (seq, dead_letter) = (row.get("seq"), row.get("dead_letter_id"));
            // What is too large is never parked.
            claimed.take(&row, key, Source::Parked { key, seq, dead_letter }, None);
        }
        Ok(claimed)
    }

    /// Lets parked messages and replays that were claimed wait on, unless somebody has locked them: those wait until their
    /// lease ends.
    ///
    /// # Errors
    /// They wait until their lease ends.
    pub async fn postpone(&self, sources: &[Source], wait: Duration) -> Result<(), StoreError> {
        let session = self.session("postpone").await?;
        let (mut parked, mut replayed) = (Vec::new(), Vec::new());
        for source in sources {
            match source {
                Source::Parked { key, .. } => parked.push(*key),
                Source::Replayed { id } => replayed.push(*id),
                Source::Queue { .. } | Source::Held { .. } | Source::Plain => {}
            }
        }
        session
            .execute(
                "/* due::postpone parked */
                UPDATE settled.parked AS p
                SET due_at = least(p.due_at, statement_timestamp() + make_interval(secs => $2)),
                    leased_until = NULL
                FROM (
                    SELECT key FROM settled.parked WHERE key = ANY ($1) ORDER BY key FOR UPDATE SKIP LOCKED
                ) AS free
                WHERE p.key = free.key",
                &[&parked, &wait.as_secs_f64()],
            )
            .await?;
        session
            .execute(
                "/* due::postpone replayed */
                UPDATE settled.dead_letters AS d
                SET leased_until = statement_timestamp() + make_interval(secs => $2)
                FROM (
                    SELECT id FROM settled.dead_letters
                    WHERE id = ANY ($1) AND state = 'due'
                    ORDER BY id
                    FOR UPDATE SKIP LOCKED
                ) AS free
                WHERE d.id = free.id",
                &[&replayed, &wait.as_secs_f64()],
            )
            .await
            .map(drop)
    }

    /// Counts the bytes of all parked messages, for whatever is judged from now on: it may be parked.
    ///
    /// # Errors
    /// The database is away.
    pub async fn count_parked_bytes(&self) -> Result<(), StoreError> {
        let session = self.session("count_parked_bytes").await?;
        let rows = session
            .query(
                "/* due::count_parked_bytes */ SELECT coalesce(sum(bytes), 0)::bigint FROM settled.parked",
                &[],
            )
            .await?;
        let bytes: i64 = session.one(&rows)?.get(0);
        let bytes = u64::try_from(bytes).unwrap_or_default();
        self.parked_bytes.store(bytes, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    /// How many messages are parked.
    ///
    /// # Errors
    /// The database is away.
    pub async fn count_parked(&self) -> Result<u64, StoreError> {
        let session = self.session("count_parked").await?;
        let rows = session
            .query("/* due::count_parked */ SELECT count(*) FROM settled.parked", &[])
            .await?;
        let count: i64 = session.one(&rows)?.get(0);
        Ok(u64::try_from(count).unwrap_or_default())
    }
}

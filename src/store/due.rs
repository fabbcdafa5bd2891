//! Parked messages that are due, claimed for judgement.

use std::time::Duration;

use super::{Fate, Store, StoreError, outbox};
use crate::domain::delivery::{Delivery, Source};

impl Store {
    /// Claims parked messages that are due, oldest first. Until the lease ends no other worker takes them. Both times are
    /// the statement's, and so equal: a `due_at` below `leased_until` says that the message was woken.
    ///
    /// # Errors
    /// The database is away, or a row can not be read by this version.
    pub async fn claim_due(&self, max: usize, lease: Duration) -> Result<Vec<Delivery>, StoreError> {
        let session = self.session("claim_due").await?;
        let limit = i64::try_from(max).unwrap_or(i64::MAX);
        let mut rows = session
            .query(
                "/* due::claim_due */
                UPDATE settled.parked AS p
                SET due_at = statement_timestamp() + make_interval(secs => $2),
                    leased_until = statement_timestamp() + make_interval(secs => $2)
                FROM (
                    SELECT key
                    FROM settled.parked
                    WHERE due_at <= clock_timestamp()
                    ORDER BY seq
                    LIMIT $1
                    FOR UPDATE SKIP LOCKED
                ) AS due
                WHERE p.key = due.key
                RETURNING p.seq, p.key, p.exchange, p.routing_key, p.format, p.properties, p.body",
                &[&limit, &lease.as_secs_f64()],
            )
            .await?;
        rows.sort_by_key(|row| row.get::<_, i64>("seq"));
        rows.iter()
            .map(|row| {
                let properties = (row.get::<_, i16>("format") == outbox::FORMAT)
                    .then(|| outbox::parse_properties(row.get("properties")))
                    .flatten();
                let properties = properties.ok_or_else(|| {
                    let key: uuid::Uuid = row.get("key");
                    let sentence = format!("the parked message {key} is of a format that this version can not read");
                    StoreError::new("claim_due", Fate::Ours, sentence)
                })?;
                Ok(Delivery {
                    exchange: row.get("exchange"),
                    routing_key: row.get("routing_key"),
                    body: row.get("body"),
                    properties,
                    redelivered: false,
                    source: Source::Parked,
                })
            })
            .collect()
    }

    /// How many messages are parked.
    ///
    /// # Errors
    /// The database is away.
    pub async fn count_parked(&self) -> Result<u64, StoreError> {
        let rows = self
            .session("count_parked")
            .await?
            .query("/* due::count_parked */ SELECT count(*) FROM settled.parked", &[])
            .await?;
        let count: i64 = rows.first().map_or(0, |row| row.get(0));
        Ok(u64::try_from(count).unwrap_or_default())
    }
}

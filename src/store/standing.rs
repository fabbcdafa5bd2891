//! How things stand, for who watches: cheap enough to be asked every few seconds.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::reason::Reason;

/// What was settled in a minute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MinuteOfBatches {
    pub at: Timestamp,
    pub received: i64,
    pub settled: i64,
    pub duplicate: i64,
    pub parked: i64,
    pub rejected: i64,
}

/// Messages of a group in a part of a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrendOfGroup {
    pub group: String,
    /// Which part, from 0.
    pub part: i32,
    pub messages: i64,
}

/// When something of a partner came last, as far as it was written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartnerSeen {
    /// A message that a key of its own had signed, whatever came of it.
    pub signed_at: Option<Timestamp>,
    /// A message that is held still, and was not judged.
    pub held_at: Option<Timestamp>,
    /// A message under its name that was refused: whoever sent it.
    pub refused_at: Option<Timestamp>,
}

/// The smallest id that a batch of this time may have: they begin with their time.
fn first_id(at: Timestamp) -> Uuid {
    let ms = u128::try_from(at.as_millisecond()).unwrap_or_default();
    Uuid::from_u128(ms << 80)
}

impl Store {
    /// What the batches of the last minutes came to, minute by minute; minutes without one are left out.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn minutes_of_batches(&self, last: Duration) -> Result<(Timestamp, Vec<MinuteOfBatches>), StoreError> {
        // Workers' clocks make the ids, and may be a little off.
        const SLACK: Duration = Duration::from_secs(120);
        let session = self.session("minutes_of_batches").await?;
        let rows = session
            .query("/* standing::minutes_of_batches now */ SELECT clock_timestamp()", &[])
            .await?;
        let now: Timestamp = session.one(&rows)?.get(0);
        let since = now.saturating_sub(last).unwrap_or(Timestamp::MIN);
        let first = first_id(since.saturating_sub(SLACK).unwrap_or(Timestamp::MIN));
        let rows = session
            .query(
                "/* standing::minutes_of_batches */
                SELECT date_trunc('minute', at) AS minute, sum(received)::bigint AS received,
                       sum(settled)::bigint AS settled, sum(duplicate)::bigint AS duplicate,
                       sum(parked)::bigint AS parked, sum(rejected)::bigint AS rejected
                FROM settled.batches
                WHERE id >= $1 AND at >= date_trunc('minute', $2::timestamptz)
                GROUP BY 1
                ORDER BY 1",
                &[&first, &since],
            )
            .await?;
        let minutes = rows.iter().map(|row| MinuteOfBatches {
            at: row.get("minute"),
            received: row.get("received"),
            settled: row.get("settled"),
            duplicate: row.get("duplicate"),
            parked: row.get("parked"),
            rejected: row.get("rejected"),
        });
        Ok((now, minutes.collect()))
    }

    /// The cursor of the newest dead letter.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn newest_dead_letter(&self) -> Result<i64, StoreError> {
        let session = self.session("newest_dead_letter").await?;
        let rows = session
            .query(
                "/* standing::newest_dead_letter */
                SELECT coalesce(max(m.seq), 0)
                FROM unnest(ARRAY['open', 'due', 'parked', 'settled', 'discarded']) AS s (state)
                CROSS JOIN LATERAL (
                    SELECT d.seq FROM settled.dead_letters AS d WHERE d.state = s.state ORDER BY d.seq DESC LIMIT 1
                ) AS m",
                &[],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// When the open messages of some groups failed last, by parts of the time until now.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn trend_of_groups(
        &self,
        groups: &[String],
        last: Duration,
        parts: i32,
    ) -> Result<Vec<TrendOfGroup>, StoreError> {
        let rows = self
            .session("trend_of_groups")
            .await?
            .query(
                "/* standing::trend_of_groups */
                SELECT d.group_id, least(t.part, $3::integer - 1) AS part, count(*) AS messages
                FROM settled.dead_letters AS d
                CROSS JOIN LATERAL (
                    SELECT floor(
                        extract(epoch FROM d.last_failed_at - now())::float8 * $3::integer / $2::float8 + $3::integer
                    )::integer AS part
                ) AS t
                WHERE d.state = 'open'
                  AND d.group_id = ANY ($1)
                  AND d.last_failed_at >= now() - make_interval(secs => $2::float8)
                  AND t.part >= 0
                GROUP BY 1, 2",
                &[&groups, &last.as_secs_f64(), &parts],
            )
            .await?;
        Ok(rows
            .iter()
            .map(|row| TrendOfGroup {
                group: row.get("group_id"),
                part: row.get("part"),
                messages: row.get("messages"),
            })
            .collect())
    }

    /// When something of each of these partners came last.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn partners_seen(&self, partners: &[String]) -> Result<Vec<(String, PartnerSeen)>, StoreError> {
        let rows = self
            .session("partners_seen")
            .await?
            .query(
                "/* standing::partners_seen */
                SELECT p.enterprise_id, u.signed_at, h.held_at, r.refused_at
                FROM settled.partners AS p
                LEFT JOIN (
                    SELECT k.enterprise_id, max(u.last_used_at) AS signed_at
                    FROM settled.partner_keys AS k
                    JOIN settled.key_uses AS u ON u.public_key = k.public_key
                    WHERE k.enterprise_id = ANY ($1)
                    GROUP BY k.enterprise_id
                ) AS u ON u.enterprise_id = p.enterprise_id
                LEFT JOIN (
                    SELECT whose, max(held_at) AS held_at FROM settled.held WHERE whose = ANY ($1) GROUP BY whose
                ) AS h ON h.whose = p.enterprise_id
                -- The newest of each state, at the end of its part of the index.
                LEFT JOIN LATERAL (
                    SELECT max(n.last_failed_at) AS refused_at
                    FROM unnest(ARRAY['open', 'due', 'parked', 'settled', 'discarded']) AS s (state)
                    CROSS JOIN LATERAL (
                        SELECT d.last_failed_at
                        FROM settled.dead_letters AS d
                        WHERE d.enterprise_id = p.enterprise_id AND d.state = s.state
                        ORDER BY d.seq DESC
                        LIMIT 1
                    ) AS n
                ) AS r ON true
                WHERE p.enterprise_id = ANY ($1)",
                &[&partners],
            )
            .await?;
        let seen = rows.iter().map(|row| {
            let seen = PartnerSeen {
                signed_at: row.get("signed_at"),
                held_at: row.get("held_at"),
                refused_at: row.get("refused_at"),
            };
            (row.get("enterprise_id"), seen)
        });
        Ok(seen.collect())
    }

    /// Open dead letters by reason; and by partner, of those that are registered. What has none is missing.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn open_letters(&self) -> Result<(Vec<(Reason, i64)>, Vec<(String, i64)>), StoreError> {
        let rows = self
            .session("open_letters")
            .await?
            .query(
                "/* standing::open_letters */
                SELECT p.enterprise_id, g.reason, sum(g.messages)::bigint AS messages
                FROM (
                    SELECT d.enterprise_id, d.reason, count(*) AS messages
                    FROM settled.dead_letters AS d
                    WHERE d.state = 'open'
                    GROUP BY d.enterprise_id, d.reason
                ) AS g
                LEFT JOIN settled.partners AS p ON p.enterprise_id = g.enterprise_id
                GROUP BY GROUPING SETS ((p.enterprise_id), (g.reason))",
                &[],
            )
            .await?;
        let (mut reasons, mut partners) = (Vec::new(), Vec::new());
        for row in &rows {
            let messages = row.get("messages");
            if let Some(reason) = row.get::<_, Option<&str>>("reason") {
                reasons.push((Reason::written(reason), messages));
            } else if let Some(partner) = row.get("enterprise_id") {
                partners.push((partner, messages));
            }
        }
        Ok((reasons, partners))
    }

    /// Parked messages by partner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn parked_by_partner(&self) -> Result<Vec<(String, i64)>, StoreError> {
        let rows = self
            .session("parked_by_partner")
            .await?
            .query(
                "/* standing::parked_by_partner */
                SELECT enterprise_id, count(*) FROM settled.parked GROUP BY enterprise_id",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_begin_with_their_time() {
        let at = Timestamp::from_millisecond(1_700_000_000_123).expect("a time");
        let id = first_id(at);
        let seconds = 1_700_000_000;
        // Each by itself: one after the other they would be kept in order, whatever their times.
        let of = |nanoseconds| Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, seconds, nanoseconds));
        let (made, before) = (of(123_000_000), of(122_999_999));
        assert!(before < id && id <= made, "{before} {id} {made}");
    }
}

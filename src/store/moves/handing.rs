//! Messages that wait in the source's side room go to the target's: what came while the partner moved, and what comes to the wrong
//! cell later.

use uuid::Uuid;

use crate::{
    fail::Point,
    store::{Fate, Store, StoreError, write::count},
};

/// Packs that travel at a time: each may be as large as a batch.
const PAGE: i64 = 10;

impl Store {
    /// Hands over what is held now of a partner that left, and says how many messages that were. A pack is in the target before
    /// it is gone from here, and comes there once. What comes meanwhile is for the next time, or it would never end while its
    /// messages are led here.
    ///
    /// # Errors
    /// A database is away or refuses. Said again it goes on.
    pub async fn hand_over(&self, target: &Store, enterprise_id: &str) -> Result<i64, StoreError> {
        let mut handed = 0_i64;
        let until: i64 = {
            let session = self.session("hand_over").await?;
            let rows = session
                .query(
                    "/* moves::hand_over until */ SELECT coalesce(max(seq), 0) FROM settled.held WHERE whose = $1",
                    &[&enterprise_id],
                )
                .await?;
            session.one(&rows)?.get(0)
        };
        loop {
            let rows = self
                .session("hand_over")
                .await?
                .query(
                    "/* moves::hand_over */
                    SELECT h.id, h.messages,
                           jsonb_build_object(
                               'id', h.id, 'whose', h.whose, 'why', h.why, 'messages', h.messages, 'bytes', h.bytes,
                               'format', h.format, 'content', h.content, 'digests', h.digests, 'held_at', h.held_at
                           )::text AS line
                    FROM settled.held AS h
                    WHERE h.whose = $1
                      AND h.seq <= $3
                    ORDER BY h.seq
                    LIMIT $2",
                    &[&enterprise_id, &PAGE, &until],
                )
                .await?;
            if rows.is_empty() {
                return Ok(handed);
            }
            let lines: Vec<&str> = rows.iter().map(|row| row.get("line")).collect();
            target
                .session("hand_over")
                .await?
                .execute(
                    "/* moves::hand_over take */
                    WITH took AS (
                        INSERT INTO settled.held (
                            id, whose, why, messages, bytes, format, content, digests, held_at, due_at
                        )
                        SELECT n.id, n.whose, n.why, n.messages, n.bytes, n.format, n.content, n.digests, n.held_at,
                               statement_timestamp()
                        FROM jsonb_populate_recordset(NULL::settled.held, $1::text::jsonb) AS n
                        WHERE NOT EXISTS (SELECT FROM settled.holdings AS s WHERE s.held_id = n.id)
                        ORDER BY n.held_at, n.id
                        ON CONFLICT (id) DO NOTHING
                        RETURNING id, messages
                    )
                    INSERT INTO settled.holdings (held_id, step, messages, at)
                    SELECT id, 'held', messages, statement_timestamp() FROM took",
                    &[&format!("[{}]", lines.join(","))],
                )
                .await?;
            // Some may be there from before: that they are found is not enough either.
            target.await_standbys().await?;
            let ids: Vec<Uuid> = rows.iter().map(|row| row.get("id")).collect();
            target.has_taken(&ids).await?;
            let session = self.session("hand_over").await?;
            session.pass(Point::MoveHandedOver).await?;
            session
                .execute(
                    "/* moves::hand_over let go */
                    WITH gone AS (DELETE FROM settled.held WHERE id = ANY ($1) RETURNING id, messages)
                    INSERT INTO settled.holdings (held_id, step, messages, at)
                    SELECT id, 'moved', messages, statement_timestamp() FROM gone",
                    &[&ids],
                )
                .await?;
            let messages = rows.iter().map(|row| i64::from(row.get::<_, i32>("messages")));
            handed = handed.saturating_add(messages.sum());
        }
    }

    /// # Errors
    /// Not all of these packs ever came here.
    async fn has_taken(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        let session = self.session("hand_over").await?;
        let rows = session
            .query(
                "/* moves::hand_over taken */
                SELECT count(DISTINCT held_id) FROM settled.holdings WHERE held_id = ANY ($1)",
                &[&ids],
            )
            .await?;
        if session.one(&rows)?.get::<_, i64>(0) == count(ids.len()) {
            return Ok(());
        }
        let sentence = "what was handed over is not on the server of the other cell that answers now: say it again";
        Err(StoreError::new("hand_over", Fate::Retry, sentence))
    }
}

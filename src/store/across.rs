//! What this cell says of messages, partners and money that another cell may know too. Nothing here knows of two: whoever asks both
//! compares.

use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::{calendar::CalendarTime, receipt::ReceiptKey};

/// A nonce that a message proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvenNonce {
    pub key: Uuid,
    pub enterprise_id: String,
    pub nonce: String,
}

/// Money of a connection that went with a move.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MovedSum {
    pub move_id: Uuid,
    pub connection_id: Uuid,
    pub currency: String,
    pub quantity: String,
}

/// Judged by this cell while the partner lived here: neither what came along with a partner, nor what another cell took over.
const JUDGED_HERE: &str = "\
    NOT EXISTS (
        SELECT FROM settled.partners AS p WHERE p.enterprise_id = r.enterprise_id AND r.last_seen <= p.left_at
    )
    AND NOT EXISTS (SELECT FROM settled.batches AS b WHERE b.id = r.batch_id AND b.source = 'moved')";

impl Store {
    /// A page of what this cell judged in a window, in the order of the keys.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn judged_here(
        &self,
        since: CalendarTime,
        until: CalendarTime,
        after: Uuid,
        limit: i64,
    ) -> Result<Vec<ProvenNonce>, StoreError> {
        let mut session = self.session("judged_here").await?;
        session.begin_long().await?;
        let rows = session
            .query(
                &format!(
                    "/* across::judged_here */
                    SELECT r.key, r.enterprise_id, r.nonce
                    FROM settled.receipts AS r
                    WHERE r.key > $3
                      AND r.last_seen >= $1
                      AND r.first_seen < $2
                      AND {JUDGED_HERE}
                    ORDER BY r.key
                    LIMIT $4"
                ),
                &[&since, &until, &after, &limit],
            )
            .await?;
        session.rollback().await;
        Ok(rows
            .iter()
            .map(|row| ProvenNonce {
                key: row.get(0),
                enterprise_id: row.get(1),
                nonce: row.get(2),
            })
            .collect())
    }

    /// Which of these this cell judged too.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn judged_too(&self, keys: &[Uuid]) -> Result<Vec<Uuid>, StoreError> {
        self.keys_of(
            &format!(
                "/* across::judged_too */
            SELECT r.key FROM settled.receipts AS r WHERE r.key = ANY ($1) AND {JUDGED_HERE}"
            ),
            keys,
        )
        .await
    }

    /// Which of these this cell has a receipt of, whoever judged.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn proven(&self, keys: &[Uuid]) -> Result<Vec<Uuid>, StoreError> {
        self.keys_of(
            "/* across::proven */ SELECT r.key FROM settled.receipts AS r WHERE r.key = ANY ($1)",
            keys,
        )
        .await
    }

    async fn keys_of(&self, sql: &str, keys: &[Uuid]) -> Result<Vec<Uuid>, StoreError> {
        let rows = self.session("across").await?.query(sql, &[&keys]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Partners whose messages are judged here.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn judged_partners(&self) -> Result<Vec<String>, StoreError> {
        let rows = self
            .session("judged_partners")
            .await?
            .query(
                "/* across::judged_partners */
                SELECT enterprise_id FROM settled.partners WHERE moving IS NULL ORDER BY enterprise_id",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Money that left with partners, or that came with them, of some moves.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn moved_sums(&self, came_in: bool, of: &[Uuid]) -> Result<Vec<MovedSum>, StoreError> {
        let rows = self
            .session("moved_sums")
            .await?
            .query(
                "/* across::moved_sums */
                SELECT f.move_id, f.connection_id, f.currency, sum(f.quantity)::text AS quantity
                FROM settled.moved_funds AS f
                WHERE (f.left_from IS NULL) = $1
                  AND f.move_id = ANY ($2)
                GROUP BY f.move_id, f.connection_id, f.currency",
                &[&came_in, &of],
            )
            .await?;
        let mut sums: Vec<MovedSum> = rows
            .iter()
            .map(|row| MovedSum {
                move_id: row.get("move_id"),
                connection_id: row.get("connection_id"),
                currency: row.get("currency"),
                quantity: row.get("quantity"),
            })
            .collect();
        sums.sort();
        Ok(sums)
    }

    /// Moves from here to other books whose money has left.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn ended_moves(&self, other: Uuid) -> Result<Vec<Uuid>, StoreError> {
        let rows = self
            .session("ended_moves")
            .await?
            .query(
                "/* across::ended_moves */
                SELECT id FROM settled.moves WHERE way = 'out' AND other = $1 AND phase IN ('left', 'done')",
                &[&other],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Messages that were refused here in a window as of partners that nobody knows here, by partner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn refused_of(
        &self,
        partners: &[String],
        since: CalendarTime,
        until: CalendarTime,
    ) -> Result<Vec<(String, i64)>, StoreError> {
        let rows = self
            .session("refused_of")
            .await?
            .query(
                "/* across::refused_of */
                SELECT enterprise_id, count(*)
                FROM settled.dead_letters
                WHERE enterprise_id = ANY ($1)
                  AND reason = 'unknown_partner'
                  AND state = 'open'
                  AND last_failed_at >= $2
                  AND first_failed_at < $3
                GROUP BY enterprise_id
                ORDER BY enterprise_id",
                &[&partners, &since, &until],
            )
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Messages that are held here of partners that live in another cell, by partner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn held_of_those_who_left(&self) -> Result<Vec<(String, i64)>, StoreError> {
        let rows = self
            .session("held_of_those_who_left")
            .await?
            .query(
                "/* across::held_of_those_who_left */
                SELECT h.whose, sum(h.messages)::bigint
                FROM settled.held AS h
                JOIN settled.partners AS p ON p.enterprise_id = h.whose AND p.left_at IS NOT NULL
                GROUP BY h.whose
                ORDER BY h.whose",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }
}

impl ProvenNonce {
    /// The nonce of a message that somebody says was sent.
    pub fn of(enterprise_id: String, nonce: String) -> Self {
        Self {
            key: ReceiptKey::new(&enterprise_id, &nonce).0,
            enterprise_id,
            nonce,
        }
    }
}

//! Which books these are, in which epoch, and whether they have what was told of them.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::{
    Store, StoreError,
    audit::{Act, write_audit},
    voices::{NewVoice, Voice, raise},
};
use crate::domain::{
    delivery::BatchId,
    epoch::{BooksEpoch, EpochWord},
};

impl Store {
    /// Which books these are now.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn books_epoch(&self) -> Result<BooksEpoch, StoreError> {
        let session = self.session("books_epoch").await?;
        let rows = session
            .query(
                "/* epochs::books_epoch */ SELECT books, epoch FROM settled.epochs ORDER BY epoch DESC LIMIT 1",
                &[],
            )
            .await?;
        let row = session.one(&rows)?;
        Ok(BooksEpoch {
            books: row.get("books"),
            epoch: row.get("epoch"),
        })
    }

    /// Which of the batches that are named the books lack, and when the newest that they have was judged.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn lacking(&self, words: &[EpochWord]) -> Result<(BTreeSet<BatchId>, Option<Timestamp>), StoreError> {
        let named: BTreeSet<BatchId> = words.iter().filter_map(|word| word.batch).collect();
        let named: Vec<BatchId> = named.into_iter().collect();
        let session = self.session("lacking").await?;
        let rows = session
            .query(
                "/* epochs::lacking */
                SELECT ARRAY(
                           SELECT n.id
                           FROM unnest($1::uuid[]) AS n (id)
                           WHERE NOT EXISTS (SELECT FROM settled.batches AS b WHERE b.id = n.id)
                       ) AS lacking,
                       (SELECT at FROM settled.batches ORDER BY id DESC LIMIT 1) AS newest,
                       pg_is_in_recovery() AS follows",
                &[&named],
            )
            .await?;
        let row = session.one(&rows)?;
        // What a standby lacks it may only not have heard yet.
        session.may_write(!row.get::<_, bool>("follows"))?;
        let lacking: Vec<BatchId> = row.get("lacking");
        Ok((lacking.into_iter().collect(), row.get("newest")))
    }

    /// The newest batch that there is, by the time in its id.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn newest_batch(&self) -> Result<Option<BatchId>, StoreError> {
        let rows = self
            .session("newest_batch")
            .await?
            .query(
                "/* epochs::newest_batch */ SELECT id FROM settled.batches ORDER BY id DESC LIMIT 1",
                &[],
            )
            .await?;
        Ok(rows.first().map(|row| row.get(0)))
    }

    /// Whether a batch that was committed is there still. Asked as often as [`Store::ping`].
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn has_batch(&self, id: BatchId) -> Result<bool, StoreError> {
        let session = self.session("has_batch").await?;
        let rows = session
            .query(
                "/* epochs::has_batch */
                SELECT EXISTS (SELECT FROM settled.batches WHERE id = $1) AS has,
                       current_setting('transaction_read_only')::boolean AS read_only, pg_is_in_recovery() AS follows",
                &[&id],
            )
            .await?;
        let row = session.one(&rows)?;
        let has = row.get("has");
        // What a standby lacks it may only not have heard yet: it is no place to write, and that is all. A server that follows
        // nobody gets nothing more, whether it may be written or not: what it lacks is lost.
        if has || row.get("follows") {
            session.may_write(!row.get::<_, bool>("read_only"))?;
        }
        Ok(has)
    }

    /// Writes down that somebody accepts a loss, and begins the next epoch where they are the second.
    ///
    /// # Errors
    /// The database is away or refuses; somebody else began it at the same moment.
    pub async fn accept_loss(
        &self,
        act: Act<'_>,
        voice: NewVoice<'_>,
        begins: Option<BooksEpoch>,
        outcome: &Value,
    ) -> Result<(Voice, i64), StoreError> {
        let session = self.session("accept_loss").await?;
        session.begin().await?;
        let mine = raise(&session, act, voice).await?;
        if let Some(next) = begins {
            session
                .execute_exactly(
                    1,
                    "/* epochs::accept_loss begin */
                    INSERT INTO settled.epochs (epoch, books, begun_at)
                    VALUES ($1, $2, date_trunc('milliseconds', clock_timestamp()))",
                    &[&next.epoch, &next.books],
                )
                .await?;
        }
        let audit_id = write_audit(&session, act, outcome, None).await?;
        session.commit().await?;
        Ok((mine, audit_id))
    }
}

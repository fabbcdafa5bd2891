//! Whether what was found committed is where the server's commits have to be: with its synchronous standbys too.

use tokio_postgres::types::ToSql;

use super::{Fate, Session, Store, StoreError};
use crate::domain::delivery::BatchId;

/// How often it is tried again where the wait itself is cut off.
const ATTEMPTS: usize = 3;

/// Commits something that leaves no trace, behind everything that is to be seen on this server. A commit whose connection was ended
/// while it waited for a standby can be seen at once, and may be nowhere else yet; one whose wait was cancelled is even answered
/// with success. Only who wrote waits at COMMIT. Answers false, and commits nothing, where the statement finds no row.
async fn commit_behind(session: Session, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<bool, StoreError> {
    session.begin().await?;
    if session.execute(sql, params).await? == 0 {
        session.rollback().await;
        return Ok(false);
    }
    session.commit_and_hear().await?;
    Ok(true)
}

impl Store {
    /// Waits until a batch that is found committed has passed the standbys. Where the batch is not to be found another server
    /// answered, which never had it: then nothing is known.
    ///
    /// # Errors
    /// The database is away, the standbys did not have it in time, or the batch is not there.
    pub async fn catch_up(&self, id: BatchId) -> Result<(), StoreError> {
        let session = self.session("catch_up").await?;
        // One statement sees the batch and has the transaction write.
        let params: &[&(dyn ToSql + Sync)] = &[&id];
        let found = commit_behind(
            session,
            "/* standbys::catch_up */
            SELECT pg_catalog.pg_logical_emit_message(true, 'settled'::text, ''::text)
            FROM settled.batches
            WHERE id = $1",
            params,
        );
        if found.await? {
            return Ok(());
        }
        let sentence = "the batch that was found committed is not on the server that answers now";
        Err(StoreError::new("catch_up", Fate::Retry, sentence))
    }

    /// Waits until everything that was committed before on the server that answers has passed its standbys. Another server than
    /// the one that committed may answer: so what must be there is read afterwards, and not before.
    ///
    /// # Errors
    /// The database is away, or the standbys did not have it in time, however often they were asked.
    pub async fn await_standbys(&self) -> Result<(), StoreError> {
        let mut attempts = 0;
        loop {
            let session = self.session("await_standbys").await?;
            let passed = commit_behind(
                session,
                "/* standbys::await_standbys */
                SELECT pg_catalog.pg_logical_emit_message(true, 'settled'::text, ''::text)",
                &[],
            );
            match passed.await {
                Ok(_) => return Ok(()),
                Err(error) if error.at_commit && attempts < ATTEMPTS => attempts += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

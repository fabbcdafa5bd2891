//! The schema: its migrations, its version, and whether it is ours.

use deadpool_postgres::Object;

use super::{Fate, Store, StoreError};

mod embedded {
    refinery::embed_migrations!("src/store/schema");
}

/// Whether the server can compress with lz4, by what one of its settings may be.
pub(super) const HAS_LZ4: &str = "EXISTS (
    SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)
)";

/// The version of the schema that this program is written for.
pub fn schema_version() -> i32 {
    embedded::migrations::runner()
        .get_migrations()
        .iter()
        .map(refinery::Migration::version)
        .max()
        .unwrap_or_default()
}

/// Whether a database's schema is the one this program is written for.
///
/// # Errors
/// A sentence that says what to do.
pub fn check_schema(found: Option<i32>) -> Result<(), String> {
    let ours = schema_version();
    match found {
        Some(version) if version == ours => Ok(()),
        None => Err("the database has no schema of ours; run `settled migrate` first".into()),
        Some(version) if version < ours => Err(format!(
            "the database's schema is version {version}, this program needs {ours}; run `settled migrate`"
        )),
        Some(version) => Err(format!(
            "the database's schema is version {version}, newer than the {ours} that this program knows"
        )),
    }
}

/// Whether a server can hold the schema: some columns are compressed with lz4, which a server is built with or not.
///
/// # Errors
/// A sentence that says what to do.
pub fn check_compression(has_lz4: bool) -> Result<(), &'static str> {
    if has_lz4 {
        return Ok(());
    }
    Err(
        "the server was built without lz4, with which the schema compresses some columns: take a PostgreSQL that was built \
         --with-lz4, as the packages of Debian, Red Hat and postgresql.org are",
    )
}

impl Store {
    /// Applies the migrations that are missing and names them.
    ///
    /// # Errors
    /// The database is away, or refuses.
    pub async fn migrate(&self) -> Result<Vec<String>, StoreError> {
        // Two programs that migrate at once wait for each other. The lock belongs to a transaction, on a connection that does
        // nothing else: a pooler may lend a session's lock on, and keep it for ever.
        let turn = self.connection("migrate").await?;
        turn.batch_execute(
            "/* store::migrate */
            BEGIN;
            SET LOCAL idle_in_transaction_session_timeout = 0;
            SET LOCAL statement_timeout = 0;
            SET LOCAL lock_timeout = 0;
            SELECT pg_advisory_xact_lock(7236101)",
        )
        .await
        .map_err(|error| StoreError::from_postgres("migrate", &error))?;
        let mut client = self.connection("migrate").await?;
        let built = client
            .query_one(&format!("/* store::migrate server */ SELECT {HAS_LZ4}"), &[])
            .await
            .map_err(|error| StoreError::from_postgres("migrate", &error))?;
        check_compression(built.get(0)).map_err(|sentence| StoreError::ours("migrate", sentence))?;
        // A migration that waits for a table, for a backup to have read it, say, holds up whoever asks for it after that: it gives up
        // as a batch would, and can be run again.
        client
            .batch_execute(&format!(
                "SET lock_timeout = {}; CREATE SCHEMA IF NOT EXISTS settled",
                self.limits.lock_timeout()
            ))
            .await
            .map_err(|error| StoreError::from_postgres("migrate", &error))?;
        // Named with its schema: a user called settled has that schema first in its search_path once it exists, and would
        // look for its history in two places.
        let report = embedded::migrations::runner()
            .set_migration_table_name("settled.refinery_schema_history")
            .run_async(&mut **client.as_mut())
            .await;
        // Closed, and its transaction with it: the next may go.
        drop(Object::take(turn));
        drop(Object::take(client));
        let report = report.map_err(|error| {
            let cause =
                std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<tokio_postgres::Error>());
            match cause {
                Some(cause) => StoreError::from_postgres("migrate", cause),
                None => StoreError::new("migrate", Fate::Ours, error.to_string()),
            }
        })?;
        Ok(report.applied_migrations().iter().map(ToString::to_string).collect())
    }

    /// The version of the schema that the database has; none where `migrate` was never run.
    ///
    /// # Errors
    /// The database is away.
    pub async fn schema_version(&self) -> Result<Option<i32>, StoreError> {
        let found = self
            .session("schema_version")
            .await?
            .query(
                "/* store::schema_version */ SELECT max(version) FROM settled.refinery_schema_history",
                &[],
            )
            .await;
        match found {
            Ok(rows) => Ok(rows.first().and_then(|row| row.get(0))),
            Err(error) if error.is_schema() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

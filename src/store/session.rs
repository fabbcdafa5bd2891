//! A connection in use: statements, transactions, and what becomes of the connection afterwards.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool_postgres::Object;
use tokio_postgres::{Row, Statement, types::ToSql};

use super::{Fate, StoreError, servers::Server};
use crate::{
    config::DatabaseSettings,
    fail::{self, Injected, Point},
    telemetry::Signal,
};

/// How long a question that reads a whole table may take. The server's own limit is lifted for it.
const LONG: Duration = Duration::from_secs(6 * 60 * 60);

/// A connection in use, with a name that stands in every error. Begin and commit stand in plain sight of the caller: a
/// transaction that takes a closure could not be spawned. The first error inside a transaction poisons it: after that it
/// can only be rolled back, because the server answers COMMIT of a failed transaction with success.
pub(crate) struct Session {
    pub(super) client: Option<Object>,
    pub(super) name: &'static str,
    pub(super) deadline: Duration,
    server: Arc<Server>,
    /// How often the server had warned when this began.
    warned: u64,
    limits: Arc<Limits>,
    /// Statements whose answer is awaited. A dropped future does not cancel its statement.
    pub(super) at_work: AtomicUsize,
    /// Times that it began to wait for the server.
    pub(super) round_trips: AtomicU64,
    pub(super) begun: AtomicBool,
    pub(super) poisoned: AtomicBool,
    /// The server is going away or turned read-only: this connection is of no more use.
    pub(super) spent: AtomicBool,
    /// Nothing is committed: statements run even where they have nothing to write.
    pub(super) rehearsal: bool,
    pub(super) parked_bytes: u64,
}

/// How long the server works, waits and idles for us, in the words of SQL.
///
/// They are told with every transaction. As options of the connection a pooler between us and the server refuses them, or
/// drops them without a word; set for a session they are somebody else's as soon as the pooler lends the connection on.
pub(super) struct Limits {
    sql: String,
    /// By name, in milliseconds.
    pub(super) each: [(&'static str, i64); 3],
}

/// A batch's statements are planned once for a connection, not anew for the arrays of each batch: planning would cost a small
/// batch as much as its rows. Whatever a batch touches it finds by a key, so no such plan reads a whole table; one that was made
/// while a table was empty would, for as long as nobody analyses it. None is worth compiling either, which PostgreSQL would do
/// where it has to read a table all the same, since that counts as dear then.
const PLANNED_ONCE: &str =
    "SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off; SET LOCAL jit = off";

impl Limits {
    /// How long a statement waits for a lock, in milliseconds.
    pub(super) fn lock_timeout(&self) -> i64 {
        let [_, (_, lock_timeout), _] = self.each;
        lock_timeout
    }

    pub(super) fn of(settings: &DatabaseSettings) -> Self {
        let each = [
            ("statement_timeout", settings.statement_timeout),
            ("lock_timeout", settings.lock_timeout),
            (
                "idle_in_transaction_session_timeout",
                settings.idle_in_transaction_timeout,
            ),
        ]
        .map(|(name, limit)| (name, i64::try_from(limit.as_millis()).unwrap_or(i64::MAX)));
        let sql: Vec<String> = each
            .iter()
            .map(|(name, limit)| format!("SET LOCAL {name} = {limit}"))
            .collect();
        Self {
            sql: sql.join("; "),
            each,
        }
    }
}

impl Session {
    pub(super) fn new(
        client: Object,
        server: Arc<Server>,
        name: &'static str,
        deadline: Duration,
        limits: Arc<Limits>,
        parked_bytes: u64,
    ) -> Self {
        Self {
            client: Some(client),
            name,
            deadline,
            warned: server.warnings(),
            server,
            limits,
            at_work: AtomicUsize::new(0),
            round_trips: AtomicU64::new(0),
            begun: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            spent: AtomicBool::new(false),
            rehearsal: false,
            parked_bytes,
        }
    }

    /// Whether a statement without rows is left out.
    pub(super) fn skips(&self, empty: bool) -> bool {
        empty && !self.rehearsal
    }

    /// Asks the server. What is sent while an earlier question is under way costs no round trip of its own.
    pub(super) async fn ask<T>(
        &self,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, StoreError> {
        if self.at_work.load(Ordering::Relaxed) == 0 {
            self.round_trips.fetch_add(1, Ordering::Relaxed);
        }
        self.answer(work).await
    }

    /// A session that may not write belongs to a server that was demoted: it is left, as it is after a write that was refused.
    pub(super) fn may_write(&self, may: bool) -> Result<(), StoreError> {
        if may {
            return Ok(());
        }
        self.poisoned.store(true, Ordering::Relaxed);
        self.spent.store(true, Ordering::Relaxed);
        Err(StoreError::read_only(self.name))
    }

    /// Waits for an answer, under the client's deadline.
    pub(super) async fn answer<T>(
        &self,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, StoreError> {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        let error = match self.patiently(work).await {
            Ok(answered) => {
                self.at_work.fetch_sub(1, Ordering::Relaxed);
                match answered {
                    Ok(value) => return Ok(value),
                    Err(error) => StoreError::from_postgres(self.name, &error),
                }
            }
            Err(sentence) => StoreError::new(self.name, Fate::Away, sentence),
        };
        self.poisoned.store(true, Ordering::Relaxed);
        if error.fate == Fate::Away {
            self.spent.store(true, Ordering::Relaxed);
        }
        if error.is_stale_plan()
            && let Some(client) = &self.client
        {
            client.statement_cache.clear();
        }
        Err(error)
    }

    /// Waits up to the deadline, but not for a server that does not live any more: after a while it is asked.
    async fn patiently<T>(&self, work: impl Future<Output = T>) -> Result<T, String> {
        let mut work = pin!(work);
        let silence = self.server.silence.min(self.deadline);
        if let Ok(answered) = tokio::time::timeout(silence, &mut work).await {
            return Ok(answered);
        }
        // On the heap: nearly no question comes here, and each has room for this otherwise.
        Box::pin(async {
            tokio::select! {
                biased;
                answered = &mut work => Ok(answered),
                () = self.server.gone() => Err(format!("the database does not answer, and a new connection has no answer within \
                                                        {silence:?} either")),
                () = tokio::time::sleep(self.deadline.saturating_sub(silence)) => {
                    Err(format!("the database did not answer within {:?}", self.deadline))
                }
            }
        })
        .await
    }

    /// Passes a fail point. A rehearsal passes none: what is counted are batches.
    pub(super) async fn pass(&self, point: Point) -> Result<(), StoreError> {
        if self.rehearsal {
            return Ok(());
        }
        fail::fallible(point).await.map_err(|injected| self.broken(injected))
    }

    /// The transaction must not commit, and why.
    pub(super) fn must_not_commit(&self, fate: Fate, sentence: &str) -> StoreError {
        self.poisoned.store(true, Ordering::Relaxed);
        StoreError::new(self.name, fate, sentence)
    }

    /// A connection that broke ends its transaction, and is of no more use.
    pub(super) fn broken(&self, injected: Injected) -> StoreError {
        self.poisoned.store(true, Ordering::Relaxed);
        self.spent.store(true, Ordering::Relaxed);
        StoreError {
            during: self.name,
            ..injected.into()
        }
    }

    pub(super) fn client(&self) -> Result<&Object, StoreError> {
        self.client.as_ref().ok_or_else(|| {
            StoreError::new(
                self.name,
                Fate::Ours,
                "the connection was given back before its last use",
            )
        })
    }

    /// Opens the transaction of a batch, which waits for a lock only so long. One message, as a plain BEGIN is.
    pub(super) async fn begin_impatient(&self, patience: Duration) -> Result<(), StoreError> {
        let and = format!(
            "; SET LOCAL lock_timeout = {}; {PLANNED_ONCE}",
            patience.as_millis().max(1)
        );
        self.begin_with("BEGIN", &and).await
    }

    /// Opens the transaction; joined with the first statements it costs no round trip of its own.
    pub(super) async fn begin(&self) -> Result<(), StoreError> {
        self.begin_with("BEGIN", "").await
    }

    /// Opens a transaction that reads one moment and changes nothing.
    pub(super) async fn begin_read_only(&self) -> Result<(), StoreError> {
        self.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY", "")
            .await
    }

    /// The same for sums of many rows to few, which need not be sorted on a disk.
    pub(super) async fn begin_sum(&self) -> Result<(), StoreError> {
        self.begin_with(
            "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY",
            "; SET LOCAL work_mem = '16MB'",
        )
        .await
    }

    /// Opens a transaction of one moment that may take long and changes nothing.
    pub(super) async fn begin_long(&mut self) -> Result<(), StoreError> {
        self.deadline = LONG;
        // Sums over whole tables: hashes that stay in memory are worth it for one connection.
        self.begin_with(
            "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY",
            "; SET LOCAL statement_timeout = 0; SET LOCAL work_mem = '64MB'",
        )
        .await
    }

    /// Opens a transaction that copies from books to others and may take long: from one moment of the source, or into the
    /// target. While the one side works the other idles.
    pub(super) async fn begin_copy(&mut self, reads: bool) -> Result<(), StoreError> {
        self.deadline = LONG;
        let begin = if reads {
            "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        } else {
            "BEGIN"
        };
        // Rows are compared as text, and a time is written in the zone of who asks.
        self.begin_with(
            begin,
            "; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '1h'; \
             SET LOCAL work_mem = '64MB'; SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO'; \
             SET LOCAL bytea_output = 'hex'",
        )
        .await
    }

    /// The row of a question that has one answer.
    pub(super) fn one<'r>(&self, rows: &'r [Row]) -> Result<&'r Row, StoreError> {
        rows.first()
            .ok_or_else(|| self.must_not_commit(Fate::Ours, "a question that has one answer had none"))
    }

    async fn begin_with(&self, begin: &str, and: &str) -> Result<(), StoreError> {
        self.begun.store(true, Ordering::Relaxed);
        let sql = format!("{begin}; {}{and}", self.limits.sql);
        self.ask(self.client()?.batch_execute(&sql)).await
    }

    /// A query by a statement prepared once per connection. Every statement opens with a comment that names its function.
    pub(super) async fn query(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        let client = self.client()?;
        let statement = self.answer(client.prepare_cached(sql)).await?;
        self.within_limits(client.query(&statement, params)).await
    }

    /// The same, for the number of rows touched.
    pub(super) async fn execute(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, StoreError> {
        let statement = self.prepare(sql).await?;
        self.execute_prepared(&statement, params).await
    }

    /// The same, sent when it is looked at first: what is joined leaves in its order.
    pub(super) async fn execute_prepared(
        &self,
        statement: &Statement,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, StoreError> {
        self.within_limits(self.client()?.execute(statement, params)).await
    }

    /// Asks within the transaction that was begun; else within one of its own, which travels with it.
    async fn within_limits<T>(
        &self,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, StoreError> {
        if self.begun.load(Ordering::Relaxed) {
            return self.ask(work).await;
        }
        // On the heap: a batch's questions are many, each a part of one future, and none of them goes this way.
        Box::pin(self.alone(work)).await
    }

    async fn alone<T>(&self, work: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, StoreError> {
        let client = self.client()?;
        let begin = format!("BEGIN; {}", self.limits.sql);
        // Polled in this order, so sent in this order. One that failed is rolled back by its COMMIT.
        let (begun, done, committed) = tokio::join!(
            self.ask(client.batch_execute(&begin)),
            self.ask(work),
            self.ask(client.batch_execute("COMMIT")),
        );
        begun?;
        let value = done?;
        committed?;
        Ok(value)
    }

    /// Like [`Session::execute`], and the number of rows must be the expected one.
    pub(super) async fn execute_exactly(
        &self,
        rows: usize,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<(), StoreError> {
        let touched = self.execute(sql, params).await?;
        if touched == rows as u64 {
            return Ok(());
        }
        self.poisoned.store(true, Ordering::Relaxed);
        let function = sql
            .split("*/")
            .next()
            .unwrap_or_default()
            .trim_start_matches("/*")
            .trim();
        Err(StoreError::new(
            self.name,
            Fate::Ours,
            format!("{function} touched {touched} rows instead of {rows}"),
        ))
    }

    /// Prepares a statement ahead, so that statements used together travel together.
    pub(super) async fn prepare(&self, sql: &str) -> Result<Statement, StoreError> {
        self.answer(self.client()?.prepare_cached(sql)).await
    }

    /// Commits in the flight of the statements before it, whose answers nobody has seen. After one that failed COMMIT would
    /// answer as if all were well, and roll back; so something stands before it that fails then.
    pub(super) async fn commit_unless_failed(&self) -> Result<(), StoreError> {
        self.ask(self.client()?.batch_execute("SELECT; COMMIT")).await
    }

    /// The transaction is over.
    pub(super) fn is_over(&self) {
        self.begun.store(false, Ordering::Relaxed);
    }

    /// # Errors
    /// A statement failed before.
    pub(super) fn not_poisoned(&self) -> Result<(), StoreError> {
        if self.poisoned.load(Ordering::Relaxed) {
            let sentence = "a transaction with a failed statement is never committed";
            return Err(StoreError::new(self.name, Fate::Ours, sentence));
        }
        Ok(())
    }

    /// Commits, unless any statement failed.
    ///
    /// # Errors
    /// With `at_commit` set, whether it committed is unknown.
    pub(super) async fn commit(self) -> Result<(), StoreError> {
        self.commit_here().await
    }

    /// The same, for those who tell others by it: with the synchronous standbys too, if there are some.
    ///
    /// # Errors
    /// With `at_commit` set, whether it committed there and here is unknown.
    pub(super) async fn commit_and_hear(self) -> Result<(), StoreError> {
        self.commit_here().await?;
        self.nobody_cut_its_wait()
    }

    async fn commit_here(&self) -> Result<(), StoreError> {
        if let Err(error) = self.not_poisoned() {
            self.undo().await;
            return Err(error);
        }
        let commit = self.ask(self.client()?.batch_execute("COMMIT"));
        let done = match fail::underway(Point::CommitSent, commit).await {
            Ok(Ok(())) => self.pass(Point::AfterCommit).await,
            Ok(Err(error)) => Err(error),
            Err(injected) => Err(self.broken(injected)),
        };
        done.inspect(|()| self.is_over()).map_err(|error| StoreError {
            at_commit: true,
            ..error
        })
    }

    /// Whether everybody waited for what was committed for whom it had to wait. A commit that waits for a synchronous standby can
    /// be cancelled (`pg_cancel_backend`): the server then answers success, and a warning that the standby may lack it. Whoever
    /// tells or acknowledges by the answer would tell what a failover loses. A warning on another connection is taken for one
    /// here: that costs a commit more, and is rare.
    ///
    /// # Errors
    /// It is committed, and may be nowhere else.
    pub(super) fn nobody_cut_its_wait(&self) -> Result<(), StoreError> {
        if self.server.warnings() == self.warned {
            return Ok(());
        }
        let sentence = "it is committed, but the server warned: whether its synchronous standby has it is unknown";
        Err(StoreError {
            at_commit: true,
            ..StoreError::new(self.name, Fate::Retry, sentence)
        })
    }

    /// Rolls back. Dropping a transaction closes its connection instead, which does as much and costs a new one.
    pub(super) async fn rollback(self) {
        self.undo().await;
    }

    pub(super) async fn undo(&self) {
        let Ok(client) = self.client() else {
            return;
        };
        if self.ask(client.batch_execute("ROLLBACK")).await.is_ok() {
            self.is_over();
        }
    }
}

impl Drop for Session {
    /// A connection that may still be at work, is in a transaction, or is spent, leaves the pool and is closed.
    fn drop(&mut self) {
        Signal::RoundTrips {
            transaction: self.name,
            count: self.round_trips.load(Ordering::Relaxed),
        }
        .emit();
        let useless = self.at_work.load(Ordering::Relaxed) > 0
            || self.begun.load(Ordering::Relaxed)
            || self.spent.load(Ordering::Relaxed);
        if let Some(client) = self.client.take().filter(|_| useless) {
            drop(Object::take(client));
        }
    }
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Settings, store::Store};

    /// A store of the database that the tests are given.
    fn store(flags: &[(&str, &str)]) -> Store {
        let sources = crate::config::Sources {
            file: None,
            environment: std::env::vars().filter(|(name, _)| name == "SETTLED_DATABASE_URL"),
            flags: flags
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        };
        let settings = Settings::load(sources).expect("settings");
        Store::new(&settings).expect("SETTLED_DATABASE_URL is set: run these tests with `make test`")
    }

    async fn backend(session: &Session) -> i32 {
        let rows = session.query("SELECT pg_backend_pid()", &[]).await.expect("an answer");
        rows.first().expect("a row").get(0)
    }

    /// The server answers COMMIT with success where a statement failed before, and has rolled back.
    #[tokio::test]
    async fn a_swallowed_error_keeps_a_transaction_from_committing() {
        let store = store(&[]);
        let session = store.session("raw").await.expect("a connection");
        session.begin().await.expect("begun");
        assert!(session.query("SELECT 1 / 0", &[]).await.is_err());
        let client = session.client().expect("it is there");
        assert!(client.batch_execute("COMMIT").await.is_ok(), "as if nothing had been");
        drop(session);

        let session = store.session("ours").await.expect("a connection");
        session.begin().await.expect("begun");
        assert!(session.query("SELECT 1 / 0", &[]).await.is_err());
        let error = session.commit().await.expect_err("refused");
        assert!(error.fate == Fate::Ours && !error.at_commit, "{error}");
    }

    /// COMMIT that travels behind statements whose answers nobody has seen says whether it committed: after one that failed it
    /// fails too, instead of rolling back without a word.
    #[tokio::test]
    async fn a_commit_behind_a_failed_statement_says_so() {
        let store = store(&[]);
        for (second, is_good) in [("SELECT 1 / 0", false), ("SELECT 1", true)] {
            let session = store.session("together").await.expect("a connection");
            session.begin().await.expect("begun");
            let table = "CREATE TEMPORARY TABLE travels ON COMMIT PRESERVE ROWS AS SELECT 1";
            let first = session.prepare(table).await.expect("prepared");
            let second = session.prepare(second).await.expect("prepared");
            let (made, asked, committed) = tokio::join!(
                session.execute_prepared(&first, &[]),
                session.execute_prepared(&second, &[]),
                session.commit_unless_failed(),
            );
            assert_eq!(
                (made.is_ok(), asked.is_ok(), committed.is_ok()),
                (true, is_good, is_good)
            );
            if !is_good {
                let error = committed.expect_err("nothing was committed");
                assert_eq!(error.sqlstate.as_deref(), Some("25P02"), "{error}");
            }
            session.undo().await;
            let there = session.query("SELECT to_regclass('travels') IS NOT NULL", &[]).await;
            assert_eq!(there.expect("asked")[0].get::<_, bool>(0), is_good);
        }
    }

    /// A dropped question goes on at the server; its connection is nobody's any more.
    #[tokio::test]
    async fn a_connection_that_did_not_answer_leaves_the_pool() {
        let store = store(&[
            ("database.statement_timeout", "10ms"),
            ("database.client_deadline", "100ms"),
        ]);
        let session = store.session("first").await.expect("a connection");
        session.begin().await.expect("begun");
        session
            .execute("SET LOCAL statement_timeout = 0", &[])
            .await
            .expect("no limit");
        let first = backend(&session).await;
        let error = session.query("SELECT pg_sleep(60)", &[]).await.expect_err("too late");
        assert_eq!(error.fate, Fate::Away, "{error}");
        drop(session);
        let session = store.session("second").await.expect("a connection");
        let second = backend(&session).await;
        assert_ne!(first, second);
        let end = session.query("SELECT pg_terminate_backend($1)", &[&first]).await;
        assert!(end.is_ok(), "{end:?}");
    }

    /// Whoever lends us the connection, and whatever was told to it before: the server's limits are ours.
    #[tokio::test]
    async fn the_limits_go_with_every_statement() {
        let store = store(&[
            ("database.statement_timeout", "4s"),
            ("database.lock_timeout", "1234ms"),
        ]);
        let session = store.session("limits").await.expect("a connection");
        let client = session.client().expect("it is there");
        // As another who had the connection before may have left it.
        let left = "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0";
        client.batch_execute(left).await.expect("set");
        let sql = "SELECT current_setting('statement_timeout'), current_setting('lock_timeout'),
                   current_setting('idle_in_transaction_session_timeout') <> '0'";
        let limits = async || {
            let rows = session.query(sql, &[]).await.expect("an answer");
            let row = rows.first().expect("a row");
            (row.get::<_, String>(0), row.get::<_, String>(1), row.get::<_, bool>(2))
        };
        assert_eq!(limits().await, ("4s".into(), "1234ms".into(), true), "by itself");
        session.begin().await.expect("begun");
        assert_eq!(limits().await, ("4s".into(), "1234ms".into(), true), "in a transaction");
        session.rollback().await;
    }

    /// A statement by itself that fails leaves the connection as it was.
    #[tokio::test]
    async fn a_statement_by_itself_is_a_transaction_of_its_own() {
        let store = store(&[]);
        let session = store.session("alone").await.expect("a connection");
        assert!(session.query("SELECT 1 / 0", &[]).await.is_err());
        let rows = session.query("SELECT 'here' AS x", &[]).await.expect("it goes on");
        assert_eq!(rows.first().map(|row| row.get::<_, String>(0)).as_deref(), Some("here"));
        assert_eq!(session.round_trips.load(Ordering::Relaxed), 2, "one each");
    }
}

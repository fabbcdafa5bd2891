//! The only room with SQL: the pool, named transactions, and what an error of the database means for the work in hand.

pub mod audit;
pub mod batch;
pub mod books;
pub mod dead_letter_space;
pub mod dead_letters;
pub mod due;
pub mod filing;
pub mod held;
pub mod letters;
pub mod life;
pub mod locked;
pub mod outbox;
pub mod plans;
pub mod reconcile;
pub mod registry;
pub mod runs;
pub mod told;
pub mod trouble;
pub mod vitals;

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool_postgres::{Hook, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use tokio_postgres::{NoTls, Row, config::SslMode, error::SqlState, types::ToSql};
use tokio_postgres_rustls::MakeRustlsConnect;

use self::trouble::Trouble;

use crate::{
    config::Settings,
    fail::{self, Injected, Point},
    telemetry::Signal,
    tls,
};

/// Under which name the pool logs what we say ourselves.
pub const LOG_TARGET: &str = "deadpool_postgres";

/// How long a question that reads a whole table may take. The server's own limit is lifted for it.
const LONG: Duration = Duration::from_secs(6 * 60 * 60);

/// What an error means for the work in hand. Decided by SQLSTATE, never by text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The server chose us to give way, or somebody was quicker: load again and try at once, a bounded number of times.
    Retry,
    /// One message of the batch may be the cause: bisect.
    Bisect,
    /// The database is away or going away: pause and reconnect.
    Away,
    /// Our fault (a missing grant, table, column; anything unknown): pause and alarm, never a dead letter.
    Ours,
    /// The batch's own id is there already: an earlier attempt committed.
    CommittedBefore,
    /// Another worker judged these messages meanwhile: there is nothing left to do.
    Overtaken,
}

/// An error of ours. Never a verdict.
#[derive(Debug)]
pub struct StoreError {
    /// The transaction or command it happened in.
    pub during: &'static str,
    pub fate: Fate,
    /// The SQLSTATE, where the server answered.
    pub sqlstate: Option<String>,
    /// It happened at COMMIT: whether the transaction committed is unknown.
    pub at_commit: bool,
    trouble: Trouble,
    sentence: String,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.during, self.sentence)?;
        match &self.sqlstate {
            Some(code) => write!(f, " (SQLSTATE {code})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for StoreError {}

impl StoreError {
    fn new(during: &'static str, fate: Fate, sentence: impl Into<String>) -> Self {
        Self {
            during,
            fate,
            sqlstate: None,
            at_commit: false,
            trouble: match fate {
                Fate::Away => Trouble::NoAnswer,
                Fate::Retry | Fate::Bisect | Fate::Ours | Fate::CommittedBefore | Fate::Overtaken => Trouble::Refuses,
            },
            sentence: sentence.into(),
        }
    }

    /// Something that one message of the batch may have caused.
    pub fn blame_the_batch(sentence: &str) -> Self {
        Self::new("settle_batch", Fate::Bisect, sentence)
    }

    /// What is locked can not be kept apart either.
    pub fn room_is_full() -> Self {
        Self::new(
            "settle_batch",
            Fate::Retry,
            "somebody's open transaction has locked what messages need, and there is no room left to hold them meanwhile",
        )
    }

    fn from_postgres(during: &'static str, error: &tokio_postgres::Error) -> Self {
        let sentence = match error.as_db_error() {
            // The server's primary message names tables and constraints; its DETAIL would echo values.
            Some(db) => db.message().to_owned(),
            None => error.to_string(),
        };
        Self {
            during,
            fate: fate_of(error),
            sqlstate: error.code().map(|code| code.code().to_owned()),
            at_commit: false,
            trouble: error
                .code()
                .map_or_else(|| Trouble::of_error(error), |code| Trouble::of_code(code.code())),
            sentence,
        }
    }

    /// Whether a lock was waited for in vain.
    pub fn is_lock_wait(&self) -> bool {
        self.sqlstate.as_deref() == Some(SqlState::LOCK_NOT_AVAILABLE.code())
    }

    /// Whether the statement cache of the connection is stale.
    fn is_stale_plan(&self) -> bool {
        self.sqlstate.as_deref() == Some(SqlState::FEATURE_NOT_SUPPORTED.code())
    }

    /// Whether the tables are missing or older than this program.
    pub fn is_schema(&self) -> bool {
        self.sqlstate
            .as_deref()
            .is_some_and(|code| code.starts_with("42") || code.starts_with("3F"))
    }
}

/// What an injected error stands for: the connection broke.
impl From<Injected> for StoreError {
    fn from(_: Injected) -> Self {
        Self::new("a fail point", Fate::Away, "the connection broke, as a test asked for")
    }
}

/// The table "SQLSTATE to fate".
fn fate_of(error: &tokio_postgres::Error) -> Fate {
    let Some(db) = error.as_db_error() else {
        return Fate::Away;
    };
    if *db.code() == SqlState::UNIQUE_VIOLATION {
        return match db.table() {
            Some("batches") => Fate::CommittedBefore,
            // Somebody else wrote the same receipt, parked row or dead letter first: load again and see it.
            Some("receipts" | "parked" | "dead_letters") => Fate::Retry,
            _ => Fate::Bisect,
        };
    }
    fate_of_code(db.code().code())
}

fn fate_of_code(code: &str) -> Fate {
    match code {
        "40001" | "40P01" | "55P03" | "57014" | "0A000" => Fate::Retry,
        "23502" | "23503" | "23505" | "23514" | "P0001" | "54000" => Fate::Bisect,
        "25006" | "25P03" | "57P01" | "57P02" | "57P03" | "57P05" => Fate::Away,
        _ => match code.get(..2) {
            Some("22") => Fate::Bisect,
            Some("53" | "08") => Fate::Away,
            _ => Fate::Ours,
        },
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("pool", &self.pool.status())
            .finish_non_exhaustive()
    }
}

/// The database.
#[derive(Clone)]
pub struct Store {
    pool: Pool,
    client_deadline: Duration,
    /// How long a batch waits for a lock.
    lock_patience: Duration,
    /// Bytes of all parked messages when they were counted last: a sum over all of them is not for every batch.
    parked_bytes: Arc<AtomicU64>,
}

impl Store {
    /// Makes the pool; connects to nothing yet.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub fn new(settings: &Settings) -> Result<Self, String> {
        let allow_plaintext = settings.allow_plaintext;
        let lock_patience = settings.worker.lock_patience.min(settings.database.lock_timeout);
        let settings = &settings.database;
        let (mut config, encrypted) = parse_url(settings.url.expose())?;
        config.connect_timeout(settings.connect_timeout);
        config.tcp_user_timeout(settings.client_deadline);
        // The socket counts whole seconds, and refuses none of them.
        config.keepalives_idle(settings.client_deadline.max(Duration::from_secs(1)));
        if config.get_application_name().is_none() {
            config.application_name("settled");
        }
        let limits = format!(
            "-c statement_timeout={} -c lock_timeout={} -c idle_in_transaction_session_timeout={}",
            settings.statement_timeout.as_millis(),
            settings.lock_timeout.as_millis(),
            settings.idle_in_transaction_timeout.as_millis(),
        );
        let options = config
            .get_options()
            .map_or(limits.clone(), |given| format!("{limits} {given}"));
        config.options(options);
        if !encrypted && !allow_plaintext && !is_local(&config) {
            return Err(
                "the database is on another machine and its URL asks for no encryption; use sslmode=verify-full \
                        (or, where the network itself is trusted, set allow_plaintext = true)"
                    .into(),
            );
        }
        let recycling = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let manager = if encrypted {
            config.ssl_mode(SslMode::Require);
            let tls = tls::client_config(settings.ca_file.as_deref())?;
            Manager::from_config(config, MakeRustlsConnect::new(tls), recycling)
        } else {
            config.ssl_mode(SslMode::Disable);
            Manager::from_config(config, NoTls, recycling)
        };
        let pool = Pool::builder(manager)
            .max_size(settings.pool_size)
            .wait_timeout(Some(settings.acquire_timeout))
            .create_timeout(Some(settings.connect_timeout))
            .recycle_timeout(Some(settings.connect_timeout))
            .runtime(Runtime::Tokio1)
            .pre_recycle(Hook::sync_fn(|client, _| {
                if client.is_closed() {
                    return Err(deadpool_postgres::HookError::message("the connection is closed"));
                }
                Ok(())
            }))
            .build()
            .map_err(|error| format!("the connection pool could not be made: {error}"))?;
        Ok(Self {
            pool,
            client_deadline: settings.client_deadline,
            lock_patience,
            parked_bytes: Arc::default(),
        })
    }

    async fn connection(&self, during: &'static str) -> Result<Object, StoreError> {
        self.pool.get().await.map_err(|error| match error {
            deadpool_postgres::PoolError::Backend(error) => {
                let mut away = StoreError::from_postgres(during, &error);
                // A refused password or a missing database is a setting of somebody's; waiting is still all we can do.
                away.fate = Fate::Away;
                away.sentence = match (error.as_db_error(), std::error::Error::source(&error)) {
                    (Some(db), _) => trouble::without_names(db.message()),
                    (None, Some(cause)) => format!("{}: {cause}", away.sentence),
                    (None, None) => away.sentence,
                };
                away
            }
            other => StoreError::new(during, Fate::Away, format!("no connection to the database: {other}")),
        })
    }

    /// Takes a connection for a named piece of work. Statements on it are each their own transaction until
    /// [`Session::begin`].
    ///
    /// # Errors
    /// No connection.
    async fn session(&self, name: &'static str) -> Result<Session, StoreError> {
        Ok(Session {
            client: Some(self.connection(name).await?),
            name,
            deadline: self.client_deadline,
            at_work: AtomicUsize::new(0),
            round_trips: AtomicU64::new(0),
            begun: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            spent: AtomicBool::new(false),
            rehearsal: false,
            parked_bytes: self.parked_bytes.load(Ordering::Relaxed),
        })
    }
}

/// A connection in use, with a name that stands in every error. Begin and commit stand in plain sight of the caller: a
/// transaction that takes a closure could not be spawned. The first error inside a transaction poisons it: after that it
/// can only be rolled back, because the server answers COMMIT of a failed transaction with success.
pub(crate) struct Session {
    client: Option<Object>,
    name: &'static str,
    deadline: Duration,
    /// Statements whose answer is awaited. A dropped future does not cancel its statement.
    at_work: AtomicUsize,
    /// Times that it began to wait for the server.
    round_trips: AtomicU64,
    begun: AtomicBool,
    poisoned: AtomicBool,
    /// The server is going away or turned read-only: this connection is of no more use.
    spent: AtomicBool,
    /// Nothing is committed: statements run even where they have nothing to write.
    rehearsal: bool,
    parked_bytes: u64,
}

impl Session {
    /// Whether a statement without rows is left out.
    fn skips(&self, empty: bool) -> bool {
        empty && !self.rehearsal
    }

    /// Asks the server. What is sent while an earlier question is under way costs no round trip of its own.
    async fn ask<T>(&self, work: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, StoreError> {
        if self.at_work.load(Ordering::Relaxed) == 0 {
            self.round_trips.fetch_add(1, Ordering::Relaxed);
        }
        self.answer(work).await
    }

    /// Waits for an answer, under the client's deadline.
    async fn answer<T>(&self, work: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, StoreError> {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        let done = tokio::time::timeout(self.deadline, work).await;
        let error = match done {
            Ok(answered) => {
                self.at_work.fetch_sub(1, Ordering::Relaxed);
                match answered {
                    Ok(value) => return Ok(value),
                    Err(error) => StoreError::from_postgres(self.name, &error),
                }
            }
            Err(_) => {
                let sentence = format!("the database did not answer within {:?}", self.deadline);
                StoreError::new(self.name, Fate::Away, sentence)
            }
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

    /// Keeps the transaction from being committed.
    fn poison(&self) {
        self.poisoned.store(true, Ordering::Relaxed);
    }

    /// Passes a fail point. A rehearsal passes none: what is counted are batches.
    async fn pass(&self, point: Point) -> Result<(), StoreError> {
        if self.rehearsal {
            return Ok(());
        }
        fail::fallible(point).await.map_err(|injected| self.broken(injected))
    }

    /// The transaction must not commit, and why.
    fn must_not_commit(&self, fate: Fate, sentence: &str) -> StoreError {
        self.poisoned.store(true, Ordering::Relaxed);
        StoreError::new(self.name, fate, sentence)
    }

    /// A connection that broke ends its transaction, and is of no more use.
    fn broken(&self, injected: Injected) -> StoreError {
        self.poisoned.store(true, Ordering::Relaxed);
        self.spent.store(true, Ordering::Relaxed);
        StoreError {
            during: self.name,
            ..injected.into()
        }
    }

    fn client(&self) -> Result<&Object, StoreError> {
        self.client.as_ref().ok_or_else(|| {
            StoreError::new(
                self.name,
                Fate::Ours,
                "the connection was given back before its last use",
            )
        })
    }

    /// Opens the transaction of a batch, which waits for a lock only so long. One message, as a plain BEGIN is.
    async fn begin_impatient(&self, patience: Duration) -> Result<(), StoreError> {
        self.begun.store(true, Ordering::Relaxed);
        let sql = format!("BEGIN; SET LOCAL lock_timeout = {}", patience.as_millis().max(1));
        self.ask(self.client()?.batch_execute(&sql)).await
    }

    /// Opens a transaction of one moment that may take long and changes nothing.
    async fn begin_long(&mut self) -> Result<(), StoreError> {
        self.deadline = LONG;
        self.begin_read_only().await?;
        self.execute("/* store::begin_long */ SET LOCAL statement_timeout = 0", &[])
            .await?;
        // Sums over whole tables: hashes that stay in memory are worth it for one connection.
        self.execute("/* store::begin_long */ SET LOCAL work_mem = '64MB'", &[])
            .await
            .map(drop)
    }

    /// The row of a question that has one answer.
    fn one<'r>(&self, rows: &'r [Row]) -> Result<&'r Row, StoreError> {
        rows.first()
            .ok_or_else(|| StoreError::new(self.name, Fate::Ours, "a question that has one answer had none"))
    }

    /// Opens the transaction; joined with the first statements it costs no round trip of its own.
    async fn begin(&self) -> Result<(), StoreError> {
        self.begun.store(true, Ordering::Relaxed);
        self.ask(self.client()?.batch_execute("BEGIN")).await
    }

    /// Opens a transaction that reads one moment and changes nothing.
    async fn begin_read_only(&self) -> Result<(), StoreError> {
        self.begun.store(true, Ordering::Relaxed);
        self.ask(
            self.client()?
                .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"),
        )
        .await
    }

    /// A query by a statement prepared once per connection. Every statement opens with a comment that names its function.
    async fn query(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        let client = self.client()?;
        let statement = self.answer(client.prepare_cached(sql)).await?;
        self.ask(client.query(&statement, params)).await
    }

    /// The same, for the number of rows touched.
    async fn execute(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, StoreError> {
        let client = self.client()?;
        let statement = self.answer(client.prepare_cached(sql)).await?;
        self.ask(client.execute(&statement, params)).await
    }

    /// Like [`Session::execute`], and the number of rows must be the expected one.
    async fn execute_exactly(&self, rows: usize, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<(), StoreError> {
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
    async fn prepare(&self, sql: &str) -> Result<(), StoreError> {
        self.answer(self.client()?.prepare_cached(sql)).await.map(drop)
    }

    /// Commits, unless any statement failed.
    ///
    /// # Errors
    /// With `at_commit` set, whether it committed is unknown.
    async fn commit(self) -> Result<(), StoreError> {
        if self.poisoned.load(Ordering::Relaxed) {
            let name = self.name;
            self.rollback().await;
            return Err(StoreError::new(
                name,
                Fate::Ours,
                "a transaction with a failed statement is never committed",
            ));
        }
        let commit = self.ask(self.client()?.batch_execute("COMMIT"));
        let done = match fail::underway(Point::CommitSent, commit).await {
            Ok(Ok(())) => self.pass(Point::AfterCommit).await,
            Ok(Err(error)) => Err(error),
            Err(injected) => Err(self.broken(injected)),
        };
        done.inspect(|()| self.begun.store(false, Ordering::Relaxed))
            .map_err(|error| StoreError {
                at_commit: true,
                ..error
            })
    }

    /// Rolls back. Dropping a transaction closes its connection instead, which does as much and costs a new one.
    async fn rollback(self) {
        let Ok(client) = self.client() else {
            return;
        };
        if self.ask(client.batch_execute("ROLLBACK")).await.is_ok() {
            self.begun.store(false, Ordering::Relaxed);
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

/// Reads a URL or DSN. tokio-postgres knows neither `verify-full` nor a custom authority; both `require` and
/// `verify-full` check the certificate and the host's name here, which is stricter than libpq's `require`.
fn parse_url(text: &str) -> Result<(tokio_postgres::Config, bool), String> {
    if text.is_empty() {
        return Err("no database is set; set SETTLED_DATABASE_URL".into());
    }
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let (cleaned, mode) = take_sslmode(text, is_url);
    let config: tokio_postgres::Config = cleaned
        .parse()
        .map_err(|error: tokio_postgres::Error| unreadable(&error))?;
    let encrypted = match mode {
        // One that tokio-postgres found where we did not look (spaces around the equals sign) counts as well.
        None => config.get_ssl_mode() == SslMode::Require,
        Some("disable") => false,
        Some("require" | "verify-full") => true,
        Some(other) => {
            // The words that libpq knows are no secret; any other may be a piece of one.
            let known = ["allow", "prefer", "verify-ca"].into_iter().find(|word| *word == other);
            return Err(format!(
                "sslmode{} of the database URL is not one of disable, require, verify-full (prefer would fall back to \
                 plaintext silently)",
                known.map(|word| format!("={word}")).unwrap_or_default()
            ));
        }
    };
    Ok((config, encrypted))
}

/// Options of a connection string that may be named; anything else in a complaint may be a piece of a password.
const OPTIONS: [&str; 14] = [
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "sslmode",
    "host",
    "hostaddr",
    "port",
    "connect_timeout",
    "keepalives",
    "target_session_attrs",
    "channel_binding",
    "load_balance_hosts",
];

/// Why a connection string can not be read, without a word of it: what looks like an option may be a piece of the password.
fn unreadable(error: &tokio_postgres::Error) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), |cause| cause.to_string());
    let named = OPTIONS
        .iter()
        .find(|option| text.contains(&format!("option `{option}`")));
    match named {
        Some(option) => format!("the database URL can not be read: the value of its option {option} is wrong"),
        None => "the database URL can not be read: write it as postgres://user:password@host:5432/name, with what is \
                 not a letter, a digit, -, . or _ in the password as %XX, or as key=value pairs"
            .into(),
    }
}

/// Takes `sslmode=...` out of a URL's query or a DSN, and leaves everything else as it stands.
fn take_sslmode(text: &str, is_url: bool) -> (String, Option<&str>) {
    let is_border = |before: Option<char>| match before {
        None => true,
        Some(before) if is_url => before == '?' || before == '&',
        Some(before) => before.is_whitespace(),
    };
    let found = text
        .match_indices("sslmode=")
        .find(|(at, _)| is_border(text.get(..*at).and_then(|head| head.chars().next_back())));
    let Some((at, key)) = found else {
        return (text.to_owned(), None);
    };
    let (head, rest) = text.split_at(at);
    let rest = rest.get(key.len()..).unwrap_or_default();
    let end = rest
        .find(|letter: char| if is_url { letter == '&' } else { letter.is_whitespace() })
        .unwrap_or(rest.len());
    let (mode, tail) = rest.split_at(end);
    let cleaned = if is_url {
        format!("{head}{}", tail.strip_prefix('&').unwrap_or(tail))
    } else {
        format!("{head}{tail}")
    };
    (
        cleaned.trim_end_matches(['?', '&']).to_owned(),
        Some(mode.trim_matches('\'')),
    )
}

/// Whether every host is this machine, by name and, where one is given, by number: the number is what is connected to.
fn is_local(config: &tokio_postgres::Config) -> bool {
    let by_name = config.get_hosts().iter().all(|host| match host {
        tokio_postgres::config::Host::Tcp(name) => tls::is_loopback(name),
        tokio_postgres::config::Host::Unix(_) => true,
    });
    by_name && config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback)
}

mod embedded {
    refinery::embed_migrations!("src/store/schema");
}

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

impl Store {
    /// Applies the migrations that are missing and names them.
    ///
    /// # Errors
    /// The database is away, or refuses.
    pub async fn migrate(&self) -> Result<Vec<String>, StoreError> {
        let mut client = self.connection("migrate").await?;
        // Two programs that migrate at once wait for each other; the lock goes with the connection.
        client
            .batch_execute(
                "/* store::migrate */
                SET statement_timeout = 0;
                SET lock_timeout = 0;
                SELECT pg_advisory_lock(7236101);
                CREATE SCHEMA IF NOT EXISTS settled",
            )
            .await
            .map_err(|error| StoreError::from_postgres("migrate", &error))?;
        // Named with its schema: a user called settled has that schema first in its search_path once it exists, and would
        // look for its history in two places.
        let report = embedded::migrations::runner()
            .set_migration_table_name("settled.refinery_schema_history")
            .run_async(&mut **client.as_mut())
            .await;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<(bool, bool), String> {
        parse_url(url).map(|(config, encrypted)| (encrypted, is_local(&config)))
    }

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

    /// A dropped question goes on at the server; its connection is nobody's any more.
    #[tokio::test]
    async fn a_connection_that_did_not_answer_leaves_the_pool() {
        let store = store(&[
            ("database.statement_timeout", "10ms"),
            ("database.client_deadline", "100ms"),
        ]);
        let session = store.session("first").await.expect("a connection");
        session.query("SET statement_timeout = 0", &[]).await.expect("no limit");
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

    /// deadpool's own settings would leave these out.
    #[test]
    fn the_url_is_read_by_tokio_postgres_itself() {
        let url =
            "postgres://u:p@a,b/db?target_session_attrs=read-write&channel_binding=require&load_balance_hosts=random";
        let (config, _) = parse_url(url).expect("a URL");
        assert_eq!(
            (
                config.get_target_session_attrs(),
                config.get_channel_binding(),
                config.get_load_balance_hosts()
            ),
            (
                tokio_postgres::config::TargetSessionAttrs::ReadWrite,
                tokio_postgres::config::ChannelBinding::Require,
                tokio_postgres::config::LoadBalanceHosts::Random,
            )
        );
    }

    #[test]
    fn urls_say_whether_they_are_encrypted_and_local() {
        let (plain, encrypted, local, remote) = (false, true, true, false);
        for (url, expected) in [
            ("postgres://u:p@localhost/db", (plain, local)),
            ("postgres://u:p@127.0.0.1:5433/db?application_name=x", (plain, local)),
            ("postgresql://u:p@[::1]/db", (plain, local)),
            ("postgres://u:p@%2Fvar%2Frun%2Fpostgresql/db", (plain, local)),
            ("postgres://u:p@db.internal/db", (plain, remote)),
            ("postgres://u:p@localhost,db.internal/db", (plain, remote)),
            ("postgres://u:p@/db?hostaddr=10.0.0.5", (plain, remote)),
            ("postgres://u:p@localhost/db?hostaddr=10.0.0.5", (plain, remote)),
            ("host=localhost hostaddr=10.0.0.5", (plain, remote)),
            ("postgres://u:p@db.internal/db?sslmode=require", (encrypted, remote)),
            (
                "postgres://u:p@db.internal/db?connect_timeout=3&sslmode=verify-full",
                (encrypted, remote),
            ),
            (
                "postgres://u:p@db.internal/db?sslmode=verify-full&connect_timeout=3",
                (encrypted, remote),
            ),
            (
                "host=db.internal user=u password='a  b' sslmode='verify-full' dbname=db",
                (encrypted, remote),
            ),
            ("host=db.internal user=u sslmode = require", (encrypted, remote)),
            ("postgres://u:sslmode=x@db.internal/db?sslmode=disable", (plain, remote)),
        ] {
            assert_eq!(read(url), Ok(expected), "{url}");
        }
        for url in [
            "",
            "postgres://u:p@h/db?sslmode=prefer",
            "postgres://u:p@h/db?sslmode=verify-ca",
            "nonsense",
        ] {
            let sentence = read(url).expect_err(url);
            assert!(!sentence.contains(":p@"), "{sentence}");
        }
        // Wherever a password stands, written as it should not be, no piece of it is repeated.
        for url in [
            "postgres://u:hunter2@h:hunter2/db",
            "postgres://u:x?sslmode=hunter2@h/db",
            "postgres://u:x&sslmode=hunter2@h/db?sslmode=hunter2",
            "postgres://u:p@h/db?sslmode=hunter2",
            "postgres://u:p@h/db?sslmode=hunter2,require",
            "postgres://u:p@h/db?hunter2=hunter2",
            "postgres://u:p@h/db?port=hunter2",
            "postgres://u:p@h/db?connect_timeout=hunter2",
            "postgres://u:p@h/db?target_session_attrs=hunter2",
            "postgres://u:%hunter2@h/db?hostaddr=hunter2",
            "postgres://u:hunter2/hunter2@h/db?channel_binding=hunter2",
            "postgresql://hunter2:hunter2/x?hunter2",
            "host=h password=hun ter2 hunter2",
            "host=h password='hunter2",
            "host=h sslmode=hunter2 password=hunter2",
            "host=h sslmode='hunter2' password=hunter2",
            "host=h sslmode = hunter2",
            "host=h hunter2=hunter2",
            "host=h port=hunter2",
        ] {
            let sentence = read(url).expect_err(url);
            assert!(
                !sentence.contains("unter2") && !sentence.contains("ter2"),
                "{url}: {sentence}"
            );
        }
    }

    #[test]
    fn a_password_keeps_its_blanks() {
        let (config, _) = parse_url("host=h user=u password='a  b' sslmode=require").expect("a DSN");
        assert_eq!(config.get_password(), Some(b"a  b".as_slice()));
    }

    #[test]
    fn every_listed_state_has_its_fate() {
        for (fate, codes) in [
            (Fate::Retry, vec!["40001", "40P01", "55P03", "57014", "0A000"]),
            (
                Fate::Bisect,
                vec!["22003", "22P02", "23502", "23503", "23505", "23514", "P0001", "54000"],
            ),
            (
                Fate::Away,
                vec![
                    "25006", "25P03", "57P01", "57P02", "57P03", "57P05", "53300", "53100", "08006", "08P01",
                ],
            ),
            (
                Fate::Ours,
                vec!["42501", "42P01", "42703", "3F000", "XX000", "25P02", "58030", ""],
            ),
        ] {
            for code in codes {
                assert_eq!(fate_of_code(code), fate, "{code}");
            }
        }
    }
}

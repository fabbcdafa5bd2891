//! The only room with SQL: the pool, named transactions, and what an error of the database means for the work in hand.

pub mod audit;
pub mod batch;
pub mod books;
pub mod dead_letter_space;
pub mod dead_letters;
pub mod due;
mod error;
pub mod filing;
pub mod held;
pub mod letters;
pub mod life;
pub mod locked;
mod migrate;
pub mod outbox;
pub mod plans;
pub mod reconcile;
pub mod refused;
pub mod registry;
pub mod runs;
mod session;
pub mod told;
pub mod trouble;
mod url;
pub mod vitals;
mod write;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_postgres::{Hook, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use tokio_postgres::{NoTls, config::SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

use self::session::{Limits, Session};
pub use self::{
    error::{Fate, StoreError},
    migrate::{check_schema, schema_version},
};
use crate::{config::Settings, tls};

/// Under which name the pool logs what we say ourselves.
pub const LOG_TARGET: &str = "deadpool_postgres";

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
    /// What the server is told with every transaction.
    limits: Arc<Limits>,
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
        let (mut config, encrypted) = url::parse_url(settings.url.expose())?;
        config.connect_timeout(settings.connect_timeout);
        config.tcp_user_timeout(settings.client_deadline);
        // The socket counts whole seconds, and refuses none of them.
        config.keepalives_idle(settings.client_deadline.max(Duration::from_secs(1)));
        if config.get_application_name().is_none() {
            config.application_name("settled");
        }
        if !encrypted && !allow_plaintext && !url::is_local(&config) {
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
            limits: Arc::new(Limits::of(settings)),
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
        let client = self.connection(name).await?;
        let parked_bytes = self.parked_bytes.load(Ordering::Relaxed);
        Ok(Session::new(
            client,
            name,
            self.client_deadline,
            Arc::clone(&self.limits),
            parked_bytes,
        ))
    }
}

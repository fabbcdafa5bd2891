//! The only room with SQL: the pool, named transactions, and what an error of the database means for the work in hand.

pub mod across;
mod allocations;
pub mod approvals;
pub mod audit;
pub mod batch;
pub mod books;
pub mod clients;
mod counted;
pub mod dead_letter_space;
pub mod dead_letters;
pub mod due;
pub mod epochs;
mod error;
pub mod filing;
pub mod funds;
pub mod held;
pub mod judged;
pub mod letters;
pub mod life;
pub mod locked;
mod migrate;
pub mod moves;
pub mod nonces;
pub mod outbox;
pub mod owned;
pub mod plans;
pub mod reconcile;
pub mod refused;
pub mod registry;
pub mod roles;
mod row;
pub mod runs;
mod servers;
mod session;
pub mod signatures;
mod standbys;
pub mod standing;
pub mod subject;
mod time;
pub mod tokens;
pub mod told;
pub mod trouble;
mod url;
pub mod vitals;
pub mod voices;
mod write;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use deadpool_postgres::Object;
use tokio_postgres::config::SslMode;

use self::{
    counted::Counted,
    runs::RunCounts,
    servers::Servers,
    session::{Limits, Session},
};
pub use self::{
    error::{Fate, StoreError},
    migrate::{check_compression, check_schema, schema_version},
    url::with_login,
};
use crate::{
    config::Settings,
    tls::{ClientFiles, TlsFilesError},
};

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

/// The database.
#[derive(Clone)]
pub struct Store {
    servers: Arc<Servers>,
    client_deadline: Duration,
    /// What the server is told with every transaction.
    limits: Arc<Limits>,
    /// How long a batch waits for a lock.
    lock_patience: Duration,
    /// Bytes of all parked messages when they were counted last: a sum over all of them is not for every batch.
    parked_bytes: Arc<AtomicU64>,
    /// Where there is TLS.
    files: Option<ClientFiles>,
    /// Of plans, how many of each would settle; and of runs that are over what they came to.
    plans_counted: Arc<Counted<i64>>,
    runs_counted: Arc<Counted<RunCounts>>,
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
        let tls = if encrypted {
            config.ssl_mode(SslMode::Require);
            let files = ClientFiles {
                section: "database",
                ca_file: settings.ca_file.clone(),
                certificate_file: settings.client_certificate_file.clone(),
                key_file: settings.client_key_file.clone(),
            };
            files.config().map_err(|error| error.to_string())?;
            Some(files)
        } else {
            config.ssl_mode(SslMode::Disable);
            None
        };
        Ok(Self {
            servers: Arc::new(Servers::new(&config, tls.as_ref(), settings)?),
            client_deadline: settings.client_deadline,
            limits: Arc::new(Limits::of(settings)),
            lock_patience,
            parked_bytes: Arc::default(),
            files: tls,
            plans_counted: Arc::default(),
            runs_counted: Arc::default(),
        })
    }

    /// Until when our own certificate counts; none where we have none to show.
    ///
    /// # Errors
    /// The file can not be read.
    pub fn certificate_until(&self) -> Result<Option<SystemTime>, TlsFilesError> {
        self.files.as_ref().map_or(Ok(None), ClientFiles::ends)
    }

    async fn connection(&self, during: &'static str) -> Result<Object, StoreError> {
        self.servers.connection(during).await.map(|(client, _)| client)
    }

    /// Takes a connection for a named piece of work. Statements on it are each their own transaction until
    /// [`Session::begin`].
    ///
    /// # Errors
    /// No connection.
    async fn session(&self, name: &'static str) -> Result<Session, StoreError> {
        let (client, server) = self.servers.connection(name).await?;
        let parked_bytes = self.parked_bytes.load(Ordering::Relaxed);
        Ok(Session::new(
            client,
            server,
            name,
            self.client_deadline,
            Arc::clone(&self.limits),
            parked_bytes,
        ))
    }
}

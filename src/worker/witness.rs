//! What the broker is told of the books, and whether the database is as new as that: looked at before a worker takes anything,
//! after each pause, and twice a second. A database that lacks what was committed is another one than before.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{STARTING, Worker, WorkerFailure};
use crate::{
    broker::{BrokerError, Connection, publisher::Publisher, topology, witness},
    domain::{
        delivery::BatchId,
        epoch::{BooksEpoch, EpochWord, Loss},
    },
    retry::{self, Backoff, Waited},
    store::StoreError,
    telemetry::{Dependency, Signal},
};

/// How often the broker is told, while anything is committed: so much of the end may be unknown to it after a kill.
const TELL: Duration = Duration::from_secs(1);
/// What a worker that ends takes at most to tell once more.
const LAST_WORD: Duration = Duration::from_secs(3);

/// What this worker knows of the books.
#[derive(Debug)]
pub struct Witness {
    /// The batch that was committed last here.
    last: Mutex<Option<BatchId>>,
    ours: Mutex<Option<BooksEpoch>>,
    /// Why no worker may go on with these books.
    lost: watch::Sender<Option<String>>,
}

impl Default for Witness {
    fn default() -> Self {
        Self {
            last: Mutex::default(),
            ours: Mutex::default(),
            lost: watch::Sender::new(None),
        }
    }
}

impl Witness {
    /// A batch was committed.
    pub(super) fn note(&self, id: BatchId) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
    }

    fn last(&self) -> Option<BatchId> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn word(&self) -> Option<EpochWord> {
        let ours = (*self.ours.lock().unwrap_or_else(PoisonError::into_inner))?;
        Some(EpochWord {
            books: ours.books,
            epoch: ours.epoch,
            batch: self.last(),
            at: Timestamp::now(),
        })
    }

    /// Resolves once the books turn out to be older than what was committed here.
    pub(super) async fn loss(&self) -> String {
        let mut lost = self.lost.subscribe();
        loop {
            if let Some(why) = lost.borrow_and_update().clone() {
                return why;
            }
            // The sender is our own.
            drop(lost.changed().await);
        }
    }
}

impl Worker {
    /// Whether the database answers, and has what was committed last.
    ///
    /// # Errors
    /// The database is away, or it is another one than before.
    pub(super) async fn ask_books(&self) -> Result<(), StoreError> {
        let store = &self.clerk.store;
        let Some(last) = self.witness.last() else {
            return store.ping().await;
        };
        if store.has_batch(last).await? {
            return Ok(());
        }
        let why = format!(
            "the database lost what it had committed: batch {last} is not there any more; it is a backup, or a standby that had \
             not heard everything"
        );
        self.gate.close();
        self.witness.lost.send_replace(Some(why.clone()));
        Err(StoreError::ours("has_batch", why))
    }

    /// Waits until broker and database answer, and the one has nothing that the other lacks.
    pub(super) async fn wait_for_books(&mut self) -> Result<Waited, WorkerFailure> {
        let mut backoff = Backoff::new(&self.settings.retry);
        loop {
            let waited = match self.look_at_books().await {
                Ok(()) => {
                    self.health.set_paused_by(STARTING, None);
                    return Ok(Waited::Over);
                }
                Err(Unsure::Lost(why)) => return Err(WorkerFailure::Loss(why)),
                Err(Unsure::Broker(BrokerError::Config(sentence))) => return Err(WorkerFailure::Setting(sentence)),
                Err(Unsure::Broker(BrokerError::Refused { code: 404, .. })) => {
                    return Err(WorkerFailure::Topology(format!(
                        "the broker does not have our queue {}; run `settled topology` first",
                        topology::EPOCH
                    )));
                }
                Err(Unsure::Broker(error)) => {
                    // A right that is missing is said in full: somebody has to give it.
                    let why = match error.code() {
                        Some(_) => error.to_string(),
                        None => error.trouble().to_owned(),
                    };
                    self.health.set_paused_by(STARTING, Some(why));
                    self.wait_for(Dependency::Broker, &error.to_string(), &mut backoff)
                        .await
                }
                Err(Unsure::Database(error)) => {
                    self.health.set_database_trouble(error.trouble().sentence());
                    self.wait_for(Dependency::Database, &error.to_string(), &mut backoff)
                        .await
                }
            };
            if waited == Waited::Stopping {
                return Ok(waited);
            }
        }
    }

    async fn look_at_books(&self) -> Result<(), Unsure> {
        let store = &self.clerk.store;
        let ours = store.books_epoch().await?;
        let connection = self.witness_connection().await?;
        let words = witness::words(&connection).await?;
        let (lacking, newest) = store.lacking(&words).await?;
        self.health.set_database_ok(true);
        let mut publisher = Publisher::open(&connection).await?;
        if let Some(loss) = Loss::of(ours, &words, &lacking, newest) {
            // What was told is kept for a while only, and who starts us may start us again and again.
            if let Some(word) = loss.told_by(&words) {
                witness::say(&mut publisher, word).await?;
            }
            return Err(Unsure::Lost(loss.to_string()));
        }
        *self.witness.ours.lock().unwrap_or_else(PoisonError::into_inner) = Some(ours);
        // Of a new epoch the others must hear, and of books that nobody told of.
        let first = EpochWord {
            books: ours.books,
            epoch: ours.epoch,
            batch: store.newest_batch().await?,
            at: Timestamp::now(),
        };
        witness::say(&mut publisher, &first).await?;
        drop(connection.close().await);
        Ok(())
    }

    async fn witness_connection(&self) -> Result<Connection, BrokerError> {
        let name = format!("{} epoch", self.settings.worker.name);
        Connection::open_without_consumer(&self.broker, &name).await
    }

    /// Tells the broker what was committed last, once more before the end.
    pub(super) async fn last_word(&self) {
        if self.witness.last().is_none() {
            return;
        }
        let telling = async {
            let connection = self.witness_connection().await?;
            let mut publisher = Publisher::open(&connection).await?;
            if let Some(word) = self.witness.word() {
                witness::say(&mut publisher, &word).await?;
            }
            connection.close().await
        };
        // What is not told is found out all the same if it was told a second before.
        drop(tokio::time::timeout(LAST_WORD, telling).await);
    }
}

/// Why it is not known whether the books are good.
enum Unsure {
    Lost(String),
    Broker(BrokerError),
    Database(StoreError),
}

impl From<BrokerError> for Unsure {
    fn from(error: BrokerError) -> Self {
        Unsure::Broker(error)
    }
}

impl From<StoreError> for Unsure {
    fn from(error: StoreError) -> Self {
        Unsure::Database(error)
    }
}

/// Tells the broker now and then what was committed last, until the program stops. A broker that is away is the lanes' to tell.
pub(super) async fn run(mut worker: Worker) {
    let mut told = None;
    let mut line: Option<(Connection, Publisher)> = None;
    loop {
        if retry::sleep(TELL, &mut worker.stop).await == Waited::Stopping {
            return;
        }
        let last = worker.witness.last();
        if last.is_none() || last == told {
            continue;
        }
        let Some(word) = worker.witness.word() else {
            continue;
        };
        let telling = async {
            let (connection, mut publisher) = match line.take() {
                Some(line) => line,
                None => {
                    let connection = worker.witness_connection().await?;
                    let publisher = Publisher::open(&connection).await?;
                    (connection, publisher)
                }
            };
            witness::say(&mut publisher, &word).await?;
            Ok::<_, BrokerError>((connection, publisher))
        };
        match telling.await {
            Ok(open) => {
                line = Some(open);
                told = last;
            }
            Err(error) => Signal::BooksNotTold {
                error: &error.to_string(),
            }
            .emit(),
        }
    }
}

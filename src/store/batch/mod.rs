//! A batch's two visits: load a [`Snapshot`] under locks, write a [`Changeset`](crate::domain::changeset::Changeset). Each is
//! one round trip (the load a second one where a message may be parked); arrays in, keys sorted. What is written stands in one
//! ordered list, in `writes`. Locks are taken in the order of every writer: allocations, receipts, who parks, what was told,
//! parked, dead letters, funds.

mod head;
mod load;
mod money;
mod parking;
mod receipts;

pub(super) use self::head::BatchHead;
use self::load::load;
use super::{
    Session, Store, StoreError, dead_letters, held,
    judged::JudgedBatch,
    told,
    write::{Write, write_all, write_and_commit},
};
use crate::{
    domain::{
        dead_letter,
        delivery::BatchId,
        message::MessageRef,
        snapshot::Snapshot,
        told::{Firsts, Tellings},
        verdict::Verdict,
    },
    fail::Point,
};

impl Store {
    /// Opens the transaction `settle_batch` and loads what the batch may touch.
    ///
    /// # Errors
    /// No connection, or the load failed.
    pub async fn open_batch(&self, batch: &[MessageRef<'_>]) -> Result<(OpenBatch, Snapshot), StoreError> {
        let session = self.session("settle_batch").await?;
        let snapshot = load(&session, batch, Some(self.lock_patience)).await?;
        Ok((OpenBatch { session }, snapshot))
    }

    /// The same snapshot for a judgement without effect: no locks, nothing written.
    ///
    /// # Errors
    /// No connection, or the load failed.
    pub async fn snapshot(&self, batch: &[MessageRef<'_>]) -> Result<Snapshot, StoreError> {
        let session = self.session("explain").await?;
        let snapshot = load(&session, batch, None).await?;
        session.rollback().await;
        Ok(snapshot)
    }
}

impl Store {
    /// Opens a transaction that will be undone: what a batch asks of the database, tried out before a message is in hand.
    /// Every statement runs, even one without rows, so that what is missing (a grant, a table, a column) shows.
    ///
    /// # Errors
    /// What the batch would meet.
    pub async fn open_rehearsal(&self, batch: &[MessageRef<'_>]) -> Result<(OpenBatch, Snapshot), StoreError> {
        let mut session = self.session("rehearse").await?;
        session.rehearsal = true;
        let snapshot = load(&session, batch, Some(self.lock_patience)).await?;
        Ok((OpenBatch { session }, snapshot))
    }
}

/// The transaction between load and write. Dropped, it leaves no trace.
pub struct OpenBatch {
    session: Session,
}

impl OpenBatch {
    /// What was told before of what this batch refuses and parks; what was not is told by this batch, and remembered.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn remember(&self, id: BatchId, tellings: &Tellings) -> Result<Firsts, StoreError> {
        told::remember(&self.session, id, tellings).await
    }

    /// Writes the outcome and takes it back.
    ///
    /// # Errors
    /// What the batch would meet.
    pub async fn rehearse(self, outcome: &JudgedBatch<'_>) -> Result<(), StoreError> {
        let mut done = write_all(&self.session, writes(outcome)?).await;
        if done.is_ok() {
            done = held::rehearse(&self.session).await;
        }
        self.session.rollback().await;
        done
    }

    /// Lets go of everything.
    pub async fn leave(self) {
        self.session.rollback().await;
    }

    /// Writes the outcome and commits.
    ///
    /// # Errors
    /// With `at_commit` set, whether it committed is unknown: try again under the same id.
    pub async fn write(self, outcome: &JudgedBatch<'_>) -> Result<(), StoreError> {
        write_and_commit(self.session, writes(outcome)?).await
    }
}

/// Everything that a batch writes, in the order in which it is sent, which is the order of the locks. The batch's own row comes
/// first: where it is there already nothing else is asked.
fn writes<'a>(outcome: &'a JudgedBatch<'_>) -> Result<Vec<Write<'a>>, StoreError> {
    let changes = outcome.changes;
    let rulings = dead_letters::rulings(outcome);
    let verdicts: Vec<&Verdict> = outcome.judged.iter().map(|(_, judgement)| &judgement.verdict).collect();
    let head = BatchHead {
        id: outcome.id,
        worker: outcome.worker,
        source: outcome.source,
        now: outcome.now,
        verdicts: &verdicts,
        letters: dead_letter::letters_of(outcome.judged.iter().copied()),
        publications: outcome.publications,
        kept: outcome.kept,
        event_source: outcome.event_source,
        lease: outcome.lease,
        published: outcome.published,
    };
    Ok(vec![
        head.write()?.then(Point::BatchInserted),
        held::leave(outcome),
        receipts::update(outcome),
        parking::lock(changes),
        parking::unpark(outcome),
        parking::park(outcome)?,
        parking::park_on(changes),
        parking::ask_again(changes)?,
        dead_letters::lock(&rulings),
        dead_letters::judge(outcome, rulings),
        receipts::distrust(outcome),
        receipts::still_revoked(changes),
        money::settle(outcome)?,
    ])
}

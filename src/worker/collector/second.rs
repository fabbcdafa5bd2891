//! The second way of what the broker dead-letters by itself: a copy of each comes to a queue that its cycle check can not cut
//! off. What surely came to the collector's own queue is let go here; what may not have is stored like any other.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    super::{
        Worker,
        consumer::{Consumer, Work, dispose, tag_of},
        patience::{Culprits, Gate, HandBack},
        publish::{Owned, PublishStage},
    },
    Account, PREFETCH_MAX, Storing,
    letters::Letters,
    trusted,
};
use crate::{
    broker::{intake::Disposer, topology},
    domain::{dead_letter, delivery::Delivery},
    store::StoreError,
};

/// Who pauses, as /readyz tells it.
const WHO: &str = "collector of the second way";

/// Goes on until the program stops. Whoever leaves the dead letters in their queue needs it too: what the broker keeps away
/// from that queue is nowhere else.
pub async fn collect(mut worker: Worker, account: Arc<Account>) {
    // Its own, as the collector's are.
    worker.culprits = Culprits::default();
    let settings = Arc::clone(&worker.settings);
    let owned = Owned::default();
    let mut stage = PublishStage::start(worker.row_publisher(WHO), &owned, &settings.outbox);
    let number = settings.worker.lanes + 1;
    let batch_max = settings.dead_letters.batch_max;
    let mut consumer = Consumer {
        number,
        name: WHO.to_owned(),
        queue: topology::BROKER_MADE.to_owned(),
        prefetch: u16::try_from(batch_max.saturating_mul(2))
            .map_or(PREFETCH_MAX, |prefetch| prefetch.min(PREFETCH_MAX)),
        batch_max,
        // Next to nothing is stored from here: there is nothing to wait for.
        linger: Duration::ZERO,
        gate: Gate::default(),
        work: Second(Storing {
            worker: worker.clone(),
            // Of its batches, which are not this consumer's: what waits here waits by itself.
            gate: Gate::default(),
            number,
            owned,
            committed: stage.entrance(),
            account,
            trusted: trusted(&worker),
        }),
        worker,
        misfit: None,
        unseen_told: false,
    };
    tokio::select! {
        () = stage.failed() => {}
        () = consumer.run() => {}
    }
    drop(consumer);
    stage.finish().await;
}

/// Stores what the first way may not have brought.
struct Second(Storing);

/// What is to be stored, and the tags of what is not.
#[derive(Clone, Default)]
struct Copies {
    letters: Letters,
    let_go: Vec<u64>,
}

impl Work for Second {
    type Batch = Copies;

    async fn read(&self, deliveries: Vec<Delivery>) -> Copies {
        let (cut, copies): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(dead_letter::may_be_cut);
        Copies {
            letters: self.0.read(cut).await,
            let_go: copies.iter().map(tag_of).collect(),
        }
    }

    async fn finish(&self, batch: Copies, received: Instant, disposer: &Disposer) -> Result<(), HandBack<Copies>> {
        let Copies { letters, let_go } = batch;
        let stored = letters.batch.deliveries.iter().map(tag_of).max();
        if stored.is_some() {
            // Acknowledges all up to its last, those in between that are let go included.
            self.0.finish(letters, received, disposer).await.map_err(|back| {
                back.map(|letters| Copies {
                    letters,
                    let_go: Vec::new(),
                })
            })?;
        }
        let rest: Vec<u64> = let_go.into_iter().filter(|tag| Some(*tag) > stored).collect();
        if !rest.is_empty() {
            dispose(disposer, self.0.number, &[], &rest).await;
        }
        Ok(())
    }

    async fn rehearse(&self, batch: &Copies) -> Result<(), StoreError> {
        self.0.rehearse(&batch.letters).await
    }

    fn attached(&self, _: bool) {}

    /// Nobody waits for it: what holds it up holds up the first way too, or is a right that only this queue asks for, which
    /// the doctor names.
    fn held_up(&self, _: Option<String>) {}

    fn misfit(&self, why: Option<String>) {
        self.0.worker.health.set_paused_by(WHO, why);
    }

    async fn detached(&self) {}

    async fn has_place(&self) {
        self.0.has_place().await;
    }
}

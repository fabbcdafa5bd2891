//! The second way of what the broker dead-letters by itself: a copy of each comes to a queue that its cycle check can not cut
//! off. What surely came to the collector's own queue is let go here; what may not have is stored like any other.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    super::{
        Worker,
        consumer::{Work, acknowledge},
        patience::{Gate, HandBack},
    },
    Collected, Storing, Way,
    letters::Letters,
    serve,
};
use crate::{
    broker::{intake::Disposer, topology},
    domain::{
        dead_letter,
        delivery::{Delivery, Source},
    },
    store::StoreError,
};

/// Who pauses, as /readyz tells it.
const WHO: &str = "collector of the second way";

/// Goes on until the program stops. Whoever leaves the dead letters in their queue needs it too: what the broker keeps away
/// from that queue is nowhere else.
pub async fn collect(worker: Worker, account: Arc<Collected>) {
    let way = Way {
        who: WHO,
        queue: topology::BROKER_MADE,
        // Next to nothing is stored from here: there is nothing to wait for.
        linger: Duration::ZERO,
    };
    // The gate is of this consumer's batches, which are not those that it stores: what waits here waits by itself.
    serve(worker, &account, &way, |storing| (Gate::default(), Second(storing))).await;
}

/// Stores what the first way may not have brought.
struct Second(Storing);

/// What is to be stored, and where that came from which is not.
#[derive(Clone, Default)]
struct Copies {
    letters: Letters,
    let_go: Vec<Source>,
}

impl Work for Second {
    type Batch = Copies;

    async fn read(&self, deliveries: Vec<Delivery>) -> Copies {
        let (cut, copies): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(dead_letter::may_be_cut);
        Copies {
            letters: self.0.read(cut).await,
            let_go: copies.iter().map(|delivery| delivery.source).collect(),
        }
    }

    async fn finish(&self, batch: Copies, received: Instant, disposer: &Disposer) -> Result<(), HandBack<Copies>> {
        let Copies { letters, let_go } = batch;
        let stored = letters.sources().filter_map(Source::delivery_tag).max();
        if stored.is_some() {
            // Acknowledges all up to its last, those in between that are let go included.
            self.0.finish(letters, received, disposer).await.map_err(|back| {
                back.map(|letters| Copies {
                    letters,
                    let_go: Vec::new(),
                })
            })?;
        }
        let rest = let_go.into_iter().filter(|source| source.delivery_tag() > stored);
        acknowledge(disposer, self.0.number, rest).await;
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

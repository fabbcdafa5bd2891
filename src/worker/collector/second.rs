//! The other ways of what the broker dead-letters by itself: a copy of each comes to a queue that no true record of a death
//! names, and one to a queue whose name nobody can know. What surely came by the way before is let go here; what may not have is
//! stored like any other.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{
    super::{
        Worker,
        consumer::{Work, acknowledge},
        patience::{Gate, HandBack},
    },
    Collected, Storing, Way,
    letters::{Effects, Letters},
    serve,
};
use crate::{
    broker::{
        Connection,
        intake::Disposer,
        topology::{self, Seen},
    },
    domain::{
        dead_letter::{self, Arrival},
        delivery::{Delivery, Source},
    },
    retry::{Backoff, Waited},
    store::StoreError,
    telemetry::{Dependency, Door, Signal},
};

/// Who pauses, as /readyz tells it.
const SECOND: &str = "collector of the second way";
const THIRD: &str = "collector of the third way";

/// Goes on until the program stops. Whoever leaves the dead letters in their queue (`is_first_taken` is false) needs it too: what
/// the broker keeps away from that queue is nowhere else.
pub(super) async fn collect(worker: Worker, account: Arc<Collected>, is_first_taken: bool) {
    let second = OtherWay {
        who: SECOND,
        may_be_cut: dead_letter::may_be_cut,
        is_first_taken,
    };
    let third = OtherWay {
        who: THIRD,
        may_be_cut: dead_letter::may_be_cut_twice,
        is_first_taken,
    };
    let hidden = async {
        if let Some(queue) = hidden(worker.clone()).await {
            make(&worker, &queue).await;
            third.serve(worker.clone(), &account, queue).await;
        }
    };
    tokio::join!(
        second.serve(worker.clone(), &account, topology::BROKER_MADE.to_owned()),
        hidden
    );
}

/// The queue whose name stands in the books; none: the program stops.
async fn hidden(mut worker: Worker) -> Option<String> {
    let mut backoff = Backoff::new(&worker.settings.retry);
    loop {
        match worker.clerk.store.books_epoch().await {
            Ok(books) => return Some(topology::hidden(books.books)),
            Err(error) => {
                let error = error.to_string();
                if worker.wait_for(Dependency::Database, &error, &mut backoff).await == Waited::Stopping {
                    return None;
                }
            }
        }
    }
}

/// `settled topology` may have come before the books whose id is in the queue's name. A worker that may declare it does; of one that
/// may not, whatever waits for the queue tells.
async fn make(worker: &Worker, queue: &str) {
    let name = format!("{} topology", worker.settings.worker.name);
    let Ok(connection) = Connection::open_without_consumer(&worker.broker, &name).await else {
        return;
    };
    if let Ok([Seen::Missing]) = topology::look_at_each(&connection, &[queue]).await.as_deref() {
        drop(topology::declare_hidden(&connection, queue).await);
    }
    // It is on its way out, and nothing else is on it.
    drop(connection.close().await);
}

/// One of the other ways.
#[derive(Clone, Copy)]
struct OtherWay {
    who: &'static str,
    /// Whether the broker may have kept a letter away from all ways before.
    may_be_cut: fn(&Delivery) -> bool,
    /// Whether somebody stores what comes to settlement.dead.
    is_first_taken: bool,
}

impl OtherWay {
    async fn serve(self, worker: Worker, account: &Arc<Collected>, queue: String) {
        let way = Way {
            who: self.who,
            queue,
            // Next to nothing is stored from here: there is nothing to wait for.
            linger: Duration::ZERO,
        };
        // The gate is of this consumer's batches, which are not those that it stores: what waits here waits by itself.
        serve(worker, account, &way, |storing| {
            (Gate::default(), Second { storing, way: self })
        })
        .await;
    }
}

/// Stores what the ways before may not have brought.
struct Second {
    storing: Storing,
    way: OtherWay,
}

/// What is to be stored, what comes by the way before as well, and where that came from which is let go.
#[derive(Clone, Default)]
struct Copies {
    cut: Letters,
    copies: Letters,
    let_go: Vec<Source>,
}

impl Copies {
    fn sources(&self) -> Vec<Source> {
        let letters = self.cut.sources().chain(self.copies.sources());
        letters.chain(self.let_go.iter().copied()).collect()
    }
}

impl Second {
    /// Which of these are not stored by now, by their places. The way before may have stored a letter with an earlier time than
    /// it has here: a time that the database's clock has not reached yet is cut to what that clock says.
    async fn missing(&self, copies: &Letters) -> Result<BTreeSet<usize>, StoreError> {
        let effects = Effects::default();
        let arrivals = copies.arrivals(&effects);
        let ids: Vec<_> = arrivals.iter().map(Arrival::id).collect();
        let filed = self.storing.worker.clerk.store.filed(&ids).await?;
        let now = Timestamp::now();
        let usual = self.storing.worker.settings.dead_letters.other_way_wait;
        let is_missing = |arrival: &Arrival<'_>| {
            let last = filed.get(&arrival.id());
            let stored = last.map(|last| last.saturating_add(usual).unwrap_or(Timestamp::MAX));
            stored.is_none_or(|stored| stored < dead_letter::failed_at(arrival, now))
        };
        let missing = arrivals.iter().enumerate().filter(|(_, arrival)| is_missing(arrival));
        Ok(missing.map(|(index, _)| index).collect())
    }

    /// Waits until all of them are stored, as long as that usually takes; answers those that are not. The broker hands a letter
    /// out by all ways at the same moment; but the way before may be held up, or lead nowhere: whoever takes away a binding
    /// tells nobody.
    async fn left_out(&self, copies: &Letters) -> Result<Letters, HandBack<Copies>> {
        let stop = self.storing.worker.stop.clone();
        let settings = &self.storing.worker.settings.dead_letters;
        // Where the program stops, what is on its way is stored sooner.
        let (usual, last) = (settings.other_way_wait, settings.other_way_wait / 5);
        let began = Instant::now();
        loop {
            let is_stopping = *stop.borrow();
            let is_over = began.elapsed() >= if is_stopping { last } else { usual };
            let missing = match self.missing(copies).await {
                Ok(missing) if missing.is_empty() => return Ok(Letters::default()),
                Ok(missing) => missing,
                // Who is away is told by the way before; these wait with it.
                Err(error) if is_over => return Err(HandBack::because(error.to_string())),
                Err(_) => (0..copies.len()).collect(),
            };
            if is_over && is_stopping {
                return Err(HandBack::because("the program stops"));
            }
            if is_over {
                let left_out = copies.part(|index| missing.contains(&index));
                let letters = u64::try_from(left_out.len()).unwrap_or(u64::MAX);
                Signal::DeadLettersLeftOut { letters }.emit();
                return Ok(left_out);
            }
            tokio::time::sleep(settings.other_way_poll).await;
        }
    }
}

impl Work for Second {
    type Batch = Copies;

    const DOOR: Door = Door::Dead;

    async fn read(&self, deliveries: Vec<Delivery>) -> Copies {
        let (cut, copies): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(self.way.may_be_cut);
        // Who leaves dead letters in their queue finds these there.
        if !self.way.is_first_taken {
            return Copies {
                cut: self.storing.read(cut).await,
                copies: Letters::default(),
                let_go: copies.iter().map(|delivery| delivery.source).collect(),
            };
        }
        let (cut, copies) = (self.storing.read(cut).await, self.storing.read(copies).await);
        // What no database can hold is set apart by the way before.
        let (copies, unstorable) = copies.sort();
        Copies {
            cut,
            copies,
            let_go: unstorable.sources().collect(),
        }
    }

    async fn finish(&self, batch: Copies, received: Instant, disposer: &Disposer) -> Result<(), HandBack<Copies>> {
        let sources = batch.sources();
        let left_out = self.left_out(&batch.copies).await?;
        let letters = Letters::both(&batch.cut, &left_out);
        let stored = letters.sources().filter_map(Source::delivery_tag).max();
        if stored.is_some() {
            // Acknowledges all up to its last, those in between that are let go included.
            self.storing.finish(letters, received, disposer).await.map_err(|back| {
                back.map(|letters| Copies {
                    cut: letters,
                    ..Copies::default()
                })
            })?;
        }
        let rest = sources.into_iter().filter(|source| source.delivery_tag() > stored);
        acknowledge(disposer, self.storing.number, rest).await;
        Ok(())
    }

    async fn rehearse(&self, batch: &Copies) -> Result<(), StoreError> {
        self.storing.rehearse(&batch.cut).await
    }

    fn attached(&self, _: bool) {}

    /// Nobody waits for it: what holds it up holds up the first way too, or is a right that only this queue asks for, which
    /// the doctor names.
    fn held_up(&self, _: Option<String>) {}

    fn misfit(&self, why: Option<String>) {
        self.storing.worker.health.set_paused_by(self.way.who, why);
    }

    async fn detached(&self) {}

    async fn has_place(&self) {
        self.storing.has_place().await;
    }
}

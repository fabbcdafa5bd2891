//! The second intake: parked messages that are due and dead letters to be replayed, judged by the same batch walk.

use std::{collections::BTreeSet, time::Instant};

use super::{
    Worker,
    driver::drive,
    held,
    in_hand::{InHand, Settler},
    publish::{Entrance, Owned, PublishStage, send_all},
};
use crate::{
    domain::{names::UPDATES, verdict::VerdictKind},
    fail::{self, Point},
    retry::{self, Backoff, Waited},
    settle::{Answered, Batch, next_step::Terms},
    store::StoreError,
    telemetry::{Dependency, Door, Signal, Stage},
};

/// Judges due messages until the program stops.
pub(crate) async fn run(mut worker: Worker) {
    let settings = worker.settings.clone();
    let owned = Owned::default();
    let mut stage = PublishStage::start(worker.row_publisher("due"), &owned, &settings.outbox);
    let entrance = stage.entrance();
    let mut other = worker.clone();
    let judging = async {
        tokio::join!(
            judge_due(&mut worker, &owned, &entrance),
            held::judge_held(&mut other, &owned, &entrance)
        )
    };
    tokio::select! {
        () = stage.failed() => {}
        ((), ()) = judging => {}
    }
    drop(entrance);
    stage.finish().await;
}

async fn judge_due(worker: &mut Worker, owned: &Owned, entrance: &Entrance) {
    let settings = worker.settings.clone();
    let mut backoff = Backoff::new(&settings.retry);
    loop {
        // Parked messages first, since somebody waits for them; then replays. A batch of each in turn: neither waits for more
        // than that of the other.
        let worked = async {
            let parked = judge_some(worker, Door::Parked, owned, entrance).await?;
            let replayed = !*worker.stop.borrow() && judge_some(worker, Door::Replayed, owned, entrance).await?;
            Ok::<_, StoreError>(parked || replayed)
        };
        let began = Instant::now();
        let waited = match worked.await {
            Ok(_) if *worker.stop.borrow() => Waited::Stopping,
            // A moment for others, where there are others: thousands may be due at once.
            Ok(true) => {
                let pause = worker.fairness.pause_for_others(&BTreeSet::new(), began.elapsed());
                retry::sleep(pause, &mut worker.stop).await
            }
            Ok(false) => {
                backoff.reset();
                retry::sleep(settings.park.poll, &mut worker.stop).await
            }
            Err(error) => {
                worker
                    .wait_for(Dependency::Database, &error.to_string(), &mut backoff)
                    .await
            }
        };
        if waited == Waited::Stopping {
            break;
        }
    }
}

/// Claims and judges what is due, bounded as a queue's batch is; says whether there was anything.
async fn judge_some(worker: &Worker, door: Door, owned: &Owned, entrance: &Entrance) -> Result<bool, StoreError> {
    let settings = &worker.settings;
    // Lanes count from zero; in logs this intake is the one after them.
    let lane = settings.worker.lanes;
    let (max, max_bytes) = (settings.worker.batch_max, settings.worker.batch_max_bytes);
    // A place in the publish stage first: the outbox must not grow while the broker takes nothing. It closes with the program.
    let Ok(place) = entrance.reserve().await else {
        return Ok(false);
    };
    let (store, lease) = (&worker.clerk.store, settings.park.lease);
    let claimed = match door {
        Door::Replayed => store.claim_replays(max, max_bytes, lease).await?,
        Door::Parked | Door::Held | Door::Queue | Door::Dead => store.claim_due(max, max_bytes, lease).await?,
    };
    if claimed.is_empty() {
        return Ok(false);
    }
    for key in claimed.unreadable {
        match door {
            Door::Replayed => Signal::ReplayUnreadable { id: key }.emit(),
            Door::Parked | Door::Held | Door::Queue | Door::Dead => Signal::ParkedUnreadable { key }.emit(),
        }
    }
    let received = Instant::now();
    let trace = worker.traces.begin(UPDATES, door, claimed.deliveries.iter());
    let judged = async {
        let batch = Batch::read(claimed.deliveries).await;
        Signal::stage(Stage::Facts, received).emit();
        let mut hand = InHand::new(Settler::new(worker, lane, door, owned), Terms::DUE);
        // Handed back means: due again when the lease runs out.
        match drive(&mut hand, batch).await {
            Ok(()) => {
                let sources: Vec<_> = hand.blocked.iter().flat_map(Batch::sources).collect();
                // What can not be postponed is due again when the lease runs out.
                if !sources.is_empty()
                    && let Err(error) = store.postpone(&sources, settings.held.first_retry).await
                {
                    Signal::HandedBack {
                        lane,
                        why: &error.to_string(),
                    }
                    .emit();
                }
            }
            Err(why) => Signal::HandedBack { lane, why: &why.why }.emit(),
        }
        match door {
            Door::Replayed => fail::point(Point::ReplayCommitted).await,
            Door::Parked | Door::Held | Door::Queue | Door::Dead if hand.settler.done.iter().any(ends_a_wait) => {
                fail::point(Point::Woken).await
            }
            Door::Parked | Door::Held | Door::Queue | Door::Dead => {}
        }
        send_all(place, entrance, hand.settler.done, received).await;
    };
    trace.within(judged).await;
    Ok(true)
}

/// Whether a message of this batch waits no longer.
fn ends_a_wait(answered: &Answered) -> bool {
    let mut kinds = answered.answers.iter().map(|answer| answer.judgement.verdict.kind());
    kinds.any(|kind| kind != VerdictKind::Parked)
}

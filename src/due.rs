//! The second intake: parked messages that are due, judged by the same batch walk.

use std::time::Instant;

use crate::{
    domain::{decide::VerdictKind, message::BODY_MAX},
    fail::{self, Point},
    publish::{Entrance, Owned, PublishStage, send_all},
    retry::{self, Backoff, Waited},
    settle::{Batch, Settled},
    telemetry::{Dependency, Intake as Door, Signal},
    worker::Worker,
};

/// Judges due messages until the program stops.
pub async fn run(mut worker: Worker) {
    let settings = worker.settings.clone();
    let owned = Owned::default();
    let mut stage = PublishStage::start(worker.row_publisher("due"), &owned, &settings.outbox);
    let entrance = stage.entrance();
    tokio::select! {
        () = stage.failed() => {}
        () = judge_due(&mut worker, &owned, &entrance) => {}
    }
    drop(entrance);
    stage.finish().await;
}

async fn judge_due(worker: &mut Worker, owned: &Owned, entrance: &Entrance) {
    let settings = worker.settings.clone();
    // Lanes count from zero; in logs this intake is the one after them.
    let lane = settings.worker.lanes;
    let mut backoff = Backoff::new(&settings.retry);
    // Bounded as a queue's batch is, by number and by bytes; bodies are counted as if each were as large as it may be.
    let most = settings
        .worker
        .batch_max
        .min(settings.worker.batch_max_bytes / BODY_MAX)
        .max(1);
    loop {
        let Ok(place) = entrance.reserve().await else { break };
        let waited = match worker.clerk.store.claim_due(most, settings.park.lease).await {
            Ok(claimed) if claimed.deliveries.is_empty() && claimed.unreadable.is_empty() => {
                backoff.reset();
                drop(place);
                retry::sleep(settings.park.poll, &mut worker.stop).await
            }
            Ok(claimed) => {
                for key in claimed.unreadable {
                    Signal::ParkedUnreadable { key }.emit();
                }
                let received = Instant::now();
                let batch = Batch::read(claimed.deliveries).await;
                let mut done = Vec::new();
                // Handed back means: due again when the lease runs out.
                let patience = Some(settings.worker.pause_release);
                if let Err(why) = worker
                    .settle(lane, Door::Parked, batch, owned, patience, &mut done)
                    .await
                {
                    Signal::HandedBack { lane, why: &why.why }.emit();
                }
                if done.iter().any(ends_a_wait) {
                    fail::point(Point::Woken).await;
                }
                send_all(place, entrance, done, received).await;
                if *worker.stop.borrow() {
                    Waited::Stopping
                } else {
                    Waited::Over
                }
            }
            Err(error) => {
                drop(place);
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

/// Whether a message of this batch waits no longer.
fn ends_a_wait(settled: &Settled) -> bool {
    let mut kinds = settled.judgements.iter().map(|judgement| judgement.verdict.kind());
    kinds.any(|kind| kind != VerdictKind::Parked)
}

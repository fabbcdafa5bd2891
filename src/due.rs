//! The second intake: parked messages that are due, judged by the same batch walk.

use std::time::Instant;

use tokio::sync::mpsc;

use crate::{
    fail::{self, Point},
    publish::{Owned, publish_stage, renew_leases},
    retry::{self, Backoff, Waited},
    settle::Batch,
    telemetry::{Dependency, Intake as Door, Signal},
    worker::{AbortOnDrop, Worker, send_all},
};

/// Judges due messages until the program stops.
pub async fn run(mut worker: Worker) {
    let settings = worker.settings.clone();
    // Lanes count from zero; in logs this intake is the one after them.
    let lane = settings.worker.lanes;
    let owned = Owned::default();
    let mut beside = tokio::task::JoinSet::new();
    beside.spawn(renew_leases(
        worker.clerk.store.clone(),
        owned.clone(),
        settings.outbox.lease,
    ));
    let (committed, receiver) = mpsc::channel(1);
    let publisher = worker.row_publisher("due");
    let publishing = tokio::spawn(publish_stage(
        publisher,
        receiver,
        owned.clone(),
        settings.outbox.idle_delete,
    ));
    let abort = AbortOnDrop(publishing.abort_handle());
    let mut backoff = Backoff::new(&settings.retry);
    loop {
        let Ok(place) = committed.reserve().await else { break };
        let waited = match worker
            .clerk
            .store
            .claim_due(settings.worker.batch_max, settings.park.lease)
            .await
        {
            Ok(deliveries) if deliveries.is_empty() => {
                backoff.reset();
                drop(place);
                retry::sleep(settings.park.poll, &mut worker.stop).await
            }
            Ok(deliveries) => {
                fail::point(Point::DueClaimed);
                let received = Instant::now();
                let batch = Batch::read(deliveries).await;
                let mut done = Vec::new();
                // Handed back means: due again when the lease runs out.
                let patience = Some(settings.worker.pause_release);
                if let Err(why) = worker
                    .settle(lane, Door::Parked, batch, &owned, patience, &mut done)
                    .await
                {
                    Signal::HandedBack { lane, why: &why.0 }.emit();
                }
                send_all(place, &committed, done, received).await;
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
    drop(committed);
    if let Err(error) = publishing.await
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
    drop(abort);
}

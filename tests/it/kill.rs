//! The promise under kill -9: at every named step of the walk, and at any moment at all.

use std::time::Duration;

use settled::fail::Point;

use crate::{
    support::{PATIENCE, Place, until},
    traffic::{Dice, Mix, Traffic, prepare, publish_in_lots, reserve_late},
};

/// Small batches, so that every step is passed often; short leases, so that what a dead worker left is soon taken over.
const SETTINGS: [(&str, &str); 6] = [
    ("SETTLED_WORKER__BATCH_MAX", "16"),
    ("SETTLED_WORKER__PREFETCH", "64"),
    ("SETTLED_OUTBOX__LEASE", "1s"),
    ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ("SETTLED_OUTBOX__IDLE_DELETE", "5ms"),
    ("SETTLED_PARK__FIRST_RETRY", "100ms"),
];

/// Half of the traffic goes to workers that kill themselves, one after the other, each at its fault; the rest to one that
/// does not. Then everything must add up.
async fn killed_at(test: &str, faults: &[&str]) {
    let place = Place::new(test).await;
    let Traffic { messages, late } = prepare(&place, 1, &Mix::FULL).await;
    let (before, after) = messages.split_at(messages.len() / 2);
    let mut lots = before.chunks(before.len().div_ceil(faults.len()));
    for fault in faults {
        let mut settings = SETTINGS.to_vec();
        settings.push(("SETTLED_FAULT", fault));
        let worker = place.worker(&settings);
        publish_in_lots(&place, lots.next().unwrap_or_default()).await;
        let status = worker.end().await;
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "{fault} kills: {}",
            worker.said()
        );
    }
    let worker = place.worker(&SETTINGS);
    publish_in_lots(&place, after).await;
    reserve_late(&place, &late, &worker).await;
    place.settle_up(worker).await;
}

macro_rules! points {
    ($($name:ident: $($fault:literal),+;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                killed_at(stringify!($name), &[$($fault),+]).await;
            }
        )*

        /// A new point of the walk gets its test.
        #[test]
        fn every_point_of_the_walk_is_tested() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(Point::ALL.map(Point::name).as_slice(), tested);
        }
    };
}

points! {
    after_receive: "after_receive:4";
    after_facts: "after_facts:3";
    after_load: "after_load:6";
    before_commit: "before_commit:3";
    after_commit: "after_commit:3";
    after_ack: "after_ack:3";
    before_publish: "before_publish:3";
    half_published: "half_published:2";
    after_confirm: "after_confirm:2";
    before_outbox_delete: "before_outbox_delete:2";
    after_outbox_delete: "after_outbox_delete:1";
    due_claimed: "due_claimed:2";
    // The relay works only on what another left behind.
    relay_taken: "before_publish:2", "relay_taken:1";
    relay_published: "after_commit:2", "relay_published:1";
}

/// kill -9 at whatever moment it comes, again and again in one run, always two workers on the same queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments() {
    let seed = match std::env::var("SETTLED_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SETTLED_TEST_SEED is a number"),
        Err(_) => u64::from(std::process::id()),
    };
    eprintln!("SETTLED_TEST_SEED={seed}");
    let mut dice = Dice::new(seed);
    let place = Place::new("killed_at_random").await;
    let Traffic { messages, late } = prepare(&place, seed, &Mix::FULL).await;
    let db = place.db().await;
    let mut workers = [place.worker(&SETTINGS), place.worker(&SETTINGS)];
    for lot in messages.chunks(messages.len().div_ceil(8)) {
        publish_in_lots(&place, lot).await;
        // Not before it has done something since the last time, and then within the next batches.
        let count = async || {
            let row = db.query_one("SELECT count(*) FROM settled.batches", &[]).await;
            let count: i64 = row.expect("batches").get(0);
            count
        };
        let start = count().await;
        let victim = dice.below(2);
        let moment = Duration::from_millis(dice.below(40) as u64);
        until("some batch is settled", PATIENCE, async || {
            (count().await > start).then_some(())
        })
        .await;
        tokio::time::sleep(moment).await;
        let Some(worker) = workers.get_mut(victim) else {
            continue;
        };
        worker.kill().await;
        *worker = place.worker(&SETTINGS);
    }
    let [one, other] = workers;
    reserve_late(&place, &late, &one).await;
    place.rest().await;
    assert_eq!(other.terminate().await.code(), Some(0));
    place.settle_up(one).await;
}

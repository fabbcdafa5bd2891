//! Who publishes an outbox row, and until when it is kept.

use crate::kit::{
    amqp::Message,
    auditor::Expect,
    in_process::{clerk, read, settle},
    partner::Partner,
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, Worker, until},
};

const SETTINGS: [(&str, &str); 4] = [
    LEAVE_DEAD_LETTERS,
    ("SETTLED_OUTBOX__LEASE", "1s"),
    ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ("SETTLED_RETRY__MAX", "200ms"),
];

/// A worker, and a message whose dead letter has no queue to go to: whoever publishes it does not get rid of it.
async fn without_a_queue_for_the_dead(test: &str, settings: &[(&str, &str)]) -> (Place, Worker, Message) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    let worker = place.ready_worker(&[SETTINGS.as_slice(), settings].concat()).await;
    for queue in ["test.dead", "settlement.dead"] {
        place.line().delete(queue).await;
    }
    let unknown = partner.allocation("BTC", "1");
    let refused = partner.draft(&unknown, "cleared").without("nonce");
    (place, worker, refused.message(Expect::Refused("invalid_field")))
}

/// Waits until a lane's lease, of a second, was renewed for four: what it could do meanwhile it has done.
async fn renewed_for_long(place: &Place) {
    let db = place.db().await;
    until("the lease is renewed", PATIENCE, async || {
        let sql = "SELECT extract(epoch FROM max(leased_until - created_at))::float8 FROM settled.outbox";
        let row = db.query_one(sql, &[]).await.expect("a number");
        row.get::<_, Option<f64>>(0).filter(|seconds| *seconds > 5.0)
    })
    .await;
}

async fn rows(place: &Place) -> i64 {
    let sql = "SELECT count(*) FROM settled.outbox";
    place.db().await.query_one(sql, &[]).await.expect("outbox").get(0)
}

/// With its queue there again, the dead letter arrives and the row goes.
async fn comes_through(place: &Place, refused: &Message) {
    let seen = place.line().get("settlement.dead").await;
    assert_eq!(seen.body, refused.body);
    until("its row is done", PATIENCE, async || {
        (rows(place).await == 0).then_some(())
    })
    .await;
}

/// A lane that is slow to publish renews its lease: the relay takes only what a dead one left behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lane_still_publishes_is_left_to_it() {
    let (place, worker, refused) = without_a_queue_for_the_dead("still_publishes", &[]).await;
    place.publish(std::slice::from_ref(&refused)).await;
    worker.not_ready().await;
    renewed_for_long(&place).await;
    let (_, metrics) = worker.get("/metrics").await.expect("metrics");
    let taken = metrics
        .lines()
        .find(|line| line.starts_with("settled_relay_taken_total"));
    assert!(
        taken.is_none_or(|line| line.ends_with(" 0")),
        "the relay took it: {taken:?}"
    );
    assert!(place.run(&["topology"]).await.status.success());
    comes_through(&place, &refused).await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// Between the relay's taking a row and the last confirm the row is there, for the next who takes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_relay_took_is_kept_until_it_is_confirmed() {
    let (place, worker, refused) = without_a_queue_for_the_dead("relay_took", &[]).await;
    // Settled by one who publishes nothing more, as if it had been killed.
    let settled = settle(&clerk(&place), &read(std::slice::from_ref(&refused)).await).await;
    assert_eq!(settled.expect("judged").publications.len(), 2);
    let why = worker.not_ready().await;
    assert!(
        why.contains("settled topology"),
        "the relay can not get rid of it: {why}"
    );
    assert_eq!(rows(&place).await, 1, "it is kept");
    worker.kill().await;
    assert!(place.run(&["topology"]).await.status.success());
    let worker = place.ready_worker(&SETTINGS).await;
    comes_through(&place, &refused).await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// The outbox does not grow while the broker takes nothing: one row is being published, one waits behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_that_can_not_publish_settles_no_third_batch() {
    let settings = [("SETTLED_WORKER__LANES", "1"), ("SETTLED_WORKER__BATCH_MAX", "1")];
    let (place, worker, refused) = without_a_queue_for_the_dead("no_third_batch", &settings).await;
    place.publish(&vec![refused.clone(); 10]).await;
    worker.not_ready().await;
    renewed_for_long(&place).await;
    assert_eq!(rows(&place).await, 2);
    assert!(place.run(&["topology"]).await.status.success());
    for _ in 0..10 {
        assert_eq!(place.line().get("settlement.dead").await.body, refused.body);
    }
    until("every row is done", PATIENCE, async || {
        (rows(&place).await == 0).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

//! A first mark for speed: how long 20,000 waiting messages take. Not a test of the suite, since a busy machine proves
//! nothing; it says what it measured and then has the books audited like any other run.
//!
//! `cargo test --profile demo --features faults --test it -- --ignored --nocapture drain` with the services' URLs set.

use std::time::Instant;

use crate::kit::{
    support::{PATIENCE, Place, until},
    traffic::{Mix, Traffic, prepare},
};

const MESSAGES: usize = 20_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it by name, on a quiet machine"]
async fn drain_what_waits() {
    let place = Place::new("drain").await;
    let mix = Mix {
        valid: MESSAGES,
        rivals: true,
        invalid: true,
        parked: 0,
        late: 0,
    };
    let Traffic { messages, .. } = prepare(&place, 1, &mix).await;
    for lot in messages.chunks(1_000) {
        place.publish(lot).await;
    }
    let db = place.db().await;
    let judged = async || {
        let row = db
            .query_one("SELECT coalesce(sum(received), 0)::bigint FROM settled.batches", &[])
            .await;
        let judged: i64 = row.expect("batches").get(0);
        usize::try_from(judged).expect("a count")
    };
    let before = judged().await;
    let began = Instant::now();
    let worker = place.ready_worker(&[]).await;
    until("everything is judged", 2 * PATIENCE, async || {
        (judged().await >= before + messages.len()).then_some(())
    })
    .await;
    let took = began.elapsed();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = messages.len() as f64 / took.as_secs_f64();
    println!(
        "{} waiting messages judged in {took:.2?}, the worker's start included: {rate:.0}/s",
        messages.len()
    );
    place.settle_up(worker).await;
}

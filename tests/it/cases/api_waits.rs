//! `settled api`: what an update's sender is told while nobody knows yet, and what is shown while others write.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    api::{place_of, put, reserved},
    api_reads::{ROOT, token},
};
use crate::kit::{
    api::Api,
    auditor::Expect,
    partner::{Partner, new_key},
    proxy::Proxy,
    support::{PATIENCE, address, until, with_address},
};

/// With no worker about, a receipt answers for the very bytes that it is of: other bytes with the same payload may carry another
/// signature, which only a worker can refuse.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_answers_for_its_own_bytes_only() {
    let partner = Partner::new("acme");
    let place = place_of("api_same_bytes", &partner).await;
    let reservations = reserved(&place, &partner, 1).await;
    let worker = place.ready_worker(&[]).await;
    let api = Api::start(&place, &[("SETTLED_API__WAIT", "3s")]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let right = partner.draft(&reservations[0], "cleared");
    let wrong = right
        .clone()
        .signed_by(new_key())
        .message(Expect::Refused("signature_mismatch"));
    let right = right.message(Expect::Settles);
    let first = put(&place, &api, &acme, &right).await;
    assert_eq!(first.status, 200);
    place.rest().await;
    worker.terminate().await;
    let again = put(&place, &api, &acme, &right).await;
    assert_eq!(again.ok(), first.ok(), "the same bytes");
    let forged = put(&place, &api, &acme, &wrong).await;
    assert_eq!(
        (forged.status, &forged.body["state"]),
        (202, &json!("accepted")),
        "{forged:?}"
    );
    let worker = place.ready_worker(&[]).await;
    let forged = put(&place, &api, &acme, &wrong).await;
    assert_eq!(forged.refusal(401), "signature_mismatch");
    api.stop().await;
    place.settle_up(worker).await;
}

/// A database that does not answer any more makes nobody wait longer for a message that the queue has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_database_does_not_lengthen_the_wait() {
    let partner = Partner::new("acme");
    let place = place_of("api_slow_database", &partner).await;
    let reservations = reserved(&place, &partner, 1).await;
    let proxy = Proxy::to(&address(&place.database_url)).await;
    let url = with_address(&place.database_url, proxy.address);
    let settings = [
        ("SETTLED_DATABASE_URL", url.as_str()),
        ("SETTLED_DATABASE__SILENCE", "1m"),
        ("SETTLED_DATABASE__STATEMENT_TIMEOUT", "1m"),
        ("SETTLED_DATABASE__LOCK_TIMEOUT", "1m"),
        ("SETTLED_DATABASE__CLIENT_DEADLINE", "2m"),
        ("SETTLED_API__WAIT", "1500ms"),
    ];
    let api = Api::start(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let message = partner.cleared(&reservations[0]);
    let began = Instant::now();
    let (answer, ()) = tokio::join!(put(&place, &api, &acme, &message), async {
        until("the queue has it", PATIENCE, async || {
            (place.line().depth("settlement.updates").await == 1).then_some(())
        })
        .await;
        proxy.stall();
    });
    assert_eq!(
        (answer.status, &answer.body["state"]),
        (202, &json!("accepted")),
        "{answer:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    proxy.open();
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

/// A reservation that is committed late stands, by its time, before others that were listed already. A list that is read from its
/// beginning has it; one that goes on behind the others does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_committed_late_is_found_from_the_beginning_of_the_list() {
    let early = Partner::new("acme");
    let place = place_of("api_late", &early).await;
    // Of another client, so that neither waits for the other.
    let mut late = Partner::new("acme");
    late.key = early.key;
    place.connect_partner(&late).await;
    place.deposit(&late, "BTC", "1000").await;
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let reservation = early.allocation("BTC", "7");
    let db = place.db().await;
    let line = reservation.line().replace('\'', "''");
    db.batch_execute(&format!("BEGIN; SELECT * FROM settled.reserve('[{line}]')"))
        .await
        .expect("reserved");
    let shown = reserved(&place, &late, 1).await;
    let list = async |query: &str| {
        let answer = api
            .get(&format!("{ROOT}/acme/partners/allocations{query}"), &acme)
            .await;
        let list = answer.ok()["allocations"].as_array().expect("a list").clone();
        list.iter().map(|one| one["id"].clone()).collect::<Vec<_>>()
    };
    let (first, second) = (json!(reservation.id), json!(shown[0].id));
    assert_eq!(
        list("").await,
        std::slice::from_ref(&second),
        "what is not committed is not there"
    );
    db.batch_execute("COMMIT").await.expect("committed");
    let behind = format!("?prevId={}", shown[0].id);
    assert!(list(&behind).await.is_empty(), "by its time it stands before");
    assert_eq!(list("").await, [first.clone(), second.clone()]);
    // As docs/http-api.md has it: what waits for the partner's word, from the beginning.
    assert_eq!(list("?statuses=reserved").await, [first, second]);
    api.stop().await;
}

/// The queue for events of refusals is bounded, and readiness is a metric of the API too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_queue_is_bounded_and_its_readiness_is_measured() {
    let partner = Partner::new("acme");
    let place = place_of("api_queue", &partner).await;
    let api = Api::start(&place, &[("SETTLED_API__REFUSALS_MAX", "7")]).await;
    let vhost = place.broker_url.rsplit_once('/').expect("a vhost").1;
    let queue = until("the queue is seen", PATIENCE, async || {
        let (_, queues) = place
            .services
            .manage("GET", &format!("/api/queues/{vhost}"), None)
            .await;
        let mut queues = queues.as_array()?.clone().into_iter();
        queues.find(|queue| {
            queue["name"]
                .as_str()
                .is_some_and(|name| name.starts_with("settlement.api."))
        })
    })
    .await;
    assert_eq!(queue["arguments"]["x-max-length"], 7, "{queue}");
    assert_eq!(queue["arguments"]["x-overflow"], "drop-head");
    until("readiness is measured", PATIENCE, async || {
        api.metrics().await.contains("settled_ready 1").then_some(())
    })
    .await;
    api.stop().await;
}

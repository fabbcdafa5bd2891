//! Partners with an input queue of their own.

use serde_json::json;

use crate::kit::{
    amqp::Message,
    auditor::Reservation,
    partner::Partner,
    raw::{DELIVERY_MODE, MESSAGE_ID, Raw, short},
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, Worker, until},
};

/// Consumers of the common queue are not disturbed for a moment by what these tests do, or this says why not.
fn undisturbed(lines: &[serde_json::Value]) {
    let lost: Vec<_> = lines
        .iter()
        .filter(|line| line["queue"] == "settlement.updates" && line["message"] != "consumer attached")
        .filter(|line| ["INFO", "WARN", "ERROR"].contains(&line["level"].as_str().unwrap_or_default()))
        .collect();
    assert!(lost.is_empty(), "{lost:#?}");
}

/// A registered partner with messages to publish.
async fn partner(place: &Place, enterprise: &str, flags: &[&str], count: usize) -> (Partner, Vec<Message>) {
    let partner = Partner::new(enterprise);
    place.register_with(&partner, flags).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let messages = reservations.iter().map(|reservation| partner.cleared(reservation));
    let messages = messages.collect();
    (partner, messages)
}

async fn queue_info(place: &Place, queue: &str) -> (u16, serde_json::Value) {
    let path = format!("/api/queues/{}/{queue}", place.name);
    place.services.manage("GET", &path, None).await
}

/// Waits until the worker's gauge of the queue says so many.
async fn measured(worker: &Worker, queue: &str, messages: u32) {
    let line = format!("settled_queue_messages{{queue=\"{queue}\"}} {messages}");
    until(&line, PATIENCE, async || {
        let (_, text) = worker.get("/metrics").await?;
        text.lines().any(|said| said == line).then_some(())
    })
    .await;
}

/// Whether a running worker consumes the queue.
async fn consumed(place: &Place, queue: &str) {
    until("a consumer on the partner's own queue", PATIENCE, async || {
        let (_, info) = queue_info(place, queue).await;
        (info["consumer_details"]
            .as_array()
            .is_some_and(|consumers| !consumers.is_empty()))
        .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_messages_go_there_and_settle() {
    let place = Place::new("own_queue").await;
    let (_, common) = partner(&place, "acme", &[], 20).await;
    let (_, own) = partner(&place, "beta", &["--own-queue"], 20).await;
    place.publish(&[&common[..10], &own[..10]].concat()).await;
    assert_eq!(place.line().depth("settlement.updates").await, 10);
    assert_eq!(place.line().depth("settlement.updates.beta").await, 10);
    let worker = place.ready_worker(&[]).await;
    place.rest().await;

    // One that comes while the worker runs is taken up without a restart.
    let (_, late) = partner(&place, "gamma", &["--own-queue"], 10).await;
    place
        .publish(&[&common[10..], &own[10..], late.as_slice()].concat())
        .await;
    place.rest().await;
    undisturbed(&worker.lines());
    place.settle_up(worker).await;

    let (status, info) = queue_info(&place, "settlement.updates.beta").await;
    assert_eq!(status, 200, "{info}");
    let arguments = &info["arguments"];
    assert_eq!(
        (
            arguments["x-queue-type"].as_str(),
            arguments["x-dead-letter-exchange"].as_str(),
            arguments["x-dead-letter-strategy"].as_str(),
            arguments["x-delivery-limit"].as_i64(),
        ),
        (Some("quorum"), Some("settlement.dead"), Some("at-least-once"), Some(50))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registered_again_it_is_the_same_and_declared_again() {
    let place = Place::new("own_again").await;
    let add = |enterprise: &'static str, flags: &[&'static str]| {
        let add = ["partner", "add", "--enterprise-id", enterprise, "--name", "A partner"];
        [&add, flags].concat()
    };
    let told = place.json(&add("beta", &["--own-queue"])).await;
    assert_eq!((&told["result"], &told["ownQueue"]), (&json!("added"), &json!(true)));
    place.line().delete("settlement.updates.beta").await;
    let told = place.json(&add("beta", &["--own-queue"])).await;
    assert_eq!(told["result"], "exists");
    assert_eq!(queue_info(&place, "settlement.updates.beta").await.0, 200);

    // With other content nothing changes, and nothing is declared.
    place.json(&add("acme", &[])).await;
    let refused = place.run(&add("acme", &["--own-queue"])).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("it has no queue of its own"));
    assert_eq!(queue_info(&place, "settlement.updates.acme").await.0, 404);
    let refused = place.run(&add("beta", &[])).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("it has a queue of its own"));

    let told = place.json(&["topology"]).await;
    let queues = told["queues"].as_array().expect("queues");
    assert!(queues.contains(&json!("settlement.updates.beta")), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_missing_holds_up_nobody() {
    let place = Place::new("own_missing").await;
    let (_, common) = partner(&place, "acme", &[], 20).await;
    let (_, own) = partner(&place, "beta", &["--own-queue"], 20).await;
    place.line().delete("settlement.updates.beta").await;
    let worker = place.ready_worker(&[("SETTLED_RETRY__MAX", "200ms")]).await;
    // Without it the partner's messages reach the common queue.
    place.publish(&[&common[..10], &own[..10]].concat()).await;
    place.rest().await;
    let doctor = place.run(&["doctor", "--json"]).await;
    let said = String::from_utf8_lossy(&doctor.stdout);
    assert!(
        doctor.status.code() == Some(1) && said.contains("queue settlement.updates.beta"),
        "{said}"
    );
    assert!(worker.is_ready().await, "{}", worker.said());
    // Nor does it hide how much is in the others.
    measured(&worker, "settlement.updates", 0).await;

    place.json(&["topology"]).await;
    consumed(&place, "settlement.updates.beta").await;
    place.publish(&[&common[10..], &own[10..]].concat()).await;
    place.rest().await;
    undisturbed(&worker.lines());
    place.settle_up(worker).await;
}

/// Who serves one partner does not hide that nobody serves the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ready_is_a_consumer_of_the_common_queue() {
    let place = Place::new("own_ready").await;
    partner(&place, "beta", &["--own-queue"], 0).await;
    let worker = place.ready_worker(&[("SETTLED_RETRY__MAX", "200ms")]).await;
    consumed(&place, "settlement.updates.beta").await;
    place.line().delete("settlement.updates").await;
    let why = worker.not_ready().await;
    assert!(why.contains("no consumer is attached to settlement.updates"), "{why}");
    assert!(place.run(&["topology"]).await.status.success());
    worker.ready().await;
    place.settle_up(worker).await;
}

/// A connection of its own: what breaks it breaks no other partner's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poison_in_it_harms_no_other_partner() {
    let place = Place::new("own_poison").await;
    let policy = json!({
        "pattern": "^settlement\\.updates\\.",
        "definition": {"delivery-limit": 3},
        "apply-to": "queues",
    });
    let path = format!("/api/policies/{}/limit", place.name);
    assert_eq!(place.services.manage("PUT", &path, Some(policy)).await.0, 201);
    // Whoever read its dead letter would be struck as well.
    place.line().delete("test.dead").await;
    let (_, common) = partner(&place, "acme", &[], 40).await;
    let (_, own) = partner(&place, "beta", &["--own-queue"], 40).await;
    let settings = [
        ("SETTLED_RETRY__INITIAL", "10ms"),
        ("SETTLED_RETRY__MAX", "100ms"),
        LEAVE_DEAD_LETTERS,
    ];
    let worker = place.ready_worker(&settings).await;
    consumed(&place, "settlement.updates.beta").await;
    place.publish(&[&common[..20], &own[..20]].concat()).await;
    let properties = [&[2], short(b"\xff\xfe").as_slice()].concat();
    let (flags, key) = (DELIVERY_MODE | MESSAGE_ID, "beta.allocation.update");
    Raw::open(&place.broker_url)
        .await
        .publish("settlement.updates", key, flags, &properties, b"the poison")
        .await;
    place.publish(&[&common[20..], &own[20..]].concat()).await;
    place.rest().await;
    until("the poison is dead", PATIENCE, async || {
        (place.line().depth("settlement.dead").await == 1).then_some(())
    })
    .await;
    undisturbed(&worker.lines());
    let settled = place
        .db()
        .await
        .query_one("SELECT sum(settled)::bigint FROM settled.batches", &[])
        .await
        .expect("batches");
    assert_eq!(settled.get::<_, i64>(0), 80);
    assert_eq!(worker.terminate().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_the_bound_are_an_alarm() {
    let place = Place::new("own_bound").await;
    let (_, first) = partner(&place, "beta", &["--own-queue"], 5).await;
    let (_, second) = partner(&place, "gamma", &["--own-queue"], 5).await;
    place.publish(&[first, second].concat()).await;
    let worker = place.ready_worker(&[("SETTLED_WORKER__OWN_QUEUES_MAX", "1")]).await;
    until("the first is settled", PATIENCE, async || {
        (place.line().depth("settlement.updates.beta").await == 0).then_some(())
    })
    .await;
    until("the alarm", PATIENCE, async || {
        let said = worker.said();
        (said.contains("nobody consumes this queue") && said.contains("settlement.updates.gamma")).then_some(())
    })
    .await;
    assert_eq!(place.line().depth("settlement.updates.gamma").await, 5);
    measured(&worker, "settlement.updates.gamma", 5).await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

/// Taken away and given back while the partner publishes: every message settles, wherever it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn taken_away_under_traffic_it_loses_nothing() {
    let place = Place::new("own_away").await;
    let (_, messages) = partner(&place, "beta", &["--own-queue"], 400).await;
    let worker = place.ready_worker(&[]).await;
    consumed(&place, "settlement.updates.beta").await;
    let mut parts = messages.chunks(25);
    let mut publish = async |count: usize| {
        for part in parts.by_ref().take(count) {
            place.publish(part).await;
        }
    };
    publish(4).await;
    let by = ["--operator", "nora", "--reason", "less to look after"];
    let off = [&["partner", "set", "beta", "--own-queue", "off"], &by[..]].concat();
    let (told, ()) = tokio::join!(place.json(&off), publish(6));
    assert_eq!(
        (&told["result"], &told["changed"], &told["queue"]),
        (
            &json!("updated"),
            &json!({"ownQueue": {"from": true, "to": false}}),
            &json!("empty, and deleted")
        )
    );
    assert_eq!(queue_info(&place, "settlement.updates.beta").await.0, 404);
    let (told, ()) = tokio::join!(place.json(&["partner", "set", "beta", "--own-queue"]), publish(3));
    assert_eq!(told["ownQueue"], true);
    consumed(&place, "settlement.updates.beta").await;
    publish(3).await;
    place.rest().await;
    undisturbed(&worker.lines());
    place.settle_up(worker).await;
}

/// What comes back to a queue that is nobody's own any more is settled, and then it is let go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_in_a_queue_that_is_nobodys_own_is_settled() {
    let place = Place::new("own_left").await;
    let (_, messages) = partner(&place, "beta", &["--own-queue"], 20).await;
    let worker = place.ready_worker(&[]).await;
    consumed(&place, "settlement.updates.beta").await;
    // Somebody changed the registry by hand: the queue is bound still.
    let db = place.db().await;
    let sql = "UPDATE settled.partners SET own_queue = false WHERE enterprise_id = 'beta'";
    db.execute(sql, &[]).await.expect("changed");
    until("its consumer lets go", PATIENCE, async || {
        let (_, info) = queue_info(&place, "settlement.updates.beta").await;
        (info["consumer_details"].as_array().is_some_and(Vec::is_empty)).then_some(())
    })
    .await;
    place.json(&["partner", "set", "beta", "--own-queue"]).await;
    consumed(&place, "settlement.updates.beta").await;
    place.publish(&messages).await;
    place.rest().await;
    place.settle_up(worker).await;
}

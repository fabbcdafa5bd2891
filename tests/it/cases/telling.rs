//! What is told once is told the same way again; whoever asks is answered; and every step of a life can be looked at.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::kit::{
    amqp::{Message, Seen},
    auditor::Expect,
    in_process,
    partner::new_key,
    support::{PATIENCE, Place, Worker, until, with_partner},
};

const ONE_LANE: (&str, &str) = ("SETTLED_WORKER__LANES", "1");

fn event(seen: &Seen) -> Value {
    serde_json::from_slice(&seen.body).expect("an event is JSON")
}

/// A copy with properties of its own.
fn copy(message: &Message, name: &str, trace: u8) -> Message {
    let trace = format!("00-{}-b7ad6b7169203331-01", format!("{trace:02x}").repeat(16));
    let mut headers = lapin::types::FieldTable::default();
    headers.insert("traceparent".into(), lapin::types::AMQPValue::LongString(trace.into()));
    message
        .clone()
        .with(|properties| properties.with_message_id(name.into()).with_headers(headers))
}

/// The events of a type, by id, each with all its copies.
fn told(place: &Place, kind: &str) -> BTreeMap<String, Vec<Seen>> {
    let mut told = BTreeMap::<String, Vec<Seen>>::new();
    for seen in place.events.seen().into_iter().flat_map(Seen::events) {
        let event = event(&seen);
        if event["type"] == kind {
            let id = event["id"].as_str().expect("an id").to_owned();
            told.entry(id).or_default().push(seen);
        }
    }
    told
}

/// Waits until so many events of a type came.
async fn told_so_often(place: &Place, kind: &str, times: usize) -> BTreeMap<String, Vec<Seen>> {
    until("the events", PATIENCE, async || {
        let told = told(place, kind);
        (told.values().map(Vec::len).sum::<usize>() >= times).then_some(told)
    })
    .await
}

async fn refused_copies(format: &str) {
    let (place, partner) = with_partner(&format!("copies_{format}"), "1000000000000").await;
    let reservations: Vec<_> = (0..2).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let settings = [ONE_LANE, ("SETTLED_EVENTS__FORMAT", format)];
    let worker = place.ready_worker(&settings).await;
    let refused = [
        // Nothing of it can be read.
        Message::new("acme.allocation.update", "{", Expect::Refused("malformed_message")),
        // Nobody knows who sent it.
        partner
            .draft(&reservations[0], "cleared")
            .signed_by(new_key())
            .message(Expect::Refused("signature_mismatch")),
        // It is the partner's, and wrong.
        partner
            .draft(&reservations[1], "cleared")
            .set("clientId", json!(Uuid::new_v4()))
            .message(Expect::Refused("allocation_mismatch")),
    ];
    // Two of each in one batch, or nearly so; then one more; then one to another process.
    let mut pairs = Vec::new();
    for message in &refused {
        pairs.extend([copy(message, "first", 1), copy(message, "second", 2)]);
    }
    place.publish(&pairs).await;
    told_so_often(&place, "update.rejected", 6).await;
    let third: Vec<Message> = refused.iter().map(|message| copy(message, "third", 3)).collect();
    place.publish(&third).await;
    told_so_often(&place, "update.rejected", 9).await;
    worker.terminate().await;
    let worker = place.ready_worker(&settings).await;
    // Another content type is another copy of what can not be read; the words of the first stand.
    let fourth: Vec<Message> = refused
        .iter()
        .map(|message| copy(message, "fourth", 4).with(|properties| properties.with_content_type("".into())))
        .collect();
    place.publish(&fourth).await;
    let told = told_so_often(&place, "update.rejected", 12).await;
    assert_eq!(told.len(), refused.len(), "an id for each");
    for (id, copies) in &told {
        assert_eq!(copies.len(), 4, "{id}");
        assert_eq!(event(&copies[0])["data"]["messageId"], "first");
        for seen in copies {
            assert_eq!(
                String::from_utf8_lossy(&seen.body),
                String::from_utf8_lossy(&copies[0].body)
            );
            if format == "single" {
                assert_eq!(seen.properties, copies[0].properties);
            }
        }
    }
    // The dead letters are the messages themselves, each with its own time.
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_of_a_refusal_are_identical() {
    refused_copies("single").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_of_a_refusal_are_identical_in_arrays() {
    refused_copies("batched").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detail_that_changed_meanwhile_is_told_as_it_was() {
    let (place, partner) = with_partner("details", "1000000000000").await;
    let worker = place.ready_worker(&[("SETTLED_PARK__DEADLINE", "100ms")]).await;
    // Nobody reserved it in time; then too many wait. One reason, two sentences, one event.
    let lone = partner.cleared(&partner.allocation("BTC", "1"));
    let lone = lone.expecting(Expect::Refused("allocation_not_found"));
    place.publish(std::slice::from_ref(&copy(&lone, "first", 1))).await;
    let parked = told_so_often(&place, "update.parked", 1).await;
    let first = told_so_often(&place, "update.rejected", 1).await;
    worker.terminate().await;
    let worker = place.ready_worker(&[("SETTLED_PARK__MAX_PER_PARTNER", "0")]).await;
    place.publish(std::slice::from_ref(&copy(&lone, "second", 2))).await;
    let again = told_so_often(&place, "update.rejected", 2).await;
    assert_eq!(parked.len(), 1);
    let (id, copies) = again.first_key_value().expect("one id");
    assert_eq!(first.keys().next(), Some(id));
    assert_eq!((again.len(), copies.len()), (1, 2));
    assert_eq!(copies[0].body, copies[1].body);
    assert_eq!(
        event(&copies[1])["data"]["detail"],
        "no allocation of this id was reserved in time"
    );
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_while_it_waits_is_answered() {
    let (place, partner) = with_partner("asking", "1000000000000").await;
    let names = ["a", "b", "c", "d"].map(|name| format!("settlement.reply.acme.{name}"));
    for name in &names {
        place.line().declare(name).await;
    }
    place.line().declare("theirs").await;
    let asking = |message: &Message, name: &str, id: &str| {
        message
            .clone()
            .with(|properties| properties.with_reply_to(name.into()).with_correlation_id(id.into()))
    };
    let worker = place.ready_worker(&[ONE_LANE]).await;
    let late = partner.allocation("BTC", "1");
    let early = partner.cleared(&late);
    place.publish(&[asking(&early, &names[0], "c-a")]).await;
    let parked = told_so_often(&place, "update.parked", 1).await;
    let parked = event(&parked.values().next().expect("one")[0]);
    // Three ask after it, one of them in vain; and a stranger.
    let stranger = partner.draft(&late, "cleared").signed_by(new_key());
    place
        .publish(&[
            asking(&early, &names[1], "c-b"),
            asking(&early, &names[2], "c-c"),
            asking(&early, "theirs", "c-x"),
            asking(
                &stranger.message(Expect::Refused("signature_mismatch")),
                &names[3],
                "c-d",
            ),
        ])
        .await;
    for (name, id) in names.iter().zip(["c-a", "c-b", "c-c"]) {
        let reply = place.line().get(name).await;
        assert_eq!(event(&reply), parked, "{name}: the words of the first");
        let correlation = reply.properties.correlation_id().as_ref().map(|id| id.as_str());
        assert_eq!(correlation, Some(id));
    }
    told_so_often(&place, "update.rejected", 1).await;
    let until_before: i64 = waiting_until(&place).await;
    place.reserve(std::slice::from_ref(&late)).await;
    told_so_often(&place, "allocation.cleared", 1).await;
    assert!(until_before > 0);
    // The first one and the newest one.
    for (name, id) in [(&names[0], "c-a"), (&names[2], "c-c")] {
        let reply = place.line().get(name).await;
        assert_eq!(event(&reply)["type"], "allocation.cleared", "{name}");
        let correlation = reply.properties.correlation_id().as_ref().map(|id| id.as_str());
        assert_eq!(correlation, Some(id));
    }
    place.rest().await;
    for name in [&names[1], &names[3], &"theirs".to_owned()] {
        assert_eq!(place.line().depth(name).await, 0, "{name}");
    }
    place.settle_up(worker).await;
}

/// A lane that has told nothing yet answers all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_that_published_nothing_answers_too() {
    let (place, partner) = with_partner("asking_lanes", "1000000000000").await;
    let late = partner.allocation("BTC", "1");
    let early = partner.cleared(&late);
    let worker = place.ready_worker(&[("SETTLED_WORKER__LANES", "2")]).await;
    place.publish(std::slice::from_ref(&early)).await;
    told_so_often(&place, "update.parked", 1).await;
    // The broker gives each of several consumers its turn: one of these comes to the lane that has told nothing.
    for name in ["a", "b", "c"].map(|name| format!("settlement.reply.acme.{name}")) {
        place.line().declare(&name).await;
        let copy = early
            .clone()
            .with(|properties| properties.with_reply_to(name.as_str().into()));
        place.publish(&[copy]).await;
        assert_eq!(event(&place.line().get(&name).await)["type"], "update.parked", "{name}");
    }
    let lanes: std::collections::BTreeSet<u64> = worker
        .lines()
        .iter()
        .filter(|line| line["from"] == "queue")
        .filter_map(|line| line["lane"].as_u64())
        .collect();
    assert_eq!(lanes.len(), 2, "both lanes were asked: {}", worker.said());
    place.reserve(std::slice::from_ref(&late)).await;
    place.settle_up(worker).await;
}

/// The deadline of what waits, in microseconds.
async fn waiting_until(place: &Place) -> i64 {
    let sql = "SELECT (extract(epoch FROM until) * 1000000)::bigint FROM settled.parked";
    place.db().await.query_one(sql, &[]).await.expect("it waits").get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_in_the_same_batch_is_answered_and_the_deadline_stands() {
    let (place, partner) = with_partner("asking_at_once", "1000000000000").await;
    let names = ["a", "b"].map(|name| format!("settlement.reply.acme.{name}"));
    for name in &names {
        place.line().declare(name).await;
    }
    let late = partner.allocation("BTC", "1");
    let early = partner
        .cleared(&late)
        .expecting(Expect::Refused("allocation_not_found"));
    let asking = |name: &str| early.clone().with(|properties| properties.with_reply_to(name.into()));
    // Both wait in the queue when the worker comes: they are one batch.
    place.publish(&[asking(&names[0]), asking(&names[1])]).await;
    let worker = place.ready_worker(&[ONE_LANE, ("SETTLED_PARK__DEADLINE", "4s")]).await;
    for name in &names {
        assert_eq!(event(&place.line().get(name).await)["type"], "update.parked");
    }
    let deadline = waiting_until(&place).await;
    place.publish(&[asking(&names[1])]).await;
    assert_eq!(event(&place.line().get(&names[1]).await)["type"], "update.parked");
    assert_eq!(waiting_until(&place).await, deadline);
    // Nobody reserves it: both are told.
    for name in &names {
        let reply = event(&place.line().get(name).await);
        assert_eq!(reply["data"]["reason"], "allocation_not_found", "{name}");
    }
    place.settle_up(worker).await;
}

fn hex_digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn whats(timeline: &Value) -> Vec<&str> {
    let moments = timeline["timeline"].as_array().expect("moments");
    moments.iter().filter_map(|moment| moment["what"].as_str()).collect()
}

/// Waits until so many dead letters are collected.
async fn collected(place: &Place, count: i64) {
    let db = place.db().await;
    until("they are collected", PATIENCE, async || {
        let sql = "SELECT coalesce(sum(times_seen), 0)::bigint FROM settled.dead_letters";
        let seen: i64 = db.query_one(sql, &[]).await.expect("dead letters").get(0);
        (seen >= count).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_step_of_a_life_is_kept_and_found_by_each_of_its_names() {
    let (place, partner) = with_partner("steps", "1000000000000").await;
    let late = partner.allocation("BTC", "1");
    let message = partner.cleared(&late).expecting(Expect::Any);
    let run = async |worker: Worker| worker.terminate().await;
    // Refused, by one worker; parked, by another; settled, by a third.
    place.json(&["partner", "suspend", "--enterprise-id", "acme"]).await;
    let worker = place.ready_worker(&[("SETTLED_WORKER__NAME", "one")]).await;
    place.publish(std::slice::from_ref(&message)).await;
    told_so_often(&place, "update.rejected", 1).await;
    collected(&place, 1).await;
    run(worker).await;
    place.json(&["partner", "resume", "--enterprise-id", "acme"]).await;
    let worker = place.ready_worker(&[("SETTLED_WORKER__NAME", "two")]).await;
    place.publish(std::slice::from_ref(&message)).await;
    told_so_often(&place, "update.parked", 1).await;
    run(worker).await;
    place.reserve(std::slice::from_ref(&late)).await;
    let worker = place.ready_worker(&[("SETTLED_WORKER__NAME", "three")]).await;
    told_so_often(&place, "allocation.cleared", 1).await;
    place.rest().await;

    let body: Value = serde_json::from_slice(&message.body).expect("JSON");
    let nonce = body["nonce"].as_str().expect("a nonce").to_owned();
    let payload = hex_digest(body["payload"].as_str().expect("a payload").as_bytes());
    let names = [late.id.to_string(), nonce.clone(), payload, hex_digest(&message.body)];
    let mut lives = Vec::new();
    for name in &names {
        lives.push(place.json(&["timeline", name]).await);
    }
    for (life, name) in lives.iter().zip(&names) {
        assert_eq!(life, &lives[0], "{name}");
    }
    let life = &lives[0];
    let found = whats(life);
    let mut rest = found.iter();
    for what in [
        "received",
        "judged",
        "event",
        "dead-lettered",
        "collected",
        "parked",
        "judged",
        "event",
        "reserved",
        "woken",
        "left",
        "judged",
        "settled",
        "event",
    ] {
        assert!(rest.any(|found| *found == what), "{what} in {found:?}");
    }
    let moments = life["timeline"].as_array().expect("moments");
    let workers = |what: &str| -> Vec<&str> {
        let of = moments.iter().filter(|moment| moment["what"] == what);
        of.filter_map(|moment| moment["worker"].as_str()).collect()
    };
    assert_eq!(workers("received").first(), Some(&"one"), "{life}");
    assert_eq!(workers("judged"), ["one", "two", "three"]);
    assert_eq!(workers("event"), ["one", "two", "three"]);

    // Every event of it, each with its own id, as it was told.
    let history = place
        .json(&["allocation", "show", &late.id.to_string(), "--history"])
        .await;
    let events = history["events"].as_array().expect("events");
    let kinds: Vec<(&str, Option<&str>)> = events
        .iter()
        .map(|event| (event["type"].as_str().expect("a type"), event["reason"].as_str()))
        .collect();
    assert_eq!(
        kinds,
        [
            ("update.rejected", Some("partner_inactive")),
            ("update.parked", Some("allocation_not_found")),
            ("allocation.cleared", None),
        ]
    );
    for shown in events {
        let heard = place.events.seen();
        let heard = heard.iter().map(event).find(|event| event["id"] == shown["id"]);
        let heard = heard.unwrap_or_else(|| panic!("{shown} was told"));
        assert_eq!(heard["type"], shown["type"]);
        assert_eq!(
            (&shown["nonce"], &shown["enterpriseId"], &shown["state"]),
            (&json!(nonce), &json!("acme"), &json!("confirmed"))
        );
        assert_eq!(heard["time"], shown["at"], "{shown}");
    }
    assert_eq!(history["receipts"].as_array().map(Vec::len), Some(1));
    assert_eq!(history["transfers"].as_array().map(Vec::len), Some(2));
    assert_eq!(history["deadLetters"].as_array().map(Vec::len), Some(1));

    // What comes again leaves nothing more behind.
    let rows = async || -> i64 {
        let sql = "SELECT (SELECT count(*) FROM settled.told) + (SELECT count(*) FROM settled.parkings)";
        place.db().await.query_one(sql, &[]).await.expect("rows").get(0)
    };
    let before = rows().await;
    let many: Vec<Message> = (0..50).map(|_| message.clone()).collect();
    place.publish(&many).await;
    told_so_often(&place, "allocation.cleared", 51).await;
    place.rest().await;
    assert_eq!(rows().await, before);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_message_has_its_steps_too_and_touches_no_ones_life() {
    let (place, partner) = with_partner("strangers", "1000000000000").await;
    let reserved = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&reserved)).await;
    let worker = place.ready_worker(&[]).await;
    let broken = Message::new("acme.allocation.update", "[]", Expect::Refused("malformed_message"));
    let forged = partner
        .draft(&reserved, "cleared")
        .signed_by(new_key())
        .message(Expect::Refused("signature_mismatch"));
    place.publish(&[broken.clone(), forged.clone()]).await;
    told_so_often(&place, "update.rejected", 2).await;
    collected(&place, 2).await;
    for message in [&broken, &forged] {
        let life = place.json(&["timeline", &hex_digest(&message.body)]).await;
        let found: Vec<&str> = whats(&life);
        let found: Vec<&str> = found
            .into_iter()
            .filter(|what| !matches!(*what, "reserved" | "transfer"))
            .collect();
        assert_eq!(found, ["received", "judged", "event", "dead-lettered", "collected"]);
    }
    let history = place
        .json(&["allocation", "show", &reserved.id.to_string(), "--history"])
        .await;
    assert_eq!(history["receipts"], json!([]));
    assert_eq!(history["events"].as_array().map(Vec::len), Some(1), "{history}");
    assert_eq!(history["events"][0]["reason"], "signature_mismatch");
    place.settle_up(worker).await;
}

/// What strangers brought about is forgotten, the oldest first, by number and by age; what a proven sender's life went
/// through stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_strangers_brought_about_is_forgotten_in_time() {
    let (place, partner) = with_partner("forgotten", "1000000000000").await;
    let clerk = in_process::clerk(&place);
    for number in 0..5 {
        let message = Message::new("acme.allocation.update", format!("no JSON {number}"), Expect::Any);
        let batch = in_process::read(&[message]).await;
        in_process::settle(&clerk, &batch).await.expect("refused");
    }
    let reservation = partner.allocation("BTC", "2");
    place.reserve(std::slice::from_ref(&reservation)).await;
    let less = json!({"currency": "BTC", "quantity": "1"});
    let mismatch = partner
        .draft(&reservation, "cleared")
        .set("amount", less)
        .message(Expect::Any);
    let batch = in_process::read(&[mismatch]).await;
    in_process::settle(&clerk, &batch).await.expect("refused");
    let db = place.db().await;
    let left = async || {
        let sql = "SELECT count(*) FILTER (WHERE NOT proven), count(*) FILTER (WHERE proven) FROM settled.told";
        let row = db.query_one(sql, &[]).await.expect("told");
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    assert_eq!(left().await, (5, 1));
    let (long, many) = (std::time::Duration::from_secs(3_600), 1_000);
    for (age, most, forgotten, strangers) in [
        (long, many, 0, 5),
        (long, 2, 3, 2),
        (long, 2, 0, 2),
        (std::time::Duration::ZERO, many, 2, 0),
        (std::time::Duration::ZERO, 0, 0, 0),
    ] {
        let now = clerk.store.forget_told(age, most).await.expect("forgotten");
        assert_eq!(now, forgotten);
        assert_eq!(left().await, (strangers, 1));
    }
    let oldest = "SELECT count(*) FROM settled.batches";
    assert_eq!(
        db.query_one(oldest, &[]).await.expect("batches").get::<_, i64>(0),
        6,
        "batches stay"
    );
}

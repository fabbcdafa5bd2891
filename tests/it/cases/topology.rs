//! What leads to a queue and away from it: the broker's check of cycles, and topologies that are not what they must be.

use lapin::types::{AMQPValue, FieldArray, FieldTable};
use serde_json::{Value, json};

use crate::kit::{
    amqp::Message,
    auditor::{self, Expect, Reservation},
    partner::Partner,
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, Worker, until, userinfo, with_partner},
};

const KEY: &str = "acme.allocation.update";
const WITH_COLLECTOR: (&str, &str) = ("SETTLED_DEAD_LETTERS__COLLECT", "true");

async fn count(place: &Place, sql: &str) -> i64 {
    place.db().await.query_one(sql, &[]).await.expect(sql).get(0)
}

async fn manage(place: &Place, method: &str, path: &str, body: Option<Value>) {
    let (status, answer) = place.services.manage(method, path, body).await;
    assert!(matches!(status, 201 | 204), "{method} {path}: {status} {answer}");
}

async fn gauge(worker: &Worker, line: &str) {
    until(line, PATIENCE, async || {
        let (_, text) = worker.get("/metrics").await?;
        text.lines().any(|said| said == line).then_some(())
    })
    .await;
}

// Cycles ---------------------------------------------------------------------------------------------------------------

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// A record of deaths as the broker writes it, the newest first: queues and reasons.
fn record(deaths: &[(&str, &str)]) -> FieldTable {
    let death = |(queue, reason): &(&str, &str)| {
        let mut death = FieldTable::default();
        for (name, value) in [
            ("count", AMQPValue::LongLongInt(1)),
            ("exchange", text("settlement.dead")),
            ("queue", text(queue)),
            ("reason", text(reason)),
            ("routing-keys", AMQPValue::FieldArray(FieldArray::from(vec![text(KEY)]))),
            ("time", AMQPValue::Timestamp(1_700_000_000)),
        ] {
            death.insert(name.into(), value);
        }
        AMQPValue::FieldTable(death)
    };
    let mut headers = FieldTable::default();
    let deaths: Vec<AMQPValue> = deaths.iter().map(death).collect();
    headers.insert("x-death".into(), AMQPValue::FieldArray(FieldArray::from(deaths)));
    headers.insert("x-first-death-queue".into(), text("settlement.dead"));
    headers.insert("x-first-death-reason".into(), text("delivery_limit"));
    headers.insert("x-first-death-exchange".into(), text("settlement.dead"));
    headers
}

/// Records that a message may bring along, as one has that a tool moved back with all its headers.
const RECORDS: [&[(&str, &str)]; 13] = [
    &[],
    &[("settlement.dead", "delivery_limit")],
    &[("settlement.dead", "expired")],
    &[("settlement.dead", "delivery_limit"), ("settlement.updates", "expired")],
    &[
        ("settlement.dead", "delivery_limit"),
        ("settlement.updates", "delivery_limit"),
    ],
    &[
        ("settlement.unreadable", "expired"),
        ("settlement.dead", "delivery_limit"),
    ],
    &[
        ("theirs", "expired"),
        ("theirs.too", "delivery_limit"),
        ("settlement.dead", "expired"),
    ],
    // No true record names the second queue: these were made up, and cut the letter off from both.
    &[("settlement.dead", "expired"), ("settlement.dead.broker", "expired")],
    &[
        ("settlement.dead.broker", "delivery_limit"),
        ("settlement.updates", "expired"),
        ("settlement.dead", "delivery_limit"),
    ],
    &[("settlement.dead.broker", "expired")],
    // These the broker lets through, and they come both ways.
    &[("settlement.dead", "rejected")],
    &[
        ("settlement.updates", "rejected"),
        ("settlement.dead", "delivery_limit"),
    ],
    &[("settlement.unreadable", "expired")],
];

/// Messages that expire before anybody reads them, each with one of the records.
fn moved_back(place: &Place, key: &str) -> Vec<Message> {
    let user = userinfo(&place.broker_url).0.to_owned();
    RECORDS
        .iter()
        .enumerate()
        .map(|(number, deaths)| {
            let body = format!("{key} {number}").into_bytes();
            Message::new(key, body, Expect::Refused("expired")).with(|properties| {
                properties
                    .with_headers(record(deaths))
                    .with_expiration("1".into())
                    .with_user_id(user.as_str().into())
            })
        })
        .collect()
}

async fn all_expired(place: &Place, queue: &str) {
    until("they expire", PATIENCE, async || {
        (place.line().depth(queue).await == 0).then_some(())
    })
    .await;
}

/// Whatever record a message brings along, what the broker dead-letters by itself is stored, told, and counted once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_record_makes_a_dead_letter_vanish() {
    let (place, _) = with_partner("cycles", "1000000").await;
    let own = Partner::new("own");
    place.register_with(&own, &["--own-queue"]).await;
    let mut sent = moved_back(&place, KEY);
    sent.extend(moved_back(&place, "own.allocation.update"));
    place.publish(&sent).await;
    for queue in ["settlement.updates", "settlement.updates.own"] {
        all_expired(&place, queue).await;
    }
    let worker = place.ready_worker(&[WITH_COLLECTOR]).await;
    until("all are stored", PATIENCE, async || {
        let rows = count(&place, "SELECT count(*) FROM settled.dead_letters").await;
        (rows == i64::try_from(sent.len()).expect("few")).then_some(())
    })
    .await;
    for queue in ["settlement.dead", "settlement.dead.broker"] {
        all_expired(&place, queue).await;
    }
    let user = userinfo(&place.broker_url).0.to_owned();
    for message in &sent {
        let digest = hex::encode(auditor::sha256(&message.body));
        let shown = place.json(&["dead-letters", "show", &digest]).await;
        let row = &shown["deadLetter"];
        assert_eq!(
            (&row["reason"], &row["madeBy"], &row["timesSeen"], &row["state"]),
            (&json!("expired"), &json!("broker"), &json!(1), &json!("open")),
            "{row}"
        );
        assert_eq!(shown["properties"]["user_id"], json!(user), "{shown}");
        let id = auditor::event_id(&format!("update.rejected|{}|{digest}|expired", message.routing_key));
        place
            .events
            .wait("its event", |seen| seen.message_id() == Some(id.as_str()))
            .await;
    }
    let expired = "SELECT sum((reasons->>'expired')::bigint)::bigint FROM settled.batches";
    assert_eq!(count(&place, expired).await, i64::try_from(sent.len()).expect("few"));
    assert_eq!(place.line().depth("settlement.unreadable").await, 0);
    let reconciled = place.json(&["reconcile", "--since", "1h"]).await;
    assert_eq!(reconciled["ok"], json!(true), "{reconciled}");
    assert_eq!(worker.terminate().await.code(), Some(0));
    for queue in ["settlement.dead", "settlement.dead.broker"] {
        assert_eq!(place.line().depth(queue).await, 0, "{queue}");
    }
}

/// Who leaves the dead letters in their queue finds there what came there, and what can not come there in the database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_way_is_taken_without_a_collector_too() {
    let (place, _) = with_partner("second", "1000000").await;
    let sent = moved_back(&place, KEY);
    place.publish(&sent).await;
    all_expired(&place, "settlement.updates").await;
    let worker = place.ready_worker(&[LEAVE_DEAD_LETTERS]).await;
    gauge(&worker, "settled_queue_messages{queue=\"settlement.dead.broker\"} 0").await;
    all_expired(&place, "settlement.dead.broker").await;
    // From 4.0 on the broker believes no record that a message brought along, and cuts nothing off.
    let believes = place.services.broker_major().await < 4;
    let cut = RECORDS
        .iter()
        .filter(|deaths| believes && deaths.iter().any(|(queue, _)| *queue == "settlement.dead"))
        .count();
    until("those are stored", PATIENCE, async || {
        let rows = count(&place, "SELECT count(*) FROM settled.dead_letters").await;
        (rows == i64::try_from(cut).expect("few")).then_some(())
    })
    .await;
    let collected = place.json(&["dead-letters", "collect"]).await;
    assert_eq!(collected["left"], json!(0), "{collected}");
    assert_eq!(
        count(&place, "SELECT count(*) FROM settled.dead_letters").await,
        i64::try_from(sent.len()).expect("few")
    );
    assert_eq!(
        count(&place, "SELECT max(times_seen) FROM settled.dead_letters").await,
        1,
        "what came both ways is one failure"
    );
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// The broker keeps what it can bring nowhere, and in the end dead-letters nothing more: a sender that makes up records of both
/// queues must not come to that. A few of them show that each comes the third way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_were_made_up_hold_up_nobody() {
    let (place, _) = with_partner("made_up", "1000000").await;
    // Nothing but our own queues: another one would take these letters, and hide that they came nowhere.
    place.line().delete("test.dead").await;
    let both = record(&[("settlement.dead", "expired"), ("settlement.dead.broker", "expired")]);
    let expiring = |body: String, headers: Option<&FieldTable>| {
        Message::new(KEY, body, Expect::Refused("expired")).with(|properties| {
            let properties = properties.with_expiration("1".into());
            match headers {
                Some(headers) => properties.with_headers(headers.clone()),
                None => properties,
            }
        })
    };
    let mut sent: Vec<Message> = (0..4)
        .map(|number| expiring(format!("made up {number}"), Some(&both)))
        .collect();
    sent.push(expiring("an innocent".to_owned(), None));
    place.publish(&sent).await;
    all_expired(&place, "settlement.updates").await;
    let worker = place.ready_worker(&[WITH_COLLECTOR]).await;
    until("all are stored", PATIENCE, async || {
        let rows = "SELECT count(*) FROM settled.dead_letters WHERE reason = 'expired' AND made_by = 'broker'";
        (count(&place, rows).await == 5).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// `settled topology` may come before `settled migrate`: the queue that is named by the books is then made by a worker that may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_may_makes_the_queue_of_its_books() {
    let (place, _) = with_partner("before_books", "1000000").await;
    let id: uuid::Uuid = place
        .db()
        .await
        .query_one("SELECT books FROM settled.epochs ORDER BY epoch DESC LIMIT 1", &[])
        .await
        .expect("the books")
        .get(0);
    let queue = format!("settlement.dead.broker.{}", id.simple());
    place.line().delete(&queue).await;
    let worker = place.ready_worker(&[WITH_COLLECTOR]).await;
    assert_eq!(place.line().depth(&queue).await, 0);
    let path = format!("/api/queues/{}/{queue}/bindings", place.name);
    let (status, bindings) = place.services.manage("GET", &path, None).await;
    assert!(
        status == 200 && bindings.to_string().contains("\"source\":\"settlement.dead.broker\""),
        "{bindings}"
    );
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// Whoever takes the binding of settlement.dead away tells nobody. What the broker dead-letters then comes to its second queue
/// alone, is confirmed, and is stored from there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_binding_no_letter_of_the_brokers_is_lost() {
    let (place, _) = with_partner("unbound", "1000000").await;
    let unbind = async || {
        let path = format!("/api/bindings/{}/e/settlement.dead/q/settlement.dead/%23", place.name);
        let (status, answer) = place.services.manage("DELETE", &path, None).await;
        assert_eq!(status, 204, "{answer}");
    };
    // Before there is a worker, which would take the message.
    unbind().await;
    let expiring =
        Message::new(KEY, "{}", Expect::Refused("expired")).with(|properties| properties.with_expiration("1".into()));
    place.publish(&[expiring]).await;
    all_expired(&place, "settlement.updates").await;
    let worker = place.ready_worker(&[WITH_COLLECTOR]).await;
    until("it is stored", PATIENCE, async || {
        (count(&place, "SELECT count(*) FROM settled.dead_letters").await == 1).then_some(())
    })
    .await;
    let digest = hex::encode(auditor::sha256(b"{}"));
    let row = &place.json(&["dead-letters", "show", &digest]).await["deadLetter"];
    assert_eq!(
        (&row["reason"], &row["madeBy"], &row["timesSeen"]),
        (&json!("expired"), &json!("broker"), &json!(1)),
        "{row}"
    );
    let id = auditor::event_id(&format!("update.rejected|{KEY}|{digest}|expired"));
    place
        .events
        .wait("its event", |seen| seen.message_id() == Some(id.as_str()))
        .await;
    until("its copies are let go", PATIENCE, async || {
        (place.line().depth("settlement.dead.broker").await == 0).then_some(())
    })
    .await;
    assert!(
        worker.said().contains("did not come to settlement.dead"),
        "{}",
        worker.said()
    );
    assert_eq!(worker.terminate().await.code(), Some(0));
}

// Topologies -----------------------------------------------------------------------------------------------------------

/// Arguments of a queue that look right and are not.
fn wrong(dead_letters: &str) -> Vec<Value> {
    let change = |name: &str, value: Value| {
        let mut arguments = json!({
            "x-queue-type": "quorum", "x-delivery-limit": 50, "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish", "x-dead-letter-exchange": dead_letters,
        });
        match value {
            Value::Null => drop(arguments.as_object_mut().expect("an object").remove(name)),
            value => arguments[name] = value,
        }
        arguments
    };
    vec![
        change("x-dead-letter-exchange", Value::Null),
        change("x-dead-letter-exchange", json!("settlement.events")),
        change("x-dead-letter-strategy", Value::Null),
        change("x-dead-letter-strategy", json!("at-most-once")),
        change("x-delivery-limit", Value::Null),
        change("x-overflow", Value::Null),
        change("x-message-ttl", json!(60_000)),
        change("x-max-length", json!(10)),
        change("x-expires", json!(3_600_000)),
    ]
}

/// Deletes a queue, and makes it as a test wants it. The worker stands still meanwhile: one that looks in between would declare the
/// right one by it. A node of RabbitMQ 3.10 can stop altogether over queues that come and go like that.
async fn replace(place: &Place, worker: Option<&Worker>, queue: &str, arguments: Option<&Value>, bound_to: &str) {
    let signal = |name: &str| {
        if let Some(worker) = worker {
            worker.signal(name);
        }
    };
    signal("STOP");
    let path = format!("/api/queues/{}/{queue}", place.name);
    manage(place, "DELETE", &path, None).await;
    let Some(arguments) = arguments else {
        signal("CONT");
        return;
    };
    let body = json!({"durable": true, "arguments": arguments});
    until("the queue is as this test wants it", PATIENCE, async || {
        let (status, answer) = place.services.manage("PUT", &path, Some(body.clone())).await;
        if status == 400 {
            // What the worker had sent before it stood still.
            assert!(answer.to_string().contains("inequivalent"), "{answer}");
            until("its dead-lettering is at work", PATIENCE, async || {
                let (_, queue) = place.services.manage("GET", &path, None).await;
                queue.get("messages_dlx").map(drop)
            })
            .await;
            manage(place, "DELETE", &path, None).await;
            return None;
        }
        assert!(matches!(status, 201 | 204), "{status} {answer}");
        Some(())
    })
    .await;
    let path = format!("/api/bindings/{}/e/{bound_to}/q/{queue}", place.name);
    manage(place, "POST", &path, Some(json!({"routing_key": KEY}))).await;
    signal("CONT");
}

async fn says_what_the_doctor_says(place: &Place, worker: &Worker, object: &str) {
    // The worker may have looked while the test had just deleted it.
    until("the worker says what the doctor says", PATIENCE, async || {
        let why = worker.not_ready().await;
        if !why.contains(object) {
            return None;
        }
        let output = place.run(&["doctor", "--json"]).await;
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let checks = report["checks"].as_array().expect("lines");
        let check = checks.iter().find(|check| check["name"] == object).expect("its line");
        let detail = check["detail"].as_str().expect("a sentence").replace('"', "\\\"");
        let told: Value = serde_json::from_str(&why).unwrap_or_else(|_| json!(why));
        let is_same = told.to_string().contains(&detail) || why.contains(&detail);
        (check["ok"] == json!(false) && is_same).then_some(())
    })
    .await;
}

/// With each of these the worker takes nothing and says why; mended, it settles by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_wrong_input_queue_nothing_is_taken() {
    let (place, partner) = with_partner("misfit", "1000000").await;
    let variants = wrong("settlement.dead");
    let reservations: Vec<Reservation> = variants.iter().map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    // The first finds it when it starts; the others are put in its place under a running worker.
    replace(
        &place,
        None,
        "settlement.updates",
        Some(&variants[0]),
        "settlement.updates.all",
    )
    .await;
    let worker = place.worker(&[]);
    for (index, reservation) in reservations.iter().enumerate() {
        if index > 0 {
            replace(
                &place,
                Some(&worker),
                "settlement.updates",
                Some(&variants[index]),
                "settlement.updates.all",
            )
            .await;
        }
        says_what_the_doctor_says(&place, &worker, "queue settlement.updates").await;
        // Once more, now that no lane is attached any more.
        gauge(&worker, "settled_consumers_attached{queue=\"settlement.updates\"} 0").await;
        replace(
            &place,
            Some(&worker),
            "settlement.updates",
            Some(&variants[index]),
            "settlement.updates.all",
        )
        .await;
        place.line().publish(&[partner.cleared(reservation)]).await;
        gauge(&worker, "settled_topology_misfit{queue=\"settlement.updates\"} 1").await;
        let received = count(&place, "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches").await;
        assert_eq!(
            received,
            i64::try_from(index).expect("few"),
            "nothing is taken: {}",
            variants[index]
        );
        replace(&place, Some(&worker), "settlement.updates", None, "").await;
        assert!(place.run(&["topology"]).await.status.success());
        worker.ready().await;
        place.line().publish(&[partner.cleared(reservation)]).await;
        until("it settles", PATIENCE, async || {
            let settled = count(&place, "SELECT count(*) FROM settled.settlements").await;
            (settled == i64::try_from(index).expect("few") + 1).then_some(())
        })
        .await;
    }
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// A dead letter that left its queue and came to nobody is missed; one that waits, is on its way or is taken is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_that_never_came_is_missed() {
    let (place, _) = with_partner("missed", "1000000").await;
    let junk = |number: usize| Message::new(KEY, format!("junk {number}"), Expect::Refused("malformed_message"));
    let worker = place
        .ready_worker(&[LEAVE_DEAD_LETTERS, ("SETTLED_WORKER__LANES", "1")])
        .await;
    let sent: Vec<Message> = (0..20).map(junk).collect();
    // Twice in one batch, or in two, it is one dead letter or two.
    place.publish(&[sent.as_slice(), &sent[15..]].concat()).await;
    until("they wait in the queue", PATIENCE, async || {
        (place.line().depth("settlement.dead").await == 25).then_some(())
    })
    .await;
    until("all is published", PATIENCE, async || {
        (count(&place, "SELECT count(*) FROM settled.outbox").await == 0).then_some(())
    })
    .await;
    let reconciled = place.json(&["reconcile", "--since", "1h"]).await;
    assert_eq!(reconciled["ok"], json!(true), "{reconciled}");
    let channel = place.line().channel().await;
    let got = channel
        .basic_get(
            "settlement.dead".into(),
            lapin::options::BasicGetOptions { no_ack: true },
        )
        .await
        .expect("an answer")
        .expect("a letter");
    let gone = got.delivery.data.clone();
    assert_eq!(gone, sent[0].body);
    place.json(&["dead-letters", "collect"]).await;
    let output = place.run(&["reconcile", "--since", "1h", "--json"]).await;
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let wrong: Vec<&Value> = document["lines"]
        .as_array()
        .expect("lines")
        .iter()
        .filter(|line| line["ok"] == json!(false))
        .collect();
    assert_eq!(output.status.code(), Some(1), "{document}");
    assert_eq!(wrong.len(), 1, "{document}");
    assert_eq!(wrong[0]["left"]["what"], "dead letters that batches published");
    assert_eq!(wrong[0]["differsBy"], json!(1), "{document}");
    assert_eq!(document["problems"].as_array().map(Vec::len), Some(1), "{document}");
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// The same for what leads to the queue and away from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_wrong_exchanges_nothing_is_taken() {
    let (place, _) = with_partner("exchanges", "1000000").await;
    for (name, other) in [
        ("settlement.updates", json!({"type": "topic", "durable": true})),
        ("settlement.updates.all", json!({"type": "topic", "durable": true})),
        ("settlement.dead", json!({"type": "headers", "durable": true})),
    ] {
        let path = format!("/api/exchanges/{}/{name}", place.name);
        manage(&place, "DELETE", &path, None).await;
        manage(&place, "PUT", &path, Some(other)).await;
        let worker = place.worker(&[]);
        says_what_the_doctor_says(&place, &worker, &format!("exchange {name}")).await;
        manage(&place, "DELETE", &path, None).await;
        assert!(place.run(&["topology"]).await.status.success());
        worker.ready().await;
        assert_eq!(worker.terminate().await.code(), Some(0));
    }
}

/// A partner's own queue holds up nobody else, and the dead letters' queue holds up no settling.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_queue_beside_holds_up_only_what_it_is_for() {
    let (place, partner) = with_partner("beside", "1000000").await;
    let own = Partner::new("own");
    place.register_with(&own, &["--own-queue"]).await;
    let reservations: Vec<Reservation> = (0..2).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let arguments = &wrong("settlement.dead")[0];
    replace(
        &place,
        None,
        "settlement.updates.own",
        Some(arguments),
        "settlement.events",
    )
    .await;
    let worker = place.ready_worker(&[WITH_COLLECTOR]).await;
    gauge(&worker, "settled_topology_misfit{queue=\"settlement.updates.own\"} 1").await;
    place.line().publish(&[partner.cleared(&reservations[0])]).await;
    let settled = async |number: i64| {
        until("it settles", PATIENCE, async || {
            (count(&place, "SELECT count(*) FROM settled.settlements").await == number).then_some(())
        })
        .await;
    };
    settled(1).await;
    replace(&place, Some(&worker), "settlement.updates.own", None, "").await;
    assert!(place.run(&["topology"]).await.status.success());
    gauge(&worker, "settled_topology_misfit{queue=\"settlement.updates.own\"} 0").await;

    let arguments = &wrong("settlement.unreadable")[0];
    replace(
        &place,
        Some(&worker),
        "settlement.dead",
        Some(arguments),
        "settlement.dead",
    )
    .await;
    says_what_the_doctor_says(&place, &worker, "queue settlement.dead").await;
    place.line().publish(&[partner.cleared(&reservations[1])]).await;
    settled(2).await;
    replace(&place, Some(&worker), "settlement.dead", None, "").await;
    assert!(place.run(&["topology"]).await.status.success());
    worker.ready().await;
    replace(&place, Some(&worker), "settlement.dead.broker", None, "").await;
    says_what_the_doctor_says(&place, &worker, "queue settlement.dead.broker").await;
    assert!(place.run(&["topology"]).await.status.success());
    worker.ready().await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// A worker with the rights that it needs and no more settles on a right topology, and says once what it may not look at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_right_to_look_it_settles_and_says_so_once() {
    let (place, partner) = with_partner("rights", "1000000").await;
    let reservation = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&reservation)).await;
    let role = format!("{}_user", place.name);
    let secret = uuid::Uuid::new_v4().simple().to_string();
    let user = format!("/api/users/{role}");
    manage(&place, "PUT", &user, Some(json!({"password": secret, "tags": ""}))).await;
    let rights = json!({
        "configure": "^$",
        "write": "^settlement\\.(events|dead|epoch)$",
        "read": "^settlement\\.((updates|dead)(\\..*)?|epoch)$",
    });
    let path = format!("/api/permissions/{}/{role}", place.name);
    manage(&place, "PUT", &path, Some(rights)).await;
    let (name, password) = userinfo(&place.broker_url);
    let url = place
        .broker_url
        .replace(&format!("{name}:{password}@"), &format!("{role}:{secret}@"));
    let worker = place
        .ready_worker(&[("SETTLED_BROKER_URL", &url), WITH_COLLECTOR])
        .await;
    place.publish(&[partner.cleared(&reservation)]).await;
    until("it settles", PATIENCE, async || {
        (count(&place, "SELECT count(*) FROM settled.settlements").await == 1).then_some(())
    })
    .await;
    let times_told = |queue: &str| {
        let lines = worker.lines();
        let told = lines.iter().filter(|line| {
            line["queue"] == queue
                && line["message"]
                    .as_str()
                    .is_some_and(|text| text.starts_with("not looked at"))
        });
        told.count()
    };
    for queue in ["settlement.dead", "settlement.dead.broker"] {
        until("it is told", PATIENCE, async || (times_told(queue) > 0).then_some(())).await;
    }
    assert_eq!(worker.terminate().await.code(), Some(0));
    for queue in ["settlement.dead", "settlement.dead.broker"] {
        assert_eq!(times_told(queue), 1, "{queue}: {}", worker.said());
    }
    manage(&place, "DELETE", &user, None).await;
}

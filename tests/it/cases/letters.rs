//! What a dead letter's row is, whose word about it counts, what becomes of one whose message has its effect, and how much
//! room they may take.

use std::time::Duration;

use lapin::{
    options::{BasicGetOptions, BasicRejectOptions},
    types::{AMQPValue, FieldArray, FieldTable},
};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::kit::{
    amqp::{Message, Seen},
    auditor::{Expect, Reservation, event_id, sha256},
    command::Answer,
    partner::Partner,
    support::{PATIENCE, Place, Worker, until, userinfo},
};

/// Quick, so that nobody waits for what comes by itself.
const QUICK: [(&str, &str); 5] = [
    ("SETTLED_DEAD_LETTERS__RECHECK_INTERVAL", "50ms"),
    ("SETTLED_DEAD_LETTERS__LINGER", "0s"),
    ("SETTLED_PARK__LEASE", "1s"),
    ("SETTLED_PARK__POLL", "20ms"),
    ("SETTLED_RETRY__MAX", "200ms"),
];

async fn desk(place: &Place, arguments: &[&str]) -> Answer {
    let arguments = [&["dead-letters"], arguments, &["--json"]].concat();
    Answer::of(&place.run(&arguments).await)
}

async fn number(db: &Client, sql: &str) -> i64 {
    db.query_one(sql, &[]).await.expect(sql).get(0)
}

/// Waits until a count is what it should be.
async fn counted(place: &Place, sql: &str, expected: i64) {
    let db = place.db().await;
    until(&format!("{expected}: {sql}"), PATIENCE, async || {
        (number(&db, sql).await == expected).then_some(())
    })
    .await;
}

const ROWS: &str = "SELECT count(*) FROM settled.dead_letters";

async fn with_reserved(test: &str, count: usize, flags: &[&str]) -> (Place, Partner, Vec<Reservation>) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register_with(&partner, flags).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

async fn stopped(worker: Worker) {
    let status = worker.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", worker.said());
}

/// Rows as the desk lists them, in order of arrival.
async fn listed(place: &Place) -> Vec<Value> {
    let answer = desk(place, &["list", "--state", "all"]).await;
    answer.lines(0)
}

// One row a judgement -------------------------------------------------------------------------------------------------

/// A copy is its own row where anything differs that is judged, and touches nothing of the row that it copies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_judged_otherwise_is_a_row_of_its_own() {
    let place = Place::new("own_rows").await;
    let user = userinfo(&place.broker_url).0.to_owned();
    let partner = Partner::new("acme");
    // Any other key: the owner's messages are refused until its own is there.
    let mut keyless = partner.clone();
    keyless.key = crate::kit::partner::new_key();
    place.register_with(&keyless, &["--broker-user", &user]).await;
    place.deposit(&partner, "BTC", "10").await;
    let reserved = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&reserved)).await;
    let plain = partner.draft(&reserved, "cleared").message(Expect::Any);
    let owner = plain.clone().with(|properties| {
        properties
            .with_user_id(user.as_str().into())
            .with_message_id("m-1".into())
    });
    let worker = place.ready_worker(&QUICK).await;
    place.publish(std::slice::from_ref(&owner)).await;
    counted(&place, ROWS, 1).await;
    let before = listed(&place).await;
    assert_eq!(before[0]["reason"], "signature_mismatch");
    let copies: [(Message, &str); 4] = [
        // A stranger's: the broker lets nobody set another's login.
        (plain.clone(), "sender_mismatch"),
        (
            owner
                .clone()
                .with(|properties| properties.with_content_type("text/plain".into())),
            "malformed_message",
        ),
        (
            owner
                .clone()
                .with(|properties| properties.with_content_encoding("gzip".into())),
            "malformed_message",
        ),
        (
            owner.clone().with(|properties| {
                let mut headers = FieldTable::default();
                headers.insert("padding".into(), AMQPValue::LongString("x".repeat(17_000).into()));
                properties.with_headers(headers)
            }),
            "message_too_large",
        ),
    ];
    for (number, (copy, _)) in copies.iter().enumerate() {
        place.publish(std::slice::from_ref(copy)).await;
        counted(&place, ROWS, 2 + i64::try_from(number).expect("few")).await;
    }
    let rows = listed(&place).await;
    assert_eq!(rows[0], before[0], "nothing of the owner's row has changed");
    for ((_, reason), row) in copies.iter().zip(&rows[1..]) {
        assert_eq!(row["reason"], *reason, "{row}");
        assert_eq!(row["messageDigest"], before[0]["messageDigest"]);
        assert_ne!(row["id"], before[0]["id"]);
    }
    // What no check reads is the same row.
    let again = owner
        .clone()
        .with(|properties| properties.with_message_id("m-2".into()));
    place.publish(&[again]).await;
    counted(
        &place,
        "SELECT times_seen FROM settled.dead_letters ORDER BY seq LIMIT 1",
        2,
    )
    .await;
    assert_eq!(number(&place.db().await, ROWS).await, 5);
    stopped(worker).await;

    // The plan says of each what a fresh publication of it would get.
    place.add_key(&partner).await;
    for row in &rows {
        let id = row["id"].as_str().expect("an id");
        let shown = desk(&place, &["show", id, "--body"]).await.document(0);
        let plan = desk(&place, &["plan", "--group", row["group"].as_str().expect("a group")]).await;
        let plan = plan.document(0);
        assert_eq!(plan["messages"], 1, "{plan}");
        let mut arguments = vec!["explain", "--routing-key", "acme.allocation.update", "--json"];
        let (user_id, content_type) = (
            shown["properties"]["user_id"].as_str(),
            shown["properties"]["content_type"].as_str(),
        );
        arguments.extend(user_id.into_iter().flat_map(|user| ["--user-id", user]));
        arguments.extend(content_type.into_iter().flat_map(|kind| ["--content-type", kind]));
        let output = place.run_with(&arguments, shown["body"].as_str().expect("text")).await;
        let explained = Answer::of(&output).document(0);
        // It has no flag for these two.
        if row["reason"] == "message_too_large" || shown["properties"]["content_encoding"].is_string() {
            assert_eq!(plan["verdicts"][0]["reason"], row["reason"], "{plan}");
            continue;
        }
        assert_eq!(
            plan["verdicts"][0]["verdict"], explained["verdict"],
            "{row} {explained}"
        );
        if explained["verdict"] == "rejected" {
            assert_eq!(plan["verdicts"][0]["reason"], explained["reason"], "{row} {explained}");
        }
    }
    let plan = desk(&place, &["plan"]).await.document(0);
    assert_eq!(
        plan["wouldMove"],
        json!([{"currency": "BTC", "quantity": "1"}]),
        "{plan}"
    );
}

// Who is believed -----------------------------------------------------------------------------------------------------

/// Everything that a dead letter of a worker's says, for a message of this partner's login.
fn as_a_worker_would(message: &Message, origin: &str) -> Message {
    let text = |value: &str| AMQPValue::LongString(value.into());
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("settled-reason", text("partner_inactive")),
        ("settled-class", AMQPValue::LongLongInt(403)),
        ("settled-final", AMQPValue::Boolean(false)),
        ("settled-detail", text("the partner is suspended")),
        ("settled-digest", text(&hex::encode(sha256(&message.body)))),
        ("settled-failed-at", text("2026-11-20T12:00:00.000Z")),
        ("settled-origin-exchange", text("settlement.updates")),
        ("settled-origin-routing-key", text(&message.routing_key)),
        ("settled-origin-user-id", text(origin)),
    ] {
        headers.insert(name.into(), value);
    }
    let mut letter = message.clone().with(|properties| properties.with_headers(headers));
    letter.exchange = "settlement.dead".to_owned();
    letter
}

/// Whoever may write to settlement.dead: what he says of a bound partner's message counts for nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_letter_of_a_bound_partner_moves_nothing() {
    let (place, partner, reservations) = with_reserved("forged", 2, &["--broker-user", "the-partners-login"]).await;
    let worker = place.ready_worker(&QUICK).await;
    let message = partner.draft(&reservations[0], "cleared").message(Expect::Any);
    place
        .line()
        .publish(&[as_a_worker_would(&message, "the-partners-login")])
        .await;
    counted(&place, ROWS, 1).await;
    let row = &listed(&place).await[0];
    assert_eq!(
        (&row["madeBy"], &row["reason"]),
        (&json!("unknown"), &json!("internal")),
        "{row}"
    );
    let id = row["id"].as_str().expect("an id");
    let shown = desk(&place, &["show", id]).await.document(0);
    assert!(
        shown["properties"]["user_id"].is_null() && shown["told"].is_null(),
        "{shown}"
    );
    let human = place.run(&["dead-letters", "show", id]).await;
    assert!(
        String::from_utf8_lossy(&human.stdout).contains("unknown: no worker"),
        "{human:?}"
    );
    // Not planned unless asked for, and then as the message that it is: nobody's.
    let plan = desk(&place, &["plan"]).await;
    assert_eq!(plan.code, Some(1), "{}", plan.all());
    assert!(plan.err.contains("--made-by unknown"), "{}", plan.all());
    let plan = desk(&place, &["plan", "--made-by", "unknown"]).await.document(0);
    assert_eq!(plan["verdicts"][0]["reason"], "sender_mismatch", "{plan}");
    assert_eq!(plan["wouldMove"], json!([]), "{plan}");
    // Beside a true one with the same bytes it is a row of its own, and changes nothing of it.
    let true_one = partner.draft(&reservations[1], "cleared").message(Expect::Any);
    place.publish(std::slice::from_ref(&true_one)).await;
    counted(&place, ROWS, 2).await;
    let before = listed(&place).await[1].clone();
    assert_eq!(
        (&before["madeBy"], &before["reason"]),
        (&json!("settled"), &json!("sender_mismatch"))
    );
    place
        .line()
        .publish(&[as_a_worker_would(&true_one, "the-partners-login")])
        .await;
    counted(&place, ROWS, 3).await;
    let rows = listed(&place).await;
    assert_eq!(rows[1], before);
    assert_eq!(rows[2]["madeBy"], "unknown");
    let plan = desk(&place, &["plan"]).await.document(0);
    assert_eq!((&plan["messages"], &plan["leftOut"]), (&json!(1), &json!(2)), "{plan}");
    // A login that the settings name is believed, and so is our own.
    stopped(worker).await;
    let user = userinfo(&place.broker_url).0.to_owned();
    let third = partner
        .draft(&partner.allocation("BTC", "1"), "cleared")
        .message(Expect::Any);
    let letter = as_a_worker_would(&third, "the-partners-login");
    let ours = letter.with(|properties| properties.with_user_id(user.as_str().into()));
    place.line().publish(&[ours]).await;
    let worker = place.ready_worker(&QUICK).await;
    counted(&place, ROWS, 4).await;
    let row = &listed(&place).await[3];
    assert_eq!(
        (&row["madeBy"], &row["reason"]),
        (&json!("settled"), &json!("partner_inactive")),
        "{row}"
    );
    stopped(worker).await;
}

/// A whole record of a death, in the broker's shape, but of the future, is nobody's; one of the past is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_in_the_future_is_nobodys() {
    let (place, _, _) = with_reserved("future", 0, &[]).await;
    let worker = place.ready_worker(&QUICK).await;
    let text = |value: &str| AMQPValue::LongString(value.into());
    let now = u64::try_from(jiff::Timestamp::now().as_second()).expect("after 1970");
    for (number, time) in [now + 86_400, now - 10].into_iter().enumerate() {
        let mut death = FieldTable::default();
        for (name, value) in [
            ("count", AMQPValue::LongLongInt(1)),
            ("reason", text("expired")),
            ("queue", text("settlement.updates")),
            ("time", AMQPValue::Timestamp(time)),
            ("exchange", text("settlement.updates")),
            (
                "routing-keys",
                AMQPValue::FieldArray(FieldArray::from(vec![text("acme.allocation.update")])),
            ),
        ] {
            death.insert(name.into(), value);
        }
        let mut headers = FieldTable::default();
        headers.insert(
            "x-death".into(),
            AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(death)])),
        );
        let body = format!("death {number}");
        let mut letter = Message::new("acme.allocation.update", body, Expect::Any)
            .with(|properties| properties.with_headers(headers));
        letter.exchange = "settlement.dead".to_owned();
        place.line().publish(&[letter]).await;
    }
    counted(&place, ROWS, 2).await;
    let makers: Vec<Value> = listed(&place).await.iter().map(|row| row["madeBy"].clone()).collect();
    assert_eq!(makers, [json!("unknown"), json!("broker")]);
    place.events.wait("the one of the past", |_| true).await;
    stopped(worker).await;
    assert_eq!(place.events.seen().len(), 1);
}

// Money that moved ----------------------------------------------------------------------------------------------------

/// The events under an id.
fn told(place: &Place, id: &str) -> Vec<Seen> {
    let seen = place.events.seen().into_iter();
    seen.filter(|seen| seen.message_id() == Some(id)).collect()
}

/// Waits until a message has gone from the input queue to the dead letters.
async fn expired(place: &Place) {
    until("it expires", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 0).then_some(())
    })
    .await;
}

/// Handed out and given back until the broker gives it up.
async fn given_up(place: &Place) {
    let channel = place.line().channel().await;
    until("the broker gives it up", PATIENCE, async || {
        let got = channel
            .basic_get("settlement.updates".into(), BasicGetOptions { no_ack: false })
            .await;
        let Some(got) = got.expect("an answer") else {
            return Some(());
        };
        // By reject: a nack counts no more from RabbitMQ 4.3 on.
        let again = BasicRejectOptions { requeue: true };
        got.delivery.acker.reject(again).await.expect("given back");
        None
    })
    .await;
}

/// What the broker gives up of a message that settled is told as settled, byte for byte, and waits for nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_that_moved_is_never_called_rejected() {
    let (place, partner, reservations) = with_reserved("moved", 3, &[]).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.draft(reservation, "cleared").message(Expect::Any))
        .collect();
    let worker = place.ready_worker(&QUICK).await;
    place.publish(&messages).await;
    let ids: Vec<String> = reservations
        .iter()
        .map(|reservation| event_id(&format!("allocation.cleared|{}", reservation.id)))
        .collect();
    for id in &ids {
        place
            .events
            .wait("it settles", |seen| seen.message_id() == Some(id))
            .await;
    }
    stopped(worker).await;
    // A copy that expires, one that is handed out too often, and another message that asks for the same.
    let expiring = |message: &Message| {
        message
            .clone()
            .with(|properties| properties.with_expiration("1".into()))
    };
    place.publish(&[expiring(&messages[0])]).await;
    expired(&place).await;
    place.publish(std::slice::from_ref(&messages[1])).await;
    given_up(&place).await;
    let other_nonce = partner.draft(&reservations[2], "cleared").message(Expect::Any);
    place.publish(&[expiring(&other_nonce)]).await;
    expired(&place).await;
    // And one that has no effect: the other way.
    let against = partner.draft(&reservations[2], "released").message(Expect::Any);
    place.publish(&[expiring(&against)]).await;
    expired(&place).await;
    let worker = place.ready_worker(&QUICK).await;
    counted(&place, ROWS, 4).await;
    for row in &listed(&place).await[..3] {
        assert_eq!(
            (&row["state"], &row["verdict"]),
            (&json!("settled"), &json!("duplicate")),
            "{row}"
        );
        assert!(
            row["note"].as_str().is_some_and(|note| note.contains("told again")),
            "{row}"
        );
    }
    for id in &ids {
        until("it is told again", PATIENCE, async || {
            (told(&place, id).len() == 2).then_some(())
        })
        .await;
        let copies = told(&place, id);
        assert_eq!(copies[0].body, copies[1].body, "byte for byte");
    }
    let rejected = |seen: &Seen| seen.routing_key.starts_with("update.rejected");
    let refused = place.events.wait("the one against it", rejected).await;
    let refused: Value = serde_json::from_slice(&refused.body).expect("JSON");
    assert_eq!(refused["data"]["messageDigest"], hex::encode(sha256(&against.body)));
    stopped(worker).await;
    assert_eq!(place.events.seen().iter().filter(|seen| rejected(seen)).count(), 1);
    let stats = desk(&place, &["stats"]).await.document(0);
    assert_eq!(stats["messages"], 1, "{stats}");
    let counts =
        "SELECT sum(duplicates)::bigint * 10 + sum(rejected)::bigint FROM settled.batches WHERE source = 'dead'";
    let counts = counts.replace("duplicates", "duplicate");
    assert_eq!(number(&place.db().await, &counts).await, 31);
    let reconciled = place.run(&["reconcile", "--since", "1h"]).await;
    assert_eq!(reconciled.status.code(), Some(0), "{reconciled:?}");
}

/// What a crash between commit and acknowledgement does to a message whose time runs out, or that is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_before_the_acknowledgement_is_no_rejection() {
    let (place, partner, reservations) = with_reserved("crashed", 2, &[]).await;
    for (number, reservation) in reservations.iter().enumerate() {
        let message = partner.draft(reservation, "cleared").message(Expect::Any);
        let is_expiring = number == 0;
        let message = if is_expiring {
            message.with(|properties| properties.with_expiration("6000".into()))
        } else {
            message
        };
        let crashing = place.worker(&[&QUICK[..], &[("SETTLED_FAULT", "after_commit:1:kill")]].concat());
        crashing.ready().await;
        place.publish(std::slice::from_ref(&message)).await;
        until("it is killed", PATIENCE, async || crashing.ended()).await;
        let settled = "SELECT count(*) FROM settled.receipts WHERE verdict = 'settled'";
        assert_eq!(
            place
                .db()
                .await
                .query_one(settled, &[])
                .await
                .expect("receipts")
                .get::<_, i64>(0),
            number as i64 + 1
        );
        // It goes back when the broker notices, and nobody reads it.
        if is_expiring {
            until("it is a dead letter", PATIENCE, async || {
                (place.line().depth("settlement.dead").await == 1).then_some(())
            })
            .await;
        } else {
            until("it is back", PATIENCE, async || {
                (place.line().depth("settlement.updates").await == 1).then_some(())
            })
            .await;
            given_up(&place).await;
        }
        let worker = place.ready_worker(&QUICK).await;
        counted(&place, ROWS, number as i64 + 1).await;
        let id = event_id(&format!("allocation.cleared|{}", reservation.id));
        place
            .events
            .wait("its event", |seen| seen.message_id() == Some(&id))
            .await;
        stopped(worker).await;
        let row = &listed(&place).await[number];
        assert_eq!(
            (&row["state"], &row["madeBy"]),
            (&json!("settled"), &json!("broker")),
            "{row}"
        );
    }
    let rejected = place.events.seen();
    assert!(
        rejected
            .iter()
            .all(|seen| !seen.routing_key.starts_with("update.rejected"))
    );
}

/// A dead letter whose message settles by another way waits for nobody, whatever the reason was; what has not settled does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_settled_since_is_closed() {
    let place = Place::new("since").await;
    let partner = Partner::new("acme");
    let mut keyless = partner.clone();
    keyless.key = crate::kit::partner::new_key();
    place.register(&keyless).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations: Vec<Reservation> = (0..4).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&QUICK).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.draft(reservation, "cleared").message(Expect::Any))
        .collect();
    // The same bytes with another content type: never to settle, and not settled when the others are.
    let spoiled = messages[0]
        .clone()
        .with(|properties| properties.with_content_type("text/plain".into()));
    // One after the other, so that they arrive in this order.
    for (number, message) in messages.iter().chain([&spoiled]).enumerate() {
        place.publish(std::slice::from_ref(message)).await;
        counted(&place, ROWS, i64::try_from(number).expect("few") + 1).await;
    }
    let discarded = listed(&place).await[1]["id"].as_str().expect("an id").to_owned();
    let db = place.db().await;
    let sql = "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = clock_timestamp() WHERE id = $1::text::uuid";
    db.execute(sql, &[&discarded]).await.expect("discarded");
    place.add_key(&partner).await;
    // The first two by the same bytes, the third by another message that asks for the same; the fourth not at all.
    place.publish(&messages[..2]).await;
    let third = partner.draft(&reservations[2], "cleared").message(Expect::Any);
    place.publish(&[third]).await;
    counted(
        &place,
        "SELECT count(*) FROM settled.dead_letters WHERE state = 'settled'",
        2,
    )
    .await;
    let rows = listed(&place).await;
    let states: Vec<&str> = rows.iter().filter_map(|row| row["state"].as_str()).collect();
    assert_eq!(states, ["settled", "discarded", "settled", "open", "open"], "{rows:?}");
    for row in [&rows[0], &rows[2]] {
        assert_eq!(row["verdict"], "duplicate");
        assert!(
            row["note"]
                .as_str()
                .is_some_and(|note| note.starts_with("settled since")),
            "{row}"
        );
    }
    assert_eq!(rows[4]["reason"], "malformed_message");
    let stats = desk(&place, &["stats"]).await.document(0);
    assert_eq!(stats["messages"], 2, "{stats}");
    let plan = desk(&place, &["plan"]).await.document(0);
    let verdicts: Vec<(&Value, &Value)> = plan["verdicts"]
        .as_array()
        .expect("verdicts")
        .iter()
        .map(|line| (&line["verdict"], &line["reason"]))
        .collect();
    assert_eq!(
        verdicts,
        [
            (&json!("settled"), &Value::Null),
            (&json!("rejected"), &json!("malformed_message"))
        ],
        "{plan}"
    );
    // Restored, it is looked at like any other.
    desk(&place, &["restore", "--state", "discarded", "--reason", "a test"]).await;
    counted(
        &place,
        "SELECT count(*) FROM settled.dead_letters WHERE state = 'settled'",
        3,
    )
    .await;
    stopped(worker).await;
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
}

// Room ----------------------------------------------------------------------------------------------------------------

/// What the sums say beside what is there.
async fn space_is_right(place: &Place) {
    let db = place.db().await;
    let sql = "SELECT coalesce((SELECT sum(rows) FROM settled.dead_letter_space), 0)::bigint
                      - (SELECT count(*) FROM settled.dead_letters)
                      + coalesce((SELECT sum(bytes) FROM settled.dead_letter_space), 0)::bigint
                      - (SELECT coalesce(sum(octet_length(body) + octet_length(properties)), 0) FROM settled.dead_letters)::bigint";
    assert_eq!(number(&db, sql).await, 0, "the sums are what is there");
}

/// At its bound the collector takes nothing more, settling goes on, and after a purge it goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_stops_the_collector_and_nothing_else() {
    let (place, partner, reservations) = with_reserved("full", 2, &[]).await;
    let bounds = [
        &QUICK[..],
        &[
            ("SETTLED_DEAD_LETTERS__MAX_ROWS", "5"),
            ("SETTLED_DEAD_LETTERS__BATCH_MAX", "1"),
            ("SETTLED_WORKER__PAUSE_RELEASE", "1s"),
        ],
    ]
    .concat();
    let worker = place.ready_worker(&bounds).await;
    let junk: Vec<Message> = (0..12)
        .map(|number| Message::new("acme.allocation.update", format!("junk {number}"), Expect::Any))
        .collect();
    place.publish(&junk).await;
    counted(&place, ROWS, 5).await;
    let readiness = until("it says that it is full", PATIENCE, async || {
        let (status, text) = worker.get("/readyz").await?;
        let answer: Value = serde_json::from_str(&text).ok()?;
        assert_eq!(status, 200, "settling goes on: {text}");
        answer["collector"].is_string().then_some(answer)
    })
    .await;
    let why = readiness["collector"].as_str().expect("a sentence");
    assert!(why.contains("5 rows of at most 5") && why.contains("purge"), "{why}");
    place
        .publish(&[partner.draft(&reservations[0], "cleared").message(Expect::Any)])
        .await;
    let id = event_id(&format!("allocation.cleared|{}", reservations[0].id));
    place
        .events
        .wait("it settles", |seen| seen.message_id() == Some(&id))
        .await;
    let mut doctor = place.command(&["doctor", "--json"]);
    let doctor = doctor
        .env("SETTLED_DEAD_LETTERS__MAX_ROWS", "5")
        .output()
        .await
        .expect("it runs");
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.contains("none is collected any more"), "{doctor}");
    // After longer than a pause may last all of them are in the queue, and still none is lost.
    until("what was in hand goes back", PATIENCE, async || {
        (place.line().depth("settlement.dead").await == 7).then_some(())
    })
    .await;
    assert_eq!(number(&place.db().await, ROWS).await, 5);
    for left in [7, 2] {
        desk(&place, &["discard", "--partner", "acme", "--reason", "a test", "--yes"])
            .await
            .document(0);
        desk(
            &place,
            &["purge", "--discarded-before", "0s", "--reason", "a test", "--yes"],
        )
        .await;
        counted(&place, ROWS, left.min(5)).await;
    }
    until("it says that there is room", PATIENCE, async || {
        let (_, text) = worker.get("/readyz").await?;
        let answer: Value = serde_json::from_str(&text).ok()?;
        answer["collector"].is_null().then_some(())
    })
    .await;
    stopped(worker).await;
    assert_eq!(place.line().depth("settlement.dead").await, 0);
    assert_eq!(
        place.line().depth("settlement.unreadable").await,
        0,
        "nothing was given up"
    );
    let purged = number(&place.db().await, "SELECT count(*) FROM settled.audit_subjects WHERE audit_id IN (SELECT id FROM settled.audit WHERE act = 'purge')").await;
    assert_eq!(purged, 10, "and each of them was stored once");
    space_is_right(&place).await;
}

/// One partner's share is an alarm, and stops nobody. Bytes count like rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_partners_share_is_an_alarm_and_stops_nobody() {
    let (place, _, _) = with_reserved("share", 0, &[]).await;
    let bounds = [&QUICK[..], &[("SETTLED_DEAD_LETTERS__MAX_BYTES_PER_PARTNER", "400")]].concat();
    let worker = place.ready_worker(&bounds).await;
    let junk = |enterprise: &str, number: usize| {
        Message::new(
            &format!("{enterprise}.allocation.update"),
            format!("junk {number} {:>90}", ""),
            Expect::Any,
        )
    };
    let mut messages: Vec<Message> = (0..8).map(|number| junk("acme", number)).collect();
    messages.push(junk("globex", 0));
    place.publish(&messages).await;
    counted(&place, ROWS, 9).await;
    until("it is told", Duration::from_secs(30), async || {
        let said = worker.said();
        (said.contains("dead letters take most of the room") && said.contains("\"of\":\"acme (full)\"")).then_some(())
    })
    .await;
    assert!(!worker.said().contains("\"of\":\"globex"), "{}", worker.said());
    stopped(worker).await;
    space_is_right(&place).await;
    let db = place.db().await;
    // Open ones go by their owner's hand alone.
    db.batch_execute("ALTER TABLE settled.dead_letters DISABLE TRIGGER done_with")
        .await
        .expect("the owner's");
    db.batch_execute("DELETE FROM settled.dead_letters WHERE enterprise_id = 'acme'")
        .await
        .expect("deleted");
    space_is_right(&place).await;
    db.batch_execute("ALTER TABLE settled.dead_letters DISABLE TRIGGER never_emptied; TRUNCATE settled.dead_letters")
        .await
        .expect("the owner's");
    space_is_right(&place).await;
}

//! Dead letters on their way from the queue into the database: with everything they came with, one row a message, however
//! they came to be and whatever is in the way.

use lapin::{
    options::{BasicGetOptions, BasicRejectOptions},
    types::{AMQPValue, FieldArray, FieldTable},
};
use serde_json::{Value, json};

use crate::kit::{
    amqp::Message,
    auditor::{self, Expect, Reservation},
    partner::Partner,
    raw::{CONTENT_TYPE, DELIVERY_MODE, EXPIRATION, HEADERS, MESSAGE_ID, Raw, TOO_DEEP, UNDECODABLE, nested, short},
    support::{Ground, LEAVE_DEAD_LETTERS, PATIENCE, Place, Worker, said, until, userinfo, with_partner},
};

async fn with_reserved(test: &str, count: usize) -> (Place, Partner, Vec<Reservation>) {
    let (place, partner) = with_partner(test, "1000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

async fn count(place: &Place, sql: &str) -> i64 {
    place.db().await.query_one(sql, &[]).await.expect(sql).get(0)
}

/// Waits for so many rows.
async fn rows(place: &Place, expected: i64) {
    let db = place.db().await;
    until("the dead letters are stored", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.dead_letters";
        let rows: i64 = db.query_one(sql, &[]).await.expect(sql).get(0);
        assert!(rows <= expected, "{rows} rows instead of {expected}");
        (rows == expected).then_some(())
    })
    .await;
}

/// Waits until nothing is in the queue, ready or handed out: with the worker gone, what it had comes back.
async fn nothing_left(place: &Place, worker: Worker) {
    let status = worker.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", worker.said());
    assert_eq!(place.line().depth("settlement.dead").await, 0, "{}", worker.said());
}

/// A row as JSON, by its body.
async fn row(place: &Place, body: &[u8]) -> Value {
    let sql = "SELECT (to_jsonb(d) || jsonb_build_object('properties', properties::jsonb,
                                                         'digest', encode(digest, 'hex')))::text
               FROM settled.dead_letters AS d WHERE body = $1";
    let found = place.db().await.query_one(sql, &[&body]).await.expect("the row");
    serde_json::from_str(found.get(0)).expect("JSON")
}

async fn metric(worker: &Worker, name: &str) -> f64 {
    let (status, text) = worker.get("/metrics").await.expect("metrics");
    assert_eq!(status, 200);
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {text}"))
        .parse()
        .expect("a number")
}

/// A message that no one can settle, told apart by its body.
fn junk(number: usize) -> Message {
    Message::new(
        "acme.allocation.update",
        format!("junk {number}"),
        Expect::Refused("malformed_message"),
    )
}

// What is stored ------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_is_stored_with_everything_it_came_with() {
    let (place, partner, reservations) = with_reserved("stored", 1).await;
    let user = userinfo(&place.broker_url).0.to_owned();
    let draft = partner
        .draft(&reservations[0], "cleared")
        .set("amount", json!({"currency": "BTC", "quantity": "2"}));
    let nonce = draft.fields.get("nonce").clone();
    let mut headers = FieldTable::default();
    headers.insert("mine".into(), AMQPValue::LongInt(7));
    headers.insert("settled-reason".into(), AMQPValue::LongString("forged".into()));
    let message = draft
        .message(Expect::Refused("allocation_mismatch"))
        .with(|properties| {
            properties
                .with_headers(headers)
                .with_expiration("600000".into())
                .with_message_id("m-1".into())
                .with_user_id(user.as_str().into())
        });
    let worker = place.ready_worker(&[]).await;
    place.publish(std::slice::from_ref(&message)).await;
    rows(&place, 1).await;
    let row = row(&place, &message.body).await;
    for (name, expected) in [
        ("state", json!("open")),
        ("exchange", json!("settlement.updates")),
        ("routing_key", json!("acme.allocation.update")),
        ("digest", json!(hex::encode(auditor::sha256(&message.body)))),
        ("enterprise_id", json!("acme")),
        ("nonce", nonce),
        ("allocation_id", json!(reservations[0].id)),
        ("reason", json!("allocation_mismatch")),
        ("detail", json!("amount.quantity: differs from the record")),
        ("made_by", json!("settled")),
        ("times_seen", json!(1)),
        ("replays", json!(0)),
    ] {
        assert_eq!(row[name], expected, "{name}: {row}");
    }
    let dead = place.dead.wait("the dead letter", |_| true).await;
    let failed_at = dead.text("settled-failed-at").expect("a time");
    let failed_at: jiff::Timestamp = failed_at.parse().expect("RFC 3339");
    let stored: jiff::Timestamp = row["first_failed_at"]
        .as_str()
        .expect("a time")
        .parse()
        .expect("a time");
    assert_eq!(stored, failed_at);
    assert_eq!(row["first_failed_at"], row["last_failed_at"]);
    let id = auditor::dead_letter_id(
        "acme.allocation.update",
        &message.body,
        Some("application/json"),
        Some(&user),
    );
    assert_eq!(row["id"], json!(id));
    assert_eq!(
        row["properties"],
        json!({
            "content_type": "application/json",
            "headers": {"mine": {"LongInt": 7}},
            "delivery_mode": 2,
            "expiration": "600000",
            "message_id": "m-1",
            "user_id": user,
        }),
        "as the partner sent them"
    );
    assert_eq!(
        metric(&worker, "settled_dead_letters_collected_total{what=\"new\"}").await,
        1.0
    );
    nothing_left(&place, worker).await;
    place.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_one_row_however_often_it_fails() {
    let (place, _) = with_partner("one_row", "1000000").await;
    let worker = place.ready_worker(&[]).await;
    let message = junk(1);
    for times in 1..=3 {
        place.publish(std::slice::from_ref(&message)).await;
        until("it is counted", PATIENCE, async || {
            (count(
                &place,
                "SELECT coalesce(sum(times_seen), 0)::bigint FROM settled.dead_letters",
            )
            .await
                == times)
                .then_some(())
        })
        .await;
    }
    rows(&place, 1).await;
    let stored = row(&place, &message.body).await;
    assert!(
        stored["first_failed_at"].as_str() < stored["last_failed_at"].as_str(),
        "{stored}"
    );
    // Discarded, it stays so until it fails again.
    let db = place.db().await;
    let discard = "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = clock_timestamp()";
    db.batch_execute(discard).await.expect(discard);
    place.publish(&[junk(2)]).await;
    rows(&place, 2).await;
    assert_eq!(row(&place, &message.body).await["state"], "discarded");
    place.publish(std::slice::from_ref(&message)).await;
    until("it is open again", PATIENCE, async || {
        let row = row(&place, &message.body).await;
        (row["state"] == "open" && row["times_seen"] == 4 && row["discarded_at"].is_null()).then_some(())
    })
    .await;
    nothing_left(&place, worker).await;
    place.audit().await;
}

/// Everything that a sender can forge about a death for this reason, short of the whole record.
fn forged_headers(reason: &str) -> FieldTable {
    let text = |value: &str| AMQPValue::LongString(value.into());
    let mut death = FieldTable::default();
    for (name, value) in [
        ("queue", text("settlement.updates")),
        ("reason", text(reason)),
        ("exchange", text("evil")),
        ("time", text("then")),
    ] {
        death.insert(name.into(), value);
    }
    let mut headers = FieldTable::default();
    headers.insert(
        "x-death".into(),
        AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(death)])),
    );
    for name in ["settled-reason", "settled-origin-user-id", "x-first-death-queue"] {
        headers.insert(name.into(), text("unknown_partner"));
    }
    headers
}

/// A record with queue and reason of the true one the broker (up to 3.12) keeps, and only counts up: it is the sender's, and
/// nobody is told anything by it. From 4.0 on the broker writes its own, whatever came along.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_the_sender_brought_along_says_nothing() {
    let (place, _) = with_partner("brought_along", "1000000").await;
    let message = Message::new("acme.allocation.update", "brought along", Expect::Any).with(|properties| {
        properties
            .with_headers(forged_headers("expired"))
            .with_expiration("1".into())
    });
    place.publish(std::slice::from_ref(&message)).await;
    until("it expires", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 0).then_some(())
    })
    .await;
    let worker = place.ready_worker(&[]).await;
    rows(&place, 1).await;
    let row = row(&place, &message.body).await;
    let is_its_own = place.services.broker_major().await >= 4;
    let expected = match is_its_own {
        true => (json!("broker"), json!("expired")),
        false => (json!("unknown"), json!("internal")),
    };
    assert_eq!((&row["made_by"], &row["reason"]), (&expected.0, &expected.1), "{row}");
    assert_eq!((&row["enterprise_id"], &row["times_seen"]), (&json!("acme"), &json!(1)));
    nothing_left(&place, worker).await;
    // What is told has a row, as a batch has.
    let told = count(&place, "SELECT count(*) FROM settled.batches").await;
    assert_eq!(told, i64::from(is_its_own));
    assert_eq!(
        place.events.seen().len(),
        usize::from(is_its_own),
        "only what the broker says is told"
    );
}

/// What the broker makes by itself, plain, and with everything forged that a sender can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_broker_gave_up_is_stored_told_and_counted() {
    let (place, _) = with_partner("broker_made", "1000000").await;
    let made = |name: &str, body: Vec<u8>| {
        Message::new("acme.allocation.update", body, Expect::Any).expecting(match name {
            "expired" => Expect::Refused("expired"),
            _ => Expect::Refused("delivery_limit"),
        })
    };
    // Under another reason: the broker's own record stands first then.
    let forged = |message: Message| message.with(|properties| properties.with_headers(forged_headers("rejected")));
    let mut sent = Vec::new();
    // Handed out too often: nobody acknowledges these.
    for (number, forging) in [false, true].into_iter().enumerate() {
        let message = made("delivery_limit", format!("limit {number}").into_bytes());
        let message = if forging { forged(message) } else { message };
        place.publish(std::slice::from_ref(&message)).await;
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
        sent.push(message);
    }
    // Expired before they were read.
    for (number, forging) in [false, true].into_iter().enumerate() {
        let message = made("expired", format!("expired {number}").into_bytes());
        let message = if forging { forged(message) } else { message };
        let message = message.with(|properties| properties.with_expiration("1".into()));
        place.publish(std::slice::from_ref(&message)).await;
        until("it expires", PATIENCE, async || {
            (place.line().depth("settlement.updates").await == 0).then_some(())
        })
        .await;
        sent.push(message);
    }
    let worker = place.ready_worker(&[]).await;
    rows(&place, 4).await;
    for message in &sent {
        let Expect::Refused(reason) = message.expect else {
            panic!("each has its reason")
        };
        let row = row(&place, &message.body).await;
        assert_eq!(
            (&row["made_by"], &row["reason"]),
            (&json!("broker"), &json!(reason)),
            "{row}"
        );
        assert_eq!((&row["times_seen"], &row["enterprise_id"]), (&json!(1), &json!("acme")));
        assert!(
            row["properties"]["headers"].is_null() && row["properties"]["user_id"].is_null(),
            "{row}"
        );
    }
    let plain = row(&place, b"expired 0").await;
    assert_eq!(
        plain["properties"]["expiration"], "1",
        "restored from the broker's record"
    );
    // The event has the time of the failure, and its id is what the failure is.
    let digest = hex::encode(auditor::sha256(b"expired 0"));
    let id = auditor::event_id(&format!("update.rejected|acme.allocation.update|{digest}|expired"));
    let seen = place
        .events
        .wait("its event", |seen| seen.message_id() == Some(&id))
        .await;
    let event: Value = serde_json::from_slice(&seen.body).expect("JSON");
    let told: jiff::Timestamp = event["time"].as_str().expect("a time").parse().expect("RFC 3339");
    let stored: jiff::Timestamp = plain["first_failed_at"]
        .as_str()
        .expect("a time")
        .parse()
        .expect("a time");
    assert_eq!(told, stored);
    assert_eq!(
        (&event["data"]["class"], &event["data"]["final"]),
        (&json!(408), &json!(false))
    );
    // Every message is in some batch: nobody judged these, so they are counted here.
    let sql = "SELECT sum(received)::bigint FROM settled.batches WHERE source = 'dead'";
    assert_eq!(count(&place, sql).await, 4);
    assert_eq!(
        count(&place, "SELECT sum(rejected)::bigint FROM settled.batches").await,
        4
    );
    let expired = "settled_messages_total{verdict=\"rejected\",reason=\"expired\"}";
    assert_eq!(metric(&worker, expired).await, 2.0);
    until("its row in the outbox is done", PATIENCE, async || {
        (count(&place, "SELECT count(*) FROM settled.outbox").await == 0).then_some(())
    })
    .await;
    nothing_left(&place, worker).await;
    place.audit().await;
}

/// Versions before this one rejected what is too large, and left the rest to the broker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_version_rejected_is_still_too_large() {
    let (place, _) = with_partner("rejected", "1000000").await;
    let body = vec![b' '; 262_145];
    place
        .publish(&[Message::new("acme.allocation.update", body.clone(), Expect::Any)])
        .await;
    let channel = place.line().channel().await;
    until("it is rejected", PATIENCE, async || {
        let got = channel
            .basic_get("settlement.updates".into(), BasicGetOptions { no_ack: false })
            .await;
        let got = got.expect("an answer")?;
        let reject = BasicRejectOptions { requeue: false };
        got.delivery.acker.reject(reject).await.expect("rejected");
        Some(())
    })
    .await;
    let worker = place.ready_worker(&[]).await;
    rows(&place, 1).await;
    let row = row(&place, &body).await;
    assert_eq!(
        (&row["made_by"], &row["reason"], &row["body_length"]),
        (&json!("broker"), &json!("message_too_large"), &Value::Null),
        "{row}"
    );
    let detail = row["detail"].as_str().expect("text");
    assert!(detail.contains("at most 262144"), "{detail}");
    nothing_left(&place, worker).await;
}

/// Handed out before is not stored before: what a later failure of the same message overtook is told all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_broker_gave_up_is_told_even_if_it_looks_like_a_copy() {
    let (place, _) = with_partner("overtaken", "1000000").await;
    let body = b"overtaken";
    let message = Message::new("acme.allocation.update", body.to_vec(), Expect::Any);
    let expiring = message
        .clone()
        .with(|properties| properties.with_expiration("1".into()));
    place.publish(&[expiring]).await;
    until("it expires", PATIENCE, async || {
        (place.line().depth("settlement.dead").await == 1).then_some(())
    })
    .await;
    // In the hands of a collector that will not store it.
    let channel = place.line().channel().await;
    let got = channel
        .basic_get("settlement.dead".into(), BasicGetOptions { no_ack: false })
        .await;
    let held = got.expect("an answer").expect("the dead letter").delivery;
    let worker = place.ready_worker(&[]).await;
    place.publish(std::slice::from_ref(&message)).await;
    rows(&place, 1).await;
    assert_eq!(row(&place, body).await["reason"], "malformed_message");
    let again = BasicRejectOptions { requeue: true };
    held.acker.reject(again).await.expect("given back");
    let digest = hex::encode(auditor::sha256(body));
    let id = auditor::event_id(&format!("update.rejected|acme.allocation.update|{digest}|expired"));
    place
        .events
        .wait("its event", |seen| seen.message_id() == Some(&id))
        .await;
    nothing_left(&place, worker).await;
    let row = row(&place, body).await;
    assert_eq!(
        (&row["times_seen"], &row["reason"]),
        (&json!(1), &json!("malformed_message"))
    );
}

/// By hand, through any RabbitMQ tool: kept like any other, and nothing is believed of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_judged_is_stored_as_of_unknown_origin() {
    let (place, _) = with_partner("by_hand", "1000000").await;
    let worker = place.ready_worker(&[]).await;
    let mut headers = FieldTable::default();
    headers.insert("settled-reason".into(), AMQPValue::LongString("expired".into()));
    headers.insert("settled-origin-user-id".into(), AMQPValue::LongString("victim".into()));
    let message = Message {
        exchange: "settlement.dead".to_owned(),
        ..Message::new("by.hand", "x", Expect::Any)
    };
    let anonymous = message.with(|properties| properties.with_headers(headers));
    // By whom a worker logs in as, too: it has to say what a dead letter of ours says.
    let user = userinfo(&place.broker_url).0.to_owned();
    let mut ours = anonymous
        .clone()
        .with(|properties| properties.with_user_id(user.as_str().into()));
    ours.body = b"y".to_vec();
    place.line().publish(&[anonymous, ours]).await;
    rows(&place, 2).await;
    for (body, why) in [(b"x", "broker.trusted_users"), (b"y", "settled-class")] {
        let row = row(&place, body).await;
        assert_eq!(
            (&row["made_by"], &row["reason"]),
            (&json!("unknown"), &json!("internal"))
        );
        assert!(
            row["detail"].as_str().is_some_and(|detail| detail.contains(why)),
            "{row}"
        );
        assert!(
            row["properties"]["user_id"].is_null() && row["enterprise_id"].is_null(),
            "{row}"
        );
    }
    assert_eq!(
        count(&place, "SELECT count(*) FROM settled.batches").await,
        0,
        "nobody's message"
    );
    nothing_left(&place, worker).await;
}

// What is in the way --------------------------------------------------------------------------------------------------

/// What one message alone can cause costs nobody else anything: it ends in `settlement.unreadable`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_stored_is_set_apart() {
    let (place, _) = with_partner("set_apart", "1000000").await;
    let refuse = "ALTER TABLE settled.dead_letters ADD CHECK (body <> 'junk 13'::bytea)";
    place.db().await.batch_execute(refuse).await.expect(refuse);
    let to_dead = |mut message: Message| {
        message.exchange = "settlement.dead".to_owned();
        message
    };
    let mut messages: Vec<Message> = (0..40).map(|number| to_dead(junk(number))).collect();
    // PostgreSQL has no U+0000 in text.
    let nul = to_dead(Message::new("a\0b", "nul", Expect::Any));
    messages.insert(20, nul);
    place.line().publish(&messages).await;
    let worker = place.ready_worker(&[]).await;
    rows(&place, 39).await;
    until("both are set apart", PATIENCE, async || {
        (place.line().depth("settlement.unreadable").await == 2).then_some(())
    })
    .await;
    until("it is noticed in the queue too", PATIENCE, async || {
        (metric(&worker, "settled_unreadable_alarms_total").await >= 1.0).then_some(())
    })
    .await;
    let apart = [
        place.line().get("settlement.unreadable").await.body,
        place.line().get("settlement.unreadable").await.body,
    ];
    assert!(
        apart.contains(&b"nul".to_vec()) && apart.contains(&b"junk 13".to_vec()),
        "{apart:?}"
    );
    assert_eq!(metric(&worker, "settled_dead_letters_set_apart_total").await, 2.0);
    assert!(worker.is_ready().await);
    nothing_left(&place, worker).await;
}

/// A fault of ours pauses the collector and nobody else: the lanes settle on, readiness says what is paused, and the dead
/// letters wait in their queue, handed back once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_can_not_store_stops_nobody_else() {
    let (place, partner, reservations) = with_reserved("paused", 40).await;
    let db = place.db().await;
    let function = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                    $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '42501'; END $$";
    db.batch_execute(function).await.expect(function);
    let settings = [
        ("SETTLED_WORKER__PAUSE_RELEASE", "300ms"),
        ("SETTLED_RETRY__MAX", "100ms"),
    ];
    let worker = place.ready_worker(&settings).await;
    let mut next = reservations.iter();
    let mut junks = 0..;
    // For each row: what a rehearsal does not meet. For each statement: what it does.
    for each in ["ROW", "STATEMENT"] {
        let refuse = format!(
            "CREATE TRIGGER refuse BEFORE INSERT ON settled.dead_letters FOR EACH {each} EXECUTE FUNCTION refuse()"
        );
        db.batch_execute(&refuse).await.expect("a trigger");
        let before = count(&place, "SELECT count(*) FROM settled.dead_letters").await;
        let letters: Vec<Message> = (&mut junks).take(20).map(junk).collect();
        place.publish(&letters).await;
        let why = worker.not_ready().await;
        assert!(why.contains("not now"), "{why}");
        until("they are back in the queue", PATIENCE, async || {
            (place.line().depth("settlement.dead").await == 20).then_some(())
        })
        .await;
        let settling: Vec<Message> = next
            .by_ref()
            .take(20)
            .map(|reservation| partner.cleared(reservation))
            .collect();
        place.publish(&settling).await;
        let sql = format!(
            "SELECT count(*) FROM settled.allocations WHERE status <> 'reserved' AND id = ANY ('{{{}}}')",
            reservations
                .iter()
                .map(|reservation| reservation.id.to_string())
                .collect::<Vec<_>>()
                .join(",")
        );
        let done = if each == "ROW" { 20 } else { 40 };
        until("the lanes settle", PATIENCE, async || {
            (count(&place, &sql).await == done).then_some(())
        })
        .await;
        let why = worker.not_ready().await;
        assert!(why.contains("dead letters") || why.contains("not now"), "{why}");
        assert_eq!(count(&place, "SELECT count(*) FROM settled.dead_letters").await, before);
        db.batch_execute("DROP TRIGGER refuse ON settled.dead_letters")
            .await
            .expect("dropped");
        rows(&place, before + 20).await;
        worker.ready().await;
    }
    assert_eq!(metric(&worker, "settled_dead_letters_set_apart_total").await, 0.0);
    // Whatever lasted how long: handed back, once for each pause.
    let handed_back = worker
        .said()
        .lines()
        .filter(|line| line.contains("handed back"))
        .count();
    assert!(handed_back <= 2, "{handed_back} times:\n{}", worker.said());
    assert_eq!(
        count(&place, "SELECT max(times_seen) FROM settled.dead_letters").await,
        1
    );
    place.rest().await;
    nothing_left(&place, worker).await;
    place.audit().await;
}

/// Low, so that a message that is in the wrong hands too often shows.
const DELIVERY_LIMIT: u32 = 3;

/// Innocents before and behind a poison, in the queue before the collector comes and again while it works at full pace.
async fn survives(test: &str, flags: u16, properties: &[u8], decodable: bool) {
    let ground = Ground::new(test).await;
    let policy = json!({
        "pattern": "^settlement\\.dead$",
        "definition": {"delivery-limit": DELIVERY_LIMIT},
        "apply-to": "queues",
    });
    let path = format!("/api/policies/{}/limit", ground.name);
    let (status, answer) = ground.services.manage("PUT", &path, Some(policy)).await;
    assert_eq!(status, 201, "{answer}");
    let place = Place::on(ground).await;
    // The collector alone reads these.
    place.line().delete("test.dead").await;
    let innocents = |from: usize| -> Vec<Message> {
        let junks = (from..from + 20).map(junk);
        junks
            .map(|message| Message {
                exchange: "settlement.dead".to_owned(),
                ..message
            })
            .collect()
    };
    let mut raw = Raw::open(&place.broker_url).await;
    let settings = [("SETTLED_RETRY__INITIAL", "10ms"), ("SETTLED_RETRY__MAX", "100ms")];
    let mut worker = None;
    for round in 0..2 {
        place.line().publish(&innocents(round * 40)).await;
        let body = format!("poison {round}");
        raw.publish(
            "settlement.dead",
            "acme.allocation.update",
            flags,
            properties,
            body.as_bytes(),
        )
        .await;
        place.line().publish(&innocents(round * 40 + 20)).await;
        let running = match worker.take() {
            None => place.worker(&settings),
            Some(running) => running,
        };
        rows(&place, i64::try_from(round + 1).expect("few") * 41).await;
        assert!(
            running.ended().is_none(),
            "it costs connections, not the process: {}",
            running.said()
        );
        worker = Some(running);
    }
    assert_eq!(
        count(&place, "SELECT max(times_seen) FROM settled.dead_letters").await,
        1
    );
    let worker = worker.expect("a worker");
    for round in 0..2 {
        let row = row(&place, format!("poison {round}").as_bytes()).await;
        let list = (!decodable).then(|| hex::encode([&flags.to_be_bytes()[..], properties].concat()));
        assert_eq!(row["properties"]["undecodable"].as_str(), list.as_deref(), "{row}");
        assert_eq!(row["made_by"], "unknown", "{row}");
    }
    let lost = worker
        .said()
        .lines()
        .filter(|line| line.contains("consumer lost"))
        .count();
    assert_eq!(lost, 0, "connections lost: {}", worker.said());
    let undecodable = metric(&worker, "settled_undecodable_total").await;
    assert_eq!(undecodable, if decodable { 0.0 } else { 2.0 });
    nothing_left(&place, worker).await;
    assert_eq!(place.line().depth("settlement.unreadable").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_property_behind_the_others_that_can_not_be_decoded() {
    let properties = [&[2], short(UNDECODABLE).as_slice()].concat();
    survives("dead_poison_behind", DELIVERY_MODE | MESSAGE_ID, &properties, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_property_before_the_others_that_can_not_be_decoded() {
    let properties = [short(UNDECODABLE).as_slice(), &[2]].concat();
    survives("dead_poison_before", CONTENT_TYPE | DELIVERY_MODE, &properties, false).await;
}

/// What the broker gives up before anybody reads it is told and stored as what it is, with its properties as they came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_broker_gives_up_and_nobody_can_decode() {
    let place = Place::on(Ground::new("dead_undecodable").await).await;
    place.line().delete("test.dead").await;
    let mark = short(UNDECODABLE);
    // An expiration, and a message id that can not be decoded.
    let properties = [short(b"1").as_slice(), &mark].concat();
    let mut raw = Raw::open(&place.broker_url).await;
    let (key, body) = ("acme.allocation.update", b"expired and undecodable");
    raw.publish("settlement.updates", key, EXPIRATION | MESSAGE_ID, &properties, body)
        .await;
    until("it expires", PATIENCE, async || {
        (place.line().depth("settlement.dead").await == 1).then_some(())
    })
    .await;
    let worker = place.ready_worker(&[]).await;
    rows(&place, 1).await;
    let row = row(&place, body).await;
    assert_eq!(
        (&row["reason"], &row["made_by"]),
        (&json!("expired"), &json!("broker")),
        "{row}"
    );
    let list = hex::decode(row["properties"]["undecodable"].as_str().expect("the list")).expect("hex");
    assert!(list.windows(mark.len()).any(|window| window == mark), "{row}");
    let id = auditor::event_id(&format!(
        "update.rejected|{key}|{}|expired",
        hex::encode(auditor::sha256(body))
    ));
    until("it is told", PATIENCE, async || {
        place.events.catch_up(place.line()).await;
        let mut seen = place.events.seen().into_iter();
        seen.any(|seen| seen.message_id() == Some(id.as_str())).then_some(())
    })
    .await;
    let lost = worker
        .said()
        .lines()
        .filter(|line| line.contains("consumer lost"))
        .count();
    assert_eq!(lost, 0, "{}", worker.said());
    nothing_left(&place, worker).await;
}

/// These are read like any other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_nested_deeper_than_we_walk() {
    let properties = [nested(TOO_DEEP).as_slice(), &[2]].concat();
    survives("dead_poison_deep", HEADERS | DELIVERY_MODE, &properties, true).await;
}

// The command ---------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collecting_by_hand_ends_with_an_empty_queue() {
    let (place, _) = with_partner("by_command", "1000000").await;
    let nothing = json!({"new": 0, "again": 0, "copies": 0, "unreadable": 0, "left": 0});
    assert_eq!(place.json(&["dead-letters", "collect"]).await, nothing);
    // A worker that leaves the dead letters where they are, beside it.
    let worker = place.ready_worker(&[LEAVE_DEAD_LETTERS]).await;
    let letters: Vec<Message> = (0..250).map(junk).collect();
    place.publish(&letters).await;
    until("they are in the queue", PATIENCE, async || {
        (place.line().depth("settlement.dead").await == 250).then_some(())
    })
    .await;
    assert_eq!(count(&place, "SELECT count(*) FROM settled.dead_letters").await, 0);
    let mut done = nothing.clone();
    done["new"] = json!(250);
    assert_eq!(place.json(&["dead-letters", "collect"]).await, done);
    rows(&place, 250).await;
    // The same failures again, as after a crash of their publisher.
    let copy = place.dead.seen().into_iter().next().expect("a dead letter");
    let copy = Message {
        exchange: "settlement.dead".to_owned(),
        routing_key: copy.routing_key,
        body: copy.body,
        properties: copy.properties,
        expect: Expect::Any,
    };
    place.line().publish(&[copy]).await;
    let output = place.run(&["dead-letters", "collect"]).await;
    let text = said(&output);
    assert!(
        output.status.success() && text.contains("0 new, 0 failed again, 1 copies"),
        "{text}"
    );
    assert_eq!(place.json(&["dead-letters", "collect"]).await, nothing);
    nothing_left(&place, worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_collects_until_it_is_stopped() {
    let (place, _) = with_partner("follow", "1000000").await;
    let mut command = place.command(&["dead-letters", "collect", "--follow", "--json"]);
    command.stdout(std::process::Stdio::piped());
    let child = command.spawn().expect("settled starts");
    let id = child.id().expect("a process");
    let to_dead = |number: usize| Message {
        exchange: "settlement.dead".to_owned(),
        ..junk(number)
    };
    for number in 0..3 {
        place.line().publish(&[to_dead(number)]).await;
        rows(&place, i64::try_from(number).expect("few") + 1).await;
    }
    let killed = std::process::Command::new("kill").arg(id.to_string()).status();
    assert!(killed.expect("kill runs").success());
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
        .await
        .expect("it ends");
    let output = output.expect("an end");
    assert!(output.status.success(), "{}", said(&output));
    let done: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(done["new"], 3, "{done}");
    assert_eq!(place.line().depth("settlement.dead").await, 0);
}

/// A second signal, or the end of `worker.drain_deadline`, ends it, whatever is in the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_that_is_held_up_can_be_stopped() {
    let (place, _) = with_partner("held_up", "1000000").await;
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                  $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '42501'; END $$;
                  CREATE TRIGGER refuse BEFORE INSERT ON settled.dead_letters FOR EACH ROW EXECUTE FUNCTION refuse()";
    place.db().await.batch_execute(refuse).await.expect("a trigger");
    let letter = Message {
        exchange: "settlement.dead".to_owned(),
        ..junk(1)
    };
    place.line().publish(&[letter]).await;
    for (deadline, again) in [("200ms", false), ("1h", true)] {
        until("it is in the queue", PATIENCE, async || {
            (place.line().depth("settlement.dead").await == 1).then_some(())
        })
        .await;
        let mut command = place.command(&["dead-letters", "collect", "--follow"]);
        command
            .env("SETTLED_WORKER__PAUSE_RELEASE", "1h")
            .env("SETTLED_WORKER__DRAIN_DEADLINE", deadline);
        let mut child = command.spawn().expect("settled starts");
        until("it has the dead letter in hand", PATIENCE, async || {
            (place.line().depth("settlement.dead").await == 0).then_some(())
        })
        .await;
        let id = child.id().expect("a process").to_string();
        let signal = || {
            let sent = std::process::Command::new("kill").arg(&id).status();
            assert!(sent.expect("kill runs").success());
        };
        signal();
        let status = until("it ends", PATIENCE, async || {
            let ended = child.try_wait().expect("a child");
            if again && ended.is_none() {
                signal();
            }
            ended
        })
        .await;
        assert_eq!(status.code(), Some(3), "not everything was collected");
    }
    assert_eq!(count(&place, "SELECT count(*) FROM settled.dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collecting_without_a_database_or_a_broker_says_so() {
    let (place, _) = with_partner("nowhere", "1000000").await;
    for (name, value) in [
        ("--database-url", "postgres://nobody@127.0.0.1:1/x"),
        ("--broker-url", "amqp://nobody:x@127.0.0.1:1/x"),
    ] {
        let output = place.run(&["dead-letters", "collect", name, value]).await;
        assert_eq!(output.status.code(), Some(69), "{}", said(&output));
    }
}

// Gauges --------------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_an_operator_is_measured() {
    let (place, _) = with_partner("measured", "1000000").await;
    let worker = place.ready_worker(&[]).await;
    place.publish(&(0..5).map(junk).collect::<Vec<_>>()).await;
    rows(&place, 5).await;
    until("nothing lags", PATIENCE, async || {
        (metric(&worker, "settled_collector_lag_seconds").await == 0.0).then_some(())
    })
    .await;
    nothing_left(&place, worker).await;
    let db = place.db().await;
    place
        .tamper("UPDATE settled.dead_letters SET collected_at = collected_at - interval '1 hour' WHERE seq = 1")
        .await;
    let sql = "UPDATE settled.dead_letters SET state = 'settled' WHERE seq = 5;
               INSERT INTO settled.plans (at, operator, filters, messages) VALUES (now(), 'x', '{}', 0);
               INSERT INTO settled.runs (plan_id, state, operator, why, all_verdicts, started_at, changed_at)
               SELECT id, 'running', 'x', 'x', false, now(), now() FROM settled.plans";
    db.batch_execute(sql).await.expect("some history");
    // Measured at once, and then every half minute.
    let worker = place.ready_worker(&[]).await;
    until("it is measured", PATIENCE, async || {
        let open = "settled_dead_letters_open{reason=\"malformed_message\"}";
        (metric(&worker, open).await == 4.0).then_some(())
    })
    .await;
    let oldest = metric(&worker, "settled_dead_letters_oldest_seconds").await;
    assert!(
        (3_600.0..3_600.0 + PATIENCE.as_secs_f64()).contains(&oldest),
        "{oldest}"
    );
    assert_eq!(metric(&worker, "settled_replay_runs{state=\"running\"}").await, 1.0);
    assert_eq!(metric(&worker, "settled_replay_runs{state=\"done\"}").await, 0.0);
    let answer = place.json(&["doctor"]).await;
    let line = answer["checks"]
        .as_array()
        .expect("lines")
        .iter()
        .find(|line| line["name"] == "open_dead_letters");
    let line = line.expect("a line");
    assert!(
        line["detail"].as_str().is_some_and(|detail| detail.ends_with(": 4")),
        "{line}"
    );
}

//! One worker and everything that a partner, a subscriber or an operator may put before it.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::kit::{
    amqp::{Message, Seen},
    auditor::{Expect, Reservation},
    partner::{Partner, new_key, sign},
    support::{Ground, LEAVE_DEAD_LETTERS, PATIENCE, Place, said, until, with_partner},
    traffic,
};

/// The same with reserved allocations of one satoshi each.
async fn with_reserved(test: &str, count: usize) -> (Place, Partner, Vec<Reservation>) {
    let (place, partner) = with_partner(test, "1000000000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

fn event(seen: &Seen) -> Value {
    serde_json::from_slice(&seen.body).expect("an event is JSON")
}

/// The events about an allocation, in the order they came.
fn events_of(place: &Place, id: Uuid) -> Vec<Value> {
    let events = place.events.seen().iter().map(event).collect::<Vec<_>>();
    events
        .into_iter()
        .filter(|event| event["subject"] == json!(id))
        .collect()
}

async fn count(place: &Place, sql: &str) -> i64 {
    place.db().await.query_one(sql, &[]).await.expect(sql).get(0)
}

/// A number from `/metrics`.
async fn metric(worker: &crate::kit::support::Worker, name: &str) -> f64 {
    let (status, text) = worker.get("/metrics").await.expect("metrics");
    assert_eq!(status, 200);
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {text}"))
        .parse()
        .expect("a number")
}

// The same again -----------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_message_fifty_times_moves_money_once() {
    let (place, partner, reservations) = with_reserved("fifty", 1).await;
    let message = partner.cleared(&reservations[0]);
    place.publish(&vec![message.clone(); 20]).await;
    let worker = place.ready_worker(&[]).await;
    place.publish(&vec![message.clone(); 20]).await;
    place.rest().await;
    // Long after it is settled, too.
    place.publish(&vec![message; 10]).await;
    until("all fifty are judged", PATIENCE, async || {
        (count(&place, "SELECT sum(received)::bigint FROM settled.batches").await == 50).then_some(())
    })
    .await;
    place.settle_up(worker).await;
    assert_eq!(
        count(&place, "SELECT sum(settled)::bigint FROM settled.batches").await,
        1
    );
    assert_eq!(
        count(&place, "SELECT sum(duplicate)::bigint FROM settled.batches").await,
        49
    );
    let seen = place.events.seen();
    let ids: BTreeSet<_> = seen.iter().map(|seen| seen.message_id().map(str::to_owned)).collect();
    let bodies: BTreeSet<_> = seen.iter().map(|seen| &seen.body).collect();
    assert_eq!((ids.len(), bodies.len()), (1, 1), "one id, the same bytes");
    assert!(place.dead.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nonce_of_another_message_is_refused() {
    let (place, partner, reservations) = with_reserved("nonce", 2).await;
    let other = Partner::new("beta");
    place.register(&other).await;
    place.deposit(&other, "BTC", "1").await;
    let theirs = other.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&theirs)).await;

    let worker = place.ready_worker(&[]).await;
    let first = partner
        .draft(&reservations[0], "cleared")
        .set("nonce", "once and for ever");
    let first = first.message(Expect::Settles);
    place.publish(std::slice::from_ref(&first)).await;
    place.rest().await;
    let again = partner
        .draft(&reservations[1], "cleared")
        .set("nonce", "once and for ever");
    let again = again.message(Expect::Refused("nonce_reused"));
    // Another partner's nonces are its own.
    let same = other
        .draft(&theirs, "cleared")
        .set("nonce", "once and for ever")
        .message(Expect::Settles);
    place.publish(&[again.clone(), same, first]).await;
    place.rest().await;
    let receipt = place
        .json(&["receipt", "--enterprise-id", "acme", "--nonce", "once and for ever"])
        .await;
    assert_eq!(receipt["verdict"], "settled");
    assert_eq!(receipt["allocationId"], json!(reservations[0].id));
    place.settle_up(worker).await;
    let show = place
        .json(&["allocation", "show", &reservations[1].id.to_string()])
        .await;
    assert_eq!(show["allocation"]["status"], "reserved");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cleared_and_released_in_one_batch() {
    let (place, partner, reservations) = with_reserved("both", 40).await;
    let messages: Vec<Message> = reservations
        .iter()
        .enumerate()
        .flat_map(|(number, reservation)| {
            let statuses = if number % 2 == 0 {
                ["cleared", "released"]
            } else {
                ["released", "cleared"]
            };
            let [first, second] = statuses.map(|status| partner.draft(reservation, status));
            [
                first.message(Expect::Settles),
                second.message(Expect::Refused("already_settled")),
            ]
        })
        .collect();
    place.publish(&messages).await;
    // One lane keeps their order, and they wait already: whole batches of them.
    let worker = place.ready_worker(&[("SETTLED_WORKER__LANES", "1")]).await;
    place.settle_up(worker).await;
    let together = "SELECT count(*) FROM settled.batches WHERE settled > 1 AND rejected > 1";
    assert!(count(&place, together).await >= 1, "no batch held both");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_race_for_the_same_allocations() {
    let (place, partner, reservations) = with_reserved("race", 60).await;
    let settings = [("SETTLED_WORKER__PREFETCH", "4"), ("SETTLED_WORKER__BATCH_MAX", "4")];
    let one = place.ready_worker(&settings).await;
    let other = place.ready_worker(&settings).await;
    let mut messages = Vec::new();
    for reservation in &reservations {
        let (cleared, released) = (partner.cleared(reservation), partner.released(reservation));
        messages.extend([cleared.clone(), released.clone(), cleared, released]);
    }
    place.publish(&messages).await;
    until("all are judged", PATIENCE, async || {
        (count(&place, "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches").await >= 240).then_some(())
    })
    .await;
    place.rest().await;
    assert_eq!(other.terminate().await.code(), Some(0));
    place.settle_up(one).await;
    let workers = "SELECT count(DISTINCT worker) FROM settled.batches";
    assert_eq!(count(&place, workers).await, 2, "both took part");
    let settled = "SELECT sum(settled)::bigint FROM settled.batches";
    assert_eq!(count(&place, settled).await, 60);
}

/// Money that moved is never called rejected, whatever the registry says now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_settled_is_a_duplicate_for_ever() {
    let (place, partner, reservations) = with_reserved("for_ever", 3).await;
    let worker = place.ready_worker(&[]).await;
    let message = partner.cleared(&reservations[0]);
    place.publish(std::slice::from_ref(&message)).await;
    place.rest().await;

    let run = async |arguments: &[&str]| {
        let output = place.run(arguments).await;
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    };
    run(&["partner", "suspend", "--enterprise-id", "acme"]).await;
    let refused = partner
        .draft(&reservations[1], "cleared")
        .message(Expect::Refused("partner_inactive"));
    place.publish(&[message.clone(), refused]).await;
    place.rest().await;
    run(&["partner", "resume", "--enterprise-id", "acme"]).await;
    run(&[
        "key",
        "revoke",
        "--enterprise-id",
        "acme",
        "--public-key",
        &partner.public_key(),
    ])
    .await;
    let refused = partner
        .draft(&reservations[1], "cleared")
        .message(Expect::Refused("signature_mismatch"));
    place.publish(&[message.clone(), refused]).await;
    place.rest().await;
    // A new key speaks for the same partner; the old one's word still stands.
    let renewed = Partner {
        key: new_key(),
        ..partner.clone()
    };
    place.add_key(&renewed).await;
    let released = renewed
        .draft(&reservations[0], "released")
        .message(Expect::Refused("already_settled"));
    place
        .publish(&[message, renewed.cleared(&reservations[2]), released])
        .await;
    place.settle_up(worker).await;
    assert_eq!(
        count(&place, "SELECT sum(duplicate)::bigint FROM settled.batches").await,
        3
    );
}

// Parking ------------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allocation_reserved_two_seconds_later_settles_within_a_second() {
    let (place, partner) = with_partner("later", "1000000000000").await;
    let worker = place.ready_worker(&[]).await;
    let began = Instant::now();
    let reservation = partner.allocation("BTC", "5");
    let message = partner.cleared(&reservation);
    place.publish(std::slice::from_ref(&message)).await;
    place
        .events
        .wait("it is told that it waits", |seen| {
            seen.routing_key == "update.parked.acme"
        })
        .await;
    // The same bytes while parked change nothing and are told to nobody.
    place.publish(&vec![message; 3]).await;
    tokio::time::sleep(Duration::from_secs(2).saturating_sub(began.elapsed())).await;
    place.reserve(std::slice::from_ref(&reservation)).await;
    place.settle_up(worker).await;

    let told = events_of(&place, reservation.id);
    let types: Vec<&str> = told.iter().filter_map(|event| event["type"].as_str()).collect();
    assert_eq!(types, ["update.parked", "allocation.cleared"]);
    let data = &told[0]["data"];
    assert_eq!(
        (&data["reason"], &data["class"], &data["final"]),
        (&json!("allocation_not_found"), &json!(404), &json!(false))
    );
    assert!(data["parkedUntil"].is_string(), "{data}");
    let took = "SELECT extract(epoch FROM updated_at - created_at)::float8 FROM settled.allocations";
    let took: f64 = place
        .db()
        .await
        .query_one(took, &[])
        .await
        .expect("an allocation")
        .get(0);
    assert!(took < 1.0, "it took {took} s from the reservation to the settlement");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_waited_too_long_is_rejected() {
    let (place, partner) = with_partner("too_long", "1000000000000").await;
    let worker = place
        .ready_worker(&[("SETTLED_PARK__DEADLINE", "1s"), ("SETTLED_PARK__FIRST_RETRY", "100ms")])
        .await;
    let reservation = partner.allocation("BTC", "5");
    let message = partner
        .draft(&reservation, "cleared")
        .message(Expect::Refused("allocation_not_found"));
    place.publish(std::slice::from_ref(&message)).await;
    place.rest().await;
    until("it is rejected", PATIENCE, async || {
        (!place.dead.seen().is_empty()).then_some(())
    })
    .await;
    place.rest().await;
    let told = events_of(&place, reservation.id);
    let types: Vec<&str> = told.iter().filter_map(|event| event["type"].as_str()).collect();
    assert_eq!(types, ["update.parked", "update.rejected"]);
    assert_eq!(told[1]["data"]["final"], false);
    let nonce = told[1]["data"]["nonce"].as_str().expect("the nonce");
    let receipt = place
        .json(&["receipt", "--enterprise-id", "acme", "--nonce", nonce])
        .await;
    assert_eq!(
        (&receipt["verdict"], &receipt["reason"]),
        (&json!("rejected"), &json!("allocation_not_found"))
    );
    assert_eq!(worker.terminate().await.code(), Some(0));
    place.audit().await;

    // It was not the last word: the same bytes settle once the allocation is there.
    place.reserve(std::slice::from_ref(&reservation)).await;
    let worker = place.ready_worker(&[]).await;
    place.publish(&[message]).await;
    place
        .events
        .wait("it settles", |seen| seen.routing_key == "allocation.cleared.acme")
        .await;
    let receipt = place
        .json(&["receipt", "--enterprise-id", "acme", "--nonce", nonce])
        .await;
    assert_eq!(receipt["verdict"], "settled");
    assert_eq!(worker.terminate().await.code(), Some(0));
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_parks_so_many_and_no_more() {
    let (place, partner) = with_partner("so_many", "1000000000000").await;
    let worker = place
        .ready_worker(&[("SETTLED_PARK__MAX_PER_PARTNER", "3"), ("SETTLED_WORKER__LANES", "1")])
        .await;
    let draft = || partner.draft(&partner.allocation("BTC", "5"), "cleared");
    for _ in 0..3 {
        place.publish(&[draft().message(Expect::Waits)]).await;
        place.rest().await;
    }
    place
        .publish(&[draft().message(Expect::Refused("allocation_not_found"))])
        .await;
    place.settle_up(worker).await;
}

/// Judged as it came, from its properties to its body: a partner that is bound to a broker user is still known by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_keeps_its_properties() {
    let place = Place::new("waits").await;
    let user = crate::kit::support::userinfo(&place.broker_url).0.to_owned();
    let partner = Partner::new("acme");
    place.register_with(&partner, &["--broker-user", &user]).await;
    place.deposit(&partner, "BTC", "10").await;
    let reservation = partner.allocation("BTC", "5");
    let message = partner.cleared(&reservation);
    let message = message.with(|properties| {
        properties
            .with_user_id(user.as_str().into())
            .with_reply_to("settlement.reply.acme.inbox".into())
            .with_correlation_id("c-1".into())
    });
    place.line().declare("settlement.reply.acme.inbox").await;
    let worker = place.ready_worker(&[]).await;
    place.publish(&[message]).await;
    for kind in ["update.parked", "allocation.cleared"] {
        let reply = place.line().get("settlement.reply.acme.inbox").await;
        assert_eq!(event(&reply)["type"], kind);
        let id = reply
            .properties
            .correlation_id()
            .as_ref()
            .map(|id| id.as_str().to_owned());
        assert_eq!(id.as_deref(), Some("c-1"));
        if kind == "update.parked" {
            place.reserve(std::slice::from_ref(&reservation)).await;
        }
    }
    place.settle_up(worker).await;
}

/// However many count at the same moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_lanes_park_no_more_than_one_would() {
    let (place, partner) = with_partner("so_many_at_once", "1000000000000").await;
    let draft = || partner.draft(&partner.allocation("BTC", "5"), "cleared");
    let messages: Vec<Message> = (0..200).map(|_| draft().message(Expect::Any)).collect();
    place.publish(&messages).await;
    let settings = [
        ("SETTLED_PARK__MAX_PER_PARTNER", "5"),
        ("SETTLED_WORKER__LANES", "4"),
        ("SETTLED_WORKER__PREFETCH", "4"),
    ];
    let (one, other) = (place.worker(&settings), place.worker(&settings));
    place.rest().await;
    let db = place.db().await;
    let row = db.query_one("SELECT count(*) FROM settled.parked", &[]).await;
    let parked: i64 = row.expect("parked").get(0);
    assert_eq!(parked, 5);
    one.ready().await;
    assert_eq!(one.terminate().await.code(), Some(0));
    place.settle_up(other).await;
}

// What may be said ---------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_quantity_ten_times() {
    const MOST: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
    let place = Place::new("largest").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    for _ in 0..10 {
        place.deposit(&partner, "ETH", MOST).await;
    }
    let reservations: Vec<Reservation> = (0..10).map(|_| partner.allocation("ETH", MOST)).collect();
    place.reserve(&reservations).await;
    let messages: Vec<Message> = reservations
        .iter()
        .enumerate()
        .map(|(number, reservation)| {
            if number < 7 {
                partner.cleared(reservation)
            } else {
                partner.released(reservation)
            }
        })
        .collect();
    place.publish(&messages).await;
    let worker = place.ready_worker(&[]).await;
    place.rest().await;
    let back = partner.deallocation("ETH", MOST);
    place.reserve(std::slice::from_ref(&back)).await;
    // One more is no quantity.
    let more = "115792089237316195423570985008687907853269984665640564039457584007913129639936";
    let amount = json!({"currency": "ETH", "quantity": more});
    let above = partner
        .draft(&back, "cleared")
        .set("amount", amount)
        .message(Expect::Refused("invalid_field"));
    place.publish(&[partner.cleared(&back), above]).await;
    place.settle_up(worker).await;
    let balances = place.json(&["ledger", "balances"]).await;
    let external = balances
        .as_array()
        .expect("a list")
        .iter()
        .find(|balance| balance["account"] == "external");
    let most: num_bigint::BigInt = format!("-{MOST}").parse().expect("a number");
    let ten: num_bigint::BigInt = most * 10;
    assert_eq!(external.expect("an account")["balance"], json!(ten.to_string()));
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reject_reasons_of_every_script() {
    let reasons = [
        "余额不足，请稍后再试".to_owned(),
        "لا توجد أموال كافية \u{202e}كافية".to_owned(),
        "🪙💸 \u{1f469}\u{200d}\u{1f4bb} e\u{301}".to_owned(),
        "quotes \" and \\ and / and \u{8}\u{c}\n\r\t\u{1}\u{7f}\u{2028}\u{2029}".to_owned(),
        "{\"status\":\"cleared\",\"amount\":{\"quantity\":\"1\"}}".to_owned(),
        "'; DROP TABLE settled.allocations; --".to_owned(),
        "\u{10ffff}\u{fffd}\u{feff}".to_owned(),
        "é".repeat(8192),
    ];
    let (place, partner, reservations) = with_reserved("scripts", reasons.len() + 3).await;
    let (spare, reservations) = reservations.split_at(3);
    let mut messages: Vec<Message> = reasons
        .iter()
        .zip(reservations)
        .map(|(reason, reservation)| {
            partner
                .draft(reservation, "released")
                .set("rejectReason", reason.as_str())
                .message(Expect::Settles)
        })
        .collect();
    let draft = |reservation: &Reservation| partner.draft(reservation, "released");
    // Every character escaped in the signed text and written plainly in the body: equal by code points.
    let escaped = draft(&spare[0]).set("rejectReason", "余 🪙");
    let payload = escaped.fields.text().replace("余 🪙", r"\u4f59\u0020\ud83e\uDE99");
    messages.push(escaped.message_with(&payload, Expect::Settles));
    let long = draft(&spare[1]).set("rejectReason", "é".repeat(8192) + "x");
    messages.push(long.message(Expect::Refused("invalid_field")));
    let null = draft(&spare[1]).set("rejectReason", "a\0b");
    messages.push(null.message(Expect::Refused("invalid_field")));
    let lone = draft(&spare[1])
        .set("rejectReason", "lone")
        .message(Expect::Refused("malformed_message"));
    let body = String::from_utf8(lone.body.clone())
        .expect("text")
        .replacen("\"lone\"", r#""\ud83e""#, 1);
    messages.push(Message {
        body: body.into_bytes(),
        ..lone
    });
    place.publish(&messages).await;
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
    let db = place.db().await;
    for (reason, reservation) in reasons.iter().zip(reservations) {
        let row = db
            .query_one(
                "SELECT reason FROM settled.allocations WHERE id = $1",
                &[&reservation.id],
            )
            .await;
        assert_eq!(row.expect("an allocation").get::<_, &str>(0), reason);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partner_writes_json_as_it_likes() {
    let (place, partner, reservations) = with_reserved("json", 8).await;
    let draft = |number: usize| partner.draft(&reservations[number], "cleared");
    let mut messages = Vec::new();
    // Another order, and white space everywhere.
    let mut reversed = draft(0).fields;
    reversed.0.reverse();
    messages.push(
        draft(0)
            .set("nonce", reversed.get("nonce").clone())
            .message_with(&reversed.text(), Expect::Settles),
    );
    let spaced = draft(1);
    let payload = spaced.fields.text().replace(':', " :\t").replace(',', " ,\r\n ");
    messages.push(spaced.message_with(&format!("\n {payload}\t "), Expect::Settles));
    // Upper-case UUIDs in the body only, an address in the payload only, a policy in both, one in the body only.
    let upper = draft(2);
    let payload = upper.fields.text();
    let id = reservations[2].id.to_string().to_uppercase();
    messages.push(upper.set("allocationId", id).message_with(&payload, Expect::Settles));
    let addressed = draft(3);
    let payload = addressed.clone().set("enterpriseId", "acme").fields.text();
    messages.push(addressed.message_with(&payload, Expect::Settles));
    messages.push(
        draft(4)
            .set("policyResult", "APPROVED")
            .set("evaluationId", "e-1")
            .message(Expect::Settles),
    );
    let unsigned = draft(5);
    let payload = unsigned.fields.text();
    messages.push(
        unsigned
            .set("pendingApprovalId", "p-1")
            .message_with(&payload, Expect::Settles),
    );
    // Unknown fields, whatever they hold, as long as what is signed of them is equal.
    let unknown = json!({"deep": [1, 2.50, null, {"x": "y"}]});
    messages.push(draft(6).set("unknown", unknown).message(Expect::Settles));

    // Each key twice, also where only unescaping shows it.
    let twice = draft(7);
    let payload = twice.fields.text();
    let signed = |payload: &str, expect| twice.message_with(payload, expect);
    let doubled = [r#"{"nonce":"x","#, r#"{"\u006eonce":"x","#].map(|start| payload.replacen('{', start, 1));
    for doubled in doubled {
        messages.push(signed(&doubled, Expect::Refused("payload_mismatch")));
    }
    let good = signed(&payload, Expect::Refused("malformed_message"));
    let body = String::from_utf8(good.body.clone()).expect("text");
    for start in [
        r#"{"nonce":"x","#,
        r#"{"\u006eonce":"x","#,
        r#"{"z":{"a":1,"\u0061":2},"#,
    ] {
        let body = body.replacen('{', start, 1).into_bytes();
        messages.push(Message { body, ..good.clone() });
    }
    let bytes = good.body.as_slice();
    for body in [
        [b"\xef\xbb\xbf", bytes].concat(),
        [bytes, b"\xff"].concat(),
        [bytes, b"{}"].concat(),
    ] {
        messages.push(Message { body, ..good.clone() });
    }
    let deep = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
    let body = body.replacen('{', &format!("{{\"z\":{},", deep(16)), 1).into_bytes();
    messages.push(Message { body, ..good });
    place.publish(&messages).await;
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
    let shown = place
        .json(&["allocation", "show", &reservations[4].id.to_string()])
        .await;
    assert_eq!(shown["allocation"]["policyResult"], "approved");
    assert_eq!(shown["allocation"]["evaluationId"], "e-1");
    let shown = place
        .json(&["allocation", "show", &reservations[5].id.to_string()])
        .await;
    assert_eq!(shown["allocation"]["pendingApprovalId"], "p-1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_large_is_dead_lettered_with_its_head() {
    let (place, partner, reservations) = with_reserved("large", 3).await;
    let of_size = |reservation: &Reservation, size: usize, expect| {
        let message = partner.draft(reservation, "cleared").message(expect);
        let start = format!("{{\"ignored\":\"{}\",", "x".repeat(size - message.body.len() - 13));
        let body = String::from_utf8(message.body.clone())
            .expect("text")
            .replacen('{', &start, 1);
        assert_eq!(body.len(), size);
        Message {
            body: body.into_bytes(),
            ..message
        }
    };
    let largest = of_size(&reservations[0], 262_144, Expect::Settles);
    let above = of_size(&reservations[1], 262_145, Expect::Refused("message_too_large"));
    let mut headers = lapin::types::FieldTable::default();
    headers.insert(
        "x-much".into(),
        lapin::types::AMQPValue::LongString("y".repeat(17_000).into()),
    );
    let heavy = partner
        .draft(&reservations[2], "cleared")
        .message(Expect::Refused("message_too_large"));
    let heavy = heavy.with(|properties| properties.with_headers(headers));
    // Innocents beside them in the same batches.
    let innocent = partner.cleared(&reservations[1]);
    place
        .publish(&[above.clone(), largest, innocent, heavy.clone(), above.clone()])
        .await;
    let worker = place.ready_worker(&[]).await;
    until("all are judged", PATIENCE, async || {
        (count(&place, "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches").await == 5).then_some(())
    })
    .await;
    place.settle_up(worker).await;
    let dead = place.dead.seen();
    assert_eq!(dead.len(), 3, "one each, and all of them ours");
    for seen in &dead {
        assert_eq!(seen.death(), None, "the broker dead-letters nothing for us");
        assert_eq!(seen.text("settled-reason").as_deref(), Some("message_too_large"));
        assert_eq!(seen.routing_key, "acme.allocation.update");
        let sent = if seen.body == heavy.body { &heavy } else { &above };
        let digest = hex::encode(crate::kit::auditor::sha256(&sent.body));
        assert_eq!(seen.text("settled-digest"), Some(digest), "of the whole body");
        let length = i64::try_from(sent.body.len()).expect("small");
        assert_eq!(
            seen.header("settled-body-length"),
            Some(&lapin::types::AMQPValue::LongLongInt(length))
        );
        assert_eq!(seen.body, sent.body[..sent.body.len().min(4_096)]);
        assert_eq!(seen.header("x-much"), None);
    }
}

/// Whatever a message is refused for, a copy of it that is stored stands for all of it: what is too large stays what it is,
/// although the head that is kept would be small enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_head_of_what_was_too_large_never_settles() {
    let (place, partner, reservations) = with_reserved("head", 2).await;
    let mut headers = lapin::types::FieldTable::default();
    headers.insert(
        "x-much".into(),
        lapin::types::AMQPValue::LongString("y".repeat(17_000).into()),
    );
    // Valid in every byte of its body.
    let heavy = partner
        .draft(&reservations[0], "cleared")
        .message(Expect::Refused("message_too_large"))
        .with(|properties| properties.with_headers(headers));
    let large = partner
        .draft(&reservations[1], "cleared")
        .message(Expect::Refused("message_too_large"));
    let padded = format!("{{\"ignored\":\"{}\",", "x".repeat(15 << 20));
    let body = String::from_utf8(large.body.clone())
        .expect("text")
        .replacen('{', &padded, 1);
    let large = Message {
        body: body.into_bytes(),
        ..large
    };
    place.publish(&[heavy.clone(), large.clone()]).await;
    let worker = place.ready_worker(&[("SETTLED_DEAD_LETTERS__COLLECT", "true")]).await;
    until("both are stored", PATIENCE, async || {
        (count(&place, "SELECT count(*) FROM settled.dead_letters").await == 2).then_some(())
    })
    .await;
    for (message, kept) in [(&heavy, None), (&large, Some(4_096))] {
        let digest = hex::encode(crate::kit::auditor::sha256(&message.body));
        let shown = place.json(&["dead-letters", "show", &digest, "--body"]).await;
        let row = &shown["deadLetter"];
        assert_eq!(row["reason"], "message_too_large", "{row}");
        assert_eq!((&row["madeBy"], &row["final"]), (&json!("settled"), &json!(true)));
        assert_eq!(
            (&row["messageDigest"], &row["bodyBytes"]),
            (&json!(digest), &json!(message.body.len()))
        );
        let head = &message.body[..message.body.len().min(4_096)];
        assert_eq!(row["bodyBytesKept"], json!(kept.unwrap_or(message.body.len())));
        assert_eq!(shown["body"], json!(std::str::from_utf8(head).expect("text")));
        let id = auditor_event(message, &digest);
        assert_eq!(shown["told"]["eventId"], json!(id));
        assert!(
            place
                .events
                .seen()
                .iter()
                .any(|seen| seen.message_id() == Some(id.as_str()))
        );
    }
    let exported = place.run(&["dead-letters", "export", "--state", "all"]).await;
    let lines = String::from_utf8(exported.stdout).expect("text");
    assert_eq!(lines.lines().count(), 2);
    assert!(lines.len() < 50_000, "no whole body: {} bytes", lines.len());
    let plan = place.json(&["dead-letters", "plan"]).await;
    assert_eq!(
        (&plan["messages"], &plan["wouldMove"]),
        (&json!(2), &json!([])),
        "{plan}"
    );
    let verdicts = plan["verdicts"].as_array().expect("lines");
    assert!(
        verdicts.iter().all(|line| line["reason"] == "message_too_large"),
        "{plan}"
    );
    place.settle_up(worker).await;
}

fn auditor_event(message: &Message, digest: &str) -> String {
    crate::kit::auditor::event_id(&format!(
        "update.rejected|{}|{digest}|message_too_large",
        message.routing_key
    ))
}

// Signatures ---------------------------------------------------------------------------------------------------------

const ORDER: &str = "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141";

fn scalar(hex: &str) -> num_bigint::BigUint {
    num_bigint::BigUint::parse_bytes(hex.as_bytes(), 16).expect("hex")
}

/// Whether the text alone is a signature, by the protocol's words.
fn is_well_formed(signature: &str) -> bool {
    let zero = num_bigint::BigUint::default();
    let order = scalar(ORDER);
    signature.len() == 130
        && signature.bytes().all(|byte| byte.is_ascii_hexdigit())
        && signature
            .get(..2)
            .and_then(|header| u8::from_str_radix(header, 16).ok())
            .is_some_and(|header| (31..=34).contains(&header))
        && signature.get(2..66).map(scalar).is_some_and(|r| r > zero && r < order)
        && signature
            .get(66..)
            .map(scalar)
            .is_some_and(|s| s > zero && s <= order / 2_u32)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signatures_that_are_nearly_right() {
    let (place, partner, reservations) = with_reserved("nearly", 2).await;
    let draft = partner.draft(&reservations[0], "cleared");
    let payload = draft.fields.text();
    let good = sign(&partner.key, &payload);
    let (header, r, s) = (&good[..2], &good[2..66], &good[66..]);
    let header = u8::from_str_radix(header, 16).expect("hex");
    let high = scalar(ORDER) - scalar(s);
    let der = "304402207f00ff".to_owned() + &good[8..];
    let malformed = [
        // s > n/2, with either recovery bit.
        format!("{header:02x}{r}{high:064x}"),
        format!("{:02x}{r}{high:064x}", 31 + ((header - 31) ^ 1)),
        // Headers of uncompressed keys, of segwit, and none.
        format!("{:02x}{r}{s}", header - 4),
        format!("{:02x}{r}{s}", header + 4),
        format!("{:02x}{r}{s}", header + 8),
        format!("00{r}{s}"),
        format!("{r}{s}"),
        format!("{good}00"),
        format!("{good} "),
        format!("{good}\n"),
        format!(" {good}"),
        format!("0x{good}"),
        format!("0x{}", &good[2..]),
        good[..128].to_owned(),
        format!("{}g", &good[..129]),
        format!("{header:02x}{}{s}", "0".repeat(64)),
        format!("{header:02x}{r}{}", "0".repeat(64)),
        format!("{header:02x}{ORDER}{s}"),
        format!("{header:02x}{r}{ORDER}"),
        der,
        String::new(),
    ];
    let mismatched = [
        // The other recovery bit, and those of an r that overflowed.
        format!("{:02x}{r}{s}", 31 + ((header - 31) ^ 1)),
        format!("{:02x}{r}{s}", header + 2),
        sign(&new_key(), &payload),
        sign(&partner.key, &format!("{payload} ")),
    ];
    let signed = |signature: &String, reason| draft.message_signed(&payload, signature, Expect::Refused(reason));
    let mut messages: Vec<Message> = malformed
        .iter()
        .map(|signature| signed(signature, "malformed_signature"))
        .collect();
    messages.extend(
        mismatched
            .iter()
            .map(|signature| signed(signature, "signature_mismatch")),
    );
    assert!(malformed.iter().all(|signature| !is_well_formed(signature)));
    assert!(mismatched.iter().all(|signature| is_well_formed(signature)));
    place.publish(&messages).await;
    let worker = place.ready_worker(&[]).await;
    place.rest().await;
    assert_eq!(
        count(&place, "SELECT count(*) FROM settled.receipts").await,
        0,
        "nobody was proven"
    );
    // Upper case is the same number, and the right one settles after all that.
    let upper = draft.message_signed(&payload, &good.to_uppercase(), Expect::Settles);
    place.publish(&[upper]).await;
    place.settle_up(worker).await;
}

/// A body around a signed text: its own fields where it has them, any others where it has not.
fn body_around(partner: &Partner, payload: &str, signature: &str) -> Message {
    let kind = if payload.contains("deallocationId") {
        "deallocation"
    } else {
        "allocation"
    };
    let mut reservation = partner.allocation("BTC", "1");
    reservation.kind = kind;
    let mut draft = partner.draft(&reservation, "cleared");
    if let Ok(Value::Object(members)) = serde_json::from_str(payload) {
        for (name, value) in members {
            draft.fields.set(&name, value);
        }
    }
    draft.message_signed(payload, signature, Expect::Any)
}

/// The sample of BitGo's own signatures: every one through `explain`, and every one through the broker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_vectors_are_judged_as_they_should_be() {
    let vectors: Value = serde_json::from_str(include_str!("../../data/signatures.json")).expect("JSON");
    let place = Place::new("vectors").await;
    let mut keys: Vec<(String, String)> = Vec::new();
    let mut messages = Vec::new();
    for (list, is_valid) in [("valid", true), ("invalid", false)] {
        for vector in vectors[list].as_array().expect("a list") {
            let text = |name: &str| vector[name].as_str().expect(name);
            let key = text("publicKeyHex").to_owned();
            let enterprise = match keys.iter().find(|(_, known)| *known == key) {
                Some((enterprise, _)) => enterprise.clone(),
                None => {
                    let enterprise = format!("partner{}", keys.len());
                    let add = ["partner", "add", "--enterprise-id", &enterprise, "--name", "vector"];
                    assert!(place.run(&add).await.status.success());
                    // The xpub and its key in hex are the same key.
                    let given = vector["xpub"].as_str().unwrap_or(&key);
                    let output = place
                        .run(&["key", "add", "--enterprise-id", &enterprise, "--public-key", given])
                        .await;
                    assert!(output.status.success(), "{}", said(&output));
                    place.story().keys.push((enterprise.clone(), key.clone()));
                    keys.push((enterprise.clone(), key));
                    enterprise
                }
            };
            let (payload, signature) = (text("payload"), text("signatureHex"));
            let message = body_around(&Partner::new(&enterprise), payload, signature);
            let is_whole = ["nonce", "partnersClientId", "amount"]
                .iter()
                .all(|name| payload.contains(name));
            let expect = match (is_valid, is_whole) {
                (true, true) => Expect::Waits,
                // Signed well, but it says too little.
                (true, false) => Expect::Refused("payload_mismatch"),
                (false, _) if is_well_formed(signature) => Expect::Refused("signature_mismatch"),
                (false, _) => Expect::Refused("malformed_signature"),
            };
            let note = text("note");
            let body = String::from_utf8(message.body.clone()).expect("text");
            let arguments = ["explain", "-", "--routing-key", &message.routing_key, "--json"];
            let output = place.run_with(&arguments, &body).await;
            assert!(output.status.success(), "{note}: {}", said(&output));
            let explained: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            let (verdict, reason) = match expect {
                Expect::Refused(reason) => ("rejected", reason),
                _ => ("parked", "allocation_not_found"),
            };
            assert_eq!(
                (&explained["verdict"], &explained["reason"]),
                (&json!(verdict), &json!(reason)),
                "{note}"
            );
            assert_eq!(explained["transfers"], json!([]), "{note}");
            messages.push(message.expecting(expect));
        }
    }
    assert!(messages.len() >= 24);
    assert_eq!(
        count(&place, "SELECT count(*) FROM settled.receipts").await,
        0,
        "explaining writes nothing"
    );
    place.publish(&messages).await;
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_leave_no_receipt() {
    let (place, partner, _) = with_reserved("strangers", 1).await;
    let mut made = Vec::new();
    let two = Partner::new("beta");
    place.register(&two).await;
    place.deposit(&two, "BTC", "10").await;
    let all = traffic::refused(&[partner.clone(), two], &Partner::new("nobody"), &mut made);
    place.reserve(&made).await;
    const PROVEN: [&str; 3] = ["policy_contradiction", "not_permitted", "allocation_mismatch"];
    let (proven, strange): (Vec<Message>, Vec<Message>) = all
        .into_iter()
        .partition(|message| matches!(message.expect, Expect::Refused(reason) if PROVEN.contains(&reason)));
    let worker = place.ready_worker(&[]).await;
    place.publish(&strange).await;
    place.rest().await;
    for table in ["receipts", "parked", "parkings", "settlements"] {
        let rows = count(&place, &format!("SELECT count(*) FROM settled.{table}")).await;
        assert_eq!(rows, 0, "strangers wrote to {table}");
    }
    place.publish(&proven).await;
    place.rest().await;
    let receipts = count(&place, "SELECT count(*) FROM settled.receipts").await;
    assert_eq!(receipts, proven.len() as i64, "each proven sender's message has one");
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_counts_while_it_is_valid() {
    let (place, partner, reservations) = with_reserved("validity", 3).await;
    let add = async |bounds: &[&str]| {
        let holder = Partner {
            key: new_key(),
            ..partner.clone()
        };
        let key = holder.public_key();
        let add = ["key", "add", "--enterprise-id", "acme", "--public-key", &key];
        let output = place.run(&[&add, bounds].concat()).await;
        assert!(output.status.success(), "{}", said(&output));
        holder
    };
    let (past, long_past, future) = ("2021-01-01T00:00:00Z", "2020-01-01T00:00:00Z", "2999-01-01T00:00:00Z");
    let over = add(&["--valid-from", long_past, "--valid-until", past]).await;
    let later = add(&["--valid-from", future]).await;
    let valid = add(&["--valid-from", past, "--valid-until", future]).await;
    // What the auditor takes for a key's word.
    place.story().keys.push(("acme".to_owned(), valid.public_key()));
    let mismatch = Expect::Refused("signature_mismatch");
    place
        .publish(&[
            over.draft(&reservations[0], "cleared").message(mismatch),
            later.draft(&reservations[1], "cleared").message(mismatch),
            valid.cleared(&reservations[2]),
        ])
        .await;
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

/// Another partner's key is as good as a stranger's, and another partner's routing key makes its messages not ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_speaks_only_for_itself() {
    let (place, partner, reservations) = with_reserved("for_itself", 2).await;
    let other = Partner::new("beta");
    place.register(&other).await;
    let forged = partner.draft(&reservations[0], "cleared").signed_by(other.key);
    let mut astray = partner
        .cleared(&reservations[1])
        .expecting(Expect::Refused("signature_mismatch"));
    astray.routing_key = astray.routing_key.replacen("acme", "beta", 1);
    place
        .publish(&[forged.message(Expect::Refused("signature_mismatch")), astray])
        .await;
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_bound_to_a_broker_user() {
    let place = Place::new("bound").await;
    let user = crate::kit::support::userinfo(&place.broker_url).0.to_owned();
    let (bound, elsewhere) = (Partner::new("bound"), Partner::new("elsewhere"));
    place.register_with(&bound, &["--broker-user", &user]).await;
    place
        .register_with(&elsewhere, &["--broker-user", "somebody else"])
        .await;
    for partner in [&bound, &elsewhere] {
        place.deposit(partner, "BTC", "10").await;
    }
    let (ours, theirs) = (bound.allocation("BTC", "1"), elsewhere.allocation("BTC", "1"));
    place.reserve(&[ours.clone(), theirs.clone()]).await;
    let as_user = |message: Message| message.with(|properties| properties.with_user_id(user.as_str().into()));
    let mismatch = Expect::Refused("sender_mismatch");
    place
        .publish(&[
            bound.draft(&ours, "released").message(mismatch),
            as_user(elsewhere.draft(&theirs, "cleared").message(mismatch)),
            as_user(bound.cleared(&ours)),
        ])
        .await;
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

// Dead letters and replies -------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_is_the_message_byte_for_byte() {
    use lapin::types::{AMQPValue, FieldArray, FieldTable};
    let (place, partner, reservations) = with_reserved("byte_for_byte", 1).await;
    let user = crate::kit::support::userinfo(&place.broker_url).0.to_owned();
    let text = |text: &str| AMQPValue::LongString(text.into());
    let table = |members: Vec<(&str, AMQPValue)>| {
        let mut table = FieldTable::default();
        for (name, value) in members {
            table.insert(name.into(), value);
        }
        table
    };
    let forged = table(vec![
        ("queue", text("settlement.updates")),
        ("reason", text("expired")),
        ("count", AMQPValue::LongLongInt(7)),
    ]);
    let kept = vec![
        ("x-theirs", text("kept \u{e4}")),
        ("bytes", AMQPValue::LongString(vec![0, 255, 1].into())),
        ("number", AMQPValue::LongLongInt(-7)),
        (
            "list",
            AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::Boolean(true), AMQPValue::Void])),
        ),
        (
            "table",
            AMQPValue::FieldTable(table(vec![("inner", AMQPValue::Double(0.5))])),
        ),
        (
            "traceparent",
            text("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ),
    ];
    let dropped = vec![
        ("CC", AMQPValue::FieldArray(FieldArray::from(vec![text("acme.copy")]))),
        ("settled-reason", text("forged")),
        ("settled-anything", text("forged")),
        (
            "x-death",
            AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(forged)])),
        ),
        ("x-first-death-queue", text("forged")),
        ("x-first-death-reason", text("forged")),
        ("x-last-death-queue", text("forged")),
        ("x-delivery-count", AMQPValue::LongLongInt(3)),
    ];
    let headers = table([kept.clone(), dropped].concat());
    // White space and an order that no writer of ours would make.
    let body = b" {\"nonce\" : \"x\",\r\n\t\"allocationId\":\"no\"}\n".to_vec();
    let message = Message {
        body: body.clone(),
        ..partner
            .draft(&reservations[0], "cleared")
            .message(Expect::Refused("invalid_field"))
    };
    let message = message.with(|properties| {
        properties
            .with_content_type("Application/JSON; charset=UTF-8".into())
            .with_content_encoding("identity".into())
            .with_headers(headers)
            .with_delivery_mode(1)
            .with_priority(3)
            .with_correlation_id("c-1".into())
            .with_reply_to("settlement.dead".into())
            .with_expiration("600000".into())
            .with_message_id("m-1".into())
            .with_timestamp(1_700_000_000)
            .with_type("kind".into())
            .with_user_id(user.as_str().into())
            .with_app_id("app".into())
    });
    place.publish(&[message]).await;
    let worker = place.ready_worker(&[]).await;
    place.rest().await;
    let dead = place.dead.seen();
    let [seen] = dead.as_slice() else {
        panic!("one dead letter, not {}", dead.len());
    };
    assert_eq!(seen.body, body);
    assert_eq!(seen.routing_key, "acme.allocation.update");
    let got = &seen.properties;
    let name = |value: &Option<lapin::types::ShortString>| value.as_ref().map(|value| value.as_str().to_owned());
    assert_eq!(
        [
            name(got.content_type()),
            name(got.content_encoding()),
            name(got.correlation_id()),
            name(got.reply_to()),
            name(got.message_id()),
            name(got.kind()),
            name(got.app_id()),
            name(got.expiration()),
            name(got.user_id()),
        ],
        [
            Some("Application/JSON; charset=UTF-8".to_owned()),
            Some("identity".to_owned()),
            Some("c-1".to_owned()),
            Some("settlement.dead".to_owned()),
            Some("m-1".to_owned()),
            Some("kind".to_owned()),
            Some("app".to_owned()),
            None,
            // By it the collector knows that a worker published this.
            Some(user.clone()),
        ]
    );
    assert_eq!(
        (*got.delivery_mode(), *got.priority(), *got.timestamp()),
        (Some(2), Some(3), Some(1_700_000_000))
    );
    let digest = hex::encode(crate::kit::auditor::sha256(&body));
    let mut expected = kept;
    expected.extend([
        ("settled-reason", text("invalid_field")),
        ("settled-class", AMQPValue::LongLongInt(400)),
        ("settled-final", AMQPValue::Boolean(true)),
        ("settled-digest", text(&digest)),
        ("settled-origin-exchange", text("settlement.updates")),
        ("settled-origin-routing-key", text("acme.allocation.update")),
        ("settled-origin-user-id", text(&user)),
        ("settled-origin-expiration", text("600000")),
    ]);
    for (name, value) in &expected {
        // What not everyone can carry travels as text.
        let value = match *name {
            "bytes" => &text("00ff01"),
            "table" => &AMQPValue::FieldTable(table(vec![("inner", text("0.5"))])),
            _ => value,
        };
        assert_eq!(seen.header(name), Some(value), "{name}");
    }
    assert!(seen.text("settled-origin-headers").is_some(), "and as it was beside it");
    let detail = seen.text("settled-detail").expect("a detail");
    assert!(
        detail.starts_with("allocationId: "),
        "the first field in table order, not {detail}"
    );
    let failed_at = seen.text("settled-failed-at").expect("a time");
    assert!(failed_at.ends_with('Z') && failed_at.len() == 24, "{failed_at}");
    let names: BTreeSet<String> = got
        .headers()
        .as_ref()
        .expect("headers")
        .inner()
        .keys()
        .map(|name| name.as_str().to_owned())
        .collect();
    let mut allowed: BTreeSet<String> = expected.iter().map(|(name, _)| (*name).to_owned()).collect();
    allowed.extend(["settled-detail", "settled-failed-at", "settled-origin-headers"].map(str::to_owned));
    assert_eq!(names, allowed, "and no other header");
    let told = place
        .events
        .wait("its event", |seen| seen.routing_key == "update.rejected.acme")
        .await;
    assert_eq!(
        told.text("traceparent").as_deref(),
        Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    );
    assert_eq!(event(&told)["data"]["messageId"], "m-1");
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replies_go_where_they_may() {
    use futures_util::StreamExt;
    use lapin::{options::BasicConsumeOptions, types::FieldTable};
    let (place, partner, reservations) = with_reserved("replies", 8).await;
    let worker = place.ready_worker(&[]).await;
    let named = |message: Message, name: &str, id: &str| {
        message.with(|properties| properties.with_reply_to(name.into()).with_correlation_id(id.into()))
    };
    // Direct reply-to: a consumer without a queue, on the channel that publishes.
    let channel = place.line().channel().await;
    let options = BasicConsumeOptions {
        no_local: false,
        no_ack: true,
        exclusive: false,
        nowait: false,
    };
    let consumer = channel
        .basic_consume(
            "amq.rabbitmq.reply-to".into(),
            "".into(),
            options,
            FieldTable::default(),
        )
        .await;
    let mut consumer = consumer.expect("a direct consumer");
    place
        .publish(&[named(partner.cleared(&reservations[0]), "amq.rabbitmq.reply-to", "c-0")])
        .await;
    let reply = tokio::time::timeout(PATIENCE, consumer.next())
        .await
        .expect("in time")
        .expect("a reply")
        .expect("no error");
    let reply = Seen::of(reply);
    let told = place
        .events
        .wait("its event", |seen| seen.routing_key == "allocation.cleared.acme")
        .await;
    assert_eq!(reply.body, told.body, "the same event");
    assert_eq!(reply.message_id(), told.message_id());
    assert_eq!(
        reply.properties.correlation_id().as_ref().map(|id| id.as_str()),
        Some("c-0")
    );

    let names = [
        "settlement.reply.acme.inbox",
        "settlement.reply.other.inbox",
        "settlement.reply.acmeX",
        "theirs",
    ];
    for name in names {
        place.line().declare(name).await;
    }
    let before = metric(&worker, "settled_replies_total{result=\"ignored\"}").await;
    let refused = partner
        .draft(&reservations[1], "cleared")
        .set("clientId", json!(Uuid::new_v4()));
    let refused = refused.message(Expect::Refused("allocation_mismatch"));
    let unproven = partner.draft(&reservations[2], "cleared").signed_by(new_key());
    let unproven = unproven.message(Expect::Refused("signature_mismatch"));
    place
        .publish(&[
            named(unproven, names[0], "stranger"),
            named(refused, names[0], "c-1"),
            named(partner.cleared(&reservations[3]), names[1], "c-2"),
            named(partner.cleared(&reservations[4]), names[2], "c-3"),
            named(partner.cleared(&reservations[5]), names[3], "c-4"),
            named(partner.cleared(&reservations[6]), "settlement.updates", "c-5"),
            // Nobody is there: best effort, and nothing is held up.
            named(partner.cleared(&reservations[7]), "settlement.reply.acme.nobody", "c-6"),
        ])
        .await;
    place.rest().await;
    let reply = place.line().get(names[0]).await;
    assert_eq!(event(&reply)["data"]["reason"], "allocation_mismatch");
    assert_eq!(
        reply.properties.correlation_id().as_ref().map(|id| id.as_str()),
        Some("c-1")
    );
    until("the others are counted", PATIENCE, async || {
        let now = metric(&worker, "settled_replies_total{result=\"ignored\"}").await;
        ((now - before) as i64 == 4).then_some(())
    })
    .await;
    for name in names {
        assert_eq!(
            place.line().depth(name).await,
            0,
            "{name}: strangers and other names are not answered"
        );
    }
    place.settle_up(worker).await;
}

/// An event that nobody subscribed to is done; a dead letter without a queue would be lost, so the worker stops there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_queue_events_are_done_and_dead_letters_wait() {
    let (place, partner, reservations) = with_reserved("no_queue", 3).await;
    let settings = [LEAVE_DEAD_LETTERS, ("SETTLED_RETRY__MAX", "200ms")];
    let worker = place.ready_worker(&settings).await;
    for queue in ["test.dead", "settlement.dead", "test.events"] {
        place.line().delete(queue).await;
    }
    let (settled, refused) = (
        partner.cleared(&reservations[0]),
        partner.draft(&reservations[1], "cleared").without("nonce"),
    );
    place.publish(&[settled]).await;
    until("it is published to nobody", PATIENCE, async || {
        let name = "settled_events_total{type=\"allocation.cleared\",fate=\"unrouted\"}";
        (metric(&worker, name).await >= 1.0).then_some(())
    })
    .await;
    until("its row is done", PATIENCE, async || {
        (count(&place, "SELECT count(*) FROM settled.outbox").await == 0).then_some(())
    })
    .await;
    assert!(worker.is_ready().await);

    let refused = refused.message(Expect::Any);
    place.publish(std::slice::from_ref(&refused)).await;
    let why = worker.not_ready().await;
    assert!(why.contains("settled topology"), "{why}");
    assert_eq!(
        count(&place, "SELECT count(*) FROM settled.outbox").await,
        1,
        "it is kept"
    );
    assert!(place.run(&["topology"]).await.status.success());
    worker.ready().await;
    let seen = place.line().get("settlement.dead").await;
    assert_eq!(seen.body, refused.body);
    until("its row is done", PATIENCE, async || {
        (count(&place, "SELECT count(*) FROM settled.outbox").await == 0).then_some(())
    })
    .await;
    place.line().bind("test.events", "settlement.events", "#").await;
    place.publish(&[partner.cleared(&reservations[2])]).await;
    place
        .events
        .wait("it goes on", |seen| seen.routing_key == "allocation.cleared.acme")
        .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

// Beginning and end --------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_settles_what_was_delivered_and_exits_in_order() {
    let (place, partner, reservations) = with_reserved("sigterm", 600).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    place.publish(&messages).await;
    let settings = [("SETTLED_WORKER__BATCH_MAX", "10"), ("SETTLED_WORKER__PREFETCH", "50")];
    let worker = place.worker(&settings);
    until("it is in the middle of it", PATIENCE, async || {
        (count(&place, "SELECT coalesce(sum(settled), 0)::bigint FROM settled.batches").await >= 50).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
    let received = count(&place, "SELECT sum(received)::bigint FROM settled.batches").await;
    let left = i64::from(place.line().depth("settlement.updates").await);
    assert!(left > 0, "it was meant to be stopped in the middle");
    assert_eq!(
        received + left,
        600,
        "everything that was delivered was settled and acknowledged"
    );
    assert_eq!(
        count(&place, "SELECT count(*) FROM settled.outbox").await,
        0,
        "and told"
    );
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
    let received = count(&place, "SELECT sum(received)::bigint FROM settled.batches").await;
    assert_eq!(received, 600, "nothing was judged twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waiting_cannot_mend_ends_the_worker_with_a_sentence() {
    let ends = async |ground: &Ground, sentence: &str| {
        let worker = ground.worker(&[]);
        let status = worker.end().await;
        assert_eq!(status.code(), Some(1), "{}", worker.said());
        assert!(
            worker.said().contains(sentence),
            "not {sentence:?} but {}",
            worker.said()
        );
    };
    let empty = Ground::new("no_schema").await;
    empty.create_database("template0").await;
    assert!(empty.run(&["topology"]).await.status.success());
    ends(&empty, "settled migrate").await;

    let bare = Ground::new("no_topology").await;
    bare.copy_template().await;
    ends(&bare, "settled topology").await;

    assert!(bare.run(&["topology"]).await.status.success());
    let db = bare.db().await;
    let newer = "INSERT INTO refinery_schema_history (version, name, applied_on, checksum)
                 VALUES (9999, 'later', '2030-01-01T00:00:00Z', '1')";
    db.batch_execute(newer).await.expect("a later version");
    ends(&bare, "newer").await;
    let older = "DELETE FROM refinery_schema_history";
    db.batch_execute(older).await.expect("no version");
    ends(&bare, "settled migrate").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_the_broker_cancels_comes_back() {
    let (place, partner, reservations) = with_reserved("cancelled", 2).await;
    let worker = place.ready_worker(&[("SETTLED_RETRY__MAX", "200ms")]).await;
    place.publish(&[partner.cleared(&reservations[0])]).await;
    place.rest().await;
    place.line().delete("settlement.updates").await;
    let why = worker.not_ready().await;
    assert!(why.contains("no consumer is attached"), "{why}");
    assert!(place.run(&["topology"]).await.status.success());
    worker.ready().await;
    place.publish(&[partner.cleared(&reservations[1])]).await;
    place.settle_up(worker).await;
}

// The database refuses -----------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_the_database_refuses_is_found_and_set_apart() {
    let (place, partner, reservations) = with_reserved("bisect", 60).await;
    let refuse = "ALTER TABLE settled.allocations ADD CONSTRAINT refused
                  CHECK (partner_external_id IS DISTINCT FROM 'the one that is refused')";
    place.db().await.batch_execute(refuse).await.expect("a constraint");
    let mut messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    let culprit = partner
        .draft(&reservations[33], "cleared")
        .set("partnersAllocationId", "the one that is refused");
    messages[33] = culprit.message(Expect::Refused("internal"));
    place.publish(&messages).await;
    let worker = place.ready_worker(&[]).await;
    place.rest().await;
    assert!(worker.is_ready().await, "one culprit is no reason to stop");
    assert!(metric(&worker, "settled_internal_total").await >= 1.0);
    place.settle_up(worker).await;
    let dead = place.dead.seen();
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].text("settled-reason").as_deref(), Some("internal"));
    assert_eq!(
        dead[0].header("settled-final"),
        Some(&lapin::types::AMQPValue::Boolean(false))
    );
}

/// A copy of what has settled, of which the database refuses whatever is written: its effect is there, so its event is told
/// again, and nobody hears that it was refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_copy_of_what_has_settled_is_never_called_rejected() {
    let (place, partner, reservations) = with_reserved("refused_copy", 1).await;
    let worker = place.ready_worker(&[]).await;
    let message = partner.cleared(&reservations[0]);
    place.publish(std::slice::from_ref(&message)).await;
    place.rest().await;
    let refuse = "ALTER TABLE settled.receipts ADD CONSTRAINT refused CHECK (last_seen = first_seen)";
    place.db().await.batch_execute(refuse).await.expect("a constraint");
    place.publish(std::slice::from_ref(&message)).await;
    let told = until("it is told again", PATIENCE, async || {
        let told: Vec<Seen> = place.events.seen().into_iter().flat_map(Seen::events).collect();
        (told.len() >= 2).then_some(told)
    })
    .await;
    assert_eq!(told[0].body, told[1].body);
    assert!(metric(&worker, "settled_internal_total").await >= 1.0, "it was refused");
    let mend = "ALTER TABLE settled.receipts DROP CONSTRAINT refused";
    place.db().await.batch_execute(mend).await.expect("mended");
    let sql = "SELECT sum(duplicate)::bigint, sum(rejected)::bigint FROM settled.batches";
    let row = place.db().await.query_one(sql, &[]).await.expect("batches");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1, 0));
    place.settle_up(worker).await;
    assert!(place.dead.seen().is_empty());
}

/// Several in a short time say that the fault is ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_the_database_refuses_pause_the_worker() {
    let (place, partner, reservations) = with_reserved("culprits", 8).await;
    let refuse = "ALTER TABLE settled.allocations ADD CONSTRAINT refused CHECK (status = 'reserved')";
    let db = place.db().await;
    db.batch_execute(refuse).await.expect("a constraint");
    let worker = place
        .ready_worker(&[("SETTLED_WORKER__LANES", "1"), ("SETTLED_RETRY__MAX", "200ms")])
        .await;
    // Two may be blamed; with the third it stops.
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.draft(reservation, "cleared").message(Expect::Any))
        .collect();
    place.publish(&messages).await;
    let why = worker.not_ready().await;
    assert!(why.contains("paused"), "{why}");
    db.batch_execute("ALTER TABLE settled.allocations DROP CONSTRAINT refused")
        .await
        .expect("mended");
    worker.ready().await;
    place.settle_up(worker).await;
    assert_eq!(place.dead.seen().len(), 2);
}

/// What is missing in the database is never a message's fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_table_pauses_and_nothing_is_dead_lettered() {
    let (place, partner, reservations) = with_reserved("missing_table", 40).await;
    let worker = place.ready_worker(&[("SETTLED_RETRY__MAX", "200ms")]).await;
    let (first, rest) = reservations.split_at(10);
    let cleared = |reservations: &[Reservation]| -> Vec<Message> {
        reservations
            .iter()
            .map(|reservation| partner.cleared(reservation))
            .collect()
    };
    place.publish(&cleared(first)).await;
    place.rest().await;
    let db = place.db().await;
    db.batch_execute("ALTER TABLE settled.transfers RENAME TO elsewhere")
        .await
        .expect("renamed");
    place.publish(&cleared(rest)).await;
    let why = worker.not_ready().await;
    assert!(why.contains("paused"), "{why}");
    let settled = count(
        &place,
        "SELECT count(*) FROM settled.allocations WHERE status <> 'reserved'",
    )
    .await;
    assert_eq!(settled, 10);
    db.batch_execute("ALTER TABLE settled.elsewhere RENAME TO transfers")
        .await
        .expect("mended");
    worker.ready().await;
    place.settle_up(worker).await;
    assert!(place.dead.seen().is_empty());
}

/// A role that may do everything but one thing; longer than messages are kept in hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_grant_pauses_and_nothing_is_dead_lettered() {
    let (place, partner, reservations) = with_reserved("missing_grant", 40).await;
    let role = format!("{}_role", place.name);
    let db = place.db().await;
    let grants = format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'p';
         GRANT USAGE ON SCHEMA settled TO {role};
         GRANT ALL ON ALL TABLES IN SCHEMA settled TO {role};
         GRANT ALL ON ALL SEQUENCES IN SCHEMA settled TO {role};
         GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role};"
    );
    db.batch_execute(&grants).await.expect("a role");
    let url = format!(
        "postgres://{role}:p@{}",
        place.database_url.rsplit_once('@').expect("a user").1
    );
    let settings = [
        ("SETTLED_DATABASE_URL", url.as_str()),
        ("SETTLED_RETRY__MAX", "200ms"),
        ("SETTLED_WORKER__PAUSE_RELEASE", "500ms"),
    ];
    let worker = place.ready_worker(&settings).await;
    db.batch_execute(&format!("REVOKE INSERT ON settled.transfers FROM {role}"))
        .await
        .expect("revoked");
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    place.publish(&messages).await;
    worker.not_ready().await;
    // Handed back, once, and not taken again before the database lets us do all that a batch needs.
    until("they are handed back", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 40).then_some(())
    })
    .await;
    assert!(worker.ended().is_none());
    db.batch_execute(&format!("GRANT INSERT ON settled.transfers TO {role}"))
        .await
        .expect("mended");
    worker.ready().await;
    place.settle_up(worker).await;
    assert!(place.dead.seen().is_empty());
    db.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await
        .expect("the role goes");
}

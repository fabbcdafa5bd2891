//! One partner's messages cost nobody else: floods, rates, and what somebody's open transaction has locked.

use std::time::Duration;

use settled::domain::message::BODY_MAX;
use tokio_postgres::Client;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    partner::Partner,
    support::{PATIENCE, Place, Worker, until},
};

/// Partners with funds, and so many reservations of each.
async fn partners(place: &Place, names: &[&str], count: usize) -> Vec<(Partner, Vec<Reservation>)> {
    let mut made = Vec::new();
    for name in names {
        let partner = Partner::new(name);
        place.register(&partner).await;
        place.deposit(&partner, "BTC", "1000000000").await;
        let reservations: Vec<_> = (0..count).map(|_| partner.allocation("BTC", "7")).collect();
        place.reserve(&reservations).await;
        made.push((partner, reservations));
    }
    made
}

fn cleared((partner, reservations): &(Partner, Vec<Reservation>)) -> Vec<Message> {
    let each = reservations.iter();
    each.map(|reservation| partner.cleared(reservation)).collect()
}

fn malformed(enterprise: &str, count: usize) -> Vec<Message> {
    let key = format!("{enterprise}.allocation.update");
    (0..count)
        .map(|number| Message::new(&key, format!("no JSON {number}"), Expect::Refused("malformed_message")))
        .collect()
}

async fn number(db: &Client, sql: &str) -> i64 {
    db.query_one(sql, &[]).await.expect(sql).get(0)
}

async fn settled_of(db: &Client, partner: &Partner) -> i64 {
    let sql = "SELECT count(*) FROM settled.receipts WHERE enterprise_id = $1 AND verdict = 'settled'";
    db.query_one(sql, &[&partner.enterprise]).await.expect(sql).get(0)
}

/// What came into the side room has left it, and batches have judged it.
async fn nothing_is_held(place: &Place, db: &Client) {
    assert_eq!(number(db, "SELECT count(*) FROM settled.held").await, 0);
    let sql =
        "SELECT coalesce(sum(CASE step WHEN 'held' THEN messages ELSE -messages END), 0)::bigint FROM settled.holdings";
    assert_eq!(number(db, sql).await, 0, "what was held has left");
    let sql = "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches
               WHERE id IN (SELECT batch_id FROM settled.holdings)";
    let judged = number(db, sql).await;
    let sql = "SELECT coalesce(sum(messages), 0)::bigint FROM settled.holdings WHERE step = 'left'";
    assert_eq!(judged, number(db, sql).await, "and was judged when it left");
    let found = place.json(&["reconcile", "--since", "1h"]).await;
    assert_eq!(found["ok"], true, "{found}");
}

/// A batch of sixteen has a share of four, and nobody's is one.
const SMALL: [(&str, &str); 2] = [("SETTLED_WORKER__BATCH_MAX", "16"), ("SETTLED_WORKER__LANES", "1")];

async fn held_and_more(place: &Place, worker: &Worker, db: &Client) {
    until("something is held", PATIENCE, async || {
        assert!(worker.ended().is_none(), "the worker ended: {}", worker.said());
        let sql = "SELECT count(*) FROM settled.holdings WHERE step = 'held'";
        (number(db, sql).await > 0).then_some(())
    })
    .await;
    let metrics = until("the room is measured", PATIENCE, async || {
        let (_, text) = worker.get("/metrics").await?;
        text.contains("settled_held{why=\"share\"}").then_some(text)
    })
    .await;
    assert!(!metrics.contains("settled_held_total{why=\"share\"} 0\n"), "{metrics}");
    place.rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_malformed_messages_waits_apart_and_is_judged() {
    let place = Place::new("fair_malformed").await;
    let both = partners(&place, &["acme", "beta"], 30).await;
    let (acme, beta) = (cleared(&both[0]), cleared(&both[1]));
    let worker = place.ready_worker(&SMALL).await;
    place.publish(&[&acme[..5], &beta[..5]].concat()).await;
    place.rest().await;
    let mut flood = malformed("acme", 600);
    flood.extend(malformed("no-such-partner", 200));
    for (place, message) in beta[5..].iter().enumerate() {
        flood.insert(place * 20, message.clone());
    }
    place.publish(&flood).await;
    let db = place.db().await;
    held_and_more(&place, &worker, &db).await;
    nothing_is_held(&place, &db).await;
    place.publish(&acme[5..]).await;
    place.settle_up(worker).await;
}

/// What is too large is somebody's share like everything else: its head waits apart, and its dead letter tells of the whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_too_large_messages_waits_apart_and_is_judged() {
    let place = Place::new("fair_too_large").await;
    let both = partners(&place, &["acme", "beta"], 10).await;
    let (acme, beta) = (cleared(&both[0]), cleared(&both[1]));
    let worker = place.ready_worker(&SMALL).await;
    place.publish(&[&acme[..5], &beta[..5]].concat()).await;
    place.rest().await;
    let large = |number: usize| {
        let body = format!("{number} {}", "x".repeat(BODY_MAX));
        Message::new("acme.allocation.update", body, Expect::Refused("message_too_large"))
    };
    let mut flood: Vec<Message> = (0..100).map(large).collect();
    for (place, message) in beta[5..].iter().enumerate() {
        flood.insert(place * 10, message.clone());
    }
    place.publish(&flood).await;
    let db = place.db().await;
    held_and_more(&place, &worker, &db).await;
    nothing_is_held(&place, &db).await;
    place.publish(&acme[5..]).await;
    place.settle_up(worker).await;
    let held = "SELECT coalesce(sum(messages), 0)::bigint FROM settled.holdings WHERE step = 'held'";
    assert!(number(&db, held).await > 0);
    let whole = "SELECT count(*) FROM settled.dead_letters
                 WHERE reason = 'message_too_large' AND octet_length(body) = 4096 AND body_length > 262144";
    assert_eq!(number(&db, whole).await, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_valid_messages_waits_apart_and_settles() {
    let place = Place::new("fair_valid").await;
    place.story().only_valid = true;
    let loud = partners(&place, &["acme"], 600).await;
    let still = partners(&place, &["beta"], 20).await;
    let (acme, beta) = (cleared(&loud[0]), cleared(&still[0]));
    let worker = place.ready_worker(&SMALL).await;
    place.publish(&beta[..10]).await;
    place.rest().await;
    place.publish(&acme).await;
    place.publish(&beta[10..]).await;
    let db = place.db().await;
    held_and_more(&place, &worker, &db).await;
    nothing_is_held(&place, &db).await;
    place.settle_up(worker).await;
}

/// Who is alone is never held, whatever it sends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_alone_is_judged_in_line() {
    let place = Place::new("fair_alone").await;
    let alone = partners(&place, &["acme"], 300).await;
    let worker = place.ready_worker(&SMALL).await;
    place.publish(&cleared(&alone[0])).await;
    place.rest().await;
    let db = place.db().await;
    assert_eq!(number(&db, "SELECT count(*) FROM settled.holdings").await, 0);
    place.settle_up(worker).await;
}

/// Where the room is full, what would be held is judged in line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_room_drops_nothing() {
    let place = Place::new("fair_full").await;
    let both = partners(&place, &["acme", "beta"], 10).await;
    let settings = [&SMALL[..], &[("SETTLED_HELD__MAX_MESSAGES_PER_PARTNER", "20")]].concat();
    let worker = place.ready_worker(&settings).await;
    place.publish(&cleared(&both[1])).await;
    place.publish(&malformed("acme", 500)).await;
    place.publish(&cleared(&both[0])).await;
    place.rest().await;
    nothing_is_held(&place, &place.db().await).await;
    place.settle_up(worker).await;
}

/// A room that is full is told: `/readyz`, which stays ready, the gauges, an alarm, and doctor. And when it is empty again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_room_is_told() {
    let place = Place::new("fair_told").await;
    place.story().only_valid = true;
    let both = partners(&place, &["acme"], 6).await;
    let full = ("SETTLED_HELD__MAX_MESSAGES_PER_PARTNER", "6");
    let worker = place.ready_worker(&[full]).await;
    let (custody, db) = (place.db().await, place.db().await);
    let line = both[0].0.allocation("BTC", "1").line();
    let reserve = format!("BEGIN; SELECT * FROM settled.reserve('[{line}]')");
    custody.batch_execute(&reserve).await.expect("locked");
    place.publish(&cleared(&both[0])).await;
    let readiness = until("it says that it is full", PATIENCE, async || {
        let (status, text) = worker.get("/readyz").await?;
        assert_eq!(status, 200, "settling goes on: {text}");
        let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let held = answer["held"].as_str()?;
        held.contains("is full").then(|| held.to_owned())
    })
    .await;
    assert!(readiness.starts_with("6 messages are held"), "{readiness}");
    assert!(readiness.contains("the room for acme is full"), "{readiness}");
    let (_, metrics) = worker.get("/metrics").await.expect("metrics");
    for line in ["settled_held_filled_ratio 1", "settled_held_full_alarms_total 1"] {
        assert!(metrics.lines().any(|have| have == line), "{line}: {metrics}");
    }
    let mut doctor = place.command(&["doctor", "--json"]);
    let doctor = doctor.env(full.0, full.1).output().await.expect("it runs");
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout).expect("JSON");
    let mut lines = doctor["checks"].as_array().expect("lines").iter();
    let held = lines.find(|line| line["name"] == "held").expect("a line");
    assert_eq!(held["ok"], false, "{held}");
    assert!(
        held["detail"]
            .as_str()
            .is_some_and(|text| text.contains("because of locks: 6")),
        "{held}"
    );
    custody.batch_execute("ROLLBACK").await.expect("let go");
    place.rest().await;
    until("nothing is said any more", PATIENCE, async || {
        let (_, text) = worker.get("/readyz").await?;
        (!text.contains("held")).then_some(())
    })
    .await;
    assert!(
        worker.said().contains("there is room in the side room again"),
        "{}",
        worker.said()
    );
    nothing_is_held(&place, &db).await;
    place.settle_up(worker).await;
}

/// A rate slows its partner, and loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_slows_one_partner_and_loses_nothing() {
    let place = Place::new("fair_rate").await;
    place.story().only_valid = true;
    let loud = partners(&place, &["acme"], 120).await;
    let still = partners(&place, &["beta"], 10).await;
    let worker = place.ready_worker(&[("SETTLED_WORKER__PARTNER_RATE", "20")]).await;
    let db = place.db().await;
    let began = std::time::Instant::now();
    place.publish(&cleared(&loud[0])).await;
    place.publish(&cleared(&still[0])).await;
    until("the other has settled", PATIENCE, async || {
        (settled_of(&db, &still[0].0).await == 10).then_some(())
    })
    .await;
    assert!(settled_of(&db, &loud[0].0).await < 120, "and the one has not");
    place.rest().await;
    // Twenty at once, and a hundred at twenty a second; the last of them may go ahead of its time.
    assert!(began.elapsed() >= Duration::from_secs(4), "{:?}", began.elapsed());
    nothing_is_held(&place, &db).await;
    place.settle_up(worker).await;
}

/// A custody transaction that stays open, and what it has locked: whoever needs nothing of it settles meanwhile.
async fn open_transaction(test: &str, sql: impl Fn(&Partner, &[Reservation]) -> String, waiting: i64) {
    const EACH: i64 = 20;
    let place = Place::new(test).await;
    place.story().only_valid = true;
    let both = partners(&place, &["acme", "beta"], 20).await;
    let worker = place.ready_worker(&[("SETTLED_LOG__LEVEL", "info")]).await;
    let (custody, db) = (place.db().await, place.db().await);
    custody.batch_execute("BEGIN").await.expect("begun");
    custody
        .batch_execute(&sql(&both[0].0, &both[0].1))
        .await
        .expect("locked");
    let (acme, beta) = (cleared(&both[0]), cleared(&both[1]));
    place.publish(&[&acme[..10], &beta[..10]].concat()).await;
    until("the others settle", PATIENCE, async || {
        (settled_of(&db, &both[1].0).await == 10).then_some(())
    })
    .await;
    // The second batch does not wait for the same locks anew.
    place.publish(&[&acme[10..], &beta[10..]].concat()).await;
    until("the others settle again", PATIENCE, async || {
        let all = settled_of(&db, &both[1].0).await == EACH && settled_of(&db, &both[0].0).await == EACH - waiting;
        all.then_some(())
    })
    .await;
    assert!(worker.is_ready().await, "{}", worker.said());
    until("what needs the locks is held", PATIENCE, async || {
        let sql = "SELECT coalesce(sum(messages), 0)::bigint FROM settled.held WHERE why = 'locked'";
        (number(&db, sql).await == waiting).then_some(())
    })
    .await;
    let sql = "SELECT count(*) FROM settled.receipts WHERE enterprise_id = 'acme'";
    assert_eq!(number(&db, sql).await, EACH - waiting, "no verdict");
    assert_eq!(place.line().depth("settlement.updates").await, 0);
    custody.batch_execute("ROLLBACK").await.expect("let go");
    place.rest().await;
    nothing_is_held(&place, &db).await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_reservation_holds_up_its_accounts_only() {
    let sql = |partner: &Partner, _: &[Reservation]| {
        let line = partner.allocation("BTC", "1").line();
        format!("SELECT * FROM settled.reserve('[{line}]')")
    };
    open_transaction("fair_reserve", sql, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_on_an_allocation_holds_up_its_message_only() {
    let sql = |_: &Partner, reservations: &[Reservation]| {
        let ids: Vec<String> = reservations[..3].iter().map(|one| format!("'{}'", one.id)).collect();
        format!(
            "SELECT FROM settled.allocations WHERE id IN ({}) FOR UPDATE",
            ids.join(", ")
        )
    };
    open_transaction("fair_allocation", sql, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_deposit_holds_up_nobody_who_only_clears() {
    let sql = |partner: &Partner, _: &[Reservation]| {
        format!("SELECT settled.deposit('{}', 'BTC', 5, 'open')", partner.client)
    };
    open_transaction("fair_deposit", sql, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_on_the_registry_holds_up_nobody() {
    let sql = |_: &Partner, _: &[Reservation]| {
        "SELECT FROM settled.partners FOR UPDATE; SELECT FROM settled.partner_keys FOR UPDATE;
         SELECT FROM settled.connections FOR UPDATE"
            .to_owned()
    };
    open_transaction("fair_registry", sql, 0).await;
}

/// Parked messages that a custody transaction has woken and locked wait for it, and hold up nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_message_whose_accounts_are_locked_waits_by_itself() {
    let place = Place::new("fair_parked").await;
    place.story().only_valid = true;
    let both = partners(&place, &["acme", "beta"], 10).await;
    let (partner, _) = &both[0];
    let late = partner.allocation("BTC", "7");
    let worker = place.ready_worker(&[("SETTLED_PARK__LEASE", "1s")]).await;
    let (custody, db) = (place.db().await, place.db().await);
    place.publish(&[partner.cleared(&late)]).await;
    until("it is parked", PATIENCE, async || {
        (number(&db, "SELECT count(*) FROM settled.parked").await == 1).then_some(())
    })
    .await;
    place.reserve(std::slice::from_ref(&late)).await;
    custody
        .batch_execute("BEGIN; SELECT FROM settled.funds WHERE holder = 'connection' ORDER BY id FOR NO KEY UPDATE")
        .await
        .expect("locked");
    custody.batch_execute("COMMIT").await.expect("let go");
    let line = partner.allocation("BTC", "1").line();
    let sql = format!("BEGIN; SELECT * FROM settled.reserve('[{line}]')");
    custody.batch_execute(&sql).await.expect("locked");
    place.publish(&cleared(&both[1])).await;
    until("the others settle", PATIENCE, async || {
        (settled_of(&db, &both[1].0).await == 10).then_some(())
    })
    .await;
    assert!(worker.is_ready().await, "{}", worker.said());
    custody.batch_execute("ROLLBACK").await.expect("let go");
    place.rest().await;
    place.settle_up(worker).await;
}

/// Killed at each step of the side room, everything adds up.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_step_of_the_side_room() {
    for fault in [
        "held:1:kill",
        "held_claimed:1:kill",
        "held_left:1:kill",
        "held:1:error",
        "held_left:1:error",
    ] {
        let place = Place::new("fair_killed").await;
        let both = partners(&place, &["acme", "beta"], 10).await;
        let settings = [
            &SMALL[..],
            &[
                ("SETTLED_FAULT", fault),
                ("SETTLED_HELD__LEASE", "1s"),
                ("SETTLED_RETRY__MAX", "200ms"),
            ],
        ]
        .concat();
        let worker = place.ready_worker(&settings).await;
        place.publish(&cleared(&both[1])).await;
        place.publish(&malformed("acme", 200)).await;
        place.publish(&cleared(&both[0])).await;
        let worker = if fault.ends_with("kill") {
            until("it dies", PATIENCE, async || worker.ended()).await;
            place.ready_worker(&[("SETTLED_HELD__LEASE", "1s")]).await
        } else {
            until("it fails", PATIENCE, async || {
                worker.said().contains(fault).then_some(())
            })
            .await;
            worker
        };
        place.rest().await;
        nothing_is_held(&place, &place.db().await).await;
        place.settle_up(worker).await;
    }
}

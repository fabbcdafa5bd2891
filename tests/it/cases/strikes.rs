//! What the broker's way does not carry: a publication that ends good connections is set aside, and nothing else is.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::Value;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    in_process::{clerk, read, settle},
    partner::Partner,
    proxy::{Proxy, looks},
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, Worker, address, until, with_address},
};

const MARK: &str = "the-one-that-strikes";

/// A place, a way to its broker, a partner and what it reserved.
async fn struck(test: &str) -> (Place, Proxy, Partner, Vec<Reservation>) {
    let place = Place::new(test).await;
    let proxy = Proxy::to(&address(&place.broker_url)).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..12).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, proxy, partner, reservations)
}

fn worker(place: &Place, proxy: &Proxy, settings: &[(&str, &str)]) -> Worker {
    let url = with_address(&place.broker_url, proxy.address);
    let all = [
        LEAVE_DEAD_LETTERS,
        ("SETTLED_BROKER_URL", url.as_str()),
        ("SETTLED_RETRY__INITIAL", "10ms"),
        ("SETTLED_RETRY__MAX", "100ms"),
        ("SETTLED_OUTBOX__LEASE", "1s"),
        ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ];
    place.worker(&[&all, settings].concat())
}

async fn number(place: &Place, sql: &str) -> i64 {
    place.db().await.query_one(sql, &[]).await.expect(sql).get(0)
}

async fn metric(worker: &Worker, name: &str) -> f64 {
    let (_, text) = worker.get("/metrics").await.expect("metrics");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}")).parse().expect("a number")
}

/// Eleven that settle and one that is refused: the event of one of them and the dead letter are what strikes.
fn messages(partner: &Partner, reservations: &[Reservation]) -> Vec<Message> {
    let unknown = partner.allocation("BTC", "1");
    let refused = partner.draft(&unknown, "cleared").without("nonce");
    let mut refused = refused.message(Expect::Refused("invalid_field"));
    refused.body = String::from_utf8(refused.body)
        .expect("text")
        .replacen('{', &format!("{{\"mark\":\"{MARK}\","), 1)
        .into_bytes();
    let mut messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    messages.insert(5, refused);
    messages
}

/// Cuts whatever carries the event of this allocation, or the marked dead letter.
fn strike(proxy: &Proxy, reservation: &Reservation) {
    let marks = [
        MARK.as_bytes().to_vec(),
        format!("\"subject\":\"{}\"", reservation.id).into_bytes(),
    ];
    proxy.strike(Some(Arc::new(move |frame: &[u8]| {
        marks
            .iter()
            .any(|mark| frame.windows(mark.len()).any(|window| window == mark.as_slice()))
    })));
}

/// Events, by their ids.
fn told(place: &Place) -> usize {
    let seen = place.events.seen();
    let ids: BTreeSet<&str> = seen.iter().filter_map(|seen| seen.message_id()).collect();
    ids.len()
}

async fn two_are_set_aside(place: &Place, worker: &Worker) {
    until("two are set aside and the rest is told", PATIENCE, async || {
        let waiting = number(place, "SELECT count(*) FROM settled.outbox").await;
        let aside = number(place, "SELECT count(*) FROM settled.outbox_refused").await;
        (waiting == 0 && aside == 2).then_some(())
    })
    .await;
    // Eleven settlements' events and the rejection's, each at least once.
    until("the others are told", PATIENCE, async || {
        place.events.catch_up(place.line()).await;
        (told(place) == 12).then_some(())
    })
    .await;
    assert_eq!(place.line().depth("settlement.dead").await, 0);
    assert_eq!(metric(worker, "settled_outbox_refused_total").await, 2.0);
    let sql = "SELECT count(*) FROM settled.outbox_refused WHERE refusal LIKE 'it ended 5 good connections%'";
    assert_eq!(number(place, sql).await, 2);
    worker.ready().await;
}

/// In a lane: the one is found among the batch, an event and a dead letter alike.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_good_connections_is_set_aside_by_its_lane() {
    let (place, proxy, partner, reservations) = struck("struck_lane").await;
    strike(&proxy, &reservations[3]);
    place.publish(&messages(&partner, &reservations)).await;
    let worker = worker(&place, &proxy, &[("SETTLED_WORKER__LANES", "1")]);
    two_are_set_aside(&place, &worker).await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    assert_eq!(place.line().depth("settlement.updates").await, 0);
}

/// A name that somebody made up ends the line on which replies leave, and no other: nothing is told a second time for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_that_ends_its_connection_ends_no_other() {
    let (place, proxy, partner, reservations) = struck("struck_reply").await;
    let asks = |reservation: &Reservation, name: &str| {
        partner
            .cleared(reservation)
            .with(|properties| properties.with_reply_to(name.into()))
    };
    // How often the lane opened its line for events, by the name that it gives.
    let opened = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&opened);
    proxy.strike(Some(Arc::new(move |frame: &[u8]| {
        let has = |text: &str| frame.windows(text.len()).any(|window| window == text.as_bytes());
        if has("connection_name") && has("lane 0 publish") && !has("lane 0 publish replies") {
            count.fetch_add(1, Ordering::SeqCst);
        }
        has(MARK)
    })));
    let worker = worker(&place, &proxy, &[("SETTLED_WORKER__LANES", "1")]);
    worker.ready().await;
    let marked = format!("settlement.reply.acme.{MARK}");
    for reservation in &reservations[..4] {
        place.publish(&[asks(reservation, &marked)]).await;
        place.rest().await;
    }
    assert!(proxy.injected() >= 1, "a reply was sent");
    assert_eq!(opened.load(Ordering::SeqCst), 1, "the line for events");
    // Once that is over others are answered again.
    place.line().declare("settlement.reply.acme.inbox").await;
    let asking = asks(&reservations[4], "settlement.reply.acme.inbox");
    until("somebody is answered", PATIENCE, async || {
        place.publish(std::slice::from_ref(&asking)).await;
        place.rest().await;
        (place.line().depth("settlement.reply.acme.inbox").await > 0).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// The same of a row whose lane is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_good_connections_is_set_aside_by_the_relay() {
    let (place, proxy, partner, reservations) = struck("struck_relay").await;
    strike(&proxy, &reservations[3]);
    let batch = read(&messages(&partner, &reservations)).await;
    let settled = settle(&clerk(&place), &batch).await.expect("settled");
    assert_eq!(settled.publications.len(), 14);
    let worker = worker(&place, &proxy, &[]);
    two_are_set_aside(&place, &worker).await;
    assert_eq!(metric(&worker, "settled_relay_taken_total").await, 1.0);
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// Where nothing passes it is nobody's fault: all of it waits, and is told once it can be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_that_cuts_everything_sets_nothing_aside() {
    let (place, proxy, partner, reservations) = struck("struck_all").await;
    let worker = worker(&place, &proxy, &[("SETTLED_WORKER__LANES", "1")]);
    // Whether it may publish at all is asked before it takes anything.
    worker.ready().await;
    proxy.strike(Some(Arc::new(looks::publish)));
    place.publish(&messages(&partner, &reservations)).await;
    until("it was tried often", PATIENCE, async || {
        let (status, _) = worker.get("/metrics").await?;
        (status == 200 && metric(&worker, "settled_publish_failures_total").await >= 20.0).then_some(())
    })
    .await;
    assert_eq!(number(&place, "SELECT count(*) FROM settled.outbox_refused").await, 0);
    proxy.strike(None);
    until("all is told", PATIENCE, async || {
        (number(&place, "SELECT count(*) FROM settled.outbox").await == 0).then_some(())
    })
    .await;
    place.events.catch_up(place.line()).await;
    assert_eq!(told(&place), 13);
    assert_eq!(place.line().depth("settlement.dead").await, 1);
    assert_eq!(number(&place, "SELECT count(*) FROM settled.outbox_refused").await, 0);
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// A lane that can not tell what it committed gives back what it holds; /readyz and `doctor` say why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stuck_lane_holds_goes_back() {
    let place = Place::new("stuck_lane").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    let settings = [
        LEAVE_DEAD_LETTERS,
        ("SETTLED_WORKER__LANES", "1"),
        ("SETTLED_WORKER__BATCH_MAX", "1"),
        ("SETTLED_OUTBOX__STUCK_AFTER", "1s"),
        ("SETTLED_RETRY__MAX", "200ms"),
    ];
    let worker = place.ready_worker(&settings).await;
    for queue in ["test.dead", "settlement.dead"] {
        place.line().delete(queue).await;
    }
    let refused = partner
        .draft(&partner.allocation("BTC", "1"), "cleared")
        .without("nonce");
    let refused = refused.message(Expect::Refused("invalid_field"));
    place.publish(&vec![refused.clone(); 10]).await;
    // Two rows are committed, and the other eight are anybody's.
    until("what it held is in the queue again", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 8).then_some(())
    })
    .await;
    until("/readyz says it", PATIENCE, async || {
        worker
            .not_ready()
            .await
            .contains("oldest row of the outbox")
            .then_some(())
    })
    .await;
    let mut doctor = place.command(&["doctor", "--json"]);
    let output = doctor
        .env("SETTLED_OUTBOX__STUCK_AFTER", "1s")
        .output()
        .await
        .expect("run");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let mut checks = report["checks"].as_array().expect("checks").iter();
    let line = checks.find(|check| check["name"] == "outbox").expect("the line");
    assert_eq!(line["ok"], false, "{line}");
    assert!(place.run(&["topology"]).await.status.success());
    for _ in 0..10 {
        assert_eq!(place.line().get("settlement.dead").await.body, refused.body);
    }
    worker.ready().await;
    let handed_back = worker
        .said()
        .lines()
        .filter(|line| line.contains("handed back"))
        .count();
    assert_eq!(handed_back, 1, "{}", worker.said());
    assert_eq!(worker.terminate().await.code(), Some(0));
}

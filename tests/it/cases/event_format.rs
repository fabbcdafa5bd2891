//! Events one by one and in arrays: the same events, told as surely.

use std::collections::BTreeMap;

use lapin::types::ShortString;
use serde_json::Value;

use crate::kit::{
    amqp::{Message, Seen},
    auditor::{Expect, Reservation},
    partner::Partner,
    support::{PATIENCE, Place, Worker, until},
};

const BATCHED: (&str, &str) = ("SETTLED_EVENTS__FORMAT", "batched");
const ONE_LANE: (&str, &str) = ("SETTLED_WORKER__LANES", "1");

/// Two partners whose clients have plenty of BTC.
async fn with_partners(test: &str) -> (Place, [Partner; 2]) {
    let place = Place::new(test).await;
    let partners = [Partner::new("acme"), Partner::new("Zed_9-Trading")];
    for partner in &partners {
        place.register(partner).await;
        place.deposit(partner, "BTC", "1000000000000").await;
    }
    (place, partners)
}

/// Valid messages of both partners by turns, cleared and released by turns.
async fn valid(place: &Place, partners: &[Partner; 2], count: usize) -> Vec<Message> {
    let partner = |number: usize| &partners[number % 2];
    let reservations: Vec<Reservation> = (0..count)
        .map(|number| partner(number).allocation("BTC", "1"))
        .collect();
    place.reserve(&reservations).await;
    let message = |(number, reservation)| match number % 4 {
        0 | 1 => partner(number).cleared(reservation),
        _ => partner(number).released(reservation),
    };
    reservations.iter().enumerate().map(message).collect()
}

/// Waits until so many messages were judged here in all, and everything is told.
async fn judged(place: &Place, count: usize) {
    let db = place.db().await;
    until("every message is judged", PATIENCE, async || {
        let sql = "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches WHERE source = 'queue'";
        let judged: i64 = db.query_one(sql, &[]).await.expect("batches").get(0);
        (judged == i64::try_from(count).expect("a count")).then_some(())
    })
    .await;
    place.rest().await;
}

/// What subscribers received, but for the first so many.
async fn received(place: &Place, after: usize) -> Vec<Seen> {
    place.events.catch_up(place.line()).await;
    place.events.seen().split_off(after)
}

fn content_type(seen: &Seen) -> &str {
    seen.properties.content_type().as_ref().map_or("", ShortString::as_str)
}

fn is_array(seen: &Seen) -> bool {
    content_type(seen) == "application/cloudevents-batch+json"
}

/// Of these events the bodies by type and id.
fn by_id(seen: &[Seen]) -> BTreeMap<(String, String), Vec<Vec<u8>>> {
    let mut bodies = BTreeMap::<_, Vec<_>>::new();
    for event in seen.iter().cloned().flat_map(Seen::events) {
        let told: Value = serde_json::from_slice(&event.body).expect("an event is JSON");
        let text = |name: &str| told[name].as_str().expect(name).to_owned();
        bodies.entry((text("type"), text("id"))).or_default().push(event.body);
    }
    bodies
}

/// A count from `/metrics`.
async fn metric(worker: &Worker, name: &str) -> usize {
    let (_, text) = worker.get("/metrics").await.expect("metrics");
    let count = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    count.expect(name).parse().expect("a number")
}

/// Told one by one, and told again in arrays: by id and by their bytes the same events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_events_in_either_format() {
    const MAX_BYTES: usize = 4_096;
    let (place, partners) = with_partners("formats").await;
    let messages = valid(&place, &partners, 120).await;
    place.publish(&messages).await;
    let worker = place.ready_worker(&[ONE_LANE]).await;
    judged(&place, messages.len()).await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    let alone = received(&place, 0).await;
    assert_eq!(alone.len(), messages.len());
    for seen in &alone {
        assert_eq!(content_type(seen), "application/cloudevents+json");
    }

    // Given up by the broker, which the collector tells.
    let gone = Message::new("acme.allocation.update", "too late", Expect::Refused("expired"))
        .with(|properties| properties.with_expiration("1".into()));
    place.publish(&[gone]).await;
    until("it expires", PATIENCE, async || {
        (place.line().depth("settlement.dead").await == 1).then_some(())
    })
    .await;
    let fresh = valid(&place, &partners, 16).await;
    let refused = partners.iter().map(|partner| {
        let draft = partner
            .draft(&partner.allocation("BTC", "1"), "cleared")
            .without("nonce");
        draft.message(Expect::Refused("invalid_field"))
    });
    let again: Vec<Message> = messages.iter().cloned().chain(fresh).chain(refused).collect();
    place.publish(&again).await;
    let max_bytes = ("SETTLED_EVENTS__BATCH_MAX_BYTES", &*MAX_BYTES.to_string());
    let worker = place.ready_worker(&[ONE_LANE, BATCHED, max_bytes]).await;
    judged(&place, messages.len() + again.len()).await;
    let db = place.db().await;
    until("what expired is told", PATIENCE, async || {
        let sql = "SELECT FROM settled.dead_letters WHERE made_by = 'broker'";
        let rows = db.query(sql, &[]).await.expect("dead letters");
        (rows.len() == 1).then_some(())
    })
    .await;
    place.rest().await;
    let arrays = received(&place, alone.len()).await;
    let told = by_id(&arrays);
    for kind in ["allocation.cleared", "allocation.released", "update.rejected"] {
        let of_kind = told.iter().filter(|((told, _), _)| told == kind);
        let copies: usize = of_kind.map(|(_, copies)| copies.len()).sum();
        let counted = format!("settled_events_total{{type=\"{kind}\",fate=\"confirmed\"}}");
        let counted = metric(&worker, &counted).await;
        assert_eq!(counted, copies, "{kind}: events are counted, not messages");
    }
    place.settle_up(worker).await;

    for (event, body) in by_id(&alone) {
        assert_eq!(told.get(&event), Some(&body), "{event:?}");
    }
    let events: usize = told.values().map(Vec::len).sum();
    assert_eq!(
        events,
        again.len() + 1,
        "each judged message has its event, and what expired"
    );
    assert!(arrays.len() < events, "{} messages for {events} events", arrays.len());
    let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
    for seen in arrays {
        assert!(is_array(&seen), "{seen:?}");
        assert_eq!(*seen.properties.delivery_mode(), Some(2));
        let size = seen.body.len();
        let events = seen.events();
        assert!(size <= MAX_BYTES || events.len() == 1, "{size} bytes");
        *sizes.entry(events.len()).or_default() += 1;
        for event in &events {
            let told: Value = serde_json::from_slice(&event.body).expect("an event is JSON");
            let key = format!("{}.{}", told["type"].as_str().unwrap_or_default(), enterprise(&told));
            assert_eq!(key, event.routing_key, "an array is of one routing key");
        }
    }
    assert!(sizes.keys().any(|events| *events > 1), "{sizes:?}");
}

fn enterprise(event: &Value) -> &str {
    event["data"]["enterpriseId"].as_str().unwrap_or_default()
}

/// Killed between commit and the last confirm, by workers that tell in arrays; those that follow tell one by one. The relay
/// publishes what was committed as it was committed, what comes again is told in the format of the day, and every event is
/// told, under one id, with the same bytes.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_the_commit_in_one_format_and_told_in_the_other() {
    let (place, partners) = with_partners("either_way").await;
    let settings = [
        ONE_LANE,
        ("SETTLED_OUTBOX__LEASE", "1s"),
        ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ];
    let mut before = 0;
    for fault in [
        "after_commit:1:kill",
        "after_ack:1:kill",
        "half_published:1:kill",
        "after_confirm:1:kill",
    ] {
        place.publish(&valid(&place, &partners, 24).await).await;
        let first = place.worker(&[&settings[..], &[BATCHED, ("SETTLED_FAULT", fault)]].concat());
        until("it is killed", PATIENCE, async || first.ended()).await;
        let second = place.ready_worker(&settings).await;
        place.rest().await;
        let taken = metric(&second, "settled_relay_taken_total").await;
        assert!(taken > 0, "{fault}: the relay took its row");
        assert_eq!(second.terminate().await.code(), Some(0));
        let seen = received(&place, before).await;
        assert!(
            seen.iter().any(is_array),
            "{fault}: its row is published as it was written"
        );
        before += seen.len();
    }
    place.audit().await;
}

/// Whoever simulates partners reads events in either format.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_simulation_accounts_for_events_in_arrays() {
    let place = Place::new("simulated").await;
    let worker = place.ready_worker(&[BATCHED]).await;
    let report = place.json(&["simulate", "--messages", "300"]).await;
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(worker.terminate().await.code(), Some(0));
    // One of its partners is suspended, which is told as a single event.
    let mut seen = received(&place, 0).await;
    seen.retain(|seen| !seen.routing_key.starts_with("partner."));
    let told = seen.iter().cloned().flat_map(Seen::events).count();
    assert!(
        seen.iter().all(is_array) && told > seen.len(),
        "{told} in {}",
        seen.len()
    );
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
}

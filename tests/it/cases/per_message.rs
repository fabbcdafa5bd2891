//! The worker that the benchmarks compare with does the same work: on the same traffic it leaves the same rows and
//! publishes the same events and dead letters as the worker. A peer that did less would make the comparison worthless.

use settled::config::{Settings, Sources};
use tokio::sync::oneshot;

use crate::kit::{
    amqp::Seen,
    support::{PATIENCE, Place, until},
    traffic::{Mix, prepare},
};

#[path = "../../../benches/bench/per_message.rs"]
#[expect(dead_code, reason = "`run` is for a process of its own")]
mod peer;

/// Without rivals: which of two comes first is another one with every run.
const MIX: Mix = Mix {
    valid: 240,
    rivals: false,
    invalid: true,
    parked: 8,
    late: 0,
};

/// Everything that a message leaves behind, but for what differs with every run: numbers, times and batches.
const ROWS: [(&str, &str); 6] = [
    ("accounts", "kind, owner, currency, balance"),
    (
        "allocations",
        "id, status, reason, retriable, partner_external_id, evaluation_id, pending_approval_id, policy_result,
         settled_nonce",
    ),
    (
        "settlements",
        "allocation_id, enterprise_id, nonce, payload, signature, public_key",
    ),
    (
        "transfers JOIN settled.entries ON transfer_id = id",
        "subject_id, step, event, debit_account, credit_account, amount, account_id, change",
    ),
    (
        "receipts",
        "key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id, public_key",
    ),
    (
        "parked JOIN settled.parkings USING (key)",
        "key, enterprise_id, nonce, parked.allocation_id, exchange, routing_key, format, properties, body, step",
    ),
];

async fn rows(place: &Place) -> Vec<String> {
    let db = place.db().await;
    let mut all = Vec::new();
    for (table, columns) in ROWS {
        let sql = format!("SELECT row_to_json(r)::text FROM (SELECT {columns} FROM settled.{table}) AS r ORDER BY 1");
        let rows = db.query(&sql, &[]).await.expect(table);
        all.extend(rows.iter().map(|row| format!("{table}: {}", row.get::<_, String>(0))));
    }
    all
}

/// What was published, but for when.
async fn published(place: &Place) -> Vec<String> {
    let observed = place.observed().await;
    let mut all: Vec<String> = observed.events.iter().map(event).collect();
    all.extend(observed.dead.iter().map(dead_letter));
    all.sort_unstable();
    all
}

fn event(seen: &Seen) -> String {
    let mut body = String::from_utf8(seen.body.clone()).expect("UTF-8");
    let said: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    // A settlement has its time in the record as well.
    for time in [&said["time"], &said["data"]["parkedUntil"]] {
        if let Some(time) = time.as_str() {
            body = body.replace(time, "then");
        }
    }
    format!("event {} {body} {:?}", seen.routing_key, seen.properties)
}

fn dead_letter(seen: &Seen) -> String {
    let mut properties = format!("{:?}", seen.properties);
    if seen.death().is_some() {
        // The broker made it, with its own times.
        properties = format!("{:?}", seen.death());
    } else if let Some(time) = seen.text("settled-failed-at") {
        properties = properties.replace(&format!("{:?}", time.as_bytes()), "then");
    }
    let digest = hex::encode(crate::kit::auditor::digest_of(seen));
    format!("dead letter {} {digest} {properties}", seen.routing_key)
}

fn settings(place: &Place) -> Settings {
    let environment = [
        ("SETTLED_DATABASE_URL", &place.database_url),
        ("SETTLED_BROKER_URL", &place.broker_url),
    ];
    Settings::load(Sources {
        file: None,
        environment: environment
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.clone())),
        flags: Vec::new(),
    })
    .expect("settings")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_at_a_time_gives_the_same_answers() {
    let place = Place::new("per_message").await;
    let messages = prepare(&place, 1, &MIX).await.messages;
    let copy = place.copy("per_message_copy").await;
    let worker = place.ready_worker(&[]).await;
    let (stop, stopped) = oneshot::channel::<()>();
    let settings = settings(&copy);
    let peer = tokio::spawn(async move {
        // Whoever drops the other end wants it to stop as well.
        let stop = async move { drop(stopped.await) };
        peer::settle(&settings, stop).await
    });
    // Twice: what settled is a duplicate then, what is parked is so still, what was refused is refused again.
    for time in 1..=2 {
        place.publish(&messages).await;
        copy.publish(&messages).await;
        place.rest().await;
        let expected = published(&place).await;
        until("the peer has published as much", PATIENCE, async || {
            assert!(!peer.is_finished(), "the peer ended by itself");
            let count = copy.events.seen().len() + copy.dead.seen().len();
            (count >= expected.len() && copy.line().depth("settlement.updates").await == 0).then_some(())
        })
        .await;
        let (ours, theirs) = (published(&copy).await, expected);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs, "time {time}");
        }
        assert_eq!(ours.len(), theirs.len(), "time {time}");
    }
    stop.send(()).expect("the peer is there");
    assert_eq!(peer.await.expect("no panic"), Ok(()));
    assert_eq!(
        copy.line().depth("settlement.updates").await,
        0,
        "everything was acknowledged"
    );
    worker.terminate().await;
    assert!(rows(&place).await.len() > 1_000);
    for (ours, theirs) in rows(&copy).await.iter().zip(rows(&place).await) {
        assert_eq!(*ours, theirs);
    }
    assert_eq!(rows(&copy).await.len(), rows(&place).await.len());
}

//! The last stop before settling stops: nothing is collected any more, and the queue of dead letters is full as well.

use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, event_id},
    support::{PATIENCE, Place, until, with_reservations},
};

const JUNK: i64 = 30;

async fn number(db: &Client, sql: &str) -> i64 {
    db.query_one(sql, &[]).await.expect(sql).get(0)
}

async fn bound(place: &Place, method: &str, length: u32) {
    let path = format!("/api/policies/{}/bound", place.name);
    let body = json!({
        "pattern": "^settlement\\.dead$", "definition": {"max-length": length}, "apply-to": "queues", "priority": 1,
    });
    let (status, answer) = place.services.manage(method, &path, Some(body)).await;
    assert!(matches!(status, 201 | 204), "{status} {answer}");
    let queue = format!("/api/queues/{}/settlement.dead", place.name);
    until("the policy counts", PATIENCE, async || {
        let (_, queue) = place.services.manage("GET", &queue, None).await;
        (queue["policy"] == "bound").then_some(())
    })
    .await;
}

/// Lanes stand still and say why, with everything in its place; a purge lets it all go on, and nothing is lost or told twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_dead_letters_have_no_room_lanes_stop_and_lose_nothing() {
    let (place, partner, reservations) = with_reservations("full_queue", 1).await;
    bound(&place, "PUT", 4).await;
    let worker = place
        .ready_worker(&[
            ("SETTLED_DEAD_LETTERS__MAX_ROWS", "3"),
            ("SETTLED_DEAD_LETTERS__BATCH_MAX", "1"),
            ("SETTLED_DEAD_LETTERS__LINGER", "0s"),
            ("SETTLED_WORKER__BATCH_MAX", "1"),
            ("SETTLED_WORKER__LANES", "1"),
            ("SETTLED_WORKER__PAUSE_RELEASE", "1s"),
            ("SETTLED_RETRY__MAX", "200ms"),
        ])
        .await;
    let junk: Vec<Message> = (0..JUNK)
        .map(|number| Message::new("acme.allocation.update", format!("junk {number}"), Expect::Any))
        .collect();
    place.publish(&junk).await;
    place
        .publish(&[partner.draft(&reservations[0], "cleared").message(Expect::Any)])
        .await;
    let why = until("it says that there is no room", PATIENCE, async || {
        let why = worker.not_ready().await;
        why.contains("a queue of dead letters takes no more").then_some(why)
    })
    .await;
    assert!(!why.contains("settled topology"), "{why}");
    let db = place.db().await;
    let judged = "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches WHERE source = 'queue'";
    let stuck = number(&db, judged).await;
    assert!(stuck < JUNK, "the lane goes on while nothing of it is told: {stuck}");
    assert_eq!(number(&db, "SELECT count(*) FROM settled.dead_letters").await, 3);

    until("everything was stored", PATIENCE, async || {
        let why = ["--reason", "a test", "--yes"];
        place
            .run(&[&["dead-letters", "discard", "--partner", "acme"], &why[..]].concat())
            .await;
        place
            .run(&[&["dead-letters", "purge", "--discarded-before", "0s"], &why[..]].concat())
            .await;
        let stored = "SELECT (SELECT count(*) FROM settled.dead_letters)
                           + (SELECT count(*)
                              FROM settled.audit_subjects AS s
                              JOIN settled.audit AS a ON a.id = s.audit_id
                              WHERE a.act = 'purge')";
        (number(&db, stored).await >= JUNK).then_some(())
    })
    .await;
    let id = event_id(&format!("allocation.cleared|{}", reservations[0].id));
    place
        .events
        .wait("it settles", |seen| seen.message_id() == Some(&id))
        .await;
    worker.ready().await;
    until("it is at rest", PATIENCE, async || {
        let outbox = number(&db, "SELECT count(*) FROM settled.outbox").await;
        (outbox == 0 && place.line().depth("settlement.dead").await == 0).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    assert_eq!(place.line().depth("settlement.dead").await, 0);
    assert_eq!(place.line().depth("settlement.unreadable").await, 0);
    assert_eq!(number(&db, judged).await, JUNK + 1);
    assert_eq!(number(&db, "SELECT count(*) FROM settled.outbox_refused").await, 0);
    let taken = "SELECT sum(letters)::bigint FROM settled.letters_taken";
    assert_eq!(number(&db, taken).await, JUNK, "each was taken once");
    let found: Value = place.json(&["reconcile", "--since", "1h"]).await;
    assert_eq!(found["ok"], json!(true), "{found}");
}

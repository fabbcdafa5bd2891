//! The auditor proves itself: books in order pass, and every way of spoiling them is seen.

use crate::{
    auditor::{self, Expect, Sent},
    support::Place,
    traffic::{Mix, Traffic, prepare, publish_in_lots, reserve_late},
};

/// How the database is spoiled, and a piece of what the auditor must say to it.
const SPOILT: &[(&str, &str)] = &[
    (
        "UPDATE settled.accounts SET balance = balance + 1 WHERE kind = 'held'",
        "a balance is not the sum of its entries",
    ),
    (
        "UPDATE settled.entries SET change = change + 1 WHERE ctid = (SELECT min(ctid) FROM settled.entries)",
        "do not sum to zero",
    ),
    (
        "DELETE FROM settled.entries WHERE ctid = (SELECT min(ctid) FROM settled.entries)",
        "a transfer has not its two entries",
    ),
    (
        "WITH gift AS (SELECT e.id AS debit, a.id AS credit FROM settled.accounts AS e JOIN settled.accounts AS a USING (currency)
                       WHERE e.kind = 'external' AND a.kind = 'available' LIMIT 1),
              made AS (INSERT INTO settled.entries SELECT -1, debit, -5 FROM gift UNION ALL SELECT -1, credit, 5 FROM gift
                       RETURNING account_id, change)
         UPDATE settled.accounts AS a SET balance = a.balance + m.change FROM made AS m WHERE a.id = m.account_id",
        "the balances are",
    ),
    (
        "UPDATE settled.allocations SET status = 'released', reason = 'x' WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "a state is not the fold of its transfers",
    ),
    (
        "UPDATE settled.allocations SET status = 'reserved', reason = 'x', settled_nonce = NULL WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "is still reserved, although a valid message came",
    ),
    (
        "UPDATE settled.allocations SET settled_nonce = 'x' WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "an outcome without its authority",
    ),
    (
        "UPDATE settled.settlements SET signature = set_byte(signature, 40, 1 # get_byte(signature, 40))
         WHERE ctid = (SELECT min(ctid) FROM settled.settlements)",
        "did not sign for",
    ),
    (
        "UPDATE settled.settlements AS s SET nonce = t.nonce FROM settled.settlements AS t
         WHERE s.allocation_id <> t.allocation_id AND s.enterprise_id = t.enterprise_id
           AND s.allocation_id = (SELECT allocation_id FROM settled.settlements ORDER BY enterprise_id, nonce LIMIT 1)",
        "a nonce was accepted twice",
    ),
    (
        "DELETE FROM settled.receipts WHERE key = (SELECT key FROM settled.receipts WHERE verdict = 'settled' LIMIT 1)",
        "is in [] instead of one place",
    ),
    (
        "DELETE FROM settled.parked WHERE key = (SELECT key FROM settled.parked LIMIT 1)",
        "is in [] instead of one place",
    ),
    (
        "UPDATE settled.receipts SET verdict = 'duplicate' WHERE key =
         (SELECT key FROM settled.receipts WHERE reason = 'not_permitted' LIMIT 1)",
        "\"settled\", \"dead\"",
    ),
    (
        "UPDATE settled.batches SET settled = settled + 1, received = received + 1
         WHERE id = (SELECT id FROM settled.batches LIMIT 1)",
        "the batches settled",
    ),
    (
        "INSERT INTO settled.parkings (key, allocation_id, step, at)
         VALUES (gen_random_uuid(), gen_random_uuid(), 'parked', now())",
        "and nobody was told",
    ),
    ("DELETE FROM settled.parkings", "waits, and it never did"),
    (
        "INSERT INTO settled.outbox SELECT gen_random_uuid(), 1, '', 1, now(), now()",
        "rows in the outbox",
    ),
    (
        "INSERT INTO settled.outbox_refused (batch_id, format, publications, refusal)
         VALUES (gen_random_uuid(), 1, '', 'no')",
        "publications were set aside",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_auditor_sees_what_is_wrong() {
    let place = Place::new("proof").await;
    let Traffic { messages, late } = prepare(&place, 3, &Mix::FULL).await;
    let worker = place.worker(&[]);
    publish_in_lots(&place, &messages).await;
    reserve_late(&place, &late, &worker).await;
    place.settle_up(worker).await;

    let db = place.db().await;
    for (spoil, complaint) in SPOILT {
        // The tables refuse changes; whoever spoils them does not ask.
        db.batch_execute("BEGIN; SET LOCAL session_replication_role = replica")
            .await
            .expect("a transaction");
        let spoilt = db.execute(*spoil, &[]).await.expect(spoil);
        assert!(spoilt > 0, "nothing was spoilt: {spoil}");
        let story = place.story().clone();
        let problems = auditor::audit(&db, &story, &place.events.seen(), &place.dead.seen()).await;
        db.batch_execute("ROLLBACK").await.expect("a rollback");
        assert!(
            problems.iter().any(|problem| problem.contains(complaint)),
            "after {spoil}\nthe auditor should say {complaint:?}, it said {problems:#?}"
        );
    }

    // What subscribers saw, spoilt.
    let story = place.story().clone();
    let (events, dead) = (place.events.seen(), place.dead.seen());
    let kind = |kind: &str| {
        let wanted = format!("\"type\":\"{kind}");
        let found = events
            .iter()
            .position(|seen| String::from_utf8_lossy(&seen.body).contains(&wanted));
        found.unwrap_or_else(|| panic!("an event of type {kind}"))
    };
    let mut complaints = Vec::new();
    for (of, complaint) in [
        ("allocation.cleared", "and nobody was told"),
        ("update.parked", "and nobody was told"),
        ("update.rejected", "a dead letter without its event"),
    ] {
        let mut fewer = events.clone();
        let id = fewer[kind(of)].message_id().map(str::to_owned);
        fewer.retain(|seen| seen.message_id() != id.as_deref());
        complaints.push((auditor::audit(&db, &story, &fewer, &dead).await, complaint));
    }
    let mut altered = events.clone();
    let mut copy = events[kind("allocation.cleared")].clone();
    copy.body.push(b' ');
    altered.push(copy.clone());
    complaints.push((
        auditor::audit(&db, &story, &altered, &dead).await,
        "copies of the event",
    ));
    let mut invented = events.clone();
    let text = String::from_utf8_lossy(&copy.body).replace("\"subject\":\"", "\"subject\":\"0");
    copy.body = text.into_bytes();
    invented.push(copy);
    complaints.push((
        auditor::audit(&db, &story, &invented, &dead).await,
        "an event of nothing we know",
    ));
    let lost = dead.get(1..).unwrap_or_default();
    complaints.push((
        auditor::audit(&db, &story, &events, lost).await,
        "is in [] instead of one place",
    ));
    let mut strange = dead.clone();
    if let Some(seen) = strange.first_mut() {
        seen.body.push(b' ');
    }
    complaints.push((
        auditor::audit(&db, &story, &events, &strange).await,
        "that nobody published",
    ));
    let mut longer = story.clone();
    longer.sent.push(Sent {
        routing_key: "acme.allocation.update".to_owned(),
        body: b"never".to_vec(),
        expect: Expect::Any,
    });
    complaints.push((
        auditor::audit(&db, &longer, &events, &dead).await,
        "is in [] instead of one place",
    ));
    let mut other = story.clone();
    if let Some(deposit) = other.deposits.first_mut() {
        deposit.quantity.push('0');
    }
    complaints.push((auditor::audit(&db, &other, &events, &dead).await, "the balances are"));
    for (problems, complaint) in complaints {
        assert!(
            problems.iter().any(|problem| problem.contains(complaint)),
            "the auditor should say {complaint:?}, it said {problems:#?}"
        );
    }
}

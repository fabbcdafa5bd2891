//! The auditor proves itself: books in order pass, and every way of spoiling them is seen.

use lapin::types::FieldTable;
use num_bigint::BigInt;
use uuid::Uuid;

use crate::kit::{
    amqp::Seen,
    auditor::{
        self, Expect, Observed, Sent, Story,
        books::{Books, signer},
        bounds::{Amounts, Gauge, Watch},
        is_by_broker,
    },
    partner::{new_key, sign},
    support::{PATIENCE, Place, until},
    traffic::{Mix, Traffic, prepare, publish_in_lots, reserve_late},
};

/// Whether a complaint is of this kind: its pieces, in order, with anything between them.
fn says(problem: &str, pieces: &str) -> bool {
    let mut rest = Some(problem);
    for piece in pieces.split('*') {
        rest = rest.and_then(|rest| rest.split_once(piece)).map(|(_, after)| after);
    }
    rest.is_some()
}

fn assert_says(problems: &[String], complaint: &str, spoilt: &str) {
    assert!(
        problems.iter().any(|problem| says(problem, complaint)),
        "after {spoilt}\nthe auditor should say {complaint:?}, it said {problems:#?}"
    );
}

/// How the database is spoiled, and what the auditor must say to it. What stands before a semicolon makes it possible.
const SPOILT: &[(&str, &str)] = &[
    (
        "UPDATE settled.funds SET held = held + 1 WHERE holder = 'connection'",
        "I2: a balance is not the sum of its entries",
    ),
    (
        "UPDATE settled.transfers SET amount = amount + 1 WHERE ctid = (SELECT min(ctid) FROM settled.transfers)",
        "I2: a balance is not the sum of its transfers",
    ),
    (
        "DELETE FROM settled.transfers WHERE ctid = (SELECT min(ctid) FROM settled.transfers)",
        "I2: a balance is not the sum of its entries",
    ),
    (
        // What the view must show, if somebody puts another one in its place.
        "CREATE OR REPLACE VIEW settled.entries AS
         SELECT id AS transfer_id, debit_account AS account_id, -amount AS change FROM settled.transfers;
         SELECT 1",
        "I2: a transfer has not its two entries",
    ),
    (
        "WITH other AS (INSERT INTO settled.funds (holder, owner, currency)
                        SELECT 'client', owner, 'ODD' FROM settled.funds WHERE holder = 'client' LIMIT 1 RETURNING id)
         UPDATE settled.transfers SET credit_account = (SELECT id * 4 + 1 FROM other)
         WHERE ctid = (SELECT min(ctid) FROM settled.transfers)",
        "I2: *do not sum to zero",
    ),
    (
        "WITH other AS (INSERT INTO settled.funds (holder, owner, currency)
                        SELECT 'client', owner, 'ODD' FROM settled.funds WHERE holder = 'client' LIMIT 1 RETURNING id)
         UPDATE settled.transfers SET credit_account = (SELECT id * 4 + 1 FROM other)
         WHERE ctid = (SELECT min(ctid) FROM settled.transfers)",
        "I2: a transfer between accounts that are not there, or not of one currency",
    ),
    (
        "WITH gift AS (SELECT e.id AS world, a.id AS client FROM settled.funds AS e JOIN settled.funds AS a USING (currency)
                       WHERE e.holder = 'world' AND a.holder = 'client' LIMIT 1),
              made AS (INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
                       SELECT gen_random_uuid(), 0, 'deposit', world * 4, client * 4 + 1, 5, now() FROM gift
                       RETURNING amount)
         UPDATE settled.funds AS f
         SET external = external - CASE f.id WHEN g.world THEN m.amount ELSE 0 END,
             available = available + CASE f.id WHEN g.client THEN m.amount ELSE 0 END
         FROM made AS m, gift AS g WHERE f.id IN (g.world, g.client)",
        "I2: the balances are",
    ),
    (
        "UPDATE settled.allocations SET status = 'released', reason = 'x' WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "I2: a state is not the fold of its transfers",
    ),
    (
        "UPDATE settled.allocations SET status = 'reserved', reason = 'x', settled_nonce = NULL WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "I1: *is still reserved, although a valid message came",
    ),
    (
        "UPDATE settled.allocations SET settled_nonce = 'x' WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "I1: an outcome without its authority",
    ),
    (
        "UPDATE settled.transfers SET signature = set_byte(signature, 40, 1 # get_byte(signature, 40))
         WHERE ctid = (SELECT min(ctid) FROM settled.transfers WHERE step = 1)",
        "I9: *did not sign for",
    ),
    (
        "UPDATE settled.transfers AS s SET receipt_key = t.receipt_key
         FROM settled.transfers AS t
         WHERE t.step = 1 AND s.step = 1 AND s.subject_id <> t.subject_id
           AND s.subject_id = (SELECT allocation_id FROM settled.settlements ORDER BY enterprise_id, nonce LIMIT 1)",
        "I5: a nonce was accepted twice",
    ),
    (
        "DELETE FROM settled.receipts WHERE key = (SELECT key FROM settled.receipts WHERE verdict = 'settled' LIMIT 1)",
        "I3: *is in [] instead of one place",
    ),
    (
        "DELETE FROM settled.parked WHERE key = (SELECT key FROM settled.parked LIMIT 1)",
        "I3: *is in [] instead of one place",
    ),
    (
        "UPDATE settled.receipts SET verdict = 'duplicate' WHERE key =
         (SELECT key FROM settled.receipts WHERE reason = 'not_permitted' LIMIT 1)",
        "I3: *is in [\"settled\", \"dead\"]",
    ),
    (
        "UPDATE settled.batches SET settled = settled + 1, received = received + 1
         WHERE id = (SELECT id FROM settled.batches LIMIT 1)",
        "I1: the batches settled",
    ),
    (
        "INSERT INTO settled.parkings (key, allocation_id, step, at)
         VALUES (gen_random_uuid(), gen_random_uuid(), 'parked', now())",
        "I4: *and nobody was told",
    ),
    ("DELETE FROM settled.parkings", "I4: *waits, and it never did"),
    (
        "INSERT INTO settled.outbox SELECT gen_random_uuid(), 1, '', 1, now(), now()",
        "I7: 1 rows in the outbox",
    ),
    (
        "INSERT INTO settled.outbox_refused (batch_id, format, publications, refusal)
         VALUES (gen_random_uuid(), 1, '', 'no')",
        "I4: publications were set aside",
    ),
    (
        "UPDATE settled.receipts SET allocation_id = gen_random_uuid() WHERE key =
         (SELECT key FROM settled.receipts WHERE verdict = 'settled' LIMIT 1)",
        "I1: a receipt without its effect",
    ),
    (
        "INSERT INTO settled.transfers
             (subject_id, step, event, debit_account, credit_account, amount, created_at, batch_id, receipt_key, signature, payload)
         SELECT gen_random_uuid(), 1, event, debit_account, credit_account, amount, created_at, batch_id, gen_random_uuid(),
                signature, payload
         FROM settled.transfers WHERE step = 1 LIMIT 1",
        "I1: a transfer that settles without its receipt",
    ),
    (
        "UPDATE settled.transfers SET batch_id = gen_random_uuid() WHERE id =
         (SELECT id FROM settled.transfers WHERE step = 1 LIMIT 1)",
        "I1: a transfer of another batch than its receipt",
    ),
    (
        "UPDATE settled.allocations SET partner_external_id = 'x' WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "I1: *, which says",
    ),
    (
        "UPDATE settled.allocations SET reason = 'x' WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'released' LIMIT 1)",
        "I1: *, which says",
    ),
    (
        "UPDATE settled.allocations SET retriable = true WHERE id = (SELECT id FROM settled.allocations LIMIT 1)",
        "I1: the reservation * has changed",
    ),
    (
        "ALTER TABLE settled.funds DROP CONSTRAINT funds_never_negative;
         UPDATE settled.funds SET held = -1 WHERE id = (SELECT id FROM settled.funds WHERE holder = 'connection' LIMIT 1)",
        "I2: a balance is negative",
    ),
    (
        "UPDATE settled.transfers SET debit_account = 4000000 WHERE ctid = (SELECT min(ctid) FROM settled.transfers)",
        "I2: entries of no account",
    ),
    (
        "CREATE OR REPLACE VIEW settled.entries AS SELECT -1::bigint AS transfer_id, -1::bigint AS account_id, 5::numeric AS change;
         SELECT 1",
        "I2: entries of no transfer",
    ),
    (
        "INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
         SELECT gen_random_uuid(), 0, 'deposit', debit_account, credit_account, 1, now() FROM settled.transfers LIMIT 1",
        "I2: transfers of nothing",
    ),
    (
        "ALTER TABLE settled.batches DROP CONSTRAINT batches_check;
         UPDATE settled.batches SET parked = parked + 1 WHERE id = (SELECT id FROM settled.batches LIMIT 1)",
        "I3: the batch * does not add up",
    ),
    (
        "UPDATE settled.batches SET reasons = '{}' WHERE rejected > 0",
        "I3: the batch * has not a reason for each rejection",
    ),
    (
        "UPDATE settled.batches SET settled = settled - 1, duplicate = duplicate + 1 WHERE id =
         (SELECT id FROM settled.batches WHERE settled > 0 LIMIT 1)",
        "I3: the batch * counts other settlements",
    ),
    (
        "INSERT INTO settled.receipts (key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason,
                allocation_id, event_id, public_key, batch_id, first_seen, last_seen)
         SELECT gen_random_uuid(), enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id,
                event_id, public_key, batch_id, first_seen, last_seen
         FROM settled.receipts LIMIT 1",
        "I5: a nonce has two receipts",
    ),
    (
        "DELETE FROM settled.receipts WHERE verdict = 'settled'",
        "I7: not yet accounted for",
    ),
    (
        "UPDATE settled.partner_keys SET revoked_at = created_at",
        "I9: an effect by a key that was not active",
    ),
    (
        "UPDATE settled.partner_keys SET valid_from = created_at - interval '2 hours', valid_until = created_at - interval '1 hour'",
        "I9: an effect by a key that was not active",
    ),
    (
        "UPDATE settled.partners SET suspended_at = created_at",
        "I9: an effect by a key that was not active",
    ),
    (
        "UPDATE settled.allocations SET quantity = quantity + 1 WHERE id =
         (SELECT id FROM settled.allocations WHERE status = 'cleared' LIMIT 1)",
        "I9: *has an effect that is not the one",
    ),
    (
        "UPDATE settled.transfers SET payload = replace(payload, 'cleared', 'released')",
        "I9: *has an effect that is not the one",
    ),
    (
        "UPDATE settled.funds SET available = available + 1 WHERE holder = 'client'",
        "I6: *changed accounts",
    ),
    (
        "INSERT INTO settled.deposits (client_id, reference, currency, quantity) VALUES (gen_random_uuid(), 'x', 'BTC', 1)",
        "I6: *changed deposits",
    ),
    (
        "INSERT INTO settled.withdrawals (client_id, reference, currency, quantity) VALUES (gen_random_uuid(), 'x', 'BTC', 1)",
        "I6: *changed withdrawals",
    ),
    (
        "UPDATE settled.allocations SET updated_at = updated_at + interval '1 millisecond'",
        "I6: *changed allocations",
    ),
    ("DELETE FROM settled.transfers WHERE step = 1", "I6: *changed transfers"),
    ("DELETE FROM settled.transfers", "I6: *left 0 entries"),
    (
        "UPDATE settled.transfers SET created_at = created_at + interval '1 millisecond'",
        "I6: *changed settlements",
    ),
    (
        "UPDATE settled.receipts SET batch_id = gen_random_uuid() WHERE verdict = 'settled'",
        "I6: *changed receipts",
    ),
];

/// The first event of a type, once more and changed.
fn copy_event<'a>(observed: &'a mut Observed, kind: &str, change: impl FnOnce(String) -> String) -> &'a mut Seen {
    let wanted = format!("\"type\":\"{kind}\"");
    let text = |seen: &Seen| String::from_utf8_lossy(&seen.body).into_owned();
    let found = observed.events.iter().find(|seen| text(seen).contains(&wanted));
    let mut copy = found.unwrap_or_else(|| panic!("no event {kind}")).clone();
    copy.body = change(text(&copy)).into_bytes();
    observed.events.push(copy);
    observed.events.last_mut().expect("the copy")
}

/// Every copy of one event of a type is gone.
fn forget_event(observed: &mut Observed, kind: &str) {
    let id = copy_event(observed, kind, |text| text).message_id().map(str::to_owned);
    observed.events.retain(|seen| seen.message_id() != id.as_deref());
}

/// A reservation whose outcome nobody was told.
fn unsettled(story: &Story, observed: &Observed) -> Uuid {
    let told: Vec<String> = observed
        .events
        .iter()
        .map(|seen| String::from_utf8_lossy(&seen.body).into_owned())
        .collect();
    let mut ids = story.reservations.iter().map(|reservation| reservation.id);
    let is_told = |id: &Uuid| {
        let subject = format!("\"subject\":\"{id}\"");
        let mut told = told.iter().filter(|event| event.contains(&subject));
        told.any(|event| !event.contains("\"type\":\"update."))
    };
    ids.find(|id| !is_told(id)).expect("one that is reserved still")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_auditor_sees_what_is_wrong() {
    let place = Place::new("proof").await;
    let Traffic { messages, late } = prepare(&place, 3, &Mix::FULL).await;
    let worker = place.worker(&[]);
    publish_in_lots(&place, &messages).await;
    reserve_late(&place, &late, &worker).await;
    place.settle_up(worker).await;

    let db = place.db().await;
    let story = place.story().clone();
    let observed = place.observed().await;
    let before = Books::read(&db).await;
    for (spoil, complaint) in SPOILT {
        // The tables refuse changes; whoever spoils them does not ask.
        db.batch_execute("BEGIN; SET LOCAL session_replication_role = replica")
            .await
            .expect("a transaction");
        if let Some((prepare, _)) = spoil.split_once(';') {
            db.batch_execute(prepare).await.expect(prepare);
        }
        let spoil = spoil.rsplit(';').next().unwrap_or(spoil);
        let spoilt = db.execute(spoil, &[]).await.expect(spoil);
        assert!(spoilt > 0, "nothing was spoilt: {spoil}");
        let mut problems = auditor::audit(&db, &story, &observed).await;
        problems.extend(auditor::unrest(&db, &story, &observed.dead).await);
        problems.extend(before.changes(&Books::read(&db).await));
        db.batch_execute("ROLLBACK").await.expect("a rollback");
        assert_says(&problems, complaint, spoil);
    }
    assert!(
        before.changes(&Books::read(&db).await).is_empty(),
        "everything was undone"
    );
}

/// What subscribers saw, spoilt; and what was published or paid in, told otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_auditor_sees_what_was_told_wrongly() {
    type Spoil = fn(&mut Story, &mut Observed);
    let table: &[(&str, Spoil)] = &[
        ("I4: a dead letter without its event", |_, observed| {
            forget_event(observed, "update.rejected");
        }),
        ("I4: * and nobody was told", |_, observed| {
            forget_event(observed, "allocation.cleared")
        }),
        ("I4: a message was parked", |_, observed| {
            forget_event(observed, "update.parked")
        }),
        ("I4: two copies of the event of", |_, observed| {
            copy_event(observed, "allocation.cleared", |text| text + " ");
        }),
        ("I4: the event of * has other properties", |_, observed| {
            let copy = copy_event(observed, "allocation.cleared", |text| text);
            copy.properties = copy.properties.clone().with_delivery_mode(1);
        }),
        ("I4: the event of * is *, not", |_, observed| {
            copy_event(observed, "deallocation.released", |text| {
                text.replace("the auditor", "another")
            });
        }),
        ("I4: an event of nothing we know", |_, observed| {
            copy_event(observed, "allocation.cleared", |text| {
                text.replace("\"subject\":\"", "\"subject\":\"0")
            });
        }),
        ("I4: an event without its effect", |story, observed| {
            let id = unsettled(story, observed);
            copy_event(observed, "allocation.cleared", |text| {
                let (before, rest) = text.split_once("\"subject\":\"").expect("a subject");
                format!("{before}\"subject\":\"{id}{}", &rest[36..])
            });
        }),
        ("I4: a rejection without its dead letter", |_, observed| {
            let reason = observed.dead[0].text("settled-reason");
            let digest = auditor::sha256(&observed.dead[0].body);
            assert!(reason.is_some());
            observed.dead.retain(|seen| auditor::sha256(&seen.body) != digest);
        }),
        ("I4: a rejection with an id of its own", |_, observed| {
            copy_event(observed, "update.rejected", |text| {
                text.replacen("\"id\":\"", "\"id\":\"0", 1)
            });
        }),
        ("I4: a rejection does not say what its reason means", |_, observed| {
            copy_event(observed, "update.rejected", |text| {
                text.replace("\"final\":true", "\"final\":0")
                    .replace("\"final\":false", "\"final\":0")
            });
        }),
        ("I4: a rejection has other properties", |_, observed| {
            copy_event(observed, "update.rejected", |text| text)
                .routing_key
                .push('.');
        }),
        ("I4: a dead letter does not say", |_, observed| {
            let at = observed
                .dead
                .iter()
                .position(|seen| !is_by_broker(seen))
                .expect("one of ours");
            observed.dead[at].properties = observed.dead[at].properties.clone().with_headers(FieldTable::default());
        }),
        ("I4: a parking of nothing", |_, observed| {
            let copy = copy_event(observed, "update.parked", |text| text);
            copy.properties = copy.properties.clone().with_message_id("another".into());
        }),
        ("I5: one nonce settled twice", |_, observed| {
            copy_event(observed, "allocation.cleared", |text| {
                text.replace("\"subject\":\"", "\"subject\":\"0")
            });
        }),
        ("I3: * is in [] instead of one place", |_, observed| {
            let body = observed.dead[0].body.clone();
            observed.dead.retain(|seen| seen.body != body);
        }),
        ("I3: a dead letter of a message that nobody published", |_, observed| {
            observed.dead[0].body.push(b' ')
        }),
        ("I3: * is in [\"settled\", \"dead\"]", |story, observed| {
            let mut copy = observed.dead[0].clone();
            let settled = story
                .sent
                .iter()
                .find(|sent| sent.expect == Expect::Settles)
                .expect("a message");
            (copy.routing_key, copy.body) = (settled.routing_key.clone(), settled.body.clone());
            observed.dead.push(copy);
        }),
        ("I3: * is dead", |story, _| {
            for sent in &mut story.sent {
                if sent.expect == Expect::Refused("unknown_partner") {
                    sent.expect = Expect::Refused("sender_mismatch");
                }
            }
        }),
        ("I3: acme.allocation.update * Any: is in []", |story, _| {
            story.sent.push(Sent {
                routing_key: "acme.allocation.update".to_owned(),
                body: b"never".to_vec(),
                expect: Expect::Any,
            });
        }),
        ("I3: the batches received", |story, _| {
            let again = vec![story.sent[0].clone(); 10_000];
            story.sent.extend(again);
        }),
        ("I3: the batches rejected", |_, observed| {
            let mut copy = observed
                .dead
                .iter()
                .find(|seen| !is_by_broker(seen))
                .expect("one of ours")
                .clone();
            for number in 0..10_000 {
                copy.body = format!("{number}").into_bytes();
                observed.dead.push(copy.clone());
            }
        }),
        ("I8: valid, and dead-lettered", |story, _| story.only_valid = true),
        ("I8: * is not valid traffic", |story, _| story.only_valid = true),
        ("I2: the balances are", |story, _| story.deposits[0].quantity.push('0')),
        ("I1: the reservation * has changed", |story, _| {
            story.reservations[0].client_external_id.push('0');
        }),
        ("I1: the reservation * is gone", |story, _| {
            story.reservations[0].id = Uuid::new_v4()
        }),
        ("I1: * allocations in the database", |story, _| {
            drop(story.reservations.pop())
        }),
        ("I9: * did not sign for", |story, _| story.keys.clear()),
        ("I9: a stranger's message left a receipt", |story, _| {
            for sent in &mut story.sent {
                if sent.expect == Expect::Refused("not_permitted") {
                    sent.expect = Expect::Refused("signature_mismatch");
                }
            }
        }),
    ];
    let place = Place::new("proof_told").await;
    let Traffic { messages, late } = prepare(&place, 4, &Mix::FULL).await;
    let worker = place.worker(&[]);
    publish_in_lots(&place, &messages).await;
    reserve_late(&place, &late, &worker).await;
    place.settle_up(worker).await;
    let db = place.db().await;
    let story = place.story().clone();
    let observed = place.observed().await;
    for (complaint, spoil) in table {
        let (mut story, mut observed) = (story.clone(), observed.clone());
        spoil(&mut story, &mut observed);
        let problems = auditor::audit(&db, &story, &observed).await;
        assert_says(&problems, complaint, "that");
    }
}

/// A worker that is stopped in the middle leaves the rest in the queue: a place like the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_still_queued_is_accounted_for() {
    let place = Place::new("proof_midway").await;
    let mix = Mix { late: 0, ..Mix::FULL };
    let Traffic { messages, .. } = prepare(&place, 5, &mix).await;
    place.publish(&messages).await;
    let settings = [("SETTLED_WORKER__BATCH_MAX", "8"), ("SETTLED_WORKER__PREFETCH", "8")];
    let worker = place.worker(&settings);
    let db = place.db().await;
    until("some of it is settled", PATIENCE, async || {
        let sql = "SELECT FROM settled.batches WHERE worker = $1";
        let rows = db.query(sql, &[&worker.name]).await.expect("batches");
        (rows.len() > 3).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    place.audit_midway().await;

    let story = place.story().clone();
    let observed = place.observed().await;
    assert!(!observed.queued.is_empty(), "it was stopped in the middle");
    let mut fewer = observed.clone();
    let lost = fewer.queued.pop().expect("one that waits").body;
    fewer.queued.retain(|seen| seen.body != lost);
    let problems = auditor::audit(&db, &story, &fewer).await;
    assert_says(
        &problems,
        "I3: *is in [] instead of one place",
        "one was taken from the queue",
    );
    let problems = auditor::unrest(&db, &story, &observed.dead).await;
    assert_says(&problems, "I7: not yet accounted for", "nothing: it is not at rest");

    place.settle_up(place.worker(&[])).await;
}

/// What the gauge reads is what there is, and whatever is above its bound is said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gauge_sees_what_a_worker_takes() {
    let place = Place::new("proof_bounds").await;
    let Traffic { messages, .. } = prepare(&place, 6, &Mix::VALID).await;
    let (db, other) = (place.db().await, place.db().await);
    let worker = place.ready_worker(&[("SETTLED_WORKER__PREFETCH", "20")]).await;
    until("both lanes consume", PATIENCE, async || {
        let lines = worker.lines();
        let attached = lines
            .iter()
            .filter(|line| line["message"] == "consumer attached" && line["queue"] == "settlement.updates");
        (attached.count() == 2).then_some(())
    })
    .await;
    // Nothing can be settled: what is delivered stays in hand. And a row in the outbox that the relay leaves alone.
    db.batch_execute("BEGIN; LOCK TABLE settled.batches")
        .await
        .expect("a lock");
    let sql = "INSERT INTO settled.outbox VALUES (gen_random_uuid(), 1, '', 0, now(), 'infinity')";
    other.execute(sql, &[]).await.expect("a row");
    let watch = Watch::over(Gauge::of(&place, &worker));
    place.publish(&messages).await;
    let peak = until("everything is taken", PATIENCE, async || {
        let peak = watch.peak();
        assert_eq!(peak.above(&worker.bounds), Vec::<String>::new());
        // The broker tells of new consumers and connections some seconds later: two consumers at least, and the gauges.
        let told = peak.ahead >= 38 && peak.broker_connections >= 3;
        (peak.unacked == 40 && told && peak.database_connections > 0).then_some(peak)
    })
    .await;
    assert_eq!(peak.outbox_rows, 1);
    assert!(peak.memory > 1024, "a process has its megabytes: {peak:?}");
    // The message that came first is not counted by the consumers that were attached after it; the broker may show the
    // consumer before them for a moment longer.
    assert!((38..=40).contains(&peak.ahead), "{peak:?}");
    let above = peak.above(&Amounts::default());
    for what in [
        "KiB of memory",
        "messages unacknowledged",
        "messages sent ahead",
        "connections to the database",
        "connections to the broker",
        "rows in the outbox",
    ] {
        assert_says(&above, &format!("I10: * {what}, bounded by 0"), "no bound");
    }
    db.batch_execute("ROLLBACK").await.expect("the lock goes");
    other
        .execute("DELETE FROM settled.outbox WHERE leased_until = 'infinity'", &[])
        .await
        .expect("no row");
    place.settle_up(worker).await;
}

/// The twin of a signature, with n - s and the other recovery id, recovers the same key and is nobody's signature.
#[test]
fn a_signature_with_a_high_s_is_nobodys() {
    let key = new_key();
    let mut bytes = hex::decode(sign(&key, "text")).expect("hexadecimal");
    assert_eq!(signer(&bytes, "text"), Some(key.public_key().serialize().to_vec()));
    assert_ne!(signer(&bytes, "another"), Some(key.public_key().serialize().to_vec()));
    let order = "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141";
    let order = BigInt::parse_bytes(order.as_bytes(), 16).expect("a number");
    let s = BigInt::from_bytes_be(num_bigint::Sign::Plus, &bytes[33..]);
    let (_, twin) = (order - s).to_bytes_be();
    bytes[0] = 31 + ((bytes[0] - 31) ^ 1);
    bytes.truncate(33);
    bytes.extend(vec![0; 32 - twin.len()]);
    bytes.extend(twin);
    assert_eq!(signer(&bytes, "text"), None);
}

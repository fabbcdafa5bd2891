//! Replays: dead letters that a run marked as due, judged by the worker through the door of parked messages. Their rows
//! take the verdict in the transaction that judges.

use serde_json::json;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    partner::Partner,
    support::{PATIENCE, Place, until, userinfo},
};

/// Short, so that what a dead worker had is soon taken over.
const SETTINGS: [(&str, &str); 5] = [
    ("SETTLED_PARK__LEASE", "1s"),
    ("SETTLED_PARK__POLL", "20ms"),
    ("SETTLED_OUTBOX__LEASE", "1s"),
    ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ("SETTLED_RETRY__MAX", "200ms"),
];

async fn number(db: &Client, sql: &str) -> i64 {
    db.query_one(sql, &[]).await.expect(sql).get(0)
}

/// Waits for so many dead letters in a state.
async fn in_state(place: &Place, state: &str, expected: i64) {
    let db = place.db().await;
    let mut seen = String::new();
    until(&format!("{expected} are {state}"), PATIENCE, async || {
        let sql = "SELECT coalesce(string_agg(state || ' ' || n, ', '), 'none')
                   FROM (SELECT state, count(*)::text AS n FROM settled.dead_letters GROUP BY state) AS s";
        let now: String = db.query_one(sql, &[]).await.expect(sql).get(0);
        if now != seen {
            eprintln!("{now}");
            seen = now;
        }
        let sql = format!("SELECT count(*) FROM settled.dead_letters WHERE state = '{state}'");
        (number(&db, &sql).await == expected).then_some(())
    })
    .await;
}

/// A run that asks for the replay of every open dead letter, as the desk writes it; its id.
async fn replay_all(place: &Place) -> i64 {
    let sql = "WITH plan AS (
                   INSERT INTO settled.plans (at, operator, filters, messages)
                   SELECT now(), 'test', '{}', count(*) FROM settled.dead_letters WHERE state = 'open'
                   RETURNING id
               ), run AS (
                   INSERT INTO settled.runs (plan_id, state, operator, why, all_verdicts, started_at, changed_at)
                   SELECT id, 'running', 'test', 'a test', true, now(), now() FROM plan
                   RETURNING id
               ), marked AS (
                   UPDATE settled.dead_letters AS d SET state = 'due', run_id = run.id FROM run WHERE d.state = 'open'
                   RETURNING d.id, d.seq, d.run_id
               ), items AS (
                   INSERT INTO settled.run_items (run_id, position, dead_letter_id, planned, state)
                   SELECT run_id, row_number() OVER (ORDER BY seq), id, 'settled', 'due' FROM marked
               )
               SELECT id FROM run";
    number(&place.db().await, sql).await
}

/// What a run's items came to, with how many.
async fn came_to(place: &Place, run: i64) -> String {
    let sql = "SELECT coalesce(string_agg(what || ' ' || n, ', ' ORDER BY what), 'nothing') FROM (
                   SELECT concat_ws(' ', state, verdict, reason) AS what, count(*)::text AS n
                   FROM settled.run_items WHERE run_id = $1 GROUP BY 1) AS s";
    place.db().await.query_one(sql, &[&run]).await.expect(sql).get(0)
}

/// A partner whose key is not known yet, with so many of its messages among the dead letters.
async fn refused(test: &str, count: usize) -> (Place, Partner, Vec<Reservation>) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    // Any other key: everything of the partner is there but the key it signs with.
    let mut keyless = partner.clone();
    keyless.key = crate::kit::partner::new_key();
    place.register(&keyless).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

async fn collected(place: &Place, messages: &[Message]) {
    let worker = place.ready_worker(&SETTINGS).await;
    place.publish(messages).await;
    in_state(place, "open", i64::try_from(messages.len()).expect("few")).await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    assert_eq!(place.line().depth("settlement.dead").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replayed_message_settles_in_its_row() {
    let (place, partner, reservations) = refused("settles", 30).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    collected(&place, &messages).await;
    let run = replay_all(&place).await;
    // Still without its key: every one fails again, in its own row, and is no second dead letter.
    let dead = place.dead.seen().len();
    let worker = place.ready_worker(&SETTINGS).await;
    in_state(&place, "open", 30).await;
    assert_eq!(came_to(&place, run).await, "judged rejected signature_mismatch 30");
    let db = place.db().await;
    let twice = "SELECT count(*) FROM settled.dead_letters
                 WHERE times_seen = 2 AND replays = 1 AND verdict = 'rejected' AND last_failed_at = judged_at
                   AND reason = 'signature_mismatch' AND leased_until IS NULL AND batch_id IN (
                       SELECT id FROM settled.batches WHERE source = 'replayed')";
    assert_eq!(number(&db, twice).await, 30);
    place.add_key(&partner).await;
    let run = replay_all(&place).await;
    in_state(&place, "settled", 30).await;
    assert_eq!(came_to(&place, run).await, "judged settled 30");
    // Replaying what settled meanwhile moves nothing.
    db.batch_execute("UPDATE settled.dead_letters SET state = 'open' WHERE seq <= 10")
        .await
        .expect("reopened");
    let run = replay_all(&place).await;
    in_state(&place, "settled", 30).await;
    assert_eq!(came_to(&place, run).await, "judged duplicate 10");
    let sql = "SELECT count(*) FROM settled.dead_letters WHERE verdict = 'duplicate' AND replays = 3";
    assert_eq!(number(&db, sql).await, 10);
    place.settle_up(worker).await;
    assert_eq!(place.dead.seen().len(), dead, "no second dead letter");
    assert_eq!(place.line().depth("settlement.dead").await, 0);
}

/// The broker user that a partner is bound to comes with the stored message, and not from a header of anybody's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replayed_message_keeps_its_broker_user() {
    let place = Place::new("user").await;
    let partner = Partner::new("acme");
    let mut keyless = partner.clone();
    keyless.key = crate::kit::partner::new_key();
    let user = userinfo(&place.broker_url).0.to_owned();
    place.register_with(&keyless, &["--broker-user", &user]).await;
    place.deposit(&partner, "BTC", "1000").await;
    let reservations = [partner.allocation("BTC", "1"), partner.allocation("BTC", "1")];
    place.reserve(&reservations).await;
    let bound = partner
        .cleared(&reservations[0])
        .with(|properties| properties.with_user_id(user.as_str().into()));
    let mut headers = lapin::types::FieldTable::default();
    let value = lapin::types::AMQPValue::LongString(user.as_str().into());
    headers.insert("settled-origin-user-id".into(), value);
    let forged = partner
        .cleared(&reservations[1])
        .with(|properties| properties.with_headers(headers));
    collected(&place, &[bound, forged.expecting(Expect::Refused("sender_mismatch"))]).await;
    place.add_key(&partner).await;
    let run = replay_all(&place).await;
    let worker = place.ready_worker(&SETTINGS).await;
    in_state(&place, "settled", 1).await;
    in_state(&place, "open", 1).await;
    assert_eq!(
        came_to(&place, run).await,
        "judged rejected sender_mismatch 1, judged settled 1"
    );
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_may_park_and_what_becomes_of_it_goes_to_its_row() {
    let (place, partner, _) = refused("parks", 0).await;
    let late: Vec<Reservation> = (0..3).map(|_| partner.allocation("BTC", "1")).collect();
    let never = partner.allocation("BTC", "1");
    let mut messages: Vec<Message> = late.iter().map(|reservation| partner.cleared(reservation)).collect();
    messages.push(partner.cleared(&never).expecting(Expect::Any));
    collected(&place, &messages).await;
    place.add_key(&partner).await;
    let settings = [&SETTINGS[..], &[("SETTLED_PARK__DEADLINE", "6s")]].concat();
    let worker = place.ready_worker(&settings).await;
    let run = replay_all(&place).await;
    in_state(&place, "parked", 4).await;
    let db = place.db().await;
    let linked = "SELECT count(*) FROM settled.parked AS p JOIN settled.dead_letters AS d ON d.id = p.dead_letter_id
                  WHERE d.body = p.body AND d.verdict = 'parked' AND d.replays = 1";
    assert_eq!(number(&db, linked).await, 4);
    assert_eq!(came_to(&place, run).await, "judged parked allocation_not_found 4");
    // Replayed again while it waits: parked, nothing written, the deadline unchanged.
    let until_before = number(
        &db,
        "SELECT sum(extract(epoch FROM until) * 1000)::bigint FROM settled.parked",
    )
    .await;
    db.batch_execute("UPDATE settled.dead_letters SET state = 'open' WHERE seq = 1")
        .await
        .expect("reopened");
    let again = replay_all(&place).await;
    in_state(&place, "due", 0).await;
    assert_eq!(came_to(&place, again).await, "judged parked allocation_not_found 1");
    let until_after = number(
        &db,
        "SELECT sum(extract(epoch FROM until) * 1000)::bigint FROM settled.parked",
    )
    .await;
    assert_eq!(until_before, until_after);
    assert_eq!(
        number(&db, "SELECT count(*) FROM settled.parkings WHERE step = 'parked'").await,
        4
    );
    // Their allocations come; one does not, and its time is up.
    place.reserve(&late).await;
    in_state(&place, "settled", 3).await;
    in_state(&place, "open", 1).await;
    let sql = "SELECT count(*) FROM settled.dead_letters
               WHERE state = 'open' AND verdict = 'rejected' AND reason = 'allocation_not_found' AND times_seen = 2";
    assert_eq!(number(&db, sql).await, 1);
    assert_eq!(
        came_to(&place, run).await,
        "judged parked allocation_not_found 4",
        "the first verdict stays"
    );
    let dead = place.dead.seen().len();
    place.settle_up(worker).await;
    assert_eq!((place.dead.seen().len(), dead), (4, 4), "no second dead letter");
}

/// Only what a running run asks for is taken, and a verdict that is under way counts, whatever was decided meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_run_takes_no_more() {
    let (place, partner, reservations) = refused("cancelled", 4).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    collected(&place, &messages).await;
    place.add_key(&partner).await;
    let run = replay_all(&place).await;
    let db = place.db().await;
    db.batch_execute("UPDATE settled.runs SET state = 'stopped'")
        .await
        .expect("stopped");
    let worker = place.ready_worker(&SETTINGS).await;
    // Somebody else's message settles meanwhile, so the intakes have had their turn.
    let other = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&other)).await;
    place.publish(&[partner.cleared(&other)]).await;
    place.rest().await;
    assert_eq!(came_to(&place, run).await, "due 4");
    db.batch_execute("UPDATE settled.runs SET state = 'running'")
        .await
        .expect("running");
    in_state(&place, "settled", 4).await;
    assert_eq!(came_to(&place, run).await, "judged settled 4");
    place.settle_up(worker).await;
}

/// What the database refuses alone becomes `internal` in its own row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_that_the_database_refuses_is_found() {
    let (place, partner, reservations) = refused("culprit", 20).await;
    let mut messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    let culprit = partner
        .draft(&reservations[7], "cleared")
        .set("partnersAllocationId", "the one that is refused");
    messages[7] = culprit.message(Expect::Refused("internal"));
    collected(&place, &messages).await;
    place.add_key(&partner).await;
    let refuse = "ALTER TABLE settled.allocations ADD CONSTRAINT refused
                  CHECK (partner_external_id IS DISTINCT FROM 'the one that is refused')";
    place.db().await.batch_execute(refuse).await.expect(refuse);
    let run = replay_all(&place).await;
    let worker = place.ready_worker(&SETTINGS).await;
    in_state(&place, "settled", 19).await;
    in_state(&place, "open", 1).await;
    assert_eq!(
        came_to(&place, run).await,
        "judged rejected internal 1, judged settled 19"
    );
    let sql = "SELECT reason, times_seen FROM settled.dead_letters WHERE state = 'open'";
    let row = place.db().await.query_one(sql, &[]).await.expect("the culprit");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i64>(1)), ("internal", 2));
    place.rest().await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    assert_eq!(place.line().depth("settlement.dead").await, 0);
}

/// A claim is bounded by what the bodies weigh: one large message always fits, and many small ones fit together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_replays_are_judged_in_few_batches() {
    let (place, partner, reservations) = refused("batches", 400).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    collected(&place, &messages).await;
    place.add_key(&partner).await;
    let run = replay_all(&place).await;
    let worker = place.ready_worker(&SETTINGS).await;
    in_state(&place, "settled", 400).await;
    assert_eq!(came_to(&place, run).await, "judged settled 400");
    let db = place.db().await;
    let batches = number(&db, "SELECT count(*) FROM settled.batches WHERE source = 'replayed'").await;
    assert!((2..=4).contains(&batches), "{batches} batches of at most 256");
    assert_eq!(worker.terminate().await.code(), Some(0));
    // Bodies of a kilobyte: one at a time where no more than that may be in a batch.
    db.batch_execute("UPDATE settled.dead_letters SET state = 'open' WHERE seq % 40 = 0")
        .await
        .expect("reopened");
    let run = replay_all(&place).await;
    let settings = [&SETTINGS[..], &[("SETTLED_WORKER__BATCH_MAX_BYTES", "1024")]].concat();
    let worker = place.ready_worker(&settings).await;
    in_state(&place, "settled", 400).await;
    assert_eq!(came_to(&place, run).await, "judged duplicate 10");
    let now = number(&db, "SELECT count(*) FROM settled.batches WHERE source = 'replayed'").await;
    assert_eq!(now - batches, 10);
    place.settle_up(worker).await;
}

/// Parked messages and replays take turns: however many replays are due, a message whose allocation came settles at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_parked_messages_nor_replays_starve() {
    let (place, partner, reservations) = refused("turns", 300).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    collected(&place, &messages).await;
    place.add_key(&partner).await;
    // One replay a batch: many turns.
    let settings = [&SETTINGS[..], &[("SETTLED_WORKER__BATCH_MAX_BYTES", "1024")]].concat();
    let worker = place.ready_worker(&settings).await;
    let late = partner.allocation("BTC", "1");
    place.publish(&[partner.cleared(&late)]).await;
    let db = place.db().await;
    until("it is parked", PATIENCE, async || {
        (number(&db, "SELECT count(*) FROM settled.parked").await == 1).then_some(())
    })
    .await;
    replay_all(&place).await;
    until("replays are under way", PATIENCE, async || {
        (number(&db, "SELECT count(*) FROM settled.dead_letters WHERE state = 'settled'").await > 0).then_some(())
    })
    .await;
    place.reserve(std::slice::from_ref(&late)).await;
    let sql = "SELECT count(*) FROM settled.allocations WHERE id = $1 AND status = 'cleared'";
    until("it is settled", PATIENCE, async || {
        let settled: i64 = db.query_one(sql, &[&late.id]).await.expect(sql).get(0);
        (settled == 1).then_some(())
    })
    .await;
    let due = number(&db, "SELECT count(*) FROM settled.dead_letters WHERE state = 'due'").await;
    assert!(due > 0, "before the replays were through");
    in_state(&place, "settled", 300).await;
    place.settle_up(worker).await;
}

/// A message of a format that this version can not read waits for one that can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_format_of_a_later_version_waits() {
    let (place, partner, reservations) = refused("format", 2).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    collected(&place, &messages).await;
    place.add_key(&partner).await;
    place
        .tamper("UPDATE settled.dead_letters SET format = 2 WHERE seq = 1")
        .await;
    let run = replay_all(&place).await;
    let worker = place.ready_worker(&SETTINGS).await;
    in_state(&place, "settled", 1).await;
    until("the other one is noticed", PATIENCE, async || {
        let (_, text) = worker.get("/metrics").await.expect("metrics");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("settled_replays_unreadable_total "));
        line.and_then(|count| count.parse::<f64>().ok())
            .filter(|count| *count >= 1.0)
    })
    .await;
    assert_eq!(came_to(&place, run).await, "due 1, judged settled 1");
    place.tamper("UPDATE settled.dead_letters SET format = 1").await;
    in_state(&place, "settled", 2).await;
    place.settle_up(worker).await;
}

/// Two slow hands on one dead letter: whatever the later one found, what settled stays settled, and what waits, waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_verdict_undoes_nothing() {
    let (place, partner, reservations) = refused("late", 1).await;
    collected(&place, &[partner.cleared(&reservations[0])]).await;
    let db = place.db().await;
    // As if judged by a worker that was too slow: the row is another's already.
    for (state, stays) in [
        ("settled", "settled"),
        ("discarded", "discarded"),
        ("parked", "parked"),
        ("open", "open"),
    ] {
        let run = {
            db.batch_execute(
                "UPDATE settled.dead_letters SET state = 'open', discarded_at = NULL, verdict = NULL,
                               leased_until = NULL",
            )
            .await
            .expect("open");
            replay_all(&place).await
        };
        // The claim sees it as due; the verdict finds it changed: a trigger plays the quicker one.
        let sql = format!(
            "CREATE OR REPLACE FUNCTION overtake() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.leased_until IS NOT NULL THEN
                     NEW.state := '{state}';
                     NEW.discarded_at := CASE '{state}' WHEN 'discarded' THEN now() END;
                 END IF;
                 RETURN NEW;
             END $$;
             DROP TRIGGER IF EXISTS overtake ON settled.dead_letters;
             CREATE TRIGGER overtake BEFORE UPDATE ON settled.dead_letters FOR EACH ROW EXECUTE FUNCTION overtake()"
        );
        db.batch_execute(&sql).await.expect("a trigger");
        let before = number(&db, "SELECT count(*) FROM settled.batches WHERE source = 'replayed'").await;
        let worker = place.ready_worker(&SETTINGS).await;
        until("it is judged", PATIENCE, async || {
            let now = number(&db, "SELECT count(*) FROM settled.batches WHERE source = 'replayed'").await;
            (now > before).then_some(())
        })
        .await;
        assert_eq!(worker.terminate().await.code(), Some(0));
        let row = db
            .query_one("SELECT state, verdict FROM settled.dead_letters", &[])
            .await
            .expect("a row");
        let (now, verdict): (String, Option<String>) = (row.get(0), row.get(1));
        assert_eq!(now, stays);
        let noted = if state == "settled" { None } else { Some("rejected") };
        assert_eq!(verdict.as_deref(), noted, "{state}");
        let items = came_to(&place, run).await;
        let expected = if state == "settled" {
            "due 1"
        } else {
            "judged rejected signature_mismatch 1"
        };
        assert_eq!(items, expected, "{state}");
    }
}

/// A claim that another one overtook finds a duplicate: the row keeps the verdict and the batch that its money is found by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_duplicate_does_not_hide_what_settled() {
    let (place, partner, reservations) = refused("late_duplicate", 1).await;
    collected(&place, &[partner.cleared(&reservations[0])]).await;
    place.add_key(&partner).await;
    let run = replay_all(&place).await;
    let worker = place.ready_worker(&SETTINGS).await;
    in_state(&place, "settled", 1).await;
    let db = place.db().await;
    let row = async || {
        let sql = "SELECT concat_ws(' ', state, verdict, replays, batch_id, judged_at) FROM settled.dead_letters";
        db.query_one(sql, &[]).await.expect("a row").get::<_, String>(0)
    };
    let settled = row().await;
    assert!(settled.starts_with("settled settled 1 "), "{settled}");
    // A trigger plays the quicker hand: what is claimed as due settled before its verdict is written.
    let sql = "CREATE FUNCTION overtake() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                   NEW.state := 'settled';
                   NEW.run_id := OLD.run_id;
                   RETURN NEW;
               END $$;
               CREATE TRIGGER overtake BEFORE UPDATE ON settled.dead_letters FOR EACH ROW
                   WHEN (NEW.leased_until IS NOT NULL) EXECUTE FUNCTION overtake();
               UPDATE settled.dead_letters SET state = 'open'";
    db.batch_execute(sql).await.expect("a trigger");
    replay_all(&place).await;
    until("the late one is judged", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.batches WHERE source = 'replayed' AND duplicate = 1";
        (number(&db, sql).await == 1).then_some(())
    })
    .await;
    assert_eq!(row().await, settled);
    let shown = place.json(&["dead-letters", "runs", "show", &run.to_string()]).await;
    assert_eq!(shown["money"][0]["moved"], json!("1"), "{shown}");
    place.settle_up(worker).await;
}

#[cfg(feature = "faults")]
mod killed {
    use std::os::unix::process::ExitStatusExt;

    use settled::fail::Point;

    use super::*;

    /// Dead letters of every kind come, and are replayed once they are all there; a worker dies at the fault, and another
    /// one goes on. Then each message is one row, counted once, and has one effect.
    async fn killed_at(test: &str, fault: &str) {
        let (place, partner, reservations) = refused(test, 40).await;
        let mut messages: Vec<Message> = reservations
            .iter()
            .map(|reservation| partner.cleared(reservation))
            .collect();
        for number in 0..20 {
            let body = format!("junk {number}");
            messages.push(Message::new(
                "acme.allocation.update",
                body,
                Expect::Refused("malformed_message"),
            ));
        }
        // What expires before a lane sees it is told and counted by the collector alone.
        let expiring: Vec<Message> = (0..10)
            .map(|number| {
                let body = format!("expired {number}");
                let message = Message::new("acme.allocation.update", body, Expect::Refused("expired"));
                message.with(|properties| properties.with_expiration("1".into()))
            })
            .collect();
        place.publish(&expiring).await;
        until("they expire", PATIENCE, async || {
            (place.line().depth("settlement.dead").await == 10).then_some(())
        })
        .await;
        let settings = [
            &SETTINGS[..],
            &[
                ("SETTLED_DEAD_LETTERS__BATCH_MAX", "8"),
                ("SETTLED_WORKER__BATCH_MAX", "8"),
            ],
        ]
        .concat();
        let faulty = [&settings[..], &[("SETTLED_FAULT", fault)]].concat();
        let replays = fault.starts_with("replay");
        let mut worker = if replays {
            place.ready_worker(&settings).await
        } else {
            place.worker(&faulty)
        };
        place.publish(&messages).await;
        if !replays {
            assert_eq!(worker.end().await.signal(), Some(9), "{fault}: {}", worker.said());
            worker = place.worker(&settings);
        }
        in_state(&place, "open", 70).await;
        place.add_key(&partner).await;
        if replays {
            assert_eq!(worker.terminate().await.code(), Some(0));
            worker = place.worker(&faulty);
        }
        let run = replay_all(&place).await;
        if replays {
            assert_eq!(worker.end().await.signal(), Some(9), "{fault}: {}", worker.said());
            worker = place.worker(&settings);
        }
        in_state(&place, "settled", 40).await;
        in_state(&place, "open", 30).await;
        let db = place.db().await;
        let sql = "SELECT count(*) FROM settled.run_items WHERE state <> 'judged'";
        until("every item has its verdict", PATIENCE, async || {
            (number(&db, sql).await == 0).then_some(())
        })
        .await;
        let expected = "judged rejected malformed_message 30, judged settled 40";
        assert_eq!(came_to(&place, run).await, expected);
        assert_eq!(
            number(&db, "SELECT count(*) FROM settled.dead_letters").await,
            70,
            "one row a message"
        );
        // Each failed once, or twice where its replay was refused; a worker that dies between commit and acknowledgement may
        // have judged it once more, and its relay published once more. The broker gives up only once.
        let sql = "SELECT count(*) FROM settled.dead_letters
                   WHERE times_seen NOT BETWEEN 1 + (state = 'open')::int AND 3 + (state = 'open')::int
                      OR body LIKE 'expired%'::bytea AND times_seen <> 2";
        assert_eq!(number(&db, sql).await, 0);
        let sql = "SELECT count(*) FROM settled.dead_letters WHERE replays <> 1";
        assert_eq!(number(&db, sql).await, 0, "a verdict is written once");
        let sql = "SELECT sum(received)::bigint FROM settled.batches WHERE source = 'dead'";
        assert_eq!(number(&db, sql).await, 10, "what the broker gave up is counted once");
        place.settle_up(worker).await;
        assert_eq!(place.line().depth("settlement.dead").await, 0);
    }

    macro_rules! points {
        ($($name:ident: $fault:literal;)*) => {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    killed_at(stringify!($name), $fault).await;
                }
            )*

            /// A new point of the desk gets its test.
            #[test]
            fn every_point_of_the_desk_is_tested() {
                let points = Point::ALL.iter().filter(|point| point.is_of_the_desk());
                let names: Vec<&str> = points.map(|point| point.name()).collect();
                assert_eq!(names, [$(stringify!($name)),*]);
            }
        };
    }

    points! {
        collector_received: "collector_received:3";
        dead_letters_filed: "dead_letters_filed:3";
        collector_committed: "collector_committed:3";
        collector_acked: "collector_acked:3";
        replay_claimed: "replay_claimed:2";
        replay_judged: "replay_judged:2";
        replay_committed: "replay_committed:2";
    }
}

/// An id that is asked for and is no dead letter of ours: nothing comes of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purged_row_takes_no_verdict() {
    let (place, partner, reservations) = refused("purged", 1).await;
    collected(&place, &[partner.cleared(&reservations[0])]).await;
    place.add_key(&partner).await;
    let db = place.db().await;
    // Gone as soon as it is claimed, as no command does it.
    let sql = "ALTER TABLE settled.dead_letters DISABLE TRIGGER done_with;
               CREATE FUNCTION purge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                   IF NEW.leased_until IS NOT NULL THEN
                       DELETE FROM settled.dead_letters WHERE id = NEW.id;
                   END IF;
                   RETURN NULL;
               END $$;
               CREATE TRIGGER purge AFTER UPDATE ON settled.dead_letters FOR EACH ROW EXECUTE FUNCTION purge()";
    db.batch_execute(sql).await.expect("a trigger");
    replay_all(&place).await;
    let worker = place.ready_worker(&SETTINGS).await;
    let id: Uuid = reservations[0].id;
    until("it settles all the same", PATIENCE, async || {
        let shown = place.json(&["allocation", "show", &id.to_string()]).await;
        (shown["allocation"]["status"] == json!("cleared")).then_some(())
    })
    .await;
    assert_eq!(number(&db, "SELECT count(*) FROM settled.dead_letters").await, 0);
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// Nobody is told by a row that is gone: what its replay parked ends as a dead letter again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_parked_after_a_purge_can_fail_again() {
    let (place, partner, _) = refused("purged_parked", 0).await;
    let never = partner.allocation("BTC", "1");
    collected(&place, &[partner.cleared(&never).expecting(Expect::Any)]).await;
    place.add_key(&partner).await;
    let db = place.db().await;
    // Gone as soon as it is claimed, as no command does it.
    let sql = "ALTER TABLE settled.dead_letters DISABLE TRIGGER done_with;
               CREATE FUNCTION purge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                   DELETE FROM settled.dead_letters WHERE id = NEW.id;
                   RETURN NULL;
               END $$;
               CREATE TRIGGER purge AFTER UPDATE ON settled.dead_letters FOR EACH ROW
                   WHEN (NEW.leased_until IS NOT NULL) EXECUTE FUNCTION purge()";
    db.batch_execute(sql).await.expect("a trigger");
    replay_all(&place).await;
    let settings = [&SETTINGS[..], &[("SETTLED_PARK__DEADLINE", "2s")]].concat();
    let worker = place.ready_worker(&settings).await;
    in_state(&place, "open", 1).await;
    let sql = "SELECT count(*) FROM settled.parkings WHERE step = 'parked'";
    assert_eq!(number(&db, sql).await, 1, "its replay parked it");
    let sql = "SELECT count(*) FROM settled.dead_letters WHERE reason = 'allocation_not_found' AND times_seen = 1";
    until("its time is up", PATIENCE, async || {
        (number(&db, sql).await == 1).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

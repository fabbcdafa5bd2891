//! `settled reconcile`: what batches counted and what they wrote agree at every moment of real work, and whatever is spoilt
//! is named, by it and by `settled ledger check`, each in what it proves.

use jiff::Timestamp;
use serde_json::Value;
use tokio_postgres::Client;

use crate::kit::{
    command::{Answer, ask},
    support::{Ground, PATIENCE, Place, until},
    traffic::{Mix, Traffic, prepare, publish_in_lots, reserve_late},
};

/// Some of everything.
const MIX: Mix = Mix {
    valid: 60,
    rivals: true,
    invalid: true,
    parked: 4,
    late: 4,
};

/// The numbers of a line: `settled = settlements, ..` is found by its two names.
fn line<'a>(document: &'a Value, left: &str, right: &str) -> &'a Value {
    let mut lines = document["lines"].as_array().into_iter().flatten();
    lines
        .find(|line| line["left"]["what"] == left && line["right"]["what"] == right)
        .unwrap_or_else(|| panic!("no line {left} .. {right} in {document}"))
}

fn problems(document: &Value) -> Vec<&str> {
    document["problems"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

async fn count(db: &Client, sql: &str) -> i64 {
    db.query_one(sql, &[]).await.expect(sql).get(0)
}

/// Real traffic to its end, but for the messages whose allocation never comes: these wait.
async fn worked(test: &str) -> Place {
    let place = Place::new(test).await;
    let Traffic { messages, late } = prepare(&place, 11, &MIX).await;
    let worker = place.ready_worker(&[("SETTLED_PARK__FIRST_RETRY", "100ms")]).await;
    publish_in_lots(&place, &messages).await;
    reserve_late(&place, &late, &worker).await;
    place.rest().await;
    worker.terminate().await;
    place
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_every_moment_of_the_work_it_agrees() {
    let place = Place::new("reconcile_at_work").await;
    let Traffic { messages, late } = prepare(&place, 12, &MIX).await;
    let worker = place
        .ready_worker(&[
            ("SETTLED_PARK__FIRST_RETRY", "100ms"),
            ("SETTLED_WORKER__BATCH_MAX", "8"),
            ("SETTLED_DEAD_LETTERS__COLLECT", "true"),
        ])
        .await;
    let asked = async {
        let mut seen = Vec::new();
        while seen.len() < 12 {
            let document = ask(&place, &["reconcile", "--since", "1h"]).await.document(0);
            seen.push(line(&document, "received", "settled + duplicate + parked + rejected")["left"]["count"].clone());
        }
        seen
    };
    let (seen, ()) = tokio::join!(asked, async {
        publish_in_lots(&place, &messages).await;
        reserve_late(&place, &late, &worker).await;
        place.rest().await;
    });
    assert!(seen.is_sorted_by_key(|count| count.as_i64()), "{seen:?}");
    let db = place.db().await;
    let collected = "SELECT count(*) FROM settled.dead_letters WHERE made_by = 'settled'";
    let some = async || (count(&db, collected).await > 0).then_some(());
    until("dead letters are collected", PATIENCE, some).await;
    worker.terminate().await;

    // At rest, against what the tables say by themselves.
    let whole = ask(&place, &["reconcile", "--since", "1h"]).await.document(0);
    for (left, right, sql) in [
        (
            "settled",
            "settlements, with what authorised them",
            "SELECT count(*) FROM settled.settlements",
        ),
        (
            "settled",
            "transfers that settle",
            "SELECT count(*) FROM settled.transfers WHERE step = 1",
        ),
        (
            "receipts that say settled",
            "settled",
            "SELECT sum(settled)::bigint FROM settled.batches",
        ),
        (
            "receipts that say rejected",
            "rejected",
            "SELECT sum(rejected)::bigint FROM settled.batches",
        ),
        (
            "messages that wait now",
            "parked and not left yet, of all time",
            "SELECT count(*) FROM settled.parked",
        ),
    ] {
        let line = line(&whole, left, right);
        let counted = count(&db, sql).await;
        assert!(counted > 0, "{sql}");
        assert_eq!(line["right"]["count"], counted, "{left}: {line}");
        assert_eq!((&line["ok"], &line["differsBy"]), (&true.into(), &0.into()), "{line}");
    }

    let dead = &line(&whole, "messages that were refused and collected", "rejected")["left"]["count"];
    assert_eq!(*dead, count(&db, collected).await);

    // Wherever it is cut, both parts agree, and add up to the whole.
    let received = |document: &Value| -> i64 {
        line(document, "received", "settled + duplicate + parked + rejected")["left"]["count"]
            .as_i64()
            .expect("a number")
    };
    let rows = db
        .query("SELECT DISTINCT at FROM settled.batches ORDER BY at", &[])
        .await
        .expect("batches");
    let times: Vec<Timestamp> = rows.iter().map(|row| row.get(0)).collect();
    for at in times.iter().skip(1).step_by(times.len().div_ceil(4)) {
        let edge = format!("{at:.3}");
        let before = ask(&place, &["reconcile", "--since", "1h", "--until", &edge])
            .await
            .document(0);
        let after = ask(&place, &["reconcile", "--since", &edge]).await.document(0);
        assert_eq!(after["since"], edge.as_str());
        assert_eq!(received(&before) + received(&after), received(&whole), "cut at {edge}");
        assert!(received(&before) > 0 && received(&after) > 0, "cut at {edge}");
    }
    let nothing = ask(&place, &["reconcile", "--since", "1ms"]).await.document(0);
    assert_eq!(received(&nothing), 0);
    place.audit().await;
}

/// Each table's rows as they are, to be put back.
const TABLES: [&str; 8] = [
    "batches",
    "transfers",
    "receipts",
    "parked",
    "parkings",
    "outbox",
    "outbox_refused",
    "dead_letters",
];

/// The owner's hand: no trigger and no constraint between tables stands in the way.
async fn as_owner(db: &mut Client, sql: &str) {
    let transaction = db.transaction().await.expect("a transaction");
    let sql = format!("SET LOCAL session_replication_role = replica; {sql}");
    transaction
        .batch_execute(&sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    transaction.commit().await.expect("a commit");
}

async fn put_back(db: &mut Client) {
    let mut sql = String::new();
    for table in TABLES {
        let columns = "SELECT string_agg(quote_ident(column_name), ', ') FROM information_schema.columns
                       WHERE table_schema = 'settled' AND table_name = $1 AND is_generated = 'NEVER'";
        let columns: String = db.query_one(columns, &[&table]).await.expect("columns").get(0);
        sql += &format!(
            "DELETE FROM settled.{table};
             INSERT INTO settled.{table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM kept_{table};"
        );
    }
    as_owner(db, &sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spoilt_accounts_of_messages_are_named() {
    let place = worked("reconcile_spoilt").await;
    let ground: &Ground = &place;
    let good = ask(ground, &["reconcile", "--since", "1h"]).await.document(0);
    assert_eq!((&good["ok"], problems(&good).len()), (&true.into(), 0), "{good}");
    let mut db = place.db().await;
    // What a CHECK refuses can be spoilt only by who may take the CHECK away.
    let check = "ALTER TABLE settled.batches DROP CONSTRAINT batches_check";
    db.batch_execute(check).await.expect("the owner");
    for table in TABLES {
        let sql = format!("CREATE TEMPORARY TABLE kept_{table} AS SELECT * FROM settled.{table}");
        db.batch_execute(&sql).await.expect("a copy");
    }
    let one = async |condition: &str| -> uuid::Uuid {
        let sql = format!("SELECT id FROM settled.batches WHERE {condition} ORDER BY id LIMIT 1");
        db.query_one(&sql, &[]).await.expect(condition).get(0)
    };
    let (batch, refuser) = (one("settled > 0").await, one("rejected > 0").await);
    let of_batch = async |batch: uuid::Uuid, what: &str| {
        count(
            &db,
            &format!("SELECT {what}::bigint FROM settled.batches WHERE id = '{batch}'"),
        )
        .await
    };
    let settled = of_batch(batch, "settled").await;
    let received = of_batch(batch, "received").await;
    let rejected = of_batch(refuser, "rejected").await;
    let receipts = count(&db, "SELECT count(*) FROM settled.receipts").await;
    let key = db
        .query_one("SELECT key FROM settled.parked LIMIT 1", &[])
        .await
        .expect("one waits");
    let key: uuid::Uuid = key.get(0);
    let refused = count(&db, "SELECT sum(rejected)::bigint FROM settled.batches").await;

    // What is done, the sentence that must name it, and whether the ledger's check sees it too.
    let spoilt: Vec<(String, String, bool)> = vec![
        (
            format!("UPDATE settled.batches SET received = received + 1 WHERE id = '{batch}'"),
            format!(
                "batch {batch}: {} received, and {received} settled + duplicate + parked + rejected",
                received + 1
            ),
            true,
        ),
        (
            format!("UPDATE settled.batches SET reasons = '{{}}' WHERE id = '{refuser}'"),
            format!("batch {refuser}: {rejected} rejected, and 0 rejected, summed by reason"),
            true,
        ),
        (
            format!("UPDATE settled.batches SET settled = settled + 2, received = received + 2 WHERE id = '{batch}'"),
            format!("batch {batch}: {} settled, and {settled} transfers that settle", settled + 2),
            true,
        ),
        (
            format!(
                "UPDATE settled.transfers SET receipt_key = gen_random_uuid() WHERE step = 1 AND subject_id =
                 (SELECT allocation_id FROM settled.settlements WHERE batch_id = '{batch}' LIMIT 1)"
            ),
            format!(
                "batch {batch}: {settled} settled, and {} settlements, with what authorised them",
                settled - 1
            ),
            true,
        ),
        (
            format!("DELETE FROM settled.transfers WHERE batch_id = '{batch}'"),
            format!("batch {batch}: {settled} settled, and 0 transfers that settle"),
            true,
        ),
        (
            "ALTER TABLE settled.transfers DROP CONSTRAINT transfers_authority;
             UPDATE settled.transfers SET batch_id = NULL WHERE step = 1"
                .to_owned(),
            "no batch: 0 settled, and".to_owned(),
            true,
        ),
        (
            // The sums stay as they were: one too many here, one too few there.
            format!(
                "UPDATE settled.receipts SET batch_id = '{batch}' WHERE key =
                 (SELECT key FROM settled.receipts WHERE verdict = 'settled' AND batch_id <> '{batch}' LIMIT 1)"
            ),
            format!(
                "batch {batch}: {} receipts that say settled, and {settled} settled",
                settled + 1
            ),
            true,
        ),
        (
            "UPDATE settled.receipts SET verdict = 'duplicate' WHERE verdict = 'settled'".to_owned(),
            format!("batch {batch}: 0 receipts that say settled, and {settled} settled"),
            true,
        ),
        (
            format!("UPDATE settled.receipts SET verdict = 'rejected', reason = 'internal', batch_id = '{refuser}'"),
            format!("batch {refuser}: {receipts} receipts that say rejected, and {rejected} rejected"),
            true,
        ),
        (
            "UPDATE settled.receipts SET verdict = 'parked', batch_id = gen_random_uuid() WHERE verdict = 'parked'".to_owned(),
            ": 1 receipts that say parked, and 0 parked".to_owned(),
            false,
        ),
        (
            format!("DELETE FROM settled.parked WHERE key = '{key}'"),
            format!("parked message {key}: 0 messages that wait now, and 1 parked and not left yet, of all time"),
            false,
        ),
        (
            format!("DELETE FROM settled.parkings WHERE key = '{key}'"),
            format!("parked message {key}: 1 messages that wait now, and 0 parked and not left yet, of all time"),
            false,
        ),
        (
            format!(
                "INSERT INTO settled.parkings (key, allocation_id, step, at)
                 SELECT '{key}', gen_random_uuid(), step, now() - interval '1 second' FROM (VALUES ('parked'), ('left')) AS s (step)"
            ),
            ": 1 messages that began to wait, and 0 parked".to_owned(),
            false,
        ),
        (
            format!(
                "INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
                 VALUES ('{batch}', 1, '', 100000, now(), now())"
            ),
            format!("outbox row of batch {batch}: 100000 events and dead letters still to publish, of all time, and"),
            false,
        ),
        (
            format!(
                "INSERT INTO settled.outbox_refused (batch_id, format, publications, refusal)
                 VALUES ('{batch}', 1, '', 'PRECONDITION_FAILED')"
            ),
            format!("batch {batch}, refused by the broker: PRECONDITION_FAILED: 1 events and dead letters that the broker refused"),
            false,
        ),
        (
            format!(
                "INSERT INTO settled.dead_letters (id, exchange, routing_key, digest, format, properties, body, reason,
                     detail, group_id, made_by, first_failed_at, last_failed_at, collected_at)
                 SELECT gen_random_uuid(), 'x', 'x', sha256('x'), 1, '{{}}', 'x', 'internal', 'x', 'x', 'settled', now(), now(), now()
                 FROM generate_series(0, {refused})"
            ),
            format!("messages that were refused and collected, and {refused} rejected"),
            false,
        ),
    ];
    for (sql, sentence, by_the_ledger) in spoilt {
        as_owner(&mut db, &sql).await;
        let bad = ask(ground, &["reconcile", "--since", "1h"]).await.document(1);
        assert_eq!(bad["ok"], false, "{sql}");
        assert!(
            problems(&bad).iter().any(|problem| problem.contains(&sentence)),
            "{sql}: {sentence:?} in {:?}",
            problems(&bad)
        );
        let wrong = bad["lines"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|line| line["ok"] == false);
        assert!(wrong.clone().count() > 0, "{sql}");
        assert!(
            wrong.clone().all(|line| line["differsBy"].as_i64() > Some(0)),
            "{sql}: {bad}"
        );
        // People are told the same, with what to do.
        let said = ground.run(&["reconcile", "--since", "1h"]).await;
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert_eq!(
            (said.status.code(), said.stderr.as_slice()),
            (Some(1), &[][..]),
            "{sql}"
        );
        assert!(text.contains(&sentence) && text.contains(": differs by "), "{text}");
        let advice = wrong.filter_map(|line| line["do"].as_str());
        assert!(advice.into_iter().all(|advice| text.contains(advice)), "{text}");
        let ledger = ask(ground, &["ledger", "check"]).await;
        let checked = ledger.document(if by_the_ledger { 1 } else { 0 });
        assert_eq!(checked["ok"], !by_the_ledger, "{sql}: {checked}");
        put_back(&mut db).await;
        let good = ask(ground, &["reconcile", "--since", "1h"]).await.document(0);
        assert_eq!(good["ok"], true, "{sql}: {good}");
    }
}

/// What is wrong although every table has as many rows as it must have: the check that only counts would be content.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn books_that_are_wrong_in_the_same_number_of_rows_are_named() {
    let place = worked("reconcile_ledger").await;
    let ground: &Ground = &place;
    let mut db = place.db().await;
    for table in TABLES {
        let sql = format!("CREATE TEMPORARY TABLE kept_{table} AS SELECT * FROM settled.{table}");
        db.batch_execute(&sql).await.expect("a copy");
    }
    let nobody = uuid::Uuid::new_v4();
    // The latest transfer, one that settles, and a settled receipt.
    let transfer = "(SELECT max(id) FROM settled.transfers)";
    let settlement = "(SELECT max(id) FROM settled.transfers WHERE step = 1)";
    // Another one of the same partner.
    let twin = "(SELECT s.receipt_key FROM settled.transfers AS s JOIN settled.receipts AS r ON r.key = s.receipt_key
                 WHERE s.id < t.id AND r.enterprise_id = (SELECT enterprise_id FROM settled.receipts WHERE key = t.receipt_key)
                 LIMIT 1)";
    let receipt = "(SELECT key FROM settled.receipts WHERE verdict = 'settled' ORDER BY key LIMIT 1)";
    for (sql, sentences) in [
        (
            format!("UPDATE settled.transfers SET credit_account = 1000000 WHERE id = {transfer}"),
            vec![
                "to account 1000000 (which does not exist)",
                "to account 1000000 instead of",
                "account 1000000 does not exist",
            ],
        ),
        (
            format!("UPDATE settled.transfers SET payload = payload || ' ' WHERE id = {settlement}"),
            vec!["what was signed is not what its receipt"],
        ),
        (
            format!("UPDATE settled.transfers AS t SET receipt_key = {twin} WHERE id = {settlement}"),
            vec!["has no settled receipt", "says settled, and there is no settlement"],
        ),
        (
            format!("UPDATE settled.transfers SET subject_id = '{nobody}' WHERE id = {transfer}"),
            vec!["in that state", "is missing"],
        ),
        (
            format!("UPDATE settled.transfers SET event = 'reserved' WHERE id = {settlement}"),
            vec!["is reserved of"],
        ),
        (
            format!("UPDATE settled.transfers SET subject_id = '{nobody}' WHERE id = {settlement}"),
            vec!["has no allocation", "its settlement is missing"],
        ),
        (
            format!("UPDATE settled.receipts SET nonce = 'another' WHERE key = {receipt}"),
            vec!["and its settlement says nonce another"],
        ),
        (
            format!("UPDATE settled.transfers SET batch_id = '{nobody}' WHERE id = {settlement}"),
            vec!["and that of its transfer"],
        ),
        (
            // Two receipts of one settlement, and another settlement without.
            format!(
                "UPDATE settled.receipts AS r SET enterprise_id = o.enterprise_id, nonce = o.nonce, allocation_id = o.allocation_id
                 FROM settled.receipts AS o
                 WHERE r.key = {receipt}
                   AND o.key = (SELECT key FROM settled.receipts WHERE verdict = 'settled' ORDER BY key DESC LIMIT 1)"
            ),
            vec!["has no settled receipt"],
        ),
    ] {
        as_owner(&mut db, &sql).await;
        println!("after {sql}");
        let bad = ask(ground, &["ledger", "check"]).await.document(1);
        for sentence in sentences {
            assert!(
                problems(&bad).iter().any(|problem| problem.contains(sentence)),
                "{sql}: {sentence:?} in {:?}",
                problems(&bad)
            );
        }
        put_back(&mut db).await;
        let good = ask(ground, &["ledger", "check"]).await.document(0);
        assert_eq!(good["ok"], true, "{sql}: {good}");
    }
}

#[tokio::test]
async fn a_window_is_a_time_or_so_long_ago_and_does_not_end_before_it_begins() {
    let ground = Ground::new("reconcile_window").await;
    ground.copy_template().await;
    let empty = ask(&ground, &["reconcile", "--since", "2020-01-01T00:00:00Z"])
        .await
        .document(0);
    assert_eq!(empty["since"], "2020-01-01T00:00:00.000Z");
    let sides = |line: &Value| (line["left"]["count"].clone(), line["right"]["count"].clone());
    let lines = empty["lines"].as_array().expect("lines");
    assert!(lines.iter().all(|line| sides(line) == (0.into(), 0.into())), "{empty}");
    for arguments in [
        &["reconcile"][..],
        &["reconcile", "--since", "yesterday"],
        &["reconcile", "--since", "24"],
        &["reconcile", "--since", "1h", "--until", "2h"],
        &[
            "reconcile",
            "--since",
            "2020-01-02T00:00:00Z",
            "--until",
            "2020-01-01T00:00:00Z",
        ],
        &[
            "reconcile",
            "--since",
            "2020-01-01T00:00:00Z",
            "--until",
            "2020-01-01T00:00:00Z",
        ],
    ] {
        let answer = Answer::of(&ground.run(&[arguments, &["--json"]].concat()).await);
        answer.refusal(2);
    }
}

//! One batch by itself over a real database: in which order it locks, and what it sees of what others commit meanwhile.

use std::time::Duration;

use settled::{
    domain::{
        reason::Reason,
        verdict::{Verdict, VerdictKind},
    },
    settle::{self, Answered, Batch, blocked::SideRoom},
    store::{
        Fate,
        held::{HeldWhy, Pack, new_ids},
    },
};
use tokio_postgres::{Client, error::SqlState};
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    in_process::{self, read, settle, settle_as},
    partner::Partner,
    support::{PATIENCE, Place, said, until},
};

fn verdict(answered: &Answered) -> &Verdict {
    let [answer] = answered.answers.as_slice() else {
        panic!("one message");
    };
    &answer.judgement.verdict
}

/// A place with a partner and reserved allocations.
async fn with_reserved(test: &str, count: usize) -> (Place, Partner, Vec<Reservation>) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

async fn run(place: &Place, arguments: &[&str]) {
    let output = place.run(arguments).await;
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
}

/// Waits until so many connections wait for a lock.
async fn until_waiting(db: &Client, how_many: i64) {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("it waits for a lock", PATIENCE, async || {
        let row = db.query_one(sql, &[]).await.expect("activity");
        (row.get::<_, i64>(0) == how_many).then_some(())
    })
    .await;
}

/// Two batches that touch the same rows lock them in the same order, whatever way the planner finds them, so that neither
/// waits for the other while the other waits for it. A batch that waits for the first of two rows has not locked the
/// second; one that waits for the second has locked the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_are_taken_in_the_order_of_keys() {
    let (place, partner, reservations) = with_reserved("lock_order", 2).await;
    let (db, holder) = (place.db().await, place.db().await);
    let clerk = in_process::clerk(&place);
    let messages = |reservations: &[Reservation]| -> Vec<Message> {
        reservations
            .iter()
            .map(|reservation| partner.cleared(reservation))
            .collect()
    };
    // Of two outcomes, so that two rows of funds move.
    let valid = read(&[partner.cleared(&reservations[0]), partner.released(&reservations[1])]).await;
    // Receipts, of two that were refused for a time.
    run(&place, &["partner", "suspend", "--enterprise-id", "acme"]).await;
    let refused = settle(&clerk, &valid).await.expect("judged");
    assert!(
        refused
            .answers
            .iter()
            .all(|answer| answer.judgement.verdict.reason() == Some(Reason::PartnerInactive))
    );
    run(&place, &["partner", "resume", "--enterprise-id", "acme"]).await;
    // Parked ones that are due.
    let unknown: Vec<Reservation> = (0..2).map(|_| partner.allocation("BTC", "1")).collect();
    settle(&clerk, &read(&messages(&unknown)).await).await.expect("parked");
    db.execute("UPDATE settled.parked SET due_at = now()", &[])
        .await
        .expect("they are due");
    let due = clerk.store.claim_due(10, 1 << 20, PATIENCE).await.expect("claimed");
    assert_eq!(due.deliveries.len(), 2);
    let due = Batch::read(due.deliveries).await;

    // Rows come as they lie in the table, and not by way of an index that has them in order.
    let plan = ["indexscan", "bitmapscan", "hashjoin", "mergejoin"]
        .map(|way| format!("ALTER DATABASE {} SET enable_{way} = off;", place.name));
    db.batch_execute(&plan.concat()).await.expect("a plan");
    let clerk = in_process::clerk(&place);
    for (table, key, column, batch) in [
        ("allocations", "id", "status", &valid),
        ("receipts", "key", "verdict", &valid),
        ("parked", "key", "attempts", &due),
        ("funds", "id", "held", &valid),
    ] {
        let touched = match table {
            "funds" => "holder <> 'world'",
            "receipts" => "reason = 'partner_inactive'",
            _ => "true",
        };
        let sql = format!("SELECT {key}::text FROM settled.{table} WHERE {touched} ORDER BY {key}");
        let rows = db.query(&sql, &[]).await.expect(table);
        let keys: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let [first, second] = keys.as_slice() else {
            panic!("{table}: {keys:?}");
        };
        // A new version of a row lies behind the others.
        let sql = format!("UPDATE settled.{table} SET {column} = {column} WHERE {key}::text = $1");
        db.execute(&sql, &[first]).await.expect(table);
        for (held, other, is_free) in [(first, second, true), (second, first, false)] {
            let lock =
                |way: &str| format!("SELECT FROM settled.{table} WHERE {key}::text = $1 FOR NO KEY UPDATE {way}");
            holder.batch_execute("BEGIN").await.expect("a transaction");
            holder.query(&lock(""), &[held]).await.expect("locked");
            let (clerk, batch) = (clerk.clone(), batch.clone());
            let trying = tokio::spawn(async move { settle::rehearse(&clerk, &batch, SideRoom::Free).await });
            until_waiting(&db, 1).await;
            let free = db.query(&lock("SKIP LOCKED"), &[other]).await.expect("asked").len() == 1;
            assert_eq!(free, is_free, "{table}: while it waits for {held}, is {other} free?");
            holder.batch_execute("ROLLBACK").await.expect("let go");
            trying.await.expect("no panic").expect("it would go through");
        }
    }
}

/// Locks first, and the rest in later statements: a batch that waited judges by what the one before it left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_committed_while_the_locks_were_awaited_is_seen() {
    let (place, partner, reservations) = with_reserved("awaited", 2).await;
    let (db, holder) = (place.db().await, place.db().await);
    let clerk = in_process::clerk(&place);
    let begin = |batch: &Batch| {
        let (clerk, batch) = (clerk.clone(), batch.clone());
        tokio::spawn(async move { settle(&clerk, &batch).await })
    };
    let lock = async |reservation: &Reservation| {
        holder.batch_execute("BEGIN").await.expect("a transaction");
        let sql = "SELECT FROM settled.allocations WHERE id = $1 FOR NO KEY UPDATE";
        holder.query(sql, &[&reservation.id]).await.expect("locked");
    };

    // The same message twice, by two workers: the second sees the receipt of the first, and does not fail over it.
    let batch = read(&[partner.cleared(&reservations[0])]).await;
    lock(&reservations[0]).await;
    let both = [begin(&batch), begin(&batch)];
    until_waiting(&db, 2).await;
    holder.batch_execute("COMMIT").await.expect("let go");
    let mut kinds = Vec::new();
    for one in both {
        let answered = one.await.expect("no panic").expect("judged at the first try");
        kinds.push(verdict(&answered).kind());
    }
    kinds.sort();
    assert_eq!(kinds, [VerdictKind::Settled, VerdictKind::Duplicate]);

    // A suspension.
    let batch = read(&[partner.cleared(&reservations[1])]).await;
    lock(&reservations[1]).await;
    let one = begin(&batch);
    until_waiting(&db, 1).await;
    run(&place, &["partner", "suspend", "--enterprise-id", "acme"]).await;
    holder.batch_execute("COMMIT").await.expect("let go");
    let answered = one.await.expect("no panic").expect("judged");
    assert_eq!(verdict(&answered).reason(), Some(Reason::PartnerInactive));
}

/// The allocation is reserved after the batch looked for it and before the batch wrote that the message waits on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_woken_while_it_is_judged_stays_due() {
    let (place, partner, _) = with_reserved("woken", 0).await;
    let (db, holder) = (place.db().await, place.db().await);
    let clerk = in_process::clerk(&place);
    let reservation = partner.allocation("BTC", "1");
    let message = partner.draft(&reservation, "cleared").message(Expect::Settles);
    let parked = settle(&clerk, &read(&[message]).await).await.expect("judged");
    assert_eq!(verdict(&parked).kind(), VerdictKind::Parked);
    db.execute("UPDATE settled.parked SET due_at = now()", &[])
        .await
        .expect("it is due");
    let due = clerk.store.claim_due(10, 1 << 20, PATIENCE).await.expect("claimed");
    let due = Batch::read(due.deliveries).await;

    // Allocations are read before receipts are locked.
    holder.batch_execute("BEGIN").await.expect("a transaction");
    holder
        .query("SELECT FROM settled.receipts FOR NO KEY UPDATE", &[])
        .await
        .expect("locked");
    let judging = {
        let clerk = clerk.clone();
        tokio::spawn(async move { settle(&clerk, &due).await })
    };
    until_waiting(&db, 1).await;
    place.reserve(std::slice::from_ref(&reservation)).await;
    holder.batch_execute("COMMIT").await.expect("let go");
    let judged = judging.await.expect("no panic").expect("judged");
    assert_eq!(verdict(&judged).kind(), VerdictKind::Parked, "it was not there yet");

    let due = clerk.store.claim_due(10, 1 << 20, PATIENCE).await.expect("claimed");
    assert_eq!(due.deliveries.len(), 1, "it was woken, and must not sleep again");
    let answered = settle(&clerk, &Batch::read(due.deliveries).await)
        .await
        .expect("judged");
    assert_eq!(verdict(&answered).kind(), VerdictKind::Settled);
}

/// The balances come last of all that a batch writes. What the database says of them counts like any other answer: whether one
/// message is to blame, or somebody was in the way, and not only that something failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_database_says_of_the_balances_is_heard() {
    let (place, partner, reservations) = with_reserved("balances", 2).await;
    let db = place.db().await;
    let clerk = in_process::clerk(&place);
    let batch = read(&[partner.cleared(&reservations[0]), partner.cleared(&reservations[1])]).await;
    for (sqlstate, fate) in [("23514", Fate::Bisect), ("22003", Fate::Bisect), ("40001", Fate::Retry)] {
        db.batch_execute(&format!(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
             AS $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{sqlstate}'; END $$;
             CREATE OR REPLACE TRIGGER refuse BEFORE UPDATE ON settled.funds
             FOR EACH ROW EXECUTE FUNCTION refuse()"
        ))
        .await
        .expect("a trigger");
        let error = settle(&clerk, &batch).await.expect_err("refused");
        assert_eq!(error.sqlstate.as_deref(), Some(sqlstate), "{error}");
        assert_eq!(error.fate, fate, "{error}");
    }
    db.batch_execute("DROP TRIGGER refuse ON settled.funds")
        .await
        .expect("dropped");
    let answered = settle(&clerk, &batch).await.expect("settled");
    let kinds: Vec<VerdictKind> = answered
        .answers
        .iter()
        .map(|answer| answer.judgement.verdict.kind())
        .collect();
    assert_eq!(kinds, [VerdictKind::Settled; 2]);
}

/// What was held leaves the room with its batch. Whether that was committed is unknown where the answer is lost: tried again
/// under the same id, the batch is found, and is not taken for another worker's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_batch_whose_commit_is_unknown_is_found_by_its_id() {
    let (place, partner, reservations) = with_reserved("held_unknown", 1).await;
    let clerk = in_process::clerk(&place);
    let came = read(&[partner.cleared(&reservations[0])]).await.into_messages();
    let pack = Pack {
        whose: Some("acme".to_owned()),
        why: HeldWhy::Share,
        deliveries: came.into_iter().map(|message| message.delivery).collect(),
        due_in: Duration::ZERO,
        attempts: 0,
    };
    clerk
        .store
        .hold(&new_ids(std::slice::from_ref(&pack)), &[pack])
        .await
        .expect("held");
    let claimed = clerk.store.claim_held(10, PATIENCE, &[]).await.expect("claimed");
    let deliveries = claimed.packs.into_iter().flat_map(|held| held.pack.deliveries);
    let batch = Batch::read(deliveries.collect()).await;

    let id = Uuid::now_v7();
    let first = settle_as(&clerk, id, &batch, &mut None).await.expect("settled");
    let told = first.publications.len();
    assert_eq!((verdict(&first).kind(), told), (VerdictKind::Settled, 1));
    // Its answer is lost, say: what it came to is remembered, and is what the second attempt comes to.
    let again = settle_as(&clerk, id, &batch, &mut Some(first))
        .await
        .expect("it is there");
    assert_eq!(
        (verdict(&again).kind(), again.publications.len()),
        (VerdictKind::Settled, told)
    );
    // Who knows nothing of it finds that the pack has gone.
    let error = settle_as(&clerk, Uuid::now_v7(), &batch, &mut None)
        .await
        .expect_err("gone");
    assert_eq!(error.fate, Fate::Overtaken, "{error}");
}

/// A worker stands before its COMMIT for as long as one likes, and dies there: every message is in the queue again.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_before_its_commit() {
    let (place, partner, reservations) = with_reserved("before_commit", 5).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    place.publish(&messages).await;
    let worker = place.worker(&[("SETTLED_FAULT", "before_commit:1:delay=5m")]);
    until("it stands before its COMMIT", PATIENCE, async || {
        worker
            .lines()
            .iter()
            .any(|line| line["fault"].is_string())
            .then_some(())
    })
    .await;
    worker.kill().await;
    until("all of them are there again", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 5).then_some(())
    })
    .await;
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

/// A commit that errors is unknown, not failed: tried again under the same id it turns out to be there.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_is_lost_counts_once() {
    let (place, partner, reservations) = with_reserved("answer_lost", 1).await;
    let worker = place
        .ready_worker(&[
            ("SETTLED_FAULT", "after_commit:1:error,after_commit:2:error"),
            ("SETTLED_RETRY__MAX", "200ms"),
        ])
        .await;
    let refused = partner.draft(&reservations[0], "cleared").without("nonce");
    for message in [
        partner.cleared(&reservations[0]),
        refused.message(Expect::Refused("invalid_field")),
    ] {
        place.publish(&[message]).await;
        place.rest().await;
    }
    place.settle_up(worker).await;
    let row = place
        .db()
        .await
        .query_one("SELECT sum(received)::bigint, count(*) FROM settled.batches", &[])
        .await
        .expect("batches");
    assert_eq!(
        (row.get::<_, i64>(0), row.get::<_, i64>(1)),
        (2, 2),
        "nothing was judged twice"
    );
    assert_eq!(place.events.seen().len(), 2, "and nothing told twice");
    assert_eq!(place.dead.seen().len(), 1);
}

/// A currency is checked where one is written, whoever writes it, and not where only a balance changes.
#[tokio::test]
async fn funds_have_a_currency_of_the_documented_form() {
    let place = Place::new("currencies").await;
    let db = place.db().await;
    let open = "INSERT INTO settled.funds (holder, owner, currency) VALUES ('connection', gen_random_uuid(), $1)";
    let longest = "x".repeat(64);
    for currency in ["BTC", "eip155:1-USDC_0.5", &longest] {
        assert_eq!(db.execute(open, &[&currency]).await.expect(currency), 1);
    }
    let too_long = "x".repeat(65);
    for currency in ["", "B C", "BTC\n", "\u{20bf}", &too_long] {
        let error = db.execute(open, &[&currency]).await.expect_err(currency);
        assert_eq!(error.code(), Some(&SqlState::CHECK_VIOLATION), "{currency:?}");
    }
    // Whose and of what they are never changes, and the balance with transfers only.
    let change = "UPDATE settled.funds SET currency = $1";
    let error = db.execute(change, &[&"ETH"]).await.expect_err("it stays");
    assert_eq!(error.code(), Some(&SqlState::RAISE_EXCEPTION), "{error}");
    let error = db
        .execute("UPDATE settled.funds SET held = 7", &[])
        .await
        .expect_err("no transfer");
    assert_eq!(error.code().map(SqlState::code), Some("SX002"), "{error}");
}

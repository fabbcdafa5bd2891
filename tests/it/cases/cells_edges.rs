//! Two cells: what is under way when a partner begins to move, what finds no room meanwhile, what does not fit in the new cell, and
//! what comes after a move.

use serde_json::json;

use crate::kit::{
    amqp::Message,
    auditor::Expect,
    cells::{
        APPLY, CANCEL, Past, across_is_right, another_cell, cells, check_books, has_money, judges, moves, past,
        run_move, settlements,
    },
    command::{add_key, ask},
    partner::Partner,
    support::{COLLECTS, PATIENCE, count, until},
};

/// Applies it, and does not wait for long.
const HASTE: [&str; 5] = ["--apply", "--reason", "cell a is full", "--wait", "200ms"];

/// A transaction that began before the pause may reserve still, and its reservation goes along.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_began_before_the_pause_is_waited_for() {
    let (a, b) = cells("cells_waits").await;
    let acme = Partner::new("acme");
    a.register(&acme).await;
    a.deposit(&acme, "BTC", "10").await;
    let workers = [a.ready_worker(&COLLECTS).await, b.ready_worker(&COLLECTS).await];
    let (here, there, custody) = (a.db().await, b.db().await, a.db().await);
    custody.batch_execute("BEGIN; SELECT").await.expect("it begins");
    let one = acme.allocation("BTC", "10");
    let waits = moves(&a, &b, &HASTE).await.document(3);
    assert_eq!(
        (&waits["result"], &waits["phase"]),
        (&json!("waits"), &json!("paused")),
        "{waits}"
    );
    let why = waits["waitsFor"].as_str().unwrap_or_default();
    assert!(why.contains("transactions that began before the pause"), "{waits}");
    // It sees what is committed now, the pause too.
    let sql = format!("SELECT reason FROM settled.reserve('[{}]')", one.line());
    let refused = custody.query_one(&sql, &[]).await.expect(&sql);
    assert_eq!(refused.get::<_, Option<&str>>(0), Some("unknown_connection"));
    custody.batch_execute("COMMIT").await.expect("it ends");
    moves(&a, &b, &CANCEL).await.document(0);

    // One that reserved before the pause, and commits after it.
    let sql = format!("BEGIN; SELECT settled.reserve('[{}]')", one.line());
    custody.batch_execute(&sql).await.expect(&sql);
    moves(&a, &b, &HASTE).await.document(3);
    a.publish(&[acme.cleared(&one)]).await;
    until("it is held", PATIENCE, async || {
        (count(&here, "held").await == 1).then_some(())
    })
    .await;
    custody.batch_execute("COMMIT").await.expect("it ends");
    let moved = moves(&a, &b, &APPLY).await.document(0);
    assert_eq!(
        (&moved["rows"]["allocations"], &moved["handedOver"]),
        (&json!(1), &json!(1)),
        "{moved}"
    );
    until("it settles in the new cell", PATIENCE, async || {
        (settlements(&there).await == 1).then_some(())
    })
    .await;
    assert_eq!(settlements(&here).await, 0);
    assert_eq!([has_money(&here).await, has_money(&there).await], [false, true]);
    for place in [&a, &b] {
        check_books(place).await;
    }
    across_is_right(&a, &b).await;
    for worker in workers {
        worker.terminate().await;
    }
}

/// What finds no room while its partner moves, or later, waits in the queue, and intake with it: nothing of it is judged, and
/// nothing is refused. Each time that the command is said, room is made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_finds_no_room_waits_and_is_not_refused() {
    let (a, b) = cells("cells_room").await;
    let (acme, beta) = (Partner::new("acme"), Partner::new("beta"));
    for partner in [&acme, &beta] {
        a.register(partner).await;
        a.deposit(partner, "BTC", "100").await;
    }
    let small = [
        ("SETTLED_HELD__MAX_MESSAGES_PER_PARTNER", "3"),
        ("SETTLED_WORKER__PAUSE_RELEASE", "500ms"),
    ];
    let workers = [a.ready_worker(&small).await, b.ready_worker(&COLLECTS).await];
    let reserved: Vec<_> = (0..20).map(|_| acme.allocation("BTC", "1")).collect();
    let theirs = beta.allocation("BTC", "1");
    a.reserve(&reserved).await;
    a.reserve(std::slice::from_ref(&theirs)).await;
    let (here, there, custody) = (a.db().await, b.db().await, a.db().await);
    custody.batch_execute("BEGIN; SELECT").await.expect("it begins");
    moves(&a, &b, &HASTE).await.document(3);
    let said: Vec<Message> = reserved.iter().map(|one| acme.cleared(one)).collect();
    a.publish(&said).await;
    let sum = "SELECT coalesce(sum(messages), 0)::bigint FROM settled.held";
    // Each lane counts by itself. What it has in hand is handed back once, and then not taken again; some of it is held too.
    until(
        "the room is full, and the others wait in the queue",
        PATIENCE,
        async || {
            let held: i64 = here.query_one(sum, &[]).await.expect(sum).get(0);
            let waiting = i64::from(a.line().depth("settlement.updates").await);
            (held >= 3 && waiting > 0 && held + waiting >= 20).then_some(())
        },
    )
    .await;
    let why = workers[0].not_ready().await;
    assert!(why.contains("is on its way to another cell"), "{why}");
    a.publish(&[beta.cleared(&theirs)]).await;
    custody.batch_execute("COMMIT").await.expect("it ends");
    moves(&a, &b, &APPLY).await.document(0);
    until("everything settles, each in its cell", PATIENCE, async || {
        moves(&a, &b, &APPLY).await.document(0);
        (settlements(&there).await == 20 && settlements(&here).await == 1).then_some(())
    })
    .await;
    for (place, db) in [(&a, &here), (&b, &there)] {
        assert_eq!(count(db, "dead_letters").await, 0);
        assert_eq!(count(db, "receipts WHERE verdict <> 'settled'").await, 0);
        check_books(place).await;
    }
    across_is_right(&a, &b).await;
    for worker in workers {
        worker.terminate().await;
    }
}

/// Its dead letters stay, and nobody judges them: a replay passes them over, and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_passes_over_who_left() {
    let Past { a, b, workers, .. } = past("cells_replay").await;
    let here = a.db().await;
    moves(&a, &b, &APPLY).await.document(0);
    let plan = ask(&a, &["dead-letters", "plan", "--reason", "policy_contradiction"])
        .await
        .document(0);
    let number = plan["plan"].to_string();
    let replay = ["dead-letters", "replay", &number, "--all-verdicts", "--yes"];
    let replayed = ask(&a, &[&replay[..], &["--reason", "a try"]].concat()).await;
    assert!(matches!(replayed.code, Some(0 | 3)), "{}", replayed.all());
    let note = "SELECT i.state, i.note, d.state FROM settled.run_items AS i
        JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id";
    let row = here.query_one(note, &[]).await.expect(note);
    assert_eq!(
        (row.get(0), row.get(1), row.get(2)),
        (
            "skipped",
            "its partner is on its way to another cell, or lives there",
            "open"
        )
    );
    for worker in workers {
        worker.terminate().await;
    }
}

/// A database of the target that was restored, or failed over, to before the arrival has no partner to hand anything over to.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_goes_to_a_target_that_lost_the_arrival() {
    let (a, b) = cells("cells_lost").await;
    let acme = Partner::new("acme");
    a.register(&acme).await;
    a.deposit(&acme, "BTC", "10").await;
    let one = acme.allocation("BTC", "10");
    a.reserve(std::slice::from_ref(&one)).await;
    let worker = a.ready_worker(&COLLECTS).await;
    let (here, there) = (a.db().await, b.db().await);
    let broken = run_move(&a, &b, &APPLY, Some("move_left:kill")).await;
    assert_eq!(broken.status.code(), None);
    a.publish(&[acme.cleared(&one)]).await;
    until("it is held", PATIENCE, async || {
        (count(&here, "held").await == 1).then_some(())
    })
    .await;
    let arrival = "SELECT row_to_json(m)::text FROM settled.moves AS m";
    let arrival: String = there.query_one(arrival, &[]).await.expect(arrival).get(0);
    b.tamper("DELETE FROM settled.moves").await;
    for _ in 0..2 {
        moves(&a, &b, &APPLY)
            .await
            .refused(1, "the database of the other cell does not have the step");
        assert_eq!([count(&here, "held").await, count(&there, "held").await], [1, 0]);
        assert!(!judges(&here).await && !judges(&there).await);
    }
    // It is there again.
    let sql = format!("INSERT INTO settled.moves SELECT * FROM json_populate_record(NULL::settled.moves, '{arrival}')");
    b.tamper(&sql).await;
    let moved = moves(&a, &b, &APPLY).await.document(0);
    assert_eq!(moved["handedOver"], 1, "{moved}");
    let shown = ask(&a, &["partner", "list"]).await.document(0).to_string();
    assert!(shown.contains("it lives in another cell: move "), "{shown}");
    let books = "SELECT books::text FROM settled.epochs LIMIT 1";
    let books: String = there.query_one(books, &[]).await.expect(books).get(0);
    assert!(!shown.contains(&books), "the broker's queue is named by it: {shown}");
    worker.terminate().await;
}

/// Money leaves after what waits, as a batch and a reservation lock them: who has the one may take the other.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_locks_in_the_order_of_every_writer() {
    let Past { a, b, workers, .. } = past("cells_order").await;
    let broken = run_move(&a, &b, &APPLY, Some("move_arrived:kill")).await;
    assert_eq!(broken.status.code(), None);
    let (here, custody) = (a.db().await, a.db().await);
    let parked = "BEGIN; SELECT FROM settled.parked FOR UPDATE";
    custody.batch_execute(parked).await.expect(parked);
    let (moved, ()) = tokio::join!(moves(&a, &b, &APPLY), async {
        until("the move waits for what waits", PATIENCE, async || {
            let sql = "SELECT FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%moves::leave%'";
            here.query_opt(sql, &[]).await.expect("backends").map(drop)
        })
        .await;
        let funds = "SELECT FROM settled.funds ORDER BY id FOR UPDATE NOWAIT";
        custody.batch_execute(funds).await.expect("nobody has the funds");
        custody.batch_execute("ROLLBACK").await.expect("it ends");
    });
    moved.document(0);
    assert_eq!(count(&here, "parked").await, 0);
    for worker in workers {
        worker.terminate().await;
    }
}

/// A key belongs to one partner of a cell. Where another has it there the move stops before anything of it is there, and can be
/// taken back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_stops_the_move() {
    let (a, b) = cells("cells_fit").await;
    let acme = Partner::new("acme");
    a.register(&acme).await;
    a.deposit(&acme, "BTC", "10").await;
    b.register(&Partner::new("gamma")).await;
    add_key(&b, "gamma", &acme.public_key(), &[]).await.document(0);
    let worker = a.ready_worker(&COLLECTS).await;
    let one = acme.allocation("BTC", "10");
    a.reserve(std::slice::from_ref(&one)).await;
    let (here, there) = (a.db().await, b.db().await);
    moves(&a, &b, &APPLY)
        .await
        .refused(1, "what it has in partner_keys does not fit there");
    assert_eq!(count(&there, "moves").await, 0);
    assert_eq!(count(&there, "partners WHERE enterprise_id = 'acme'").await, 0);
    assert!(!judges(&here).await, "paused");
    moves(&a, &b, &CANCEL).await.document(0);
    a.publish(&[acme.cleared(&one)]).await;
    until("it settles where it was", PATIENCE, async || {
        (settlements(&here).await == 1).then_some(())
    })
    .await;
    for place in [&a, &b] {
        check_books(place).await;
    }
    worker.terminate().await;
}

/// From cell to cell everything that was ever said of it goes along: what settled is a duplicate, and a nonce that was voided is
/// voided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_moves_on_to_a_third_cell() {
    let (a, b) = cells("cells_third").await;
    let c = another_cell("cells_third_c").await;
    let acme = Partner::new("acme");
    a.register(&acme).await;
    a.deposit(&acme, "BTC", "100").await;
    let places = [&a, &b, &c];
    let (mut dbs, mut workers) = (Vec::new(), Vec::new());
    for place in places {
        dbs.push(place.db().await);
        workers.push(place.ready_worker(&COLLECTS).await);
    }
    let reserved: Vec<_> = (1..=4)
        .map(|number| acme.allocation("BTC", &number.to_string()))
        .collect();
    a.reserve(&reserved).await;
    let refused = acme
        .draft(&reserved[3], "cleared")
        .set("nonce", "refused")
        .set("policyResult", "rejected")
        .message(Expect::Refused("policy_contradiction"));
    // A key that was revoked, and what was signed with it meanwhile; and a token.
    let old = Partner::new("acme");
    let public_key = old.public_key();
    add_key(&a, "acme", &public_key, &[]).await.document(0);
    let key = ["--enterprise-id", "acme", "--public-key", &public_key];
    ask(&a, &[&["key", "revoke"], &key[..]].concat()).await.document(0);
    let stolen = acme
        .draft(&reserved[3], "cleared")
        .signed_by(old.key)
        .message(Expect::Any);
    let token = ["token", "add", "--enterprise-id", "acme", "--role", "partner"];
    ask(&a, &token).await.document(0);
    a.publish(&[refused.clone(), stolen.clone()]).await;
    until("both are refused", PATIENCE, async || {
        (count(&dbs[0], "dead_letters").await == 2).then_some(())
    })
    .await;
    let nonce = [
        "nonce",
        "void",
        "--enterprise-id",
        "acme",
        "--nonce",
        "refused",
        "--reason",
        "lost",
    ];
    ask(&a, &nonce).await.document(0);
    let said: Vec<Message> = reserved[..3].iter().map(|one| acme.cleared(one)).collect();
    for (index, place) in places.into_iter().enumerate() {
        if index > 0 {
            let moved = moves(places[index - 1], place, &APPLY).await.document(0);
            assert_eq!(moved["result"], "moved", "{moved}");
            let rows = ["partner_keys", "distrusted", "tokens", "allocations"].map(|name| moved["rows"][name].as_i64());
            assert_eq!(rows, [Some(2), Some(1), Some(1), Some(4)], "{moved}");
        }
        place.publish(&said[index..=index]).await;
        let all = i64::try_from(index).expect("a few") + 1;
        until("it settles where the partner is", PATIENCE, async || {
            (settlements(&dbs[index]).await == all).then_some(())
        })
        .await;
        for (other, db) in dbs.iter().enumerate() {
            assert_eq!(
                has_money(db).await,
                other == index,
                "its money is in the cell where it lives"
            );
            assert_eq!(judges(db).await, other == index);
        }
    }
    c.publish(&said).await;
    // Reinstated, the key counts again, but for what was signed meanwhile.
    let reinstate = ["key", "reinstate", "--reason", "it was not stolen"];
    ask(&c, &[&reinstate, &key[..]].concat()).await.document(0);
    c.publish(&[refused.clone(), stolen.clone()]).await;
    let voided = "receipts WHERE nonce = 'refused' AND reason = 'nonce_voided' AND voided_at IS NOT NULL";
    until("it is refused for good", PATIENCE, async || {
        (count(&dbs[2], voided).await == 1 && count(&dbs[2], "dead_letters").await == 2).then_some(())
    })
    .await;
    let copies = "SELECT coalesce(sum(duplicate), 0)::bigint FROM settled.batches WHERE source = 'queue'";
    until("what settled anywhere is a duplicate", PATIENCE, async || {
        (dbs[2].query_one(copies, &[]).await.expect(copies).get::<_, i64>(0) == 3).then_some(())
    })
    .await;
    assert_eq!(settlements(&dbs[2]).await, 3);
    moves(&c, &a, &APPLY)
        .await
        .refused(1, "is registered in the target already");
    assert!(judges(&dbs[2]).await, "nothing was changed");
    for place in places {
        check_books(place).await;
    }
    across_is_right(&a, &b).await;
    across_is_right(&b, &c).await;
    for worker in workers {
        worker.terminate().await;
    }
}

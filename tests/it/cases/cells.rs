//! Two cells, a database and a vhost each: a partner moves from one to the other while messages come, wherever the move is broken
//! off, and its messages are judged in one of them at a time.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{self, Expect, Story},
    cells::{
        APPLY, CANCEL, Past, across, across_is_right, cells, check_books, divide, follow, has_money, judges, moves,
        past, run_move, settlements, share_events,
    },
    command::{Answer, ask},
    partner::Partner,
    support::{COLLECTS, PATIENCE, count, until},
};

/// Killed at every step, with messages coming all the while, and said again each time.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_moves_wherever_it_is_broken_off() {
    let Past {
        a,
        b,
        acme,
        beta,
        workers: [of_a, of_b],
        open,
        late,
        settled,
    } = past("cells").await;
    let (here, there) = (a.db().await, b.db().await);
    let plan = moves(&a, &b, &[]).await.document(0);
    assert_eq!(
        (&plan["result"], &plan["phase"], &plan["inTheWay"]),
        (&json!("planned"), &json!("none"), &json!([]))
    );
    // 10 settled, 1 that waits, 1 refused.
    assert_eq!(
        (&plan["rows"]["receipts"], &plan["rows"]["allocations"]),
        (&json!(12), &json!(25)),
        "{plan}"
    );
    assert_eq!(plan["rows"]["parked"], 1, "{plan}");
    assert!(judges(&here).await, "a plan changes nothing");
    let mut open = open.into_iter();
    let mut of_beta = 1;
    let before = settlements(&here).await;
    // How far the move is then, whose books have the money, and whether the target judges. Between "arrived" and "left" it stands
    // in both, and neither lets anybody move it.
    for (fault, phase, money, resumed) in [
        ("move_paused:kill", "paused", [true, false], false),
        ("move_drained:kill", "paused", [true, false], false),
        ("move_copied:kill", "paused", [true, false], false),
        ("move_copied:error", "paused", [true, false], false),
        ("move_arrived:kill", "arrived", [true, true], false),
        ("move_left:kill", "left", [false, true], false),
        ("move_resumed:kill", "left", [false, true], true),
        ("move_handed_over:kill", "left", [false, true], true),
        ("move_handed_over:error", "left", [false, true], true),
        ("move_done:kill", "done", [false, true], true),
    ] {
        let broken = run_move(&a, &b, &APPLY, Some(fault)).await;
        let said = Answer::of(&broken).all();
        assert!(!broken.status.success(), "{fault}: {said}");
        assert_eq!(
            broken.status.code().is_none(),
            fault.ends_with("kill"),
            "{fault}: {said}"
        );
        assert!(!judges(&here).await, "{fault}: nobody, or the target");
        assert_eq!(judges(&there).await, resumed, "{fault}");
        assert_eq!([has_money(&here).await, has_money(&there).await], money, "{fault}");
        let known = count(&there, "partners WHERE enterprise_id = 'acme'").await;
        assert_eq!(known == 1, money[1], "{fault}: all of it at once");
        let plan = moves(&a, &b, &[]).await.document(0);
        assert_eq!(plan["phase"], phase, "{fault}: {plan}");
        for place in [&a, &b] {
            check_books(place).await;
        }
        // What comes meanwhile is held; of others it is judged.
        let one = open.next().expect("one more");
        let another = beta.allocation("BTC", "1");
        a.reserve(std::slice::from_ref(&another)).await;
        a.publish(&[acme.cleared(&one), beta.cleared(&another)]).await;
        of_beta += 1;
        until("beta goes on", PATIENCE, async || {
            (settlements(&here).await == before + of_beta - 1).then_some(())
        })
        .await;
    }
    // Nothing is reserved and nothing is registered here any more.
    let refused = a
        .run_with(
            &["allocation", "reserve", "--json"],
            &(acme.allocation("BTC", "1").line() + "\n"),
        )
        .await;
    let refused = Answer::of(&refused).lines(1);
    assert_eq!(refused[0]["reason"], "unknown_connection", "{refused:?}");
    let resumed = ask(&a, &["partner", "resume", "--enterprise-id", "acme"]).await;
    resumed.refused(1, "is on its way to another cell, or lives there");
    let key = Partner::new("acme").public_key();
    let added = ask(&a, &["key", "add", "--enterprise-id", "acme", "--public-key", &key]).await;
    added.refused(1, "is on its way to another cell, or lives there");

    let moved = moves(&a, &b, &APPLY).await.document(0);
    assert_eq!(
        (&moved["result"], &moved["phase"]),
        (&json!("moved"), &json!("done")),
        "{moved}"
    );
    assert!(!judges(&here).await && judges(&there).await);
    divide(&a, &b, &acme).await;
    // The client's own funds follow, and what waited for its reservation settles in the new cell; so does what was reserved in
    // the old one, and what is said again is said in vain.
    follow(&a, &b, &acme, "500").await;
    b.reserve(std::slice::from_ref(&late)).await;
    let rest: Vec<Message> = open.map(|one| acme.cleared(&one)).collect();
    b.publish(&rest).await;
    b.publish(&settled[..5]).await;
    let all = 10 + 10 + i64::try_from(rest.len()).expect("a few") + 1;
    until("everything settles in the new cell", PATIENCE, async || {
        (settlements(&there).await == all + 1).then_some(())
    })
    .await;
    // What still comes to the old cell is held there, and handed over. Both cells have its nonces: nothing moves twice.
    a.publish(&settled[5..]).await;
    {
        let mut story = a.story();
        let len = story.sent.len() - settled[5..].len();
        story.sent.truncate(len);
    }
    until("it is held", PATIENCE, async || {
        (count(&here, "held").await > 0).then_some(())
    })
    .await;
    let across = across(&a, &b, &[]).await.document(1);
    assert!(
        across
            .to_string()
            .contains("partner acme: 5 messages are held in this cell, which it left"),
        "{across}"
    );
    let again = moves(&a, &b, &APPLY).await.document(0);
    assert_eq!(
        (&again["result"], &again["handedOver"]),
        (&json!("moved"), &json!(5)),
        "{again}"
    );
    b.rest().await;
    assert_eq!(settlements(&there).await, all + 1, "a duplicate moves nothing");
    for place in [&a, &b] {
        check_books(place).await;
    }
    across_is_right(&a, &b).await;
    share_events(&a, &b, "acme");
    b.story().repeats = true;
    a.settle_up(of_a).await;
    b.settle_up(of_b).await;
    // Every message of the whole story has its effect, and it is in the cell where its partner lives.
    let valid = |story: &Story| {
        let mut story = story.clone();
        story.sent.retain(|sent| sent.expect == Expect::Settles);
        story
    };
    let (of_a, of_b) = (valid(&a.story()), valid(&b.story()));
    let distinct = |story: &Story| {
        story
            .sent
            .iter()
            .map(|sent| sent.body.clone())
            .collect::<BTreeSet<_>>()
            .len()
    };
    assert_eq!(auditor::settled_of(&here, &of_a).await, distinct(&of_a));
    assert_eq!(auditor::settled_of(&there, &of_b).await, distinct(&of_b));
    let acts = ask(&b, &["audit", "list"]).await.lines(0);
    let of_the_move = acts.iter().filter(|act| act["act"] == "partner move").count();
    assert_eq!(of_the_move, 2, "arrived, and done: {acts:?}");
}

/// Until it has arrived a move can be taken back, and then never comes; afterwards it can not.
#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_is_taken_back_until_it_has_arrived() {
    let Past {
        a,
        b,
        acme,
        open,
        late,
        workers: [of_a, of_b],
        ..
    } = past("cells_back").await;
    let (here, there) = (a.db().await, b.db().await);
    assert_eq!(
        run_move(&a, &b, &APPLY, Some("move_drained:kill")).await.status.code(),
        None
    );
    a.publish(&[acme.cleared(&open[0])]).await;
    until("it is held", PATIENCE, async || {
        (count(&here, "held").await == 1).then_some(())
    })
    .await;
    assert_eq!(
        run_move(&a, &b, &CANCEL, Some("move_voided:kill")).await.status.code(),
        None
    );
    moves(&a, &b, &APPLY).await.refused(1, "is being taken back");
    assert!(!judges(&here).await, "it is paused still");
    let cancelled = moves(&a, &b, &CANCEL).await.document(0);
    assert_eq!(cancelled["result"], "cancelled", "{cancelled}");
    until("what was held settles here", PATIENCE, async || {
        (settlements(&here).await == 12 && count(&here, "held").await == 0).then_some(())
    })
    .await;
    moves(&a, &b, &CANCEL)
        .await
        .refused(1, "no move of partner acme is under way");
    // Begun anew it goes through, and what has arrived can not be taken back.
    assert_eq!(
        run_move(&a, &b, &APPLY, Some("move_arrived:kill")).await.status.code(),
        None
    );
    moves(&a, &b, &CANCEL).await.refused(1, "has arrived in the target");
    moves(&a, &b, &APPLY).await.document(0);
    moves(&a, &b, &CANCEL).await.refused(1, "has arrived in the target");
    assert!(!judges(&here).await && judges(&there).await);
    for place in [&a, &b] {
        check_books(place).await;
    }
    across_is_right(&a, &b).await;
    divide(&a, &b, &acme).await;
    follow(&a, &b, &acme, "9").await;
    b.reserve(std::slice::from_ref(&late)).await;
    share_events(&a, &b, "acme");
    a.settle_up(of_a).await;
    b.settle_up(of_b).await;
}

/// Two that move it at once are one move.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_move_a_partner_at_once_move_it_once() {
    let Past {
        a,
        b,
        acme,
        late,
        workers,
        ..
    } = past("cells_twice").await;
    let all = tokio::join!(moves(&a, &b, &APPLY), moves(&a, &b, &APPLY), moves(&a, &b, &APPLY));
    let ended = [&all.0, &all.1, &all.2].map(|answer| answer.code);
    assert!(ended.contains(&Some(0)), "one of them: {ended:?} {}", all.0.all());
    moves(&a, &b, &APPLY).await.document(0);
    for place in [&a, &b] {
        check_books(place).await;
    }
    across_is_right(&a, &b).await;
    divide(&a, &b, &acme).await;
    follow(&a, &b, &acme, "9").await;
    b.reserve(std::slice::from_ref(&late)).await;
    share_events(&a, &b, "acme");
    let [of_a, of_b] = workers;
    a.settle_up(of_a).await;
    b.settle_up(of_b).await;
}

/// A partner in quarantine arrives in quarantine; what waits has its deadline where it was; and a sum that no transfer can carry
/// goes in parts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_partner_is_it_is_in_the_new_cell() {
    const MOST: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
    let (a, b) = cells("cells_same").await;
    let acme = Partner::new("acme");
    a.register_with(&acme, &["--no-async-deallocations"]).await;
    let (mut large, mut sum) = (Vec::new(), num_bigint::BigInt::default());
    for _ in 0..3 {
        a.deposit(&acme, "wei", MOST).await;
        large.push(acme.allocation("wei", MOST));
        sum += MOST.parse::<num_bigint::BigInt>().expect("a number");
    }
    a.reserve(&large).await;
    let deadline = [("SETTLED_PARK__DEADLINE", "1h")];
    let worker = a.ready_worker(&deadline).await;
    let late = acme.allocation("wei", "1");
    a.publish(&[acme.cleared(&late)]).await;
    let (here, there) = (a.db().await, b.db().await);
    until("it waits", PATIENCE, async || {
        (count(&here, "parked").await == 1).then_some(())
    })
    .await;
    // Quarantine first: of a suspended partner what waits would be refused.
    for act in ["quarantine", "suspend"] {
        ask(
            &a,
            &["partner", act, "--enterprise-id", "acme", "--reason", "it looks odd"],
        )
        .await
        .document(0);
    }
    let of = |list: Value| list.as_array().and_then(|list| list.first().cloned()).expect("acme");
    let before = of(ask(&a, &["partner", "list"]).await.document(0));
    let moved = moves(&a, &b, &APPLY).await.document(0);
    assert_eq!(
        moved["funds"],
        json!([{"connectionId": acme.connection, "currency": "wei", "quantity": sum.to_string()}])
    );
    assert_eq!(
        before,
        of(ask(&b, &["partner", "list"]).await.document(0)),
        "as it was, in quarantine too"
    );
    // That it is held because it moves is not told, on either side; and it waits for nothing that is told of it.
    until("what was done before is told", PATIENCE, async || {
        (count(&here, "outbox").await == 0).then_some(())
    })
    .await;
    a.events.catch_up(a.line()).await;
    let told = a.events.seen().into_iter().map(|seen| seen.routing_key);
    let told: Vec<String> = told.filter(|key| key.starts_with("partner.")).collect();
    assert_eq!(told, ["partner.quarantined.acme", "partner.suspended.acme"]);
    assert_eq!(count(&there, "outbox").await, 0);
    assert_eq!(count(&there, "transfers WHERE event = 'arrived'").await, 3);
    assert_eq!(count(&here, "transfers WHERE event = 'left'").await, 3);
    let waits = "SELECT until - parked_at BETWEEN interval '1h' AND interval '1h 1ms' FROM settled.parked";
    assert!(
        there.query_one(waits, &[]).await.expect(waits).get::<_, bool>(0),
        "its deadline stands still"
    );
    ask(&b, &["partner", "resume", "--enterprise-id", "acme"])
        .await
        .document(0);
    let longer = "SELECT until - parked_at > interval '1h 1ms' FROM settled.parked";
    assert!(
        there.query_one(longer, &[]).await.expect(longer).get::<_, bool>(0),
        "and goes on"
    );
    for place in [&a, &b] {
        check_books(place).await;
    }
    across_is_right(&a, &b).await;
    worker.terminate().await;
}

/// What keeps a move from beginning is said before anything is changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_the_way_is_said_first() {
    let (a, b) = cells("cells_way").await;
    let acme = Partner::new("acme");
    a.register(&acme).await;
    let nowhere = ask(&a, &["partner", "move", "--enterprise-id", "acme"]).await;
    nowhere.refused(2, "no other cell is configured");
    moves(&a, &a, &APPLY).await.refused(1, "the same books");
    moves(&b, &a, &APPLY).await.refused(1, "no partner acme is registered");
    b.register(&Partner::new("acme")).await;
    let plan = moves(&a, &b, &[]).await.document(1);
    assert_eq!(
        plan["inTheWay"],
        json!(["partner acme is registered in the target already"]),
        "{plan}"
    );
    moves(&a, &b, &APPLY)
        .await
        .refused(1, "is registered in the target already");
    assert!(judges(&a.db().await).await, "nothing was changed");
    let compared = across(&a, &b, &[]).await.document(1);
    assert!(
        compared
            .to_string()
            .contains("partner acme: both cells judge its messages"),
        "{compared}"
    );
}

/// A message that was judged twice, led astray, or is nowhere, is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_in_both_cells_or_in_none_is_found() {
    let (a, b) = cells("cells_found").await;
    let (acme, beta) = (Partner::new("acme"), Partner::new("beta"));
    for (place, partner) in [(&a, &acme), (&b, &beta)] {
        place.register(partner).await;
        place.deposit(partner, "BTC", "100").await;
    }
    let workers = [a.ready_worker(&COLLECTS).await, b.ready_worker(&COLLECTS).await];
    let (one, two) = (acme.allocation("BTC", "5"), beta.allocation("BTC", "5"));
    a.reserve(std::slice::from_ref(&one)).await;
    b.reserve(std::slice::from_ref(&two)).await;
    let (of_acme, of_beta) = (acme.cleared(&one), beta.cleared(&two));
    a.publish(std::slice::from_ref(&of_acme)).await;
    b.publish(std::slice::from_ref(&of_beta)).await;
    let (here, there) = (a.db().await, b.db().await);
    until("both settle", PATIENCE, async || {
        (settlements(&here).await == 1 && settlements(&there).await == 1).then_some(())
    })
    .await;
    let nonce = |message: &Message| -> String {
        let body: Value = serde_json::from_slice(&message.body).expect("JSON");
        body["nonce"].as_str().expect("a nonce").to_owned()
    };
    let lines = |sent: &[(&str, String)]| -> String {
        let line = |(whose, nonce): &(&str, String)| json!({"enterpriseId": whose, "nonce": nonce}).to_string() + "\n";
        sent.iter().map(line).collect()
    };
    let file = a.file("sent.ndjson");
    let sent = [("acme", nonce(&of_acme)), ("beta", nonce(&of_beta))];
    std::fs::write(&file, lines(&sent)).expect("a file");
    let name = file.to_str().expect("UTF-8");
    across(&a, &b, &["--sent", name]).await.document(0);
    // One that was never sent, one led to the wrong cell as well, and one that both cells know the partner of and judge.
    let lost = Uuid::new_v4().to_string();
    std::fs::write(&file, lines(&[("acme", lost.clone())])).expect("a file");
    let found = across(&a, &b, &["--sent", name]).await.document(1);
    assert!(
        found
            .to_string()
            .contains(&format!("nonce \\\"{lost}\\\" of partner acme: in neither cell")),
        "{found}"
    );
    b.publish(std::slice::from_ref(&of_acme)).await;
    until("it is refused there", PATIENCE, async || {
        (count(&there, "dead_letters").await == 1).then_some(())
    })
    .await;
    let found = across(&a, &b, &[]).await.document(1);
    assert!(
        found
            .to_string()
            .contains("1 messages came to the other cell and were refused as nobody's"),
        "{found}"
    );
    b.register(&acme).await;
    b.publish(std::slice::from_ref(&of_acme)).await;
    until("it is judged there too", PATIENCE, async || {
        (count(&there, "receipts WHERE enterprise_id = 'acme'").await == 1).then_some(())
    })
    .await;
    let found = across(&a, &b, &[]).await.document(1);
    assert!(
        found.to_string().contains("of partner acme: judged in both cells"),
        "{found}"
    );
    std::fs::write(&file, "nonsense\n").expect("a file");
    across(&a, &b, &["--sent", name])
        .await
        .refused(2, "line 1: it is no message that was sent");
    for worker in workers {
        worker.terminate().await;
    }
}

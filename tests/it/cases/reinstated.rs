//! A key that was revoked and counts again: what it signed meanwhile, and was refused, never settles.

use serde_json::{Value, json};

use crate::kit::{
    auditor::Expect,
    command::{Answer, ask},
    partner::{Partner, new_key},
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, count, until, with_partner},
};

async fn key(place: &Place, act: &str, partner: &Partner, flags: &[&str]) -> Answer {
    let public_key = partner.public_key();
    let words = ["key", act, "--enterprise-id", "acme", "--public-key", &public_key];
    ask(place, &[&words, flags].concat()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_refused_while_revoked_never_settles() {
    let (place, partner) = with_partner("reinstated", "1000").await;
    let worker = place.ready_worker(&[]).await;
    let db = place.db().await;
    let reservations: Vec<_> = (0..4).map(|_| partner.allocation("BTC", "5")).collect();
    place.reserve(&reservations).await;
    // One settled before, one parked, one refused, one that never came.
    let before = partner.cleared(&reservations[0]);
    let late = partner.allocation("BTC", "5");
    // Proven when it was parked, so it keeps its receipt.
    let parked = partner.draft(&late, "cleared").message(Expect::Any);
    place.publish(&[before.clone(), parked.clone()]).await;
    until("one settled, one parked", PATIENCE, async || {
        let both = (count(&db, "settlements").await, count(&db, "parked").await);
        (both == (1, 1)).then_some(())
    })
    .await;
    key(&place, "revoke", &partner, &["--reason", "stolen?"])
        .await
        .document(0);
    let refused = partner
        .draft(&reservations[1], "cleared")
        .message(Expect::Refused("signature_mismatch"));
    let stranger = partner
        .draft(&reservations[2], "cleared")
        .signed_by(new_key())
        .message(Expect::Refused("signature_mismatch"));
    place
        .publish(&[refused.clone(), refused.clone(), stranger, before.clone()])
        .await;
    place.reserve(std::slice::from_ref(&late)).await;
    until("all were refused", PATIENCE, async || {
        (count(&db, "distrusted").await == 2 && count(&db, "dead_letters").await == 3).then_some(())
    })
    .await;
    // `key add` does not bring it back.
    key(&place, "add", &partner, &[])
        .await
        .refused(1, "settled key reinstate");
    let told = key(&place, "reinstate", &partner, &["--reason", "it was another one's"])
        .await
        .document(0);
    assert_eq!(
        (&told["result"], &told["valid"], &told["refusedForEver"]),
        (&json!("reinstated"), &json!(true), &json!(2)),
        "{told}"
    );
    // The same bytes, in any order and company; other signatures under the same text; and what is new.
    let again = partner.draft(&reservations[3], "cleared").message(Expect::Settles);
    place.publish(&[refused.clone(), parked, before, again]).await;
    until("they are judged", PATIENCE, async || {
        (count(&db, "settlements").await == 2 && count(&db, "dead_letters WHERE times_seen >= 2").await == 2)
            .then_some(())
    })
    .await;
    // A replay comes to the same, and its plan says so.
    let plan = ask(&place, &["dead-letters", "plan", "--state", "open"])
        .await
        .document(0);
    assert_eq!(plan["messages"], 3, "{plan}");
    let sql = "SELECT count(*) FROM settled.plan_items WHERE verdict = 'rejected' AND reason = 'signature_mismatch'";
    assert_eq!(db.query_one(sql, &[]).await.expect("items").get::<_, i64>(0), 3);
    let words = [
        "dead-letters",
        "replay",
        "1",
        "--all-verdicts",
        "--reason",
        "all the same",
    ];
    let run = ask(&place, &words).await;
    assert!(matches!(run.code, Some(0 | 2 | 3)), "{}", run.all());
    // Signed anew, with a new nonce, it settles.
    place
        .publish(&[partner.cleared(&reservations[1]), partner.cleared(&late)])
        .await;
    until("they settle", PATIENCE, async || {
        (count(&db, "settlements").await == 4).then_some(())
    })
    .await;
    place.settle_up(worker).await;
}

/// A batch that refuses and a command that reinstates wait for each other: never is a copy refused and another settled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reinstating_waits_for_what_is_being_refused() {
    let (place, partner) = with_partner("reinstate_race", "1000").await;
    let worker = place.ready_worker(&[LEAVE_DEAD_LETTERS]).await;
    let reservations: Vec<_> = (0..30).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let drafts: Vec<_> = reservations
        .iter()
        .map(|reservation| partner.draft(reservation, "cleared"))
        .collect();
    let messages: Vec<_> = drafts.iter().map(|draft| draft.message(Expect::Any)).collect();
    let db = place.db().await;
    for round in messages.chunks(10) {
        key(&place, "revoke", &partner, &[]).await.document(0);
        // Two lanes have copies of the same in hand while the key comes back.
        let twice: Vec<_> = round.iter().chain(round).cloned().collect();
        let reinstate = async {
            key(&place, "reinstate", &partner, &["--reason", "race"])
                .await
                .document(0)
        };
        tokio::join!(place.publish(&twice), reinstate);
        place.publish(round).await;
    }
    place.rest().await;
    // Whatever became of each: what is remembered as refused has not settled.
    let sql = "SELECT count(*) FROM settled.settlements AS s JOIN settled.distrusted AS d
               ON d.public_key = s.public_key AND d.payload_digest = sha256(convert_to(s.payload, 'UTF8'))";
    assert_eq!(db.query_one(sql, &[]).await.expect("both").get::<_, i64>(0), 0);
    let (settled, refused) = (count(&db, "settlements").await, count(&db, "distrusted").await);
    assert_eq!(settled + refused, 30, "{settled} settled, {refused} refused");
    place.settle_up(worker).await;
}

#[tokio::test]
async fn a_key_that_can_not_be_reinstated() {
    let (place, partner) = with_partner("not_reinstated", "1000").await;
    let db = place.db().await;
    key(&place, "revoke", &partner, &[]).await.document(0);
    let reinstate = async || key(&place, "reinstate", &partner, &["--reason", "why not"]).await;
    let fill = "INSERT INTO settled.distrusted (public_key, payload_digest, at)
                SELECT k.public_key, sha256(n::text::bytea), now()
                FROM settled.partner_keys AS k, generate_series(1, 100000) AS n";
    db.batch_execute(fill).await.expect("many");
    reinstate().await.refused(1, "more than 100000 messages");
    let keys = ask(&place, &["key", "list"]).await.document(0);
    assert_eq!(keys[0]["valid"], false);
}

/// One act: what the audit says of it.
async fn last(place: &Place) -> Value {
    let answer = ask(place, &["audit", "list", "--limit", "1"]).await;
    answer.lines(0).pop().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_act_is_written_down() {
    let place = Place::new("acts").await;
    let partner = Partner::new("acme");
    let (client, connection) = (partner.client.to_string(), partner.connection.to_string());
    let (public_key, user) = (
        partner.public_key(),
        crate::kit::support::userinfo(&place.database_url).0,
    );
    let reservation = partner.allocation("BTC", "5");
    let db = place.db().await;
    let e = ["--enterprise-id", "acme"];
    let k = ["--enterprise-id", "acme", "--public-key", &public_key];
    let by = ["--operator", "nora", "--reason", "ticket 7"];
    for (act, words) in [
        ("partner add", [&["partner", "add", "--name", "N"], &e[..]].concat()),
        ("partner set", [&["partner", "set", "--name", "M"], &e[..]].concat()),
        ("partner suspend", [&["partner", "suspend"], &e[..]].concat()),
        ("partner resume", [&["partner", "resume"], &e[..]].concat()),
        ("key add", [&["key", "add"], &k[..]].concat()),
        ("key revoke", [&["key", "revoke"], &k[..]].concat()),
        ("key reinstate", [&["key", "reinstate"], &k[..]].concat()),
        (
            "connection add",
            [
                &[
                    "connection",
                    "add",
                    "--connection-id",
                    &connection,
                    "--client-id",
                    &client,
                ][..],
                &["--partners-client-id", "c", "--partners-connection-id", "d"],
                &e,
            ]
            .concat(),
        ),
        (
            "deposit",
            vec![
                "deposit",
                "--client-id",
                &client,
                "--currency",
                "BTC",
                "--quantity",
                "9",
                "--reference",
                "r",
            ],
        ),
    ] {
        let words = [&words[..], &by].concat();
        ask(&place, &words).await.document(0);
        let found = last(&place).await;
        assert_eq!(
            (&found["act"], &found["operator"], &found["why"]),
            (&json!(act), &json!("nora"), &json!("ticket 7")),
            "{found}"
        );
        assert_eq!(
            (&found["sessionUser"], &found["clientAddress"]),
            (&json!(user), &json!("127.0.0.1")),
            "{found}"
        );
        // A repeat changes nothing, and is no act.
        let id = &found["id"];
        ask(&place, &words).await.document(0);
        let changes = matches!(act, "key add");
        assert!(changes || last(&place).await["id"] == *id, "{act} again");
    }
    // However many, one row a chunk; what is refused or there already is counted beside.
    let (line, before) = (reservation.line(), count(&db, "audit").await);
    let lines = format!("{line}\n{line}\n{{}}\n");
    let words = [&["allocation", "reserve"], &by[..]].concat();
    crate::kit::command::ask_with(&place, &words, &lines).await.lines(3);
    let found = last(&place).await;
    assert_eq!(count(&db, "audit").await, before + 1);
    assert_eq!(found["act"], "reserve");
    // The lines come in as many transactions as reading took; those that reserved nothing leave no row.
    let outcome = |name: &str| found["outcome"][name].as_u64();
    assert_eq!(outcome("reserved"), Some(1), "{found}");
    assert!(outcome("exists") <= Some(1) && outcome("refused") <= Some(1), "{found}");
    assert_eq!(found["filters"]["first"], json!(reservation.id));
    crate::kit::command::ask_with(&place, &words, &line).await.lines(0);
    assert_eq!(count(&db, "audit").await, before + 1, "nothing was reserved");
    // Bodies.
    let worker = place.ready_worker(&[]).await;
    let stranger = partner
        .draft(&reservation, "cleared")
        .signed_by(new_key())
        .message(Expect::Refused("signature_mismatch"));
    place.publish(&[stranger]).await;
    until("it is kept", PATIENCE, async || {
        (count(&db, "dead_letters").await == 1).then_some(())
    })
    .await;
    let id: uuid::Uuid = db
        .query_one("SELECT id FROM settled.dead_letters", &[])
        .await
        .expect("one")
        .get(0);
    let id = id.to_string();
    ask(&place, &["dead-letters", "show", &id]).await.document(0);
    assert_eq!(last(&place).await["act"], "reserve", "no body was shown");
    let show = ["dead-letters", "show", &id, "--body", "--operator", "nora"];
    ask(&place, &show).await.document(0);
    let found = last(&place).await;
    assert_eq!(
        (&found["act"], &found["operator"], &found["filters"]["deadLetter"]),
        (&json!("show body"), &json!("nora"), &json!(id))
    );
    ask(&place, &["dead-letters", "export", "--operator", "nora"])
        .await
        .lines(0);
    assert_eq!(last(&place).await["act"], "export");
    // What can not be written down is not done, and nothing is shown.
    db.batch_execute("ALTER TABLE settled.audit ADD CONSTRAINT no_more CHECK (false) NOT VALID")
        .await
        .expect("altered");
    let shown = ask(&place, &show).await;
    assert!(shown.code != Some(0) && shown.out.is_empty(), "{}", shown.all());
    let words = ["partner", "suspend", "--enterprise-id", "acme"];
    assert!(!ask(&place, &words).await.succeeded());
    let deposit = [
        "deposit",
        "--client-id",
        &client,
        "--currency",
        "BTC",
        "--quantity",
        "9",
        "--reference",
        "r2",
    ];
    assert!(!ask(&place, &deposit).await.succeeded());
    assert_eq!(count(&db, "deposits").await, 1);
    assert_eq!(count(&db, "partners WHERE suspended_at IS NOT NULL").await, 0);
    db.batch_execute("ALTER TABLE settled.audit DROP CONSTRAINT no_more")
        .await
        .expect("altered");
    // Nobody signs with another's name, whatever is written.
    let forge = "INSERT INTO settled.audit (at, operator, act, filters, outcome, session_name, client_address)
                 VALUES (now(), 'eve', 'deposit', '{}', '{}', 'somebody_else', '10.0.0.1')";
    db.batch_execute(forge).await.expect("a row");
    assert_eq!(last(&place).await["sessionUser"], json!(user));
    assert!(worker.terminate().await.success());
}

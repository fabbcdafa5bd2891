//! Workers of two versions on one database: what the newer one wrote is kept by the older one, told again, and stops nobody.
//! And what a refused signature says, to the sender and to the operator.

use serde_json::{Value, json};

use crate::kit::{
    auditor::Expect,
    command::{Answer, ask},
    partner::{Partner, new_key},
    support::{PATIENCE, until, with_partner},
};

/// A reason that no version knows.
const NEWER: &str = "custody_frozen";

fn event(seen: &crate::kit::amqp::Seen) -> Value {
    serde_json::from_slice(&seen.body).expect("an event is JSON")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reason_of_a_newer_version_is_kept_told_again_and_stops_nobody() {
    let (place, partner) = with_partner("newer", "1000").await;
    let db = place.db().await;
    let reservations: Vec<_> = (0..2).map(|_| partner.allocation("BTC", "5")).collect();
    place.reserve(&reservations).await;
    let suspended = ask(
        &place,
        &[
            "partner",
            "suspend",
            "--enterprise-id",
            "acme",
            "--reason",
            "rolling upgrade",
        ],
    )
    .await;
    suspended.document(0);
    let worker = place.ready_worker(&[]).await;
    let refused = partner.draft(&reservations[0], "cleared").message(Expect::Any);
    place.publish(std::slice::from_ref(&refused)).await;
    until("it is refused and collected", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.dead_letters WHERE reason = 'partner_inactive'";
        (db.query_one(sql, &[]).await.expect(sql).get::<_, i64>(0) == 1).then_some(())
    })
    .await;
    // As a newer version would have written it.
    let sql =
        format!("UPDATE settled.receipts SET reason = '{NEWER}'; UPDATE settled.dead_letters SET reason = '{NEWER}'");
    db.batch_execute(&sql).await.expect("a reason is text");
    let resumed = ask(
        &place,
        &["partner", "resume", "--enterprise-id", "acme", "--reason", "over"],
    )
    .await;
    resumed.document(0);

    // The same message is told the same, an innocent one behind it settles, and the worker stays ready.
    place
        .publish(&[refused.clone(), partner.cleared(&reservations[1])])
        .await;
    let told = place
        .events
        .wait("the newer reason", |seen| event(seen)["data"]["reason"] == NEWER)
        .await;
    let told = event(&told);
    assert_eq!(told["type"], "update.rejected");
    assert_eq!(
        (
            &told["data"]["class"],
            &told["data"]["final"],
            &told["data"]["allocationId"]
        ),
        (&json!(500), &json!(false), &json!(reservations[0].id)),
        "{told}"
    );
    until("the innocent one settles", PATIENCE, async || {
        let shown = place
            .json(&["allocation", "show", &reservations[1].id.to_string()])
            .await;
        (shown["allocation"]["status"] == "cleared").then_some(())
    })
    .await;
    until("the second letter is collected", PATIENCE, async || {
        let sql =
            format!("SELECT times_seen FROM settled.dead_letters WHERE reason = '{NEWER}' AND made_by = 'settled'");
        let rows = db.query(&sql, &[]).await.expect("rows");
        (rows.len() == 1 && rows[0].get::<_, i64>(0) == 2).then_some(())
    })
    .await;
    assert!(worker.is_ready().await, "{}", worker.said());
    // A copy comes to the same event, byte for byte.
    place.publish(std::slice::from_ref(&refused)).await;
    until("told again", PATIENCE, async || {
        let same = place.events.seen().iter().filter(|seen| event(seen) == told).count();
        (same >= 2).then_some(())
    })
    .await;

    // Every question about it is answered.
    let list = ask(&place, &["dead-letters", "list"]).await.lines(0);
    assert_eq!((list.len(), &list[0]["reason"]), (1, &json!(NEWER)), "{list:?}");
    let id = list[0]["id"].as_str().expect("an id").to_owned();
    let shown = ask(&place, &["dead-letters", "show", &id]).await.document(0);
    assert_eq!(shown["deadLetter"]["reason"], NEWER, "{shown}");
    assert!(
        shown["advice"]
            .as_str()
            .is_some_and(|advice| advice.contains("newer version")),
        "{shown}"
    );
    let groups = ask(&place, &["dead-letters", "groups"]).await.document(0);
    assert_eq!(groups["groups"][0]["reason"], NEWER, "{groups}");
    let stats = ask(&place, &["dead-letters", "stats"]).await.document(0);
    assert_eq!(
        (&stats["reasons"][0]["reason"], &stats["messages"]),
        (&json!(NEWER), &json!(1)),
        "{stats}"
    );
    let not_final = ask(&place, &["dead-letters", "list", "--not-final"]).await.lines(0);
    assert_eq!(not_final.len(), 1, "it may be worth a replay");
    let receipt = ask(
        &place,
        &[
            "receipt",
            "--enterprise-id",
            "acme",
            "--nonce",
            list[0]["nonce"].as_str().expect("a nonce"),
        ],
    )
    .await
    .document(0);
    assert_eq!(
        (&receipt["verdict"], &receipt["reason"]),
        (&json!("rejected"), &json!(NEWER)),
        "{receipt}"
    );
    let timeline = ask(&place, &["timeline", &reservations[0].id.to_string()]).await;
    assert!(
        timeline.code == Some(0) && timeline.out.contains(NEWER),
        "{}",
        timeline.all()
    );
    let body = String::from_utf8(refused.body.clone()).expect("text");
    let words = ["explain", "--routing-key", "acme.allocation.update"];
    let explained = crate::kit::command::ask_with(&place, &words, &body).await.document(0);
    assert_eq!(
        (&explained["verdict"], &explained["reason"]),
        (&json!("rejected"), &json!(NEWER)),
        "{explained}"
    );
    let plan = ask(&place, &["dead-letters", "plan"]).await.document(0);
    assert_eq!(
        (&plan["verdicts"][0]["reason"], &plan["messages"]),
        (&json!(NEWER), &json!(1)),
        "{plan}"
    );
    let run: Answer = ask(
        &place,
        &[
            "dead-letters",
            "replay",
            "1",
            "--all-verdicts",
            "--reason",
            "as the newer version will say",
        ],
    )
    .await;
    assert!(matches!(run.code, Some(0 | 2 | 3)), "{}", run.all());
    let reconciled = ask(&place, &["reconcile", "--since", "2020-01-01T00:00:00Z"]).await;
    assert!(matches!(reconciled.code, Some(0 | 1)), "{}", reconciled.all());
    let allocation = place
        .json(&["allocation", "show", &reservations[0].id.to_string()])
        .await;
    assert_eq!(allocation["allocation"]["status"], "reserved", "nothing moved");
    assert!(worker.is_ready().await, "{}", worker.said());
    assert_eq!(worker.terminate().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_signature_says_where_its_key_stands() {
    let (place, partner) = with_partner("mismatch", "1000").await;
    let other = Partner::new("beta");
    place.register(&other).await;
    let (early, late) = (new_key(), new_key());
    let hex = |key: &secp256k1::SecretKey| hex::encode(key.public_key().serialize());
    for (key, flags) in [
        (&early, ["--valid-from", "2999-01-01T00:00:00Z"]),
        (&late, ["--valid-until", "2001-01-01T00:00:00Z"]),
    ] {
        let public_key = hex(key);
        let mut words = vec!["key", "add", "--enterprise-id", "acme", "--public-key", &public_key];
        words.extend(flags);
        if flags[0] == "--valid-until" {
            words.extend(["--valid-from", "2000-01-01T00:00:00Z"]);
        }
        ask(&place, &words).await.document(0);
    }
    let reservation = partner.allocation("BTC", "5");
    place.reserve(std::slice::from_ref(&reservation)).await;
    let stranger = new_key();
    let worker = place.ready_worker(&[]).await;
    let by = |key: &secp256k1::SecretKey| partner.draft(&reservation, "cleared").signed_by(*key);
    let sentences = [
        (by(&early), "a key of this partner that is not valid yet"),
        (by(&late), "a key of this partner that has expired"),
        (by(&other.key), "a key that is registered, but not for this partner"),
        (
            by(&stranger),
            "the payload may have been changed after it was signed, or another key signed it",
        ),
    ];
    for (draft, sentence) in &sentences {
        let message = draft.message(Expect::Refused("signature_mismatch"));
        let body = String::from_utf8(message.body.clone()).expect("text");
        let words = ["explain", "--routing-key", "acme.allocation.update"];
        let explained = crate::kit::command::ask_with(&place, &words, &body).await.document(0);
        assert_eq!(explained["reason"], "signature_mismatch");
        let detail = explained["detail"].as_str().expect("a detail");
        assert!(detail.contains(sentence) && !detail.contains("beta"), "{detail}");
        assert_eq!(explained["recoveredKey"], hex(&draft.key), "{explained}");
        place.publish(std::slice::from_ref(&message)).await;
        let seen = place
            .events
            .wait("its event", |seen| {
                event(seen)["data"]["detail"]
                    .as_str()
                    .is_some_and(|detail| detail.contains(sentence))
            })
            .await;
        assert!(!String::from_utf8_lossy(&seen.body).contains("beta"));
    }
    until("all are collected", PATIENCE, async || {
        let list = ask(&place, &["dead-letters", "list"]).await;
        (list.code == Some(0) && list.out.lines().count() == sentences.len()).then_some(())
    })
    .await;
    let groups = ask(&place, &["dead-letters", "groups"]).await.document(0);
    let mut keys: Vec<&str> = groups["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .filter_map(|group| group["recoveredKey"].as_str())
        .collect();
    keys.sort_unstable();
    let mut expected: Vec<String> = sentences.iter().map(|(draft, _)| hex(&draft.key)).collect();
    expected.sort_unstable();
    assert_eq!(keys, expected, "{groups}");
    let id = groups["groups"][0]["example"].as_str().expect("an id");
    let shown = ask(&place, &["dead-letters", "show", id]).await.document(0);
    assert_eq!(shown["recoveredKey"], groups["groups"][0]["recoveredKey"], "{shown}");
    place.settle_up(worker).await;
}

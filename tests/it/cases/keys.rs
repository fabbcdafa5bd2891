//! A key that takes the place of another, what its owner signs for it, what is warned of, and which keys are none.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::kit::{
    auditor::Expect,
    command::{Answer, ask},
    partner::{Partner, new_key, sign},
    support::{PATIENCE, Place, Worker, count, until, with_partner},
};

/// The same partner with another key.
fn with_key(partner: &Partner) -> Partner {
    Partner {
        key: new_key(),
        ..partner.clone()
    }
}

async fn key(place: &Place, act: &str, public_key: &str, flags: &[&str]) -> Answer {
    let words = ["key", act, "--enterprise-id", "acme", "--public-key", public_key];
    ask(place, &[&words, flags].concat()).await
}

async fn list(place: &Place) -> Vec<Value> {
    let keys = ask(place, &["key", "list"]).await.document(0);
    keys.as_array().expect("keys").clone()
}

fn time(value: &Value) -> Timestamp {
    value.as_str().expect("a time").parse().expect("a time")
}

async fn metric_is(worker: &Worker, line: &str) {
    until(line, PATIENCE, async || {
        let (_, metrics) = worker.get("/metrics").await?;
        metrics.lines().any(|have| have == line).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_rotated_with_a_grace() {
    let (place, old) = with_partner("key_rotate", "1000").await;
    let new = with_key(&old);
    let worker = place
        .ready_worker(&[("SETTLED_REGISTRY__KEY_USE_INTERVAL", "100ms")])
        .await;
    let db = place.db().await;
    let reservations: Vec<_> = (0..4).map(|_| old.allocation("BTC", "5")).collect();
    place.reserve(&reservations).await;
    place.story().keys.push(("acme".to_owned(), new.public_key()));
    let told = key(
        &place,
        "rotate",
        &new.public_key(),
        &["--grace", "48h", "--reason", "yearly"],
    )
    .await
    .document(0);
    assert_eq!(
        (&told["result"], &told["key"]["publicKey"]),
        (&json!("rotated"), &json!(new.public_key()))
    );
    assert_eq!(told["key"]["validUntil"], Value::Null, "{told}");
    let ending = told["ending"].as_array().expect("keys");
    assert_eq!(ending.len(), 1, "{told}");
    assert_eq!(ending[0]["publicKey"], old.public_key());
    let left = time(&ending[0]["validUntil"]).duration_since(Timestamp::now());
    let hours = SignedDuration::from_hours(48);
    assert!(left <= hours && left > hours - SignedDuration::from_secs(60), "{left}");
    // Said again it changes nothing, also with another grace: nothing is lengthened.
    for grace in ["48h", "100h"] {
        let again = key(&place, "rotate", &new.public_key(), &["--grace", grace])
            .await
            .document(0);
        assert_eq!(
            (&again["result"], &again["ending"]),
            (&json!("exists"), &json!([])),
            "{again}"
        );
    }
    // Both count meanwhile.
    place
        .publish(&[old.cleared(&reservations[0]), new.cleared(&reservations[1])])
        .await;
    until("both settle", PATIENCE, async || {
        (count(&db, "settlements").await == 2).then_some(())
    })
    .await;
    let keys = until("their use is written down", PATIENCE, async || {
        let keys = list(&place).await;
        keys.iter().all(|key| key["lastUsedAt"].is_string()).then_some(keys)
    })
    .await;
    assert!(keys.iter().all(|key| key["valid"] == true), "{keys:?}");
    // A grace of nothing ends the old one at once. One that was registered to begin later is left, and told: whoever stole all of
    // the partner's keys may have that one too.
    let next = with_key(&old);
    let from = format!("{:.3}", Timestamp::now() + SignedDuration::from_hours(24 * 30));
    key(&place, "add", &next.public_key(), &["--valid-from", &from])
        .await
        .document(0);
    let told = key(
        &place,
        "rotate",
        &new.public_key(),
        &["--grace", "0s", "--reason", "it was stolen"],
    )
    .await
    .document(0);
    assert_eq!(told["ending"][0]["publicKey"], old.public_key(), "{told}");
    assert_eq!(told["ending"].as_array().map(Vec::len), Some(1), "{told}");
    assert_eq!(told["later"].as_array().map(Vec::len), Some(1), "{told}");
    assert_eq!(told["later"][0]["publicKey"], next.public_key(), "{told}");
    assert_eq!(told["later"][0]["validUntil"], Value::Null, "{told}");
    key(&place, "revoke", &next.public_key(), &[]).await.document(0);
    let again = key(&place, "rotate", &new.public_key(), &["--grace", "0s"])
        .await
        .document(0);
    assert_eq!(again["later"], json!([]), "{again}");
    let late = old
        .draft(&reservations[2], "cleared")
        .message(Expect::Refused("signature_mismatch"));
    place.publish(&[late, new.cleared(&reservations[3])]).await;
    until("one settles, one does not", PATIENCE, async || {
        (count(&db, "settlements").await == 3 && count(&db, "dead_letters").await == 1).then_some(())
    })
    .await;
    let acts = ask(&place, &["audit", "list", "--act", "key rotate"]).await.lines(0);
    assert_eq!(acts.len(), 2, "{acts:?}");
    assert_eq!(acts[1]["outcome"]["ending"], json!([old.public_key()]));
    place.settle_up(worker).await;
}

#[tokio::test]
async fn whoever_gives_a_key_proves_to_have_it() {
    let (place, partner) = with_partner("key_proof", "1000").await;
    let new = with_key(&partner);
    let required = ["--set", "registry.key_proof_required=true"];
    let challenge = async |new: &Partner| {
        let told = key(&place, "challenge", &new.public_key(), &[]).await.document(0);
        assert!(time(&told["expiresAt"]) > Timestamp::now());
        told["challenge"].as_str().expect("a text").to_owned()
    };
    key(&place, "add", &new.public_key(), &required)
        .await
        .refused(2, "registry.key_proof_required is on");
    key(&place, "add", &new.public_key(), &["--proof", &"0".repeat(130)])
        .await
        .refused(1, "nothing that this key was to sign");
    let first = challenge(&new).await;
    let text = challenge(&new).await;
    assert_ne!(first, text, "drawn anew");
    for (signer, text) in [
        (&partner.key, &text),
        (&new.key, &first),
        (&new.key, &format!("{text} ")),
    ] {
        let proof = sign(signer, text);
        key(
            &place,
            "add",
            &new.public_key(),
            &[&["--proof", &proof], &required[..]].concat(),
        )
        .await
        .refused(1, "the proof is no signature of what this key was to sign");
    }
    let proof = sign(&new.key, &text);
    let told = key(
        &place,
        "add",
        &new.public_key(),
        &[&["--proof", &proof], &required[..]].concat(),
    )
    .await
    .document(0);
    assert_eq!(told["result"], "added");
    time(&told["provenAt"]);
    // Once is enough for a change of its validity; the proof itself proves once.
    let until = "2099-01-01T00:00:00Z";
    let told = key(
        &place,
        "add",
        &new.public_key(),
        &[&["--valid-until", until], &required[..]].concat(),
    )
    .await
    .document(0);
    assert_eq!(told["result"], "updated");
    key(&place, "add", &new.public_key(), &["--proof", &proof])
        .await
        .refused(1, "nothing that this key was to sign");
    // What was to be signed is over after a while.
    let newest = with_key(&partner);
    let text = challenge(&newest).await;
    let db = place.db().await;
    db.execute("UPDATE settled.key_challenges SET expires_at = clock_timestamp()", &[])
        .await
        .expect("time passes");
    let proof = sign(&newest.key, &text);
    let flags = [&["--grace", "1h", "--proof", &proof], &required[..]].concat();
    key(&place, "rotate", &newest.public_key(), &flags)
        .await
        .refused(1, "not any more");
    let text = challenge(&newest).await;
    let proof = sign(&newest.key, &text);
    let flags = [&["--grace", "1h", "--proof", &proof], &required[..]].concat();
    let told = key(&place, "rotate", &newest.public_key(), &flags).await.document(0);
    assert_eq!(told["ending"].as_array().map(Vec::len), Some(2), "{told}");
    // Nobody else's key, and nobody's partner.
    let words = [
        "key",
        "challenge",
        "--enterprise-id",
        "ghost",
        "--public-key",
        &new.public_key(),
    ];
    ask(&place, &words).await.refused(1, "no partner ghost");
    place.audit().await;
}

#[tokio::test]
async fn a_key_that_ends_is_told_before() {
    let (place, partner) = with_partner("key_ends", "1000").await;
    let line = async || {
        let checks = ask(&place, &["doctor"]).await;
        let checks: Value = serde_json::from_str(&checks.out).expect("JSON");
        let all = checks
            .as_array()
            .cloned()
            .or_else(|| checks["checks"].as_array().cloned());
        let keys = all.expect("checks").into_iter().find(|check| check["name"] == "keys");
        keys.expect("the line about keys")
    };
    assert_eq!(line().await["hint"], Value::Null);
    let soon = Timestamp::now() + SignedDuration::from_hours(24);
    let far = Timestamp::now() + SignedDuration::from_hours(24 * 30);
    let until = |time: Timestamp| format!("{time:.3}");
    key(&place, "add", &partner.public_key(), &["--valid-until", &until(soon)])
        .await
        .document(0);
    let told = line().await;
    assert_eq!(told["ok"], true, "{told}");
    let hint = told["hint"].as_str().expect("a hint");
    assert!(
        hint.contains("the last key of acme ends at") && hint.contains("settled key rotate"),
        "{hint}"
    );
    let worker = place
        .ready_worker(&[("SETTLED_REGISTRY__KEY_USE_INTERVAL", "100ms")])
        .await;
    metric_is(&worker, "settled_keys_ending 1").await;
    // One that lives on is enough.
    let new = with_key(&partner);
    key(&place, "add", &new.public_key(), &["--valid-until", &until(far)])
        .await
        .document(0);
    metric_is(&worker, "settled_keys_ending 0").await;
    assert_eq!(line().await["hint"], Value::Null);
    place.settle_up(worker).await;
}

/// Pasted by mistake, wherever on the line: known for what it is, and nowhere repeated.
#[tokio::test]
async fn what_is_no_public_key_is_refused_and_not_repeated() {
    let (place, _) = with_partner("key_slips", "1000").await;
    let secret = "5HueCGU8rMjxEXxiPuD5BDku4MkFqeZyd4dZ1jvhTVqvbTLvyTJ";
    let hex = "c0ffee11".repeat(8);
    for (text, piece) in [
        (secret, "private key"),
        (&hex, "may be a private one"),
        (&format!("0x{hex}"), "private key"),
        ("not-hex", "not a public key"),
    ] {
        let answer = key(&place, "add", text, &[]).await;
        let (message, hint) = answer.refusal(2);
        assert!(message.contains(piece) && hint.contains("xpub"), "{message} {hint}");
        assert!(!answer.all().contains(text), "it is repeated");
        // In the wrong place.
        let answer = ask(&place, &["key", "revoke", text]).await;
        assert!(text == "not-hex" || !answer.all().contains(text), "{}", answer.all());
        let answer = ask(&place, &["key", "list", "--partner", text]).await;
        assert!(text == "not-hex" || !answer.all().contains(text), "{}", answer.all());
    }
    let generator = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798";
    for act in ["add", "challenge"] {
        key(&place, act, generator, &[])
            .await
            .refused(2, "everybody can make the private half of this key");
    }
    key(&place, "rotate", generator, &["--grace", "1h"])
        .await
        .refused(2, "everybody can make the private half of this key");
    place.audit().await;
}

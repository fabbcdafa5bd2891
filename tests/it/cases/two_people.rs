//! What is large takes two people, who are not one by any name.

use serde_json::Value;

use crate::kit::{
    command::Answer,
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, until},
};

/// Somebody with a login of the database, and what they may type.
struct Login {
    url: String,
}

impl Login {
    async fn new(place: &Place, name: &str) -> Self {
        let role = format!("{}_{name}", place.name);
        let db = place.db().await;
        db.batch_execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'p' IN ROLE {owner}",
            owner = crate::kit::support::userinfo(&place.database_url).0
        ))
        .await
        .expect("a login");
        Self {
            url: place.database_url_of(&role),
        }
    }

    async fn says(&self, place: &Place, above: (&str, &str), words: &[&str], operator: &str) -> Answer {
        let mut command = place.command(&[&["dead-letters"], words, &["--json", "--operator", operator]].concat());
        command.env("SETTLED_DATABASE_URL", &self.url).env(above.0, above.1);
        Answer::of(&command.output().await.expect("settled runs"))
    }

    async fn forget(self, place: &Place) {
        let role = crate::kit::support::userinfo(&self.url).0;
        let db = place.db().await;
        db.batch_execute(&format!("DROP ROLE {role}")).await.expect("no login");
    }
}

async fn stranded(place: &Place, count: usize) -> Partner {
    let partner = Partner::new("acme");
    place.strand(&partner, "A partner", "1000000", (count, "7")).await;
    partner
}

/// A purge has no plan: two people name the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_purge_takes_two_people() {
    let place = Place::new("two_purge").await;
    let worker = place.ready_worker(&COLLECTS).await;
    let partner = stranded(&place, 6).await;
    let db = place.db().await;
    let letters = async || crate::kit::support::count(&db, "dead_letters").await;
    until("they are collected", PATIENCE, async || {
        (letters().await == 6).then_some(())
    })
    .await;
    let enterprise = partner.enterprise.as_str();
    place
        .json(&[
            "dead-letters",
            "discard",
            "--partner",
            enterprise,
            "--reason",
            "why",
            "--yes",
        ])
        .await;
    place
        .tamper("UPDATE settled.dead_letters SET discarded_at = now() - interval '1 day'")
        .await;
    let (ann, bob) = (Login::new(&place, "ann").await, Login::new(&place, "bob").await);
    let many = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "5");
    let sql = "SELECT to_char(now() AT TIME ZONE 'UTC' - interval '1 hour', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')";
    let time: String = db.query_one(sql, &[]).await.expect("a time").get(0);
    let purge = ["purge", "--discarded-before", &time, "--reason", "why", "--yes"];
    let proposed = ann.says(&place, many, &purge, "ann").await.document(3);
    assert_eq!(
        (&proposed["act"], &proposed["purged"]),
        (&"purge propose".into(), &0.into())
    );
    for (login, name) in [(&ann, "ann"), (&ann, "bob"), (&bob, "ann")] {
        login
            .says(&place, many, &purge, name)
            .await
            .refused(1, "takes two people");
    }
    // Another time is another purge.
    let other = ["purge", "--discarded-before", "2h", "--reason", "why", "--yes"];
    assert_eq!(bob.says(&place, many, &other, "bob").await.document(3)["purged"], 0);
    assert_eq!(letters().await, 6);
    let purged = bob.says(&place, many, &purge, "bob").await.document(0);
    assert_eq!((&purged["act"], &purged["purged"]), (&"purge".into(), &6.into()));
    // What is not many takes one.
    assert_eq!(ann.says(&place, many, &purge, "ann").await.document(0)["purged"], 0);
    worker.terminate().await;
    ann.forget(&place).await;
    bob.forget(&place).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_act_takes_two_people() {
    let place = Place::new("two_people").await;
    let worker = place.ready_worker(&COLLECTS).await;
    let partner = stranded(&place, 6).await;
    let db = place.db().await;
    place.collected(6).await;
    place.add_key(&partner).await;
    let (ann, bob) = (Login::new(&place, "ann").await, Login::new(&place, "bob").await);
    let many = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "5");
    let dear = ("SETTLED_DEAD_LETTERS__APPROVE_AMOUNTS", "BTC=41");
    let cheap = ("SETTLED_DEAD_LETTERS__APPROVE_AMOUNTS", "BTC=42,ETH=0");

    // One is enough where nothing is large.
    let planned = ann
        .says(&place, cheap, &["plan", "--partner", "acme"], "ann")
        .await
        .document(0);
    assert_eq!((&planned["twoPeople"], &planned["messages"]), (&Value::Null, &6.into()));
    // By messages, and by money.
    for large in [many, dear] {
        let shown = place
            .command(&["dead-letters", "plan", "show", "1", "--json"])
            .env(large.0, large.1)
            .output();
        let shown = Answer::of(&shown.await.expect("settled runs")).document(0);
        assert!(shown["twoPeople"].as_str().is_some(), "{shown}");
        let (message, hint) = ann
            .says(&place, large, &["replay", "1", "--reason", "why"], "ann")
            .await
            .refusal(1);
        assert!(
            message.contains("takes two people") && hint.contains("plan approve 1"),
            "{message} {hint}"
        );
    }
    // What is selected by filters can not be approved: it is planned first.
    let by_filter = ["discard", "--partner", "acme", "--reason", "why"];
    let (message, hint) = ann.says(&place, many, &by_filter, "ann").await.refusal(1);
    assert!(
        message.contains("a plan") && hint.contains("dead-letters plan"),
        "{message}"
    );

    // Neither another name nor another login alone makes two of one.
    let approve = ["plan", "approve", "1", "--reason", "I looked"];
    let ann_login = format!("{}_ann", place.name);
    for (login, operator, shared) in [
        (&ann, "bob", ann_login.as_str()),
        (&bob, "ann", "ann"),
        (&bob, "ANN", "ANN"),
        (&bob, ann_login.as_str(), ann_login.as_str()),
    ] {
        let (message, _) = login.says(&place, many, &approve, operator).await.refusal(1);
        assert!(
            message.contains(&format!("{shared} can not be both")),
            "{operator}: {message}"
        );
    }
    // What was planned to be refused may settle all the same: of a replay of everything all that it could move counts.
    place.json(&["partner", "suspend", "--enterprise-id", "acme"]).await;
    let planned = ann
        .says(&place, dear, &["plan", "--partner", "acme"], "ann")
        .await
        .document(0);
    assert_eq!(planned["wouldMove"], serde_json::json!([]), "{planned}");
    place.json(&["partner", "resume", "--enterprise-id", "acme"]).await;
    let number = planned["plan"].to_string();
    let everything = ["replay", number.as_str(), "--all-verdicts", "--reason", "why"];
    let (message, _) = ann.says(&place, dear, &everything, "ann").await.refusal(1);
    assert!(message.contains("42 BTC is more than"), "{message}");
    // For another act it does not count, nor once it is over.
    let for_discard = ["plan", "approve", "1", "--for", "discard", "--reason", "I looked"];
    let approved = bob.says(&place, many, &for_discard, "bob").await.document(0);
    assert_eq!(
        (&approved["act"], &approved["operator"]),
        (&"discard".into(), &"bob".into())
    );
    let replay = ["replay", "1", "--reason", "the key is there"];
    let (message, _) = ann.says(&place, many, &replay, "ann").await.refusal(1);
    assert!(message.contains("nobody else has approved"), "{message}");
    let short = ("SETTLED_DEAD_LETTERS__APPROVAL_LASTS", "1s");
    bob.says(&place, short, &approve, "bob").await.document(0);
    until("it is over", PATIENCE, async || {
        let sql = "SELECT bool_and(expires_at < clock_timestamp()) FROM settled.approvals WHERE act = 'replay'";
        db.query_one(sql, &[])
            .await
            .expect("approvals")
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
    let (message, _) = ann.says(&place, many, &replay, "ann").await.refusal(1);
    assert!(message.contains("the approval was over at"), "{message}");
    // Who approved can not act; another, even a third one, can.
    let approved = bob.says(&place, many, &approve, "bob").await.document(0);
    assert_eq!(
        approved["wouldMove"],
        serde_json::json!([{"currency": "BTC", "quantity": "42"}])
    );
    let (message, _) = bob.says(&place, many, &replay, "carl").await.refusal(1);
    assert!(message.contains("can not be both"), "{message}");
    let run = ann.says(&place, many, &replay, "ann").await.document(0);
    assert_eq!(run["asPlanned"], true, "{run}");

    let acts = Answer::of(&place.run(&["audit", "list", "--act", "plan approve", "--json"]).await).lines(0);
    assert_eq!(acts.len(), 3);
    let bob_login = format!("{}_bob", place.name);
    for act in acts {
        assert_eq!(
            (&act["operator"], &act["sessionUser"]),
            (&"bob".into(), &bob_login.as_str().into())
        );
        assert_eq!(act["filters"]["plan"], 1);
    }
    // What was approved stays written.
    for change in [
        "UPDATE settled.approvals SET why = 'x'",
        "DELETE FROM settled.approvals",
    ] {
        assert!(db.execute(change, &[]).await.is_err(), "{change}");
    }
    ann.forget(&place).await;
    bob.forget(&place).await;
    place.settle_up(worker).await;
}

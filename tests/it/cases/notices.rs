//! What is done to a partner itself is told as an event, once it is committed: suspended, in quarantine, resumed, and that its
//! last key ends.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio_postgres::error::SqlState;

use crate::kit::{
    amqp::Seen,
    auditor::event_id,
    command::{Answer, ask, ask_in},
    contract,
    partner::Partner,
    support::{PATIENCE, Place, connect, count, until, with_partner},
};

const QUICK: [(&str, &str); 2] = [
    ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ("SETTLED_REGISTRY__KEY_USE_INTERVAL", "100ms"),
];

async fn partner(place: &Place, act: &str, flags: &[&str]) -> Answer {
    ask(place, &[&["partner", act, "--enterprise-id", "acme"], flags].concat()).await
}

/// What was told of partners themselves, in order.
async fn told(place: &Place) -> Vec<(Seen, Value)> {
    place.events.catch_up(place.line()).await;
    let seen = place.events.seen().into_iter();
    let read = seen.map(|seen| {
        let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        (seen, event)
    });
    read.filter(|(_, event)| contract::is_of_a_partner(event)).collect()
}

/// Waits until so many were told, and nothing is left to be told.
async fn all_told(place: &Place, many: usize) -> Vec<(Seen, Value)> {
    let db = place.db().await;
    until("they are told", PATIENCE, async || {
        let told = told(place).await;
        (told.len() >= many && count(&db, "outbox").await == 0).then_some(())
    })
    .await;
    let told = told(place).await;
    assert_eq!(told.len(), many, "{told:?}");
    told
}

/// An event is what its type, the time of its act and its data say, and its message is as every event's.
fn is_told((seen, event): &(Seen, Value), kind: &str, at: &Value, data: &Value) {
    let at = at.as_str().expect("a time");
    let id = event_id(&format!("{kind}|acme|{at}"));
    let expected = json!({
        "specversion": "1.0", "id": id, "source": "/settled", "type": kind, "subject": "acme", "time": at,
        "datacontenttype": "application/json", "data": data,
    });
    assert_eq!(*event, expected);
    is_a_single_event(seen, kind, &id);
}

fn is_a_single_event(seen: &Seen, kind: &str, id: &str) {
    assert_eq!(seen.routing_key, format!("{kind}.acme"));
    assert_eq!(seen.message_id(), Some(id));
    let content_type = seen.properties.content_type().as_ref().map(|kind| kind.as_str());
    assert_eq!(content_type, Some("application/cloudevents+json"));
    assert_eq!(*seen.properties.delivery_mode(), Some(2));
}

async fn is_in_order(place: &Place) {
    for command in [&["reconcile", "--since", "1h"][..], &["doctor"]] {
        let answer = ask(place, command).await;
        assert_eq!(answer.code, Some(0), "{command:?}: {}", answer.all());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_done_to_a_partner_is_told_once() {
    let (place, _) = with_partner("notices", "1000").await;
    let worker = place.ready_worker(&QUICK).await;
    let suspended = partner(&place, "suspend", &["--reason", "a secret of the desk"])
        .await
        .document(0);
    let suspended = &suspended["suspendedAt"];
    let [first] = <[_; 1]>::try_from(all_told(&place, 1).await).expect("one");
    let data = json!({"enterpriseId": "acme", "since": suspended});
    is_told(&first, "partner.suspended", suspended, &data);
    let quarantined = partner(&place, "quarantine", &["--reason", "a secret of the desk"])
        .await
        .document(0);
    let quarantined = &quarantined["quarantinedAt"];
    // What is so already is not done, and not told; nor is what is refused.
    for act in ["suspend", "quarantine"] {
        let again = partner(&place, act, &["--reason", "again"]).await.document(0);
        assert_eq!(again["result"], "exists");
    }
    for act in ["suspend", "quarantine", "resume"] {
        ask(&place, &["partner", act, "--enterprise-id", "ghost", "--reason", "x"])
            .await
            .refused(1, "no partner ghost");
    }
    let before = Timestamp::now();
    partner(&place, "resume", &[]).await.document(0);
    let again = partner(&place, "resume", &[]).await.document(0);
    assert_eq!(again["result"], "exists");
    let [_, second, third] = <[_; 3]>::try_from(all_told(&place, 3).await).expect("three");
    let data = json!({"enterpriseId": "acme", "since": quarantined});
    is_told(&second, "partner.quarantined", quarantined, &data);
    let resumed = third.1["data"]["since"].clone();
    let data = json!({
        "enterpriseId": "acme", "since": resumed, "suspendedSince": suspended, "quarantinedSince": quarantined,
    });
    is_told(&third, "partner.resumed", &resumed, &data);
    let at: Timestamp = resumed.as_str().expect("a time").parse().expect("RFC 3339");
    assert!(before.duration_since(at).abs() < SignedDuration::from_secs(30), "{at}");
    // Of one of the two it says that one alone.
    let suspended = partner(&place, "suspend", &[]).await.document(0)["suspendedAt"].clone();
    partner(&place, "resume", &[]).await.document(0);
    let last = all_told(&place, 5).await.remove(4).1;
    assert_eq!(last["data"]["suspendedSince"], suspended);
    assert_eq!(last["data"].get("quarantinedSince"), None);
    for (seen, _) in told(&place).await {
        let text = String::from_utf8_lossy(&seen.body).into_owned();
        assert!(!text.contains("secret"), "why is the desk's own: {text}");
    }
    let (_, metrics) = worker.get("/metrics").await.expect("metrics");
    for (kind, many) in [
        ("partner.suspended", 2),
        ("partner.quarantined", 1),
        ("partner.resumed", 2),
        ("key.ending", 0),
    ] {
        let line = format!("settled_events_total{{type=\"{kind}\",fate=\"confirmed\"}} {many}");
        assert!(metrics.contains(&line), "{line}");
    }
    is_in_order(&place).await;
    place.settle_up(worker).await;
}

/// Committed is told, whoever is there: the next worker does it, and in either format of events each is a message of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_done_while_no_worker_runs_is_told_by_the_next() {
    let (place, _) = with_partner("notices_later", "1000").await;
    let db = place.db().await;
    let quarantined = partner(&place, "quarantine", &["--reason", "x"]).await.document(0);
    partner(&place, "resume", &[]).await.document(0);
    partner(&place, "resume", &[]).await.document(0);
    assert_eq!(count(&db, "outbox").await, 2);
    let waiting = ask(&place, &["outbox", "list"]).await.lines(0);
    let keys: Vec<&Value> = waiting.iter().map(|one| &one["routingKey"]).collect();
    assert_eq!(keys, ["partner.quarantined.acme", "partner.resumed.acme"]);
    assert!(
        waiting
            .iter()
            .all(|one| one["kind"] == "event" && one["state"] == "waiting")
    );
    is_in_order(&place).await;
    assert!(told(&place).await.is_empty());
    let batched = ("SETTLED_EVENTS__FORMAT", "batched");
    let worker = place.ready_worker(&[&QUICK[..], &[batched]].concat()).await;
    let both = all_told(&place, 2).await;
    let since = &quarantined["quarantinedAt"];
    let data = json!({"enterpriseId": "acme", "since": since});
    is_told(&both[0], "partner.quarantined", since, &data);
    assert_eq!(both[1].1["data"]["quarantinedSince"], *since);
    is_a_single_event(&both[1].0, "partner.resumed", both[1].1["id"].as_str().expect("an id"));
    // A row of such a kind can say no more than it does.
    is_in_order(&place).await;
    place.settle_up(worker).await;
}

/// An act that is undone is not told, by whatever hand; one that is committed is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_commit_is_not_told() {
    let (place, _) = with_partner("notices_undone", "1000").await;
    let worker = place.ready_worker(&QUICK).await;
    let db = place.db().await;
    let suspend = "UPDATE settled.partners SET suspended_at = clock_timestamp()";
    db.batch_execute(&format!("BEGIN; {suspend}; ROLLBACK"))
        .await
        .expect("undone");
    // What changes nothing of it.
    db.batch_execute("UPDATE settled.partners SET suspended_at = NULL, quarantined_at = NULL, name = 'another'")
        .await
        .expect("no change");
    assert_eq!(count(&db, "outbox").await, 0);
    db.batch_execute(suspend).await.expect("by hand");
    let [one] = <[_; 1]>::try_from(all_told(&place, 1).await).expect("one");
    assert_eq!(one.1["type"], "partner.suspended");
    place.settle_up(worker).await;
}

/// Who registers partners has no right on the outbox, with which it could publish anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registrar_tells_without_a_right_on_the_outbox() {
    let (place, _) = with_partner("notices_role", "1000").await;
    ask(&place, &["roles", "--apply"]).await.document(0);
    let login = format!("{}_registrar", place.name);
    let db = place.db().await;
    let sql = format!("CREATE ROLE {login} LOGIN PASSWORD 'p' IN ROLE settled_registrar");
    db.batch_execute(&sql).await.expect("a login");
    let url = place.database_url_of(&login);
    let mut since = Vec::new();
    for act in ["suspend", "quarantine", "resume"] {
        let words = ["partner", act, "--enterprise-id", "acme", "--reason", "x"];
        let done = ask_in(&[("SETTLED_DATABASE_URL", &url)], &words).await.document(0);
        assert_eq!(done["result"], "updated");
        since.push(done);
    }
    let registrar = connect(&url).await;
    for sql in [
        "INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
         VALUES (gen_random_uuid(), 3, '[]', 0, now(), now())",
        "SELECT settled.tell_of_partner()",
        "SELECT count(*) FROM settled.outbox",
    ] {
        let refused = registrar.batch_execute(sql).await.expect_err(sql);
        let code = refused.code().map(|code| code.code().to_owned());
        assert_eq!(code.as_deref(), Some("42501"), "{sql}: {refused:?}");
    }
    let worker = place.ready_worker(&QUICK).await;
    let all = all_told(&place, 3).await;
    let kinds: Vec<&Value> = all.iter().map(|(_, event)| &event["type"]).collect();
    assert_eq!(kinds, ["partner.suspended", "partner.quarantined", "partner.resumed"]);
    assert_eq!(all[0].1["data"]["since"], since[0]["suspendedAt"]);
    is_in_order(&place).await;
    drop(registrar);
    place.settle_up(worker).await;
    db.batch_execute(&format!("DROP ROLE {login}")).await.expect("it goes");
}

/// Each worker that notices tells it, under one id and byte for byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_ends_is_told_under_one_id() {
    let (place, acme) = with_partner("notices_key", "1000").await;
    let beta = Partner::new("beta");
    place.register(&beta).await;
    let key = acme.public_key();
    let ends = format!("{:.3}", Timestamp::now() + SignedDuration::from_hours(24));
    let words = [
        "key",
        "add",
        "--enterprise-id",
        "acme",
        "--public-key",
        &key,
        "--valid-until",
        &ends,
    ];
    let added = ask(&place, &words).await.document(0);
    let db = place.db().await;
    let worker = place.ready_worker(&QUICK).await;
    let [(seen, event)] = <[_; 1]>::try_from(all_told(&place, 1).await).expect("one");
    let id = event_id(&format!("key.ending|acme|{key}|{ends}"));
    let expected = json!({
        "specversion": "1.0", "id": id, "source": "/settled", "type": "key.ending", "subject": "acme",
        "time": added["createdAt"], "datacontenttype": "application/json",
        "data": {"enterpriseId": "acme", "publicKey": key, "endsAt": ends},
    });
    assert_eq!(event, expected);
    is_a_single_event(&seen, "key.ending", &id);
    // It notices again and again, and tells once.
    assert!(worker.terminate().await.success());
    drop(worker);
    let worker = place.ready_worker(&QUICK).await;
    let [_, (again, _)] = <[_; 2]>::try_from(all_told(&place, 2).await).expect("two");
    assert_eq!((again.body, again.routing_key), (seen.body, seen.routing_key));
    // Another end is another event; and with a key that goes on there is nothing to tell.
    let sooner = format!("{:.3}", Timestamp::now() + SignedDuration::from_hours(12));
    let words = [
        "key",
        "add",
        "--enterprise-id",
        "acme",
        "--public-key",
        &key,
        "--valid-until",
        &sooner,
    ];
    ask(&place, &words).await.document(0);
    let other = all_told(&place, 3).await.remove(2).1;
    assert_eq!(other["id"], event_id(&format!("key.ending|acme|{key}|{sooner}")));
    assert_eq!(count(&db, "outbox_refused").await, 0);
    is_in_order(&place).await;
    place.settle_up(worker).await;
}

/// What no calendar of ours reads would never leave the outbox, and what is to come would be the last word for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_since_when_that_is_none_is_refused() {
    let (place, _) = with_partner("no_time", "1000").await;
    let db = place.db().await;
    for (state, why) in [("suspended_at", ""), ("quarantined_at", ", quarantine_reason = 'x'")] {
        for since in [
            "infinity",
            "-infinity",
            "11000-01-01 UTC",
            "0044-03-15 UTC BC",
            "tomorrow",
        ] {
            let act = format!("UPDATE settled.partners SET {state} = '{since}'{why}");
            let refused = db.batch_execute(&act).await.expect_err(&act);
            // By the column's own rule, or as none since when something is so.
            let code = refused.code().map(SqlState::code);
            assert!(matches!(code, Some("23514" | "22008")), "{act}: {refused}");
        }
    }
    assert_eq!(count(&db, "outbox").await, 0);
    // Whatever zone who acts is in; and a partner is resumed once neither of the two is so.
    for (act, told) in [
        (
            "SET timezone = 'FOO+100'; UPDATE settled.partners SET suspended_at = now(), quarantined_at = now(), quarantine_reason = 'x'",
            1,
        ),
        ("UPDATE settled.partners SET suspended_at = NULL", 1),
        (
            "UPDATE settled.partners SET quarantined_at = NULL, quarantine_reason = NULL",
            2,
        ),
    ] {
        db.batch_execute(act).await.expect(act);
        assert_eq!(count(&db, "outbox").await, told, "{act}");
    }
    let worker = place.ready_worker(&QUICK).await;
    let kinds: Vec<Value> = all_told(&place, 3)
        .await
        .into_iter()
        .map(|(_, event)| event["type"].clone())
        .collect();
    assert_eq!(kinds, ["partner.suspended", "partner.quarantined", "partner.resumed"]);
    is_in_order(&place).await;
    place.settle_up(worker).await;
}

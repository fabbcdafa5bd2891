//! What only the broker's management API shows: `settled doctor` and the gauges see it where the API is to be asked, say so
//! where it is not, and change nothing.

use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::kit::{
    amqp::Message,
    auditor::Expect,
    command::ask_in,
    partner::Partner,
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, until, userinfo, with_path},
};

const URL: &str = "SETTLED_BROKER_MANAGEMENT_URL";

async fn manage(place: &Place, method: &str, path: &str, body: Option<Value>) {
    let (status, answer) = place.services.manage(method, path, body).await;
    assert!(matches!(status, 201 | 204), "{method} {path}: {status} {answer}");
}

/// The lines about what management shows.
async fn lines(place: &Place, url: &str) -> Vec<Value> {
    let settings = [
        ("SETTLED_DATABASE_URL", place.database_url.as_str()),
        ("SETTLED_BROKER_URL", place.broker_url.as_str()),
        (URL, url),
    ];
    let answer = ask_in(&settings, &["doctor"]).await;
    let document = answer.document(answer.code.expect("an exit code"));
    let lines = document["checks"].as_array().expect("lines").iter();
    let is_ours = |line: &&Value| {
        let name = line["name"].as_str().unwrap_or_default();
        name.starts_with("management") || name == "broker_dead_letters"
    };
    lines.filter(is_ours).cloned().collect()
}

/// Exactly this line tells of a problem, in these words, and what to do.
async fn problem(place: &Place, name: &str, words: &str) {
    let lines = lines(place, &place.services.management).await;
    let wrong: Vec<&Value> = lines.iter().filter(|line| line["ok"] == false).collect();
    assert_eq!(wrong.len(), 1, "{name}: {lines:?}");
    assert_eq!(wrong[0]["name"], name, "{wrong:?}");
    let detail = wrong[0]["detail"].as_str().expect("a sentence");
    assert!(detail.contains(words), "{words:?} is not in {detail:?}");
    assert!(wrong[0]["hint"].is_string(), "{wrong:?}");
}

async fn well(place: &Place) -> Vec<Value> {
    let lines = lines(place, &place.services.management).await;
    assert!(lines.iter().all(|line| line["ok"] == true), "{lines:?}");
    lines
}

async fn gauge(worker: &crate::kit::support::Worker, line: &str) {
    until(line, PATIENCE, async || {
        let (_, text) = worker.get("/metrics").await?;
        text.lines().any(|have| have == line).then_some(())
    })
    .await;
}

/// Bindings, policies and arguments, whatever the rights of the worker's user are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_amqp_does_not_show_is_seen() {
    let place = Place::new("management").await;
    let partner = Partner::new("acme");
    place.register_with(&partner, &["--own-queue"]).await;
    let vhost = &place.name;
    let names: Vec<Value> = well(&place).await.iter().map(|line| line["name"].clone()).collect();
    assert_eq!(
        names,
        [
            "management",
            "broker_dead_letters",
            "management: exchanges",
            "management: queue settlement.unreadable",
            "management: queue settlement.dead",
            "management: queue settlement.dead.broker",
            "management: queue settlement.updates",
            "management: queue settlement.epoch",
            "management: queue settlement.updates.acme",
            "management: queue settlement.dead.broker.*",
        ]
    );

    // Policies.
    let policy = format!("/api/policies/{vhost}/everything");
    for (definition, name, words) in [
        (
            json!({"message-ttl": 60_000}),
            "management: queue settlement.updates",
            "policy everything lets its messages expire",
        ),
        (
            json!({"expires": 60_000}),
            "management: queue settlement.unreadable",
            "deletes it when nobody uses it",
        ),
        (
            json!({"max-length": 10}),
            "management: queue settlement.dead.broker",
            "drops its oldest messages when it is full",
        ),
        (
            json!({"delivery-limit": 3}),
            "management: queue settlement.updates.acme",
            "lowers its delivery limit to 3",
        ),
    ] {
        let queue = name.rsplit(' ').next().expect("a queue").replace('.', "\\.");
        let body =
            json!({"pattern": format!("^{queue}$"), "definition": definition, "apply-to": "queues", "priority": 1});
        manage(&place, "PUT", &policy, Some(body)).await;
        until("the policy is seen", PATIENCE, async || {
            let lines = lines(&place, &place.services.management).await;
            lines.iter().any(|line| line["ok"] == false).then_some(())
        })
        .await;
        problem(&place, name, words).await;
        manage(&place, "DELETE", &policy, None).await;
        until("the policy is gone", PATIENCE, async || {
            let lines = lines(&place, &place.services.management).await;
            lines.iter().all(|line| line["ok"] == true).then_some(())
        })
        .await;
    }
    // One that bounds a queue that refuses what is too much is only worth knowing.
    let body =
        json!({"pattern": "^settlement\\.updates$", "definition": {"max-length": 1_000_000}, "apply-to": "queues"});
    manage(&place, "PUT", &policy, Some(body)).await;
    until("the policy is seen", PATIENCE, async || {
        let lines = well(&place).await;
        let hint = lines
            .iter()
            .find(|line| line["name"] == "management: queue settlement.updates")
            .and_then(|line| line["hint"].as_str().map(str::to_owned));
        hint.is_some_and(|hint| hint.contains("refuses what is published"))
            .then_some(())
    })
    .await;
    manage(&place, "DELETE", &policy, None).await;

    // Bindings.
    for (path, name, words) in [
        (
            format!("/api/bindings/{vhost}/e/settlement.dead/q/settlement.dead/%23"),
            "management: queue settlement.dead",
            "its binding to settlement.dead under \"#\" is missing",
        ),
        (
            format!("/api/bindings/{vhost}/e/settlement.updates/q/settlement.updates.acme/acme.deallocation.update"),
            "management: queue settlement.updates.acme",
            "under \"acme.deallocation.update\" is missing",
        ),
        (
            format!("/api/bindings/{vhost}/e/settlement.dead/e/settlement.dead.broker/%23"),
            "management: exchanges",
            "settlement.dead.broker is not bound to settlement.dead under #",
        ),
    ] {
        manage(&place, "DELETE", &path, None).await;
        problem(&place, name, words).await;
        assert!(place.run(&["topology"]).await.status.success());
        let again = [
            "partner",
            "add",
            "--enterprise-id",
            "acme",
            "--name",
            "A partner",
            "--own-queue",
        ];
        assert!(place.run(&again).await.status.success());
        well(&place).await;
    }
    // A binding too many is no problem, and is told.
    let path = format!("/api/bindings/{vhost}/e/settlement.events/q/settlement.updates");
    manage(&place, "POST", &path, Some(json!({"routing_key": "x"}))).await;
    let lines = well(&place).await;
    let mut hints = lines.iter().filter_map(|line| line["hint"].as_str());
    assert!(
        hints.any(|hint| hint.starts_with("it has further bindings, to settlement.events")),
        "{lines:?}"
    );
}

/// What the broker can not dead-letter is in no queue that anybody reads: doctor and the gauge see it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_at_the_broker_is_seen() {
    let place = Place::new("dlx").await;
    let vhost = &place.name;
    let bindings = format!("/api/bindings/{vhost}/e/settlement.dead");
    for path in [
        "/q/settlement.dead/%23",
        "/e/settlement.dead.broker/%23",
        "/q/test.dead/%23",
    ] {
        manage(&place, "DELETE", &format!("{bindings}{path}"), None).await;
    }
    let expiring = Message::new("acme.allocation.update", "late", Expect::Any)
        .with(|properties| properties.with_expiration("1".into()));
    place.line().publish(&[expiring]).await;
    let (settled, worker) = (
        format!(
            "settled_broker_dead_letters_waiting{{queue=\"settlement.updates\"}} {}",
            1
        ),
        place.worker(&[
            LEAVE_DEAD_LETTERS,
            (URL, &place.services.management),
            ("SETTLED_BROKER__MANAGEMENT_INTERVAL", "1s"),
        ]),
    );
    // It sees why, and is not ready.
    until("it says what is missing", PATIENCE, async || {
        let why = worker.not_ready().await;
        why.contains("settlement.dead.broker is not bound to settlement.dead")
            .then_some(())
    })
    .await;
    gauge(&worker, &settled).await;
    gauge(&worker, "settled_broker_management_answers 1").await;
    let found = lines(&place, &place.services.management).await;
    let line = found
        .iter()
        .find(|line| line["name"] == "broker_dead_letters")
        .expect("a line");
    assert_eq!(line["ok"], false);
    assert_eq!(
        line["detail"], "waiting at the broker to be dead-lettered: 1 of settlement.updates",
        "{line}"
    );
    // Mended, it comes when the broker tries again, which it does every three minutes: nobody waits for that here.
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
}

/// Without a URL it says that it did not ask; with one, why there is no answer, in time. A worker goes on without.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_answer_holds_up_nobody() {
    let place = Place::new("unmanaged").await;
    let not_asked = lines(&place, "").await;
    assert_eq!(not_asked.len(), 1);
    assert_eq!(
        (&not_asked[0]["name"], &not_asked[0]["ok"]),
        (&json!("management"), &json!(true))
    );
    assert!(
        not_asked[0]["detail"]
            .as_str()
            .is_some_and(|text| text.starts_with("not asked")),
        "{not_asked:?}"
    );

    // It takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent = format!("http://{}", silent.local_addr().expect("an address"));
    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let nowhere = format!("http://{}", nobody.local_addr().expect("an address"));
    drop(nobody);
    let management = &place.services.management;
    let (user, password) = userinfo(management);
    let wrong = management.replace(&format!("{user}:{password}@"), "nobody:wrong@");
    for (url, words) in [
        (silent.as_str(), "nothing within 5 s"),
        (&nowhere, "does not answer"),
        (&wrong, "refuses this login"),
        ("http://192.0.2.1:15672", "must begin with https://"),
    ] {
        let began = std::time::Instant::now();
        let found = lines(&place, url).await;
        assert!(began.elapsed() < PATIENCE / 2, "{url}: {:?}", began.elapsed());
        assert_eq!(found.len(), 1, "{found:?}");
        let (line, detail) = (&found[0], found[0]["detail"].as_str().expect("a sentence"));
        assert_eq!(line["ok"], false);
        assert!(detail.contains(words), "{words:?}: {line}");
        assert!(
            line["hint"].is_string() && !line.to_string().contains("wrong@"),
            "{line}"
        );
    }
    let worker = place.ready_worker(&[(URL, &silent)]).await;
    until("it says so, once", PATIENCE, async || {
        worker.said().contains("is not seen").then_some(())
    })
    .await;
    assert!(worker.is_ready().await);
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
    // With no user in it, the broker's asks.
    let (scheme, rest) = management.split_once("://").expect("a URL");
    let plain = format!("{scheme}://{}", rest.rsplit_once('@').expect("a user").1);
    let found = lines(&place, &with_path(&plain, "")).await;
    assert!(
        found.len() > 1 && found.iter().all(|line| line["ok"] == true),
        "{found:?}"
    );
}

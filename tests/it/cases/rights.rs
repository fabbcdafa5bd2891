//! What the broker's user may do is found out before a message is taken.

use serde_json::json;
use uuid::Uuid;

use crate::kit::{
    command::ask_in,
    partner::Partner,
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, until, userinfo},
};

/// A user of the broker that may do so much here, and the URL with it.
struct User {
    name: String,
    url: String,
}

impl User {
    async fn new(place: &Place) -> Self {
        let (name, secret) = (format!("{}_user", place.name), Uuid::new_v4().simple().to_string());
        let body = json!({"password": secret, "tags": ""});
        let path = format!("/api/users/{name}");
        assert_eq!(place.services.manage("PUT", &path, Some(body)).await.0, 201);
        let (user, password) = userinfo(&place.broker_url);
        let url = place
            .broker_url
            .replace(&format!("{user}:{password}@"), &format!("{name}:{secret}@"));
        Self { name, url }
    }

    async fn may(&self, place: &Place, write: &str) {
        self.may_do(place, ["", write, "settlement.(updates|dead|epoch)"]).await;
    }

    async fn may_do(&self, place: &Place, [configure, write, read]: [&str; 3]) {
        let body = json!({"configure": configure, "write": write, "read": read});
        let path = format!("/api/permissions/{}/{}", place.name, self.name);
        let (status, answer) = place.services.manage("PUT", &path, Some(body)).await;
        assert!(matches!(status, 201 | 204), "{status} {answer}");
    }

    async fn forget(self, place: &Place) {
        let path = format!("/api/users/{}", self.name);
        place.services.manage("DELETE", &path, None).await;
    }
}

/// A worker that may not publish what it settles takes nothing and moves nothing, says what `settled doctor` says, leaves no
/// message anywhere by asking, and goes on by itself once it may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_publish_moves_no_money() {
    let place = Place::new("may_not").await;
    // What no queue takes goes to another exchange: a question that were routed would be found there.
    for exchange in ["settlement.events", "settlement.dead"] {
        let path = format!("/api/exchanges/{}/astray", place.name);
        let fanout = json!({"type": "fanout", "durable": true});
        place.services.manage("PUT", &path, Some(fanout)).await;
        let path = format!("/api/queues/{}/astray", place.name);
        place
            .services
            .manage("PUT", &path, Some(json!({"durable": true})))
            .await;
        let path = format!("/api/bindings/{}/e/astray/q/astray", place.name);
        place.services.manage("POST", &path, Some(json!({}))).await;
        let policy = json!({
            "pattern": format!("^{}$", exchange.replace('.', "\\.")),
            "definition": {"alternate-exchange": "astray"},
            "apply-to": "exchanges",
        });
        let path = format!("/api/policies/{}/{exchange}", place.name);
        assert_eq!(place.services.manage("PUT", &path, Some(policy)).await.0, 201);
    }
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations: Vec<_> = (0..10).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let user = User::new(&place).await;
    user.may(&place, "settlement.(dead|unreadable|epoch)").await;
    let messages: Vec<_> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    place.publish(&messages).await;

    let settings = [
        ("SETTLED_BROKER_URL", user.url.as_str()),
        ("SETTLED_RETRY__MAX", "200ms"),
        LEAVE_DEAD_LETTERS,
    ];
    let worker = place.worker(&settings);
    let sentence = "permission to publish to settlement.events: ACCESS_REFUSED";
    until("it says what is missing", PATIENCE, async || {
        let (status, body) = worker.get("/readyz").await?;
        (status == 503 && body.contains(sentence) && body.contains("rabbitmqctl set_permissions")).then_some(())
    })
    .await;
    assert_eq!(place.line().depth("settlement.updates").await, 10);
    let db = place.db().await;
    let settled = "SELECT count(*) FROM settled.batches";
    assert_eq!(db.query_one(settled, &[]).await.expect("batches").get::<_, i64>(0), 0);

    // The other exchange is asked for as well, and each answer is the one of now.
    user.may(&place, "settlement.(events|epoch)").await;
    until("it says what is missing now", PATIENCE, async || {
        let (_, body) = worker.get("/readyz").await?;
        body.contains("permission to publish to settlement.dead: ACCESS_REFUSED")
            .then_some(())
    })
    .await;
    assert_eq!(place.line().depth("settlement.updates").await, 10);

    user.may(&place, "settlement.(events|dead|unreadable|epoch)").await;
    worker.ready().await;
    place.rest().await;
    assert_eq!(place.line().depth("astray").await, 0, "no question was a message");
    let told = place.events.seen().len();
    assert_eq!(told, 10, "only what was settled was told");
    assert!(
        worker.said().lines().filter(|line| line.contains(sentence)).count() <= 2,
        "it is said once"
    );

    // A right that is taken away is noticed before the next session takes anything.
    user.may(&place, "settlement.(dead|unreadable|epoch)").await;
    until("it says what is missing again", PATIENCE, async || {
        // A right that was there a moment ago is not asked for again: this may take a second session.
        place.line().delete("settlement.updates").await;
        assert!(place.run(&["topology"]).await.status.success());
        let (_, body) = worker.get("/readyz").await?;
        body.contains(sentence).then_some(())
    })
    .await;
    user.may(&place, "settlement.(events|dead|unreadable|epoch)").await;
    place.settle_up(worker).await;
    user.forget(&place).await;
}

/// With the line that the operators' page has for a worker nothing is missing; and each piece of it is needed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_line_of_the_page_is_enough_and_nothing_in_it_is_too_much() {
    const LINE: &str = "$ rabbitmqctl set_permissions -p settlement worker ";
    let page = include_str!("../../../docs/operators.md");
    let line = page.lines().find_map(|line| line.strip_prefix(LINE)).expect("the line");
    let patterns: Vec<&str> = line.split('\'').skip(1).step_by(2).collect();
    let [configure, write, read] = patterns[..] else {
        panic!("three patterns: {line}");
    };
    let place = Place::new("least_rights").await;
    let partner = Partner::new("acme");
    place.register_with(&partner, &["--own-queue"]).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations: Vec<_> = (0..2).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let user = User::new(&place).await;
    let urls = [
        ("SETTLED_DATABASE_URL", place.database_url.as_str()),
        ("SETTLED_BROKER_URL", user.url.as_str()),
    ];
    let missing = async || -> Vec<String> {
        let answer = ask_in(&urls, &["doctor"]).await;
        let document = answer.document(i32::from(!answer.succeeded()));
        let checks = document["checks"].as_array().expect("lines");
        let bad = checks.iter().filter(|check| check["ok"] == false);
        bad.map(|check| check["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    let settles = async |reservation, inbox: &str| {
        let worker = place.ready_worker(&[urls[1]]).await;
        place.line().declare(inbox).await;
        let message = partner.cleared(reservation);
        let message = message.with(|properties| properties.with_reply_to(inbox.into()));
        place.publish(&[message]).await;
        place.rest().await;
        assert_eq!(worker.terminate().await.code(), Some(0));
    };
    user.may_do(&place, [configure, write, read]).await;
    assert_eq!(missing().await, [""; 0]);
    settles(&reservations[0], "settlement.reply.acme.one").await;
    let told = place
        .events
        .seen()
        .into_iter()
        .find(|seen| seen.routing_key == "allocation.cleared.acme");
    let reply = place.line().get("settlement.reply.acme.one").await;
    assert_eq!(reply.body, told.expect("its event").body);

    let without = |pattern: &str, piece: &str, instead: &str| {
        assert_eq!(pattern.matches(piece).count(), 1, "{piece} in {pattern}");
        pattern.replace(piece, instead)
    };
    for (piece, instead, right) in [
        ("events|", "", "publish to settlement.events"),
        ("|dead", "", "publish to settlement.dead"),
        ("|unreadable", "", "publish to settlement.unreadable"),
        ("|epoch", "", "publish to settlement.epoch"),
    ] {
        user.may_do(&place, [configure, &without(write, piece, instead), read])
            .await;
        assert_eq!(missing().await, [format!("permission to {right}")], "{piece}");
    }
    for (piece, instead, rights) in [
        (
            "updates(\\..*)?|",
            "",
            &["settlement.updates", "settlement.updates.acme"][..],
        ),
        ("updates(\\..*)?", "updates", &["settlement.updates.acme"]),
        ("|dead|", "|", &["settlement.dead"]),
        (
            "|dead\\.broker(\\..*)?",
            "",
            &["settlement.dead.broker", "settlement.dead.broker.*"],
        ),
        ("broker(\\..*)?", "broker", &["settlement.dead.broker.*"]),
        ("|epoch", "", &["settlement.epoch"]),
    ] {
        user.may_do(&place, [configure, write, &without(read, piece, instead)])
            .await;
        let lacks = missing().await;
        let named: Vec<&str> = lacks
            .iter()
            .filter_map(|name| name.strip_prefix("permission to consume "))
            .collect();
        assert!(
            named.len() == lacks.len() && named.iter().all(|name| rights.contains(name)),
            "{piece}: {lacks:?}"
        );
        assert_eq!(named.len(), rights.len(), "{piece}: {lacks:?}");
    }
    // Without the default exchange everything settles, and nobody is answered.
    let write = without(write, "|amq\\.default", "");
    user.may_do(&place, [configure, &write, read]).await;
    settles(&reservations[1], "settlement.reply.acme.two").await;
    assert_eq!(place.line().depth("settlement.reply.acme.two").await, 0);
    place.audit().await;
    user.forget(&place).await;
}

/// A missing right in the database is not taken for a missing schema: the worker waits, and goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_that_can_not_be_seen_is_waited_for() {
    let place = Place::new("unseen").await;
    let role = format!("{}_role", place.name);
    let db = place.db().await;
    db.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'p'"))
        .await
        .expect("a role");
    let url = place.database_url_of(&role);
    let worker = place.worker(&[("SETTLED_DATABASE_URL", &url), ("SETTLED_RETRY__MAX", "200ms")]);
    until("it says what is missing", PATIENCE, async || {
        let (_, body) = worker.get("/readyz").await?;
        body.contains("the database user lacks a right").then_some(())
    })
    .await;
    assert!(!worker.said().contains("settled migrate"), "{}", worker.said());
    db.batch_execute(&format!(
        "GRANT USAGE ON SCHEMA settled TO {role};
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA settled TO {role};"
    ))
    .await
    .expect("granted");
    worker.ready().await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    db.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await
        .expect("it goes");
}

/// `drained` is said only if everything was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_at_the_end_is_said_once() {
    let place = Place::new("left").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservation = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&reservation)).await;
    let worker = place
        .ready_worker(&[
            ("SETTLED_WORKER__DRAIN_DEADLINE", "1s"),
            ("SETTLED_WORKER__LOCK_PATIENCE", "10s"),
            ("SETTLED_DATABASE__LOCK_TIMEOUT", "10s"),
        ])
        .await;
    // Somebody holds what the batch needs for longer than the worker has.
    let mut other = place.db().await;
    let open = other.transaction().await.expect("a transaction");
    open.batch_execute("LOCK TABLE settled.receipts IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("locked");
    place.publish(&[partner.cleared(&reservation)]).await;
    until("it is taken", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 0).then_some(())
    })
    .await;
    worker.terminate().await;
    let log = worker.said();
    open.rollback().await.expect("released");
    assert!(!log.contains("\"drained\""), "{log}");
    let said: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("before everything was done"))
        .collect();
    assert!(said.len() == 1 && said[0].contains("lane "), "{log}");
    // It comes again, and is settled by the next.
    let worker = place.ready_worker(&[]).await;
    place.rest().await;
    worker.terminate().await;
    let log = worker.said();
    assert!(
        log.contains("\"drained\"") && !log.contains("before everything was done"),
        "{log}"
    );
    place.audit().await;
}

/// Newer brokers ask for a right even to look at a queue. What a worker may not see is a gauge that is missing, and no more: as
/// on RabbitMQ 4.3, where it has the least rights that it can settle with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_depth_that_may_not_be_seen_keeps_nobody_from_settling() {
    let place = Place::new("unseen_depth").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations: Vec<_> = (0..5).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let user = User::new(&place).await;
    // No right of any kind on the queue settlement.unreadable.
    user.may(&place, "^settlement\\.(events|dead|epoch)$").await;
    let worker = place
        .ready_worker(&[("SETTLED_BROKER_URL", user.url.as_str()), LEAVE_DEAD_LETTERS])
        .await;
    let messages: Vec<_> = reservations.iter().map(|one| partner.cleared(one)).collect();
    place.publish(&messages).await;
    place.settle_up(worker).await;
    // `settled doctor` says what this user lacks, and the line that gives it; as who may declare, nothing is missing.
    let told = ask_in(
        &[
            ("SETTLED_DATABASE_URL", place.database_url.as_str()),
            ("SETTLED_BROKER_URL", user.url.as_str()),
        ],
        &["doctor"],
    )
    .await;
    assert!(
        told.all().contains("permission to publish to settlement.unreadable")
            && told.all().contains("rabbitmqctl set_permissions"),
        "{}",
        told.all()
    );
    // Who runs `settled topology` without the right to is told which line gives it.
    let (message, _) = ask_in(&[("SETTLED_BROKER_URL", user.url.as_str())], &["topology"])
        .await
        .refusal(1);
    assert!(
        message.starts_with("a right is missing") && message.contains("rabbitmqctl set_permissions -p"),
        "{message}"
    );
    user.forget(&place).await;
}

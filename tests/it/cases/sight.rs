//! What AMQP does not show a worker with the least rights is asked of the management API, where somebody said where that is:
//! on a wrong queue, or without its binding, it takes nothing, and says what `settled doctor` says.

use serde_json::{Value, json};

use crate::kit::{
    command::ask_in,
    partner::Partner,
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, Worker, until, userinfo, with_path, with_reservations},
};

const QUEUE: &str = "settlement.updates";

async fn manage(place: &Place, method: &str, path: &str, body: Option<Value>) {
    let (status, answer) = place.services.manage(method, path, body).await;
    assert!(matches!(status, 201 | 204), "{method} {path}: {status} {answer}");
}

/// A user that configures nothing and may ask the management API, and the broker's URL for it.
async fn least(place: &Place) -> (String, String) {
    let (user, secret) = (
        format!("{}_user", place.name),
        uuid::Uuid::new_v4().simple().to_string(),
    );
    let path = format!("/api/users/{user}");
    let body = json!({"password": secret, "tags": "monitoring"});
    manage(place, "PUT", &path, Some(body)).await;
    let rights = json!({
        "configure": "^$",
        "write": "^settlement\\.(events|dead|epoch)$",
        "read": "^settlement\\.((updates|dead)(\\..*)?|epoch)$",
    });
    let permissions = format!("/api/permissions/{}/{user}", place.name);
    manage(place, "PUT", &permissions, Some(rights)).await;
    let (name, password) = userinfo(&place.broker_url);
    let url = place
        .broker_url
        .replace(&format!("{name}:{password}@"), &format!("{user}:{secret}@"));
    (path, url)
}

/// Waits until the worker says what the doctor says of the queue, and that it has no consumer; the sentence.
async fn says_what_the_doctor_says(worker: &Worker, settings: &[(&str, &str)]) -> String {
    let name = format!("management: queue {QUEUE}");
    let said = until("the worker says what the doctor says", PATIENCE, async || {
        let why = worker.not_ready().await;
        if !why.contains(&name) {
            return None;
        }
        let answer = ask_in(settings, &["doctor"]).await;
        let report = answer.document(answer.code.expect("an exit code"));
        let checks = report["checks"].as_array().expect("lines");
        let check = checks.iter().find(|check| check["name"] == *name).expect("its line");
        assert_eq!(check["ok"], json!(false), "{check}");
        let detail = check["detail"].as_str().expect("a sentence").to_owned();
        let told: Value = serde_json::from_str(&why).unwrap_or_else(|_| json!(why));
        let is_same = why.contains(&detail) || told.to_string().contains(&detail.replace('"', "\\\""));
        is_same.then_some(detail)
    })
    .await;
    let attached = format!("settled_consumers_attached{{queue=\"{QUEUE}\"}} 0");
    until("nobody consumes", PATIENCE, async || {
        let (_, text) = worker.get("/metrics").await?;
        text.lines().any(|line| line == attached).then_some(())
    })
    .await;
    said
}

async fn settled(place: &Place, count: i64) {
    let db = place.db().await;
    until("it settles", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.settlements";
        let settled: i64 = db.query_one(sql, &[]).await.expect("settlements").get(0);
        (settled == count).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_amqp_hides_from_a_worker_the_management_api_shows_it() {
    let (place, partner, reservations) = with_reservations("sight", 2).await;
    let (user, broker) = least(&place).await;
    // With no user in it, the broker's asks.
    let (scheme, rest) = place.services.management.split_once("://").expect("a URL");
    let plain = format!("{scheme}://{}", rest.rsplit_once('@').expect("a user").1);
    let management = with_path(&plain, "");
    let settings = [
        ("SETTLED_DATABASE_URL", place.database_url.as_str()),
        ("SETTLED_BROKER_URL", broker.as_str()),
        ("SETTLED_BROKER_MANAGEMENT_URL", management.as_str()),
        ("SETTLED_BROKER__MANAGEMENT_INTERVAL", "1s"),
        LEAVE_DEAD_LETTERS,
    ];

    // Nothing leads away what can not be taken.
    let path = format!("/api/queues/{}/{QUEUE}", place.name);
    manage(&place, "DELETE", &path, None).await;
    let arguments = json!({"x-queue-type": "quorum", "x-delivery-limit": 50});
    manage(
        &place,
        "PUT",
        &path,
        Some(json!({"durable": true, "arguments": arguments})),
    )
    .await;
    let binding = format!("/api/bindings/{}/e/settlement.updates.all/q/{QUEUE}", place.name);
    manage(&place, "POST", &binding, Some(json!({"routing_key": ""}))).await;
    let worker = place.worker(&settings);
    let said = says_what_the_doctor_says(&worker, &settings).await;
    assert!(said.contains("x-dead-letter-exchange"), "{said}");
    place.line().publish(&[partner.cleared(&reservations[0])]).await;
    let read = place.db().await;
    let received = "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches";
    let received: i64 = read.query_one(received, &[]).await.expect("batches").get(0);
    assert_eq!((received, place.line().depth(QUEUE).await), (0, 1), "nothing is taken");
    manage(&place, "DELETE", &path, None).await;
    assert!(place.run(&["topology"]).await.status.success());
    worker.ready().await;
    place.publish(&[partner.cleared(&reservations[0])]).await;
    settled(&place, 1).await;

    // Under a worker at work: nothing leads to the queue any more.
    manage(&place, "DELETE", &format!("{binding}/~"), None).await;
    let said = says_what_the_doctor_says(&worker, &settings).await;
    assert!(said.contains("its binding to settlement.updates.all"), "{said}");
    assert!(place.run(&["topology"]).await.status.success());
    worker.ready().await;
    place.publish(&[partner.cleared(&reservations[1])]).await;
    settled(&place, 2).await;
    assert!(
        !worker.said().contains("not looked at"),
        "everything is seen: {}",
        worker.said()
    );
    place.settle_up(worker).await;
    manage(&place, "DELETE", &user, None).await;
}

/// Who takes a partner's own queue back unbinds it first: what is in it is settled all the same, and the queue is no wrong one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_own_queue_that_is_unbound_is_emptied() {
    const OWN: &str = "settlement.updates.beta";
    let place = Place::new("sight_own").await;
    let beta = Partner::new("beta");
    place.register_with(&beta, &["--own-queue"]).await;
    place.deposit(&beta, "BTC", "3").await;
    let reservations: Vec<_> = (0..3).map(|_| beta.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let messages: Vec<_> = reservations
        .iter()
        .map(|reservation| beta.cleared(reservation))
        .collect();
    place.publish(&messages).await;
    assert_eq!(place.line().depth(OWN).await, 3);
    let path = format!("/api/queues/{}/{OWN}/bindings", place.name);
    let (_, bindings) = place.services.manage("GET", &path, None).await;
    let bindings = bindings.as_array().expect("bindings").iter();
    for binding in bindings.filter(|binding| binding["source"] != "") {
        let text = |field: &str| binding[field].as_str().expect("text").to_owned();
        let (exchange, key) = (text("source"), text("properties_key"));
        let path = format!("/api/bindings/{}/e/{exchange}/q/{OWN}/{key}", place.name);
        manage(&place, "DELETE", &path, None).await;
    }
    let (user, broker) = least(&place).await;
    let settings = [
        ("SETTLED_BROKER_URL", broker.as_str()),
        ("SETTLED_BROKER_MANAGEMENT_URL", place.services.management.as_str()),
        ("SETTLED_BROKER__MANAGEMENT_INTERVAL", "1s"),
    ];
    let worker = place.ready_worker(&settings).await;
    settled(&place, 3).await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    manage(&place, "DELETE", &user, None).await;
}

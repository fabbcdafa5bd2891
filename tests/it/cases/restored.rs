//! A database that is older than the world: a backup that was taken up again, one that was left behind, another one. No worker
//! goes on with it until two people accept what is lost.

use serde_json::Value;

use crate::kit::{
    auditor::{Reservation, event_id},
    command::Answer,
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, Worker, connect, until, userinfo, with_partner, with_path},
};

async fn with_reserved(test: &str, count: usize) -> (Place, Partner, Vec<Reservation>) {
    let (place, partner) = with_partner(test, "1000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

async fn settles(place: &Place, partner: &Partner, reservation: &Reservation) {
    place.publish(&[partner.cleared(reservation)]).await;
    let id = event_id(&format!("allocation.cleared|{}", reservation.id));
    place
        .events
        .wait("its event", |seen| seen.message_id() == Some(&id))
        .await;
}

async fn stopped(worker: Worker) {
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
}

/// A copy of the database as it is now, which nobody may be using: its name.
async fn backup(place: &Place, name: &str) -> String {
    let copy = format!("{}_{name}", place.name);
    let admin = connect(&place.services.database).await;
    // What a connection that was dropped left behind is gone in a moment.
    let sql = format!("CREATE DATABASE {copy} TEMPLATE {}", place.name);
    until("a backup", PATIENCE, async || admin.batch_execute(&sql).await.ok()).await;
    copy
}

async fn forget(place: &Place, name: &str) {
    let admin = connect(&place.services.database).await;
    let sql = format!("DROP DATABASE {name} WITH (FORCE)");
    admin.batch_execute(&sql).await.expect("it goes");
}

/// A worker on another database than the place's; it must end by itself, and says why.
async fn refused(place: &Place, url: &str) -> String {
    let worker = place.worker(&[&COLLECTS[..], &[("SETTLED_DATABASE_URL", url)]].concat());
    assert_eq!(worker.end().await.code(), Some(1), "{}", worker.said());
    worker.said()
}

/// `settled recover` as somebody with a login of their own.
async fn recover(place: &Place, url: &str, words: &[&str]) -> Answer {
    let mut command = place.command(&[&["recover", "--json"], words].concat());
    command.env("SETTLED_DATABASE_URL", url);
    let output = command.output().await.expect("settled runs");
    crate::kit::contract::answered(&["recover"], &output);
    Answer::of(&output)
}

/// A login of a database, in a role.
async fn login(place: &Place, database: &str, name: &str, role: &str) -> String {
    let login = format!("{}_{name}", place.name);
    let url = with_path(&place.database_url, database);
    let db = connect(&url).await;
    let sql = format!("CREATE ROLE {login} LOGIN PASSWORD 'p' IN ROLE {role}");
    db.batch_execute(&sql).await.expect("a login");
    let (user, password) = userinfo(&url);
    url.replace(&format!("{user}:{password}@"), &format!("{login}:p@"))
}

async fn no_login(place: &Place, url: &str) {
    let admin = connect(&place.services.database).await;
    let sql = format!("DROP ROLE {}", userinfo(url).0);
    admin.batch_execute(&sql).await.expect("no login");
}

fn epoch_line(document: &Value) -> &Value {
    let mut lines = document["checks"].as_array().expect("lines").iter();
    lines.find(|line| line["name"] == "epoch").expect("a line")
}

/// The whole story: what settled after the backup is known to the broker, no worker starts on the backup however often it is
/// tried, two people accept the loss, and the database that was taken for lost is not gone on with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_worker_starts_on_a_backup_until_two_people_accept_it() {
    let (place, partner, reservations) = with_reserved("restored", 4).await;
    let worker = place.ready_worker(&COLLECTS).await;
    settles(&place, &partner, &reservations[0]).await;
    stopped(worker).await;
    let copy = backup(&place, "copy").await;
    let old = with_path(&place.database_url, &copy);
    // What the backup lacks: with two workers at once.
    let workers = [place.ready_worker(&COLLECTS).await, place.ready_worker(&COLLECTS).await];
    settles(&place, &partner, &reservations[1]).await;
    settles(&place, &partner, &reservations[2]).await;
    for worker in workers {
        stopped(worker).await;
    }
    let output = place.run(&["doctor", "--json"]).await;
    let document: Value = serde_json::from_slice(&output.stdout).expect("a document");
    assert_eq!(epoch_line(&document)["ok"], true, "{document}");

    for _ in 0..3 {
        let said = refused(&place, &old).await;
        assert!(
            said.contains("older than what workers told the broker") && said.contains("are missing"),
            "{said}"
        );
        assert!(said.contains("settled recover"), "{said}");
    }
    let mut command = place.command(&["doctor", "--json"]);
    let output = command
        .env("SETTLED_DATABASE_URL", &old)
        .output()
        .await
        .expect("it runs");
    let document: Value = serde_json::from_slice(&output.stdout).expect("a document");
    assert_eq!(epoch_line(&document)["ok"], false, "{document}");

    let mut apply = place.command(&["roles", "--apply"]);
    let applied = apply.env("SETTLED_DATABASE_URL", &old).output().await.expect("it runs");
    assert!(applied.status.success());
    let ann = login(&place, &copy, "ann", "settled_operator").await;
    let bob = login(&place, &copy, "bob", "settled_operator").await;
    let looked = recover(&place, &ann, &[]).await.document(1);
    assert_eq!((&looked["result"], &looked["epoch"]), (&"lost".into(), &1.into()));
    let accept = |name: &'static str| ["--accept-loss", "--reason", "the disk is gone", "--operator", name];
    recover(&place, &ann, &["--accept-loss"]).await.refusal(2);
    let proposed = recover(&place, &ann, &accept("ann")).await.document(3);
    assert_eq!(proposed["result"], "proposed", "{proposed}");
    // Neither another name nor another login alone makes two of one.
    for (url, name) in [(&ann, "ann"), (&ann, "bob"), (&bob, "ann")] {
        recover(&place, url, &accept(name)).await.refused(1, "takes two people");
    }
    refused(&place, &old).await;
    let accepted = recover(&place, &bob, &accept("bob")).await.document(0);
    assert_eq!(
        (&accepted["result"], &accepted["epoch"]),
        (&"accepted".into(), &2.into())
    );
    assert_eq!(accepted["accepted"].as_array().map(Vec::len), Some(2), "{accepted}");
    let db = connect(&old).await;
    let rows = db.query(
        "SELECT act, operator FROM settled.audit WHERE act LIKE 'recover%' ORDER BY id",
        &[],
    );
    let acts: Vec<(String, String)> = rows
        .await
        .expect("the audit")
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    assert_eq!(
        acts,
        [("recover propose", "ann"), ("recover", "bob")].map(|(act, who)| (act.to_owned(), who.to_owned()))
    );
    drop(db);

    let settings = [&COLLECTS[..], &[("SETTLED_DATABASE_URL", old.as_str())]].concat();
    let worker = place.ready_worker(&settings).await;
    settles(&place, &partner, &reservations[3]).await;
    stopped(worker).await;
    assert_eq!(recover(&place, &ann, &[]).await.document(0)["result"], "well");
    // The other one is there still, and comes too late.
    let said = refused(&place, &place.database_url).await;
    assert!(said.contains("left behind") && said.contains("epoch 2"), "{said}");
    for url in [&ann, &bob] {
        no_login(&place, url).await;
    }
    forget(&place, &copy).await;
}

/// A worker that runs notices that its database is another one than before, and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_runs_notices_what_its_database_lost() {
    let (place, partner, reservations) = with_reserved("lagged", 2).await;
    let worker = place.ready_worker(&COLLECTS).await;
    settles(&place, &partner, &reservations[0]).await;
    // As a standby that had not heard of it would be.
    place.tamper("DELETE FROM settled.batches").await;
    assert_eq!(worker.end().await.code(), Some(1), "{}", worker.said());
    assert!(
        worker.said().contains("lost what it had committed"),
        "{}",
        worker.said()
    );
    // Its last word was said: nobody starts on it.
    let said = refused(&place, &place.database_url).await;
    assert!(said.contains("it has none at all"), "{said}");
}

/// A fresh database behind a broker that settled for another one; and a fresh broker before books that are there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_books_are_told_from_a_new_broker() {
    let (place, partner, reservations) = with_reserved("other_books", 2).await;
    let worker = place.ready_worker(&COLLECTS).await;
    settles(&place, &partner, &reservations[0]).await;
    stopped(worker).await;
    let admin = connect(&place.services.database).await;
    let fresh = format!("{}_fresh", place.name);
    admin
        .batch_execute(&format!("CREATE DATABASE {fresh}"))
        .await
        .expect("a database");
    let url = with_path(&place.database_url, &fresh);
    let mut migrate = place.command(&["migrate"]);
    let migrated = migrate
        .env("SETTLED_DATABASE_URL", &url)
        .output()
        .await
        .expect("it runs");
    assert!(migrated.status.success());
    let said = refused(&place, &url).await;
    assert!(
        said.contains("another one than the one that settled for this broker"),
        "{said}"
    );
    let looked = recover(&place, &url, &[]).await.document(1);
    assert!(
        looked["loss"].as_str().is_some_and(|loss| loss.contains("books")),
        "{looked}"
    );
    forget(&place, &fresh).await;

    // A broker that knows nothing yet hears of the books, and they go on.
    let moved = place.copy("new_broker").await;
    let worker = moved.ready_worker(&COLLECTS).await;
    settles(&moved, &partner, &reservations[1]).await;
    stopped(worker).await;
    let document = moved.json(&["recover"]).await;
    assert_eq!((&document["result"], &document["loss"]), (&"well".into(), &Value::Null));
    assert!(document["words"].as_u64().is_some_and(|words| words >= 2), "{document}");
}

/// Without the stream there is nothing to be asked: no worker starts, and the doctor says what is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_brokers_memory_no_worker_starts() {
    let (place, partner, reservations) = with_reserved("no_memory", 1).await;
    place.line().delete("settlement.epoch").await;
    let said = refused(&place, &place.database_url).await;
    assert!(
        said.contains("settlement.epoch") && said.contains("settled topology"),
        "{said}"
    );
    assert!(place.run(&["topology"]).await.status.success());
    let worker = place.ready_worker(&COLLECTS).await;
    settles(&place, &partner, &reservations[0]).await;
    place.settle_up(worker).await;
}

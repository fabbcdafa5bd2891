//! Partners publish to one place, and the broker's own shovels lead each one's messages to its cell: with the file and the requests
//! of docs/cells.md.

use serde_json::json;

use crate::kit::{
    amqp::{Line, Message},
    auditor::Reservation,
    cells::give_own_books,
    command::ask,
    partner::Partner,
    private::Private,
    support::{COLLECTS, PATIENCE, Place, count, skip, until, userinfo, with_path},
};

/// A virtual host's name in a path of the management API.
const FRONT: &str = "front";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shovels_lead_each_partner_to_its_cell() {
    let private = match Private::start_with(Private::SHOVEL).await {
        Ok(private) => private,
        Err(why) => return skip("cells_led::shovels_lead_each_partner_to_its_cell", &why),
    };
    let services = private.services.clone();
    let (a, b) = (
        Place::within(services.clone(), "led_a").await,
        Place::within(services.clone(), "led_b").await,
    );
    give_own_books(&b).await;
    // As it stands in the page, with the names of these vhosts.
    let shipped = include_str!("../../../config/rabbitmq/front.json");
    let definitions = shipped
        .replace("amqp:///cell-a", &format!("amqp:///{}", a.name))
        .replace("amqp:///cell-b", &format!("amqp:///{}", b.name));
    services.make_vhost(FRONT).await;
    let definitions = serde_json::from_str(&definitions).expect("JSON");
    let (status, said) = services.manage("POST", "/api/definitions", Some(definitions)).await;
    if status == 400 && said.to_string().contains("shovel") {
        return skip(
            "cells_led::shovels_lead_each_partner_to_its_cell",
            "this broker has no shovels",
        );
    }
    assert!(matches!(status, 201 | 204), "{status} {said}");

    let (acme, beta) = (Partner::new("acme"), Partner::new("beta"));
    let user = userinfo(&services.broker).0.to_owned();
    a.register_with(&acme, &["--broker-user", &user]).await;
    b.register(&beta).await;
    a.deposit(&acme, "BTC", "1000").await;
    b.deposit(&beta, "BTC", "1000").await;
    let workers = [a.ready_worker(&COLLECTS).await, b.ready_worker(&COLLECTS).await];
    let reserved: Vec<Reservation> = (0..30).map(|_| acme.allocation("BTC", "1")).collect();
    a.reserve(&reserved).await;
    let of_beta = beta.allocation("BTC", "1");
    b.reserve(std::slice::from_ref(&of_beta)).await;
    let front = Line::open(&with_path(&services.broker, FRONT)).await;
    // Bound to its user: the shovel must not take the name of the sender away.
    let said: Vec<Message> = reserved
        .iter()
        .map(|one| {
            acme.cleared(one)
                .with(|properties| properties.with_user_id(user.as_str().into()))
        })
        .collect();
    front.publish(&said[..10]).await;
    front.publish(&[beta.cleared(&of_beta)]).await;
    let (here, there) = (a.db().await, b.db().await);
    until("each settles in its cell", PATIENCE, async || {
        (count(&here, "settlements").await == 10 && count(&there, "settlements").await == 1).then_some(())
    })
    .await;

    // It moves while its messages come to the old cell still.
    let moves = async || {
        let apply = ["--apply", "--reason", "cell a is full", "--json"];
        let mut command = a.command(&[&["partner", "move", "--enterprise-id", "acme"], &apply[..]].concat());
        command.env("SETTLED_TARGET_DATABASE_URL", &b.database_url);
        let moved = command.output().await.expect("settled runs");
        assert!(moved.status.success(), "{}", crate::kit::support::said(&moved));
    };
    tokio::join!(moves(), front.publish(&said[10..20]));
    // To the new cell, and only then not to the old one any more: in between to both, which is one effect.
    let bindings = format!("/api/bindings/{FRONT}/e/settlement.updates/q");
    let lead = json!({"routing_key": "acme.#"});
    let (status, answer) = services
        .manage("POST", &format!("{bindings}/to.cell-b"), Some(lead))
        .await;
    assert_eq!(status, 201, "{answer}");
    front.publish(&said[20..25]).await;
    let (status, answer) = services
        .manage("DELETE", &format!("{bindings}/to.cell-a/acme.%23"), None)
        .await;
    assert_eq!(status, 204, "{answer}");
    front.publish(&said[25..]).await;
    until("nothing waits in front", PATIENCE, async || {
        (front.depth("to.cell-a").await == 0 && front.depth("to.cell-b").await == 0).then_some(())
    })
    .await;
    // What came to the old cell is handed over.
    until("everything settles in the new cell", PATIENCE, async || {
        moves().await;
        (count(&there, "settlements").await == 31).then_some(())
    })
    .await;
    assert_eq!(front.depth("nobody").await, 0, "nothing went astray");
    for place in [&a, &b] {
        let checked = ask(place, &["ledger", "check", "--signatures"]).await.document(0);
        assert_eq!(checked["ok"], true, "{checked}");
        assert_eq!(count(&place.db().await, "dead_letters").await, 0);
    }
    assert!(count(&here, "settlements").await >= 10, "what settled before it left");
    for worker in workers {
        worker.terminate().await;
    }
}

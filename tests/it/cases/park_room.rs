//! The bounds in bytes on what waits: what a plan and `explain` say of a message is what a worker does with it.

use serde_json::{Value, json};

use crate::kit::{
    amqp::{Message, Seen},
    auditor::Expect,
    command::{ask_in, run_in},
    support::{PATIENCE, Place, count, until, with_partner},
};

/// The type of the only event of a message.
async fn came_to(place: &Place, events: usize) -> String {
    until("its event", PATIENCE, async || {
        let told: Vec<Seen> = place.events.seen().into_iter().flat_map(Seen::events).collect();
        assert!(told.len() <= events, "one event a message");
        let last: Value = serde_json::from_slice(&told.get(events - 1)?.body).expect("an event");
        Some(last["type"].as_str().expect("a type").to_owned())
    })
    .await
}

async fn explained(place: &Place, message: &Message, room: &[(&str, &str)]) -> Value {
    let file = place.file("message.json");
    std::fs::write(&file, &message.body).expect("written");
    let variables = [
        ("SETTLED_DATABASE_URL", place.database_url.as_str()),
        ("SETTLED_BROKER_URL", place.broker_url.as_str()),
    ];
    let file = file.display().to_string();
    let question = ["explain", &file, "--routing-key", &message.routing_key];
    ask_in(&[&variables[..], room].concat(), &question).await.document(0)
}

async fn planned(place: &Place, room: &[(&str, &str)]) -> Value {
    let variables = [
        ("SETTLED_DATABASE_URL", place.database_url.as_str()),
        ("SETTLED_BROKER_URL", place.broker_url.as_str()),
    ];
    let plan = ["dead-letters", "plan", "--operator", "ann", "--json"];
    let output = run_in(&[&variables[..], room].concat(), &plan).await;
    let plan: Value = serde_json::from_slice(&output.stdout).expect("a plan");
    plan["verdicts"].clone()
}

async fn beside_a_worker(test: &str, bound: &str, why: &str) {
    let (place, partner) = with_partner(test, "1000000000000").await;
    let early = || {
        partner
            .draft(&partner.allocation("BTC", "1"), "cleared")
            .message(Expect::Any)
    };
    // There is room for one of them, and not for two.
    let bytes = early().body.len();
    assert!(bytes > 600, "{bytes} bytes, and the properties fewer than that");
    let most = (bytes + 600).to_string();
    let room = [(bound, most.as_str())];
    let worker = place.ready_worker(&[room[0], ("SETTLED_WORKER__LANES", "1")]).await;
    // A worker counts once a second what waits in all: one more may find room meanwhile.
    let mut sent = 0;
    let refused = loop {
        let message = early();
        place.publish(std::slice::from_ref(&message)).await;
        sent += 1;
        match came_to(&place, sent).await.as_str() {
            "update.parked" => assert!(sent < 1_000, "there is no bound"),
            "update.rejected" => break message,
            other => panic!("{other}"),
        }
    };
    assert!(sent > 1, "one has room");
    let explained_now = explained(&place, &early(), &room).await;
    assert_eq!(explained_now["verdict"], "rejected", "{explained_now}");
    assert_eq!(explained_now["reason"], "allocation_not_found");
    let detail = explained_now["detail"].as_str().expect("a detail");
    assert!(detail.contains(why), "{detail}");
    let db = place.db().await;
    until("its dead letter is stored", PATIENCE, async || {
        (count(&db, "dead_letters").await == 1).then_some(())
    })
    .await;
    let rejected = json!([{"verdict": "rejected", "reason": "allocation_not_found", "final": false, "messages": 1}]);
    assert_eq!(planned(&place, &room).await, rejected);
    // With more room both say that it would wait.
    assert_eq!(explained(&place, &refused, &[]).await["verdict"], "parked");
    let parked = json!([{"verdict": "parked", "reason": "allocation_not_found", "final": false, "messages": 1}]);
    assert_eq!(planned(&place, &[]).await, parked);
    assert_eq!(worker.terminate().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_all_that_waits_takes_too_much_room_a_plan_says_so() {
    let why = "the messages that wait take too much room";
    beside_a_worker("room_of_all", "SETTLED_PARK__MAX_BYTES", why).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_partners_messages_take_too_much_room_a_plan_says_so() {
    let why = "this partner's messages that wait take too much room";
    beside_a_worker("room_of_one", "SETTLED_PARK__MAX_BYTES_PER_PARTNER", why).await;
}

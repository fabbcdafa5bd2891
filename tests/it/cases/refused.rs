//! What the broker refused is told after all: an operator lists it and has it published again.

use serde_json::{Value, json};
use settled::{domain::delivery::Publication, store::Store};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    auditor::{Expect, Reservation},
    command::Answer,
    in_process::{clerk, read, settle},
    partner::Partner,
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, until},
};

const QUICK: [(&str, &str); 4] = [
    LEAVE_DEAD_LETTERS,
    ("SETTLED_OUTBOX__LEASE", "1s"),
    ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ("SETTLED_RETRY__MAX", "200ms"),
];

async fn outbox(place: &Place, arguments: &[&str]) -> Answer {
    let arguments = [&["outbox"], arguments, &["--json"]].concat();
    Answer::of(&place.run(&arguments).await)
}

async fn number(db: &Client, sql: &str) -> i64 {
    db.query_one(sql, &[]).await.expect(sql).get(0)
}

/// A batch whose publications the broker is said to have refused: two settlements' events, a rejection's, its dead letter.
struct Refused {
    place: Place,
    store: Store,
    batch: Uuid,
    reservations: Vec<Reservation>,
    dead: Vec<u8>,
}

impl Refused {
    /// Settled by one who published nothing, with what it had to say set aside; the last event as one that no broker takes.
    async fn new(test: &str) -> Self {
        let place = Place::new(test).await;
        let partner = Partner::new("acme");
        place.register(&partner).await;
        place.deposit(&partner, "BTC", "1000").await;
        let reservations: Vec<Reservation> = (0..2).map(|_| partner.allocation("BTC", "1")).collect();
        place.reserve(&reservations).await;
        let unknown = partner.allocation("BTC", "1");
        let refused = partner
            .draft(&unknown, "cleared")
            .without("nonce")
            .message(Expect::Refused("invalid_field"));
        let mut messages: Vec<_> = reservations.iter().map(|one| partner.cleared(one)).collect();
        messages.push(refused.clone());
        let clerk = clerk(&place);
        let settled = settle(&clerk, &read(&messages).await).await.expect("settled");
        assert_eq!(settled.publications.len(), 4);
        let store = clerk.store.clone();
        store.delete_published(&[settled.id]).await.expect("deleted");
        for publication in &settled.publications {
            let mut publication: Publication = publication.clone();
            if publication.routing_key.starts_with("update.rejected") {
                // The broker takes no message in the name of somebody else.
                publication.properties.user_id = Some("nobody".to_owned());
            }
            store
                .set_aside(settled.id, &publication, "it was too large then")
                .await
                .expect("set aside");
        }
        Self {
            place,
            store,
            batch: settled.id,
            reservations,
            dead: refused.body,
        }
    }

    /// The refused ones, by routing key.
    async fn listed(&self) -> Vec<Value> {
        outbox(&self.place, &["list"]).await.lines(0)
    }

    async fn told(&self) -> usize {
        self.place.events.catch_up(self.place.line()).await;
        self.place.events.seen().len()
    }
}

fn id_of(listed: &[Value], key: &str) -> String {
    let one = listed.iter().find(|line| {
        line["routingKey"]
            .as_str()
            .is_some_and(|routing| routing.starts_with(key))
    });
    one.unwrap_or_else(|| panic!("no {key}: {listed:?}"))["id"].to_string()
}

/// By number and all at once; what is refused again says so and stays; the books of messages agree at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_refused_is_published_again() {
    let refused = Refused::new("outbox_retry").await;
    let place = &refused.place;
    let db = place.db().await;
    let listed = refused.listed().await;
    assert_eq!(listed.len(), 4, "{listed:?}");
    for line in &listed {
        assert_eq!(
            (&line["state"], &line["why"], &line["batchId"]),
            (
                &json!("refused"),
                &json!("it was too large then"),
                &json!(refused.batch.to_string())
            ),
            "{line}"
        );
        assert!(
            line["id"].is_i64() && line["bytes"].as_u64().is_some_and(|bytes| bytes > 100),
            "{line}"
        );
    }
    let doctor = Answer::of(&place.run(&["doctor", "--json"]).await);
    assert!(doctor.all().contains("settled outbox retry"), "{}", doctor.all());
    let reconcile = Answer::of(&place.run(&["reconcile", "--since", "1h", "--json"]).await);
    assert_eq!(reconcile.code, Some(1), "{}", reconcile.all());

    let worker = place.ready_worker(&QUICK).await;
    let dead = id_of(&listed, "acme.allocation.update");
    let told = outbox(
        place,
        &["retry", &dead, "--reason", "they mended it", "--operator", "ann"],
    )
    .await;
    let told = told.document(0);
    assert_eq!(
        (&told["published"], &told["publications"][0]["became"]),
        (&json!(1), &json!("published")),
        "{told}"
    );
    assert_eq!(place.line().get("settlement.dead").await.body, refused.dead);
    let act = Answer::of(&place.run(&["audit", "list", "--act", "outbox retry", "--json"]).await).lines(0);
    assert_eq!(
        (
            &act[0]["operator"],
            &act[0]["why"],
            &act[0]["filters"]["ids"][0].to_string()
        ),
        (&json!("ann"), &json!("they mended it"), &dead),
        "{act:?}"
    );
    assert_eq!(act[0]["outcome"]["putBack"], 1, "{act:?}");

    // The event in nobody's name is refused by the broker itself, once more; the two others are told.
    let told = outbox(place, &["retry", "--all", "--reason", "and the rest"])
        .await
        .document(3);
    assert_eq!(
        (&told["published"], &told["refused"], &told["waiting"], &told["left"]),
        (&json!(2), &json!(1), &json!(0), &json!(0)),
        "{told}"
    );
    let listed = refused.listed().await;
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(
        listed[0]["why"]
            .as_str()
            .is_some_and(|why| why.contains("406") || why.contains("user_id")),
        "{listed:?}"
    );
    assert_eq!(refused.told().await, 2);
    for reservation in &refused.reservations {
        let id = reservation.id.to_string();
        let history = ["allocation", "show", id.as_str(), "--history", "--json"];
        let shown = Answer::of(&place.run(&history).await).document(0);
        assert_eq!(shown["events"][0]["state"], "confirmed", "{shown}");
    }
    assert_eq!(worker.terminate().await.code(), Some(0));
    assert_eq!(number(&db, "SELECT count(*) FROM settled.outbox").await, 0);
}

/// Without a worker it waits, and says so; whoever had its batch's row may delete that once more, and nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_back_waits_for_a_worker() {
    let refused = Refused::new("outbox_waits").await;
    let place = &refused.place;
    let db = place.db().await;
    let listed = refused.listed().await;
    let event = id_of(&listed, "allocation.cleared");
    let brief = ["--set", "outbox.retry_deadline=100ms"];
    let retry = [&["retry", &event, "--reason", "again"], brief.as_slice()].concat();
    let told = outbox(place, &retry).await.document(3);
    assert_eq!((&told["waiting"], &told["published"]), (&json!(1), &json!(0)), "{told}");
    // The lane that had the batch's row does not know whether its DELETE was committed, and says it again.
    refused
        .store
        .delete_published(&[refused.batch])
        .await
        .expect("nothing to do");
    assert_eq!(number(&db, "SELECT count(*) FROM settled.outbox").await, 1);
    let listed = refused.listed().await;
    let waiting: Vec<&Value> = listed.iter().filter(|line| line["state"] == "waiting").collect();
    assert!(
        matches!(waiting.as_slice(), [one] if one["batchId"] == refused.batch.to_string() && one["id"].is_null()),
        "{listed:?}"
    );
    let states: Vec<Value> = {
        let mut states = Vec::new();
        for reservation in &refused.reservations {
            let id = reservation.id.to_string();
            let history = ["allocation", "show", id.as_str(), "--history", "--json"];
            let shown = Answer::of(&place.run(&history).await).document(0);
            states.push(shown["events"][0]["state"].clone());
        }
        states
    };
    assert!(
        states.contains(&json!("pending")) && states.contains(&json!("setAside")),
        "{states:?}"
    );
    let worker = place.ready_worker(&QUICK).await;
    until("it is told", PATIENCE, async || {
        (refused.told().await == 1).then_some(())
    })
    .await;
    until("its row is gone", PATIENCE, async || {
        (number(&db, "SELECT count(*) FROM settled.outbox").await == 0).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// What can not be put back stays, and says why.
#[tokio::test]
async fn what_can_not_be_put_back_is_left() {
    let refused = Refused::new("outbox_left").await;
    let place = &refused.place;
    let db = place.db().await;
    for (arguments, code) in [
        (vec!["retry", "--reason", "x"], 2),
        (vec!["retry", "1", "--all", "--reason", "x"], 2),
        (vec!["retry", "--all"], 2),
        (vec!["retry", "--all", "--reason", "internal"], 2),
        (vec!["retry", "999", "--reason", "x"], 1),
    ] {
        let answer = outbox(place, &arguments).await;
        assert_eq!(answer.code, Some(code), "{arguments:?}: {}", answer.all());
    }
    // A later version's; and one whose batch is still being published.
    let later = "INSERT INTO settled.outbox_refused (batch_id, format, publications, refusal)
                 VALUES (gen_random_uuid(), 9, 'later', 'too large')";
    db.execute(later, &[]).await.expect("a row");
    let row = "INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
               VALUES ($1, 1, '', 0, now(), now() + interval '1 hour')";
    db.execute(row, &[&refused.batch]).await.expect("a row");
    let listed = refused.listed().await;
    assert!(
        listed
            .iter()
            .any(|line| line["routingKey"].is_null() && line["bytes"] == 5),
        "{listed:?}"
    );
    let answer = outbox(place, &["retry", "--all", "--reason", "x"]).await;
    assert_eq!(answer.code, Some(1), "{}", answer.all());
    assert!(answer.all().contains("nothing was put back"), "{}", answer.all());
    assert_eq!(number(&db, "SELECT count(*) FROM settled.outbox_refused").await, 5);
    let acts = Answer::of(&place.run(&["audit", "list", "--act", "outbox retry", "--json"]).await).lines(0);
    assert!(acts.is_empty(), "{acts:?}");
}

//! A partner in quarantine: its messages are held and not judged, whatever happens meanwhile, until it is resumed.

use serde_json::json;
use tokio_postgres::Client;

use crate::kit::{
    auditor::Expect,
    command::{Answer, ask},
    partner::Partner,
    support::{PATIENCE, Place, count, until},
};

async fn held(db: &Client) -> i64 {
    let sql = "SELECT coalesce(sum(messages), 0)::bigint FROM settled.held WHERE why = 'quarantine'";
    db.query_one(sql, &[]).await.expect(sql).get(0)
}

async fn partner(place: &Place, act: &str, flags: &[&str]) -> Answer {
    ask(place, &[&["partner", act, "--enterprise-id", "acme"], flags].concat()).await
}

async fn place_with(test: &str, partners: &[&Partner]) -> Place {
    let place = Place::new(test).await;
    for partner in partners {
        place.register(partner).await;
        place.deposit(partner, "BTC", "1000").await;
    }
    place
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_in_quarantine_is_judged_when_it_is_over() {
    let (acme, beta) = (Partner::new("acme"), Partner::new("beta"));
    let place = place_with("quarantine", &[&acme, &beta]).await;
    place.story().only_valid = true;
    // A deadline that would be over long before the end.
    let deadline = [("SETTLED_PARK__DEADLINE", "5s")];
    let worker = place.ready_worker(&deadline).await;
    let db = place.db().await;
    let of_acme: Vec<_> = (0..6).map(|_| acme.allocation("BTC", "5")).collect();
    let of_beta = beta.allocation("BTC", "5");
    place.reserve(&of_acme[..5]).await;
    place.reserve(std::slice::from_ref(&of_beta)).await;
    // One waits for its reservation already.
    place.publish(&[acme.cleared(&of_acme[5])]).await;
    until("it waits", PATIENCE, async || {
        (count(&db, "parked").await == 1).then_some(())
    })
    .await;
    partner(&place, "quarantine", &["--reason", "their key may be stolen"])
        .await
        .document(0);
    let again = partner(&place, "quarantine", &["--reason", "another"])
        .await
        .document(0);
    assert_eq!(
        (&again["result"], &again["quarantineReason"]),
        (&json!("exists"), &json!("their key may be stolen"))
    );
    let messages: Vec<_> = of_acme[..5].iter().map(|one| acme.cleared(one)).collect();
    place.publish(&messages[..3]).await;
    place.publish(&[beta.cleared(&of_beta)]).await;
    until("acme's are held, beta's settles", PATIENCE, async || {
        (held(&db).await == 3 && count(&db, "settlements").await == 1).then_some(())
    })
    .await;
    // It survives the worker; and what waits is not refused, although its deadline is over.
    assert!(worker.terminate().await.success());
    drop(worker);
    let worker = place.ready_worker(&deadline).await;
    place.publish(&messages[3..]).await;
    place.reserve(&of_acme[5..]).await;
    until("all of acme's are held", PATIENCE, async || {
        (held(&db).await == 5).then_some(())
    })
    .await;
    let sql = "SELECT until < clock_timestamp() FROM settled.parked";
    until("the deadline is over", PATIENCE, async || {
        db.query_one(sql, &[]).await.expect(sql).get::<_, bool>(0).then_some(())
    })
    .await;
    assert_eq!(
        (count(&db, "settlements").await, count(&db, "dead_letters").await),
        (1, 0)
    );
    let list = ask(&place, &["partner", "list"]).await.document(0);
    assert_eq!(list[0]["quarantineReason"], "their key may be stolen", "{list}");
    let doctor = ask(&place, &["doctor"]).await;
    assert!(doctor.all().contains("of quarantine: 5"), "{}", doctor.all());
    partner(&place, "resume", &["--reason", "it was not"]).await.document(0);
    until("all settle", PATIENCE, async || {
        (count(&db, "settlements").await == 7 && held(&db).await == 0 && count(&db, "parked").await == 0).then_some(())
    })
    .await;
    // Oldest first: what was held before the worker's end settled no later than what was held after it.
    let sql = "SELECT max(t.created_at) FILTER (WHERE t.subject_id = ANY ($1))
                   <= min(t.created_at) FILTER (WHERE t.subject_id = ANY ($2))
               FROM settled.transfers AS t
               WHERE t.step = 1";
    let ids = |some: &[crate::kit::auditor::Reservation]| some.iter().map(|one| one.id).collect::<Vec<_>>();
    let (first, last) = (ids(&of_acme[..3]), ids(&of_acme[3..5]));
    let row = db.query_one(sql, &[&first, &last]).await.expect(sql);
    assert!(row.get::<_, bool>(0), "oldest first");
    let acts = ask(&place, &["audit", "list"]).await.lines(0);
    let names: Vec<&str> = acts.iter().filter_map(|act| act["act"].as_str()).collect();
    assert!(
        names.starts_with(&["partner resume"]) && names.contains(&"partner quarantine"),
        "{names:?}"
    );
    assert_eq!(acts[0]["outcome"]["held"], 5, "{}", acts[0]);
    let again = partner(&place, "resume", &[]).await.document(0);
    assert_eq!(again["result"], "exists");
    place.settle_up(worker).await;
}

/// The room is bounded: what has no place in it is refused as of a partner that is not active, and nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_place_in_the_room_is_refused() {
    let (acme, beta) = (Partner::new("acme"), Partner::new("beta"));
    let place = place_with("quarantine_full", &[&acme, &beta]).await;
    let worker = place
        .ready_worker(&[("SETTLED_HELD__MAX_MESSAGES_PER_PARTNER", "2")])
        .await;
    let db = place.db().await;
    let of_acme: Vec<_> = (0..5).map(|_| acme.allocation("BTC", "5")).collect();
    let of_beta = beta.allocation("BTC", "5");
    place.reserve(&of_acme).await;
    place.reserve(std::slice::from_ref(&of_beta)).await;
    partner(&place, "quarantine", &["--reason", "they flood"])
        .await
        .document(0);
    for one in &of_acme {
        let message = acme.draft(one, "cleared").message(Expect::Any);
        place.publish(&[message]).await;
    }
    place.publish(&[beta.cleared(&of_beta)]).await;
    until(
        "two are held, three refused, and beta's settles",
        PATIENCE,
        async || {
            let refused = count(&db, "dead_letters WHERE reason = 'partner_inactive'").await;
            (held(&db).await == 2 && refused == 3 && count(&db, "settlements").await == 1).then_some(())
        },
    )
    .await;
    partner(&place, "resume", &["--reason", "over"]).await.document(0);
    until("the held ones settle", PATIENCE, async || {
        (count(&db, "settlements").await == 3).then_some(())
    })
    .await;
    // The refused ones are replayed like any others.
    ask(&place, &["dead-letters", "plan", "--reason", "partner_inactive"])
        .await
        .document(0);
    let run = ask(&place, &["dead-letters", "replay", "1", "--reason", "it is over"]).await;
    assert_eq!(run.code, Some(0), "{}", run.all());
    assert_eq!(count(&db, "settlements").await, 6);
    place.settle_up(worker).await;
}

/// What was replayed so often that it may go in circles needs a word of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_does_not_go_in_circles_unnoticed() {
    let acme = Partner::new("acme");
    let place = place_with("circles", &[&acme]).await;
    let worker = place.ready_worker(&[]).await;
    let db = place.db().await;
    let one = acme.allocation("BTC", "5");
    place.reserve(std::slice::from_ref(&one)).await;
    partner(&place, "suspend", &["--reason", "for a while"])
        .await
        .document(0);
    place
        .publish(&[acme.draft(&one, "cleared").message(Expect::Refused("partner_inactive"))])
        .await;
    until("it is refused", PATIENCE, async || {
        (count(&db, "dead_letters").await == 1).then_some(())
    })
    .await;
    let few = ["--set", "dead_letters.max_replays=2"];
    let plan = async || {
        let words = ["dead-letters", "plan", "--state", "open"];
        let plan = ask(&place, &[&words[..], &few].concat()).await.document(0);
        (plan["plan"].to_string(), plan["replayedOften"].clone())
    };
    let replay = async |plan: &str, more: &[&str]| {
        let words = [
            "dead-letters",
            "replay",
            plan,
            "--all-verdicts",
            "--reason",
            "try again",
        ];
        ask(&place, &[&words[..], &few, more].concat()).await
    };
    for _ in 0..2 {
        let (number, often) = plan().await;
        assert_eq!(often, json!(0));
        let run = replay(&number, &[]).await;
        assert_eq!(run.code, Some(0), "{}", run.all());
    }
    let (number, often) = plan().await;
    assert_eq!(often, json!(1));
    replay(&number, &[])
        .await
        .refused(2, "dead_letters.max_replays (2) times or more");
    assert_eq!(count(&db, "runs").await, 2, "nothing was done");
    let run = replay(&number, &["--yes-again"]).await;
    assert_eq!(run.code, Some(0), "{}", run.all());
    assert_eq!(count(&db, "dead_letters WHERE replays = 3").await, 1);
    place.settle_up(worker).await;
}

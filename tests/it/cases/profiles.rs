//! `settled simulate --profile`: each kind of traffic is what it says, and is accounted for to the last message.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::kit::support::Place;

/// So many of each profile; of one that has a rate of its own so few that it shows.
const MESSAGES: u64 = 120;

fn count(report: &Value, outcome: &str) -> u64 {
    report["expected"][outcome].as_u64().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_profile_is_accounted_for_and_is_what_it_says() {
    let place = Place::new("profiles").await;
    let worker = place.ready_worker(&[]).await;
    let mut partners = 0;
    for (profile, messages, at_least) in [
        ("plain", MESSAGES, Duration::ZERO),
        // 100 a second, and 5 a second.
        ("steady", MESSAGES, Duration::from_secs(1)),
        ("slow", 12, Duration::from_secs(1)),
        ("burst", MESSAGES, Duration::ZERO),
        ("duplicates", MESSAGES, Duration::ZERO),
        ("hostile", MESSAGES, Duration::ZERO),
    ] {
        let began = Instant::now();
        let number = messages.to_string();
        // Those of the simulations before are there already.
        let words = ["simulate", "--profile", profile, "--messages", &number, "--seed", "7"];
        let report = place.json(&words).await;
        assert_eq!(
            (&report["ok"], &report["messages"], &report["problems"]),
            (&json!(true), &json!(messages), &json!([])),
            "{profile}: {report}"
        );
        assert_eq!(report["expected"], report["actual"], "{profile}: {report}");
        assert!(began.elapsed() >= at_least, "{profile}: {:?}", began.elapsed());
        let (rejected, duplicate) = (count(&report, "rejected"), count(&report, "duplicate"));
        match profile {
            "burst" => assert_eq!(rejected, 0, "{report}"),
            "hostile" => assert!(rejected * 2 > messages, "{report}"),
            "duplicates" => assert!(duplicate * 4 > messages, "{report}"),
            _ => assert!(
                rejected * 4 < messages && count(&report, "settled") * 2 > messages,
                "{profile}: {report}"
            ),
        }
        let listed = place.json(&["partner", "list"]).await;
        let there = listed.as_array().map_or(0, Vec::len);
        assert!(there > partners, "{profile}: its partners are its own");
        partners = there;
    }
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
    assert_eq!(worker.terminate().await.code(), Some(0));
}

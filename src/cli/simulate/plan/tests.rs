//! A plan is the same for the same seed, and has everything in it.

use std::collections::BTreeSet;

use super::*;

fn shape(messages: usize, invalid_percent: usize) -> Shape {
    Shape {
        messages,
        invalid_percent,
        repeated_percent: 3,
        enterprises: vec!["acme".to_owned(), "globex".to_owned()],
        run: "test".to_owned(),
        seed: 1,
        user: "settled".to_owned(),
        waves: 8,
        parked_then_reserved: 2,
        park_runs_out: true,
    }
}

#[test]
fn a_plan_has_every_reason_and_as_many_messages_as_asked() {
    for (messages, percent) in [(0, 10), (1, 100), (10, 10), (300, 100), (2_000, 12), (2_000, 0)] {
        let plan = Plan::draw(&shape(messages, percent));
        assert_eq!(plan.items.len(), messages, "{messages} {percent}");
        assert_eq!(plan.waves.iter().map(|wave| wave.items.len()).sum::<usize>(), messages);
        assert_eq!(plan.balances.values().sum::<i128>(), 0, "the model's books balance");
    }
    let plan = Plan::draw(&shape(2_000, 12));
    let reasons: BTreeSet<Reason> = plan.items.iter().filter_map(|item| item.expected.reason()).collect();
    // What an operator does first is no message, and what we do is no partner's.
    let ours = BTreeSet::from([
        Reason::NonceVoided,
        Reason::CurrencyUnmapped,
        Reason::CurrencyMismatch,
        Reason::DeliveryLimit,
        Reason::Expired,
        Reason::Internal,
    ]);
    let all: BTreeSet<Reason> = Reason::ALL
        .into_iter()
        .filter(|reason| !ours.contains(reason))
        .collect();
    assert_eq!(reasons, all);
    for (_, owner, _) in plan.balances.keys().filter(|(kind, _, _)| kind == "external") {
        assert_eq!(*owner, None);
    }
}

#[test]
fn the_same_seed_draws_the_same_plan() {
    let bodies = |seed| {
        let shape = Shape { seed, ..shape(200, 20) };
        Plan::draw(&shape)
            .items
            .into_iter()
            .map(|item| item.digest)
            .collect::<Vec<_>>()
    };
    assert_eq!(bodies(1), bodies(1));
    assert_ne!(bodies(1), bodies(2));
}

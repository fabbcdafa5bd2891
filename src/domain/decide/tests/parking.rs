//! What waits for its allocation.

use super::*;

fn parked_until(judgement: &Judgement) -> Timestamp {
    match &judgement.verdict {
        Verdict::Parked { until, .. } => *until,
        Verdict::Settled { .. } | Verdict::Duplicate { .. } | Verdict::Rejected { .. } => panic!("{judgement:?}"),
    }
}

#[test]
fn the_same_bytes_while_parked_write_nothing() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    let (judgements, changes) = model.post(&rules(), &[sent.clone(), sent.clone()]);
    assert_eq!(lines(&judgements), ["parked", "parked again"]);
    assert_eq!(changes.newly_parked[&sent.key()].index, 0);
    assert!(judgements.iter().all(|judgement| judgement.proven));
    assert_eq!(model.receipt("n"), "parked allocation_not_found");
    let row = &model.parked[&sent.key()];
    assert_eq!(
        (row.parked.parked_at, row.parked.until, row.due_at),
        (start(), start() + seconds(900), start() + seconds(1))
    );
    let before = model.clone();
    // Nothing changes its answer while it waits: neither time, nor a suspension, nor the reservation.
    let twists: [fn(&mut Model); 3] = [
        |model| model.pass(seconds(899)),
        |model| model.acme().suspended = true,
        |model| model.reserve(LATE),
    ];
    for twist in twists {
        let mut model = before.clone();
        twist(&mut model);
        let expected = model.clone();
        let (judgements, changes) = model.post(&rules(), std::slice::from_ref(&sent));
        assert_eq!(lines(&judgements), ["parked again"]);
        assert_eq!(parked_until(&judgements[0]), start() + seconds(900));
        assert!(changes.new_receipts.is_empty() && changes.changed_receipts.is_empty());
        assert!(changes.newly_parked.is_empty() && changes.parked_later.is_empty() && changes.unparked.is_empty());
        assert_eq!(model, expected);
    }
}

/// A worker that stood still for longer than its lease comes back with a message that another judged, while another copy
/// of the same signed text waits: the copy keeps its place and its verdict to come, whatever the old one would come to.
#[test]
fn a_claim_that_was_overtaken_takes_nothing_from_the_copy_that_waits_now() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    assert_eq!(line(&model.judge(&sent)), "parked");
    model.parked.get_mut(&sent.key()).expect("it waits").parked.seq = 2;
    let mut old = sent.due();
    old.delivery.source = Source::Parked {
        key: sent.key().0,
        seq: 1,
        dead_letter: None,
    };
    let twists: [fn(&mut Model); 3] = [
        |model| model.reserve(LATE),
        |model| model.acme().suspended = true,
        |model| model.pass(seconds(900)),
    ];
    for twist in twists {
        let mut model = model.clone();
        twist(&mut model);
        let before = model.clone();
        let (judgements, changes) = model.post(&rules(), std::slice::from_ref(&old));
        assert_eq!(lines(&judgements), ["parked again"]);
        assert!(changes.parked_later.is_empty() && changes.unparked.is_empty());
        assert_eq!(model, before);
    }
}

/// The policy fields may be unsigned, so the copy of a parked message may contradict itself: step 10 comes before 12.
#[test]
fn a_contradicting_copy_of_a_parked_message_is_refused() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    assert_eq!(line(&model.judge(&sent)), "parked");
    let copy = Letter::cleared(LATE, "n").with("policyResult", "rejected").send();
    assert_eq!(line(&model.judge(&copy)), "policy_contradiction");
    assert_eq!(model.parked.len(), 1, "the first one waits on");
    model.reserve(LATE);
    assert_eq!(line(&model.judge(&sent.due())), "settled");
    assert_eq!((model.receipt("n").as_str(), model.parked.len()), ("settled", 0));
}

#[test]
fn a_parked_message_is_judged_at_growing_intervals_until_its_deadline() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    assert_eq!(line(&model.judge(&sent)), "parked");
    let receipt = model.receipts[&sent.key()].clone();
    let mut waits = Vec::new();
    let end = loop {
        let due_at = model.parked[&sent.key()].due_at;
        waits.push(due_at.duration_since(model.now).as_secs());
        assert!(waits.len() < 100, "it waits for ever: {waits:?}");
        model.now = due_at;
        let judgement = model.judge(&sent.due());
        assert!(judgement.proven);
        if line(&judgement) != "parked again" {
            break line(&judgement);
        }
        assert_eq!(parked_until(&judgement), start() + seconds(900));
        assert_eq!(model.receipts[&sent.key()], receipt, "waiting on writes no receipt");
    };
    assert_eq!(end, "allocation_not_found");
    assert_eq!(waits[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(waits.last(), Some(&57), "the last wait is cut by the deadline");
    assert_eq!(model.now, start() + seconds(900));
    assert!(model.parked.is_empty());
    assert_eq!(model.receipt("n"), "rejected allocation_not_found");
    // After a rejection the same bytes are judged again, with a deadline of their own.
    model.pass(seconds(10));
    let judgement = model.judge(&sent);
    assert_eq!(
        (line(&judgement), parked_until(&judgement)),
        ("parked".to_owned(), model.now + seconds(900))
    );
    assert_eq!(model.receipts[&sent.key()].first_seen, start());
}

#[test]
fn intervals_stand_extreme_settings() {
    let mut rules = rules();
    rules.park_max_interval = SignedDuration::MAX;
    rules.park_first_retry = SignedDuration::MAX;
    let until = start() + seconds(900);
    for attempts in [0, 1, 30, 31, 32, u32::MAX] {
        assert_eq!(rules.due_at(start(), attempts, until), until);
        assert_eq!(rules.due_at(Timestamp::MAX, attempts, Timestamp::MAX), Timestamp::MAX);
    }
    rules.park_first_retry = SignedDuration::from_millis(1);
    rules.park_max_interval = seconds(60);
    let mut last = start();
    for attempts in 0..100 {
        let due_at = rules.due_at(start(), attempts, until);
        assert!(due_at >= last && due_at <= start() + seconds(60), "{attempts}");
        last = due_at;
    }
    assert_eq!(last, start() + seconds(60));
}

#[test]
fn a_parked_message_settles_when_its_allocation_is_there() {
    for id in [LATE, LATE_DEALLOCATION] {
        let mut model = Model::new();
        let sent = Letter::cleared(id, "n").send();
        assert_eq!(line(&model.judge(&sent)), "parked");
        let digest = model.receipts[&sent.key()].message_digest;
        model.reserve(id);
        // Even at the deadline: what is there is not "not found".
        model.pass(seconds(900));
        let judgement = model.judge(&sent.due());
        assert_eq!(line(&judgement), "settled");
        assert_eq!((model.receipt("n").as_str(), model.parked.len()), ("settled", 0));
        assert_eq!(model.receipts[&sent.key()].message_digest, digest);
        assert_eq!(model.receipts[&sent.key()].first_seen, start());
        assert_eq!(line(&model.judge(&sent)), "duplicate");
        assert_eq!(line(&model.judge(&sent.due())), "duplicate", "claimed twice");
    }
}

/// From step 4 on, with the registry of that moment.
#[test]
fn a_parked_message_is_judged_by_the_registry_of_that_moment() {
    let twists: &[(Twist, &str, bool)] = &[
        (|model, _, _| model.partners.clear(), "unknown_partner", false),
        (
            |model, _, _| model.acme().broker_user = Some("u".to_owned()),
            "sender_mismatch",
            false,
        ),
        (|model, _, _| model.acme().keys.clear(), "signature_mismatch", false),
        (|model, _, _| model.acme().suspended = true, "partner_inactive", true),
        (
            |model, _, _| {
                model.allocations.insert(
                    LATE,
                    Allocation {
                        enterprise_id: "beta".to_owned(),
                        ..reserved(LATE)
                    },
                );
            },
            "not_permitted",
            true,
        ),
        (
            |model, _, _| {
                model.reserve(LATE);
                assert_eq!(line(&model.judge_letter(&Letter::cleared(LATE, "m"))), "settled");
            },
            "duplicate",
            true,
        ),
        (
            |model, _, _| {
                model.reserve(LATE);
                assert_eq!(
                    line(&model.judge_letter(&Letter::new(LATE, released(), "m"))),
                    "settled"
                );
            },
            "already_settled",
            true,
        ),
    ];
    for (twist, expected, proven) in twists {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(LATE, "n"));
        let sent = letter.send();
        assert_eq!(line(&model.judge(&sent)), "parked");
        twist(&mut model, &mut rules, &mut letter);
        model.pass(seconds(1));
        let judgement = model.judge(&sent.due());
        assert_eq!((line(&judgement), judgement.proven), ((*expected).to_owned(), *proven));
        assert!(model.parked.is_empty(), "{expected}: it waits no more");
        let receipt = match *expected {
            "duplicate" => "duplicate".to_owned(),
            reason => format!("rejected {reason}"),
        };
        assert_eq!(model.receipt("n"), receipt);
        assert_eq!(model.receipts[&sent.key()].public_key, key(1).public_key());
        assert_eq!(model.receipts[&sent.key()].last_seen, model.now);
    }
}

#[test]
fn parked_messages_are_bounded_in_bytes_too() {
    let letters: Vec<Sent> = ["a", "b", "c"]
        .into_iter()
        .map(|nonce| Letter::cleared(LATE, nonce).send())
        .collect();
    let size = size_of(&letters[0].delivery);
    let mut beta = Letter::cleared(OF_BETA, "a");
    beta.draft.id = LATE;
    for (all, of_one, expected) in [
        (
            u64::MAX,
            2 * size,
            ["parked", "parked", "allocation_not_found", "parked"],
        ),
        (
            u64::MAX,
            2 * size - 1,
            ["parked", "allocation_not_found", "allocation_not_found", "parked"],
        ),
        (
            2 * size,
            u64::MAX,
            ["parked", "parked", "allocation_not_found", "allocation_not_found"],
        ),
        (0, u64::MAX, ["allocation_not_found"; 4]),
    ] {
        let mut model = Model::new();
        let mut rules = rules();
        (rules.park_max_bytes, rules.park_max_bytes_per_partner) = (all, of_one);
        let (judgements, _) = model.post(&rules, &[&letters[..], &[beta.send()]].concat());
        assert_eq!(lines(&judgements), expected, "{all} {of_one}");
    }
}

#[test]
fn a_partner_may_park_so_many_and_no_more() {
    let mut model = Model::new();
    let mut rules = rules();
    rules.park_max_per_partner = 2;
    let letters: Vec<Sent> = ["a", "b", "c", "a", "d"]
        .into_iter()
        .map(|nonce| Letter::cleared(LATE, nonce).send())
        .collect();
    let (judgements, _) = model.post(&rules, &letters);
    assert_eq!(
        lines(&judgements),
        [
            "parked",
            "parked",
            "allocation_not_found",
            "parked again",
            "allocation_not_found"
        ]
    );
    assert_eq!(model.receipt("c"), "rejected allocation_not_found");
    assert_eq!(model.parked.len(), 2);
    // Another partner's share is its own.
    let mut beta = Letter::cleared(OF_BETA, "a");
    beta.draft.id = LATE;
    let (judgements, _) = model.post(&rules, &[beta.send(), letters[2].clone()]);
    assert_eq!(lines(&judgements), ["parked", "allocation_not_found"]);
    // Those who wait may wait on, and whoever leaves makes room, in the same batch too.
    let (judgements, _) = model.post(&rules, &[letters[0].due(), letters[2].clone()]);
    assert_eq!(lines(&judgements), ["parked again", "allocation_not_found"]);
    model.pass(seconds(900));
    let (judgements, _) = model.post(&rules, &[letters[0].due(), letters[2].clone(), letters[4].clone()]);
    assert_eq!(
        lines(&judgements),
        ["allocation_not_found", "parked", "allocation_not_found"]
    );
}

/// With no time to wait, one batch may park a message and reject it: nothing stays behind.
#[test]
fn a_message_parked_and_due_in_one_batch_leaves_no_row() {
    let mut model = Model::new();
    let mut rules = rules();
    rules.park_deadline = SignedDuration::ZERO;
    let sent = Letter::cleared(LATE, "n").send();
    let (judgements, changes) = model.post(&rules, &[sent.clone(), sent.due()]);
    assert_eq!(lines(&judgements), ["parked", "allocation_not_found"]);
    assert!(changes.newly_parked.is_empty() && changes.unparked.is_empty());
    assert_eq!(
        (model.receipt("n").as_str(), model.parked.len()),
        ("rejected allocation_not_found", 0)
    );
    // One that was there goes, comes anew, and goes again.
    assert_eq!(lines(&model.post(&rules, std::slice::from_ref(&sent)).0), ["parked"]);
    let (judgements, changes) = model.post(&rules, &[sent.due(), sent.clone(), sent.due()]);
    assert_eq!(
        lines(&judgements),
        ["allocation_not_found", "parked", "allocation_not_found"]
    );
    assert_eq!((changes.unparked.len(), changes.newly_parked.len()), (1, 0));
    assert!(model.parked.is_empty());
}

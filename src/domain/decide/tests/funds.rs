//! What settles, and which way the funds move.

use super::*;

/// The movements of money, row by row.
#[test]
fn the_funds_move_as_the_table_says() {
    use AccountKind::{Allocated, Available};
    for (id, outcome, account) in [
        (ALLOCATION, Outcome::Cleared, (Allocated, 13)),
        (ALLOCATION, released(), (Available, 11)),
        (DEALLOCATION, Outcome::Cleared, (Available, 11)),
        (DEALLOCATION, released(), (Allocated, 13)),
    ] {
        let mut model = Model::new();
        let mut letter = Letter::new(id, outcome.clone(), "n");
        letter.draft.evaluation_id = Some("eval-1".to_owned());
        letter.draft.pending_approval_id = Some("pending-1".to_owned());
        letter.draft.policy_result = Some(PolicyResult::Approved);
        let sent = letter.send();
        let (judgements, changes) = model.post(&rules(), std::slice::from_ref(&sent));
        let expected = Allocation {
            status: Status::parse(outcome.as_str()).expect("a status"),
            reason: outcome.reject_reason().map(str::to_owned),
            retriable: false,
            partner_external_id: Some("theirs-1".to_owned()),
            partner_symbol: None,
            evaluation_id: Some("eval-1".to_owned()),
            pending_approval_id: Some("pending-1".to_owned()),
            policy_result: Some(PolicyResult::Approved),
            settled_nonce: Some("n".to_owned()),
            updated_at: start(),
            ..reserved(id)
        };
        let verdict = Verdict::Settled {
            allocation: Arc::new(expected),
        };
        assert_eq!(judgements, [Judgement { verdict, proven: true }]);
        let [settlement] = changes.settlements.as_slice() else {
            panic!("one settlement");
        };
        assert_eq!(settlement.transfer.credit, account);
        let content = &settlement.content;
        assert_eq!(content.payload, payload_text(&letter.draft));
        let signature = content.signature.map(hex::encode);
        assert_eq!(signature, Some(key(1).sign(&content.payload)));
        assert_eq!(settlement.public_key, key(1).public_key());
        let quantity = BigInt::from(100_000_000);
        let moved = BTreeMap::from([(12, -quantity.clone()), (account.1, quantity)]);
        assert_eq!(changes.balances, moved);
        assert_eq!(model.receipt("n"), "settled");
        let receipt = model.receipts.get(&sent.key()).expect("a receipt");
        assert_eq!(
            Some(receipt.event_id),
            event_id::settlement_id(&model.allocations[&id]),
            "the receipt names the event"
        );
        assert_eq!(receipt.allocation_id, id);
        assert_eq!(receipt.message_digest, sent.facts.message_digest);
    }
}

/// A policy may reject what is released; it may be absent; a bound user may speak; any of the keys will do.
#[test]
fn what_breaks_no_rule_settles() {
    let twists: [Twist; 5] = [
        |_, _, letter| {
            letter.draft.outcome = released();
            letter.draft.policy_result = Some(PolicyResult::Rejected);
        },
        |_, _, letter| letter.draft.pending_approval_id = Some("p".to_owned()),
        |model, _, letter| {
            model.acme().broker_user = Some("acme-user".to_owned());
            letter.properties.user_id = Some("acme-user".to_owned());
        },
        |_, _, letter| letter.signed_by = 2,
        |model, _, _| model.acme().async_deallocations = false,
    ];
    for (index, twist) in twists.into_iter().enumerate() {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        twist(&mut model, &mut rules, &mut letter);
        assert_eq!(line(&model.judge_letter(&letter)), "settled", "{index}");
    }
}

/// The API's login stands for whomever a partner is bound to, where the rules name it: that login, to the letter, and no other.
#[test]
fn the_apis_login_stands_for_a_bound_user() {
    let sent_as = |user: Option<&str>, api_users: &[&str]| {
        let mut model = Model::new();
        model.acme().broker_user = Some("acme-user".to_owned());
        let mut letter = Letter::cleared(ALLOCATION, "n");
        letter.properties.user_id = user.map(str::to_owned);
        let rules = Rules {
            api_users: api_users.iter().map(|user| (*user).to_owned()).collect(),
            ..rules()
        };
        let (judgements, _) = model.post(&rules, &[letter.send()]);
        lines(&judgements).remove(0)
    };
    for (user, api_users, expected) in [
        (Some("api"), &["api"][..], "settled"),
        (Some("api"), &["other", "api"], "settled"),
        (Some("acme-user"), &["api"], "settled"),
        (Some("api"), &[], "sender_mismatch"),
        (Some("Api"), &["api"], "sender_mismatch"),
        (Some("api2"), &["api"], "sender_mismatch"),
        (None, &["api"], "sender_mismatch"),
        (None, &[""], "sender_mismatch"),
        (Some("beta-user"), &["api"], "sender_mismatch"),
    ] {
        assert_eq!(sent_as(user, api_users), expected, "{user:?} {api_users:?}");
    }
}

#[test]
fn the_largest_quantity_settles_exactly() {
    let mut model = Model::new();
    let max: BigInt = QUANTITY_MAX.parse().expect("a number");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(LARGE, "n"))), "settled");
    assert_eq!((&model.balances[&22], &model.balances[&23]), (&BigInt::ZERO, &max));
}

/// A revoked key may be reinstated: what it signed meanwhile, and was refused for that alone, stays refused.
#[test]
fn what_was_refused_for_a_revoked_key_stays_refused() {
    let mut model = Model::new();
    let revoke = |model: &mut Model, revoked: bool| {
        let (old, new) = (key(1).public_key(), key(2).public_key());
        model.acme().keys = if revoked { vec![new] } else { vec![old, new] };
        model.acme().revoked = if revoked { vec![old] } else { Vec::new() };
    };
    revoke(&mut model, true);
    let refused = Letter::cleared(ALLOCATION, "n");
    assert_eq!(line(&model.judge_letter(&refused)), "signature_mismatch");
    // Not for the sake of the key: bound to a broker user, or by another key.
    model.acme().broker_user = Some("acme-user".to_owned());
    let elsewhere = Letter::cleared(LARGE, "m");
    assert_eq!(line(&model.judge_letter(&elsewhere)), "sender_mismatch");
    model.acme().broker_user = None;
    assert_eq!(model.distrusted.len(), 1);
    revoke(&mut model, false);
    assert_eq!(line(&model.judge_letter(&refused)), "signature_mismatch");
    assert_eq!(line(&model.judge_letter(&elsewhere)), "settled");
    assert_eq!(
        line(&model.judge_letter(&Letter::cleared(ALLOCATION, "other"))),
        "settled"
    );
    assert!(model.receipts.values().all(|receipt| receipt.nonce != "n"));
}

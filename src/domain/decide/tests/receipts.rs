//! Duplicates, and what is kept of who was proven.

use super::*;

/// Whatever the registry says by now, and however the unsigned parts were altered: the money moved.
#[test]
fn a_settled_receipt_answers_before_every_rule_from_4_on() {
    let twists: &[(&str, Twist)] = &[
        ("nothing changed", |_, _, _| {}),
        ("the partner is gone", |model, _, _| model.partners.clear()),
        ("the partner is bound to a user", |model, _, _| {
            model.acme().broker_user = Some("acme-user".to_owned());
        }),
        ("the key is revoked", |model, _, _| {
            model.acme().keys = vec![key(2).public_key()]
        }),
        ("the partner is suspended", |model, _, _| model.acme().suspended = true),
        ("the partner has no asynchronous allocations", |model, _, _| {
            model.acme().async_allocations = false;
        }),
        ("the body has another amount", |_, _, letter| {
            let amount = serde_json::json!({"currency": "BTC", "quantity": "1"});
            letter.altered.push(("amount", amount));
        }),
        ("the body has another nonce", |_, _, letter| {
            letter.altered.push(("nonce", "m".into()))
        }),
        ("the body has the nonce of another receipt", |model, _, letter| {
            assert_eq!(line(&model.judge_letter(&Letter::cleared(LARGE, "m"))), "settled");
            letter.altered.push(("nonce", "m".into()));
        }),
        ("the body has another id", |_, _, letter| {
            letter.altered.push(("allocationId", LATE.to_string().into()));
        }),
        ("the body has the other status", |_, _, letter| {
            letter.altered.push(("status", "released".into()));
            letter.altered.push(("rejectReason", "altered".into()));
        }),
        ("the policy says no by now", |_, _, letter| {
            letter.altered.push(("policyResult", "rejected".into()));
        }),
        ("the policy's ids differ", |_, _, letter| {
            letter.altered.push(("evaluationId", "other".into()));
        }),
        ("its row was left behind", |model, _, letter| {
            letter.source = letter.parked();
            let sent = letter.send();
            let row = Row {
                parked: Parked {
                    seq: 0,
                    parked_at: model.now,
                    until: model.now,
                    attempts: 0,
                    also: None,
                },
                due_at: model.now,
                enterprise_id: "acme".to_owned(),
                nonce: "n".to_owned(),
                allocation_id: letter.draft.id,
                message_digest: sent.facts.message_digest,
            };
            model.parked.insert(sent.key(), row);
        }),
        ("nobody keeps it", |_, _, letter| letter.source = Source::Plain),
        ("it came as a deallocation", |_, _, letter| {
            letter.routing_key = Some("acme.deallocation.update".to_owned());
            letter.altered.push(("deallocationId", LATE.to_string().into()));
            letter.altered.push(("partnersDeallocationId", "another".into()));
        }),
    ];
    for (what, twist) in twists {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        assert_eq!(line(&model.judge_letter(&letter)), "settled");
        let first_digest = letter.send().facts.message_digest;
        twist(&mut model, &mut rules, &mut letter);
        model.pass(seconds(7));
        let (judgements, changes) = model.post(&rules, &[letter.send()]);
        let verdict = Verdict::Duplicate {
            allocation: Arc::new(model.allocations[&ALLOCATION].clone()),
        };
        assert_eq!(judgements, [Judgement { verdict, proven: true }], "{what}");
        assert!(changes.settlements.is_empty() && changes.balances.is_empty(), "{what}");
        assert!(model.parked.is_empty(), "{what}");
        assert_eq!(model.receipt("n"), "settled", "{what}");
        let receipt = &model.receipts[&ReceiptKey::new("acme", "n")];
        assert_eq!(
            (receipt.first_seen, receipt.last_seen),
            (start(), start() + seconds(7)),
            "{what}"
        );
        assert_eq!(receipt.message_digest, first_digest, "{what}");
    }
}

/// Steps 1 to 3 come first, and the signature must verify with the key that the receipt keeps.
#[test]
fn only_the_kept_key_speaks_for_a_settled_receipt() {
    let twists: &[(&str, Twist, &str)] = &[
        (
            "the partner's other key signs the same text",
            |_, _, letter| letter.signed_by = 2,
            "duplicate",
        ),
        (
            "the same, the other key being revoked",
            |model, _, letter| {
                model.acme().keys.pop();
                letter.signed_by = 2;
            },
            "signature_mismatch",
        ),
        (
            "the same, the body being altered",
            |_, _, letter| {
                letter.signed_by = 2;
                letter.altered.push(("clientId", LATE.to_string().into()));
            },
            "payload_mismatch",
        ),
        (
            "a stranger signs the same text",
            |_, _, letter| letter.signed_by = 9,
            "signature_mismatch",
        ),
        (
            "the signature is cut off",
            |_, _, letter| letter.altered.push(("signature", "1f".into())),
            "malformed_signature",
        ),
        (
            "the payload has another white space",
            |_, _, letter| {
                let payload = format!(" {}", payload_text(&letter.draft));
                letter.altered.push(("signature", key(1).sign(&payload).into()));
                letter.altered.push(("payload", payload.into()));
            },
            "nonce_reused",
        ),
        (
            "the body misses a field",
            |_, _, letter| letter.altered.push(("clientId", serde_json::Value::Null)),
            "invalid_field",
        ),
        (
            "another partner's routing key",
            |_, _, letter| letter.routing_key = Some("beta.allocation.update".to_owned()),
            "signature_mismatch",
        ),
    ];
    for (what, twist, expected) in twists {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        assert_eq!(line(&model.judge_letter(&letter)), "settled");
        let before = model.receipts[&ReceiptKey::new("acme", "n")].clone();
        twist(&mut model, &mut rules, &mut letter);
        assert_eq!(line(&model.judge_letter(&letter)), *expected, "{what}");
        assert_eq!(
            model.receipts,
            BTreeMap::from([(ReceiptKey::new("acme", "n"), before)]),
            "{what}"
        );
    }
}

/// The other key, valid, same text: step 15 finds the same status.
#[test]
fn a_new_nonce_with_the_same_status_is_a_duplicate_with_a_receipt_of_its_own() {
    for (id, first, again, expected) in [
        (ALLOCATION, Outcome::Cleared, Outcome::Cleared, "duplicate"),
        (
            ALLOCATION,
            released(),
            Outcome::Released {
                reject_reason: "another".to_owned(),
            },
            "duplicate",
        ),
        (DEALLOCATION, released(), released(), "duplicate"),
        (DEALLOCATION, Outcome::Cleared, released(), "already_settled"),
        (ALLOCATION, released(), Outcome::Cleared, "already_settled"),
    ] {
        let mut model = Model::new();
        assert_eq!(line(&model.judge_letter(&Letter::new(id, first, "n"))), "settled");
        let record = model.allocations[&id].clone();
        let mut letter = Letter::new(id, again, "m").with("evaluationId", "unsigned and new");
        letter.signed_by = 2;
        model.pass(seconds(1));
        let sent = letter.send();
        let judgement = model.judge(&sent);
        assert_eq!(line(&judgement), expected);
        assert_eq!(model.allocations[&id], record, "the first one stands");
        let receipt = model.receipts[&sent.key()].clone();
        match judgement.verdict {
            Verdict::Duplicate { allocation } => {
                assert_eq!(*allocation, record);
                assert_eq!((receipt.verdict, receipt.reason), (VerdictKind::Duplicate, None));
                assert_eq!(Some(receipt.event_id), event_id::settlement_id(&record));
            }
            Verdict::Rejected { reason, .. } => {
                assert_eq!((receipt.verdict, receipt.reason), (VerdictKind::Rejected, Some(reason)));
                assert_ne!(Some(receipt.event_id), event_id::settlement_id(&record));
            }
            Verdict::Settled { .. } | Verdict::Parked { .. } => panic!("{expected}"),
        }
        assert_eq!(receipt.public_key, key(2).public_key());
        assert_eq!(model.receipt("n"), "settled");
    }
}

#[test]
fn the_partners_id_counts_from_the_settlement_on() {
    let mut model = Model::new();
    let mut letter = Letter::cleared(ALLOCATION, "n");
    letter.draft.partners_id = "anything they like".to_owned();
    assert_eq!(line(&model.judge_letter(&letter)), "settled");
    letter.draft.nonce = "m".to_owned();
    assert_eq!(line(&model.judge_letter(&letter)), "duplicate");
    letter.draft.nonce = "o".to_owned();
    letter.draft.partners_id = "something else".to_owned();
    assert_eq!(line(&model.judge_letter(&letter)), "allocation_mismatch");
    // Step 14 comes before step 15.
    letter.draft.nonce = "p".to_owned();
    letter.draft.outcome = released();
    assert_eq!(line(&model.judge_letter(&letter)), "allocation_mismatch");
    // It need not be unique.
    let mut other = Letter::cleared(LARGE, "q");
    other.draft.partners_id = "anything they like".to_owned();
    assert_eq!(line(&model.judge_letter(&other)), "settled");
}

#[test]
fn the_same_message_fifty_times_in_one_batch_moves_the_money_once() {
    let mut model = Model::new();
    let sent = Letter::cleared(ALLOCATION, "n").send();
    let (judgements, changes) = model.post(&rules(), &vec![sent; 50]);
    let mut expected = vec!["duplicate"; 50];
    expected[0] = "settled";
    assert_eq!(lines(&judgements), expected);
    assert_eq!(changes.settlements.len(), 1);
    assert_eq!((changes.new_receipts.len(), changes.changed_receipts.len()), (1, 0));
    assert_eq!(model.balances[&13], BigInt::from(100_000_000));
    let ids: BTreeSet<Option<Uuid>> = judgements
        .iter()
        .map(|judgement| match &judgement.verdict {
            Verdict::Settled { allocation } | Verdict::Duplicate { allocation } => event_id::settlement_id(allocation),
            Verdict::Parked { .. } | Verdict::Rejected { .. } => None,
        })
        .collect();
    assert_eq!(ids.len(), 1, "one event id");
}

#[test]
fn a_batch_sees_its_own_effects() {
    let mut model = Model::new();
    let batch = [
        Letter::cleared(ALLOCATION, "a").send(),
        Letter::new(ALLOCATION, released(), "b").send(),
        Letter::cleared(ALLOCATION, "c").send(),
        // The nonce of another, the other's effect standing.
        Letter::cleared(LARGE, "a").send(),
        Letter::cleared(ALLOCATION, "a").send(),
        // A rejection binds its nonce as well.
        Letter::cleared(LARGE, "b").send(),
        Letter::cleared(LARGE, "d").send(),
        // A stranger's message binds nothing.
        Letter::cleared(DEALLOCATION, "e").by(9).send(),
        Letter::new(DEALLOCATION, released(), "e").send(),
    ];
    let (judgements, changes) = model.post(&rules(), &batch);
    assert_eq!(
        lines(&judgements),
        [
            "settled",
            "already_settled",
            "duplicate",
            "nonce_reused",
            "duplicate",
            "nonce_reused",
            "settled",
            "signature_mismatch",
            "settled"
        ]
    );
    assert_eq!(changes.settlements.len(), 3);
    let receipts: Vec<String> = ["a", "b", "c", "d", "e"]
        .into_iter()
        .map(|nonce| model.receipt(nonce))
        .collect();
    assert_eq!(
        receipts,
        ["settled", "rejected already_settled", "duplicate", "settled", "settled"]
    );
}

#[test]
fn a_nonce_is_each_partners_own() {
    let mut model = Model::new();
    assert_eq!(line(&model.judge_letter(&Letter::cleared(ALLOCATION, "n"))), "settled");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(OF_BETA, "n"))), "settled");
    // The separator keeps ("ab", "c") and ("a", "bc") apart.
    assert_ne!(ReceiptKey::new("ab", "c"), ReceiptKey::new("a", "bc"));
}

/// As a string: neither letter case, nor white space, nor another way to write the same character makes two nonces one.
#[test]
fn a_nonce_is_compared_exactly() {
    let nonces = [
        "n\u{e9}",
        "N\u{e9}",
        "n\u{c9}",
        "ne\u{301}",
        "n\u{e9} ",
        "n\u{e9}\u{200b}",
    ];
    let keys: BTreeSet<ReceiptKey> = nonces.iter().map(|nonce| ReceiptKey::new("acme", nonce)).collect();
    assert_eq!(keys.len(), nonces.len());
    let mut model = Model::new();
    assert_eq!(line(&model.judge_letter(&Letter::cleared(ALLOCATION, "n"))), "settled");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(LARGE, "N"))), "settled");
}

/// Whoever knows a nonce can write it into a message; before step 9 that says nothing about it.
#[test]
fn a_stranger_changes_no_receipt() {
    let strangers: [fn(&mut Letter); 5] = [
        |letter| letter.signed_by = 9,
        |letter| letter.altered.push(("signature", "1f".into())),
        |letter| letter.altered.push(("partnersClientId", "altered".into())),
        |letter| letter.draft.id = LARGE,
        |letter| letter.properties.user_id = Some("somebody else".to_owned()),
    ];
    for first in ["rejected partner_inactive", "parked allocation_not_found"] {
        for (number, stranger) in strangers.iter().enumerate() {
            let mut model = Model::new();
            let id = if first.starts_with("parked") { LATE } else { ALLOCATION };
            model.acme().suspended = first.starts_with("rejected");
            model.judge_letter(&Letter::cleared(id, "n"));
            assert_eq!(model.receipt("n"), first);
            model.acme().suspended = false;
            model.acme().broker_user = (number == 4).then(|| "acme-user".to_owned());
            let before = model.clone();
            let mut letter = Letter::cleared(id, "n");
            if number == 3 {
                letter.signed_by = 9;
            }
            stranger(&mut letter);
            let (judgements, _) = model.post(&rules(), &[letter.send()]);
            assert!(!judgements[0].proven, "{number}: {judgements:?}");
            assert_eq!(model, before, "{first}: {number}");
        }
    }
}

/// Receipts: the newest verdict, but never out of `settled` or a final reason.
#[test]
fn a_receipt_takes_the_newest_verdict_until_it_is_closed() {
    let mut model = Model::new();
    let sent = Letter::cleared(ALLOCATION, "n").send();
    let contradicted = Letter::cleared(ALLOCATION, "n").with("policyResult", "rejected").send();
    let judge = |model: &mut Model, sent: &Sent| {
        model.pass(seconds(1));
        let judgement = model.judge(sent);
        (line(&judgement), model.receipt("n"))
    };
    model.acme().suspended = true;
    let said = |verdict: &str, receipt: &str| (verdict.to_owned(), receipt.to_owned());
    assert_eq!(
        judge(&mut model, &sent),
        said("partner_inactive", "rejected partner_inactive")
    );
    model.acme().suspended = false;
    assert_eq!(
        judge(&mut model, &contradicted),
        said("policy_contradiction", "rejected policy_contradiction")
    );
    let receipt = model.receipts[&sent.key()].clone();
    assert_eq!(receipt.message_digest, contradicted.facts.message_digest);
    assert_eq!(
        (receipt.first_seen, receipt.last_seen),
        (start() + seconds(1), start() + seconds(2))
    );
    assert_eq!(judge(&mut model, &sent), said("settled", "settled"));
    assert_eq!(judge(&mut model, &contradicted), said("duplicate", "settled"));

    // A final reason stays, even if the next answer is another.
    let mut mismatched = Letter::cleared(LARGE, "n2");
    mismatched.draft.partners_client_id = "other".to_owned();
    let mismatched = mismatched.send();
    assert_eq!(line(&model.judge(&mismatched)), "allocation_mismatch");
    let kept = model.receipts[&mismatched.key()].clone();
    model.acme().suspended = true;
    model.pass(seconds(1));
    assert_eq!(line(&model.judge(&mismatched)), "partner_inactive");
    let expected = Receipt {
        last_seen: model.now,
        ..kept
    };
    assert_eq!(model.receipts[&mismatched.key()], expected);
}

#[test]
fn a_reused_nonce_leaves_the_first_receipt_untouched() {
    for first in ["settled", "rejected", "parked"] {
        let mut model = Model::new();
        let id = if first == "parked" { LATE } else { ALLOCATION };
        model.acme().suspended = first == "rejected";
        model.judge_letter(&Letter::cleared(id, "n"));
        assert!(model.receipt("n").starts_with(first));
        model.acme().suspended = false;
        let before = model.clone();
        model.pass(seconds(5));
        let (judgements, _) = model.post(&rules(), &[Letter::cleared(LARGE, "n").send()]);
        assert_eq!(lines(&judgements), ["nonce_reused"]);
        assert!(judgements.iter().all(|judgement| judgement.proven));
        model.now = before.now;
        assert_eq!(model, before, "{first}");
    }
}

/// A rule that this version does not know refused it: it is told again as it was, and nothing moves, whatever else would.
#[test]
fn what_a_newer_version_refused_is_refused_in_the_same_words() {
    let newer = Reason::written("custody_frozen").with(Some(423), Some(false));
    let letter = Letter::cleared(ALLOCATION, "n");
    let key = ReceiptKey::new("acme", "n");
    for detail in [None, Some("custody: frozen since Monday")] {
        let mut model = Model::new();
        let receipt = Receipt {
            verdict: VerdictKind::Rejected,
            reason: Some(newer),
            ..receipt_of(&letter)
        };
        model.receipts.insert(key, receipt.clone());
        model
            .newer_details
            .extend(detail.map(|detail| (key, detail.to_owned())));
        let before = model.clone();
        model.pass(seconds(5));
        let judgement = model.judge_letter(&letter);
        let Verdict::Rejected { reason, detail: said } = &judgement.verdict else {
            panic!("{judgement:?}");
        };
        assert_eq!((*reason, judgement.proven), (newer, true));
        assert_eq!(said, detail.unwrap_or(crate::domain::decide::NEWER));
        assert_eq!(model.balances, before.balances);
        let touched = Receipt {
            last_seen: model.now,
            ..receipt
        };
        assert_eq!(model.receipts[&key], touched, "only seen again");
        // Another payload of the nonce is what it always is.
        let mut other = letter.clone();
        other.draft.partners_id = "other".to_owned();
        assert_eq!(line(&model.judge_letter(&other)), "nonce_reused");
        // And another message settles.
        assert_eq!(line(&model.judge_letter(&Letter::cleared(ALLOCATION, "m"))), "settled");
    }
}

/// What a newer version lets wait for a reason of its own is not settled by this one.
#[test]
fn what_waits_for_a_newer_reason_goes_on_waiting_until_its_deadline() {
    let newer = Reason::written("custody_frozen");
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    assert_eq!(line(&model.judge(&sent)), "parked");
    let key = ReceiptKey::new("acme", "n");
    model.receipts.get_mut(&key).expect("its receipt").reason = Some(newer);
    model.reserve(LATE);
    model.pass(seconds(2));
    assert_eq!(line(&model.judge(&sent.due())), "parked again");
    assert_eq!(line(&model.judge(&sent)), "parked again", "a copy too");
    model.pass(seconds(900));
    assert_eq!(line(&model.judge(&sent.due())), "custody_frozen");
    assert!(model.parked.is_empty());
}

/// What is voided settles nothing any more, whatever else would, and under whichever payload; who waits is refused when it is
/// due, and its room is free.
#[test]
fn a_voided_nonce_settles_nothing_any_more() {
    let mut model = Model::new();
    let waiting = Letter::cleared(LATE, "n");
    assert_eq!(line(&model.judge_letter(&waiting)), "parked");
    void(&mut model, &waiting);
    model.reserve(LATE);
    // A copy, another payload, and the one that waits.
    let kept = model.receipts[&ReceiptKey::new("acme", "n")].clone();
    assert_eq!(
        line(&model.judge_letter(&Letter::cleared(ALLOCATION, "n"))),
        "nonce_voided"
    );
    assert_eq!(
        model.receipts[&ReceiptKey::new("acme", "n")],
        kept,
        "bound to the first payload"
    );
    assert_eq!(line(&model.judge_letter(&waiting)), "nonce_voided");
    assert_eq!(line(&model.judge(&waiting.send().due())), "nonce_voided");
    assert_eq!(
        (model.receipt("n").as_str(), model.parked.len()),
        ("rejected nonce_voided", 0)
    );
    assert_eq!(line(&model.judge_letter(&waiting)), "nonce_voided", "and again");
    // The allocation is anybody's to settle, under another nonce; and another partner's nonce is its own.
    assert_eq!(line(&model.judge_letter(&Letter::cleared(LATE, "m"))), "settled");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(OF_BETA, "n"))), "settled");
}

/// What has its effect is answered as before, however late it comes again.
#[test]
fn what_settled_in_time_stays_settled_when_its_time_is_over() {
    let mut model = Model::new();
    let until = start() + seconds(10);
    let ending = |id, nonce: &str| {
        let mut letter = Letter::cleared(id, nonce);
        letter.draft.expires_at = Some(until);
        letter
    };
    assert_eq!(line(&model.judge_letter(&ending(ALLOCATION, "n"))), "settled");
    assert_eq!(line(&model.judge_letter(&ending(ALLOCATION, "m"))), "duplicate");
    assert_eq!(line(&model.judge_letter(&ending(LATE, "o"))), "parked");
    let row = &model.parked[&ReceiptKey::new("acme", "o")];
    assert_eq!(row.parked.until, until, "it waits no longer than it counts");
    model.pass(seconds(10));
    for nonce in ["n", "m"] {
        assert_eq!(line(&model.judge_letter(&ending(ALLOCATION, nonce))), "duplicate");
    }
    model.reserve(LATE);
    assert_eq!(line(&model.judge(&ending(LATE, "o").send().due())), "expired_update");
    assert_eq!(line(&model.judge_letter(&ending(ALLOCATION, "p"))), "expired_update");
    assert_eq!(line(&model.judge_letter(&ending(LARGE, "q"))), "expired_update");
    assert_eq!(model.receipt("q"), "rejected expired_update");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(LARGE, "q"))), "nonce_reused");
}

proptest! {
    /// To the millisecond: it counts before its end, and from then on it does not.
    #[test]
    fn a_message_counts_until_its_end(millis in -5_000_i64..5_000) {
        let mut model = Model::new();
        let mut letter = Letter::cleared(ALLOCATION, "n");
        letter.draft.expires_at = Some(start() + SignedDuration::from_millis(millis));
        let expected = if millis > 0 { "settled" } else { "expired_update" };
        prop_assert_eq!(line(&model.judge_letter(&letter)), expected);
    }
}

//! The table of reasons, row by row.

use super::*;

/// Reason, class and finality, column by column.
#[test]
fn code_class_and_finality_of_every_reason() {
    let table = [
        ("message_too_large", 400, true),
        ("malformed_message", 400, true),
        ("invalid_field", 400, true),
        ("unknown_partner", 401, false),
        ("sender_mismatch", 403, false),
        ("malformed_signature", 401, true),
        ("signature_mismatch", 401, false),
        ("payload_mismatch", 400, true),
        ("nonce_voided", 409, true),
        ("nonce_reused", 409, true),
        ("expired_update", 408, true),
        ("policy_contradiction", 400, false),
        ("partner_inactive", 403, false),
        ("allocation_not_found", 404, false),
        ("not_permitted", 403, true),
        ("currency_unmapped", 500, false),
        ("currency_mismatch", 409, false),
        ("allocation_mismatch", 409, true),
        ("already_settled", 409, true),
        ("delivery_limit", 500, false),
        ("expired", 408, false),
        ("internal", 500, false),
    ];
    let ours: Vec<(String, u16, bool)> = Reason::ALL
        .into_iter()
        .map(|reason| (reason.to_string(), reason.class(), reason.is_final()))
        .collect();
    let theirs: Vec<(String, u16, bool)> = table
        .into_iter()
        .map(|(name, class, is_final)| (name.to_owned(), class, is_final))
        .collect();
    assert_eq!(ours, theirs);
    assert!(
        Reason::ALL.is_sorted(),
        "the order of the enum is the order of precedence"
    );
    for reason in Reason::ALL {
        assert_eq!(Reason::parse(reason.as_str()), Some(reason));
        assert_eq!(
            serde_json::to_string(&reason).ok(),
            Some(format!("\"{reason}\"")),
            "the public code is what JSON says too"
        );
    }
    assert_eq!(Reason::parse("Internal"), None);
    for kind in VerdictKind::ALL {
        assert_eq!(VerdictKind::parse(kind.as_str()), Some(kind));
    }
}

/// One row for every way to a reason: what is wrong, the reason, the exact detail, and whether the sender is proven.
#[test]
fn every_reason_has_the_message_that_causes_it() {
    let table: &[(&str, Twist, Reason, &str, bool)] = &[
        (
            "a body above the limit",
            |_, _, letter| letter.altered.push(("padding", "x".repeat(message::BODY_MAX).into())),
            Reason::MessageTooLarge,
            "the body has 263027 bytes, at most 262144 are allowed",
            false,
        ),
        (
            "a content type that is not JSON",
            |_, _, letter| letter.properties.content_type = Some("text/plain".to_owned()),
            Reason::MalformedMessage,
            "content_type must be application/json, with no charset but utf-8",
            false,
        ),
        (
            "a quantity with a leading zero",
            |_, _, letter| {
                let amount = serde_json::json!({"currency": "BTC", "quantity": "01"});
                letter.altered.push(("amount", amount));
            },
            Reason::InvalidField,
            "amount.quantity: must be at least 1 and have no leading zeros",
            false,
        ),
        (
            "an enterprise nobody registered",
            |_, _, letter| letter.routing_key = Some("Acme.allocation.update".to_owned()),
            Reason::UnknownPartner,
            "no partner of this enterprise id is registered",
            false,
        ),
        (
            "another broker user",
            |model, _, letter| {
                model.acme().broker_user = Some("acme-user".to_owned());
                letter.properties.user_id = Some("Acme-user".to_owned());
            },
            Reason::SenderMismatch,
            "the user_id property is not the broker user that this partner is bound to",
            false,
        ),
        (
            "no broker user at all",
            |model, _, _| model.acme().broker_user = Some("acme-user".to_owned()),
            Reason::SenderMismatch,
            "the user_id property is not the broker user that this partner is bound to",
            false,
        ),
        (
            "an empty signature",
            |_, _, letter| letter.altered.push(("signature", "".into())),
            Reason::MalformedSignature,
            "signature: must be exactly 130 hexadecimal characters: header, r, s",
            false,
        ),
        (
            "a signature with 0x",
            |_, _, letter| letter.altered.push(("signature", "0x1f".into())),
            Reason::MalformedSignature,
            "signature: must be bare hexadecimal, without 0x",
            false,
        ),
        (
            "a stranger's signature",
            |_, _, letter| letter.signed_by = 9,
            Reason::SignatureMismatch,
            "the signature was made by no key that is registered: the payload may have been changed after it was signed, or \
             another key signed it",
            false,
        ),
        (
            "a revoked key",
            |model, _, letter| {
                letter.signed_by = 4;
                model.acme().revoked.push(key(4).public_key());
            },
            Reason::SignatureMismatch,
            "the signature was made by a key of this partner that is revoked",
            false,
        ),
        (
            "a key that is not valid yet",
            |model, _, letter| {
                letter.signed_by = 4;
                let registered = ("acme".to_owned(), KeyStanding::Early);
                model.registered.insert(key(4).public_key(), registered);
            },
            Reason::SignatureMismatch,
            "the signature was made by a key of this partner that is not valid yet",
            false,
        ),
        (
            "a key that has expired",
            |model, _, letter| {
                letter.signed_by = 4;
                let registered = ("acme".to_owned(), KeyStanding::Expired);
                model.registered.insert(key(4).public_key(), registered);
            },
            Reason::SignatureMismatch,
            "the signature was made by a key of this partner that has expired",
            false,
        ),
        (
            "an expired key of another partner",
            |model, _, letter| {
                letter.signed_by = 4;
                let registered = ("beta".to_owned(), KeyStanding::Expired);
                model.registered.insert(key(4).public_key(), registered);
            },
            Reason::SignatureMismatch,
            "the signature was made by a key that is registered, but not for this partner",
            false,
        ),
        (
            "a stranger's signature of something else than the body says",
            |_, _, letter| {
                letter.signed_by = 9;
                letter.altered.push(("partnersClientId", "other".into()));
            },
            Reason::SignatureMismatch,
            "the signature was made by no key that is registered: the payload may have been changed after it was signed, or \
             another key signed it; besides, partnersClientId: differs between the payload and the body",
            false,
        ),
        (
            "another partner's signature",
            |_, _, letter| letter.signed_by = 3,
            Reason::SignatureMismatch,
            "the signature was made by a key that is registered, but not for this partner",
            false,
        ),
        (
            "a partner without a key",
            |model, _, _| model.acme().keys.clear(),
            Reason::SignatureMismatch,
            "the signature was made by no key that is registered: the payload may have been changed after it was signed, or \
             another key signed it",
            false,
        ),
        (
            "a signature no point can be recovered from",
            // x = 5 is on no point of the curve.
            |_, _, letter| {
                let signature = format!("1f{:064x}{:064x}", 5, 1);
                letter.altered.push(("signature", signature.into()));
            },
            Reason::SignatureMismatch,
            "no public key can be recovered from the signature and the payload",
            false,
        ),
        (
            "a body that says more than was signed",
            |_, _, letter| letter.altered.push(("partnersClientId", "cust-2".into())),
            Reason::PayloadMismatch,
            "partnersClientId: differs between the payload and the body",
            false,
        ),
        (
            "a nonce that is voided, refused for something else before",
            |model, _, letter| void(model, letter),
            Reason::NonceVoided,
            "nonce: the operator has made it unusable; nothing that was or will be signed with it settles",
            true,
        ),
        (
            "a nonce that is voided, whose message waits",
            |model, _, letter| {
                letter.draft.id = LATE;
                assert_eq!(line(&model.judge_letter(letter)), "parked");
                void(model, letter);
                letter.source = letter.parked();
            },
            Reason::NonceVoided,
            "nonce: the operator has made it unusable; nothing that was or will be signed with it settles",
            true,
        ),
        (
            "it ends this moment",
            |_, _, letter| letter.draft.expires_at = Some(start()),
            Reason::ExpiredUpdate,
            "expiresAt: the time until which it was to count is over",
            true,
        ),
        (
            "a nonce that another payload had",
            |model, _, _| {
                let first = Letter::cleared(DEALLOCATION, "n");
                assert_eq!(line(&model.judge_letter(&first)), "settled");
            },
            Reason::NonceReused,
            "nonce: this partner used it with another payload",
            true,
        ),
        (
            "cleared, but rejected by policy (unsigned)",
            |_, _, letter| letter.altered.push(("policyResult", "REJECTED".into())),
            Reason::PolicyContradiction,
            "policyResult: rejected contradicts the status cleared",
            true,
        ),
        (
            "a suspended partner",
            |model, _, _| model.acme().suspended = true,
            Reason::PartnerInactive,
            "the partner is suspended",
            true,
        ),
        (
            "a partner in quarantine, with no room to hold its message",
            |model, _, _| model.acme().quarantined = true,
            Reason::PartnerInactive,
            "the partner is in quarantine: its messages are held, and this one can not be",
            true,
        ),
        (
            "no asynchronous allocations",
            |model, _, _| model.acme().async_allocations = false,
            Reason::PartnerInactive,
            "asynchronous allocations are not enabled for the partner",
            true,
        ),
        (
            "no asynchronous deallocations",
            |model, _, letter| {
                model.acme().async_deallocations = false;
                letter.draft = draft(DEALLOCATION, Outcome::Cleared, "n");
            },
            Reason::PartnerInactive,
            "asynchronous deallocations are not enabled for the partner",
            true,
        ),
        (
            "no such id, and no room to wait",
            |_, rules, letter| {
                rules.park_max_per_partner = 0;
                letter.draft.id = LATE;
            },
            Reason::AllocationNotFound,
            "no allocation of this id, and too many of this partner's messages wait already",
            true,
        ),
        (
            "no such id, and the wait is over",
            |model, _, letter| {
                letter.draft.id = LATE;
                assert_eq!(line(&model.judge_letter(letter)), "parked");
                model.pass(seconds(900));
                letter.source = letter.parked();
            },
            Reason::AllocationNotFound,
            "no allocation of this id was reserved in time",
            true,
        ),
        (
            "another partner's allocation",
            |_, _, letter| letter.draft.id = OF_BETA,
            Reason::NotPermitted,
            "the id belongs to another partner's connection",
            true,
        ),
        (
            "a deallocation's id in an allocation update",
            |_, _, letter| letter.draft.id = DEALLOCATION,
            Reason::NotPermitted,
            "allocationId: the id is of the other type",
            true,
        ),
        (
            "an allocation's id in a deallocation update",
            |_, _, letter| letter.draft.kind = Kind::Deallocation,
            Reason::NotPermitted,
            "deallocationId: the id is of the other type",
            true,
        ),
        (
            "another currency",
            |_, _, letter| letter.draft.amount.currency = "btc".to_owned(),
            Reason::AllocationMismatch,
            "amount.currency: differs from the record",
            true,
        ),
        (
            "a symbol that is not mapped, for what has none",
            |model, _, letter| {
                model.acme().symbols = symbols(&[("XETH", "ETH:wei")]);
                letter.draft.amount.currency = "XBT".to_owned();
            },
            Reason::CurrencyUnmapped,
            "amount.currency: this symbol is not mapped, and no symbol of this partner is mapped to what was reserved",
            true,
        ),
        (
            "a symbol that means another currency",
            |model, _, letter| {
                model.acme().symbols = symbols(&[("BTC", "TBTC")]);
                letter.draft.amount.currency = "BTC".to_owned();
            },
            Reason::CurrencyMismatch,
            "amount.currency: this symbol is mapped to another currency than was reserved",
            true,
        ),
        (
            "another quantity",
            |_, _, letter| letter.draft.amount.quantity = Quantity::parse("99999999").expect("a quantity"),
            Reason::AllocationMismatch,
            "amount.quantity: differs from the record",
            true,
        ),
        (
            "a quantity that differs in the last of 78 digits",
            |_, _, letter| {
                letter.draft = draft(LARGE, Outcome::Cleared, "n");
                let less = QUANTITY_MAX.replace("639935", "639934");
                letter.draft.amount.quantity = Quantity::parse(&less).expect("a quantity");
            },
            Reason::AllocationMismatch,
            "amount.quantity: differs from the record",
            true,
        ),
        (
            "another client",
            |_, _, letter| letter.draft.client_id = Uuid::from_u128(7),
            Reason::AllocationMismatch,
            "clientId: differs from the record",
            true,
        ),
        (
            "another connection",
            |_, _, letter| letter.draft.connection_id = Uuid::from_u128(7),
            Reason::AllocationMismatch,
            "connectionId: differs from the record",
            true,
        ),
        (
            "another partner's client",
            |_, _, letter| letter.draft.partners_client_id = "cust-2".to_owned(),
            Reason::AllocationMismatch,
            "partnersClientId: differs from the record",
            true,
        ),
        (
            "another partner's connection",
            |_, _, letter| letter.draft.partners_connection_id = "CONN-1".to_owned(),
            Reason::AllocationMismatch,
            "partnersConnectionId: differs from the record",
            true,
        ),
        (
            "every id differs: the first is named",
            |_, _, letter| {
                letter.draft.partners_connection_id = "x".to_owned();
                letter.draft.connection_id = Uuid::from_u128(7);
                letter.draft.partners_client_id = "x".to_owned();
            },
            Reason::AllocationMismatch,
            "connectionId: differs from the record",
            true,
        ),
        (
            "settled, under another id of the partner's",
            |model, _, letter| {
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.partners_id = "theirs-2".to_owned();
            },
            Reason::AllocationMismatch,
            "partnersAllocationId: differs from the record",
            true,
        ),
        (
            "a settled deallocation, under another id of the partner's",
            |model, _, letter| {
                letter.draft = draft(DEALLOCATION, released(), "n");
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.partners_id = "theirs-2".to_owned();
            },
            Reason::AllocationMismatch,
            "partnersDeallocationId: differs from the record",
            true,
        ),
        (
            "released, after it was cleared",
            |model, _, letter| {
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.outcome = released();
            },
            Reason::AlreadySettled,
            "it is cleared already",
            true,
        ),
        (
            "cleared, after it was released",
            |model, _, letter| {
                letter.draft.outcome = released();
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.outcome = Outcome::Cleared;
            },
            Reason::AlreadySettled,
            "it is released already",
            true,
        ),
    ];
    for (what, twist, reason, detail, proven) in table {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        twist(&mut model, &mut rules, &mut letter);
        let (books, receipts) = (
            (model.allocations.clone(), model.balances.clone()),
            model.receipts.len(),
        );
        let sent = letter.send();
        let (judgements, changes) = model.post(&rules, std::slice::from_ref(&sent));
        let expected = Judgement {
            verdict: Verdict::Rejected {
                reason: *reason,
                detail: (*detail).to_owned(),
            },
            proven: *proven,
        };
        assert_eq!(judgements, std::slice::from_ref(&expected), "{what}");
        assert_eq!(expected.verdict.kind(), VerdictKind::Rejected);
        assert_eq!(expected.verdict.reason(), Some(*reason));
        assert_eq!((model.allocations, model.balances), books, "{what}");
        assert!(
            changes.settlements.is_empty() && changes.newly_parked.is_empty(),
            "{what}"
        );
        if *proven && *reason != Reason::NonceReused {
            let receipt = model.receipts.get(&sent.key()).expect("a receipt");
            assert_eq!(
                (receipt.verdict, receipt.reason),
                (VerdictKind::Rejected, Some(*reason)),
                "{what}"
            );
            assert_eq!(receipt.public_key, key(letter.signed_by).public_key());
        } else {
            assert_eq!(model.receipts.len(), receipts, "{what}");
            assert!(
                changes.new_receipts.is_empty() && changes.changed_receipts.is_empty(),
                "{what}"
            );
        }
    }
    let covered: BTreeSet<Reason> = table.iter().map(|row| row.2).collect();
    let ours: Vec<Reason> = Reason::ALL.into_iter().take(19).collect();
    assert_eq!(covered.into_iter().collect::<Vec<_>>(), ours, "a reason without a row");
}

/// Each breaks one rule, in the table's order, and leaves the others as they are.
const BREAKERS: [Twist; 19] = [
    |_, _, letter| letter.altered.push(("padding", "x".repeat(message::BODY_MAX).into())),
    |_, _, letter| letter.properties.content_encoding = Some("gzip".to_owned()),
    |_, _, letter| letter.altered.push(("evaluationId", "".into())),
    |model, _, _| model.partners.clear(),
    |model, _, _| model.acme().broker_user = Some("acme-user".to_owned()),
    |_, _, letter| letter.altered.push(("signature", "1f".into())),
    |_, _, letter| letter.signed_by = 9,
    |_, _, letter| letter.altered.push(("partnersAllocationId", "altered".into())),
    |model, _, letter| void(model, letter),
    |model, _, letter| {
        let mut receipt = receipt_of(letter);
        receipt.payload_digest = [0; 32];
        model
            .receipts
            .insert(ReceiptKey::new("acme", &letter.draft.nonce), receipt);
    },
    |_, _, letter| letter.draft.expires_at = Some(start()),
    |_, _, letter| letter.altered.push(("policyResult", "rejected".into())),
    |model, _, _| model.acme().suspended = true,
    |model, rules, letter| {
        model.allocations.remove(&letter.draft.id);
        rules.park_max_per_partner = 0;
    },
    |model, _, letter| {
        model
            .allocations
            .entry(letter.draft.id)
            .and_modify(|allocation| allocation.enterprise_id = "beta".to_owned());
    },
    |model, _, letter| {
        model.acme().symbols = symbols(&[("XETH", "ETH:wei")]);
        letter.draft.amount.currency = "XBT".to_owned();
    },
    |model, _, letter| {
        model.acme().symbols = symbols(&[("XBT", "TBTC")]);
        letter.draft.amount.currency = "XBT".to_owned();
    },
    |_, _, letter| letter.draft.partners_client_id = "cust-2".to_owned(),
    |model, _, letter| {
        model
            .allocations
            .entry(letter.draft.id)
            .and_modify(|allocation| allocation.status = Status::Released);
    },
];

/// What a message comes to that breaks these rules (numbers of the table) and no other.
fn broken(numbers: impl DoubleEndedIterator<Item = usize>) -> String {
    let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
    // The later ones first: a breaker may take away what a later one needs, as an allocation that is not there.
    for number in numbers.rev() {
        BREAKERS[number - 1](&mut model, &mut rules, &mut letter);
    }
    let sent = letter.send();
    let batch = [sent.by_ref()];
    let (judgements, _) = decide(model.snapshot(&batch), &batch, &rules);
    lines(&judgements).concat()
}

#[test]
fn the_earliest_broken_rule_names_the_reason() {
    assert_eq!(broken(std::iter::empty()), "settled");
    for (index, reason) in Reason::ALL.iter().enumerate().take(19) {
        let first = index + 1;
        assert_eq!(broken([first].into_iter()), reason.as_str(), "{first} alone");
        assert_eq!(broken(first..=19), reason.as_str(), "{first} and all that follow");
        for second in first + 1..=19 {
            assert_eq!(
                broken([first, second].into_iter()),
                reason.as_str(),
                "{first}, {second}"
            );
        }
    }
}

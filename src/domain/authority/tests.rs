use super::*;
use crate::domain::{currency::Meaning, signature::SigningKey};

const ID: Uuid = Uuid::from_u128(1);
const CLIENT: Uuid = Uuid::from_u128(2);
const CONNECTION: Uuid = Uuid::from_u128(3);

fn at(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

fn key(number: u8) -> SigningKey {
    SigningKey::from_bytes([number; 32]).expect("a key")
}

fn payload(status: &str) -> String {
    let reason = if status == "released" {
        r#""rejectReason":"no","#
    } else {
        ""
    };
    format!(
        r#"{{"status":"{status}",{reason}"allocationId":"{ID}","amount":{{"currency":"BTC","quantity":"5"}},
        "clientId":"{CLIENT}","connectionId":"{CONNECTION}","partnersClientId":"c","partnersConnectionId":"n",
        "partnersAllocationId":"p","nonce":"7","evaluationId":"e","policyResult":"APPROVED"}}"#
    )
}

fn signed(text: &str, by: &SigningKey) -> Vec<u8> {
    hex::decode(by.sign(text)).expect("hexadecimal")
}

fn sound(status: &str) -> Authorised {
    let text = payload(status);
    Authorised {
        allocation_id: ID,
        settled_at: at("2026-01-02T00:00:00Z"),
        signature: signed(&text, &key(1)),
        by: Some(AuthorisedBy {
            key: ReceiptKey::new("acme", "7"),
            enterprise_id: "acme".into(),
            nonce: "7".into(),
            payload_digest: sha256(&text).to_vec(),
            public_key: key(1).public_key().as_bytes().to_vec(),
        }),
        record: Some(AuthorisedRecord {
            kind: "allocation".into(),
            status: status.into(),
            currency: "BTC".into(),
            partner_symbol: None,
            quantity: "5".into(),
            client_id: CLIENT,
            connection_id: CONNECTION,
            enterprise_id: "acme".into(),
            partners_client_id: "c".into(),
            partners_connection_id: "n".into(),
            partner_external_id: Some("p".into()),
            reason: (status == "released").then(|| "no".into()),
            evaluation_id: Some("e".into()),
            pending_approval_id: Some("unsigned".into()),
            policy_result: Some("approved".into()),
        }),
        payload: text,
    }
}

fn window(from: &str, until: Option<&str>) -> Validity {
    Validity {
        from: at(from).into(),
        until: until.map(|until| at(until).into()),
    }
}

fn now(enterprise_id: &str) -> KeyNow {
    KeyNow {
        enterprise_id: enterprise_id.into(),
        registered_at: at("2026-01-01T00:00:00Z"),
        validity: window("2026-01-01T00:00:00Z", None),
        revoked_at: None,
    }
}

fn keys() -> Register {
    let keys = [(1, "acme"), (2, "other"), (3, "acme")]
        .into_iter()
        .map(|(number, enterprise)| (key(number).public_key(), KeyLife::new(now(enterprise), Vec::new())))
        .collect();
    Register {
        keys,
        symbols: SymbolLives::default(),
    }
}

#[test]
fn what_was_signed_has_no_objection() {
    for status in ["cleared", "released"] {
        assert_eq!(objection(&sound(status), &keys()), None, "{status}");
    }
}

/// Rows that agree with each other, over what somebody else signed.
fn signed_anew(settlement: &mut Authorised, text: String, by: &SigningKey) {
    settlement.signature = signed(&text, by);
    let receipt = settlement.by.as_mut().expect("a receipt");
    receipt.payload_digest = sha256(&text).to_vec();
    receipt.public_key = by.public_key().as_bytes().to_vec();
    settlement.payload = text;
}

#[test]
fn each_forgery_is_named() {
    type Forge = fn(&mut Authorised);
    let table: [(&str, Forge); 22] = [
        ("its signature is none", |one| one.signature = vec![0; 65]),
        ("its signature is none", |one| one.signature.truncate(64)),
        ("was made by the key", |one| one.signature[40] ^= 1),
        ("and its receipt names", |one| {
            one.signature = signed(&one.payload, &key(3))
        }),
        ("which is registered for nobody", |one| {
            signed_anew(one, payload("cleared"), &key(9));
        }),
        ("is registered for other, and not for acme", |one| {
            signed_anew(one, payload("cleared"), &key(2));
        }),
        ("which was registered after it", |one| {
            one.settled_at = at("2025-12-31T23:00:00Z");
        }),
        ("the receipt that it names is missing", |one| one.by = None),
        ("its allocation is missing", |one| one.record = None),
        ("not kept under its partner and nonce", |one| {
            one.by.as_mut().expect("a receipt").nonce = "8".into();
        }),
        ("what was signed is not what its receipt says", |one| {
            one.by.as_mut().expect("a receipt").payload_digest = vec![0; 32];
        }),
        ("and its connection is with", |one| {
            one.record.as_mut().expect("a record").enterprise_id = "third".into();
        }),
        ("allocationId: what was signed", |one| one.allocation_id = CLIENT),
        ("amount.quantity: what was signed", |one| {
            one.record.as_mut().expect("a record").quantity = "50".into();
        }),
        ("amount.currency: what was signed", |one| {
            one.record.as_mut().expect("a record").currency = "ETH".into();
        }),
        ("status: what was signed", |one| {
            let record = one.record.as_mut().expect("a record");
            (record.status, record.reason) = ("released".into(), Some("no".into()));
        }),
        ("rejectReason: what was signed", |one| {
            one.record.as_mut().expect("a record").reason = Some("another".into());
        }),
        ("partnersAllocationId: what was signed", |one| {
            one.record.as_mut().expect("a record").partner_external_id = None;
        }),
        ("connectionId: what was signed", |one| {
            one.record.as_mut().expect("a record").connection_id = CLIENT;
        }),
        ("evaluationId: what was signed", |one| {
            one.record.as_mut().expect("a record").evaluation_id = None;
        }),
        ("policyResult: what was signed", |one| {
            one.record.as_mut().expect("a record").policy_result = Some("rejected".into());
        }),
        ("the signed text is none of this kind", |one| {
            one.record.as_mut().expect("a record").kind = "deallocation".into();
        }),
    ];
    for (index, (words, forge)) in table.into_iter().enumerate() {
        let mut forged = sound("cleared");
        forge(&mut forged);
        let why = objection(&forged, &keys()).unwrap_or_else(|| panic!("{index}: nobody objects"));
        assert!(why.contains(words), "{index}: {why}");
        assert!(
            why.starts_with(&format!("settlement of {}", forged.allocation_id)),
            "{why}"
        );
        assert!(!why.contains(&forged.payload), "{why}");
    }
    let mut nonce = sound("cleared");
    signed_anew(
        &mut nonce,
        payload("cleared").replace(r#""nonce":"7""#, r#""nonce":"8""#),
        &key(1),
    );
    let why = objection(&nonce, &keys()).expect("an objection");
    assert!(why.contains("nonce: what was signed"), "{why}");
    let mut text = sound("cleared");
    signed_anew(&mut text, "[1]".into(), &key(1));
    let why = objection(&text, &keys()).expect("an objection");
    assert!(why.contains("not a JSON object"), "{why}");
}

/// What counted at a moment, and not what stands in the row today.
#[test]
fn a_key_is_judged_by_what_counted_then() {
    let change = |time: &str| KeyChange {
        at: at(time),
        was: None,
        validity: None,
        revoked: None,
    };
    let first = window("2026-01-01T00:00:00Z", None);
    let ended = window("2026-01-01T00:00:00Z", Some("2026-01-05T00:00:00Z"));
    let changes = vec![
        KeyChange {
            validity: Some(first),
            ..change("2026-01-01T00:00:00Z")
        },
        KeyChange {
            revoked: Some(true),
            ..change("2026-01-10T00:00:00Z")
        },
        KeyChange {
            revoked: Some(false),
            ..change("2026-01-20T00:00:00Z")
        },
        // Cut short afterwards: what was settled before stays settled.
        KeyChange {
            was: Some(first),
            validity: Some(ended),
            ..change("2026-01-25T00:00:00Z")
        },
    ];
    let key = KeyNow {
        validity: ended,
        ..now("acme")
    };
    let life = KeyLife::new(key.clone(), changes.clone());
    for (moment, objects) in [
        ("2025-12-31T23:59:00Z", true),
        ("2026-01-01T00:00:00Z", false),
        ("2026-01-09T00:00:00Z", false),
        // A batch that looked before the revocation was committed.
        ("2026-01-10T00:00:59Z", false),
        ("2026-01-10T00:01:01Z", true),
        ("2026-01-19T23:59:59Z", true),
        ("2026-01-20T00:00:00Z", false),
        ("2026-01-25T00:00:30Z", false),
        ("2026-01-25T00:01:01Z", true),
    ] {
        let why = life.objection("acme", at(moment));
        assert_eq!(why.is_some(), objects, "{moment}: {why:?}");
    }
    // Revoked past this program: the row alone says so.
    let revoked = KeyNow {
        revoked_at: Some(at("2026-01-22T00:00:00Z")),
        ..key
    };
    let life = KeyLife::new(revoked, changes);
    assert_eq!(life.objection("acme", at("2026-01-21T00:00:00Z")), None);
    assert_eq!(
        life.objection("acme", at("2026-01-22T00:02:00Z")).as_deref(),
        Some("was revoked then")
    );
    // Without a word in the audit the row counts.
    let life = KeyLife::new(now("acme"), Vec::new());
    assert_eq!(life.objection("acme", at("2027-01-01T00:00:00Z")), None);
}

/// What a symbol meant when it settled, and not what it means today.
#[test]
fn an_amount_is_compared_through_the_map_of_then() {
    let mut own = sound("cleared");
    signed_anew(&mut own, payload("cleared").replace("BTC", "XBT"), &key(1));
    own.record.as_mut().expect("a record").partner_symbol = Some("XBT".into());
    let plain = sound("cleared");
    let meaning = |currency: &str, since: &str, until: Option<&str>| Meaning {
        currency: currency.into(),
        since: at(since),
        until: until.map(at),
    };
    let register = |symbol: &str, meanings: Vec<Meaning>| {
        let mut register = keys();
        for meaning in meanings {
            register.symbols.add("acme", symbol, meaning);
        }
        register
    };
    let (year, before, after) = ("2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "2026-01-03T00:00:00Z");
    // It settled at 2026-01-02T00:00:00Z.
    for (index, (settlement, symbol, meanings, is_right)) in [
        (&own, "XBT", vec![], false),
        (&own, "XBT", vec![meaning("BTC", before, None)], true),
        (
            &own,
            "XBT",
            vec![meaning("BTC", before, Some(after)), meaning("LTC", after, None)],
            true,
        ),
        (
            &own,
            "XBT",
            vec![meaning("LTC", year, Some(before)), meaning("BTC", before, None)],
            true,
        ),
        (
            &own,
            "XBT",
            vec![meaning("BTC", year, Some(before)), meaning("LTC", before, None)],
            false,
        ),
        (&own, "XBT", vec![meaning("BTC", after, None)], false),
        (&own, "XXBT", vec![meaning("BTC", before, None)], false),
        // Changed while the batch was under way; cut to milliseconds.
        (
            &own,
            "XBT",
            vec![meaning("BTC", before, Some("2026-01-01T23:59:01Z"))],
            true,
        ),
        (
            &own,
            "XBT",
            vec![meaning("BTC", before, Some("2026-01-01T23:58:59Z"))],
            false,
        ),
        (
            &own,
            "XBT",
            vec![meaning("BTC", "2026-01-02T00:00:00.0009Z", None)],
            true,
        ),
        // By its own name, unless that meant another.
        (&plain, "BTC", vec![], true),
        (&plain, "XBT", vec![meaning("BTC", before, None)], true),
        (&plain, "BTC", vec![meaning("BTC", before, None)], true),
        (&plain, "BTC", vec![meaning("TBTC", before, None)], false),
        (&plain, "BTC", vec![meaning("TBTC", after, None)], true),
    ]
    .into_iter()
    .enumerate()
    {
        let why = objection(settlement, &register(symbol, meanings));
        assert_eq!(why.is_none(), is_right, "{index}: {why:?}");
        if let Some(why) = why {
            assert!(why.ends_with("did not mean the currency of the books then"), "{why}");
        }
    }
    // The record says another symbol than was signed.
    own.record.as_mut().expect("a record").partner_symbol = Some("XXBT".into());
    let why = objection(&own, &register("XXBT", vec![meaning("BTC", before, None)])).expect("an objection");
    assert!(
        why.contains("amount.currency: what was signed is not what stands"),
        "{why}"
    );
}

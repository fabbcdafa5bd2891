//! Step 3.

use super::*;

#[test]
fn fields_have_rules() {
    let uuid_rule = "must be a UUID of 36 characters, 8-4-4-4-12";
    let at_least_1 = "must be at least 1 and have no leading zeros";
    let text = |length: usize| quoted(&"x".repeat(length));
    let max = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
    let above = "115792089237316195423570985008687907853269984665640564039457584007913129639936";
    let amount = |currency: &str, quantity: &str| format!(r#"{{"currency":{currency},"quantity":{quantity}}}"#);
    let quantity = |quantity: &str| amount("\"BTC\"", quantity);
    let currency = |currency: &str| amount(currency, "\"1\"");
    let mut table: Vec<(&str, String, &str)> = vec![
        ("amount", "null", "amount: must be an object"),
        ("amount", "[]", "amount: must be an object"),
        ("amount", "\"1\"", "amount: must be an object"),
        ("amount", "{}", "amount.currency: is missing"),
        ("amount", r#"{"quantity":"0"}"#, "amount.currency: is missing"),
        ("amount", r#"{"currency":"BTC"}"#, "amount.quantity: is missing"),
        ("status", "null", "status: must be a string"),
        ("status", "true", "status: must be a string"),
        ("status", "\"Cleared\"", "status: must be cleared or released"),
        ("status", "\"reserved\"", "status: must be cleared or released"),
        ("status", "\"cleared \"", "status: must be cleared or released"),
        ("status", "\"\"", "status: must be cleared or released"),
        ("policyResult", "\"Approved\"", "ok"),
        ("policyResult", "\"REJECTED\"", "ok"),
        (
            "policyResult",
            "\"pending\"",
            "policyResult: must be approved or rejected",
        ),
        ("policyResult", "\"\"", "policyResult: must be approved or rejected"),
        ("policyResult", "null", "policyResult: must be a string"),
        ("policyResult", "true", "policyResult: must be a string"),
        // A cleared update has no reason to give, in whatever form.
        (
            "rejectReason",
            "\"x\"",
            "rejectReason: must be absent when the status is cleared",
        ),
        (
            "rejectReason",
            "\"\"",
            "rejectReason: must be absent when the status is cleared",
        ),
        (
            "rejectReason",
            "null",
            "rejectReason: must be absent when the status is cleared",
        ),
    ]
    .into_iter()
    .map(|(name, json, expected)| (name, json.to_owned(), expected))
    .collect();
    for (json, expected) in [
        (currency("\"tBTC:usdc.e_-9\""), "ok"),
        (currency(&text(64)), "ok"),
        (
            currency(&text(65)),
            "amount.currency: must be 1 to 64 bytes of [A-Za-z0-9:._-]",
        ),
        (
            currency("\"\""),
            "amount.currency: must be 1 to 64 bytes of [A-Za-z0-9:._-]",
        ),
        (
            currency("\"B C\""),
            "amount.currency: must be 1 to 64 bytes of [A-Za-z0-9:._-]",
        ),
        (
            currency("\"BTC\\n\""),
            "amount.currency: must be 1 to 64 bytes of [A-Za-z0-9:._-]",
        ),
        (
            currency("\"\u{391}\""),
            "amount.currency: must be 1 to 64 bytes of [A-Za-z0-9:._-]",
        ),
        (currency("\"\\u0000\""), "amount.currency: must not contain U+0000"),
        (currency("null"), "amount.currency: must be a string"),
        (amount("null", "null"), "amount.currency: must be a string"),
        (quantity("\"1\""), "ok"),
        (quantity("\"\\u0031\""), "ok"),
        (quantity(&quoted(max)), "ok"),
        (quantity(&quoted(above)), "amount.quantity: must be at most 2^256-1"),
        (
            quantity(&format!("\"1{}\"", "0".repeat(78))),
            "amount.quantity: must be at most 2^256-1",
        ),
        (quantity("1"), "amount.quantity: must be a string"),
        (quantity("null"), "amount.quantity: must be a string"),
        (quantity("\"0\""), at_least_1),
        (quantity("\"01\""), at_least_1),
        (quantity("\"\""), "amount.quantity: must be decimal digits"),
        (quantity("\"-1\""), "amount.quantity: must be decimal digits"),
        (quantity("\"+1\""), "amount.quantity: must be decimal digits"),
        (quantity("\"1.0\""), "amount.quantity: must be decimal digits"),
        (quantity("\"1e3\""), "amount.quantity: must be decimal digits"),
        (quantity("\" 1\""), "amount.quantity: must be decimal digits"),
        (quantity("\"1_000\""), "amount.quantity: must be decimal digits"),
        (quantity("\"0x10\""), "amount.quantity: must be decimal digits"),
        (quantity("\"\u{661}\""), "amount.quantity: must be decimal digits"),
    ] {
        let named = if expected == at_least_1 {
            "amount.quantity: must be at least 1 and have no leading zeros"
        } else {
            expected
        };
        table.push(("amount", json, named));
    }
    for (name, json, expected) in &table {
        let expected = if *expected == "ok" {
            "ok".to_owned()
        } else {
            format!("invalid_field: {expected}")
        };
        assert_eq!(
            field_refusal(&Members::payload(&cleared()).with(name, json)),
            expected,
            "{name} {json}"
        );
    }
    for name in ["allocationId", "clientId", "connectionId"] {
        for (json, expected) in [
            (quoted(OTHER_ID), "ok"),
            (quoted(&OTHER_ID.to_uppercase()), "ok"),
            ("\"00000000-0000-0000-0000-000000000000\"".to_owned(), "ok"),
            (quoted(&format!("{{{ID}}}")), uuid_rule),
            (quoted(&format!("urn:uuid:{ID}")), uuid_rule),
            (quoted(&ID.replace('-', "")), uuid_rule),
            // 36 characters, hyphens elsewhere; 36 bytes, not 36 characters.
            (quoted("10764cd859-b5-422a-93a6-681bae7e84bd"), uuid_rule),
            (quoted("{10764cd859b5422a93a6681bae7e84bd--}"), uuid_rule),
            (quoted("10764cd8-59b5-422a-93a6-681bae7e84g0"), uuid_rule),
            (quoted("10764cd8-59b5-422a-93a6-681bae7e84é"), uuid_rule),
            (quoted(&format!("{ID} ")), uuid_rule),
            (quoted(&ID[..35]), uuid_rule),
            ("\"\"".to_owned(), uuid_rule),
            ("\"\\u0000\"".to_owned(), "must not contain U+0000"),
            ("null".to_owned(), "must be a string"),
            ("1".to_owned(), "must be a string"),
        ] {
            let expected = if expected == "ok" {
                "ok".to_owned()
            } else {
                format!("invalid_field: {name}: {expected}")
            };
            assert_eq!(
                field_refusal(&Members::payload(&cleared()).with(name, &json)),
                expected,
                "{name} {json}"
            );
        }
    }
    for (name, max) in [
        ("partnersClientId", 1024_usize),
        ("partnersConnectionId", 1024),
        ("partnersAllocationId", 1024),
        ("nonce", 256),
        ("rejectReason", 16_384),
        ("evaluationId", 1024),
        ("pendingApprovalId", 1024),
    ] {
        let range = format!("invalid_field: {name}: must be 1 to {max} bytes");
        let half = max >> 1;
        for (json, expected) in [
            (text(1), "ok"),
            (text(max), "ok"),
            (text(max.saturating_add(1)), range.as_str()),
            ("\"\"".to_owned(), &range),
            // Bytes of the unescaped text count, neither characters nor bytes on the wire.
            (format!("\"{}\"", "é".repeat(half)), "ok"),
            (format!("\"{}x\"", "é".repeat(half)), &range),
            (format!("\"{}\"", "\\u0061".repeat(max)), "ok"),
            (format!("\"{}\"", "\\u00e9".repeat(half.saturating_add(1))), &range),
            ("\" \"".to_owned(), "ok"),
            ("\"\\u0001\u{feff}\\uffff\"".to_owned(), "ok"),
            (
                "\"a\\u0000\"".to_owned(),
                &format!("invalid_field: {name}: must not contain U+0000"),
            ),
            ("null".to_owned(), &format!("invalid_field: {name}: must be a string")),
            ("{}".to_owned(), &format!("invalid_field: {name}: must be a string")),
            ("1".to_owned(), &format!("invalid_field: {name}: must be a string")),
        ] {
            assert_eq!(
                field_refusal(&Members::payload(&released()).with(name, &json)),
                expected,
                "{name} {json}"
            );
        }
    }
}

#[test]
fn payload_and_signature_are_strings() {
    let signed = Members::read(&Members::payload(&cleared()).signed("{}"));
    for (name, json, expected) in [
        ("payload", "null", "invalid_field: payload: must be a string"),
        ("payload", "{}", "invalid_field: payload: must be a string"),
        ("payload", "\"\"", "invalid_field: payload: must not be empty"),
        (
            "payload",
            "\"\\u0000\"",
            "invalid_field: payload: must not contain U+0000",
        ),
        ("payload", "\" \"", "ok"),
        ("payload", "\"\\\\u0000\"", "ok"),
        ("signature", "null", "invalid_field: signature: must be a string"),
        ("signature", "7", "invalid_field: signature: must be a string"),
        (
            "signature",
            "\"\\u0000\"",
            "invalid_field: signature: must not contain U+0000",
        ),
        ("signature", "\"\"", "ok"),
        ("signature", "\"0x\"", "ok"),
    ] {
        assert_eq!(
            refusal(&delivery(KEY, signed.clone().with(name, json).text())),
            expected,
            "{name} {json}"
        );
    }
    let content = content_of(KEY, signed.with("signature", "\"\"").text());
    assert!(matches!(content.signer, Signer::Malformed(_)));
}

#[test]
fn the_first_field_in_the_order_of_the_table_is_named() {
    for kind in [Kind::Allocation, Kind::Deallocation] {
        let key = routing_key("acme", kind);
        let outcome = Outcome::Released {
            reject_reason: "x".to_owned(),
        };
        let order = [
            kind.id_field(),
            "amount",
            "clientId",
            "connectionId",
            "partnersClientId",
            "partnersConnectionId",
            kind.partners_id_field(),
            "status",
            "nonce",
            "rejectReason",
            "evaluationId",
            "pendingApprovalId",
            "policyResult",
            "payload",
            "signature",
        ];
        // From the last to the first, each is broken on top of those behind it.
        let mut members = Members::read(&Members::payload(&draft(kind, outcome)).signed("{}"));
        for name in order.into_iter().rev() {
            let what = if name == "amount" { "an object" } else { "a string" };
            members = members.with(name, "null");
            assert_eq!(
                refusal(&delivery(&key, members.text())),
                format!("invalid_field: {name}: must be {what}")
            );
            if !["evaluationId", "pendingApprovalId", "policyResult"].contains(&name) {
                members = members.without(name);
                assert_eq!(
                    refusal(&delivery(&key, members.text())),
                    format!("invalid_field: {name}: is missing")
                );
            }
        }
    }
    // The names of the other kind are unknown fields.
    let members = Members::payload(&cleared()).signed("{}");
    assert_eq!(
        refusal(&delivery("acme.deallocation.update", members)),
        "invalid_field: deallocationId: is missing"
    );
    // A status that is neither says nothing about the rejectReason.
    let neither = Members::payload(&released())
        .with("status", "\"x\"")
        .without("rejectReason");
    assert_eq!(
        field_refusal(&neither),
        "invalid_field: status: must be cleared or released"
    );
}

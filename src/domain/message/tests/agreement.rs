//! Step 8.

use super::*;

/// Whether a body and this payload agree; `ok`, or the detail.
fn agreement(body: &Members, payload: &str) -> String {
    let content = content_of(KEY, body.clone().signed(payload));
    assert_eq!(content.signer, Signer::Key(signing_key().public_key()));
    assert_eq!(content.payload, payload);
    assert_eq!(content.payload_digest, sha256(payload));
    match content.agreement {
        Ok(()) => "ok".to_owned(),
        Err(detail) => {
            assert!(detail.len() <= 512);
            detail
        }
    }
}

const UNDOCUMENTED: &str = "an undocumented key of the payload is not in the body, or has another value there";

#[test]
fn every_named_field_is_signed_with_the_value_of_the_body() {
    let body = Members::payload(&released());
    for (name, other) in [
        ("allocationId", quoted(OTHER_ID)),
        ("amount", r#"{"currency":"BTC","quantity":"100000001"}"#.to_owned()),
        ("amount", r#"{"currency":"btc","quantity":"100000000"}"#.to_owned()),
        ("amount", r#"{"currency":"BTC","quantity":100000000}"#.to_owned()),
        (
            "amount",
            r#"{"currency":"BTC","quantity":"100000000","x":1}"#.to_owned(),
        ),
        ("amount", r#"{"currency":"BTC"}"#.to_owned()),
        ("clientId", quoted(OTHER_ID)),
        ("connectionId", quoted(OTHER_ID)),
        ("partnersClientId", "\"Cust-1\"".to_owned()),
        ("partnersConnectionId", "\"conn-1 \"".to_owned()),
        ("partnersAllocationId", "\"alloc-2\"".to_owned()),
        ("status", "\"cleared\"".to_owned()),
        ("status", "\"Released\"".to_owned()),
        ("nonce", "\"nonce-2\"".to_owned()),
        ("rejectReason", "\"no  funds\"".to_owned()),
    ] {
        let signed = |json: &str| Members::payload(&released()).with(name, json).text();
        let differs = format!("{name}: differs between the payload and the body");
        assert_eq!(agreement(&body, &signed(&other)), differs);
        assert_eq!(agreement(&body, &signed("null")), differs);
        let missing = Members::payload(&released()).without(name).text();
        assert_eq!(
            agreement(&body, &missing),
            format!("{name}: is in the body, but not in the payload")
        );
    }
    // The first in the order of the table is named.
    let all_differ = Members::payload(&released())
        .with("nonce", "1")
        .with("clientId", "1")
        .with("a", "1");
    assert_eq!(
        agreement(&body, &all_differ.text()),
        "clientId: differs between the payload and the body"
    );
    assert_eq!(
        agreement(&body, "{}"),
        "allocationId: is in the body, but not in the payload"
    );
    let cleared_body = Members::payload(&cleared());
    let with_reason = Members::payload(&cleared()).with("rejectReason", "\"x\"").text();
    assert_eq!(
        agreement(&cleared_body, &with_reason),
        "rejectReason: is in the payload, but not in the body"
    );
}

#[test]
fn equal_is_by_value() {
    let body = Members::payload(&released());
    let payload = Members::payload(&released());
    for (name, json) in [
        ("allocationId", quoted(&ID.to_uppercase())),
        ("allocationId", quoted(ID).replace('1', "\\u0031")),
        (
            "amount",
            "{ \"quantity\" :\n\"\\u003100000000\", \"\\u0063urrency\":\"BTC\" }".to_owned(),
        ),
        ("status", r#""\u0072eleased""#.to_owned()),
        ("rejectReason", r#""no\u0020funds""#.to_owned()),
    ] {
        assert_eq!(
            agreement(&body, &payload.clone().with(name, &json).text()),
            "ok",
            "{name} {json}"
        );
    }
    // Order and white space are the partner's.
    let mut reversed = payload.clone();
    reversed.0.reverse();
    assert_eq!(agreement(&body, &reversed.text()), "ok");
    assert_eq!(
        agreement(&body, &format!(" \n\t{}\r\n ", payload.text().replace("\":", "\" :\n"))),
        "ok"
    );
    // Unicode and escapes.
    for (said, signed, equal) in [
        ("\"余额不足\"", "\"\\u4f59\\u989d\\u4e0d\\u8db3\"", true),
        ("\"😀\"", "\"\\ud83d\\ude00\"", true),
        ("\"\\/\"", "\"/\"", true),
        ("\"\u{e9}\"", "\"e\u{301}\"", false),
        ("\"\\\\u0061\"", "\"a\"", false),
    ] {
        let body = body.clone().with("rejectReason", said);
        let payload = payload.clone().with("rejectReason", signed).text();
        let expected = if equal {
            "ok"
        } else {
            "rejectReason: differs between the payload and the body"
        };
        assert_eq!(agreement(&body, &payload), expected, "{said} {signed}");
    }
    // UUIDs by value, but only in the one form.
    for form in [
        ID.replace('-', ""),
        format!("{{{ID}}}"),
        format!("urn:uuid:{ID}"),
        format!(" {ID}"),
    ] {
        let payload = payload.clone().with_text("allocationId", &form).text();
        assert_eq!(
            agreement(&body, &payload),
            "allocationId: differs between the payload and the body"
        );
    }
    // The amount as a whole, with what is unknown in it.
    for (said, signed, equal) in [
        (
            r#"{"currency":"BTC","quantity":"1","n":1}"#,
            r#"{"n":1,"currency":"BTC","quantity":"1"}"#,
            true,
        ),
        (
            r#"{"currency":"BTC","quantity":"1","n":1}"#,
            r#"{"n":1.0,"currency":"BTC","quantity":"1"}"#,
            false,
        ),
        (
            r#"{"currency":"BTC","quantity":"1","n":1}"#,
            r#"{"currency":"BTC","quantity":"1"}"#,
            false,
        ),
    ] {
        let payload = payload.clone().with("amount", signed).text();
        let expected = if equal {
            "ok"
        } else {
            "amount: differs between the payload and the body"
        };
        assert_eq!(
            agreement(&body.clone().with("amount", said), &payload),
            expected,
            "{said} {signed}"
        );
    }
}

#[test]
fn policy_fields_may_be_unsigned_but_not_contradicted() {
    let plain = Members::payload(&cleared());
    for (name, value, same, other) in [
        ("evaluationId", "\"e\"", r#""\u0065""#, "\"E\""),
        ("pendingApprovalId", "\"p\"", "\"p\"", "\"q\""),
        ("policyResult", "\"approved\"", "\"APPROVED\"", "\"rejected\""),
    ] {
        let body = plain.clone().with(name, value);
        assert_eq!(agreement(&body, &plain.text()), "ok");
        assert_eq!(agreement(&body, &plain.clone().with(name, value).text()), "ok");
        assert_eq!(agreement(&body, &plain.clone().with(name, same).text()), "ok");
        for json in [other, "null", "\"\"", "[]"] {
            assert_eq!(
                agreement(&body, &plain.clone().with(name, json).text()),
                format!("{name}: differs between the payload and the body")
            );
        }
        assert_eq!(
            agreement(&plain, &plain.clone().with(name, value).text()),
            format!("{name}: is in the payload, but not in the body")
        );
    }
}

#[test]
fn other_keys_of_the_payload_must_be_in_the_body() {
    let plain = Members::payload(&cleared());
    for (said, signed, equal) in [
        ("1", "1", true),
        ("1", "1.0", false),
        ("1", "1e0", false),
        ("1e400", "1e400", true),
        ("null", "null", true),
        ("null", "false", false),
        (r#""\u0000""#, r#""\u0000""#, true),
        (r#"{"a":[1,{}],"b":2}"#, r#"{"b":2,"a":[1,{}]}"#, true),
        (r#"{"a":[1,2]}"#, r#"{"a":[2,1]}"#, false),
        // By value means by code points here: nobody knows that it is a UUID.
        (
            "\"10764CD8-59B5-422A-93A6-681BAE7E84BD\"",
            "\"10764cd8-59b5-422a-93a6-681bae7e84bd\"",
            false,
        ),
    ] {
        let body = plain.clone().with("extra", said);
        // What the body says beyond the payload does not matter.
        assert_eq!(agreement(&body, &plain.text()), "ok");
        let expected = if equal { "ok" } else { UNDOCUMENTED };
        assert_eq!(
            agreement(&body, &plain.clone().with("extra", signed).text()),
            expected,
            "{said} {signed}"
        );
        assert_eq!(
            agreement(&plain, &plain.clone().with("extra", signed).text()),
            UNDOCUMENTED
        );
    }
    // The names of the other kind are other keys.
    let foreign = plain.clone().with_text("deallocationId", ID);
    assert_eq!(agreement(&plain, &foreign.text()), UNDOCUMENTED);
    assert_eq!(agreement(&foreign, &foreign.text()), "ok");
    // A signature cannot sign itself.
    assert_eq!(
        agreement(&plain, &plain.clone().with_text("signature", "x").text()),
        UNDOCUMENTED
    );
    assert_eq!(
        agreement(&plain, &plain.clone().with_text("payload", "x").text()),
        UNDOCUMENTED
    );

    let differs = "enterpriseId: differs between the payload and the routing key";
    for (signed, expected) in [
        ("\"acme\"", "ok"),
        (r#""\u0061cme""#, "ok"),
        ("\"Acme\"", differs),
        ("\"other\"", differs),
        ("null", differs),
    ] {
        let payload = plain.clone().with("enterpriseId", signed).text();
        assert_eq!(agreement(&plain, &payload), expected, "{signed}");
        assert_eq!(
            agreement(&plain.clone().with("enterpriseId", "7"), &payload),
            expected,
            "{signed}"
        );
        // Like any other key it may be in the body with an equal value.
        assert_eq!(
            agreement(&plain.clone().with("enterpriseId", signed), &payload),
            "ok",
            "{signed}"
        );
    }
}

#[test]
fn the_payload_is_one_strict_json_object() {
    let body = Members::payload(&cleared());
    let good = Members::payload(&cleared());
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    for (payload, sentence) in [
        (
            " ".to_owned(),
            "the payload is not well-formed JSON: EOF while parsing a value at line 1 column 1",
        ),
        (
            "cleared".to_owned(),
            "the payload is not well-formed JSON: expected value at line 1 column 1",
        ),
        ("[]".to_owned(), "the payload is not a JSON object"),
        ("null".to_owned(), "the payload is not a JSON object"),
        (quoted(&good.text()), "the payload is not a JSON object"),
        (
            format!("\u{feff}{}", good.text()),
            "the payload begins with a byte-order mark",
        ),
        (
            r#"{"nonce":"a","n\u006fnce":"a"}"#.to_owned(),
            "the payload has the same key twice in one object",
        ),
        (
            good.clone().with("x", r#""\udc00""#).text(),
            "the payload has a lone surrogate in a string",
        ),
        (
            good.clone().with("x", deep(16)).text(),
            "the payload is nested deeper than 16",
        ),
    ] {
        assert_eq!(agreement(&body, &payload), sentence, "{payload}");
        let content = content_of(KEY, body.clone().signed(&payload));
        assert_eq!((content.signed_nonce, content.signed_ids), (None, vec![]));
    }
    let deepest = good.with("x", deep(15));
    assert_eq!(agreement(&deepest, &deepest.text()), "ok");
}

#[test]
fn what_was_signed_is_told_even_if_it_disagrees() {
    let body = Members::payload(&cleared());
    for (nonce, expected) in [
        ("\"other\"".to_owned(), Some("other")),
        (r#""\u006f""#.to_owned(), Some("o")),
        ("7".to_owned(), None),
        // No nonce at all: it could not be stored as one.
        ("\"\"".to_owned(), None),
        (r#""\u0000""#.to_owned(), None),
        (quoted(&"x".repeat(257)), None),
    ] {
        let payload = Members::payload(&cleared()).with("nonce", nonce).text();
        let content = content_of(KEY, body.clone().signed(&payload));
        assert_eq!(content.signed_nonce.as_deref(), expected);
        assert_eq!(content.update.nonce, "nonce-1");
        assert!(content.agreement.is_err());
    }
    for (id, expected) in [
        (quoted(&OTHER_ID.to_uppercase()), vec![uuid(OTHER_ID)]),
        ("7".to_owned(), vec![]),
        (quoted(&OTHER_ID.replace('-', "")), vec![]),
    ] {
        let payload = Members::payload(&cleared()).with("allocationId", id).text();
        assert_eq!(content_of(KEY, body.clone().signed(&payload)).signed_ids, expected);
    }
}

#[test]
fn a_changed_payload_has_another_signer() {
    let payload = payload_text(&cleared());
    let signature = signing_key().sign(&payload);
    let body = body_text(&cleared(), &format!("{payload} "), &signature);
    let content = content_of(KEY, body);
    assert_eq!(content.agreement, Ok(()));
    assert_ne!(content.signer, Signer::Key(signing_key().public_key()));
}

/// It may be signed without standing in the body; unsigned it is nothing.
#[test]
fn when_it_ends_is_what_was_signed() {
    let end = |body: &Members, payload: &str| {
        let content = content_of(KEY, body.clone().signed(payload));
        let agreement = content.agreement.err().unwrap_or_default();
        (content.update.expires_at.map(|time| time.to_string()), agreement)
    };
    let body = Members::payload(&released());
    let signed = |json: &str| Members::payload(&released()).with("expiresAt", json).text();
    let late = Some("2030-01-30T23:00:00Z".to_owned());
    let time = "\"2030-01-31T00:00:00+01:00\"";
    assert_eq!(end(&body, &signed(time)), (late.clone(), String::new()));
    let repeated = body.clone().with("expiresAt", time);
    assert_eq!(end(&repeated, &signed(time)), (late, String::new()));
    assert_eq!(end(&repeated, &body.text()), (None, String::new()), "nobody signed it");
    let otherwise = body.clone().with("expiresAt", "\"2031-01-31T00:00:00+01:00\"");
    let (_, detail) = end(&otherwise, &signed(time));
    assert_eq!(detail, "expiresAt: differs between the payload and the body");
    for (json, detail) in [
        ("1893456000", "expiresAt: must be a string"),
        ("null", "expiresAt: must be a string"),
        (
            "\"tomorrow\"",
            "expiresAt: must be RFC 3339, such as 2030-01-31T00:00:00Z",
        ),
        (
            "\"2030-01-31 00:00:00Z\"",
            "expiresAt: must be RFC 3339, such as 2030-01-31T00:00:00Z",
        ),
    ] {
        assert_eq!(end(&body, &signed(json)), (None, detail.to_owned()), "{json}");
    }
}

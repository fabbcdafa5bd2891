use super::*;
use crate::partner::vectors::{signed_body, test_key};

const FIELDS: &str = r#"{"status":"cleared","allocationId":"10764cd8-59b5-422a-93a6-681bae7e84bd",
    "amount":{"currency":"BTC","quantity":"100000000"},"clientId":"9838fce3-c125-4af8-a775-a389f5ac26bf",
    "connectionId":"632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7","partnersClientId":"cust-42","partnersConnectionId":"conn-7",
    "partnersAllocationId":"alloc-1001","nonce":"n-1"}"#;

fn signed(fields: &str) -> String {
    signed_body(fields.as_bytes(), &test_key("alice")).expect("an object")
}

fn look(body: &str) -> Report {
    lint(&LintedMessage {
        body: body.as_bytes(),
        routing_key: None,
        content_type: None,
        keys: &[test_key("alice").public_key()],
        now: "2026-01-02T00:00:00Z".parse().expect("a time"),
    })
}

/// What is wrong, by name.
fn wrong(report: &Report) -> Vec<(&str, &str)> {
    let wrong = report.checks.iter().filter(|check| check.ok == Some(false));
    wrong
        .map(|check| {
            (
                check.name.as_str(),
                check.reason.as_ref().map_or("", |reason| reason.as_str()),
            )
        })
        .collect()
}

fn todo<'r>(report: &'r Report, name: &str) -> &'r str {
    let check = report.checks.iter().find(|check| check.name == name);
    check.and_then(|check| check.todo.as_deref()).unwrap_or_default()
}

#[test]
fn a_right_message_has_every_check_and_nothing_wrong() {
    let report = look(&signed(FIELDS));
    assert!(report.ok, "{:?}", report.checks);
    for name in table(Kind::Allocation)
        .into_iter()
        .chain(["size", "json", "payload and body", "signing key"])
    {
        assert!(report.checks.iter().any(|check| check.name == name), "{name}");
    }
    assert_eq!(report.recovered_key, Some(test_key("alice").public_key().to_hex()));
    assert_eq!(report.message_digest.len(), 64);
}

/// All of it at once, and not only the first.
#[test]
fn everything_that_is_wrong_is_said() {
    let fields = FIELDS
        .replace(r#""100000000""#, "100000000")
        .replace(r#""BTC""#, r#""B/C""#)
        .replace(r#""status":"cleared""#, r#""status":"Cleared""#)
        .replace("9838fce3-c125", "{9838fce3-c125")
        .replace(r#","nonce":"n-1""#, "");
    let report = look(&signed(&fields));
    let all = [
        ("amount.currency", "invalid_field"),
        ("amount.quantity", "invalid_field"),
        ("clientId", "invalid_field"),
        ("status", "invalid_field"),
        ("nonce", "invalid_field"),
    ];
    assert_eq!(wrong(&report), all);
    assert!(todo(&report, "amount.quantity").contains("string of digits"));
}

#[test]
fn an_amount_that_is_none_is_one_line() {
    let amount = r#""amount":{"currency":"BTC","quantity":"100000000"}"#;
    for other in [r#""sum":"1""#, r#""amount":"1""#, r#""amount":[]"#] {
        let report = look(&signed(&FIELDS.replace(amount, other)));
        let lines: Vec<_> = report
            .checks
            .iter()
            .filter(|check| check.name.starts_with("amount"))
            .collect();
        assert_eq!(lines.len(), 1, "{other}: {lines:?}");
        assert_eq!(wrong(&report), [("amount", "invalid_field")], "{other}");
    }
}

#[test]
fn each_difference_between_payload_and_body_is_said() {
    let good = signed(FIELDS);
    // The first is the body's own: what is signed stands escaped behind it.
    let body = good.replacen("cust-42", "cust-43", 1).replacen("\"n-1\"", "\"n-2\"", 1);
    let all = [
        ("payload: partnersClientId", "payload_mismatch"),
        ("payload: nonce", "payload_mismatch"),
    ];
    assert_eq!(wrong(&look(&body)), all);
    let stray = signed(&FIELDS.replace(r#""nonce""#, r#""desk":{"a":[1]},"nonce""#));
    assert!(look(&stray).ok, "signed, and the same in the body");
    let stray = stray.replacen(r#""desk":{"a":[1]}"#, r#""desk":{"a":[2]}"#, 1);
    assert_eq!(wrong(&look(&stray)), [("payload: desk", "payload_mismatch")]);
}

#[test]
fn a_signature_of_another_form_is_told_how_to_become_one() {
    let good = signed(FIELDS);
    let (_, signature) = good.split_once(r#""signature":""#).expect("a signature");
    let signature = signature.get(..130).expect("130 digits").to_owned();
    let bare = signature.get(2..).expect("r and s");
    for (other, advice) in [
        (format!("0x{signature}"), "leave the 0x out"),
        (format!("1c{bare}"), "add 4"),
        (bare.to_owned(), "header before r and s"),
        (format!("3045{}", "0".repeat(138)), "DER"),
        (format!("{}=", "I".repeat(87)), "base64"),
        ("hello".to_owned(), "130 hexadecimal digits"),
    ] {
        let report = look(&good.replace(&signature, &other));
        assert_eq!(wrong(&report), [("signature form", "malformed_signature")], "{other}");
        assert!(
            todo(&report, "signature form").contains(advice),
            "{other}: {}",
            todo(&report, "signature form")
        );
    }
}

#[test]
fn what_was_signed_instead_is_found() {
    let good = signed(FIELDS);
    let value: serde_json::Value = serde_json::from_str(&good).expect("JSON");
    let payload = value["payload"].as_str().expect("a payload");
    let signature = value["signature"].as_str().expect("a signature");
    let key = test_key("alice");
    let flipped = if signature.starts_with("1f") { "20" } else { "1f" };
    let header = format!("{flipped}{}", signature.get(2..).expect("r and s"));
    for (other, advice) in [
        (key.sign(&format!("{payload}\n")), "line's end"),
        (key.sign(&hex::encode(sha256(payload))), "SHA-256"),
        (test_key("bob").sign(payload), "registered"),
        (header, "the header is wrong"),
    ] {
        let report = look(&good.replace(signature, &other));
        assert_eq!(wrong(&report), [("signing key", "signature_mismatch")], "{other}");
        assert!(
            todo(&report, "signing key").contains(advice),
            "{advice}: {}",
            todo(&report, "signing key")
        );
    }
}

#[test]
fn what_is_no_object_is_said_and_nothing_more_is_looked_at() {
    for body in ["", "[]", "{", r#"{"a":1,"a":2}"#, "\u{feff}{}", r#"{"a":"\ud800"}"#] {
        let report = look(body);
        assert_eq!(wrong(&report), [("json", "malformed_message")], "{body}");
    }
    let too_large = " ".repeat(message::BODY_MAX + 1);
    assert_eq!(wrong(&look(&too_large)), [("size", "message_too_large")]);
}

#[test]
fn routing_key_and_content_type_are_looked_at_where_they_are_said() {
    let body = signed(FIELDS);
    let said = |routing_key, content_type| {
        lint(&LintedMessage {
            body: body.as_bytes(),
            routing_key: Some(routing_key),
            content_type: Some(content_type),
            keys: &[],
            now: Timestamp::UNIX_EPOCH,
        })
    };
    assert!(said("acme.allocation.update", "application/json; charset=utf-8").ok);
    assert_eq!(
        wrong(&said("acme.update", "application/json")),
        [("routing_key", "malformed_message")]
    );
    let other = said("acme.allocation.update", "text/plain");
    assert_eq!(wrong(&other), [("content_type", "malformed_message")]);
    // The other kind's routing key: its id is missing, and the one that is there is named.
    let kind = said("acme.deallocation.update", "application/json");
    assert!(
        wrong(&kind).contains(&("deallocationId", "invalid_field")),
        "{:?}",
        wrong(&kind)
    );
    assert!(todo(&kind, "allocationId").contains("deallocationId"));
    let contradiction = signed(&FIELDS.replace(r#""nonce""#, r#""policyResult":"REJECTED","nonce""#));
    assert_eq!(
        wrong(&look(&contradiction)),
        [("status and policyResult", "policy_contradiction")]
    );
}

#[test]
fn when_it_ends_is_looked_at_where_it_is_signed() {
    let with = |time: &str| FIELDS.replace(r#""nonce":"n-1""#, &format!(r#""nonce":"n-1","expiresAt":{time}"#));
    let check = |body: &str| {
        let report = look(body);
        let checks = report.checks.iter().filter(|check| check.name.ends_with("expiresAt"));
        let seen: Vec<_> = checks
            .map(|check| (check.name.clone(), check.ok, check.reason))
            .collect();
        (report.ok, seen)
    };
    let one = |name: &str, ok, reason| vec![(name.to_owned(), ok, reason)];
    assert_eq!(
        check(&signed(&with(r#""2026-01-02T00:00:00.001Z""#))),
        (true, one("expiresAt", Some(true), None))
    );
    assert_eq!(
        check(&signed(&with(r#""2026-01-02T00:00:00Z""#))),
        (false, one("expiresAt", Some(false), Some(Reason::ExpiredUpdate)))
    );
    for unreadable in [r#""soon""#, "7"] {
        assert_eq!(
            check(&signed(&with(unreadable))),
            (
                false,
                one("payload: expiresAt", Some(false), Some(Reason::PayloadMismatch))
            ),
            "{unreadable}"
        );
    }
    let unsigned = signed(FIELDS).replacen('{', r#"{"expiresAt":"2020-01-01T00:00:00Z","#, 1);
    assert_eq!(check(&unsigned), (true, one("expiresAt", None, None)));
    assert_eq!(check(&signed(FIELDS)), (true, Vec::new()));
}

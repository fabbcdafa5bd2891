use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::domain::{
    address::{parse_uuid, routing_key},
    allocation::PolicyResult,
    delivery::{HeaderValue, Source},
    digest::sha256,
    draft::{body_text, payload_text},
    ledger::{Amount, Quantity},
    signature::{SigningKey, signature_bytes},
    update::{Outcome, Update},
};

const KEY: &str = "acme.allocation.update";
const ID: &str = "10764cd8-59b5-422a-93a6-681bae7e84bd";
const OTHER_ID: &str = "10764cd8-59b5-422a-93a6-681bae7e84be";

fn uuid(text: &str) -> Uuid {
    parse_uuid(text).expect("a UUID")
}

fn draft(kind: Kind, outcome: Outcome) -> Update {
    Update {
        enterprise_id: "acme".to_owned(),
        kind,
        id: uuid(ID),
        amount: Amount {
            currency: "BTC".to_owned(),
            quantity: Quantity::parse("100000000").expect("a quantity"),
        },
        client_id: uuid("9838fce3-c125-4af8-a775-a389f5ac26bf"),
        connection_id: uuid("632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7"),
        partners_client_id: "cust-1".to_owned(),
        partners_connection_id: "conn-1".to_owned(),
        partners_id: "alloc-1".to_owned(),
        outcome,
        nonce: "nonce-1".to_owned(),
        evaluation_id: None,
        pending_approval_id: None,
        policy_result: None,
        expires_at: None,
    }
}

fn cleared() -> Update {
    draft(Kind::Allocation, Outcome::Cleared)
}

fn released() -> Update {
    draft(
        Kind::Allocation,
        Outcome::Released {
            reject_reason: "no funds".to_owned(),
        },
    )
}

fn signing_key() -> SigningKey {
    SigningKey::from_bytes([7; 32]).expect("a key")
}

fn delivery(routing_key: &str, body: impl Into<Vec<u8>>) -> Delivery {
    Delivery {
        exchange: "settlement.updates".to_owned(),
        routing_key: routing_key.to_owned(),
        body: body.into(),
        properties: Properties::default(),
        cut: None,
        redelivered: false,
        source: Source::Plain,
    }
}

/// An object whose members are JSON text, in order, so that a test may say anything.
#[derive(Clone)]
struct Members(Vec<(String, String)>);

impl Members {
    /// What [`payload_text`] writes, to be changed.
    fn payload(draft: &Update) -> Self {
        Self::read(&payload_text(draft))
    }

    fn read(text: &str) -> Self {
        let members: Vec<(String, String)> =
            serde_json::from_str::<BTreeMap<String, Box<serde_json::value::RawValue>>>(text)
                .expect("an object")
                .into_iter()
                .map(|(name, raw)| (name, raw.get().to_owned()))
                .collect();
        Self(members)
    }

    fn without(mut self, name: &str) -> Self {
        self.0.retain(|(other, _)| other != name);
        self
    }

    fn with(self, name: &str, json: impl Into<String>) -> Self {
        let mut changed = self.without(name);
        changed.0.push((name.to_owned(), json.into()));
        changed
    }

    fn with_text(self, name: &str, text: &str) -> Self {
        self.with(name, quoted(text))
    }

    fn text(&self) -> String {
        let members: Vec<String> = self
            .0
            .iter()
            .map(|(name, json)| format!("{}:{json}", quoted(name)))
            .collect();
        format!("{{{}}}", members.join(","))
    }

    /// With this payload and its signature.
    fn signed(self, payload: &str) -> String {
        self.with_text("payload", payload)
            .with_text("signature", &signing_key().sign(payload))
            .text()
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn content_of(routing_key: &str, body: impl Into<Vec<u8>>) -> Content {
    Arc::unwrap_or_clone(facts(&delivery(routing_key, body)).content.expect("it decodes"))
}

/// The verdict of steps 1 to 3, as one line.
fn refusal(delivery: &Delivery) -> String {
    let facts = facts(delivery);
    assert_eq!(facts.message_digest, sha256(&delivery.body));
    match facts.content {
        Ok(_) => "ok".to_owned(),
        Err(refusal) => {
            assert!(refusal.detail.len() <= 512, "{}", refusal.detail);
            format!("{}: {}", refusal.reason, refusal.detail)
        }
    }
}

/// What a body whose payload agrees with it is refused for; `ok` if it is not.
fn field_refusal(members: &Members) -> String {
    refusal(&delivery(KEY, members.clone().signed("{}")))
}

#[test]
fn what_the_partner_writes_is_what_we_read() {
    let policy = |mut draft: Update| {
        draft.evaluation_id = Some("evaluation-1".to_owned());
        draft.pending_approval_id = Some("approval-1".to_owned());
        draft.policy_result = Some(PolicyResult::Approved);
        draft
    };
    let reason = "a \"quoted\" reason, 余额不足 😀 \u{7} \\ {\"status\":\"cleared\"}".to_owned();
    let told = Outcome::Released { reject_reason: reason };
    for draft in [
        cleared(),
        released(),
        policy(cleared()),
        draft(Kind::Allocation, told.clone()),
        draft(Kind::Deallocation, Outcome::Cleared),
        policy(draft(Kind::Deallocation, told)),
    ] {
        let payload = payload_text(&draft);
        let signature = signing_key().sign(&payload);
        let body = body_text(&draft, &payload, &signature);
        let facts = facts(&delivery(&routing_key("acme", draft.kind), body.clone()));
        assert_eq!(facts.message_digest, sha256(&body));
        assert_eq!(facts.enterprise_id.as_deref(), Some("acme"));
        let Update {
            enterprise_id,
            kind,
            id,
            amount,
            client_id,
            connection_id,
            partners_client_id,
            partners_connection_id,
            partners_id,
            outcome,
            nonce,
            evaluation_id,
            pending_approval_id,
            policy_result,
            expires_at,
        } = draft;
        let key = ReceiptKey::new("acme", &nonce);
        let expected = Content {
            key,
            signed_key: Some(key),
            payload_digest: sha256(&payload),
            signed_nonce: Some(nonce.clone()),
            signed_ids: vec![id],
            signer: Signer::Key(signing_key().public_key()),
            agreement: Ok(()),
            update: Update {
                enterprise_id,
                kind,
                id,
                amount,
                client_id,
                connection_id,
                partners_client_id,
                partners_connection_id,
                partners_id,
                outcome,
                nonce,
                evaluation_id,
                pending_approval_id,
                policy_result,
                expires_at,
            },
            signature: signature_bytes(&signature),
            payload,
        };
        assert_eq!(facts.content, Ok(Arc::new(expected)));
    }
}

#[test]
fn the_partner_writes_in_the_documented_order() {
    assert_eq!(
        payload_text(&released()),
        r#"{"status":"released","rejectReason":"no funds","allocationId":"10764cd8-59b5-422a-93a6-681bae7e84bd","amount":{"currency":"BTC","quantity":"100000000"},"clientId":"9838fce3-c125-4af8-a775-a389f5ac26bf","connectionId":"632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7","partnersClientId":"cust-1","partnersConnectionId":"conn-1","partnersAllocationId":"alloc-1","nonce":"nonce-1"}"#
    );
    let mut draft = draft(Kind::Deallocation, Outcome::Cleared);
    draft.policy_result = Some(PolicyResult::Rejected);
    assert_eq!(
        body_text(&draft, "{}", "00"),
        r#"{"status":"cleared","deallocationId":"10764cd8-59b5-422a-93a6-681bae7e84bd","amount":{"currency":"BTC","quantity":"100000000"},"clientId":"9838fce3-c125-4af8-a775-a389f5ac26bf","connectionId":"632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7","partnersClientId":"cust-1","partnersConnectionId":"conn-1","partnersDeallocationId":"alloc-1","nonce":"nonce-1","policyResult":"rejected","payload":"{}","signature":"00"}"#
    );
}

#[test]
fn vectors_that_are_whole_messages_agree_with_their_body() {
    let vectors: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/data/signatures.json")).expect("the vectors are JSON");
    let valid = vectors
        .get("valid")
        .and_then(serde_json::Value::as_array)
        .expect("valid vectors");
    let text = |vector: &serde_json::Value, name: &str| {
        vector
            .get(name)
            .and_then(serde_json::Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let mut whole = 0_usize;
    for vector in valid {
        let (payload, signature) = (text(vector, "payload"), text(vector, "signatureHex"));
        let key = crate::domain::signature::PublicKey::from_hex(&text(vector, "publicKeyHex")).expect("a key");
        let body = Members::read(&payload)
            .with_text("payload", &payload)
            .with_text("signature", &signature)
            .text();
        match facts(&delivery(KEY, body)).content {
            Ok(content) => {
                assert_eq!((&content.agreement, &content.signer), (&Ok(()), &Signer::Key(key)));
                whole = whole.saturating_add(1);
            }
            // One of them is short, to have a certain length.
            Err(refusal) => assert_eq!(refusal.detail, "allocationId: is missing"),
        }
    }
    assert_eq!(whole.saturating_add(1), valid.len());
}

#[test]
fn size_has_limits() {
    let padded = |bytes: usize| {
        let body = Members::payload(&cleared()).signed("{}");
        let padding = bytes.saturating_sub(body.len());
        delivery(KEY, format!("{body}{}", " ".repeat(padding)))
    };
    assert_eq!(refusal(&padded(262_144)), "ok");
    assert_eq!(
        refusal(&padded(262_145)),
        "message_too_large: the body has 262145 bytes, at most 262144 are allowed"
    );
    let with_header = |bytes: usize| {
        let mut delivery = delivery(KEY, Members::payload(&cleared()).signed("{}"));
        // 4 for the table, 2 for the name and its length, 5 for the value's type and length.
        let value = HeaderValue::text("x".repeat(bytes.saturating_sub(11)));
        delivery.properties.headers = Some([("h".to_owned(), value)].into_iter().collect());
        assert_eq!(delivery.properties.wire_len(), bytes);
        delivery
    };
    assert_eq!(refusal(&with_header(16_384)), "ok");
    let too_large = "message_too_large: properties and headers have 16385 bytes, at most 16384 are allowed";
    assert_eq!(refusal(&with_header(16_385)), too_large);
    // Size comes first, and the enterprise is known even so.
    let mut worse = with_header(16_385);
    worse.body = b"[".to_vec();
    assert_eq!(refusal(&worse), too_large);
    assert_eq!(facts(&worse).enterprise_id.as_deref(), Some("acme"));
    worse.routing_key = "x".to_owned();
    assert_eq!(refusal(&worse), too_large);
}

#[test]
fn routing_keys_have_one_form() {
    let long = format!("{}.allocation.update", "a".repeat(64));
    let too_long = format!("a{long}");
    for (key, read) in [
        ("acme.allocation.update", Some(("acme", Kind::Allocation))),
        ("A-0_z.deallocation.update", Some(("A-0_z", Kind::Deallocation))),
        ("0.allocation.update", Some(("0", Kind::Allocation))),
        ("a-_.allocation.update", Some(("a-_", Kind::Allocation))),
        (&long, Some(("a".repeat(64).leak(), Kind::Allocation))),
        (&too_long, None),
        ("", None),
        ("acme", None),
        (".allocation.update", None),
        ("-acme.allocation.update", None),
        ("_acme.allocation.update", None),
        ("acme.allocation", None),
        ("acme.allocation.update.", None),
        ("acme.allocation.updated", None),
        ("acme.Allocation.update", None),
        ("acme.reallocation.update", None),
        ("acme..update", None),
        ("acme.x.allocation.update", None),
        ("ac me.allocation.update", None),
        ("ac\u{e9}me.allocation.update", None),
        ("acme.allocation.update\n", None),
        (" acme.allocation.update", None),
        ("#.allocation.update", None),
        ("*.allocation.update", None),
    ] {
        assert_eq!(parse_routing_key(key), read, "{key:?}");
        let facts = facts(&delivery(key, "{}"));
        assert_eq!(
            facts.enterprise_id.as_deref(),
            read.map(|(enterprise_id, _)| enterprise_id)
        );
        if let Some((enterprise_id, kind)) = read {
            assert_eq!(routing_key(enterprise_id, kind), key);
        } else {
            assert_eq!(
                refusal(&delivery(key, "{}")),
                "malformed_message: the routing key must be <enterpriseId>.allocation.update or \
                 <enterpriseId>.deallocation.update"
            );
        }
    }
}

#[test]
fn content_types_are_json_or_nothing() {
    for (content_type, ok) in [
        (None, true),
        (Some(""), true),
        (Some("application/json"), true),
        (Some("APPLICATION/Json"), true),
        (Some("application/json;charset=utf-8"), true),
        (Some("application/json; charset=UTF-8"), true),
        (Some("application/json \t; \tCharset=\"Utf-8\" "), true),
        (Some("application/json; charset=utf8"), false),
        (Some("application/json; charset=iso-8859-1"), false),
        (Some("application/json; charset='utf-8'"), false),
        (Some("application/json; charset=\"utf-8"), false),
        (Some("application/json; charset = utf-8"), false),
        (Some("application/json; version=1"), false),
        (Some("application/json; charset=utf-8; version=1"), false),
        (Some("application/json; charset=utf-8; charset=utf-8"), false),
        (Some("application/json;"), false),
        (Some("application/json charset=utf-8"), false),
        (Some("application/json, application/json"), false),
        (Some("application/jsonx"), false),
        (Some("application/cloudevents+json"), false),
        (Some("text/json"), false),
        (Some("text/plain"), false),
        (Some("json"), false),
        (Some(" "), false),
        (Some(" application/json"), false),
        (Some(";charset=utf-8"), false),
    ] {
        let mut delivery = delivery(KEY, Members::payload(&cleared()).signed("{}"));
        delivery.properties.content_type = content_type.map(str::to_owned);
        let expected = "malformed_message: content_type must be application/json, with no charset but utf-8";
        assert_eq!(refusal(&delivery), if ok { "ok" } else { expected }, "{content_type:?}");
    }
    for (encoding, ok) in [
        (None, true),
        (Some(""), true),
        (Some("identity"), true),
        (Some("Identity"), false),
        (Some("gzip"), false),
        (Some("utf-8"), true),
        (Some("UTF-8"), true),
        (Some("Utf-8"), true),
        (Some("utf8"), false),
        (Some("utf-16"), false),
        (Some("utf-8, gzip"), false),
        (Some(" "), false),
        (Some("identity, identity"), false),
    ] {
        let mut delivery = delivery(KEY, Members::payload(&cleared()).signed("{}"));
        delivery.properties.content_encoding = encoding.map(str::to_owned);
        let expected = "malformed_message: content_encoding must be absent, empty, identity or utf-8";
        assert_eq!(refusal(&delivery), if ok { "ok" } else { expected }, "{encoding:?}");
    }
}

#[test]
fn the_body_is_one_strict_json_object() {
    for (body, sentence) in [
        (&b"[]"[..], "the body is not a JSON object"),
        (b"null", "the body is not a JSON object"),
        (b"\"{}\"", "the body is not a JSON object"),
        (
            b"",
            "the body is not well-formed JSON: EOF while parsing a value at line 1 column 0",
        ),
        (
            b"{}{}",
            "the body is not well-formed JSON: trailing characters at line 1 column 3",
        ),
        (b"\xef\xbb\xbf{}", "the body begins with a byte-order mark"),
        (b"{\"\xff\":1}", "the body is not UTF-8 (from byte 2)"),
        (
            br#"{"nonce":"a","\u006eonce":"a"}"#,
            "the body has the same key twice in one object",
        ),
        (
            br#"{"ignored":{"a":1,"a":1}}"#,
            "the body has the same key twice in one object",
        ),
        (br#"{"ignored":"\ud800"}"#, "the body has a lone surrogate in a string"),
        (
            b"{\"i\":[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]}",
            "the body is nested deeper than 16",
        ),
    ] {
        assert_eq!(refusal(&delivery(KEY, body)), format!("malformed_message: {sentence}"));
    }
    // Nothing else of an ignored field matters, in the amount as little as outside.
    let amount = r#"{"quantity":"1","currency":"X","currency ":null,"n":[1e999,"\u0000"]}"#;
    let members = Members::payload(&cleared())
        .with("amount", amount)
        .with("deallocationId", "7")
        .with("partnersDeallocationId", "null")
        .with("enterpriseId", "null")
        .with("\0", r#""\u0000""#)
        .with("i", "[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]");
    assert_eq!(field_refusal(&members), "ok");
}

/// A signed body with one byte changed.
fn damaged(draft: &Update, at: prop::sample::Index, byte: u8) -> Vec<u8> {
    let payload = payload_text(draft);
    let mut body = body_text(draft, &payload, &signing_key().sign(&payload)).into_bytes();
    let at = at.index(body.len());
    if let Some(place) = body.get_mut(at) {
        *place = byte;
    }
    body
}

proptest! {
    #[test]
    fn no_bytes_panic(
        key in "([a-z]{1,3}\\.(de)?allocation\\.update|\\PC{0,20})",
        body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        drop(facts(&delivery(&key, body)));
    }

    #[test]
    fn no_damage_to_a_message_panics_or_echoes(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), value in "secret[a-z0-9]{8}",
    ) {
        let mut draft = released();
        draft.nonce.clone_from(&value);
        draft.partners_id.clone_from(&value);
        draft.outcome = Outcome::Released { reject_reason: value.clone() };
        let body = damaged(&draft, at, byte);
        let detail = match facts(&delivery(KEY, body)).content {
            Ok(content) => content.agreement.clone().err(),
            Err(refusal) => Some(refusal.detail),
        };
        if let Some(detail) = detail {
            prop_assert!(detail.len() <= 512 && !detail.contains("secret"), "{}", detail);
        }
    }

    #[test]
    fn what_is_only_kept_is_read_in_the_same_way_but_for_the_signer(
        key in "(acme\\.allocation\\.update|[a-z.]{0,20})", at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let delivery = delivery(&key, damaged(&released(), at, byte));
        let mut signed = facts(&delivery);
        if let Ok(content) = &mut signed.content {
            let content = Arc::make_mut(content);
            (content.signer, content.signature) = (Signer::Unread, None);
        }
        prop_assert_eq!(unsigned_facts(&delivery), signed);
    }

    #[test]
    fn any_draft_that_keeps_the_rules_is_read_and_agrees(
        texts in prop::collection::vec("[^\u{0}]{1,60}", 5), quantity in "[1-9][0-9]{0,76}", released in any::<bool>(),
    ) {
        let [client, connection, partners, nonce, reason] = texts.as_slice() else { return Ok(()) };
        let mut draft = cleared();
        draft.partners_client_id.clone_from(client);
        draft.partners_connection_id.clone_from(connection);
        draft.partners_id.clone_from(partners);
        draft.nonce.clone_from(nonce);
        draft.evaluation_id = Some(reason.clone());
        draft.amount.quantity = Quantity::parse(&quantity).map_err(TestCaseError::fail)?;
        if released {
            draft.outcome = Outcome::Released { reject_reason: reason.clone() };
        }
        let payload = payload_text(&draft);
        let content = content_of(KEY, body_text(&draft, &payload, &signing_key().sign(&payload)));
        prop_assert_eq!(&content.agreement, &Ok(()));
        prop_assert_eq!(&content.update.nonce, nonce);
        prop_assert_eq!(content.signed_nonce.as_ref(), Some(nonce));
        prop_assert_eq!(&content.update.outcome, &draft.outcome);
        prop_assert_eq!(content.update.amount.quantity.to_string(), quantity);
    }
}

mod agreement;
mod fields;

proptest! {
    /// Whatever a broker adds to the headers of a message that it delivers again, it is judged as before.
    #[test]
    fn a_redelivery_changes_no_verdict(
        bytes in 16_300_usize..16_500,
        added in proptest::collection::btree_map(
            prop_oneof![
                Just("x-delivery-count".to_owned()), Just("x-acquired-count".to_owned()),
                Just("x-opt-rabbitmq-sent-time".to_owned()), Just("x-routed-by".to_owned()), "x-[a-z-]{1,40}",
            ],
            prop_oneof![
                any::<i64>().prop_map(HeaderValue::LongLongInt),
                any::<i32>().prop_map(HeaderValue::LongInt),
                any::<u8>().prop_map(HeaderValue::ShortShortUInt),
                any::<bool>().prop_map(HeaderValue::Boolean),
                any::<u64>().prop_map(HeaderValue::Timestamp),
                "[a-z@.-]{0,200}".prop_map(HeaderValue::text),
            ],
            0..9,
        ),
    ) {
        let mut delivery = delivery(KEY, Members::payload(&cleared()).signed("{}"));
        let value = HeaderValue::text("x".repeat(bytes.saturating_sub(11)));
        delivery.properties.headers = Some([("h".to_owned(), value)].into_iter().collect());
        let before = refusal(&delivery);
        delivery.redelivered = true;
        delivery.properties.headers.get_or_insert_default().extend(added);
        prop_assert_eq!(refusal(&delivery), before);
    }
}

//! Signed messages with what must come of them, for partners' own tests; made anew each time, and always the same.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::value::RawValue;

use super::{Dice, SigningPartner};
use crate::domain::{
    address::routing_key,
    allocation::Kind,
    digest::sha256,
    draft::{body_text, payload_text},
    ledger::{Amount, Quantity},
    reason::Reason,
    signature::{SigningKey, signed_digest},
    update::{Outcome, Update},
};

/// A message and what the message alone shows.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Vector {
    pub name: String,
    /// The name that makes its key, see [`test_key`].
    pub test_key: &'static str,
    pub public_key: String,
    pub routing_key: String,
    pub payload: String,
    /// SHA-256 twice, of the magic text, the length and the payload.
    pub signed_digest: String,
    pub signature: String,
    /// What to publish, byte for byte.
    pub body: String,
    /// For what it is refused whatever the registry and the books say, where that key is the partner's; null: for nothing.
    pub reason: Option<Reason>,
}

/// A key that everybody can make: the SHA-256 of a sentence with a name in it. Worth nothing, and so fit for tests.
pub fn test_key(name: &str) -> SigningKey {
    let mut seed = sha256(format!("settled test key: {name}"));
    // Of 2^256 numbers only a few above 2^256 - 2^129 are no key.
    loop {
        if let Some(key) = SigningKey::from_bytes(seed) {
            return key;
        }
        seed = sha256(seed);
    }
}

/// A body for these fields, signed: the fields as they are written, in the order of their names.
///
/// # Errors
/// The text is no JSON object.
pub fn signed_body(fields: &[u8], key: &SigningKey) -> Result<String, serde_json::Error> {
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(fields)?;
    fields.remove("payload");
    fields.remove("signature");
    let payload = serde_json::to_string(&fields)?;
    let signature = key.sign(&payload);
    for (name, text) in [("payload", &payload), ("signature", &signature)] {
        fields.insert(name.to_owned(), RawValue::from_string(serde_json::to_string(text)?)?);
    }
    serde_json::to_string(&fields)
}

const KEY: &str = "alice";

/// Every vector.
pub fn vectors() -> Vec<Vector> {
    let mut dice = Dice::new(0, "vectors");
    let mut partner = SigningPartner::draw("northwind", &mut dice);
    partner.key = test_key(KEY);
    let mut made = Vec::new();
    for (kind, outcome, name) in [
        (Kind::Allocation, Outcome::Cleared, "allocation cleared"),
        (Kind::Allocation, released("insufficient funds"), "allocation released"),
        (Kind::Deallocation, Outcome::Cleared, "deallocation cleared"),
        (
            Kind::Deallocation,
            released("余额不足 \u{1f600} \"\\\n"),
            "deallocation released, with text beyond ASCII",
        ),
    ] {
        let draft = draft(&partner, kind, outcome, &mut dice);
        let payload = payload_text(&draft);
        made.push(vector(
            name,
            &partner,
            &draft,
            &payload,
            &partner.key.sign(&payload),
            None,
        ));
    }
    let base = draft(&partner, Kind::Allocation, Outcome::Cleared, &mut dice);
    let payload = payload_text(&base);
    let spaced = payload.replace(':', ": ").replace(',', ", ");
    made.push(vector(
        "white space in the payload",
        &partner,
        &base,
        &spaced,
        &partner.key.sign(&spaced),
        None,
    ));
    let mut large = base.clone();
    // From 253 bytes on the length takes three bytes, from 65,536 on five.
    large.outcome = released(&"x".repeat(16_384));
    large.partners_id = "é".repeat(512);
    let text = payload_text(&large);
    made.push(vector(
        "a payload of more than 16,384 bytes",
        &partner,
        &large,
        &text,
        &partner.key.sign(&text),
        None,
    ));
    for (name, ends, reason) in [
        ("it ends long after now", jiff::Timestamp::MAX, None),
        (
            "it has ended, by its own word",
            jiff::Timestamp::UNIX_EPOCH,
            Some(Reason::ExpiredUpdate),
        ),
    ] {
        let mut ending = base.clone();
        ending.expires_at = Some(ends);
        let text = payload_text(&ending);
        made.push(vector(name, &partner, &ending, &text, &partner.key.sign(&text), reason));
    }
    let good = partner.key.sign(&payload);
    let bare = good.get(2..).unwrap_or_default();
    for (name, signature) in [
        ("a signature with 0x", format!("0x{good}")),
        ("a header for an uncompressed key", format!("1b{bare}")),
        ("a signature without its header", bare.to_owned()),
        ("a signature and more", format!("{good}00")),
        ("the high-s twin", high_s(&good)),
    ] {
        let reason = Some(Reason::MalformedSignature);
        made.push(vector(name, &partner, &base, &payload, &signature, reason));
    }
    let stranger = test_key("mallory").sign(&payload);
    let reason = Some(Reason::SignatureMismatch);
    made.push(vector(
        "signed by another key",
        &partner,
        &base,
        &payload,
        &stranger,
        reason,
    ));
    let mut other = base.clone();
    other.nonce = format!("{}-other", base.nonce);
    let reason = Some(Reason::PayloadMismatch);
    made.push(vector(
        "the body has another nonce than the payload",
        &partner,
        &other,
        &payload,
        &good,
        reason,
    ));
    let body = body_text(&base, &payload, &good);
    for (name, body, reason) in [
        ("a body that is cut off", cut(&body), Reason::MalformedMessage),
        (
            "a key twice",
            body.replacen('{', "{\"nonce\":\"n\",", 1),
            Reason::MalformedMessage,
        ),
        // The first is the body's own: what is signed stands escaped behind it.
        (
            "a quantity that is a number",
            body.replacen("\"100000000\"", "100000000", 1),
            Reason::InvalidField,
        ),
        (
            "a status in capitals",
            body.replacen("\"cleared\"", "\"CLEARED\"", 1),
            Reason::InvalidField,
        ),
    ] {
        made.push(Vector {
            body,
            ..vector(name, &partner, &base, &payload, &good, Some(reason))
        });
    }
    made
}

/// Without its last character.
fn cut(text: &str) -> String {
    let mut letters = text.chars();
    letters.next_back();
    letters.as_str().to_owned()
}

fn released(why: &str) -> Outcome {
    Outcome::Released {
        reject_reason: why.to_owned(),
    }
}

fn draft(partner: &SigningPartner, kind: Kind, outcome: Outcome, dice: &mut Dice) -> Update {
    let quantity = Quantity::parse("100000000").unwrap_or_else(|why| unreachable!("{why}"));
    let amount = Amount {
        currency: "BTC".to_owned(),
        quantity,
    };
    let number = dice.number();
    let reservation = partner.reservation(kind, amount, format!("order-{number}"), dice);
    partner.draft(&reservation, outcome, format!("nonce-{number}"))
}

fn vector(
    name: &str,
    partner: &SigningPartner,
    draft: &Update,
    payload: &str,
    signature: &str,
    reason: Option<Reason>,
) -> Vector {
    Vector {
        name: name.to_owned(),
        test_key: KEY,
        public_key: partner.key.public_key().to_hex(),
        routing_key: routing_key(&draft.enterprise_id, draft.kind),
        payload: payload.to_owned(),
        signed_digest: hex::encode(signed_digest(payload)),
        signature: signature.to_owned(),
        body: body_text(draft, payload, signature),
        reason,
    }
}

/// The order of the group.
const N: &[u8] = b"fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141";

/// The same signature with the higher of the two values of s, which is as good a signature and refused all the same.
fn high_s(signature: &str) -> String {
    let number = |digits: &[u8]| num_bigint::BigUint::parse_bytes(digits, 16).unwrap_or_default();
    let (head, s) = signature.split_at_checked(66).unwrap_or((signature, ""));
    let (header, r) = head.split_at_checked(2).unwrap_or((head, ""));
    let header = if header == "1f" { "20" } else { "1f" };
    format!("{header}{r}{:064x}", number(N) - number(s.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::message::{Facts, facts},
        domain::{
            delivery::{Delivery, Properties, Source},
            signature::Signer,
        },
        partner::lint::{LintedMessage, lint},
    };

    const NOW: jiff::Timestamp = jiff::Timestamp::constant(1_767_312_000, 0);

    fn read(vector: &Vector) -> Facts {
        facts(&Delivery {
            exchange: String::new(),
            routing_key: vector.routing_key.clone(),
            body: vector.body.clone().into_bytes(),
            properties: Properties::default(),
            cut: None,
            redelivered: false,
            source: Source::Plain,
        })
    }

    /// The decoder and the look of the kit come to what the vector says.
    #[test]
    fn every_vector_comes_to_what_it_says() {
        let key = test_key(KEY).public_key();
        let all = vectors();
        assert!(all.len() >= 15);
        for vector in &all {
            let reason = match read(vector).content {
                Err(refusal) => Some(refusal.reason),
                Ok(content) => match (&content.signer, &content.agreement) {
                    (Signer::Malformed(_), _) => Some(Reason::MalformedSignature),
                    (Signer::Key(by), _) if *by != key => Some(Reason::SignatureMismatch),
                    (Signer::Unread | Signer::Unrecoverable, _) => Some(Reason::SignatureMismatch),
                    (Signer::Key(_), Err(_)) => Some(Reason::PayloadMismatch),
                    (Signer::Key(_), Ok(())) => {
                        let ended = content.update.expires_at.is_some_and(|end| end <= NOW);
                        ended.then_some(Reason::ExpiredUpdate)
                    }
                },
            };
            assert_eq!(reason, vector.reason, "{}", vector.name);
            let report = lint(&LintedMessage {
                body: vector.body.as_bytes(),
                routing_key: Some(&vector.routing_key),
                content_type: Some("application/json"),
                keys: &[key],
                now: NOW,
            });
            let first = report.checks.iter().find(|check| check.ok == Some(false));
            assert_eq!(report.ok, reason.is_none(), "{}: {:?}", vector.name, report.checks);
            assert_eq!(
                first.and_then(|check| check.reason),
                vector.reason,
                "{}: {first:?}",
                vector.name
            );
        }
        let names: std::collections::BTreeSet<&str> = all.iter().map(|vector| vector.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
    }

    #[test]
    fn what_is_signed_is_what_was_given() {
        let fields = br#"{"nonce":"n","amount":{"quantity":"1","currency":"BTC"},"signature":"old"}"#;
        let body = signed_body(fields, &test_key("bob")).expect("an object");
        let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        let payload = body["payload"].as_str().expect("text");
        assert_eq!(payload, r#"{"amount":{"quantity":"1","currency":"BTC"},"nonce":"n"}"#);
        assert_eq!(body["signature"], test_key("bob").sign(payload));
        assert!(signed_body(b"[]", &test_key("bob")).is_err());
    }
}

//! A partner's message looked at field by field, with nothing but the message: what the worker would refuse, all of it at
//! once, and what to do about it. Each judgement is the decoder's own: what it complains of is put right, and it is asked again.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::domain::{
    address::{self, routing_key},
    allocation::Kind,
    calendar::{rfc3339, strict_rfc3339},
    delivery::{Delivery, Properties, Source},
    digest::sha256,
    message::{self, Content, Facts},
    reason::Reason,
    signature::{PublicKey, Signer, signed_digest, signer},
};

/// A message as it would be published.
#[derive(Clone, Debug)]
pub struct LintedMessage<'a> {
    pub body: &'a [u8],
    /// None: that of an enterprise that is not said, of the kind that the body has.
    pub routing_key: Option<&'a str>,
    pub content_type: Option<&'a str>,
    /// The keys that the partner has registered. None: nothing to compare with.
    pub keys: &'a [PublicKey],
    /// When it is looked at.
    pub now: Timestamp,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Nothing that the message alone shows is wrong.
    pub ok: bool,
    pub routing_key: Option<String>,
    /// SHA-256 of the body, by which a refusal's event names it.
    pub message_digest: String,
    /// SHA-256 of the signed text, by which a receipt names it.
    pub payload_digest: Option<String>,
    /// What the signature is made over: SHA-256 twice, of the magic text, the length and the payload.
    pub signed_digest: Option<String>,
    /// The key that made the signature, compressed.
    pub recovered_key: Option<String>,
    pub checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at: a field's name, or a word of its own such as `json` or `signature`.
    pub name: String,
    /// None: there was nothing to compare with, or something before it is in the way.
    pub ok: Option<bool>,
    /// For what the message would be refused.
    pub reason: Option<Reason>,
    /// What stands there.
    pub saw: String,
    /// What to do about it.
    pub todo: Option<String>,
}

type Members = BTreeMap<String, Box<RawValue>>;

/// More than there are fields: each is put right once.
const ROUNDS_MAX: usize = 64;
/// Characters of a value that are shown.
const SHOWN_MAX: usize = 72;

/// Looks at a message.
pub fn lint(message: &LintedMessage<'_>) -> Report {
    let mut lint = Lint {
        message,
        routing_key: message.routing_key.map(str::to_owned),
        checks: Vec::new(),
    };
    let content = lint.look();
    let (payload, key) = match &content {
        Some((payload, signer)) => (Some(payload.as_str()), signer.key()),
        None => (None, None),
    };
    Report {
        ok: lint.checks.iter().all(|check| check.ok != Some(false)),
        routing_key: lint.routing_key,
        message_digest: hex::encode(sha256(message.body)),
        payload_digest: payload.map(|payload| hex::encode(sha256(payload))),
        signed_digest: payload.map(|payload| hex::encode(signed_digest(payload))),
        recovered_key: key.map(|key| key.to_hex()),
        checks: lint.checks,
    }
}

struct Lint<'a> {
    message: &'a LintedMessage<'a>,
    routing_key: Option<String>,
    checks: Vec<Check>,
}

impl Lint<'_> {
    fn good(&mut self, name: &str, saw: impl Into<String>) {
        self.note(name, Some(true), None, saw, None);
    }

    fn wrong(&mut self, name: &str, reason: Reason, saw: impl Into<String>, todo: impl Into<String>) {
        self.note(name, Some(false), Some(reason), saw, Some(todo.into()));
    }

    fn note(
        &mut self,
        name: &str,
        ok: Option<bool>,
        reason: Option<Reason>,
        saw: impl Into<String>,
        todo: Option<String>,
    ) {
        self.checks.push(Check {
            name: name.to_owned(),
            ok,
            reason,
            saw: saw.into(),
            todo,
        });
    }

    /// Everything in order. The payload and its signer, where it got so far.
    fn look(&mut self) -> Option<(String, Signer)> {
        let body = self.message.body;
        let bytes = format!("{} bytes", body.len());
        if body.len() > message::BODY_MAX {
            let todo = format!("send {} bytes at most", message::BODY_MAX);
            self.wrong("size", Reason::MessageTooLarge, bytes, todo);
            return None;
        }
        self.good("size", bytes);
        let (enterprise_id, kind) = self.addressed()?;
        let key = routing_key(&enterprise_id, kind);
        self.content_type(&key);
        let members: Members = self.document(&key)?;
        let wrong = self.fields(&key, kind, &members)?;
        let payload = text(&members, "payload");
        let signature = text(&members, "signature");
        if let Some(payload) = &payload
            && !wrong.contains_key("payload")
        {
            self.agreement(&key, kind, &members, payload, &wrong);
            self.ending(&members, payload);
        }
        let (payload, signature) = (payload?, signature?);
        let signer = signer(&payload, &signature);
        self.signature(&payload, &signature, &signer);
        Some((payload, signer))
    }

    /// Whose message it is and of which kind, by the routing key or else by the body.
    fn addressed(&mut self) -> Option<(String, Kind)> {
        let Some(said) = self.message.routing_key else {
            let members: Option<Members> = serde_json::from_slice(self.message.body).ok();
            let has = |name: &str| members.as_ref().is_some_and(|members| members.contains_key(name));
            let kind = if has(Kind::Deallocation.id_field()) && !has(Kind::Allocation.id_field()) {
                Kind::Deallocation
            } else {
                Kind::Allocation
            };
            let todo = format!(
                "publish it under <your enterprise id>.{}.update; give --routing-key to have it looked at",
                kind.as_str()
            );
            self.note("routing_key", None, None, "not said", Some(todo));
            return Some(("enterprise".to_owned(), kind));
        };
        let Some((enterprise_id, kind)) = address::parse_routing_key(said) else {
            let todo = "write <enterpriseId>.allocation.update or <enterpriseId>.deallocation.update";
            self.wrong("routing_key", Reason::MalformedMessage, shown(said), todo);
            return None;
        };
        let found = (enterprise_id.to_owned(), kind);
        self.good("routing_key", format!("{} update of {enterprise_id}", kind.as_str()));
        Some(found)
    }

    fn content_type(&mut self, key: &str) {
        let Some(said) = self.message.content_type else {
            return;
        };
        // Its own check, with a body that can not be in the way.
        let refused = read(key, b"{}", Some(said)).content.err();
        match refused.filter(|refusal| refusal.reason == Reason::MalformedMessage) {
            Some(refusal) => self.wrong("content_type", refusal.reason, shown(said), refusal.detail),
            None => self.good("content_type", shown(said)),
        }
    }

    /// The body as an object that can be looked into.
    fn document(&mut self, key: &str) -> Option<Members> {
        let body = self.message.body;
        let refused = read(key, body, None).content.err();
        if let Some(refusal) = refused.filter(|refusal| refusal.reason == Reason::MalformedMessage) {
            let todo = "send one JSON object in UTF-8, each key once, nested no deeper than 16";
            self.wrong("json", refusal.reason, refusal.detail, todo);
            return None;
        }
        let members: Members = serde_json::from_slice(body).ok()?;
        self.good("json", format!("an object of {} members", members.len()));
        Some(members)
    }

    /// Each field of the table: complained of, or as it must be. Which are wrong, with what would be right.
    fn fields(&mut self, key: &str, kind: Kind, members: &Members) -> Option<BTreeMap<String, String>> {
        let mut mended = members.clone();
        let mut wrong: BTreeMap<String, String> = BTreeMap::new();
        for _ in 0..ROUNDS_MAX {
            let Err(refusal) = read(key, &bytes(&mended), None).content else {
                break;
            };
            let (name, why) = refusal.detail.split_once(": ")?;
            wrong.insert(name.to_owned(), why.to_owned());
            mend(&mut mended, name, kind);
        }
        for name in table(kind) {
            // What an amount has in it is looked at where it is one.
            let name = match name.strip_prefix("amount.") {
                Some("currency") if wrong.contains_key("amount") => "amount",
                Some(_) if wrong.contains_key("amount") => continue,
                Some(_) | None => name,
            };
            let value = value_of(members, name);
            let saw = value.as_deref().map_or_else(|| "absent".to_owned(), shown);
            match wrong.get(name) {
                Some(why) => self.wrong(name, Reason::InvalidField, saw, todo_of(name, why, kind)),
                None => self.good(name, saw),
            }
        }
        let says = |name: &str| text(members, name);
        if says("status").as_deref() == Some("cleared")
            && says("policyResult").is_some_and(|result| result.eq_ignore_ascii_case("rejected"))
        {
            let todo = "publish it without policyResult rejected, or publish a release";
            self.wrong(
                "status and policyResult",
                Reason::PolicyContradiction,
                "cleared and rejected",
                todo,
            );
        }
        // Of the kind's fields, those of the other one are unknown and ignored: most likely a slip.
        let other = match kind {
            Kind::Allocation => Kind::Deallocation,
            Kind::Deallocation => Kind::Allocation,
        };
        for name in [other.id_field(), other.partners_id_field()] {
            if members.contains_key(name) {
                let todo = format!("in an update of this kind it is {}", this_kinds(name, kind));
                self.note(name, None, None, "ignored: a field of the other kind", Some(todo));
            }
        }
        Some(wrong)
    }

    /// Each field in the signed text against the body.
    fn agreement(&mut self, key: &str, kind: Kind, members: &Members, payload: &str, wrong: &BTreeMap<String, String>) {
        let mut body = members.clone();
        for name in wrong.keys() {
            mend(&mut body, name, kind);
        }
        let mut signed: Members = serde_json::from_str(payload).unwrap_or_default();
        let mut differs: Vec<(String, String)> = Vec::new();
        for round in 0..ROUNDS_MAX {
            let text = if round == 0 {
                payload.to_owned()
            } else {
                object(&signed)
            };
            let Ok(said) = RawValue::from_string(serde_json::to_string(&text).unwrap_or_default()) else {
                return;
            };
            body.insert("payload".to_owned(), said);
            let Some(content) = content(key, &bytes(&body)) else {
                return;
            };
            let Err(detail) = content.agreement.clone() else { break };
            let Some((name, why)) = detail.split_once(": ").filter(|(name, _)| is_known(name, kind)) else {
                let Some(stray) = stray(&signed, &body, kind) else {
                    let todo = "sign the object of the other fields, as text, and put that very text into payload";
                    self.wrong("payload", Reason::PayloadMismatch, detail, todo);
                    return;
                };
                differs.push((
                    stray.clone(),
                    "is in the payload, and not the same in the body".to_owned(),
                ));
                signed.remove(&stray);
                continue;
            };
            let top = name.split('.').next().unwrap_or(name);
            // What is wrong in the body is said once.
            let is_said = wrong.keys().any(|wrong| wrong.split('.').next() == Some(top));
            // Nor can it be compared with a routing key that was not said.
            let is_unsaid = top == "enterpriseId" && self.message.routing_key.is_none();
            if !is_said && !is_unsaid {
                differs.push((name.to_owned(), why.to_owned()));
            }
            match body
                .get(top)
                .cloned()
                .filter(|_| !["enterpriseId", EXPIRES_AT].contains(&top))
            {
                Some(value) => drop(signed.insert(top.to_owned(), value)),
                None => drop(signed.remove(top)),
            }
        }
        if differs.is_empty() {
            self.good("payload and body", "say the same");
        }
        for (name, why) in differs {
            let todo = if why.starts_with("must") {
                format!("write {name} as the sentence says, and sign the payload again")
            } else {
                format!("give {name} the same value in payload and body, and sign the payload again")
            };
            self.wrong(&format!("payload: {name}"), Reason::PayloadMismatch, why, todo);
        }
    }

    /// When it ends, by its own signed word.
    fn ending(&mut self, members: &Members, payload: &str) {
        let signed: Members = serde_json::from_str(payload).unwrap_or_default();
        if signed.contains_key(EXPIRES_AT) {
            // What can not be read was complained of.
            match text(&signed, EXPIRES_AT).as_deref().and_then(strict_rfc3339) {
                Some(end) if end <= self.message.now => {
                    let todo = "sign it again with a later expiresAt and a new nonce";
                    self.wrong(EXPIRES_AT, Reason::ExpiredUpdate, rfc3339(end), todo);
                }
                Some(end) => self.good(EXPIRES_AT, format!("it counts until {}", rfc3339(end))),
                None => {}
            }
        } else if members.contains_key(EXPIRES_AT) {
            let todo = "put it into the payload as well, and sign that".to_owned();
            self.note(EXPIRES_AT, None, None, "ignored: it is not signed", Some(todo));
        }
    }

    fn signature(&mut self, payload: &str, signature: &str, signer: &Signer) {
        match signer {
            Signer::Malformed(detail) => {
                self.wrong(
                    "signature form",
                    Reason::MalformedSignature,
                    detail.clone(),
                    form(signature),
                );
                let todo = "mend the signature's form first".to_owned();
                self.note("signing key", None, None, "can not be recovered", Some(todo));
            }
            Signer::Unread | Signer::Unrecoverable => {
                self.good("signature form", "130 hexadecimal digits, low s");
                let todo = "sign again: no key can have made this one";
                self.wrong("signing key", Reason::SignatureMismatch, "can not be recovered", todo);
            }
            Signer::Key(key) => {
                self.good("signature form", "130 hexadecimal digits, low s");
                if self.message.keys.is_empty() {
                    let todo = "compare it with the key that the operator registered, or give --public-key".to_owned();
                    self.note("signing key", None, None, key.to_hex(), Some(todo));
                } else if self.message.keys.contains(key) {
                    self.good("signing key", key.to_hex());
                } else {
                    let todo = why_another(payload, signature, self.message.keys);
                    self.wrong("signing key", Reason::SignatureMismatch, key.to_hex(), todo);
                }
            }
        }
    }
}

fn read(routing_key: &str, body: &[u8], content_type: Option<&str>) -> Facts {
    message::unsigned_facts(&Delivery {
        exchange: String::new(),
        routing_key: routing_key.to_owned(),
        body: body.to_vec(),
        properties: Properties {
            content_type: content_type.map(str::to_owned),
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Plain,
    })
}

fn content(routing_key: &str, body: &[u8]) -> Option<Arc<Content>> {
    read(routing_key, body, None).content.ok()
}

fn object(members: &Members) -> String {
    // Text that was read as JSON a moment ago.
    serde_json::to_string(members).unwrap_or_default()
}

fn bytes(members: &Members) -> Vec<u8> {
    object(members).into_bytes()
}

fn text(members: &Members, name: &str) -> Option<String> {
    serde_json::from_str(members.get(name)?.get()).ok()
}

/// The fields in the order of the documented table.
fn table(kind: Kind) -> [&'static str; 16] {
    [
        kind.id_field(),
        "amount.currency",
        "amount.quantity",
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
    ]
}

/// When it ends; of the payload only.
const EXPIRES_AT: &str = "expiresAt";

fn is_known(name: &str, kind: Kind) -> bool {
    name == "enterpriseId" || name == EXPIRES_AT || name == "amount" || table(kind).contains(&name)
}

fn this_kinds(name: &str, kind: Kind) -> &'static str {
    if name.starts_with("partners") {
        kind.partners_id_field()
    } else {
        kind.id_field()
    }
}

/// A field's text as it stands in the body.
fn value_of(members: &Members, name: &str) -> Option<String> {
    let (outer, inner) = match name.split_once('.') {
        Some((outer, inner)) => (outer, Some(inner)),
        None => (name, None),
    };
    let value = members.get(outer)?.get();
    let Some(inner) = inner else {
        return Some(value.to_owned());
    };
    let members: Members = serde_json::from_str(value).ok()?;
    members.get(inner).map(|value| value.get().to_owned())
}

/// Puts something into a field that the decoder does not complain of.
fn mend(members: &mut Members, name: &str, kind: Kind) {
    const AMOUNT: &str = r#"{"currency":"BTC","quantity":"1"}"#;
    let raw = |text: &str| RawValue::from_string(text.to_owned()).ok();
    if let Some(inner) = name.strip_prefix("amount.") {
        let amount = members
            .get("amount")
            .and_then(|amount| serde_json::from_str::<Members>(amount.get()).ok());
        let good = if inner == "currency" { r#""BTC""# } else { r#""1""# };
        if let (Some(mut amount), Some(good)) = (amount, raw(good)) {
            amount.insert(inner.to_owned(), good);
            members.extend(raw(&object(&amount)).map(|amount| ("amount".to_owned(), amount)));
        }
        return;
    }
    let good = match name {
        "amount" => AMOUNT,
        "status" if members.contains_key("rejectReason") => r#""released""#,
        "status" => r#""cleared""#,
        "rejectReason" if text(members, "status").as_deref() == Some("cleared") => {
            members.remove(name);
            return;
        }
        "policyResult" => r#""approved""#,
        "payload" => r#""{}""#,
        "clientId" | "connectionId" => r#""00000000-0000-4000-8000-000000000000""#,
        _ if name == kind.id_field() => r#""00000000-0000-4000-8000-000000000000""#,
        _ => r#""x""#,
    };
    members.extend(raw(good).map(|good| (name.to_owned(), good)));
}

/// An undocumented key of the payload that the body has not, or has otherwise.
fn stray(signed: &Members, body: &Members, kind: Kind) -> Option<String> {
    let unknown = signed.iter().filter(|(name, _)| !is_known(name, kind));
    let same = |name: &str, value: &RawValue| {
        let read = |value: &RawValue| serde_json::from_str::<serde_json::Value>(value.get()).ok();
        body.get(name).is_some_and(|other| read(other) == read(value))
    };
    let mut stray = unknown.filter(|(name, value)| !same(name, value.as_ref()));
    stray.next().map(|(name, _)| name.clone())
}

fn todo_of(name: &str, why: &str, kind: Kind) -> String {
    let more = match name {
        "amount.quantity" => " (base units as a string of digits, such as \"100000000\")",
        "status" => " (small letters)",
        "payload" => " (the signed text, as a string)",
        _ if why == "is missing" && name == kind.id_field() => " (its name depends on the routing key's kind)",
        _ => "",
    };
    format!("it {why}{more}")
}

/// What to do about a signature of another form.
fn form(signature: &str) -> String {
    let is_hex = signature.bytes().all(|byte| byte.is_ascii_hexdigit());
    let header = signature
        .get(..2)
        .and_then(|header| u8::from_str_radix(header, 16).ok());
    let advice = match (is_hex, signature.len(), header) {
        _ if signature.starts_with("0x") || signature.starts_with("0X") => "leave the 0x out",
        (true, 130, Some(27..=30)) => "add 4 to the header: the key is a compressed one",
        (true, 130, Some(31..=34)) => {
            "take the lower of the two values of s: n - s in its place, and 31 for 32 or 32 for 31 in the header"
        }
        (true, 128, _) => "put the header before r and s: 1f for recovery id 0, 20 for 1",
        (true, 134..=146, Some(0x30)) => "this looks like DER: make the compact form, header, r and s of 32 bytes each",
        (true, ..) => "send 130 hexadecimal digits: header (31 or 32), r and s of 32 bytes each",
        (false, 88, _) => "this looks like base64: decode it, and write the 65 bytes in hexadecimal",
        (false, ..) => "send 130 hexadecimal digits and nothing else",
    };
    advice.to_owned()
}

/// Why a signature may have been made by no key of theirs: what was signed instead, if it is one of the usual slips.
fn why_another(payload: &str, signature: &str, keys: &[PublicKey]) -> String {
    let theirs = |text: &str, signature: &str| signer(text, signature).key().is_some_and(|key| keys.contains(&key));
    for header in ["1f", "20", "21", "22"] {
        let other = format!("{header}{}", signature.get(2..).unwrap_or_default());
        if theirs(payload, &other) {
            return format!("the header is wrong, the rest is right: it must be {header}");
        }
    }
    let compact = serde_json::from_str::<serde_json::Value>(payload).ok();
    let spaced = compact
        .as_ref()
        .and_then(|value| serde_json::to_string_pretty(value).ok());
    let tight = compact.as_ref().map(ToString::to_string);
    let variants = [
        ("the payload with a line's end behind it", Some(format!("{payload}\n"))),
        (
            "the payload without the white space around it",
            Some(payload.trim().to_owned()),
        ),
        ("the same object written with other white space or order", tight),
        ("the same object written with other white space or order", spaced),
        (
            "the payload's SHA-256 in hexadecimal",
            Some(hex::encode(sha256(payload))),
        ),
        (
            "the payload as a JSON string, quotes and all",
            serde_json::to_string(payload).ok(),
        ),
    ];
    for (what, text) in variants {
        if text.is_some_and(|text| theirs(&text, signature)) {
            return format!("it was made over {what}: sign the very text that stands in payload");
        }
    }
    "sign exactly the text of payload with a key that is registered, or have this key registered".to_owned()
}

fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests;

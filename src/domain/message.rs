//! Bytes to facts: size, shape, fields, what was signed and by whom. Needs no registry.
//!
//! Also the partner's side of it: [`payload_text`] and [`body_text`] write what [`facts`] reads.

use std::sync::Arc;

use serde::{Serialize, Serializer, ser::SerializeMap};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    allocation::{Kind, PolicyResult},
    decide::{Reason, ReceiptKey},
    delivery::{Cut, Delivery, HEAD_MAX, Headers, Properties},
    json::{Json, Object},
    ledger::{Amount, Quantity, is_currency},
    signature::{Signer, signer},
};

/// The largest body, in bytes.
pub const BODY_MAX: usize = 262_144;
/// The largest property list with headers, in bytes on the wire.
pub const PROPERTIES_MAX: usize = 16_384;

/// The header with a message's place in a trace (W3C Trace Context).
pub const TRACEPARENT: &str = "traceparent";
/// Longer than any of version 00, in bytes.
const TRACE_MAX: usize = 64;
/// The longest enterprise id, in bytes.
const ENTERPRISE_ID_MAX: usize = 64;
/// The longest nonce, in UTF-8 bytes.
const NONCE_MAX: usize = 256;
/// The longest external identifier, in UTF-8 bytes.
const EXTERNAL_ID_MAX: usize = 1024;
/// The longest reject reason, in UTF-8 bytes.
const REJECT_REASON_MAX: usize = 16_384;

/// The partner's message, decoded from the body. Not yet anybody's word: see [`super::signature::Verified`].
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The partner's enterprise, from the routing key.
    pub enterprise_id: String,
    pub kind: Kind,
    /// `allocationId` or `deallocationId`.
    pub id: Uuid,
    pub amount: Amount,
    pub client_id: Uuid,
    pub connection_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    /// `partnersAllocationId` or `partnersDeallocationId`.
    pub partners_id: String,
    pub outcome: Outcome,
    pub nonce: String,
    pub evaluation_id: Option<String>,
    pub pending_approval_id: Option<String>,
    pub policy_result: Option<PolicyResult>,
    /// The signed text, as received.
    pub payload: String,
    /// The signature's text, as received.
    pub signature: String,
}

/// What the partner says became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Cleared,
    Released { reject_reason: String },
}

impl Outcome {
    /// The `status` that says it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Outcome::Cleared => "cleared",
            Outcome::Released { .. } => "released",
        }
    }

    /// The `rejectReason`, where there is one.
    pub fn reject_reason(&self) -> Option<&str> {
        match self {
            Outcome::Cleared => None,
            Outcome::Released { reject_reason } => Some(reject_reason),
        }
    }
}

/// All that a message tells by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// SHA-256 of the body.
    pub message_digest: [u8; 32],
    /// The enterprise in the routing key, where the key has the documented form.
    pub enterprise_id: Option<String>,
    /// The first of steps 1 to 3 that fails, or the content.
    pub content: Result<Arc<Content>, Refusal>,
}

/// A message whose body decoded, and what its signature and payload say.
#[derive(Clone, Debug, PartialEq)]
pub struct Content {
    pub update: Update,
    /// Of the nonce that it says.
    pub key: ReceiptKey,
    /// Of the nonce that is signed, where there is one.
    pub signed_key: Option<ReceiptKey>,
    /// SHA-256 of the payload's UTF-8 bytes.
    pub payload_digest: [u8; 32],
    /// The `nonce` in the signed text, where it is an object with such a string: the identity of what was signed.
    pub signed_nonce: Option<String>,
    /// The `allocationId` and the `deallocationId` in the signed text, where there are such: either may be what it settled,
    /// also if the message now comes under the other kind's routing key.
    pub signed_ids: Vec<Uuid>,
    /// Who signed it, as far as the text and the curve tell.
    pub signer: Signer,
    /// Whether the signed text agrees with the body; `Err` is the detail.
    pub agreement: Result<(), String>,
}

/// A refusal that needs no registry. Nothing of the body is known then: neither its allocation nor its nonce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    /// A sentence for the partner; at most 512 bytes, never echoes the body.
    pub detail: String,
}

impl Refusal {
    fn malformed(detail: impl Into<String>) -> Self {
        Self {
            reason: Reason::MalformedMessage,
            detail: detail.into(),
        }
    }
}

/// The SHA-256 of bytes.
pub fn sha256(bytes: impl AsRef<[u8]>) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Whether text is an enterprise's id: `[A-Za-z0-9][A-Za-z0-9_-]{0,63}`.
pub fn is_enterprise_id(text: &str) -> bool {
    text.len() <= ENTERPRISE_ID_MAX
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

/// The routing key of an enterprise's updates.
pub fn routing_key(enterprise_id: &str, kind: Kind) -> String {
    format!("{enterprise_id}.{}.update", kind.as_str())
}

/// Reads `<enterpriseId>.allocation.update` or `<enterpriseId>.deallocation.update`.
pub fn parse_routing_key(text: &str) -> Option<(&str, Kind)> {
    let (enterprise_id, rest) = text.split_once('.')?;
    let kind = Kind::parse(rest.strip_suffix(".update")?)?;
    is_enterprise_id(enterprise_id).then_some((enterprise_id, kind))
}

/// Reads a UUID of exactly 36 characters, 8-4-4-4-12, in any letter case.
pub fn parse_uuid(text: &str) -> Option<Uuid> {
    // The crate also reads 32 digits, braces and URNs; of 36 characters only this form is left.
    if text.len() != 36 {
        return None;
    }
    Uuid::try_parse(text).ok()
}

/// Everything a message tells by itself: steps 1 to 3 of the table of reasons, who signed the payload, and whether it
/// agrees with the body.
pub fn facts(delivery: &Delivery) -> Facts {
    read(delivery, signer)
}

/// The same without who signed, which is most of the work: for what is only kept, and judged when it is replayed.
pub fn unsigned_facts(delivery: &Delivery) -> Facts {
    read(delivery, |_, _| Signer::Unread)
}

fn read(delivery: &Delivery, signer: fn(&str, &str) -> Signer) -> Facts {
    let addressed = parse_routing_key(&delivery.routing_key);
    Facts {
        message_digest: delivery
            .cut
            .as_ref()
            .map_or_else(|| sha256(&delivery.body), |cut| cut.digest),
        enterprise_id: addressed.map(|(enterprise_id, _)| enterprise_id.to_owned()),
        content: content(delivery, addressed, signer).map(Arc::new),
    }
}

fn content(
    delivery: &Delivery,
    addressed: Option<(&str, Kind)>,
    signer: fn(&str, &str) -> Signer,
) -> Result<Content, Refusal> {
    check_size(delivery)?;
    if delivery.properties.undecodable.is_some() {
        return Err(Refusal::malformed(
            "its properties can not be decoded: check that every property and header is what AMQP 0-9-1 says, text as UTF-8",
        ));
    }
    let (enterprise_id, kind) = addressed.ok_or_else(|| {
        Refusal::malformed(
            "the routing key must be <enterpriseId>.allocation.update or <enterpriseId>.deallocation.update",
        )
    })?;
    check_content_type(&delivery.properties)?;
    let body = Json::from_bytes(&delivery.body).map_err(|error| Refusal::malformed(format!("the body {error}")))?;
    let body = body
        .as_object()
        .ok_or_else(|| Refusal::malformed("the body is not a JSON object"))?;
    let update = decode(body, enterprise_id, kind).map_err(|detail| Refusal {
        reason: Reason::InvalidField,
        detail,
    })?;
    let signed = Signed::read(body, &update);
    let key = ReceiptKey::new(enterprise_id, &update.nonce);
    Ok(Content {
        key,
        signed_key: signed.nonce.as_deref().map(|nonce| {
            // Nearly always the same.
            if nonce == update.nonce {
                key
            } else {
                ReceiptKey::new(enterprise_id, nonce)
            }
        }),
        payload_digest: sha256(&update.payload),
        signed_nonce: signed.nonce,
        signed_ids: signed.ids,
        signer: signer(&update.payload, &update.signature),
        agreement: signed.agreement,
        update,
    })
}

/// Step 1.
fn check_size(delivery: &Delivery) -> Result<(), Refusal> {
    let too_large = |detail: String| Refusal {
        reason: Reason::MessageTooLarge,
        detail,
    };
    // What is left of it may well be within the limits.
    if let Some(cut) = &delivery.cut {
        return Err(too_large(cut.detail.clone()));
    }
    let body = delivery.body.len();
    if body > BODY_MAX {
        return Err(too_large(format!(
            "the body has {body} bytes, at most {BODY_MAX} are allowed"
        )));
    }
    let properties = delivery.properties.wire_len();
    if properties > PROPERTIES_MAX {
        return Err(too_large(format!(
            "properties and headers have {properties} bytes, at most {PROPERTIES_MAX} are allowed"
        )));
    }
    Ok(())
}

/// Leaves of a message that is too large what is kept of it. Nothing else of it is asked for once its facts are read, and
/// everything that follows (copies, the outbox, the dead letter) is bounded by it.
pub fn shorten(delivery: &mut Delivery, facts: &Facts) {
    let Err(Refusal {
        reason: Reason::MessageTooLarge,
        detail,
    }) = &facts.content
    else {
        return;
    };
    if delivery.cut.is_some() {
        return;
    }
    let without_headers = delivery.properties.wire_len() > PROPERTIES_MAX;
    delivery.cut = Some(Box::new(Cut {
        body_len: delivery.body_len(),
        digest: facts.message_digest,
        detail: detail.clone(),
        without_headers,
    }));
    delivery.body.truncate(HEAD_MAX);
    delivery.body.shrink_to_fit();
    if without_headers {
        delivery.properties.undecodable = None;
        // Its event is told in the trace that it came in.
        let headers = delivery.properties.headers.take().unwrap_or_default();
        let trace: Headers = headers
            .into_iter()
            .filter(|(name, value)| name == TRACEPARENT && value.as_text().is_some_and(|text| text.len() <= TRACE_MAX))
            .collect();
        delivery.properties.headers = (!trace.is_empty()).then_some(trace);
    }
}

/// The part of step 2 that stands in the properties.
fn check_content_type(properties: &Properties) -> Result<(), Refusal> {
    if !properties.content_type.as_deref().is_none_or(is_json_content_type) {
        return Err(Refusal::malformed(
            "content_type must be application/json, with no charset but utf-8",
        ));
    }
    let encoding = properties.content_encoding.as_deref().unwrap_or_default();
    // Several client libraries write the character set here, unasked.
    if !encoding.is_empty() && encoding != "identity" && !encoding.eq_ignore_ascii_case("utf-8") {
        return Err(Refusal::malformed(
            "content_encoding must be absent, empty, identity or utf-8",
        ));
    }
    Ok(())
}

fn is_json_content_type(text: &str) -> bool {
    let white = [' ', '\t'];
    let (media, parameter) = match text.split_once(';') {
        Some((media, parameter)) => (media.trim_end_matches(white), Some(parameter.trim_matches(white))),
        None => (text, None),
    };
    let media_ok = media.eq_ignore_ascii_case("application/json");
    let parameter_ok = parameter.is_none_or(|parameter| {
        parameter.eq_ignore_ascii_case("charset=utf-8") || parameter.eq_ignore_ascii_case("charset=\"utf-8\"")
    });
    text.is_empty() || (media_ok && parameter_ok)
}

/// Step 3: the fields in the order of the documented table; the first that breaks its rule is named.
fn decode(body: &Object<'_>, enterprise_id: &str, kind: Kind) -> Result<Update, String> {
    let id = Field::required(body, kind.id_field())?.uuid()?;
    let amount = Field::required(body, "amount")?.amount()?;
    let client_id = Field::required(body, "clientId")?.uuid()?;
    let connection_id = Field::required(body, "connectionId")?.uuid()?;
    let partners_client_id = Field::required(body, "partnersClientId")?.bounded(EXTERNAL_ID_MAX)?;
    let partners_connection_id = Field::required(body, "partnersConnectionId")?.bounded(EXTERNAL_ID_MAX)?;
    let partners_id = Field::required(body, kind.partners_id_field())?.bounded(EXTERNAL_ID_MAX)?;
    let status = Field::required(body, "status")?;
    let released = match status.text()? {
        "cleared" => false,
        "released" => true,
        _ => return Err(status.says("must be cleared or released")),
    };
    let nonce = Field::required(body, "nonce")?.bounded(NONCE_MAX)?;
    let outcome = if released {
        Outcome::Released {
            reject_reason: Field::required(body, "rejectReason")?.bounded(REJECT_REASON_MAX)?,
        }
    } else if let Some(field) = Field::optional(body, "rejectReason") {
        return Err(field.says("must be absent when the status is cleared"));
    } else {
        Outcome::Cleared
    };
    let evaluation_id = Field::optional(body, "evaluationId")
        .map(|field| field.bounded(EXTERNAL_ID_MAX))
        .transpose()?;
    let pending_approval_id = Field::optional(body, "pendingApprovalId")
        .map(|field| field.bounded(EXTERNAL_ID_MAX))
        .transpose()?;
    let policy_result = Field::optional(body, "policyResult")
        .map(|field| field.policy_result())
        .transpose()?;
    let payload = Field::required(body, "payload")?;
    let payload_text = payload.text()?;
    if payload_text.is_empty() {
        return Err(payload.says("must not be empty"));
    }
    let signature = Field::required(body, "signature")?.text()?;
    Ok(Update {
        enterprise_id: enterprise_id.to_owned(),
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
        payload: payload_text.to_owned(),
        signature: signature.to_owned(),
    })
}

/// One field of the table under its full name.
#[derive(Clone, Copy)]
struct Field<'j, 'a> {
    name: &'static str,
    value: &'j Json<'a>,
}

impl<'j, 'a> Field<'j, 'a> {
    fn required(object: &'j Object<'a>, name: &'static str) -> Result<Self, String> {
        Self::optional(object, name).ok_or_else(|| format!("{name}: is missing"))
    }

    /// `null` is a value of the wrong type, never absence.
    fn optional(object: &'j Object<'a>, name: &'static str) -> Option<Self> {
        object.get(name).map(|value| Self { name, value })
    }

    fn says(&self, sentence: &str) -> String {
        format!("{}: {sentence}", self.name)
    }

    /// A string that PostgreSQL can store.
    fn text(&self) -> Result<&'j str, String> {
        let text = self.value.as_str().ok_or_else(|| self.says("must be a string"))?;
        if text.contains('\0') {
            return Err(self.says("must not contain U+0000"));
        }
        Ok(text)
    }

    fn bounded(&self, max: usize) -> Result<String, String> {
        let text = self.text()?;
        if text.is_empty() || text.len() > max {
            return Err(self.says(&format!("must be 1 to {max} bytes")));
        }
        Ok(text.to_owned())
    }

    fn uuid(&self) -> Result<Uuid, String> {
        parse_uuid(self.text()?).ok_or_else(|| self.says("must be a UUID of 36 characters, 8-4-4-4-12"))
    }

    fn policy_result(&self) -> Result<PolicyResult, String> {
        PolicyResult::parse(self.text()?).ok_or_else(|| self.says("must be approved or rejected"))
    }

    fn amount(&self) -> Result<Amount, String> {
        let object = self.value.as_object().ok_or_else(|| self.says("must be an object"))?;
        let member = |key: &str, name: &'static str| {
            object
                .get(key)
                .map(|value| Field { name, value })
                .ok_or_else(|| format!("{name}: is missing"))
        };
        let currency = member("currency", "amount.currency")?;
        let currency_text = currency.text()?;
        if !is_currency(currency_text) {
            return Err(currency.says("must be 1 to 64 bytes of [A-Za-z0-9:._-]"));
        }
        let quantity = member("quantity", "amount.quantity")?;
        let quantity_value = Quantity::parse(quantity.text()?).map_err(|sentence| quantity.says(sentence))?;
        Ok(Amount {
            currency: currency_text.to_owned(),
            quantity: quantity_value,
        })
    }
}

/// What the signed text says.
struct Signed {
    nonce: Option<String>,
    ids: Vec<Uuid>,
    agreement: Result<(), String>,
}

impl Signed {
    fn read(body: &Object<'_>, update: &Update) -> Self {
        let unread = |detail: String| Self {
            nonce: None,
            ids: Vec::new(),
            agreement: Err(detail),
        };
        let payload = match Json::from_text(&update.payload) {
            Ok(payload) => payload,
            Err(error) => return unread(format!("the payload {error}")),
        };
        let Some(payload) = payload.as_object() else {
            return unread("the payload is not a JSON object".to_owned());
        };
        Self {
            nonce: Field::optional(payload, "nonce").and_then(|field| field.bounded(NONCE_MAX).ok()),
            ids: [Kind::Allocation, Kind::Deallocation]
                .into_iter()
                .filter_map(|kind| Field::optional(payload, kind.id_field()))
                .filter_map(|field| field.uuid().ok())
                .collect(),
            agreement: agree(payload, body, update),
        }
    }
}

/// How two values of a named field are compared.
#[derive(Clone, Copy)]
enum Equality {
    Json,
    Uuid,
    PolicyResult,
}

impl Equality {
    fn holds(self, left: &Json<'_>, right: &Json<'_>) -> bool {
        /// Equal, and both of them readable.
        fn as_read<T: PartialEq>(left: &Json<'_>, right: &Json<'_>, read: fn(&str) -> Option<T>) -> bool {
            let left = left.as_str().and_then(read);
            left.is_some() && left == right.as_str().and_then(read)
        }
        match self {
            Equality::Json => left == right,
            Equality::Uuid => as_read(left, right, parse_uuid),
            Equality::PolicyResult => as_read(left, right, PolicyResult::parse),
        }
    }
}

/// Step 8: whether the signed text says what the body says. The body has passed step 3, so a field that it lacks is an
/// optional one, or a `rejectReason` without a release.
fn agree(payload: &Object<'_>, body: &Object<'_>, update: &Update) -> Result<(), String> {
    let always = [
        (update.kind.id_field(), Equality::Uuid),
        ("amount", Equality::Json),
        ("clientId", Equality::Uuid),
        ("connectionId", Equality::Uuid),
        ("partnersClientId", Equality::Json),
        ("partnersConnectionId", Equality::Json),
        (update.kind.partners_id_field(), Equality::Json),
        ("status", Equality::Json),
        ("nonce", Equality::Json),
        ("rejectReason", Equality::Json),
    ];
    let where_signed = [
        ("evaluationId", Equality::Json),
        ("pendingApprovalId", Equality::Json),
        ("policyResult", Equality::PolicyResult),
    ];
    let must = always.iter().map(|field| (field, true));
    let may = where_signed.iter().map(|field| (field, false));
    for ((name, equality), must_be_signed) in must.chain(may) {
        match (payload.get(name), body.get(name)) {
            (Some(signed), Some(said)) if equality.holds(signed, said) => {}
            (Some(_), Some(_)) => return Err(format!("{name}: differs between the payload and the body")),
            (Some(_), None) => return Err(format!("{name}: is in the payload, but not in the body")),
            (None, Some(_)) if must_be_signed => return Err(format!("{name}: is in the body, but not in the payload")),
            (None, Some(_) | None) => {}
        }
    }
    for (key, signed) in payload.iter() {
        // Nearly always the first, which is the least work.
        let is_covered = body.get(key) == Some(signed)
            || always.iter().chain(&where_signed).any(|(name, _)| *name == key)
            || (key == "enterpriseId" && signed.as_str() == Some(&update.enterprise_id));
        if !is_covered {
            return Err(if key == "enterpriseId" {
                "enterpriseId: differs between the payload and the routing key".to_owned()
            } else {
                // Its name is the partner's own text and is not echoed.
                "an undocumented key of the payload is not in the body, or has another value there".to_owned()
            });
        }
    }
    Ok(())
}

/// What a partner is about to say: an [`Update`] that is not signed yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    pub enterprise_id: String,
    pub kind: Kind,
    pub id: Uuid,
    pub amount: Amount,
    pub client_id: Uuid,
    pub connection_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    pub partners_id: String,
    pub outcome: Outcome,
    pub nonce: String,
    pub evaluation_id: Option<String>,
    pub pending_approval_id: Option<String>,
    pub policy_result: Option<PolicyResult>,
}

/// The text that a partner signs: the documented fields in the documented order, without the policy's.
pub fn payload_text(draft: &Draft) -> String {
    to_text(&Written { draft, signed: None })
}

/// The body that a partner publishes: every field, the payload and its signature.
pub fn body_text(draft: &Draft, payload: &str, signature: &str) -> String {
    to_text(&Written {
        draft,
        signed: Some((payload, signature)),
    })
}

fn to_text(written: &Written<'_>) -> String {
    // Strings into memory: there is nothing in it that could fail.
    serde_json::to_string(written).unwrap_or_default()
}

/// A draft as JSON; with payload and signature the whole body.
struct Written<'a> {
    draft: &'a Draft,
    signed: Option<(&'a str, &'a str)>,
}

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let draft = self.draft;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("status", draft.outcome.as_str())?;
        if let Some(reject_reason) = draft.outcome.reject_reason() {
            map.serialize_entry("rejectReason", reject_reason)?;
        }
        map.serialize_entry(draft.kind.id_field(), &draft.id)?;
        map.serialize_entry("amount", &draft.amount)?;
        map.serialize_entry("clientId", &draft.client_id)?;
        map.serialize_entry("connectionId", &draft.connection_id)?;
        map.serialize_entry("partnersClientId", &draft.partners_client_id)?;
        map.serialize_entry("partnersConnectionId", &draft.partners_connection_id)?;
        map.serialize_entry(draft.kind.partners_id_field(), &draft.partners_id)?;
        map.serialize_entry("nonce", &draft.nonce)?;
        if let Some((payload, signature)) = self.signed {
            if let Some(evaluation_id) = &draft.evaluation_id {
                map.serialize_entry("evaluationId", evaluation_id)?;
            }
            if let Some(pending_approval_id) = &draft.pending_approval_id {
                map.serialize_entry("pendingApprovalId", pending_approval_id)?;
            }
            if let Some(policy_result) = &draft.policy_result {
                map.serialize_entry("policyResult", policy_result)?;
            }
            map.serialize_entry("payload", payload)?;
            map.serialize_entry("signature", signature)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        delivery::{HeaderValue, Source},
        signature::SigningKey,
    };

    const KEY: &str = "acme.allocation.update";
    const ID: &str = "10764cd8-59b5-422a-93a6-681bae7e84bd";
    const OTHER_ID: &str = "10764cd8-59b5-422a-93a6-681bae7e84be";

    fn uuid(text: &str) -> Uuid {
        parse_uuid(text).expect("a UUID")
    }

    fn draft(kind: Kind, outcome: Outcome) -> Draft {
        Draft {
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
        }
    }

    fn cleared() -> Draft {
        draft(Kind::Allocation, Outcome::Cleared)
    }

    fn released() -> Draft {
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
        fn payload(draft: &Draft) -> Self {
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
        let policy = |mut draft: Draft| {
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
            let Draft {
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
                    payload,
                    signature,
                },
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
            serde_json::from_str(include_str!("../../tests/data/signatures.json")).expect("the vectors are JSON");
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

    /// Whether a body and this payload agree; `ok`, or the detail.
    fn agreement(body: &Members, payload: &str) -> String {
        let content = content_of(KEY, body.clone().signed(payload));
        assert_eq!(content.signer, Signer::Key(signing_key().public_key()));
        assert_eq!(content.update.payload, payload);
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

    /// A signed body with one byte changed.
    fn damaged(draft: &Draft, at: prop::sample::Index, byte: u8) -> Vec<u8> {
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
                Arc::make_mut(content).signer = Signer::Unread;
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
}

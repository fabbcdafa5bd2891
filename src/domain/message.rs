//! Bytes to facts: size, shape, fields, what was signed and by whom. Needs no registry.
//!
//! Also the partner's side of it: [`payload_text`] and [`body_text`] write what [`facts`] reads.

use serde::{Serialize, Serializer, ser::SerializeMap};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    allocation::{Kind, PolicyResult},
    decide::Reason,
    delivery::{Delivery, Properties},
    json::{Json, Object},
    ledger::{Amount, Quantity, is_currency},
    signature::{Signer, signer},
};

/// The largest body, in bytes.
pub const BODY_MAX: usize = 262_144;
/// The largest property list with headers, in bytes on the wire.
pub const PROPERTIES_MAX: usize = 16_384;

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
    pub content: Result<Box<Content>, Refusal>,
}

/// A message whose body decoded, and what its signature and payload say.
#[derive(Clone, Debug, PartialEq)]
pub struct Content {
    pub update: Update,
    /// SHA-256 of the payload's UTF-8 bytes.
    pub payload_digest: [u8; 32],
    /// The `nonce` in the signed text, where it is an object with such a string: the identity of what was signed.
    pub signed_nonce: Option<String>,
    /// The `allocationId` (`deallocationId`) in the signed text, where there is one.
    pub signed_id: Option<Uuid>,
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
    let addressed = parse_routing_key(&delivery.routing_key);
    Facts {
        message_digest: sha256(&delivery.body),
        enterprise_id: addressed.map(|(enterprise_id, _)| enterprise_id.to_owned()),
        content: content(delivery, addressed).map(Box::new),
    }
}

fn content(delivery: &Delivery, addressed: Option<(&str, Kind)>) -> Result<Content, Refusal> {
    check_size(delivery)?;
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
    Ok(Content {
        payload_digest: sha256(&update.payload),
        signed_nonce: signed.nonce,
        signed_id: signed.id,
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

/// The part of step 2 that stands in the properties.
fn check_content_type(properties: &Properties) -> Result<(), Refusal> {
    if !properties.content_type.as_deref().is_none_or(is_json_content_type) {
        return Err(Refusal::malformed(
            "content_type must be application/json, with no charset but utf-8",
        ));
    }
    let encoding = properties.content_encoding.as_deref().unwrap_or_default();
    if !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity") {
        return Err(Refusal::malformed("content_encoding must be absent, empty or identity"));
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
    id: Option<Uuid>,
    agreement: Result<(), String>,
}

impl Signed {
    fn read(body: &Object<'_>, update: &Update) -> Self {
        let unread = |detail: String| Self {
            nonce: None,
            id: None,
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
            id: Field::optional(payload, update.kind.id_field()).and_then(|field| field.uuid().ok()),
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
    for (name, equality) in always.iter().chain(&where_signed) {
        let must_be_signed = always.iter().any(|(other, _)| other == name);
        match (payload.get(name), body.get(name)) {
            (Some(signed), Some(said)) if equality.holds(signed, said) => {}
            (Some(_), Some(_)) => return Err(format!("{name}: differs between the payload and the body")),
            (Some(_), None) => return Err(format!("{name}: is in the payload, but not in the body")),
            (None, Some(_)) if must_be_signed => return Err(format!("{name}: is in the body, but not in the payload")),
            (None, Some(_) | None) => {}
        }
    }
    for (key, signed) in payload.iter() {
        let named = always.iter().chain(&where_signed).any(|(name, _)| *name == key);
        let said = body.get(key) == Some(signed);
        let addressed = key == "enterpriseId" && signed.as_str() == Some(&update.enterprise_id);
        if !(named || said || addressed) {
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

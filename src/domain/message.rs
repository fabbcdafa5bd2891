//! Bytes to facts: size, shape, fields, what was signed and by whom. Needs no registry.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    address::parse_routing_key,
    agreement::Signed,
    allocation::Kind,
    delivery::{Cut, Delivery, HEAD_MAX, Headers, PROPERTIES_MAX, Properties},
    digest::sha256,
    json::Json,
    names::{content_type, header},
    reason::Reason,
    receipt::ReceiptKey,
    signature::{Signer, signer_and_bytes},
    trace::TRACE_MAX,
    update::{DecodedBody, Update, decode},
};

/// The largest body, in bytes.
pub const BODY_MAX: usize = 262_144;

/// A message with what it tells by itself, not judged yet. They stay together, so that nobody has to count which belongs to
/// which.
#[derive(Clone, Debug)]
pub struct Message {
    pub delivery: Delivery,
    pub facts: Facts,
}

impl Message {
    pub fn by_ref(&self) -> MessageRef<'_> {
        MessageRef {
            delivery: &self.delivery,
            facts: &self.facts,
        }
    }
}

/// A [`Message`] of somebody else's.
#[derive(Clone, Copy, Debug)]
pub struct MessageRef<'a> {
    pub delivery: &'a Delivery,
    pub facts: &'a Facts,
}

/// All that a message tells by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// SHA-256 of the body.
    pub message_digest: [u8; 32],
    /// The enterprise in the routing key, where the key has the documented form.
    pub enterprise_id: Option<String>,
    /// The first of steps 1 to 3 that fails, or the content.
    pub content: Result<Arc<Content>, EarlyRefusal>,
}

/// A message whose body decoded, and what its signature and payload say.
#[derive(Clone, Debug, PartialEq)]
pub struct Content {
    pub update: Update,
    /// The signed text, as received.
    pub payload: String,
    /// The signature's bytes, where it is well-formed and was read.
    pub signature: Option<[u8; 65]>,
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

impl Content {
    /// The receipts that a message may touch: of the nonce that it says, and of the one that is signed.
    pub fn receipt_keys(&self) -> impl Iterator<Item = ReceiptKey> + use<> {
        [Some(self.key), self.signed_key].into_iter().flatten()
    }
}

/// A refusal that needs no registry. Nothing of the body is known then: neither its allocation nor its nonce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EarlyRefusal {
    pub reason: Reason,
    /// A sentence for the partner; at most 512 bytes, never echoes the body.
    pub detail: String,
}

impl EarlyRefusal {
    fn malformed(detail: impl Into<String>) -> Self {
        Self {
            reason: Reason::MalformedMessage,
            detail: detail.into(),
        }
    }
}

/// Everything a message tells by itself: steps 1 to 3 of the table of reasons, who signed the payload, and whether it
/// agrees with the body.
pub fn facts(delivery: &Delivery) -> Facts {
    read(delivery, signer_and_bytes)
}

/// The same without who signed, which is most of the work: for what is only kept, and judged when it is replayed.
pub fn unsigned_facts(delivery: &Delivery) -> Facts {
    read(delivery, |_, _| (Signer::Unread, None))
}

/// Reads a signature by its payload and its text: whose it is, and its bytes.
type ReadSignature = fn(&str, &str) -> (Signer, Option<[u8; 65]>);

fn read(delivery: &Delivery, read_signature: ReadSignature) -> Facts {
    let addressed = parse_routing_key(&delivery.routing_key);
    Facts {
        message_digest: delivery.digest(),
        enterprise_id: addressed.map(|(enterprise_id, _)| enterprise_id.to_owned()),
        content: content(delivery, addressed, read_signature).map(Arc::new),
    }
}

fn content(
    delivery: &Delivery,
    addressed: Option<(&str, Kind)>,
    read_signature: ReadSignature,
) -> Result<Content, EarlyRefusal> {
    check_size(delivery)?;
    if delivery.properties.undecodable.is_some() {
        return Err(EarlyRefusal::malformed(
            "its properties can not be decoded: check that every property and header is what AMQP 0-9-1 says, text as UTF-8",
        ));
    }
    let (enterprise_id, kind) = addressed.ok_or_else(|| {
        EarlyRefusal::malformed(
            "the routing key must be <enterpriseId>.allocation.update or <enterpriseId>.deallocation.update",
        )
    })?;
    check_content_type(&delivery.properties)?;
    let body =
        Json::from_bytes(&delivery.body).map_err(|error| EarlyRefusal::malformed(format!("the body {error}")))?;
    let body = body
        .as_object()
        .ok_or_else(|| EarlyRefusal::malformed("the body is not a JSON object"))?;
    let decoded = decode(body, enterprise_id, kind).map_err(|detail| EarlyRefusal {
        reason: Reason::InvalidField,
        detail,
    })?;
    let DecodedBody {
        mut update,
        payload,
        signature,
    } = decoded;
    let signed = Signed::read(body, &update, &payload);
    update.expires_at = signed.expires_at;
    let key = ReceiptKey::new(enterprise_id, &update.nonce);
    let (signer, signature) = read_signature(&payload, &signature);
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
        payload_digest: sha256(&payload),
        signed_nonce: signed.nonce,
        signed_ids: signed.ids,
        signer,
        agreement: signed.agreement,
        update,
        payload,
        signature,
    })
}

/// Step 1.
fn check_size(delivery: &Delivery) -> Result<(), EarlyRefusal> {
    let too_large = |detail: String| EarlyRefusal {
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
    let properties = delivery.properties.sent_wire_len();
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
    let Err(EarlyRefusal {
        reason: Reason::MessageTooLarge,
        detail,
    }) = &facts.content
    else {
        return;
    };
    if delivery.cut.is_some() {
        return;
    }
    let without_headers = delivery.properties.sent_wire_len() > PROPERTIES_MAX;
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
            .filter(|(name, value)| {
                name == header::TRACEPARENT && value.as_text().is_some_and(|text| text.len() <= TRACE_MAX)
            })
            .collect();
        delivery.properties.headers = (!trace.is_empty()).then_some(trace);
    }
}

/// The part of step 2 that stands in the properties.
fn check_content_type(properties: &Properties) -> Result<(), EarlyRefusal> {
    if !properties.content_type.as_deref().is_none_or(is_json_content_type) {
        return Err(EarlyRefusal::malformed(
            "content_type must be application/json, with no charset but utf-8",
        ));
    }
    let encoding = properties.content_encoding.as_deref().unwrap_or_default();
    // Several client libraries write the character set here, unasked.
    if !encoding.is_empty() && encoding != "identity" && !encoding.eq_ignore_ascii_case("utf-8") {
        return Err(EarlyRefusal::malformed(
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
    let media_ok = media.eq_ignore_ascii_case(content_type::JSON);
    let parameter_ok = parameter.is_none_or(|parameter| {
        parameter.eq_ignore_ascii_case("charset=utf-8") || parameter.eq_ignore_ascii_case("charset=\"utf-8\"")
    });
    text.is_empty() || (media_ok && parameter_ok)
}

#[cfg(test)]
mod tests;

//! Verdict to words: the CloudEvent, the dead letter and the reply of one message; and how a batch's events are put into
//! messages.

use std::collections::{BTreeSet, HashMap};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{
    allocation::{Allocation, Kind, PolicyResult, Status},
    carried, dead_letter,
    decide::{Judged, Judgement, Reason, Rules, Verdict, VerdictKind},
    delivery::{HeaderValue, Headers, Properties, Publication, PublicationKind},
    ledger::Amount,
    message::TRACEPARENT,
    told::{First, Firsts, ReplyTo},
    wire,
};

/// Where outcome events are published.
pub const EVENTS_EXCHANGE: &str = "settlement.events";
/// Where dead letters are published.
pub const DEAD_EXCHANGE: &str = "settlement.dead";
/// Where those are published that can not be stored.
pub const UNREADABLE_EXCHANGE: &str = "settlement.unreadable";
/// The namespace of event ids.
const NAMESPACE: Uuid = Uuid::from_u128(0x6f1d_0c52_0e0b_5c7e_9a53_3c1c_8a2d_7f10);
const CONTENT_TYPE: &str = "application/cloudevents+json";
/// A JSON array of events.
const BATCH_CONTENT_TYPE: &str = "application/cloudevents-batch+json";
/// How many events an array holds: what it stands for is counted without reading it.
const EVENTS_HEADER: &str = "settled-events";

/// How the events of a batch are put into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Each is a message of its own.
    Single,
    /// Those under one routing key are one message, a JSON array of at most so many bytes. An event that is larger than
    /// that is alone in its array.
    Batched { max_bytes: usize },
}

/// RFC 3339, UTC, milliseconds.
pub fn rfc3339(time: Timestamp) -> String {
    format!("{time:.3}")
}

/// An allocation as the public sees it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AllocationView<'a> {
    id: Uuid,
    amount: &'a Amount,
    connection_id: Uuid,
    client_external_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    partner_external_id: Option<&'a str>,
    initiated_by: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    notes: Option<&'a str>,
    created_at: String,
    updated_at: String,
    retriable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluation_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pending_approval_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy_result: Option<PolicyResult>,
    reason: Option<&'a str>,
    status: Status,
    #[serde(rename = "type")]
    kind: Kind,
}

impl<'a> From<&'a Allocation> for AllocationView<'a> {
    fn from(allocation: &'a Allocation) -> Self {
        Self {
            id: allocation.id,
            amount: &allocation.amount,
            connection_id: allocation.connection_id,
            client_external_id: &allocation.client_external_id,
            partner_external_id: allocation.partner_external_id.as_deref(),
            initiated_by: &allocation.initiated_by,
            notes: allocation.notes.as_deref(),
            created_at: rfc3339(allocation.created_at),
            updated_at: rfc3339(allocation.updated_at),
            retriable: allocation.retriable,
            evaluation_id: allocation.evaluation_id.as_deref(),
            pending_approval_id: allocation.pending_approval_id.as_deref(),
            policy_result: allocation.policy_result,
            reason: allocation.reason.as_deref(),
            status: allocation.status,
            kind: allocation.kind,
        }
    }
}

/// CloudEvents 1.0, JSON format.
#[derive(Serialize)]
struct CloudEvent<'a, D> {
    specversion: &'static str,
    id: Uuid,
    source: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<Uuid>,
    time: String,
    datacontenttype: &'static str,
    data: D,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SettlementData<'a> {
    allocation: AllocationView<'a>,
    enterprise_id: &'a str,
    client_id: Uuid,
    nonce: Option<&'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RefusalData<'a> {
    enterprise_id: Option<&'a str>,
    reason: Reason,
    class: u16,
    #[serde(rename = "final")]
    is_final: bool,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocation_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nonce: Option<&'a str>,
    message_digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    message_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parked_until: Option<String>,
}

/// The type of a settlement's event; none while it is reserved.
fn settlement_type(kind: Kind, status: Status) -> Option<&'static str> {
    match (kind, status) {
        (Kind::Allocation, Status::Cleared) => Some("allocation.cleared"),
        (Kind::Allocation, Status::Released) => Some("allocation.released"),
        (Kind::Deallocation, Status::Cleared) => Some("deallocation.cleared"),
        (Kind::Deallocation, Status::Released) => Some("deallocation.released"),
        (Kind::Allocation | Kind::Deallocation, Status::Reserved) => None,
    }
}

/// The type of the event of a message that waits.
pub const PARKED: &str = "update.parked";
/// The type of the event of a message that is refused.
pub const REJECTED: &str = "update.rejected";

/// The id of the event of an allocation that left `reserved`: the same for every copy.
pub fn settlement_id(allocation: &Allocation) -> Option<Uuid> {
    let kind = settlement_type(allocation.kind, allocation.status)?;
    Some(Uuid::new_v5(&NAMESPACE, format!("{kind}|{}", allocation.id).as_bytes()))
}

fn refusal_id(kind: &str, message: Judged<'_>, reason: Reason) -> Uuid {
    refusal_id_of(
        kind,
        &message.delivery.routing_key,
        &message.facts.message_digest,
        reason,
    )
}

/// The id of the event by which a message is refused or parked, from what is kept of it.
pub fn refusal_id_of(kind: &str, routing_key: &str, message_digest: &[u8; 32], reason: Reason) -> Uuid {
    let name = format!("{kind}|{routing_key}|{}|{reason}", hex::encode(message_digest));
    Uuid::new_v5(&NAMESPACE, name.as_bytes())
}

/// The id of the event that a verdict is told by.
pub fn id_of(
    message: Judged<'_>,
    verdict: VerdictKind,
    reason: Option<Reason>,
    allocation: Option<&Allocation>,
) -> Uuid {
    let settlement = || allocation.and_then(settlement_id).unwrap_or_default();
    match verdict {
        VerdictKind::Settled | VerdictKind::Duplicate => settlement(),
        VerdictKind::Parked => refusal_id(PARKED, message, reason.unwrap_or(Reason::AllocationNotFound)),
        VerdictKind::Rejected => refusal_id(REJECTED, message, reason.unwrap_or(Reason::Internal)),
    }
}

/// Everything that is said about one judged message, in the order it is said, if nobody said anything of it before.
pub fn publications(message: Judged<'_>, judgement: &Judgement, now: Timestamp, rules: &Rules) -> Vec<Publication> {
    publications_after(message, judgement, now, &Firsts::new(), None, rules)
}

/// The same after what was told before: a refusal says what the first of its id said. Who else asked for an answer gets
/// the same one.
pub fn publications_after(
    message: Judged<'_>,
    judgement: &Judgement,
    now: Timestamp,
    firsts: &Firsts,
    also: Option<&ReplyTo>,
    rules: &Rules,
) -> Vec<Publication> {
    let Some((event, publish)) = event_of(message, judgement, now, firsts, rules) else {
        return Vec::new();
    };
    let own = reply_to(message, judgement);
    let also = also
        .filter(|also| judgement.proven && own.as_ref() != Some(also))
        .cloned();
    let replies: Vec<Publication> = [own, also]
        .into_iter()
        .flatten()
        .map(|to| reply_at(to, &event))
        .collect();
    let dead = match &judgement.verdict {
        Verdict::Settled { .. } | Verdict::Duplicate { .. } | Verdict::Parked { .. } => None,
        // It is one already, and its row takes the verdict.
        Verdict::Rejected { .. } if message.delivery.source.dead_letter().is_some() => None,
        Verdict::Rejected { reason, detail } => Some(dead_letter_of(message, *reason, detail, now)),
    };
    [publish.then_some(event), dead]
        .into_iter()
        .flatten()
        .chain(replies)
        .collect()
}

const WAITS: &str = "no allocation of this id is reserved yet; it will be judged again";

/// The id of the event by which a message is refused or parked, and what it says if its id was never told.
pub fn first_words(message: Judged<'_>, verdict: &Verdict, now: Timestamp) -> Option<(Uuid, First)> {
    let first = |at, detail: &str, parked_until| First {
        at,
        detail: detail.into(),
        message_id: message.delivery.properties.message_id.clone(),
        traceparent: traceparent(message).map(str::to_owned),
        parked_until,
    };
    match verdict {
        Verdict::Settled { .. } | Verdict::Duplicate { .. } => None,
        Verdict::Parked { parked_at, until, .. } => Some((
            refusal_id(PARKED, message, Reason::AllocationNotFound),
            first(*parked_at, WAITS, Some(*until)),
        )),
        Verdict::Rejected { reason, detail } => {
            Some((refusal_id(REJECTED, message, *reason), first(now, detail, None)))
        }
    }
}

/// The event of a verdict, and whether it is published (a repeated parking is only replied).
fn event_of(
    message: Judged<'_>,
    judgement: &Judgement,
    now: Timestamp,
    firsts: &Firsts,
    rules: &Rules,
) -> Option<(Publication, bool)> {
    let refusal = |kind, reason| {
        let (id, own) = first_words(message, &judgement.verdict, now)?;
        let first = firsts.get(&id).unwrap_or(&own);
        Some(refusal_event(message, (kind, reason), first, rules))
    };
    Some(match &judgement.verdict {
        Verdict::Settled { allocation } | Verdict::Duplicate { allocation } => {
            (settlement_event(message, allocation, rules)?, true)
        }
        Verdict::Parked { again, .. } => (refusal(PARKED, Reason::AllocationNotFound)?, !again),
        Verdict::Rejected { reason, .. } => (refusal(REJECTED, *reason)?, true),
    })
}

/// The outcome event of a settled allocation, from the record alone: every copy is identical.
fn settlement_event(message: Judged<'_>, allocation: &Allocation, rules: &Rules) -> Option<Publication> {
    let kind = settlement_type(allocation.kind, allocation.status)?;
    let event = CloudEvent {
        specversion: "1.0",
        id: settlement_id(allocation)?,
        source: &rules.event_source,
        kind,
        subject: Some(allocation.id),
        time: rfc3339(allocation.updated_at),
        datacontenttype: "application/json",
        data: SettlementData {
            allocation: allocation.into(),
            enterprise_id: &allocation.enterprise_id,
            client_id: allocation.client_id,
            nonce: allocation.settled_nonce.as_deref(),
        },
    };
    Some(publication(
        &event,
        Some(&allocation.enterprise_id),
        traceparent(message),
    ))
}

fn refusal_event(
    message: Judged<'_>,
    (kind, reason): (&'static str, Reason),
    first: &First,
    rules: &Rules,
) -> Publication {
    let update = message.facts.content.as_ref().ok().map(|content| &content.update);
    let enterprise_id = message.facts.enterprise_id.as_deref();
    let event = CloudEvent {
        specversion: "1.0",
        id: refusal_id(kind, message, reason),
        source: &rules.event_source,
        kind,
        subject: update.map(|update| update.id),
        time: rfc3339(first.at),
        datacontenttype: "application/json",
        data: RefusalData {
            enterprise_id,
            reason,
            class: reason.class(),
            is_final: reason.is_final(),
            detail: &first.detail,
            allocation_id: update.map(|update| update.id),
            nonce: update.map(|update| update.nonce.as_str()),
            message_digest: hex::encode(message.facts.message_digest),
            message_id: first.message_id.as_deref(),
            parked_until: first.parked_until.map(rfc3339),
        },
    };
    publication(&event, enterprise_id, first.traceparent.as_deref())
}

fn publication<D: Serialize>(
    event: &CloudEvent<'_, D>,
    enterprise_id: Option<&str>,
    traceparent: Option<&str>,
) -> Publication {
    let headers = traceparent.map(|value| Headers::from([(TRACEPARENT.into(), HeaderValue::text(value))]));
    Publication {
        kind: PublicationKind::Event,
        exchange: EVENTS_EXCHANGE.into(),
        routing_key: match enterprise_id {
            Some(enterprise_id) => format!("{}.{enterprise_id}", event.kind),
            None => event.kind.into(),
        },
        properties: Properties {
            content_type: Some(CONTENT_TYPE.into()),
            delivery_mode: Some(2),
            message_id: Some(event.id.to_string()),
            headers,
            ..Properties::default()
        },
        body: body_of(event),
    }
}

/// Most are shorter, so that a body does not grow while it is written.
const EVENT_BYTES: usize = 1_024;

fn body_of<D: Serialize>(event: &CloudEvent<'_, D>) -> Vec<u8> {
    let mut body = Vec::with_capacity(EVENT_BYTES);
    match serde_json::to_writer(&mut body, event) {
        Ok(()) => body,
        // Strings, numbers and maps with text keys: there is nothing in an event that can not be JSON.
        Err(_) => Vec::new(),
    }
}

/// A batch's publications, with its events in this format. The events of a routing key stay in order and are the same bytes
/// in either; what is no event stays as it is.
pub fn in_format(publications: Vec<Publication>, format: Format) -> Vec<Publication> {
    let Format::Batched { max_bytes } = format else {
        return publications;
    };
    let (events, others): (Vec<_>, Vec<_>) = publications
        .into_iter()
        .partition(|publication| publication.kind == PublicationKind::Event);
    let mut groups: Vec<Vec<Publication>> = Vec::new();
    // The last group of each routing key, and the bytes of its array. One that is full takes nothing more, however small,
    // or the next event would overtake.
    let mut last: HashMap<String, (usize, usize)> = HashMap::new();
    for event in events {
        // With the bracket or comma before it.
        let bytes = event.body.len().saturating_add(1);
        if let Some((place, size)) = last.get_mut(&event.routing_key)
            && let Some(group) = groups.get_mut(*place)
            && size.saturating_add(bytes) <= max_bytes
        {
            *size = size.saturating_add(bytes);
            group.push(event);
        } else {
            // And the bracket behind the last one.
            last.insert(event.routing_key.clone(), (groups.len(), bytes.saturating_add(1)));
            groups.push(vec![event]);
        }
    }
    groups
        .iter()
        .filter_map(|events| array_of(events))
        .chain(others)
        .collect()
}

/// Events under one routing key as one message.
fn array_of(events: &[Publication]) -> Option<Publication> {
    let first = events.first()?;
    let bytes: usize = events.iter().map(|event| event.body.len().saturating_add(1)).sum();
    let mut body = Vec::with_capacity(bytes.saturating_add(1));
    // The same events in the same order have the same name, whoever publishes them.
    let mut name = format!("batch|{}", first.routing_key);
    for event in events {
        body.push(if body.is_empty() { b'[' } else { b',' });
        body.extend_from_slice(&event.body);
        name.push('|');
        name.push_str(event.properties.message_id.as_deref().unwrap_or_default());
    }
    body.push(b']');
    // A message has one trace or none: what its events do not have in common can not travel.
    let shared = events
        .iter()
        .all(|event| event.properties.headers == first.properties.headers);
    let mut headers = shared
        .then(|| first.properties.headers.clone())
        .flatten()
        .unwrap_or_default();
    // 32 bits: RabbitMQ's stream client for Node can not read a small number of 64.
    let count = i32::try_from(events.len()).unwrap_or(i32::MAX);
    headers.insert(EVENTS_HEADER.into(), HeaderValue::LongInt(count));
    Some(Publication {
        kind: PublicationKind::Event,
        exchange: first.exchange.clone(),
        routing_key: first.routing_key.clone(),
        properties: Properties {
            content_type: Some(BATCH_CONTENT_TYPE.into()),
            message_id: Some(Uuid::new_v5(&NAMESPACE, name.as_bytes()).to_string()),
            headers: Some(headers),
            ..first.properties.clone()
        },
        body,
    })
}

/// How many events a publication stands for; a dead letter is one, whatever headers its sender gave it.
pub fn count_of(publication: &Publication) -> u64 {
    let headers = match publication.kind {
        PublicationKind::Event => publication.properties.headers.as_ref(),
        PublicationKind::DeadLetter | PublicationKind::Reply => None,
    };
    match headers.and_then(|headers| headers.get(EVENTS_HEADER)) {
        Some(HeaderValue::LongInt(count)) => u64::try_from(*count).unwrap_or(1),
        // As earlier versions left it in the outbox.
        Some(HeaderValue::LongLongInt(count)) => u64::try_from(*count).unwrap_or(1),
        Some(_) | None => 1,
    }
}

/// How many dead letters are among publications; the same message twice is one.
pub fn letters_of(publications: &[Publication]) -> usize {
    let mut messages = BTreeSet::new();
    for letter in publications
        .iter()
        .filter(|publication| publication.kind == PublicationKind::DeadLetter)
    {
        let headers = letter.properties.headers.as_ref();
        let digest = headers.and_then(|headers| headers.get("settled-digest")?.as_text());
        messages.insert((letter.routing_key.as_str(), digest));
    }
    messages.len()
}

/// The events of a message as a subscriber reads it, in order and byte for byte, whichever format it has.
///
/// # Errors
/// Its content type promises an array, and the body is none.
pub fn read<'a>(content_type: Option<&str>, body: &'a [u8]) -> Result<Vec<&'a [u8]>, serde_json::Error> {
    if content_type != Some(BATCH_CONTENT_TYPE) {
        return Ok(vec![body]);
    }
    let events: Vec<&RawValue> = serde_json::from_slice(body)?;
    Ok(events.into_iter().map(|event| event.get().as_bytes()).collect())
}

/// The message's `traceparent`, where it is a valid one (W3C Trace Context, version 00).
fn traceparent(message: Judged<'_>) -> Option<&str> {
    let text = message
        .delivery
        .properties
        .headers
        .as_ref()?
        .get(TRACEPARENT)?
        .as_text()?;
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace, parent, flags] = parts.as_slice() else {
        return None;
    };
    let is_hex = |part: &str, len: usize| {
        part.len() == len
            && part
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let is_set = |part: &str| part.bytes().any(|byte| byte != b'0');
    let valid = *version == "00"
        && is_hex(trace, 32)
        && is_set(trace)
        && is_hex(parent, 16)
        && is_set(parent)
        && is_hex(flags, 2);
    valid.then_some(text)
}

/// Whether a proven partner's `reply_to` is one we answer to. Any other name would let partners write to any queue.
pub fn is_reply_queue(name: &str, enterprise_id: &str) -> bool {
    name.strip_prefix("amq.rabbitmq.reply-to.")
        .is_some_and(|rest| !rest.is_empty())
        || name
            .strip_prefix("settlement.reply.")
            .and_then(|rest| rest.strip_prefix(enterprise_id))
            .is_some_and(|rest| rest.starts_with('.'))
}

/// Where the message asks to be answered.
fn reply_to(message: Judged<'_>, judgement: &Judgement) -> Option<ReplyTo> {
    // Who waits was told when it was parked; only who asks again is told again.
    let waits_on = message.delivery.source.is_parked() && judgement.verdict.kind() == VerdictKind::Parked;
    if !judgement.proven || waits_on {
        return None;
    }
    ReplyTo::of(message)
}

/// The same event for a queue that somebody waits at.
fn reply_at(to: ReplyTo, event: &Publication) -> Publication {
    Publication {
        kind: PublicationKind::Reply,
        exchange: String::new(),
        routing_key: to.reply_to,
        properties: Properties {
            correlation_id: to.correlation_id,
            ..event.properties.clone()
        },
        body: event.body.clone(),
    }
}

/// The event of a settlement once more, byte for byte, for a message whose effect was there when the broker gave it up.
pub fn told_again(message: Judged<'_>, allocation: &Allocation, rules: &Rules) -> Option<Publication> {
    settlement_event(message, allocation, rules)
}

/// What the event of a message that the broker gave up and nobody judged says, if its id was never told. Its time is that of
/// the failure.
pub fn given_up_words(message: Judged<'_>, reason: Reason, detail: &str, failed_at: Timestamp) -> (Uuid, First) {
    let first = First {
        at: failed_at,
        detail: detail.into(),
        message_id: message.delivery.properties.message_id.clone(),
        traceparent: traceparent(message).map(str::to_owned),
        parked_until: None,
    };
    (refusal_id(REJECTED, message, reason), first)
}

/// The event of a message that the broker gave up and nobody judged, in the words of the first of its id.
pub fn given_up(
    message: Judged<'_>,
    reason: Reason,
    detail: &str,
    failed_at: Timestamp,
    firsts: &Firsts,
    rules: &Rules,
) -> Publication {
    let (id, own) = given_up_words(message, reason, detail, failed_at);
    let first = firsts.get(&id).unwrap_or(&own);
    refusal_event(message, (REJECTED, reason), first, rules)
}

/// A dead letter that no database can hold, for the exchange of those, with why it is one.
pub fn set_apart(message: Judged<'_>, reason: Reason, detail: &str, failed_at: Timestamp) -> Publication {
    Publication {
        exchange: UNREADABLE_EXCHANGE.into(),
        ..dead_letter_of(message, reason, detail, failed_at)
    }
}

/// The message as received, for the dead-letter exchange, with why it is there; what is too large without what was left out.
fn dead_letter_of(message: Judged<'_>, reason: Reason, detail: &str, now: Timestamp) -> Publication {
    let delivery = message.delivery;
    let mut properties = delivery.properties.clone();
    let without_headers = delivery.cut.as_ref().is_some_and(|cut| cut.without_headers);
    let undecodable = properties.undecodable.take();
    if undecodable.is_some() {
        // All that it came with is in one text header: what can be decoded is read from there again.
        properties = Properties::default();
    }
    let headers = properties
        .headers
        .take()
        .filter(|_| !without_headers)
        .unwrap_or_default()
        .into_iter()
        .filter(|(name, _)| !dead_letter::is_of_dead_letters(name))
        .collect();
    let (mut headers, originals) = carried::plain(headers);
    let originals = originals.and_then(|originals| wire::write_headers(&originals));
    let mut add = |name: &str, value: HeaderValue| headers.insert(name.into(), value);
    // Another user's user_id is refused by the broker; an expiration would let the dead letter vanish.
    if let Some(user_id) = properties.user_id.take() {
        add("settled-origin-user-id", HeaderValue::text(user_id));
    }
    if let Some(expiration) = properties.expiration.take() {
        add("settled-origin-expiration", HeaderValue::text(expiration));
    }
    if let Some(list) = undecodable {
        add(
            dead_letter::ORIGIN_PROPERTIES,
            HeaderValue::text(dead_letter::as_text(&list.0)),
        );
    }
    if let Some(originals) = originals {
        add(
            dead_letter::ORIGIN_HEADERS,
            HeaderValue::text(dead_letter::as_text(&originals)),
        );
    }
    add("settled-reason", HeaderValue::text(reason.as_str()));
    add("settled-class", HeaderValue::LongLongInt(i64::from(reason.class())));
    add("settled-final", HeaderValue::Boolean(reason.is_final()));
    add("settled-detail", HeaderValue::text(detail));
    add(
        "settled-digest",
        HeaderValue::text(hex::encode(message.facts.message_digest)),
    );
    if let Some(cut) = &delivery.cut {
        let length = i64::try_from(cut.body_len).unwrap_or(i64::MAX);
        add(dead_letter::BODY_LENGTH_HEADER, HeaderValue::LongLongInt(length));
    }
    add("settled-failed-at", HeaderValue::text(rfc3339(now)));
    add("settled-origin-exchange", HeaderValue::text(&delivery.exchange));
    add("settled-origin-routing-key", HeaderValue::text(&delivery.routing_key));
    Publication {
        kind: PublicationKind::DeadLetter,
        exchange: DEAD_EXCHANGE.into(),
        routing_key: delivery.routing_key.clone(),
        properties: Properties {
            headers: Some(headers),
            delivery_mode: Some(2),
            ..properties
        },
        body: delivery.body.clone(),
    }
}

#[cfg(test)]
mod tests;

//! The CloudEvents by which the world is told what became of a message.

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::{
    allocation::{Allocation, Kind, PolicyResult, Status},
    calendar::rfc3339,
    delivery::{HeaderValue, Headers, Properties, Publication, PublicationKind},
    event_id::{REJECTED, refusal_id, settlement_id, settlement_type},
    ledger::Amount,
    message::MessageRef,
    names::{self, content_type, header},
    reason::Reason,
    snapshot::Rules,
    told::{First, Firsts, given_up_words},
    trace::traceparent,
};

pub use array::{Format, count_of, in_format, read};
pub(super) use array::{array_of, grouped};

pub mod array;

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
    #[serde(skip_serializing_if = "Option::is_none")]
    partner_symbol: Option<&'a str>,
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
            partner_symbol: allocation.partner_symbol.as_deref(),
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
struct CloudEvent<'a, S, D> {
    specversion: &'static str,
    id: Uuid,
    source: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<S>,
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

/// The outcome event of a settled allocation, from the record alone: every copy is identical.
pub(super) fn settlement_event(
    allocation: &Allocation,
    traceparent: Option<&str>,
    source: &str,
) -> Option<Publication> {
    let kind = settlement_type(allocation.kind, allocation.status)?;
    let event = CloudEvent {
        specversion: "1.0",
        id: settlement_id(allocation)?,
        source,
        kind,
        subject: Some(allocation.id),
        time: rfc3339(allocation.updated_at),
        datacontenttype: content_type::JSON,
        data: SettlementData {
            allocation: allocation.into(),
            enterprise_id: &allocation.enterprise_id,
            client_id: allocation.client_id,
            nonce: allocation.settled_nonce.as_deref(),
        },
    };
    Some(publication(&event, Some(&allocation.enterprise_id), traceparent))
}

pub(super) fn refusal_event(
    message: MessageRef<'_>,
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
        datacontenttype: content_type::JSON,
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

/// The event of something that became of a partner itself.
pub(super) fn partner_event<D: Serialize>(
    (kind, id): (&'static str, Uuid),
    enterprise_id: &str,
    time: Timestamp,
    data: D,
    source: &str,
) -> Publication {
    let event = CloudEvent {
        specversion: "1.0",
        id,
        source,
        kind,
        subject: Some(enterprise_id),
        time: rfc3339(time),
        datacontenttype: content_type::JSON,
        data,
    };
    publication(&event, Some(enterprise_id), None)
}

fn publication<S: Serialize, D: Serialize>(
    event: &CloudEvent<'_, S, D>,
    enterprise_id: Option<&str>,
    traceparent: Option<&str>,
) -> Publication {
    let headers = traceparent.map(|value| Headers::from([(header::TRACEPARENT.into(), HeaderValue::text(value))]));
    Publication {
        kind: PublicationKind::Event,
        exchange: names::EVENTS.into(),
        routing_key: match enterprise_id {
            Some(enterprise_id) => format!("{}.{enterprise_id}", event.kind),
            None => event.kind.into(),
        },
        properties: Properties {
            content_type: Some(content_type::EVENT.into()),
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

fn body_of<S: Serialize, D: Serialize>(event: &CloudEvent<'_, S, D>) -> Vec<u8> {
    let mut body = Vec::with_capacity(EVENT_BYTES);
    match serde_json::to_writer(&mut body, event) {
        Ok(()) => body,
        // Strings, numbers and maps with text keys: there is nothing in an event that can not be JSON. Whoever says it
        // holds that against it, before anything is written.
        Err(_) => Vec::new(),
    }
}

/// The event of a settlement once more, byte for byte, for a message whose effect was there when the broker gave it up.
pub fn told_again(message: MessageRef<'_>, allocation: &Allocation, rules: &Rules) -> Option<Publication> {
    settlement_event(allocation, traceparent(message.delivery), &rules.event_source)
}

/// The event of a message that the broker gave up and nobody judged, in the words of the first of its id.
pub fn given_up(
    message: MessageRef<'_>,
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

//! A partner's update by HTTP: the very body of the message is published to the queue, and what became of it is answered.

use std::time::Duration;

use axum::{
    body::{Body, Bytes, HttpBody},
    response::Response,
};
use http_body_util::BodyExt;
use hyper::{
    HeaderMap, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderName},
};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    Site,
    answer::{ApiRefused, at, internal, json as document},
    line::NotPosted,
    outcome::UpdateOutcome,
    reads::{One, receipt_address},
};
use crate::{
    broker::{replies::DIRECT, topology::UPDATES},
    desk::OwnedBy,
    domain::{
        address::routing_key,
        allocation::Kind,
        delivery::{Delivery, HeaderValue, Headers, Properties, Publication, PublicationKind, Source},
        event::AllocationView,
        message::{self, Content, Facts},
        names::header::TRACEPARENT,
        reason::Reason,
    },
};

/// What is read and thrown away of a body that is too large, so that its sender hears why: who is cut off while it sends hears
/// nothing.
const DRAINED_MAX: usize = 1 << 20;
/// When a receipt is looked for first, where nothing is heard; then after twice as long, and so on.
const LOOK: Duration = Duration::from_secs(1);
/// Longer than any of version 00, in bytes.
const TRACE_MAX: usize = 64;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Accepted<'a> {
    /// `accepted`: nothing is known yet. `parked`: it waits for its allocation.
    state: &'static str,
    receipt: &'a str,
    allocation_id: Uuid,
    nonce: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    parked_until: Option<String>,
    request_id: Uuid,
}

/// Reads, publishes, waits and answers.
pub(super) async fn put(
    site: &Site,
    (enterprise_id, kind): (&str, Kind),
    request: Uuid,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, ApiRefused> {
    let body = site.whole(body).await?;
    let delivery = Delivery {
        exchange: UPDATES.to_owned(),
        routing_key: routing_key(enterprise_id, kind),
        body,
        properties: Properties {
            content_type: text(headers, &CONTENT_TYPE)?,
            content_encoding: text(headers, &CONTENT_ENCODING)?,
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Plain,
    };
    let facts = message::unsigned_facts(&delivery);
    // What can not become anything else is refused here: the worker would say the same.
    let content = match &facts.content {
        Ok(content) => content,
        Err(refusal) => {
            let reason = refusal.reason;
            return Err(rejected(
                (reason.as_str(), reason.class(), reason.is_final()),
                &refusal.detail,
                &facts.message_digest,
            ));
        }
    };
    let mut asked = site.waiting.ask(request, enterprise_id, facts.message_digest);
    let publication = publication(site, request, headers, delivery);
    let answer = |outcome| told(outcome, (enterprise_id, content), request, &facts.message_digest);
    // The reply may be here before the confirm is, or where none comes.
    tokio::select! {
        biased;
        outcome = asked.certain() => return answer(outcome),
        posted = site.line.post(publication) => posted.map_err(not_posted)?,
    }
    asked.published();
    let until = Instant::now() + site.settings.wait;
    // A reply may be lost. What is written down is not: it is looked up now and then, and in the end.
    let mut look = LOOK;
    loop {
        let next = until.min(Instant::now() + look);
        if let Some(outcome) = asked.outcome(next).await {
            return answer(outcome);
        }
        let found = tokio::select! {
            biased;
            outcome = asked.certain() => return answer(outcome),
            // Who asks waits for a slow database no longer than it waits for all else.
            found = tokio::time::timeout_at(until + LOOK, from_receipt(site, enterprise_id, &facts, request)) => {
                found.unwrap_or(Ok(None))?
            }
        };
        if let Some(found) = found {
            return Ok(found);
        }
        if next == until {
            if let Some(outcome) = asked.possible() {
                return answer(outcome);
            }
            // It is with the broker, and is judged in its time.
            return Ok(accepted(enterprise_id, content, request, "accepted", None));
        }
        look = look.saturating_mul(2);
    }
}

/// What was heard, as an answer.
fn told(
    outcome: UpdateOutcome,
    (enterprise_id, content): (&str, &Content),
    request: Uuid,
    digest: &[u8],
) -> Result<Response, ApiRefused> {
    match outcome {
        UpdateOutcome::Settled(allocation) => Ok(document(StatusCode::OK, &One { allocation })),
        UpdateOutcome::Parked { until } => Ok(accepted(enterprise_id, content, request, "parked", until)),
        UpdateOutcome::Rejected {
            reason,
            class,
            is_final,
            detail,
        } => Err(rejected((&reason, class, is_final), &detail, digest)),
    }
}

/// What a receipt says of a message of which nothing was heard; none where that may be about another: what was refused and is
/// not final may be judged otherwise now, and other bytes with the same payload may have another signature.
async fn from_receipt(
    site: &Site,
    enterprise_id: &str,
    facts: &Facts,
    request: Uuid,
) -> Result<Option<Response>, ApiRefused> {
    let Ok(content) = &facts.content else {
        return Ok(None);
    };
    // A database that is away for a moment takes nothing from what the broker has.
    let Ok(Some(receipt)) = site.desk.partners_receipt(enterprise_id, &content.update.nonce).await else {
        return Ok(None);
    };
    if receipt.message_digest != hex::encode(facts.message_digest) {
        return Ok(None);
    }
    match receipt.verdict.as_str() {
        "settled" | "duplicate" => {
            let owner = OwnedBy::Partner(enterprise_id);
            let Ok(Some(allocation)) = site.desk.owned_allocation(owner, receipt.allocation_id).await else {
                return Ok(None);
            };
            let allocation = AllocationView::from(&allocation);
            Ok(Some(document(StatusCode::OK, &One { allocation })))
        }
        "rejected" => {
            let reason = Reason::written(receipt.reason.as_deref().unwrap_or_default());
            if !reason.is_final() {
                return Ok(None);
            }
            // Its details were told in the event.
            Err(rejected(
                (reason.as_str(), reason.class(), reason.is_final()),
                "",
                &facts.message_digest,
            ))
        }
        "parked" => Ok(Some(accepted(enterprise_id, content, request, "parked", None))),
        _ => Ok(None),
    }
}

fn publication(site: &Site, request: Uuid, headers: &HeaderMap, delivery: Delivery) -> Publication {
    let trace = headers
        .get(TRACEPARENT)
        .and_then(|trace| trace.to_str().ok())
        .filter(|trace| trace.len() <= TRACE_MAX)
        .map(|trace| Headers::from([(TRACEPARENT.to_owned(), HeaderValue::text(trace))]));
    Publication {
        // Comes back where no queue takes it.
        kind: PublicationKind::DeadLetter,
        exchange: delivery.exchange,
        routing_key: delivery.routing_key,
        properties: Properties {
            content_type: Some("application/json".to_owned()),
            delivery_mode: Some(2),
            message_id: Some(request.to_string()),
            correlation_id: Some(request.to_string()),
            reply_to: Some(DIRECT.to_owned()),
            // The broker sees that it is ours; a worker that lists it in broker.api_users believes that we saw a token.
            user_id: site.login.clone(),
            headers: trace,
            ..Properties::default()
        },
        body: delivery.body,
    }
}

fn not_posted(why: NotPosted) -> ApiRefused {
    match why {
        NotPosted::Away => ApiRefused::unavailable(
            "the queue can not be reached, and the update was not taken: send it again",
            5,
        ),
        NotPosted::Full => ApiRefused::unavailable(
            "the queue takes no more now, and the update was not taken: send it again",
            10,
        ),
        NotPosted::Unknown => ApiRefused::unavailable(
            "it is not known whether the update was taken: send the same bytes again, nothing is done twice",
            5,
        ),
        NotPosted::NoQueue => internal("no queue takes updates: run `settled topology`".to_owned()),
    }
}

/// A refusal in the public API's shape: the reason is its name.
fn rejected((reason, class, is_final): (&str, u16, bool), detail: &str, digest: &[u8]) -> ApiRefused {
    let known = Reason::parse(reason);
    let advice = known.map(|reason| reason.advice_to_partner());
    let mut context = Map::new();
    context.insert("final".to_owned(), is_final.into());
    if !detail.is_empty() {
        context.insert("detail".to_owned(), detail.into());
    }
    if let Some(advice) = advice {
        context.insert("advice".to_owned(), advice.into());
    }
    context.insert("messageDigest".to_owned(), hex::encode(digest).into());
    let error = if detail.is_empty() {
        advice.unwrap_or("the update was refused")
    } else {
        detail
    };
    let status = StatusCode::from_u16(class)
        .ok()
        .filter(|status| status.is_client_error() || status.is_server_error());
    let refused = ApiRefused::new(
        status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        reason.to_owned(),
        error,
    )
    .context(Value::Object(context));
    if status == Some(StatusCode::UNAUTHORIZED) {
        return refused.challenge();
    }
    refused
}

fn accepted(
    enterprise_id: &str,
    content: &Content,
    request: Uuid,
    state: &'static str,
    parked_until: Option<String>,
) -> Response {
    let receipt = receipt_address(enterprise_id, &content.update.nonce);
    let answer = document(
        StatusCode::ACCEPTED,
        &Accepted {
            state,
            receipt: &receipt,
            allocation_id: content.update.id,
            nonce: &content.update.nonce,
            parked_until,
            request_id: request,
        },
    );
    at(answer, &receipt)
}

/// A header that becomes a property.
fn text(headers: &HeaderMap, name: &HeaderName) -> Result<Option<String>, ApiRefused> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    match value.to_str() {
        // An AMQP property has 255 bytes at most.
        Ok(text) if text.len() <= 255 => Ok(Some(text.to_owned())),
        Ok(_) | Err(_) => Err(ApiRefused::invalid(format!(
            "the header {name} is not one that can be read"
        ))),
    }
}

impl Site {
    /// A body, within its bounds of bytes and time.
    pub(super) async fn whole(&self, mut body: Body) -> Result<Vec<u8>, ApiRefused> {
        let most = self.settings.body_max;
        let too_large = || {
            rejected(
                (Reason::MessageTooLarge.as_str(), Reason::MessageTooLarge.class(), true),
                &format!("the body has more than {most} bytes"),
                &[],
            )
            .hang_up()
        };
        let said = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if said > most.saturating_add(DRAINED_MAX) {
            return Err(too_large());
        }
        let reading = async {
            let mut all = Vec::new();
            let mut count = 0_usize;
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|_| {
                    ApiRefused::invalid("the body did not come whole, or is not as its headers say").hang_up()
                })?;
                let data: Bytes = frame.into_data().unwrap_or_default();
                count = count.saturating_add(data.len());
                if count > most.saturating_add(DRAINED_MAX) {
                    break;
                }
                if count <= most {
                    all.extend_from_slice(&data);
                }
            }
            if count > most { Err(too_large()) } else { Ok(all) }
        };
        tokio::time::timeout(self.settings.body_timeout, reading)
            .await
            .unwrap_or_else(|_| {
                let slow = ApiRefused::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "request_timeout",
                    "the body did not come in time",
                );
                Err(slow.hang_up())
            })
    }
}

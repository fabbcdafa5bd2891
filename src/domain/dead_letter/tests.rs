use jiff::Timestamp;
use uuid::Uuid;

use super::*;
use crate::domain::{
    delivery::{Delivery, HeaderValue, Headers, PROPERTIES_MAX, Properties, Source},
    digest::sha256,
    message::{BODY_MAX, MessageRef, facts, shorten},
    names::header::{BODY_LENGTH, ORIGIN_HEADERS, ORIGIN_PROPERTIES},
    publications::publications,
    reason::Reason,
    snapshot::Rules,
    verdict::{Judgement, Verdict, VerdictKind},
    wire,
};

const KEY: &str = "acme.allocation.update";

fn time(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).expect("in range")
}

fn headers<const N: usize>(entries: [(&str, HeaderValue); N]) -> Headers {
    entries
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn text(value: &str) -> HeaderValue {
    HeaderValue::text(value)
}

/// A message as a partner sends it.
fn sent() -> Delivery {
    Delivery {
        exchange: "settlement.updates".into(),
        routing_key: KEY.into(),
        body: b"{}".to_vec(),
        properties: Properties {
            content_type: Some("application/json".into()),
            headers: Some(headers([("mine", HeaderValue::LongInt(7)), ("traceparent", text("x"))])),
            delivery_mode: Some(2),
            expiration: Some("60000".into()),
            message_id: Some("m-1".into()),
            user_id: Some("partner".into()),
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Queue { delivery_tag: 3 },
    }
}

fn rules() -> Rules {
    Rules {
        park_deadline: jiff::SignedDuration::from_secs(1),
        park_first_retry: jiff::SignedDuration::from_secs(1),
        park_max_interval: jiff::SignedDuration::from_secs(1),
        park_max_per_partner: 1,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        event_source: "/settled".into(),
        api_users: Vec::new(),
    }
}

/// The login that dead letters carry.
const WORKER: &str = "worker";

/// A letter taken apart, where the worker's word counts, at a time after everything here.
fn opened(letter: Delivery) -> (Delivery, Cause) {
    open(letter, &Trusted::new([WORKER.to_owned()]), time(2_000))
}

/// The dead letter that the worker makes of it, as the collector gets it.
fn ours(reason: Reason) -> Delivery {
    letter_of(&sent(), reason)
}

fn letter_of(message: &Delivery, reason: Reason) -> Delivery {
    let facts = facts(message);
    let judgement = crate::domain::verdict::Judgement {
        verdict: crate::domain::verdict::Verdict::Rejected {
            reason,
            detail: "amount.quantity: differs from the record".into(),
        },
        proven: false,
    };
    let judged = MessageRef {
        delivery: message,
        facts: &facts,
    };
    let made = publications(judged, &judgement, time(1_000), &rules());
    let letter = made
        .into_iter()
        .find(|publication| publication.kind == crate::domain::delivery::PublicationKind::DeadLetter)
        .expect("a dead letter");
    Delivery {
        exchange: letter.exchange,
        routing_key: letter.routing_key,
        body: letter.body,
        properties: Properties {
            // The publisher adds it.
            user_id: Some(WORKER.into()),
            ..letter.properties
        },
        cut: None,
        redelivered: false,
        source: Source::Queue { delivery_tag: 3 },
    }
}

/// What the broker writes when it dead-letters by itself.
fn death(queue: &str, reason: &str) -> Headers {
    headers([
        ("count", HeaderValue::LongLongInt(1)),
        ("exchange", text("settlement.updates")),
        ("original-expiration", text("60000")),
        ("queue", text(queue)),
        ("reason", text(reason)),
        ("routing-keys", HeaderValue::Array(vec![text(KEY)])),
        ("time", HeaderValue::Timestamp(900)),
    ])
}

fn by_the_broker(deaths: Vec<HeaderValue>) -> Delivery {
    let mut delivery = sent();
    delivery.properties.expiration = None;
    let headers = delivery.properties.headers.get_or_insert_default();
    headers.insert("x-death".into(), HeaderValue::Array(deaths));
    delivery.exchange = "settlement.dead".into();
    delivery
}

mod opening;
mod rows;

//! A message as a dead letter, with why it is one.

use jiff::Timestamp;

use super::headers::{as_text, is_of_dead_letters};
use crate::domain::{
    calendar::rfc3339,
    carried,
    delivery::{HeaderValue, Properties, Publication, PublicationKind},
    message::MessageRef,
    names::{DEAD, UNREADABLE, header},
    reason::Reason,
    wire,
};

/// A dead letter that no database can hold, for the exchange of those, with why it is one.
pub fn set_apart(message: MessageRef<'_>, reason: Reason, detail: &str, failed_at: Timestamp) -> Publication {
    Publication {
        exchange: UNREADABLE.into(),
        ..dead_letter_of(message, reason, detail, failed_at)
    }
}

/// The message as received, for the dead-letter exchange, with why it is there; what is too large without what was left out.
pub(in crate::domain) fn dead_letter_of(
    message: MessageRef<'_>,
    reason: Reason,
    detail: &str,
    now: Timestamp,
) -> Publication {
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
        .filter(|(name, _)| !is_of_dead_letters(name))
        .collect();
    let (mut headers, originals) = carried::plain(headers);
    let originals = originals.and_then(|originals| wire::write_headers(&originals));
    let mut add = |name: &str, value: HeaderValue| headers.insert(name.into(), value);
    // Another user's user_id is refused by the broker; an expiration would let the dead letter vanish.
    if let Some(user_id) = properties.user_id.take() {
        add(header::ORIGIN_USER_ID, HeaderValue::text(user_id));
    }
    if let Some(expiration) = properties.expiration.take() {
        add(header::ORIGIN_EXPIRATION, HeaderValue::text(expiration));
    }
    if let Some(list) = undecodable {
        add(header::ORIGIN_PROPERTIES, HeaderValue::text(as_text(&list.0)));
    }
    if let Some(originals) = originals {
        add(header::ORIGIN_HEADERS, HeaderValue::text(as_text(&originals)));
    }
    add(header::REASON, HeaderValue::text(reason.as_str()));
    add(header::CLASS, HeaderValue::LongLongInt(i64::from(reason.class())));
    add(header::FINAL, HeaderValue::Boolean(reason.is_final()));
    add(header::DETAIL, HeaderValue::text(detail));
    add(
        header::DIGEST,
        HeaderValue::text(hex::encode(message.facts.message_digest)),
    );
    if let Some(cut) = &delivery.cut {
        let length = i64::try_from(cut.body_len).unwrap_or(i64::MAX);
        add(header::BODY_LENGTH, HeaderValue::LongLongInt(length));
    }
    add(header::FAILED_AT, HeaderValue::text(rfc3339(now)));
    add(header::ORIGIN_EXCHANGE, HeaderValue::text(&delivery.exchange));
    add(header::ORIGIN_ROUTING_KEY, HeaderValue::text(&delivery.routing_key));
    Publication {
        kind: PublicationKind::DeadLetter,
        exchange: DEAD.into(),
        routing_key: delivery.routing_key.clone(),
        properties: Properties {
            headers: Some(headers),
            delivery_mode: Some(2),
            ..properties
        },
        body: delivery.body.clone(),
    }
}

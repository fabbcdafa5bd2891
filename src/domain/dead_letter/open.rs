//! A dead letter, taken apart: the message as the partner sent it, and why it is here.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::{
    cause::{Cause, MadeBy},
    death::{death_at_input, is_of_the_broker, time_of},
    headers::{is_of_dead_letters, of_text},
};
use crate::domain::{
    delivery::{Cut, Delivery, HEAD_MAX, HeaderValue, Headers},
    digest::sha256,
    message::Facts,
    names::{UPDATES, header},
    reason::{Reason, is_code},
    wire,
};

/// Whose word counts: the logins by which workers publish dead letters. The broker lets nobody publish under another's
/// `user_id`, so what a letter carries is who wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trusted(BTreeSet<String>);

impl Trusted {
    /// These logins; an empty one stands for letters without a `user_id`.
    pub fn new(logins: impl IntoIterator<Item = String>) -> Self {
        Self(logins.into_iter().collect())
    }

    fn holds(&self, user_id: Option<&str>) -> bool {
        self.0.contains(user_id.unwrap_or_default())
    }
}

/// Takes a delivery from the dead-letter queue apart: the message as the partner sent it, and why it is here. What it says
/// of itself counts only if the broker's own record or somebody trusted says it.
pub fn open(mut delivery: Delivery, trusted: &Trusted, now: Timestamp) -> (Delivery, Cause) {
    let headers = delivery.properties.headers.take().unwrap_or_default();
    let cause = match death_at_input(&headers) {
        Some(death) if is_of_the_broker(death, now) => Ok(by_broker(&mut delivery, death)),
        Some(_) => Err("the record of its death is not one that the broker writes".to_owned()),
        None if !trusted.holds(delivery.properties.user_id.as_deref()) => Err(
            "who put it into settlement.dead is no login of a worker (its user_id says so, see broker.trusted_users)"
                .to_owned(),
        ),
        None => by_settled(&mut delivery, &headers)
            .map_err(|header| format!("the header {header} is missing or not what a dead letter of ours has")),
    };
    let cause = cause.unwrap_or_else(|why| {
        // Whose message it is nobody can say either: its user_id is whoever put it there.
        delivery.properties.user_id = None;
        Cause {
            made_by: MadeBy::Unknown,
            reason: Reason::Internal,
            detail: format!("nobody knows why: {why}"),
            failed_at: None,
        }
    });
    // Where all that it came with was read anew, its headers are the message's own.
    let headers: Headers = delivery
        .properties
        .headers
        .take()
        .unwrap_or(headers)
        .into_iter()
        .filter(|(name, _)| !is_of_dead_letters(name))
        .collect();
    delivery.properties.headers = (!headers.is_empty()).then_some(headers);
    (delivery, cause)
}

/// What the record says. Of a message that died here before and came back with its record, the broker up to 3.12 keeps
/// the first time.
fn by_broker(delivery: &mut Delivery, death: &Headers) -> Cause {
    let text = |name: &str| death.get(name).and_then(HeaderValue::as_text);
    if let Some(exchange) = text("exchange") {
        exchange.clone_into(&mut delivery.exchange);
    } else {
        UPDATES.clone_into(&mut delivery.exchange);
    }
    if let Some(expiration) = text("original-expiration") {
        delivery.properties.expiration = Some(expiration.to_owned());
    }
    let (reason, detail) = match text("reason") {
        // By whom, and whether it is too large, the message itself says.
        Some("rejected") => (Reason::Internal, REJECTED.to_owned()),
        Some("delivery_limit") => (
            Reason::DeliveryLimit,
            "the broker gave it up: it was handed out too often without an acknowledgement".to_owned(),
        ),
        Some("expired") => (
            Reason::Expired,
            "the sender's own expiration ran out before it was read".to_owned(),
        ),
        Some(_) | None => (
            Reason::Internal,
            "the broker dead-lettered it for a reason that this version does not know".to_owned(),
        ),
    };
    Cause {
        made_by: MadeBy::Broker,
        reason,
        detail,
        failed_at: time_of(death),
    }
}

/// Of what was rejected at its queue. Workers of earlier versions left what is too large to the broker so.
const REJECTED: &str = "somebody rejected it at its queue, although it is within the limits";

/// What the worker wrote beside the message; else the name of the first header that is not what it writes.
fn by_settled(delivery: &mut Delivery, headers: &Headers) -> Result<Cause, &'static str> {
    let text = |name: &'static str| headers.get(name).and_then(HeaderValue::as_text).ok_or(name);
    let reason = text(header::REASON)?;
    let reason = Some(reason).filter(|reason| is_code(reason)).ok_or(header::REASON)?;
    // What a newer worker wrote says the rest of it too.
    let class = match headers.get(header::CLASS) {
        Some(HeaderValue::LongLongInt(class)) => u16::try_from(*class).ok(),
        Some(_) | None => None,
    };
    let is_final = match headers.get(header::FINAL) {
        Some(HeaderValue::Boolean(is_final)) => Some(*is_final),
        Some(_) | None => None,
    };
    let reason = Reason::written(reason).with(class, is_final);
    if headers.get(header::CLASS) != Some(&HeaderValue::LongLongInt(i64::from(reason.class()))) {
        return Err(header::CLASS);
    }
    if headers.get(header::FINAL) != Some(&HeaderValue::Boolean(reason.is_final())) {
        return Err(header::FINAL);
    }
    let detail = text(header::DETAIL)?;
    let digest = text(header::DIGEST)?;
    let cut = match headers.get(header::BODY_LENGTH) {
        None => None,
        Some(length) => Some(cut_of(delivery, length, digest, reason, detail)?),
    };
    // Nobody can check the digest of what is not there.
    let is_whole = cut
        .as_ref()
        .is_none_or(|cut| usize::try_from(cut.body_len) == Ok(delivery.body.len()));
    if is_whole && digest != hex::encode(sha256(&delivery.body)) {
        return Err(header::DIGEST);
    }
    let failed_at: Timestamp = text(header::FAILED_AT)?.parse().map_err(|_| header::FAILED_AT)?;
    let exchange = text(header::ORIGIN_EXCHANGE)?;
    let routing_key = text(header::ORIGIN_ROUTING_KEY)?;
    let origin = |name: &str| headers.get(name).and_then(HeaderValue::as_text).map(str::to_owned);
    exchange.clone_into(&mut delivery.exchange);
    routing_key.clone_into(&mut delivery.routing_key);
    delivery.properties.user_id = origin(header::ORIGIN_USER_ID);
    delivery.properties.expiration = origin(header::ORIGIN_EXPIRATION);
    delivery.cut = cut.map(Box::new);
    if let Some(table) = origin(header::ORIGIN_HEADERS) {
        let originals = of_text(&table)
            .and_then(|table| wire::headers(&table))
            .ok_or(header::ORIGIN_HEADERS)?;
        let mut headers = headers.clone();
        headers.extend(originals);
        delivery.properties.headers = Some(headers);
    }
    if let Some(list) = origin(header::ORIGIN_PROPERTIES) {
        delivery.properties = wire::read(&of_text(&list).ok_or(header::ORIGIN_PROPERTIES)?);
    }
    Ok(Cause {
        made_by: MadeBy::Settled,
        reason,
        detail: detail.to_owned(),
        failed_at: Some(failed_at),
    })
}

/// What a worker left out of a message that was too large.
fn cut_of(
    delivery: &Delivery,
    length: &HeaderValue,
    digest: &str,
    reason: Reason,
    detail: &str,
) -> Result<Cut, &'static str> {
    let HeaderValue::LongLongInt(length) = length else {
        return Err(header::BODY_LENGTH);
    };
    let body_len = u64::try_from(*length).map_err(|_| header::BODY_LENGTH)?;
    let kept = usize::try_from(body_len).unwrap_or(usize::MAX).min(HEAD_MAX);
    if delivery.body.len() != kept {
        return Err(header::BODY_LENGTH);
    }
    let digest = hex::decode(digest).ok().and_then(|digest| digest.try_into().ok());
    Ok(Cut {
        body_len,
        digest: digest.ok_or(header::DIGEST)?,
        detail: if reason == Reason::MessageTooLarge {
            detail.to_owned()
        } else {
            // Something else befell it, and yet it is what it is.
            format!("the message was larger than is allowed: the head of its {body_len} bytes is kept")
        },
        // Where it had any within the limits they are here.
        without_headers: false,
    })
}

/// The cause with what only the message itself can say: by how much it is too large.
pub fn explain(cause: Cause, facts: &Facts) -> Cause {
    if cause.made_by != MadeBy::Broker || cause.detail != REJECTED {
        return cause;
    }
    match &facts.content {
        Err(refusal) if refusal.reason == Reason::MessageTooLarge => Cause {
            reason: Reason::MessageTooLarge,
            detail: refusal.detail.clone(),
            ..cause
        },
        Err(_) | Ok(_) => cause,
    }
}

/// Why no database can hold a dead letter, if so: PostgreSQL has no U+0000 in text.
pub fn unstorable(delivery: &Delivery) -> Option<&'static str> {
    let has_nul = |text: &str| text.contains('\0');
    (has_nul(&delivery.routing_key) || has_nul(&delivery.exchange))
        .then_some("its routing key or exchange holds the character U+0000")
}

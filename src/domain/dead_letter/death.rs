//! The broker's own record of a death.

use jiff::{SignedDuration, Timestamp};

use crate::domain::{
    address::is_enterprise_id,
    delivery::{HeaderValue, Headers},
    names::UPDATES,
};

/// The broker's record of the last death, if that was at an input queue. The broker puts its record first, whatever the
/// sender wrote; every other header about deaths may be the sender's.
pub(super) fn death_at_input(headers: &Headers) -> Option<&Headers> {
    let HeaderValue::Array(deaths) = headers.get("x-death")? else {
        return None;
    };
    let Some(HeaderValue::Table(death)) = deaths.first() else {
        return None;
    };
    let queue = death.get("queue")?.as_text()?;
    let own = queue.strip_prefix(UPDATES).and_then(|rest| rest.strip_prefix('.'));
    (queue == UPDATES || own.is_some_and(is_enterprise_id)).then_some(death)
}

/// Whether a record has the whole shape that the broker gives it, the same from 3.10 to 4.3: every field, with its type. A
/// message may bring a record along, and the broker up to 3.12 counts one up whose queue and reason are the true ones and
/// keeps the rest of it as it came. Whoever may write to settlement.dead can write a whole one; what that is good for
/// stands in docs/dead-letters.md.
pub(super) fn is_of_the_broker(death: &Headers, now: Timestamp) -> bool {
    let is_text = |name: &str| death.get(name).and_then(HeaderValue::as_text).is_some();
    let is_counted = matches!(death.get("count"), Some(HeaderValue::LongLongInt(count)) if *count > 0);
    let latest = now.saturating_add(CLOCK_TOLERANCE).unwrap_or(Timestamp::MAX);
    let has_time = time_of(death).is_some_and(|time| time <= latest);
    let has_keys = match death.get("routing-keys") {
        Some(HeaderValue::Array(keys)) => {
            !keys.is_empty() && keys.iter().all(|key| matches!(key, HeaderValue::LongString(_)))
        }
        Some(_) | None => false,
    };
    let expiration = match death.get("original-expiration") {
        None => true,
        Some(value) => value
            .as_text()
            .is_some_and(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())),
    };
    is_counted && has_time && has_keys && expiration && ["queue", "reason", "exchange"].into_iter().all(is_text)
}

/// How far the broker's clock may be ahead of ours before its record is nobody's.
const CLOCK_TOLERANCE: SignedDuration = SignedDuration::from_mins(10);

pub(super) fn time_of(death: &Headers) -> Option<Timestamp> {
    let Some(HeaderValue::Timestamp(seconds)) = death.get("time") else {
        return None;
    };
    Timestamp::from_second(i64::try_from(*seconds).ok()?).ok()
}

//! A message's place in a trace (W3C Trace Context).

use super::delivery::{Delivery, HeaderValue, Publication};
use super::names::header::TRACEPARENT;

/// Longer than any of version 00, in bytes.
pub(super) const TRACE_MAX: usize = 64;

/// The place in a trace that an event of ours carries.
pub(super) fn carried(event: &Publication) -> Option<&str> {
    event
        .properties
        .headers
        .as_ref()
        .and_then(|headers| headers.get(TRACEPARENT))
        .and_then(HeaderValue::as_text)
}

/// The message's `traceparent`, where it is a valid one (W3C Trace Context, version 00).
pub(super) fn traceparent(delivery: &Delivery) -> Option<&str> {
    let text = delivery.properties.headers.as_ref()?.get(TRACEPARENT)?.as_text()?;
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

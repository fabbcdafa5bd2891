//! A message's place in a trace (W3C Trace Context).

use super::delivery::{Delivery, HeaderValue, Publication};
use super::names::header::{TRACEPARENT, TRACESTATE};

/// Longer than any of version 00, in bytes.
pub(super) const TRACE_MAX: usize = 64;

/// So much of what tracers add of their own is looked at, in bytes: the standard asks for at least as much.
const STATE_MAX: usize = 512;

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
pub fn traceparent(delivery: &Delivery) -> Option<&str> {
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

/// What tracers added to the message's place in a trace, where there is little enough of it. Whatever stands in it is the
/// sender's: it is for whoever looks at traces, and no event says it again.
pub fn tracestate(delivery: &Delivery) -> Option<&str> {
    let text = delivery.properties.headers.as_ref()?.get(TRACESTATE)?.as_text()?;
    (text.len() <= STATE_MAX).then_some(text)
}

//! What a broker adds to the headers of a message that it delivers once more, in one place.

use super::delivery::HeaderValue;

/// Its counters of deliveries: `x-delivery-count` of quorum queues (RabbitMQ 3.8 and later), `x-acquired-count` (4.3 and
/// later). Whatever a sender wrote under such a name is gone as soon as the message comes again.
const COUNTERS: [&str; 2] = ["x-delivery-count", "x-acquired-count"];

/// Whether a header is a broker's count of deliveries, and so nothing that the sender said.
pub(in crate::domain) fn is_counter(name: &str) -> bool {
    COUNTERS.contains(&name)
}

/// Whether a header may come, go or grow between one delivery of a message and the next. It has no part in what the message
/// is judged to be: a redelivery never changes a verdict. The counters that a later version may bring are known by their
/// form.
pub(in crate::domain) fn may_change(name: &str, value: &HeaderValue) -> bool {
    let is_integer = match value {
        HeaderValue::ShortShortInt(_)
        | HeaderValue::ShortShortUInt(_)
        | HeaderValue::ShortInt(_)
        | HeaderValue::ShortUInt(_)
        | HeaderValue::LongInt(_)
        | HeaderValue::LongUInt(_)
        | HeaderValue::LongLongInt(_) => true,
        HeaderValue::Boolean(_)
        | HeaderValue::Float(_)
        | HeaderValue::Double(_)
        | HeaderValue::Decimal { .. }
        | HeaderValue::LongString(_)
        | HeaderValue::ByteArray(_)
        | HeaderValue::Array(_)
        | HeaderValue::Table(_)
        | HeaderValue::Timestamp(_)
        | HeaderValue::Void => false,
    };
    is_counter(name) || (is_integer && name.starts_with("x-") && name.ends_with("-count"))
}

//! Headers as everyone can carry them on: brokers hand messages to queues of other kinds, and to readers in other protocols,
//! and some of these can not stand every type of AMQP 0-9-1.

use super::delivery::{HeaderValue, Headers};
use super::wire;

/// Text that stands for one value is at most so long; what is longer ends in three dots.
const TEXT_MAX: usize = 1_024;

/// Bytes of all headers and of the originals of those that changed, as text: with ours beside them they must fit the smallest
/// frame that a worker publishes with (32,768 bytes).
const ROOM: usize = 28_000;

/// Headers with text in place of every value that is neither text, boolean, integer, void nor timestamp, nor a list or a table of
/// such; and whole, as they were, those that had to change. Where both do not fit, the changed ones are left out: the
/// originals are what counts.
pub(super) fn plain(headers: Headers) -> (Headers, Option<Headers>) {
    if headers.values().all(is_plain) {
        return (headers, None);
    }
    let (mut plain, originals): (Headers, Headers) = headers.into_iter().partition(|(_, value)| is_plain(value));
    let size = |headers: &Headers| wire::write_headers(headers).map_or(usize::MAX, |bytes| bytes.len());
    // As base64.
    let kept = size(&originals).saturating_mul(4).div_ceil(3);
    let as_text: Headers = originals
        .iter()
        .map(|(name, value)| (name.clone(), text_for(value)))
        .collect();
    if size(&plain).saturating_add(kept).saturating_add(size(&as_text)) <= ROOM {
        plain.extend(as_text);
    }
    (plain, Some(originals))
}

fn is_plain(value: &HeaderValue) -> bool {
    match value {
        HeaderValue::Boolean(_)
        | HeaderValue::ShortShortInt(_)
        | HeaderValue::ShortShortUInt(_)
        | HeaderValue::ShortInt(_)
        | HeaderValue::ShortUInt(_)
        | HeaderValue::LongInt(_)
        | HeaderValue::LongUInt(_)
        | HeaderValue::LongLongInt(_)
        | HeaderValue::Timestamp(_)
        | HeaderValue::Void => true,
        HeaderValue::LongString(_) => value.as_text().is_some(),
        HeaderValue::Array(values) => values.iter().all(is_plain),
        HeaderValue::Table(headers) => headers.values().all(is_plain),
        HeaderValue::Float(_) | HeaderValue::Double(_) | HeaderValue::Decimal { .. } | HeaderValue::ByteArray(_) => {
            false
        }
    }
}

/// Numbers as the shortest decimal that reads back to the same, bytes as hexadecimal digits.
fn text_for(value: &HeaderValue) -> HeaderValue {
    let text = match value {
        HeaderValue::Float(bits) => f32::from_bits(*bits).to_string(),
        HeaderValue::Double(bits) => f64::from_bits(*bits).to_string(),
        HeaderValue::Decimal { scale, value } => decimal(*scale, *value),
        HeaderValue::ByteArray(bytes) => hex::encode(&bytes.0),
        HeaderValue::LongString(bytes) if value.as_text().is_none() => hex::encode(&bytes.0),
        HeaderValue::Array(values) => return HeaderValue::Array(values.iter().map(text_for).collect()),
        HeaderValue::Table(headers) => {
            let entries = headers.iter().map(|(name, value)| (name.clone(), text_for(value)));
            return HeaderValue::Table(entries.collect());
        }
        HeaderValue::Boolean(_)
        | HeaderValue::ShortShortInt(_)
        | HeaderValue::ShortShortUInt(_)
        | HeaderValue::ShortInt(_)
        | HeaderValue::ShortUInt(_)
        | HeaderValue::LongInt(_)
        | HeaderValue::LongUInt(_)
        | HeaderValue::LongLongInt(_)
        | HeaderValue::Timestamp(_)
        | HeaderValue::LongString(_)
        | HeaderValue::Void => return value.clone(),
    };
    HeaderValue::text(match text.get(..TEXT_MAX) {
        Some(head) if text.len() > TEXT_MAX => format!("{head}..."),
        Some(_) | None => text,
    })
}

/// `value` with the point so many digits from its end.
fn decimal(scale: u8, value: u32) -> String {
    let scale = usize::from(scale);
    let digits = format!("{value:0>width$}", width = scale.saturating_add(1));
    let (whole, rest) = digits.split_at(digits.len().saturating_sub(scale));
    if rest.is_empty() {
        whole.to_owned()
    } else {
        format!("{whole}.{rest}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::Bytes;

    fn bytes(bytes: &[u8]) -> Bytes {
        Bytes(bytes.to_vec())
    }

    #[test]
    fn what_everyone_carries_stays_and_the_rest_is_text() {
        let kept = Headers::from([
            ("text".to_owned(), HeaderValue::text("\u{e4}")),
            ("number".to_owned(), HeaderValue::LongLongInt(-7)),
            (
                "list".to_owned(),
                HeaderValue::Array(vec![HeaderValue::Void, HeaderValue::Boolean(true)]),
            ),
            ("time".to_owned(), HeaderValue::Timestamp(9)),
        ]);
        assert_eq!(plain(kept.clone()), (kept.clone(), None));
        let decimal = |scale, value| HeaderValue::Decimal { scale, value };
        let cases = [
            ("float", HeaderValue::Float(0.1_f32.to_bits()), HeaderValue::text("0.1")),
            (
                "double",
                HeaderValue::Double((-2.5_f64).to_bits()),
                HeaderValue::text("-2.5"),
            ),
            ("nan", HeaderValue::Double(f64::NAN.to_bits()), HeaderValue::text("NaN")),
            ("decimal", decimal(2, 12_345), HeaderValue::text("123.45")),
            ("small", decimal(3, 5), HeaderValue::text("0.005")),
            ("whole", decimal(0, 5), HeaderValue::text("5")),
            (
                "bytes",
                HeaderValue::ByteArray(bytes(&[0, 255])),
                HeaderValue::text("00ff"),
            ),
            (
                "no text",
                HeaderValue::LongString(bytes(&[0xff])),
                HeaderValue::text("ff"),
            ),
            (
                "inside",
                HeaderValue::Array(vec![HeaderValue::Table(Headers::from([(
                    "x".to_owned(),
                    decimal(1, 1),
                )]))]),
                HeaderValue::Array(vec![HeaderValue::Table(Headers::from([(
                    "x".to_owned(),
                    HeaderValue::text("0.1"),
                )]))]),
            ),
            (
                "long",
                HeaderValue::ByteArray(bytes(&[0xab; 600])),
                HeaderValue::text(format!("{}...", "ab".repeat(512))),
            ),
        ];
        let rare: Headers = cases
            .iter()
            .map(|(name, value, _)| ((*name).to_owned(), value.clone()))
            .collect();
        let mut all = kept.clone();
        all.extend(rare.clone());
        let mut expected = kept;
        expected.extend(cases.into_iter().map(|(name, _, text)| (name.to_owned(), text)));
        assert_eq!(plain(all), (expected, Some(rare)));
    }

    /// As many as a message may have: what does not fit a frame is left out, and its original is there.
    #[test]
    fn headers_of_rare_types_without_end_still_fit() {
        let rare: Headers = (0..1_400)
            .map(|number| (format!("{number}"), HeaderValue::Float(f32::MAX.to_bits())))
            .collect();
        let (left, originals) = plain(rare.clone());
        assert!(left.is_empty());
        assert_eq!(originals, Some(rare));
    }
}

//! A message's properties as a reader of JSON expects them: headers are values. What JSON has no type for (how wide a number
//! is, whether bytes are text) stands beside them, so that the message can still be published again as it was.

use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Map, Value, json};

use crate::domain::delivery::{HeaderValue, Headers, Properties};

/// Properties, where there are some, as [`Plainly`].
pub(super) fn plainly<S: Serializer>(properties: &Option<Properties>, serializer: S) -> Result<S::Ok, S::Error> {
    properties.as_ref().map(Plainly).serialize(serializer)
}

/// Properties with `headers` as plain values and `typedHeaders` as they were received.
struct Plainly<'a>(&'a Properties);

impl Serialize for Plainly<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let named = serde_json::to_value(self.0).map_err(serde::ser::Error::custom)?;
        let Value::Object(named) = named else {
            return Err(serde::ser::Error::custom("properties are an object"));
        };
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in &named {
            match (name.as_str(), &self.0.headers) {
                ("headers", Some(headers)) => {
                    map.serialize_entry("headers", &plain_table(headers))?;
                    map.serialize_entry("typedHeaders", value)?;
                }
                _ => map.serialize_entry(name, value)?,
            }
        }
        map.end()
    }
}

fn plain_table(headers: &Headers) -> Value {
    let entries = headers.iter().map(|(name, value)| (name.clone(), plain(value)));
    Value::Object(entries.collect::<Map<String, Value>>())
}

/// A header as a JSON value: text that is UTF-8 as a string, other bytes in hexadecimal, a decimal as text, times in seconds.
fn plain(value: &HeaderValue) -> Value {
    // JSON has neither infinities nor NaN.
    let number =
        |number: f64| serde_json::Number::from_f64(number).map_or_else(|| json!(number.to_string()), Value::Number);
    match value {
        HeaderValue::Boolean(value) => json!(value),
        HeaderValue::ShortShortInt(value) => json!(value),
        HeaderValue::ShortShortUInt(value) => json!(value),
        HeaderValue::ShortInt(value) => json!(value),
        HeaderValue::ShortUInt(value) => json!(value),
        HeaderValue::LongInt(value) => json!(value),
        HeaderValue::LongUInt(value) => json!(value),
        HeaderValue::LongLongInt(value) => json!(value),
        HeaderValue::Timestamp(seconds) => json!(seconds),
        HeaderValue::Float(bits) => number(f64::from(f32::from_bits(*bits))),
        HeaderValue::Double(bits) => number(f64::from_bits(*bits)),
        HeaderValue::Decimal { scale, value } => json!(decimal(*scale, *value)),
        HeaderValue::LongString(bytes) => match std::str::from_utf8(&bytes.0) {
            Ok(text) => json!(text),
            Err(_) => json!(hex::encode(&bytes.0)),
        },
        HeaderValue::ByteArray(bytes) => json!(hex::encode(&bytes.0)),
        HeaderValue::Array(values) => values.iter().map(plain).collect(),
        HeaderValue::Table(headers) => plain_table(headers),
        HeaderValue::Void => Value::Null,
    }
}

fn decimal(scale: u8, value: u32) -> String {
    let scale = usize::from(scale);
    let digits = format!("{value:0>width$}", width = scale + 1);
    match digits.split_at(digits.len() - scale) {
        (whole, "") => whole.to_owned(),
        (whole, rest) => format!("{whole}.{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::Bytes;

    #[test]
    fn headers_are_values_and_their_types_are_kept() {
        let headers: Headers = [
            ("flag", HeaderValue::Boolean(true)),
            ("tiny", HeaderValue::ShortShortInt(-1)),
            ("wide", HeaderValue::LongLongInt(i64::MIN)),
            ("when", HeaderValue::Timestamp(900)),
            ("half", HeaderValue::Double(0.5_f64.to_bits())),
            ("single", HeaderValue::Float(0.25_f32.to_bits())),
            ("none", HeaderValue::Double(f64::NAN.to_bits())),
            ("price", HeaderValue::Decimal { scale: 2, value: 1234 }),
            ("cent", HeaderValue::Decimal { scale: 2, value: 1 }),
            ("whole", HeaderValue::Decimal { scale: 0, value: 7 }),
            ("text", HeaderValue::text("größer")),
            ("bytes", HeaderValue::LongString(Bytes(vec![0xff, 0x00]))),
            (
                "array",
                HeaderValue::Array(vec![HeaderValue::LongInt(1), HeaderValue::Void]),
            ),
            (
                "table",
                HeaderValue::Table([("x".to_owned(), HeaderValue::text("y"))].into()),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let properties = Properties {
            content_type: Some("application/json".to_owned()),
            headers: Some(headers),
            timestamp: Some(5),
            ..Properties::default()
        };
        let shown = serde_json::to_value(Plainly(&properties)).expect("JSON");
        let expected = json!({
            "flag": true, "tiny": -1, "wide": i64::MIN, "when": 900, "half": 0.5, "single": 0.25, "none": "NaN",
            "price": "12.34", "cent": "0.01", "whole": "7", "text": "größer", "bytes": "ff00", "array": [1, null],
            "table": {"x": "y"},
        });
        assert_eq!(shown["headers"], expected);
        assert_eq!(
            (&shown["content_type"], &shown["timestamp"]),
            (&json!("application/json"), &json!(5))
        );
        let mut again = shown.clone();
        let typed = again
            .as_object_mut()
            .expect("an object")
            .remove("typedHeaders")
            .expect("types");
        again["headers"] = typed;
        let read: Properties = serde_json::from_value(again).expect("properties");
        assert_eq!(read, properties, "nothing is lost");
        let without = Properties::default();
        assert_eq!(serde_json::to_value(Plainly(&without)).expect("JSON"), json!({}));
    }
}

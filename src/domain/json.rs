//! Strict JSON: what serde_json accepts, without duplicate keys, with numbers as their literal text and a bound on depth.
//!
//! `serde_json::Value` will not do: it takes the last of two equal keys silently, turns numbers into doubles, and gives
//! some keys a meaning of its own. Here serde_json's `RawValue` cuts a document into its members, one level at a time,
//! and the rest is done by hand. A member is read once for each level above it, so the bound on depth is what keeps the
//! work proportional to the length.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// How deep objects and arrays may stand in one another; the outermost is depth 1.
pub(crate) const DEPTH_MAX: usize = 16;

const LONE_SURROGATE: &str = "has a lone surrogate in a string";

/// A JSON value that borrows from the text it was read from.
///
/// Equality is by value: strings by code points after unescaping, numbers by their literal text, arrays in order,
/// objects regardless of order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Json<'a> {
    Null,
    Bool(bool),
    /// The literal text: `1`, `1.0` and `1e0` are three numbers.
    Number(&'a str),
    String(Cow<'a, str>),
    Array(Vec<Json<'a>>),
    Object(Object<'a>),
}

/// An object's members, sorted by key, each key once: so that two objects compare member by member, and a search halves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object<'a>(Vec<(Cow<'a, str>, Json<'a>)>);

/// Why a text is refused: a sentence that follows its name ("the body is ..."). Says where, never what stands there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JsonError(Cow<'static, str>);

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'a> Json<'a> {
    /// Reads bytes that hold one JSON document and nothing else but white space.
    pub(crate) fn from_bytes(bytes: &'a [u8]) -> Result<Self, JsonError> {
        let text = std::str::from_utf8(bytes)
            .map_err(|error| JsonError(format!("is not UTF-8 (from byte {})", error.valid_up_to()).into()))?;
        Self::from_text(text)
    }

    /// Reads a text that holds one JSON document and nothing else but white space.
    pub(crate) fn from_text(text: &'a str) -> Result<Self, JsonError> {
        if text.starts_with('\u{feff}') {
            return Err(JsonError("begins with a byte-order mark".into()));
        }
        // Only the outermost pass meets malformed text: it has seen every byte before a member is looked into.
        read(text, 1)
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        if let Json::String(text) = self {
            Some(text)
        } else {
            None
        }
    }

    pub(crate) fn as_object(&self) -> Option<&Object<'a>> {
        if let Json::Object(object) = self {
            Some(object)
        } else {
            None
        }
    }
}

impl<'a> Object<'a> {
    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&Json<'a>> {
        let at = self.0.binary_search_by(|(name, _)| (**name).cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| value)
    }

    /// The members, sorted by key.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Json<'a>)> {
        self.0.iter().map(|(key, value)| (&**key, value))
    }
}

/// Reads one value that stands at a depth. Recursion ends at [`DEPTH_MAX`].
fn read(text: &str, depth: usize) -> Result<Json<'_>, JsonError> {
    match text.bytes().find(|byte| !matches!(byte, b' ' | b'\t' | b'\n' | b'\r')) {
        Some(b'{') => {
            let Members(members) = serde_json::from_str(text).map_err(|error| syntax(&error, depth))?;
            check_depth(depth)?;
            let mut read_members = Vec::with_capacity(members.len());
            for (key, raw) in members {
                read_members.push((key, read(raw.get(), depth.saturating_add(1))?));
            }
            read_members.sort_unstable_by(|(left, _), (right, _)| left.cmp(right));
            if read_members
                .windows(2)
                .any(|pair| matches!(pair, [(left, _), (right, _)] if left == right))
            {
                return Err(JsonError("has the same key twice in one object".into()));
            }
            Ok(Json::Object(Object(read_members)))
        }
        Some(b'[') => {
            let elements: Vec<&RawValue> = serde_json::from_str(text).map_err(|error| syntax(&error, depth))?;
            check_depth(depth)?;
            let mut read_elements = Vec::with_capacity(elements.len());
            for raw in elements {
                read_elements.push(read(raw.get(), depth.saturating_add(1))?);
            }
            Ok(Json::Array(read_elements))
        }
        Some(_) | None => {
            // A member is such a raw value already; only a document that is a lone scalar still has to be cut out.
            let text = if depth == 1 {
                let raw: &RawValue = serde_json::from_str(text).map_err(|error| syntax(&error, depth))?;
                raw.get()
            } else {
                text
            };
            scalar(text)
        }
    }
}

/// Reads a scalar that serde_json has found well-formed, apart from surrogates.
fn scalar(text: &str) -> Result<Json<'_>, JsonError> {
    Ok(match text {
        "null" => Json::Null,
        "true" => Json::Bool(true),
        "false" => Json::Bool(false),
        text => match text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
            None => Json::Number(text),
            Some(inner) if !inner.contains('\\') => Json::String(Cow::Borrowed(inner)),
            Some(_) => {
                let unescaped: String = serde_json::from_str(text).map_err(|_| JsonError(LONE_SURROGATE.into()))?;
                Json::String(Cow::Owned(unescaped))
            }
        },
    })
}

fn check_depth(depth: usize) -> Result<(), JsonError> {
    if depth > DEPTH_MAX {
        return Err(JsonError(format!("is nested deeper than {DEPTH_MAX}").into()));
    }
    Ok(())
}

/// serde_json's syntax errors name what was expected and where; they quote nothing.
fn syntax(error: &serde_json::Error, depth: usize) -> JsonError {
    if depth > 1 {
        // The outermost pass found everything well-formed but surrogates, and the position would be the member's own.
        return JsonError(LONE_SURROGATE.into());
    }
    JsonError(format!("is not well-formed JSON: {error}").into())
}

/// An object's members in the order they came, keys unescaped, values untouched.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                // A message has about 13 keys.
                let mut members = Vec::with_capacity(16);
                while let Some((Key(key), value)) = map.next_entry()? {
                    members.push((key, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(MembersVisitor)
    }
}

/// A key, borrowed where it has no escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E: serde::de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(text)))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn refused(text: &str) -> String {
        match Json::from_text(text) {
            Ok(_) => "accepted".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_json_is() {
        for text in [
            "null",
            " true ",
            "\t\r\n[]\n",
            "{}",
            r#"{"a":1}"#,
            "-0",
            "1e999",
            "123456789012345678901234567890.5E-7",
            r#""\u0000""#,
            r#""😀 \ud83d\ude00 \" \\ \/ \b\f\n\r\t""#,
            "\"\u{feff}\"",
            r#"{"":{"":[]}}"#,
            r#"{"$serde_json::private::RawValue":"1","$serde_json::private::Number":"x"}"#,
            r#"{"a":{"x":1},"b":{"x":1}}"#,
        ] {
            assert_eq!(refused(text), "accepted", "{text}");
        }
    }

    #[test]
    fn what_json_is_not() {
        let lone = LONE_SURROGATE;
        for (text, sentence) in [
            (
                "",
                "is not well-formed JSON: EOF while parsing a value at line 1 column 0",
            ),
            (
                "  ",
                "is not well-formed JSON: EOF while parsing a value at line 1 column 2",
            ),
            (
                "{} {}",
                "is not well-formed JSON: trailing characters at line 1 column 4",
            ),
            (
                "{}\0",
                "is not well-formed JSON: trailing characters at line 1 column 3",
            ),
            (
                "{}\u{feff}",
                "is not well-formed JSON: trailing characters at line 1 column 3",
            ),
            ("\u{feff}{}", "begins with a byte-order mark"),
            (
                " \u{feff}{}",
                "is not well-formed JSON: expected value at line 1 column 2",
            ),
            ("\u{a0}{}", "is not well-formed JSON: expected value at line 1 column 1"),
            (
                "{",
                "is not well-formed JSON: EOF while parsing an object at line 1 column 1",
            ),
            (
                r#"{"a":[1}"#,
                "is not well-formed JSON: expected `,` or `]` at line 1 column 8",
            ),
            (
                r#"{"a":1,}"#,
                "is not well-formed JSON: trailing comma at line 1 column 8",
            ),
            ("[1,]", "is not well-formed JSON: trailing comma at line 1 column 4"),
            (
                r"{a:1}",
                "is not well-formed JSON: key must be a string at line 1 column 2",
            ),
            (
                r#"{"a":NaN}"#,
                "is not well-formed JSON: expected value at line 1 column 6",
            ),
            (
                "{'a':1}",
                "is not well-formed JSON: key must be a string at line 1 column 2",
            ),
            (
                "nul",
                "is not well-formed JSON: EOF while parsing a value at line 1 column 3",
            ),
            (
                r#"{"a":01}"#,
                "is not well-formed JSON: invalid number at line 1 column 7",
            ),
            (
                r#"{"a":+1}"#,
                "is not well-formed JSON: expected value at line 1 column 6",
            ),
            (
                r#"{"a":.5}"#,
                "is not well-formed JSON: expected value at line 1 column 6",
            ),
            (
                r#"{"a":1.}"#,
                "is not well-formed JSON: invalid number at line 1 column 8",
            ),
            (
                r#"{"a":"\x"}"#,
                "is not well-formed JSON: invalid escape at line 1 column 8",
            ),
            (
                "{\"a\":\"\n\"}",
                "is not well-formed JSON: control character (\\u0000-\\u001F) found while parsing a string at line 1 \
                 column 6",
            ),
            (
                "{/**/}",
                "is not well-formed JSON: key must be a string at line 1 column 2",
            ),
            (r#"{"a":1,"a":2}"#, "has the same key twice in one object"),
            (r#"{"a":1,"\u0061":1}"#, "has the same key twice in one object"),
            (r#"{"é":1,"\u00e9":1}"#, "has the same key twice in one object"),
            (r#"{"😀":1,"\uD83D\uDE00":1}"#, "has the same key twice in one object"),
            (
                r#"{"ignored":[{"b":1,"a":1,"b":1}]}"#,
                "has the same key twice in one object",
            ),
            (r#""\ud800""#, lone),
            (r#""\udc00""#, lone),
            (r#""\ud800\ud800""#, lone),
            (r#""\ud800x""#, lone),
            (r#"{"ignored":"\udfff"}"#, lone),
            (r#"{"ignored":[{"x":["\ud83d"]}]}"#, lone),
            (r#"{"ignored":{"\ud800":1}}"#, lone),
            (
                r#"{"\ud800":1}"#,
                "is not well-formed JSON: unexpected end of hex escape at line 1 column 9",
            ),
            (
                r#"{"\udc00":1}"#,
                "is not well-formed JSON: lone leading surrogate in hex escape at line 1 column 8",
            ),
        ] {
            assert_eq!(refused(text), sentence, "{text:?}");
        }
        for (bytes, sentence) in [
            (&b"{\"a\":\"\xff\"}"[..], "is not UTF-8 (from byte 6)"),
            // A surrogate and an overlong form written as bytes.
            (b"\"\xed\xa0\x80\"", "is not UTF-8 (from byte 1)"),
            (b"\"\xc0\x80\"", "is not UTF-8 (from byte 1)"),
            (b"\xef\xbb\xbf{}", "begins with a byte-order mark"),
            (b"\xff\xfe{\0}\0", "is not UTF-8 (from byte 0)"),
        ] {
            assert_eq!(
                Json::from_bytes(bytes).map_err(|error| error.to_string()),
                Err(sentence.to_owned())
            );
        }
    }

    #[test]
    fn depth_has_a_bound() {
        let nested = |open: &str, inner: &str, close: &str, depth| {
            format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
        };
        for (open, inner, close) in [
            ("[", "", "]"),
            ("[", "1", "]"),
            (r#"{"a":"#, "null", "}"),
            (r#"{"a":"#, "\"\"", "}"),
        ] {
            assert_eq!(refused(&nested(open, inner, close, 16)), "accepted");
            assert_eq!(refused(&nested(open, inner, close, 17)), "is nested deeper than 16");
        }
        // Both kinds count, and what stands beside does not.
        let mixed = |inner| nested(r#"{"x":[],"a":["#, inner, "]}", 8);
        assert_eq!(refused(&mixed("1")), "accepted");
        assert_eq!(refused(&mixed("[]")), "is nested deeper than 16");
        assert_eq!(refused(&mixed("{}")), "is nested deeper than 16");
        // As deep as a body can be: no stack is used up.
        assert_eq!(refused(&nested("[", "", "]", 131_000)), "is nested deeper than 16");
        assert_eq!(
            refused(&"[".repeat(262_144)),
            "is not well-formed JSON: EOF while parsing a list at line 1 column 262144"
        );
    }

    #[test]
    fn many_keys_take_little_time() {
        let keys: Vec<String> = (0..50_000).map(|number| format!("\"{number}\":0")).collect();
        assert_eq!(refused(&format!("{{{}}}", keys.join(","))), "accepted");
        assert_eq!(
            refused(&format!("{{{},\"25000\":0}}", keys.join(","))),
            "has the same key twice in one object"
        );
    }

    #[test]
    fn equality_is_by_value() {
        for (left, right, equal) in [
            ("1", "1", true),
            ("1", " 1 ", true),
            ("1", "1.0", false),
            ("1", "1e0", false),
            ("1e0", "1E0", false),
            ("0", "-0", false),
            ("1", "\"1\"", false),
            ("null", "false", false),
            ("null", "\"null\"", false),
            (r#""a""#, r#""\u0061""#, true),
            (r#""\/""#, r#""/""#, true),
            (r#""😀""#, r#""\ud83d\udE00""#, true),
            // Code points, not looks: precomposed and decomposed are two strings.
            (r#""\u00e9""#, r#""e\u0301""#, false),
            (r#""a""#, r#""A""#, false),
            ("[1,2]", "[1 , 2]", true),
            ("[1,2]", "[2,1]", false),
            ("[1]", "[1,1]", false),
            ("[]", "{}", false),
            (
                r#"{"a":1,"b":[{"x":1,"y":2}]}"#,
                r#"{ "b":[{"y":2,"x":1}], "\u0061":1 }"#,
                true,
            ),
            (r#"{"a":1}"#, r#"{"a":1,"b":1}"#, false),
            (r#"{"a":null}"#, "{}", false),
            (r#"{"a":1}"#, r#"{"b":1}"#, false),
        ] {
            let (left_json, right_json) = (Json::from_text(left), Json::from_text(right));
            assert!(left_json.is_ok() && right_json.is_ok());
            assert_eq!(left_json == right_json, equal, "{left} and {right}");
            assert_eq!(right_json == left_json, equal, "{right} and {left}");
        }
    }

    #[test]
    fn strings_without_escapes_are_borrowed() {
        let Ok(Json::Object(object)) = Json::from_text(r#"{"plain":"text","\u0062":"te\u0078t"}"#) else {
            panic!("an object");
        };
        assert!(matches!(object.get("plain"), Some(Json::String(Cow::Borrowed("text")))));
        assert_eq!(object.get("b").and_then(Json::as_str), Some("text"));
        assert_eq!(object.get("c"), None);
        assert_eq!(object.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["b", "plain"]);
    }

    /// A document, without numbers that serde_json would write differently.
    fn documents() -> impl Strategy<Value = Value> {
        let scalar = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        scalar.prop_recursive(6, 48, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    /// The same document with members in reverse, white space, and every UTF-16 unit escaped.
    fn written_oddly(value: &Value) -> String {
        fn string(text: &str) -> String {
            let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04X}")).collect();
            format!("\"{units}\"")
        }
        match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => format!("\n{value}\t"),
            Value::String(text) => string(text),
            Value::Array(elements) => {
                format!(
                    "[ {} ]",
                    elements.iter().map(written_oddly).collect::<Vec<_>>().join(" ,")
                )
            }
            Value::Object(members) => {
                let members = members
                    .iter()
                    .rev()
                    .map(|(key, value)| format!("{} :{}", string(key), written_oddly(value)));
                format!("{{{}}}", members.collect::<Vec<_>>().join(",\r"))
            }
        }
    }

    proptest! {
        #[test]
        fn writing_does_not_change_a_value(document in documents()) {
            let (plain, odd) = (document.to_string(), written_oddly(&document));
            prop_assert!(Json::from_text(&plain).is_ok());
            prop_assert_eq!(Json::from_text(&plain), Json::from_text(&odd));
        }

        #[test]
        fn other_values_are_not_equal(left in documents(), right in documents()) {
            let (left_text, right_text) = (left.to_string(), right.to_string());
            prop_assert_eq!(Json::from_text(&left_text) == Json::from_text(&right_text), left == right);
        }

        #[test]
        fn nothing_panics_and_nothing_is_accepted_that_serde_json_refuses(
            text in r#"([\[\]{},:" ]|"[a-b]":|\\u[dD][89aAcCdD]00|[0-9.eE+-]|null|true|"\PC*"){0,40}"#,
            bytes in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            for bytes in [text.as_bytes(), &bytes] {
                if Json::from_bytes(bytes).is_ok() {
                    prop_assert!(serde_json::from_slice::<&RawValue>(bytes).is_ok());
                }
            }
        }
    }
}

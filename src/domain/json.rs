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

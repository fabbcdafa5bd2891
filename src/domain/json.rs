//! Strict JSON: what serde_json accepts, without duplicate keys, with numbers as their literal text and a bound on depth.
//!
//! `serde_json::Value` will not do: it takes the last of two equal keys silently, turns numbers into doubles, and gives
//! some keys a meaning of its own. Here serde_json says whether a text is well-formed; the rest is looked into where it stands.
//!
//! No tree is made of it: a value may be two bytes of text, and two dozen in memory. An object keeps where its keys begin, four
//! bytes each, and what stands in it is read when it is asked for. A member is read once for each level above it, so the bound on
//! depth is what keeps the work proportional to the length.

mod text;

use std::{borrow::Cow, cmp::Ordering, fmt};

use serde_json::value::RawValue;

use self::text::{Cursor, Text};

/// How deep objects and arrays may stand in one another; the outermost is depth 1.
pub(crate) const DEPTH_MAX: usize = 16;

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
    Array(Array<'a>),
    Object(Object<'a>),
}

/// An array: its text, which was checked.
#[derive(Clone, Debug)]
pub(crate) struct Array<'a>(&'a str);

/// An object: its text, which was checked, and where in it the members begin, sorted by key, each key once: so that two objects
/// compare member by member, and a search halves.
#[derive(Clone, Debug)]
pub(crate) struct Object<'a> {
    text: &'a str,
    members: Vec<u32>,
}

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
        if u32::try_from(text.len()).is_err() {
            return Err(JsonError("is longer than 4 GiB".into()));
        }
        // serde_json's syntax errors name what was expected and where; they quote nothing.
        let document: &RawValue = serde_json::from_str(text)
            .map_err(|error| JsonError(format!("is not well-formed JSON: {error}").into()))?;
        let document = document.get();
        let members = check(document, 1)?;
        Ok(if document.starts_with('{') {
            Json::Object(Object {
                text: document,
                members,
            })
        } else {
            Json::of(document)
        })
    }

    /// A value whose text was checked.
    fn of(text: &'a str) -> Self {
        match text {
            "null" => Json::Null,
            "true" => Json::Bool(true),
            "false" => Json::Bool(false),
            text if text.starts_with('"') => Json::String(Text::of(text).unescaped()),
            text if text.starts_with('[') => Json::Array(Array(text)),
            text if text.starts_with('{') => {
                let places = Cursor::inside(text).members().map(|member| member.at).collect();
                Json::Object(Object {
                    text,
                    members: sorted(text, places),
                })
            }
            text => Json::Number(text),
        }
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

impl<'a> Array<'a> {
    /// The elements, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Json<'a>> {
        Cursor::inside(self.0).elements().map(Json::of)
    }
}

impl PartialEq for Array<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0 || self.iter().eq(other.iter())
    }
}

impl Eq for Array<'_> {}

impl<'a> Object<'a> {
    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<Json<'a>> {
        let at = self
            .members
            .binary_search_by(|at| Cursor::at(self.text, *at).cmp_plain(key))
            .ok()?;
        let member = Cursor::at(self.text, *self.members.get(at)?).member()?;
        Some(Json::of(member.value))
    }

    /// The members, sorted by key.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Cow<'a, str>, Json<'a>)> {
        let text = self.text;
        let each = self.members.iter();
        each.filter_map(move |at| Cursor::at(text, *at).member())
            .map(|member| (member.key.unescaped(), Json::of(member.value)))
    }
}

impl PartialEq for Object<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text || (self.members.len() == other.members.len() && self.iter().eq(other.iter()))
    }
}

impl Eq for Object<'_> {}

/// The order of two members, by their keys.
fn by_key(text: &str, left: u32, right: u32) -> Ordering {
    Cursor::at(text, left).cmp_string(Cursor::at(text, right))
}

/// Members in the order of their keys.
fn sorted(text: &str, mut members: Vec<u32>) -> Vec<u32> {
    members.sort_unstable_by(|left, right| by_key(text, *left, *right));
    members
}

/// Whether a well-formed value that stands at a depth is one of ours; if it is an object, its members in order. Recursion ends at
/// [`DEPTH_MAX`].
fn check(value: &str, depth: usize) -> Result<Vec<u32>, JsonError> {
    let below = depth.saturating_add(1);
    if value.starts_with(['{', '[']) && depth > DEPTH_MAX {
        return Err(JsonError(format!("is nested deeper than {DEPTH_MAX}").into()));
    }
    let mut members = Vec::new();
    if value.starts_with('{') {
        for member in Cursor::inside(value).members() {
            check_text(member.key)?;
            check(member.value, below)?;
            members.push(member.at);
        }
        members = sorted(value, members);
        if members
            .windows(2)
            .any(|pair| matches!(pair, [left, right] if by_key(value, *left, *right).is_eq()))
        {
            return Err(JsonError("has the same key twice in one object".into()));
        }
    } else if value.starts_with('[') {
        for element in Cursor::inside(value).elements() {
            check(element, below)?;
        }
    } else if value.starts_with('"') {
        check_text(Text::of(value))?;
    }
    Ok(members)
}

/// serde_json has found its escapes well-formed, apart from surrogates.
fn check_text(text: Text<'_>) -> Result<(), JsonError> {
    if text.has_lone_surrogate() {
        return Err(JsonError("has a lone surrogate in a string".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

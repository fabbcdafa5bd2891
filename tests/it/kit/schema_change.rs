//! Whether a schema may take the place of another one without breaking anybody who reads or writes what it describes.
//!
//! It compares keyword by keyword and proves little: what it does not understand counts as a break. That is meant.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::contract::types;

/// Who writes what a schema describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writer {
    /// Others: what was right before must stay right.
    Others,
    /// We: what is written now must be what was promised before.
    Ours,
}

/// What breaks when `after` takes the place of `before`. Both stand alone, see `contract::whole`.
pub(crate) fn breaks(writer: Writer, before: &Value, after: &Value) -> Vec<String> {
    let mut found = Vec::new();
    match writer {
        Writer::Others => fits(before, after, "", &mut found),
        Writer::Ours => fits(after, before, "", &mut found),
    }
    found
}

/// Keywords that explain and do not judge.
const SILENT: [&str; 12] = [
    "description",
    "title",
    "$schema",
    "$id",
    "$defs",
    "x-known",
    "format",
    "contentMediaType",
    "contentEncoding",
    "contentSchema",
    "examples",
    "default",
];

/// Whether every value of `narrow` is one of `wide`.
fn fits(narrow: &Value, wide: &Value, at: &str, found: &mut Vec<String>) {
    let (narrow, wide) = match (narrow, wide) {
        (_, Value::Bool(true)) | (Value::Bool(false), _) => return,
        (_, Value::Bool(false)) => return no(found, at, "nothing is allowed there any more".to_owned()),
        (Value::Bool(true), wide) => (&Map::new(), wide.as_object()),
        (narrow, wide) => match narrow.as_object() {
            Some(narrow) => (narrow, wide.as_object()),
            None => return no(found, at, "is no schema".to_owned()),
        },
    };
    let Some(wide) = wide else {
        return no(found, at, "is no schema".to_owned());
    };
    let wide_judges: Vec<&String> = wide.keys().filter(|key| !SILENT.contains(&key.as_str())).collect();
    for key in wide_judges {
        let (theirs, ours) = (&wide[key], narrow.get(key));
        match key.as_str() {
            "type" => {
                let ours = type_of(narrow);
                if ours.is_empty() || !ours.is_subset(&types(theirs)) {
                    no(found, at, format!("type {ours:?} against {theirs}"));
                }
            }
            "const" | "enum" => {
                let allowed = values(wide).unwrap_or_default();
                match values(narrow) {
                    Some(ours) if ours.iter().all(|value| allowed.contains(value)) => {}
                    ours => no(found, at, format!("values {ours:?} against {allowed:?}")),
                }
            }
            "required" => {
                let ours = names(ours);
                for name in names(Some(theirs)).difference(&ours) {
                    no(found, at, format!("{name} is not always there"));
                }
            }
            "properties" => {
                let ours = ours.and_then(Value::as_object);
                for (name, theirs) in theirs.as_object().into_iter().flatten() {
                    let place = format!("{at}/{name}");
                    match ours.and_then(|ours| ours.get(name)) {
                        Some(ours) => fits(ours, theirs, &place, found),
                        // Whatever its name, anything may stand there.
                        None => found.push(format!("{place}: nothing is said of it")),
                    }
                }
                continue;
            }
            "items" => {
                let anything = Value::Bool(true);
                fits(ours.unwrap_or(&anything), theirs, &format!("{at}/[]"), found);
                continue;
            }
            "minLength" | "minItems" | "minimum" => {
                if number(ours).is_none_or(|ours| Some(ours) < number(Some(theirs))) {
                    no(found, at, format!("{key} {ours:?} against {theirs}"));
                }
            }
            "maxLength" | "maxItems" | "maximum" => {
                if number(ours).is_none_or(|ours| Some(ours) > number(Some(theirs))) {
                    no(found, at, format!("{key} {ours:?} against {theirs}"));
                }
            }
            "oneOf" | "anyOf" => {
                let branches = theirs.as_array().cloned().unwrap_or_default();
                let alone = [Value::Object(narrow.clone())];
                let ours: &[Value] = match narrow.get("oneOf").or_else(|| narrow.get("anyOf")) {
                    Some(Value::Array(ours)) => ours,
                    _ => &alone,
                };
                for (number, branch) in ours.iter().enumerate() {
                    let has_place = branches.iter().any(|theirs| {
                        let mut misses = Vec::new();
                        fits(branch, theirs, at, &mut misses);
                        misses.is_empty()
                    });
                    if !has_place {
                        no(found, at, format!("branch {number} has no place"));
                    }
                }
            }
            _ if ours == Some(theirs) => {}
            // A constant needs no pattern to be as the pattern wants it.
            "pattern" if values(narrow).is_some() => {}
            _ => no(found, at, format!("{key} {ours:?} against {theirs}")),
        }
    }
}

fn no(found: &mut Vec<String>, at: &str, why: String) {
    found.push(format!("{}: {why}", if at.is_empty() { "/" } else { at }));
}

fn number(value: Option<&Value>) -> Option<f64> {
    value.and_then(Value::as_f64)
}

fn names(value: Option<&Value>) -> BTreeSet<&str> {
    let list = value.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).collect()
}

/// The values that are allowed, where they are listed.
fn values(schema: &Map<String, Value>) -> Option<Vec<&Value>> {
    if let Some(one) = schema.get("const") {
        return Some(vec![one]);
    }
    schema
        .get("enum")
        .and_then(Value::as_array)
        .map(|all| all.iter().collect())
}

/// The types, also where only values are listed.
fn type_of(schema: &Map<String, Value>) -> BTreeSet<&str> {
    if let Some(said) = schema.get("type") {
        return types(said);
    }
    let of = |value: &&Value| match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    values(schema).into_iter().flatten().map(|value| of(&value)).collect()
}

//! Every setting with what may stand there, read off the settings themselves: defaults and words from `config/default.toml`,
//! bounds from the types, which are asked with a value that can not be right.

use serde::Serialize;
use toml::Value;

use super::{
    ConfigError, DEFAULTS, Origin,
    fields::parse_duration,
    layers::{Layers, split, variable_of},
};

/// One setting, for who looks it up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reference {
    /// `worker.lanes`.
    pub setting: String,
    /// `SETTLED_WORKER__LANES`.
    pub variable: String,
    /// What it is: `whole number`, `number`, `true or false`, `duration`, `text` or `list of texts`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub default: serde_json::Value,
    /// What the type wants of a value: `from 1 to 16`. None where any will do.
    pub bounds: Option<String>,
    /// What it is for, in the words of `config/default.toml`.
    pub text: String,
}

/// Every setting, in the order of the list.
///
/// # Errors
/// The compiled-in list is broken.
pub fn reference() -> Result<Vec<Reference>, ConfigError> {
    let layers = Layers::new()?;
    let mut section = String::new();
    let mut words: Vec<&str> = Vec::new();
    let mut all = Vec::new();
    for line in DEFAULTS.lines() {
        if let Some(comment) = line.strip_prefix('#') {
            words.push(comment.trim());
            continue;
        }
        let text = std::mem::take(&mut words);
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            name.clone_into(&mut section);
            continue;
        }
        let Some((name, _)) = line.split_once(" = ") else {
            continue;
        };
        let setting = if section.is_empty() {
            name.to_owned()
        } else {
            format!("{section}.{name}")
        };
        let Some(default) = layers.default_of(&setting) else {
            continue;
        };
        all.push(Reference {
            variable: variable_of(&setting),
            kind: kind(default),
            default: as_json(default),
            bounds: bounds(&setting, default),
            text: text.join(" "),
            setting,
        });
    }
    Ok(all)
}

fn kind(default: &Value) -> &'static str {
    match default {
        Value::Integer(_) => "whole number",
        Value::Float(_) => "number",
        Value::Boolean(_) => "true or false",
        Value::Array(_) => "list of texts",
        Value::String(text) if parse_duration(text).is_some() => "duration",
        Value::String(_) | Value::Datetime(_) | Value::Table(_) => "text",
    }
}

fn as_json(default: &Value) -> serde_json::Value {
    match default {
        Value::Integer(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Boolean(truth) => (*truth).into(),
        Value::Array(items) => items.iter().map(as_json).collect(),
        Value::String(text) => text.as_str().into(),
        Value::Datetime(_) | Value::Table(_) => default.type_str().into(),
    }
}

/// No setting takes it.
const NEVER: &str = "\u{1}";

/// What the setting's own check says of a value that can not be right.
fn bounds(setting: &str, default: &Value) -> Option<String> {
    let wrong = match default {
        Value::Integer(_) => i64::MIN.to_string(),
        Value::Float(_) => "1e300".to_owned(),
        Value::Boolean(_) => return None,
        Value::String(text) if parse_duration(text).is_some() => "1000000h".to_owned(),
        Value::String(_) | Value::Array(_) | Value::Datetime(_) | Value::Table(_) => NEVER.repeat(4_096),
    };
    let mut layers = Layers::new().ok()?;
    let refused = layers.lay_text(split(setting), wrong, Origin::Flag).err()?;
    let message = refused.message();
    let (_, why) = message
        .rsplit_once("must ")
        .or_else(|| message.rsplit_once("expected "))?;
    let why = why.strip_suffix(&format!(" ({})", Origin::Flag)).unwrap_or(why);
    Some(why.strip_prefix("be ").unwrap_or(why).replace('`', ""))
}

//! Which of default, file, environment and flag has the word, setting by setting.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use strsim::levenshtein;
use toml::{Table, Value, de::DeTable, de::DeValue};

use super::{
    ConfigError, DEFAULTS, PREFIX, Settings, ShownSetting,
    fields::{in_words, items, parse_duration},
    secret::{Secret, repeated},
};

pub(super) const SEE_LIST: &str = "`settled config reference` lists every setting";

/// Where a value was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Origin {
    Default,
    File {
        name: PathBuf,
        line: usize,
    },
    #[serde(rename = "environment")]
    Variable {
        name: String,
    },
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { name, line } => write!(f, "{}, line {line}", name.display()),
            Origin::Variable { name } => write!(f, "environment variable {name}"),
            Origin::Flag => f.write_str("command line"),
        }
    }
}

/// Variables that have names of their own, the setting that they set, and whether they name a file that holds it.
const SPECIAL: [(&str, &str, bool); 15] = [
    ("DATABASE_URL", "database.url", false),
    ("DATABASE_URL_FILE", "database.url", true),
    ("DATABASE__URL", "database.url", false),
    ("MIGRATE_DATABASE_URL", "database.migrate_url", false),
    ("MIGRATE_DATABASE_URL_FILE", "database.migrate_url", true),
    ("DATABASE__MIGRATE_URL", "database.migrate_url", false),
    ("TARGET_DATABASE_URL", "database.target_url", false),
    ("TARGET_DATABASE_URL_FILE", "database.target_url", true),
    ("DATABASE__TARGET_URL", "database.target_url", false),
    ("BROKER_URL", "broker.url", false),
    ("BROKER_URL_FILE", "broker.url", true),
    ("BROKER__URL", "broker.url", false),
    ("BROKER_MANAGEMENT_URL", "broker.management_url", false),
    ("BROKER_MANAGEMENT_URL_FILE", "broker.management_url", true),
    ("BROKER__MANAGEMENT_URL", "broker.management_url", false),
];

/// The merged table, and who said what.
pub(super) struct Layers {
    defaults: Table,
    merged: Table,
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    pub(super) fn new() -> Result<Self, ConfigError> {
        let defaults: Table = DEFAULTS.parse().map_err(|error: toml::de::Error| {
            ConfigError::new(
                format!("the compiled-in defaults are broken: {}", error.message()),
                SEE_LIST,
            )
        })?;
        Ok(Layers {
            merged: defaults.clone(),
            defaults,
            origins: BTreeMap::new(),
        })
    }

    pub(super) fn lay_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            ConfigError::new(
                format!(
                    "cannot read the settings file {}: {error}",
                    repeated(&path.display().to_string())
                ),
                "name an existing TOML file in UTF-8 with --config, or leave --config out",
            )
        })?;
        // The parser's own rendering quotes the offending line, which may hold a password.
        let broken = |error: &toml::de::Error| {
            let line = error.span().map_or(1, |span| line_of(&text, span.start));
            ConfigError::new(
                format!(
                    "{}, line {line}: {}",
                    path.display(),
                    error.message().replace('\n', ", ")
                ),
                "the file must be TOML in the shape of config/default.toml",
            )
        };
        let spanned = DeTable::parse(&text).map_err(|error| broken(&error))?;
        let values: Table = text.parse().map_err(|error| broken(&error))?;
        let mut said = Vec::new();
        flatten(spanned.get_ref(), &values, &mut Vec::new(), &mut said);
        said.sort_by_key(|(_, _, start)| *start);
        for (key, value, start) in said {
            self.lay(
                key,
                value,
                Origin::File {
                    name: path.to_owned(),
                    line: line_of(&text, start),
                },
            )?;
        }
        Ok(())
    }

    pub(super) fn lay_environment(
        &mut self,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<(), ConfigError> {
        let mut urls: BTreeMap<&str, (String, String)> = BTreeMap::new();
        // Sorted, so that the same environment always gives the same first error.
        let variables: BTreeMap<String, String> = variables.filter(|(name, _)| name.starts_with(PREFIX)).collect();
        for (name, text) in variables {
            let plain = name.strip_prefix(PREFIX).unwrap_or_default();
            let special = SPECIAL.into_iter().find(|(variable, ..)| *variable == plain);
            let Some((_, key, in_file)) = special else {
                self.lay_variable(&name, plain, text)?;
                continue;
            };
            // `SETTLED_DATABASE_URL=${DATABASE_URL:-}` in a compose file means nothing was said.
            if text.is_empty() {
                continue;
            }
            if let Some((other, _)) = urls.get(key) {
                return Err(ConfigError::new(
                    format!("{other} and {name} both set {key}"),
                    "leave one of them out: which should win would be a guess",
                ));
            }
            let url = if in_file { read_url(&name, &text)? } else { text };
            urls.insert(key, (name, url));
        }
        for (key, (name, url)) in urls {
            self.lay(split(key), Value::String(url), Origin::Variable { name })?;
        }
        Ok(())
    }

    /// The compiled-in value of a setting.
    pub(super) fn default_of(&self, setting: &str) -> Option<&Value> {
        find(&self.defaults, &split(setting))
    }

    fn lay_variable(&mut self, name: &str, plain: &str, text: String) -> Result<(), ConfigError> {
        let key = split(&plain.to_ascii_lowercase().replace("__", "."));
        // Without a section it is one of ours only if it names a setting: scripts and tests have variables too.
        let ours = plain.contains("__") || find(&self.defaults, &key).is_some_and(|value| !value.is_table());
        if !ours {
            return match self.meant(plain) {
                None => Ok(()),
                Some(meant) => Err(ConfigError::new(
                    format!("no setting is called {name} (environment variable)"),
                    format!("did you mean {meant}? {SEE_LIST}"),
                )),
            };
        }
        let origin = Origin::Variable { name: name.to_owned() };
        if plain != plain.to_ascii_uppercase() {
            return Err(self.unknown(&key, &origin));
        }
        self.lay_text(key, text, origin)
    }

    /// The variable that somebody may have meant by a name that is none of ours: one underscore for two, or a slip.
    fn meant(&self, plain: &str) -> Option<String> {
        const SLIPS: usize = 2;
        let mut known = Vec::new();
        leaves(&self.defaults, &mut Vec::new(), &mut known);
        let known = known
            .iter()
            .map(|key| variable_of(key))
            .chain(SPECIAL.into_iter().map(|(name, ..)| format!("{PREFIX}{name}")));
        let loosely = |name: &str| name.to_ascii_uppercase().replace("__", "_");
        let typed = loosely(&format!("{PREFIX}{plain}"));
        known
            .map(|name| (levenshtein(&loosely(&name), &typed), name))
            .filter(|(slips, _)| *slips <= SLIPS)
            .min()
            .map(|(_, name)| name)
    }

    /// Every setting's value as it counts, and who has the word.
    pub(super) fn told(&self) -> Vec<ShownSetting> {
        let mut known = Vec::new();
        leaves(&self.defaults, &mut Vec::new(), &mut known);
        known
            .into_iter()
            .filter_map(|setting| {
                let value = find(&self.merged, &split(&setting))?;
                let from = self.origins.get(&setting).cloned().unwrap_or(Origin::Default);
                Some(ShownSetting {
                    value: match value.as_str() {
                        Some(url) if setting.ends_with("url") => Secret::new(url).redacted().into(),
                        _ => redacted(value),
                    },
                    setting,
                    from,
                    derived: None,
                })
            })
            .collect()
    }

    /// Text becomes what the default is: a string stays one even if it looks like a number.
    pub(super) fn lay_text(&mut self, key: Vec<String>, text: String, origin: Origin) -> Result<(), ConfigError> {
        let value = match find(&self.defaults, &key) {
            Some(Value::Integer(_)) => text.trim().parse().ok().map(Value::Integer),
            Some(Value::Boolean(_)) => text.trim().parse().ok().map(Value::Boolean),
            Some(Value::Float(_)) => text.trim().parse().ok().map(Value::Float),
            Some(Value::Array(_)) => Some(Value::Array(items(&text))),
            Some(Value::String(_) | Value::Datetime(_) | Value::Table(_)) | None => Some(Value::String(text.clone())),
        };
        match value {
            Some(value) => self.lay(key, value, origin),
            None => Err(self.wrong_type(&key, &format!("{:?}", repeated(&text)), &origin)),
        }
    }

    fn lay(&mut self, key: Vec<String>, mut value: Value, origin: Origin) -> Result<(), ConfigError> {
        let name = key.join(".");
        let Some(default) = find(&self.defaults, &key) else {
            return Err(self.unknown(&key, &origin));
        };
        if default.is_table() {
            return Err(ConfigError::new(
                format!("`{name}` is a section, not a setting ({origin})"),
                format!("name a setting in it, such as `{name}.{}`", first_key(default)),
            ));
        }
        if let (Value::Float(_), Value::Integer(whole)) = (default, &value) {
            value = Value::Float(*whole as f64);
        }
        if !default.same_type(&value) {
            return Err(self.wrong_type(&key, &format!("a value of type {}", value.type_str()), &origin));
        }
        let said = if name.ends_with("url") {
            String::new()
        } else {
            format!(" = {}", shown(&value))
        };
        let is_secret = value.as_str().is_some_and(|text| repeated(text) != text);
        if let Some(slot) = find_mut(&mut self.merged, &key) {
            *slot = value;
        }
        if let Err(mut why) = self.settings() {
            if is_secret {
                // What reads a setting may repeat what it read.
                why = "it can not be that".to_owned();
            }
            return Err(ConfigError::new(format!("`{name}`{said}: {why} ({origin})"), SEE_LIST));
        }
        self.origins.insert(name, origin);
        Ok(())
    }

    pub(super) fn settings(&self) -> Result<Settings, String> {
        Settings::deserialize(self.merged.clone()).map_err(|error| error.message().to_owned())
    }

    /// Settings that are right alone and wrong together.
    pub(super) fn agree(&self, settings: &Settings) -> Result<(), ConfigError> {
        let Settings {
            database,
            worker,
            park,
            retry,
            ..
        } = settings;
        let ordered: [(&str, Duration, &str, Duration); 4] = [
            (
                "held.first_retry",
                settings.held.first_retry,
                "held.max_interval",
                settings.held.max_interval,
            ),
            (
                "database.statement_timeout",
                database.statement_timeout,
                "database.client_deadline",
                database.client_deadline,
            ),
            (
                "park.first_retry",
                park.first_retry,
                "park.max_interval",
                park.max_interval,
            ),
            ("retry.initial", retry.initial, "retry.max", retry.max),
        ];
        for (low, low_value, high, high_value) in ordered {
            if low_value > high_value {
                return Err(ConfigError::new(
                    format!(
                        "`{low}` ({}, {}) is longer than `{high}` ({}, {})",
                        in_words(low_value),
                        self.said_by(low),
                        in_words(high_value),
                        self.said_by(high)
                    ),
                    format!("lower `{low}` or raise `{high}`"),
                ));
            }
        }
        if database.pool_size != 0 && database.pool_size <= worker.lanes {
            return Err(ConfigError::new(
                format!(
                    "`database.pool_size` ({}, {}) leaves no connection beside those of {} lanes",
                    database.pool_size,
                    self.said_by("database.pool_size"),
                    worker.lanes
                ),
                "set it to 0, which means worker.lanes + 4",
            ));
        }
        let schemes: [(&str, &Secret, &[&str], &str); 5] = [
            (
                "broker.management_url",
                &settings.broker.management_url,
                &["http://", "https://"],
                "https:// or http://",
            ),
            (
                "broker.url",
                &settings.broker.url,
                &["amqp://", "amqps://"],
                "amqp:// or amqps://",
            ),
            (
                "database.migrate_url",
                &database.migrate_url,
                &["postgres://", "postgresql://"],
                "postgres:// or be key=value pairs",
            ),
            (
                "database.target_url",
                &database.target_url,
                &["postgres://", "postgresql://"],
                "postgres:// or be key=value pairs",
            ),
            (
                "database.url",
                &database.url,
                &["postgres://", "postgresql://"],
                "postgres:// or be key=value pairs",
            ),
        ];
        for (key, url, accepted, words) in schemes {
            let pairs = key.starts_with("database.") && !url.expose().contains("://") && url.expose().contains('=');
            if !url.is_empty() && !pairs && !accepted.iter().any(|scheme| url.expose().starts_with(scheme)) {
                return Err(ConfigError::new(
                    format!("`{key}` must begin with {words} ({})", self.said_by(key)),
                    "check the beginning of the URL; it is not shown here because it may hold a password",
                ));
            }
        }
        Ok(())
    }

    fn said_by(&self, key: &str) -> String {
        self.origins
            .get(key)
            .map_or_else(|| "default".to_owned(), Origin::to_string)
    }

    fn unknown(&self, key: &[String], origin: &Origin) -> ConfigError {
        let mut known = Vec::new();
        leaves(&self.defaults, &mut Vec::new(), &mut known);
        let typed = key.join(".");
        let name = repeated(&typed);
        let leaf = key.last().map_or("", String::as_str);
        let nearest = known
            .into_iter()
            .min_by_key(|candidate| {
                // The right setting in the wrong section is nearer than a similar word.
                let same_leaf = candidate.rsplit('.').next() == Some(leaf);
                let apart = levenshtein(name, candidate);
                // Several sections may have it: then the one whose name is nearest.
                (if same_leaf { 1 } else { apart }, apart)
            })
            .unwrap_or_default();
        let nearest = match origin {
            Origin::Variable { .. } => variable_of(&nearest),
            Origin::Default | Origin::File { .. } | Origin::Flag => format!("`{nearest}`"),
        };
        ConfigError::new(
            format!("unknown setting `{name}` ({origin})"),
            format!("the nearest known one is {nearest}; {SEE_LIST}"),
        )
    }

    fn wrong_type(&self, key: &[String], got: &str, origin: &Origin) -> ConfigError {
        let name = key.join(".");
        let expected = match find(&self.defaults, key) {
            Some(Value::Integer(_)) => "a whole number".to_owned(),
            Some(Value::Float(_)) => "a number".to_owned(),
            Some(Value::Boolean(_)) => "true or false".to_owned(),
            Some(Value::String(text)) if parse_duration(text).is_some() => {
                format!("a duration with its unit, such as \"{text}\"")
            }
            Some(Value::String(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_)) | None => "text".to_owned(),
        };
        ConfigError::new(format!("`{name}` must be {expected}, not {got} ({origin})"), SEE_LIST)
    }
}

pub(super) fn split(key: &str) -> Vec<String> {
    key.split('.').map(str::to_owned).collect()
}

pub(super) fn variable_of(key: &str) -> String {
    match key {
        "database.url" => "SETTLED_DATABASE_URL".to_owned(),
        "database.migrate_url" => "SETTLED_MIGRATE_DATABASE_URL".to_owned(),
        "database.target_url" => "SETTLED_TARGET_DATABASE_URL".to_owned(),
        "broker.url" => "SETTLED_BROKER_URL".to_owned(),
        "broker.management_url" => "SETTLED_BROKER_MANAGEMENT_URL".to_owned(),
        key => format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase()),
    }
}

fn find<'t>(table: &'t Table, key: &[String]) -> Option<&'t Value> {
    let (first, rest) = key.split_first()?;
    rest.iter()
        .try_fold(table.get(first)?, |value, part| value.as_table()?.get(part))
}

fn find_mut<'t>(table: &'t mut Table, key: &[String]) -> Option<&'t mut Value> {
    let (first, rest) = key.split_first()?;
    rest.iter()
        .try_fold(table.get_mut(first)?, |value, part| value.as_table_mut()?.get_mut(part))
}

fn first_key(section: &Value) -> &str {
    section
        .as_table()
        .and_then(|table| table.keys().next())
        .map_or("", String::as_str)
}

pub(super) fn leaves(table: &Table, path: &mut Vec<String>, found: &mut Vec<String>) {
    for (key, value) in table {
        path.push(key.clone());
        match value.as_table() {
            Some(section) => leaves(section, path, found),
            None => found.push(path.join(".")),
        }
        path.pop();
    }
}

/// Every value of a file with its path and where its key stands. An empty section counts as a value, so that its name
/// is looked at.
fn flatten(spans: &DeTable<'_>, values: &Table, path: &mut Vec<String>, said: &mut Vec<(Vec<String>, Value, usize)>) {
    for (key, span) in spans {
        let Some(value) = values.get(key.get_ref().as_ref()) else {
            continue;
        };
        path.push(key.get_ref().to_string());
        match (span.get_ref(), value) {
            (DeValue::Table(inner), Value::Table(table)) if !table.is_empty() => flatten(inner, table, path, said),
            _ => said.push((path.clone(), value.clone(), key.span().start)),
        }
        path.pop();
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

fn read_url(variable: &str, path: &str) -> Result<String, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        ConfigError::new(
            format!("cannot read the file {} that {variable} names: {error}", repeated(path)),
            "it must be a readable text file that holds the URL and nothing else",
        )
    })?;
    let url = text.trim();
    if url.is_empty() {
        return Err(ConfigError::new(
            format!("the file {path} that {variable} names is empty"),
            "it must hold the URL and nothing else",
        ));
    }
    Ok(url.to_owned())
}

pub(super) fn host_name() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    [kernel, std::env::var("HOSTNAME").ok()]
        .into_iter()
        .flatten()
        .map(|name| name.trim().chars().take(100).collect::<String>())
        .find(|name| !name.is_empty())
        .unwrap_or_else(|| "worker".to_owned())
}

/// A value for people: of what looks like a URL or a connection string, only what is harmless.
fn redacted(value: &Value) -> serde_json::Value {
    match value {
        Value::String(text) if repeated(text) != text => Secret::new(text.as_str()).redacted().into(),
        Value::String(text) => text.as_str().into(),
        Value::Integer(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Boolean(truth) => (*truth).into(),
        Value::Array(items) => items
            .iter()
            .map(|item| match item.as_str() {
                // Names of users, which may well hold an @.
                Some(text) if !text.contains("://") => text.into(),
                _ => redacted(item),
            })
            .collect(),
        Value::Datetime(_) | Value::Table(_) => value.type_str().into(),
    }
}

/// How a value is shown in a sentence.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{:?}", repeated(text).chars().take(80).collect::<String>()),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(flag) => flag.to_string(),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => value.type_str().to_owned(),
    }
}

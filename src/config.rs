//! Typed settings: compiled-in defaults, under a file, under the environment, under flags.
//!
//! `config/default.toml` is the list: a key that does not stand there is refused wherever it comes from, by name and
//! place. Every assignment is checked when it is laid on, so that a wrong value is always said with where it came from.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, de::Error as _};
use toml::{Table, Value, de::DeTable, de::DeValue};

/// The commented list of every setting, as compiled in.
pub const DEFAULTS: &str = include_str!("../config/default.toml");

/// Everything someone may change. [`Settings::load`] is the door.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub allow_plaintext: bool,
    pub database: DatabaseSettings,
    pub broker: BrokerSettings,
    pub worker: WorkerSettings,
    pub park: ParkSettings,
    pub held: HeldSettings,
    pub outbox: OutboxSettings,
    pub retry: RetrySettings,
    pub events: EventSettings,
    pub http: HttpSettings,
    pub dead_letters: DeadLetterSettings,
    pub log: LogSettings,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatabaseSettings {
    /// A URL or key=value pairs; empty if nobody said. [`Settings::database_url`] insists.
    pub url: Secret,
    #[serde(deserialize_with = "optional_path")]
    pub ca_file: Option<PathBuf>,
    /// Never 0 after loading.
    #[serde(deserialize_with = "within::<0, 100, _, _>")]
    pub pool_size: usize,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub connect_timeout: Duration,
    #[serde(deserialize_with = "lasting::<10, HOUR, _>")]
    pub statement_timeout: Duration,
    #[serde(deserialize_with = "lasting::<10, HOUR, _>")]
    pub lock_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub idle_in_transaction_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub client_deadline: Duration,
    #[serde(deserialize_with = "lasting::<10, { 5 * MINUTE }, _>")]
    pub acquire_timeout: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerSettings {
    /// Empty if nobody said. [`Settings::broker_url`] insists.
    pub url: Secret,
    #[serde(deserialize_with = "optional_path")]
    pub ca_file: Option<PathBuf>,
    /// Whole seconds, as AMQP has it.
    #[serde(deserialize_with = "whole_seconds::<1000, { 5 * MINUTE }, _>")]
    pub heartbeat: Duration,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub connect_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, { 10 * MINUTE }, _>")]
    pub publish_deadline: Duration,
    #[serde(deserialize_with = "texts::<100, 255, _>")]
    pub trusted_users: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerSettings {
    /// Never empty after loading.
    #[serde(deserialize_with = "short_text::<0, 128, _>")]
    pub name: String,
    #[serde(deserialize_with = "within::<1, 16, _, _>")]
    pub lanes: usize,
    #[serde(deserialize_with = "within::<1, 2000, _, _>")]
    pub prefetch: u16,
    #[serde(deserialize_with = "within::<1, 2000, _, _>")]
    pub batch_max: usize,
    #[serde(deserialize_with = "within::<1024, 268_435_456, _, _>")]
    pub batch_max_bytes: usize,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub drain_deadline: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub pause_release: Duration,
    #[serde(deserialize_with = "within::<1, 1000, _, _>")]
    pub culprits_per_minute: usize,
    #[serde(deserialize_with = "lasting::<10, MINUTE, _>")]
    pub lock_patience: Duration,
    #[serde(deserialize_with = "within::<0, 1_000_000, _, _>")]
    pub partner_rate: u32,
    #[serde(deserialize_with = "within::<0, 256, _, _>")]
    pub own_queues_max: usize,
    #[serde(deserialize_with = "lasting::<100, { 10 * MINUTE }, _>")]
    pub own_queue_poll: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParkSettings {
    #[serde(deserialize_with = "lasting::<100, { 720 * HOUR }, _>")]
    pub deadline: Duration,
    #[serde(deserialize_with = "within::<0, 10_000_000, _, _>")]
    pub max_per_partner: u32,
    #[serde(deserialize_with = "within::<0, 1_099_511_627_776, _, _>")]
    pub max_bytes: u64,
    #[serde(deserialize_with = "within::<0, 1_099_511_627_776, _, _>")]
    pub max_bytes_per_partner: u64,
    #[serde(deserialize_with = "lasting::<10, HOUR, _>")]
    pub first_retry: Duration,
    #[serde(deserialize_with = "lasting::<10, { 24 * HOUR }, _>")]
    pub max_interval: Duration,
    #[serde(deserialize_with = "lasting::<10, MINUTE, _>")]
    pub poll: Duration,
    #[serde(deserialize_with = "lasting::<1000, HOUR, _>")]
    pub lease: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldSettings {
    #[serde(deserialize_with = "within::<0, 100_000_000, _, _>")]
    pub max_messages: u64,
    #[serde(deserialize_with = "within::<0, 100_000_000, _, _>")]
    pub max_messages_per_partner: u64,
    #[serde(deserialize_with = "within::<0, 1_099_511_627_776, _, _>")]
    pub max_bytes: u64,
    #[serde(deserialize_with = "within::<0, 1_099_511_627_776, _, _>")]
    pub max_bytes_per_partner: u64,
    #[serde(deserialize_with = "lasting::<1000, { 24 * HOUR }, _>")]
    pub others_within: Duration,
    #[serde(deserialize_with = "tenths::<1, 10, _>")]
    pub share: f64,
    #[serde(deserialize_with = "lasting::<10, MINUTE, _>")]
    pub poll: Duration,
    #[serde(deserialize_with = "lasting::<1000, HOUR, _>")]
    pub lease: Duration,
    #[serde(deserialize_with = "lasting::<10, HOUR, _>")]
    pub first_retry: Duration,
    #[serde(deserialize_with = "lasting::<10, HOUR, _>")]
    pub max_interval: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutboxSettings {
    #[serde(deserialize_with = "lasting::<1000, HOUR, _>")]
    pub lease: Duration,
    #[serde(deserialize_with = "lasting::<10, HOUR, _>")]
    pub relay_interval: Duration,
    #[serde(deserialize_with = "lasting::<1, MINUTE, _>")]
    pub idle_delete: Duration,
    #[serde(deserialize_with = "within::<2, 100, _, _>")]
    pub strikes: u32,
    #[serde(deserialize_with = "lasting::<100, { 24 * HOUR }, _>")]
    pub stuck_after: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetrySettings {
    #[serde(deserialize_with = "lasting::<1, MINUTE, _>")]
    pub initial: Duration,
    #[serde(deserialize_with = "lasting::<1, HOUR, _>")]
    pub max: Duration,
    #[serde(deserialize_with = "tenths::<10, 100, _>")]
    pub multiplier: f64,
    #[serde(deserialize_with = "tenths::<0, 9, _>")]
    pub jitter: f64,
    #[serde(deserialize_with = "within::<1, 100, _, _>")]
    pub transient_attempts: u32,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventSettings {
    #[serde(deserialize_with = "short_text::<1, 255, _>")]
    pub source: String,
    pub format: EventFormat,
    #[serde(deserialize_with = "within::<1024, 16_777_216, _, _>")]
    pub batch_max_bytes: usize,
    #[serde(deserialize_with = "lasting::<1000, { 87_600 * HOUR }, _>")]
    pub remember: Duration,
    #[serde(deserialize_with = "within::<1000, 1_000_000_000, _, _>")]
    pub remember_max: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventFormat {
    Single,
    Batched,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpSettings {
    #[serde(deserialize_with = "address")]
    pub listen: SocketAddr,
    #[serde(deserialize_with = "within::<0, 1000, _, _>")]
    pub partner_labels_max: usize,
    #[serde(deserialize_with = "within::<8, 100_000, _, _>")]
    pub connections_max: usize,
    #[serde(deserialize_with = "within::<4, 100_000, _, _>")]
    pub connections_per_address_max: usize,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub head_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub idle_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub answer_timeout: Duration,
    #[serde(deserialize_with = "within::<1, 64, _, _>")]
    pub scrapes_max: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterSettings {
    pub collect: bool,
    #[serde(deserialize_with = "within::<1, 1_000, _, _>")]
    pub batch_max: usize,
    #[serde(deserialize_with = "lasting::<0, 10_000, _>")]
    pub linger: Duration,
    #[serde(deserialize_with = "within::<1, 1_000_000_000_000, _, _>")]
    pub max_rows: u64,
    #[serde(deserialize_with = "within::<1, 1_000_000_000_000_000, _, _>")]
    pub max_bytes: u64,
    #[serde(deserialize_with = "within::<1, 1_000_000_000_000, _, _>")]
    pub max_rows_per_partner: u64,
    #[serde(deserialize_with = "within::<1, 1_000_000_000_000_000, _, _>")]
    pub max_bytes_per_partner: u64,
    #[serde(deserialize_with = "lasting::<50, HOUR, _>")]
    pub recheck_interval: Duration,
    #[serde(deserialize_with = "within::<0, 1_000_000, _, _>")]
    pub confirm_above: usize,
    #[serde(deserialize_with = "within::<1, 1_000_000, _, _>")]
    pub plan_max: usize,
    #[serde(deserialize_with = "within::<1, 100_000, _, _>")]
    pub due_max: usize,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub verdict_deadline: Duration,
    #[serde(deserialize_with = "lasting::<1000, HOUR, _>")]
    pub driver_lease: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    pub format: LogFormat,
    pub level: LogLevel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Auto,
    Human,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// A wrong setting: one sentence, and what to do about it. Never holds a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    message: String,
    hint: String,
}

impl ConfigError {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        ConfigError {
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// What is wrong, and where it was said.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to do about it.
    pub fn hint(&self) -> &str {
        &self.hint
    }
}

/// Where settings come from, weakest first.
pub struct Sources<E> {
    /// `--config FILE`.
    pub file: Option<PathBuf>,
    /// Names and values; [`process_environment`] for the real one.
    pub environment: E,
    /// Setting (`worker.lanes`) and value, as typed.
    pub flags: Vec<(String, String)>,
}

/// This process's variables that concern us. A value that is not UTF-8 is taken with replacement characters, so that
/// it is refused by the check of its setting and not lost.
pub fn process_environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .map(|(name, value)| {
            (
                name.to_string_lossy().into_owned(),
                value.to_string_lossy().into_owned(),
            )
        })
        .filter(|(name, _)| name.starts_with(PREFIX))
}

const PREFIX: &str = "SETTLED_";
const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;

impl Settings {
    /// Lays file, environment and flags over the defaults.
    ///
    /// # Errors
    /// An unknown key, a value of the wrong type or out of its range, a file that cannot be read, or two settings that
    /// contradict each other.
    pub fn load<E>(sources: Sources<E>) -> Result<Self, ConfigError>
    where
        E: Iterator<Item = (String, String)>,
    {
        let mut layers = Layers::new()?;
        if let Some(file) = &sources.file {
            layers.lay_file(file)?;
        }
        layers.lay_environment(sources.environment)?;
        for (key, text) in sources.flags {
            layers.lay_text(split(&key), text, Origin::Flag)?;
        }
        let mut settings = layers.settings().map_err(|why| ConfigError::new(why, SEE_LIST))?;
        layers.agree(&settings)?;
        if settings.database.pool_size == 0 {
            settings.database.pool_size = settings.worker.lanes + 4;
        }
        if settings.worker.name.is_empty() {
            settings.worker.name = format!("{}-{}", host_name(), std::process::id());
        }
        Ok(settings)
    }

    /// Where the database is.
    ///
    /// # Errors
    /// If nobody said.
    pub fn database_url(&self) -> Result<&Secret, ConfigError> {
        given(
            &self.database.url,
            "database",
            "SETTLED_DATABASE_URL",
            "postgres://user:password@host:5432/name",
        )
    }

    /// Where the broker is.
    ///
    /// # Errors
    /// If nobody said.
    pub fn broker_url(&self) -> Result<&Secret, ConfigError> {
        given(
            &self.broker.url,
            "broker",
            "SETTLED_BROKER_URL",
            "amqp://user:password@host:5672/vhost",
        )
    }
}

fn given<'s>(url: &'s Secret, what: &str, variable: &str, shape: &str) -> Result<&'s Secret, ConfigError> {
    if url.is_empty() {
        return Err(ConfigError::new(
            format!("no {what} is configured"),
            format!("set {variable} ({shape}) or {variable}_FILE, or {what}.url in a file named with --config"),
        ));
    }
    Ok(url)
}

const SEE_LIST: &str = "config/default.toml lists every setting";

/// Where a value was said.
#[derive(Clone, Debug)]
enum Origin {
    File(PathBuf, usize),
    Variable(String),
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path, line) => write!(f, "{}, line {line}", path.display()),
            Origin::Variable(name) => write!(f, "environment variable {name}"),
            Origin::Flag => f.write_str("command line"),
        }
    }
}

/// The merged table, and who said what.
struct Layers {
    defaults: Table,
    merged: Table,
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    fn new() -> Result<Self, ConfigError> {
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

    fn lay_file(&mut self, path: &Path) -> Result<(), ConfigError> {
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
            self.lay(key, value, Origin::File(path.to_owned(), line_of(&text, start)))?;
        }
        Ok(())
    }

    fn lay_environment(&mut self, variables: impl Iterator<Item = (String, String)>) -> Result<(), ConfigError> {
        let mut urls: BTreeMap<&str, (String, String)> = BTreeMap::new();
        // Sorted, so that the same environment always gives the same first error.
        let variables: BTreeMap<String, String> = variables.filter(|(name, _)| name.starts_with(PREFIX)).collect();
        for (name, text) in variables {
            let plain = name.strip_prefix(PREFIX).unwrap_or_default();
            let (key, in_file) = match plain {
                "DATABASE_URL" => ("database.url", false),
                "DATABASE_URL_FILE" => ("database.url", true),
                "DATABASE__URL" => ("database.url", false),
                "BROKER_URL" => ("broker.url", false),
                "BROKER_URL_FILE" => ("broker.url", true),
                "BROKER__URL" => ("broker.url", false),
                _ => {
                    self.lay_variable(&name, plain, text)?;
                    continue;
                }
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
            self.lay(split(key), Value::String(url), Origin::Variable(name))?;
        }
        Ok(())
    }

    fn lay_variable(&mut self, name: &str, plain: &str, text: String) -> Result<(), ConfigError> {
        let key = split(&plain.to_ascii_lowercase().replace("__", "."));
        // Without a section it is one of ours only if it names a setting: scripts and tests have variables too.
        let ours = plain.contains("__") || find(&self.defaults, &key).is_some_and(|value| !value.is_table());
        if !ours {
            return Ok(());
        }
        let origin = Origin::Variable(name.to_owned());
        if plain != plain.to_ascii_uppercase() {
            return Err(self.unknown(&key, &origin));
        }
        self.lay_text(key, text, origin)
    }

    /// Text becomes what the default is: a string stays one even if it looks like a number.
    fn lay_text(&mut self, key: Vec<String>, text: String, origin: Origin) -> Result<(), ConfigError> {
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
        let said = if name.ends_with(".url") {
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

    fn settings(&self) -> Result<Settings, String> {
        Settings::deserialize(self.merged.clone()).map_err(|error| error.message().to_owned())
    }

    /// Settings that are right alone and wrong together.
    fn agree(&self, settings: &Settings) -> Result<(), ConfigError> {
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
        let schemes: [(&str, &Secret, &[&str], &str); 2] = [
            (
                "broker.url",
                &settings.broker.url,
                &["amqp://", "amqps://"],
                "amqp:// or amqps://",
            ),
            (
                "database.url",
                &database.url,
                &["postgres://", "postgresql://"],
                "postgres:// or be key=value pairs",
            ),
        ];
        for (key, url, accepted, words) in schemes {
            let pairs = key == "database.url" && !url.expose().contains("://") && url.expose().contains('=');
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
                if same_leaf { 1 } else { distance(name, candidate) }
            })
            .unwrap_or_default();
        let nearest = match origin {
            Origin::Variable(_) => variable_of(&nearest),
            Origin::File(..) | Origin::Flag => format!("`{nearest}`"),
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

fn split(key: &str) -> Vec<String> {
    key.split('.').map(str::to_owned).collect()
}

fn variable_of(key: &str) -> String {
    match key {
        "database.url" => "SETTLED_DATABASE_URL".to_owned(),
        "broker.url" => "SETTLED_BROKER_URL".to_owned(),
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

fn leaves(table: &Table, path: &mut Vec<String>, found: &mut Vec<String>) {
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

fn host_name() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    [kernel, std::env::var("HOSTNAME").ok()]
        .into_iter()
        .flatten()
        .map(|name| name.trim().chars().take(100).collect::<String>())
        .find(|name| !name.is_empty())
        .unwrap_or_else(|| "worker".to_owned())
}

/// Levenshtein's distance, in bytes.
fn distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.bytes().enumerate() {
            let substitute = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

/// What was typed, as it may be repeated: a URL or connection string in the wrong place holds a password there too.
pub(crate) fn repeated(text: &str) -> &str {
    let lower = text.to_ascii_lowercase();
    let may_be_secret = ["://", "@", "password", "passwd", "sslmode", "host=", "user="];
    if may_be_secret.iter().any(|piece| lower.contains(piece)) {
        return "***";
    }
    text
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

fn within<'de, const MIN: u64, const MAX: u64, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let number = i64::deserialize(deserializer)?;
    u64::try_from(number)
        .ok()
        .filter(|number| (MIN..=MAX).contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| D::Error::custom(format!("must be from {MIN} to {MAX}")))
}

fn tenths<'de, const MIN: u32, const MAX: u32, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let (min, max) = (f64::from(MIN) / 10.0, f64::from(MAX) / 10.0);
    let number = f64::deserialize(deserializer)?;
    if number >= min && number <= max {
        return Ok(number);
    }
    Err(D::Error::custom(format!("must be from {min:.1} to {max:.1}")))
}

fn parse_duration(text: &str) -> Option<Duration> {
    jiff::fmt::friendly::SpanParser::new()
        .parse_unsigned_duration(text)
        .ok()
}

fn in_words(duration: Duration) -> String {
    jiff::fmt::friendly::SpanPrinter::new()
        .designator(jiff::fmt::friendly::Designator::Compact)
        .unsigned_duration_to_string(&duration)
}

/// A duration between bounds in milliseconds, and not finer than those: PostgreSQL counts in them.
fn lasting<'de, const MIN: u64, const MAX: u64, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let duration = parse_duration(&text).ok_or_else(|| {
        D::Error::custom("not a duration: write a number and its unit (ms, s, m, h), such as 500ms, 15s or 1h 30m")
    })?;
    let (min, max) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
    if duration < min || duration > max {
        return Err(D::Error::custom(format!(
            "must be from {} to {}",
            in_words(min),
            in_words(max)
        )));
    }
    if duration.subsec_nanos() % 1_000_000 != 0 {
        return Err(D::Error::custom("must be whole milliseconds"));
    }
    Ok(duration)
}

fn whole_seconds<'de, const MIN: u64, const MAX: u64, D>(deserializer: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    let duration = lasting::<MIN, MAX, D>(deserializer)?;
    if duration.subsec_nanos() != 0 {
        return Err(D::Error::custom("must be whole seconds"));
    }
    Ok(duration)
}

fn short_text<'de, const MIN: usize, const MAX: usize, D>(deserializer: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    if text.len() < MIN || text.len() > MAX {
        return Err(D::Error::custom(format!("must be {MIN} to {MAX} bytes long")));
    }
    if text.chars().any(|letter| letter.is_control() || letter.is_whitespace()) {
        return Err(D::Error::custom("must hold no white space and no control characters"));
    }
    Ok(text)
}

/// A list of texts.
fn texts<'de, const MOST: usize, const BYTES: usize, D>(deserializer: D) -> Result<Vec<String>, D::Error>
where
    D: Deserializer<'de>,
{
    let texts = Vec::<String>::deserialize(deserializer)?;
    if texts.len() > MOST {
        return Err(D::Error::custom(format!("must have {MOST} entries at most")));
    }
    if texts
        .iter()
        .any(|text| text.len() > BYTES || text.chars().any(char::is_control))
    {
        return Err(D::Error::custom(format!(
            "must have entries of at most {BYTES} bytes without control characters"
        )));
    }
    Ok(texts)
}

/// The entries of a list in the environment, between commas. Two quotes stand for an empty one: a comma too many must not.
fn items(text: &str) -> Vec<Value> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(|item| Value::String(if item == "\"\"" { String::new() } else { item.to_owned() }))
        .collect()
}

fn optional_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(if text.is_empty() {
        None
    } else {
        Some(PathBuf::from(text))
    })
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    String::deserialize(deserializer)?
        .parse()
        .map_err(|_| D::Error::custom("must be an IP address and a port, such as 127.0.0.1:9464 or [::]:9464"))
}

/// A URL or DSN that may hold a password. Nothing prints it whole: [`Secret::expose`] is for those who connect.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

/// Parameters of connection strings that are shown. All others may hold anything.
const SHOWN: [&str; 16] = [
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "sslmode",
    "application_name",
    "connect_timeout",
    "target_session_attrs",
    "channel_binding",
    "load_balance_hosts",
    "heartbeat",
    "channel_max",
    "frame_max",
    "connection_timeout",
    "auth_mechanism",
];

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The whole of it, password included.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What may be shown to people: scheme, user, host, path, and parameters known to be harmless.
    pub fn redacted(&self) -> String {
        match self.0.split_once("://") {
            Some((scheme, rest)) => {
                let (credentials, place) = match rest.rsplit_once('@') {
                    Some((credentials, place)) => (Some(credentials), place),
                    None => (None, rest),
                };
                // A password may hold `/`, `?` or `#` unescaped, a parameter may hold `@`: which of them this is, is
                // a guess, so nothing of it is shown.
                if credentials.is_some_and(|text| text.contains(['/', '?', '#'])) {
                    return format!("{scheme}://***");
                }
                let who = match credentials.map(|text| text.split_once(':').ok_or(text)) {
                    Some(Ok((user, _))) => format!("{user}:***@"),
                    Some(Err(user)) => format!("{user}@"),
                    None => String::new(),
                };
                match place.split_once('?') {
                    Some((place, query)) => {
                        let pairs: Vec<String> = query.split('&').map(|pair| shown_pair(pair, pair)).collect();
                        format!("{scheme}://{who}{place}?{}", pairs.join("&"))
                    }
                    None => format!("{scheme}://{who}{place}"),
                }
            }
            None => redacted_pairs(&self.0),
        }
    }
}

fn shown_pair(pair: &str, as_written: &str) -> String {
    match pair.split_once('=') {
        Some((key, _)) if SHOWN.contains(&key.trim()) => as_written.to_owned(),
        Some((key, _)) => format!("{}=***", key.trim()),
        None => "***".to_owned(),
    }
}

/// `key=value key='va lue'`, with libpq's quotes and backslashes.
fn redacted_pairs(text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    let mut shown = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let Some((key, after)) = rest.split_once('=') else {
            shown.push("***".to_owned());
            break;
        };
        let after = after.trim_start();
        let quoted = after.starts_with('\'');
        let mut escaped = false;
        let end = after
            .char_indices()
            .skip(usize::from(quoted))
            .find(|(_, letter)| {
                let ends = !escaped
                    && if quoted {
                        *letter == '\''
                    } else {
                        letter.is_whitespace()
                    };
                escaped = !escaped && *letter == '\\';
                ends
            })
            .map_or(
                after.len(),
                |(at, letter)| if quoted { at + letter.len_utf8() } else { at },
            );
        let (value, next) = after.split_at(end);
        let key = key.trim();
        let plain_key = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if plain_key {
            shown.push(shown_pair(&format!("{key}="), &format!("{key}={value}")));
        } else {
            shown.push("***".to_owned());
        }
        rest = next.trim_start();
    }
    shown.join(" ")
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.redacted())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> std::vec::IntoIter<(String, String)> {
        let pairs: Vec<(String, String)> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        pairs.into_iter()
    }

    fn load(file: Option<&Path>, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Settings, ConfigError> {
        Settings::load(Sources {
            file: file.map(Path::to_owned),
            environment: environment(variables),
            flags: environment(flags).collect(),
        })
    }

    fn refused(file: Option<&Path>, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> (String, String) {
        let error = load(file, variables, flags).expect_err("should be refused");
        (error.message().to_owned(), error.hint().to_owned())
    }

    /// A file of its own that goes away with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("settled-config-{}.toml", uuid::Uuid::new_v4()));
            std::fs::write(&path, text).expect("the temporary directory is writable");
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_file(&self.0).ok();
        }
    }

    #[test]
    fn the_defaults() {
        let settings = load(None, &[], &[]).expect("the defaults are right");
        let Settings {
            allow_plaintext,
            database,
            broker,
            worker,
            park,
            held,
            outbox,
            retry,
            events,
            http,
            dead_letters,
            log,
        } = &settings;
        assert!(!allow_plaintext && database.url.is_empty() && broker.url.is_empty());
        assert_eq!(
            (
                database.pool_size,
                database.ca_file.as_deref(),
                broker.ca_file.as_deref()
            ),
            (6, None, None)
        );
        assert_eq!((worker.lanes, worker.prefetch, worker.batch_max), (2, 1000, 256));
        assert_eq!((worker.batch_max_bytes, worker.culprits_per_minute), (4_194_304, 3));
        assert_eq!((worker.own_queues_max, outbox.strikes), (16, 5));
        assert_eq!(worker.partner_rate, 0);
        assert_eq!((held.max_messages, held.max_messages_per_partner), (1_000_000, 500_000));
        assert_eq!((held.max_bytes, held.max_bytes_per_partner), (1 << 30, 1 << 29));
        assert_eq!(held.share, 0.2);
        assert_eq!((park.max_bytes, park.max_bytes_per_partner), (1 << 30, 1 << 27));
        assert_eq!((park.max_per_partner, retry.transient_attempts), (10_000, 8));
        assert_eq!((retry.multiplier, retry.jitter), (2.0, 0.3));
        assert_eq!((events.source.as_str(), http.partner_labels_max), ("/settled", 50));
        assert_eq!(events.remember_max, 1_000_000);
        assert_eq!((events.format, events.batch_max_bytes), (EventFormat::Single, 262_144));
        assert_eq!((http.connections_max, http.connections_per_address_max), (512, 128));
        assert_eq!(http.scrapes_max, 4);
        assert_eq!(http.listen, SocketAddr::from(([127, 0, 0, 1], 9464)));
        assert!(dead_letters.collect);
        assert_eq!((dead_letters.batch_max, dead_letters.confirm_above), (100, 100));
        assert_eq!(
            (dead_letters.max_rows, dead_letters.max_bytes),
            (10_000_000, 50_000_000_000)
        );
        let a_partner = (dead_letters.max_rows_per_partner, dead_letters.max_bytes_per_partner);
        assert_eq!(a_partner, (2_000_000, 10_000_000_000));
        assert_eq!(dead_letters.recheck_interval, Duration::from_secs(5));
        assert!(broker.trusted_users.is_empty());
        assert_eq!(dead_letters.linger, Duration::from_millis(250));
        assert_eq!((dead_letters.plan_max, dead_letters.due_max), (100_000, 1_000));
        assert_eq!(dead_letters.verdict_deadline, Duration::from_secs(60));
        assert_eq!(dead_letters.driver_lease, Duration::from_secs(15));
        assert_eq!((log.format, log.level), (LogFormat::Auto, LogLevel::Info));
        assert!(
            worker.name.ends_with(&format!("-{}", std::process::id())),
            "{}",
            worker.name
        );
        let durations = [
            (database.connect_timeout, 5_000),
            (database.statement_timeout, 10_000),
            (database.lock_timeout, 5_000),
            (database.idle_in_transaction_timeout, 30_000),
            (database.client_deadline, 15_000),
            (database.acquire_timeout, 5_000),
            (broker.heartbeat, 10_000),
            (broker.connect_timeout, 10_000),
            (broker.publish_deadline, 15_000),
            (worker.drain_deadline, 20_000),
            (worker.pause_release, 60_000),
            (worker.own_queue_poll, 1_000),
            (worker.lock_patience, 500),
            (held.others_within, 60_000),
            (held.poll, 250),
            (held.lease, 30_000),
            (held.first_retry, 250),
            (held.max_interval, 5_000),
            (park.deadline, 900_000),
            (park.first_retry, 500),
            (park.max_interval, 60_000),
            (park.poll, 250),
            (park.lease, 30_000),
            (outbox.lease, 5_000),
            (outbox.relay_interval, 1_000),
            (outbox.idle_delete, 100),
            (outbox.stuck_after, 60_000),
            (retry.initial, 50),
            (retry.max, 5_000),
            (events.remember, 2_592_000_000),
            (http.head_timeout, 5_000),
            (http.idle_timeout, 15_000),
            (http.answer_timeout, 30_000),
        ];
        for (at, (duration, millis)) in durations.into_iter().enumerate() {
            assert_eq!(duration, Duration::from_millis(millis), "duration {at}");
        }
    }

    #[test]
    fn every_default_has_a_comment() {
        let lines: Vec<&str> = DEFAULTS.lines().collect();
        let mut settings = 0;
        for pair in lines.windows(2) {
            if pair[1].contains(" = ") && !pair[1].starts_with('#') {
                settings += 1;
                assert!(
                    pair[0].starts_with("# ") && pair[0].len() > 12,
                    "no comment above: {}",
                    pair[1]
                );
            }
        }
        let mut known = Vec::new();
        leaves(&DEFAULTS.parse().expect("TOML"), &mut Vec::new(), &mut known);
        assert_eq!(settings, known.len());
    }

    #[test]
    fn flags_beat_environment_beats_file_beats_defaults() {
        let file = Scratch::new("[worker]\nlanes = 3\n[park]\ndeadline = \"1m\"\n");
        let variable = ("SETTLED_WORKER__LANES", "4");
        let flag = ("worker.lanes", "5");
        let table: [(bool, bool, bool, usize); 8] = [
            (false, false, false, 2),
            (true, false, false, 3),
            (false, true, false, 4),
            (true, true, false, 4),
            (false, false, true, 5),
            (true, false, true, 5),
            (false, true, true, 5),
            (true, true, true, 5),
        ];
        for (in_file, in_environment, on_line, lanes) in table {
            let settings = load(
                in_file.then_some(file.0.as_path()),
                if in_environment {
                    std::slice::from_ref(&variable)
                } else {
                    &[]
                },
                if on_line { std::slice::from_ref(&flag) } else { &[] },
            )
            .expect("right");
            assert_eq!(settings.worker.lanes, lanes, "{in_file} {in_environment} {on_line}");
            assert_eq!(settings.database.pool_size, lanes + 4);
            assert_eq!(
                settings.park.deadline,
                Duration::from_secs(if in_file { 60 } else { 900 })
            );
        }
    }

    #[test]
    fn values_from_text_take_the_type_of_the_default() {
        let settings = load(
            None,
            &[
                ("SETTLED_ALLOW_PLAINTEXT", "true"),
                ("SETTLED_PARK__DEADLINE", "2s"),
                ("SETTLED_DEAD_LETTERS__COLLECT", "false"),
                ("SETTLED_HTTP__LISTEN", "127.0.0.1:0"),
                ("SETTLED_WORKER__NAME", "007"),
                ("SETTLED_EVENTS__SOURCE", "true"),
                ("SETTLED_RETRY__MULTIPLIER", "3"),
                ("SETTLED_DATABASE__POOL_SIZE", "9"),
                ("SETTLED_LOG__LEVEL", "debug"),
            ],
            &[("database.ca_file", "/etc/ca.pem"), ("park.max_interval", "1h 30m")],
        )
        .expect("right");
        assert!(settings.allow_plaintext && !settings.dead_letters.collect);
        assert_eq!(settings.park.deadline, Duration::from_secs(2));
        assert_eq!(settings.park.max_interval, Duration::from_secs(5_400));
        assert_eq!(settings.http.listen.port(), 0);
        assert_eq!(
            (settings.worker.name.as_str(), settings.events.source.as_str()),
            ("007", "true")
        );
        assert_eq!((settings.retry.multiplier, settings.database.pool_size), (3.0, 9));
        assert_eq!(settings.log.level, LogLevel::Debug);
        assert_eq!(settings.database.ca_file.as_deref(), Some(Path::new("/etc/ca.pem")));
    }

    #[test]
    fn variables_that_are_not_settings_are_left_alone() {
        let settings = load(
            None,
            &[
                ("SETTLED_BROKER_MANAGEMENT_URL", "http://localhost"),
                ("SETTLED_TEST_SEED", "7"),
                ("SETTLED_FAULT", "before-ack"),
                ("SETTLED_WORKER", "x"),
                ("PATH", "/bin"),
                ("WORKER__LANES", "9"),
            ],
            &[],
        );
        assert_eq!(settings.expect("right").worker.lanes, 2);
    }

    #[test]
    fn unknown_keys_are_named_with_place_and_neighbour() {
        let file = Scratch::new("# first\n[worker]\nlanes = 2\n\n[park]\n  dedline = \"1m\"\n");
        let place = file.0.display().to_string();
        let (message, hint) = refused(Some(&file.0), &[], &[]);
        assert_eq!(message, format!("unknown setting `park.dedline` ({place}, line 6)"));
        assert!(hint.starts_with("the nearest known one is `park.deadline`;"), "{hint}");

        for (name, key, nearest) in [
            ("SETTLED_WORKER__LANE", "worker.lane", "SETTLED_WORKER__LANES"),
            ("SETTLED_WORKR__LANES", "workr.lanes", "SETTLED_WORKER__LANES"),
            ("SETTLED_WORKER__LANES__X", "worker.lanes.x", "SETTLED_WORKER__LANES"),
            ("SETTLED_BROKER__ULR", "broker.ulr", "SETTLED_BROKER_URL"),
            ("SETTLED_Worker__Lanes", "worker.lanes", "SETTLED_WORKER__LANES"),
            ("SETTLED___", "..", "SETTLED_"),
        ] {
            let (message, hint) = refused(None, &[(name, "3")], &[]);
            assert!(message.starts_with("unknown setting `"), "{message}");
            assert!(
                message.ends_with(&format!("(environment variable {name})")),
                "{message}"
            );
            if key != ".." {
                assert!(message.contains(&format!("`{key}`")), "{message}");
            }
            assert!(hint.contains(nearest), "{hint}");
        }

        let (message, hint) = refused(None, &[], &[("drain_deadline", "1s")]);
        assert_eq!(message, "unknown setting `drain_deadline` (command line)");
        assert!(hint.contains("`worker.drain_deadline`"), "{hint}");

        for (text, line, key) in [
            ("[workr]\n", 1, "workr"),
            ("\n\nworker = { lanes = 2, lames = 3 }\n", 3, "worker.lames"),
            ("worker.lane = 1\n", 1, "worker.lane"),
            ("[worker.lanes]\nx = 1\n", 2, "worker.lanes.x"),
        ] {
            let file = Scratch::new(text);
            let (message, _) = refused(Some(&file.0), &[], &[]);
            assert_eq!(
                message,
                format!("unknown setting `{key}` ({}, line {line})", file.0.display())
            );
        }
        let file = Scratch::new("worker = 3\n");
        assert!(refused(Some(&file.0), &[], &[]).0.starts_with("`worker` is a section"));
    }

    #[test]
    fn wrong_values_are_named_with_place() {
        for (key, text, expected) in [
            ("park.deadline", "15", "`park.deadline` = \"15\": not a duration"),
            ("park.deadline", "15 parsecs", "not a duration"),
            ("park.deadline", "-5s", "not a duration"),
            ("park.deadline", "", "not a duration"),
            ("park.deadline", "0s", "must be from 100ms to 720h"),
            ("park.deadline", "721h", "must be from 100ms to 720h"),
            ("park.deadline", "99999999999999999999h", "not a duration"),
            ("park.poll", "10.5ms", "whole milliseconds"),
            ("broker.heartbeat", "1500ms", "whole seconds"),
            ("worker.lanes", "0", "`worker.lanes` = 0: must be from 1 to 16"),
            ("worker.lanes", "17", "must be from 1 to 16"),
            ("worker.lanes", "-1", "must be from 1 to 16"),
            (
                "worker.lanes",
                "two",
                "`worker.lanes` must be a whole number, not \"two\"",
            ),
            ("worker.lanes", "2.0", "must be a whole number"),
            ("worker.lanes", "99999999999999999999", "must be a whole number"),
            ("worker.prefetch", "2001", "must be from 1 to 2000"),
            ("worker.batch_max", "2001", "must be from 1 to 2000"),
            ("worker.batch_max_bytes", "1023", "must be from 1024 to 268435456"),
            ("allow_plaintext", "yes", "must be true or false"),
            ("retry.jitter", "0.95", "must be from 0.0 to 0.9"),
            ("retry.jitter", "nan", "must be from 0.0 to 0.9"),
            ("retry.multiplier", "0.5", "must be from 1.0 to 10.0"),
            ("retry.multiplier", "fast", "must be a number"),
            ("http.listen", "localhost", "must be an IP address and a port"),
            ("events.source", "", "must be 1 to 255 bytes long"),
            ("events.source", "a b", "no white space"),
            ("events.format", "batch", "unknown variant `batch`"),
            ("events.format", "Batched", "unknown variant `Batched`"),
            ("events.batch_max_bytes", "1023", "must be from 1024 to 16777216"),
            ("log.format", "xml", "unknown variant `xml`"),
            ("worker", "3", "`worker` is a section, not a setting"),
            (
                "database.url",
                "mysql://u:hunter2@h/d",
                "`database.url` must begin with postgres://",
            ),
            (
                "broker.url",
                "http://u:hunter2@h",
                "`broker.url` must begin with amqp://",
            ),
            (
                "database.pool_size",
                "2",
                "leaves no connection beside those of 2 lanes",
            ),
            (
                "retry.initial",
                "6s",
                "`retry.initial` (6s, command line) is longer than `retry.max` (5s, default)",
            ),
            (
                "park.first_retry",
                "61s",
                "is longer than `park.max_interval` (1m, default)",
            ),
            (
                "database.client_deadline",
                "9s",
                "`database.statement_timeout` (10s, default) is longer than",
            ),
        ] {
            let (message, hint) = refused(None, &[], &[(key, text)]);
            assert!(message.contains(expected), "{key}={text}: {message}");
            assert!(message.contains("command line"), "{message}");
            assert!(
                !message.contains('\n') && !hint.is_empty() && !message.contains("hunter2"),
                "{message}"
            );
        }
        for (text, expected) in [
            (
                "[park]\ndeadline = 15\n",
                "must be a duration with its unit, such as \"15m\", not a value of type integer",
            ),
            (
                "[worker]\nlanes = \"2\"\n",
                "`worker.lanes` must be a whole number, not a value of type string",
            ),
            ("[worker]\nlanes = [2]\n", "not a value of type array"),
            ("[worker]\nlanes = 20\n", "`worker.lanes` = 20: must be from 1 to 16"),
        ] {
            let file = Scratch::new(text);
            let (message, _) = refused(Some(&file.0), &[], &[]);
            assert!(message.contains(expected), "{message}");
            assert!(
                message.ends_with(&format!("({}, line 2)", file.0.display())),
                "{message}"
            );
        }
    }

    #[test]
    fn a_broken_file_is_said_without_its_content() {
        let file = Scratch::new("[database]\nurl = \"postgres://u:hunter2@h\n");
        let (message, _) = refused(Some(&file.0), &[], &[]);
        assert!(message.contains(", line 2: "), "{message}");
        assert!(!message.contains("hunter2") && !message.contains('\n'), "{message}");
        let (message, _) = refused(Some(Path::new("/nowhere/settled.toml")), &[], &[]);
        assert!(
            message.starts_with("cannot read the settings file /nowhere/settled.toml"),
            "{message}"
        );
        let twice = Scratch::new("[worker]\nlanes = 1\nlanes = 2\n");
        assert!(refused(Some(&twice.0), &[], &[]).0.contains(", line 3: "));
    }

    #[test]
    fn the_urls_have_names_of_their_own() {
        let settings = load(
            None,
            &[
                ("SETTLED_DATABASE_URL", "postgres://db/x"),
                ("SETTLED_BROKER__URL", "amqp://mq"),
            ],
            &[],
        )
        .expect("right");
        assert_eq!(settings.database_url().expect("given").expose(), "postgres://db/x");
        assert_eq!(settings.broker_url().expect("given").expose(), "amqp://mq");

        let file = Scratch::new("  postgres://u:hunter2@db/x \n");
        let path = file.0.display().to_string();
        let settings = load(None, &[("SETTLED_DATABASE_URL_FILE", &path)], &[]).expect("right");
        assert_eq!(settings.database.url.expose(), "postgres://u:hunter2@db/x");
        let missing = settings.broker_url().expect_err("nobody said");
        assert_eq!(missing.message(), "no broker is configured");
        assert!(missing.hint().contains("SETTLED_BROKER_URL "), "{}", missing.hint());

        let both = [
            ("SETTLED_DATABASE_URL", "postgres://db/x"),
            ("SETTLED_DATABASE_URL_FILE", path.as_str()),
        ];
        assert_eq!(
            refused(None, &both, &[]).0,
            "SETTLED_DATABASE_URL and SETTLED_DATABASE_URL_FILE both set database.url"
        );
        // Empty means that nothing was said.
        let settings = load(None, &[("SETTLED_DATABASE_URL", ""), both[1]], &[]).expect("right");
        assert!(!settings.database.url.is_empty());
        let (message, _) = refused(None, &[("SETTLED_BROKER_URL_FILE", "/nowhere/url")], &[]);
        assert!(
            message.starts_with("cannot read the file /nowhere/url that SETTLED_BROKER_URL_FILE names"),
            "{message}"
        );
        let empty = Scratch::new(" \n");
        let (message, _) = refused(
            None,
            &[("SETTLED_BROKER_URL_FILE", &empty.0.display().to_string())],
            &[],
        );
        assert!(message.ends_with("is empty"), "{message}");
        // A flag still wins, and a DSN of pairs is fine.
        let settings = load(
            None,
            &both[..1],
            &[("database.url", "host=db dbname=x password=hunter2")],
        )
        .expect("right");
        assert_eq!(settings.database.url.expose(), "host=db dbname=x password=hunter2");
        assert!(!format!("{settings:?}").contains("hunter2"));
    }

    /// A URL or connection string where it does not belong, or written wrong: no word of it is repeated.
    #[test]
    fn what_may_be_a_secret_is_not_repeated() {
        for secret in [
            "postgres://u:hunter2@h/d",
            "amqp://u:hunter2@h/v",
            "mysql://u:hunter2@h",
            "host=h user=u password=hunter2",
            "host = h password = 'hunter2'",
            "u:hunter2@h",
            "PASSWORD=hunter2",
        ] {
            let variables: &[&[(&str, &str)]] = &[
                &[("SETTLED_DATABASE_URL_FILE", secret)],
                &[("SETTLED_BROKER_URL_FILE", secret)],
                &[("SETTLED_BROKER_URL", secret), ("SETTLED_WORKER__LANES", secret)],
                &[("SETTLED_WORKER__LANES", secret)],
                &[("SETTLED_PARK__DEADLINE", secret)],
                &[("SETTLED_RETRY__JITTER", secret)],
                &[("SETTLED_ALLOW_PLAINTEXT", secret)],
                &[("SETTLED_HTTP__LISTEN", secret)],
                &[("SETTLED_LOG__LEVEL", secret)],
                &[("SETTLED_EVENTS__FORMAT", secret)],
            ];
            for variables in variables {
                let (message, hint) = refused(None, variables, &[]);
                assert!(
                    !format!("{message}{hint}").contains("unter2"),
                    "{variables:?}: {message}"
                );
            }
            for flag in ["worker.lanes", "databse.url", "database", secret] {
                let (message, hint) = refused(None, &[], &[(flag, secret)]);
                assert!(
                    !format!("{message}{hint}").contains("unter2"),
                    "{flag}: {message} {hint}"
                );
            }
            let (message, hint) = refused(Some(Path::new(secret)), &[], &[]);
            assert!(!format!("{message}{hint}").contains("unter2"), "{message}");
            for text in [
                secret.to_owned(),
                format!("[database]\nurl = {secret}"),
                format!("[worker]\nlanes = \"{secret}\""),
            ] {
                let file = Scratch::new(&text);
                let (message, hint) = refused(Some(&file.0), &[], &[]);
                assert!(!format!("{message}{hint}").contains("unter2"), "{text}: {message}");
            }
        }
    }

    #[test]
    fn passwords_are_never_shown() {
        let table = [
            ("postgres://u:hunter2@h:5432/d", "postgres://u:***@h:5432/d"),
            ("postgres://u@h/d?sslmode=require", "postgres://u@h/d?sslmode=require"),
            (
                "postgres://h/d?user=u&password=hunter2",
                "postgres://h/d?user=u&password=***",
            ),
            (
                "postgres://h/d?p%61ssword=hunter2&sslmode=x",
                "postgres://h/d?p%61ssword=***&sslmode=x",
            ),
            ("postgres://u:hun@ter2@h/d", "postgres://u:***@h/d"),
            ("postgres://u:hun/ter2@h/d", "postgres://***"),
            ("postgres://h/d?password=hunter2@x", "postgres://***"),
            ("postgres://h:5/d?password=ab@hunter2", "postgres://***"),
            (
                "amqps://u:hunter2@h:5671/%2f?heartbeat=10",
                "amqps://u:***@h:5671/%2f?heartbeat=10",
            ),
            ("amqp://h", "amqp://h"),
            (
                "host=h user=u password=hunter2 dbname=d",
                "host=h user=u password=*** dbname=d",
            ),
            (
                "host=h password='hun ter2\\' host=hunter2' dbname=d",
                "host=h password=*** dbname=d",
            ),
            ("password = hunter2 host = h", "password=*** host=h"),
            ("password=hunter2\\ host=hunter2 host=h", "password=*** host=h"),
            ("password='hunter2", "password=***"),
            ("hunter2", "***"),
            ("", ""),
        ];
        for (secret, shown) in table {
            let secret = Secret::new(secret);
            assert_eq!(secret.redacted(), shown);
            assert_eq!(format!("{secret:?}"), format!("{shown:?}"));
            assert!(!format!("{secret:#?}").contains("hunter2"));
        }
    }
}

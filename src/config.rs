//! Typed settings: compiled-in defaults, under a file, under the environment, under flags.
//!
//! `config/default.toml` is the list: a key that does not stand there is refused wherever it comes from, by name and
//! place. Every assignment is checked when it is laid on, so that a wrong value is always said with where it came from.

mod console;
mod fields;
mod layers;
mod reference;
mod secret;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

pub(crate) use self::secret::repeated;
pub use self::{
    console::{ConsoleSettings, LinkRole},
    fields::parse_duration,
    layers::Origin,
    reference::{Reference, reference},
    secret::Secret,
};
use self::{
    fields::{
        address, amounts, lasting, optional_address, optional_path, short_text, tenths, texts, whole_seconds, within,
    },
    layers::{Layers, SEE_LIST, host_name, split},
};

/// The commented list of every setting, as compiled in.
pub const DEFAULTS: &str = include_str!("../config/default.toml");

/// Everything someone may change. [`Settings::load`] is the door.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub allow_plaintext: bool,
    pub database: DatabaseSettings,
    pub broker: BrokerTable,
    pub worker: WorkerSettings,
    pub park: ParkSettings,
    pub held: HeldSettings,
    pub outbox: OutboxSettings,
    pub retry: RetrySettings,
    pub events: EventSettings,
    pub http: HttpSettings,
    pub api: ApiSettings,
    pub registry: RegistrySettings,
    pub dead_letters: DeadLetterSettings,
    pub console: ConsoleSettings,
    pub log: LogSettings,
    pub traces: TraceSettings,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatabaseSettings {
    /// A URL or key=value pairs; empty if nobody said. [`Settings::database_url`] insists.
    pub url: Secret,
    /// Empty: `url`.
    pub migrate_url: Secret,
    /// Of another cell; empty if nobody said.
    pub target_url: Secret,
    #[serde(deserialize_with = "optional_path")]
    pub ca_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path")]
    pub client_certificate_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path")]
    pub client_key_file: Option<PathBuf>,
    /// Never 0 after loading.
    #[serde(deserialize_with = "within::<0, 100, _, _>")]
    pub pool_size: usize,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub connect_timeout: Duration,
    #[serde(deserialize_with = "lasting::<10, MINUTE, _>")]
    pub next_host_after: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub silence: Duration,
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
pub struct BrokerTable {
    /// Empty if nobody said. [`Settings::broker_url`] insists.
    pub url: Secret,
    /// Empty: the management API is not asked.
    pub management_url: Secret,
    #[serde(deserialize_with = "lasting::<1000, HOUR, _>")]
    pub management_interval: Duration,
    #[serde(deserialize_with = "optional_path")]
    pub ca_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path")]
    pub client_certificate_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path")]
    pub client_key_file: Option<PathBuf>,
    /// Whole seconds, as AMQP has it.
    #[serde(deserialize_with = "whole_seconds::<1000, { 5 * MINUTE }, _>")]
    pub heartbeat: Duration,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub connect_timeout: Duration,
    #[serde(deserialize_with = "lasting::<10, MINUTE, _>")]
    pub next_host_after: Duration,
    #[serde(deserialize_with = "lasting::<100, { 10 * MINUTE }, _>")]
    pub publish_deadline: Duration,
    #[serde(deserialize_with = "lasting::<10, MINUTE, _>")]
    pub replies_connect: Duration,
    #[serde(deserialize_with = "lasting::<10, HOUR, _>")]
    pub replies_rest: Duration,
    #[serde(deserialize_with = "texts::<100, 255, _>")]
    pub trusted_users: Vec<String>,
    #[serde(deserialize_with = "texts::<100, 255, _>")]
    pub api_users: Vec<String>,
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
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub consumer_missing_after: Duration,
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
pub struct RegistrySettings {
    pub key_proof_required: bool,
    #[serde(deserialize_with = "lasting::<{ MINUTE }, { 8_760 * HOUR }, _>")]
    pub key_challenge_lasts: Duration,
    #[serde(deserialize_with = "lasting::<0, { 8_760 * HOUR }, _>")]
    pub key_warn_before: Duration,
    #[serde(deserialize_with = "lasting::<100, { 24 * HOUR }, _>")]
    pub key_use_interval: Duration,
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
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub retry_deadline: Duration,
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
pub struct ApiSettings {
    #[serde(deserialize_with = "address")]
    pub listen: SocketAddr,
    #[serde(deserialize_with = "optional_path")]
    pub certificate_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path")]
    pub key_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_address")]
    pub watch_listen: Option<SocketAddr>,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub wait: Duration,
    #[serde(deserialize_with = "within::<1024, 262_144, _, _>")]
    pub body_max: usize,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub body_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub head_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub idle_timeout: Duration,
    #[serde(deserialize_with = "lasting::<1000, HOUR, _>")]
    pub answer_timeout: Duration,
    #[serde(deserialize_with = "within::<8, 100_000, _, _>")]
    pub connections_max: usize,
    #[serde(deserialize_with = "within::<4, 100_000, _, _>")]
    pub connections_per_address_max: usize,
    #[serde(deserialize_with = "within::<1, 100_000, _, _>")]
    pub requests_max: usize,
    #[serde(deserialize_with = "within::<1, 100_000, _, _>")]
    pub updates_max: usize,
    #[serde(deserialize_with = "within::<1, 100_000, _, _>")]
    pub share_max: usize,
    #[serde(deserialize_with = "within::<1, 1_000_000, _, _>")]
    pub rate_per_token: u32,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub rate_of_strangers: u32,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub rate_of_strangers_per_address: u32,
    #[serde(deserialize_with = "within::<1, 1_000, _, _>")]
    pub page_max: u32,
    #[serde(deserialize_with = "within::<65_536, 16_777_216, _, _>")]
    pub page_max_bytes: u32,
    #[serde(deserialize_with = "within::<1, 1_000_000, _, _>")]
    pub refusals_max: u32,
    #[serde(deserialize_with = "lasting::<1000, { 87_600 * HOUR }, _>")]
    pub token_lifetime: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterSettings {
    #[serde(deserialize_with = "within::<1, 1_000, _, _>")]
    pub max_replays: u32,
    pub collect: bool,
    #[serde(deserialize_with = "within::<1, 1_000, _, _>")]
    pub batch_max: usize,
    #[serde(deserialize_with = "lasting::<0, 10_000, _>")]
    pub linger: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub other_way_wait: Duration,
    #[serde(deserialize_with = "lasting::<10, MINUTE, _>")]
    pub other_way_poll: Duration,
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
    #[serde(deserialize_with = "within::<0, 1_000_000, _, _>")]
    pub approve_above: usize,
    /// Currency and base units; neither is checked further than that it could be one.
    #[serde(deserialize_with = "amounts::<100, _>")]
    pub approve_amounts: Vec<(String, String)>,
    #[serde(deserialize_with = "lasting::<1000, { 720 * HOUR }, _>")]
    pub approval_lasts: Duration,
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

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceSettings {
    #[serde(deserialize_with = "within::<1, 1_000, _, _>")]
    pub links_max: u32,
    #[serde(deserialize_with = "within::<0, 1_000_000, _, _>")]
    pub states_max: usize,
    #[serde(deserialize_with = "within::<1, 1_000_000, _, _>")]
    pub queue_max: usize,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub export_max: usize,
    #[serde(deserialize_with = "lasting::<10, { 5 * MINUTE }, _>")]
    pub export_interval: Duration,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub export_timeout: Duration,
    #[serde(deserialize_with = "lasting::<0, { 5 * MINUTE }, _>")]
    pub flush_deadline: Duration,
    #[serde(deserialize_with = "optional_path")]
    pub ca_file: Option<PathBuf>,
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

/// A setting as it counts, fit to be shown: no password is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownSetting {
    pub setting: String,
    pub value: serde_json::Value,
    pub from: Origin,
    /// How the value was found where the setting leaves it open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub derived: Option<&'static str>,
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
        Self::told(sources).map(|(settings, _)| settings)
    }

    /// The same, with every setting's value and where it comes from.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn told<E>(sources: Sources<E>) -> Result<(Self, Vec<ShownSetting>), ConfigError>
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
        let mut told = layers.told();
        settings.console.listen_is_set = told
            .iter()
            .any(|told| told.setting == "console.listen" && told.from != Origin::Default);
        let mut derive = |setting: &str, value: serde_json::Value, how: &'static str| {
            if let Some(told) = told.iter_mut().find(|told| told.setting == setting) {
                told.value = value;
                told.derived = Some(how);
            }
        };
        if settings.database.pool_size == 0 {
            settings.database.pool_size = settings.worker.lanes + 4;
            derive(
                "database.pool_size",
                settings.database.pool_size.into(),
                "worker.lanes + 4",
            );
        }
        if settings.worker.name.is_empty() {
            settings.worker.name = format!("{}-{}", host_name(), std::process::id());
            let name = settings.worker.name.clone();
            derive("worker.name", name.into(), "host name and process id");
        }
        Ok((settings, told))
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

    /// Where the database of the other cell is.
    ///
    /// # Errors
    /// If nobody said.
    pub fn target_url(&self) -> Result<&Secret, ConfigError> {
        if self.database.target_url.is_empty() {
            return Err(ConfigError::new(
                "no other cell is configured",
                "set SETTLED_TARGET_DATABASE_URL (postgres://user:password@host:5432/name) or \
                 SETTLED_TARGET_DATABASE_URL_FILE: the database of the other cell",
            ));
        }
        Ok(&self.database.target_url)
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

#[cfg(test)]
mod tests;

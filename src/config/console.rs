//! The console's settings.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{
    HOUR, MINUTE,
    fields::{address, addresses, header_name, lasting, optional_path, short_text, texts, within},
};

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSettings {
    #[serde(deserialize_with = "address")]
    pub listen: SocketAddr,
    /// Whether somebody set it, even to what it is anyhow.
    #[serde(skip)]
    pub listen_is_set: bool,
    pub in_worker: bool,
    /// Empty: by `database.url`.
    #[serde(deserialize_with = "optional_path")]
    pub database_url_file: Option<PathBuf>,
    pub read_only: bool,
    #[serde(deserialize_with = "optional_path")]
    pub proxy_secret_file: Option<PathBuf>,
    /// Empty: a proxy needs no certificate.
    #[serde(deserialize_with = "optional_path")]
    pub proxy_ca_file: Option<PathBuf>,
    #[serde(deserialize_with = "texts::<100, 255, _>")]
    pub proxy_names: Vec<String>,
    #[serde(deserialize_with = "header_name")]
    pub proxy_secret_header: String,
    #[serde(deserialize_with = "header_name")]
    pub proxy_user_header: String,
    #[serde(deserialize_with = "header_name")]
    pub proxy_groups_header: String,
    /// Empty: no issuer signs people in.
    #[serde(deserialize_with = "short_text::<0, 1024, _>")]
    pub oidc_issuer: String,
    #[serde(deserialize_with = "short_text::<0, 1024, _>")]
    pub oidc_client_id: String,
    #[serde(deserialize_with = "optional_path")]
    pub oidc_client_secret_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path")]
    pub oidc_ca_file: Option<PathBuf>,
    #[serde(deserialize_with = "texts::<20, 255, _>")]
    pub oidc_scopes: Vec<String>,
    #[serde(deserialize_with = "short_text::<1, 64, _>")]
    pub oidc_user_claim: String,
    #[serde(deserialize_with = "short_text::<1, 64, _>")]
    pub oidc_groups_claim: String,
    #[serde(deserialize_with = "short_text::<0, 1024, _>")]
    pub public_url: String,
    #[serde(deserialize_with = "texts::<1000, 255, _>")]
    pub readers: Vec<String>,
    #[serde(deserialize_with = "texts::<1000, 255, _>")]
    pub operators: Vec<String>,
    #[serde(deserialize_with = "texts::<1000, 255, _>")]
    pub approvers: Vec<String>,
    /// Empty: on stdout.
    #[serde(deserialize_with = "optional_path")]
    pub link_file: Option<PathBuf>,
    pub link_role: LinkRole,
    #[serde(deserialize_with = "lasting::<10_000, { 24 * HOUR }, _>")]
    pub link_lasts: Duration,
    #[serde(deserialize_with = "lasting::<MINUTE, { 24 * HOUR }, _>")]
    pub session_idle: Duration,
    #[serde(deserialize_with = "lasting::<MINUTE, { 168 * HOUR }, _>")]
    pub session_lasts: Duration,
    #[serde(deserialize_with = "lasting::<MINUTE, { 168 * HOUR }, _>")]
    pub ended_for: Duration,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub sessions_max: usize,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub rate_per_session: u32,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub rate_of_strangers: u32,
    #[serde(deserialize_with = "within::<1, 100_000, _, _>")]
    pub rate_of_all_strangers: u32,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub strangers_max: usize,
    #[serde(deserialize_with = "within::<1, 500, _, _>")]
    pub page: u32,
    #[serde(deserialize_with = "lasting::<500, { 5 * MINUTE }, _>")]
    pub live_interval: Duration,
    #[serde(deserialize_with = "within::<1, 10_000, _, _>")]
    pub viewers_max: usize,
    #[serde(deserialize_with = "addresses::<32, _>")]
    pub workers: Vec<SocketAddr>,
    #[serde(deserialize_with = "within::<1, 100, _, _>")]
    pub runs_max: usize,
    #[serde(deserialize_with = "within::<1024, 262_144, _, _>")]
    pub body_max: usize,
    #[serde(deserialize_with = "optional_path")]
    pub certificate_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional_path")]
    pub key_file: Option<PathBuf>,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub head_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, { 5 * MINUTE }, _>")]
    pub body_timeout: Duration,
    #[serde(deserialize_with = "lasting::<100, HOUR, _>")]
    pub idle_timeout: Duration,
    #[serde(deserialize_with = "lasting::<10_000, { 24 * HOUR }, _>")]
    pub answer_timeout: Duration,
    #[serde(deserialize_with = "within::<8, 100_000, _, _>")]
    pub connections_max: usize,
    #[serde(deserialize_with = "within::<4, 100_000, _, _>")]
    pub connections_per_address_max: usize,
}

/// Who opens the console's one-time link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkRole {
    Reader,
    Operator,
    Approver,
}

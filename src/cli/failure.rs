//! Why a command ends badly: a sentence, what to do about it, and an exit code.

use std::process::ExitCode;

use serde::Serialize;

use crate::{
    broker::BrokerError,
    config::ConfigError,
    store::{Fate, StoreError, trouble::Trouble},
};

/// How a command ended that could be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done,
    /// A check failed.
    Failed,
    /// Some of it was refused.
    Partly,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Partly => 3,
        })
    }
}

/// Why a command could not be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    code: u8,
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// Nothing of that name, or it is not as it was said to be.
    pub(super) fn refused(message: impl Into<String>) -> Self {
        Self::new(1, message)
    }

    /// A wrong argument or setting.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self::new(2, message)
    }

    /// The database or the broker is away.
    pub(super) fn away(message: impl Into<String>) -> Self {
        Self::new(69, message)
    }

    /// Our own fault.
    pub fn ours(message: impl Into<String>) -> Self {
        Self::new(70, message)
    }

    fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
        }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Says it on stderr. Nobody is left to tell if that fails.
    pub fn tell(&self, json: bool) -> ExitCode {
        if json {
            #[derive(Serialize)]
            struct Document<'a> {
                error: Body<'a>,
            }
            #[derive(Serialize)]
            struct Body<'a> {
                message: &'a str,
                hint: Option<&'a str>,
            }
            let document = Document {
                error: Body {
                    message: &self.message,
                    hint: self.hint.as_deref(),
                },
            };
            super::output::complain_in_json(&serde_json::to_string(&document).unwrap_or_default());
        } else {
            super::output::complain(&match &self.hint {
                Some(hint) => format!("settled: {}\n  hint: {hint}", self.message),
                None => format!("settled: {}", self.message),
            });
        }
        ExitCode::from(self.code)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        const PERMISSION_DENIED: &str = "42501";
        if error.sqlstate.as_deref() == Some(PERMISSION_DENIED) {
            return Failure::ours(format!("the database user lacks a permission: {error}"))
                .hint("`settled doctor` lists what it needs");
        }
        if error.is_schema() {
            return Failure::refused(format!(
                "the database has no schema of settled, or an older one: {error}"
            ))
            .hint("run `settled migrate`");
        }
        match error.fate {
            Fate::Away => {
                let trouble = error.trouble();
                Failure::away(format!("{}: {error}", trouble.in_a_command())).hint(trouble.hint())
            }
            Fate::Retry => Failure::away(format!("the database is too busy for this now: {error}"))
                .hint("try again; nothing was done by halves"),
            Fate::Bisect | Fate::Ours | Fate::CommittedBefore | Fate::Overtaken => {
                let failure = Failure::ours(format!("the database did not do what was asked: {error}"));
                match error.trouble() {
                    Trouble::Forgets => failure.hint(Trouble::Forgets.hint()),
                    _ => failure,
                }
            }
        }
    }
}

impl Failure {
    /// No connection could be had. What is refused here is the login, not what a command asks for.
    pub(super) fn no_broker(error: BrokerError) -> Self {
        match error {
            BrokerError::Refused { .. } => Failure::away(error.to_string())
                .hint("check user, password and virtual host in SETTLED_BROKER_URL (or --broker-url)"),
            BrokerError::Away(_) | BrokerError::Config(_) => error.into(),
        }
    }
}

impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Self {
        let sentence = error.to_string();
        match error {
            BrokerError::Away(_) if sentence.starts_with("TLS") => {
                Failure::away(sentence).hint("check broker.ca_file, the server's certificate and the host's name in it")
            }
            BrokerError::Away(_) => Failure::away(sentence)
                .hint("check that it runs and that SETTLED_BROKER_URL (or --broker-url) says where"),
            BrokerError::Refused { code, .. } => match code {
                403 => Failure::refused(sentence)
                    .hint("grant this user the permission (rabbitmqctl set_permissions); `settled doctor` says which"),
                404 => Failure::refused(sentence).hint("run `settled topology`"),
                406 => Failure::refused(sentence).hint("`settled doctor` says what is declared differently"),
                _ => Failure::ours(sentence),
            },
            BrokerError::Config(_) => {
                Failure::usage(sentence).hint("check broker.url, broker.ca_file and broker.heartbeat")
            }
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::usage(error.message()).hint(error.hint())
    }
}

//! Why a command ends badly: a sentence, what to do about it, and an exit code.

use std::process::ExitCode;

use serde::Serialize;

use crate::{
    broker::BrokerError,
    config::ConfigError,
    desk::{Refusal, RefusalKind},
    plain::plain,
    store::StoreError,
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

/// A right is missing, as sysexits.h has it for what is set up wrong: the program is well, and so is what it was asked.
const RIGHT: u8 = 78;

impl Failure {
    /// Nothing of that name, or it is not as it was said to be.
    pub(super) fn refused(message: impl Into<String>) -> Self {
        Self::new(1, message)
    }

    /// A wrong argument or setting.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self::new(2, message)
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

    /// The database's user may not do it.
    pub(super) fn right(message: impl Into<String>) -> Self {
        Self::new(RIGHT, message)
    }

    pub(super) fn is_right(&self) -> bool {
        self.code == RIGHT
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
            // What others said may stand in both: it has no line and no colour of its own.
            let (message, hint) = (plain(&self.message), self.hint.as_deref().map(plain));
            super::output::complain(&match hint {
                Some(hint) => format!("settled: {message}\n  hint: {hint}"),
                None => format!("settled: {message}"),
            });
        }
        ExitCode::from(self.code)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal.kind {
            RefusalKind::Refused => 1,
            RefusalKind::Usage => 2,
            RefusalKind::Away => 69,
            RefusalKind::Ours => 70,
            RefusalKind::Right => RIGHT,
        };
        Self {
            code,
            message: refusal.message,
            hint: refusal.hint,
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Refusal::from(error).into()
    }
}

impl Failure {
    /// No connection could be had. What is refused here is the login, not what a command asks for.
    pub(super) fn no_broker(error: BrokerError) -> Self {
        Refusal::no_broker(error).into()
    }
}

impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Self {
        Refusal::from(error).into()
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Refusal::from(error).into()
    }
}

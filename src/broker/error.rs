//! What can go wrong with the broker, in sentences without a secret.

use std::sync::Arc;

use lapin::ErrorKind;
use lapin::protocol::{AMQPErrorKind, AMQPHardError};

use super::{BrokerSettings, rights};
use crate::fail::Injected;
use crate::redact;

/// What went wrong with the broker. The sentence holds no password and no body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// Connection lost, refused or timed out: try again later, on a new connection.
    #[error("{}", away(.0))]
    Away(String),
    /// The broker understood and said no.
    #[error("{}", refused(*code, text))]
    Refused {
        /// AMQP reply code: 403 access refused, 404 not found, 405 locked, 406 precondition failed, 530 no such virtual
        /// host; 501 and 502 are our own, for a message that no AMQP frame can carry.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// A setting must change before trying again makes sense.
    #[error("{0}")]
    Config(String),
}

/// How an error begins that is no silence: both are there and do not come to terms.
const NO_TLS: &str = "TLS with the broker can not be agreed on";

fn away(text: &str) -> String {
    if text.starts_with(NO_TLS) {
        return text.to_owned();
    }
    format!("the broker is away: {text}")
}

/// A missing right is told as one, with the command that gives it.
fn refused(code: u16, text: &str) -> String {
    match rights::mending(text).filter(|_| code == 403) {
        Some(mending) => format!("a right is missing: {text}; {mending}"),
        None => format!("the broker refused with {code}: {text}"),
    }
}

/// What an injected error stands for: the connection broke.
impl From<Injected> for BrokerError {
    fn from(_: Injected) -> Self {
        BrokerError::Away("the connection broke, as a test asked for".to_owned())
    }
}

impl BrokerError {
    /// By lapin's codes, never by its text.
    pub(super) fn from_lapin(error: &lapin::Error) -> Self {
        let ErrorKind::ProtocolError(amqp) = error.kind() else {
            return BrokerError::Away(match is_of_tls(error) {
                true => format!("{NO_TLS}: {}", redact::outside(&error.to_string())),
                false => redact::outside(&error.to_string()),
            });
        };
        match amqp.kind() {
            // NOT_ALLOWED is how RabbitMQ answers to an unknown virtual host: waiting does not cure it.
            AMQPErrorKind::Soft(_) | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => BrokerError::Refused {
                code: amqp.get_id(),
                text: redact::outside(amqp.get_message().as_str()),
            },
            AMQPErrorKind::Hard(_) => BrokerError::Away(redact::outside(&error.to_string())),
        }
    }

    /// What keeps us from the broker, in a sentence without a word of the broker's own.
    pub fn trouble(&self) -> &'static str {
        match self {
            BrokerError::Away(text) if text.starts_with(NO_TLS) => NO_TLS,
            BrokerError::Away(_) => "the broker does not answer",
            BrokerError::Refused { code: 403, .. } => "the broker refuses our login, or a right is missing",
            BrokerError::Refused { code: 530, .. } => {
                "the broker has no such virtual host, or does not let this user into it"
            }
            BrokerError::Refused { .. } => "the broker refuses what it is asked",
            BrokerError::Config(_) => "a setting of the broker is wrong",
        }
    }

    /// A refusal of the whole connection. The broker's words about a virtual host repeat its name and the user's, which are
    /// parts of the URL; and of a URL that was written wrong they may be parts of the password.
    pub(super) fn of_the_door(self, settings: &BrokerSettings) -> Self {
        match self {
            BrokerError::Refused { code: 530, .. } => BrokerError::Refused {
                code: 530,
                text:
                    "NOT_ALLOWED: the virtual host was not found, is not open to this user, or has reached its limit \
                       of connections"
                        .to_owned(),
            },
            BrokerError::Refused { code, text } => BrokerError::Refused {
                code,
                text: settings.without_password(&text),
            },
            BrokerError::Away(text) => BrokerError::Away(settings.without_password(&text)),
            BrokerError::Config(_) => self,
        }
    }

    /// The reply code of a refusal.
    pub fn code(&self) -> Option<u16> {
        match self {
            BrokerError::Refused { code, .. } => Some(*code),
            BrokerError::Away(_) | BrokerError::Config(_) => None,
        }
    }
}

impl BrokerError {
    /// Whether one publication is the cause. Every other refusal (no exchange, no permission, no room for a connection) is
    /// somebody's setting: it passes, and nothing may be set aside for it.
    pub fn is_of_the_message(&self) -> bool {
        // Precondition failed, and our own two: a frame too large, a name too long.
        matches!(self.code(), Some(406 | 501 | 502))
    }
}

/// Whether TLS is what failed.
fn is_of_tls(error: &lapin::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = cause {
        let inner = match one.downcast_ref::<Arc<std::io::Error>>() {
            Some(io) => io.get_ref(),
            None => one.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref),
        };
        if one.is::<rustls::Error>() || inner.is_some_and(|inner| inner.is::<rustls::Error>()) {
            return true;
        }
        cause = one.source();
    }
    false
}

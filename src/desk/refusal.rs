//! Why a question is not answered, or an act not done: what happened, to what, and what to do next.

use crate::{
    broker::BrokerError,
    config::ConfigError,
    domain::public_key::may_be_private,
    store::{Fate, StoreError, trouble::Trouble},
};

/// Whose doing it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// Nothing of that name, or it is not as it was said to be.
    Refused,
    /// A wrong argument or setting.
    Usage,
    /// The database or the broker is away.
    Away,
    /// Our own fault.
    Ours,
    /// The database's user may not do what was asked.
    Right,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub kind: RefusalKind,
    pub message: String,
    pub hint: Option<String>,
}

impl Refusal {
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Refused, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Usage, message)
    }

    pub(crate) fn away(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Away, message)
    }

    pub(crate) fn ours(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Ours, message)
    }

    /// There is no such partner. A key in the wrong place may have the form of an id, and is not repeated.
    pub(crate) fn no_partner(enterprise_id: &str) -> Self {
        let shown = if may_be_private(enterprise_id) {
            "***"
        } else {
            enterprise_id
        };
        Self::refused(format!("no partner {shown} is registered"))
            .hint("`settled partner list` shows who is; `settled partner add` registers one")
    }

    fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        const PERMISSION_DENIED: &str = "42501";
        if error.sqlstate.as_deref() == Some(PERMISSION_DENIED) {
            return Refusal::new(
                RefusalKind::Right,
                format!("the database user lacks a permission: {error}"),
            )
            .hint("`settled roles` says which role may do what");
        }
        if error.is_schema() {
            return Refusal::refused(format!(
                "the database has no schema of settled, or an older one: {error}"
            ))
            .hint("run `settled migrate`");
        }
        // `settled.refuse_of_moving`.
        const MOVING: &str = "SX003";
        if error.sqlstate.as_deref() == Some(MOVING) {
            return Refusal::refused(format!("nothing was changed: {}", error.sentence()))
                .hint("`settled partner move` says where it lives, or how far its move is");
        }
        match error.fate {
            Fate::Away => {
                let trouble = error.trouble();
                Refusal::away(format!("{}: {}", trouble.in_a_command(), error.said())).hint(trouble.hint())
            }
            Fate::Retry => Refusal::away(format!("the database is too busy for this now: {error}"))
                .hint("try again; nothing was done by halves"),
            Fate::Bisect | Fate::Ours | Fate::CommittedBefore | Fate::Overtaken | Fate::Full => {
                let failure = Refusal::ours(format!("the database did not do what was asked: {error}"));
                match error.trouble() {
                    Trouble::Forgets => failure.hint(Trouble::Forgets.hint()),
                    _ => failure,
                }
            }
        }
    }
}

impl Refusal {
    /// No connection could be had. What is refused here is the login, not what a command asks for.
    pub(crate) fn no_broker(error: BrokerError) -> Self {
        match error {
            BrokerError::Refused { .. } => {
                let sentence = error.to_string();
                let hint = if sentence.contains("EXTERNAL") {
                    "the certificate is the login: check that the broker has a user of its name (ssl_cert_login_from), and the \
                     plugin rabbitmq_auth_mechanism_ssl with auth_mechanisms and a TLS listener that asks for certificates"
                } else {
                    "check user, password and virtual host in SETTLED_BROKER_URL (or --broker-url)"
                };
                Refusal::away(sentence).hint(hint)
            }
            BrokerError::Away(_) | BrokerError::Config(_) => error.into(),
        }
    }
}

impl From<BrokerError> for Refusal {
    fn from(error: BrokerError) -> Self {
        let sentence = error.to_string();
        match error {
            BrokerError::Away(_) if sentence.starts_with("TLS") => {
                Refusal::away(sentence).hint("check broker.ca_file, the server's certificate and the host's name in it, and broker.client_certificate_file")
            }
            BrokerError::Away(_) => Refusal::away(sentence)
                .hint("check that it runs and that SETTLED_BROKER_URL (or --broker-url) says where"),
            BrokerError::Refused { code, .. } => match code {
                403 => Refusal::refused(sentence)
                    .hint("grant this user the permission (rabbitmqctl set_permissions); `settled doctor` says which"),
                404 => Refusal::refused(sentence).hint("run `settled topology`"),
                406 => Refusal::refused(sentence).hint("`settled doctor` says what is declared differently"),
                _ => Refusal::ours(sentence),
            },
            BrokerError::Config(_) => {
                Refusal::usage(sentence).hint("check broker.url, broker.ca_file, broker.client_certificate_file and broker.heartbeat")
            }
        }
    }
}

impl From<ConfigError> for Refusal {
    fn from(error: ConfigError) -> Self {
        Refusal::usage(error.message()).hint(error.hint())
    }
}

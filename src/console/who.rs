//! Who somebody is to the console, and what they may: what every door says of whom it lets in.

use std::sync::Arc;

use crate::{config::LinkRole, desk::Author};

/// What somebody may do here. Each may what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConsoleRole {
    /// Look.
    Reader,
    /// Act.
    Operator,
    /// Approve what somebody else planned.
    Approver,
}

impl ConsoleRole {
    pub const ALL: [ConsoleRole; 3] = [ConsoleRole::Reader, ConsoleRole::Operator, ConsoleRole::Approver];

    pub fn as_str(self) -> &'static str {
        match self {
            ConsoleRole::Reader => "reader",
            ConsoleRole::Operator => "operator",
            ConsoleRole::Approver => "approver",
        }
    }
}

impl From<LinkRole> for ConsoleRole {
    fn from(role: LinkRole) -> Self {
        match role {
            LinkRole::Reader => ConsoleRole::Reader,
            LinkRole::Operator => ConsoleRole::Operator,
            LinkRole::Approver => ConsoleRole::Approver,
        }
    }
}

/// What a route needs of whoever asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: what one sees before one is signed in.
    Nobody,
    /// To be signed in with this role at least, also where nobody may change anything.
    Look(ConsoleRole),
    /// The same; it changes something.
    Change(ConsoleRole),
}

/// Partners that somebody is limited to; none: they are not.
pub(super) type Partners = Option<Arc<[String]>>;

/// By which door somebody came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WayIn {
    /// The one-time link: whoever runs the program.
    Link,
    /// A proxy that signed them in, and vouches for the name.
    Proxy,
    /// An issuer that did.
    Issuer,
}

impl WayIn {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            WayIn::Link => "one-time link",
            WayIn::Proxy => "proxy",
            WayIn::Issuer => "single sign-on",
        }
    }
}

/// Whom a door lets in.
#[derive(Clone, Debug)]
pub(super) struct LetIn {
    pub(super) name: String,
    pub(super) role: ConsoleRole,
    pub(super) partners: Partners,
    pub(super) entrance: WayIn,
}

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotLetIn {
    /// It did not come through the proxy.
    NotByProxy,
    /// The proxy says no name, or none that can be one.
    NoName,
    /// The issuer's token has no name in this claim, or none that can be one.
    NoClaim(String),
    /// No list has them.
    Unlisted(String),
    /// It was not this browser that went to the issuer, or long ago.
    NotFromHere,
    /// The issuer sends them back as nobody.
    NotSignedIn,
    /// What the issuer hands out can not be had now.
    IssuerAway(String),
    /// It hands out what can not be believed.
    NotBelieved(String),
}

/// A name that stands in the audit as it is.
pub(super) fn name_of(text: &str) -> Option<&str> {
    let fits = Author::operator(text).is_ok() && !text.trim().is_empty() && !text.chars().any(char::is_control);
    fits.then_some(text)
}

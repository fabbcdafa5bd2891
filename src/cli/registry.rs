//! `settled partner`, `settled key`, `settled connection`, `settled currency`: who may speak, for whom, and in which words. What is said counts from the
//! worker's next batch on.

mod connection;
mod currency;
mod key;
mod moving;
mod own_queue;
mod partner;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

pub(super) use self::{
    connection::{ConnectionCommand, connection},
    currency::{CurrencyCommand, currency},
    key::{KeyCommand, key},
    partner::{PartnerCommand, partner},
};
use super::{Context, Exit, Failure, bounded, dead_letters::acts::Operator, enterprise_id};
use crate::{
    desk::Refusal,
    domain::calendar::rfc3339,
    store::registry::{By, Registered},
};

/// Who acts and perhaps why, for the audit.
#[derive(Args)]
pub(super) struct Note {
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = why)]
    reason: Option<String>,
    #[command(flatten)]
    operator: Operator,
}

impl Note {
    /// Who acts.
    pub(super) fn operator(&self) -> String {
        self.operator.name()
    }

    /// The same with why.
    pub(super) fn by<'a>(&'a self, operator: &'a str) -> By<'a> {
        By {
            operator,
            why: self.reason.as_deref(),
        }
    }
}

fn why(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("say why".into());
    }
    bounded(text, 1024).map(|()| text.to_owned())
}

#[derive(Args)]
pub(super) struct Listing {
    /// Only those of this partner; --partner is the same
    #[arg(long, visible_alias = "partner", value_parser = enterprise_id)]
    enterprise_id: Option<String>,
}

impl Listing {
    pub(super) fn enterprise_id(&self) -> Option<&str> {
        self.enterprise_id.as_deref()
    }
}

/// A record, with what the command came to.
#[derive(Serialize)]
pub(super) struct Told<'a, T> {
    #[serde(flatten)]
    pub(super) record: &'a T,
    pub(super) result: &'static str,
}

/// Says the record as stored; `subject` and the words for people.
fn tell<T: Serialize>(
    context: &Context,
    subject: &str,
    registered: &Registered<T>,
    words: [&'static str; 3],
) -> Result<Exit, Failure> {
    let [added, exists, updated] = words;
    let (record, result, word) = match registered {
        Registered::Added(record) => (record, "added", added),
        Registered::Exists(record) => (record, "exists", exists),
        Registered::Updated(record) => (record, "updated", updated),
        Registered::Conflict(_)
        | Registered::Revoked(_)
        | Registered::NoPartner
        | Registered::NeverValid
        | Registered::Unproven(_) => {
            return Err(Failure::ours("a refusal was taken for an answer"));
        }
    };
    context
        .out
        .say(&Told { record, result }, |out| out.line(format!("{subject}: {word}")))?;
    Ok(Exit::Done)
}

/// Nothing is listed of a partner that is not there: it is a slip, or the list would be empty for another reason.
async fn known_partner(context: &Context, listing: &Listing, is_empty: bool) -> Result<(), Failure> {
    match listing.enterprise_id() {
        Some(enterprise_id) if is_empty && context.store()?.partner(enterprise_id).await?.is_none() => {
            Err(unknown_partner(enterprise_id))
        }
        Some(_) | None => Ok(()),
    }
}

fn unknown_partner(enterprise_id: &str) -> Failure {
    Refusal::no_partner(enterprise_id).into()
}

fn times(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), rfc3339)
}

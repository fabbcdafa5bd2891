//! Which messages: the flags that all commands share.

use clap::Args;
use uuid::Uuid;

use crate::{
    cli::{bounded, enterprise_id, uuid},
    desk::{Moment, Which, moment},
    domain::{
        dead_letter::{MadeBy, State},
        reason::Reason,
    },
};

/// Everything but the reason.
#[derive(Args, Debug)]
pub(super) struct Filters {
    /// Only those of this partner
    #[arg(long, value_name = "ENTERPRISE", value_parser = enterprise_id)]
    partner: Option<String>,
    /// Only those that name this allocation
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    allocation: Option<Uuid>,
    /// Only those with this nonce
    #[arg(long, allow_hyphen_values = true, value_parser = nonce)]
    nonce: Option<String>,
    /// Only those that failed last at this time or later: RFC 3339, or so long ago, such as 2h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Only those that failed last before this time: RFC 3339, or so long ago, such as 30m
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// Only those in this state: open, due, parked, settled, discarded, or all; may be repeated
    #[arg(long, value_name = "STATE", value_parser = state)]
    state: Vec<States>,
    /// Only those that can never settle as they are
    #[arg(long = "final", conflicts_with = "not_final")]
    is_final: bool,
    /// Only those that may settle later: what is worth replaying
    #[arg(long)]
    not_final: bool,
    /// Only those made by: settled (the worker), broker (by itself), unknown (whoever else wrote to settlement.dead)
    #[arg(long, value_name = "MAKER", value_parser = maker)]
    made_by: Option<MadeBy>,
    /// Only those of this group, as `groups` shows it
    #[arg(long, value_parser = group)]
    group: Option<String>,
}

/// Filters where `--reason` is one of them.
#[derive(Args, Debug)]
pub(super) struct Looking {
    /// Only those refused for this reason; may be repeated
    #[arg(long, alias = "reason-code", value_name = "CODE", value_parser = reason)]
    reason: Vec<Reason>,
    #[command(flatten)]
    others: Filters,
}

/// Filters where `--reason` is the operator's own.
#[derive(Args, Debug)]
pub(super) struct Acting {
    /// Only those refused for this reason; may be repeated
    #[arg(long, value_name = "CODE", value_parser = reason)]
    reason_code: Vec<Reason>,
    #[command(flatten)]
    others: Filters,
}

impl Looking {
    pub(super) fn which(&self) -> Which {
        self.others.which(&self.reason)
    }
}

impl Acting {
    pub(super) fn which(&self) -> Which {
        self.others.which(&self.reason_code)
    }
}

impl Filters {
    fn which(&self, reasons: &[Reason]) -> Which {
        let is_named = |state: &State| self.state.iter().any(|named| named.holds(*state));
        Which {
            states: State::ALL.into_iter().filter(is_named).collect(),
            reasons: reasons.to_vec(),
            is_final: (self.is_final || self.not_final).then_some(self.is_final),
            partner: self.partner.clone(),
            allocation: self.allocation,
            nonce: self.nonce.clone(),
            group: self.group.clone(),
            made_by: self.made_by,
            since: self.since,
            until: self.until,
        }
    }
}

/// What `--state` names.
#[derive(Clone, Copy, Debug)]
enum States {
    One(State),
    All,
}

impl States {
    fn holds(self, state: State) -> bool {
        match self {
            States::One(one) => one == state,
            States::All => true,
        }
    }
}

fn state(text: &str) -> Result<States, String> {
    if text == "all" {
        return Ok(States::All);
    }
    let names: Vec<&str> = State::ALL.into_iter().map(State::as_str).collect();
    State::parse(text)
        .map(States::One)
        .ok_or_else(|| format!("one of {}, or all", names.join(", ")))
}

fn reason(text: &str) -> Result<Reason, String> {
    let codes: Vec<&str> = Reason::ALL.into_iter().map(Reason::label).collect();
    Reason::parse(text).ok_or_else(|| format!("one of {}", codes.join(", ")))
}

fn maker(text: &str) -> Result<MadeBy, String> {
    let names: Vec<&str> = MadeBy::ALL.into_iter().map(MadeBy::as_str).collect();
    MadeBy::parse(text).ok_or_else(|| format!("one of {}", names.join(", ")))
}

fn nonce(text: &str) -> Result<String, String> {
    bounded(text, 256).map(|()| text.to_owned())
}

fn group(text: &str) -> Result<String, String> {
    bounded(text, 64).map(|()| text.to_owned())
}

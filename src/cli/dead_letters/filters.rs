//! Which messages: the flags that all commands share.

use clap::Args;
use uuid::Uuid;

use crate::{
    cli::{Failure, bounded, enterprise_id, maybe_when, reconcile::moment, uuid},
    domain::{
        dead_letter::{MadeBy, State},
        decide::Reason,
    },
    store::{Store, letters::Filter, reconcile::Moment},
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
    pub(super) async fn filter(&self, store: &Store, states: &[State]) -> Result<Filter, Failure> {
        self.others.filter(store, &self.reason, states).await
    }
}

impl Acting {
    pub(super) async fn filter(&self, store: &Store, states: &[State]) -> Result<Filter, Failure> {
        self.others.filter(store, &self.reason_code, states).await
    }

    /// Whether any flag was given.
    pub(super) fn is_given(&self) -> bool {
        let others = &self.others;
        !self.reason_code.is_empty()
            || others.partner.is_some()
            || others.allocation.is_some()
            || others.nonce.is_some()
            || others.since.is_some()
            || others.until.is_some()
            || !others.state.is_empty()
            || others.is_final
            || others.not_final
            || others.group.is_some()
            || others.made_by.is_some()
    }
}

impl Filters {
    /// The filter, with these states where none was named.
    async fn filter(&self, store: &Store, reasons: &[Reason], states: &[State]) -> Result<Filter, Failure> {
        let named: Vec<State> = State::ALL
            .into_iter()
            .filter(|state| self.state.iter().any(|named| named.holds(*state)))
            .collect();
        Ok(Filter {
            states: if named.is_empty() { states.to_vec() } else { named },
            reasons: reasons.to_vec(),
            is_final: (self.is_final || self.not_final).then_some(self.is_final),
            partner: self.partner.clone(),
            allocation: self.allocation,
            nonce: self.nonce.clone(),
            group: self.group.clone(),
            made_by: self.made_by,
            is_known: false,
            since: maybe_when(store, self.since).await?,
            until: maybe_when(store, self.until).await?,
        })
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
    let codes: Vec<&str> = Reason::ALL.into_iter().map(Reason::as_str).collect();
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

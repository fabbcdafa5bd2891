//! What will be published, in which order, and what each message must come to: drawn from a seed before anything runs.

mod draw;

use std::{collections::BTreeMap, fmt, ops::Range};

use serde::Serialize;
use uuid::Uuid;

use crate::{
    domain::{delivery::Publication, ledger::Amount, reason::Reason, verdict::VerdictKind},
    partner::{Reservation, SigningPartner},
};

/// What a message builds on was published at least so many waves before it, and answered before its wave begins.
pub(super) const WAVES_BETWEEN: usize = 2;

/// What the run is to look like.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Shape {
    pub(in crate::cli) messages: usize,
    pub(in crate::cli) invalid_percent: usize,
    /// Of a hundred right messages so many are sent again, or said again under a new nonce.
    pub(in crate::cli) repeated_percent: usize,
    /// The partners that do the bulk of it.
    pub(in crate::cli) enterprises: Vec<String>,
    /// Stands in every other name, so that runs do not meet.
    pub(in crate::cli) run: String,
    pub(in crate::cli) seed: u64,
    /// The broker's user that we publish as.
    pub(in crate::cli) user: String,
    pub(in crate::cli) waves: usize,
    /// Messages whose allocation is reserved after them.
    pub(in crate::cli) parked_then_reserved: usize,
    /// Whether the deadline of parked messages runs out while we watch.
    pub(in crate::cli) park_runs_out: bool,
}

/// What a message must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::cli) enum Expected {
    Settled,
    Duplicate,
    /// It waits for an allocation that never comes, longer than we watch.
    Parked,
    ParkedThenSettled,
    ParkedThenRejected,
    Rejected(Reason),
}

impl Expected {
    /// The last verdict of it.
    pub(in crate::cli) fn verdict(self) -> VerdictKind {
        match self {
            Expected::Settled | Expected::ParkedThenSettled => VerdictKind::Settled,
            Expected::Duplicate => VerdictKind::Duplicate,
            Expected::Parked => VerdictKind::Parked,
            Expected::ParkedThenRejected | Expected::Rejected(_) => VerdictKind::Rejected,
        }
    }

    pub(in crate::cli) fn reason(self) -> Option<Reason> {
        match self {
            Expected::Rejected(reason) => Some(reason),
            Expected::ParkedThenRejected => Some(Reason::AllocationNotFound),
            Expected::Settled | Expected::Duplicate | Expected::Parked | Expected::ParkedThenSettled => None,
        }
    }

    /// Whether it is parked on the way.
    pub(in crate::cli) fn parks(self) -> bool {
        match self {
            Expected::Parked | Expected::ParkedThenSettled | Expected::ParkedThenRejected => true,
            Expected::Settled | Expected::Duplicate | Expected::Rejected(_) => false,
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expected::Settled => f.write_str("settled"),
            Expected::Duplicate => f.write_str("duplicate"),
            Expected::Parked => f.write_str("parked"),
            Expected::ParkedThenSettled => f.write_str("parked, then settled"),
            Expected::ParkedThenRejected => f.write_str("parked, then rejected: allocation_not_found"),
            Expected::Rejected(reason) => write!(f, "rejected: {reason}"),
        }
    }
}

/// One message to publish.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Item {
    pub(in crate::cli) publication: Publication,
    pub(in crate::cli) digest: [u8; 32],
    pub(in crate::cli) enterprise_id: String,
    pub(in crate::cli) nonce: String,
    pub(in crate::cli) expected: Expected,
    /// The message whose outcome a duplicate repeats.
    pub(in crate::cli) repeats: Option<usize>,
    /// Type of the outcome event of what settles.
    pub(in crate::cli) event: String,
}

/// Messages that are published one after another, and what is reserved before them.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Wave {
    pub(in crate::cli) items: Range<usize>,
    pub(in crate::cli) reservations: Vec<Reservation>,
}

#[derive(Clone, Debug)]
pub(in crate::cli) struct Deposit {
    pub(in crate::cli) client_id: Uuid,
    pub(in crate::cli) amount: Amount,
    pub(in crate::cli) reference: String,
}

/// Everything that will happen.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Plan {
    pub(in crate::cli) partners: Vec<SigningPartner>,
    /// Registered, with a key and a connection, but suspended.
    pub(in crate::cli) suspended: SigningPartner,
    /// Bound to the broker's user that we publish as.
    pub(in crate::cli) bound: SigningPartner,
    pub(in crate::cli) deposits: Vec<Deposit>,
    /// Reserved before the first message.
    pub(in crate::cli) reservations: Vec<Reservation>,
    pub(in crate::cli) waves: Vec<Wave>,
    pub(in crate::cli) items: Vec<Item>,
    /// Reserved some time after the message was parked.
    pub(in crate::cli) late: Vec<(usize, Reservation)>,
    /// What every account must hold at the end, by kind, owner (none: external) and currency.
    pub(in crate::cli) balances: Balances,
}

/// Balances by account kind, owner and currency.
pub(in crate::cli) type Balances = BTreeMap<(String, Option<Uuid>, String), i128>;

/// How many messages of a plan must come to what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct Counts {
    pub(in crate::cli) settled: usize,
    pub(in crate::cli) duplicate: usize,
    pub(in crate::cli) parked: usize,
    pub(in crate::cli) rejected: usize,
}

impl Counts {
    pub(in crate::cli) fn add(&mut self, verdict: VerdictKind) {
        match verdict {
            VerdictKind::Settled => self.settled += 1,
            VerdictKind::Duplicate => self.duplicate += 1,
            VerdictKind::Parked => self.parked += 1,
            VerdictKind::Rejected => self.rejected += 1,
        }
    }
}

#[cfg(test)]
mod tests;

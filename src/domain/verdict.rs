//! What a message comes to.

use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use super::{allocation::Allocation, reason::Reason};

/// The four verdicts, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictKind {
    Settled,
    Duplicate,
    Parked,
    Rejected,
}

impl VerdictKind {
    pub const ALL: [VerdictKind; 4] = [
        VerdictKind::Settled,
        VerdictKind::Duplicate,
        VerdictKind::Parked,
        VerdictKind::Rejected,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            VerdictKind::Settled => "settled",
            VerdictKind::Duplicate => "duplicate",
            VerdictKind::Parked => "parked",
            VerdictKind::Rejected => "rejected",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

/// What a message comes to. Exactly one a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It moved the money; the record as it stands now.
    Settled { allocation: Arc<Allocation> },
    /// Its effect was there already; the record as it stands.
    Duplicate { allocation: Arc<Allocation> },
    /// It waits for its allocation.
    Parked {
        parked_at: Timestamp,
        until: Timestamp,
        /// It waited already: nothing is written, nothing published.
        again: bool,
    },
    /// It is refused.
    Rejected { reason: Reason, detail: String },
}

impl Verdict {
    pub fn kind(&self) -> VerdictKind {
        match self {
            Verdict::Settled { .. } => VerdictKind::Settled,
            Verdict::Duplicate { .. } => VerdictKind::Duplicate,
            Verdict::Parked { .. } => VerdictKind::Parked,
            Verdict::Rejected { .. } => VerdictKind::Rejected,
        }
    }

    /// The reason that goes with it. A parked message waits because its allocation was not found.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Verdict::Settled { .. } | Verdict::Duplicate { .. } => None,
            Verdict::Parked { .. } => Some(Reason::AllocationNotFound),
            Verdict::Rejected { reason, .. } => Some(*reason),
        }
    }
}

/// A verdict and whether its sender was proven (step 9 of the table was reached).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Verdict,
    pub proven: bool,
}

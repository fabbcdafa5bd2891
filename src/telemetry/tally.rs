//! What a batch came to and what was published of it, counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::labels::{EventFate, EventType, PartnerLabels};
use crate::domain::{reason::Reason, verdict::VerdictKind};

/// The verdicts of one batch, counted.
#[derive(Debug, Default)]
pub struct Tally {
    pub(super) verdicts: BTreeMap<(VerdictKind, Option<Reason>), u64>,
    pub(super) partners: BTreeMap<(Arc<str>, VerdictKind), u64>,
    pub(super) messages: u64,
}

impl Tally {
    pub fn new() -> Self {
        Self::default()
    }

    /// One message. `reason` is that of a rejection or a parking.
    pub fn add(
        &mut self,
        labels: &PartnerLabels,
        enterprise_id: Option<&str>,
        verdict: VerdictKind,
        reason: Option<Reason>,
    ) {
        // Only these say that the registry was asked and knew the partner.
        let registered = reason.is_none_or(Reason::knew_partner);
        *self.verdicts.entry((verdict, reason)).or_default() += 1;
        *self
            .partners
            .entry((labels.label(enterprise_id, registered), verdict))
            .or_default() += 1;
        self.messages += 1;
    }

    pub fn messages(&self) -> u64 {
        self.messages
    }

    pub fn count(&self, verdict: VerdictKind) -> u64 {
        self.verdicts
            .iter()
            .filter(|((of, _), _)| *of == verdict)
            .map(|(_, count)| count)
            .sum()
    }
}

/// How much the side room holds for one reason.
#[derive(Clone, Copy, Debug)]
pub struct HeldOf {
    pub why: &'static str,
    pub messages: u64,
    pub bytes: u64,
    pub oldest: Duration,
}

/// The confirmed publications of one batch, counted.
#[derive(Debug, Default)]
pub struct Published {
    pub(super) events: BTreeMap<(EventType, EventFate), u64>,
    pub(super) dead_letters: u64,
}

impl Published {
    pub fn new() -> Self {
        Self::default()
    }

    /// So many of a type: a message may hold several.
    pub fn events(&mut self, kind: EventType, fate: EventFate, count: u64) {
        *self.events.entry((kind, fate)).or_default() += count;
    }

    pub fn dead_letter(&mut self) {
        self.dead_letters += 1;
    }
}

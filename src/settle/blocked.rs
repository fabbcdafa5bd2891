//! What is known to be in the way: locked by somebody's open transaction, or a partner that is in quarantine; and which
//! messages would have to wait for it.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    domain::{
        changeset::Changeset,
        delivery::Source,
        ledger::funds_of,
        message::MessageRef,
        snapshot::{Snapshot, Whereabouts},
    },
    store::locked::Locks,
};

/// Locks that are remembered at most.
const LOCKS_MAX: usize = 10_000;

/// Whether the side room may take what is in the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SideRoom {
    #[default]
    Free,
    /// It was asked, and has no place for this.
    Full,
}

/// What batches found locked lately. No batch waits for it again.
#[derive(Debug, Default)]
pub struct KnownLocks {
    locks: Mutex<Locks>,
    /// Whether there are any: asked for every batch.
    any: AtomicBool,
    /// Partners that are in quarantine, as far as this worker knows.
    quarantined: Mutex<HashSet<String>>,
    any_quarantined: AtomicBool,
}

/// What a message may have to wait for, as far as it tells by itself.
pub fn wanted(batch: &[MessageRef<'_>]) -> Locks {
    let mut wanted = Locks::default();
    for message in batch {
        let parked = message.delivery.source.is_parked();
        wanted.dead_letters.extend(message.delivery.source.dead_letter());
        if let Source::Parked { key, .. } = message.delivery.source {
            wanted.parked.insert(key);
        }
        let Ok(content) = &message.facts.content else {
            continue;
        };
        wanted.allocations.insert(content.update.id);
        wanted.allocations.extend(&content.signed_ids);
        wanted.receipts.extend(content.receipt_keys().map(|key| key.0));
        if !parked {
            wanted.parkings.insert(content.update.enterprise_id.clone());
        }
    }
    wanted
}

impl KnownLocks {
    fn locks(&self) -> MutexGuard<'_, Locks> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anything is known to be locked. Nearly always nothing is.
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    pub fn all(&self) -> Locks {
        self.locks().clone()
    }

    /// Remembers what is locked, until [`KnownLocks::forget`].
    pub fn remember(&self, found: Locks) {
        let mut locks = self.locks();
        if locks.len().saturating_add(found.len()) <= LOCKS_MAX {
            locks.extend(found);
        }
        self.any.store(!locks.is_empty(), Ordering::Release);
    }

    /// Of what was asked for, only this is locked still. Says whether something was freed.
    pub fn forget(&self, asked: &Locks, still: &Locks) -> bool {
        let mut locks = self.locks();
        let before = locks.len();
        locks.forget(asked, still);
        self.any.store(!locks.is_empty(), Ordering::Release);
        locks.len() < before
    }

    /// The places of messages that need what is known to be locked, as far as they tell by themselves; and of those that
    /// speak of the same allocations.
    pub fn blocked(&self, batch: &[MessageRef<'_>]) -> Vec<usize> {
        if !self.any() {
            return Vec::new();
        }
        let locks = self.locks();
        let hits = |message: &MessageRef<'_>| {
            let one = wanted(std::slice::from_ref(message));
            !one.allocations.is_disjoint(&locks.allocations)
                || !one.receipts.is_disjoint(&locks.receipts)
                || !one.parked.is_disjoint(&locks.parked)
                || !one.dead_letters.is_disjoint(&locks.dead_letters)
                || !one.parkings.is_disjoint(&locks.parkings)
        };
        places(batch, hits)
    }

    fn quarantines(&self) -> MutexGuard<'_, HashSet<String>> {
        self.quarantined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who is in quarantine, as the registry says.
    pub fn quarantine(&self, partners: HashSet<String>) {
        let mut known = self.quarantines();
        self.any_quarantined.store(!partners.is_empty(), Ordering::Release);
        *known = partners;
    }

    /// Whether anybody is known to be in quarantine. Nearly always nobody is.
    pub fn any_quarantined(&self) -> bool {
        self.any_quarantined.load(Ordering::Acquire)
    }

    /// Whether a partner is known to be in quarantine.
    pub fn is_quarantined(&self, enterprise_id: &str) -> bool {
        self.any_quarantined() && self.quarantines().contains(enterprise_id)
    }

    /// The places of messages of partners that are in quarantine, which is remembered. A replay is judged: a person asked for
    /// it. So is what comes from a queue and has no place in the side room. Of a partner that is on its way to another cell, or
    /// lives there, nothing is judged.
    pub fn blocked_by_quarantine(&self, batch: &[MessageRef<'_>], snapshot: &Snapshot, room: SideRoom) -> Vec<usize> {
        let of = |id: &String| snapshot.partners.get(id).filter(|partner| partner.quarantined);
        if !snapshot.partners.keys().any(|id| of(id).is_some()) {
            return Vec::new();
        }
        let mut known = self.quarantines();
        let blocked = places(batch, |message| {
            let Ok(content) = &message.facts.content else {
                return false;
            };
            let whose = &content.update.enterprise_id;
            let Some(partner) = of(whose) else {
                return false;
            };
            known.insert(whose.clone());
            match message.delivery.source {
                Source::Queue { .. } => room == SideRoom::Free || partner.whereabouts != Whereabouts::Here,
                Source::Parked { .. } | Source::Held { .. } => true,
                Source::Replayed { .. } => partner.whereabouts != Whereabouts::Here,
                Source::Plain => false,
            }
        });
        self.any_quarantined.store(true, Ordering::Release);
        blocked
    }

    /// The places of messages whose settlements move money of accounts that are known to be locked.
    pub fn blocked_by_accounts(&self, batch: &[MessageRef<'_>], changes: &Changeset) -> Vec<usize> {
        if !self.any() {
            return Vec::new();
        }
        let locks = self.locks();
        let blocked: BTreeSet<_> = changes
            .settlements
            .iter()
            .filter(|settlement| {
                let transfer = &settlement.transfer;
                locks.funds.contains(&funds_of(transfer.debit.1).0)
                    || locks.funds.contains(&funds_of(transfer.credit.1).0)
            })
            .map(|settlement| settlement.allocation.id)
            .collect();
        if blocked.is_empty() {
            return Vec::new();
        }
        places(batch, |message| {
            let content = message.facts.content.as_ref();
            content.is_ok_and(|content| blocked.contains(&content.update.id))
        })
    }
}

/// Whether something of a batch is of a partner that is on its way to another cell, or lives there.
pub(super) fn waits_for_a_move(batch: &[MessageRef<'_>], snapshot: &Snapshot) -> bool {
    batch.iter().any(|message| {
        let content = message.facts.content.as_ref().ok();
        let partner = content.and_then(|content| snapshot.partners.get(&content.update.enterprise_id));
        partner.is_some_and(|partner| partner.whereabouts != Whereabouts::Here)
    })
}

fn places(batch: &[MessageRef<'_>], mut hits: impl FnMut(&MessageRef<'_>) -> bool) -> Vec<usize> {
    batch
        .iter()
        .enumerate()
        .filter(|(_, message)| hits(message))
        .map(|(index, _)| index)
        .collect()
}

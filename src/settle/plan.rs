//! What a selection of dead letters would come to if it were replayed now: the same steps as for the worker's batches,
//! slice by slice, and nothing is written. Each slice sees what those before it would have changed.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use uuid::Uuid;

use super::Batch;
use crate::{
    domain::{
        allocation::Status,
        changeset::Changeset,
        decide,
        ledger::Amount,
        message::MessageRef,
        reason::Reason,
        receipt::{Receipt, ReceiptKey},
        snapshot::{Parked, Rules, Snapshot},
        verdict::{Verdict, VerdictKind},
    },
    store::{
        Store, StoreError,
        plans::{PlanItem, StoredMessage},
    },
};

/// Messages that are judged at a time.
pub const SLICE: usize = 256;

/// What the slices judged so far would have changed.
#[derive(Debug, Default)]
pub struct Ahead {
    allocations: HashMap<Uuid, SettledAhead>,
    receipts: HashMap<ReceiptKey, Receipt>,
    parked: HashMap<ReceiptKey, Parked>,
    /// Messages that would be parked, by enterprise.
    parked_counts: HashMap<String, u64>,
    /// The same in bytes.
    parked_bytes: HashMap<String, u64>,
}

/// The part of a settled allocation that later messages are judged by.
#[derive(Debug)]
struct SettledAhead {
    status: Status,
    partner_external_id: Option<String>,
    partner_symbol: Option<String>,
    settled_nonce: Option<String>,
}

impl Ahead {
    /// The snapshot of these messages as it would be after the slices before them.
    fn lay_over(&self, snapshot: &mut Snapshot, messages: &[MessageRef<'_>]) {
        for (id, allocation) in &mut snapshot.allocations {
            // What settled meanwhile in truth stands as it is.
            if let Some(moved) = self.allocations.get(id)
                && allocation.status == Status::Reserved
            {
                let allocation = Arc::make_mut(allocation);
                allocation.status = moved.status;
                allocation.partner_external_id.clone_from(&moved.partner_external_id);
                allocation.partner_symbol.clone_from(&moved.partner_symbol);
                allocation.settled_nonce.clone_from(&moved.settled_nonce);
            }
        }
        let contents = messages
            .iter()
            .filter_map(|message| message.facts.content.as_ref().ok());
        for key in contents.flat_map(|content| content.receipt_keys()) {
            let is_settled = |receipt: &Receipt| receipt.verdict == VerdictKind::Settled;
            if let Some(receipt) = self.receipts.get(&key)
                && !snapshot.receipts.get(&key).is_some_and(is_settled)
            {
                snapshot.receipts.insert(key, receipt.clone());
            }
            if let Some(parked) = self.parked.get(&key) {
                snapshot.parked.entry(key).or_insert_with(|| parked.clone());
            }
        }
        for (enterprise_id, count) in &self.parked_counts {
            let known = snapshot.parked_counts.entry(enterprise_id.clone()).or_default();
            *known = known.saturating_add(*count);
        }
        for (enterprise_id, bytes) in &self.parked_bytes {
            let known = snapshot.parked_bytes.entry(enterprise_id.clone()).or_default();
            *known = known.saturating_add(*bytes);
            snapshot.parked_bytes_of_all = snapshot.parked_bytes_of_all.saturating_add(*bytes);
        }
    }

    fn take(&mut self, changes: Changeset) {
        for settlement in changes.settlements {
            let allocation = Arc::unwrap_or_clone(settlement.allocation);
            let moved = SettledAhead {
                status: allocation.status,
                partner_external_id: allocation.partner_external_id,
                partner_symbol: allocation.partner_symbol,
                settled_nonce: allocation.settled_nonce,
            };
            self.allocations.insert(allocation.id, moved);
        }
        self.receipts.extend(changes.new_receipts);
        self.receipts.extend(changes.changed_receipts);
        for (key, new) in changes.newly_parked {
            let bytes = self.parked_bytes.entry(new.enterprise_id.clone()).or_default();
            *bytes = bytes.saturating_add(new.bytes);
            let count = self.parked_counts.entry(new.enterprise_id).or_default();
            *count = count.saturating_add(1);
            self.parked.insert(key, new.parked);
        }
    }
}

/// Judges one slice, in order.
///
/// # Errors
/// The database is away.
pub async fn slice(
    store: &Store,
    rules: &Rules,
    ahead: &mut Ahead,
    stored: Vec<StoredMessage>,
) -> Result<Vec<PlanItem>, StoreError> {
    let ids: Vec<(Uuid, bool)> = stored.iter().map(|(id, delivery)| (*id, delivery.is_some())).collect();
    let batch = Batch::read(stored.into_iter().filter_map(|(_, delivery)| delivery).collect()).await;
    let messages = batch.refs();
    let mut snapshot = store.snapshot(&messages).await?;
    ahead.lay_over(&mut snapshot, &messages);
    let (judgements, changes) = catch_unwind(AssertUnwindSafe(|| decide::decide(snapshot, &messages, rules)))
        .map_err(|_| StoreError::blame_the_batch("deciding the slice panicked"))?;
    super::one_each(messages.len(), judgements.len())?;
    let mut amounts: HashMap<Uuid, Amount> = changes
        .settlements
        .iter()
        .map(|settlement| (settlement.allocation.id, settlement.transfer.amount.clone()))
        .collect();
    let mut verdicts = judgements.into_iter().map(|judgement| judgement.verdict);
    let items = ids
        .into_iter()
        .map(
            |(id, is_readable)| match is_readable.then(|| verdicts.next()).flatten() {
                Some(verdict) => {
                    let amount = match &verdict {
                        Verdict::Settled { allocation } => amounts.remove(&allocation.id),
                        Verdict::Duplicate { .. } | Verdict::Parked { .. } | Verdict::Rejected { .. } => None,
                    };
                    PlanItem {
                        id,
                        verdict: verdict.kind(),
                        reason: verdict.reason(),
                        detail: match verdict {
                            Verdict::Rejected { detail, .. } => Some(detail),
                            Verdict::Settled { .. } | Verdict::Duplicate { .. } | Verdict::Parked { .. } => None,
                        },
                        amount,
                    }
                }
                None => PlanItem {
                    id,
                    verdict: VerdictKind::Rejected,
                    reason: Some(Reason::Internal),
                    detail: Some("it is kept in a format that this version does not read".into()),
                    amount: None,
                },
            },
        )
        .collect();
    ahead.take(changes);
    Ok(items)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::domain::changeset::NewlyParked;

    /// Room that an earlier slice takes is taken: in messages and in bytes, of one partner and in all.
    #[test]
    fn what_would_wait_takes_room_from_the_slices_after_it() {
        let mut ahead = Ahead::default();
        for (number, enterprise, bytes) in [(1, "acme", 700), (2, "beta", 50), (3, "acme", 11)] {
            let key = ReceiptKey(Uuid::from_u128(number));
            let new = NewlyParked {
                key,
                index: 0,
                enterprise_id: enterprise.to_owned(),
                nonce: String::new(),
                allocation_id: Uuid::nil(),
                parked: Parked {
                    seq: 0,
                    parked_at: Timestamp::UNIX_EPOCH,
                    until: Timestamp::UNIX_EPOCH,
                    attempts: 0,
                    also: None,
                },
                due_at: Timestamp::UNIX_EPOCH,
                bytes,
            };
            let mut changes = Changeset::default();
            changes.newly_parked.insert(key, new);
            ahead.take(changes);
        }
        let mut snapshot = Snapshot {
            parked_counts: HashMap::from([("acme".to_owned(), 1)]),
            parked_bytes: HashMap::from([("acme".to_owned(), 1_000)]),
            parked_bytes_of_all: 5_000,
            ..Snapshot::default()
        };
        ahead.lay_over(&mut snapshot, &[]);
        assert_eq!(
            snapshot.parked_counts,
            HashMap::from([("acme".to_owned(), 3), ("beta".to_owned(), 1)])
        );
        assert_eq!(
            snapshot.parked_bytes,
            HashMap::from([("acme".to_owned(), 1_711), ("beta".to_owned(), 50)])
        );
        assert_eq!(snapshot.parked_bytes_of_all, 5_761);
    }
}

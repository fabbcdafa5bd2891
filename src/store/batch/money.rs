//! Writes what settled: states, transfers with what authorised them, balances.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use num_bigint::BigInt;
use uuid::Uuid;

use super::JudgedBatch;
use crate::{
    domain::{
        allocation::PolicyResult,
        changeset::Changeset,
        ledger::{AccountKind, funds_of},
        signature::signature_bytes,
    },
    fail::Point,
    store::{
        StoreError,
        write::{Rows, Write, count, params},
    },
};

const UPDATE_ALLOCATIONS: &str = "\
    /* batch::update_allocations */
    WITH touched AS (
        UPDATE settled.allocations AS a
        SET status = n.status,
            reason = n.reason,
            retriable = false,
            partner_external_id = n.partner_external_id,
            evaluation_id = n.evaluation_id,
            pending_approval_id = n.pending_approval_id,
            policy_result = n.policy_result,
            settled_nonce = n.nonce,
            updated_at = n.updated_at
        FROM unnest(
            $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
            $9::timestamptz[]
        ) AS n (id, status, reason, partner_external_id, evaluation_id, pending_approval_id, policy_result, nonce,
                updated_at)
        WHERE a.id = n.id
          AND a.status = 'reserved'
        RETURNING 1
    )
    SELECT settled.exactly('batch::update_allocations', count(*), $10) FROM touched";

const INSERT_TRANSFERS: &str = "\
    /* batch::insert_transfers */
    INSERT INTO settled.transfers (
        subject_id, step, event, debit_account, credit_account, amount, receipt_key, payload, signature, batch_id,
        created_at
    )
    SELECT n.subject_id, 1, n.event, n.debit, n.credit, n.amount::numeric(78, 0), n.receipt_key, n.payload, n.signature,
           $9, $10
    FROM unnest(
        $1::uuid[], $2::text[], $3::bigint[], $4::bigint[], $5::text[], $6::uuid[], $7::text[], $8::bytea[]
    ) AS n (subject_id, event, debit, credit, amount, receipt_key, payload, signature)";

const LOCK_FUNDS: &str = "\
    /* batch::lock_funds */
    SELECT FROM settled.funds WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE";

const UPDATE_BALANCES: &str = "\
    /* batch::update_balances */
    WITH touched AS (
        UPDATE settled.funds AS f
        SET available = f.available + n.available::numeric,
            held = f.held + n.held::numeric,
            allocated = f.allocated + n.allocated::numeric
        FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) AS n (id, available, held, allocated)
        WHERE f.id = n.id
        RETURNING 1
    )
    SELECT settled.exactly('batch::update_balances', count(*), $5) FROM touched";

/// `status = 'reserved'` is the second guard: an allocation leaves it at most once.
pub(super) fn update_allocations(changes: &Changeset) -> Write<'_> {
    let each = || changes.settlements.iter().map(|settlement| &settlement.allocation);
    let ids: Vec<Uuid> = each().map(|allocation| allocation.id).collect();
    let settlements = ids.len();
    let statuses: Vec<&str> = each().map(|allocation| allocation.status.as_str()).collect();
    let reasons: Vec<Option<&str>> = each().map(|allocation| allocation.reason.as_deref()).collect();
    let partner_ids: Vec<Option<&str>> = each()
        .map(|allocation| allocation.partner_external_id.as_deref())
        .collect();
    let evaluations: Vec<Option<&str>> = each().map(|allocation| allocation.evaluation_id.as_deref()).collect();
    let approvals: Vec<Option<&str>> = each()
        .map(|allocation| allocation.pending_approval_id.as_deref())
        .collect();
    let policies: Vec<Option<&str>> = each()
        .map(|allocation| allocation.policy_result.map(PolicyResult::as_str))
        .collect();
    let nonces: Vec<Option<&str>> = each().map(|allocation| allocation.settled_nonce.as_deref()).collect();
    let times: Vec<Timestamp> = each().map(|allocation| allocation.updated_at).collect();
    Write::unless(
        ids.is_empty(),
        UPDATE_ALLOCATIONS,
        Rows::Certain(1),
        params![
            ids,
            statuses,
            reasons,
            partner_ids,
            evaluations,
            approvals,
            policies,
            nonces,
            times,
            count(settlements),
        ],
    )
    .then(Point::AllocationsUpdated)
}

/// Each with what authorised it.
pub(super) fn insert_transfers<'a>(outcome: &JudgedBatch<'a>) -> Write<'a> {
    let settlements = &outcome.changes.settlements;
    let each = || settlements.iter().map(|settlement| &settlement.transfer);
    let subjects: Vec<Uuid> = each().map(|transfer| transfer.allocation_id).collect();
    let events: Vec<&str> = settlements
        .iter()
        .map(|settlement| settlement.allocation.status.as_str())
        .collect();
    let debits: Vec<i64> = each().map(|transfer| transfer.debit.1).collect();
    let credits: Vec<i64> = each().map(|transfer| transfer.credit.1).collect();
    let amounts: Vec<String> = each().map(|transfer| transfer.amount.quantity.to_string()).collect();
    let contents = || settlements.iter().map(|settlement| &settlement.content);
    let receipts: Vec<Uuid> = contents().map(|content| content.key.0).collect();
    let payloads: Vec<&str> = contents().map(|content| content.update.payload.as_str()).collect();
    let signatures: Vec<Option<Vec<u8>>> = contents()
        .map(|content| signature_bytes(&content.update.signature).map(|bytes| bytes.to_vec()))
        .collect();
    Write::unless(
        subjects.is_empty(),
        INSERT_TRANSFERS,
        Rows::Certain(subjects.len()),
        params![
            subjects,
            events,
            debits,
            credits,
            amounts,
            receipts,
            payloads,
            signatures,
            outcome.id,
            outcome.now,
        ],
    )
    .then(Point::TransfersInserted)
}

/// What a row of funds changes by.
#[derive(Default)]
struct Sums {
    available: BigInt,
    held: BigInt,
    allocated: BigInt,
}

/// The changes of accounts by the rows that they stand in. The world outside has no part in a settlement.
fn sums(changes: &Changeset) -> Result<BTreeMap<i64, Sums>, StoreError> {
    let mut sums = BTreeMap::<i64, Sums>::new();
    for (account, change) in &changes.balances {
        let (funds, kind) = funds_of(*account);
        let row = sums.entry(funds).or_default();
        match kind {
            AccountKind::Available => row.available += change,
            AccountKind::Held => row.held += change,
            AccountKind::Allocated => row.allocated += change,
            AccountKind::External => {
                let sentence = format!("a settlement moves funds of account {account}, which is of the world outside");
                return Err(StoreError::ours("settle_batch", sentence));
            }
        }
    }
    Ok(sums)
}

/// An UPDATE FROM takes its rows in any order; locking them first, in id order, keeps batches from deadlocking. Funds come
/// last because some of them are hot.
pub(super) fn lock_funds(changes: &Changeset) -> Write<'_> {
    let ids: BTreeSet<i64> = changes.balances.keys().map(|account| funds_of(*account).0).collect();
    let ids: Vec<i64> = ids.into_iter().collect();
    Write::unless(ids.is_empty(), LOCK_FUNDS, Rows::Any, params![ids])
}

pub(super) fn update_balances(changes: &Changeset) -> Result<Write<'_>, StoreError> {
    let sums = sums(changes)?;
    let ids: Vec<i64> = sums.keys().copied().collect();
    let column = |of: fn(&Sums) -> &BigInt| -> Vec<String> { sums.values().map(|row| of(row).to_string()).collect() };
    let write = Write::unless(
        ids.is_empty(),
        UPDATE_BALANCES,
        Rows::Certain(1),
        params![
            ids,
            column(|row| &row.available),
            column(|row| &row.held),
            column(|row| &row.allocated),
            count(sums.len()),
        ],
    );
    Ok(write.then(Point::BalancesUpdated))
}

//! Writes what settled: states, transfers with their entries, balances, and by what it was authorised.

use jiff::Timestamp;
use uuid::Uuid;

use super::Outcome;
use crate::{
    domain::{allocation::PolicyResult, decide::Changeset, signature::signature_bytes},
    fail::Point,
    store::write::{Rows, Write, params},
};

const UPDATE_ALLOCATIONS: &str = "\
    /* batch::update_allocations */
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
      AND a.status = 'reserved'";

const INSERT_SETTLEMENTS: &str = "\
    /* batch::insert_settlements */
    INSERT INTO settled.settlements (
        allocation_id, enterprise_id, nonce, payload, signature, public_key, batch_id, settled_at
    )
    SELECT n.*, $7, $8
    FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::bytea[]) AS n";

const INSERT_TRANSFERS: &str = "\
    /* batch::insert_transfers */
    WITH made AS (
        INSERT INTO settled.transfers (
            subject_id, step, event, debit_account, credit_account, amount, batch_id, created_at
        )
        SELECT n.subject_id, 1, n.event, n.debit, n.credit, n.amount::numeric(78, 0), $6, $7
        FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bigint[], $5::text[])
             AS n (subject_id, event, debit, credit, amount)
        RETURNING id, debit_account, credit_account, amount
    )
    INSERT INTO settled.entries (transfer_id, account_id, change)
    SELECT id, debit_account, -amount FROM made
    UNION ALL
    SELECT id, credit_account, amount FROM made";

const LOCK_ACCOUNTS: &str = "\
    /* batch::lock_accounts */
    SELECT FROM settled.accounts WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE";

const UPDATE_BALANCES: &str = "\
    /* batch::update_balances */
    UPDATE settled.accounts AS a
    SET balance = a.balance + n.change::numeric
    FROM unnest($1::bigint[], $2::text[]) AS n (id, change)
    WHERE a.id = n.id";

/// `status = 'reserved'` is the second guard: an allocation leaves it at most once.
pub(super) fn update_allocations(changes: &Changeset) -> Write<'_> {
    let each = || changes.settlements.iter().map(|settlement| &settlement.allocation);
    let ids: Vec<Uuid> = each().map(|allocation| allocation.id).collect();
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
        Rows::Exactly(ids.len()),
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
        ],
    )
    .then(Point::AllocationsUpdated)
}

pub(super) fn insert_settlements<'a>(outcome: &Outcome<'a>) -> Write<'a> {
    let settlements = &outcome.changes.settlements;
    let ids: Vec<Uuid> = settlements.iter().map(|settlement| settlement.allocation.id).collect();
    let updates = || settlements.iter().map(|settlement| &settlement.content.update);
    let enterprises: Vec<&str> = updates().map(|update| update.enterprise_id.as_str()).collect();
    let nonces: Vec<&str> = updates().map(|update| update.nonce.as_str()).collect();
    let payloads: Vec<&str> = updates().map(|update| update.payload.as_str()).collect();
    let signatures: Vec<Option<Vec<u8>>> = updates()
        .map(|update| signature_bytes(&update.signature).map(|bytes| bytes.to_vec()))
        .collect();
    let keys: Vec<&[u8]> = settlements
        .iter()
        .map(|settlement| settlement.public_key.as_bytes().as_slice())
        .collect();
    Write::unless(
        ids.is_empty(),
        INSERT_SETTLEMENTS,
        Rows::Exactly(ids.len()),
        params![
            ids,
            enterprises,
            nonces,
            payloads,
            signatures,
            keys,
            outcome.id,
            outcome.now,
        ],
    )
    .then(Point::SettlementsInserted)
}

pub(super) fn insert_transfers<'a>(outcome: &Outcome<'a>) -> Write<'a> {
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
    Write::unless(
        subjects.is_empty(),
        INSERT_TRANSFERS,
        // Two entries each.
        Rows::Exactly(subjects.len() * 2),
        params![subjects, events, debits, credits, amounts, outcome.id, outcome.now],
    )
    .then(Point::TransfersInserted)
}

/// An UPDATE FROM takes its rows in any order; locking them first, in id order, keeps batches from deadlocking. Accounts
/// come last because some of them are hot.
pub(super) fn lock_accounts(changes: &Changeset) -> Write<'_> {
    let ids: Vec<i64> = changes.balances.keys().copied().collect();
    Write::unless(ids.is_empty(), LOCK_ACCOUNTS, Rows::Any, params![ids])
}

pub(super) fn update_balances(changes: &Changeset) -> Write<'_> {
    let ids: Vec<i64> = changes.balances.keys().copied().collect();
    let sums: Vec<String> = changes.balances.values().map(ToString::to_string).collect();
    Write::unless(
        ids.is_empty(),
        UPDATE_BALANCES,
        Rows::Exactly(ids.len()),
        params![ids, sums],
    )
    .then(Point::BalancesUpdated)
}

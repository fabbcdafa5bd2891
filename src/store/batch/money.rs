//! Writes what is new: receipts, and of what settled its state, its transfer with what authorised it, and the balances.

use std::collections::BTreeMap;

use num_bigint::BigInt;
use uuid::Uuid;

use super::receipts::ReceiptColumns;
use crate::store::judged::JudgedBatch;
use crate::{
    domain::{
        allocation::PolicyResult,
        changeset::Changeset,
        ledger::{AccountKind, funds_of},
    },
    fail::Point,
    store::{
        StoreError,
        write::{Rows, Write, params},
    },
};

/// Everything that a settled batch changes, in one statement: an answer of the server's is a packet and a waking up, and those
/// cost more than the rows of a small batch. Its last line asks for the parts in this order, funds last, because some of them
/// are hot; each part must touch as many rows as it is given.
///
/// `status = 'reserved'` is the second guard: an allocation leaves it at most once. An UPDATE FROM takes its rows in any order;
/// that funds are locked first, in id order, keeps batches from deadlocking: how many were locked is asked before the first is
/// changed. What a row holds is looked at once it is locked. No two arrays are joined: the plan is made once for any number of
/// rows, and would compare each with each. Arrays stand in the list of a SELECT, which reads all of them in step; in FROM
/// each would be copied row by row into a store of its own first. What is new was seen at the batch's one moment, `$2`.
const SETTLE: &str = "\
    /* batch::settle */
    WITH receipts AS (
        INSERT INTO settled.receipts (
            key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id,
            public_key, first_seen, last_seen, batch_id
        )
        SELECT unnest($3::uuid[]), unnest($4::text[]), unnest($5::text[]), unnest($6::bytea[]), unnest($7::bytea[]),
               unnest($8::text[]), unnest($9::text[]), unnest($10::uuid[]), unnest($11::uuid[]), unnest($12::bytea[]),
               $2, $2, $1
        RETURNING 1
    ), allocations AS (
        UPDATE settled.allocations AS a
        SET status = n.status,
            reason = n.reason,
            retriable = false,
            partner_external_id = n.partner_external_id,
            partner_symbol = n.partner_symbol,
            evaluation_id = n.evaluation_id,
            pending_approval_id = n.pending_approval_id,
            policy_result = n.policy_result,
            settled_nonce = n.nonce,
            updated_at = $2
        FROM (
            SELECT unnest($13::uuid[]) AS id, unnest($14::text[]) AS status, unnest($15::text[]) AS reason,
                   unnest($16::text[]) AS partner_external_id, unnest($17::text[]) AS partner_symbol,
                   unnest($18::text[]) AS evaluation_id, unnest($19::text[]) AS pending_approval_id,
                   unnest($20::text[]) AS policy_result, unnest($21::text[]) AS nonce
        ) AS n
        WHERE a.id = n.id
          AND a.status = 'reserved'
        RETURNING 1
    ), transfers AS (
        INSERT INTO settled.transfers (
            subject_id, step, event, debit_account, credit_account, amount, receipt_key, payload, signature, batch_id,
            created_at
        )
        SELECT n.subject_id, 1, n.event, n.debit, n.credit, n.amount::numeric(78, 0), n.receipt_key, n.payload,
               n.signature, $1, $2
        FROM (
            SELECT unnest($13::uuid[]) AS subject_id, unnest($14::text[]) AS event, unnest($22::bigint[]) AS debit,
                   unnest($23::bigint[]) AS credit, unnest($24::text[]) AS amount, unnest($25::uuid[]) AS receipt_key,
                   unnest($26::text[]) AS payload, unnest($27::bytea[]) AS signature
        ) AS n
        RETURNING 1
    ), locked AS MATERIALIZED (
        SELECT id
        FROM settled.funds
        WHERE id = ANY ($28::bigint[])
        ORDER BY id
        FOR NO KEY UPDATE
    ), funds AS (
        UPDATE settled.funds AS f
        SET available = f.available + n.available::numeric,
            held = f.held + n.held::numeric,
            allocated = f.allocated + n.allocated::numeric
        FROM (
            SELECT unnest($28::bigint[]) AS id, unnest($29::text[]) AS available, unnest($30::text[]) AS held,
                   unnest($31::text[]) AS allocated
        ) AS n
        WHERE f.id = n.id
          AND (SELECT count(*) FROM locked) = cardinality($28::bigint[])
        RETURNING 1
    )
    SELECT settled.exactly('batch::settle, receipts,', (SELECT count(*) FROM receipts), cardinality($3::uuid[])),
           settled.exactly('batch::settle, allocations,', (SELECT count(*) FROM allocations), cardinality($13::uuid[])),
           settled.exactly('batch::settle, transfers,', (SELECT count(*) FROM transfers), cardinality($13::uuid[])),
           settled.exactly('batch::settle, funds,', (SELECT count(*) FROM funds), cardinality($28::bigint[]))";

/// New receipts; of what settled its state, its transfer with what authorised it, and the balances.
pub(super) fn settle<'a>(outcome: &JudgedBatch<'a>) -> Result<Write<'a>, StoreError> {
    let changes = outcome.changes;
    let receipts = ReceiptColumns::of(&changes.new_receipts);
    let settlements = &changes.settlements;
    let each = || settlements.iter().map(|settlement| &settlement.allocation);
    let ids: Vec<Uuid> = each().map(|allocation| allocation.id).collect();
    let statuses: Vec<&str> = each().map(|allocation| allocation.status.as_str()).collect();
    let reasons: Vec<Option<&str>> = each().map(|allocation| allocation.reason.as_deref()).collect();
    let partner_ids: Vec<Option<&str>> = each()
        .map(|allocation| allocation.partner_external_id.as_deref())
        .collect();
    let symbols: Vec<Option<&str>> = each().map(|allocation| allocation.partner_symbol.as_deref()).collect();
    let evaluations: Vec<Option<&str>> = each().map(|allocation| allocation.evaluation_id.as_deref()).collect();
    let approvals: Vec<Option<&str>> = each()
        .map(|allocation| allocation.pending_approval_id.as_deref())
        .collect();
    let policies: Vec<Option<&str>> = each()
        .map(|allocation| allocation.policy_result.map(PolicyResult::as_str))
        .collect();
    let nonces: Vec<Option<&str>> = each().map(|allocation| allocation.settled_nonce.as_deref()).collect();
    let transfers = || settlements.iter().map(|settlement| &settlement.transfer);
    let debits: Vec<i64> = transfers().map(|transfer| transfer.debit.1).collect();
    let credits: Vec<i64> = transfers().map(|transfer| transfer.credit.1).collect();
    let amounts: Vec<String> = transfers()
        .map(|transfer| transfer.amount.quantity.to_string())
        .collect();
    let contents = || settlements.iter().map(|settlement| &settlement.content);
    let receipt_keys: Vec<Uuid> = contents().map(|content| content.key.0).collect();
    let payloads: Vec<&str> = contents().map(|content| content.payload.as_str()).collect();
    let signatures: Vec<Option<&[u8]>> = contents()
        .map(|content| content.signature.as_ref().map(<[u8; 65]>::as_slice))
        .collect();
    let sums = sums(changes)?;
    let funds: Vec<i64> = sums.keys().copied().collect();
    let column = |of: fn(&Sums) -> &BigInt| -> Vec<String> { sums.values().map(|row| of(row).to_string()).collect() };
    let has_settled = !settlements.is_empty();
    let write = Write::unless(
        changes.new_receipts.is_empty() && !has_settled,
        SETTLE,
        Rows::Certain(1),
        params![
            outcome.id,
            outcome.now,
            receipts.keys,
            receipts.enterprise_ids,
            receipts.nonces,
            receipts.payload_digests,
            receipts.message_digests,
            receipts.verdicts,
            receipts.reasons,
            receipts.allocation_ids,
            receipts.event_ids,
            receipts.public_keys,
            ids,
            statuses,
            reasons,
            partner_ids,
            symbols,
            evaluations,
            approvals,
            policies,
            nonces,
            debits,
            credits,
            amounts,
            receipt_keys,
            payloads,
            signatures,
            funds,
            column(|row| &row.available),
            column(|row| &row.held),
            column(|row| &row.allocated),
        ],
    );
    Ok(write
        .then_if(!changes.new_receipts.is_empty(), Point::ReceiptsInserted)
        .then_if(has_settled, Point::AllocationsUpdated)
        .then_if(has_settled, Point::TransfersInserted)
        .then_if(has_settled, Point::BalancesUpdated))
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

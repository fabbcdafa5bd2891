//! Allocations, as every statement reads them.

use tokio_postgres::Row;

use super::{
    Session, StoreError,
    row::{InOrder, corrupt},
};
use crate::domain::{
    allocation::{Allocation, Kind, PolicyResult, Status},
    ledger::{Amount, Quantity},
};

/// The numbers of the accounts are those of `settled.account()`.
pub(super) const ALLOCATION_COLUMNS: &str = "\
    a.id, a.type, a.status, a.currency, a.quantity::text AS quantity, a.connection_id, a.client_id,
    a.client_external_id, a.initiated_by, a.notes, a.reason, a.retriable, a.partner_external_id, a.partner_symbol,
    a.evaluation_id,
    a.pending_approval_id, a.policy_result, a.settled_nonce, a.created_at, a.updated_at,
    a.client_funds * 4 + 1 AS available_account, a.connection_funds * 4 + 2 AS held_account,
    a.connection_funds * 4 + 3 AS allocated_account,
    c.enterprise_id, c.partners_client_id, c.partners_connection_id";

/// The statement that reads allocations, with what follows its FROM.
pub(super) fn select_allocations(function: &str, rest: &str) -> String {
    format!(
        "/* {function} */
        SELECT {ALLOCATION_COLUMNS}
        FROM settled.allocations AS a
        JOIN settled.connections AS c ON c.connection_id = a.connection_id
        {rest}"
    )
}

/// Reads a row of [`select_allocations`].
pub(super) fn allocation(session: &Session, row: &Row) -> Result<Allocation, StoreError> {
    let read = || {
        let mut column = InOrder::of(row);
        // In the order of ALLOCATION_COLUMNS: the fields of a literal are read as they are written.
        Some(Allocation {
            id: column.take(),
            kind: Kind::parse(column.take())?,
            status: Status::parse(column.take())?,
            amount: Amount {
                currency: column.take(),
                quantity: Quantity::parse(column.take()).ok()?,
            },
            connection_id: column.take(),
            client_id: column.take(),
            client_external_id: column.take(),
            initiated_by: column.take(),
            notes: column.take(),
            reason: column.take(),
            retriable: column.take(),
            partner_external_id: column.take(),
            partner_symbol: column.take(),
            evaluation_id: column.take(),
            pending_approval_id: column.take(),
            policy_result: match column.take::<Option<&str>>() {
                Some(text) => Some(PolicyResult::parse(text)?),
                None => None,
            },
            settled_nonce: column.take(),
            created_at: column.take(),
            updated_at: column.take(),
            available_account: column.take(),
            held_account: column.take(),
            allocated_account: column.take(),
            enterprise_id: column.take(),
            partners_client_id: column.take(),
            partners_connection_id: column.take(),
        })
    };
    read().ok_or_else(|| corrupt(session, "an allocation"))
}

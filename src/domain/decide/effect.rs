//! Steps 10 to 15: what a message whose sender is proven comes to, by the books.

use std::sync::Arc;

use crate::domain::{
    allocation::{Allocation, PolicyResult, Status},
    currency::Symbols,
    ledger::Transfer,
    reason::Reason,
    receipt::{Receipt, ReceiptKey},
    snapshot::{Partner, Snapshot},
    update::{Outcome, Update},
    verdict::VerdictKind,
};

/// What they come to.
pub(super) enum Effect {
    Refused(Reason, String),
    NotFound,
    /// The same terminal status was asked for before.
    AlreadySo(Arc<Allocation>),
    /// The record as it will be, and the movement.
    Settles(Arc<Allocation>, Transfer),
}

/// Steps 10 to 15, without effect.
pub(super) fn settle_step(snapshot: &Snapshot, key: ReceiptKey, update: &Update, partner: Option<&Partner>) -> Effect {
    if contradicts(update) {
        let detail = "policyResult: rejected contradicts the status cleared".into();
        return Effect::Refused(Reason::PolicyContradiction, detail);
    }
    if let Some(detail) = partner.and_then(|partner| partner.inactive(update.kind)) {
        return Effect::Refused(Reason::PartnerInactive, detail.into());
    }
    let Some(allocation) = snapshot.allocations.get(&update.id) else {
        return Effect::NotFound;
    };
    if allocation.enterprise_id != update.enterprise_id {
        return Effect::Refused(
            Reason::NotPermitted,
            "the id belongs to another partner's connection".into(),
        );
    }
    if allocation.kind != update.kind {
        let detail = format!("{}: the id is of the other type", update.kind.id_field());
        return Effect::Refused(Reason::NotPermitted, detail);
    }
    // What was a duplicate before is one still, whatever became of the map: its effect is there.
    let receipt = snapshot.receipts.get(&key);
    let was_duplicate = receipt.is_some_and(|receipt| receipt.verdict == VerdictKind::Duplicate);
    if !was_duplicate && let Some((reason, detail)) = currency_objection(allocation, update, partner) {
        return Effect::Refused(reason, detail.into());
    }
    if let Some(field) = mismatch(allocation, update) {
        return Effect::Refused(Reason::AllocationMismatch, format!("{field}: differs from the record"));
    }
    let (status, reason) = match &update.outcome {
        Outcome::Cleared => (Status::Cleared, None),
        Outcome::Released { reject_reason } => (Status::Released, Some(reject_reason.clone())),
    };
    if allocation.status == status {
        return Effect::AlreadySo(Arc::clone(allocation));
    }
    let transfer = match allocation.status {
        Status::Reserved => allocation.transfer_to(status),
        Status::Cleared | Status::Released => None,
    };
    let Some(transfer) = transfer else {
        return Effect::Refused(
            Reason::AlreadySettled,
            format!("it is {} already", allocation.status.as_str()),
        );
    };
    let settled = Allocation {
        status,
        reason,
        retriable: false,
        partner_external_id: Some(update.partners_id.clone()),
        partner_symbol: (update.amount.currency != allocation.amount.currency).then(|| update.amount.currency.clone()),
        evaluation_id: update.evaluation_id.clone(),
        pending_approval_id: update.pending_approval_id.clone(),
        policy_result: update.policy_result,
        settled_nonce: Some(update.nonce.clone()),
        updated_at: snapshot.now,
        id: allocation.id,
        kind: allocation.kind,
        amount: allocation.amount.clone(),
        connection_id: allocation.connection_id,
        enterprise_id: allocation.enterprise_id.clone(),
        client_id: allocation.client_id,
        partners_client_id: allocation.partners_client_id.clone(),
        partners_connection_id: allocation.partners_connection_id.clone(),
        client_external_id: allocation.client_external_id.clone(),
        initiated_by: allocation.initiated_by.clone(),
        notes: allocation.notes.clone(),
        created_at: allocation.created_at,
        available_account: allocation.available_account,
        held_account: allocation.held_account,
        allocated_account: allocation.allocated_account,
    };
    Effect::Settles(Arc::new(settled), transfer)
}

/// What was refused for good stays refused, whatever a map of currencies that was changed since would make of it.
pub(super) fn as_before(snapshot: &Snapshot, key: ReceiptKey, effect: Effect) -> Effect {
    let receipt = snapshot.receipts.get(&key);
    let closed = receipt.filter(|receipt| receipt.is_closed() && receipt.verdict == VerdictKind::Rejected);
    match effect {
        Effect::Settles(..) | Effect::AlreadySo(_) => match closed.and_then(|receipt: &Receipt| receipt.reason) {
            Some(reason) => Effect::Refused(
                reason,
                "it was refused for good, and a change of the map does not bring it back: sign it anew, with a new nonce"
                    .into(),
            ),
            None => effect,
        },
        Effect::Refused(..) | Effect::NotFound => effect,
    }
}

/// Step 10: cleared, although the policy rejected it.
pub(super) fn contradicts(update: &Update) -> bool {
    update.outcome == Outcome::Cleared && update.policy_result == Some(PolicyResult::Rejected)
}

/// Why the amount is not in the currency of the record. What settled it once is not asked for again: its symbol stands there.
fn currency_objection(
    allocation: &Allocation,
    update: &Update,
    partner: Option<&Partner>,
) -> Option<(Reason, &'static str)> {
    let symbol = &update.amount.currency;
    if allocation.partner_symbol.as_ref() == Some(symbol) {
        return None;
    }
    let (unmapped, reserved) = (Symbols::default(), &allocation.amount.currency);
    let symbols = partner.map_or(&unmapped, |partner| &partner.symbols);
    symbols.objection(symbol, reserved)
}

/// The first field after the currency, in the table's order, in which the message differs from the record.
fn mismatch(allocation: &Allocation, update: &Update) -> Option<&'static str> {
    let settled_as = allocation.partner_external_id.as_ref();
    [
        ("amount.quantity", allocation.amount.quantity == update.amount.quantity),
        ("clientId", allocation.client_id == update.client_id),
        ("connectionId", allocation.connection_id == update.connection_id),
        (
            "partnersClientId",
            allocation.partners_client_id == update.partners_client_id,
        ),
        (
            "partnersConnectionId",
            allocation.partners_connection_id == update.partners_connection_id,
        ),
        (
            update.kind.partners_id_field(),
            settled_as.is_none_or(|id| *id == update.partners_id),
        ),
    ]
    .into_iter()
    .find_map(|(field, equal)| (!equal).then_some(field))
}

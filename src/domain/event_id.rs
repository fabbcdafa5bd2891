//! What an event is called: the same for every copy, whoever tells it.

use std::fmt;

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    allocation::{Allocation, Kind, Status},
    calendar::rfc3339,
    message::MessageRef,
    reason::Reason,
    update::{Outcome, Update},
    verdict::Verdict,
};

/// The namespace of event ids.
pub(super) const NAMESPACE: Uuid = Uuid::from_u128(0x6f1d_0c52_0e0b_5c7e_9a53_3c1c_8a2d_7f10);

/// The type of a settlement's event; none while it is reserved.
pub(super) fn settlement_type(kind: Kind, status: Status) -> Option<&'static str> {
    match status {
        Status::Reserved => None,
        Status::Cleared => Some(outcome_type(kind, true)),
        Status::Released => Some(outcome_type(kind, false)),
    }
}

fn outcome_type(kind: Kind, is_cleared: bool) -> &'static str {
    match (kind, is_cleared) {
        (Kind::Allocation, true) => "allocation.cleared",
        (Kind::Allocation, false) => "allocation.released",
        (Kind::Deallocation, true) => "deallocation.cleared",
        (Kind::Deallocation, false) => "deallocation.released",
    }
}

/// The type of the event of a message that waits.
pub const PARKED: &str = "update.parked";
/// The type of the event of a message that is refused.
pub const REJECTED: &str = "update.rejected";

/// The types of the events of what is done to a partner itself.
pub const SUSPENDED: &str = "partner.suspended";
pub const QUARANTINED: &str = "partner.quarantined";
pub const RESUMED: &str = "partner.resumed";
/// The type of the event of a partner that has no valid key any more soon.
pub const KEY_ENDING: &str = "key.ending";

/// The id of the event of an allocation that left `reserved`: the same for every copy.
pub fn settlement_id(allocation: &Allocation) -> Option<Uuid> {
    settlement_type(allocation.kind, allocation.status).map(|kind| named(kind, allocation.id))
}

fn named(kind: &str, what: impl fmt::Display) -> Uuid {
    Uuid::new_v5(&NAMESPACE, format!("{kind}|{what}").as_bytes())
}

/// The id of the event of an act on a partner, by the time that its notice has.
pub fn partner_act_id(kind: &str, enterprise_id: &str, at: Timestamp) -> Uuid {
    named(kind, format_args!("{enterprise_id}|{}", rfc3339(at)))
}

/// The id of the event that a partner's last key ends: one for each key and each end that it was given.
pub fn key_ending_id(enterprise_id: &str, public_key: &str, ends_at: Timestamp) -> Uuid {
    named(
        KEY_ENDING,
        format_args!("{enterprise_id}|{public_key}|{}", rfc3339(ends_at)),
    )
}

pub(super) fn refusal_id(kind: &str, message: MessageRef<'_>, reason: Reason) -> Uuid {
    refusal_id_of(
        kind,
        &message.delivery.routing_key,
        &message.facts.message_digest,
        reason,
    )
}

/// The id of the event by which a message is refused or parked, from what is kept of it.
pub fn refusal_id_of(kind: &str, routing_key: &str, message_digest: &[u8; 32], reason: Reason) -> Uuid {
    let name = format!("{kind}|{routing_key}|{}|{reason}", hex::encode(message_digest));
    Uuid::new_v5(&NAMESPACE, name.as_bytes())
}

/// The id of the event that a verdict on an update is told by. What settled, now or before, has the outcome that the update says.
pub fn id_of(message: MessageRef<'_>, update: &Update, verdict: &Verdict) -> Uuid {
    match verdict {
        Verdict::Settled { .. } | Verdict::Duplicate { .. } => {
            let is_cleared = matches!(update.outcome, Outcome::Cleared);
            named(outcome_type(update.kind, is_cleared), update.id)
        }
        Verdict::Parked { .. } => refusal_id(PARKED, message, Reason::AllocationNotFound),
        Verdict::Rejected { reason, .. } => refusal_id(REJECTED, message, *reason),
    }
}

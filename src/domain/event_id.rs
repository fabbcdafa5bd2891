//! What an event is called: the same for every copy, whoever tells it.

use uuid::Uuid;

use super::{
    allocation::{Allocation, Kind, Status},
    message::MessageRef,
    reason::Reason,
    verdict::VerdictKind,
};

/// The namespace of event ids.
pub(super) const NAMESPACE: Uuid = Uuid::from_u128(0x6f1d_0c52_0e0b_5c7e_9a53_3c1c_8a2d_7f10);

/// The type of a settlement's event; none while it is reserved.
pub(super) fn settlement_type(kind: Kind, status: Status) -> Option<&'static str> {
    match (kind, status) {
        (Kind::Allocation, Status::Cleared) => Some("allocation.cleared"),
        (Kind::Allocation, Status::Released) => Some("allocation.released"),
        (Kind::Deallocation, Status::Cleared) => Some("deallocation.cleared"),
        (Kind::Deallocation, Status::Released) => Some("deallocation.released"),
        (Kind::Allocation | Kind::Deallocation, Status::Reserved) => None,
    }
}

/// The type of the event of a message that waits.
pub const PARKED: &str = "update.parked";
/// The type of the event of a message that is refused.
pub const REJECTED: &str = "update.rejected";

/// The id of the event of an allocation that left `reserved`: the same for every copy.
pub fn settlement_id(allocation: &Allocation) -> Option<Uuid> {
    let kind = settlement_type(allocation.kind, allocation.status)?;
    Some(Uuid::new_v5(&NAMESPACE, format!("{kind}|{}", allocation.id).as_bytes()))
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

/// The id of the event that a verdict is told by.
pub fn id_of(
    message: MessageRef<'_>,
    verdict: VerdictKind,
    reason: Option<Reason>,
    allocation: Option<&Allocation>,
) -> Uuid {
    let settlement = || allocation.and_then(settlement_id).unwrap_or_default();
    match verdict {
        VerdictKind::Settled | VerdictKind::Duplicate => settlement(),
        VerdictKind::Parked => refusal_id(PARKED, message, reason.unwrap_or(Reason::AllocationNotFound)),
        VerdictKind::Rejected => refusal_id(REJECTED, message, reason.unwrap_or(Reason::Internal)),
    }
}

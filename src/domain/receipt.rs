//! What is kept for ever of a message whose sender was proven.

use jiff::Timestamp;
use uuid::Uuid;

use super::{digest, reason::Reason, signature::PublicKey, verdict::VerdictKind};

/// (enterpriseId, nonce) in sixteen bytes: the head of `SHA-256(enterpriseId || 0x00 || nonce)`. Fixed and short, because
/// the index over it is the one that grows for ever. A partner would need 2^64 nonces to collide with itself, and can not
/// aim at another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReceiptKey(pub Uuid);

impl ReceiptKey {
    pub fn new(enterprise_id: &str, nonce: &str) -> Self {
        Self(digest::id_of(
            [enterprise_id.as_bytes(), &[0], nonce.as_bytes()].concat(),
        ))
    }
}

/// What became of the first authentic payload that carried a nonce. Kept for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub enterprise_id: String,
    pub nonce: String,
    pub payload_digest: [u8; 32],
    pub message_digest: [u8; 32],
    pub verdict: VerdictKind,
    pub reason: Option<Reason>,
    pub allocation_id: Uuid,
    pub event_id: Uuid,
    /// The key that proved it.
    pub public_key: PublicKey,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// An operator has made the nonce unusable.
    pub voided: bool,
}

impl Receipt {
    /// A receipt never leaves `settled` or a final reason.
    pub fn is_closed(&self) -> bool {
        self.verdict == VerdictKind::Settled || self.reason.is_some_and(Reason::is_final)
    }
}

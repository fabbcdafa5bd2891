//! Bytes to facts: size, shape, fields, what was signed and by whom. Needs no registry.

use uuid::Uuid;

use super::{
    allocation::{Kind, PolicyResult},
    decide::Reason,
    ledger::Amount,
    signature::Signer,
};

/// The largest body, in bytes.
pub const BODY_MAX: usize = 262_144;
/// The largest property list with headers, in bytes on the wire.
pub const PROPERTIES_MAX: usize = 16_384;

/// The partner's message, decoded from the body. Not yet anybody's word: see [`super::signature::Verified`].
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The partner's enterprise, from the routing key.
    pub enterprise_id: String,
    pub kind: Kind,
    /// `allocationId` or `deallocationId`.
    pub id: Uuid,
    pub amount: Amount,
    pub client_id: Uuid,
    pub connection_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    /// `partnersAllocationId` or `partnersDeallocationId`.
    pub partners_id: String,
    pub outcome: Outcome,
    pub nonce: String,
    pub evaluation_id: Option<String>,
    pub pending_approval_id: Option<String>,
    pub policy_result: Option<PolicyResult>,
    /// The signed text, as received.
    pub payload: String,
    /// The signature's text, as received.
    pub signature: String,
}

/// What the partner says became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Cleared,
    Released { reject_reason: String },
}

/// All that a message tells by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// SHA-256 of the body.
    pub message_digest: [u8; 32],
    /// The enterprise in the routing key, where the key has the documented form.
    pub enterprise_id: Option<String>,
    /// The first of steps 1 to 3 that fails, or the content.
    pub content: Result<Box<Content>, Refusal>,
}

/// A message whose body decoded, and what its signature and payload say.
#[derive(Clone, Debug, PartialEq)]
pub struct Content {
    pub update: Update,
    /// SHA-256 of the payload's UTF-8 bytes.
    pub payload_digest: [u8; 32],
    /// The `nonce` in the signed text, where it is an object with such a string: the identity of what was signed.
    pub signed_nonce: Option<String>,
    /// The `allocationId` (`deallocationId`) in the signed text, where there is one.
    pub signed_id: Option<Uuid>,
    /// Who signed it, as far as the text and the curve tell.
    pub signer: Signer,
    /// Whether the signed text agrees with the body; `Err` is the detail.
    pub agreement: Result<(), String>,
}

/// A refusal that needs no registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    /// A sentence for the partner; at most 512 bytes, never echoes the body.
    pub detail: String,
    /// Set where the body decoded far enough to read them (`invalid_field` of another field).
    pub allocation_id: Option<Uuid>,
    pub nonce: Option<String>,
}

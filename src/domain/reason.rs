//! The reasons by which a message is not settled.

use std::fmt;

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    MessageTooLarge,
    MalformedMessage,
    InvalidField,
    UnknownPartner,
    SenderMismatch,
    MalformedSignature,
    SignatureMismatch,
    PayloadMismatch,
    NonceReused,
    PolicyContradiction,
    PartnerInactive,
    AllocationNotFound,
    NotPermitted,
    AllocationMismatch,
    AlreadySettled,
    DeliveryLimit,
    Expired,
    Internal,
}

impl Reason {
    /// Every reason, in order of precedence.
    pub const ALL: [Reason; 18] = [
        Reason::MessageTooLarge,
        Reason::MalformedMessage,
        Reason::InvalidField,
        Reason::UnknownPartner,
        Reason::SenderMismatch,
        Reason::MalformedSignature,
        Reason::SignatureMismatch,
        Reason::PayloadMismatch,
        Reason::NonceReused,
        Reason::PolicyContradiction,
        Reason::PartnerInactive,
        Reason::AllocationNotFound,
        Reason::NotPermitted,
        Reason::AllocationMismatch,
        Reason::AlreadySettled,
        Reason::DeliveryLimit,
        Reason::Expired,
        Reason::Internal,
    ];

    /// The public code.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::MessageTooLarge => "message_too_large",
            Reason::MalformedMessage => "malformed_message",
            Reason::InvalidField => "invalid_field",
            Reason::UnknownPartner => "unknown_partner",
            Reason::SenderMismatch => "sender_mismatch",
            Reason::MalformedSignature => "malformed_signature",
            Reason::SignatureMismatch => "signature_mismatch",
            Reason::PayloadMismatch => "payload_mismatch",
            Reason::NonceReused => "nonce_reused",
            Reason::PolicyContradiction => "policy_contradiction",
            Reason::PartnerInactive => "partner_inactive",
            Reason::AllocationNotFound => "allocation_not_found",
            Reason::NotPermitted => "not_permitted",
            Reason::AllocationMismatch => "allocation_mismatch",
            Reason::AlreadySettled => "already_settled",
            Reason::DeliveryLimit => "delivery_limit",
            Reason::Expired => "expired",
            Reason::Internal => "internal",
        }
    }

    /// Reads a public code.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text)
    }

    /// The class, in the manner of an HTTP status.
    pub fn class(self) -> u16 {
        match self {
            Reason::MessageTooLarge
            | Reason::MalformedMessage
            | Reason::InvalidField
            | Reason::PayloadMismatch
            | Reason::PolicyContradiction => 400,
            Reason::UnknownPartner | Reason::MalformedSignature | Reason::SignatureMismatch => 401,
            Reason::SenderMismatch | Reason::PartnerInactive | Reason::NotPermitted => 403,
            Reason::AllocationNotFound => 404,
            Reason::Expired => 408,
            Reason::NonceReused | Reason::AllocationMismatch | Reason::AlreadySettled => 409,
            Reason::DeliveryLimit | Reason::Internal => 500,
        }
    }

    /// Whether no later change of registry or state could make the same bytes settle.
    pub fn is_final(self) -> bool {
        match self {
            Reason::MessageTooLarge
            | Reason::MalformedMessage
            | Reason::InvalidField
            | Reason::MalformedSignature
            | Reason::PayloadMismatch
            | Reason::NonceReused
            | Reason::NotPermitted
            | Reason::AllocationMismatch
            | Reason::AlreadySettled => true,
            Reason::UnknownPartner
            | Reason::SenderMismatch
            | Reason::SignatureMismatch
            | Reason::PolicyContradiction
            | Reason::PartnerInactive
            | Reason::AllocationNotFound
            | Reason::DeliveryLimit
            | Reason::Expired
            | Reason::Internal => false,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

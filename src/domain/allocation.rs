//! An allocation (or deallocation), its states and its one transition.

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::ledger::{AccountId, AccountKind, Amount, Transfer};

/// Which way the funds move when it is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Allocation,
    Deallocation,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Allocation => "allocation",
            Kind::Deallocation => "deallocation",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Kind::Allocation, Kind::Deallocation]
            .into_iter()
            .find(|kind| kind.as_str() == text)
    }

    /// The name of the id field in a message of this kind.
    pub fn id_field(self) -> &'static str {
        match self {
            Kind::Allocation => "allocationId",
            Kind::Deallocation => "deallocationId",
        }
    }

    /// The name of the partner's id field in a message of this kind.
    pub fn partners_id_field(self) -> &'static str {
        match self {
            Kind::Allocation => "partnersAllocationId",
            Kind::Deallocation => "partnersDeallocationId",
        }
    }
}

/// Where an allocation stands. The last two are terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Reserved,
    Cleared,
    Released,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Reserved => "reserved",
            Status::Cleared => "cleared",
            Status::Released => "released",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Status::Reserved, Status::Cleared, Status::Released]
            .into_iter()
            .find(|status| status.as_str() == text)
    }
}

/// What a policy engine said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyResult {
    Approved,
    Rejected,
}

impl PolicyResult {
    pub fn as_str(self) -> &'static str {
        match self {
            PolicyResult::Approved => "approved",
            PolicyResult::Rejected => "rejected",
        }
    }

    /// Reads it in any letter case.
    pub fn parse(text: &str) -> Option<Self> {
        [PolicyResult::Approved, PolicyResult::Rejected]
            .into_iter()
            .find(|result| result.as_str().eq_ignore_ascii_case(text))
    }
}

/// The record of an allocation, with its connection and its three accounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    pub id: Uuid,
    pub kind: Kind,
    pub status: Status,
    pub amount: Amount,
    pub connection_id: Uuid,
    /// The connection's partner.
    pub enterprise_id: String,
    /// The connection's client.
    pub client_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    pub client_external_id: String,
    pub initiated_by: String,
    pub notes: Option<String>,
    /// Why it is not cleared; none when it is.
    pub reason: Option<String>,
    pub retriable: bool,
    /// The partner's id of it, once settled.
    pub partner_external_id: Option<String>,
    /// By which symbol the partner named the amount that settled it; none: by the currency itself.
    pub partner_symbol: Option<String>,
    pub evaluation_id: Option<String>,
    pub pending_approval_id: Option<String>,
    pub policy_result: Option<PolicyResult>,
    /// The nonce that settled it.
    pub settled_nonce: Option<String>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub available_account: AccountId,
    pub held_account: AccountId,
    pub allocated_account: AccountId,
}

impl Allocation {
    /// The movement that takes it out of `reserved` into `status`; none for `reserved` itself.
    pub fn transfer_to(&self, status: Status) -> Option<Transfer> {
        let available = (AccountKind::Available, self.available_account);
        let allocated = (AccountKind::Allocated, self.allocated_account);
        let credit = match (self.kind, status) {
            (Kind::Allocation, Status::Cleared) | (Kind::Deallocation, Status::Released) => allocated,
            (Kind::Allocation, Status::Released) | (Kind::Deallocation, Status::Cleared) => available,
            (Kind::Allocation | Kind::Deallocation, Status::Reserved) => return None,
        };
        Some(Transfer {
            allocation_id: self.id,
            debit: (AccountKind::Held, self.held_account),
            credit,
            amount: self.amount.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written, on the wire and into the database, is read again; nothing else is, but for policyResult's case.
    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in [Kind::Allocation, Kind::Deallocation] {
            assert_eq!(Kind::parse(kind.as_str()), Some(kind));
            assert_eq!(
                serde_json::to_string(&kind).ok(),
                Some(format!("\"{}\"", kind.as_str()))
            );
        }
        for status in [Status::Reserved, Status::Cleared, Status::Released] {
            assert_eq!(Status::parse(status.as_str()), Some(status));
            assert_eq!(
                serde_json::to_string(&status).ok(),
                Some(format!("\"{}\"", status.as_str()))
            );
        }
        for result in [PolicyResult::Approved, PolicyResult::Rejected] {
            for text in [result.as_str().to_owned(), result.as_str().to_uppercase()] {
                assert_eq!(PolicyResult::parse(&text), Some(result));
            }
            assert_eq!(
                serde_json::to_string(&result).ok(),
                Some(format!("\"{}\"", result.as_str()))
            );
        }
        for text in ["", "Allocation", "Cleared", "cleared ", "approve", "rejected\0"] {
            assert_eq!(
                (Kind::parse(text), Status::parse(text), PolicyResult::parse(text)),
                (None, None, None)
            );
        }
    }

    #[test]
    fn the_fields_are_named_after_the_kind() {
        let names = |kind: Kind| (kind.id_field(), kind.partners_id_field());
        assert_eq!(names(Kind::Allocation), ("allocationId", "partnersAllocationId"));
        assert_eq!(names(Kind::Deallocation), ("deallocationId", "partnersDeallocationId"));
    }
}

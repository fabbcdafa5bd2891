//! Whose life a person asks for.

use uuid::Uuid;

/// Whose life.
#[derive(Clone, Debug)]
pub enum Subject {
    Allocation(Uuid),
    /// Of every partner that used it.
    Nonce(String),
    /// SHA-256 of a message or of a payload. Reads every receipt there is.
    Digest([u8; 32]),
}

impl Subject {
    pub(super) fn allocation(&self) -> Option<Uuid> {
        match self {
            Subject::Allocation(id) => Some(*id),
            Subject::Nonce(_) | Subject::Digest(_) => None,
        }
    }

    pub(super) fn digest(&self) -> Option<&[u8]> {
        match self {
            Subject::Digest(digest) => Some(digest),
            Subject::Allocation(_) | Subject::Nonce(_) => None,
        }
    }
}

//! SHA-256, and what is cut from it.

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The SHA-256 of bytes.
pub fn sha256(bytes: impl AsRef<[u8]>) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The first sixteen bytes of the SHA-256 of bytes, as an id.
pub fn id_of(bytes: impl AsRef<[u8]>) -> Uuid {
    let [head @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = sha256(bytes);
    Uuid::from_bytes(head)
}

//! The headers by which a dead letter says why it is one.

use base64::prelude::{BASE64_STANDARD, Engine as _};

use crate::domain::{added, names::header};

/// Bytes as a text header.
pub(in crate::domain) fn as_text(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

pub(super) fn of_text(text: &str) -> Option<Vec<u8>> {
    BASE64_STANDARD.decode(text).ok()
}

/// Whether a header is the broker's own record or ours, and so none of the partner's.
pub(in crate::domain) fn is_of_dead_letters(name: &str) -> bool {
    header::COPIES.contains(&name) || added::is_of_the_broker(name) || name.starts_with(header::OURS)
}

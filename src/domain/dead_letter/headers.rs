//! The headers by which a dead letter says why it is one.

use base64::prelude::{BASE64_STANDARD, Engine as _};

use crate::domain::added::is_counter;

/// Of a dead letter with only the head of a message: bytes of the body as received.
pub const BODY_LENGTH_HEADER: &str = "settled-body-length";

/// The header that holds a whole property list (see [`crate::domain::wire`]) of which not everything can be decoded.
pub(in crate::domain) const ORIGIN_PROPERTIES: &str = "settled-origin-properties";

/// The header that holds, as they were, the headers that travel as text or not at all (see [`crate::domain::carried`]): a table.
pub(in crate::domain) const ORIGIN_HEADERS: &str = "settled-origin-headers";

/// Bytes as a text header.
pub(in crate::domain) fn as_text(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

pub(super) fn of_text(text: &str) -> Option<Vec<u8>> {
    BASE64_STANDARD.decode(text).ok()
}

/// Whether a header is the broker's own record or ours, and so none of the partner's.
pub(in crate::domain) fn is_of_dead_letters(name: &str) -> bool {
    matches!(name, "CC" | "BCC" | "x-death")
        || is_counter(name)
        || ["x-first-death-", "x-last-death-", "settled-"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

//! Whom a message is from and about, by its routing key; and the one form of an id.

use uuid::Uuid;

use super::allocation::Kind;

/// The longest enterprise id, in bytes.
const ENTERPRISE_ID_MAX: usize = 64;

/// Whether text is an enterprise's id: `[A-Za-z0-9][A-Za-z0-9_-]{0,63}`.
pub fn is_enterprise_id(text: &str) -> bool {
    text.len() <= ENTERPRISE_ID_MAX
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

/// The routing key of an enterprise's updates.
pub fn routing_key(enterprise_id: &str, kind: Kind) -> String {
    format!("{enterprise_id}.{}.update", kind.as_str())
}

/// Reads `<enterpriseId>.allocation.update` or `<enterpriseId>.deallocation.update`.
pub fn parse_routing_key(text: &str) -> Option<(&str, Kind)> {
    let (enterprise_id, rest) = text.split_once('.')?;
    let kind = Kind::parse(rest.strip_suffix(".update")?)?;
    is_enterprise_id(enterprise_id).then_some((enterprise_id, kind))
}

/// Reads a UUID of exactly 36 characters, 8-4-4-4-12, in any letter case.
pub fn parse_uuid(text: &str) -> Option<Uuid> {
    // The crate also reads 32 digits, braces and URNs; of 36 characters only this form is left.
    if text.len() != 36 {
        return None;
    }
    Uuid::try_parse(text).ok()
}

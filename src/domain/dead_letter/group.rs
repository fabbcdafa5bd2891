//! Which dead letters have the same cause.

use crate::domain::{address::parse_uuid, digest::sha256, reason::Reason};

/// The same for all of one partner, reason and kind of detail.
pub fn group_of(enterprise_id: Option<&str>, reason: Reason, detail: &str) -> String {
    let name = format!("{}\0{reason}\0{}", enterprise_id.unwrap_or_default(), shape_of(detail));
    hex::encode(sha256(name).first_chunk::<8>().unwrap_or(&[0; 8]))
}

/// A detail without what differs from message to message: ids, long hexadecimal numbers and other numbers.
pub fn shape_of(detail: &str) -> String {
    const ID_LEN: usize = 36;
    const HEX_LEN: usize = 16;
    let mut shape = String::with_capacity(detail.len());
    let mut rest = detail;
    while let Some(first) = rest.chars().next() {
        if !first.is_ascii_alphanumeric() {
            shape.push(first);
            rest = rest.get(first.len_utf8()..).unwrap_or_default();
            continue;
        }
        if let Some((head, tail)) = rest.split_at_checked(ID_LEN)
            && parse_uuid(head).is_some()
            && !tail.starts_with(|next: char| next.is_ascii_alphanumeric())
        {
            shape.push_str("<id>");
            rest = tail;
            continue;
        }
        let end = rest
            .find(|letter: char| !letter.is_ascii_alphanumeric())
            .unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        let is_number = |letter: char| letter.is_ascii_digit();
        if word.len() >= HEX_LEN && word.chars().all(|letter| letter.is_ascii_hexdigit()) && word.contains(is_number) {
            shape.push_str(if word.chars().all(is_number) { "<n>" } else { "<hex>" });
        } else {
            let mut in_number = false;
            for letter in word.chars() {
                match (is_number(letter), in_number) {
                    (true, false) => shape.push_str("<n>"),
                    (true, true) => {}
                    (false, _) => shape.push(letter),
                }
                in_number = is_number(letter);
            }
        }
        rest = tail;
    }
    shape
}

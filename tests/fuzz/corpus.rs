//! What a target begins with.

use std::path::Path;

use settled::partner::vectors::{Vector, vectors};

/// The files of a target's corpus, in order.
pub(crate) fn of(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/corpus")
        .join(name);
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).expect("a file")).collect()
}

fn of_each(part: impl Fn(Vector) -> String) -> Vec<Vec<u8>> {
    vectors().into_iter().map(|vector| part(vector).into_bytes()).collect()
}

/// Bodies, right and wrong ones.
pub(crate) fn bodies() -> Vec<Vec<u8>> {
    of_each(|vector| vector.body)
}

/// Signed texts.
pub(crate) fn payloads() -> Vec<Vec<u8>> {
    of_each(|vector| vector.payload)
}

/// A signature, a line's end, and what it signs.
pub(crate) fn signatures() -> Vec<Vec<u8>> {
    of_each(|vector| format!("{}\n{}", vector.signature, vector.payload))
}

/// Public keys.
pub(crate) fn keys() -> Vec<Vec<u8>> {
    of_each(|vector| vector.public_key)
}

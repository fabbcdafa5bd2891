//! Which dead letters are one message.

use uuid::Uuid;

use crate::domain::{delivery::Properties, digest};

/// Whose message a row is, as wide as the judgement: every part of a message that a check reads.
///
/// What the checks of the table of reasons read is the routing key, the body, `content_type`, `content_encoding`,
/// `user_id`, and whether the message is above a limit. Messages that are equal in all of it get the same verdict at the
/// same moment, whatever else they carry (`message_id`, `reply_to`, `expiration`, other headers): they are one row, which
/// keeps what the first of them carried and shows why the last one failed. Messages that differ in any of it are rows of
/// their own, so that a copy under another login, or with another content type, touches nothing but itself. What nobody
/// known has put into the queue is apart from all others, or its word would be taken for theirs.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    pub routing_key: &'a str,
    /// SHA-256 of the whole body.
    pub digest: [u8; 32],
    pub properties: &'a Properties,
    pub is_too_large: bool,
    pub is_unknown: bool,
}

impl Identity<'_> {
    /// The row's id: the head of SHA-256 over all of it, each part with its length before it, so that no two messages
    /// are written alike.
    pub fn id(&self) -> Uuid {
        let mut text = b"settled dead letter 2".to_vec();
        text.push(u8::from(self.is_unknown));
        text.push(u8::from(self.is_too_large));
        let mut part = |bytes: Option<&[u8]>| {
            text.push(u8::from(bytes.is_some()));
            let bytes = bytes.unwrap_or_default();
            text.extend_from_slice(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
            text.extend_from_slice(bytes);
        };
        part(Some(self.routing_key.as_bytes()));
        part(Some(&self.digest));
        for property in [
            &self.properties.content_type,
            &self.properties.content_encoding,
            &self.properties.user_id,
        ] {
            part(property.as_deref().map(str::as_bytes));
        }
        // Whatever else it came with, one that can not be decoded is judged by that.
        if self.properties.undecodable.is_some() {
            part(Some(b"undecodable"));
        }
        digest::id_of(text)
    }
}

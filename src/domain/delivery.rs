//! A message as the broker hands it over, and one as we hand it to the broker: bytes and AMQP properties, kept exactly.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{added, digest};

/// One message handed over for judgement.
#[derive(Clone, PartialEq)]
pub struct Delivery {
    /// The exchange it was published to.
    pub exchange: String,
    /// The routing key it was published under.
    pub routing_key: String,
    /// The body, byte for byte; its head, where the message is cut.
    pub body: Vec<u8>,
    /// Properties and headers, as received; without the headers, where they are what was too large.
    pub properties: Properties,
    /// What is left out of it, because it is larger than a message may be.
    pub cut: Option<Box<Cut>>,
    /// The broker says it was handed out before.
    pub redelivered: bool,
    /// Where it came from.
    pub source: Source,
}

/// A message that is too large for anybody to judge, and of which only the head is kept. What it was as a whole stands here,
/// so that a shortened one is never taken for another, smaller message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// Bytes of the body as received.
    pub body_len: u64,
    /// SHA-256 of the whole body.
    pub digest: [u8; 32],
    /// Why it is too large.
    pub detail: String,
    /// Its headers are left out.
    pub without_headers: bool,
}

/// The largest property list with headers, in bytes on the wire.
pub const PROPERTIES_MAX: usize = 16_384;

/// What is kept of the body of a message that is too large, in bytes.
pub const HEAD_MAX: usize = 4_096;

impl Delivery {
    /// SHA-256 of the body as received.
    pub fn digest(&self) -> [u8; 32] {
        self.cut
            .as_ref()
            .map_or_else(|| digest::sha256(&self.body), |cut| cut.digest)
    }

    /// Bytes of the body as received.
    pub fn body_len(&self) -> u64 {
        let kept = || u64::try_from(self.body.len()).unwrap_or(u64::MAX);
        self.cut.as_ref().map_or_else(kept, |cut| cut.body_len)
    }
}

impl Source {
    /// Whether it was parked.
    pub fn is_parked(self) -> bool {
        match self {
            Source::Parked { .. } => true,
            Source::Queue { .. } | Source::Replayed { .. } | Source::Held { .. } | Source::Plain => false,
        }
    }

    /// By what it is acknowledged, if it came from a queue.
    pub fn delivery_tag(self) -> Option<u64> {
        match self {
            Source::Queue { delivery_tag } => Some(delivery_tag),
            Source::Parked { .. } | Source::Replayed { .. } | Source::Held { .. } | Source::Plain => None,
        }
    }

    /// The stored dead letter that it is, if it is one: the verdict goes to that row, and no second one is published.
    pub fn dead_letter(self) -> Option<Uuid> {
        match self {
            Source::Replayed { id } => Some(id),
            Source::Parked { dead_letter, .. } => dead_letter,
            Source::Queue { .. } | Source::Held { .. } | Source::Plain => None,
        }
    }
}

/// The door a delivery came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The input queue, with the channel's delivery tag.
    Queue {
        /// AMQP `delivery_tag`, unique on its channel.
        delivery_tag: u64,
    },
    /// A parked row that became due.
    Parked {
        /// The row's key: the head of a hash over enterprise and nonce, see `receipt::ReceiptKey`.
        key: Uuid,
        /// Which waiting under that key: another copy may be parked after the first has left.
        seq: i64,
        /// The dead letter whose replay parked it.
        dead_letter: Option<Uuid>,
    },
    /// A dead letter that an operator replays.
    Replayed {
        /// The row's id, see `dead_letter::Identity`.
        id: Uuid,
    },
    /// A pack of the side room.
    Held {
        /// The pack, which leaves the room as a whole.
        id: Uuid,
    },
    /// None of them: a judgement without effect (`explain`).
    Plain,
}

impl std::fmt::Debug for Delivery {
    /// Bodies stay out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery")
            .field("routing_key", &self.routing_key)
            .field("body_bytes", &self.body.len())
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

/// The AMQP 0-9-1 basic properties.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Properties {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_encoding: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub headers: Option<Headers>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delivery_mode: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiration: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_id: Option<String>,
    /// Seconds since the epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// The list as it came (see [`super::wire`]), where not everything in it can be decoded. The other fields are then what
    /// can be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undecodable: Option<Bytes>,
}

/// A header table, by name.
pub type Headers = BTreeMap<String, HeaderValue>;

/// Every type an AMQP 0-9-1 field can have, so that what goes out is what came in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum HeaderValue {
    Boolean(bool),
    ShortShortInt(i8),
    ShortShortUInt(u8),
    ShortInt(i16),
    ShortUInt(u16),
    LongInt(i32),
    LongUInt(u32),
    LongLongInt(i64),
    /// The bits of an IEEE 754 single, so that a NaN survives text.
    Float(u32),
    /// The bits of an IEEE 754 double.
    Double(u64),
    Decimal {
        scale: u8,
        value: u32,
    },
    /// Not necessarily UTF-8.
    LongString(Bytes),
    Array(Vec<HeaderValue>),
    Timestamp(u64),
    Table(Headers),
    ByteArray(Bytes),
    Void,
}

/// Bytes that serialise as hexadecimal text.
#[derive(Clone, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", String::from_utf8_lossy(&self.0))
    }
}

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'_, str>>::deserialize(deserializer)?;
        hex::decode(text.as_bytes())
            .map(Bytes)
            .map_err(serde::de::Error::custom)
    }
}

impl HeaderValue {
    /// A text header.
    pub fn text(value: impl Into<String>) -> Self {
        HeaderValue::LongString(Bytes(value.into().into_bytes()))
    }

    /// The text of a string header that is UTF-8.
    pub fn as_text(&self) -> Option<&str> {
        if let HeaderValue::LongString(bytes) = self {
            std::str::from_utf8(&bytes.0).ok()
        } else {
            None
        }
    }

    /// Whether it is a number, a boolean or a short text.
    fn is_short(&self) -> bool {
        match self {
            HeaderValue::ShortShortInt(_)
            | HeaderValue::ShortShortUInt(_)
            | HeaderValue::ShortInt(_)
            | HeaderValue::ShortUInt(_)
            | HeaderValue::LongInt(_)
            | HeaderValue::LongUInt(_)
            | HeaderValue::LongLongInt(_)
            | HeaderValue::Boolean(_)
            | HeaderValue::Timestamp(_) => true,
            HeaderValue::LongString(bytes) => bytes.0.len() <= added::VALUE_MAX,
            HeaderValue::Float(_)
            | HeaderValue::Double(_)
            | HeaderValue::Decimal { .. }
            | HeaderValue::ByteArray(_)
            | HeaderValue::Array(_)
            | HeaderValue::Table(_)
            | HeaderValue::Void => false,
        }
    }

    /// Bytes of this value on the wire, its type octet included (AMQP 0-9-1, 4.2.5.1).
    fn wire_len(&self) -> usize {
        let value = match self {
            HeaderValue::Boolean(_) | HeaderValue::ShortShortInt(_) | HeaderValue::ShortShortUInt(_) => 1,
            HeaderValue::ShortInt(_) | HeaderValue::ShortUInt(_) => 2,
            HeaderValue::LongInt(_) | HeaderValue::LongUInt(_) | HeaderValue::Float(_) => 4,
            HeaderValue::LongLongInt(_) | HeaderValue::Double(_) | HeaderValue::Timestamp(_) => 8,
            HeaderValue::Decimal { .. } => 5,
            HeaderValue::LongString(bytes) | HeaderValue::ByteArray(bytes) => bytes.0.len().saturating_add(4),
            HeaderValue::Array(values) => values
                .iter()
                .fold(4, |sum: usize, value| sum.saturating_add(value.wire_len())),
            HeaderValue::Table(headers) => table_wire_len(headers),
            HeaderValue::Void => 0,
        };
        value.saturating_add(1)
    }
}

/// The flags before a property list, which say which there are.
const FLAGS_LEN: usize = 2;

fn table_wire_len(headers: &Headers) -> usize {
    headers.iter().fold(4, |sum: usize, (name, value)| {
        sum.saturating_add(name.len())
            .saturating_add(1)
            .saturating_add(value.wire_len())
    })
}

impl Properties {
    /// Bytes of the property list on the wire.
    pub fn wire_len(&self) -> usize {
        let undecodable = self
            .undecodable
            .as_ref()
            .map_or(0, |list| list.0.len().saturating_sub(FLAGS_LEN));
        self.decoded_wire_len().max(undecodable)
    }

    /// The same without what a broker adds (see `added.rs`), which is what a verdict may depend on: a message must not become
    /// too large by being tried again.
    pub fn sent_wire_len(&self) -> usize {
        self.wire_len().saturating_sub(self.added_wire_len())
    }

    fn added_wire_len(&self) -> usize {
        let (mut known, mut others) = (0_usize, 0_usize);
        for (name, value) in self.headers.iter().flatten() {
            let len = || value.wire_len().saturating_add(name.len()).saturating_add(1);
            if added::is_counter(name) {
                known = known.saturating_add(len());
            } else if added::size_of(name, value.is_short()) == added::Size::Free {
                others = others.saturating_add(len());
            }
        }
        added::free(known, others)
    }

    fn decoded_wire_len(&self) -> usize {
        let short = [
            &self.content_type,
            &self.content_encoding,
            &self.correlation_id,
            &self.reply_to,
            &self.expiration,
            &self.message_id,
            &self.kind,
            &self.user_id,
            &self.app_id,
            &self.cluster_id,
        ]
        .into_iter()
        .flatten()
        .fold(0_usize, |sum, text| sum.saturating_add(text.len()).saturating_add(1));
        let fixed = [self.delivery_mode.is_some(), self.priority.is_some()]
            .into_iter()
            .fold(0_usize, |sum, present| sum.saturating_add(usize::from(present)))
            .saturating_add(if self.timestamp.is_some() { 8 } else { 0 });
        let headers = self.headers.as_ref().map_or(0, table_wire_len);
        short.saturating_add(fixed).saturating_add(headers)
    }
}

/// One message for the broker. A batch's publications stand together in one outbox row until each is confirmed.
#[derive(Clone, Debug, PartialEq)]
pub struct Publication {
    /// What it is, and so what a return means.
    pub kind: PublicationKind,
    /// Target exchange; empty is the default exchange.
    pub exchange: String,
    pub routing_key: String,
    pub properties: Properties,
    pub body: Vec<u8>,
}

/// What a publication is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PublicationKind {
    /// An outcome event. Unroutable is fine: nobody subscribed.
    Event,
    /// A dead letter. Unroutable means it would be lost: the lane stops.
    DeadLetter,
    /// An answer to a partner's `reply_to`: best effort, never stored.
    Reply,
}

/// A batch's identity, made by the worker before its transaction begins.
pub type BatchId = Uuid;

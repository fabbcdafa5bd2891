//! The names on the wire that others know us by: exchanges, queues, headers and content types. Each stands here once.

use uuid::Uuid;

/// Partners publish here (topic), and the input queue of the same name.
pub const UPDATES: &str = "settlement.updates";
/// The alternate exchange of [`UPDATES`] (fanout): leads what no partner's own queue takes to the input queue.
pub const UPDATES_ALL: &str = "settlement.updates.all";
/// Dead letters (topic), and the queue the collector reads.
pub const DEAD: &str = "settlement.dead";
/// What the broker dead-letters by itself, a second time (headers exchange and queue). The broker drops what it takes for a
/// cycle: a message that brings along a record of the queue [`DEAD`] never gets there. No record names this queue, which
/// dead-letters nothing, so that no true one cuts it off.
pub const BROKER_MADE: &str = "settlement.dead.broker";
/// How the queue of [`hidden`] is called where others may read it.
pub const HIDDEN: &str = "settlement.dead.broker.*";

/// The same a third time, to a queue whose name no sender can know: a record that a sender made up can name the two others,
/// and then the broker keeps the dead letter away from both, and holds up whatever it has to dead-letter after it.
pub fn hidden(books: Uuid) -> String {
    format!("{BROKER_MADE}.{}", books.simple())
}

/// A queue's name as it may be shown to anybody.
pub fn shown(queue: &str) -> &str {
    let is_hidden = queue
        .strip_prefix(BROKER_MADE)
        .is_some_and(|rest| rest.starts_with('.'));
    if is_hidden { HIDDEN } else { queue }
}
/// Dead letters nobody could read (fanout), and their queue: counted, never read.
pub const UNREADABLE: &str = "settlement.unreadable";
/// What workers told of the books (fanout), and the stream that keeps the newest of it.
pub const EPOCH: &str = "settlement.epoch";
/// Outcome events (topic).
pub const EVENTS: &str = "settlement.events";

/// The name of a partner's own input queue.
pub fn own_queue(enterprise_id: &str) -> String {
    format!("{UPDATES}.{enterprise_id}")
}

/// The keys that a partner's messages come under.
pub fn update_keys(enterprise_id: &str) -> [String; 2] {
    ["allocation", "deallocation"].map(|kind| format!("{enterprise_id}.{kind}.update"))
}

/// Content types.
pub mod content_type {
    /// Of an update, and of an event's data.
    pub const JSON: &str = "application/json";
    /// Of an event.
    pub const EVENT: &str = "application/cloudevents+json";
    /// Of a JSON array of events.
    pub const EVENTS: &str = "application/cloudevents-batch+json";
}

/// Headers that we write, and those of others that we read. What a broker adds stands in `added`.
pub mod header {
    /// Each header of ours begins so; on a partner's message such a one is ignored.
    pub const OURS: &str = "settled-";

    /// Why a message is a dead letter.
    pub const REASON: &str = "settled-reason";
    pub const CLASS: &str = "settled-class";
    pub const FINAL: &str = "settled-final";
    pub const DETAIL: &str = "settled-detail";
    /// SHA-256 of the whole body, in hexadecimal digits.
    pub const DIGEST: &str = "settled-digest";
    pub const FAILED_AT: &str = "settled-failed-at";
    /// Of a dead letter with only the head of a message: bytes of the body as received.
    pub const BODY_LENGTH: &str = "settled-body-length";
    pub const ORIGIN_EXCHANGE: &str = "settled-origin-exchange";
    pub const ORIGIN_ROUTING_KEY: &str = "settled-origin-routing-key";
    pub const ORIGIN_USER_ID: &str = "settled-origin-user-id";
    pub const ORIGIN_EXPIRATION: &str = "settled-origin-expiration";
    /// A whole property list (see [`crate::domain::wire`]) of which not everything can be decoded.
    pub const ORIGIN_PROPERTIES: &str = "settled-origin-properties";
    /// As they were, the headers that travel as text or not at all (see `carried`): a table.
    pub const ORIGIN_HEADERS: &str = "settled-origin-headers";

    /// How many events an array holds: what it stands for is counted without reading it.
    pub const EVENTS: &str = "settled-events";

    /// A message's place in a trace (W3C Trace Context).
    pub const TRACEPARENT: &str = "traceparent";
    /// What tracers on the way added to it.
    pub const TRACESTATE: &str = "tracestate";

    /// Where else the sender wants the message routed to: the broker would do so with a dead letter too.
    pub const COPIES: [&str; 2] = ["CC", "BCC"];
}

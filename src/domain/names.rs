//! The names on the wire that others know us by: exchanges, queues, headers and content types. Each stands here once.

/// Partners publish here (topic), and the input queue of the same name.
pub const UPDATES: &str = "settlement.updates";
/// The alternate exchange of [`UPDATES`] (fanout): leads what no partner's own queue takes to the input queue.
pub const UPDATES_ALL: &str = "settlement.updates.all";
/// Dead letters (topic), and the queue the collector reads.
pub const DEAD: &str = "settlement.dead";
/// What the broker dead-letters by itself, a second time (headers exchange and queue). The broker drops what it takes for a
/// cycle: a message that brings along a record of the queue [`DEAD`] never gets there. No record names this queue, which
/// dead-letters nothing, so that it is never cut off.
pub const BROKER_MADE: &str = "settlement.dead.broker";
/// Dead letters nobody could read (fanout), and their queue: counted, never read.
pub const UNREADABLE: &str = "settlement.unreadable";
/// Outcome events (topic).
pub const EVENTS: &str = "settlement.events";

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

    /// Where else the sender wants the message routed to: the broker would do so with a dead letter too.
    pub const COPIES: [&str; 2] = ["CC", "BCC"];
}

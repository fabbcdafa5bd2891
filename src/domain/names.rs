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

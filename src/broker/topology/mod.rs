//! Exchanges and queues: what there must be, making it, and looking whether it is there.

use lapin::ExchangeKind;
use lapin::options::{ExchangeBindOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::{
    ANSWER_TIMEOUT, BrokerError, Connection, answer,
    channel::{close, declare_exchange, short, table, text},
};

mod export;
mod look;
mod managed;
#[cfg(test)]
mod tests;

pub use export::{BrokerExport, BrokerUser, PartnerDoor, outcomes};
pub use look::{Fitness, fitness, inspect};
pub use managed::{DeadLettering, seen, waiting, wrong};

pub use super::channel::TopologyFinding;
use crate::domain::names::update_keys;
pub use crate::domain::names::{
    BROKER_MADE, DEAD, EPOCH, EVENTS, HIDDEN, UNREADABLE, UPDATES, UPDATES_ALL, hidden, own_queue, shown,
};

/// Redeliveries before the broker dead-letters a message. Never negative: 3.10 drops such a message at its first requeue.
const DELIVERY_LIMIT: i32 = 50;
/// As good as none: what is dropped at the limit has no other place. RabbitMQ 4 has a limit of 20 where none is said.
const NO_DELIVERY_LIMIT: i32 = 1_000_000_000;

/// Bytes of a stream of words that are kept at least, and of the files that it is kept in: what is older than the newest two of
/// them is forgotten. It is read as a whole whenever a worker starts.
const WORDS_MAX: i32 = 1_000_000;
const WORDS_FILE: i32 = 500_000;

struct Exchange {
    name: &'static str,
    kind: ExchangeKind,
    alternate: Option<&'static str>,
    /// Everything that comes to this one comes here too.
    from: Option<&'static str>,
}

pub(super) struct Queue {
    pub(super) name: String,
    kind: QueueKind,
    pub(super) bindings: Vec<Binding>,
}

enum QueueKind {
    /// What can not be taken goes to this exchange.
    DeadLettering(&'static str),
    /// The last stop.
    Last,
    /// The last stop of what is taken again and again until it is stored.
    Patient,
    /// A stream: everybody reads it, and nobody takes anything out.
    Words,
}

impl QueueKind {
    /// The broker's name for it.
    fn word(&self) -> &'static str {
        match self {
            QueueKind::DeadLettering(_) | QueueKind::Patient | QueueKind::Last => "quorum",
            QueueKind::Words => "stream",
        }
    }
}

pub(super) struct Binding {
    pub(super) exchange: &'static str,
    pub(super) key: String,
    /// The header that a message must have, whatever it says.
    header: Option<&'static str>,
}

impl Binding {
    fn new(exchange: &'static str, key: impl Into<String>) -> Self {
        Self {
            exchange,
            key: key.into(),
            header: None,
        }
    }

    /// Of what the broker dead-letters: an exchange sees one of these headers in all of it, on each version another. In 4.0
    /// the broker's `x-death` is made for whoever reads, and an exchange sees it only where the sender wrote one; in 3.10
    /// `x-first-death-reason` is left out where the sender wrote an `x-death` (findings/rabbitmq-headers-miss-deaths.sh).
    fn of_the_broker() -> [Self; 2] {
        ["x-death", "x-first-death-reason"].map(|header| Self {
            header: Some(header),
            ..Self::new(BROKER_MADE, "")
        })
    }

    fn arguments(&self) -> FieldTable {
        let present = self
            .header
            .map(|header| [("x-match", text("all-with-x")), (header, AMQPValue::Void)]);
        table(present.into_iter().flatten())
    }
}

/// In an order in which each can be declared: an exchange before what refers to it.
fn exchanges() -> [Exchange; 7] {
    [
        Exchange {
            name: UNREADABLE,
            kind: ExchangeKind::Fanout,
            alternate: None,
            from: None,
        },
        Exchange {
            name: DEAD,
            kind: ExchangeKind::Topic,
            alternate: None,
            from: None,
        },
        Exchange {
            name: BROKER_MADE,
            kind: ExchangeKind::Headers,
            alternate: None,
            from: Some(DEAD),
        },
        Exchange {
            name: UPDATES_ALL,
            kind: ExchangeKind::Fanout,
            alternate: None,
            from: None,
        },
        // An alternate exchange sees only what no binding took. So a partner's own queue, bound by its keys, takes its
        // messages away from the common queue without anything else being unbound.
        Exchange {
            name: UPDATES,
            kind: ExchangeKind::Topic,
            alternate: Some(UPDATES_ALL),
            from: None,
        },
        Exchange {
            name: EPOCH,
            kind: ExchangeKind::Fanout,
            alternate: None,
            from: None,
        },
        Exchange {
            name: EVENTS,
            kind: ExchangeKind::Topic,
            alternate: None,
            from: None,
        },
    ]
}

fn queues() -> [Queue; 5] {
    [
        Queue {
            name: UNREADABLE.to_owned(),
            kind: QueueKind::Last,
            bindings: vec![Binding::new(UNREADABLE, "")],
        },
        Queue {
            name: DEAD.to_owned(),
            kind: QueueKind::DeadLettering(UNREADABLE),
            bindings: vec![Binding::new(DEAD, "#")],
        },
        Queue {
            name: BROKER_MADE.to_owned(),
            kind: QueueKind::Patient,
            bindings: Binding::of_the_broker().into(),
        },
        Queue {
            name: UPDATES.to_owned(),
            kind: QueueKind::DeadLettering(DEAD),
            bindings: vec![Binding::new(UPDATES_ALL, "")],
        },
        Queue {
            name: EPOCH.to_owned(),
            kind: QueueKind::Words,
            bindings: vec![Binding::new(EPOCH, "")],
        },
    ]
}

pub(super) fn partner_queue(enterprise_id: &str) -> Queue {
    Queue {
        name: own_queue(enterprise_id),
        kind: QueueKind::DeadLettering(DEAD),
        bindings: update_keys(enterprise_id).map(|key| Binding::new(UPDATES, key)).into(),
    }
}

/// The queue of [`hidden`], by its name.
fn hidden_queue(name: &str) -> Queue {
    Queue {
        name: name.to_owned(),
        kind: QueueKind::Patient,
        bindings: Binding::of_the_broker().into(),
    }
}

impl Exchange {
    fn arguments(&self) -> FieldTable {
        table(self.alternate.map(|name| ("alternate-exchange", text(name))))
    }

    async fn declare(&self, channel: &lapin::Channel, passive: bool) -> Result<(), BrokerError> {
        declare_exchange(channel, self.name.into(), self.kind.clone(), passive, self.arguments()).await
    }

    async fn bind(&self, channel: &lapin::Channel) -> Result<(), BrokerError> {
        let Some(source) = self.from else {
            return Ok(());
        };
        let bound = channel.exchange_bind(
            self.name.into(),
            source.into(),
            "#".into(),
            ExchangeBindOptions { nowait: false },
            FieldTable::default(),
        );
        answer("a binding", ANSWER_TIMEOUT, bound).await
    }
}

impl Queue {
    fn arguments(&self) -> FieldTable {
        let mut arguments = vec![("x-queue-type", text(self.kind.word()))];
        match self.kind {
            QueueKind::DeadLettering(exchange) => arguments.extend([
                ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
                // No x-dead-letter-routing-key: a dead letter keeps the key it came under.
                ("x-dead-letter-exchange", text(exchange)),
                // The default, at-most-once, silently drops when the exchange is missing or its queue is full.
                ("x-dead-letter-strategy", text("at-least-once")),
                // Which needs this one.
                ("x-overflow", text("reject-publish")),
            ]),
            QueueKind::Patient => arguments.push(("x-delivery-limit", AMQPValue::LongInt(NO_DELIVERY_LIMIT))),
            QueueKind::Words => arguments.extend([
                ("x-max-length-bytes", AMQPValue::LongInt(WORDS_MAX)),
                ("x-stream-max-segment-size-bytes", AMQPValue::LongInt(WORDS_FILE)),
            ]),
            QueueKind::Last => {}
        }
        table(arguments)
    }

    pub(super) async fn declare(&self, channel: &lapin::Channel, passive: bool) -> Result<u32, BrokerError> {
        declare_queue(channel, &self.name, passive, self.arguments()).await
    }

    pub(super) async fn bind(&self, channel: &lapin::Channel) -> Result<(), BrokerError> {
        for binding in &self.bindings {
            let bound = channel.queue_bind(
                short(&self.name)?,
                binding.exchange.into(),
                short(&binding.key)?,
                QueueBindOptions { nowait: false },
                binding.arguments(),
            );
            answer("a binding", ANSWER_TIMEOUT, bound).await?;
        }
        Ok(())
    }
}

async fn declare_queue(
    channel: &lapin::Channel,
    name: &str,
    passive: bool,
    arguments: FieldTable,
) -> Result<u32, BrokerError> {
    let options = QueueDeclareOptions {
        passive,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    };
    let declared = channel.queue_declare(short(name)?, options, arguments);
    Ok(answer("a queue declaration", ANSWER_TIMEOUT, declared)
        .await?
        .message_count())
}

/// Declares every exchange, queue and binding. Changes nothing that is there already; refused with 406 if something is
/// there with other arguments.
pub async fn declare(connection: &Connection) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    for exchange in exchanges() {
        exchange.declare(&channel, false).await?;
        exchange.bind(&channel).await?;
    }
    for queue in queues() {
        queue.declare(&channel, false).await?;
        queue.bind(&channel).await?;
    }
    close(&channel).await
}

/// Declares the queue of [`hidden`]. Can be said again.
///
/// # Errors
/// The broker is away or refuses.
pub async fn declare_hidden(connection: &Connection, name: &str) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let queue = hidden_queue(name);
    queue.declare(&channel, false).await?;
    queue.bind(&channel).await?;
    close(&channel).await
}

/// Messages ready in each queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    pub updates: u32,
    pub dead: u32,
    pub unreadable: u32,
}

/// Counts what is ready (not what is being worked on). Refused with 404 if a queue is missing.
pub async fn depths(connection: &Connection) -> Result<Depths, BrokerError> {
    let channel = connection.channel().await?;
    let depths = Depths {
        updates: depth(&channel, UPDATES).await?,
        dead: depth(&channel, DEAD).await?,
        unreadable: depth(&channel, UNREADABLE).await?,
    };
    close(&channel).await?;
    Ok(depths)
}

/// What there is to see of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Messages ready.
    Ready(u32),
    Missing,
    /// This user may not look, in the broker's words. From 4.2.6 on brokers ask for a right even for that: 4.2.6 and 4.3.0 for
    /// configure, later ones for any right on the queue.
    Forbidden(String),
}

/// Looks at each queue by itself: one that is missing or not ours to see hides no other. Each of these costs the connection a
/// channel number for good.
///
/// # Errors
/// The broker is away, or refuses for another reason.
pub async fn look_at_each(connection: &Connection, queues: &[&str]) -> Result<Vec<Seen>, BrokerError> {
    let mut all = Vec::with_capacity(queues.len());
    for queue in queues {
        all.push(match depth_of(connection, queue).await {
            Ok(messages) => Seen::Ready(messages),
            Err(BrokerError::Refused { code: 404, .. }) => Seen::Missing,
            Err(error @ BrokerError::Refused { code: 403, .. }) => Seen::Forbidden(error.to_string()),
            Err(error @ (BrokerError::Refused { .. } | BrokerError::Away(_) | BrokerError::Config(_))) => {
                return Err(error);
            }
        });
    }
    Ok(all)
}

/// Counts what is ready in one queue. Refused with 404 if it is missing.
pub async fn depth_of(connection: &Connection, queue: &str) -> Result<u32, BrokerError> {
    let channel = connection.channel().await?;
    let depth = depth(&channel, queue).await?;
    close(&channel).await?;
    Ok(depth)
}

/// Counts what is ready in one queue, and its consumers. Refused with 404 if it is missing.
pub async fn backlog(connection: &Connection, queue: &str) -> Result<(u32, u32), BrokerError> {
    let channel = connection.channel().await?;
    let declared = passive(&channel, queue).await?;
    close(&channel).await?;
    Ok((declared.message_count(), declared.consumer_count()))
}

/// Looks at a queue without declaring it.
pub(super) async fn passive(channel: &lapin::Channel, queue: &str) -> Result<lapin::Queue, BrokerError> {
    let options = QueueDeclareOptions {
        passive: true,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    };
    let declared = channel.queue_declare(short(queue)?, options, FieldTable::default());
    answer("a queue declaration", ANSWER_TIMEOUT, declared).await
}

async fn depth(channel: &lapin::Channel, queue: &str) -> Result<u32, BrokerError> {
    declare_queue(channel, queue, true, FieldTable::default()).await
}

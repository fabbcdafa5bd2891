//! A queue of one's own behind an exchange: how a service subscribes to events. Consumed with [`super::intake::Intake`].

use std::collections::BTreeMap;

use lapin::options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::{ANSWER_TIMEOUT, BrokerError, BrokerSettings, Connection, answer};

/// A queue that nobody uses any more goes away after this, in milliseconds.
const EXPIRES_MS: i32 = 600_000;

/// How long a subscriber's queue lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Exclusive: it goes with the connection. It holds so many messages at most, and drops the oldest for another.
    Connection { most: u32 },
    /// A durable quorum queue: it survives connections, the broker's restart and the death of a node.
    Durable,
}

/// Declares a queue and binds it to exchanges by routing keys. Can be said again.
///
/// # Errors
/// The broker is away or refuses.
pub async fn declare(
    connection: &Connection,
    queue: &str,
    lifetime: Lifetime,
    bindings: &[(&str, &str)],
) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let (durable, arguments) = match lifetime {
        Lifetime::Connection { most } => (
            false,
            BTreeMap::from([
                (ShortString::from("x-max-length"), AMQPValue::LongLongInt(most.into())),
                (
                    ShortString::from("x-overflow"),
                    AMQPValue::LongString("drop-head".into()),
                ),
            ])
            .into(),
        ),
        Lifetime::Durable => (
            true,
            BTreeMap::from([
                (
                    ShortString::from("x-queue-type"),
                    AMQPValue::LongString("quorum".into()),
                ),
                (ShortString::from("x-expires"), AMQPValue::LongInt(EXPIRES_MS)),
            ])
            .into(),
        ),
    };
    let options = QueueDeclareOptions {
        passive: false,
        durable,
        exclusive: !durable,
        // An intake changes its consumer once, between which it would go.
        auto_delete: false,
        nowait: false,
    };
    let declared = channel.queue_declare(short(queue)?, options, arguments);
    answer("a queue declaration", ANSWER_TIMEOUT, declared).await?;
    for (exchange, key) in bindings {
        let bound = channel.queue_bind(
            short(queue)?,
            short(exchange)?,
            short(key)?,
            QueueBindOptions { nowait: false },
            FieldTable::default(),
        );
        answer("a binding", ANSWER_TIMEOUT, bound).await?;
    }
    answer("closing a channel", ANSWER_TIMEOUT, channel.close(200, "done".into())).await
}

/// Deletes a queue with what is in it.
///
/// # Errors
/// The broker is away or refuses.
pub async fn delete(connection: &Connection, queue: &str) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let options = QueueDeleteOptions {
        if_unused: false,
        if_empty: false,
        nowait: false,
    };
    let deleted = channel.queue_delete(short(queue)?, options);
    answer("deleting a queue", ANSWER_TIMEOUT, deleted).await?;
    answer("closing a channel", ANSWER_TIMEOUT, channel.close(200, "done".into())).await
}

/// How many consumers a queue has.
///
/// # Errors
/// The broker is away; refused with 404 if there is no such queue.
pub async fn consumers(connection: &Connection, queue: &str) -> Result<u32, BrokerError> {
    let channel = connection.channel().await?;
    let options = QueueDeclareOptions {
        passive: true,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    };
    let declared = channel.queue_declare(short(queue)?, options, FieldTable::default());
    let count = answer("a queue declaration", ANSWER_TIMEOUT, declared)
        .await?
        .consumer_count();
    answer("closing a channel", ANSWER_TIMEOUT, channel.close(200, "done".into())).await?;
    Ok(count)
}

/// lapin's conversion panics above 255 bytes.
fn short(name: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(name)
        .map_err(|error| BrokerError::Config(format!("a name for the broker is too long: {error}")))
}

impl BrokerSettings {
    /// The user that the URL logs in as: the only `user_id` that the broker lets it publish with.
    ///
    /// # Errors
    /// The URL is not one.
    pub fn user(&self) -> Result<String, BrokerError> {
        Ok(self.uri()?.authority.userinfo.username)
    }
}

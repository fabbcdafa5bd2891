//! A partner's own input queue: how it comes and how it goes. Bound by the partner's keys it takes that partner's messages
//! away from the common queue; unbound, they go to the common one again, and nothing is unrouted at any moment.

use lapin::options::QueueDeleteOptions;
use lapin::types::FieldTable;

use super::channel::{close, short};
use super::topology::{own_queue, partner_queue, passive};
use super::{ANSWER_TIMEOUT, BrokerError, Connection, answer};

/// What a partner's own queue holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLoad {
    /// Messages that nobody has.
    pub ready: u32,
    /// Consumers, those too that were cancelled and have messages still: a quorum queue keeps them until each is answered.
    pub consumers: u32,
}

impl QueueLoad {
    /// Nothing is in it, and nobody has anything of it.
    pub fn is_nothing(self) -> bool {
        self.ready == 0 && self.consumers == 0
    }
}

/// What is in it; None if there is no such queue. A refusal costs the connection a channel number.
///
/// # Errors
/// The broker is away, or refuses to say.
pub async fn held(connection: &Connection, enterprise_id: &str) -> Result<Option<QueueLoad>, BrokerError> {
    let channel = connection.channel().await?;
    match passive(&channel, &own_queue(enterprise_id)).await {
        Ok(declared) => {
            close(&channel).await?;
            Ok(Some(QueueLoad {
                ready: declared.message_count(),
                consumers: declared.consumer_count(),
            }))
        }
        Err(BrokerError::Refused { code: 404, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Declares it; from then on it takes the partner's messages instead of the common one. Can be said again.
///
/// # Errors
/// The broker is away or refuses.
pub async fn declare(connection: &Connection, enterprise_id: &str) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let queue = partner_queue(enterprise_id);
    queue.declare(&channel, false).await?;
    queue.bind(&channel).await?;
    close(&channel).await
}

/// Sends the partner's messages to the common queue again. What is in its own stays there. Can be said again.
///
/// # Errors
/// The broker is away or refuses.
pub async fn unbind(connection: &Connection, enterprise_id: &str) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let queue = partner_queue(enterprise_id);
    for binding in &queue.bindings {
        let unbound = channel.queue_unbind(
            short(&queue.name)?,
            binding.exchange.into(),
            short(&binding.key)?,
            FieldTable::default(),
        );
        answer("an unbinding", ANSWER_TIMEOUT, unbound).await?;
    }
    close(&channel).await
}

/// Deletes it, with what is in it: only what was seen to hold nothing, and can not get anything. Says how many messages
/// went with it.
///
/// # Errors
/// The broker is away or refuses.
pub async fn delete(connection: &Connection, enterprise_id: &str) -> Result<u32, BrokerError> {
    let channel = connection.channel().await?;
    // A quorum queue knows neither if-empty nor if-unused.
    let options = QueueDeleteOptions {
        if_unused: false,
        if_empty: false,
        nowait: false,
    };
    let deleted = channel.queue_delete(short(&own_queue(enterprise_id))?, options);
    let gone = answer("deleting a queue", ANSWER_TIMEOUT, deleted).await?;
    close(&channel).await?;
    Ok(gone)
}

//! Direct replies: what is answered to a message that was published with `reply_to` set to [`DIRECT`]. No queue is declared
//! and nothing is acknowledged; what nobody waits for any more is lost, as replies may be.

use futures_util::StreamExt;
use lapin::options::BasicConsumeOptions;
use lapin::types::{FieldTable, ShortString};

use super::publisher::Publisher;
use super::{ANSWER_TIMEOUT, BrokerError, answer};
use crate::domain::delivery::Properties;

/// The name that the broker turns into one of the publishing channel's own.
pub const DIRECT: &str = "amq.rabbitmq.reply-to";

/// One answer.
#[derive(Clone, Debug)]
pub struct Reply {
    pub properties: Properties,
    pub body: Vec<u8>,
}

/// The answers to what one [`Publisher`] publishes from now on.
pub struct Replies {
    consumer: lapin::Consumer,
}

impl std::fmt::Debug for Replies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replies").finish_non_exhaustive()
    }
}

impl Replies {
    /// Listens. The broker wants it on the channel that publishes, before anything is published.
    ///
    /// # Errors
    /// The broker is away or refuses.
    pub async fn to(publisher: &Publisher) -> Result<Self, BrokerError> {
        let consuming = publisher.channel().basic_consume(
            ShortString::from(DIRECT),
            ShortString::default(),
            BasicConsumeOptions {
                no_local: false,
                // The broker knows no other way here.
                no_ack: true,
                exclusive: false,
                nowait: false,
            },
            FieldTable::default(),
        );
        Ok(Self {
            consumer: answer("a consumer of replies", ANSWER_TIMEOUT, consuming).await?,
        })
    }

    /// The next one.
    ///
    /// # Errors
    /// The channel is gone, and with it what was on its way.
    pub async fn next(&mut self) -> Result<Reply, BrokerError> {
        match self.consumer.next().await {
            Some(Ok(message)) => Ok(Reply {
                properties: super::properties::properties_from(&message.properties),
                body: message.data,
            }),
            Some(Err(error)) => Err(BrokerError::from_lapin(&error)),
            None => Err(BrokerError::Away("the channel of replies was closed".to_owned())),
        }
    }
}

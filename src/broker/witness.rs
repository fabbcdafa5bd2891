//! What the broker is told of the books, and remembers: a short stream of words, the newest of which a worker compares with its
//! database before it takes anything. A stream, since everybody reads all of it and nobody takes anything out.

use std::collections::BTreeMap;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use uuid::Uuid;

use super::publisher::{BrokerAnswer, Publisher};
use super::{ANSWER_TIMEOUT, BrokerError, Connection, answer};
use crate::domain::delivery::{Properties, Publication, PublicationKind};
use crate::domain::epoch::EpochWord;
use crate::domain::names::{EPOCH, content_type};

/// Words that are under way to us at a time.
const AHEAD: u16 = 500;

/// Says it, and waits until the broker has it.
///
/// # Errors
/// The broker is away, or refuses; with 404 there is no queue for it.
pub async fn say(publisher: &mut Publisher, word: &EpochWord) -> Result<(), BrokerError> {
    let body = serde_json::to_vec(word)
        .map_err(|error| BrokerError::Config(format!("a word of the books can not be written: {error}")))?;
    publish(publisher, body).await
}

async fn publish(publisher: &mut Publisher, body: Vec<u8>) -> Result<(), BrokerError> {
    let publication = Publication {
        // A word without a queue would be lost.
        kind: PublicationKind::DeadLetter,
        exchange: EPOCH.to_owned(),
        routing_key: String::new(),
        properties: Properties {
            content_type: Some(content_type::JSON.to_owned()),
            delivery_mode: Some(2),
            ..Properties::default()
        },
        body,
    };
    match publisher.publish_aside(&publication).await? {
        Some(BrokerAnswer::Confirmed) => Ok(()),
        Some(BrokerAnswer::Returned) => Err(BrokerError::Refused {
            code: 404,
            text: format!("no queue is bound to the exchange {EPOCH}"),
        }),
        Some(BrokerAnswer::Nacked) | None => Err(BrokerError::Away(format!(
            "it did not take a word for the queue {EPOCH}"
        ))),
    }
}

/// Every word that the broker still has, the oldest first. What is none of ours is left out.
///
/// # Errors
/// The broker is away, or refuses.
pub async fn words(connection: &Connection) -> Result<Vec<EpochWord>, BrokerError> {
    // A stream does not say where it ends: what stands before a line of our own is everything there was.
    let mark = serde_json::json!({"asks": Uuid::new_v4()}).to_string().into_bytes();
    publish(&mut Publisher::open(connection).await?, mark.clone()).await?;
    let channel = connection.channel().await?;
    let consuming = async {
        channel.basic_qos(AHEAD, BasicQosOptions { global: false }).await?;
        let options = BasicConsumeOptions {
            no_local: false,
            no_ack: false,
            exclusive: false,
            nowait: false,
        };
        let from_the_first: FieldTable = BTreeMap::from([(
            ShortString::from("x-stream-offset"),
            AMQPValue::LongString("first".into()),
        )])
        .into();
        channel
            .basic_consume(EPOCH.into(), "settled-epoch".into(), options, from_the_first)
            .await
    };
    let mut consumer = answer("a consumer", ANSWER_TIMEOUT, consuming).await?;
    let mut words = Vec::new();
    loop {
        let next = async { consumer.next().await.transpose() };
        let Some(delivery) = answer("a word of the books", ANSWER_TIMEOUT, next).await? else {
            return Err(BrokerError::Away(format!("it ended the consumer of {EPOCH}")));
        };
        if delivery.data == mark {
            break;
        }
        words.extend(serde_json::from_slice(&delivery.data).ok());
        let acknowledged = delivery.acker.ack(BasicAckOptions { multiple: false });
        answer("an acknowledgement", ANSWER_TIMEOUT, acknowledged).await?;
    }
    super::channel::close(&channel).await?;
    Ok(words)
}

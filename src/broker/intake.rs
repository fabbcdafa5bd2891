//! Taking messages in: batches of what has already arrived, and telling the broker what became of them.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::protocol::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::{ANSWER_TIMEOUT, BrokerError, Connection, Socket, all_together, answer};
use crate::domain::delivery::{Bytes, Delivery, HeaderValue, Headers, Properties, Source};

/// Header tables and arrays inside each other, the outermost included. lapin's parser needs a kilobyte of stack a level
/// and survives about 1,900; every walk over the value (conversion, JSON, drop) would have to survive it again.
const HEADER_DEPTH_MAX: usize = 32;

/// What stands in for deeper ones: by itself above the limit for properties and headers together (16,384 bytes), so that
/// the message is judged too large and the broker dead-letters the original, untouched.
const TOO_DEEP_BYTES: usize = 16_385;

/// Messages that were there at once, in the order of their delivery tags.
#[derive(Debug)]
pub struct Batch {
    pub deliveries: Vec<Delivery>,
}

/// Why there are no more messages.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum IntakeEnd {
    /// The broker ended the consumer (its queue is gone, an acknowledgement took too long) while the channel lives: an
    /// incident. Or we did, with [`Intake::cancel`].
    #[error("the broker cancelled the consumer")]
    Cancelled,
    /// The channel or the connection ended.
    #[error(transparent)]
    Away(#[from] BrokerError),
}

type Switch =
    Pin<Box<dyn Future<Output = Result<(lapin::Consumer, Vec<lapin::message::Delivery>), BrokerError>> + Send>>;

/// A consumer on one queue, with a channel of its own.
pub struct Intake {
    channel: lapin::Channel,
    socket: Arc<Socket>,
    queue: ShortString,
    consumer: Option<lapin::Consumer>,
    prefetch: u16,
    batch_max: usize,
    batch_max_bytes: usize,
    /// With prefetch 1, until a message comes that was not handed out before. What kills us below our own code
    /// (properties that lapin cannot parse) does so again at each redelivery, and each lost connection counts against
    /// all messages in our hands: alone, the poison reaches its delivery limit alone.
    careful: bool,
    /// On the way from prefetch 1 to the full one. Kept here so that a dropped `next()` loses nothing.
    switch: Option<Switch>,
    held: VecDeque<Delivery>,
    ended: Option<IntakeEnd>,
}

impl std::fmt::Debug for Intake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intake")
            .field("queue", &self.queue.as_str())
            .field("careful", &self.careful)
            .field("held", &self.held.len())
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Intake {
    /// Starts consuming `queue`. A batch has at most `batch_max` messages and `batch_max_bytes` of bodies and headers,
    /// except that one message always fits. Memory is bounded by `prefetch` messages and one more batch.
    pub async fn attach(
        connection: &Connection,
        queue: &str,
        prefetch: u16,
        batch_max: usize,
        batch_max_bytes: usize,
    ) -> Result<Self, BrokerError> {
        if prefetch == 0 || batch_max == 0 {
            return Err(BrokerError::Config(
                "worker.prefetch and worker.batch_max must be at least 1: 0 means without bound".to_owned(),
            ));
        }
        let queue = ShortString::try_new(queue)
            .map_err(|error| BrokerError::Config(format!("the name of a queue is too long: {error}")))?;
        let channel = connection.channel().await?;
        let consumer = consume(&channel, &queue, 1).await?;
        Ok(Intake {
            channel,
            socket: Arc::clone(&connection.socket),
            queue,
            consumer: Some(consumer),
            prefetch,
            batch_max,
            batch_max_bytes,
            careful: true,
            switch: None,
            held: VecDeque::new(),
            ended: None,
        })
    }

    /// Waits for a message, then takes with it what has already arrived; never waits for more. Dropping the future
    /// loses nothing.
    pub async fn next(&mut self) -> Result<Batch, IntakeEnd> {
        loop {
            self.finish_switch().await?;
            if self.held.is_empty() {
                if let Some(end) = &self.ended {
                    return Err(end.clone());
                }
                let Some(consumer) = &mut self.consumer else {
                    return Err(self.end(None));
                };
                match consumer.next().await {
                    Some(Ok(message)) => self.held.push_back(delivery_from(message)),
                    Some(Err(error)) => return Err(self.end(Some(&error))),
                    None => return Err(self.end(None)),
                }
            }
            match self.held.front() {
                // This message is in our hands and unacknowledged, so prefetch 1 allows no other to be under way: the
                // one moment when a consumer can be cancelled without messages arriving for it afterwards, which lapin
                // would drop and the broker would wait for.
                Some(first) if self.careful && !first.redelivered => {
                    if let Some(consumer) = self.consumer.take() {
                        let (channel, queue) = (self.channel.clone(), self.queue.clone());
                        self.switch = Some(Box::pin(switch(channel, queue, consumer, self.prefetch)));
                    }
                }
                Some(_) | None => return self.gather(),
            }
        }
    }

    async fn finish_switch(&mut self) -> Result<(), IntakeEnd> {
        let Some(switch) = &mut self.switch else { return Ok(()) };
        let outcome = switch.await;
        self.switch = None;
        match outcome {
            Ok((consumer, leftovers)) => {
                self.consumer = Some(consumer);
                self.held.extend(leftovers.into_iter().map(delivery_from));
                self.careful = false;
                Ok(())
            }
            Err(error) => {
                self.socket_if_away(&error);
                let end = IntakeEnd::Away(error);
                self.ended = Some(end.clone());
                self.held.clear();
                Err(end)
            }
        }
    }

    /// What is held and what has arrived, within the bounds.
    fn gather(&mut self) -> Result<Batch, IntakeEnd> {
        let mut deliveries = Vec::new();
        let mut bytes = 0_usize;
        let most = if self.careful { 1 } else { self.batch_max };
        while deliveries.len() < most {
            let delivery = match self.held.pop_front() {
                Some(delivery) => delivery,
                None => match self.arrived() {
                    Some(Ok(message)) => delivery_from(message),
                    // What came before belongs to a dead channel: it is delivered again.
                    Some(Err(error)) => return Err(self.end(Some(&error))),
                    None => break,
                },
            };
            let size = delivery.body.len().saturating_add(delivery.properties.wire_len());
            if !deliveries.is_empty() && bytes.saturating_add(size) > self.batch_max_bytes {
                self.held.push_front(delivery);
                break;
            }
            bytes = bytes.saturating_add(size);
            deliveries.push(delivery);
        }
        Ok(Batch { deliveries })
    }

    /// The next message if it is already here.
    fn arrived(&mut self) -> Option<lapin::Result<lapin::message::Delivery>> {
        match self.consumer.as_mut()?.next().now_or_never()? {
            Some(message) => Some(message),
            None => {
                self.ended = Some(self.ending(None));
                self.consumer = None;
                None
            }
        }
    }

    fn end(&mut self, error: Option<&lapin::Error>) -> IntakeEnd {
        let end = self.ending(error);
        self.ended = Some(end.clone());
        end
    }

    fn ending(&self, error: Option<&lapin::Error>) -> IntakeEnd {
        match error {
            Some(error) => {
                let error = BrokerError::from_lapin(error);
                self.socket_if_away(&error);
                IntakeEnd::Away(error)
            }
            // lapin ends the stream without an error also when the channel or connection closed in order.
            None if self.channel.status().connected() => IntakeEnd::Cancelled,
            None => IntakeEnd::Away(BrokerError::Away("the channel was closed".to_owned())),
        }
    }

    /// After lapin stopped, its connection is open until the last handle on the socket goes; until then the broker
    /// would keep our messages for us.
    fn socket_if_away(&self, error: &BrokerError) {
        match error {
            BrokerError::Away(_) => self.socket.cut(),
            BrokerError::Refused { .. } | BrokerError::Config(_) => {}
        }
    }

    /// Tells the broker what became of this intake's messages; from another task if need be.
    pub fn disposer(&self) -> Disposer {
        Disposer {
            channel: self.channel.clone(),
        }
    }

    /// Stops the consumer. What was delivered before comes out of [`Intake::drain`], and can still be acknowledged.
    pub async fn cancel(&mut self) -> Result<(), BrokerError> {
        match self.finish_switch().await {
            Ok(()) => {}
            Err(IntakeEnd::Cancelled) => return Ok(()),
            Err(IntakeEnd::Away(error)) => return Err(error),
        }
        if let Some(consumer) = self.consumer.take() {
            let leftovers = cancel(&self.channel, consumer).await?;
            self.held.extend(leftovers.into_iter().map(delivery_from));
        }
        self.ended.get_or_insert(IntakeEnd::Cancelled);
        Ok(())
    }

    /// After [`Intake::cancel`]: the next batch of what was delivered before, none when there is no more.
    pub fn drain(&mut self) -> Option<Batch> {
        match self.gather() {
            Ok(batch) if batch.deliveries.is_empty() => None,
            Ok(batch) => Some(batch),
            Err(_) => None,
        }
    }

    /// Gives everything unacknowledged back at once by closing the channel, which counts one delivery for each.
    pub async fn release(self) -> Result<(), BrokerError> {
        if !self.channel.status().connected() {
            return Ok(());
        }
        let closed = answer(
            "giving messages back",
            ANSWER_TIMEOUT,
            self.channel.close(200, "released".into()),
        )
        .await;
        if let Err(error) = &closed {
            self.socket_if_away(error);
        }
        closed
    }
}

async fn consume(channel: &lapin::Channel, queue: &ShortString, prefetch: u16) -> Result<lapin::Consumer, BrokerError> {
    let consume = async {
        // Not global: for each consumer started after it. 4.3 denies global ones.
        channel.basic_qos(prefetch, BasicQosOptions { global: false }).await?;
        channel
            .basic_consume(
                queue.clone(),
                // The broker makes one up.
                ShortString::default(),
                BasicConsumeOptions {
                    no_local: false,
                    no_ack: false,
                    exclusive: false,
                    nowait: false,
                },
                FieldTable::default(),
            )
            .await
    };
    answer("a new consumer", ANSWER_TIMEOUT, consume).await
}

/// Stops a consumer and returns what it had received but nobody had taken.
async fn cancel(
    channel: &lapin::Channel,
    mut consumer: lapin::Consumer,
) -> Result<Vec<lapin::message::Delivery>, BrokerError> {
    let cancel = async {
        channel
            .basic_cancel(consumer.tag(), BasicCancelOptions { nowait: false })
            .await?;
        let mut leftovers = Vec::new();
        while let Some(message) = consumer.next().await {
            leftovers.push(message?);
        }
        Ok(leftovers)
    };
    answer("cancelling a consumer", ANSWER_TIMEOUT, cancel).await
}

async fn switch(
    channel: lapin::Channel,
    queue: ShortString,
    consumer: lapin::Consumer,
    prefetch: u16,
) -> Result<(lapin::Consumer, Vec<lapin::message::Delivery>), BrokerError> {
    let leftovers = cancel(&channel, consumer).await?;
    Ok((consume(&channel, &queue, prefetch).await?, leftovers))
}

/// Acknowledges and rejects, on the channel the messages came from.
#[derive(Clone)]
pub struct Disposer {
    channel: lapin::Channel,
}

impl std::fmt::Debug for Disposer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disposer").field("channel", &self.channel.id()).finish()
    }
}

impl Disposer {
    /// Rejects (to the dead-letter exchange) the given tags, then acknowledges everything up to `highest_ack`: the
    /// highest tag of the batch that is not rejected, none if all are. Batches are disposed of in the order in which
    /// they came. After an error the channel is lost, and what was not disposed of comes again.
    pub async fn dispose(&self, tags_to_reject: &[u64], highest_ack: Option<u64>) -> Result<(), BrokerError> {
        // The broker would close the channel: a tag can be settled once.
        if highest_ack.is_some_and(|tag| tags_to_reject.contains(&tag)) {
            return Err(BrokerError::Config(
                "a message cannot be both rejected and acknowledged".to_owned(),
            ));
        }
        let frames = async {
            let rejects = tags_to_reject.iter().map(|tag| {
                self.channel
                    .basic_reject(*tag, BasicRejectOptions { requeue: false })
                    .boxed()
            });
            let ack = highest_ack.map(|tag| self.channel.basic_ack(tag, BasicAckOptions { multiple: true }).boxed());
            all_together(rejects.chain(ack))
                .await
                .into_iter()
                .collect::<lapin::Result<()>>()
        };
        answer("an acknowledgement", ANSWER_TIMEOUT, frames).await
    }
}

fn delivery_from(message: lapin::message::Delivery) -> Delivery {
    Delivery {
        exchange: message.exchange.into(),
        routing_key: message.routing_key.into(),
        body: message.data,
        properties: properties_from(&message.properties),
        redelivered: message.redelivered,
        source: Source::Queue {
            delivery_tag: message.delivery_tag,
        },
    }
}

fn properties_from(properties: &BasicProperties) -> Properties {
    let text = |value: &Option<ShortString>| value.as_ref().map(|value| value.as_str().to_owned());
    Properties {
        content_type: text(properties.content_type()),
        content_encoding: text(properties.content_encoding()),
        headers: properties.headers().as_ref().map(|table| headers_from(table, 1)),
        delivery_mode: *properties.delivery_mode(),
        priority: *properties.priority(),
        correlation_id: text(properties.correlation_id()),
        reply_to: text(properties.reply_to()),
        expiration: text(properties.expiration()),
        message_id: text(properties.message_id()),
        timestamp: *properties.timestamp(),
        kind: text(properties.kind()),
        user_id: text(properties.user_id()),
        app_id: text(properties.app_id()),
        cluster_id: text(properties.cluster_id()),
    }
}

fn headers_from(table: &FieldTable, depth: usize) -> Headers {
    table
        .into_iter()
        .map(|(name, value)| (name.as_str().to_owned(), header_from(value, depth)))
        .collect()
}

fn header_from(value: &AMQPValue, depth: usize) -> HeaderValue {
    match value {
        AMQPValue::Boolean(value) => HeaderValue::Boolean(*value),
        AMQPValue::ShortShortInt(value) => HeaderValue::ShortShortInt(*value),
        AMQPValue::ShortShortUInt(value) => HeaderValue::ShortShortUInt(*value),
        AMQPValue::ShortInt(value) => HeaderValue::ShortInt(*value),
        AMQPValue::ShortUInt(value) => HeaderValue::ShortUInt(*value),
        AMQPValue::LongInt(value) => HeaderValue::LongInt(*value),
        AMQPValue::LongUInt(value) => HeaderValue::LongUInt(*value),
        AMQPValue::LongLongInt(value) => HeaderValue::LongLongInt(*value),
        AMQPValue::Float(value) => HeaderValue::Float(value.to_bits()),
        AMQPValue::Double(value) => HeaderValue::Double(value.to_bits()),
        AMQPValue::DecimalValue(value) => HeaderValue::Decimal {
            scale: value.scale,
            value: value.value,
        },
        // Has no type octet on RabbitMQ's wire, so it never comes.
        AMQPValue::ShortString(value) => HeaderValue::text(value.as_str()),
        AMQPValue::LongString(value) => HeaderValue::LongString(Bytes(value.as_bytes().to_vec())),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) if depth >= HEADER_DEPTH_MAX => {
            HeaderValue::ByteArray(Bytes(vec![0; TOO_DEEP_BYTES]))
        }
        AMQPValue::FieldArray(values) => HeaderValue::Array(
            values
                .as_slice()
                .iter()
                .map(|value| header_from(value, depth.saturating_add(1)))
                .collect(),
        ),
        AMQPValue::Timestamp(value) => HeaderValue::Timestamp(*value),
        AMQPValue::FieldTable(table) => HeaderValue::Table(headers_from(table, depth.saturating_add(1))),
        AMQPValue::ByteArray(value) => HeaderValue::ByteArray(Bytes(value.as_slice().to_vec())),
        AMQPValue::Void => HeaderValue::Void,
    }
}

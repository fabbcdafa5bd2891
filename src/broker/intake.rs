//! Taking messages in: batches of what has already arrived, and telling the broker what became of them.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::time::Instant;

use super::properties::properties_from;
use super::sieve::{Apart, Undecoded};
use super::{ANSWER_TIMEOUT, BrokerError, Connection, Socket, answer};
use crate::domain::delivery::{Delivery, Source};
use crate::fail::{self, Point};

/// Messages that were there at once, in the order of their delivery tags.
#[derive(Debug)]
pub struct Deliveries {
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
    apart: Arc<Apart>,
    queue: ShortString,
    consumer: Option<lapin::Consumer>,
    prefetch: u16,
    batch_max: usize,
    batch_max_bytes: usize,
    linger: Duration,
    /// With prefetch 1, until a message comes that was not handed out before. What strikes below our own code (properties
    /// that the client library can not decode) does so again at each redelivery, and each lost connection counts against
    /// all messages in our hands: alone, the poison reaches its delivery limit alone.
    careful: bool,
    /// On the way from prefetch 1 to the rest of it. Kept here so that a dropped `next()` loses nothing.
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
    /// except that one message always fits. Never more than `prefetch` messages are out and not acknowledged; memory is
    /// bounded by them and one more batch.
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
        // Numbers of channels are used again, and on each of them tags begin at 1.
        connection.apart.forget(channel.id());
        let consumer = consume(&channel, &queue, 1).await?;
        Ok(Intake {
            channel,
            socket: Arc::clone(&connection.socket),
            apart: Arc::clone(&connection.apart),
            queue,
            consumer: Some(consumer),
            prefetch,
            batch_max,
            batch_max_bytes,
            linger: Duration::ZERO,
            careful: true,
            switch: None,
            held: VecDeque::new(),
            ended: None,
        })
    }

    /// Waits for more, this long at most, once a message is there.
    pub fn lingering(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Waits for a message, then takes with it what has already arrived; does not wait for more, unless it is to linger.
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Deliveries, IntakeEnd> {
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
                    Some(Ok(message)) => self
                        .held
                        .push_back(delivery_from(&self.apart, self.channel.id(), message)),
                    Some(Err(error)) => return Err(self.end(Some(&error))),
                    None => return Err(self.end(None)),
                }
            }
            match self.held.front() {
                // This message is in our hands and unacknowledged, so prefetch 1 allows no other to be under way: the
                // one moment when a consumer can be cancelled without messages arriving for it afterwards, which lapin
                // would drop and the broker would wait for. The next consumer may have one less than the prefetch, since
                // this message counts for the old one until it is acknowledged.
                Some(first) if self.careful && !first.redelivered => {
                    if self.prefetch == 1 {
                        self.careful = false;
                    } else if let Some(consumer) = self.consumer.take() {
                        let (channel, queue) = (self.channel.clone(), self.queue.clone());
                        self.switch = Some(Box::pin(switch(channel, queue, consumer, self.prefetch - 1)));
                    }
                }
                Some(_) | None => {
                    self.wait_for_more().await?;
                    return self.gather();
                }
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
                let (apart, channel) = (&self.apart, self.channel.id());
                let leftovers = leftovers.into_iter();
                self.held
                    .extend(leftovers.map(|message| delivery_from(apart, channel, message)));
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

    /// Until there are as many as a batch may have, or it has lingered for long enough.
    async fn wait_for_more(&mut self) -> Result<(), IntakeEnd> {
        // With prefetch 1 no other comes before this one is acknowledged.
        if self.careful || self.linger.is_zero() {
            return Ok(());
        }
        let deadline = Instant::now() + self.linger;
        while self.held.len() < self.batch_max
            && let Some(consumer) = &mut self.consumer
            && let Ok(next) = tokio::time::timeout_at(deadline, consumer.next()).await
        {
            match self.or_ended(next) {
                Some(Ok(message)) => self
                    .held
                    .push_back(delivery_from(&self.apart, self.channel.id(), message)),
                Some(Err(error)) => {
                    self.held.clear();
                    return Err(self.end(Some(&error)));
                }
                None => break,
            }
        }
        Ok(())
    }

    /// What is held and what has arrived, within the bounds.
    fn gather(&mut self) -> Result<Deliveries, IntakeEnd> {
        let mut deliveries = Vec::new();
        let mut bytes = 0_usize;
        let most = if self.careful { 1 } else { self.batch_max };
        while deliveries.len() < most {
            let delivery = match self.held.pop_front() {
                Some(delivery) => delivery,
                None => match self.arrived() {
                    Some(Ok(message)) => delivery_from(&self.apart, self.channel.id(), message),
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
        Ok(Deliveries { deliveries })
    }

    /// The next message if it is already here.
    fn arrived(&mut self) -> Option<lapin::Result<lapin::message::Delivery>> {
        let next = self.consumer.as_mut()?.next().now_or_never()?;
        self.or_ended(next)
    }

    /// A consumer that has no more to give is gone.
    fn or_ended<T>(&mut self, next: Option<T>) -> Option<T> {
        if next.is_none() {
            self.ended = Some(self.ending(None));
            self.consumer = None;
        }
        next
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
            socket: Arc::clone(&self.socket),
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
            let (apart, channel) = (&self.apart, self.channel.id());
            let leftovers = leftovers.into_iter();
            self.held
                .extend(leftovers.map(|message| delivery_from(apart, channel, message)));
        }
        self.ended.get_or_insert(IntakeEnd::Cancelled);
        Ok(())
    }

    /// After [`Intake::cancel`]: the next batch of what was delivered before, none when there is no more.
    pub fn drain(&mut self) -> Option<Deliveries> {
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

/// Acknowledges, on the channel the messages came from.
#[derive(Clone)]
pub struct Disposer {
    channel: lapin::Channel,
    socket: Arc<Socket>,
}

impl std::fmt::Debug for Disposer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disposer").field("channel", &self.channel.id()).finish()
    }
}

impl Disposer {
    /// Acknowledges everything up to a tag; nothing where there is none. Nothing is ever rejected: whatever is refused is
    /// published as a dead letter by us first. After an error the channel is lost, and what was not acknowledged comes again.
    pub async fn acknowledge(&self, highest: Option<u64>) -> Result<(), BrokerError> {
        let Some(highest) = highest else { return Ok(()) };
        if let Err(injected) = fail::fallible(Point::BeforeAck).await {
            self.socket.cut();
            return Err(injected.into());
        }
        let acknowledged = self.channel.basic_ack(highest, BasicAckOptions { multiple: true });
        answer("an acknowledgement", ANSWER_TIMEOUT, acknowledged).await
    }
}

#[cfg(test)]
impl Disposer {
    /// Has the broker dead-letter a message, as it does by itself in the end: nothing of the program can.
    pub(crate) async fn reject(&self, tag: u64) -> Result<(), BrokerError> {
        let requeue = lapin::options::BasicRejectOptions { requeue: false };
        answer("a rejection", ANSWER_TIMEOUT, self.channel.basic_reject(tag, requeue)).await
    }
}

fn delivery_from(apart: &Apart, channel: u16, message: lapin::message::Delivery) -> Delivery {
    let (properties, names) = match apart.take(channel, message.delivery_tag) {
        Some(Undecoded { properties, names }) => (properties, names),
        None => (properties_from(&message.properties), None),
    };
    let (exchange, routing_key) = names.unwrap_or_else(|| (message.exchange.into(), message.routing_key.into()));
    Delivery {
        exchange,
        routing_key,
        body: message.data,
        properties,
        cut: None,
        redelivered: message.redelivered,
        source: Source::Queue {
            delivery_tag: message.delivery_tag,
        },
    }
}

#[cfg(test)]
mod tests;

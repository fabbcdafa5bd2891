//! Taking messages in: batches of what has already arrived, and telling the broker what became of them.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::protocol::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::Instant;

use super::sieve::{Apart, Kept};
use super::{ANSWER_TIMEOUT, BrokerError, Connection, Socket, all_together, answer};
use crate::domain::delivery::{Bytes, Delivery, HeaderValue, Headers, Properties, Source};
use crate::domain::wire;
use crate::fail::{self, Point};

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
    fn gather(&mut self) -> Result<Batch, IntakeEnd> {
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
        Ok(Batch { deliveries })
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
    socket: Arc<Socket>,
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
        if let Err(injected) = fail::fallible(Point::BeforeAck).await {
            self.socket.cut();
            return Err(injected.into());
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

fn delivery_from(apart: &Apart, channel: u16, message: lapin::message::Delivery) -> Delivery {
    let (properties, names) = match apart.take(channel, message.delivery_tag) {
        Some(Kept { properties, names }) => (properties, names),
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

pub(super) fn properties_from(properties: &BasicProperties) -> Properties {
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
        undecodable: None,
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
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) if depth >= wire::DEPTH_MAX => wire::too_deep(),
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Duration;

    use super::*;
    use crate::broker::BrokerSettings;
    use crate::broker::publisher::{Fate, Publisher};
    use crate::broker::testing::{
        self, Vhost, delete_queue, event, eventually, publish, queue, quorum_queue, ready, soon,
    };

    fn tag(delivery: &Delivery) -> u64 {
        match delivery.source {
            Source::Queue { delivery_tag } => delivery_tag,
            Source::Parked { .. } | Source::Replayed { .. } | Source::Held { .. } | Source::Plain => {
                panic!("not from a queue")
            }
        }
    }

    fn body(delivery: &Delivery) -> String {
        String::from_utf8(delivery.body.clone()).expect("text")
    }

    async fn fill(connection: &Connection, queue: &str, bodies: impl IntoIterator<Item = String>) {
        let mut publisher = Publisher::open(connection).await.expect("a publisher");
        let sent: Vec<_> = bodies.into_iter().map(|body| event("", queue, &body)).collect();
        let fates = soon(publisher.publish(&sent)).await.expect("published");
        assert!(fates.iter().all(|fate| *fate == Fate::Confirmed));
    }

    fn numbered(range: std::ops::Range<usize>) -> impl Iterator<Item = String> {
        range.map(|index| format!("{index:04}"))
    }

    /// This many messages, however they come.
    async fn take(intake: &mut Intake, count: usize) -> Vec<Delivery> {
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.extend(soon(intake.next()).await.expect("a batch").deliveries);
        }
        assert_eq!(taken.len(), count);
        taken
    }

    #[tokio::test]
    async fn a_batch_has_what_is_there_within_its_bounds() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        fill(&connection, "q", numbered(0..40)).await;
        let mut intake = Intake::attach(&connection, "q", 100, 7, 1 << 20)
            .await
            .expect("attached");
        let mut sizes = Vec::new();
        let mut bodies = Vec::new();
        let first = soon(intake.next()).await.expect("a batch");
        bodies.extend(first.deliveries.iter().map(body));
        // Prefetch 100 now: the rest comes by itself.
        eventually("all handed out", async || {
            (ready(&connection, "q").await == 0).then_some(())
        })
        .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        while bodies.len() < 40 {
            let batch = soon(intake.next()).await.expect("a batch");
            sizes.push(batch.deliveries.len());
            bodies.extend(batch.deliveries.iter().map(body));
        }
        assert_eq!(bodies, numbered(0..40).collect::<Vec<_>>());
        assert!(
            sizes.iter().all(|size| (1..=7).contains(size)) && sizes.contains(&7),
            "{sizes:?}"
        );
        // Empty now: it waits, and a dropped wait costs nothing.
        let waiting = tokio::time::timeout(Duration::from_millis(50), intake.next()).await;
        assert!(waiting.is_err());
        intake.release().await.expect("released");

        let mut intake = Intake::attach(&connection, "q", 100, 100, 1).await.expect("attached");
        let batch = soon(intake.next()).await.expect("a batch");
        assert_eq!(batch.deliveries.len(), 1, "larger than the bound, and still handed out");
        intake.release().await.expect("released");
        for (prefetch, batch_max) in [(0, 1), (1, 0)] {
            let refused = Intake::attach(&connection, "q", prefetch, batch_max, 1).await;
            assert!(matches!(refused, Err(BrokerError::Config(_))));
        }
        let missing = Intake::attach(&connection, "missing", 1, 1, 1).await.map(drop);
        assert_eq!(missing.map_err(|error| error.code()), Err(Some(404)));
    }

    /// The message that is in hand while the consumers change counts too.
    #[tokio::test]
    async fn no_more_is_out_than_the_prefetch() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        for prefetch in [1, 2, 5] {
            let queue = format!("q{prefetch}");
            quorum_queue(&connection, &queue, 50).await;
            fill(&connection, &queue, numbered(0..20)).await;
            let mut intake = Intake::attach(&connection, &queue, prefetch, 1, 1 << 20)
                .await
                .expect("attached");
            let taken = take(&mut intake, usize::from(prefetch)).await;
            // What comes now would have come before this confirm, were there room.
            fill(&connection, &queue, numbered(20..21)).await;
            assert_eq!(ready(&connection, &queue).await, 21 - u32::from(prefetch));
            let last = taken.iter().map(tag).max();
            intake.disposer().dispose(&[], last).await.expect("acknowledged");
            take(&mut intake, 1).await;
            intake.release().await.expect("released");
        }
    }

    #[tokio::test]
    async fn bytes_bound_a_batch_too() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        fill(&connection, "q", (0..30).map(|index| format!("{index:0>200}"))).await;
        let mut intake = Intake::attach(&connection, "q", 100, 100, 1_100)
            .await
            .expect("attached");
        let mut bodies = Vec::new();
        while bodies.len() < 30 {
            let batch = soon(intake.next()).await.expect("a batch");
            assert!(
                batch.deliveries.len() <= 2,
                "a body and its message id are 400 bytes and more: {}",
                batch.deliveries.len()
            );
            bodies.extend(batch.deliveries.iter().map(body));
        }
        assert!(bodies.is_sorted());
    }

    /// From prefetch 1 to the full one, while another task acknowledges: each message once.
    #[tokio::test(flavor = "multi_thread")]
    async fn redelivered_messages_come_one_by_one_until_a_fresh_one() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        fill(&connection, "q", numbered(0..50)).await;
        let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
            .await
            .expect("attached");
        take(&mut intake, 50).await;
        intake.release().await.expect("released");
        fill(&connection, "q", numbered(50..300)).await;

        let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
            .await
            .expect("attached");
        let disposer = intake.disposer();
        let (sender, mut batches) = tokio::sync::mpsc::channel::<Batch>(1);
        let settle = tokio::spawn(async move {
            let mut seen = Vec::new();
            while let Some(batch) = batches.recv().await {
                let last = batch.deliveries.iter().map(tag).max();
                disposer.dispose(&[], last).await.expect("acknowledged");
                seen.extend(batch.deliveries.iter().map(body));
            }
            seen
        });
        let (mut redelivered, mut count) = (0, 0);
        while count < 300 {
            let batch = soon(intake.next()).await.expect("a batch");
            count += batch.deliveries.len();
            if batch.deliveries.iter().any(|delivery| delivery.redelivered) {
                assert_eq!(batch.deliveries.len(), 1);
                redelivered += 1;
            }
            sender.send(batch).await.expect("settling");
        }
        drop(sender);
        let mut seen = settle.await.expect("settled");
        assert_eq!(redelivered, 50);
        // Released ones come back in an order of the broker's choosing.
        seen.sort_unstable();
        assert_eq!(seen, numbered(0..300).collect::<Vec<_>>());
        intake.release().await.expect("released");
        assert_eq!(ready(&connection, "q").await, 0);
    }

    #[tokio::test]
    async fn a_dropped_wait_loses_nothing() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        fill(&connection, "q", numbered(0..20)).await;
        // Long enough to get somewhere, too short to finish a step: the switch of prefetch above all.
        for patience in [0, 50, 200, 500, 1_000] {
            let mut intake = Intake::attach(&connection, "q", 5, 3, 1 << 20).await.expect("attached");
            let mut seen = Vec::new();
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            while seen.len() < 20 {
                let waiting = tokio::time::timeout(Duration::from_micros(patience), intake.next());
                if let Ok(batch) = waiting.await {
                    let batch = batch.expect("a batch");
                    intake
                        .disposer()
                        .dispose(&[], batch.deliveries.iter().map(tag).max())
                        .await
                        .expect("acknowledged");
                    seen.extend(batch.deliveries.iter().map(body));
                }
                tokio::task::yield_now().await;
                assert!(tokio::time::Instant::now() < deadline, "{seen:?}");
            }
            assert_eq!(seen, numbered(0..20).collect::<Vec<_>>());
            intake.release().await.expect("released");
            fill(&connection, "q", numbered(0..20)).await;
        }
    }

    #[tokio::test]
    async fn rejected_ones_become_dead_letters_wherever_they_stand() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        for (name, rejected) in [
            ("none", vec![]),
            ("front", vec![0, 1]),
            ("back", vec![4, 5]),
            ("mixed", vec![0, 2, 3, 5]),
            ("all", vec![0, 1, 2, 3, 4, 5]),
        ] {
            quorum_queue(&connection, name, 50).await;
            fill(&connection, name, numbered(0..6)).await;
            let mut intake = Intake::attach(&connection, name, 10, 10, 1 << 20)
                .await
                .expect("attached");
            let disposer = intake.disposer();
            let taken = take(&mut intake, 6).await;
            // The next batch is already here when this one is disposed of.
            fill(&connection, name, numbered(6..7)).await;
            let more = take(&mut intake, 1).await;
            let tags: Vec<u64> = rejected.iter().map(|index: &usize| tag(&taken[*index])).collect();
            let highest = taken.iter().map(tag).filter(|tag| !tags.contains(tag)).max();
            soon(disposer.dispose(&tags, highest)).await.expect("disposed");
            soon(disposer.dispose(&[], Some(tag(&more[0]))))
                .await
                .expect("the channel lives");
            let dead = format!("{name}.dead");
            let expected = u32::try_from(rejected.len()).expect("few");
            eventually("dead letters", async || {
                (ready(&connection, &dead).await == expected).then_some(())
            })
            .await;
            intake.release().await.expect("released");
            assert_eq!(ready(&connection, name).await, 0);
        }
    }

    #[tokio::test]
    async fn a_tag_settled_twice_is_an_error_not_a_silence() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        fill(&connection, "q", numbered(0..2)).await;
        let mut intake = Intake::attach(&connection, "q", 10, 10, 1 << 20)
            .await
            .expect("attached");
        take(&mut intake, 2).await;
        let disposer = intake.disposer();
        assert!(matches!(
            disposer.dispose(&[2], Some(2)).await,
            Err(BrokerError::Config(_))
        ));
        soon(disposer.dispose(&[], Some(2))).await.expect("acknowledged");
        // The broker answers this by closing the channel, which the intake learns.
        assert_eq!(soon(disposer.dispose(&[], Some(2))).await, Ok(()));
        let end = soon(intake.next()).await.expect_err("ended");
        assert!(
            matches!(&end, IntakeEnd::Away(error) if error.code() == Some(406)),
            "{end}"
        );
        assert_eq!(soon(intake.next()).await.expect_err("still"), end);
        assert!(soon(disposer.dispose(&[], Some(3))).await.is_err());
    }

    #[tokio::test]
    async fn lingering_it_takes_what_comes_meanwhile_and_no_longer_than_until_the_batch_is_full() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        let attached = Intake::attach(&connection, "q", 50, 10, 1 << 20)
            .await
            .expect("attached");
        // Longer than `soon` waits: only a full batch ends it.
        let mut intake = attached.lingering(Duration::from_secs(3_600));
        let publishing = async {
            for number in 0..12 {
                fill(&connection, "q", numbered(number..number + 1)).await;
            }
        };
        let (full, ()) = tokio::join!(soon(intake.next()), publishing);
        let full = full.expect("a batch").deliveries;
        assert!(full.iter().map(body).eq(numbered(0..10)));
        intake = intake.lingering(Duration::from_millis(20));
        let mut rest = Vec::new();
        while rest.len() < 2 {
            rest.extend(
                soon(intake.next())
                    .await
                    .expect("what came, once it has lingered")
                    .deliveries,
            );
        }
        assert!(rest.iter().map(body).eq(numbered(10..12)));
        intake.release().await.expect("released");
    }

    #[tokio::test]
    async fn cancelled_it_hands_out_what_came_before() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        fill(&connection, "q", numbered(0..200)).await;
        let mut intake = Intake::attach(&connection, "q", 50, 8, 1 << 20)
            .await
            .expect("attached");
        let disposer = intake.disposer();
        let mut seen: Vec<Delivery> = soon(intake.next()).await.expect("a batch").deliveries;
        soon(intake.cancel()).await.expect("cancelled");
        while let Some(batch) = intake.drain() {
            assert!(batch.deliveries.len() <= 8);
            seen.extend(batch.deliveries);
        }
        assert!(intake.drain().is_none());
        assert_eq!(soon(intake.next()).await.expect_err("ended"), IntakeEnd::Cancelled);
        soon(intake.cancel()).await.expect("again");
        assert_eq!(
            seen.iter().map(body).collect::<Vec<_>>(),
            numbered(0..seen.len()).collect::<Vec<_>>()
        );
        soon(disposer.dispose(&[], seen.iter().map(tag).max()))
            .await
            .expect("acknowledged");
        intake.release().await.expect("released");
        let left = u32::try_from(200 - seen.len()).expect("few");
        eventually("the rest is back", async || {
            (ready(&connection, "q").await == left).then_some(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_deleted_queue_cancels_and_a_cut_connection_is_away() {
        let vhost = Vhost::new();
        let other = vhost.connect().await;
        for careful in [true, false] {
            quorum_queue(&other, "q", 50).await;
            let (proxy, settings) = vhost.proxied();
            let connection = Connection::open(&settings, "test").await.expect("connected");
            let mut intake = Intake::attach(&connection, "q", 10, 10, 1 << 20)
                .await
                .expect("attached");
            if !careful {
                fill(&other, "q", numbered(0..1)).await;
                take(&mut intake, 1).await;
            }
            delete_queue(&other, "q").await;
            assert_eq!(soon(intake.next()).await.expect_err("ended"), IntakeEnd::Cancelled);
            assert!(connection.is_connected());
            intake.release().await.expect("released");

            quorum_queue(&other, "q", 50).await;
            let mut intake = Intake::attach(&connection, "q", 10, 10, 1 << 20)
                .await
                .expect("attached");
            let disposer = intake.disposer();
            fill(&other, "q", numbered(0..1)).await;
            take(&mut intake, 1).await;
            proxy.cut();
            let end = soon(intake.next()).await.expect_err("ended");
            assert!(matches!(end, IntakeEnd::Away(BrokerError::Away(_))), "{end}");
            assert!(soon(disposer.dispose(&[], Some(1))).await.is_err());
            soon(intake.release()).await.expect("nothing to release");
            delete_queue(&other, "q").await;
        }
    }

    #[tokio::test]
    async fn released_messages_come_back_and_count_once() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        fill(&connection, "q", numbered(0..10)).await;
        let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
            .await
            .expect("attached");
        take(&mut intake, 10).await;
        intake.release().await.expect("released");
        eventually("back", async || (ready(&connection, "q").await == 10).then_some(())).await;
        let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
            .await
            .expect("attached");
        for _ in 0..10 {
            let again = take(&mut intake, 1).await.remove(0);
            assert!(again.redelivered);
            let count = again
                .properties
                .headers
                .as_ref()
                .and_then(|headers| headers.get("x-delivery-count"));
            assert_eq!(count, Some(&HeaderValue::LongLongInt(1)));
            intake
                .disposer()
                .dispose(&[], Some(tag(&again)))
                .await
                .expect("acknowledged");
        }
    }

    /// What ends the connection whenever it is delivered goes to its delivery limit alone.
    #[tokio::test]
    async fn a_poison_dies_alone() {
        let vhost = Vhost::new();
        let other = vhost.connect().await;
        let (proxy, settings) = vhost.proxied();
        proxy.strike(b"the poison");
        quorum_queue(&other, "q", 3).await;
        fill(&other, "q", numbered(0..10)).await;
        fill(&other, "q", ["the poison".to_owned()]).await;
        fill(&other, "q", numbered(10..20)).await;

        let mut seen: BTreeSet<String> = BTreeSet::new();
        let mut lives = 0;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        'dead: loop {
            lives += 1;
            assert!(lives < 8, "{seen:?}");
            let connection = Connection::open(&settings, "test").await.expect("connected");
            // It may strike before the broker has said that there is a consumer.
            let attached = Intake::attach(&connection, "q", 100, 5, 1 << 20).await;
            let Ok(mut intake) = attached else { continue };
            let disposer = intake.disposer();
            loop {
                match tokio::time::timeout(Duration::from_millis(200), intake.next()).await {
                    Ok(Ok(batch)) => {
                        // Once the poison has struck an acknowledgement may be lost, and its message comes again.
                        drop(disposer.dispose(&[], batch.deliveries.iter().map(tag).max()).await);
                        seen.extend(batch.deliveries.iter().map(body));
                    }
                    Ok(Err(end)) => {
                        assert!(matches!(end, IntakeEnd::Away(BrokerError::Away(_))), "{end}");
                        break;
                    }
                    Err(_) if seen.len() == 20 && ready(&other, "q.dead").await == 1 => break 'dead,
                    Err(_) => assert!(tokio::time::Instant::now() < deadline, "{seen:?}"),
                }
            }
        }
        assert_eq!(
            seen.into_iter().collect::<Vec<_>>(),
            numbered(0..20).collect::<Vec<_>>()
        );
        assert_eq!(ready(&other, "q").await, 0);
    }

    /// Among innocents, one behind the other, plain and encrypted: each comes once, in order, with what it came with, and
    /// costs no connection.
    #[tokio::test]
    async fn what_lapin_can_not_decode_comes_like_any_other() {
        let vhost = Vhost::new();
        let other = vhost.connect().await;
        let authority = std::env::temp_dir().join(format!("{}.pem", vhost.name));
        std::fs::write(&authority, testing::AUTHORITY).expect("written");
        let encrypted = {
            let url = vhost.settings().url.replacen("amqp://", "amqps://", 1);
            let (before, _) = url.rsplit_once('@').expect("a user");
            BrokerSettings {
                url: format!("{before}@localhost:{}/{}", testing::tls_front(&vhost), vhost.name),
                ca_file: Some(authority.clone()),
                ..vhost.settings()
            }
        };
        for (queue, settings) in [("plain", vhost.settings()), ("encrypted", encrypted)] {
            quorum_queue(&other, queue, 50).await;
            let channel = other.channel().await.expect("a channel");
            let options = lapin::options::QueueBindOptions { nowait: false };
            channel
                .queue_bind(
                    queue.into(),
                    "amq.fanout".into(),
                    "".into(),
                    options,
                    FieldTable::default(),
                )
                .await
                .expect("bound");
            let mut raw = vhost.raw();
            let mut wrong = Vec::new();
            testing::short(&mut wrong, testing::UNDECODABLE);
            fill(&other, queue, numbered(0..10)).await;
            // The property before all others, and one behind; and a routing key.
            raw.publish("", queue, 1 << 15, &wrong, b"before");
            raw.publish("", queue, 1 << 7, &wrong, b"behind");
            raw.publish("amq.fanout", b"acme\xff.allocation.update", 0, &[], b"key");
            fill(&other, queue, numbered(10..20)).await;

            let connection = Connection::open(&settings, "test").await.expect("connected");
            let mut intake = Intake::attach(&connection, queue, 100, 7, 1 << 20)
                .await
                .expect("attached");
            let taken = take(&mut intake, 23).await;
            let bodies: Vec<String> = taken.iter().map(body).collect();
            let poison = ["before", "behind", "key"].map(str::to_owned);
            let expected: Vec<String> = numbered(0..10).chain(poison).chain(numbered(10..20)).collect();
            assert_eq!(bodies, expected);
            assert!(taken.iter().all(|delivery| !delivery.redelivered));
            for (index, flags) in [(10, [0x80, 0]), (11, [0, 0x80])] {
                let list = Bytes([&flags[..], &wrong].concat());
                assert_eq!(taken[index].properties.undecodable, Some(list));
                assert_eq!(taken[index].routing_key, queue);
            }
            assert_eq!(taken[12].routing_key, "acme\\xff.allocation.update");
            assert_eq!(taken[12].exchange, "amq.fanout");
            let innocents = taken
                .iter()
                .filter(|delivery| delivery.properties.undecodable.is_none());
            assert_eq!(innocents.count(), 21);
            let highest = taken.iter().map(tag).max();
            intake.disposer().dispose(&[], highest).await.expect("acknowledged");
            assert!(connection.is_connected());
            intake.release().await.expect("released");
            assert_eq!(ready(&other, queue).await, 0);
            delete_queue(&other, queue).await;
        }
        std::fs::remove_file(&authority).expect("removed");
    }

    fn every_kind() -> Headers {
        let scalars: Headers = [
            ("true", HeaderValue::Boolean(true)),
            ("false", HeaderValue::Boolean(false)),
            ("i8", HeaderValue::ShortShortInt(i8::MIN)),
            ("u8", HeaderValue::ShortShortUInt(u8::MAX)),
            ("i16", HeaderValue::ShortInt(i16::MIN)),
            ("u16", HeaderValue::ShortUInt(u16::MAX)),
            ("i32", HeaderValue::LongInt(i32::MIN)),
            ("u32", HeaderValue::LongUInt(u32::MAX)),
            ("i64", HeaderValue::LongLongInt(i64::MIN)),
            ("f32", HeaderValue::Float(0.1_f32.to_bits())),
            ("f64", HeaderValue::Double((-0.0_f64).to_bits())),
            (
                "decimal",
                HeaderValue::Decimal {
                    scale: 2,
                    value: 12_345,
                },
            ),
            ("text", HeaderValue::text("\u{e4}\u{1f600}")),
            ("no text", HeaderValue::LongString(Bytes(vec![0, 0xff, 0xfe]))),
            ("empty text", HeaderValue::text("")),
            ("time", HeaderValue::Timestamp(1_700_000_000)),
            ("bytes", HeaderValue::ByteArray(Bytes(vec![0, 1, 2, 255]))),
            ("void", HeaderValue::Void),
            ("empty table", HeaderValue::Table(Headers::new())),
            ("empty array", HeaderValue::Array(vec![])),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        let mut headers = scalars.clone();
        headers.insert(
            "array".to_owned(),
            HeaderValue::Array(scalars.values().cloned().collect()),
        );
        headers.insert("".to_owned(), HeaderValue::Table(scalars));
        headers.insert("x".repeat(255), nested(wire::DEPTH_MAX - 1));
        headers
    }

    /// A table this deep.
    fn nested(depth: usize) -> HeaderValue {
        (0..depth).fold(HeaderValue::Void, |inner, level| {
            if level % 2 == 0 {
                HeaderValue::Table([("t".to_owned(), inner)].into())
            } else {
                HeaderValue::Array(vec![inner])
            }
        })
    }

    #[tokio::test]
    async fn properties_come_as_they_were_sent() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        quorum_queue(&connection, "q", 50).await;
        let (_, rest) = vhost
            .settings()
            .url
            .split_once("://")
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .expect("a URL");
        let user = rest.split(':').next().expect("a user").to_owned();
        let all = Properties {
            content_type: Some("application/json".to_owned()),
            content_encoding: Some("identity".to_owned()),
            headers: Some(every_kind()),
            delivery_mode: Some(2),
            priority: Some(255),
            correlation_id: Some("x".repeat(255)),
            reply_to: Some("settlement.reply.acme.1".to_owned()),
            expiration: Some("600000".to_owned()),
            message_id: Some("\u{e4}".to_owned()),
            timestamp: Some(u64::from(u32::MAX) + 1),
            kind: Some(String::new()),
            user_id: Some(user),
            app_id: Some("app".to_owned()),
            cluster_id: Some("cluster".to_owned()),
            undecodable: None,
        };
        let empty = Properties {
            headers: Some(Headers::new()),
            ..Properties::default()
        };
        let mut intake = Intake::attach(&connection, "q", 1, 1, 1 << 20).await.expect("attached");
        for properties in [all, empty, Properties::default()] {
            let mut sent = event("", "q", "body");
            sent.properties = properties.clone();
            publish(&connection, &sent).await;
            let got = take(&mut intake, 1).await.remove(0);
            assert_eq!(got.properties, properties);
            assert_eq!(
                (got.body, got.exchange, got.routing_key),
                (sent.body, String::new(), "q".to_owned())
            );
            intake
                .disposer()
                .dispose(
                    &[],
                    Some(match got.source {
                        Source::Queue { delivery_tag } => delivery_tag,
                        Source::Parked { .. } | Source::Replayed { .. } | Source::Held { .. } | Source::Plain => 0,
                    }),
                )
                .await
                .expect("acknowledged");
        }
    }

    /// RabbitMQ 3.10 ends the connection of whoever publishes one, so it takes no part in the test above.
    #[test]
    fn not_a_number_keeps_its_bits() {
        for bits in [0x7fa0_0001, 0xffc0_0000, 0x7f80_0000] {
            let value = AMQPValue::Float(f32::from_bits(bits));
            assert_eq!(header_from(&value, 1), HeaderValue::Float(bits));
        }
        for bits in [0x7ff4_0000_0000_0001, 0xfff8_0000_0000_0000] {
            let value = AMQPValue::Double(f64::from_bits(bits));
            assert_eq!(header_from(&value, 1), HeaderValue::Double(bits));
        }
    }

    #[tokio::test]
    async fn headers_too_deep_to_walk_make_a_message_too_large() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        queue(&connection, "q", &[]).await;
        let mut intake = Intake::attach(&connection, "q", 100, 10, 1 << 20)
            .await
            .expect("attached");
        for (depth, fits) in [
            (wire::DEPTH_MAX - 1, true),
            (wire::DEPTH_MAX, false),
            (2 * wire::DEPTH_MAX, false),
        ] {
            let mut sent = event("", "q", "body");
            sent.properties.headers = Some([("h".to_owned(), nested(depth))].into());
            publish(&connection, &sent).await;
            let got = take(&mut intake, 1).await.remove(0);
            assert_eq!(got.properties == sent.properties, fits, "{depth}");
            assert_eq!(got.properties.wire_len() > 16_384, !fits, "{depth}");
        }
    }

    /// Whatever depth comes out of the client library: no walk of ours goes deeper than the bound.
    #[test]
    fn a_table_is_cut_off_at_the_bound() {
        let deep = (0..4 * wire::DEPTH_MAX).fold(AMQPValue::Void, |inner, _| {
            AMQPValue::FieldTable(BTreeMap::from([(ShortString::from("t"), inner)]).into())
        });
        let mut value = &header_from(&deep, 1);
        let mut depth = 1;
        while let HeaderValue::Table(table) = value {
            value = table.get("t").expect("the next one");
            depth += 1;
        }
        assert_eq!(depth, wire::DEPTH_MAX);
        assert_eq!(value, &wire::too_deep());
    }
}

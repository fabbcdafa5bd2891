//! The broker as partners, subscribers and operators meet it.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{
    StreamExt,
    future::{join_all, select_ok},
};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::{Value, value::RawValue};
use uuid::Uuid;

use crate::kit::{
    auditor::Expect,
    contract,
    support::{Beside, PATIENCE, each_host, until},
};

/// Something to publish, and what is expected of it.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
    pub(crate) body: Vec<u8>,
    pub(crate) properties: BasicProperties,
    pub(crate) expect: Expect,
}

impl Message {
    pub(crate) fn new(routing_key: &str, body: impl Into<Vec<u8>>, expect: Expect) -> Self {
        Self {
            exchange: "settlement.updates".to_owned(),
            routing_key: routing_key.to_owned(),
            body: body.into(),
            properties: BasicProperties::default()
                .with_content_type("application/json".into())
                .with_delivery_mode(2),
            expect,
        }
    }

    pub(crate) fn with(mut self, change: impl FnOnce(BasicProperties) -> BasicProperties) -> Self {
        self.properties = change(self.properties);
        self
    }

    pub(crate) fn expecting(mut self, expect: Expect) -> Self {
        self.expect = expect;
        self
    }
}

/// A broker that starts may accept a connection and never answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Partners wait for a broker as long as it takes; a cluster takes its time to start.
const BACK: Duration = PATIENCE.saturating_mul(3);

async fn answered<T>(question: impl Future<Output = lapin::Result<T>>) -> lapin::Result<T> {
    answered_within(ANSWER, question).await
}

async fn answered_within<T>(patience: Duration, question: impl Future<Output = lapin::Result<T>>) -> lapin::Result<T> {
    let late = || lapin::ErrorKind::IOError(std::sync::Arc::new(std::io::ErrorKind::TimedOut.into()));
    tokio::time::timeout(patience, question)
        .await
        .unwrap_or_else(|_| Err(late().into()))
}

/// A host that is silent for so long is not waited for alone.
const NEXT_HOST: Duration = Duration::from_millis(500);

/// Of several hosts the first that lets us in, each time beginning with another.
async fn open(url: &str) -> lapin::Result<(Connection, Channel)> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let mut urls = each_host(url);
    let first = NEXT.fetch_add(1, Ordering::Relaxed) % urls.len();
    urls.rotate_left(first);
    let tries = (0..).zip(&urls).map(|(before, url)| {
        Box::pin(async move {
            tokio::time::sleep(NEXT_HOST * before).await;
            open_at(url).await
        })
    });
    select_ok(tries).await.map(|(opened, _)| opened)
}

async fn open_at(url: &str) -> lapin::Result<(Connection, Channel)> {
    let connection = answered(Connection::connect(url, ConnectionProperties::default())).await?;
    let channel = answered(connection.create_channel()).await?;
    Ok((connection, channel))
}

/// A durable quorum queue's declaration: what was confirmed to it survives a kill of the broker.
const QUEUE: QueueDeclareOptions = QueueDeclareOptions {
    passive: false,
    durable: true,
    exclusive: false,
    auto_delete: false,
    nowait: false,
};

fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments
}

/// A test's own connection: opened when it is needed, and again when it broke.
pub(crate) struct Line {
    url: String,
    /// How long a confirm is waited for.
    patience: Duration,
    link: tokio::sync::Mutex<Option<(Connection, Channel)>>,
}

impl Line {
    pub(crate) async fn open(url: &str) -> Self {
        Self::open_with(url, ANSWER).await
    }

    /// One that waits only so long for a confirm before it publishes again, by way of another host perhaps.
    pub(crate) async fn open_with(url: &str, patience: Duration) -> Self {
        let line = Self {
            url: url.to_owned(),
            patience,
            link: tokio::sync::Mutex::new(None),
        };
        line.channel().await;
        line
    }

    /// A channel with confirms on, once the broker answers.
    pub(crate) async fn channel(&self) -> Channel {
        let mut link = self.link.lock().await;
        if let Some((connection, channel)) = link.as_ref()
            && connection.status().connected()
            && channel.status().connected()
        {
            return channel.clone();
        }
        *link = None;
        let (connection, channel) = until("the broker answers", BACK, async || open(&self.url).await.ok()).await;
        let confirms = channel.confirm_select(ConfirmSelectOptions { nowait: false }).await;
        confirms.expect("publisher confirms");
        *link = Some((connection, channel.clone()));
        channel
    }

    /// Publishes until every one is confirmed. One that the broker did not confirm goes out again, as a careful partner's
    /// would: it may arrive twice.
    pub(crate) async fn publish(&self, messages: &[Message]) {
        messages.iter().for_each(contract::sent);
        let mut left: Vec<&Message> = messages.iter().collect();
        until("the broker confirms", BACK, async || {
            let channel = self.channel().await;
            let publishes = left.iter().map(|message| async {
                let options = BasicPublishOptions {
                    mandatory: true,
                    immediate: false,
                };
                let (exchange, key) = (message.exchange.as_str().into(), message.routing_key.as_str().into());
                let properties = message.properties.clone();
                let published = channel
                    .basic_publish(exchange, key, options, &message.body, properties)
                    .await;
                let Ok(confirm) = published else {
                    return false;
                };
                matches!(
                    answered_within(self.patience, confirm).await,
                    Ok(Confirmation::Ack(None))
                )
            });
            let confirmed = join_all(publishes).await;
            left = left
                .iter()
                .zip(confirmed)
                .filter(|(_, confirmed)| !confirmed)
                .map(|(message, _)| *message)
                .collect();
            if !left.is_empty() {
                // A node that is frozen keeps its connections, and says nothing on them.
                *self.link.lock().await = None;
            }
            left.is_empty().then_some(())
        })
        .await;
    }

    /// Messages ready in a queue.
    pub(crate) async fn depth(&self, queue: &str) -> u32 {
        let channel = self.channel().await;
        let look = QueueDeclareOptions { passive: true, ..QUEUE };
        let declared = channel.queue_declare(queue.into(), look, FieldTable::default()).await;
        declared
            .unwrap_or_else(|error| panic!("{queue}: {error}"))
            .message_count()
    }

    /// Declares a queue, bound to an exchange under a key.
    pub(crate) async fn bind(&self, queue: &str, exchange: &str, key: &str) {
        bind(&self.channel().await, queue, exchange, key)
            .await
            .expect("a bound queue");
    }

    /// Declares a queue without any binding.
    pub(crate) async fn declare(&self, queue: &str) {
        let channel = self.channel().await;
        channel
            .queue_declare(queue.into(), QUEUE, quorum())
            .await
            .expect("a queue");
    }

    pub(crate) async fn delete(&self, queue: &str) {
        let options = QueueDeleteOptions {
            if_unused: false,
            if_empty: false,
            nowait: false,
        };
        self.channel()
            .await
            .queue_delete(queue.into(), options)
            .await
            .expect("the queue goes");
    }

    /// What is ready in a queue, without taking it out: it is got, not acknowledged, and goes back when the channel closes.
    pub(crate) async fn peek(&self, queue: &str) -> Vec<Seen> {
        self.peek_some(queue, usize::MAX).await
    }

    /// The same of the first so many.
    pub(crate) async fn peek_some(&self, queue: &str, most: usize) -> Vec<Seen> {
        let (_connection, channel) = open(&self.url).await.expect("the broker answers");
        let mut seen = Vec::new();
        let options = BasicGetOptions { no_ack: false };
        while seen.len() < most
            && let Some(got) = channel.basic_get(queue.into(), options).await.expect("an answer")
        {
            seen.push(Seen::of(got.delivery));
        }
        channel.close(200, "done".into()).await.expect("it closes");
        seen
    }

    /// Takes one message out of a queue, once there is one.
    pub(crate) async fn get(&self, queue: &str) -> Seen {
        let channel = self.channel().await;
        until("a message in the queue", PATIENCE, async || {
            let got = channel
                .basic_get(queue.into(), BasicGetOptions { no_ack: true })
                .await
                .expect("an answer")?;
            Some(Seen::of(got.delivery))
        })
        .await
    }
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
    channel.queue_declare(queue.into(), QUEUE, quorum()).await?;
    let options = QueueBindOptions { nowait: false };
    channel
        .queue_bind(
            queue.into(),
            exchange.into(),
            key.into(),
            options,
            FieldTable::default(),
        )
        .await
}

/// A message as a subscriber got it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) routing_key: String,
    pub(crate) body: Vec<u8>,
    pub(crate) properties: BasicProperties,
}

impl Seen {
    pub(crate) fn of(delivery: lapin::message::Delivery) -> Self {
        contract::received(&delivery);
        Self {
            routing_key: delivery.routing_key.as_str().to_owned(),
            body: delivery.data,
            properties: delivery.properties,
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&AMQPValue> {
        self.properties.headers().as_ref()?.inner().get(name)
    }

    /// A header that is text.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        match self.header(name)? {
            AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
            _ => None,
        }
    }

    pub(crate) fn message_id(&self) -> Option<&str> {
        self.properties.message_id().as_ref().map(ShortString::as_str)
    }

    /// The events in it, each as if it had come alone. What is no array of as many events as it says is left as it is, for
    /// the auditor to complain of.
    pub(crate) fn events(self) -> Vec<Self> {
        let Some(bodies) = self.array() else {
            return vec![self];
        };
        let alone = |body: &RawValue| {
            let event: Value = serde_json::from_str(body.get()).unwrap_or_default();
            let id = event["id"].as_str().unwrap_or_default();
            Self {
                routing_key: self.routing_key.clone(),
                body: body.get().as_bytes().to_vec(),
                properties: self
                    .properties
                    .clone()
                    .with_content_type("application/cloudevents+json".into())
                    .with_message_id(id.into()),
            }
        };
        bodies.iter().map(|body| alone(body)).collect()
    }

    /// The events of an array, if it is one.
    fn array(&self) -> Option<Vec<Box<RawValue>>> {
        let kind = self.properties.content_type().as_ref()?.as_str();
        let events: Vec<Box<RawValue>> = serde_json::from_slice(&self.body).ok()?;
        let count = AMQPValue::LongInt(i32::try_from(events.len()).ok()?);
        let is_one = kind == "application/cloudevents-batch+json" && self.header("settled-events") == Some(&count);
        is_one.then_some(events)
    }

    /// What the broker wrote down when it dead-lettered this itself: from which queue, and why.
    pub(crate) fn death(&self) -> Option<(String, String)> {
        let Some(AMQPValue::FieldArray(deaths)) = self.header("x-death") else {
            return None;
        };
        let Some(AMQPValue::FieldTable(first)) = deaths.as_slice().first() else {
            return None;
        };
        let text = |name: &str| match first.inner().get(name) {
            Some(AMQPValue::LongString(text)) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
            _ => None,
        };
        Some((text("queue")?, text("reason")?))
    }
}

/// A subscriber with a queue of its own, bound to everything of an exchange. It records all that comes, and comes back when
/// the broker went away.
pub(crate) struct Tap {
    queue: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    _listening: Beside,
}

impl Tap {
    pub(crate) async fn open(url: &str, exchange: &str, queue: &str) -> Self {
        let (_connection, channel) = open(url).await.expect("the broker answers");
        bind(&channel, queue, exchange, "#").await.expect("a bound queue");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (url, name, record) = (url.to_owned(), queue.to_owned(), Arc::clone(&seen));
        let listening = Beside::spawn(async move {
            loop {
                // A broken connection is no news here: the messages wait in the queue.
                drop(listen(&url, &name, &record).await);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self {
            queue: queue.to_owned(),
            seen,
            _listening: listening,
        }
    }

    /// Takes over what another saw.
    pub(crate) fn recall(&self, seen: Vec<Seen>) {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(seen);
    }

    /// Whether it saw a message with these bytes in its body.
    pub(crate) fn has(&self, bytes: &[u8]) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bodies = seen.iter().rev().map(|seen| &seen.body);
        bodies.any(|body| body.windows(bytes.len()).any(|window| window == bytes))
    }

    /// Everything so far, each what its schema says.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        contract::nothing_found();
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until nothing is left in its queue: publishes a mark and waits for it, since what came before it is in front.
    pub(crate) async fn catch_up(&self, line: &Line) {
        let mark = Uuid::new_v4().to_string();
        let message = Message::new(&self.queue, mark.as_bytes(), Expect::Any);
        let message = Message {
            exchange: String::new(),
            ..message
        };
        line.publish(&[message]).await;
        until("the subscriber catches up", PATIENCE, async || {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let at = seen.iter().position(|seen| seen.body == mark.as_bytes())?;
            seen.remove(at);
            Some(())
        })
        .await;
    }

    /// Waits for a message that satisfies.
    pub(crate) async fn wait(&self, what: &str, wanted: impl Fn(&Seen) -> bool) -> Seen {
        until(what, PATIENCE, async || self.seen().into_iter().find(&wanted)).await
    }
}

async fn listen(url: &str, queue: &str, record: &Mutex<Vec<Seen>>) -> lapin::Result<()> {
    let (_connection, channel) = open(url).await?;
    channel.basic_qos(500, BasicQosOptions { global: false }).await?;
    let options = BasicConsumeOptions {
        no_local: false,
        no_ack: false,
        exclusive: false,
        nowait: false,
    };
    let mut consumer = channel
        .basic_consume(queue.into(), "".into(), options, FieldTable::default())
        .await?;
    loop {
        match tokio::time::timeout(Duration::from_millis(500), consumer.next()).await {
            Ok(Some(delivery)) => {
                let delivery = delivery?;
                let tag = delivery.delivery_tag;
                record
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Seen::of(delivery));
                channel.basic_ack(tag, BasicAckOptions { multiple: false }).await?;
            }
            Ok(None) => return Ok(()),
            // Nothing comes: because there is nothing, or because the broker has forgotten us?
            Err(_) => {
                let look = QueueDeclareOptions { passive: true, ..QUEUE };
                let declared = channel.queue_declare(queue.into(), look, FieldTable::default());
                if answered(declared).await?.message_count() > 0 {
                    return Ok(());
                }
            }
        }
    }
}

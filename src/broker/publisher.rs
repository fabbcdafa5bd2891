//! Publishing with confirms, a batch at a time, and replies without any.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::BasicProperties;
use lapin::types::{AMQPValue, DecimalValue, FieldArray, FieldTable, ShortString};
use lapin::{Confirmation, PublisherConfirm};

use super::{ANSWER_TIMEOUT, BrokerError, Connection, all_together, answer};
use crate::domain::delivery::{HeaderValue, Headers, Properties, Publication, PublicationKind};
use crate::domain::event::DEAD_EXCHANGE;
use crate::fail::{self, Point};

/// A reply is worth this much waiting and no more.
const REPLY_TIMEOUT: Duration = Duration::from_millis(250);

/// Of a header frame, all that is not properties: frame header and end (8), class, weight, body size and flags (14).
const HEADER_FRAME_BYTES: usize = 22;

/// What became of one publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The broker has it, in every queue it was routed to.
    Confirmed,
    /// The broker has no queue for it.
    Returned,
    /// The broker did not take it: a queue is full, or in trouble.
    Nacked,
}

/// Publishes with confirms on a channel of its own, from one task at a time: lapin mixes confirms up when several tasks
/// publish on a channel, which `&mut self` rules out.
pub struct Publisher {
    connection: Arc<lapin::Connection>,
    channel: lapin::Channel,
    deadline: Duration,
    /// What a dead letter carries as `user_id`, so that the collector knows it for ours.
    login: Option<String>,
    /// After an error nothing is known about the channel's confirms.
    spent: bool,
    replies: Replies,
}

/// How replies leave. A channel that the broker closes is a danger to the others: what lapin has queued on it follows the
/// closing, which ends the connection, and the number of such a channel is never used again. So the first reply shows
/// whether we may reply at all (the user may not publish to the default exchange, say) before others follow it.
enum Replies {
    Untried,
    Open(lapin::Channel),
    /// Refused on this connection.
    Off,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher")
            .field("spent", &self.spent)
            .finish_non_exhaustive()
    }
}

impl Publisher {
    /// Opens a channel and turns its confirms on.
    pub async fn open(connection: &Connection) -> Result<Self, BrokerError> {
        let channel = connection.channel().await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions { nowait: false });
        answer("publisher confirms", ANSWER_TIMEOUT, confirms).await?;
        Ok(Publisher {
            connection: Arc::clone(&connection.lapin),
            channel,
            deadline: connection.publish_deadline,
            login: connection.login.clone(),
            spent: false,
            replies: Replies::Untried,
        })
    }

    /// Lets dead letters carry no `user_id`: the broker knows us by another name than the one we log in with.
    pub fn without_login(mut self) -> Self {
        self.login = None;
        self
    }

    /// Publishes all of them together and awaits every confirm; the fates are in the same order.
    ///
    /// After an error nothing is known of any of them, and the publisher is spent. `Refused` means that the broker closed
    /// the channel because of one of them: publish one by one, on a **new connection**, since the frames still queued
    /// behind the refused one may have ended this one. (A refusal with 501 or 502 is our own, before anything was
    /// sent, and leaves the publisher usable.)
    pub async fn publish(&mut self, publications: &[Publication]) -> Result<Vec<Fate>, BrokerError> {
        if self.spent {
            return Err(BrokerError::Away("this publisher's channel is lost".to_owned()));
        }
        let frame_max = usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX);
        let messages = publications
            .iter()
            .map(|publication| Message::try_from(publication, frame_max, self.login.as_deref()))
            .collect::<Result<Vec<_>, _>>()?;
        // Set before the first await: a dropped future leaves confirms behind that the next call would take for its own.
        self.spent = true;
        fail::fallible(Point::BeforePublish).await?;
        let sending = async {
            let started = all_together(messages.into_iter().map(|message| message.publish(&self.channel))).await;
            fail::fallible(Point::PublishSent).await?;
            // Every one is awaited, also after an error: the broker's reason may stand in any. The last one first: once it is
            // there the others mostly are as well, and each wait that is spared is a wake-up.
            let mut confirms = Vec::with_capacity(started.len());
            let mut errors = Vec::new();
            for confirm in started.into_iter().rev() {
                match confirm {
                    Ok(confirm) => match confirm.await {
                        Ok(confirmation) => confirms.push(confirmation),
                        Err(error) => errors.push(error),
                    },
                    Err(error) => errors.push(error),
                }
            }
            confirms.reverse();
            errors.reverse();
            Ok::<_, BrokerError>((confirms, errors))
        };
        let Ok(sent) = tokio::time::timeout(self.deadline, sending).await else {
            return Err(BrokerError::Away(format!(
                "publishing took longer than {:?}",
                self.deadline
            )));
        };
        let (confirms, errors) = sent?;
        if let Some(error) = worst(&errors) {
            return Err(error);
        }
        let fates = fates(publications, confirms)?;
        self.spent = false;
        Ok(fates)
    }

    /// Whether a publication of no matter to anybody passes on this connection: to no queue, under a name of its own.
    ///
    /// # Errors
    /// It does not; `Refused` where this user may not publish so at all.
    pub async fn probe(&mut self) -> Result<(), BrokerError> {
        let nobody = Publication {
            kind: PublicationKind::Reply,
            exchange: String::new(),
            routing_key: format!("settled.probe.{}", uuid::Uuid::new_v4()),
            properties: Properties::default(),
            body: Vec::new(),
        };
        let message = Message::try_from(&nobody, usize::MAX, None)?;
        answer("a probe", ANSWER_TIMEOUT, message.publish_alone(&self.connection)).await
    }

    /// Sends a reply if that is possible at once. Whether it arrives is not known.
    pub async fn reply(&mut self, publication: &Publication) -> bool {
        // Nothing leaves a blocked connection; frames would only pile up.
        if self.connection.status().blocked() {
            return false;
        }
        let frame_max = usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX);
        let Ok(message) = Message::try_from(publication, frame_max, None) else {
            return false;
        };
        let sending = async {
            match &self.replies {
                Replies::Off => Ok(false),
                Replies::Open(channel) if channel.status().connected() => message.publish(channel).await.map(|_| true),
                Replies::Open(_) | Replies::Untried => {
                    message.publish_alone(&self.connection).await?;
                    self.replies = Replies::Open(self.connection.create_channel().await?);
                    Ok(true)
                }
            }
        };
        match tokio::time::timeout(REPLY_TIMEOUT, sending).await {
            Ok(Ok(sent)) => sent,
            Ok(Err(error)) => {
                if BrokerError::from_lapin(&error).code().is_some() {
                    self.replies = Replies::Off;
                }
                false
            }
            // A broker that is slow now would hold up a whole batch of replies, one by one.
            Err(_) => {
                self.replies = Replies::Off;
                false
            }
        }
    }
}

/// One publication in the broker's words.
struct Message<'a> {
    exchange: ShortString,
    routing_key: ShortString,
    mandatory: bool,
    properties: BasicProperties,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// Refuses here what would end the connection, and others' messages with it.
    fn try_from(publication: &'a Publication, frame_max: usize, login: Option<&str>) -> Result<Self, BrokerError> {
        let size = publication.properties.wire_len().saturating_add(HEADER_FRAME_BYTES);
        let login = login.filter(|_| publication.exchange == DEAD_EXCHANGE);
        let size = size.saturating_add(login.map_or(0, |login| login.len().saturating_add(1)));
        if size > frame_max {
            return Err(BrokerError::Refused {
                code: 501,
                text: format!("properties and headers need a frame of {size} bytes, the broker takes {frame_max}"),
            });
        }
        let mut properties = properties_to(&publication.properties)?;
        if let Some(login) = login {
            properties = properties.with_user_id(short(login)?);
        }
        Ok(Message {
            exchange: short(&publication.exchange)?,
            routing_key: short(&publication.routing_key)?,
            mandatory: match publication.kind {
                PublicationKind::Event | PublicationKind::DeadLetter => true,
                PublicationKind::Reply => false,
            },
            properties,
            body: &publication.body,
        })
    }

    async fn publish(self, channel: &lapin::Channel) -> lapin::Result<PublisherConfirm> {
        let options = BasicPublishOptions {
            mandatory: self.mandatory,
            immediate: false,
        };
        channel
            .basic_publish(self.exchange, self.routing_key, options, self.body, self.properties)
            .await
    }

    /// On a channel made for it, with the broker's answer awaited.
    async fn publish_alone(self, connection: &lapin::Connection) -> lapin::Result<()> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
        self.publish(&channel).await?.await?;
        channel.close(200, "done".into()).await
    }
}

/// A refusal says more than the closed channel that the others met.
fn worst(errors: &[lapin::Error]) -> Option<BrokerError> {
    let mut errors = errors.iter().map(BrokerError::from_lapin);
    let first = errors.next()?;
    match &first {
        BrokerError::Refused { .. } => Some(first),
        BrokerError::Away(_) | BrokerError::Config(_) => {
            Some(errors.find(|error| error.code().is_some()).unwrap_or(first))
        }
    }
}

/// What a returned message shares with its publication. The sender's `message_id` of a dead letter need not be unique,
/// and an event may stand twice in a batch; those that agree in all four are interchangeable.
#[derive(PartialEq, Eq, Hash)]
struct Likeness<'a> {
    exchange: &'a str,
    routing_key: &'a str,
    message_id: Option<&'a str>,
    body: &'a [u8],
}

/// lapin hands a returned message out with whichever confirm comes next. All of them are here, so each return finds its
/// publication by what it is.
fn fates(publications: &[Publication], confirms: Vec<Confirmation>) -> Result<Vec<Fate>, BrokerError> {
    let mut returned: Vec<BasicReturnMessage> = Vec::new();
    let mut fates: Vec<Fate> = confirms
        .into_iter()
        .map(|confirmation| match confirmation {
            Confirmation::Ack(message) => {
                returned.extend(message);
                Fate::Confirmed
            }
            Confirmation::Nack(message) => {
                returned.extend(message);
                Fate::Nacked
            }
            // Confirms were off: nothing is known.
            Confirmation::NotRequested => Fate::Nacked,
        })
        .collect();
    if returned.is_empty() {
        return Ok(fates);
    }
    let mut like: HashMap<Likeness<'_>, Vec<usize>> = HashMap::new();
    for (index, publication) in publications.iter().enumerate().rev() {
        let likeness = Likeness {
            exchange: &publication.exchange,
            routing_key: &publication.routing_key,
            message_id: publication.properties.message_id.as_deref(),
            body: &publication.body,
        };
        like.entry(likeness).or_default().push(index);
    }
    for message in &returned {
        let likeness = Likeness {
            exchange: message.exchange.as_str(),
            routing_key: message.routing_key.as_str(),
            message_id: message.properties.message_id().as_ref().map(ShortString::as_str),
            body: &message.data,
        };
        let Some(fate) = like
            .get_mut(&likeness)
            .and_then(Vec::pop)
            .and_then(|index| fates.get_mut(index))
        else {
            return Err(BrokerError::Away(
                "it returned a message that was not published".to_owned(),
            ));
        };
        *fate = Fate::Returned;
    }
    Ok(fates)
}

fn short(value: &str) -> Result<ShortString, BrokerError> {
    // lapin's other conversion panics.
    ShortString::try_new(value).map_err(|error| BrokerError::Refused {
        code: 502,
        text: error.to_string(),
    })
}

fn properties_to(properties: &Properties) -> Result<BasicProperties, BrokerError> {
    let mut message = BasicProperties::default();
    type With = fn(BasicProperties, ShortString) -> BasicProperties;
    let texts: [(&Option<String>, With); 10] = [
        (&properties.content_type, BasicProperties::with_content_type),
        (&properties.content_encoding, BasicProperties::with_content_encoding),
        (&properties.correlation_id, BasicProperties::with_correlation_id),
        (&properties.reply_to, BasicProperties::with_reply_to),
        (&properties.expiration, BasicProperties::with_expiration),
        (&properties.message_id, BasicProperties::with_message_id),
        (&properties.kind, BasicProperties::with_type),
        (&properties.user_id, BasicProperties::with_user_id),
        (&properties.app_id, BasicProperties::with_app_id),
        (&properties.cluster_id, BasicProperties::with_cluster_id),
    ];
    for (value, with) in texts {
        if let Some(value) = value {
            message = with(message, short(value)?);
        }
    }
    if let Some(headers) = &properties.headers {
        message = message.with_headers(table_to(headers)?);
    }
    if let Some(value) = properties.delivery_mode {
        message = message.with_delivery_mode(value);
    }
    if let Some(value) = properties.priority {
        message = message.with_priority(value);
    }
    if let Some(value) = properties.timestamp {
        message = message.with_timestamp(value);
    }
    Ok(message)
}

fn table_to(headers: &Headers) -> Result<FieldTable, BrokerError> {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert(short(name)?, value_to(value)?);
    }
    Ok(table)
}

fn value_to(value: &HeaderValue) -> Result<AMQPValue, BrokerError> {
    Ok(match value {
        HeaderValue::Boolean(value) => AMQPValue::Boolean(*value),
        HeaderValue::ShortShortInt(value) => AMQPValue::ShortShortInt(*value),
        HeaderValue::ShortShortUInt(value) => AMQPValue::ShortShortUInt(*value),
        HeaderValue::ShortInt(value) => AMQPValue::ShortInt(*value),
        HeaderValue::ShortUInt(value) => AMQPValue::ShortUInt(*value),
        HeaderValue::LongInt(value) => AMQPValue::LongInt(*value),
        HeaderValue::LongUInt(value) => AMQPValue::LongUInt(*value),
        HeaderValue::LongLongInt(value) => AMQPValue::LongLongInt(*value),
        HeaderValue::Float(bits) => AMQPValue::Float(f32::from_bits(*bits)),
        HeaderValue::Double(bits) => AMQPValue::Double(f64::from_bits(*bits)),
        HeaderValue::Decimal { scale, value } => AMQPValue::DecimalValue(DecimalValue {
            scale: *scale,
            value: *value,
        }),
        HeaderValue::LongString(bytes) => AMQPValue::LongString(bytes.0.clone().into()),
        HeaderValue::Array(values) => AMQPValue::FieldArray(FieldArray::from(
            values.iter().map(value_to).collect::<Result<Vec<_>, _>>()?,
        )),
        HeaderValue::Timestamp(value) => AMQPValue::Timestamp(*value),
        HeaderValue::Table(headers) => AMQPValue::FieldTable(table_to(headers)?),
        HeaderValue::ByteArray(bytes) => AMQPValue::ByteArray(bytes.0.clone().into()),
        HeaderValue::Void => AMQPValue::Void,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use lapin::types::AMQPValue;

    use super::*;
    use crate::broker::testing::{Vhost, event, eventually, queue, ready, soon, text};

    /// lapin gives a return to the next confirm, whosever it is.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_return_finds_its_own_publication() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        queue(&connection, "there", &[("x-queue-type", text("quorum"))]).await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let mut seed = 42_u64;
        for round in 0..40 {
            let mut sent = Vec::new();
            let mut expected = Vec::new();
            for index in 0..256 {
                seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let there = seed >> 62 != 0;
                let mut one = event("", if there { "there" } else { "nowhere" }, &format!("{round}/{index}"));
                match index % 4 {
                    // A dead letter carries its sender's message id, often the same one, and maybe no body.
                    0 => {
                        one.kind = PublicationKind::DeadLetter;
                        one.properties.message_id = Some("same".to_owned());
                    }
                    1 => {
                        one.kind = PublicationKind::DeadLetter;
                        one.properties.message_id = None;
                        one.body.clear();
                    }
                    // The same event twice in a batch.
                    2 => {
                        sent.push(one.clone());
                        expected.push(if there { Fate::Confirmed } else { Fate::Returned });
                    }
                    _ => {}
                }
                sent.push(one);
                expected.push(if there { Fate::Confirmed } else { Fate::Returned });
            }
            assert_eq!(soon(publisher.publish(&sent)).await, Ok(expected), "round {round}");
        }
        assert_eq!(soon(publisher.publish(&[])).await, Ok(vec![]));
    }

    /// lapin gives a confirm to the wrong publication, some few of thousands, where several tasks publish on a channel.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_nack_finds_its_own_publication() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        queue(&connection, "there", &[]).await;
        let full = [
            ("x-max-length", AMQPValue::LongInt(1)),
            ("x-overflow", text("reject-publish")),
        ];
        queue(&connection, "full", &full).await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let filling = [event("", "full", "the only one")];
        assert_eq!(soon(publisher.publish(&filling)).await, Ok(vec![Fate::Confirmed]));
        for round in 0..16 {
            let sent: Vec<_> = (0..2_000)
                .map(|index| {
                    event(
                        "",
                        if index % 2 == 0 { "there" } else { "full" },
                        &format!("{round}/{index}"),
                    )
                })
                .collect();
            let expected: Vec<_> = (0..2_000)
                .map(|index| if index % 2 == 0 { Fate::Confirmed } else { Fate::Nacked })
                .collect();
            let fates = soon(publisher.publish(&sent)).await.expect("answered");
            let wrong = fates.iter().zip(&expected).filter(|(fate, expected)| fate != expected);
            assert_eq!(wrong.count(), 0, "round {round}");
        }
    }

    #[tokio::test]
    async fn what_a_full_queue_does_not_take_is_nacked() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        let full = [
            ("x-max-length", AMQPValue::LongInt(3)),
            ("x-overflow", text("reject-publish")),
        ];
        queue(&connection, "full", &full).await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let sent: Vec<_> = (0..10)
            .map(|index| event("", if index % 2 == 0 { "full" } else { "nowhere" }, &format!("{index}")))
            .collect();
        let fates = soon(publisher.publish(&sent)).await.expect("answered");
        let count = |fate| fates.iter().filter(|other| **other == fate).count();
        assert_eq!(
            (count(Fate::Confirmed), count(Fate::Nacked), count(Fate::Returned)),
            (3, 2, 5),
            "{fates:?}"
        );
        assert!(
            fates.iter().skip(1).step_by(2).all(|fate| *fate == Fate::Returned),
            "{fates:?}"
        );
        assert_eq!(
            soon(publisher.publish(&[event("", "full", "more")])).await,
            Ok(vec![Fate::Nacked])
        );
    }

    #[tokio::test]
    async fn the_one_that_is_refused_is_found_by_publishing_one_by_one() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        queue(&connection, "q", &[("x-queue-type", text("quorum"))]).await;
        let mut user = event("", "q", "user");
        user.properties.user_id = Some("somebody-else".to_owned());
        let mut expiration = event("", "q", "expiration");
        expiration.properties.expiration = Some("soon".to_owned());
        for (culprit, code) in [(event("no-exchange", "q", "404"), 404), (user, 406), (expiration, 406)] {
            let mut sent: Vec<_> = (0..400)
                .map(|index| event("", "q", &format!("{code}/{index}")))
                .collect();
            sent.insert(1, culprit);
            let connection = vhost.connect().await;
            let mut publisher = Publisher::open(&connection).await.expect("a publisher");
            let error = soon(publisher.publish(&sent)).await.expect_err("refused");
            assert_eq!(error.code(), Some(code), "{error}");
            assert!(matches!(
                soon(publisher.publish(&sent)).await,
                Err(BrokerError::Away(_))
            ));
            let connection = vhost.connect().await;
            let mut publisher = Publisher::open(&connection).await.expect("a publisher");
            assert_eq!(soon(publisher.publish(&sent[..1])).await, Ok(vec![Fate::Confirmed]));
            let error = soon(publisher.publish(&sent[1..2])).await.expect_err("refused");
            assert_eq!(error.code(), Some(code), "{error}");
        }
    }

    #[tokio::test]
    async fn what_no_frame_can_carry_is_refused_before_it_is_sent() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        queue(&connection, "q", &[]).await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let with = |bytes| {
            let mut one = event("", "q", "one");
            one.properties.headers = Some([("h".to_owned(), HeaderValue::text("x".repeat(bytes)))].into());
            one
        };
        let room = 131_072 - with(0).properties.wire_len() - HEADER_FRAME_BYTES;
        assert_eq!(soon(publisher.publish(&[with(room)])).await, Ok(vec![Fate::Confirmed]));
        let refused = soon(publisher.publish(&[event("", "q", "innocent"), with(room + 1)])).await;
        assert_eq!(refused.map_err(|error| error.code()), Err(Some(501)));
        let long = "x".repeat(256);
        let mut id = event("", "q", "id");
        id.properties.message_id = Some(long.clone());
        let mut header = event("", "q", "header");
        header.properties.headers = Some([(long.clone(), HeaderValue::Void)].into());
        for one in [event("", &long, "key"), event(&long, "", "exchange"), id, header] {
            assert_eq!(
                soon(publisher.publish(&[one])).await.map_err(|error| error.code()),
                Err(Some(502))
            );
        }
        assert_eq!(
            soon(publisher.publish(&[event("", "q", "x")])).await,
            Ok(vec![Fate::Confirmed])
        );
        assert_eq!(ready(&connection, "q").await, 2);
    }

    #[tokio::test]
    async fn a_large_body_is_cut_into_frames() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        queue(&connection, "q", &[]).await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let sent: Vec<_> = [131_063, 131_064, 131_065, 262_144, 5_000_000]
            .into_iter()
            .map(|size| event("", if size % 2 == 0 { "q" } else { "nowhere" }, &"x".repeat(100)).with_body(size))
            .collect();
        let fates = soon(publisher.publish(&sent)).await.expect("published");
        let confirmed = |size: usize| {
            if size.is_multiple_of(2) {
                Fate::Confirmed
            } else {
                Fate::Returned
            }
        };
        assert_eq!(
            fates,
            sent.iter().map(|one| confirmed(one.body.len())).collect::<Vec<_>>()
        );
    }

    impl Publication {
        fn with_body(mut self, size: usize) -> Self {
            self.body = vec![7; size];
            self
        }
    }

    #[tokio::test]
    async fn a_dead_or_frozen_broker_is_away_within_the_deadline() {
        let vhost = Vhost::new();
        let (proxy, mut settings) = vhost.proxied();
        settings.publish_deadline = Duration::from_secs(1);
        queue(&vhost.connect().await, "q", &[]).await;
        for frozen in [false, true] {
            let connection = Connection::open(&settings, "test").await.expect("connected");
            let mut publisher = Publisher::open(&connection).await.expect("a publisher");
            assert_eq!(
                soon(publisher.publish(&[event("", "q", "1")])).await,
                Ok(vec![Fate::Confirmed])
            );
            if frozen {
                proxy.freeze()
            } else {
                proxy.cut()
            }
            let began = Instant::now();
            let error = publisher
                .publish(&[event("", "q", "2"), event("", "q", "3")])
                .await
                .expect_err("away");
            assert!(matches!(error, BrokerError::Away(_)), "{error}");
            assert!(began.elapsed() < Duration::from_secs(2));
            assert!(matches!(
                publisher.publish(&[event("", "q", "4")]).await,
                Err(BrokerError::Away(_))
            ));
            assert!(!publisher.reply(&event("", "q", "5")).await || frozen);
            assert!(began.elapsed() < Duration::from_secs(3));
        }
    }

    #[tokio::test]
    async fn replies_harm_nobody() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        queue(&connection, "answers", &[]).await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let reply = |exchange: &str, key: &str| {
            let mut reply = event(exchange, key, "reply");
            reply.kind = PublicationKind::Reply;
            reply
        };
        for name in [
            "amq.rabbitmq.reply-to.nonsense",
            "amq.rabbitmq.reply-to",
            "settlement.reply.nobody",
        ] {
            assert!(soon(publisher.reply(&reply("", name))).await);
            assert_eq!(
                soon(publisher.publish(&[event("", "answers", name)])).await,
                Ok(vec![Fate::Confirmed])
            );
        }
        assert!(soon(publisher.reply(&reply("", "answers"))).await);
        let count = async || (ready(&connection, "answers").await == 4).then_some(());
        eventually("the reply", count).await;
    }

    /// One at a time on a channel that the broker closes, they would end the connection sooner or later.
    #[tokio::test]
    async fn refused_replies_stop_and_leave_the_connection_alone() {
        let vhost = Vhost::new();
        queue(&vhost.connect().await, "q", &[]).await;
        let mut refused = event("", "q", "reply");
        refused.kind = PublicationKind::Reply;
        // As long as nobody may publish to the default exchange, `amq.default` to permissions.
        vhost.put(
            &format!("exchanges/{}/events", vhost.name),
            &serde_json::json!({"type": "fanout", "durable": true}),
        );
        let settings = vhost.as_user("", "^events$", "");
        for _ in 0..20 {
            let connection = Connection::open(&settings, "test").await.expect("connected");
            let mut publisher = Publisher::open(&connection).await.expect("a publisher");
            for _ in 0..50 {
                assert!(!soon(publisher.reply(&refused)).await);
            }
            let sent = [event("events", "q", "event")];
            assert_eq!(soon(publisher.publish(&sent)).await, Ok(vec![Fate::Returned]));
            assert!(connection.is_connected());
        }
        vhost.forget_user(&settings);
    }
}

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

/// A reply is worth this much waiting and no more.
const REPLY_TIMEOUT: Duration = Duration::from_millis(250);

/// Reply channels that the broker may close on one connection before replies stop on it. lapin never uses the number of
/// such a channel again, and there are 2,047: without this bound replies could use up those of the confirm channel.
const REPLY_CHANNELS_MAX: u16 = 100;

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
    /// After an error nothing is known about the channel's confirms.
    spent: bool,
    replies: Option<lapin::Channel>,
    reply_channels: u16,
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
            spent: false,
            replies: None,
            reply_channels: 0,
        })
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
            .map(|publication| Message::try_from(publication, frame_max))
            .collect::<Result<Vec<_>, _>>()?;
        // Set before the first await: a dropped future leaves confirms behind that the next call would take for its own.
        self.spent = true;
        let sending = async {
            let started = all_together(messages.into_iter().map(|message| message.publish(&self.channel))).await;
            // Every one is awaited, also after an error: the broker's reason may stand in any.
            let mut confirms = Vec::with_capacity(started.len());
            let mut errors = Vec::new();
            for confirm in started {
                match confirm {
                    Ok(confirm) => match confirm.await {
                        Ok(confirmation) => confirms.push(confirmation),
                        Err(error) => errors.push(error),
                    },
                    Err(error) => errors.push(error),
                }
            }
            (confirms, errors)
        };
        let Ok((confirms, errors)) = tokio::time::timeout(self.deadline, sending).await else {
            return Err(BrokerError::Away(format!(
                "publishing took longer than {:?}",
                self.deadline
            )));
        };
        if let Some(error) = worst(&errors) {
            return Err(error);
        }
        let fates = fates(publications, confirms)?;
        self.spent = false;
        Ok(fates)
    }

    /// Sends a reply if that is possible at once. Whether it arrives is not known.
    pub async fn reply(&mut self, publication: &Publication) -> bool {
        // Nothing leaves a blocked connection; frames would only pile up.
        if self.connection.status().blocked() {
            return false;
        }
        let frame_max = usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX);
        let Ok(message) = Message::try_from(publication, frame_max) else {
            return false;
        };
        let sending = async {
            let channel = self.reply_channel().await?;
            message.publish(&channel).await
        };
        matches!(tokio::time::timeout(REPLY_TIMEOUT, sending).await, Ok(Ok(_)))
    }

    async fn reply_channel(&mut self) -> lapin::Result<lapin::Channel> {
        match &self.replies {
            Some(channel) if channel.status().connected() => Ok(channel.clone()),
            Some(_) | None if self.reply_channels >= REPLY_CHANNELS_MAX => {
                Err(lapin::ErrorKind::ChannelsLimitReached.into())
            }
            Some(_) | None => {
                self.reply_channels = self.reply_channels.saturating_add(1);
                let channel = self.connection.create_channel().await?;
                self.replies = Some(channel.clone());
                Ok(channel)
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
    fn try_from(publication: &'a Publication, frame_max: usize) -> Result<Self, BrokerError> {
        let size = publication.properties.wire_len().saturating_add(HEADER_FRAME_BYTES);
        if size > frame_max {
            return Err(BrokerError::Refused {
                code: 501,
                text: format!("properties and headers need a frame of {size} bytes, the broker takes {frame_max}"),
            });
        }
        Ok(Message {
            exchange: short(&publication.exchange)?,
            routing_key: short(&publication.routing_key)?,
            mandatory: match publication.kind {
                PublicationKind::Event | PublicationKind::DeadLetter => true,
                PublicationKind::Reply => false,
            },
            properties: properties_to(&publication.properties)?,
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

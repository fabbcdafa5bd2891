//! Publishing with confirms, a batch at a time, and replies without any.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::BasicProperties;
use lapin::types::ShortString;
use lapin::{Confirmation, PublisherConfirm};

use super::properties::{properties_to, short};
use super::{ANSWER_TIMEOUT, BrokerError, Connection, all_together, answer};
use crate::domain::delivery::{Properties, Publication, PublicationKind};
use crate::domain::names::DEAD;
use crate::fail::{self, Point};

/// A reply is worth this much waiting and no more.
const REPLY_TIMEOUT: Duration = Duration::from_millis(250);

/// Of a header frame, all that is not properties: frame header and end (8), class, weight, body size and flags (14).
const HEADER_FRAME_BYTES: usize = 22;

/// What became of one publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokerAnswer {
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

    /// The channel it publishes on: direct replies come to it, and to no other.
    pub(super) fn channel(&self) -> &lapin::Channel {
        &self.channel
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
    pub async fn publish(&mut self, publications: &[Publication]) -> Result<Vec<BrokerAnswer>, BrokerError> {
        self.send(publications, true).await
    }

    /// The same of what no batch and no dead letter asks for: where a test breaks publishing, it means those.
    pub(super) async fn publish_aside(
        &mut self,
        publication: &Publication,
    ) -> Result<Option<BrokerAnswer>, BrokerError> {
        let answers = self.send(std::slice::from_ref(publication), false).await?;
        Ok(answers.into_iter().next())
    }

    async fn send(&mut self, publications: &[Publication], may_break: bool) -> Result<Vec<BrokerAnswer>, BrokerError> {
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
        if may_break {
            fail::fallible(Point::BeforePublish).await?;
        }
        let sending = async {
            let started = all_together(messages.into_iter().map(|message| message.publish(&self.channel))).await;
            if may_break {
                fail::fallible(Point::PublishSent).await?;
            }
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
        let login = login.filter(|_| publication.exchange == DEAD);
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
fn fates(publications: &[Publication], confirms: Vec<Confirmation>) -> Result<Vec<BrokerAnswer>, BrokerError> {
    let mut returned: Vec<BasicReturnMessage> = Vec::new();
    let mut fates: Vec<BrokerAnswer> = confirms
        .into_iter()
        .map(|confirmation| match confirmation {
            Confirmation::Ack(message) => {
                returned.extend(message);
                BrokerAnswer::Confirmed
            }
            Confirmation::Nack(message) => {
                returned.extend(message);
                BrokerAnswer::Nacked
            }
            // Confirms were off: nothing is known.
            Confirmation::NotRequested => BrokerAnswer::Nacked,
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
        *fate = BrokerAnswer::Returned;
    }
    Ok(fates)
}

#[cfg(test)]
mod tests;

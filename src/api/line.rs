//! The API's line to the broker: one connection on which updates are published with confirms, direct replies are heard, and
//! the events of refusals. When it breaks it is made anew; meanwhile whoever wants to publish is told at once.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use uuid::Uuid;

use super::outcome::UpdatesWaiting;
use crate::{
    broker::{
        BrokerError, BrokerSettings, Connection,
        intake::Intake,
        publisher::{BrokerAnswer, Publisher},
        replies::Replies,
        subscribe::{self, Lifetime},
    },
    config::RetrySettings,
    domain::{delivery::Publication, event, event_id::REJECTED, names::EVENTS},
    health::Health,
    retry::{Backoff, Waited, stopped},
    telemetry::{Dependency, Signal},
};

/// Publications that are confirmed together at most.
const TOGETHER: usize = 64;
/// Events of refusals that the broker may hand over ahead of their acknowledgement, and their bytes.
const PREFETCH: u16 = 500;
const BATCH_BYTES: usize = 4 << 20;
/// Who pauses, as readiness tells it.
const WHO: &str = "broker";

/// Why a message is not known to be with the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotPosted {
    /// There is no line now: the broker has not got it.
    Away,
    /// The broker takes no more now.
    Full,
    /// There is no queue that would take it.
    NoQueue,
    /// The line broke before the confirm: the broker may have it.
    Unknown,
}

struct Letter {
    publication: Publication,
    done: Done,
}

type Done = oneshot::Sender<Result<(), NotPosted>>;

/// Whoever has gone meanwhile misses nothing.
fn tell(done: Done, came: Result<(), NotPosted>) {
    done.send(came).unwrap_or_default();
}

/// How the line stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It is being made for the first time: whoever wants to publish waits for the end of that.
    Starting,
    Up,
    Away,
}

/// Where updates are posted. Cheap to clone.
#[derive(Clone)]
pub(super) struct Line {
    letters: mpsc::Sender<Letter>,
    standing: watch::Receiver<Standing>,
    deadline: Duration,
}

impl Line {
    /// Opens it, and keeps it open until the program stops.
    pub(super) fn open(
        (broker, refusals_max): (BrokerSettings, u32),
        retry: &RetrySettings,
        waiting: UpdatesWaiting,
        health: Arc<Health>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        // One that finds no room waits, and its request with it.
        let (letters, receiver) = mpsc::channel(TOGETHER);
        let (told, standing) = watch::channel(Standing::Starting);
        health.set_paused_by(WHO, Some("the broker has not answered yet".to_owned()));
        let line = Self {
            letters,
            standing,
            deadline: broker.publish_deadline,
        };
        let keeper = Keeper {
            broker,
            refusals_max,
            waiting,
            health,
            standing: told,
        };
        tokio::spawn(keeper.keep(receiver, Backoff::new(retry), stop));
        line
    }

    /// Publishes one and waits for the broker's confirm, within one deadline for all of it.
    pub(super) async fn post(&self, publication: Publication) -> Result<(), NotPosted> {
        let until = Instant::now() + self.deadline;
        let mut standing = self.standing.clone();
        let known = standing.wait_for(|standing| *standing != Standing::Starting);
        match tokio::time::timeout_at(until, known).await {
            Ok(Ok(standing)) if *standing == Standing::Up => {}
            // It is away, the program stops, or the broker has not answered the first try until now.
            _ => return Err(NotPosted::Away),
        }
        let (done, confirmed) = oneshot::channel();
        let posting = async {
            let sent = self.letters.send(Letter { publication, done }).await;
            sent.map_err(|_| NotPosted::Away)?;
            // Nobody answers where the line broke meanwhile.
            confirmed.await.unwrap_or(Err(NotPosted::Unknown))
        };
        tokio::time::timeout_at(until, posting)
            .await
            .unwrap_or(Err(NotPosted::Unknown))
    }
}

struct Keeper {
    broker: BrokerSettings,
    /// Events of refusals that may wait to be heard.
    refusals_max: u32,
    waiting: UpdatesWaiting,
    health: Arc<Health>,
    standing: watch::Sender<Standing>,
}

impl Keeper {
    async fn keep(self, mut letters: mpsc::Receiver<Letter>, mut backoff: Backoff, mut stop: watch::Receiver<bool>) {
        loop {
            let error = tokio::select! {
                biased;
                () = stopped(&mut stop) => return,
                error = self.hold(&mut letters, &mut backoff) => error,
            };
            self.standing.send_replace(Standing::Away);
            self.health.set_paused_by(WHO, Some(error.trouble().to_owned()));
            // What came for a line that is gone: whoever waits is told, and nothing of it is published later.
            while let Ok(letter) = letters.try_recv() {
                tell(letter.done, Err(NotPosted::Away));
            }
            let wait = backoff.next();
            Signal::Retrying {
                dependency: Dependency::Broker,
                attempt: backoff.attempts(),
                wait,
                error: &error.to_string(),
            }
            .emit();
            if crate::retry::sleep(wait, &mut stop).await == Waited::Stopping {
                return;
            }
        }
    }

    /// Makes a line and holds it; comes back with why it broke.
    async fn hold(&self, letters: &mut mpsc::Receiver<Letter>, backoff: &mut Backoff) -> BrokerError {
        let made = async {
            let connection = Connection::open(&self.broker, "settled api").await?;
            let publisher = Publisher::open(&connection).await?;
            let replies = Replies::to(&publisher).await?;
            // With the connection it comes, and goes.
            let queue = format!("settlement.api.{}", Uuid::new_v4().simple());
            let key = format!("{REJECTED}.#");
            let bindings = [(EVENTS, key.as_str())];
            let lifetime = Lifetime::Connection {
                most: self.refusals_max,
            };
            subscribe::declare(&connection, &queue, lifetime, &bindings).await?;
            let refusals = Intake::attach(&connection, &queue, PREFETCH, PREFETCH.into(), BATCH_BYTES).await?;
            Ok::<_, BrokerError>((connection, publisher, replies, refusals))
        };
        let (connection, mut publisher, mut replies, mut refusals) = match made.await {
            Ok(made) => made,
            Err(error) => return error,
        };
        self.standing.send_replace(Standing::Up);
        self.health.set_paused_by(WHO, None);
        backoff.reset();
        tokio::select! {
            error = post(&mut publisher, letters) => error,
            error = self.hear_replies(&mut replies) => error,
            error = self.hear_refusals(&mut refusals) => error,
            () = connection.closed() => BrokerError::Away("the connection closed".to_owned()),
        }
    }

    async fn hear_replies(&self, replies: &mut Replies) -> BrokerError {
        loop {
            let reply = match replies.next().await {
                Ok(reply) => reply,
                Err(error) => return error,
            };
            let content_type = reply.properties.content_type.as_deref();
            let (Some(request), Ok(events)) =
                (&reply.properties.correlation_id, event::read(content_type, &reply.body))
            else {
                continue;
            };
            for event in events {
                self.waiting.replied(request, event);
            }
        }
    }

    async fn hear_refusals(&self, refusals: &mut Intake) -> BrokerError {
        let disposer = refusals.disposer();
        loop {
            let batch = match refusals.next().await {
                Ok(batch) => batch,
                Err(end) => return BrokerError::Away(end.to_string()),
            };
            for delivery in &batch.deliveries {
                let content_type = delivery.properties.content_type.as_deref();
                if let Ok(events) = event::read(content_type, &delivery.body) {
                    events.into_iter().for_each(|event| self.waiting.told(event));
                }
            }
            let tags = batch
                .deliveries
                .iter()
                .filter_map(|delivery| delivery.source.delivery_tag());
            if let Err(error) = disposer.acknowledge(tags.max()).await {
                return error;
            }
        }
    }
}

/// Publishes what is posted, what is there at once together.
async fn post(publisher: &mut Publisher, letters: &mut mpsc::Receiver<Letter>) -> BrokerError {
    let mut some = Vec::with_capacity(TOGETHER);
    loop {
        if letters.recv_many(&mut some, TOGETHER).await == 0 {
            return BrokerError::Away("nobody posts any more".to_owned());
        }
        // Whoever does not wait any more was told that it is not known: it may send again, and this is not sent late.
        some.retain(|letter: &Letter| !letter.done.is_closed());
        let (publications, waiting): (Vec<Publication>, Vec<_>) =
            some.drain(..).map(|letter| (letter.publication, letter.done)).unzip();
        match publisher.publish(&publications).await {
            Ok(fates) => {
                for (fate, done) in fates.into_iter().zip(waiting) {
                    let came = match fate {
                        BrokerAnswer::Confirmed => Ok(()),
                        BrokerAnswer::Nacked => Err(NotPosted::Full),
                        BrokerAnswer::Returned => Err(NotPosted::NoQueue),
                    };
                    tell(done, came);
                }
            }
            Err(error) => {
                for done in waiting {
                    tell(done, Err(NotPosted::Unknown));
                }
                return error;
            }
        }
    }
}

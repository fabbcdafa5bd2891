//! Latency in an open loop: when each message leaves is fixed before the run, and the time of one that left late because
//! something was in the way counts from when it should have left. A closed loop would wait with the system it measures, and
//! hide the worst moments (coordinated omission).

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use lapin::{BasicProperties, Channel, Confirmation, options::BasicPublishOptions, options::ConfirmSelectOptions};
use serde::Deserialize;
use settled::domain::delivery::Publication;

use crate::{
    Fallible,
    contestant::Contestant,
    place::{EVENTS_QUEUE, Line, PATIENCE, Place, Services},
    processes::Accounts,
    traffic::{Traffic, World},
};

/// The first messages find cold caches and statements that are not prepared: they are sent, and not counted.
const WARM_UP: Duration = Duration::from_secs(2);

/// Milliseconds from the intended publication to the receipt of the event.
#[derive(Clone, Debug)]
pub(crate) struct Latency {
    /// Sorted.
    milliseconds: Vec<f64>,
    /// CPU in microseconds a message: of the contestant, and of the harness that publishes and subscribes.
    pub(crate) worker: f64,
    pub(crate) harness: f64,
}

impl Latency {
    /// The value that so many in a thousand do not exceed: exact, since every one is kept.
    pub(crate) fn per_mille(&self, per_mille: usize) -> f64 {
        let last = self.milliseconds.len().saturating_sub(1);
        let place = (self.milliseconds.len() * per_mille).div_ceil(1_000).saturating_sub(1);
        self.milliseconds.get(place.min(last)).copied().unwrap_or(f64::NAN)
    }
}

/// What is sent, how fast and for how long.
pub(crate) struct Schedule {
    rate: f64,
    lasting: Duration,
}

impl Schedule {
    /// As long as wanted, or as there are messages for.
    pub(crate) fn within(rate: f64, lasting: Duration, messages: usize) -> Self {
        let most = Duration::from_secs_f64(messages as f64 / rate).saturating_sub(WARM_UP);
        Self {
            rate,
            lasting: lasting.min(most),
        }
    }

    /// Messages, the warm-up's included.
    pub(crate) fn messages(&self) -> usize {
        ((WARM_UP + self.lasting).as_secs_f64() * self.rate).floor() as usize
    }

    fn due(&self, number: usize) -> Duration {
        Duration::from_secs_f64(number as f64 / self.rate)
    }
}

pub(crate) async fn measure(
    services: &Services,
    logs: &Path,
    contestant: &Contestant,
    world: &World,
    traffic: &Traffic,
    schedule: &Schedule,
) -> Fallible<Latency> {
    let place = services.place("latency", world, contestant.program()).await?;
    let mut accounts = Accounts::open(services).await?;
    accounts.rest().await?;
    let mut running = contestant.start(&place, logs)?;
    running.consumes(&place).await?;
    accounts.workers.push(running.id);
    let messages = schedule.messages();
    let wanted = traffic
        .messages
        .get(..messages)
        .ok_or("fewer messages were signed than are to be sent")?;
    let subscriber = Line::open(&place.broker_url).await?;
    let mut consumer = subscriber.consume(EVENTS_QUEUE).await?;
    let before = accounts.read()?;
    // A moment for everything to stand before the first message is due.
    let begin = Instant::now() + Duration::from_millis(50);
    let sending = send(&place, wanted, begin, schedule).await?;
    let mut received: Vec<Option<Instant>> = vec![None; messages];
    for _ in 0..messages {
        let next = tokio::time::timeout(PATIENCE, consumer.next()).await;
        let at = Instant::now();
        let Ok(Some(event)) = next else {
            running.still_runs()?;
            return Err(format!("{contestant}: not every message made an event").into());
        };
        let number = number_of(&event?.data)?;
        let place = received.get_mut(number).ok_or("an event of no message")?;
        if place.replace(at).is_some() {
            return Err(format!("{contestant}: message {number} made two events").into());
        }
    }
    let cpu = accounts.read()?.since(before);
    tokio::time::timeout(PATIENCE, sending).await???;
    running.stop().await?;
    subscriber.close().await;
    services.leave(place).await?;
    let mut milliseconds: Vec<f64> = received
        .into_iter()
        .enumerate()
        .filter(|(number, _)| schedule.due(*number) >= WARM_UP)
        .filter_map(|(number, at)| {
            // Never before it was sent, which is never before it was due.
            let due = begin + schedule.due(number);
            Some(at?.duration_since(due).as_secs_f64() * 1_000.0)
        })
        .collect();
    milliseconds.sort_by(f64::total_cmp);
    Ok(Latency {
        milliseconds,
        worker: cpu.worker as f64 / messages as f64,
        harness: cpu.harness as f64 / messages as f64,
    })
}

/// The messages are numbered in their nonces, which events of settlements and of refusals both tell.
fn number_of(event: &[u8]) -> Fallible<usize> {
    #[derive(Deserialize)]
    struct Event<'a> {
        #[serde(borrow)]
        data: Data<'a>,
    }
    #[derive(Deserialize)]
    struct Data<'a> {
        nonce: &'a str,
    }
    let event: Event<'_> = serde_json::from_slice(event)?;
    let number = event
        .data
        .nonce
        .strip_prefix("n-")
        .and_then(|rest| rest.split_once('-'));
    Ok(number.ok_or("an event of no message of ours")?.0.parse()?)
}

/// Publishes each message at its time, from a thread of its own: the runtime's timers are only good to a millisecond.
async fn send(
    place: &Place,
    messages: &[Publication],
    begin: Instant,
    schedule: &Schedule,
) -> Fallible<tokio::task::JoinHandle<Fallible<()>>> {
    let line = Line::open(&place.broker_url).await?;
    let channel = line.channel().await?;
    channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
    let due: Vec<Instant> = (0..messages.len()).map(|number| begin + schedule.due(number)).collect();
    let messages: Arc<[Publication]> = messages.into();
    let runtime = tokio::runtime::Handle::current();
    let (confirms, mut confirmed) = tokio::sync::mpsc::unbounded_channel();
    let pacing = tokio::task::spawn_blocking(move || -> Fallible<Channel> {
        for (message, due) in messages.iter().zip(due) {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            confirms.send(runtime.block_on(publish(&channel, message))?)?;
        }
        // Dropped, it would close, and the confirms that are still to come with it.
        Ok(channel)
    });
    Ok(tokio::spawn(async move {
        while let Some(confirm) = confirmed.recv().await {
            match confirm.await? {
                Confirmation::Ack(None) => {}
                other => return Err(format!("a message was not confirmed: {other:?}").into()),
            }
        }
        drop(pacing.await??);
        line.close().await;
        Ok(())
    }))
}

async fn publish(channel: &Channel, message: &Publication) -> lapin::Result<lapin::PublisherConfirm> {
    let options = BasicPublishOptions {
        mandatory: true,
        immediate: false,
    };
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(2);
    channel
        .basic_publish(
            message.exchange.as_str().into(),
            message.routing_key.as_str().into(),
            options,
            &message.body,
            properties,
        )
        .await
}

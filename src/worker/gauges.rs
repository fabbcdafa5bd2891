//! Measures what nobody's work shows: backlog, parked messages, queues, readiness.

use std::time::{Duration, Instant};

use super::{Worker, collector::SpaceWatch};
use crate::{
    broker::{BrokerError, Connection, topology},
    retry::{self, Waited},
    store::{Fate, StoreError},
    telemetry::Signal,
};

/// How often the gauges are measured.
const GAUGE_INTERVAL: Duration = Duration::from_secs(5);

/// How often the dead letters are counted, which takes as long as there are many.
const DESK_INTERVAL: Duration = Duration::from_secs(30);

/// Who pauses, as /readyz tells it, where what is committed is not told.
const OUTBOX: &str = "outbox";

impl Worker {
    /// Measures what nobody's work shows: backlog, parked messages, queues.
    pub(super) async fn measure(mut self) {
        let mut connection: Option<Connection> = None;
        let mut desk_measured: Option<Instant> = None;
        let mut space = SpaceWatch::default();
        let mut unreadable = 0;
        loop {
            let store = &self.clerk.store;
            if desk_measured.is_none_or(|time| time.elapsed() >= DESK_INTERVAL) {
                // One that takes longer than statements may is not asked for again at once.
                desk_measured = Some(Instant::now());
                // What it could not do now, it does the next time.
                let events = &self.settings.events;
                drop(store.forget_told(events.remember, events.remember_max).await);
                if let Ok(desk) = store.measure_desk().await {
                    Signal::DeskMeasured {
                        open: &desk.open,
                        oldest: desk.oldest,
                        runs: &desk.runs,
                    }
                    .emit();
                }
            }
            space.measure(store, &self.settings.dead_letters).await;
            let measured = async { Ok::<_, StoreError>((store.backlog().await?, store.count_parked().await?)) };
            match measured.await {
                Ok((backlog, parked)) => {
                    self.health.set_database_ok(true);
                    let oldest = (backlog.rows > 0).then_some(backlog.oldest);
                    let stuck = oldest.filter(|oldest| *oldest >= self.settings.outbox.stuck_after);
                    let why = stuck.map(|oldest| {
                        format!(
                            "the oldest row of the outbox waits for {} s to be published",
                            oldest.as_secs()
                        )
                    });
                    self.health.set_paused_by(OUTBOX, why);
                    Signal::OutboxMeasured {
                        pending: backlog.publications,
                        oldest,
                    }
                    .emit();
                    Signal::ParkedMeasured { parked }.emit();
                }
                Err(error) => {
                    self.health.set_database_trouble(error.trouble().sentence());
                    // Idle lanes would learn of it only from messages that another worker hands back.
                    if error.fate == Fate::Away {
                        self.gate.close();
                    }
                }
            }
            // Those too that nobody consumes.
            let own_queues = self.clerk.store.own_queues().await.unwrap_or_default();
            let mut is_missing = false;
            let depths = async {
                let link = match connection.take().filter(Connection::is_connected) {
                    Some(link) => link,
                    None => {
                        let name = format!("{} gauges", self.settings.worker.name);
                        Connection::open_without_consumer(&self.broker, &name).await?
                    }
                };
                let link = connection.insert(link);
                let common = topology::depths(link).await?;
                let mut depths = vec![
                    (topology::UPDATES.to_owned(), common.updates),
                    (topology::DEAD.to_owned(), common.dead),
                    (topology::UNREADABLE.to_owned(), common.unreadable),
                ];
                for queue in own_queues
                    .iter()
                    .map(|enterprise_id| topology::own_queue(enterprise_id))
                    .chain([topology::BROKER_MADE.to_owned()])
                {
                    match topology::depth_of(link, &queue).await {
                        Ok(depth) => depths.push((queue, depth)),
                        // One that is missing hides no other.
                        Err(BrokerError::Refused { .. }) => is_missing = true,
                        Err(error @ (BrokerError::Away(_) | BrokerError::Config(_))) => return Err(error),
                    }
                }
                Ok::<_, BrokerError>(depths)
            };
            let depths = depths.await;
            if depths.is_err() || is_missing {
                // A refused question costs the connection a channel number for good.
                connection = None;
            }
            if let Ok(depths) = depths {
                for (queue, messages) in &depths {
                    Signal::QueueMeasured {
                        queue,
                        messages: u64::from(*messages),
                    }
                    .emit();
                }
                let ready = |queue: &str| {
                    let depth = depths.iter().find(|(name, _)| name == queue);
                    depth.map_or(0, |(_, messages)| *messages)
                };
                if ready(topology::DEAD) == 0 {
                    Signal::CollectorIdle.emit();
                }
                let now = ready(topology::UNREADABLE);
                if now > unreadable {
                    let messages = u64::from(now);
                    Signal::UnreadableGrew { messages }.emit();
                }
                unreadable = now;
            }
            if retry::sleep(GAUGE_INTERVAL, &mut self.stop).await == Waited::Stopping {
                break;
            }
        }
        if let Some(connection) = connection {
            drop(connection.close().await);
        }
    }

    /// Says when readiness changes.
    pub(super) async fn tell_readiness(mut self) {
        let mut ready = false;
        loop {
            if self.health.is_ready() != ready {
                ready = !ready;
                if ready {
                    Signal::Ready.emit();
                } else {
                    Signal::NotReady {
                        reasons: &self.health.reasons(),
                    }
                    .emit();
                }
            }
            if retry::sleep(Duration::from_millis(100), &mut self.stop).await == Waited::Stopping {
                return;
            }
        }
    }
}

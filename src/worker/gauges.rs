//! Measures what nobody's work shows: backlog, parked messages, queues, readiness.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{Worker, collector::SpaceWatch};
use crate::{
    broker::{
        BrokerError, Connection,
        topology::{self, Seen},
    },
    retry::{self, Waited},
    store::{Fate, StoreError},
    telemetry::Signal,
};

/// How often the gauges are measured.
const GAUGE_INTERVAL: Duration = Duration::from_secs(5);

/// How often the dead letters are counted, which takes as long as there are many.
const DESK_INTERVAL: Duration = Duration::from_secs(30);

/// How long a queue that is not ours to see is left alone.
const UNSEEN_INTERVAL: Duration = Duration::from_secs(60);

/// The queues that this user may not look at. A depth is a gauge's business and nobody else's: it is said once.
#[derive(Default)]
struct Unseen(BTreeMap<String, Instant>);

impl Unseen {
    fn may_ask(&self, queue: &str) -> bool {
        self.0.get(queue).is_none_or(|asked| asked.elapsed() >= UNSEEN_INTERVAL)
    }

    fn told(&mut self, queue: &str, why: &str) {
        if self.0.insert(queue.to_owned(), Instant::now()).is_none() {
            let shown = topology::shown(queue);
            let why = why.replace(queue, shown);
            Signal::QueueUnseen {
                queue: shown,
                why: &why,
            }
            .emit();
        }
    }
}

/// Who pauses, as /readyz tells it, where what is committed is not told.
const OUTBOX: &str = "outbox";

impl Worker {
    /// Measures what nobody's work shows: backlog, parked messages, queues.
    pub(super) async fn measure(mut self) {
        let mut connection: Option<Connection> = None;
        let mut desk_measured: Option<Instant> = None;
        let mut space = SpaceWatch::default();
        let mut unreadable = 0;
        let mut unseen = Unseen::default();
        let mut hidden: Option<String> = None;
        loop {
            let store = &self.clerk.store;
            if desk_measured.is_none_or(|time| time.elapsed() >= DESK_INTERVAL) {
                // One that takes longer than statements may is not asked for again at once.
                desk_measured = Some(Instant::now());
                // What it could not do now, it does the next time.
                let events = &self.settings.events;
                drop(store.forget_told(events.remember, events.remember_max).await);
                if let Ok(desk) = store.measure_letters().await {
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
            if hidden.is_none() {
                let books = self.clerk.store.books_epoch().await;
                hidden = books.ok().map(|books| topology::hidden(books.books));
            }
            // Those too that nobody consumes.
            let own_queues = self.clerk.store.own_queues().await.unwrap_or_default();
            let own_queues = own_queues
                .iter()
                .map(|enterprise_id| topology::own_queue(enterprise_id));
            let queues: Vec<String> = [
                topology::UPDATES,
                topology::DEAD,
                topology::UNREADABLE,
                topology::BROKER_MADE,
            ]
            .map(str::to_owned)
            .into_iter()
            .chain(own_queues)
            .chain(hidden.clone())
            .collect();
            let asked: Vec<&str> = queues
                .iter()
                .map(String::as_str)
                .filter(|queue| unseen.may_ask(queue))
                .collect();
            let depths = async {
                let link = match connection.take().filter(Connection::is_connected) {
                    Some(link) => link,
                    None => {
                        let name = format!("{} gauges", self.settings.worker.name);
                        Connection::open_without_consumer(&self.broker, &name).await?
                    }
                };
                let seen = topology::look_at_each(&link, &asked).await?;
                // A refused question costs the connection a channel number for good.
                let is_whole = seen.iter().all(|seen| matches!(seen, Seen::Ready(_)));
                connection = is_whole.then_some(link);
                let mut depths = Vec::new();
                for (queue, seen) in asked.iter().zip(seen) {
                    match seen {
                        Seen::Ready(messages) => depths.push(((*queue).to_owned(), messages)),
                        Seen::Missing => {}
                        Seen::Forbidden(why) => unseen.told(queue, &why),
                    }
                }
                Ok::<_, BrokerError>(depths)
            };
            let depths = depths.await;
            if let Ok(depths) = depths {
                for (queue, messages) in &depths {
                    let queue = topology::shown(queue);
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
}

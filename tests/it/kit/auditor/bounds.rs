//! What a worker may take at most (I10), and what it takes.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;

use crate::kit::support::{Beside, Ground, Services, Worker, connect};

/// A worker of a debug build with nothing in its hands and no connection, in KiB: program, stacks, what the allocator keeps.
const EMPTY_KIB: u64 = 48 * 1024;

/// What a connection takes, in KiB: its buffers, its thread, the statements it knows.
const CONNECTION_KIB: u64 = 4 * 1024;

/// A message at its largest, in KiB: body, properties and headers.
const MESSAGE_KIB: u64 = 272;

/// What a worker takes, or may take at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amounts {
    /// Resident memory at its peak, in KiB.
    pub(crate) memory: u64,
    /// Messages delivered and not acknowledged, as the broker counts them from time to time.
    pub(crate) unacked: u64,
    /// Messages that its consumers let the broker send ahead of their acknowledgement.
    pub(crate) ahead: u64,
    pub(crate) database_connections: u64,
    pub(crate) broker_connections: u64,
    pub(crate) outbox_rows: u64,
}

impl Amounts {
    fn each(&self) -> [(&'static str, u64); 6] {
        [
            ("KiB of memory", self.memory),
            ("messages unacknowledged", self.unacked),
            ("messages sent ahead", self.ahead),
            ("connections to the database", self.database_connections),
            ("connections to the broker", self.broker_connections),
            ("rows in the outbox", self.outbox_rows),
        ]
    }

    fn of(amounts: [u64; 6]) -> Self {
        let [
            memory,
            unacked,
            ahead,
            database_connections,
            broker_connections,
            outbox_rows,
        ] = amounts;
        Self {
            memory,
            unacked,
            ahead,
            database_connections,
            broker_connections,
            outbox_rows,
        }
    }

    /// The bounds of a worker with these settings, in the manner of the environment.
    pub(crate) fn bounds(settings: &[(&str, &str)]) -> Self {
        let defaults: toml::Table = include_str!("../../../../config/default.toml").parse().expect("TOML");
        let setting = |room: &str, name: &str| -> u64 {
            let variable = format!("SETTLED_{}__{}", room.to_uppercase(), name.to_uppercase());
            let given = settings.iter().rev().find(|(name, _)| *name == variable);
            let default = defaults[room][name]
                .as_integer()
                .and_then(|value| u64::try_from(value).ok());
            given
                .map_or(default, |(_, value)| value.parse().ok())
                .unwrap_or_else(|| panic!("{room}.{name} is a number"))
        };
        let collects = settings
            .iter()
            .rev()
            .find(|(name, _)| *name == "SETTLED_DEAD_LETTERS__COLLECT");
        let collects = collects.is_none_or(|(_, value)| *value == "true");
        let collector = if collects { 2 } else { 0 };
        // The collector lets two of its batches come: one is stored while the other arrives.
        let collected = if collects {
            2 * setting("dead_letters", "batch_max")
        } else {
            0
        };
        let (lanes, prefetch) = (setting("worker", "lanes"), setting("worker", "prefetch"));
        let database_connections = match setting("database", "pool_size") {
            0 => lanes + 4,
            pool_size => pool_size,
        };
        // A lane consumes on one, publishes on another and answers on a third; so do due messages and the relay, which consume
        // nothing. The collector consumes and publishes, the gauges ask, and what may be published is asked before a session
        // begins.
        let broker_connections = 3 * lanes + 6 + collector;
        let connections = database_connections + broker_connections;
        Self {
            memory: EMPTY_KIB + connections * CONNECTION_KIB + (lanes * prefetch + collected) * MESSAGE_KIB,
            unacked: lanes * prefetch,
            ahead: lanes * prefetch,
            database_connections,
            broker_connections,
            // Two of a lane, two of the messages that were parked and came due, two of the collector.
            outbox_rows: 2 * lanes + 2 + collector,
        }
    }

    /// The same with so many lanes more, one for each partner's own queue. They share the pool of the others.
    pub(crate) fn with_lanes(self, more: u64, prefetch: u64) -> Self {
        Self {
            memory: self.memory + more * (prefetch * MESSAGE_KIB + 2 * CONNECTION_KIB),
            unacked: self.unacked + more * prefetch,
            ahead: self.ahead + more * prefetch,
            broker_connections: self.broker_connections + 3 * more,
            outbox_rows: self.outbox_rows + 2 * more,
            ..self
        }
    }

    /// What of this is above its bound.
    pub(crate) fn above(&self, bounds: &Self) -> Vec<String> {
        let both = self.each().into_iter().zip(bounds.each());
        both.filter(|((_, taken), (_, bound))| taken > bound)
            .map(|((what, taken), (_, bound))| format!("I10: {taken} {what}, bounded by {bound}"))
            .collect()
    }

    fn peak(&self, other: &Self) -> Self {
        let mut most = self.each().map(|(_, amount)| amount);
        for (most, (_, amount)) in most.iter_mut().zip(other.each()) {
            *most = amount.max(*most);
        }
        Self::of(most)
    }
}

/// Where a worker is measured: by the kernel, the database and the broker, never by itself.
#[derive(Clone)]
pub(crate) struct Gauge {
    database_url: String,
    vhost: String,
    services: Services,
    process: Option<u32>,
    worker: String,
}

impl Gauge {
    pub(crate) fn of(ground: &Ground, worker: &Worker) -> Self {
        Self {
            database_url: ground.database_url.clone(),
            vhost: ground.name.clone(),
            services: ground.services.clone(),
            process: worker.id(),
            worker: worker.name.clone(),
        }
    }

    pub(crate) async fn read(&self) -> Amounts {
        let db = connect(&self.database_url).await;
        let sql = "SELECT (SELECT count(*) FROM pg_stat_activity
                           WHERE datname = current_database() AND application_name = 'settled'),
                          (SELECT count(*) FROM settled.outbox)";
        let row = db.query_one(sql, &[]).await.expect("counts");
        let [database_connections, outbox_rows] = [0, 1].map(|column| row.get::<_, i64>(column).unsigned_abs());
        let ask = async |what: String| match self.services.manage("GET", &what, None).await {
            (200, Value::Array(answer)) => answer,
            (status, answer) => panic!("{what}: {status} {answer}"),
        };
        let vhost = &self.vhost;
        let is_input = |queue: &Value| {
            queue
                .as_str()
                .is_some_and(|name| name.starts_with("settlement.updates"))
        };
        let sum = |rows: &[Value], of: &str| rows.iter().filter_map(|row| row[of].as_u64()).sum();
        let mut queues = ask(format!("/api/queues/{vhost}")).await;
        queues.retain(|queue| is_input(&queue["name"]));
        let mut consumers = ask(format!("/api/consumers/{vhost}")).await;
        consumers.retain(|consumer| is_input(&consumer["queue"]["name"]));
        let mut connections = ask(format!("/api/vhosts/{vhost}/connections")).await;
        let ours = format!("{} ", self.worker);
        connections.retain(|connection| {
            let name = connection["user_provided_name"].as_str();
            name.is_some_and(|name| name.starts_with(&ours))
        });
        Amounts {
            memory: self.memory(),
            unacked: sum(&queues, "messages_unacknowledged"),
            ahead: sum(&consumers, "prefetch_count"),
            database_connections,
            broker_connections: connections.len() as u64,
            outbox_rows,
        }
    }

    /// The peak of its resident memory, since it started. Nothing where the kernel does not tell, or it is gone.
    fn memory(&self) -> u64 {
        let status = self
            .process
            .map(|id| std::fs::read_to_string(format!("/proc/{id}/status")));
        let status = status.and_then(Result::ok).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
        peak.unwrap_or_default()
    }
}

/// Looks at a worker again and again while the test goes on, and keeps the most that it took.
pub(crate) struct Watch {
    peak: watch::Receiver<Amounts>,
    _looking: Beside,
}

impl Watch {
    pub(crate) fn over(gauge: Gauge) -> Self {
        let (known, peak) = watch::channel(Amounts::default());
        let looking = Beside::spawn(async move {
            loop {
                let amounts = gauge.read().await;
                known.send_modify(|known| *known = known.peak(&amounts));
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
        Self {
            peak,
            _looking: looking,
        }
    }

    pub(crate) fn peak(&self) -> Amounts {
        *self.peak.borrow()
    }
}

//! Who is measured: processes that know where database and broker are, and nothing else of each other.

use std::{
    fmt,
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use settled::broker::topology::UPDATES;
use tokio::process::{Child, Command};

use crate::{
    Fallible, PER_MESSAGE,
    place::{PATIENCE, Place, own, without_settings},
};

/// A program that takes updates from the common queue until SIGTERM, and then exits with 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contestant {
    /// The worker, as a user would run it.
    Settled,
    /// Another build of the worker, for comparing the two: in a database that it made itself.
    Other(PathBuf),
    /// That build with `events.format` set to `batched`.
    OtherBatched(PathBuf),
    /// The worker with `events.format` set to `batched`.
    Batched,
    /// The worker with the trace of one batch in a hundred exported to this address.
    Traced(SocketAddr),
    /// What a user would write first: `per_message.rs`.
    PerMessage,
    /// The same in another language: `benches/peers/<name>/run`.
    Peer(String),
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contestant::Settled => f.write_str("settled"),
            Contestant::Other(_) => f.write_str("baseline"),
            Contestant::OtherBatched(_) => f.write_str("baseline, batched events"),
            Contestant::Batched => f.write_str("settled, batched events"),
            Contestant::Traced(_) => f.write_str("settled, 1 % traced"),
            Contestant::PerMessage => f.write_str("per message"),
            Contestant::Peer(name) => f.write_str(name),
        }
    }
}

impl Contestant {
    fn command(&self) -> Fallible<Command> {
        let worker = |program: &Path| {
            let mut command = without_settings(program);
            command
                .arg("worker")
                .env("SETTLED_HTTP__LISTEN", "127.0.0.1:0")
                .env("SETTLED_LOG__FORMAT", "json");
            command
        };
        Ok(match self {
            Contestant::Settled | Contestant::Other(_) => worker(self.program()),
            Contestant::Batched | Contestant::OtherBatched(_) => {
                let mut command = worker(self.program());
                command.env("SETTLED_EVENTS__FORMAT", "batched");
                command
            }
            Contestant::Traced(receiver) => {
                let mut command = worker(self.program());
                command
                    .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{receiver}"))
                    .env("OTEL_TRACES_SAMPLER", "traceidratio")
                    .env("OTEL_TRACES_SAMPLER_ARG", "0.01");
                command
            }
            Contestant::PerMessage => {
                let mut command = without_settings(std::env::current_exe()?);
                command.arg(PER_MESSAGE);
                command
            }
            Contestant::Peer(name) => without_settings(peer(name)),
        })
    }

    /// The build of the worker whose schema and topology it works with.
    pub(crate) fn program(&self) -> &Path {
        match self {
            Contestant::Other(program) | Contestant::OtherBatched(program) => program,
            Contestant::Settled
            | Contestant::Batched
            | Contestant::Traced(_)
            | Contestant::PerMessage
            | Contestant::Peer(_) => own(),
        }
    }

    /// Whether several of its events are one message.
    pub(crate) fn is_batched(&self) -> bool {
        matches!(self, Contestant::Batched | Contestant::OtherBatched(_))
    }

    /// Whether it is a build of our own worker, which answers /metrics and writes a row for each batch.
    pub(crate) fn is_worker(&self) -> bool {
        match self {
            Contestant::Settled
            | Contestant::Other(_)
            | Contestant::Batched
            | Contestant::OtherBatched(_)
            | Contestant::Traced(_) => true,
            Contestant::PerMessage | Contestant::Peer(_) => false,
        }
    }

    /// Starts it; what it says goes to a file in `logs`.
    pub(crate) fn start(&self, place: &Place, logs: &Path) -> Fallible<Running> {
        let log = logs.join(format!("{}.{self}.log", place.database.name).replace([',', ' '], "-"));
        let file = File::options().append(true).create(true).open(&log)?;
        let mut command = self.command()?;
        command
            .env("SETTLED_DATABASE_URL", &place.database.url)
            .env("SETTLED_BROKER_URL", &place.broker_url)
            .stdout(Stdio::null())
            .stderr(file);
        let child = command.spawn().map_err(|error| format!("{self}: {error}"))?;
        Ok(Running {
            name: self.to_string(),
            id: child.id().ok_or("it ended at once")?,
            child,
            log,
            is_worker: self.is_worker(),
        })
    }
}

/// Installs what a peer needs, from its registry.
pub(crate) async fn install(name: &str) -> Fallible<()> {
    eprintln!("bench: installing what {name} needs");
    let status = Command::new(peer(name))
        .arg("install")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .await
        .map_err(|error| format!("{}: {error}", peer(name).display()))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{name} could not be installed ({status})").into()),
    }
}

/// The script that installs and runs a peer.
fn peer(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("benches/peers")
        .join(name)
        .join("run")
}

/// A contestant's process. Dropped, it is killed.
pub(crate) struct Running {
    name: String,
    pub(crate) id: u32,
    child: Child,
    log: PathBuf,
    is_worker: bool,
}

/// What a worker tells of itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Told {
    pub(crate) batches: f64,
    pub(crate) messages: f64,
    /// Confirmed by the broker, however many were in one of its messages.
    pub(crate) events: f64,
    /// Unless this version does not count them.
    pub(crate) round_trips: Option<f64>,
}

impl Running {
    /// An error, if it ended by itself.
    pub(crate) fn still_runs(&mut self) -> Fallible<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(self.complaint(&format!("ended by itself ({status})")).into()),
        }
    }

    fn complaint(&self, what: &str) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default();
        format!("{} {what}; its last words:\n{}", self.name, tail.join("\n"))
    }

    /// Waits until it consumes.
    pub(crate) async fn consumes(&mut self, place: &Place) -> Fallible<()> {
        let began = Instant::now();
        while place.line.consumers(UPDATES).await? == 0 {
            self.still_runs()?;
            if began.elapsed() > PATIENCE {
                return Err(self.complaint("does not consume").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// SIGTERM, and its end.
    pub(crate) async fn stop(mut self) -> Fallible<()> {
        let kill = std::process::Command::new("sh")
            .args(["-c", "kill -TERM \"$0\"", &self.id.to_string()])
            .status()?;
        if !kill.success() {
            return Err(self.complaint("could not be stopped").into());
        }
        let status: ExitStatus = tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .map_err(|_| self.complaint("does not end"))??;
        match status.success() {
            true => Ok(()),
            false => Err(self.complaint(&format!("ended with {status}")).into()),
        }
    }

    /// What it tells at /metrics; nothing of a contestant that tells nothing.
    pub(crate) async fn told(&self) -> Fallible<Option<Told>> {
        if !self.is_worker {
            return Ok(None);
        }
        let began = Instant::now();
        let address = loop {
            if let Some(address) = self.address()? {
                break address;
            }
            if began.elapsed() > PATIENCE {
                return Err(self.complaint("does not say where its HTTP listens").into());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let url = format!("http://{address}/metrics");
        let text = tokio::task::spawn_blocking(move || {
            let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).build();
            let mut answer = ureq::Agent::new_with_config(config).get(&url).call()?;
            answer.body_mut().read_to_string()
        })
        .await??;
        Ok(Some(Told {
            batches: metric(&text, "settled_batch_size_count{from=\"queue\"}").unwrap_or_default(),
            messages: metric(&text, "settled_batch_size_sum{from=\"queue\"}").unwrap_or_default(),
            events: metric(&text, "settled_events_total{").unwrap_or_default(),
            round_trips: metric(&text, "settled_db_round_trips_total{transaction=\"settle_batch\"}"),
        }))
    }

    fn address(&self) -> Fallible<Option<String>> {
        let said = fs::read_to_string(&self.log)?;
        let lines = said
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        Ok(lines
            .into_iter()
            .find_map(|line| line["address"].as_str().map(str::to_owned)))
    }
}

/// The sum of a metric's lines, which begin like this; none if there is none.
fn metric(text: &str, begin: &str) -> Option<f64> {
    text.lines()
        .filter(|line| line.starts_with(begin))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .reduce(|sum, value| sum + value)
}

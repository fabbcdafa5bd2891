//! The worker as a process of its own, so that it can be killed like one.

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use tokio::process::{Child, Command};

use crate::{
    broker::{BrokerSettings, Connection, subscribe, topology},
    cli::{Context, Failure, output::complain},
    config::Secret,
};

/// How long a worker may take until it consumes.
const START_MAX: Duration = Duration::from_secs(30);
/// A little more than `worker.drain_deadline`.
const STOP_MAX: Duration = Duration::from_secs(25);
/// Of a log that is shown, the last lines.
const TAIL: usize = 12;

pub(super) struct ChildWorker {
    child: Child,
    /// With its own login, where it could be given one.
    database_url: Secret,
    log: PathBuf,
    chaos: bool,
}

/// How the worker ended when it was asked to.
pub(super) struct Stopped {
    /// None: it did not end in time and was killed.
    pub(super) status: Option<ExitStatus>,
    pub(super) seconds: f64,
}

impl Stopped {
    pub(super) fn sentence(&self) -> String {
        match self.status {
            Some(status) => format!("{status} after {:.1} s", self.seconds),
            None => format!("it had to be killed after {:.1} s", self.seconds),
        }
    }
}

impl ChildWorker {
    pub(super) fn start(context: &Context, database_url: Secret, chaos: bool) -> Result<Self, Failure> {
        let name = format!("settled-demo-{}-worker.log", std::process::id());
        let log = std::env::temp_dir().join(name);
        drop(std::fs::remove_file(&log));
        let child = spawn(context, &database_url, &log, chaos)?;
        Ok(Self {
            child,
            database_url,
            log,
            chaos,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// SIGKILL.
    pub(super) async fn kill(&mut self) -> Result<(), Failure> {
        self.child
            .kill()
            .await
            .map_err(|error| Failure::ours(format!("the worker could not be killed: {error}")))
    }

    /// Another one in its place.
    pub(super) fn start_again(&mut self, context: &Context) -> Result<(), Failure> {
        self.child = spawn(context, &self.database_url, &self.log, self.chaos)?;
        Ok(())
    }

    pub(super) async fn wait_until_consuming(&mut self, broker: &BrokerSettings) -> Result<(), Failure> {
        let connection = Connection::open(broker, "settled demo").await?;
        let began = Instant::now();
        while subscribe::consumers(&connection, topology::UPDATES).await? == 0 {
            if let Some(status) = self.ended() {
                return Err(Failure::ours(format!("the worker ended by itself: {status}")));
            }
            if began.elapsed() >= START_MAX {
                return Err(Failure::ours(format!(
                    "the worker does not consume after {START_MAX:?}"
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(connection.close().await?)
    }

    /// How it ended, if it did.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// SIGTERM, and wait.
    pub(super) async fn terminate(&mut self) -> Result<Stopped, Failure> {
        let began = Instant::now();
        // The shell's own kill: a bare machine has no other, and this program has no unsafe code.
        let told = Command::new("sh")
            .args(["-c", "kill -TERM \"$0\"", &self.pid().to_string()])
            .stdin(Stdio::null())
            .status()
            .await;
        if let Err(error) = told {
            return Err(Failure::ours(format!("the worker could not be told to stop: {error}")));
        }
        let ended = tokio::time::timeout(STOP_MAX, self.child.wait()).await;
        let status = match ended {
            Ok(Ok(status)) => Some(status),
            Ok(Err(error)) => return Err(Failure::ours(format!("the worker can not be waited for: {error}"))),
            Err(_) => {
                self.kill().await?;
                None
            }
        };
        Ok(Stopped {
            status,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// All went well: nobody will read it.
    pub(super) fn forget_log(&mut self) {
        drop(std::fs::remove_file(&self.log));
    }

    /// Shows the end of the log, and where the rest is.
    pub(super) fn complain(&mut self) {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(TAIL)) {
            complain(&format!("    {line}"));
        }
        complain(&format!("the worker's log: {}", self.log.display()));
    }
}

fn spawn(context: &Context, database_url: &Secret, log: &Path, chaos: bool) -> Result<Child, Failure> {
    let failed =
        |what: &str, error: std::io::Error| Failure::ours(format!("the worker could not be started: {what}: {error}"));
    let program = std::env::current_exe().map_err(|error| failed("where is this program", error))?;
    let open = || -> std::io::Result<File> { OpenOptions::new().create(true).append(true).open(log) };
    let (out, err) = (
        open().map_err(|error| failed("its log", error))?,
        open().map_err(|error| failed("its log", error))?,
    );
    let settings = &context.settings;
    let mut command = Command::new(program);
    command
        .arg("worker")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .kill_on_drop(true)
        .env_remove("SETTLED_DATABASE_URL_FILE")
        .env_remove("SETTLED_BROKER_URL_FILE")
        .env("SETTLED_DATABASE_URL", database_url.expose())
        .env("SETTLED_BROKER_URL", settings.broker_url()?.expose())
        .env("SETTLED_ALLOW_PLAINTEXT", settings.allow_plaintext.to_string())
        .env("SETTLED_WORKER__NAME", "demo")
        .env("SETTLED_HTTP__LISTEN", "127.0.0.1:0")
        .env("SETTLED_LOG__FORMAT", "human")
        // Dead letters stay in the queue, to be counted.
        .env("SETTLED_DEAD_LETTERS__COLLECT", "false")
        .env("SETTLED_PARK__DEADLINE", if chaos { "10s" } else { "4s" });
    for (name, file) in [
        ("SETTLED_DATABASE__CA_FILE", &settings.database.ca_file),
        ("SETTLED_BROKER__CA_FILE", &settings.broker.ca_file),
        (
            "SETTLED_DATABASE__CLIENT_CERTIFICATE_FILE",
            &settings.database.client_certificate_file,
        ),
        ("SETTLED_DATABASE__CLIENT_KEY_FILE", &settings.database.client_key_file),
        (
            "SETTLED_BROKER__CLIENT_CERTIFICATE_FILE",
            &settings.broker.client_certificate_file,
        ),
        ("SETTLED_BROKER__CLIENT_KEY_FILE", &settings.broker.client_key_file),
    ] {
        if let Some(file) = file {
            command.env(name, file);
        }
    }
    if chaos {
        // What a killed worker owned is free after this; the default is for machines slower than a demo.
        command
            .env("SETTLED_OUTBOX__LEASE", "3s")
            .env("SETTLED_PARK__LEASE", "3s");
    }
    command.spawn().map_err(|error| failed("spawning", error))
}

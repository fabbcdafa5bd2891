//! Kills what the settlement stands on, in turn, while messages flow.

use std::{
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::{process::Command, sync::Mutex};

use super::{Teller, child::ChildWorker};
use crate::{
    broker::BrokerSettings,
    cli::{
        Context, Failure,
        simulate::{account::Accounting, round},
    },
};

/// Who is hit when this share of the messages, in percent, is published.
const HITS: [(Target, usize); 3] = [(Target::Worker, 15), (Target::Postgres, 40), (Target::Rabbitmq, 65)];
/// Between being killed and being started again.
const DOWN: Duration = Duration::from_millis(700);
/// How long we wait for the first answer after it.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
/// Messages that go out at once, and how often, while something is being killed.
const HURRY: usize = 12;
const HURRY_EVERY: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Target {
    Worker,
    Postgres,
    Rabbitmq,
}

impl Target {
    /// What people call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Target::Worker => "the worker",
            Target::Postgres => "PostgreSQL",
            Target::Rabbitmq => "RabbitMQ",
        }
    }

    /// What `dev/services` calls it.
    fn service(self) -> Option<&'static str> {
        match self {
            Target::Worker => None,
            Target::Postgres => Some("postgres"),
            Target::Rabbitmq => Some("rabbitmq"),
        }
    }
}

/// One that was killed.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Hit {
    pub(super) target: Target,
    /// Seconds since the demo began.
    pub(super) at: f64,
    /// Messages published and not answered when it was dead.
    pub(super) in_flight: usize,
    /// Until it was up again.
    pub(super) down_seconds: f64,
    /// From the kill to the next answer.
    pub(super) silent_seconds: f64,
}

pub(super) struct Chaos<'a> {
    pub(super) context: &'a Context,
    pub(super) broker: &'a BrokerSettings,
    pub(super) services: &'a Path,
    pub(super) account: &'a Accounting,
    pub(super) teller: &'a Teller,
    pub(super) worker: &'a Arc<Mutex<ChildWorker>>,
    pub(super) hurry: &'a AtomicUsize,
    pub(super) messages: usize,
}

impl Chaos<'_> {
    pub(super) async fn hit_all(&self) -> Result<Vec<Hit>, Failure> {
        let mut hits = Vec::new();
        for (target, percent) in HITS {
            let due = self.messages * percent / 100;
            let far = Instant::now() + Duration::from_secs(600);
            self.account
                .until(far, |account| account.progress().published >= due)
                .await;
            hits.extend(self.hit(target).await?);
        }
        Ok(hits)
    }

    /// None where it is not ours to kill.
    async fn hit(&self, target: Target) -> Result<Option<Hit>, Failure> {
        // Traffic thickens while the blow falls.
        let killing = async {
            tokio::time::sleep(HURRY_EVERY * 3).await;
            match target.service() {
                None => self.worker.lock().await.kill().await,
                Some(service) => self.service("kill", service).await,
            }
        };
        let outcome = tokio::select! {
            outcome = killing => outcome,
            () = self.press() => Ok(()),
        };
        if let Err(failure) = outcome {
            if target.service().is_none() {
                return Err(failure);
            }
            self.teller.alarm(&format!(
                "{} is not killed, it is none that this script started: {}",
                target.name(),
                failure.message()
            ));
            return Ok(None);
        }
        let killed = Instant::now();
        let progress = self.account.progress();
        let hit_at = self.teller.began.elapsed().as_secs_f64();
        self.teller.alarm(&format!(
            "{} killed (SIGKILL) with {} messages in flight",
            target.name(),
            progress.in_flight()
        ));
        tokio::time::sleep(DOWN).await;
        // What is answered from here on is answered in spite of it.
        let answered = self.account.progress().answered;
        match target.service() {
            None => {
                let mut worker = self.worker.lock().await;
                worker.start_again(self.context)?;
                worker.wait_until_consuming(self.broker).await?;
            }
            Some(service) => self.service("restart", service).await?,
        }
        let down_seconds = round(killed.elapsed().as_secs_f64());
        self.teller
            .say(&format!("{} is up again after {down_seconds:.1} s", target.name()));
        let again = self
            .account
            .until(Instant::now() + RECOVERY_MAX, |account| {
                let progress = account.progress();
                // Where everything had its answer before the kill, none is left to come.
                progress.answered > answered || (progress.published >= self.messages && progress.in_flight() == 0)
            })
            .await;
        let silent_seconds = round(killed.elapsed().as_secs_f64());
        if again {
            self.teller
                .say(&format!("events flow again, {silent_seconds:.1} s after the kill"));
        } else {
            self.account.problem(format!(
                "no event within {RECOVERY_MAX:?} after {} was killed",
                target.name()
            ));
        }
        Ok(Some(Hit {
            target,
            at: round(hit_at),
            in_flight: progress.in_flight(),
            down_seconds,
            silent_seconds,
        }))
    }

    /// More messages than the pace allows, for as long as it is polled.
    async fn press(&self) {
        loop {
            self.hurry.store(HURRY, Ordering::Relaxed);
            tokio::time::sleep(HURRY_EVERY).await;
        }
    }

    async fn service(&self, verb: &str, name: &str) -> Result<(), Failure> {
        let outcome = Command::new(self.services)
            .args([verb, name])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .await;
        let called = format!("{} {verb} {name}", self.services.display());
        match outcome {
            Err(error) => Err(Failure::usage(format!("{called}: {error}"))),
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => {
                let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                Err(Failure::refused(format!("{called}: {words}"))
                    .hint("chaos needs services that dev/services started itself"))
            }
        }
    }
}

//! `settled simulate`: signing partners publish right and wrong updates at a rate, and every one is accounted for by the
//! events that a subscriber receives. The demo is made of the same parts.

pub(super) mod account;
pub(super) mod drive;
mod pace;
pub(super) mod plan;

use std::{
    io::IsTerminal,
    sync::{Arc, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use uuid::Uuid;

use self::{
    account::{Accounting, Findings, Latency},
    drive::{Drive, Registrar, Subscriber},
    plan::{Plan, Shape},
};
use super::{
    Context, Exit, Failure,
    output::{Mood, Output, complain, plain},
};
use crate::{
    broker::{BrokerSettings, Connection, subscribe, topology},
    config::parse_duration,
    partner::Post,
    store::{self, registry::PartnerRecord},
};

/// How long we look for a worker before we say that there is none.
const WORKER_GRACE: Duration = Duration::from_secs(5);
/// How long the broker or the database may be away while we publish.
const PATIENCE: Duration = Duration::from_secs(30);
const WAVES: usize = 10;

/// Publish signed updates, right and wrong ones, and account for each
#[derive(Args)]
#[command(after_help = "\
A worker must be running. It registers partners of its own, with keys, connections, deposits and allocations, which stay in
the database; a database that holds partners of anybody's is refused unless --yes-into-this-database is said.")]
pub(super) struct Simulate {
    /// What the traffic is like; --messages, --rate and --invalid change a profile's own
    #[arg(long, default_value = "plain", value_name = "PROFILE")]
    profile: Profile,
    /// How many messages to publish; 1000 if neither this nor the profile says it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    messages: Option<u32>,
    /// Messages a second; as fast as it goes if neither this nor the profile says it
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    /// Of a hundred messages so many are wrong, in every way there is; 10 if neither this nor the profile says it
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    invalid: Option<u8>,
    /// How many partners publish
    #[arg(long, default_value_t = 2, value_name = "P", value_parser = clap::value_parser!(u16).range(1..=1_000))]
    partners: u16,
    /// The same seed draws the same amounts, order and mistakes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long to wait for the next answer before giving up, such as 30s
    #[arg(long, default_value = "60s", value_name = "D", value_parser = duration)]
    timeout: Duration,
    /// The database holds partners that no simulation made, and it is meant all the same
    #[arg(long)]
    yes_into_this_database: bool,
}

/// What a simulated partner is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Profile {
    /// As fast as it goes, one in ten wrong
    Plain,
    /// A hundred a second, one in ten wrong
    Steady,
    /// 5000 as fast as it goes, all of them right
    Burst,
    /// Half of what is right is sent again, or asked for again under a new nonce
    Duplicates,
    /// Six in ten wrong, in every way there is
    Hostile,
    /// 50 messages, five a second
    Slow,
}

/// The numbers of a profile.
struct Traffic {
    messages: u32,
    rate: Option<u32>,
    invalid: u8,
    repeated_percent: usize,
}

impl Profile {
    fn traffic(self) -> Traffic {
        let plain = Traffic {
            messages: 1_000,
            rate: None,
            invalid: 10,
            repeated_percent: 3,
        };
        match self {
            Profile::Plain => plain,
            Profile::Steady => Traffic {
                rate: Some(100),
                ..plain
            },
            Profile::Burst => Traffic {
                messages: 5_000,
                invalid: 0,
                ..plain
            },
            Profile::Duplicates => Traffic {
                repeated_percent: 50,
                ..plain
            },
            Profile::Hostile => Traffic { invalid: 60, ..plain },
            Profile::Slow => Traffic {
                messages: 50,
                rate: Some(5),
                ..plain
            },
        }
    }
}

/// The longest that a command waits.
const WAIT_MAX: Duration = Duration::from_secs(365 * 24 * 3_600);

/// How long to wait: `500ms`, `30s`, `5m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wait = parse_duration(text).ok_or("write a number with its unit: 500ms, 30s, 5m")?;
    if wait.is_zero() || wait > WAIT_MAX {
        return Err("it must be more than nothing and at most 8760h, which is a year".into());
    }
    Ok(wait)
}

/// What `--json` prints.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    ok: bool,
    run: &'a str,
    seed: u64,
    messages: usize,
    seconds: f64,
    /// Messages answered a second, from the first publication to the last answer.
    throughput: f64,
    latency_ms: Latency,
    #[serde(flatten)]
    findings: &'a Findings,
}

pub(super) async fn run(context: &Context, wish: Simulate) -> Result<Exit, Failure> {
    let (store, broker) = (context.store()?, context.broker()?);
    store::check_schema(store.schema_version().await?).map_err(Failure::refused)?;
    let partners = store.partners().await?;
    let strangers = strangers(&partners);
    if strangers.is_empty() || wish.yes_into_this_database {
        worker_is_there(&broker, WORKER_GRACE).await?;
    }
    let run = format!("sim-{}", &Uuid::new_v4().simple().to_string()[..8]);
    let traffic = wish.profile.traffic();
    let (rate, invalid) = (wish.rate.or(traffic.rate), wish.invalid.unwrap_or(traffic.invalid));
    let messages = usize::try_from(wish.messages.unwrap_or(traffic.messages)).unwrap_or(usize::MAX);
    let shape = Shape {
        messages,
        invalid_percent: usize::from(invalid),
        repeated_percent: traffic.repeated_percent,
        enterprises: (1..=wish.partners).map(|number| format!("{run}-{number}")).collect(),
        run: run.clone(),
        seed: wish.seed,
        user: broker.user()?,
        waves: WAVES,
        parked_then_reserved: if messages >= 100 { 2 } else { 0 },
        park_runs_out: false,
    };
    let plan = Arc::new(Plan::draw(&shape));
    let additions = additions(&plan);
    if !strangers.is_empty() && !wish.yes_into_this_database {
        return Err(Failure::refused(format!(
            "the database holds partners that no simulation made ({}); nothing was added",
            listed(&strangers)
        ))
        .hint(format!(
            "simulate in a database of its own, or say --yes-into-this-database: it adds {additions}, and takes nothing away \
             afterwards"
        )));
    }
    if !context.out.json {
        complain(&format!("adds {additions}; nothing of it is taken away afterwards"));
    }
    let account = Arc::new(Accounting::new(&plan));
    let desk = Arc::new(Registrar {
        store,
        retry: context.settings.retry.clone(),
        patience: PATIENCE,
    });
    desk.register_all(&plan).await?;
    desk.deposit_all(&plan).await?;
    desk.reserve(&plan.reservations).await?;
    let subscriber = Subscriber::start(
        &broker,
        &context.settings.retry,
        format!("settled.simulate.{run}"),
        false,
        Arc::clone(&account),
    )
    .await?;
    let mut drive = Drive {
        post: Post::new(broker, "settled simulate publisher", &context.settings.retry, PATIENCE),
        plan: Arc::clone(&plan),
        account: Arc::clone(&account),
        desk,
        hurry: Arc::new(AtomicUsize::new(0)),
        timeout: wish.timeout,
    };
    let bar = Bar::new(messages);
    let late = drive.reserve_late();
    let driven = drive
        .waves(0..plan.waves.len(), rate.map(f64::from), || bar.show(&account))
        .await;
    if let Ok(true) = driven {
        wait_for_all(&account, wish.timeout, || bar.show(&account)).await;
    }
    bar.finish();
    late.abort();
    drive.post.close().await;
    subscriber.end().await;
    if let Ok(Err(failure)) = late.await {
        return Err(failure);
    }
    driven?;
    if account.progress().answered == 0 {
        return Err(nothing_consumed());
    }
    let findings = account.findings(false);
    let span = account.span(0..messages).as_secs_f64();
    let report = Report {
        ok: findings.all_right(),
        run: &run,
        seed: wish.seed,
        messages,
        seconds: round(span),
        throughput: round(rate_of(messages, span)),
        latency_ms: account.latency(0..messages),
        findings: &findings,
    };
    context.out.say(&report, |out| tell(out, &report))?;
    Ok(if report.ok { Exit::Done } else { Exit::Failed })
}

/// Partners that no simulation made.
fn strangers(partners: &[PartnerRecord]) -> Vec<&str> {
    partners
        .iter()
        .filter(|partner| !partner.name.starts_with(drive::MADE_BY_US))
        .map(|partner| partner.enterprise_id.as_str())
        .collect()
}

fn listed(names: &[&str]) -> String {
    const MOST: usize = 5;
    let shown = names.iter().take(MOST).copied().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MOST) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// What a plan puts into the database.
fn additions(plan: &Plan) -> String {
    format!(
        "{} partners with a key and a connection each, {} deposits, {} allocations, and what comes of {} messages",
        plan.partners.len() + 2,
        plan.deposits.len(),
        plan.reservations.len(),
        plan.items.len()
    )
}

fn tell(out: &Output, report: &Report<'_>) -> Result<(), Failure> {
    verdicts(out, report.findings)?;
    reasons(out, report.findings)?;
    out.line(format!(
        "{:.0} messages a second over {:.2} s; from publishing to the event: {}",
        report.throughput,
        report.seconds,
        latency(report.latency_ms)
    ))?;
    unexpected(out, report.findings)?;
    let (mood, sentence) = if report.ok {
        (
            Mood::Good,
            format!(
                "every one of {} messages is accounted for (run {})",
                report.messages, report.run
            ),
        )
    } else {
        (Mood::Bad, format!("it does not add up (run {})", report.run))
    };
    out.line(out.coloured(mood, &sentence))
}

/// How many came to which verdict.
pub(super) fn verdicts(out: &Output, findings: &Findings) -> Result<(), Failure> {
    let (expected, actual) = (&findings.expected, &findings.actual);
    let rows = [
        ("settled", expected.settled, actual.settled),
        ("duplicate", expected.duplicate, actual.duplicate),
        ("parked, still waiting", expected.parked, actual.parked),
        ("rejected", expected.rejected, actual.rejected),
        ("not accounted for", 0, findings.unaccounted),
    ];
    let rows = rows
        .into_iter()
        .map(|(name, expected, actual)| row(out, name.to_owned(), "", expected, actual));
    out.table(&["verdict", "", "expected", "actual", ""], rows.collect(), "")
}

/// Each rejection by reason.
pub(super) fn reasons(out: &Output, findings: &Findings) -> Result<(), Failure> {
    let rows = findings.reasons.iter().map(|line| {
        let name = line.reason.to_string();
        let mut row = row(out, name, &line.class.to_string(), line.expected, line.actual);
        row.push(if line.is_final { "final" } else { "worth replaying" }.to_owned());
        row
    });
    let header = ["rejected because", "class", "expected", "actual", "", ""];
    out.table(&header, rows.collect(), "nothing was rejected")
}

fn row(_out: &Output, name: String, class: &str, expected: usize, actual: usize) -> Vec<String> {
    let mark = if expected == actual { "✓" } else { "✗" };
    vec![
        name,
        class.to_owned(),
        expected.to_string(),
        actual.to_string(),
        mark.to_owned(),
    ]
}

/// What is not as it must be.
pub(super) fn unexpected(out: &Output, findings: &Findings) -> Result<(), Failure> {
    for problem in &findings.problems {
        out.line(format!("{} {}", out.coloured(Mood::Bad, "✗"), plain(problem)))?;
    }
    for line in &findings.unexpected {
        out.line(format!(
            "{} {} nonce {} (message {}): expected {}; {}",
            out.coloured(Mood::Bad, "✗"),
            line.enterprise_id,
            line.nonce,
            line.message_digest.get(..12).unwrap_or_default(),
            line.expected,
            line.actual
        ))?;
    }
    Ok(())
}

pub(super) fn latency(latency: Latency) -> String {
    format!(
        "p50 {:.1} ms, p90 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
        latency.p50, latency.p90, latency.p99, latency.max
    )
}

pub(super) fn rate_of(messages: usize, seconds: f64) -> f64 {
    // No run has so many messages that the number would not fit.
    if seconds > 0.0 { messages as f64 / seconds } else { 0.0 }
}

pub(super) fn round(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

/// Waits until everything is as expected, or nothing has moved for so long.
pub(super) async fn wait_for_all(account: &Accounting, timeout: Duration, told: impl Fn()) {
    let mut moved = (account.progress().done, Instant::now());
    loop {
        told();
        if account
            .until(Instant::now() + Duration::from_millis(250), Accounting::is_complete)
            .await
        {
            return;
        }
        let done = account.progress().done;
        if done != moved.0 {
            moved = (done, Instant::now());
        } else if moved.1.elapsed() >= timeout {
            return;
        }
    }
}

/// A consumer on the input queue.
pub(super) async fn worker_is_there(broker: &BrokerSettings, grace: Duration) -> Result<(), Failure> {
    let connection = Connection::open(broker, "settled simulate").await?;
    let began = Instant::now();
    loop {
        if subscribe::consumers(&connection, topology::UPDATES).await? > 0 {
            connection.close().await?;
            return Ok(());
        }
        if began.elapsed() >= grace {
            return Err(nothing_consumed());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn nothing_consumed() -> Failure {
    Failure::refused(format!(
        "nobody consumes the queue {}: nothing would be settled",
        topology::UPDATES
    ))
    .hint("start a worker (`settled worker`), or see why it is not ready (`settled doctor`, /readyz)")
}

/// A progress bar on a terminal, nothing elsewhere.
pub(super) struct Bar(ProgressBar);

impl Bar {
    pub(super) fn new(messages: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(messages as u64), ProgressDrawTarget::stderr_with_hz(10));
        if let Ok(style) = ProgressStyle::with_template("  {bar:40} {msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    pub(super) fn show(&self, account: &Accounting) {
        if self.0.is_hidden() {
            return;
        }
        let progress = account.progress();
        self.0.set_position(progress.answered as u64);
        self.0.set_message(format!(
            "{} published, {} answered",
            progress.published, progress.answered
        ));
    }

    /// A line above the bar.
    pub(super) fn line(&self, text: &str) {
        self.0.suspend(|| complain(text));
    }

    pub(super) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// Whether people watch stderr in colour.
pub(super) fn stderr_has_colour() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !unwanted && std::io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("8760h"), Ok(WAIT_MAX));
        for text in ["", "5", "s", "0s", "8761h", "-1s", "99999999999s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}

//! `replay` and `runs`: what was planned is judged by the worker, with effect.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::{
    acts::{Author, confirm, no_such_plan},
    look::progress,
    plan::would,
};
use crate::{
    cli::{
        Context, Exit, Failure, cut,
        output::{Mood, Output, complain},
    },
    domain::event::rfc3339,
    replay::{self, Ended, Step},
    store::{
        Store,
        audit::Act,
        runs::{Came, Changed, Driver, Moved, NewRun, Run, RunState},
    },
    worker::Signals,
};

/// Where there is no terminal, how often a line says how far a run is.
const LINES: Duration = Duration::from_secs(10);

#[derive(Args)]
#[command(after_help = "\
The worker judges the messages, as it would any other: this program marks them as due and waits for the verdicts. Ctrl-C, or
`runs cancel` from elsewhere, stops between two messages; `runs resume` goes on. Whatever happens to this program or to the
worker, a message is settled once.
Exit 0 if every verdict is as planned; 3 if the run was stopped or cancelled, or if some came to another verdict.")]
pub(in crate::cli) struct Replay {
    /// The plan's number
    plan: i64,
    /// The first N; the rest only if each of them comes to the verdict that was planned
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    canary: Option<i32>,
    /// Messages a second after the canary, such as 50 or 0.5; as fast as they are judged if left out
    #[arg(long, value_name = "R", value_parser = rate)]
    rate: Option<f64>,
    /// Also those that would not settle
    #[arg(long)]
    all_verdicts: bool,
    #[command(flatten)]
    author: Author,
    /// Do not ask back, however many there are
    #[arg(long)]
    yes: bool,
}

#[derive(Subcommand)]
pub(in crate::cli) enum RunsCommand {
    /// Every run, the newest first
    List(ListRuns),
    /// One run: what its messages came to
    Show(OneRun),
    /// Stop a run between two messages, wherever it is driven
    Cancel(ActOnRun),
    /// Go on with a run that was cancelled, stopped, or whose program is gone
    Resume(Resume),
}

#[derive(Args)]
pub(in crate::cli) struct ListRuns {
    /// So many at most
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=1_000))]
    limit: i64,
    /// Go on after the run of this number
    #[arg(long, value_name = "RUN")]
    after: Option<i64>,
}

#[derive(Args)]
pub(in crate::cli) struct OneRun {
    /// The run's number
    run: i64,
}

#[derive(Args)]
pub(in crate::cli) struct ActOnRun {
    /// The run's number
    run: i64,
    #[command(flatten)]
    author: Author,
}

#[derive(Args)]
pub(in crate::cli) struct Resume {
    /// The run's number
    run: i64,
    /// Messages a second from now on; as before if left out
    #[arg(long, value_name = "R", value_parser = rate)]
    rate: Option<f64>,
    #[command(flatten)]
    author: Author,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text
        .parse()
        .map_err(|_| "messages a second, such as 50 or 0.5".to_owned())?;
    if rate.is_finite() && (0.001..=1_000_000.0).contains(&rate) {
        return Ok(rate);
    }
    Err("from 0.001 to 1000000 messages a second".into())
}

/// What a run came to, or has come to so far.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    run: &'a Run,
    /// Every message is judged, and as planned.
    as_planned: bool,
    came_to: &'a [Came],
    money: &'a [Moved],
}

pub(super) async fn run(context: &Context, wish: Replay) -> Result<Exit, Failure> {
    let store = context.store()?;
    let Some(plan) = store.plan(wish.plan).await? else {
        return Err(no_such_plan(wish.plan));
    };
    let messages = if wish.all_verdicts {
        i64::from(plan.messages)
    } else {
        plan.settled
    };
    if messages == 0 {
        return Err(Failure::refused(format!(
            "nothing of plan {} would settle: there is nothing to replay",
            plan.id
        ))
        .hint("--all-verdicts replays what would not settle, too"));
    }
    confirm(
        context,
        usize::try_from(messages).unwrap_or_default(),
        wish.yes,
        "replaying",
    )?;
    let operator = wish.author.operator.name();
    let filters = json!({"plan": plan.id, "canary": wish.canary, "rate": wish.rate, "allVerdicts": wish.all_verdicts});
    let act = Act {
        name: "replay",
        operator: &operator,
        why: Some(&wish.author.reason),
        filters: &filters,
    };
    let new = NewRun {
        plan: plan.id,
        canary: wish.canary,
        rate: wish.rate,
        all_verdicts: wish.all_verdicts,
    };
    let driver = driver(context);
    let Some(id) = context
        .patiently(async || store.begin_run(act, new, driver).await)
        .await?
    else {
        return Err(no_such_plan(wish.plan));
    };
    drive(context, &store, id, driver, act, wish.canary).await
}

fn driver(context: &Context) -> Driver {
    Driver {
        id: Uuid::new_v4(),
        lease: context.settings.dead_letters.driver_lease,
    }
}

/// Drives a run that is ours to its end, and says what came of it.
async fn drive(
    context: &Context,
    store: &Store,
    id: i64,
    driver: Driver,
    act: Act<'_>,
    canary: Option<i32>,
) -> Result<Exit, Failure> {
    let mut signals = Signals::new().map_err(|error| Failure::ours(format!("signals can not be caught: {error}")))?;
    let stalled = |failure: Failure| {
        failure.hint(format!(
            "run {id} goes on where it stands: `settled dead-letters runs resume {id} --reason ...`, which is refused until \
             the lease of this program, {:?}, is over",
            driver.lease
        ))
    };
    let mut watch = Watch::new(context, id);
    let settings = &context.settings.dead_letters;
    let canary = canary.map(i64::from);
    // Between two statements it may be dropped at any point: an open transaction is rolled back.
    let end = tokio::select! {
        ended = replay::drive(store, settings, id, driver, canary, |run, step| watch.see(run, step)) => {
            match ended.map_err(|error| stalled(error.into()))? {
                Ended::Over => Some((RunState::Done, None)),
                Ended::Stop(why) => Some((RunState::Stopped, Some(why))),
                Ended::Lost => None,
            }
        }
        name = signals.next() => Some((RunState::Cancelled, Some(format!("by {name}")))),
    };
    watch.finish();
    let Some((state, note)) = end else {
        return report(context, store, id).await;
    };
    let ending = Act {
        name: "replay ended",
        ..act
    };
    context
        .patiently(async || store.end_run(ending, id, driver.id, state, note.as_deref()).await)
        .await
        .map_err(|error| stalled(error.into()))?;
    report(context, store, id).await
}

/// What people see while a run goes on: a bar on a terminal, a line now and then elsewhere.
struct Watch {
    id: i64,
    bar: ProgressBar,
    told: Instant,
    /// A program that reads JSON is told nothing on the way.
    silent: bool,
    terminal: bool,
}

impl Watch {
    fn new(context: &Context, id: i64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            id,
            bar: progress(terminal && !context.out.json, "replaying", 0),
            told: Instant::now(),
            silent: context.out.json,
            terminal,
        }
    }

    fn see(&mut self, run: &Run, step: Step) {
        if self.silent {
            return;
        }
        let over = run.judged + run.skipped;
        self.bar.set_length(run.messages.unsigned_abs());
        self.bar.set_position(over.unsigned_abs());
        match step {
            Step::CanaryPassed => {
                let line = format!("run {}: the first {} came to what was planned", self.id, run.judged);
                self.bar.suspend(|| complain(&line));
            }
            Step::On if !self.terminal && self.told.elapsed() >= LINES => {
                self.told = Instant::now();
                complain(&format!("run {}: {over} of {} judged", self.id, run.messages));
            }
            Step::On => {}
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

async fn report(context: &Context, store: &Store, id: i64) -> Result<Exit, Failure> {
    let run = find(store, id).await?;
    let (came_to, money) = store.run_outcome(id).await?;
    let document = Document {
        run: &run,
        as_planned: run.judged == run.messages && run.differ == 0,
        came_to: &came_to,
        money: &money,
    };
    context.out.say(&document, |out| print(out, &document))?;
    Ok(if document.as_planned { Exit::Done } else { Exit::Partly })
}

async fn find(store: &Store, id: i64) -> Result<Run, Failure> {
    store.run(id).await?.ok_or_else(|| no_such_run(id))
}

fn no_such_run(id: i64) -> Failure {
    Failure::refused(format!("there is no run {id}")).hint("`settled dead-letters runs list` shows every run")
}

fn print(out: &Output, document: &Document<'_>) -> Result<(), Failure> {
    let run = document.run;
    let row = |came: &Came| {
        let what = match (&came.verdict, &came.reason, &came.note) {
            (Some(verdict), Some(reason), _) => format!("{verdict}, {reason}"),
            (Some(verdict), None, _) => verdict.clone(),
            (None, _, Some(note)) => format!("{}: {note}", came.state),
            (None, _, None) => came.state.clone(),
        };
        let mark = if came.verdict.as_ref() == Some(&came.planned) {
            "✓"
        } else {
            "✗"
        };
        vec![
            would(&came.planned).to_owned(),
            what,
            mark.to_owned(),
            came.messages.to_string(),
        ]
    };
    let header = ["planned", "came to", "", "messages"];
    out.numbers(&header, document.came_to.iter().map(row).collect(), "no message")?;
    for money in document.money {
        out.line(format!(
            "moved {} {} of {} planned",
            money.moved, money.currency, money.planned
        ))?;
    }
    let (mood, sentence) = if document.as_planned {
        (
            Mood::Good,
            format!(
                "run {} is done: {} messages came to what was planned",
                run.id, run.judged
            ),
        )
    } else {
        let note = run.note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default();
        (
            Mood::Bad,
            format!(
                "run {} is {}{note}: {} of {} judged, {} of them not as planned, {} skipped",
                run.id, run.state, run.judged, run.messages, run.differ, run.skipped
            ),
        )
    };
    out.line(out.coloured(mood, &sentence))?;
    if run.state != "done" {
        out.line(format!(
            "go on with: settled dead-letters runs resume {} --reason \"why\"",
            run.id
        ))?;
    }
    Ok(())
}

// Runs ---------------------------------------------------------------------------------------------------------------

pub(super) async fn runs(context: &Context, command: RunsCommand) -> Result<Exit, Failure> {
    match command {
        RunsCommand::List(question) => list(context, &question).await,
        RunsCommand::Show(question) => {
            let store = context.store()?;
            report(context, &store, question.run).await?;
            Ok(Exit::Done)
        }
        RunsCommand::Cancel(wish) => cancel(context, &wish).await,
        RunsCommand::Resume(wish) => resume(context, &wish).await,
    }
}

async fn list(context: &Context, question: &ListRuns) -> Result<Exit, Failure> {
    let store = context.store()?;
    let mut runs = store
        .runs(question.after.unwrap_or(i64::MAX), question.limit + 1)
        .await?;
    let more = cut(&mut runs, usize::try_from(question.limit).unwrap_or(usize::MAX));
    context.out.say(&runs, |out| {
        let row = |run: &Run| {
            vec![
                run.id.to_string(),
                run.plan.to_string(),
                run.state.to_owned(),
                rfc3339(run.started_at),
                run.operator.clone(),
                run.why.clone(),
                run.differ.to_string(),
                format!("{} of {}", run.judged, run.messages),
            ]
        };
        let header = [
            "run",
            "plan",
            "state",
            "started",
            "operator",
            "why",
            "not as planned",
            "judged",
        ];
        out.numbers(&header, runs.iter().map(row).collect(), "nothing was replayed yet")?;
        if let (true, Some(last)) = (more, runs.last()) {
            out.line(format!("there are more: --after {}", last.id))?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

async fn cancel(context: &Context, wish: &ActOnRun) -> Result<Exit, Failure> {
    let store = context.store()?;
    let operator = wish.author.operator.name();
    let filters = json!({"run": wish.run});
    let act = Act {
        name: "cancel",
        operator: &operator,
        why: Some(&wish.author.reason),
        filters: &filters,
    };
    match context
        .patiently(async || store.cancel_run(act, wish.run).await)
        .await?
    {
        Changed::From(_) => {}
        Changed::NoSuchRun => return Err(no_such_run(wish.run)),
        Changed::Refused(state, _) => {
            return Err(Failure::refused(format!(
                "run {} is {} already; nothing was changed",
                wish.run,
                state.as_str()
            )));
        }
    }
    report(context, &store, wish.run).await?;
    Ok(Exit::Done)
}

async fn resume(context: &Context, wish: &Resume) -> Result<Exit, Failure> {
    let store = context.store()?;
    let operator = wish.author.operator.name();
    let filters = json!({"run": wish.run, "rate": wish.rate});
    let act = Act {
        name: "resume",
        operator: &operator,
        why: Some(&wish.author.reason),
        filters: &filters,
    };
    let driver = driver(context);
    let was = match context
        .patiently(async || store.resume_run(act, wish.run, wish.rate, driver).await)
        .await?
    {
        Changed::From(state) => state,
        Changed::NoSuchRun => return Err(no_such_run(wish.run)),
        Changed::Refused(RunState::Running, until) => {
            let until = until.map(rfc3339).unwrap_or_default();
            return Err(
                Failure::refused(format!("run {} is driven by another program", wish.run)).hint(format!(
                    "it gave a sign of life that holds until {until}; if it is gone, try again after that, or cancel the run"
                )),
            );
        }
        Changed::Refused(state, _) => {
            return Err(Failure::refused(format!(
                "run {} is {}: there is nothing to go on with",
                wish.run,
                state.as_str()
            )));
        }
    };
    let run = find(&store, wish.run).await?;
    // Whoever goes on with a run that its canary stopped has seen what it came to.
    let is_judged = run.canary.is_some_and(|canary| run.judged >= i64::from(canary));
    let is_seen = is_judged && (was == RunState::Stopped || run.differ == 0);
    drive(context, &store, run.id, driver, act, run.canary.filter(|_| !is_seen)).await
}

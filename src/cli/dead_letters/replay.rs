//! `replay` and `runs`: what was planned is judged by the worker, with effect.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use indicatif::ProgressBar;

use super::{
    acts::{Author, consent},
    look::progress,
    plan::would,
};
use crate::{
    cli::{
        Context, Exit, Failure,
        output::{Mood, Output, complain},
    },
    desk::{self, Begun, Came, Desk, Run, RunNews, RunOutcome},
    domain::calendar::rfc3339,
    plain::counted,
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
    /// Also messages that were replayed dead_letters.max_replays times and are open again
    #[arg(long)]
    yes_again: bool,
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
    #[arg(long, value_name = "RUN", value_parser = crate::cli::cursor)]
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
    /// Also messages that other runs replayed meanwhile, dead_letters.max_replays times or more, and that are open again
    #[arg(long)]
    yes_again: bool,
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

impl Replay {
    pub(in crate::cli) fn typed(&self) -> desk::Replay {
        desk::Replay {
            plan: self.plan,
            canary: self.canary,
            rate: self.rate,
            all_verdicts: self.all_verdicts,
            yes_again: self.yes_again,
            author: self.author.typed(),
        }
    }
}

impl ActOnRun {
    pub(in crate::cli) fn typed(&self) -> desk::Cancel {
        desk::Cancel {
            run: self.run,
            author: self.author.typed(),
        }
    }
}

impl Resume {
    pub(in crate::cli) fn typed(&self) -> desk::Resume {
        desk::Resume {
            run: self.run,
            rate: self.rate,
            yes_again: self.yes_again,
            author: self.author.typed(),
        }
    }
}

pub(super) async fn run(context: &Context, wish: &Replay) -> Result<Exit, Failure> {
    let desk = context.desk()?;
    let replay = wish.typed();
    let messages = desk.replay_size(&replay).await?;
    let consent = consent(&desk, messages, wish.yes, "replaying")?;
    let begun = desk.begin(&replay, consent).await?;
    drive(context, &desk, &begun).await
}

/// Drives a run that is ours to its end, and says what came of it.
async fn drive(context: &Context, desk: &Desk, begun: &Begun) -> Result<Exit, Failure> {
    let mut signals = Signals::new().map_err(|error| Failure::ours(format!("signals can not be caught: {error}")))?;
    let mut watch = Watch::new(context, begun.run);
    let stop = async { format!("by {}", signals.next().await) };
    let outcome = desk.drive(begun, stop, |run, step| watch.see(run, step)).await;
    watch.finish();
    report(context, &outcome?)
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
            bar: progress(terminal && !context.out.json, "replaying"),
            told: Instant::now(),
            silent: context.out.json,
            terminal,
        }
    }

    fn see(&mut self, run: &Run, step: RunNews) {
        if self.silent {
            return;
        }
        let over = run.judged + run.skipped;
        self.bar.set_length(run.messages.unsigned_abs());
        self.bar.set_position(over.unsigned_abs());
        match step {
            RunNews::CanaryPassed => {
                let line = format!("run {}: the first {} came to what was planned", self.id, run.judged);
                self.bar.suspend(|| complain(&line));
            }
            RunNews::On if !self.terminal && self.told.elapsed() >= LINES => {
                self.told = Instant::now();
                complain(&format!("run {}: {over} of {} judged", self.id, run.messages));
            }
            RunNews::On => {}
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn report(context: &Context, outcome: &RunOutcome) -> Result<Exit, Failure> {
    context.out.say(outcome, |out| print(out, outcome))?;
    Ok(if outcome.as_planned { Exit::Done } else { Exit::Partly })
}

fn print(out: &Output, document: &RunOutcome) -> Result<(), Failure> {
    let run = &document.run;
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
    for money in &document.money {
        out.line(format!(
            "moved {} {} of {} planned",
            money.moved, money.currency, money.planned
        ))?;
    }
    let (mood, sentence) = if document.as_planned {
        (
            Mood::Good,
            format!(
                "run {} is done: {} came to what was planned",
                run.id,
                counted(run.judged, "message")
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
            report(context, &context.desk()?.outcome(question.run).await?)?;
            Ok(Exit::Done)
        }
        RunsCommand::Cancel(wish) => {
            report(context, &context.desk()?.cancel(&wish.typed()).await?)?;
            Ok(Exit::Done)
        }
        RunsCommand::Resume(wish) => {
            let desk = context.desk()?;
            let begun = desk.resume(&wish.typed()).await?;
            drive(context, &desk, &begun).await
        }
    }
}

async fn list(context: &Context, question: &ListRuns) -> Result<Exit, Failure> {
    let page = context.desk()?.runs(question.after, question.limit).await?;
    let runs = &page.items;
    context.out.say(runs, |out| {
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
        if let (true, Some(last)) = (page.more, runs.last()) {
            out.line(format!("there are more: --after {}", last.id))?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

//! `settled worker`.

use std::os::unix::process::CommandExt;

use super::{Context, Exit, Failure};
use crate::{broker, console::Beside, telemetry, worker};

/// What the allocator is told: jemalloc has four arenas a core by itself, and what is free in one is of no use to another. What is
/// free for a second goes back to the system when the arena is used next, since a worker is idle for longer than it is busy.
const ALLOCATOR: (&str, &str) = ("_RJEM_MALLOC_CONF", "narenas:4,dirty_decay_ms:1000,muzzy_decay_ms:0");

/// Runs until it is told to stop, with a console beside it where `beside` gives one.
pub(super) async fn run(
    context: &Context,
    beside: impl AsyncFnOnce(&Context) -> Result<Option<Beside>, Failure>,
) -> Result<Exit, Failure> {
    start_again_with_stack()?;
    telemetry::init(&context.settings.log, telemetry::stderr_is_terminal());
    let console = beside(context).await?;
    let worked = worker::run(&context.settings).await;
    if let Some(console) = console {
        console.stop().await;
    }
    worked?;
    Ok(Exit::Done)
}

/// Headers nested far deeper than anyone means need more stack than lapin's thread has by itself; only this variable sizes it,
/// and only from a process's start: so the process replaces itself once, with the variable set. So it is with [`ALLOCATOR`], unless
/// whoever started us chose otherwise.
pub(super) fn start_again_with_stack() -> Result<(), Failure> {
    let (name, value) = broker::STACK;
    if std::env::var_os(name).is_some() {
        return Ok(());
    }
    let program = std::env::current_exe()
        .map_err(|error| Failure::ours(format!("the path of this program is unknown: {error}")))?;
    let mut arguments = std::env::args_os();
    let mut again = std::process::Command::new(program);
    if let Some(called) = arguments.next() {
        again.arg0(called);
    }
    if std::env::var_os(ALLOCATOR.0).is_none() {
        again.env(ALLOCATOR.0, ALLOCATOR.1);
    }
    let error = again.args(arguments).env(name, value).exec();
    Err(Failure::ours(format!(
        "the program could not start itself with {name}={value}: {error}"
    )))
}

impl From<worker::WorkerFailure> for Failure {
    fn from(failure: worker::WorkerFailure) -> Self {
        match failure {
            worker::WorkerFailure::Config(error) => error.into(),
            worker::WorkerFailure::Setting(sentence) => Failure::usage(sentence),
            worker::WorkerFailure::Http(error) => Failure::usage(error.message()).hint(error.hint()),
            worker::WorkerFailure::Schema(sentence) | worker::WorkerFailure::Topology(sentence) => {
                Failure::refused(sentence).hint("`settled doctor` checks everything that the worker needs")
            }
            worker::WorkerFailure::Loss(sentence) => Failure::refused(sentence).hint(
                "take the newest database, if there is one; `settled recover` says what is missing, and goes on without it once \
                 two people accept that",
            ),
            worker::WorkerFailure::Ours(sentence) => Failure::ours(sentence),
        }
    }
}

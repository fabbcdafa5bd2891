//! What is fast, measured beside what a user would otherwise write: `make bench`. How to run it, what each section does
//! and what it does not show stands in `benches/README.md`.

mod chart;
mod contestant;
mod drain;
mod figures;
mod floor;
mod latency;
mod machine;
mod per_message;
mod place;
mod processes;
mod progress;
mod receiver;
mod report;
mod sections;
mod traffic;

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, ValueEnum};

use crate::{place::Services, report::Report, sections::Run};

/// What goes wrong ends the run: there is nothing to handle, only something to say.
pub(crate) type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Started with this as its only argument, this program is the per-message worker.
pub(crate) const PER_MESSAGE: &str = "per-message";

/// Measure the worker beside others, and write target/bench/summary.json
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    /// Drain, 100/s latency and 10 % rejects only, with less of each: under four minutes
    #[arg(long)]
    quick: bool,
    /// A short drain against the per-message worker; fails unless it is this many times as fast
    #[arg(long, value_name = "TIMES", conflicts_with_all = ["quick", "only"])]
    guard: Option<f64>,
    /// Only these sections
    #[arg(long, value_delimiter = ',', value_name = "SECTION")]
    only: Vec<Section>,
    /// Interleaved rounds of each section
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Also measure these workers of `benches/peers`, installing what they need
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    peers: Vec<String>,
    /// Another build of the worker, measured as "baseline" in every round of the drain
    #[arg(long, value_name = "PROGRAM")]
    baseline: Option<PathBuf>,
    /// Messages that wait in the section memory
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    backlog: usize,
    /// Millions of receipts, and of ledger entries, in the section age
    #[arg(long, value_name = "MILLIONS", default_value_t = 10)]
    history: u64,
    /// Said by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// A part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Section {
    /// The worker against others
    Drain,
    /// From publication to event, at fixed rates
    Latency,
    /// 10 % and 50 % refused
    Rejects,
    /// Every message twice
    Duplicates,
    /// Everything on one connection
    Hot,
    /// One, two and three processes
    Workers,
    /// `events.format = "batched"`
    Batched,
    /// Traces of one batch in a hundred, and of none
    Traces,
    /// A million messages waiting
    Memory,
    /// Ten million receipts and ledger entries already there
    Age,
}

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench: the async runtime could not be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        if std::env::args().nth(1).as_deref() == Some(PER_MESSAGE) {
            per_message::run().await?;
            return Ok(ExitCode::SUCCESS);
        }
        measure(Arguments::parse()).await
    });
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(arguments: Arguments) -> Fallible<ExitCode> {
    let directory = output();
    let logs = directory.join("logs");
    fs::create_dir_all(&logs)?;
    let services = Services::open().await?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut report = Report::new();
    machine::describe(&services, &mut report).await?;
    let measured = {
        let mut run = Run::new(&services, &logs, &mut report, &arguments);
        tokio::select! {
            measured = run.all() => measured,
            interrupted = tokio::signal::ctrl_c() => Err(interrupted.map_or_else(Into::into, |()| "interrupted".into())),
            _ = terminate.recv() => Err("terminated".into()),
        }
    };
    let cleared = services.clear().await;
    let code = measured?;
    cleared?;
    report.write(&directory)?;
    Ok(code)
}

/// `target/bench`, wherever the target directory is.
fn output() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench")
}

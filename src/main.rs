//! `settled`: parse the command line, load the settings, call one command. See [`settled::cli`].

use std::process::ExitCode;

use settled::cli::Cli;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(refusal) => return refusal.tell(),
    };
    let json = cli.wants_json();
    // Whatever lapin's are given. An unoptimised build needs more than four megabytes for a batch; only what is used counts.
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_stack_size(16 << 20)
        .max_blocking_threads(32)
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = settled::cli::Failure::ours(format!("the async runtime could not be started: {error}"));
            return failure.tell(json);
        }
    };
    let outcome = runtime.block_on(cli.run());
    // What a command left behind (a reader of stdin, a connection that says good-bye) must not hold up its exit.
    runtime.shutdown_background();
    match outcome {
        Ok(exit) => exit.into(),
        Err(failure) => failure.tell(json),
    }
}

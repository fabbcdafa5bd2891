//! What is fast, measured beside what a user would otherwise write.

mod per_message;

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("per-message") {
        eprintln!("usage: bench per-message");
        return ExitCode::from(2);
    }
    match per_message::run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

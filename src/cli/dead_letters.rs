//! `settled dead-letters ...`: the operator's desk.

mod collect;

use clap::Subcommand;

use super::{Context, Exit, Failure};

#[derive(Subcommand)]
pub(super) enum DeadLettersCommand {
    /// Move dead letters from their queue to the database until the queue is empty
    Collect(collect::Collect),
}

pub(super) async fn run(context: &Context, command: DeadLettersCommand) -> Result<Exit, Failure> {
    match command {
        DeadLettersCommand::Collect(wish) => collect::run(context, &wish).await,
    }
}

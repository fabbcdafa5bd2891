//! `settled dead-letters ...`: the operator's desk.

pub(super) mod acts;
mod collect;
mod filters;
mod look;
mod plan;
mod replay;

use clap::Subcommand;

#[cfg(test)]
pub(super) use self::{plan::OfPlan, replay::RunsCommand};
use super::{Context, Exit, Failure};
use crate::desk::StateChange;

#[derive(Subcommand)]
pub(super) enum DeadLettersCommand {
    /// Move dead letters from their queue to the database until the queue is empty
    Collect(collect::Collect),
    /// Refused messages, the oldest first
    List(look::List),
    /// One message: why, what the partner was told, what it must do, and what was done here
    Show(look::Show),
    /// What is wrong, by partner, reason and kind of detail, the largest group first
    Groups(look::Groups),
    /// How many there are, by state, reason and partner
    Stats(look::Stats),
    /// Freeze a selection and judge it again, without effect
    Plan(plan::PlanQuestion),
    /// Have the messages of a plan judged again by the worker, with effect
    Replay(replay::Replay),
    /// Replays: look at them, cancel one, go on with one
    #[command(subcommand)]
    Runs(replay::RunsCommand),
    /// Be done with messages; they are kept and can be restored
    #[command(after_help = "\
Messages are selected by filters or by a plan. Discarded ones are kept: they are not listed, planned or counted as open,
and `restore` opens them again. So does a new failure of the same message.")]
    Discard(acts::Change),
    /// Open discarded messages again
    Restore(acts::Change),
    /// Messages with their bodies, as NDJSON
    Export(look::Export),
    /// Delete for ever what was discarded before a time
    Purge(acts::Purge),
}

pub(super) async fn run(context: &Context, command: DeadLettersCommand) -> Result<Exit, Failure> {
    match command {
        DeadLettersCommand::Collect(wish) => collect::run(context, &wish).await,
        DeadLettersCommand::List(question) => look::list(context, &question).await,
        DeadLettersCommand::Show(question) => look::show(context, &question).await,
        DeadLettersCommand::Groups(question) => look::groups(context, &question).await,
        DeadLettersCommand::Stats(question) => look::stats(context, &question).await,
        DeadLettersCommand::Plan(wish) => plan::run(context, &wish).await,
        DeadLettersCommand::Replay(wish) => replay::run(context, &wish).await,
        DeadLettersCommand::Runs(command) => replay::runs(context, command).await,
        DeadLettersCommand::Discard(wish) => acts::change(context, StateChange::Discard, &wish).await,
        DeadLettersCommand::Restore(wish) => acts::change(context, StateChange::Restore, &wish).await,
        DeadLettersCommand::Export(wish) => look::export(context, &wish).await,
        DeadLettersCommand::Purge(wish) => acts::purge(context, &wish).await,
    }
}

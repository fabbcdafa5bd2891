//! `settled api`.

use super::{Context, Exit, Failure, worker::start_again_with_stack};
use crate::{api, telemetry};

/// Answers until it is told to stop.
pub(super) async fn run(context: &Context) -> Result<Exit, Failure> {
    // It consumes, as the worker does.
    start_again_with_stack()?;
    telemetry::init(&context.settings.log, telemetry::stderr_is_terminal());
    api::run(&context.settings).await?;
    Ok(Exit::Done)
}

impl From<api::Failure> for Failure {
    fn from(failure: api::Failure) -> Self {
        match failure {
            api::Failure::Config(error) => error.into(),
            api::Failure::Setting(sentence) => Failure::usage(sentence),
            api::Failure::Http(error) => Failure::usage(error.message()).hint(error.hint()),
            api::Failure::Desk(refusal) => refusal.into(),
            api::Failure::Ours(sentence) => Failure::ours(sentence),
        }
    }
}

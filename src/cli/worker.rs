//! `settled worker`.

use super::{Context, Exit, Failure};
use crate::{telemetry, worker};

/// Runs until it is told to stop.
pub(super) async fn run(context: &Context) -> Result<Exit, Failure> {
    telemetry::init(&context.settings.log, telemetry::stderr_is_terminal());
    worker::run(&context.settings).await?;
    Ok(Exit::Done)
}

impl From<worker::Failure> for Failure {
    fn from(failure: worker::Failure) -> Self {
        match failure {
            worker::Failure::Config(error) => error.into(),
            worker::Failure::Setting(sentence) => Failure::usage(sentence),
            worker::Failure::Http(error) => Failure::usage(error.message()).hint(error.hint()),
            worker::Failure::Schema(sentence) | worker::Failure::Topology(sentence) => {
                Failure::refused(sentence).hint("`settled doctor` checks everything that the worker needs")
            }
            worker::Failure::Ours(sentence) => Failure::ours(sentence),
        }
    }
}

//! `settled console`.

use clap::Args;
use serde_json::json;

use super::{Context, Exit, Failure, dead_letters::acts::Operator, doctor, output::complain};
use crate::{
    console::{self, ConsoleFailure, ConsoleNews, Examined, Starter},
    telemetry,
};

#[derive(Args)]
#[command(after_help = "\
It prints a link that lets whoever opens it in, once, under the operator's name; then another one. With
console.proxy_secret_file a proxy says who asks, and no link lets anybody in.")]
pub(super) struct Console {
    #[command(flatten)]
    operator: Operator,
}

/// Answers until it is told to stop.
pub(super) async fn run(context: &Context, wish: &Console) -> Result<Exit, Failure> {
    telemetry::init(&context.settings.log, telemetry::stderr_is_terminal());
    let (settings, json) = (context.settings.clone(), context.out.json);
    let starter = Starter {
        operator: wish.operator.name(),
        examine: Box::new(move || {
            let settings = settings.clone();
            Box::pin(async move { doctor::checks(&settings).await.into_iter().map(examined).collect() })
        }),
        tell: Box::new(move |news| tell(news, json)),
    };
    console::run(&context.settings, starter).await?;
    Ok(Exit::Done)
}

/// The link goes to stdout, where whoever started the program sees it, and into no log.
fn tell(news: &ConsoleNews, json: bool) {
    let line = match (news, json) {
        (ConsoleNews::Listens { url }, true) => json!({ "listens": url }).to_string(),
        (ConsoleNews::Link { url }, true) => json!({ "link": url }).to_string(),
        (ConsoleNews::Listens { url }, false) => format!("the console listens behind its proxy: {url}"),
        (ConsoleNews::Link { url }, false) => format!("open once: {url}"),
    };
    let out = super::output::Output::new(json);
    if let Err(failure) = out.write(&format!("{line}\n")) {
        complain(failure.message());
    }
}

/// A line of the doctor's, for a page.
fn examined(check: doctor::Check) -> Examined {
    Examined {
        name: check.name,
        ok: check.ok,
        detail: check.detail,
        hint: check.hint,
    }
}

impl From<ConsoleFailure> for Failure {
    fn from(failure: ConsoleFailure) -> Self {
        match failure {
            ConsoleFailure::Setting(sentence) => Failure::usage(sentence),
            ConsoleFailure::Http(error) => Failure::usage(error.message()).hint(error.hint()),
            ConsoleFailure::Desk(refusal) => refusal.into(),
            ConsoleFailure::Ours(sentence) => Failure::ours(sentence),
        }
    }
}

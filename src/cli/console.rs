//! `settled console`.

use std::net::{Ipv4Addr, Ipv6Addr};

use clap::Args;
use serde_json::json;

use super::{Context, Exit, Failure, dead_letters::acts::Operator, doctor, output::complain};
use crate::{
    config::{Secret, Settings},
    console::{self, Beside, ConsoleFailure, ConsoleNews, Examined, Starter},
    telemetry,
};

#[derive(Args)]
#[command(after_help = "\
It prints a link that lets whoever opens it in, once, under the operator's name; then another one. Where a proxy
(console.proxy_secret_file, console.proxy_ca_file) or an issuer (console.oidc_issuer) signs people in, no link does.")]
pub(super) struct Console {
    #[command(flatten)]
    operator: Operator,
}

/// Answers until it is told to stop.
pub(super) async fn run(context: &Context, wish: &Console) -> Result<Exit, Failure> {
    telemetry::init(&context.settings.log, telemetry::stderr_is_terminal());
    let settings = with_own_login(&context.settings)?;
    console::run(&settings, starter(&settings, wish.operator.name(), context.out.json)).await?;
    Ok(Exit::Done)
}

/// The console beside a worker, where the settings want one.
pub(super) async fn beside_worker(context: &Context) -> Result<Option<Beside>, Failure> {
    if !context.settings.console.in_worker {
        return Ok(None);
    }
    let mut settings = with_own_login(&context.settings)?;
    if settings.console.workers.is_empty() && settings.http.listen.port() != 0 {
        let mut own = settings.http.listen;
        if own.ip().is_unspecified() {
            own.set_ip(if own.is_ipv4() {
                Ipv4Addr::LOCALHOST.into()
            } else {
                Ipv6Addr::LOCALHOST.into()
            });
        }
        settings.console.workers.push(own);
    }
    let starter = starter(&settings, Operator::default().name(), context.out.json);
    Ok(Some(console::beside(&settings, starter).await?))
}

fn starter(settings: &Settings, operator: String, json: bool) -> Starter {
    let settings = settings.clone();
    Starter {
        operator,
        examine: Box::new(move || {
            let settings = settings.clone();
            Box::pin(async move { doctor::checks(&settings).await.into_iter().map(examined).collect() })
        }),
        tell: Box::new(move |news| tell(news, json)),
    }
}

/// The settings as the console has them: with a login of its own, if it has one.
fn with_own_login(settings: &Settings) -> Result<Settings, Failure> {
    let mut settings = settings.clone();
    if let Some(file) = &settings.console.database_url_file {
        let wrong = |why: String| Failure::usage(format!("console.database_url_file: {}: {why}", file.display()));
        let text = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
        let url = text.trim();
        if url.is_empty() {
            return Err(wrong("it is empty".to_owned()));
        }
        settings.database.url = Secret::new(url);
    }
    Ok(settings)
}

/// The link goes to stdout, where whoever started the program sees it, and into no log.
fn tell(news: &ConsoleNews, json: bool) {
    let line = match (news, json) {
        (ConsoleNews::Listens { url }, true) => json!({ "listens": url }).to_string(),
        (ConsoleNews::Link { url }, true) => json!({ "link": url }).to_string(),
        (ConsoleNews::Listens { url }, false) => format!("the console listens: {url}"),
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

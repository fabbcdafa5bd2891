//! `settled console`.

use std::{
    fs::OpenOptions,
    io::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use clap::Args;
use serde_json::json;

use super::{Context, Exit, Failure, dead_letters::acts::Operator, doctor, output::complain};
use crate::{
    config::{Secret, Settings},
    console::{self, Beside, ConsoleFailure, ConsoleNews, Examined, ExaminedPart, Starter},
    telemetry::{self, Signal},
};

#[derive(Args)]
#[command(after_help = "\
It prints a link that lets whoever opens it in, once, under the operator's name; then another one; or writes it to
console.link_file, for its owner alone. Where a proxy
(console.proxy_secret_file, console.proxy_ca_file) or an issuer (console.oidc_issuer) signs people in, no link does.")]
pub(super) struct Console {
    #[command(flatten)]
    operator: Operator,
}

/// Answers until it is told to stop.
pub(super) async fn run(context: &Context, wish: &Console) -> Result<Exit, Failure> {
    telemetry::init(&context.settings.log, telemetry::stderr_is_terminal());
    let settings = with_own_login(&context.settings)?;
    let starter = starter(&settings, wish.operator.name(), context.out.json);
    console::run(&settings, starter).await?;
    Ok(Exit::Done)
}

/// The console beside a worker, where the settings want one.
pub(super) async fn beside_worker(context: &Context) -> Result<Option<Beside>, Failure> {
    if !context.settings.console.in_worker {
        if context.settings.console.listen_is_set {
            Signal::ConsoleNotOpened.emit();
        }
        return Ok(None);
    }
    let mut settings = with_own_login(&context.settings)?;
    let console = &settings.console;
    let is_signed_in =
        console.proxy_secret_file.is_some() || console.proxy_ca_file.is_some() || !console.oidc_issuer.is_empty();
    // Another address than loopback has no link at all.
    let is_by_link = !is_signed_in && console.listen.ip().to_canonical().is_loopback();
    if is_by_link && console.link_file.is_none() {
        return Err(Failure::usage(
            "console.in_worker is on, and nobody signs people in: the one-time link would go to the worker's output, and so into \
             its log. Set console.link_file, console.oidc_issuer or a proxy (console.proxy_secret_file, console.proxy_ca_file)",
        ));
    }
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
    let link_file = settings.console.link_file.clone();
    Starter {
        operator,
        examine: Box::new(move || {
            let known = examined(doctor::known(&settings));
            let store = doctor::store_of(&settings);
            let (of_database, of_broker) = ((settings.clone(), store.clone()), (settings.clone(), store));
            let all = |checks: Vec<doctor::Check>| -> Vec<Examined> { checks.into_iter().map(examined).collect() };
            vec![
                ExaminedPart {
                    name: "settings",
                    look: Box::pin(async move { vec![known] }),
                },
                ExaminedPart {
                    name: "database",
                    look: Box::pin(async move { all(doctor::of_database(&of_database.0, &of_database.1).await) }),
                },
                ExaminedPart {
                    name: "broker",
                    look: Box::pin(async move { all(doctor::of_broker(&of_broker.0, &of_broker.1).await) }),
                },
            ]
        }),
        tell: Box::new(move |news| tell(news, link_file.as_deref(), json)),
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

/// The link goes to a file that its owner alone can read, or to stdout, where whoever started the program sees it; and into no log.
fn tell(news: &ConsoleNews, link_file: Option<&Path>, json: bool) {
    let line = match (news, link_file) {
        (ConsoleNews::Link { url }, Some(file)) => {
            if let Err(error) = keep_secret(file, url) {
                return complain(&format!("console.link_file: {}: {error}", file.display()));
            }
            match json {
                true => json!({ "linkFile": file }).to_string(),
                false => format!("open once what stands in {}", file.display()),
            }
        }
        (ConsoleNews::Listens { url }, _) if json => json!({ "listens": url }).to_string(),
        (ConsoleNews::Link { url }, None) if json => json!({ "link": url }).to_string(),
        (ConsoleNews::Listens { url }, _) => format!("the console listens: {url}"),
        (ConsoleNews::Link { url }, None) => format!("open once: {url}"),
    };
    let out = super::output::Output::new(json);
    if let Err(failure) = out.write(&format!("{line}\n")) {
        complain(failure.message());
    }
}

/// A file of its own beside it takes its place, so that nobody who has the old one open reads the new one.
fn keep_secret(file: &Path, text: &str) -> std::io::Result<()> {
    let mut name = file.as_os_str().to_owned();
    name.push(".new");
    let fresh = Path::new(&name);
    match std::fs::remove_file(fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut open = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(fresh)?;
    open.write_all(format!("{text}\n").as_bytes())?;
    open.sync_all()?;
    std::fs::rename(fresh, file)
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

//! `settled partner-kit`: what a partner's developer tries before there is a broker. It asks nobody and changes nothing.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Exit, Failure,
    explain::body,
    output::{Mood, Output, plain},
};
use crate::{
    domain::signature::{KeyError, PublicKey},
    partner::{
        lint::{Check, LintedMessage, lint},
        vectors::{signed_body, test_key, vectors},
    },
};

#[derive(Subcommand)]
pub(super) enum PartnerKitCommand {
    /// Look at a message field by field: digest, recovered key, what each check saw and what to do
    Lint(Lint),
    /// Sign a message's fields with a test key and print the body
    Sign(Sign),
    /// Signed messages, right and wrong ones, with what must come of each
    Vectors,
}

#[derive(Args)]
#[command(
    after_help = "Exit 0 if nothing is wrong, else 1. What needs the registry or the books is said by `settled explain`."
)]
pub(super) struct Lint {
    /// The message's body, byte for byte; stdin if - or left out
    file: Option<PathBuf>,
    /// The routing key it is published under
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    routing_key: Option<String>,
    /// The AMQP property `content_type`
    #[arg(long, value_name = "TYPE", allow_hyphen_values = true)]
    content_type: Option<String>,
    /// The key that the partner has registered: xpub, tpub or 33 bytes in hexadecimal; may be repeated
    #[arg(long, value_name = "KEY")]
    public_key: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "\
The key is the SHA-256 of `settled test key: NAME`, which anybody can make: register it only where nothing is of worth. No
other key is taken, so that none that is worth something is ever typed here.")]
pub(super) struct Sign {
    /// The fields as a JSON object, without payload and signature; stdin if - or left out
    file: Option<PathBuf>,
    /// The name that makes the key
    #[arg(long, value_name = "NAME", default_value = "alice")]
    test_key: String,
}

pub(super) fn run(out: &Output, command: PartnerKitCommand) -> Result<Exit, Failure> {
    match command {
        PartnerKitCommand::Lint(wish) => look(out, wish),
        PartnerKitCommand::Sign(wish) => sign(out, wish),
        PartnerKitCommand::Vectors => {
            // For programs either way.
            out.document(&vectors())?;
            Ok(Exit::Done)
        }
    }
}

fn look(out: &Output, wish: Lint) -> Result<Exit, Failure> {
    let keys: Result<Vec<PublicKey>, KeyError> = wish
        .public_key
        .iter()
        .map(|key| PublicKey::from_xpub_or_hex(key))
        .collect();
    let keys = keys.map_err(|why| Failure::usage(format!("--public-key: {why}")))?;
    let body = body(wish.file)?;
    let report = lint(&LintedMessage {
        body: &body,
        routing_key: wish.routing_key.as_deref(),
        content_type: wish.content_type.as_deref(),
        keys: &keys,
        now: jiff::Timestamp::now(),
    });
    out.say(&report, |out| {
        let width = report.checks.iter().map(|check| check.name.chars().count()).max();
        for check in &report.checks {
            tell(out, check, width.unwrap_or_default())?;
        }
        for (name, value) in [
            ("message digest", Some(&report.message_digest)),
            ("payload digest", report.payload_digest.as_ref()),
            ("signed digest", report.signed_digest.as_ref()),
            ("recovered key", report.recovered_key.as_ref()),
        ] {
            out.line(format!("{name}  {}", value.map_or("-", String::as_str)))?;
        }
        let (mood, sentence) = if report.ok {
            (Mood::Good, "nothing is wrong with the message by itself")
        } else {
            (Mood::Bad, "the message would be refused")
        };
        out.line(out.coloured(mood, sentence))
    })?;
    Ok(if report.ok { Exit::Done } else { Exit::Failed })
}

fn tell(out: &Output, check: &Check, width: usize) -> Result<(), Failure> {
    let mark = match check.ok {
        Some(true) => out.coloured(Mood::Good, "ok   "),
        Some(false) => out.coloured(Mood::Bad, "WRONG"),
        None => out.coloured(Mood::Dim, "-    "),
    };
    let (name, saw) = (plain(&check.name), plain(&check.saw));
    out.line(format!("{mark}  {name:width$}  {saw}"))?;
    let Some(todo) = &check.todo else {
        return Ok(());
    };
    let reason = check.reason.map_or_else(String::new, |reason| format!("{reason}: "));
    out.line(format!("{:width$}  {reason}{}", "", plain(todo), width = width + 7))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Signed<'a> {
    public_key: String,
    body: &'a str,
}

fn sign(out: &Output, wish: Sign) -> Result<Exit, Failure> {
    let key = test_key(&wish.test_key);
    let signed = signed_body(&body(wish.file)?, &key).map_err(|error| {
        Failure::usage(format!("the fields are no JSON object: {error}"))
            .hint("give the object that is to be signed, such as {\"status\":\"cleared\", ..}; docs/partners.md lists the fields")
    })?;
    let answer = Signed {
        public_key: key.public_key().to_hex(),
        body: &signed,
    };
    out.say(&answer, |out| out.write(&signed))?;
    Ok(Exit::Done)
}

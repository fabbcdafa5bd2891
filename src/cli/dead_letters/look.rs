//! `list`, `show`, `groups`, `stats` and `export`: what there is.

use std::{io::IsTerminal, ops::ControlFlow};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use uuid::Uuid;

use super::{acts::Operator, filters::Looking};
use crate::{
    cli::{
        Context, Exit, Failure,
        output::{Output, complain, plain},
        sealed::Sealed,
    },
    desk::{self, AuditRecord, ByPartner, ByReason, DeadLetter, FullLetter, Group, LetterName, Replayed},
    domain::{calendar::rfc3339, dead_letter::MadeBy},
    plain::{brief, counted},
};

// List ---------------------------------------------------------------------------------------------------------------

#[derive(Args)]
#[command(
    after_help = "With --json one line each (NDJSON). The field cursor says where the next page begins: --after."
)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    filters: Looking,
    /// So many at most
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
    /// Go on after this cursor
    #[arg(long, default_value_t = 0, value_name = "CURSOR")]
    after: i64,
}

pub(super) async fn list(context: &Context, question: &List) -> Result<Exit, Failure> {
    let which = question.filters.which();
    let page = context.desk()?.letters(&which, question.after, question.limit).await?;
    let found = &page.items;
    if context.out.json {
        for dead_letter in found {
            context.out.document(dead_letter)?;
        }
        return Ok(Exit::Done);
    }
    let row = |dead_letter: &DeadLetter| {
        vec![
            short(dead_letter.id),
            rfc3339(dead_letter.last_failed_at),
            dead_letter.enterprise_id.clone().unwrap_or_else(|| "-".to_owned()),
            if dead_letter.made_by == MadeBy::Unknown.as_str() {
                format!("{}, made by unknown", dead_letter.why.reason)
            } else {
                dead_letter.why.reason.to_string()
            },
            dead_letter.nonce.clone().unwrap_or_else(|| "-".to_owned()),
            dead_letter.state.clone(),
            dead_letter.times_seen.to_string(),
        ]
    };
    let header = ["id", "failed last", "partner", "reason", "nonce", "state", "seen"];
    context
        .out
        .numbers(&header, found.iter().map(row).collect(), "no dead letter")?;
    if let (true, Some(last)) = (page.more, found.last()) {
        context.out.line(format!("there are more: --after {}", last.cursor))?;
    }
    Ok(Exit::Done)
}

/// The head of an id: enough for `show` among a million.
fn short(id: Uuid) -> String {
    id.to_string().chars().take(13).collect()
}

// Show ---------------------------------------------------------------------------------------------------------------

#[derive(Args)]
pub(in crate::cli) struct Show {
    /// Its id, the beginning of it (4 digits or more), or the SHA-256 of the message
    id: String,
    /// With the message itself; who looked at it stands in the audit
    #[arg(long)]
    body: bool,
    #[command(flatten)]
    operator: Operator,
}

pub(super) async fn show(context: &Context, question: &Show) -> Result<Exit, Failure> {
    let named = LetterName::parse(&question.id)?;
    let operator = question.body.then(|| question.operator.name());
    let shown = context.desk()?.letter(&named, operator.as_deref()).await?;
    context.out.say(&shown, |out| print(out, &shown))?;
    Ok(Exit::Done)
}

fn print(out: &Output, shown: &FullLetter) -> Result<(), Failure> {
    let dead_letter = &shown.dead_letter;
    let why = &dead_letter.why;
    let again = if why.is_final {
        "final: the same bytes can never settle"
    } else {
        "not final: the same bytes may settle later"
    };
    let made_by = match dead_letter.made_by.as_str() {
        "settled" => "the worker's verdict",
        "broker" => "the broker, by itself",
        _ => "unknown: no worker and no broker put it into settlement.dead; left out of plans unless --made-by unknown",
    };
    let allocation = match (dead_letter.allocation_id, &shown.allocation) {
        (None, _) => None,
        (Some(id), None) => Some(format!("{id}, not reserved here")),
        (Some(id), Some(allocation)) => Some(format!(
            "{id}, {} of {} {}, {} now",
            allocation.kind.as_str(),
            allocation.amount.quantity,
            allocation.amount.currency,
            allocation.status.as_str()
        )),
    };
    let rows = [
        ("id", Some(dead_letter.id.to_string())),
        ("state", Some(dead_letter.state.clone())),
        ("reason", Some(format!("{} (class {}; {again})", why.reason, why.class))),
        ("detail", Some(why.detail.clone())),
        ("recovered key", shown.recovered_key.clone()),
        ("refused by", Some(made_by.to_owned())),
        ("partner", dead_letter.enterprise_id.clone()),
        ("nonce", dead_letter.nonce.clone()),
        ("allocation", allocation),
        ("routing key", Some(dead_letter.routing_key.clone())),
        (
            "broker user",
            shown
                .properties
                .as_ref()
                .and_then(|properties| properties.user_id.clone()),
        ),
        (
            "message",
            Some(match dead_letter.body_bytes_kept {
                None => format!("{}, {} bytes", dead_letter.message_digest, dead_letter.body_bytes),
                Some(kept) if kept == dead_letter.body_bytes => {
                    format!("{}, {kept} bytes, kept without its headers", dead_letter.message_digest)
                }
                Some(kept) => format!(
                    "{}, {} bytes, of which the first {kept} are kept",
                    dead_letter.message_digest, dead_letter.body_bytes
                ),
            }),
        ),
        ("group", Some(dead_letter.group.clone())),
        ("failed first", Some(rfc3339(dead_letter.first_failed_at))),
        ("failed last", Some(rfc3339(dead_letter.last_failed_at))),
        ("seen", Some(times(dead_letter.times_seen))),
        ("discarded", dead_letter.discarded_at.map(rfc3339)),
        ("note", dead_letter.note.clone()),
        (
            "partner was told",
            Some(match &shown.told {
                Some(told) => format!("{} {}", told.kind, told.event_id),
                None => "nothing: nobody judged it".to_owned(),
            }),
        ),
    ];
    let rows = rows
        .into_iter()
        .filter_map(|(field, value)| Some(vec![field.to_owned(), value?]));
    out.table(&["field", "value"], rows.collect(), "")?;
    if let Some(advice) = shown.advice {
        out.line(format!("\nwhat the partner must do: {advice}"))?;
    }
    if let Some(advice) = shown.operator_advice {
        out.line(format!("what you can do: {advice}"))?;
    }
    if !shown.replays.is_empty() {
        out.line("")?;
        let row = |replay: &Replayed| {
            let came = match (&replay.verdict, &replay.reason, &replay.note) {
                (Some(verdict), Some(reason), _) => format!("{verdict}, {reason}"),
                (Some(verdict), None, _) => verdict.clone(),
                (None, _, Some(note)) => format!("{}: {note}", replay.state),
                (None, _, None) => replay.state.clone(),
            };
            vec![
                replay.run.to_string(),
                replay.judged_at.map_or_else(|| "-".to_owned(), rfc3339),
                replay.operator.clone(),
                replay.why.clone(),
                replay.planned.clone(),
                came,
            ]
        };
        let header = ["run", "judged", "operator", "why", "planned", "came to"];
        out.table(&header, shown.replays.iter().map(row).collect(), "")?;
    }
    if !shown.acts.is_empty() {
        out.line("")?;
        let row = |act: &AuditRecord| {
            vec![
                act.id.to_string(),
                rfc3339(act.at),
                act.operator.clone(),
                act.act.clone(),
                act.why.clone().unwrap_or_default(),
                brief(&act.outcome),
            ]
        };
        let header = ["audit", "at", "operator", "act", "why", "outcome"];
        out.table(&header, shown.acts.iter().map(row).collect(), "")?;
    }
    match &shown.body {
        None => Ok(()),
        Some(body) if body.body_encoding == "utf-8" => {
            out.line("\nbody, as text:")?;
            out.line(plain(&body.body))
        }
        Some(body) => {
            out.line("\nbody, in base64, since it is no text:")?;
            out.line(&body.body)
        }
    }
}

fn times(count: i64) -> String {
    match count {
        1 => "once".to_owned(),
        count => format!("{count} times"),
    }
}

// Groups and stats ---------------------------------------------------------------------------------------------------

#[derive(Args)]
pub(in crate::cli) struct Groups {
    #[command(flatten)]
    filters: Looking,
    /// So many at most, the largest first
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
}

pub(super) async fn groups(context: &Context, question: &Groups) -> Result<Exit, Failure> {
    let document = context
        .desk()?
        .groups(&question.filters.which(), question.limit)
        .await?;
    let (groups, total) = (&document.groups, document.total);
    context.out.say(&document, |out| {
        let row = |group: &Group| {
            vec![
                group.group.clone(),
                group.enterprise_id.clone().unwrap_or_else(|| "-".to_owned()),
                group.why.reason.to_string(),
                rfc3339(group.first_failed_at),
                rfc3339(group.last_failed_at),
                group.why.detail.clone(),
                group.messages.to_string(),
            ]
        };
        let header = [
            "group",
            "partner",
            "reason",
            "first",
            "last",
            "example of the detail",
            "messages",
        ];
        out.numbers(&header, groups.iter().map(row).collect(), "no dead letter")?;
        for group in groups {
            if let Some(key) = &group.recovered_key {
                out.line(format!("{}: the example was signed by the key {key}", group.group))?;
            }
        }
        let shown = i64::try_from(groups.len()).unwrap_or(i64::MAX);
        if total > shown {
            out.line(format!("and {} smaller groups: --limit", total - shown))?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

#[derive(Args)]
pub(in crate::cli) struct Stats {
    #[command(flatten)]
    filters: Looking,
}

pub(super) async fn stats(context: &Context, question: &Stats) -> Result<Exit, Failure> {
    let document = context.desk()?.stats(&question.filters.which()).await?;
    context.out.say(&document, |out| {
        let row = |line: &ByReason| {
            vec![
                line.state.clone(),
                line.reason.to_string(),
                if line.is_final { "final" } else { "worth replaying" }.to_owned(),
                line.first_failed_at.clone(),
                line.last_failed_at.clone(),
                line.messages.to_string(),
            ]
        };
        let header = ["state", "reason", "", "first", "last", "messages"];
        out.numbers(&header, document.reasons.iter().map(row).collect(), "no dead letter")?;
        if document.partners.is_empty() {
            return Ok(());
        }
        let row = |line: &ByPartner| {
            vec![
                line.enterprise_id.clone().unwrap_or_else(|| "-".to_owned()),
                line.first_failed_at.clone(),
                line.last_failed_at.clone(),
                line.messages.to_string(),
            ]
        };
        out.line("")?;
        let header = ["partner", "first", "last", "messages"];
        out.numbers(&header, document.partners.iter().map(row).collect(), "")
    })?;
    Ok(Exit::Done)
}

// Export -------------------------------------------------------------------------------------------------------------

#[derive(Args)]
#[command(after_help = "\
One line each (NDJSON), with or without --json: everything that `list` says, and properties and body (base64) as they were
received: enough to publish the message again, byte for byte. Headers are JSON values; typedHeaders says of what AMQP type
each is. Of a message that was too large only the head is kept: bodyBytesKept says how much. Who exported what stands in
the audit.
A body that was kept can be sent again by whoever has it. With --recipient what is written is encrypted with age, and only who
has the private key reads it: age --decrypt -i KEY_FILE FILE.age")]
pub(in crate::cli) struct Export {
    #[command(flatten)]
    filters: Looking,
    /// Encrypt it to this public key of age (age1...); may be repeated
    #[arg(long = "recipient", value_name = "PUBLIC_KEY")]
    recipients: Vec<String>,
    #[command(flatten)]
    operator: Operator,
}

impl Export {
    pub(in crate::cli) fn typed(&self) -> desk::Export {
        desk::Export {
            which: self.filters.which(),
            recipients: self.recipients.clone(),
            operator: self.operator.name(),
        }
    }
}

pub(super) async fn export(context: &Context, wish: &Export) -> Result<Exit, Failure> {
    let wanted = std::io::stderr().is_terminal() && !std::io::stdout().is_terminal();
    // Before anything is asked: what is no key must not leave a row in the audit.
    let mut sealed = match wish.recipients.as_slice() {
        [] => None,
        recipients => Some(Sealed::to(recipients, &context.out)?),
    };
    let bar = progress(wanted, "exporting");
    let each = |line: &desk::ExportedLine, total: i64| {
        bar.set_length(total.unsigned_abs());
        match &mut sealed {
            None => context.out.document(line)?,
            Some(sealed) => {
                let text = serde_json::to_string(line)
                    .map_err(|error| Failure::ours(format!("the answer is no JSON: {error}")))?;
                sealed.write(&text)?;
                sealed.write("\n")?;
            }
        }
        bar.inc(1);
        Ok::<_, Failure>(if context.out.is_closed() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    };
    let exports = context.desk()?.export(&wish.typed(), each).await;
    bar.finish_and_clear();
    let exports = exports?;
    if let Some(sealed) = sealed {
        sealed.finish()?;
    }
    if exports.is_cut {
        complain(&format!(
            "settled: nobody reads the export any more: stopped after {}",
            counted(exports.messages, "message")
        ));
        return Ok(Exit::Partly);
    }
    Ok(Exit::Done)
}

/// A bar on stderr where it is wanted.
pub(super) fn progress(wanted: bool, word: &str) -> ProgressBar {
    if !wanted {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(&format!("{word} {{wide_bar}} {{pos}} of {{len}} {{eta}}")) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

//! `list`, `show`, `groups`, `stats` and `export`: what there is.

use std::io::IsTerminal;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::{
    acts::{Operator, filters_of},
    advice::advice,
    filters::Looking,
    headers::Plainly,
};
use crate::{
    cli::{
        Context, Exit, Failure, audit, cut,
        life::digest,
        output::{Output, complain, plain},
    },
    domain::{
        allocation::Allocation,
        dead_letter::{MadeBy, State},
        decide::Reason,
        event::{self, AllocationView, rfc3339},
    },
    store::{
        audit::{Act, AuditRecord},
        letters::{DeadLetter, Exported, Group, Name, Replayed, Stat},
    },
};

/// Replays and acts that `show` shows at most.
const LINEAGE_MAX: i64 = 100;
/// Partners that `stats` names.
const PARTNERS_MAX: i64 = 20;
/// Messages that one statement of an export reads: bodies have up to 256 KiB.
const EXPORT_PAGE: i64 = 64;
/// The shortest prefix of an id that is looked for.
const PREFIX_MIN: usize = 4;

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

pub(super) async fn list(context: &Context, question: List) -> Result<Exit, Failure> {
    let store = context.store()?;
    let filter = question.filters.filter(&store, &[State::Open, State::Due]).await?;
    let mut found = store.dead_letters(&filter, question.after, question.limit + 1).await?;
    let more = cut(&mut found, usize::try_from(question.limit).unwrap_or(usize::MAX));
    if context.out.json {
        for dead_letter in &found {
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
    if let (true, Some(last)) = (more, found.last()) {
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

/// Everything about one message.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    dead_letter: &'a DeadLetter,
    properties: Option<Plainly<'a>>,
    #[serde(flatten)]
    body: Option<Body>,
    /// None where nobody told the partner anything: somebody put the message there by hand.
    told: Option<Told>,
    /// As it stands now.
    allocation: Option<AllocationView<'a>>,
    /// What the partner must do instead.
    advice: Option<&'static str>,
    replays: &'a [Replayed],
    acts: &'a [AuditRecord],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    /// `utf-8`, or `base64` for what is no text.
    body_encoding: &'static str,
    body: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    event_id: Uuid,
    #[serde(rename = "type")]
    kind: String,
}

pub(super) async fn show(context: &Context, question: Show) -> Result<Exit, Failure> {
    let name = name(&question.id)?;
    let store = context.store()?;
    let found = store.find_dead_letters(&name, 10).await?;
    let id = match found.as_slice() {
        [] => {
            return Err(Failure::refused(format!("there is no dead letter {:?}", question.id))
                .hint("`settled dead-letters list --state all` shows them; what still waits in the queue settlement.dead is not collected yet"));
        }
        [id] => *id,
        [first, second, ..] => {
            return Err(Failure::refused(format!(
                "{:?} means several dead letters: {first}, {second}",
                question.id
            ))
            .hint("give more of the id"));
        }
    };
    let Some((exported, bytes)) = store.dead_letter(id).await? else {
        return Err(Failure::refused(format!("the dead letter {id} was purged just now")));
    };
    if question.body {
        let operator = question.operator.name();
        let filters = json!({ "deadLetter": id });
        let act = Act {
            name: "show body",
            operator: &operator,
            why: None,
            filters: &filters,
        };
        // Before a byte of it is shown; and who can not be written down sees none.
        store.record(act, &json!({ "bytes": bytes.len() })).await?;
    }
    let (replays, acts) = store.lineage(id, LINEAGE_MAX).await?;
    let dead_letter = &exported.dead_letter;
    let allocation = match dead_letter.allocation_id {
        Some(id) => store.allocation(id).await?,
        None => None,
    };
    let shown = Shown {
        dead_letter,
        properties: exported.properties.as_ref().map(Plainly),
        body: question.body.then(|| body(bytes, &exported)),
        told: told(dead_letter, allocation.as_ref()),
        allocation: allocation.as_ref().map(AllocationView::from),
        advice: (dead_letter.state != State::Settled.as_str()).then(|| advice(dead_letter.why.reason)),
        replays: &replays,
        acts: &acts,
    };
    context.out.say(&shown, |out| print(out, &shown, allocation.as_ref()))?;
    Ok(Exit::Done)
}

/// What was typed, as a range of ids or a digest.
fn name(text: &str) -> Result<Name, Failure> {
    if let Some(digest) = digest(text) {
        return Ok(Name::Digest(digest));
    }
    let digits: String = text.chars().filter(|letter| *letter != '-').collect();
    let fits = (PREFIX_MIN..=32).contains(&digits.len()) && digits.chars().all(|letter| letter.is_ascii_hexdigit());
    let bound = |fill: &str| {
        let rest = 32_usize.saturating_sub(digits.len());
        u128::from_str_radix(&format!("{digits}{}", fill.repeat(rest)), 16)
    };
    match (fits, bound("0"), bound("f")) {
        (true, Ok(first), Ok(last)) => Ok(Name::Ids(Uuid::from_u128(first), Uuid::from_u128(last))),
        _ => Err(
            Failure::usage(format!("{text:?} is no id, no beginning of one, and no digest")).hint(format!(
                "an id is a UUID, {PREFIX_MIN} or more of its hexadecimal digits will do; a digest has 64"
            )),
        ),
    }
}

fn body(bytes: Vec<u8>, exported: &Exported) -> Body {
    match String::from_utf8(bytes) {
        Ok(text) => Body {
            body_encoding: "utf-8",
            body: text,
        },
        Err(_) => Body {
            body_encoding: "base64",
            body: exported.body.clone(),
        },
    }
}

/// The event that told the partner of the message's last verdict.
fn told(dead_letter: &DeadLetter, allocation: Option<&Allocation>) -> Option<Told> {
    let digest = digest(&dead_letter.message_digest)?;
    let refusal = |kind: &str, reason| Told {
        event_id: event::refusal_id_of(kind, &dead_letter.routing_key, &digest, reason),
        kind: kind.to_owned(),
    };
    match State::parse(&dead_letter.state)? {
        State::Settled => {
            let allocation = allocation?;
            Some(Told {
                event_id: event::settlement_id(allocation)?,
                kind: format!("{}.{}", allocation.kind.as_str(), allocation.status.as_str()),
            })
        }
        State::Parked => Some(refusal(event::PARKED, Reason::AllocationNotFound)),
        State::Open | State::Due | State::Discarded => {
            let was_judged = dead_letter.made_by != "unknown" || dead_letter.replays > 0;
            was_judged.then(|| refusal(event::REJECTED, dead_letter.why.reason))
        }
    }
}

fn print(out: &Output, shown: &Shown<'_>, allocation: Option<&Allocation>) -> Result<(), Failure> {
    let dead_letter = shown.dead_letter;
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
    let allocation = match (dead_letter.allocation_id, allocation) {
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
        ("refused by", Some(made_by.to_owned())),
        ("partner", dead_letter.enterprise_id.clone()),
        ("nonce", dead_letter.nonce.clone()),
        ("allocation", allocation),
        ("routing key", Some(dead_letter.routing_key.clone())),
        (
            "broker user",
            shown.properties.as_ref().and_then(|p| p.0.user_id.clone()),
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
                audit::brief(&act.outcome),
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

pub(super) async fn groups(context: &Context, question: Groups) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Document<'a> {
        /// How many there are, shown or not.
        total: i64,
        groups: &'a [Group],
    }
    let store = context.store()?;
    let filter = question.filters.filter(&store, &[State::Open]).await?;
    let (groups, total) = store.dead_letter_groups(&filter, question.limit).await?;
    let document = Document { total, groups: &groups };
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

pub(super) async fn stats(context: &Context, question: Stats) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Document {
        messages: i64,
        oldest_failed_at: Option<String>,
        reasons: Vec<ByReason>,
        /// Those with the most, the most first.
        partners: Vec<ByPartner>,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct ByReason {
        state: String,
        reason: Reason,
        #[serde(rename = "final")]
        is_final: bool,
        messages: i64,
        first_failed_at: String,
        last_failed_at: String,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct ByPartner {
        enterprise_id: Option<String>,
        messages: i64,
        first_failed_at: String,
        last_failed_at: String,
    }
    let store = context.store()?;
    let filter = question.filters.filter(&store, &[State::Open]).await?;
    let stats = store.dead_letter_stats(&filter, PARTNERS_MAX).await?;
    let (by_reason, by_partner): (Vec<&Stat>, Vec<&Stat>) = stats.iter().partition(|stat| stat.state.is_some());
    let mut reasons: Vec<ByReason> = by_reason
        .iter()
        .map(|stat| {
            let reason = stat.reason.unwrap_or(Reason::Internal);
            ByReason {
                state: stat.state.clone().unwrap_or_default(),
                reason,
                is_final: reason.is_final(),
                messages: stat.count.messages,
                first_failed_at: rfc3339(stat.count.first_failed_at),
                last_failed_at: rfc3339(stat.count.last_failed_at),
            }
        })
        .collect();
    let place = |line: &ByReason| State::parse(&line.state).map(|state| state as usize);
    reasons.sort_by_key(|line| (place(line), line.reason));
    let partners = by_partner.iter().map(|stat| ByPartner {
        enterprise_id: stat.partner.clone(),
        messages: stat.count.messages,
        first_failed_at: rfc3339(stat.count.first_failed_at),
        last_failed_at: rfc3339(stat.count.last_failed_at),
    });
    let document = Document {
        messages: by_reason.iter().map(|stat| stat.count.messages).sum(),
        oldest_failed_at: by_reason
            .iter()
            .map(|stat| stat.count.first_failed_at)
            .min()
            .map(rfc3339),
        partners: partners.collect(),
        reasons,
    };
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
the audit.")]
pub(in crate::cli) struct Export {
    #[command(flatten)]
    filters: Looking,
    #[command(flatten)]
    operator: Operator,
}

/// A line of it.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    dead_letter: &'a DeadLetter,
    properties: Option<Plainly<'a>>,
    /// In base64.
    body: &'a str,
}

pub(super) async fn export(context: &Context, wish: Export) -> Result<Exit, Failure> {
    let store = context.store()?;
    let filter = wish.filters.filter(&store, &[State::Open]).await?;
    let wanted = std::io::stderr().is_terminal() && !std::io::stdout().is_terminal();
    let total = store.count_dead_letters(&filter).await?;
    let progress = progress(wanted, "exporting", usize::try_from(total).unwrap_or_default());
    let operator = wish.operator.name();
    let filters = filters_of(&filter);
    let act = Act {
        name: "export",
        operator: &operator,
        why: None,
        filters: &filters,
    };
    // Before the first byte leaves: an export that breaks off was one all the same.
    store.record(act, &json!({ "selected": total })).await?;
    let mut after = 0;
    let mut count = 0_u64;
    while !context.out.is_closed() {
        let page = context
            .patiently(async || store.exported(&filter, after, EXPORT_PAGE).await)
            .await?;
        let Some(last) = page.last() else { break };
        after = last.dead_letter.cursor;
        for exported in &page {
            context.out.document(&Line {
                dead_letter: &exported.dead_letter,
                properties: exported.properties.as_ref().map(Plainly),
                body: &exported.body,
            })?;
            count += 1;
        }
        progress.set_position(count);
    }
    progress.finish_and_clear();
    if context.out.is_closed() {
        complain(&format!(
            "settled: nobody reads the export any more: stopped after {count} messages"
        ));
        return Ok(Exit::Partly);
    }
    Ok(Exit::Done)
}

/// A bar on stderr where it is wanted.
pub(super) fn progress(wanted: bool, word: &str, messages: usize) -> ProgressBar {
    if !wanted {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(messages as u64), ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(&format!("{word} {{wide_bar}} {{pos}} of {{len}} {{eta}}")) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_by_their_beginning() {
        let id = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";
        let range = |text: &str| match name(text) {
            Ok(Name::Ids(first, last)) => Some((first.to_string(), last.to_string())),
            Ok(Name::Digest(_)) | Err(_) => None,
        };
        assert_eq!(range(id), Some((id.to_owned(), id.to_owned())));
        assert_eq!(
            range("3F25-04"),
            Some((
                "3f250400-0000-0000-0000-000000000000".to_owned(),
                "3f2504ff-ffff-ffff-ffff-ffffffffffff".to_owned()
            ))
        );
        assert!(matches!(name(&"ab".repeat(32)), Ok(Name::Digest(_))));
        for text in [
            "",
            "3f2",
            "3f25x",
            "3f2504e04f8941d39a0c0305e82c33010",
            &"ab".repeat(31),
        ] {
            assert!(name(text).is_err(), "{text}");
        }
    }
}

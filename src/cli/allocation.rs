//! `settled allocation`: reserve, as the custody system would by calling `settled.reserve`, and look at one.

use std::{
    fs::File,
    io::{BufRead, BufReader, IsTerminal, Read},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{Context, Exit, Failure, life, output::complain, registry::Note, uuid};
use crate::{
    desk::History,
    domain::{address::parse_uuid, allocation::Allocation, calendar::rfc3339, event::AllocationView, json::Json},
    store::{Store, registry::By},
};

/// Reservations in one transaction at most: each holds its accounts' locks until it commits.
const CHUNK_MAX: usize = 500;
/// Bytes of reservations in one transaction at most.
const CHUNK_BYTES_MAX: usize = 4 * 1024 * 1024;
/// The longest line: the longest fields, every byte of them escaped, fit.
const LINE_MAX: usize = 262_144;
/// U+FEFF in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Files from this size on get a progress bar.
const LARGE: u64 = 262_144;

#[derive(Subcommand)]
pub(super) enum AllocationCommand {
    /// Reserve allocations and deallocations: NDJSON in, one line of NDJSON out per line in
    Reserve(Reserve),
    /// One allocation as it stands
    Show(Show),
}

#[derive(Args)]
#[command(after_help = "\
A line in:  {\"id\": UUID, \"type\": \"allocation\"|\"deallocation\", \"connectionId\": UUID,
             \"amount\": {\"currency\": .., \"quantity\": \"digits\"}, \"clientExternalId\": .., \"initiatedBy\": ..,
             \"notes\"?: .., \"reason\"?: .., \"retriable\"?: true|false}
A line out: {\"id\": .., \"result\": \"reserved\"|\"exists\"|\"refused\", \"reason\"?: .., \"detail\"?: ..}
Refused with conflict, insufficient_funds, unknown_connection, or invalid_field (the detail says which).
Empty lines are skipped. Each line is judged on its own and sees those before it. Answers come as soon as no more
lines are waiting, so that another program can ask and wait. Exit 3 if some, 1 if all were refused.")]
pub(super) struct Reserve {
    /// Read it instead of stdin (-)
    file: Option<PathBuf>,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(super) struct Show {
    #[arg(value_parser = uuid)]
    id: Uuid,
    /// With every receipt, transfer and event of it
    #[arg(long)]
    history: bool,
}

pub(super) async fn run(context: &Context, command: AllocationCommand) -> Result<Exit, Failure> {
    match command {
        AllocationCommand::Reserve(reserve) => self::reserve(context, reserve).await,
        AllocationCommand::Show(show) => self::show(context, show).await,
    }
}

// Reserve ------------------------------------------------------------------------------------------------------------

/// Reads a line as far as it must be read here: what is no JSON, and what the database's JSON can not hold. All other rules
/// stand in `settled.reserve`, so that this door and the custody system's own are one.
///
/// # Errors
/// What is wrong with it.
fn reservation(line: &[u8]) -> Result<Value, String> {
    if line.starts_with(BYTE_ORDER_MARK) {
        return Err("the line begins with a byte-order mark (U+FEFF): write the file as UTF-8 without one".into());
    }
    let read = Json::from_bytes(line.trim_ascii()).map_err(|error| format!("the line {error}"))?;
    if read.as_object().is_none() {
        return Err("must be a JSON object".into());
    }
    sent(&read, "")
}

/// The same value for the database. It takes no number and no list anywhere, so what stands in one is not sent.
fn sent(value: &Json<'_>, place: &str) -> Result<Value, String> {
    Ok(match value {
        Json::Null => Value::Null,
        Json::Bool(truth) => Value::Bool(*truth),
        Json::Number(_) => Value::from(0),
        Json::Array(_) => Value::Array(Vec::new()),
        Json::String(text) => Value::String(held(text, place)?.to_owned()),
        Json::Object(members) => {
            let mut object = serde_json::Map::new();
            for (name, member) in members.iter() {
                let place = match place {
                    "" => name.clone().into_owned(),
                    place => format!("{place}.{name}"),
                };
                object.insert(held(&name, "a name")?.to_owned(), sent(&member, &place)?);
            }
            Value::Object(object)
        }
    })
}

/// Text that the database can hold.
fn held<'t>(text: &'t str, place: &str) -> Result<&'t str, String> {
    if text.contains('\0') {
        return Err(format!("{place}: must not hold the character U+0000"));
    }
    Ok(text)
}

/// The id of a line that may break any other rule.
fn id_of(line: &[u8]) -> Option<Uuid> {
    #[derive(Deserialize)]
    struct Id {
        id: String,
    }
    let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
    let Id { id } = serde_json::from_slice(line).ok()?;
    parse_uuid(&id)
}

/// A line out.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct LineOut {
    id: Option<Uuid>,
    result: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl LineOut {
    fn refused(id: Option<Uuid>, detail: String) -> Self {
        Self {
            id,
            result: "refused".into(),
            reason: Some("invalid_field".into()),
            detail: Some(detail),
        }
    }
}

/// A line in: what it says, or how it is answered without asking the database.
type Line = Result<String, LineOut>;

fn read_line(line: &[u8]) -> Line {
    reservation(line)
        .map(|reservation| reservation.to_string())
        .map_err(|detail| LineOut::refused(id_of(line), detail))
}

/// Reads lines until the end. `Err` is a fault of reading.
fn read_lines(mut input: impl BufRead, lines: &mpsc::Sender<std::io::Result<Line>>, read: &AtomicU64) {
    let mut line = Vec::new();
    loop {
        line.clear();
        let taken = input.by_ref().take(LINE_MAX as u64 + 1).read_until(b'\n', &mut line);
        let parsed = match taken {
            Ok(0) => return,
            Ok(taken) if taken > LINE_MAX && line.last() != Some(&b'\n') => {
                match skip_line(&mut input) {
                    Ok(skipped) => read.fetch_add(skipped, Ordering::Relaxed),
                    // It shows again at the next read.
                    Err(_) => 0,
                };
                Ok(Err(LineOut::refused(
                    None,
                    format!("the line is longer than {LINE_MAX} bytes"),
                )))
            }
            Ok(_) if line.iter().all(u8::is_ascii_whitespace) => continue,
            Ok(_) => Ok(read_line(&line)),
            Err(error) => Err(error),
        };
        read.fetch_add(line.len() as u64, Ordering::Relaxed);
        let over = parsed.is_err();
        if lines.blocking_send(parsed).is_err() || over {
            return;
        }
    }
}

/// Reads on to the end of a line and keeps nothing of it.
fn skip_line(input: &mut impl BufRead) -> std::io::Result<u64> {
    let mut skipped = 0;
    loop {
        let waiting = input.fill_buf()?;
        if waiting.is_empty() {
            return Ok(skipped);
        }
        let (used, over) = match waiting.iter().position(|byte| *byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (waiting.len(), false),
        };
        input.consume(used);
        skipped += used as u64;
        if over {
            return Ok(skipped);
        }
    }
}

/// What was answered so far.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    reserved: u64,
    exists: u64,
    refused: u64,
}

impl Tally {
    fn count(&mut self, answer: &LineOut) {
        match answer.result.as_str() {
            "reserved" => self.reserved += 1,
            "exists" => self.exists += 1,
            _ => self.refused += 1,
        }
    }

    fn total(self) -> u64 {
        self.reserved + self.exists + self.refused
    }

    fn exit(self) -> Exit {
        match (self.refused, self.reserved + self.exists) {
            (0, _) => Exit::Done,
            (_, 0) => Exit::Failed,
            (_, _) => Exit::Partly,
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} reserved, {} there already, {} refused",
            self.reserved, self.exists, self.refused
        )
    }
}

async fn reserve(context: &Context, wish: Reserve) -> Result<Exit, Failure> {
    let (store, operator) = (context.store()?, wish.note.operator());
    let by = wish.note.by(&operator);
    let (input, size): (Box<dyn BufRead + Send>, Option<u64>) = match &wish.file {
        Some(path) if path.as_os_str() != "-" => {
            let file = File::open(path)
                .map_err(|error| Failure::usage(format!("{} can not be read: {error}", path.display())))?;
            let size = file.metadata().ok().map(|about| about.len());
            (Box::new(BufReader::new(file)), size)
        }
        Some(_) | None => (Box::new(BufReader::new(std::io::stdin())), None),
    };
    let read = Arc::new(AtomicU64::new(0));
    let (sender, mut lines) = mpsc::channel(2 * CHUNK_MAX);
    let counter = Arc::clone(&read);
    // A thread of its own: one that waits for stdin must not keep the runtime from ending.
    std::thread::spawn(move || read_lines(input, &sender, &counter));
    let progress = progress(context, size);
    let mut tally = Tally::default();
    let mut chunk = Vec::new();
    while !context.out.is_closed() {
        let more = take(&mut lines, &mut chunk).await;
        let fault = match more {
            Ok(true) => None,
            Ok(false) => break,
            Err(error) => Some(error),
        };
        let answers = reserve_chunk(context, &store, std::mem::take(&mut chunk), by)
            .await
            .map_err(|failure| stopped(&failure, tally))?;
        let mut text = String::new();
        for answer in &answers {
            tally.count(answer);
            text.push_str(&serde_json::to_string(answer).unwrap_or_default());
            text.push('\n');
        }
        context.out.json_lines(&text)?;
        progress.set_position(read.load(Ordering::Relaxed));
        if let Some(error) = fault {
            let failure = Failure::usage(format!("the reservations can not be read on: {error}"));
            return Err(stopped(&failure, tally));
        }
    }
    progress.finish_and_clear();
    if context.out.is_closed() {
        complain(&format!(
            "settled: nobody reads the answers any more: stopped after {tally}; the same lines again answer `exists`"
        ));
        return Ok(Exit::Partly);
    }
    if !context.out.json && std::io::stderr().is_terminal() {
        complain(&tally.to_string());
    }
    Ok(tally.exit())
}

/// A failure on the way, with how far it came.
fn stopped(failure: &Failure, tally: Tally) -> Failure {
    if tally.total() == 0 {
        return failure.clone();
    }
    failure.clone().hint(format!(
        "stopped after {tally}; give all the lines again: what is reserved answers `exists`"
    ))
}

/// Takes what is waiting, at least one line. False at the end of the input.
async fn take(lines: &mut mpsc::Receiver<std::io::Result<Line>>, chunk: &mut Vec<Line>) -> std::io::Result<bool> {
    let mut bytes = 0;
    let Some(first) = lines.recv().await else {
        return Ok(false);
    };
    let mut next = Some(first);
    while let Some(line) = next {
        let line = line?;
        bytes += line.as_ref().map_or(0, String::len);
        chunk.push(line);
        if chunk.len() >= CHUNK_MAX || bytes >= CHUNK_BYTES_MAX {
            break;
        }
        next = lines.try_recv().ok();
    }
    Ok(true)
}

/// Reserves what can be read, in one transaction, and puts the answers in the order of the lines.
async fn reserve_chunk(
    context: &Context,
    store: &Store,
    chunk: Vec<Line>,
    by: By<'_>,
) -> Result<Vec<LineOut>, Failure> {
    let wishes: Vec<&str> = chunk.iter().filter_map(|line| line.as_deref().ok()).collect();
    let reserved = if wishes.is_empty() {
        Vec::new()
    } else {
        let wishes = format!("[{}]", wishes.join(","));
        context.patiently(async || store.reserve(&wishes, by).await).await?
    };
    let mut reserved = reserved.into_iter();
    chunk
        .into_iter()
        .map(|line| match line {
            Err(answer) => Ok(answer),
            Ok(_) => {
                let reserved = reserved
                    .next()
                    .ok_or_else(|| Failure::ours("settled.reserve() answered fewer lines than it was asked"))?;
                Ok(LineOut {
                    id: reserved.id,
                    result: reserved.result,
                    reason: reserved.reason,
                    detail: reserved.detail,
                })
            }
        })
        .collect()
}

/// A bar on stderr while a large file is read, where it does not stand in the way of the answers.
fn progress(context: &Context, size: Option<u64>) -> ProgressBar {
    let wanted = !context.out.json && std::io::stderr().is_terminal() && !std::io::stdout().is_terminal();
    let Some(size) = size.filter(|size| wanted && *size >= LARGE) else {
        return ProgressBar::hidden();
    };
    let bar = ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("reserving {wide_bar} {percent}% {eta}");
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

// Show ---------------------------------------------------------------------------------------------------------------

#[derive(Serialize)]
struct Shown<'a> {
    allocation: AllocationView<'a>,
    #[serde(flatten)]
    history: Option<History>,
}

async fn show(context: &Context, wish: Show) -> Result<Exit, Failure> {
    let desk = context.desk()?;
    let (allocation, history) = if wish.history {
        desk.history(wish.id).await?.unzip()
    } else {
        (desk.allocation(wish.id).await?, None)
    };
    let Some(allocation) = allocation else {
        return Err(
            Failure::refused(format!("no allocation or deallocation {} is known", wish.id))
                .hint("`settled timeline` also finds messages that name it"),
        );
    };
    let shown = Shown {
        allocation: AllocationView::from(&allocation),
        history,
    };
    context.out.say(&shown, |out| {
        out.table(&["field", "value"], fields(&allocation), "")?;
        match &shown.history {
            Some(history) => life::print(history, out),
            None => Ok(()),
        }
    })?;
    Ok(Exit::Done)
}

fn fields(allocation: &Allocation) -> Vec<Vec<String>> {
    let amount = format!("{} {}", allocation.amount.quantity, allocation.amount.currency);
    let optional = |text: &Option<String>| text.clone();
    let rows = [
        ("id", Some(allocation.id.to_string())),
        ("type", Some(allocation.kind.as_str().to_owned())),
        ("status", Some(allocation.status.as_str().to_owned())),
        ("reason", optional(&allocation.reason)),
        ("amount", Some(amount)),
        ("partner", Some(allocation.enterprise_id.clone())),
        ("partner's symbol", optional(&allocation.partner_symbol)),
        ("partner's id of it", optional(&allocation.partner_external_id)),
        ("connection", Some(allocation.connection_id.to_string())),
        ("client", Some(allocation.client_id.to_string())),
        ("client's id of it", Some(allocation.client_external_id.clone())),
        ("initiated by", Some(allocation.initiated_by.clone())),
        ("notes", optional(&allocation.notes)),
        ("retriable", Some(super::output::yes_no(allocation.retriable))),
        ("evaluation", optional(&allocation.evaluation_id)),
        ("pending approval", optional(&allocation.pending_approval_id)),
        (
            "policy result",
            allocation.policy_result.map(|result| result.as_str().to_owned()),
        ),
        ("settled by nonce", optional(&allocation.settled_nonce)),
        ("created", Some(rfc3339(allocation.created_at))),
        ("updated", Some(rfc3339(allocation.updated_at))),
    ];
    rows.into_iter()
        .filter_map(|(field, value)| Some(vec![field.to_owned(), value?]))
        .collect()
}

#[cfg(test)]
mod tests;

//! `settled explain`: what the worker would come to, by the worker's own code, without effect.

use std::{
    fs::File,
    io::{Read, stdin},
    path::PathBuf,
};

use clap::Args;

use super::{
    Context, Exit, Failure,
    output::{Mood, plain},
};
use crate::{
    desk::{self, Movement},
    domain::verdict::VerdictKind,
};

/// Bytes of a body that are read: far above the limit, so that the detail can say how long it is.
const READ_MAX: u64 = 16 * 1024 * 1024;

#[derive(Args)]
#[command(after_help = "Exit 0 whatever the verdict. What does not even decode is explained without a database.")]
pub(super) struct Explain {
    /// The message's body, byte for byte; stdin if - or left out
    file: Option<PathBuf>,
    /// The routing key it is published under
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    routing_key: String,
    /// The AMQP property `user_id`
    #[arg(long, value_name = "USER", allow_hyphen_values = true)]
    user_id: Option<String>,
    /// The AMQP property `content_type`
    #[arg(
        long,
        value_name = "TYPE",
        allow_hyphen_values = true,
        default_value = "application/json"
    )]
    content_type: String,
}

pub(super) async fn run(context: &Context, question: Explain) -> Result<Exit, Failure> {
    let question = desk::ExplainQuestion {
        routing_key: question.routing_key,
        user_id: question.user_id,
        content_type: question.content_type,
        body: body(question.file)?,
    };
    let explained = desk::explain(&context.settings, question).await?;
    context.out.say(&explained, |out| {
        let mood = match explained.verdict {
            VerdictKind::Settled | VerdictKind::Duplicate => Mood::Good,
            VerdictKind::Parked => Mood::Dim,
            VerdictKind::Rejected => Mood::Bad,
        };
        let verdict = out.coloured(mood, explained.verdict.as_str());
        match (explained.reason, explained.class, explained.is_final) {
            (Some(reason), Some(class), Some(is_final)) => {
                let again = if is_final {
                    "final: the same bytes can never settle"
                } else {
                    "not final: the same bytes may settle later"
                };
                out.line(format!("verdict: {verdict}, {reason} (class {class}; {again})"))?;
            }
            _ => out.line(format!("verdict: {verdict}"))?,
        }
        if let Some(detail) = &explained.detail {
            out.line(plain(detail))?;
        }
        if let (Some(key), VerdictKind::Rejected) = (&explained.recovered_key, explained.verdict) {
            out.line(format!("the signature was made by the key {key}"))?;
        }
        if let Some(symbol) = &explained.partner_symbol {
            out.line(format!("the partner names the amount by {symbol}"))?;
        }
        let row = |movement: &Movement| {
            vec![
                movement.debit.as_str().to_owned(),
                movement.credit.as_str().to_owned(),
                movement.currency.clone(),
                movement.amount.to_string(),
            ]
        };
        if explained.transfers.is_empty() {
            return out.line("nothing would move");
        }
        let header = ["debit", "credit", "currency", "amount"];
        out.numbers(&header, explained.transfers.iter().map(row).collect(), "")
    })?;
    Ok(Exit::Done)
}

pub(super) fn body(file: Option<PathBuf>) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    let read = match &file {
        Some(path) if path.as_os_str() != "-" => {
            File::open(path).and_then(|file| file.take(READ_MAX).read_to_end(&mut body))
        }
        Some(_) | None => stdin().lock().take(READ_MAX).read_to_end(&mut body),
    };
    let name = file.map_or_else(|| "-".to_owned(), |path| path.display().to_string());
    read.map_err(|error| Failure::usage(format!("{name} can not be read: {error}")))?;
    Ok(body)
}

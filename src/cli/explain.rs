//! `settled explain`: what the worker would come to, by the worker's own code, without effect.

use std::{
    fs::File,
    io::{Read, stdin},
    path::PathBuf,
};

use clap::Args;
use serde::Serialize;

use super::{
    Context, Exit, Failure,
    output::{Mood, plain},
};
use crate::{
    broker::topology::UPDATES,
    domain::{
        decide::{Reason, Verdict, VerdictKind},
        delivery::{Delivery, Properties, Source},
        event::rfc3339,
        ledger::{AccountKind, Quantity},
        message,
    },
    settle,
    store::Store,
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

#[derive(Serialize)]
struct Explained {
    verdict: VerdictKind,
    reason: Option<Reason>,
    class: Option<u16>,
    #[serde(rename = "final")]
    is_final: Option<bool>,
    detail: Option<String>,
    transfers: Vec<Movement>,
}

#[derive(Serialize)]
struct Movement {
    debit: AccountKind,
    credit: AccountKind,
    currency: String,
    amount: Quantity,
}

pub(super) async fn run(context: &Context, question: Explain) -> Result<Exit, Failure> {
    let delivery = Delivery {
        exchange: UPDATES.to_owned(),
        routing_key: question.routing_key,
        body: body(question.file)?,
        properties: Properties {
            content_type: Some(question.content_type),
            delivery_mode: Some(2),
            user_id: question.user_id,
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Plain,
    };
    let store = if message::facts(&delivery).content.is_err() && context.settings.database_url().is_err() {
        nowhere(context)?
    } else {
        context.store()?
    };
    let rules = context.rules();
    let (judgement, changes, _) = context
        .patiently(async || settle::explain(&store, &rules, delivery.clone()).await)
        .await?;
    let reason = judgement.verdict.reason();
    let explained = Explained {
        verdict: judgement.verdict.kind(),
        reason,
        class: reason.map(Reason::class),
        is_final: reason.map(Reason::is_final),
        detail: detail(&judgement.verdict),
        transfers: changes
            .settlements
            .iter()
            .map(|settlement| Movement {
                debit: settlement.transfer.debit.0,
                credit: settlement.transfer.credit.0,
                currency: settlement.transfer.amount.currency.clone(),
                amount: settlement.transfer.amount.quantity.clone(),
            })
            .collect(),
    };
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

/// A sentence about the verdict. One that settles needs none.
fn detail(verdict: &Verdict) -> Option<String> {
    match verdict {
        Verdict::Settled { .. } => None,
        Verdict::Duplicate { allocation } => Some(format!(
            "{} {} is {} already; its event would go out again",
            allocation.kind.as_str(),
            allocation.id,
            allocation.status.as_str()
        )),
        Verdict::Parked { until, again, .. } => {
            let waits = if *again { "it waits already" } else { "it would wait" };
            Some(format!(
                "no allocation of this id is reserved yet; {waits}, until {} at the latest",
                rfc3339(*until)
            ))
        }
        Verdict::Rejected { detail, .. } => Some(detail.clone()),
    }
}

fn body(file: Option<PathBuf>) -> Result<Vec<u8>, Failure> {
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

/// A database for messages that need none.
fn nowhere(context: &Context) -> Result<Store, Failure> {
    let mut settings = context.settings.clone();
    settings.database.url = crate::config::Secret::new("postgres://localhost");
    Store::new(&settings).map_err(Failure::ours)
}

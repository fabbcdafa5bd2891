//! `settled receipt` and `settled timeline`: what became of a message, of an allocation.

use clap::Args;

use super::{Context, Exit, Failure, enterprise_id, output::Output};
use crate::{
    desk::{DeadLetter, EventTold, History, LifeMoment, ReceiptRecord, Transferred},
    domain::calendar::rfc3339,
};

#[derive(Args)]
pub(super) struct ReceiptQuestion {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    #[arg(long, allow_hyphen_values = true)]
    nonce: String,
}

pub(super) async fn receipt(context: &Context, question: &ReceiptQuestion) -> Result<Exit, Failure> {
    let desk = context.desk()?;
    let document = desk.receipt(&question.enterprise_id, &question.nonce).await?;
    context.out.say(&document, |out| {
        let receipt = &document.receipt;
        let refused = document.dead_letter_id.zip(document.dead_letter_state.as_ref());
        let rows = [
            ("partner", Some(receipt.enterprise_id.clone())),
            ("nonce", Some(receipt.nonce.clone())),
            ("verdict", Some(receipt.verdict.clone())),
            ("reason", receipt.reason.clone()),
            ("allocation", Some(receipt.allocation_id.to_string())),
            ("event", Some(receipt.event_id.to_string())),
            ("SHA-256 of the payload", Some(receipt.payload_digest.clone())),
            ("SHA-256 of the message", Some(receipt.message_digest.clone())),
            ("first seen", Some(rfc3339(receipt.first_seen))),
            ("last seen", Some(rfc3339(receipt.last_seen))),
            ("voided", receipt.voided_at.map(rfc3339)),
            ("dead letter", refused.map(|(id, state)| format!("{id}, {state}"))),
        ];
        let rows = rows
            .into_iter()
            .filter_map(|(field, value)| Some(vec![field.to_owned(), value?]));
        out.table(&["field", "value"], rows.collect(), "")
    })?;
    Ok(Exit::Done)
}

/// What happened to an allocation, in four tables.
pub(super) fn print(history: &History, out: &Output) -> Result<(), Failure> {
    out.line("")?;
    let row = |receipt: &ReceiptRecord| {
        vec![
            rfc3339(receipt.first_seen),
            receipt.enterprise_id.clone(),
            receipt.nonce.clone(),
            receipt.verdict.clone(),
            receipt.reason.clone().unwrap_or_default(),
        ]
    };
    let header = ["first seen", "partner", "nonce", "verdict", "reason"];
    out.table(
        &header,
        history.receipts.iter().map(row).collect(),
        "no authentic message named it",
    )?;
    out.line("")?;
    let row = |transfer: &Transferred| {
        vec![
            transfer.at.clone(),
            transfer.event.clone(),
            format!("{} -> {}", transfer.debit, transfer.credit),
            format!("{} {}", transfer.amount, transfer.currency),
        ]
    };
    let header = ["at", "transfer", "accounts", "amount"];
    out.numbers(&header, history.transfers.iter().map(row).collect(), "no transfer")?;
    out.line("")?;
    let row = |event: &EventTold| {
        vec![
            event.at.clone().unwrap_or_default(),
            event.kind.clone(),
            event.id.to_string(),
            event.state.as_str().to_owned(),
        ]
    };
    let header = ["at", "event", "id", "published"];
    out.table(&header, history.events.iter().map(row).collect(), "no event")?;
    if history.dead_letters.is_empty() {
        return Ok(());
    }
    out.line("")?;
    let row = |dead_letter: &DeadLetter| {
        vec![
            rfc3339(dead_letter.last_failed_at),
            dead_letter.id.to_string(),
            dead_letter.why.reason.to_string(),
            dead_letter.state.clone(),
        ]
    };
    let header = ["failed last", "dead letter", "reason", "state"];
    out.table(&header, history.dead_letters.iter().map(row).collect(), "")
}

#[derive(Args)]
pub(super) struct Timeline {
    /// An allocation's id, a nonce (of any partner), or the SHA-256 of a message or of its payload in hexadecimal; a
    /// digest is looked for in every receipt there is, which may take minutes
    #[arg(value_name = "ALLOCATION|NONCE|DIGEST", allow_hyphen_values = true)]
    subject: String,
}

pub(super) async fn timeline(context: &Context, question: &Timeline) -> Result<Exit, Failure> {
    let document = context.desk()?.timeline(&question.subject).await?;
    context.out.say(&document, |out| {
        let moments = &document.timeline;
        let several = moments
            .iter()
            .any(|moment| moments.first().map(|first| first.allocation_id) != Some(moment.allocation_id));
        let row = |moment: &LifeMoment| {
            let mut row = vec![moment.at.clone(), moment.what.to_owned(), moment.detail.clone()];
            if several {
                row.push(moment.allocation_id.map(|id| id.to_string()).unwrap_or_default());
            }
            row
        };
        let header: &[&str] = if several {
            &["at", "what", "detail", "allocation"]
        } else {
            &["at", "what", "detail"]
        };
        out.table(header, moments.iter().map(row).collect(), "")?;
        if document.truncated {
            out.line("there is more: only the first are shown")?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

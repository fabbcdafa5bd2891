//! `settled receipt` and `settled timeline`: what became of a message, of an allocation.

use std::collections::BTreeMap;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::{
    Context, Exit, Failure, enterprise_id,
    output::{Output, plain},
};
use crate::{
    domain::{
        allocation::{Allocation, Status},
        event::rfc3339,
        message::parse_uuid,
    },
    store::{
        letters::{DeadLetter, Replayed},
        life::{Life, ReceiptRecord, Subject},
        told::ToldRecord,
    },
};

// Receipt ------------------------------------------------------------------------------------------------------------

#[derive(Args)]
pub(super) struct ReceiptQuestion {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    #[arg(long, allow_hyphen_values = true)]
    nonce: String,
}

pub(super) async fn receipt(context: &Context, question: ReceiptQuestion) -> Result<Exit, Failure> {
    /// What is told, with the dead letter that the message is or was.
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Document<'a> {
        #[serde(flatten)]
        receipt: &'a ReceiptRecord,
        #[serde(skip_serializing_if = "Option::is_none")]
        dead_letter_id: Option<Uuid>,
        #[serde(skip_serializing_if = "Option::is_none")]
        dead_letter_state: Option<&'a str>,
    }
    let store = context.store()?;
    let found = store.receipt(&question.enterprise_id, &question.nonce).await?;
    let Some(receipt) = found else {
        return Err(Failure::refused(format!(
            "no authentic message of {} with the nonce {:?} was ever seen",
            question.enterprise_id, question.nonce
        ))
        .hint("what is refused before its sender is proven leaves no receipt; its event and its dead letter say why"));
    };
    let refused = match digest(&receipt.message_digest) {
        Some(digest) => {
            store
                .dead_letter_of(
                    &receipt.enterprise_id,
                    &receipt.nonce,
                    &digest,
                    receipt.reason.as_deref(),
                )
                .await?
        }
        None => None,
    };
    let document = Document {
        receipt: &receipt,
        dead_letter_id: refused.as_ref().map(|(id, _)| *id),
        dead_letter_state: refused.as_ref().map(|(_, state)| state.as_str()),
    };
    context.out.say(&document, |out| {
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
            (
                "dead letter",
                refused.as_ref().map(|(id, state)| format!("{id}, {state}")),
            ),
        ];
        let rows = rows
            .into_iter()
            .filter_map(|(field, value)| Some(vec![field.to_owned(), value?]));
        out.table(&["field", "value"], rows.collect(), "")
    })?;
    Ok(Exit::Done)
}

// History ------------------------------------------------------------------------------------------------------------

/// What became of an event that was written with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
enum Delivery {
    /// The broker has confirmed it: its batch's outbox row is gone.
    Confirmed,
    /// It is still to be published, or to be confirmed.
    Pending,
    /// The broker refused it when it was published alone.
    SetAside,
}

impl Delivery {
    fn of(life: &Life, batch_id: Uuid, event_id: Uuid) -> Self {
        if life.set_aside.contains(&(batch_id, event_id)) {
            return Delivery::SetAside;
        }
        match life.batches.get(&batch_id) {
            Some(batch) if batch.pending => Delivery::Pending,
            Some(_) | None => Delivery::Confirmed,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Delivery::Confirmed => "confirmed",
            Delivery::Pending => "pending",
            Delivery::SetAside => "set aside: the broker refused it",
        }
    }
}

/// Everything that happened to an allocation.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct History {
    receipts: Vec<ReceiptRecord>,
    transfers: Vec<Movement>,
    events: Vec<Told>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    dead_letters: Vec<DeadLetter>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Movement {
    event: String,
    debit: String,
    credit: String,
    currency: String,
    amount: String,
    batch_id: Option<Uuid>,
    at: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    id: Uuid,
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    state: Delivery,
    enterprise_id: Option<String>,
    nonce: Option<String>,
    batch_id: Uuid,
    at: Option<String>,
}

/// The type of the event that tells a receipt's verdict.
fn event_type(receipt: &ReceiptRecord, allocation: Option<&Allocation>) -> String {
    match (receipt.verdict.as_str(), allocation) {
        ("parked", _) => "update.parked".to_owned(),
        ("settled" | "duplicate", Some(allocation)) => {
            format!("{}.{}", allocation.kind.as_str(), allocation.status.as_str())
        }
        _ => "update.rejected".to_owned(),
    }
}

fn allocation_of<'l>(life: &'l Life, receipt: &ReceiptRecord) -> Option<&'l Allocation> {
    life.allocations
        .iter()
        .find(|allocation| allocation.id == receipt.allocation_id)
}

impl History {
    pub(super) fn of(life: &Life) -> Self {
        // Copies of an outcome's event share its id: the one told last is the one to worry about.
        let mut events = BTreeMap::<Uuid, Told>::new();
        for receipt in &life.receipts {
            let state = Delivery::of(life, receipt.batch_id, receipt.event_id);
            let told = Told {
                id: receipt.event_id,
                kind: event_type(receipt, allocation_of(life, receipt)),
                reason: receipt.reason.clone(),
                state,
                enterprise_id: Some(receipt.enterprise_id.clone()),
                nonce: Some(receipt.nonce.clone()),
                batch_id: receipt.batch_id,
                at: life.batches.get(&receipt.batch_id).map(|batch| rfc3339(batch.at)),
            };
            let known = events.entry(receipt.event_id).or_insert(told);
            known.state = known.state.max(state);
        }
        // What a receipt's earlier verdicts were told by, and what is in no receipt.
        for told in &life.told {
            let state = Delivery::of(life, told.batch_id, told.event_id);
            let known = events.entry(told.event_id).or_insert_with(|| Told {
                id: told.event_id,
                kind: format!("update.{}", told.verdict),
                reason: Some(told.reason.clone()),
                state,
                enterprise_id: told.enterprise_id.clone(),
                nonce: told.nonce.clone(),
                batch_id: told.batch_id,
                at: Some(rfc3339(told.at)),
            });
            known.state = known.state.max(state);
        }
        let mut events: Vec<Told> = events.into_values().collect();
        events.sort_by(|left, right| (&left.at, left.id).cmp(&(&right.at, right.id)));
        Self {
            receipts: life.receipts.clone(),
            transfers: life
                .transfers
                .iter()
                .map(|transfer| Movement {
                    event: transfer.event.clone(),
                    debit: transfer.debit.clone(),
                    credit: transfer.credit.clone(),
                    currency: transfer.currency.clone(),
                    amount: transfer.amount.clone(),
                    batch_id: transfer.batch_id,
                    at: rfc3339(transfer.at),
                })
                .collect(),
            events,
            dead_letters: life.dead_letters.clone(),
        }
    }

    pub(super) fn print(&self, out: &Output) -> Result<(), Failure> {
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
            self.receipts.iter().map(row).collect(),
            "no authentic message named it",
        )?;
        out.line("")?;
        let row = |transfer: &Movement| {
            vec![
                transfer.at.clone(),
                transfer.event.clone(),
                format!("{} -> {}", transfer.debit, transfer.credit),
                format!("{} {}", transfer.amount, transfer.currency),
            ]
        };
        let header = ["at", "transfer", "accounts", "amount"];
        out.numbers(&header, self.transfers.iter().map(row).collect(), "no transfer")?;
        out.line("")?;
        let row = |event: &Told| {
            vec![
                event.at.clone().unwrap_or_default(),
                event.kind.clone(),
                event.id.to_string(),
                event.state.as_str().to_owned(),
            ]
        };
        let header = ["at", "event", "id", "published"];
        out.table(&header, self.events.iter().map(row).collect(), "no event")?;
        if self.dead_letters.is_empty() {
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
        out.table(&header, self.dead_letters.iter().map(row).collect(), "")
    }
}

// Timeline -----------------------------------------------------------------------------------------------------------

#[derive(Args)]
pub(super) struct Timeline {
    /// An allocation's id, a nonce (of any partner), or the SHA-256 of a message or of its payload in hexadecimal; a
    /// digest is looked for in every receipt there is, which may take minutes
    #[arg(value_name = "ALLOCATION|NONCE|DIGEST", allow_hyphen_values = true)]
    subject: String,
}

/// One thing that happened.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Moment {
    at: String,
    what: &'static str,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocation_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    enterprise_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nonce: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<Uuid>,
}

impl Moment {
    fn new(
        at: Timestamp,
        what: &'static str,
        allocation_id: impl Into<Option<Uuid>>,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            at: rfc3339(at),
            what,
            detail: detail.into(),
            allocation_id: allocation_id.into(),
            enterprise_id: None,
            nonce: None,
            batch_id: None,
            worker: None,
            event_id: None,
        }
    }

    fn of(mut self, receipt: &ReceiptRecord) -> Self {
        self.enterprise_id = Some(receipt.enterprise_id.clone());
        self.nonce = Some(receipt.nonce.clone());
        self
    }

    fn batch(mut self, life: &Life, batch_id: Uuid) -> Self {
        self.batch_id = Some(batch_id);
        self.worker = life.batches.get(&batch_id).map(|batch| batch.worker.clone());
        self
    }

    fn event(mut self, event_id: Uuid) -> Self {
        self.event_id = Some(event_id);
        self
    }

    /// What comes first of things of the same moment.
    fn rank(&self) -> usize {
        const ORDER: [&str; 13] = [
            "reserved",
            "woken",
            "received",
            "replayed",
            "parked",
            "left",
            "judged",
            "settled",
            "transfer",
            "event",
            "dead-lettered",
            "collected",
            "discarded",
        ];
        // The reservation's own transfer comes with it.
        if self.what == "transfer" && self.batch_id.is_none() {
            return 0;
        }
        ORDER.iter().position(|what| *what == self.what).unwrap_or(ORDER.len())
    }
}

/// What the operator may mean: a nonce may look like an id or a digest.
fn subjects(text: &str) -> Vec<Subject> {
    let nonce = Subject::Nonce(text.to_owned());
    match parse_uuid(text) {
        Some(id) => vec![Subject::Allocation(id), nonce],
        None => vec![nonce],
    }
}

pub(super) fn digest(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

pub(super) async fn timeline(context: &Context, question: Timeline) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Document<'a> {
        timeline: &'a [Moment],
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        truncated: bool,
    }
    let store = context.store()?;
    let mut life = store.life(&subjects(&question.subject)).await?;
    if let Some(digest) = digest(&question.subject)
        && life.receipts.is_empty()
        && life.dead_letters.is_empty()
    {
        life = store.life(&[Subject::Digest(digest)]).await?;
    }
    let mut moments = moments(&life);
    // What is taken and not judged yet is in no other place.
    if let Some(digest) = digest(&question.subject) {
        for held in store.held_of(&digest).await? {
            let detail = format!(
                "message {}: taken, and held to be judged at {} ({})",
                question.subject.to_ascii_lowercase(),
                rfc3339(held.due_at),
                held.why
            );
            moments.push(Moment::new(held.held_at, "held", None, detail));
        }
    }
    if moments.is_empty() {
        return Err(Failure::refused(format!(
            "nothing is known of {:?}: no allocation, no nonce and no digest of an authentic message",
            question.subject
        ))
        .hint("a dead letter that still waits in its queue is not collected yet: `settled dead-letters collect`"));
    }
    let document = Document {
        timeline: &moments,
        truncated: life.cut,
    };
    context.out.say(&document, |out| {
        let several = moments
            .iter()
            .any(|moment| moments.first().map(|first| first.allocation_id) != Some(moment.allocation_id));
        let row = |moment: &Moment| {
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
        if life.cut {
            out.line("there is more: only the first are shown")?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

/// A life in order of time.
fn moments(life: &Life) -> Vec<Moment> {
    let mut moments = Vec::new();
    for allocation in &life.allocations {
        let detail = format!(
            "{} of {} {} on connection {} of {}, by {}",
            allocation.kind.as_str(),
            allocation.amount.quantity,
            allocation.amount.currency,
            allocation.connection_id,
            allocation.enterprise_id,
            plain(&allocation.initiated_by)
        );
        moments.push(Moment::new(allocation.created_at, "reserved", allocation.id, detail));
    }
    for receipt in &life.receipts {
        moments.extend(receipt_moments(life, receipt));
    }
    moments.extend(told_moments(life));
    for settlement in &life.settlements {
        let status = life
            .allocations
            .iter()
            .find(|allocation| allocation.id == settlement.allocation_id)
            .map_or(Status::Reserved, |allocation| allocation.status);
        let detail = format!(
            "{} by nonce {} of {}, signed with {}",
            status.as_str(),
            plain(&settlement.nonce),
            settlement.enterprise_id,
            settlement.public_key
        );
        let moment = Moment::new(settlement.at, "settled", settlement.allocation_id, detail);
        moments.push(Moment {
            enterprise_id: Some(settlement.enterprise_id.clone()),
            nonce: Some(settlement.nonce.clone()),
            ..moment.batch(life, settlement.batch_id)
        });
    }
    for transfer in &life.transfers {
        let detail = format!(
            "{} {} from {} to {}",
            transfer.amount, transfer.currency, transfer.debit, transfer.credit
        );
        let moment = Moment::new(transfer.at, "transfer", transfer.allocation_id, detail);
        moments.push(match transfer.batch_id {
            Some(batch_id) => moment.batch(life, batch_id),
            None => moment,
        });
    }
    for dead_letter in &life.dead_letters {
        moments.extend(refusal_moments(life, dead_letter));
    }
    moments.sort_by(|left, right| (&left.at, left.rank()).cmp(&(&right.at, right.rank())));
    moments
}

/// What happened to a dead letter.
fn refusal_moments(life: &Life, dead_letter: &DeadLetter) -> Vec<Moment> {
    let moment = |at, what, detail: String| Moment {
        enterprise_id: dead_letter.enterprise_id.clone(),
        nonce: dead_letter.nonce.clone(),
        ..Moment::new(at, what, dead_letter.allocation_id, detail)
    };
    let mut moments = Vec::new();
    let reason = dead_letter.why.reason;
    let digest = &dead_letter.message_digest;
    // A receipt tells of it with the batch, and so does what was told of a message whose sender was not proven.
    let is_told = life
        .receipts
        .iter()
        .any(|receipt| receipt.verdict == "rejected" && receipt.message_digest == *digest)
        || life.told.iter().any(|told| {
            is_dead_lettered(life, told) && told.message_digest == *digest && told.at <= dead_letter.first_failed_at
        });
    if !is_told {
        let from = dead_letter.enterprise_id.as_deref().unwrap_or("nobody known");
        let detail = format!("{reason}: message {digest} of {from}");
        moments.push(moment(dead_letter.first_failed_at, "dead-lettered", detail));
    }
    if dead_letter.last_failed_at > dead_letter.first_failed_at {
        let detail = format!("{reason}: {} times so far", dead_letter.times_seen);
        moments.push(moment(dead_letter.last_failed_at, "dead-lettered", detail));
    }
    let detail = format!("dead letter {}, {} now", dead_letter.id, dead_letter.state);
    moments.push(moment(dead_letter.collected_at, "collected", detail));
    let replays = life.replays.iter().filter(|(id, _)| *id == dead_letter.id);
    for (_, replay) in replays {
        if let (Some(at), Some(verdict)) = (replay.judged_at, &replay.verdict) {
            moments.push(moment(at, "replayed", replayed(replay, verdict)));
        }
    }
    if let Some(at) = dead_letter.discarded_at {
        moments.push(moment(at, "discarded", format!("dead letter {}", dead_letter.id)));
    }
    moments
}

fn replayed(replay: &Replayed, verdict: &str) -> String {
    let reason = replay
        .reason
        .as_ref()
        .map(|reason| format!(", {reason}"))
        .unwrap_or_default();
    format!(
        "{verdict}{reason}, in run {} of {}",
        replay.run,
        plain(&replay.operator)
    )
}

/// What happened to one message.
fn receipt_moments(life: &Life, receipt: &ReceiptRecord) -> Vec<Moment> {
    let moment = |at, what, detail: String| Moment::new(at, what, receipt.allocation_id, detail).of(receipt);
    let nonce = plain(&receipt.nonce);
    let batch = life.batches.get(&receipt.batch_id);
    let mut moments = Vec::new();
    let received = format!("nonce {nonce} of {}", receipt.enterprise_id);
    // The batch in hand is that of the verdict; it is the one that received the message if the times agree. Else the one
    // that told the first of its earlier verdicts is.
    let told = life.told.iter().filter(|told| told.key == Some(receipt.key));
    let first = std::iter::once(receipt.batch_id)
        .chain(told.map(|told| told.batch_id))
        .find_map(|id| {
            let batch = life.batches.get(&id)?;
            (batch.at == receipt.first_seen).then_some((id, batch))
        });
    match first {
        Some((id, batch)) => {
            let detail = format!("{received}, by {} in batch {id}", plain(&batch.worker));
            moments.push(moment(receipt.first_seen, "received", detail).batch(life, id));
        }
        None => moments.push(moment(receipt.first_seen, "received", received)),
    }
    for parking in life.parkings.iter().filter(|parking| parking.key == receipt.key) {
        let (what, detail) = match parking.step.as_str() {
            "parked" => ("parked", "no such allocation was reserved yet"),
            "woken" => ("woken", "its allocation was reserved: due at once"),
            _ => ("left", "it waits no more"),
        };
        moments.push(moment(parking.at, what, format!("nonce {nonce}: {detail}")));
    }
    if let Some(batch) = batch {
        let reason = receipt
            .reason
            .as_ref()
            .map(|reason| format!(", {reason}"))
            .unwrap_or_default();
        let from = match batch.source.as_str() {
            "parked" => ", after waiting",
            "replayed" => ", replayed",
            _ => "",
        };
        let detail = format!(
            "nonce {nonce}: {}{reason}{from}, by {}",
            receipt.verdict,
            plain(&batch.worker)
        );
        moments.push(moment(batch.at, "judged", detail).batch(life, receipt.batch_id));
        let state = Delivery::of(life, receipt.batch_id, receipt.event_id);
        let kind = event_type(receipt, allocation_of(life, receipt));
        let detail = format!("{kind} {}: {}", receipt.event_id, state.as_str());
        moments.push(
            moment(batch.at, "event", detail)
                .batch(life, receipt.batch_id)
                .event(receipt.event_id),
        );
        if receipt.verdict == "rejected" {
            let state = if batch.pending { "pending" } else { "confirmed" };
            let detail = format!("nonce {nonce}, message {}: {state}", receipt.message_digest);
            moments.push(moment(batch.at, "dead-lettered", detail).batch(life, receipt.batch_id));
        }
    }
    if batch.is_none_or(|batch| receipt.last_seen > batch.at) && receipt.last_seen > receipt.first_seen {
        let detail = format!("nonce {nonce} again, the last time so far; the verdict stands");
        moments.push(moment(receipt.last_seen, "received", detail));
    }
    moments
}

/// Whether the batch that told it also dead-lettered the message: the broker gave it up by itself, and what is replayed is
/// a dead letter already.
fn is_dead_lettered(life: &Life, told: &ToldRecord) -> bool {
    let by_broker = matches!(told.reason.as_str(), "delivery_limit" | "expired");
    let source = life.batches.get(&told.batch_id).map(|batch| batch.source.as_str());
    told.verdict == "rejected" && !by_broker && source != Some("replayed")
}

/// What was refused and parked, except where a receipt still says so.
fn told_moments(life: &Life) -> Vec<Moment> {
    let is_current = |told: &&ToldRecord| {
        let same = |receipt: &ReceiptRecord| (receipt.event_id, receipt.batch_id) == (told.event_id, told.batch_id);
        life.receipts.iter().any(same)
    };
    let mut moments = Vec::new();
    for told in life.told.iter().filter(|told| !is_current(told)) {
        let receipt = life.receipts.iter().find(|receipt| told.key == Some(receipt.key));
        let allocation_id = told.allocation_id.or(receipt.map(|receipt| receipt.allocation_id));
        let moment = |what, detail: String| {
            let enterprise_id = receipt.map(|receipt| receipt.enterprise_id.clone());
            let nonce = receipt.map(|receipt| receipt.nonce.clone());
            Moment {
                enterprise_id: told.enterprise_id.clone().or(enterprise_id),
                nonce: told.nonce.clone().or(nonce),
                ..Moment::new(told.at, what, allocation_id, detail).batch(life, told.batch_id)
            }
        };
        let name = match &told.nonce {
            Some(nonce) => format!("nonce {}", plain(nonce)),
            None => format!("message {}", told.message_digest),
        };
        let worker = life
            .batches
            .get(&told.batch_id)
            .map(|batch| format!(", by {}", plain(&batch.worker)))
            .unwrap_or_default();
        if receipt.is_none() && told.verdict == "rejected" {
            let from = told.enterprise_id.as_deref().unwrap_or("nobody known");
            let detail = format!("{name} of {from}{worker} in batch {}", told.batch_id);
            moments.push(moment("received", detail));
        }
        let verdict = format!("{name}: {}, {}{worker}", told.verdict, told.reason);
        moments.push(moment("judged", verdict));
        let state = Delivery::of(life, told.batch_id, told.event_id);
        let event = format!("update.{} {}: {}", told.verdict, told.event_id, state.as_str());
        moments.push(moment("event", event).event(told.event_id));
        if is_dead_lettered(life, told) {
            let is_pending = life.batches.get(&told.batch_id).is_some_and(|batch| batch.pending);
            let state = if is_pending { "pending" } else { "confirmed" };
            let detail = format!("{name}, message {}: {state}", told.message_digest);
            moments.push(moment("dead-lettered", detail));
        }
    }
    moments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::life::{BatchRecord, ParkingRecord};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).expect("a time")
    }

    fn receipt(verdict: &str) -> ReceiptRecord {
        ReceiptRecord {
            enterprise_id: "acme".into(),
            nonce: "n-1".into(),
            verdict: verdict.into(),
            reason: None,
            payload_digest: "aa".into(),
            message_digest: "bb".into(),
            allocation_id: Uuid::from_u128(1),
            event_id: Uuid::from_u128(2),
            first_seen: at(0),
            last_seen: at(0),
            key: Uuid::from_u128(3),
            batch_id: Uuid::from_u128(4),
        }
    }

    fn life(receipt: ReceiptRecord, judged: Timestamp, pending: bool) -> Life {
        let batch = BatchRecord {
            worker: "w".into(),
            source: "queue".into(),
            at: judged,
            pending,
        };
        Life {
            batches: [(receipt.batch_id, batch)].into(),
            receipts: vec![receipt],
            ..Life::default()
        }
    }

    fn whats(life: &Life) -> Vec<&'static str> {
        moments(life).iter().map(|moment| moment.what).collect()
    }

    #[test]
    fn a_rejection_is_dead_lettered() {
        let life = life(receipt("rejected"), at(0), true);
        assert_eq!(whats(&life), ["received", "judged", "event", "dead-lettered"]);
        let moments = moments(&life);
        assert!(
            moments.iter().skip(2).all(|moment| moment.detail.ends_with("pending")),
            "{moments:?}"
        );
    }

    #[test]
    fn a_parked_message_has_its_steps_in_order() {
        let mut life = life(receipt("settled"), at(5), false);
        for (step, seconds) in [("left", 5), ("parked", 0), ("woken", 4)] {
            life.parkings.push(ParkingRecord {
                key: Uuid::from_u128(3),
                allocation_id: Uuid::from_u128(1),
                step: step.into(),
                at: at(seconds),
            });
        }
        assert_eq!(whats(&life), ["received", "parked", "woken", "left", "judged", "event"]);
    }

    #[test]
    fn seen_again_is_said() {
        let again = ReceiptRecord {
            last_seen: at(9),
            ..receipt("settled")
        };
        let life = life(again, at(0), false);
        assert_eq!(whats(&life), ["received", "judged", "event", "received"]);
    }

    #[test]
    fn what_was_set_aside_is_not_confirmed() {
        let mut life = life(receipt("parked"), at(0), false);
        let state = |life: &Life| {
            History::of(life)
                .events
                .first()
                .map(|event| (event.kind.clone(), event.state))
        };
        assert_eq!(state(&life), Some(("update.parked".into(), Delivery::Confirmed)));
        life.set_aside.insert((Uuid::from_u128(4), Uuid::from_u128(2)));
        assert_eq!(state(&life), Some(("update.parked".into(), Delivery::SetAside)));
    }

    #[test]
    fn a_nonce_may_look_like_anything() {
        let uuid = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";
        assert!(matches!(
            subjects(uuid).as_slice(),
            [Subject::Allocation(_), Subject::Nonce(_)]
        ));
        assert!(matches!(subjects("n-1").as_slice(), [Subject::Nonce(_)]));
        assert_eq!(digest(&"Ab".repeat(32)), Some([0xab; 32]));
        assert_eq!(digest(&"ab".repeat(31)), None);
    }
}

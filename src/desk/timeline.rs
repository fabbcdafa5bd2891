//! The life of an allocation or a message, in order of time.

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::{
    DeadLetter, Desk, ReceiptRecord, Refusal, Replayed,
    life::{EventState, allocation_of, digest, event_type},
};
use crate::{
    domain::{address::parse_uuid, allocation::Status, calendar::rfc3339},
    plain::plain,
    store::{life::Life, subject::Subject, told::ToldRecord},
};

/// A life in order of time.
#[derive(Clone, Debug, Serialize)]
pub struct Timeline {
    pub timeline: Vec<LifeMoment>,
    /// There is more: only the first are told.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LifeMoment {
    pub at: String,
    pub what: &'static str,
    pub detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enterprise_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event_id: Option<Uuid>,
}

impl LifeMoment {
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
        const ORDER: [&str; 14] = [
            "reserved",
            "voided",
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

impl Desk {
    /// The life of what was named: an allocation's id, a nonce (of any partner), or the SHA-256 of a message or its payload.
    ///
    /// # Errors
    /// Nothing is known of it; the database is away.
    pub async fn timeline(&self, subject: &str) -> Result<Timeline, Refusal> {
        let mut life = self.store.life(&subjects(subject)).await?;
        if let Some(digest) = digest(subject)
            && life.receipts.is_empty()
            && life.dead_letters.is_empty()
        {
            life = self.store.life(&[Subject::Digest(digest)]).await?;
        }
        let mut moments = moments(&life);
        // What is taken and not judged yet is in no other place.
        if let Some(digest) = digest(subject) {
            for held in self.store.held_of(&digest).await? {
                let detail = format!(
                    "message {}: taken, and held to be judged at {} ({})",
                    subject.to_ascii_lowercase(),
                    rfc3339(held.due_at),
                    held.why
                );
                moments.push(LifeMoment::new(held.held_at, "held", None, detail));
            }
        }
        if moments.is_empty() {
            return Err(Refusal::refused(format!(
                "nothing is known of {subject:?}: no allocation, no nonce and no digest of an authentic message"
            ))
            .hint("a dead letter that still waits in its queue is not collected yet: `settled dead-letters collect`"));
        }
        Ok(Timeline {
            timeline: moments,
            truncated: life.cut,
        })
    }
}

/// A life in order of time.
fn moments(life: &Life) -> Vec<LifeMoment> {
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
        moments.push(LifeMoment::new(
            allocation.created_at,
            "reserved",
            allocation.id,
            detail,
        ));
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
        let moment = LifeMoment::new(settlement.at, "settled", settlement.allocation_id, detail);
        moments.push(LifeMoment {
            enterprise_id: Some(settlement.enterprise_id.clone()),
            nonce: Some(settlement.nonce.clone()),
            ..moment.batch(life, settlement.batch_id)
        });
    }
    for transfer in &life.transfers {
        let of_it = life
            .allocations
            .iter()
            .find(|allocation| allocation.id == transfer.allocation_id && transfer.batch_id.is_some());
        let named = of_it.and_then(|allocation| allocation.partner_symbol.as_ref());
        let named = named.map_or_else(String::new, |symbol| format!(", named by the partner in {symbol}"));
        let detail = format!(
            "{} {} from {} to {}{named}",
            transfer.amount, transfer.currency, transfer.debit, transfer.credit
        );
        let moment = LifeMoment::new(transfer.at, "transfer", transfer.allocation_id, detail);
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
fn refusal_moments(life: &Life, dead_letter: &DeadLetter) -> Vec<LifeMoment> {
    let moment = |at, what, detail: String| LifeMoment {
        enterprise_id: dead_letter.enterprise_id.clone(),
        nonce: dead_letter.nonce.clone(),
        ..LifeMoment::new(at, what, dead_letter.allocation_id, detail)
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
fn receipt_moments(life: &Life, receipt: &ReceiptRecord) -> Vec<LifeMoment> {
    let moment = |at, what, detail: String| LifeMoment::new(at, what, receipt.allocation_id, detail).of(receipt);
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
    if let Some(at) = receipt.voided_at {
        let detail = format!(
            "nonce {nonce} of {}: made unusable by an operator",
            receipt.enterprise_id
        );
        moments.push(moment(at, "voided", detail));
    }
    for parking in life.parkings.iter().filter(|parking| parking.key == receipt.key) {
        let (what, detail) = match parking.step.as_str() {
            "parked" => ("parked", "no such allocation was reserved yet"),
            "woken" if receipt.voided_at == Some(parking.at) => ("woken", "it was voided: due at once"),
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
        let state = EventState::of(life, receipt.batch_id, receipt.event_id);
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
fn told_moments(life: &Life) -> Vec<LifeMoment> {
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
            LifeMoment {
                enterprise_id: told.enterprise_id.clone().or(enterprise_id),
                nonce: told.nonce.clone().or(nonce),
                ..LifeMoment::new(told.at, what, allocation_id, detail).batch(life, told.batch_id)
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
        let state = EventState::of(life, told.batch_id, told.event_id);
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
    use crate::{
        desk::History,
        store::life::{BatchRecord, ParkingRecord},
    };

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
            voided_at: None,
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
        assert_eq!(state(&life), Some(("update.parked".into(), EventState::Confirmed)));
        life.set_aside.insert((Uuid::from_u128(4), Uuid::from_u128(2)));
        assert_eq!(state(&life), Some(("update.parked".into(), EventState::SetAside)));
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

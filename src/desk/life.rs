//! What became of a message, of an allocation.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use super::{DeadLetter, Desk, ReceiptRecord, Refusal};
use crate::{
    domain::{allocation::Allocation, calendar::rfc3339},
    store::{life::Life, subject::Subject},
};

// Receipt ------------------------------------------------------------------------------------------------------------

/// What became of a nonce, with the dead letter that the message is or was.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReceiptFound {
    #[serde(flatten)]
    pub receipt: ReceiptRecord,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter_state: Option<String>,
}

impl Desk {
    /// What became of a partner's nonce.
    ///
    /// # Errors
    /// No authentic message with it was ever seen; the database is away.
    pub async fn receipt(&self, enterprise_id: &str, nonce: &str) -> Result<ReceiptFound, Refusal> {
        let Some(receipt) = self.store.receipt(enterprise_id, nonce).await? else {
            return Err(Refusal::refused(format!(
                "no authentic message of {enterprise_id} with the nonce {nonce:?} was ever seen"
            ))
            .hint(
                "what is refused before its sender is proven leaves no receipt; its event and its dead letter say why",
            ));
        };
        let refused = match digest(&receipt.message_digest) {
            Some(digest) => {
                self.store
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
        let (dead_letter_id, dead_letter_state) = refused.unzip();
        Ok(ReceiptFound {
            receipt,
            dead_letter_id,
            dead_letter_state,
        })
    }

    /// An allocation as it stands, and everything that happened to it; none where nothing of that id is known.
    ///
    /// # Errors
    /// The database is away.
    pub async fn history(&self, id: Uuid) -> Result<Option<(Allocation, History)>, Refusal> {
        let life = self.store.life(&[Subject::Allocation(id)]).await?;
        let history = History::of(&life);
        Ok(life
            .allocations
            .into_iter()
            .next()
            .map(|allocation| (allocation, history)))
    }

    /// An allocation as it stands.
    ///
    /// # Errors
    /// The database is away.
    pub async fn allocation(&self, id: Uuid) -> Result<Option<Allocation>, Refusal> {
        Ok(self.store.allocation(id).await?)
    }
}

/// A SHA-256 in hexadecimal.
pub(super) fn digest(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

// History ------------------------------------------------------------------------------------------------------------

/// What became of an event that was written with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum EventState {
    /// The broker has confirmed it: its batch's outbox row is gone.
    Confirmed,
    /// It is still to be published, or to be confirmed.
    Pending,
    /// The broker refused it when it was published alone.
    SetAside,
}

impl EventState {
    pub(super) fn of(life: &Life, batch_id: Uuid, event_id: Uuid) -> Self {
        if life.set_aside.contains(&(batch_id, event_id)) {
            return EventState::SetAside;
        }
        if life.put_back.contains(&(batch_id, event_id)) {
            return EventState::Pending;
        }
        match life.batches.get(&batch_id) {
            Some(batch) if batch.pending => EventState::Pending,
            Some(_) | None => EventState::Confirmed,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            EventState::Confirmed => "confirmed",
            EventState::Pending => "pending",
            EventState::SetAside => "set aside: the broker refused it",
        }
    }
}

/// Everything that happened to an allocation.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    pub receipts: Vec<ReceiptRecord>,
    pub transfers: Vec<Transferred>,
    pub events: Vec<EventTold>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dead_letters: Vec<DeadLetter>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Transferred {
    pub event: String,
    pub debit: String,
    pub credit: String,
    pub currency: String,
    pub amount: String,
    pub batch_id: Option<Uuid>,
    pub at: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EventTold {
    pub id: Uuid,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub state: EventState,
    pub enterprise_id: Option<String>,
    pub nonce: Option<String>,
    pub batch_id: Uuid,
    pub at: Option<String>,
}

/// The type of the event that tells a receipt's verdict.
pub(super) fn event_type(receipt: &ReceiptRecord, allocation: Option<&Allocation>) -> String {
    match (receipt.verdict.as_str(), allocation) {
        ("parked", _) => "update.parked".to_owned(),
        ("settled" | "duplicate", Some(allocation)) => {
            format!("{}.{}", allocation.kind.as_str(), allocation.status.as_str())
        }
        _ => "update.rejected".to_owned(),
    }
}

pub(super) fn allocation_of<'l>(life: &'l Life, receipt: &ReceiptRecord) -> Option<&'l Allocation> {
    life.allocations
        .iter()
        .find(|allocation| allocation.id == receipt.allocation_id)
}

impl History {
    pub(super) fn of(life: &Life) -> Self {
        // Copies of an outcome's event share its id: the one told last is the one to worry about.
        let mut events = BTreeMap::<Uuid, EventTold>::new();
        for receipt in &life.receipts {
            let state = EventState::of(life, receipt.batch_id, receipt.event_id);
            let told = EventTold {
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
            let state = EventState::of(life, told.batch_id, told.event_id);
            let known = events.entry(told.event_id).or_insert_with(|| EventTold {
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
        let mut events: Vec<EventTold> = events.into_values().collect();
        events.sort_by(|left, right| (&left.at, left.id).cmp(&(&right.at, right.id)));
        Self {
            receipts: life.receipts.clone(),
            transfers: life
                .transfers
                .iter()
                .map(|transfer| Transferred {
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
}

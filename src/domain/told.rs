//! What is told of a refusal. An event's id says what was refused and why, not when and by which copy; so whoever comes
//! first chooses the words, and every later copy of that id says the same.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    event_id::{PARKED, REJECTED, refusal_id},
    message::MessageRef,
    reason::Reason,
    receipt::ReceiptKey,
    trace::traceparent,
    verdict::{Judgement, Verdict, VerdictKind},
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct First {
    /// The event's `time`.
    #[serde(skip)]
    pub at: Timestamp,
    pub detail: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parked_until: Option<Timestamp>,
}

/// What was told first, by event id.
pub type Firsts = HashMap<Uuid, First>;

const WAITS: &str = "no allocation of this id is reserved yet; it will be judged again";

/// The id of the event by which a message is refused or parked, and what it says if its id was never told.
pub fn first_words(message: MessageRef<'_>, verdict: &Verdict, now: Timestamp) -> Option<(Uuid, Reason, First)> {
    let first = |at, detail: &str, parked_until| First {
        at,
        detail: detail.into(),
        message_id: message.delivery.properties.message_id.clone(),
        traceparent: traceparent(message.delivery).map(str::to_owned),
        parked_until,
    };
    match verdict {
        Verdict::Settled { .. } | Verdict::Duplicate { .. } => None,
        Verdict::Parked { parked_at, until, .. } => Some((
            refusal_id(PARKED, message, Reason::AllocationNotFound),
            Reason::AllocationNotFound,
            first(*parked_at, WAITS, Some(*until)),
        )),
        Verdict::Rejected { reason, detail } => Some((
            refusal_id(REJECTED, message, *reason),
            *reason,
            first(now, detail, None),
        )),
    }
}

/// What the event of a message that the broker gave up and nobody judged says, if its id was never told. Its time is that of
/// the failure.
pub fn given_up_words(message: MessageRef<'_>, reason: Reason, detail: &str, failed_at: Timestamp) -> (Uuid, First) {
    let first = First {
        at: failed_at,
        detail: detail.into(),
        message_id: message.delivery.properties.message_id.clone(),
        traceparent: traceparent(message.delivery).map(str::to_owned),
        parked_until: None,
    };
    (refusal_id(REJECTED, message, reason), first)
}

/// A refusal or a parking that is to be told.
#[derive(Clone, Debug, PartialEq)]
pub struct Telling {
    /// What it says, unless its id was told before.
    pub first: First,
    pub verdict: VerdictKind,
    pub reason: Reason,
    /// Whether the sender was proven, now or when the message was parked.
    pub proven: bool,
    pub digest: [u8; 32],
    pub key: Option<ReceiptKey>,
    pub allocation_id: Option<Uuid>,
    pub enterprise_id: Option<String>,
    pub nonce: Option<String>,
}

impl Telling {
    pub fn new(message: MessageRef<'_>, first: First, verdict: VerdictKind, reason: Reason, proven: bool) -> Self {
        let content = message.facts.content.as_ref().ok();
        Self {
            first,
            verdict,
            reason,
            proven: proven || message.delivery.source.is_parked(),
            digest: message.facts.message_digest,
            key: content.map(|content| content.key),
            allocation_id: content.map(|content| content.update.id),
            enterprise_id: message.facts.enterprise_id.clone(),
            nonce: content.map(|content| content.update.nonce.clone()),
        }
    }
}

/// What a batch has to tell of what it refused and parked: each event once, as its first message says it; and the ids that
/// are only answered.
#[derive(Clone, Debug, Default)]
pub struct Tellings {
    pub told: BTreeMap<Uuid, Telling>,
    pub answered: Vec<Uuid>,
}

impl Tellings {
    pub fn of(batch: &[MessageRef<'_>], judgements: &[Judgement], now: Timestamp) -> Self {
        let mut tellings = Self::default();
        for (message, judgement) in batch.iter().zip(judgements) {
            let Some((id, reason, first)) = first_words(*message, &judgement.verdict, now) else {
                continue;
            };
            let again = match judgement.verdict {
                Verdict::Parked { again, .. } => again,
                Verdict::Settled { .. } | Verdict::Duplicate { .. } | Verdict::Rejected { .. } => false,
            };
            if again {
                // Nothing is written of it; who asks for an answer gets the words that were told.
                if message.delivery.properties.reply_to.is_some() {
                    tellings.answered.push(id);
                }
                continue;
            }
            let verdict = judgement.verdict.kind();
            tellings
                .told
                .entry(id)
                .or_insert_with(|| Telling::new(*message, first, verdict, reason, judgement.proven));
        }
        tellings
    }

    /// Of what the broker gave up, in the order it came. Its sender was never proven.
    pub fn of_given_up<'a>(failures: impl Iterator<Item = (MessageRef<'a>, Reason, &'a str, Timestamp)>) -> Self {
        let mut tellings = Self::default();
        for (message, reason, detail, failed_at) in failures {
            let (id, first) = given_up_words(message, reason, detail, failed_at);
            tellings
                .told
                .entry(id)
                .or_insert_with(|| Telling::new(message, first, VerdictKind::Rejected, reason, false));
        }
        tellings
    }

    pub fn is_empty(&self) -> bool {
        self.told.is_empty() && self.answered.is_empty()
    }
}

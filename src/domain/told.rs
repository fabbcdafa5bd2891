//! What is told of a refusal. An event's id says what was refused and why, not when and by which copy; so whoever comes
//! first chooses the words, and every later copy of that id says the same.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    decide::{Judged, Judgement, Reason, ReceiptKey, Verdict, VerdictKind},
    event,
};

/// Everything in the event of a refusal or a parking that another copy of the same message might say differently.
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
    pub fn new(message: Judged<'_>, first: First, verdict: VerdictKind, reason: Reason, proven: bool) -> Self {
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
    pub fn of(batch: &[Judged<'_>], judgements: &[Judgement], now: Timestamp) -> Self {
        let mut tellings = Self::default();
        for (message, judgement) in batch.iter().zip(judgements) {
            let Some((id, first)) = event::first_words(*message, &judgement.verdict, now) else {
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
            let reason = judgement.verdict.reason().unwrap_or(Reason::Internal);
            tellings
                .told
                .entry(id)
                .or_insert_with(|| Telling::new(*message, first, verdict, reason, judgement.proven));
        }
        tellings
    }

    /// Of what the broker gave up, in the order it came. Its sender was never proven.
    pub fn of_given_up<'a>(failures: impl Iterator<Item = (Judged<'a>, Reason, &'a str, Timestamp)>) -> Self {
        let mut tellings = Self::default();
        for (message, reason, detail, failed_at) in failures {
            let (id, first) = event::given_up_words(message, reason, detail, failed_at);
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

/// Where somebody waits for an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplyTo {
    pub reply_to: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

impl ReplyTo {
    /// Of a message that asks for one, at a name that is answered to.
    pub fn of(message: Judged<'_>) -> Option<Self> {
        let properties = &message.delivery.properties;
        let (name, enterprise_id) = (properties.reply_to.as_deref()?, message.facts.enterprise_id.as_deref()?);
        event::is_reply_queue(name, enterprise_id).then(|| Self {
            reply_to: name.into(),
            correlation_id: properties.correlation_id.clone(),
        })
    }
}

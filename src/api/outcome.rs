//! What became of a message, as the one who asked by HTTP hears it: by a direct reply where the sender is proven, else by the
//! event of the refusal.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{sync::mpsc, time::Instant};
use uuid::Uuid;

use crate::domain::reason::Reason;

/// A refusal of the same bytes that may be another's is believed when nothing else came for so long.
const GRACE: Duration = Duration::from_millis(500);

/// What became of it.
#[derive(Clone, Debug)]
pub(super) enum UpdateOutcome {
    /// It is settled, now or before: the allocation as the event tells it.
    Settled(Box<RawValue>),
    Parked {
        until: Option<String>,
    },
    Rejected {
        reason: String,
        class: u16,
        is_final: bool,
        detail: String,
    },
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    data: Data,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    allocation: Option<Box<RawValue>>,
    enterprise_id: Option<String>,
    reason: Option<String>,
    class: Option<u16>,
    #[serde(rename = "final")]
    is_final: Option<bool>,
    detail: Option<String>,
    message_digest: Option<String>,
    message_id: Option<String>,
    parked_until: Option<String>,
}

impl Data {
    fn outcome(self, kind: &str) -> Option<UpdateOutcome> {
        match kind {
            "update.rejected" => Some(UpdateOutcome::Rejected {
                reason: self.reason?,
                class: self.class?,
                is_final: self.is_final.unwrap_or_default(),
                detail: self.detail.unwrap_or_default(),
            }),
            "update.parked" => Some(UpdateOutcome::Parked {
                until: self.parked_until,
            }),
            _ => self.allocation.map(UpdateOutcome::Settled),
        }
    }
}

/// Whether a refusal may be for how a message was sent and not for what it says: the same bytes may come from others, sent in
/// other ways.
fn is_of_the_way(reason: &str) -> bool {
    Reason::parse(reason).is_none_or(|reason| {
        matches!(
            reason,
            Reason::MessageTooLarge
                | Reason::MalformedMessage
                | Reason::SenderMismatch
                | Reason::DeliveryLimit
                | Reason::Expired
                | Reason::Internal
        )
    })
}

/// Who waits for what. Bounded by the requests in hand.
#[derive(Clone, Debug, Default)]
pub(super) struct UpdatesWaiting(Arc<Mutex<HashMap<Uuid, Asker>>>);

#[derive(Debug)]
struct Asker {
    enterprise_id: String,
    digest: [u8; 32],
    tell: mpsc::Sender<Heard>,
}

/// What was heard, and whether it is certainly about this very message.
#[derive(Debug)]
struct Heard {
    outcome: UpdateOutcome,
    is_certain: bool,
}

impl UpdatesWaiting {
    fn askers(&self) -> MutexGuard<'_, HashMap<Uuid, Asker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what becomes of a request's message, from before it is published.
    pub(super) fn ask(&self, request: Uuid, enterprise_id: &str, digest: [u8; 32]) -> UpdateAsked {
        // A few are enough: an event comes again only where it is told again.
        let (tell, heard) = mpsc::channel(8);
        let asker = Asker {
            enterprise_id: enterprise_id.to_owned(),
            digest,
            tell,
        };
        self.askers().insert(request, asker);
        UpdateAsked {
            waiting: self.clone(),
            request,
            heard,
        }
    }

    /// A direct reply: it names its request.
    pub(super) fn replied(&self, request: &str, event: &[u8]) {
        let Ok(request) = Uuid::try_parse(request) else {
            return;
        };
        let Some(outcome) = read(event).and_then(|event| event.data.outcome(&event.kind)) else {
            return;
        };
        if let Some(asker) = self.askers().get(&request) {
            asker.hear(outcome, true);
        }
    }

    /// An event of a refusal: whose bytes they are, hears it.
    pub(super) fn told(&self, event: &[u8]) {
        if self.askers().is_empty() {
            return;
        }
        let Some(event) = read(event) else {
            return;
        };
        let mut digest = [0; 32];
        let told = event.data.message_digest.as_deref().unwrap_or_default();
        if hex::decode_to_slice(told, &mut digest).is_err() {
            return;
        }
        let message_id = event.data.message_id.clone();
        let enterprise_id = event.data.enterprise_id.clone().unwrap_or_default();
        let Some(outcome) = event.data.outcome(&event.kind) else {
            return;
        };
        let may_differ = matches!(&outcome, UpdateOutcome::Rejected { reason, .. } if is_of_the_way(reason));
        for (request, asker) in self.askers().iter() {
            if asker.digest == digest && asker.enterprise_id == enterprise_id {
                // The first copy's id stands in every copy's event: that it is another's says nothing.
                let is_ours = message_id.as_deref() == Some(request.to_string().as_str());
                asker.hear(outcome.clone(), is_ours || !may_differ);
            }
        }
    }
}

fn read(event: &[u8]) -> Option<Event> {
    serde_json::from_slice(event).ok()
}

impl Asker {
    fn hear(&self, outcome: UpdateOutcome, is_certain: bool) {
        // One that has heard so much already has its answer.
        drop(self.tell.try_send(Heard { outcome, is_certain }));
    }
}

/// A request that waits; it goes when this is dropped.
#[derive(Debug)]
pub(super) struct UpdateAsked {
    waiting: UpdatesWaiting,
    request: Uuid,
    heard: mpsc::Receiver<Heard>,
}

impl UpdateAsked {
    /// What is heard until then; none: nothing.
    pub(super) async fn outcome(&mut self, mut until: Instant) -> Option<UpdateOutcome> {
        let mut maybe = None;
        while let Ok(Some(heard)) = tokio::time::timeout_at(until, self.heard.recv()).await {
            if heard.is_certain {
                return Some(heard.outcome);
            }
            until = until.min(Instant::now() + GRACE);
            maybe = Some(heard.outcome);
        }
        maybe
    }
}

impl Drop for UpdateAsked {
    fn drop(&mut self) {
        self.waiting.askers().remove(&self.request);
    }
}

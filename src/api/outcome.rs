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

/// Whether a refusal of the same bytes may be another's, or of another time, where ours has another outcome: for how a message
/// was sent, and for what is not final. Such a one may be told again, hours later, while our copy waits.
fn may_differ(reason: &str, is_final: bool) -> bool {
    !is_final || Reason::parse(reason).is_none_or(Reason::is_of_the_way)
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
            maybe: None,
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
        let may_differ = matches!(
            &outcome,
            UpdateOutcome::Rejected { reason, is_final, .. } if may_differ(reason, *is_final)
        );
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
    /// A refusal that may be another's, and until when another word may come.
    maybe: Option<(UpdateOutcome, Instant)>,
}

impl UpdateAsked {
    /// What is certainly about this very message, once it is heard.
    pub(super) async fn certain(&mut self) -> UpdateOutcome {
        loop {
            let Some(heard) = self.heard.recv().await else {
                // Its other end is kept as long as this is.
                return std::future::pending().await;
            };
            if heard.is_certain {
                return heard.outcome;
            }
            let until = self.maybe.take().map(|(_, until)| until);
            self.maybe = Some((heard.outcome, until.unwrap_or_else(|| Instant::now() + GRACE)));
        }
    }

    /// The message is published: only from now on a refusal that may be another's may be its own.
    pub(super) fn published(&mut self) {
        if let Some((_, until)) = &mut self.maybe {
            *until = Instant::now() + GRACE;
        }
    }

    /// What is heard until then, or believed because nothing else came; none: nothing.
    pub(super) async fn outcome(&mut self, until: Instant) -> Option<UpdateOutcome> {
        loop {
            let grace = self.maybe.as_ref().map_or(until, |(_, grace)| *grace);
            tokio::select! {
                biased;
                outcome = self.certain() => return Some(outcome),
                () = tokio::time::sleep_until(grace.min(until)) => {}
            }
            let now = Instant::now();
            if self.maybe.as_ref().is_some_and(|(_, grace)| *grace <= now) {
                return self.possible();
            }
            if until <= now {
                return None;
            }
        }
    }

    /// A refusal that may be another's, where nothing else was heard.
    pub(super) fn possible(&mut self) -> Option<UpdateOutcome> {
        self.maybe.take().map(|(outcome, _)| outcome)
    }
}

impl Drop for UpdateAsked {
    fn drop(&mut self) {
        self.waiting.askers().remove(&self.request);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const DIGEST: [u8; 32] = [7; 32];

    fn refusal(reason: &str, is_final: bool, message_id: Uuid) -> Vec<u8> {
        let data = json!({
            "enterpriseId": "acme", "reason": reason, "class": 403, "final": is_final, "detail": "why",
            "messageDigest": hex::encode(DIGEST), "messageId": message_id,
        });
        json!({"type": "update.rejected", "data": data})
            .to_string()
            .into_bytes()
    }

    fn settled() -> Vec<u8> {
        json!({"type": "allocation.cleared", "data": {"allocation": {"id": "x"}}})
            .to_string()
            .into_bytes()
    }

    fn reason(outcome: Option<UpdateOutcome>) -> Option<String> {
        match outcome {
            Some(UpdateOutcome::Rejected { reason, .. }) => Some(reason),
            Some(UpdateOutcome::Settled(_)) => Some("settled".to_owned()),
            Some(UpdateOutcome::Parked { .. }) => Some("parked".to_owned()),
            None => None,
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test]
    async fn what_may_be_of_another_time_is_not_believed_before_ours_has_spoken() {
        let (waiting, ours, others) = (UpdatesWaiting::default(), Uuid::from_u128(1), Uuid::from_u128(2));
        for (word, is_final, from, certain) in [
            // An old refusal of the same bytes, told again: our copy may settle.
            ("partner_inactive", false, others, false),
            ("sender_mismatch", false, others, false),
            ("message_too_large", true, others, false),
            // No copy can come to anything else.
            ("nonce_reused", true, others, true),
            ("partner_inactive", false, ours, true),
            ("sender_mismatch", false, ours, true),
        ] {
            let mut asked = waiting.ask(ours, "acme", DIGEST);
            waiting.told(&refusal(word, is_final, from));
            waiting.replied(&ours.to_string(), &settled());
            let expected = if certain { word } else { "settled" };
            assert_eq!(reason(asked.outcome(soon()).await).as_deref(), Some(expected), "{word}");
        }
    }

    #[tokio::test]
    async fn a_refusal_that_may_be_anothers_is_believed_when_nothing_else_comes() {
        let (waiting, ours) = (UpdatesWaiting::default(), Uuid::from_u128(1));
        let mut asked = waiting.ask(ours, "acme", DIGEST);
        waiting.told(&refusal("partner_inactive", false, Uuid::from_u128(2)));
        // While ours is not published it says nothing; from then on it has its time.
        assert!(tokio::time::timeout(GRACE * 3, asked.certain()).await.is_err());
        asked.published();
        let began = Instant::now();
        assert_eq!(reason(asked.outcome(soon()).await).as_deref(), Some("partner_inactive"));
        assert!(began.elapsed() >= GRACE);
        // Nothing was heard; and in the end what there is counts.
        let mut asked = waiting.ask(ours, "acme", DIGEST);
        assert_eq!(reason(asked.outcome(Instant::now() + GRACE).await), None);
        waiting.told(&refusal("partner_inactive", false, Uuid::from_u128(2)));
        assert_eq!(reason(asked.outcome(Instant::now() + GRACE / 2).await), None);
        assert_eq!(reason(asked.possible()).as_deref(), Some("partner_inactive"));
    }

    #[tokio::test]
    async fn a_reply_is_heard_whether_or_not_the_broker_has_confirmed() {
        let (waiting, ours) = (UpdatesWaiting::default(), Uuid::from_u128(1));
        let mut asked = waiting.ask(ours, "acme", DIGEST);
        let replies = async {
            tokio::time::sleep(GRACE).await;
            waiting.replied(&ours.to_string(), &settled());
            std::future::pending::<()>().await;
        };
        let heard = tokio::select! {
            outcome = asked.certain() => Some(outcome),
            () = replies => None,
        };
        assert_eq!(reason(heard).as_deref(), Some("settled"));
    }
}

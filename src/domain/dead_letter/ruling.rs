//! What a verdict does to a stored dead letter.

use uuid::Uuid;

use super::{group::group_of, state::State};
use crate::domain::{
    message::MessageRef,
    reason::Reason,
    verdict::{Judgement, Verdict, VerdictKind},
};

/// A verdict on a stored dead letter: what it does to the row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruling<'a> {
    pub id: Uuid,
    /// Where the row stands now.
    pub state: State,
    pub verdict: VerdictKind,
    pub reason: Option<Reason>,
    /// Of a rejection: it failed again.
    pub detail: Option<&'a str>,
    pub group: Option<String>,
    /// It was replayed. Else it was parked by a replay, and waits no more.
    pub is_replay: bool,
}

/// What a judged message says of the dead letter that it is. None: it is none, or goes on waiting.
pub fn ruling<'a>(message: MessageRef<'_>, judgement: &'a Judgement) -> Option<Ruling<'a>> {
    let source = message.delivery.source;
    let id = source.dead_letter()?;
    let verdict = &judgement.verdict;
    let (state, detail) = match verdict {
        Verdict::Settled { .. } | Verdict::Duplicate { .. } => (State::Settled, None),
        Verdict::Parked { .. } if source.is_parked() => return None,
        // The nonce waits already, for another message of it: nothing was written, and this one is where it was.
        Verdict::Parked { again: true, .. } => (State::Open, None),
        Verdict::Parked { again: false, .. } => (State::Parked, None),
        Verdict::Rejected { detail, .. } => (State::Open, Some(detail.as_str())),
    };
    let enterprise_id = message.facts.enterprise_id.as_deref();
    let reason = verdict.reason();
    Some(Ruling {
        id,
        state,
        verdict: verdict.kind(),
        reason,
        detail,
        group: detail
            .zip(reason)
            .map(|(detail, reason)| group_of(enterprise_id, reason, detail)),
        is_replay: !source.is_parked(),
    })
}

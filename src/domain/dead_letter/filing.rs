//! How dead letters that came out of the queue join what is known: one row a message.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    cause::{Cause, MadeBy},
    identity::Identity,
    state::State,
};
use crate::domain::{
    message::MessageRef,
    reason::Reason,
    verdict::{Judgement, VerdictKind},
};

/// A stored dead letter, as far as another failure of the same message touches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub state: State,
    pub first_failed_at: Timestamp,
    pub last_failed_at: Timestamp,
    pub discarded_at: Option<Timestamp>,
}

/// A dead letter that came out of the queue.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// The message as the partner sent it.
    pub message: MessageRef<'a>,
    pub cause: &'a Cause,
    /// It may have been stored before: the broker hands it out again, or an earlier commit of ours is unknown.
    pub again: bool,
    /// What it asks for is there already: judged now, it would be a duplicate.
    pub has_effect: bool,
}

impl Arrival<'_> {
    pub fn id(&self) -> Uuid {
        row_id(self.message, self.cause.made_by == MadeBy::Unknown)
    }
}

fn row_id(message: MessageRef<'_>, is_unknown: bool) -> Uuid {
    let is_too_large = match &message.facts.content {
        Err(refusal) => refusal.reason == Reason::MessageTooLarge,
        Ok(_) => false,
    };
    Identity {
        routing_key: &message.delivery.routing_key,
        digest: message.facts.message_digest,
        properties: &message.delivery.properties,
        is_too_large,
        is_unknown,
    }
    .id()
}

/// How many dead letters come of a batch, by the rows that they are: a message and its copy are one.
pub fn letters_of<'m>(judged: impl IntoIterator<Item = (MessageRef<'m>, &'m Judgement)>) -> usize {
    let letters = judged.into_iter().filter(|(message, judgement)| {
        // Of one that is stored already there is no second one.
        judgement.verdict.kind() == VerdictKind::Rejected && message.delivery.source.dead_letter().is_none()
    });
    let rows: BTreeSet<Uuid> = letters.map(|(message, _)| row_id(message, false)).collect();
    rows.len()
}

/// A row as it will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FiledRow {
    /// There was no row.
    pub is_new: bool,
    pub state: State,
    pub first_failed_at: Timestamp,
    pub last_failed_at: Timestamp,
    pub discarded_at: Option<Timestamp>,
    /// Failures that are added to those known.
    pub seen: u32,
    /// The arrival that tells of the last failure, unless the row itself does.
    pub last: Option<usize>,
    /// It is settled by an arrival whose effect was there.
    pub is_closed: bool,
}

/// What a batch of dead letters changes.
#[derive(Clone, Debug, Default)]
pub struct Filing {
    pub entries: BTreeMap<Uuid, FiledRow>,
    /// The arrivals that are failures not counted before, in order.
    pub counted: Vec<usize>,
}

/// When an arrival failed. The broker's clock may be ahead, and a forged record may say anything.
pub fn failed_at(arrival: &Arrival<'_>, now: Timestamp) -> Timestamp {
    arrival.cause.failed_at.map_or(now, |time| time.min(now))
}

/// Files arrivals by what is known, one row a message. One that was handed out before and tells of no later failure than
/// is known changes nothing: it was stored then, or what it says is out of date. Nor does one with a verdict of the very
/// time that is known: its publisher, not sure of the first, sent it a second time.
pub fn file(known: &BTreeMap<Uuid, Known>, arrivals: &[Arrival<'_>], now: Timestamp) -> Filing {
    let mut filing = Filing::default();
    for (index, arrival) in arrivals.iter().enumerate() {
        let id = arrival.id();
        let failed_at = failed_at(arrival, now);
        let earlier = filing.entries.get(&id).cloned().or_else(|| {
            known.get(&id).map(|known| FiledRow {
                is_new: false,
                state: known.state,
                first_failed_at: known.first_failed_at,
                last_failed_at: known.last_failed_at,
                discarded_at: known.discarded_at,
                seen: 0,
                last: None,
                is_closed: false,
            })
        });
        let entry = match earlier {
            None => FiledRow {
                is_new: true,
                state: if arrival.has_effect {
                    State::Settled
                } else {
                    State::Open
                },
                first_failed_at: failed_at,
                last_failed_at: failed_at,
                discarded_at: None,
                seen: 1,
                last: Some(index),
                is_closed: arrival.has_effect,
            },
            Some(entry) => {
                let is_later =
                    failed_at > entry.last_failed_at && (arrival.cause.failed_at.is_some() || !arrival.again);
                let is_second_copy = arrival.cause.made_by == MadeBy::Settled
                    && [entry.first_failed_at, entry.last_failed_at].contains(&failed_at);
                if is_second_copy || arrival.again && !is_later {
                    continue;
                }
                // Discarded stays discarded, unless the message failed anew after that. The broker tells whole seconds
                // only: of a failure that is surely a new one, the second that it shares with the discard is after it.
                let is_surely_new = !arrival.again && arrival.cause.made_by == MadeBy::Broker;
                let reopened = entry
                    .discarded_at
                    .is_some_and(|time| failed_at > time || is_surely_new && failed_at.as_second() == time.as_second());
                let state = if reopened { State::Open } else { entry.state };
                // What a run asked for is judged by it, and finds the same.
                let is_closed = arrival.has_effect && state == State::Open;
                FiledRow {
                    state: if is_closed { State::Settled } else { state },
                    is_closed: entry.is_closed || is_closed,
                    discarded_at: entry.discarded_at.filter(|_| !reopened),
                    first_failed_at: entry.first_failed_at.min(failed_at),
                    last_failed_at: entry.last_failed_at.max(failed_at),
                    seen: entry.seen.saturating_add(1),
                    last: if is_later { Some(index) } else { entry.last },
                    ..entry
                }
            }
        };
        filing.entries.insert(id, entry);
        filing.counted.push(index);
    }
    filing
}

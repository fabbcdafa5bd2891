//! What became of every message, as subscribers were told.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;

use super::plan::{Counts, Expected, Item, Plan};
use crate::{
    broker::topology,
    domain::{delivery::Delivery, digest::sha256, event, names::header, reason::Reason, verdict::VerdictKind},
};

/// Unexpected things that are listed; the rest is counted.
const LISTED_MAX: usize = 50;

/// What a message came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Settled,
    Duplicate,
    Rejected(Reason),
}

#[derive(Clone, Debug, Default)]
struct Entry {
    published: Option<Instant>,
    /// When the first word of it arrived.
    answered: Option<Instant>,
    parked: bool,
    answer: Option<Heard>,
    /// A word that contradicts the one before.
    contradiction: Option<Heard>,
}

/// Every message of a plan, and what was heard of it.
#[derive(Debug)]
pub(in crate::cli) struct Accounting {
    items: Vec<Item>,
    by_digest: HashMap<[u8; 32], Vec<usize>>,
    by_nonce: HashMap<(String, String), usize>,
    repeats: HashMap<usize, Vec<usize>>,
    enterprises: HashSet<String>,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: Vec<Entry>,
    /// Messages that are as expected.
    done: usize,
    published: usize,
    answered: usize,
    /// By event id: the digest of its body, to see that every copy is the same.
    events: HashMap<Uuid, [u8; 32]>,
    by_type: BTreeMap<String, usize>,
    copies: usize,
    dead_letters: HashSet<[u8; 32]>,
    problems: Vec<String>,
    problems_unlisted: usize,
    sample: Option<(String, String)>,
}

impl State {
    fn problem(&mut self, sentence: String) {
        if self.problems.len() < LISTED_MAX {
            self.problems.push(sentence);
        } else {
            self.problems_unlisted += 1;
        }
    }
}

#[derive(Deserialize)]
struct Event {
    id: Uuid,
    #[serde(rename = "type")]
    kind: String,
    data: Data,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    enterprise_id: Option<String>,
    nonce: Option<String>,
    reason: Option<String>,
    message_digest: Option<String>,
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub(in crate::cli) struct Progress {
    pub(in crate::cli) published: usize,
    pub(in crate::cli) answered: usize,
    pub(in crate::cli) done: usize,
}

impl Progress {
    /// Published and not answered.
    pub(in crate::cli) fn in_flight(self) -> usize {
        self.published.saturating_sub(self.answered)
    }
}

/// A line of the table of reasons.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct ReasonCount {
    pub(in crate::cli) reason: Reason,
    pub(in crate::cli) class: u16,
    #[serde(rename = "final")]
    pub(in crate::cli) is_final: bool,
    pub(in crate::cli) expected: usize,
    pub(in crate::cli) actual: usize,
}

/// A message that did not come to what it must.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::cli) struct Unexpected {
    pub(in crate::cli) enterprise_id: String,
    pub(in crate::cli) nonce: String,
    pub(in crate::cli) message_digest: String,
    pub(in crate::cli) expected: String,
    pub(in crate::cli) actual: String,
}

/// In milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(in crate::cli) struct Latency {
    pub(in crate::cli) p50: f64,
    pub(in crate::cli) p90: f64,
    pub(in crate::cli) p99: f64,
    pub(in crate::cli) max: f64,
}

/// Everything that was found out.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::cli) struct Findings {
    pub(in crate::cli) expected: Counts,
    pub(in crate::cli) actual: Counts,
    pub(in crate::cli) unaccounted: usize,
    /// Messages that were parked, whatever came of them.
    pub(in crate::cli) parked_on_the_way: usize,
    pub(in crate::cli) reasons: Vec<ReasonCount>,
    /// Outcome events by type, each counted once.
    pub(in crate::cli) events: BTreeMap<String, usize>,
    /// Copies of outcome events that nobody asked for: delivery is at least once.
    pub(in crate::cli) extra_copies: usize,
    /// Messages seen on the dead-letter exchange, where that was watched.
    pub(in crate::cli) dead_letters: usize,
    pub(in crate::cli) unexpected: Vec<Unexpected>,
    pub(in crate::cli) problems: Vec<String>,
}

impl Findings {
    pub(in crate::cli) fn all_right(&self) -> bool {
        self.unaccounted == 0 && self.unexpected.is_empty() && self.problems.is_empty()
    }
}

impl Accounting {
    pub(in crate::cli) fn new(plan: &Plan) -> Self {
        let mut by_digest: HashMap<[u8; 32], Vec<usize>> = HashMap::new();
        let mut by_nonce = HashMap::new();
        let mut repeats: HashMap<usize, Vec<usize>> = HashMap::new();
        for (index, item) in plan.items.iter().enumerate() {
            by_digest.entry(item.digest).or_default().push(index);
            match item.expected {
                Expected::Settled | Expected::ParkedThenSettled => {
                    by_nonce.insert((item.enterprise_id.clone(), item.nonce.clone()), index);
                }
                Expected::Duplicate | Expected::Parked | Expected::ParkedThenRejected | Expected::Rejected(_) => {}
            }
            if let Some(base) = item.repeats {
                repeats.entry(base).or_default().push(index);
            }
        }
        Self {
            enterprises: plan.items.iter().map(|item| item.enterprise_id.clone()).collect(),
            by_digest,
            by_nonce,
            repeats,
            state: Mutex::new(State {
                entries: vec![Entry::default(); plan.items.len()],
                ..State::default()
            }),
            items: plan.items.clone(),
            changed: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Messages are on their way from now on. Said before they are, so that no event is earlier.
    pub(in crate::cli) fn publishing(&self, items: std::ops::Range<usize>) {
        let mut state = self.state();
        let now = Instant::now();
        state.published += items.len();
        for entry in state.entries.get_mut(items).into_iter().flatten() {
            entry.published = Some(now);
        }
    }

    pub(in crate::cli) fn progress(&self) -> Progress {
        let state = self.state();
        Progress {
            published: state.published,
            answered: state.answered,
            done: state.done,
        }
    }

    pub(in crate::cli) fn is_answered(&self, index: usize) -> bool {
        self.state()
            .entries
            .get(index)
            .is_some_and(|entry| entry.answered.is_some())
    }

    /// A fault that is no message's own.
    pub(in crate::cli) fn problem(&self, sentence: impl Into<String>) {
        self.state().problem(sentence.into());
        self.changed.notify_waiters();
    }

    /// Waits until this is true of the account, or the time is over.
    pub(in crate::cli) async fn until(&self, deadline: Instant, mut so: impl FnMut(&Self) -> bool) -> bool {
        loop {
            let changed = self.changed.notified();
            if so(self) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // Looks again in between: a notification between two looks may be missed.
            drop(tokio::time::timeout(left.min(Duration::from_millis(100)), changed).await);
        }
    }

    /// Whether the first word of each of these was heard.
    pub(in crate::cli) fn answered_before(&self, end: usize) -> bool {
        let state = self.state();
        state.entries.iter().take(end).all(|entry| entry.answered.is_some())
    }

    pub(in crate::cli) fn is_complete(&self) -> bool {
        self.state().done == self.items.len()
    }

    /// A message that a subscriber received.
    pub(in crate::cli) fn hear(&self, delivery: &Delivery) {
        let now = Instant::now();
        if delivery.exchange == topology::DEAD {
            let digest = message_digest(delivery);
            if self.by_digest.contains_key(&digest) {
                self.state().dead_letters.insert(digest);
            }
        } else {
            match event::read(delivery.properties.content_type.as_deref(), &delivery.body) {
                Ok(events) => {
                    for event in events {
                        self.hear_event(&delivery.routing_key, event, now);
                    }
                }
                Err(_) => self.unreadable(&delivery.routing_key),
            }
        }
        self.changed.notify_waiters();
    }

    fn unreadable(&self, routing_key: &str) {
        self.state()
            .problem(format!("an event that can not be read, under {routing_key}"));
    }

    fn hear_event(&self, routing_key: &str, body: &[u8], now: Instant) {
        let Ok(event) = serde_json::from_slice::<Event>(body) else {
            self.unreadable(routing_key);
            return;
        };
        let data = &event.data;
        let refused = match event.kind.as_str() {
            "update.rejected" => Some(VerdictKind::Rejected),
            "update.parked" => Some(VerdictKind::Parked),
            "allocation.cleared" | "allocation.released" | "deallocation.cleared" | "deallocation.released" => None,
            // Of a partner itself, or of a type that is newer than this program.
            _ => return,
        };
        if let Some(verdict) = refused {
            let digest = data
                .message_digest
                .as_deref()
                .and_then(|text| <[u8; 32]>::try_from(hex::decode(text).ok()?).ok());
            let Some(candidates) = digest.and_then(|digest| self.by_digest.get(&digest)) else {
                // Other people's traffic.
                return;
            };
            let mut state = self.state();
            let Some(index) = candidates
                .iter()
                .copied()
                .find(|index| state.entries.get(*index).is_some_and(|entry| entry.answer.is_none()))
                .or(candidates.last().copied())
            else {
                return;
            };
            let reason = data.reason.as_deref().and_then(Reason::parse);
            let answer = match (verdict, reason) {
                (VerdictKind::Parked, _) => None,
                (_, Some(reason)) => Some(Heard::Rejected(reason)),
                (_, None) => {
                    state.problem(format!(
                        "a rejection with a reason that nobody knows: {:?}",
                        data.reason
                    ));
                    return;
                }
            };
            self.note(&mut state, index, answer, now);
            return;
        }
        let key = (
            data.enterprise_id.clone().unwrap_or_default(),
            data.nonce.clone().unwrap_or_default(),
        );
        let mut state = self.state();
        let Some(base) = self.by_nonce.get(&key).copied() else {
            if self.enterprises.contains(&key.0) {
                state.problem(format!(
                    "{} settled by nonce {}, which must not settle anything",
                    event.kind, key.1
                ));
            }
            return;
        };
        let digest = sha256(body);
        match state.events.get(&event.id) {
            None => {
                state.events.insert(event.id, digest);
                *state.by_type.entry(event.kind.clone()).or_default() += 1;
                if self.items.get(base).is_some_and(|item| item.event != event.kind) {
                    state.problem(format!("{} instead of what nonce {} said", event.kind, key.1));
                }
                if state.sample.is_none()
                    && let Ok(text) = String::from_utf8(body.to_vec())
                {
                    state.sample = Some((routing_key.to_owned(), text));
                }
            }
            Some(first) if *first != digest => {
                state.problem(format!("two copies of event {} are not the same", event.id));
            }
            Some(_) => {}
        }
        let settled = state.entries.get(base).is_some_and(|entry| entry.answer.is_some());
        if !settled {
            self.note(&mut state, base, Some(Heard::Settled), now);
            return;
        }
        let repeat = self.repeats.get(&base).into_iter().flatten().copied().find(|index| {
            state
                .entries
                .get(*index)
                .is_some_and(|entry| entry.answer.is_none() && entry.published.is_some())
        });
        match repeat {
            Some(repeat) => self.note(&mut state, repeat, Some(Heard::Duplicate), now),
            None => state.copies += 1,
        }
    }

    /// A word about one message; none: it is parked.
    fn note(&self, state: &mut State, index: usize, answer: Option<Heard>, now: Instant) {
        let (Some(item), Some(entry)) = (self.items.get(index), state.entries.get_mut(index)) else {
            return;
        };
        let was_done = is_done(item, entry);
        let first = entry.answered.is_none();
        entry.answered.get_or_insert(now);
        match (answer, entry.answer) {
            (None, _) => entry.parked = true,
            (Some(answer), None) => entry.answer = Some(answer),
            (Some(answer), Some(earlier)) if answer != earlier => entry.contradiction = Some(answer),
            (Some(_), Some(_)) => {}
        }
        let is_done = is_done(item, entry);
        state.answered += usize::from(first);
        state.done = state.done + usize::from(is_done) - usize::from(was_done);
    }

    /// Dead letters that are still to come; none where nobody watches.
    pub(in crate::cli) fn dead_letters_missing(&self) -> usize {
        let state = self.state();
        self.refused()
            .filter(|item| !state.dead_letters.contains(&item.digest))
            .count()
    }

    fn refused(&self) -> impl Iterator<Item = &Item> {
        self.items
            .iter()
            .filter(|item| item.expected.verdict() == VerdictKind::Rejected)
    }

    /// A first outcome event with its routing key.
    pub(in crate::cli) fn sample(&self) -> Option<(String, String)> {
        self.state().sample.clone()
    }

    /// From the first publication of these to the last answer.
    pub(in crate::cli) fn span(&self, items: std::ops::Range<usize>) -> Duration {
        let state = self.state();
        let entries = || state.entries.get(items.clone()).into_iter().flatten();
        let first = entries().filter_map(|entry| entry.published).min();
        let last = entries().filter_map(|entry| entry.answered).max();
        first
            .zip(last)
            .map_or(Duration::ZERO, |(first, last)| last.saturating_duration_since(first))
    }

    /// From publishing to the first event, of these.
    pub(in crate::cli) fn latency(&self, items: std::ops::Range<usize>) -> Latency {
        let state = self.state();
        let mut times: Vec<f64> = state
            .entries
            .get(items)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.answered?.saturating_duration_since(entry.published?)))
            .map(|time| (time.as_secs_f64() * 100_000.0).round() / 100.0)
            .collect();
        times.sort_by(f64::total_cmp);
        let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1)));
        Latency {
            p50: at(50).copied().unwrap_or_default(),
            p90: at(90).copied().unwrap_or_default(),
            p99: at(99).copied().unwrap_or_default(),
            max: times.last().copied().unwrap_or_default(),
        }
    }

    /// The account of everything.
    pub(in crate::cli) fn findings(&self, watched_dead_letters: bool) -> Findings {
        let state = self.state();
        let mut findings = Findings {
            expected: Counts::default(),
            actual: Counts::default(),
            unaccounted: 0,
            parked_on_the_way: state.entries.iter().filter(|entry| entry.parked).count(),
            reasons: Vec::new(),
            events: state.by_type.clone(),
            extra_copies: state.copies,
            dead_letters: state.dead_letters.len(),
            unexpected: Vec::new(),
            problems: state.problems.clone(),
        };
        let mut reasons: BTreeMap<Reason, (usize, usize)> = BTreeMap::new();
        let mut unlisted = 0_usize;
        for (item, entry) in self.items.iter().zip(&state.entries) {
            findings.expected.add(item.expected.verdict());
            if let Some(reason) = item.expected.reason() {
                reasons.entry(reason).or_default().0 += 1;
            }
            match entry.answer {
                Some(Heard::Settled) => findings.actual.add(VerdictKind::Settled),
                Some(Heard::Duplicate) => findings.actual.add(VerdictKind::Duplicate),
                Some(Heard::Rejected(reason)) => {
                    findings.actual.add(VerdictKind::Rejected);
                    reasons.entry(reason).or_default().1 += 1;
                }
                None if entry.parked => findings.actual.add(VerdictKind::Parked),
                None => findings.unaccounted += 1,
            }
            let no_dead_letter = watched_dead_letters
                && item.expected.verdict() == VerdictKind::Rejected
                && !state.dead_letters.contains(&item.digest);
            if is_done(item, entry) && entry.contradiction.is_none() && !no_dead_letter {
                continue;
            }
            if findings.unexpected.len() == LISTED_MAX {
                unlisted += 1;
                continue;
            }
            let dead = if no_dead_letter { ", no dead letter seen" } else { "" };
            findings.unexpected.push(Unexpected {
                enterprise_id: item.enterprise_id.clone(),
                nonce: item.nonce.clone(),
                message_digest: hex::encode(item.digest),
                expected: item.expected.to_string(),
                actual: format!("{}{dead}", heard(entry)),
            });
        }
        unlisted += state.problems_unlisted;
        if unlisted > 0 {
            findings.problems.push(format!("and {unlisted} more"));
        }
        findings.reasons = reasons
            .into_iter()
            .map(|(reason, (expected, actual))| ReasonCount {
                reason,
                class: reason.class(),
                is_final: reason.is_final(),
                expected,
                actual,
            })
            .collect();
        findings
    }
}

/// Whether a message came to what it must.
fn is_done(item: &Item, entry: &Entry) -> bool {
    let answer = match item.expected {
        Expected::Settled | Expected::ParkedThenSettled => Some(Heard::Settled),
        Expected::Duplicate => Some(Heard::Duplicate),
        Expected::Parked => None,
        Expected::ParkedThenRejected => Some(Heard::Rejected(Reason::AllocationNotFound)),
        Expected::Rejected(reason) => Some(Heard::Rejected(reason)),
    };
    entry.published.is_some() && entry.answer == answer && entry.parked == item.expected.parks()
}

/// The digest of the message that a dead letter is about. Of one that was too large the body is only a part: its header says.
fn message_digest(letter: &Delivery) -> [u8; 32] {
    let headers = letter.properties.headers.as_ref();
    let said = headers.and_then(|headers| headers.get(header::DIGEST)?.as_text());
    said.and_then(|text| hex::decode(text).ok()?.try_into().ok())
        .unwrap_or_else(|| sha256(&letter.body))
}

fn heard(entry: &Entry) -> String {
    let name = |answer: Heard| match answer {
        Heard::Settled => "settled".to_owned(),
        Heard::Duplicate => "duplicate".to_owned(),
        Heard::Rejected(reason) => format!("rejected: {reason}"),
    };
    let mut words = Vec::new();
    if entry.published.is_none() {
        words.push("not published".to_owned());
    }
    if entry.parked {
        words.push("parked".to_owned());
    }
    words.extend(entry.answer.map(name));
    words.extend(entry.contradiction.map(name));
    if words.is_empty() {
        return "nothing was heard of it".to_owned();
    }
    words.join(", then ")
}

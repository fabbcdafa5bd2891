//! Dead letters: what one says of itself, the message inside it as the partner sent it, and how it joins what is known.

use std::collections::{BTreeMap, BTreeSet};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::{
    decide::{Judged, Judgement, Reason, Verdict, VerdictKind},
    delivery::{Cut, Delivery, HEAD_MAX, HeaderValue, Headers, Properties},
    message::{self, Facts},
    wire,
};

mod path;
mod taken;

pub use path::may_be_cut;
pub use taken::taken;

/// The input queue, and with a dot and an enterprise behind it a partner's own.
const INPUT_QUEUE: &str = "settlement.updates";

/// Of a dead letter with only the head of a message: bytes of the body as received.
pub const BODY_LENGTH_HEADER: &str = "settled-body-length";

/// Who made a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeBy {
    /// The worker, with a verdict.
    Settled,
    /// The broker by itself.
    Broker,
    /// Nobody known: whoever put it there is not trusted, or it does not say what a dead letter of ours says.
    Unknown,
}

impl MadeBy {
    pub const ALL: [MadeBy; 3] = [MadeBy::Settled, MadeBy::Broker, MadeBy::Unknown];

    pub fn as_str(self) -> &'static str {
        match self {
            MadeBy::Settled => "settled",
            MadeBy::Broker => "broker",
            MadeBy::Unknown => "unknown",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|made_by| made_by.as_str() == text)
    }
}

/// Whose word counts: the logins by which workers publish dead letters. The broker lets nobody publish under another's
/// `user_id`, so what a letter carries is who wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trusted(BTreeSet<String>);

impl Trusted {
    /// These logins; an empty one stands for letters without a `user_id`.
    pub fn new(logins: impl IntoIterator<Item = String>) -> Self {
        Self(logins.into_iter().collect())
    }

    fn holds(&self, user_id: Option<&str>) -> bool {
        self.0.contains(user_id.unwrap_or_default())
    }
}

/// Why a message is a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    pub made_by: MadeBy,
    pub reason: Reason,
    pub detail: String,
    /// When it failed, where that is known.
    pub failed_at: Option<Timestamp>,
}

impl Cause {
    /// Whether nobody judged the message: what the broker gave up has no event yet, and is in no batch.
    pub fn is_untold(&self) -> bool {
        self.made_by == MadeBy::Broker && matches!(self.reason, Reason::DeliveryLimit | Reason::Expired)
    }
}

/// Whose message a row is, as wide as the judgement: every part of a message that a check reads.
///
/// What the checks of the table of reasons read is the routing key, the body, `content_type`, `content_encoding`,
/// `user_id`, and whether the message is above a limit. Messages that are equal in all of it get the same verdict at the
/// same moment, whatever else they carry (`message_id`, `reply_to`, `expiration`, other headers): they are one row, which
/// keeps what the first of them carried and shows why the last one failed. Messages that differ in any of it are rows of
/// their own, so that a copy under another login, or with another content type, touches nothing but itself. What nobody
/// known has put into the queue is apart from all others, or its word would be taken for theirs.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    pub routing_key: &'a str,
    /// SHA-256 of the whole body.
    pub digest: [u8; 32],
    pub properties: &'a Properties,
    pub is_too_large: bool,
    pub is_unknown: bool,
}

impl Identity<'_> {
    /// The row's id: the head of SHA-256 over all of it, each part with its length before it, so that no two messages
    /// are written alike.
    pub fn id(&self) -> Uuid {
        let mut text = b"settled dead letter 2".to_vec();
        text.push(u8::from(self.is_unknown));
        text.push(u8::from(self.is_too_large));
        let mut part = |bytes: Option<&[u8]>| {
            text.push(u8::from(bytes.is_some()));
            let bytes = bytes.unwrap_or_default();
            text.extend_from_slice(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
            text.extend_from_slice(bytes);
        };
        part(Some(self.routing_key.as_bytes()));
        part(Some(&self.digest));
        for property in [
            &self.properties.content_type,
            &self.properties.content_encoding,
            &self.properties.user_id,
        ] {
            part(property.as_deref().map(str::as_bytes));
        }
        // Whatever else it came with, one that can not be decoded is judged by that.
        if self.properties.undecodable.is_some() {
            part(Some(b"undecodable"));
        }
        let mut head = [0; 16];
        head.copy_from_slice(message::sha256(text).first_chunk::<16>().unwrap_or(&[0; 16]));
        Uuid::from_bytes(head)
    }
}

/// The same for all of one partner, reason and kind of detail.
pub fn group_of(enterprise_id: Option<&str>, reason: Reason, detail: &str) -> String {
    let name = format!("{}\0{reason}\0{}", enterprise_id.unwrap_or_default(), shape_of(detail));
    hex::encode(message::sha256(name).first_chunk::<8>().unwrap_or(&[0; 8]))
}

/// A detail without what differs from message to message: ids, long hexadecimal numbers and other numbers.
pub fn shape_of(detail: &str) -> String {
    const ID_LEN: usize = 36;
    const HEX_LEN: usize = 16;
    let mut shape = String::with_capacity(detail.len());
    let mut rest = detail;
    while let Some(first) = rest.chars().next() {
        if !first.is_ascii_alphanumeric() {
            shape.push(first);
            rest = rest.get(first.len_utf8()..).unwrap_or_default();
            continue;
        }
        if let Some((head, tail)) = rest.split_at_checked(ID_LEN)
            && message::parse_uuid(head).is_some()
            && !tail.starts_with(|next: char| next.is_ascii_alphanumeric())
        {
            shape.push_str("<id>");
            rest = tail;
            continue;
        }
        let end = rest
            .find(|letter: char| !letter.is_ascii_alphanumeric())
            .unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        let is_number = |letter: char| letter.is_ascii_digit();
        if word.len() >= HEX_LEN && word.chars().all(|letter| letter.is_ascii_hexdigit()) && word.contains(is_number) {
            shape.push_str(if word.chars().all(is_number) { "<n>" } else { "<hex>" });
        } else {
            let mut in_number = false;
            for letter in word.chars() {
                match (is_number(letter), in_number) {
                    (true, false) => shape.push_str("<n>"),
                    (true, true) => {}
                    (false, _) => shape.push(letter),
                }
                in_number = is_number(letter);
            }
        }
        rest = tail;
    }
    shape
}

/// Takes a delivery from the dead-letter queue apart: the message as the partner sent it, and why it is here. What it says
/// of itself counts only if the broker's own record or somebody trusted says it.
pub fn open(mut delivery: Delivery, trusted: &Trusted, now: Timestamp) -> (Delivery, Cause) {
    let headers = delivery.properties.headers.take().unwrap_or_default();
    let cause = match death_at_input(&headers) {
        Some(death) if is_of_the_broker(death, now) => Ok(by_broker(&mut delivery, death)),
        Some(_) => Err("the record of its death is not one that the broker writes".to_owned()),
        None if !trusted.holds(delivery.properties.user_id.as_deref()) => Err(
            "who put it into settlement.dead is no login of a worker (its user_id says so, see broker.trusted_users)"
                .to_owned(),
        ),
        None => by_settled(&mut delivery, &headers)
            .map_err(|header| format!("the header {header} is missing or not what a dead letter of ours has")),
    };
    let cause = cause.unwrap_or_else(|why| {
        // Whose message it is nobody can say either: its user_id is whoever put it there.
        delivery.properties.user_id = None;
        Cause {
            made_by: MadeBy::Unknown,
            reason: Reason::Internal,
            detail: format!("nobody knows why: {why}"),
            failed_at: None,
        }
    });
    // Where all that it came with was read anew, its headers are the message's own.
    let headers: Headers = delivery
        .properties
        .headers
        .take()
        .unwrap_or(headers)
        .into_iter()
        .filter(|(name, _)| !is_of_dead_letters(name))
        .collect();
    delivery.properties.headers = (!headers.is_empty()).then_some(headers);
    (delivery, cause)
}

/// The header that holds a whole property list (see [`wire`]) of which not everything can be decoded.
pub(super) const ORIGIN_PROPERTIES: &str = "settled-origin-properties";

/// The header that holds, as they were, the headers that travel as text or not at all (see [`super::carried`]): a table.
pub(super) const ORIGIN_HEADERS: &str = "settled-origin-headers";

/// Bytes as a text header.
pub(super) fn as_text(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

fn of_text(text: &str) -> Option<Vec<u8>> {
    BASE64_STANDARD.decode(text).ok()
}

/// Whether a header is the broker's own record or ours, and so none of the partner's.
pub(super) fn is_of_dead_letters(name: &str) -> bool {
    matches!(name, "CC" | "BCC" | "x-delivery-count" | "x-death")
        || ["x-first-death-", "x-last-death-", "settled-"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// The broker's record of the last death, if that was at an input queue. The broker puts its record first, whatever the
/// sender wrote; every other header about deaths may be the sender's.
fn death_at_input(headers: &Headers) -> Option<&Headers> {
    let HeaderValue::Array(deaths) = headers.get("x-death")? else {
        return None;
    };
    let Some(HeaderValue::Table(death)) = deaths.first() else {
        return None;
    };
    let queue = death.get("queue")?.as_text()?;
    let own = queue.strip_prefix(INPUT_QUEUE).and_then(|rest| rest.strip_prefix('.'));
    (queue == INPUT_QUEUE || own.is_some_and(message::is_enterprise_id)).then_some(death)
}

/// Whether a record has the whole shape that the broker gives it, the same from 3.10 to 4.3: every field, with its type. A
/// message may bring a record along, and the broker up to 3.12 counts one up whose queue and reason are the true ones and
/// keeps the rest of it as it came. Whoever may write to settlement.dead can write a whole one; what that is good for
/// stands in docs/dead-letters.md.
fn is_of_the_broker(death: &Headers, now: Timestamp) -> bool {
    let is_text = |name: &str| death.get(name).and_then(HeaderValue::as_text).is_some();
    let is_counted = matches!(death.get("count"), Some(HeaderValue::LongLongInt(count)) if *count > 0);
    let latest = now.saturating_add(CLOCK_TOLERANCE).unwrap_or(Timestamp::MAX);
    let has_time = time_of(death).is_some_and(|time| time <= latest);
    let has_keys = match death.get("routing-keys") {
        Some(HeaderValue::Array(keys)) => {
            !keys.is_empty() && keys.iter().all(|key| matches!(key, HeaderValue::LongString(_)))
        }
        Some(_) | None => false,
    };
    let expiration = match death.get("original-expiration") {
        None => true,
        Some(value) => value
            .as_text()
            .is_some_and(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())),
    };
    is_counted && has_time && has_keys && expiration && ["queue", "reason", "exchange"].into_iter().all(is_text)
}

/// How far the broker's clock may be ahead of ours before its record is nobody's.
const CLOCK_TOLERANCE: SignedDuration = SignedDuration::from_mins(10);

fn time_of(death: &Headers) -> Option<Timestamp> {
    let Some(HeaderValue::Timestamp(seconds)) = death.get("time") else {
        return None;
    };
    Timestamp::from_second(i64::try_from(*seconds).ok()?).ok()
}

/// What the record says. Of a message that died here before and came back with its record, the broker up to 3.12 keeps
/// the first time.
fn by_broker(delivery: &mut Delivery, death: &Headers) -> Cause {
    let text = |name: &str| death.get(name).and_then(HeaderValue::as_text);
    if let Some(exchange) = text("exchange") {
        exchange.clone_into(&mut delivery.exchange);
    } else {
        INPUT_QUEUE.clone_into(&mut delivery.exchange);
    }
    if let Some(expiration) = text("original-expiration") {
        delivery.properties.expiration = Some(expiration.to_owned());
    }
    let (reason, detail) = match text("reason") {
        // By whom, and whether it is too large, the message itself says.
        Some("rejected") => (Reason::Internal, REJECTED.to_owned()),
        Some("delivery_limit") => (
            Reason::DeliveryLimit,
            "the broker gave it up: it was handed out too often without an acknowledgement".to_owned(),
        ),
        Some("expired") => (
            Reason::Expired,
            "the sender's own expiration ran out before it was read".to_owned(),
        ),
        Some(_) | None => (
            Reason::Internal,
            "the broker dead-lettered it for a reason that this version does not know".to_owned(),
        ),
    };
    Cause {
        made_by: MadeBy::Broker,
        reason,
        detail,
        failed_at: time_of(death),
    }
}

/// Of what was rejected at its queue. Workers of earlier versions left what is too large to the broker so.
const REJECTED: &str = "somebody rejected it at its queue, although it is within the limits";

/// What the worker wrote beside the message; else the name of the first header that is not what it writes.
fn by_settled(delivery: &mut Delivery, headers: &Headers) -> Result<Cause, &'static str> {
    let text = |name: &'static str| headers.get(name).and_then(HeaderValue::as_text).ok_or(name);
    let reason = Reason::parse(text("settled-reason")?).ok_or("settled-reason")?;
    if headers.get("settled-class") != Some(&HeaderValue::LongLongInt(i64::from(reason.class()))) {
        return Err("settled-class");
    }
    if headers.get("settled-final") != Some(&HeaderValue::Boolean(reason.is_final())) {
        return Err("settled-final");
    }
    let detail = text("settled-detail")?;
    let digest = text("settled-digest")?;
    let cut = match headers.get(BODY_LENGTH_HEADER) {
        None => None,
        Some(length) => Some(cut_of(delivery, length, digest, reason, detail)?),
    };
    // Nobody can check the digest of what is not there.
    let is_whole = cut
        .as_ref()
        .is_none_or(|cut| usize::try_from(cut.body_len) == Ok(delivery.body.len()));
    if is_whole && digest != hex::encode(message::sha256(&delivery.body)) {
        return Err("settled-digest");
    }
    let failed_at: Timestamp = text("settled-failed-at")?.parse().map_err(|_| "settled-failed-at")?;
    let exchange = text("settled-origin-exchange")?;
    let routing_key = text("settled-origin-routing-key")?;
    let origin = |name: &str| headers.get(name).and_then(HeaderValue::as_text).map(str::to_owned);
    exchange.clone_into(&mut delivery.exchange);
    routing_key.clone_into(&mut delivery.routing_key);
    delivery.properties.user_id = origin("settled-origin-user-id");
    delivery.properties.expiration = origin("settled-origin-expiration");
    delivery.cut = cut.map(Box::new);
    if let Some(table) = origin(ORIGIN_HEADERS) {
        let originals = of_text(&table)
            .and_then(|table| wire::headers(&table))
            .ok_or(ORIGIN_HEADERS)?;
        let mut headers = headers.clone();
        headers.extend(originals);
        delivery.properties.headers = Some(headers);
    }
    if let Some(list) = origin(ORIGIN_PROPERTIES) {
        delivery.properties = wire::read(&of_text(&list).ok_or(ORIGIN_PROPERTIES)?);
    }
    Ok(Cause {
        made_by: MadeBy::Settled,
        reason,
        detail: detail.to_owned(),
        failed_at: Some(failed_at),
    })
}

/// What a worker left out of a message that was too large.
fn cut_of(
    delivery: &Delivery,
    length: &HeaderValue,
    digest: &str,
    reason: Reason,
    detail: &str,
) -> Result<Cut, &'static str> {
    let HeaderValue::LongLongInt(length) = length else {
        return Err(BODY_LENGTH_HEADER);
    };
    let body_len = u64::try_from(*length).map_err(|_| BODY_LENGTH_HEADER)?;
    let kept = usize::try_from(body_len).unwrap_or(usize::MAX).min(HEAD_MAX);
    if delivery.body.len() != kept {
        return Err(BODY_LENGTH_HEADER);
    }
    let digest = hex::decode(digest).ok().and_then(|digest| digest.try_into().ok());
    Ok(Cut {
        body_len,
        digest: digest.ok_or("settled-digest")?,
        detail: if reason == Reason::MessageTooLarge {
            detail.to_owned()
        } else {
            // Something else befell it, and yet it is what it is.
            format!("the message was larger than is allowed: the head of its {body_len} bytes is kept")
        },
        // Where it had any within the limits they are here.
        without_headers: false,
    })
}

/// The cause with what only the message itself can say: by how much it is too large.
pub fn explain(cause: Cause, facts: &Facts) -> Cause {
    if cause.made_by != MadeBy::Broker || cause.detail != REJECTED {
        return cause;
    }
    match &facts.content {
        Err(refusal) if refusal.reason == Reason::MessageTooLarge => Cause {
            reason: Reason::MessageTooLarge,
            detail: refusal.detail.clone(),
            ..cause
        },
        Err(_) | Ok(_) => cause,
    }
}

/// Why no database can hold a dead letter, if so: PostgreSQL has no U+0000 in text.
pub fn unstorable(delivery: &Delivery) -> Option<&'static str> {
    let has_nul = |text: &str| text.contains('\0');
    (has_nul(&delivery.routing_key) || has_nul(&delivery.exchange))
        .then_some("its routing key or exchange holds the character U+0000")
}

/// Where a stored dead letter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It waits for an operator.
    Open,
    /// A run asked for its replay.
    Due,
    /// Its replay parked it: the message waits for its allocation.
    Parked,
    /// Its replay settled it, or found it settled.
    Settled,
    /// An operator is done with it.
    Discarded,
}

impl State {
    pub const ALL: [State; 5] = [State::Open, State::Due, State::Parked, State::Settled, State::Discarded];

    pub fn as_str(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Due => "due",
            State::Parked => "parked",
            State::Settled => "settled",
            State::Discarded => "discarded",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

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
    pub message: Judged<'a>,
    pub cause: &'a Cause,
    /// It may have been stored before: the broker hands it out again, or an earlier commit of ours is unknown.
    pub again: bool,
    /// What it asks for is there already: judged now, it would be a duplicate.
    pub has_effect: bool,
}

impl Arrival<'_> {
    pub fn id(&self) -> Uuid {
        let is_too_large = match &self.message.facts.content {
            Err(refusal) => refusal.reason == Reason::MessageTooLarge,
            Ok(_) => false,
        };
        Identity {
            routing_key: &self.message.delivery.routing_key,
            digest: self.message.facts.message_digest,
            properties: &self.message.delivery.properties,
            is_too_large,
            is_unknown: self.cause.made_by == MadeBy::Unknown,
        }
        .id()
    }
}

/// A row as it will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
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
    pub entries: BTreeMap<Uuid, Entry>,
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
            known.get(&id).map(|known| Entry {
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
            None => Entry {
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
                Entry {
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
pub fn ruling<'a>(message: Judged<'_>, judgement: &'a Judgement) -> Option<Ruling<'a>> {
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

#[cfg(test)]
mod tests;

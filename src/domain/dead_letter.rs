//! Dead letters: what one says of itself, the message inside it as the partner sent it, and how it joins what is known.

use std::collections::BTreeMap;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use jiff::Timestamp;
use uuid::Uuid;

use super::{
    decide::{Judged, Judgement, Reason, Verdict, VerdictKind},
    delivery::{Cut, Delivery, HEAD_MAX, HeaderValue, Headers},
    message::{self, Facts},
    wire,
};

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
    /// Somebody by hand: it does not say what a dead letter of ours says.
    Unknown,
}

impl MadeBy {
    pub fn as_str(self) -> &'static str {
        match self {
            MadeBy::Settled => "settled",
            MadeBy::Broker => "broker",
            MadeBy::Unknown => "unknown",
        }
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

/// A row's id: the head of SHA-256(routing key, 0x00, SHA-256 of the body). Whoever knows the message knows it.
pub fn id_of(routing_key: &str, body_digest: &[u8; 32]) -> Uuid {
    let digest = message::sha256([routing_key.as_bytes(), &[0], body_digest].concat());
    let mut head = [0; 16];
    head.copy_from_slice(digest.first_chunk::<16>().unwrap_or(&[0; 16]));
    Uuid::from_bytes(head)
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

/// Takes a delivery from the dead-letter queue apart: the message as the partner sent it, and why it is here.
pub fn open(mut delivery: Delivery) -> (Delivery, Cause) {
    let headers = delivery.properties.headers.take().unwrap_or_default();
    let cause = match death_at_input(&headers) {
        Some(death) => by_broker(&mut delivery, death),
        None => match by_settled(&mut delivery, &headers) {
            Ok(cause) => cause,
            Err(header) => Cause {
                made_by: MadeBy::Unknown,
                reason: Reason::Internal,
                detail: format!(
                    "nobody knows why: the header {header} is missing or not what a dead letter of ours has"
                ),
                failed_at: None,
            },
        },
    };
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

/// Queue and reason are the broker's. Where the sender forged a record with these two, the broker keeps the rest of the
/// forged one (3.10): exchange, time and original-expiration are as good as the sender's word.
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
        Some("rejected") => (Reason::MessageTooLarge, String::new()),
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
    let failed_at = match death.get("time") {
        Some(HeaderValue::Timestamp(seconds)) => i64::try_from(*seconds)
            .ok()
            .and_then(|seconds| Timestamp::from_second(seconds).ok()),
        Some(_) | None => None,
    };
    Cause {
        made_by: MadeBy::Broker,
        reason,
        detail,
        failed_at,
    }
}

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
    if cause.made_by != MadeBy::Broker || cause.reason != Reason::MessageTooLarge {
        return cause;
    }
    let detail = match &facts.content {
        Err(refusal) if refusal.reason == Reason::MessageTooLarge => refusal.detail.clone(),
        Err(_) | Ok(_) => "it was rejected at its queue, although it is within the limits".to_owned(),
    };
    Cause { detail, ..cause }
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
}

impl Arrival<'_> {
    pub fn id(&self) -> Uuid {
        id_of(&self.message.delivery.routing_key, &self.message.facts.message_digest)
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
            })
        });
        let entry = match earlier {
            None => Entry {
                is_new: true,
                state: State::Open,
                first_failed_at: failed_at,
                last_failed_at: failed_at,
                discarded_at: None,
                seen: 1,
                last: Some(index),
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
                Entry {
                    state: if reopened { State::Open } else { entry.state },
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

//! Every operational signal as a type: one [`Signal::emit`], one log line, one metric.
//!
//! Nothing else in the worker logs or counts. A signal carries ids, counts and codes, never a body, key or signature.

use std::collections::{BTreeMap, HashSet};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use metrics::{
    SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
    with_local_recorder,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tracing::{Level, debug, error, info, trace, warn};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, Registry};

use uuid::Uuid;

use crate::broker::topology;
use crate::config::{LogFormat, LogLevel, LogSettings};
use crate::domain::decide::{Reason, VerdictKind};
use crate::plain::ForPeople;

/// What happened.
#[derive(Debug)]
pub enum Signal<'a> {
    /// The worker's process is up; nothing is connected yet.
    Started {
        worker: &'a str,
        lanes: usize,
        version: &'a str,
    },
    /// HTTP answers here.
    HttpListening {
        address: SocketAddr,
    },
    /// A connection that asked for nothing, or read nothing, was closed for another.
    HttpConnectionShed,
    /// Consumers are attached and the database answers.
    Ready,
    /// It was ready, or never became so.
    NotReady {
        reasons: &'a [String],
    },

    /// A lane consumes a queue.
    ConsumerAttached {
        lane: usize,
        queue: &'a str,
    },
    /// The broker ended the consumer without an error (queue deleted, consumer timeout): an incident.
    ConsumerCancelled {
        lane: usize,
        queue: &'a str,
    },
    /// A queue, or what stands around it, is not what it must be: it is not consumed. An alarm.
    TopologyMisfit {
        lane: usize,
        queue: &'a str,
        problem: &'a str,
    },
    /// It was looked at, before a consumer is attached.
    TopologyLooked {
        queue: &'a str,
        fits: bool,
    },
    /// What this user has no right to look at.
    TopologyUnseen {
        queue: &'a str,
        unseen: &'a [String],
    },
    /// A partner's own queue is beyond the bound, and nobody here consumes it. An alarm.
    OwnQueueUnserved {
        queue: &'a str,
        most: usize,
    },
    /// Connection or channel broke under the consumer.
    ConsumerLost {
        lane: usize,
        queue: &'a str,
        error: &'a str,
    },
    /// Messages came whose properties can not be decoded: they are judged without them.
    Undecodable {
        lane: usize,
        queue: &'a str,
        messages: usize,
    },
    /// We ended the consumer ourselves: a pause or a stop.
    ConsumerDetached {
        lane: usize,
        queue: &'a str,
    },
    /// An acknowledgement did not reach the broker: the messages come again, and are duplicates then.
    AckLost {
        lane: usize,
        error: &'a str,
    },
    /// A dependency did not answer; it is tried again after `wait`.
    Retrying {
        dependency: Dependency,
        attempt: u32,
        wait: Duration,
        error: &'a str,
    },

    /// A batch committed.
    BatchJudged {
        batch: Uuid,
        lane: usize,
        from: Intake,
        tally: &'a Tally,
    },
    /// A batch's transaction failed in a way that passes, and runs again.
    BatchRetried {
        batch: Uuid,
        lane: usize,
        attempt: u32,
        sqlstate: Option<&'a str>,
        error: &'a str,
    },
    /// One step of a batch took this long.
    Stage {
        stage: Stage,
        elapsed: Duration,
    },
    /// What was asked of the database under this name waited for so many answers, those of statements sent together as one.
    RoundTrips {
        transaction: &'static str,
        count: u64,
    },
    /// From receipt at intake to the confirmed event, one for each message.
    EndToEnd {
        elapsed: &'a [Duration],
    },
    /// The one message that the database refuses; it becomes `internal`. An alarm.
    CulpritIsolated {
        batch: Uuid,
        digest: &'a str,
        sqlstate: Option<&'a str>,
        error: &'a str,
    },

    /// Intake pauses: nothing is taken until the cause is gone.
    Paused {
        cause: Cause,
        why: &'a str,
    },
    /// It takes again.
    Resumed {
        cause: Cause,
        paused_for: Duration,
    },
    /// Messages were put into the side room instead of being judged at once.
    Held {
        why: &'static str,
        messages: u64,
    },
    /// Messages could not be put into the side room.
    HoldFailed {
        error: &'a str,
    },
    /// A pack of the side room is of a format that this version can not read.
    HeldUnreadable {
        id: Uuid,
    },
    /// Rows that a batch needs are locked by a transaction that stays open.
    LocksFound {
        locks: usize,
    },
    /// What is in the side room.
    HeldMeasured {
        held: &'a [HeldOf],
    },
    /// A parked message is stored in a format that this version can not read: it waits for one that can. An alarm.
    ParkedUnreadable {
        key: Uuid,
    },
    /// The same of a dead letter that is to be replayed. An alarm.
    ReplayUnreadable {
        id: Uuid,
    },
    /// Dead letters were stored: messages that had no row, further failures of messages that had one, and copies of what
    /// was stored before; the last one failed this long ago.
    DeadLettersCollected {
        new: u64,
        again: u64,
        copies: u64,
        lag: Duration,
    },
    /// Nothing waits to be collected.
    CollectorIdle,
    /// Dead letters take all the room that they may: the collector takes none. An alarm.
    DeadLettersFull {
        why: &'a str,
    },
    /// There is room again.
    DeadLettersHaveRoom,
    /// What dead letters take, and how many partners have most of their share.
    DeadLetterSpace {
        rows: u64,
        bytes: u64,
        filled: f64,
        partners_near: usize,
    },
    /// Dead letters take most of the room that they may, in all or one partner's. An alarm.
    DeadLettersNearBound {
        of: &'a str,
        rows: u64,
        bytes: u64,
        filled: f64,
    },
    /// Open dead letters whose message has settled since.
    DeadLettersSettledSince {
        closed: u64,
    },
    /// A dead letter that the database refuses, or no database can hold, goes to settlement.unreadable. An alarm.
    DeadLetterSetApart {
        digest: &'a str,
        sqlstate: Option<&'a str>,
        error: &'a str,
    },
    /// There are more messages in settlement.unreadable than before: somebody has to look at them. An alarm.
    UnreadableGrew {
        messages: u64,
    },
    /// Unacknowledged messages went back to the broker.
    HandedBack {
        lane: usize,
        why: &'a str,
    },

    /// A batch's publications are confirmed.
    Published {
        batch: Uuid,
        published: &'a Published,
    },
    /// Publishing failed; the row stands in the outbox and goes out again as a whole.
    PublishFailed {
        batch: Uuid,
        error: &'a str,
    },
    /// The row went out again on a new connection.
    RowRepublished {
        batch: Uuid,
        attempt: u32,
    },
    /// A dead letter found no queue: it would be lost, so the lane stops. An alarm.
    DeadLetterReturned {
        batch: Uuid,
        routing_key: &'a str,
        message_id: Option<&'a str>,
    },
    /// The relay took a row whose lane is gone.
    RelayTook {
        batch: Uuid,
        age: Duration,
    },
    /// The broker refuses this publication even alone; it is set aside. An alarm.
    PublicationRefused {
        batch: Uuid,
        routing_key: &'a str,
        error: &'a str,
    },
    /// An answer to a partner's `reply_to`, or why there is none.
    Reply {
        result: ReplyResult,
    },

    /// Measured now and then.
    OutboxMeasured {
        pending: u64,
        oldest: Option<Duration>,
    },
    ParkedMeasured {
        parked: u64,
    },
    QueueMeasured {
        queue: &'a str,
        messages: u64,
    },
    /// Open dead letters by reason, the age of the oldest, replay runs by state.
    DeskMeasured {
        open: &'a [(Reason, u64)],
        oldest: Option<Duration>,
        runs: &'a [(String, u64)],
    },

    /// SIGTERM or an unrecoverable fault: intake ends.
    Stopping {
        why: &'a str,
    },
    /// What was delivered is settled, or went back.
    Drained {
        elapsed: Duration,
    },
    /// The last line.
    Stopped,
}

/// The states of a replay run.
const RUN_STATES: &[&str] = &["running", "cancelled", "stopped", "done"];

/// A label with few, fixed values.
macro_rules! label {
    ($(#[$about:meta])* $name:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($variant),+ }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

label!(
    /// What we stand on.
    Dependency { Database = "database", Broker = "broker" }
);
label!(
    /// The door a batch came through.
    Intake { Queue = "queue", Parked = "parked", Replayed = "replayed", Held = "held", Dead = "dead" }
);
label!(
    /// A step of a batch that is timed.
    Stage { Facts = "facts", Hold = "hold", Settle = "settle", Publish = "publish", Collect = "collect" }
);
label!(
    /// Why intake is paused.
    Cause {
        Database = "database",
        Broker = "broker",
        Culprits = "culprits",
        Schema = "schema",
        DeadLetterReturned = "dead_letter_returned",
    }
);
label!(
    /// What became of an event: confirmed with or without a queue bound for it.
    Fate { Confirmed = "confirmed", Unrouted = "unrouted" }
);
label!(
    /// What became of an answer to `reply_to`.
    ReplyResult { Sent = "sent", Failed = "failed", Ignored = "ignored" }
);
label!(
    /// The type of an event.
    EventType {
        AllocationCleared = "allocation.cleared",
        AllocationReleased = "allocation.released",
        DeallocationCleared = "deallocation.cleared",
        DeallocationReleased = "deallocation.released",
        UpdateParked = "update.parked",
        UpdateRejected = "update.rejected",
        Other = "other",
    }
);

impl EventType {
    /// Reads it off an event's routing key: the type, alone or followed by a dot and the enterprise.
    pub fn of_routing_key(routing_key: &str) -> Self {
        let mut parts = routing_key.splitn(3, '.');
        let (first, second) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        Self::ALL
            .iter()
            .copied()
            .find(|kind| kind.as_str().split_once('.') == Some((first, second)))
            .unwrap_or(EventType::Other)
    }
}

/// The partners that have a label of their own. Whoever publishes chooses the enterprise in the routing key, so the
/// set is bounded and only partners that the registry knows get in.
#[derive(Debug)]
pub struct PartnerLabels {
    max: usize,
    known: Mutex<HashSet<Arc<str>>>,
}

/// Partners beyond the bound.
const OTHER: &str = "other";
/// Messages of nobody we know, or not shown to be anybody's.
const UNKNOWN: &str = "unknown";

impl PartnerLabels {
    /// At most `max` (`http.partner_labels_max`) labels beside `other` and `unknown`.
    pub fn new(max: usize) -> Self {
        PartnerLabels {
            max,
            known: Mutex::new(HashSet::new()),
        }
    }

    fn label(&self, enterprise_id: Option<&str>, registered: bool) -> Arc<str> {
        let Some(enterprise_id) = enterprise_id else {
            return UNKNOWN.into();
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(label) = known.get(enterprise_id) {
            return Arc::clone(label);
        }
        if !registered {
            return UNKNOWN.into();
        }
        if known.len() >= self.max || enterprise_id == OTHER || enterprise_id == UNKNOWN {
            return OTHER.into();
        }
        let label: Arc<str> = enterprise_id.into();
        known.insert(Arc::clone(&label));
        label
    }
}

/// The verdicts of one batch, counted.
#[derive(Debug, Default)]
pub struct Tally {
    verdicts: BTreeMap<(VerdictKind, Option<Reason>), u64>,
    partners: BTreeMap<(Arc<str>, VerdictKind), u64>,
    messages: u64,
}

impl Tally {
    pub fn new() -> Self {
        Self::default()
    }

    /// One message. `reason` is that of a rejection or a parking.
    pub fn add(
        &mut self,
        labels: &PartnerLabels,
        enterprise_id: Option<&str>,
        verdict: VerdictKind,
        reason: Option<Reason>,
    ) {
        // Only these say that the registry was asked and knew the partner.
        let registered = match reason {
            Some(
                Reason::MessageTooLarge
                | Reason::MalformedMessage
                | Reason::InvalidField
                | Reason::UnknownPartner
                | Reason::DeliveryLimit
                | Reason::Expired
                | Reason::Internal,
            ) => false,
            Some(
                Reason::SenderMismatch
                | Reason::MalformedSignature
                | Reason::SignatureMismatch
                | Reason::PayloadMismatch
                | Reason::NonceReused
                | Reason::PolicyContradiction
                | Reason::PartnerInactive
                | Reason::AllocationNotFound
                | Reason::NotPermitted
                | Reason::AllocationMismatch
                | Reason::AlreadySettled,
            )
            | None => true,
        };
        *self.verdicts.entry((verdict, reason)).or_default() += 1;
        *self
            .partners
            .entry((labels.label(enterprise_id, registered), verdict))
            .or_default() += 1;
        self.messages += 1;
    }

    pub fn messages(&self) -> u64 {
        self.messages
    }

    pub fn count(&self, verdict: VerdictKind) -> u64 {
        self.verdicts
            .iter()
            .filter(|((of, _), _)| *of == verdict)
            .map(|(_, count)| count)
            .sum()
    }
}

/// How much the side room holds for one reason.
#[derive(Clone, Copy, Debug)]
pub struct HeldOf {
    pub why: &'static str,
    pub messages: u64,
    pub bytes: u64,
    pub oldest: Duration,
}

/// The confirmed publications of one batch, counted.
#[derive(Debug, Default)]
pub struct Published {
    events: BTreeMap<(EventType, Fate), u64>,
    dead_letters: u64,
}

impl Published {
    pub fn new() -> Self {
        Self::default()
    }

    /// So many of a type: a message may hold several.
    pub fn events(&mut self, kind: EventType, fate: Fate, count: u64) {
        *self.events.entry((kind, fate)).or_default() += count;
    }

    pub fn dead_letter(&mut self) {
        self.dead_letters += 1;
    }
}

impl Signal<'_> {
    /// Says it: one log line, one metric.
    pub fn emit(&self) {
        match *self {
            Signal::Started { worker, lanes, version } => {
                info!(worker, lanes, version, "worker started");
            }
            Signal::HttpListening { address } => {
                info!(%address, "HTTP listens: /livez, /readyz, /metrics");
            }
            Signal::HttpConnectionShed => {
                counter!("settled_http_connections_shed_total").increment(1);
                // No louder: anybody who can connect could fill the log.
                trace!("an HTTP connection was closed to make room");
            }
            Signal::Ready => {
                gauge!("settled_ready").set(1.0);
                info!("ready");
            }
            Signal::NotReady { reasons } => {
                gauge!("settled_ready").set(0.0);
                warn!(reasons = reasons.join("; "), "not ready");
            }
            Signal::ConsumerAttached { lane, queue } => {
                gauge!("settled_consumers_attached", "queue" => queue.to_owned()).increment(1.0);
                info!(lane, queue, "consumer attached");
            }
            Signal::ConsumerCancelled { lane, queue } => {
                gauge!("settled_consumers_attached", "queue" => queue.to_owned()).decrement(1.0);
                error!(lane, queue, "the broker cancelled the consumer; it is rebuilt");
            }
            Signal::TopologyMisfit { lane, queue, problem } => {
                error!(lane, queue, problem, "this queue is not consumed until it is mended");
            }
            Signal::TopologyLooked { queue, fits } => {
                gauge!("settled_topology_misfit", "queue" => queue.to_owned()).set(if fits { 0.0 } else { 1.0 });
                trace!(queue, fits, "queue looked at before it is consumed");
            }
            Signal::TopologyUnseen { queue, unseen } => {
                let unseen = unseen.join(", ");
                info!(
                    queue,
                    unseen, "not looked at, for want of a right on it: `settled doctor`, as who may, checks it"
                );
            }
            Signal::OwnQueueUnserved { queue, most } => {
                counter!("settled_own_queues_unserved_total").increment(1);
                error!(
                    queue,
                    most, "nobody consumes this queue: raise worker.own_queues_max and start the worker again"
                );
            }
            Signal::ConsumerLost { lane, queue, error } => {
                gauge!("settled_consumers_attached", "queue" => queue.to_owned()).decrement(1.0);
                warn!(lane, queue, error, "consumer lost; it is rebuilt");
            }
            Signal::Undecodable { lane, queue, messages } => {
                counter!("settled_undecodable_total").increment(u64::try_from(messages).unwrap_or(u64::MAX));
                warn!(
                    lane,
                    queue, messages, "messages whose properties can not be decoded; they become dead letters with them"
                );
            }
            Signal::ConsumerDetached { lane, queue } => {
                gauge!("settled_consumers_attached", "queue" => queue.to_owned()).decrement(1.0);
                info!(lane, queue, "consumer detached");
            }
            Signal::AckLost { lane, error } => {
                counter!("settled_acks_lost_total").increment(1);
                warn!(
                    lane,
                    error, "an acknowledgement was lost; its messages come again as duplicates"
                );
            }
            Signal::Retrying {
                dependency,
                attempt,
                wait,
                error,
            } => {
                counter!("settled_retries_total", "dependency" => dependency.as_str()).increment(1);
                warn!(%dependency, attempt, wait_ms = millis(wait), error, "the {dependency} can not be used now; trying again");
            }
            Signal::BatchJudged {
                batch,
                lane,
                from,
                tally,
            } => judged(batch, lane, from, tally),
            Signal::BatchRetried {
                batch,
                lane,
                attempt,
                sqlstate,
                error,
            } => {
                counter!("settled_retries_total", "dependency" => "transaction").increment(1);
                warn!(%batch, lane, attempt, sqlstate, error, "batch tried again");
            }
            Signal::Stage { stage, elapsed } => {
                histogram!("settled_stage_seconds", "stage" => stage.as_str()).record(elapsed);
                trace!(%stage, elapsed_us = micros(elapsed), "stage done");
            }
            Signal::RoundTrips { transaction, count } => {
                counter!("settled_db_round_trips_total", "transaction" => transaction).increment(count);
                trace!(transaction, count, "the database answered");
            }
            Signal::EndToEnd { elapsed } => {
                let seconds = histogram!("settled_end_to_end_seconds");
                for one in elapsed {
                    seconds.record(*one);
                }
                let longest = elapsed.iter().max().copied().unwrap_or_default();
                trace!(messages = elapsed.len(), longest_us = micros(longest), "answered");
            }
            Signal::CulpritIsolated {
                batch,
                digest,
                sqlstate,
                error,
            } => {
                counter!("settled_internal_total").increment(1);
                error!(%batch, digest, sqlstate, error, "the database refuses this one message; rejected as internal");
            }
            Signal::Paused { cause, why } => {
                gauge!("settled_paused", "reason" => cause.as_str()).increment(1.0);
                error!(%cause, why, "intake paused");
            }
            Signal::Resumed { cause, paused_for } => {
                gauge!("settled_paused", "reason" => cause.as_str()).decrement(1.0);
                info!(%cause, paused_ms = millis(paused_for), "intake resumed");
            }
            Signal::Held { why, messages } => {
                counter!("settled_held_total", "why" => why).increment(messages);
                debug!(why, messages, "messages held, to be judged later");
            }
            Signal::HoldFailed { error } => {
                warn!(error, "messages could not be held; they are judged in line");
            }
            Signal::HeldUnreadable { id } => {
                counter!("settled_held_unreadable_total").increment(1);
                error!(%id, "held messages are of a format that this version can not read; start a newer worker");
            }
            Signal::LocksFound { locks } => {
                counter!("settled_locks_found_total").increment(1);
                warn!(
                    locks,
                    "a transaction that stays open has locked rows that messages need; only these messages wait"
                );
            }
            Signal::HeldMeasured { held } => {
                for of in held {
                    gauge!("settled_held", "why" => of.why).set(of.messages as f64);
                    gauge!("settled_held_bytes", "why" => of.why).set(of.bytes as f64);
                    gauge!("settled_held_oldest_seconds", "why" => of.why).set(of.oldest.as_secs_f64());
                }
                trace!("held messages measured");
            }
            Signal::ParkedUnreadable { key } => {
                counter!("settled_parked_unreadable_total").increment(1);
                error!(%key, "a parked message is of a format that this version can not read; start a newer worker");
            }
            Signal::ReplayUnreadable { id } => {
                counter!("settled_replays_unreadable_total").increment(1);
                error!(%id, "a dead letter is of a format that this version can not read; start a newer worker");
            }
            Signal::DeadLettersCollected {
                new,
                again,
                copies,
                lag,
            } => {
                for (what, count) in [("new", new), ("again", again), ("copy", copies)] {
                    counter!("settled_dead_letters_collected_total", "what" => what).increment(count);
                }
                gauge!("settled_collector_lag_seconds").set(lag.as_secs_f64());
                debug!(new, again, copies, lag_ms = millis(lag), "dead letters collected");
            }
            Signal::DeadLettersFull { why } => {
                gauge!("settled_dead_letters_full").set(1.0);
                error!(
                    alarm = true,
                    why, "dead letters are full: none is collected until some are purged"
                );
            }
            Signal::DeadLettersHaveRoom => {
                gauge!("settled_dead_letters_full").set(0.0);
                info!("there is room for dead letters again");
            }
            Signal::DeadLetterSpace {
                rows,
                bytes,
                filled,
                partners_near,
            } => {
                gauge!("settled_dead_letters_rows").set(rows as f64);
                gauge!("settled_dead_letters_bytes").set(bytes as f64);
                gauge!("settled_dead_letters_filled_ratio").set(filled);
                gauge!("settled_dead_letters_partners_near_bound").set(partners_near as f64);
                trace!(rows, bytes, filled, partners_near, "the room for dead letters measured");
            }
            Signal::DeadLettersNearBound {
                of,
                rows,
                bytes,
                filled,
            } => {
                counter!("settled_dead_letters_near_bound_alarms_total").increment(1);
                warn!(
                    alarm = true,
                    of, rows, bytes, filled, "dead letters take most of the room that they may: discard and purge some"
                );
            }
            Signal::DeadLettersSettledSince { closed } => {
                counter!("settled_dead_letters_settled_since_total").increment(closed);
                info!(closed, "open dead letters have settled since and are closed");
            }
            Signal::CollectorIdle => {
                gauge!("settled_collector_lag_seconds").set(0.0);
                trace!("no dead letter waits");
            }
            Signal::DeadLetterSetApart {
                digest,
                sqlstate,
                error,
            } => {
                counter!("settled_dead_letters_set_apart_total").increment(1);
                error!(
                    digest,
                    sqlstate, error, "this dead letter can not be stored; it goes to settlement.unreadable"
                );
            }
            Signal::UnreadableGrew { messages } => {
                counter!("settled_unreadable_alarms_total").increment(1);
                error!(
                    messages,
                    "dead letters that nobody could read are in settlement.unreadable"
                );
            }
            Signal::HandedBack { lane, why } => {
                counter!("settled_handed_back_total").increment(1);
                warn!(lane, why, "messages handed back to the broker");
            }
            Signal::Published { batch, published } => {
                for ((kind, fate), count) in &published.events {
                    counter!("settled_events_total", "type" => kind.as_str(), "fate" => fate.as_str())
                        .increment(*count);
                }
                counter!("settled_dead_letters_published_total").increment(published.dead_letters);
                let events: u64 = published.events.values().sum();
                debug!(%batch, events, dead_letters = published.dead_letters, "published and confirmed");
            }
            Signal::PublishFailed { batch, error } => {
                counter!("settled_publish_failures_total").increment(1);
                warn!(%batch, error, "publishing failed; the row is kept and published again");
            }
            Signal::RowRepublished { batch, attempt } => {
                counter!("settled_rows_republished_total").increment(1);
                info!(%batch, attempt, "row published again");
            }
            Signal::DeadLetterReturned {
                batch,
                routing_key,
                message_id,
            } => {
                counter!("settled_dead_letters_returned_total").increment(1);
                error!(
                    %batch,
                    routing_key,
                    message_id,
                    "a dead letter found no queue; the lane stops until settlement.dead is bound again"
                );
            }
            Signal::RelayTook { batch, age } => {
                counter!("settled_relay_taken_total").increment(1);
                info!(%batch, age_ms = millis(age), "the relay took a row that its lane left behind");
            }
            Signal::PublicationRefused {
                batch,
                routing_key,
                error,
            } => {
                counter!("settled_outbox_refused_total").increment(1);
                error!(%batch, routing_key, error, "the broker refuses this publication; set aside in outbox_refused");
            }
            Signal::Reply { result } => {
                counter!("settled_replies_total", "result" => result.as_str()).increment(1);
                debug!(%result, "reply_to");
            }
            Signal::OutboxMeasured { pending, oldest } => {
                gauge!("settled_outbox_pending").set(pending as f64);
                gauge!("settled_outbox_oldest_seconds").set(oldest.unwrap_or_default().as_secs_f64());
                trace!(
                    pending,
                    oldest_ms = millis(oldest.unwrap_or_default()),
                    "outbox measured"
                );
            }
            Signal::ParkedMeasured { parked } => {
                gauge!("settled_parked").set(parked as f64);
                trace!(parked, "parked messages measured");
            }
            Signal::QueueMeasured { queue, messages } => {
                gauge!("settled_queue_messages", "queue" => queue.to_owned()).set(messages as f64);
                trace!(queue, messages, "queue measured");
            }
            Signal::DeskMeasured { open, oldest, runs } => {
                for reason in Reason::ALL {
                    let count = open.iter().find(|(of, _)| *of == reason).map_or(0, |(_, count)| *count);
                    gauge!("settled_dead_letters_open", "reason" => reason.as_str()).set(count as f64);
                }
                let oldest = oldest.unwrap_or_default();
                gauge!("settled_dead_letters_oldest_seconds").set(oldest.as_secs_f64());
                for state in RUN_STATES {
                    let count = runs.iter().find(|(of, _)| of == state).map_or(0, |(_, count)| *count);
                    gauge!("settled_replay_runs", "state" => *state).set(count as f64);
                }
                let open: u64 = open.iter().map(|(_, count)| count).sum();
                trace!(open, oldest_ms = millis(oldest), "dead letters measured");
            }
            Signal::Stopping { why } => {
                info!(why, "stopping: no more messages are taken");
            }
            Signal::Drained { elapsed } => {
                info!(elapsed_ms = millis(elapsed), "drained");
            }
            Signal::Stopped => {
                gauge!("settled_ready").set(0.0);
                info!("stopped");
            }
        }
    }
}

fn judged(batch: Uuid, lane: usize, from: Intake, tally: &Tally) {
    for ((verdict, reason), count) in &tally.verdicts {
        let reason = reason.map_or("", Reason::as_str);
        counter!("settled_messages_total", "verdict" => verdict.as_str(), "reason" => reason).increment(*count);
    }
    for ((label, verdict), count) in &tally.partners {
        let label = SharedString::from_shared(Arc::clone(label));
        counter!("settled_partner_messages_total", "enterprise_id" => label, "verdict" => verdict.as_str())
            .increment(*count);
    }
    histogram!("settled_batch_size", "from" => from.as_str()).record(tally.messages as f64);
    // A line a batch is too much at full speed and just right when nothing else tells what happened to a message.
    debug!(
        %batch,
        lane,
        %from,
        messages = tally.messages,
        settled = tally.count(VerdictKind::Settled),
        duplicate = tally.count(VerdictKind::Duplicate),
        parked = tally.count(VerdictKind::Parked),
        rejected = tally.count(VerdictKind::Rejected),
        "batch judged"
    );
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Starts the log, on stderr. Colour only on a terminal. The first call in a process counts, later ones do nothing.
pub fn init(settings: &LogSettings, to_terminal: bool) {
    let subscriber = Registry::default().with(log_layer(settings, to_terminal, std::io::stderr));
    if subscriber.try_init().is_err() {
        debug!("the log is already set up");
    }
}

/// Whether the log goes to a terminal: what [`init`] wants to know.
pub fn stderr_is_terminal() -> bool {
    std::io::stderr().is_terminal()
}

fn log_layer<W>(settings: &LogSettings, to_terminal: bool, writer: W) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = filter(settings.level);
    let human = match settings.format {
        LogFormat::Auto => to_terminal,
        LogFormat::Human => true,
        LogFormat::Json => false,
    };
    // A person looks at both; a program gets JSON as it is.
    if human || to_terminal {
        let writer = ForPeople {
            inner: writer,
            json: !human,
        };
        return formatted(writer, human, to_terminal, filter);
    }
    formatted(writer, human, to_terminal, filter)
}

fn formatted<W>(writer: W, human: bool, to_terminal: bool, filter: Targets) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    if human {
        layer
            .with_ansi(to_terminal)
            .with_target(false)
            .with_filter(filter)
            .boxed()
    } else {
        layer
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_filter(filter)
            .boxed()
    }
}

/// Ours at the level asked for, the dependencies' warnings and errors, and nothing of those that we stand on: lapin prints
/// a returned message whole, body and all, and what goes wrong is said once, by whoever handles it.
fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    };
    Targets::new()
        .with_default(LevelFilter::from_level(level.min(Level::WARN)))
        .with_target("lapin", LevelFilter::OFF)
        .with_target(crate::store::LOG_TARGET, LevelFilter::OFF)
        .with_target("settled", level)
}

/// Makes this process count. Later calls return the same handle: the recorder belongs to the process, as the metrics
/// crate has it.
pub fn install_metrics() -> PrometheusHandle {
    static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let recorder = recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                warn!("another metrics recorder is installed; /metrics stays empty");
            }
            handle
        })
        .clone()
}

/// A recorder that knows every metric, its buckets and its help, with everything that can be zero at zero.
fn recorder() -> PrometheusRecorder {
    // From a tenth of a millisecond, which is a small batch's facts, to a minute, which is an outage.
    const SECONDS: [f64; 18] = [
        0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
        60.0,
    ];
    const MESSAGES: [f64; 12] = [
        1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0,
    ];
    let by_name = |name: &str| Matcher::Full(name.to_owned());
    let builder = [
        ("settled_batch_size", MESSAGES.as_slice()),
        ("settled_stage_seconds", SECONDS.as_slice()),
        ("settled_end_to_end_seconds", SECONDS.as_slice()),
    ]
    .into_iter()
    .try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        builder.set_buckets_for_metric(by_name(name), buckets)
    });
    // It fails for an empty list of buckets only; a summary would then be shown instead of a histogram.
    let recorder = builder.unwrap_or_default().build_recorder();
    with_local_recorder(&recorder, || {
        describe();
        start_at_zero();
    });
    recorder
}

fn describe() {
    let counters = [
        (
            "settled_messages_total",
            "Messages judged and committed, by verdict and reason.",
        ),
        (
            "settled_partner_messages_total",
            "Messages judged, by partner: the first partners seen by name, the rest as `other`, strangers as `unknown`.",
        ),
        (
            "settled_events_total",
            "Events confirmed by the broker, by type; unrouted: no queue was bound for it.",
        ),
        (
            "settled_dead_letters_published_total",
            "Dead letters confirmed by the broker.",
        ),
        (
            "settled_dead_letters_returned_total",
            "Dead letters that found no queue. Alarm.",
        ),
        (
            "settled_replies_total",
            "Answers to reply_to: sent, failed, or ignored because of the queue's name.",
        ),
        (
            "settled_retries_total",
            "Tries again: of the database, the broker, or a batch's transaction.",
        ),
        (
            "settled_relay_taken_total",
            "Outbox rows that the relay took over from a lane that is gone.",
        ),
        (
            "settled_internal_total",
            "Messages that the database alone refused. Alarm.",
        ),
        (
            "settled_outbox_refused_total",
            "Publications that the broker refused and that were set aside. Alarm.",
        ),
        (
            "settled_publish_failures_total",
            "Batches whose publications were not all confirmed at a try.",
        ),
        (
            "settled_rows_republished_total",
            "Outbox rows published again by their own lane.",
        ),
        (
            "settled_own_queues_unserved_total",
            "Partners' own queues beyond worker.own_queues_max, which nobody here consumes. Alarm.",
        ),
        (
            "settled_acks_lost_total",
            "Acknowledgements of a batch that did not reach the broker.",
        ),
        (
            "settled_undecodable_total",
            "Messages whose properties could not be decoded. They are judged without them.",
        ),
        (
            "settled_held_total",
            "Messages put into the side room, by why: share, rate or locked.",
        ),
        (
            "settled_held_unreadable_total",
            "Times held messages were of a format that this version can not read.",
        ),
        (
            "settled_locks_found_total",
            "Times a transaction that stays open was found to have locked rows that messages need.",
        ),
        (
            "settled_parked_unreadable_total",
            "Times a due message was of a format that this version can not read.",
        ),
        (
            "settled_replays_unreadable_total",
            "Times a dead letter to be replayed was of a format that this version can not read.",
        ),
        (
            "settled_dead_letters_collected_total",
            "Dead letters taken from their queue: messages new to the database, further failures, copies of what was stored.",
        ),
        (
            "settled_dead_letters_near_bound_alarms_total",
            "Times that dead letters were found to take most of the room that they may.",
        ),
        (
            "settled_dead_letters_settled_since_total",
            "Open dead letters whose message had settled since.",
        ),
        (
            "settled_dead_letters_set_apart_total",
            "Dead letters that the database refused, left to settlement.unreadable. Alarm.",
        ),
        (
            "settled_unreadable_alarms_total",
            "Times settlement.unreadable was found to hold more than before. Alarm.",
        ),
        (
            "settled_handed_back_total",
            "Times a lane handed its messages back to the broker unjudged.",
        ),
        (
            "settled_http_connections_shed_total",
            "HTTP connections that asked for nothing or read nothing, closed to make room for others.",
        ),
        (
            "settled_db_round_trips_total",
            "Round trips to the database, by transaction. Statements that travel together are one.",
        ),
    ];
    for (name, about) in counters {
        describe_counter!(name, Unit::Count, about);
    }
    let gauges = [
        (
            "settled_ready",
            Unit::Count,
            "1 while consumers are attached and the database answers.",
        ),
        (
            "settled_outbox_pending",
            Unit::Count,
            "Outbox rows not yet known to be published.",
        ),
        (
            "settled_outbox_oldest_seconds",
            Unit::Seconds,
            "Age of the oldest of them.",
        ),
        (
            "settled_held",
            Unit::Count,
            "Messages in the side room, by why they are there.",
        ),
        (
            "settled_held_bytes",
            Unit::Bytes,
            "Bytes of their bodies and properties.",
        ),
        (
            "settled_held_oldest_seconds",
            Unit::Seconds,
            "Since when the oldest of them waits.",
        ),
        (
            "settled_parked",
            Unit::Count,
            "Messages waiting for the reservation of their allocation.",
        ),
        ("settled_paused", Unit::Count, "1 while intake is paused, by reason."),
        (
            "settled_consumers_attached",
            Unit::Count,
            "Consumers attached, by queue.",
        ),
        (
            "settled_topology_misfit",
            Unit::Count,
            "1 while a queue is not consumed because it, or what stands around it, is not what it must be.",
        ),
        ("settled_queue_messages", Unit::Count, "Messages ready in a queue."),
        (
            "settled_dead_letters_open",
            Unit::Count,
            "Dead letters that wait for an operator, by reason.",
        ),
        (
            "settled_dead_letters_full",
            Unit::Count,
            "1 while dead letters take all the room that they may, and none is collected.",
        ),
        (
            "settled_dead_letters_rows",
            Unit::Count,
            "Dead letters that are stored.",
        ),
        (
            "settled_dead_letters_bytes",
            Unit::Bytes,
            "Bytes of their bodies and properties.",
        ),
        (
            "settled_dead_letters_filled_ratio",
            Unit::Count,
            "Share of dead_letters.max_rows or max_bytes that is taken, whichever is more.",
        ),
        (
            "settled_dead_letters_partners_near_bound",
            Unit::Count,
            "Partners whose dead letters take 80 % of their share or more.",
        ),
        (
            "settled_dead_letters_oldest_seconds",
            Unit::Seconds,
            "Since the oldest of them was collected.",
        ),
        (
            "settled_collector_lag_seconds",
            Unit::Seconds,
            "From the failure of the message collected last to its being stored; 0 while none waits.",
        ),
        ("settled_replay_runs", Unit::Count, "Replay runs, by state."),
    ];
    for (name, unit, about) in gauges {
        describe_gauge!(name, unit, about);
    }
    let histograms = [
        (
            "settled_batch_size",
            Unit::Count,
            "Messages in a batch, by where they came from.",
        ),
        (
            "settled_stage_seconds",
            Unit::Seconds,
            "Time of a batch in a stage: facts, settle, publish, collect.",
        ),
        (
            "settled_end_to_end_seconds",
            Unit::Seconds,
            "From receipt of a message to its confirmed event.",
        ),
    ];
    for (name, unit, about) in histograms {
        describe_histogram!(name, unit, about);
    }
}

/// A counter that appears only with its first increment hides that increment from `rate()`.
fn start_at_zero() {
    for verdict in [VerdictKind::Settled, VerdictKind::Duplicate] {
        counter!("settled_messages_total", "verdict" => verdict.as_str(), "reason" => "").increment(0);
    }
    let parked = Reason::AllocationNotFound.as_str();
    counter!("settled_messages_total", "verdict" => "parked", "reason" => parked).increment(0);
    for reason in Reason::ALL {
        counter!("settled_messages_total", "verdict" => "rejected", "reason" => reason.as_str()).increment(0);
    }
    for kind in EventType::ALL.iter().filter(|kind| **kind != EventType::Other) {
        for fate in Fate::ALL {
            counter!("settled_events_total", "type" => kind.as_str(), "fate" => fate.as_str()).increment(0);
        }
    }
    for result in ReplyResult::ALL {
        counter!("settled_replies_total", "result" => result.as_str()).increment(0);
    }
    for dependency in [
        Dependency::Database.as_str(),
        Dependency::Broker.as_str(),
        "transaction",
    ] {
        counter!("settled_retries_total", "dependency" => dependency).increment(0);
    }
    for name in [
        "settled_dead_letters_published_total",
        "settled_dead_letters_returned_total",
        "settled_relay_taken_total",
        "settled_internal_total",
        "settled_outbox_refused_total",
        "settled_publish_failures_total",
        "settled_rows_republished_total",
        "settled_acks_lost_total",
        "settled_undecodable_total",
        "settled_own_queues_unserved_total",
        "settled_held_unreadable_total",
        "settled_locks_found_total",
        "settled_parked_unreadable_total",
        "settled_replays_unreadable_total",
        "settled_dead_letters_set_apart_total",
        "settled_unreadable_alarms_total",
        "settled_handed_back_total",
        "settled_http_connections_shed_total",
    ] {
        counter!(name).increment(0);
    }
    for stage in Stage::ALL {
        drop(histogram!("settled_stage_seconds", "stage" => stage.as_str()));
    }
    for intake in Intake::ALL {
        drop(histogram!("settled_batch_size", "from" => intake.as_str()));
    }
    drop(histogram!("settled_end_to_end_seconds"));
    counter!("settled_db_round_trips_total", "transaction" => "settle_batch").increment(0);
    for cause in Cause::ALL {
        gauge!("settled_paused", "reason" => cause.as_str()).set(0.0);
    }
    for what in ["new", "again", "copy"] {
        counter!("settled_dead_letters_collected_total", "what" => what).increment(0);
    }
    for name in ["settled_ready", "settled_collector_lag_seconds"] {
        gauge!(name).set(0.0);
    }
    for queue in [topology::UPDATES, topology::DEAD] {
        gauge!("settled_consumers_attached", "queue" => queue).set(0.0);
    }
}

/// Tests that emit call this first. A call site that is met for the first time by a thread without a subscriber, while
/// another thread's is the only one, is switched off for both: one that hears everything, everywhere, keeps it on.
#[cfg(test)]
pub(crate) fn keep_call_sites_on() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Registry::default()).expect("the only one"));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each.
    fn every_signal(check: &mut dyn FnMut(&Signal<'_>)) {
        keep_call_sites_on();
        let batch = Uuid::nil();
        let labels = PartnerLabels::new(1);
        let mut tally = Tally::new();
        tally.add(&labels, Some("acme"), VerdictKind::Settled, None);
        tally.add(&labels, Some("acme"), VerdictKind::Rejected, Some(Reason::NonceReused));
        tally.add(&labels, Some("beta"), VerdictKind::Duplicate, None);
        tally.add(
            &labels,
            Some("forged"),
            VerdictKind::Rejected,
            Some(Reason::UnknownPartner),
        );
        tally.add(
            &labels,
            Some("beta"),
            VerdictKind::Parked,
            Some(Reason::AllocationNotFound),
        );
        let mut published = Published::new();
        published.events(EventType::AllocationCleared, Fate::Confirmed, 3);
        published.events(EventType::UpdateRejected, Fate::Unrouted, 1);
        published.dead_letter();
        let second = Duration::from_secs(1);
        let milli = Duration::from_millis(1);
        let reasons = ["no consumer is attached".to_owned()];
        let listening = SocketAddr::from(([127, 0, 0, 1], 9464));
        let queue = "settlement.updates";
        for signal in [
            Signal::Started {
                worker: "w-1",
                lanes: 2,
                version: "0.1.0",
            },
            Signal::HttpListening { address: listening },
            Signal::HttpConnectionShed,
            Signal::NotReady { reasons: &reasons },
            Signal::Ready,
            Signal::ConsumerAttached { lane: 0, queue },
            Signal::ConsumerCancelled { lane: 0, queue },
            Signal::ConsumerAttached { lane: 0, queue },
            Signal::ConsumerLost {
                lane: 0,
                queue,
                error: "reset",
            },
            Signal::ConsumerAttached { lane: 0, queue },
            Signal::Undecodable {
                lane: 0,
                queue,
                messages: 2,
            },
            Signal::ConsumerDetached { lane: 0, queue },
            Signal::ConsumerAttached { lane: 1, queue },
            Signal::TopologyMisfit {
                lane: 0,
                queue,
                problem: "it is missing",
            },
            Signal::TopologyLooked { queue, fits: false },
            Signal::TopologyUnseen {
                queue,
                unseen: &["exchange settlement.dead".to_owned()],
            },
            Signal::OwnQueueUnserved {
                queue: "settlement.updates.acme",
                most: 16,
            },
            Signal::Retrying {
                dependency: Dependency::Broker,
                attempt: 1,
                wait: second,
                error: "refused",
            },
            Signal::BatchJudged {
                batch,
                lane: 0,
                from: Intake::Queue,
                tally: &tally,
            },
            Signal::BatchRetried {
                batch,
                lane: 0,
                attempt: 1,
                sqlstate: Some("40001"),
                error: "serialization",
            },
            Signal::RoundTrips {
                transaction: "settle_batch",
                count: 3,
            },
            Signal::Stage {
                stage: Stage::Facts,
                elapsed: milli,
            },
            Signal::Stage {
                stage: Stage::Settle,
                elapsed: milli,
            },
            Signal::Stage {
                stage: Stage::Publish,
                elapsed: milli,
            },
            Signal::EndToEnd {
                elapsed: &[milli, second],
            },
            Signal::CulpritIsolated {
                batch,
                digest: "ab",
                sqlstate: Some("23514"),
                error: "check",
            },
            Signal::Paused {
                cause: Cause::Database,
                why: "away",
            },
            Signal::Resumed {
                cause: Cause::Database,
                paused_for: second,
            },
            Signal::Paused {
                cause: Cause::Culprits,
                why: "three within a minute",
            },
            Signal::AckLost {
                lane: 0,
                error: "closed",
            },
            Signal::Held {
                why: "share",
                messages: 64,
            },
            Signal::HoldFailed { error: "closed" },
            Signal::HeldUnreadable { id: batch },
            Signal::LocksFound { locks: 2 },
            Signal::HeldMeasured {
                held: &[HeldOf {
                    why: "share",
                    messages: 64,
                    bytes: 4_096,
                    oldest: second,
                }],
            },
            Signal::ParkedUnreadable { key: batch },
            Signal::ReplayUnreadable { id: batch },
            Signal::HandedBack {
                lane: 0,
                why: "paused for long",
            },
            Signal::DeadLettersCollected {
                new: 3,
                again: 2,
                copies: 1,
                lag: second,
            },
            Signal::CollectorIdle,
            Signal::DeadLettersFull { why: "full" },
            Signal::DeadLettersHaveRoom,
            Signal::DeadLetterSpace {
                rows: 8,
                bytes: 900,
                filled: 0.5,
                partners_near: 2,
            },
            Signal::DeadLettersNearBound {
                of: "all",
                rows: 8,
                bytes: 900,
                filled: 0.8,
            },
            Signal::DeadLettersSettledSince { closed: 3 },
            Signal::DeadLetterSetApart {
                digest: "ab",
                sqlstate: Some("23514"),
                error: "check",
            },
            Signal::UnreadableGrew { messages: 1 },
            Signal::DeskMeasured {
                open: &[(Reason::Expired, 9)],
                oldest: Some(second),
                runs: &[("running".to_owned(), 1)],
            },
            Signal::Published {
                batch,
                published: &published,
            },
            Signal::PublishFailed {
                batch,
                error: "timeout",
            },
            Signal::RowRepublished { batch, attempt: 2 },
            Signal::DeadLetterReturned {
                batch,
                routing_key: "acme.allocation.update",
                message_id: None,
            },
            Signal::RelayTook { batch, age: second },
            Signal::PublicationRefused {
                batch,
                routing_key: "x",
                error: "frame too large",
            },
            Signal::Reply {
                result: ReplyResult::Ignored,
            },
            Signal::OutboxMeasured {
                pending: 4,
                oldest: Some(second),
            },
            Signal::ParkedMeasured { parked: 5 },
            Signal::QueueMeasured {
                queue: "settlement.updates",
                messages: 6,
            },
            Signal::QueueMeasured {
                queue: "settlement.dead",
                messages: 7,
            },
            Signal::QueueMeasured {
                queue: "settlement.unreadable",
                messages: 8,
            },
            Signal::Stopping { why: "SIGTERM" },
            Signal::Drained { elapsed: second },
            Signal::Stopped,
        ] {
            check(&signal);
        }
    }

    #[test]
    fn every_signal_is_counted() {
        let recorder = recorder();
        let before = recorder.handle().render();
        with_local_recorder(&recorder, || every_signal(&mut |signal| signal.emit()));
        let text = recorder.handle().render();
        for line in [
            "settled_messages_total{verdict=\"settled\",reason=\"\"} 1",
            "settled_messages_total{verdict=\"duplicate\",reason=\"\"} 1",
            "settled_messages_total{verdict=\"parked\",reason=\"allocation_not_found\"} 1",
            "settled_messages_total{verdict=\"rejected\",reason=\"nonce_reused\"} 1",
            "settled_messages_total{verdict=\"rejected\",reason=\"internal\"} 0",
            "settled_partner_messages_total{enterprise_id=\"acme\",verdict=\"settled\"} 1",
            "settled_partner_messages_total{enterprise_id=\"other\",verdict=\"duplicate\"} 1",
            "settled_partner_messages_total{enterprise_id=\"unknown\",verdict=\"rejected\"} 1",
            "settled_batch_size_bucket{from=\"queue\",le=\"4\"} 0",
            "settled_batch_size_bucket{from=\"queue\",le=\"8\"} 1",
            "settled_stage_seconds_bucket{stage=\"facts\",le=\"0.001\"} 1",
            "settled_stage_seconds_count{stage=\"settle\"} 1",
            "settled_stage_seconds_count{stage=\"publish\"} 1",
            "settled_end_to_end_seconds_count 2",
            "settled_db_round_trips_total{transaction=\"settle_batch\"} 3",
            "settled_events_total{type=\"allocation.cleared\",fate=\"confirmed\"} 3",
            "settled_events_total{type=\"update.rejected\",fate=\"unrouted\"} 1",
            "settled_events_total{type=\"update.parked\",fate=\"unrouted\"} 0",
            "settled_dead_letters_published_total 1",
            "settled_dead_letters_returned_total 1",
            "settled_outbox_pending 4",
            "settled_outbox_oldest_seconds 1",
            "settled_parked 5",
            "settled_paused{reason=\"database\"} 0",
            "settled_paused{reason=\"culprits\"} 1",
            "settled_consumers_attached{queue=\"settlement.updates\"} 1",
            "settled_topology_misfit{queue=\"settlement.updates\"} 1",
            "settled_dead_letters_collected_total{what=\"new\"} 3",
            "settled_dead_letters_collected_total{what=\"again\"} 2",
            "settled_dead_letters_collected_total{what=\"copy\"} 1",
            "settled_dead_letters_set_apart_total 1",
            "settled_unreadable_alarms_total 1",
            "settled_collector_lag_seconds 0",
            "settled_dead_letters_open{reason=\"expired\"} 9",
            "settled_dead_letters_open{reason=\"internal\"} 0",
            "settled_dead_letters_oldest_seconds 1",
            "settled_dead_letters_full 0",
            "settled_dead_letters_rows 8",
            "settled_dead_letters_bytes 900",
            "settled_dead_letters_filled_ratio 0.5",
            "settled_dead_letters_partners_near_bound 2",
            "settled_dead_letters_near_bound_alarms_total 1",
            "settled_dead_letters_settled_since_total 3",
            "settled_replay_runs{state=\"running\"} 1",
            "settled_replay_runs{state=\"done\"} 0",
            "settled_replies_total{result=\"ignored\"} 1",
            "settled_replies_total{result=\"sent\"} 0",
            "settled_retries_total{dependency=\"broker\"} 1",
            "settled_retries_total{dependency=\"transaction\"} 1",
            "settled_relay_taken_total 1",
            "settled_internal_total 1",
            "settled_outbox_refused_total 1",
            "settled_publish_failures_total 1",
            "settled_rows_republished_total 1",
            "settled_acks_lost_total 1",
            "settled_undecodable_total 2",
            "settled_own_queues_unserved_total 1",
            "settled_held_total{why=\"share\"} 64",
            "settled_held_unreadable_total 1",
            "settled_locks_found_total 1",
            "settled_held{why=\"share\"} 64",
            "settled_held_bytes{why=\"share\"} 4096",
            "settled_held_oldest_seconds{why=\"share\"} 1",
            "settled_parked_unreadable_total 1",
            "settled_replays_unreadable_total 1",
            "settled_handed_back_total 1",
            "settled_http_connections_shed_total 1",
            "settled_queue_messages{queue=\"settlement.updates\"} 6",
            "settled_queue_messages{queue=\"settlement.dead\"} 7",
            "settled_queue_messages{queue=\"settlement.unreadable\"} 8",
            "settled_ready 0",
        ] {
            assert!(text.lines().any(|have| have == line), "missing: {line}\n{text}");
        }
        // Each has its type and its help, and counters are there before anything happened.
        let names = |text: &str, kind: &str| -> HashSet<String> {
            text.lines()
                .filter(|line| line.starts_with(kind))
                .filter_map(|line| line.split(' ').nth(2))
                .map(str::to_owned)
                .collect()
        };
        assert_eq!(names(&text, "# TYPE"), names(&text, "# HELP"));
        assert!(before.contains("settled_end_to_end_seconds_count 0"));
        assert!(before.contains("settled_internal_total 0") && before.contains("settled_paused{reason=\"broker\"} 0"));
        assert!(!text.contains("forged") && !text.contains("quantile"), "{text}");
    }

    #[test]
    fn labels_of_partners_are_bounded() {
        let labels = PartnerLabels::new(2);
        for (enterprise, registered, label) in [
            (Some("stranger"), false, "unknown"),
            (Some("a"), true, "a"),
            (Some("a"), false, "a"),
            (Some("b"), true, "b"),
            (Some("c"), true, "other"),
            (Some("c"), false, "unknown"),
            (Some("a"), true, "a"),
            (None, true, "unknown"),
        ] {
            assert_eq!(
                &*labels.label(enterprise, registered),
                label,
                "{enterprise:?} {registered}"
            );
        }
        assert_eq!(&*PartnerLabels::new(0).label(Some("a"), true), "other");
        assert_eq!(&*PartnerLabels::new(9).label(Some("unknown"), true), "other");
    }

    #[test]
    fn event_types_are_read_off_routing_keys() {
        for kind in EventType::ALL.iter().copied().filter(|kind| *kind != EventType::Other) {
            assert_eq!(EventType::of_routing_key(kind.as_str()), kind);
            assert_eq!(EventType::of_routing_key(&format!("{kind}.acme")), kind);
        }
        for other in [
            "",
            "allocation",
            "allocation.",
            "allocation.clearedx",
            "x.allocation.cleared",
            "other",
        ] {
            assert_eq!(EventType::of_routing_key(other), EventType::Other, "{other}");
        }
    }

    /// A writer that tests can read.
    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, level: LogLevel, to_terminal: bool, say: impl FnOnce()) -> String {
        keep_call_sites_on();
        let page = Page::default();
        let writer = page.clone();
        let layer = log_layer(&LogSettings { format, level }, to_terminal, move || writer.clone());
        tracing::subscriber::with_default(Registry::default().with(layer), say);
        let bytes = page.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    #[test]
    fn every_signal_is_one_line() {
        let mut signals = 0;
        let text = logged(LogFormat::Json, LogLevel::Trace, false, || {
            every_signal(&mut |signal| {
                signals += 1;
                signal.emit();
            });
        });
        assert_eq!(text.lines().count(), signals, "{text}");
        for line in text.lines() {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            for field in ["timestamp", "level", "message", "target"] {
                assert!(line[field].as_str().is_some_and(|text| !text.is_empty()), "{line}");
            }
        }
        let alarms = logged(LogFormat::Json, LogLevel::Error, false, || {
            every_signal(&mut |signal| signal.emit())
        });
        assert_eq!(alarms.lines().count(), 14, "{alarms}");
    }

    #[test]
    fn formats() {
        let say = || {
            Signal::Started {
                worker: "w-1",
                lanes: 2,
                version: "9",
            }
            .emit()
        };
        let (human, json) = (LogFormat::Human, LogFormat::Json);
        for (format, to_terminal, is_json, colour) in [
            (LogFormat::Auto, true, false, true),
            (LogFormat::Auto, false, true, false),
            (human, true, false, true),
            (human, false, false, false),
            (json, true, true, false),
        ] {
            let text = logged(format, LogLevel::Info, to_terminal, say);
            assert_eq!(text.starts_with('{'), is_json, "{text}");
            assert_eq!(text.contains('\u{1b}'), colour, "{text}");
            assert!(text.contains("worker started") && text.contains("w-1"), "{text}");
        }
    }

    #[test]
    fn dependencies_say_little_and_lapin_nothing() {
        let say = || {
            warn!(target: "lapin::returned_messages", "a body");
            error!(target: "lapin::channel", "channel closed");
            warn!(target: "rustls", "certificate");
            info!(target: "hyper", "chatter");
            debug!(target: "settled::worker", "ours");
        };
        for (level, expected) in [
            (LogLevel::Trace, vec!["certificate", "ours"]),
            (LogLevel::Debug, vec!["certificate", "ours"]),
            (LogLevel::Info, vec!["certificate"]),
            (LogLevel::Error, vec![]),
        ] {
            let text = logged(LogFormat::Json, level, false, say);
            let messages: Vec<String> = text
                .lines()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                .filter_map(|line| line["message"].as_str().map(str::to_owned))
                .collect();
            assert_eq!(messages, expected, "{level:?}");
        }
    }
}

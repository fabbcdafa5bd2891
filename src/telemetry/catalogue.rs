//! Every metric, once. What counts, counts with one of these; what `/metrics` says of them and what the page about metrics
//! shows comes from here.

use super::labels::{Door, EventFate, EventType, PauseCause, ReplyResult, SpanFate, Stage};
use super::metric::{Counter, Gauge, Histogram, Metric, MetricKind, each, itself, nothing};
use crate::domain::names;
use crate::domain::{reason::Reason, verdict::VerdictKind};

/// From a tenth of a millisecond, which is a small batch's facts, to a minute, which is an outage.
const SECONDS: &[f64] = &[
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
const MESSAGES: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0,
];

/// What is tried again besides what we stand on: a batch's transaction.
pub(super) const TRANSACTION: &str = "transaction";
/// What the collector took: a message that is new, a further failure, a copy of what was stored.
pub(super) const COLLECTED: [&str; 3] = ["new", "again", "copy"];
/// Why messages are put into the side room.
pub(super) const HELD_WHY: [&str; 4] = ["share", "rate", "locked", "quarantine"];
/// The states of a replay run.
pub(super) const RUN_STATES: [&str; 4] = ["running", "cancelled", "stopped", "done"];

macro_rules! catalogue {
    ($($kind:ident $(($buckets:expr))? $constant:ident = $name:literal, $unit:ident, [$($label:literal),*], $starts:expr, $help:literal;)+) => {
        $(pub(super) const $constant: $kind<{ <[&str]>::len(&[$($label),*]) }> = $kind(Metric {
            name: $name,
            kind: MetricKind::$kind $(($buckets))?,
            unit: metrics::Unit::$unit,
            labels: &[$($label),*],
            help: $help,
            starts: $starts,
        });)+

        /// All of them.
        pub const ALL: &[Metric] = &[$($constant.0),+];
    };
}

catalogue! {
    Counter JUDGED = "settled_messages_total", Count, ["verdict", "reason"], verdicts,
        "Messages judged and committed, by verdict and reason.";
    Counter JUDGED_OF_PARTNER = "settled_partner_messages_total", Count, ["enterprise_id", "verdict"], nothing,
        "Messages judged, by partner: the first partners seen by name, the rest as `other`, strangers as `unknown`.";
    Counter EVENTS = "settled_events_total", Count, ["type", "fate"], events,
        "Events confirmed by the broker, by type; unrouted: no queue was bound for it.";
    Counter DEAD_LETTERS_PUBLISHED = "settled_dead_letters_published_total", Count, [], itself,
        "Dead letters confirmed by the broker.";
    Counter DEAD_LETTERS_RETURNED = "settled_dead_letters_returned_total", Count, [], itself,
        "Dead letters that found no queue. Alarm.";
    Counter REPLIES = "settled_replies_total", Count, ["result"], || each(ReplyResult::ALL.iter().map(|result| result.as_str())),
        "Answers to reply_to: sent, failed, or ignored because of the queue's name.";
    Counter RETRIES = "settled_retries_total", Count, ["dependency"], || each(["database", "broker", TRANSACTION]),
        "Tries again: of the database, the broker, or a batch's transaction.";
    Counter RELAY_TAKEN = "settled_relay_taken_total", Count, [], itself,
        "Outbox rows that the relay took: of a lane that is gone, or of none (acts on partners, keys that end, what was put back).";
    Counter INTERNAL = "settled_internal_total", Count, [], itself,
        "Messages that the database alone refused. Alarm.";
    Counter OUTBOX_REFUSED = "settled_outbox_refused_total", Count, [], itself,
        "Publications that the broker refused and that were set aside. Alarm.";
    Counter PUBLISH_FAILURES = "settled_publish_failures_total", Count, [], itself,
        "Batches whose publications were not all confirmed at a try.";
    Counter ROWS_REPUBLISHED = "settled_rows_republished_total", Count, [], itself,
        "Outbox rows published again by their own lane.";
    Counter OWN_QUEUES_UNSERVED = "settled_own_queues_unserved_total", Count, [], itself,
        "Partners' own queues beyond worker.own_queues_max, which nobody here consumes. Alarm.";
    Counter ACKS_LOST = "settled_acks_lost_total", Count, [], itself,
        "Acknowledgements of a batch that did not reach the broker.";
    Counter UNDECODABLE = "settled_undecodable_total", Count, [], itself,
        "Messages whose properties could not be decoded. They are judged without them.";
    Counter HELD_SO_FAR = "settled_held_total", Count, ["why"], || each(HELD_WHY),
        "Messages put into the side room, by why: share, rate, locked or quarantine.";
    Counter HELD_FULL_ALARMS = "settled_held_full_alarms_total", Count, [], itself,
        "Times that the side room got full, so that what would be held is judged in line. Alarm.";
    Counter HELD_UNREADABLE = "settled_held_unreadable_total", Count, [], itself,
        "Times held messages were of a format that this version can not read.";
    Counter LOCKS_FOUND = "settled_locks_found_total", Count, [], itself,
        "Times a transaction that stays open was found to have locked rows that messages need.";
    Counter PARKED_UNREADABLE = "settled_parked_unreadable_total", Count, [], itself,
        "Times a due message was of a format that this version can not read.";
    Counter REPLAYS_UNREADABLE = "settled_replays_unreadable_total", Count, [], itself,
        "Times a dead letter to be replayed was of a format that this version can not read.";
    Counter DEAD_LETTERS_COLLECTED = "settled_dead_letters_collected_total", Count, ["what"], || each(COLLECTED),
        "Dead letters taken from their queue: messages new to the database, further failures, copies of what was stored.";
    Counter DEAD_LETTERS_NEAR_BOUND_ALARMS = "settled_dead_letters_near_bound_alarms_total", Count, [], itself,
        "Times that dead letters were found to take most of the room that they may.";
    Counter DEAD_LETTERS_SETTLED_SINCE = "settled_dead_letters_settled_since_total", Count, [], itself,
        "Open dead letters whose message had settled since.";
    Counter BROKER_DEAD_LETTERS_STUCK_ALARMS = "settled_broker_dead_letters_stuck_alarms_total", Count, [], itself,
        "Times that the broker was found not to get rid of what it has to dead-letter. Alarm.";
    Counter DEAD_LETTERS_SET_APART = "settled_dead_letters_set_apart_total", Count, [], itself,
        "Dead letters that the database refused, left to settlement.unreadable. Alarm.";
    Counter UNREADABLE_ALARMS = "settled_unreadable_alarms_total", Count, [], itself,
        "Times settlement.unreadable was found to hold more than before. Alarm.";
    Counter HANDED_BACK = "settled_handed_back_total", Count, [], itself,
        "Times a lane handed its messages back to the broker unjudged.";
    Counter HTTP_CONNECTIONS_SHED = "settled_http_connections_shed_total", Count, [], itself,
        "HTTP connections that asked for nothing or read nothing, closed to make room for others.";
    Counter API_REQUESTS = "settled_api_requests_total", Count, ["route", "status"], nothing,
        "Requests to the public API, by what was asked and how it was answered.";
    Counter DB_ROUND_TRIPS = "settled_db_round_trips_total", Count, ["transaction"], || each(["settle_batch"]),
        "Round trips to the database, by transaction. Statements that travel together are one.";
    Counter SPANS = "settled_spans_total", Count, ["fate"], || each(SpanFate::ALL.iter().map(|fate| fate.as_str())),
        "Spans of traces: exported, lost with an export that failed, or dropped for want of room. None where traces are off.";

    Gauge BUILD_INFO = "settled_build_info", Count, ["version"], nothing,
        "Always 1: which version this is.";
    Gauge READY = "settled_ready", Count, [], itself,
        "1 while consumers are attached and the database answers.";
    Gauge OUTBOX_PENDING = "settled_outbox_pending", Count, [], nothing,
        "Outbox rows not yet known to be published.";
    Gauge OUTBOX_OLDEST_SECONDS = "settled_outbox_oldest_seconds", Seconds, [], nothing,
        "Age of the oldest outbox row that is not yet known to be published.";
    Gauge HELD = "settled_held", Count, ["why"], nothing,
        "Messages in the side room, by why they are there.";
    Gauge HELD_BYTES = "settled_held_bytes", Bytes, ["why"], nothing,
        "Bytes of the bodies and properties of messages in the side room.";
    Gauge HELD_OLDEST_SECONDS = "settled_held_oldest_seconds", Seconds, ["why"], nothing,
        "Since when the oldest message in the side room waits.";
    Gauge HELD_FILLED_RATIO = "settled_held_filled_ratio", Count, [], nothing,
        "Share of what may be held (settings under held) that is held, by the bound that is nearest.";
    Gauge KEYS_ENDING = "settled_keys_ending", Count, [], nothing,
        "Active partners that have no valid key any more within registry.key_warn_before.";
    Gauge PARKED = "settled_parked", Count, [], nothing,
        "Messages waiting for the reservation of their allocation.";
    Gauge PAUSED = "settled_paused", Count, ["reason"], || each(PauseCause::ALL.iter().map(|cause| cause.as_str())),
        "1 while intake is paused, by reason.";
    Gauge CONSUMERS_ATTACHED = "settled_consumers_attached", Count, ["queue"], || each([names::UPDATES, names::DEAD]),
        "Consumers attached, by queue.";
    Gauge TOPOLOGY_MISFIT = "settled_topology_misfit", Count, ["queue"], nothing,
        "1 while a queue is not consumed because it, or what stands around it, is not what it must be.";
    Gauge QUEUE_MESSAGES = "settled_queue_messages", Count, ["queue"], nothing,
        "Messages ready in a queue.";
    Gauge BROKER_DEAD_LETTERS_WAITING = "settled_broker_dead_letters_waiting", Count, ["queue"], nothing,
        "Messages that wait at the broker to be dead-lettered from a queue; only where broker.management_url is set.";
    Gauge BROKER_MANAGEMENT_ANSWERS = "settled_broker_management_answers", Count, [], nothing,
        "1 while the broker's management API answers; only where broker.management_url is set.";
    Gauge DEAD_LETTERS_OPEN = "settled_dead_letters_open", Count, ["reason"], nothing,
        "Dead letters that wait for an operator, by reason.";
    Gauge DEAD_LETTERS_FULL = "settled_dead_letters_full", Count, [], nothing,
        "1 while dead letters take all the room that they may, and none is collected.";
    Gauge DEAD_LETTERS_ROWS = "settled_dead_letters_rows", Count, [], nothing,
        "Dead letters that are stored.";
    Gauge DEAD_LETTERS_BYTES = "settled_dead_letters_bytes", Bytes, [], nothing,
        "Bytes of the bodies and properties of the dead letters that are stored.";
    Gauge DEAD_LETTERS_FILLED_RATIO = "settled_dead_letters_filled_ratio", Count, [], nothing,
        "Share of dead_letters.max_rows or max_bytes that is taken, whichever is more.";
    Gauge DEAD_LETTERS_PARTNERS_NEAR_BOUND = "settled_dead_letters_partners_near_bound", Count, [], nothing,
        "Partners whose dead letters take 80 % of their share or more.";
    Gauge DEAD_LETTERS_OLDEST_SECONDS = "settled_dead_letters_oldest_seconds", Seconds, [], nothing,
        "Since when the oldest dead letter that waits for an operator is stored.";
    Gauge COLLECTOR_LAG_SECONDS = "settled_collector_lag_seconds", Seconds, [], itself,
        "From the failure of the message collected last to its being stored; 0 while none waits.";
    Gauge REPLAY_RUNS = "settled_replay_runs", Count, ["state"], nothing,
        "Replay runs, by state.";

    Histogram(MESSAGES) BATCH_SIZE = "settled_batch_size", Count, ["from"], || each(Door::ALL.iter().map(|door| door.as_str())),
        "Messages in a batch, by where they came from.";
    Histogram(SECONDS) STAGE_SECONDS = "settled_stage_seconds", Seconds, ["stage"], || each(Stage::ALL.iter().map(|stage| stage.as_str())),
        "Time of a batch in a stage: facts, settle (of which load, decide, write and commit are parts), publish, hold, collect.";
    Histogram(SECONDS) END_TO_END_SECONDS = "settled_end_to_end_seconds", Seconds, [], itself,
        "From receipt of a message to its confirmed event.";
    Histogram(SECONDS) API_REQUEST_SECONDS = "settled_api_request_seconds", Seconds, ["route"], nothing,
        "From the head of a request to the public API to its answer, by what was asked.";
}

/// Every reason, and one for all that a newer version may have written.
pub(super) fn reason_labels() -> impl Iterator<Item = &'static str> {
    Reason::ALL.into_iter().map(Reason::label).chain(["unknown"])
}

fn verdicts() -> Vec<Vec<&'static str>> {
    let settled = [VerdictKind::Settled, VerdictKind::Duplicate].map(|verdict| vec![verdict.as_str(), ""]);
    let parked = vec![VerdictKind::Parked.as_str(), Reason::AllocationNotFound.label()];
    let rejected = reason_labels().map(|label| vec![VerdictKind::Rejected.as_str(), label]);
    settled.into_iter().chain([parked]).chain(rejected).collect()
}

fn events() -> Vec<Vec<&'static str>> {
    let kinds = EventType::ALL.iter().filter(|kind| **kind != EventType::Other);
    kinds
        .flat_map(|kind| EventFate::ALL.iter().map(|fate| vec![kind.as_str(), fate.as_str()]))
        .collect()
}

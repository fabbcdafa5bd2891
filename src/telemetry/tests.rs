use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::with_local_recorder;
use tracing::{debug, error, info, warn};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::SubscriberExt as _;
use uuid::Uuid;

use super::log::log_layer;
use super::recorder::recorder;
use super::*;
use crate::config::{LogFormat, LogLevel, LogSettings};
use crate::domain::{reason::Reason, verdict::VerdictKind};

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
    published.events(EventType::AllocationCleared, EventFate::Confirmed, 3);
    published.events(EventType::UpdateRejected, EventFate::Unrouted, 1);
    published.dead_letter();
    let second = Duration::from_secs(1);
    let milli = Duration::from_millis(1);
    let reasons = ["no consumer is attached".to_owned()];
    let began = Instant::now();
    let ended = began + milli;
    let stage = |stage| Signal::Stage { stage, began, ended };
    let listening = SocketAddr::from(([127, 0, 0, 1], 9464));
    let queue = "settlement.updates";
    for signal in [
        Signal::Started {
            worker: "w-1",
            lanes: 2,
            version: "0.1.0",
        },
        Signal::HttpListening { address: listening },
        Signal::CertificateRenewed,
        Signal::CertificateRefused { error: "a key" },
        Signal::HttpConnectionShed,
        Signal::ApiListening {
            address: listening,
            encrypted: true,
            version: "0.1.0",
        },
        Signal::ApiAnswered {
            route: ApiRoute::Receipt,
            status: 404,
            request: batch,
            elapsed: milli,
            error: None,
        },
        Signal::ApiAnswered {
            route: ApiRoute::UpdateAllocation,
            status: 503,
            request: batch,
            elapsed: milli,
            error: Some("the database is away"),
        },
        Signal::ConsoleListening {
            address: listening,
            encrypted: false,
            version: "0.1.0",
        },
        Signal::ConsoleNotOpened,
        Signal::ConsoleSignedIn {
            name: "ann",
            role: "operator",
            entrance: "proxy",
        },
        Signal::ConsoleAnswered {
            path: "/letters",
            status: 200,
            elapsed: milli,
        },
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
        Signal::QueueUnseen { queue, why: "403" },
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
            from: Door::Queue,
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
        stage(Stage::Facts),
        stage(Stage::Settle),
        stage(Stage::Publish),
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
            cause: PauseCause::Database,
            why: "away",
        },
        Signal::Resumed {
            cause: PauseCause::Database,
            paused_for: second,
        },
        Signal::Paused {
            cause: PauseCause::Culprits,
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
        Signal::HeldFilled { filled: 0.25 },
        Signal::HeldFull {
            of: "acme",
            messages: 64,
        },
        Signal::HeldHasRoom,
        Signal::KeysEnding { partners: 2 },
        Signal::LastKeyEnds {
            enterprise_id: "acme",
            ends_at: "2026-01-02T00:00:00.000Z",
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
        Signal::DeadLettersLeftOut { letters: 2 },
        Signal::DeadLetterSetApart {
            digest: "ab",
            sqlstate: Some("23514"),
            error: "check",
        },
        Signal::UnreadableGrew { messages: 1 },
        Signal::BrokerDeadLettersMeasured {
            queue: "settlement.updates",
            messages: 3,
        },
        Signal::BrokerDeadLettersStuck {
            queue: "settlement.updates",
            messages: 3,
            since: second,
        },
        Signal::ManagementAsked { error: None },
        Signal::ManagementAsked { error: Some("away") },
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
        Signal::BooksNotTold { error: "timeout" },
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
        Signal::TracesExported {
            receiver: "127.0.0.1:4318",
        },
        Signal::TracesOff { why: "a variable" },
        Signal::TracesRefused {
            receiver: "127.0.0.1:4318",
            error: "away",
        },
        Signal::TracesTaken {
            receiver: "127.0.0.1:4318",
        },
        Signal::Spans {
            fate: SpanFate::Dropped,
            spans: 5,
        },
        Signal::Stopping { why: "SIGTERM" },
        Signal::Drained { elapsed: second },
        Signal::NotDrained {
            elapsed: second,
            left: "lane 0",
        },
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
        "settled_api_requests_total{route=\"receipt\",status=\"404\"} 1",
        "settled_api_requests_total{route=\"update_allocation\",status=\"503\"} 1",
        "settled_api_request_seconds_count{route=\"receipt\"} 1",
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
        "settled_held_full_alarms_total 1",
        "settled_held_filled_ratio 0.25",
        "settled_keys_ending 2",
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
        "settled_broker_dead_letters_waiting{queue=\"settlement.updates\"} 3",
        "settled_broker_dead_letters_stuck_alarms_total 1",
        "settled_broker_management_answers 0",
        "settled_spans_total{fate=\"dropped\"} 5",
        "settled_spans_total{fate=\"exported\"} 0",
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
    assert_eq!(alarms.lines().count(), 17, "{alarms}");
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

#[test]
fn the_side_rooms_reasons_are_those_that_start_at_zero() {
    let why: Vec<&str> = crate::store::held::HeldWhy::ALL
        .iter()
        .map(|why| why.as_str())
        .collect();
    assert_eq!(catalogue::HELD_WHY.as_slice(), why);
}

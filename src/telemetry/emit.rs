//! Each signal's one log line, and what it counts.

use std::sync::Arc;
use std::time::Duration;

use metrics::SharedString;
use tracing::{debug, error, info, trace, warn};
use uuid::Uuid;

use super::catalogue as metric;
use super::labels::Door;
use super::signal::Signal;
use super::tally::Tally;
use super::traces::note;
use crate::domain::{reason::Reason, verdict::VerdictKind};

impl Signal<'_> {
    /// Says it: one log line, one metric; and in the trace of the batch in hand, where there is one and it is its concern.
    pub fn emit(&self) {
        note(self);
        match *self {
            Signal::Started { worker, lanes, version } => {
                info!(worker, lanes, version, "worker started");
            }
            Signal::HttpListening { address } => {
                info!(%address, "HTTP listens: /livez, /readyz, /metrics");
            }
            Signal::CertificateRenewed => info!("the certificate was renewed: the next connections have it"),
            Signal::CertificateRefused { error } => {
                error!(error, "the new certificate can not be used; the one before is");
            }
            Signal::HttpConnectionShed => {
                metric::HTTP_CONNECTIONS_SHED.add([], 1);
                // No louder: anybody who can connect could fill the log.
                trace!("an HTTP connection was closed to make room");
            }
            Signal::ApiListening {
                address,
                encrypted,
                version,
            } => {
                info!(%address, encrypted, version, "the API listens");
            }
            Signal::ApiAnswered {
                route,
                status,
                request,
                elapsed,
                error,
            } => {
                metric::API_REQUESTS.add([route.as_str().into(), status.to_string().into()], 1);
                metric::API_REQUEST_SECONDS.record([route.as_str().into()], [elapsed.as_secs_f64()]);
                // No louder for what a client does wrong: anybody who can connect could fill the log.
                match error {
                    None => debug!(%route, status, %request, elapsed_ms = millis(elapsed), "answered"),
                    Some(error) => {
                        warn!(%route, status, %request, elapsed_ms = millis(elapsed), error, "not answered as asked")
                    }
                }
            }
            Signal::ConsoleListening {
                address,
                encrypted,
                version,
            } => {
                info!(%address, encrypted, version, "the console listens");
            }
            Signal::ConsoleNotOpened => {
                warn!(
                    "console.listen is set, and this worker has no console: console.in_worker = true opens one beside it, and \
                     `settled console` is one by itself"
                );
            }
            Signal::ConsoleSignedIn { name, role, entrance } => {
                info!(name, role, by = entrance, "signed in to the console");
            }
            Signal::ConsoleAnswered { path, status, elapsed } => {
                // No louder: anybody who can connect could fill the log.
                debug!(path, status, elapsed_ms = millis(elapsed), "the console answered");
            }
            Signal::Ready => {
                metric::READY.set([], 1.0);
                info!("ready");
            }
            Signal::NotReady { reasons } => {
                metric::READY.set([], 0.0);
                warn!(reasons = reasons.join("; "), "not ready");
            }
            Signal::ConsumerAttached { lane, queue } => {
                metric::CONSUMERS_ATTACHED.add([queue.to_owned().into()], 1.0);
                info!(lane, queue, "consumer attached");
            }
            Signal::ConsumerCancelled { lane, queue } => {
                metric::CONSUMERS_ATTACHED.add([queue.to_owned().into()], -1.0);
                error!(lane, queue, "the broker cancelled the consumer; it is rebuilt");
            }
            Signal::TopologyMisfit { lane, queue, problem } => {
                error!(lane, queue, problem, "this queue is not consumed until it is mended");
            }
            Signal::TopologyLooked { queue, fits } => {
                metric::TOPOLOGY_MISFIT.set([queue.to_owned().into()], if fits { 0.0 } else { 1.0 });
                trace!(queue, fits, "queue looked at before it is consumed");
            }
            Signal::TopologyUnseen { queue, unseen } => {
                let unseen = unseen.join(", ");
                info!(
                    queue,
                    unseen, "not looked at, for want of a right on it: `settled doctor`, as who may, checks it"
                );
            }
            Signal::QueueUnseen { queue, why } => {
                warn!(
                    queue,
                    why, "the depth of this queue can not be seen; nothing else depends on it"
                );
            }
            Signal::OwnQueueUnserved { queue, most } => {
                metric::OWN_QUEUES_UNSERVED.add([], 1);
                error!(
                    queue,
                    most, "nobody consumes this queue: raise worker.own_queues_max and start the worker again"
                );
            }
            Signal::ConsumerLost { lane, queue, error } => {
                metric::CONSUMERS_ATTACHED.add([queue.to_owned().into()], -1.0);
                warn!(lane, queue, error, "consumer lost; it is rebuilt");
            }
            Signal::Undecodable { lane, queue, messages } => {
                metric::UNDECODABLE.add([], u64::try_from(messages).unwrap_or(u64::MAX));
                warn!(
                    lane,
                    queue, messages, "messages whose properties can not be decoded; they become dead letters with them"
                );
            }
            Signal::ConsumerDetached { lane, queue } => {
                metric::CONSUMERS_ATTACHED.add([queue.to_owned().into()], -1.0);
                info!(lane, queue, "consumer detached");
            }
            Signal::AckLost { lane, error } => {
                metric::ACKS_LOST.add([], 1);
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
                metric::RETRIES.add([dependency.as_str().into()], 1);
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
                metric::RETRIES.add([metric::TRANSACTION.into()], 1);
                warn!(%batch, lane, attempt, sqlstate, error, "batch tried again");
            }
            Signal::Stage { stage, began, ended } => {
                let elapsed = ended.saturating_duration_since(began);
                metric::STAGE_SECONDS.record([stage.as_str().into()], [elapsed.as_secs_f64()]);
                trace!(%stage, elapsed_us = micros(elapsed), "stage done");
            }
            Signal::RoundTrips { transaction, count } => {
                metric::DB_ROUND_TRIPS.add([transaction.into()], count);
                trace!(transaction, count, "the database answered");
            }
            Signal::EndToEnd { elapsed } => {
                metric::END_TO_END_SECONDS.record([], elapsed.iter().map(Duration::as_secs_f64));
                let longest = elapsed.iter().max().copied().unwrap_or_default();
                trace!(messages = elapsed.len(), longest_us = micros(longest), "answered");
            }
            Signal::CulpritIsolated {
                batch,
                digest,
                sqlstate,
                error,
            } => {
                metric::INTERNAL.add([], 1);
                error!(%batch, digest, sqlstate, error, "the database refuses this one message; rejected as internal");
            }
            Signal::Paused { cause, why } => {
                metric::PAUSED.add([cause.as_str().into()], 1.0);
                error!(%cause, why, "intake paused");
            }
            Signal::Resumed { cause, paused_for } => {
                metric::PAUSED.add([cause.as_str().into()], -1.0);
                info!(%cause, paused_ms = millis(paused_for), "intake resumed");
            }
            Signal::Held { why, messages } => {
                metric::HELD_SO_FAR.add([why.into()], messages);
                debug!(why, messages, "messages held, to be judged later");
            }
            Signal::HoldFailed { error } => {
                warn!(error, "messages could not be held; they are judged in line");
            }
            Signal::HeldUnreadable { id } => {
                metric::HELD_UNREADABLE.add([], 1);
                error!(%id, "held messages are of a format that this version can not read; start a newer worker");
            }
            Signal::LocksFound { locks } => {
                metric::LOCKS_FOUND.add([], 1);
                warn!(
                    locks,
                    "a transaction that stays open has locked rows that messages need; only these messages wait"
                );
            }
            Signal::HeldMeasured { held } => {
                for of in held {
                    metric::HELD.set([of.why.into()], of.messages as f64);
                    metric::HELD_BYTES.set([of.why.into()], of.bytes as f64);
                    metric::HELD_OLDEST_SECONDS.set([of.why.into()], of.oldest.as_secs_f64());
                }
                trace!("held messages measured");
            }
            Signal::HeldFilled { filled } => {
                metric::HELD_FILLED_RATIO.set([], filled);
                trace!(filled, "the side room measured");
            }
            Signal::HeldFull { of, messages } => {
                metric::HELD_FULL_ALARMS.add([], 1);
                error!(
                    alarm = true,
                    of, messages, "the side room is full: what would be held is judged in line, and others wait for it"
                );
            }
            Signal::KeysEnding { partners } => {
                metric::KEYS_ENDING.set([], partners as f64);
                trace!(partners, "keys that end soon counted");
            }
            Signal::LastKeyEnds { enterprise_id, ends_at } => warn!(
                enterprise_id,
                ends_at, "the partner's last key ends: `settled key rotate` or `settled key add` registers the next"
            ),
            Signal::HeldHasRoom => info!("there is room in the side room again"),
            Signal::ParkedUnreadable { key } => {
                metric::PARKED_UNREADABLE.add([], 1);
                error!(%key, "a parked message is of a format that this version can not read; start a newer worker");
            }
            Signal::ReplayUnreadable { id } => {
                metric::REPLAYS_UNREADABLE.add([], 1);
                error!(%id, "a dead letter is of a format that this version can not read; start a newer worker");
            }
            Signal::DeadLettersCollected {
                new,
                again,
                copies,
                lag,
            } => {
                for (what, count) in metric::COLLECTED.into_iter().zip([new, again, copies]) {
                    metric::DEAD_LETTERS_COLLECTED.add([what.into()], count);
                }
                metric::COLLECTOR_LAG_SECONDS.set([], lag.as_secs_f64());
                debug!(new, again, copies, lag_ms = millis(lag), "dead letters collected");
            }
            Signal::DeadLettersFull { why } => {
                metric::DEAD_LETTERS_FULL.set([], 1.0);
                error!(
                    alarm = true,
                    why, "dead letters are full: none is collected until some are purged"
                );
            }
            Signal::DeadLettersHaveRoom => {
                metric::DEAD_LETTERS_FULL.set([], 0.0);
                info!("there is room for dead letters again");
            }
            Signal::DeadLetterSpace {
                rows,
                bytes,
                filled,
                partners_near,
            } => {
                metric::DEAD_LETTERS_ROWS.set([], rows as f64);
                metric::DEAD_LETTERS_BYTES.set([], bytes as f64);
                metric::DEAD_LETTERS_FILLED_RATIO.set([], filled);
                metric::DEAD_LETTERS_PARTNERS_NEAR_BOUND.set([], partners_near as f64);
                trace!(rows, bytes, filled, partners_near, "the room for dead letters measured");
            }
            Signal::DeadLettersNearBound {
                of,
                rows,
                bytes,
                filled,
            } => {
                metric::DEAD_LETTERS_NEAR_BOUND_ALARMS.add([], 1);
                warn!(
                    alarm = true,
                    of, rows, bytes, filled, "dead letters take most of the room that they may: discard and purge some"
                );
            }
            Signal::DeadLettersSettledSince { closed } => {
                metric::DEAD_LETTERS_SETTLED_SINCE.add([], closed);
                info!(closed, "open dead letters have settled since and are closed");
            }
            Signal::DeadLettersLeftOut { letters } => {
                warn!(
                    alarm = true,
                    letters,
                    "the broker dead-lettered messages that did not come to settlement.dead; they are stored from their copies: \
                     is that queue bound? `settled doctor` sees it with broker.management_url"
                );
            }
            Signal::CollectorIdle => {
                metric::COLLECTOR_LAG_SECONDS.set([], 0.0);
                trace!("no dead letter waits");
            }
            Signal::DeadLetterSetApart {
                digest,
                sqlstate,
                error,
            } => {
                metric::DEAD_LETTERS_SET_APART.add([], 1);
                error!(
                    digest,
                    sqlstate, error, "this dead letter can not be stored; it goes to settlement.unreadable"
                );
            }
            Signal::UnreadableGrew { messages } => {
                metric::UNREADABLE_ALARMS.add([], 1);
                error!(
                    messages,
                    "dead letters that nobody could read are in settlement.unreadable"
                );
            }
            Signal::HandedBack { lane, why } => {
                metric::HANDED_BACK.add([], 1);
                warn!(lane, why, "messages handed back to the broker");
            }
            Signal::Published { batch, published } => {
                for ((kind, fate), count) in &published.events {
                    metric::EVENTS.add([kind.as_str().into(), fate.as_str().into()], *count);
                }
                metric::DEAD_LETTERS_PUBLISHED.add([], published.dead_letters);
                let events: u64 = published.events.values().sum();
                debug!(%batch, events, dead_letters = published.dead_letters, "published and confirmed");
            }
            Signal::PublishFailed { batch, error } => {
                metric::PUBLISH_FAILURES.add([], 1);
                warn!(%batch, error, "publishing failed; the row is kept and published again");
            }
            Signal::RowRepublished { batch, attempt } => {
                metric::ROWS_REPUBLISHED.add([], 1);
                info!(%batch, attempt, "row published again");
            }
            Signal::DeadLetterReturned {
                batch,
                routing_key,
                message_id,
            } => {
                metric::DEAD_LETTERS_RETURNED.add([], 1);
                error!(
                    %batch,
                    routing_key,
                    message_id,
                    "a dead letter found no queue; the lane stops until settlement.dead is bound again"
                );
            }
            Signal::RelayTook { batch, age } => {
                metric::RELAY_TAKEN.add([], 1);
                info!(%batch, age_ms = millis(age), "the relay took a row that no lane owns");
            }
            Signal::PublicationRefused {
                batch,
                routing_key,
                error,
            } => {
                metric::OUTBOX_REFUSED.add([], 1);
                error!(%batch, routing_key, error, "the broker refuses this publication; set aside in outbox_refused");
            }
            Signal::Reply { result } => {
                metric::REPLIES.add([result.as_str().into()], 1);
                debug!(%result, "reply_to");
            }
            Signal::BooksNotTold { error } => {
                debug!(
                    error,
                    "the broker was not told what was committed last; it is told again"
                );
            }
            Signal::OutboxMeasured { pending, oldest } => {
                metric::OUTBOX_PENDING.set([], pending as f64);
                metric::OUTBOX_OLDEST_SECONDS.set([], oldest.unwrap_or_default().as_secs_f64());
                trace!(
                    pending,
                    oldest_ms = millis(oldest.unwrap_or_default()),
                    "outbox measured"
                );
            }
            Signal::ParkedMeasured { parked } => {
                metric::PARKED.set([], parked as f64);
                trace!(parked, "parked messages measured");
            }
            Signal::QueueMeasured { queue, messages } => {
                metric::QUEUE_MESSAGES.set([queue.to_owned().into()], messages as f64);
                trace!(queue, messages, "queue measured");
            }
            Signal::BrokerDeadLettersMeasured { queue, messages } => {
                metric::BROKER_DEAD_LETTERS_WAITING.set([queue.to_owned().into()], messages as f64);
                trace!(queue, messages, "dead letters at the broker measured");
            }
            Signal::BrokerDeadLettersStuck { queue, messages, since } => {
                metric::BROKER_DEAD_LETTERS_STUCK_ALARMS.add([], 1);
                error!(
                    alarm = true,
                    queue,
                    messages,
                    since_ms = millis(since),
                    "the broker does not get rid of what it has to dead-letter: is settlement.dead bound, and not full?"
                );
            }
            Signal::ManagementAsked { error } => {
                metric::BROKER_MANAGEMENT_ANSWERS.set([], if error.is_none() { 1.0 } else { 0.0 });
                match error {
                    Some(error) => warn!(error, "what waits at the broker to be dead-lettered is not seen"),
                    None => info!("the broker's management API answers"),
                }
            }
            Signal::DeskMeasured { open, oldest, runs } => {
                for label in metric::reason_labels() {
                    let of = open.iter().filter(|(of, _)| of.label() == label);
                    let count: u64 = of.map(|(_, count)| count).sum();
                    metric::DEAD_LETTERS_OPEN.set([label.into()], count as f64);
                }
                let oldest = oldest.unwrap_or_default();
                metric::DEAD_LETTERS_OLDEST_SECONDS.set([], oldest.as_secs_f64());
                for state in metric::RUN_STATES {
                    let count = runs.iter().find(|(of, _)| of == state).map_or(0, |(_, count)| *count);
                    metric::REPLAY_RUNS.set([state.into()], count as f64);
                }
                let open: u64 = open.iter().map(|(_, count)| count).sum();
                trace!(open, oldest_ms = millis(oldest), "dead letters measured");
            }
            Signal::TracesExported { receiver } => info!(receiver, "traces are exported"),
            Signal::TracesOff { why } => warn!(why, "no traces are exported; nothing else depends on it"),
            Signal::TracesRefused { receiver, error } => {
                warn!(
                    receiver,
                    error, "traces can not be exported; nothing else depends on it"
                );
            }
            Signal::TracesTaken { receiver } => info!(receiver, "traces are exported again"),
            Signal::Spans { fate, spans } => {
                metric::SPANS.add([fate.as_str().into()], spans);
                trace!(%fate, spans, "spans");
            }
            Signal::Stopping { why } => {
                info!(why, "stopping: no more messages are taken");
            }
            Signal::Drained { elapsed } => {
                info!(elapsed_ms = millis(elapsed), "drained");
            }
            Signal::NotDrained { elapsed, left } => {
                warn!(elapsed_ms = millis(elapsed), left, "stopped before everything was done");
            }
            Signal::Stopped => {
                metric::READY.set([], 0.0);
                info!("stopped");
            }
        }
    }
}

fn judged(batch: Uuid, lane: usize, from: Door, tally: &Tally) {
    for ((verdict, reason), count) in &tally.verdicts {
        let reason = reason.map_or("", Reason::label);
        metric::JUDGED.add([verdict.as_str().into(), reason.into()], *count);
    }
    for ((label, verdict), count) in &tally.partners {
        let label = SharedString::from_shared(Arc::clone(label));
        metric::JUDGED_OF_PARTNER.add([label, verdict.as_str().into()], *count);
    }
    metric::BATCH_SIZE.record([from.as_str().into()], [tally.messages as f64]);
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

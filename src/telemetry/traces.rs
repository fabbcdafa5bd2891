//! The trace of a batch: a span from its receipt to its last confirm, linked to the traces that its messages came in, with a
//! span for each stage. Rooms do not know of it: it is made of the signals that they emit while the batch is in hand.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime},
};

use opentelemetry::{
    Context, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId,
        TraceState, Tracer as _,
    },
};
use opentelemetry_sdk::trace::{SdkTracer, Span};
use uuid::Uuid;

use super::{
    labels::{Door, Stage},
    signal::Signal,
};
use crate::domain::{
    delivery::Delivery,
    names,
    trace::{traceparent, tracestate},
    verdict::VerdictKind,
};

tokio::task_local! {
    /// Of the batch in hand; a task works on one at a time.
    static CURRENT: Option<Arc<Recording>>;
}

/// Whether batches are traced. Where not, all of this is an option that holds nothing.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Tracing>);

#[derive(Clone, Debug)]
struct Tracing {
    tracer: SdkTracer,
    /// Bytes of `tracestate` in the links of one batch: they wait in memory where the receiver is away.
    states_max: usize,
}

impl Traces {
    pub(super) fn with(tracer: SdkTracer, states_max: usize) -> Self {
        Self(Some(Tracing { tracer, states_max }))
    }

    /// Messages were taken from a queue, or from where they waited. Where the sampler does not want the trace, nothing more
    /// is done for it.
    pub fn begin<'d>(
        &self,
        queue: &str,
        door: Door,
        deliveries: impl Iterator<Item = &'d Delivery> + Clone,
    ) -> BatchTrace {
        let Some(Tracing { tracer, states_max }) = &self.0 else {
            return BatchTrace::default();
        };
        let clock = Clock::now();
        let builder = SpanBuilder::from_name(format!("process {queue}"))
            .with_kind(SpanKind::Consumer)
            .with_start_time(clock.time);
        let mut span = tracer.build_with_context(builder, &Context::new());
        if !span.is_recording() {
            return BatchTrace::default();
        }
        span.set_attributes([
            rabbitmq(),
            KeyValue::new("messaging.operation.name", "process"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.destination.name", queue.to_owned()),
            KeyValue::new("messaging.batch.message_count", count(deliveries.clone().count())),
            KeyValue::new("settlement.door", door.as_str()),
        ]);
        // How many there may be is the tracer's limit, which counts those beyond it.
        let mut linked = HashSet::new();
        let mut room = *states_max;
        for delivery in deliveries {
            let Some((trace_id, span_id, flags)) = origin_of(delivery) else {
                continue;
            };
            if linked.insert((trace_id, span_id)) {
                let state = state_within(&mut room, delivery);
                span.add_link(SpanContext::new(trace_id, span_id, flags, true, state), Vec::new());
            }
        }
        let context = span.span_context().clone();
        BatchTrace(Some(Arc::new(Recording {
            tracer: tracer.clone(),
            ids: (context.trace_id(), context.span_id()),
            parent: Context::new().with_remote_span_context(context),
            span: Mutex::new(span),
            clock,
        })))
    }
}

/// Where in somebody's trace a message was made.
fn origin_of(delivery: &Delivery) -> Option<(TraceId, SpanId, TraceFlags)> {
    let mut parts = traceparent(delivery)?.split('-').skip(1);
    let trace_id = TraceId::from_hex(parts.next()?).ok()?;
    let span_id = SpanId::from_hex(parts.next()?).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(parts.next()?, 16).ok()?);
    Some((trace_id, span_id, flags))
}

/// A message's `tracestate`, where there is room for it. One that is none is passed over.
fn state_within(room: &mut usize, delivery: &Delivery) -> TraceState {
    let taken = tracestate(delivery).and_then(|text| {
        let left = room.checked_sub(text.len())?;
        Some((left, text.parse().ok()?))
    });
    let Some((left, state)) = taken else {
        return TraceState::default();
    };
    *room = left;
    state
}

fn rabbitmq() -> KeyValue {
    KeyValue::new("messaging.system", "rabbitmq")
}

fn count(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The trace of a batch, which goes with it from task to task, and ends when nobody has it any more. None: it is not recorded.
#[derive(Clone, Debug, Default)]
pub struct BatchTrace(Option<Arc<Recording>>);

impl BatchTrace {
    /// That of the batch in hand.
    pub fn current() -> Self {
        Self(CURRENT.try_with(Option::clone).ok().flatten())
    }

    /// Does a part of the batch's work: what is said meanwhile is said in its trace.
    pub fn within<W: Future>(&self, work: W) -> impl Future<Output = W::Output> + use<W> {
        CURRENT.scope(self.0.clone(), work)
    }
}

#[derive(Debug)]
struct Recording {
    tracer: SdkTracer,
    ids: (TraceId, SpanId),
    /// What the spans of its stages are under.
    parent: Context,
    span: Mutex<Span>,
    clock: Clock,
}

/// The time of day when a trace began: within it, durations count.
#[derive(Clone, Copy, Debug)]
struct Clock {
    at: Instant,
    time: SystemTime,
}

impl Clock {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            time: SystemTime::now(),
        }
    }

    fn time_of(&self, at: Instant) -> SystemTime {
        let after = self.time.checked_add(at.saturating_duration_since(self.at));
        after.unwrap_or(self.time)
    }
}

impl Recording {
    fn span(&self) -> MutexGuard<'_, Span> {
        self.span.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self, name: &'static str, attributes: Vec<KeyValue>) {
        let now = self.clock.time_of(Instant::now());
        self.span().add_event_with_timestamp(name, now, attributes);
    }

    fn stage(&self, stage: Stage, began: Instant, ended: Instant) {
        let Some((name, kind, attributes)) = span_of(stage) else {
            return;
        };
        let builder = SpanBuilder::from_name(name)
            .with_kind(kind)
            .with_start_time(self.clock.time_of(began))
            .with_attributes(attributes);
        let mut span = self.tracer.build_with_context(builder, &self.parent);
        span.end_with_timestamp(self.clock.time_of(ended));
    }

    fn note(&self, signal: &Signal<'_>) {
        match *signal {
            Signal::Stage { stage, began, ended } => self.stage(stage, began, ended),
            Signal::BatchJudged { batch, tally, .. } => {
                let mut attributes = vec![of_batch(batch)];
                attributes.extend(VerdictKind::ALL.iter().filter_map(|kind| {
                    let messages = i64::try_from(tally.count(*kind)).unwrap_or(i64::MAX);
                    (messages > 0).then(|| KeyValue::new(format!("settlement.{}", kind.as_str()), messages))
                }));
                self.event("batch judged", attributes);
            }
            // Ids and codes only: an error's words are in the log, under the ids of this trace.
            Signal::BatchRetried {
                batch,
                attempt,
                sqlstate,
                ..
            } => {
                let mut attributes = vec![of_batch(batch), KeyValue::new("settlement.attempt", i64::from(attempt))];
                attributes.extend(of_sqlstate(sqlstate));
                self.event("batch tried again", attributes);
            }
            Signal::CulpritIsolated {
                batch,
                digest,
                sqlstate,
                ..
            } => {
                let digest = KeyValue::new("settlement.message.digest", digest.to_owned());
                let mut attributes = vec![of_batch(batch), digest];
                attributes.extend(of_sqlstate(sqlstate));
                self.event("one message refused by the database", attributes);
            }
            Signal::Held { why, messages } => {
                let messages = i64::try_from(messages).unwrap_or(i64::MAX);
                let attributes = vec![
                    KeyValue::new("settlement.held", messages),
                    KeyValue::new("settlement.why", why),
                ];
                self.event("messages held", attributes);
            }
            Signal::LocksFound { locks } => {
                self.event(
                    "rows found locked",
                    vec![KeyValue::new("settlement.locks", count(locks))],
                );
            }
            Signal::AckLost { .. } => self.event("acknowledgement lost", Vec::new()),
            Signal::HandedBack { .. } => self.span().set_status(Status::error("handed back")),
            Signal::Published { batch, published } => {
                let (events, letters) = (published.events.values().sum(), published.dead_letters);
                let number = |name, number: u64| KeyValue::new(name, i64::try_from(number).unwrap_or(i64::MAX));
                let counts = [
                    number("settlement.events", events),
                    number("settlement.dead_letters", letters),
                ];
                let attributes = [of_batch(batch)].into_iter().chain(counts).collect();
                self.event("published", attributes);
            }
            Signal::PublishFailed { batch, .. } => self.event("publishing failed", vec![of_batch(batch)]),
            Signal::DeadLetterReturned { batch, .. } => self.event("dead letter returned", vec![of_batch(batch)]),
            Signal::PublicationRefused { batch, .. } => self.event("publication set aside", vec![of_batch(batch)]),
            // The rest is of the worker, and of no batch.
            _ => {}
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let now = self.clock.time_of(Instant::now());
        self.span().end_with_timestamp(now);
    }
}

/// A stage's name, kind and attributes; none where it is the sum of others.
fn span_of(stage: Stage) -> Option<(&'static str, SpanKind, Vec<KeyValue>)> {
    let database = || vec![KeyValue::new("db.system.name", "postgresql")];
    Some(match stage {
        Stage::Facts => ("read", SpanKind::Internal, Vec::new()),
        Stage::Hold => ("hold", SpanKind::Client, database()),
        Stage::Load => ("load", SpanKind::Client, database()),
        Stage::Decide => ("decide", SpanKind::Internal, Vec::new()),
        Stage::Write => ("write", SpanKind::Client, database()),
        Stage::Commit => ("commit", SpanKind::Client, database()),
        Stage::Publish => {
            let sends = [
                ("messaging.operation.name", "publish"),
                ("messaging.operation.type", "send"),
            ];
            let to = KeyValue::new("messaging.destination.name", names::EVENTS);
            let sends = sends.map(|(name, value)| KeyValue::new(name, value));
            let attributes = sends.into_iter().chain([rabbitmq(), to]).collect();
            ("publish", SpanKind::Producer, attributes)
        }
        Stage::Settle | Stage::Collect => return None,
    })
}

fn of_batch(batch: Uuid) -> KeyValue {
    KeyValue::new("settlement.batch.id", batch.to_string())
}

fn of_sqlstate(sqlstate: Option<&str>) -> Option<KeyValue> {
    sqlstate.map(|state| KeyValue::new("db.response.status_code", state.to_owned()))
}

/// Says in the trace of the batch in hand what is its concern.
pub(super) fn note(signal: &Signal<'_>) {
    // Outside of a batch there is none to say it in.
    CURRENT
        .try_with(|current| {
            if let Some(recording) = current {
                recording.note(signal);
            }
        })
        .ok();
}

/// The ids that a line of the log carries.
pub(super) fn ids() -> Option<(TraceId, SpanId)> {
    CURRENT
        .try_with(|current| current.as_ref().map(|recording| recording.ids))
        .ok()
        .flatten()
}

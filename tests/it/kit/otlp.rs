//! A receiver of traces: OTLP over HTTP, decoded from the protobuf that it is told.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind},
};
use prost::Message as _;
use tokio::net::TcpListener;

use super::{
    secrets,
    support::{Beside, PATIENCE, until},
};

/// Attributes, each as text.
pub(crate) type Attributes = BTreeMap<String, String>;

/// A span as it was told.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) name: String,
    pub(crate) kind: SpanKind,
    pub(crate) trace: String,
    pub(crate) id: String,
    /// Empty: it has none.
    pub(crate) parent: String,
    /// Nanoseconds since 1970.
    pub(crate) time: (u64, u64),
    pub(crate) attributes: Attributes,
    /// `traceparent` and `tracestate` of each.
    pub(crate) links: Vec<(String, String)>,
    pub(crate) links_dropped: u32,
    pub(crate) events: Vec<(String, Attributes)>,
    /// 2: an error.
    pub(crate) status: i32,
    pub(crate) resource: Attributes,
    /// Who made it, and of which version.
    pub(crate) scope: (String, String),
}

impl Told {
    /// One of a batch as a whole.
    pub(crate) fn is_batch(&self) -> bool {
        self.name.starts_with("process ")
    }

    pub(crate) fn number(&self, attribute: &str) -> usize {
        let value = self.attributes.get(attribute);
        value.and_then(|value| value.parse().ok()).unwrap_or_default()
    }
}

fn attributes(given: Vec<KeyValue>) -> Attributes {
    let count = given.len();
    let attributes: Attributes = given.into_iter().map(|one| (one.key, text(one.value))).collect();
    assert_eq!(attributes.len(), count, "each name once: {attributes:?}");
    attributes
}

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(truth)) => truth.to_string(),
        other => panic!("an attribute is text or a number: {other:?}"),
    }
}

fn spans(body: Bytes) -> Vec<Told> {
    let request = ExportTraceServiceRequest::decode(body).expect("protobuf of an export");
    let mut told = Vec::new();
    for of_resource in request.resource_spans {
        let resource = attributes(of_resource.resource.unwrap_or_default().attributes);
        for of_scope in of_resource.scope_spans {
            let scope = of_scope.scope.unwrap_or_default();
            let scope = (scope.name, scope.version);
            told.extend(of_scope.spans.into_iter().map(|span| one(span, &resource, &scope)));
        }
    }
    told
}

fn one(span: Span, resource: &Attributes, scope: &(String, String)) -> Told {
    let hex = |bytes: &[u8]| hex::encode(bytes);
    let link = |link: opentelemetry_proto::tonic::trace::v1::span::Link| {
        let (trace, span) = (hex(&link.trace_id), hex(&link.span_id));
        (format!("00-{trace}-{span}-{:02x}", link.flags & 0xff), link.trace_state)
    };
    Told {
        kind: span.kind(),
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        time: (span.start_time_unix_nano, span.end_time_unix_nano),
        links: span.links.into_iter().map(link).collect(),
        links_dropped: span.dropped_links_count,
        events: span
            .events
            .into_iter()
            .map(|event| (event.name, attributes(event.attributes)))
            .collect(),
        status: span.status.map_or(0, |status| status.code),
        attributes: attributes(span.attributes),
        name: span.name,
        resource: resource.clone(),
        scope: scope.clone(),
    }
}

/// What it does with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    Takes,
    /// Answers with this status.
    Refuses(StatusCode),
    /// Reads and never answers.
    Hangs,
}

#[derive(Default)]
struct Record {
    spans: Vec<Told>,
    headers: Vec<HeaderMap>,
    /// Something came that is no export of traces, or holds a secret: standard error says what.
    is_wrong: bool,
}

/// A receiver that listens.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    record: Arc<Mutex<Record>>,
    asked: Arc<AtomicUsize>,
    _open: Beside,
}

impl Receiver {
    pub(crate) async fn open(manner: Manner) -> Self {
        Self::at(SocketAddr::from(([127, 0, 0, 1], 0)), manner).await
    }

    /// Where somebody was told that it is.
    pub(crate) async fn at(address: SocketAddr, manner: Manner) -> Self {
        // Whoever had it before may still be on his way out.
        let listener = until("the address is free", PATIENCE, async || {
            TcpListener::bind(address).await.ok()
        })
        .await;
        let address = listener.local_addr().expect("an address");
        let (record, asked) = (Arc::<Mutex<Record>>::default(), Arc::<AtomicUsize>::default());
        let (written, counted) = (Arc::clone(&record), Arc::clone(&asked));
        let open = Beside::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (written, counted) = (Arc::clone(&written), Arc::clone(&counted));
                let answer = service_fn(move |request| {
                    counted.fetch_add(1, Ordering::Relaxed);
                    answer(Arc::clone(&written), manner, request)
                });
                let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                connections.spawn(async move { drop(serving.await) });
            }
        });
        Self {
            address,
            record,
            asked,
            _open: open,
        }
    }

    /// What the environment calls it.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many requests came.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// What it was told so far.
    pub(crate) fn spans(&self) -> Vec<Told> {
        let record = self.record();
        assert!(!record.is_wrong, "what came is wrong: see above");
        record.spans.clone()
    }

    /// The head of each request that it took.
    pub(crate) fn headers(&self) -> Vec<HeaderMap> {
        self.record().headers.clone()
    }

    /// Waits until batches with so many messages in all came through a door, with everything in their traces: a batch's own
    /// span is the last of them.
    pub(crate) async fn batches(&self, door: &str, messages: usize) -> Vec<Told> {
        until(&format!("{messages} messages by {door}"), PATIENCE, async || {
            let spans = self.spans();
            let of_door = |span: &&Told| {
                let is_of = span.attributes.get("settlement.door").is_some_and(|of| of == door);
                span.is_batch() && is_of
            };
            let batches: Vec<Told> = spans.iter().filter(of_door).cloned().collect();
            let count = |span: &Told| span.number("messaging.batch.message_count");
            (batches.iter().map(count).sum::<usize>() >= messages).then_some(batches)
        })
        .await
    }

    /// What is under a span.
    pub(crate) fn under(&self, parent: &Told) -> Vec<Told> {
        let mut spans = self.spans();
        spans.retain(|span| span.parent == parent.id && span.trace == parent.trace);
        spans
    }
}

async fn answer(
    record: Arc<Mutex<Record>>,
    manner: Manner,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.expect("a body").to_bytes();
    let found = secrets::found(&String::from_utf8_lossy(&body));
    // A panic here ends a connection and no test: what is wrong is kept for whoever looks at the spans.
    let told = std::panic::catch_unwind(|| {
        assert_eq!((head.method.as_str(), head.uri.path()), ("POST", "/v1/traces"));
        let kind = head.headers.get("content-type").expect("a type");
        assert_eq!(kind, "application/x-protobuf");
        assert!(found.is_empty(), "spans hold what nobody may read there: {found:?}");
        spans(body)
    });
    let answer = |status| {
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = status;
        Ok(answer)
    };
    match manner {
        Manner::Takes => {
            let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
            match told {
                Ok(told) => record.spans.extend(told),
                Err(_) => record.is_wrong = true,
            }
            record.headers.push(head.headers);
            answer(StatusCode::OK)
        }
        Manner::Refuses(status) => answer(status),
        Manner::Hangs => std::future::pending().await,
    }
}

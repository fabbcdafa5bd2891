//! `/livez`, `/readyz` and `/metrics`, for orchestrators and Prometheus. Everything has a bound: connections, header
//! bytes, the time to send a request and to read the answer.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::retry::{Waited, sleep, stopped};
use crate::telemetry::Signal;

/// Connections at once; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 128;
/// Bytes of a request's head.
const HEAD_MAX: usize = 16 * 1024;
/// Time to send a request's head.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// A connection's whole life, so that one who never reads cannot keep it.
const CONNECTION_TIME: Duration = Duration::from_secs(120);
/// Histograms collect every sample until they are folded; without a scrape nobody else does.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the worker knows of itself, and `/readyz` tells.
#[derive(Debug, Default)]
pub struct Health {
    consumers_attached: AtomicUsize,
    database_ok: AtomicBool,
    paused: Mutex<Option<String>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Readiness {
    ready: bool,
    consumers_attached: usize,
    database: bool,
    paused: Option<String>,
    reasons: Vec<String>,
}

impl Health {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn set_consumers_attached(&self, count: usize) {
        self.consumers_attached.store(count, Ordering::Release);
    }

    pub fn consumer_attached(&self) {
        self.consumers_attached.fetch_add(1, Ordering::AcqRel);
    }

    pub fn consumer_gone(&self) {
        // Saturating: a consumer that is reported gone twice must not make the worker look ready for ever.
        self.consumers_attached
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1))
            .unwrap_or_default();
    }

    pub fn consumers_attached(&self) -> usize {
        self.consumers_attached.load(Ordering::Acquire)
    }

    pub fn set_database_ok(&self, ok: bool) {
        self.database_ok.store(ok, Ordering::Release);
    }

    pub fn database_ok(&self) -> bool {
        self.database_ok.load(Ordering::Acquire)
    }

    /// Why intake is paused; None: it is not. Shown to whoever asks `/readyz`, so no secrets.
    pub fn set_paused(&self, why: Option<String>) {
        *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub fn paused(&self) -> Option<String> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why the worker is not ready; empty if it is.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.consumers_attached() == 0 {
            reasons.push("no consumer is attached".to_owned());
        }
        if !self.database_ok() {
            reasons.push("the database does not answer".to_owned());
        }
        if let Some(why) = self.paused() {
            reasons.push(format!("paused: {why}"));
        }
        reasons
    }

    pub fn is_ready(&self) -> bool {
        self.reasons().is_empty()
    }

    fn readiness(&self) -> Readiness {
        let reasons = self.reasons();
        Readiness {
            ready: reasons.is_empty(),
            consumers_attached: self.consumers_attached(),
            database: self.database_ok(),
            paused: self.paused(),
            reasons,
        }
    }
}

/// The address could not be had.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct HttpError {
    message: String,
}

impl HttpError {
    pub fn message(&self) -> &str {
        &self.message
    }

    pub fn hint(&self) -> &str {
        "set http.listen (SETTLED_HTTP__LISTEN) to a free address of this machine; port 0 takes any free port"
    }
}

/// Listens, answers in the background until `shutdown`, and says where (port 0 is any free one).
///
/// # Errors
/// If the address is in use, not of this machine, or needs rights.
pub async fn serve(
    listen: SocketAddr,
    health: Arc<Health>,
    metrics: PrometheusHandle,
    shutdown: watch::Receiver<bool>,
) -> Result<SocketAddr, HttpError> {
    let refused = |error: std::io::Error| {
        let why = match error.kind() {
            std::io::ErrorKind::AddrInUse => "the address is in use".to_owned(),
            std::io::ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
            std::io::ErrorKind::PermissionDenied => "this user may not".to_owned(),
            _ => error.to_string(),
        };
        HttpError {
            message: format!("cannot listen for HTTP on {listen}: {why}"),
        }
    };
    let listener = TcpListener::bind(listen).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    tokio::spawn(upkeep(metrics.clone(), shutdown.clone()));
    tokio::spawn(accept(listener, health, metrics, shutdown));
    Signal::HttpListening { address }.emit();
    Ok(address)
}

async fn upkeep(metrics: PrometheusHandle, mut shutdown: watch::Receiver<bool>) {
    while sleep(UPKEEP, &mut shutdown).await == Waited::Over {
        metrics.run_upkeep();
    }
}

async fn accept(
    listener: TcpListener,
    health: Arc<Health>,
    metrics: PrometheusHandle,
    mut shutdown: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let stopping = shutdown.clone();
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            biased;
            () = stopped(&mut shutdown) => return,
            next = next => next,
        };
        let (Ok(place), Ok((stream, _))) = (place, accepted) else {
            // Out of file descriptors, most likely: they come back, but not at once.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (health, metrics) = (Arc::clone(&health), metrics.clone());
        tokio::spawn(async move {
            converse(stream, health, metrics, stopping).await;
            drop(place);
        });
    }
}

async fn converse(
    stream: TcpStream,
    health: Arc<Health>,
    metrics: PrometheusHandle,
    mut stopping: watch::Receiver<bool>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(&request, &health, &metrics);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_header_size(HEAD_MAX)
        .max_headers(64)
        .max_buf_size(HEAD_MAX.max(8192))
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = tokio::time::sleep(CONNECTION_TIME) => None,
        () = stopped(&mut stopping) => {
            // What is being answered is finished.
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(Duration::from_secs(1), connection).await.ok()
        }
    };
    // A client that went away or spoke no HTTP is its own affair, and anybody could fill the log with it.
    drop(ended);
}

fn answer(request: &Request<Incoming>, health: &Health, metrics: &PrometheusHandle) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let path = request.uri().path();
    if !matches!(path, "/livez" | "/readyz" | "/metrics") {
        return response(
            StatusCode::NOT_FOUND,
            TEXT,
            "not found: there are /livez, /readyz and /metrics\n".into(),
        );
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".into());
        refusal
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match path {
        "/readyz" => {
            let readiness = health.readiness();
            let status = if readiness.ready {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            match serde_json::to_string(&readiness) {
                Ok(body) => response(status, "application/json", body),
                Err(_) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, String::new()),
            }
        }
        "/metrics" => response(
            StatusCode::OK,
            "text/plain; version=0.0.4; charset=utf-8",
            metrics.render(),
        ),
        _ => response(StatusCode::OK, TEXT, "ok\n".into()),
    }
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

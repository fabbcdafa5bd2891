//! `/livez`, `/readyz` and `/metrics`, for orchestrators and Prometheus. Everything has a bound: connections, header
//! bytes, the time to send a request and to read the answer, and how many long answers there are at once.

pub(crate) mod ask;
pub(crate) mod door;
pub(crate) mod outlet;
pub(crate) mod probe;
pub(crate) mod rates;
pub(crate) mod server;

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
    extract::State,
    response::Response,
    routing::get,
};
use hyper::{
    body::{Frame, SizeHint},
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER},
    http::{HeaderValue, StatusCode},
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};

use self::{
    door::{ConnectionBounds, Connections},
    server::Served,
};
use crate::{
    config::HttpSettings,
    health::Health,
    retry::{Waited, sleep},
    telemetry::Signal,
};

/// How long a scrape waits for one before it to end.
const SCRAPE_WAIT: Duration = Duration::from_secs(1);
/// Bytes of a long answer that are handed over at once: its place is free when the last of them is.
const PIECE: usize = 64 * 1024;
/// Histograms collect every sample until they are folded; without a scrape nobody else does.
const UPKEEP: Duration = Duration::from_secs(5);

/// How often it is looked whether readiness has changed.
const READINESS: Duration = Duration::from_millis(100);

const TEXT: &str = "text/plain; charset=utf-8";

/// The address could not be had.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct HttpError {
    message: String,
    hint: String,
}

impl HttpError {
    pub fn message(&self) -> &str {
        &self.message
    }

    pub fn hint(&self) -> &str {
        &self.hint
    }

    /// The same where another setting has the address.
    pub(crate) fn of(self, setting: &str, variable: &str) -> Self {
        Self {
            hint: hint(setting, variable),
            ..self
        }
    }
}

fn hint(setting: &str, variable: &str) -> String {
    format!("set {setting} ({variable}) to a free address of this machine; port 0 takes any free port")
}

/// Listens, answers in the background until `shutdown`, and says where (port 0 is any free one).
///
/// # Errors
/// If the address is in use, not of this machine, or needs rights.
pub async fn serve(
    settings: &HttpSettings,
    health: Arc<Health>,
    metrics: PrometheusHandle,
    shutdown: watch::Receiver<bool>,
) -> Result<SocketAddr, HttpError> {
    let (listener, address) = bind(settings.listen).await?;
    tokio::spawn(upkeep(metrics.clone(), shutdown.clone()));
    let door = Arc::new(Connections::new(ConnectionBounds::of(settings)));
    let routes = routes(Arc::new(Site {
        health,
        metrics,
        door: Arc::clone(&door),
        scrapes: Arc::new(Semaphore::new(settings.scrapes_max)),
    }));
    tokio::spawn(Served::plain(door, routes).accept(listener, shutdown));
    Signal::HttpListening { address }.emit();
    Ok(address)
}

/// Takes an address, and says which it is where any port would do.
///
/// # Errors
/// If the address is in use, not of this machine, or needs rights.
pub(crate) async fn bind(listen: SocketAddr) -> Result<(TcpListener, SocketAddr), HttpError> {
    let refused = |error: std::io::Error| {
        let why = match error.kind() {
            std::io::ErrorKind::AddrInUse => "the address is in use".to_owned(),
            std::io::ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
            std::io::ErrorKind::PermissionDenied => "this user may not".to_owned(),
            _ => error.to_string(),
        };
        HttpError {
            message: format!("cannot listen for HTTP on {listen}: {why}"),
            hint: hint("http.listen", "SETTLED_HTTP__LISTEN"),
        }
    };
    let listener = TcpListener::bind(listen).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    Ok((listener, address))
}

async fn upkeep(metrics: PrometheusHandle, mut shutdown: watch::Receiver<bool>) {
    while sleep(UPKEEP, &mut shutdown).await == Waited::Over {
        metrics.run_upkeep();
    }
}

/// Says when readiness changes, in the log and as a metric, until the program stops.
pub(crate) async fn tell_readiness(health: Arc<Health>, mut shutdown: watch::Receiver<bool>) {
    let mut ready = false;
    loop {
        if health.is_ready() != ready {
            ready = !ready;
            if ready {
                Signal::Ready.emit();
            } else {
                Signal::NotReady {
                    reasons: &health.reasons(),
                }
                .emit();
            }
        }
        if sleep(READINESS, &mut shutdown).await == Waited::Stopping {
            return;
        }
    }
}

/// What the answers are made of.
struct Site {
    health: Arc<Health>,
    metrics: PrometheusHandle,
    door: Arc<Connections>,
    /// A place for each long answer that is made or sent.
    scrapes: Arc<Semaphore>,
}

fn routes(site: Arc<Site>) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(wrong_method)
        .fallback(not_found)
        .with_state(site)
}

async fn livez() -> Response {
    response(StatusCode::OK, TEXT, "ok\n")
}

async fn readyz(State(site): State<Arc<Site>>) -> Response {
    let readiness = site.health.readiness();
    let status = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    match serde_json::to_string(&readiness) {
        Ok(body) => response(status, "application/json", body),
        Err(_) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, ""),
    }
}

/// Long, and made of everything that was ever counted: a few at once, off the I/O threads.
async fn metrics(State(site): State<Arc<Site>>) -> Response {
    let scrapes = Arc::clone(&site.scrapes);
    let place = match Arc::clone(&scrapes).try_acquire_owned() {
        Ok(place) => Some(place),
        Err(_) => {
            site.door.shed_stalled();
            let waited = tokio::time::timeout(SCRAPE_WAIT, scrapes.acquire_owned()).await;
            waited.ok().and_then(Result::ok)
        }
    };
    let Some(place) = place else {
        let mut busy = response(
            StatusCode::SERVICE_UNAVAILABLE,
            TEXT,
            "too many scrapes at once (http.scrapes_max)\n",
        );
        busy.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        return busy;
    };
    let handle = site.metrics.clone();
    match tokio::task::spawn_blocking(move || handle.render()).await {
        Ok(text) => response(
            StatusCode::OK,
            "text/plain; version=0.0.4; charset=utf-8",
            Body::new(Pieces::of(text.into(), place)),
        ),
        Err(_) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, ""),
    }
}

async fn wrong_method() -> Response {
    let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
    refusal
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    refusal
}

async fn not_found() -> Response {
    response(
        StatusCode::NOT_FOUND,
        TEXT,
        "not found: there are /livez, /readyz and /metrics\n",
    )
}

fn response(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A long answer in pieces, with its place among those that are made or sent: the place is free once the last piece is handed
/// over, or nobody reads any more.
pub(crate) struct Pieces<P> {
    body: Body,
    rest: Bytes,
    _place: P,
}

impl<P> Pieces<P> {
    pub(crate) fn of(body: Body, place: P) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            _place: place,
        }
    }
}

impl<P: Unpin> HttpBody for Pieces<P> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match std::task::ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                ended => return Poll::Ready(ended),
            }
        }
        let piece = self.rest.len().min(PIECE);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = u64::try_from(self.rest.len()).unwrap_or(u64::MAX);
        match self.body.size_hint().exact() {
            Some(body) => SizeHint::with_exact(body.saturating_add(rest)),
            None => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests;

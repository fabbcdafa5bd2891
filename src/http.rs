//! `/livez`, `/readyz` and `/metrics`, for orchestrators and Prometheus. Everything has a bound: connections, header
//! bytes, the time to send a request and to read the answer.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::health::Health;
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
/// Time to finish an answer after that, and when the program stops.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Histograms collect every sample until they are folded; without a scrape nobody else does.
const UPKEEP: Duration = Duration::from_secs(5);

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
    let over = async {
        tokio::select! {
            () = tokio::time::sleep(CONNECTION_TIME) => (),
            () = stopped(&mut stopping) => (),
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => Ok(ended),
        () = over => {
            // What is being answered is finished, if the client reads it.
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(LAST_WORDS, connection).await
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::NO_CONSUMER;
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    struct Server {
        address: SocketAddr,
        health: Arc<Health>,
        stop: watch::Sender<bool>,
    }

    async fn start() -> Server {
        crate::telemetry::keep_call_sites_on();
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || metrics::counter!("settled_example_total").increment(7));
        let health = Arc::new(Health::new());
        let (stop, stopping) = watch::channel(false);
        let address = serve(
            ([127, 0, 0, 1], 0).into(),
            Arc::clone(&health),
            recorder.handle(),
            stopping,
        )
        .await
        .expect("a free port");
        assert_ne!(address.port(), 0);
        Server { address, health, stop }
    }

    /// Sends bytes as they are and reads until the server closes.
    async fn exchange(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        stream.write_all(request).await.expect("it reads");
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        tokio::time::timeout(Duration::from_secs(20), read)
            .await
            .expect("it answers")
            .ok();
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn ask(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let answer = exchange(address, request.as_bytes()).await;
        let status = answer
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .unwrap_or_default();
        (status, answer)
    }

    #[tokio::test]
    async fn paths_and_methods() {
        let server = start().await;
        for (method, path, status, part) in [
            ("GET", "/livez", 200, "\r\n\r\nok\n"),
            ("GET", "/livez?verbose", 200, "ok"),
            ("HEAD", "/livez", 200, "content-length: 3"),
            ("GET", "/metrics", 200, "settled_example_total 7"),
            ("GET", "/metrics", 200, "text/plain; version=0.0.4"),
            ("GET", "/readyz", 503, "application/json"),
            ("GET", "/", 404, "there are /livez, /readyz and /metrics"),
            ("GET", "/livez/", 404, "not found"),
            ("POST", "/livez", 405, "allow: GET, HEAD"),
            ("DELETE", "/metrics", 405, "only GET"),
            ("POST", "/nothing", 404, ""),
        ] {
            let (got, answer) = ask(server.address, method, path).await;
            assert_eq!(got, status, "{method} {path}: {answer}");
            assert!(answer.contains(part), "{method} {path}: {answer}");
        }
        let head = ask(server.address, "HEAD", "/livez").await.1;
        assert!(head.ends_with("\r\n\r\n"), "{head}");
    }

    #[tokio::test]
    async fn ready_is_a_consumer_and_a_database_and_no_pause() {
        let server = start().await;
        let health = &server.health;
        let ready = async || {
            let (status, answer) = ask(server.address, "GET", "/readyz").await;
            let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
            (status, serde_json::from_str::<serde_json::Value>(body).expect("JSON"))
        };
        let (status, body) = ready().await;
        assert_eq!((status, &body["ready"]), (503, &serde_json::Value::Bool(false)));
        assert_eq!(
            body["reasons"],
            serde_json::json!([NO_CONSUMER, "the database does not answer"])
        );

        health.set_database_ok(true);
        // One of a partner's own queue does not hide that nobody serves the rest.
        health.consumer_attached(false);
        let (status, body) = ready().await;
        assert_eq!((status, &body["reasons"]), (503, &serde_json::json!([NO_CONSUMER])));
        health.consumer_attached(true);
        let (status, body) = ready().await;
        assert_eq!(status, 200);
        assert_eq!(
            body,
            serde_json::json!({"ready": true, "consumersAttached": 2, "database": true, "paused": null, "reasons": []})
        );

        health.set_paused(Some("the broker is away".to_owned()));
        let (status, body) = ready().await;
        assert_eq!(
            (status, &body["reasons"]),
            (503, &serde_json::json!(["paused: the broker is away"]))
        );
        // Two lanes: one that resumes does not hide the other.
        health.set_paused(None);
        health.set_paused_by("lane 0", Some("the database is away".to_owned()));
        health.set_paused_by("lane 1", Some("the database is away".to_owned()));
        assert_eq!(health.paused().as_deref(), Some("the database is away"));
        health.set_paused_by("lane 1", None);
        assert_eq!(ready().await.0, 503);
        health.set_paused_by("lane 0", None);
        assert_eq!(ready().await.0, 200);
        health.consumer_gone(true);
        assert_eq!((health.consumers_attached(), ready().await.0), (1, 503));
        health.consumer_gone(false);
        health.consumer_gone(true);
        assert_eq!(health.consumers_attached(), 0);
        assert_eq!(ready().await.0, 503);
        health.consumer_attached(true);
        assert_eq!(ready().await.0, 200);
        assert_eq!(ask(server.address, "GET", "/livez").await.0, 200);
    }

    #[tokio::test]
    async fn an_address_in_use_is_one_clear_sentence() {
        let server = start().await;
        let handle = PrometheusBuilder::new().build_recorder().handle();
        let (_stop, stopping) = watch::channel(false);
        let error = serve(server.address, Arc::new(Health::new()), handle, stopping)
            .await
            .expect_err("in use");
        assert_eq!(
            error.message(),
            format!("cannot listen for HTTP on {}: the address is in use", server.address)
        );
        assert!(error.hint().contains("SETTLED_HTTP__LISTEN"));
    }

    #[tokio::test]
    async fn requests_are_bounded() {
        let server = start().await;
        let long = format!(
            "GET /livez HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
            "a".repeat(HEAD_MAX + 1)
        );
        let answer = exchange(server.address, long.as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
        let many = format!("GET /livez HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100));
        assert!(
            exchange(server.address, many.as_bytes())
                .await
                .starts_with("HTTP/1.1 431")
        );
        assert!(
            exchange(server.address, b"\x16\x03\x01 not HTTP\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 400")
        );
        assert_eq!(ask(server.address, "GET", "/livez").await.0, 200);
        // Half a request is closed by the server, here before `exchange` gives up.
        exchange(server.address, b"GET /livez HTT").await;
    }

    #[tokio::test]
    async fn it_lets_go_of_the_port_when_told_to_stop() {
        let server = start().await;
        // A connection that is kept alive does not hold it up.
        let mut idle = TcpStream::connect(server.address).await.expect("it listens");
        idle.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .expect("it reads");
        let mut first = [0; 15];
        idle.read_exact(&mut first).await.expect("it answers");
        server.stop.send(true).expect("it listens");
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(10), idle.read_to_end(&mut rest)).await;
        closed.expect("closed by the server").expect("in order");
        let gone = async {
            while TcpStream::connect(server.address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), gone)
            .await
            .expect("nobody listens");
    }
}

//! Over real sockets.

use super::{server::HEAD_MAX, *};
use crate::config::{Settings, Sources};
use crate::health::NO_CONSUMER;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

struct Server {
    address: SocketAddr,
    health: Arc<Health>,
    stop: watch::Sender<bool>,
}

fn settings() -> HttpSettings {
    let sources = Sources {
        file: None,
        environment: std::iter::empty(),
        flags: Vec::new(),
    };
    let settings = Settings::load(sources).expect("the defaults").http;
    HttpSettings {
        listen: ([127, 0, 0, 1], 0).into(),
        ..settings
    }
}

async fn start() -> Server {
    start_with(settings()).await
}

async fn start_with(settings: HttpSettings) -> Server {
    crate::telemetry::keep_call_sites_on();
    let recorder = PrometheusBuilder::new().build_recorder();
    ::metrics::with_local_recorder(&recorder, || ::metrics::counter!("settled_example_total").increment(7));
    serve_with(settings, &recorder).await
}

async fn serve_with(settings: HttpSettings, recorder: &PrometheusRecorder) -> Server {
    let health = Arc::new(Health::new());
    let (stop, stopping) = watch::channel(false);
    let address = serve(&settings, Arc::clone(&health), recorder.handle(), stopping)
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
    let taken = HttpSettings {
        listen: server.address,
        ..settings()
    };
    let error = serve(&taken, Arc::new(Health::new()), handle, stopping)
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

// Many, slow and odd ones -------------------------------------------------------------------------------------------------

/// What an orchestrator waits for an answer.
const AT_ONCE: Duration = Duration::from_millis(100);

/// How long one probe takes, from its connection to its whole answer.
async fn probe(address: SocketAddr, path: &str, status: u16) -> Duration {
    let began = std::time::Instant::now();
    let (got, answer) = ask(address, "GET", path).await;
    assert_eq!(got, status, "{path}: {answer:?}");
    began.elapsed()
}

/// Both probes, several times. One that is late only because the machine is busy is early the next time.
async fn probes_are_answered(address: SocketAddr) {
    for (path, status) in [("/livez", 200), ("/readyz", 503)] {
        let mut quickest = Duration::MAX;
        for _ in 0..10 {
            quickest = quickest.min(probe(address, path, status).await);
        }
        assert!(quickest < AT_ONCE, "{path}: {quickest:?} at best");
    }
}

/// Connections that sent these bytes and no more.
async fn crowd(address: SocketAddr, from: [u8; 4], count: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let mut crowd = Vec::new();
    for _ in 0..count {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind((from, 0).into()).expect("an address of this machine");
        let mut stream = socket.connect(address).await.expect("it listens");
        // One that was closed for another by now takes nothing.
        drop(stream.write_all(bytes).await);
        crowd.push(stream);
    }
    crowd
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_house_keeps_no_probe_out() {
    for (what, bytes) in [
        ("idle", ""),
        ("half a request line", "GET /livez HT"),
        ("half a head", "GET /livez HTTP/1.1\r\nHost: x\r\nX: "),
        (
            "a body that never comes",
            "POST /livez HTTP/1.1\r\nContent-Length: 100000\r\n\r\nx",
        ),
        ("answered and idle", "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("answered and half a head", "GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET "),
    ] {
        let server = start().await;
        let held = crowd(server.address, [127, 0, 0, 1], 400, bytes.as_bytes()).await;
        probes_are_answered(server.address).await;
        // And when they come from everywhere.
        let mut more = Vec::new();
        for last in 2..8 {
            more.extend(crowd(server.address, [127, 0, 0, last], 100, bytes.as_bytes()).await);
        }
        probes_are_answered(server.address).await;
        assert_eq!(held.len() + more.len(), 1_000, "{what}");
    }
}

/// Says when the server has closed a connection.
async fn closed(stream: &mut TcpStream) -> Duration {
    let began = std::time::Instant::now();
    let mut rest = Vec::new();
    let read = stream.read_to_end(&mut rest);
    // In order or by a reset: it is closed.
    drop(
        tokio::time::timeout(Duration::from_secs(20), read)
            .await
            .expect("closed"),
    );
    began.elapsed()
}

#[tokio::test]
async fn the_one_that_waits_longest_goes_first() {
    let server = start_with(HttpSettings {
        connections_max: 12,
        connections_per_address_max: 8,
        ..settings()
    })
    .await;
    // A neighbour's is not closed for the many of another.
    let mut neighbour = crowd(server.address, [127, 0, 0, 9], 1, b"").await;
    let mut many = crowd(server.address, [127, 0, 0, 1], 8, b"").await;
    let ninth = crowd(server.address, [127, 0, 0, 1], 1, b"").await;
    closed(&mut many[0]).await;
    // The house is full: of those with the most, again the first.
    let others = crowd(server.address, [127, 0, 0, 2], 3, b"").await;
    let thirteenth = crowd(server.address, [127, 0, 0, 3], 1, b"").await;
    closed(&mut many[1]).await;
    neighbour.extend(ninth.into_iter().chain(thirteenth).chain(many.into_iter().skip(2)));
    for stream in &mut neighbour {
        stream
            .write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .expect("it is open");
        let mut first = [0; 15];
        stream.read_exact(&mut first).await.expect("it answers");
        assert_eq!(&first, b"HTTP/1.1 200 OK");
    }
    assert_eq!(others.len(), 3);
}

#[tokio::test]
async fn time_has_a_bound_for_each_step() {
    let server = start_with(HttpSettings {
        head_timeout: Duration::from_millis(300),
        idle_timeout: Duration::from_millis(900),
        ..settings()
    })
    .await;
    // Nothing is sent, or a byte now and then.
    let mut silent = TcpStream::connect(server.address).await.expect("it listens");
    let (mut silent_for, mut dripping) = (Duration::ZERO, Duration::ZERO);
    tokio::join!(async { silent_for = closed(&mut silent).await }, async {
        let began = std::time::Instant::now();
        let mut stream = TcpStream::connect(server.address).await.expect("it listens");
        for byte in b"GET /livez HTTP/1.1\r\nHost: x".iter().cycle() {
            if stream.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        dripping = began.elapsed();
    });
    for time in [silent_for, dripping] {
        assert!(time >= Duration::from_millis(250), "{time:?}");
    }
    // What is asked again in time is answered on the same connection; then it is idle for too long.
    let mut kept = TcpStream::connect(server.address).await.expect("it listens");
    for _ in 0..3 {
        kept.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .expect("it reads");
        let mut answer = vec![0; 512];
        let read = kept.read(&mut answer).await.expect("it answers");
        assert!(answer[..read].ends_with(b"ok\n"));
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    let idle = closed(&mut kept).await;
    assert!(idle >= Duration::from_millis(350), "{idle:?}");
}

/// Metrics of many megabytes.
fn long_metrics() -> PrometheusRecorder {
    let recorder = PrometheusBuilder::new().build_recorder();
    ::metrics::with_local_recorder(&recorder, || {
        for number in 0..40_000 {
            let long = format!("{number:0200}");
            ::metrics::counter!("settled_example_total", "long" => long).increment(1);
        }
    });
    recorder
}

const SCRAPE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_keeps_nobody_waiting() {
    crate::telemetry::keep_call_sites_on();
    let server = serve_with(settings(), &long_metrics()).await;
    let held = crowd(server.address, [127, 0, 0, 1], 40, SCRAPE).await;
    probes_are_answered(server.address).await;
    // A scrape that is read has its turn: it may be told to come again while the stalled ones make room.
    let mut answer = (503, String::new());
    for _ in 0..60 {
        answer = ask(server.address, "GET", "/metrics").await;
        if answer.0 == 200 {
            break;
        }
    }
    let (head, body) = answer.1.split_once("\r\n\r\n").expect("a whole answer");
    assert!(body.len() > 8_000_000 && body.ends_with('\n'), "{} bytes", body.len());
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    assert_eq!(length, Some(body.len().to_string().as_str()));
    assert_eq!(held.len(), 40);
}

#[tokio::test]
async fn odd_clients_are_answered() {
    let server = start().await;
    let whole = |answer: &str| (answer.matches("HTTP/1.").count(), answer.matches("ok\n").count());
    // One behind the other, in one piece.
    let twice = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert_eq!(whole(&exchange(server.address, twice.as_bytes()).await), (2, 2));
    // The old version closes by itself, and needs no host.
    assert_eq!(
        whole(&exchange(server.address, b"GET /livez HTTP/1.0\r\n\r\n").await),
        (1, 1)
    );
    // A body that nobody asked for, and that never ends.
    for method in ["GET", "POST", "PUT"] {
        let head = format!("{method} /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\nabc");
        let answer = exchange(server.address, head.as_bytes()).await;
        let status = if method == "GET" { "200" } else { "405" };
        assert_eq!(answer.split(' ').nth(1), Some(status), "{answer}");
    }
    // Who closes its side behind the request still gets its answer.
    let mut half = TcpStream::connect(server.address).await.expect("it listens");
    half.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .expect("it reads");
    half.shutdown().await.expect("half closed");
    let mut answer = String::new();
    half.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.contains("settled_example_total 7"), "{answer}");
    // Names in full, and methods and versions that nobody knows.
    for (line, status) in [
        ("GET http://x/livez HTTP/1.1", "200"),
        ("BREW /livez HTTP/1.1", "405"),
        ("OPTIONS * HTTP/1.1", "404"),
        ("GET //livez HTTP/1.1", "404"),
        ("GET /livez%00 HTTP/1.1", "404"),
        ("GET /LIVEZ HTTP/1.1", "404"),
    ] {
        let request = format!("{line}\r\nHost: x\r\nConnection: close\r\n\r\n");
        let answer = exchange(server.address, request.as_bytes()).await;
        assert_eq!(answer.split(' ').nth(1), Some(status), "{line}: {answer}");
    }
    // Connections that are reset in the middle.
    for bytes in [&b""[..], b"GET /li", SCRAPE] {
        for stream in crowd(server.address, [127, 0, 0, 1], 50, bytes).await {
            stream.set_zero_linger().expect("a socket");
        }
    }
    probes_are_answered(server.address).await;
}

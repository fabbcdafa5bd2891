//! A virtual host for each test, a proxy that freezes or cuts connections, and a publisher that says what lapin will not.

use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{BrokerSettings, Connection};
use crate::config::Secret;
use crate::domain::delivery::{Delivery, Properties, Publication, PublicationKind, Source};

fn required(name: &str) -> String {
    match std::env::var(name) {
        Ok(value) => value,
        Err(_) => panic!("{name} is not set: these tests need a broker, run them with `make test`"),
    }
}

/// A virtual host that is gone when the test is.
pub(super) struct Vhost {
    pub(super) name: String,
    management: String,
    authorization: String,
    scheme: String,
    user: String,
    address: String,
}

/// Settings of a broker anywhere.
pub(super) fn settings_of(url: &str) -> BrokerSettings {
    BrokerSettings {
        url: Secret::new(url),
        files: crate::tls::ClientFiles::default(),
        heartbeat: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(2),
        publish_deadline: Duration::from_secs(2),
        next_host_after: Duration::from_millis(500),
        allow_plaintext: false,
        memory: super::hosts::Memory::default(),
    }
}

/// Whom a test's client trusts.
pub(super) fn trusting(authority: &std::path::Path) -> crate::tls::ClientFiles {
    crate::tls::ClientFiles {
        section: "broker",
        ca_file: Some(authority.to_owned()),
        ..crate::tls::ClientFiles::default()
    }
}

impl Vhost {
    pub(super) fn new() -> Self {
        let vhost = Vhost::existing(format!("broker-{}", Uuid::new_v4()));
        vhost.put(&format!("vhosts/{}", vhost.name), &json!({}));
        let (name, _) = vhost.user.split_once(':').expect("a password");
        vhost.permit(name, ".*", ".*", ".*");
        vhost
    }

    /// One that another process made.
    pub(super) fn existing(name: String) -> Self {
        let management = required("SETTLED_BROKER_MANAGEMENT_URL");
        let (scheme, rest) = management.split_once("://").expect("a URL");
        let (user, host) = rest.rsplit_once('@').expect("a user in the management URL");
        let broker = required("SETTLED_BROKER_URL");
        let (broker_scheme, rest) = broker.split_once("://").expect("a URL");
        let address = rest
            .rsplit_once('@')
            .expect("a user in the broker URL")
            .1
            .split('/')
            .next()
            .expect("a host");
        Vhost {
            name,
            management: format!("{scheme}://{}", host.trim_end_matches('/')),
            authorization: format!("Basic {}", base64(user.as_bytes())),
            scheme: broker_scheme.to_owned(),
            user: user.to_owned(),
            address: address.to_owned(),
        }
    }

    pub(super) fn put(&self, path: &str, body: &Value) {
        ureq::put(format!("{}/api/{path}", self.management))
            .header("authorization", &self.authorization)
            .header("content-type", "application/json")
            .send(body.to_string())
            .expect("the management API answers");
    }

    pub(super) fn permit(&self, user: &str, configure: &str, write: &str, read: &str) {
        let permissions = json!({"configure": configure, "write": write, "read": read});
        self.put(&format!("permissions/{}/{user}", self.name), &permissions);
    }

    fn delete(&self, path: &str) {
        let gone = ureq::delete(format!("{}/api/{path}", self.management))
            .header("authorization", &self.authorization)
            .call();
        drop(gone);
    }

    /// As a user of its own, who has these permissions only.
    pub(super) fn as_user(&self, configure: &str, write: &str, read: &str) -> BrokerSettings {
        let user = format!("user-{}", Uuid::new_v4());
        self.put(&format!("users/{user}"), &json!({"password": "secret", "tags": ""}));
        self.permit(&user, configure, write, read);
        self.settings_at(&self.address, &format!("{user}:secret"))
    }

    pub(super) fn forget_user(&self, settings: &BrokerSettings) {
        let user = settings.url.expose().split(&['/', ':'][..]).nth(3).expect("a user");
        self.delete(&format!("users/{user}"));
    }

    pub(super) fn settings(&self) -> BrokerSettings {
        self.settings_at(&self.address, &self.user)
    }

    pub(super) fn settings_at(&self, address: &str, user: &str) -> BrokerSettings {
        BrokerSettings {
            connect_timeout: Duration::from_secs(10),
            publish_deadline: Duration::from_secs(10),
            allow_plaintext: true,
            ..settings_of(&format!("{}://{user}@{address}/{}", self.scheme, self.name))
        }
    }

    pub(super) async fn connect(&self) -> Connection {
        Connection::open(&self.settings(), "settled test")
            .await
            .expect("the broker answers")
    }

    /// A proxy to the broker, and settings that lead through it.
    pub(super) fn proxied(&self) -> (Proxy, BrokerSettings) {
        let proxy = Proxy::start(&self.address);
        let settings = self.settings_at(&format!("127.0.0.1:{}", proxy.port), &self.user);
        (proxy, settings)
    }

    pub(super) fn raw(&self) -> Raw {
        Raw::connect(&self.address, &self.user, &self.name)
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        self.delete(&format!("vhosts/{}", self.name));
    }
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for index in 0..4 {
            let sextet = (bits >> (18 - 6 * index)) & 63;
            text.push(if index <= chunk.len() {
                char::from(ALPHABET[sextet as usize])
            } else {
                '='
            });
        }
    }
    text
}

/// Waits for a condition, with a deadline.
pub(super) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut condition: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Fails rather than hangs.
pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("done within 30 s")
}

/// A queue with arguments of the test's choosing.
pub(super) async fn queue(connection: &Connection, name: &str, arguments: &[(&str, AMQPValue)]) {
    let channel = connection.channel().await.expect("a channel");
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    let options = QueueDeclareOptions {
        passive: false,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    };
    channel
        .queue_declare(name.into(), options, table)
        .await
        .expect("a queue");
    channel.close(200, "done".into()).await.expect("closed");
}

pub(super) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// A quorum queue with a dead-letter queue `<name>.dead` behind it.
pub(super) async fn quorum_queue(connection: &Connection, name: &str, delivery_limit: i32) {
    let dead = format!("{name}.dead");
    queue(connection, &dead, &[("x-queue-type", text("quorum"))]).await;
    queue(
        connection,
        name,
        &[
            ("x-queue-type", text("quorum")),
            ("x-delivery-limit", AMQPValue::LongInt(delivery_limit)),
            ("x-dead-letter-exchange", text("")),
            ("x-dead-letter-routing-key", text(&dead)),
            ("x-dead-letter-strategy", text("at-least-once")),
            ("x-overflow", text("reject-publish")),
        ],
    )
    .await;
}

pub(super) async fn delete_queue(connection: &Connection, name: &str) {
    let channel = connection.channel().await.expect("a channel");
    let options = QueueDeleteOptions {
        if_unused: false,
        if_empty: false,
        nowait: false,
    };
    channel.queue_delete(name.into(), options).await.expect("deleted");
}

/// Messages ready in a queue.
pub(super) async fn ready(connection: &Connection, name: &str) -> u32 {
    let channel = connection.channel().await.expect("a channel");
    let options = QueueDeclareOptions {
        passive: true,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    };
    let count = channel
        .queue_declare(name.into(), options, FieldTable::default())
        .await
        .expect("a queue");
    channel.close(200, "done".into()).await.expect("closed");
    count.message_count()
}

/// An event with a body of its own.
pub(super) fn event(exchange: &str, routing_key: &str, body: &str) -> Publication {
    Publication {
        kind: PublicationKind::Event,
        exchange: exchange.to_owned(),
        routing_key: routing_key.to_owned(),
        properties: Properties {
            message_id: Some(body.to_owned()),
            delivery_mode: Some(2),
            ..Properties::default()
        },
        body: body.as_bytes().to_vec(),
    }
}

/// The channel's delivery tag.
pub(super) fn tag(delivery: &Delivery) -> u64 {
    match delivery.source {
        Source::Queue { delivery_tag } => delivery_tag,
        Source::Parked { .. } | Source::Replayed { .. } | Source::Held { .. } | Source::Plain => {
            panic!("not from a queue")
        }
    }
}

/// Bodies in order.
pub(super) fn numbered(range: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    range.map(|index| format!("{index:04}"))
}

/// A TCP proxy that can freeze, cut and put words into the broker's mouth.
pub(super) struct Proxy {
    pub(super) port: u16,
    frozen: Arc<AtomicBool>,
    /// What comes from the broker with these bytes in it ends its connection, each time.
    strike: Arc<Mutex<Option<&'static [u8]>>>,
    clients: Arc<Mutex<Vec<TcpStream>>>,
    /// Connections that their client has ended.
    pub(super) ended: Arc<AtomicUsize>,
}

impl Proxy {
    fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let proxy = Proxy {
            port,
            frozen: Arc::default(),
            strike: Arc::default(),
            clients: Arc::default(),
            ended: Arc::default(),
        };
        let strike = Arc::clone(&proxy.strike);
        let (frozen, clients, ended) = (
            Arc::clone(&proxy.frozen),
            Arc::clone(&proxy.clients),
            Arc::clone(&proxy.ended),
        );
        let upstream = upstream.to_owned();
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let server = TcpStream::connect(&upstream).expect("the broker");
                clients
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(client.try_clone().expect("a handle"));
                let (client_too, server_too) = (
                    client.try_clone().expect("a handle"),
                    server.try_clone().expect("a handle"),
                );
                let (frozen_too, ended) = (Arc::clone(&frozen), Arc::clone(&ended));
                thread::spawn(move || {
                    pump(client_too, server_too, &frozen_too, &Mutex::default());
                    ended.fetch_add(1, Ordering::SeqCst);
                });
                let (frozen, strike) = (Arc::clone(&frozen), Arc::clone(&strike));
                thread::spawn(move || pump(server, client, &frozen, &strike));
            }
        });
        proxy
    }

    pub(super) fn strike(&self, mark: &'static [u8]) {
        *self.strike.lock().unwrap_or_else(PoisonError::into_inner) = Some(mark);
    }

    pub(super) fn freeze(&self) {
        self.frozen.store(true, Ordering::SeqCst);
    }

    pub(super) fn cut(&self) {
        for client in self.clients.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            drop(client.shutdown(Shutdown::Both));
        }
    }

    /// Tells the newest client that a resource alarm blocks it.
    pub(super) fn block(&self) {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let mut client = clients.last().expect("a client");
        let mut arguments = Vec::new();
        short(&mut arguments, b"low on memory");
        client.write_all(&method(0, 10, 60, &arguments)).expect("written");
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, frozen: &AtomicBool, strike: &Mutex<Option<&'static [u8]>>) {
    let mut buffer = [0; 65_536];
    while let Ok(read) = from.read(&mut buffer) {
        while frozen.load(Ordering::SeqCst) {
            if read == 0 {
                break;
            }
            thread::sleep(Duration::from_millis(5));
            // The client may give up meanwhile.
            if from.peek(&mut [0]).is_ok_and(|peeked| peeked == 0) {
                break;
            }
        }
        let mark = *strike.lock().unwrap_or_else(PoisonError::into_inner);
        if mark.is_some_and(|mark| buffer[..read].windows(mark.len()).any(|window| window == mark)) {
            break;
        }
        if read == 0 || to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    drop(to.shutdown(Shutdown::Both));
    drop(from.shutdown(Shutdown::Both));
}

/// AMQP by hand: publishes properties that no honest client would write.
pub(super) struct Raw {
    stream: TcpStream,
}

/// What the client library does not take for a short string: it answers with an error.
pub(super) const UNDECODABLE: &[u8] = b"\xff\xfe";

pub(super) fn short(to: &mut Vec<u8>, value: &[u8]) {
    to.push(u8::try_from(value.len()).expect("at most 255"));
    to.extend(value);
}

fn long(to: &mut Vec<u8>, value: &[u8]) {
    to.extend(u32::try_from(value.len()).expect("short enough").to_be_bytes());
    to.extend(value);
}

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind];
    frame.extend(channel.to_be_bytes());
    long(&mut frame, payload);
    frame.push(0xce);
    frame
}

fn method(channel: u16, class: u16, method: u16, arguments: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend(class.to_be_bytes());
    payload.extend(method.to_be_bytes());
    payload.extend(arguments);
    frame(1, channel, &payload)
}

impl Raw {
    fn connect(address: &str, user: &str, vhost: &str) -> Self {
        let mut raw = Raw {
            stream: TcpStream::connect(address).expect("the broker"),
        };
        raw.stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
        raw.send(b"AMQP\x00\x00\x09\x01");
        raw.expect(10, 10);
        let (name, password) = user.split_once(':').expect("a password");
        let mut start = 0_u32.to_be_bytes().to_vec();
        short(&mut start, b"PLAIN");
        long(&mut start, format!("\0{name}\0{password}").as_bytes());
        short(&mut start, b"en_US");
        raw.send(&method(0, 10, 11, &start));
        let tune = raw.expect(10, 30);
        raw.send(&method(0, 10, 31, &[&tune[..6], &[0, 0]].concat()));
        let mut open = Vec::new();
        short(&mut open, vhost.as_bytes());
        open.extend([0, 0]);
        raw.send(&method(0, 10, 40, &open));
        raw.expect(10, 41);
        raw.send(&method(1, 20, 10, &[0]));
        raw.expect(20, 11);
        raw.send(&method(1, 85, 10, &[0]));
        raw.expect(85, 11);
        raw
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("written");
    }

    /// Reads the next method, which must be this one, and returns its arguments.
    fn expect(&mut self, class: u16, method: u16) -> Vec<u8> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head).expect("a frame");
        let mut payload = vec![0; u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize + 1];
        self.stream.read_exact(&mut payload).expect("its payload");
        let got = (
            u16::from_be_bytes([payload[0], payload[1]]),
            u16::from_be_bytes([payload[2], payload[3]]),
        );
        assert_eq!(got, (class, method), "{}", String::from_utf8_lossy(&payload));
        payload.split_off(4)
    }

    /// Publishes with property flags and property bytes as they are, and awaits the confirm.
    pub(super) fn publish(
        &mut self,
        exchange: &str,
        key: impl AsRef<[u8]>,
        flags: u16,
        properties: &[u8],
        body: &[u8],
    ) {
        let mut publish = vec![0, 0];
        short(&mut publish, exchange.as_bytes());
        short(&mut publish, key.as_ref());
        publish.push(0);
        let mut header = vec![0, 60, 0, 0];
        header.extend((body.len() as u64).to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(properties);
        let frames = [method(1, 60, 40, &publish), frame(2, 1, &header), frame(3, 1, body)].concat();
        self.send(&frames);
        self.expect(60, 80);
    }
}

/// Publishes one message as partners do.
pub(super) async fn publish(connection: &Connection, publication: &Publication) {
    let mut publisher = super::publisher::Publisher::open(connection)
        .await
        .expect("a publisher");
    let fates = publisher
        .publish(std::slice::from_ref(publication))
        .await
        .expect("published");
    assert_eq!(fates, [super::publisher::BrokerAnswer::Confirmed]);
}

/// A made-up authority, valid for a century; its key was thrown away.
pub(super) const AUTHORITY: &str = "-----BEGIN CERTIFICATE-----
MIIBqDCCAU+gAwIBAgIUQhxbk2liuPiLH96Xqkha60YWkQEwCgYIKoZIzj0EAwIw
ITEfMB0GA1UEAwwWc2V0dGxlZCB0ZXN0IGF1dGhvcml0eTAgFw0yNjExMjAwNzQ2
MTZaGA8yMTI2MTAyNzA3NDYxNlowITEfMB0GA1UEAwwWc2V0dGxlZCB0ZXN0IGF1
dGhvcml0eTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABN6sHZHB+vpfCbSIaiFv
8KCom9LgVY8R/3zbRFtRiaxKq0c/tMYSx6acAzwNlMBiMSqQodIasDnLbum+xNBM
hAijYzBhMB0GA1UdDgQWBBR3oi/1SykZuYxCw2CguOD8xeYdljAfBgNVHSMEGDAW
gBR3oi/1SykZuYxCw2CguOD8xeYdljAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB
/wQEAwICBDAKBggqhkjOPQQDAgNHADBEAiAtM46dsjkZvTxNz4Rc4wr4xRzqU2Mx
B0DDouzWMRnNfgIgLkILSy/+y1B0LsusOuO1LIRAAymtLH/zv9YWRkewVcU=
-----END CERTIFICATE-----";

/// What it made out to localhost and 127.0.0.1.
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----
MIIBuDCCAV2gAwIBAgIURdtC3rByk3QjzAVN1/ZXgbNaFB0wCgYIKoZIzj0EAwIw
ITEfMB0GA1UEAwwWc2V0dGxlZCB0ZXN0IGF1dGhvcml0eTAgFw0yNjExMjAwNzQ2
MTZaGA8yMTI2MTAyNzA3NDYxNlowFDESMBAGA1UEAwwJbG9jYWxob3N0MFkwEwYH
KoZIzj0CAQYIKoZIzj0DAQcDQgAEj1XdKe8t0VBiCGXTvHE43NqViMI/LnUY3P1F
Am72rHjhhFzk1ZKwg1nEh7kRn9vwG++9pjYhngZsz97LwWqKi6N+MHwwGgYDVR0R
BBMwEYIJbG9jYWxob3N0hwR/AAABMAkGA1UdEwQCMAAwEwYDVR0lBAwwCgYIKwYB
BQUHAwEwHQYDVR0OBBYEFFLzb+IVmRLQzQZVLOfn0Vc4a6fGMB8GA1UdIwQYMBaA
FHeiL/VLKRm5jELDYKC44PzF5h2WMAoGCCqGSM49BAMCA0kAMEYCIQDrxfO1Xpqm
w4ijbSkkDyhIVBcS/+nxez487aHIt1iJ1gIhAMOXpF3cP7lxrNMh3SB3nwGGqCZz
gatJnneYdlo/3BNd
-----END CERTIFICATE-----";
const KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgx03NO2PTszNtTin3
8ZvyqYYSFA7GGoJfQEkLYMsdDkOhRANCAASPVd0p7y3RUGIIZdO8cTjc2pWIwj8u
dRjc/UUCbvaseOGEXOTVkrCDWcSHuRGf2/Ab772mNiGeBmzP3svBaoqL
-----END PRIVATE KEY-----";

/// The broker behind TLS; returns the port.
pub(super) fn tls_front(vhost: &Vhost) -> u16 {
    let certificate = CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).expect("a certificate");
    let key = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).expect("a key");
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .expect("a server configuration");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let upstream = vhost.address.clone();
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let session = rustls::ServerConnection::new(Arc::clone(&config)).expect("a session");
            let server = TcpStream::connect(&upstream).expect("the broker");
            thread::spawn(move || terminate(rustls::StreamOwned::new(session, client), server));
        }
    });
    port
}

fn terminate(mut client: rustls::StreamOwned<rustls::ServerConnection, TcpStream>, mut server: TcpStream) {
    let wait = Some(Duration::from_millis(2));
    client.sock.set_read_timeout(wait).expect("set");
    server.set_read_timeout(wait).expect("set");
    let mut buffer = [0; 16_384];
    loop {
        match client.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => server.write_all(&buffer[..read]).expect("written"),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
        match server.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) if client.write_all(&buffer[..read]).is_err() => return,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

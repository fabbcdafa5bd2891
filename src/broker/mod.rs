//! The broker: connections, topology, taking messages in and publishing them. The only room with lapin; what crosses
//! its door are the values of [`crate::domain::delivery`].
//!
//! Consume and publish on two [`Connection`]s: under a memory or disk alarm the broker stops reading from a connection
//! that publishes, and acknowledgements would stop with it.

pub mod intake;
pub mod management;
pub mod own_queue;
pub mod publisher;
pub mod rights;
mod settings;
mod sieve;
pub mod subscribe;
#[cfg(test)]
mod testing;
pub mod topology;

use std::future::{Future, poll_fn};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::{MaybeDone, maybe_done};
use lapin::protocol::{AMQPErrorKind, AMQPHardError};
use lapin::tcp::{AsyncTcpStream, RustlsConnector};
use lapin::types::AMQPValue;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{ConnectionProperties, ErrorKind};

use crate::broker::sieve::{Apart, Sieve, Sieving};
use crate::fail::Injected;
use crate::tls;

/// How long one question to the broker (declare, bind, consume, acknowledge, close) may take. A healthy broker needs
/// milliseconds; a frozen one is noticed after twice the heartbeat.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// An environment variable that a consuming process must be started with, and its value: the stack of each thread, which
/// lapin gives us no other way to choose. lapin parses header tables by recursion, on a thread of its own: with this the
/// deepest that a frame can hold passes, and only what is used is ever paid for.
pub const STACK: (&str, &str) = ("RUST_MIN_STACK", "134217728");

/// The largest frame of a connection that consumes nothing. lapin keeps room for 32 frames each way, all of it resident: 8 MB
/// where frames are as large as the broker lets them be (131,072 bytes), 2 MB here. The largest frame that can not be cut is
/// the header of a dead letter: 16,384 bytes of its sender's and some hundred of ours.
const SMALL_FRAME_MAX: u32 = 32_768;

/// Where the broker is and how to speak with it.
#[derive(Clone)]
pub struct BrokerSettings {
    /// `amqp://` or `amqps://`, with the password.
    pub url: String,
    /// A PEM file of the certificate authorities to trust for `amqps://`, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// A silent broker is given up after twice this.
    pub heartbeat: Duration,
    /// TCP, TLS and AMQP handshake together.
    pub connect_timeout: Duration,
    /// All publishes of one call, confirms included.
    pub publish_deadline: Duration,
    /// Accept `amqp://` to another machine.
    pub allow_plaintext: bool,
}

impl std::fmt::Debug for BrokerSettings {
    /// The password stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BrokerSettings")
            .field("url", &redacted(&self.url))
            .field("ca_file", &self.ca_file)
            .field("heartbeat", &self.heartbeat)
            .field("connect_timeout", &self.connect_timeout)
            .field("publish_deadline", &self.publish_deadline)
            .field("allow_plaintext", &self.allow_plaintext)
            .finish()
    }
}

/// The URL without what stands before the last `@` of its authority, user name included.
fn redacted(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let authority = authority_of(rest);
            match authority.rsplit_once('@') {
                Some((_, host)) => format!("{scheme}://***@{host}{}", &rest[authority.len()..]),
                None => url.to_owned(),
            }
        }
        None => "***".to_owned(),
    }
}

fn authority_of(rest: &str) -> &str {
    &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())]
}

/// What went wrong with the broker. The sentence holds no password and no body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// Connection lost, refused or timed out: try again later, on a new connection.
    #[error("{}", away(.0))]
    Away(String),
    /// The broker understood and said no.
    #[error("the broker refused with {code}: {text}")]
    Refused {
        /// AMQP reply code: 403 access refused, 404 not found, 405 locked, 406 precondition failed, 530 no such virtual
        /// host; 501 and 502 are our own, for a message that no AMQP frame can carry.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// A setting must change before trying again makes sense.
    #[error("{0}")]
    Config(String),
}

/// How an error begins that is no silence: both are there and do not come to terms.
const NO_TLS: &str = "TLS with the broker can not be agreed on";

fn away(text: &str) -> String {
    if text.starts_with(NO_TLS) {
        return text.to_owned();
    }
    format!("the broker is away: {text}")
}

/// What an injected error stands for: the connection broke.
impl From<Injected> for BrokerError {
    fn from(_: Injected) -> Self {
        BrokerError::Away("the connection broke, as a test asked for".to_owned())
    }
}

impl BrokerError {
    /// By lapin's codes, never by its text.
    fn from_lapin(error: &lapin::Error) -> Self {
        let ErrorKind::ProtocolError(amqp) = error.kind() else {
            return BrokerError::Away(match is_of_tls(error) {
                true => format!("{NO_TLS}: {error}"),
                false => error.to_string(),
            });
        };
        match amqp.kind() {
            // NOT_ALLOWED is how RabbitMQ answers to an unknown virtual host: waiting does not cure it.
            AMQPErrorKind::Soft(_) | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => BrokerError::Refused {
                code: amqp.get_id(),
                text: amqp.get_message().to_string(),
            },
            AMQPErrorKind::Hard(_) => BrokerError::Away(error.to_string()),
        }
    }

    /// What keeps us from the broker, in a sentence without a word of the broker's own.
    pub fn trouble(&self) -> &'static str {
        match self {
            BrokerError::Away(text) if text.starts_with(NO_TLS) => NO_TLS,
            BrokerError::Away(_) => "the broker does not answer",
            BrokerError::Refused { code: 403, .. } => "the broker refuses our login, or a right is missing",
            BrokerError::Refused { code: 530, .. } => {
                "the broker has no such virtual host, or does not let this user into it"
            }
            BrokerError::Refused { .. } => "the broker refuses what it is asked",
            BrokerError::Config(_) => "a setting of the broker is wrong",
        }
    }

    /// A refusal of the whole connection. The broker's words about a virtual host repeat its name and the user's, which are
    /// parts of the URL; and of a URL that was written wrong they may be parts of the password.
    fn of_the_door(self) -> Self {
        match self {
            BrokerError::Refused { code: 530, .. } => BrokerError::Refused {
                code: 530,
                text:
                    "NOT_ALLOWED: the virtual host was not found, is not open to this user, or has reached its limit \
                       of connections"
                        .to_owned(),
            },
            BrokerError::Away(_) | BrokerError::Refused { .. } | BrokerError::Config(_) => self,
        }
    }

    /// The reply code of a refusal.
    pub fn code(&self) -> Option<u16> {
        match self {
            BrokerError::Refused { code, .. } => Some(*code),
            BrokerError::Away(_) | BrokerError::Config(_) => None,
        }
    }
}

impl BrokerError {
    /// Whether one publication is the cause. Every other refusal (no exchange, no permission, no room for a connection) is
    /// somebody's setting: it passes, and nothing may be set aside for it.
    pub fn is_of_the_message(&self) -> bool {
        // Precondition failed, and our own two: a frame too large, a name too long.
        matches!(self.code(), Some(406 | 501 | 502))
    }
}

/// Whether TLS is what failed.
fn is_of_tls(error: &lapin::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = cause {
        let inner = match one.downcast_ref::<Arc<std::io::Error>>() {
            Some(io) => io.get_ref(),
            None => one.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref),
        };
        if one.is::<rustls::Error>() || inner.is_some_and(|inner| inner.is::<rustls::Error>()) {
            return true;
        }
        cause = one.source();
    }
    false
}

impl BrokerSettings {
    fn uri(&self) -> Result<AMQPUri, BrokerError> {
        // lapin's own complaint may repeat the URL, and with it the password.
        let mut uri = self.url.parse::<AMQPUri>().map_err(|_| {
            BrokerError::Config(
                "broker.url is not an AMQP URL: write amqps://user:password@host:port/virtual-host".to_owned(),
            )
        })?;
        // amq-protocol-uri 10.6 reads an IPv6 address as "no host" and would go to localhost instead.
        if let Some((_, rest)) = self.url.split_once("://") {
            let authority = authority_of(rest);
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            if let Some((address, _)) = host.strip_prefix('[').and_then(|host| host.split_once(']')) {
                address.clone_into(&mut uri.authority.host);
            }
        }
        let seconds = u16::try_from(self.heartbeat.as_secs()).unwrap_or(u16::MAX);
        if seconds == 0 {
            return Err(BrokerError::Config(
                "broker.heartbeat must be at least one second".to_owned(),
            ));
        }
        uri.query.heartbeat = Some(seconds);
        match uri.scheme {
            AMQPScheme::AMQPS => {}
            AMQPScheme::AMQP => {
                if !self.allow_plaintext && !tls::is_loopback(&uri.authority.host) {
                    return Err(BrokerError::Config(
                        "broker.url is amqp:// to another machine, which would send the password and every message in \
                         the clear: use amqps://, or set allow_plaintext if the network is trusted"
                            .to_owned(),
                    ));
                }
            }
        }
        Ok(uri)
    }

    /// Whom to trust, where there is TLS.
    fn authorities(&self) -> Result<Option<rustls::ClientConfig>, BrokerError> {
        match self.uri()?.scheme {
            AMQPScheme::AMQPS => tls::client_config(self.ca_file.as_deref())
                .map(Some)
                .map_err(BrokerError::Config),
            AMQPScheme::AMQP => Ok(None),
        }
    }
}

/// A second handle on a connection's socket. lapin cannot abandon a connection: while the broker blocks it (memory or
/// disk alarm) or before the handshake is over nothing ends lapin's thread, its eight megabytes of buffers and what
/// is queued in them. Shutting the socket down does.
#[derive(Default)]
struct Socket(Mutex<SocketState>);

#[derive(Default)]
struct SocketState {
    stream: Option<TcpStream>,
    cut: bool,
}

impl Socket {
    fn keep(&self, stream: TcpStream) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.cut {
            shut(&stream);
        } else {
            state.stream = Some(stream);
        }
    }

    fn cut(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.cut = true;
        if let Some(stream) = state.stream.take() {
            shut(&stream);
        }
    }
}

fn shut(stream: &TcpStream) {
    // It fails only if the peer was faster, which is as good.
    drop(stream.shutdown(Shutdown::Both));
}

/// A connection to the broker. It never reconnects by itself: when it broke, drop it with everything made from it and
/// open another. Dropping cuts it; [`Connection::close`] says good-bye first.
pub struct Connection {
    lapin: Arc<lapin::Connection>,
    socket: Arc<Socket>,
    /// What lapin could not decode.
    apart: Arc<Apart>,
    publish_deadline: Duration,
    /// Who we are to the broker, where that is known.
    login: Option<String>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Opens a connection that the management UI shows as `name`.
    pub async fn open(settings: &BrokerSettings, name: &str) -> Result<Self, BrokerError> {
        Self::dial(settings.uri()?, settings, name).await
    }

    /// Opens one that consumes nothing, with smaller frames and so with smaller buffers. A consumer must take whatever
    /// headers the broker lets partners send.
    pub async fn open_without_consumer(settings: &BrokerSettings, name: &str) -> Result<Self, BrokerError> {
        let mut uri = settings.uri()?;
        let frame_max = uri.query.frame_max.unwrap_or(SMALL_FRAME_MAX).min(SMALL_FRAME_MAX);
        uri.query.frame_max = Some(frame_max);
        Self::dial(uri, settings, name).await
    }

    async fn dial(uri: AMQPUri, settings: &BrokerSettings, name: &str) -> Result<Self, BrokerError> {
        let connector = settings.authorities()?.map(RustlsConnector::from);
        let limit = settings.connect_timeout;
        let socket = Arc::new(Socket::default());
        // The only constructor. No retry, no recovery (it replays acknowledgements of dead channels): the worker
        // decides when to come back.
        let properties = ConnectionProperties::default()
            .with_connection_name(name.into())
            .with_client_property("product".into(), "settled".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        let (tokio, apart) = (async_rs::Tokio::current(), Arc::new(Apart::default()));
        let (held, sieved) = (Arc::clone(&socket), Arc::clone(&apart));
        let opening = lapin::Connection::connector(
            uri,
            Sieving::runtime(),
            // Runs on lapin's own thread, which a wait of ours does not end: so it carries the limit itself.
            async move |uri: AMQPUri, _| {
                let dial = async {
                    let host = uri.authority.host.as_str();
                    let addresses: Vec<_> = tokio::net::lookup_host((host, uri.authority.port)).await?.collect();
                    let stream = AsyncTcpStream::connect(&tokio, addresses).await?;
                    if let AsyncTcpStream::Plain(plain) = &stream {
                        held.keep(plain.get_ref().as_fd().try_clone_to_owned()?.into());
                    }
                    let stream = match &connector {
                        Some(connector) => stream.into_rustls(connector, host).await?,
                        None => stream,
                    };
                    // Behind the decryption, if there is any; to lapin it is a plain stream.
                    Ok(AsyncTcpStream::Plain(Sieve::new(stream, Arc::clone(&sieved))))
                };
                tokio::time::timeout(limit, dial)
                    .await
                    .unwrap_or_else(|_| Err(late("connecting", limit)))
                    .map_err(lapin::Error::from)
            },
            properties,
        );
        match answer("the connection", limit, opening).await {
            Ok(connection) => Ok(Connection {
                lapin: Arc::new(connection),
                socket,
                apart,
                publish_deadline: settings.publish_deadline,
                login: settings.login(),
            }),
            Err(error) => {
                socket.cut();
                Err(error.of_the_door())
            }
        }
    }

    /// Neither closed nor broken, as far as is known: a frozen broker shows after twice the heartbeat.
    pub fn is_connected(&self) -> bool {
        self.lapin.status().connected()
    }

    /// The broker stopped reading from this connection because of a memory or disk alarm.
    pub fn is_blocked(&self) -> bool {
        self.lapin.status().blocked()
    }

    /// Resolves within a quarter of a second after the connection closed or broke.
    pub async fn closed(&self) {
        // lapin's event stream hands each event to one listener only and has none for an orderly close.
        while self.is_connected() {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    /// Closes in order, or cuts the connection when the broker does not answer in time.
    pub async fn close(self) -> Result<(), BrokerError> {
        if !self.is_connected() {
            return Ok(());
        }
        // A blocked connection cannot even say good-bye.
        let limit = if self.is_blocked() {
            Duration::ZERO
        } else {
            ANSWER_TIMEOUT
        };
        answer("closing the connection", limit, self.lapin.close(200, "closing".into())).await
    }

    async fn channel(&self) -> Result<lapin::Channel, BrokerError> {
        answer("a channel", ANSWER_TIMEOUT, self.lapin.create_channel()).await
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.socket.cut();
    }
}

/// Connects, logs in and closes again.
pub async fn probe(settings: &BrokerSettings) -> Result<(), BrokerError> {
    Connection::open(settings, "settled probe").await?.close().await
}

/// The broker's name and version, as in `RabbitMQ 4.0.5`. lapin keeps them to itself, so this reads the greeting, which
/// needs no login.
pub async fn server_version(settings: &BrokerSettings) -> Result<String, BrokerError> {
    let uri = settings.uri()?;
    let config = settings.authorities()?;
    let limit = settings.connect_timeout;
    let greeting = tokio::task::spawn_blocking(move || greeting(&uri, config, limit)).await;
    greeting
        .map_err(|error| BrokerError::Away(error.to_string()))?
        .map_err(|error| BrokerError::Away(format!("its greeting could not be read: {error}")))
}

fn greeting(uri: &AMQPUri, config: Option<rustls::ClientConfig>, limit: Duration) -> std::io::Result<String> {
    let host = uri.authority.host.as_str();
    let mut addresses = (host, uri.authority.port).to_socket_addrs()?;
    let stream = loop {
        let Some(address) = addresses.next() else {
            return Err(late("connecting", limit));
        };
        if let Ok(stream) = TcpStream::connect_timeout(&address, limit) {
            break stream;
        }
    };
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    match config {
        None => read_greeting(stream),
        Some(config) => {
            let name = rustls::pki_types::ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
            let session = rustls::ClientConnection::new(Arc::new(config), name).map_err(std::io::Error::other)?;
            read_greeting(rustls::StreamOwned::new(session, stream))
        }
    }
}

/// Connection.Start: frame type, channel, size; class and method 10; protocol version; server properties.
fn read_greeting(mut stream: impl Read + Write) -> std::io::Result<String> {
    stream.write_all(b"AMQP\x00\x00\x09\x01")?;
    let mut head = [0; 13];
    stream.read_exact(&mut head)?;
    let [1, 0, 0, size @ .., 0, 10, 0, 10, _, _] = head else {
        return Err(std::io::Error::other("it is not AMQP 0-9-1"));
    };
    let size = usize::try_from(u32::from_be_bytes(size)).unwrap_or(usize::MAX);
    // A greeting is about half a kilobyte; what claims to be more than a usual frame is something else.
    if !(6..=131_072).contains(&size) {
        return Err(std::io::Error::other("it is not AMQP 0-9-1"));
    }
    let mut rest = vec![0; size.saturating_sub(6)];
    stream.read_exact(&mut rest)?;
    let (_, properties) = lapin::types::parsing::parse_field_table(rest.as_slice())
        .map_err(|_| std::io::Error::other("its properties cannot be parsed"))?;
    let text = |name| match properties.inner().get(name) {
        Some(AMQPValue::LongString(value)) => value.to_string(),
        Some(_) | None => "unknown".to_owned(),
    };
    Ok(format!("{} {}", text("product"), text("version")))
}

fn late(what: &str, limit: Duration) -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        format!("{what} took longer than {limit:?}"),
    )
}

/// Awaits one answer of the broker, but not for ever.
async fn answer<T>(
    what: &str,
    limit: Duration,
    question: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(limit, question).await {
        Ok(outcome) => outcome.map_err(|error| BrokerError::from_lapin(&error)),
        Err(_) => Err(BrokerError::Away(format!("no answer to {what} within {limit:?}"))),
    }
}

/// Starts every future in order before it awaits the first, then awaits each: lapin queues a frame at the first poll, so
/// the frames leave in this order and together. One wake-up at a time, where `join_all` has one for every future.
async fn all_together<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut started: Vec<Pin<Box<MaybeDone<F>>>> = futures
        .map(|future| {
            let mut future = Box::pin(maybe_done(future));
            // It is awaited below, which gives it a waker of its own.
            match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(()) | Poll::Pending => future,
            }
        })
        .collect();
    let mut outputs = Vec::with_capacity(started.len());
    for future in &mut started {
        poll_fn(|context| future.as_mut().poll(context)).await;
        outputs.extend(future.as_mut().take_output());
    }
    outputs
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Instant;

    use super::publisher::Publisher;
    use super::testing::{AUTHORITY, Vhost, event, eventually, queue, soon, tls_front};
    use super::*;

    fn settings(url: &str) -> BrokerSettings {
        BrokerSettings {
            url: url.to_owned(),
            ca_file: None,
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(2),
            publish_deadline: Duration::from_secs(2),
            allow_plaintext: false,
        }
    }

    #[test]
    fn plaintext_stays_on_this_machine() {
        for (url, allowed) in [
            ("amqp://u:p@localhost:5672/v", true),
            ("amqp://u:p@127.9.9.9/v", true),
            ("amqp://u:p@[::1]:5672/v", true),
            ("amqps://u:p@broker.example/v", true),
            ("amqp://u:p@broker.example/v", false),
            ("amqp://u:p@10.0.0.1/v", false),
            ("amqp://u:p@[2001:db8::1]:5672/v", false),
            ("amqp://u:p@localhost.example/v", false),
            ("amqp://localhost@broker.example/v", false),
        ] {
            let uri = settings(url).uri();
            assert_eq!(uri.is_ok(), allowed, "{url}");
            if let Err(error) = uri {
                assert!(error.to_string().contains("set allow_plaintext"), "{error}");
                assert!(
                    BrokerSettings {
                        allow_plaintext: true,
                        ..settings(url)
                    }
                    .uri()
                    .is_ok(),
                    "{url}"
                );
            }
        }
    }

    #[test]
    fn an_ipv6_host_is_kept() {
        let uri = BrokerSettings {
            allow_plaintext: true,
            ..settings("amqp://u:p@[2001:db8::1]:5/v")
        }
        .uri();
        assert_eq!(uri.map(|uri| uri.authority.host), Ok("2001:db8::1".to_owned()));
    }

    #[test]
    fn the_password_is_never_shown() {
        for url in [
            "amqp://u:hunter2@h/v",
            "amqps://u:hunter2@h",
            "amqp:hunter2",
            "hunter2",
            "amqp://u:hunter2@h:x/v",
        ] {
            let settings = settings(url);
            assert!(!format!("{settings:?}").contains("hunter2"), "{settings:?}");
            if let Err(error) = settings.uri() {
                assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
            }
        }
    }

    #[test]
    fn a_heartbeat_there_must_be() {
        let none = BrokerSettings {
            heartbeat: Duration::ZERO,
            ..settings("amqp://localhost")
        };
        assert!(matches!(none.uri(), Err(BrokerError::Config(_))));
    }

    #[tokio::test]
    async fn wrong_password_and_wrong_vhost_are_refused_and_nobody_home_is_away() {
        let vhost = Vhost::new();
        let right = vhost.settings();
        assert_eq!(soon(probe(&right)).await, Ok(()));
        let password = BrokerSettings {
            url: right.url.replace('@', "x@"),
            ..right.clone()
        };
        let error = soon(probe(&password)).await.expect_err("refused");
        assert_eq!(error.code(), Some(403), "{error}");
        let elsewhere = BrokerSettings {
            url: format!("{}x", right.url),
            ..right.clone()
        };
        let error = soon(probe(&elsewhere)).await.expect_err("refused");
        assert_eq!(error.code(), Some(530), "{error}");
        // Neither the user nor the virtual host is repeated.
        assert!(!error.to_string().contains(&vhost.name), "{error}");
        assert!(error.trouble().contains("virtual host"), "{error}");
        let error = soon(probe(&settings("amqp://localhost:1/"))).await.expect_err("away");
        assert!(matches!(error, BrokerError::Away(_)), "{error}");
    }

    #[tokio::test]
    async fn a_broker_that_does_not_answer_is_given_up_in_time() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = silent.local_addr().expect("an address").port();
        let accepted = std::thread::spawn(move || {
            let (mut stream, _) = silent.accept().expect("a client");
            // Reads to the end, which comes only when the client lets go.
            let mut all = Vec::new();
            stream.read_to_end(&mut all).map(|_| all)
        });
        let began = Instant::now();
        let error = Connection::open(&settings(&format!("amqp://localhost:{port}/")), "test")
            .await
            .expect_err("away");
        assert!(matches!(error, BrokerError::Away(_)), "{error}");
        assert!(began.elapsed() < Duration::from_secs(4));
        let heard = accepted
            .join()
            .expect("joined")
            .expect("the socket was closed, not abandoned");
        assert_eq!(heard, b"AMQP\x00\x00\x09\x01");
    }

    #[tokio::test]
    async fn the_broker_says_what_it_is() {
        let version = soon(server_version(&Vhost::new().settings()))
            .await
            .expect("a greeting");
        assert!(version.starts_with("RabbitMQ ") && version.len() > 12, "{version}");
    }

    #[tokio::test]
    async fn a_cut_connection_is_noticed() {
        let vhost = Vhost::new();
        let (proxy, settings) = vhost.proxied();
        let connection = Connection::open(&settings, "test").await.expect("connected");
        assert!(connection.is_connected());
        proxy.cut();
        soon(connection.closed()).await;
    }

    /// lapin writes nothing to a blocked connection, not even its end, and keeps a thread and its buffers for it.
    #[tokio::test]
    async fn a_blocked_connection_is_given_up_with_all_it_holds() {
        let vhost = Vhost::new();
        let (proxy, mut settings) = vhost.proxied();
        settings.publish_deadline = Duration::from_millis(300);
        let connection = Connection::open(&settings, "test").await.expect("connected");
        queue(&connection, "q", &[]).await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        proxy.block();
        eventually("blocked", async || connection.is_blocked().then_some(())).await;
        assert!(!publisher.reply(&event("", "q", "reply")).await);
        let began = Instant::now();
        let error = publisher.publish(&[event("", "q", "one")]).await.expect_err("away");
        assert!(
            matches!(error, BrokerError::Away(_)) && began.elapsed() < Duration::from_secs(2),
            "{error}"
        );
        assert!(matches!(soon(connection.close()).await, Err(BrokerError::Away(_))));
        eventually("given up", async || {
            (proxy.ended.load(Ordering::SeqCst) == 1).then_some(())
        })
        .await;
    }

    #[tokio::test]
    async fn tls_with_an_authority_of_our_own() {
        let vhost = Vhost::new();
        let port = tls_front(&vhost);
        let authority = std::env::temp_dir().join(format!("{}.pem", vhost.name));
        std::fs::write(&authority, AUTHORITY).expect("written");
        for host in ["localhost", "127.0.0.1"] {
            let url = vhost.settings().url.replacen("amqp://", "amqps://", 1);
            let (before, _) = url.rsplit_once('@').expect("a user");
            let url = format!("{before}@{host}:{port}/{}", vhost.name);
            let trusting = BrokerSettings {
                ca_file: Some(authority.clone()),
                ..settings(&url)
            };
            assert_eq!(soon(probe(&trusting)).await, Ok(()));
            let version = soon(server_version(&trusting)).await.expect("a greeting");
            assert!(version.starts_with("RabbitMQ "), "{version}");
            let error = soon(probe(&settings(&url))).await.expect_err("not trusted");
            assert!(matches!(error, BrokerError::Away(_)), "{error}");
            assert!(
                error.trouble().starts_with("TLS") && error.to_string().starts_with("TLS"),
                "{error}"
            );
        }
        std::fs::remove_file(&authority).expect("removed");
    }
}

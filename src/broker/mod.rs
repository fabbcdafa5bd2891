//! The broker: connections, topology, taking messages in and publishing them. The only room with lapin; what crosses
//! its door are the values of [`crate::domain::delivery`].
//!
//! Consume and publish on two [`Connection`]s: under a memory or disk alarm the broker stops reading from a connection
//! that publishes, and acknowledgements would stop with it.

pub mod intake;
pub mod publisher;
mod settings;
pub mod topology;

use std::future::{Future, poll_fn};
use std::net::{IpAddr, Shutdown};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::{MaybeDone, maybe_done};
use lapin::protocol::{AMQPErrorKind, AMQPHardError};
use lapin::tcp::{AsyncTcpStream, RustlsConnector, RustlsConnectorConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{ConnectionProperties, ErrorKind};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// How long one question to the broker (declare, bind, consume, acknowledge, close) may take. A healthy broker needs
/// milliseconds; a frozen one is noticed after twice the heartbeat.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the broker is and how to speak with it.
#[derive(Clone)]
pub struct BrokerSettings {
    /// `amqp://` or `amqps://`, with the password.
    pub url: String,
    /// A PEM file of further certificate authorities to trust for `amqps://`, beside the system's.
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
    #[error("the broker is away: {0}")]
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

impl BrokerError {
    /// By lapin's codes, never by its text.
    fn from_lapin(error: &lapin::Error) -> Self {
        let ErrorKind::ProtocolError(amqp) = error.kind() else {
            return BrokerError::Away(error.to_string());
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

    /// The reply code of a refusal.
    pub fn code(&self) -> Option<u16> {
        match self {
            BrokerError::Refused { code, .. } => Some(*code),
            BrokerError::Away(_) | BrokerError::Config(_) => None,
        }
    }
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
                if !self.allow_plaintext && !is_loopback(&uri.authority.host) {
                    return Err(BrokerError::Config(format!(
                        "broker.url is amqp:// to {}, which would send the password and every message in the clear: \
                         use amqps://, or set broker.allow_plaintext if the network is trusted",
                        uri.authority.host
                    )));
                }
            }
        }
        Ok(uri)
    }

    fn authorities(&self) -> Result<Vec<CertificateDer<'static>>, BrokerError> {
        let Some(path) = &self.ca_file else {
            return Ok(Vec::new());
        };
        let named = |problem: String| BrokerError::Config(format!("broker.ca_file {}: {problem}", path.display()));
        let certificates = CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| named(error.to_string()))?;
        if certificates.is_empty() {
            return Err(named("holds no certificate in PEM format".to_owned()));
        }
        Ok(certificates)
    }
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The system's roots and the configured ones. Without system roots (a bare container image) the configured ones do.
fn tls(authorities: &[CertificateDer<'static>]) -> std::io::Result<RustlsConnector> {
    let mut config = match RustlsConnectorConfig::new_with_native_certs() {
        Ok(config) => config,
        Err(error) if authorities.is_empty() => return Err(error),
        Err(_) => RustlsConnectorConfig::default(),
    };
    config.add_parsable_certificates(authorities.to_vec());
    config.connector_with_no_client_auth()
}

/// A second handle on a connection's socket. lapin cannot abandon a connection: while the broker blocks it (memory or
/// disk alarm) or before the handshake is over nothing ends lapin's thread, its eight megabytes of buffers and what
/// is queued in them. Shutting the socket down does.
#[derive(Default)]
struct Socket(Mutex<SocketState>);

#[derive(Default)]
struct SocketState {
    stream: Option<std::net::TcpStream>,
    cut: bool,
}

impl Socket {
    fn keep(&self, stream: std::net::TcpStream) {
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

fn shut(stream: &std::net::TcpStream) {
    // It fails only if the peer was faster, which is as good.
    drop(stream.shutdown(Shutdown::Both));
}

/// A connection to the broker. It never reconnects by itself: when it broke, drop it with everything made from it and
/// open another. Dropping cuts it; [`Connection::close`] says good-bye first.
pub struct Connection {
    lapin: Arc<lapin::Connection>,
    socket: Arc<Socket>,
    publish_deadline: Duration,
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
        let uri = settings.uri()?;
        let authorities = settings.authorities()?;
        let limit = settings.connect_timeout;
        let socket = Arc::new(Socket::default());
        // The only constructor. No retry, no recovery (it replays acknowledgements of dead channels): the worker
        // decides when to come back.
        let properties = ConnectionProperties::default()
            .with_connection_name(name.into())
            .with_client_property("product".into(), "settled".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        let runtime = lapin::runtime::default_runtime().map_err(|error| BrokerError::from_lapin(&error))?;
        let held = Arc::clone(&socket);
        let opening = lapin::Connection::connector(
            uri,
            runtime,
            // Runs on lapin's own thread, which a wait of ours does not end: so it carries the limit itself.
            async move |uri: AMQPUri, runtime| {
                let dial = async {
                    let host = uri.authority.host.as_str();
                    let addresses: Vec<_> = tokio::net::lookup_host((host, uri.authority.port)).await?.collect();
                    let stream = AsyncTcpStream::connect(&runtime, addresses).await?;
                    if let AsyncTcpStream::Plain(plain) = &stream {
                        held.keep(plain.get_ref().as_fd().try_clone_to_owned()?.into());
                    }
                    match uri.scheme {
                        AMQPScheme::AMQP => Ok(stream),
                        AMQPScheme::AMQPS => stream.into_rustls(&tls(&authorities)?, host).await,
                    }
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
                publish_deadline: settings.publish_deadline,
            }),
            Err(error) => {
                socket.cut();
                Err(error)
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

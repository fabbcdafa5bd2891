//! A connection to the broker, with a second handle on its socket.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::ConnectionProperties;
use lapin::tcp::{AsyncTcpStream, RustlsConnector};
use lapin::uri::AMQPUri;

use super::answer::late;
use super::sieve::{Apart, Sieve, Sieving};
use super::{ANSWER_TIMEOUT, BrokerError, BrokerSettings, answer};

/// The largest frame of a connection that consumes nothing. lapin keeps room for 32 frames each way, all of it resident: 8 MB
/// where frames are as large as the broker lets them be (131,072 bytes), 2 MB here. The largest frame that can not be cut is
/// the header of a dead letter: 16,384 bytes of its sender's and some hundred of ours.
const SMALL_FRAME_MAX: u32 = 32_768;

/// A second handle on a connection's socket. lapin cannot abandon a connection: while the broker blocks it (memory or
/// disk alarm) or before the handshake is over nothing ends lapin's thread, its eight megabytes of buffers and what
/// is queued in them. Shutting the socket down does.
#[derive(Default)]
pub(super) struct Socket(Mutex<SocketState>);

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

    pub(super) fn cut(&self) {
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
    pub(super) lapin: Arc<lapin::Connection>,
    pub(super) socket: Arc<Socket>,
    /// What lapin could not decode.
    pub(super) apart: Arc<Apart>,
    pub(super) publish_deadline: Duration,
    /// Who we are to the broker, where that is known.
    pub(super) login: Option<String>,
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

    pub(super) async fn channel(&self) -> Result<lapin::Channel, BrokerError> {
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

#[cfg(test)]
mod tests;

//! A connection to the broker, with a second handle on its socket.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lapin::ConnectionProperties;
use lapin::tcp::{AsyncTcpStream, RustlsConnector};
use lapin::uri::{AMQPScheme, AMQPUri};
use tokio::task::AbortHandle;

use super::answer::late;
use super::sieve::{Apart, Heard, Sieve, Sieving};
use super::{ANSWER_TIMEOUT, BrokerError, BrokerSettings, answer, greeting, hosts};
use crate::{race, redact};

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

/// Cuts what is being opened, unless it was opened.
struct CutUnlessOpen(Option<Arc<Socket>>);

impl CutUnlessOpen {
    fn opened(mut self) {
        self.0 = None;
    }
}

impl Drop for CutUnlessOpen {
    fn drop(&mut self) {
        if let Some(socket) = self.0.take() {
            socket.cut();
        }
    }
}

/// How often it is looked whether the broker was heard.
const LISTEN: Duration = Duration::from_millis(200);

/// Cuts the connection once the broker was silent for this long: it sends something at least twice a heartbeat. lapin would see
/// it too, after two heartbeats and up to half of one more.
async fn listen(heard: Arc<Heard>, socket: Arc<Socket>, limit: Duration) {
    if limit.is_zero() {
        return;
    }
    let mut looked = Instant::now();
    let mut steady_since = looked;
    loop {
        tokio::time::sleep(LISTEN).await;
        // Where this process itself stood still, what has come meanwhile is not read yet.
        if looked.elapsed() > LISTEN * 3 {
            steady_since = Instant::now();
        }
        looked = Instant::now();
        if heard.silence() > limit && steady_since.elapsed() > LISTEN * 3 {
            socket.cut();
            return;
        }
    }
}

/// A connection to the broker. It never reconnects by itself: when it broke, drop it with everything made from it and
/// open another. Dropping cuts it; [`Connection::close`] says good-bye first.
pub struct Connection {
    pub(super) lapin: Arc<lapin::Connection>,
    pub(super) socket: Arc<Socket>,
    /// Who listens whether the broker is still there.
    listening: AbortHandle,
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
    /// Opens a connection that the management UI shows as `name`, to any of the hosts that the URL names.
    pub async fn open(settings: &BrokerSettings, name: &str) -> Result<Self, BrokerError> {
        Self::dial_any(settings, None, name).await
    }

    /// Opens one that consumes nothing, with smaller frames and so with smaller buffers. A consumer must take whatever
    /// headers the broker lets partners send.
    pub async fn open_without_consumer(settings: &BrokerSettings, name: &str) -> Result<Self, BrokerError> {
        Self::dial_any(settings, Some(SMALL_FRAME_MAX), name).await
    }

    /// Tries one host after the other, each with the whole time that a connection may take. One that is silent for a moment is
    /// not waited for alone: the next is tried beside it, and the first to let us in is taken.
    async fn dial_any(settings: &BrokerSettings, frame_max: Option<u32>, name: &str) -> Result<Self, BrokerError> {
        let mut uris = settings.uris()?;
        for uri in &mut uris {
            if let Some(most) = frame_max {
                uri.query.frame_max = Some(uri.query.frame_max.unwrap_or(most).min(most));
            }
        }
        let connector = settings.authorities()?.map(RustlsConnector::from);
        let targets = hosts::resolve(&uris, settings.connect_timeout).await?;
        let (uris, connector) = (&uris, &connector);
        let dials = settings.memory.order(&targets).into_iter().map(|target| async move {
            let uri = uris.get(target.uri).cloned().unwrap_or_default();
            let dialing = settings.memory.dialing(target, settings.next_host_after);
            let dialed = Self::dial(uri, target.address, connector.clone(), settings, name).await;
            dialing.ended(&dialed);
            dialed
        });
        // What a broker says tells more than the silence of another.
        let tells_more = |error: &BrokerError, before: &BrokerError| error.code().is_some() && before.code().is_none();
        let dialed = race::first(dials, settings.next_host_after, tells_more)
            .await
            .unwrap_or_else(|| Err(BrokerError::Away("its name has no address".to_owned())));
        match dialed {
            // A broker that knows no such login ends the connection without a word.
            Err(BrokerError::Away(away)) if settings.is_external() => Err(match greeting::hear(settings).await {
                Ok(greeting) if !greeting.mechanisms.split(' ').any(|one| one == "EXTERNAL") => BrokerError::Refused {
                    code: 403,
                    text: format!(
                        "it does not take certificates for logins: it has not EXTERNAL among its mechanisms ({})",
                        redact::outside(&greeting.mechanisms)
                    ),
                },
                Ok(_) | Err(_) => BrokerError::Away(away),
            }),
            dialed => dialed,
        }
    }

    async fn dial(
        uri: AMQPUri,
        address: SocketAddr,
        connector: Option<RustlsConnector>,
        settings: &BrokerSettings,
        name: &str,
    ) -> Result<Self, BrokerError> {
        let connector = connector.filter(|_| uri.scheme == AMQPScheme::AMQPS);
        let limit = settings.connect_timeout;
        let socket = Arc::new(Socket::default());
        // Whoever waits for this may lose patience at any moment: then the connection is cut, wherever it is.
        let cutting = CutUnlessOpen(Some(Arc::clone(&socket)));
        // The only constructor. No retry, no recovery (it replays acknowledgements of dead channels): the worker
        // decides when to come back.
        let properties = ConnectionProperties::default()
            .with_connection_name(name.into())
            .with_client_property("product".into(), "settled".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        let (tokio, apart, heard) = (
            async_rs::Tokio::current(),
            Arc::new(Apart::default()),
            Arc::new(Heard::default()),
        );
        let (held, sieved, hearing) = (Arc::clone(&socket), Arc::clone(&apart), Arc::clone(&heard));
        let opening = lapin::Connection::connector(
            uri,
            Sieving::runtime(),
            // Runs on lapin's own thread, which a wait of ours does not end: so it carries the limit itself.
            async move |uri: AMQPUri, _| {
                let dial = async {
                    let host = uri.authority.host.as_str();
                    let stream = AsyncTcpStream::connect(&tokio, vec![address]).await?;
                    if let AsyncTcpStream::Plain(plain) = &stream {
                        held.keep(plain.get_ref().as_fd().try_clone_to_owned()?.into());
                    }
                    let stream = match &connector {
                        Some(connector) => stream.into_rustls(connector, host).await?,
                        None => stream,
                    };
                    // Behind the decryption, if there is any; to lapin it is a plain stream.
                    let sieve = Sieve::new(stream, Arc::clone(&sieved)).heard_by(Arc::clone(&hearing));
                    Ok(AsyncTcpStream::Plain(sieve))
                };
                tokio::time::timeout(limit, dial)
                    .await
                    .unwrap_or_else(|_| Err(late("connecting", limit)))
                    .map_err(lapin::Error::from)
            },
            properties,
        );
        let lapin = answer("the connection", limit, opening)
            .await
            .map_err(|error| error.of_the_door(settings))?;
        cutting.opened();
        let heartbeat = Duration::from_secs(lapin.configuration().heartbeat().into());
        Ok(Connection {
            lapin: Arc::new(lapin),
            listening: tokio::spawn(listen(heard, Arc::clone(&socket), heartbeat * 3 / 2)).abort_handle(),
            socket,
            apart,
            publish_deadline: settings.publish_deadline,
            login: settings.login(),
        })
    }

    /// Neither closed nor broken, as far as is known: a frozen broker shows after one heartbeat and a half.
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
        self.listening.abort();
        self.socket.cut();
    }
}

/// Connects, logs in and closes again.
pub async fn probe(settings: &BrokerSettings) -> Result<(), BrokerError> {
    Connection::open(settings, "settled probe").await?.close().await
}

#[cfg(test)]
mod tests;

//! The bounded way in for whoever serves HTTP: accept, TLS if there is any, one conversation a connection.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{Router, response::Response};
use hyper::{
    body::Incoming,
    http::Request,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::TlsAcceptor;

use super::door::{AnswerBody, Connections, Visit, Watched};
use crate::retry::stopped;
use crate::telemetry::Signal;
use crate::tls::{ListenerFiles, Renewal};

/// Bytes of a request's head.
pub(super) const HEAD_MAX: usize = 16 * 1024;
/// Headers of a request.
const HEADERS_MAX: usize = 64;
/// Bytes that are thrown away of what comes behind an answer that ends its connection. The time for it is the door's: that for
/// the head of another request.
const UNREAD_MAX: usize = 64 << 20;
/// Time to finish an answer when the program stops.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is served, and to how many.
pub(crate) struct Served {
    pub(crate) door: Arc<Connections>,
    pub(crate) routes: Router,
    /// None: in the clear.
    pub(crate) tls: Option<Arc<ListenerFiles>>,
    /// Time to finish what is in hand when the program stops.
    pub(crate) last_words: Duration,
}

impl Served {
    /// In the clear, with little to finish.
    pub(crate) fn plain(door: Arc<Connections>, routes: Router) -> Self {
        Self {
            door,
            routes,
            tls: None,
            last_words: LAST_WORDS,
        }
    }

    /// Until the program stops.
    pub(crate) async fn accept(self, listener: TcpListener, mut shutdown: watch::Receiver<bool>) {
        let served = Arc::new(self);
        loop {
            let stopping = shutdown.clone();
            let accepted = tokio::select! {
                biased;
                () = stopped(&mut shutdown) => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let visit = served.door.admit(peer.ip());
                    tokio::spawn(Arc::clone(&served).meet(stream, visit, stopping));
                }
                // One that went before it was let in is its own affair.
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::ConnectionAborted
                            | std::io::ErrorKind::ConnectionReset
                            | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => {
                    // Out of file descriptors, most likely. Some of ours are given back at once; others come back, but later.
                    let wait = if served.door.shed_some() { 1 } else { 50 };
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                }
            }
        }
    }

    async fn meet(self: Arc<Self>, stream: TcpStream, visit: Visit, mut stopping: watch::Receiver<bool>) {
        // What is left of an answer must not wait for the client's acknowledgement of the rest. Best effort.
        drop(stream.set_nodelay(true));
        let watched = Watched {
            stream,
            pulse: Arc::clone(&visit.pulse),
        };
        let Some(files) = &self.tls else {
            return self.converse(watched, visit, stopping).await;
        };
        let (config, renewal) = files.current();
        match &renewal {
            Renewal::Same => {}
            Renewal::Taken => Signal::CertificateRenewed.emit(),
            Renewal::Refused(error) => Signal::CertificateRefused {
                error: &error.to_string(),
            }
            .emit(),
        }
        // Within the time for the head of the first request.
        let agreed = tokio::select! {
            agreed = TlsAcceptor::from(config).accept(watched) => agreed,
            () = visit.over() => return,
            () = stopped(&mut stopping) => return,
        };
        // Who speaks no TLS, or other versions of it, is its own affair.
        if let Ok(stream) = agreed {
            self.converse(stream, visit, stopping).await;
        }
    }

    async fn converse<S>(&self, stream: S, visit: Visit, mut stopping: watch::Receiver<bool>)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let routes = TowerToHyperService::new(self.routes.clone());
        let service = service_fn(|mut request: Request<Incoming>| {
            visit.pulse.asks();
            let pulse = Arc::clone(&visit.pulse);
            request.extensions_mut().insert(Arc::clone(&pulse));
            let answer = routes.call(request);
            // In a box, so that the connection may be moved, and its stream taken out when it is done.
            Box::pin(async move {
                let answer: Result<Response, Infallible> = answer.await;
                answer.map(|response| response.map(|body| AnswerBody::new(body, pulse)))
            })
        });
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // The door has the time; this one would also close who is only idle.
            .header_read_timeout(None)
            // Who has sent its request may close its side and still be answered.
            .half_close(true)
            .max_header_size(HEAD_MAX)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_MAX.max(8192))
            .serve_connection(TokioIo::new(stream), service);
        // A client that went away or spoke no HTTP is its own affair, and anybody could fill the log with it.
        tokio::select! {
            ended = &mut connection => drop(ended),
            () = visit.over() => return,
            () = stopped(&mut stopping) => {
                // What is being answered is finished, if the client reads it.
                std::pin::Pin::new(&mut connection).graceful_shutdown();
                tokio::select! {
                    last = tokio::time::timeout(self.last_words, &mut connection) => if last.is_err() {
                        return;
                    },
                    () = visit.over() => return,
                }
            }
        }
        // Everything was sent, and this side is closed.
        let stream = connection.into_parts().io.into_inner();
        tokio::select! {
            biased;
            () = part(stream) => {}
            () = visit.over() => {}
            () = stopped(&mut stopping) => {}
        }
    }
}

/// Parts with who was answered. Its own side is closed first, and what it still sends is thrown away: a socket that is closed
/// with something unread is reset, and the answer with it, which who sends a large body reads only behind all of that.
async fn part(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut unread = [0; 8 * 1024];
    let mut left = UNREAD_MAX;
    while left > 0 {
        match stream.read(&mut unread).await {
            Ok(0) | Err(_) => return,
            Ok(count) => left = left.saturating_sub(count),
        }
    }
}

//! A question to somebody else's HTTP server: one connection, bounded, and nothing that it points to is followed.

use std::{sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request, Response,
    body::Bytes,
    header::{HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// Whom to ask.
pub(crate) struct Enquiry<'a> {
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    /// None: in the clear.
    pub(crate) tls: Option<Arc<ClientConfig>>,
    /// Bytes of an answer at most.
    pub(crate) most: usize,
    /// Time for all of it.
    pub(crate) within: Duration,
}

impl Enquiry<'_> {
    /// The answer, whatever its status.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn ask(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, String> {
        tokio::time::timeout(self.within, self.asked(request))
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {:?}", self.within)))
    }

    async fn asked(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Bytes>, String> {
        let bare = self.host.trim_start_matches('[').trim_end_matches(']');
        let place = format!("{}:{}", self.host, self.port);
        let place = HeaderValue::from_str(&place).map_err(|error| error.to_string())?;
        request.headers_mut().insert(HOST, place);
        let stream = TcpStream::connect((bare, self.port)).await;
        let stream = stream.map_err(|error| error.to_string())?;
        match &self.tls {
            None => self.converse(stream, request).await,
            Some(trusted) => {
                let name = ServerName::try_from(bare.to_owned()).map_err(|error| error.to_string())?;
                let stream = TlsConnector::from(Arc::clone(trusted)).connect(name, stream).await;
                self.converse(stream.map_err(|error| format!("no TLS: {error}"))?, request)
                    .await
            }
        }
    }

    async fn converse<S>(&self, stream: S, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, String>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let words = |error: hyper::Error| error.to_string();
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(words)?;
        let answer = async {
            let (head, body) = sender.send_request(request).await.map_err(words)?.into_parts();
            let body = Limited::new(body, self.most).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            Ok::<_, String>(Response::from_parts(head, body))
        };
        tokio::pin!(connection);
        tokio::pin!(answer);
        // The connection moves the bytes, and is dropped with the answer.
        let mut is_open = true;
        loop {
            tokio::select! {
                answer = &mut answer => return answer,
                ended = &mut connection, if is_open => {
                    is_open = false;
                    ended.map_err(words)?;
                }
            }
        }
    }
}

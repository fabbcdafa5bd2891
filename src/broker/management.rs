//! The broker's management API, as far as there is something that AMQP does not show. It is only read: no request but GET.

use std::sync::Arc;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use lapin::uri::AMQPUri;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::hosts::authority_of;
use super::settings::{self, BrokerSettings};
use crate::config::{Secret, Settings};
use crate::tls::{self, ClientFiles};

/// How long one question may take, from the connection to the last byte of the answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes of an answer at most.
const ANSWER_MAX: usize = 8 << 20;

/// Why there is no answer. The sentence holds no password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManagementError {
    /// Nobody answers, or not in time, or not what the management API answers.
    #[error("{0}")]
    Away(String),
    /// It does not let this user in, or not so far.
    #[error("{0}")]
    Refused(String),
    /// There is nothing of that name.
    #[error("{0} is not there")]
    Missing(String),
    /// A setting must change.
    #[error("{0}")]
    Config(String),
}

/// Where it is, and who asks.
#[derive(Clone)]
pub struct Management {
    host: String,
    port: u16,
    /// What stands before `/api`.
    prefix: String,
    tls: Option<ClientFiles>,
    authorization: Secret,
    vhost: String,
}

impl std::fmt::Debug for Management {
    /// The password stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Management")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("vhost", &self.vhost)
            .finish_non_exhaustive()
    }
}

fn config(text: impl Into<String>) -> ManagementError {
    ManagementError::Config(text.into())
}

impl Management {
    /// As `broker.management_url` says; nothing if nobody said. Without a user in it, the one of `broker.url` asks.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub fn from_settings(settings: &Settings) -> Result<Option<Self>, ManagementError> {
        let url = settings.broker.management_url.expose();
        if url.is_empty() {
            return Ok(None);
        }
        let shape = || config("broker.management_url is no URL: write https://user:password@host:15671");
        // The first of several hosts: user and virtual host are the same on each.
        let broker = BrokerSettings::from_settings(settings).map_err(|error| config(error.message()))?;
        let broker = broker.uri().map_err(|error| config(error.to_string()))?;
        let (is_tls, rest) = match url.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some(_) | None => return Err(shape()),
        };
        let authority = authority_of(rest);
        let prefix = rest.get(authority.len()..).unwrap_or_default().trim_end_matches('/');
        if prefix.contains(['?', '#']) {
            return Err(shape());
        }
        let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
        // It reads the user, percent signs included, as that of a URL of the broker.
        let parsed: AMQPUri = format!("amqp://{authority}").parse().map_err(|_| shape())?;
        let (host, port) = place_of(place, is_tls).ok_or_else(shape)?;
        if !is_tls && !settings.allow_plaintext && !tls::is_loopback(&host) {
            return Err(config(
                "broker.management_url must begin with https:// unless the broker is on this machine or allow_plaintext is on",
            ));
        }
        let user = if authority.contains('@') {
            parsed.authority.userinfo
        } else {
            broker.authority.userinfo
        };
        let tls = is_tls.then(|| settings::files(settings));
        if let Some(files) = &tls {
            files.config().map_err(|error| config(error.to_string()))?;
        }
        let login = BASE64_STANDARD.encode(format!("{}:{}", user.username, user.password));
        Ok(Some(Self {
            host,
            port,
            prefix: prefix.to_owned(),
            tls,
            authorization: Secret::new(format!("Basic {login}")),
            vhost: broker.vhost,
        }))
    }

    /// The virtual host, as it stands in a path.
    pub(super) fn vhost(&self) -> String {
        escaped(&self.vhost)
    }

    /// Asks for what stands under `/api/`.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ManagementError> {
        let away = |why: String| {
            ManagementError::Away(format!(
                "the management API at {}:{} does not answer: {why}",
                self.host, self.port
            ))
        };
        let (status, body) = tokio::time::timeout(ANSWER_TIMEOUT, self.ask(path))
            .await
            .map_err(|_| away(format!("nothing within {} s", ANSWER_TIMEOUT.as_secs())))?
            .map_err(away)?;
        match status {
            StatusCode::OK => serde_json::from_slice(&body)
                .map_err(|error| away(format!("its answer about {path} is not what it should be ({error})"))),
            StatusCode::UNAUTHORIZED => Err(ManagementError::Refused(
                "the management API refuses this login, or the user has no tag for it".to_owned(),
            )),
            StatusCode::FORBIDDEN => Err(ManagementError::Refused(format!(
                "the management API does not let this user see {path}"
            ))),
            StatusCode::NOT_FOUND => Err(ManagementError::Missing(path.to_owned())),
            other => Err(away(format!("status {other}"))),
        }
    }

    async fn ask(&self, path: &str) -> Result<(StatusCode, Bytes), String> {
        let stream = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|error| error.to_string())?;
        match &self.tls {
            None => self.ask_over(stream, path).await,
            Some(files) => {
                let name =
                    rustls::pki_types::ServerName::try_from(self.host.clone()).map_err(|error| error.to_string())?;
                let trusted = files.config().map_err(|error| error.to_string())?;
                let stream = TlsConnector::from(Arc::new(trusted)).connect(name, stream).await;
                self.ask_over(stream.map_err(|error| format!("no TLS: {error}"))?, path)
                    .await
            }
        }
    }

    async fn ask_over<S>(&self, stream: S, path: &str) -> Result<(StatusCode, Bytes), String>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let words = |error: hyper::Error| error.to_string();
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(words)?;
        let request = Request::get(format!("{}/api/{path}", self.prefix))
            .header(HOST, &self.host)
            .header(AUTHORIZATION, self.authorization.expose())
            .header(ACCEPT, "application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let answer = async {
            let answer = sender.send_request(request).await.map_err(words)?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            Ok::<_, String>((status, body))
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

/// Host and port of `host:port`, `[address]:port` or either without a port.
fn place_of(place: &str, is_tls: bool) -> Option<(String, u16)> {
    let default = if is_tls { 15_671 } else { 15_672 };
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']')?;
            (address, after.strip_prefix(':').or(after.is_empty().then_some("")))
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, Some("")),
        },
    };
    let port = match port? {
        "" => default,
        port => port.parse().ok()?,
    };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

/// Text as one part of a path: everything but letters, digits, `-`, `.`, `_` and `~` as its bytes.
pub(super) fn escaped(text: &str) -> String {
    let mut path = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            path.push(char::from(byte));
        } else {
            path.push('%');
            path.push_str(&hex::encode_upper([byte]));
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    #[test]
    fn a_place_is_a_host_and_a_port() {
        for (place, is_tls, expected) in [
            ("host:1", false, Some(("host", 1))),
            ("host", false, Some(("host", 15_672))),
            ("host", true, Some(("host", 15_671))),
            ("[::1]:7", true, Some(("::1", 7))),
            ("[::1]", false, Some(("::1", 15_672))),
            ("host:x", false, None),
            ("[::1", false, None),
            ("[::1]x", false, None),
            ("", false, None),
        ] {
            let expected = expected.map(|(host, port)| (host.to_owned(), port));
            assert_eq!(place_of(place, is_tls), expected, "{place}");
        }
    }

    /// `broker.url` may name several hosts in two ways, and may be one alone: virtual host and user are the same.
    #[test]
    fn the_virtual_host_is_that_of_several_hosts_too() {
        for url in [
            "amqps://ann:secret@one:5671/desk",
            "amqps://ann:secret@one:5671,two:5672/desk",
            "amqps://ann:secret@one:5671/desk,amqps://ann:secret@two/desk",
        ] {
            let sources = Sources {
                file: None,
                environment: std::iter::empty(),
                flags: vec![
                    ("broker.url".to_owned(), url.to_owned()),
                    ("broker.management_url".to_owned(), "http://127.0.0.1:15672".to_owned()),
                ],
            };
            let settings = Settings::load(sources).expect(url);
            let management = Management::from_settings(&settings)
                .expect(url)
                .expect("it is asked for");
            assert_eq!(management.vhost, "desk", "{url}");
            let login = BASE64_STANDARD.encode("ann:secret");
            assert_eq!(management.authorization.expose(), &format!("Basic {login}"), "{url}");
        }
    }

    #[test]
    fn a_name_is_one_part_of_a_path() {
        assert_eq!(escaped("/"), "%2F");
        assert_eq!(escaped("a b/\u{e4}?#%"), "a%20b%2F%C3%A4%3F%23%25");
        assert_eq!(escaped("settlement.updates"), "settlement.updates");
    }
}

//! The broker's greeting, which says what it is and needs no login.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use lapin::types::AMQPValue;
use lapin::uri::{AMQPScheme, AMQPUri};

use super::answer::late;
use super::{BrokerError, BrokerSettings};
use crate::redact;

/// The broker's name and version, as in `RabbitMQ 4.0.5`. lapin keeps them to itself, so this reads the greeting, which
/// needs no login.
pub async fn server_version(settings: &BrokerSettings) -> Result<String, BrokerError> {
    hear(settings).await.map(|greeting| greeting.version)
}

/// What a broker says before it knows who we are.
pub(super) struct Greeting {
    version: String,
    /// How one may log in, between spaces.
    pub(super) mechanisms: String,
}

/// The first greeting that any of the hosts gives.
pub(super) async fn hear(settings: &BrokerSettings) -> Result<Greeting, BrokerError> {
    let uris = settings.uris()?;
    let config = settings.authorities()?;
    let limit = settings.connect_timeout;
    let mut told = Err("it has no host".to_owned());
    for uri in uris {
        let config = config.clone().filter(|_| uri.scheme == AMQPScheme::AMQPS);
        let greeting = tokio::task::spawn_blocking(move || greeting(&uri, config, limit)).await;
        told = match greeting {
            Ok(greeting) => greeting.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if told.is_ok() {
            break;
        }
    }
    told.map_err(|error| BrokerError::Away(format!("its greeting could not be read: {}", redact::outside(&error))))
}

fn greeting(uri: &AMQPUri, config: Option<rustls::ClientConfig>, limit: Duration) -> std::io::Result<Greeting> {
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
fn read_greeting(mut stream: impl Read + Write) -> std::io::Result<Greeting> {
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
    let (after, properties) = lapin::types::parsing::parse_field_table(rest.as_slice())
        .map_err(|_| std::io::Error::other("its properties cannot be parsed"))?;
    let text = |name| match properties.inner().get(name) {
        Some(AMQPValue::LongString(value)) => value.to_string(),
        Some(_) | None => "unknown".to_owned(),
    };
    let mechanisms = after.split_first_chunk::<4>().and_then(|(len, after)| {
        let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
        after.get(..len)
    });
    Ok(Greeting {
        version: format!("{} {}", text("product"), text("version")),
        mechanisms: String::from_utf8_lossy(mechanisms.unwrap_or_default()).into_owned(),
    })
}

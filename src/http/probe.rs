//! A question to a listener of our own, for who can not speak HTTP: an image without a shell has nothing else to ask with.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use http_body_util::Full;
use hyper::Request;

use super::ask::Enquiry;

/// Bytes of an answer at most.
const ANSWER_MAX: usize = 64 * 1024;
/// Less than what orchestrators give a probe.
const WITHIN: Duration = Duration::from_secs(3);

/// What a listener answered.
#[derive(Debug)]
pub(crate) struct Probed {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// Where a listener on this machine is asked: one that listens everywhere, on loopback.
pub(crate) fn asked_at(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// Asks for a path.
///
/// # Errors
/// Why there is no answer.
pub(crate) async fn probe(at: SocketAddr, path: &str) -> Result<Probed, String> {
    let request = Request::get(path)
        .body(Full::default())
        .map_err(|error| error.to_string())?;
    let host = match at {
        SocketAddr::V4(at) => at.ip().to_string(),
        SocketAddr::V6(at) => format!("[{}]", at.ip()),
    };
    let enquiry = Enquiry {
        host: &host,
        port: at.port(),
        tls: None,
        most: ANSWER_MAX,
        within: WITHIN,
    };
    let answer = enquiry.ask(request).await?;
    Ok(Probed {
        status: answer.status().as_u16(),
        body: String::from_utf8_lossy(answer.body()).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_everywhere_is_asked_on_loopback() {
        for (listen, asked) in [
            ("0.0.0.0:9464", "127.0.0.1:9464"),
            ("[::]:9464", "[::1]:9464"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("192.0.2.7:80", "192.0.2.7:80"),
        ] {
            let listen = listen.parse().expect("an address");
            assert_eq!(asked_at(listen).to_string(), asked);
        }
    }
}

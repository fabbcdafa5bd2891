//! Where the broker is and how to speak with it: from the program's settings, and from its URL.

use std::time::{Duration, SystemTime};

use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};

use super::BrokerError;
use super::hosts::{self, Memory, authority_of};
use crate::config::{ConfigError, Secret, Settings};
use crate::redact;
use crate::tls::{self, ClientFiles, TlsFilesError};

/// Where the broker is and how to speak with it.
#[derive(Clone)]
pub struct BrokerSettings {
    /// `amqp://` or `amqps://`, with the password. Several hosts, or several such URLs, stand between commas.
    pub url: Secret,
    /// For `amqps://`: whom to trust, and who we are.
    pub files: ClientFiles,
    /// A silent broker is given up after twice this.
    pub heartbeat: Duration,
    /// TCP, TLS and AMQP handshake together.
    pub connect_timeout: Duration,
    /// All publishes of one call, confirms included.
    pub publish_deadline: Duration,
    /// A host that says nothing for this long is not waited for alone: the next one is tried beside it.
    pub next_host_after: Duration,
    /// Accept `amqp://` to another machine.
    pub allow_plaintext: bool,
    /// Which hosts did not answer lately.
    pub memory: Memory,
}

impl std::fmt::Debug for BrokerSettings {
    /// The password stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BrokerSettings")
            .field("url", &self.url)
            .field("files", &self.files)
            .field("heartbeat", &self.heartbeat)
            .field("connect_timeout", &self.connect_timeout)
            .field("publish_deadline", &self.publish_deadline)
            .field("allow_plaintext", &self.allow_plaintext)
            .finish()
    }
}

impl BrokerSettings {
    /// # Errors
    /// If nobody said where the broker is.
    pub fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        Ok(Self {
            url: settings.broker_url()?.clone(),
            files: files(settings),
            heartbeat: settings.broker.heartbeat,
            connect_timeout: settings.broker.connect_timeout,
            publish_deadline: settings.broker.publish_deadline,
            next_host_after: settings.broker.next_host_after,
            allow_plaintext: settings.allow_plaintext,
            memory: Memory::default(),
        })
    }

    /// The user that the broker knows us as, which dead letters carry as `user_id`: the one that the URL names. None where it
    /// names none (a certificate may be the login, SASL EXTERNAL), or where no property could hold it.
    pub fn login(&self) -> Option<String> {
        let uri = self.uri().ok()?;
        let is_told = match uri.query.auth_mechanism {
            // Without one in the URL the library says `guest`, and means nobody.
            Some(SASLMechanism::External) => self.names_a_user(),
            Some(SASLMechanism::Anonymous) => false,
            Some(SASLMechanism::AMQPlain | SASLMechanism::Plain | SASLMechanism::RabbitCrDemo) | None => true,
        };
        let user = uri.authority.userinfo.username;
        (is_told && !user.is_empty() && user.len() <= 255).then_some(user)
    }

    fn names_a_user(&self) -> bool {
        redact::urls(self.url.expose()).into_iter().all(|url| {
            let rest = url.split_once("://").map_or("", |(_, rest)| rest);
            authority_of(rest).contains('@')
        })
    }

    /// Whether the certificate is the login.
    pub(super) fn is_external(&self) -> bool {
        let mechanism = self.uri().ok().and_then(|uri| uri.query.auth_mechanism);
        mechanism == Some(SASLMechanism::External)
    }

    /// Reads the URL and the certificate authorities without connecting.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub fn check(&self) -> Result<(), BrokerError> {
        self.uri()?;
        self.authorities().map(drop)
    }

    /// Until when our own certificate counts; none where we have none to show.
    ///
    /// # Errors
    /// The file can not be read.
    pub fn certificate_until(&self) -> Result<Option<SystemTime>, TlsFilesError> {
        self.files.ends()
    }

    /// The virtual host; the broker's first where the URL can not be read.
    pub fn vhost(&self) -> String {
        self.uri().map_or_else(|_| "/".to_owned(), |uri| uri.vhost)
    }

    /// The first URL, which says as whom and where to log in, as all of them do.
    pub(super) fn uri(&self) -> Result<AMQPUri, BrokerError> {
        let uris = self.uris()?;
        uris.into_iter()
            .next()
            .ok_or_else(|| BrokerError::Config("broker.url names no host".to_owned()))
    }

    /// One for each host that is named.
    pub(super) fn uris(&self) -> Result<Vec<AMQPUri>, BrokerError> {
        let uris: Vec<AMQPUri> = hosts::each(self.url.expose())?
            .iter()
            .map(|url| self.uri_of(url))
            .collect::<Result<_, _>>()?;
        let whose = |uri: &AMQPUri| (uri.vhost.clone(), uri.authority.userinfo.username.clone());
        if uris.iter().any(|uri| uris.first().map(whose) != Some(whose(uri))) {
            return Err(BrokerError::Config(
                "broker.url names several users or virtual hosts: they must be the same on every host".to_owned(),
            ));
        }
        Ok(uris)
    }

    fn uri_of(&self, url: &str) -> Result<AMQPUri, BrokerError> {
        // lapin's own complaint may repeat the URL, and with it the password.
        let mut uri = url.parse::<AMQPUri>().map_err(|_| {
            BrokerError::Config(
                "broker.url is not an AMQP URL: write amqps://user:password@host:port/virtual-host, with several hosts \
                 between commas"
                    .to_owned(),
            )
        })?;
        // amq-protocol-uri 10.6 reads an IPv6 address as "no host" and would go to localhost instead.
        if let Some((_, rest)) = url.split_once("://") {
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

    /// A text of somebody else's, without the password as it is written in the URL and as it is meant.
    pub(super) fn without_password(&self, text: &str) -> String {
        let uris = self.uris().unwrap_or_default();
        let meant = uris.iter().map(|uri| uri.authority.userinfo.password.as_str());
        let written = redact::urls(self.url.expose()).into_iter().filter_map(|url| {
            let (_, rest) = url.split_once("://")?;
            let (login, _) = authority_of(rest).rsplit_once('@')?;
            login.split_once(':').map(|(_, password)| password)
        });
        redact::without(text, &meant.chain(written).collect::<Vec<_>>())
    }

    /// Whom to trust and who we are, where there is TLS; as it stands in the files now.
    pub(super) fn authorities(&self) -> Result<Option<rustls::ClientConfig>, BrokerError> {
        if self.uris()?.iter().all(|uri| uri.scheme == AMQPScheme::AMQP) {
            return Ok(None);
        }
        let config = self
            .files
            .config()
            .map_err(|error| BrokerError::Config(error.to_string()))?;
        if self.is_external() && self.files.certificate_file.is_none() {
            return Err(BrokerError::Config(
                "broker.url says auth_mechanism=external, and broker.client_certificate_file names no certificate to log in \
                 with"
                .to_owned(),
            ));
        }
        Ok(Some(config))
    }
}

/// The broker's, which are those of its management API too.
pub(super) fn files(settings: &Settings) -> ClientFiles {
    let broker = &settings.broker;
    ClientFiles {
        section: "broker",
        ca_file: broker.ca_file.clone(),
        certificate_file: broker.client_certificate_file.clone(),
        key_file: broker.client_key_file.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::testing::settings_of;

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
            let uri = settings_of(url).uri();
            assert_eq!(uri.is_ok(), allowed, "{url}");
            if let Err(error) = uri {
                assert!(error.to_string().contains("set allow_plaintext"), "{error}");
                assert!(
                    BrokerSettings {
                        allow_plaintext: true,
                        ..settings_of(url)
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
            ..settings_of("amqp://u:p@[2001:db8::1]:5/v")
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
            let settings = settings_of(url);
            assert!(!format!("{settings:?}").contains("hunter2"), "{settings:?}");
            if let Err(error) = settings.uri() {
                assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
            }
        }
    }

    #[test]
    fn several_hosts_are_one_broker() {
        let several = settings_of("amqps://u:p@a:1,[2001:db8::1],c/v?heartbeat=7");
        let uris = several.uris().expect("three");
        let places: Vec<_> = uris
            .iter()
            .map(|uri| (uri.authority.host.as_str(), uri.authority.port, uri.vhost.as_str()))
            .collect();
        assert_eq!(places, [("a", 1, "v"), ("2001:db8::1", 5671, "v"), ("c", 5671, "v")]);
        assert_eq!(several.login().as_deref(), Some("u"));
        for (url, problem) in [
            ("amqps://u:hunter2@a/v,amqps://w:hunter2@b/v", "several users"),
            ("amqps://u:hunter2@a/v,amqps://u:hunter2@b/w", "several users"),
            ("amqp://u:hunter2@localhost,broker.example/v", "set allow_plaintext"),
            ("amqps://u:hunter2@a/v,amqp://u:hunter2@b/v", "set allow_plaintext"),
            ("amqps://u:hunter2@a:x,b/v", "not an AMQP URL"),
            ("amqps://u:hunter2@a,,b/v", "a comma too many"),
        ] {
            let error = settings_of(url).uris().expect_err(url).to_string();
            assert!(error.contains(problem) && !error.contains("hunter2"), "{url}: {error}");
        }
    }

    #[test]
    fn a_heartbeat_there_must_be() {
        let none = BrokerSettings {
            heartbeat: Duration::ZERO,
            ..settings_of("amqp://localhost")
        };
        assert!(matches!(none.uri(), Err(BrokerError::Config(_))));
    }
}

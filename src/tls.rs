//! What both connections and both listeners share: whom to trust, who we say we are, and which hosts need no encryption.
//!
//! Certificates are renewed while the program runs: a client's files are read for each connection that is made, a listener's
//! whenever they changed.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{danger::HandshakeSignatureValid, verify_server_name},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_cert::{
    Certificate,
    der::{
        Decode as _,
        oid::db::rfc5280::{ANY_EXTENDED_KEY_USAGE, ID_KP_CLIENT_AUTH},
    },
    ext::pkix::ExtendedKeyUsage,
};

/// A sentence about a file, or about the setting that names it. It repeats nothing of what is in the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TlsFilesError(pub String);

fn wrong<T>(sentence: impl Into<String>) -> Result<T, TlsFilesError> {
    Err(TlsFilesError(sentence.into()))
}

// A client ------------------------------------------------------------------------------------------------------------

/// The files of a client: whom it trusts, and who it says it is.
#[derive(Clone, Debug, Default)]
pub struct ClientFiles {
    /// Where their settings stand.
    pub section: &'static str,
    /// The authorities that may sign the server's certificate. None: the system's.
    pub ca_file: Option<PathBuf>,
    /// Our own certificate, with what signed it. None: we have none to show.
    pub certificate_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

impl ClientFiles {
    /// A configuration of what is in the files now.
    ///
    /// # Errors
    /// A file can not be read, does not fit, or our certificate can not be used.
    pub fn config(&self) -> Result<ClientConfig, TlsFilesError> {
        let trusting = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsFilesError(format!("TLS can not be set up: {error}")))?
            .with_root_certificates(self.authorities()?);
        match self.pair()? {
            None => Ok(trusting.with_no_client_auth()),
            Some((certificate, key)) => {
                let chain = certificates("client certificate", certificate)?;
                self.usable(&chain, certificate)?;
                trusting
                    .with_client_auth_cert(chain, private_key(key)?)
                    .map_err(|error| do_not_fit(certificate, key, &error))
            }
        }
    }

    /// Until when our own certificate counts; none where we have none.
    ///
    /// # Errors
    /// The file can not be read.
    pub fn ends(&self) -> Result<Option<SystemTime>, TlsFilesError> {
        let Some((file, _)) = self.pair()? else {
            return Ok(None);
        };
        let chain = certificates("client certificate", file)?;
        Ok(Some(
            read(&chain, file)?.tbs_certificate.validity.not_after.to_system_time(),
        ))
    }

    fn pair(&self) -> Result<Option<(&Path, &Path)>, TlsFilesError> {
        both(
            self.section,
            ["client_certificate_file", "client_key_file"],
            self.certificate_file.as_deref(),
            self.key_file.as_deref(),
        )
    }

    fn authorities(&self) -> Result<RootCertStore, TlsFilesError> {
        if let Some(path) = &self.ca_file {
            return authorities(path);
        }
        let mut roots = RootCertStore::empty();
        let (_added, _ignored) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Ok(roots)
    }

    /// The server would refuse it, with an alert that says little, or with none.
    fn usable(&self, chain: &[CertificateDer<'_>], file: &Path) -> Result<(), TlsFilesError> {
        let certificate = read(chain, file)?;
        let validity = certificate.tbs_certificate.validity;
        let (since, until) = (
            validity.not_before.to_system_time(),
            validity.not_after.to_system_time(),
        );
        let (now, section) = (SystemTime::now(), self.section);
        if now > until {
            return wrong(format!(
                "the client certificate in {} ended at {}: renew it ({section}.client_certificate_file)",
                file.display(),
                shown(until)
            ));
        }
        if now < since {
            return wrong(format!(
                "the client certificate in {} counts from {} only: is this machine's clock right?",
                file.display(),
                shown(since)
            ));
        }
        let usage = certificate
            .tbs_certificate
            .get::<ExtendedKeyUsage>()
            .map_err(|error| unread("client certificate", file, &error))?;
        // Without the extension it may be used for anything.
        let may = |usage: &ExtendedKeyUsage| {
            usage
                .0
                .iter()
                .any(|one| [ID_KP_CLIENT_AUTH, ANY_EXTENDED_KEY_USAGE].contains(one))
        };
        if usage.is_some_and(|(_, usage)| !may(&usage)) {
            return wrong(format!(
                "the certificate in {} is not for clients (its extended key usage has no clientAuth): \
                 {section}.client_certificate_file wants one that is",
                file.display()
            ));
        }
        Ok(())
    }
}

/// The authorities in a PEM file.
fn authorities(path: &Path) -> Result<RootCertStore, TlsFilesError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("certificate authorities", path)? {
        roots
            .add(certificate)
            .map_err(|error| unread("certificate authorities", path, &error))?;
    }
    Ok(roots)
}

/// The first certificate of a file, which is our own.
fn read(chain: &[CertificateDer<'_>], file: &Path) -> Result<Certificate, TlsFilesError> {
    let own = chain.first().map(|own| own.as_ref()).unwrap_or_default();
    Certificate::from_der(own).map_err(|error| unread("client certificate", file, &error))
}

/// As RFC 3339 writes it.
fn shown(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "a time that no calendar has".to_owned(), |time| time.to_string())
}

// A listener ----------------------------------------------------------------------------------------------------------

/// Whose certificates a listener asks for: nobody without one is spoken with.
#[derive(Clone, Debug)]
pub struct Callers {
    pub ca_file: PathBuf,
    /// Of which a certificate must have one; none: any will do.
    pub names: Vec<String>,
}

impl Callers {
    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsFilesError> {
        let roots = Arc::new(authorities(&self.ca_file)?);
        let signed = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| unread("certificate authorities", &self.ca_file, &error))?;
        let read = |name: &String| {
            ServerName::try_from(name.clone())
                .map_err(|_| TlsFilesError(format!("{name:?} is no name that a certificate has")))
        };
        let names = self.names.iter().map(read).collect::<Result<_, _>>()?;
        Ok(Arc::new(Named { signed, names }))
    }
}

/// Signed by an authority, and of the right name.
#[derive(Debug)]
struct Named {
    signed: Arc<dyn ClientCertVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.signed.verify_client_cert(end_entity, intermediates, now)?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let is_named = |name: &ServerName<'_>| verify_server_name(&certificate, name).is_ok();
        if self.names.is_empty() || self.names.iter().any(is_named) {
            return Ok(verified);
        }
        Err(Error::InvalidCertificate(CertificateError::NotValidForName))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}

/// What a listener speaks TLS with: the newest of its files that could be used.
#[derive(Debug)]
pub struct ListenerFiles {
    certificate: PathBuf,
    key: PathBuf,
    callers: Option<Callers>,
    used: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    /// What the two files were when they were read last.
    seen: [Seen; 2],
    config: Arc<ServerConfig>,
}

/// What tells a file from the one that takes its place.
type Seen = Option<(u64, u64, SystemTime)>;

/// What became of files that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// They did not.
    Same,
    /// They are used from now on.
    Taken,
    /// They can not be used: those before are, until they change again.
    Refused(TlsFilesError),
}

impl ListenerFiles {
    /// As the settings of a section say; none where they name no file.
    ///
    /// # Errors
    /// A sentence about the file, or the setting that is missing.
    pub fn read(
        section: &str,
        certificate_file: Option<&Path>,
        key_file: Option<&Path>,
        callers: Option<Callers>,
    ) -> Result<Option<Self>, TlsFilesError> {
        let names = ["certificate_file", "key_file"];
        let Some((certificate, key)) = both(section, names, certificate_file, key_file)? else {
            return Ok(None);
        };
        let used = Used {
            seen: [seen(certificate), seen(key)],
            config: Arc::new(server_config(certificate, key, callers.as_ref())?),
        };
        Ok(Some(Self {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            callers,
            used: Mutex::new(used),
        }))
    }

    /// For the next connection, and what became of the files since the one before.
    pub fn current(&self) -> (Arc<ServerConfig>, Renewal) {
        let now = [seen(&self.certificate), seen(&self.key)];
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let renewal = if used.seen == now {
            Renewal::Same
        } else {
            used.seen = now;
            match server_config(&self.certificate, &self.key, self.callers.as_ref()) {
                Ok(config) => {
                    used.config = Arc::new(config);
                    Renewal::Taken
                }
                Err(error) => Renewal::Refused(error),
            }
        };
        (Arc::clone(&used.config), renewal)
    }
}

fn seen(path: &Path) -> Seen {
    use std::os::unix::fs::MetadataExt as _;
    let of = std::fs::metadata(path).ok()?;
    Some((of.ino(), of.len(), of.modified().ok()?))
}

/// A server's configuration: its certificate, with what signed it, and its private key, each in a PEM file.
fn server_config(certificate: &Path, key: &Path, callers: Option<&Callers>) -> Result<ServerConfig, TlsFilesError> {
    let building = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsFilesError(format!("TLS can not be set up: {error}")))?;
    let building = match callers {
        Some(callers) => building.with_client_cert_verifier(callers.verifier()?),
        None => building.with_no_client_auth(),
    };
    let mut config = building
        .with_single_cert(certificates("certificate", certificate)?, private_key(key)?)
        .map_err(|error| do_not_fit(certificate, key, &error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

// Both ----------------------------------------------------------------------------------------------------------------

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn unread(what: &str, path: &Path, error: &dyn std::fmt::Display) -> TlsFilesError {
    TlsFilesError(format!("the {what} in {} can not be read: {error}", path.display()))
}

fn do_not_fit(certificate: &Path, key: &Path, error: &dyn std::fmt::Display) -> TlsFilesError {
    TlsFilesError(format!(
        "the certificate in {} and the private key in {} do not fit: {error}",
        certificate.display(),
        key.display()
    ))
}

/// Two settings that go together.
fn both<'a>(
    section: &str,
    [first, second]: [&str; 2],
    certificate: Option<&'a Path>,
    key: Option<&'a Path>,
) -> Result<Option<(&'a Path, &'a Path)>, TlsFilesError> {
    let alone = |set: &str, missing: &str| {
        wrong(format!(
            "{section}.{set} is set and {section}.{missing} is not: set both, or none"
        ))
    };
    match (certificate, key) {
        (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
        (None, None) => Ok(None),
        (Some(_), None) => alone(first, second),
        (None, Some(_)) => alone(second, first),
    }
}

/// The certificates of a PEM file; at least one.
fn certificates(what: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFilesError> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unread(what, path, &error))?;
    if certificates.is_empty() {
        return wrong(format!(
            "{} holds no certificate; it must be a PEM file",
            path.display()
        ));
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFilesError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| unread("private key", path, &error))
}

/// Whether a host's name or address is this machine itself, so that plaintext stays inside it.
pub fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

//! What both connections share: whom to trust, and which hosts need no encryption.

use std::{net::IpAddr, path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// A client configuration that trusts the authorities in `ca_file`, or the system's where none is given.
///
/// # Errors
/// A sentence about the file.
pub fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let wrong = |error: &dyn std::fmt::Display| {
                format!(
                    "the certificate authorities in {} can not be read: {error}",
                    path.display()
                )
            };
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| wrong(&error))? {
                let certificate = certificate.map_err(|error| wrong(&error))?;
                roots.add(certificate).map_err(|error| wrong(&error))?;
            }
            if roots.is_empty() {
                return Err(format!(
                    "{} holds no certificate; it must be a PEM file",
                    path.display()
                ));
            }
        }
        None => {
            let (_added, _ignored) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can not be set up: {error}"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

/// A server's configuration: its certificate, with what signed it, and its private key, each in a PEM file.
///
/// # Errors
/// A sentence about the file. It repeats nothing of what is in it.
pub fn server_config(certificate_file: &Path, key_file: &Path) -> Result<ServerConfig, String> {
    let unread = |what: &str, path: &Path, error: &dyn std::fmt::Display| {
        format!("the {what} in {} can not be read: {error}", path.display())
    };
    let certificates = CertificateDer::pem_file_iter(certificate_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unread("certificate", certificate_file, &error))?;
    if certificates.is_empty() {
        return Err(format!(
            "{} holds no certificate; it must be a PEM file",
            certificate_file.display()
        ));
    }
    let key = PrivateKeyDer::from_pem_file(key_file).map_err(|error| unread("private key", key_file, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can not be set up: {error}"))?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|error| {
            format!(
                "the certificate in {} and the private key in {} do not fit: {error}",
                certificate_file.display(),
                key_file.display()
            )
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Whether a host's name or address is this machine itself, so that plaintext stays inside it.
pub fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

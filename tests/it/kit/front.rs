//! A TLS front before a server: takes TLS connections and hands their content on in plaintext.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    RootCertStore, ServerConfig, ServerConnection,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::support::Beside;

pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    config: Arc<Mutex<Arc<ServerConfig>>>,
    cut: watch::Sender<()>,
    _open: Beside,
}

/// What it shows, and whose clients it lets in; of anybody where none is named.
fn config(certificate: &Path, key: &Path, clients: Option<&Path>) -> Arc<ServerConfig> {
    let read = |path: &Path| {
        let chain = CertificateDer::pem_file_iter(path).expect("a certificate");
        chain.collect::<Result<Vec<_>, _>>().expect("a certificate")
    };
    let key = PrivateKeyDer::from_pem_file(key).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let building = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("versions");
    let building = match clients {
        None => building.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(read(authority));
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            building.with_client_cert_verifier(verifier.expect("an authority"))
        }
    };
    let config = building.with_single_cert(read(certificate), key);
    Arc::new(config.expect("a server's certificate"))
}

impl Front {
    pub(crate) async fn open(upstream: String, certificate: &Path, key: &Path) -> Self {
        Self::asking(upstream, certificate, key, None).await
    }

    /// One that asks its clients for a certificate of an authority.
    pub(crate) async fn asking(upstream: String, certificate: &Path, key: &Path, clients: Option<&Path>) -> Self {
        let config = Arc::new(Mutex::new(config(certificate, key, clients)));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shown = Arc::clone(&config);
        let (cut, is_cut) = watch::channel(());
        let open = Beside::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let config = Arc::clone(&shown.lock().unwrap_or_else(PoisonError::into_inner));
                let (upstream, mut is_cut) = (upstream.clone(), is_cut.clone());
                is_cut.mark_unchanged();
                tokio::spawn(async move {
                    // The end of either side ends both; who spoke through it notices.
                    tokio::select! {
                        ended = pass(client, &upstream, config) => drop(ended),
                        cut = is_cut.changed() => drop(cut),
                    }
                });
            }
        });
        Self {
            address,
            config,
            cut,
            _open: open,
        }
    }

    /// What connections from now on meet.
    pub(crate) fn show(&self, certificate: &Path, key: &Path, clients: Option<&Path>) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config(certificate, key, clients);
    }

    /// Ends every connection that there is.
    pub(crate) fn cut(&self) {
        self.cut.send_replace(());
    }
}

/// Passes everything on, both ways, until one side ends.
async fn pass(mut client: TcpStream, upstream: &str, config: Arc<ServerConfig>) -> std::io::Result<()> {
    let mut server = TcpStream::connect(upstream).await?;
    let mut tls = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let (mut secret, mut plain) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        while tls.wants_write() {
            let mut records = Vec::new();
            tls.write_tls(&mut records)?;
            client.write_all(&records).await?;
        }
        tokio::select! {
            read = client.read(&mut secret) => {
                let read = read?;
                let mut records = secret.get(..read).unwrap_or_default();
                if records.is_empty() {
                    return Ok(());
                }
                while !records.is_empty() {
                    tls.read_tls(&mut records)?;
                    let refused = tls.process_new_packets().map_err(std::io::Error::other);
                    if refused.is_err() {
                        let mut alert = Vec::new();
                        tls.write_tls(&mut alert)?;
                        client.write_all(&alert).await?;
                    }
                    let waiting = refused?.plaintext_bytes_to_read();
                    let mut text = vec![0; waiting];
                    tls.reader().read_exact(&mut text)?;
                    server.write_all(&text).await?;
                }
            }
            read = server.read(&mut plain), if !tls.is_handshaking() => {
                let read = read?;
                if read == 0 {
                    return Ok(());
                }
                tls.writer().write_all(plain.get(..read).unwrap_or_default())?;
            }
        }
    }
}

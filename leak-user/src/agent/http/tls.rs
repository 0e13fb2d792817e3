//! TLS of the server, by rustls with ring.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

use crate::agent::config::Mistake;
use crate::agent::files::certificates;

/// A certificate with its key.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

impl Tls {
    /// Reads both from PEM files, the server's own certificate first.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, Mistake> {
        let chain = certificates(certificate).map_err(|what| Mistake::new("tls_certificate", what))?;
        let failed = |what: String| Mistake::new("tls_key", format!("{}: {what}", key.display()));
        let private = PrivateKeyDer::from_pem_file(key)
            .map_err(|error| failed(format!("holds no private key that can be read: {error}")))?;
        let made = || -> Result<ServerConfig, rustls::Error> {
            let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_no_client_auth()
                .with_single_cert(chain, private)?;
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            Ok(config)
        };
        let config = made().map_err(|error| failed(format!("does not fit the certificate: {error}")))?;
        Ok(Self(Arc::new(config)))
    }

    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(self, stream: S) -> io::Result<TlsStream<S>> {
        tokio_rustls::TlsAcceptor::from(self.0).accept(stream).await
    }
}

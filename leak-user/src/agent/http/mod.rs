//! The agent's server: HTTP/1.1 by hyper, routes by axum, TLS by rustls. Who may ask what is in [`access`], what is answered in
//! [`routes`].
//!
//! Everything a client can make the server hold is bounded: connections, the time in which a request must have come and an answer must
//! have been taken, the size of a request, how long a connection lasts. axum and hyper were chosen because they are what tokio's own people
//! keep; the loop that accepts is here because only hyper's builder below axum has the limits.

mod access;
mod routes;
mod tls;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;

pub use self::access::Token;
use self::tls::Tls;
use super::Published;
use super::config::{Mistake, Text, address, path, size, time};

/// A connection is closed after this time, so that clients that take their answer byte by byte cannot hold all of them.
const LIFE: Duration = Duration::from_mins(1);
/// Until it is tried again to accept a connection where that failed for want of something.
const REST: Duration = Duration::from_millis(100);
/// hyper wants a buffer of at least this size.
const LEAST_REQUEST: u64 = 8 << 10;
const MOST_CONNECTIONS: usize = 4096;

/// `[http]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    listen: String,
    token_file: Option<PathBuf>,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    max_connections: usize,
    max_request_bytes: Text,
    timeout: Text,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:9790".to_owned(),
            token_file: None,
            tls_certificate: None,
            tls_key: None,
            max_connections: 64,
            max_request_bytes: Text("16KiB".to_owned()),
            timeout: Text("10s".to_owned()),
        }
    }
}

/// `[http]`, checked.
#[derive(Clone)]
pub struct Settings {
    pub listen: SocketAddr,
    pub security: Security,
    pub max_connections: usize,
    /// Bytes of a request's head, and of its body.
    pub max_request: usize,
    /// For a request to come, and for an answer to be taken on.
    pub timeout: Duration,
}

/// Who may ask, and what is seen on the way.
#[derive(Clone)]
pub struct Security {
    pub token: Option<Token>,
    tls: Option<Tls>,
}

impl Config {
    /// Checks the values, and reads the files that they name.
    pub fn check(&self) -> Result<Settings, Mistake> {
        let listen = address("listen", &self.listen)?;
        let token = self.token_file.as_deref().map(|file| Token::read(&path("token_file", file)?)).transpose()?;
        if token.is_none() && !listen.ip().is_loopback() {
            let what = format!(
                "{} can be reached from other hosts, and without a token anybody could read what runs here: set http.token_file, or \
                 listen on 127.0.0.1",
                self.listen
            );
            return Err(Mistake::new("listen", what));
        }
        if !(1..=MOST_CONNECTIONS).contains(&self.max_connections) {
            return Err(Mistake::new("max_connections", format!("must be a number from 1 to {MOST_CONNECTIONS}")));
        }
        let pem = |key: &str, file: &Path| path(key, file);
        let tls = match (&self.tls_certificate, &self.tls_key) {
            (Some(certificate), Some(key)) => {
                Some(Tls::read(&pem("tls_certificate", certificate)?, &pem("tls_key", key)?)?)
            }
            (None, None) => None,
            (Some(_), None) => return Err(Mistake::new("tls_certificate", "needs http.tls_key too")),
            (None, Some(_)) => return Err(Mistake::new("tls_key", "needs http.tls_certificate too")),
        };
        Ok(Settings {
            listen,
            security: Security { token, tls },
            max_connections: self.max_connections,
            max_request: size("max_request_bytes", &self.max_request_bytes, LEAST_REQUEST, 1 << 20)? as usize,
            timeout: time("timeout", &self.timeout, Duration::from_millis(100), Duration::from_mins(5))?,
        })
    }
}

/// Takes the port; nothing is answered before [`serve`].
pub async fn bind(listen: SocketAddr) -> Result<TcpListener> {
    let bound = TcpListener::bind(listen).await;
    bound.with_context(|| format!("failed to listen on {listen} (http.listen): is another agent running there?"))
}

/// Answers until `stop` is true.
pub async fn serve(listener: TcpListener, published: Arc<Published>, mut stop: watch::Receiver<bool>) {
    let http = published.settings.borrow().http.clone();
    let connections = Arc::new(Semaphore::new(http.max_connections));
    let router = routes::router(&published, http.max_request);
    loop {
        let permit = tokio::select! {
            permit = Arc::clone(&connections).acquire_owned() => permit,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        // It is closed by nobody.
        let Ok(permit) = permit else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let tls = published.settings.borrow().http.security.tls.clone();
                let connection = Connection { router: router.clone(), tls, limits: http.clone(), stop: stop.clone() };
                tokio::spawn(connection.run(stream, permit));
            }
            Err(error) => {
                log::debug!("a connection cannot be accepted: {error}");
                published.status.count("http", "refused");
                sleep(REST).await;
            }
        }
    }
}

/// One connection, from the first byte on.
struct Connection {
    router: axum::Router,
    tls: Option<Tls>,
    limits: Settings,
    stop: watch::Receiver<bool>,
}

impl Connection {
    async fn run(self, stream: TcpStream, _permit: OwnedSemaphorePermit) {
        // An answer is one piece, which is not to wait for the next.
        let _ = stream.set_nodelay(true);
        let mut stream = Box::pin(TimeoutStream::new(stream));
        stream.as_mut().set_write_timeout_pinned(Some(self.limits.timeout));
        let Some(tls) = self.tls.clone() else { return self.answer(stream).await };
        match timeout(self.limits.timeout, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.answer(stream).await,
            Ok(Err(error)) => log::debug!("a client has ended the handshake of TLS: {error}"),
            Err(_) => log::debug!("a client was too slow in the handshake of TLS"),
        }
    }

    async fn answer(mut self, stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(self.limits.timeout).max_buf_size(self.limits.max_request);
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(self.router));
        let mut connection = pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return log_end(ended),
            () = sleep(LIFE) => {}
            _ = self.stop.wait_for(|stop| *stop) => {}
        }
        connection.as_mut().graceful_shutdown();
        if let Ok(ended) = timeout(self.limits.timeout, connection).await {
            log_end(ended);
        }
    }
}

fn log_end(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        log::debug!("a connection has ended: {error}");
    }
}

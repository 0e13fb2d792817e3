//! Servers that an agent pushes to, which come and go, answer errors, or late, or not at all.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// What is done to each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Takes,
    Answers(&'static str),
    Late,
    /// Takes the request and says nothing.
    Hangs,
    /// Closes the connection without an answer.
    Leaves,
    /// Nobody is there.
    Down,
}

impl Manner {
    /// All of them; the good one more often, or hardly anything would ever arrive.
    pub const ALL: [Self; 12] = [
        Self::Takes,
        Self::Takes,
        Self::Takes,
        Self::Takes,
        Self::Answers("503 Service Unavailable\r\nRetry-After: 2"),
        Self::Answers("429 Too Many Requests\r\nRetry-After: Thu, 01 Jan 1970 00:00:01 GMT"),
        Self::Answers("400 Bad Request"),
        Self::Answers("500 Internal Server Error"),
        Self::Late,
        Self::Hangs,
        Self::Leaves,
        Self::Down,
    ];
}

struct Shared {
    path: &'static str,
    manner: Mutex<Manner>,
    /// Requests that were taken, and others.
    taken: AtomicU64,
    others: AtomicU64,
    /// Requests that make no sense.
    wrong: AtomicU64,
}

impl Shared {
    fn manner(&self) -> Manner {
        *self.manner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers one request after another, as long as that is the manner.
    fn answer(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
            let mut length = 0;
            while line != "\r\n" {
                line.clear();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap_or(0);
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body)?;
            if body.is_empty() || path != self.path {
                self.wrong.fetch_add(1, Ordering::Relaxed);
            }
            let manner = self.manner();
            let count = if matches!(manner, Manner::Takes | Manner::Late) { &self.taken } else { &self.others };
            count.fetch_add(1, Ordering::Relaxed);
            match manner {
                Manner::Takes => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?,
                Manner::Late => {
                    thread::sleep(Duration::from_millis(400));
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
                }
                Manner::Answers(status) => {
                    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 7\r\n\r\nnot now")?;
                }
                Manner::Hangs => {
                    let start = Instant::now();
                    while self.manner() == Manner::Hangs && start.elapsed() < Duration::from_secs(20) {
                        thread::sleep(Duration::from_millis(20));
                    }
                    return Ok(());
                }
                Manner::Leaves | Manner::Down => return Ok(()),
            }
        }
    }
}

/// A server at an address that stays the same. Ends when dropped.
pub struct Endpoint {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Takes what comes for this path.
    pub fn start(path: &'static str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let shared = Shared {
            path,
            manner: Mutex::new(Manner::Takes),
            taken: AtomicU64::new(0),
            others: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
        };
        let mut endpoint = Self { address: listener.local_addr()?, shared: Arc::new(shared), listening: None };
        endpoint.listen(listener);
        Ok(endpoint)
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How many requests were taken, and how many were not.
    pub fn counts(&self) -> Result<(u64, u64)> {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ensure!(count(&self.shared.wrong) == 0, "{}: requests that make no sense", self.shared.path);
        Ok((count(&self.shared.taken), count(&self.shared.others)))
    }

    fn listen(&mut self, listener: TcpListener) {
        let shared = Arc::clone(&self.shared);
        self.listening = Some(thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if shared.manner() == Manner::Down {
                    return;
                }
                let shared = Arc::clone(&shared);
                // Who goes away in between is no fault.
                thread::spawn(move || drop(shared.answer(&stream)));
            }
        }));
    }

    /// From the next request on.
    pub fn behave(&mut self, manner: Manner) -> Result<()> {
        let set = |manner| *self.shared.manner.lock().unwrap_or_else(PoisonError::into_inner) = manner;
        if manner == Manner::Down {
            set(manner);
            self.close();
        } else if self.listening.is_none() {
            let listener = TcpListener::bind(self.address).context("failed to listen where it listened before")?;
            set(manner);
            self.listen(listener);
        } else {
            set(manner);
        }
        Ok(())
    }

    fn close(&mut self) {
        if let Some(listening) = self.listening.take() {
            // So that it notices.
            let _ = TcpStream::connect(self.address);
            let _ = listening.join();
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        *self.shared.manner.lock().unwrap_or_else(PoisonError::into_inner) = Manner::Down;
        self.close();
    }
}

//! Serves the page, and as a report whatever a test says: what an agent does, without one.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::page;
use anyhow::Result;

/// What `/api/v1/report` answers.
#[derive(Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub body: String,
    pub token: Option<String>,
}

/// A server on a port of its own; ends with the test's process, or when dropped.
pub struct Server {
    address: SocketAddr,
    answer: Arc<Mutex<Answer>>,
}

impl Server {
    pub fn start(port: u16) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port))?;
        let address = listener.local_addr()?;
        let answer = Arc::new(Mutex::new(Answer::default()));
        let weak = Arc::downgrade(&answer);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(answer) = weak.upgrade() else { return };
                let answer = answer.lock().map(|answer| answer.clone()).unwrap_or_default();
                thread::spawn(move || {
                    // Who goes away does not want the answer.
                    let _ = serve(&stream, &answer);
                });
            }
        });
        Ok(Self { address, answer })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    pub fn report(&self, report: &leak_user::report::Report) {
        self.answer(Answer { status: 200, body: serde_json::to_string(report).unwrap(), token: None });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread, which then finds that nobody has the answer any more.
        self.answer = Arc::default();
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(mut stream: &TcpStream, answer: &Answer) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_mins(1)))?;
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut authorization = None;
    for line in lines.by_ref() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("authorization")
        {
            authorization = Some(value.to_owned());
        }
    }
    let path = first.split([' ', '?']).nth(1).unwrap_or_default();
    let allowed = answer.token.as_ref().is_none_or(|token| authorization == Some(format!("Bearer {token}")));
    let (status, content_type, body) = match page::asset(path) {
        Some((content_type, body)) => (200, content_type, body),
        None if path == "/api/v1/report" && !allowed => (401, "text/plain", &b"a token is needed"[..]),
        None if path == "/api/v1/report" => (answer.status, "application/json", answer.body.as_bytes()),
        None => (404, "text/plain", &b"not here"[..]),
    };
    write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\nContent-Security-Policy: {}\r\n\
         X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n",
        body.len(),
        page::POLICY
    )?;
    stream.write_all(body)?;
    Ok(())
}

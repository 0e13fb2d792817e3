//! A Kubernetes API server on loopback, as far as pods and Events go, that can be told to misbehave.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What it does to each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// As it should.
    Well,
    /// Answers, but only after a while.
    Slow,
    /// HTTP 500, or 403, with a reason.
    Broken,
    Forbidding,
    /// Closes the connection at once, or in the middle of an answer.
    Hanging,
    Halfway,
    /// Bytes that are no HTTP, or no JSON, or JSON of another kind.
    Noise,
    NoJson,
    OtherJson,
    /// A line without an end.
    Endless,
    /// Watches end with HTTP 410 inside.
    Gone,
    /// Never answers.
    Silent,
}

struct Inner {
    mood: Mutex<Mood>,
    /// Requests that met the mood since it was set.
    met: AtomicUsize,
    pods: Mutex<(u64, BTreeMap<String, Value>)>,
    events: Mutex<BTreeMap<String, Value>>,
    /// What was asked for, without what the mood did of it.
    asked: Mutex<Vec<String>>,
    /// A bearer token that every request has to show.
    token: Option<String>,
    /// A client took all of an answer without an end.
    unbounded: AtomicBool,
    stop: AtomicBool,
}

/// Ends, with its connections, when dropped.
pub struct Server {
    address: SocketAddr,
    inner: Arc<Inner>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Relaxed);
        // So that it notices.
        let _ = TcpStream::connect(self.address);
    }
}

impl Server {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// One that asks for a bearer token, if one is given.
    pub fn start_with(token: Option<&str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let inner = Arc::new(Inner {
            mood: Mutex::new(Mood::Well),
            met: AtomicUsize::new(0),
            pods: Mutex::default(),
            events: Mutex::default(),
            asked: Mutex::default(),
            token: token.map(str::to_owned),
            unbounded: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let shared = Arc::clone(&inner);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&shared);
                if let Ok(stream) = stream {
                    // A client that went away is none of our business.
                    std::thread::spawn(move || drop(shared.answer(&stream)));
                }
            }
        });
        Self { address, inner }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on; what it did before is cut off.
    pub fn set_mood(&self, mood: Mood) {
        *self.inner.mood.lock().expect("no panic") = mood;
        self.inner.met.store(0, Ordering::SeqCst);
    }

    /// How many requests have met the mood.
    pub fn met(&self) -> usize {
        self.inner.met.load(Ordering::SeqCst)
    }

    /// Whether no client took a gigabyte as an answer.
    pub fn met_bounds(&self) -> bool {
        !self.inner.unbounded.load(Ordering::SeqCst)
    }

    /// Puts these pods in the place of all others.
    pub fn set_pods(&self, pods: BTreeMap<String, Value>) {
        let mut current = self.inner.pods.lock().expect("no panic");
        *current = (current.0 + 1, pods);
    }

    pub fn events(&self) -> Vec<Value> {
        self.inner.events.lock().expect("no panic").values().cloned().collect()
    }

    pub fn asked(&self) -> Vec<String> {
        self.inner.asked.lock().expect("no panic").clone()
    }
}

fn reply(mut stream: &TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn refusal(code: u16, reason: &str, message: &str) -> String {
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message })
        .to_string()
}

impl Inner {
    fn mood(&self) -> Mood {
        *self.mood.lock().expect("no panic")
    }

    fn answer(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let (mut length, mut shown) = (0, None);
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header == "\r\n" {
                break;
            }
            match header.split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().unwrap_or(0);
                }
                Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                    shown = value.trim().strip_prefix("Bearer ").map(str::to_owned);
                }
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        {
            let mut asked = self.asked.lock().expect("no panic");
            if asked.len() < 10_000 {
                asked.push(format!("{} {target}", line.split(' ').next().unwrap_or_default()));
            }
        }
        if self.token.is_some() && self.token != shown {
            return reply(stream, "401 Unauthorized", &refusal(401, "Unauthorized", "Unauthorized"));
        }
        let mood = self.mood();
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
        let done = match mood {
            Mood::Slow => {
                std::thread::sleep(Duration::from_millis(300));
                self.met.fetch_add(1, Ordering::SeqCst);
                return self.well(stream, &target, &body);
            }
            Mood::Broken => reply(stream, "500 Internal Server Error", "out of \u{1b}[2J order"),
            Mood::Forbidding => {
                let message = "pods is forbidden: User \"leaktrace\" cannot list resource \"pods\"";
                reply(stream, "403 Forbidden", &refusal(403, "Forbidden", message))
            }
            Mood::Hanging => Ok(()),
            Mood::Halfway => write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{{\"items\": [{{"),
            Mood::Noise => stream.write_all(&(0..4096_u32).map(|n| (n * 31 % 251) as u8).collect::<Vec<u8>>()),
            Mood::NoJson => write!(stream, "{head}<html>not what you think</html>\n\u{1b}[2J\n"),
            Mood::OtherJson => {
                let pods = json!([{ "metadata": { "name": 7 } }, { "spec": [] }, null]);
                writeln!(stream, "{head}{}", json!({ "metadata": {}, "items": pods, "type": "MODIFIED", "object": 3 }))
            }
            Mood::Endless => {
                let sent = stream.write_all(head.as_bytes()).and_then(|()| {
                    let piece = vec![b'x'; 1 << 20];
                    (0..1024).try_for_each(|_| stream.write_all(&piece))
                });
                self.unbounded.fetch_or(sent.is_ok(), Ordering::SeqCst);
                Ok(())
            }
            Mood::Gone if target.contains("watch=true") => {
                let status: Value = serde_json::from_str(&refusal(410, "Expired", "too old resource version"))?;
                writeln!(stream, "{head}{}", json!({ "type": "ERROR", "object": status }))
            }
            Mood::Well | Mood::Gone => return self.well(stream, &target, &body),
            Mood::Silent => {
                self.met.fetch_add(1, Ordering::SeqCst);
                let start = Instant::now();
                while self.mood() == Mood::Silent && start.elapsed() < Duration::from_mins(1) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                return Ok(());
            }
        };
        self.met.fetch_add(1, Ordering::SeqCst);
        done
    }

    fn well(&self, stream: &TcpStream, target: &str, body: &[u8]) -> std::io::Result<()> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let parameter = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        if path.starts_with("/apis/events.k8s.io/v1/namespaces/") {
            return self.event(stream, body);
        }
        if path != "/api/v1/pods" {
            return reply(stream, "404 Not Found", &refusal(404, "NotFound", "no such resource"));
        }
        if parameter("watch") == Some("true") {
            let since = parameter("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
            let seconds = parameter("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).unwrap_or(300);
            return self.watch(stream, since, Duration::from_secs(seconds));
        }
        let (version, pods) = self.pods.lock().expect("no panic").clone();
        let limit = parameter("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let first = parameter("continue").and_then(|from| from.parse().ok()).unwrap_or(0);
        let items: Vec<&Value> = pods.values().skip(first).take(limit).collect();
        let more = (first + items.len() < pods.len()).then(|| (first + items.len()).to_string());
        let metadata = json!({ "resourceVersion": version.to_string(), "continue": more });
        let list = json!({ "kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items });
        reply(stream, "200 OK", &list.to_string())
    }

    /// Sends what changes from then on, and bookmarks.
    fn watch(&self, mut stream: &TcpStream, mut since: u64, length: Duration) -> std::io::Result<()> {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")?;
        let (start, mood) = (Instant::now(), self.mood());
        let mut before = self.pods.lock().expect("no panic").1.clone();
        // It may have fallen behind before it asked.
        let mut behind = self.pods.lock().expect("no panic").0 > since;
        while start.elapsed() < length && self.mood() == mood && !self.stop.load(Ordering::Relaxed) {
            let (version, pods) = self.pods.lock().expect("no panic").clone();
            if version > since {
                let with = |pod: &Value| {
                    let mut pod = pod.clone();
                    pod["metadata"]["resourceVersion"] = version.to_string().into();
                    pod
                };
                let gone =
                    before.iter().filter(|(uid, _)| !pods.contains_key(*uid)).map(|(_, pod)| ("DELETED", with(pod)));
                let there = pods.iter().filter(|(uid, pod)| behind || before.get(*uid) != Some(pod));
                let there =
                    there.map(|(uid, pod)| (if before.contains_key(uid) { "MODIFIED" } else { "ADDED" }, with(pod)));
                for (kind, pod) in gone.chain(there) {
                    writeln!(stream, "{}", json!({ "type": kind, "object": pod }))?;
                }
                (since, before, behind) = (version, pods, false);
                let metadata = json!({ "resourceVersion": version.to_string() });
                let bookmark = json!({ "kind": "Pod", "apiVersion": "v1", "metadata": metadata });
                writeln!(stream, "{}", json!({ "type": "BOOKMARK", "object": bookmark }))?;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn event(&self, stream: &TcpStream, body: &[u8]) -> std::io::Result<()> {
        let event: Value = serde_json::from_slice(body)?;
        let name = event["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let mut events = self.events.lock().expect("no panic");
        if events.contains_key(&name) {
            return reply(stream, "409 Conflict", &refusal(409, "AlreadyExists", "it is there"));
        }
        events.insert(name, event.clone());
        reply(stream, "201 Created", &event.to_string())
    }
}

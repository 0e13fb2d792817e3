//! Runs the agent and asks it over HTTP.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::compile::Program;
use crate::fixture::{Builder, Fixture};
use crate::leaktrace::{Leaktrace, Outcome, Running};
use crate::patience;

/// A `leaktrace agent` that serves on a port of its own; killed when dropped.
pub struct Agent {
    running: Running,
    client: Client,
}

/// Asks an agent; for any thread.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    address: SocketAddr,
}

impl Deref for Agent {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// What it answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The head, as it came.
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("failed to read {self:?}"))
    }
}

/// The value of a series of a page of metrics, chosen by the start of its line.
pub fn metric(page: &str, series: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(series)?.rsplit_once(' ')?.1.parse().ok())
}

impl Agent {
    /// Starts one that keeps its state in a folder, with more arguments, and waits until it serves.
    pub fn start<'a>(state: &Path, args: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        Self::start_with(Leaktrace::new()?, state, args)
    }

    /// The same with a command line that was begun elsewhere.
    pub fn start_with<'a>(leaktrace: Leaktrace, state: &Path, args: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut running =
            leaktrace.args(["agent", "--listen", "127.0.0.1:0", "--state"]).arg(state).args(args).spawn()?;
        let line = running.wait_stderr("listening on ")?;
        let address = line.rsplit_once(' ').and_then(|(_, address)| address.parse().ok());
        let address = address.with_context(|| format!("failed to find the address in {line:?}"))?;
        Ok(Self { running, client: Client { address } })
    }

    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    pub fn running(&mut self) -> &mut Running {
        &mut self.running
    }

    pub fn signal(&self, signal: i32) -> Result<()> {
        self.running.signal(signal)
    }

    /// Ends it by SIGTERM.
    pub fn stop(self) -> Result<Outcome> {
        self.signal(libc::SIGTERM)?;
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(self) -> Result<Outcome> {
        self.running.finish(patience())
    }
}

/// What an agent is to trace: a copy of `leak_slow` in a folder of its own, by the path of which it is chosen.
pub struct Traced {
    folder: TempDir,
}

impl Traced {
    pub fn new() -> Result<Self> {
        let traced = Self { folder: tempfile::tempdir()? };
        traced.replace(&Program::c("leak_slow").build()?)?;
        Ok(traced)
    }

    /// Where the program is, and the agent's configuration and state.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn config(&self) -> PathBuf {
        self.folder().join("agent.toml")
    }

    fn program(&self) -> PathBuf {
        self.folder().join("leak_slow")
    }

    /// Puts another program in its place; processes keep what they run.
    pub fn replace(&self, program: &Path) -> Result<()> {
        let new = self.folder().join("new");
        fs::copy(program, &new)?;
        fs::rename(new, self.program()).context("failed to replace the program")
    }

    /// A process of it, which leaks 200 kB each second.
    pub fn builder(&self) -> Builder {
        Fixture::builder(&self.program()).arg("--rate").arg("200000").arg("--block").arg("512")
    }

    /// Writes the configuration: the program is traced at once and wholly, with two reports a second. `rest` is more keys of `[trace]`, and
    /// other sections.
    pub fn configure(&self, rest: &str) -> Result<()> {
        let interval = if rest.starts_with("interval = ") { "" } else { "interval = '500ms'\n" };
        let exe = self.program();
        let text = format!("[trace]\nexe = '{}'\nmax_overhead = 'off'\nall = true\n{interval}{rest}", exe.display());
        fs::write(self.config(), text).context("failed to write the configuration")
    }

    /// Starts an agent with that configuration.
    pub fn agent(&self) -> Result<Agent> {
        self.agent_with(Leaktrace::new()?)
    }

    /// The same with a command line that was begun elsewhere.
    pub fn agent_with(&self, leaktrace: Leaktrace) -> Result<Agent> {
        let config = self.config();
        let config = config.to_str().context("the folder's name is text")?;
        Agent::start_with(leaktrace, &self.folder().join("state"), ["--config", config])
    }
}

impl Client {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Asks for a path.
    pub fn get(&self, path: &str) -> Result<Answer> {
        self.ask(path, "")
    }

    /// The same with lines in the head, each with its end.
    pub fn ask(&self, path: &str, lines: &str) -> Result<Answer> {
        let host = if lines.to_ascii_lowercase().contains("host:") { "" } else { "Host: localhost\r\n" };
        self.say(format!("GET {path} HTTP/1.1\r\n{host}Connection: close\r\n{lines}\r\n").as_bytes())
            .with_context(|| format!("failed to ask for {path}"))
    }

    /// Sends bytes and reads the answer.
    pub fn say(&self, request: &[u8]) -> Result<Answer> {
        let mut stream = self.connect()?;
        // Where the request is refused before it has come whole, the rest cannot be sent.
        let sent = stream.write_all(request);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if answer.is_empty() => return Err(error).context(format!("sent: {sent:?}")),
            _ => {}
        }
        let end =
            answer.windows(4).position(|four| four == b"\r\n\r\n").context("the answer has no end of its head")?;
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("failed to find the status in {head:?}"))?;
        Ok(Answer { status, head, body: answer[end + 4..].to_vec() })
    }

    /// A connection on which nothing takes for ever.
    pub fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(patience()))?;
        stream.set_write_timeout(Some(patience()))?;
        Ok(stream)
    }

    /// Asks until the answer is `wanted`.
    pub fn wait_for(&self, path: &str, wanted: impl FnMut(&Answer) -> bool) -> Result<Answer> {
        self.wait_longer(path, patience(), wanted)
    }

    /// The same for so long.
    pub fn wait_longer(&self, path: &str, limit: Duration, mut wanted: impl FnMut(&Answer) -> bool) -> Result<Answer> {
        let start = Instant::now();
        loop {
            let answer = self.get(path)?;
            if wanted(&answer) {
                return Ok(answer);
            }
            if start.elapsed() > limit {
                bail!("{path} did not become what was waited for: {}\n{}", answer.head, answer.text());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

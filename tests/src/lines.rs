//! Lines of a child's output as they come, with a limit on how long to wait for one.

use std::io::{BufRead as _, BufReader, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Reads a pipe to its end on a thread of its own, so that the child never blocks on a full one.
pub(crate) struct Lines {
    lines: Receiver<String>,
    /// What was received, for messages and for the outcome.
    seen: String,
}

impl Lines {
    pub(crate) fn of(pipe: impl Read + Send + 'static) -> Self {
        let (sender, lines) = channel();
        thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            // Bytes, because what a traced program is called may not be UTF-8.
            while pipe.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        });
        Self { lines, seen: String::new() }
    }

    /// The next line, without its end; `None` at the end of the stream.
    pub(crate) fn next(&mut self, deadline: Instant) -> Result<Option<String>> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.seen.push_str(&line);
                Ok(Some(line.trim_end_matches('\n').to_owned()))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("timed out waiting for a line after {:?}", self.seen),
        }
    }

    /// The next line that `wanted` accepts.
    pub(crate) fn wait_for(&mut self, wanted: impl Fn(&str) -> bool, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        while let Some(line) = self.next(deadline)? {
            if wanted(&line) {
                return Ok(line);
            }
        }
        bail!("the output ended before the awaited line: {:?}", self.seen)
    }

    /// Everything up to the end of the stream.
    pub(crate) fn read_to_end(&mut self, deadline: Instant) -> Result<&str> {
        while self.next(deadline)?.is_some() {}
        Ok(&self.seen)
    }
}

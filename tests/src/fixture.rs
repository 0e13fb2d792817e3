//! A running fixture: started, told what to do, asked for what it knows of itself, and ended.
//!
//! The protocol is lines. A fixture prints `ready PID` once it is set up, then answers each command line with one line: `ok`
//! followed by what there is to say, one JSON object, or `error` and why. It allocates nothing by itself between commands.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lines::Lines;
use crate::patience;
use crate::start::start;

/// How to start a fixture.
pub struct Builder {
    command: Command,
    patience: Duration,
}

impl Builder {
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.command.arg(arg.into());
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Keeps signals of the terminal, such as Ctrl-C, away from it.
    #[must_use]
    pub fn own_process_group(mut self) -> Self {
        self.command.process_group(0);
        self
    }

    /// How long a single command may take, for those that do much.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// For what the methods here do not cover, such as another root folder.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it and waits until it is ready.
    pub fn start(mut self) -> Result<Fixture> {
        let program = self.command.get_program().to_owned();
        let mut child = start(self.command.stdin(Stdio::piped()).stdout(Stdio::piped()))
            .with_context(|| format!("failed to start {}", program.display()))?;
        let stdin = child.stdin.take();
        let output = Lines::of(child.stdout.take().context("failed to take the fixture's standard output")?);
        let mut fixture = Fixture { pid: child.id(), child, stdin, output, patience: self.patience };
        fixture.wait_ready()?;
        Ok(fixture)
    }
}

/// A fixture that runs; killed when dropped.
pub struct Fixture {
    child: Child,
    /// Of the process that last said `ready`, which is not the child where that is a launcher.
    pid: u32,
    stdin: Option<ChildStdin>,
    output: Lines,
    patience: Duration,
}

impl Fixture {
    /// Compiles the C fixture `name` with the usual flags and starts it without arguments.
    pub fn start(name: &str) -> Result<Self> {
        Self::builder(&crate::Program::c(name).build()?).start()
    }

    pub fn builder(program: &Path) -> Builder {
        Builder { command: Command::new(program), patience: patience() }
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for a `ready` line: once at the start, and again after a command that makes the fixture execve itself.
    pub fn wait_ready(&mut self) -> Result<()> {
        let line = self
            .output
            .wait_for(|line| line.starts_with("ready "), self.patience)
            .context("failed to wait for the fixture's ready line")?;
        self.pid =
            line["ready ".len()..].trim().parse().with_context(|| format!("failed to read a pid from {line:?}"))?;
        Ok(())
    }

    /// Writes a command and returns without waiting for its answer.
    pub fn send(&mut self, command: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("failed to send a command: the fixture's input is closed")?;
        writeln!(stdin, "{command}").with_context(|| format!("failed to send {command:?} to the fixture"))
    }

    /// The next line that the fixture prints.
    pub fn answer(&mut self) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        let line = self.output.next(deadline).context("failed to wait for the fixture's answer")?;
        let line = line.context("failed to read the fixture's answer: it has ended")?;
        if line.starts_with("error") {
            bail!("the fixture answered {line:?}");
        }
        Ok(line)
    }

    /// Sends a command and waits until it is done; gives what stands after `ok`.
    pub fn tell(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        let answer = self.answer().with_context(|| format!("failed to run the fixture's command {command:?}"))?;
        match answer.strip_prefix("ok") {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => bail!("the fixture answered {answer:?} to {command:?}"),
        }
    }

    /// Sends a command whose answer is a JSON object.
    pub fn ask(&mut self, command: &str) -> Result<Value> {
        self.send(command)?;
        let answer = self.answer().with_context(|| format!("failed to run the fixture's command {command:?}"))?;
        serde_json::from_str(&answer).with_context(|| format!("failed to read {answer:?} as JSON"))
    }

    /// What the fixture knows of its own allocations.
    pub fn report(&mut self) -> Result<Value> {
        self.ask("report")
    }

    /// Closes its input, on which it ends, and waits for that.
    pub fn finish(mut self) -> Result<ExitStatus> {
        self.stdin = None;
        self.wait()
    }

    /// Waits until it has ended by itself, as after an `exit` command.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        // The end of its output is the event; only the zombie is left to collect then.
        self.output.read_to_end(Instant::now() + self.patience).context("failed to wait for the fixture's end")?;
        self.child.wait().context("failed to collect the fixture's exit status")
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("failed to kill the fixture")?;
        self.child.wait().context("failed to collect the fixture's exit status")?;
        Ok(())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

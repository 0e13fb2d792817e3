//! Runs the leaktrace binary and reads its report.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::host::{breakpoints, wait_until};
use crate::lines::Lines;
use crate::start::start;
use crate::{PATIENCE, target_dir};

/// Names the binary to test. Without it the one of this profile is built first.
pub const BINARY_VARIABLE: &str = "LEAKTRACE_BIN";

/// Stands for `--max-overhead` where that is not given.
const BUDGET_VARIABLE: &str = "LEAKTRACE_MAX_OVERHEAD";

/// A leaktrace command line.
pub struct Leaktrace {
    command: Command,
}

impl Leaktrace {
    pub fn new() -> Result<Self> {
        let mut command = Command::new(binary()?);
        // Fixtures allocate as fast as they can, and most tests want to see all of it.
        command.env(BUDGET_VARIABLE, "off");
        Ok(Self { command }.piped())
    }

    /// Reads its output here: to be called again where the command was replaced.
    #[must_use]
    pub fn piped(mut self) -> Self {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self
    }

    /// Within a budget of overhead, in percent.
    #[must_use]
    pub fn budget(mut self, percent: &str) -> Self {
        self.command.env(BUDGET_VARIABLE, percent);
        self
    }

    /// `leaktrace -p PID`.
    pub fn pid(pid: u32) -> Result<Self> {
        Ok(Self::new()?.arg("-p").arg(pid.to_string()))
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// For what the methods here do not cover, such as another standard output.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it and goes on.
    pub fn spawn(mut self) -> Result<Running> {
        let mut child = start(&mut self.command).context("failed to start leaktrace")?;
        let stdout = child.stdout.take().map(Lines::of);
        let stderr = Lines::of(child.stderr.take().context("failed to take leaktrace's standard error")?);
        Ok(Running { child, stdout, stderr })
    }

    /// Starts it and waits for its end, which must come within `limit`.
    pub fn run(self, limit: Duration) -> Result<Outcome> {
        self.spawn()?.finish(limit)
    }
}

/// A leaktrace that runs; killed when dropped.
pub struct Running {
    child: Child,
    /// None where the test gave it another standard output.
    stdout: Option<Lines>,
    stderr: Lines,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of its standard error that contains `text`.
    pub fn wait_stderr(&mut self, text: &str) -> Result<String> {
        self.stderr
            .wait_for(|line| line.contains(text), PATIENCE)
            .with_context(|| format!("failed to wait for {text:?} on leaktrace's standard error"))
    }

    /// Waits for a line of its standard output that `wanted` accepts.
    pub fn wait_stdout(&mut self, wanted: impl Fn(&str) -> bool, patience: Duration) -> Result<String> {
        let stdout = self.stdout.as_mut().context("failed to read leaktrace's standard output: it is not a pipe")?;
        stdout.wait_for(wanted, patience).context("failed to wait for a line on leaktrace's standard output")
    }

    /// Waits until `pid`'s code has all its breakpoints, so that what it does from now on is seen.
    pub fn wait_attached(&mut self, pid: u32) -> Result<()> {
        // They come one by one within some 30 ms, and nothing tells which is the last.
        const SETTLED: Duration = Duration::from_millis(300);
        let mut seen = 0;
        let mut since = Instant::now();
        let attached = wait_until(PATIENCE, || {
            let now = breakpoints(pid).unwrap_or(0);
            if now != seen {
                seen = now;
                since = Instant::now();
            }
            seen > 0 && since.elapsed() >= SETTLED
        });
        if !attached {
            bail!("leaktrace did not finish attaching to process {pid} within {PATIENCE:?}: {seen} breakpoints");
        }
        Ok(())
    }

    /// Sends a signal such as `libc::SIGINT`.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: kill reads its two integers only. The child has not been waited for, so the pid is still its own.
        if unsafe { libc::kill(self.child.id().cast_signed(), signal) } != 0 {
            return Err(std::io::Error::last_os_error()).context("failed to send leaktrace a signal");
        }
        Ok(())
    }

    /// Waits for its end, which must come within `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Outcome> {
        let deadline = Instant::now() + limit;
        let stdout = match &mut self.stdout {
            Some(lines) => lines.read_to_end(deadline).context("failed to wait for leaktrace's report")?.to_owned(),
            None => String::new(),
        };
        let stderr = self.stderr.read_to_end(deadline).context("failed to wait for leaktrace's end")?.to_owned();
        let status = self.child.wait().context("failed to collect leaktrace's exit status")?;
        Ok(Outcome { status, stdout, stderr })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a leaktrace that has ended left behind.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The exit code; an error where a signal ended it.
    pub fn code(&self) -> Result<i32> {
        self.status.code().with_context(|| format!("leaktrace ended with {}: {}", self.status, self.stderr))
    }

    /// The report of `--format json`.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("failed to read the report ({}): {:?}\n{}", self.status, self.stdout, self.stderr))
    }

    /// The reports of `--format jsonl`, oldest first.
    pub fn jsonl(&self) -> Result<Vec<Value>> {
        self.stdout
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("failed to read the report {line:?}")))
            .collect()
    }
}

/// All stacks of a report's processes, worst first within each.
pub fn stacks(report: &Value) -> impl Iterator<Item = &Value> {
    let processes = report["processes"].as_array().map(Vec::as_slice).unwrap_or_default();
    processes.iter().flat_map(|process| process["stacks"].as_array().map(Vec::as_slice).unwrap_or_default())
}

/// Whether `function` stands anywhere in the stack.
pub fn has_frame(stack: &Value, function: &str) -> bool {
    let frames = stack["frames"].as_array().map(Vec::as_slice).unwrap_or_default();
    frames.iter().any(|frame| frame["function"] == function)
}

/// Live bytes and blocks under `function`, over all stacks that go through it.
pub fn live_in(report: &Value, function: &str) -> (u64, u64) {
    let number = |stack: &Value, key: &str| stack[key].as_u64().unwrap_or(0);
    stacks(report).filter(|stack| has_frame(stack, function)).fold((0, 0), |(bytes, count), stack| {
        (bytes + number(stack, "live_bytes"), count + number(stack, "live_count"))
    })
}

/// The binary under test.
fn binary() -> Result<&'static Path> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = BINARY.get_or_init(|| match env::var_os(BINARY_VARIABLE) {
        Some(path) => Ok(PathBuf::from(path)),
        None => build().map_err(|error| format!("{error:#}")),
    });
    found.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// cargo does not build the binaries of other packages for a test, so a plain `cargo test` could meet none, or an old one.
fn build() -> Result<PathBuf> {
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "build",
        "--quiet",
        "--package",
        "leak-user",
        "--bin",
        "leaktrace",
    ]);
    if profile == "release" {
        cargo.arg("--release");
    }
    let target = target_dir()?;
    let output = cargo.arg("--target-dir").arg(&target).output().context("failed to start cargo to build leaktrace")?;
    if !output.status.success() {
        bail!("failed to build leaktrace:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(target.join(profile).join("leaktrace"))
}

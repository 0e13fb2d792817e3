//! One trace of running processes: started, known to be attached, ended, and its reports read.
//!
//! Reports come as JSON lines at a short interval, because the first of them is the event that says "everything is attached": what
//! the target does after it must be counted.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::host::kernel_stacks;
use crate::{Leaktrace, Running, patience};

/// A trace that is attached.
pub struct Session {
    running: Running,
}

impl Session {
    /// `leaktrace -p PIDS ARGS...`, attached when this returns. Reports come each 200 ms unless `args` say otherwise.
    pub fn start(pids: &[u32], args: &[&str]) -> Result<Self> {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let mut command = Leaktrace::new()?.arg("-p").arg(pids.join(",")).args(["--format", "jsonl", "--top", "1000"]);
        if !args.contains(&"--interval") {
            command = command.args(["--interval", "200ms"]);
        }
        Self::attached(command.args(args).spawn()?)
    }

    /// A leaktrace that writes JSON lines, attached when this returns.
    pub fn attached(running: Running) -> Result<Self> {
        let mut session = Self { running };
        match session.next_report(|_| true, patience()) {
            Ok(_) => Ok(session),
            Err(error) => {
                // Why it ended, or what it said until now and where it hangs.
                let stacks = kernel_stacks(session.running.pid());
                let _ = session.running.signal(libc::SIGKILL);
                let stderr = session.running.finish(patience()).map(|outcome| outcome.stderr).unwrap_or_default();
                Err(error.context(format!("failed to wait until leaktrace was attached; it said {stderr:?}\n{stacks}")))
            }
        }
    }

    pub fn running(&mut self) -> &mut Running {
        &mut self.running
    }

    /// For what ends otherwise than by [`Session::stop`].
    pub fn into_running(self) -> Running {
        self.running
    }

    /// The next report that `wanted` accepts; what had not been read before counts too.
    pub fn next_report(&mut self, wanted: impl Fn(&Value) -> bool, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.running.wait_stdout(|line| line.starts_with('{'), left)?;
            let report = parse(&line)?;
            if wanted(&report) {
                return Ok(report);
            }
            if report["final"] == true {
                bail!("the final report came before the awaited one: {}", summary(&report));
            }
        }
    }

    /// Ends it as Ctrl-C does, and gives the final report.
    pub fn stop(self) -> Result<Value> {
        self.running.signal(libc::SIGINT)?;
        self.finish()
    }

    /// Waits until it ends by itself, and gives the final report.
    pub fn finish(self) -> Result<Value> {
        let outcome = self.running.finish(patience())?;
        ensure!(outcome.code()? == 0, "leaktrace ended with {}: {}", outcome.status, outcome.stderr);
        let last = outcome.stdout.lines().last().with_context(|| format!("no report; {}", outcome.stderr))?;
        let report = parse(last)?;
        ensure!(report["final"] == true, "the last report is not the final one: {}", summary(&report));
        Ok(report)
    }
}

fn parse(line: &str) -> Result<Value> {
    serde_json::from_str(line).with_context(|| format!("failed to read the report {line:?}"))
}

/// A report in a few lines, for the message of a test that failed: each stack's verdict, numbers and functions.
pub fn summary(report: &Value) -> String {
    let mut lines = vec![format!("losses {} counters {}", report["losses"], report["counters"])];
    for process in report["processes"].as_array().into_iter().flatten() {
        let of = |key: &str| &process[key];
        lines.push(format!(
            "pid {}: {} {} bytes {} blocks",
            of("pid"),
            of("verdict"),
            of("live_bytes"),
            of("live_count")
        ));
        for stack in process["stacks"].as_array().into_iter().flatten() {
            let functions: Vec<&str> = stack["frames"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|frame| frame["function"].as_str().unwrap_or("?"))
                .collect();
            let of = |key: &str| &stack[key];
            lines.push(format!(
                "  {} {} live {} in {} of {} freed {}, rate {}: {}",
                of("verdict"),
                of("resource"),
                of("live_bytes"),
                of("live_count"),
                of("allocated_bytes"),
                of("freed_bytes"),
                stack["growth"]["bytes_per_s"],
                functions.join(" < ")
            ));
        }
    }
    lines.join("\n")
}

/// Live bytes and blocks that a fixture's own report gives for one of its functions.
pub fn site(truth: &Value, function: &str) -> (u64, u64) {
    let site = &truth["sites"][function];
    (site["live_bytes"].as_u64().unwrap_or(0), site["live_count"].as_u64().unwrap_or(0))
}

/// The part of a report that is about `pid`, as a report of its own.
pub fn only(report: &Value, pid: u32) -> Value {
    let mut part = report.clone();
    if let Some(processes) = part["processes"].as_array_mut() {
        processes.retain(|process| process["pid"] == pid);
    }
    part
}

/// Live bytes and blocks of a whole process, listed or not.
pub fn live_of(report: &Value, pid: u32) -> (u64, u64) {
    let part = only(report, pid);
    let process = &part["processes"][0];
    (process["live_bytes"].as_u64().unwrap_or(0), process["live_count"].as_u64().unwrap_or(0))
}

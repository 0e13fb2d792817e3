//! How long it takes from the start of leaktrace until it sees a first allocation.
//!
//! The target says when: it allocates all the time and watches its own calls, which a probe makes many times slower (see
//! `tests/fixtures/deep.c`). leaktrace follows a process before it places probes in it, so the first slow call is the first that is
//! traced; that its report holds all calls from there on is checked.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use leaktrace_tests::{Fixture, host};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::tool::{Row, Tools};

/// The same in Python. `bytes` of this size are not taken from Python's own pools.
const PYTHON: &str = r#"
import sys, threading
from time import monotonic_ns

STREAK, SLOWER, USUAL = 64, 8, 4096
answer, watching = {}, threading.Event()

def timed():
    begun = monotonic_ns()
    block = bytes(1000)
    return begun, monotonic_ns() - begun

def watch():
    usual = min(timed()[1] for _ in range(USUAL))
    slow, streak, total = SLOWER * (usual + 1), 0, 0
    watching.set()
    while streak < STREAK:
        begun, took = timed()
        if took < slow:
            streak = 0
            continue
        if streak == 0:
            first, total = begun, 0
        streak += 1
        total += took
    answer.update(usual_ns=usual, slow_ns=total // STREAK, first_slow_ns=first, slow_pairs=STREAK)

import os, json
print("ready", os.getpid(), flush=True)
for line in sys.stdin:
    if line.strip() == "watch":
        watcher = threading.Thread(target=watch)
        watcher.start()
        watching.wait()
        print("ok", flush=True)
    elif line.strip() == "watched":
        watcher.join()
        print(json.dumps(answer), flush=True)
    else:
        print("error unknown command", line.strip(), flush=True)
"#;

/// What is traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Deep,
    Python,
}

impl Program {
    pub const ALL: [Self; 2] = [Self::Deep, Self::Python];

    pub fn name(self) -> &'static str {
        match self {
            Self::Deep => "the bench's target",
            Self::Python => "python3",
        }
    }

    /// Starts it; `None` where it is not installed.
    fn start(self, deep: &Path) -> Result<Option<Fixture>> {
        match self {
            Self::Deep => Fixture::builder(deep).start().map(Some),
            Self::Python => python().transpose(),
        }
    }
}

/// A python3 that can be told to watch itself, if there is one.
pub fn python() -> Option<Result<Fixture>> {
    let python = host::find("python3")?;
    Some(Fixture::builder(&python).arg("-c").arg(PYTHON).start())
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct First {
    /// From the start of leaktrace to the first allocation that was slow.
    pub seconds: f64,
    /// What an allocation took before, at its fastest, and what the first slow ones took.
    pub usual_ns: u64,
    pub slow_ns: u64,
    /// Calls that leaktrace must have seen, and those in its report with those that it counted as lost.
    pub expected_events: u64,
    pub events: u64,
}

/// Measures once; `None` where the program is not installed.
pub fn measure(tools: &Tools, deep: &Path, program: Program) -> Result<Option<First>> {
    let Some(mut target) = program.start(deep)? else { return Ok(None) };
    target.tell("watch")?;
    let start = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).context("failed to read the clock")?);
    let tracer = tools.start(Row::Leaktrace, target.pid())?.context("leaktrace is a tool")?;
    let answer = target.ask("watched")?;
    let number =
        |key: &str| answer[key].as_u64().with_context(|| format!("failed to read {key} in the answer {answer}"));
    let first = Duration::from_nanos(number("first_slow_ns")?);
    let seconds = first.checked_sub(start).with_context(|| format!("slow before there was a probe: {answer}"))?;
    let output = tracer.finish()?.output;
    let report: serde_json::Value =
        serde_json::from_str(&output).with_context(|| format!("failed to read the report {output:?}"))?;
    let losses = report["losses"].as_object().into_iter().flatten().filter_map(|(_, value)| value.as_u64());
    Ok(Some(First {
        seconds: seconds.as_secs_f64(),
        usual_ns: number("usual_ns")?,
        slow_ns: number("slow_ns")?,
        expected_events: 2 * number("slow_pairs")?,
        events: report["events"].as_u64().context("failed to read the report's number of events")?
            + losses.sum::<u64>(),
    }))
}

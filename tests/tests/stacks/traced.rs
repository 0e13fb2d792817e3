//! A fixture that is traced while it takes stacks of every shape, and the comparison of all when it ends.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use leaktrace_tests::{Fixture, PATIENCE, Program, Session, stacks};
use serde_json::Value;

use super::truth::{self, Expected, Recording, Truth};

/// A size that is no other allocation's; each command's is a different one.
pub const FIRST_SIZE: u64 = 300_000;
/// Between the sizes of two commands, of which one may take as many.
pub const APART: u64 = 1000;

/// Scenarios of stacks.c, and what comes behind the size.
pub const C_SCENARIOS: [(&str, &str); 21] = [
    ("plain", ""),
    ("deep", "20"),
    ("deep", "100"),
    ("deep", "400"),
    ("callback", ""),
    ("realign", ""),
    ("drap", ""),
    ("alloca", "100"),
    ("vla", "300"),
    ("tail", ""),
    ("noreturn", ""),
    ("pushed", ""),
    ("thread", ""),
    ("tsd", ""),
    ("clone", ""),
    ("coroutine", ""),
    ("handler", ""),
    ("altstack", ""),
    ("nested", ""),
    ("fault", ""),
    ("entry", ""),
];

/// Those whose stack was interrupted somewhere: the whole tables of a file are loaded when they are needed for the first time.
pub const INTERRUPTED: [&str; 5] = ["handler", "altstack", "nested", "fault", "entry"];

pub const CPP_SCENARIOS: [(&str, &str); 13] = [
    ("virtual", ""),
    ("template", ""),
    ("lambda", ""),
    ("function", ""),
    ("sort", ""),
    ("stream", ""),
    ("constructor", ""),
    ("unwinding", ""),
    ("catch", ""),
    ("rethrow", ""),
    ("thread", ""),
    ("new", ""),
    ("vector", ""),
];

pub const RUST_SCENARIOS: [(&str, &str); 12] = [
    ("plain", ""),
    ("boxed", ""),
    ("vector", ""),
    ("dynamic", ""),
    ("generic", ""),
    ("closure", ""),
    ("recursion", "60"),
    ("thread", ""),
    ("unwinding", ""),
    ("caught", ""),
    ("iterator", ""),
    ("string", ""),
];

/// A fixture that is traced and recorded.
pub struct Traced {
    pub fixture: Fixture,
    pub session: Session,
    folder: tempfile::TempDir,
    pub next_size: u64,
    pub truths: Vec<(Truth, Expected)>,
    /// Bytes that each stack had allocated in the report that was looked at last.
    seen: HashMap<String, u64>,
}

impl Traced {
    pub fn start(program: &Path, unwind: &str) -> Result<Self> {
        Self::with(Fixture::builder(program).start()?, unwind)
    }

    pub fn with(fixture: Fixture, unwind: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let recording = folder.path().join("recording");
        let recording = recording.to_str().context("a path that is not UTF-8")?;
        let session = Session::start(&[fixture.pid()], &["--unwind", unwind, "--record", recording])?;
        Ok(Self { fixture, session, folder, next_size: FIRST_SIZE, truths: Vec::new(), seen: HashMap::new() })
    }

    /// Sends `VERB SCENARIO SIZE ARGUMENT` and keeps what the fixture says to it.
    pub fn take(&mut self, scenario: &str, argument: &str, expected: Expected) -> Result<u64> {
        let size = self.next_size;
        self.ask(&format!("{scenario} {argument}"), &format!("take {scenario} {size} {argument}"), expected)?;
        Ok(size)
    }

    pub fn ask(&mut self, name: &str, command: &str, expected: Expected) -> Result<()> {
        self.next_size += APART;
        let answer = self.fixture.ask(command)?;
        self.truths.extend(Truth::read(name.trim(), &answer)?.into_iter().map(|truth| (truth, expected)));
        Ok(())
    }

    /// Takes a scenario and waits until it is in a report; whether its stacks are all called whole there.
    pub fn is_seen_whole(&mut self, scenario: &str, expected: Expected) -> Result<bool> {
        let before = self.truths.len();
        self.take(scenario, "", expected)?;
        let wanted: u64 = self.truths[before..].iter().map(|(truth, _)| truth.size).sum();
        let seen = &self.seen;
        let all_there = |report: &Value| grown(seen, report).map(|(_, bytes)| bytes).sum::<u64>() >= wanted;
        let report = self.session.next_report(all_there, PATIENCE)?;
        let whole = grown(seen, &report).all(|(stack, _)| stack["complete"] == true);
        self.seen = stacks(&report).map(|stack| (id(stack), allocated(stack))).collect();
        Ok(whole)
    }

    /// Takes a scenario until a report calls its stack whole: what is taken before its tables are there is marked. Then once more,
    /// which has to be whole.
    pub fn take_until_whole(&mut self, scenario: &str) -> Result<()> {
        for _ in 0..50 {
            if self.is_seen_whole(scenario, Expected::WholeOrMarked)? {
                ensure!(self.is_seen_whole(scenario, Expected::Whole)?, "{scenario} was whole and is marked again");
                return Ok(());
            }
        }
        bail!("the stacks of {scenario} stay marked")
    }

    /// Ends the trace and compares; gives the report, the differences and the mappings.
    pub fn stop(self) -> Result<(Value, Vec<String>, String)> {
        let pid = self.fixture.pid();
        let maps = truth::maps(pid)?;
        let report = self.session.stop()?;
        let recording = Recording::read(&self.folder.path().join("recording"))?;
        ensure!(!self.truths.is_empty());
        Ok((report, truth::compare(&recording, pid, &self.truths), maps))
    }

    /// Ends the trace; all must be equal.
    pub fn finish(self) -> Result<Value> {
        let (report, differences, maps) = self.stop()?;
        truth::ensure_equal(&differences, &maps)?;
        Ok(report)
    }
}

fn id(stack: &Value) -> String {
    stack["id"].as_str().unwrap_or_default().to_owned()
}

fn allocated(stack: &Value) -> u64 {
    stack["allocated_bytes"].as_u64().unwrap_or(0)
}

/// The stacks that have allocated since, and how much; not those that allocate what is too little to be a fixture's.
fn grown<'a>(seen: &'a HashMap<String, u64>, report: &'a Value) -> impl Iterator<Item = (&'a Value, u64)> {
    let more = |stack: &Value| allocated(stack) - seen.get(&id(stack)).unwrap_or(&0);
    stacks(report).map(move |stack| (stack, more(stack))).filter(|(_, bytes)| *bytes >= FIRST_SIZE)
}

/// The report's stack that allocated so many bytes.
pub fn of_size(report: &Value, size: u64) -> Option<&Value> {
    stacks(report).find(|stack| stack["allocated_bytes"] == size)
}

pub fn c_fixture() -> Program {
    Program::c("stacks").without_frame_pointers()
}

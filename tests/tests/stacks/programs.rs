//! Programs as Debian built them, under load: how many of their stacks are whole, and why the others are not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::programs::Loaded;
use leaktrace_tests::{Leaktrace, PATIENCE, host, stacks};

use super::truth::{self, Recorded, Recording};

/// So long each is traced.
const TRACED: Duration = Duration::from_secs(8);

/// Fewer allocations are no load.
const LOAD: u64 = 10_000;

/// What part of the stacks has to be whole.
const WHOLE: f64 = 0.995;

/// File and offset in it of an address, by the process's mappings.
fn place(maps: &str, address: u64) -> String {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let found = maps.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (hex(start)?, hex(end)?);
        let offset = hex(fields.nth(1)?)?;
        let name = fields.nth(2).unwrap_or("[anonymous]");
        (start <= address && address < end).then(|| format!("{name}+{:#x}", address - start + offset))
    });
    found.unwrap_or_else(|| format!("{address:#x}"))
}

/// How the stacks ended, and for the most frequent of those that are not whole, where.
fn describe(recording: &Recording, maps: &BTreeMap<u32, String>) -> String {
    let mut text = String::new();
    for (end, (allocations, stacks)) in recording.ends() {
        let _ = writeln!(text, "  {end}: {allocations} allocations, {stacks} stacks");
    }
    let where_it_ends = |stack: &Recorded, pid: u32| {
        let last: Vec<String> = stack
            .frames
            .iter()
            .rev()
            .take(3)
            .map(|&frame| place(maps.get(&pid).map_or("", String::as_str), frame))
            .collect();
        format!("{:?} after {} frames, outermost first {}", stack.end, stack.frames.len(), last.join(" < "))
    };
    for (pid, maps) in maps {
        let outermost = recording.outermost(*pid).into_iter().map(|address| place(maps, address));
        let _ = writeln!(text, "  process {pid} begins at {}", outermost.collect::<Vec<_>>().join(", "));
    }
    for (stack, count, pid) in recording.incomplete().into_iter().take(12) {
        let _ = writeln!(text, "    {count} times {}", where_it_ends(stack, pid));
    }
    text
}

/// At least 99.5 % of the stacks are whole: of the allocations', of the different ones, and of the bytes in the report.
fn complete_stacks(test: &str, loaded: Loaded) -> Result<()> {
    if !host::can_trace(test) || !loaded.needs().iter().all(|program| host::program(test, program).is_some()) {
        return Ok(());
    }
    let mut running = loaded.start()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("recording");
    let pids: Vec<String> = running.pids().iter().map(u32::to_string).collect();
    let outcome = Leaktrace::new()?
        .args([
            "-p",
            &pids.join(","),
            "--format",
            "json",
            "--top",
            "10000",
            "--duration",
            &format!("{}s", TRACED.as_secs()),
        ])
        .arg("--record")
        .arg(&file)
        // Names of a large program take their time.
        .run(TRACED + 3 * PATIENCE)?;
    ensure!(outcome.code()? == 0, "leaktrace ended with {}: {}", outcome.status, outcome.stderr);
    let maps = running.pids().iter().map(|&pid| Ok((pid, truth::maps(pid)?))).collect::<Result<_>>();
    let maps: BTreeMap<u32, String> = maps.context("the program has ended")?;
    running.stop_load();
    drop(running);

    let report = outcome.json()?;
    let recording = Recording::read(&file)?;
    let text = describe(&recording, &maps);
    eprintln!("{test}, losses {}:\n{text}", report["losses"]);
    let ends = recording.ends();
    let share = |of: fn(&(u64, u64)) -> u64| {
        let all: u64 = ends.values().map(of).sum();
        ends.get("Complete").map_or(0, of) as f64 / all.max(1) as f64
    };
    let all: u64 = ends.values().map(|(allocations, _)| allocations).sum();
    ensure!(all >= LOAD, "only {all} allocations: that is not load\n{text}");
    // A program and its threads begin at one place each, so a stack that only seems whole would end at another.
    for &pid in maps.keys() {
        ensure!((1..=2).contains(&recording.outermost(pid).len()), "too many begins of process {pid}\n{text}");
    }
    let bytes = |complete: bool| {
        let wanted = stacks(&report).filter(|stack| !complete || stack["complete"] == true);
        wanted.filter_map(|stack| stack["allocated_bytes"].as_f64()).sum::<f64>()
    };
    let shares =
        [share(|(allocations, _)| *allocations), share(|(_, stacks)| *stacks), bytes(true) / bytes(false).max(1.0)];
    ensure!(
        shares.iter().all(|&share| share >= WHOLE),
        "whole are {:.3} % of the allocations' stacks, {:.3} % of the different ones, {:.3} % of the reported bytes\n{text}",
        shares[0] * 100.0,
        shares[1] * 100.0,
        shares[2] * 100.0
    );
    Ok(())
}

/// python3, with its C modules.
#[test]
fn complete_stacks_of_python() -> Result<()> {
    complete_stacks("complete_stacks_of_python", Loaded::Python)
}

/// perl.
#[test]
fn complete_stacks_of_perl() -> Result<()> {
    complete_stacks("complete_stacks_of_perl", Loaded::Perl)
}

/// sqlite3.
#[test]
fn complete_stacks_of_sqlite() -> Result<()> {
    complete_stacks("complete_stacks_of_sqlite", Loaded::Sqlite)
}

/// redis-server, whose allocator is jemalloc.
#[test]
fn complete_stacks_of_redis() -> Result<()> {
    complete_stacks("complete_stacks_of_redis", Loaded::Redis)
}

/// A worker of nginx.
#[test]
fn complete_stacks_of_nginx() -> Result<()> {
    complete_stacks("complete_stacks_of_nginx", Loaded::Nginx)
}

/// Two backends of postgres.
#[test]
fn complete_stacks_of_postgres() -> Result<()> {
    complete_stacks("complete_stacks_of_postgres", Loaded::Postgres)
}

/// node, with its generated code.
#[test]
fn complete_stacks_of_node() -> Result<()> {
    complete_stacks("complete_stacks_of_node", Loaded::Node)
}

//! Functions, files, lines and inlined frames beside gdb's.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use leaktrace_tests::{Fixture, GdbFrame, PATIENCE, Program, Session, gdb_frames, host, only, stacks, summary};
use serde_json::Value;

use super::traced::{C_SCENARIOS, CPP_SCENARIOS, FIRST_SIZE, INTERRUPTED, RUST_SCENARIOS, c_fixture};
use super::truth::Truth;

/// The name of a function without its namespaces, parameters and template arguments, which gdb and demanglers spell in different ways.
fn plain_name(name: &str) -> String {
    let mut depth = 0_i32;
    let mut plain = String::new();
    for c in name.replace("operator()", "operator_call").replace("->", "_").chars() {
        match c {
            '<' | '(' => depth += 1,
            '>' | ')' => depth -= 1,
            c if depth == 0 => plain.push(c),
            _ => {}
        }
    }
    // A function's wrapper in a trait object's table is named as an inner function of it, or not.
    let plain = plain.replace("{{vtable.shim}}", "");
    let plain = plain.replace("{{closure}}", "{closure}").replace(" const", "");
    let last = plain.trim_end_matches("::").rsplit("::").next().unwrap_or_default();
    // Clones that the compiler made, versions of symbols, numbers of closures.
    let last = last.split(['.', '@', '#', ' ', '[']).next().unwrap_or_default();
    last.trim_matches(['{', '}']).to_owned()
}

/// Function, file name, line and whether it was inlined.
type Shown = (String, String, Option<u64>, bool);

fn file_name(path: &str) -> String {
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

fn shown_by_gdb(frame: &GdbFrame) -> Shown {
    let function = frame.function.as_deref().map(plain_name).unwrap_or_default();
    // A file without a line is what the compiler made up.
    let file = frame.line.and(frame.file.as_deref()).map(file_name).unwrap_or_default();
    (function, file, frame.line, frame.inlined)
}

fn shown_by_leaktrace(frame: &Value) -> Shown {
    let function = frame["function"].as_str().map(plain_name).unwrap_or_default();
    let line = frame["line"].as_u64();
    let file = line.and(frame["file"].as_str()).map(file_name).unwrap_or_default();
    (function, file, line, frame["inlined"] == true)
}

/// The frames outside of the function `common`, which both have, as they are shown; where gdb has no debug information, names of
/// symbols are whatever each finds.
fn compare_with_gdb(stack: &Value, gdb: &[GdbFrame], common: &str) -> Vec<String> {
    let empty = Vec::new();
    let frames = stack["frames"].as_array().unwrap_or(&empty);
    let ours =
        frames.iter().position(|frame| frame["function"].as_str().is_some_and(|name| plain_name(name) == common));
    let theirs = gdb.iter().position(|frame| frame.function.as_deref().is_some_and(|name| plain_name(name) == common));
    let (Some(ours), Some(theirs)) = (ours, theirs) else {
        return vec![format!("{common} is not in both: {stack} {gdb:?}")];
    };
    let (ours, theirs) = (&frames[ours + 1..], &gdb[theirs + 1..]);
    let mut differences = Vec::new();
    for index in 0..ours.len().max(theirs.len()) {
        let left = ours.get(index).map(shown_by_leaktrace);
        let right = theirs.get(index).map(shown_by_gdb);
        let known = theirs.get(index).is_some_and(|frame| frame.known);
        let same = if known { left == right } else { left.is_some() && right.is_some() };
        if !same {
            differences.push(format!("frame {index}: {left:?}, gdb {right:?}"));
        }
    }
    differences
}

/// What gdb sees must be what backtrace(3) told, or neither is the truth. Their innermost frames are different calls in the same function.
fn ensure_truths_agree(scenario: &str, gdb: &[GdbFrame], marker: &str, truth: &Truth) -> Result<()> {
    let on_the_stack = || gdb.iter().filter(|frame| !frame.inlined);
    let at = on_the_stack().position(|frame| frame.function.as_deref() == Some(marker)).context("no marker")?;
    let addresses: Vec<u64> = on_the_stack().skip(at + 2).map(|frame| frame.pc).collect();
    ensure!(addresses == truth.frames[1..], "{scenario}: backtrace(3) and gdb differ: {truth:?} {gdb:#?}");
    Ok(())
}

/// A whole stack that goes through `common`.
fn whole_stack<'a>(report: &'a Value, common: &str) -> Option<&'a Value> {
    let goes_through = |stack: &Value| {
        let mut frames = stack["frames"].as_array().into_iter().flatten();
        frames.any(|frame| frame["function"].as_str().is_some_and(|name| plain_name(name) == common))
    };
    stacks(report).find(|stack| stack["complete"] == true && goes_through(stack))
}

/// Takes the scenario until the tables that it needs are there: those for every instruction are loaded when they are needed.
fn take_until_whole(session: &mut Session, fixture: &mut Fixture, scenario: &str, common: &str) -> Result<()> {
    for _ in 0..50 {
        fixture.ask(&format!("take {scenario} {FIRST_SIZE}"))?;
        let allocated = |report: &Value| {
            stacks(&only(report, fixture.pid())).any(|stack| stack["live_bytes"].as_u64() >= Some(FIRST_SIZE))
        };
        let report = session.next_report(allocated, PATIENCE)?;
        if whole_stack(&only(&report, fixture.pid()), common).is_some() {
            return Ok(());
        }
    }
    bail!("the stacks of {scenario} stay marked")
}

/// Functions, files, lines and inlined frames of stacks that wait at their allocation, beside gdb's.
fn equal_to_gdb(program: &Path, scenarios: &[(&str, &str)], (common, marker): (&str, &str)) -> Result<()> {
    let mut fixtures: Vec<Fixture> =
        scenarios.iter().map(|_| Fixture::builder(program).start()).collect::<Result<_>>()?;
    let pids: Vec<u32> = fixtures.iter().map(Fixture::pid).collect();
    let mut session = Session::start(&pids, &[])?;
    let mut truths = Vec::new();
    for (fixture, (scenario, argument)) in fixtures.iter_mut().zip(scenarios) {
        if INTERRUPTED.contains(scenario) {
            take_until_whole(&mut session, fixture, scenario, common)?;
        }
        let answer = fixture.ask(&format!("hold {scenario} {FIRST_SIZE} {argument}"))?;
        truths.extend(Truth::read(scenario, &answer)?);
    }
    // gdb comes after the probes have gone.
    let report = session.stop()?;
    let mut differences = Vec::new();
    for ((mut fixture, (scenario, _)), truth) in fixtures.into_iter().zip(scenarios).zip(truths) {
        let gdb = gdb_frames(fixture.pid(), marker)?;
        ensure_truths_agree(scenario, &gdb, marker, &truth)?;
        let report = only(&report, fixture.pid());
        let stack = whole_stack(&report, common)
            .with_context(|| format!("{scenario}: no whole stack\n{}", summary(&report)))?;
        let found = compare_with_gdb(stack, &gdb, common);
        differences.extend(found.into_iter().map(|difference| format!("{scenario}: {difference}")));
        fixture.tell("go on")?;
    }
    ensure!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
    Ok(())
}

/// C beside gdb.
#[test]
fn c_beside_gdb() -> Result<()> {
    if !host::can_trace("c_beside_gdb") || host::program("c_beside_gdb", "gdb").is_none() {
        return Ok(());
    }
    // One that is cut is compared elsewhere.
    let scenarios: Vec<_> = C_SCENARIOS.into_iter().filter(|(scenario, _)| *scenario != "deep").collect();
    equal_to_gdb(&c_fixture().build()?, &scenarios, ("allocate", "hold_here"))
}

/// C++ beside gdb.
#[test]
fn cpp_beside_gdb() -> Result<()> {
    let needed = ["c++", "gdb"].iter().all(|program| host::program("cpp_beside_gdb", program).is_some());
    if !host::can_trace("cpp_beside_gdb") || !needed {
        return Ok(());
    }
    // Otherwise some addresses have two lines, of which gdb and addr2line choose different ones.
    let program = Program::cpp("stacks_cpp").without_frame_pointers().flag("-gno-statement-frontiers").build()?;
    let (by_new, others): (Vec<_>, Vec<_>) =
        CPP_SCENARIOS.into_iter().partition(|(scenario, _)| ["new", "vector"].contains(scenario));
    equal_to_gdb(&program, &others, ("allocate", "hold_here"))?;
    equal_to_gdb(&program, &by_new, ("allocate_by_new", "hold_here"))
}

/// Rust beside gdb.
#[test]
fn rust_beside_gdb() -> Result<()> {
    if !host::can_trace("rust_beside_gdb") || host::program("rust_beside_gdb", "gdb").is_none() {
        return Ok(());
    }
    let program = Program::rust("stacks_rust").without_frame_pointers().build()?;
    // The others allocate from the standard library, inside of the function that waits.
    let scenarios: Vec<_> =
        RUST_SCENARIOS.into_iter().filter(|(scenario, _)| !["boxed", "vector"].contains(scenario)).collect();
    equal_to_gdb(&program, &scenarios, ("allocate", "stacks_rust::answer"))
}

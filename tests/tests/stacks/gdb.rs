//! Functions, files, lines and inlined frames beside gdb's.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{Fixture, GdbFrame, Program, Session, gdb_frames, host, summary};
use serde_json::Value;

use super::traced::{C_SCENARIOS, CPP_SCENARIOS, FIRST_SIZE, RUST_SCENARIOS, c_fixture, of_size};
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
    let plain = plain.replace("{{closure}}", "{closure}").replace(" const", "");
    let last = plain.rsplit("::").next().unwrap_or_default();
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
    (function, frame.file.as_deref().map(file_name).unwrap_or_default(), frame.line, frame.inlined)
}

fn shown_by_leaktrace(frame: &Value) -> Shown {
    let function = frame["function"].as_str().map(plain_name).unwrap_or_default();
    let file = frame["file"].as_str().map(file_name).unwrap_or_default();
    (function, file, frame["line"].as_u64(), frame["inlined"] == true)
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

/// Functions, files, lines and inlined frames of stacks that wait at their allocation, beside gdb's.
fn equal_to_gdb(program: &Path, scenarios: &[&str], (common, marker): (&str, &str)) -> Result<()> {
    let mut differences = Vec::new();
    for scenario in scenarios {
        let mut fixture = Fixture::builder(program).start()?;
        let session = Session::start(&[fixture.pid()], &[])?;
        fixture.ask(&format!("hold {scenario} {FIRST_SIZE}"))?;
        // gdb comes after the probes have gone.
        let report = session.stop()?;
        let gdb = gdb_frames(fixture.pid(), marker)?;
        ensure!(gdb.len() > 5, "{gdb:?}");
        let stack =
            of_size(&report, FIRST_SIZE).with_context(|| format!("{scenario}: no stack\n{}", summary(&report)))?;
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
    let scenarios = [
        "plain",
        "callback",
        "drap",
        "tail",
        "noreturn",
        "thread",
        "coroutine",
        "handler",
        "altstack",
        "fault",
        "entry",
    ];
    equal_to_gdb(&c_fixture().build()?, &scenarios, ("allocate", "hold_here"))
}

/// C++ beside gdb.
#[test]
fn cpp_beside_gdb() -> Result<()> {
    let needed = ["c++", "gdb"].iter().all(|program| host::program("cpp_beside_gdb", program).is_some());
    if !host::can_trace("cpp_beside_gdb") || !needed {
        return Ok(());
    }
    let program = Program::cpp("stacks_cpp").without_frame_pointers().build()?;
    let scenarios =
        ["virtual", "template", "lambda", "function", "sort", "stream", "constructor", "unwinding", "thread"];
    equal_to_gdb(&program, &scenarios, ("allocate", "hold_here"))?;
    equal_to_gdb(&program, &["new", "vector"], ("allocate_by_new", "hold_here"))
}

/// Rust beside gdb.
#[test]
fn rust_beside_gdb() -> Result<()> {
    if !host::can_trace("rust_beside_gdb") || host::program("rust_beside_gdb", "gdb").is_none() {
        return Ok(());
    }
    let program = Program::rust("stacks_rust").without_frame_pointers().build()?;
    let scenarios = ["plain", "dynamic", "generic", "closure", "thread", "unwinding", "iterator", "string"];
    equal_to_gdb(&program, &scenarios, ("allocate", "stacks_rust::answer"))
}

/// What gdb sees is what backtrace(3) told, frame by frame: neither truth rests on the other.
#[test]
fn backtrace_and_gdb_agree() -> Result<()> {
    if host::program("backtrace_and_gdb_agree", "gdb").is_none() {
        return Ok(());
    }
    let c: Vec<_> = C_SCENARIOS.iter().map(|(scenario, argument)| (*scenario, *argument)).collect();
    let programs = [
        (c_fixture().build()?, c, "hold_here", 1),
        (Program::cpp("stacks_cpp").without_frame_pointers().build()?, CPP_SCENARIOS.to_vec(), "hold_here", 1),
        (
            Program::rust("stacks_rust").without_frame_pointers().build()?,
            RUST_SCENARIOS.to_vec(),
            "stacks_rust::answer",
            1,
        ),
    ];
    for (program, scenarios, marker, inside) in programs {
        let mut fixture = Fixture::builder(&program).start()?;
        for (scenario, argument) in scenarios {
            let answer = fixture.ask(&format!("hold {scenario} {FIRST_SIZE} {argument}"))?;
            let truth = Truth::read(scenario, &answer)?.remove(0);
            let gdb = gdb_frames(fixture.pid(), marker)?;
            fixture.tell("go on")?;
            let physical: Vec<u64> = gdb.iter().filter(|frame| !frame.inlined).map(|frame| frame.pc).collect();
            let at =
                gdb.iter().filter(|frame| !frame.inlined).position(|frame| frame.function.as_deref() == Some(marker));
            let at = at.context("the marker was found before")? + inside;
            // The innermost is another call in the same function.
            assert_eq!(physical[at + 1..], truth.frames[1..], "{scenario} of {}: {gdb:#?}", program.display());
        }
    }
    Ok(())
}

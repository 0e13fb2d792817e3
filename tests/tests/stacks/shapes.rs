//! Stacks of every shape that compilers make, compared with backtrace(3), which follows the unwind tables in the process itself.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{Leaktrace, PATIENCE, Program, host, summary};
use serde_json::Value;

use super::traced::{C_SCENARIOS, CPP_SCENARIOS, INTERRUPTED, RUST_SCENARIOS, Traced, c_fixture, of_size};
use super::truth::{self, Expected, Recording, Truth};

/// Takes each scenario once and compares all.
fn all_equal(program: &Path, scenarios: &[(&str, &str)], unwind: &str, expected: Expected) -> Result<()> {
    let mut traced = Traced::start(program, unwind)?;
    let mut sizes = Vec::new();
    for (scenario, argument) in scenarios {
        if expected == Expected::Whole && INTERRUPTED.contains(scenario) {
            traced.take_until_whole(scenario).context((*scenario).to_owned())?;
            continue;
        }
        let size = traced.take(scenario, argument, expected)?;
        let truth = traced.truths.last().map(|(truth, _)| truth).context("no stack")?;
        if expected == Expected::Whole && truth.frames.len() < truth::MAX_FRAMES {
            sizes.push(size);
        }
    }
    let report = traced.finish()?;
    // What was recorded whole is reported as such.
    for size in sizes {
        let stack =
            of_size(&report, size).with_context(|| format!("no stack of {size} bytes\n{}", summary(&report)))?;
        ensure!(stack["complete"] == true && stack["end"] == "complete", "{stack}");
    }
    Ok(())
}

/// C without frame pointers: realigned stacks, alloca, tail calls, signal handlers, threads, coroutines and deep recursion.
#[test]
fn c_without_frame_pointers() -> Result<()> {
    if !host::can_trace("c_without_frame_pointers") {
        return Ok(());
    }
    all_equal(&c_fixture().build()?, &C_SCENARIOS, "auto", Expected::Whole)
}

/// The same without debug information, as a position-dependent program, and with the tables' section headers taken away.
#[test]
fn c_without_debug_information() -> Result<()> {
    if !host::can_trace("c_without_debug_information") {
        return Ok(());
    }
    let program = c_fixture().flag("-g0").flag("-no-pie").flag("-fno-pie").build()?;
    all_equal(&program, &C_SCENARIOS, "auto", Expected::Whole)
}

/// A static program: libc's own frames are in the same file.
#[test]
fn c_static() -> Result<()> {
    if !host::can_trace("c_static") {
        return Ok(());
    }
    all_equal(&c_fixture().flag("-static").build()?, &C_SCENARIOS, "auto", Expected::Whole)
}

/// A frame that no row can express is followed or marked, never guessed.
#[test]
fn a_huge_frame() -> Result<()> {
    if !host::can_trace("a_huge_frame") {
        return Ok(());
    }
    all_equal(&c_fixture().build()?, &[("huge", "")], "auto", Expected::WholeOrMarked)
}

/// Frame pointers where there are: the same stacks up to `main`, in the frame pointer mode.
#[test]
fn by_frame_pointers() -> Result<()> {
    if !host::can_trace("by_frame_pointers") {
        return Ok(());
    }
    // Left out are those that go through libc's code, which has none; a coroutine's leads back to who resumed it.
    let through_libc = ["callback", "tsd", "coroutine", "handler", "altstack", "nested", "fault", "entry"];
    let scenarios: Vec<_> = C_SCENARIOS.into_iter().filter(|(scenario, _)| !through_libc.contains(scenario)).collect();
    all_equal(&Program::c("stacks").build()?, &scenarios, "fp", Expected::FramePointers)
}

/// With tables, a program that has frame pointers gives the same stacks as one that has none.
#[test]
fn tables_with_frame_pointers() -> Result<()> {
    if !host::can_trace("tables_with_frame_pointers") {
        return Ok(());
    }
    all_equal(&Program::c("stacks").build()?, &C_SCENARIOS, "auto", Expected::Whole)
}

/// C++ without frame pointers: virtual calls, templates, exceptions, and frames of libstdc++.
#[test]
fn cpp_without_frame_pointers() -> Result<()> {
    if !host::can_trace("cpp_without_frame_pointers") || host::program("cpp_without_frame_pointers", "c++").is_none() {
        return Ok(());
    }
    let program = Program::cpp("stacks_cpp").without_frame_pointers().build()?;
    all_equal(&program, &CPP_SCENARIOS, "auto", Expected::Whole)
}

/// Rust in release mode: trait objects, generics, closures, panics, and frames of the standard library.
#[test]
fn rust_in_release_mode() -> Result<()> {
    if !host::can_trace("rust_in_release_mode") {
        return Ok(());
    }
    let program = Program::rust("stacks_rust").without_frame_pointers().build()?;
    all_equal(&program, &RUST_SCENARIOS, "auto", Expected::Whole)
}

/// A handler that runs after every single instruction of a few functions: whole, or marked at first and whole once the tables of
/// those functions have been completed.
#[test]
fn interrupted_at_every_instruction() -> Result<()> {
    if !host::can_trace("interrupted_at_every_instruction") {
        return Ok(());
    }
    let mut traced = Traced::start(&c_fixture().build()?, "auto")?;
    traced.take_until_whole("step")?;
    let steps = traced.truths.len();
    ensure!(steps > 80, "only {steps} steps");
    traced.finish()?;
    Ok(())
}

/// A stack is not taken for the one before because all its frames are the same: the word that ended that one is no zero any more.
#[test]
fn outermost_word_that_changes() -> Result<()> {
    if !host::can_trace("outermost_word_that_changes") {
        return Ok(());
    }
    let mut traced = Traced::start(&c_fixture().build()?, "auto")?;
    traced.take("reused", "", Expected::Whole)?;
    let frames: Vec<_> = traced.truths.iter().map(|(truth, _)| truth.frames.len()).collect();
    // The return address adds a frame; the deep ones have two more inside.
    ensure!(frames == [3, 4, 3, 6, 5, 4, 3, 4], "{frames:?}");
    traced.finish()?;
    Ok(())
}

/// Four threads that allocate from many stacks of different depth at once: each of the blocks has its own path's stack.
#[test]
fn many_stacks_at_once() -> Result<()> {
    if !host::can_trace("many_stacks_at_once") {
        return Ok(());
    }
    stress(&c_fixture().build()?, "auto", Expected::Whole)
}

/// The same by frame pointers.
#[test]
fn many_stacks_at_once_by_frame_pointers() -> Result<()> {
    if !host::can_trace("many_stacks_at_once_by_frame_pointers") {
        return Ok(());
    }
    stress(&Program::c("stacks").build()?, "fp", Expected::FramePointers)
}

fn stress(program: &Path, unwind: &str, expected: Expected) -> Result<()> {
    let mut traced = Traced::start(program, unwind)?;
    traced.take("stress", "25000", expected)?;
    ensure!(traced.truths.len() == 48, "{} stacks", traced.truths.len());
    traced.finish()?;
    Ok(())
}

/// A program that leaktrace starts: constructors under the dynamic linker, main, exit handlers and destructors.
#[test]
fn start_and_end_of_a_program() -> Result<()> {
    if !host::can_trace("start_and_end_of_a_program") {
        return Ok(());
    }
    let program = Program::c("stacks_start").without_frame_pointers().build()?;
    let folder = tempfile::tempdir()?;
    let (file, recorded) = (folder.path().join("report"), folder.path().join("recording"));
    let command =
        Leaktrace::new()?.args(["--format", "json", "--top", "1000", "-o"]).arg(&file).arg("--record").arg(&recorded);
    let outcome = command.arg("--").arg(&program).run(PATIENCE)?;
    ensure!(outcome.code()? == 0, "leaktrace ended with {}: {}", outcome.status, outcome.stderr);
    let report: Value = serde_json::from_slice(&fs::read(&file)?)?;
    let pid = report["command"]["pid"].as_u64().context("no pid of the command")?;
    let mut truths = Vec::new();
    // The report is in a file, so the program has the standard output for itself.
    for line in outcome.stdout.lines() {
        truths.extend(
            Truth::read("line", &serde_json::from_str(line)?)?.into_iter().map(|truth| (truth, Expected::Whole)),
        );
    }
    ensure!(truths.len() == 4, "{}", outcome.stdout);
    let recording = Recording::read(&recorded)?;
    truth::ensure_equal(&truth::compare(&recording, u32::try_from(pid)?, &truths), "")
}

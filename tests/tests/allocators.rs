//! Heap allocations with real probes: bytes and blocks must be exactly those that the fixture knows of.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{
    Fixture, PATIENCE, Program, Session, has_frame, host, live_in, live_of, only, site, stacks, summary,
};
use serde_json::Value;

/// The functions that a fixture calls itself, so that its own function is the caller.
const DIRECT: [&str; 9] =
    ["malloc", "calloc", "realloc", "reallocarray", "posix_memalign", "aligned_alloc", "memalign", "valloc", "pvalloc"];

/// Compares live bytes and blocks under each function with the fixture's own, and that nothing was lost.
fn assert_exact(report: &Value, truth: &Value, functions: &[&str]) {
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(report));
    for function in functions {
        assert_eq!(live_in(report, function), site(truth, function), "{function} {truth}\n{}", summary(report));
    }
}

/// The text of the source line that the first frame of `function` names.
fn source_line(report: &Value, function: &str) -> Result<String> {
    let stack = stacks(report).find(|stack| has_frame(stack, function)).with_context(|| format!("no {function}"))?;
    let frames = stack["frames"].as_array().context("no frames")?;
    let frame = frames.iter().find(|frame| frame["function"] == function).context("no frame")?;
    let file = frame["file"].as_str().with_context(|| format!("no file: {frame}"))?;
    let line = usize::try_from(frame["line"].as_u64().with_context(|| format!("no line: {frame}"))?)?;
    ensure!(Path::new(file).is_absolute(), "{file} is not absolute");
    let text = fs::read_to_string(file).with_context(|| format!("failed to read {file}"))?;
    let text = text.lines().nth(line.saturating_sub(1)).with_context(|| format!("{file} has no line {line}"))?;
    Ok(text.to_owned())
}

/// Each allocation function's blocks are counted to the byte, under the function that called it, with file and line; what was
/// allocated before tracing is not, nor is its free.
#[test]
fn each_function_leaks_exactly() -> Result<()> {
    if !host::can_trace("each_function_leaks_exactly") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    for via in DIRECT {
        fixture.tell(&format!("leak {via} 20 333"))?;
    }
    let before = fixture.report()?;
    let session = Session::start(&[fixture.pid()], &[])?;
    let mut expected = (0, 0);
    for (i, via) in (1..).zip(DIRECT) {
        // Blocks from before: the oldest are released first.
        fixture.tell(&format!("release {via} 20"))?;
        fixture.tell(&format!("leak {via} {} {}", 10 * i, 100 + 7 * i))?;
        expected = (expected.0 + 10 * i * (100 + 7 * i), expected.1 + 10 * i);
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(before["live_count"], 20 * DIRECT.len());
    let functions = DIRECT.map(|via| format!("leak_via_{via}"));
    assert_exact(&report, &truth, &functions.each_ref().map(String::as_str));
    assert_eq!(live_of(&report, fixture.pid()), expected, "{}", summary(&report));
    for function in &functions {
        assert!(source_line(&report, function)?.contains("VIAS(FUNCTIONS)"), "{function}");
    }
    Ok(())
}

/// Blocks that are freed leave nothing, whichever function made them, and all of them were seen.
#[test]
fn each_function_balanced_leaves_nothing() -> Result<()> {
    if !host::can_trace("each_function_balanced_leaves_nothing") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    for via in DIRECT {
        fixture.tell(&format!("churn {via} 200 123"))?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(live_of(&report, fixture.pid()), (0, 0), "{}", summary(&report));
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    // realloc is two calls, of which the second carries the first one's bytes over.
    for via in DIRECT.iter().filter(|via| **via != "realloc") {
        let function = format!("balanced_via_{via}");
        let stack = stacks(&report).find(|stack| has_frame(stack, &function));
        let stack = stack.with_context(|| format!("{function} is not listed\n{}", summary(&report)))?;
        for key in ["allocated_bytes", "freed_bytes"] {
            assert_eq!(stack[key], truth["sites"][&function][key], "{function} {key}\n{}", summary(&report));
        }
    }
    Ok(())
}

/// What is freed later comes off the account of the stack that allocated it, block by block.
#[test]
fn released_blocks_come_off_their_own_stack() -> Result<()> {
    if !host::can_trace("released_blocks_come_off_their_own_stack") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    for (i, via) in (1..).zip(DIRECT) {
        fixture.tell(&format!("leak {via} 50 {}", 64 * i))?;
    }
    for (i, via) in (1..).zip(DIRECT) {
        fixture.tell(&format!("release {via} {}", 5 * i))?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    let functions = DIRECT.map(|via| format!("leak_via_{via}"));
    assert_exact(&report, &truth, &functions.each_ref().map(String::as_str));
    Ok(())
}

/// An allocation inside libc (strdup) is counted to the byte, and its stack claims no more than it has.
#[test]
fn allocations_inside_libc_are_counted() -> Result<()> {
    if !host::can_trace("allocations_inside_libc_are_counted") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("leak strdup 30 77")?;
    fixture.tell("churn strdup 30 77")?;
    let report = session.stop()?;
    assert_eq!(live_of(&report, fixture.pid()), (30 * 77, 30), "{}", summary(&report));
    // libc has no frame pointers: a stack that does not come past it must not be passed off as a whole one.
    for stack in stacks(&report) {
        assert!(has_frame(stack, "main") || stack["complete"] == false, "{stack}");
        let innermost = stack["frames"][0]["function"].as_str().unwrap_or_default();
        assert!(innermost.contains("strdup"), "{innermost} is not the caller of malloc");
    }
    Ok(())
}

/// Failed calls of every kind count nothing, and the pairing goes on after them.
#[test]
fn failed_calls_count_nothing() -> Result<()> {
    if !host::can_trace("failed_calls_count_nothing") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("fail 100")?;
    fixture.tell("leak malloc 3 10")?;
    fixture.tell("keep 12 500")?;
    fixture.tell("fail 1")?;
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_exact(&report, &truth, &["leak_via_malloc", "keep_over_failed_realloc", "fail_each"]);
    assert_eq!(live_of(&report, fixture.pid()), (3 * 10 + 12 * 500, 15), "{}", summary(&report));
    Ok(())
}

/// Chains of realloc leave one block of the last size; realloc(p, 0) frees, realloc(NULL, n) allocates; the line named is the call's own.
#[test]
fn realloc_chains() -> Result<()> {
    if !host::can_trace("realloc_chains") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    // Up to 1 MiB, so that some are moved, some grow in place and the largest become mappings of the allocator.
    for command in ["grow 7 10 1000000", "shrink 5 1000000 30", "to_zero 40 64", "from_null 9 48"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    let functions = ["realloc_grow", "realloc_shrink", "realloc_to_zero", "realloc_from_null"];
    assert_exact(&report, &truth, &functions);
    assert_eq!(live_of(&report, fixture.pid()).1, 7 + 5 + 9, "{}", summary(&report));
    for function in ["realloc_grow", "realloc_shrink", "realloc_from_null"] {
        let line = source_line(&report, function)?;
        assert!(line.contains("realloc(") || line.contains("malloc("), "{function} names the line {line:?}");
    }
    Ok(())
}

/// What the allocator maps for a large block is its own affair: counted once, as heap.
#[test]
fn the_allocators_own_mappings_are_not_counted_twice() -> Result<()> {
    if !host::can_trace("the_allocators_own_mappings_are_not_counted_twice") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &["--resource", "heap,mmap"])?;
    // A mebibyte is over glibc's threshold; the small ones make it move the break or map an arena.
    fixture.tell("leak malloc 4 1048576")?;
    fixture.tell("leak calloc 1000 1000")?;
    fixture.tell("churn malloc 20 1048576")?;
    let report = session.stop()?;
    assert_eq!(live_of(&report, fixture.pid()), (4 * 1_048_576 + 1_000_000, 1004), "{}", summary(&report));
    assert!(stacks(&report).all(|stack| stack["resource"] == "heap"), "{}", summary(&report));
    Ok(())
}

/// Blocks freed by another thread than the one that made them are freed; threads that leak and end leave their blocks.
#[test]
fn frees_from_other_threads() -> Result<()> {
    if !host::can_trace("frees_from_other_threads") {
        return Ok(());
    }
    let mut fixture = Fixture::start("threads")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    for command in ["handoff 2000 100", "handoff_leak 2000 50 10", "churn 4 5000 64", "leak 8 25 40"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_exact(&report, &truth, &["produce", "produce_some_kept", "churn_block", "leak_in_thread"]);
    assert_eq!(live_in(&report, "produce_some_kept"), (200 * 50, 200));
    Ok(())
}

/// Calls left by an exception or a jump count nothing, and what operator new hands out afterwards is counted to the byte.
#[test]
fn exceptions_through_operator_new() -> Result<()> {
    if !host::can_trace("exceptions_through_operator_new")
        || host::program("exceptions_through_operator_new", "c++").is_none()
    {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&Program::cpp("throw").build()?).start()?;
    let session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("leak 3 100")?;
    for command in ["throw_new 20", "throw_array 20", "throw_handler 20", "throw_constructor 20", "throw_deep 5 30"] {
        fixture.tell(command)?;
    }
    if cfg!(target_arch = "x86_64") {
        fixture.tell("abandon 10")?;
    }
    fixture.tell("leak 40 100")?;
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(site(&truth, "leak_via_new"), (4300, 43));
    assert_eq!(live_of(&report, fixture.pid()), (4300, 43), "{}", summary(&report));
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    Ok(())
}

/// Two copies of one program, traced at once: each process has its own account, although their addresses may be the same.
#[test]
fn two_processes_do_not_mix() -> Result<()> {
    if !host::can_trace("two_processes_do_not_mix") {
        return Ok(());
    }
    let (mut one, mut other) = (Fixture::start("allocators")?, Fixture::start("allocators")?);
    let session = Session::start(&[one.pid(), other.pid()], &[])?;
    for _ in 0..5 {
        one.tell("leak malloc 20 100")?;
        other.tell("leak malloc 30 200")?;
        one.tell("release malloc 7")?;
        other.tell("churn malloc 100 100")?;
    }
    other.tell("leak calloc 1 17")?;
    let truths = [one.report()?, other.report()?];
    let report = session.stop()?;
    for (pid, truth) in [one.pid(), other.pid()].into_iter().zip(&truths) {
        assert_exact(&only(&report, pid), truth, &["leak_via_malloc", "leak_via_calloc", "balanced_via_malloc"]);
    }
    assert_eq!(live_of(&report, one.pid()), (65 * 100, 65));
    assert_eq!(live_of(&report, other.pid()), (150 * 200 + 17, 151));
    Ok(())
}

/// Sizes outside of --min-size and --max-size are left out, those on the bounds are not; nor does the allocator's own break then count.
#[test]
fn sizes_are_filtered() -> Result<()> {
    if !host::can_trace("sizes_are_filtered") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &["--min-size", "100", "--max-size", "200"])?;
    for size in [99, 100, 200, 201] {
        fixture.tell(&format!("leak malloc 10 {size}"))?;
    }
    let report = session.stop()?;
    assert_eq!(live_of(&report, fixture.pid()), (3000, 20), "{}", summary(&report));
    Ok(())
}

/// Attached to and left while two threads allocate and free as fast as they can: at most the block that each has in hand is live,
/// also in the final report (what came while probes were removed one by one was counted).
#[test]
fn attached_in_full_flight() -> Result<()> {
    if !host::can_trace("attached_in_full_flight") {
        return Ok(());
    }
    let mut fixture = Fixture::start("threads")?;
    fixture.tell("start 2 64")?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    let report = session.next_report(|report| stacks(report).any(|stack| has_frame(stack, "churn_block")), PATIENCE)?;
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    let (bytes, count) = live_in(&report, "churn_block");
    assert!(count <= 2 && bytes == 64 * count, "{}", summary(&report));
    let last = session.stop()?;
    assert_eq!(last["losses"], serde_json::json!({}), "{}", summary(&last));
    let (bytes, count) = live_in(&last, "churn_block");
    assert!(count <= 2 && bytes == 64 * count, "{}", summary(&last));
    fixture.tell("stop")?;
    Ok(())
}

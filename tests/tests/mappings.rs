//! Mappings and the program break with real probes: exactly the bytes that the fixture has left mapped.

use anyhow::Result;
use leaktrace_tests::{Fixture, Session, host, live_in, live_of, stacks, summary};
use serde_json::Value;

/// Tells a `mappings` fixture each command under `--resource mmap`; its own account and the report's.
fn trace(commands: &[&str]) -> Result<(Value, Value, u32)> {
    let mut fixture = Fixture::start("mappings")?;
    let session = Session::start(&[fixture.pid()], &["--resource", "mmap"])?;
    for command in commands {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    assert!(stacks(&report).all(|stack| stack["resource"] == "mmap"), "{}", summary(&report));
    Ok((report, truth, fixture.pid()))
}

/// The live bytes of the stacks through each of the fixture's functions are what the fixture says, and there are no others.
fn assert_exact(report: &Value, truth: &Value) {
    let live = |of: &Value| of["live_bytes"].as_u64().unwrap_or(0);
    let mut all = 0;
    for (function, site) in truth["sites"].as_object().into_iter().flatten() {
        assert_eq!(live_in(report, function).0, live(site), "{function}: {truth}\n{}", summary(report));
        all += live(site);
    }
    assert_eq!(stacks(report).map(live).sum::<u64>(), all, "{truth}\n{}", summary(report));
}

/// Anonymous and file mappings are counted apart, a stack each; what is unmapped again leaves nothing.
#[test]
fn mapped_and_unmapped() -> Result<()> {
    if !host::can_trace("mapped_and_unmapped") {
        return Ok(());
    }
    let (report, truth, pid) = trace(&["anon 7 3", "file 5 2", "churn 200 4", "anon 2 1"])?;
    assert_exact(&report, &truth);
    assert_eq!(live_of(&report, pid).1, 9 + 5, "{}", summary(&report));
    Ok(())
}

/// munmap of the head, the tail or the middle of a mapping, and of parts of several in one call, leaves the rest.
#[test]
fn partly_unmapped() -> Result<()> {
    if !host::can_trace("partly_unmapped") {
        return Ok(());
    }
    let (report, truth, _) = trace(&["cut head", "cut tail", "cut middle", "cut middle", "several"])?;
    assert_exact(&report, &truth);
    Ok(())
}

/// `MAP_FIXED` over part of a mapping replaces it, and is not counted on top.
#[test]
fn mapped_over() -> Result<()> {
    if !host::can_trace("mapped_over") {
        return Ok(());
    }
    let (report, truth, _) = trace(&["over", "over", "anon 1 1"])?;
    assert_exact(&report, &truth);
    Ok(())
}

/// mremap that grows, moves onto a place, shrinks, or is refused.
#[test]
fn remapped() -> Result<()> {
    if !host::can_trace("remapped") {
        return Ok(());
    }
    let (report, truth, _) = trace(&["grow", "move", "shrink", "fail", "grow"])?;
    assert_exact(&report, &truth);
    Ok(())
}

/// The break moved up, and down again in part.
#[test]
fn break_up_and_down() -> Result<()> {
    if !host::can_trace("break_up_and_down") {
        return Ok(());
    }
    let (report, truth, pid) = trace(&["brk 9", "brk 4", "unbrk 5"])?;
    // Through libc's sbrk, which has no frame pointer; the process's total is the exact part.
    assert_eq!(truth["brk_bytes"], 8 * 4096);
    assert_eq!(live_of(&report, pid).0, 8 * 4096, "{}", summary(&report));
    Ok(())
}

/// Refused calls count nothing and cut nothing.
#[test]
fn refused_calls_count_nothing() -> Result<()> {
    if !host::can_trace("refused_calls_count_nothing") {
        return Ok(());
    }
    let (report, truth, _) = trace(&["refuse 50", "anon 1 1", "refuse 50"])?;
    assert_exact(&report, &truth);
    Ok(())
}

/// Mappings from before tracing are nobody's leak, and cutting or unmapping them subtracts nothing.
#[test]
fn older_mappings_are_left_out() -> Result<()> {
    if !host::can_trace("older_mappings_are_left_out") {
        return Ok(());
    }
    let mut fixture = Fixture::start("mappings")?;
    for command in ["brk 8", "anon 5 5"] {
        fixture.tell(command)?;
    }
    let session = Session::start(&[fixture.pid()], &["--resource", "mmap"])?;
    // Below where the break stood when tracing began.
    fixture.tell("unbrk 6")?;
    fixture.tell("anon 3 2")?;
    let report = session.stop()?;
    assert_eq!(live_of(&report, fixture.pid()), (3 * 2 * 4096, 3), "{}", summary(&report));
    Ok(())
}

/// With `--resource heap` mappings are left out.
#[test]
fn only_heap_when_only_heap_is_asked_for() -> Result<()> {
    if !host::can_trace("only_heap_when_only_heap_is_asked_for") {
        return Ok(());
    }
    let mut fixture = Fixture::start("mappings")?;
    let session = Session::start(&[fixture.pid()], &["--resource", "heap"])?;
    fixture.tell("anon 3 2")?;
    fixture.tell("brk 2")?;
    let report = session.stop()?;
    assert_eq!(live_of(&report, fixture.pid()), (0, 0), "{}", summary(&report));
    Ok(())
}

//! The way to run leaktrace in a test: it sees the attach, reads the report, and can tell that nothing is left.

use anyhow::Result;
use leaktrace_tests::host::{self, BpfObjects};
use leaktrace_tests::{Fixture, Leaktrace, PATIENCE, live_in};

/// A trace from attach to SIGINT: exact bytes, and neither programs nor breakpoints afterwards.
#[test]
fn a_trace_ends_with_its_report_and_leaves_nothing() -> Result<()> {
    if !host::can_trace("a_trace_ends_with_its_report_and_leaves_nothing") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let mut leaktrace = Leaktrace::pid(fixture.pid())?.args(["--format", "json"]).spawn()?;
    leaktrace.wait_attached(fixture.pid())?;
    let held = BpfObjects::of_process(leaktrace.pid())?;
    assert!(!held.programs.is_empty(), "a tracer that is attached holds programs");
    fixture.tell("leak malloc 50 1000")?;
    leaktrace.signal(libc::SIGINT)?;
    let outcome = leaktrace.finish(PATIENCE)?;
    assert_eq!(outcome.code()?, 0, "{outcome:?}");
    let truth = fixture.report()?;
    let (bytes, count) = live_in(&outcome.json()?, "leak_via_malloc");
    assert_eq!(Some(bytes), truth["sites"]["leak_via_malloc"]["live_bytes"].as_u64());
    assert_eq!(count, 50);
    assert!(
        host::wait_until(PATIENCE, || held.still_there().is_ok_and(|left| left.is_empty())),
        "{held:?} is still there"
    );
    assert_eq!(host::breakpoints(fixture.pid())?, 0);
    Ok(())
}

/// One killed with -9 leaves no probe behind either.
#[test]
fn a_killed_tracer_leaves_nothing() -> Result<()> {
    if !host::can_trace("a_killed_tracer_leaves_nothing") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let mut leaktrace = Leaktrace::pid(fixture.pid())?.spawn()?;
    leaktrace.wait_attached(fixture.pid())?;
    let held = BpfObjects::of_process(leaktrace.pid())?;
    leaktrace.signal(libc::SIGKILL)?;
    assert!(leaktrace.finish(PATIENCE)?.code().is_err(), "a signal ended it");
    assert!(
        host::wait_until(PATIENCE, || held.still_there().is_ok_and(|left| left.is_empty())),
        "{held:?} is still there"
    );
    assert!(host::wait_until(PATIENCE, || host::breakpoints(fixture.pid()).is_ok_and(|left| left == 0)));
    fixture.tell("churn malloc 1000 64")?;
    Ok(())
}

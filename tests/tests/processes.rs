//! Processes that are found and followed by themselves: children, and what they leave behind.

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{Fixture, Session, host, live_in, live_of, only, patience, site, summary};
use serde_json::Value;

/// Whether the report shows this process with its probes in place.
fn is_traced(report: &Value, pid: u32) -> bool {
    let process = &only(report, pid)["processes"][0];
    process["allocators"].as_array().is_some_and(|allocators| !allocators.is_empty())
}

/// A child's account begins as a copy of its parent's; what either frees and allocates then is its own.
#[test]
fn a_childs_account_begins_as_a_copy() -> Result<()> {
    if !host::can_trace("a_childs_account_begins_as_a_copy") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let mut session = Session::start(&[fixture.pid()], &["--children"])?;
    fixture.tell("leak 100 1000")?;
    let child: u32 = fixture.tell("branch")?.parse()?;
    session.next_report(|report| is_traced(report, child), patience())?;
    for command in ["child 20 500", "child_free 30", "leak 10 10"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    ensure!(report["losses"] == serde_json::json!({}), "{}", summary(&report));
    let (of_parent, of_child) = (only(&report, fixture.pid()), only(&report, child));
    assert_eq!(live_in(&of_parent, "leak_before"), site(&truth, "leak_before"), "{}", summary(&report));
    assert_eq!(live_in(&of_parent, "leak_in_child"), (0, 0), "{}", summary(&report));
    assert_eq!(live_in(&of_child, "leak_before"), (70_000, 70), "{}", summary(&report));
    assert_eq!(live_in(&of_child, "leak_in_child"), (10_000, 20), "{}", summary(&report));
    Ok(())
}

/// Without `--children` a child is nobody's business.
#[test]
fn children_are_followed_only_when_asked_for() -> Result<()> {
    if !host::can_trace("children_are_followed_only_when_asked_for") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    for command in ["leak 100 1000", "branch", "child 20 500"] {
        fixture.tell(command)?;
    }
    let report = session.stop()?;
    let processes = report["processes"].as_array().context("no processes")?;
    ensure!(processes.len() == 1, "{}", summary(&report));
    assert_eq!(live_of(&report, fixture.pid()), (100_000, 100), "{}", summary(&report));
    Ok(())
}

/// Children that have ended are summed under their executable, and the parent goes on.
#[test]
fn ended_children_are_summed() -> Result<()> {
    if !host::can_trace("ended_children_are_summed") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let mut session = Session::start(&[fixture.pid()], &["--children"])?;
    fixture.tell("leak 10 100")?;
    for _ in 0..3 {
        let child: u32 = fixture.tell("branch")?.parse()?;
        session.next_report(|report| is_traced(report, child), patience())?;
        fixture.tell("child 5 100")?;
        fixture.tell("reap")?;
    }
    let ended = |report: &Value| report["ended_processes"][0]["count"].as_u64();
    let report = session.next_report(|report| ended(report) == Some(3), patience())?;
    ensure!(report["ended_processes"][0]["live_bytes_at_end"] == 3 * 1500, "{}", report["ended_processes"]);
    ensure!(report["processes"].as_array().is_some_and(|processes| processes.len() == 1), "{}", summary(&report));
    session.stop()?;
    Ok(())
}

//! Processes that are found and followed by themselves: children, and what they leave behind.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{Fixture, Session, has_frame, host, live_in, live_of, only, patience, site, stacks, summary};
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

/// A server that forks for each connection leaks itself; its children end soon, leave blocks, and free what they inherited before
/// their own probes stand. The server is called leaking; none of its children is, and all are summed.
#[test]
fn a_fork_server_leaks_and_its_children_do_not() -> Result<()> {
    if !host::can_trace("a_fork_server_leaks_and_its_children_do_not") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let pid = fixture.pid();
    let mut session = Session::start(&[pid], &["--children"])?;
    let mut connections = 0;
    let mut seen = Value::Null;
    let start = Instant::now();
    // The verdict is waited for, and then as many connections again are served by children of a parent that is known to leak.
    let mut after_verdict = 0;
    while after_verdict < 12 {
        ensure!(start.elapsed() < Duration::from_secs(90), "no verdict: {}", summary(&seen));
        for command in ["leak 4 1000", "serve 2 10 500 60"] {
            fixture.tell(command)?;
        }
        connections += 2;
        seen = session.next_report(|_| true, patience())?;
        let server = &only(&seen, pid)["processes"][0];
        after_verdict += i32::from(server["verdict"] == "leaking");
        for process in seen["processes"].as_array().into_iter().flatten() {
            ensure!(process["pid"] == pid || process["verdict"] != "leaking", "{}", summary(&seen));
        }
    }
    let all_counted = |report: &Value| report["ended_processes"][0]["count"] == connections;
    let report = session.next_report(all_counted, patience())?;
    let ended = report["ended_processes"].as_array().context("no sums")?;
    ensure!(ended.len() == 1 && ended[0]["leaking"] == 0, "{}", report["ended_processes"]);
    ensure!(ended[0]["exe"].as_str().is_some_and(|exe| exe.contains("lifecycle")), "{}", report["ended_processes"]);
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(live_in(&only(&report, pid), "leak_before"), site(&truth, "leak_before"), "{}", summary(&report));
    assert_eq!(live_in(&only(&report, pid), "leak_in_child"), (0, 0), "{}", summary(&report));
    Ok(())
}

/// A child that lives on and leaks is called leaking, with its call stack; its parent, which serves on, is not.
#[test]
fn a_child_that_leaks_is_named() -> Result<()> {
    if !host::can_trace("a_child_that_leaks_is_named") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let mut session = Session::start(&[fixture.pid()], &["--children"])?;
    fixture.tell("leak 100 1000")?;
    let child: u32 = fixture.tell("branch")?.parse()?;
    let start = Instant::now();
    let mut report = Value::Null;
    while only(&report, child)["processes"][0]["verdict"] != "leaking" {
        ensure!(start.elapsed() < Duration::from_secs(90), "no verdict: {}", summary(&report));
        fixture.tell("child 3 700")?;
        report = session.next_report(|_| true, patience())?;
    }
    let of_child = only(&report, child);
    let growing: Vec<&Value> = stacks(&of_child).filter(|stack| stack["verdict"] == "growing").collect();
    ensure!(growing.len() == 1 && has_frame(growing[0], "leak_in_child"), "{}", summary(&report));
    ensure!(only(&report, fixture.pid())["processes"][0]["verdict"] != "leaking", "{}", summary(&report));
    session.stop()?;
    Ok(())
}

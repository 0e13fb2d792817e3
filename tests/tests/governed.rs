//! What tracing may cost, on processes whose allocators are hot: they are watched in windows, and what leaks is found all the same.

use std::time::Duration;

use anyhow::{Result, ensure};
use leaktrace_tests::host::can_trace;
use leaktrace_tests::{Fixture, Program, Session, has_frame, patience, stacks, summary};
use serde_json::Value;

/// Time for a verdict from windows of some third of the time: about half a minute where the machine is not busy with others.
const VERDICT: Duration = Duration::from_mins(3);

/// A thread that churns as fast as it can, and a leak of two thousand blocks a second beside it.
fn hot() -> Result<Fixture> {
    let program = Program::c("leak_slow").build()?;
    let builder = Fixture::builder(&program);
    ["--rate", "524288", "--block", "256", "--churn-threads", "1"]
        .into_iter()
        .fold(builder, leaktrace_tests::Builder::arg)
        .start()
}

fn state(report: &Value) -> &str {
    report["processes"][0]["overhead"]["state"].as_str().unwrap_or_default()
}

fn grows(stack: &Value) -> bool {
    stack["verdict"] == "growing"
}

/// Breakpoints that alone would cost more than the budget stand for a part of the time; the leak is found from that, with an interval
/// that holds its rate, and nothing else is called growing.
#[test]
fn leak_found_in_windows() -> Result<()> {
    if !can_trace("leak_found_in_windows") {
        return Ok(());
    }
    let fixture = hot()?;
    let mut session = Session::start(&[fixture.pid()], &["--max-overhead", "50", "--interval", "1s"])?;
    session.next_report(|report| state(report) == "windows", patience())?;
    let report = session.next_report(|report| stacks(report).any(grows), VERDICT)?;
    session.stop()?;
    for stack in stacks(&report).filter(|stack| grows(stack)) {
        ensure!(has_frame(stack, "leak_block"), "something else is called growing\n{}", summary(&report));
        ensure!(stack["by_windows"] == true, "not by windows: {stack}");
        let [low, high] =
            [&stack["growth"]["ci95"][0], &stack["growth"]["ci95"][1]].map(|end| end.as_f64().unwrap_or(f64::NAN));
        // The leak is paced by the clock; twice the width of the interval, which one in twenty would miss otherwise.
        let (middle, half) = (f64::midpoint(low, high), (high - low) / 2.0);
        ensure!((middle - 524_288.0).abs() <= 2.0 * half, "from {low} to {high} bytes a second\n{}", summary(&report));
    }
    let overhead = &report["processes"][0]["overhead"];
    let duty = overhead["duty"].as_f64().unwrap_or(1.0);
    ensure!(duty < 0.8, "breakpoints stood all the time: {overhead}");
    ensure!(overhead["budget_percent"] == 50.0 && overhead["of"] == "process", "{overhead}");
    Ok(())
}

/// A budget that even the rarest windows would exceed lets the process go, and says why; it is then as fast as before.
#[test]
fn released_over_a_tiny_budget() -> Result<()> {
    if !can_trace("released_over_a_tiny_budget") {
        return Ok(());
    }
    let fixture = hot()?;
    let mut session = Session::start(&[fixture.pid()], &["--max-overhead", "0.01"])?;
    let report = session.next_report(|report| state(report) == "released", patience())?;
    let overhead = &report["processes"][0]["overhead"];
    let reason = overhead["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("even in windows") && overhead["duty"] == 0.0, "{overhead}");
    ensure!(!stacks(&report).any(grows), "{}", summary(&report));
    session.stop()?;
    Ok(())
}

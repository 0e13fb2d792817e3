//! Verdicts on real processes in real time, at the defaults. Each takes the half minute that a verdict takes; they run side
//! by side.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::host::can_trace;
use leaktrace_tests::{
    Fixture, Leaktrace, Outcome, PATIENCE, Program, Session, Together, has_frame, site, stacks, summary,
};
use serde_json::Value;

static SCENARIOS: Together = Together::new(&[
    ("demo", demo_scenario),
    ("slow_leak", slow_leak_scenario),
    ("stopped_leak", stopped_leak_scenario),
    ("levelled_cache", levelled_cache_scenario),
]);

/// The promise: a verdict within this time of tracing.
const WATCH: Duration = Duration::from_secs(30);

/// Traces for [`WATCH`]; the outcome of `--format json --fail-on-leak`.
fn watch(pid: u32) -> Result<Outcome> {
    let duration = format!("{}s", WATCH.as_secs());
    Leaktrace::pid(pid)?.args(["--format", "json", "--fail-on-leak", "--duration", &duration]).run(WATCH + PATIENCE)
}

/// `leak_slow` with these options.
fn leak_slow(options: &str) -> Result<Fixture> {
    let program = Program::c("leak_slow").build()?;
    options.split_whitespace().fold(Fixture::builder(&program), leaktrace_tests::Builder::arg).start()
}

/// The stacks that are called growing; an error if one of them does not go through `expected`.
fn growing<'a>(report: &'a Value, expected: &str) -> Result<Vec<&'a Value>> {
    let growing: Vec<&Value> = stacks(report).filter(|stack| stack["verdict"] == "growing").collect();
    let right = growing.iter().all(|stack| has_frame(stack, expected));
    ensure!(right, "something else than {expected} is called growing\n{}", summary(report));
    Ok(growing)
}

/// One stack is called growing, it goes through `function`, and its rate is within 10 % of `rate`.
fn ensure_named<'a>(report: &'a Value, function: &str, rate: f64) -> Result<&'a Value> {
    let growing = growing(report, function)?;
    ensure!(growing.len() == 1, "{} stacks are called growing\n{}", growing.len(), summary(report));
    let first = stacks(report).next().context("no stack")?;
    ensure!(first["id"] == growing[0]["id"], "it is not the first\n{}", summary(report));
    let process = &report["processes"][0]["verdict"];
    ensure!(process == "leaking", "the process is called {process}");
    let found = growing[0]["growth"]["bytes_per_s"].as_f64().context("no rate")?;
    ensure!((found / rate - 1.0).abs() < 0.1, "{found} bytes a second found, {rate} leaked\n{}", summary(report));
    Ok(growing[0])
}

/// The demo's leak is named within 30 s, first, with its line and its rate; its cache is not, and the exit status says "leak".
#[test]
fn demo() -> Result<()> {
    if can_trace("demo") { SCENARIOS.result("demo") } else { Ok(()) }
}

fn demo_scenario() -> Result<()> {
    let mut fixture = Fixture::start("demo")?;
    let (before, start) = (site(&fixture.report()?, "session_remember").0, Instant::now());
    let outcome = watch(fixture.pid())?;
    let (after, elapsed) = (site(&fixture.report()?, "session_remember").0, start.elapsed());
    ensure!(outcome.code()? == 3, "exit status {}: {}", outcome.status, outcome.stderr);
    let report = outcome.json()?;
    let leak = ensure_named(&report, "session_remember", (after - before) as f64 / elapsed.as_secs_f64())?;
    let innermost = &leak["frames"][0];
    ensure!(innermost["function"] == "session_remember", "{innermost}");
    ensure!(innermost["file"].as_str().is_some_and(|file| file.ends_with("demo.c")), "{innermost}");
    ensure!(innermost["line"].as_u64().is_some_and(|line| line > 0), "{innermost}");
    Ok(())
}

/// 2 KB/s beside a cache of 50 MB and heavy churn is named within 30 s, and nothing else is.
#[test]
fn slow_leak_beside_a_large_cache() -> Result<()> {
    if can_trace("slow_leak_beside_a_large_cache") { SCENARIOS.result("slow_leak") } else { Ok(()) }
}

fn slow_leak_scenario() -> Result<()> {
    let mut fixture = leak_slow("--rate 2048 --block 64 --cache-mb 50 --churn-threads 2 --churn-rate 40000")?;
    let outcome = watch(fixture.pid())?;
    let report = outcome.json()?;
    ensure!(outcome.code()? == 3, "exit status {}: {}\n{}", outcome.status, outcome.stderr, summary(&report));
    ensure_named(&report, "leak_block", 2048.0)?;
    let churned = fixture.report()?["sites"]["churn_once"]["allocated_count"].as_u64().unwrap_or(0);
    ensure!(churned > 500_000, "only {churned} blocks were churned: that is not heavy");
    Ok(())
}

/// A leak that stopped is no longer called growing 20 s later, and does not become so again.
#[test]
fn stopped_leak() -> Result<()> {
    if can_trace("stopped_leak") { SCENARIOS.result("stopped_leak") } else { Ok(()) }
}

fn stopped_leak_scenario() -> Result<()> {
    let mut fixture = leak_slow("--rate 100000")?;
    let mut session = Session::start(&[fixture.pid()], &["--interval", "1s"])?;
    let is_growing = |report: &Value| stacks(report).any(|stack| stack["verdict"] == "growing");
    let report = session.next_report(is_growing, WATCH).context("it is not found")?;
    growing(&report, "leak_block")?;
    fixture.tell("rate 0")?;
    let stopped = Instant::now();
    // An interval and the way through the pipe on top of the promise.
    session.next_report(|report| !is_growing(report), Duration::from_secs(22)).context("it is still called growing")?;
    while stopped.elapsed() < Duration::from_secs(25) {
        let report = session.next_report(|_| true, PATIENCE)?;
        ensure!(!is_growing(&report), "it is called growing again\n{}", summary(&report));
    }
    let report = session.stop()?;
    ensure!(report["processes"][0]["verdict"] != "leaking", "{}", summary(&report));
    Ok(())
}

/// A cache that fills for 10 s and levels off, one that is large and busy, and a spike: 20 s later none of them is a leak.
#[test]
fn levelled_cache() -> Result<()> {
    if can_trace("levelled_cache") { SCENARIOS.result("levelled_cache") } else { Ok(()) }
}

fn levelled_cache_scenario() -> Result<()> {
    let mut fixture = leak_slow("--cache-mb 20 --churn-threads 1 --churn-rate 10000")?;
    let mut session = Session::start(&[fixture.pid()], &["--interval", "1s"])?;
    fixture.tell("fill 20000000 10")?;
    let start = Instant::now();
    fixture.tell("spike 10000000")?;
    let settled = Duration::from_secs(10 + 20 + 1);
    while start.elapsed() < settled {
        session.next_report(|_| true, PATIENCE)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    ensure!(site(&truth, "fill_cache").0 > 19_900_000, "the fixture has not filled its cache: {truth}");
    ensure!(site(&truth, "spike_up") == (0, 0), "the fixture's spike is not over: {truth}");
    let found = stacks(&report).find(|stack| has_frame(stack, "fill_cache")).context("fill_cache is not listed")?;
    ensure!(found["live_bytes"] == truth["sites"]["fill_cache"]["live_bytes"], "{}", summary(&report));
    ensure!(stacks(&report).all(|stack| stack["verdict"] != "growing"), "{}", summary(&report));
    ensure!(report["processes"][0]["verdict"] != "leaking", "{}", summary(&report));
    Ok(())
}

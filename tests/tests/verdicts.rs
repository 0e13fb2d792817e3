//! Verdicts on real processes in real time, at the defaults. Each takes the half minute that a verdict takes; they run side
//! by side.

use std::time::Duration;

use anyhow::{Context as _, Result};
use leaktrace_tests::host::{can_trace, program};
use leaktrace_tests::{Fixture, Leaktrace, PATIENCE, Program, has_frame, stacks};
use serde_json::Value;

/// Traces for this long; the promise is a verdict within 30 s.
const WATCH: &str = "30s";

fn watch(pid: u32, options: &[&str]) -> Result<Value> {
    let outcome = Leaktrace::pid(pid)?
        .args(["--format", "json", "--duration", WATCH])
        .args(options)
        .run(Duration::from_secs(30) + PATIENCE)?;
    anyhow::ensure!(outcome.code()? == 0, "leaktrace failed: {}", outcome.stderr);
    outcome.json()
}

fn growing(report: &Value) -> Vec<&Value> {
    stacks(report).filter(|stack| stack["verdict"] == "growing").collect()
}

/// The demo's leak is named within 30 s, at the top, with its rate; its cache is not.
#[test]
fn demo() -> Result<()> {
    if !can_trace("demo") {
        return Ok(());
    }
    let fixture = Fixture::start("demo.c")?;
    let report = watch(fixture.pid(), &[])?;
    assert_eq!(report["processes"][0]["verdict"], "leaking");
    let growing = growing(&report);
    assert_eq!(growing.len(), 1, "{growing:#?}");
    assert!(has_frame(growing[0], "session_remember"));
    assert_eq!(growing[0]["frames"][0]["function"], "session_remember");
    assert!(growing[0]["frames"][0]["line"].as_u64().is_some_and(|line| line > 0));
    let rate = growing[0]["growth"]["bytes_per_s"].as_f64().context("a rate")?;
    assert!((180e3..220e3).contains(&rate), "{rate}");
    Ok(())
}

/// 2 KB/s beside a cache of 50 MB and churn is named within 30 s, and nothing else is.
#[test]
fn slow_leak_beside_a_large_cache() -> Result<()> {
    if !can_trace("slow_leak_beside_a_large_cache") {
        return Ok(());
    }
    let program = Program::c("leak_slow.c").build()?;
    let mut fixture = Fixture::builder(&program);
    for argument in "--rate 2048 --block 64 --cache-mb 50 --churn-threads 2 --churn-rate 5000".split(' ') {
        fixture = fixture.arg(argument);
    }
    let fixture = fixture.patience(PATIENCE).start()?;
    let report = watch(fixture.pid(), &[])?;
    let growing = growing(&report);
    assert_eq!(growing.len(), 1, "{growing:#?}");
    assert!(has_frame(growing[0], "leak_block"), "{growing:#?}");
    let rate = growing[0]["growth"]["bytes_per_s"].as_f64().context("a rate")?;
    assert!((1800.0..2300.0).contains(&rate), "{rate}");
    Ok(())
}

/// A leak that stopped is no longer called growing 20 s later.
#[test]
fn stopped_leak() -> Result<()> {
    if !can_trace("stopped_leak") {
        return Ok(());
    }
    let program = Program::c("leak_slow.c").build()?;
    let mut fixture = Fixture::builder(&program).arg("--rate").arg("100000").start()?;
    let mut running = Leaktrace::pid(fixture.pid())?.args(["--format", "jsonl", "--interval", "1s"]).spawn()?;
    let is = |line: &str, verdict: &str| {
        serde_json::from_str::<Value>(line).is_ok_and(|report| {
            stacks(&report).any(|stack| has_frame(stack, "leak_block") && stack["verdict"] == verdict)
        })
    };
    running.wait_stdout(|line| is(line, "growing"), Duration::from_secs(40))?;
    fixture.tell("rate 0")?;
    let start = std::time::Instant::now();
    running.wait_stdout(|line| is(line, "plateau"), Duration::from_secs(25))?;
    // An interval and the way through the pipe on top of the promise.
    assert!(start.elapsed() < Duration::from_secs(22), "{:?}", start.elapsed());
    running.signal(libc::SIGINT)?;
    running.finish(PATIENCE)?;
    Ok(())
}

/// Debian's python3, allocating and releasing heavily: no finding.
#[test]
fn python_without_a_leak() -> Result<()> {
    let name = "python_without_a_leak";
    if !can_trace(name) {
        return Ok(());
    }
    let Some(python) = program(name, "/usr/bin/python3") else { return Ok(()) };
    let script = "
import time, json
end = time.time() + 40
cache = {}
i = 0
while time.time() < end:
    i += 1
    cache[i % 500] = 'x' * (i % 3000)
    json.loads(json.dumps({str(k): [k] * 20 for k in range(200)}))
";
    let outcome = Leaktrace::new()?
        .args(["--format", "json", "--duration", WATCH, "--fail-on-leak", "--"])
        .arg(python)
        .args(["-c", script])
        .run(Duration::from_secs(40) + PATIENCE)?;
    assert_eq!(outcome.code()?, 0, "{}\n{}", outcome.stderr, outcome.stdout);
    Ok(())
}

/// Debian's python3, made to leak through libc's malloc: a finding, and the exit status says so.
#[test]
fn python_made_to_leak() -> Result<()> {
    let name = "python_made_to_leak";
    if !can_trace(name) {
        return Ok(());
    }
    let Some(python) = program(name, "/usr/bin/python3") else { return Ok(()) };
    let script = "
import time, ctypes
libc = ctypes.CDLL('libc.so.6')
libc.malloc.restype = ctypes.c_void_p
for i in range(4000):
    libc.malloc(1000)
    time.sleep(0.01)
";
    let outcome = Leaktrace::new()?
        .args(["--format", "json", "--duration", WATCH, "--fail-on-leak", "--"])
        .arg(python)
        .args(["-c", script])
        .run(Duration::from_secs(40) + PATIENCE)?;
    assert_eq!(outcome.code()?, 3, "{}", outcome.stderr);
    let report = outcome.json()?;
    let growing = growing(&report);
    assert!(
        growing
            .iter()
            .any(|stack| { stack["frames"][0]["module"].as_str().is_some_and(|module| module.contains("libffi")) }),
        "{growing:#?}"
    );
    Ok(())
}

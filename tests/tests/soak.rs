//! The short form of `cargo xtask soak`: each fault once, side by side, and a few seconds at full rate.

use std::time::Duration;

use anyhow::{Result, ensure};
use leaktrace_tests::host;
use leaktrace_tests::soak::{FAULTS, Outcome, Scale, agent, steady};

/// Whatever happens, nothing is lost silently and nothing is called a leak.
#[test]
fn faults() -> Result<()> {
    if !host::can_trace("faults") {
        return Ok(());
    }
    // Two at a time: each keeps two threads busy.
    let mut failed = Vec::new();
    for pair in FAULTS.chunks(2) {
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let started: Vec<_> = pair.iter().map(|fault| scope.spawn(|| fault.run(Scale::SHORT))).collect();
            started.into_iter().map(|thread| thread.join().expect("a fault that does not panic")).collect()
        });
        failed.extend(outcomes.into_iter().filter_map(|outcome| {
            let error = outcome.result.err()?;
            Some(format!("{}: {error:#}", outcome.name))
        }));
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// At full rate the tracer's memory and descriptors are flat, and every block is accounted for.
#[test]
fn full_rate() -> Result<()> {
    if !host::can_trace("full_rate") {
        return Ok(());
    }
    steady(Duration::from_secs(8)).map(drop)
}

/// With processes, requests and reloads that come and go the agent's memory, descriptors, threads and series are flat.
#[test]
fn agent_for_long() -> Result<()> {
    if !host::can_trace("agent_for_long") {
        return Ok(());
    }
    let figures = agent(Duration::from_secs(15))?;
    eprintln!("{figures:?}");
    Ok(())
}

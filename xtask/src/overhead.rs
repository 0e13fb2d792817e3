//! `cargo xtask overhead`: is the budget kept? A churn is traced within several budgets, beside a twin that is not traced; what
//! it does for each second of processor time is compared. A timing, so it prints and asserts nothing.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use leaktrace_tests::{Builder, Fixture, Leaktrace, PATIENCE, Program, has_frame, host, stacks};
use serde_json::Value;

use crate::process::{cargo, check};
use crate::setup;

/// What the slowdown may be, as a multiple of the budget.
const ALLOWED: f64 = 1.3;

#[derive(clap::Args)]
pub struct Options {
    /// Minutes to trace within each budget
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Minutes to wait for the leak within a budget of 5 %
    #[arg(long, default_value_t = 20.0)]
    leak_minutes: f64,
}

pub fn overhead(options: &Options) -> Result<()> {
    setup::setup()?;
    check(cargo().args(["build", "--quiet", "--release", "--package", "leak-user"]), "build leaktrace")?;
    println!("threads  budget  slowdown  kept  measured  state     duty");
    for threads in [1, 8] {
        for budget in [1.0, 2.0, 5.0, 20.0] {
            row(threads, budget, Duration::from_secs_f64(options.minutes * 60.0))?;
        }
    }
    find(Duration::from_secs_f64(options.leak_minutes * 60.0))
}

/// Churn on so many threads, and a leak of 1 MB a minute.
fn churn(threads: u32) -> Result<Fixture> {
    let program = Program::c("leak_slow").build()?;
    let threads = threads.to_string();
    let args = ["--rate", "16667", "--block", "256", "--churn-threads", &threads];
    args.into_iter().fold(Fixture::builder(&program), Builder::arg).start()
}

/// Pairs of churn until now, and the processor time that they took.
fn progress(fixture: &mut Fixture) -> Result<(f64, f64)> {
    let report = fixture.report()?;
    let pairs =
        report["sites"]["churn_once"]["allocated_count"].as_f64().context("the fixture does not count its churn")?;
    Ok((pairs, host::cpu_time(fixture.pid())?.as_secs_f64()))
}

fn row(threads: u32, budget: f64, time: Duration) -> Result<()> {
    let (mut traced, mut twin) = (churn(threads)?, churn(threads)?);
    sleep(Duration::from_secs(1));
    let before = [progress(&mut traced)?, progress(&mut twin)?];
    let duration = format!("{}ms", time.as_millis());
    let percent = budget.to_string();
    let args = ["--format", "json", "--max-overhead", &percent, "--duration", &duration];
    let report: Value = Leaktrace::pid(traced.pid())?.args(args).run(time + PATIENCE)?.json()?;
    let after = [progress(&mut traced)?, progress(&mut twin)?];
    let [of_traced, of_twin] = [0, 1].map(|index| {
        let ((from, start), (to, end)): ((f64, f64), (f64, f64)) = (before[index], after[index]);
        (to - from) / (end - start)
    });
    let slowdown = (1.0 - of_traced / of_twin) * 100.0;
    let overhead = &report["processes"][0]["overhead"];
    println!(
        "{threads:7} {budget:5} % {slowdown:7.2} % {:>5} {:7.2} %  {:9} {:.4}",
        if slowdown <= ALLOWED * budget { "yes" } else { "NO" },
        overhead["measured_percent"].as_f64().unwrap_or(f64::NAN),
        overhead["state"].as_str().unwrap_or("?"),
        overhead["duty"].as_f64().unwrap_or(f64::NAN),
    );
    Ok(())
}

/// How long it takes until the leak in the churn is found.
fn find(limit: Duration) -> Result<()> {
    let traced = churn(1)?;
    let start = Instant::now();
    let args = ["--format", "jsonl", "--interval", "1s", "--max-overhead", "5"];
    let mut running = Leaktrace::pid(traced.pid())?.args(args).spawn()?;
    let found = running.wait_stdout(
        |line| {
            serde_json::from_str::<Value>(line).is_ok_and(|report| {
                stacks(&report).any(|stack| stack["verdict"] == "growing" && has_frame(stack, "leak_block"))
            })
        },
        limit,
    );
    match found {
        Ok(_) => println!("a leak of 1 MB a minute, within 5 %: found after {:.0} s", start.elapsed().as_secs_f64()),
        Err(_) => println!("a leak of 1 MB a minute, within 5 %: NOT found in {:.0} s", limit.as_secs_f64()),
    }
    running.signal(nix::libc::SIGINT)
}

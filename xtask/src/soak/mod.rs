//! `cargo xtask soak`: every fault of [`leaktrace_tests::soak`] at its full length, then minutes at full rate; with `--agent` the agent. Prints a table of verdicts
//! and figures; the exit code says whether all held.

use std::env;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use leaktrace_tests::soak::{FAULTS, Outcome, Scale, agent, steady};
use leaktrace_tests::{BINARY_VARIABLE, host, target_dir};

use crate::process::{as_root, exit_code, is_root};
use crate::run;
use crate::setup::setup;

#[derive(Args)]
pub struct Options {
    /// Minutes at full rate; zero for the faults alone
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    minutes: u32,
    /// The faults as short as in the tests
    #[arg(long)]
    quick: bool,
    /// The agent instead, for as many minutes: processes, requests and reloads by the thousand, servers that come and go
    #[arg(long)]
    agent: bool,
    /// Only what has this in its name
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Everything is built already
    #[arg(long, hide = true)]
    built: bool,
}

/// The name of what is no fault.
const FULL_RATE: &str = "full rate";

/// Sets up, builds, runs everything and prints the table. A failure is told by the exit code after all have been run.
pub fn soak(options: &Options) -> Result<ExitCode> {
    if !options.built {
        setup()?;
        run::build()?;
    }
    if !is_root() {
        return rerun_as_root(options);
    }
    host::kernel_tests_possible().map_err(anyhow::Error::msg).context("failed to trace on this host")?;
    // The release build, whatever profile this one is of.
    // SAFETY: no other thread of this program runs yet.
    unsafe { env::set_var(BINARY_VARIABLE, target_dir()?.join("release/leaktrace")) };
    let time = Duration::from_mins(u64::from(options.minutes));
    if options.agent {
        let start = Instant::now();
        let held = show(&Outcome { name: "agent", result: agent(time), took: start.elapsed() });
        return Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let scale = if options.quick { Scale::SHORT } else { Scale::FULL };
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| name.contains(only));
    let mut held = true;
    for fault in FAULTS.into_iter().filter(|fault| wanted(fault.name)) {
        held &= show(&fault.run(scale));
    }
    if options.minutes > 0 && wanted(FULL_RATE) {
        let start = Instant::now();
        let result = steady(time);
        held &= show(&Outcome { name: FULL_RATE, took: start.elapsed(), result });
    }
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints one row as soon as it is known; whether it held.
fn show(outcome: &Outcome) -> bool {
    let (verdict, rest) = match &outcome.result {
        Ok(figures) => {
            let mut text = String::new();
            for (name, figure) in figures {
                let separator = if text.is_empty() { "" } else { "; " };
                // Writing to a string does not fail.
                let _ = write!(text, "{separator}{name}: {figure}");
            }
            ("held", text)
        }
        Err(error) => ("FAILED", format!("{error:#}")),
    };
    println!("{verdict:6}  {:33}  {:5.1} s  {rest}", outcome.name, outcome.took.as_secs_f64());
    outcome.result.is_ok()
}

/// Everything that cargo does was done as the user; the rest needs BPF.
fn rerun_as_root(options: &Options) -> Result<ExitCode> {
    let this = env::current_exe().context("failed to find the path of this program")?;
    let mut command = as_root(&this)?;
    command.args(["soak", "--built", "--minutes", &options.minutes.to_string()]);
    if options.agent {
        command.arg("--agent");
    }
    if options.quick {
        command.arg("--quick");
    }
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    let status = command.status().with_context(|| format!("failed to start {} as root", this.display()))?;
    Ok(exit_code(status))
}

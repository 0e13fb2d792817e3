//! The load, and whether a report of it adds up.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Figures;
use crate::{Fixture, Session, stacks, summary};

/// The fixture `soak` with its threads waiting, so that a trace can begin before they allocate anything.
pub struct Load {
    pub fixture: Fixture,
}

impl Load {
    pub fn start(threads: u32) -> Result<Self> {
        let mut fixture = Fixture::start("soak")?;
        fixture.tell(&format!("threads {threads}"))?;
        Ok(Self { fixture })
    }

    pub fn pid(&self) -> u32 {
        self.fixture.pid()
    }

    pub fn go(&mut self) -> Result<()> {
        self.fixture.tell("go").map(drop)
    }

    /// Lets it work for so long and holds it still.
    pub fn work(&mut self, time: Duration) -> Result<()> {
        self.go()?;
        std::thread::sleep(time);
        self.pause()
    }

    pub fn pause(&mut self) -> Result<()> {
        self.fixture.tell("pause").map(drop)
    }

    /// Holds it still, frees all that it has, and gives how many blocks it was given in all.
    pub fn settle(&mut self) -> Result<u64> {
        self.pause()?;
        self.fixture.tell("drain")?;
        let truth = self.fixture.report()?;
        ensure!(truth["sites"]["churn_any"]["live_count"] == 0, "the load still holds something: {truth}");
        truth["sites"]["churn_any"]["allocated_count"].as_u64().context("the load does not know what it did")
    }
}

/// A number of a report, zero where it is not there: counters of zero are left out.
pub fn number(report: &Value, path: &str) -> u64 {
    report.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

/// Whatever was lost: nothing is called a leak, and the blocks that were seen are all accounted for.
pub fn sound(report: &Value) -> Result<()> {
    for process in report["processes"].as_array().into_iter().flatten() {
        ensure!(process["verdict"] != "leaking", "a false finding: {}", summary(report));
    }
    let growing = stacks(report).find(|stack| stack["verdict"] == "growing");
    ensure!(growing.is_none(), "a false finding: {}", summary(report));
    let [allocated, live, ended, not_kept] =
        ["allocated", "live", "ended", "not_kept"].map(|name| number(report, &format!("/accounts/{name}")));
    ensure!(allocated == live + ended + not_kept, "the account does not add up: {}", report["accounts"]);
    Ok(())
}

/// After the load has freed everything: each block that it was given was seen or is counted as lost by one of `lost`, and none is
/// taken to be live.
pub fn settled(report: &Value, given: u64, lost: &[&str], exactly: bool) -> Result<()> {
    sound(report)?;
    let seen = number(report, "/accounts/allocated");
    let missed: u64 = lost.iter().map(|name| number(report, &format!("/losses/{name}"))).sum();
    let all = seen + missed;
    let adds_up = if exactly { all == given } else { all >= given };
    ensure!(adds_up, "{given} blocks were given, {seen} seen and {missed} counted as lost: {}", summary(report));
    let live =
        stacks(report).filter(|stack| crate::has_frame(stack, "churn_any")).map(|stack| number(stack, "/live_count"));
    let live: u64 = live.sum();
    ensure!(live == 0, "{live} blocks that were freed count as live: {}", summary(report));
    if missed > 0 || number(report, "/losses/frees_lost") > 0 {
        let marked =
            report["processes"].as_array().into_iter().flatten().all(|process| process["affected_by_loss"] == true);
        ensure!(marked, "the verdict has no mark of the loss: {}", summary(report));
    }
    Ok(())
}

/// Figures of a report for the table.
pub fn figures(report: &Value) -> Figures {
    let mut figures = vec![
        ("seen", number(report, "/accounts/allocated").to_string()),
        ("live", number(report, "/accounts/live").to_string()),
        ("kernel", mib(number(report, "/memory/kernel_bytes"))),
        ("own", mib(number(report, "/memory/user_bytes"))),
    ];
    let losses = report["losses"].as_object().into_iter().flatten();
    let losses: Vec<String> = losses.map(|(name, count)| format!("{name} {count}")).collect();
    figures.push(("losses", if losses.is_empty() { "none".to_owned() } else { losses.join(", ") }));
    figures
}

pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A trace of the load alone, heap only: mappings of threads' stacks and the like are not its accounts' business.
pub fn trace(load: &Load, args: &[&str]) -> Result<Session> {
    let args: Vec<&str> = ["--resource", "heap"].into_iter().chain(args.iter().copied()).collect();
    Session::start(&[load.pid()], &args)
}

//! Full rate for minutes: the tracer stays as large as it was, and every block is accounted for.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Figures;
use super::account::{Load, figures, mib, number, settled, trace};
use crate::patience;

/// What is flat may differ by this from one time to the other: pages that an allocator keeps, a table that had not been used yet.
const SLACK: u64 = 2 << 20;

/// What the tracer takes at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    resident: u64,
    kernel: u64,
    descriptors: u64,
}

impl Taken {
    fn now(pid: u32, report: &Value) -> Result<Self> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).context("failed to list descriptors")?.count() as u64;
        Ok(Self {
            resident: number(report, "/memory/user_bytes"),
            kernel: number(report, "/memory/kernel_bytes"),
            descriptors,
        })
    }

    fn most(self, other: Self) -> Self {
        Self {
            resident: self.resident.max(other.resident),
            kernel: self.kernel.max(other.kernel),
            descriptors: self.descriptors.max(other.descriptors),
        }
    }
}

/// Compares the most that the tracer took in the second quarter of the time with the most in the last; the first is for warming up.
pub fn steady(time: Duration) -> Result<Figures> {
    let mut load = Load::start(2)?;
    let mut session = trace(&load, &["--interval", "1s"])?;
    let pid = session.running().pid();
    load.go()?;
    let start = Instant::now();
    let (mut early, mut late) = (Taken::default(), Taken::default());
    while start.elapsed() < time {
        let report = session.next_report(|_| true, patience())?;
        let taken = Taken::now(pid, &report)?;
        let part = start.elapsed().as_secs_f64() / time.as_secs_f64();
        if (0.25..0.5).contains(&part) {
            early = early.most(taken);
        } else if part >= 0.75 {
            late = late.most(taken);
        }
    }
    let elapsed = start.elapsed();
    let given = load.settle()?;
    let report = session.stop()?;
    settled(&report, given, &["allocations_ring_full"], true)?;
    ensure!(early.kernel > 0 && late.kernel > 0, "too short a time to compare: {elapsed:?}");
    let flat = |what: &str, early: u64, late: u64, slack: u64| {
        ensure!(late <= early + slack, "{what} rose from {early} to {late}");
        Ok(())
    };
    flat("resident memory", early.resident, late.resident, SLACK + early.resident / 50)?;
    flat("kernel memory", early.kernel, late.kernel, 1 << 16)?;
    flat("descriptors", early.descriptors, late.descriptors, 0)?;
    let mut figures = figures(&report);
    figures.push(("own, early and late", format!("{}, {}", mib(early.resident), mib(late.resident))));
    figures.push(("kernel, early and late", format!("{}, {}", mib(early.kernel), mib(late.kernel))));
    figures.push(("descriptors", format!("{}, {}", early.descriptors, late.descriptors)));
    figures.push(("blocks/s", format!("{:.0}", given as f64 / elapsed.as_secs_f64())));
    Ok(figures)
}

//! What many processes cost: a process that is not traced but has the same libc, attaching to and detaching from many
//! places, and watching processes that are not traced.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use leaktrace_tests::{Fixture, PATIENCE, host};
use serde::Serialize;

use super::measure::{Plan, run};
use super::tool::{Row, Tools, Tracer};

/// Processes that are traced at once, a dozen places each.
const TRACED: [usize; 3] = [1, 10, 85];
/// Processes that are watched.
const WATCHED: [usize; 3] = [10, 100, 1000];
/// The scout is left alone for so long before and while its processor time is measured.
const SETTLE: Duration = Duration::from_secs(3);
const WATCH: Duration = Duration::from_secs(10);

/// All that is measured of many processes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Many {
    /// Pairs a second of a process that has the libc of a traced one, over what it does while nobody is traced; a round each.
    pub neighbour: Vec<f64>,
    pub attached: Vec<Attached>,
    pub watched: Vec<Watched>,
}

/// Attaching to a number of processes at once.
#[derive(Clone, Debug, Serialize)]
pub struct Attached {
    pub processes: usize,
    /// Breakpoints in all of them.
    pub points: usize,
    /// From the start of leaktrace until the last breakpoint stood, and from SIGINT until leaktrace had ended, its report
    /// written.
    pub attach_s: f64,
    pub detach_s: f64,
}

/// Watching a number of processes that do nothing.
#[derive(Clone, Debug, Serialize)]
pub struct Watched {
    pub processes: usize,
    /// Processor time of leaktrace over time.
    pub cpus: f64,
    pub peak_rss_bytes: u64,
}

/// Measures all of it; `deep` is the bench's target.
pub fn measure(tools: &Tools, deep: &Path, plan: Plan) -> Result<Many> {
    let mut many = Many::default();
    for round in 0..plan.rounds {
        many.neighbour.push(neighbour(tools, deep, plan, round % 2 == 0)?);
    }
    for processes in TRACED {
        many.attached.push(attached(tools, deep, processes)?);
    }
    for processes in WATCHED {
        many.watched.push(watched(tools, processes)?);
    }
    Ok(many)
}

fn neighbour(tools: &Tools, deep: &Path, plan: Plan, traced_first: bool) -> Result<f64> {
    let traced = Fixture::builder(deep).start()?;
    let mut neighbour = Fixture::builder(deep).patience(plan.duration + PATIENCE).start()?;
    run(&mut neighbour, Duration::from_millis(200))?;
    let mut with = None;
    let mut without = None;
    for with_tracer in [traced_first, !traced_first] {
        let tracer = if with_tracer { tools.attach(Row::Leaktrace, traced.pid())? } else { None };
        ensure!(host::breakpoints(neighbour.pid())? == 0, "the process that is not traced has breakpoints");
        let rate = run(&mut neighbour, plan.duration)?.pairs_per_s();
        *(if with_tracer { &mut with } else { &mut without }) = Some(rate);
        tracer.map(Tracer::finish).transpose()?;
    }
    Ok(with.context("measured")? / without.context("measured")?)
}

fn attached(tools: &Tools, deep: &Path, processes: usize) -> Result<Attached> {
    let targets = (0..processes).map(|_| Fixture::builder(deep).start()).collect::<Result<Vec<_>>>()?;
    let pids: Vec<u32> = targets.iter().map(Fixture::pid).collect();
    let list = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let count = || pids.iter().map(|pid| host::breakpoints(*pid)).sum::<Result<usize>>();
    let last = *pids.last().context("at least one process")?;
    let mut command = Command::new(&tools.leaktrace);
    command.args(["--max-overhead", "off", "--sample", "exact", "--format", "json", "-p", &list]);
    let start = Instant::now();
    let mut tracer = Ended(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
    // Processes are attached to in their order. To look into all of them each time would take longer than attaching does.
    let (mut found, mut at) = (0, start);
    while found == 0 || at.elapsed() < Duration::from_millis(500) {
        let now = host::breakpoints(last)?;
        if now != found {
            (found, at) = (now, Instant::now());
        }
        ensure!(start.elapsed() < PATIENCE, "{processes} processes were not attached to within {PATIENCE:?}");
        ensure!(tracer.0.try_wait()?.is_none(), "leaktrace ended while it was attaching to {processes} processes");
        sleep(Duration::from_millis(5));
    }
    let attach_s = (at - start).as_secs_f64();
    let points = count()?;
    ensure!(points == found * processes, "{points} breakpoints in {processes} processes, {found} in the last of them");
    // It ends when the last one is gone, and the report is written.
    let stop = Instant::now();
    tracer.interrupt()?;
    tracer.0.wait()?;
    let detach_s = stop.elapsed().as_secs_f64();
    ensure!(count()? == 0, "breakpoints were left");
    Ok(Attached { processes, points, attach_s, detach_s })
}

fn watched(tools: &Tools, processes: usize) -> Result<Watched> {
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("sleeper");
    std::fs::copy("/bin/sleep", &program).context("failed to copy sleep")?;
    let start = || Command::new(&program).arg("600").stdout(Stdio::null()).spawn().map(Ended);
    let _sleepers = (0..processes).map(|_| start()).collect::<std::io::Result<Vec<_>>>()?;
    let selection = format!("{}/*", folder.path().display());
    let mut command = Command::new(&tools.leaktrace);
    command.args(["--format", "json", "--exe", &selection]).stdin(Stdio::null());
    let mut tracer = Ended(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
    sleep(SETTLE);
    let before = host::cpu_time(tracer.0.id())?;
    sleep(WATCH);
    let used = host::cpu_time(tracer.0.id())?.saturating_sub(before);
    let peak_rss_bytes = host::peak_rss(tracer.0.id())?;
    tracer.interrupt()?;
    let status = tracer.0.wait()?;
    ensure!(status.success(), "leaktrace ended with {status} while it watched {processes} processes");
    Ok(Watched { processes, cpus: used.as_secs_f64() / WATCH.as_secs_f64(), peak_rss_bytes })
}

/// A child that is killed when dropped.
struct Ended(Child);

impl Ended {
    fn interrupt(&self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).context("failed to send SIGINT")
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Many {
    /// As lines of text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut ratios = self.neighbour.clone();
        ratios.sort_by(f64::total_cmp);
        let median = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\na process that is not traced, with the same libc: {median:.2} of its pairs a second");
        let _ = writeln!(text, "\nprocesses  breakpoints   attached in   detached in");
        for row in &self.attached {
            let Attached { processes, points, attach_s, detach_s } = row;
            let _ = writeln!(text, "{processes:>9}  {points:>11}  {attach_s:>10.2} s  {detach_s:>10.2} s");
        }
        let _ = writeln!(text, "\nwatched processes  of one processor      peak RSS");
        for row in &self.watched {
            let (percent, mib) = (row.cpus * 100.0, row.peak_rss_bytes as f64 / f64::from(1 << 20));
            let _ = writeln!(text, "{:>17}  {percent:>14.2} %  {mib:>8.1} MiB", row.processes);
        }
        text
    }
}

//! The faults, one a function.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::account::{Load, figures, mib, number, settled, sound, trace};
use super::namespaces::{SmallDisk, in_time_namespace};
use super::{Figures, Scale};
use crate::cgroup::MemoryGroup;
use crate::host::{BpfObjects, wait_until};
use crate::{Fixture, Leaktrace, Session, patience};

/// Nearly every record finds the ring full.
pub fn small_ring(scale: Scale) -> Result<Figures> {
    let mut load = Load::start(2)?;
    let session = trace(&load, &["--sizes", "ring=4096"])?;
    load.work(scale.load)?;
    let given = load.settle()?;
    let report = session.stop()?;
    ensure!(number(&report, "/losses/allocations_ring_full") > 0, "the ring was never full: {}", report["losses"]);
    settled(&report, given, &["allocations_ring_full"], true)?;
    Ok(figures(&report))
}

/// And frees find no other place either.
pub fn small_overflow_map(scale: Scale) -> Result<Figures> {
    let mut load = Load::start(2)?;
    let session = trace(&load, &["--sizes", "ring=4096,missed=16"])?;
    load.work(scale.load)?;
    let given = load.settle()?;
    let report = session.stop()?;
    ensure!(number(&report, "/losses/frees_lost") > 0, "no free was lost: {}", report["losses"]);
    settled(&report, given, &["allocations_ring_full"], true)?;
    Ok(figures(&report))
}

/// Most threads find no room in the table.
pub fn few_threads(scale: Scale) -> Result<Figures> {
    let mut load = Load::start(64)?;
    let session = trace(&load, &["--sizes", "threads=16"])?;
    load.work(scale.load)?;
    let given = load.settle()?;
    let report = session.stop()?;
    ensure!(number(&report, "/losses/threads_full") > 0, "all threads found room: {}", report["losses"]);
    // The allocator's own mapping calls find no room either.
    settled(&report, given, &["threads_full", "allocations_ring_full"], false)?;
    Ok(figures(&report))
}

/// The ring is not emptied for seconds.
pub fn tracer_stopped(scale: Scale) -> Result<Figures> {
    let mut load = Load::start(2)?;
    let mut session = trace(&load, &[])?;
    load.go()?;
    sleep(scale.load / 4);
    session.running().signal(libc::SIGSTOP)?;
    sleep(scale.stopped);
    session.running().signal(libc::SIGCONT)?;
    sleep(scale.load / 2);
    let given = load.settle()?;
    let report = session.stop()?;
    settled(&report, given, &["allocations_ring_full"], true)?;
    Ok(figures(&report))
}

/// A tracer that is killed leaves nothing in the kernel, and the next one starts from nothing.
pub fn tracer_killed(scale: Scale) -> Result<Figures> {
    let mut load = Load::start(2)?;
    let mut session = trace(&load, &[])?;
    load.go()?;
    sleep(scale.load / 4);
    let objects = BpfObjects::of_process(session.running().pid())?;
    ensure!(!objects.is_empty(), "the tracer holds no BPF objects");
    session.running().signal(libc::SIGKILL)?;
    let outcome = session.into_running().finish(patience())?;
    ensure!(outcome.status.code().is_none(), "the tracer ended by itself: {}", outcome.status);
    let start = Instant::now();
    let gone = wait_until(patience(), || objects.still_there().is_ok_and(|left| left.is_empty()));
    ensure!(gone, "left behind: {:?}", objects.still_there()?);
    let took = start.elapsed();
    let session = trace(&load, &[])?;
    sleep(scale.load / 2);
    load.settle()?;
    let report = session.stop()?;
    settled(&report, 0, &[], false)?;
    let mut figures = figures(&report);
    figures.push(("gone after", format!("{took:.1?}")));
    Ok(figures)
}

/// The account of a target that is killed under load is that of its last moment.
pub fn target_killed(scale: Scale) -> Result<Figures> {
    let mut load = Load::start(2)?;
    let session = trace(&load, &[])?;
    load.go()?;
    sleep(scale.load / 2);
    load.fixture.kill()?;
    let report = session.finish()?;
    ensure!(report["ended"] == "targets_exited", "ended: {}", report["ended"]);
    sound(&report)?;
    Ok(figures(&report))
}

/// Processes that fork as fast as they may, all of them traced.
pub fn fork_bomb(scale: Scale) -> Result<Figures> {
    let mut fixture = Fixture::start("soak")?;
    let mut session = Session::start(&[fixture.pid()], &["--children", "--kernel-memory", "64MiB"])?;
    let seconds = (scale.load / 4).as_secs().max(1);
    let ended = fixture.tell(&format!("bomb {seconds} 32"))?;
    // It still reports, and ends when it is told to.
    session.next_report(|_| true, patience())?;
    let report = session.stop()?;
    sound(&report)?;
    let followed = number(&report, "/accounts/allocated");
    ensure!(followed > 0, "no child was traced: {}", report["accounts"]);
    let mut figures = figures(&report);
    figures.push(("orphans", ended));
    Ok(figures)
}

/// Ids of threads come round, and their slots with them.
pub fn many_threads(scale: Scale) -> Result<Figures> {
    let mut fixture = Fixture::start("soak")?;
    let mut session = Session::start(&[fixture.pid()], &["--kernel-memory", "64MiB"])?;
    fixture.tell("spawn 200")?;
    let before = session.next_report(|_| true, patience())?;
    fixture.tell(&format!("spawn {}", scale.threads))?;
    let report = session.stop()?;
    sound(&report)?;
    ensure!(report["losses"] == serde_json::json!({}), "something was lost: {}", report["losses"]);
    let [before, after] = [&before, &report].map(|report| number(report, "/memory/kernel_bytes"));
    ensure!(after <= before + (1 << 20), "kernel memory rose from {before} to {after} bytes");
    let mut figures = figures(&report);
    figures.push(("kernel before", mib(before)));
    Ok(figures)
}

/// The report finds no room: the tracer says so, and leaves no half of one.
pub fn disk_full(_: Scale) -> Result<Figures> {
    let load = Load::start(1)?;
    let disk = SmallDisk::mount(1 << 16)?;
    disk.fill()?;
    let output = disk.path().join("report.json");
    let args = ["-p", &load.pid().to_string(), "--format", "json", "--duration", "1s", "-o"];
    let outcome = Leaktrace::new()?.args(args).arg(&output).run(patience())?;
    let said = outcome.stderr.lines().last().unwrap_or_default().to_owned();
    ensure!(outcome.code()? == 1, "it ended with {}: {}", outcome.status, outcome.stderr);
    ensure!(said.contains("report.json") && said.contains("space"), "it said {said:?}");
    let left: Vec<_> = fs::read_dir(disk.path())?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left == ["ballast"], "left behind: {left:?}");
    Ok(vec![("said", said)])
}

/// The tracer's clock differs from the kernel's by a day: whatever counts time has to be the same clock on both sides. The time of day is
/// not used but to be shown; it belongs to the whole host, so it is not stepped here.
pub fn other_clock(scale: Scale) -> Result<Figures> {
    let mut load = Load::start(2)?;
    let mut command = Leaktrace::new()?;
    if !in_time_namespace(command.command(), Duration::from_hours(24)) {
        return Ok(vec![("not run", "the kernel has no time namespaces".to_owned())]);
    }
    let args = ["--format", "jsonl", "--top", "1000", "--interval", "200ms", "--resource", "heap", "-p"];
    let running = command.args(args).arg(load.pid().to_string()).spawn()?;
    let session = Session::attached(running)?;
    load.work(scale.load)?;
    let given = load.settle()?;
    let report = session.stop()?;
    settled(&report, given, &["allocations_ring_full"], true)?;
    let most = (scale.load + patience()).as_secs_f64();
    for stack in crate::stacks(&report) {
        let age = stack["oldest_age_s"].as_f64().unwrap_or(0.0);
        let times = stack["series"].as_array().context("no series")?.iter().filter_map(|point| point[0].as_f64());
        let latest = times.fold(0.0, f64::max);
        ensure!(age <= most && latest <= most, "times are off: {age} s old, {latest} s after the start");
    }
    Ok(figures(&report))
}

/// A process that holds more blocks than the tracer may keep, and goes on, is sampled before the cap is met.
pub fn many_blocks(_: Scale) -> Result<Figures> {
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &["--max-memory", "64MiB", "--resource", "heap"])?;
    fixture.tell("leak malloc 1000000 100")?;
    let truth = fixture.report()?;
    let held = truth["live_bytes"].as_f64().context("the fixture does not know what it holds")?;
    let report = session.stop()?;
    let [blocks, cap] = ["/memory/blocks", "/memory/blocks_cap"].map(|path| number(&report, path));
    ensure!(blocks < cap && cap < 1_000_000, "{blocks} blocks of {cap}");
    ensure!(number(&report, "/counters/sampled_for_memory") > 0, "never sampled: {}", report["counters"]);
    ensure!(number(&report, "/losses/blocks_over_cap") == 0, "left out: {}", report["losses"]);
    let live = report["processes"][0]["live_bytes"].as_f64().unwrap_or(0.0);
    // The sampled part, at most half a million blocks by one in eight of them, has a standard error of below a half per cent.
    ensure!((live / held - 1.0).abs() < 0.05, "{live} bytes estimated, {held} held");
    let mut figures = figures(&report);
    figures.push(("held and estimated", format!("{}, {}", mib(held as u64), mib(live as u64))));
    Ok(figures)
}

/// The tracer's cgroup may take little more than its own caps allow: it lives.
pub fn memory_limit(scale: Scale) -> Result<Figures> {
    const LIMIT: u64 = 160 << 20;
    let mut load = Load::start(2)?;
    let Some(group) = MemoryGroup::new(LIMIT) else {
        return Ok(vec![("not run", "there is no memory cgroup that could be changed".to_owned())]);
    };
    let args = ["--format", "jsonl", "--top", "1000", "--interval", "200ms", "--resource", "heap"];
    let caps = ["--kernel-memory", "48MiB", "--max-memory", "64MiB", "-p"];
    let mut command = Leaktrace::new()?.args(args).args(caps).arg(load.pid().to_string());
    group.enter(command.command());
    let session = Session::attached(command.spawn()?)?;
    load.work(scale.load)?;
    let given = load.settle()?;
    let report = session.stop()?;
    settled(&report, given, &["allocations_ring_full"], true)?;
    ensure!(number(&report, "/memory/kernel_bytes") <= 48 << 20, "over the cap: {}", report["memory"]);
    let mut figures = figures(&report);
    figures.push(("peak of its cgroup", mib(group.peak()?)));
    Ok(figures)
}

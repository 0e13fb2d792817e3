//! The whole system: leaktrace finds by itself who grows, in whatever namespace it lives.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{
    Fixture, Leaktrace, PATIENCE, Program, Session, has_frame, host, live_in, only, stacks, summary,
};
use serde_json::Value;

/// A folder of their own for copies of fixtures, so that a test can choose them, and nobody else, by their path.
struct Crowd {
    folder: tempfile::TempDir,
    fixtures: Vec<Fixture>,
}

impl Crowd {
    fn new() -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, fixtures: Vec::new() })
    }

    /// The copy of a fixture.
    fn program(&self, name: &str) -> Result<PathBuf> {
        let copy = self.folder.path().join(name);
        if !copy.exists() {
            fs::copy(Program::c(name).build()?, &copy)?;
        }
        Ok(copy)
    }

    /// Starts one and gives its pid.
    fn start(&mut self, name: &str, options: &str) -> Result<u32> {
        let program = self.program(name)?;
        let builder = options.split_whitespace().fold(Fixture::builder(&program), leaktrace_tests::Builder::arg);
        let fixture = builder.start()?;
        let pid = fixture.pid();
        self.fixtures.push(fixture);
        Ok(pid)
    }

    /// What selects them.
    fn selection(&self) -> String {
        format!("{}/*", self.folder.path().display())
    }
}

fn decided(report: &Value, what: &str) -> Vec<u64> {
    let decisions = report["system"]["decisions"].as_array().map(Vec::as_slice).unwrap_or_default();
    decisions.iter().filter(|decision| decision["what"] == what).filter_map(|d| d["pid"].as_u64()).collect()
}

/// Of 200 processes three leak, at 20 KB/s to 2 MB/s: these are traced within a minute, nobody else is, and each is named with
/// its call stack.
#[test]
fn three_of_two_hundred() -> Result<()> {
    if !host::can_trace("three_of_two_hundred") {
        return Ok(());
    }
    let mut crowd = Crowd::new()?;
    for _ in 0..190 {
        crowd.start("lifecycle", "")?;
    }
    // Busy, and no larger than before.
    for _ in 0..7 {
        crowd.start("leak_slow", "--cache-mb 2 --churn-threads 1 --churn-rate 50")?;
    }
    let mut leaking = Vec::new();
    for rate in [20 << 10, 200 << 10, 2 << 20] {
        leaking.push(crowd.start("leak_slow", &format!("--rate {rate} --block 512"))?);
    }
    let start = Instant::now();
    let mut running = Leaktrace::new()?
        .args(["--exe", &crowd.selection(), "--format", "jsonl", "--interval", "1s", "--duration", "100s"])
        .spawn()?;
    let mut last = Value::Null;
    let mut promoted_at = None;
    let mut all_leaking = false;
    while !all_leaking && start.elapsed() < Duration::from_secs(100) {
        let line = running.wait_stdout(|line| line.starts_with('{'), PATIENCE)?;
        last = serde_json::from_str(&line)?;
        let promoted = decided(&last, "promoted");
        if promoted_at.is_none() && leaking.iter().all(|pid| promoted.contains(&u64::from(*pid))) {
            promoted_at = Some(start.elapsed());
        }
        all_leaking = leaking.iter().all(|pid| only(&last, *pid)["processes"][0]["verdict"] == "leaking");
    }
    eprintln!("all promoted after {promoted_at:?}, all named after {:?}", start.elapsed());
    let used = host::cpu_time(running.pid())?;
    eprintln!("leaktrace used {used:?} of processor time");
    running.signal(libc::SIGINT)?;
    running.finish(PATIENCE)?;
    ensure!(all_leaking, "not all are called leaking: {}\n{}", last["system"]["decisions"], summary(&last));
    ensure!(promoted_at.is_some_and(|at| at <= Duration::from_mins(1)), "promoted after {promoted_at:?}");
    for pid in decided(&last, "promoted") {
        ensure!(leaking.iter().any(|leaking| u64::from(*leaking) == pid), "{}", last["system"]["decisions"]);
    }
    for pid in leaking {
        let report = only(&last, pid);
        let growing: Vec<_> = stacks(&report).filter(|stack| stack["verdict"] == "growing").collect();
        ensure!(!growing.is_empty(), "{}", summary(&report));
        ensure!(growing.iter().all(|stack| has_frame(stack, "leak_block")), "{}", summary(&report));
    }
    ensure!(last["system"]["watched"] == 200, "{}", last["system"]["watched"]);
    Ok(())
}

/// What the report says of where a process touches new pages.
fn new_pages(report: &Value, pid: u32) -> Option<&Value> {
    report["system"]["growing"].as_array()?.iter().find(|growing| growing["pid"] == pid)
}

/// Of a process that grows it is told where it touches new pages, before it is traced; and on, where no allocator explains it. Of one
/// whose leak is known the leak is told instead.
#[test]
fn where_growth_comes_from() -> Result<()> {
    let test = "where_growth_comes_from";
    if !host::can_trace(test) {
        return Ok(());
    }
    if cfg!(not(target_arch = "x86_64")) {
        eprintln!("{test}: skipped: page faults can be looked at on x86-64 only");
        return Ok(());
    }
    let mut crowd = Crowd::new()?;
    let arena = crowd.start("arena", "60")?;
    let leak = crowd.start("leak_slow", "--rate 200000 --block 512")?;
    let still = crowd.start("leak_slow", "--cache-mb 2 --churn-threads 1 --churn-rate 50")?;
    let mut running = Leaktrace::new()?
        .args(["--exe", &crowd.selection(), "--format", "jsonl", "--interval", "1s", "--duration", "150s"])
        .spawn()?;
    // Told of before they were traced; and once they are, in how many reports.
    let (mut arena_before, mut leak_before, mut arena_after) = (false, false, 0);
    let start = Instant::now();
    let mut last = Value::Null;
    while !(arena_before && leak_before && arena_after >= 10) {
        ensure!(start.elapsed() < Duration::from_mins(2), "{}\n{}", last["system"], summary(&last));
        last = serde_json::from_str(&running.wait_stdout(|line| line.starts_with('{'), PATIENCE)?)?;
        let promoted = decided(&last, "promoted");
        ensure!(new_pages(&last, still).is_none(), "{}", last["system"]["growing"]);
        let has = |pid: u32, function: &str| {
            let stacks = new_pages(&last, pid).and_then(|pages| pages["stacks"].as_array());
            stacks.into_iter().flatten().any(|stack| {
                has_frame(stack, function) && stack["end"] == "complete" && stack["share"].as_f64() > Some(0.6)
            })
        };
        let is_traced = |pid: u32| promoted.contains(&u64::from(pid));
        arena_before |= !is_traced(arena) && has(arena, "use_page");
        leak_before |= !is_traced(leak) && has(leak, "leak_block");
        arena_after += u32::from(is_traced(arena) && has(arena, "use_page"));
        let known = only(&last, leak)["processes"][0]["verdict"] == "leaking";
        ensure!(!known || new_pages(&last, leak).is_none(), "{}", last["system"]["growing"]);
        ensure!(only(&last, arena)["processes"][0]["verdict"] != "leaking", "{}", summary(&last));
    }
    eprintln!("after {:?}: {}", start.elapsed(), last["system"]["growing"]);
    running.signal(libc::SIGINT)?;
    let outcome = running.finish(PATIENCE)?;
    ensure!(outcome.code()? == 0, "{}", outcome.stderr);
    Ok(())
}

/// With `--all` a process that comes while leaktrace runs is traced at once, and after it executed another program; what that costs is
/// said.
#[test]
fn all_traces_whoever_comes() -> Result<()> {
    if !host::can_trace("all_traces_whoever_comes") {
        return Ok(());
    }
    let mut crowd = Crowd::new()?;
    // Nobody's libraries are known before the first.
    let first = crowd.start("lifecycle", "")?;
    let mut running = Leaktrace::new()?
        .args(["--all", "--exe", &crowd.selection(), "--format", "jsonl", "--interval", "200ms", "--top", "1000"])
        .spawn()?;
    let is_traced = |pid: u32| host::wait_until(PATIENCE, || host::breakpoints(pid).is_ok_and(|n| n > 0));
    ensure!(is_traced(first), "the process that was there is not traced");
    let start = Instant::now();
    let second = crowd.start("lifecycle", "")?;
    ensure!(is_traced(second), "the process that came is not traced");
    eprintln!("traced {:?} after it was started", start.elapsed());
    let fixture = crowd.fixtures.last_mut().context("no fixture")?;
    fixture.send("exec")?;
    fixture.wait_ready()?;
    ensure!(is_traced(second), "the program that it executed is not traced");
    fixture.tell("leak 70 700")?;
    let line = running.wait_stdout(
        |line| {
            serde_json::from_str(line)
                .is_ok_and(|report: Value| live_in(&only(&report, second), "leak_after_exec").1 > 0)
        },
        PATIENCE,
    )?;
    let report: Value = serde_json::from_str(&line)?;
    ensure!(live_in(&only(&report, second), "leak_after_exec") == (49_000, 70), "{}", summary(&report));
    running.signal(libc::SIGINT)?;
    let outcome = running.finish(PATIENCE)?;
    ensure!(outcome.code()? == 0 && outcome.stderr.contains("microseconds"), "{}", outcome.stderr);
    Ok(())
}

/// Resident bytes and open files of a process.
fn size(pid: u32) -> Result<(u64, usize)> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = statm.split_whitespace().nth(1).context("no resident pages")?.parse()?;
    Ok((pages * 4096, fs::read_dir(format!("/proc/{pid}/fd"))?.count()))
}

/// Hundreds of processes that start and end each second leave nothing behind in the tracer.
#[test]
fn processes_that_come_and_go() -> Result<()> {
    if !host::can_trace("processes_that_come_and_go") {
        return Ok(());
    }
    let crowd = Crowd::new()?;
    let program = crowd.folder.path().join("short");
    fs::copy("/bin/true", &program)?;
    let running =
        Leaktrace::new()?.args(["--exe", &crowd.selection(), "--format", "json", "--duration", "60s"]).spawn()?;
    let storm = |length: Duration| -> Result<u32> {
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed() < length {
            ensure!(Command::new(&program).status()?.success());
            count += 1;
        }
        Ok(count)
    };
    storm(Duration::from_secs(5))?;
    let before = size(running.pid())?;
    let count = storm(Duration::from_secs(20))?;
    let after = size(running.pid())?;
    running.signal(libc::SIGINT)?;
    let outcome = running.finish(PATIENCE)?;
    eprintln!("{count} processes in 20 s; resident bytes and files {before:?} before, {after:?} after");
    ensure!(outcome.code()? == 0, "{}", outcome.stderr);
    ensure!(after.0 < before.0 + (4 << 20), "{} bytes more", after.0 - before.0);
    ensure!(after.1 <= before.1 + 2, "{} files before, {} after", before.1, after.1);
    Ok(())
}

/// Killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The only child of a process, once there is one.
fn only_child(pid: u32) -> Result<u32> {
    let mut found = None;
    host::wait_until(PATIENCE, || {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        found = text.split_whitespace().next().and_then(|child| child.parse().ok());
        found.is_some()
    });
    found.with_context(|| format!("process {pid} has no child"))
}

/// A leak in a mount, pid and user namespace of its own, with a libc that was copied in and then deleted: found, attached to
/// and named, with the pid that it has there.
#[test]
fn in_namespaces_of_its_own() -> Result<()> {
    if !host::can_trace("in_namespaces_of_its_own") {
        return Ok(());
    }
    let root = tempfile::tempdir()?;
    let program = Program::c("leak_slow").build()?;
    let copies = host::copy_libraries(&program, root.path())?;
    fs::copy(&program, root.path().join("program"))?;
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "chroot"]);
    unshare.arg(root.path()).args(["/program", "--rate", "200000", "--block", "256"]);
    let unshare = Killed(
        unshare.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().context("unshare")?,
    );
    let pid = only_child(unshare.0.id())?;
    let is_program = || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "program");
    ensure!(host::wait_until(PATIENCE, is_program), "the program was not started");
    // It is loaded once it has begun to leak.
    thread::sleep(Duration::from_secs(1));
    for copy in copies {
        fs::remove_file(copy)?;
    }
    let mut session = Session::start(&[pid], &[])?;
    let leaks = |report: &Value| live_in(report, "leak_block").1 > 100;
    session.next_report(leaks, PATIENCE)?;
    let report = session.stop()?;
    ensure!(report["processes"][0]["pid_in_namespace"] == 1, "{}", report["processes"][0]["pid_in_namespace"]);
    ensure!(stacks(&report).all(|stack| stack["complete"] == true), "{}", summary(&report));
    Ok(())
}

/// A process that cannot be traced within the whole system's budget, not even in windows, gives back its place, and is not picked again at
/// once though it grows on; it has no breakpoints then.
#[test]
fn over_the_budget() -> Result<()> {
    if !host::can_trace("over_the_budget") {
        return Ok(());
    }
    let mut crowd = Crowd::new()?;
    let hot = crowd.start("leak_slow", "--rate 2097152 --block 4096 --churn-threads 1")?;
    let selection = crowd.selection();
    let args = ["--exe", &selection, "--format", "jsonl", "--interval", "1s", "--max-overhead", "0.01"];
    let mut session = Session::attached(Leaktrace::new()?.args(args).spawn()?)?;
    let report = session.next_report(|report| !decided(report, "released").is_empty(), PATIENCE)?;
    let report = session.next_report(
        |later| later["duration_s"].as_f64() > report["duration_s"].as_f64().map(|at| at + 5.0),
        PATIENCE,
    )?;
    ensure!(decided(&report, "promoted") == [u64::from(hot)], "{}", report["system"]["decisions"]);
    let decisions = report["system"]["decisions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let last = decisions.last().map_or(&Value::Null, |decision| &decision["reason"]);
    let why = last["why"].as_str().unwrap_or_default();
    ensure!(last["kind"] == "over_budget" && why.contains("even in windows"), "{decisions:?}");
    ensure!(report["system"]["traced"] == 0 && report["system"]["watched"] == 1, "{}", report["system"]);
    ensure!(host::breakpoints(hot)? == 0, "breakpoints still stand in it");
    session.stop()?;
    Ok(())
}

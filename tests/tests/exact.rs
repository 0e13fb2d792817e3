//! Exact byte counts with real probes, compared with what each fixture knows of itself. Every test traces a process of its
//! own, with links of its own, so they run side by side.

use std::time::Duration;

use anyhow::{Context as _, Result};
use leaktrace_tests::host::{BpfObjects, can_trace, wait_until};
use leaktrace_tests::{Fixture, Leaktrace, PATIENCE, Program, live_in, stacks};
use serde_json::Value;

/// Sends commands to a fixture while it is traced; returns leaktrace's report and the fixture's own truth.
fn traced(fixture: &mut Fixture, options: &[&str], commands: &[&str]) -> Result<(Value, Value)> {
    let mut running = Leaktrace::pid(fixture.pid())?.args(["-v", "--format", "json"]).args(options).spawn()?;
    running.wait_stderr("tracing pid")?;
    for command in commands {
        fixture.tell(command).with_context(|| (*command).to_owned())?;
    }
    let truth = fixture.report()?;
    running.signal(libc::SIGINT)?;
    let outcome = running.finish(PATIENCE)?;
    anyhow::ensure!(outcome.code()? == 0, "leaktrace failed: {}", outcome.stderr);
    let report = outcome.json()?;
    anyhow::ensure!(
        report["losses"].as_object().is_some_and(serde_json::Map::is_empty),
        "losses: {}",
        report["losses"]
    );
    Ok((report, truth))
}

/// Each site's live bytes and blocks are what the fixture says, to the byte.
fn assert_sites(report: &Value, truth: &Value) {
    let sites = truth["sites"].as_object().expect("the fixture names its sites");
    assert!(!sites.is_empty());
    // strdup is libc's and has no frame pointer, so a walk by frame pointers misses the function that called it.
    for (function, site) in sites.iter().filter(|(function, _)| !function.ends_with("strdup")) {
        let expected = (site["live_bytes"].as_u64().unwrap(), site["live_count"].as_u64().unwrap());
        assert_eq!(live_in(report, function), expected, "{function}");
    }
}

/// The live bytes and blocks of the process's heap are what the fixture says.
fn assert_process(report: &Value, truth: &Value) {
    let heap = || stacks(report).filter(|stack| stack["resource"] == "heap");
    let sum = |key: &str| heap().map(|stack| stack[key].as_u64().unwrap()).sum::<u64>();
    let expected = (truth["live_bytes"].as_u64().unwrap(), truth["live_count"].as_u64().unwrap());
    assert_eq!((sum("live_bytes"), sum("live_count")), expected);
}

/// Every allocator function, leaking and balanced, failing calls, and realloc in all its ways.
#[test]
fn allocator_functions() -> Result<()> {
    if !can_trace("allocator_functions") {
        return Ok(());
    }
    let vias = [
        "malloc",
        "calloc",
        "realloc",
        "reallocarray",
        "posix_memalign",
        "aligned_alloc",
        "memalign",
        "valloc",
        "pvalloc",
        "strdup",
    ];
    let mut commands: Vec<String> = Vec::new();
    for (index, via) in vias.iter().enumerate() {
        commands.push(format!("leak {via} {} {}", 100 + index, 100 * (index + 1)));
        commands.push(format!("churn {via} 500 64"));
    }
    commands.extend(
        ["fail", "keep 10 128", "grow 20 64", "shrink 20 64", "to_zero 20 64", "from_null 20 64"].map(str::to_owned),
    );
    let mut fixture = Fixture::start("allocators.c")?;
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    let (report, truth) = traced(&mut fixture, &["--top", "100"], &commands)?;
    assert_sites(&report, &truth);
    assert_process(&report, &truth);
    Ok(())
}

/// Frees on other threads, threads that end, and many threads at once lose nothing.
#[test]
fn threads() -> Result<()> {
    if !can_trace("threads") {
        return Ok(());
    }
    let mut fixture = Fixture::start("threads.c")?;
    let commands = ["handoff 2000 100", "handoff_leak 2000 64 10", "churn 4 2000 48", "leak 8 50 256"];
    let (report, truth) = traced(&mut fixture, &["--top", "100"], &commands)?;
    assert_sites(&report, &truth);
    Ok(())
}

/// Exceptions and jumps out of allocator calls leave the pairing intact.
#[test]
fn exceptions() -> Result<()> {
    if !can_trace("exceptions") {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&Program::cpp("throw.cpp").build()?).start()?;
    let commands = [
        "throw_new 50",
        "throw_array 50",
        "throw_handler 20",
        "throw_constructor 50",
        "throw_deep 20 10",
        "leak 100 333",
    ];
    let (report, truth) = traced(&mut fixture, &["--top", "100"], &commands)?;
    // In all: operator new has no frame pointer, so a walk by frame pointers misses the function that called it.
    assert_process(&report, &truth);
    Ok(())
}

/// Page ranges: partial unmaps, `MAP_FIXED`, mremap and brk, to the page.
#[test]
fn mappings() -> Result<()> {
    if !can_trace("mappings") {
        return Ok(());
    }
    let mut fixture = Fixture::start("mappings.c")?;
    let commands = [
        "anon 5 3",
        "file 3 1",
        "churn 50 4",
        "cut head",
        "cut tail",
        "cut middle",
        "several",
        "over",
        "grow",
        "move",
        "shrink",
        "fail",
        "refuse 5",
    ];
    let (report, truth) = traced(&mut fixture, &["--top", "100"], &commands)?;
    // In all: libc's mmap has no frame pointer, so a walk by frame pointers misses the function that called it.
    let mapped = stacks(&report).filter(|stack| stack["resource"] == "mmap");
    let mapped: u64 = mapped.map(|stack| stack["live_bytes"].as_u64().unwrap()).sum();
    let bytes = |kind: &str| truth[kind].as_u64().unwrap();
    assert_eq!(mapped, bytes("anon_bytes") + bytes("file_bytes") + bytes("brk_bytes"));
    Ok(())
}

/// A forked child that frees its copies does not touch the parent's account.
#[test]
fn fork() -> Result<()> {
    if !can_trace("fork") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle.c")?;
    let mut running = Leaktrace::pid(fixture.pid())?.args(["--format", "json"]).spawn()?;
    running.wait_attached(fixture.pid())?;
    for command in ["leak 100 1000", "fork 50 500", "vfork", "threads 20 300"] {
        fixture.tell(command)?;
    }
    running.signal(libc::SIGINT)?;
    let report = running.finish(PATIENCE)?.json()?;
    assert_eq!(live_in(&report, "leak_before"), (100_000, 100));
    assert_eq!(live_in(&report, "leak_in_child"), (0, 0));
    assert_eq!(live_in(&report, "leak_in_thread"), (6_000, 20));
    Ok(())
}

/// After exec the old state is gone and the new image is traced.
#[test]
fn exec() -> Result<()> {
    if !can_trace("exec") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle.c")?;
    let mut running = Leaktrace::pid(fixture.pid())?.args(["--format", "json"]).spawn()?;
    running.wait_attached(fixture.pid())?;
    fixture.tell("leak 100 1000")?;
    fixture.send("exec")?;
    fixture.wait_ready()?;
    running.wait_attached(fixture.pid())?;
    fixture.tell("leak 70 700")?;
    running.signal(libc::SIGINT)?;
    let report = running.finish(PATIENCE)?.json()?;
    assert_eq!(live_in(&report, "leak_before"), (0, 0));
    assert_eq!(live_in(&report, "leak_after_exec"), (49_000, 70));
    Ok(())
}

/// The report still comes when the process exits while it is traced, and says what was live.
#[test]
fn exit_while_traced() -> Result<()> {
    if !can_trace("exit_while_traced") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle.c")?;
    let mut running = Leaktrace::pid(fixture.pid())?.args(["--format", "json"]).spawn()?;
    running.wait_attached(fixture.pid())?;
    fixture.tell("leak 100 1000")?;
    fixture.send("exit 3")?;
    let outcome = running.finish(PATIENCE)?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stderr);
    let report = outcome.json()?;
    assert_eq!(report["ended"], "targets_exited");
    assert_eq!(live_in(&report, "leak_before"), (100_000, 100));
    Ok(())
}

/// A tracer that is killed leaves no probe and no program behind, and the target goes on.
#[test]
fn killed_tracer_leaves_nothing() -> Result<()> {
    if !can_trace("killed_tracer_leaves_nothing") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators.c")?;
    let mut running = Leaktrace::pid(fixture.pid())?.spawn()?;
    running.wait_attached(fixture.pid())?;
    let objects = BpfObjects::of_process(running.pid())?;
    assert!(!objects.is_empty(), "a running tracer holds programs");
    running.signal(libc::SIGKILL)?;
    assert!(wait_until(PATIENCE, || objects.still_there().is_ok_and(|left| left.is_empty())), "programs are left");
    assert!(wait_until(PATIENCE, || leaktrace_tests::host::breakpoints(fixture.pid()).is_ok_and(|n| n == 0)));
    fixture.tell("leak malloc 10 100")?;
    Ok(())
}

/// A command is traced from its first allocation, and its exit status is passed on.
#[test]
fn command_from_its_first_allocation() -> Result<()> {
    if !can_trace("command_from_its_first_allocation") {
        return Ok(());
    }
    let script = "import sys; sys.exit(7)";
    let outcome =
        Leaktrace::new()?.args(["--format", "json", "--", "/usr/bin/python3", "-c", script]).run(2 * PATIENCE)?;
    assert_eq!(outcome.code()?, 7, "{}", outcome.stderr);
    let report = outcome.json()?;
    assert_eq!(report["command"]["exit_code"], 7);
    // What it frees it has allocated under our eyes.
    assert_eq!(report["counters"].get("frees_of_older_blocks"), None, "{}", report["counters"]);
    assert!(report["events"].as_u64().unwrap() > 1000);
    Ok(())
}

/// Two processes traced at once, with the same addresses, do not mix.
#[test]
fn two_processes() -> Result<()> {
    if !can_trace("two_processes") {
        return Ok(());
    }
    let mut fixtures = [Fixture::start("allocators.c")?, Fixture::start("allocators.c")?];
    let pids = fixtures.iter().map(|fixture| fixture.pid().to_string()).collect::<Vec<_>>().join(",");
    let mut running = Leaktrace::new()?.args(["-p", &pids, "--format", "json"]).spawn()?;
    for fixture in &fixtures {
        running.wait_attached(fixture.pid())?;
    }
    fixtures[0].tell("leak malloc 100 100")?;
    fixtures[1].tell("leak malloc 50 70")?;
    running.signal(libc::SIGTERM)?;
    let report = running.finish(PATIENCE)?.json()?;
    for (fixture, expected) in fixtures.iter().zip([(10_000, 100), (3_500, 50)]) {
        let processes = report["processes"].as_array().unwrap();
        let process = processes.iter().find(|process| process["pid"] == fixture.pid()).expect("it is in the report");
        let alone = serde_json::json!({ "processes": [process] });
        assert_eq!(live_in(&alone, "leak_via_malloc"), expected);
    }
    Ok(())
}

/// Mistakes are told by name, with the exit status that the command line promises.
#[test]
fn mistakes_are_named() -> Result<()> {
    let run = |args: &[&str]| Leaktrace::new()?.args(args).run(PATIENCE);
    for (args, code, text) in [
        (&["-p", "4194303"][..], 1, "no process with pid 4194303"),
        (&["-p", "2"], 1, "kernel thread"),
        (&["--", "/no/such/program"], 1, "/no/such/program"),
        (&["-p", "1", "--duration", "0s"], 2, "--duration"),
        (&["-p", "1", "-o", "/no/such/folder/report"], 1, "/no/such/folder"),
        (&["-p", "0"], 2, "--pid"),
        (&["-p", "1", "--uid", "0"], 2, "--uid"),
    ] {
        if code == 1 && !can_trace("mistakes_are_named") {
            continue;
        }
        let outcome = run(args)?;
        assert_eq!(outcome.code()?, code, "{args:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(text), "{args:?}: {}", outcome.stderr);
    }
    Ok(())
}

/// A name with control characters does not reach the terminal as such.
#[test]
fn names_are_made_safe() -> Result<()> {
    if !can_trace("names_are_made_safe") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let evil = folder.path().join("a\u{1b}[31mb");
    std::fs::copy(Program::c("allocators.c").build()?, &evil)?;
    let fixture = Fixture::builder(&evil).start()?;
    let outcome = Leaktrace::pid(fixture.pid())?.args(["--duration", "1s"]).run(PATIENCE)?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stderr);
    assert!(!outcome.stdout.contains('\u{1b}') && !outcome.stderr.contains('\u{1b}'), "{}", outcome.stdout);
    Ok(())
}

/// A reader that goes away ends the run quietly.
#[test]
fn closed_output_is_a_quiet_end() -> Result<()> {
    if !can_trace("closed_output_is_a_quiet_end") {
        return Ok(());
    }
    let fixture = Fixture::start("allocators.c")?;
    let mut leaktrace = Leaktrace::pid(fixture.pid())?.args(["--interval", "200ms", "--duration", "60s"]);
    let (reader, writer) = std::io::pipe()?;
    leaktrace.command().stdout(writer);
    let running = leaktrace.spawn()?;
    drop(reader);
    let outcome = running.finish(PATIENCE)?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stderr);
    assert!(outcome.stderr.is_empty(), "{}", outcome.stderr);
    Ok(())
}

/// The time that a verdict takes is the subject of `verdicts.rs`; here only that the run keeps to its duration.
#[test]
fn ends_at_its_duration() -> Result<()> {
    if !can_trace("ends_at_its_duration") {
        return Ok(());
    }
    let fixture = Fixture::start("allocators.c")?;
    let outcome = Leaktrace::pid(fixture.pid())?.args(["--duration", "1s", "--format", "jsonl"]).run(PATIENCE)?;
    let last = outcome.jsonl()?.pop().context("at least the final report")?;
    assert_eq!((last["ended"].as_str(), last["final"].as_bool()), (Some("duration"), Some(true)));
    let duration = Duration::from_secs_f64(last["duration_s"].as_f64().unwrap());
    assert!(duration >= Duration::from_secs(1), "{duration:?}");
    Ok(())
}

//! The suite that must hold on every kernel that is promised: `cargo xtask vm` runs it in a virtual machine of each, and here it is a
//! test like the others.
//!
//! It looks at values, not only at counts: a program that is built for other registers, or for a kernel with another layout, attaches
//! and counts all the same. Sizes are different for each function, so that one for another is seen; addresses show in the frees, which
//! take away what was allocated at the same one and nothing else. What is asked needs no particular speed: under emulation a trap
//! takes a hundred times as long.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::host::{self, BpfObjects, can_trace};
use leaktrace_tests::{
    Fixture, Leaktrace, PATIENCE, Program, Session, has_frame, kernels, live_in, live_of, site, stacks, summary,
};
use serde_json::Value;

/// Time for a verdict: what is promised, and as much again for a machine that is emulated.
const TO_VERDICT: Duration = Duration::from_mins(1);

/// Tells a fixture each command while it is traced; the final report and the fixture's own account.
fn traced(fixture: &mut Fixture, args: &[&str], commands: &[&str]) -> Result<(Value, Value)> {
    let session = Session::start(&[fixture.pid()], args)?;
    for command in commands {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    ensure!(report["losses"] == serde_json::json!({}), "something was lost\n{}", summary(&report));
    Ok((report, truth))
}

/// The sum of a number over the heap stacks that go through `function`.
fn sum(report: &Value, function: &str, key: &str) -> u64 {
    stacks(report).filter(|stack| has_frame(stack, function)).map(|stack| stack[key].as_u64().unwrap_or(0)).sum()
}

/// Live and allocated bytes and blocks of each of the fixture's functions are what the fixture says, and the process has no others.
fn ensure_sites(report: &Value, truth: &Value) -> Result<()> {
    let sites = truth["sites"].as_object().context("the fixture names no sites")?;
    ensure!(!sites.is_empty(), "the fixture did nothing");
    let number = |site: &Value, key: &str| site[key].as_u64().unwrap_or(0);
    for (function, account) in sites {
        let expected = (number(account, "live_bytes"), number(account, "live_count"));
        let found = live_in(report, function);
        ensure!(found == expected, "{function}: {found:?} are live, not {expected:?}\n{}", summary(report));
        let allocated = (sum(report, function, "allocated_bytes"), number(account, "allocated_bytes"));
        // What realloc allocates on the way to the final size is counted by leaktrace and not by the fixture.
        let exact = !function.contains("realloc");
        ensure!(
            if exact { allocated.0 == allocated.1 } else { allocated.0 >= allocated.1 },
            "{function}: {} bytes were allocated, not {}\n{}",
            allocated.0,
            allocated.1,
            summary(report)
        );
    }
    let whole = |key: &str| {
        stacks(report)
            .filter(|stack| stack["resource"] == "heap")
            .map(|stack| stack[key].as_u64().unwrap_or(0))
            .sum::<u64>()
    };
    let (found, expected) =
        ((whole("live_bytes"), whole("live_count")), (number(truth, "live_bytes"), number(truth, "live_count")));
    ensure!(found == expected, "{found:?} are live in all, not {expected:?}\n{}", summary(report));
    Ok(())
}

/// Each allocator function by its own size argument, wherever that is; each block gone again when its address is freed.
#[test]
fn sizes_and_addresses_of_each_function() -> Result<()> {
    if !can_trace("sizes_and_addresses_of_each_function") {
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
    ];
    let mut commands = Vec::new();
    for (index, via) in vias.iter().enumerate() {
        commands.push(format!("leak {via} {} {}", 20 + index, 1001 + 100 * index));
        commands.push(format!("churn {via} {} {}", 30 + index, 65 + index));
        commands.push(format!("release {via} {}", 7 + index));
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    let mut fixture = Fixture::start("allocators")?;
    let (report, truth) = traced(&mut fixture, &[], &commands)?;
    for (index, via) in vias.iter().enumerate() {
        // Said here too, and not by the fixture alone.
        let expected = ((1001 + 100 * index as u64) * 13, 13);
        assert_eq!(live_in(&report, &format!("leak_via_{via}")), expected, "{via}\n{}", summary(&report));
    }
    ensure_sites(&report, &truth)
}

/// realloc that moves, stays in place, starts from NULL, ends in zero, or fails: the block has its last size, and a failed call leaves
/// the old one.
#[test]
fn realloc_in_all_its_ways() -> Result<()> {
    if !can_trace("realloc_in_all_its_ways") {
        return Ok(());
    }
    let commands = ["grow 11 100 30000", "shrink 12 30000 100", "to_zero 13 77", "from_null 14 55", "keep 15 44"];
    let mut fixture = Fixture::start("allocators")?;
    let (report, truth) = traced(&mut fixture, &[], &commands)?;
    assert_eq!(live_in(&report, "realloc_grow"), (11 * 51_200, 11), "{}", summary(&report));
    assert_eq!(live_in(&report, "realloc_shrink"), (12 * 58, 12), "{}", summary(&report));
    assert_eq!(live_in(&report, "realloc_from_null"), (14 * 55, 14), "{}", summary(&report));
    assert_eq!(live_in(&report, "keep_over_failed_realloc"), (15 * 44, 15), "{}", summary(&report));
    ensure_sites(&report, &truth)
}

/// Calls that fail count nothing: NULL, an error from `posix_memalign`, a product that overflows.
#[test]
fn failed_calls_count_nothing() -> Result<()> {
    if !can_trace("failed_calls_count_nothing") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let (report, truth) = traced(&mut fixture, &[], &["fail 30", "leak malloc 3 111", "fail 30"])?;
    assert_eq!(live_of(&report, fixture.pid()), (333, 3), "{}", summary(&report));
    assert_eq!(sum(&report, "fail_each", "allocated_bytes"), 0, "{}", summary(&report));
    ensure_sites(&report, &truth)
}

/// The size filter sees the argument before anything is recorded.
#[test]
fn sizes_are_filtered() -> Result<()> {
    if !can_trace("sizes_are_filtered") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let commands = ["leak malloc 5 499", "leak calloc 6 500", "leak aligned_alloc 7 900", "leak posix_memalign 8 901"];
    let (report, _) = traced(&mut fixture, &["--min-size", "500", "--max-size", "900"], &commands)?;
    assert_eq!(live_of(&report, fixture.pid()), (6 * 500 + 7 * 900, 13), "{}", summary(&report));
    Ok(())
}

/// Blocks freed by another thread than the one that allocated them, and threads that end, on all processors there are.
#[test]
fn threads_free_each_others_blocks() -> Result<()> {
    if !can_trace("threads_free_each_others_blocks") {
        return Ok(());
    }
    let mut fixture = Fixture::start("threads")?;
    let commands = ["handoff 150 101", "handoff_leak 150 64 10", "churn 4 150 48", "leak 5 20 257"];
    let (report, truth) = traced(&mut fixture, &["--resource", "heap"], &commands)?;
    assert_eq!(live_in(&report, "produce_some_kept"), (15 * 64, 15), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_in_thread"), (100 * 257, 100), "{}", summary(&report));
    for function in ["produce", "churn_block"] {
        assert_eq!(live_in(&report, function), (0, 0), "{function}\n{}", summary(&report));
        let allocated = truth["sites"][function]["allocated_bytes"].as_u64().context("the fixture did nothing")?;
        assert_eq!(sum(&report, function, "allocated_bytes"), allocated, "{function}\n{}", summary(&report));
    }
    Ok(())
}

/// A call that is left by a jump or an exception does not disturb those after it.
#[test]
fn calls_left_by_a_jump() -> Result<()> {
    if !can_trace("calls_left_by_a_jump") {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&Program::cpp("throw").build()?).start()?;
    let commands =
        ["jump 5", "leak 10 123", "throw_new 5", "throw_constructor 5", "throw_deep 3 10", "jump 5", "leak 20 321"];
    let (report, truth) = traced(&mut fixture, &["--resource", "heap"], &commands)?;
    assert_eq!(site(&truth, "leak_via_new"), (10 * 123 + 20 * 321, 30));
    assert_eq!(live_of(&report, fixture.pid()), (10 * 123 + 20 * 321, 30), "{}", summary(&report));
    Ok(())
}

/// Mappings, whole and in part, moved and refused, and the program break: system calls by their arguments and results.
#[test]
fn mappings_and_the_break() -> Result<()> {
    if !can_trace("mappings_and_the_break") {
        return Ok(());
    }
    let commands = [
        "anon 7 3",
        "file 5 1",
        "churn 20 4",
        "cut head",
        "cut tail",
        "cut middle",
        "several",
        "over",
        "grow",
        "move",
        "shrink",
        "fail",
        "refuse 10",
        "brk 9",
        "unbrk 4",
    ];
    let mut fixture = Fixture::start("mappings")?;
    let (report, truth) = traced(&mut fixture, &["--resource", "mmap"], &commands)?;
    let number = |of: &Value, key: &str| of[key].as_u64().unwrap_or(0);
    let page = number(&truth, "page_size");
    assert_eq!(number(&truth, "brk_bytes"), 5 * page);
    let expected = number(&truth, "anon_bytes") + number(&truth, "file_bytes") + 5 * page;
    assert_eq!(live_of(&report, fixture.pid()).0, expected, "{truth}\n{}", summary(&report));
    // The call is made in libc, from where a walk by frame pointers misses the function that called libc.
    if has_tables(&report) {
        for (function, site) in truth["sites"].as_object().context("the fixture names no sites")? {
            let found = live_in(&report, function).0;
            assert_eq!(found, number(site, "live_bytes"), "{function}\n{}", summary(&report));
        }
    }
    Ok(())
}

/// Whether the stacks were unwound with tables, and not by frame pointers alone.
fn has_tables(report: &Value) -> bool {
    report["mode"]["unwinder"] == "tables"
}

/// fork and vfork leave the parent's account alone.
#[test]
fn children_have_their_own_account() -> Result<()> {
    if !can_trace("children_have_their_own_account") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let commands = ["leak 40 1000", "fork 10 500", "leak 10 10", "child 20 500", "vfork", "reap", "leak 5 7"];
    let (report, truth) = traced(&mut fixture, &["--resource", "heap"], &commands)?;
    assert_eq!(live_in(&report, "leak_before"), (40_135, 55), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_before"), site(&truth, "leak_before"));
    assert_eq!(live_in(&report, "leak_in_child"), (0, 0), "{}", summary(&report));
    Ok(())
}

/// After execve what was live is gone, and the new image is traced.
#[test]
fn exec_starts_anew() -> Result<()> {
    if !can_trace("exec_starts_anew") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let pid = fixture.pid();
    let session = Session::start(&[pid], &["--resource", "heap"])?;
    fixture.tell("leak 30 1000")?;
    fixture.send("exec")?;
    fixture.wait_ready()?;
    ensure!(
        host::wait_until(PATIENCE, || host::breakpoints(pid).is_ok_and(|breakpoints| breakpoints > 0)),
        "nothing attached after exec"
    );
    fixture.tell("leak 25 700")?;
    let report = session.stop()?;
    assert_eq!(live_in(&report, "leak_before"), (0, 0), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_after_exec"), (25 * 700, 25), "{}", summary(&report));
    Ok(())
}

/// A static program, whose allocator is its own code.
#[test]
fn static_program() -> Result<()> {
    if !can_trace("static_program") {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&kernels::static_allocators().build()?).start()?;
    let commands = ["leak malloc 21 201", "leak calloc 22 202", "release calloc 2", "leak realloc 23 203"];
    let (report, truth) = traced(&mut fixture, &["--resource", "heap"], &commands)?;
    assert_eq!(live_in(&report, "leak_via_calloc"), (20 * 202, 20), "{}", summary(&report));
    ensure_sites(&report, &truth)
}

/// A program of the system, run from its first allocation to its end: its exit status comes through, and it frees only what was seen
/// being allocated.
#[test]
fn command_from_its_first_allocation() -> Result<()> {
    if !can_trace("command_from_its_first_allocation") {
        return Ok(());
    }
    let Some(sqlite3) = host::program("command_from_its_first_allocation", kernels::SYSTEM_PROGRAMS[0]) else {
        return Ok(());
    };
    let query = "create table t(a); with recursive c(x) as (select 1 union all select x + 1 from c where x < 50) \
                 insert into t select hex(randomblob(50)) from c; select count(*) from t; .exit 7";
    let statements = query.split("; ").map(|statement| {
        // What begins with a dot is a command of the shell, which takes no semicolon.
        if statement.starts_with('.') { statement.to_owned() } else { format!("{statement};") }
    });
    let mut leaktrace = Leaktrace::new()?.args(["--format", "json", "--top", "1000", "--"]).arg(sqlite3);
    leaktrace = leaktrace.args(["-batch", ":memory:"]).args(statements);
    let outcome = leaktrace.run(3 * PATIENCE)?;
    assert_eq!(outcome.code()?, 7, "{outcome:?}");
    // The command writes to the same standard output, before the report.
    let (answer, report) = outcome.stdout.split_at(outcome.stdout.find('{').context("no report")?);
    assert_eq!(answer.trim(), "50");
    let report: Value = serde_json::from_str(report).context("failed to read the report")?;
    assert_eq!(report["command"]["exit_code"], 7);
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    assert_eq!(report["counters"].get("frees_of_older_blocks"), None, "{}", summary(&report));
    ensure!(report["events"].as_u64().is_some_and(|events| events > 500), "only {} events", report["events"]);
    Ok(())
}

/// The demo's leak is named, first and alone, with its whole call stack and its rate; and the exit status says so.
#[test]
fn leak_is_named_with_its_stack() -> Result<()> {
    if !can_trace("leak_is_named_with_its_stack") {
        return Ok(());
    }
    let mut fixture = Fixture::start("demo")?;
    let mut session = Session::start(&[fixture.pid()], &["--interval", "1s", "--fail-on-leak"])?;
    // Between these two: what it does untraced is faster, and it catches up with the clock then.
    let (before, start) = (site(&fixture.report()?, "session_remember").0, Instant::now());
    session.next_report(|report| report["processes"][0]["verdict"] == "leaking", TO_VERDICT)?;
    let (after, elapsed) = (site(&fixture.report()?, "session_remember").0, start.elapsed());
    session.running().signal(libc::SIGINT)?;
    let outcome = session.into_running().finish(PATIENCE)?;
    assert_eq!(outcome.code()?, 3, "{}", outcome.stderr);
    let report = outcome.jsonl()?.pop().context("no report")?;
    let growing: Vec<&Value> = stacks(&report).filter(|stack| stack["verdict"] == "growing").collect();
    ensure!(growing.len() == 1, "{} stacks are called growing\n{}", growing.len(), summary(&report));
    let frames = growing[0]["frames"].as_array().context("no frames")?;
    let functions: Vec<&str> = frames.iter().filter_map(|frame| frame["function"].as_str()).take(4).collect();
    assert_eq!(functions, ["session_remember", "session_open", "handle_request", "serve_requests"]);
    assert!(frames[0]["file"].as_str().is_some_and(|file| file.ends_with("demo.c")), "{}", frames[0]);
    let rate = (after - before) as f64 / elapsed.as_secs_f64();
    let found = growing[0]["growth"]["bytes_per_s"].as_f64().context("no rate")?;
    ensure!((found / rate - 1.0).abs() < 0.25, "{found} bytes a second found, {rate} leaked\n{}", summary(&report));
    Ok(())
}

/// A trace that is ended takes its programs and breakpoints with it; one that is killed does too.
#[test]
fn nothing_is_left_behind() -> Result<()> {
    if !can_trace("nothing_is_left_behind") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let running = Session::start(&[fixture.pid()], &[])?.into_running();
        ensure!(host::breakpoints(fixture.pid())? > 0, "a traced process has breakpoints");
        let held = BpfObjects::of_process(running.pid())?;
        ensure!(!held.programs.is_empty(), "a tracer that is attached holds programs");
        running.signal(signal)?;
        running.finish(PATIENCE)?;
        let gone = || held.still_there().is_ok_and(|left| left.is_empty());
        ensure!(host::wait_until(PATIENCE, gone), "{:?} is left after signal {signal}", held.still_there());
        let healed = || host::breakpoints(fixture.pid()).is_ok_and(|left| left == 0);
        ensure!(host::wait_until(PATIENCE, healed), "breakpoints are left after signal {signal}");
        fixture.tell("churn malloc 100 64")?;
    }
    Ok(())
}

/// `doctor` finds that this kernel can be traced, and says by which links.
#[test]
fn doctor_finds_what_there_is() -> Result<()> {
    if !can_trace("doctor_finds_what_there_is") {
        return Ok(());
    }
    let outcome = Leaktrace::new()?.arg("doctor").run(PATIENCE)?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stdout);
    let links = outcome.stdout.lines().find(|line| line.contains("probe links")).context("no line on links")?;
    ensure!(["session", "multi-uprobe", "perf events"].iter().any(|kind| links.contains(kind)), "{links}");
    Ok(())
}

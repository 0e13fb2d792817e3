//! The suite that must hold on every kernel that is promised: `cargo xtask vm` runs it in a virtual machine of each, and here it is a
//! test like the others.
//!
//! It looks at values, not only at counts: a program that is built for other registers, or for a kernel with another layout, attaches
//! and counts all the same. Sizes are different for each function, so that one for another is seen; addresses show in the frees, which
//! take away what was allocated at the same one and nothing else.
//!
//! Under emulation loading the programs takes longest by far, so most of the tests look at one and the same trace, of a process for each.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use leaktrace_tests::host::{self, BpfObjects, can_trace};
use leaktrace_tests::{
    Fixture, Leaktrace, Outcome, Program, Session, has_frame, kernels, live_in, live_of, only, patience, site, stacks,
    summary,
};
use serde_json::Value;

/// Time for a verdict: what is promised, and as much again for a machine that is emulated.
const TO_VERDICT: Duration = Duration::from_mins(1);

/// The length of the windows that a rate is taken from in the first minutes.
const WINDOW: Duration = Duration::from_secs(1);

/// What each traced process is told to do: its name here, the fixture, the commands.
const SCRIPTS: [(&str, &str, &[&str]); 8] = [
    (
        "functions",
        "allocators",
        &[
            "leak malloc 20 1001",
            "leak calloc 21 1102",
            "leak realloc 22 1203",
            "leak reallocarray 23 1304",
            "leak posix_memalign 24 1405",
            "leak aligned_alloc 25 1506",
            "leak memalign 26 1607",
            "leak valloc 27 1708",
            "leak pvalloc 28 1809",
            "release malloc 7",
            "release calloc 8",
            "release realloc 9",
            "release reallocarray 10",
            "release posix_memalign 11",
            "release aligned_alloc 12",
            "release memalign 13",
            "release valloc 14",
            "release pvalloc 15",
            "churn malloc 30 65",
            "churn calloc 31 66",
            "churn posix_memalign 32 67",
            "churn aligned_alloc 33 68",
        ],
    ),
    (
        "realloc",
        "allocators",
        &["grow 11 100 30000", "shrink 12 30000 100", "to_zero 13 77", "from_null 14 55", "keep 15 44"],
    ),
    ("failed", "allocators", &["fail 30", "leak malloc 3 111", "fail 30"]),
    ("threads", "threads", &["handoff 150 101", "handoff_leak 150 64 10", "churn 4 150 48", "leak 5 20 257"]),
    (
        "jumps",
        "throw",
        &["jump 5", "leak 10 123", "throw_new 5", "throw_constructor 5", "throw_deep 3 10", "jump 5", "leak 20 321"],
    ),
    (
        "mappings",
        "mappings",
        &[
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
        ],
    ),
    (
        "children",
        "lifecycle",
        &["leak 40 1000", "fork 10 500", "leak 10 10", "child 20 500", "vfork", "reap", "leak 5 7"],
    ),
    ("static", "static", &["leak malloc 21 201", "leak calloc 22 202", "release calloc 2", "leak realloc 23 203"]),
];

/// The trace that most tests look at.
struct Trace {
    /// How leaktrace ended.
    outcome: Outcome,
    /// After the last command. Of a stack on which nothing is live any more later reports say less.
    report: Value,
    /// The final one.
    last: Value,
    /// The process of each script and its own account, and those of `exec` and `demo`.
    accounts: HashMap<&'static str, (u32, Value)>,
    demo: Demo,
    /// What was there while leaktrace ran and is still there after it: BPF objects, and breakpoints of the processes.
    left: (BpfObjects, usize),
}

/// What the demo itself says of its leak.
struct Demo {
    /// Bytes that it leaked while it certainly was traced, and while it may have been.
    leaked: RangeInclusive<u64>,
    /// Those that it had leaked before.
    before: RangeInclusive<u64>,
    /// From the first report with some of it until the end.
    seen: Duration,
    history: LeakHistory,
}

/// When the demo leaked how much. Under emulation on a busy host it does not keep in step with the clock; what it did is known all the
/// same.
struct LeakHistory {
    /// Seconds since [`UNIX_EPOCH`] at which another [`Self::bytes_each`] had been leaked.
    at: Vec<f64>,
    bytes_each: f64,
}

impl LeakHistory {
    fn of(demo: &mut Fixture) -> Result<Self> {
        let told = demo.ask("history")?;
        ensure!(told["full"] == false, "the demo ran for longer than its history reaches");
        let number = |key: &str| told[key].as_f64().with_context(|| format!("the demo's history has no {key}"));
        let since = number("since_ms")? + boot_time_ms()?;
        let at: Vec<f64> =
            serde_json::from_value(told["at_ms"].clone()).context("failed to read the demo's history")?;
        Ok(Self { at: at.iter().map(|at| (since + at) / 1e3).collect(), bytes_each: number("bytes_per_entry")? })
    }

    /// At the least so many bytes had been leaked then; at the most [`Self::bytes_each`] more.
    fn at_least(&self, time: f64) -> f64 {
        self.at.partition_point(|at| *at <= time) as f64 * self.bytes_each
    }

    /// Least and greatest mean rate, in bytes a second, over any stretch of so many seconds within `from` to `to`.
    fn rates(&self, seconds: f64, (from, to): (f64, f64)) -> (f64, f64) {
        let mut begin = from;
        let (mut least, mut most) = (f64::MAX, f64::MIN);
        while begin + seconds <= to {
            let leaked = self.at_least(begin + seconds) - self.at_least(begin);
            least = least.min((leaked - self.bytes_each) / seconds);
            most = most.max((leaked + self.bytes_each) / seconds);
            begin += 0.1;
        }
        (least, most)
    }
}

/// What the time of day, in milliseconds, is ahead of `CLOCK_MONOTONIC`.
fn boot_time_ms() -> Result<f64> {
    let mut monotonic = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock is written to a timespec of our own.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut monotonic) };
    ensure!(result == 0, "failed to read the clock: {}", std::io::Error::last_os_error());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the time of day is before 1970")?;
    Ok(now.as_secs_f64() * 1e3 - (monotonic.tv_sec as f64 * 1e3 + monotonic.tv_nsec as f64 / 1e6))
}

fn start(fixture: &str) -> Result<Fixture> {
    let program = match fixture {
        "static" => kernels::static_allocators(),
        "throw" => Program::cpp("throw"),
        name => Program::c(name),
    };
    Fixture::builder(&program.build()?).start()
}

fn run() -> Result<Trace> {
    let mut fixtures = Vec::new();
    for (name, fixture, commands) in SCRIPTS {
        fixtures.push((name, start(fixture)?, commands));
    }
    let (mut demo, mut exec) = (start("demo")?, start("lifecycle")?);
    let pids: Vec<u32> = fixtures.iter().map(|(_, fixture, _)| fixture.pid()).chain([demo.pid(), exec.pid()]).collect();
    let untraced = site(&demo.report()?, "session_remember").0;
    let mut session = Session::start(&pids, &["--interval", "1s", "--fail-on-leak"])?;
    ensure!(host::breakpoints(demo.pid())? > 0, "a traced process has breakpoints");
    let held = BpfObjects::of_process(session.running().pid())?;
    ensure!(!held.programs.is_empty(), "a tracer that is attached holds programs");

    let before = site(&demo.report()?, "session_remember").0;
    let mut accounts = HashMap::new();
    for (name, fixture, commands) in &mut fixtures {
        for command in *commands {
            fixture.tell(command).with_context(|| format!("{name}: {command}"))?;
        }
        accounts.insert(*name, (fixture.pid(), fixture.report()?));
    }
    exec.tell("leak 30 1000")?;
    exec.send("exec")?;
    exec.wait_ready()?;
    let attached = || host::breakpoints(exec.pid()).is_ok_and(|breakpoints| breakpoints > 0);
    ensure!(host::wait_until(patience(), attached), "nothing attached after exec");
    exec.tell("leak 25 700")?;
    accounts.insert("exec", (exec.pid(), exec.report()?));

    // One ring holds all records in their order, so with the last one all have been seen. Where it never is, that is for the test of
    // it to say.
    let (exec_pid, demo_pid, told) = (exec.pid(), demo.pid(), Instant::now());
    let has_all = |report: &Value| {
        live_in(&only(report, exec_pid), "leak_after_exec").1 == 25
            && live_in(&only(report, demo_pid), "session_remember").1 > 0
    };
    let report = session.next_report(|report| has_all(report) || told.elapsed() > patience() / 2, patience())?;
    let since = Instant::now();

    let leaks = |report: &Value| only(report, demo_pid)["processes"][0]["verdict"] == "leaking";
    session.next_report(leaks, TO_VERDICT).context("the demo was not found to leak")?;
    let (after, seen) = (site(&demo.report()?, "session_remember").0, since.elapsed());
    session.running().signal(libc::SIGINT)?;
    let outcome = session.into_running().finish(patience())?;
    let last = outcome.jsonl()?.pop().with_context(|| format!("no report; {}", outcome.stderr))?;
    let truth = demo.report()?;
    let leaked = after - before..=site(&truth, "session_remember").0 - untraced;
    accounts.insert("demo", (demo_pid, truth));
    let demo = Demo { leaked, before: untraced..=before, seen, history: LeakHistory::of(&mut demo)? };

    let mut left = (held, pids.len());
    host::wait_until(patience(), || {
        left = (
            left.0.still_there().unwrap_or_default(),
            pids.iter().filter_map(|pid| host::breakpoints(*pid).ok()).sum(),
        );
        left.0.is_empty() && left.1 == 0
    });
    Ok(Trace { outcome, report, last, accounts, demo, left })
}

/// The trace, which the first test that asks makes; `None` where this host cannot trace, and then the test has been reported as skipped.
fn trace(test: &str) -> Result<Option<&'static Trace>> {
    static TRACE: OnceLock<Result<Trace, String>> = OnceLock::new();
    if !can_trace(test) {
        return Ok(None);
    }
    let trace = TRACE.get_or_init(|| run().map_err(|error| format!("{error:#}")));
    trace.as_ref().map(Some).map_err(|error| anyhow!("failed to trace: {error}"))
}

impl Trace {
    /// The part of the report that is about one of the processes, and what that says of itself.
    fn of(&self, name: &str) -> Result<(Value, &Value)> {
        let (pid, truth) = self.accounts.get(name).with_context(|| format!("there is no process {name}"))?;
        Ok((only(&self.report, *pid), truth))
    }
}

/// Live bytes and blocks of the heap: threads' stacks are mappings, which libc keeps for the next thread.
fn heap(report: &Value) -> (u64, u64) {
    let of = |key: &str| {
        let heap = stacks(report).filter(|stack| stack["resource"] == "heap");
        heap.map(|stack| stack[key].as_u64().unwrap_or(0)).sum()
    };
    (of("live_bytes"), of("live_count"))
}

/// Bytes that were allocated under `function` since tracing began.
fn allocated(report: &Value, function: &str) -> u64 {
    let through = stacks(report).filter(|stack| has_frame(stack, function));
    through.map(|stack| stack["allocated_bytes"].as_u64().unwrap_or(0)).sum()
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
        let (found, expected) = (allocated(report, function), number(account, "allocated_bytes"));
        // What realloc allocates on the way to the final size is counted by leaktrace and not by the fixture.
        let right = if function.contains("realloc") { found >= expected } else { found == expected };
        ensure!(right, "{function}: {found} bytes were allocated, not {expected}\n{}", summary(report));
    }
    let expected = (number(truth, "live_bytes"), number(truth, "live_count"));
    ensure!(heap(report) == expected, "not {expected:?} are live in all\n{}", summary(report));
    Ok(())
}

/// Each allocator function by its own size argument, wherever that is; each block gone again when its address is freed.
#[test]
fn sizes_and_addresses_of_each_function() -> Result<()> {
    let Some(trace) = trace("sizes_and_addresses_of_each_function")? else { return Ok(()) };
    let (report, truth) = trace.of("functions")?;
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
    for (index, via) in vias.iter().enumerate() {
        // Said here too, and not by the fixture alone.
        let expected = ((1001 + 101 * index as u64) * 13, 13);
        assert_eq!(live_in(&report, &format!("leak_via_{via}")), expected, "{via}\n{}", summary(&report));
    }
    ensure_sites(&report, truth)
}

/// realloc that moves, stays in place, starts from NULL, ends in zero, or fails: the block has its last size, and a failed call leaves
/// the old one.
#[test]
fn realloc_in_all_its_ways() -> Result<()> {
    let Some(trace) = trace("realloc_in_all_its_ways")? else { return Ok(()) };
    let (report, truth) = trace.of("realloc")?;
    assert_eq!(live_in(&report, "realloc_grow"), (11 * 51_200, 11), "{}", summary(&report));
    assert_eq!(live_in(&report, "realloc_shrink"), (12 * 58, 12), "{}", summary(&report));
    assert_eq!(live_in(&report, "realloc_from_null"), (14 * 55, 14), "{}", summary(&report));
    assert_eq!(live_in(&report, "keep_over_failed_realloc"), (15 * 44, 15), "{}", summary(&report));
    ensure_sites(&report, truth)
}

/// Calls that fail count nothing: NULL, an error from `posix_memalign`, a product that overflows.
#[test]
fn failed_calls_count_nothing() -> Result<()> {
    let Some(trace) = trace("failed_calls_count_nothing")? else { return Ok(()) };
    let (report, truth) = trace.of("failed")?;
    assert_eq!(heap(&report), (333, 3), "{}", summary(&report));
    assert_eq!(allocated(&report, "fail_each"), 0, "{}", summary(&report));
    ensure_sites(&report, truth)
}

/// Blocks freed by another thread than the one that allocated them, and threads that end, on all processors there are.
#[test]
fn threads_free_each_others_blocks() -> Result<()> {
    let Some(trace) = trace("threads_free_each_others_blocks")? else { return Ok(()) };
    let (report, truth) = trace.of("threads")?;
    assert_eq!(live_in(&report, "produce_some_kept"), (15 * 64, 15), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_in_thread"), (100 * 257, 100), "{}", summary(&report));
    for function in ["produce", "churn_block"] {
        assert_eq!(live_in(&report, function), (0, 0), "{function}\n{}", summary(&report));
        let expected = truth["sites"][function]["allocated_bytes"].as_u64().context("the fixture did nothing")?;
        assert_eq!(allocated(&report, function), expected, "{function}\n{}", summary(&report));
    }
    Ok(())
}

/// A call that is left by a jump or an exception does not disturb those after it.
#[test]
fn calls_left_by_a_jump() -> Result<()> {
    let Some(trace) = trace("calls_left_by_a_jump")? else { return Ok(()) };
    let (report, truth) = trace.of("jumps")?;
    assert_eq!(site(truth, "leak_via_new"), (10 * 123 + 20 * 321, 30));
    assert_eq!(heap(&report), (10 * 123 + 20 * 321, 30), "{}", summary(&report));
    Ok(())
}

/// Mappings, whole and in part, moved and refused, and the program break: system calls by their arguments and results.
#[test]
fn mappings_and_the_break() -> Result<()> {
    let Some(trace) = trace("mappings_and_the_break")? else { return Ok(()) };
    let (report, truth) = trace.of("mappings")?;
    let number = |of: &Value, key: &str| of[key].as_u64().unwrap_or(0);
    let page = number(truth, "page_size");
    assert_eq!(number(truth, "brk_bytes"), 5 * page);
    let mapped = stacks(&report).filter(|stack| stack["resource"] == "mmap");
    let mapped: u64 = mapped.map(|stack| number(stack, "live_bytes")).sum();
    let expected = number(truth, "anon_bytes") + number(truth, "file_bytes") + 5 * page;
    assert_eq!(mapped, expected, "{truth}\n{}", summary(&report));
    // The call is made in libc, from where a walk by frame pointers misses the function that called libc.
    if trace.report["mode"]["unwinder"] == "tables" {
        for (function, site) in truth["sites"].as_object().context("the fixture names no sites")? {
            let found = live_in(&report, function).0;
            assert_eq!(found, number(site, "live_bytes"), "{function}\n{}", summary(&report));
        }
    }
    Ok(())
}

/// fork and vfork leave the parent's account alone.
#[test]
fn children_have_their_own_account() -> Result<()> {
    let Some(trace) = trace("children_have_their_own_account")? else { return Ok(()) };
    let (report, truth) = trace.of("children")?;
    assert_eq!(live_in(&report, "leak_before"), (40_135, 55), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_before"), site(truth, "leak_before"));
    assert_eq!(live_in(&report, "leak_in_child"), (0, 0), "{}", summary(&report));
    Ok(())
}

/// After execve what was live is gone, and the new image is traced.
#[test]
fn exec_starts_anew() -> Result<()> {
    let Some(trace) = trace("exec_starts_anew")? else { return Ok(()) };
    let (report, _) = trace.of("exec")?;
    assert_eq!(live_in(&report, "leak_before"), (0, 0), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_after_exec"), (25 * 700, 25), "{}", summary(&report));
    Ok(())
}

/// A static program, whose allocator is its own code.
#[test]
fn static_program() -> Result<()> {
    let Some(trace) = trace("static_program")? else { return Ok(()) };
    let (report, truth) = trace.of("static")?;
    assert_eq!(live_in(&report, "leak_via_calloc"), (20 * 202, 20), "{}", summary(&report));
    ensure_sites(&report, truth)
}

/// The demo's leak is named, alone among all processes, with its whole call stack, and with the bytes, the age, the course over time (which
/// the kernel's clock has a part in) and the rate that the demo itself knows; and the exit status says so.
#[test]
fn leak_is_named_with_its_stack() -> Result<()> {
    let Some(trace) = trace("leak_is_named_with_its_stack")? else { return Ok(()) };
    assert_eq!(trace.outcome.code()?, 3, "{}\n{}", trace.outcome.stderr, summary(&trace.last));
    let (pid, _) = trace.accounts.get("demo").context("there is no demo")?;
    let report = only(&trace.last, *pid);
    let growing: Vec<&Value> = stacks(&trace.last).filter(|stack| stack["verdict"] == "growing").collect();
    ensure!(growing.len() == 1, "{} stacks are called growing\n{}", growing.len(), summary(&trace.last));
    ensure!(stacks(&report).next() == Some(growing[0]), "it is not the demo's first\n{}", summary(&report));
    let frames = growing[0]["frames"].as_array().context("no frames")?;
    let functions: Vec<&str> = frames.iter().filter_map(|frame| frame["function"].as_str()).take(4).collect();
    assert_eq!(functions, ["session_remember", "session_open", "handle_request", "serve_requests"]);
    assert!(frames[0]["file"].as_str().is_some_and(|file| file.ends_with("demo.c")), "{}", frames[0]);

    let Demo { leaked, before, seen, history } = &trace.demo;
    let live = growing[0]["live_bytes"].as_u64().context("no live bytes")?;
    ensure!(leaked.contains(&live), "{live} bytes are live, {leaked:?} were leaked\n{}", summary(&report));
    // Ages are whole windows of a second.
    let age = growing[0]["oldest_age_s"].as_f64().context("no age")?;
    let duration = trace.last["duration_s"].as_f64().context("no duration")?;
    ensure!((seen.as_secs_f64() - 2.0..=duration + 1.0).contains(&age), "{age} s old after {seen:?} of {duration} s");

    let started: jiff::Timestamp = serde_json::from_value(trace.last["started_at"].clone()).context("no start")?;
    let started = started.as_nanosecond() as f64 / 1e9;
    let series: Vec<(f64, f64)> = serde_json::from_value(growing[0]["series"].clone()).context("no series")?;
    ensure_series(&series, started, history, before)?;

    let number = |key: &str| growing[0]["growth"][key].as_f64().with_context(|| format!("no {key}"));
    let (found, seconds) = (number("bytes_per_s")?, number("windows")? * WINDOW.as_secs_f64());
    let (least, most) = history.rates(seconds, (started, started + duration));
    // Who is stopped between an allocation and the note of it puts it into the wrong window.
    ensure!(
        (0.97 * least..=1.03 * most).contains(&found),
        "{found} bytes a second found over {seconds} s, {least} to {most} were leaked\n{}",
        summary(&report)
    );
    Ok(())
}

/// Each point of the series is what was live at its time: what had been leaked by then, less what had been before the demo was traced, which
/// is one and the same number for all points.
fn ensure_series(
    series: &[(f64, f64)],
    started: f64,
    history: &LeakHistory,
    before: &RangeInclusive<u64>,
) -> Result<()> {
    // How far what both say of the time of one and the same block may be apart: a tick of the kernel's clock, and being stopped for a
    // moment between the allocation and the note of it.
    const APART: f64 = 0.3;
    ensure!(series.len() > 10, "only {} points", series.len());
    let (mut least, mut most) = (*before.start() as f64, *before.end() as f64);
    // In the first window tracing began.
    for pair in series.windows(2) {
        let [(before, _), (end, bytes)] = pair else { unreachable!("windows of two") };
        // The fewest in a window are those at its begin, where the one before ended: nothing is freed.
        let begin = started + before;
        least = least.max(history.at_least(begin - APART) - bytes);
        most = most.min(history.at_least(begin + APART) + history.bytes_each - bytes);
        ensure!(
            least <= most,
            "at {end} s {bytes} bytes were live, which does not go with the points before: {series:?}"
        );
    }
    Ok(())
}

/// A trace that has ended has lost nothing, and takes its programs and breakpoints with it.
#[test]
fn nothing_is_lost_or_left_behind() -> Result<()> {
    let Some(trace) = trace("nothing_is_lost_or_left_behind")? else { return Ok(()) };
    for report in [&trace.report, &trace.last] {
        assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(report));
    }
    let (objects, breakpoints) = &trace.left;
    assert!(objects.is_empty() && *breakpoints == 0, "{objects:?} and {breakpoints} breakpoints are left");
    Ok(())
}

/// The size filter sees the argument before anything is recorded; and a tracer that is killed leaves nothing behind either.
#[test]
fn filtered_sizes_then_a_killed_tracer() -> Result<()> {
    if !can_trace("filtered_sizes_then_a_killed_tracer") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let pid = fixture.pid();
    let mut session = Session::start(&[pid], &["--min-size", "500", "--max-size", "900"])?;
    for command in ["leak malloc 5 499", "leak calloc 6 500", "leak aligned_alloc 7 900", "leak posix_memalign 8 901"] {
        fixture.tell(command)?;
    }
    let expected = (6 * 500 + 7 * 900, 13);
    session.next_report(|report| live_of(report, pid) == expected, patience()).context("not what the filter leaves")?;
    fixture.tell("leak malloc 1 499")?;
    let report = session.next_report(|_| true, patience())?;
    assert_eq!(live_of(&report, pid), expected, "{}", summary(&report));

    let held = BpfObjects::of_process(session.running().pid())?;
    ensure!(!held.programs.is_empty(), "a tracer that is attached holds programs");
    session.running().signal(libc::SIGKILL)?;
    session.into_running().finish(patience())?;
    let gone = || held.still_there().is_ok_and(|left| left.is_empty());
    ensure!(host::wait_until(patience(), gone), "{:?} is left", held.still_there());
    let healed = || host::breakpoints(pid).is_ok_and(|left| left == 0);
    ensure!(host::wait_until(patience(), healed), "breakpoints are left");
    fixture.tell("churn malloc 100 64")?;
    Ok(())
}

/// Of a sample: what it stands for is near what is there (five standard deviations), large blocks are certain, what was freed is gone, and
/// nothing is the program's own mapping that the allocator made.
#[test]
fn samples_stand_for_all() -> Result<()> {
    if !can_trace("samples_stand_for_all") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &["--sample", "1K"])?;
    for command in ["leak malloc 2000 200", "leak calloc 3 200000", "churn malloc 500 200", "grow 10 100 90000"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    let probability = -(-200.0_f64 / 1024.0).exp_m1();
    let deviation = 200.0 * (2000.0 * (1.0 - probability) / probability).sqrt();
    let (bytes, count) = live_in(&report, "leak_via_malloc");
    ensure!((bytes as f64 - 400_000.0).abs() < 5.0 * deviation, "{bytes} in {count}\n{}", summary(&report));
    ensure!(bytes.abs_diff(200 * count) <= 200, "{bytes} in {count}\n{}", summary(&report));
    for function in ["leak_via_calloc", "realloc_grow", "balanced_via_malloc"] {
        assert_eq!(live_in(&report, function), site(&truth, function), "{}", summary(&report));
    }
    ensure!(stacks(&report).all(|stack| stack["resource"] == "heap"), "{}", summary(&report));
    Ok(())
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
    let statements = [
        "create table t(a);",
        "with recursive c(x) as (select 1 union all select x + 1 from c where x < 50)
         insert into t select hex(randomblob(50)) from c;",
        "select count(*) from t;",
        ".exit 7",
    ];
    let leaktrace = Leaktrace::new()?.args(["--format", "json", "--top", "1000", "--"]).arg(sqlite3);
    let outcome = leaktrace.args(["-batch", ":memory:"]).args(statements).run(3 * patience())?;
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

/// `doctor` finds that this kernel can be traced, and says by which links.
#[test]
fn doctor_finds_what_there_is() -> Result<()> {
    if !can_trace("doctor_finds_what_there_is") {
        return Ok(());
    }
    let outcome = Leaktrace::new()?.arg("doctor").run(patience())?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stdout);
    let links = outcome.stdout.lines().find(|line| line.contains("probe links")).context("no line on links")?;
    ensure!(["session", "multi-uprobe", "perf events"].iter().any(|kind| links.contains(kind)), "{links}");
    Ok(())
}

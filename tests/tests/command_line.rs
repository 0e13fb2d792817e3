//! The command line as a contract: commands that are started, wrong input, signals, and what is left behind.

use std::fs::{self, File, Permissions};
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::host::BpfObjects;
use leaktrace_tests::{
    Fixture, Leaktrace, Outcome, PATIENCE, Program, Session, has_frame, host, live_in, live_of, stacks, summary,
};
use serde_json::Value;

/// A child that is not a fixture; killed when dropped.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs leaktrace to its end, which must come soon.
fn run<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<Outcome> {
    Leaktrace::new()?.args(args).run(PATIENCE)
}

/// `leaktrace -- startup ARGS` with the JSON report.
fn run_startup(args: &[&str]) -> Result<Outcome> {
    let program = Program::c("startup").build()?;
    Leaktrace::new()?.args(["--format", "json", "--"]).arg(program).args(args).run(PATIENCE)
}

/// An outcome with this exit status, whose only word is an error that contains all of `words`.
fn assert_refused(outcome: &Outcome, code: i32, words: &[&str]) -> Result<()> {
    assert_eq!(outcome.code()?, code, "{outcome:?}");
    assert_eq!(outcome.stdout, "", "{outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{word:?} is not in {:?}", outcome.stderr);
    }
    Ok(())
}

/// A command is traced from its first allocation, constructors and destructors included, to the byte.
#[test]
fn a_command_from_its_first_allocation() -> Result<()> {
    if !host::can_trace("a_command_from_its_first_allocation") {
        return Ok(());
    }
    let outcome = run_startup(&[])?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stderr);
    let report = outcome.json()?;
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    for (function, live) in [
        ("leak_in_constructor", (700, 7)),
        ("keep_for_destructor", (2000, 2)),
        ("leak_in_main", (704, 11)),
        ("balanced_in_main", (0, 0)),
    ] {
        assert_eq!(live_in(&report, function), live, "{function}\n{}", summary(&report));
    }
    let heap = stacks(&report).filter(|stack| stack["resource"] == "heap");
    let names = ["leak_in_constructor", "keep_for_destructor", "leak_in_main", "balanced_in_main"];
    for stack in heap.filter(|stack| stack["live_bytes"] != 0) {
        assert!(names.iter().any(|name| has_frame(stack, name)), "{stack}");
    }
    assert_eq!(report["counters"]["frees_of_older_blocks"], Value::Null, "{}", report["counters"]);
    assert_eq!(report["processes"][0]["comm"], "startup");
    Ok(())
}

/// The command's exit status is leaktrace's own and stands in the report; a signal counts as a shell counts it.
#[test]
fn the_commands_status_is_passed_on() -> Result<()> {
    if !host::can_trace("the_commands_status_is_passed_on") {
        return Ok(());
    }
    for (args, code, exit_code, signal) in [
        (["exit", "0"], 0, Value::from(0), Value::Null),
        (["exit", "7"], 7, Value::from(7), Value::Null),
        (["exit", "255"], 255, Value::from(255), Value::Null),
        (["signal", "15"], 128 + 15, Value::Null, Value::from(15)),
        (["signal", "11"], 128 + 11, Value::Null, Value::from(11)),
    ] {
        let outcome = run_startup(&args)?;
        assert_eq!(outcome.code()?, code, "{args:?}: {}", outcome.stderr);
        let report = outcome.json()?;
        assert_eq!((&report["command"]["exit_code"], &report["command"]["signal"]), (&exit_code, &signal), "{args:?}");
        assert_eq!(live_in(&report, "leak_in_main"), (704, 11), "{args:?}\n{}", summary(&report));
    }
    Ok(())
}

/// A command that cannot be started is an error that names it.
#[test]
fn a_command_that_is_not_there() -> Result<()> {
    if !host::can_trace("a_command_that_is_not_there") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let not_executable = folder.path().join("not-executable");
    fs::write(&not_executable, "text")?;
    for command in ["no-such-command-anywhere", "/no/such/folder/program", not_executable.to_str().context("a path")?] {
        assert_refused(&run(["--", command])?, 1, &[command])?;
    }
    Ok(())
}

/// With --duration the command is ended when the time is over, and that is a success.
#[test]
fn a_duration_ends_the_command() -> Result<()> {
    if !host::can_trace("a_duration_ends_the_command") {
        return Ok(());
    }
    let start = Instant::now();
    let outcome = run(["--format", "json", "--duration", "1s", "--", "sleep", "1000"])?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stderr);
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let report = outcome.json()?;
    assert_eq!(report["ended"], "duration");
    let pid = report["command"]["pid"].as_u64().context("the command's pid")?;
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the command {pid} is still there");
    Ok(())
}

/// A process that is not there, is a kernel thread or a thread of another process, or is leaktrace's own mistake: named, status 1.
#[test]
fn processes_that_cannot_be_traced() -> Result<()> {
    if !host::can_trace("processes_that_cannot_be_traced") {
        return Ok(());
    }
    assert_refused(&run(["-p", "4194303"])?, 1, &["4194303"])?;

    let mut ended = Command::new("true").spawn()?;
    ended.wait()?;
    let pid = ended.id().to_string();
    assert_refused(&run(["-p", &pid])?, 1, &[&pid])?;

    if fs::read_to_string("/proc/2/comm").is_ok_and(|comm| comm.trim() == "kthreadd") {
        assert_refused(&run(["-p", "2"])?, 1, &["2", "kthreadd", "kernel thread"])?;
    }

    let mut fixture = Fixture::start("threads")?;
    fixture.tell("start 1 64")?;
    let tasks = fs::read_dir(format!("/proc/{}/task", fixture.pid()))?;
    let tids: Vec<String> =
        tasks.map(|task| Ok(task?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    let pid = fixture.pid().to_string();
    let tid = tids.iter().find(|tid| **tid != pid).context("no second thread")?;
    assert_refused(&run(["-p", tid])?, 1, &[tid, &pid])?;

    // One of several is enough.
    assert_refused(&run(["-p", &format!("{pid},4194303")])?, 1, &["4194303"])?;
    Ok(())
}

/// A process without any allocator is refused, with what was looked for and where.
#[test]
fn a_process_without_an_allocator() -> Result<()> {
    if !host::can_trace("a_process_without_an_allocator") {
        return Ok(());
    }
    let program = Program::c("no_allocator").flag("-static").flag("-nostdlib").build()?;
    let process = Reaped(Command::new(&program).stdin(Stdio::piped()).spawn()?);
    let pid = process.0.id().to_string();
    assert_refused(&run(["-p", &pid])?, 1, &[&pid, "no allocator", "malloc", "no_allocator"])?;
    Ok(())
}

/// A user without the rights is told what is missing, by name, and nothing hangs.
#[test]
fn a_user_without_rights() -> Result<()> {
    let test = "a_user_without_rights";
    let Some(setpriv) = host::program(test, "setpriv") else { return Ok(()) };
    if !host::can_trace(test) {
        return Ok(());
    }
    let fixture = Fixture::start("threads")?;
    // A copy where that user may run it: the build may be in a folder of root's.
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    let binary = folder.path().join("leaktrace");
    fs::copy(Leaktrace::new()?.command().get_program(), &binary)?;
    fs::set_permissions(&binary, Permissions::from_mode(0o755))?;
    let output = Command::new(setpriv)
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"])
        .arg(&binary)
        .args(["-p", &fixture.pid().to_string()])
        .current_dir("/")
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(output.stdout.is_empty(), "{text}");
    assert!(text.contains("root") || text.contains("CAP_"), "{text}");
    assert_eq!(host::breakpoints(fixture.pid())?, 0);
    Ok(())
}

/// What makes no sense is wrong usage: status 2, and the option and the value are named.
#[test]
fn wrong_usage() -> Result<()> {
    let pid = std::process::id().to_string();
    for (option, value) in [
        ("--duration", "0"),
        ("--duration", "0s"),
        ("--duration", "-1s"),
        ("--duration", "100000 years"),
        ("--duration", "soon"),
        ("--interval", "0s"),
        ("--interval", "1us"),
        ("--min-size", "0"),
        ("--max-size", "1PiB"),
        ("--max-size", "-1"),
        ("--top", "0"),
        ("--older-than", "0s"),
        ("--sample", "0"),
        ("--max-overhead", "101"),
        ("--format", "xml"),
        ("--resource", "files"),
        ("--unwind", "guess"),
        ("--output", ""),
    ] {
        assert_refused(&run(["-p", &pid, option, value])?, 2, &[option, value])
            .with_context(|| format!("{option} {value}"))?;
    }
    for pids in ["0", "-1", "abc", "1,,2", "99999999999", "1,1"] {
        assert_refused(&run(["-p", pids])?, 2, &["--pid"]).with_context(|| format!("-p {pids}"))?;
    }
    assert_refused(&run(["-p", &pid, "--comm", "nginx"])?, 2, &["--comm", "--pid"])?;
    assert_refused(&run(["--all", "--", "true"])?, 2, &["--all", "COMMAND"])?;
    assert_refused(&run(["--exclude", "nginx"])?, 2, &["--exclude", "KIND=VALUE"])?;
    assert_refused(&run(["-p", &pid, "--", "true"])?, 2, &["--pid", "true"])?;
    assert_refused(&run(["--no-such-option"])?, 2, &["--no-such-option"])?;
    assert_refused(&run(["-p", &pid, "--min-size", "2K", "--max-size", "1K"])?, 2, &["--max-size", "--min-size"])?;
    Ok(())
}

/// An output file that cannot be written is found out before anything is attached, and named.
#[test]
fn an_output_that_cannot_be_written() -> Result<()> {
    if !host::can_trace("an_output_that_cannot_be_written") {
        return Ok(());
    }
    let fixture = Fixture::start("threads")?;
    let pid = fixture.pid().to_string();
    let folder = tempfile::tempdir()?;
    for path in [folder.path().join("missing/report.json"), folder.path().to_owned(), "/proc/report".into()] {
        let path = path.to_str().context("a path")?;
        // Without a duration: if it started to trace, it would not end.
        assert_refused(&run(["-p", &pid, "-o", path])?, 1, &[path])?;
    }
    assert_eq!(fs::read_dir(folder.path())?.count(), 0, "something was left in the folder");
    Ok(())
}

/// The output file is there whole at the end, replaces an older one, and nothing else is left beside it or printed.
#[test]
fn the_output_file_is_written_whole() -> Result<()> {
    if !host::can_trace("the_output_file_is_written_whole") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("report.json");
    fs::write(&path, "older")?;
    let mut running = Leaktrace::pid(fixture.pid())?.args(["-v", "--format", "json", "-o"]).arg(&path).spawn()?;
    running.wait_attached(fixture.pid())?;
    fixture.tell("leak malloc 10 100")?;
    assert_eq!(fs::read_to_string(&path)?, "older", "it was touched before the end");
    running.signal(libc::SIGTERM)?;
    let outcome = running.finish(PATIENCE)?;
    assert_eq!((outcome.code()?, outcome.stdout.as_str()), (0, ""));
    let report: Value = serde_json::from_slice(&fs::read(&path)?)?;
    assert_eq!(live_of(&report, fixture.pid()), (1000, 10), "{}", summary(&report));
    assert_eq!(fs::read_dir(folder.path())?.count(), 1, "something was left beside it");
    Ok(())
}

/// When whoever reads the standard output goes away, the end is quiet: status 0, no word, nothing attached.
#[test]
fn a_reader_that_goes_away() -> Result<()> {
    if !host::can_trace("a_reader_that_goes_away") {
        return Ok(());
    }
    let fixture = Fixture::start("threads")?;
    for format in ["text", "jsonl"] {
        let (mut reader, writer) = std::io::pipe()?;
        let mut leaktrace = Leaktrace::pid(fixture.pid())?.args(["--interval", "100ms", "--format", format]);
        leaktrace.command().stdout(writer);
        let running = leaktrace.spawn()?;
        // As `head -c 1` does.
        reader.read_exact(&mut [0])?;
        drop(reader);
        let outcome = running.finish(PATIENCE)?;
        assert_eq!((outcome.code()?, outcome.stderr.as_str()), (0, ""), "{format}");
        assert_eq!(host::breakpoints(fixture.pid())?, 0, "{format}");
    }
    Ok(())
}

/// The standard output full: an error that says so, not a success without a report.
#[test]
fn a_full_output_is_an_error() -> Result<()> {
    if !host::can_trace("a_full_output_is_an_error") {
        return Ok(());
    }
    let fixture = Fixture::start("threads")?;
    let mut leaktrace = Leaktrace::pid(fixture.pid())?.args(["--duration", "200ms", "--format", "json"]);
    leaktrace.command().stdout(File::options().write(true).open("/dev/full")?);
    let outcome = leaktrace.run(PATIENCE)?;
    assert_eq!(outcome.code()?, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("No space left"), "{}", outcome.stderr);
    Ok(())
}

/// SIGINT, SIGTERM and SIGHUP end the trace with its report, status 0, and nothing is left behind.
#[test]
fn signals_end_with_the_report() -> Result<()> {
    if !host::can_trace("signals_end_with_the_report") {
        return Ok(());
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let mut fixture = Fixture::start("allocators")?;
        let mut session = Session::start(&[fixture.pid()], &[])?;
        let held = BpfObjects::of_process(session.running().pid())?;
        assert!(!held.is_empty());
        fixture.tell("leak malloc 10 100")?;
        session.running().signal(signal)?;
        let report = session.finish().with_context(|| format!("signal {signal}"))?;
        assert_eq!(report["ended"], "interrupted");
        assert_eq!(live_of(&report, fixture.pid()), (1000, 10), "{}", summary(&report));
        assert_nothing_left(&held, fixture.pid())?;
    }
    Ok(())
}

/// Neither the programs and links that a tracer held, nor breakpoints in its target.
fn assert_nothing_left(held: &BpfObjects, pid: u32) -> Result<()> {
    // The kernel lets go of programs after a grace period.
    let gone = host::wait_until(PATIENCE, || held.still_there().is_ok_and(|left| left.is_empty()));
    assert!(gone, "the kernel still has {:?}", held.still_there()?);
    let clean = host::wait_until(PATIENCE, || host::breakpoints(pid).is_ok_and(|left| left == 0));
    assert!(clean, "breakpoints are left in {pid}");
    Ok(())
}

/// A second SIGINT right after the first: it ends either way, and nothing is left behind.
#[test]
fn interrupted_twice() -> Result<()> {
    if !host::can_trace("interrupted_twice") {
        return Ok(());
    }
    let mut fixture = Fixture::start("threads")?;
    fixture.tell("start 1 64")?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    let held = BpfObjects::of_process(session.running().pid())?;
    let running = session.into_running();
    running.signal(libc::SIGINT)?;
    running.signal(libc::SIGINT)?;
    let outcome = running.finish(PATIENCE)?;
    // The first may have been enough by the time that the second came.
    let code = outcome.code()?;
    assert!(code == 0 || code == 128 + libc::SIGINT, "{outcome:?}");
    assert_nothing_left(&held, fixture.pid())?;
    fixture.tell("stop")?;
    Ok(())
}

/// Pairs of malloc and free that the fixture does in a second.
fn speed(fixture: &mut Fixture) -> Result<f64> {
    let result = fixture.ask("run 300")?;
    let number = |key: &str| result[key].as_f64().with_context(|| format!("no {key} in {result}"));
    Ok(number("pairs")? / number("seconds")?)
}

/// A tracer killed with -9 leaves no program, link or breakpoint, and its target runs at full speed again.
#[test]
fn a_killed_tracer_leaves_its_target_at_full_speed() -> Result<()> {
    if !host::can_trace("a_killed_tracer_leaves_its_target_at_full_speed") {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&Program::c("deep").build()?).start()?;
    let before = speed(&mut fixture)?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    let held = BpfObjects::of_process(session.running().pid())?;
    assert!(!held.is_empty());
    let traced = speed(&mut fixture)?;
    session.running().signal(libc::SIGKILL)?;
    drop(session);
    assert_nothing_left(&held, fixture.pid())?;
    let after = speed(&mut fixture)?;
    // A trap makes a pair some fifty times slower; what else the machine does meanwhile, a few times.
    assert!(traced * 10.0 < before, "{before} pairs a second before, {traced} traced: it was not traced");
    assert!(after * 10.0 > before && after > traced * 5.0, "{before} pairs a second, {traced} traced, {after} after");
    Ok(())
}

/// A tracer killed with -9, or told to end a second time, in the middle of removing its probes: they are removed all the same (the
/// kernel gave up on those that were left, and its log said "leaking uprobe").
#[test]
fn a_tracer_killed_while_it_detaches_leaves_nothing() -> Result<()> {
    if !host::can_trace("a_tracer_killed_while_it_detaches_leaves_nothing") {
        return Ok(());
    }
    let fixture = Fixture::start("allocators")?;
    for round in 0..8 {
        let mut session = Session::start(&[fixture.pid()], &[])?;
        let held = BpfObjects::of_process(session.running().pid())?;
        let memory = File::open(format!("/proc/{}/mem", fixture.pid()))?;
        let standing: Vec<(u64, u8)> = host::breakpoint_addresses(fixture.pid())?
            .into_iter()
            .map(|address| Ok((address, byte_at(&memory, address)?)))
            .collect::<Result<_>>()?;
        ensure!(standing.len() > 1, "only {} breakpoints", standing.len());
        session.running().signal(libc::SIGINT)?;
        // All are gone within some 40 ms; when the first one is, the tracer is at it.
        let deadline = Instant::now() + PATIENCE;
        while standing.iter().all(|&(address, byte)| byte_at(&memory, address).is_ok_and(|now| now == byte)) {
            ensure!(Instant::now() < deadline, "no breakpoint was removed");
        }
        session.running().signal(if round % 2 == 0 { libc::SIGKILL } else { libc::SIGINT })?;
        drop(session);
        assert_nothing_left(&held, fixture.pid())?;
    }
    Ok(())
}

fn byte_at(memory: &File, address: u64) -> Result<u8> {
    let mut byte = [0];
    memory.read_exact_at(&mut byte, address).context("failed to read the process's memory")?;
    Ok(byte[0])
}

/// A pseudoterminal: ours, and the one that a program gets.
fn terminal() -> Result<(File, OwnedFd)> {
    let (mut ours, mut theirs) = (-1, -1);
    let size = libc::winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: openpty writes two descriptors and reads the size; name and settings may be null.
    let result = unsafe {
        libc::openpty(&raw mut ours, &raw mut theirs, std::ptr::null_mut(), std::ptr::null(), &raw const size)
    };
    ensure!(result == 0, "failed to open a pseudoterminal: {}", std::io::Error::last_os_error());
    // SAFETY: both are fresh descriptors that nobody else owns.
    Ok(unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) })
}

/// Everything that can be read of a terminal until its other end is closed.
fn read_terminal(mut terminal: &File) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    // A closed other end is an error here, EIO.
    while let Ok(length @ 1..) = terminal.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..length]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sets the title of a terminal's window, if it gets there; the bell ends it.
const TITLE: &str = "\u{1b}]0;owned\u{7}";

/// Control characters in the names of a process, its program and its files reach neither a pipe nor a terminal.
#[test]
fn control_characters_in_names() -> Result<()> {
    if !host::can_trace("control_characters_in_names") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(format!("{TITLE}\r\u{9b}2J"));
    fs::copy(Program::c("allocators").build()?, &path)?;

    let mut fixture = Fixture::builder(&path).start()?;
    let mut running = Leaktrace::pid(fixture.pid())?.args(["-v", "--interval", "100ms"]).spawn()?;
    // The first report: it is attached.
    running.wait_stdout(|_| true, PATIENCE)?;
    fixture.tell("leak malloc 10 1000")?;
    running.signal(libc::SIGINT)?;
    let outcome = running.finish(PATIENCE)?;
    assert_eq!(outcome.code()?, 0, "{}", outcome.stderr);
    let text = outcome.stdout + &outcome.stderr;
    let control: Vec<char> = text.chars().filter(|c| c.is_control() && *c != '\n').collect();
    assert!(control.is_empty(), "{control:?} in {text:?}");
    assert!(text.contains("owned") && text.contains("by_malloc"), "{text}");

    let (ours, theirs) = terminal()?;
    let mut leaktrace =
        Leaktrace::pid(fixture.pid())?.args(["--interval", "100ms", "--duration", "1s"]).env("TERM", "xterm");
    leaktrace.command().stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
    let mut child = Reaped(leaktrace.command().spawn()?);
    drop(leaktrace);
    ensure!(ours.as_raw_fd() >= 0);
    let shown = read_terminal(&ours);
    assert_eq!(child.0.wait()?.code(), Some(0), "{shown:?}");
    assert!(shown.contains("owned"), "{shown:?}");
    assert!(!shown.contains("\u{1b}]0;"), "{shown:?}");
    assert!(!shown.contains('\u{7}') && !shown.contains('\u{9b}'), "{shown:?}");

    // And in an error about it.
    fixture.kill()?;
    let refused = Leaktrace::new()?.arg("--").arg(&path).args(["x"]).args(["--", "y"]).run(PATIENCE)?;
    assert!(!refused.stderr.contains('\u{1b}'), "{:?}", refused.stderr);
    fs::remove_file(&path)?;
    let refused = Leaktrace::new()?.arg("--").arg(&path).run(PATIENCE)?;
    assert_eq!(refused.code()?, 1);
    assert!(!refused.stderr.contains('\u{1b}') && refused.stderr.contains("owned"), "{:?}", refused.stderr);
    Ok(())
}

/// `leaktrace doctor` finds nothing missing where the tests can trace, and says what it found.
#[test]
fn doctor_is_content_here() -> Result<()> {
    if !host::can_trace("doctor_is_content_here") {
        return Ok(());
    }
    let outcome = run(["doctor"])?;
    assert_eq!(outcome.code()?, 0, "{outcome:?}");
    for word in ["kernel", "BTF", "uprobe"] {
        assert!(outcome.stdout.contains(word), "{word} is not in {}", outcome.stdout);
    }
    Ok(())
}

/// jsonl is one report an interval, each a line, of which only the last is final.
#[test]
fn json_lines_at_each_interval() -> Result<()> {
    if !host::can_trace("json_lines_at_each_interval") {
        return Ok(());
    }
    let fixture = Fixture::start("threads")?;
    let outcome = Leaktrace::pid(fixture.pid())?
        .args(["--format", "jsonl", "--interval", "200ms", "--duration", "1s"])
        .run(PATIENCE)?;
    let reports = outcome.jsonl()?;
    assert!((3..=6).contains(&reports.len()), "{} reports", reports.len());
    let (last, before) = reports.split_last().context("no report")?;
    assert_eq!((&last["final"], &last["ended"]), (&Value::from(true), &Value::from("duration")));
    assert!(before.iter().all(|report| report["final"] == false));
    assert!(reports.iter().all(|report| report["schema"] == "leaktrace.report/1"));
    assert!(reports.is_sorted_by(|a, b| a["duration_s"].as_f64() < b["duration_s"].as_f64()));
    Ok(())
}

//! Processes and threads that fork, exec, end and crash while they are traced, or were never where the host looks.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{
    Fixture, Leaktrace, PATIENCE, Program, Session, has_frame, host, live_in, live_of, site, stacks, summary,
};
use serde_json::Value;

fn no_losses(report: &Value) {
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(report));
}

/// Live bytes and blocks of the heap; the stacks of threads are mappings, which libc keeps for the next thread.
fn heap(report: &Value) -> (u64, u64) {
    let number = |stack: &Value, key: &str| stack[key].as_u64().unwrap_or(0);
    let heap = stacks(report).filter(|stack| stack["resource"] == "heap");
    heap.fold((0, 0), |(bytes, count), stack| {
        (bytes + number(stack, "live_bytes"), count + number(stack, "live_count"))
    })
}

/// A forked child frees and allocates at the same addresses; the parent's account stays as it is.
#[test]
fn a_child_does_not_touch_its_parents_account() -> Result<()> {
    if !host::can_trace("a_child_does_not_touch_its_parents_account") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    // The child frees half of its copies of these.
    for command in ["leak 100 1000", "fork 50 500", "leak 10 10", "child 20 500", "vfork", "reap", "leak 5 7"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    no_losses(&report);
    assert_eq!(live_in(&report, "leak_before"), site(&truth, "leak_before"), "{}", summary(&report));
    assert_eq!(live_of(&report, fixture.pid()).0, 100_135, "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_in_child"), (0, 0), "{}", summary(&report));
    Ok(())
}

/// A child that was there before is traced like any process, also while its parent is: what the parent then frees is its own.
#[test]
fn parent_and_child_side_by_side() -> Result<()> {
    if !host::can_trace("parent_and_child_side_by_side") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    fixture.tell("leak 100 1000")?;
    let child: u32 = fixture.tell("fork 1 500")?.parse()?;
    let session = Session::start(&[fixture.pid(), child], &[])?;
    for command in ["leak 30 100", "child 20 50"] {
        fixture.tell(command)?;
    }
    let report = session.stop()?;
    no_losses(&report);
    assert_eq!(live_of(&report, fixture.pid()), (3000, 30), "{}", summary(&report));
    assert_eq!(live_of(&report, child), (1000, 20), "{}", summary(&report));
    Ok(())
}

/// execve drops what was live and traces the new image under the same pid, twice.
#[test]
fn exec_drops_the_old_and_traces_the_new() -> Result<()> {
    if !host::can_trace("exec_drops_the_old_and_traces_the_new") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let pid = fixture.pid();
    let session = Session::start(&[pid], &[])?;
    fixture.tell("leak 100 1000")?;
    for _ in 0..2 {
        fixture.send("exec")?;
        fixture.wait_ready()?;
        // The libc is the same file, in which the kernel puts the breakpoints as it is mapped.
        ensure!(
            host::wait_until(PATIENCE, || host::breakpoints(pid).is_ok_and(|n| n > 0)),
            "nothing attached after exec"
        );
        fixture.tell("leak 70 700")?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(live_in(&report, "leak_before"), (0, 0), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_after_exec"), site(&truth, "leak_after_exec"), "{}", summary(&report));
    Ok(())
}

/// A plugin that is opened seconds after the trace began, and again after exec, counts to the byte and is named as the culprit,
/// with its file.
#[test]
fn a_plugin_opened_in_the_middle() -> Result<()> {
    if !host::can_trace("a_plugin_opened_in_the_middle") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let plugin = folder.path().join("plugin.so");
    fs::copy(Program::c("plugin_leak").without_frame_pointers().library().build()?, &plugin)?;
    let mut fixture = Fixture::start("lifecycle")?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("leak 10 1000")?;
    for exec in [false, true] {
        if exec {
            fixture.send("exec")?;
            fixture.wait_ready()?;
            ensure!(
                host::wait_until(PATIENCE, || host::breakpoints(fixture.pid()).is_ok_and(|n| n > 0)),
                "nothing attached after exec"
            );
        }
        let from = session.next_report(|_| true, PATIENCE)?["duration_s"].as_f64().context("no duration")?;
        let later = |report: &Value| report["duration_s"].as_f64().is_some_and(|at| at >= from + 5.0);
        session.next_report(later, PATIENCE)?;
        fixture.tell(&format!("open {}", plugin.display()))?;
        // Its first stacks may end at the new code; what is counted is whole.
        fixture.tell("plugin 50 300")?;
        let truth = fixture.report()?;
        let expected = site(&truth, "plugin_leak");
        let whole = |report: &Value| {
            let all: Vec<&Value> = stacks(report).filter(|stack| has_frame(stack, "plugin_leak")).collect();
            all.iter().any(|stack| {
                let frame = &stack["frames"][0];
                frame["function"] == "plugin_leak"
                    && frame["module"].as_str().is_some_and(|module| module.ends_with("plugin.so"))
            }) && live_in(report, "plugin_leak") == expected
        };
        session.next_report(whole, PATIENCE)?;
    }
    let report = session.stop()?;
    assert_eq!(live_in(&report, "leak_before"), (0, 0), "{}", summary(&report));
    assert_eq!(live_in(&report, "plugin_leak"), (15_000, 50), "{}", summary(&report));
    Ok(())
}

/// A thread other than the first calls exec after the first has ended; the trace goes on with the new image.
#[test]
fn exec_by_another_thread() -> Result<()> {
    if !host::can_trace("exec_by_another_thread") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let pid = fixture.pid();
    let mut session = Session::start(&[pid], &[])?;
    fixture.tell("leak 10 1000")?;
    fixture.tell("main_exit")?;
    fixture.tell("leak 10 1000")?;
    fixture.send("exec")?;
    fixture.wait_ready()?;
    // The links have to be made anew here, and nothing outside tells when: what is allocated is seen from then on.
    let mut seen = false;
    for _ in 0..50 {
        fixture.tell("leak 1 700")?;
        let report = session.next_report(|_| true, PATIENCE)?;
        seen = live_in(&report, "leak_after_exec").1 > 0;
        if seen {
            break;
        }
    }
    assert!(seen, "the new image is not traced");
    let report = session.stop()?;
    assert_eq!(live_in(&report, "leak_before"), (0, 0), "{}", summary(&report));
    Ok(())
}

/// A process whose first thread has ended is attached to and traced like any other, exactly and with names; and it has ended only
/// when its other threads have (it was said to have exited).
#[test]
fn the_first_thread_ended_before_tracing() -> Result<()> {
    if !host::can_trace("the_first_thread_ended_before_tracing") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    fixture.tell("main_exit")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    for command in ["leak 100 1000", "threads 20 64"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    fixture.send("exit 0")?;
    fixture.wait()?;
    let report = session.finish()?;
    no_losses(&report);
    assert_eq!(report["ended"], "targets_exited");
    for function in ["leak_before", "leak_in_thread"] {
        assert_eq!(live_in(&report, function), site(&truth, function), "{}", summary(&report));
    }
    assert_eq!(live_in(&report, "balanced_in_thread"), (0, 0), "{}", summary(&report));
    assert!(report["processes"][0]["rss"]["last_bytes"].as_u64() > Some(0), "{}", report["processes"][0]["rss"]);
    Ok(())
}

/// The first thread of a traced process ends, and the next one too; then another user of the same libc's probes goes. The probes of
/// the process stay (the kernel removed them, silently).
#[test]
fn the_first_thread_ends_and_other_probes_go() -> Result<()> {
    if !host::can_trace("the_first_thread_ends_and_other_probes_go") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let pid = fixture.pid();
    let mut session = Session::start(&[pid], &[])?;
    fixture.tell("leak 10 1000")?;
    // The thread that took over at the first of them hands over in turn at the second.
    for left in 1..=2 {
        let other = Fixture::start("lifecycle")?;
        let others = Session::start(&[other.pid()], &[])?;
        fixture.tell("main_exit")?;
        // Followed within a tick of the tracer; its reports come less often.
        for _ in 0..3 {
            session.next_report(|_| true, PATIENCE)?;
        }
        let before = host::breakpoints(living_thread(pid)?)?;
        others.stop()?;
        let after = host::breakpoints(living_thread(pid)?)?;
        assert!(before > 0 && after == before, "{before} breakpoints before, {after} after, at end {left}");
        fixture.tell("threads 20 64")?;
        fixture.tell("leak 10 1000")?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    no_losses(&report);
    for function in ["leak_before", "leak_in_thread"] {
        assert_eq!(live_in(&report, function), site(&truth, function), "{}", summary(&report));
    }
    assert_eq!(live_in(&report, "balanced_in_thread"), (0, 0), "{}", summary(&report));
    Ok(())
}

/// The same without time to follow: either the probes are still there, or the report says that they were dropped, and what was live
/// then is in no verdict.
#[test]
fn probes_dropped_by_the_kernel_are_reported() -> Result<()> {
    if !host::can_trace("probes_dropped_by_the_kernel_are_reported") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let other = Fixture::start("lifecycle")?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    let others = Session::start(&[other.pid()], &[])?;
    fixture.tell("leak 10 1000")?;
    // Stopped, the tracer cannot follow until the other one is gone.
    session.running().signal(libc::SIGSTOP)?;
    fixture.tell("main_exit")?;
    others.stop()?;
    let dropped = host::breakpoints(living_thread(fixture.pid())?)? == 0;
    fixture.tell("leak 10 1000")?;
    session.running().signal(libc::SIGCONT)?;
    ensure!(dropped, "the kernel kept the breakpoints of a process whose first thread has ended: nothing to test");
    let seen = session.next_report(|report| report["losses"]["probes_dropped_by_kernel"] == 1, PATIENCE)?;
    assert_eq!(live_in(&seen, "leak_before"), (0, 0), "{}", summary(&seen));
    assert!(seen["losses"]["distrusted_bytes"].as_u64() >= Some(10_000), "{}", summary(&seen));
    // From here on it is seen again.
    fixture.tell("leak 7 100")?;
    let report = session.stop()?;
    assert_eq!(live_in(&report, "leak_before"), (700, 7), "{}", summary(&report));
    Ok(())
}

/// A thread of the process that has not ended.
fn living_thread(pid: u32) -> Result<u32> {
    let mut living = None;
    host::wait_until(PATIENCE, || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let mut tids: Vec<u32> = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect();
        // Other than the first one, which is about to be a zombie where this is asked.
        tids.retain(|&tid| tid != pid && fs::read(format!("/proc/{tid}/maps")).is_ok_and(|maps| !maps.is_empty()));
        living = tids.last().copied();
        tids.len() == 1
    });
    living.context("no thread lives")
}

/// Hundreds of threads that start, leave a block, free another and end, one by one and at once, lose nothing.
#[test]
fn threads_in_bulk() -> Result<()> {
    if !host::can_trace("threads_in_bulk") {
        return Ok(());
    }
    let mut fixture = Fixture::start("lifecycle")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    for command in ["threads 500 64", "bulk 300 32", "bulk 300 16"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    no_losses(&report);
    assert_eq!(live_in(&report, "leak_in_thread"), site(&truth, "leak_in_thread"), "{}", summary(&report));
    assert_eq!(live_in(&report, "balanced_in_thread"), (0, 0), "{}", summary(&report));
    Ok(())
}

/// When the process exits or crashes under the trace, the report comes at once, with what was live and the names.
#[test]
fn the_report_comes_when_the_process_ends() -> Result<()> {
    if !host::can_trace("the_report_comes_when_the_process_ends") {
        return Ok(());
    }
    for end in ["exit 3", "crash"] {
        let mut fixture = Fixture::start("lifecycle")?;
        let session = Session::start(&[fixture.pid()], &[])?;
        fixture.tell("leak 100 1000")?;
        fixture.send(end)?;
        fixture.wait()?;
        let report = session.finish()?;
        no_losses(&report);
        assert_eq!(report["ended"], "targets_exited", "after {end}");
        assert_eq!(live_in(&report, "leak_before"), (100_000, 100), "after {end}\n{}", summary(&report));
        let end_s = report["processes"][0]["ended"]["at_s"].as_f64().context("when it ended")?;
        assert!(end_s >= 0.0 && end_s <= report["duration_s"].as_f64().unwrap_or(0.0), "{end_s}");
    }
    Ok(())
}

/// Of two processes one ends: the trace goes on with the other.
#[test]
fn one_of_two_ends() -> Result<()> {
    if !host::can_trace("one_of_two_ends") {
        return Ok(());
    }
    let (mut first, mut second) = (Fixture::start("lifecycle")?, Fixture::start("lifecycle")?);
    let mut session = Session::start(&[first.pid(), second.pid()], &[])?;
    first.tell("leak 10 100")?;
    first.send("exit 0")?;
    first.wait()?;
    let ended =
        |report: &Value| report["processes"].as_array().is_some_and(|all| all.iter().any(|p| !p["ended"].is_null()));
    session.next_report(ended, PATIENCE)?;
    second.tell("leak 20 100")?;
    let report = session.stop()?;
    no_losses(&report);
    assert_eq!(live_of(&report, first.pid()), (1000, 10), "{}", summary(&report));
    assert_eq!(live_of(&report, second.pid()), (2000, 20), "{}", summary(&report));
    Ok(())
}

/// A process killed at any moment from before to after attaching: a report, or an error that names the pid; never a hang.
#[test]
fn ending_while_it_is_attached_to() -> Result<()> {
    if !host::can_trace("ending_while_it_is_attached_to") {
        return Ok(());
    }
    let (mut reports, mut errors) = (0, 0);
    for delay_ms in [0, 5, 10, 20, 30, 40, 60, 80, 120] {
        let mut fixture = Fixture::start("lifecycle")?;
        let pid = fixture.pid();
        let running = Leaktrace::pid(pid)?.args(["--format", "json"]).spawn()?;
        // Not a wait for something: the moment is what is varied.
        thread::sleep(Duration::from_millis(delay_ms));
        fixture.kill()?;
        let outcome = running.finish(PATIENCE)?;
        match outcome.code()? {
            0 => {
                let report = outcome.json()?;
                assert_eq!(report["ended"], "targets_exited", "{delay_ms} ms");
                assert_eq!(report["processes"][0]["pid"], pid, "{delay_ms} ms");
                reports += 1;
            }
            1 => {
                assert!(outcome.stderr.contains(&pid.to_string()), "{delay_ms} ms: {:?}", outcome.stderr);
                assert_eq!(outcome.stdout, "", "{delay_ms} ms");
                errors += 1;
            }
            code => panic!("{delay_ms} ms: exit status {code}: {}", outcome.stderr),
        }
    }
    eprintln!("{reports} reports, {errors} errors");
    Ok(())
}

/// A program whose file is deleted while it runs still gets its functions' names.
#[test]
fn a_deleted_program_keeps_its_names() -> Result<()> {
    if !host::can_trace("a_deleted_program_keeps_its_names") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("deleted");
    fs::copy(Program::c("allocators").build()?, &program)?;
    let mut fixture = Fixture::builder(&program).start()?;
    fs::remove_file(&program)?;
    let session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("leak malloc 10 100")?;
    let report = session.stop()?;
    assert_eq!(live_in(&report, "leak_via_malloc"), (1000, 10), "{}", summary(&report));
    Ok(())
}

/// A process in a root of its own, with a libc that is a copy at the same path: found through the process, not by the host's path.
#[test]
fn a_process_in_another_root() -> Result<()> {
    if !host::can_trace("a_process_in_another_root") {
        return Ok(());
    }
    let root = tempfile::tempdir()?;
    let program = Program::c("allocators").build()?;
    host::copy_libraries(&program, root.path())?;
    fs::copy(&program, root.path().join("program"))?;
    let path = root.path().to_owned();
    let mut builder = Fixture::builder(Path::new("/program"));
    let enter = move || {
        std::os::unix::fs::chroot(&path)?;
        std::env::set_current_dir("/")
    };
    // SAFETY: between fork and exec only chroot(2) and chdir(2) are called, on paths that are made before.
    unsafe { builder.command().pre_exec(enter) };
    let mut fixture = builder.start()?;
    let session = Session::start(&[fixture.pid()], &[])?;
    for command in ["leak malloc 10 100", "leak calloc 5 50", "churn malloc 100 10"] {
        fixture.tell(command)?;
    }
    let report = session.stop()?;
    no_losses(&report);
    assert_eq!(heap(&report), (1250, 15), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_via_malloc"), (1000, 10), "{}", summary(&report));
    assert!(stacks(&report).all(|stack| has_frame(stack, "main")), "{}", summary(&report));
    Ok(())
}

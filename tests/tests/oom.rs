//! A real memory limit, and a real end by the OOM killer.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::cgroup::MemoryGroup;
use leaktrace_tests::{Fixture, Leaktrace, Program, Session, has_frame, host, patience, stacks, summary};
use serde_json::Value;

const LIMIT: u64 = 48 << 20;

/// A group with little memory, and a leak in it that has filled it after a quarter of a minute.
fn doomed(test: &str, program: &std::path::Path) -> Result<Option<(MemoryGroup, Fixture)>> {
    if !host::can_trace(test) {
        return Ok(None);
    }
    let Some(group) = MemoryGroup::new(LIMIT) else {
        host::skip(test, "no memory cgroup can be made");
        return Ok(None);
    };
    let mut builder = Fixture::builder(program).arg("--rate").arg("3000000").arg("--block").arg("512");
    group.enter(builder.command());
    // Bound in this order the group is dropped last, and can be removed then.
    Ok(Some((group, builder.start()?)))
}

/// How a process was killed, once a report says so.
fn kill(report: &Value, pid: u32) -> Option<&Value> {
    report["oom_kills"].as_array()?.iter().find(|kill| kill["pid"] == pid)
}

/// Of a traced process the reports say whose limit it will meet and when; the OOM killer then takes it, and the last report has what was
/// known of it by then: its call stacks, how large it was, and that it was this.
#[test]
fn killed_while_traced() -> Result<()> {
    let program = Program::c("leak_slow").build()?;
    let Some((group, fixture)) = doomed("killed_while_traced", &program)? else { return Ok(()) };
    let pid = fixture.pid();
    let mut session = Session::start(&[pid], &["--interval", "500ms"])?;
    let nears = |report: &Value| report["processes"][0]["seconds_to_limit"].is_number();
    let report = session.next_report(nears, patience())?;
    let process = &report["processes"][0];
    eprintln!("at {}: {} s", report["duration_s"], process["seconds_to_limit"]);
    ensure!(process["memory_limit_bytes"] == LIMIT, "{}", process["memory_limit_bytes"]);
    let of = process["memory_limit_of"].as_str().context("no group")?;
    ensure!(of.ends_with(&format!("/{}", group.name())), "{of}");
    let used = process["memory_used_bytes"].as_u64().context("nothing is said of what is used")?;
    let resident = process["rss"]["last_bytes"].as_u64().context("no resident set")?;
    // The files that it has mapped are not charged to it, or could be dropped; what it has for itself is.
    ensure!(used > resident / 2 && used <= LIMIT, "{used} of {resident}");
    let seconds = process["seconds_to_limit"].as_f64().context("no time")?;
    ensure!(seconds < 120.0, "{seconds}");
    let report = session.finish()?;
    let kill =
        kill(&report, pid).with_context(|| format!("not told: {}\n{}", report["oom_kills"], summary(&report)))?;
    ensure!(kill["comm"] == "leak_slow" && kill["process"]["ended"]["signal"] == libc::SIGKILL, "{kill}");
    let last = kill["rss"]["last_bytes"].as_u64().context("no resident set")?;
    ensure!(last > LIMIT / 2, "{last}");
    let named = serde_json::json!({ "processes": [kill["process"]] });
    let leak = stacks(&named).find(|stack| has_frame(stack, "leak_block")).context("its stack is not there")?;
    ensure!(leak["live_bytes"].as_u64() > Some(10 << 20), "{}", leak["live_bytes"]);
    Ok(())
}

/// A process that is watched from afar is told of too, with what is known of such.
#[test]
fn killed_while_watched() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("doomed");
    fs::copy(Program::c("leak_slow").build()?, &program)?;
    let Some((_group, fixture)) = doomed("killed_while_watched", &program)? else { return Ok(()) };
    let pid = fixture.pid();
    let selection = format!("{}/*", folder.path().display());
    let mut running =
        Leaktrace::new()?.args(["--exe", &selection, "--format", "jsonl", "--interval", "500ms"]).spawn()?;
    let told = |line: &str| serde_json::from_str(line).is_ok_and(|report: Value| kill(&report, pid).is_some());
    let line = running.wait_stdout(told, patience() * 2)?;
    let report: Value = serde_json::from_str(&line)?;
    let killed = kill(&report, pid).context("not told")?;
    ensure!(killed["comm"] == "doomed" && killed["rss"]["last_bytes"].as_u64() > Some(10 << 20), "{killed}");
    ensure!(killed["exe"].as_str().is_some_and(|exe| exe.ends_with("/doomed")), "{killed}");
    running.signal(libc::SIGINT)?;
    let outcome = running.finish(patience())?;
    ensure!(outcome.code()? == 0, "{}", outcome.stderr);
    let last = outcome.jsonl()?.pop().context("no final report")?;
    let kills = last["oom_kills"].as_array().map_or(0, Vec::len);
    ensure!(kills == 1, "told {kills} times");
    Ok(())
}

/// A process that is killed otherwise is no victim.
#[test]
fn killed_otherwise() -> Result<()> {
    if !host::can_trace("killed_otherwise") {
        return Ok(());
    }
    let fixture = Fixture::builder(&Program::c("leak_slow").build()?).start()?;
    let session = Session::start(&[fixture.pid()], &[])?;
    // SAFETY: a signal to our own child.
    ensure!(unsafe { libc::kill(libc::pid_t::try_from(fixture.pid())?, libc::SIGKILL) } == 0);
    let report = session.finish()?;
    ensure!(report["oom_kills"] == serde_json::json!([]), "{}", report["oom_kills"]);
    Ok(())
}

//! The fixtures by themselves: what they say of themselves must be true before anything is compared with it.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;

use anyhow::{Context as _, Result};
use leaktrace_tests::{Fixture, Program, host};
use serde_json::Value;

/// Live bytes and blocks that a fixture's report gives for one of its functions.
fn site(report: &Value, function: &str) -> (u64, u64) {
    let site = &report["sites"][function];
    (site["live_bytes"].as_u64().unwrap_or(0), site["live_count"].as_u64().unwrap_or(0))
}

/// Every allocation function does what its command says, and the failing calls do fail.
#[test]
fn allocators_know_what_they_did() -> Result<()> {
    let mut fixture = Fixture::start("allocators")?;
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
    for via in vias {
        fixture.tell(&format!("leak {via} 10 100"))?;
        fixture.tell(&format!("churn {via} 10 100"))?;
        fixture.tell(&format!("release {via} 4"))?;
    }
    for command in ["fail 3", "keep 2 50", "grow 3 10 1000", "shrink 2 4096 100", "to_zero 3 10", "from_null 3 11"] {
        fixture.tell(command)?;
    }
    let report = fixture.report()?;
    for via in vias {
        assert_eq!(site(&report, &format!("leak_via_{via}")), (600, 6));
        assert_eq!(site(&report, &format!("balanced_via_{via}")), (0, 0));
    }
    assert_eq!(site(&report, "keep_over_failed_realloc"), (100, 2));
    assert_eq!(site(&report, "realloc_grow"), (3 * 1280, 3));
    assert_eq!(site(&report, "realloc_shrink"), (2 * 64, 2));
    assert_eq!(site(&report, "realloc_to_zero"), (0, 0));
    assert_eq!(site(&report, "realloc_from_null"), (33, 3));
    assert!(fixture.tell("leak nothing 1 1").is_err(), "an unknown command must be an error");
    assert!(fixture.finish()?.success());
    Ok(())
}

/// Blocks that change hands are counted on both threads.
#[test]
fn threads_know_what_they_did() -> Result<()> {
    let mut fixture = Fixture::start("threads")?;
    for command in ["handoff 100 10", "handoff_leak 100 10 10", "churn 3 100 16", "leak 3 5 7", "start 2 32"] {
        fixture.tell(command)?;
    }
    let churned: u64 = fixture.tell("stop")?.parse()?;
    assert!(churned >= 300, "{churned} blocks were churned");
    let report = fixture.report()?;
    assert_eq!(site(&report, "produce"), (0, 0));
    assert_eq!(site(&report, "produce_some_kept"), (100, 10));
    assert_eq!(site(&report, "churn_block"), (0, 0));
    assert_eq!(site(&report, "leak_in_thread"), (105, 15));
    Ok(())
}

/// The kernel's own count of the program's anonymous address space grows by exactly what the fixture claims.
#[test]
fn mappings_agree_with_the_kernel() -> Result<()> {
    let mut fixture = Fixture::start("mappings")?;
    let mapped = |fixture: &Fixture| -> Result<u64> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", fixture.pid()))?;
        let mut bytes = 0;
        for line in maps.lines() {
            let (range, _) = line.split_once(' ').context("no range")?;
            let (start, end) = range.split_once('-').context("no end")?;
            bytes += u64::from_str_radix(end, 16)? - u64::from_str_radix(start, 16)?;
        }
        Ok(bytes)
    };
    let before = mapped(&fixture)?;
    let commands = [
        "anon 3 4",
        "file 2 1",
        "churn 10 2",
        "cut head",
        "cut tail",
        "cut middle",
        "several",
        "over",
        "grow",
        "move",
        "shrink",
        "fail",
        "brk 4",
        "unbrk 1",
        "refuse 3",
    ];
    for command in commands {
        fixture.tell(command)?;
    }
    let report = fixture.report()?;
    let claimed: u64 = ["anon_bytes", "file_bytes", "brk_bytes"].iter().filter_map(|key| report[key].as_u64()).sum();
    assert_eq!(mapped(&fixture)? - before, claimed, "{report}");
    Ok(())
}

/// Forks, threads, exec and exit; the pid stays over exec and the truth starts anew.
#[test]
fn lifecycle_goes_through_all_of_it() -> Result<()> {
    let mut fixture = Fixture::start("lifecycle")?;
    let pid = fixture.pid();
    fixture.tell("leak 10 100")?;
    let child: u32 = fixture.tell("fork 5 10")?.parse()?;
    assert!(fs::metadata(format!("/proc/{child}")).is_ok(), "the child {child} should be alive");
    for command in ["child 2 10", "reap", "vfork", "threads 5 10", "bulk 20 10"] {
        fixture.tell(command)?;
    }
    let report = fixture.report()?;
    assert_eq!(site(&report, "leak_before"), (1000, 10));
    assert_eq!(site(&report, "leak_in_child"), (70, 7));
    assert_eq!(site(&report, "leak_in_thread"), (250, 25));

    fixture.send("exec")?;
    fixture.wait_ready()?;
    assert_eq!(fixture.pid(), pid);
    assert_eq!(fixture.tell("generation")?, "1");
    fixture.tell("leak 3 5")?;
    fixture.tell("main_exit")?;
    assert_eq!(site(&fixture.report()?, "leak_after_exec"), (15, 3));
    fixture.send("exit 3")?;
    assert_eq!(fixture.wait()?.code(), Some(3));
    Ok(())
}

/// A crash is seen as the signal that it is.
#[test]
fn lifecycle_crashes_on_command() -> Result<()> {
    let mut fixture = Fixture::start("lifecycle")?;
    fixture.send("crash")?;
    assert_eq!(fixture.wait()?.signal(), Some(libc::SIGSEGV));
    Ok(())
}

/// Each way to leave an allocation call early does leave it, and the program goes on.
#[test]
fn throw_leaves_and_goes_on() -> Result<()> {
    if host::program("throw_leaves_and_goes_on", "c++").is_none() {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&Program::cpp("throw").build()?).start()?;
    for command in ["throw_new 3", "throw_array 3", "throw_handler 3", "throw_constructor 3", "throw_deep 3 20"] {
        fixture.tell(command)?;
    }
    if cfg!(target_arch = "x86_64") {
        fixture.tell("abandon 5")?;
    }
    fixture.tell("leak 3 100")?;
    assert_eq!(site(&fixture.report()?, "leak_via_new"), (300, 3));
    Ok(())
}

/// The paced leak keeps its rate, stops on command, and a filling cache fills to its size.
#[test]
fn leak_slow_keeps_its_rate() -> Result<()> {
    let program = Program::c("leak_slow").build()?;
    let arguments =
        ["--rate", "1000000", "--block", "100", "--cache-mb", "1", "--churn-threads", "1", "--churn-rate", "1000"];
    let mut fixture = arguments.iter().fold(Fixture::builder(&program), leaktrace_tests::Builder::arg).start()?;
    fixture.tell("fill 409600 0")?;
    fixture.tell("spike 100000")?;
    let leaked = |fixture: &mut Fixture| Ok::<_, anyhow::Error>(site(&fixture.report()?, "leak_block").0);
    assert!(host::wait_until(leaktrace_tests::PATIENCE, || leaked(&mut fixture).is_ok_and(|bytes| bytes > 100_000)));
    fixture.tell("rate 0")?;
    assert!(
        host::wait_until(leaktrace_tests::PATIENCE, || {
            // Two reports with a tick of the fixture between them.
            let before = leaked(&mut fixture).unwrap_or(0);
            std::thread::sleep(std::time::Duration::from_millis(50));
            leaked(&mut fixture).is_ok_and(|after| after == before)
        }),
        "the leak should stop"
    );
    let report = fixture.report()?;
    assert_eq!(site(&report, "fill_cache"), (409_600, 100));
    assert_eq!(site(&report, "spike_up"), (0, 0));
    assert_eq!(site(&report, "cache_replace").0, 1_000_000 / 1024 * 1024);
    Ok(())
}

/// The bench's target counts pairs at the depth that it was asked for.
#[test]
fn deep_counts_its_pairs() -> Result<()> {
    let mut fixture =
        Fixture::builder(&Program::c("deep").build()?).arg("--frames").arg("30").arg("--threads").arg("2").start()?;
    let result = fixture.ask("run 50")?;
    assert_eq!((&result["frames"], &result["threads"]), (&Value::from(30), &Value::from(2)));
    assert!(result["pairs"].as_u64().is_some_and(|pairs| pairs > 1000), "{result}");
    assert!(result["seconds"].as_f64().is_some_and(|seconds| seconds >= 0.05), "{result}");
    Ok(())
}

/// The demo forgets sessions, and says how many and when.
#[test]
fn demo_forgets_its_sessions() -> Result<()> {
    let mut fixture = Fixture::start("demo")?;
    assert!(host::wait_until(leaktrace_tests::PATIENCE, || {
        fixture.report().is_ok_and(|report| site(&report, "session_remember").1 >= 20)
    }));
    let (bytes, count) = site(&fixture.report()?, "session_remember");
    assert_eq!(bytes, count * 1000);
    let history = fixture.ask("history")?;
    let entries = history["at_ms"].as_array().context("no history")?;
    assert_eq!(history["bytes_per_entry"], 20_000);
    assert!(entries.len() as u64 >= count / 20 && entries.is_sorted_by_key(Value::as_u64), "{history}");
    assert!(fixture.finish()?.success(), "it should end with its input");
    Ok(())
}

/// A fixture is ended by its drop.
#[test]
fn a_dropped_fixture_is_gone() -> Result<()> {
    let fixture = Fixture::start("threads")?;
    let process = format!("/proc/{}", fixture.pid());
    assert!(fs::metadata(&process).is_ok());
    drop(fixture);
    assert!(fs::metadata(&process).is_err(), "{process} is still there");
    Ok(())
}

/// Nothing has put a breakpoint into a fresh process, and its own pages are not taken for some.
#[test]
fn an_untraced_process_has_no_breakpoints() -> Result<()> {
    let fixture = Fixture::start("threads")?;
    assert_eq!(host::breakpoints(fixture.pid())?, 0);
    Ok(())
}

//! What older kernels lack is taken away from this one, and the result must be as exact: each way around it is then tested on any
//! host, and not only where such a kernel runs.

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::host::can_trace;
use leaktrace_tests::{Fixture, Program, Session, live_in, live_of, site, stacks, summary};

/// `--without` values: links, the ring and the loops of a 5.10 kernel, plain tracepoints, and two in between.
const LESS: [&str; 4] = ["session", "multi", "multi,loop", "types"];

/// Sizes, addresses and counts of allocator calls, and whole stacks, of a program that was built without frame pointers.
#[test]
fn allocations_are_exact() -> Result<()> {
    if !can_trace("allocations_are_exact") {
        return Ok(());
    }
    for without in LESS {
        let mut fixture = Fixture::builder(&Program::c("allocators").without_frame_pointers().build()?).start()?;
        let session = Session::start(&[fixture.pid()], &["--without", without])?;
        for command in [
            "leak malloc 21 1001",
            "churn calloc 300 77",
            "leak posix_memalign 9 640",
            "grow 11 100 30000",
            "release malloc 8",
        ] {
            fixture.tell(command)?;
        }
        let truth = fixture.report()?;
        let report = session.stop()?;
        let told = || format!("without {without}\n{}", summary(&report));
        ensure!(report["losses"] == serde_json::json!({}), "something was lost {}", told());
        ensure!(live_in(&report, "leak_via_malloc") == (13 * 1001, 13), "{}", told());
        ensure!(live_in(&report, "leak_via_posix_memalign") == (9 * 640, 9), "{}", told());
        let expected = (truth["live_bytes"].as_u64(), truth["live_count"].as_u64());
        let found = live_of(&report, fixture.pid());
        ensure!((Some(found.0), Some(found.1)) == expected, "{found:?} live, not {expected:?} {}", told());
        let incomplete = stacks(&report).find(|stack| stack["complete"] != true);
        ensure!(incomplete.is_none(), "a stack ends early {}", told());
    }
    Ok(())
}

/// Where a program that has functions cannot be followed by another (arm64 before 6.0), stacks are walked by plain loops, and by
/// frame pointers even if tables are asked for: the report says so, and names whoever called each allocator function.
#[test]
fn allocations_are_exact_without_tail_calls() -> Result<()> {
    if !can_trace("allocations_are_exact_without_tail_calls") {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&Program::c("allocators").build()?).start()?;
    let session = Session::start(&[fixture.pid()], &["--without", "multi,loop,tail-calls"])?;
    for command in ["leak malloc 21 1001", "leak posix_memalign 9 640", "churn calloc 300 77", "grow 11 100 30000"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    ensure!(report["mode"]["unwinder"] == "fp", "{}", report["mode"]);
    ensure!(report["losses"] == serde_json::json!({}), "something was lost {}", summary(&report));
    let sites = truth["sites"].as_object().context("the fixture names no sites")?;
    ensure!(sites.len() >= 4, "the fixture did too little");
    for function in sites.keys() {
        let (expected, found) = (site(&truth, function), live_in(&report, function));
        ensure!(found == expected, "{function} {found:?}, not {expected:?}\n{}", summary(&report));
    }
    Ok(())
}

/// Mapped bytes, whichever way the system calls are watched.
#[test]
fn mappings_are_exact() -> Result<()> {
    if !can_trace("mappings_are_exact") {
        return Ok(());
    }
    for without in LESS {
        let mut fixture = Fixture::start("mappings")?;
        let session = Session::start(&[fixture.pid()], &["--without", without, "--resource", "mmap"])?;
        for command in ["anon 7 3", "churn 20 4", "cut middle", "over", "grow", "move", "fail", "brk 9"] {
            fixture.tell(command)?;
        }
        let truth = fixture.report()?;
        let report = session.stop()?;
        let sites = truth["sites"].as_object().context("the fixture names no sites")?;
        ensure!(sites.values().any(|site| site["live_bytes"].as_u64() > Some(0)), "the fixture mapped nothing");
        for function in sites.keys() {
            let (expected, found) = (site(&truth, function).0, live_in(&report, function).0);
            ensure!(found == expected, "without {without}: {function} {found}, not {expected}\n{}", summary(&report));
        }
    }
    Ok(())
}

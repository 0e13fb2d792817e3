//! Sampled allocations with real probes: estimates against what each fixture knows of itself. Whoever samples is off by chance; five
//! standard deviations, which are computed from what the fixture did, are met by chance once in two million.

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::host::{breakpoints, can_trace, wait_until};
use leaktrace_tests::{Fixture, Program, Session, has_frame, only, patience, site, stacks, summary};
use serde_json::Value;

/// Ways to attach: the best, and one of older kernels. With links for single places detaching alone takes seconds.
const KINDS: [&str; 2] = ["", "session"];

/// The standard deviation of an estimate of `count` blocks of `size` bytes, in bytes, with this mean between samples.
fn deviation(interval: f64, count: u64, size: u64) -> f64 {
    let probability = -(-(size as f64) / interval).exp_m1();
    (count as f64 * (1.0 - probability) / probability).sqrt() * size as f64
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// The sum of a number over the heap's stacks that go through a function.
fn sum(report: &Value, function: &str, key: &str) -> f64 {
    stacks(report)
        .filter(|stack| stack["resource"] == "heap" && has_frame(stack, function))
        .map(|stack| number(&stack[key]))
        .sum()
}

/// Within five standard deviations.
fn ensure_estimate(report: &Value, function: &str, key: &str, truth: f64, sigma: f64) -> Result<()> {
    let estimate = sum(report, function, key);
    ensure!(
        (estimate - truth).abs() <= 5.0 * sigma + 1.0,
        "{function}: {key} estimated {estimate}, is {truth}, standard deviation {sigma}\n{}",
        summary(report)
    );
    Ok(())
}

fn without(kind: &str) -> Vec<&str> {
    if kind.is_empty() { Vec::new() } else { vec!["--without", kind] }
}

/// Live and allocated bytes and blocks of one size a site, over every kind of function, also where blocks are released again or given
/// to realloc; and nothing of what the allocator maps for itself.
#[test]
fn estimates_are_right() -> Result<()> {
    if !can_trace("estimates_are_right") {
        return Ok(());
    }
    let interval = 4096.0;
    for kind in KINDS.into_iter().chain(["multi,loop"]) {
        let mut fixture = Fixture::start("allocators")?;
        let session = Session::start(&[fixture.pid()], &[&["--sample", "4K"][..], &without(kind)].concat())?;
        for command in [
            "leak malloc 9000 300",
            "leak calloc 4000 1000",
            "leak posix_memalign 4000 640",
            "leak aligned_alloc 3000 640",
            "from_null 5000 500",
            "grow 2000 100 3000",
            "shrink 2000 3000 200",
            "keep 2000 700",
            "churn malloc 9000 300",
            "churn realloc 9000 200",
            "to_zero 2000 400",
            "release malloc 4000",
        ] {
            fixture.tell(command)?;
        }
        let truth = fixture.report()?;
        let report = session.stop()?;
        ensure!(report["losses"] == serde_json::json!({}), "something was lost\n{}", summary(&report));
        ensure!(
            report["mode"]["sampling"] == "bytes" && report["mode"]["interval_bytes"] == 4096,
            "{}",
            report["mode"]
        );
        ensure!(report["processes"][0]["interval_bytes"] == 4096, "{}", summary(&report));
        let sites = truth["sites"].as_object().context("the fixture names no sites")?;
        ensure!(sites.len() >= 9, "the fixture did too little");
        let mut live = (0.0, 0.0);
        for function in sites.keys().filter(|function| !function.contains("zero")) {
            let (bytes, count) = site(&truth, function);
            // Every block of a site has one size in the end.
            let sigma = if count == 0 { 0.0 } else { deviation(interval, count, bytes / count) };
            ensure_estimate(&report, function, "live_bytes", bytes as f64, sigma)
                .with_context(|| format!("without {kind:?}"))?;
            let of_count = if count == 0 { 0.0 } else { sigma * count as f64 / bytes as f64 };
            ensure_estimate(&report, function, "live_count", count as f64, of_count)?;
            live.0 += bytes as f64;
            live.1 += sigma * sigma;
        }
        let sigma = deviation(interval, 9000, 300);
        for key in ["allocated_bytes", "freed_bytes"] {
            ensure_estimate(&report, "balanced_via_malloc", key, 2_700_000.0, sigma)?;
        }
        let process = &report["processes"][0];
        let off = (number(&process["live_bytes"]) - live.0).abs();
        ensure!(off <= 5.0 * f64::sqrt(live.1) + 1.0, "all live off by {off}\n{}", summary(&report));
        let [low, high] = [0, 1].map(|end| number(&process["live_bytes_ci95"][end]));
        let width = (high - low) / (2.0 * 1.96 * f64::sqrt(live.1));
        ensure!((0.7..1.4).contains(&width), "the interval is {width} times as wide as it should be");
        // The break and mappings are the allocator's, of calls that are not sampled as well.
        let mapped: f64 =
            stacks(&report).filter(|stack| stack["resource"] == "mmap").map(|s| number(&s["live_bytes"])).sum();
        ensure!(mapped == 0.0, "{mapped} bytes mapped\n{}", summary(&report));
    }
    Ok(())
}

/// Large blocks, which allocators map one by one, are sampled for sure, and what is mapped for them is nobody's.
#[test]
fn large_blocks_are_certain() -> Result<()> {
    if !can_trace("large_blocks_are_certain") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let session = Session::start(&[fixture.pid()], &["--sample", "4K"])?;
    fixture.tell("leak malloc 40 300000")?;
    let report = session.stop()?;
    let found = (sum(&report, "leak_via_malloc", "live_bytes"), sum(&report, "leak_via_malloc", "live_count"));
    ensure!(found == (12_000_000.0, 40.0), "{found:?}\n{}", summary(&report));
    ensure!(stacks(&report).all(|stack| stack["resource"] == "heap"), "{}", summary(&report));
    Ok(())
}

/// A call made inside one that is not sampled is not drawn for a second time (it doubled the bytes of all that came by an allocator that
/// stands on another).
#[test]
fn nested_calls_are_drawn_once() -> Result<()> {
    if !can_trace("nested_calls_are_drawn_once") {
        return Ok(());
    }
    let program = Program::c("nested").build()?;
    let named = format!("{}:own_", program.display());
    for kind in KINDS {
        let mut fixture = Fixture::builder(&program).start()?;
        let args = [&["--sample", "1K", "--allocator", &named][..], &without(kind)].concat();
        let session = Session::start(&[fixture.pid()], &args)?;
        // The function that is not nested comes first, so that it is known to be one when the other begins.
        for command in ["plain 20000 64", "leak 20000 64", "churn 20000 64", "plain 20000 64"] {
            fixture.tell(command)?;
        }
        let report = session.stop()?;
        let sigma = deviation(1024.0, 20_000, 64);
        for (function, key, times) in [
            ("leak_by_own", "live_bytes", 1.0_f64),
            ("leak_by_own", "allocated_bytes", 1.0),
            ("churn_by_own", "allocated_bytes", 1.0),
            ("churn_by_own", "freed_bytes", 1.0),
            ("leak_by_malloc", "live_bytes", 2.0),
        ] {
            ensure_estimate(&report, function, key, times * 1_280_000.0, times.sqrt() * sigma)
                .with_context(|| format!("without {kind:?}"))?;
        }
        ensure!(sum(&report, "churn_by_own", "live_bytes") == 0.0, "{}", summary(&report));
    }
    Ok(())
}

/// Blocks that one thread allocates and another frees, and threads that come and go.
#[test]
fn threads() -> Result<()> {
    if !can_trace("threads") {
        return Ok(());
    }
    let interval = 1024.0;
    let mut fixture = Fixture::start("threads")?;
    let session = Session::start(&[fixture.pid()], &["--sample", "1K"])?;
    for command in ["handoff 4000 100", "handoff_leak 8000 64 2", "churn 4 5000 48", "leak 8 2000 256"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    ensure!(report["losses"] == serde_json::json!({}), "something was lost\n{}", summary(&report));
    let sites = truth["sites"].as_object().context("the fixture names no sites")?;
    for function in sites.keys() {
        let (bytes, count) = site(&truth, function);
        let sigma = if count == 0 { 0.0 } else { deviation(interval, count, bytes / count) };
        ensure_estimate(&report, function, "live_bytes", bytes as f64, sigma)?;
    }
    Ok(())
}

/// Where several processes of one library are traced the kernel waits for the return of calls that nobody asked to see, and puts its
/// trampoline on the stack: what the allocator maps in such a call is its own all the same (the program break's growth was taken for the
/// program's).
#[test]
fn what_allocators_map_beside_other_processes() -> Result<()> {
    if !can_trace("what_allocators_map_beside_other_processes") {
        return Ok(());
    }
    let mut fixtures = [Fixture::start("allocators")?, Fixture::start("allocators")?];
    let pids = fixtures.each_ref().map(Fixture::pid);
    let session = Session::start(&pids, &["--sample", "4K"])?;
    for fixture in &mut fixtures {
        fixture.tell("leak malloc 5000 700")?;
    }
    let report = session.stop()?;
    ensure!(stacks(&report).count() >= 2, "{}", summary(&report));
    ensure!(stacks(&report).all(|stack| stack["resource"] == "heap"), "{}", summary(&report));
    ensure_estimate(&report, "leak_via_malloc", "live_bytes", 7_000_000.0, deviation(4096.0, 10_000, 700))
}

/// From exact to sampled, on to a longer interval, and back, while a program allocates, resizes and frees: what was there before a change
/// is freed after it as if nothing had been, nothing grows out of it, and the totals stay right.
#[test]
fn changes_while_it_runs() -> Result<()> {
    if !can_trace("changes_while_it_runs") {
        return Ok(());
    }
    let interval = 4096.0;
    let mut fixture = Fixture::start("allocators")?;
    let args = ["--sample", "exact", "--resample", "1K,4K,exact,4K", "--resource", "heap"];
    let mut session = Session::start(&[fixture.pid()], &args)?;
    // Which interval it is in, and what is known of it: a signal is acted on within a moment.
    let change = |session: &mut Session, to: Value| -> Result<()> {
        session.running().signal(libc::SIGUSR1)?;
        session.next_report(|report| report["processes"][0]["interval_bytes"] == to, patience())?;
        // The report after the next one: frees are filtered a quarter of a second after the change.
        for _ in 0..4 {
            session.next_report(|_| true, patience())?;
        }
        Ok(())
    };
    let round = |fixture: &mut Fixture| -> Result<()> {
        for command in ["leak malloc 2500 300", "churn malloc 3000 300", "churn realloc 2000 500", "grow 300 100 3000"]
        {
            fixture.tell(command)?;
        }
        Ok(())
    };
    round(&mut fixture)?;
    change(&mut session, 1024.into())?;
    // Blocks from before it.
    fixture.tell("release malloc 2000")?;
    round(&mut fixture)?;
    change(&mut session, 4096.into())?;
    fixture.tell("release malloc 2000")?;
    round(&mut fixture)?;
    change(&mut session, Value::Null)?;
    fixture.tell("release malloc 2000")?;
    round(&mut fixture)?;
    change(&mut session, 4096.into())?;
    fixture.tell("release malloc 2000")?;
    round(&mut fixture)?;
    let truth = fixture.report()?;
    let report = session.stop()?;
    ensure!(report["losses"] == serde_json::json!({}), "something was lost\n{}", summary(&report));
    for function in ["leak_via_malloc", "realloc_grow"] {
        let (bytes, count) = site(&truth, function);
        ensure_estimate(&report, function, "live_bytes", bytes as f64, deviation(interval, count, bytes / count))?;
    }
    // Nothing that was freed is left over, whenever it was allocated.
    for function in ["balanced_via_malloc", "balanced_via_realloc"] {
        ensure!(sum(&report, function, "live_bytes") == 0.0, "{function}\n{}", summary(&report));
    }
    let truth_of_all = 5.0 * 3000.0 * 300.0;
    ensure_estimate(&report, "balanced_via_malloc", "freed_bytes", truth_of_all, deviation(interval, 9000, 300))?;
    ensure!(report["processes"][0]["verdict"] != "leaking", "{}", summary(&report));
    Ok(())
}

/// A child frees the blocks that it has of its parent as any others, whether those were sampled or not; and what a new program allocates
/// is told from what the one before left at the same addresses.
#[test]
fn children_and_new_programs() -> Result<()> {
    if !can_trace("children_and_new_programs") {
        return Ok(());
    }
    let interval = 1024.0;
    let mut fixture = Fixture::start("lifecycle")?;
    let pid = fixture.pid();
    let mut session = Session::start(&[pid], &["--sample", "1K", "--children"])?;
    fixture.tell("leak 4000 100")?;
    let child: u32 = fixture.tell("branch")?.parse()?;
    let is_sampled = |report: &Value| {
        let process = &only(report, child)["processes"][0];
        process["allocators"].as_array().is_some_and(|found| !found.is_empty()) && process["interval_bytes"] == 1024
    };
    session.next_report(is_sampled, patience())?;
    // Frees are filtered a quarter of a second after that.
    for _ in 0..4 {
        session.next_report(|_| true, patience())?;
    }
    for command in ["child_free 3000", "child 2000 100", "leak 1000 100"] {
        fixture.tell(command)?;
    }
    // Of a child that has ended only a sum is kept.
    let of_child = only(
        &session.next_report(|report| sum(&only(report, child), "leak_in_child", "live_bytes") > 0.0, patience())?,
        child,
    );
    fixture.send("exec")?;
    fixture.wait_ready()?;
    ensure!(wait_until(patience(), || breakpoints(pid).is_ok_and(|count| count > 0)), "nothing attached after exec");
    fixture.tell("leak 3000 100")?;
    let of_parent = only(&session.stop()?, pid);

    ensure_estimate(&of_child, "leak_before", "live_bytes", 100_000.0, deviation(interval, 1000, 100))?;
    ensure_estimate(&of_child, "leak_in_child", "live_bytes", 200_000.0, deviation(interval, 2000, 100))?;
    ensure_estimate(&of_parent, "leak_after_exec", "live_bytes", 300_000.0, deviation(interval, 3000, 100))?;
    ensure!(sum(&of_parent, "leak_before", "live_bytes") == 0.0, "{}", summary(&of_parent));
    Ok(())
}

/// Blocks whose addresses the kernel side lost are taken out of the verdicts, counted and said; addresses that it made up are dropped; and
/// nothing else is taken for a difference, while blocks come and go.
#[test]
fn sides_are_reconciled() -> Result<()> {
    if !can_trace("sides_are_reconciled") {
        return Ok(());
    }
    let mut fixture = Fixture::start("allocators")?;
    let mut session = Session::start(&[fixture.pid()], &["--sample", "4K", "--lose-addresses", "50"])?;
    fixture.tell("leak malloc 9000 300")?;
    let before = session.next_report(|report| sum(report, "leak_via_malloc", "live_count") > 5000.0, patience())?;
    ensure!(before["losses"] == serde_json::json!({}), "lost too early\n{}", summary(&before));
    fixture.tell("churn malloc 20000 300")?;
    let mended = |report: &Value| report["counters"]["sampled_addresses_dropped"].as_u64().is_some();
    let report = session.next_report(mended, patience())?;
    fixture.tell("churn malloc 20000 300")?;
    let last = session.stop()?;
    for report in [report, last] {
        ensure!(report["counters"]["sampled_addresses_dropped"] == 50, "{}", summary(&report));
        ensure!(report["losses"]["sampled_blocks_unfollowed"] == 50, "{}", summary(&report));
        // As many bytes as the fifty stand for.
        let stand_for = 50.0 * 300.0 / -(-300.0 / 4096.0_f64).exp_m1();
        let distrusted = number(&report["losses"]["distrusted_bytes"]);
        ensure!((distrusted / stand_for - 1.0).abs() < 0.01, "not {stand_for}\n{}", summary(&report));
        ensure!(report["processes"][0]["affected_by_loss"] == true, "{}", summary(&report));
        let left = sum(&report, "leak_via_malloc", "live_bytes") / sum(&before, "leak_via_malloc", "live_bytes");
        ensure!((0.5..0.999).contains(&left), "{left} of it is left\n{}", summary(&report));
    }
    Ok(())
}

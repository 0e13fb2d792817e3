//! A Rust program with jemalloc linked in under a prefix is traced without being told of it, to the byte.

use std::path::Path;

use anyhow::{Result, ensure};
use leaktrace_tests::{Fixture, Session, has_frame, host, live_in, live_of, site, stacks, summary};

/// What boxes, zeroed, aligned and grown blocks hold, under the functions that made them; dropped blocks are gone. Nothing is
/// counted twice although Rust's own functions are there too, and none of those is probed.
#[test]
fn rust_with_jemalloc() -> Result<()> {
    if !host::can_trace("rust_with_jemalloc") {
        return Ok(());
    }
    let mut fixture = Fixture::builder(Path::new(env!("CARGO_BIN_EXE_leaktrace-rust-jemalloc"))).start()?;
    fixture.tell("leak boxed 7 300")?;
    let session = Session::start(&[fixture.pid()], &[])?;
    // Those from before are not known, nor are their frees.
    fixture.tell("release 7")?;
    let before = fixture.report()?;
    ensure!(before["live_bytes"] == 0, "{before}");
    for (i, via) in ["boxed", "zeroed", "aligned", "grown"].iter().enumerate() {
        fixture.tell(&format!("leak {via} {} {}", 10 + i, 100 * (i + 1)))?;
        fixture.tell(&format!("leak {via} 3 50000"))?;
    }
    fixture.tell("release 12")?;
    let truth = fixture.report()?;
    let report = session.stop()?;
    let told = || format!("{truth}\n{}", summary(&report));
    ensure!(report["losses"] == serde_json::json!({}), "something was lost: {}", told());
    for via in ["boxed", "zeroed", "aligned", "grown"] {
        let function = format!("leak_via_{via}");
        ensure!(site(&truth, &function).1 > 0, "{truth}");
        ensure!(live_in(&report, &function) == site(&truth, &function), "{function}: {}", told());
        ensure!(stacks(&report).any(|stack| has_frame(stack, &function) && stack["complete"] == true), "{}", told());
    }
    let found = live_of(&report, fixture.pid());
    ensure!(
        (Some(found.0), Some(found.1)) == (truth["live_bytes"].as_u64(), truth["live_count"].as_u64()),
        "{}",
        told()
    );
    let allocators = report["processes"][0]["allocators"].as_array().cloned().unwrap_or_default();
    let jemalloc = allocators.iter().find(|allocator| allocator["family"] == "jemalloc");
    let functions = jemalloc.map(|allocator| allocator["functions"].to_string()).unwrap_or_default();
    ensure!(functions.contains("_rjem_malloc") && functions.contains("_rjem_sdallocx"), "{allocators:?}");
    let all = serde_json::Value::from(allocators).to_string();
    ensure!(!all.contains("__rust"), "{all}");
    Ok(())
}

//! Reports in the formats of other tools, read by those tools.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use leak_user::export::openmetrics;
use leak_user::report::Report;
use leaktrace_tests::{Leaktrace, PATIENCE, Program, host};

/// What Go's pprof, which checks every reference in a profile before it shows anything, says of one.
fn pprof(tool: &Path, args: &[&str], profile: &Path) -> Result<String> {
    let home = tempfile::tempdir()?;
    let output = Command::new(tool)
        // The unit is written behind counts too; without one they would be shortened.
        .args(["-symbolize=none", "-unit=B", "-nodefraction=0", "-nodecount=10000"])
        .args(args)
        .arg(profile)
        // It keeps settings in the home.
        .env("HOME", home.path())
        .env("PPROF_TMPDIR", home.path())
        .output()
        .context("failed to start pprof")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The last column but the name, `cum`, of a function in pprof's table.
fn cumulated<'a>(table: &'a str, function: &str) -> Option<&'a str> {
    let line = table.lines().find(|line| line.split_whitespace().nth(5) == Some(function))?;
    line.split_whitespace().nth(3)
}

/// Google's pprof takes a profile as sound, and shows the bytes and blocks that the program says it leaks, by functions with file
/// and line.
#[test]
fn go_reads_the_profile() -> Result<()> {
    if !host::can_trace("go_reads_the_profile") {
        return Ok(());
    }
    let Some(tool) = host::program("go_reads_the_profile", "pprof") else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("heap.pb.gz");
    let startup = Program::c("startup").build()?;
    let outcome =
        Leaktrace::new()?.args(["--format", "pprof", "-o"]).arg(&file).arg("--").arg(startup).run(PATIENCE)?;
    ensure!(outcome.code()? == 0, "{outcome:?}");

    // Nothing of this is freed, so what was allocated is what is live.
    for (index, in_constructor, in_main) in
        [("inuse_space", 700, 704), ("inuse_objects", 7, 11), ("alloc_space", 700, 704), ("alloc_objects", 7, 11)]
    {
        let table = pprof(&tool, &["-top", &format!("-sample_index={index}")], &file)?;
        for (function, live) in [("leak_in_constructor", in_constructor), ("leak_in_main", in_main)] {
            assert_eq!(cumulated(&table, function), Some(&*format!("{live}B")), "{table}");
        }
    }
    let lines = pprof(&tool, &["-top", "-lines"], &file)?;
    assert!(lines.contains("startup.c:"), "{lines}");
    let raw = pprof(&tool, &["-raw"], &file)?;
    for part in ["inuse_space/bytes[dflt]", "process:[startup]", "resource:[heap]"] {
        assert!(raw.contains(part), "{part} is not in\n{raw}");
    }
    let main = raw.lines().find(|line| line.starts_with("1: 0x")).context("failed to find a mapping")?;
    assert!(main.contains("/startup "), "the program is not the first mapping: {main}");
    Ok(())
}

/// Without a file the profile goes to the standard output.
#[test]
fn a_profile_on_the_standard_output() -> Result<()> {
    if !host::can_trace("a_profile_on_the_standard_output") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("profile");
    let startup = Program::c("startup").build()?;
    let mut leaktrace = Leaktrace::new()?.args(["--format", "pprof", "--"]).arg(startup);
    leaktrace.command().stdout(std::fs::File::create(&file)?);
    let outcome = leaktrace.run(PATIENCE)?;
    ensure!(outcome.code()? == 0, "{outcome:?}");
    assert_eq!(std::fs::read(&file)?[..2], [0x1f, 0x8b], "not gzip");
    Ok(())
}

/// The reader of the Prometheus project's Python library, which follows the standard to the letter, takes the page, and what it reads is
/// what the report says.
#[test]
fn python_reads_the_metrics() -> Result<()> {
    const TEST: &str = "python_reads_the_metrics";
    const PARSER: &str = "python3/dist-packages/prometheus_client/openmetrics/parser.py";
    const READ: &str = "import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read
for family in read(sys.stdin.read()):
    for sample in family.samples:
        print(sample.name, sample.labels.get('process', '-'), sample.labels.get('function', '-'), int(sample.value))
";
    if !host::can_trace(TEST) {
        return Ok(());
    }
    let Some(python) = host::program(TEST, "python3") else { return Ok(()) };
    if host::library(TEST, PARSER).is_none() {
        return Ok(());
    }
    let startup = Program::c("startup").build()?;
    let outcome = Leaktrace::new()?.args(["--format", "json", "--"]).arg(startup).run(PATIENCE)?;
    let report: Report = serde_json::from_str(&outcome.stdout)?;
    let page = openmetrics::text(
        &report,
        openmetrics::Limits::default(),
        openmetrics::Own::read(),
        &openmetrics::Figures::default(),
    )?;

    let mut child = Command::new(python)
        .args(["-c", READ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("failed to take python's input")?.write_all(page.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}\n{page}", String::from_utf8_lossy(&output.stderr));
    let read = String::from_utf8(output.stdout)?;
    let live = report.processes[0].live_bytes;
    for line in [
        format!("leaktrace_process_live_bytes startup - {live}"),
        "leaktrace_stack_live_bytes startup leak_in_main 704".to_owned(),
        format!("leaktrace_events_total - - {}", report.events),
    ] {
        assert!(read.lines().any(|has| has == line), "{line:?} is not in\n{read}");
    }
    Ok(())
}

//! Programs of the system that nobody prepared, under load and made to leak, in real time and at the defaults.

use std::ffi::OsStr;
use std::io::Write as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::host::{can_trace, program};
use leaktrace_tests::{Leaktrace, Outcome, PATIENCE, Together, stacks, summary};
use serde_json::Value;

static SCENARIOS: Together = Together::new(&[
    ("python_under_load", python_under_load_scenario),
    ("python_made_to_leak", python_made_to_leak_scenario),
    ("sqlite_under_load", sqlite_under_load_scenario),
    ("perl_made_to_grow", perl_made_to_grow_scenario),
]);

/// A leak is named within this.
const TO_VERDICT: Duration = Duration::from_secs(30);

/// So long a program must go without a finding: a third more than a leak has.
const WITHOUT_FINDING: Duration = Duration::from_secs(40);

/// Runs the scenario if this host can trace and has the program.
fn run(test: &str, needed: &str) -> Result<()> {
    if can_trace(test) && program(test, needed).is_some() { SCENARIOS.result(test) } else { Ok(()) }
}

/// leaktrace for so long, with `--fail-on-leak` and a report every 2 s.
fn watch(duration: Duration) -> Result<Leaktrace> {
    let duration = format!("{}s", duration.as_secs());
    Ok(Leaktrace::new()?.args(["--format", "jsonl", "--interval", "2s", "--fail-on-leak", "--duration", &duration]))
}

/// `leaktrace -- COMMAND` for so long; the command is ended then.
fn watch_command(duration: Duration, command: impl AsRef<OsStr>, args: &[&str]) -> Result<Outcome> {
    watch(duration)?.arg("--").arg(command).args(args).run(duration + PATIENCE)
}

/// The program was busy, and at no time was there a finding. Whether it is called stable or a stack of it is still `warming` is left
/// open: the live bytes of such programs swing by more than they hold.
fn ensure_clean(outcome: &Outcome) -> Result<()> {
    let reports = outcome.jsonl()?;
    let last = reports.last().with_context(|| format!("no report; {}", outcome.stderr))?;
    ensure!(outcome.code()? == 0, "exit status {}: {}\n{}", outcome.status, outcome.stderr, summary(last));
    ensure!(reports.len() >= 15, "only {} reports", reports.len());
    for report in &reports {
        let at = &report["duration_s"];
        ensure!(stacks(report).all(|stack| stack["verdict"] != "growing"), "after {at} s\n{}", summary(report));
        ensure!(report["processes"][0]["verdict"] != "leaking", "after {at} s\n{}", summary(report));
    }
    let events = last["events"].as_u64().context("no events")?;
    ensure!(events > 100_000, "only {events} events: that is not load");
    Ok(())
}

/// A finding whose rate is within a quarter of `rate`; the stacks found.
fn ensure_leak(outcome: &Outcome, rate: f64) -> Result<Vec<Value>> {
    let reports = outcome.jsonl()?;
    let report = reports.last().with_context(|| format!("no report; {}", outcome.stderr))?;
    ensure!(outcome.code()? == 3, "exit status {}: {}\n{}", outcome.status, outcome.stderr, summary(report));
    let growing: Vec<Value> = stacks(report).filter(|stack| stack["verdict"] == "growing").cloned().collect();
    let found: f64 = growing.iter().filter_map(|stack| stack["growth"]["bytes_per_s"].as_f64()).sum();
    ensure!((found / rate - 1.0).abs() < 0.25, "{found} bytes a second found, {rate} leaked\n{}", summary(report));
    Ok(growing)
}

/// python3 that allocates and releases heavily beside a bounded cache: no finding.
#[test]
fn python_under_load() -> Result<()> {
    run("python_under_load", "python3")
}

fn python_under_load_scenario() -> Result<()> {
    let script = "
import time, json
end = time.time() + 60
cache = {}
i = 0
while time.time() < end:
    i += 1
    cache[i % 500] = 'x' * (600 + i % 3000)
    json.loads(json.dumps({str(k): [k] * 20 for k in range(200)}))
    sorted(bytes(700 + k) for k in range(50))
";
    let python = program("python_under_load", "python3").context("no python3")?;
    ensure_clean(&watch_command(WITHOUT_FINDING, python, &["-c", script])?)
}

/// python3 made to leak 100 KB/s through libc's malloc: found, under the library that calls it, with its rate.
#[test]
fn python_made_to_leak() -> Result<()> {
    run("python_made_to_leak", "python3")
}

fn python_made_to_leak_scenario() -> Result<()> {
    // Paced by the clock, so that it leaks as fast on a busy machine.
    let script = "
import time, ctypes
libc = ctypes.CDLL('libc.so.6')
libc.malloc.restype = ctypes.c_void_p
start = time.monotonic()
done = 0
while time.monotonic() < start + 60:
    while done < (time.monotonic() - start) * 100:
        libc.malloc(1000)
        done += 1
    time.sleep(0.01)
";
    let python = program("python_made_to_leak", "python3").context("no python3")?;
    let growing = ensure_leak(&watch_command(TO_VERDICT, python, &["-c", script])?, 100_000.0)?;
    let from_ctypes = growing.iter().any(|stack| {
        let module = stack["frames"][0]["module"].as_str().unwrap_or_default();
        module.contains("libffi") || module.contains("_ctypes")
    });
    ensure!(from_ctypes, "{growing:#?}");
    Ok(())
}

/// sqlite3 that inserts, indexes, sorts and deletes: no finding.
#[test]
fn sqlite_under_load() -> Result<()> {
    run("sqlite_under_load", "sqlite3")
}

/// sqlite3 in memory, fed with statements; killed when dropped.
struct Sqlite {
    child: Child,
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes rounds of statements until sqlite3 has ended; the pipe makes it wait for sqlite3.
fn feed(mut stdin: ChildStdin, rounds: &AtomicU64) {
    let setup = "CREATE TABLE t(id INTEGER PRIMARY KEY, k INTEGER, b BLOB); CREATE INDEX i ON t(k);\n";
    let round = "INSERT INTO t(k, b) WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 200) \
                 SELECT random() % 1000, randomblob(50 + abs(random()) % 4000) FROM n;\n\
                 SELECT k, sum(length(b)), group_concat(hex(substr(b, 1, 9))) FROM t GROUP BY k ORDER BY 2 DESC LIMIT 5;\n\
                 DELETE FROM t WHERE id <= (SELECT max(id) FROM t) - 1000;\n";
    if stdin.write_all(setup.as_bytes()).is_err() {
        return;
    }
    while stdin.write_all(round.as_bytes()).is_ok() {
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

fn sqlite_under_load_scenario() -> Result<()> {
    let sqlite = program("sqlite_under_load", "sqlite3").context("no sqlite3")?;
    let mut command = Command::new(sqlite);
    command.arg(":memory:").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut sqlite = Sqlite { child: command.spawn().context("failed to start sqlite3")? };
    let stdin = sqlite.child.stdin.take().context("no standard input")?;
    let rounds = Arc::new(AtomicU64::new(0));
    let feeder = thread::spawn({
        let rounds = Arc::clone(&rounds);
        move || feed(stdin, &rounds)
    });
    let outcome =
        watch(WITHOUT_FINDING)?.arg("-p").arg(sqlite.child.id().to_string()).run(WITHOUT_FINDING + PATIENCE)?;
    drop(sqlite);
    feeder.join().map_err(|_| anyhow::anyhow!("the thread that feeds sqlite3 panicked"))?;
    // After five the table is full, and each round deletes as much as it adds.
    let rounds = rounds.load(Ordering::Relaxed);
    ensure!(rounds > 100, "sqlite3 did only {rounds} rounds");
    ensure_clean(&outcome)
}

/// perl with an array that only grows, 100 KB/s of strings: found, with its rate.
#[test]
fn perl_made_to_grow() -> Result<()> {
    run("perl_made_to_grow", "perl")
}

fn perl_made_to_grow_scenario() -> Result<()> {
    let script = "
use Time::HiRes qw(time sleep);
my ($start, @all) = (time);
while (time < $start + 60) {
    push @all, 'x' x 10_000 while @all < (time - $start) * 10;
    sleep 0.02;
}
";
    let perl = program("perl_made_to_grow", "perl").context("no perl")?;
    ensure_leak(&watch_command(TO_VERDICT, perl, &["-e", script])?, 100_000.0)?;
    Ok(())
}

//! Programs of the system that nobody prepared, under load and made to leak, in real time and at the defaults.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::host::{can_trace, program, wait_until};
use leaktrace_tests::{Leaktrace, Outcome, PATIENCE, Together, stacks, summary};
use serde_json::Value;

static SCENARIOS: Together = Together::new(&[
    ("python_under_load", python_under_load_scenario),
    ("python_made_to_leak", python_made_to_leak_scenario),
    ("sqlite_under_load", sqlite_under_load_scenario),
    ("redis_under_load", redis_under_load_scenario),
    ("redis_made_to_grow", redis_made_to_grow_scenario),
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

/// A program that runs beside the tracer; killed when dropped.
struct Server {
    child: Child,
}

impl Drop for Server {
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
    let mut sqlite = Server { child: command.spawn().context("failed to start sqlite3")? };
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

/// redis-server, whose allocator is Debian's libjemalloc, under a load of many kinds of values in a bounded set of keys: no finding.
#[test]
fn redis_under_load() -> Result<()> {
    run("redis_under_load", "redis-server")
}

/// redis-server with keys that only become more, 100 KB/s: found, with its rate.
#[test]
fn redis_made_to_grow() -> Result<()> {
    run("redis_made_to_grow", "redis-server")
}

/// redis-server on a socket of its own, in memory only.
struct Redis {
    server: Server,
    folder: tempfile::TempDir,
}

impl Redis {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(program("redis", "redis-server").context("no redis-server")?);
        command
            // Its log of slow commands fills while the machine is busy: a growth that is real, and not the one in question.
            .args(["--slowlog-log-slower-than", "-1"])
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(folder.path().join("socket"));
        command.arg("--dir").arg(folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let redis = Self { server: Server { child: command.spawn().context("failed to start redis-server")? }, folder };
        ensure!(wait_until(PATIENCE, || redis.connect().is_ok()), "redis-server does not listen");
        Ok(redis)
    }

    fn connect(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(self.folder.path().join("socket"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Runs `client`, which is to end with an error once redis is gone, and leaktrace beside it.
    fn watched(
        self,
        duration: Duration,
        client: impl FnOnce(UnixStream) -> Result<()> + Send + 'static,
    ) -> Result<Outcome> {
        let stream = self.connect()?;
        let client = thread::spawn(move || client(stream));
        let outcome = watch(duration)?.arg("-p").arg(self.server.child.id().to_string()).run(duration + PATIENCE)?;
        ensure!(!client.is_finished(), "the client ended early: {:?}", client.join().map(Result::err));
        drop(self);
        ensure!(client.join().is_ok(), "the client panicked");
        Ok(outcome)
    }
}

/// Sends commands and takes as many replies, each of one line.
fn pipeline(stream: &mut BufReader<UnixStream>, commands: &[String]) -> Result<()> {
    let text: String = commands.iter().flat_map(|command| [command, "\r\n"]).collect();
    stream.get_mut().write_all(text.as_bytes())?;
    let mut line = String::new();
    for command in commands {
        line.clear();
        ensure!(stream.read_line(&mut line)? > 0, "redis has closed the connection");
        ensure!(!line.starts_with('-'), "{command:.80}: {line}");
    }
    Ok(())
}

fn redis_under_load_scenario() -> Result<()> {
    let load = |stream| {
        let mut stream = BufReader::new(stream);
        for round in 0_u64.. {
            // Sizes and keys that do not come in step with each other; 2,000 keys of each kind, all there within two seconds.
            let commands: Vec<String> = (0..100_u64)
                .flat_map(|n| {
                    let mixed = (100 * round + n).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
                    let (key, size) = (mixed % 2000, 20 + mixed / 2000 % 3000);
                    let value = "x".repeat(size as usize);
                    [
                        format!("SET string:{key} {value}"),
                        format!("STRLEN string:{}", (key + 7) % 2000),
                        format!("HSET hash:{} {} {value:.200}", key % 50, key / 50),
                        format!("LPUSH list:{} {value:.100}", key % 50),
                        format!("LTRIM list:{} 0 40", key % 50),
                        format!("DEL string:{}", (key + 1) % 2000),
                    ]
                })
                .collect();
            pipeline(&mut stream, &commands)?;
        }
        Ok(())
    };
    ensure_clean(&Redis::start()?.watched(WITHOUT_FINDING, load)?)
}

fn redis_made_to_grow_scenario() -> Result<()> {
    let grow = |stream| {
        let mut stream = BufReader::new(stream);
        let value = "x".repeat(2000);
        let start = Instant::now();
        // Paced by the clock, so that it grows as fast on a busy machine.
        for n in 0_u32.. {
            let at = start + Duration::from_millis(20) * n;
            thread::sleep(at.saturating_duration_since(Instant::now()));
            pipeline(&mut stream, &[format!("SET key:{n} {value}")])?;
        }
        Ok(())
    };
    // Keys, entries and headers of the strings come on top of the values: some 5 %.
    ensure_leak(&Redis::start()?.watched(TO_VERDICT, grow)?, 105_000.0)?;
    Ok(())
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

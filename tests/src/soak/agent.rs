//! The agent for months, compressed: processes start and end by the thousand, everything is asked for on and on, the configuration is
//! read again and again, clients break off; and the agent stays as large as it was.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::Figures;
use crate::host::wait_until;
use crate::{Agent, Client, Fixture, Program, metric, patience};

/// Caches that fill up to their bounds, and what an allocator keeps for its threads.
const SLACK: u64 = 6 << 20;
/// Processes that allocate, and live for some seconds each.
const LIVING: usize = 4;
/// Of every look's processes so many end at once.
const SHORT: usize = 6;

/// What the agent takes at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    resident: u64,
    descriptors: u64,
    threads: u64,
    series: u64,
}

impl Taken {
    fn now(agent: &Agent) -> Result<Self> {
        let own = |file: &str| format!("/proc/{}/{file}", agent.pid());
        let status = fs::read_to_string(own("status")).context("failed to read the agent's status")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let page = agent.get("/metrics")?.text();
        Ok(Self {
            // Its own: files that are mapped come and go.
            resident: field("RssAnon:").context("failed to find the agent's memory")? << 10,
            descriptors: fs::read_dir(own("fd"))?.count() as u64,
            threads: field("Threads:").context("failed to find the agent's threads")?,
            series: page.lines().filter(|line| !line.starts_with('#')).count() as u64,
        })
    }

    fn most(self, other: Self) -> Self {
        Self {
            resident: self.resident.max(other.resident),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
            series: self.series.max(other.series),
        }
    }
}

/// What goes on around the agent.
struct Load<'a> {
    agent: Client,
    pid: i32,
    folder: &'a Path,
    config: PathBuf,
    stop: AtomicBool,
    processes: AtomicU64,
    answers: AtomicU64,
    reloads: AtomicU64,
}

impl Load<'_> {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Processes that start and end: some that leak for a second or two, and many that do nothing.
    fn start_processes(&self) -> Result<()> {
        let (leaking, short) = (self.folder.join("leak_slow"), self.folder.join("true"));
        let mut living: Vec<Fixture> = Vec::new();
        while self.goes_on() {
            if living.len() == LIVING {
                living.remove(0);
            }
            living.push(Fixture::builder(&leaking).arg("--rate").arg("100000").arg("--block").arg("512").start()?);
            for _ in 0..SHORT {
                Command::new(&short).stdin(Stdio::null()).status().context("failed to start a process")?;
            }
            self.processes.fetch_add(1 + SHORT as u64, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(150));
        }
        Ok(())
    }

    /// Everything that can be asked for, and what breaks off.
    fn ask(&self) -> Result<()> {
        while self.goes_on() {
            for path in ["/metrics", "/api/v1/report", "/debug/pprof/heap", "/readyz", "/healthz", "/"] {
                let answer = self.agent.get(path)?;
                ensure!(matches!(answer.status, 200 | 404), "{path}: {}", answer.head);
                self.answers.fetch_add(1, Ordering::Relaxed);
            }
            let mut broken = self.agent.connect()?;
            broken.write_all(b"GET /metrics HTTP/1.1\r\nHo")?;
            drop(broken);
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Another interval each time, and now and then a mistake.
    fn reload(&self) -> Result<()> {
        let mut times = 0_u64;
        while self.goes_on() {
            times += 1;
            let interval = ["500ms", "700ms", "often"][times as usize % 3];
            configure(&self.config, self.folder, interval)?;
            // SAFETY: kill reads its two integers only; the agent is waited for after this has ended.
            ensure!(unsafe { libc::kill(self.pid, libc::SIGHUP) } == 0, "the agent has ended");
            self.reloads.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(300));
        }
        Ok(())
    }
}

fn configure(file: &Path, folder: &Path, interval: &str) -> Result<()> {
    let text =
        format!("[trace]\nall = true\nexe = '{}/*'\nmax_overhead = 50\ninterval = '{interval}'\n", folder.display());
    let new = file.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(new, file).context("failed to replace the configuration")
}

/// Compares the most that the agent took in the second quarter of the time with the most in the last.
pub fn agent(time: Duration) -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let programs = folder.path().join("programs");
    fs::create_dir(&programs)?;
    fs::copy(Program::c("leak_slow").build()?, programs.join("leak_slow"))?;
    fs::copy(crate::host::find("true").context("failed to find true")?, programs.join("true"))?;
    let config = folder.path().join("agent.toml");
    configure(&config, &programs, "500ms")?;
    let file = config.to_str().context("the folder's name is text")?;
    let agent = Agent::start(&folder.path().join("state"), ["--config", file, "--set", "http.timeout=2s"])?;
    agent.wait_for("/readyz", |answer| answer.status == 200)?;
    let load = Load {
        agent: *agent,
        pid: agent.pid().cast_signed(),
        folder: &programs,
        config,
        stop: AtomicBool::new(false),
        processes: AtomicU64::new(0),
        answers: AtomicU64::new(0),
        reloads: AtomicU64::new(0),
    };
    let (mut early, mut late) = (Taken::default(), Taken::default());
    let start = Instant::now();
    let used_before = crate::host::cpu_time(agent.pid())?;
    thread::scope(|scope| -> Result<()> {
        let parts = [scope.spawn(|| load.start_processes()), scope.spawn(|| load.ask()), scope.spawn(|| load.reload())];
        let mut watched = || -> Result<()> {
            while start.elapsed() < time && parts.iter().all(|part| !part.is_finished()) {
                let taken = Taken::now(&agent)?;
                let part = start.elapsed().as_secs_f64() / time.as_secs_f64();
                if (0.25..0.5).contains(&part) {
                    early = early.most(taken);
                } else if part >= 0.75 {
                    late = late.most(taken);
                }
                thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        };
        let watched = watched();
        load.stop.store(true, Ordering::Relaxed);
        for part in parts {
            part.join().map_err(|_| anyhow::anyhow!("a part of the load has panicked"))??;
        }
        watched
    })?;
    let used = crate::host::cpu_time(agent.pid())?.saturating_sub(used_before);
    let elapsed = start.elapsed();
    ensure!(early.resident > 0 && late.resident > 0, "too short a time to compare: {elapsed:?}");
    let flat = |what: &str, early: u64, late: u64, slack: u64| {
        ensure!(late <= early + slack, "{what} rose from {early} to {late}");
        Ok(())
    };
    flat("resident memory", early.resident, late.resident, SLACK + early.resident / 20)?;
    // Connections, files that are being read, processes that have just started.
    flat("descriptors", early.descriptors, late.descriptors, 60)?;
    flat("threads", early.threads, late.threads, 4)?;
    flat("series", early.series, late.series, 200)?;
    // Once nothing of the load is left nothing of it is left in the agent either.
    let all_gone = wait_until(patience(), || {
        let traced = agent.get("/metrics").ok().and_then(|page| metric(&page.text(), "leaktrace_traced_processes"));
        traced == Some(0.0)
    });
    ensure!(all_gone, "processes that have ended are still traced");
    let page = agent.get("/metrics")?.text();
    let lost = metric(&page, "leaktrace_agent_events_total{part=\"state\",event=\"write_failed\"}");
    ensure!(lost == Some(0.0), "the state could not be written {lost:?} times");
    let outcome = agent.stop()?;
    ensure!(outcome.code()? == 0, "{}", outcome.stderr);
    let pair = |early: u64, late: u64| format!("{early}, {late}");
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1_048_576.0);
    Ok(vec![
        ("processes", load.processes.into_inner().to_string()),
        ("answers", load.answers.into_inner().to_string()),
        ("reloads", load.reloads.into_inner().to_string()),
        ("own, early and late", format!("{}, {}", mib(early.resident), mib(late.resident))),
        ("descriptors", pair(early.descriptors, late.descriptors)),
        ("threads", pair(early.threads, late.threads)),
        ("series", pair(early.series, late.series)),
        ("processor", format!("{:.1} %", 100.0 * used.as_secs_f64() / elapsed.as_secs_f64())),
    ])
}

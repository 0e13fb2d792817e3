//! The agent for months, compressed: processes start and end by the thousand, in pods whose API server has its moods; everything is asked
//! for on and on, the configuration is read again and again, clients break off, and those whom it pushes to come and go; and the agent
//! stays as large as it was.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};

use super::Figures;
use crate::endpoints::{Endpoint, Manner};
use crate::host::wait_until;
use crate::kubernetes::{Container, Mood, NODE, Server};
use crate::{Agent, Client, Fixture, Program, metric, patience};

/// Caches that fill up to their bounds, and what an allocator keeps for its threads; in the first minutes, and after those.
const SLACK: (u64, u64) = (6 << 20, 2 << 20);
/// What is no start any more.
const LONG: Duration = Duration::from_mins(5);
/// Processes that allocate, and live for some seconds each.
const LIVING: usize = 4;
/// Of every look's processes so many end at once.
const SHORT: usize = 6;
/// Payloads that may wait for an endpoint.
const QUEUED: u64 = 8;
/// The sections of the endpoints, and what is asked of them.
const PUSHED: [(&str, &str); 3] = [
    ("push.pyroscope", "/push.v1.PusherService/Push"),
    ("push.parca", "/api/profiles/writeraw"),
    ("push.otlp", "/v1/metrics"),
];

/// What the agent takes at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    resident: u64,
    descriptors: u64,
    threads: u64,
    series: u64,
    /// Payloads that wait for all endpoints together.
    queued: u64,
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
        let ready = agent.get("/readyz")?.text();
        let mut queued = 0;
        for (part, _) in PUSHED {
            let waiting = waiting(&ready, part);
            ensure!(waiting <= QUEUED, "{waiting} payloads wait for {part}:\n{ready}");
            queued += waiting;
        }
        Ok(Self {
            // Its own: files that are mapped come and go.
            resident: field("RssAnon:").context("failed to find the agent's memory")? << 10,
            descriptors: fs::read_dir(own("fd"))?.count() as u64,
            threads: field("Threads:").context("failed to find the agent's threads")?,
            series: page.lines().filter(|line| !line.starts_with('#')).count() as u64,
            queued,
        })
    }
}

/// How many payloads wait for an endpoint, as the line on it says; none before it has one.
fn waiting(ready: &str, part: &str) -> u64 {
    let line = ready.lines().find(|line| line.starts_with(part));
    let note = line.and_then(|line| line.rsplit_once(" payload")?.0.rsplit_once('('));
    note.and_then(|(_, count)| count.parse().ok()).unwrap_or(0)
}

/// The middle of what was taken at these moments.
fn middle(taken: &[Taken], of: fn(&Taken) -> u64) -> u64 {
    let mut values: Vec<u64> = taken.iter().map(of).collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// Numbers by chance, which follow from the first.
struct Chance(u64);

impl Chance {
    fn below(&mut self, most: usize) -> usize {
        // Xorshift, by George Marsaglia.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % most as u64) as usize
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// What goes on around the agent.
struct Load<'a> {
    agent: Client,
    pid: i32,
    programs: &'a Path,
    config: Configuration,
    /// Of the pods whose processes come and go; none where control groups cannot be made.
    containers: &'a [Container],
    server: &'a Server,
    stop: AtomicBool,
    processes: AtomicU64,
    answers: AtomicU64,
    reloads: AtomicU64,
    moods: AtomicU64,
}

impl Load<'_> {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// A process that leaks, in this container if there is one.
    fn leaking(&self, block: &str, container: Option<&Container>) -> Result<Fixture> {
        let mut builder = Fixture::builder(&self.programs.join("leak_slow"));
        builder = builder.arg("--rate").arg("100000").arg("--block").arg(block);
        if let Some(container) = container {
            container.enter(builder.command())?;
        }
        builder.start()
    }

    /// Processes that start and end: some that leak for a second or two, and many that do nothing.
    fn start_processes(&self) -> Result<()> {
        let short = self.programs.join("true");
        // One that stays, so that there is always something to tell; of large blocks, which take little room in the agent.
        let _leak = self.leaking("16384", self.containers.first())?;
        let mut living: Vec<Fixture> = Vec::new();
        for number in 1.. {
            if !self.goes_on() {
                break;
            }
            if living.len() == LIVING {
                living.remove(0);
            }
            living.push(self.leaking("512", self.containers.get(number % self.containers.len().max(1)))?);
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
            self.config.write(["500ms", "700ms", "often"][times as usize % 3])?;
            // SAFETY: kill reads its two integers only; the agent is waited for after this has ended.
            ensure!(unsafe { libc::kill(self.pid, libc::SIGHUP) } == 0, "the agent has ended");
            self.reloads.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(300));
        }
        Ok(())
    }

    /// Whoever is pushed to and the API server, each by chance in one way or another; well in the end.
    fn come_and_go(&self, endpoints: &mut [Endpoint], chance: &mut Chance) -> Result<()> {
        const MOODS: [Mood; 14] = [
            Mood::Well,
            Mood::Well,
            Mood::Well,
            Mood::Slow,
            Mood::Broken,
            Mood::Forbidding,
            Mood::Hanging,
            Mood::Halfway,
            Mood::Noise,
            Mood::NoJson,
            Mood::OtherJson,
            Mood::Endless,
            Mood::Gone,
            Mood::Silent,
        ];
        while self.goes_on() {
            let which = chance.below(endpoints.len() + 1);
            if let Some(endpoint) = endpoints.get_mut(which) {
                endpoint.behave(chance.one(&Manner::ALL))?;
            } else {
                self.server.set_pods(pods(self.containers, chance.below(1000)));
                self.server.set_mood(chance.one(&MOODS));
            }
            self.moods.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(100 + chance.below(500) as u64));
        }
        self.server.set_mood(Mood::Well);
        endpoints.iter_mut().try_for_each(|endpoint| endpoint.behave(Manner::Takes))
    }
}

/// The pod of the process that stays is always the same, the others are replaced.
fn pods(containers: &[Container], generation: usize) -> BTreeMap<String, serde_json::Value> {
    let tag = |container: &Container| if container.number == 0 { 0 } else { generation };
    containers.iter().map(|one| (one.uid.clone(), one.pod(&tag(one).to_string()))).collect()
}

/// The agent's, of which the interval changes.
struct Configuration {
    file: PathBuf,
    programs: PathBuf,
    /// Of other sections.
    rest: String,
}

impl Configuration {
    fn write(&self, interval: &str) -> Result<()> {
        let text = format!(
            "[trace]\nall = true\nexe = '{}/*'\nmax_overhead = 50\ninterval = '{interval}'\n{}",
            self.programs.display(),
            self.rest
        );
        let new = self.file.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(new, &self.file).context("failed to replace the configuration")
    }
}

/// The sections that name these servers.
fn sections(endpoints: &[Endpoint], server: &Server) -> String {
    let push = PUSHED.iter().zip(endpoints).map(|((section, _), endpoint)| {
        let bounds = format!("interval = '1s'\ntimeout = '1s'\nmax_queued = {QUEUED}");
        format!("[{section}]\nurl = '{}'\n{bounds}\n", endpoint.url())
    });
    let kubernetes = format!("api_server = '{}'\nnode_name = '{NODE}'\nevents = true\nwatch = '1s'", server.url());
    push.chain([format!("[kubernetes]\n{kubernetes}\n")]).collect()
}

/// Fails where something has risen from the first third to the last.
fn compare(seen: &[Taken], time: Duration) -> Result<Figures> {
    let third = seen.len() / 3;
    ensure!(third > 0, "too short a time to compare: {time:?}");
    let (early, late) = (&seen[..third], &seen[seen.len() - third..]);
    let mut figures = Figures::new();
    let mut flat = |what: &'static str, of: fn(&Taken) -> u64, slack: u64, show: fn(u64) -> String| {
        let (first, last) = (middle(early, of), middle(late, of));
        let most = seen.iter().map(of).max().unwrap_or(0);
        figures.push((what, format!("{}, {}, at most {}", show(first), show(last), show(most))));
        ensure!(last <= first + slack, "{what} rose from {} to {}", show(first), show(last));
        Ok(())
    };
    let (slack, more_series) = if time < LONG { (SLACK.0, 200) } else { (SLACK.1, 60) };
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1_048_576.0);
    let number = |number: u64| number.to_string();
    flat("own memory", |taken| taken.resident, slack + middle(early, |taken| taken.resident) / 20, mib)?;
    // Connections, files that are being read, processes that have just started.
    flat("descriptors", |taken| taken.descriptors, 30, number)?;
    flat("threads", |taken| taken.threads, 2, number)?;
    flat("series", |taken| taken.series, more_series, number)?;
    // Each is bounded by itself, and after an endpoint was away for long it is full.
    flat("queued", |taken| taken.queued, 2 * QUEUED, number)?;
    Ok(figures)
}

/// After the load nothing of it is left in the agent, and it has done what it was there for.
fn load_is_gone(agent: &Agent, server: &Server, told: bool) -> Result<()> {
    // Once nothing of the load is left nothing of it is left in the agent either.
    let all_gone = wait_until(patience(), || {
        let traced = agent.get("/metrics").ok().and_then(|page| metric(&page.text(), "leaktrace_traced_processes"));
        traced == Some(0.0)
    });
    ensure!(all_gone, "processes that have ended are still traced");
    let page = agent.get("/metrics")?.text();
    let lost = metric(&page, "leaktrace_agent_events_total{part=\"state\",event=\"write_failed\"}");
    ensure!(lost == Some(0.0), "the state could not be written {lost:?} times");
    // One leak stayed all the time, and it is told once, however often that had to be tried.
    if told {
        let once = wait_until(patience() * 3, || server.events().len() == 1);
        ensure!(once, "{} Events: {}", server.events().len(), agent.get("/readyz")?.text());
    }
    Ok(())
}

/// After a quarter of the time, compares what the agent took in the first third of the rest with what it took in the last.
pub fn agent(time: Duration) -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let programs = folder.path().join("programs");
    fs::create_dir(&programs)?;
    fs::copy(Program::c("leak_slow").build()?, programs.join("leak_slow"))?;
    fs::copy(crate::host::find("true").context("failed to find true")?, programs.join("true"))?;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() | 1;
    let mut chance = Chance(seed);
    let top = format!("leaktrace-soak-{}", std::process::id());
    let containers: Vec<Container> = (0..=LIVING).map_while(|n| Container::new(&top, n)).collect();
    let server = Server::start();
    server.set_pods(pods(&containers, 1));
    let mut endpoints: Vec<Endpoint> = PUSHED.iter().map(|(_, path)| Endpoint::start(path)).collect::<Result<_>>()?;
    let config = Configuration {
        file: folder.path().join("agent.toml"),
        programs: programs.clone(),
        rest: sections(&endpoints, &server),
    };
    config.write("500ms")?;
    let file = config.file.to_str().context("the folder's name is text")?.to_owned();
    let agent = Agent::start(&folder.path().join("state"), ["--config", &file, "--set", "http.timeout=2s"])?;
    agent.wait_for("/readyz", |answer| answer.status == 200)?;
    let load = Load {
        agent: *agent,
        pid: agent.pid().cast_signed(),
        programs: &programs,
        config,
        containers: &containers,
        server: &server,
        stop: AtomicBool::new(false),
        processes: AtomicU64::new(0),
        answers: AtomicU64::new(0),
        reloads: AtomicU64::new(0),
        moods: AtomicU64::new(0),
    };
    let mut seen: Vec<Taken> = Vec::new();
    let start = Instant::now();
    let used_before = crate::host::cpu_time(agent.pid())?;
    thread::scope(|scope| -> Result<()> {
        let parts = [
            scope.spawn(|| load.start_processes()),
            scope.spawn(|| load.ask()),
            scope.spawn(|| load.reload()),
            scope.spawn(|| load.come_and_go(&mut endpoints, &mut chance)),
        ];
        let mut watched = || -> Result<()> {
            while start.elapsed() < time && parts.iter().all(|part| !part.is_finished()) {
                let taken = Taken::now(&agent)?;
                if start.elapsed() > time / 4 {
                    seen.push(taken);
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
    let mut figures = compare(&seen, time)?;
    ensure!(server.met_bounds(), "an answer without an end was taken whole");
    load_is_gone(&agent, &server, time >= LONG && !containers.is_empty())?;
    let before: u64 = endpoints.iter().map(|one| Ok(one.counts()?.0)).sum::<Result<_>>()?;
    let outcome = agent.stop()?;
    ensure!(outcome.code()? == 0, "{}", outcome.stderr);
    // What waited has been sent at the end, since everybody takes it again.
    ensure!(!outcome.stderr.contains("could not be sent before the end"), "{}", outcome.stderr);
    let mut pushed = Vec::new();
    for ((part, _), endpoint) in PUSHED.iter().zip(&endpoints) {
        let (taken, others) = endpoint.counts()?;
        ensure!(taken > 0, "nothing came by {part}");
        pushed.push(format!("{part} {taken} taken, {others} not"));
    }
    let after: u64 = endpoints.iter().map(|one| Ok(one.counts()?.0)).sum::<Result<_>>()?;
    ensure!(after > before, "nothing was sent at the end");
    let counts = [
        ("processes", load.processes.into_inner()),
        ("answers", load.answers.into_inner()),
        ("reloads", load.reloads.into_inner()),
        ("changes of servers", load.moods.into_inner()),
        ("Events", server.events().len() as u64),
    ];
    let mut all: Figures = counts.into_iter().map(|(what, count)| (what, count.to_string())).collect();
    all.append(&mut figures);
    all.push(("pushed", pushed.join(", ")));
    all.push(("processor", format!("{:.1} %", 100.0 * used.as_secs_f64() / elapsed.as_secs_f64())));
    all.push(("seed", seed.to_string()));
    Ok(all)
}

//! The node agent: traces the whole system for months and serves what it finds.
//!
//! [`run`] ties it together: the tracing loop of [`crate::trace`] gives its reports to [`Publisher`], which hands each to whoever
//! serves or pushes. Those read nothing else, so a client that is slow or a server that is down never holds up tracing.
//!
//! - [`config`]: the file, variables and flags;
//! - [`http`]: the server;
//! - [`page`]: what it shows to people;
//! - [`kube`]: names from Kubernetes, and Events for it;
//! - [`push`]: profiles and metrics to other systems;
//! - [`state`]: what is kept on disk;
//! - [`status`]: how each part is.

pub mod config;
mod files;
pub mod http;
pub mod kube;
pub mod page;
pub mod push;
pub mod state;
pub mod status;

use std::collections::HashSet;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use self::config::Settings;
use self::kube::Kubernetes;
use self::state::State;
use self::status::Status;
use crate::cli::AgentFlags;
use crate::report::{Labels, Mode, Report};
use crate::trace::{self, Control, Observed, Sink};
use crate::view::Outcome;

/// What serves and pushes read.
pub struct Published {
    /// The latest report; before the first, one without processes.
    pub report: watch::Receiver<Arc<Report>>,
    /// As they are after the last reload.
    pub settings: watch::Receiver<Arc<Settings>>,
    pub status: Status,
}

/// Has the allocator give back what was freed. glibc's has an arena for each of the threads that make answers, and once it has freed a large
/// buffer it takes buffers of that size for usual and keeps them: one endless answer of an API server would cost 70 MiB for good.
#[cfg(target_env = "gnu")]
fn keep_little_memory() {
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 256 << 10), (libc::M_TRIM_THRESHOLD, 1 << 20)]
    {
        // SAFETY: two integers are passed, and the allocator may be in use meanwhile.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// musl's keeps nothing of that size.
#[cfg(not(target_env = "gnu"))]
fn keep_little_memory() {}

/// Traces and serves until SIGINT or SIGTERM; SIGHUP reads the configuration again.
pub async fn run(settings: Settings, flags: AgentFlags) -> Result<()> {
    keep_little_memory();
    // Before anything is traced: another agent, or an address that is not ours, is the likeliest mistake.
    let listener = http::bind(settings.http.listen).await?;
    let (reports, report) = watch::channel(Arc::new(Report::new(Mode::default(), crate::report::Host::default())));
    let (settings_sender, settings_receiver) = watch::channel(Arc::new(settings.clone()));
    let published = Arc::new(Published { report, settings: settings_receiver, status: Status::default() });
    let (changes_sender, changes) = mpsc::channel(1);
    let stop = watch_signals(Reload {
        flags,
        settings: settings_sender,
        changes: changes_sender,
        published: Arc::clone(&published),
    })?;
    log::info!("listening on {}", listener.local_addr().context("failed to read the address that is listened on")?);
    let server = tokio::spawn(http::serve(listener, Arc::clone(&published), stop.clone()));
    let (end_pushes, pushes_end) = oneshot::channel();
    let pushes = tokio::spawn(push::run(Arc::clone(&published), pushes_end));
    let state = State::open(&settings.state, &published);
    let kubernetes = Kubernetes::start(&settings.kubernetes);
    let publisher = Publisher { reports, published, state, kubernetes, kills: Kills::default() };
    let traced = trace::run_into(&settings.trace, publisher, Control { stop, changes: Some(changes) }).await;
    server.abort();
    if traced.is_ok() {
        // The final report is there by now. That pushes have ended already is no reason not to end.
        let _ = end_pushes.send(());
        let _ = pushes.await;
    } else {
        pushes.abort();
    }
    traced.map(drop)
}

/// Gives each report to all who read it.
struct Publisher {
    reports: watch::Sender<Arc<Report>>,
    published: Arc<Published>,
    state: State,
    kubernetes: Kubernetes,
    kills: Kills,
}

/// Counts whom the OOM killer took, since they have no series any more.
#[derive(Default)]
struct Kills {
    /// Those of the last report, which has the latest.
    counted: HashSet<(u32, Timestamp)>,
}

impl Kills {
    fn count(&mut self, report: &Report, status: &Status) {
        const PART: &str = "oom";
        let kills = || report.oom_kills.iter().map(|kill| ((kill.pid, kill.at), kill.process.is_some()));
        // Both are there before it happens.
        for (traced, event) in [(true, "traced_killed"), (false, "watched_killed")] {
            let new = kills().filter(|(id, of_traced)| *of_traced == traced && !self.counted.contains(id)).count();
            status.add(PART, event, new as u64);
        }
        self.counted = kills().map(|(id, _)| id).collect();
    }
}

impl Sink for Publisher {
    /// The first report tells that tracing stands.
    fn is_live(&self) -> bool {
        true
    }

    fn observes(&self) -> bool {
        true
    }

    fn observe(&mut self, processes: &mut dyn Iterator<Item = Observed<'_>>, report: &mut Report) {
        // A program is known from before a deploy by the name of its image, which the control group does not tell.
        let named: Vec<(Observed<'_>, Labels)> = processes
            .map(|process| {
                let mut labels = process.labels.clone();
                self.kubernetes.label(&mut labels);
                (process, labels)
            })
            .collect();
        let mut named = named.iter().map(|(process, labels)| Observed { labels, ..*process });
        self.state.observe(&mut named, report, &self.published);
    }

    fn interval(&mut self, mut report: Report) -> Result<Outcome> {
        self.kubernetes.enrich(&mut report);
        self.kubernetes.tell(&self.published.status);
        self.kills.count(&report, &self.published.status);
        let interval = self.published.settings.borrow().trace.interval;
        self.published.status.reported(interval);
        self.reports.send_replace(Arc::new(report));
        Ok(Outcome::Open)
    }

    fn finish(mut self, report: &Report) -> Result<Outcome> {
        self.state.finish(&self.published);
        let mut report = report.clone();
        self.kubernetes.enrich(&mut report);
        self.reports.send_replace(Arc::new(report));
        Ok(Outcome::Open)
    }
}

/// What reading the configuration again takes.
struct Reload {
    flags: AgentFlags,
    settings: watch::Sender<Arc<Settings>>,
    changes: mpsc::Sender<crate::config::Config>,
    published: Arc<Published>,
}

impl Reload {
    /// Takes over what can change. A configuration with a mistake changes nothing.
    async fn reload(&self) {
        const PART: &str = "configuration";
        let status = &self.published.status;
        let flags = self.flags.clone();
        // Files that are named may be on a disk that does not answer.
        let new = match tokio::task::spawn_blocking(move || Settings::load(&flags)).await {
            Ok(Ok(new)) => new,
            // It has panicked, which is in the log.
            Err(_) => return status.count(PART, "refused"),
            Ok(Err(refused)) => {
                let text: Vec<String> = refused.iter().map(ToString::to_string).collect();
                status.count(PART, "refused");
                return status.degraded(PART, format!("not taken over: {}", text.join("; ")));
            }
        };
        let (settings, waiting) = self.settings.borrow().go_on_with(new);
        let trace = settings.trace.clone();
        self.settings.send_replace(Arc::new(settings));
        // The loop takes it within its next turn; it is gone only at the end.
        let _ = self.changes.send(trace).await;
        status.count(PART, "reloaded");
        if waiting.is_empty() {
            status.works(PART);
            log::info!("the configuration was read again");
        } else {
            status.degraded(PART, format!("read again; these wait for a restart: {}", waiting.join(", ")));
        }
    }
}

/// True once SIGINT or SIGTERM has come; a second one ends the program at once.
fn watch_signals(reload: Reload) -> Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // By itself, so that an end does not wait for it.
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            reload.reload().await;
        }
    });
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                _ = interrupt.recv() => libc::SIGINT,
                _ = terminate.recv() => libc::SIGTERM,
            };
            if sender.send_replace(true) {
                std::process::exit(128 + number);
            }
        }
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    /// Each kill is counted once, in whatever reports it stands, and by whether more than its size was known.
    #[test]
    fn kills() {
        let (mut kills, status) = (Kills::default(), Status::default());
        let counts = |kills: &mut Kills, report: &Report| {
            kills.count(report, &status);
            status
                .figures()
                .counts
                .iter()
                .map(|(part, event, count)| format!("{part} {event} {count}"))
                .collect::<Vec<_>>()
        };
        let mut report = sample::system();
        let kill = report.oom_kills[0].clone();
        report.oom_kills.clear();
        assert_eq!(counts(&mut kills, &report), ["oom traced_killed 0", "oom watched_killed 0"]);
        report.oom_kills.push(kill.clone());
        for _ in 0..2 {
            assert_eq!(counts(&mut kills, &report), ["oom traced_killed 1", "oom watched_killed 0"]);
        }
        report.oom_kills.push(crate::report::OomKill { pid: kill.pid + 1, process: None, ..kill.clone() });
        assert_eq!(counts(&mut kills, &report), ["oom traced_killed 1", "oom watched_killed 1"]);
        // The first makes room, and the same pid is killed again.
        report.oom_kills.remove(0);
        report.oom_kills.push(crate::report::OomKill { at: kill.at + jiff::SignedDuration::from_secs(9), ..kill });
        assert_eq!(counts(&mut kills, &report), ["oom traced_killed 2", "oom watched_killed 1"]);
    }
}

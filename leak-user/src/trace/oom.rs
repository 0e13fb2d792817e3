//! Processes that the kernel kills because memory has run out: what was last known of them stays in the reports.

use std::collections::VecDeque;
use std::time::Duration;

use super::Run;
use super::summary::{Moment, Snapshot};
use super::system::System;
use super::target::Target;
use crate::losses::monotonic_now;
use crate::report;

/// So many are kept, the latest.
const KEPT: usize = 32;

#[derive(Default)]
pub(super) struct OomKills {
    kept: VecDeque<report::OomKill>,
}

impl OomKills {
    fn add(&mut self, kill: report::OomKill) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(kill);
    }

    pub fn reports(&self) -> Vec<report::OomKill> {
        self.kept.iter().cloned().collect()
    }
}

impl Run<'_> {
    /// Notes whom the kernel has killed since the last time. It marks its victims before they end: so whoever forgets processes that
    /// have ended calls this between noticing that and forgetting them.
    pub(super) fn note_oom_kills(&mut self) {
        let system = self.system.take();
        self.note_oom_kills_of(system.as_ref());
        self.system = system;
    }

    /// The same while the system is in other hands.
    pub(super) fn note_oom_kills_of(&mut self, system: Option<&System>) {
        for (id, time) in self.programs.take_oom_victims() {
            let tgid = process_of(id);
            let now = monotonic_now();
            let ago = Duration::from_nanos(now.saturating_sub(time));
            let at = jiff::Timestamp::now().checked_sub(ago).unwrap_or_else(|_| jiff::Timestamp::now());
            let at_s = Duration::from_nanos(time.saturating_sub(self.start_ns)).as_secs_f64();
            let kill = match self.targets.iter().find(|target| target.id().tgid == tgid) {
                Some(target) => {
                    let moment = Moment { now, start: self.start_ns };
                    let mut snapshot =
                        Snapshot::take(&self.collector.core(), moment, &self.config, |wanted| wanted == tgid);
                    let mut process = snapshot.process(target, self.started, &mut self.symbols);
                    process.ended = Some(report::ProcessEnd { at_s, exit_code: None, signal: Some(libc::SIGKILL) });
                    of_target(target, process, at, at_s)
                }
                None => match system.and_then(|system| system.last_seen(tgid)) {
                    Some(seen) => report::OomKill { at, at_s, ..seen },
                    // Nobody watches it.
                    None => continue,
                },
            };
            log::info!("pid {tgid} ({}) was killed because memory ran out", kill.comm.escape_debug());
            self.oom_kills.add(kill);
        }
    }
}

fn of_target(target: &Target, process: report::Process, at: jiff::Timestamp, at_s: f64) -> report::OomKill {
    report::OomKill {
        at,
        at_s,
        pid: target.id().tgid,
        comm: process.comm.clone(),
        exe: process.exe.clone(),
        labels: process.labels.clone(),
        rss: process.rss,
        process: Some(Box::new(process)),
    }
}

/// The process of a thread, while that can be read: it takes a victim a while to end.
fn process_of(tid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let tgid = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    tgid.unwrap_or(tid)
}

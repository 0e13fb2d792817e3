//! Processes that come and go during a run: children that are followed, and those that have ended.

use super::Run;
use super::summary::{Moment, Snapshot};
use super::target::Target;
use crate::losses::monotonic_now;
use crate::process::ProcessId;
use crate::report;

/// Children that have ended and leaked are listed, the latest of them; of the others only sums are kept.
const LISTED: usize = 32;
/// Executables for which sums are kept; further ones are summed under no name.
const EXECUTABLES: usize = 1024;

/// What is kept of traced children that have ended.
#[derive(Default)]
pub(super) struct EndedChildren {
    /// Those that leaked.
    pub leaking: std::collections::VecDeque<report::Process>,
    pub sums: std::collections::BTreeMap<String, report::EndedProcesses>,
}

impl EndedChildren {
    fn sum_of(&mut self, name: &str) -> &mut report::EndedProcesses {
        let name = if self.sums.contains_key(name) || self.sums.len() < EXECUTABLES { name } else { "" };
        self.sums
            .entry(name.to_owned())
            .or_insert_with(|| report::EndedProcesses { exe: name.to_owned(), ..Default::default() })
    }

    fn add(&mut self, process: report::Process) {
        let sum = self.sum_of(process.exe.as_deref().unwrap_or(&process.comm));
        sum.count += 1;
        sum.leaking += u64::from(process.verdict == report::Verdict::Leaking);
        sum.live_bytes_at_end = sum.live_bytes_at_end.saturating_add(process.live_bytes);
        sum.largest_rss_bytes = sum.largest_rss_bytes.max(process.rss.last_bytes.unwrap_or(0));
        if process.verdict == report::Verdict::Leaking {
            if self.leaking.len() == LISTED {
                self.leaking.pop_front();
            }
            self.leaking.push_back(process);
        }
    }
}

impl Run<'_> {
    /// A traced process forked: its child is traced on from here. Its ledger has begun as a copy of the parent's already.
    /// What it frees before its own probes stand (milliseconds) is not seen and stays in its ledger, which does not rise by
    /// that.
    ///
    /// One that ended before it could be looked at is counted under its parent's executable, and nothing is known of its memory.
    pub(super) fn follow_child(&mut self, parent: u32, child: Option<ProcessId>) {
        let parent_id = self.targets.iter().find(|target| target.id().tgid == parent).map(Target::id);
        let Some(child) = child else { return self.count_unseen_child(parent) };
        // It may be known: a pid given by the user, or found by a sweep.
        if self.targets.iter().any(|target| target.id() == child) {
            return;
        }
        let opened = Target::open(child.tgid, &self.files).ok().filter(|target| target.id() == child);
        let Some(mut target) = opened else {
            // It has ended.
            self.collector.core().forget(child.tgid);
            return self.count_unseen_child(parent);
        };
        target.parent = Some(parent);
        if let Some(parent) = parent_id {
            self.symbols.fork(parent, child);
        }
        if let Err(error) = self.attach(target, false) {
            log::info!("pid {}, a child of {parent}, cannot be traced: {error:#}", child.tgid);
            self.let_go(child);
        }
    }

    fn count_unseen_child(&mut self, parent: u32) {
        let Self { targets, ended_children, .. } = self;
        // Without its parent there is no name to count it under.
        if let Some(parent) = targets.iter().find(|target| target.id().tgid == parent) {
            let process = &parent.process;
            let exe = process.exe.as_ref().map(|exe| exe.to_string_lossy());
            ended_children.sum_of(exe.as_deref().unwrap_or(&process.comm)).count += 1;
        }
    }

    /// Lets go of children and picked processes that have ended, so that a run that sees many of them does not grow.
    pub(super) fn forget_ended_children(&mut self) {
        // Of those that the user named the end is part of the report.
        let gone = |target: &Target| target.ended.is_some() && (target.parent.is_some() || target.reason.is_some());
        if !self.targets.iter().any(gone) {
            return;
        }
        self.note_oom_kills();
        let moment = Moment { now: monotonic_now(), start: self.start_ns };
        let (ended, living): (Vec<_>, Vec<_>) = std::mem::take(&mut self.targets).into_iter().partition(gone);
        self.targets = living;
        let is_ended = |tgid| ended.iter().any(|target| target.id().tgid == tgid);
        let mut snapshot = Snapshot::take(&self.collector.core(), moment, &self.config, is_ended);
        let mut probes = Vec::new();
        for mut target in ended {
            let id = target.id();
            self.ended_children.add(snapshot.process(&target, self.started, &mut self.symbols));
            probes.extend(target.detach());
            self.let_go(id);
        }
        crate::attach::detach(probes);
    }
}

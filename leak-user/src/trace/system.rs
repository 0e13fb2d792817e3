//! The whole system: all processes are watched, and those that the scout picks are traced.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::Run;
use super::sink::Observed;
use super::summary::{Moment, Snapshot};
use super::target::Target;
use crate::discover::elf;
use crate::labels::Labels;
use crate::losses::monotonic_now;
use crate::process::{Process, ProcessId};
use crate::report::{self, Decided};
use crate::scout::watch::{Resident, Watch};
use crate::scout::{Action, Decision, Limits, Reason, Scout};
use crate::select::{ProcessFacts, Selection};

/// Between two looks at all processes, if a look is cheap.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A look takes at most one part in so many of the time, by the processor time that it takes: on a busy machine it waits for its turn,
/// and fewer looks would not make that shorter.
const SHARE: u32 = 150;
/// Between two judgements of what is traced.
const JUDGE_EVERY: Duration = Duration::from_secs(5);
/// After this time processes that were not wanted are asked after again: they may have executed another program.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(30);
/// Watched processes, and decisions, in a report.
const LISTED: usize = 20;
/// Decisions that are kept.
const DECISIONS: usize = 256;
/// Reports of processes that leak and are not traced any more.
const SETTLED: usize = 64;
/// A process that lives for so long is looked at once more: it is by then what it is going to be.
const GROWN_UP: Duration = Duration::from_secs(30);
/// How many of them at a time; each takes a tenth of a millisecond.
const GROWN_UP_AT_ONCE: usize = 20;

/// What is known of a process that is watched.
struct Known {
    comm: String,
    exe: Option<String>,
    labels: report::Labels,
    first: u64,
    last: Resident,
    since: Instant,
    /// Of the executable, read once it has lived for [`GROWN_UP`].
    build_id: Option<String>,
    grown_up: bool,
}

impl Known {
    /// Its resident set, and how fast that grows if the scout knows (`Scout::slope`).
    fn rss(&self, slope: Option<(f64, u64)>) -> report::Rss {
        report::Rss {
            first_bytes: Some(self.first),
            last_bytes: Some(self.last.total),
            growth_bytes_per_s: slope.map(|(slope, _)| slope),
        }
    }
}

/// The processes of the system.
pub(super) struct System {
    selection: Selection,
    all: bool,
    scout: Scout,
    most: usize,
    watch: Watch,
    known: HashMap<ProcessId, Known>,
    /// Those that the last look found to have ended.
    departed: Vec<(ProcessId, Known)>,
    /// Wanted, and not looked at before; only with `all`.
    new: Vec<ProcessId>,
    decisions: VecDeque<report::Decision>,
    /// What was last said of processes that leak and are not traced any more.
    settled: VecDeque<report::Process>,
    next_look: Instant,
    judged: Instant,
    asked: Instant,
}

impl System {
    pub fn new(selection: Selection, all: bool, most: Option<usize>) -> Self {
        let usual = if all { usize::MAX } else { Limits::default().most };
        let limits = Limits { most: most.unwrap_or(usual) };
        let now = Instant::now();
        Self {
            selection,
            all,
            scout: Scout::new(limits),
            most: limits.most,
            watch: Watch::new(),
            known: HashMap::new(),
            departed: Vec::new(),
            new: Vec::new(),
            decisions: VecDeque::new(),
            settled: VecDeque::new(),
            next_look: now,
            judged: now,
            asked: now,
        }
    }

    /// Looks at all processes, `time` seconds after the start.
    fn look(&mut self, time: f64) {
        let (start, used) = (Instant::now(), processor_time());
        if self.asked.elapsed() >= ASK_AGAIN_EVERY {
            self.asked = start;
            self.watch.ask_again();
        }
        self.departed.clear();
        let Self { watch, selection, known, departed, all, new, scout, .. } = self;
        let look = watch.look(|id| choose(id, selection, known, all.then_some(new)));
        for (id, resident) in look.resident {
            scout.sample(id, time, resident.own);
            if let Some(known) = known.get_mut(&id) {
                if known.first == 0 {
                    known.first = resident.total;
                }
                known.last = resident;
            }
        }
        for id in look.ended {
            scout.forget(id);
            departed.extend(known.remove_entry(&id));
        }
        self.next_look = start + LOOK_EVERY.max(processor_time().saturating_sub(used) * SHARE);
    }

    /// These processes were started, or have executed a program; only with `all`.
    fn born(&mut self, born: Vec<u32>) {
        let Self { watch, selection, known, new, .. } = self;
        for pid in born {
            watch.born(pid, |id| choose(id, selection, known, Some(&mut *new)));
        }
    }

    /// See [`Scout::unexplained`].
    pub fn unexplained(&self, time: f64) -> Vec<(ProcessId, f64)> {
        self.scout.unexplained(time)
    }

    /// Whether processes are traced as soon as they are there.
    pub fn traces_all(&self) -> bool {
        self.all
    }

    /// What was last seen of a process that is watched, or has just ended, for a report of its end.
    pub fn last_seen(&self, tgid: u32) -> Option<report::OomKill> {
        let departed = self.departed.iter().map(|(id, known)| (id, known));
        let (id, known) = departed.chain(&self.known).find(|(id, _)| id.tgid == tgid)?;
        Some(report::OomKill {
            at: jiff::Timestamp::UNIX_EPOCH,
            at_s: 0.0,
            pid: tgid,
            comm: known.comm.clone(),
            exe: known.exe.clone(),
            labels: known.labels.clone(),
            rss: known.rss(self.scout.slope(*id)),
            process: None,
        })
    }

    /// Whether the process is watched, and has not ended.
    pub fn knows(&self, id: ProcessId) -> bool {
        self.known.contains_key(&id)
    }

    pub fn comm(&self, id: ProcessId) -> String {
        self.known.get(&id).map_or_else(String::new, |known| known.comm.clone())
    }

    fn note(&mut self, time: f64, id: ProcessId, what: Decided, reason: Reason) {
        if self.decisions.len() == DECISIONS {
            self.decisions.pop_front();
        }
        let comm = self.comm(id);
        self.decisions.push_back(report::Decision { at_s: time, pid: id.tgid, comm, what, reason });
    }

    /// Looks once more at processes that are there to stay: what they are now, and which build. Asked by those who keep that.
    pub fn look_closer(&mut self) {
        let Self { known, selection, .. } = self;
        let grown_up = known.iter_mut().filter(|(_, known)| !known.grown_up && known.since.elapsed() >= GROWN_UP);
        for (id, known) in grown_up.take(GROWN_UP_AT_ONCE) {
            known.grown_up = true;
            let Some(now) = wanted(*id, selection) else { continue };
            (known.comm, known.exe, known.labels) = (now.comm, now.exe, now.labels);
            let exe = std::fs::File::open(format!("/proc/{}/exe", id.tgid));
            known.build_id = exe.ok().and_then(|file| elf::build_id(&file));
        }
    }

    /// All that is watched.
    pub fn observed(&self) -> impl Iterator<Item = Observed<'_>> {
        self.known.iter().map(|(id, known)| Observed {
            id: *id,
            comm: &known.comm,
            exe: known.exe.as_deref(),
            build_id: known.build_id.as_deref(),
            labels: &known.labels,
            resident_bytes: known.last.total,
            growth_bytes_per_s: self.scout.slope(*id).map(|(slope, _)| slope),
            watched: known.since.elapsed(),
        })
    }

    /// Watches these from now on. Those of the watched that are not among them.
    pub fn select(&mut self, selection: Selection) -> Vec<ProcessId> {
        if selection == self.selection {
            return Vec::new();
        }
        self.selection = selection;
        self.watch.ask_again();
        let all: Vec<ProcessId> = self.known.keys().copied().collect();
        let gone: Vec<ProcessId> = all.into_iter().filter(|id| wanted(*id, &self.selection).is_none()).collect();
        for id in &gone {
            self.watch.forget(*id);
            self.scout.forget(*id);
            self.known.remove(id);
        }
        gone
    }

    /// What a report says of it, without what is traced.
    pub fn report(&self, traced: &[Target]) -> report::System {
        let is_traced = |id: &ProcessId| traced.iter().any(|target| target.id() == *id && target.ended.is_none());
        let slope = |id: &ProcessId| self.scout.slope(*id).map_or(0.0, |(slope, _)| slope);
        let mut watched: Vec<(&ProcessId, &Known)> = self.known.iter().filter(|(id, _)| !is_traced(id)).collect();
        watched.sort_by(|(a, ka), (b, kb)| {
            slope(b).total_cmp(&slope(a)).then_with(|| kb.last.total.cmp(&ka.last.total)).then_with(|| a.cmp(b))
        });
        report::System {
            watched: self.known.len() as u64,
            traced: traced.iter().filter(|target| target.ended.is_none()).count() as u64,
            most_traced: if self.all { None } else { Some(self.most as u64) },
            processes: watched
                .into_iter()
                .take(LISTED)
                .map(|(id, known)| report::Watched {
                    pid: id.tgid,
                    comm: known.comm.clone(),
                    exe: known.exe.clone(),
                    labels: known.labels.clone(),
                    rss: known.rss(self.scout.slope(*id)),
                })
                .collect(),
            decisions: self.decisions.iter().rev().take(LISTED * 2).rev().cloned().collect(),
            growing: Vec::new(),
            restarts: Vec::new(),
        }
    }

    /// Processes that leak and are not traced any more.
    pub fn settled(&self) -> impl Iterator<Item = &report::Process> {
        self.settled.iter()
    }
}

/// That this thread has used.
fn processor_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    // It cannot fail for the thread itself; without it looks would come each second.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Whether this process is selected; notes it if so, also among the new ones.
fn choose(
    id: ProcessId,
    selection: &Selection,
    known: &mut HashMap<ProcessId, Known>,
    new: Option<&mut Vec<ProcessId>>,
) -> bool {
    let Some(process) = wanted(id, selection) else { return false };
    known.insert(id, process);
    if let Some(new) = new {
        new.push(id);
    }
    true
}

/// What is known of this process if it is selected.
fn wanted(id: ProcessId, selection: &Selection) -> Option<Known> {
    let process = Process::open(id.tgid).ok().filter(|process| process.id == id)?;
    let labels = Labels::read(process.through());
    selection.matches(&ProcessFacts::of(&process, &labels)).then(|| Known {
        comm: process.comm.clone(),
        exe: process.exe.as_ref().map(|exe| exe.to_string_lossy().into_owned()),
        labels: labels.into(),
        first: 0,
        last: Resident::default(),
        since: Instant::now(),
        build_id: None,
        grown_up: false,
    })
}

impl Run<'_> {
    /// Looks after the system, if that is what is traced; to be called often.
    pub(super) fn tend_system(&mut self) {
        let Some(mut system) = self.system.take() else { return };
        let time = self.started.elapsed().as_secs_f64();
        system.born(self.programs.take_births());
        for id in std::mem::take(&mut system.new) {
            self.promote(&mut system, time, &Decision { id, action: Action::Promote, reason: Reason::All });
        }
        if Instant::now() >= system.next_look {
            system.look(time);
            self.note_oom_kills_of(Some(&system));
            if system.judged.elapsed() >= JUDGE_EVERY {
                system.judged = Instant::now();
                self.judge(&mut system, time);
            }
            let decisions = if system.all { Vec::new() } else { system.scout.decide(time) };
            for decision in decisions {
                match decision.action {
                    Action::Promote => self.promote(&mut system, time, &decision),
                    Action::Release => self.release(&mut system, time, &decision),
                }
            }
            self.tend_pages(&mut system, time);
        }
        self.system = Some(system);
    }

    fn judge(&self, system: &mut System, time: f64) {
        if self.targets.is_empty() {
            return;
        }
        let moment = Moment { now: monotonic_now(), start: self.start_ns };
        let snapshot = Snapshot::take(&self.collector.core(), moment, &self.config, |_| true);
        for target in &self.targets {
            system.scout.verdict(target.id(), snapshot.verdict(target), time);
        }
    }

    fn promote(&mut self, system: &mut System, time: f64, decision: &Decision) {
        let id = decision.id;
        let opened = Target::open(id.tgid, &self.files).ok().filter(|target| target.id() == id);
        // Otherwise it has ended, or is traced as somebody's child.
        let Some(mut target) = opened.filter(|_| !self.targets.iter().any(|target| target.id() == id)) else { return };
        target.reason = Some(decision.reason.clone());
        match self.attach(target, true) {
            Ok(()) => {
                log::info!("pid {}: traced: {:?}", id.tgid, decision.reason);
                system.settled.retain(|process| process.pid != id.tgid);
                system.note(time, id, Decided::Promoted, decision.reason.clone());
            }
            Err(error) => {
                self.let_go(id);
                system.scout.refuse(id);
                if !system.all {
                    system.note(time, id, Decided::Released, Reason::Untraceable { error: format!("{error:#}") });
                }
                log::info!("pid {} cannot be traced: {error:#}", id.tgid);
            }
        }
    }

    fn release(&mut self, system: &mut System, time: f64, decision: &Decision) {
        let id = decision.id;
        system.note(time, id, Decided::Released, decision.reason.clone());
        let Some(place) = self.targets.iter().position(|target| target.id() == id) else { return };
        let moment = Moment { now: monotonic_now(), start: self.start_ns };
        let mut snapshot = Snapshot::take(&self.collector.core(), moment, &self.config, |tgid| tgid == id.tgid);
        let mut target = self.targets.remove(place);
        let process = snapshot.process(&target, self.started, &mut self.symbols);
        if process.verdict == report::Verdict::Leaking {
            if system.settled.len() == SETTLED {
                system.settled.pop_front();
            }
            system.settled.push_back(process);
        }
        crate::attach::detach(target.detach());
        self.let_go(id);
        log::info!("pid {}: released: {:?}", id.tgid, decision.reason);
    }

    /// Goes on with these processes: those that are not among them are not traced any more.
    pub(super) fn select(&mut self, selection: Selection) {
        let Some(system) = &mut self.system else { return };
        for id in system.select(selection) {
            if let Some(place) = self.targets.iter().position(|target| target.id() == id) {
                crate::attach::detach(self.targets.remove(place).detach());
                self.let_go(id);
            }
        }
    }

    /// A process that even windows cost too much is traced no longer: where the scout picks who is, another may take its place, and it is
    /// not picked again for a while.
    pub(super) fn give_up(&mut self, id: ProcessId, why: String) {
        let Some(mut system) = self.system.take() else { return };
        if !system.all {
            let time = self.started.elapsed().as_secs_f64();
            system.scout.too_dear(id, time);
            self.release(
                &mut system,
                time,
                &Decision { id, action: Action::Release, reason: Reason::OverBudget { why } },
            );
        }
        self.system = Some(system);
    }

    /// Forgets all that is known of a process that is not traced any more.
    pub(super) fn let_go(&mut self, id: ProcessId) {
        self.programs.forget_pages(id.tgid);
        self.pages.let_go(id);
        self.programs.remove_target(id.tgid);
        self.governing.forget(id);
        self.sampler.forget(&self.programs, id.tgid);
        self.code.forget(id);
        self.symbols.forget(id);
        self.collector.core().forget(id.tgid);
    }
}

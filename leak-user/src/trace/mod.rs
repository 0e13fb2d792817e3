//! A run from beginning to end: attach, collect, report, detach.
//!
//! Three parties: the [`collector`] thread empties the ring into the ledger; the loop in [`run`] looks after the traced
//! processes and makes reports; a task waits for signals. What the loop does may take long (reading debug information),
//! and nothing waits for it. Where the reports go is the business of a [`Sink`].

mod code;
mod collector;
mod follow;
mod governing;
mod host;
mod oom;
mod pages;
mod reconcile;
mod sampler;
mod sink;
mod summary;
mod system;
mod target;
mod windowed;

use std::borrow::Cow;
use std::fs::File;
use std::io::BufWriter;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use leak_common::sampling::Interval;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::code::Code;
use self::collector::{Collector, Notice};
use self::follow::EndedChildren;
use self::governing::Governing;
use self::oom::OomKills;
use self::pages::Pages;
use self::reconcile::Reconciling;
use self::sampler::Sampler;
use self::summary::{Moment, Snapshot};
use self::system::System;
use self::target::{Followed, Target};
use crate::attach::{MappingHook, Programs, Settings, StackWalk, UprobeKind};
use crate::cli::Feature;
use crate::config::{Config, Sampling, Target as What, Unwind};
use crate::discover::Files;
use crate::doctor;
use crate::ledger::{Config as LedgerConfig, Ledger, ProcessLedger};
use crate::losses::{Losses, monotonic_now};
use crate::privileges::Keep;
use crate::process::ProcessId;
use crate::recording::{self, Entry};
use crate::report::{self, Ended, Report};
use crate::ring::{Ring, page_size};
use crate::spawn::Spawned;
use crate::symbols::Symbols;
use crate::view::{Input, Outcome, Output};

pub use self::sink::{Observed, Sink};

/// How often resident sets are sampled and windows closed.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// How often mappings are looked at for what no event told of, and the clock is corrected.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// How often the loop looks at processes, notices and keys.
const TICK: Duration = Duration::from_millis(50);
/// The same while all that is to be done is to watch.
const SLOW_TICK: Duration = Duration::from_millis(250);

/// What `--all` costs, for those who ask for it; the figures are those of the README (a virtual machine).
const COST_OF_ALL: &str = "all selected processes are traced: each call of malloc with its free takes them about 2 microseconds \
    longer; other processes pay nothing. What a new process allocates in its first tenths of a second is not seen. Without --all only \
    those that keep growing are traced";
/// Names are forgotten once less than this part of the memory that may be taken is left.
const NAMES_SHARE: u64 = 8;

/// How long the effect of sampling on the number of live blocks is waited for.
const WIDEN_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// How a run ended, for the exit status.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Whether a process leaks.
    pub leaks: bool,
    /// How the command ended, if one was started and it ended by itself.
    pub command: Option<ExitStatus>,
}

/// What a run is told while it lasts.
pub struct Control {
    /// True once it is to end. Where the sender is gone it ends too.
    pub stop: watch::Receiver<bool>,
    /// What to go on with from then on; see [`Config::go_on_with`] for what of it holds. `None`: nothing will come.
    pub changes: Option<mpsc::Receiver<Config>>,
}

/// Traces what `config` names until the end or a signal, and writes the reports.
pub async fn run(config: &Config) -> Result<Finished> {
    doctor::require().map_err(|blocked| anyhow!("this host cannot be traced: {blocked}"))?;
    let output = Output::open(config)?;
    let stop = watch_signals()?;
    run_into(config, output, Control { stop, changes: None }).await
}

/// Traces what `config` names until the end, and gives the reports to `output`. The rights that tracing does not need are given up by
/// the calling thread once everything stands.
pub async fn run_into(config: &Config, mut output: impl Sink, control: Control) -> Result<Finished> {
    doctor::require().map_err(|blocked| anyhow!("this host cannot be traced: {blocked}"))?;
    let recording = config.record.as_deref().map(open_recording).transpose()?;
    let resampled = watch_resampling(config)?;
    let mut run = Run::start(config, recording)?;
    // Not before: a command that is started is to have the scheduler's usual ways.
    crate::punctual::be_punctual();
    let result = run.until_the_end(&mut output, control, &resampled).await;
    // Also when the loop failed: the probes first, so that the target is free while the last report is made.
    run.detach();
    let ended = result?;
    let status = run.end_command()?;
    let report = run.report(Some(ended));
    let leaks = report.leaks();
    run.collector.core().finish_recording()?;
    // A reader that went away is a quiet end.
    let _: Outcome = output.finish(&report)?;
    Ok(Finished { leaks, command: status })
}

fn open_recording(path: &std::path::Path) -> Result<recording::Writer<BufWriter<File>>> {
    let file = File::create(path).with_context(|| format!("failed to create the recording {}", path.display()))?;
    recording::Writer::new(BufWriter::new(file)).with_context(|| format!("failed to write {}", path.display()))
}

/// True once a first SIGINT, SIGTERM or SIGHUP has come. A second one ends the program at once; the kernel takes the
/// probes down with it.
fn watch_signals() -> Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        for again in [false, true] {
            let number = tokio::select! {
                _ = interrupt.recv() => libc::SIGINT,
                _ = terminate.recv() => libc::SIGTERM,
                _ = hangup.recv() => libc::SIGHUP,
            };
            if again {
                restore_terminal();
                std::process::exit(128 + number);
            }
            // The loop may be gone already.
            let _ = sender.send(true);
        }
    });
    Ok(receiver)
}

/// How often SIGUSR1 has come, where that has a meaning.
fn watch_resampling(config: &Config) -> Result<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    if !config.resample.is_empty() {
        let mut signals = signal(SignalKind::user_defined1())?;
        let count = Arc::clone(&count);
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    Ok(count)
}

/// What is running.
struct Run<'a> {
    config: Cow<'a, Config>,
    programs: Programs,
    collector: Collector,
    notices: mpsc::Receiver<Notice>,
    targets: Vec<Target>,
    ended_children: EndedChildren,
    oom_kills: OomKills,
    /// Where all processes of the system are meant.
    system: Option<System>,
    pages: Pages,
    files: Files,
    symbols: Symbols,
    code: Code,
    sampler: Sampler,
    sampling: Sampling,
    /// How many of [`Config::resample`] have been gone on to.
    resampled: usize,
    governing: Governing,
    command: Option<Spawned>,
    host: report::Host,
    started_at: jiff::Timestamp,
    started: Instant,
    start_ns: u64,
    /// When the trace was cut, in nanoseconds of `CLOCK_MONOTONIC` too.
    cut: Option<(Instant, u64)>,
    /// When a process was last sampled more thinly for want of memory, and how often that was done.
    widened: Option<Instant>,
    widenings: u64,
    /// How often names were forgotten, to stay within the memory that may be taken.
    names_dropped: u64,
    /// Records and time at the previous report.
    last_report: (u64, Instant),
}

impl<'a> Run<'a> {
    /// Loads the programs and attaches to every target.
    fn start(config: &'a Config, recording: Option<recording::Writer<BufWriter<File>>>) -> Result<Self> {
        let files = Files::default();
        // Before anything is loaded: a pid that is not there, or not ours, is the likeliest mistake.
        let targets = match &config.target {
            What::Pids(pids) => pids.iter().map(|pid| Target::open(*pid, &files)).collect::<Result<_>>()?,
            What::Command(_) | What::System { .. } => Vec::new(),
        };
        raise_memlock();
        let without = |feature| config.without.contains(&feature);
        let settings = Settings {
            walk: match (without(Feature::Loop), without(Feature::TailCalls)) {
                (true, true) => Some(StackWalk::PlainLoop),
                (true, false) => Some(StackWalk::TailCalls),
                (false, _) => None,
            },
            kind: match (without(Feature::Session), without(Feature::Multi)) {
                (_, true) => Some(UprobeKind::Perf),
                (true, false) => Some(UprobeKind::Multi),
                (false, false) => None,
            },
            mapping_hook: match (without(Feature::Functions), without(Feature::Types)) {
                (_, true) => Some(MappingHook::Tracepoints),
                (true, false) => Some(MappingHook::TypedTracepoints),
                (false, false) => None,
            },
            min_size: config.min_size,
            max_size: config.max_size,
            mappings: config.resources.mmap,
            forks: config.children,
            pages: matches!(config.target, What::System { .. }),
            oom_kills: true,
            births: matches!(config.target, What::System { all: true, .. }),
            tables: config.unwind == Unwind::Tables,
            rows: u32::try_from(config.unwind_memory / size_of::<u64>() as u64).unwrap_or(u32::MAX),
            kernel_memory: config.kernel_memory,
            asked: config.sizes,
            ..Settings::default()
        };
        let mut programs = Programs::load(&settings)?;
        let ring = Ring::take(&mut programs)?;
        let losses = Losses::take(&mut programs)?;
        forward_logs(&mut programs);
        let ledger = Ledger::new(LedgerConfig::within(config.max_memory, page_size() as u64));
        let (collector, notices) = Collector::start(ledger, ring, losses, recording)?;
        let code = Code::new(programs.has_tables().then_some(settings.rows));
        let started = Instant::now();
        let mut run = Self {
            config: Cow::Borrowed(config),
            programs,
            collector,
            notices,
            targets: Vec::new(),
            ended_children: EndedChildren::default(),
            oom_kills: OomKills::default(),
            system: match &config.target {
                What::System { selection, all } => Some(System::new((**selection).clone(), *all, config.most_traced)),
                What::Pids(_) | What::Command(_) => None,
            },
            pages: Pages::default(),
            files,
            symbols: Symbols::new().context("failed to start the symbolizer")?,
            code,
            sampler: Sampler::new(Reconciling::new(config.lose_addresses)),
            sampling: config.sampling,
            resampled: 0,
            governing: Governing::start(config),
            command: None,
            host: host::host(),
            started_at: jiff::Timestamp::now(),
            started,
            start_ns: monotonic_now(),
            cut: None,
            widened: None,
            widenings: 0,
            names_dropped: 0,
            last_report: (0, started),
        };
        match &config.target {
            What::Pids(_) => {
                for target in targets {
                    run.attach(target, true)?;
                }
            }
            What::Command(command) => run.start_command(command)?,
            What::System { all, .. } => {
                if *all {
                    log::warn!("{COST_OF_ALL}");
                }
            }
        }
        // Everything stands, or can be attached to with what is left.
        Keep::Tracing { writes: config.output.is_some(), ends: run.command.is_some() }.only();
        Ok(run)
    }

    /// Starts following a process. With `required`, not finding an allocator in it is an error.
    fn attach(&mut self, mut target: Target, required: bool) -> Result<()> {
        let id = target.id();
        self.symbols.look_through(id, target.process.through());
        self.symbols.add(id);
        let brk = program_break(target.process.through());
        {
            let mut core = self.collector.core();
            core.tell(Entry::AddProcess { tgid: id.tgid, start_time: id.start_time, time: monotonic_now() });
            if let Some(addr) = brk {
                core.tell(Entry::SetBreak { tgid: id.tgid, addr });
            }
            if self.config.children {
                core.follow_children(id.tgid);
            }
        }
        self.collector.wake();
        self.refresh_code(id, target.process.through());
        self.programs.add_target(id.tgid)?;
        if let Some(interval) = self.sampling.interval().filter(|interval| !interval.is_exact()) {
            self.sampler.set(&self.programs, id.tgid, interval);
        }
        self.governing.add(id);
        let attached = self.attach_allocators(&mut target, required);
        if target.notice_end() {
            // It ended while it was being attached to: the report says so.
            log::warn!("pid {} has ended", id.tgid);
        } else {
            attached?;
        }
        log::info!("tracing pid {}", id.tgid);
        target.sample(0.0, 0);
        self.targets.push(target);
        Ok(())
    }

    fn attach_allocators(&self, target: &mut Target, required: bool) -> Result<()> {
        if !self.config.resources.heap {
            return Ok(());
        }
        target.name_allocators(&self.config.allocators);
        target.attach_new(&self.programs)?;
        if required {
            target.require_named()?;
            target.require_allocator()?;
        }
        Ok(())
    }

    /// Starts the command, attached to each of its files as it is mapped.
    fn start_command(&mut self, command: &[std::ffi::OsString]) -> Result<()> {
        let spawned = Spawned::start(command, |tgid| match self.targets.first_mut() {
            None => {
                let target = Target::open(tgid, &self.files)?;
                self.attach(target, false)
            }
            Some(target) => {
                if let Err(error) = self.code.refresh(&mut self.programs, target.id(), tgid) {
                    log::debug!("pid {tgid}: its code cannot be looked at: {error:#}");
                }
                if self.config.resources.heap { target.attach_new(&self.programs) } else { Ok(()) }
            }
        })?;
        self.command = Some(spawned);
        if let Some(target) = self.targets.first_mut() {
            // The name was the tracer's own until exec.
            let _ = target.process.refresh();
            if self.config.resources.heap && !target.notice_end() {
                target.require_named()?;
                target.require_allocator()?;
            }
        }
        Ok(())
    }

    /// Follows the targets until there is a reason to end.
    async fn until_the_end(
        &mut self,
        output: &mut impl Sink,
        mut control: Control,
        resampled: &AtomicUsize,
    ) -> Result<Ended> {
        let stop = &mut control.stop;
        let (mut sampled, mut swept) = (Instant::now(), Instant::now());
        // The live view has something to show soon; a pipe gets one report each interval.
        let first = if output.is_live() { Duration::from_millis(500) } else { self.config.interval };
        let mut next_report = Instant::now() + first;
        loop {
            let watches = self.targets.is_empty() && self.system.as_ref().is_some_and(|system| !system.traces_all());
            let pause = if watches && !output.has_keys() { SLOW_TICK } else { TICK };
            let pause = self.governing.next().map_or(pause, |next| next.min(pause));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.changed() => return Ok(Ended::Interrupted),
            }
            if *stop.borrow() {
                return Ok(Ended::Interrupted);
            }
            if matches!(output.poll_input(Duration::ZERO)?, Some(Input::Quit)) {
                return Ok(Ended::Interrupted);
            }
            while let Some(Ok(config)) = control.changes.as_mut().map(mpsc::Receiver::try_recv) {
                self.go_on_with(&config);
                next_report = next_report.min(Instant::now() + self.config.interval);
            }
            self.take_notices();
            self.follow_threads(false);
            self.note_oom_kills();
            self.tend_system();
            self.resample(resampled.swap(0, Ordering::Relaxed));
            self.sampler.tend(&self.programs, &self.collector);
            self.govern();
            self.sample_within_memory();
            let now = Instant::now();
            if now.duration_since(sampled) >= SAMPLE_EVERY {
                sampled = now;
                let at = self.started.elapsed().as_secs_f64();
                let mut core = self.collector.core();
                for target in &mut self.targets {
                    let traced = core.ledger.process(target.id().tgid).map_or(0, |process| process.live().bytes);
                    target.sample(at, traced);
                }
                core.tell(Entry::Roll { time: monotonic_now() });
                drop(core);
                self.stay_within_memory();
            }
            if now.duration_since(swept) >= SWEEP_EVERY {
                swept = now;
                self.sweep();
                self.forget_ended_children();
            }
            if now >= next_report {
                next_report = now + self.config.interval;
                let mut report = self.report(None);
                if let Some(system) = self.system.as_mut().filter(|_| output.observes()) {
                    system.look_closer();
                    output.observe(&mut system.observed(), &mut report);
                }
                if output.interval(report)? == Outcome::Closed {
                    return Ok(Ended::OutputClosed);
                }
            }
            // Every one is asked: each notes its own end.
            let running = self.targets.iter_mut().map(|target| u32::from(!target.notice_end())).sum::<u32>();
            if running == 0 && self.system.is_none() {
                return Ok(Ended::TargetsExited);
            }
            if self.config.duration.is_some_and(|duration| self.started.elapsed() >= duration) {
                return Ok(Ended::Duration);
            }
        }
    }

    /// Takes over what of a new configuration can change while tracing goes on.
    fn go_on_with(&mut self, config: &Config) {
        self.config.to_mut().go_on_with(config);
        self.governing.set_budget(self.config.max_overhead);
        if let What::System { selection, .. } = &config.target {
            self.select((**selection).clone());
        }
    }

    /// Goes on to what all processes are to be sampled with after this.
    fn resample(&mut self, times: usize) {
        for _ in 0..times {
            let Some(next) = self.config.resample.get(self.resampled).copied() else { return };
            self.resampled += 1;
            self.sampling = next;
            if let Some(interval) = next.interval() {
                for target in &self.targets {
                    self.sampler.set(&self.programs, target.id().tgid, interval);
                }
            }
        }
    }

    /// Forgets what can be found again where too much memory is taken: names, and what was read to find them. What cannot, live
    /// blocks and stacks, has caps of its own.
    fn stay_within_memory(&mut self) {
        let share = self.config.max_memory / NAMES_SHARE;
        let is_high = crate::process::own_memory().is_some_and(|bytes| bytes > self.config.max_memory - share);
        if is_high && self.symbols.names_kept() > 0 {
            self.symbols.forget_names();
            crate::process::give_back_memory();
            self.names_dropped += 1;
        }
    }

    /// Where the live blocks come near to their cap, the process that has most of them is sampled from here on, or sampled more
    /// thinly, so that what is followed stays a fair part of all. Not where the user has said how densely.
    fn sample_within_memory(&mut self) {
        if self.config.sampling != Sampling::Auto || self.widened.is_some_and(|at| at.elapsed() < WIDEN_AGAIN_AFTER) {
            return;
        }
        let largest = {
            let core = self.collector.core();
            if core.ledger.live_blocks() < core.ledger.most_blocks() / 4 * 3 {
                return;
            }
            let live = |target: &Target| core.ledger.process(target.id().tgid).map_or(0, ProcessLedger::blocks);
            let running = self.targets.iter().filter(|target| target.ended.is_none());
            let Some(largest) = running.max_by_key(|target| live(target)).map(|target| target.id().tgid) else {
                return;
            };
            let total = core.ledger.process(largest).map(ProcessLedger::live).unwrap_or_default();
            (largest, total.bytes / total.count.max(1))
        };
        let (tgid, mean) = largest;
        // At first about one in eight of blocks of the usual size, then a quarter of that each time.
        let before = self.sampler.interval(tgid);
        let interval = Interval::near((before.bytes() * 4).max(mean.saturating_mul(8)));
        log::info!("pid {tgid}: sampled once in {} bytes, to stay within --max-memory", interval.bytes());
        self.sampler.set_least(&self.programs, tgid, interval);
        self.widened = Some(Instant::now());
        self.widenings += 1;
    }

    /// Does what the stream asked for.
    fn take_notices(&mut self) {
        let mut mapped: Vec<u32> = Vec::new();
        while let Ok(notice) = self.notices.try_recv() {
            match notice {
                Notice::Stack { tgid, id, op, end, frames } => {
                    let target = self.targets.iter().find(|target| target.id().tgid == tgid).map(Target::id);
                    if let Some(process) = target.or_else(|| Some(self.pages.watches(tgid)?.0)) {
                        if let Some(outermost) = frames.last() {
                            self.code.stack_ended(process, end, *outermost);
                        }
                        self.symbols.note(process, frames.iter().copied());
                    }
                    if op == leak_common::op::FAULT {
                        self.pages.stack(tgid, id, end, frames);
                    }
                }
                Notice::MapExec { tgid } => {
                    if let Some((process, through)) = self.pages.watches(tgid)
                        && !self.targets.iter().any(|target| target.id() == process)
                    {
                        self.symbols.mappings_changed(process);
                        self.refresh_code(process, through);
                    }
                    if let Some(target) = self.targets.iter().find(|target| target.id().tgid == tgid) {
                        self.symbols.mappings_changed(target.id());
                        if !mapped.contains(&tgid) {
                            mapped.push(tgid);
                        }
                    }
                }
                Notice::Fork { parent, child } => self.follow_child(parent, child),
                Notice::LeaderExit { tgid } => {
                    if let Some(target) = self.targets.iter_mut().find(|target| target.id().tgid == tgid) {
                        target.leader_ended = true;
                    }
                }
                Notice::Exec { tgid, tid, time } => {
                    self.sampler.exec(&self.programs, tgid, time);
                    self.pages.exec(tgid);
                    if let Some((process, through)) = self.pages.watches(tgid)
                        && !self.targets.iter().any(|target| target.id() == process)
                    {
                        self.symbols.exec(process);
                        self.refresh_code(process, through);
                    }
                    if let Some(target) = self.targets.iter_mut().find(|target| target.id().tgid == tgid) {
                        self.symbols.exec(target.id());
                        if let Err(error) = self.code.refresh(&mut self.programs, target.id(), target.id().tgid) {
                            log::debug!("pid {tgid}: its code cannot be looked at: {error:#}");
                        }
                        if let Err(error) = target.exec(&self.programs, tid == tgid)
                            && !target.notice_end()
                        {
                            log::warn!("pid {tgid} executed a new program and cannot be traced on: {error:#}");
                        }
                        if self.governing.keeps_out(target.id()) {
                            crate::attach::detach(target.detach());
                        }
                    }
                }
            }
        }
        for target in self.targets.iter_mut().filter(|target| mapped.contains(&target.id().tgid)) {
            let probed = !self.governing.keeps_out(target.id());
            refresh(target, &mut self.code, &mut self.programs, self.config.resources.heap && probed);
        }
        self.code.tend(&mut self.programs);
    }

    /// Sees to it that the process's stacks can be unwound. Where its mappings cannot be read its stacks end early, and say so.
    fn refresh_code(&mut self, id: ProcessId, through: u32) {
        if let Err(error) = self.code.refresh(&mut self.programs, id, through) {
            log::info!("pid {}: its code cannot be looked at: {error:#}", id.tgid);
        }
    }

    /// Goes on by other threads where those by which processes are traced have ended; without `all` only in processes whose
    /// first thread is known to have.
    fn follow_threads(&mut self, all: bool) {
        let Self { targets, symbols, programs, collector, governing, .. } = self;
        let targets = targets.iter_mut().filter(|target| target.ended.is_none() && !governing.keeps_out(target.id()));
        for target in targets.filter(|target| all || target.process.leader_has_ended() || target.leader_ended) {
            target.leader_ended = false;
            let followed = target.follow_threads(programs);
            match followed {
                Ok(Followed::AsBefore) => continue,
                Ok(Followed::Lost) => collector.core().probes_dropped(target.id().tgid),
                Err(error) if !target.notice_end() => {
                    log::warn!("pid {} may not be traced on: {error:#}", target.id().tgid);
                    collector.core().probes_dropped(target.id().tgid);
                }
                Ok(Followed::Moved) | Err(_) => {}
            }
            symbols.look_through(target.id(), target.process.through());
        }
    }

    /// Repairs what no event told of.
    fn sweep(&mut self) {
        self.programs.sync_clock();
        for target in &self.targets {
            if target.ended.is_none() {
                self.symbols.refresh(target.id());
            } else {
                self.code.forget(target.id());
            }
        }
        self.follow_threads(true);
        for target in self.targets.iter_mut().filter(|target| target.ended.is_none()) {
            let probed = !self.governing.keeps_out(target.id());
            refresh(target, &mut self.code, &mut self.programs, self.config.resources.heap && probed);
        }
    }

    /// Takes what is left in the ring and removes every probe. The final report is of the moment before that: removing perf events
    /// takes seconds, in which nothing is recorded, and a leak would seem to have stopped.
    fn detach(&mut self) {
        // Who ends now may be one of them.
        self.note_oom_kills();
        {
            let mut core = self.collector.core();
            let time = monotonic_now();
            self.cut = Some((Instant::now(), time));
            core.cut();
            core.tell(Entry::Roll { time });
        }
        let probes: Vec<_> = self.targets.iter_mut().flat_map(Target::detach).collect();
        let start = Instant::now();
        crate::attach::detach(probes);
        self.programs.detach_system();
        log::info!("detached in {:.0?}", start.elapsed());
        for target in &mut self.targets {
            target.notice_end();
            self.programs.remove_target(target.id().tgid);
        }
        self.take_notices();
    }

    /// Waits for the command, or ends it. Its status, if it ended by itself.
    fn end_command(&mut self) -> Result<Option<ExitStatus>> {
        let Some(command) = &mut self.command else { return Ok(None) };
        let status = command.end()?;
        Ok((!command.ended_by_us()).then_some(status))
    }

    /// The report as of now, or of the cut after it; with the reason for the end, the final one.
    fn report(&mut self, ended: Option<Ended>) -> Report {
        let (now, now_ns) = self.cut.unwrap_or_else(|| (Instant::now(), monotonic_now()));
        let moment = Moment { now: now_ns, start: self.start_ns };
        let mut snapshot = Snapshot::take(&self.collector.core(), moment, &self.config, |_| true);
        let usage = self.code.usage();
        let bytes = |rows: u32| u64::from(rows) * size_of::<u64>() as u64;
        let interval = self.sampling.interval().unwrap_or_else(|| self.sampler.longest());
        let mode = report::Mode {
            sampling: if interval.is_exact() { report::Sampling::Exact } else { report::Sampling::Bytes },
            interval_bytes: (!interval.is_exact()).then(|| interval.bytes()),
            unwinder: if self.code.has_tables() { report::Unwinder::Tables } else { report::Unwinder::Fp },
            unwind_table_bytes: usage.map(|usage| bytes(usage.rows)),
            unwind_memory_bytes: usage.map(|usage| bytes(usage.capacity)),
        };
        let mut report = Report::new(mode, self.host.clone());
        report.started_at = self.started_at;
        report.duration_s = now.duration_since(self.started).as_secs_f64();
        report.is_final = ended.is_some();
        report.ended = ended;
        report.events = snapshot.records();
        let (events, since) = if ended.is_some() { (0, self.started) } else { self.last_report };
        let seconds = now.duration_since(since).as_secs_f64();
        report.events_per_s = (seconds > 0.0).then(|| report.events.saturating_sub(events) as f64 / seconds);
        self.last_report = (report.events, now);
        (report.losses, report.counters) = snapshot.counters();
        if let Some(pushed_out) = usage.map(|usage| usage.pushed_out).filter(|&count| count > 0) {
            report.losses.insert("unwind_tables_pushed_out".to_owned(), pushed_out);
        }
        report.accounts = snapshot.accounts();
        if self.widenings > 0 {
            report.counters.insert("sampled_for_memory".to_owned(), self.widenings);
        }
        if self.sampler.addresses_dropped() > 0 {
            report.counters.insert("sampled_addresses_dropped".to_owned(), self.sampler.addresses_dropped());
        }
        if self.names_dropped > 0 {
            report.counters.insert("names_dropped".to_owned(), self.names_dropped);
        }
        report.processes =
            self.targets.iter().map(|target| snapshot.process(target, self.started, &mut self.symbols)).collect();
        summary::share_limits(&mut report.processes);
        for process in &mut report.processes {
            let interval = self.sampler.interval(process.pid);
            process.interval_bytes = (!interval.is_exact()).then(|| interval.bytes());
            process.overhead = self.governing.report(process.pid, interval);
        }
        report.memory = report::Memory {
            kernel_bytes: self.programs.kernel_bytes(),
            kernel_cap_bytes: self.config.kernel_memory,
            user_bytes: crate::process::own_memory(),
            user_cap_bytes: self.config.max_memory,
            names: self.symbols.names_kept() as u64,
            ..snapshot.memory()
        };
        report.processes.extend(self.ended_children.leaking.iter().cloned());
        if let Some(system) = self.system.take() {
            report.processes.extend(system.settled().cloned());
            let mut growing = self.report_pages(&system);
            // Of those the leak is told.
            let leaks = |pid| report.processes.iter().any(|p| p.pid == pid && p.verdict == report::Verdict::Leaking);
            growing.retain(|process| !leaks(process.pid));
            report.system = Some(report::System { growing, ..system.report(&self.targets) });
            self.system = Some(system);
        }
        report.oom_kills = self.oom_kills.reports();
        report.ended_processes = self.ended_children.sums.values().cloned().collect();
        report.command = self.describe_command();
        if let (Some(command), Some(process)) = (&report.command, report.processes.first_mut())
            && let Some(end) = &mut process.ended
        {
            (end.exit_code, end.signal) = (command.exit_code, command.signal);
        }
        report.sort();
        report
    }

    fn describe_command(&mut self) -> Option<report::Command> {
        let What::Command(args) = &self.config.target else { return None };
        let command = self.command.as_mut()?;
        let status = command.status();
        Some(report::Command {
            args: args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            pid: command.id(),
            exit_code: status.and_then(|status| status.code()),
            signal: status.and_then(|status| status.signal()),
        })
    }
}

/// Attaches to what a process has mapped since the last time.
fn refresh(target: &mut Target, code: &mut Code, programs: &mut Programs, heap: bool) {
    // Its tables first, so that the new code's first allocation has its stack.
    if let Err(error) = code.refresh(programs, target.id(), target.process.through()) {
        log::debug!("pid {}: its code cannot be looked at: {error:#}", target.id().tgid);
    }
    if heap
        && let Err(error) = target.attach_new(programs)
        && !target.notice_end()
    {
        log::warn!("pid {}: new mappings cannot be traced: {error:#}", target.id().tgid);
    }
}

/// Where the program break stands: the end of the `[heap]` mapping, which is the break rounded up to a page.
fn program_break(pid: u32) -> Option<u64> {
    let maps = std::fs::read(format!("/proc/{pid}/maps")).ok()?;
    crate::discover::maps::parse(&maps).find(|mapping| mapping.path == b"[heap]").map(|mapping| mapping.end)
}

/// Before 5.11 BPF maps counted against the locked memory limit; root may raise it.
fn raise_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        log::debug!("the locked memory limit cannot be raised: {error}");
    }
}

/// Sends the BPF programs' own messages to our log.
fn forward_logs(programs: &mut Programs) {
    if !log::log_enabled!(log::Level::Debug) {
        return;
    }
    let registered = programs.forward_logs().and_then(|logger| {
        // SAFETY: the logger owns its descriptor and keeps it open for as long as it lives.
        unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
            .map_err(std::io::Error::from)
            .context("failed to wait for it")
    });
    match registered {
        Ok(mut logger) => {
            tokio::spawn(async move {
                while let Ok(mut ready) = logger.readable_mut().await {
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
            });
        }
        Err(error) => log::debug!("the BPF programs' messages are not shown: {error:#}"),
    }
}

/// Gives the terminal back without waiting for the live view to do it.
fn restore_terminal() {
    use crossterm::terminal::{LeaveAlternateScreen, disable_raw_mode, is_raw_mode_enabled};
    if is_raw_mode_enabled().unwrap_or(false) {
        // There is nobody left to tell if that fails.
        let _ = crossterm::execute!(std::io::stdout(), LeaveAlternateScreen, crossterm::cursor::Show);
        let _ = disable_raw_mode();
    }
}

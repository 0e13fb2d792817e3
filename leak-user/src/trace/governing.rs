//! Does what the [`governor`](crate::governor) decides: measures each traced process, sets its interval, opens and closes its
//! windows, lets it go.

use std::io::Read as _;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use leak_common::sampling::Interval;
use procfs::CurrentSI as _;

use super::Run;
use super::target::Target;
use crate::attach::TrapCosts;
use crate::config::{self, Config, Sampling};
use crate::governor::windows::Plan;
use crate::governor::{Costs, Governor, Level, Limits, Look};
use crate::ledger::ProcessLedger;
use crate::losses::monotonic_now;
use crate::process::ProcessId;
use crate::report;

/// Between two looks at a process that is new, or was treated in another way lately; and at any other.
const SOON: Duration = Duration::from_millis(100);
const LATER: Duration = Duration::from_secs(1);
/// For how long it counts as new.
const NEW: Duration = Duration::from_secs(5);

/// One process that is governed.
struct Governed {
    id: ProcessId,
    governor: Governor,
    clock: Option<libc::clockid_t>,
    /// The last of its processor time that was read, nanoseconds.
    cpu_ns: f64,
    began: Instant,
    looked: Option<Instant>,
    changed: Instant,
    watching: Option<Watching>,
    reference_ns: f64,
    /// The host's idle time when it was read last, nanoseconds.
    idle_ns: f64,
}

/// A process that is watched in windows.
struct Watching {
    plan: Plan,
    /// When the next window begins, and when the last of those that are open ends; nanoseconds of `CLOCK_MONOTONIC`.
    next: u64,
    ends: Option<u64>,
    /// Nanoseconds that breakpoints stood.
    stood: u64,
    since: u64,
    attached_at: u64,
    windows: u64,
}

/// Looks after the overhead of all traced processes.
pub(super) struct Governing {
    budget: Option<config::Overhead>,
    sampling: Sampling,
    measuring: Option<JoinHandle<Result<TrapCosts>>>,
    costs: Costs,
    processes: Vec<Governed>,
    random: u64,
}

impl Governing {
    /// Begins to measure what breakpoints cost; meanwhile usual values are taken.
    pub fn start(config: &Config) -> Self {
        let budget = config.max_overhead;
        let measure = || std::thread::Builder::new().name("trap costs".to_owned()).spawn(TrapCosts::measure).ok();
        let mut seed = [0_u8; 8];
        let seeded = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed));
        if let Err(error) = seeded {
            log::debug!("windows are timed by the clock's last bits: {error}");
            seed = monotonic_now().to_ne_bytes();
        }
        Self {
            budget,
            sampling: config.sampling,
            measuring: budget.and_then(|_| measure()),
            costs: Costs::default(),
            processes: Vec::new(),
            random: u64::from_ne_bytes(seed) | 1,
        }
    }

    /// A process is traced from now on.
    pub fn add(&mut self, id: ProcessId) {
        let Some(budget) = self.budget else { return };
        let begin = match self.sampling {
            Sampling::Auto | Sampling::Exact => Interval::EXACT,
            Sampling::Every(interval) => interval,
        };
        let limits = Limits { budget: budget.share, begin, may_sample: self.sampling != Sampling::Exact };
        self.processes.retain(|process| process.id != id);
        self.processes.push(Governed {
            id,
            governor: Governor::new(limits, self.costs),
            clock: processor_clock(id.tgid),
            cpu_ns: 0.0,
            began: Instant::now(),
            looked: None,
            changed: Instant::now(),
            watching: None,
            reference_ns: 0.0,
            idle_ns: idle().unwrap_or(0.0),
        });
    }

    /// What tracing may cost from now on. Whether that is governed at all is decided at the start.
    pub fn set_budget(&mut self, budget: Option<config::Overhead>) {
        let (Some(_), Some(budget)) = (self.budget, budget) else { return };
        self.budget = Some(budget);
        for process in &mut self.processes {
            process.governor.set_budget(budget.share);
        }
    }

    /// It is traced no longer.
    pub fn forget(&mut self, id: ProcessId) {
        self.processes.retain(|process| process.id != id);
    }

    /// When something is next to be done in time.
    pub fn next(&self) -> Option<Duration> {
        let now = monotonic_now();
        let next = |watching: &Watching| watching.ends.map_or(watching.next, |ends| ends.min(watching.next));
        let next = self.processes.iter().filter_map(|process| process.watching.as_ref()).map(next).min()?;
        Some(Duration::from_nanos(next.saturating_sub(now)))
    }

    /// Whether the heap of this process is not probed at the moment, though it is traced.
    pub fn keeps_out(&self, id: ProcessId) -> bool {
        self.processes.iter().find(|process| process.id == id).is_some_and(|process| {
            matches!(process.governor.level(), Level::Released)
                || process.watching.as_ref().is_some_and(|watching| watching.ends.is_none())
        })
    }

    /// What a report says of a process.
    pub fn report(&self, tgid: u32, interval: Interval) -> Option<report::Overhead> {
        let budget = self.budget?;
        let process = self.processes.iter().find(|process| process.id.tgid == tgid)?;
        let level = process.governor.level();
        let duty = match (level, &process.watching) {
            (Level::Released, _) => 0.0,
            (Level::Windows(duty), None) => duty,
            (Level::Windows(_), Some(watching)) => watching.duty(),
            _ => 1.0,
        };
        Some(report::Overhead {
            budget_percent: budget.share * 100.0,
            of: if budget.of_processor { "processor" } else { "process" }.to_owned(),
            measured_percent: process.governor.measured() * 100.0,
            duty,
            interval_bytes: (!interval.is_exact()).then(|| interval.bytes()),
            state: level.name().to_owned(),
            reason: process.governor.reason().to_owned(),
        })
    }

    fn uniform(&mut self) -> f64 {
        // xorshift64*: G. Marsaglia, "Xorshift RNGs", J. Stat. Softw. 8 (2003); S. Vigna 2016.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        ((self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 + 1.0) / 9_007_199_254_740_993.0
    }
}

impl Watching {
    fn duty(&self) -> f64 {
        let now = monotonic_now();
        let open = self.ends.map_or(0, |_| now.saturating_sub(self.attached_at));
        (self.stood + open) as f64 / (now.saturating_sub(self.since) as f64).max(1.0)
    }
}

/// The clock of a process's processor time, all threads together.
fn processor_clock(pid: u32) -> Option<libc::clockid_t> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: room for the result.
    (unsafe { libc::clock_getcpuclockid(pid as i32, &raw mut clock) } == 0).then_some(clock)
}

/// For how long the host's processors were idle, all together, in nanoseconds since it was started; whole ticks.
fn idle() -> Option<f64> {
    procfs::KernelStats::current().ok().map(|stats| stats.total.idle_ms() as f64 * 1e6)
}

/// Nanoseconds of a clock.
fn read(clock: libc::clockid_t) -> Option<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for the result.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    (result == 0).then_some(time.tv_sec as f64 * 1e9 + time.tv_nsec as f64)
}

impl Run<'_> {
    /// Looks after the overhead; to be called often.
    pub(super) fn govern(&mut self) {
        if self.governing.budget.is_none() {
            return;
        }
        self.take_costs();
        let mut processes = std::mem::take(&mut self.governing.processes);
        let mut given_up = Vec::new();
        let shared = processes.len().max(1) as f64;
        for process in &mut processes {
            let is_it = |target: &Target| target.id() == process.id && target.ended.is_none();
            let Some(place) = self.targets.iter().position(is_it) else {
                process.watching = None;
                continue;
            };
            self.tend_windows(process, place);
            let now = Instant::now();
            let is_new = process.began.elapsed() < NEW || process.changed.elapsed() < NEW;
            let every = if is_new { SOON } else { LATER };
            if process.looked.is_some_and(|looked| now.duration_since(looked) < every) {
                continue;
            }
            let seconds = process.looked.map_or(0.0, |looked| now.duration_since(looked).as_secs_f64());
            process.looked = Some(now);
            if let Some(level) = self.look(process, seconds, shared) {
                process.changed = now;
                log::info!("pid {}: {}, because {}", process.id.tgid, level.name(), process.governor.reason());
                self.change(process, place, level);
                if level == Level::Released {
                    given_up.push((process.id, process.governor.reason().to_owned()));
                }
            }
        }
        self.governing.processes = processes;
        for (id, why) in given_up {
            self.give_up(id, why);
        }
    }

    /// The measured costs, once they are there.
    fn take_costs(&mut self) {
        if !self.governing.measuring.as_ref().is_some_and(JoinHandle::is_finished) {
            return;
        }
        match self.governing.measuring.take().map(JoinHandle::join) {
            Some(Ok(Ok(traps))) => {
                log::info!(
                    "a breakpoint costs {:.0} ns, a return {:.0}, a step {:.0}",
                    traps.entry,
                    traps.ret,
                    traps.stepped
                );
                self.governing.costs = Costs::of_traps(traps.entry, traps.stepped, traps.ret);
                for process in &mut self.governing.processes {
                    process.governor.set_costs(self.governing.costs);
                }
            }
            Some(Ok(Err(error))) => log::warn!("the cost of breakpoints is assumed, not measured: {error:#}"),
            Some(Err(_)) | None => {}
        }
    }

    /// Measures a process, `seconds` after the last time.
    fn look(&self, process: &mut Governed, seconds: f64, shared: f64) -> Option<Level> {
        let tgid = process.id.tgid;
        let cpu_ns = process.clock.and_then(read).unwrap_or(process.cpu_ns);
        let budget = self.governing.budget?;
        let (taken, idle_ns) = (cpu_ns - process.cpu_ns, idle().unwrap_or(process.idle_ns));
        // Of a budget of one processor each process gets the same part. A process that takes less than one while the host has time to
        // spare has that share of one: otherwise whatever rests most of the time could not be followed, though nothing waits for it.
        process.reference_ns += if budget.of_processor {
            seconds * 1e9 / shared
        } else {
            taken + (seconds * 1e9 - taken).clamp(0.0, (idle_ns - process.idle_ns).max(0.0))
        };
        process.idle_ns = idle_ns;
        process.cpu_ns = cpu_ns;
        let hits = self.programs.hits(tgid).unwrap_or_default();
        // While everything is followed, each return is an allocation.
        let is_exact = self.sampler.interval(tgid).is_exact() && process.watching.is_none();
        let mean_size = (is_exact && hits.returns > 0).then(|| {
            let core = self.collector.core();
            let stacks = core.ledger.process(tgid).into_iter().flat_map(ProcessLedger::stacks);
            stacks.map(|stack| stack.history.allocated_bytes() as f64).sum::<f64>() / hits.returns as f64
        });
        let windows = process.watching.as_ref().map_or(0, |watching| watching.windows);
        let in_window = process.watching.as_ref().is_some_and(|watching| watching.ends.is_some());
        let time = process.began.elapsed().as_secs_f64();
        process.governor.look(Look {
            time,
            cpu_ns,
            reference_ns: process.reference_ns,
            hits,
            windows,
            in_window,
            mean_size,
        })
    }

    fn change(&mut self, process: &mut Governed, place: usize, level: Level) {
        let tgid = process.id.tgid;
        match level {
            Level::Exact => self.sampler.set(&self.programs, tgid, Interval::EXACT),
            Level::Sampled(interval) => self.sampler.set(&self.programs, tgid, interval),
            Level::Windows(_) => {
                let Some(plan) = process.governor.plan() else { return };
                if let Some(watching) = &mut process.watching {
                    watching.plan = plan;
                    watching.next = monotonic_now() + plan.wait(self.governing.uniform());
                    return;
                }
                // While all breakpoints stand: they go one by one, and what is seen meanwhile does not fit together.
                // Nothing of the rest counts: no window can see what happens in it.
                let now = monotonic_now() + (process.governor.rest() * 1e9) as u64;
                self.collector.core().watch_in_windows(tgid, now);
                crate::attach::detach(self.targets[place].detach());
                self.sampler.set(&self.programs, tgid, Interval::EXACT);
                let next = now + plan.wait(self.governing.uniform());
                process.watching =
                    Some(Watching { plan, next, ends: None, stood: 0, since: now, attached_at: now, windows: 0 });
            }
            Level::Released => {
                process.watching = None;
                {
                    let mut core = self.collector.core();
                    if !core.is_watched_in_windows(tgid) {
                        core.watch_in_windows(tgid, monotonic_now());
                    }
                }
                crate::attach::detach(self.targets[place].detach());
            }
        }
    }

    /// Opens and closes windows.
    fn tend_windows(&mut self, process: &mut Governed, place: usize) {
        let Some(watching) = &mut process.watching else { return };
        let tgid = process.id.tgid;
        let now = monotonic_now();
        while watching.next <= now {
            if watching.ends.is_none() {
                watching.attached_at = monotonic_now();
                if let Err(error) = self.targets[place].attach_again(&self.programs) {
                    log::info!("pid {tgid}: a window is left out: {error:#}");
                    watching.next = now + watching.plan.wait(self.governing.uniform());
                    break;
                }
            }
            // Only when all of them stand.
            let begin = monotonic_now();
            self.collector.core().open_window(tgid, begin, watching.plan);
            watching.windows += 1;
            watching.ends = Some(begin + watching.plan.length);
            watching.next += watching.plan.wait(self.governing.uniform());
        }
        let end = monotonic_now();
        if let Some(ends) = watching.ends
            && end >= ends
        {
            self.collector.core().close_windows(tgid, ends);
            crate::attach::detach(self.targets[place].detach());
            watching.ends = None;
            let now = monotonic_now();
            watching.stood += now.saturating_sub(watching.attached_at);
            let ms = |from: u64, to: u64| to.saturating_sub(from) / 1_000_000;
            log::debug!(
                "pid {tgid}: a window: {} ms from the first breakpoint on, {} ms too long, {} ms to take them out",
                ms(watching.attached_at, end),
                ms(ends, end),
                ms(end, now)
            );
        }
    }
}

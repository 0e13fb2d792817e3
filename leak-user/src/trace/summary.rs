//! Fills the report: judges every stack while the ledger is held, names those that are listed once it is not.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use leak_common::op;

use super::collector::Core;
use super::target::Target;
use super::windowed::Windowed;
use crate::config::Config;
use crate::decode::{self, StackId};
use crate::detect::{self, Evidence, Growth, Judgement, ProcessVerdict, Sample, StackSummary, Verdict};
use crate::governor::windows::MIN_WINDOWS;
use crate::ledger::history::{BASE_WINDOW_NS, History, Window};
use crate::ledger::{Counters, Resource, Sampled, SampledTotals, Stack, Total};
use crate::process::MemoryLimit;
use crate::report;
use crate::symbols::Symbols;

/// Counters of what is no loss: calls that were rightly left out, and frees that were kept aside and are therefore known.
const NO_LOSS: [&str; 12] = [
    "allocations_failed",
    "calls_abandoned",
    "calls_nested",
    "frames_reused",
    "frames_unwound",
    "frees_kept_aside_applied",
    "frees_kept_aside_stale",
    "frees_of_older_blocks",
    "frees_ring_full",
    "records_of_unknown_processes",
    "returns_unpaired",
    "sizes_overflowed",
];

/// A judged stack without names.
struct Judged {
    id: StackId,
    resource: Resource,
    op: u8,
    frames: Vec<u64>,
    end: decode::StackEnd,
    by_frame_pointers: bool,
    judgement: Judgement,
    live_bytes: u64,
    live_count: u64,
    allocated_bytes: u64,
    /// Not known where the process is watched in windows.
    allocated_count: Option<u64>,
    freed_bytes: u64,
    sampled: SampledTotals,
    oldest_age_s: Option<f64>,
    /// The part of what it allocated that is known for certain, 0 to 1.
    certain: f64,
    by_windows: bool,
    series: Vec<(f64, u64)>,
}

/// A process's part of the ledger, judged.
struct JudgedProcess {
    live_bytes: u64,
    live_count: u64,
    sampled: Sampled,
    stacks_seen: u64,
    growing_stacks: u64,
    growing_bytes_per_s: f64,
    affected_by_loss: bool,
    summaries: Vec<StackSummary>,
    /// Whether the heap is estimated from windows.
    by_windows: bool,
    /// Those that will be listed.
    stacks: Vec<Judged>,
}

/// Everything that is taken out of the ledger at one moment.
pub struct Snapshot {
    processes: Vec<(u32, JudgedProcess)>,
    counters: Counters,
    kernel: BTreeMap<String, u64>,
    memory: report::Memory,
    records: u64,
    undecodable: u64,
    notices_dropped: u64,
    probes_dropped: u64,
}

/// When the ledger is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub now: u64,
    /// The same, when tracing started.
    pub start: u64,
}

impl Snapshot {
    /// Judges all stacks of the processes that are `wanted`. The core is locked meanwhile: a few microseconds a stack.
    pub fn take(core: &Core, moment: Moment, config: &Config, wanted: impl Fn(u32) -> bool) -> Self {
        let now = core.ledger.window(moment.now);
        // Windows are numbered from the ledger's first time.
        let origin = core.ledger.first_time().unwrap_or(moment.start);
        let since_start = (origin as f64 - moment.start as f64) / 1e9;
        let kernel = core.kernel_counters();
        let seen = seen(&core.ledger.counters(), &kernel);
        let processes = core
            .ledger
            .processes()
            .filter(|process| wanted(process.tgid()))
            .map(|process| {
                let live = Live { total: process.live(), sampled: process.sampled().live };
                let stacks = process.stacks().filter(|stack| is_wanted(stack, config));
                let tgid = process.tgid();
                let doubted = process.distrusted().count > 0 || process.was_distrusted();
                let Some(windowed) = core.windowed(tgid) else {
                    let mut judged = judge(stacks, now, since_start, live, seen, config);
                    judged.affected_by_loss |= doubted;
                    return (tgid, judged);
                };
                // What the ledger holds of the heap is of before.
                let stacks = stacks.filter(|stack| stack.resource != Resource::Heap);
                let nothing = Live { total: Total::default(), sampled: Sampled::default() };
                let mut judged = judge(stacks, now, since_start, nothing, seen, config);
                judged.affected_by_loss |= doubted;
                if config.resources.heap {
                    judged.add_windows(windowed, moment.now, config);
                }
                (tgid, judged)
            })
            .collect();
        Self {
            processes,
            counters: core.ledger.counters(),
            kernel,
            memory: report::Memory {
                blocks: core.ledger.live_blocks() as u64,
                blocks_cap: core.ledger.most_blocks() as u64,
                stacks: core.ledger.stacks().0 as u64,
                stacks_cap: core.ledger.stacks().1 as u64,
                ..report::Memory::default()
            },
            records: core.records,
            undecodable: core.undecodable,
            notices_dropped: core.notices_dropped,
            probes_dropped: core.probes_dropped,
        }
    }

    /// What became of the blocks that were seen.
    pub fn accounts(&self) -> report::Accounts {
        let Counters { blocks, ended, not_kept, .. } = self.counters;
        report::Accounts { allocated: blocks, live: self.memory.blocks, ended, not_kept }
    }

    /// What the ledger holds, of what it may.
    pub fn memory(&self) -> report::Memory {
        self.memory
    }

    /// Records taken from the ring since the start.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Counters that are not zero: what was lost, and what was met besides.
    pub fn counters(&self) -> (BTreeMap<String, u64>, BTreeMap<String, u64>) {
        let c = &self.counters;
        let own = [
            ("frees_inferred", c.replaced),
            ("calls_without_end", c.pending_replaced),
            ("unmaps_not_restorable", c.pending_forgotten),
            ("stacks_missing", c.stacks_missing),
            ("stacks_over_cap", c.stacks_capped),
            ("blocks_over_cap", c.live_capped),
            ("live_sets_distrusted", c.distrusts),
            ("sampled_blocks_unfollowed", c.unfollowed),
            ("distrusted_bytes", c.distrusted.bytes),
            ("records_undecodable", self.undecodable),
            ("notices_dropped", self.notices_dropped),
            ("probes_dropped_by_kernel", self.probes_dropped),
            ("frees_of_older_blocks", c.free_of_unknown),
            ("frees_kept_aside_applied", c.missed_free_applied),
            ("frees_kept_aside_stale", c.missed_free_stale),
            ("records_of_unknown_processes", c.unknown_process),
        ];
        let own = own.into_iter().map(|(name, count)| (name.to_owned(), count));
        let all = self.kernel.clone().into_iter().chain(own).filter(|(_, count)| *count > 0);
        all.partition(|(name, _)| !NO_LOSS.contains(&name.as_str()))
    }

    /// What is thought of one process.
    pub fn verdict(&self, target: &Target) -> ProcessVerdict {
        let judged = self.processes.iter().find(|(of, _)| *of == target.id().tgid);
        let summaries = judged.map_or_else(Vec::new, |(_, judged)| judged.agreed(&target.samples).0);
        detect::judge_process(&target.samples, &summaries, None).verdict
    }

    /// The report's entry of one process.
    pub fn process(&mut self, target: &Target, started: Instant, symbols: &mut Symbols) -> report::Process {
        let tgid = target.id().tgid;
        let mut judged = self.processes.iter_mut().find(|(of, _)| *of == tgid).map(|(_, judged)| judged);
        let limit = target.memory_limit.as_ref();
        if let Some(judged) = &mut judged {
            let (summaries, agrees) = judged.agreed(&target.samples);
            judged.summaries = summaries;
            if !agrees {
                judged.retract();
            }
        }
        let summaries = judged.as_ref().map_or(&[][..], |judged| &judged.summaries);
        let verdict = detect::judge_process(&target.samples, summaries, limit.map(MemoryLimit::bytes));
        let grows = verdict.growth_bytes_per_s.filter(|_| target.ended.is_none());
        let used = grows.and_then(|_| limit?.used());
        let left = used.and_then(|used| Some(limit?.bytes().saturating_sub(used) as f64));
        let stacks = judged.as_mut().map_or_else(Vec::new, |judged| std::mem::take(&mut judged.stacks));
        let stacks = stacks.into_iter().map(|stack| stack.report(target, symbols)).collect();
        let enough = target.samples.len() >= 3;
        report::Process {
            pid: tgid,
            comm: target.process.comm.clone(),
            exe: target.process.exe.as_ref().map(|exe| exe.to_string_lossy().into_owned()),
            cgroup: target.process.cgroup.clone(),
            labels: target.labels.clone(),
            reason: target.reason.clone(),
            baseline: None,
            affected_by_loss: judged.as_ref().is_some_and(|judged| judged.affected_by_loss),
            verdict: match verdict.verdict {
                ProcessVerdict::Leaking => report::Verdict::Leaking,
                ProcessVerdict::Plateau => report::Verdict::Plateau,
                ProcessVerdict::Spike => report::Verdict::Spike,
                ProcessVerdict::Stable => report::Verdict::Stable,
                ProcessVerdict::Warming => report::Verdict::Warming,
            },
            // Before there is a verdict there is nothing that the resident set could contradict.
            hint: verdict.hint.filter(|_| verdict.verdict != ProcessVerdict::Warming).map(|hint| hint.to_string()),
            live_bytes: judged.as_ref().map_or(0, |judged| judged.live_bytes),
            live_count: judged.as_ref().map_or(0, |judged| judged.live_count),
            interval_bytes: None,
            overhead: None,
            live_bytes_ci95: judged.as_ref().and_then(|judged| bytes_ci95(judged.live_bytes, &judged.sampled)),
            live_count_ci95: judged.as_ref().and_then(|judged| count_ci95(judged.live_count, &judged.sampled)),
            rss: report::Rss {
                first_bytes: target.samples.first().map(|sample| sample.resident),
                last_bytes: target.samples.last().map(|sample| sample.resident),
                growth_bytes_per_s: enough.then_some(verdict.rss_bytes_per_s),
            },
            explained_growth_ratio: verdict.explained_growth_ratio,
            memory_limit_bytes: limit.map(MemoryLimit::bytes),
            memory_limit_of: limit.and_then(MemoryLimit::group).map(|group| group.to_string_lossy().into_owned()),
            memory_used_bytes: used,
            // Others may have their part of the limit.
            seconds_to_limit: left.zip(grows).map(|(left, rate)| left / rate).or(verdict.seconds_to_limit),
            allocators: target.allocators(),
            ended: target.ended.map(|at| report::ProcessEnd {
                at_s: at.duration_since(started).as_secs_f64(),
                exit_code: None,
                signal: None,
            }),
            stacks_seen: judged.as_ref().map_or(0, |judged| judged.stacks_seen),
            growing_stacks: judged.as_ref().map_or(0, |judged| judged.growing_stacks),
            growing_bytes_per_s: judged
                .as_ref()
                .filter(|judged| judged.growing_stacks > 0)
                .map(|judged| judged.growing_bytes_per_s),
            stacks,
        }
    }
}

/// Where several processes grow towards one limit, they meet it together.
pub fn share_limits(processes: &mut [report::Process]) {
    let left = |process: &report::Process| {
        process.memory_limit_bytes.zip(process.memory_used_bytes).map(|(limit, used)| limit.saturating_sub(used) as f64)
    };
    let mut rates: BTreeMap<(Option<String>, Option<u64>), f64> = BTreeMap::new();
    let key = |process: &report::Process| (process.memory_limit_of.clone(), process.memory_limit_bytes);
    for process in &*processes {
        if let Some((left, seconds)) = left(process).zip(process.seconds_to_limit.filter(|seconds| *seconds > 0.0)) {
            *rates.entry(key(process)).or_default() += left / seconds;
        }
    }
    for process in processes {
        if let Some((left, rate)) = left(process).zip(rates.get(&key(process)).copied().filter(|rate| *rate > 0.0))
            && process.seconds_to_limit.is_some()
        {
            process.seconds_to_limit = Some(left / rate);
        }
    }
}

impl JudgedProcess {
    /// Adds the heap as it is estimated from windows.
    fn add_windows(&mut self, windowed: &Windowed, now: u64, config: &Config) {
        let seconds = windowed.seconds(now);
        let watched = seconds >= f64::from(detect::MIN_WATCH) && windowed.count() >= MIN_WINDOWS;
        let mut heap = windowed.estimates();
        heap.sort_by(|(a, ea, ..), (b, eb, ..)| eb.bytes.total_cmp(&ea.bytes).then_with(|| a.cmp(b)));
        self.by_windows = true;
        for (rank, (id, estimate, seen, sent)) in heap.into_iter().enumerate() {
            let grows = watched && estimate.grows();
            let verdict = match (watched, grows) {
                (false, _) => Verdict::Warming,
                (true, true) => Verdict::Growing,
                (true, false) if estimate.waits() => Verdict::Warming,
                (true, false) => Verdict::Stable,
            };
            let (low, high) = estimate.bytes_ci95();
            let growth = grows.then(|| Growth {
                bytes_per_s: estimate.bytes / seconds,
                ci95: (low / seconds, high / seconds),
                confidence: 1.0 - estimate.chance(),
                windows: estimate.windows,
                window_s: 1,
            });
            let judgement = Judgement { verdict, growth, evidence: Evidence::default() };
            let (bytes, blocks) = (estimate.bytes.max(0.0), estimate.blocks.max(0.0));
            self.summaries.push(StackSummary::new(&judgement, bytes as u64, bytes as u64));
            self.growing_stacks += u64::from(grows);
            self.growing_bytes_per_s += growth.map_or(0.0, |growth| growth.bytes_per_s);
            self.live_bytes += bytes as u64;
            self.live_count += blocks as u64;
            let live = Sampled {
                seen: u64::from(estimate.windows),
                bytes,
                bytes_variance: estimate.bytes_error.powi(2),
                count: blocks,
                count_variance: estimate.blocks_error.powi(2),
            };
            self.sampled = self.sampled.and(&live);
            if rank >= config.top.max(LISTED) {
                continue;
            }
            self.stacks_seen += u64::from(bytes > 0.0);
            self.stacks.push(Judged {
                id,
                resource: Resource::Heap,
                op: sent.map_or(0, |sent| sent.op),
                frames: sent.map_or_else(Vec::new, |sent| sent.frames.to_vec()),
                end: sent.map_or(decode::StackEnd::Unknown, |sent| sent.end),
                by_frame_pointers: sent.is_some_and(|sent| sent.by_frame_pointers),
                judgement,
                live_bytes: bytes as u64,
                live_count: blocks as u64,
                allocated_bytes: seen.allocated_bytes,
                allocated_count: None,
                freed_bytes: seen.freed_bytes,
                sampled: SampledTotals { live, ..SampledTotals::default() },
                oldest_age_s: None,
                // What a window lost is not part of it.
                certain: 1.0,
                by_windows: true,
                series: Vec::new(),
            });
        }
    }

    /// The stacks, as far as the resident set agrees, and whether it does. In a window the process is slowed down, parts of it more
    /// than others: were its releases delayed beyond the window, and its allocations not, all would seem to pile up. What really does is
    /// seen in the resident set sooner or later, with nothing to slow that down.
    fn agreed(&self, samples: &[Sample]) -> (Vec<StackSummary>, bool) {
        let rises = || detect::judge_process(samples, &[], None).explained_growth_ratio.is_some();
        if !self.by_windows || rises() {
            return (self.summaries.clone(), true);
        }
        let waits = |summary: &StackSummary| match summary.verdict {
            Verdict::Growing => StackSummary { verdict: Verdict::Warming, growth_bytes_per_s: 0.0, ..*summary },
            _ => *summary,
        };
        (self.summaries.iter().map(waits).collect(), false)
    }

    /// Growth that the resident set does not confirm is not called so.
    fn retract(&mut self) {
        self.growing_stacks = 0;
        self.growing_bytes_per_s = 0.0;
        for stack in self.stacks.iter_mut().filter(|stack| stack.judgement.verdict == Verdict::Growing) {
            stack.judgement = Judgement { verdict: Verdict::Warming, growth: None, ..stack.judgement };
        }
    }
}

/// What a process holds.
#[derive(Clone, Copy)]
struct Live {
    total: Total,
    sampled: Sampled,
}

/// The 95 % interval of bytes of which a part is estimated; none where all of it is known.
fn bytes_ci95(total: u64, sampled: &Sampled) -> Option<[u64; 2]> {
    (sampled.seen > 0).then(|| detect::around(total, sampled.bytes, sampled.bytes_variance))
}

/// The same of a number of blocks.
fn count_ci95(total: u64, sampled: &Sampled) -> Option<[u64; 2]> {
    (sampled.seen > 0).then(|| detect::around(total, sampled.count, sampled.count_variance))
}

/// Whether a stack is reported at all under the options given.
fn is_wanted(stack: &Stack<'_>, config: &Config) -> bool {
    let resource = match stack.resource {
        Resource::Heap => config.resources.heap,
        Resource::Mmap => config.resources.mmap,
    };
    let old_enough = config.older_than.is_zero() || {
        let windows = config.older_than.as_nanos().div_ceil(u128::from(BASE_WINDOW_NS)).saturating_sub(1);
        stack.history.bytes_older_than(Window::try_from(windows).unwrap_or(Window::MAX)) > 0
    };
    resource && old_enough
}

fn judge<'a>(
    stacks: impl Iterator<Item = Stack<'a>>,
    now: Window,
    since_start: f64,
    live: Live,
    seen: f64,
    config: &Config,
) -> JudgedProcess {
    let mut all: Vec<(Stack<'a>, Judgement)> = stacks.map(|stack| (stack, detect::judge(stack.history, now))).collect();
    let summaries: Vec<StackSummary> = all
        .iter()
        .map(|(stack, judgement)| StackSummary::new(judgement, stack.history.live_bytes(), stack.history.peak().0))
        .collect();
    let growing = summaries.iter().filter(|summary| summary.verdict == Verdict::Growing);
    let (growing_stacks, growing_bytes_per_s) =
        growing.fold((0, 0.0), |(count, rate), summary| (count + 1, rate + summary.growth_bytes_per_s));
    // Worst first, as the report sorts them: only what it lists is worth its series and names.
    let rate = |judgement: &Judgement| judgement.growth.map_or(0.0, |growth| growth.bytes_per_s);
    all.sort_by(|(a, ja), (b, jb)| {
        rate(jb).total_cmp(&rate(ja)).then_with(|| b.history.live_bytes().cmp(&a.history.live_bytes()))
    });
    let listed = all
        .iter()
        .filter(|(stack, judgement)| stack.history.live_bytes() > 0 || judgement.verdict != Verdict::Stable)
        .take(config.top.max(LISTED))
        .map(|(stack, judgement)| Judged::new(stack, judgement, now, since_start, seen))
        .collect();
    JudgedProcess {
        live_bytes: live.total.bytes,
        live_count: live.total.count,
        sampled: live.sampled,
        stacks_seen: all.iter().filter(|(stack, _)| stack.history.live_bytes() > 0).count() as u64,
        growing_stacks,
        growing_bytes_per_s,
        affected_by_loss: seen < 1.0,
        summaries,
        by_windows: false,
        stacks: listed,
    }
}

/// The part of all heap blocks whose allocation was seen and kept, 0 to 1. Of the others nobody knows the stack, so each stack may be
/// short of as many.
fn seen(counters: &Counters, kernel: &BTreeMap<String, u64>) -> f64 {
    let lost = ["allocations_ring_full", "threads_full"].iter().filter_map(|name| kernel.get(*name)).sum::<u64>();
    let missing = (lost + counters.not_kept) as f64;
    let all = (counters.blocks + lost) as f64;
    if missing > 0.0 { 1.0 - missing / all.max(1.0) } else { 1.0 }
}

/// So many stacks stand in a report at least, if there are so many: machines read more of it than people.
const LISTED: usize = 50;

impl Judged {
    fn new(stack: &Stack<'_>, judgement: &Judgement, now: Window, since_start: f64, seen: f64) -> Self {
        let history: &History = stack.history;
        let allocated = history.allocated_bytes().max(1) as f64;
        let window_s = Duration::from_nanos(BASE_WINDOW_NS).as_secs_f64();
        Self {
            id: stack.id,
            resource: stack.resource,
            op: stack.op,
            frames: stack.frames.to_vec(),
            end: stack.end,
            by_frame_pointers: stack.by_frame_pointers,
            judgement: *judgement,
            live_bytes: history.live_bytes(),
            live_count: history.estimated_count(),
            allocated_bytes: history.allocated_bytes(),
            allocated_count: Some(history.allocated_count()),
            freed_bytes: history.freed_bytes(),
            sampled: history.sampled(),
            certain: seen * (1.0 - (stack.doubted_bytes as f64 / allocated).min(1.0)),
            by_windows: false,
            oldest_age_s: history.oldest_birth().map(|birth| f64::from(now.saturating_sub(birth)) * window_s),
            series: history
                .series()
                .into_iter()
                .map(|(window, bytes)| ((f64::from(window) * window_s + since_start).max(0.0), bytes))
                .collect(),
        }
    }

    fn report(self, target: &Target, symbols: &mut Symbols) -> report::Stack {
        report::Stack {
            id: format!("{:016x}", self.id),
            verdict: match self.judgement.verdict {
                Verdict::Growing => report::StackVerdict::Growing,
                Verdict::Plateau => report::StackVerdict::Plateau,
                Verdict::Spike => report::StackVerdict::Spike,
                Verdict::Stable => report::StackVerdict::Stable,
                Verdict::Warming => report::StackVerdict::Warming,
            },
            resource: match self.resource {
                Resource::Heap => report::Resource::Heap,
                Resource::Mmap => report::Resource::Mmap,
            },
            op: op_name(self.op).map(str::to_owned),
            live_bytes: self.live_bytes,
            live_count: self.live_count,
            allocated_bytes: self.allocated_bytes,
            allocated_count: self.allocated_count,
            freed_bytes: self.freed_bytes,
            live_bytes_ci95: bytes_ci95(self.live_bytes, &self.sampled.live),
            live_count_ci95: count_ci95(self.live_count, &self.sampled.live),
            allocated_bytes_ci95: bytes_ci95(self.allocated_bytes, &self.sampled.allocated),
            freed_bytes_ci95: bytes_ci95(self.freed_bytes, &self.sampled.freed),
            by_windows: self.by_windows,
            oldest_age_s: self.oldest_age_s,
            growth: self.judgement.growth.map_or_else(report::Growth::default, |growth| report::Growth {
                bytes_per_s: Some(growth.bytes_per_s),
                ci95: Some([growth.ci95.0, growth.ci95.1]),
                confidence: Some(growth.confidence * self.certain),
                windows: growth.windows,
            }),
            affected_by_loss: self.certain < 1.0,
            series: self.series,
            complete: self.end.is_complete(),
            by_frame_pointers: self.by_frame_pointers,
            end: if self.frames.is_empty() { report::StackEnd::Lost } else { self.end.into() },
            frames: symbols.frames(target.id(), &self.frames),
        }
    }
}

/// The name of the function, or of the family of functions that take the same arguments.
fn op_name(shape: u8) -> Option<&'static str> {
    Some(match shape {
        op::MALLOC => "malloc",
        op::CALLOC => "calloc",
        op::ALIGNED => "aligned_alloc",
        op::REALLOC => "realloc",
        op::REALLOCARRAY => "reallocarray",
        op::POSIX_MEMALIGN => "posix_memalign",
        op::XALLOCX => "xallocx",
        op::REALLOCF => "reallocf",
        op::RUST_REALLOC => "__rust_realloc",
        op::MAPPING => "mmap",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    /// Two processes that grow towards the limit of their pod meet it in the time that both together need; one of another pod, and one
    /// that does not grow, are not counted in.
    #[test]
    fn limits_are_shared() {
        let process = |of: &str, used: Option<u64>, seconds: Option<f64>| report::Process {
            memory_limit_bytes: Some(1000),
            memory_limit_of: Some(of.to_owned()),
            memory_used_bytes: used,
            seconds_to_limit: seconds,
            ..sample::steady().processes.remove(0)
        };
        // 300 a second in all, of the 600 that are left.
        let mut processes = [
            process("/pod", Some(400), Some(6.0)),
            process("/pod", Some(400), Some(3.0)),
            process("/other", Some(500), Some(5.0)),
            process("/pod", None, None),
            process("/met", Some(1000), Some(0.0)),
        ];
        share_limits(&mut processes);
        let seconds = processes.map(|process| process.seconds_to_limit);
        assert_eq!(seconds, [Some(2.0), Some(2.0), Some(5.0), None, Some(0.0)]);
    }
}

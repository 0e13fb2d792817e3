//! The verdict on a process: what its call stacks do, weighed against its resident set.

use std::fmt;

use crate::detect::stack::{Judgement, MIN_WATCH, Verdict};
use crate::detect::stats::{Trend, trend};

/// Seconds of samples that the slope of the resident set is taken from.
const SPAN_S: f64 = 300.0;

/// So many points at the most; more samples are thinned.
const POINTS: usize = 60;

/// Seconds at the end of them in which growth must still go on for a hint to speak of it.
const LATELY_S: f64 = 30.0;

/// The Mann-Kendall statistic from which the resident set counts as rising.
const RISES: f64 = 3.1;

/// What a process's memory does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessVerdict {
    /// At least one call stack grows.
    Leaking,
    /// Most of the live bytes belong to stacks that grew and stopped.
    Plateau,
    /// Most belonged to stacks that came and went.
    Spike,
    /// Most belong to steady stacks, however many bytes that are.
    Stable,
    /// Not enough has been seen.
    Warming,
}

/// A process's memory at one time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Seconds since the start of tracing.
    pub time: f64,
    /// Resident bytes.
    pub resident: u64,
    /// Live bytes that tracing knows of.
    pub traced: u64,
}

/// What [`judge_process`] needs of one call stack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StackSummary {
    pub verdict: Verdict,
    /// Bytes a second; zero for a stack that does not grow.
    pub growth_bytes_per_s: f64,
    pub live_bytes: u64,
    /// The highest floor seen, which is what a spike weighs.
    pub peak_bytes: u64,
}

impl StackSummary {
    /// From a stack's judgement, its live bytes and [`peak`](crate::ledger::history::History::peak).
    pub fn new(judgement: &Judgement, live_bytes: u64, peak_bytes: u64) -> Self {
        Self {
            verdict: judgement.verdict,
            growth_bytes_per_s: judgement.growth.map_or(0.0, |growth| growth.bytes_per_s),
            live_bytes,
            peak_bytes,
        }
    }
}

/// Why resident set and call stacks disagree; its text is for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// The resident set grows, and the traced memory by less than half as much; no stack is called growing.
    UntracedGrowth,
    /// The same, while stacks grow.
    PartlyExplained,
    /// Stacks grow by an amount that the resident set should show, and it does not grow.
    NotResident,
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UntracedGrowth => {
                "RSS grows but the traced heap does not: fragmentation, page cache or untraced memory"
            }
            Self::PartlyExplained => {
                "RSS grows more than twice as fast as the growing stacks: fragmentation or untraced memory as well"
            }
            Self::NotResident => {
                "stacks grow but RSS does not: they refill memory the allocator already held, replace blocks from \
                 before the trace, or are never written to"
            }
        })
    }
}

/// A verdict on one process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessJudgement {
    pub verdict: ProcessVerdict,
    /// Theil-Sen slope of the resident set over the last five minutes, bytes a second; zero with fewer than three samples.
    pub rss_bytes_per_s: f64,
    /// Growth of the growing stacks over growth of the resident set; none unless the latter clearly rises.
    pub explained_growth_ratio: Option<f64>,
    /// How fast memory is taken: growth of the resident set if it clearly rises, else of the growing stacks; none where neither grows.
    pub growth_bytes_per_s: Option<f64>,
    /// Until the resident set meets the limit at the present rate; none without a limit or without growth. Zero when it is
    /// met already.
    pub seconds_to_limit: Option<f64>,
    pub hint: Option<Hint>,
}

/// Judges a process.
///
/// Samples come in the order of time; `memory_limit` is the smaller of the cgroup's and the host's, in bytes. The time from
/// the first sample to the last counts as the time watched.
///
/// A growing stack alone decides that the process leaks: small leaks do not show in the resident set for long, and large
/// ones may be hidden by free memory that the allocator holds. What the resident set says against it is a [`Hint`].
pub fn judge_process(samples: &[Sample], stacks: &[StackSummary], memory_limit: Option<u64>) -> ProcessJudgement {
    let rss = trend_of(samples, SPAN_S, |sample| sample.resident as f64);
    let rss_rises = rises(rss);
    let growth: f64 = stacks.iter().map(|stack| stack.growth_bytes_per_s).sum();
    let watched = match samples {
        [first, .., last] => last.time - first.time,
        _ => 0.0,
    };
    let rate = Some(if rss_rises { rss.slope } else { growth }).filter(|rate| *rate > 0.0);
    ProcessJudgement {
        verdict: verdict(stacks, watched),
        rss_bytes_per_s: rss.slope,
        explained_growth_ratio: rss_rises.then(|| growth / rss.slope),
        seconds_to_limit: memory_limit.and_then(|limit| {
            let left = limit.saturating_sub(samples.last()?.resident) as f64;
            rate.map(|rate| left / rate)
        }),
        growth_bytes_per_s: rate,
        hint: hint(samples, rss, growth),
    }
}

fn verdict(stacks: &[StackSummary], watched: f64) -> ProcessVerdict {
    if stacks.iter().any(|stack| stack.verdict == Verdict::Growing) {
        return ProcessVerdict::Leaking;
    }
    if watched < f64::from(MIN_WATCH) {
        return ProcessVerdict::Warming;
    }
    let weight = |verdict| {
        let of_verdict = stacks.iter().filter(|stack| stack.verdict == verdict);
        of_verdict.map(|stack| if verdict == Verdict::Spike { stack.peak_bytes } else { stack.live_bytes }).sum::<u64>()
    };
    // In a tie the calmer word wins: the last of the greatest.
    [
        (weight(Verdict::Warming), ProcessVerdict::Warming),
        (weight(Verdict::Spike), ProcessVerdict::Spike),
        (weight(Verdict::Plateau), ProcessVerdict::Plateau),
        (weight(Verdict::Stable), ProcessVerdict::Stable),
    ]
    .into_iter()
    .max_by_key(|(bytes, _)| *bytes)
    .map_or(ProcessVerdict::Stable, |(_, verdict)| verdict)
}

/// Trend of a quantity over the last `span` seconds of samples, slopes per second. The samples need not be evenly spaced.
fn trend_of(samples: &[Sample], span: f64, value: impl Fn(&Sample) -> f64) -> Trend {
    let Some(end) = samples.last().map(|sample| sample.time) else { return Trend::default() };
    let recent = &samples[samples.partition_point(|sample| sample.time < end - span)..];
    let points = recent.len().min(POINTS);
    let (Some(first), true) = (recent.first(), points >= 3) else { return Trend::default() };
    let spacing = (end - first.time) / (points - 1) as f64;
    if spacing <= 0.0 {
        return Trend::default();
    }
    let values: Vec<f64> =
        (0..points).map(|point| interpolated(recent, first.time + f64::from(point as u32) * spacing, &value)).collect();
    let steps = trend(&values);
    Trend { z: steps.z, slope: steps.slope / spacing, ci95: (steps.ci95.0 / spacing, steps.ci95.1 / spacing) }
}

/// The quantity at a time between the samples, on the line from one to the next.
fn interpolated(samples: &[Sample], time: f64, value: impl Fn(&Sample) -> f64) -> f64 {
    let next = samples.partition_point(|sample| sample.time <= time);
    match (next.checked_sub(1).and_then(|before| samples.get(before)), samples.get(next)) {
        (Some(before), Some(after)) => {
            let part = (time - before.time) / (after.time - before.time);
            value(before) + part * (value(after) - value(before))
        }
        (Some(only), None) | (None, Some(only)) => value(only),
        (None, None) => 0.0,
    }
}

fn rises(trend: Trend) -> bool {
    trend.z >= RISES && trend.ci95.0 > 0.0
}

/// What the resident set says against the stacks. Both are compared over the same time, by what the resident set is larger
/// than the traced memory: a cache that has just filled makes both rise, and the difference stays. What has stopped lately
/// is not spoken of.
fn hint(samples: &[Sample], rss: Trend, growth: f64) -> Option<Hint> {
    let [first, .., last] = samples else { return None };
    let watched = (last.time - first.time).min(SPAN_S);
    // Less than a MiB and 1 % of the resident set is within what page tables and stacks do by themselves.
    let matters = |rate: f64| rate * watched > (last.resident as f64 / 100.0).max(1_048_576.0);
    if rises(rss) {
        let untraced = |sample: &Sample| sample.resident as f64 - sample.traced as f64;
        let long = trend_of(samples, SPAN_S, untraced);
        let lately = trend_of(samples, LATELY_S, untraced);
        let goes_on = lately.slope > long.slope / 4.0;
        // For stacks that are called growing their own rate counts: the traced memory may swing by more than that.
        let unexplained = if growth > 0.0 { (rss.slope - growth).min(long.slope) } else { long.slope };
        if rises(long) && goes_on && unexplained > rss.slope / 2.0 && matters(unexplained) {
            return Some(if growth > 0.0 { Hint::PartlyExplained } else { Hint::UntracedGrowth });
        }
        return None;
    }
    (growth > 0.0 && matters(growth) && rss.ci95.1 < growth / 4.0).then_some(Hint::NotResident)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample a second, with a constant traced memory.
    fn samples(seconds: u32, rss: impl Fn(f64) -> f64) -> Vec<Sample> {
        with_traced(seconds, rss, |_| 1e6)
    }

    fn with_traced(seconds: u32, rss: impl Fn(f64) -> f64, traced: impl Fn(f64) -> f64) -> Vec<Sample> {
        let times = (0..seconds).map(f64::from);
        times.map(|time| Sample { time, resident: rss(time) as u64, traced: traced(time) as u64 }).collect()
    }

    fn stack(verdict: Verdict, live_bytes: u64, growth_bytes_per_s: f64) -> StackSummary {
        StackSummary { verdict, growth_bytes_per_s, live_bytes, peak_bytes: live_bytes }
    }

    /// A growing stack makes the process leak, its share of the growth and the time to the limit are right.
    #[test]
    fn a_growing_stack_explains_the_growth() {
        let rss = with_traced(61, |t| 100e6 + 1e6 * t, |t| 50e6 + 0.9e6 * t);
        let stacks = [stack(Verdict::Growing, 50_000_000, 0.9e6), stack(Verdict::Stable, 900_000_000, 0.0)];
        let judged = judge_process(&rss, &stacks, Some(260_000_000));
        assert_eq!(judged.verdict, ProcessVerdict::Leaking);
        assert!((judged.rss_bytes_per_s - 1e6).abs() < 1.0);
        assert!((judged.explained_growth_ratio.unwrap() - 0.9).abs() < 1e-3);
        assert!((judged.seconds_to_limit.unwrap() - 100.0).abs() < 0.1);
        assert_eq!(judged.hint, None);
    }

    /// Growth that no traced stack shows, or only a part of it, is said.
    #[test]
    fn untraced_growth_is_said() {
        let rss = samples(61, |t| 100e6 + 1e6 * t);
        let judged = judge_process(&rss, &[stack(Verdict::Stable, 1 << 20, 0.0)], None);
        assert_eq!((judged.verdict, judged.hint), (ProcessVerdict::Stable, Some(Hint::UntracedGrowth)));
        assert_eq!(judged.explained_growth_ratio, Some(0.0));
        let judged = judge_process(&rss, &[stack(Verdict::Growing, 1 << 20, 0.3e6)], None);
        assert_eq!((judged.verdict, judged.hint), (ProcessVerdict::Leaking, Some(Hint::PartlyExplained)));
    }

    /// Caches that fill and level off, whenever that was, make the resident set rise, but not beyond what is traced: no hint. Nor
    /// where the growth is over (both were called untraced growth).
    #[test]
    fn caches_that_levelled_off_are_no_untraced_growth() {
        let stacks = [stack(Verdict::Plateau, 60 << 20, 0.0), stack(Verdict::Stable, 1 << 20, 0.0)];
        for fill in [5.0, 20.0, 40.0, 58.0, 100.0, 200.0] {
            // Allocators round up, and keep their books.
            let filled = |t: f64| 1e6 * t.min(fill);
            let noise = |t: f64| 8192.0 * (t * 1.3).sin();
            for seconds in [30, 61, 120, 250, 290, 400] {
                let rss = with_traced(seconds, |t| 20e6 + 1.1 * filled(t) + noise(t), |t| 1e6 + filled(t));
                let judged = judge_process(&rss, &stacks, None);
                assert_eq!(judged.hint, None, "filled for {fill} s, seen after {seconds} s");
            }
            let rss = samples(fill as u32 + 30, |t| 20e6 + filled(t) + noise(t));
            assert_eq!(judge_process(&rss, &stacks, None).hint, None, "untraced, until {fill} s");
        }
    }

    /// Untraced growth beside a cache that fills is still said.
    #[test]
    fn untraced_growth_beside_a_cache_is_said() {
        let rss = with_traced(120, |t| 20e6 + 3e6 * t, |t| 1e6 + 1e6 * t);
        let plateau = [stack(Verdict::Plateau, 60 << 20, 0.0)];
        assert_eq!(judge_process(&rss, &plateau, None).hint, Some(Hint::UntracedGrowth));
    }

    /// Growing stacks with a flat resident set leak, with a hint when the amount should show; the limit is then reckoned from
    /// the stacks.
    #[test]
    fn growth_that_is_not_resident_is_said() {
        let rss = samples(61, |t| 100e6 + 4096.0 * (t * 0.7).sin());
        let judged = judge_process(&rss, &[stack(Verdict::Growing, 60_000_000, 1e6)], Some(200_000_000));
        assert_eq!((judged.verdict, judged.hint), (ProcessVerdict::Leaking, Some(Hint::NotResident)));
        assert_eq!(judged.explained_growth_ratio, None);
        assert!((judged.seconds_to_limit.unwrap() - 100.0).abs() < 0.1);
        let small = judge_process(&rss, &[stack(Verdict::Growing, 60_000, 2e3)], None);
        assert_eq!((small.verdict, small.hint, small.seconds_to_limit), (ProcessVerdict::Leaking, None, None));
    }

    /// Without a growing stack the verdict is that of most bytes, and warming while little has been seen.
    #[test]
    fn otherwise_most_bytes_decide() {
        let rss = samples(61, |_| 50e6);
        let high = [stack(Verdict::Stable, 5 << 30, 0.0), stack(Verdict::Warming, 10, 0.0)];
        assert_eq!(judge_process(&rss, &high, Some(6 << 30)).verdict, ProcessVerdict::Stable);
        assert_eq!(judge_process(&rss, &high, Some(6 << 30)).seconds_to_limit, None);
        let grew = [stack(Verdict::Plateau, 5 << 20, 0.0), stack(Verdict::Stable, 1 << 20, 0.0)];
        assert_eq!(judge_process(&rss, &grew, None).verdict, ProcessVerdict::Plateau);
        let gone = StackSummary { peak_bytes: 1 << 30, ..stack(Verdict::Spike, 0, 0.0) };
        assert_eq!(judge_process(&rss, &[gone, high[1]], None).verdict, ProcessVerdict::Spike);
        assert_eq!(judge_process(&rss[..20], &high, None).verdict, ProcessVerdict::Warming);
        assert_eq!(judge_process(&rss, &[], None).verdict, ProcessVerdict::Stable);
        assert_eq!(judge_process(&[], &[], None).verdict, ProcessVerdict::Warming);
    }

    /// The slope is that of the last five minutes, in bytes a second, whatever the spacing of the samples.
    #[test]
    fn slope_of_the_last_five_minutes() {
        let at = |time: f64| Sample { time, resident: (time.min(2400.0) * 1e4) as u64, traced: 0 };
        let rss: Vec<_> = (0..5000).map(|i| at(f64::from(i) * 0.5)).collect();
        let slope = judge_process(&rss, &[], None).rss_bytes_per_s;
        assert!(slope > 0.5e4 && slope < 1.01e4, "{slope}");
        assert!(judge_process(&rss[..4000], &[], None).rss_bytes_per_s > 0.99e4);
        // Old samples are thinned as a run gets long.
        let thinned: Vec<_> = (0..2000).filter(|i| i % 2 == 0 || *i > 1900).map(|i| at(f64::from(i))).collect();
        let slope = judge_process(&thinned, &[], None).rss_bytes_per_s;
        assert!((slope / 1e4 - 1.0).abs() < 0.02, "{slope}");
    }
}

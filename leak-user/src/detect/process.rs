//! The verdict on a process: what its call stacks do, weighed against its resident set.

use std::fmt;

use crate::detect::stack::{Judgement, MIN_WATCH, Verdict};
use crate::detect::stats::{Trend, trend};

/// Seconds of resident set samples that the slope is taken from.
const RSS_SPAN_S: f64 = 300.0;

/// So many points at the most; more samples are thinned.
const RSS_POINTS: usize = 60;

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
    /// The resident set grows, no stack does.
    UntracedGrowth,
    /// The resident set grows at more than twice the rate of the growing stacks.
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
    /// Until the resident set meets the limit at the present rate; none without a limit or without growth. Zero when it is
    /// met already.
    pub seconds_to_limit: Option<f64>,
    pub hint: Option<Hint>,
}

/// Judges a process.
///
/// `rss_samples` are times in seconds, ascending and about evenly spaced, with resident bytes; `memory_limit` is the smaller
/// of the cgroup's and the host's, in bytes. The time from the first sample to the last counts as the time watched.
///
/// A growing stack alone decides that the process leaks: small leaks do not show in the resident set for long, and large
/// ones may be hidden by free memory that the allocator holds. What the resident set says against it is a [`Hint`].
pub fn judge_process(
    rss_samples: &[(f64, u64)],
    stacks: &[StackSummary],
    memory_limit: Option<u64>,
) -> ProcessJudgement {
    let rss = rss_trend(rss_samples);
    let rss_rises = rss.z >= RISES && rss.ci95.0 > 0.0;
    let growth: f64 = stacks.iter().map(|stack| stack.growth_bytes_per_s).sum();
    let watched = match rss_samples {
        [(first, _), .., (last, _)] => last - first,
        _ => 0.0,
    };
    ProcessJudgement {
        verdict: verdict(stacks, watched),
        rss_bytes_per_s: rss.slope,
        explained_growth_ratio: rss_rises.then(|| growth / rss.slope),
        seconds_to_limit: memory_limit.and_then(|limit| {
            let rate = if rss_rises { rss.slope } else { growth };
            let left = limit.saturating_sub(rss_samples.last()?.1) as f64;
            (rate > 0.0).then(|| left / rate)
        }),
        hint: hint(rss_samples, rss, rss_rises, growth),
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

/// Trend of the recent resident set, slopes in bytes a second.
fn rss_trend(samples: &[(f64, u64)]) -> Trend {
    let Some((end, _)) = samples.last() else { return Trend::default() };
    let begin = samples.partition_point(|(time, _)| *time < end - RSS_SPAN_S);
    let recent = &samples[begin..];
    let stride = recent.len().div_ceil(RSS_POINTS).max(1);
    // Thinned from the end, so that the last sample is always among them.
    let mut thinned: Vec<_> = recent.iter().rev().step_by(stride).collect();
    thinned.reverse();
    let [(first, _), .., (last, _)] = thinned[..] else { return Trend::default() };
    let spacing = (last - first) / (thinned.len() - 1) as f64;
    if spacing <= 0.0 {
        return Trend::default();
    }
    let steps = trend(&thinned.iter().map(|(_, bytes)| *bytes as f64).collect::<Vec<_>>());
    Trend { z: steps.z, slope: steps.slope / spacing, ci95: (steps.ci95.0 / spacing, steps.ci95.1 / spacing) }
}

fn hint(samples: &[(f64, u64)], rss: Trend, rss_rises: bool, growth: f64) -> Option<Hint> {
    let [(first, _), .., (last, resident)] = samples else { return None };
    let watched = (last - first).min(RSS_SPAN_S);
    // Less than a MiB and 1 % of the resident set is within what page tables and stacks do by themselves.
    let matters = |rate: f64| rate * watched > (*resident as f64 / 100.0).max(1_048_576.0);
    if rss_rises && matters(rss.slope) {
        if growth <= 0.0 {
            return Some(Hint::UntracedGrowth);
        }
        return (growth < rss.slope / 2.0).then_some(Hint::PartlyExplained);
    }
    (growth > 0.0 && matters(growth) && rss.ci95.1 < growth / 4.0).then_some(Hint::NotResident)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(seconds: u32, rss: impl Fn(f64) -> f64) -> Vec<(f64, u64)> {
        (0..seconds).map(|t| (f64::from(t), rss(f64::from(t)) as u64)).collect()
    }

    fn stack(verdict: Verdict, live_bytes: u64, growth_bytes_per_s: f64) -> StackSummary {
        StackSummary { verdict, growth_bytes_per_s, live_bytes, peak_bytes: live_bytes }
    }

    /// A growing stack makes the process leak, its share of the growth and the time to the limit are right.
    #[test]
    fn a_growing_stack_explains_the_growth() {
        let rss = samples(61, |t| 100e6 + 1e6 * t);
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
        let rss: Vec<_> = (0..5000).map(|i| f64::from(i) * 0.5).map(|t| (t, (t.min(2400.0) * 1e4) as u64)).collect();
        let slope = judge_process(&rss, &[], None).rss_bytes_per_s;
        assert!(slope > 0.5e4 && slope < 1.01e4, "{slope}");
        assert!(judge_process(&rss[..4000], &[], None).rss_bytes_per_s > 0.99e4);
    }
}

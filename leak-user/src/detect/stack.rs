//! The verdict on one call stack.

use crate::detect::stats::{mean_with_interval, normal_below, poisson_above, poisson_upper95, trend};
use crate::ledger::history::{AGED, CLASSES, Cohort, History, LEVELS, Window, age_of_class, window_length};

/// Base windows that a stack is watched before anything but `warming` is said: the earliest that `growing` can come.
pub const MIN_WATCH: Window = 25;

/// Base windows of floor that must rise: what stopped growing 20 s ago has none left in here, wherever in its window
/// the report comes.
const RECENT: usize = 18;

/// The Mann-Kendall statistic from which a rise counts (one-sided p = 0.001).
const RISES: f64 = 3.1;

/// Of the settled blocks at least exp(-this) have to be expected to outlive the time watched.
const MAX_HAZARD: f64 = 0.5;

/// Kept blocks, and windows that have some, at the least.
const MIN_KEPT: u64 = 5;

/// Blocks in the older part of the cohorts, by window, compared with the younger part: below this, cohorts shrink.
const MIN_OLD_SHARE: f64 = 0.3;

/// At most so many blocks make a container that is judged by its floor.
const CONTAINER_BLOCKS: u64 = 8;

/// So many rises of a container's floor, none of them undone, make it grow.
const CONTAINER_STEPS: usize = 4;

/// What a call stack's memory does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It keeps growing: a leak, or a cache that is not full yet.
    Growing,
    /// It grew and stopped.
    Plateau,
    /// It came and went.
    Spike,
    /// It is steady, however large.
    Stable,
    /// Not enough has been seen to tell.
    Warming,
}

/// How fast a growing stack grows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    pub bytes_per_s: f64,
    /// 95 % interval of the rate, from how much the kept bytes of single windows differ.
    pub ci95: (f64, f64),
    /// From 0 to 1: the smaller of two probabilities. First, that floors without a trend would be ordered less like a
    /// rise than these (1 - p of the Mann-Kendall test). Second, that more settled blocks than were seen to go would have
    /// gone, if blocks stayed no longer on average than the stack has been watched. For a container, in place of the
    /// second: that as many steps, were up and down equally likely, would not all have gone up.
    pub confidence: f64,
    /// How many windows the rate is taken from.
    pub windows: u32,
    /// Length of each, in seconds (base windows).
    pub window_s: u32,
}

/// What the verdict was read from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evidence {
    /// Base windows (seconds) the stack has been watched.
    pub watched: Window,
    /// Mann-Kendall statistic of the recent floor; above about 3 it rises.
    pub rise: f64,
    /// Age, in base windows, from which on blocks are hardly released any more; none where they go at every age that
    /// was seen, or too few blocks were seen.
    pub settling_age: Option<Window>,
    /// Blocks above the settling age, in the cohorts that the verdict was read from.
    pub kept_blocks: u64,
    /// Few blocks that get larger: judged by the floor alone.
    pub container: bool,
}

/// A verdict on one call stack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// There when, and only when, the verdict is [`Verdict::Growing`].
    pub growth: Option<Growth>,
    pub evidence: Evidence,
}

/// Judges one stack as of window `now`, which is open (nothing after its begin is known to be complete).
///
/// Costs a few hundred operations for a stack that does not grow, a few thousand for one that may.
pub fn judge(history: &History, now: Window) -> Judgement {
    if history.now() < now {
        let mut rolled = history.clone();
        rolled.roll(now);
        return judge_rolled(&rolled);
    }
    judge_rolled(history)
}

fn judge_rolled(history: &History) -> Judgement {
    let watched = history.now() - history.start();
    let mut evidence = Evidence { watched, ..Evidence::default() };
    if watched < MIN_WATCH {
        return Judgement { verdict: Verdict::Warming, growth: None, evidence };
    }
    let recent = RecentFloor::of(history);
    evidence.rise = recent.z();
    let settling = Settling::of(history, watched);
    let mut waits = false;
    for level in 0..LEVELS {
        match growth_at(history, level, &settling, &recent, &mut evidence) {
            Outcome::Grows(growth) => return Judgement { verdict: Verdict::Growing, growth: Some(growth), evidence },
            Outcome::MoreNeeded => waits = true,
            Outcome::Steady => {}
        }
    }
    let verdict = if waits && recent.z() >= RISES { Verdict::Warming } else { rest(history) };
    Judgement { verdict, growth: None, evidence }
}

/// What one scale says.
enum Outcome {
    Grows(Growth),
    /// Nothing speaks against growth but that too little was seen.
    MoreNeeded,
    Steady,
}

/// How the floor moved within the last [`RECENT`] base windows.
struct RecentFloor {
    floor_z: f64,
    /// The same for blocks older than [`AGED`]: free of the noise of short-lived ones.
    aged_z: f64,
    /// What the aged bytes rose by over the windows looked at, and how many those are.
    aged_rise: f64,
    aged_windows: f64,
}

impl RecentFloor {
    fn of(history: &History) -> Self {
        let floors = as_f64(&history.floors(0));
        let aged = as_f64(&history.aged_bytes());
        let floor = trend(last(&floors, RECENT));
        // What stops growing still ages for so long.
        let aged = last(&aged, RECENT - AGED as usize);
        let trend_of_aged = trend(aged);
        let windows = aged.len().saturating_sub(1) as f64;
        Self {
            floor_z: floor.z,
            aged_z: trend_of_aged.z,
            aged_rise: trend_of_aged.slope.max(0.0) * windows,
            aged_windows: windows,
        }
    }

    fn z(&self) -> f64 {
        self.floor_z.max(self.aged_z)
    }

    fn rises(&self) -> bool {
        self.z() >= RISES && self.floor_z.min(self.aged_z) > -1.0
    }
}

/// From which age on blocks stay, by the releases at each age.
struct Settling {
    /// Ages at which the expected further loss is small, with how surely; youngest first.
    ages: Vec<(Window, f64)>,
    /// Too few blocks to tell, for some age.
    inconclusive: bool,
}

impl Settling {
    /// Two conditions for each age `a`. First, the cumulative hazard from `a` up to the oldest age seen (W. Nelson 1969,
    /// O. Aalen 1978) stays below [`MAX_HAZARD`]. Second, in case few blocks were seen: the upper 95 % bound of the release
    /// rate above `a` is so low that a settled block outlives, on average, the whole time watched.
    fn of(history: &History, watched: Window) -> Self {
        let releases = history.releases();
        let (mut hazard, mut released, mut at_risk) = (0.0, 0.0, 0.0);
        let mut settling = Self { ages: Vec::new(), inconclusive: false };
        for class in (0..CLASSES).rev() {
            let (from, to) = (age_of_class(class), age_of_class(class + 1).min(watched + 1));
            let here = releases[class];
            if from > watched || here.at_risk < 0.5 && here.released < 0.5 {
                continue;
            }
            hazard += here.released / here.at_risk.max(0.5) * f64::from(to - from);
            released += here.released;
            at_risk += here.at_risk;
            if hazard > MAX_HAZARD {
                break;
            }
            let remaining = f64::from(watched - from).max(1.0);
            if poisson_upper95(released) * remaining <= at_risk {
                settling.ages.push((from, poisson_above(released, at_risk / remaining)));
            } else {
                settling.inconclusive = true;
            }
        }
        settling.ages.reverse();
        settling
    }
}

/// Whether the stack grows as seen in the windows of one level.
fn growth_at(
    history: &History,
    level: usize,
    settling: &Settling,
    recent: &RecentFloor,
    evidence: &mut Evidence,
) -> Outcome {
    let length = window_length(level);
    let floors = as_f64(&history.floors(level));
    let mut cohorts = history.cohorts(level);
    // The open window, and the first where the stack came up in the middle of it, are not whole.
    cohorts.pop();
    if !cohorts.is_empty()
        && !history.start().is_multiple_of(length)
        && history.start() / length == first_group(history, level, cohorts.len())
    {
        cohorts.remove(0);
    }
    // A level has something to say once half of its windows are there.
    let least = if level == 0 { MIN_WATCH as usize - 1 } else { 8 };
    if cohorts.len() < least {
        return Outcome::Steady;
    }
    if let Some(growth) = container_growth(history, level, &floors) {
        evidence.container = true;
        return Outcome::Grows(growth);
    }
    let half = length * cohorts.len() as Window / 2;
    let Some((settled, stays)) = settling.ages.iter().copied().find(|(age, _)| *age >= AGED || level > 0) else {
        return if settling.inconclusive { Outcome::MoreNeeded } else { Outcome::Steady };
    };
    evidence.settling_age = Some(settled);
    if settled > half {
        return Outcome::Steady;
    }
    // Windows whose youngest block is above the settling age; what is open at this level has partly not been born yet.
    let open = history.now() % length;
    let young = (settled.max(AGED).saturating_sub(open)).div_ceil(length) as usize;
    let kept = &cohorts[..cohorts.len() - young];
    let blocks: u64 = kept.iter().map(|cohort| cohort.count).sum();
    evidence.kept_blocks = blocks;
    let filled = kept.iter().filter(|cohort| cohort.count > 0).count() as u64;
    if blocks < MIN_KEPT || filled < MIN_KEPT {
        return if blocks > 0 { Outcome::MoreNeeded } else { Outcome::Steady };
    }
    if !cohorts_stay(&cohorts, kept) || !goes_on(history, settled, blocks, kept.len() as f64 * f64::from(length)) {
        return Outcome::Steady;
    }
    let per_window: Vec<f64> = kept.iter().map(|cohort| cohort.bytes as f64).collect();
    let (mean, (low, high)) = mean_with_interval(&per_window);
    let z = if level == 0 {
        if !recent.rises() {
            return Outcome::Steady;
        }
        recent.z()
    } else {
        let rise = trend(&floors);
        if rise.z < RISES || rise.slope <= 0.0 {
            return Outcome::Steady;
        }
        // At this scale twenty seconds without growth do not show. Where enough blocks should have come in that time,
        // the recent floor has to have risen too.
        let expected = mean / f64::from(length) * recent.aged_windows;
        let blocks_expected = blocks as f64 / (kept.len() as f64 * f64::from(length)) * recent.aged_windows;
        if blocks_expected >= 5.0 && recent.aged_rise < expected / 4.0 {
            return Outcome::Steady;
        }
        rise.z
    };
    let seconds = f64::from(length);
    Outcome::Grows(Growth {
        bytes_per_s: mean / seconds,
        ci95: (low / seconds, high / seconds),
        confidence: normal_below(z).min(stays),
        windows: kept.len() as u32,
        window_s: length,
    })
}

/// Number of the first window that [`History::cohorts`] gave, the open one taken off.
fn first_group(history: &History, level: usize, closed: usize) -> Window {
    history.now() / window_length(level) - closed as Window
}

/// Whether the older windows of birth kept as many blocks as the younger ones: cohorts that still shrink have fewer.
fn cohorts_stay(cohorts: &[Cohort], kept: &[Cohort]) -> bool {
    let per_window =
        |part: &[Cohort]| part.iter().map(|cohort| cohort.count).sum::<u64>() as f64 / part.len().max(1) as f64;
    let old = (cohorts.len() * 2 / 5).min(kept.len());
    let (old, young) = kept.split_at(old);
    if old.is_empty() || young.is_empty() {
        return false;
    }
    // Both halves of the old part, so that one burst long ago is not taken for a habit.
    let (older, newer) = old.split_at(old.len() / 2);
    let least = MIN_OLD_SHARE * per_window(young);
    per_window(old) >= least && per_window(older) >= least / 2.0 && per_window(newer) >= least / 2.0
}

/// Whether kept blocks kept coming until lately: not for 20 s none, where one should have come, and not a quarter of what
/// should.
fn goes_on(history: &History, settled: Window, blocks: u64, over: f64) -> bool {
    let rate = blocks as f64 / over;
    let fine = history.cohorts(0);
    let settled = settled.max(AGED) as usize;
    let Some(aged) = fine.len().checked_sub(settled).map(|end| &fine[..end]) else {
        // Too young to have settled within this reach: the floor has to tell.
        return true;
    };
    let window = RECENT.saturating_sub(settled);
    let came: u64 = last(aged, window).iter().map(|cohort| cohort.count).sum();
    let expected = rate * window as f64;
    if expected >= 5.0 {
        return came as f64 >= expected / 4.0;
    }
    // Blocks too young to have settled may yet stay.
    let unseen = if fine[aged.len()..].iter().any(|cohort| cohort.count > 0) { settled } else { 0 };
    if let Some(at) = aged.iter().rev().position(|cohort| cohort.count > 0) {
        return at + settled <= RECENT || rate * (at + settled - unseen) as f64 <= 5.0;
    }
    // Longer than the fine windows reach: by the youngest of the coarser ones that has any.
    let quiet = (1..LEVELS).find_map(|level| {
        let cohorts = history.cohorts(level);
        let at = cohorts.iter().rev().position(|cohort| cohort.count > 0)?;
        Some((at as f64 - 1.0) * f64::from(window_length(level)))
    });
    quiet.is_some_and(|quiet| rate * quiet <= 5.0)
}

/// Growth of a container: few blocks, most bytes in the newest or the reallocated one, and a floor that only goes up, in
/// several steps, the last of them recent.
fn container_growth(history: &History, level: usize, floors: &[f64]) -> Option<Growth> {
    if history.live_count() == 0 || history.live_count() > CONTAINER_BLOCKS {
        return None;
    }
    let length = window_length(level);
    let steps: Vec<f64> = floors.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let ups = steps.iter().filter(|step| **step > 0.0).count();
    if ups < CONTAINER_STEPS || steps.iter().any(|step| *step < 0.0) {
        return None;
    }
    let fine = history.floors(0);
    let recent = last(&fine, RECENT);
    if recent.first() >= recent.last() {
        return None;
    }
    let largest = (0..LEVELS).flat_map(|level| history.cohorts(level)).map(|cohort| cohort.bytes).max()?;
    let first_up = steps.iter().position(|step| *step > 0.0)?;
    let spread = (steps.len() - first_up) as Window * length;
    if largest * 2 < history.live_bytes() || spread < RECENT as Window {
        return None;
    }
    let (mean, (low, high)) = mean_with_interval(&steps);
    let seconds = f64::from(length);
    Some(Growth {
        bytes_per_s: mean / seconds,
        ci95: (low / seconds, high / seconds),
        confidence: normal_below(trend(floors).z).min(1.0 - 0.5_f64.powi(ups as i32)),
        windows: steps.len() as u32,
        window_s: length,
    })
}

/// The verdict on what does not grow.
fn rest(history: &History) -> Verdict {
    let floor = history.floors(0).last().copied().unwrap_or(0);
    let (peak, at) = history.peak();
    let since = history.now() - at;
    // Ten minutes after it went, a spike is history.
    if peak > 2 * floor && since <= 600 {
        return Verdict::Spike;
    }
    // The first windows show how tracing began, not what the program did.
    let settled = history.start() + 5;
    let was = history.series().into_iter().filter(|(end, _)| *end >= settled && history.now() - end <= 600);
    let lowest = was.map(|(_, floor)| floor).min().unwrap_or(floor);
    if lowest as f64 <= 0.7 * floor as f64 { Verdict::Plateau } else { Verdict::Stable }
}

fn as_f64(values: &[u64]) -> Vec<f64> {
    values.iter().map(|value| *value as f64).collect()
}

/// The last `count` of `values`, or all.
fn last<T>(values: &[T], count: usize) -> &[T] {
    &values[values.len().saturating_sub(count)..]
}

//! The verdict on one call stack.

use crate::detect::stats::{mean_with_interval, normal_below, poisson_above, rise, trend};
use crate::ledger::history::{AGED, CLASSES, Cohort, History, LEVELS, SETUP, Window, age_of_class, window_length};

/// Base windows that a stack is watched before anything but `warming` is said: the earliest that `growing` can come.
/// Sessions of 20 s that begin when a set-up of [`SETUP`] is over have to be seen to end.
pub const MIN_WATCH: Window = 28;

/// Cohorts count as old from this age on, in base windows, at the finest scale.
const OLD: usize = 20;

/// Base windows of floor that must rise: what stopped growing 20 s ago has none left in here, wherever in its window
/// the report comes.
const RECENT: usize = 18;

/// The Mann-Kendall statistic from which a rise counts (one-sided p = 0.006). Wandering queues exceed any such bound; that
/// cohorts stay keeps them out.
const RISES: f64 = 2.5;

/// So much of itself the recent floor must have risen by for a stack to be waited for that may grow but has shown too few blocks:
/// a cache at its high-water mark, which takes a few blocks more once in a while, is steady.
const NOTABLE_RISE: f64 = 0.02;

/// At most so much of a rise comes in a single window where it goes on. One step in a flat floor passes the test of a trend.
const LARGEST_STEP: f64 = 0.6;

/// Of the settled blocks at least exp(-this) have to be expected to outlive the time watched.
const MAX_HAZARD: f64 = 0.3;

/// Kept blocks, and windows that have some, at the least.
const MIN_KEPT: u64 = 5;

/// Blocks in the older part of the cohorts, by window, compared with the younger part: below this, cohorts shrink.
const MIN_OLD_SHARE: f64 = 0.3;

/// At most so many blocks make a container that is judged by its floor.
const CONTAINER_BLOCKS: u64 = 4;

/// So many rises of a container's floor, none of them undone, make it grow.
const CONTAINER_STEPS: usize = 5;

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
    let mut settling = None;
    let mut waits = false;
    for level in 0..LEVELS {
        match growth_at(history, level, &mut settling, &recent, &mut evidence) {
            Outcome::Grows(growth) => return Judgement { verdict: Verdict::Growing, growth: Some(growth), evidence },
            Outcome::MoreNeeded => waits = true,
            Outcome::Steady => {}
        }
    }
    let verdict = if waits && recent.rises_notably() { Verdict::Warming } else { rest(history) };
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
    floor: Vec<f64>,
    /// The same for blocks older than [`AGED`]: free of the noise of short-lived ones.
    aged_z: f64,
    aged: Vec<f64>,
}

impl RecentFloor {
    fn of(history: &History) -> Self {
        let floor = as_f64(last(&history.floors(0), RECENT));
        // What stops growing still ages for so long.
        let aged = as_f64(last(&history.aged_bytes(), RECENT - AGED as usize));
        Self { floor_z: rise(&floor), floor, aged_z: rise(&aged), aged }
    }

    fn z(&self) -> f64 {
        self.floor_z.max(self.aged_z)
    }

    fn rises(&self) -> bool {
        self.z() >= RISES && self.floor_z.min(self.aged_z) > -1.0
    }

    /// Whether it rises by an amount, and in steps, that no steady stack shows.
    fn rises_notably(&self) -> bool {
        [(self.floor_z, &self.floor), (self.aged_z, &self.aged)].into_iter().any(|(z, values)| {
            let (from, to) = (values.first().copied().unwrap_or(0.0), values.last().copied().unwrap_or(0.0));
            z >= RISES && to - from >= NOTABLE_RISE * to && largest_step(values) <= LARGEST_STEP * (to - from)
        })
    }

    /// Base windows that [`Self::aged_rise`] is taken over.
    fn aged_windows(&self) -> f64 {
        self.aged.len().saturating_sub(1) as f64
    }

    /// What the aged bytes rose by, by their median slope.
    fn aged_rise(&self) -> f64 {
        trend(&self.aged).slope * self.aged_windows()
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
    fn of(history: &History) -> Self {
        // Release rates leave set-up out.
        let watched = history.now() - history.start() - SETUP;
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
            let stays = poisson_above(released, at_risk / remaining);
            if stays >= 0.95 {
                settling.ages.push((from, stays));
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
    settling: &mut Option<Settling>,
    recent: &RecentFloor,
    evidence: &mut Evidence,
) -> Outcome {
    let length = window_length(level);
    let floors = as_f64(&history.floors(level));
    // Most stacks do not rise, and cost no more than this.
    let z = if level == 0 { recent.z() } else { rise(&floors) };
    if z < RISES {
        return Outcome::Steady;
    }
    let mut cohorts = history.cohorts(level);
    // The open window is not whole, and set-up does not count.
    cohorts.pop();
    let first = history.now() / length - cohorts.len() as Window;
    let counts = (history.start() + SETUP).div_ceil(length);
    cohorts.drain(..(counts.saturating_sub(first) as usize).min(cohorts.len()));
    // A level has something to say once half of its windows are there.
    let least = match level {
        0 => (MIN_WATCH - SETUP) as usize,
        1 => 7,
        _ => 5,
    };
    if cohorts.len() < least {
        return Outcome::Steady;
    }
    if let Some(growth) = container_growth(history, level, &floors) {
        evidence.container = true;
        return Outcome::Grows(growth);
    }
    if level == 0 && !recent.rises() {
        return Outcome::Steady;
    }
    let settling = settling.get_or_insert_with(|| Settling::of(history));
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
    let over = kept.len() as f64 * f64::from(length);
    if !cohorts_stay(level, cohorts.len(), kept) || !goes_on(history, settled, blocks, over) {
        return Outcome::Steady;
    }
    let per_window: Vec<f64> = kept.iter().map(|cohort| cohort.bytes as f64).collect();
    let (mean, (low, high)) = mean_with_interval(&per_window);
    // At the coarse scales twenty seconds without growth do not show. Where enough blocks should have come in that time,
    // the recent floor has to have risen by a fair part of them.
    let expected = mean / f64::from(length) * recent.aged_windows();
    let blocks_expected = blocks as f64 / over * recent.aged_windows();
    if level > 0 && blocks_expected >= 5.0 && (recent.aged_z < 2.0 || recent.aged_rise() < expected / 3.0) {
        return Outcome::Steady;
    }
    let seconds = f64::from(length);
    Outcome::Grows(Growth {
        bytes_per_s: mean / seconds,
        ci95: (low / seconds, high / seconds),
        confidence: normal_below(z).min(stays),
        windows: kept.len() as u32,
        window_s: length,
    })
}

/// Whether the older windows of birth kept as many blocks as the younger ones: cohorts that still shrink have fewer.
fn cohorts_stay(level: usize, windows: usize, kept: &[Cohort]) -> bool {
    let blocks_in = |part: &[Cohort]| part.iter().map(|cohort| cohort.count).sum::<u64>() as f64;
    let per_window = |part: &[Cohort]| blocks_in(part) / part.len().max(1) as f64;
    let old = if level == 0 { windows.saturating_sub(OLD) } else { windows * 2 / 5 };
    let Some((old, young)) = kept.split_at_checked(old) else { return false };
    if old.is_empty() || young.is_empty() {
        return false;
    }
    let least = MIN_OLD_SHARE * per_window(young);
    if blocks_in(old) < (least * old.len() as f64).floor().max(1.0) {
        return false;
    }
    // Both halves of the old part, so that one burst long ago is not taken for a habit. Too few blocks cannot show it.
    let (older, newer) = old.split_at(old.len() / 2);
    let expected = least * older.len() as f64;
    expected < 2.0 || per_window(older) >= least / 3.0 && per_window(newer) >= least / 3.0
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
    if let Some(at) = aged.iter().rev().position(|cohort| cohort.count > 0) {
        let quiet = at + settled;
        return quiet <= RECENT || rate * quiet as f64 <= 5.0 || at <= 2;
    }
    // Longer than the fine windows reach: by the youngest of the coarser ones that has any.
    let quiet = (1..LEVELS).find_map(|level| {
        let length = window_length(level) as usize;
        let cohorts = history.cohorts(level);
        let mut ages = cohorts.iter().rev().enumerate().map(|(back, cohort)| (back * length, cohort.count));
        ages.find(|(age, count)| *age >= fine.len() && *count > 0).map(|(age, _)| age as f64)
    });
    quiet.is_some_and(|quiet| rate * quiet <= 5.0)
}

/// Growth of a container: few blocks, most bytes in one of them, and a floor that only goes up, in several steps, none of
/// which is most of it, the last of them recent.
fn container_growth(history: &History, level: usize, floors: &[f64]) -> Option<Growth> {
    if history.live_count() == 0 || history.live_count() > CONTAINER_BLOCKS {
        return None;
    }
    let largest = history.largest_cohort();
    // What only ever adds blocks is no container: one that grows releases what it grew out of.
    if largest.bytes < largest.count * history.live_bytes() / 2 || history.freed_bytes() < history.live_bytes() / 4 {
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
    // Coarse floors hide what came back within a window.
    if recent.first() >= recent.last() || !fine.is_sorted() {
        return None;
    }
    let first_up = steps.iter().position(|step| *step > 0.0)?;
    let spread = (steps.len() - first_up) as Window * length;
    let (from, to) = (floors.first()?, floors.last()?);
    if spread < RECENT as Window || *to < 1.25 * from || largest_step(floors) > LARGEST_STEP * (to - from) {
        return None;
    }
    let (mean, (low, high)) = mean_with_interval(&steps);
    let seconds = f64::from(length);
    Some(Growth {
        bytes_per_s: mean / seconds,
        ci95: (low / seconds, high / seconds),
        confidence: normal_below(rise(floors)).min(1.0 - 0.5_f64.powi(ups as i32)),
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
    if (lowest as f64) < 0.7 * floor as f64 { Verdict::Plateau } else { Verdict::Stable }
}

/// The most that a value is above the one before it.
fn largest_step(values: &[f64]) -> f64 {
    values.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max)
}

fn as_f64(values: &[u64]) -> Vec<f64> {
    values.iter().map(|value| *value as f64).collect()
}

/// The last `count` of `values`, or all.
fn last<T>(values: &[T], count: usize) -> &[T] {
    &values[values.len().saturating_sub(count)..]
}

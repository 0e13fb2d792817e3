//! What one call stack's live bytes did over time, in a fixed size: the accumulators that the verdict is read from.
//!
//! Three things are kept, all in base windows of [`BASE_WINDOW_NS`]:
//!
//! - *cohorts*: live bytes and blocks by the window they were born in;
//! - *floors*: the fewest live bytes within each window;
//! - *release rates by age*: how many blocks of each age were at risk, and how many of them were released, lately.
//!
//! Cohorts and floors exist at several scales ([`LEVELS`]): windows of 1 s for the last half minute, then of 4 s, 16 s,
//! 64 s and 256 s, sixteen of each. As time passes a cohort moves to the next coarser scale, so hours of tracing take
//! no more room than a minute, and a slow leak stays visible. Windows of a level start at multiples of their length, so
//! the place of a block's cohort follows from its birth by shifts and compares alone.
//!
//! What the numbers mean is left to [`crate::detect`]; which event belongs to which stack, and the clock, to the ledger.

use super::sampled::{SampledTotals, Weight};

/// Length of a base window in nanoseconds.
pub const BASE_WINDOW_NS: u64 = 1_000_000_000;

/// Number of a base window since the ledger's first time.
pub type Window = u32;

/// How many scales there are; a window of level `l` is 4^l base windows long.
pub const LEVELS: usize = 5;

/// How many windows of level 0 are kept; of the others [`COARSE`].
pub const FINE: usize = 32;

/// How many windows of each level but the first are kept.
pub const COARSE: usize = 16;

const SLOTS: usize = FINE + COARSE * (LEVELS - 1);
/// The cohort of everything born before the coarsest level begins.
const ANCIENT: usize = SLOTS;
/// Base windows after which nothing but the oldest cohort and the last floor is left.
const SPAN: Window = (COARSE as Window) << (2 * (LEVELS - 1));

/// Age classes: two to an octave, [`class_of_age`].
pub const CLASSES: usize = 26;

/// Blocks younger than this many base windows are left out of [`History::aged_bytes`].
pub const AGED: Window = 4;

/// What is born within so many base windows of a stack's first block is set-up. It counts in totals, floors and cohorts, but
/// not in the release rates: what a program keeps for good from its start would hide how soon it releases the rest.
pub const SETUP: Window = 5;

/// The age class of an age in base windows: 0, 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16-23, ...
pub fn class_of_age(age: Window) -> usize {
    if age < 2 {
        return age as usize;
    }
    let octave = age.ilog2();
    let half = (age >> (octave - 1)) & 1;
    ((2 * octave + half) as usize).min(CLASSES - 1)
}

/// The lowest age in an age class, in base windows.
pub fn age_of_class(class: usize) -> Window {
    if class < 2 {
        return class as Window;
    }
    let octave = class as u32 / 2;
    (2 + (class as u32 & 1)) << (octave - 1)
}

/// Length of a window of a level, in base windows.
pub const fn window_length(level: usize) -> Window {
    1 << (2 * level)
}

/// How many windows of a level are kept.
pub const fn windows_kept(level: usize) -> usize {
    if level == 0 { FINE } else { COARSE }
}

/// Where a level's windows begin in the arrays of slots.
const fn first_slot(level: usize) -> usize {
    if level == 0 { 0 } else { FINE + COARSE * (level - 1) }
}

/// How strongly the past of an age class counts after one more base window: what happened `n` windows ago counts
/// 1 - 1/64 to the power of n in the young classes; four times the age takes the place of 64 where that is longer,
/// since what happens at some age cannot be learned in less.
fn retention(class: usize) -> f32 {
    1.0 - 1.0 / (4 * age_of_class(class)).max(64) as f32
}

/// Live bytes and blocks of one window of birth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cohort {
    pub bytes: u64,
    pub count: u64,
}

/// Releases at one class of ages, with fading memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Releases {
    /// Blocks released at these ages.
    pub released: f64,
    /// Block-windows spent at these ages: blocks at risk, summed over base windows.
    pub at_risk: f64,
}

/// The accumulators of one call stack; about 2.7 KB whatever it does and however long.
#[derive(Clone, Debug)]
pub struct History {
    /// Before this no live block was born; earlier than `start` in a forked child.
    origin: Window,
    start: Window,
    now: Window,
    live_bytes: u64,
    live_count: u64,
    allocated_bytes: u64,
    allocated_count: u64,
    freed_bytes: u64,
    /// The fewest live bytes so far in the window of each level that is still open.
    floor: [u64; LEVELS],
    /// The highest floor of any base window, and which.
    peak: (u64, Window),
    /// Closed floors, in rings like the cohorts.
    floors: [u64; SLOTS],
    /// Bytes of blocks older than [`AGED`] at the end of each base window.
    aged: [u64; FINE],
    bytes: [u64; SLOTS + 1],
    count: [u32; SLOTS + 1],
    /// Of each window of [`SETUP`], the live blocks born in it.
    setup: [u32; SETUP as usize],
    /// Releases in the open base window; negative for what realloc carried over.
    releases: [i32; CLASSES],
    released: [f32; CLASSES],
    at_risk: [f32; CLASSES],
    /// What of the bytes is estimated; none where every block is one that was followed for itself.
    sampled: Option<Box<SampledTotals>>,
}

impl History {
    /// An empty history that begins in window `now`.
    pub fn new(now: Window) -> Self {
        Self {
            origin: now,
            start: now,
            now,
            live_bytes: 0,
            live_count: 0,
            allocated_bytes: 0,
            allocated_count: 0,
            freed_bytes: 0,
            floor: [0; LEVELS],
            peak: (0, now),
            floors: [0; SLOTS],
            aged: [0; FINE],
            bytes: [0; SLOTS + 1],
            count: [0; SLOTS + 1],
            setup: [0; SETUP as usize],
            releases: [0; CLASSES],
            released: [0.0; CLASSES],
            at_risk: [0.0; CLASSES],
            sampled: None,
        }
    }

    /// The same in a child that was forked in window `now`: the blocks are there, with the births that they have, but what they
    /// did is the parent's doing. A verdict is read from what the child does from here on.
    #[must_use]
    pub fn forked(&self, now: Window) -> Self {
        let mut child = self.clone();
        child.roll(now);
        child.start = child.now;
        child.floor = [child.live_bytes; LEVELS];
        child.peak = (0, child.now);
        // The window's blocks until now count as its set-up.
        child.setup = [0; SETUP as usize];
        child.setup[0] = child.count[child.slot(child.now)];
        child.releases = [0; CLASSES];
        child.released = [0.0; CLASSES];
        child.at_risk = [0.0; CLASSES];
        child
    }

    /// A block of `bytes` came to life in window `now`. `birth` is earlier than `now` for a block that realloc carried
    /// over: it keeps the birth of the block it replaces, whose [`Self::died`] is reported too, just after this, so that the
    /// floor does not dip for what was in use all the time.
    ///
    /// A `now` before the open window counts as the open window.
    #[inline]
    pub fn born(&mut self, now: Window, birth: Window, bytes: u64) {
        if now > self.now {
            self.roll(now);
        }
        // A program can map and unmap terabytes that it never touches, often enough to overflow even these.
        self.live_bytes = self.live_bytes.saturating_add(bytes);
        self.allocated_bytes = self.allocated_bytes.saturating_add(bytes);
        self.allocated_count += 1;
        self.live_count += 1;
        let slot = self.slot(birth);
        self.bytes[slot] = self.bytes[slot].saturating_add(bytes);
        self.count[slot] = self.count[slot].saturating_add(1);
        let since_start = birth.wrapping_sub(self.start);
        if since_start < SETUP {
            self.setup[since_start as usize] += 1;
        }
        if birth < now && since_start >= SETUP {
            self.releases[class_of_age(self.now.saturating_sub(birth))] -= 1;
        }
    }

    /// A block of `bytes`, born in window `birth`, was released in window `now`.
    #[inline]
    pub fn died(&mut self, now: Window, birth: Window, bytes: u64) {
        if now > self.now {
            self.roll(now);
        }
        self.live_bytes = self.live_bytes.saturating_sub(bytes);
        self.freed_bytes = self.freed_bytes.saturating_add(bytes);
        self.live_count = self.live_count.saturating_sub(1);
        if self.live_bytes < self.floor[0] {
            self.floor[0] = self.live_bytes;
        }
        let slot = self.slot(birth);
        self.bytes[slot] = self.bytes[slot].saturating_sub(bytes);
        self.count[slot] = self.count[slot].saturating_sub(1);
        let since_start = birth.wrapping_sub(self.start);
        if since_start < SETUP {
            let live = &mut self.setup[since_start as usize];
            *live = live.saturating_sub(1);
        } else {
            self.releases[class_of_age(self.now.saturating_sub(birth))] += 1;
        }
    }

    /// A sampled block came to life, as [`Self::born`] has it. Bytes are those that it stands for; in counts it is one, because how
    /// many blocks were seen is what verdicts rest on.
    pub(crate) fn sampled_born(&mut self, now: Window, birth: Window, weight: &Weight) {
        self.born(now, birth, weight.whole_bytes());
        let sampled = self.sampled.get_or_insert_default();
        sampled.live.add(weight);
        sampled.allocated.add(weight);
    }

    /// A sampled block was released.
    pub(crate) fn sampled_died(&mut self, now: Window, birth: Window, weight: &Weight) {
        self.died(now, birth, weight.whole_bytes());
        let sampled = self.sampled.get_or_insert_default();
        sampled.live.remove(weight);
        sampled.freed.add(weight);
    }

    /// Closes every window before `now`. Costs about a hundred additions for each window closed.
    pub fn roll(&mut self, now: Window) {
        if now.saturating_sub(self.now) > 2 * SPAN {
            self.leap(now - SPAN);
        }
        while self.now < now {
            self.close_window();
        }
    }

    /// Closes the open base window and opens the next.
    fn close_window(&mut self) {
        self.fold_releases();
        let closed = self.now;
        let floor = self.floor[0];
        if floor > self.peak.0 {
            self.peak = (floor, closed);
        }
        let young: u64 = (0..AGED.min(closed + 1)).map(|age| self.bytes[(closed - age) as usize % FINE]).sum();
        self.aged[closed as usize % FINE] = self.live_bytes.saturating_sub(young);
        for open in &mut self.floor[1..] {
            *open = floor.min(*open);
        }
        self.now = closed + 1;
        for level in (0..LEVELS).rev() {
            let shift = 2 * level;
            if self.now.trailing_zeros() < shift as u32 {
                continue;
            }
            let kept = windows_kept(level);
            let group = (closed >> shift) as usize;
            self.floors[first_slot(level) + group % kept] = self.floor[level];
            // The minimum of the next window starts from what is live as it opens.
            self.floor[level] = self.live_bytes;
            // The slot of the window that opens still holds the one that is `kept` older: it moves to a coarser level.
            let opening = (self.now >> shift) as usize;
            if opening >= kept {
                let from = first_slot(level) + opening % kept;
                let to = self.slot(((opening - kept) as Window) << shift);
                let moved = std::mem::take(&mut self.bytes[from]);
                self.bytes[to] = self.bytes[to].saturating_add(moved);
                self.count[to] = self.count[to].saturating_add(std::mem::take(&mut self.count[from]));
            }
        }
    }

    /// Adds the open window's blocks and releases to the rates by age.
    fn fold_releases(&mut self) {
        let mut at_risk = [0_u64; CLASSES];
        self.each_cohort(|age, first, cohort| {
            let mut count = cohort.count;
            if first < self.start + SETUP {
                count = count.saturating_sub(self.setup_in(self.slot(first)));
            }
            at_risk[class_of_age(age)] += count;
        });
        for (class, at_risk) in at_risk.into_iter().enumerate() {
            let keep = retention(class);
            let released = std::mem::take(&mut self.releases[class]).max(0) as f32;
            self.released[class] = self.released[class] * keep + released;
            // Who was released within the window was at risk for about half of it.
            self.at_risk[class] = self.at_risk[class] * keep + at_risk as f32 + released / 2.0;
        }
    }

    /// How many of a cohort's blocks are set-up.
    fn setup_in(&self, slot: usize) -> u64 {
        let births = self.start..self.start + SETUP;
        births.zip(self.setup).filter(|(birth, _)| self.slot(*birth) == slot).map(|(_, live)| u64::from(live)).sum()
    }

    /// Forgets all but the totals, as so long a quiet time would, and goes on in window `to`.
    fn leap(&mut self, to: Window) {
        self.bytes = [0; SLOTS + 1];
        self.count = [0; SLOTS + 1];
        self.bytes[ANCIENT] = self.live_bytes;
        self.count[ANCIENT] = u32::try_from(self.live_count).unwrap_or(u32::MAX);
        self.floors = [self.live_bytes; SLOTS];
        self.floor = [self.live_bytes; LEVELS];
        self.aged = [self.live_bytes; FINE];
        self.releases = [0; CLASSES];
        self.released = [0.0; CLASSES];
        self.at_risk = [0.0; CLASSES];
        self.now = to;
    }

    /// Where the cohort of blocks born in window `birth` is kept now.
    #[inline]
    fn slot(&self, birth: Window) -> usize {
        let birth = birth.min(self.now);
        if self.now - birth < FINE as Window {
            return birth as usize % FINE;
        }
        for level in 1..LEVELS {
            let group = birth >> (2 * level);
            if (self.now >> (2 * level)) - group < COARSE as Window {
                return first_slot(level) + group as usize % COARSE;
            }
        }
        ANCIENT
    }

    /// Calls `visit` with age, first window of birth and content of each cohort that is not empty, youngest level
    /// first. The age is that of the youngest block that there can be in the cohort.
    fn each_cohort(&self, mut visit: impl FnMut(Window, Window, Cohort)) {
        if self.live_count == 0 {
            return;
        }
        // The last birth that has left the finer levels.
        let mut latest = self.now;
        for level in 0..LEVELS {
            let (shift, kept) = (2 * level, windows_kept(level));
            let group = self.now >> shift;
            for back in 0..(kept as Window).min(group + 1) {
                let first = (group - back) << shift;
                let slot = first_slot(level) + (group - back) as usize % kept;
                if self.count[slot] > 0 || self.bytes[slot] > 0 {
                    let last = (first + window_length(level) - 1).min(latest);
                    visit(self.now - last, first, self.cohort_in(slot));
                }
            }
            latest = ((group + 1).saturating_sub(kept as Window) << shift).saturating_sub(1);
        }
        if self.count[ANCIENT] > 0 || self.bytes[ANCIENT] > 0 {
            visit(self.now - latest, self.origin, self.cohort_in(ANCIENT));
        }
    }

    fn cohort_in(&self, slot: usize) -> Cohort {
        Cohort { bytes: self.bytes[slot], count: u64::from(self.count[slot]) }
    }

    /// The window in which the stack was first seen; in a forked child not before the fork.
    pub fn start(&self) -> Window {
        self.start
    }

    /// The window that is open.
    pub fn now(&self) -> Window {
        self.now
    }

    /// Bytes allocated and not released.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Blocks allocated and not released that were seen: of those that are sampled, each one.
    pub fn live_count(&self) -> u64 {
        self.live_count
    }

    /// The same with what sampled ones stand for.
    pub fn estimated_count(&self) -> u64 {
        let sampled = self.sampled().live;
        self.live_count.saturating_sub(sampled.seen).saturating_add(sampled.count.round() as u64)
    }

    /// What of the totals is estimated.
    pub fn sampled(&self) -> SampledTotals {
        self.sampled.as_deref().copied().unwrap_or_default()
    }

    /// Blocks ever allocated, those that realloc carried over counted again, with what sampled ones stand for.
    pub fn allocated_count(&self) -> u64 {
        let sampled = self.sampled().allocated;
        self.allocated_count.saturating_sub(sampled.seen).saturating_add(sampled.count.round() as u64)
    }

    /// Bytes ever allocated.
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated_bytes
    }

    /// Bytes ever released.
    pub fn freed_bytes(&self) -> u64 {
        self.freed_bytes
    }

    /// The highest floor of any base window, and that window.
    pub fn peak(&self) -> (u64, Window) {
        self.peak
    }

    /// The cohort with the most bytes, at the finest scale that is kept of it.
    pub fn largest_cohort(&self) -> Cohort {
        let mut largest = Cohort::default();
        self.each_cohort(|_, _, cohort| {
            if cohort.bytes > largest.bytes {
                largest = cohort;
            }
        });
        largest
    }

    /// The window in which the oldest live block was born; exact for the last half minute, then the start of the
    /// (coarser) window it is counted in.
    pub fn oldest_birth(&self) -> Option<Window> {
        let mut oldest: Option<Window> = None;
        self.each_cohort(|_, first, cohort| {
            if cohort.count > 0 {
                let first = first.max(self.origin);
                oldest = Some(oldest.map_or(first, |other| other.min(first)));
            }
        });
        oldest
    }

    /// Live bytes of blocks that were born more than `windows` base windows ago; where the cohort is a coarse one, its
    /// youngest block decides.
    pub fn bytes_older_than(&self, windows: Window) -> u64 {
        let mut sum = 0;
        self.each_cohort(|age, _, cohort| {
            if age > windows {
                sum += cohort.bytes;
            }
        });
        sum
    }

    /// Live blocks and bytes by window of birth at a level, oldest first, up to and including the window that is open;
    /// none from before the stack was first seen. Bytes that were born within the level's reach are all in there,
    /// whichever level keeps them.
    pub fn cohorts(&self, level: usize) -> Vec<Cohort> {
        let shift = 2 * level;
        let last = self.now >> shift;
        let first = (self.start >> shift).max((last + 1).saturating_sub(windows_kept(level) as Window));
        let mut cohorts = vec![Cohort::default(); (last - first + 1) as usize];
        self.each_cohort(|_, birth, cohort| {
            // A cohort kept at a coarser level is older than this level reaches.
            let group = birth >> shift;
            if group >= first {
                let into = &mut cohorts[(group - first) as usize];
                into.bytes += cohort.bytes;
                into.count += cohort.count;
            }
        });
        cohorts
    }

    /// The floors of the closed windows of a level, oldest first; none from before the stack was first seen.
    pub fn floors(&self, level: usize) -> Vec<u64> {
        let (shift, kept) = (2 * level, windows_kept(level));
        let open = self.now >> shift;
        let first = (self.start >> shift).max(open.saturating_sub(kept as Window));
        (first..open).map(|group| self.floors[first_slot(level) + group as usize % kept]).collect()
    }

    /// At the end of each closed base window of the last half minute, oldest first: bytes of blocks that were at least
    /// [`AGED`] windows old. A floor without the noise of short-lived blocks.
    pub fn aged_bytes(&self) -> Vec<u64> {
        let first = self.start.max(self.now.saturating_sub(FINE as Window));
        (first..self.now).map(|window| self.aged[window as usize % FINE]).collect()
    }

    /// How many blocks were released at each class of ages, and how many were at risk of it.
    pub fn releases(&self) -> [Releases; CLASSES] {
        std::array::from_fn(|class| Releases {
            released: f64::from(self.released[class]),
            at_risk: f64::from(self.at_risk[class]),
        })
    }

    /// For a graph: end of each closed window (in base windows since the ledger's first time) and the fewest live bytes
    /// within it, oldest first. Recent windows are short, older ones coarser.
    pub fn series(&self) -> Vec<(Window, u64)> {
        let mut points: Vec<(Window, u64)> = Vec::new();
        // Each level gives what is older than the finer ones reach.
        let mut reached = self.now;
        for level in 0..LEVELS {
            let length = window_length(level);
            let floors = self.floors(level);
            let open = self.now / length;
            for (back, floor) in floors.iter().rev().enumerate() {
                let end = (open - back as Window) * length;
                if end <= reached || level == 0 {
                    points.push((end, *floor));
                    reached = end - length;
                }
            }
        }
        points.reverse();
        points
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// The same quantities from a plain list of blocks.
    #[derive(Default)]
    struct Naive {
        /// Birth and bytes of each live block.
        live: Vec<(Window, u64)>,
        /// Floor of each closed base window.
        floors: Vec<u64>,
    }

    /// Random births and deaths over `windows` windows, in both; now and then a few windows without any event.
    fn random_run(seed: u64, windows: Window) -> (History, Naive) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (mut history, mut naive) = (History::new(0), Naive::default());
        let mut now = 0;
        while now < windows {
            let mut floor: u64 = naive.live.iter().map(|(_, bytes)| bytes).sum();
            for _ in 0..rng.random_range(0..20) {
                if naive.live.is_empty() || rng.random_bool(0.55) {
                    let bytes = rng.random_range(1..5000);
                    history.born(now, now, bytes);
                    naive.live.push((now, bytes));
                } else {
                    let at = rng.random_range(0..naive.live.len());
                    let (birth, bytes) = naive.live.swap_remove(at);
                    history.died(now, birth, bytes);
                }
                floor = floor.min(naive.live.iter().map(|(_, bytes)| bytes).sum());
            }
            naive.floors.push(floor);
            let quiet = if rng.random_bool(0.02) { rng.random_range(1..40) } else { 0 };
            let after: u64 = naive.live.iter().map(|(_, bytes)| bytes).sum();
            naive.floors.extend(std::iter::repeat_n(after, quiet as usize));
            now += 1 + quiet;
        }
        history.roll(now);
        (history, naive)
    }

    /// Cohorts, floors and totals at every level agree with a plain list of blocks.
    #[test]
    fn agrees_with_a_list_of_blocks() {
        for (seed, windows) in [(1, 10), (2, 31), (3, 33), (4, 100), (5, 257), (6, 1100), (7, 5000), (8, 6000)] {
            let (history, naive) = random_run(seed, windows);
            let now = history.now();
            assert_eq!(history.live_bytes(), naive.live.iter().map(|(_, bytes)| bytes).sum::<u64>());
            assert_eq!(history.live_count(), naive.live.len() as u64);
            for level in 0..LEVELS {
                let length = window_length(level);
                let cohorts = history.cohorts(level);
                for (back, cohort) in cohorts.iter().rev().enumerate() {
                    let group = now / length - back as Window;
                    let born_then = naive.live.iter().filter(|(birth, _)| birth / length == group);
                    assert_eq!(cohort.count, born_then.clone().count() as u64, "level {level}, {back} back");
                    assert_eq!(cohort.bytes, born_then.map(|(_, bytes)| bytes).sum::<u64>());
                }
                let floors = history.floors(level);
                for (back, floor) in floors.iter().rev().enumerate() {
                    let end = (now / length - back as Window) * length;
                    let expected = naive.floors[(end - length) as usize..end as usize].iter().min().unwrap();
                    assert_eq!(floor, expected, "level {level}, {back} windows back of {now}");
                }
            }
            for older in [0, 3, 10, 31] {
                let expected = naive.live.iter().filter(|(birth, _)| now - birth > older).map(|(_, bytes)| bytes);
                assert_eq!(history.bytes_older_than(older), expected.sum::<u64>(), "older than {older}");
            }
        }
    }

    /// The graph's points run to the last closed window, in order, without a gap or a repetition.
    #[test]
    fn series_is_in_order_and_complete() {
        for windows in [1, 31, 32, 33, 64, 500, 4096, 5000] {
            let (history, _) = random_run(9, windows);
            let series = history.series();
            assert_eq!(series.last().map(|(end, _)| *end), Some(history.now()));
            let steps: Vec<_> = series.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
            assert!(steps.iter().all(|step| *step >= 1 && *step <= 256), "{steps:?}");
            assert!(steps.windows(2).all(|pair| pair[0] >= pair[1]), "windows get finer towards now: {steps:?}");
        }
    }

    /// Bytes that realloc carries over stay in the cohort of their birth and do not count as released at their age.
    #[test]
    fn realloc_keeps_the_birth() {
        let mut history = History::new(0);
        history.born(0, 0, 100);
        for now in 1..20 {
            history.born(now, 0, 100 * (u64::from(now) + 1));
            history.died(now, 0, 100 * u64::from(now));
        }
        history.roll(20);
        assert_eq!(history.oldest_birth(), Some(0));
        assert_eq!(history.cohorts(0)[0], Cohort { bytes: 2000, count: 1 });
        assert!(history.releases().iter().all(|class| class.released == 0.0));
        // The first window began with nothing; from then on the floor never dips for the copy.
        let expected: Vec<u64> = (0..20).map(|window| 100 * window).collect();
        assert_eq!(history.floors(0), expected);
    }

    /// A release counts in the class of its age, and blocks are at risk once for each window they live; set-up is left
    /// out.
    #[test]
    fn releases_are_counted_by_age() {
        let mut history = History::new(0);
        history.born(0, 0, 1);
        for _ in 0..1000 {
            history.born(SETUP, SETUP, 1);
        }
        history.died(9, 0, 1);
        for _ in 0..400 {
            history.died(SETUP + 10, SETUP, 1);
        }
        history.roll(SETUP + 11);
        let releases = history.releases();
        let class = class_of_age(10);
        assert!((releases[class].released - 400.0).abs() < 0.5);
        // Three windows (8, 9, 10) of 1000, 1000 and, half of those who left counted, 800; less what fades.
        assert!((releases[class].at_risk - 2800.0).abs() < 60.0, "{}", releases[class].at_risk);
        assert!(releases[..class].iter().all(|class| class.released == 0.0));
    }

    /// A stack that has been quiet for days keeps its totals and answers at once.
    #[test]
    fn a_long_quiet_time_keeps_the_totals() {
        let mut history = History::new(0);
        history.born(5, 5, 700);
        history.roll(1_000_000);
        assert_eq!((history.live_bytes(), history.live_count()), (700, 1));
        history.died(1_000_000, 5, 700);
        history.roll(1_000_001);
        assert_eq!((history.live_bytes(), history.bytes_older_than(0)), (0, 0));
    }

    /// Age classes and their lowest ages agree.
    #[test]
    fn age_classes_are_consistent() {
        for class in 0..CLASSES {
            assert_eq!(class_of_age(age_of_class(class)), class);
            assert!(class == 0 || class_of_age(age_of_class(class) - 1) == class - 1);
        }
    }

    /// The size that the documentation states.
    #[test]
    fn size_is_bounded() {
        assert!(size_of::<History>() <= 2750, "{}", size_of::<History>());
    }
}

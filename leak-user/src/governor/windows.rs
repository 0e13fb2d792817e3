//! What a process's call stacks hold, estimated from short windows in which it is watched.
//!
//! Where breakpoints alone cost more than the budget, they stand for a part of the time only. Windows of length `w` begin at the
//! points of a Poisson process of rate `r`; they may overlap. Of the blocks allocated in the first half of a window, those that are
//! live at its end are its *survivors* (S); what dies before needs no estimate and adds no noise. A survivor whose release falls
//! into another window is seen to go (F, counted once for each such window). Then
//!
//! ```text
//! (S - F / ff) / fa,   fa = r w / 2,   ff = r w
//! ```
//!
//! is an unbiased estimate of the growth since the first window. For the points of a Poisson process are independent: given a
//! window (I. M. Slivnyak's theorem), the others cover any moment as often as without it, `r w` times on average. Hence a release is
//! counted `ff` times on average *however long its block lived*, and a birth `fa` times. Windows that keep apart from each other
//! would not do: they see too few of the releases just after a window, and blocks that live a little longer than one would seem to pile up.
//!
//! # How sure that is
//!
//! What is summed has a term for each window: its survivors and the releases of these. The variance is taken from how they differ, by
//! the second moments (N. R. Campbell's theorem for sums over a Poisson process; a little more than the jackknife gives, since how
//! many windows there are is chance as well). But a window's survivors may all be released together, as a cache's entries are
//! after a fixed time, and one window in 1 / ff sees that: with few of these coincidences seen, the terms do not show how much hangs on
//! one. So
//!
//! - to the variance that of one more coincidence is added;
//! - a stack grows only if, were all survivors released in the end, it would be unlikely (one in a thousand) that so few windows
//!   saw some of another's go. `N ff` such coincidences are then expected of N windows with survivors: 10 of 200 windows at
//!   a duty of 5 %. Or, where there were enough coincidences (sessions and a leak in one stack), if the estimate is large beside
//!   its error as it would be without growth.
//!
//! # Addresses that are handed out again
//!
//! A survivor may be released unseen, and its address handed out again unseen: the release of that other block would be taken for
//! the survivor's. An allocation at the address that is seen ends that (the survivor is gone, and its later releases are nobody's);
//! otherwise the estimate of its stack comes out too low, never too high. A leaked block's address is never handed out again, so
//! stacks that do nothing but leak are not touched.
//!
//! A realloc is a release and an allocation.
//!
//! Times are nanoseconds of one clock; this module has none of its own.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::decode::StackId;
use crate::detect::normal_below;

/// Survivors that are remembered for a process. Further ones are left out, with the window that they belong to.
pub const MAX_SURVIVORS: usize = 1 << 20;

/// Windows from which on the spread of what they saw says anything.
pub const MIN_WINDOWS: usize = 10;

/// Windows that are remembered; growth is that since the oldest of them.
const MAX_WINDOWS: usize = 2048;

/// How unlikely what was seen has to be without growth.
const UNLIKELY: f64 = 1e-3;
/// The same in standard errors, where there were so many coincidences that they are about normal.
const GROWS: f64 = 3.5;
const MANY: f64 = 20.0;

/// How a process is watched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Length of a window, nanoseconds.
    pub length: u64,
    /// Windows that begin in a second, on average.
    pub rate: f64,
}

impl Plan {
    /// How often the first half of a window covers a moment, on average.
    fn births(&self) -> f64 {
        self.releases() / 2.0
    }

    /// How often a window does.
    fn releases(&self) -> f64 {
        self.rate * self.length as f64 / 1e9
    }

    /// The share of the time in which at least one window is open.
    pub fn duty(&self) -> f64 {
        -(-self.releases()).exp_m1()
    }

    /// The rate at which windows of this length are open for such a share of the time.
    pub fn with_duty(length: u64, duty: f64) -> Self {
        Self { length, rate: -(-duty.clamp(0.0, 0.99)).ln_1p() / (length as f64 / 1e9) }
    }

    /// Nanoseconds until the next window begins, for a number that is uniform in (0, 1].
    pub fn wait(&self, uniform: f64) -> u64 {
        (-uniform.max(f64::MIN_POSITIVE).ln() / self.rate * 1e9) as u64
    }
}

/// A block, as far as it is known.
#[derive(Clone, Copy, Debug)]
struct Block {
    stack: StackId,
    size: u64,
    birth: u64,
}

/// A block that outlived windows: those that it was born in the first half of.
#[derive(Clone, Copy, Debug)]
struct Survivor {
    block: Block,
    /// Its windows: from this one on, so many.
    first: u32,
    windows: u32,
}

/// A window, and what each stack added to the estimates by way of it.
#[derive(Clone, Debug)]
struct Window {
    start: u64,
    plan: Plan,
    /// Something of it was lost: it does not count.
    void: bool,
    /// By stack: bytes and blocks.
    seen: HashMap<StackId, Term>,
}

/// What a stack adds to its estimate by way of one window.
#[derive(Clone, Copy, Debug, Default)]
struct Term {
    /// Survivors.
    bytes: f64,
    blocks: f64,
    /// Their releases, by how often they are seen.
    freed_bytes: f64,
    freed_blocks: f64,
    /// Windows that saw some of them go, and the number of the last of these.
    coincidences: f64,
    last: u32,
}

/// Watches one process.
#[derive(Clone, Debug, Default)]
pub struct Windows {
    all: Vec<Window>,
    /// Blocks born in windows that are open, by address.
    young: HashMap<u64, Block>,
    survivors: HashMap<u64, Survivor>,
    /// Windows that ever began.
    opened: u32,
    /// Windows from this one on are open, or have not been closed.
    open: usize,
    /// When the first of those that are remembered might have begun.
    since: Option<u64>,
    counters: Counters,
    totals: HashMap<StackId, Seen>,
}

/// What was seen of a stack, in all windows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    pub allocated_bytes: u64,
    pub freed_bytes: u64,
}

/// What was met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Survivors whose address was handed out again, and whose release was therefore missed.
    pub reused: u64,
    /// Survivors for which there was no room.
    pub no_room: u64,
}

/// What is thought of a stack.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Bytes, and blocks, by which it has grown since the first window, and their standard errors.
    pub bytes: f64,
    pub bytes_error: f64,
    pub blocks: f64,
    pub blocks_error: f64,
    /// The error of blocks, were none left in the end.
    pub null_error: f64,
    /// Windows that saw survivors of another go, and how many would have been expected to, were all released in the end.
    pub coincidences: f64,
    pub expected: f64,
    /// Windows in which it left survivors.
    pub windows: u32,
    pub all_windows: u32,
}

impl Estimate {
    /// How likely what was seen is at the most if the stack does not grow.
    pub fn chance(&self) -> f64 {
        if self.bytes <= 0.0 || self.blocks <= 0.0 {
            return 1.0;
        }
        let few = poisson_at_most(self.coincidences, self.expected);
        let far = if self.coincidences >= MANY { normal_below(-self.blocks / self.null_error.max(1e-9)) } else { 1.0 };
        few.min(far)
    }

    /// Whether it grows.
    pub fn grows(&self) -> bool {
        let enough = self.all_windows as usize >= MIN_WINDOWS && self.windows >= 5;
        let far = self.coincidences >= MANY && self.blocks >= GROWS * self.null_error;
        let few = poisson_at_most(self.coincidences, self.expected) < UNLIKELY;
        enough && self.bytes > 0.0 && self.blocks > 0.0 && (few || far)
    }

    /// Whether nothing speaks against growth but that too little was seen.
    pub fn waits(&self) -> bool {
        !self.grows() && self.blocks > self.blocks_error && self.expected < -2.0 * UNLIKELY.ln()
    }

    /// The 95 % interval of bytes.
    pub fn bytes_ci95(&self) -> (f64, f64) {
        (self.bytes - 1.96 * self.bytes_error, self.bytes + 1.96 * self.bytes_error)
    }

    /// The same of blocks.
    pub fn blocks_ci95(&self) -> (f64, f64) {
        (self.blocks - 1.96 * self.blocks_error, self.blocks + 1.96 * self.blocks_error)
    }
}

impl Windows {
    /// A window begins, by this plan.
    pub fn open(&mut self, time: u64, plan: Plan) {
        self.advance(time);
        if self.all.len() >= MAX_WINDOWS {
            self.forget(MAX_WINDOWS / 2);
        }
        self.begin(time);
        self.opened = self.opened.wrapping_add(1);
        self.all.push(Window { start: time, plan, void: false, seen: HashMap::new() });
    }

    /// Watching begins, with a wait for the first window.
    pub fn begin(&mut self, time: u64) {
        self.since = self.since.or(Some(time));
    }

    /// Forgets the oldest windows, and the survivors of these.
    fn forget(&mut self, oldest: usize) {
        let oldest = oldest.min(self.open);
        self.all.drain(..oldest);
        self.open -= oldest;
        self.since = self.all.first().map(|window| window.start).or(self.since);
        self.survivors.retain(|_, survivor| {
            survivor.first = survivor.first.checked_sub(oldest as u32).unwrap_or(u32::MAX);
            survivor.first != u32::MAX
        });
    }

    /// How many have ended of those that are remembered.
    pub fn count(&self) -> usize {
        self.all[..self.open].iter().filter(|window| !window.void).count()
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Since when growth is estimated.
    pub fn since(&self) -> Option<u64> {
        self.since
    }

    /// Closes the windows that have ended by this time: what is live of those born in their first halves are their survivors.
    pub fn advance(&mut self, time: u64) {
        while let Some(window) = self.all.get(self.open) {
            let end = window.start + window.plan.length;
            if end > time {
                break;
            }
            let index = self.open;
            self.open += 1;
            self.close(index, window.start, window.plan.length);
        }
        if self.open == self.all.len() {
            self.young.clear();
        }
    }

    fn close(&mut self, index: usize, start: u64, length: u64) {
        let half = start + length / 2;
        for (addr, block) in &self.young {
            if block.birth < start || block.birth >= half {
                continue;
            }
            if self.survivors.len() >= MAX_SURVIVORS && !self.survivors.contains_key(addr) {
                self.counters.no_room += 1;
                continue;
            }
            let seen = self.all[index].seen.entry(block.stack).or_default();
            seen.bytes += block.size as f64;
            seen.blocks += 1.0;
            match self.survivors.entry(*addr) {
                Entry::Occupied(mut known) if known.get().block.birth == block.birth => known.get_mut().windows += 1,
                Entry::Occupied(mut other) => {
                    other.insert(Survivor { block: *block, first: index as u32, windows: 1 });
                }
                Entry::Vacant(place) => {
                    place.insert(Survivor { block: *block, first: index as u32, windows: 1 });
                }
            }
        }
    }

    /// A block was allocated.
    pub fn alloc(&mut self, time: u64, addr: u64, size: u64, stack: StackId) {
        self.advance(time);
        if self.open == self.all.len() {
            return;
        }
        if self.survivors.remove(&addr).is_some() {
            self.counters.reused += 1;
        }
        self.young.insert(addr, Block { stack, size, birth: time });
        let total = self.totals.entry(stack).or_default();
        total.allocated_bytes = total.allocated_bytes.saturating_add(size);
    }

    /// A block was released; the stack and size that it had, if it is known.
    pub fn free(&mut self, time: u64, addr: u64) {
        self.advance(time);
        let open = self.all.len() - self.open;
        if open == 0 {
            return;
        }
        let young = self.young.remove(&addr);
        let survivor = self.survivors.remove(&addr);
        if let Some(block) = young.or(survivor.map(|survivor| survivor.block)) {
            let total = self.totals.entry(block.stack).or_default();
            total.freed_bytes = total.freed_bytes.saturating_add(block.size);
        }
        let Some(Survivor { block, first, windows }) = survivor else { return };
        let Some(plan) = self.all.last().map(|window| window.plan) else { return };
        let weight = open as f64 / plan.releases();
        // Windows are told apart by the number of the last that is open, from one on.
        let now = self.opened;
        // Each of its windows sees the release once for each window that is open now. None of them is its own: those have
        // ended.
        for index in first..first + windows {
            let Some(window) = self.all.get_mut(index as usize) else { continue };
            let seen = window.seen.entry(block.stack).or_default();
            seen.freed_bytes += weight * block.size as f64;
            seen.freed_blocks += weight;
            if seen.last != now {
                seen.last = now;
                seen.coincidences += open as f64;
            }
        }
    }

    /// Something of the open windows was lost: they do not count.
    pub fn lose(&mut self) {
        for window in &mut self.all[self.open..] {
            window.seen.clear();
            window.void = true;
        }
        self.young.clear();
        self.open = self.all.len();
    }

    /// What is thought of each stack that left survivors.
    pub fn estimates(&self) -> HashMap<StackId, Estimate> {
        let closed = &self.all[..self.open];
        let all = self.count() as f64;
        // What was lost of windows that do not count was as much as the others saw.
        let whole = if all > 0.0 { closed.len() as f64 / all } else { 1.0 };
        let mut sums: HashMap<StackId, Estimate> = HashMap::new();
        for window in closed.iter().filter(|window| !window.void) {
            let (births, releases) = (window.plan.births() / whole, window.plan.releases() / whole);
            for (stack, term) in &window.seen {
                let sum = sums.entry(*stack).or_default();
                let bytes = (term.bytes - term.freed_bytes) / births;
                let blocks = (term.blocks - term.freed_blocks) / births;
                sum.bytes += bytes;
                sum.blocks += blocks;
                // Squares, until all are there.
                sum.bytes_error += bytes * bytes;
                sum.blocks_error += blocks * blocks;
                let together = term.blocks / births;
                sum.null_error += together * together * (1.0 + 1.0 / releases);
                sum.coincidences += term.coincidences;
                sum.expected += if term.blocks > 0.0 { releases } else { 0.0 };
                sum.windows += 1;
            }
        }
        for estimate in sums.values_mut() {
            estimate.all_windows = all as u32;
            let windows = f64::from(estimate.windows);
            // One more coincidence, of as many survivors as a window has (in the quadratic mean).
            let releases = (estimate.expected / windows).max(1e-9);
            let one = estimate.null_error / windows / (1.0 + releases) / releases;
            let per_block = if estimate.blocks > 0.0 { (estimate.bytes / estimate.blocks).abs() } else { 0.0 };
            estimate.blocks_error = (estimate.blocks_error + one).sqrt();
            estimate.bytes_error = (estimate.bytes_error + one * per_block * per_block).sqrt();
            estimate.null_error = estimate.null_error.sqrt();
        }
        sums
    }

    /// What was seen of a stack.
    pub fn seen(&self, stack: StackId) -> Seen {
        self.totals.get(&stack).copied().unwrap_or_default()
    }
}

/// The probability of at most so many events where `mean` are expected, Poisson.
fn poisson_at_most(events: f64, mean: f64) -> f64 {
    // Where the first term is nothing, it is about normal.
    if mean > 700.0 {
        return normal_below((events + 0.5 - mean) / mean.sqrt());
    }
    let mut term = (-mean).exp();
    let mut sum = term;
    for event in 1..=events.min(1e4) as u32 {
        term *= mean / f64::from(event);
        sum += term;
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64*, which is enough for simulations and the same everywhere.
    struct Random(u64);

    impl Random {
        fn uniform(&mut self) -> f64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 + 1.0) / 9_007_199_254_740_992.0
        }

        fn exponential(&mut self, mean: f64) -> f64 {
            -self.uniform().ln() * mean
        }
    }

    /// How long blocks live, seconds.
    #[derive(Clone, Copy)]
    enum Life {
        Forever,
        Exactly(f64),
        About(f64),
    }

    const SECOND: f64 = 1e9;
    const RUN: f64 = 600.0;
    const PLAN: Plan = Plan { length: 100_000_000, rate: 0.5 };

    /// A stack that allocates 100 bytes so many times a second, watched for ten minutes: the truth and the estimate, in blocks.
    fn simulate(random: &mut Random, rate: f64, life: Life) -> (f64, Estimate) {
        let mut starts = Vec::new();
        let mut time = random.exponential(1.0 / PLAN.rate);
        while time < RUN - 0.1 {
            starts.push(time);
            time += random.exponential(1.0 / PLAN.rate);
        }
        let length = PLAN.length as f64 / SECOND;
        let covered = |time: f64| {
            let after = starts.partition_point(|start| *start <= time);
            after > 0 && starts[after - 1] + length > time
        };
        // Only what a window covers is worth an event.
        let mut events: Vec<(f64, u8, u64)> = starts.iter().map(|start| (*start, 0, 0)).collect();
        let (mut live, mut addr) = (0_u64, 0);
        let mut time = random.exponential(1.0 / rate);
        while time < RUN {
            let death = match life {
                Life::Forever => f64::INFINITY,
                Life::Exactly(seconds) => time + seconds,
                Life::About(seconds) => time + random.exponential(seconds),
            };
            addr += 16;
            live += u64::from(death > RUN);
            if covered(time) {
                events.push((time, 1, addr));
                if death < RUN && covered(death) {
                    events.push((death, 2, addr));
                }
            }
            time += random.exponential(1.0 / rate);
        }
        events.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut windows = Windows::default();
        for (time, what, addr) in events {
            let time = (time * SECOND) as u64;
            match what {
                0 => windows.open(time, PLAN),
                1 => windows.alloc(time, addr, 100, 7),
                _ => windows.free(time, addr),
            }
        }
        windows.advance(u64::MAX);
        let none = Estimate { all_windows: windows.count() as u32, ..Estimate::default() };
        (live as f64, windows.estimates().get(&7).copied().unwrap_or(none))
    }

    /// Many runs: mean truth, mean estimate, standard deviation of the error, how often the interval holds the truth, how often
    /// the stack is called growing.
    fn many(runs: u32, rate: f64, life: Life) -> [f64; 5] {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let [mut truth, mut mean, mut squares, mut held, mut grows] = [0.0; 5];
        for _ in 0..runs {
            let (live, estimate) = simulate(&mut random, rate, life);
            let (low, high) = estimate.blocks_ci95();
            truth += live;
            mean += estimate.blocks;
            squares += (estimate.blocks - live).powi(2);
            held += f64::from(u8::from((low..=high).contains(&live)));
            grows += f64::from(u8::from(estimate.grows()));
        }
        let runs = f64::from(runs);
        println!(
            "rate {rate}: truth {:.0}, mean {:.0}, sd {:.0}, held {:.3}, grows {:.3}",
            truth / runs,
            mean / runs,
            (squares / runs).sqrt(),
            held / runs,
            grows / runs
        );
        [truth / runs, mean / runs, (squares / runs).sqrt(), held / runs, grows / runs]
    }

    /// Whether the mean of the estimates is the truth, as far as so many runs can tell (four standard errors).
    fn is_unbiased([truth, mean, deviation, ..]: [f64; 5], runs: f64) -> bool {
        (mean - truth).abs() <= 4.0 * deviation / runs.sqrt() + 0.5
    }

    /// A leak is found, in ten minutes in nine runs of ten, its size without bias, and the interval holds the truth as often as it says.
    #[test]
    fn leak() {
        let result = many(300, 17.0, Life::Forever);
        assert!(is_unbiased(result, 300.0), "{result:?}");
        assert!(result[3] >= 0.93, "{result:?}");
        assert!(result[4] > 0.9, "{result:?}");
    }

    /// Neither a cache whose entries live for 30 s, nor one in which they do on average, nor sessions, nor requests are called
    /// growing, and none of the estimates is biased.
    #[test]
    fn what_does_not_grow() {
        for (runs, rate, life) in [
            (300, 17.0, Life::Exactly(30.0)),
            (300, 17.0, Life::About(30.0)),
            (60, 100.0, Life::About(2.0)),
            (20, 2000.0, Life::Exactly(0.005)),
        ] {
            let result = many(runs, rate, life);
            assert!(is_unbiased(result, f64::from(runs)), "{result:?}");
            assert!(result[4] < 0.004 * 4.0, "{result:?}");
        }
    }

    /// Blocks that live a little longer than a window are seen to go as often as others: windows may overlap.
    #[test]
    fn lives_of_about_a_window() {
        for seconds in [0.08, 0.12, 0.2, 0.5] {
            let result = many(100, 50.0, Life::Exactly(seconds));
            assert!(is_unbiased(result, 100.0), "{seconds}: {result:?}");
            assert!(result[4] < 0.011, "{seconds}: {result:?}");
        }
    }

    /// An address that is seen handed out again belongs to another block: its release is not the survivor's.
    #[test]
    fn addresses_are_handed_out_again() {
        let plan = Plan { length: 100, rate: 1e7 };
        let mut windows = Windows::default();
        windows.open(0, plan);
        windows.alloc(10, 0x1000, 100, 7);
        windows.open(1000, plan);
        windows.alloc(1010, 0x1000, 100, 8);
        windows.free(1020, 0x1000);
        windows.advance(2000);
        let estimates = windows.estimates();
        // fa = 1e7 / s * 100 ns / 2
        assert!((estimates[&7].blocks - 2.0).abs() < 1e-9, "{estimates:?}");
        assert!(!estimates.contains_key(&8));
        assert_eq!(windows.counters().reused, 1);
    }

    /// Only the first half's blocks count, only those that outlive the window, and a window of which something was lost does not.
    #[test]
    fn who_survives() {
        let plan = Plan { length: 100, rate: 1e7 };
        let mut windows = Windows::default();
        windows.open(0, plan);
        windows.alloc(10, 0x1000, 100, 1);
        windows.alloc(20, 0x2000, 100, 2);
        windows.alloc(60, 0x3000, 100, 3);
        windows.free(90, 0x2000);
        windows.advance(100);
        windows.open(500, plan);
        windows.alloc(510, 0x4000, 100, 4);
        windows.lose();
        windows.advance(1000);
        assert_eq!(windows.estimates().into_keys().collect::<Vec<_>>(), [1]);
        assert_eq!(windows.count(), 1);
    }

    /// Windows are forgotten oldest first, with what they saw, and what the others saw stays as it was.
    #[test]
    fn windows_are_bounded() {
        let plan = Plan { length: 100, rate: 1e7 };
        let mut windows = Windows::default();
        for index in 0..=MAX_WINDOWS as u64 {
            let start = index * 1000;
            windows.open(start, plan);
            windows.alloc(start + 10, 16 * (index + 1), 100, index % 2);
        }
        windows.advance(u64::MAX);
        assert_eq!(windows.count(), MAX_WINDOWS / 2 + 1);
        let kept: f64 = windows.estimates().values().map(|estimate| estimate.blocks).sum();
        assert!((kept - 2.0 * (MAX_WINDOWS / 2 + 1) as f64).abs() < 1e-6, "{kept}");
        assert_eq!(windows.survivors.len(), MAX_WINDOWS / 2 + 1);
    }

    /// Plans say how much of the time they watch, and waits have the mean that they should.
    #[test]
    fn plans() {
        let plan = Plan::with_duty(200_000_000, 0.05);
        assert!((plan.duty() - 0.05).abs() < 1e-12);
        let mut random = Random(1);
        let mean = (0..100_000).map(|_| plan.wait(random.uniform()) as f64).sum::<f64>() / 1e5 / 1e9;
        assert!((mean * plan.rate - 1.0).abs() < 0.02, "{mean}");
    }
}

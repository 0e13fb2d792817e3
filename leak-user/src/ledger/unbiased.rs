//! Estimates are right on average, and their intervals cover as often as they say: over many seeded runs of streams that are
//! known, through the kernel side's own draws and the ledger.

use leak_common::sampling::Interval;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::{Config, Ledger, Sampled};
use crate::decode::{Event, What};
use crate::detect::around;
use crate::detect::simulation::{Countdown, Sizes};

const P: u32 = 7;
const STACK: u64 = 3;
const RUNS: u64 = 1000;

/// A program's allocations, each of which it frees again or does not.
struct Stream {
    name: &'static str,
    blocks: u32,
    sizes: Sizes,
    /// The share that stays.
    stays: f64,
    /// The share of those that stay that go through realloc, to twice the size.
    resized: f64,
    /// Intervals in bytes, each for its part of the stream; zero: exact.
    intervals: &'static [u64],
}

/// The same quantities, known and estimated.
const QUANTITIES: [&str; 4] = ["live bytes", "live blocks", "allocated bytes", "freed bytes"];

/// What a quantity came to over the runs.
#[derive(Clone, Copy, Default)]
struct Tally {
    truth: f64,
    estimate: f64,
    covered: u32,
    /// Of the first 200 runs.
    truth_200: f64,
    estimate_200: f64,
}

struct Case {
    ledger: Ledger,
    live: (u64, u64),
    allocated: u64,
    freed: u64,
}

impl Case {
    fn run(stream: &Stream, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        // What the program does is the same in each run: only the draws differ.
        let mut program = SmallRng::seed_from_u64(99);
        let mut ledger = Ledger::new(Config::default());
        ledger.add_process(P, 0, 0);
        let mut case = Self { ledger, live: (0, 0), allocated: 0, freed: 0 };
        let mut countdown = Countdown::new(Interval::EXACT);
        let part = stream.blocks.div_ceil(stream.intervals.len() as u32);
        let mut to_free: Vec<(u64, u64, bool)> = Vec::new();
        for block in 0..stream.blocks {
            if block % part == 0 {
                let bytes = stream.intervals[(block / part) as usize];
                countdown.set(if bytes == 0 { Interval::EXACT } else { Interval::near(bytes) });
            }
            let addr = 0x1000 + u64::from(block) * 16;
            let size = stream.sizes.draw(&mut program);
            let seen = case.alloc(addr, size, countdown.take(&mut rng, size));
            if !program.random_bool(stream.stays) {
                to_free.push((addr, size, seen));
            } else if program.random_bool(stream.resized) {
                let new = (addr + 8, 2 * size);
                let interval = countdown.take(&mut rng, new.1);
                case.realloc((addr, size, seen), new, interval);
            }
            // Frees come a little later, under whichever interval.
            if to_free.len() > 100 {
                let at = program.random_range(0..to_free.len());
                let (addr, size, seen) = to_free.swap_remove(at);
                case.free(addr, size, seen);
            }
        }
        for (addr, size, seen) in to_free {
            case.free(addr, size, seen);
        }
        case
    }

    fn apply(&mut self, what: What<'_>) {
        self.ledger.apply(&Event { tgid: P, what });
    }

    fn came(&mut self, size: u64) {
        self.live = (self.live.0 + size, self.live.1 + 1);
        self.allocated += size;
    }

    fn went(&mut self, size: u64) {
        self.live = (self.live.0 - size, self.live.1 - 1);
        self.freed += size;
    }

    fn alloc(&mut self, addr: u64, size: u64, interval: Option<Interval>) -> bool {
        self.came(size);
        if let Some(interval) = interval {
            self.apply(What::Alloc { addr, size, stack: STACK, time: 0, interval });
        }
        interval.is_some()
    }

    fn free(&mut self, addr: u64, size: u64, seen: bool) {
        self.went(size);
        if seen {
            self.apply(What::Free { addr, time: 0 });
        }
    }

    /// The four ways that a realloc is told, as the kernel side tells it.
    fn realloc(&mut self, (old, size, seen): (u64, u64, bool), new: (u64, u64), interval: Option<Interval>) {
        if !seen {
            self.went(size);
            self.alloc(new.0, new.1, interval);
            return;
        }
        self.went(size);
        self.came(new.1);
        self.apply(What::ReallocBegin { tid: 1, addr: old, time: 0 });
        let (addr, size) = if interval.is_some() { new } else { (0, 0) };
        let interval = interval.unwrap_or_default();
        self.apply(What::ReallocEnd { tid: 1, addr, size, stack: STACK, time: 0, interval });
    }

    /// Truth, estimate, and interval, in the order of [`QUANTITIES`].
    fn figures(&self) -> [(f64, f64, [u64; 2]); 4] {
        let process = self.ledger.process(P).expect("it was added");
        let Some(stack) = process.stacks().next() else { return [(0.0, 0.0, [0, 0]); 4] };
        let (history, sampled) = (stack.history, stack.history.sampled());
        let bytes = |truth: u64, total: u64, sampled: &Sampled| {
            (truth as f64, total as f64, around(total, sampled.bytes, sampled.bytes_variance))
        };
        let count = history.estimated_count();
        [
            bytes(self.live.0, history.live_bytes(), &sampled.live),
            (self.live.1 as f64, count as f64, around(count, sampled.live.count, sampled.live.count_variance)),
            bytes(self.allocated, history.allocated_bytes(), &sampled.allocated),
            bytes(self.freed, history.freed_bytes(), &sampled.freed),
        ]
    }
}

fn tally(stream: &Stream) -> [Tally; 4] {
    let mut tallies = [Tally::default(); 4];
    for run in 0..RUNS {
        let case = Case::run(stream, run + 1);
        for (tally, (truth, estimate, [low, high])) in tallies.iter_mut().zip(case.figures()) {
            tally.truth += truth;
            tally.estimate += estimate;
            tally.covered += u32::from((low as f64..=high as f64).contains(&truth));
            if run < 200 {
                tally.truth_200 += truth;
                tally.estimate_200 += estimate;
            }
        }
    }
    tallies
}

/// Bytes are right to 1 % in 200 runs, and their intervals cover 93 to 97 times in 100; so are numbers of blocks where `counts` says
/// that of the smallest some are seen in each run. Otherwise these are right on average only: of blocks a thousandth of the interval
/// large a run sees one in a thousand or none, and cannot tell how many it has missed.
fn check(stream: &Stream, counts: bool) {
    for (tally, name) in tally(stream).iter().zip(QUANTITIES) {
        let bias = |estimate: f64, truth: f64| estimate / truth - 1.0;
        let (of_200, of_all) = (bias(tally.estimate_200, tally.truth_200), bias(tally.estimate, tally.truth));
        let coverage = f64::from(tally.covered) / RUNS as f64;
        println!(
            "{}: {name}: off by {of_200:+.4} in 200 runs, {of_all:+.4} in all, covered {coverage:.3}",
            stream.name
        );
        let steady = counts || name.ends_with("bytes");
        assert!(of_all.abs() < if steady { 0.005 } else { 0.02 }, "{}, {name}: {of_all}", stream.name);
        if steady {
            assert!(of_200.abs() < 0.01, "{}, {name}: {of_200}", stream.name);
            assert!((0.93..=0.97).contains(&coverage), "{}, {name}: coverage {coverage}", stream.name);
        }
    }
}

/// Small blocks of one size, half of them freed.
#[test]
fn small_blocks() {
    let sizes = Sizes::All(64);
    check(&Stream { name: "small", blocks: 20_000, sizes, stays: 0.5, resized: 0.0, intervals: &[1024] }, true);
}

/// Sizes over four orders of magnitude, on both sides of the interval.
#[test]
fn sizes_of_all_kinds() {
    let sizes = Sizes::Between(16.0, 65_536.0);
    let stream = |sizes, name| Stream { name, blocks: 4000, sizes, stays: 0.5, resized: 0.0, intervals: &[16 << 10] };
    check(&stream(sizes, "mixed"), false);
    check(&stream(Sizes::Between(512.0, 65_536.0), "not too small"), true);
}

/// The interval changes while the stream runs, to exact and back, and blocks of each are freed under another.
#[test]
fn changing_intervals() {
    let sizes = Sizes::Between(16.0, 4096.0);
    let intervals = &[512, 4096, 0, 8192, 1024];
    check(&Stream { name: "changing", blocks: 10_000, sizes, stays: 0.5, resized: 0.0, intervals }, false);
    let sizes = Sizes::Between(256.0, 4096.0);
    check(
        &Stream { name: "changing, not too small", blocks: 10_000, sizes, stays: 0.5, resized: 0.0, intervals },
        true,
    );
}

/// Blocks that grow by realloc: drawn anew, whether the old one was seen or not.
#[test]
fn resized_blocks() {
    let sizes = Sizes::Between(32.0, 2048.0);
    check(&Stream { name: "resized", blocks: 10_000, sizes, stays: 0.7, resized: 0.8, intervals: &[2048] }, true);
}

/// Some twenty samples in all: the intervals still cover, and the mean of many runs is still right.
#[test]
fn few_samples() {
    let stream =
        Stream { name: "few", blocks: 1000, sizes: Sizes::All(100), stays: 0.5, resized: 0.0, intervals: &[2500] };
    for (tally, name) in tally(&stream).iter().zip(QUANTITIES) {
        let off = tally.estimate / tally.truth - 1.0;
        let coverage = f64::from(tally.covered) / RUNS as f64;
        println!("{}: {name}: off by {off:+.4}, covered {coverage:.3}", stream.name);
        // Of 20 samples the mean over 1000 runs is off by 0.7 % at one standard deviation.
        assert!(off.abs() < 0.02, "{name}: {off}");
        assert!((0.92..=0.98).contains(&coverage), "{name}: {coverage}");
    }
}

//! Programs to judge, simulated block by block: what they allocate goes into real histories through `born` and `died`.
//!
//! Times are in seconds, and a history's base window is one of them. A program is a closure that is called once a tick and
//! allocates; releases that are due come before. Tracing begins at time zero, whatever the program did before.

use std::collections::VecDeque;

use leak_common::sampling::Interval;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::ledger::Weight;
use crate::ledger::history::{History, Window};

/// Ticks of simulated time in a second.
pub const TICKS: u32 = 20;

/// How far ahead a release can be set, in ticks (over an hour); a power of two.
const AHEAD: usize = 1 << 17;

/// A live block.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    birth: Window,
    bytes: u64,
    /// What it was sampled with; none: it was not.
    interval: Option<Interval>,
}

/// A thread's countdown to its next sample, as the kernel side keeps it.
#[derive(Clone, Copy, Debug)]
pub struct Countdown {
    interval: Interval,
    left: Option<u64>,
}

impl Countdown {
    pub fn new(interval: Interval) -> Self {
        Self { interval, left: None }
    }

    /// The interval from now on. What is left was drawn with another.
    pub fn set(&mut self, interval: Interval) {
        *self = Self::new(interval);
    }

    /// What an allocation of so many bytes is sampled with, if it is.
    pub fn take(&mut self, rng: &mut SmallRng, bytes: u64) -> Option<Interval> {
        if self.interval.is_exact() {
            return Some(self.interval);
        }
        let bytes = bytes.max(1);
        let left = self.left.unwrap_or_else(|| self.interval.draw(rng.random()));
        let sampled = bytes >= left;
        self.left = Some(if sampled { self.interval.draw(rng.random()) } else { left - bytes });
        sampled.then_some(self.interval)
    }
}

/// One call stack of a simulated program.
pub struct Simulation {
    pub history: History,
    pub rng: SmallRng,
    pub countdown: Countdown,
    tick: u32,
    due: Vec<Vec<Block>>,
}

/// What the program does in a tick.
pub type Program = Box<dyn FnMut(&mut Simulation)>;

impl Simulation {
    pub fn new(seed: u64) -> Self {
        Self::sampled(seed, Interval::EXACT)
    }

    /// The same, of which only samples are seen.
    pub fn sampled(seed: u64, interval: Interval) -> Self {
        Self {
            history: History::new(0),
            rng: SmallRng::seed_from_u64(seed),
            countdown: Countdown::new(interval),
            tick: 0,
            due: Vec::new(),
        }
    }

    /// Runs `program` up to `end` (seconds).
    pub fn run_to(&mut self, end: Window, program: &mut Program) {
        while self.tick < end * TICKS {
            if let Some(due) = self.due.get_mut(self.tick as usize % AHEAD) {
                for block in std::mem::take(due) {
                    self.free(block);
                }
            }
            program(self);
            self.tick += 1;
        }
        self.history.roll(end);
    }

    /// Seconds since tracing began.
    pub fn time(&self) -> f64 {
        f64::from(self.tick) / f64::from(TICKS)
    }

    pub fn window(&self) -> Window {
        self.tick / TICKS
    }

    pub fn alloc(&mut self, bytes: u64) -> Block {
        let now = self.window();
        self.take(now, bytes)
    }

    /// A block that counts as born in this window, if it is seen.
    fn take(&mut self, birth: Window, bytes: u64) -> Block {
        let (interval, now) = (self.countdown.take(&mut self.rng, bytes), self.window());
        match interval {
            Some(Interval::EXACT) => self.history.born(now, birth, bytes),
            Some(interval) => self.history.sampled_born(now, birth, &Weight::of(interval, bytes)),
            None => {}
        }
        Block { birth, bytes, interval }
    }

    pub fn free(&mut self, block: Block) {
        let now = self.window();
        match block.interval {
            Some(Interval::EXACT) => self.history.died(now, block.birth, block.bytes),
            Some(interval) => self.history.sampled_died(now, block.birth, &Weight::of(interval, block.bytes)),
            None => {}
        }
    }

    /// The block as realloc leaves it: another size, the same birth as far as that was seen.
    pub fn realloc(&mut self, block: Block, bytes: u64) -> Block {
        let birth = if block.interval.is_some() { block.birth } else { self.window() };
        let new = self.take(birth, bytes);
        self.free(block);
        new
    }

    /// Allocates, and releases after `life` seconds; what lives less than a tick is released at once.
    pub fn alloc_for(&mut self, bytes: u64, life: f64) {
        let block = self.alloc(bytes);
        let ticks = (life * f64::from(TICKS)).round() as u32;
        if ticks == 0 {
            return self.free(block);
        }
        let at = (self.tick + ticks) as usize;
        assert!((ticks as usize) < AHEAD, "release too far ahead");
        let at = at % AHEAD;
        if self.due.len() <= at {
            self.due.resize_with(at + 1, Vec::new);
        }
        self.due[at].push(block);
    }

    /// How many events of a Poisson process with `rate` a second fall into this tick.
    pub fn arrivals(&mut self, rate: f64) -> u32 {
        let limit = (-rate / f64::from(TICKS)).exp();
        let (mut count, mut product) = (0, self.rng.random::<f64>());
        while product > limit {
            product *= self.rng.random::<f64>();
            count += 1;
        }
        count
    }

    /// Exponentially distributed with a mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.rng.random::<f64>()).ln()
    }
}

/// Sizes that a stack allocates.
#[derive(Clone, Copy, Debug)]
pub enum Sizes {
    All(u64),
    /// Log-uniform between two sizes.
    Between(f64, f64),
}

impl Sizes {
    pub fn draw(self, rng: &mut SmallRng) -> u64 {
        match self {
            Self::All(bytes) => bytes,
            Self::Between(low, high) => log_uniform(rng, low, high) as u64,
        }
    }

    pub fn any(rng: &mut SmallRng) -> Self {
        match rng.random_range(0..4) {
            0 => Self::All(64),
            1 => Self::All(4096),
            2 => Self::Between(16.0, 1024.0),
            _ => Self::Between(16.0, 65_536.0),
        }
    }
}

/// How long sessions live; none longer than 20 s.
#[derive(Clone, Copy, Debug)]
pub enum Lives {
    Exactly(f64),
    Uniform(f64, f64),
    LogUniform(f64, f64),
    /// Exponential, cut off at 20 s.
    Exponential(f64),
}

impl Lives {
    pub fn draw(self, simulation: &mut Simulation) -> f64 {
        match self {
            Self::Exactly(life) => life,
            Self::Uniform(low, high) => simulation.rng.random_range(low..high),
            Self::LogUniform(low, high) => log_uniform(&mut simulation.rng, low, high),
            Self::Exponential(mean) => simulation.exponential(mean).min(20.0),
        }
    }

    pub fn any(rng: &mut SmallRng) -> Self {
        match rng.random_range(0..4) {
            0 => Self::Exactly(rng.random_range(2.0..20.0)),
            1 => Self::Uniform(2.0, rng.random_range(3.0..20.0)),
            2 => Self::LogUniform(2.0, 20.0),
            _ => Self::Exponential(rng.random_range(2.0..10.0)),
        }
    }
}

pub fn log_uniform(rng: &mut SmallRng, low: f64, high: f64) -> f64 {
    (rng.random_range(low.ln()..high.ln())).exp()
}

/// Several programs in one call stack.
pub fn both(mut first: Program, mut second: Program) -> Program {
    Box::new(move |simulation| {
        first(simulation);
        second(simulation);
    })
}

/// Poisson arrivals of blocks that live for a while.
pub fn sessions(rate: f64, lives: Lives, sizes: Sizes) -> Program {
    load(move |_| rate, lives, sizes)
}

/// Sessions at a rate that depends on the time.
pub fn load(rate: impl Fn(f64) -> f64 + 'static, lives: Lives, sizes: Sizes) -> Program {
    Box::new(move |simulation| {
        for _ in 0..simulation.arrivals(rate(simulation.time())) {
            let life = lives.draw(simulation);
            let bytes = sizes.draw(&mut simulation.rng);
            simulation.alloc_for(bytes, life);
        }
    })
}

/// Blocks that live for exponential times, `mean` seconds on average.
pub fn churn(rate: f64, mean: f64, sizes: Sizes) -> Program {
    Box::new(move |simulation| {
        for _ in 0..simulation.arrivals(rate) {
            let life = simulation.exponential(mean);
            let bytes = sizes.draw(&mut simulation.rng);
            simulation.alloc_for(bytes, life);
        }
    })
}

/// Blocks that are never released, at random times between two.
pub fn leak(rate: f64, sizes: Sizes, from: f64, until: f64) -> Program {
    Box::new(move |simulation| {
        if (from..until).contains(&simulation.time()) {
            for _ in 0..simulation.arrivals(rate) {
                let bytes = sizes.draw(&mut simulation.rng);
                simulation.alloc(bytes);
            }
        }
    })
}

/// Blocks that are never released, one each `period` seconds, the first at `first`.
pub fn regular_leak(period: f64, bytes: u64, first: f64) -> Program {
    let mut next = first;
    Box::new(move |simulation| {
        while next <= simulation.time() {
            simulation.alloc(bytes);
            next += period;
        }
    })
}

/// Which entry a full cache gives up.
#[derive(Clone, Copy, Debug)]
pub enum Eviction {
    Oldest,
    /// The least recently used, where `hits` lookups come for each insertion, the more often the younger.
    Used(u32),
    Random,
}

/// A cache that inserts `rate` entries a second; of its `capacity` entries `before` are there when tracing begins.
pub fn cache(rate: f64, capacity: usize, before: usize, eviction: Eviction, sizes: Sizes) -> Program {
    // None: an entry from before the trace, whose release means nothing to the ledger.
    let mut entries: VecDeque<Option<Block>> = std::iter::repeat_n(None, before).collect();
    Box::new(move |simulation| {
        for _ in 0..simulation.arrivals(rate) {
            let bytes = sizes.draw(&mut simulation.rng);
            let block = simulation.alloc(bytes);
            entries.push_back(Some(block));
            if let Eviction::Used(hits) = eviction {
                for _ in 0..hits {
                    // Popularity falls off steeply: most hits go to a few entries.
                    let popular = simulation.rng.random::<f64>().powi(3) * entries.len() as f64;
                    if let Some(used) = entries.remove(entries.len() - 1 - popular as usize) {
                        entries.push_back(used);
                    }
                }
            }
            if entries.len() > capacity {
                let at = match eviction {
                    Eviction::Oldest | Eviction::Used(_) => 0,
                    Eviction::Random => simulation.rng.random_range(0..entries.len()),
                };
                let gone = if at == 0 { entries.pop_front() } else { entries.swap_remove_back(at) };
                if let Some(Some(block)) = gone {
                    simulation.free(block);
                }
            }
        }
    })
}

/// A queue whose length wanders: arrivals and departures at the same rate. Last in first out is a pool of free objects.
pub fn queue(rate: f64, before: usize, last_in_first_out: bool, sizes: Sizes) -> Program {
    let mut waiting: VecDeque<Option<Block>> = std::iter::repeat_n(None, before).collect();
    Box::new(move |simulation| {
        for _ in 0..simulation.arrivals(2.0 * rate) {
            if simulation.rng.random_bool(0.5) {
                let bytes = sizes.draw(&mut simulation.rng);
                let block = simulation.alloc(bytes);
                waiting.push_back(Some(block));
            } else {
                let gone = if last_in_first_out { waiting.pop_back() } else { waiting.pop_front() };
                if let Some(Some(block)) = gone {
                    simulation.free(block);
                }
            }
        }
    })
}

/// What is allocated stays until it is collected, all but a share, each `period` seconds.
pub fn sawtooth(rate: f64, period: f64, first: f64, sizes: Sizes) -> Program {
    let mut heap = Vec::new();
    let mut next = first;
    Box::new(move |simulation| {
        if simulation.time() >= next {
            next += period;
            for block in heap.drain(..) {
                simulation.free(block);
            }
        }
        for _ in 0..simulation.arrivals(rate) {
            let bytes = sizes.draw(&mut simulation.rng);
            heap.push(simulation.alloc(bytes));
        }
    })
}

/// Every now and then (`pause` seconds on average) `count` blocks at once, which live for a while.
pub fn bursts(pause: f64, count: u32, lives: Lives, sizes: Sizes) -> Program {
    Box::new(move |simulation| {
        for _ in 0..simulation.arrivals(1.0 / pause) {
            for _ in 0..count {
                let life = lives.draw(simulation);
                let bytes = sizes.draw(&mut simulation.rng);
                simulation.alloc_for(bytes, life);
            }
        }
    })
}

/// A vector that gets an element `rate` times a second up to `until`, and grows by the factor when it is full.
pub fn vector(rate: f64, factor: f64, until: f64, rehashes: bool) -> Program {
    let (mut block, mut capacity): (Option<Block>, f64) = (None, 1024.0);
    Box::new(move |simulation| {
        let filled = simulation.time().min(until) * rate;
        let Some(held) = block else {
            block = Some(simulation.alloc(capacity as u64));
            return;
        };
        if filled > capacity {
            while filled > capacity {
                capacity *= factor;
            }
            block = Some(if rehashes {
                let larger = simulation.alloc(capacity as u64);
                simulation.free(held);
                larger
            } else {
                simulation.realloc(held, capacity as u64)
            });
        }
    })
}

//! Keeps what tracing costs a process within a budget: how densely it is sampled, and whether it is watched at all.
//!
//! Plain functions: time, the process's times and the hits of its breakpoints are arguments; what is decided, [`crate::trace`]
//! does. The unit of cost is the processor's time. What a hit costs on this host is [`Costs`], measured at the start
//! ([`crate::attach::TrapCosts`]); how many there were, the BPF programs count. The budget is a share of a *reference*: of the
//! processor time that the process itself takes, or of one processor.
//!
//! # What is done
//!
//! 1. *Exact.* Every allocation is followed. It costs an entry, a return and a record.
//! 2. *Sampled.* The return is left out of most calls. The interval is a power of two, and as short as the budget allows.
//! 3. *Windows.* Where entries alone cost more than the budget, breakpoints stand for a part of the time
//!    ([`windows`]). There is no way back from here: what was allocated before is no longer known.
//! 4. *Released.* Where even the shortest part of the time that says anything would cost too much.
//!
//! # How it does not flap
//!
//! It goes to where the budget is kept with something to spare ([`AIM`]), and leaves a state downwards only when the budget is
//! exceeded. Back up it goes only where that is expected to stay below [`CALM`] of the budget, and has been for a while; that while
//! doubles each time it turns out to have been too early.

use leak_common::Hits;
use leak_common::sampling::Interval;

use windows::Plan;

pub mod windows;

/// The share of the budget that a new state may be expected to take.
const AIM: f64 = 0.75;
/// The same on the way back to more.
const CALM: f64 = 0.4;
/// Seconds for which less must have been enough before it goes back.
const PATIENCE: f64 = 20.0;
/// The most that becomes, in seconds.
const MOST_PATIENCE: f64 = 3600.0;
/// Seconds that a measurement looks back over, about.
const MEMORY: f64 = 3.0;
/// Processor time of the reference, in nanoseconds, before a measurement is one.
const ENOUGH: f64 = 40e6;
/// Intervals that are chosen from.
const SHORTEST: u64 = 4 << 10;
const LONGEST: u64 = 16 << 20;
/// Bytes of an allocation where nothing is known.
const TYPICAL_SIZE: f64 = 128.0;
/// Length of a window, nanoseconds.
const WINDOW: u64 = 100_000_000;
/// As so many windows counts what they were expected to cost, against what those cost that there were: one may be long by chance.
const EXPECTED_WINDOWS: f64 = 2.0;
/// Windows before there may be more of them.
const SURE_WINDOWS: f64 = 4.0;
/// The longest that a process is left alone for what it was charged too much, seconds.
const LONGEST_REST: f64 = 30.0;
/// The smallest share of the time that says anything, one window in 50 s, and the largest: more is as good as all.
const LEAST_DUTY: f64 = 0.002;
const MOST_DUTY: f64 = 0.5;

/// What a hit of a breakpoint costs, in nanoseconds, with our program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// The entry of a function, at an instruction that the kernel emulates.
    pub entry: f64,
    /// The same at one that it single-steps.
    pub stepped: f64,
    /// The return.
    pub ret: f64,
}

/// Time of our programs, beside the trap's, on the host that they were measured on (`cargo xtask bench`): an entry that ends early,
/// and what recording an allocation takes more, at entry and return together.
const PROGRAM_ENTRY: f64 = 40.0;
const PROGRAM_RECORD: f64 = 260.0;
/// What an emulated trap takes on that host; others are slower or faster at the programs as well.
const REFERENCE_TRAP: f64 = 850.0;
/// What a hit takes of a process beyond what was measured where nothing else was done: caches are colder, and breakpoints are put in
/// and taken out as well. By the slowdown of a churn in windows beside a twin that was not traced, 1.3 to 1.4 times as much.
const MARGIN: f64 = 1.3;

impl Default for Costs {
    fn default() -> Self {
        Self::of_traps(REFERENCE_TRAP, 12_000.0, 900.0)
    }
}

impl Costs {
    /// From what the traps alone take.
    pub fn of_traps(entry: f64, stepped: f64, ret: f64) -> Self {
        let speed = (entry / REFERENCE_TRAP).clamp(0.2, 5.0);
        Self {
            entry: MARGIN * (entry + PROGRAM_ENTRY * speed),
            stepped: MARGIN * (stepped + PROGRAM_ENTRY * speed),
            ret: MARGIN * (ret + PROGRAM_RECORD * speed),
        }
    }

    /// What entries, and what returns cost.
    fn parts(&self, hits: &Hits) -> (f64, f64) {
        let emulated = hits.entries.saturating_sub(hits.stepped) as f64;
        (emulated * self.entry + hits.stepped as f64 * self.stepped, hits.returns as f64 * self.ret)
    }
}

/// What is known of a process at one moment; all but the time and the size are sums since tracing began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Seconds.
    pub time: f64,
    /// Processor time that it took, nanoseconds.
    pub cpu_ns: f64,
    /// What the budget is a share of, nanoseconds of processor time.
    pub reference_ns: f64,
    pub hits: Hits,
    /// Windows that began, and whether one is open.
    pub windows: u64,
    pub in_window: bool,
    /// Mean bytes of an allocation, if any are known.
    pub mean_size: Option<f64>,
}

/// How a process is watched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Level {
    Exact,
    Sampled(Interval),
    /// For this share of the time.
    Windows(f64),
    Released,
}

impl Level {
    /// For the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Sampled(_) => "sampled",
            Self::Windows(_) => "windows",
            Self::Released => "released",
        }
    }
}

/// What the governor may choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Share of the reference.
    pub budget: f64,
    /// The shortest interval, or exact, which is what it begins with.
    pub begin: Interval,
    /// Whether it may sample at all, or more coarsely.
    pub may_sample: bool,
}

/// Costs and times that fade as they get older, nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    entries: f64,
    returns: f64,
    calls: f64,
    cpu: f64,
    reference: f64,
    seconds: f64,
    windows: f64,
}

impl Sums {
    fn fade(&mut self, seconds: f64) {
        let keep = (-seconds / MEMORY).exp();
        for sum in self.all() {
            *sum *= keep;
        }
    }

    fn all(&mut self) -> [&mut f64; 7] {
        let Self { entries, returns, calls, cpu, reference, seconds, windows } = self;
        [entries, returns, calls, cpu, reference, seconds, windows]
    }

    fn add(&mut self, other: &Self) {
        let mut other = *other;
        for (sum, other) in self.all().into_iter().zip(other.all()) {
            *sum += *other;
        }
    }

    fn cost(&self) -> f64 {
        self.entries + self.returns
    }

    /// The share of the reference that is taken now.
    fn share(&self) -> f64 {
        if self.reference > 0.0 { self.cost() / self.reference } else { 0.0 }
    }

    /// The share that would be taken if the same work cost so much instead. What does not go to tracing goes to more of the same
    /// work: a process that waits for nothing does as many times more calls as it gets faster.
    fn share_at(&self, cost: f64) -> f64 {
        let useful = (self.cpu - self.cost()).max(self.cpu * 0.01).max(1.0);
        if self.reference <= 0.0 {
            return 0.0;
        }
        let each = cost / useful;
        each / (1.0 + each) * self.cpu / self.reference
    }
}

/// Watches over one process.
#[derive(Clone, Debug)]
pub struct Governor {
    limits: Limits,
    costs: Costs,
    level: Level,
    reason: String,
    sums: Sums,
    /// The same since it is traced, and of the last while whatever was decided meanwhile.
    total: Sums,
    lately: Sums,
    /// The share of the reference that windows are expected to take.
    expected: f64,
    /// Seconds without a window after the last decision.
    rest: f64,
    last: Option<Look>,
    mean_size: f64,
    /// Since when the budget has been kept by so much that more would do.
    calm: Option<f64>,
    patience: f64,
    /// When it last went back to more.
    eased: Option<f64>,
    /// The share of the reference that is taken at this level.
    measured: f64,
}

impl Governor {
    pub fn new(limits: Limits, costs: Costs) -> Self {
        let level = if limits.begin.is_exact() { Level::Exact } else { Level::Sampled(limits.begin) };
        Self {
            limits,
            costs,
            level,
            reason: "within the budget".to_owned(),
            sums: Sums::default(),
            total: Sums::default(),
            lately: Sums::default(),
            expected: 0.0,
            rest: 0.0,
            last: None,
            mean_size: TYPICAL_SIZE,
            calm: None,
            patience: PATIENCE,
            eased: None,
            measured: 0.0,
        }
    }

    pub fn level(&self) -> Level {
        self.level
    }

    /// Why it is at this level, for people.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// What tracing has taken of the reference lately.
    pub fn measured(&self) -> f64 {
        self.lately.share()
    }

    /// Seconds for which windows should not begin yet, as of the last decision: until what was taken over the budget, before anybody
    /// could know, has been made up for.
    pub fn rest(&self) -> f64 {
        self.rest
    }

    pub fn budget(&self) -> f64 {
        self.limits.budget
    }

    /// The costs were measured.
    pub fn set_costs(&mut self, costs: Costs) {
        self.costs = costs;
    }

    /// The budget, where it is shared with others and they have become more or fewer.
    pub fn set_budget(&mut self, budget: f64) {
        self.limits.budget = budget;
    }

    /// In windows: how they are to come.
    pub fn plan(&self) -> Option<Plan> {
        match self.level {
            Level::Windows(duty) => Some(Plan::with_duty(WINDOW, duty)),
            _ => None,
        }
    }

    /// Takes in how the process is, and says if it should be watched in another way from now on.
    pub fn look(&mut self, look: Look) -> Option<Level> {
        let last = self.last.replace(look)?;
        let since = |a: u64, b: u64| a.saturating_sub(b);
        let hits = Hits {
            entries: since(look.hits.entries, last.hits.entries),
            returns: since(look.hits.returns, last.hits.returns),
            stepped: since(look.hits.stepped, last.hits.stepped),
            reserved: 0,
        };
        let seconds = (look.time - last.time).max(0.0);
        let (entries, returns) = self.costs.parts(&hits);
        // Windows come seldom: what they cost is known only over many.
        let fading = match self.level {
            Level::Windows(duty) => seconds * MEMORY / (20.0 * WINDOW as f64 / 1e9 / duty).max(MEMORY),
            _ => seconds,
        };
        self.sums.fade(fading);
        self.lately.fade(fading);
        let new = Sums {
            entries,
            returns,
            calls: hits.entries as f64,
            cpu: (look.cpu_ns - last.cpu_ns).max(0.0),
            reference: (look.reference_ns - last.reference_ns).max(0.0),
            seconds,
            windows: since(look.windows, last.windows) as f64,
        };
        for sums in [&mut self.sums, &mut self.lately, &mut self.total] {
            sums.add(&new);
        }
        self.mean_size = look.mean_size.unwrap_or(self.mean_size).max(1.0);
        self.measured = self.sums.share();
        if self.sums.reference < ENOUGH {
            return None;
        }
        let decided = match self.level {
            Level::Exact | Level::Sampled(_) if self.measured > self.limits.budget => Some(self.tighten(look.time)),
            Level::Sampled(_) => self.ease(look.time),
            Level::Windows(duty) if !look.in_window => self.adjust(duty),
            Level::Exact | Level::Windows(_) | Level::Released => None,
        };
        if let Some((level, reason)) = decided {
            // Only before the first: while windows are being watched their rate may change, but not be none.
            self.rest = if matches!(self.level, Level::Windows(_)) { 0.0 } else { self.owed() };
            self.level = level;
            self.reason = reason;
            self.calm = None;
            if !matches!(level, Level::Windows(_)) {
                self.sums = Sums::default();
            }
            return Some(level);
        }
        None
    }

    /// What an allocation that is followed costs beyond its entry, summed over all of them, were all followed.
    fn followed(&self) -> f64 {
        match self.level {
            Level::Sampled(interval) => self.sums.returns / self.sampled(interval.bytes()).max(1e-6),
            _ => self.sums.returns,
        }
        // Every second hit of an entry is a free's.
        .min(self.sums.calls * self.costs.ret)
    }

    /// The share of allocations that are followed, by an interval.
    fn sampled(&self, interval: u64) -> f64 {
        // A call whose return is waited for though it is not sampled, each 64 times.
        (-(-self.mean_size / interval as f64).exp_m1()).max(1.0 / 64.0)
    }

    /// The budget is exceeded.
    fn tighten(&mut self, time: f64) -> (Level, String) {
        if self.eased.is_some_and(|eased| time - eased < 3.0 * self.patience) {
            self.patience = (self.patience * 2.0).min(MOST_PATIENCE);
        }
        let (budget, taken) = (self.limits.budget, percent(self.measured));
        let from = match self.level {
            Level::Sampled(interval) => (interval.bytes() * 2).max(SHORTEST),
            _ => SHORTEST,
        };
        let mut bytes = from.next_power_of_two();
        while self.limits.may_sample && bytes <= LONGEST {
            let cost = self.sums.entries + self.followed() * self.sampled(bytes);
            if self.sums.share_at(cost) <= AIM * budget {
                let reason = format!("tracing took {taken}, more than the budget of {}", percent(budget));
                return (Level::Sampled(Interval::near(bytes)), reason);
            }
            bytes *= 2;
        }
        let trap = self.sums.share_at(self.sums.entries);
        let standing = if self.limits.may_sample { self.measured.max(trap) } else { self.measured };
        let why = if self.limits.may_sample {
            format!("breakpoints alone take {}, more than the budget of {}", percent(trap), percent(budget))
        } else {
            format!("tracing took {taken}, more than the budget of {}", percent(budget))
        };
        // In a window all is followed.
        let in_window = self.sums.share_at(self.sums.entries + self.followed()).max(standing).max(1e-9);
        self.for_duty(AIM * budget / in_window, in_window, why)
    }

    /// Windows for this share of the time, while one is open taking `in_window` of the reference.
    fn for_duty(&mut self, duty: f64, in_window: f64, why: String) -> (Level, String) {
        self.expected = duty.min(MOST_DUTY) * in_window;
        if duty < LEAST_DUTY {
            (Level::Released, format!("{why}, even in windows of {} of the time", percent(LEAST_DUTY)))
        } else {
            (Level::Windows(duty.min(MOST_DUTY)), why)
        }
    }

    /// Goes back to a shorter interval, or to all, where that has been expected to be cheap for long enough.
    fn ease(&mut self, time: f64) -> Option<(Level, String)> {
        let Level::Sampled(interval) = self.level else { return None };
        if interval <= self.limits.begin {
            return None;
        }
        let shorter = |bytes: u64| {
            let cost = self.sums.entries + self.followed() * self.sampled(bytes);
            self.sums.share_at(cost) <= CALM * self.limits.budget
        };
        let all = self.sums.share_at(self.sums.entries + self.followed()) <= CALM * self.limits.budget;
        let next = if all && self.limits.begin.is_exact() {
            Level::Exact
        } else {
            let least = self.limits.begin.bytes().max(SHORTEST);
            let bytes = interval.bytes() / 2;
            if bytes < least || !shorter(bytes) {
                self.calm = None;
                return None;
            }
            Level::Sampled(Interval::near(bytes))
        };
        let calm = *self.calm.get_or_insert(time);
        if time - calm < self.patience {
            return None;
        }
        self.eased = Some(time);
        Some((
            next,
            format!("tracing took {} for {:.0} s, and the budget allows more", percent(self.measured), time - calm),
        ))
    }

    /// Another share of the time, where what windows cost is far from what they should.
    fn adjust(&mut self, duty: f64) -> Option<(Level, String)> {
        let plan = self.plan()?;
        let Sums { windows, seconds, reference, .. } = self.sums;
        // They fade.
        if windows < 0.5 || seconds <= 0.0 || reference <= 0.0 {
            return None;
        }
        // What one takes, by how many are to be expected: how many there were in this time is chance.
        let seen = self.sums.cost() * plan.rate * seconds / reference;
        let expected = (seen + EXPECTED_WINDOWS * self.expected) / (windows + EXPECTED_WINDOWS);
        let wanted = duty * AIM * self.limits.budget / expected.max(1e-9);
        let far = expected > self.limits.budget || wanted > 1.5 * duty && windows >= SURE_WINDOWS;
        if !far || wanted >= MOST_DUTY && duty >= MOST_DUTY {
            return None;
        }
        // Up not all at once: what a few windows took says little. Down at once: on a busy host it may be much more than was thought,
        // because whoever removes the breakpoints has to wait for a processor.
        let next = wanted.clamp(duty / 8.0, duty * 1.5);
        let why = format!("windows would take {}, of a budget of {}", percent(expected), percent(self.limits.budget));
        let decided = self.for_duty(next, expected / duty, why);
        self.sums = Sums::default();
        Some(decided)
    }

    /// Seconds that it takes until tracing, without a window, has cost no more than the budget since its beginning.
    fn owed(&self) -> f64 {
        let Sums { reference, seconds, .. } = self.total;
        let each_second = self.limits.budget * reference / seconds.max(1e-9);
        let owed = self.total.cost() - self.limits.budget * reference;
        if owed > 0.0 && each_second > 0.0 { (owed / each_second).min(LONGEST_REST) } else { 0.0 }
    }
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent >= 10.0 { format!("{percent:.0} %") } else { format!("{percent:.2} %") }
}

#[cfg(test)]
mod tests;

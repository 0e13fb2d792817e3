//! A model of a process under the governor: what it does costs it time, and the costs are as calibrated.

use super::*;

/// A process that never waits: so many calls of malloc, and as many of free, for each second of useful work.
struct Model {
    calls: f64,
    size: f64,
    /// Processors that it keeps busy.
    threads: f64,
    costs: Costs,
    look: Look,
    governor: Governor,
    /// Each change, and when.
    changes: Vec<(f64, Level)>,
    /// What was taken since the last question.
    cost: f64,
    cpu: f64,
    /// In windows: the moment at which the next one begins or the present one ends.
    turn: f64,
    inside: bool,
    /// How long breakpoints stand for a window, as a multiple of its length.
    overrun: f64,
    random: u64,
}

impl Model {
    fn new(calls: f64, size: f64, budget: f64, begin: Interval) -> Self {
        let costs = Costs::default();
        let limits = Limits { budget, begin, may_sample: true };
        Self {
            calls,
            size,
            threads: 1.0,
            costs,
            look: Look::default(),
            governor: Governor::new(limits, costs),
            changes: Vec::new(),
            cost: 0.0,
            cpu: 0.0,
            turn: 0.0,
            inside: false,
            overrun: 1.0,
            random: 1,
        }
    }

    fn uniform(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / 9_007_199_254_740_992.0 + f64::MIN_POSITIVE
    }

    /// Lets it run for a while.
    fn run(&mut self, seconds: f64) {
        let end = self.look.time + seconds;
        while self.look.time < end {
            let step = 0.05;
            if let Some(plan) = self.governor.plan()
                && self.look.time >= self.turn
            {
                self.inside = !self.inside;
                let wait =
                    if self.inside { plan.length as f64 * self.overrun } else { plan.wait(self.uniform()) as f64 };
                self.look.windows += u64::from(self.inside);
                self.look.in_window = self.inside;
                self.turn = self.look.time + wait / 1e9;
            }
            let followed = match self.governor.level() {
                Level::Exact => Some(1.0),
                Level::Sampled(interval) => Some((-(-self.size / interval.bytes() as f64).exp_m1()).max(1.0 / 64.0)),
                Level::Windows(_) if self.inside => Some(1.0),
                Level::Windows(_) | Level::Released => None,
            };
            let each = followed.map_or(0.0, |share| 2.0 * self.costs.entry + share * self.costs.ret);
            let cpu = step * 1e9 * self.threads;
            let useful = cpu / (1.0 + self.calls * each / 1e9);
            let calls = self.calls * useful / 1e9;
            if let Some(share) = followed {
                self.look.hits.entries += (2.0 * calls) as u64;
                self.look.hits.returns += (share * calls) as u64;
            }
            self.cost += cpu - useful;
            self.cpu += cpu;
            self.look.cpu_ns += cpu;
            self.look.reference_ns += cpu;
            self.look.time += step;
            self.look.mean_size = Some(self.size);
            if let Some(level) = self.governor.look(self.look) {
                if matches!(level, Level::Windows(_)) {
                    self.turn = self.turn.max(self.look.time + self.governor.rest());
                }
                self.changes.push((self.look.time, level));
            }
        }
    }

    /// What it was slowed down by since the last question.
    fn share(&mut self) -> f64 {
        let share = self.cost / self.cpu;
        (self.cost, self.cpu) = (0.0, 0.0);
        share
    }
}

/// Whatever a process does, it comes to be slowed by no more than the budget, within a second and a half, or a few windows, and
/// without going to and fro.
#[test]
fn the_budget_is_kept() {
    for budget in [0.01, 0.02, 0.05, 0.2] {
        for calls in [1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 1e7, 4e7] {
            for size in [16.0, 300.0, 40_000.0] {
                let mut model = Model::new(calls, size, budget, Interval::EXACT);
                model.run(120.0);
                let early = model.changes.len();
                model.share();
                model.run(600.0);
                let share = model.share();
                let level = model.governor.level();
                assert!(share <= 1.15 * budget, "{budget} {calls} {size}: {share} at {level:?}");
                assert!(early <= 12, "{budget} {calls} {size}: {:?}", model.changes);
                let first = model.changes.first().map_or(0.0, |(time, _)| *time);
                assert!(first < 1.5, "{budget} {calls} {size}: {:?}", model.changes);
                // Windows may be adjusted now and then; nothing else changes any more.
                let later = &model.changes[early..];
                assert!(later.len() <= 8, "{budget} {calls} {size}: {later:?}");
                assert!(later.iter().all(|(_, level)| matches!(level, Level::Windows(_))) || later.len() <= 1);
            }
        }
    }
}

/// A process whose allocator is hot is not left exact for longer than it takes to see that.
#[test]
fn the_first_second_matters() {
    let mut model = Model::new(2e7, 100.0, 0.05, Interval::EXACT);
    model.run(0.5);
    assert!(matches!(model.governor.level(), Level::Windows(_)), "{:?}", model.changes);
    assert!(model.governor.reason().contains("breakpoints alone"), "{}", model.governor.reason());
}

/// On a host where nobody gets a processor when he wants one, windows last several times as long as they should: what that costs is met
/// by fewer of them after the first already. What the first moments took is made up for as well, so that the budget is about kept
/// from the beginning on.
#[test]
fn windows_that_last_too_long() {
    for (budget, overrun) in [(0.01, 1.0), (0.02, 1.0), (0.02, 5.0), (0.05, 5.0), (0.2, 4.0)] {
        let (mut first, mut later) = (0.0, 0.0);
        for seed in 1..=40 {
            let mut model = Model::new(2e7, 100.0, budget, Interval::EXACT);
            (model.overrun, model.random) = (overrun, seed * 77);
            model.run(60.0);
            first += model.share() / 40.0;
            model.run(300.0);
            model.share();
            model.run(600.0);
            later += model.share() / 40.0;
        }
        // Of one run how many windows come is chance.
        assert!(first <= 1.2 * budget && later <= budget, "{budget} {overrun}: {first}, later {later}");
        assert!(later >= 0.4 * budget, "{budget} {overrun}: {later}");
    }
}

/// What allocates seldom is followed exactly, all the time.
#[test]
fn cheap_processes_stay_exact() {
    let mut model = Model::new(5_000.0, 100.0, 0.05, Interval::EXACT);
    model.run(600.0);
    assert_eq!((model.governor.level(), model.changes.len()), (Level::Exact, 0));
    assert!(model.share() < 0.05);
}

/// Where the budget allows entries and not returns, the interval is widened, and no window is needed.
#[test]
fn returns_are_left_out_first() {
    let costs = Costs::default();
    let calls = 0.034 / (2.0 * costs.entry / 1e9);
    let mut model = Model::new(calls, 100.0, 0.05, Interval::EXACT);
    model.run(300.0);
    assert!(matches!(model.governor.level(), Level::Sampled(_)), "{:?}", model.changes);
    model.share();
    model.run(60.0);
    assert!(model.share() < 0.05);
}

/// A busy time ends: then all is followed again, but not at once, and when that keeps turning out to be too early, ever later.
#[test]
fn it_goes_back_with_patience() {
    let busy = 0.035 / (2.0 * Costs::default().entry / 1e9);
    let mut model = Model::new(busy, 100.0, 0.05, Interval::EXACT);
    for _ in 0..40 {
        model.calls = busy;
        model.run(30.0);
        model.calls = busy / 50.0;
        model.run(30.0);
    }
    let back = model.changes.iter().filter(|(_, level)| *level == Level::Exact).count();
    assert!((1..=8).contains(&back), "{back}: {:?}", model.changes);
    model.run(3600.0);
    assert_eq!(model.governor.level(), Level::Exact);
}

/// Where even the fewest windows would cost too much, the process is let go.
#[test]
fn released_at_last() {
    let mut model = Model::new(2e7, 100.0, 0.001, Interval::EXACT);
    model.run(5.0);
    assert_eq!(model.governor.level(), Level::Released);
    assert!(model.governor.reason().contains("even in windows"), "{}", model.governor.reason());
}

/// A given interval is never made shorter, and where nothing may be sampled windows come at once.
#[test]
fn what_the_user_asked_for() {
    let begin = Interval::near(512 << 10);
    let mut model = Model::new(1_000.0, 100.0, 0.05, begin);
    model.run(600.0);
    assert_eq!(model.governor.level(), Level::Sampled(begin));
    let limits = Limits { budget: 0.05, begin: Interval::EXACT, may_sample: false };
    let mut model = Model::new(25_000.0, 100.0, 0.05, Interval::EXACT);
    model.governor = Governor::new(limits, model.costs);
    model.run(5.0);
    assert!(matches!(model.governor.level(), Level::Windows(_)), "{:?}", model.changes);
}

/// A process that rests is not judged: a few hits beside no processor time are no overhead.
#[test]
fn an_idle_process_is_left_alone() {
    let limits = Limits { budget: 0.01, begin: Interval::EXACT, may_sample: true };
    let mut governor = Governor::new(limits, Costs::default());
    for second in 0..1000 {
        let hits = Hits { entries: second * 100, returns: second * 50, ..Hits::default() };
        let (time, cpu) = (second as f64, second as f64 * 1e6);
        let look = Look { time, cpu_ns: cpu, reference_ns: cpu, hits, ..Look::default() };
        assert_eq!(governor.look(look), None);
    }
}

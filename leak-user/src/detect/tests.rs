//! The promises of [`super`], each over many seeds of simulated programs.

use rand::Rng;
use rand::rngs::SmallRng;

use super::simulation::{
    Eviction, Lives, Program, Simulation, Sizes, both, bursts, cache, churn, leak, load, log_uniform, queue,
    regular_leak, sawtooth, sessions, vector,
};
use super::{Growth, MIN_WATCH, Verdict, judge};
use crate::ledger::history::{History, Window};

/// Random programs of each kind that does not leak.
const SEEDS: u64 = 1000;

/// Runs the program that `make` draws for each seed, judges it at each of `times` and returns the seeds (and the times)
/// at which it was called growing.
fn called_growing(
    seeds: u64,
    times: impl Fn(u64) -> Vec<Window>,
    make: impl Fn(&mut SmallRng) -> Program,
) -> Vec<(u64, Window, Growth)> {
    let mut found = Vec::new();
    for seed in 0..seeds {
        let mut simulation = Simulation::new(seed);
        let mut program = make(&mut simulation.rng);
        for time in times(seed) {
            simulation.run_to(time, &mut program);
            let judged = judge(&simulation.history, time);
            assert_eq!(judged.growth.is_some(), judged.verdict == Verdict::Growing);
            if let Some(growth) = judged.growth {
                found.push((seed, time, growth));
                break;
            }
        }
    }
    found
}

/// From before the first verdict on, every few seconds up to a minute.
fn up_to_a_minute(_: u64) -> Vec<Window> {
    (20..=60).filter(|time| time % 3 == 0 || time % 10 == 5).collect()
}

fn never_grows(name: &str, make: impl Fn(&mut SmallRng) -> Program) {
    let found = called_growing(SEEDS, up_to_a_minute, make);
    assert!(found.is_empty(), "{name}: {} of {SEEDS} called growing: {:?}", found.len(), &found[..found.len().min(5)]);
}

/// Blocks that come at a steady rate and live for a while never make a leak.
#[test]
fn steady_churn_does_not_grow() {
    never_grows("churn", |rng| churn(log_uniform(rng, 1.0, 500.0), log_uniform(rng, 0.01, 5.0), Sizes::any(rng)));
}

/// Queues whose length wanders.
#[test]
fn wandering_queues_do_not_grow() {
    never_grows("queue", |rng| {
        let rate = log_uniform(rng, 5.0, 300.0);
        queue(rate, (rate * rng.random_range(0.0..10.0)) as usize, false, Sizes::any(rng))
    });
}

/// Full caches of every kind, filled within ten seconds or before tracing began.
#[test]
fn full_caches_do_not_grow() {
    let any = |rng: &mut SmallRng, eviction| {
        let rate = log_uniform(rng, 5.0, 300.0);
        let capacity = (rate * rng.random_range(0.5..10.0)) as usize + 1;
        let before = if rng.random_bool(0.5) { capacity } else { 0 };
        cache(rate, capacity, before, eviction, Sizes::any(rng))
    };
    never_grows("first in first out", |rng| any(rng, Eviction::Oldest));
    never_grows("random replacement", |rng| any(rng, Eviction::Random));
    never_grows("least recently used", |rng| {
        let hits = rng.random_range(1..4);
        any(rng, Eviction::Used(hits))
    });
}

/// Heaps that are collected every one to twenty seconds.
#[test]
fn sawteeth_do_not_grow() {
    never_grows("sawtooth", |rng| {
        let period = rng.random_range(1.0..20.0);
        sawtooth(log_uniform(rng, 2.0, 200.0), period, rng.random_range(0.0..period), Sizes::any(rng))
    });
    never_grows("sawtooth on a base", |rng| {
        let period = rng.random_range(1.0..20.0);
        let base = leak(log_uniform(rng, 20.0, 500.0), Sizes::any(rng), 0.0, 5.0);
        both(base, sawtooth(log_uniform(rng, 2.0, 200.0), period, rng.random_range(0.0..period), Sizes::any(rng)))
    });
}

/// Something large that comes within a few seconds and goes again.
#[test]
fn spikes_do_not_grow() {
    never_grows("spike", |rng| {
        let at = rng.random_range(0.0..40.0);
        let lasts = rng.random_range(1.0..5.0);
        let life = Lives::Exactly(rng.random_range(2.0..15.0));
        let peak = log_uniform(rng, 50.0, 1000.0);
        let base = churn(log_uniform(rng, 1.0, 100.0), log_uniform(rng, 0.01, 2.0), Sizes::any(rng));
        let rate = move |time| if (at..at + lasts).contains(&time) { peak } else { 0.0 };
        both(base, load(rate, life, Sizes::any(rng)))
    });
}

/// Much is allocated in the first five seconds and stays, with some coming and going beside it.
#[test]
fn high_and_steady_does_not_grow() {
    never_grows("high", |rng| {
        let base = leak(log_uniform(rng, 20.0, 2000.0), Sizes::any(rng), 0.0, 5.0);
        both(base, churn(log_uniform(rng, 0.5, 100.0), log_uniform(rng, 0.01, 5.0), Sizes::any(rng)))
    });
}

/// A few blocks of very different sizes and lives.
#[test]
fn noise_does_not_grow() {
    never_grows("noise", |rng| {
        let lives = Lives::LogUniform(0.01, rng.random_range(0.1..20.0));
        sessions(log_uniform(rng, 0.05, 10.0), lives, Sizes::Between(16.0, 1e7))
    });
}

/// Sessions of 2 s to 20 s at a steady rate: at first nothing tells them from a leak.
#[test]
fn sessions_do_not_grow() {
    never_grows("sessions", |rng| sessions(log_uniform(rng, 0.05, 200.0), Lives::any(rng), Sizes::any(rng)));
}

/// A program that sets up for five seconds, then serves sessions from the same call stack.
#[test]
fn starting_up_does_not_grow() {
    never_grows("start", |rng| {
        let setup = leak(log_uniform(rng, 1.0, 500.0), Sizes::any(rng), 0.0, 5.0);
        both(setup, sessions(log_uniform(rng, 0.05, 100.0), Lives::any(rng), Sizes::any(rng)))
    });
}

/// Sessions whose rate rises for up to a minute and then levels off.
#[test]
fn rising_load_does_not_grow() {
    never_grows("load", |rng| {
        let (peak, lasts) = (log_uniform(rng, 5.0, 200.0), rng.random_range(10.0..60.0));
        let begin = rng.random_range(0.0..1.0);
        let rate = move |time: f64| peak * (begin + (1.0 - begin) * (time / lasts).min(1.0));
        load(rate, Lives::any(rng), Sizes::any(rng))
    });
}

/// Bursts of allocations with pauses.
#[test]
fn bursts_do_not_grow() {
    never_grows("bursts", |rng| {
        let count = log_uniform(rng, 2.0, 500.0) as u32;
        bursts(
            rng.random_range(0.5..15.0),
            count,
            Lives::LogUniform(0.05, rng.random_range(0.1..20.0)),
            Sizes::any(rng),
        )
    });
}

/// What filled for a while and then stopped is not called growing 20 s after it stopped: whether it is left alone, replaces
/// its entries, or is churned beside.
#[test]
fn what_stopped_does_not_grow() {
    for kind in 0..5 {
        let draw = |rng: &mut SmallRng| (rng.random_range(3..60_u32), log_uniform(rng, 1.0, 200.0));
        let times = |seed| {
            let (fill, _) = draw(&mut Simulation::new(seed).rng);
            (fill + 20..fill + 50).step_by(3).collect()
        };
        let found = called_growing(SEEDS / 2, times, |rng| {
            let (fill, rate) = draw(rng);
            let sizes = Sizes::any(rng);
            let until = f64::from(fill);
            match kind {
                0 => leak(rate, sizes, 0.0, until),
                // Poisson arrivals fill it at about that time; a margin of three deviations keeps the promise testable.
                1 => cache(rate, margin(rate * until), 0, Eviction::Oldest, sizes),
                2 => cache(rate, margin(rate * until), 0, Eviction::Random, sizes),
                3 => both(
                    leak(rate, sizes, 0.0, until),
                    churn(log_uniform(rng, 1.0, 200.0), log_uniform(rng, 0.01, 2.0), sizes),
                ),
                _ => vector(rate * 1000.0, rng.random_range(1.1..2.0), until, rng.random_bool(0.5)),
            }
        });
        assert!(found.is_empty(), "kind {kind}: {} called growing: {:?}", found.len(), &found[..found.len().min(5)]);
    }
}

fn margin(count: f64) -> usize {
    (count - 3.0 * count.sqrt()).max(1.0) as usize
}

/// What filled in some seconds, longer than set-up, is called a plateau 20 s after it stopped.
#[test]
fn what_stopped_is_a_plateau() {
    for seed in 0..100 {
        let mut simulation = Simulation::new(seed);
        let fill = simulation.rng.random_range(15..60_u32);
        let mut program = leak(simulation.rng.random_range(2.0..100.0), Sizes::All(1000), 0.0, f64::from(fill));
        simulation.run_to(fill + 20, &mut program);
        assert_eq!(judge(&simulation.history, fill + 20).verdict, Verdict::Plateau, "seed {seed}");
    }
}

/// What came and went is called a spike, what is large and steady stable, and what is empty stable.
#[test]
fn spikes_and_steady_stacks_are_told_apart() {
    for seed in 0..100 {
        let mut simulation = Simulation::new(seed);
        let base = churn(50.0, 0.1, Sizes::All(1000));
        let mut program =
            both(base, load(|time| if time < 10.0 { 500.0 } else { 0.0 }, Lives::Exactly(12.0), Sizes::All(1000)));
        simulation.run_to(40, &mut program);
        assert_eq!(judge(&simulation.history, 40).verdict, Verdict::Spike, "seed {seed}");

        let mut simulation = Simulation::new(seed);
        let mut program = both(leak(10_000.0, Sizes::All(4096), 0.0, 3.0), churn(50.0, 0.1, Sizes::All(1000)));
        simulation.run_to(40, &mut program);
        assert_eq!(judge(&simulation.history, 40).verdict, Verdict::Stable, "seed {seed}");
        assert!(simulation.history.live_bytes() > 100 << 20);
    }
    assert_eq!(judge(&History::new(0), 40).verdict, Verdict::Stable);
}

/// A full cache that takes a few more entries once in a while, to stay, is steady; a slow leak that is not decided yet is waited for
/// (the cache was called warming as well).
#[test]
fn a_high_water_mark_is_no_reason_to_wait() {
    let mut waited = 0;
    for seed in 0..200 {
        let mut cache = Simulation::new(seed);
        let (pages, mut pause) = (cache.rng.random_range(500..2000), cache.rng.random_range(8.0..20.0));
        let mut next = cache.rng.random_range(5.0..20.0);
        let mut churn = churn(200.0, 0.1, Sizes::All(4096));
        let mut program: Program = Box::new(move |simulation| {
            if simulation.time() == 0.0 {
                for _ in 0..pages {
                    simulation.alloc(4096);
                }
            }
            if simulation.time() >= next {
                next += pause;
                // Records get rarer.
                pause *= 1.8;
                for _ in 0..simulation.rng.random_range(1..=pages / 150) {
                    simulation.alloc(4096);
                }
            }
            churn(simulation);
        });
        let mut slow = Simulation::new(seed);
        let mut slow_leak = regular_leak(6.0, 4096, slow.rng.random_range(0.0..6.0));
        for time in (MIN_WATCH..75).step_by(3) {
            cache.run_to(time, &mut program);
            slow.run_to(time, &mut slow_leak);
            let judged = judge(&cache.history, time);
            assert!(matches!(judged.verdict, Verdict::Stable | Verdict::Plateau), "seed {seed}, {time} s: {judged:?}");
            let judged = judge(&slow.history, time);
            assert_ne!(judged.verdict, Verdict::Stable, "seed {seed}, {time} s: {judged:?}");
            waited += u32::from(judged.verdict == Verdict::Warming);
        }
    }
    assert!(waited > 200, "{waited}");
}

/// Before [`MIN_WATCH`] windows the verdict is always warming, even for the fastest leak, whenever the stack came up;
/// with them that leak is called growing.
#[test]
fn the_first_verdict_comes_no_earlier_than_stated() {
    for start in [0, 7, 1000] {
        let mut history = History::new(start);
        for window in start..start + MIN_WATCH {
            assert_eq!(judge(&history, window).verdict, Verdict::Warming, "after {} windows", window - start);
            for _ in 0..10_000 {
                history.born(window, window, 1 << 20);
            }
        }
        assert_eq!(judge(&history, start + MIN_WATCH).verdict, Verdict::Growing);
    }
}

/// The share of seeds at which the program is called growing at `time`.
fn share_found(seeds: u64, time: Window, make: impl Fn(&mut SmallRng) -> Program) -> f64 {
    called_growing(seeds, |_| vec![time], make).len() as f64 / seeds as f64
}

/// Blocks of one size that are never released, Poisson, so many bytes a second from the start.
fn steady_leak(bytes_per_s: f64, size: u64) -> Program {
    leak(bytes_per_s / size as f64, Sizes::All(size), 0.0, f64::INFINITY)
}

/// A leak of 2 KB/s is called growing after 30 s: all of the time where it comes in small blocks or evenly, nearly so with one
/// block a second at random; alone in its stack or as a hundredth of the churn there.
#[test]
fn a_leak_of_2_kb_a_second_is_found_within_30_s() {
    let seeds = 1000;
    assert!(share_found(seeds, 30, |_| steady_leak(2048.0, 64)) >= 1.0);
    let even = |rng: &mut SmallRng| regular_leak(1.0, 2048, rng.random_range(0.0..1.0));
    assert!(share_found(seeds, 30, even) >= 1.0);
    let one_a_second = share_found(seeds, 30, |_| steady_leak(2048.0, 2048));
    assert!(one_a_second >= 0.98, "{one_a_second}");
    let one_a_second = share_found(seeds, 35, |_| steady_leak(2048.0, 2048));
    assert!(one_a_second >= 0.995, "{one_a_second}");
    for life in [0.05, 0.3, 1.0] {
        let mixed = |size, rate| both(steady_leak(2048.0, size), churn(rate, life, Sizes::All(size)));
        let found = share_found(seeds / 4, 30, |_| mixed(204, 1000.0));
        assert!(found >= 0.99, "churn of 1000 blocks a second living {life} s: {found}");
        for (time, least) in [(30, if life < 1.0 { 0.98 } else { 0.94 }), (40, 0.98)] {
            let found = share_found(seeds, time, |_| mixed(2048, 100.0));
            assert!(found >= least, "churn of 100 blocks a second living {life} s: {found} after {time} s");
        }
    }
    let sizes = Sizes::Between(16.0, 1024.0);
    let found = share_found(seeds / 4, 30, |_| both(leak(10.0, sizes, 0.0, f64::INFINITY), churn(1000.0, 0.5, sizes)));
    assert!(found >= 0.99, "blocks of many sizes: {found}");
}

/// A leak that starts long after tracing began, in a stack that churned before, is found as soon.
#[test]
fn a_leak_that_starts_late_is_found() {
    let late =
        |_: &mut SmallRng| both(churn(100.0, 0.3, Sizes::All(64)), leak(10.0, Sizes::All(64), 100.0, f64::INFINITY));
    assert!(share_found(200, 100, late) <= 0.0);
    let found = share_found(200, 130, late);
    assert!(found >= 0.99, "{found}");
}

/// Slow leaks are found on the coarse scales: a 16 KB block each 8 s within 80 s, a 1 KB block each 10 s (at random) in
/// nine of ten cases within three minutes and nearly always within five; and they stay found.
#[test]
fn slow_leaks_are_found_on_the_coarse_scales() {
    assert!(share_found(300, 80, |rng| regular_leak(8.0, 16_384, rng.random_range(0.0..8.0))) >= 1.0);
    for (minutes, least) in [(3, 0.9), (5, 0.98), (6, 0.98), (8, 0.98), (10, 0.98), (30, 0.98), (60, 0.98)] {
        let found = share_found(300, minutes * 60, |_| leak(0.1, Sizes::All(1024), 0.0, f64::INFINITY));
        assert!(found >= least, "{found} after {minutes} minutes");
    }
}

/// A vector that is reallocated, or a table that is rehashed, as it grows by a quarter: few blocks, judged by the floor.
#[test]
fn containers_that_grow_are_found_by_their_floor() {
    for rehashes in [false, true] {
        for time in [30, 45, 60, 90] {
            let grows = |rng: &mut SmallRng| vector(log_uniform(rng, 1e5, 1e6), 1.125, f64::INFINITY, rehashes);
            let found = share_found(200, time, grows);
            assert!(found >= 0.99, "{found} after {time} s");
        }
        let doubles = |rng: &mut SmallRng| vector(log_uniform(rng, 1e5, 1e6), 2.0, f64::INFINITY, rehashes);
        let found = share_found(200, 30, doubles);
        assert!(found >= 0.99, "{found} of those that double");
    }
}

/// The 95 % interval of the rate contains the true rate of Poisson leaks in 90 to 99 of 100 cases, alone and beside churn, with
/// blocks of one size and of many.
#[test]
fn the_interval_of_the_rate_covers() {
    type Case = (&'static str, f64, Box<dyn Fn() -> Program>);
    let many = Sizes::Between(16.0, 1024.0);
    let many_mean = (1024.0 - 16.0) / (1024.0_f64 / 16.0).ln();
    let programs: [Case; 4] = [
        ("even sizes", 10.0 * 64.0, Box::new(|| leak(10.0, Sizes::All(64), 0.0, f64::INFINITY))),
        ("one a second", 2048.0, Box::new(|| steady_leak(2048.0, 2048))),
        ("many sizes", 20.0 * many_mean, Box::new(move || leak(20.0, many, 0.0, f64::INFINITY))),
        (
            "beside churn",
            10.0 * 205.0,
            Box::new(|| both(leak(10.0, Sizes::All(205), 0.0, f64::INFINITY), churn(1000.0, 0.3, Sizes::All(205)))),
        ),
    ];
    for (name, rate, make) in programs {
        let found = called_growing(600, |_| vec![40], |_| make());
        let hits = found.iter().filter(|(_, _, growth)| (growth.ci95.0..=growth.ci95.1).contains(&rate)).count();
        let share = hits as f64 / found.len() as f64;
        assert!(found.len() > 590 && (0.90..=0.99).contains(&share), "{name}: {share} of {}", found.len());
        assert!(found.iter().all(|(_, _, growth)| (0.9..=1.0).contains(&growth.confidence)));
        let mean = found.iter().map(|(_, _, growth)| growth.bytes_per_s).sum::<f64>() / found.len() as f64;
        assert!((mean / rate - 1.0).abs() < 0.05, "{name}: mean of the rates {mean}, true {rate}");
    }
}

/// Ten minutes and an hour of what does not leak, judged at every scale, with times that only show there: sessions of a
/// minute, caches that turn over in minutes, load that follows a slow wave.
#[test]
fn long_runs_do_not_grow() {
    let wave = |peak: f64, period: f64| {
        let rate = move |time: f64| peak * (1.0 - 0.9 * (time / period * std::f64::consts::TAU).cos()) / 2.0;
        load(rate, Lives::Uniform(2.0, 20.0), Sizes::All(500))
    };
    let minutes = |seeds: u64, last: Window, first: Window, make: &dyn Fn(&mut SmallRng) -> Program| {
        let found = called_growing(seeds, |_| (first..=last).step_by(last as usize / 60).collect(), make);
        assert!(found.is_empty(), "{} of {seeds} called growing: {:?}", found.len(), &found[..found.len().min(5)]);
    };
    minutes(100, 600, 30, &|rng| sessions(log_uniform(rng, 0.05, 20.0), Lives::any(rng), Sizes::any(rng)));
    minutes(100, 600, 30, &|rng| wave(log_uniform(rng, 1.0, 30.0), rng.random_range(60.0..600.0)));
    minutes(100, 600, 30, &|rng| {
        let rate = log_uniform(rng, 2.0, 50.0);
        queue(rate, 0, false, Sizes::any(rng))
    });
    minutes(100, 600, 30, &|rng| {
        let setup = leak(log_uniform(rng, 1.0, 500.0), Sizes::any(rng), 0.0, 5.0);
        both(setup, churn(log_uniform(rng, 0.1, 50.0), log_uniform(rng, 0.01, 5.0), Sizes::any(rng)))
    });
    // A turnover of up to two minutes: until the first blocks leave it fills, then it is full.
    for eviction in [Eviction::Oldest, Eviction::Random, Eviction::Used(2)] {
        minutes(60, 900, 300, &|rng| {
            let (rate, turnover) = (log_uniform(rng, 2.0, 20.0), rng.random_range(30.0..120.0));
            cache(rate, (rate * turnover) as usize, 0, eviction, Sizes::any(rng))
        });
    }
    minutes(100, 900, 300, &|rng| churn(log_uniform(rng, 0.5, 20.0), rng.random_range(10.0..60.0), Sizes::any(rng)));
    minutes(40, 3600, 30, &|rng| sessions(log_uniform(rng, 0.05, 5.0), Lives::any(rng), Sizes::any(rng)));
    minutes(40, 3600, 30, &|rng| wave(log_uniform(rng, 0.5, 5.0), rng.random_range(600.0..3600.0)));
    minutes(40, 3600, 1200, &|rng| churn(log_uniform(rng, 0.1, 3.0), rng.random_range(60.0..200.0), Sizes::any(rng)));
}

/// A stack that has not been rolled for a while is judged as one that has.
#[test]
fn judging_does_not_depend_on_rolling() {
    let mut simulation = Simulation::new(3);
    simulation.run_to(40, &mut steady_leak(2048.0, 64));
    let mut rolled = simulation.history.clone();
    rolled.roll(75);
    assert_eq!(judge(&simulation.history, 75), judge(&rolled, 75));
    assert_eq!(judge(&rolled, 75).verdict, Verdict::Plateau);
}

/// Whenever a stack came up, also within a coarse window that is still open, it is judged without a panic, and a steady
/// leak is called growing (regression: a level without a whole window made the judge panic).
#[test]
fn any_start_can_be_judged() {
    for start in (0..2100).step_by(13) {
        let mut history = History::new(start);
        for window in start..start + 70 {
            let verdict = judge(&history, window).verdict;
            assert_eq!(verdict == Verdict::Growing, window - start >= MIN_WATCH, "start {start}, window {window}");
            for _ in 0..20 {
                history.born(window, window, 100);
            }
        }
    }
}

/// What its parent leaked is no leak of a forked child: it grows by what it allocates itself, and that not sooner than others.
#[test]
fn children_do_not_inherit_verdicts() {
    for seed in 0..100 {
        let mut simulation = Simulation::new(seed);
        let mut program = regular_leak(0.2, 100, 0.0);
        simulation.run_to(60, &mut program);
        assert_eq!(judge(&simulation.history, 60).verdict, Verdict::Growing);
        let forked = simulation.history.forked(60);
        for time in 60..200 {
            let verdict = judge(&forked, time).verdict;
            let expected = if time < 60 + MIN_WATCH { Verdict::Warming } else { Verdict::Stable };
            assert_eq!(verdict, expected, "a child that allocates nothing, at {time}");
        }
        simulation.history = forked;
        for time in 61..60 + MIN_WATCH {
            simulation.run_to(time, &mut program);
            assert_eq!(judge(&simulation.history, time).verdict, Verdict::Warming, "at {time}");
        }
        simulation.run_to(100, &mut program);
        let judged = judge(&simulation.history, 100);
        assert_eq!(judged.verdict, Verdict::Growing);
        let rate = judged.growth.map_or(0.0, |growth| growth.bytes_per_s);
        assert!((rate - 500.0).abs() < 50.0, "{rate}");
    }
}

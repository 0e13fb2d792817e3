//! The promises of [`super`] for programs of which only samples are seen: what does not leak is not called growing by the chance of
//! the draws, and what leaks is found.

use leak_common::sampling::Interval;
use rand::Rng;
use rand::rngs::SmallRng;

use super::simulation::{
    Eviction, Lives, Program, Simulation, Sizes, both, bursts, cache, churn, leak, log_uniform, queue, sawtooth,
    sessions, vector,
};
use super::{Growth, Verdict, judge};
use crate::ledger::history::Window;

type Make = fn(&mut SmallRng) -> Program;

/// Any mean between samples, from a few blocks to some thousands.
fn any_interval(rng: &mut SmallRng) -> Interval {
    Interval::near(log_uniform(rng, 128.0, 1_048_576.0) as u64)
}

/// The seeds, and the times, at which the program was called growing.
fn called_growing(
    seeds: u64,
    times: &[Window],
    interval: impl Fn(&mut SmallRng) -> Interval,
    make: impl Fn(&mut SmallRng) -> Program,
) -> Vec<(u64, Window, Growth)> {
    let mut found = Vec::new();
    for seed in 0..seeds {
        let mut simulation = Simulation::new(seed);
        let interval = interval(&mut simulation.rng);
        simulation.countdown.set(interval);
        let mut program = make(&mut simulation.rng);
        for time in times {
            simulation.run_to(*time, &mut program);
            if let Some(growth) = judge(&simulation.history, *time).growth {
                found.push((seed, *time, growth));
                break;
            }
        }
    }
    found
}

fn up_to_a_minute() -> Vec<Window> {
    (20..=60).filter(|time| time % 3 == 0 || time % 10 == 5).collect()
}

/// What does not leak is not called growing, whichever interval it is sampled with.
#[test]
fn nothing_grows_by_chance() {
    let programs: [(&str, Make); 8] = [
        ("churn", |rng| churn(log_uniform(rng, 1.0, 500.0), log_uniform(rng, 0.01, 5.0), Sizes::any(rng))),
        ("queue", |rng| queue(log_uniform(rng, 5.0, 300.0), 0, false, Sizes::any(rng))),
        ("first in first out", |rng| {
            let rate = log_uniform(rng, 5.0, 300.0);
            let capacity = (rate * rng.random_range(0.5..10.0)) as usize + 1;
            cache(rate, capacity, 0, Eviction::Oldest, Sizes::any(rng))
        }),
        ("random replacement", |rng| {
            let rate = log_uniform(rng, 5.0, 300.0);
            let capacity = (rate * rng.random_range(0.5..10.0)) as usize + 1;
            cache(rate, capacity, 0, Eviction::Random, Sizes::any(rng))
        }),
        ("sawtooth", |rng| {
            let period = rng.random_range(1.0..20.0);
            sawtooth(log_uniform(rng, 2.0, 200.0), period, rng.random_range(0.0..period), Sizes::any(rng))
        }),
        ("sessions", |rng| sessions(log_uniform(rng, 1.0, 100.0), Lives::any(rng), Sizes::any(rng))),
        ("bursts", |rng| {
            let count = log_uniform(rng, 2.0, 500.0) as u32;
            let lives = Lives::LogUniform(0.05, rng.random_range(0.1..20.0));
            bursts(rng.random_range(0.5..15.0), count, lives, Sizes::any(rng))
        }),
        ("set-up and churn", |rng| {
            let setup = leak(log_uniform(rng, 1.0, 500.0), Sizes::any(rng), 0.0, 5.0);
            both(setup, churn(log_uniform(rng, 1.0, 200.0), log_uniform(rng, 0.01, 2.0), Sizes::any(rng)))
        }),
    ];
    for (name, make) in programs {
        let found = called_growing(500, &up_to_a_minute(), any_interval, make);
        assert!(found.is_empty(), "{name}: {} called growing: {:?}", found.len(), &found[..found.len().min(5)]);
    }
}

/// The same over ten minutes, where the coarser windows speak.
#[test]
fn nothing_grows_by_chance_in_long_runs() {
    let times: Vec<Window> = (30..=600).step_by(10).collect();
    let programs: [(&str, Make); 3] = [
        ("churn", |rng| churn(log_uniform(rng, 0.5, 100.0), log_uniform(rng, 0.01, 10.0), Sizes::any(rng))),
        ("cache", |rng| {
            let rate = log_uniform(rng, 2.0, 50.0);
            cache(rate, (rate * rng.random_range(1.0..15.0)) as usize + 1, 0, Eviction::Random, Sizes::any(rng))
        }),
        ("sessions", |rng| sessions(log_uniform(rng, 0.5, 20.0), Lives::any(rng), Sizes::any(rng))),
    ];
    for (name, make) in programs {
        let found = called_growing(60, &times, any_interval, make);
        assert!(found.is_empty(), "{name}: {} called growing: {:?}", found.len(), &found[..found.len().min(5)]);
    }
}

/// A container that grows is a block that is there at times and at times not: that is not taken for growth of a container that is none.
#[test]
fn a_container_that_has_grown_is_not_growing() {
    let stopped =
        |rng: &mut SmallRng| vector(log_uniform(rng, 1e4, 1e6), rng.random_range(1.1..2.0), 10.0, rng.random_bool(0.5));
    let found = called_growing(300, &[40, 45, 50, 60], any_interval, stopped);
    assert!(found.is_empty(), "{} called growing: {:?}", found.len(), &found[..found.len().min(5)]);
}

/// A leak of which two samples a second are seen is found within 35 s, alone and beside a churn of ten times as many bytes.
#[test]
fn leaks_are_found() {
    let interval = |_: &mut SmallRng| Interval::near(16 << 10);
    let alone = |_: &mut SmallRng| leak(500.0, Sizes::All(64), 0.0, f64::INFINITY);
    let found = called_growing(300, &[35], interval, alone);
    assert!(found.len() >= 294, "{} of 300", found.len());
    let beside =
        |_: &mut SmallRng| both(leak(500.0, Sizes::All(64), 0.0, f64::INFINITY), churn(2000.0, 0.1, Sizes::All(160)));
    let found = called_growing(100, &[40], interval, beside);
    assert!(found.len() >= 95, "{} of 100 beside churn", found.len());
}

/// The interval of the rate holds the true one as often as without sampling: the noise of the draws is in what windows differ by.
#[test]
fn the_interval_of_the_rate_covers() {
    let rate = 1000.0 * 64.0;
    for (bytes, time) in [(1024, 40), (8192, 40), (32_768, 60)] {
        let interval = |_: &mut SmallRng| Interval::near(bytes);
        let grows = |_: &mut SmallRng| leak(1000.0, Sizes::All(64), 0.0, f64::INFINITY);
        let found = called_growing(400, &[time], interval, grows);
        let hits = found.iter().filter(|(_, _, growth)| (growth.ci95.0..=growth.ci95.1).contains(&rate)).count();
        let share = hits as f64 / found.len() as f64;
        let mean = found.iter().map(|(_, _, growth)| growth.bytes_per_s).sum::<f64>() / found.len() as f64;
        assert!(found.len() >= 390, "interval {bytes}: {} of 400 found", found.len());
        assert!((0.90..=0.99).contains(&share), "interval {bytes}: covered {share}");
        assert!((mean / rate - 1.0).abs() < 0.03, "interval {bytes}: mean {mean}");
    }
}

/// A change from exact to sampled, or between intervals, in the middle of a run makes no growth, and the totals stay right.
#[test]
fn changes_of_the_interval_do_not_grow() {
    for seed in 0..400 {
        let mut simulation = Simulation::new(seed);
        let changes: Vec<(Window, Interval)> = (0..6)
            .map(|change| {
                let exact = simulation.rng.random_bool(0.3);
                let interval = if exact { Interval::EXACT } else { any_interval(&mut simulation.rng) };
                (change * 10 + simulation.rng.random_range(0..10), interval)
            })
            .collect();
        let rng = &mut simulation.rng;
        let rate = log_uniform(rng, 5.0, 300.0);
        let mut program = match seed % 3 {
            0 => churn(rate, log_uniform(rng, 0.01, 5.0), Sizes::any(rng)),
            1 => cache(rate, (rate * rng.random_range(0.5..10.0)) as usize + 1, 0, Eviction::Oldest, Sizes::any(rng)),
            _ => sessions(rate, Lives::any(rng), Sizes::any(rng)),
        };
        for (time, interval) in changes {
            simulation.run_to(time, &mut program);
            let judged = judge(&simulation.history, time);
            assert_ne!(judged.verdict, Verdict::Growing, "seed {seed}, {time} s: {judged:?}");
            simulation.countdown.set(interval);
        }
        simulation.run_to(65, &mut program);
        let judged = judge(&simulation.history, 65);
        assert_ne!(judged.verdict, Verdict::Growing, "seed {seed}: {judged:?}");
    }
}

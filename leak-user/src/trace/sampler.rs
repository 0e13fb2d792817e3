//! How densely each process is sampled, and the way from one interval to another while it runs.
//!
//! No step may make a free unseen of a block that the ledger holds:
//!
//! - *from exact to sampled*: allocations are sampled at once, and all frees still sent. Once every call that was in flight has
//!   ended, or will keep its block by itself, what the ledger holds is put into the kernel's map of followed blocks; what is freed
//!   meanwhile only leaves an entry there that means nothing. Then frees are filtered. Where the map has no room for all of them
//!   frees are sent on.
//! - *from one interval to another*: each block's record says with which it was sampled, so there is nothing to do.
//! - *from sampled to exact*: frees are sent again from the same moment on. Those of blocks that were not sampled mean nothing.

use std::time::{Duration, Instant};

use leak_common::sampling::Interval;

use super::collector::Collector;
use super::reconcile::Reconciling;
use crate::attach::Programs;
use crate::ledger::ProcessLedger;
use crate::losses::monotonic_now;

/// Longer than a program of ours takes, preempted or not, that has read the settings just before they were changed.
const SETTLED: Duration = Duration::from_millis(250);

/// Of how many blocks more than the ledger holds there has to be room.
const SPARE: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Exact,
    /// Allocations are sampled since then, and all frees sent.
    Begun(Instant),
    /// Frees are filtered.
    Filtered,
    /// Sampled, with all frees sent: the map has no room.
    Unfiltered,
    /// Exact since then; addresses are left over in the map.
    Ended(Instant),
}

#[derive(Clone, Copy, Debug)]
struct Process {
    tgid: u32,
    /// In force: the longer of the two below.
    interval: Interval,
    asked: Interval,
    /// What keeps its blocks within the memory that may be taken.
    least: Interval,
    state: State,
}

impl Process {
    fn new(tgid: u32) -> Self {
        Self { tgid, interval: Interval::EXACT, asked: Interval::EXACT, least: Interval::EXACT, state: State::Exact }
    }

    fn apply(&mut self, programs: &Programs) {
        self.interval = self.asked.max(self.least);
        self.state = next(self.state, self.interval, Instant::now());
        programs.set_sampling(self.tgid, self.interval, self.state == State::Filtered);
    }
}

/// The traced processes' sampling.
#[derive(Debug)]
pub struct Sampler {
    processes: Vec<Process>,
    reconciling: Reconciling,
}

impl Sampler {
    pub fn new(reconciling: Reconciling) -> Self {
        Self { processes: Vec::new(), reconciling }
    }

    /// Addresses in the kernel's map that belonged to no block, and were dropped.
    pub fn addresses_dropped(&self) -> u64 {
        self.reconciling.dropped()
    }

    /// From now on a process that is traced is sampled with this interval, or exactly, unless its memory asks for a longer one. This
    /// is what whoever looks after the overhead calls; it may do so at any time, and it costs a store.
    pub fn set(&mut self, programs: &Programs, tgid: u32, interval: Interval) {
        let process = self.process(tgid);
        process.asked = interval;
        process.apply(programs);
    }

    /// From now on a process is sampled with no shorter interval than this.
    pub fn set_least(&mut self, programs: &Programs, tgid: u32, interval: Interval) {
        let process = self.process(tgid);
        process.least = interval;
        process.apply(programs);
    }

    fn process(&mut self, tgid: u32) -> &mut Process {
        let index = self.processes.iter().position(|process| process.tgid == tgid).unwrap_or_else(|| {
            self.processes.push(Process::new(tgid));
            self.processes.len() - 1
        });
        &mut self.processes[index]
    }

    /// Does what has become due; to be called often.
    pub fn tend(&mut self, programs: &Programs, collector: &Collector) {
        for process in &mut self.processes {
            let tgid = process.tgid;
            match process.state {
                State::Begun(since) if since.elapsed() >= SETTLED => {
                    let addresses = {
                        let mut core = collector.core();
                        core.collect();
                        core.ledger.process(tgid).map(ProcessLedger::addresses).unwrap_or_default()
                    };
                    process.state = match keep(programs, tgid, &addresses) {
                        Ok(()) => State::Filtered,
                        Err(error) => {
                            log::warn!("pid {tgid}: all of its frees are sent on: {error}");
                            State::Unfiltered
                        }
                    };
                    programs.set_sampling(tgid, process.interval, process.state == State::Filtered);
                }
                State::Ended(since) if since.elapsed() >= SETTLED => {
                    programs.purge_addresses(tgid, u64::MAX);
                    process.state = State::Exact;
                }
                _ => {}
            }
        }
        let filtered = self.processes.iter().filter(|process| process.state == State::Filtered);
        self.reconciling.tend(programs, collector, filtered.map(|process| process.tgid));
    }

    /// The interval of a process.
    pub fn interval(&self, tgid: u32) -> Interval {
        self.processes.iter().find(|process| process.tgid == tgid).map_or(Interval::EXACT, |process| process.interval)
    }

    /// The longest interval of any process.
    pub fn longest(&self) -> Interval {
        self.processes.iter().map(|process| process.interval).max().unwrap_or_default()
    }

    /// A process executed a new program at `time`.
    pub fn exec(&self, programs: &Programs, tgid: u32, time: u64) {
        if self.processes.iter().any(|process| process.tgid == tgid && process.state != State::Exact) {
            programs.purge_addresses(tgid, time);
        }
    }

    /// A process is no longer traced.
    pub fn forget(&mut self, programs: &Programs, tgid: u32) {
        let before = self.processes.len();
        self.processes.retain(|process| process.tgid != tgid);
        if self.processes.len() < before {
            programs.purge_addresses(tgid, u64::MAX);
        }
    }
}

/// The state after the interval was set.
fn next(state: State, interval: Interval, now: Instant) -> State {
    match (state, interval.is_exact()) {
        (State::Exact | State::Ended(_), false) => State::Begun(now),
        (State::Begun(_) | State::Filtered | State::Unfiltered, true) => State::Ended(now),
        // Another interval, or exact as it was.
        _ => state,
    }
}

/// Puts what the ledger holds into the kernel's map.
fn keep(programs: &Programs, tgid: u32, addresses: &[u64]) -> std::io::Result<()> {
    if addresses.len() + SPARE > programs.address_room() as usize {
        return Err(std::io::Error::other(format!("{} live blocks are more than there is room for", addresses.len())));
    }
    programs.keep_addresses(tgid, addresses, monotonic_now())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only by way of a time in which all frees are sent does a process come to have them filtered; another interval changes
    /// nothing about that, and the way back is at once.
    #[test]
    fn frees_are_filtered_only_after_a_while() {
        let (now, sampled, other) = (Instant::now(), Interval::near(4096), Interval::near(1 << 20));
        for exact in [State::Exact, State::Ended(now)] {
            assert_eq!(next(exact, sampled, now), State::Begun(now));
            assert_eq!(next(exact, Interval::EXACT, now), exact);
        }
        for state in [State::Begun(now), State::Filtered, State::Unfiltered] {
            assert_eq!(next(state, other, now), state);
            assert_eq!(next(state, Interval::EXACT, now), State::Ended(now));
        }
    }
}

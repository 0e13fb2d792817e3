//! Compares, now and then, the blocks that the ledger holds of sampled processes with those that the kernel side follows.
//!
//! The two are kept in step by the stream, so nothing is ever found here unless something went wrong that nobody noticed. Then
//!
//! - the free of a block whose address the kernel side does not have would end there unseen, and the block would look leaked: it is
//!   taken out of verdicts, and counted as a loss;
//! - an address that belongs to no block takes up room, and is dropped.
//!
//! # What is no difference
//!
//! The kernel side changes its map first and sends the record afterwards. So the map is read first and what is in the ring by then is
//! applied before the ledger is asked. A program that was preempted between the two may still owe its record, so only what was
//! allocated more than [`GRACE`] before is looked at, and a difference counts once a second comparison finds the same. An
//! address that is handed out again just while it is being dropped is found to be missing by later comparisons.
//!
//! # What it costs
//!
//! Reading a quarter of a million addresses takes some tens of milliseconds. The time from one comparison to the next is at least
//! [`SHARE`] times what one takes, and at least [`EVERY`].

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::collector::Collector;
use crate::attach::Programs;
use crate::ledger::ProcessLedger;
use crate::losses::monotonic_now;
use crate::recording::Entry;

/// Between two comparisons, if they are cheap; longer than any program takes from its change of the map to its record.
const EVERY: Duration = Duration::from_secs(5);
/// One takes at most one part in so many of the time.
const SHARE: u32 = 200;
/// Nanoseconds for which a block must have been there: twice as long as a call may be in flight before it counts as abandoned.
const GRACE: u64 = 2_000_000_000;

/// What the two sides hold of one process.
struct Sides<'a> {
    /// The kernel's addresses, and when each was allocated.
    kernel: &'a HashMap<u64, u64>,
    /// All blocks of the ledger.
    ledger: &'a HashSet<u64>,
    /// Of these, those that are in verdicts and were born before [`Self::before`].
    trusted: &'a [u64],
    before: u64,
}

/// Where they differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Differences {
    /// Blocks whose addresses the kernel does not have.
    unfollowed: HashSet<u64>,
    /// Addresses without a block, and when they were allocated.
    left: HashSet<(u64, u64)>,
}

impl Differences {
    fn find(sides: &Sides<'_>) -> Self {
        let Sides { kernel, ledger, trusted, before } = sides;
        Self {
            unfollowed: trusted.iter().copied().filter(|addr| !kernel.contains_key(addr)).collect(),
            left: kernel
                .iter()
                .map(|(addr, time)| (*addr, *time))
                .filter(|(addr, time)| time < before && !ledger.contains(addr))
                .collect(),
        }
    }

    /// What both comparisons found.
    fn and(&self, other: &Self) -> Self {
        Self {
            unfollowed: self.unfollowed.intersection(&other.unfollowed).copied().collect(),
            left: self.left.intersection(&other.left).copied().collect(),
        }
    }
}

/// What was found of a process last.
#[derive(Debug)]
struct Suspects {
    tgid: u32,
    /// What was born before then was looked at.
    before: u64,
    differences: Differences,
}

/// Compares, again and again.
#[derive(Debug)]
pub struct Reconciling {
    next: Instant,
    suspects: Vec<Suspects>,
    /// Addresses that were dropped.
    dropped: u64,
    /// How many the kernel side is still to lose, for a test.
    lose: usize,
}

impl Reconciling {
    /// `lose`: see [`crate::config::Config::lose_addresses`].
    pub fn new(lose: u32) -> Self {
        Self { next: Instant::now() + EVERY, suspects: Vec::new(), dropped: 0, lose: lose as usize }
    }

    /// Addresses without a block that were dropped.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Compares these processes' sides if it is time to. All of them have their frees filtered.
    pub fn tend(&mut self, programs: &Programs, collector: &Collector, processes: impl Iterator<Item = u32>) {
        let start = Instant::now();
        if start < self.next {
            return;
        }
        let processes: Vec<u32> = processes.collect();
        self.suspects.retain(|suspects| processes.contains(&suspects.tgid));
        if !processes.is_empty()
            && let Err(error) = self.compare(programs, collector, &processes)
        {
            log::debug!("sampled blocks cannot be compared with the kernel's: {error}");
        }
        self.next = start + EVERY.max(start.elapsed() * SHARE);
    }

    fn compare(&mut self, programs: &Programs, collector: &Collector, processes: &[u32]) -> std::io::Result<()> {
        for tgid in processes.iter().filter(|_| self.lose > 0) {
            if spoil(programs, collector, *tgid, self.lose)? {
                self.lose = 0;
                break;
            }
        }
        let before = monotonic_now().saturating_sub(GRACE);
        let mut kernel: HashMap<u32, HashMap<u64, u64>> = HashMap::new();
        for (address, time) in programs.addresses()? {
            kernel.entry(address.tgid).or_default().insert(address.addr, time);
        }
        let none = HashMap::new();
        for &tgid in processes {
            let mut core = collector.core();
            core.collect();
            let ledger: HashSet<u64> =
                core.ledger.process(tgid).map(ProcessLedger::addresses).unwrap_or_default().into_iter().collect();
            let trusted = core.ledger.trusted_addresses(tgid, before);
            let kernel = kernel.get(&tgid).unwrap_or(&none);
            let found = Differences::find(&Sides { kernel, ledger: &ledger, trusted: &trusted, before });
            let place = self.suspects.iter().position(|suspects| suspects.tgid == tgid);
            let earlier = place.map(|place| self.suspects.swap_remove(place));
            if let Some(earlier) = earlier {
                let both = found.and(&earlier.differences);
                for &addr in &both.unfollowed {
                    // Not one that took its place meanwhile.
                    core.tell(Entry::DistrustBlock { tgid, addr, time: earlier.before });
                }
                drop(core);
                let left: Vec<u64> = both.left.iter().map(|(addr, _)| *addr).collect();
                self.dropped += programs.drop_addresses(tgid, &left) as u64;
                if !both.unfollowed.is_empty() || !left.is_empty() {
                    log::info!(
                        "pid {tgid}: {} blocks were not followed any more, {} addresses belonged to no block",
                        both.unfollowed.len(),
                        left.len()
                    );
                }
            }
            self.suspects.push(Suspects { tgid, before, differences: found });
        }
        Ok(())
    }
}

/// Has the kernel side lose so many addresses of a process, and have as many that mean nothing, for a test; false while there are not
/// so many to lose.
fn spoil(programs: &Programs, collector: &Collector, tgid: u32, count: usize) -> std::io::Result<bool> {
    let old = monotonic_now().saturating_sub(2 * GRACE);
    let victims = collector.core().ledger.trusted_addresses(tgid, old);
    if victims.len() < count {
        return Ok(false);
    }
    programs.drop_addresses(tgid, &victims[..count]);
    // Nothing is ever allocated in the first pages of an address space.
    let made_up: Vec<u64> = (1..=count as u64).map(|number| number * 16).collect();
    programs.keep_addresses(tgid, &made_up, old)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block without an address and an address without a block are differences; what is too young, in the hands of realloc, or out of
    /// verdicts already is none. Only what two comparisons find, and of the same time, is to be acted upon.
    #[test]
    fn what_differs() {
        let kernel = HashMap::from([(0x10, 5), (0x20, 5), (0x50, 5), (0x60, 90), (0x70, 5)]);
        // 0x40 is too young or out of verdicts already, 0x70 is in the hands of realloc.
        let ledger = HashSet::from([0x10, 0x20, 0x30, 0x40, 0x70]);
        let find = |kernel: &HashMap<u64, u64>, trusted: &[u64]| {
            Differences::find(&Sides { kernel, ledger: &ledger, trusted, before: 50 })
        };
        let found = find(&kernel, &[0x10, 0x20, 0x30]);
        assert_eq!(found, Differences { unfollowed: HashSet::from([0x30]), left: HashSet::from([(0x50, 5)]) });
        assert_eq!(found.and(&found), found);
        // The free of 0x30 came late, and 0x50 was handed out anew.
        let later = HashMap::from([(0x10, 5), (0x20, 5), (0x50, 45)]);
        let again = find(&later, &[0x10, 0x20]);
        assert_eq!(again.left, HashSet::from([(0x50, 45)]));
        assert_eq!(found.and(&again), Differences::default());
        assert_eq!(find(&kernel, &[]).unfollowed, HashSet::new());
    }
}

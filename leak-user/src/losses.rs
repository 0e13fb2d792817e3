//! What the kernel side lost or found odd, and the frees that found the ring full.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Result, bail};
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use leak_common::counter;

use crate::attach::{Programs, lookup_and_delete, recursion_misses};

/// A free whose record found the ring full; its address was kept aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissedFree {
    pub tgid: u32,
    pub addr: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
}

/// Names of the counters in the report, with their slots.
pub const NAMES: [(&str, u32); 16] = [
    ("allocations_ring_full", counter::RING_FULL_ALLOC),
    ("frees_ring_full", counter::RING_FULL_FREE),
    ("frees_lost", counter::FREE_LOST),
    ("stacks_ring_full", counter::RING_FULL_STACK),
    ("others_ring_full", counter::RING_FULL_OTHER),
    ("threads_full", counter::THREADS_FULL),
    ("calls_abandoned", counter::ABANDONED),
    ("calls_nested", counter::NESTED),
    ("allocations_failed", counter::FAILED),
    ("returns_unpaired", counter::UNPAIRED_RETURN),
    ("sizes_overflowed", counter::OVERFLOWED),
    ("results_unreadable", counter::BAD_RESULT),
    ("frames_unwound", counter::FRAMES_WALKED),
    ("frames_reused", counter::FRAMES_REUSED),
    ("sampled_blocks_no_room", counter::ADDRESSES_FULL),
    ("sampled_bytes_no_room", counter::ADDRESSES_FULL_BYTES),
];

/// The name in the report of what [`Skipped`] counts.
const PROGRAMS_SKIPPED: &str = "programs_skipped";

/// Runs that the kernel left out: a program that is already running on a processor is not run there a second time, as when a
/// thread that is in it gives way to another that maps memory too. Of probes the BPF side would see a call without its end;
/// of programs that see mapping calls and processes nothing else tells.
struct Skipped {
    programs: Vec<OwnedFd>,
    read: fn(BorrowedFd<'_>) -> io::Result<u64>,
}

impl Skipped {
    /// Since the programs were loaded. One that cannot be read counts nothing.
    fn sum(&self) -> u64 {
        self.programs.iter().filter_map(|program| (self.read)(program.as_fd()).ok()).fold(0, u64::saturating_add)
    }
}

/// What makes live sets doubtful: frees, and changes of mappings or processes, that nothing is known of.
fn for_good(counter: impl Fn(u32) -> u64, skipped: u64) -> u64 {
    counter(counter::FREE_LOST) + counter(counter::RING_FULL_OTHER) + skipped
}

/// The kernel side's counters and its overflow map.
pub struct Losses {
    skipped: Skipped,
    counters: PerCpuArray<MapData, u64>,
    missed: HashMap<MapData, [u8; 16], u64>,
    missed_fd: OwnedFd,
}

impl Losses {
    /// Those of these programs; they can be taken once.
    pub fn take(programs: &mut Programs) -> Result<Self> {
        let missed = programs.take_map("MISSED")?;
        let missed_fd = match &missed {
            Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned()?,
            other => bail!("MISSED is not a hash map: {other:?}"),
        };
        Ok(Self {
            skipped: Skipped { programs: programs.take_watchers(), read: recursion_misses },
            counters: PerCpuArray::try_from(programs.take_map("COUNTERS")?)?,
            missed: HashMap::try_from(missed)?,
            missed_fd,
        })
    }

    /// One counter, summed over the CPUs.
    pub fn get(&self, slot: u32) -> u64 {
        self.counters.get(&slot, 0).map_or(0, |values| values.iter().sum())
    }

    /// All counters by name; zeros included.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let named = NAMES.iter().map(|(name, slot)| (*name, self.get(*slot)));
        named.chain([(PROGRAMS_SKIPPED, self.skipped.sum())]).map(|(name, count)| (name.to_owned(), count)).collect()
    }

    /// How much was lost since the start that nothing makes up for.
    pub fn for_good(&self) -> u64 {
        for_good(|slot| self.get(slot), self.skipped.sum())
    }

    /// Takes the kept addresses out of the overflow map.
    pub fn drain_missed(&mut self) -> Vec<MissedFree> {
        let keys: Vec<[u8; 16]> = self.missed.keys().filter_map(Result::ok).collect();
        keys.into_iter()
            .filter_map(|key| {
                let time = self.take_missed(&key)?;
                // The key is `leak_common::MissedFree`: tgid, four reserved bytes, address.
                let (tgid, addr) = (key.first_chunk::<4>()?, key.last_chunk::<8>()?);
                Some(MissedFree { tgid: u32::from_ne_bytes(*tgid), addr: u64::from_ne_bytes(*addr), time })
            })
            .collect()
    }

    /// Removes one kept address and says when it was freed last. Reading and removing must be one step: an address that is
    /// handed out and freed once more in between would otherwise lose that free. Kernels that cannot (before 5.14) get the
    /// time of the removal, which is no earlier than any free that was kept: a newer block may be forgotten, none is
    /// invented.
    fn take_missed(&mut self, key: &[u8; 16]) -> Option<u64> {
        let mut time = [0_u8; 8];
        match lookup_and_delete(self.missed_fd.as_fd(), key, &mut time) {
            Ok(taken) => taken.map(|()| u64::from_ne_bytes(time)),
            Err(_) => self.missed.remove(key).ok().map(|()| monotonic_now()),
        }
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_now() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    now.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// Skipped runs of all programs count together; one that cannot be read takes nothing from the others.
    #[test]
    fn skipped_runs() {
        // Stands for a program that misses as many runs as the file has bytes; a folder cannot be read.
        fn read(program: BorrowedFd<'_>) -> io::Result<u64> {
            let file = File::from(program.try_clone_to_owned()?);
            let found = file.metadata()?;
            if found.is_file() { Ok(found.len()) } else { Err(io::Error::other("no program")) }
        }
        let file = |misses: u64| {
            let file = tempfile::tempfile().expect("a temporary file");
            file.set_len(misses).expect("room");
            OwnedFd::from(file)
        };
        let folder = OwnedFd::from(File::open("/").expect("the root can be opened"));
        let skipped = |programs| Skipped { programs, read }.sum();
        assert_eq!(skipped(Vec::new()), 0);
        assert_eq!(skipped(vec![file(3), folder, file(0), file(4)]), 7);
    }

    /// Lost frees, lost changes and skipped programs each make live sets doubtful; a free that was kept aside does not.
    #[test]
    fn what_nothing_makes_up_for() {
        let one = |wanted: u32| move |slot: u32| u64::from(slot == wanted);
        assert_eq!(for_good(one(counter::FREE_LOST), 0), 1);
        assert_eq!(for_good(one(counter::RING_FULL_OTHER), 0), 1);
        assert_eq!(for_good(one(counter::RING_FULL_FREE), 0), 0);
        assert_eq!(for_good(one(counter::RING_FULL_ALLOC), 0), 0);
        assert_eq!(for_good(|_| 0, 5), 5);
        assert_eq!(for_good(one(counter::FREE_LOST), 5), 6);
    }
}

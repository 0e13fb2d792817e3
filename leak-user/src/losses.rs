//! What the kernel side lost or found odd, and the frees that found the ring full.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Result, bail};
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use bytes::Buf as _;
use leak_common::counter;

use crate::attach::{Programs, lookup_and_delete, recursion_misses};

/// Something whose record found the ring full and that was kept aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    pub tgid: u32,
    pub what: MissedWhat,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissedWhat {
    /// The block at this address was freed.
    Free { addr: u64 },
    /// This thread's realloc ended.
    ReallocEnd { tid: u32 },
}

impl Missed {
    /// From a key of the overflow map, `leak_common::Missed`, and its time.
    fn new(key: [u8; 16], time: u64) -> Self {
        let mut r = &key[..];
        let (tgid, tid, addr) = (r.get_u32_ne(), r.get_u32_ne(), r.get_u64_ne());
        let what = if tid == 0 { MissedWhat::Free { addr } } else { MissedWhat::ReallocEnd { tid } };
        Self { tgid, what, time }
    }
}

/// Whose live sets became doubtful, because frees, or changes of mappings or processes, were lost that nothing is known of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// Of these processes; of none if it is empty.
    Of(Vec<u32>),
    /// Of all: nobody knows whose it was.
    All,
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

/// What was seen of the losses that make live sets doubtful, to find out whether there were more since.
#[derive(Debug, Default)]
struct Doubts {
    skipped: u64,
    /// Lost frees, and lost changes of mappings and processes, of all processes.
    lost: u64,
    /// The same by process.
    epochs: BTreeMap<u32, u64>,
}

impl Doubts {
    /// Whose live sets became doubtful since the last time. `epochs` is asked only if something was lost.
    fn since(
        &mut self,
        skipped: u64,
        counter: impl Fn(u32) -> u64,
        epochs: impl FnOnce() -> BTreeMap<u32, u64>,
    ) -> Doubt {
        // A program that was skipped did not come to see whose process it was.
        let all = std::mem::replace(&mut self.skipped, skipped) != skipped;
        let lost = counter(counter::FREE_LOST) + counter(counter::RING_FULL_OTHER);
        let mut of = Vec::new();
        if std::mem::replace(&mut self.lost, lost) != lost {
            let now = epochs();
            // A process that is traced anew begins at zero again.
            of.extend(
                now.iter()
                    .filter(|(tgid, epoch)| {
                        let before = self.epochs.get(tgid).copied().unwrap_or(0);
                        **epoch != before && **epoch != 0
                    })
                    .map(|(tgid, _)| *tgid),
            );
            self.epochs = now;
        }
        if all { Doubt::All } else { Doubt::Of(of) }
    }
}

/// The kernel side's counters and its overflow map.
pub struct Losses {
    skipped: Skipped,
    counters: PerCpuArray<MapData, u64>,
    missed: HashMap<MapData, [u8; 16], u64>,
    missed_fd: OwnedFd,
    epochs: HashMap<MapData, u32, u64>,
    doubts: Doubts,
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
            epochs: HashMap::try_from(programs.take_epochs()?)?,
            doubts: Doubts::default(),
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

    /// Whose live sets became doubtful since this was asked last.
    pub fn doubt(&mut self) -> Doubt {
        let Self { skipped, counters, epochs, doubts, .. } = self;
        let counter = |slot: u32| counters.get(&slot, 0).map_or(0, |values| values.iter().sum());
        doubts.since(skipped.sum(), counter, || epochs.iter().filter_map(Result::ok).collect())
    }

    /// Takes out of the overflow map what was kept aside there.
    pub fn drain_missed(&mut self) -> Vec<Missed> {
        let keys: Vec<[u8; 16]> = self.missed.keys().filter_map(Result::ok).collect();
        keys.into_iter()
            .filter_map(|key| {
                let time = self.take_missed(&key)?;
                Some(Missed::new(key, time))
            })
            .collect()
    }

    /// Removes one key and says when it was kept last. Reading and removing must be one step: an address that is
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

/// Nanoseconds of `CLOCK_MONOTONIC` as the kernel side has it: in a time namespace ours is ahead of that or behind.
pub fn monotonic_now() -> u64 {
    static AHEAD: OnceLock<i64> = OnceLock::new();
    let ahead = *AHEAD.get_or_init(|| {
        // Not there: the kernel has no time namespaces.
        std::fs::read_to_string("/proc/self/timens_offsets").ok().and_then(|text| ahead(&text)).unwrap_or(0)
    });
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    (now.as_nanos() as u64).saturating_add_signed(-ahead)
}

/// How many nanoseconds a time namespace's `CLOCK_MONOTONIC` is ahead of the host's (`time_namespaces(7)`).
fn ahead(offsets: &str) -> Option<i64> {
    let line = offsets.lines().find_map(|line| line.strip_prefix("monotonic"))?;
    let mut numbers = line.split_whitespace().map_while(|number| number.parse::<i64>().ok());
    numbers.next()?.checked_mul(1_000_000_000)?.checked_add(numbers.next()?)
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

    /// Lost frees and lost changes make the live set of their process doubtful, skipped programs those of all; a free that was
    /// kept aside none.
    #[test]
    fn what_nothing_makes_up_for() {
        let one = |wanted: u32, count: u64| move |slot: u32| if slot == wanted { count } else { 0 };
        let epochs = |list: &[(u32, u64)]| list.iter().copied().collect::<BTreeMap<u32, u64>>();
        let of = |list: &[u32]| Doubt::Of(list.to_vec());
        let mut doubts = Doubts::default();
        assert_eq!(doubts.since(0, one(counter::RING_FULL_FREE, 9), || unreachable!("nothing was lost")), of(&[]));
        assert_eq!(doubts.since(0, one(counter::FREE_LOST, 1), || epochs(&[(7, 1), (8, 0)])), of(&[7]));
        assert_eq!(doubts.since(0, one(counter::FREE_LOST, 1), || unreachable!("nothing since")), of(&[]));
        assert_eq!(doubts.since(0, one(counter::FREE_LOST, 3), || epochs(&[(7, 2), (8, 1)])), of(&[7, 8]));
        assert_eq!(doubts.since(5, one(counter::FREE_LOST, 3), || unreachable!("no more frees")), Doubt::All);
        // 8 is another process by now, of which nothing was lost.
        assert_eq!(doubts.since(5, one(counter::FREE_LOST, 4), || epochs(&[(7, 3), (8, 0)])), of(&[7]));
        assert_eq!(doubts.since(5, one(counter::RING_FULL_OTHER, 9), || epochs(&[(7, 4), (8, 0)])), of(&[7]));
    }

    /// The offsets of a time namespace, ahead and behind, and a file that has none.
    #[test]
    fn offsets_of_a_time_namespace() {
        assert_eq!(ahead("monotonic         86400         5\nboottime 7 0\n"), Some(86_400_000_000_005));
        assert_eq!(ahead("monotonic -2 0\nboottime 0 0\n"), Some(-2_000_000_000));
        assert_eq!(ahead("boottime 7 0\n"), None);
        assert_eq!(ahead("monotonic x\n"), None);
    }

    /// The kernel side's keys are told apart by the thread.
    #[test]
    fn keys_of_the_overflow_map() {
        let key = |tid: u32, addr: u64| {
            let mut key = [0; 16];
            key[..4].copy_from_slice(&7_u32.to_ne_bytes());
            key[4..8].copy_from_slice(&tid.to_ne_bytes());
            key[8..].copy_from_slice(&addr.to_ne_bytes());
            Missed::new(key, 3)
        };
        assert_eq!(key(0, 0x10), Missed { tgid: 7, what: MissedWhat::Free { addr: 0x10 }, time: 3 });
        assert_eq!(key(9, 0), Missed { tgid: 7, what: MissedWhat::ReallocEnd { tid: 9 }, time: 3 });
    }
}

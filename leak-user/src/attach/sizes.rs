//! How much kernel memory the maps take: what the object says, shared out within the cap that the user gives.
//!
//! The footprints are estimates by the kernel's own layout (`kernel/bpf/hashtab.c`, `arraymap.c`), on the high side; what is in use
//! the kernel says itself ([`used`]).

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, bail};
use leak_common::ring::{LANES, MARGIN, MAX_RECORD, MIN_RING_SIZE, RING_SIZE, stride};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::UprobeKind;

/// Offsets in `struct bpf_map_def`: type, size of keys, size of values, number of elements, flags.
pub(super) const MAP_VALUE_SIZE: usize = 8;
pub(super) const MAP_FLAGS: usize = 16;
/// The whole of it.
const MAP_DEF: usize = 20;

const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_PERCPU_ARRAY: u32 = 6;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_F_NO_PREALLOC: u32 = 1;

/// What the kernel adds to each element of a hash map (`struct htab_elem`), and its share of the buckets.
const HASH_ELEMENT: u64 = 48 + 16;
/// A map by itself: its structure, and the least that is allocated.
const MAP: u64 = 4096;

/// Threads beyond the common slots that there is room for at most; a thread takes 8 KiB.
const MOST_THREADS: u32 = 65_536;
/// Threads whose state there is room for beside those of the common slots, where the room is taken in advance: 4,096 of 7.4 KiB are
/// 30 MiB. Threads beyond that are counted as a loss.
const PREALLOCATED_THREADS: u32 = 4096;
/// With fewer than this, nothing useful can be traced.
const LEAST_THREADS: u32 = 64;
/// The same for addresses of sampled blocks: 65,536 of some 80 bytes are 5 MiB.
const PREALLOCATED_ADDRESSES: u32 = 65_536;
/// Frees and ends of reallocs that are kept aside at most while the ring is full.
const MOST_MISSED: u32 = 65_536;

/// A map as the object defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Definition {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
    /// Where in the object's file it stands.
    pub at: usize,
}

impl Definition {
    /// Bytes of kernel memory of one element.
    fn element(&self) -> u64 {
        let rounded = |bytes: u32| u64::from(bytes).next_multiple_of(8);
        match self.kind {
            BPF_MAP_TYPE_HASH if self.flags & BPF_F_NO_PREALLOC != 0 => {
                // Elements that are allocated one by one come from caches of powers of two.
                (HASH_ELEMENT + rounded(self.key) + rounded(self.value)).next_power_of_two()
            }
            BPF_MAP_TYPE_HASH => HASH_ELEMENT + rounded(self.key) + rounded(self.value),
            BPF_MAP_TYPE_PERCPU_ARRAY => rounded(self.value) * processors(),
            BPF_MAP_TYPE_RINGBUF => 1,
            _ => rounded(self.value),
        }
    }

    fn bytes(&self) -> u64 {
        MAP + self.element() * u64::from(self.entries)
    }
}

fn processors() -> u64 {
    // SAFETY: no arguments that could be wrong.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) }).unwrap_or(1).max(1)
}

/// The maps that an object defines, by name.
pub(super) fn definitions(object: &[u8]) -> Result<BTreeMap<String, Definition>> {
    let file = object::File::parse(object).context("failed to parse the BPF object")?;
    let section = file.section_by_name("maps").context("the BPF object has no maps")?;
    let (start, length) = section.file_range().context("the section of maps is empty")?;
    let mut found = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.section_index() == Some(section.index())) {
        let name = symbol.name()?;
        let within = symbol.address().wrapping_sub(section.address());
        if name.is_empty() || within >= length {
            continue;
        }
        let at = usize::try_from(start + within)?;
        let bytes = object.get(at..at + MAP_DEF).context("the BPF object is cut off")?;
        let field = |n: usize| bytes[4 * n..].first_chunk::<4>().map_or(0, |field| u32::from_ne_bytes(*field));
        let [kind, key, value, entries, flags] = [0, 1, 2, 3, 4].map(field);
        found.insert(name.to_owned(), Definition { kind, key, value, entries, flags, at });
    }
    Ok(found)
}

/// Sizes that a test asks for, to fill what is otherwise hard to fill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Bytes in a lane of the ring at which it counts as full. Not its size: beyond this there has to be room for what was begun.
    pub ring: Option<u32>,
    /// Threads, both in the common slots and beyond them.
    pub threads: Option<u32>,
    /// Elements of the overflow map.
    pub missed: Option<u32>,
}

/// How large the maps are made whose sizes can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of the ring, a power of two.
    pub ring: u64,
    /// Its lanes, a power of two.
    pub lanes: u64,
    /// Bytes in a lane at which it counts as full.
    pub ring_limit: u64,
    /// Rows of unwind tables.
    pub rows: u32,
    /// Elements of the overflow map.
    pub missed: u32,
    /// Addresses of sampled blocks.
    pub addresses: u32,
    /// Threads beyond the common slots.
    pub threads: u32,
    /// Threads in the common slots, if not all.
    pub owners: Option<u32>,
    /// Bytes that all maps take at most.
    pub bytes: u64,
}

impl Sizes {
    /// Bytes of a lane of the ring.
    pub fn lane(&self) -> u64 {
        self.ring / self.lanes
    }

    /// With one lane where the kernel has no links over many uprobes (before 6.6): the verifier of 6.1 refuses programs that choose.
    pub fn for_links(self, kind: UprobeKind) -> Self {
        if kind != UprobeKind::Perf {
            return self;
        }
        let usual = self.ring_limit == self.lane() - MARGIN;
        Self { lanes: 1, ring_limit: if usual { self.ring - MARGIN } else { self.ring_limit }, ..self }
    }

    /// What the programs know of the ring.
    pub fn globals(&self) -> [(&'static str, u64); 4] {
        [
            ("RING_MASK", self.lane() - 8),
            ("RING_LIMIT", self.ring_limit),
            ("LANE_MASK", self.lanes - 1),
            ("LANE_STRIDE", stride(self.lane())),
        ]
    }

    /// Bytes of the ring as it lies in memory.
    pub fn whole_ring(&self) -> u64 {
        self.lanes * stride(self.lane())
    }
}

/// What is asked for besides, as far as there is room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Rows of unwind tables; these are not cut.
    pub rows: u32,
    /// Addresses of sampled blocks.
    pub addresses: u32,
}

/// The least that all maps can be made to take, with no unwind tables.
pub const LEAST: u64 = 27 << 19;

/// Shares `most` bytes out. `grows`: whether the table of threads takes memory as threads come.
pub(super) fn plan(
    maps: &BTreeMap<String, Definition>,
    most: u64,
    Wanted { rows, addresses }: Wanted,
    grows: bool,
    asked: Asked,
) -> Result<Sizes> {
    // The ring that is used is the one or the other.
    const CHOSEN: [&str; 6] = ["RING", "EVENTS", "ROWS", "MISSED", "ADDRESSES", "THREADS"];
    let fixed: u64 = maps.iter().filter(|(name, _)| !CHOSEN.contains(&name.as_str())).map(|(_, map)| map.bytes()).sum();
    let of = |name: &str| maps.get(name).with_context(|| format!("the BPF object lacks the map {name}"));
    let (missed, threads) = (of("MISSED")?.element(), of("THREADS")?.element());
    let address = of("ADDRESSES")?.element();
    let table = u64::from(rows) * size_of::<u64>() as u64;
    let Some(rest) = most.checked_sub(fixed + table + CHOSEN.len() as u64 * MAP + (LANES * MAX_RECORD) as u64) else {
        bail!("{most} bytes of kernel memory are too few: {fixed} are needed, and {table} for unwind tables");
    };
    // The ring is what decides whether anything is lost, so it gets up to half.
    let ring = (rest / 2).clamp(1, RING_SIZE);
    let ring = if ring.is_power_of_two() { ring } else { ring.next_power_of_two() / 2 };
    if ring < MIN_RING_SIZE {
        bail!("{most} bytes of kernel memory are too few: {rest} are left for the ring, and it needs {MIN_RING_SIZE}");
    }
    let rest = rest - ring;
    let count = |bytes: u64, element: u64, most: u32| u32::try_from(bytes / element).map_or(most, |n| n.min(most));
    let missed_count = count(rest / 4, missed, MOST_MISSED).max(1);
    let rest = rest - u64::from(missed_count) * missed;
    let most_addresses = if grows { addresses } else { addresses.min(PREALLOCATED_ADDRESSES) };
    let address_count = count(rest / 2, address, most_addresses).max(1);
    let rest = rest - u64::from(address_count) * address;
    let most_threads = if grows { MOST_THREADS } else { PREALLOCATED_THREADS };
    let thread_count = count(rest, threads, most_threads);
    if thread_count < LEAST_THREADS {
        bail!(
            "{most} bytes of kernel memory are too few: there is room for {thread_count} threads beyond the common ones"
        );
    }
    // No more lanes than processors: they are for threads that run at the same time.
    let lanes = (LANES as u64).min(processors().next_power_of_two()).min(ring / MIN_RING_SIZE);
    let full = ring / lanes - MARGIN;
    let ring_limit = asked.ring.map_or(full, |limit| u64::from(limit).min(full));
    let (missed_count, thread_count) = (asked.missed.unwrap_or(missed_count), asked.threads.unwrap_or(thread_count));
    let bytes = fixed
        + table
        + CHOSEN.len() as u64 * MAP
        + (LANES * MAX_RECORD) as u64
        + ring
        + u64::from(missed_count) * missed
        + u64::from(address_count) * address
        + u64::from(thread_count) * threads;
    let owners = asked.threads;
    let (missed, addresses, threads) = (missed_count, address_count, thread_count);
    Ok(Sizes { ring, lanes, ring_limit, rows, missed, addresses, threads, owners, bytes })
}

/// Bytes of kernel memory that maps take now, as the kernel counts them (before 6.4: could take at most). `None` where it does not
/// say.
pub(super) fn used(maps: &[OwnedFd]) -> Option<u64> {
    let of = |map: &OwnedFd| {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd())).ok()?;
        text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse::<u64>().ok())
    };
    maps.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps() -> BTreeMap<String, Definition> {
        definitions(super::super::OBJECT).expect("our own object")
    }

    fn plan_for(most: u64, rows: u32) -> Result<Sizes> {
        plan(&maps(), most, Wanted { rows, addresses: 1 << 18 }, true, Asked::default())
    }

    /// Every map that the loader changes is found in the object, with the type that its footprint is counted by.
    #[test]
    fn the_objects_maps_are_known() {
        let maps = maps();
        let kind = |name: &str| maps[name].kind;
        assert_eq!(kind("THREADS"), BPF_MAP_TYPE_HASH);
        assert_eq!(maps["THREADS"].flags & BPF_F_NO_PREALLOC, BPF_F_NO_PREALLOC);
        assert_eq!(kind("COUNTERS"), BPF_MAP_TYPE_PERCPU_ARRAY);
        assert_eq!(kind("EVENTS"), BPF_MAP_TYPE_RINGBUF);
        assert_eq!(u64::from(maps["RING"].value), RING_SIZE + MAX_RECORD as u64);
        assert!(maps.len() > 15, "{}", maps.len());
    }

    /// Whatever the cap, the maps stay below it; with more there is more room, up to the largest of everything.
    #[test]
    fn the_cap_is_kept() {
        let mut before = None;
        for mib in [14, 15, 16, 20, 32, 48, 64, 100, 128, 256, 1024] {
            let most = mib << 20;
            let sizes = plan_for(most, 1 << 16).unwrap_or_else(|error| panic!("{mib} MiB: {error:#}"));
            assert!(sizes.bytes <= most, "{sizes:?} within {mib} MiB");
            assert!(sizes.ring.is_power_of_two() && sizes.ring >= MIN_RING_SIZE);
            assert!(sizes.lanes.is_power_of_two() && sizes.lanes <= LANES as u64);
            assert_eq!(sizes.ring_limit, sizes.lane() - MARGIN);
            if let Some((ring, missed)) = before {
                assert!(sizes.ring >= ring && sizes.missed >= missed, "{mib} MiB: {sizes:?}");
            }
            before = Some((sizes.ring, sizes.missed));
        }
        let sizes = plan_for(2 << 30, 2 << 20).expect("plenty");
        assert_eq!((sizes.ring, sizes.missed, sizes.threads), (RING_SIZE, MOST_MISSED, MOST_THREADS));
        let sizes =
            plan(&maps(), 1 << 30, Wanted { rows: 1, addresses: 1 << 18 }, false, Asked::default()).expect("plenty");
        assert_eq!((sizes.threads, sizes.addresses), (PREALLOCATED_THREADS, PREALLOCATED_ADDRESSES));
    }

    /// A cap that nothing can be traced within is refused with the numbers.
    #[test]
    fn too_little_is_refused() {
        for (most, rows) in [(1 << 20, 1), (LEAST, 4 << 20), (7 << 20, 1)] {
            let error = plan_for(most, rows).expect_err("too little").to_string();
            assert!(error.contains(&most.to_string()) && error.contains("too few"), "{error}");
        }
        assert!(plan_for(LEAST, 1).is_ok());
    }

    /// What a test asks for is used as it is, but the ring keeps its room for what was begun.
    #[test]
    fn asked_sizes() {
        let asked = Asked { ring: Some(4096), threads: Some(16), missed: Some(16) };
        let sizes = plan(&maps(), 128 << 20, Wanted { rows: 1, addresses: 1 << 18 }, true, asked).expect("enough");
        assert_eq!((sizes.ring_limit, sizes.threads, sizes.missed, sizes.owners), (4096, 16, 16, Some(16)));
        assert_eq!(sizes.ring, RING_SIZE);
    }
}

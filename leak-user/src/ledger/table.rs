//! A hash table from address to [`Block`], made for tens of millions of short-lived entries: at most 48 bytes for each,
//! slack included, at every moment; no long pause when it grows; and one cache miss, which can be prefetched, a look-up.
//!
//! An entry is 24 bytes. It holds the *mixed* address, a bijection of the address, so the hash is the key and is never
//! computed again. Entries are split by the mixed address's top bits into [`SEGMENTS`] segments that grow and shrink one
//! by one. Within a segment the home of a key is monotone in the key and entries are kept in order (linear probing with
//! ordered insertion; Amble and Knuth, "Ordered hash tables", 1974), which gives three things: a look-up that fails ends
//! as soon as one that succeeds, deletion shifts back and leaves no tombstones, and growing copies from front to back.
//!
//! Loads: a segment grows by 7/5 when it is 4/5 full (then it is 57 % full, 42 bytes a block) and is made smaller when it
//! is less than 13/25 full (46 bytes a block); while one is copied there are two of it, which is 1/64 of the table more.
//! So `capacity_bytes() <= 48 * len() + 32 KiB`, always. What an address means is left to [`super::heap`].

use std::hash::BuildHasher;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use memmap2::{Advice, MmapMut};

/// What is known of a live block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// Bytes asked for.
    pub size: u64,
    /// Index into the process's stacks, or [`super::stacks::DISTRUSTED`].
    pub stack: u32,
    /// Tick of birth ([`super::clock`]).
    pub birth: u32,
}

/// A place of the table. A zeroed one is empty.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Slot {
    /// The mixed address; zero is the mixed address zero, which no block has.
    key: u64,
    size: u64,
    stack: u32,
    birth: u32,
}
const _: () = assert!(size_of::<Slot>() == 24);

impl Slot {
    fn new(key: u64, block: Block) -> Self {
        Self { key, size: block.size, stack: block.stack, birth: block.birth }
    }

    fn block(self) -> Block {
        Block { size: self.size, stack: self.stack, birth: self.birth }
    }
}

const SEGMENT_BITS: u32 = 6;
/// How many parts grow on their own: the more, the shorter the pause and the less memory while one is copied.
const SEGMENTS: usize = 1 << SEGMENT_BITS;
const SMALLEST: usize = 8;

/// From this many bytes on a segment has pages of its own, huge ones where the kernel gives them, which go back to the
/// kernel when it is dropped; an allocator would keep them for a segment of just that size.
const OWN_PAGES: usize = 256 << 10;

/// Zeroed slots.
struct Slots {
    start: NonNull<Slot>,
    length: usize,
    owner: Owner,
}

enum Owner {
    Heap,
    Pages(#[expect(dead_code, reason = "held for its Drop")] MmapMut),
}

// SAFETY: the slots are plain data that only this value points to.
unsafe impl Send for Slots {}
// SAFETY: as above; a shared reference gives only shared access.
unsafe impl Sync for Slots {}

impl Slots {
    fn zeroed(length: usize) -> Self {
        let bytes = length * size_of::<Slot>();
        if bytes >= OWN_PAGES
            && let Ok(mut pages) = MmapMut::map_anon(bytes)
        {
            // A kernel without huge pages says no, and nothing is lost.
            let _ = pages.advise(Advice::HugePage);
            #[expect(clippy::cast_ptr_alignment, reason = "a page's alignment is any slot's")]
            let start = pages.as_mut_ptr().cast::<Slot>();
            if let Some(start) = NonNull::new(start) {
                return Self { start, length, owner: Owner::Pages(pages) };
            }
        }
        let slots = vec![Slot::default(); length].into_boxed_slice();
        let start = NonNull::from(Box::leak(slots)).cast::<Slot>();
        Self { start, length, owner: Owner::Heap }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Heap) {
            let slots = NonNull::slice_from_raw_parts(self.start, self.length);
            // SAFETY: `zeroed` leaked exactly this box, and this is the only place that takes it back.
            drop(unsafe { Box::from_raw(slots.as_ptr()) });
        }
    }
}

impl Deref for Slots {
    type Target = [Slot];

    #[inline]
    fn deref(&self) -> &[Slot] {
        // SAFETY: `start` points to `length` slots that live as long as `owner`, aligned for Slot (a box of them, or
        // whole pages), initialised (any bytes are a Slot), and borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Slots {
    #[inline]
    fn deref_mut(&mut self) -> &mut [Slot] {
        // SAFETY: as in `deref`; `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Clone for Slots {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.length);
        copy.copy_from_slice(self);
        copy
    }
}

/// One part of the table. Its slots are `homes` and a tail for what the last homes push on; the last slot stays empty.
#[derive(Clone)]
struct Segment {
    slots: Slots,
    homes: usize,
    used: usize,
}

impl Segment {
    fn new(homes: usize) -> Self {
        let tail = if homes == 0 { 0 } else { (homes / 16 + 4).min(32) };
        Self { slots: Slots::zeroed(homes + tail), homes, used: 0 }
    }

    /// Where the search for a key begins; falls as keys rise, because a search passes the keys that are greater.
    #[inline]
    fn home(&self, key: u64) -> usize {
        ((u128::from(!(key << SEGMENT_BITS)) * self.homes as u128) >> 64) as usize
    }

    /// Where `key` is, or would be inserted.
    #[inline]
    fn place(&self, key: u64) -> usize {
        let mut at = self.home(key);
        while self.slots.get(at).is_some_and(|slot| slot.key > key) {
            at += 1;
        }
        at
    }

    #[inline]
    fn find(&self, key: u64) -> Option<usize> {
        let at = self.place(key);
        self.slots.get(at).is_some_and(|slot| slot.key == key).then_some(at)
    }

    fn insert(&mut self, new: Slot) -> Option<Block> {
        loop {
            let at = self.place(new.key);
            if let Some(slot) = self.slots.get_mut(at)
                && slot.key == new.key
            {
                return Some(std::mem::replace(slot, new).block());
            }
            if (self.used + 1) * 5 <= self.homes * 4 {
                let empty = self.slots[at..].iter().position(|slot| slot.key == 0).map_or(usize::MAX, |n| at + n);
                if empty + 1 < self.slots.len() {
                    self.slots.copy_within(at..empty, at + 1);
                    self.slots[at] = new;
                    self.used += 1;
                    return None;
                }
            }
            self.resize(self.homes * 7 / 5);
        }
    }

    fn remove(&mut self, at: usize) -> Block {
        let block = self.slots[at].block();
        // All that follow and are not at home move up by one.
        let mut end = at + 1;
        while self.slots[end].key != 0 && self.home(self.slots[end].key) < end {
            end += 1;
        }
        self.slots.copy_within(at + 1..end, at);
        self.slots[end - 1] = Slot::default();
        self.used -= 1;
        if self.homes > SMALLEST && self.used * 25 < self.homes * 13 {
            // To 13/20 full: a fifth away from either limit.
            self.resize(self.used * 20 / 13);
        }
        block
    }

    /// Copies everything into a segment of about `homes` homes. In order, so both sides are walked from front to back.
    #[cold]
    #[inline(never)]
    fn resize(&mut self, homes: usize) {
        let mut homes = homes.max(SMALLEST);
        loop {
            let mut larger = Self::new(homes);
            let mut next = 0;
            let fits = self.slots.iter().filter(|slot| slot.key != 0).all(|slot| {
                next = larger.home(slot.key).max(next);
                // Not into the last slot, which ends every walk.
                let fits = next + 1 < larger.slots.len();
                if fits {
                    larger.slots[next] = *slot;
                    next += 1;
                }
                fits
            });
            if fits {
                larger.used = self.used;
                *self = larger;
                return;
            }
            // The last homes are crowded: as rare as a hash that sends a dozen keys to one home.
            homes += homes / 8 + 1;
        }
    }
}

/// Live blocks by address.
#[derive(Clone)]
pub(super) struct BlockTable {
    segments: Box<[Segment]>,
    len: usize,
    /// Odd; so that a traced program cannot choose addresses that collide.
    seed: u64,
}

impl BlockTable {
    pub fn new() -> Self {
        let seed = std::hash::RandomState::new().hash_one(0) | 1;
        Self { segments: (0..SEGMENTS).map(|_| Segment::new(0)).collect(), len: 0, seed }
    }

    /// A bijection whose top bits depend on every bit of the address, and that keeps zero.
    #[inline]
    fn mix(&self, addr: u64) -> u64 {
        let x = addr.wrapping_mul(self.seed);
        let x = (x ^ (x >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^ (x >> 29)
    }

    #[inline]
    fn segment_of(key: u64) -> usize {
        (key >> (64 - SEGMENT_BITS)) as usize
    }

    /// How many blocks there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Inserts a block and gives back the one that was there. The address must not be zero.
    #[inline]
    pub fn insert(&mut self, addr: u64, block: Block) -> Option<Block> {
        debug_assert_ne!(addr, 0, "zero is no block's address");
        let key = self.mix(addr);
        let old = self.segments[Self::segment_of(key)].insert(Slot::new(key, block));
        self.len += usize::from(old.is_none());
        old
    }

    #[inline]
    pub fn get(&self, addr: u64) -> Option<Block> {
        if addr == 0 {
            return None;
        }
        let key = self.mix(addr);
        let segment = &self.segments[Self::segment_of(key)];
        segment.find(key).map(|at| segment.slots[at].block())
    }

    #[inline]
    pub fn remove(&mut self, addr: u64) -> Option<Block> {
        if addr == 0 {
            return None;
        }
        let key = self.mix(addr);
        let segment = &mut self.segments[Self::segment_of(key)];
        let at = segment.find(key)?;
        self.len -= 1;
        Some(segment.remove(at))
    }

    /// Lets `change` rewrite every block, in no particular order.
    pub fn for_each_mut(&mut self, mut change: impl FnMut(&mut Block)) {
        for slot in self.segments.iter_mut().flat_map(|segment| segment.slots.iter_mut()).filter(|slot| slot.key != 0) {
            let mut block = slot.block();
            change(&mut block);
            *slot = Slot::new(slot.key, block);
        }
    }

    /// Asks the processor for the cache lines that a look-up of `addr` reads first. Changes nothing.
    #[inline]
    pub fn prefetch(&self, addr: u64) {
        let key = self.mix(addr);
        let segment = &self.segments[Self::segment_of(key)];
        let home = segment.slots.as_ptr().wrapping_add(segment.home(key));
        prefetch(home);
        // The search passes about two slots, and what follows is read to shift it.
        prefetch(home.wrapping_add(3));
    }

    /// Bytes that the table occupies, used or not.
    pub fn capacity_bytes(&self) -> usize {
        let slots: usize = self.segments.iter().map(|segment| segment.slots.len()).sum();
        slots * size_of::<Slot>() + size_of_val(&*self.segments)
    }

    /// Bytes of the largest segment: as much more is in use for the moment in which one is copied.
    #[cfg(test)]
    fn largest_segment_bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.slots.len()).max().unwrap_or(0) * size_of::<Slot>()
    }
}

/// Asks for the cache line at an address, which need not be valid.
#[inline]
pub(super) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and cannot fault, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn block(n: u64) -> Block {
        Block { size: n, stack: n as u32 & 0xff, birth: 0 }
    }

    fn bound(table: &BlockTable) -> usize {
        48 * table.len() + (32 << 10)
    }

    /// Each live block costs at most 48 bytes at every moment while a million of them come and go again, the copy that
    /// growing and shrinking make included, beside 32 KiB for the whole table.
    #[test]
    fn at_most_48_bytes_a_block() {
        let mut table = BlockTable::new();
        let mut worst = 0.0_f64;
        let addr = |n: u64| 0x5555_0000_0000 + 32 * n;
        let mut check = |table: &BlockTable| {
            let bytes = table.capacity_bytes() + table.largest_segment_bytes();
            assert!(table.capacity_bytes() <= bound(table), "{} for {}", table.capacity_bytes(), table.len());
            if table.len() >= 100_000 {
                worst = worst.max(bytes as f64 / table.len() as f64);
            }
        };
        for n in 0..1_000_000 {
            table.insert(addr(n), block(n));
            check(&table);
        }
        for n in 0..1_000_000 {
            assert_eq!(table.remove(addr(n)), Some(block(n)));
            check(&table);
        }
        assert!(worst <= 48.0, "{worst} bytes a block at the worst moment");
        println!("{worst:.2} bytes a block at the worst moment");
    }

    /// Memory is given back when the blocks are gone.
    #[test]
    fn shrinks_to_nearly_nothing() {
        let mut table = BlockTable::new();
        (1..=200_000).for_each(|n| assert!(table.insert(n * 16, block(n)).is_none()));
        assert!(table.capacity_bytes() > 4 << 20);
        (1..=200_000).for_each(|n| assert!(table.remove(n * 16).is_some()));
        assert_eq!(table.len(), 0);
        assert!(table.capacity_bytes() < 32 << 10, "{}", table.capacity_bytes());
    }

    /// Agrees with the standard library's map over long random runs that grow and shrink, at addresses with strides as
    /// allocators have them.
    #[test]
    fn agrees_with_a_hash_map() {
        for (seed, stride) in [(1, 16), (2, 4096), (3, 1 << 20), (4, 1), (5, 0x1_0000_0010)] {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut table, mut model) = (BlockTable::new(), HashMap::new());
            for step in 0..200_000_u64 {
                let insert = if (step / 40_000) % 2 == 0 { 0.7 } else { 0.3 };
                let addr = rng.random_range(1..30_000_u64) * stride;
                if rng.random_bool(insert) {
                    assert_eq!(table.insert(addr, block(step)), model.insert(addr, block(step)));
                } else {
                    assert_eq!(table.get(addr), model.get(&addr).copied());
                    assert_eq!(table.remove(addr), model.remove(&addr));
                }
                assert_eq!(table.len(), model.len());
            }
            assert!(table.capacity_bytes() <= bound(&table));
            let (mut bytes, copy) = (0, table.clone());
            table.for_each_mut(|block| bytes += block.size);
            assert_eq!(bytes, model.values().map(|block| block.size).sum::<u64>());
            assert!(model.iter().all(|(addr, block)| copy.get(*addr) == Some(*block)), "a copy has the same blocks");
        }
    }

    proptest! {
        /// Any addresses, extreme ones among them, are found again, and only those.
        #[test]
        fn finds_what_was_inserted(addrs in prop::collection::hash_set(1..=u64::MAX, 0..500), other in any::<u64>()) {
            let mut table = BlockTable::new();
            for addr in &addrs {
                prop_assert_eq!(table.insert(*addr, block(*addr)), None);
                table.prefetch(*addr);
            }
            prop_assert_eq!(table.get(other).is_some(), addrs.contains(&other));
            for addr in &addrs {
                prop_assert_eq!(table.remove(*addr), Some(block(*addr)));
                prop_assert_eq!(table.get(*addr), None);
            }
            prop_assert_eq!(table.len(), 0);
        }
    }
}

//! A hash table from address to [`Block`], made for tens of millions of short-lived entries: at most 48 bytes for each,
//! slack included, at every moment; no long pause when it grows; and one cache line, which can be prefetched, for nearly
//! every look-up, insertion and removal.
//!
//! A cache line is a [`Bucket`] of three entries. It holds the *mixed* address, a bijection of the address, so the hash is
//! the key and is never computed again. An entry that finds its bucket full goes to the next that is not, and every bucket
//! that it passes counts it, in one of eight counters that its key chooses: a search ends at the first bucket that no such
//! key passed, which is nearly always the first. So a removal only empties its place (and takes itself out of the
//! counts), where open addressing would shift what follows or leave tombstones. Random memory is what a large table
//! spends its time on: a line that was asked for in time costs some ten nanoseconds, one that was not a hundred.
//!
//! Entries are split by the mixed address's top bits into [`SEGMENTS`] segments that grow and shrink one by one. The
//! bucket of a key is monotone in the key, so that growing copies from front to back.
//!
//! Loads: a segment grows by 4/3 when there are two entries a bucket (32 bytes a block) and is made smaller when there are
//! less than 1.4 (46 bytes a block), unless it has no more than [`KEPT`]; while one is copied there are two of it, which is 1/64 of
//! the table more. So `capacity_bytes() <= 48 * len() + 32 KiB`, always, but for blocks of 4 GiB and more, whose sizes are kept aside: an
//! address space has room for at most 32 thousand of them. What an address means is left to [`super::heap`].

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use leak_common::sampling::Interval;
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
    /// What it was sampled with.
    pub interval: Interval,
}

/// Bits of a stack's index; above them is the code of the interval.
pub(super) const STACK_BITS: u32 = 24;

/// An index and the code of an interval, as a bucket has them.
#[inline]
fn packed(stack: u32, interval: Interval) -> u32 {
    debug_assert!(stack < 1 << STACK_BITS, "an index has 24 bits");
    stack | u32::from(interval.code()) << STACK_BITS
}

#[inline]
fn unpacked(stack: u32) -> (u32, Interval) {
    (stack & ((1 << STACK_BITS) - 1), Interval::from_code((stack >> STACK_BITS) as u8))
}

/// What a bucket has of a block.
#[derive(Clone, Copy)]
struct Entry {
    /// [`LARGE`] for sizes from there on, which are kept aside.
    size: u32,
    /// As [`packed`] makes it.
    stack: u32,
    birth: u32,
}

const LARGE: u32 = u32::MAX;

/// Entries in a bucket.
const WAYS: usize = 3;

/// From here on a counter of [`Bucket::passed`] no longer counts: it stays so until the segment is copied, and searches go
/// on where they need not.
const MANY: u32 = 15;

/// A cache line of the table. A zeroed one is empty.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Bucket {
    /// The mixed addresses; zero is the mixed address zero, which no block has, and stands for none.
    keys: [u64; WAYS],
    sizes: [u32; WAYS],
    stacks: [u32; WAYS],
    births: [u32; WAYS],
    /// How many entries found this bucket full and are in a later one: eight counters of four bits, each for an eighth of
    /// the keys.
    passed: u32,
}
const _: () = assert!(size_of::<Bucket>() == 64);

impl Bucket {
    /// Where a key is. Zero finds an empty place.
    #[inline]
    fn way_of(&self, key: u64) -> Option<usize> {
        // All are compared: which one it is cannot be predicted.
        let found = self.keys.iter().enumerate().fold(0_u32, |found, (way, it)| found | u32::from(*it == key) << way);
        (found != 0).then(|| (found.trailing_zeros() as usize).min(WAYS - 1))
    }

    /// Where in `passed` a key is counted.
    #[inline]
    fn shift(key: u64) -> u32 {
        (key & 7) as u32 * 4
    }

    /// Whether `key` may be in a later bucket.
    #[inline]
    fn is_passed_by(&self, key: u64) -> bool {
        (self.passed >> Self::shift(key)) & MANY != 0
    }

    /// `key` goes to a later bucket.
    #[inline]
    fn pass(&mut self, key: u64) {
        if (self.passed >> Self::shift(key)) & MANY < MANY {
            self.passed += 1 << Self::shift(key);
        }
    }

    /// `key`, which is in a later bucket, leaves it.
    #[inline]
    fn unpass(&mut self, key: u64) {
        if (self.passed >> Self::shift(key)) & MANY < MANY {
            self.passed -= 1 << Self::shift(key);
        }
    }

    #[inline]
    fn entry(&self, way: usize) -> Entry {
        Entry { size: self.sizes[way], stack: self.stacks[way], birth: self.births[way] }
    }

    #[inline]
    fn set(&mut self, way: usize, key: u64, entry: Entry) {
        self.keys[way] = key;
        self.sizes[way] = entry.size;
        self.stacks[way] = entry.stack;
        self.births[way] = entry.birth;
    }
}

const SEGMENT_BITS: u32 = 6;
/// How many parts grow on their own: the more, the shorter the pause and the less memory while one is copied.
const SEGMENTS: usize = 1 << SEGMENT_BITS;

/// A segment that once had so many buckets keeps them: where few blocks come and go, which is what most programs do most of the time,
/// copying segments of a handful took more than all the rest of the ledger. All segments together: less than 32 KiB.
const KEPT: usize = 7;
const _: () = assert!(SEGMENTS * (KEPT * size_of::<Bucket>() + size_of::<Segment>()) <= 32 << 10);

/// From this many bytes on a segment has pages of its own, huge ones where the kernel gives them, which go back to the
/// kernel when it is dropped; an allocator would keep them for a segment of just that size.
const OWN_PAGES: usize = 256 << 10;

/// Zeroed buckets.
struct Buckets {
    start: NonNull<Bucket>,
    length: usize,
    owner: Owner,
}

enum Owner {
    Heap,
    Pages(#[expect(dead_code, reason = "held for its Drop")] MmapMut),
}

// SAFETY: the buckets are plain data that only this value points to.
unsafe impl Send for Buckets {}
// SAFETY: as above; a shared reference gives only shared access.
unsafe impl Sync for Buckets {}

impl Buckets {
    fn zeroed(length: usize) -> Self {
        let bytes = length * size_of::<Bucket>();
        if bytes >= OWN_PAGES
            && let Ok(mut pages) = MmapMut::map_anon(bytes)
        {
            // A kernel without huge pages says no, and nothing is lost.
            let _ = pages.advise(Advice::HugePage);
            #[expect(clippy::cast_ptr_alignment, reason = "a page's alignment is any bucket's")]
            let start = pages.as_mut_ptr().cast::<Bucket>();
            if let Some(start) = NonNull::new(start) {
                return Self { start, length, owner: Owner::Pages(pages) };
            }
        }
        let buckets = vec![Bucket::default(); length].into_boxed_slice();
        let start = NonNull::from(Box::leak(buckets)).cast::<Bucket>();
        Self { start, length, owner: Owner::Heap }
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Heap) {
            let buckets = NonNull::slice_from_raw_parts(self.start, self.length);
            // SAFETY: `zeroed` leaked exactly this box, and this is the only place that takes it back.
            drop(unsafe { Box::from_raw(buckets.as_ptr()) });
        }
    }
}

impl Deref for Buckets {
    type Target = [Bucket];

    #[inline]
    fn deref(&self) -> &[Bucket] {
        // SAFETY: `start` points to `length` buckets that live as long as `owner`, aligned for Bucket (a box of them, or
        // whole pages), initialised (any bytes are a Bucket), and borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Buckets {
    #[inline]
    fn deref_mut(&mut self) -> &mut [Bucket] {
        // SAFETY: as in `deref`; `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Clone for Buckets {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.length);
        copy.copy_from_slice(self);
        copy
    }
}

/// One part of the table.
#[derive(Clone)]
struct Segment {
    buckets: Buckets,
    used: usize,
}

impl Segment {
    fn new(buckets: usize) -> Self {
        Self { buckets: Buckets::zeroed(buckets), used: 0 }
    }

    /// The bucket where the search for a key begins; rises as keys rise.
    #[inline]
    fn home(&self, key: u64) -> usize {
        ((u128::from(key << SEGMENT_BITS) * self.buckets.len() as u128) >> 64) as usize
    }

    /// The bucket after this one.
    #[inline]
    fn next(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() { 0 } else { at + 1 }
    }

    /// The bucket that `key` is in, and where there.
    #[inline]
    fn find(&self, key: u64) -> Option<(usize, usize)> {
        let mut at = self.home(key);
        // Once around at most: after removals there may be no bucket left that nothing passed.
        for _ in 0..self.buckets.len() {
            let bucket = &self.buckets[at];
            if let Some(way) = bucket.way_of(key) {
                return Some((at, way));
            }
            if !bucket.is_passed_by(key) {
                break;
            }
            at = self.next(at);
        }
        None
    }

    #[inline]
    fn insert(&mut self, key: u64, entry: Entry) -> Option<Entry> {
        if let Some((at, way)) = self.find(key) {
            let old = self.buckets[at].entry(way);
            self.buckets[at].set(way, key, entry);
            return Some(old);
        }
        if self.used >= 2 * self.buckets.len() {
            self.resize(self.buckets.len() * 4 / 3 + 1);
        }
        self.place(key, entry);
        None
    }

    /// Puts in what is not there. There must be room.
    #[inline]
    fn place(&mut self, key: u64, entry: Entry) {
        let mut at = self.home(key);
        loop {
            let bucket = &mut self.buckets[at];
            if let Some(way) = bucket.way_of(0) {
                bucket.set(way, key, entry);
                break;
            }
            bucket.pass(key);
            at = self.next(at);
        }
        self.used += 1;
    }

    #[inline]
    fn remove(&mut self, key: u64) -> Option<Entry> {
        let entry = self.take_out(key)?;
        if self.used * 5 < self.buckets.len() * 7 && self.buckets.len() > KEPT {
            // To 1.7 a bucket, well away from either limit.
            self.resize((self.used * 10 / 17 + 1).max(KEPT));
        }
        Some(entry)
    }

    #[inline]
    fn take_out(&mut self, key: u64) -> Option<Entry> {
        let (at, way) = self.find(key)?;
        let entry = self.buckets[at].entry(way);
        self.buckets[at].keys[way] = 0;
        let mut passed = self.home(key);
        while passed != at {
            self.buckets[passed].unpass(key);
            passed = self.next(passed);
        }
        self.used -= 1;
        Some(entry)
    }

    /// Copies everything into so many buckets. In order, so both sides are walked from front to back.
    #[cold]
    #[inline(never)]
    fn resize(&mut self, buckets: usize) {
        if buckets == self.buckets.len() {
            return;
        }
        let mut other = Self::new(buckets);
        for bucket in self.buckets.iter() {
            for way in (0..WAYS).filter(|way| bucket.keys[*way] != 0) {
                other.place(bucket.keys[way], bucket.entry(way));
            }
        }
        *self = other;
    }
}

/// Live blocks by address.
#[derive(Clone)]
pub(super) struct BlockTable {
    segments: Box<[Segment]>,
    len: usize,
    /// Odd; so that a traced program cannot choose addresses that collide.
    seed: u64,
    /// Sizes from [`LARGE`] on, by mixed address.
    large: HashMap<u64, u64>,
}

impl BlockTable {
    pub fn new() -> Self {
        let seed = std::hash::RandomState::new().hash_one(0) | 1;
        Self { segments: (0..SEGMENTS).map(|_| Segment::new(0)).collect(), len: 0, seed, large: HashMap::new() }
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

    /// The block that an entry stands for.
    #[inline]
    fn block(&self, key: u64, Entry { size, stack, birth }: Entry) -> Block {
        let size = if size == LARGE { self.large.get(&key).copied().unwrap_or_default() } else { u64::from(size) };
        let (stack, interval) = unpacked(stack);
        Block { size, stack, birth, interval }
    }

    /// The block that an entry stood for, which is no longer in the table.
    #[inline]
    fn take(&mut self, key: u64, entry: Entry) -> Block {
        let block = self.block(key, entry);
        if entry.size == LARGE {
            self.large.remove(&key);
        }
        block
    }

    /// Inserts a block and gives back the one that was there. The address must not be zero.
    #[inline]
    pub fn insert(&mut self, addr: u64, Block { size, stack, birth, interval }: Block) -> Option<Block> {
        debug_assert_ne!(addr, 0, "zero is no block's address");
        let key = self.mix(addr);
        let small = u32::try_from(size).unwrap_or(LARGE);
        let entry = Entry { size: small, stack: packed(stack, interval), birth };
        let old = self.segments[Self::segment_of(key)].insert(key, entry);
        let old = old.map(|old| self.take(key, old));
        if small == LARGE {
            self.large.insert(key, size);
        }
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
        segment.find(key).map(|(at, way)| self.block(key, segment.buckets[at].entry(way)))
    }

    #[inline]
    pub fn remove(&mut self, addr: u64) -> Option<Block> {
        if addr == 0 {
            return None;
        }
        let key = self.mix(addr);
        let entry = self.segments[Self::segment_of(key)].remove(key)?;
        self.len -= 1;
        Some(self.take(key, entry))
    }

    /// Lets `change` give every block another stack, in no particular order.
    pub fn for_each_stack(&mut self, mut change: impl FnMut(&Block, &mut u32)) {
        for segment in 0..SEGMENTS {
            for at in 0..self.segments[segment].buckets.len() {
                let bucket = self.segments[segment].buckets[at];
                for way in (0..WAYS).filter(|way| bucket.keys[*way] != 0) {
                    let block = self.block(bucket.keys[way], bucket.entry(way));
                    let mut stack = block.stack;
                    change(&block, &mut stack);
                    self.segments[segment].buckets[at].stacks[way] = packed(stack, block.interval);
                }
            }
        }
    }

    /// The addresses of all blocks, in no particular order.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let buckets = self.segments.iter().flat_map(|segment| segment.buckets.iter());
        buckets.flat_map(|bucket| bucket.keys).filter(|key| *key != 0).map(|key| self.unmix(key))
    }

    /// The address that [`Self::mix`] makes this of.
    fn unmix(&self, key: u64) -> u64 {
        // x ^ (x >> 29) is undone by repeating it for the bits that are not right yet.
        let x = key ^ (key >> 29) ^ (key >> 58);
        let x = x.wrapping_mul(inverse(0x9e37_79b9_7f4a_7c15));
        (x ^ (x >> 32)).wrapping_mul(inverse(self.seed))
    }

    /// Asks the processor for the cache line that a look-up of `addr` reads first. Changes nothing.
    #[inline]
    pub fn prefetch(&self, addr: u64) {
        let key = self.mix(addr);
        let segment = &self.segments[Self::segment_of(key)];
        prefetch(segment.buckets.as_ptr().wrapping_add(segment.home(key)));
    }

    /// To be called when what [`Self::prefetch`] asked for has come: asks for the next cache line too, if a look-up of
    /// `addr` goes on there. (Where an insertion may go on was not worth asking.)
    #[inline]
    pub fn prefetch_rest(&self, addr: u64) {
        let key = self.mix(addr);
        let segment = &self.segments[Self::segment_of(key)];
        let home = segment.home(key);
        if let Some(bucket) = segment.buckets.get(home) {
            // Without a branch, which would be a hard one to predict; to ask for what is here already costs nothing.
            prefetch(segment.buckets.as_ptr().wrapping_add(home + usize::from(bucket.is_passed_by(key))));
        }
    }

    /// Bytes that the table occupies, used or not.
    pub fn capacity_bytes(&self) -> usize {
        let buckets: usize = self.segments.iter().map(|segment| segment.buckets.len()).sum();
        buckets * size_of::<Bucket>() + size_of_val(&*self.segments) + self.large.capacity() * size_of::<(u64, u64)>()
    }

    /// Bytes of the largest segment: as much more is in use for the moment in which one is copied.
    #[cfg(test)]
    fn largest_segment_bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.buckets.len()).max().unwrap_or(0) * size_of::<Bucket>()
    }
}

/// The number whose product with an odd one is one, modulo 2^64: Newton's iteration doubles the bits that are right, of which
/// there are three at first (H. S. Warren, "Hacker's Delight", 2nd ed., 10-16).
fn inverse(odd: u64) -> u64 {
    (0..5).fold(odd, |x, _| x.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(x))))
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
        Block { size: n, stack: n as u32 & 0xff, birth: n as u32 >> 8, interval: Interval::from_code((n >> 3) as u8) }
    }

    /// Some are so large that their sizes are kept aside.
    fn block_of_any_size(n: u64) -> Block {
        let size = if n.is_multiple_of(7) { u64::from(LARGE) - 1 + n % 3 } else { n };
        Block { size, ..block(n) }
    }

    fn bound(table: &BlockTable) -> usize {
        48 * table.len() + (32 << 10) + table.large.capacity() * size_of::<(u64, u64)>()
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
        assert!(table.capacity_bytes() <= bound(&table), "{}", table.capacity_bytes());
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
                    let block = block_of_any_size(step);
                    assert_eq!(table.insert(addr, block), model.insert(addr, block));
                } else {
                    assert_eq!(table.get(addr), model.get(&addr).copied());
                    assert_eq!(table.remove(addr), model.remove(&addr));
                }
                assert_eq!(table.len(), model.len());
            }
            assert!(table.capacity_bytes() <= bound(&table));
            let large = model.values().filter(|block| block.size >= u64::from(LARGE)).count();
            assert_eq!(table.large.len(), large, "sizes are kept aside as long as their blocks live");
            let (mut bytes, copy) = (0, table.clone());
            table.for_each_stack(|block, stack| {
                bytes += block.size;
                *stack += 1000;
            });
            assert_eq!(bytes, model.values().map(|block| block.size).sum::<u64>());
            assert!(model.iter().all(|(addr, block)| copy.get(*addr) == Some(*block)), "a copy has the same blocks");
            let changed = |block: &Block| Block { stack: block.stack + 1000, ..*block };
            assert!(model.iter().all(|(addr, block)| table.get(*addr) == Some(changed(block))));
        }
    }

    /// Counters that are full stay so: nothing is lost when many more keys of one class pass a bucket than they can count,
    /// and then leave.
    #[test]
    fn counters_that_are_full_stay_so() {
        let mut segment = Segment { buckets: Buckets::zeroed(100), used: 0 };
        // All at home in the first bucket and in one class.
        let key = |n: u64| 8 * n + 1;
        let entry = |n: u64| Entry { size: n as u32, stack: 0, birth: 0 };
        let keys = 100;
        for n in 0..keys {
            assert!(segment.insert(key(n), entry(n)).is_none());
        }
        assert!(segment.find(key(keys)).is_none());
        for n in 0..keys - 1 {
            assert_eq!(segment.find(key(keys - 1)).map(|(at, way)| segment.buckets[at].sizes[way]), Some(99));
            assert_eq!(segment.take_out(key(n)).map(|entry| entry.size), Some(n as u32));
        }
        assert!(segment.buckets[0].is_passed_by(key(0)), "it no longer knows how many there were");
        assert_eq!(segment.remove(key(keys - 1)).map(|entry| entry.size), Some(99));
        assert_eq!((segment.used, segment.buckets.len()), (0, KEPT));
    }

    proptest! {
        /// Any addresses, extreme ones among them, are found again, and only those.
        #[test]
        fn finds_what_was_inserted(addrs in prop::collection::hash_set(1..=u64::MAX, 0..500), other in any::<u64>()) {
            let mut table = BlockTable::new();
            for addr in &addrs {
                prop_assert_eq!(table.insert(*addr, block(*addr)), None);
                table.prefetch(*addr);
                table.prefetch_rest(*addr);
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

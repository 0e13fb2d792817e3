//! The ring buffer that the programs write by themselves; its layout is described in [`leak_common::ring`].

use std::os::fd::AsFd as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use aya::maps::{Map, MapData};
use leak_common::ring::{self, LANES, MAX_RECORD, NUMBERS, Positions, stride};
use nix::sys::mman::ProtFlags;

use super::{BATCH, Mapping};
use crate::attach::Programs;

const HEADER: u64 = 8;

/// The consumer's end, with the maps that it reads.
pub struct Ring {
    consumer: Consumer,
    /// Keep the memory mapped, and the maps alive.
    _memory: [(Mapping, MapData); 2],
}

impl Ring {
    /// The ring of these programs, of so many lanes of `size` bytes; it can be taken once.
    pub fn take(programs: &mut Programs, lanes: u64, size: u64) -> Result<Self> {
        let Map::Array(data) = programs.take_map("RING")? else { bail!("RING is not an array") };
        let Map::Array(positions) = programs.take_map("POSITIONS")? else { bail!("POSITIONS is not an array") };
        let map = |map: &MapData, length| {
            Mapping::new(map.fd().as_fd(), length, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
        };
        let length = data.info()?.value_size() as usize;
        if !size.is_power_of_two() || lanes > LANES as u64 || length as u64 != lanes * stride(size) {
            bail!("the ring has {length} bytes, which is not {lanes} lanes of {size}");
        }
        let memory = map(&data, length)?;
        let words = map(&positions, size_of::<Positions>())?;
        // SAFETY: memory of these sizes, which is mapped as long as this lives and which only the programs write besides.
        let consumer = unsafe { Consumer::new(memory.start.cast(), words.start.cast(), lanes as usize, size) };
        Ok(Self { consumer, _memory: [(memory, data), (words, positions)] })
    }

    /// See [`super::Ring::is_crowded`].
    pub fn is_crowded(&self) -> bool {
        self.consumer.is_crowded()
    }

    /// See [`super::Ring::end`].
    pub fn end(&self) -> u64 {
        self.consumer.end()
    }

    /// See [`super::Ring::position`].
    pub fn position(&self) -> u64 {
        self.consumer.next
    }

    /// See [`super::Ring::drain`].
    pub fn drain(&mut self, end: u64, each: impl FnMut(&[&[u8]])) -> u64 {
        self.consumer.drain(end, each)
    }
}

/// One lane, from the consumer's side.
struct Lane {
    /// Where it begins in memory, in bytes.
    start: usize,
    /// Up to here everything was handed on, and is the programs' again.
    position: u64,
    /// Up to here records were found; they wait in the window for those before them.
    found: u64,
    /// One more than the highest number among them.
    numbers: u64,
}

/// Where a record lies that was found: its payload's place in memory and its length; zero: it was not found yet.
#[derive(Clone, Copy, Default)]
struct Found {
    at: u32,
    length: u32,
}

/// The consumer's side of all lanes.
///
/// Each lane is read in its own order, and what is found goes into the window at the place that its number says; from there records are
/// handed on without gaps.
struct Consumer {
    data: NonNull<u8>,
    positions: NonNull<Positions>,
    /// Bytes of a lane; a power of two.
    size: u64,
    lanes: Vec<Lane>,
    /// The number of the record that is to be handed on next.
    next: u64,
    /// By number, modulo its length, which is a power of two. It grows where a record is missing for so long that more have come after it.
    window: Vec<Found>,
}

// SAFETY: memory shared with the kernel, reached only through atomics and through `&mut self` methods.
unsafe impl Send for Consumer {}

impl Consumer {
    /// # Safety
    /// `data` must be the start of `lanes` times `stride(size)` zeroed bytes, aligned to eight, and `positions` as zeroed; both live as
    /// long as this, and nobody but the programs writes them.
    unsafe fn new(data: NonNull<u8>, positions: NonNull<Positions>, lanes: usize, size: u64) -> Self {
        let lane = |index: usize| Lane { start: index * stride(size) as usize, position: 0, found: 0, numbers: 0 };
        Self {
            data,
            positions,
            size,
            lanes: (0..lanes).map(lane).collect(),
            next: 0,
            window: vec![Found::default(); 2 * LANES * BATCH],
        }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: an aligned word of the structure, which lives as long as this.
        unsafe { self.positions.byte_add(offset).cast::<AtomicU64>().as_ref() }
    }

    fn word_of(&self, lane: usize, offset: usize) -> &AtomicU64 {
        self.word(std::mem::offset_of!(Positions, lanes) + lane * size_of::<ring::Lane>() + offset)
    }

    fn is_crowded(&self) -> bool {
        self.lanes.iter().enumerate().any(|(index, lane)| {
            let producer = self.word_of(index, std::mem::offset_of!(ring::Lane, producer)).load(Ordering::Acquire);
            producer.wrapping_sub(lane.position) > self.size / 2
        })
    }

    fn end(&self) -> u64 {
        self.word(std::mem::offset_of!(Positions, next)).load(Ordering::Acquire)
    }

    fn drain(&mut self, end: u64, mut each: impl FnMut(&[&[u8]])) -> u64 {
        let mut records = 0;
        let mut batch: Vec<&[u8]> = Vec::with_capacity(BATCH);
        while self.next < end {
            let mut any = false;
            for lane in 0..self.lanes.len() {
                any |= self.look(lane);
            }
            let mask = self.window.len() - 1;
            batch.clear();
            while self.next < end && batch.len() < BATCH {
                let found = std::mem::take(&mut self.window[self.next as usize & mask]);
                if found.length == 0 {
                    break;
                }
                // SAFETY: a complete record; the programs do not write there again before the lane's consumer position has passed it;
                // the slice does not leave this function.
                let payload = unsafe { self.data.byte_add(found.at as usize) };
                // SAFETY: as above.
                batch.push(unsafe { std::slice::from_raw_parts(payload.as_ptr(), found.length as usize) });
                self.next += 1;
            }
            if !batch.is_empty() {
                each(&batch);
                records += batch.len() as u64;
                for lane in 0..self.lanes.len() {
                    self.release(lane);
                }
            } else if !any {
                break;
            }
        }
        records
    }

    /// Finds some more records of a lane, if there are any.
    fn look(&mut self, index: usize) -> bool {
        let before = self.lanes[index].found;
        // No more than the window has room for, as a rule.
        for _ in 0..BATCH {
            let Lane { start, found, .. } = self.lanes[index];
            let at = start + (found & (self.size - 1)) as usize;
            let Some((low, length)) = self.record_at(at) else { break };
            // Numbers in headers are cut off; this one is about as high as the next.
            let ahead = low.wrapping_sub(self.next) & NUMBERS;
            self.make_room(ahead);
            let number = self.next + ahead;
            let slot = number as usize & (self.window.len() - 1);
            self.window[slot] = Found { at: at as u32 + HEADER as u32, length: length as u32 };
            let lane = &mut self.lanes[index];
            lane.found += HEADER + length;
            lane.numbers = lane.numbers.max(number + 1);
        }
        self.lanes[index].found != before
    }

    /// Number and length of the record at a place in memory; nothing where it is still being written.
    fn record_at(&self, at: usize) -> Option<(u64, u64)> {
        // SAFETY: a place within a lane, aligned to eight bytes as all places are.
        let header = unsafe { self.data.byte_add(at).cast::<AtomicU64>().as_ref() }.load(Ordering::Acquire);
        let (number, length) = ring::parse(header)?;
        // The programs write no other header; not to be read past the end if something did.
        (length != 0 && length <= MAX_RECORD as u64 - HEADER && length.is_multiple_of(8)).then_some((number, length))
    }

    /// Sees to it that the window reaches so far beyond the next number.
    fn make_room(&mut self, ahead: u64) {
        let length = self.window.len();
        if ahead < length as u64 {
            return;
        }
        // Records take 16 bytes at least, so all lanes together hold fewer than this.
        let most = self.lanes.len() as u64 * stride(self.size) / 16;
        let wanted = (ahead + 1).min(most).next_power_of_two() as usize;
        let mut larger = vec![Found::default(); wanted.max(length)];
        for number in self.next..self.next + length as u64 {
            larger[number as usize & (wanted.max(length) - 1)] = self.window[number as usize & (length - 1)];
        }
        self.window = larger;
    }

    /// Gives what was handed on back to the programs.
    fn release(&mut self, index: usize) {
        let Lane { start, position, found, numbers } = self.lanes[index];
        let mut to = position;
        if numbers <= self.next {
            to = found;
        } else {
            // Some still wait: up to the first of those.
            while to != found {
                let Some((low, length)) = self.record_at(start + (to & (self.size - 1)) as usize) else { break };
                if low.wrapping_sub(self.next) & NUMBERS <= NUMBERS / 2 {
                    break;
                }
                to += HEADER + length;
            }
        }
        if to == position {
            return;
        }
        self.clear(start, position, to);
        self.lanes[index].position = to;
        // Only now: until then the programs leave the records alone.
        self.word_of(index, std::mem::offset_of!(ring::Lane, consumer)).store(to, Ordering::Release);
    }

    /// Sets what lies between two positions of a lane to zero, so that whatever is written there next is not taken for complete too
    /// early. All at once: record by record took a good part of the time that taking them does.
    fn clear(&self, start: usize, from: u64, to: u64) {
        let at = (from & (self.size - 1)) as usize;
        let end = at + (to - from) as usize;
        let size = self.size as usize;
        // SAFETY: whole records that were taken, which nobody reads or writes now. What begins near the lane's end runs on behind it;
        // the rest of that, and the bytes at the front that are left out for it, hold nothing.
        unsafe {
            self.data.byte_add(start + at).write_bytes(0, end.min(size + MAX_RECORD) - at);
            self.data.byte_add(start).write_bytes(0, end.saturating_sub(size));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    /// Memory as the maps have it, and what the programs do to it.
    struct Memory {
        data: Vec<u64>,
        positions: Vec<u64>,
        lanes: usize,
        size: u64,
    }

    impl Memory {
        fn new(lanes: usize, size: u64) -> Self {
            let data = vec![0; lanes * stride(size) as usize / 8];
            Self { data, positions: vec![0; size_of::<Positions>() / 8], lanes, size }
        }

        fn consumer(&mut self) -> Consumer {
            let data = NonNull::new(self.data.as_mut_ptr()).unwrap().cast();
            let positions = NonNull::new(self.positions.as_mut_ptr()).unwrap().cast();
            // SAFETY: zeroed, as large as they must be, and alive in the tests for as long.
            unsafe { Consumer::new(data, positions, self.lanes, self.size) }
        }
    }

    /// What one program does, step by step, by the consumer's own pointers.
    #[derive(Clone, Copy)]
    struct Producer {
        data: NonNull<u8>,
        positions: NonNull<Positions>,
        size: u64,
    }

    // SAFETY: it writes where no other does, and by atomics.
    unsafe impl Send for Producer {}

    /// A place that is taken, and its number once that is.
    struct Begun {
        at: usize,
        length: u64,
        number: u64,
    }

    impl Producer {
        fn of(consumer: &Consumer) -> Self {
            Self { data: consumer.data, positions: consumer.positions, size: consumer.size }
        }

        fn word(&self, offset: usize) -> &AtomicU64 {
            // SAFETY: a word of the structure.
            unsafe { self.positions.byte_add(offset).cast::<AtomicU64>().as_ref() }
        }

        fn place(&self, lane: usize, length: u64, limit: u64) -> Option<Begun> {
            let base = std::mem::offset_of!(Positions, lanes) + lane * size_of::<ring::Lane>();
            let producer = self.word(base + std::mem::offset_of!(ring::Lane, producer));
            let consumer = self.word(base + std::mem::offset_of!(ring::Lane, consumer));
            if producer.load(Ordering::Acquire) - consumer.load(Ordering::Acquire) > limit {
                return None;
            }
            let position = producer.fetch_add(HEADER + length, Ordering::AcqRel);
            let at = lane * stride(self.size) as usize + (position & (self.size - 1)) as usize;
            Some(Begun { at, length, number: 0 })
        }

        fn number(&self, begun: &mut Begun) {
            begun.number = self.word(std::mem::offset_of!(Positions, next)).fetch_add(1, Ordering::AcqRel);
        }

        /// A record whose words are all its number.
        fn finish(&self, begun: &Begun) {
            for word in 1..=begun.length / 8 {
                // SAFETY: within the place that was taken.
                unsafe {
                    self.data.byte_add(begun.at + 8 * word as usize).cast::<u64>().write(begun.number);
                }
            }
            // SAFETY: the place's header.
            let header = unsafe { self.data.byte_add(begun.at).cast::<AtomicU64>().as_ref() };
            header.store(ring::header(begun.number, begun.length), Ordering::Release);
        }
    }

    /// Drains everything there is, and checks that numbers follow each other and contents are whole.
    fn take(consumer: &mut Consumer, expected: &mut u64) {
        let end = consumer.end();
        consumer.drain(end, |batch| {
            for record in batch {
                let words: Vec<u64> =
                    record.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
                assert!(words.iter().all(|word| word == expected), "{words:?} where {expected} is due");
                *expected += 1;
            }
        });
    }

    /// Threads that write as fast as they can, of different lengths, over many rounds of lanes that are small: all records come, in
    /// the order of their numbers, and whole.
    #[test]
    fn threads_side_by_side() {
        const EACH: u64 = 20_000;
        let mut memory = Memory::new(2, 64 << 10);
        let mut consumer = memory.consumer();
        let producer = Producer::of(&consumer);
        let stop = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            for thread in 0..3_usize {
                let stop = Arc::clone(&stop);
                scope.spawn(move || {
                    let producer = producer;
                    for n in 0..EACH {
                        let length = 8 * (1 + (n * 7 + thread as u64) % 100);
                        let mut begun = loop {
                            if let Some(begun) = producer.place(thread % 2, length, (64 << 10) - 8192) {
                                break begun;
                            }
                            if stop.load(Ordering::Relaxed) {
                                return;
                            }
                            std::thread::yield_now();
                        };
                        producer.number(&mut begun);
                        producer.finish(&begun);
                    }
                });
            }
            let mut expected = 0;
            let start = std::time::Instant::now();
            while expected < 3 * EACH && start.elapsed().as_secs() < 60 {
                take(&mut consumer, &mut expected);
                std::thread::yield_now();
            }
            // Or the threads would wait for room for ever.
            stop.store(true, Ordering::Relaxed);
            assert_eq!(expected, 3 * EACH);
        });
    }

    /// A record that is begun and not finished holds back those after it, however many, and no longer.
    #[test]
    fn an_unfinished_record_is_waited_for() {
        let mut memory = Memory::new(2, 1 << 20);
        let mut consumer = memory.consumer();
        let producer = Producer::of(&consumer);
        let write = |lane| {
            let mut begun = producer.place(lane, 16, u64::MAX).unwrap();
            producer.number(&mut begun);
            begun
        };
        let mut expected = 0;
        producer.finish(&write(0));
        let late = write(0);
        for n in 0..10_000 {
            producer.finish(&write(n % 2));
        }
        take(&mut consumer, &mut expected);
        assert_eq!(expected, 1, "the second is not there");
        producer.finish(&late);
        take(&mut consumer, &mut expected);
        assert_eq!(expected, 10_002);
        assert_eq!(consumer.position_of(0) + consumer.position_of(1), 10_002 * 24, "all room is given back");
    }

    impl Consumer {
        fn position_of(&self, lane: usize) -> u64 {
            self.word_of(lane, std::mem::offset_of!(ring::Lane, consumer)).load(Ordering::Relaxed)
        }
    }

    proptest! {
        /// Whatever steps of whatever records follow each other (a program may be interrupted between its place and its number, and
        /// before it is finished), records come in the order of their numbers and whole, and all of them once they are finished.
        #[test]
        fn any_order_of_steps(steps in prop::collection::vec((0..3_u8, any::<u8>(), 1..40_u64), 0..600)) {
            let mut memory = Memory::new(2, 8 << 10);
            let mut consumer = memory.consumer();
            let producer = Producer::of(&consumer);
            let (mut placed, mut numbered) = (Vec::new(), Vec::new());
            let (mut expected, mut begun) = (0, 0);
            for (step, which, words) in steps {
                let which = usize::from(which);
                match step {
                    0 => if let Some(place) = producer.place(which % 2, words * 8, 4 << 10) {
                        placed.push(place);
                        begun += 1;
                    },
                    1 if !placed.is_empty() => {
                        let mut place = placed.swap_remove(which % placed.len());
                        producer.number(&mut place);
                        numbered.push(place);
                    }
                    2 if !numbered.is_empty() => producer.finish(&numbered.swap_remove(which % numbered.len())),
                    _ => take(&mut consumer, &mut expected),
                }
                if which.is_multiple_of(5) {
                    take(&mut consumer, &mut expected);
                }
            }
            for mut place in placed {
                producer.number(&mut place);
                numbered.push(place);
            }
            for place in &numbered {
                producer.finish(place);
            }
            take(&mut consumer, &mut expected);
            prop_assert_eq!(expected, begun);
            prop_assert_eq!(consumer.end(), begun);
            prop_assert!(memory.data.iter().all(|word| *word == 0), "what was taken is cleared");
        }
    }
}

//! The call stacks of one process: an index for each, the addresses that the kernel side sent once, and what the stack's
//! blocks did over time.
//!
//! The kernel side gives all stacks new ids whenever code may have moved. A record that repeats the addresses of an
//! earlier one is therefore the same stack under another name, unless an executable mapping was made over one of its
//! addresses meanwhile ([`Stacks::code_mapped`]): then it is different code, and a different stack.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use super::clock::{Tick, window_of};
use super::history::{History, Window};
use super::sampled::Weight;
use super::table::{Block, STACK_BITS};
use crate::decode::{Frames, StackEnd, StackId};

/// Stands for a stack in a block that no history counts: its free may be among those that were lost.
pub(super) const DISTRUSTED: u32 = (1 << STACK_BITS) - 1;

/// What a stack's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    /// Blocks of an allocator.
    Heap,
    /// Pages that the program mapped itself, or got by moving the program break.
    Mmap,
}

/// The kinds of bytes that are counted apart under one stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Heap,
    Anonymous,
    File,
}

const CLASSES: usize = 3;

/// One call stack of a process, for one kind of resource.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// The hash that the kernel side gave it, the first one where it had several.
    pub id: StackId,
    pub resource: Resource,
    /// Whether the ranges are file mappings; never for the heap.
    pub file: bool,
    /// The allocator function, one of [`leak_common::op`]; zero as long as the stack's record is missing.
    pub op: u8,
    /// Return addresses, innermost first; none as long as the stack's record is missing.
    pub frames: &'a [u64],
    /// How the frames end; [`StackEnd::Unknown`] as long as the stack's record is missing.
    pub end: StackEnd,
    /// Whether some frames were found by frame pointers for want of a table.
    pub by_frame_pointers: bool,
    pub history: &'a History,
    /// Bytes that were taken out of the history because their frees may have been lost ([`super::Ledger::distrust`]).
    pub doubted_bytes: u64,
}

/// Bytes and blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    pub bytes: u64,
    pub count: u64,
}

/// What the kernel side sent of a stack, and where its bytes are counted.
#[derive(Clone)]
struct Record {
    /// The first id, which the stack is reported by.
    id: StackId,
    /// The id in use.
    current: StackId,
    sent: Option<Sent>,
    /// Index into `Stacks::counted`, by class.
    counted: [Option<u32>; CLASSES],
}

#[derive(Clone, PartialEq, Eq)]
struct Sent {
    op: u8,
    end: StackEnd,
    by_frame_pointers: bool,
    frames: Box<[u64]>,
}

impl Sent {
    fn digest(&self) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        (self.op, self.end.is_complete(), &self.frames).hash(&mut hasher);
        hasher.finish()
    }
}

/// A stack as its record has it.
#[derive(Clone, Copy)]
pub(super) struct SentStack<'a> {
    pub op: u8,
    pub end: StackEnd,
    pub by_frame_pointers: bool,
    pub frames: Frames<'a>,
}

#[derive(Clone)]
struct Counted {
    record: u32,
    class: Class,
    history: History,
    doubted_bytes: u64,
}

/// A [`StackId`] is a hash already; this spreads it to the bits that the map looks at.
#[derive(Clone, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

type ById<V> = HashMap<StackId, V, BuildHasherDefault<IdHasher>>;

/// The stacks of a process.
#[derive(Clone, Default)]
pub(super) struct Stacks {
    ids: ById<u32>,
    records: Vec<Record>,
    /// By [`Sent::digest`].
    by_frames: ById<u32>,
    counted: Vec<Counted>,
    missing: u64,
    distrusted: Total,
}

impl Stacks {
    /// The index under which bytes of `class` that stack `id` allocates are counted; `None` where that would be one
    /// stack more than there is `room` for. `now` is the window that the history begins with.
    #[inline]
    pub fn index(&mut self, id: StackId, class: Class, now: Window, room: &mut Room) -> Option<u32> {
        if let Some(record) = self.ids.get(&id)
            && let Some(index) = self.records[*record as usize].counted[class as usize]
        {
            return Some(index);
        }
        self.add_index(id, class, now, room)
    }

    #[cold]
    fn add_index(&mut self, id: StackId, class: Class, now: Window, room: &mut Room) -> Option<u32> {
        if !room.histories.has() {
            return None;
        }
        let record = match self.ids.get(&id) {
            Some(record) => *record,
            None => self.add_record(id, None, room)?,
        };
        room.histories.used += 1;
        let index = self.counted.len() as u32;
        self.counted.push(Counted { record, class, history: History::new(now), doubted_bytes: 0 });
        self.records[record as usize].counted[class as usize] = Some(index);
        Some(index)
    }

    fn add_record(&mut self, id: StackId, sent: Option<Sent>, room: &mut Room) -> Option<u32> {
        if !room.records.has() {
            return None;
        }
        room.records.used += 1;
        let record = self.records.len() as u32;
        self.missing += u64::from(sent.is_none());
        if let Some(sent) = &sent {
            self.by_frames.insert(sent.digest(), record);
        }
        self.records.push(Record { id, current: id, sent, counted: [None; CLASSES] });
        self.name(id, record);
        Some(record)
    }

    /// Lets `id` name a record. Names that are no longer given out are dropped when they become many.
    fn name(&mut self, id: StackId, record: u32) {
        self.records[record as usize].current = id;
        self.ids.insert(id, record);
        if self.ids.len() > 1024 + 4 * self.records.len() {
            let records = &self.records;
            self.ids.retain(|id, record| records[*record as usize].current == *id);
        }
    }

    /// The kernel side sent a stack. False where there is no room for it.
    pub fn sent(&mut self, id: StackId, stack: SentStack<'_>, room: &mut Room) -> bool {
        if let Some(record) = self.ids.get(&id)
            && self.records[*record as usize].sent.is_some()
        {
            // Sent again, as it is when its hash was displaced from the kernel side's table.
            return true;
        }
        let SentStack { op, end, by_frame_pointers, frames } = stack;
        let sent = Sent { op, end, by_frame_pointers, frames: frames.iter().collect() };
        if let Some(record) = self.ids.get(&id).copied() {
            self.missing -= 1;
            self.by_frames.entry(sent.digest()).or_insert(record);
            self.records[record as usize].sent = Some(sent);
            return true;
        }
        if let Some(record) = self.by_frames.get(&sent.digest()).copied()
            && self.records[record as usize].sent.as_ref() == Some(&sent)
        {
            self.name(id, record);
            return true;
        }
        self.add_record(id, Some(sent), room).is_some()
    }

    /// Code was mapped over these addresses: a stack sent from now on that has one of them is not the one that was sent
    /// before.
    pub fn code_mapped(&mut self, addr: u64, size: u64) {
        let records = &self.records;
        self.by_frames.retain(|_, record| {
            let sent = records[*record as usize].sent.as_ref();
            sent.is_some_and(|sent| !sent.frames.iter().any(|frame| frame.wrapping_sub(addr) < size))
        });
    }

    /// A block, or a range, is live from now on. `index` may be [`DISTRUSTED`].
    #[inline]
    pub fn born(&mut self, index: u32, now: Window, birth: Tick, bytes: u64) {
        if let Some(counted) = self.counted.get_mut(index as usize) {
            counted.history.born(now, window_of(birth), bytes);
        } else {
            self.distrusted.count += 1;
            self.distrusted.bytes = self.distrusted.bytes.saturating_add(bytes);
        }
    }

    /// A block, or a range, is live no more.
    #[inline]
    pub fn died(&mut self, index: u32, now: Window, birth: Tick, bytes: u64) {
        if let Some(counted) = self.counted.get_mut(index as usize) {
            counted.history.died(now, window_of(birth), bytes);
        } else {
            self.distrusted.count = self.distrusted.count.saturating_sub(1);
            self.distrusted.bytes = self.distrusted.bytes.saturating_sub(bytes);
        }
    }

    /// A heap block is live from now on.
    #[inline]
    pub fn block_born(&mut self, now: Window, block: &Block) {
        if block.interval.is_exact() {
            self.born(block.stack, now, block.birth, block.size);
        } else {
            self.sampled_born(now, block);
        }
    }

    /// A heap block is live no more.
    #[inline]
    pub fn block_died(&mut self, now: Window, block: &Block) {
        if block.interval.is_exact() {
            self.died(block.stack, now, block.birth, block.size);
        } else {
            self.sampled_died(now, block);
        }
    }

    #[inline(never)]
    fn sampled_born(&mut self, now: Window, block: &Block) {
        let weight = Weight::of(block.interval, block.size);
        if let Some(counted) = self.counted.get_mut(block.stack as usize) {
            counted.history.sampled_born(now, window_of(block.birth), &weight);
        } else {
            self.distrusted.count += weight.count.round() as u64;
            self.distrusted.bytes = self.distrusted.bytes.saturating_add(weight.whole_bytes());
        }
    }

    #[inline(never)]
    fn sampled_died(&mut self, now: Window, block: &Block) {
        let weight = Weight::of(block.interval, block.size);
        if let Some(counted) = self.counted.get_mut(block.stack as usize) {
            counted.history.sampled_died(now, window_of(block.birth), &weight);
        } else {
            self.distrusted.count = self.distrusted.count.saturating_sub(weight.count.round() as u64);
            self.distrusted.bytes = self.distrusted.bytes.saturating_sub(weight.whole_bytes());
        }
    }

    /// Moves a live heap block out of its history, for good.
    pub fn distrust_block(&mut self, index: &mut u32, now: Window, block: &Block) {
        if *index != DISTRUSTED {
            self.block_died(now, block);
            self.doubt(*index, block.size);
            *index = DISTRUSTED;
            self.block_born(now, &Block { stack: DISTRUSTED, ..*block });
        }
    }

    /// Moves a live range out of its history, for good.
    pub fn distrust(&mut self, index: &mut u32, now: Window, birth: Tick, bytes: u64) {
        if *index != DISTRUSTED {
            self.died(*index, now, birth, bytes);
            self.doubt(*index, bytes);
            *index = DISTRUSTED;
            self.born(DISTRUSTED, now, birth, bytes);
        }
    }

    /// The process is a child that was forked in window `now`.
    pub fn begin_anew(&mut self, now: Window) {
        self.counted.iter_mut().for_each(|counted| counted.history = counted.history.forked(now));
    }

    /// Notes that so many bytes were taken out of a history, as they are: not what a sample stands for.
    fn doubt(&mut self, index: u32, bytes: u64) {
        if let Some(counted) = self.counted.get_mut(index as usize) {
            counted.doubted_bytes = counted.doubted_bytes.saturating_add(bytes);
        }
    }

    pub fn roll(&mut self, now: Window) {
        self.counted.iter_mut().for_each(|counted| counted.history.roll(now));
    }

    /// Live bytes and blocks that no history counts.
    pub fn distrusted(&self) -> Total {
        self.distrusted
    }

    /// How many stacks were named whose records have not come.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    pub fn iter(&self) -> impl Iterator<Item = Stack<'_>> {
        self.counted.iter().map(|counted| {
            let record = &self.records[counted.record as usize];
            let sent = record.sent.as_ref();
            Stack {
                id: record.id,
                resource: if counted.class == Class::Heap { Resource::Heap } else { Resource::Mmap },
                file: counted.class == Class::File,
                op: sent.map_or(0, |sent| sent.op),
                frames: sent.map_or(&[], |sent| &sent.frames),
                end: sent.map_or(StackEnd::Unknown, |sent| sent.end),
                by_frame_pointers: sent.is_some_and(|sent| sent.by_frame_pointers),
                history: &counted.history,
                doubted_bytes: counted.doubted_bytes,
            }
        })
    }

    /// Takes what a dropped process used out of the count.
    pub fn leave(&self, room: &mut Room) {
        room.records.used -= self.records.len();
        room.histories.used -= self.counted.len();
    }

    /// Adds what a copied process uses to the count.
    pub fn enter(&self, room: &mut Room) {
        room.records.used += self.records.len();
        room.histories.used += self.counted.len();
    }
}

/// How many there are of something that is capped, in all processes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cap {
    pub used: usize,
    pub most: usize,
}

impl Cap {
    pub fn new(most: usize) -> Self {
        Self { used: 0, most }
    }

    /// Whether there is room for one more.
    #[inline]
    pub fn has(&self) -> bool {
        self.used < self.most
    }
}

/// The caps of the whole ledger.
#[derive(Clone, Debug)]
pub(super) struct Room {
    /// Stacks' addresses.
    pub records: Cap,
    /// Stacks' histories.
    pub histories: Cap,
    /// Heap blocks, those in the hands of realloc included.
    pub blocks: Cap,
    /// Page ranges.
    pub ranges: Cap,
}

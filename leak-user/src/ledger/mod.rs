//! What is live in each traced process, and what each of its call stacks did over time.
//!
//! Plain functions from [`Event`]s to state: no I/O, no clock (every event brings its time) and no symbols, so that a
//! recorded stream replays to the same state. A process is known from [`Ledger::add_process`] until
//! [`Ledger::remove_process`]; it is named by tgid, and told from a later process of the same tgid by its start time.
//!
//! The parts: [`table`] finds live blocks by address, [`heap`] and [`ranges`] know what the calls mean for them,
//! [`stacks`] names call stacks and counts for each, in a [`history::History`], what was born and what died.
//! What the counts mean is left to [`crate::detect`].
//!
//! Memory is bounded by [`Config`]; whatever a cap, or a lost record, keeps out of the ledger has a counter in
//! [`Counters`]. No loss makes a leak: what may have been freed unseen is counted as freed, or taken out of verdicts
//! ([`Ledger::distrust`]).

mod clock;
mod heap;
pub mod history;
#[cfg(test)]
mod model;
mod process;
mod ranges;
mod sampled;
mod stacks;
mod table;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod unbiased;

use std::collections::HashMap;

use clock::{Clock, Tick, window_of};
use heap::{Allocated, Resized};
use history::Window;
pub use process::ProcessLedger;
use ranges::Remapped;
#[cfg(test)]
pub(crate) use sampled::Weight;
pub use sampled::{Sampled, SampledTotals};
use stacks::{Cap, Class, DISTRUSTED, Room, SentStack, Stacks};
pub use stacks::{Resource, Stack, Total};

use crate::decode::{Event, StackId, What, decode};

/// How much the ledger may hold, in all processes together. At each cap what is new is left out and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Call stacks. One takes [`size_of::<History>`](history::History) and eight bytes a frame.
    pub max_stacks: usize,
    /// Live heap blocks. One takes at most 48 bytes.
    pub max_live: usize,
    /// Live page ranges. One takes about 70 bytes.
    pub max_ranges: usize,
    /// Bytes of a page, which lengths of ranges are rounded up to.
    pub page_size: u64,
}

impl Config {
    /// What fits into so many bytes: most of it goes to live blocks, an eighth to stacks, and a part is left for what else the
    /// program takes. No more than the default.
    pub fn within(bytes: u64, page_size: u64) -> Self {
        /// A stack with 127 frames, and its places in the tables.
        const STACK: u64 = size_of::<history::History>() as u64 + 127 * 8 + 256;
        const BLOCK: u64 = 48;
        const RANGE: u64 = 80;
        let usual = Self::default();
        let count = |share: u64, each: u64, most: usize| usize::try_from(share / each).unwrap_or(most).min(most);
        Self {
            max_stacks: count(bytes / 8, STACK, usual.max_stacks),
            max_live: count(bytes / 2, BLOCK, usual.max_live),
            max_ranges: count(bytes / 32, RANGE, usual.max_ranges),
            page_size,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self { max_stacks: 32 << 10, max_live: 32 << 20, max_ranges: 1 << 20, page_size: 4096 }
    }
}

/// What the ledger could not know or keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Heap blocks that came to be: by malloc and the like, by realloc, and as copies in forked children.
    pub blocks: u64,
    /// Of these, those that are live no more, for whatever reason. With those that are live ([`Ledger::live_blocks`]) and
    /// [`Self::not_kept`] they are all.
    pub ended: u64,
    /// Of these, those that were left out because of a cap of [`Config`].
    pub not_kept: u64,
    /// Events of processes that were not added, or were removed.
    pub unknown_process: u64,
    /// Frees, and reallocs to zero bytes, of addresses where nothing is live: most are of blocks older than the trace.
    pub free_of_unknown: u64,
    /// Addresses handed out while a block was live there, whose free was therefore missed.
    pub replaced: u64,
    /// Reallocs and mremaps whose end never came.
    pub pending_replaced: u64,
    /// Unmappings that could not be put back should they have failed: too many threads.
    pub pending_forgotten: u64,
    /// Frees from the overflow map that ended a live block.
    pub missed_free_applied: u64,
    /// Frees from the overflow map of blocks that were not there, or had been born since.
    pub missed_free_stale: u64,
    /// Allocations left out because of [`Config::max_stacks`].
    pub stacks_capped: u64,
    /// Blocks and ranges left out because of [`Config::max_live`] and [`Config::max_ranges`].
    pub live_capped: u64,
    /// Stacks that allocations name but whose records have not come. Falls when one comes after all.
    pub stacks_missing: u64,
    /// Sampled blocks that were taken out of verdicts because the kernel side did not know of them any more, so that their free would
    /// not have been told.
    pub unfollowed: u64,
    /// How often the live set of a process, or all of them ([`Ledger::distrust`]), became doubtful.
    pub distrusts: u64,
    /// Live bytes, and blocks and ranges, that are out of verdicts since. Falls as they are freed.
    pub distrusted: Total,
}

/// What one event is applied with.
struct Context<'a> {
    /// The event's tick.
    tick: Tick,
    /// The latest window of any event.
    now: Window,
    /// What is allocated now is live at a time that is no longer trusted.
    distrusted: bool,
    page_size: u64,
    room: &'a mut Room,
    counters: &'a mut Counters,
}

impl Context<'_> {
    /// The index that bytes of this stack are counted under; `None`, counted, where there is no room.
    #[inline]
    fn stack_index(&mut self, stacks: &mut Stacks, id: StackId, class: Class) -> Option<u32> {
        if self.distrusted {
            return Some(DISTRUSTED);
        }
        let index = stacks.index(id, class, self.now, self.room);
        self.counters.stacks_capped += u64::from(index.is_none());
        index
    }

    fn page_up(&self, addr: u64) -> u64 {
        addr.checked_next_multiple_of(self.page_size).unwrap_or(u64::MAX)
    }

    /// The end of a range of `size` bytes, which the kernel rounds up to pages.
    fn range_end(&self, start: u64, size: u64) -> u64 {
        start.saturating_add(self.page_up(size))
    }
}

/// Live memory of every traced process.
pub struct Ledger {
    processes: Vec<ProcessLedger>,
    /// Places in `processes`.
    by_tgid: HashMap<u32, usize>,
    /// Whose event was the last, and its place: most have the same.
    last: Option<(u32, usize)>,
    clock: Clock,
    /// What was allocated in this tick or before may have been freed unseen.
    distrusted_until: Option<Tick>,
    page_size: u64,
    room: Room,
    counters: Counters,
}

/// When it happened; a few records do not say.
fn time_of(what: &What<'_>) -> Option<u64> {
    match *what {
        What::Alloc { time, .. }
        | What::Free { time, .. }
        | What::ReallocBegin { time, .. }
        | What::ReallocEnd { time, .. }
        | What::Map { time, .. }
        | What::Unmap { time, .. }
        | What::RemapBegin { time, .. }
        | What::RemapEnd { time, .. }
        | What::Brk { time, .. }
        | What::Exec { time, .. }
        | What::Exit { time, .. }
        | What::Fork { time, .. }
        | What::MapExec { time, .. } => Some(time),
        What::Stack { .. } | What::UnmapFailed { .. } => None,
    }
}

/// The address of the block that an event looks up, if it is one of those that come often.
#[inline]
fn block_of(event: &Event<'_>) -> Option<u64> {
    match event.what {
        What::Alloc { addr, .. } | What::Free { addr, .. } | What::ReallocBegin { addr, .. } => Some(addr),
        _ => None,
    }
}

/// How many events' cache lines are asked for at once: enough to keep the memory busy, few enough not to be displaced
/// again before they are used.
const BATCH: usize = 32;

impl Ledger {
    pub fn new(config: Config) -> Self {
        let Config { max_stacks, max_live, max_ranges, page_size } = config;
        // Indices of stacks have so many bits, and the last one has a meaning of its own.
        let max_stacks = max_stacks.min((1 << table::STACK_BITS) - 1);
        Self {
            processes: Vec::new(),
            by_tgid: HashMap::new(),
            last: None,
            clock: Clock::default(),
            distrusted_until: None,
            page_size: page_size.max(1),
            room: Room {
                records: Cap::new(max_stacks),
                histories: Cap::new(max_stacks),
                blocks: Cap::new(max_live),
                ranges: Cap::new(max_ranges),
            },
            counters: Counters::default(),
        }
    }

    /// A process is traced from `time` (nanoseconds) on. Where one of the same tgid is known already, nothing happens if
    /// it is the same one, and it is replaced if `start_time` (clock ticks since boot) says that it is another.
    pub fn add_process(&mut self, tgid: u32, start_time: u64, time: u64) {
        self.clock.advance(time);
        if self.process(tgid).is_some_and(|known| known.start_time() == start_time) {
            return;
        }
        self.put(ProcessLedger::new(tgid, start_time));
    }

    /// A traced process forked, and its child is traced too: copies what is known. Does nothing if the parent is unknown
    /// but to add the child.
    pub fn fork_process(&mut self, parent: u32, child: u32, start_time: u64, time: u64) {
        let tick = self.clock.advance(time);
        let Some(place) = self.place(parent) else {
            return self.add_process(child, start_time, time);
        };
        // The child's own first events may have been applied already: then it stands for itself.
        if self.process(child).is_some_and(|known| known.start_time() == start_time) {
            return;
        }
        let (mut cx, processes) = self.context(tick);
        let copy = processes[place].forked(&mut cx, child, start_time);
        self.put(copy);
    }

    /// Forgets a process.
    pub fn remove_process(&mut self, tgid: u32) {
        if let Some(place) = self.by_tgid.remove(&tgid) {
            self.last = None;
            let removed = self.processes.swap_remove(place);
            self.counters.ended += removed.heap.live() as u64;
            removed.leave(&mut self.room);
            if let Some(moved) = self.processes.get(place) {
                self.by_tgid.insert(moved.tgid(), place);
            }
        }
    }

    /// The program break of a process when tracing began. Until it is told, the first movement shows where it is.
    pub fn set_break(&mut self, tgid: u32, addr: u64) {
        if let Some(place) = self.place(tgid) {
            let (cx, processes) = self.context(0);
            processes[place].ranges.set_break(&cx, addr);
        }
    }

    /// Replaces or adds a process whose room is counted already.
    fn put(&mut self, process: ProcessLedger) {
        self.remove_process(process.tgid());
        self.by_tgid.insert(process.tgid(), self.processes.len());
        self.processes.push(process);
    }

    /// Where a process is.
    #[inline]
    fn place(&mut self, tgid: u32) -> Option<usize> {
        match self.last {
            Some((last, place)) if last == tgid => Some(place),
            _ => {
                let place = *self.by_tgid.get(&tgid)?;
                self.last = Some((tgid, place));
                Some(place)
            }
        }
    }

    /// What an event of this tick is applied with, and the processes.
    #[inline]
    fn context(&mut self, tick: Tick) -> (Context<'_>, &mut Vec<ProcessLedger>) {
        let cx = Context {
            tick,
            now: window_of(self.clock.latest()),
            distrusted: self.distrusted_until.is_some_and(|until| tick <= until),
            page_size: self.page_size,
            room: &mut self.room,
            counters: &mut self.counters,
        };
        (cx, &mut self.processes)
    }

    /// What an event of this tick is applied with, and its process.
    #[inline]
    fn context_of(&mut self, place: usize, tick: Tick) -> (Context<'_>, &mut ProcessLedger) {
        let (mut cx, processes) = self.context(tick);
        let process = &mut processes[place];
        cx.distrusted |= process.is_distrusted(tick);
        (cx, process)
    }

    /// Applies one event.
    #[inline]
    pub fn apply(&mut self, event: &Event<'_>) {
        let Some(place) = self.place(event.tgid) else {
            self.counters.unknown_process += 1;
            return;
        };
        match event.what {
            What::Alloc { addr, size, stack, time, interval } => {
                let tick = self.clock.advance(time);
                let (mut cx, process) = self.context_of(place, tick);
                process.heap.alloc(&mut cx, &mut process.stacks, addr, Allocated { size, stack, interval });
            }
            What::Free { addr, time } => {
                let tick = self.clock.advance(time);
                let (mut cx, process) = self.context_of(place, tick);
                process.heap.free(&mut cx, &mut process.stacks, addr);
            }
            _ => self.apply_rare(place, event),
        }
    }

    /// Everything but malloc and free.
    #[inline(never)]
    fn apply_rare(&mut self, place: usize, event: &Event<'_>) {
        let tick = match time_of(&event.what) {
            Some(time) => self.clock.advance(time),
            None => self.clock.latest(),
        };
        let (mut cx, process) = self.context_of(place, tick);
        let cx = &mut cx;
        let ProcessLedger { stacks, heap, ranges, .. } = process;
        match event.what {
            What::ReallocBegin { tid, addr, .. } => heap.realloc_begin(cx, stacks, tid, addr),
            What::ReallocEnd { tid, addr, size, stack, interval, .. } => {
                heap.realloc_end(cx, stacks, tid, Resized { addr, size, stack, interval });
            }
            What::Stack { id, end, op, by_frame_pointers, frames } => {
                let kept = stacks.sent(id, SentStack { op, end, by_frame_pointers, frames }, cx.room);
                cx.counters.stacks_capped += u64::from(!kept);
            }
            What::Map { addr, size, in_allocator: true, .. } => ranges.map_foreign(cx, stacks, addr, size),
            What::Map { addr, size, stack, file, .. } => {
                ranges.map(cx, stacks, addr, size, if file { Class::File } else { Class::Anonymous }, stack);
            }
            What::Unmap { tid, addr, size, .. } => ranges.unmap(cx, stacks, tid, addr, size),
            What::UnmapFailed { tid } => ranges.unmap_failed(cx, stacks, tid),
            What::RemapBegin { tid, addr, size, .. } => ranges.remap_begin(cx, stacks, tid, addr, size),
            What::RemapEnd { tid, addr, size, stack, .. } => {
                ranges.remap_end(cx, stacks, tid, Remapped { addr, size, stack });
            }
            What::Brk { addr, stack, in_allocator, .. } => ranges.brk(cx, stacks, addr, stack, in_allocator),
            What::MapExec { addr, size, .. } => stacks.code_mapped(addr, cx.page_up(size)),
            What::Exec { .. } => {
                // Addresses mean something else from here on.
                cx.counters.ended += process.heap.live() as u64;
                let new = process.emptied();
                std::mem::replace(process, new).leave(cx.room);
            }
            // What it left unfreed is what a report is about; whoever knows that the process has ended removes it.
            What::Exit { .. } => process.set_leader_exited(),
            // Whether the child is traced, and when it started, whoever traces it knows: `fork_process`. The others are
            // not rare.
            What::Fork { .. } | What::Alloc { .. } | What::Free { .. } => {}
        }
    }

    /// Asks for the memory that applying these events will read first.
    ///
    /// In a loop of its own, which is measured to be faster than between other work; the likely reason is that a prefetch waits
    /// for the translation of its address, and in a loop as small as this many wait at once.
    #[inline]
    fn prefetch(&mut self, events: &[Event<'_>]) {
        for event in events {
            if let Some(addr) = block_of(event)
                && let Some(place) = self.place(event.tgid)
            {
                self.processes[place].heap.prefetch(addr);
            }
        }
    }

    /// Applies a batch that [`Self::prefetch`] was called for earlier.
    #[inline]
    fn apply_prefetched(&mut self, events: &[Event<'_>]) {
        for event in events {
            if let Some(addr) = block_of(event)
                && let Some(place) = self.place(event.tgid)
            {
                self.processes[place].heap.prefetch_rest(addr);
            }
        }
        for event in events {
            self.apply(event);
        }
    }

    /// Applies events in their order, asking for the memory of many before it is needed: the same as [`Self::apply`] for
    /// each, and faster where the table of blocks is larger than the caches. What a batch reads is asked for while the one
    /// before it is applied.
    pub fn apply_batch(&mut self, events: &[Event<'_>]) {
        let mut batches = events.chunks(BATCH).peekable();
        self.prefetch(batches.peek().copied().unwrap_or_default());
        while let Some(batch) = batches.next() {
            self.prefetch(batches.peek().copied().unwrap_or_default());
            self.apply_prefetched(batch);
        }
    }

    /// Decodes raw records and applies them, as [`Self::apply_batch`] does. Returns how many could not be decoded.
    pub fn apply_records<'a>(&mut self, records: impl IntoIterator<Item = &'a [u8]>) -> u64 {
        let mut undecodable = 0;
        // What waits for its memory, and what is decoded meanwhile.
        let (mut ready, mut batch) = (Vec::new(), Vec::with_capacity(BATCH));
        for record in records {
            match decode(record) {
                Ok(event) => batch.push(event),
                Err(_) => undecodable += 1,
            }
            if batch.len() == BATCH {
                self.prefetch(&batch);
                self.apply_prefetched(&ready);
                std::mem::swap(&mut ready, &mut batch);
                batch.clear();
            }
        }
        self.prefetch(&batch);
        self.apply_prefetched(&ready);
        self.apply_prefetched(&batch);
        undecodable
    }

    /// A free that found the ring full, from the kernel side's overflow map: the block at `addr` was freed at `time`,
    /// unless it was born since. To be called once all records from before `time` have been applied.
    pub fn missed_free(&mut self, tgid: u32, addr: u64, time: u64) {
        let Some(place) = self.place(tgid) else {
            self.counters.unknown_process += 1;
            return;
        };
        let tick = self.clock.tick(time);
        let (mut cx, process) = self.context_of(place, tick);
        process.heap.missed_free(&mut cx, &mut process.stacks, addr, tick);
    }

    /// The end of a realloc that found the ring full, from the kernel side's overflow map. To be called as [`Self::missed_free`].
    pub fn missed_realloc_end(&mut self, tgid: u32, tid: u32, time: u64) {
        let Some(place) = self.place(tgid) else {
            self.counters.unknown_process += 1;
            return;
        };
        let tick = self.clock.tick(time);
        let (mut cx, process) = self.context_of(place, tick);
        process.heap.missed_realloc_end(&mut cx, &mut process.stacks, tid, tick);
    }

    /// Frees were lost at or before `time`, and nobody knows which: takes all that was live then out of verdicts, also
    /// what events still to come say was allocated by then. What realloc returns later is live beyond doubt, and comes
    /// back.
    pub fn distrust(&mut self, time: u64) {
        let until = self.clock.advance(time);
        let until = self.distrusted_until.map_or(until, |before| before.max(until));
        self.distrusted_until = Some(until);
        self.counters.distrusts += 1;
        let (cx, processes) = self.context(until);
        for process in processes {
            process.distrust(&cx, until);
        }
    }

    /// The same where all that was lost was this process's.
    pub fn distrust_process(&mut self, tgid: u32, time: u64) {
        let until = self.clock.advance(time);
        let Some(place) = self.place(tgid) else { return };
        self.counters.distrusts += 1;
        let (cx, process) = self.context_of(place, until);
        process.distrust(&cx, until);
    }

    /// The free of the block at `addr` would not be told if it came: takes it out of verdicts, if it was born by `time`.
    pub fn distrust_block(&mut self, tgid: u32, addr: u64, time: u64) {
        let until = self.clock.tick(time);
        let Some(place) = self.place(tgid) else { return };
        let (cx, process) = self.context_of(place, until);
        if process.heap.distrust_one(&cx, &mut process.stacks, addr, until) {
            cx.counters.unfollowed += 1;
        }
    }

    /// The addresses of a process's blocks that were born by `time` and are in the verdicts.
    pub fn trusted_addresses(&self, tgid: u32, time: u64) -> Vec<u64> {
        let until = self.clock.tick(time);
        self.process(tgid).map_or_else(Vec::new, |process| process.heap.trusted(until))
    }

    /// Closes the windows up to `time` in every stack.
    pub fn roll(&mut self, time: u64) {
        self.clock.advance(time);
        let now = window_of(self.clock.latest());
        for process in &mut self.processes {
            process.stacks.roll(now);
        }
    }

    /// The window that `time` lies in.
    pub fn window(&self, time: u64) -> Window {
        window_of(self.clock.tick(time))
    }

    /// The first time that the ledger was told of, in nanoseconds: where window 0 begins.
    pub fn first_time(&self) -> Option<u64> {
        self.clock.origin()
    }

    /// The processes, in no particular order.
    pub fn processes(&self) -> impl Iterator<Item = &ProcessLedger> {
        self.processes.iter()
    }

    /// The process of this tgid.
    pub fn process(&self, tgid: u32) -> Option<&ProcessLedger> {
        self.by_tgid.get(&tgid).map(|place| &self.processes[*place])
    }

    /// What the ledger could not know or keep, up to now.
    pub fn counters(&self) -> Counters {
        self.processes.iter().fold(self.counters, |mut sum, process| {
            sum.stacks_missing += process.stacks.missing();
            let distrusted = process.distrusted();
            sum.distrusted.bytes = sum.distrusted.bytes.saturating_add(distrusted.bytes);
            sum.distrusted.count += distrusted.count;
            sum
        })
    }

    /// Live heap blocks of all processes, those in the hands of realloc included.
    pub fn live_blocks(&self) -> usize {
        self.room.blocks.used
    }

    /// How many live heap blocks there may be at most.
    pub fn most_blocks(&self) -> usize {
        self.room.blocks.most
    }

    /// Call stacks that are kept, by what they allocate; and how many may be.
    pub fn stacks(&self) -> (usize, usize) {
        (self.room.histories.used, self.room.histories.most)
    }

    /// Bytes that the tables of live heap blocks occupy, used or not.
    pub fn block_table_bytes(&self) -> usize {
        self.processes.iter().map(|process| process.heap.capacity_bytes()).sum()
    }

    /// Bytes of table for each live heap block; `None` where there is none.
    pub fn bytes_per_live(&self) -> Option<f64> {
        (self.live_blocks() > 0).then(|| self.block_table_bytes() as f64 / self.live_blocks() as f64)
    }
}

//! The page ranges of one process: what mmap, munmap, mremap and brk mean for them.
//!
//! A range is what one call mapped, until something cuts it: an unmapping, or a mapping over it (`MAP_FIXED`). A cut takes
//! the range's beginning or end, or its middle, which leaves two ranges, or all of it. In the stack's history bytes leave
//! as they are cut, and the count is that of the ranges that are there: a shortened range still counts one.
//!
//! An unmapping is recorded before the kernel does it, and whether it failed, after. What it cuts is dead at once, and
//! kept aside until the thread's next call, to be put back should it fail; that counts as an allocation of the same bytes
//! with their old birth. What `mremap` moves stays in its history until it has ended, as with realloc.
//! Heap blocks are left to [`super::heap`].

use std::collections::{BTreeMap, HashMap};

use super::Context;
use super::clock::Tick;
use super::stacks::{Class, DISTRUSTED, Stacks};
use crate::decode::StackId;

/// How many threads' last calls are remembered in a process.
const MOST_PENDING: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    end: u64,
    stack: u32,
    birth: Tick,
    file: bool,
}

/// A piece cut out of the map, with its start.
type Piece = (u64, Range);

/// A thread's last call that cut something.
#[derive(Clone)]
enum Pending {
    /// Dead, unless it failed.
    Unmap(Vec<Piece>),
    /// Still counted; `start` and `end` are what mremap was called for.
    Remap { start: u64, end: u64, pieces: Vec<Piece> },
}

/// How an mremap ended.
#[derive(Clone, Copy)]
pub(super) struct Remapped {
    pub addr: u64,
    pub size: u64,
    pub stack: StackId,
}

/// The live ranges. They never overlap.
#[derive(Clone, Default)]
pub(super) struct Ranges {
    by_start: BTreeMap<u64, Range>,
    /// By thread.
    pending: HashMap<u32, Pending>,
    /// The program break, if it is known, as a page boundary.
    program_break: Option<u64>,
}

impl Ranges {
    /// The program break when tracing began.
    pub fn set_break(&mut self, cx: &Context<'_>, addr: u64) {
        self.program_break = Some(cx.page_up(addr));
    }

    /// Pages were mapped. The allocator's own are not kept, but they end what was there.
    pub fn map(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, start: u64, size: u64, class: Class, id: StackId) {
        let end = cx.range_end(start, size);
        self.unmap_now(cx, stacks, start, end);
        if let Some(stack) = cx.stack_index(stacks, id, class) {
            let range = Range { end, stack, birth: cx.tick, file: class == Class::File };
            self.insert(cx, stacks, start, range);
        }
    }

    /// Pages were mapped that are not the program's.
    pub fn map_foreign(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, start: u64, size: u64) {
        self.unmap_now(cx, stacks, start, cx.range_end(start, size));
    }

    /// Thread `tid` is about to unmap pages.
    pub fn unmap(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32, start: u64, size: u64) {
        self.settle(cx, stacks, tid);
        let pieces = self.cut(cx, stacks, start, cx.range_end(start, size));
        for piece in &pieces {
            Self::died(cx, stacks, piece);
        }
        if !pieces.is_empty() {
            self.keep(cx, stacks, tid, Pending::Unmap(pieces));
        }
    }

    /// Thread `tid`'s unmapping failed.
    pub fn unmap_failed(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32) {
        match self.pending.remove(&tid) {
            Some(Pending::Unmap(pieces)) => {
                for (start, range) in pieces {
                    self.put_into_gaps(cx, stacks, start, range);
                }
            }
            Some(remap @ Pending::Remap { .. }) => Self::lost(cx, stacks, &remap),
            None => {}
        }
    }

    /// Thread `tid` is about to move or resize pages.
    pub fn remap_begin(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32, start: u64, size: u64) {
        self.settle(cx, stacks, tid);
        let end = cx.range_end(start, size);
        let pieces = self.cut(cx, stacks, start, end);
        self.keep(cx, stacks, tid, Pending::Remap { start, end, pieces });
    }

    /// Thread `tid`'s mremap has ended; with address zero it failed.
    pub fn remap_end(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32, new: Remapped) {
        let (old_start, old_end, pieces) = match self.pending.remove(&tid) {
            Some(Pending::Remap { start, end, pieces }) => (start, end, pieces),
            // Its beginning was lost: all of it is born now.
            Some(Pending::Unmap(_)) | None => (0, 0, Vec::new()),
        };
        if new.addr == 0 {
            for piece in pieces {
                self.put_into_gaps(cx, stacks, piece.0, piece.1);
                Self::died(cx, stacks, &piece);
            }
            return;
        }
        let end = cx.range_end(new.addr, new.size);
        self.unmap_now(cx, stacks, new.addr, end);
        // What it had keeps its birth, as far as the new range reaches; what lies between and beyond is born now.
        let file = pieces.last().is_some_and(|(_, range)| range.file);
        let mut at = new.addr;
        let kept = (old_end - old_start).min(end - new.addr);
        for (start, range) in &pieces {
            let from = new.addr + (start - old_start).min(kept);
            let to = new.addr + (range.end - old_start).min(kept);
            if range.stack != DISTRUSTED {
                self.moved(cx, stacks, new.stack, at..from, cx.tick, file);
                self.moved(cx, stacks, new.stack, from..to, range.birth, range.file);
                at = to.max(at);
            }
        }
        self.moved(cx, stacks, new.stack, at..end, cx.tick, file);
        for piece in &pieces {
            Self::died(cx, stacks, piece);
        }
    }

    /// A part of what mremap made.
    fn moved(
        &mut self,
        cx: &mut Context<'_>,
        stacks: &mut Stacks,
        id: StackId,
        part: std::ops::Range<u64>,
        birth: Tick,
        file: bool,
    ) {
        if part.is_empty() {
            return;
        }
        if let Some(stack) = cx.stack_index(stacks, id, if file { Class::File } else { Class::Anonymous }) {
            self.insert(cx, stacks, part.start, Range { end: part.end, stack, birth, file });
        }
    }

    /// The program break was moved to `addr`, or was asked for.
    pub fn brk(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, addr: u64, id: StackId, in_allocator: bool) {
        let new = cx.page_up(addr);
        let Some(old) = self.program_break.replace(new) else {
            return;
        };
        if new < old {
            self.unmap_now(cx, stacks, new, old);
        } else if new > old && !in_allocator {
            self.map(cx, stacks, old, new - old, Class::Anonymous, id);
        }
    }

    /// Inserts a range where none is.
    fn insert(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, start: u64, range: Range) {
        if range.end <= start {
            return;
        }
        if !cx.room.ranges.has() {
            cx.counters.live_capped += 1;
            return;
        }
        cx.room.ranges.used += 1;
        stacks.born(range.stack, cx.now, range.birth, range.end - start);
        self.by_start.insert(start, range);
    }

    /// A piece that [`Self::cut`] gave is dead.
    fn died(cx: &Context<'_>, stacks: &mut Stacks, (start, range): &Piece) {
        stacks.died(range.stack, cx.now, range.birth, range.end - start);
    }

    /// Takes `[from, to)` out of the map, splitting what straddles a border. The pieces are still in their histories,
    /// each counted one.
    fn cut(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, from: u64, to: u64) -> Vec<Piece> {
        if from >= to {
            return Vec::new();
        }
        for border in [from, to] {
            if let Some((_, range)) = self.by_start.range_mut(..border).next_back()
                && range.end > border
            {
                let rest = *range;
                range.end = border;
                self.by_start.insert(border, rest);
                cx.room.ranges.used += 1;
                // One range more, no byte more.
                stacks.born(rest.stack, cx.now, rest.birth, 0);
            }
        }
        let pieces: Vec<Piece> = self.by_start.range(from..to).map(|(start, range)| (*start, *range)).collect();
        for (start, _) in &pieces {
            self.by_start.remove(start);
        }
        cx.room.ranges.used -= pieces.len();
        pieces
    }

    /// The pages of `[from, to)` are gone.
    fn unmap_now(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, from: u64, to: u64) {
        for piece in self.cut(cx, stacks, from, to) {
            Self::died(cx, stacks, &piece);
        }
    }

    /// Puts a range back, without what has been mapped over it since.
    fn put_into_gaps(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, start: u64, range: Range) {
        let before = self.by_start.range(..start).next_back().map_or(0, |(_, other)| other.end);
        let taken: Vec<(u64, u64)> =
            self.by_start.range(start..range.end).map(|(start, other)| (*start, other.end)).collect();
        let mut at = start.max(before);
        for (taken_start, taken_end) in taken {
            self.insert(cx, stacks, at, Range { end: taken_start, ..range });
            at = taken_end;
        }
        self.insert(cx, stacks, at, range);
    }

    /// Thread `tid` makes another call, so its last unmapping did not fail.
    fn settle(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32) {
        if let Some(remap @ Pending::Remap { .. }) = self.pending.remove(&tid) {
            Self::lost(cx, stacks, &remap);
        }
    }

    /// How a call ended will not be known: what it moved counts as unmapped.
    fn lost(cx: &mut Context<'_>, stacks: &mut Stacks, pending: &Pending) {
        if let Pending::Remap { pieces, .. } = pending {
            cx.counters.pending_replaced += 1;
            for piece in pieces {
                Self::died(cx, stacks, piece);
            }
        }
    }

    fn keep(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32, pending: Pending) {
        if self.pending.len() >= MOST_PENDING {
            // What was unmapped stays so.
            let before = self.pending.len();
            self.pending.retain(|_, pending| matches!(pending, Pending::Remap { .. }));
            cx.counters.pending_forgotten += (before - self.pending.len()) as u64;
        }
        if self.pending.len() < MOST_PENDING {
            self.pending.insert(tid, pending);
        } else {
            Self::lost(cx, stacks, &pending);
        }
    }

    /// Takes every range that was born by `until` out of the verdicts, those in the hands of mremap too.
    pub fn distrust(&mut self, cx: &Context<'_>, stacks: &mut Stacks, until: Tick) {
        let mut distrust = |start: u64, range: &mut Range| {
            if range.birth <= until {
                stacks.distrust(&mut range.stack, cx.now, range.birth, range.end - start);
            }
        };
        for (start, range) in &mut self.by_start {
            distrust(*start, range);
        }
        for pending in self.pending.values_mut() {
            match pending {
                Pending::Remap { pieces, .. } => pieces.iter_mut().for_each(|(start, range)| distrust(*start, range)),
                // In no history; should it come back, then not into a verdict.
                Pending::Unmap(pieces) => pieces
                    .iter_mut()
                    .filter(|(_, range)| range.birth <= until)
                    .for_each(|(_, range)| range.stack = DISTRUSTED),
            }
        }
    }

    /// Counts what threads have in the hands of mremap as unmapped: in a forked child those threads are not there.
    pub fn drop_pending(&mut self, cx: &Context<'_>, stacks: &mut Stacks) {
        for pending in std::mem::take(&mut self.pending).into_values() {
            if let Pending::Remap { pieces, .. } = pending {
                for piece in pieces {
                    Self::died(cx, stacks, &piece);
                }
            }
        }
    }

    /// How many ranges are live.
    pub fn live(&self) -> usize {
        self.by_start.len()
    }
}

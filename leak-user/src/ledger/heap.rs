//! The heap blocks of one process: what malloc, free and realloc mean for them.
//!
//! A block in the hands of realloc is not found by its address any more, because another thread may be handed that
//! address before realloc's end is recorded; but its stack counts it until then, so that the stack's floor shows no dip
//! that was not there. Page ranges are left to [`super::ranges`].

use std::collections::HashMap;

use leak_common::sampling::Interval;

use super::Context;
use super::clock::Tick;
use super::stacks::{Class, DISTRUSTED, Stacks};
use super::table::{Block, BlockTable};
use crate::decode::StackId;

/// What a thread's realloc was called with.
#[derive(Clone, Copy)]
struct Pending {
    addr: u64,
    block: Block,
    begun: Tick,
}

/// How a realloc ended.
#[derive(Clone, Copy)]
pub(super) struct Resized {
    pub addr: u64,
    pub size: u64,
    pub stack: StackId,
    /// What the new block was sampled with.
    pub interval: Interval,
}

/// A block as its allocation tells of it.
#[derive(Clone, Copy)]
pub(super) struct Allocated {
    pub size: u64,
    pub stack: StackId,
    pub interval: Interval,
}

fn is_trusted(block: &Block, until: Tick) -> bool {
    block.stack != DISTRUSTED && block.birth <= until
}

#[derive(Clone)]
pub(super) struct Heap {
    blocks: BlockTable,
    /// By thread; none where nothing was known of the block.
    pending: HashMap<u32, Pending>,
}

impl Heap {
    pub fn new() -> Self {
        Self { blocks: BlockTable::new(), pending: HashMap::new() }
    }

    /// A block was allocated at `addr`, now.
    #[inline]
    pub fn alloc(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, addr: u64, new: Allocated) {
        let Allocated { size, stack: id, interval } = new;
        if addr == 0 {
            return;
        }
        cx.counters.blocks += 1;
        let Some(stack) = cx.stack_index(stacks, id, Class::Heap) else {
            cx.counters.not_kept += 1;
            // Nothing is kept of it; but what was there has been freed all the same.
            self.replaced(cx, stacks, addr);
            return;
        };
        self.insert(cx, stacks, addr, Block { size, stack, birth: cx.tick, interval });
    }

    /// Puts a block into the table and its history.
    #[inline]
    fn insert(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, addr: u64, block: Block) {
        if !cx.room.blocks.has() && !self.replaced(cx, stacks, addr) {
            cx.counters.live_capped += 1;
            cx.counters.not_kept += 1;
            return;
        }
        cx.room.blocks.used += 1;
        if let Some(old) = self.blocks.insert(addr, block) {
            cx.room.blocks.used -= 1;
            cx.counters.replaced += 1;
            cx.counters.ended += 1;
            stacks.block_died(cx.now, &old);
        }
        stacks.block_born(cx.now, &block);
    }

    /// The address was handed out again: if a block is live there, its free was missed. Says whether one was.
    fn replaced(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, addr: u64) -> bool {
        let Some(old) = self.blocks.remove(addr) else {
            return false;
        };
        cx.counters.replaced += 1;
        Self::died(cx, stacks, old);
        true
    }

    /// A block that is no longer in the table is dead.
    #[inline]
    fn died(cx: &mut Context<'_>, stacks: &mut Stacks, block: Block) {
        cx.room.blocks.used -= 1;
        cx.counters.ended += 1;
        stacks.block_died(cx.now, &block);
    }

    /// The block at `addr` was freed.
    #[inline]
    pub fn free(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, addr: u64) {
        match self.blocks.remove(addr) {
            Some(block) => Self::died(cx, stacks, block),
            None => cx.counters.free_of_unknown += 1,
        }
    }

    /// The block at `addr` was freed at `time`, which is known only now.
    pub fn missed_free(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, addr: u64, time: Tick) {
        match self.blocks.get(addr) {
            // Born in the same tick: whether before or after the free nobody knows, and only one of the two mistakes would
            // make a leak of it.
            Some(block) if block.birth <= time => {
                self.blocks.remove(addr);
                cx.counters.missed_free_applied += 1;
                Self::died(cx, stacks, block);
            }
            _ => cx.counters.missed_free_stale += 1,
        }
    }

    /// Thread `tid` calls realloc for the block at `addr`.
    pub fn realloc_begin(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32, addr: u64) {
        let lost = match self.blocks.remove(addr) {
            Some(block) => self.pending.insert(tid, Pending { addr, block, begun: cx.tick }),
            None => self.pending.remove(&tid),
        };
        if let Some(Pending { block, .. }) = lost {
            // The end of the thread's last realloc was lost. That it failed is unlikely, and to call its block freed is
            // safe.
            cx.counters.pending_replaced += 1;
            Self::died(cx, stacks, block);
        }
    }

    /// Thread `tid`'s realloc has ended.
    pub fn realloc_end(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32, new: Resized) {
        let old = self.pending.remove(&tid);
        match (new.addr, new.size, old) {
            (0, 0, Some(old)) => Self::died(cx, stacks, old.block),
            (0, 0, None) => cx.counters.free_of_unknown += 1,
            (0, _, Some(old)) => self.put_back(cx, stacks, old.addr, old.block),
            (0, _, None) => {}
            (_, _, old) => self.resized(cx, stacks, old.map(|old| old.block), new),
        }
    }

    /// Thread `tid`'s realloc ended by `time` and nobody knows how. What it made is missed; its old block is called freed, which
    /// is likely and makes no leak.
    pub fn missed_realloc_end(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, tid: u32, time: Tick) {
        // One that began later may still go on.
        if self.pending.get(&tid).is_some_and(|pending| pending.begun <= time)
            && let Some(Pending { block, .. }) = self.pending.remove(&tid)
        {
            cx.counters.pending_replaced += 1;
            Self::died(cx, stacks, block);
        }
    }

    /// A failed realloc leaves its block as it was.
    fn put_back(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, addr: u64, old: Block) {
        if self.blocks.get(addr).is_some() {
            // Handed out meanwhile: so it had been freed by then, by another thread and unseen.
            cx.counters.replaced += 1;
            Self::died(cx, stacks, old);
        } else {
            // Its history has counted it all the time.
            self.blocks.insert(addr, old);
        }
    }

    /// realloc made `old` into `new`: a block of another size and stack, but of the same birth.
    fn resized(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks, old: Option<Block>, new: Resized) {
        let trusted = old.filter(|old| old.stack != DISTRUSTED);
        let index = cx.stack_index(stacks, new.stack, Class::Heap);
        cx.counters.blocks += 1;
        if old.is_some() {
            cx.room.blocks.used -= 1;
            cx.counters.ended += 1;
        }
        if let Some(stack) = index {
            // What was in doubt is so no longer: it is live, and born now as far as its history can tell.
            let birth = trusted.map_or(cx.tick, |old| old.birth);
            self.insert(cx, stacks, new.addr, Block { size: new.size, stack, birth, interval: new.interval });
        } else {
            cx.counters.not_kept += 1;
            self.replaced(cx, stacks, new.addr);
        }
        // After the new block, so that the floor of a stack that has both does not dip.
        if let Some(old) = old {
            stacks.block_died(cx.now, &old);
        }
    }

    /// Takes every block that was born by `until` out of the verdicts, those in the hands of realloc too.
    pub fn distrust(&mut self, cx: &Context<'_>, stacks: &mut Stacks, until: Tick) {
        let mut distrust = |block: &Block, stack: &mut u32| {
            if block.birth <= until {
                stacks.distrust_block(stack, cx.now, block);
            }
        };
        self.blocks.for_each_stack(&mut distrust);
        for Pending { block, .. } in self.pending.values_mut() {
            let before = *block;
            distrust(&before, &mut block.stack);
        }
    }

    /// Takes the block at `addr` out of the verdicts if it was born by `until`; false where there is none that is in them.
    pub fn distrust_one(&mut self, cx: &Context<'_>, stacks: &mut Stacks, addr: u64, until: Tick) -> bool {
        let Some(block) = self.blocks.get(addr).filter(|block| is_trusted(block, until)) else { return false };
        let mut stack = block.stack;
        stacks.distrust_block(&mut stack, cx.now, &block);
        self.blocks.insert(addr, Block { stack, ..block });
        true
    }

    /// The addresses of live blocks that were born by `until` and are in the verdicts, without those in the hands of realloc.
    pub fn trusted(&self, until: Tick) -> Vec<u64> {
        let in_verdicts = |addr: &u64| self.blocks.get(*addr).is_some_and(|block| is_trusted(&block, until));
        self.blocks.addresses().filter(in_verdicts).collect()
    }

    /// Counts what threads have in the hands of realloc as freed: in a forked child those threads are not there.
    pub fn drop_pending(&mut self, cx: &mut Context<'_>, stacks: &mut Stacks) {
        for pending in std::mem::take(&mut self.pending).into_values() {
            Self::died(cx, stacks, pending.block);
        }
    }

    /// The addresses of all live blocks, those in the hands of realloc included: their free may be told, should it fail.
    pub fn addresses(&self) -> Vec<u64> {
        self.blocks.addresses().chain(self.pending.values().map(|pending| pending.addr)).collect()
    }

    /// Live blocks, those in the hands of realloc included.
    pub fn live(&self) -> usize {
        self.blocks.len() + self.pending.len()
    }

    #[inline]
    pub fn prefetch(&self, addr: u64) {
        self.blocks.prefetch(addr);
    }

    #[inline]
    pub fn prefetch_rest(&self, addr: u64) {
        self.blocks.prefetch_rest(addr);
    }

    /// Bytes that the table of blocks occupies.
    pub fn capacity_bytes(&self) -> usize {
        self.blocks.capacity_bytes()
    }
}

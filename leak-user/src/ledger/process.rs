//! What the ledger holds of one process.

use super::heap::Heap;
use super::ranges::Ranges;
use super::sampled::SampledTotals;
use super::stacks::{Room, Stack, Stacks, Total};
use super::{Context, Tick};

/// One traced process: its live blocks and ranges, and its call stacks.
#[derive(Clone)]
pub struct ProcessLedger {
    tgid: u32,
    start_time: u64,
    leader_exited: bool,
    /// What was allocated in this tick or before may have been freed unseen.
    distrusted_until: Option<Tick>,
    pub(super) stacks: Stacks,
    pub(super) heap: Heap,
    pub(super) ranges: Ranges,
}

impl ProcessLedger {
    pub(super) fn new(tgid: u32, start_time: u64) -> Self {
        Self {
            tgid,
            start_time,
            leader_exited: false,
            distrusted_until: None,
            stacks: Stacks::default(),
            heap: Heap::new(),
            ranges: Ranges::default(),
        }
    }

    /// The same for a forked child, which has the parent's memory but only one thread.
    pub(super) fn forked(&self, cx: &mut Context<'_>, tgid: u32, start_time: u64) -> Self {
        let mut child = Self { tgid, start_time, leader_exited: false, ..self.clone() };
        child.stacks.begin_anew(cx.now);
        child.enter(cx.room);
        cx.counters.blocks += child.heap.live() as u64;
        child.heap.drop_pending(cx, &mut child.stacks);
        child.ranges.drop_pending(cx, &mut child.stacks);
        child
    }

    /// The process, in the initial pid namespace.
    pub fn tgid(&self) -> u32 {
        self.tgid
    }

    /// Clock ticks since boot; with the tgid it is unique.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Whether the leader thread has ended, and with it, in most programs, the process.
    pub fn leader_exited(&self) -> bool {
        self.leader_exited
    }

    pub(super) fn set_leader_exited(&mut self) {
        self.leader_exited = true;
    }

    /// Every stack that has allocated, in the order in which they were first seen, those that hold nothing included.
    pub fn stacks(&self) -> impl Iterator<Item = Stack<'_>> {
        self.stacks.iter()
    }

    /// Live bytes, and blocks and ranges, of all stacks; without [`Self::distrusted`].
    pub fn live(&self) -> Total {
        self.stacks().fold(Total::default(), |sum, stack| Total {
            bytes: sum.bytes.saturating_add(stack.history.live_bytes()),
            count: sum.count.saturating_add(stack.history.estimated_count()),
        })
    }

    /// What of all stacks' totals is estimated.
    pub fn sampled(&self) -> SampledTotals {
        self.stacks().fold(SampledTotals::default(), |sum, stack| sum.and(&stack.history.sampled()))
    }

    /// The addresses of all live heap blocks.
    pub fn addresses(&self) -> Vec<u64> {
        self.heap.addresses()
    }

    /// Live heap blocks that are kept, those out of verdicts included.
    pub fn blocks(&self) -> usize {
        self.heap.live()
    }

    /// Live bytes, and blocks and ranges, that were taken out of verdicts because a free may have been lost.
    pub fn distrusted(&self) -> Total {
        self.stacks.distrusted()
    }

    /// Whether what is allocated in this tick may have been freed unseen.
    #[inline]
    pub(super) fn is_distrusted(&self, tick: Tick) -> bool {
        self.distrusted_until.is_some_and(|until| tick <= until)
    }

    /// The same process with nothing live: it executed a new program.
    pub(super) fn emptied(&self) -> Self {
        Self { distrusted_until: self.distrusted_until, ..Self::new(self.tgid, self.start_time) }
    }

    /// Whether what was live at some time was taken out of verdicts.
    pub fn was_distrusted(&self) -> bool {
        self.distrusted_until.is_some()
    }

    pub(super) fn distrust(&mut self, cx: &Context<'_>, until: Tick) {
        let until = self.distrusted_until.map_or(until, |before| before.max(until));
        self.distrusted_until = Some(until);
        self.heap.distrust(cx, &mut self.stacks, until);
        self.ranges.distrust(cx, &mut self.stacks, until);
    }

    /// Takes what it uses out of the count, before it is dropped.
    pub(super) fn leave(&self, room: &mut Room) {
        self.stacks.leave(room);
        room.blocks.used -= self.heap.live();
        room.ranges.used -= self.ranges.live();
    }

    fn enter(&self, room: &mut Room) {
        self.stacks.enter(room);
        room.blocks.used += self.heap.live();
        room.ranges.used += self.ranges.live();
    }
}

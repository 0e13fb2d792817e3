//! What the collector keeps of a process that is watched in windows: the stream's heap events become those of
//! [`Windows`], and stacks are remembered as they are sent.

use std::collections::HashMap;

use crate::decode::{Event, StackEnd, StackId, What};
use crate::governor::windows::{Estimate, Plan, Seen, Windows};
use crate::ledger::Stack;

/// Stacks that are remembered; of further ones the report shows no frames.
const MAX_STACKS: usize = 32 << 10;

/// A stack as its record has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub op: u8,
    pub end: StackEnd,
    pub by_frame_pointers: bool,
    /// Innermost first.
    pub frames: Box<[u64]>,
}

/// One process.
#[derive(Debug, Default)]
pub struct Windowed {
    windows: Windows,
    /// What threads have in the hands of realloc.
    pending: HashMap<u32, u64>,
    stacks: HashMap<StackId, Sent>,
    /// The first id of stacks that came under a second one, because code may have moved.
    names: HashMap<StackId, StackId>,
    by_frames: HashMap<Box<[u64]>, StackId>,
}

impl Windowed {
    /// From `time` on; with the stacks that were sent before.
    pub fn new<'a>(time: u64, stacks: impl Iterator<Item = Stack<'a>>) -> Self {
        let mut new = Self::default();
        new.windows.begin(time);
        for stack in stacks.filter(|stack| !stack.frames.is_empty()) {
            let Stack { id, op, end, by_frame_pointers, frames, .. } = stack;
            new.sent(id, Sent { op, end, by_frame_pointers, frames: frames.into() });
        }
        new
    }

    fn sent(&mut self, id: StackId, sent: Sent) {
        if self.stacks.len() >= MAX_STACKS {
            return;
        }
        if let Some(first) = self.by_frames.get(&sent.frames) {
            if *first != id {
                self.names.insert(id, *first);
            }
            return;
        }
        self.by_frames.insert(sent.frames.clone(), id);
        self.stacks.insert(id, sent);
    }

    fn name(&self, id: StackId) -> StackId {
        self.names.get(&id).copied().unwrap_or(id)
    }

    /// A window begins.
    pub fn open(&mut self, time: u64, plan: Plan) {
        self.windows.open(time, plan);
    }

    /// All that happened by this time has been seen.
    pub fn advance(&mut self, time: u64) {
        self.windows.advance(time);
    }

    /// Something was lost, and nobody knows what.
    pub fn lose(&mut self) {
        self.windows.lose();
        self.pending.clear();
    }

    /// The block at `addr` was freed at `time`, which is known only now.
    pub fn missed_free(&mut self, time: u64, addr: u64) {
        self.windows.free(time, addr);
    }

    /// Takes what is for it. The rest is for the ledger: what becomes of ranges that it knows. New ranges are none of its business:
    /// with breakpoints that stand for a part of the time only, nobody can tell which are the allocator's.
    pub fn take<'a>(&mut self, event: Event<'a>) -> Option<Event<'a>> {
        match event.what {
            What::Alloc { addr, size, stack, time, .. } => {
                let stack = self.name(stack);
                self.windows.alloc(time, addr, size, stack);
                None
            }
            What::Free { addr, time } => {
                self.windows.free(time, addr);
                None
            }
            What::ReallocBegin { tid, addr, .. } => {
                self.pending.insert(tid, addr);
                None
            }
            What::ReallocEnd { tid, addr, size, stack, time, .. } => {
                let old = self.pending.remove(&tid);
                if let Some(old) = old.filter(|_| addr != 0 || size == 0) {
                    self.windows.free(time, old);
                }
                if addr != 0 {
                    let stack = self.name(stack);
                    self.windows.alloc(time, addr, size, stack);
                }
                None
            }
            What::Stack { id, end, op, by_frame_pointers, frames } => {
                self.sent(id, Sent { op, end, by_frame_pointers, frames: frames.iter().collect() });
                Some(event)
            }
            What::Map { addr, size, stack, time, file, .. } => {
                let what = What::Map { addr, size, stack, time, file, in_allocator: true };
                Some(Event { what, ..event })
            }
            What::Brk { addr, stack, time, .. } => {
                Some(Event { what: What::Brk { addr, stack, time, in_allocator: true }, ..event })
            }
            What::Exec { time, .. } => {
                *self = Self::default();
                self.windows.begin(time);
                Some(event)
            }
            _ => Some(event),
        }
    }

    /// Seconds for which it has been watched so, until `now`.
    pub fn seconds(&self, now: u64) -> f64 {
        self.windows.since().map_or(0.0, |since| now.saturating_sub(since) as f64 / 1e9)
    }

    /// Windows that have ended.
    pub fn count(&self) -> usize {
        self.windows.count()
    }

    /// What is thought of each stack, with what was seen of it, and how it was sent.
    pub fn estimates(&self) -> Vec<(StackId, Estimate, Seen, Option<&Sent>)> {
        let estimates = self.windows.estimates();
        estimates
            .into_iter()
            .map(|(id, estimate)| (id, estimate, self.windows.seen(id), self.stacks.get(&id)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { length: 1_000, rate: 1e6 };

    fn event(what: What<'_>) -> Event<'_> {
        Event { tgid: 7, what }
    }

    /// realloc's old block goes and its new one comes, unless it failed; what the process maps is no longer told from what its
    /// allocator does.
    #[test]
    fn events_become_windows() {
        let mut windowed = Windowed::new(0, std::iter::empty());
        windowed.open(0, PLAN);
        let interval = leak_common::sampling::Interval::EXACT;
        let alloc = |addr, stack, time| event(What::Alloc { addr, size: 10, stack, time, interval });
        let end = |addr, stack, time| event(What::ReallocEnd { tid: 1, addr, size: 30, stack, time, interval });
        let begin = |addr, time| event(What::ReallocBegin { tid: 1, addr, time });
        for step in
            [alloc(0x10, 1, 5), begin(0x10, 6), end(0x20, 2, 7), alloc(0x30, 3, 8), begin(0x30, 9), end(0, 4, 10)]
        {
            assert_eq!(windowed.take(step), None);
        }
        let mapped = What::Map { addr: 0x1000, size: 0x1000, stack: 5, time: 20, file: false, in_allocator: false };
        let taken = windowed.take(event(mapped)).map(|event| event.what);
        assert!(matches!(taken, Some(What::Map { in_allocator: true, .. })), "{taken:?}");
        windowed.advance(2_000);
        let mut ids: Vec<_> = windowed.estimates().into_iter().map(|(id, ..)| id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [2, 3]);
        assert_eq!(windowed.count(), 1);
    }
}

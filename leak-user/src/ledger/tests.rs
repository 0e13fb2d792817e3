//! What each call, and each kind of loss, means: one case a test. The rules together are tested in [`super::model`].

use leak_common::kind;
use leak_common::sampling::Interval;

use super::history::Window;
use super::*;
use crate::decode::{Frames, StackEnd};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
const PAGE: u64 = 4096;
/// The process that most tests are about.
const P: u32 = 10;

/// A ledger with a clock: events happen at `now`.
struct Case {
    ledger: Ledger,
    now: u64,
}

impl Case {
    fn new() -> Self {
        Self::with(Config::default())
    }

    fn with(config: Config) -> Self {
        let now = 50 * SECOND;
        let mut ledger = Ledger::new(config);
        ledger.add_process(P, 1, now);
        Self { ledger, now }
    }

    fn wait(&mut self, nanoseconds: u64) {
        self.now += nanoseconds;
    }

    fn apply(&mut self, what: What<'_>) {
        self.ledger.apply(&Event { tgid: P, what });
    }

    fn alloc(&mut self, addr: u64, size: u64, stack: u64) {
        self.apply(What::Alloc { addr, size, stack, time: self.now, interval: Interval::EXACT });
    }

    fn free(&mut self, addr: u64) {
        self.apply(What::Free { addr, time: self.now });
    }

    fn realloc_begin(&mut self, tid: u32, addr: u64) {
        self.apply(What::ReallocBegin { tid, addr, time: self.now });
    }

    fn realloc_end(&mut self, tid: u32, addr: u64, size: u64, stack: u64) {
        self.apply(What::ReallocEnd { tid, addr, size, stack, time: self.now, interval: Interval::EXACT });
    }

    fn map(&mut self, addr: u64, size: u64, stack: u64) {
        self.apply(What::Map { addr, size, stack, time: self.now, file: false, in_allocator: false });
    }

    fn unmap(&mut self, tid: u32, addr: u64, size: u64) {
        self.apply(What::Unmap { tid, addr, size, time: self.now });
    }

    fn remap(&mut self, tid: u32, from: (u64, u64), to: (u64, u64), stack: u64) {
        self.apply(What::RemapBegin { tid, addr: from.0, size: from.1, time: self.now });
        self.apply(What::RemapEnd { tid, addr: to.0, size: to.1, stack, time: self.now });
    }

    fn brk(&mut self, addr: u64, stack: u64, in_allocator: bool) {
        self.apply(What::Brk { addr, stack, time: self.now, in_allocator });
    }

    fn stack_record(&mut self, id: u64, frames: &[u64]) {
        let bytes: Vec<u8> = frames.iter().rev().flat_map(|frame| frame.to_ne_bytes()).collect();
        let frames = Frames::from_bytes(&bytes);
        self.apply(What::Stack { id, end: StackEnd::Complete, op: 1, by_frame_pointers: false, frames });
    }

    /// Bytes and count of a stack of a process, all resources together.
    fn of(&self, tgid: u32, id: u64) -> (u64, u64) {
        let process = self.ledger.process(tgid).expect("a known process");
        let stacks = process.stacks().filter(|stack| stack.id == id);
        stacks.fold((0, 0), |sum, s| (sum.0 + s.history.live_bytes(), sum.1 + s.history.live_count()))
    }

    fn live(&self, id: u64) -> (u64, u64) {
        self.of(P, id)
    }

    fn oldest(&self, id: u64) -> Option<Window> {
        let process = self.ledger.process(P).expect("a known process");
        process.stacks().find(|stack| stack.id == id).and_then(|stack| stack.history.oldest_birth())
    }
}

/// A block is live from malloc to free; a free of something older than the trace is counted and changes nothing.
#[test]
fn malloc_and_free() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.alloc(0x20, 50, 1);
    assert_eq!(case.live(1), (150, 2));
    case.free(0x10);
    case.free(0x999);
    case.free(0);
    assert_eq!(case.live(1), (50, 1));
    assert_eq!(
        case.ledger.counters(),
        Counters { blocks: 2, ended: 1, free_of_unknown: 2, stacks_missing: 1, ..Counters::default() }
    );
    assert_eq!(case.ledger.live_blocks(), 1);
}

/// An address that is handed out again while a block is live there shows that its free was missed.
#[test]
fn address_handed_out_again_ends_the_old_block() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.alloc(0x10, 7, 2);
    assert_eq!((case.live(1), case.live(2)), ((0, 0), (7, 1)));
    assert_eq!(case.ledger.counters().replaced, 1);
}

/// The same address in two processes is two blocks.
#[test]
fn processes_do_not_mix() {
    let mut case = Case::new();
    case.ledger.add_process(11, 1, case.now);
    case.alloc(0x10, 100, 1);
    case.ledger.apply(&Event {
        tgid: 11,
        what: What::Alloc { addr: 0x10, size: 7, stack: 1, time: case.now, interval: Interval::EXACT },
    });
    case.free(0x10);
    assert_eq!((case.of(P, 1), case.of(11, 1)), ((0, 0), (7, 1)));
    case.ledger.apply(&Event { tgid: 12, what: What::Free { addr: 0x10, time: case.now } });
    assert_eq!(case.ledger.counters().unknown_process, 1);
}

/// A block that realloc makes larger keeps its birth; its stack becomes that of the realloc.
#[test]
fn realloc_keeps_the_birth() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.wait(5 * SECOND);
    case.alloc(0x90, 1, 2);
    case.realloc_begin(7, 0x10);
    assert_eq!(case.live(1), (100, 1), "counted until realloc has ended");
    case.realloc_end(7, 0x20, 300, 1);
    assert_eq!((case.live(1), case.oldest(1)), ((300, 1), Some(0)));
    case.realloc_begin(7, 0x20);
    case.realloc_end(7, 0x20, 400, 2);
    assert_eq!((case.live(1), case.live(2), case.ledger.live_blocks()), ((0, 0), (401, 2), 2));
    case.free(0x20);
    assert_eq!(case.live(2), (1, 1));
}

/// While a block is resized its stack's floor shows no dip.
#[test]
fn realloc_leaves_the_floor_alone() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.wait(SECOND);
    for n in 1..20 {
        case.realloc_begin(7, 0x10 * n);
        case.realloc_end(7, 0x10 * (n + 1), 100 + n, 1);
    }
    case.wait(SECOND);
    case.ledger.roll(case.now);
    let process = case.ledger.process(P).expect("a known process");
    let floors = process.stacks().next().expect("one stack").history.floors(0);
    assert_eq!(floors.last(), Some(&100));
}

/// A block that is freed makes the floor dip, also if another one of the same age is resized right after (the dip was hidden).
#[test]
fn realloc_after_a_free_leaves_the_dip() {
    let mut case = Case::new();
    case.alloc(0x10, 1000, 1);
    case.alloc(0x20, 100, 1);
    case.wait(SECOND);
    case.free(0x10);
    case.realloc_begin(7, 0x20);
    case.realloc_end(7, 0x30, 2000, 1);
    case.wait(SECOND);
    case.ledger.roll(case.now);
    let process = case.ledger.process(P).expect("a known process");
    let history = process.stacks().next().expect("one stack").history;
    assert_eq!((history.floors(0).last(), history.live_bytes()), (Some(&100), 2000));
}

/// A realloc that fails leaves its block where it was.
#[test]
fn failed_realloc_puts_the_block_back() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.realloc_begin(7, 0x10);
    case.realloc_end(7, 0, 1 << 40, 2);
    assert_eq!(case.live(1), (100, 1));
    case.free(0x10);
    assert_eq!((case.live(1), case.ledger.live_blocks()), ((0, 0), 0));
}

/// realloc to zero bytes frees, and of an unknown block counts as a free of one.
#[test]
fn realloc_to_nothing_frees() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.realloc_begin(7, 0x10);
    case.realloc_end(7, 0, 0, 2);
    assert_eq!((case.live(1), case.ledger.live_blocks()), ((0, 0), 0));
    case.realloc_begin(7, 0x10);
    case.realloc_end(7, 0, 0, 2);
    assert_eq!(case.ledger.counters().free_of_unknown, 1);
}

/// Another thread is handed the address of a block while realloc has it; both stay what they are.
#[test]
fn address_can_be_reused_during_realloc() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.realloc_begin(7, 0x10);
    case.alloc(0x10, 8, 2);
    case.realloc_end(7, 0x20, 200, 1);
    assert_eq!((case.live(1), case.live(2)), ((200, 1), (8, 1)));
    // And where the realloc claims to have failed after that, the old block cannot be there any more.
    case.realloc_begin(7, 0x20);
    case.alloc(0x20, 9, 2);
    case.realloc_end(7, 0, 300, 1);
    assert_eq!((case.live(1), case.live(2)), ((0, 0), (17, 2)));
    assert_eq!(case.ledger.counters().replaced, 1);
}

/// Reallocs of two threads at the same time do not disturb each other.
#[test]
fn reallocs_of_threads_are_apart() {
    let mut case = Case::new();
    case.alloc(0x10, 1, 1);
    case.alloc(0x20, 2, 2);
    case.realloc_begin(7, 0x10);
    case.realloc_begin(8, 0x20);
    case.realloc_end(7, 0x20, 10, 1);
    case.realloc_end(8, 0x10, 20, 2);
    assert_eq!((case.live(1), case.live(2)), ((10, 1), (20, 1)));
}

/// A thread's next realloc shows that the end of its last was lost: that block counts as freed.
#[test]
fn lost_end_of_realloc_is_no_leak() {
    let mut case = Case::new();
    case.alloc(0x10, 1, 1);
    case.alloc(0x20, 2, 2);
    case.realloc_begin(7, 0x10);
    case.realloc_begin(7, 0x20);
    case.realloc_end(7, 0x30, 5, 2);
    assert_eq!((case.live(1), case.live(2), case.ledger.live_blocks()), ((0, 0), (5, 1), 1));
    case.alloc(0x40, 1, 1);
    case.realloc_begin(7, 0x40);
    case.realloc_begin(7, 0x999);
    assert_eq!((case.live(1), case.ledger.counters().pending_replaced), ((0, 0), 2));
}

/// realloc of a block older than the trace is an allocation.
#[test]
fn realloc_of_an_unknown_block_is_born_now() {
    let mut case = Case::new();
    case.wait(3 * SECOND);
    case.realloc_begin(7, 0x10);
    case.realloc_end(7, 0x20, 64, 1);
    assert_eq!((case.live(1), case.oldest(1)), ((64, 1), Some(3)));
}

/// A missed free ends the block that was live then, and not one that was born since.
#[test]
fn missed_frees() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    let freed = case.now + 8 * MS;
    case.ledger.missed_free(P, 0x10, freed);
    assert_eq!(case.live(1), (0, 0));
    case.wait(20 * MS);
    case.alloc(0x10, 100, 1);
    case.ledger.missed_free(P, 0x10, freed);
    case.ledger.missed_free(P, 0x77, freed);
    assert_eq!(case.live(1), (100, 1));
    let counters = case.ledger.counters();
    assert_eq!((counters.missed_free_applied, counters.missed_free_stale), (1, 2));
}

/// A missed free ends a block that was born in the same tick, before or after it: nobody knows, and only the other mistake would
/// make a leak. One tick later it is another block.
#[test]
fn missed_free_in_the_tick_of_the_birth() {
    const TICK: u64 = clock::TICK_NS;
    let mut case = Case::new();
    case.wait(10 * TICK);
    case.alloc(0x10, 100, 1);
    // Within the tick, also where the clock says that the free came first.
    case.ledger.missed_free(P, 0x10, case.now);
    assert_eq!(case.live(1), (0, 0));
    case.wait(TICK / 2);
    case.alloc(0x10, 100, 1);
    case.ledger.missed_free(P, 0x10, case.now - TICK / 2);
    assert_eq!(case.live(1), (0, 0));
    case.alloc(0x10, 100, 1);
    case.ledger.missed_free(P, 0x10, case.now - TICK / 2 - 1);
    assert_eq!(case.live(1), (100, 1), "born in the next tick");
}

/// After frees were lost, what was live then is in no history, also if its record comes late; what is born later is.
#[test]
fn distrust_takes_the_living_out() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.alloc(0x20, 10, 1);
    case.alloc(0x30, 30, 1);
    case.map(PAGE, PAGE, 2);
    case.realloc_begin(7, 0x20);
    case.wait(SECOND);
    case.ledger.distrust(case.now);
    case.apply(What::Alloc { addr: 0x40, size: 1000, stack: 1, time: case.now - 10 * MS, interval: Interval::EXACT });
    case.wait(SECOND);
    case.alloc(0x50, 5, 1);
    assert_eq!((case.live(1), case.live(2)), ((5, 1), (0, 0)));
    let distrusted = |case: &Case| case.ledger.counters().distrusted;
    assert_eq!(distrusted(&case), Total { bytes: 100 + 10 + 30 + PAGE + 1000, count: 5 });
    // What realloc returns lives for certain, and is born now.
    case.realloc_end(7, 0x20, 20, 1);
    assert_eq!((case.live(1), case.oldest(1)), ((25, 2), Some(2)));
    // The free of one of them is no free of an unknown block.
    case.free(0x10);
    case.unmap(7, PAGE, PAGE);
    assert_eq!(distrusted(&case), Total { bytes: 1030, count: 2 });
    assert_eq!(case.ledger.counters().free_of_unknown, 0);
}

/// A single block whose free would not be told is taken out, once, and only if it is not younger than that was known.
#[test]
fn distrust_of_one_block() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.alloc(0x20, 30, 1);
    case.wait(SECOND);
    let then = case.now;
    case.wait(SECOND);
    case.alloc(0x30, 5, 1);
    assert_eq!(case.ledger.trusted_addresses(P, then).len(), 2);
    for addr in [0x10, 0x10, 0x30, 0x40] {
        case.ledger.distrust_block(P, addr, then);
    }
    assert_eq!((case.live(1), case.ledger.counters().unfollowed), ((35, 2), 1));
    assert_eq!(case.ledger.counters().distrusted, Total { bytes: 100, count: 1 });
    assert_eq!(case.ledger.trusted_addresses(P, then), [0x20]);
    case.free(0x10);
    assert_eq!((case.ledger.counters().distrusted, case.ledger.live_blocks()), (Total::default(), 2));
}

/// The lost end of a realloc ends the block that it was called with, and not that of a later call of the same thread.
#[test]
fn missed_realloc_ends() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.alloc(0x20, 30, 1);
    case.realloc_begin(7, 0x10);
    case.wait(20 * MS);
    let ended = case.now;
    case.ledger.missed_realloc_end(P, 8, ended);
    assert_eq!(case.live(1), (130, 2), "another thread's");
    case.ledger.missed_realloc_end(P, 7, ended);
    assert_eq!((case.live(1), case.ledger.counters().pending_replaced), ((30, 1), 1));
    case.wait(20 * MS);
    case.realloc_begin(7, 0x20);
    case.ledger.missed_realloc_end(P, 7, ended);
    assert_eq!(case.live(1), (30, 1), "begun since");
    case.realloc_end(7, 0x30, 40, 1);
    assert_eq!((case.live(1), case.ledger.live_blocks()), ((40, 1), 1));
}

/// Where it is known whose free was lost, the other processes' live sets are as good as before.
#[test]
fn distrust_of_one_process() {
    let mut case = Case::new();
    let other = P + 1;
    case.ledger.add_process(other, 0, case.now);
    case.alloc(0x10, 100, 1);
    let alloc = |case: &mut Case, tgid: u32, addr: u64, time: u64| {
        case.ledger
            .apply(&Event { tgid, what: What::Alloc { addr, size: 10, stack: 1, time, interval: Interval::EXACT } });
    };
    let now = case.now;
    alloc(&mut case, other, 0x10, now);
    case.wait(SECOND);
    case.ledger.distrust_process(P, case.now);
    case.ledger.distrust_process(P + 2, case.now);
    let late = case.now - 10 * MS;
    alloc(&mut case, P, 0x20, late);
    alloc(&mut case, other, 0x20, late);
    case.wait(SECOND);
    let now = case.now;
    alloc(&mut case, P, 0x30, now);
    let live = |tgid: u32| {
        let process = case.ledger.process(tgid).expect("a known process");
        (process.live(), process.distrusted())
    };
    let total = |bytes, count| Total { bytes, count };
    assert_eq!(live(P), (total(10, 1), total(110, 2)));
    assert_eq!(live(other), (total(20, 2), total(0, 0)));
    assert_eq!(case.ledger.counters().distrusts, 1, "of an unknown process nothing is live");
}

/// A mapping is counted by whole pages; unmapping it ends it. Files are apart from anonymous memory.
#[test]
fn mmap_and_munmap() {
    let mut case = Case::new();
    case.map(16 * PAGE, PAGE + 1, 1);
    let what = What::Map { addr: 32 * PAGE, size: 1, stack: 1, time: case.now, file: true, in_allocator: false };
    case.apply(what);
    let process = case.ledger.process(P).expect("a known process");
    let stacks: Vec<_> = process.stacks().map(|s| (s.resource, s.file, s.history.live_bytes())).collect();
    assert_eq!(stacks, [(Resource::Mmap, false, 2 * PAGE), (Resource::Mmap, true, PAGE)]);
    case.unmap(7, 16 * PAGE, PAGE + 1);
    case.unmap(7, 32 * PAGE, PAGE);
    assert_eq!(case.live(1), (0, 0));
}

/// munmap takes the middle of a range, parts of several, or something that nobody knows.
#[test]
fn partial_munmap() {
    let mut case = Case::new();
    case.map(10 * PAGE, 10 * PAGE, 1);
    case.unmap(7, 13 * PAGE, 2 * PAGE);
    assert_eq!(case.live(1), (8 * PAGE, 2), "two ranges are left");
    case.map(20 * PAGE, 4 * PAGE, 2);
    case.unmap(7, 18 * PAGE, 3 * PAGE);
    assert_eq!((case.live(1), case.live(2)), ((6 * PAGE, 2), (3 * PAGE, 1)));
    case.unmap(7, 100 * PAGE, 50 * PAGE);
    case.unmap(7, 0, u64::MAX);
    assert_eq!((case.live(1), case.live(2)), ((0, 0), (0, 0)));
}

/// An unmapping that failed is undone, but not over what another thread mapped there meanwhile.
#[test]
fn failed_munmap_is_undone() {
    let mut case = Case::new();
    case.map(10 * PAGE, 10 * PAGE, 1);
    case.wait(SECOND);
    case.unmap(7, 12 * PAGE, 6 * PAGE);
    case.map(14 * PAGE, PAGE, 2);
    case.apply(What::UnmapFailed { tid: 8 });
    assert_eq!(case.live(1).0, 4 * PAGE, "another thread's failure");
    case.apply(What::UnmapFailed { tid: 7 });
    assert_eq!((case.live(1).0, case.live(2), case.oldest(1)), (9 * PAGE, (PAGE, 1), Some(0)));
    case.apply(What::UnmapFailed { tid: 7 });
    assert_eq!(case.live(1).0, 9 * PAGE, "once only");
}

/// A mapping over others (`MAP_FIXED`) ends what it covers; so does one that the allocator makes, which is not counted.
#[test]
fn mapping_over_a_mapping() {
    let mut case = Case::new();
    case.map(10 * PAGE, 10 * PAGE, 1);
    case.map(12 * PAGE, 2 * PAGE, 2);
    let what = What::Map { addr: 16 * PAGE, size: PAGE, stack: 3, time: case.now, file: false, in_allocator: true };
    case.apply(what);
    assert_eq!((case.live(1), case.live(2)), ((7 * PAGE, 3), (2 * PAGE, 1)));
    assert_eq!(case.ledger.process(P).expect("a known process").stacks().count(), 2);
}

/// What mremap moves keeps its birth, what it adds is born now, and what it leaves out is gone.
#[test]
fn mremap_keeps_the_birth() {
    let mut case = Case::new();
    case.map(10 * PAGE, 2 * PAGE, 1);
    case.wait(3 * SECOND);
    case.remap(7, (10 * PAGE, 2 * PAGE), (50 * PAGE, 5 * PAGE), 1);
    let process = case.ledger.process(P).expect("a known process");
    let history = process.stacks().next().expect("one stack").history;
    let by_window: Vec<u64> = history.cohorts(0).iter().map(|cohort| cohort.bytes).collect();
    assert_eq!(by_window, [2 * PAGE, 0, 0, 3 * PAGE]);
    case.remap(7, (50 * PAGE, 5 * PAGE), (50 * PAGE, PAGE), 1);
    assert_eq!((case.live(1), case.oldest(1)), ((PAGE, 1), Some(0)));
    case.unmap(7, 10 * PAGE, 40 * PAGE);
    assert_eq!(case.live(1), (PAGE, 1), "the old place is empty");
}

/// An mremap that failed leaves its range where it was.
#[test]
fn failed_mremap_puts_the_range_back() {
    let mut case = Case::new();
    case.map(10 * PAGE, 4 * PAGE, 1);
    case.remap(7, (11 * PAGE, PAGE), (0, 8 * PAGE), 2);
    assert_eq!(case.live(1).0, 4 * PAGE);
    case.unmap(7, 11 * PAGE, PAGE);
    assert_eq!(case.live(1), (3 * PAGE, 2));
}

/// The break's growth is a range; what the allocator adds is not; shrinking cuts.
#[test]
fn program_break() {
    let mut case = Case::new();
    case.ledger.set_break(P, 10 * PAGE + 5);
    case.brk(13 * PAGE - 1, 1, false);
    assert_eq!(case.live(1), (2 * PAGE, 1));
    case.brk(13 * PAGE - 1, 1, false);
    case.brk(20 * PAGE, 1, true);
    case.brk(21 * PAGE, 2, false);
    assert_eq!((case.live(1), case.live(2)), ((2 * PAGE, 1), (PAGE, 1)));
    case.brk(12 * PAGE, 1, true);
    assert_eq!((case.live(1), case.live(2)), ((PAGE, 1), (0, 0)));
}

/// Where the break stands is not known until it moves: the first movement is no growth.
#[test]
fn unknown_break_is_learnt() {
    let mut case = Case::new();
    case.brk(1000 * PAGE, 1, false);
    assert_eq!(case.live(1), (0, 0));
    case.brk(1001 * PAGE, 1, false);
    assert_eq!(case.live(1), (PAGE, 1));
}

/// exec drops everything but the process; exit keeps what a report is about.
#[test]
fn exec_and_exit() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.map(PAGE, PAGE, 1);
    case.apply(What::Exec { tid: P, time: case.now });
    assert_eq!(case.ledger.process(P).expect("still there").stacks().count(), 0);
    assert_eq!(case.ledger.live_blocks(), 0);
    case.alloc(0x10, 7, 1);
    case.apply(What::Exit { tid: P, time: case.now });
    assert_eq!((case.live(1), case.ledger.process(P).map(ProcessLedger::leader_exited)), ((7, 1), Some(true)));
    case.ledger.remove_process(P);
    assert!(case.ledger.process(P).is_none());
    assert_eq!(case.ledger.live_blocks(), 0);
}

/// A later process of the same tgid starts empty; the same one told of twice keeps what it has.
#[test]
fn reused_tgid_is_another_process() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.ledger.add_process(P, 1, case.now);
    assert_eq!(case.live(1), (100, 1));
    case.ledger.add_process(P, 2, case.now);
    assert_eq!((case.live(1), case.ledger.live_blocks()), ((0, 0), 0));
}

/// A traced child starts with its parent's memory, without what the parent's other threads are about to resize.
#[test]
fn fork_copies() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    case.alloc(0x20, 10, 1);
    case.realloc_begin(7, 0x20);
    case.apply(What::Fork { child: 11, time: case.now });
    assert!(case.ledger.process(11).is_none(), "whether it is traced others know");
    case.ledger.fork_process(P, 11, 5, case.now);
    case.free(0x10);
    assert_eq!((case.of(11, 1), case.live(1)), ((100, 1), (10, 1)));
    assert_eq!(case.ledger.live_blocks(), 2);
}

/// A stack's record may come after what names it.
#[test]
fn late_stack_record() {
    let mut case = Case::new();
    case.alloc(0x10, 100, 1);
    assert_eq!(case.ledger.counters().stacks_missing, 1);
    case.stack_record(1, &[0x400, 0x500]);
    case.stack_record(1, &[0x666]);
    let process = case.ledger.process(P).expect("a known process");
    let stack = process.stacks().next().expect("one stack");
    assert_eq!((stack.frames, stack.end, stack.op), (&[0x400, 0x500][..], StackEnd::Complete, 1));
    assert_eq!(case.ledger.counters().stacks_missing, 0);
}

/// The same addresses under a new id are the same stack, unless code was mapped over one of them.
#[test]
fn renamed_stack_stays_one() {
    let mut case = Case::new();
    case.stack_record(1, &[0x40_0000, 0x7000_0100]);
    case.alloc(0x10, 100, 1);
    case.apply(What::MapExec { addr: 0x7000_1000, size: 1, time: case.now });
    case.stack_record(2, &[0x40_0000, 0x7000_0100]);
    case.alloc(0x20, 10, 2);
    assert_eq!(case.live(1), (110, 2));
    case.apply(What::MapExec { addr: 0x7000_0000, size: 0x101, time: case.now });
    case.stack_record(3, &[0x40_0000, 0x7000_0100]);
    case.alloc(0x30, 1, 3);
    assert_eq!((case.live(1), case.live(3)), ((110, 2), (1, 1)));
}

/// Names that come and go with every mapping of code do not pile up.
#[test]
fn old_names_are_dropped() {
    let mut case = Case::new();
    for id in 1..100_000 {
        case.stack_record(id, &[0x400, 0x500]);
        case.alloc(16 * id, 1, id);
    }
    assert_eq!(case.live(1), (99_999, 99_999));
    assert_eq!(case.ledger.process(P).expect("a known process").stacks().count(), 1);
}

/// At each cap what is new is left out and counted, and what ends still ends.
#[test]
fn caps() {
    let mut case = Case::with(Config { max_stacks: 2, max_live: 3, max_ranges: 1, page_size: PAGE });
    case.alloc(0x10, 1, 1);
    case.alloc(0x20, 1, 2);
    case.alloc(0x10, 1, 3);
    case.stack_record(4, &[1]);
    assert_eq!((case.live(1), case.ledger.counters().stacks_capped), ((0, 0), 2));
    case.alloc(0x30, 1, 1);
    case.alloc(0x40, 1, 1);
    case.alloc(0x50, 1, 1);
    assert_eq!((case.ledger.live_blocks(), case.ledger.counters().live_capped), (3, 1));
    case.alloc(0x30, 9, 2);
    case.realloc_begin(7, 0x30);
    case.realloc_end(7, 0x60, 10, 2);
    assert_eq!((case.live(2), case.ledger.live_blocks()), ((11, 2), 3));
    case.map(PAGE, PAGE, 1);
    assert_eq!(case.ledger.counters().stacks_capped, 3, "a stack for another resource is one more");
    assert_eq!(case.ledger.live_blocks(), 3);
}

/// Events in batches do what they do one by one.
#[test]
fn batches_change_nothing() {
    let (mut single, mut batched) = (Case::new(), Case::new());
    let events: Vec<Event<'_>> = (0..1000_u64)
        .flat_map(|n| {
            let (addr, time) = (16 + n * 7 % 64 * 16, 50 * SECOND + n * MS);
            let alloc = What::Alloc { addr, size: n, stack: n % 5, time, interval: Interval::EXACT };
            let free = What::Free { addr: 16 + n * 11 % 64 * 16, time };
            let other = Event { tgid: 99, what: free };
            [Event { tgid: P, what: alloc }, Event { tgid: P, what: free }, other]
        })
        .collect();
    for event in &events {
        single.ledger.apply(event);
    }
    batched.ledger.apply_batch(&events);
    (0..5).for_each(|id| assert_eq!(single.live(id), batched.live(id)));
    assert_eq!(single.ledger.counters(), batched.ledger.counters());
    assert_eq!(single.ledger.counters().unknown_process, 1000);
}

/// Records do what their events do one by one, wherever batches end and whatever cannot be decoded between them.
#[test]
fn records_are_applied_in_order() {
    let record = |n: u64| {
        let (addr, time) = (16 + n * 7 % 8 * 16, 50 * SECOND + n * MS);
        let (kind, numbers) = match n % 5 {
            0..3 => (kind::ALLOC, vec![addr, n, n % 5, time]),
            3 => (kind::FREE, vec![addr, time]),
            _ => (u8::MAX, vec![]),
        };
        let head = [kind, 0, 0, 0].into_iter().chain(P.to_ne_bytes());
        head.chain(numbers.into_iter().flat_map(u64::to_ne_bytes)).collect::<Vec<u8>>()
    };
    for count in [0, 1, 31, 39, 40, 41, 79, 80, 81, 120, 1000] {
        let (mut single, mut batched) = (Case::new(), Case::new());
        let records: Vec<Vec<u8>> = (0..count).map(record).collect();
        let events: Vec<Event<'_>> = records.iter().filter_map(|record| decode(record).ok()).collect();
        for event in &events {
            single.ledger.apply(event);
        }
        let undecodable = batched.ledger.apply_records(records.iter().map(|record| &record[..]));
        assert_eq!(undecodable, count / 5);
        (0..5).for_each(|id| assert_eq!(single.live(id), batched.live(id), "{count} records"));
        assert_eq!(single.ledger.counters(), batched.ledger.counters(), "{count} records");
        assert!(count < 8 || single.ledger.counters().replaced > 0, "the order of events shows");
    }
}

/// Sizes beyond any address space do not overflow.
#[test]
fn absurd_sizes() {
    let mut case = Case::new();
    for n in 1..10 {
        case.alloc(16 * n, u64::MAX, 1);
        case.map(n * PAGE, u64::MAX, 1);
        case.brk(u64::MAX - n, 1, false);
        case.remap(7, (0, u64::MAX), (PAGE, u64::MAX), 1);
        case.unmap(7, PAGE, u64::MAX);
    }
    (1..10).for_each(|n| case.free(16 * n));
    assert_eq!(case.ledger.live_blocks(), 0);
}

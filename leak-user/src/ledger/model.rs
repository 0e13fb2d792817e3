//! The ledger against a naive model of the same rules: maps of blocks, and ranges page by page.

use std::collections::{BTreeMap, HashMap};

use leak_common::sampling::Interval;
use proptest::prelude::*;

use super::clock::TICK_NS;
use super::{Config, Ledger, Resource, Total};
use crate::decode::{Event, What};

const PAGE: u64 = 4096;
const SECOND: u64 = 1_000_000_000;

#[derive(Clone, Copy)]
struct Block {
    size: u64,
    /// `None`: distrusted.
    stack: Option<u64>,
    birth: u64,
    interval: Interval,
}

impl Block {
    /// How many blocks: one over the probability that it was sampled with.
    fn stands_for(&self) -> f64 {
        if self.interval.is_exact() {
            return 1.0;
        }
        -1.0 / (-(self.size.max(1) as f64) / self.interval.bytes() as f64).exp_m1()
    }

    fn bytes(&self) -> u64 {
        (self.size as f64 * self.stands_for()).round() as u64
    }
}

#[derive(Clone, Copy)]
struct Page {
    stack: Option<u64>,
    birth: u64,
    file: bool,
    /// Which range it is of: adjacent pages of one range are one.
    range: u64,
}

/// Adjacent pages of one range, by page number.
type Run = Vec<(u64, Page)>;

fn runs(pages: impl IntoIterator<Item = (u64, Page)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (number, page) in pages {
        match runs.last_mut().and_then(|run| run.last().copied().map(|last| (run, last))) {
            Some((run, (before, last))) if before + 1 == number && last.range == page.range => run.push((number, page)),
            _ => runs.push(vec![(number, page)]),
        }
    }
    runs
}

#[derive(Clone, Default)]
struct Process {
    blocks: HashMap<u64, Block>,
    /// Address, block, and when it began.
    resizing: HashMap<u32, (u64, Block, u64)>,
    pages: BTreeMap<u64, Page>,
    unmapped: HashMap<u32, Vec<Run>>,
    moving: HashMap<u32, (u64, u64, Vec<Run>)>,
    program_break: Option<u64>,
    distrusted_until: Option<u64>,
}

#[derive(Default)]
struct Model {
    processes: HashMap<u32, Process>,
    origin: u64,
    distrusted_until: Option<u64>,
    next_range: u64,
}

/// What each stack holds, by window of birth. The key's resource: heap, anonymous, file.
type Totals = BTreeMap<(u64, u8), BTreeMap<u32, Total>>;

fn add(to: &mut Total, bytes: u64) {
    to.bytes += bytes;
    to.count += 1;
}

impl Process {
    fn cut(&mut self, from: u64, to: u64) -> Vec<Run> {
        let cut = runs((from..to).filter_map(|number| self.pages.get(&number).map(|page| (number, *page))));
        self.pages.retain(|number, _| !(from..to).contains(number));
        cut
    }

    fn live_blocks(&self) -> impl Iterator<Item = &Block> {
        self.blocks.values().chain(self.resizing.values().map(|(_, block, _)| block))
    }

    /// Blocks that a stack's blocks stand for.
    fn estimated_count(&self, stack: u64) -> f64 {
        self.live_blocks().filter(|block| block.stack == Some(stack)).map(Block::stands_for).sum()
    }

    /// What each stack holds, and what is distrusted.
    fn totals(&self) -> (Totals, Total) {
        let (mut totals, mut distrusted) = (Totals::new(), Total::default());
        let mut count = |stack: Option<u64>, class: u8, birth: u64, bytes: u64| match stack {
            Some(id) => {
                add(
                    totals.entry((id, class)).or_default().entry((birth * TICK_NS / SECOND) as u32).or_default(),
                    bytes,
                );
            }
            None => add(&mut distrusted, bytes),
        };
        let mut unknown = Total::default();
        for block in self.live_blocks() {
            if block.stack.is_some() {
                count(block.stack, 0, block.birth, block.bytes());
            } else {
                unknown.bytes += block.bytes();
                unknown.count += block.stands_for().round() as u64;
            }
        }
        let live = runs(self.pages.iter().map(|(number, page)| (*number, *page)));
        for run in live.iter().chain(self.moving.values().flat_map(|(_, _, runs)| runs)) {
            let page = run[0].1;
            count(page.stack, 1 + u8::from(page.file), page.birth, run.len() as u64 * PAGE);
        }
        distrusted.bytes += unknown.bytes;
        distrusted.count += unknown.count;
        (totals, distrusted)
    }
}

impl Model {
    fn tick(&self, time: u64) -> u64 {
        time.saturating_sub(self.origin) / TICK_NS
    }

    fn range(&mut self) -> u64 {
        self.next_range += 1;
        self.next_range
    }

    fn map(&mut self, tgid: u32, from: u64, to: u64, new: Option<Page>) {
        let process = self.processes.get_mut(&tgid).expect("a known process");
        process.cut(from, to);
        if let Some(new) = new {
            process.pages.extend((from..to).map(|number| (number, new)));
        }
    }

    /// Puts runs back where nothing is.
    fn put_back(&mut self, tgid: u32, runs: Vec<Run>) {
        for run in runs {
            let range = self.range();
            let process = self.processes.get_mut(&tgid).expect("a known process");
            for (number, page) in run {
                process.pages.entry(number).or_insert(Page { range, ..page });
            }
        }
    }

    fn remap_end(&mut self, tgid: u32, tid: u32, at: Option<u64>, length: u64, stack: Option<u64>, now: u64) {
        let process = self.processes.get_mut(&tgid).expect("a known process");
        process.unmapped.remove(&tid);
        let (from, to, old) = process.moving.remove(&tid).unwrap_or_default();
        let Some(at) = at else {
            return self.put_back(tgid, old);
        };
        process.cut(at, at + length);
        let file = old.last().is_some_and(|run| run[0].1.file);
        let mut ranges: HashMap<u64, u64> = HashMap::new();
        let mut growth = None;
        for offset in 0..length {
            let moved = old.iter().enumerate().find_map(|(n, run)| {
                let page = run.iter().find(|(number, page)| *number == from + offset && page.stack.is_some())?.1;
                (from + offset < to).then_some((n as u64, page))
            });
            let page = if let Some((run, page)) = moved {
                growth = None;
                let range = *ranges.entry(run).or_insert_with(|| self.range());
                Page { stack, range, ..page }
            } else {
                let range = *growth.get_or_insert_with(|| self.range());
                Page { stack, birth: now, file, range }
            };
            self.processes.get_mut(&tgid).expect("a known process").pages.insert(at + offset, page);
        }
    }

    fn apply(&mut self, event: &Event<'_>, time: u64) {
        let tick = self.tick(time);
        let tgid = event.tgid;
        let range = self.next_range + 1;
        self.next_range = range;
        let Some(process) = self.processes.get_mut(&tgid) else { return };
        let until = self.distrusted_until.max(process.distrusted_until);
        let trusted = |stack: u64| until.is_none_or(|until| tick > until).then_some(stack);
        match event.what {
            What::Alloc { addr, size, stack, interval, .. } => {
                process.blocks.insert(addr, Block { size, stack: trusted(stack), birth: tick, interval });
            }
            What::Free { addr, .. } => drop(process.blocks.remove(&addr)),
            What::ReallocBegin { tid, addr, .. } => {
                process.resizing.remove(&tid);
                if let Some(block) = process.blocks.remove(&addr) {
                    process.resizing.insert(tid, (addr, block, tick));
                }
            }
            What::ReallocEnd { tid, addr, size, stack, interval, .. } => {
                let old = process.resizing.remove(&tid);
                if addr != 0 {
                    let birth = old.filter(|(_, old, _)| old.stack.is_some()).map_or(tick, |(_, old, _)| old.birth);
                    process.blocks.insert(addr, Block { size, stack: trusted(stack), birth, interval });
                } else if let Some((addr, block, _)) = old
                    && size != 0
                {
                    process.blocks.entry(addr).or_insert(block);
                }
            }
            What::Map { addr, size, stack, file, in_allocator, .. } => {
                let new = Page { stack: trusted(stack), birth: tick, file, range };
                self.map(tgid, addr / PAGE, (addr + size).div_ceil(PAGE), (!in_allocator).then_some(new));
            }
            What::Unmap { tid, addr, size, .. } => {
                process.moving.remove(&tid);
                let cut = process.cut(addr / PAGE, (addr + size).div_ceil(PAGE));
                process.unmapped.insert(tid, cut);
            }
            What::UnmapFailed { tid } => {
                process.moving.remove(&tid);
                let cut = process.unmapped.remove(&tid).unwrap_or_default();
                self.put_back(tgid, cut);
            }
            What::RemapBegin { tid, addr, size, .. } => {
                process.unmapped.remove(&tid);
                let (from, to) = (addr / PAGE, (addr + size).div_ceil(PAGE));
                let cut = process.cut(from, to);
                process.moving.insert(tid, (from, to, cut));
            }
            What::RemapEnd { tid, addr, size, stack, .. } => {
                let stack = trusted(stack);
                let at = (addr != 0).then_some(addr / PAGE);
                self.remap_end(tgid, tid, at, size.div_ceil(PAGE), stack, tick);
            }
            What::Brk { addr, stack, in_allocator, .. } => {
                let new = addr.div_ceil(PAGE);
                if let Some(old) = process.program_break.replace(new) {
                    let grown = Page { stack: trusted(stack), birth: tick, file: false, range };
                    if new < old {
                        self.map(tgid, new, old, None);
                    } else if !in_allocator {
                        self.map(tgid, old, new, Some(grown));
                    }
                }
            }
            What::Exec { .. } => {
                *process = Process { distrusted_until: process.distrusted_until, ..Process::default() };
            }
            _ => {}
        }
    }

    fn missed_free(&mut self, tgid: u32, addr: u64, time: u64) {
        let tick = self.tick(time);
        if let Some(process) = self.processes.get_mut(&tgid)
            && process.blocks.get(&addr).is_some_and(|block| block.birth <= tick)
        {
            process.blocks.remove(&addr);
        }
    }

    fn missed_realloc_end(&mut self, tgid: u32, tid: u32, time: u64) {
        let tick = self.tick(time);
        if let Some(process) = self.processes.get_mut(&tgid)
            && process.resizing.get(&tid).is_some_and(|(_, _, begun)| *begun <= tick)
        {
            process.resizing.remove(&tid);
        }
    }

    /// Of one process, or of all.
    fn distrust(&mut self, of: Option<u32>, time: u64) {
        let until = self.tick(time);
        if of.is_none() {
            self.distrusted_until = self.distrusted_until.max(Some(until));
        }
        let concerned = self.processes.iter_mut().filter(|(tgid, _)| of.is_none_or(|of| of == **tgid));
        for (_, process) in concerned {
            process.distrusted_until = process.distrusted_until.max(Some(until));
            let until = process.distrusted_until.unwrap_or(until);
            let resizing = process.resizing.values_mut().map(|(_, block, _)| block);
            let blocks = process.blocks.values_mut().chain(resizing);
            blocks.filter(|block| block.birth <= until).for_each(|block| block.stack = None);
            let kept = process.unmapped.values_mut().chain(process.moving.values_mut().map(|(_, _, runs)| runs));
            let pages = process.pages.values_mut().chain(kept.flatten().flatten().map(|(_, page)| page));
            pages.filter(|page| page.birth <= until).for_each(|page| page.stack = None);
        }
    }

    fn fork(&mut self, parent: u32, child: u32) {
        if self.processes.contains_key(&child) {
            return;
        }
        let mut copy = self.processes.get(&parent).cloned().unwrap_or_default();
        copy.resizing.clear();
        copy.unmapped.clear();
        copy.moving.clear();
        self.processes.insert(child, copy);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Event(u32, What<'static>),
    MissedFree { tgid: u32, addr: u64, ago: u64 },
    MissedReallocEnd { tgid: u32, tid: u32, ago: u64 },
    Distrust { of: Option<u32>, ago: u64 },
    Fork { parent: u32, child: u32 },
    Remove { tgid: u32 },
    Roll,
}

/// Few addresses, threads and stacks, so that they meet. Times are set when the operations are played.
fn op() -> impl Strategy<Value = (u64, Op)> {
    let tgid = || 1_u32..4;
    let tid = || 1_u32..4;
    let addr = || (1_u64..10).prop_map(|n| n * 16);
    let maybe = || prop_oneof![1 => Just(0), 4 => (1_u64..10).prop_map(|n| n * 16)];
    let size = || prop_oneof![1 => Just(0_u64), 8 => 1_u64..1000];
    let stack = || 100_u64..104;
    // Exact, or with weights from a little more than one to many.
    let interval = || {
        prop_oneof![2 => Just(0), 1 => 4_u64..100_000].prop_map(|bytes| match bytes {
            0 => Interval::EXACT,
            bytes => Interval::near(bytes),
        })
    };
    let page = || (1_u64..40).prop_map(|n| n * PAGE);
    let maybe_page = || prop_oneof![1 => Just(0), 4 => (1_u64..40).prop_map(|n| n * PAGE)];
    let length = || 0_u64..12 * PAGE;
    let time = 0;
    let heap = prop_oneof![
        5 => (addr(), size(), stack(), interval())
            .prop_map(move |(addr, size, stack, interval)| What::Alloc { addr, size, stack, time, interval }),
        3 => addr().prop_map(move |addr| What::Free { addr, time }),
        3 => (tid(), maybe()).prop_map(move |(tid, addr)| What::ReallocBegin { tid, addr, time }),
        4 => (tid(), maybe(), size(), stack(), interval()).prop_map(move |(tid, addr, size, stack, interval)| {
            What::ReallocEnd { tid, addr, size, stack, time, interval }
        }),
    ];
    let ranges = prop_oneof![
        5 => (page(), length(), stack(), any::<bool>(), prop::bool::weighted(0.2)).prop_map(
            move |(addr, size, stack, file, in_allocator)| What::Map { addr, size, stack, time, file, in_allocator }
        ),
        4 => (tid(), page(), length()).prop_map(move |(tid, addr, size)| What::Unmap { tid, addr, size, time }),
        2 => tid().prop_map(|tid| What::UnmapFailed { tid }),
        3 => (tid(), page(), length()).prop_map(move |(tid, addr, size)| What::RemapBegin { tid, addr, size, time }),
        4 => (tid(), maybe_page(), length(), stack())
            .prop_map(move |(tid, addr, size, stack)| What::RemapEnd { tid, addr, size, stack, time }),
        3 => (20 * PAGE..50 * PAGE, stack(), any::<bool>())
            .prop_map(move |(addr, stack, in_allocator)| What::Brk { addr, stack, time, in_allocator }),
    ];
    let event = prop_oneof![10 => heap, 10 => ranges, 1 => Just(What::Exec { tid: 1, time })];
    let op = prop_oneof![
        60 => (tgid(), event).prop_map(|(tgid, what)| Op::Event(tgid, what)),
        3 => (tgid(), addr(), 0..SECOND).prop_map(|(tgid, addr, ago)| Op::MissedFree { tgid, addr, ago }),
        2 => (tgid(), tid(), 0..SECOND).prop_map(|(tgid, tid, ago)| Op::MissedReallocEnd { tgid, tid, ago }),
        1 => (prop::option::of(tgid()), 0..SECOND).prop_map(|(of, ago)| Op::Distrust { of, ago }),
        1 => (tgid(), tgid()).prop_map(|(parent, child)| Op::Fork { parent, child }),
        1 => tgid().prop_map(|tgid| Op::Remove { tgid }),
        1 => Just(Op::Roll),
    ];
    (0..100_000_000_u64, op)
}

/// The same event at another time.
fn at(what: What<'static>, now: u64) -> What<'static> {
    let mut what = what;
    match &mut what {
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
        | What::MapExec { time, .. } => *time = now,
        What::Stack { .. } | What::UnmapFailed { .. } => {}
    }
    what
}

fn same(ledger: &Ledger, model: &Model) -> Result<(), TestCaseError> {
    let (mut blocks, mut ranges) = (0, 0);
    prop_assert_eq!(ledger.processes().count(), model.processes.len());
    for (tgid, process) in &model.processes {
        let known = ledger.process(*tgid).expect("a process that the model knows");
        let (mut totals, distrusted) = process.totals();
        prop_assert_eq!(known.distrusted(), distrusted);
        for stack in known.stacks() {
            let class = if stack.resource == Resource::Heap { 0 } else { 1 + u8::from(stack.file) };
            let expected = totals.remove(&(stack.id, class)).unwrap_or_default();
            let (id, history) = (stack.id, stack.history);
            prop_assert_eq!(history.live_bytes(), expected.values().map(|t| t.bytes).sum::<u64>(), "bytes of {}", id);
            prop_assert_eq!(history.live_count(), expected.values().map(|t| t.count).sum::<u64>(), "count of {}", id);
            if stack.resource == Resource::Heap {
                let (found, expected) = (history.estimated_count(), process.estimated_count(id));
                prop_assert!(
                    (found as f64 - expected).abs() <= 0.5 + 1e-9 * expected,
                    "count of {}: {} {}",
                    id,
                    found,
                    expected
                );
            }
            prop_assert_eq!(history.allocated_bytes() - history.freed_bytes(), history.live_bytes());
            // Of what was born before the stack was seen first, as realloc can carry it over, only the totals are kept.
            for (window, cohort) in (history.start()..).zip(history.cohorts(0)) {
                let expected = expected.get(&window).copied().unwrap_or_default();
                prop_assert_eq!((cohort.bytes, cohort.count), (expected.bytes, expected.count), "{} in {}", id, window);
            }
        }
        prop_assert!(totals.is_empty(), "a stack that the ledger does not have: {:?}", totals);
        blocks += process.blocks.len() + process.resizing.len();
        ranges += runs(process.pages.iter().map(|(number, page)| (*number, *page))).len();
    }
    prop_assert_eq!(ledger.live_blocks(), blocks);
    let counters = ledger.counters();
    prop_assert_eq!(counters.blocks, blocks as u64 + counters.ended + counters.not_kept);
    prop_assert_eq!(ledger.room.ranges.used, ranges);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// After every operation each stack of each process has the bytes and the count that the model gives it, by window of
    /// birth; so has what is distrusted.
    #[test]
    fn agrees_with_the_model(ops in prop::collection::vec(op(), 1..250)) {
        let mut ledger = Ledger::new(Config { page_size: PAGE, ..Config::default() });
        let mut now = 1000 * SECOND;
        let mut model = Model { origin: now, ..Model::default() };
        for tgid in 1..3 {
            ledger.add_process(tgid, 0, now);
            model.processes.insert(tgid, Process::default());
        }
        for (step, op) in ops {
            now += step;
            match op {
                Op::Event(tgid, what) => {
                    let event = Event { tgid, what: at(what, now) };
                    ledger.apply(&event);
                    model.apply(&event, now);
                }
                Op::MissedFree { tgid, addr, ago } => {
                    ledger.missed_free(tgid, addr, now - ago);
                    model.missed_free(tgid, addr, now - ago);
                }
                Op::MissedReallocEnd { tgid, tid, ago } => {
                    ledger.missed_realloc_end(tgid, tid, now - ago);
                    model.missed_realloc_end(tgid, tid, now - ago);
                }
                Op::Distrust { of, ago } => {
                    match of {
                        Some(tgid) => ledger.distrust_process(tgid, now - ago),
                        None => ledger.distrust(now - ago),
                    }
                    model.distrust(of, now - ago);
                }
                Op::Fork { parent, child } => {
                    ledger.fork_process(parent, child, 0, now);
                    model.fork(parent, child);
                }
                Op::Remove { tgid } => {
                    ledger.remove_process(tgid);
                    model.processes.remove(&tgid);
                }
                Op::Roll => ledger.roll(now),
            }
            same(&ledger, &model)?;
        }
        for tgid in 1..4 {
            ledger.remove_process(tgid);
        }
        prop_assert_eq!(ledger.live_blocks(), 0);
        prop_assert_eq!(ledger.room.ranges.used, 0);
        prop_assert_eq!(ledger.room.histories.used, 0);
        prop_assert_eq!(ledger.room.records.used, 0);
    }
}

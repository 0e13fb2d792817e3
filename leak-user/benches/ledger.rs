//! Decode and ledger, fed from a recorded stream: events a second on one core, with 10 thousand to 10 million live blocks.
//!
//! The streams are the worst case for the caches: blocks are freed in random order, and their addresses handed out again
//! in another. Half of the events are frees, and 1000 call stacks allocate.

use std::hint::black_box;

use bytes::BufMut;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use leak_common::{MAX_FRAMES, kind, op};
use leak_user::ledger::{Config, Ledger};
use leak_user::recording::{Entry, Reader, Writer, replay};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const TGID: u32 = 1234;
const STACKS: u64 = 1000;
/// Malloc and free pairs in the measured stream.
const PAIRS: usize = 1_000_000;
/// How many blocks are free at a time.
const GAP: usize = 1000;
/// A rate of 5 million events a second, in ticks of 4 ms as the kernel's coarse clock has them.
const EVENTS_PER_TICK: u64 = 20_000;
const TICK: u64 = 4_000_000;

struct Stream {
    writer: Writer<Vec<u8>>,
    rng: SmallRng,
    events: u64,
}

impl Stream {
    fn new(seed: u64) -> Self {
        let writer = Writer::new(Vec::new()).expect("memory takes everything");
        Self { writer, rng: SmallRng::seed_from_u64(seed), events: 0 }
    }

    fn record(&mut self, kind: u8, numbers: &[u64]) {
        let mut record = vec![kind, op::MALLOC, 0, 0];
        record.put_u32_ne(TGID);
        for number in numbers {
            record.put_u64_ne(*number);
        }
        self.writer.write(Entry::Record(&record)).expect("memory takes everything");
        self.events += 1;
    }

    fn time(&self) -> u64 {
        self.events / EVENTS_PER_TICK * TICK
    }

    fn alloc(&mut self, addr: u64) {
        let stack = self.rng.random_range(0..STACKS).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let size = self.rng.random_range(8..4096);
        self.record(kind::ALLOC, &[addr, size, stack, self.time()]);
    }

    fn free(&mut self, addr: u64) {
        self.record(kind::FREE, &[addr, self.time()]);
    }

    fn finish(self) -> Vec<u8> {
        self.writer.finish().expect("memory takes everything")
    }
}

/// A stream that makes `live` blocks, and one that frees and allocates at random and leaves the same blocks live, so that
/// it can be played again and again.
fn streams(live: usize) -> (Vec<u8>, Vec<u8>) {
    let mut fill = Stream::new(1);
    let writer = &mut fill.writer;
    writer.write(Entry::AddProcess { tgid: TGID, start_time: 1, time: 0 }).expect("memory takes everything");
    for stack in 0..STACKS {
        let id = stack.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let frames: Vec<u64> = (0..20).map(|frame| 0x40_0000 + stack * 64 + frame).collect();
        assert!(frames.len() < MAX_FRAMES);
        // Twenty frames, completely unwound.
        fill.record(kind::STACK, &[&[id, 20], &frames[..]].concat());
    }
    // Blocks as close to each other as an allocator lays them.
    let addr = |n: usize| 0x7f00_0000_0000 + 64 * n as u64;
    for n in 0..live {
        fill.alloc(addr(n));
    }

    let mut churn = Stream::new(2);
    churn.events = fill.events;
    let mut gap: Vec<u64> = Vec::with_capacity(GAP);
    let mut rng = SmallRng::seed_from_u64(3);
    let mut is_free = vec![false; live];
    for _ in 0..PAIRS {
        if gap.len() == GAP {
            let at = rng.random_range(0..GAP);
            let block = gap.swap_remove(at);
            is_free[((block - addr(0)) / 64) as usize] = false;
            churn.alloc(block);
        }
        let mut block = rng.random_range(0..live);
        while is_free[block] {
            block = rng.random_range(0..live);
        }
        is_free[block] = true;
        churn.free(addr(block));
        gap.push(addr(block));
    }
    gap.shuffle(&mut rng);
    for block in gap {
        churn.alloc(block);
    }
    (fill.finish(), churn.finish())
}

fn play(stream: &[u8], ledger: &mut Ledger) {
    let mut reader = Reader::new(stream).expect("a header");
    let replayed = replay(&mut reader, ledger).expect("a whole recording");
    assert_eq!(replayed.undecodable, 0);
}

fn decode_and_apply(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode_and_apply");
    group.sample_size(10).throughput(Throughput::Elements(2 * PAIRS as u64));
    for (name, live) in [("10k", 10_000), ("100k", 100_000), ("1M", 1_000_000), ("10M", 10_000_000)] {
        let (fill, churn) = streams(live);
        let mut ledger = Ledger::new(Config::default());
        play(&fill, &mut ledger);
        drop(fill);
        assert_eq!(ledger.live_blocks(), live);
        group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(|| play(black_box(&churn), &mut ledger)));
        assert_eq!(ledger.live_blocks(), live);
        let counters = ledger.counters();
        assert_eq!((counters.replaced, counters.free_of_unknown, counters.live_capped), (0, 0, 0));
        println!("{name} live blocks: {:.1} bytes of table each", ledger.bytes_per_live().unwrap_or_default());
    }
    group.finish();
}

criterion_group!(benches, decode_and_apply);
criterion_main!(benches);

//! The maps and read-only settings. Sizes given here are defaults; the loader overrides those that depend on the host.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use leak_common::{Clock, MissedFree, counter};

use crate::thread::Thread;

/// All records, of all processes. One ring: reserve order is then the order of events, also between threads and CPUs.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(16 << 20, 0);

/// Processes (thread groups) to trace.
#[map]
pub static TARGETS: HashMap<u32, u32> = HashMap::with_max_entries(4096, 0);

/// State of each traced thread, by its id. Allocated on demand: an entry holds the thread's stack buffer, about 2 KiB,
/// because a per-CPU buffer is not safe here (uprobe programs can be preempted by another task's on the same CPU: they
/// run with migration disabled only, `bpf_prog_run_array_uprobe`).
#[map]
pub static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// A zeroed [`Thread`] to start from: it is too large for the 512 bytes of BPF stack.
#[map]
pub static THREAD_INIT: Array<Thread> = Array::with_max_entries(1, 0);

/// Stack hashes that user space has been sent, in sets of [`SEEN_WAYS`]. A plain array: looked up without a call, and a
/// hash that was displaced only means that its stack is sent again.
#[map]
pub static SEEN: Array<[u64; SEEN_WAYS]> = Array::with_max_entries(SEEN_SETS, 0);
pub const SEEN_SETS: u32 = 16_384;
pub const SEEN_WAYS: usize = 4;

/// Mixed into stack hashes; raised whenever code may have moved (exec, a new executable mapping), so that an address
/// that means something else gets a new hash.
#[map]
pub static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

/// Addresses whose free found the ring full, with the time of the free.
#[map]
pub static MISSED: HashMap<MissedFree, u64> = HashMap::with_max_entries(65_536, 0);

/// How jiffies become nanoseconds.
#[map]
pub static CLOCK: Array<Clock> = Array::with_max_entries(1, 0);

/// Losses and oddities, by `leak_common::counter`.
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// Allocations below this many bytes are not followed.
#[unsafe(no_mangle)]
static MIN_SIZE: u64 = 0;
/// Allocations above this many bytes are not followed.
#[unsafe(no_mangle)]
static MAX_SIZE: u64 = u64::MAX;
/// Reads a setting that the loader patches. Volatile, or the compiler would use the default; the verifier sees a
/// constant all the same, since the map is frozen.
macro_rules! setting {
    ($name:ident) => {
        // SAFETY: a static of this program, read as its own type.
        unsafe { core::ptr::read_volatile(&raw const $name) }
    };
}

/// Whether an allocation of this size is followed.
#[inline(always)]
pub fn size_is_followed(size: u64) -> bool {
    size >= setting!(MIN_SIZE) && size <= setting!(MAX_SIZE)
}

/// Nanoseconds of `CLOCK_MONOTONIC` to within a tick. Counted in jiffies, because that is a load, while the clock is two
/// calls; user space keeps the difference current. (The coarse clock is not for tracing programs.)
#[inline(always)]
pub fn now() -> u64 {
    if let Some(clock) = CLOCK.get_ptr(0) {
        // SAFETY: a valid map value; user space replaces it now and then, and each field is one aligned word. `tick` never
        // changes once it is set.
        let (tick, offset) = unsafe { ((*clock).tick, (*clock).offset) };
        if tick != 0 {
            // SAFETY: no arguments.
            return unsafe { bpf_jiffies64() }.wrapping_mul(tick).wrapping_add(offset);
        }
    }
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Adds to a cell that other CPUs, or a preempting program, may add to as well.
#[inline(always)]
pub fn atomic_add(cell: *mut u64, by: u64) {
    // SAFETY: cell points into a map value. `lock` is BPF's atomic add (BPF_ATOMIC | BPF_ADD without fetch), which every
    // supported kernel has; core's AtomicU64::fetch_add does not exist for this target.
    unsafe {
        core::arch::asm!("lock *(u64 *)({cell} + 0) += {by}", cell = in(reg) cell, by = in(reg) by);
    }
}

/// Counts one of `leak_common::counter`.
#[inline(always)]
pub fn count(which: u32) {
    if let Some(cell) = COUNTERS.get_ptr_mut(which) {
        atomic_add(cell, 1);
    }
}

/// Whether this process is traced.
#[inline(always)]
pub fn is_target(tgid: u32) -> bool {
    TARGETS.get_ptr(tgid).is_some()
}

/// The generation of code addresses.
#[inline(always)]
pub fn generation() -> u64 {
    GENERATION.get_ptr(0).map_or(0, |cell| {
        // SAFETY: a valid map value.
        unsafe { *cell }
    })
}

/// Code may have moved.
#[inline(always)]
pub fn raise_generation() {
    if let Some(cell) = GENERATION.get_ptr_mut(0) {
        atomic_add(cell, 1);
    }
}

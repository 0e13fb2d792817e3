//! The maps and read-only settings. Sizes given here are defaults; the loader overrides those that depend on the host.

use core::hint::cold_path;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, ProgramArray, RingBuf};
use leak_common::ring::{MARGIN, MAX_RECORD, Positions, RING_SIZE, stride};
use leak_common::sampling::{Address, Interval, Sampling};
use leak_common::unwind::{Range, Target};
use leak_common::{Clock, Hits, Missed, PageKey, counter};

use crate::thread::Thread;

/// The records of all processes, where the kernel has no atomic addition that returns the old value (before 5.12): see
/// [`crate::emit`].
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(16 << 20, 0);

/// The records of all processes, in lanes (`leak_common::ring`). As the object has it, in one.
#[map]
pub static RING: Array<[u64; (RING_SIZE as usize + MAX_RECORD) / 8]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// How far the ring is written and read.
#[map]
pub static POSITIONS: Array<Positions> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Processes (thread groups) to trace, and where the ranges of their code are.
#[map]
pub static TARGETS: HashMap<u32, Target> = HashMap::with_max_entries(4096, 0);

/// How each traced process is sampled (`leak_common::sampling::Sampling`). Apart from [`TARGETS`], so that programs read it by a
/// load and no call, and mapped by user space, so that it changes by a store.
#[map]
pub static SAMPLINGS: Array<u64> = Array::with_max_entries(4096, BPF_F_MMAPABLE);

/// How often each traced process hit breakpoints, at the place of its word in [`SAMPLINGS`].
#[map]
pub static HITS: Array<Hits> = Array::with_max_entries(4096, BPF_F_MMAPABLE);

/// Sampled blocks that are live, with the time of their allocation. Where frees are filtered, a free of any other address is nothing
/// to user space.
#[map]
pub static ADDRESSES: HashMap<Address, u64> = HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);

/// State of each traced thread: a thread's slot is the one that the low bits of its id name, so that finding it is a load
/// and no call. Not per CPU: uprobe programs run with migration disabled only and can be preempted by another task's on
/// the same CPU (`bpf_prog_run_array_uprobe`).
#[map]
pub static SLOTS: Array<Thread> = Array::with_max_entries(SLOT_COUNT, 0);
pub const SLOT_COUNT: u32 = 512;

/// Which thread has a slot; to have one is to have inserted it here.
#[map]
pub static OWNERS: HashMap<u32, u32> = HashMap::with_max_entries(SLOT_COUNT, 0);

/// Threads whose slot another thread has, by id.
#[map]
pub static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// A zeroed [`Thread`] to start from: it is too large for the 512 bytes of BPF stack.
#[map]
pub static THREAD_INIT: Array<Thread> = Array::with_max_entries(1, 0);

/// Rows of unwind tables: of each file one extent, sorted by address (`leak_common::unwind::row`).
#[map]
pub static ROWS: Array<u64> = Array::with_max_entries(1 << 21, 0);

/// Code of the traced processes: of each process one extent, sorted by address.
#[map]
pub static RANGES: Array<Range> = Array::with_max_entries(1 << 14, 0);

/// The program that goes on with a walk begun by a uprobe program, where the kernel has no `bpf_loop`.
#[map]
pub static WALK_UPROBE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// The same for walks begun by a tracepoint program: a program can only be followed by one of its own type.
#[map]
pub static WALK_TRACEPOINT: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Rules by the return address they were looked up for; see `unwind`.
#[map]
pub static RULES: Array<[u64; 2]> = Array::with_max_entries(RULES_COUNT, 0);
pub const RULES_COUNT: u32 = 1 << 15;

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

/// Frees and ends of reallocs that found the ring full, with their times.
#[map]
pub static MISSED: HashMap<Missed, u64> = HashMap::with_max_entries(65_536, 0);

/// Of each traced process, how often something was lost that makes all that is live there doubtful. User space makes the
/// entries, so that none is missing for want of room.
#[map]
pub static EPOCHS: HashMap<u32, u64> = HashMap::with_max_entries(4096, 0);

/// Processes whose page faults are looked at, and of how many one is.
#[map]
pub static PAGED: HashMap<u32, u32> = HashMap::with_max_entries(64, 0);

/// Faults by process and stack, as many as those that were looked at stand for. Emptied by user space each second.
#[map]
pub static PAGES: HashMap<PageKey, u64> = HashMap::with_max_entries(4096, 0);

/// Processes that were started, or have executed a program, since user space looked last.
#[map]
pub static BORN: HashMap<u32, u8> = HashMap::with_max_entries(4096, 0);

/// How jiffies become nanoseconds.
#[map]
pub static CLOCK: Array<Clock> = Array::with_max_entries(1, 0);

/// Losses and oddities, by `leak_common::counter`.
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// Reads a setting that the loader patches. Volatile, or the compiler would use the default; the verifier sees a
/// constant all the same, since the map is frozen.
macro_rules! setting {
    ($name:ident) => {
        // SAFETY: a static of this program, read as its own type.
        unsafe { core::ptr::read_volatile(&raw const $name) }
    };
}

/// Allocations below this many bytes are not followed.
#[unsafe(no_mangle)]
static MIN_SIZE: u64 = 0;
/// Allocations above this many bytes are not followed.
#[unsafe(no_mangle)]
static MAX_SIZE: u64 = u64::MAX;
/// Whether the kernel has `bpf_loop`.
#[unsafe(no_mangle)]
static HAS_LOOP: u64 = 1;
/// Whether a program that has functions may be followed by another one; asked where there is no `bpf_loop`.
#[unsafe(no_mangle)]
static TAIL_CALLS: u64 = 1;
/// Whether records go to [`RING`]; otherwise to [`EVENTS`].
#[unsafe(no_mangle)]
static OWN_RING: u64 = 1;
/// The bits of a position that are a place in a lane of [`RING`]: its size less eight, as places are multiples of eight.
#[unsafe(no_mangle)]
static RING_MASK: u64 = RING_SIZE - 8;
/// Bytes in a lane beyond which it is full.
#[unsafe(no_mangle)]
static RING_LIMIT: u64 = RING_SIZE - MARGIN;
/// The bits of a thread's id that name its lane.
#[unsafe(no_mangle)]
static LANE_MASK: u64 = 0;
/// Bytes from one lane to the next.
#[unsafe(no_mangle)]
static LANE_STRIDE: u64 = stride(RING_SIZE);
/// Whether stacks are unwound with tables; otherwise by frame pointers alone.
#[unsafe(no_mangle)]
static USE_TABLES: u64 = 1;

#[unsafe(no_mangle)]
static NEVER: u64 = 0;

/// The bits that addresses of user space have on this host: what is above them in a return address is its signature.
#[cfg(bpf_target_arch = "aarch64")]
#[unsafe(no_mangle)]
static ADDRESS_MASK: u64 = (1 << 48) - 1;

#[cfg(bpf_target_arch = "aarch64")]
#[inline(always)]
pub fn address_mask() -> u64 {
    setting!(ADDRESS_MASK)
}

/// Where in kernel structures the pending return probes of a task are; zero: not known. In this order: `task_struct.utask`,
/// `uprobe_task.return_instances`, `return_instance.stack`, `.orig_ret_vaddr`, `.next`.
#[unsafe(no_mangle)]
static UTASK_OFFSET: u64 = 0;
#[unsafe(no_mangle)]
static INSTANCES_OFFSET: u64 = 0;
#[unsafe(no_mangle)]
static INSTANCE_STACK_OFFSET: u64 = 0;
#[unsafe(no_mangle)]
static INSTANCE_RETURN_OFFSET: u64 = 0;
#[unsafe(no_mangle)]
static INSTANCE_NEXT_OFFSET: u64 = 0;

/// Where in `task_struct` the ids of a task's process and thread are; zero: not known.
#[unsafe(no_mangle)]
static TASK_TGID_OFFSET: u64 = 0;
#[unsafe(no_mangle)]
static TASK_PID_OFFSET: u64 = 0;

/// Offsets of the ids of process and thread in `task_struct`, in this order, if they are known.
#[inline(always)]
pub fn task_offsets() -> Option<(u64, u64)> {
    let (tgid, pid) = (setting!(TASK_TGID_OFFSET), setting!(TASK_PID_OFFSET));
    (tgid != 0 && pid != 0).then_some((tgid, pid))
}

/// The offsets of the structures that hold pending return probes; `task` is zero if they are not known.
pub struct ReturnOffsets {
    pub task: u64,
    pub instances: u64,
    pub stack: u64,
    pub address: u64,
    pub next: u64,
}

#[inline(always)]
pub fn return_offsets() -> ReturnOffsets {
    ReturnOffsets {
        task: setting!(UTASK_OFFSET),
        instances: setting!(INSTANCES_OFFSET),
        stack: setting!(INSTANCE_STACK_OFFSET),
        address: setting!(INSTANCE_RETURN_OFFSET),
        next: setting!(INSTANCE_NEXT_OFFSET),
    }
}

/// Whether an allocation of this size is followed.
#[inline(always)]
pub fn size_is_followed(size: u64) -> bool {
    size >= setting!(MIN_SIZE) && size <= setting!(MAX_SIZE)
}

/// Whether the kernel has `bpf_loop`.
#[inline(always)]
pub fn has_loop() -> bool {
    setting!(HAS_LOOP) != 0
}

/// Whether a program that has functions may be followed by another one.
#[inline(always)]
pub fn tail_calls() -> bool {
    setting!(TAIL_CALLS) != 0
}

/// Whether records go to [`RING`].
#[inline(always)]
pub fn own_ring() -> bool {
    setting!(OWN_RING) != 0
}

/// The bits of a position that are a place in a lane of [`RING`].
#[inline(always)]
pub fn ring_mask() -> u64 {
    setting!(RING_MASK)
}

/// Bytes in a lane of [`RING`] beyond which it is full.
#[inline(always)]
pub fn ring_limit() -> u64 {
    setting!(RING_LIMIT)
}

/// The bits of a thread's id that name its lane.
#[inline(always)]
pub fn lane_mask() -> u64 {
    setting!(LANE_MASK)
}

/// Bytes from one lane of [`RING`] to the next.
#[inline(always)]
pub fn lane_stride() -> u64 {
    setting!(LANE_STRIDE)
}

/// Whether stacks are unwound with tables.
#[inline(always)]
pub fn use_tables() -> bool {
    setting!(USE_TABLES) != 0
}

/// Never true. The verifier knows that, the compiler does not.
#[inline(always)]
pub fn never() -> bool {
    setting!(NEVER) != 0
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
    cold_path();
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

/// Counts many of `leak_common::counter`.
#[inline(always)]
pub fn count_many(which: u32, by: u64) {
    if let Some(cell) = COUNTERS.get_ptr_mut(which) {
        atomic_add(cell, by);
    }
}

/// How a process is sampled, and where that stands; `None` where it is not traced.
#[inline(always)]
pub fn sampling_of(tgid: u32) -> Option<(u32, Sampling)> {
    let target = TARGETS.get_ptr(tgid)?;
    // SAFETY: a valid map value.
    let place = unsafe { (*target).sampling };
    Some((place, sampling_at(place)))
}

/// What stands at a place of the settings.
#[inline(always)]
pub fn sampling_at(place: u32) -> Sampling {
    SAMPLINGS.get_ptr(place).map_or(Sampling(0), |word| {
        // SAFETY: a valid map value; one aligned word.
        Sampling(unsafe { core::ptr::read_volatile(word) })
    })
}

/// Remembers that a block is followed. Where there is no room it must not be: its free would end in the kernel.
#[inline(never)]
pub fn keep_address(tgid: u32, addr: u64, time: u64) -> bool {
    ADDRESSES.insert(Address { tgid, reserved: 0, addr }, time, 0).is_ok()
}

/// A sampled allocation of so many bytes is lost for want of room.
#[inline(never)]
pub fn count_unkept(interval: u64, size: u64) -> u64 {
    let stands_for = Interval::from_code(interval as u8).bytes();
    count(counter::ADDRESSES_FULL);
    count_many(counter::ADDRESSES_FULL_BYTES, if size > stands_for { size } else { stands_for });
    0
}

/// Takes a block out of those that are followed; false where it is none.
#[inline(always)]
pub fn take_address(tgid: u32, addr: u64) -> bool {
    let address = Address { tgid, reserved: 0, addr };
    // Looked up first: that takes no lock, and most are not there.
    if ADDRESSES.get_ptr(address).is_none() {
        return false;
    }
    // Should it stay, a later free of the address is sent for nothing.
    let _ = ADDRESSES.remove(address);
    true
}

/// Counts the loss of something that makes all that is live in this process doubtful.
#[inline(never)]
pub fn lost(tgid: u32, which: u32) -> u64 {
    count(which);
    // Of a process that is no longer traced nothing is live.
    if let Some(epoch) = EPOCHS.get_ptr_mut(tgid) {
        atomic_add(epoch, 1);
    }
    0
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

//! What is remembered of a thread: the allocator call in flight, the system call in flight, its last stack.
//!
//! Pairing: one call in flight per thread. A probed call is nested in another exactly when its sp is lower than the
//! recorded sp; a return belongs to the record exactly when its sp fits. A recorded call that never returns (an
//! exception, longjmp) is replaced by the next call that is not below it, or once it is older than [`STALE_NS`].

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use leak_common::counter;

use crate::maps::{OWNERS, SLOT_COUNT, SLOTS, THREAD_INIT, THREADS, count, is_target};
use crate::stack::Walk;

/// After this long a call in flight is taken as abandoned. Without it, one that never returned would make every deeper
/// call of its thread look nested, for ever.
pub const STALE_NS: u64 = 1_000_000_000;

/// State of one thread; only the thread itself touches it.
#[repr(C)]
pub struct Thread {
    /// Zero in a slot that nobody has.
    pub tid: u32,
    pub tgid: u32,
    /// Stack pointer at the recorded call's entry, zero if there is none.
    pub sp: u64,
    /// Where the breakpoint stood that the recorded call was entered at.
    pub pc: u64,
    /// Where the recorded call returns to.
    pub caller: u64,
    /// The recorded allocator call's `leak_common::op`.
    pub op: u64,
    pub size: u64,
    /// realloc's old block, or where `posix_memalign` will put the address.
    pub pointer: u64,
    /// xallocx: how many bytes more than `size` it may take.
    pub extra: u64,
    pub stack: u64,
    pub time: u64,
    pub call: SystemCall,
    /// Where the breakpoint of the allocation function stood that was entered last, and its shape; the same for free.
    /// Both are what a session program would have to ask the kernel for, at the price of a call each.
    pub alloc_pc: u64,
    pub alloc_shape: u64,
    pub free_pc: u64,
    pub walk: Walk,
    /// Keeps the last words of this slot and the first of the next out of one cache line (of one pair of lines: they are
    /// fetched in pairs), as threads are often in neighbouring slots. An alignment would not do: an array map's values begin
    /// where its header ends.
    pub apart: [u64; 16],
}

/// A mapping system call between its entry and its exit.
#[repr(C)]
pub struct SystemCall {
    /// Its number plus one; zero if there is none.
    pub number: u64,
    pub addr: u64,
    pub size: u64,
    pub stack: u64,
    /// mmap: protection and flags.
    pub prot: u32,
    pub flags: u32,
    pub in_allocator: u64,
}

/// Process and thread of the current task.
#[derive(Clone, Copy)]
pub struct Ids {
    pub tgid: u32,
    pub tid: u32,
}

#[inline(always)]
pub fn ids() -> Ids {
    let both = bpf_get_current_pid_tgid();
    Ids { tgid: (both >> 32) as u32, tid: both as u32 }
}

/// The slot that a thread may have.
#[inline(always)]
fn slot_of(tid: u32) -> u32 {
    tid & (SLOT_COUNT - 1)
}

/// The state of the current thread if it has any.
#[inline(always)]
pub fn current(ids: Ids) -> Option<&'static mut Thread> {
    let slot = SLOTS.get_ptr_mut(slot_of(ids.tid))?;
    // SAFETY: a valid map value. Its owner alone changes it, and whoever is not the owner reads `tid` only, one aligned
    // word.
    let thread = unsafe { &mut *slot };
    if thread.tid == ids.tid && thread.tgid == ids.tgid { Some(thread) } else { in_table(ids) }
}

/// Threads whose slot another one has.
#[inline(never)]
fn in_table(ids: Ids) -> Option<&'static mut Thread> {
    let thread = THREADS.get_ptr_mut(ids.tid)?;
    // SAFETY: a valid map value, touched by this thread only; entries are removed only when the thread ends.
    let thread = unsafe { &mut *thread };
    (thread.tgid == ids.tgid).then_some(thread)
}

/// The state of the current thread, made if the process is traced.
#[inline(always)]
pub fn current_or_new(ids: Ids) -> Option<&'static mut Thread> {
    match current(ids) {
        Some(thread) => Some(thread),
        None => new(ids),
    }
}

#[inline(never)]
pub fn new(ids: Ids) -> Option<&'static mut Thread> {
    if !is_target(ids.tgid) {
        return None;
    }
    let slot = slot_of(ids.tid);
    // Inserting is the lock: of several threads with this slot one succeeds.
    if OWNERS.insert(slot, ids.tid, u64::from(BPF_NOEXIST)).is_ok() {
        let thread = SLOTS.get_ptr_mut(slot)?;
        // SAFETY: a valid map value that is this thread's from here on.
        let thread = unsafe { &mut *thread };
        thread.reset();
        thread.tgid = ids.tgid;
        thread.tid = ids.tid;
        return Some(thread);
    }
    let init = THREAD_INIT.get_ptr(0)?;
    // SAFETY: a valid map value, all zero.
    if THREADS.insert(ids.tid, unsafe { &*init }, 0).is_err() {
        count(counter::THREADS_FULL);
        return None;
    }
    let thread = THREADS.get_ptr_mut(ids.tid)?;
    // SAFETY: as in `in_table`.
    let thread = unsafe { &mut *thread };
    thread.tid = ids.tid;
    thread.tgid = ids.tgid;
    Some(thread)
}

/// Forgets a thread that has ended.
#[inline(never)]
pub fn forget(tid: u32) -> u64 {
    let index = slot_of(tid);
    if let Some(slot) = SLOTS.get_ptr_mut(index) {
        // SAFETY: as in `current`.
        let thread = unsafe { &mut *slot };
        if thread.tid == tid {
            thread.tid = 0;
            // It is there: the slot was claimed with it.
            let _ = OWNERS.remove(index);
            return 0;
        }
    }
    // A thread that never allocated has no entry.
    let _ = THREADS.remove(tid);
    0
}

impl Thread {
    /// As if nothing was known. The stack buffers may keep what they hold.
    #[inline(always)]
    fn reset(&mut self) {
        self.sp = 0;
        self.pc = 0;
        self.caller = 0;
        self.call.number = 0;
        self.alloc_pc = 0;
        self.free_pc = 0;
        self.walk.forget();
    }

    /// Whether a call entered at `sp` is made inside the recorded one.
    #[inline(always)]
    pub fn is_nested(&self, sp: u64, now: u64) -> bool {
        sp < self.sp && now.wrapping_sub(self.time) < STALE_NS
    }

    /// Whether an allocator call is in flight.
    #[inline(always)]
    pub fn in_allocator(&self, now: u64) -> bool {
        self.sp != 0 && now.wrapping_sub(self.time) < STALE_NS
    }
}

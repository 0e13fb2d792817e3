//! What is remembered of a thread: the allocator call in flight, the system call in flight, its last stack.
//!
//! Pairing: one call in flight per thread. A probed call is nested in another exactly when its sp is lower than the
//! recorded sp; a return belongs to the record exactly when its sp fits. A recorded call that never returns (an
//! exception, longjmp) is replaced by the next call that is not below it, or once it is older than [`STALE_NS`].

use core::hint::cold_path;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_probe_read_user};
use leak_common::counter;
use leak_common::sampling::{Interval, Sampling};

use crate::maps::{
    HITS, OWNERS, SLOT_COUNT, SLOTS, THREAD_INIT, THREADS, atomic_add, count, has_loop, sampling_at, sampling_of,
};
use crate::returns;
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
    /// Whether the recorded call was announced as one that resizes a block ([`leak_common::ReallocBegin`]).
    pub resizes: u64,
    /// The interval that the recorded call was sampled with, or [`UNSAMPLED`].
    pub interval: u64,
    /// Bytes until the next sample, and the interval that they were drawn with.
    pub countdown: u64,
    pub countdown_interval: u64,
    /// Where in the settings the process's sampling stands; checked at each use.
    pub sampling: u32,
    /// Calls that were not sampled.
    pub unsampled: u32,
    /// Stack pointer at the entry of the last call whose return nobody waits for, and where it returns to; zero if there is none.
    pub skipped_sp: u64,
    pub skipped_caller: u64,
    /// Hits of breakpoints that are not in [`HITS`] yet: entries, returns, and those of the entries that were single-stepped.
    pub entries: u32,
    pub returns: u32,
    pub stepped: u32,
    /// [`Sampling::attachment`] when the thread was met last.
    pub attachment: u32,
    /// Where the breakpoint of free stood last. This, and what is known of allocation functions, a session program would have to
    /// ask the kernel for, at the price of a call each.
    pub free_pc: u64,
    pub known: [Known; KNOWN],
    pub walk: Walk,
    /// Keeps the last words of this slot and the first of the next out of one cache line (of one pair of lines: they are
    /// fetched in pairs), as threads are often in neighbouring slots. An alignment would not do: an array map's values begin
    /// where its header ends.
    pub apart: [u64; 16],
}

/// In place of an interval: the recorded call is not sampled.
pub const UNSAMPLED: u64 = 1 << 8;

/// How many allocation functions a thread remembers; a power of two.
pub const KNOWN: usize = 8;

/// What is known of an allocation function.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Known {
    /// Where its breakpoint stands; zero: nothing is known.
    pub pc: u64,
    /// `leak_common::op`.
    pub shape: u32,
    /// How many of its calls in this thread were watched to the end while none was made inside them, up to [`QUIET`]; [`NESTS`] once
    /// one was.
    pub quiet: u32,
}

/// After so many calls a function is taken for one that calls no other that is probed. Until then, and each so many times after
/// that, its return is waited for even where the call is not sampled: otherwise a call made inside it would be taken for one of its
/// own, and drawn for a second time.
pub const QUIET: u32 = 64;
pub const NESTS: u32 = u32::MAX;

/// So many entries of a thread are counted together: a load and a store each, instead of an atomic addition to what all threads share.
const COUNTED_AT_ONCE: u32 = 64;

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
    if thread.tid == ids.tid && thread.tgid == ids.tgid {
        Some(thread)
    } else {
        cold_path();
        in_table(ids)
    }
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
    let (sampling, _) = sampling_of(ids.tgid)?;
    let slot = slot_of(ids.tid);
    // Inserting is the lock: of several threads with this slot one succeeds.
    if OWNERS.insert(slot, ids.tid, u64::from(BPF_NOEXIST)).is_ok() {
        let thread = SLOTS.get_ptr_mut(slot)?;
        // SAFETY: a valid map value that is this thread's from here on.
        let thread = unsafe { &mut *thread };
        thread.reset();
        thread.sampling = sampling;
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
    thread.sampling = sampling;
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
        self.countdown_interval = 0;
        self.skipped_sp = 0;
        self.entries = 0;
        self.returns = 0;
        self.stepped = 0;
        self.free_pc = 0;
        for known in &mut self.known {
            known.pc = 0;
        }
        self.walk.forget();
    }

    /// Counts the hit of a breakpoint at a function's entry.
    #[inline(always)]
    pub fn entered(&mut self) {
        self.entries = self.entries.wrapping_add(1);
        if self.entries >= COUNTED_AT_ONCE {
            cold_path();
            self.count_hits();
        }
    }

    #[inline(never)]
    fn count_hits(&mut self) -> u64 {
        let sampling = self.process_sampling();
        if sampling.tgid() == self.tgid {
            add_hits(self.sampling, self.entries, self.returns, self.stepped);
        }
        self.entries = 0;
        self.returns = 0;
        self.stepped = 0;
        0
    }

    /// Whether a call entered at `sp` is made inside the recorded one.
    #[inline(always)]
    pub fn is_nested(&self, sp: u64, now: u64) -> bool {
        sp < self.sp && now.wrapping_sub(self.time) < STALE_NS
    }

    /// Whether an allocator call is in flight, for one that is made with this stack pointer.
    #[inline(always)]
    pub fn in_allocator(&self, sp: u64, now: u64) -> bool {
        if self.sp != 0 {
            return now.wrapping_sub(self.time) < STALE_NS;
        }
        // Of the call whose return nobody waits for: as long as it lasts its return address stands where it was. Whatever its
        // caller calls next puts another one there.
        if self.skipped_sp == 0 || sp >= self.skipped_sp {
            return false;
        }
        // Somebody else may wait for it, so that a trampoline stands there: another tracer, or a link of ours for another process,
        // which the kernel asks too and takes the silence of for a wish to see the return.
        caller(self.skipped_sp) == self.skipped_caller
            || (has_loop() && returns::pending(self.skipped_sp) == self.skipped_caller)
    }

    /// How the thread's process is sampled.
    #[inline(always)]
    pub fn process_sampling(&mut self) -> Sampling {
        let sampling = sampling_at(self.sampling);
        if sampling.tgid() == self.tgid {
            sampling
        } else {
            cold_path();
            Sampling(self.find_sampling())
        }
    }

    /// The same, for the entry of a call: where breakpoints were set again since the last, the calls that are remembered have ended
    /// unseen. One that is taken to last would hide what is called and freed meanwhile.
    #[inline(always)]
    pub fn sampling_at_entry(&mut self) -> Sampling {
        let sampling = self.process_sampling();
        if u32::from(sampling.attachment()) != self.attachment {
            cold_path();
            self.attachment = u32::from(sampling.attachment());
            self.sp = 0;
            self.skipped_sp = 0;
        }
        sampling
    }

    /// The process was given another place. As it is no more, everything is sent.
    #[inline(never)]
    fn find_sampling(&mut self) -> u64 {
        let Some((place, sampling)) = sampling_of(self.tgid) else { return 0 };
        self.sampling = place;
        if sampling.tgid() == self.tgid { sampling.0 } else { 0 }
    }

    /// Whether an allocation of this size is sampled.
    #[inline(always)]
    pub fn samples(&mut self, interval: Interval, size: u64) -> bool {
        // An empty block is sampled as one of a byte.
        let size = if size == 0 { 1 } else { size };
        if self.countdown_interval == u64::from(interval.code()) && size < self.countdown {
            self.countdown -= size;
            return false;
        }
        self.draw(u64::from(interval.code()), size) != 0
    }

    #[inline(never)]
    fn draw(&mut self, interval: u64, size: u64) -> u64 {
        let drawn = draw(interval);
        if self.countdown_interval == interval {
            self.countdown = drawn;
            return 1;
        }
        // What was left was drawn with another interval. Anew: what has been counted down does not matter, since the distribution
        // has no memory.
        if size < drawn {
            self.countdown = drawn - size;
            self.countdown_interval = interval;
            return 0;
        }
        // What comes next is drawn then: a second draw here is as much again for the verifier.
        self.countdown_interval = 0;
        1
    }

    /// What is known of the function whose breakpoint stands there, or its place.
    #[inline(always)]
    pub fn known(&mut self, pc: u64) -> &mut Known {
        &mut self.known[((pc >> 4) ^ (pc >> 7)) as usize & (KNOWN - 1)]
    }

    /// A call was made inside the recorded one.
    #[inline(always)]
    pub fn nests(&mut self) {
        let pc = self.pc;
        let known = self.known(pc);
        if known.pc == pc {
            known.quiet = NESTS;
        }
    }

    /// The recorded call has ended.
    #[inline(always)]
    pub fn was_quiet(&mut self) {
        let pc = self.pc;
        let known = self.known(pc);
        if known.pc == pc && known.quiet < QUIET {
            known.quiet += 1;
        }
    }

    /// Whether the return of this call, which is not sampled, need not be waited for.
    #[inline(always)]
    pub fn may_skip(&mut self, pc: u64) -> bool {
        let known = self.known(pc);
        let quiet = known.pc == pc && known.quiet == QUIET;
        self.unsampled = self.unsampled.wrapping_add(1);
        quiet && !self.unsampled.is_multiple_of(QUIET)
    }

    /// Nobody waits for the return of the call entered at `sp`.
    #[inline(always)]
    pub fn skip(&mut self, sp: u64) {
        self.skipped_caller = caller(sp);
        self.skipped_sp = sp;
    }
}

/// Adds to the hits of the process whose settings stand at this place.
#[inline(always)]
pub fn add_hits(place: u32, entries: u32, returns: u32, stepped: u32) {
    if let Some(hits) = HITS.get_ptr_mut(place) {
        // SAFETY: a valid map value.
        let (to_entries, to_returns, to_stepped) =
            unsafe { (&raw mut (*hits).entries, &raw mut (*hits).returns, &raw mut (*hits).stepped) };
        atomic_add(to_entries, u64::from(entries));
        atomic_add(to_returns, u64::from(returns));
        atomic_add(to_stepped, u64::from(stepped));
    }
}

/// Bytes until the next sample.
#[inline(always)]
fn draw(interval: u64) -> u64 {
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() } as u32;
    Interval::from_code(interval as u8).draw(random)
}

/// The word on the stack that a call puts its return address into. Zero, which is no address, where it cannot be read.
#[inline(always)]
fn caller(sp: u64) -> u64 {
    // SAFETY: a bad address is an error result.
    unsafe { bpf_probe_read_user(sp as *const u64) }.unwrap_or(0)
}

//! Records into the ring. User space looks at the ring by the clock, so no record wakes it: a wake-up costs more than the
//! record.
//!
//! The ring is our own ([`leak_common::ring`]); where the kernel lacks the atomic addition that it rests on, records go
//! through `BPF_MAP_TYPE_RINGBUF`.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_ringbuf_output};
use leak_common::ring::{COMMITTED, MAX_RECORD};
use leak_common::{Free, Header, Missed, counter};

use crate::maps::{EVENTS, MISSED, POSITIONS, RING, count, lost, own_ring, ring_limit, ring_mask};

/// Adds to a word that all CPUs share and gives what it was before: BPF's own instruction, which core does not offer for
/// this target. It orders all memory accesses.
#[inline(always)]
unsafe fn fetch_add(cell: *mut u64, by: u64) -> u64 {
    let mut value = by;
    // SAFETY: the caller's pointer is into a map value.
    unsafe {
        core::arch::asm!("{value} = atomic_fetch_add((u64 *)({cell} + 0), {value})", cell = in(reg) cell, value = inout(reg) value);
    }
    value
}

/// Takes a place of `size` bytes, header included, in the ring: the address of its header. `None` where it is full.
#[inline(always)]
fn reserve(size: u64) -> Option<*mut u64> {
    let positions = POSITIONS.get_ptr_mut(0)?;
    let ring = RING.get_ptr_mut(0)?.cast::<u64>();
    // SAFETY: a valid map value, whose words are aligned. All sides reach `producer` by atomic operations; `consumer` is one
    // word that user space writes.
    let position = unsafe {
        let producer = &raw mut (*positions).producer;
        let consumer = core::ptr::read_volatile(&raw const (*positions).consumer);
        if core::ptr::read_volatile(producer).wrapping_sub(consumer) > ring_limit() {
            return None;
        }
        fetch_add(producer, size)
    };
    let mut at = position;
    // SAFETY: arithmetic on registers. In assembler, so that LLVM leaves it where the verifier can follow it: to that the mask is a
    // constant, since settings are frozen. Places are multiples of eight; the verifier wants to see that before an atomic operation.
    unsafe {
        core::arch::asm!("{at} &= {mask}", at = inout(reg) at, mask = in(reg) ring_mask());
    }
    // SAFETY: the ring is longer than its size by the longest record.
    Some(unsafe { ring.byte_add(at as usize) })
}

/// Makes a record of `length` bytes behind `header` visible to user space.
///
/// # Safety
/// `header` must be what [`reserve`] gave.
#[inline(always)]
unsafe fn commit(header: *mut u64, length: u64) {
    // SAFETY: the caller's promise. x86 keeps the order of stores; elsewhere the exchange does.
    unsafe {
        #[cfg(bpf_target_arch = "x86_64")]
        core::ptr::write_volatile(header, length | COMMITTED);
        #[cfg(not(bpf_target_arch = "x86_64"))]
        {
            let mut value = length | COMMITTED;
            core::arch::asm!("{value} = xchg_64({header} + 0, {value})", header = in(reg) header, value = inout(reg) value);
            let _ = value;
        }
    }
}

/// Copies a record into the ring; false where it is full.
#[inline(always)]
pub fn output<T>(record: &T) -> bool {
    const { assert!(size_of::<T>().is_multiple_of(8) && size_of::<T>() + 8 <= MAX_RECORD) };
    let length = size_of::<T>() as u64;
    if own_ring() {
        let Some(place) = reserve(length + 8) else {
            return false;
        };
        let from = core::ptr::from_ref(record).cast::<u64>();
        for word in 0..size_of::<T>() / 8 {
            // SAFETY: the record has that many words, all initialised (no implicit padding, see leak_common), and the place
            // is as long. Volatile, so that it is not put off until after the header.
            unsafe { core::ptr::write_volatile(place.add(1 + word), *from.add(word)) };
        }
        // SAFETY: it was just reserved.
        unsafe { commit(place, length) };
        return true;
    }
    // SAFETY: the record is initialised to its last byte and lies on the stack.
    unsafe { to_kernel_ring(core::ptr::from_ref(record).cast_mut().cast::<c_void>(), length) }
}

/// Copies `length` bytes (at most [`MAX_RECORD`] less eight, a multiple of eight) from a map value into the ring; false where it
/// is full.
///
/// # Safety
/// `record` must point to so many initialised bytes.
#[inline(always)]
pub unsafe fn output_bytes(record: *mut c_void, length: u64) -> bool {
    if own_ring() {
        let Some(place) = reserve(length + 8) else {
            return false;
        };
        // SAFETY: the place holds that many bytes. Reading kernel memory that is there cannot fail.
        unsafe {
            bpf_probe_read_kernel(place.add(1).cast::<c_void>(), length as u32, record);
            commit(place, length);
        }
        return true;
    }
    // SAFETY: the caller's promise.
    unsafe { to_kernel_ring(record, length) }
}

#[inline(always)]
unsafe fn to_kernel_ring(record: *mut c_void, length: u64) -> bool {
    // SAFETY: the callers' promise.
    let result = unsafe {
        bpf_ringbuf_output((&raw const EVENTS).cast_mut().cast::<c_void>(), record, length, u64::from(BPF_RB_NO_WAKEUP))
    };
    result == 0
}

/// Writes a record whose loss costs only accuracy.
#[inline(always)]
pub fn emit<T>(record: T, lost: u32) -> bool {
    if output(&record) {
        return true;
    }
    count(lost);
    false
}

/// Writes what happened to this process's mappings, or to itself. Should it get lost, all that is live there is doubtful.
#[inline(always)]
pub fn emit_change<T>(tgid: u32, record: T) {
    if !output(&record) {
        lost(tgid, counter::RING_FULL_OTHER);
    }
}

#[inline(always)]
pub const fn header(kind: u8, op: u8, flags: u16, tgid: u32) -> Header {
    Header { kind, op, flags, tgid }
}

/// Writes that a block is released. This must not get lost: a block that is freed unseen would look leaked. So where the
/// ring is full the address is kept aside, and where even that is full the loss is counted and user space takes all that
/// was live then out of its verdicts.
#[inline(always)]
pub fn emit_free(tgid: u32, addr: u64, time: u64) {
    if !output(&Free { header: header(leak_common::kind::FREE, 0, 0, tgid), addr, time }) {
        missed_free(tgid, addr, time);
    }
}

/// Keeps aside the address of a free that found the ring full.
#[inline(always)]
pub fn missed_free(tgid: u32, addr: u64, time: u64) {
    missed(tgid, 0, addr, time);
}

/// Keeps aside that a thread's realloc has ended, so that the block it was called with does not count as live for as long as
/// the thread does not call it again. What became of the block is not known: most likely it was freed.
#[inline(always)]
pub fn missed_end(tgid: u32, tid: u32, time: u64) {
    missed(tgid, tid, 0, time);
}

#[inline(never)]
fn missed(tgid: u32, tid: u32, addr: u64, time: u64) -> u64 {
    if MISSED.insert(Missed { tgid, tid, addr }, time, 0).is_ok() {
        count(counter::RING_FULL_FREE);
    } else {
        lost(tgid, counter::FREE_LOST);
    }
    0
}

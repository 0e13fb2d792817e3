//! Records into the ring. User space looks at the ring by the clock, so no record wakes it: a wake-up costs more than the
//! record.
//!
//! The ring is our own ([`leak_common::ring`]); where the kernel lacks the atomic addition that it rests on, records go
//! through `BPF_MAP_TYPE_RINGBUF`.

use core::ffi::c_void;
use core::hint::cold_path;

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_ringbuf_output};
use leak_common::ring::{self, Lane, MAX_RECORD};
use leak_common::{Free, Header, Missed, counter};

use crate::maps::{
    EVENTS, MISSED, POSITIONS, RING, count, lane_mask, lane_stride, lost, own_ring, ring_limit, ring_mask,
};
use crate::thread::Ids;

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

/// The bits of `value` that `mask` has. In assembler, so that LLVM leaves it where the verifier can follow it: to that the mask is a
/// constant, since settings are frozen.
#[inline(always)]
pub fn masked(value: u64, mask: u64) -> u64 {
    let mut value = value;
    // SAFETY: arithmetic on registers.
    unsafe {
        core::arch::asm!("{value} &= {mask}", value = inout(reg) value, mask = in(reg) mask);
    }
    value
}

/// A place for a record.
struct Place {
    header: *mut u64,
    number: u64,
}

/// Takes a place of `size` bytes, header included, in the lane of the thread `tid`, and a number. `None` where the lane is full.
#[inline(always)]
fn reserve(tid: u32, size: u64) -> Option<Place> {
    let positions = POSITIONS.get_ptr_mut(0)?;
    let ring = RING.get_ptr_mut(0)?.cast::<u64>();
    let lane = masked(u64::from(tid), lane_mask());
    // SAFETY: a valid map value, whose words are aligned, and a lane that is there. All sides reach `producer` and `next` by atomic
    // operations; `consumer` is one word that user space writes.
    let (position, number) = unsafe {
        let positions = &raw mut *positions;
        let of_lane = (&raw mut (*positions).lanes).cast::<Lane>().add(lane as usize);
        let producer = &raw mut (*of_lane).producer;
        let consumer = core::ptr::read_volatile(&raw const (*of_lane).consumer);
        if core::ptr::read_volatile(producer).wrapping_sub(consumer) > ring_limit() {
            cold_path();
            return None;
        }
        // The number last: once it is taken, user space waits for the record.
        (fetch_add(producer, size), fetch_add(&raw mut (*positions).next, 1))
    };
    // Places are multiples of eight; the verifier wants to see that before an atomic operation.
    let at = masked(position, ring_mask());
    // SAFETY: a lane is longer than its size by the longest record.
    let header = unsafe { ring.byte_add((lane * lane_stride()) as usize).byte_add(at as usize) };
    Some(Place { header, number })
}

/// Makes a record of `length` bytes behind the header visible to user space.
///
/// # Safety
/// The place must be what [`reserve`] gave.
#[inline(always)]
unsafe fn commit(place: &Place, length: u64) {
    let header = ring::header(place.number, length);
    // SAFETY: the caller's promise. x86 keeps the order of stores; elsewhere the exchange does.
    unsafe {
        #[cfg(bpf_target_arch = "x86_64")]
        core::ptr::write_volatile(place.header, header);
        #[cfg(not(bpf_target_arch = "x86_64"))]
        {
            let mut value = header;
            core::arch::asm!("{value} = xchg_64({header} + 0, {value})", header = in(reg) place.header, value = inout(reg) value);
            let _ = value;
        }
    }
}

/// Copies a record into the lane of the thread `tid`, which is the current one; false where it is full.
#[inline(always)]
pub fn output<T>(tid: u32, record: &T) -> bool {
    const { assert!(size_of::<T>().is_multiple_of(8) && size_of::<T>() + 8 <= MAX_RECORD) };
    let length = size_of::<T>() as u64;
    if own_ring() {
        let Some(place) = reserve(tid, length + 8) else {
            return false;
        };
        let from = core::ptr::from_ref(record).cast::<u64>();
        for word in 0..size_of::<T>() / 8 {
            // SAFETY: the record has that many words, all initialised (no implicit padding, see leak_common), and the place
            // is as long. Volatile, so that it is not put off until after the header.
            unsafe { core::ptr::write_volatile(place.header.add(1 + word), *from.add(word)) };
        }
        // SAFETY: it was just reserved.
        unsafe { commit(&place, length) };
        return true;
    }
    // SAFETY: the record is initialised to its last byte and lies on the stack.
    unsafe { to_kernel_ring(core::ptr::from_ref(record).cast_mut().cast::<c_void>(), length) }
}

/// Copies `length` bytes (at most [`MAX_RECORD`] less eight, a multiple of eight) from a map value into the lane of the thread `tid`;
/// false where it is full.
///
/// # Safety
/// `record` must point to so many initialised bytes.
#[inline(always)]
pub unsafe fn output_bytes(tid: u32, record: *mut c_void, length: u64) -> bool {
    if own_ring() {
        let Some(place) = reserve(tid, length + 8) else {
            return false;
        };
        // SAFETY: the place holds that many bytes. Reading kernel memory that is there cannot fail.
        unsafe {
            bpf_probe_read_kernel(place.header.add(1).cast::<c_void>(), length as u32, record);
            commit(&place, length);
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
pub fn emit<T>(tid: u32, record: T, lost: u32) -> bool {
    if output(tid, &record) {
        return true;
    }
    count(lost);
    false
}

/// Writes what happened to this process's mappings, or to itself. Should it get lost, all that is live there is doubtful.
#[inline(always)]
pub fn emit_change<T>(ids: Ids, record: T) {
    if !output(ids.tid, &record) {
        lost(ids.tgid, counter::RING_FULL_OTHER);
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
pub fn emit_free(ids: Ids, addr: u64, time: u64) {
    if !output(ids.tid, &Free { header: header(leak_common::kind::FREE, 0, 0, ids.tgid), addr, time }) {
        cold_path();
        missed_free(ids.tgid, addr, time);
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

//! Records into the ring buffer. User space looks at the ring by the clock, so no record wakes it: a wake-up costs more
//! than the record.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::bpf_ringbuf_output;
use leak_common::{Free, Header, MissedFree, counter};

use crate::maps::{EVENTS, MISSED, count};

/// Copies a record into the ring; false where it is full. One call where reserve and submit are two: calls are what a
/// program's time goes into.
#[inline(always)]
pub fn output<T>(record: &T) -> bool {
    // SAFETY: the record is initialised to its last byte (no implicit padding, see leak_common) and lies on the stack.
    let result = unsafe {
        bpf_ringbuf_output(
            (&raw const EVENTS).cast_mut().cast::<c_void>(),
            core::ptr::from_ref(record).cast_mut().cast::<c_void>(),
            size_of::<T>() as u64,
            u64::from(BPF_RB_NO_WAKEUP),
        )
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
#[inline(never)]
pub fn missed_free(tgid: u32, addr: u64, time: u64) -> u64 {
    let key = MissedFree { tgid, reserved: 0, addr };
    if MISSED.insert(key, time, 0).is_ok() {
        count(counter::RING_FULL_FREE);
    } else {
        count(counter::FREE_LOST);
    }
    0
}

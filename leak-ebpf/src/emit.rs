//! Records into the ring buffer. User space looks at the ring by the clock, so no record wakes it: a wake-up costs more
//! than the record.

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use leak_common::{Free, Header, MissedFree, counter};

use crate::maps::{EVENTS, MISSED, count};

/// Writes a record whose loss costs only accuracy.
#[inline(always)]
pub fn emit<T: 'static>(record: T, lost: u32) -> bool {
    let Some(mut entry) = EVENTS.reserve::<T>(0) else {
        count(lost);
        return false;
    };
    entry.write(record);
    entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    true
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
    if let Some(mut entry) = EVENTS.reserve::<Free>(0) {
        entry.write(Free { header: header(leak_common::kind::FREE, 0, 0, tgid), addr, time });
        entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    } else {
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

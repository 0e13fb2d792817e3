//! Return addresses that a pending return probe has replaced on the stack by its trampoline.
//!
//! The kernel keeps the real ones in a list of the task, innermost first (`struct return_instance`,
//! include/linux/uprobes.h). Where the fields are is read from the kernel's type information by user space.

use aya_ebpf::helpers::generated::bpf_get_current_task;
use aya_ebpf::helpers::{bpf_probe_read_kernel, bpf_probe_read_user};

use crate::maps::return_offsets;
use crate::regs::{self, Frame};
use crate::repeat::repeat;
use crate::unwind::range_of;

/// The most pending return probes that are looked at.
const INSTANCES: u32 = 64;

struct Search {
    slot: u64,
    instance: u64,
    found: u64,
}

#[inline(always)]
fn read(address: u64) -> u64 {
    // SAFETY: a bad address is an error result.
    unsafe { bpf_probe_read_kernel(address as *const u64) }.unwrap_or(0)
}

#[inline(never)]
extern "C" fn look(_index: u64, search: *mut Search) -> i64 {
    // SAFETY: bpf_loop passes on the pointer that it was given.
    let search = unsafe { &mut *search };
    if search.instance == 0 {
        return 1;
    }
    let offsets = return_offsets();
    if read(search.instance + offsets.stack) == search.slot {
        search.found = read(search.instance + offsets.address);
        return 1;
    }
    search.instance = read(search.instance + offsets.next);
    0
}

/// The address that the current thread's function returns to whose return address was at `slot`, if a return probe
/// is pending for it; otherwise zero.
#[inline(never)]
pub fn pending(slot: u64) -> u64 {
    let offsets = return_offsets();
    if offsets.task == 0 {
        return 0;
    }
    // SAFETY: no arguments.
    let task = unsafe { bpf_get_current_task() };
    let utask = read(task + offsets.task);
    if utask == 0 {
        return 0;
    }
    let mut search = Search { slot, instance: read(utask + offsets.instances), found: 0 };
    repeat::<INSTANCES, _>(look, &raw mut search);
    search.found
}

/// Whether the function that was entered with this frame returns to a return probe's trampoline: to no known code.
#[inline(always)]
pub fn to_trampoline(tgid: u32, frame: Frame) -> bool {
    let address = if regs::LINK_REGISTER { frame.link } else { at(frame.sp) };
    address != 0 && is_no_code(tgid, address)
}

#[inline(always)]
fn at(address: u64) -> u64 {
    // SAFETY: a bad address is an error result.
    unsafe { bpf_probe_read_user(address as *const u64) }.unwrap_or(0)
}

#[inline(never)]
fn is_no_code(tgid: u32, address: u64) -> bool {
    range_of(tgid, address).is_none()
}

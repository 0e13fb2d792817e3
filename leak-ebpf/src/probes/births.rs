//! Processes that are there from now on: forked, or with another program. Only loaded where all processes are traced from their start.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use crate::maps::{BORN, task_offsets};
use crate::thread::ids;

/// Full, the slower look at all processes finds it.
#[inline(always)]
fn born(tgid: u32) {
    let _ = BORN.insert(tgid, 0, 0);
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
fn born_by_exec(_ctx: RawTracePointContext) -> u32 {
    born(ids().tgid);
    0
}

/// Parent and child.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
fn born_by_fork(ctx: RawTracePointContext) -> u32 {
    let Some((tgid_offset, pid_offset)) = task_offsets() else { return 0 };
    let child: u64 = ctx.arg(1);
    let read = |offset: u64| {
        // SAFETY: reading kernel memory that is not there is an error result.
        unsafe { bpf_probe_read_kernel((child + offset) as *const u32) }
    };
    // Otherwise it is a thread.
    if let (Ok(tgid), Ok(pid)) = (read(tgid_offset), read(pid_offset))
        && tgid == pid
    {
        born(tgid);
    }
    0
}

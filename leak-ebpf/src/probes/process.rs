//! What happens to traced processes and their threads, from the scheduler's tracepoints.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use aya_log_ebpf::debug;
use leak_common::{Process, kind};

use crate::emit::{emit_change, header};
use crate::maps::{CLOCK, is_target, now, raise_generation, task_offsets};
use crate::thread::{forget, ids};
use crate::unwind;

/// A new program: all that was known of the process's memory and code is void. The thread that called exec has by now
/// the leader's id.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
fn process_exec(ctx: RawTracePointContext) -> u32 {
    let ids = ids();
    if !is_target(ids.tgid) {
        return 0;
    }
    let old: u64 = ctx.arg(1);
    forget(old as u32);
    forget(ids.tid);
    unwind::all_code_changed(ids.tgid);
    raise_generation();
    debug!(&ctx, "exec in process {}", ids.tgid);
    let process = Process { header: header(kind::EXEC, 0, 0, ids.tgid), time: now(), tid: old as u32, other: 0 };
    emit_change(ids, process);
    0
}

/// A process or a thread is started. Only loaded where children are followed.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
fn process_fork(ctx: RawTracePointContext) -> u32 {
    let ids = ids();
    if !is_target(ids.tgid) {
        return 0;
    }
    let Some((tgid_offset, pid_offset)) = task_offsets() else { return 0 };
    let child: u64 = ctx.arg(1);
    let read = |offset: u64| {
        // SAFETY: reading kernel memory that is not there is an error result.
        unsafe { bpf_probe_read_kernel((child + offset) as *const u32) }
    };
    let (Ok(tgid), Ok(pid)) = (read(tgid_offset), read(pid_offset)) else { return 0 };
    if tgid != pid {
        // A thread.
        return 0;
    }
    let process = Process { header: header(kind::FORK, 0, 0, ids.tgid), time: now(), tid: ids.tid, other: tgid };
    emit_change(ids, process);
    0
}

/// A thread ends. Whether the process ends with its leader user space knows better (a pidfd).
#[raw_tracepoint(tracepoint = "sched_process_exit")]
fn process_exit(_ctx: RawTracePointContext) -> u32 {
    let ids = ids();
    // Also of a process that is no longer traced: its thread's slot has to become free.
    forget(ids.tid);
    if !is_target(ids.tgid) {
        return 0;
    }
    if ids.tid == ids.tgid {
        let process = Process { header: header(kind::EXIT, 0, 0, ids.tgid), time: now(), tid: ids.tid, other: 0 };
        emit_change(ids, process);
    }
    0
}

/// Reads both clocks. Never attached: user space has it run once (`BPF_PROG_TEST_RUN`).
#[raw_tracepoint(tracepoint = "sys_enter")]
fn calibrate(_ctx: RawTracePointContext) -> u32 {
    if let Some(clock) = CLOCK.get_ptr_mut(0) {
        // SAFETY: a valid map value, and only one program at a time is run for it.
        unsafe {
            (*clock).sampled_jiffies = bpf_jiffies64();
            (*clock).sampled_ns = bpf_ktime_get_ns();
        }
    }
    0
}

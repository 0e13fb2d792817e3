//! Whom the kernel kills because memory has run out, of a cgroup or of the host.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::RawTracePointContext;

use crate::maps::task_offsets;

/// Victims that user space has not looked at yet, with the time, nanoseconds of `CLOCK_MONOTONIC`. It looks many times a second, and the
/// kernel kills one after the other: whoever finds no room is not told of.
#[map]
static OOM_VICTIMS: HashMap<u32, u64> = HashMap::with_max_entries(256, 0);

/// The victim: until 6.8 the id of its thread (`TP_PROTO(int pid)`), from then on its task
/// (`TP_PROTO(struct task_struct *task, uid_t uid)`, include/trace/events/oom.h). The kernel's addresses have the highest bit, and no id
/// has it.
#[raw_tracepoint(tracepoint = "mark_victim")]
fn oom_victim(ctx: RawTracePointContext) -> u32 {
    let victim: u64 = ctx.arg(0);
    let id = if victim >> 63 == 0 {
        victim as u32
    } else {
        let Some((tgid_offset, _)) = task_offsets() else { return 0 };
        // SAFETY: reading kernel memory that is not there is an error result.
        let Ok(tgid) = (unsafe { bpf_probe_read_kernel((victim + tgid_offset) as *const u32) }) else { return 0 };
        tgid
    };
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // The first time is the one: a victim that takes long to end is marked again.
    let _ = OOM_VICTIMS.insert(id, now, u64::from(BPF_NOEXIST));
    0
}

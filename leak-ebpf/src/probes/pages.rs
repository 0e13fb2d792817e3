//! Page faults of processes that grow: in which call stacks they touch pages that they did not have. Evidence where nothing else is
//! known of a process, or not enough: it needs no probe in the process. Attached only while there is such a process, since every page
//! fault of the system passes here.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use leak_common::{PageKey, op};

use crate::maps::{PAGED, PAGES, atomic_add};
use crate::regs;
use crate::stack::{self, For};
use crate::thread::{current_or_new, ids};

/// Of the error code (`arch/x86/include/asm/trap_pf.h`): the page was there and the access not allowed; it was to be written. A page
/// that is written first is the process's own; what is only read is a file's, or the page of zeros that all share.
const PROTECTION: u64 = 1;
const WRITE: u64 = 2;

/// Address, the user's registers, error code.
#[raw_tracepoint(tracepoint = "page_fault_user")]
fn page_fault(ctx: RawTracePointContext) -> u32 {
    let error: u64 = ctx.arg(2);
    if error & (PROTECTION | WRITE) != WRITE {
        return 0;
    }
    let ids = ids();
    let Some(every) = PAGED.get_ptr(ids.tgid) else { return 0 };
    // SAFETY: a valid map value, one aligned word.
    let every = unsafe { *every };
    // SAFETY: no arguments.
    if every > 1 && unsafe { bpf_get_prandom_u32() } > u32::MAX / every {
        return 0;
    }
    let (Some(thread), Some((_, frame))) = (current_or_new(ids), regs::system_call(ctx.arg(1))) else { return 0 };
    stack::take(ctx.as_ptr(), thread, frame, For::Fault, op::FAULT);
    let key = PageKey { tgid: ids.tgid, reserved: 0, stack: thread.walk.hash() };
    match PAGES.get_ptr_mut(key) {
        Some(count) => atomic_add(count, u64::from(every)),
        None => {
            // Full, or another thread was faster: this is a sample.
            let _ = PAGES.insert(key, u64::from(every), 0);
        }
    }
    0
}

//! mmap, munmap, mremap and brk.
//!
//! By their entry functions in the kernel (fentry, fexit), which only these calls pay for. Where there is no such
//! attachment, by the tracepoints of all system calls: those make the kernel take the slow way into and out of
//! *every* system call, and a return probe is one (`uretprobe`, x86-64 since 6.11): measured 100 ns and more for each
//! allocation. So the programs there leave as soon as the number is not one of these, which takes the tracepoint's typed
//! arguments (5.5); the plain raw tracepoints are the last resort.
//! All give the user's registers, from which the stack is taken, and need no tracefs.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::macros::{btf_tracepoint, fentry, fexit, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, FEntryContext, FExitContext, RawTracePointContext};
use leak_common::{Map, RemapEnd, Unmap, UnmapEnd, counter, flag, kind, op};

use crate::emit::{emit, emit_change, header};
use crate::maps::{is_target, lost, now, raise_generation};
use crate::regs::{self, Registers, nr};
use crate::stack::{self, For};
use crate::thread::{current, current_or_new, ids};
use crate::unwind;

const PROT_EXEC: u32 = 4;
const MAP_FIXED: u32 = 0x10;
const MAP_ANONYMOUS: u32 = 0x20;

#[inline(always)]
fn is_mapping_call(number: u64) -> bool {
    number == nr::MMAP || number == nr::MUNMAP || number == nr::MREMAP || number == nr::BRK
}

#[btf_tracepoint(function = "sys_enter")]
fn typed_sys_enter(ctx: BtfTracePointContext) -> u32 {
    let number: u64 = ctx.arg(1);
    if is_mapping_call(number) {
        enter(ctx.as_ptr(), number, ctx.arg(0), For::TypedSystemCall);
    }
    0
}

#[btf_tracepoint(function = "sys_exit")]
fn typed_sys_exit(ctx: BtfTracePointContext) -> u32 {
    let registers: *const Registers = ctx.arg(0);
    // SAFETY: the kernel knows the argument's type, so this is a plain load.
    if is_mapping_call(unsafe { regs::syscall_number(registers) }) {
        leave(ctx.arg(1));
    }
    0
}

#[raw_tracepoint(tracepoint = "sys_enter")]
fn sys_enter(ctx: RawTracePointContext) -> u32 {
    let number: u64 = ctx.arg(1);
    if is_mapping_call(number) {
        enter(ctx.as_ptr(), number, ctx.arg(0), For::SystemCall);
    }
    0
}

#[raw_tracepoint(tracepoint = "sys_exit")]
fn sys_exit(ctx: RawTracePointContext) -> u32 {
    leave(ctx.arg(1));
    0
}

/// Goes on with the walk of a system call's stack, where the kernel has no `bpf_loop`.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn walk_tracepoint(ctx: RawTracePointContext) -> u32 {
    stack::go_on(ctx.as_ptr(), For::SystemCall);
    0
}

/// The pair of programs at one system call's function, whose only argument is the user's registers.
macro_rules! system_call {
    ($enter:ident, $leave:ident, $number:expr) => {
        #[fentry]
        fn $enter(ctx: FEntryContext) -> u32 {
            enter(ctx.as_ptr(), $number, ctx.arg(0), For::TypedSystemCall);
            0
        }

        #[fexit]
        fn $leave(ctx: FExitContext) -> u32 {
            leave(ctx.arg(1));
            0
        }
    };
}

system_call!(enter_mmap, leave_mmap, nr::MMAP);
system_call!(enter_munmap, leave_munmap, nr::MUNMAP);
system_call!(enter_mremap, leave_mremap, nr::MREMAP);
system_call!(enter_brk, leave_brk, nr::BRK);

/// A mapping call of any process begins; `registers` is the address of the user's.
#[inline(always)]
fn enter(ctx: *mut c_void, number: u64, registers: u64, what: For) {
    let ids = ids();
    if !is_target(ids.tgid) {
        return;
    }
    let Some((args, frame)) = regs::system_call(registers) else {
        return;
    };
    let Some(thread) = current_or_new(ids) else {
        // A new mapping is missed, which costs accuracy; what takes pages away may not be missed unnoticed.
        if number != nr::MMAP || args[3] as u32 & MAP_FIXED != 0 {
            lost(ids.tgid, counter::RING_FULL_OTHER);
        }
        return;
    };
    let now = now();
    let in_allocator = thread.in_allocator(frame.sp, now);
    let call = &mut thread.call;
    call.number = number + 1;
    call.addr = args[0];
    call.size = args[1];
    call.prot = args[2] as u32;
    call.flags = args[3] as u32;
    call.in_allocator = u64::from(in_allocator);
    call.stack = 0;
    if number == nr::MUNMAP || (number == nr::MREMAP && !in_allocator) {
        // At entry, before the kernel can give the pages to another thread.
        let kind = if number == nr::MUNMAP { kind::UNMAP } else { kind::REMAP_BEGIN };
        let unmap = Unmap {
            header: header(kind, op::MAPPING, 0, ids.tgid),
            addr: args[0],
            size: args[1],
            time: now,
            tid: ids.tid,
            reserved: 0,
        };
        emit_change(ids, unmap);
    }
    if number == nr::MREMAP {
        call.size = args[2];
    }
    // An allocator's own mapping is not the program's; the break is followed wherever it is moved.
    if number != nr::MUNMAP && !in_allocator {
        stack::take(ctx, thread, frame, what, op::MAPPING);
    }
}

/// A system call ends.
#[inline(always)]
fn leave(result: u64) {
    let ids = ids();
    let Some(thread) = current(ids) else {
        return;
    };
    let call = &mut thread.call;
    if call.number == 0 {
        return;
    }
    let number = call.number - 1;
    call.number = 0;
    // The kernel returns errors as -4095 to -1 (IS_ERR_VALUE).
    let failed = result > u64::MAX - 4095;
    let now = now();
    let in_allocator = call.in_allocator != 0;
    match number {
        nr::MMAP if !failed => {
            let file = call.flags & MAP_ANONYMOUS == 0;
            if call.prot & PROT_EXEC != 0 {
                unwind::code_changed(ids.tgid, result, call.size);
                raise_generation();
                let flags = if file { flag::FILE } else { 0 };
                let map = map(kind::MAP_EXEC, flags, ids.tgid, result, call.size, 0, now);
                emit_change(ids, map);
            }
            if !in_allocator {
                let flags = if file { flag::FILE } else { 0 };
                let map = map(kind::MAP, flags, ids.tgid, result, call.size, call.stack, now);
                emit(ids.tid, map, counter::RING_FULL_ALLOC);
            }
        }
        nr::MUNMAP if failed => {
            let end =
                UnmapEnd { header: header(kind::UNMAP_FAILED, op::MAPPING, 0, ids.tgid), tid: ids.tid, reserved: 0 };
            emit_change(ids, end);
        }
        nr::MREMAP if !in_allocator => {
            let end = RemapEnd {
                header: header(kind::REMAP_END, op::MAPPING, 0, ids.tgid),
                addr: if failed { 0 } else { result },
                size: call.size,
                stack: call.stack,
                time: now,
                tid: ids.tid,
                reserved: 0,
            };
            emit_change(ids, end);
        }
        nr::BRK => {
            let flags = if in_allocator { flag::IN_ALLOCATOR } else { 0 };
            let map = map(kind::BRK, flags, ids.tgid, result, 0, call.stack, now);
            emit_change(ids, map);
        }
        _ => {}
    }
}

#[inline(always)]
fn map(kind: u8, flags: u16, tgid: u32, addr: u64, size: u64, stack: u64, time: u64) -> Map {
    Map { header: header(kind, op::MAPPING, flags, tgid), addr, size, stack, time }
}

//! The allocator's functions. `session` stands at all of them where the kernel has session links; `enter_any` and
//! `leave_any` where it has multi-uprobe links; one `enter_*` a shape and `leave_any` elsewhere.
//!
//! `cfg(leaktrace_broken)` makes a mistake on purpose, so that it can be seen which tests find it (`cargo xtask vm --broken`): the
//! size of `aligned_alloc` from the wrong register, or a call of a helper that Linux has for uprobes from 5.15 on.

use core::ffi::c_void;
use core::hint::cold_path;

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_probe_read_user;
use aya_ebpf::helpers::generated::{bpf_get_attach_cookie, bpf_get_func_ip};
use aya_ebpf::macros::uprobe;
use aya_ebpf::programs::ProbeContext;
use leak_common::sampling::Sampling;
use leak_common::{Alloc, ReallocBegin, ReallocEnd, counter, kind, op};

use crate::emit::{emit_free, header, missed_end, missed_free, output};
use crate::maps::{count, count_unkept, keep_address, lost, never, now, sampling_of, size_is_followed, take_address};
use crate::probes::control;
use crate::regs::{self, Frame};
use crate::returns;
use crate::stack::{self, For};
use crate::thread::{Ids, Known, Thread, UNSAMPLED, add_hits, current, ids, new};

/// What a session program answers at entry: run it at the return too, or not (`UPROBE_HANDLER_IGNORE`). As the result of
/// any other kind of uprobe program 1 would mean "remove the breakpoint".
const WITH_RETURN: u32 = 0;
const NO_RETURN: u32 = 1;

/// No shape of function.
const NOT_KNOWN: u32 = u32::MAX;

/// The recorded call's function where nothing is to be said of it: its size is filtered out, or it is not sampled.
const NOT_FOLLOWED: u64 = 0;

/// Has the kernel leave this program's stack where the thread's own is.
///
/// Since 6.13 (arm64: 6.17) the JIT gives tracing programs a stack for each *CPU*, on the ground that they do not run twice at once on
/// one (`bpf_enable_priv_stack`, <https://github.com/torvalds/linux/blob/v6.16/kernel/bpf/verifier.c>). A uprobe program does where
/// the kernel is preemptible: nothing keeps another thread that hits a breakpoint from running it meanwhile (`uprobe_prog_run` has no
/// check for that), and both then write over each other's variables. On 7.3 that was met as a page fault in the kernel. A
/// program that holds a tail call gets no such stack; whether it is ever reached does not matter, and the verifier takes it out.
#[inline(always)]
fn keep_own_stack() {
    if never() {
        // SAFETY: never reached. 12 is bpf_tail_call (include/uapi/linux/bpf.h); calls change these registers.
        unsafe {
            core::arch::asm!(
                "call 12",
                out("r0") _,
                out("r1") _,
                out("r2") _,
                out("r3") _,
                out("r4") _,
                out("r5") _,
            );
        }
    }
}

#[inline(always)]
fn frame(ctx: &ProbeContext) -> Frame {
    // SAFETY: the context of a uprobe program is its pt_regs.
    regs::frame(unsafe { &*ctx.regs })
}

#[inline(always)]
fn argument(ctx: &ProbeContext, n: usize) -> u64 {
    ctx.arg::<u64>(n).unwrap_or(0)
}

/// Whether a session program is running for the return: only at entry does the pc stand at the breakpoint.
#[inline(always)]
fn is_return(ctx: &ProbeContext) -> bool {
    // SAFETY: the context of this program.
    let breakpoint = unsafe { bpf_get_func_ip(ctx.as_ptr()) };
    breakpoint != frame(ctx).pc
}

/// The two factors' product, or `None` where the allocator will refuse.
#[inline(always)]
fn product(a: u64, b: u64) -> Option<u64> {
    // In halves: checked_mul, and LLVM's idea of a division check, need a 128-bit multiplication, which BPF lacks.
    let (large, small) = if a > b { (a, b) } else { (b, a) };
    let high = (large >> 32).wrapping_mul(small);
    let low = (large & 0xffff_ffff).wrapping_mul(small);
    if small >> 32 != 0 || high.wrapping_add(low >> 32) >> 32 != 0 {
        count(counter::OVERFLOWED);
        return None;
    }
    Some((high << 32).wrapping_add(low))
}

/// Whether user space may know the block at `addr`, which is released or resized. It is then no longer kept as followed.
#[inline(always)]
fn may_be_followed(sampling: Sampling, tgid: u32, addr: u64) -> bool {
    sampling.interval().is_exact() || take_address(tgid, addr) || !sampling.frees_filtered()
}

/// Whether calls of this shape need no return where they are not sampled, if their functions call no others. Those that resize a
/// block do at times (realloc of nothing), and are rare.
#[inline(always)]
fn may_be_quiet(op: u8) -> bool {
    // Where the return address is in a register there is no place on the stack to look whether the call still lasts.
    !regs::LINK_REGISTER && (op == op::MALLOC || op == op::CALLOC || op == op::ALIGNED)
}

/// Remembers a call of which nothing is to be said: what is called and mapped meanwhile is the allocator's.
#[inline(always)]
fn remember(thread: &mut Thread, frame: Frame, now: u64) -> u32 {
    thread.op = NOT_FOLLOWED;
    thread.time = now;
    thread.skipped_sp = 0;
    thread.caller = 0;
    thread.pc = frame.pc;
    thread.sp = frame.sp;
    WITH_RETURN
}

/// Records that an allocation began.
#[inline(always)]
fn enter(
    ctx: &ProbeContext,
    thread: &mut Thread,
    (ids, session): (Ids, bool),
    frame: Frame,
    op: u8,
    arguments: Arguments,
) -> u32 {
    let Arguments { size, pointer, extra } = arguments;
    let now = now();
    let mut resizes = op::resizes(op) && pointer != 0;
    let sampling = thread.sampling_at_entry();
    if thread.sp != 0 {
        cold_path();
        // The same sp in another function is a tail call, if the return probe of the caller still stands there: what it
        // returns is what the caller returns, so it is part of that call like any that is nested. Otherwise it is a new call,
        // and the recorded one never returned.
        if thread.is_nested(frame.sp, now)
            || (frame.sp == thread.sp && frame.pc != thread.pc && returns::to_trampoline(ids.tgid, frame))
        {
            count(counter::NESTED);
            thread.nests();
            return NO_RETURN;
        }
        count(counter::ABANDONED);
        thread.sp = 0;
    }
    let interval = sampling.interval();
    thread.interval = u64::from(interval.code());
    if !size_is_followed(size) {
        cold_path();
        if resizes && may_be_followed(sampling, ids.tgid, pointer) {
            emit_free(ids, pointer, now);
        }
        return remember(thread, frame, now);
    }
    if !interval.is_exact() {
        cold_path();
        // A block that is not followed is as good as none: then the new one comes out of nothing.
        resizes = resizes && may_be_followed(sampling, ids.tgid, pointer);
        if !thread.samples(interval, size) {
            if session && may_be_quiet(op) && thread.may_skip(frame.pc) {
                thread.skip(frame.sp);
                return NO_RETURN;
            }
            if !resizes {
                return remember(thread, frame, now);
            }
            thread.interval = UNSAMPLED;
        }
    }
    if resizes {
        cold_path();
        let begin = ReallocBegin {
            header: header(kind::REALLOC_BEGIN, op, 0, ids.tgid),
            addr: pointer,
            time: now,
            tid: ids.tid,
            reserved: 0,
        };
        if !output(ids.tid, &begin) {
            // The block may be gone when realloc returns: it is treated as freed, and the result as a new one.
            missed_free(ids.tgid, pointer, now);
        }
    }
    thread.time = now;
    thread.skipped_sp = 0;
    thread.pc = frame.pc;
    thread.op = u64::from(op);
    thread.size = size;
    thread.pointer = pointer;
    thread.extra = extra;
    thread.resizes = u64::from(resizes);
    thread.sp = frame.sp;
    if thread.interval == UNSAMPLED {
        cold_path();
        // The block that it takes the place of is followed, and ends here; the new one needs no stack.
        thread.caller = 0;
        return WITH_RETURN;
    }
    stack::take(ctx.as_ptr(), thread, frame, For::Call, op);
    WITH_RETURN
}

/// Records that a block is released: at entry, before the allocator can hand the address out again.
#[inline(always)]
fn free(thread: Option<&mut Thread>, ids: Ids, frame: Frame, addr: u64) {
    if addr == 0 {
        return;
    }
    let now = now();
    let sampling = match thread {
        Some(thread) => {
            let sampling = thread.sampling_at_entry();
            if thread.is_nested(frame.sp, now) {
                cold_path();
                count(counter::NESTED);
                return;
            }
            sampling
        }
        // A thread that has only freed so far.
        None => match sampling_of(ids.tgid) {
            Some((place, sampling)) => {
                cold_path();
                add_hits(place, 1, 0, 0);
                sampling
            }
            None => return,
        },
    };
    if may_be_followed(sampling, ids.tgid, addr) {
        emit_free(ids, addr, now);
    }
}

/// Records how the allocation ended.
#[inline(always)]
fn leave(thread: &mut Thread, ids: Ids, frame: Frame) -> u32 {
    thread.returns = thread.returns.wrapping_add(1);
    if thread.sp.wrapping_add(regs::RETURN_POPS) != frame.sp || thread.sp == 0 {
        cold_path();
        // Below the recorded call it is the return of a nested one, whose entry was not recorded on purpose.
        if frame.sp > thread.sp.wrapping_add(regs::RETURN_POPS) {
            count(counter::UNPAIRED_RETURN);
        }
        return 0;
    }
    thread.sp = 0;
    if thread.interval != 0 {
        cold_path();
        thread.was_quiet();
    }
    if thread.op == NOT_FOLLOWED {
        cold_path();
        return 0;
    }
    let result = frame.result;
    let mut addr = result;
    let called = thread.op as u8;
    if called == op::POSIX_MEMALIGN {
        cold_path();
        addr = 0;
        if result as u32 == 0 {
            // SAFETY: a bad address is an error result.
            match unsafe { bpf_probe_read_user(thread.pointer as *const u64) } {
                Ok(block) => addr = block,
                Err(_) => count(counter::BAD_RESULT),
            }
        }
    }
    let mut size = thread.size;
    if called == op::XALLOCX {
        cold_path();
        addr = 0;
        // Real sizes are those of the allocator's classes: of what was asked for it may be less or more.
        if result >= size {
            addr = thread.pointer;
            size = result.min(size.saturating_add(thread.extra));
        }
    }
    if called == op::REALLOCF && addr == 0 {
        cold_path();
        // It has released the block: as realloc to nothing.
        size = 0;
    }
    let failed = addr == 0 && thread.size != 0;
    // Of a process that is traced exactly nothing is kept. Where sampling began while the call was in flight its block is kept as
    // well, or its free would not be sent.
    let keeps = thread.interval != 0 || !thread.process_sampling().interval().is_exact();
    let mut lost = false;
    if keeps {
        cold_path();
        if thread.interval == UNSAMPLED && addr != 0 {
            // The old block is gone, and of the new one nothing is said.
            addr = 0;
            size = 0;
        }
        // Of a realloc that failed the old block is back.
        let kept = if addr == 0 && size != 0 && thread.resizes != 0 { thread.pointer } else { addr };
        if kept != 0 && !keep_address(ids.tgid, kept, thread.time) {
            count_unkept(thread.interval, size);
            lost = true;
        }
    }
    let interval = thread.interval as u8;
    if thread.resizes != 0 {
        cold_path();
        if lost {
            addr = 0;
            size = 0;
        }
        let end = ReallocEnd {
            header: header(kind::REALLOC_END, called, u16::from(interval), ids.tgid),
            addr,
            size,
            stack: thread.stack,
            time: now(),
            tid: ids.tid,
            reserved: 0,
        };
        if !output(ids.tid, &end) {
            count(counter::RING_FULL_ALLOC);
            missed_end(ids.tgid, ids.tid, end.time);
        }
    } else if addr != 0 && !lost {
        let alloc = Alloc {
            header: header(kind::ALLOC, called, u16::from(interval), ids.tgid),
            addr,
            size,
            stack: thread.stack,
            // The time of entry: a tick more or less does not matter, and it saves a call.
            time: thread.time,
        };
        if !output(ids.tid, &alloc) {
            cold_path();
            count(counter::RING_FULL_ALLOC);
        }
    }
    if failed {
        cold_path();
        count(counter::FAILED);
    }
    0
}

/// The arguments that matter.
#[derive(Clone, Copy)]
struct Arguments {
    size: u64,
    /// realloc's block, or where `posix_memalign` will put the address.
    pointer: u64,
    /// See [`Thread::extra`].
    extra: u64,
}

/// The arguments that matter, by shape of function; `None` where the allocator will refuse the call.
#[inline(always)]
fn arguments(ctx: &ProbeContext, shape: u8) -> Option<Arguments> {
    // SAFETY: the context of a uprobe program is its pt_regs.
    let given = regs::arguments(unsafe { &*ctx.regs });
    let [first, second, third] =
        if shape & op::SHIFTED == 0 { [given[0], given[1], given[2]] } else { [given[1], given[2], given[3]] };
    let (size, pointer, extra) = match shape & !op::SHIFTED {
        op::CALLOC => (product(first, second)?, 0, 0),
        op::ALIGNED => (if cfg!(leaktrace_broken = "argument") { first } else { second }, 0, 0),
        op::REALLOC | op::REALLOCF => (second, first, 0),
        op::REALLOCARRAY => (product(second, third)?, first, 0),
        op::POSIX_MEMALIGN => (third, first, 0),
        op::XALLOCX => (second, first, third),
        op::RUST_REALLOC => (given[3], first, 0),
        _ => (first, 0, 0),
    };
    Some(Arguments { size, pointer, extra })
}

/// The entry of any function. What it returns only a session program may return.
#[inline(always)]
fn enter_shape(ctx: &ProbeContext, thread: Option<&'static mut Thread>, (ids, session): (Ids, bool), shape: u8) -> u32 {
    let frame = frame(ctx);
    if cfg!(leaktrace_broken = "helper") {
        // SAFETY: the context of this program.
        unsafe { bpf_get_func_ip(ctx.as_ptr()) };
    }
    let mut thread = thread;
    if let Some(thread) = &mut thread {
        thread.stepped += u32::from(shape & op::STEPPED != 0);
        thread.entered();
    }
    let shape = shape & !op::STEPPED;
    if shape == op::FREE {
        free(thread, ids, frame, argument(ctx, 0));
        return NO_RETURN;
    }
    if shape == op::FREE_UNNAMED || control::releases(ctx, shape) {
        lost(ids.tgid, counter::FREE_LOST);
        return NO_RETURN;
    }
    if matches!(shape, op::CONTROL | op::CONTROL_BY_MIB) {
        return NO_RETURN;
    }
    let Some(thread) = thread.or_else(|| new(ids)) else {
        // No room to follow this call. What it allocates is missed, which costs accuracy; what it resizes must not look leaked.
        if op::resizes(shape & !op::SHIFTED)
            && let Some((_, sampling)) = sampling_of(ids.tgid)
            && let Some(arguments) = arguments(ctx, shape)
            && arguments.pointer != 0
            && may_be_followed(sampling, ids.tgid, arguments.pointer)
        {
            emit_free(ids, arguments.pointer, now());
        }
        return NO_RETURN;
    };
    match arguments(ctx, shape) {
        Some(arguments) => enter(ctx, thread, (ids, session), frame, shape & !op::SHIFTED, arguments),
        None => NO_RETURN,
    }
}

/// The shape of function that this probe stands in: the cookie that it was attached with.
#[inline(always)]
fn shape(ctx: &ProbeContext) -> u8 {
    // SAFETY: the context of this program.
    (unsafe { bpf_get_attach_cookie(ctx.as_ptr()) }) as u8
}

/// Entry and return of every function, on one session link (6.13). Without aya's macro, which would answer 0 whatever the
/// function does.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
extern "C" fn session(ctx: *mut c_void) -> u32 {
    keep_own_stack();
    let ctx = ProbeContext::new(ctx);
    let ids = ids();
    let frame = frame(&ctx);
    let mut thread = current(ids);
    // Hot cases are recognised without asking the kernel. A return stands at the recorded caller, with the recorded sp; an
    // entry at a breakpoint that was met before. Whatever it is, there is one place below from which an allocation is
    // entered: the verifier follows each such place through the whole walk of the stack.
    let mut known = NOT_KNOWN;
    if let Some(thread) = &mut thread {
        if frame.pc == thread.caller && frame.sp == thread.sp.wrapping_add(regs::RETURN_POPS) {
            return leave(thread, ids, frame);
        }
        if frame.pc == thread.free_pc {
            thread.entered();
            free(Some(thread), ids, frame, argument(&ctx, 0));
            return NO_RETURN;
        }
        let function = thread.known(frame.pc);
        if function.pc == frame.pc {
            known = function.shape;
        }
    }
    if known == NOT_KNOWN {
        cold_path();
        if is_return(&ctx) {
            // Without an entry before it, it is nothing to us.
            return thread.map_or(0, |thread| leave(thread, ids, frame));
        }
        known = u32::from(shape(&ctx));
        if let Some(thread) = &mut thread {
            if known == u32::from(op::FREE) {
                thread.free_pc = frame.pc;
            } else {
                *thread.known(frame.pc) = Known { pc: frame.pc, shape: known, quiet: 0 };
            }
        }
    }
    enter_shape(&ctx, thread, (ids, true), known as u8)
}

/// The entries of every function, on one link with cookies (6.6).
#[uprobe]
fn enter_any(ctx: ProbeContext) -> u32 {
    keep_own_stack();
    let ids = ids();
    enter_shape(&ctx, current(ids), (ids, false), shape(&ctx));
    0
}

/// The return of any function.
#[uprobe]
fn leave_any(ctx: ProbeContext) -> u32 {
    keep_own_stack();
    let ids = ids();
    if let Some(thread) = current(ids) {
        leave(thread, ids, frame(&ctx));
    }
    0
}

/// An entry program of its own for one shape of function: kernels before 5.15 have no cookies.
macro_rules! entry {
    ($name:ident, $shape:expr) => {
        #[uprobe]
        fn $name(ctx: ProbeContext) -> u32 {
            keep_own_stack();
            let ids = ids();
            enter_shape(&ctx, current(ids), (ids, false), $shape);
            0
        }
    };
}

entry!(enter_malloc, op::MALLOC);
entry!(enter_calloc, op::CALLOC);
entry!(enter_aligned, op::ALIGNED);
entry!(enter_realloc, op::REALLOC);
entry!(enter_reallocarray, op::REALLOCARRAY);
entry!(enter_posix, op::POSIX_MEMALIGN);
entry!(enter_free, op::FREE);
entry!(enter_free_unnamed, op::FREE_UNNAMED);
entry!(enter_control, op::CONTROL);
entry!(enter_control_by_mib, op::CONTROL_BY_MIB);
entry!(enter_xallocx, op::XALLOCX);
entry!(enter_reallocf, op::REALLOCF);
entry!(enter_rust_realloc, op::RUST_REALLOC);
entry!(enter_heap_calloc, op::CALLOC | op::SHIFTED);
entry!(enter_heap_realloc, op::REALLOC | op::SHIFTED);
entry!(enter_heap_reallocarray, op::REALLOCARRAY | op::SHIFTED);
entry!(enter_heap_reallocf, op::REALLOCF | op::SHIFTED);

/// Goes on with the walk of a call's stack, where the kernel has no `bpf_loop`.
#[uprobe]
fn walk_uprobe(ctx: ProbeContext) -> u32 {
    stack::go_on(ctx.as_ptr(), For::Call);
    0
}

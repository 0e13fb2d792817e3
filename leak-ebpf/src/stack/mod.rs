//! The call stack of the current thread, hashed; sent whole the first time its hash is seen.
//!
//! Taken at entry, where the caller is at [sp] or in the link register: at return, the return probe's trampoline stands
//! there.
//!
//! - [`walk`]: from one frame to the next;
//! - [`kept`]: what the thread's stack before this one spares.

mod kept;
mod walk;

use core::ffi::c_void;
use core::hint::cold_path;

use aya_ebpf::helpers::generated::bpf_tail_call;
use leak_common::{MAX_FRAMES, StackHeader, counter, kind, stack_end};

use self::kept::{MOVED_A_STEP, VERIFIED_A_STEP, ends_as_kept, place, place_addresses, unchanged, verify};
pub use self::walk::Walk;
use self::walk::{FRAMES, MASK, MATCHED, NOT_KEPT, RUNNING, STEPS, mix, run, step, word};
use crate::emit::{header, output_bytes};
use crate::maps::{SEEN, SEEN_SETS, SEEN_WAYS, WALK_TRACEPOINT, WALK_UPROBE, count, generation, has_loop, tail_calls};
use crate::regs::{self, Frame};
use crate::thread::{Thread, current, ids};
use crate::unwind;

/// What a stack is taken for, and so where its hash goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// The allocator call in flight. The innermost address is the one that the function returns to: the frame is that
    /// of its first instructions.
    Call,
    /// The system call in flight, seen at the plain tracepoint. The innermost address is the pc.
    SystemCall,
    /// The same, seen at a kernel function or a typed tracepoint. Programs there are of as many types as there are functions, and a
    /// map of programs takes those of one type only: mentioning it would keep all but the first from loading. User space
    /// attaches them only where there is `bpf_loop`.
    TypedSystemCall,
    /// A page fault. The innermost address is that of the instruction, which may stand anywhere in its function: nothing is known
    /// of its frame without the whole table. Only where there is `bpf_loop`.
    Fault,
}

/// Takes the stack of `thread` from `frame`. Its hash goes to the call in flight; user space has been sent the stack, or will
/// be with the next allocation from it if the ring was full. Nothing may be left to do after this: where there is no `bpf_loop`,
/// it may not return.
#[inline(always)]
pub fn take(ctx: *mut c_void, thread: &mut Thread, frame: Frame, what: For, op: u8) {
    let generation = generation();
    let tgid = thread.tgid;
    let walk = &mut thread.walk;
    walk.found = 0;
    walk.flags = 0;
    walk.zero_at = 0;
    walk.length = 0;
    walk.op = u64::from(op);
    walk.tgid = u64::from(tgid);
    walk.tag = unwind::tag(tgid);
    walk.kept = if has_loop() && walk.kept_generation == generation { walk.kept_count } else { 0 };
    walk.generation = generation;
    // A zero that ended it lies beyond its outermost frame.
    let outermost = if walk.kept_zero_at == 0 { walk.slots[0] } else { walk.kept_zero_at };
    walk.reach = if walk.kept == 0 { 0 } else { outermost.wrapping_add(8) };
    walk.end = RUNNING;
    if what == For::Call && !regs::LINK_REGISTER {
        match word(walk, frame.sp & !7) {
            Some(caller) => walk.push(caller, frame.sp & !7, frame.fp, 0, 0),
            None => walk.end = u64::from(stack_end::BAD_READ),
        }
    } else if what == For::Fault {
        walk.interrupted(frame);
    } else {
        // There is no slot: the address below the stack stands for it.
        let pc = if what == For::Call { frame.link } else { frame.pc };
        walk.push(pc, (frame.sp & !7).wrapping_sub(8), frame.fp, 0, 0);
    }
    if !has_loop() {
        if tail_calls() {
            // Also where there is nothing left to walk: the verifier then follows what finishes a stack once, and not in
            // each of the programs that begin one.
            hand_over_none(thread, what);
            follow_on(ctx, what);
            return;
        }
        if walk.end == RUNNING {
            run::<STEPS>(step, walk);
        }
        finish(thread, what);
        return;
    }
    if walk.end == RUNNING {
        cold_path();
        run::<STEPS>(step, walk);
    }
    if walk.end == MATCHED {
        // The matched frame itself has just been read.
        walk.left = walk.kept - 1;
        if walk.left != 0 && unchanged(walk) {
            walk.left = 0;
        }
        if walk.left != 0 {
            cold_path();
            run::<{ (MAX_FRAMES as u32).div_ceil(VERIFIED_A_STEP) }>(verify, walk);
        }
        if walk.left == 0 && ends_as_kept(walk) {
            walk.end = u64::from(stack_end::COMPLETE);
            walk.zero_at = walk.kept_zero_at;
            walk.flags |= walk.kept_flags;
            walk.tally.reused += walk.kept;
            if walk.found == 0 && walk.kept == walk.kept_count {
                walk.tally.add(0);
                let hash = walk.kept_hash;
                hand_over(thread, what, hash);
                return;
            }
        } else {
            cold_path();
            // The kept stack is gone: on from the frame that seemed to be in it.
            walk.kept = 0;
            walk.end = RUNNING;
            walk.push(walk.pc, walk.sp.wrapping_sub(8), walk.fp, walk.matched_fp_at, walk.matched_cfa_at);
            run::<STEPS>(step, walk);
        }
    } else {
        cold_path();
        // Ended without having met the kept stack: none of its frames is outside of those found.
        walk.kept = 0;
    }
    finish(thread, what);
}

/// Goes on with the walk in a program of its own. Returns only if the kernel refuses.
#[inline(always)]
fn follow_on(ctx: *mut c_void, what: For) {
    let programs = match what {
        For::Call => &raw const WALK_UPROBE,
        For::SystemCall => &raw const WALK_TRACEPOINT,
        For::TypedSystemCall | For::Fault => return,
    };
    // SAFETY: the context of this program, and a map of programs of its type.
    unsafe {
        bpf_tail_call(ctx, programs.cast_mut().cast::<c_void>(), 0);
    }
}

/// Frames that one program leaves before it calls itself anew: the kernel allows 33 such calls.
const FRAMES_A_CALL: u32 = 4;

/// Goes on with a walk that another program began.
#[inline(always)]
pub fn go_on(ctx: *mut c_void, what: For) {
    let Some(thread) = current(ids()) else {
        return;
    };
    let walk = &mut thread.walk;
    for _ in 0..FRAMES_A_CALL {
        if walk.end == RUNNING {
            walk.advance();
        }
    }
    if walk.end == RUNNING {
        follow_on(ctx, what);
        walk.end = u64::from(stack_end::TOO_DEEP);
    }
    finish(thread, what);
}

/// Puts the frames that were found in their place, and hands the stack over.
#[inline(always)]
fn finish(thread: &mut Thread, what: For) {
    let walk = &mut thread.walk;
    walk.tally.add(walk.found);
    walk.left = walk.found;
    let end = walk.end;
    let complete = end == u64::from(stack_end::COMPLETE);
    if !complete {
        walk.kept = 0;
    }
    if has_loop() {
        run::<{ (FRAMES as u32).div_ceil(MOVED_A_STEP) }>(place, walk);
    } else {
        walk.kept_hash = mix(walk.tag, walk.tgid);
        run::<{ (FRAMES as u32).div_ceil(MOVED_A_STEP) }>(place_addresses, walk);
    }
    walk.record.count = walk.kept as u32;
    walk.record.end = end as u32;
    let hash = if walk.kept == 0 { end } else { walk.hashes[((walk.kept - 1) & MASK) as usize] ^ end };
    walk.kept_hash = hash;
    walk.kept_flags = walk.flags;
    walk.kept_generation = walk.generation;
    walk.kept_zero_at = walk.zero_at;
    walk.kept_count = if complete && walk.flags & NOT_KEPT == 0 { walk.kept } else { 0 };
    hand_over(thread, what, hash);
}

/// Tells the call in flight its stack.
#[inline(always)]
fn hand_over(thread: &mut Thread, what: For, hash: u64) {
    publish_if_new(&mut thread.walk, hash);
    if what == For::Call {
        thread.stack = hash;
        thread.caller = thread.walk.caller();
    } else {
        thread.call.stack = hash;
    }
}

/// Until the walk has ended, the call in flight has no stack.
#[inline(always)]
fn hand_over_none(thread: &mut Thread, what: For) {
    if what == For::Call {
        thread.stack = 0;
        thread.caller = 0;
    } else {
        thread.call.stack = 0;
    }
}

/// Sees to it that user space has the stack.
#[inline(always)]
fn publish_if_new(walk: &mut Walk, hash: u64) {
    if hash != walk.sent_hash && publish(walk, hash) {
        walk.sent_hash = hash;
    }
}

/// Sends the stack unless user space has it. True once user space has it.
#[inline(never)]
fn publish(walk: &mut Walk, hash: u64) -> bool {
    let Some(set) = SEEN.get_ptr_mut((hash as u32) & (SEEN_SETS - 1)) else {
        return false;
    };
    // SAFETY: a valid map value. Other CPUs may write it at the same time; each way is one aligned u64, so what is read
    // is some hash that was sent, or zero.
    let set = unsafe { &mut *set };
    for known in set.iter() {
        if *known == hash {
            return true;
        }
    }
    walk.record.header = header(kind::STACK, walk.op as u8, walk.flags as u16, walk.tgid as u32);
    walk.record.id = hash;
    let frames = u64::from(walk.record.count) & MASK;
    let bytes = size_of::<StackHeader>() as u64 + frames * 8;
    // SAFETY: record and pcs are adjacent (both are multiples of eight bytes in a repr(C) structure) and hold at
    // least that many bytes.
    let sent = unsafe { output_bytes(ids().tid, (&raw mut walk.record).cast::<c_void>(), bytes) };
    if !sent {
        count(counter::RING_FULL_STACK);
        return false;
    }
    // Marked only now that it is in the ring. Which way is displaced does not matter.
    set[(hash >> 62) as usize & (SEEN_WAYS - 1)] = hash;
    true
}

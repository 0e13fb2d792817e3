//! The call stack of the current thread, hashed; sent whole the first time its hash is seen.
//!
//! Taken at entry, where the caller is at [sp] or in the link register: at return, the return probe's trampoline stands
//! there. Each frame is left by a rule ([`crate::unwind`]): from the tables, or by its frame pointer. The stack is read in
//! pieces: `bpf_probe_read_user` takes about 40 ns for 8 bytes and 52 for 1024. A piece ends with its page, because a read
//! that runs into an absent page is many times slower.
//!
//! # Verifying instead of unwinding
//! Most stacks of a thread share their outer frames with the one before it, so the last complete stack is kept, with
//! every word of memory that it was derived from. Once a frame of the new stack equals one of the kept (same return address
//! in the same place, same frame pointer where the frames outside it depend on that), its outer frames are the kept ones
//! exactly if those words are unchanged: they are read and compared, which is several times cheaper than unwinding.
//!
//! The kept stack is stored outermost frame first, so that inner frames come and go at its end. A walk puts its
//! frames at the other end of the same arrays, and they are then moved to where the kept ones end.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_probe_read_user, bpf_tail_call};
use leak_common::unwind::{Rule, cfa, fp, none};
use leak_common::{MAX_FRAMES, StackHeader, counter, flag, kind, stack_end};

use crate::emit::{header, output_bytes};
use crate::maps::{
    SEEN, SEEN_SETS, SEEN_WAYS, WALK_TRACEPOINT, WALK_UPROBE, count, count_many, generation, has_loop, use_tables,
};
use crate::regs::{self, Frame};
use crate::repeat::repeat;
use crate::returns;
use crate::thread::{Thread, current, ids};
use crate::unwind::{self, BY_FRAME_POINTER, miss};

/// Most bytes that are read at once.
const PIECE: u64 = 1024;
const PAGE: u64 = 4096;
/// Elements of the arrays: one more than is ever sent, so that an index is a plain mask.
const FRAMES: usize = MAX_FRAMES + 1;
const MASK: u64 = MAX_FRAMES as u64;

/// In `fp_at`: the frame pointer is needed and is the inner frame's.
const FP_SAME: u64 = 1;

/// The walk's state, its buffers and the thread's last stack. In the thread's map value: it does not fit on the BPF stack,
/// and the verifier follows a loop over a map value far more cheaply than one over registers.
#[repr(C)]
pub struct Walk {
    /// Address of the first byte in `piece`.
    base: u64,
    /// How many bytes of `piece` are valid.
    length: u64,
    /// The return address that is to be looked up, and whether it is the address of an interrupted instruction instead.
    pc: u64,
    exact: u64,
    /// The stack pointer and the frame pointer in the frame of `pc`.
    sp: u64,
    fp: u64,
    /// See [`unwind::tag`].
    tag: u64,
    /// How many frames this walk has found; they end at the arrays' end.
    found: u64,
    /// How many frames of the kept stack the walk has not come past.
    kept: u64,
    /// Kept frames that are still to be verified, or found frames still to be moved.
    left: u64,
    /// How the walk ended, one of `stack_end`, [`RUNNING`] or [`MATCHED`].
    end: u64,
    /// Bits of `flag` for the stack's record.
    flags: u64,
    tgid: u64,
    /// Which function allocates, one of `op`.
    op: u64,
    /// The generation of code addresses that this walk began in.
    generation: u64,
    /// Frames of the kept stack, zero if it cannot be verified; its hash, and the flags it was sent with.
    kept_count: u64,
    kept_hash: u64,
    kept_flags: u64,
    kept_generation: u64,
    /// Hash of the thread's last stack that user space has.
    sent_hash: u64,
    /// Of the frame that was found in the kept stack: what `fp_at` and `cfa_at` would be.
    matched_fp_at: u64,
    matched_cfa_at: u64,
    tally: Tally,
    /// What is sent: the header and the addresses, in one piece.
    record: StackHeader,
    /// Return addresses.
    pcs: [u64; FRAMES],
    /// Where each was read.
    slots: [u64; FRAMES],
    /// The frame pointer in the frame that the address returns to.
    fps: [u64; FRAMES],
    /// Where that was read; [`FP_SAME`]; or zero: no frame outside depends on it.
    fp_at: [u64; FRAMES],
    /// Where the frame's CFA was read, zero if it was computed.
    cfa_at: [u64; FRAMES],
    /// Of a kept stack the hash of this frame and those outside it; of a walk's frames the rule they are left by.
    hashes: [u64; FRAMES],
    piece: [u64; PIECE as usize / 8],
}

/// How many frames were unwound and how many reused, since they were last added to the counters.
#[repr(C)]
struct Tally {
    stacks: u64,
    walked: u64,
    reused: u64,
}

impl Tally {
    /// Counts a stack; now and then adds all to the counters, which costs more than the rest of this.
    #[inline(always)]
    fn add(&mut self, walked: u64) {
        self.walked += walked;
        self.stacks += 1;
        if self.stacks.is_multiple_of(64) {
            count_many(counter::FRAMES_WALKED, self.walked);
            count_many(counter::FRAMES_REUSED, self.reused);
            self.walked = 0;
            self.reused = 0;
        }
    }
}

/// Not an end: the walk goes on.
const RUNNING: u64 = u32::MAX as u64;
/// Not an end: the frame found last is one of the kept.
const MATCHED: u64 = RUNNING - 1;

struct Context {
    walk: *mut Walk,
}

/// Multiplicative hashing with a fold; the constant is 2^64 over the golden ratio (Knuth, TAOCP 3, 6.4).
#[inline(always)]
fn mix(hash: u64, value: u64) -> u64 {
    let hash = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ (hash >> 29)
}

/// Reads the piece that starts at `address`.
#[inline(always)]
fn read_piece(walk: &mut Walk, address: u64) -> bool {
    let to_page_end = PAGE - (address & (PAGE - 1));
    let length = if to_page_end < PIECE { to_page_end } else { PIECE };
    walk.base = address;
    // SAFETY: length is at most PIECE, which piece holds; a bad address is an error result.
    let result = unsafe {
        bpf_probe_read_user(walk.piece.as_mut_ptr().cast::<c_void>(), length as u32, address as *const c_void)
    };
    walk.length = if result == 0 { length } else { 0 };
    result == 0
}

/// The word at `address`, which is a multiple of eight; reads the piece that starts there if need be.
#[inline(always)]
fn word(walk: &mut Walk, address: u64) -> Option<u64> {
    let mut at = address.wrapping_sub(walk.base);
    if at >= walk.length {
        if !read_piece(walk, address) {
            return None;
        }
        at = 0;
    }
    let at = (at & (PIECE - 8)) as usize;
    // SAFETY: at is at most PIECE - 8.
    Some(unsafe { walk.piece.as_ptr().byte_add(at).read() })
}

impl Walk {
    /// The innermost address of the last stack.
    #[inline(always)]
    pub fn caller(&self) -> u64 {
        self.pcs[(u64::from(self.record.count).wrapping_sub(1) & MASK) as usize]
    }

    /// Nothing of the kept stack is true any more.
    #[inline(always)]
    pub fn forget(&mut self) {
        self.kept_count = 0;
        self.sent_hash = 0;
    }

    /// Whether this frame is one of the kept. The walk then ends with `MATCHED`.
    #[inline(always)]
    fn meets_kept(&mut self, pc: u64, slot: u64, fp: u64) -> bool {
        // Kept frames that lie further in than this one are gone.
        let mut kept = self.kept;
        for _ in 0..4 {
            if kept > 0 && self.slots[((kept - 1) & MASK) as usize] < slot {
                kept -= 1;
            }
        }
        self.kept = kept;
        if kept == 0 {
            return false;
        }
        let top = ((kept - 1) & MASK) as usize;
        if self.slots[top] == slot && self.pcs[top] == pc && (self.fp_at[top] == 0 || self.fps[top] == fp) {
            self.pc = pc;
            self.sp = slot.wrapping_add(8);
            self.fp = fp;
            self.end = MATCHED;
            return true;
        }
        // Found and kept ones may not meet in the arrays; if they would, the kept ones give way.
        if kept + self.found >= MASK {
            self.kept = 0;
        }
        false
    }

    /// Adds a frame to those found, and looks whether it is a kept one. The walk ends with `MATCHED`, or because there
    /// is no more room.
    #[inline(always)]
    fn push(&mut self, pc: u64, slot: u64, fp: u64, fp_at: u64, cfa_at: u64) {
        if has_loop() && self.meets_kept(pc, slot, fp) {
            self.matched_fp_at = fp_at;
            self.matched_cfa_at = cfa_at;
            return;
        }
        if self.found >= MAX_FRAMES as u64 {
            self.end = u64::from(stack_end::TOO_DEEP);
            return;
        }
        self.found += 1;
        let at = ((FRAMES as u64 - self.found) & MASK) as usize;
        self.pcs[at] = pc;
        self.slots[at] = slot;
        self.fps[at] = fp;
        self.fp_at[at] = fp_at;
        self.cfa_at[at] = cfa_at;
        self.pc = pc;
        self.exact = 0;
        self.sp = slot.wrapping_add(8);
        self.fp = fp;
    }

    /// Leaves the frame found last.
    #[inline(always)]
    fn advance(&mut self) {
        let (pc, sp, fp) = (self.pc, self.sp, self.fp);
        let at = ((FRAMES as u64 - self.found) & MASK) as usize;
        let mut rule = BY_FRAME_POINTER;
        if use_tables() {
            rule = unwind::rule(self.tgid as u32, self.tag, pc, self.exact != 0);
            if rule.0 == Rule::none(miss::NO_RANGE).0 {
                // Not in any code: it may be where a return probe makes the function return to.
                let real = returns::pending(sp.wrapping_sub(8));
                if real != 0 {
                    self.pcs[at] = real;
                    self.pc = real;
                    self.flags |= NOT_KEPT;
                    rule = unwind::rule(self.tgid as u32, self.tag, real, false);
                }
            }
        }
        self.hashes[at] = u64::from(rule.0);
        self.end = self.follow(rule, pc, sp, fp);
    }

    /// Finds the frame outside, by `rule`. How the walk ends, or `RUNNING`.
    #[inline(always)]
    fn follow(&mut self, mut rule: Rule, pc: u64, sp: u64, fp: u64) -> u64 {
        if rule.cfa() == cfa::NONE {
            match rule.0 as u16 as i16 {
                none::NO_ENTRY => {
                    // Hand-written code: its frame pointer is worth a try, and the stack is marked.
                    rule = BY_FRAME_POINTER;
                    let at = ((FRAMES as u64 - self.found) & MASK) as usize;
                    self.hashes[at] = u64::from(rule.0);
                }
                none::INEXPRESSIBLE => return u64::from(stack_end::NO_ROW),
                miss::INTERRUPTED => return u64::from(stack_end::INTERRUPTED),
                _ => return u64::from(stack_end::NO_TABLE),
            }
        }
        if rule.0 == BY_FRAME_POINTER.0 && use_tables() {
            self.flags |= u64::from(flag::FRAME_POINTERS);
        }
        let mut cfa_at = 0;
        let frame_address = match rule.cfa() {
            cfa::SP => sp.wrapping_add(rule.cfa_offset() as u64),
            cfa::FP => fp.wrapping_add(rule.cfa_offset() as u64),
            cfa::DEREF_SP | cfa::DEREF_FP => {
                let from = if rule.cfa() == cfa::DEREF_SP { sp } else { fp };
                cfa_at = from.wrapping_add(rule.cfa_offset() as u64);
                if cfa_at & 7 != 0 {
                    return u64::from(stack_end::BAD_READ);
                }
                match word(self, cfa_at) {
                    Some(frame_address) => frame_address,
                    None => return u64::from(stack_end::BAD_READ),
                }
            }
            cfa::PLT => sp.wrapping_add(if pc & 15 >= 11 { 16 } else { 8 }),
            cfa::SIGNAL => return self.leave_signal(sp),
            _ => return u64::from(stack_end::COMPLETE),
        };
        // Frames outside lie higher. In a frame with a frame pointer zero is how the outermost one is marked (System V
        // psABI x86-64, 3.4.1).
        if frame_address <= sp || frame_address & 7 != 0 {
            if rule.0 != BY_FRAME_POINTER.0 {
                return u64::from(stack_end::NO_ROW);
            }
            let end = if fp == 0 { stack_end::COMPLETE } else { stack_end::NO_FRAME_POINTER };
            return u64::from(end);
        }
        let mut outer_fp = fp;
        let mut fp_at = 0;
        if rule.fp() == fp::AT_CFA || rule.fp() == fp::AT_FP {
            let from = if rule.fp() == fp::AT_CFA { frame_address } else { fp };
            fp_at = from.wrapping_add(rule.fp_offset() as u64);
            if fp_at & 7 != 0 {
                return u64::from(stack_end::BAD_READ);
            }
            // Before the return address, because it lies lower: one piece then holds both.
            match word(self, fp_at) {
                Some(saved) => outer_fp = saved,
                None => return u64::from(stack_end::BAD_READ),
            }
        }
        let slot = frame_address.wrapping_sub(8);
        let Some(outer) = word(self, slot).map(regs::code_address) else {
            return u64::from(stack_end::BAD_READ);
        };
        if outer == 0 {
            return u64::from(stack_end::COMPLETE);
        }
        self.end = RUNNING;
        self.push(outer, slot, outer_fp, fp_at, cfa_at);
        self.end
    }

    /// Goes on where the signal interrupted the thread: `context` is the address of the `ucontext`, whose registers start at
    /// byte 40 (r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip; glibc's `sys/ucontext.h`, the kernel's
    /// `struct sigcontext_64`).
    #[inline(always)]
    fn leave_signal(&mut self, context: u64) -> u64 {
        // Moved stacks are not verified.
        self.flags |= NOT_KEPT;
        let fp = word(self, context.wrapping_add(120));
        let sp = word(self, context.wrapping_add(160));
        let slot = context.wrapping_add(168);
        let pc = word(self, slot);
        let (Some(fp), Some(sp), Some(pc)) = (fp, sp, pc) else {
            return u64::from(stack_end::BAD_READ);
        };
        self.kept = 0;
        self.end = RUNNING;
        // Whoever reads a stack takes its addresses for return addresses and looks up the byte before each. Neither the
        // trampoline's nor the interrupted instruction's is one.
        let at = ((FRAMES as u64 - self.found) & MASK) as usize;
        self.pcs[at] = self.pcs[at].wrapping_add(1);
        self.push(pc.wrapping_add(1), slot, fp, 0, 0);
        self.pc = pc;
        self.sp = sp;
        self.exact = 1;
        self.end
    }
}

/// In `Walk::flags`, above those of a record: the stack cannot be verified.
const NOT_KEPT: u64 = 1 << 32;

/// How many frames one call of a callback handles: a call costs more than a frame.
const FRAMES_A_STEP: u32 = 2;
const VERIFIED_A_STEP: u32 = 8;
const MOVED_A_STEP: u32 = 4;

/// Leaves some frames: 0 to go on, 1 at the end.
#[inline(never)]
extern "C" fn step(_index: u64, context: *mut Context) -> i64 {
    // SAFETY: bpf_loop passes on the pointer that it was given, and walk points into a map value.
    let walk = unsafe { &mut *(*context).walk };
    for _ in 0..FRAMES_A_STEP {
        walk.advance();
        if walk.end != RUNNING {
            return 1;
        }
    }
    0
}

/// Compares what some kept frames were derived from with what is there now: 0 to go on, 1 at the end; then `left` is
/// zero if all was the same.
#[inline(never)]
extern "C" fn verify(_index: u64, context: *mut Context) -> i64 {
    // SAFETY: as in `step`.
    let walk = unsafe { &mut *(*context).walk };
    for _ in 0..VERIFIED_A_STEP {
        if walk.left == 0 {
            return 1;
        }
        let at = ((walk.left - 1) & MASK) as usize;
        let slot = walk.slots[at];
        let (fp_at, cfa_at) = (walk.fp_at[at], walk.cfa_at[at]);
        if cfa_at != 0 && word(walk, cfa_at) != Some(slot.wrapping_add(8)) {
            return 1;
        }
        if fp_at > FP_SAME && word(walk, fp_at) != Some(walk.fps[at]) {
            return 1;
        }
        if word(walk, slot).map(regs::code_address) != Some(walk.pcs[at]) {
            return 1;
        }
        walk.left -= 1;
    }
    0
}

/// Moves some of the found frames to where the kept ones end, outermost first, and hashes them: 0 to go on, 1 at the end.
/// `kept` is where the next one goes.
#[inline(never)]
extern "C" fn place(_index: u64, context: *mut Context) -> i64 {
    // SAFETY: as in `step`.
    let walk = unsafe { &mut *(*context).walk };
    for _ in 0..MOVED_A_STEP {
        if walk.left == 0 {
            return 1;
        }
        let from = ((FRAMES as u64 - walk.left) & MASK) as usize;
        let to = (walk.kept & MASK) as usize;
        let (outer_hash, outer_needs_fp) = if walk.kept == 0 {
            (mix(walk.tag, walk.tgid), false)
        } else {
            let outer = ((walk.kept - 1) & MASK) as usize;
            (walk.hashes[outer], walk.fp_at[outer] != 0)
        };
        let rule = Rule(walk.hashes[from] as u32);
        let passes_on = rule.fp() == fp::SAME || rule.fp() == fp::AT_FP;
        let needs_fp = rule.cfa() == cfa::FP || rule.cfa() == cfa::DEREF_FP || (passes_on && outer_needs_fp);
        let fp_at = walk.fp_at[from];
        let pc = walk.pcs[from];
        walk.fp_at[to] = if !needs_fp {
            0
        } else if fp_at == 0 {
            FP_SAME
        } else {
            fp_at
        };
        walk.pcs[to] = pc;
        walk.slots[to] = walk.slots[from];
        walk.fps[to] = walk.fps[from];
        walk.cfa_at[to] = walk.cfa_at[from];
        walk.hashes[to] = mix(outer_hash, pc);
        walk.kept += 1;
        walk.left -= 1;
    }
    0
}

#[inline(always)]
fn run<const STEPS: u32>(callback: unsafe extern "C" fn(u64, *mut Context) -> i64, walk: &mut Walk) {
    let mut context = Context { walk };
    repeat::<STEPS, _>(callback, &raw mut context);
}

const STEPS: u32 = (MAX_FRAMES as u32).div_ceil(FRAMES_A_STEP);

/// What a stack is taken for, and so where its hash goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// The allocator call in flight. The innermost address is the one that the function returns to: the frame is that
    /// of its first instructions.
    Call,
    /// The system call in flight. The innermost address is the pc.
    SystemCall,
}

/// Takes the stack of `thread` from `frame`. Its hash goes to the call in flight; user space has been sent the stack, or will
/// be with the next allocation from it if the ring was full. Nothing may be left to do after this: where there is no `bpf_loop`,
/// it does not return.
#[inline(always)]
pub fn take(ctx: *mut c_void, thread: &mut Thread, frame: Frame, what: For, op: u8) {
    let generation = generation();
    let tgid = thread.tgid;
    let walk = &mut thread.walk;
    walk.found = 0;
    walk.flags = 0;
    walk.length = 0;
    walk.op = u64::from(op);
    walk.tgid = u64::from(tgid);
    walk.tag = unwind::tag(tgid);
    walk.kept = if has_loop() && walk.kept_generation == generation { walk.kept_count } else { 0 };
    walk.generation = generation;
    walk.end = RUNNING;
    if what == For::Call && !regs::LINK_REGISTER {
        match word(walk, frame.sp & !7) {
            Some(caller) => walk.push(caller, frame.sp & !7, frame.fp, 0, 0),
            None => walk.end = u64::from(stack_end::BAD_READ),
        }
    } else {
        // There is no slot: the address below the stack stands for it.
        let pc = if what == For::Call { frame.link } else { frame.pc };
        walk.push(pc, (frame.sp & !7).wrapping_sub(8), frame.fp, 0, 0);
    }
    if !has_loop() {
        if walk.end == RUNNING {
            follow_on(ctx, what);
        }
        finish(thread, what);
        return;
    }
    if walk.end == RUNNING {
        run::<STEPS>(step, walk);
    }
    if walk.end == MATCHED {
        // The matched frame itself has just been read.
        walk.left = walk.kept - 1;
        if walk.left != 0 {
            run::<{ (MAX_FRAMES as u32).div_ceil(VERIFIED_A_STEP) }>(verify, walk);
        }
        if walk.left == 0 {
            walk.end = u64::from(stack_end::COMPLETE);
            walk.flags |= walk.kept_flags;
            walk.tally.reused += walk.kept;
            if walk.found == 0 && walk.kept == walk.kept_count {
                walk.tally.add(0);
                let hash = walk.kept_hash;
                hand_over(thread, what, hash);
                return;
            }
        } else {
            // The kept stack is gone: on from the frame that seemed to be in it.
            walk.kept = 0;
            walk.end = RUNNING;
            walk.push(walk.pc, walk.sp.wrapping_sub(8), walk.fp, walk.matched_fp_at, walk.matched_cfa_at);
            run::<STEPS>(step, walk);
        }
    } else {
        // Ended without having met the kept stack: none of its frames is outside of those found.
        walk.kept = 0;
    }
    finish(thread, what);
}

/// Goes on with the walk in a program of its own. Returns only if the kernel refuses.
#[inline(always)]
fn follow_on(ctx: *mut c_void, what: For) {
    let programs = if what == For::Call { &raw const WALK_UPROBE } else { &raw const WALK_TRACEPOINT };
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
    run::<{ (FRAMES as u32).div_ceil(MOVED_A_STEP) }>(place, walk);
    walk.record.count = walk.kept as u32;
    walk.record.end = end as u32;
    let hash = if walk.kept == 0 { end } else { walk.hashes[((walk.kept - 1) & MASK) as usize] ^ end };
    walk.kept_hash = hash;
    walk.kept_flags = walk.flags;
    walk.kept_generation = walk.generation;
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
    let sent = unsafe { output_bytes((&raw mut walk.record).cast::<c_void>(), bytes) };
    if !sent {
        count(counter::RING_FULL_STACK);
        return false;
    }
    // Marked only now that it is in the ring. Which way is displaced does not matter.
    set[(hash >> 62) as usize & (SEEN_WAYS - 1)] = hash;
    true
}

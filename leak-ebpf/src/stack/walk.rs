//! From one frame to the next: the walk's state, the stack's memory in pieces, and what each kind of rule says.
//!
//! Each frame is left by a rule ([`crate::unwind`]): from the tables, or by its frame pointer. The stack is read in pieces:
//! `bpf_probe_read_user` takes about 40 ns for 8 bytes and 52 for 1024. A piece reaches as far as the kept stack does, which was all
//! there a moment ago; where none is kept it ends with its page, because a read that runs into an absent page is many times slower.

use core::ffi::c_void;
use core::hint::cold_path;

use aya_ebpf::helpers::generated::bpf_probe_read_user;
use leak_common::unwind::{Rule, cfa, fp, none};
use leak_common::{MAX_FRAMES, StackHeader, counter, flag, stack_end};

use crate::emit::masked;
use crate::maps::{count_many, has_loop, use_tables};
use crate::regs::{self, Frame};
use crate::repeat::repeat;
use crate::returns;
use crate::unwind::{self, BY_FRAME_POINTER, miss};

/// Most bytes that are read at once, and most where no kept stack says how far to read.
pub(super) const PIECE: u64 = 2048;
const BLIND_PIECE: u64 = 1024;
const PAGE: u64 = 4096;
/// Elements of the arrays: one more than is ever sent, so that an index is a plain mask.
pub(super) const FRAMES: usize = MAX_FRAMES + 1;
pub(super) const MASK: u64 = MAX_FRAMES as u64;

/// In `fp_at`: the frame pointer is needed and is the inner frame's.
pub(super) const FP_SAME: u64 = 1;

/// The walk's state, its buffers and the thread's last stack. In the thread's map value: it does not fit on the BPF stack,
/// and the verifier follows a loop over a map value far more cheaply than one over registers.
#[repr(C)]
pub struct Walk {
    /// Address of the first byte in `piece`.
    pub(super) base: u64,
    /// How many bytes of `piece` are valid.
    pub(super) length: u64,
    /// Where the outermost word ends that the kept stack was derived from; zero if none is kept.
    pub(super) reach: u64,
    /// The return address that is to be looked up, and whether it is the address of an interrupted instruction instead.
    pub(super) pc: u64,
    pub(super) exact: u64,
    /// The stack pointer and the frame pointer in the frame of `pc`.
    pub(super) sp: u64,
    pub(super) fp: u64,
    /// See [`unwind::tag`].
    pub(super) tag: u64,
    /// How many frames this walk has found; they end at the arrays' end.
    pub(super) found: u64,
    /// How many frames of the kept stack the walk has not come past.
    pub(super) kept: u64,
    /// Kept frames that are still to be verified, or found frames still to be moved.
    pub(super) left: u64,
    /// How the walk ended, one of `stack_end`, [`RUNNING`] or [`MATCHED`].
    pub(super) end: u64,
    /// Bits of `flag` for the stack's record.
    pub(super) flags: u64,
    pub(super) tgid: u64,
    /// Which function allocates, one of `op`.
    pub(super) op: u64,
    /// The generation of code addresses that this walk began in.
    pub(super) generation: u64,
    /// Frames of the kept stack, zero if it cannot be verified; its hash, and the flags it was sent with.
    pub(super) kept_count: u64,
    pub(super) kept_hash: u64,
    pub(super) kept_flags: u64,
    pub(super) kept_generation: u64,
    /// Where the zero was read that ended this walk, and the kept stack's; zero if something else ended it.
    pub(super) zero_at: u64,
    pub(super) kept_zero_at: u64,
    /// Hash of the thread's last stack that user space has.
    pub(super) sent_hash: u64,
    /// Of the frame that was found in the kept stack: what `fp_at` and `cfa_at` would be.
    pub(super) matched_fp_at: u64,
    pub(super) matched_cfa_at: u64,
    pub(super) tally: Tally,
    /// What is sent: the header and the addresses, in one piece.
    pub(super) record: StackHeader,
    /// Return addresses.
    pub(super) pcs: [u64; FRAMES],
    /// Where each was read.
    pub(super) slots: [u64; FRAMES],
    /// The frame pointer in the frame that the address returns to.
    pub(super) fps: [u64; FRAMES],
    /// Where that was read; [`FP_SAME`]; or zero: no frame outside depends on it.
    pub(super) fp_at: [u64; FRAMES],
    /// Where the frame's CFA was read, zero if it was computed.
    pub(super) cfa_at: [u64; FRAMES],
    /// Of a kept stack the hash of this frame and those outside it; of a walk's frames the rule they are left by.
    pub(super) hashes: [u64; FRAMES],
    pub(super) piece: [u64; PIECE as usize / 8],
}

/// How many frames were unwound and how many reused, since they were last added to the counters.
#[repr(C)]
pub(super) struct Tally {
    pub(super) stacks: u64,
    pub(super) walked: u64,
    pub(super) reused: u64,
}

impl Tally {
    /// Counts a stack; now and then adds all to the counters, which costs more than the rest of this.
    #[inline(always)]
    pub(super) fn add(&mut self, walked: u64) {
        self.walked += walked;
        self.stacks += 1;
        if self.stacks.is_multiple_of(64) {
            cold_path();
            count_many(counter::FRAMES_WALKED, self.walked);
            count_many(counter::FRAMES_REUSED, self.reused);
            self.walked = 0;
            self.reused = 0;
        }
    }
}

/// Not an end: the walk goes on.
pub(super) const RUNNING: u64 = u32::MAX as u64;
/// Not an end: the frame found last is one of the kept.
pub(super) const MATCHED: u64 = RUNNING - 1;

pub(super) struct Context {
    pub(super) walk: *mut Walk,
}

/// Multiplicative hashing with a fold; the constant is 2^64 over the golden ratio (Knuth, TAOCP 3, 6.4).
#[inline(always)]
pub(super) fn mix(hash: u64, value: u64) -> u64 {
    let hash = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ (hash >> 29)
}

/// Reads the piece that starts at `address`. A function of its own: at each of the places that need a word there would be two reads,
/// and 6.1's verifier refuses what LLVM makes of that.
#[inline(never)]
fn read_piece(walk: &mut Walk, address: u64) -> bool {
    // Neither beyond it nor at its end.
    let before_reach = walk.reach.wrapping_sub(address).wrapping_sub(1);
    // Where there is no `bpf_loop` none is kept, and the verifier would follow both ways at each word.
    if has_loop() && before_reach < PIECE {
        // Verifiers before 6.18 do not see from the comparison what the length is at most.
        if read_bytes(walk, address, masked(before_reach, PIECE - 1) + 1) {
            return true;
        }
        cold_path();
        // The kept stack was another one: what lies between may be absent.
        walk.reach = 0;
    }
    let to_page_end = PAGE - (address & (PAGE - 1));
    read_bytes(walk, address, if to_page_end < BLIND_PIECE { to_page_end } else { BLIND_PIECE })
}

/// Reads `length` bytes, at most [`PIECE`], from `address` on.
#[inline(always)]
fn read_bytes(walk: &mut Walk, address: u64, length: u64) -> bool {
    walk.base = address;
    // SAFETY: piece holds that many bytes; a bad address is an error result.
    let result = unsafe {
        bpf_probe_read_user(walk.piece.as_mut_ptr().cast::<c_void>(), length as u32, address as *const c_void)
    };
    walk.length = if result == 0 { length } else { 0 };
    result == 0
}

/// The word at `address`, which is a multiple of eight; reads the piece that starts there if need be.
#[inline(always)]
pub(super) fn word(walk: &mut Walk, address: u64) -> Option<u64> {
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

    /// Adds a frame to those found, and looks whether it is a kept one. The walk ends with `MATCHED`, or because there
    /// is no more room.
    #[inline(always)]
    pub(super) fn push(&mut self, pc: u64, slot: u64, fp: u64, fp_at: u64, cfa_at: u64) {
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
    pub(super) fn advance(&mut self) {
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
            self.zero_at = slot;
            if cfa_at != 0 {
                // That word decides too, and is kept for frames alone.
                self.flags |= NOT_KEPT;
            }
            return u64::from(stack_end::COMPLETE);
        }
        self.end = RUNNING;
        self.push(outer, slot, outer_fp, fp_at, cfa_at);
        self.end
    }

    /// Begins with the frame of an instruction that is not a call.
    #[inline(always)]
    pub(super) fn interrupted(&mut self, frame: Frame) {
        self.flags |= NOT_KEPT;
        self.kept = 0;
        // Whoever reads a stack looks up the byte before each address.
        self.push(frame.pc.wrapping_add(1), (frame.sp & !7).wrapping_sub(8), frame.fp, 0, 0);
        self.pc = frame.pc;
        self.exact = 1;
    }

    /// Of the stack that was taken last.
    #[inline(always)]
    pub fn hash(&self) -> u64 {
        self.kept_hash
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
pub(super) const NOT_KEPT: u64 = 1 << 32;

/// How many frames one call of a callback handles: a call costs more than a frame.
const FRAMES_A_STEP: u32 = 2;

/// Leaves some frames: 0 to go on, 1 at the end.
#[inline(never)]
pub(super) extern "C" fn step(_index: u64, context: *mut Context) -> i64 {
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

#[inline(always)]
pub(super) fn run<const STEPS: u32>(callback: unsafe extern "C" fn(u64, *mut Context) -> i64, walk: &mut Walk) {
    let mut context = Context { walk };
    repeat::<STEPS, _>(callback, &raw mut context);
}

/// Calls of [`step`] that leave all the frames there can be.
pub(super) const STEPS: u32 = (MAX_FRAMES as u32).div_ceil(FRAMES_A_STEP);

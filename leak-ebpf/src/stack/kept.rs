//! Verifying instead of unwinding.
//!
//! Most stacks of a thread share their outer frames with the one before it, so the last complete stack is kept, with
//! every word of memory that it was derived from. Once a frame of the new stack equals one of the kept (same return address
//! in the same place, same frame pointer where the frames outside it depend on that), its outer frames are the kept ones
//! exactly if those words are unchanged: they are read and compared, which is several times cheaper than unwinding.
//!
//! The kept stack is stored outermost frame first, so that inner frames come and go at its end. A walk puts its
//! frames at the other end of the same arrays, and they are then moved to where the kept ones end.

use leak_common::unwind::{Rule, cfa, fp};

use super::walk::{Context, FP_SAME, FRAMES, MASK, MATCHED, PIECE, Walk, mix, word};
use crate::regs;

/// How many frames one call of a callback handles: a call costs more than a frame.
pub(super) const VERIFIED_A_STEP: u32 = 8;
pub(super) const MOVED_A_STEP: u32 = 4;

impl Walk {
    /// Whether this frame is one of the kept. The walk then ends with `MATCHED`.
    #[inline(always)]
    pub(super) fn meets_kept(&mut self, pc: u64, slot: u64, fp: u64) -> bool {
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
}

/// In `check_at`: the frame depends on more words than one besides its return address, or on one that lies outside of the stack. As
/// an odd address it is not in any piece.
const UNCHECKED: u64 = 1;

/// Whether all that the outermost `left` kept frames were derived from is in the piece and unchanged. Usually it is; then this takes
/// the place of [`verify`], without a branch for each word and without a call. False says nothing.
#[inline(always)]
pub(super) fn unchanged(walk: &Walk) -> bool {
    let base = walk.base;
    // No word that is looked at below lies further out than the outermost return address, unless it is in no piece.
    if walk.slots[0].wrapping_sub(base).wrapping_add(8) > walk.length {
        return false;
    }
    let mut differences = 0;
    let mut frame = 0;
    while frame < MASK && frame < walk.left {
        let at = (frame & MASK) as usize;
        let (slot, check) = (walk.slots[at].wrapping_sub(base), walk.check_at[at].wrapping_sub(base));
        differences |= (slot | check) & !(PIECE - 8);
        let piece = walk.piece.as_ptr();
        // SAFETY: at most PIECE - 8 each.
        let (caller, word) = unsafe {
            (
                piece.byte_add((slot & (PIECE - 8)) as usize).read(),
                piece.byte_add((check & (PIECE - 8)) as usize).read(),
            )
        };
        differences |= regs::code_address(caller) ^ walk.pcs[at];
        // A return address, or a frame pointer, which is an address of user space as well.
        differences |= regs::code_address(word) ^ regs::code_address(walk.checks[at]);
        frame += 1;
    }
    differences == 0
}

/// Compares what some kept frames were derived from with what is there now: 0 to go on, 1 at the end; then `left` is
/// zero if all was the same.
#[inline(never)]
pub(super) extern "C" fn verify(_index: u64, context: *mut Context) -> i64 {
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

/// Whether the kept stack, all of whose frames are verified, still ends where it did: a zero instead of a return address may have
/// become one since, where a coroutine's stack is used anew.
#[inline(always)]
pub(super) fn ends_as_kept(walk: &mut Walk) -> bool {
    let zero_at = walk.kept_zero_at;
    zero_at == 0 || word(walk, zero_at).map(regs::code_address) == Some(0)
}

/// Moves some of the found frames to where the kept ones end, outermost first, and hashes them: 0 to go on, 1 at the end.
/// `kept` is where the next one goes.
#[inline(never)]
pub(super) extern "C" fn place(_index: u64, context: *mut Context) -> i64 {
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
        let slot = walk.slots[from];
        let outermost = if walk.kept == 0 { slot } else { walk.slots[0] };
        (walk.check_at[to], walk.checks[to]) = if walk.cfa_at[from] != 0 {
            (UNCHECKED, 0)
        } else if needs_fp && fp_at > FP_SAME {
            (if fp_at < outermost { fp_at } else { UNCHECKED }, walk.fps[from])
        } else {
            (slot, pc)
        };
        walk.pcs[to] = pc;
        walk.slots[to] = slot;
        walk.fps[to] = walk.fps[from];
        walk.cfa_at[to] = walk.cfa_at[from];
        walk.hashes[to] = mix(outer_hash, pc);
        walk.kept += 1;
        walk.left -= 1;
    }
    0
}

/// The same where no stack is verified, since the kernel has no `bpf_loop`: nothing but what is sent. `kept_hash` is the hash of
/// those that have their place. The verifier follows it
/// step by step there, and every branch of [`place`] would be one more at each step.
#[inline(never)]
pub(super) extern "C" fn place_addresses(_index: u64, context: *mut Context) -> i64 {
    // SAFETY: as in `step`.
    let walk = unsafe { &mut *(*context).walk };
    for _ in 0..MOVED_A_STEP {
        if walk.left == 0 {
            return 1;
        }
        let from = ((FRAMES as u64 - walk.left) & MASK) as usize;
        let to = (walk.kept & MASK) as usize;
        let pc = walk.pcs[from];
        let hash = mix(walk.kept_hash, pc);
        walk.pcs[to] = pc;
        walk.hashes[to] = hash;
        walk.kept_hash = hash;
        walk.kept += 1;
        walk.left -= 1;
    }
    0
}

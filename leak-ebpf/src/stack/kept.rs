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

/// Whether all that the outermost `left` kept frames were derived from is in the piece and unchanged. Usually it is; then this takes
/// the place of [`verify`], without a call, and with branches that go the same way as long as the stack is the same. False says
/// nothing.
#[inline(always)]
pub(super) fn unchanged(walk: &Walk) -> bool {
    let base = walk.base;
    let outermost = walk.slots[0];
    if outermost.wrapping_sub(base).wrapping_add(8) > walk.length {
        return false;
    }
    let mut differences = 0;
    let mut frame = 0;
    while frame < MASK && frame < walk.left {
        let at = (frame & MASK) as usize;
        differences |= walk.cfa_at[at];
        let (caller, outside) = in_piece(walk, walk.slots[at]);
        differences |= outside | (regs::code_address(caller) ^ walk.pcs[at]);
        let fp_at = walk.fp_at[at];
        if fp_at > FP_SAME {
            // Further out the piece may hold what was read before.
            if fp_at > outermost {
                return false;
            }
            let (saved, outside) = in_piece(walk, fp_at);
            differences |= outside | (saved ^ walk.fps[at]);
        }
        frame += 1;
    }
    differences == 0
}

/// The word of the piece at this address, and zero if it has one there.
#[inline(always)]
fn in_piece(walk: &Walk, address: u64) -> (u64, u64) {
    let at = address.wrapping_sub(walk.base);
    // SAFETY: at most PIECE - 8.
    (unsafe { walk.piece.as_ptr().byte_add((at & (PIECE - 8)) as usize).read() }, at & !(PIECE - 8))
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

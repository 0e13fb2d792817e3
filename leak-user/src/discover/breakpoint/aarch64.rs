//! The choice on arm64, where the kernel simulates what depends on the pc: relative branches, `br`, `ret`, `adr` and `adrp`, and from
//! 6.14 on `nop`; all else is stepped (`arm_probe_decode_insn`,
//! <https://github.com/torvalds/linux/blob/v6.12/arch/arm64/kernel/probes/decode-insn.c>).
//!
//! Instructions are told apart by masks of the Arm Architecture Reference Manual (DDI 0487, C4.1, "A64 instruction set encoding"). What
//! is needed of them is little, which registers a few harmless kinds of them write, and a library of instructions does not answer that;
//! what is not known here counts as harmful.
//!
//! Left out of what is simulated: `bl` and `blr`, because whoever begins with a call has put the return address elsewhere before, where
//! the return probe does not find it; and `ldr` of a literal, which newer kernels refuse.

use super::{Emulation, MAX_FUNCTION, Placement, Reason};

/// An instruction that is simulated further away than this many instructions is not looked for.
const NEAR: usize = 16;

/// Size of every instruction, bytes.
const SIZE: usize = 4;

const NOP: u32 = 0xd503_201f;
/// `bti` and its kinds, with the two bits for j and c left out.
const BTI: (u32, u32) = (0xffff_ff3f, 0xd503_241f);

/// The frame pointer, the return address; and number 31, which is the stack pointer or zero.
const FP: u32 = 29;
const LR: u32 = 30;
const SP_OR_ZERO: u32 = 31;
/// Registers of arguments: x0 to x7.
const LAST_ARGUMENT: u32 = 7;

pub fn place(code: &[u8], size: Option<usize>, kernel: Emulation) -> Placement {
    let entry = |reason| Placement { skipped: 0, reason };
    let body = size.filter(|&size| size <= MAX_FUNCTION).and_then(|size| code.get(..size));
    let (candidate, only_landing_pad) = match first_simulated(body.unwrap_or(code), kernel) {
        Ok((0, _)) => return entry(Reason::EntryEmulated),
        Ok(found) => found,
        Err(reason) => return entry(reason),
    };
    let (mut lands_before, mut indirect) = (false, false);
    for (index, instruction) in words(body.unwrap_or(code)).enumerate() {
        indirect |= is_indirect_jump(instruction);
        let target = displacement(instruction).map(|by| (index * SIZE) as i64 + by);
        lands_before |= target.is_some_and(|target| target > 0 && target <= candidate as i64);
    }
    let obstacle = if lands_before {
        Some(Reason::BranchTarget)
    } else if only_landing_pad {
        // Nobody jumps past a bti other than by a direct jump, and there was none: it is there for indirect ones.
        None
    } else if body.is_none() {
        Some(Reason::UnknownExtent)
    } else if indirect {
        Some(Reason::IndirectJump)
    } else {
        None
    };
    match obstacle {
        Some(reason) => entry(reason),
        None => Placement { skipped: candidate as u64, reason: Reason::LaterEmulated },
    }
}

fn words(code: &[u8]) -> impl Iterator<Item = u32> + '_ {
    // Instructions are little-endian whatever data are (B2.6.2).
    code.as_chunks::<SIZE>().0.iter().map(|word| u32::from_le_bytes(*word))
}

/// Where the first instruction is that is simulated, if all before it leave alone what must stay, and whether nothing but `bti`
/// is before it.
fn first_simulated(code: &[u8], kernel: Emulation) -> Result<(usize, bool), Reason> {
    let mut only_landing_pad = true;
    for (index, instruction) in words(code).take(NEAR).enumerate() {
        if is_simulated(instruction, kernel) {
            return Ok((index * SIZE, only_landing_pad));
        }
        if !preserves(instruction) {
            return Err(Reason::NotPreserved);
        }
        only_landing_pad &= is(instruction, BTI);
    }
    Err(Reason::NoneNear)
}

fn is(instruction: u32, (mask, value): (u32, u32)) -> bool {
    instruction & mask == value
}

/// The bits of an instruction from `low` on.
fn bits(instruction: u32, low: u32, count: u32) -> u32 {
    (instruction >> low) & ((1 << count) - 1)
}

fn is_simulated(instruction: u32, kernel: Emulation) -> bool {
    is(instruction, (0xfc00_0000, 0x1400_0000))        // b
        || is(instruction, (0xff00_0010, 0x5400_0000)) // b.cond
        || is(instruction, (0x7e00_0000, 0x3400_0000)) // cbz, cbnz
        || is(instruction, (0x7e00_0000, 0x3600_0000)) // tbz, tbnz
        || is(instruction, (0x1f00_0000, 0x1000_0000)) // adr, adrp
        || is(instruction, (0xffff_fc1f, 0xd61f_0000)) // br
        || is(instruction, (0xffff_fc1f, 0xd65f_0000)) // ret
        || (instruction == NOP && kernel.nops)
}

/// Whether after the instruction comes the next one, with all that matters as it was, and the return address not kept elsewhere.
fn preserves(instruction: u32) -> bool {
    if instruction == NOP || is(instruction, BTI) {
        return true;
    }
    let destination = bits(instruction, 0, 5);
    // adds, subs and ands of an immediate, and of a register: number 31 as the destination is zero, so they only compare.
    let compares = [
        (0x3f80_0000, 0x3100_0000),
        (0x7f80_0000, 0x7100_0000),
        (0x7f80_0000, 0x7200_0000),
        (0x3f20_0000, 0x2b00_0000),
        (0x7f00_0000, 0x6a00_0000),
    ];
    let moves = [
        // movn, movz, movk; 0b01 is not allocated, and does not run.
        (0x1f80_0000, 0x1280_0000),
        // Of a register: and, bic, orr (mov), orn, eor, eon; add, sub.
        (0x1f00_0000, 0x0a00_0000),
        (0x1f20_0000, 0x0b00_0000),
        // Of an immediate: add, sub, with the flags or without.
        (0x1f80_0000, 0x1100_0000),
        // sbfm, bfm, ubfm, as which shifts and extensions by constants are written.
        (0x1f80_0000, 0x1300_0000),
        // Loads of a register at an offset without a sign.
        (0x3fc0_0000, 0x3940_0000),
    ];
    let known = |kinds: &[(u32, u32)]| kinds.iter().any(|kind| is(instruction, *kind));
    if destination == SP_OR_ZERO {
        return known(&compares) && !reads_return_address(instruction);
    }
    let kept = destination <= LAST_ARGUMENT || destination == FP || destination == LR;
    !kept && (known(&compares) || known(&moves)) && !reads_return_address(instruction)
}

/// Whether it may read x30. Where the instruction has no such operand its bits may still look so: then it is left out in vain.
fn reads_return_address(instruction: u32) -> bool {
    bits(instruction, 5, 5) == LR || bits(instruction, 16, 5) == LR
}

/// br, and its kinds that authenticate.
fn is_indirect_jump(instruction: u32) -> bool {
    is(instruction, (0xffff_fc1f, 0xd61f_0000)) || is(instruction, (0xfeff_f800, 0xd61f_0800))
}

/// How far from itself, in bytes, an instruction that jumps directly goes; nothing for others.
fn displacement(instruction: u32) -> Option<i64> {
    let signed = |low: u32, count: u32| {
        let value = i64::from(bits(instruction, low, count));
        let value = if value >> (count - 1) == 1 { value - (1 << count) } else { value };
        Some(value * SIZE as i64)
    };
    if is(instruction, (0x7c00_0000, 0x1400_0000)) {
        signed(0, 26) // b, bl
    } else if is(instruction, (0xff00_0000, 0x5400_0000)) || is(instruction, (0x7e00_0000, 0x3400_0000)) {
        signed(5, 19) // b.cond, bc.cond, cbz, cbnz
    } else if is(instruction, (0x7e00_0000, 0x3600_0000)) {
        signed(5, 14) // tbz, tbnz
    } else {
        None
    }
}

/// The address that a function computes from its own in its first three instructions: `adrp` gives the page of 4 KiB, and `add` to the
/// same register the place in it.
pub fn loaded_address(code: &[u8], address: u64) -> Option<u64> {
    let instructions: Vec<u32> = words(code).take(3).collect();
    let (index, adrp) = instructions.iter().enumerate().find(|(_, word)| is(**word, (0x9f00_0000, 0x9000_0000)))?;
    let add = instructions.get(index + 1).filter(|word| is(**word, (0xff80_0000, 0x9100_0000)))?;
    let register = bits(*adrp, 0, 5);
    if bits(*add, 0, 5) != register || bits(*add, 5, 5) != register {
        return None;
    }
    let pages = i64::from(bits(*adrp, 5, 19) << 2 | bits(*adrp, 29, 2));
    let pages = if pages >> 20 == 1 { pages - (1 << 21) } else { pages };
    let shift = if bits(*add, 22, 1) == 1 { 12 } else { 0 };
    let page = (address.wrapping_add((index * SIZE) as u64) & !0xfff).wrapping_add_signed(pages << 12);
    Some(page.wrapping_add(u64::from(bits(*add, 10, 12)) << shift))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OLD: Emulation = Emulation { nops: false };
    const NEW: Emulation = Emulation { nops: true };

    const BTI_C: u32 = 0xd503_245f;
    const CBZ_X0: u32 = 0xb400_0080;
    const CMP_X0_0: u32 = 0xf100_001f;
    const B_EQ: u32 = 0x5400_0040;
    const RET: u32 = 0xd65f_03c0;
    const STP_FP_LR: u32 = 0xa9bf_7bfd;
    const PACIASP: u32 = 0xd503_233f;

    fn bytes(code: &[u32]) -> Vec<u8> {
        code.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn placed(code: &[u32]) -> (u64, Reason) {
        let code = bytes(code);
        let placement = place(&code, Some(code.len()), OLD);
        (placement.skipped, placement.reason)
    }

    /// A function that first looks whether its argument is zero is probed there, with the landing pad skipped.
    #[test]
    fn first_branch() {
        assert_eq!(placed(&[CBZ_X0, STP_FP_LR, RET]), (0, Reason::EntryEmulated));
        assert_eq!(placed(&[BTI_C, CBZ_X0, STP_FP_LR, RET]), (4, Reason::LaterEmulated));
        assert_eq!(placed(&[CMP_X0_0, B_EQ, STP_FP_LR, RET]), (4, Reason::LaterEmulated));
        let code = bytes(&[BTI_C, CBZ_X0]);
        assert_eq!(place(&code, None, OLD), Placement { skipped: 4, reason: Reason::LaterEmulated });
        let code = bytes(&[CMP_X0_0, B_EQ]);
        assert_eq!(place(&code, None, OLD).reason, Reason::UnknownExtent);
    }

    /// A frame that is set up, a return address that is signed or copied, and an argument that changes keep the entry.
    #[test]
    fn what_must_stay() {
        for (name, instruction) in [
            ("stp x29, x30, [sp, #-16]!", STP_FP_LR),
            ("paciasp", PACIASP),
            ("sub sp, sp, #16", 0xd100_43ff),
            ("mov x9, x30", 0xaa1e_03e9),
            ("mov x29, sp", 0x9100_03fd),
            ("mov x0, x1", 0xaa01_03e0),
            ("mov w2, #5", 0x5280_00a2),
            ("ldr x3, [x0]", 0xf940_0003),
            ("str x9, [x0]", 0xf900_0009),
            ("ldr x9, [x0], #8", 0xf840_8409),
            ("add sp, x9, #0", 0x9100_013f),
            ("blr x9", 0xd63f_0120),
            ("bl", 0x9400_0010),
            ("svc #0", 0xd400_0001),
            ("ldr x9, literal", 0x5800_0049),
            ("zero", 0),
        ] {
            assert_eq!(placed(&[instruction, CBZ_X0, RET]), (0, Reason::NotPreserved), "{name}");
        }
    }

    /// Comparing, and computing in registers that nobody waits for, is harmless.
    #[test]
    fn harmless() {
        for (name, instruction) in [
            ("cmp x0, #0", CMP_X0_0),
            ("cmn x1, #1", 0xb100_043f),
            ("cmp x0, x1", 0xeb01_001f),
            ("tst x0, #15", 0xf240_0c1f),
            ("tst x0, x1", 0xea01_001f),
            ("mov x9, x0", 0xaa00_03e9),
            ("add x9, x0, x1", 0x8b01_0009),
            ("add x9, x0, #16", 0x9100_4009),
            ("subs x9, x1, #1", 0xf100_0429),
            ("mov w9, #1", 0x5280_0029),
            ("lsr x9, x0, #4", 0xd344_fc09),
            ("ldr x9, [x0, #8]", 0xf940_0409),
            ("ldrb w9, [x0]", 0x3940_0009),
        ] {
            assert_eq!(placed(&[instruction, CBZ_X0, RET]), (4, Reason::LaterEmulated), "{name}");
        }
    }

    /// A jump back to the chosen instruction, and one to who knows where, keep the entry; one to the entry does not matter.
    #[test]
    fn jumps_back() {
        let back = |words: u32| 0x1400_0000 | (0x0400_0000 - words);
        assert_eq!(placed(&[CMP_X0_0, B_EQ, back(1), RET]), (0, Reason::BranchTarget));
        assert_eq!(placed(&[CMP_X0_0, B_EQ, back(2), RET]), (4, Reason::LaterEmulated));
        // cbz x1, -8; tbz w1, #0, -8
        assert_eq!(placed(&[CMP_X0_0, B_EQ, RET, 0xb4ff_ffc1]), (0, Reason::BranchTarget));
        assert_eq!(placed(&[CMP_X0_0, B_EQ, RET, 0x3607_ffc1]), (0, Reason::BranchTarget));
        for (name, jump) in [("br x9", 0xd61f_0120), ("braa x9, x10", 0xd71f_092a), ("braaz x9", 0xd61f_093f)] {
            assert_eq!(placed(&[CMP_X0_0, B_EQ, jump]), (0, Reason::IndirectJump), "{name}");
        }
    }

    /// A nop is simulated by newer kernels only, and harmless on the others.
    #[test]
    fn nops() {
        let code = bytes(&[NOP, STP_FP_LR, RET]);
        assert_eq!(place(&code, Some(12), NEW), Placement { skipped: 0, reason: Reason::EntryEmulated });
        assert_eq!(place(&code, Some(12), OLD).reason, Reason::NotPreserved);
    }

    /// The page of an `adrp`, forwards and backwards, and the place in it of the `add` that follows.
    #[test]
    fn addresses_of_data() {
        // adrp x0, 0x157000; add x0, x0, #0x4a8, at 0x28a40
        let code = bytes(&[0x9000_0960 | 3 << 29, 0x9112_a000, RET]);
        assert_eq!(loaded_address(&code, 0x28a40), Some(0x157_4a8));
        let code = bytes(&[BTI_C, 0x9000_0960 | 3 << 29, 0x9112_a000, RET]);
        assert_eq!(loaded_address(&code, 0x28a40), Some(0x157_4a8));
        // adrp x1, -0x1000; add x1, x1, #8
        assert_eq!(loaded_address(&bytes(&[0xf0ff_ffe1, 0x9100_2021]), 0x5004), Some(0x4008));
        assert_eq!(loaded_address(&bytes(&[0xf0ff_ffe1, 0x9100_2022]), 0x5004), None, "another register");
        assert_eq!(loaded_address(&bytes(&[RET]), 0x5004), None);
    }

    proptest! {
        /// Arbitrary code of any claimed size gives a place inside it at an instruction, never a panic.
        #[test]
        fn total_on_arbitrary_code(code in proptest::collection::vec(any::<u8>(), 0..512), size in proptest::option::of(0_usize..600)) {
            let p = place(&code, size, NEW);
            prop_assert!(p.skipped == 0 || (p.skipped as usize) < code.len());
            prop_assert_eq!(p.skipped % 4, 0);
            prop_assert_eq!(p.reason == Reason::LaterEmulated, p.skipped > 0);
        }
    }
}

//! The unwind tables as both sides see them: rows, and which code of a process they are for.
//!
//! A row says how the frame of the code from its address on, up to the next row, is left: where the canonical frame address
//! (CFA, the stack pointer before the call; DWARF 5, 6.4) is, and where the caller's frame pointer is. The return address is
//! at CFA - 8 (x86-64). Addresses are those of the ELF file (`p_vaddr`), less the file's lowest one.
//!
//! A walk looks up only the ends of calls (each frame but the innermost is left at a return address, and the innermost is at an
//! allocator's entry or behind a `syscall`), so a table keeps only rows that hold one of those, unless it says that it is full.

/// Where the CFA is: three bits.
pub mod cfa {
    /// The outermost frame: its return address is undefined.
    pub const END: u32 = 0;
    /// sp + offset.
    pub const SP: u32 = 1;
    /// Frame pointer + offset.
    pub const FP: u32 = 2;
    /// The word at sp + offset.
    pub const DEREF_SP: u32 = 3;
    /// The word at frame pointer + offset.
    pub const DEREF_FP: u32 = 4;
    /// sp + 8, and 8 more from the eleventh byte of each sixteen of the code on: the x86-64 procedure linkage table.
    pub const PLT: u32 = 5;
    /// A signal's trampoline: the interrupted registers are in the `ucontext` at sp.
    pub const SIGNAL: u32 = 6;
    /// Cannot be followed; the offset says why, one of [`super::none`].
    pub const NONE: u32 = 7;
}

/// Why a row cannot be followed: the offset of [`cfa::NONE`].
pub mod none {
    /// No entry covers this code: a walk may try the frame pointer.
    pub const NO_ENTRY: i16 = 0;
    /// The entry uses what a row cannot express.
    pub const INEXPRESSIBLE: i16 = 1;
}

/// Where the caller's frame pointer is: two bits.
pub mod fp {
    /// Still in its register.
    pub const SAME: u32 = 0;
    /// At CFA + offset.
    pub const AT_CFA: u32 = 1;
    /// At the frame pointer + offset (a function that realigns its stack).
    pub const AT_FP: u32 = 2;
    /// Lost.
    pub const UNKNOWN: u32 = 3;
}

/// What follows from a row's address on, in 32 bits: offset of the CFA in words (16 bits, signed), kind of CFA (3), kind of
/// frame pointer (2), offset of the frame pointer in words (11, signed).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule(pub u32);

impl Rule {
    /// A rule with offsets in words of eight bytes; `None` where one does not fit.
    pub const fn new(cfa: u32, cfa_words: i64, fp: u32, fp_words: i64) -> Option<Self> {
        if cfa_words < i16::MIN as i64 || cfa_words > i16::MAX as i64 || fp_words < -1024 || fp_words > 1023 {
            return None;
        }
        Some(Self((cfa_words as u32 & 0xffff) | cfa << 16 | fp << 19 | (fp_words as u32 & 0x7ff) << 21))
    }

    /// No way out of here, for one of [`none`].
    pub const fn none(why: i16) -> Self {
        Self((why as u32 & 0xffff) | cfa::NONE << 16 | fp::UNKNOWN << 19)
    }

    /// One of [`cfa`].
    #[inline]
    pub const fn cfa(self) -> u32 {
        self.0 >> 16 & 7
    }

    /// Bytes.
    #[inline]
    pub const fn cfa_offset(self) -> i64 {
        self.0 as u16 as i16 as i64 * 8
    }

    /// One of [`fp`].
    #[inline]
    pub const fn fp(self) -> u32 {
        self.0 >> 19 & 3
    }

    /// Bytes.
    #[inline]
    pub const fn fp_offset(self) -> i64 {
        (self.0 as i32 >> 21) as i64 * 8
    }
}

/// A row: the address in the upper half, so that rows sort by it, and the rule.
pub const fn row(address: u32, rule: Rule) -> u64 {
    (address as u64) << 32 | rule.0 as u64
}

/// Code of a process and where its rows are, an element of the map of ranges. A process's elements are adjacent and sorted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// What is taken off an address to get the one in the rows.
    pub bias: u64,
    /// Index of the first row in the map of rows.
    pub first: u32,
    /// How many rows; zero: none are loaded.
    pub rows: u32,
    /// Bits of [`range_flag`].
    pub flags: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Range>() == 40);

/// Bits of [`Range::flags`].
pub mod range_flag {
    /// The rows hold for every instruction, not only for ends of calls.
    pub const FULL: u32 = 1;
    /// The code has no unwind information of its own and is followed by its frame pointers (Go, generated code).
    pub const FRAME_POINTERS: u32 = 2;
}

/// A traced process, as a value of the map of targets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Index of the first of its ranges in the map of ranges, and how many.
    pub first_range: u32,
    pub ranges: u32,
    /// Where the kernel's return probes make functions return to, zero if that is not known.
    pub trampoline: u64,
}
const _: () = assert!(size_of::<Target>() == 16);

#[cfg(test)]
mod tests {
    use super::*;

    /// Each part of a rule is read back as it was put in, at the ends of its range.
    #[test]
    fn rules_keep_their_parts() {
        for cfa in 0..8 {
            for fp in 0..4 {
                for cfa_words in [i64::from(i16::MIN), -1, 0, 1, i64::from(i16::MAX)] {
                    for fp_words in [-1024, -1, 0, 1, 1023] {
                        let rule = Rule::new(cfa, cfa_words, fp, fp_words).expect("it fits");
                        let parts = (rule.cfa(), rule.cfa_offset(), rule.fp(), rule.fp_offset());
                        assert_eq!(parts, (cfa, cfa_words * 8, fp, fp_words * 8));
                    }
                }
            }
        }
        assert_eq!(Rule::new(cfa::SP, 1 << 15, fp::SAME, 0), None);
        assert_eq!(Rule::new(cfa::SP, 0, fp::AT_CFA, 1024), None);
    }
}

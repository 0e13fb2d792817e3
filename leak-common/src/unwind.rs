//! The unwind tables as both sides see them: rows, and which code of a process they are for.
//!
//! A row says how the frame of the code from its address on, up to the next row, is left: where the canonical frame address
//! (CFA, the stack pointer before the call; DWARF 5, 6.4) is, and where the caller's frame pointer is. The return address is
//! at CFA - 8 (x86-64). Addresses are those of the ELF file (`p_vaddr`), less the file's lowest one.
//!
//! A walk looks up only the ends of calls (each frame but the innermost is left at a return address, and the innermost is at an
//! allocator's entry or behind a `syscall`), so a table keeps only rows that hold one of those, unless it says that it is full.
//!
//! A file has few different rules (python3 188), and most functions have one row of their own. So where it takes less,
//! the rules stand once each in front of the rows, and a row holds two pieces of code: a *pair*.

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

/// The most different rules that pairs of a file can refer to: ten bits.
pub const PAIR_RULES: usize = 1 << 10;

/// How far the second piece of a pair can begin behind the first, in bytes: twelve bits.
pub const PAIR_REACH: u32 = (1 << 12) - 1;

/// A row for two pieces of code: from `address` on the rule with the index `first` holds, `reach` bytes further on, the one with
/// the index `second`. With a reach of zero there is only the second.
///
/// The address is in the upper half, as in a [`row`]. None if a part does not fit.
pub const fn pair(address: u32, reach: u32, first: u32, second: u32) -> Option<u64> {
    if reach > PAIR_REACH || first as usize >= PAIR_RULES || second as usize >= PAIR_RULES {
        return None;
    }
    Some((address as u64) << 32 | (reach as u64) << 20 | (first as u64) << 10 | second as u64)
}

/// The index of the rule that a pair has for an address, which is not below the pair's own.
#[inline]
pub const fn rule_index(pair: u64, address: u32) -> u32 {
    let behind = address.wrapping_sub((pair >> 32) as u32);
    let reach = pair as u32 >> 20;
    (if behind < reach { pair as u32 >> 10 } else { pair as u32 }) & (PAIR_RULES as u32 - 1)
}

/// The rule with an index out of the word that holds it: a word has two, the even one in the lower half.
#[inline]
pub const fn rule_of_word(word: u64, index: u32) -> Rule {
    Rule((word >> (32 * (index & 1))) as u32)
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
    /// How many words of rules stand right before the first row. Zero: the rows hold their rules themselves ([`row`]); otherwise they
    /// are pairs ([`pair`]). Not a flag, so that making a range void ([`Self::rows`], then [`Self::flags`]) leaves no moment in which
    /// rows are taken for what they are not.
    pub rules: u32,
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
    /// Where in the map of settings its sampling is.
    pub sampling: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Target>() == 24);

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

    /// A pair gives the first index up to its reach and the second from there on, at the ends of each part's range; what does not fit
    /// is refused.
    #[test]
    fn pairs_keep_their_parts() {
        let last = PAIR_RULES as u32 - 1;
        for address in [0, 0x1234_5678, u32::MAX - PAIR_REACH] {
            for (first, second) in [(0, last), (last, 0), (1, 2)] {
                for reach in [1, 17, PAIR_REACH] {
                    let pair = pair(address, reach, first, second).expect("it fits");
                    assert_eq!((pair >> 32) as u32, address);
                    let found = [0, reach - 1, reach].map(|behind| rule_index(pair, address + behind));
                    assert_eq!(found, [first, first, second]);
                }
                let single = pair(address, 0, first, second).expect("it fits");
                assert_eq!(rule_index(single, address), second);
            }
        }
        assert_eq!(pair(0, PAIR_REACH + 1, 0, 0), None);
        assert_eq!(pair(0, 1, last + 1, 0), None);
        assert_eq!(pair(0, 1, 0, last + 1), None);
        let word = 7 | 9 << 32;
        assert_eq!([rule_of_word(word, 4), rule_of_word(word, 5)], [Rule(7), Rule(9)]);
    }
}

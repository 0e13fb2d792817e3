//! The rule by which the frame of an address is left, from the tables that user space has loaded.
//!
//! Looked up by binary search once, then found in [`RULES`], a table of the rules of return addresses met lately. Its
//! entries are {address ^ value, value} with value = rule | tag << 32: an entry that two CPUs wrote at once fails its own
//! check, so no lock is needed. The tag is of the process and of the generation of code addresses, so whatever maps code
//! makes all entries void.

use leak_common::unwind::{Range, Rule, cfa, fp, none, range_flag, rule_index, rule_of_word};

use crate::maps::{RANGES, ROWS, RULES, RULES_COUNT, TARGETS, generation, has_loop};
use crate::repeat::repeat;

/// A frame with a frame pointer: the caller's frame pointer at the frame pointer, the return address above it. Tables say
/// the same of such code with an offset from the CFA, so a rule tells whether it is from a table.
pub const BY_FRAME_POINTER: Rule = Rule::new(cfa::FP, 2, fp::AT_FP, 0).unwrap();

/// Offsets of `cfa::NONE` that only a look-up gives, beside those of `leak_common::unwind::none`.
pub mod miss {
    /// No rows are loaded for this code.
    pub const NO_TABLE: i16 = 16;
    /// The address is of an interrupted instruction, and the rows hold for calls only.
    pub const INTERRUPTED: i16 = 17;
    /// The address is in no known code.
    pub const NO_RANGE: i16 = 18;
}

/// Set in the key of an address that is no return address.
const EXACT: u64 = 1 << 63;

/// What tells one process's addresses from another's, and from what they were before code was mapped.
#[inline(always)]
pub fn tag(tgid: u32) -> u64 {
    u64::from((generation() as u32) ^ tgid.wrapping_mul(0x9e37_79b1))
}

/// The rule for a return address, or with `exact` for the address of an instruction that was interrupted.
#[inline(always)]
pub fn rule(tgid: u32, tag: u64, pc: u64, exact: bool) -> Rule {
    let key = if exact { pc | EXACT } else { pc };
    let index = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32 & (RULES_COUNT - 1);
    if let Some(entry) = RULES.get_ptr(index) {
        // SAFETY: a valid map value; each half is one aligned word, and whether they belong together is checked.
        let (check, value) = unsafe { ((*entry)[0], (*entry)[1]) };
        if check ^ value == key && value >> 32 == tag {
            return Rule(value as u32);
        }
    }
    find(tgid, tag, key, index)
}

/// Finds the rule in the tables and remembers it.
#[inline(never)]
fn find(tgid: u32, tag: u64, key: u64, index: u32) -> Rule {
    let exact = key & EXACT != 0;
    // A call can be the last instruction of its function: its return address is the next function's.
    let address = if exact { key & !EXACT } else { key - 1 };
    let Some(range) = range_of(tgid, address) else {
        return Rule::none(miss::NO_RANGE);
    };
    let found = if range.flags & range_flag::FRAME_POINTERS != 0 {
        BY_FRAME_POINTER
    } else if range.rows == 0 {
        return Rule::none(miss::NO_TABLE);
    } else if exact && range.flags & range_flag::FULL == 0 {
        return Rule::none(miss::INTERRUPTED);
    } else {
        in_rows(range, address.wrapping_sub(range.bias))
    };
    if let Some(entry) = RULES.get_ptr_mut(index) {
        let value = u64::from(found.0) | tag << 32;
        // SAFETY: a valid map value, see the module's documentation.
        unsafe {
            (*entry)[0] = key ^ value;
            (*entry)[1] = value;
        }
    }
    found
}

/// All ones where a < b, otherwise zero; without a branch, which the verifier would follow both ways at each step. For
/// numbers below 2^63.
#[inline(always)]
fn below(a: u64, b: u64) -> u64 {
    let mut less = a.wrapping_sub(b);
    // SAFETY: arithmetic on a register. In assembler, because LLVM would make the comparison of it that it is.
    unsafe {
        core::arch::asm!("{less} >>= 63", less = inout(reg) less);
    }
    less.wrapping_neg()
}

/// Enough halvings for 2^24 elements.
const HALVINGS: u32 = 24;

/// A binary search that is under way.
struct Search {
    /// Index of an element that is known not to be above the address.
    at: u64,
    /// How many elements behind it are in question.
    count: u64,
    address: u64,
}

#[inline(never)]
extern "C" fn halve_rows(_index: u64, search: *mut Search) -> i64 {
    // SAFETY: bpf_loop passes on the pointer that it was given.
    let search = unsafe { &mut *search };
    let half = search.count >> 1;
    let middle = search.at + half;
    let Some(row) = ROWS.get_ptr(middle as u32) else {
        return 1;
    };
    // SAFETY: a valid map value.
    let address = unsafe { *row } >> 32;
    // Not above the address: the answer is in the upper part.
    search.at += half & !below(search.address, address);
    search.count -= half;
    0
}

/// The rule that the rows of a range have for `address`: that of the last row that is not above it.
#[inline(always)]
fn in_rows(range: &Range, address: u64) -> Rule {
    let mut search = Search { at: u64::from(range.first), count: u64::from(range.rows), address };
    repeat::<HALVINGS, _>(halve_rows, &raw mut search);
    let row = match ROWS.get_ptr(search.at as u32) {
        // SAFETY: a valid map value.
        Some(row) => unsafe { *row },
        None => return Rule::none(none::NO_ENTRY),
    };
    // Code before the first row has no entry.
    if row >> 32 > address {
        return Rule::none(none::NO_ENTRY);
    }
    if range.rules == 0 {
        return Rule(row as u32);
    }
    let index = rule_index(row, address as u32);
    match ROWS.get_ptr(range.first.wrapping_sub(range.rules).wrapping_add(index >> 1)) {
        // SAFETY: a valid map value.
        Some(word) => rule_of_word(unsafe { *word }, index),
        None => Rule::none(none::NO_ENTRY),
    }
}

#[inline(never)]
extern "C" fn halve_ranges(_index: u64, search: *mut Search) -> i64 {
    // SAFETY: bpf_loop passes on the pointer that it was given.
    let search = unsafe { &mut *search };
    let half = search.count >> 1;
    let middle = search.at + half;
    let Some(range) = RANGES.get_ptr(middle as u32) else {
        return 1;
    };
    // SAFETY: a valid map value.
    let start = unsafe { (*range).start };
    search.at += half & !below(search.address, start);
    search.count -= half;
    0
}

/// The range of code that holds `address`.
#[inline(always)]
pub fn range_of(tgid: u32, address: u64) -> Option<&'static Range> {
    let target = TARGETS.get_ptr(tgid)?;
    // SAFETY: a valid map value; user space replaces it as a whole.
    let (first, count) = unsafe { ((*target).first_range, (*target).ranges) };
    if count == 0 {
        return None;
    }
    let mut search = Search { at: u64::from(first), count: u64::from(count), address };
    repeat::<HALVINGS, _>(halve_ranges, &raw mut search);
    let range = RANGES.get_ptr(search.at as u32)?;
    // SAFETY: a valid map value.
    let range = unsafe { &*range };
    (address >= range.start && address < range.end).then_some(range)
}

struct Change {
    first: u64,
    count: u64,
    start: u64,
    end: u64,
}

#[inline(never)]
extern "C" fn void_range(index: u64, change: *mut Change) -> i64 {
    // SAFETY: bpf_loop passes on the pointer that it was given.
    let change = unsafe { &mut *change };
    if index >= change.count {
        return 1;
    }
    let Some(range) = RANGES.get_ptr_mut((change.first + index) as u32) else {
        return 1;
    };
    // SAFETY: a valid map value; each field is one aligned word.
    unsafe {
        if (*range).start < change.end && change.start < (*range).end {
            (*range).rows = 0;
            (*range).flags = 0;
        }
    }
    0
}

/// The most ranges that a change is looked for in.
const CHANGED_RANGES: u32 = 1 << 14;

/// The code at these addresses is not what it was: until user space has looked, there is no table for it.
#[inline(never)]
pub fn code_changed(tgid: u32, start: u64, size: u64) -> u64 {
    if !has_loop() {
        // Too long for a plain loop: then nothing is known for a moment.
        all_code_changed(tgid);
        return 0;
    }
    let Some(target) = TARGETS.get_ptr(tgid) else {
        return 0;
    };
    // SAFETY: a valid map value.
    let (first, count) = unsafe { ((*target).first_range, (*target).ranges) };
    let mut change = Change { first: u64::from(first), count: u64::from(count), start, end: start.wrapping_add(size) };
    repeat::<CHANGED_RANGES, _>(void_range, &raw mut change);
    0
}

/// A new program: none of the old one's code is there any more.
#[inline(always)]
pub fn all_code_changed(tgid: u32) {
    if let Some(target) = TARGETS.get_ptr_mut(tgid) {
        // SAFETY: a valid map value; one aligned word each.
        unsafe {
            (*target).ranges = 0;
            (*target).trampoline = 0;
        }
    }
}

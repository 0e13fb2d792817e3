//! What is particular to x86-64: which registers count, what a state means as a rule, and where calls end.
//!
//! Another machine needs a module with the same items.

use super::cfi::{Cfa, Saved, Source, State};
use gimli::{Encoding, Format, Operation, Register, UnwindExpression, X86_64};
use leak_common::unwind::{Rule, cfa, fp, none};

pub const MACHINE: u16 = object::elf::EM_X86_64;
pub const FP: Register = X86_64::RBP;
pub const SP: Register = X86_64::RSP;

pub const INEXPRESSIBLE: Rule = Rule::none(none::INEXPRESSIBLE);

/// Rules without offsets.
const fn plain(kind: u32) -> Rule {
    match Rule::new(kind, 0, fp::UNKNOWN, 0) {
        Some(rule) => rule,
        None => INEXPRESSIBLE,
    }
}

pub const END: Rule = plain(cfa::END);
pub const SIGNAL: Rule = plain(cfa::SIGNAL);

/// Where the kernel puts registers in the `ucontext` that the stack pointer is at in a signal's trampoline
/// (`struct ucontext` and `struct sigcontext_64` of the kernel's uapi headers: 40 bytes, then r8 to r15, di, si, bp, ...).
const UCONTEXT_FP: i64 = 40 + 10 * 8;
const UCONTEXT_SP: i64 = 40 + 15 * 8;
const UCONTEXT_PC: i64 = 40 + 16 * 8;

const ENCODING: Encoding = Encoding { address_size: 8, format: Format::Dwarf32, version: 4 };

/// The most operations of an expression that are looked at.
const MAX_OPERATIONS: usize = 8;

/// What the state says, as far as a rule can.
pub fn rule<'a>(state: &State, signal: bool, source: &impl Source<'a>) -> Rule {
    match state.ra {
        Saved::Undefined => return END,
        Saved::AtCfa(-8) => {}
        Saved::Expression(ra) if signal => return signal_rule(state, ra, source).unwrap_or(INEXPRESSIBLE),
        _ => return INEXPRESSIBLE,
    }
    frame_rule(state, source).unwrap_or(INEXPRESSIBLE)
}

fn frame_rule<'a>(state: &State, source: &impl Source<'a>) -> Option<Rule> {
    let (kind, offset) = match state.cfa {
        Cfa::Register(SP, offset) => (cfa::SP, words(offset)?),
        Cfa::Register(FP, offset) => (cfa::FP, words(offset)?),
        Cfa::Expression(expression) => match operations(expression, source)?.as_slice() {
            // gcc, where it realigns the stack: the stack pointer before was saved in the frame.
            [Op::Register(SP, offset), Op::Deref] => (cfa::DEREF_SP, words(*offset)?),
            [Op::Register(FP, offset), Op::Deref] => (cfa::DEREF_FP, words(*offset)?),
            // Linkers, for the procedure linkage table: behind the push in each of its entries there is a word more.
            [
                Op::Register(SP, 8),
                Op::Register(X86_64::RA, 0),
                Op::Constant(15),
                Op::And,
                Op::Constant(11),
                Op::GreaterOrEqual,
                Op::Constant(3),
                Op::ShiftLeft,
                Op::Add,
            ] => (cfa::PLT, 0),
            _ => return None,
        },
        Cfa::Register(..) | Cfa::Unset => return None,
    };
    let (fp_kind, fp_offset) = match state.fp {
        Saved::Unspecified | Saved::Same => (fp::SAME, 0),
        Saved::AtCfa(offset) => words(offset).map_or((fp::UNKNOWN, 0), |words| (fp::AT_CFA, words)),
        Saved::Expression(expression) => match operations(expression, source).as_deref() {
            Some([Op::Register(FP, offset)]) => words(*offset).map_or((fp::UNKNOWN, 0), |words| (fp::AT_FP, words)),
            _ => (fp::UNKNOWN, 0),
        },
        Saved::Undefined | Saved::Other => (fp::UNKNOWN, 0),
    };
    // A frame pointer too far away is lost, but the way to the caller need not be.
    Rule::new(kind, offset, fp_kind, fp_offset).or_else(|| Rule::new(kind, offset, fp::UNKNOWN, 0))
}

/// The rule of a trampoline, if the entry says of the registers that they are where the kernel puts them.
fn signal_rule<'a>(state: &State, ra: UnwindExpression<usize>, source: &impl Source<'a>) -> Option<Rule> {
    let (Cfa::Expression(sp), Saved::Expression(fp)) = (state.cfa, state.fp) else { return None };
    let at = |expression, offset, deref: bool| {
        let operations = operations(expression, source);
        let (place, rest) = operations.as_deref().and_then(<[Op]>::split_first)?;
        (*place == Op::Register(SP, offset) && rest == if deref { &[Op::Deref][..] } else { &[] }).then_some(())
    };
    at(sp, UCONTEXT_SP, true)?;
    at(fp, UCONTEXT_FP, false)?;
    at(ra, UCONTEXT_PC, false)?;
    Some(SIGNAL)
}

fn words(offset: i64) -> Option<i64> {
    (offset % 8 == 0).then_some(offset / 8)
}

/// The operations that are known in expressions.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    /// A register and an offset.
    Register(Register, i64),
    Deref,
    Constant(u64),
    And,
    GreaterOrEqual,
    ShiftLeft,
    Add,
}

/// The operations of an expression. None if it has another one, or too many.
fn operations<'a>(expression: UnwindExpression<usize>, source: &impl Source<'a>) -> Option<Vec<Op>> {
    let mut found = Vec::with_capacity(2);
    let mut operations = source.expression(expression)?.operations(ENCODING);
    while let Some(operation) = operations.next().ok()? {
        if found.len() > MAX_OPERATIONS {
            return None;
        }
        found.push(match operation {
            Operation::RegisterOffset { register, offset, .. } => Op::Register(register, offset),
            Operation::Deref { size: 8, space: false, .. } => Op::Deref,
            Operation::UnsignedConstant { value } => Op::Constant(value),
            Operation::And => Op::And,
            Operation::Ge => Op::GreaterOrEqual,
            Operation::Shl => Op::ShiftLeft,
            Operation::Plus => Op::Add,
            _ => return None,
        });
    }
    Some(found)
}

/// How many bytes before and behind a piece of code are needed to see every call in it.
pub const CONTEXT: usize = 16;

/// What a scan of code finds.
pub trait Found {
    /// The last byte of a call, or of a system call.
    fn call(&mut self, last_byte: u64);
    /// Code that returns from a signal: its first address, and the one behind it.
    fn trampoline(&mut self, start: u64, end: u64);
}

/// Finds where calls and system calls end: everywhere that bytes look like one, so that none is missed, whatever lies between.
///
/// `code` is at `address`, and only what begins in `range` of it is looked at. A direct call has to lead to code of the
/// same file (`is_code`), or it is none. Far calls are not looked for: no program has any.
pub fn scan(
    code: &[u8],
    address: u64,
    range: std::ops::Range<usize>,
    is_code: impl Fn(u64) -> bool,
    found: &mut impl Found,
) {
    for i in range {
        let last = match code[i] {
            // call rel32
            0xe8 => match direct_call(code, i, address) {
                Some(target) if is_code(target) => i + 4,
                _ => continue,
            },
            // call r/m64: FF /2
            0xff => match code.get(i + 1..).and_then(indirect_call_length) {
                Some(len) => i + len,
                None => continue,
            },
            // syscall: 0F 05
            0x0f if code.get(i + 1) == Some(&0x05) => {
                // mov eax, 15 (rt_sigreturn) before it, in one of two forms.
                let before = &code[..i];
                let forms: [&[u8]; 2] = [b"\x48\xc7\xc0\x0f\0\0\0", b"\xb8\x0f\0\0\0"];
                if let Some(form) = forms.into_iter().find(|form| before.ends_with(form)) {
                    found.trampoline(address + (i - form.len()) as u64, address + i as u64 + 2);
                }
                i + 1
            }
            _ => continue,
        };
        if last < code.len() {
            found.call(address + last as u64);
        }
    }
}

/// Where the bytes at `i` of code at `address` call, if they are a direct call: E8, relative to its end.
pub fn direct_call(code: &[u8], i: usize, address: u64) -> Option<u64> {
    let relative = code.get(i..)?.strip_prefix(&[0xe8])?.first_chunk::<4>()?;
    Some((address + i as u64 + 5).wrapping_add_signed(i64::from(i32::from_le_bytes(*relative))))
}

/// How many bytes of a function [`sets_frame_pointer`] looks at: what can be done without a frame may come first, such as a look at
/// the arguments.
pub const PROLOGUE: usize = 24;

/// Whether a function that begins with these bytes sets up a frame pointer. None if it is a linker's stub, which only jumps on.
pub fn sets_frame_pointer(start: &[u8]) -> Option<bool> {
    // endbr64
    let code = start.strip_prefix(b"\xf3\x0f\x1e\xfa").unwrap_or(start);
    // jmp [rip + x], also with the prefix bnd; push x, of a stub that has not been resolved
    if code.starts_with(b"\xff\x25") || code.starts_with(b"\xf2\xff\x25") || code.starts_with(b"\x68") {
        return None;
    }
    // Behind a return there may be another function. An early return that comes first only makes the answer no.
    let code = code.split(|&byte| byte == 0xc3).next().unwrap_or_default();
    // mov rbp, rsp, in either of its two encodings, behind push rbp: compilers put other instructions between the two.
    let set = code.windows(3).position(|bytes| bytes == b"\x48\x89\xe5" || bytes == b"\x48\x8b\xec");
    Some(set.is_some_and(|at| code[..at].contains(&0x55)))
}

/// The length of what follows the opcode FF, if it is a near call (Intel SDM volume 2, tables 2-2 and 2-3).
fn indirect_call_length(rest: &[u8]) -> Option<usize> {
    let &modrm = rest.first()?;
    if modrm >> 3 & 7 != 2 {
        return None;
    }
    let (mode, rm) = (modrm >> 6, modrm & 7);
    // A scale-index-base byte, which may stand for a displacement without base.
    let sib = if mode != 3 && rm == 4 { Some(*rest.get(1)?) } else { None };
    let displacement = match mode {
        0 if rm == 5 || sib.is_some_and(|sib| sib & 7 == 5) => 4,
        1 => 1,
        2 => 4,
        _ => 0,
    };
    Some(1 + usize::from(sib.is_some()) + displacement)
}

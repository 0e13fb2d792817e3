//! Runs call frame information: for each piece of code, where the caller's registers are.
//!
//! `gimli` reads the entries and their instructions. What these do to the only three things a walk needs (the canonical frame
//! address, the frame pointer, the return address) is done here rather than by gimli's table of all registers: it is several
//! times faster, and the cost of an instruction is bounded, whatever a hostile file makes of the other registers. The tests
//! compare the two at every call of real libraries.

use super::image::{Code, Form, Frames};
use super::x86_64 as machine;
use gimli::{
    BaseAddresses, CallFrameInstruction, CieOrFde, CommonInformationEntry, DebugFrame, EhFrame, EndianSlice,
    Expression, FrameDescriptionEntry, NativeEndian, Register, UnwindExpression, UnwindOffset, UnwindSection,
};
use leak_common::unwind::row;
use std::collections::HashMap;

/// Bytes of a section.
pub type Slice<'a> = EndianSlice<'a, NativeEndian>;

/// The most rows of a file, before any are dropped; a hundred megabytes of code have a tenth of it.
const MAX_ROWS: usize = 16 << 20;

/// The most common parts of entries in a section; linkers make one of those that are equal, so that a dozen are left.
const MAX_COMMONS: usize = 1 << 17;

/// The most states that an entry may remember at a time; compilers use one.
const MAX_REMEMBERED: usize = 16;

/// The longest instructions common to the entries that refer to them, in bytes; usually a dozen.
const MAX_COMMON: usize = 1024;

/// Where the canonical frame address is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cfa {
    Unset,
    /// At an offset from a register.
    Register(Register, i64),
    Expression(UnwindExpression<usize>),
}

/// Where a register of the caller is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Saved {
    /// Not said: for a register that a function has to keep, the same.
    Unspecified,
    Undefined,
    Same,
    /// In memory, at an offset from the canonical frame address.
    AtCfa(i64),
    /// In memory, at the address that this gives.
    Expression(UnwindExpression<usize>),
    Other,
}

/// What is known at an instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    pub cfa: Cfa,
    pub fp: Saved,
    pub ra: Saved,
}

const UNKNOWN: State = State { cfa: Cfa::Unset, fp: Saved::Unspecified, ra: Saved::Unspecified };

/// The rows of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Less the file's lowest address.
    pub start: u32,
    /// The address behind it.
    pub end: u32,
    /// In [`Evaluated::rows`].
    pub first: usize,
    pub count: usize,
    /// A trampoline, which may be looked up at any of its addresses.
    pub signal: bool,
}

/// What all entries gave.
#[derive(Debug, Default)]
pub struct Evaluated {
    /// In the order of the entries; equal neighbours within an entry are one.
    pub rows: Vec<u64>,
    pub spans: Vec<Span>,
    /// As many as the entries distinguish.
    pub raw_rows: usize,
    /// Entries that could not be read to their end, or not at all.
    pub malformed: usize,
    /// There was more than is worked on.
    pub cut_off: bool,
}

/// The instructions of a section that an expression is read from.
pub trait Source<'a> {
    fn expression(&self, expression: UnwindExpression<usize>) -> Option<Expression<Slice<'a>>>;
}

struct In<'s, S>(&'s S);

impl<'a, S: UnwindSection<Slice<'a>>> Source<'a> for In<'_, S> {
    fn expression(&self, expression: UnwindExpression<usize>) -> Option<Expression<Slice<'a>>> {
        expression.get(self.0).ok()
    }
}

/// Runs all entries of a section that are for a file's code, and adds them to those before. Addresses become relative to `base`.
pub fn evaluate(code: &[Code], base: u64, frames: &Frames, into: &mut Evaluated) {
    match frames.form {
        Form::EhFrame => {
            let mut section = EhFrame::new(&frames.bytes, NativeEndian);
            section.set_address_size(8);
            Evaluation { code, base, section: &section, bases: &frames.bases, into }.run();
        }
        Form::DebugFrame => {
            let mut section = DebugFrame::new(&frames.bytes, NativeEndian);
            section.set_address_size(8);
            Evaluation { code, base, section: &section, bases: &frames.bases, into }.run();
        }
    }
}

/// What the entries that refer to it begin with.
#[derive(Clone)]
struct Common<'a> {
    cie: CommonInformationEntry<Slice<'a>>,
    /// None if its instructions are no good.
    initial: Option<State>,
}

struct Evaluation<'e, S> {
    code: &'e [Code],
    base: u64,
    section: &'e S,
    bases: &'e BaseAddresses,
    into: &'e mut Evaluated,
}

impl<'a, S> Evaluation<'_, S>
where
    S: UnwindSection<Slice<'a>>,
    S::Offset: UnwindOffset<usize>,
{
    fn run(&mut self) {
        let mut commons: HashMap<usize, Option<Common<'a>>> = HashMap::new();
        let mut entries = self.section.entries(self.bases);
        loop {
            let partial = match entries.next() {
                Ok(Some(CieOrFde::Fde(partial))) => partial,
                Ok(Some(CieOrFde::Cie(_))) => continue,
                Ok(None) => return,
                // Where the next entry begins is then unknown.
                Err(_) => {
                    self.into.malformed += 1;
                    return;
                }
            };
            let offset = partial.cie_offset();
            let common = commons.entry(UnwindOffset::into(offset)).or_insert_with(|| {
                let cie = self.section.cie_from_offset(self.bases, offset).ok()?;
                let initial = self.initial(&cie);
                Some(Common { cie, initial })
            });
            let Some(common) = common else {
                self.into.malformed += 1;
                continue;
            };
            match partial.parse(|_, _, _| Ok(common.cie.clone())) {
                Ok(entry) => self.entry(&entry, common.initial),
                Err(_) => self.into.malformed += 1,
            }
            self.into.cut_off |= commons.len() >= MAX_COMMONS;
            if self.into.cut_off {
                return;
            }
        }
    }

    /// The state that the common instructions leave.
    fn initial(&self, cie: &CommonInformationEntry<Slice<'a>>) -> Option<State> {
        let mut run = Run::new(cie, UNKNOWN);
        let mut instructions = cie.instructions(self.section, self.bases);
        let mut read = 0;
        while let Some(instruction) = instructions.next().ok()? {
            read += 1;
            match instruction {
                CallFrameInstruction::AdvanceLoc { .. } | CallFrameInstruction::SetLoc { .. } => return None,
                _ if read > MAX_COMMON => return None,
                other => run.step(&other)?,
            }
        }
        Some(run.state)
    }

    fn entry(&mut self, entry: &FrameDescriptionEntry<Slice<'a>>, initial: Option<State>) {
        // Linkers leave entries of code that they dropped, at address zero.
        let start = entry.initial_address();
        let Some(code) = self.code.iter().find(|c| c.contains(start)).copied() else { return };
        let end = start.saturating_add(entry.len()).min(code.end());
        if end == start {
            return;
        }
        let first = self.into.rows.len();
        let complete = if let Some(initial) = initial {
            self.rows(entry, initial, code, end)
        } else {
            self.push(first, start, machine::INEXPRESSIBLE);
            false
        };
        if self.into.cut_off {
            self.into.rows.truncate(first);
            return;
        }
        if !complete {
            self.into.malformed += 1;
        }
        let base = self.base;
        let count = self.into.rows.len() - first;
        let signal = entry.is_signal_trampoline();
        let span = Span { start: (start - base) as u32, end: (end - base) as u32, first, count, signal };
        self.into.spans.push(span);
    }

    /// Adds the rows of an entry up to `end`. False if its instructions are no good: the code from there on is then
    /// said to be inexpressible.
    fn rows(&mut self, entry: &FrameDescriptionEntry<Slice<'a>>, initial: State, code: Code, end: u64) -> bool {
        let signal = entry.is_signal_trampoline();
        let mut run = Run::new(entry.cie(), initial);
        let mut address = entry.initial_address();
        debug_assert!(code.contains(address) && end <= code.end());
        let first = self.into.rows.len();
        let mut instructions = entry.instructions(self.section, self.bases);
        let complete = loop {
            let next = match instructions.next() {
                Ok(Some(CallFrameInstruction::AdvanceLoc { delta })) => {
                    let step = u64::from(delta).checked_mul(entry.cie().code_alignment_factor());
                    step.and_then(|step| address.checked_add(step))
                }
                Ok(Some(CallFrameInstruction::SetLoc { address: next })) => Some(next).filter(|&next| next >= address),
                Ok(Some(other)) => match run.step(&other) {
                    Some(()) => continue,
                    None => None,
                },
                Ok(None) => break true,
                Err(_) => None,
            };
            let Some(next) = next else { break false };
            if next > address {
                self.push(first, address, machine::rule(&run.state, signal, &In(self.section)));
                address = next;
            }
            if address >= end {
                return true;
            }
        };
        let rule = if complete { machine::rule(&run.state, signal, &In(self.section)) } else { machine::INEXPRESSIBLE };
        self.push(first, address, rule);
        complete
    }

    fn push(&mut self, first: usize, address: u64, rule: leak_common::unwind::Rule) {
        self.into.raw_rows += 1;
        if self.into.rows[first..].last().is_some_and(|&last| last as u32 == rule.0) {
            return;
        }
        if self.into.rows.len() >= MAX_ROWS {
            self.into.cut_off = true;
            return;
        }
        self.into.rows.push(row((address - self.base) as u32, rule));
    }
}

/// Where an entry is in its instructions.
struct Run {
    state: State,
    initial: State,
    remembered: Vec<State>,
    /// What offsets of saved registers are multiples of.
    factor: i64,
    ra: Register,
}

impl Run {
    fn new(cie: &CommonInformationEntry<Slice>, initial: State) -> Self {
        let (factor, ra) = (cie.data_alignment_factor(), cie.return_address_register());
        Self { state: initial, initial, remembered: Vec::new(), factor, ra }
    }

    fn saved(&mut self, register: Register, saved: Saved) {
        if register == machine::FP {
            self.state.fp = saved;
        }
        if register == self.ra {
            self.state.ra = saved;
        }
    }

    fn factored(&self, offset: i64) -> Option<i64> {
        offset.checked_mul(self.factor)
    }

    /// One instruction that does not move on to other code. None if it makes no sense.
    fn step(&mut self, instruction: &CallFrameInstruction<usize>) -> Option<()> {
        use CallFrameInstruction as I;
        let signed = |offset: u64| i64::try_from(offset).ok();
        match *instruction {
            I::DefCfa { register, offset } => self.state.cfa = Cfa::Register(register, signed(offset)?),
            I::DefCfaSf { register, factored_offset } => {
                self.state.cfa = Cfa::Register(register, self.factored(factored_offset)?);
            }
            I::DefCfaRegister { register } => {
                let Cfa::Register(_, offset) = self.state.cfa else { return None };
                self.state.cfa = Cfa::Register(register, offset);
            }
            I::DefCfaOffset { offset } => {
                let Cfa::Register(register, _) = self.state.cfa else { return None };
                self.state.cfa = Cfa::Register(register, signed(offset)?);
            }
            I::DefCfaOffsetSf { factored_offset } => {
                let Cfa::Register(register, _) = self.state.cfa else { return None };
                self.state.cfa = Cfa::Register(register, self.factored(factored_offset)?);
            }
            I::DefCfaExpression { expression } => self.state.cfa = Cfa::Expression(expression),
            I::Undefined { register } => self.saved(register, Saved::Undefined),
            I::SameValue { register } => self.saved(register, Saved::Same),
            I::Offset { register, factored_offset } => {
                let offset = self.factored(signed(factored_offset)?)?;
                self.saved(register, Saved::AtCfa(offset));
            }
            I::OffsetExtendedSf { register, factored_offset } => {
                let offset = self.factored(factored_offset)?;
                self.saved(register, Saved::AtCfa(offset));
            }
            I::Expression { register, expression } => self.saved(register, Saved::Expression(expression)),
            I::ValOffset { register, .. } | I::ValOffsetSf { register, .. } | I::ValExpression { register, .. } => {
                self.saved(register, Saved::Other);
            }
            I::Register { dest_register, .. } => self.saved(dest_register, Saved::Other),
            I::Restore { register } => {
                let State { fp, ra, .. } = self.initial;
                if register == machine::FP {
                    self.state.fp = fp;
                }
                if register == self.ra {
                    self.state.ra = ra;
                }
            }
            I::RememberState => {
                if self.remembered.len() == MAX_REMEMBERED {
                    return None;
                }
                self.remembered.push(self.state);
            }
            I::RestoreState => self.state = self.remembered.pop()?,
            I::ArgsSize { .. } | I::Nop => {}
            // What else there is belongs to other machines.
            _ => return None,
        }
        Some(())
    }
}

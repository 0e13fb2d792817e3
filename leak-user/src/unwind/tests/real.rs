//! Real files: at every call of the C library, the C++ library and node, the table says what gimli's own table of registers does.
//!
//! The two are compared by what they do, not by how they say it: both are carried out on an imagined machine whose memory holds a
//! scrambled form of each address, and must come to the same frame address, return address and frame pointer.

use crate::unwind::{Packed, Rows, Table};
use gimli::{
    BaseAddresses, CfaRule, CieOrFde, EhFrame, EndianSlice, EvaluationResult, Location, NativeEndian, RegisterRule,
    UnwindContext, UnwindExpression, UnwindSection, UnwindTableRow, Value, X86_64,
};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};
use leak_common::unwind::{Rule, cfa, fp};
use object::{Object, ObjectSection};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

type Slice<'a> = EndianSlice<'a, NativeEndian>;

const SP: u64 = 0x7000_0000_0000;
const FP: u64 = 0x7111_0000_0000;

/// The word at an address.
fn memory(address: u64) -> u64 {
    address.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17)
}

/// What a frame is left for.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Caller {
    sp: u64,
    pc: u64,
    /// None if it is lost.
    fp: Option<u64>,
}

/// What leaving a frame comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Left {
    End,
    To(Caller),
    /// Why it cannot be carried out by rows, by design.
    Not(&'static str),
}

/// Carries out a rule.
fn by_rule(rule: Rule, pc: u64) -> Left {
    let sp = match rule.cfa() {
        cfa::END => return Left::End,
        cfa::SP => SP.wrapping_add_signed(rule.cfa_offset()),
        cfa::FP => FP.wrapping_add_signed(rule.cfa_offset()),
        cfa::DEREF_SP => memory(SP.wrapping_add_signed(rule.cfa_offset())),
        cfa::DEREF_FP => memory(FP.wrapping_add_signed(rule.cfa_offset())),
        cfa::PLT => SP + 8 + if pc & 15 >= 11 { 8 } else { 0 },
        cfa::SIGNAL => {
            // Offsets of uc_mcontext.gregs in ucontext_t, and of registers in it, by the C library's own headers.
            let saved = |register: i32| {
                let registers =
                    std::mem::offset_of!(libc::ucontext_t, uc_mcontext) + std::mem::offset_of!(libc::mcontext_t, gregs);
                memory(SP + registers as u64 + 8 * register as u64)
            };
            let fp = Some(saved(libc::REG_RBP));
            return Left::To(Caller { sp: saved(libc::REG_RSP), pc: saved(libc::REG_RIP), fp });
        }
        _ => return Left::Not("inexpressible"),
    };
    let fp = match rule.fp() {
        fp::SAME => Some(FP),
        fp::AT_CFA => Some(memory(sp.wrapping_add_signed(rule.fp_offset()))),
        fp::AT_FP => Some(memory(FP.wrapping_add_signed(rule.fp_offset()))),
        _ => None,
    };
    Left::To(Caller { sp, pc: memory(sp - 8), fp })
}

/// The value of an expression. `None` if it needs registers that a walk does not have.
fn evaluate(section: &EhFrame<Slice>, expression: &UnwindExpression<usize>, pc: u64, initial: u64) -> Option<u64> {
    let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
    let mut evaluation = expression.get(section).expect("an expression").evaluation(encoding);
    evaluation.set_initial_value(initial);
    let mut result = evaluation.evaluate().expect("it can be evaluated");
    loop {
        result = match result {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresRegister { register, .. } => {
                let value = match register {
                    X86_64::RSP => SP,
                    X86_64::RBP => FP,
                    X86_64::RA => pc,
                    _ => return None,
                };
                evaluation.resume_with_register(Value::Generic(value)).expect("it goes on")
            }
            EvaluationResult::RequiresMemory { address, size, .. } => {
                assert_eq!(size, 8);
                evaluation.resume_with_memory(Value::Generic(memory(address))).expect("it goes on")
            }
            other => panic!("unexpected in unwind information: {other:?}"),
        };
    }
    match evaluation.result()[..] {
        [gimli::Piece { location: Location::Address { address }, .. }] => Some(address),
        ref other => panic!("unexpected result: {other:?}"),
    }
}

/// Whether it reads one word and adds a constant to it.
fn adds_to_a_word(section: &EhFrame<Slice>, expression: &UnwindExpression<usize>) -> bool {
    use gimli::Operation as O;
    let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
    let mut operations = expression.get(section).expect("an expression").operations(encoding);
    let mut next = || operations.next().expect("operations");
    matches!(
        [next(), next(), next(), next()],
        [Some(O::RegisterOffset { .. }), Some(O::Deref { .. }), Some(O::PlusConstant { .. }), None]
    )
}

/// Carries out gimli's row.
fn by_gimli(section: &EhFrame<Slice>, row: &UnwindTableRow<usize>, pc: u64) -> Left {
    let sp = match row.cfa() {
        CfaRule::RegisterAndOffset { register: X86_64::RSP, offset } => SP.wrapping_add_signed(*offset),
        CfaRule::RegisterAndOffset { register: X86_64::RBP, offset } => FP.wrapping_add_signed(*offset),
        CfaRule::RegisterAndOffset { .. } => return Left::Not("frame address in another register"),
        // OpenSSL's assembler: the stack pointer was saved before the return address was pushed.
        CfaRule::Expression(expression) if adds_to_a_word(section, expression) => {
            return Left::Not("frame address at a distance from a word of the stack");
        }
        CfaRule::Expression(expression) => match evaluate(section, expression, pc, 0) {
            Some(value) => value,
            None => return Left::Not("frame address by another register"),
        },
    };
    let saved = |rule: RegisterRule<usize>| match rule {
        RegisterRule::Offset(offset) => Some(memory(sp.wrapping_add_signed(offset))),
        RegisterRule::Expression(expression) => evaluate(section, &expression, pc, sp).map(memory),
        _ => None,
    };
    let pc = match row.register(X86_64::RA) {
        RegisterRule::Undefined => return Left::End,
        rule @ (RegisterRule::Offset(-8) | RegisterRule::Expression(_)) => saved(rule).expect("a place in memory"),
        _ => return Left::Not("return address not in its place"),
    };
    let fp = match row.register(X86_64::RBP) {
        // Not said, as a rule: it has to be kept.
        RegisterRule::Undefined | RegisterRule::SameValue => Some(FP),
        rule => saved(rule),
    };
    Left::To(Caller { sp, pc, fp })
}

pub fn libc() -> PathBuf {
    mapped("libc.so.6").expect("this program runs with the C library")
}

/// The path of a library of this process.
fn mapped(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read("/proc/self/maps").expect("maps can be read");
    let found = crate::discover::maps::parse(&maps).find(|m| m.path.ends_with(name.as_bytes()))?;
    Some(found.display_path())
}

/// What was compared.
#[derive(Debug, Default)]
struct Compared {
    calls: usize,
    instructions: usize,
    /// What rows do not express, by why.
    not: BTreeMap<&'static str, usize>,
    /// Where both know the way, but not where the frame pointer is.
    fp_lost: usize,
    different: Vec<String>,
}

/// Compares at each call, and at each instruction of every `every`th entry with all rows.
fn compare(path: &Path, every: usize) -> Compared {
    let bytes = std::fs::read(path).expect("the file can be read");
    let file = File::open(path).expect("the file can be opened");
    let [compact, full] = [Rows::CallEnds, Rows::Full].map(|keep| {
        let table = Table::of_file(&file, keep).expect("a table");
        // As the kernel side has it.
        let packed = Packed::new(&table.rows);
        (table, packed)
    });
    let elf = object::File::parse(&*bytes).expect("an ELF file");
    let eh_frame = elf.section_by_name(".eh_frame").expect("unwind information");
    let mut section = EhFrame::new(eh_frame.data().expect("it is there"), NativeEndian);
    section.set_address_size(8);
    let bases = BaseAddresses::default().set_eh_frame(eh_frame.address());
    let code: Vec<(u64, &[u8])> = elf
        .sections()
        .filter(|s| s.kind() == object::SectionKind::Text)
        .map(|s| (s.address(), s.data().expect("code")))
        .collect();
    let mut found = Compared::default();
    let mut context = UnwindContext::new();
    let mut entries = section.entries(&bases);
    let mut number = 0;
    while let Some(entry) = entries.next().expect("entries") {
        let CieOrFde::Fde(partial) = entry else { continue };
        let entry = partial.parse(EhFrame::cie_from_offset).expect("an entry");
        let (start, end) = (entry.initial_address(), entry.end_address());
        let Some((text, bytes)) = code.iter().find(|(a, b)| (*a..*a + b.len() as u64).contains(&start)) else {
            panic!("an entry for {start:#x}, where no code is");
        };
        number += 1;
        let inside = (start - text) as usize..((end - text) as usize).min(bytes.len());
        let mut rows = entry.rows(&section, &bases, &mut context).expect("rows");
        let mut row = rows.next_row().expect("a row").cloned();
        let mut check = |(table, packed): &(Table, Packed), pc: u64, what: &str| {
            while row.as_ref().is_some_and(|row| pc >= row.end_address()) {
                row = rows.next_row().expect("a row").cloned();
            }
            let row = row.as_ref().expect("a row for each address of the entry");
            let expected = by_gimli(&section, row, pc);
            let rule = packed.lookup((pc - table.base) as u32).expect("a row");
            match (expected, by_rule(rule, pc)) {
                (Left::Not(why), Left::Not("inexpressible")) => *found.not.entry(why).or_default() += 1,
                (Left::To(Caller { fp: None, .. }), left) if left == expected => found.fp_lost += 1,
                (_, left) if left == expected => {}
                (_, left) => found.different.push(format!("{what} {pc:#x}: {left:?} instead of {expected:?}")),
            }
        };
        let mut decoder = Decoder::with_ip(64, &bytes[inside], start, DecoderOptions::NONE);
        for instruction in &mut decoder {
            let is_call = matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
                && instruction.mnemonic() != Mnemonic::Int
                || instruction.mnemonic() == Mnemonic::Syscall;
            if number % every == 0 {
                found.instructions += 1;
                check(&full, instruction.ip(), "instruction at");
            }
            if is_call {
                found.calls += 1;
                check(&compact, instruction.next_ip() - 1, "call that ends after");
            }
        }
    }
    found
}

/// Every call and every instruction of the C library.
#[test]
fn c_library() {
    let found = compare(&libc(), 1);
    assert_eq!(found.different, Vec::<String>::new());
    assert!(found.calls > 5000 && found.instructions > 100_000, "{found:?}");
    // A handful of hand-written places: vfork keeps its return address in a register.
    let inexpressible: usize = found.not.values().sum();
    assert!(inexpressible * 1000 < found.instructions, "{found:?}");
}

/// Every call of the C++ library, and every instruction of some of its functions.
#[test]
fn cpp_library() {
    let Some(path) = installed(&["/usr/lib/x86_64-linux-gnu/libstdc++.so.6", "/usr/lib64/libstdc++.so.6"]) else {
        return;
    };
    let found = compare(&path, 10);
    assert_eq!(found.different, Vec::<String>::new());
    assert!(found.calls > 5000, "{found:?}");
    assert_eq!((found.not.len(), found.fp_lost), (0, 0), "{found:?}");
}

/// Every call of node, if it is installed: generated assembler, hand-written assembler, C++.
#[test]
fn node() {
    let Some(path) = installed(&["/usr/bin/node", "/usr/local/bin/node"]) else { return };
    let found = compare(&path, 100);
    assert_eq!(found.different, Vec::<String>::new());
    assert!(found.calls > 5000, "{found:?}");
    println!("node: {found:?}");
}

fn installed(paths: &[&str]) -> Option<PathBuf> {
    paths.iter().map(PathBuf::from).find(|path| path.exists())
}

/// What a table of a real library may take: a tenth of the rows, eight bytes each, the rules that they share included.
#[test]
fn size() {
    let file = File::open(libc()).expect("the C library");
    let table = Table::of_file(&file, Rows::CallEnds).expect("a table");
    let packed = Packed::new(&table.rows);
    assert!(packed.words().len() * 10 <= table.stats.raw_rows, "{:?}", table.stats);
    assert!(packed.rules() > 0 && packed.words().len() * 3 < table.rows.len() * 2, "{packed:?}");
    assert_eq!((table.stats.malformed, table.stats.cut_off), (0, false));
    assert!(table.missing().is_none() && !table.frame_pointers && table.build_id.is_some());
}

//! Hand-made unwind information: each rule, each nonsense.

use super::elf::{BASE, CODE, CODE_OFFSET, Elf, Frames, Section, USUAL};
use crate::unwind::image::{Data, Image};
use crate::unwind::{Rows, Table, Why, lookup};
use leak_common::unwind::{Rule, cfa, fp, none};
use object::ReadCache;
use proptest::prelude::*;
use std::fs::File;
use std::io::Write;

const NO_ENTRY: Rule = Rule::none(none::NO_ENTRY);
const INEXPRESSIBLE: Rule = Rule::none(none::INEXPRESSIBLE);

/// A rule with offsets in bytes.
fn rule(kind: u32, offset: i64, fp_kind: u32, fp_offset: i64) -> Rule {
    Rule::new(kind, offset / 8, fp_kind, fp_offset / 8).expect("offsets that fit")
}

fn sp(offset: i64) -> Rule {
    rule(cfa::SP, offset, fp::SAME, 0)
}

fn table(frames: &Frames, keep: Rows) -> Table {
    table_of(&[0x90; 256], frames, keep)
}

fn table_of(code: &[u8], frames: &Frames, keep: Rows) -> Table {
    Table::of_bytes(&Elf::new(code, &frames.0).bytes(), keep).expect("a table")
}

/// The rule for an offset from the beginning of the code.
fn at(table: &Table, offset: u64) -> Option<Rule> {
    lookup(&table.rows, (CODE + offset - BASE) as u32)
}

/// The rules at each of the offsets.
#[track_caller]
fn check(instructions: &[u8], expected: &[(u64, Rule)]) {
    let table = table(&Frames::one(instructions), Rows::Full);
    assert_eq!(table.stats.malformed, 0);
    for &(offset, rule) in expected {
        assert_eq!(at(&table, offset), Some(rule), "at {offset}");
    }
    assert_eq!(at(&table, 64), Some(NO_ENTRY));
}

/// A function that pushes rbp, makes it the frame pointer, and leaves again.
#[test]
fn frame_pointer_function() {
    let instructions = b"\x41\x0e\x10\x86\x02\x43\x0d\x06\x50\x0c\x07\x08";
    let kept = |kind| rule(kind, 16, fp::AT_CFA, -16);
    let expected = [(0, sp(8)), (1, kept(cfa::SP)), (3, kept(cfa::SP)), (4, kept(cfa::FP)), (19, kept(cfa::FP))];
    check(instructions, &expected);
    check(instructions, &[(20, rule(cfa::SP, 8, fp::AT_CFA, -16))]);
}

/// Moves, wide offsets, and each way to say the same.
#[test]
fn every_way_to_say_it() {
    // advance_loc1, def_cfa_offset 1024; advance_loc2, def_cfa_sf rsp -2*-8; advance_loc4, def_cfa_offset_sf -3*-8.
    let instructions = b"\x02\x02\x0e\x80\x08\x03\x02\x00\x12\x07\x7e\x04\x02\x00\x00\x00\x13\x7d";
    check(instructions, &[(1, sp(8)), (2, sp(1024)), (4, sp(16)), (6, sp(24))]);
    // offset_extended rbp 2, offset_extended_sf rbp 3, same_value, restore after undefined.
    let instructions = b"\x05\x06\x02\x41\x11\x06\x03\x41\x08\x06\x41\x07\x06\x41\xc6";
    let kept = |kind, offset| rule(cfa::SP, 8, kind, offset);
    let expected =
        [(0, kept(fp::AT_CFA, -16)), (1, kept(fp::AT_CFA, -24)), (2, sp(8)), (3, kept(fp::UNKNOWN, 0)), (4, sp(8))];
    check(instructions, &expected);
    // set_loc, and GNU_args_size, which says nothing of frames.
    let mut instructions = b"\x2e\x20\x0e\x18\x01".to_vec();
    instructions.extend_from_slice(&(CODE + 9).to_le_bytes());
    instructions.extend_from_slice(b"\x0e\x20");
    check(&instructions, &[(8, sp(24)), (9, sp(32))]);
}

/// An early return: the state before the epilogue comes back behind it.
#[test]
fn remembered_states() {
    check(
        b"\x0e\x20\x86\x02\x44\x0a\x0e\x08\xc6\x41\x0b",
        &[(0, rule(cfa::SP, 32, fp::AT_CFA, -16)), (4, sp(8)), (5, rule(cfa::SP, 32, fp::AT_CFA, -16))],
    );
}

/// A function that realigns its stack, as gcc writes main: CFA at the word at rbp - 8, rbp where it points.
#[test]
fn realigned_stack() {
    // def_cfa r10 0; def_cfa_expression {breg6 -8, deref}; expression rbp {breg6 0}.
    let instructions = b"\x0c\x0a\x00\x44\x10\x06\x02\x76\x00\x44\x0f\x03\x76\x78\x06";
    check(instructions, &[(0, INEXPRESSIBLE), (4, INEXPRESSIBLE), (8, rule(cfa::DEREF_FP, -8, fp::AT_FP, 0))]);
    // def_cfa_expression {breg7 160, deref}; expression rbp {breg6 -16}.
    check(b"\x0f\x04\x77\xa0\x01\x06\x10\x06\x02\x76\x70", &[(0, rule(cfa::DEREF_SP, 160, fp::AT_FP, -16))]);
}

/// The procedure linkage table's expression is known to the letter; one that differs in a number is not.
#[test]
fn procedure_linkage_table() {
    let expression = b"\x0f\x0b\x77\x08\x80\x00\x3f\x1a\x3b\x2a\x33\x24\x22".to_vec();
    check(&expression, &[(0, rule(cfa::PLT, 0, fp::SAME, 0))]);
    let mut other = expression;
    other[8] += 1;
    check(&other, &[(0, INEXPRESSIBLE)]);
}

/// The registers of a signal's frame, as the kernel lays them out and glibc describes them.
const SIGNAL_FRAME: &[u8] = b"\x0f\x04\x77\xa0\x01\x06\x10\x06\x03\x77\xf8\x00\x10\x10\x03\x77\xa8\x01";

/// A signal trampoline is one only if its registers are where the kernel puts them, and its entry says that it is one. All its
/// addresses are kept, although nothing is called there.
#[test]
fn signal_trampoline() {
    let with = |augmentation, instructions: &[u8], keep| {
        let mut frames = Frames::default();
        let common = frames.common(augmentation, USUAL);
        frames.entry(common, CODE, 10, instructions);
        frames.entry(common, CODE + 32, 10, b"");
        table(&frames, keep)
    };
    let signal = rule(cfa::SIGNAL, 0, fp::UNKNOWN, 0);
    let compact = with("zRS", SIGNAL_FRAME, Rows::CallEnds);
    for offset in 0..10 {
        assert_eq!(at(&compact, offset), Some(signal));
    }
    assert_eq!(at(&with("zR", SIGNAL_FRAME, Rows::Full), 0), Some(INEXPRESSIBLE));
    for byte in [4, 11, 15] {
        let mut moved = SIGNAL_FRAME.to_vec();
        moved[byte - 1] ^= 8;
        assert_eq!(at(&with("zRS", &moved, Rows::Full), 0), Some(INEXPRESSIBLE), "byte {byte}");
    }
    // One that says of itself what any function says is a function.
    assert_eq!(at(&with("zRS", SIGNAL_FRAME, Rows::Full), 33), Some(sp(8)));
}

/// Code that asks for `rt_sigreturn` is a trampoline where no entry speaks of it, from the byte before on; where one does, the
/// entry is believed.
#[test]
fn trampoline_by_its_looks() {
    let mut code = [0x90; 128];
    code[80..89].copy_from_slice(b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05");
    code[100..107].copy_from_slice(b"\xb8\x0f\0\0\0\x0f\x05");
    code[40..49].copy_from_slice(b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05");
    for keep in [Rows::CallEnds, Rows::Full] {
        let table = table_of(&code, &Frames::one(b""), keep);
        let signal = rule(cfa::SIGNAL, 0, fp::UNKNOWN, 0);
        for offset in [79, 80, 88, 99, 100, 106] {
            assert_eq!(at(&table, offset), Some(signal), "at {offset}");
        }
        assert_eq!(at(&table, 40), Some(sp(8)));
    }
    assert_eq!(at(&table_of(&code, &Frames::one(b""), Rows::Full), 90), Some(NO_ENTRY));
}

/// The outermost frame ends the walk; a return address anywhere but at CFA - 8 cannot be expressed.
#[test]
fn return_address() {
    check(b"\x07\x10", &[(0, rule(cfa::END, 0, fp::UNKNOWN, 0))]);
    check(b"\x90\x02", &[(0, INEXPRESSIBLE)]);
    check(b"\x09\x10\x02", &[(0, INEXPRESSIBLE)]);
    check(b"\x08\x10", &[(0, INEXPRESSIBLE)]);
    check(b"\x07\x10\x44\xd0", &[(0, rule(cfa::END, 0, fp::UNKNOWN, 0)), (4, sp(8))]);
}

/// What a row has no room for: odd offsets, far ones, other registers, other expressions. A frame pointer out of reach is lost
/// alone.
#[test]
fn inexpressible() {
    check(b"\x0e\x0c", &[(0, INEXPRESSIBLE)]);
    check(b"\x0e\x80\x80\x20", &[(0, INEXPRESSIBLE)]);
    check(b"\x0e\xf8\xff\x0f", &[(0, rule(cfa::SP, 0x3_fff8, fp::SAME, 0))]);
    check(b"\x0d\x03", &[(0, INEXPRESSIBLE)]);
    check(b"\x0f\x02\x77\x08", &[(0, INEXPRESSIBLE)]);
    // breg7 8, deref, plus_uconst 8
    check(b"\x0f\x05\x77\x08\x06\x23\x08", &[(0, INEXPRESSIBLE)]);
    let lost = rule(cfa::SP, 8, fp::UNKNOWN, 0);
    check(b"\x86\x81\x08", &[(0, lost)]);
    check(b"\x86\x80\x08", &[(0, rule(cfa::SP, 8, fp::AT_CFA, -8192))]);
    check(b"\x09\x06\x03\x44\x14\x06\x02\x44\x16\x06\x02\x77\x00", &[(0, lost), (4, lost), (8, lost)]);
    check(b"\x10\x06\x02\x77\x08", &[(0, lost)]);
    let table = table(&Frames::one(b"\x0d\x03"), Rows::Full);
    assert_eq!(table.stats.inexpressible, 1);
}

/// Entries that cannot be read on are believed up to there, and counted.
#[test]
fn nonsense_in_entries() {
    // restore_state without a state; def_cfa_offset after an expression; set_loc backwards; an unknown instruction.
    let mut backwards = b"\x44\x01".to_vec();
    backwards.extend_from_slice(&CODE.to_le_bytes());
    for instructions in [&b"\x44\x0b"[..], b"\x44\x0f\x02\x77\x08\x0e\x08", &backwards, b"\x44\x3f"] {
        let table = table(&Frames::one(instructions), Rows::Full);
        assert_eq!(table.stats.malformed, 1);
        let rules = [at(&table, 3), at(&table, 4), at(&table, 63), at(&table, 64)];
        assert_eq!(rules, [Some(sp(8)), Some(INEXPRESSIBLE), Some(INEXPRESSIBLE), Some(NO_ENTRY)]);
    }
    // A hundred remembered states; common instructions that move.
    let mut deep = vec![0x0a; 100];
    deep.push(0x44);
    assert_eq!(table(&Frames::one(&deep), Rows::Full).stats.malformed, 1);
    let mut frames = Frames::default();
    let common = frames.common("zR", b"\x0c\x07\x08\x90\x01\x44");
    frames.entry(common, CODE, 64, b"");
    assert_eq!(at(&table(&frames, Rows::Full), 0), Some(INEXPRESSIBLE));
    // An entry whose common part is none, and a good one behind it.
    let mut frames = Frames::one(b"");
    frames.entry(4, CODE + 100, 10, b"");
    frames.entry(0, CODE + 128, 10, b"");
    let table = table(&frames, Rows::Full);
    assert_eq!((at(&table, 0), at(&table, 130)), (Some(sp(8)), Some(sp(8))));
}

/// A file with more common parts of entries than anybody needs is read up to there.
#[test]
fn too_many_common_parts() {
    let mut frames = Frames::default();
    for _ in 0..140_000 {
        let common = frames.common("zR", USUAL);
        frames.entry(common, CODE, 64, b"");
    }
    let table = table(&frames, Rows::Full);
    assert!(table.stats.cut_off && table.stats.raw_rows == 1 << 17, "{:?}", table.stats);
    assert_eq!(at(&table, 0), Some(sp(8)));
}

/// Moves past the end of an entry, or of the code, end there.
#[test]
fn entries_end_in_time() {
    let mut frames = Frames::default();
    let common = frames.common("zR", USUAL);
    frames.entry(common, CODE, 16, b"\x4f\x0e\x10\x4f\x0e\x18");
    frames.entry(common, CODE + 200, 0x1000, b"\x04\x00\x10\x00\x00\x0e\x10");
    // Of code that the linker dropped, of no code, of none at all.
    frames.entry(common, 0, 100, b"");
    frames.entry(common, CODE + 40, 0, b"");
    frames.entry(common, CODE + 50, u64::MAX, b"\x44\x0e\x30");
    let table = table(&frames, Rows::Full);
    let rows: Vec<(u64, Rule)> = table.rows.iter().map(|row| ((row >> 32) + BASE - CODE, Rule(*row as u32))).collect();
    let expected = [(0, sp(8)), (15, sp(16)), (16, NO_ENTRY), (50, sp(8)), (54, sp(48)), (200, sp(8)), (256, NO_ENTRY)];
    assert_eq!(rows, expected);
}

/// Of entries that cover the same code the one that begins later is believed, and of two with the same start the first.
#[test]
fn contradictory_entries() {
    let mut frames = Frames::default();
    let common = frames.common("zR", USUAL);
    frames.entry(common, CODE + 100, 50, b"\x0e\x20");
    frames.entry(common, CODE, 120, b"\x0e\x10");
    frames.entry(common, CODE + 100, 60, b"\x0e\x30");
    frames.entry(common, CODE + 10, 10, b"\x0e\x40");
    let table = table(&frames, Rows::Full);
    let found = [0, 10, 20, 100, 149, 150].map(|offset| at(&table, offset));
    let expected = [sp(16), sp(64), NO_ENTRY, sp(32), sp(32), NO_ENTRY];
    assert_eq!(found, expected.map(Some));
}

/// Only rows with the last byte of a call are kept, and neighbours become one; a call at the very end of a row belongs to it.
#[test]
fn only_ends_of_calls() {
    let mut code = [0x90; 256];
    // A call that ends with the row of 16 at 8; a system call in the one of 32; another in the last row.
    code[3..8].copy_from_slice(b"\xe8\0\0\0\0");
    code[18..20].copy_from_slice(b"\x0f\x05");
    code[60..62].copy_from_slice(b"\xff\xd0");
    // A call in no entry, and what looks like one but leads out of the code.
    code[100..106].copy_from_slice(b"\xff\x15\0\0\0\0");
    code[40..45].copy_from_slice(b"\xe8\0\0\0\x70");
    let frames = Frames::one(b"\x42\x0e\x10\x46\x0e\x18\x48\x0e\x20\x54\x0e\x28\x54\x0e\x20");
    let full = table_of(&code, &frames, Rows::Full);
    assert_eq!(full.rows.len(), 7);
    let compact = table_of(&code, &frames, Rows::CallEnds);
    let rules: Vec<Rule> = compact.rows.iter().map(|&row| Rule(row as u32)).collect();
    assert_eq!(rules, [sp(16), sp(32), NO_ENTRY]);
    for end in [8, 20, 62, 106] {
        assert_eq!(at(&compact, end - 1), at(&full, end - 1), "call that ends at {end}");
    }
    assert!((compact.stats.raw_rows, compact.stats.all_rows, compact.full) == (6, 7, false));
    assert_eq!(at(&compact, 0), None);
}

/// Each form of an indirect call is found with its true end.
#[test]
fn forms_of_calls() {
    let forms: [&[u8]; 10] = [
        b"\xff\xd0",
        b"\x41\xff\xd3",
        b"\xff\x10",
        b"\xff\x50\x08",
        b"\xff\x90\0\x01\0\0",
        b"\xff\x15\0\x01\0\0",
        b"\xff\x14\x25\0\x01\0\0",
        b"\x42\xff\x14\xc5\0\0\0\0",
        b"\xff\x54\x24\x08",
        b"\x3e\xff\x94\x24\0\x01\0\0",
    ];
    for form in forms {
        let mut code = [0x90; 256];
        code[10..10 + form.len()].copy_from_slice(form);
        let end = 10 + form.len();
        let decoded = iced_x86::Decoder::new(64, form, 0).decode();
        assert_eq!((decoded.flow_control(), decoded.len()), (iced_x86::FlowControl::IndirectCall, form.len()));
        // A row for the last byte alone.
        let around = [0x40 | (end as u8 - 1), 0x0e, 0x10, 0x41, 0x0e, 0x18];
        let table = table_of(&code, &Frames::one(&around), Rows::CallEnds);
        assert_eq!(table.rows.len(), 1, "{form:02x?}");
        assert_eq!(at(&table, end as u64 - 1), Some(sp(16)));
    }
}

/// Calls are found wherever the code is cut into pieces for reading.
#[test]
fn calls_across_pieces() {
    const LEN: usize = (256 << 10) + 64;
    for at_end in 0..10 {
        let mut code = vec![0x90; LEN];
        let end = (256 << 10) - 1 + at_end;
        code[end - 7..end].copy_from_slice(b"\xff\x14\x25\0\x01\0\0");
        let mut frames = Frames::default();
        let common = frames.common("zR", USUAL);
        frames.entry(common, CODE, end as u64 - 1, b"");
        frames.entry(common, CODE + end as u64 - 1, 1, b"\x0e\x10");
        let table = table_of(&code, &frames, Rows::CallEnds);
        assert_eq!(table.rows.len(), 1, "a call that ends at {end}");
    }
}

/// Without section headers the search table says where the entries are; and these end with a length of zero.
#[test]
fn stripped_section_headers() {
    let mut frames = Frames::one(b"\x0e\x10");
    frames.0.extend_from_slice(&[0; 4]);
    let elf = Elf { stripped: true, ..Elf::new(&[0x90; 256], &frames.0) };
    let table = Table::of_bytes(&elf.bytes(), Rows::Full).expect("a table");
    assert_eq!((at(&table, 0), at(&table, 64)), (Some(sp(16)), Some(NO_ENTRY)));
}

/// Entries of `.debug_frame`, which refer to what they have in common by its place in the section.
fn debug_frame() -> Vec<u8> {
    let mut section = Vec::new();
    let mut add = |mut body: Vec<u8>| {
        body.resize(body.len().next_multiple_of(8) + 4, 0);
        section.extend_from_slice(&(body.len() as u32).to_le_bytes());
        section.extend_from_slice(&body);
    };
    add([b"\xff\xff\xff\xff\x04\0\x08\0\x01\x78\x10", USUAL].concat());
    add([&[0; 4][..], &CODE.to_le_bytes(), &64_u64.to_le_bytes(), b"\x0e\x30"].concat());
    section
}

/// `.debug_frame` is read where there is nothing better, also compressed, and never against `.eh_frame`.
#[test]
fn debug_frames() {
    let plain = debug_frame();
    let with = |sections| {
        let elf = Elf { sections, ..Elf::new(&[0x90; 256], b"") };
        Table::of_bytes(&elf.bytes(), Rows::Full)
    };
    let section = |flags, bytes| vec![Section { name: ".debug_frame", flags, bytes }];
    assert_eq!(at(&with(section(0, &plain)).expect("a table"), 0), Some(sp(48)));

    // Stored, not squeezed: a zlib stream of one literal block (RFC 1950, 1951), with its checksum.
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in &plain {
        a = (a + u32::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    let len = plain.len() as u16;
    let stream =
        [b"\x78\x01\x01", &len.to_le_bytes()[..], &(!len).to_le_bytes(), &plain, &(b << 16 | a).to_be_bytes()].concat();
    let compressed = |kind: u32, size: u64| {
        [&kind.to_le_bytes()[..], &[0; 4], &size.to_le_bytes(), &1_u64.to_le_bytes(), &stream].concat()
    };
    let good = compressed(1, plain.len() as u64);
    assert_eq!(at(&with(section(0x800, &good)).expect("a table"), 0), Some(sp(48)));
    let huge = compressed(1, 1 << 50);
    assert_eq!(with(section(0x800, &huge)).expect_err("a petabyte"), Why::TooLarge("unwind information"));
    let unknown = compressed(77, plain.len() as u64);
    assert_eq!(with(section(0x800, &unknown)).expect_err("no such kind"), Why::Malformed("unwind information"));

    let better = Frames::one(b"\x0e\x10");
    let both = vec![
        Section { name: ".debug_frame", flags: 0, bytes: &plain },
        Section { name: ".eh_frame", flags: 2, bytes: &better.0 },
    ];
    assert_eq!(at(&with(both).expect("a table"), 0), Some(sp(16)));
}

/// What BOLT left of the old section is for code that the new one does not speak of.
#[test]
fn rewritten_programs() {
    let mut old = Frames::default();
    let common = old.common("zR", USUAL);
    old.entry(common, CODE + 8, 16, b"\x0e\x40");
    old.entry(common, CODE + 100, 16, b"\x0e\x50");
    let new = Frames::one(b"\x0e\x10");
    let sections = vec![
        Section { name: ".bolt.org.eh_frame", flags: 2, bytes: &old.0 },
        Section { name: ".eh_frame", flags: 2, bytes: &new.0 },
    ];
    let elf = Elf { sections, ..Elf::new(&[0x90; 256], b"") };
    let table = Table::of_bytes(&elf.bytes(), Rows::Full).expect("a table");
    assert_eq!([at(&table, 8), at(&table, 100)], [Some(sp(16)), Some(sp(80))]);
}

/// Go by its note or its sections: frame pointers. Anything else without unwind information: a reason.
#[test]
fn without_unwind_information() {
    let read = |elf: &Elf| Table::of_bytes(&elf.bytes(), Rows::CallEnds).expect("a table");
    let bare = read(&Elf { sections: Vec::new(), ..Elf::new(&[0x90; 16], b"") });
    assert_eq!((bare.frame_pointers, bare.missing()), (false, Some("no unwind information")));
    // Frame pointers are believed in where most of the functions that are called have them, and only without unwind information.
    let functions = [with_pointer(), with_pointer(), without_pointer()].concat();
    let image = |starts: [usize; 3], eh_frame: bool| {
        let code = calls(starts, &functions);
        let sections = if eh_frame { Elf::new(&[], b"\0\0\0\0").sections } else { Vec::new() };
        let table = read(&Elf { sections, ..Elf::new(&code, b"") });
        (table.frame_pointers, table.missing())
    };
    assert_eq!(image([0, 16, 32], false), (true, Some("no unwind information, but frame pointers")));
    assert_eq!(image([0, 32, 32], false), (false, Some("no unwind information")), "half of them are not most");
    assert_eq!(image([32, 32, 32], false), (false, Some("no unwind information")));
    assert_eq!(image([0, 16, 32], true), (false, Some("no unwind information")));
    let go = Elf { sections: Vec::new(), note: Some(("Go", 4, b"id")), ..Elf::new(&[0x90; 16], b"") };
    assert!(read(&go).frame_pointers);
    let sections = vec![Section { name: ".gopclntab", flags: 2, bytes: b"x" }];
    assert!(read(&Elf { sections, ..Elf::new(&[0x90; 16], b"") }).frame_pointers);
    let stripped = Elf { stripped: true, ..go };
    assert!(read(&stripped).frame_pointers);
    let gnu = Elf { note: Some(("GNU", 3, b"0123456789abcdef")), ..Elf::new(&[0x90; 16], b"") };
    assert_eq!(read(&gnu).build_id.as_deref(), Some(&b"0123456789abcdef"[..]));
}

/// A function of 16 bytes: endbr64; push rbp; mov rax, rdi; mov rbp, rsp; pop rbp; ret.
fn with_pointer() -> Vec<u8> {
    let mut code = b"\xf3\x0f\x1e\xfa\x55\x48\x89\xf8\x48\x89\xe5\x5d\xc3".to_vec();
    code.resize(16, 0xcc);
    code
}

/// A function of 32 bytes: push rbx; pop rbx; ret.
fn without_pointer() -> Vec<u8> {
    let mut code = b"\x53\x5b\xc3".to_vec();
    code.resize(32, 0xcc);
    code
}

/// Calls to offsets in the functions behind them.
fn calls(starts: [usize; 3], functions: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    for start in starts {
        let distance = (15 + start - (code.len() + 5)) as u32;
        code.push(0xe8);
        code.extend_from_slice(&distance.to_le_bytes());
    }
    code.extend_from_slice(functions);
    code
}

/// Where a file is mapped gives what is taken off an address; a mapping of no code gives nothing.
#[test]
fn bias_of_mappings() {
    let table = table(&Frames::one(b""), Rows::Full);
    assert_eq!(table.bias_for(0x7000_1000, CODE_OFFSET), Some(0x7000_0000));
    assert_eq!(table.bias_for(0x10_0000_0000, 0x5000), None);
    // Where pages are larger the mapping begins before the segment.
    assert_eq!(table.bias_for(0x7000_0000, 0), Some(0x7000_0000));
    // A segment that begins in the middle of a page, as lld lays them out.
    let mut bytes = Elf::new(&[0x90; 0x3000], b"").bytes();
    let header = 64 + 56;
    bytes[header + 8..header + 16].copy_from_slice(&(CODE_OFFSET + 0x123).to_le_bytes());
    bytes[header + 16..header + 24].copy_from_slice(&(CODE + 0x2123).to_le_bytes());
    let table = Table::of_bytes(&bytes, Rows::Full).expect("a table");
    assert_eq!(table.bias_for(0x7000_3000, CODE_OFFSET), Some(0x7000_0000));
    assert_eq!(table.bias_for(0x7000_4000, CODE_OFFSET + 0x1000), Some(0x7000_0000));
    // One that begins so far into the file that no page holds the beginning of both.
    bytes[header + 8..header + 16].copy_from_slice(&0x1_2000_u64.to_le_bytes());
    let table = Table::of_bytes(&bytes, Rows::Full).expect("a table");
    assert_eq!(table.bias_for(0x10_0000_0000, 0), None);
    assert!(table.bias_for(0x10_0000_0000, 0x1_0000).is_some());
}

/// Where in a file the field of a program or section header is that says how large something is.
fn claim(mut bytes: Vec<u8>, at: usize, value: u64) -> Vec<u8> {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// A file that claims to be larger than it is, and one that is: a terabyte of nothing.
#[test]
fn terabytes() {
    let frames = Frames::one(b"");
    let bytes = Elf::new(&[0x90; 256], &frames.0).bytes();
    let segment = 64 + 56 + 32;
    let sections = u64::from_le_bytes(bytes[40..48].try_into().expect("eight bytes")) as usize;
    let section = sections + 64 + 32;
    let read = |bytes: &[u8]| Table::of_bytes(bytes, Rows::CallEnds).map(|table| table.rows.len());
    assert_eq!(read(&bytes), Ok(0));
    for (at, size, expected) in [
        (segment, 1 << 40, Why::Malformed("code outside the file")),
        (segment, u64::MAX, Why::Malformed("code outside the file")),
        (section, 1 << 40, Why::TooLarge("unwind information")),
        (section, 1 << 24, Why::Malformed("unwind information")),
    ] {
        let claims = claim(bytes.clone(), at, size);
        assert_eq!(read(&claims), Err(expected), "{size:#x} at {at:#x}");
    }
    for (at, size, expected) in [
        (segment, 1 << 40, Why::TooLarge("address space")),
        (segment, 3 << 30, Why::TooLarge("code")),
        (section, 1 << 40, Why::TooLarge("unwind information")),
    ] {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&claim(bytes.clone(), at, size)).expect("room");
        file.set_len(2 << 40).expect("a sparse file");
        assert_eq!(Table::of_file(&file, Rows::CallEnds).map(|t| t.rows.len()), Err(expected));
    }
}

/// A file that is cut short between two reads is an error, not the end of this program.
#[test]
fn cut_short_while_it_is_read() {
    let frames = Frames::one(b"");
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(&Elf::new(&[0x90; 256], &frames.0).bytes()).expect("room");
    let cache = ReadCache::new(&file);
    let image = Image::open(Data::File(&cache, &file)).expect("an image");
    file.set_len(CODE_OFFSET + 10).expect("it can be cut");
    assert!(matches!(Table::of_image(&image, Rows::CallEnds), Err(Why::Unreadable(_))));
}

/// Files of other kinds say what they are.
#[test]
fn other_files() {
    let read = |bytes: &[u8]| Table::of_bytes(bytes, Rows::Full).map(|t| t.rows.len());
    assert_eq!(read(b"#!/bin/sh\nexit\n"), Err(Why::NotElf));
    assert_eq!(read(b""), Err(Why::NotElf));
    let mut bytes = Elf::new(&[0x90; 16], b"").bytes();
    bytes[18] = 183;
    assert_eq!(read(&bytes), Err(Why::OtherMachine));
    bytes[4] = 1;
    assert_eq!(read(&bytes), Err(Why::OtherMachine));
    let null = File::open("/dev/null").expect("it is there");
    assert_eq!(Table::of_file(&null, Rows::Full).map(|t| t.rows.len()), Err(Why::NotElf));
}

/// What must hold of any table.
fn is_sound(table: &Table) {
    assert!(table.rows.is_sorted_by(|a, b| a >> 32 < b >> 32), "rows ascend");
    assert!(table.rows.is_sorted_by(|a, b| *a as u32 != *b as u32), "neighbours differ");
}

/// Any bytes as a file, read in both ways.
fn read_any(bytes: &[u8]) {
    let full = Table::of_bytes(bytes, Rows::Full);
    let compact = Table::of_bytes(bytes, Rows::CallEnds);
    match (full, compact) {
        (Ok(full), Ok(compact)) => {
            is_sound(&full);
            is_sound(&compact);
            assert!(compact.rows.len() <= full.rows.len());
            for &row in &compact.rows {
                assert_eq!(lookup(&full.rows, (row >> 32) as u32), Some(Rule(row as u32)));
            }
        }
        (full, compact) => assert_eq!(full.map(|_| ()), compact.map(|_| ())),
    }
}

/// A real `.eh_frame`, of the C library, not too long.
fn real_frames() -> Vec<u8> {
    use object::{Object, ObjectSection};
    let file = std::fs::read(super::real::libc()).expect("the C library");
    let elf = object::File::parse(&*file).expect("an ELF file");
    let section = elf.section_by_name(".eh_frame").expect("it has one").data().expect("it is there");
    section[..8192].to_vec()
}

proptest! {
    /// Any bytes as unwind information give a table, sound and the same in both ways.
    #[test]
    fn total_on_arbitrary_frames(frames in proptest::collection::vec(any::<u8>(), 0..512)) {
        read_any(&Elf::new(&[0xe8; 256], &frames).bytes());
    }

    /// The same for any instructions in an entry.
    #[test]
    fn total_on_arbitrary_instructions(
        common in proptest::collection::vec(any::<u8>(), 0..32),
        entry in proptest::collection::vec(any::<u8>(), 0..128),
        code in proptest::collection::vec(any::<u8>(), 256),
    ) {
        let mut frames = Frames::default();
        let at = frames.common("zR", &common);
        frames.entry(at, CODE, 200, &entry);
        frames.entry(at, CODE + 100, 50, &entry);
        read_any(&Elf::new(&code, &frames.0).bytes());
    }

    /// The same for a real section with some bytes changed, cut off somewhere.
    #[test]
    fn total_on_changed_real_frames(
        changes in proptest::collection::vec((0_usize..8192, any::<u8>()), 0..16),
        len in 0_usize..8192,
    ) {
        use std::sync::LazyLock;
        static REAL: LazyLock<Vec<u8>> = LazyLock::new(real_frames);
        // Entries are relative to themselves: code all over the place, so that some fall into it.
        let mut frames = REAL.clone();
        for (at, byte) in changes {
            frames[at] = byte;
        }
        frames.truncate(len);
        read_any(&Elf::new(&vec![0xe8; 0x10_0000], &frames).bytes());
    }

    /// The same for a file with some bytes of its headers changed.
    #[test]
    fn total_on_changed_headers(changes in proptest::collection::vec((0_usize..1024, any::<u8>()), 1..8)) {
        let frames = Frames::one(b"\x44\x0e\x10");
        let mut bytes = Elf { note: Some(("GNU", 3, b"id")), ..Elf::new(&[0xe8; 256], &frames.0) }.bytes();
        let sections = u64::from_le_bytes(bytes[40..48].try_into().expect("eight bytes")) as usize;
        for (at, byte) in changes {
            // Headers of segments, and of sections.
            let at = if at < 512 { at } else { sections + at - 512 };
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        read_any(&bytes);
    }
}

//! Code that comes, goes, moves, or has no unwind tables to speak of, while it is traced.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{Fixture, Program, host, stacks, summary};

use super::traced::{FIRST_SIZE, Traced, c_fixture};
use super::truth::Expected;

/// A library in a folder of its own, compiled from plugin.c.
fn plugin(variant: u32, flags: &[&str]) -> Result<PathBuf> {
    let program = Program::c("plugin").without_frame_pointers().library().flag(&format!("-DVARIANT={variant}"));
    flags.iter().fold(program, |program, flag| program.flag(flag)).build()
}

fn code_fixture() -> Result<PathBuf> {
    Program::c("stacks_code").without_frame_pointers().flag("-rdynamic").build()
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

/// Libraries that are loaded, unloaded and replaced by another at the same address while they are traced.
#[test]
fn libraries_that_come_and_go() -> Result<()> {
    if !host::can_trace("libraries_that_come_and_go") {
        return Ok(());
    }
    let (one, two) = (plugin(1, &[])?, plugin(2, &[])?);
    let mut traced = Traced::start(&code_fixture()?, "auto")?;
    let mut places = Vec::new();
    for _ in 0..2 {
        for library in [&one, &two] {
            places.push(traced.fixture.tell(&format!("load {}", text(library)?))?);
            traced.take_until_whole("plugin")?;
            traced.fixture.tell("unload")?;
        }
    }
    // The two functions begin at different offsets; the same library lands where it was before.
    ensure!(places[0] == places[2] && places[1] == places[3], "{places:?}");
    traced.finish()?;
    Ok(())
}

/// A library's constructor, which runs before its tables can be there.
#[test]
fn a_library_that_allocates_while_it_is_loaded() -> Result<()> {
    if !host::can_trace("a_library_that_allocates_while_it_is_loaded") {
        return Ok(());
    }
    let library = plugin(1, &["-DCONSTRUCTOR"])?;
    let mut traced = Traced::start(&code_fixture()?, "auto")?;
    let command = format!("load {} {}", text(&library)?, traced.next_size);
    traced.ask("constructor", &command, Expected::WholeOrMarked)?;
    traced.take_until_whole("plugin")?;
    traced.finish()?;
    Ok(())
}

/// Code that is mapped a second time, mapped over another's, put into anonymous memory, or generated: whole or marked, and whole
/// where the file or frame pointers tell.
#[test]
fn code_that_moves() -> Result<()> {
    if !host::can_trace("code_that_moves") {
        return Ok(());
    }
    let (one, two) = (plugin(1, &[])?, plugin(2, &[])?);
    let mut traced = Traced::start(&code_fixture()?, "auto")?;
    traced.fixture.tell(&format!("load {}", text(&one)?))?;
    traced.take_until_whole("plugin")?;
    traced.fixture.tell("copy")?;
    traced.take_until_whole("known")?;
    traced.fixture.tell(&format!("load {}", text(&two)?))?;
    traced.take_until_whole("plugin")?;
    traced.fixture.tell("over")?;
    traced.take_until_whole("known")?;
    traced.fixture.tell("generate")?;
    traced.take_until_whole("known")?;
    traced.fixture.tell("anonymise")?;
    // Its frames are gone from all tables, and it has no frame pointers.
    traced.fixture.tell(&format!("load {}", text(&two)?))?;
    for _ in 0..3 {
        traced.take("known", "", Expected::WholeOrMarked)?;
    }
    traced.finish()?;
    Ok(())
}

/// Where a section is in a file: offset and bytes.
fn section(file: &Path, name: &str) -> Result<(usize, usize)> {
    let output = Command::new("readelf").arg("-SW").arg(file).output().context("failed to start readelf")?;
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    // "[ 9] .eh_frame PROGBITS ADDRESS OFFSET SIZE ..."
    let prefix = format!("{name} ");
    let line = listing.lines().find_map(|line| line.split_once(']')?.1.trim().strip_prefix(&prefix).map(str::to_owned));
    let line = line.with_context(|| format!("no {name} in {}", file.display()))?;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let hex = |field: &str| usize::from_str_radix(field, 16).with_context(|| format!("failed to read {field:?}"));
    Ok((hex(fields[2])?, hex(fields[3])?))
}

/// The part of an ELF file's header that tells where its section headers are (ELF-64: `e_shoff`, `e_shnum`, `e_shstrndx`).
const SECTION_HEADERS: usize = 0x28;
const SECTION_COUNT: usize = 0x3c;
const SECTION_BYTES: usize = 64;
/// Of a section header: `sh_offset` and `sh_size`.
const SECTION_OFFSET: usize = 0x18;
const SECTION_SIZE: usize = 0x20;

/// A copy of a library that `damage` has changed; it is told where in the file the unwind tables are.
fn damaged(library: &Path, folder: &Path, name: &str, damage: impl Fn(&mut [u8], Range<usize>)) -> Result<PathBuf> {
    let (offset, length) = section(library, ".eh_frame")?;
    let mut bytes = fs::read(library)?;
    ensure!(length > 64 && offset + length <= bytes.len(), "{name}: {length} bytes of tables at {offset}");
    damage(&mut bytes, offset..offset + length);
    let copy = folder.join(name);
    fs::write(&copy, bytes)?;
    Ok(copy)
}

/// The library's unwind section claims four terabytes; the loader does not look at section headers.
fn claim_terabytes(bytes: &mut [u8], tables: Range<usize>) {
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("it is in the file"));
    let first = number(bytes, SECTION_HEADERS) as usize;
    let count = usize::from(u16::from_le_bytes(*bytes[SECTION_COUNT..].first_chunk().expect("it is in the file")));
    for header in (0..count).map(|index| first + index * SECTION_BYTES) {
        if number(bytes, header + SECTION_OFFSET) == tables.start as u64 {
            bytes[header + SECTION_SIZE..][..8].copy_from_slice(&(1_u64 << 42).to_le_bytes());
        }
    }
}

fn make_noise(bytes: &mut [u8]) {
    let mut random = 88_172_645_463_325_252_u64;
    for byte in bytes {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        *byte = random as u8;
    }
}

/// Loads `same` until it is known what the stacks are, then `library`, which has the same code.
fn load_after(traced: &mut Traced, same: &Path, library: &Path) -> Result<()> {
    traced.fixture.tell(&format!("load {}", text(same)?))?;
    traced.take_until_whole("plugin")?;
    traced.fixture.tell("unload")?;
    traced.fixture.tell(&format!("load {}", text(library)?))?;
    Ok(())
}

/// Without unwind tables.
const NONE: [&str; 3] = ["-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-Wl,--no-eh-frame-hdr"];

/// Code without unwind tables, with and without frame pointers, and code whose tables are nonsense: whole or marked, and nothing falls.
#[test]
fn code_without_tables() -> Result<()> {
    if !host::can_trace("code_without_tables") || host::program("code_without_tables", "readelf").is_none() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let whole = plugin(1, &[])?;
    let damage = |name: &str, damage: &dyn Fn(&mut [u8], Range<usize>)| damaged(&whole, folder.path(), name, damage);
    let libraries = [
        plugin(1, &[&NONE[..], &["-g0"]].concat())?,
        damage("zero", &|bytes, tables| bytes[tables].fill(0))?,
        damage("noise", &|bytes, tables| make_noise(&mut bytes[tables]))?,
        damage("cut", &|bytes, tables| bytes[tables.start + 40..tables.end].fill(0xff))?,
        // The first entry is longer than the section.
        damage("long", &|bytes, tables| bytes[tables][..4].copy_from_slice(&0x7fff_fff0_u32.to_le_bytes()))?,
        damage("terabytes", &claim_terabytes)?,
    ];
    let pointers = ["-UNO_FRAME_POINTER", "-fno-omit-frame-pointer"];
    let with_pointers = plugin(1, &pointers)?;
    let pointers_only = plugin(1, &[&pointers[..], &NONE, &["-g0"]].concat())?;
    // Without the compiler's start files, whose tables would be the file's.
    let bare = plugin(1, &[&NONE[..], &["-g0", "-nostdlib"]].concat())?;
    let libraries = libraries.into_iter().chain([bare]);
    let libraries = libraries.map(|library| (&whole, library)).chain([(&with_pointers, pointers_only)]);
    let mut traced = Traced::start(&code_fixture()?, "auto")?;
    for (same, library) in libraries {
        load_after(&mut traced, same, &library)?;
        for _ in 0..3 {
            traced.is_seen_whole("known", Expected::WholeOrMarked)?;
        }
        traced.fixture.tell("unload")?;
    }
    traced.finish()?;
    Ok(())
}

/// A file without any unwind information: whole by its frame pointers, and marked as such. Without those the stack ends there.
#[test]
fn code_without_tables_but_frame_pointers() -> Result<()> {
    if !host::can_trace("code_without_tables_but_frame_pointers") {
        return Ok(());
    }
    let pointers = ["-UNO_FRAME_POINTER", "-fno-omit-frame-pointer"];
    let bare = [&NONE[..], &["-g0", "-nostdlib"]].concat();
    let by_pointers = plugin(1, &[&pointers[..], &bare].concat())?;
    let mut traced = Traced::start(&code_fixture()?, "auto")?;
    load_after(&mut traced, &plugin(1, &pointers)?, &by_pointers)?;
    traced.take_until_whole("known")?;
    traced.fixture.tell("unload")?;
    load_after(&mut traced, &plugin(1, &[])?, &plugin(1, &bare)?)?;
    for _ in 0..3 {
        ensure!(!traced.is_seen_whole("known", Expected::WholeOrMarked)?, "whole without tables and frame pointers");
    }
    let report = traced.finish()?;
    // All other code has tables.
    let by_pointers = stacks(&report).any(|stack| {
        let large = stack["allocated_bytes"].as_u64() >= Some(FIRST_SIZE);
        large && stack["complete"] == true && stack["by_frame_pointers"] == true
    });
    ensure!(by_pointers, "{}", summary(&report));
    Ok(())
}

/// Where something else than the section `.eh_frame` tells: the debugger's tables, also compressed, or the program headers of a file
/// without section headers.
#[test]
fn code_with_other_tables() -> Result<()> {
    if !host::can_trace("code_with_other_tables") || host::program("code_with_other_tables", "readelf").is_none() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let whole = plugin(1, &[])?;
    let no_sections = damaged(&whole, folder.path(), "no_sections", |bytes, _| {
        bytes[SECTION_HEADERS..][..8].fill(0);
        bytes[SECTION_COUNT..][..4].fill(0);
    })?;
    // Without the compiler's start files, which have tables of their own.
    let debug_frame = [&NONE[..], &["-nostdlib"]].concat();
    let compressed = [&debug_frame[..], &["-gz=zlib"]].concat();
    let libraries = [no_sections, plugin(1, &debug_frame)?, plugin(1, &compressed)?];
    let mut traced = Traced::start(&code_fixture()?, "auto")?;
    for library in libraries {
        load_after(&mut traced, &whole, &library)?;
        traced.take_until_whole("known").with_context(|| library.display().to_string())?;
        traced.fixture.tell("unload")?;
    }
    traced.finish()?;
    Ok(())
}

/// A program whose file is replaced by another, or deleted, while it runs.
#[test]
fn a_file_that_is_replaced_or_deleted() -> Result<()> {
    if !host::can_trace("a_file_that_is_replaced_or_deleted") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    for replaced in [true, false] {
        let program = folder.path().join("program");
        fs::copy(c_fixture().build()?, &program)?;
        let fixture = Fixture::builder(&program).start()?;
        fs::remove_file(&program)?;
        if replaced {
            fs::copy(plugin(2, &[])?, &program)?;
        }
        let mut traced = Traced::with(fixture, "auto")?;
        for scenario in ["plain", "realign", "thread"] {
            traced.take(scenario, "", Expected::Whole)?;
        }
        // Rows for every instruction are read from the file only now.
        for scenario in ["fault", "handler"] {
            traced.take_until_whole(scenario).context(scenario)?;
        }
        traced.finish()?;
    }
    Ok(())
}

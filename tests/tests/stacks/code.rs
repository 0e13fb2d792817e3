//! Code that comes, goes, moves, or has no unwind tables to speak of, while it is traced.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use leaktrace_tests::{Fixture, PATIENCE, Program, host};

use super::traced::{Traced, c_fixture, of_size};
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

/// Takes a scenario until a report has a whole stack of it: what is taken before its tables are there is marked.
fn take_until_whole(traced: &mut Traced, scenario: &str) -> Result<()> {
    for _ in 0..100 {
        let size = traced.take(scenario, "", Expected::WholeOrMarked)?;
        let report = traced.session.next_report(|report| of_size(report, size).is_some(), PATIENCE)?;
        if of_size(&report, size).is_some_and(|stack| stack["complete"] == true) {
            traced.take(scenario, "", Expected::Whole)?;
            return Ok(());
        }
    }
    bail!("the stacks of {scenario} stay marked")
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
            // At once, and again when it is known.
            traced.take("plugin", "", Expected::WholeOrMarked)?;
            take_until_whole(&mut traced, "plugin")?;
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
    take_until_whole(&mut traced, "plugin")?;
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
    take_until_whole(&mut traced, "plugin")?;
    traced.fixture.tell("copy")?;
    take_until_whole(&mut traced, "known")?;
    traced.fixture.tell(&format!("load {}", text(&two)?))?;
    take_until_whole(&mut traced, "plugin")?;
    traced.fixture.tell("over")?;
    take_until_whole(&mut traced, "known")?;
    traced.fixture.tell("generate")?;
    take_until_whole(&mut traced, "known")?;
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
    let line = listing.lines().find_map(|line| line.split_once(']')?.1.trim().strip_prefix(&format!("{name} ")));
    let fields: Vec<&str> =
        line.with_context(|| format!("no {name} in {}", file.display()))?.split_whitespace().collect();
    let hex = |field: &str| usize::from_str_radix(field, 16).with_context(|| format!("failed to read {field:?}"));
    Ok((hex(fields[2])?, hex(fields[3])?))
}

/// A copy of a library whose unwind tables are damaged by `damage`.
fn damaged(library: &Path, folder: &Path, name: &str, damage: impl Fn(&mut [u8])) -> Result<PathBuf> {
    let (offset, length) = section(library, ".eh_frame")?;
    let mut bytes = fs::read(library)?;
    damage(bytes.get_mut(offset..offset + length).context("the section is not in the file")?);
    let copy = folder.join(name);
    fs::write(&copy, bytes)?;
    Ok(copy)
}

/// Code without unwind tables, with and without frame pointers, and code whose tables are nonsense: whole or marked, and nothing falls.
#[test]
fn code_without_tables() -> Result<()> {
    if !host::can_trace("code_without_tables") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let none = ["-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-Wl,--no-eh-frame-hdr"];
    let whole = plugin(1, &[])?;
    let zero = damaged(&whole, folder.path(), "zero", |bytes| bytes.fill(0))?;
    let noise = damaged(&whole, folder.path(), "noise", |bytes| {
        let mut random = 88_172_645_463_325_252_u64;
        for byte in bytes {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *byte = random as u8;
        }
    })?;
    // The first entry claims to be longer than the section.
    let long =
        damaged(&whole, folder.path(), "long", |bytes| bytes[..4].copy_from_slice(&0x7fff_fff0_u32.to_le_bytes()))?;
    let mut traced = Traced::start(&code_fixture()?, "auto")?;
    for (library, same) in [(plugin(1, &none)?, &whole), (zero, &whole), (noise, &whole), (long, &whole)] {
        traced.fixture.tell(&format!("load {}", text(same)?))?;
        take_until_whole(&mut traced, "plugin")?;
        traced.fixture.tell("unload")?;
        traced.fixture.tell(&format!("load {}", text(&library)?))?;
        for _ in 0..3 {
            let size = traced.take("known", "", Expected::WholeOrMarked)?;
            traced.session.next_report(|report| of_size(report, size).is_some(), PATIENCE)?;
        }
        traced.fixture.tell("unload")?;
    }
    // With frame pointers the code can be followed all the same.
    let pointers = ["-UNO_FRAME_POINTER", "-fno-omit-frame-pointer"];
    let (same, without) = (plugin(1, &pointers)?, plugin(1, &[&pointers[..], &none[..]].concat())?);
    traced.fixture.tell(&format!("load {}", text(&same)?))?;
    take_until_whole(&mut traced, "plugin")?;
    traced.fixture.tell("unload")?;
    traced.fixture.tell(&format!("load {}", text(&without)?))?;
    take_until_whole(&mut traced, "known")?;
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
        for scenario in ["plain", "realign", "thread", "handler"] {
            traced.take(scenario, "", Expected::Whole)?;
        }
        traced.finish()?;
    }
    Ok(())
}

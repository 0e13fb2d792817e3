//! Every allocator, linked, preloaded and static: found by itself, and counted to the byte, compared with what the fixture knows of
//! itself; and what is said where an allocator has to be named.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{
    Fixture, Leaktrace, PATIENCE, Program, Session, has_frame, host, live_in, live_of, site, stacks, summary,
};
use serde_json::Value;

/// How a fixture comes by its allocator.
struct Case {
    program: Program,
    preload: Option<PathBuf>,
    /// The family that the report must name, and how the name of its file ends.
    family: &'static str,
    file: &'static str,
}

impl Case {
    fn new(program: Program, family: &'static str, file: &'static str) -> Self {
        Self { program, preload: None, family, file }
    }

    fn preloaded(mut self, library: &Path) -> Self {
        self.preload = Some(library.to_owned());
        self
    }

    fn start(&self) -> Result<Fixture> {
        let mut builder = Fixture::builder(&self.program.build()?);
        if let Some(library) = &self.preload {
            builder = builder.env("LD_PRELOAD", library.to_str().context("a path that is not UTF-8")?);
        }
        builder.start()
    }

    /// Each function that allocates, resizes or frees, to the byte, under the function that called it.
    fn is_exact(&self) -> Result<()> {
        let mut fixture = self.start()?;
        let names = fixture.ask("names")?;
        let session = Session::start(&[fixture.pid()], &[])?;
        exercise(&mut fixture, &names)?;
        let truth = fixture.report()?;
        let report = session.stop()?;
        let told = || format!("{} {:?}\n{truth}\n{}", self.family, self.program.file_name(), summary(&report));
        ensure!(report["losses"] == serde_json::json!({}), "something was lost: {}", told());
        for function in truth["sites"].as_object().context("no sites")?.keys() {
            let (found, expected) = (live_in(&report, function), site(&truth, function));
            ensure!(found == expected, "{function}: {found:?}, not {expected:?}: {}", told());
            let stack = stacks(&report).find(|stack| has_frame(stack, function));
            ensure!(expected.1 == 0 || stack.is_some_and(|s| has_frame(s, "main")), "{function}: no stack: {}", told());
        }
        let all = (truth["live_bytes"].as_u64(), truth["live_count"].as_u64());
        let found = live_of(&report, fixture.pid());
        ensure!((Some(found.0), Some(found.1)) == all, "{found:?} in all, not {all:?}: {}", told());
        let allocators = &report["processes"][0]["allocators"];
        ensure!(is_among(allocators, self.family, self.file), "{} is not among {allocators}", self.family);
        Ok(())
    }
}

/// Whether the report's allocators have one of this family in a file whose path ends so.
fn is_among(allocators: &Value, family: &str, file: &str) -> bool {
    allocators.as_array().into_iter().flatten().any(|allocator| {
        let text = |key: &str| allocator[key].as_str().unwrap_or_default();
        text("family").starts_with(family) && text("path").contains(file)
    })
}

fn list<'a>(names: &'a Value, key: &str) -> Vec<&'a str> {
    names[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Uses everything that the fixture has, in such a way that something of each stays.
fn exercise(fixture: &mut Fixture, names: &Value) -> Result<()> {
    let (allocations, frees) = (list(names, "allocations"), list(names, "frees"));
    ensure!(!allocations.is_empty() && !frees.is_empty(), "{names}");
    for (i, via) in allocations.iter().enumerate() {
        fixture.tell(&format!("leak {via} {} {}", 10 + i, 64 * (1 + i % 15)))?;
    }
    for (i, via) in allocations.iter().enumerate() {
        // Aligned blocks of C++ go to aligned operators only; a sized free must be told the size as it was asked for.
        let aligned = via.contains("aligned") && !frees.contains(&"free");
        let fits = |how: &&&str| how.contains("aligned") == aligned;
        let how = frees.iter().find(fits).context("no function that frees")?;
        fixture.tell(&format!("release {via} {how} {}", 3 + i % 5))?;
    }
    for (i, how) in frees.iter().enumerate() {
        let aligned = how.contains("aligned") && !frees.contains(&"free");
        let via = allocations.iter().find(|via| via.contains("aligned") == aligned).context("nothing to free")?;
        fixture.tell(&format!("leak {via} 7 {}", 64 * (1 + i)))?;
        fixture.tell(&format!("release {via} {how} 6"))?;
    }
    for via in list(names, "resizes") {
        // Moved, in place, much larger and much smaller.
        for (from, to) in [(100, 5000), (5000, 90), (64, 70_000), (200_000, 100), (200, 210)] {
            fixture.tell(&format!("resize {via} 3 {from} {to}"))?;
        }
    }
    if allocations.contains(&"malloc") {
        fixture.tell("fail")?;
    }
    Ok(())
}

/// The fixture of C functions.
fn families() -> Program {
    Program::c("families")
}

/// All of an archive, so that it does not matter who refers to what.
fn whole(program: Program, archive: &str) -> Program {
    program.link("-Wl,--whole-archive").link(archive).link("-Wl,--no-whole-archive").link("-lstdc++").link("-lm")
}

/// glibc: as everywhere, and linked statically, where its functions are in the symbol table alone.
#[test]
fn glibc() -> Result<()> {
    if !host::can_trace("glibc") {
        return Ok(());
    }
    Case::new(families(), "glibc 2.", "libc").is_exact()?;
    Case::new(families().flag("-static"), "glibc", "families").is_exact()
}

/// musl, whose functions are in its dynamic linker, or in the program.
#[test]
fn musl() -> Result<()> {
    let test = "musl";
    let (Some(compiler), true) = (host::program(test, "musl-gcc"), host::can_trace(test)) else { return Ok(()) };
    let program = || families().with_compiler(&compiler);
    Case::new(program(), "musl", "musl").is_exact()?;
    Case::new(program().flag("-static"), "musl", "families").is_exact()
}

/// jemalloc with mallocx and the like: linked, preloaded, its archive in the program, and all of the program static.
#[test]
fn jemalloc() -> Result<()> {
    let test = "jemalloc";
    let (Some(library), true) = (host::library(test, "libjemalloc.so"), host::can_trace(test)) else { return Ok(()) };
    let own = || families().flag("-DFEW").flag("-DJEMALLOC");
    Case::new(own().link("-ljemalloc"), "jemalloc", "libjemalloc").is_exact()?;
    Case::new(families().flag("-DFEW"), "jemalloc", "libjemalloc").preloaded(&library).is_exact()?;
    // reallocarray is glibc's then, and calls jemalloc's realloc.
    Case::new(families(), "jemalloc", "libjemalloc").preloaded(&library).is_exact()?;
    Case::new(whole(own(), "-l:libjemalloc.a"), "jemalloc", "families").is_exact()?;
    Case::new(whole(own().flag("-static"), "-l:libjemalloc.a"), "jemalloc", "families").is_exact()
}

/// tcmalloc by its own names and by those of C: linked, preloaded and static.
#[test]
fn tcmalloc() -> Result<()> {
    let test = "tcmalloc";
    let library = host::library(test, "libtcmalloc_minimal.so");
    let (Some(library), true) = (library, host::can_trace(test)) else { return Ok(()) };
    let own = || families().flag("-DFEW").flag("-DTCMALLOC").flag("-DPREFIX=tc_");
    Case::new(own().link("-ltcmalloc_minimal"), "tcmalloc", "libtcmalloc").is_exact()?;
    Case::new(families().flag("-DFEW"), "tcmalloc", "libtcmalloc").preloaded(&library).is_exact()?;
    Case::new(whole(own().flag("-static"), "-l:libtcmalloc_minimal.a"), "tcmalloc", "families").is_exact()
}

/// mimalloc by its own names, heaps of its own included, and by those of C. Debian has no archive of it.
#[test]
fn mimalloc() -> Result<()> {
    let test = "mimalloc";
    let (Some(library), true) = (host::library(test, "libmimalloc.so"), host::can_trace(test)) else { return Ok(()) };
    let own = families().flag("-DMIMALLOC").flag("-DPREFIX=mi_").link("-lmimalloc");
    Case::new(own, "mimalloc", "libmimalloc").is_exact()?;
    Case::new(families().flag("-DFEW"), "mimalloc", "libmimalloc").preloaded(&library).is_exact()
}

/// Blocks that go with their heap are freed unseen, so what was live then is out of verdicts, which is said; what comes after is not.
#[test]
fn heaps_that_are_destroyed_are_no_leak() -> Result<()> {
    let test = "heaps_that_are_destroyed_are_no_leak";
    let (Some(_), true) = (host::library(test, "libmimalloc.so"), host::can_trace(test)) else { return Ok(()) };
    let program = families().flag("-DMIMALLOC").flag("-DPREFIX=mi_").link("-lmimalloc").build()?;
    let mut fixture = Fixture::builder(&program).start()?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("destroy 100 64")?;
    let distrusted = |report: &Value| report["losses"]["frees_lost"] == 1 && live_in(report, "destroy_heap") == (0, 0);
    session.next_report(distrusted, PATIENCE)?;
    fixture.tell("leak malloc 10 100")?;
    let report = session.stop()?;
    assert_eq!(live_in(&report, "leak_via_malloc"), (1000, 10), "{}", summary(&report));
    assert_eq!(live_of(&report, fixture.pid()), (1000, 10), "{}", summary(&report));
    Ok(())
}

/// The same for jemalloc's arenas, reset and destroyed by name and by numbers, by the ways of older kernels too; what else mallctl
/// is asked for costs nothing.
#[test]
fn arenas_that_are_destroyed_are_no_leak() -> Result<()> {
    let test = "arenas_that_are_destroyed_are_no_leak";
    let (Some(_), true) = (host::library(test, "libjemalloc.so"), host::can_trace(test)) else { return Ok(()) };
    let program = families().flag("-DFEW").flag("-DJEMALLOC").link("-ljemalloc").build()?;
    for without in [&[][..], &["--without", "session"], &["--without", "multi,loop"]] {
        let mut fixture = Fixture::builder(&program).start()?;
        let mut session = Session::start(&[fixture.pid()], without)?;
        fixture.tell("leak malloc 10 100")?;
        fixture.tell("purge")?;
        let counted = |report: &Value| live_in(report, "leak_via_malloc") == (1000, 10);
        let report = session.next_report(counted, PATIENCE)?;
        assert_eq!(report["losses"], serde_json::json!({}), "{without:?}: {}", summary(&report));
        for (done, how) in ["destroy", "reset", "destroy_mib", "reset_mib"].into_iter().enumerate() {
            fixture.tell(&format!("destroy 100 64 {how}"))?;
            let distrusted = |report: &Value| {
                report["losses"]["frees_lost"] == done + 1 && live_in(report, "destroy_arena") == (0, 0)
            };
            session.next_report(distrusted, PATIENCE).with_context(|| format!("{how}, {without:?}"))?;
        }
        fixture.tell("leak malloc 10 100")?;
        let report = session.stop()?;
        assert_eq!(live_in(&report, "leak_via_malloc"), (1000, 10), "{without:?}: {}", summary(&report));
    }
    Ok(())
}

/// Each variant of operator new and delete: of libstdc++, where they call malloc, and of allocators that have their own.
#[test]
fn operators() -> Result<()> {
    let test = "operators";
    if !host::can_trace(test) || host::program(test, "c++").is_none() {
        return Ok(());
    }
    let program = || Program::cpp("operators");
    Case::new(program(), "glibc 2.", "libc").is_exact()?;
    Case::new(program().flag("-static"), "glibc", "operators").is_exact()?;
    for (family, name, file) in [
        ("jemalloc", "libjemalloc.so", "libjemalloc"),
        ("tcmalloc", "libtcmalloc_minimal.so", "libtcmalloc"),
        ("mimalloc", "libmimalloc.so", "libmimalloc"),
    ] {
        let Some(library) = host::library(test, name) else { return Ok(()) };
        Case::new(program(), family, file).preloaded(&library).is_exact()?;
    }
    Ok(())
}

/// A function that only calls another is probed only there: libstdc++'s operator new in a static program is not, jemalloc's own is.
#[test]
fn operators_are_probed_where_they_allocate() -> Result<()> {
    let test = "operators_are_probed_where_they_allocate";
    if !host::can_trace(test) || host::program(test, "c++").is_none() {
        return Ok(());
    }
    let probed = |case: &Case| -> Result<bool> {
        let fixture = case.start()?;
        let report = Session::start(&[fixture.pid()], &[])?.stop()?;
        let allocators = report["processes"][0]["allocators"].as_array().context("no allocators")?;
        let functions = allocators.iter().flat_map(|allocator| allocator["functions"].as_array().into_iter().flatten());
        Ok(functions.filter_map(Value::as_str).any(|name| name.starts_with("operator new(")))
    };
    let program = || Program::cpp("operators");
    assert!(!probed(&Case::new(program().flag("-static"), "glibc", ""))?, "libstdc++'s calls malloc");
    let Some(library) = host::library(test, "libjemalloc.so") else { return Ok(()) };
    assert!(probed(&Case::new(program(), "jemalloc", "").preloaded(&library))?, "jemalloc's does not");
    Ok(())
}

/// Four allocators in one process at once, three of them opened after the trace began: each has its own account.
#[test]
fn several_at_once() -> Result<()> {
    let test = "several_at_once";
    let libraries =
        ["libjemalloc.so", "libtcmalloc_minimal.so", "libmimalloc.so"].map(|name| host::library(test, name));
    let ([Some(jemalloc), Some(tcmalloc), Some(mimalloc)], true) = (libraries, host::can_trace(test)) else {
        return Ok(());
    };
    let program = Program::c("several").build()?;
    let mut fixture = Fixture::builder(&program).env("LD_PRELOAD", jemalloc.to_str().context("a path")?).start()?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("leak 0 10 100")?;
    fixture.tell("open 1 libc.so.6")?;
    fixture.tell(&format!("open 2 {} tc_", tcmalloc.display()))?;
    fixture.tell(&format!("open 3 {} mi_", mimalloc.display()))?;
    let opened = |report: &Value| {
        let allocators = &report["processes"][0]["allocators"];
        ["glibc", "jemalloc", "tcmalloc", "mimalloc"].iter().all(|family| is_among(allocators, family, "lib"))
    };
    session.next_report(opened, PATIENCE)?;
    for round in 1..5 {
        for n in 0..4 {
            fixture.tell(&format!("leak {n} {} {}", 10 * round + n, 100 * n + 17))?;
            fixture.tell(&format!("release {n} {}", 3 * round))?;
        }
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    for n in 0..4 {
        let function = format!("leak_via_{n}");
        assert_eq!(live_in(&report, &function), site(&truth, &function), "{function}\n{}", summary(&report));
    }
    Ok(())
}

/// The fixture with functions that nobody would know, and the library apart: `own_malloc` and so on.
fn own_names() -> Program {
    Program::c("own_names")
}

/// An allocator under a name of its own is traced where it is named, and its blocks are told from those of malloc.
#[test]
fn named_by_its_prefix() -> Result<()> {
    if !host::can_trace("named_by_its_prefix") {
        return Ok(());
    }
    let program = own_names().build()?;
    let mut fixture = Fixture::builder(&program).start()?;
    let named = format!("{}:own_", program.display());
    let session = Session::start(&[fixture.pid()], &["--allocator", &named])?;
    fixture.tell("leak own 20 100")?;
    fixture.tell("leak libc 30 50")?;
    fixture.tell("release own 5")?;
    let truth = fixture.report()?;
    let report = session.stop()?;
    assert_eq!(report["losses"], serde_json::json!({}), "{}", summary(&report));
    assert_eq!(live_in(&report, "leak_via_own"), (1500, 15), "{}", summary(&report));
    for function in ["leak_via_own", "leak_via_libc"] {
        assert_eq!(live_in(&report, function), site(&truth, function), "{}", summary(&report));
    }
    let allocators = &report["processes"][0]["allocators"];
    assert!(is_among(allocators, "own_names", "own_names") && is_among(allocators, "glibc", "libc"), "{allocators}");
    Ok(())
}

/// Without the name only malloc's blocks are there: nobody takes any function that ends in malloc for one.
#[test]
fn not_found_without_being_named() -> Result<()> {
    if !host::can_trace("not_found_without_being_named") {
        return Ok(());
    }
    let mut fixture = Fixture::builder(&own_names().build()?).start()?;
    let session = Session::start(&[fixture.pid()], &["--resource", "heap"])?;
    fixture.tell("leak own 20 100")?;
    fixture.tell("leak libc 30 50")?;
    let report = session.stop()?;
    assert_eq!(live_of(&report, fixture.pid()), (1500, 30), "{}", summary(&report));
    Ok(())
}

/// A name that leads to nothing is refused with what was looked for: a file that is not mapped, and functions that are not there.
#[test]
fn wrong_names_are_refused() -> Result<()> {
    if !host::can_trace("wrong_names_are_refused") {
        return Ok(());
    }
    let program = own_names().build()?;
    let fixture = Fixture::builder(&program).start()?;
    let program = program.display();
    let (pid, other) = (fixture.pid().to_string(), std::env::current_exe()?);
    let other = other.to_str().context("a path")?;
    for (value, said) in [
        (other.to_owned(), vec![other, &pid, "mapped"]),
        (format!("{program}:nobody_"), vec!["nobody_malloc", "nobody_free"]),
        (format!("{program}:"), vec!["--allocator", "je_"]),
    ] {
        let outcome = Leaktrace::pid(fixture.pid())?.args(["--allocator", &value]).spawn()?.finish(PATIENCE)?;
        ensure!(matches!(outcome.code()?, 1 | 2) && outcome.stdout.is_empty(), "{value}: {outcome:?}");
        for part in said {
            ensure!(outcome.stderr.contains(part), "{value}: {part} is not in {}", outcome.stderr);
        }
    }
    Ok(())
}

/// Runs a program of the system to its end.
fn run(program: &Path, args: &[&str]) -> Result<()> {
    let output =
        Command::new(program).args(args).output().with_context(|| format!("failed to run {}", program.display()))?;
    ensure!(output.status.success(), "{} {args:?}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A static program without symbols of its own: its allocator is found by its debug file, and by the symbols packed into it.
#[test]
fn stripped_programs() -> Result<()> {
    let test = "stripped_programs";
    let tools = ["objcopy", "xz"].map(|name| host::program(test, name));
    let ([Some(objcopy), Some(xz)], true) = (tools, host::can_trace(test)) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let built = families().flag("-static").build()?;
    let built = built.to_str().context("a path")?;
    let path = |name: &str| folder.path().join(name).to_str().map(str::to_owned).context("a path");
    let (linked, debug) = (path("linked")?, path("linked.debug")?);
    run(&objcopy, &["--only-keep-debug", built, &debug])?;
    run(&objcopy, &["--strip-all", &format!("--add-gnu-debuglink={debug}"), built, &linked])?;
    let (packed, symbols) = (path("packed")?, path("symbols")?);
    run(&objcopy, &["--strip-debug", built, &symbols])?;
    run(&xz, &[&symbols])?;
    run(&objcopy, &["--strip-all", &format!("--add-section=.gnu_debugdata={symbols}.xz"), built, &packed])?;
    let bare = path("bare")?;
    run(&objcopy, &["--strip-all", built, &bare])?;
    for program in [&linked, &packed] {
        let mut fixture = Fixture::builder(Path::new(program)).start()?;
        let session = Session::start(&[fixture.pid()], &[])?;
        fixture.tell("leak malloc 10 100")?;
        fixture.tell("leak calloc 5 70")?;
        fixture.tell("release malloc free 4")?;
        let report = session.stop()?;
        assert_eq!(live_of(&report, fixture.pid()), (600 + 350, 11), "{program}: {}", summary(&report));
    }
    // Without either there is nothing to go by.
    let fixture = Fixture::builder(Path::new(&bare)).start()?;
    let outcome = Leaktrace::pid(fixture.pid())?.spawn()?.finish(PATIENCE)?;
    assert_eq!(outcome.code()?, 1, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("no allocator"), "{}", outcome.stderr);
    fs::remove_file(&bare)?;
    Ok(())
}

/// What jemalloc has of its own is exact by the ways around what older kernels lack, too.
#[test]
fn on_older_kernels() -> Result<()> {
    let test = "on_older_kernels";
    let libraries = ["libjemalloc.so", "libmimalloc.so"].map(|name| host::library(test, name));
    let ([Some(_), Some(_)], true) = (libraries, host::can_trace(test)) else { return Ok(()) };
    let jemalloc = families().flag("-DFEW").flag("-DJEMALLOC").link("-ljemalloc");
    let mimalloc = families().flag("-DMIMALLOC").flag("-DPREFIX=mi_").link("-lmimalloc");
    for (without, program) in [("session", &jemalloc), ("multi,loop", &jemalloc), ("multi", &mimalloc)] {
        let mut fixture = Fixture::builder(&program.build()?).start()?;
        let names = fixture.ask("names")?;
        let session = Session::start(&[fixture.pid()], &["--without", without])?;
        exercise(&mut fixture, &names)?;
        let truth = fixture.report()?;
        let report = session.stop()?;
        let all = (truth["live_bytes"].as_u64(), truth["live_count"].as_u64());
        let found = live_of(&report, fixture.pid());
        ensure!(
            (Some(found.0), Some(found.1)) == all,
            "{without}: {found:?}, not {all:?} {truth}\n{}",
            summary(&report)
        );
        ensure!(report["losses"] == serde_json::json!({}), "{without}: {}", summary(&report));
    }
    Ok(())
}

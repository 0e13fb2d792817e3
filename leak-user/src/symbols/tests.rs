//! Names in real processes and files.

use super::*;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A child that is killed and waited for when dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(program: &str, arguments: &[&Path]) {
    let output = Command::new(program).args(arguments).output().expect("the tool runs");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Prints the return addresses of a call from `leaf`, which is inlined into `middle`, from `middle`, and from `outer`.
const PROGRAM: &str = r#"#include <execinfo.h>
#include <stdio.h>
#include <unistd.h>
__attribute__((noinline)) static void print(void) {
  void *at[16]; int n = backtrace(at, 16);
  for (int i = 1; i < n && i < 4; i++) printf("%p ", at[i]);
  puts(""); fflush(stdout);
}
static inline __attribute__((always_inline)) void leaf(void) {
  print(); /* line 10 */
}
__attribute__((noinline)) void middle(void) {
  leaf(); /* line 13 */
  __asm__ volatile("");
}
__attribute__((noinline)) void outer(void) {
  middle(); /* line 17 */
  __asm__ volatile("");
}
int main(void) { outer(); for (;;) pause(); }
"#;

/// Compiles the program.
fn compile(folder: &Path, flags: &[&str]) -> PathBuf {
    let (source, program) = (folder.join("program.c"), folder.join("program"));
    fs::write(&source, PROGRAM).expect("the source can be written");
    let mut arguments = vec![source.as_path(), Path::new("-o"), &program, Path::new("-O1")];
    arguments.extend(flags.iter().map(Path::new));
    run("cc", &arguments);
    program
}

/// Runs the program until it has said its addresses, notes them, ends it, and only then asks for names.
fn names_after_the_end(program: &Path, and_then: impl FnOnce()) -> Vec<Vec<Frame>> {
    let mut child = Guard(Command::new(program).stdout(Stdio::piped()).spawn().expect("the program starts"));
    let mut line = String::new();
    let stdout = child.0.stdout.take().expect("stdout is a pipe");
    BufReader::new(stdout).read_line(&mut line).expect("the program says its addresses");
    let parse = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("an address");
    let addresses: Vec<u64> = line.split_ascii_whitespace().map(parse).collect();
    assert_eq!(addresses.len(), 3, "{line}");
    let mut symbols = Symbols::new().expect("a thread can be started");
    let id = ProcessId::current(child.0.id()).expect("the child lives");
    symbols.note(id, addresses.iter().copied());
    drop(child);
    and_then();
    symbols.resolve(id, &addresses)
}

fn functions(frames: &[Frame]) -> Vec<(Option<&str>, Option<u32>, bool)> {
    frames.iter().map(|f| (f.function.as_deref(), f.line, f.inlined)).collect()
}

fn assert_names(found: &[Vec<Frame>]) {
    assert_eq!(functions(&found[0]), [(Some("leaf"), Some(10), true), (Some("middle"), Some(13), false)]);
    assert_eq!(functions(&found[1]), [(Some("outer"), Some(17), false)]);
    assert_eq!(functions(&found[2]), [(Some("main"), Some(20), false)]);
    for frame in found.iter().flatten() {
        assert!(frame.file.as_ref().is_some_and(|f| f.ends_with("program.c")), "{frame:?}");
        assert_eq!(frame.language.as_deref(), Some("c"));
        assert!(frame.reason.is_none() && frame.offset.is_some(), "{frame:?}");
    }
}

#[inline(never)]
fn traced() -> Vec<u64> {
    inlined()
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "the test is about an inlined frame")]
fn inlined() -> Vec<u64> {
    let mut addresses = [std::ptr::null_mut(); 8];
    // SAFETY: backtrace writes at most as many pointers as it is told.
    let count = unsafe { libc::backtrace(addresses.as_mut_ptr(), 8) };
    addresses[..count as usize].iter().map(|&a| a as u64).collect()
}

/// A Rust function of this very process, and the one inlined into it, have names, file, line and language.
#[test]
fn this_process() {
    let id = ProcessId::current(std::process::id()).expect("this process lives");
    let mut symbols = Symbols::new().expect("a thread can be started");
    symbols.add(id);
    let addresses = traced();
    let found = symbols.resolve(id, &addresses[..2]);
    let [leaf, outer] = &found[0][..] else { panic!("two functions at one address: {found:#?}") };
    assert_eq!(leaf.function.as_deref(), Some("leak_user::symbols::tests::inlined"));
    assert_eq!(outer.function.as_deref(), Some("leak_user::symbols::tests::traced"));
    assert!(leaf.inlined && !outer.inlined);
    for frame in [leaf, outer] {
        assert!(frame.file.as_ref().is_some_and(|f| f.ends_with("symbols/tests.rs")), "{frame:?}");
        assert_eq!(frame.language.as_deref(), Some("rust"));
        assert_eq!(frame.module, std::env::current_exe().ok().map(|p| p.to_string_lossy().into_owned()));
    }
    assert!(leaf.line > outer.line, "the call is further down in the file: {found:#?}");
    let caller = found[1].last().and_then(|f| f.function.clone()).unwrap_or_default();
    assert!(caller.contains("this_process"), "{caller}");
}

/// A C program keeps its names when it has ended and its file is gone.
#[test]
fn ended_and_deleted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for flags in [&["-g"][..], &["-g", "-no-pie"], &["-g", "-static"]] {
        let program = compile(folder.path(), flags);
        let found = names_after_the_end(&program, || fs::remove_file(&program).expect("the file can be removed"));
        assert_names(&found);
        assert_eq!(found[0][0].module.as_deref(), program.to_str());
    }
}

/// Debug information in a file of its own is found beside the program.
#[test]
fn separate_debug_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = compile(folder.path(), &["-g"]);
    let debug = folder.path().join("program.debug");
    run("objcopy", &[Path::new("--only-keep-debug"), &program, &debug]);
    run("objcopy", &[Path::new("--strip-all"), &program]);
    let link = format!("--add-gnu-debuglink={}", debug.display());
    run("objcopy", &[Path::new(&link), &program]);
    assert_names(&names_after_the_end(&program, || {}));
}

/// Debug information of another build is left aside: the program's own symbols are used.
#[test]
fn wrong_debug_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = compile(folder.path(), &["-g"]);
    let debug = folder.path().join("program.debug");
    run("objcopy", &[Path::new("--only-keep-debug"), &program, &debug]);
    run("objcopy", &[Path::new("--strip-debug"), &program]);
    let link = format!("--add-gnu-debuglink={}", debug.display());
    run("objcopy", &[Path::new(&link), &program]);
    fs::write(&debug, b"something else").expect("the debug file can be overwritten");
    let found = names_after_the_end(&program, || {});
    assert_eq!(functions(&found[1]), [(Some("outer"), None, false)]);
}

/// A stripped program has module, offset and build id, and the reason why there is no name.
#[test]
fn stripped() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = compile(folder.path(), &["-g", "-Wl,--build-id=sha1"]);
    let named = names_after_the_end(&program, || {});
    run("strip", &[&program]);
    let found = names_after_the_end(&program, || {});
    for (bare, named) in found.iter().zip(&named) {
        let [bare] = &bare[..] else { panic!("one frame: {bare:?}") };
        assert_eq!((&bare.function, &bare.file, bare.line), (&None, &None, None));
        assert!(bare.reason.is_some(), "{bare:?}");
        assert_eq!(bare.module.as_deref(), program.to_str());
        assert_eq!(bare.build_id.as_ref().map(String::len), Some(40));
        assert_eq!((bare.offset, &bare.build_id), (named[0].offset, &named[0].build_id));
    }
}

/// Addresses where nothing is mapped, and those of a process that was never seen alive, say so.
#[test]
fn nowhere() {
    let mut symbols = Symbols::new().expect("a thread can be started");
    let id = ProcessId::current(std::process::id()).expect("this process lives");
    for address in [0, 1, 0x10, u64::MAX] {
        let found = symbols.frames(id, &[address]);
        assert_eq!(found.len(), 1);
        assert!(found[0].reason.as_ref().is_some_and(|r| r.contains("no code is mapped")), "{found:?}");
    }
    let never = ProcessId { tgid: u32::MAX, start_time: 0 };
    let found = symbols.frames(never, &[0x1234]);
    assert!(found[0].reason.as_ref().is_some_and(|r| r.contains("ended")), "{found:?}");
}

/// A forked child has the names of its parent, though nothing of it was ever read.
#[test]
fn forked() {
    let parent = ProcessId::current(std::process::id()).expect("this process lives");
    let child = ProcessId { tgid: u32::MAX, start_time: 1 };
    let mut symbols = Symbols::new().expect("a thread can be started");
    symbols.add(parent);
    symbols.fork(parent, child);
    let addresses = traced();
    let found = symbols.frames(child, &addresses[..1]);
    assert_eq!(found[0].function.as_deref(), Some("leak_user::symbols::tests::inlined"));
    symbols.forget(child);
    assert!(symbols.frames(child, &addresses[..1])[0].function.is_none());
}

/// The names can be looked up from another thread than the one that made them.
#[test]
fn is_send() {
    fn assert_send<T: Send>() {}
    assert_send::<Symbols>();
}

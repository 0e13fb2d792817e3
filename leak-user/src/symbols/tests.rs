//! Names in real processes and files.

use super::*;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
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

/// Whether `test` has the program that it needs. Where not, that is reported as the end-to-end tests report it.
fn installed(test: &str, program: &str) -> bool {
    if Command::new(program).arg("--version").output().is_ok() {
        return true;
    }
    assert!(std::env::var("LEAKTRACE_REQUIRE_KERNEL").as_deref() != Ok("1"), "{test} cannot run without {program}");
    eprintln!("SKIPPED {test}: {program} is not installed");
    if let Some(log) = std::env::var_os("LEAKTRACE_SKIP_LOG") {
        let mut log = fs::OpenOptions::new().create(true).append(true).open(log).expect("the log can be opened");
        writeln!(log, "{test}: {program} is not installed").expect("the log can be written");
    }
    false
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

/// Takes the debug information out of a program into `debug`, and leaves no symbols.
fn split(program: &Path, debug: &Path) {
    run("objcopy", &[Path::new("--only-keep-debug"), program, debug]);
    run("objcopy", &[Path::new("--strip-all"), program]);
}

/// Makes the program refer to its debug file.
fn add_link(program: &Path, debug: &Path) {
    let link = format!("--add-gnu-debuglink={}", debug.display());
    run("objcopy", &[Path::new(&link), program]);
}

/// Debug information in a file of its own is found beside the program, and in the folder for it there.
#[test]
fn separate_debug_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Without a build id the link's CRC alone tells that it belongs there.
    for flags in [&["-g"][..], &["-g", "-Wl,--build-id=none"]] {
        let program = compile(folder.path(), flags);
        let debug = folder.path().join("program.debug");
        split(&program, &debug);
        add_link(&program, &debug);
        assert_names(&names_after_the_end(&program, || {}));
        let hidden = folder.path().join(".debug");
        fs::create_dir_all(&hidden).expect("a folder");
        fs::rename(&debug, hidden.join("program.debug")).expect("the file can be moved");
        assert_names(&names_after_the_end(&program, || {}));
        fs::remove_dir_all(&hidden).expect("the folder can be removed");
        let bare = names_after_the_end(&program, || {});
        assert!(bare.iter().flatten().all(|frame| frame.function.is_none()), "{bare:#?}");
    }
}

/// A debug file that is found by its name is not used if one byte of it is another, and what is shown says why.
#[test]
fn wrong_debug_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = compile(folder.path(), &["-g"]);
    let debug = folder.path().join("program.debug");
    split(&program, &debug);
    add_link(&program, &debug);
    let mut bytes = fs::read(&debug).expect("the debug file can be read");
    *bytes.last_mut().expect("it is not empty") ^= 1;
    fs::write(&debug, &bytes).expect("the debug file can be overwritten");
    let found = names_after_the_end(&program, || {});
    assert_eq!(functions(&found[1]), [(None, None, false)]);
    assert!(found[1][0].reason.as_ref().is_some_and(|r| r.contains("of another build")), "{found:#?}");
    fs::write(&debug, b"something else").expect("the debug file can be overwritten");
    let found = names_after_the_end(&program, || {});
    assert!(found[1][0].reason.as_ref().is_some_and(|r| r.contains("nothing in it")), "{found:#?}");
}

/// A program with debug information and a link keeps to its own, and nothing that the link leads to is opened: not even a
/// pipe, at which opening would wait for ever.
#[test]
fn own_debug_information_and_a_link() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = compile(folder.path(), &["-g"]);
    let debug = folder.path().join("program.debug");
    run("objcopy", &[Path::new("--only-keep-debug"), &program, &debug]);
    add_link(&program, &debug);
    fs::remove_file(&debug).expect("the debug file can be removed");
    nix::unistd::mkfifo(&debug, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    assert_names(&names_after_the_end(&program, || {}));
    // The same where the program has only symbols.
    run("objcopy", &[Path::new("--strip-debug"), &program]);
    let found = names_after_the_end(&program, || {});
    assert_eq!(functions(&found[1]), [(Some("outer"), None, false)]);
}

/// What a program and debug files in a root of its own have for file offsets.
fn look_up_in_root(program: &Path, root: &Path, offsets: &[u64]) -> Vec<Arc<[Name]>> {
    let file = fs::File::open(program).expect("the program can be opened");
    let root = Root::at(root).expect("the root can be opened");
    let own = Root::own().expect("the own root can be opened");
    let sources = debug_files::Sources::find(&file, Path::new("/srv/bin/program"), &[&root, &own]);
    names::look_up(&sources, offsets)
}

/// The functions of it.
fn names_in_root(program: &Path, root: &Path, offsets: &[u64]) -> Vec<Vec<Option<String>>> {
    let found = look_up_in_root(program, root, offsets);
    found.iter().map(|names| names.iter().map(|name| name.function.clone()).collect()).collect()
}

/// A program and the offsets in it of calls in `middle`, `outer` and `main`.
fn with_offsets(folder: &Path, flags: &[&str]) -> (PathBuf, Vec<u64>) {
    let program = compile(folder, flags);
    let named = names_after_the_end(&program, || {});
    let offsets = named.iter().map(|frames| frames[0].offset.expect("an offset")).collect();
    (program, offsets)
}

fn build_id(program: &Path) -> String {
    let file = fs::File::open(program).expect("the program can be opened");
    crate::discover::elf::build_id(&file).expect("a build id")
}

fn some(names: &[&[&str]]) -> Vec<Vec<Option<String>>> {
    names.iter().map(|names| names.iter().map(|name| Some((*name).to_owned())).collect()).collect()
}

/// By build id, or by the folder that the process sees the program in, under the debug folder of a root; not one of another
/// build in the same place.
#[test]
fn debug_folder_of_a_root() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (program, offsets) = with_offsets(folder.path(), &["-g", "-Wl,--build-id=sha1"]);
    let debug = folder.path().join("program.debug");
    split(&program, &debug);
    let root = folder.path().join("root");
    let id = build_id(&program);
    let by_id = root.join("usr/lib/debug/.build-id").join(&id[..2]);
    fs::create_dir_all(&by_id).expect("a folder");
    let by_id = by_id.join(format!("{}.debug", &id[2..]));
    let all = some(&[&["leaf", "middle"], &["outer"], &["main"]]);
    let none = vec![vec![None]; 3];
    assert_eq!(names_in_root(&program, &root, &offsets), none);
    fs::copy(&debug, &by_id).expect("the debug file can be copied");
    assert_eq!(names_in_root(&program, &root, &offsets), all);

    let other = tempfile::tempdir().expect("a temporary folder");
    let (stranger, _) = with_offsets(other.path(), &["-g", "-O0", "-Wl,--build-id=sha1"]);
    fs::copy(&stranger, &by_id).expect("the debug file can be overwritten");
    assert_eq!(names_in_root(&program, &root, &offsets), none);

    add_link(&program, &debug);
    let by_name = root.join("usr/lib/debug/srv/bin");
    fs::create_dir_all(&by_name).expect("a folder");
    fs::rename(&debug, by_name.join("program.debug")).expect("the debug file can be moved");
    assert_eq!(names_in_root(&program, &root, &offsets), all);
}

/// What dwz moves into a file that several debug files share is found by its path and by its build id, and nothing is left of
/// how it was shown to blazesym. Without that file names are still there, without lines.
#[test]
fn shared_debug_information() {
    if !installed("shared_debug_information", "dwz") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let root = folder.path().join("root");
    let debug_folder = root.join("srv/bin");
    fs::create_dir_all(&debug_folder).expect("a folder");
    let flags = ["-g", "-gdwarf-4", "-Wl,--build-id=sha1"];
    let other = compile(folder.path(), &["-g", "-gdwarf-4", "-O2", "-Wl,--build-id=sha1"]);
    let other_debug = folder.path().join("other.debug");
    run("objcopy", &[Path::new("--only-keep-debug"), &other, &other_debug]);
    let (program, offsets) = with_offsets(folder.path(), &flags);
    let debug = debug_folder.join("program.debug");
    split(&program, &debug);
    let shared = debug_folder.join("shared.debug");
    run("dwz", &[Path::new("-m"), &shared, Path::new("-M"), Path::new("shared.debug"), &debug, &other_debug]);
    add_link(&program, &debug);
    let lines = || {
        let found = look_up_in_root(&program, &root, &offsets);
        found.iter().map(|names| (names[0].function.clone(), names[0].line)).collect::<Vec<_>>()
    };
    let named = |name: &str, line| (Some(name.to_owned()), line);
    // The inlined function's name is in the shared file, into which blazesym does not look for it.
    let whole = [(None, Some(10)), named("outer", Some(17)), named("main", Some(20))];
    assert_eq!(lines(), whole);
    let id = build_id(&shared);
    let by_id = root.join("usr/lib/debug/.build-id").join(&id[..2]);
    fs::create_dir_all(&by_id).expect("a folder");
    fs::rename(&shared, by_id.join(format!("{}.debug", &id[2..]))).expect("the file can be moved");
    assert_eq!(lines(), whole);
    fs::remove_dir_all(&by_id).expect("the folder can be removed");
    assert_eq!(lines(), [named("middle", None), named("outer", None), named("main", None)]);
    let ours = format!("leaktrace-{}-", std::process::id());
    let left = fs::read_dir(std::env::temp_dir()).expect("the folder can be read").filter_map(Result::ok);
    assert_eq!(left.filter(|entry| entry.file_name().to_string_lossy().starts_with(&ours)).count(), 0);
}

/// Adds packed symbols to a stripped program.
fn pack(program: &Path, symbols: &Path) {
    let section = format!(".gnu_debugdata={}", symbols.display());
    run("objcopy", &[Path::new("--add-section"), Path::new(&section), program]);
}

/// Symbols that are packed into a stripped program, as Fedora does, give it names; damaged ones are said to be so.
#[test]
fn packed_symbols() {
    if !installed("packed_symbols", "xz") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (program, offsets) = with_offsets(folder.path(), &["-g"]);
    let mini = folder.path().join("mini");
    run("objcopy", &[Path::new("--only-keep-debug"), &program, &mini]);
    run("objcopy", &[Path::new("-S"), Path::new("--remove-section=.comment"), Path::new("--keep-symbol=outer"), &mini]);
    run("strip", &[&program]);
    let stripped = fs::read(&program).expect("the program can be read");
    run("xz", &[&mini]);
    let packed = folder.path().join("mini.xz");
    pack(&program, &packed);
    let found = names_in_root(&program, folder.path(), &offsets);
    assert_eq!(found, [[None], [Some("outer".to_owned())], [None]]);

    let mut bytes = fs::read(&packed).expect("the symbols can be read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    fs::write(&packed, &bytes).expect("the symbols can be damaged");
    fs::write(&program, &stripped).expect("the program can be written");
    pack(&program, &packed);
    let found = look_up_in_root(&program, folder.path(), &offsets);
    assert!(found[1][0].reason.as_ref().is_some_and(|r| r.contains("cannot be unpacked")), "{found:#?}");
}

/// Functions of a library that exports few have their names, and what lies between them has none: not that of the exported
/// function before it.
#[test]
fn exported_functions_only() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (source, library) = (folder.path().join("a.c"), folder.path().join("a.so"));
    let text = "int exported(int n) { return n * 3 + 1; }\n\
        __attribute__((used, noinline)) static int local(int n) { return n * n + 7; }\n\
        __attribute__((visibility(\"hidden\"), noinline)) int hidden(int n) { return local(n) ^ 5; }\n";
    fs::write(&source, text).expect("the source can be written");
    let flags = ["-g", "-O1", "-shared", "-fPIC", "-fno-toplevel-reorder", "-o"].map(Path::new);
    run("cc", &[&flags[..], &[library.as_path(), &source]].concat());
    // Where each function's symbol says that it is; the offsets of this library's code are its addresses.
    let symbols = Command::new("nm").arg(&library).output().expect("nm runs");
    let symbols = String::from_utf8(symbols.stdout).expect("text");
    let offset = |name: &str| {
        let line = symbols.lines().find(|line| line.ends_with(&format!(" {name}"))).expect(name);
        u64::from_str_radix(&line[..16], 16).expect("an address") + 2
    };
    let offsets = ["exported", "local", "hidden"].map(offset);
    assert_eq!(names_in_root(&library, folder.path(), &offsets), some(&[&["exported"], &["local"], &["hidden"]]));
    run("strip", &[&library]);
    let found = names_in_root(&library, folder.path(), &offsets);
    assert_eq!(found, [[Some("exported".to_owned())], [None], [None]]);
}

/// A symbol without a size reaches no further than its section: `_init` is not the name of all code that lost its symbols.
#[test]
fn symbols_without_size() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (program, offsets) = with_offsets(folder.path(), &["-g"]);
    run("objcopy", &[Path::new("--strip-all"), Path::new("--keep-symbol=_init"), &program]);
    assert_eq!(names_in_root(&program, folder.path(), &offsets), vec![vec![None]; 3]);
}

/// What a compiler at run time writes down names code in no file, also once the process has ended and the map is gone; code
/// that it does not have says so.
#[test]
fn generated_code() {
    let mut child = Guard(Command::new("sleep").arg("100").spawn().expect("sleep runs"));
    let pid = child.0.id();
    let id = ProcessId::current(pid).expect("the child lives");
    let mut symbols = Symbols::new().expect("a thread can be started");
    let mut space = Space::new(id);
    // Memory of the process that is in no file stands for generated code.
    let address = 0x1234_0000;
    space.pretend_generated(address..address + 0x2000, &mut symbols.modules);
    symbols.spaces.insert(id, space);
    symbols.note(id, [address + 5, address + 0x1005]);
    let found = symbols.frames(id, &[address + 5]);
    assert!(found[0].reason.as_ref().is_some_and(|r| r.contains("no perf map")), "{found:?}");
    let map = RemovedFile(PathBuf::from(format!("/tmp/perf-{pid}.map")));
    fs::write(&map.0, format!("{address:x} 10 JS:*leak /srv/app.js:3:4\n")).expect("the map can be written");
    symbols.refresh(id);
    drop(map);
    child.0.kill().expect("it can be ended");
    child.0.wait().expect("it has ended");
    let found = symbols.frames(id, &[address + 5, address + 0x1005]);
    assert_eq!(found[0].function.as_deref(), Some("JS:*leak /srv/app.js:3:4"));
    assert_eq!((found[0].language.as_deref(), &found[0].reason), (Some("javascript"), &None));
    assert!(found[1].reason.as_ref().is_some_and(|r| r.contains("does not have it")), "{found:?}");
}

/// Removed when dropped.
struct RemovedFile(PathBuf);

impl Drop for RemovedFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
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

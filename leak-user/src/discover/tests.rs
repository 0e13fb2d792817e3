//! Discovery in real processes and files.

use super::breakpoint::Reason;
use super::*;
use leak_common::op;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

/// A child that is killed and waited for when dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Compiles C in the folder.
fn compile(folder: &Path, name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let (input, output) = (folder.join(format!("{name}.c")), folder.join(name));
    fs::write(&input, source).expect("the source can be written");
    let compiler = Command::new("cc").arg("-o").arg(&output).arg(&input).args(flags).output().expect("cc runs");
    assert!(compiler.status.success(), "{}", String::from_utf8_lossy(&compiler.stderr));
    output
}

/// Starts a program and waits until it says a line, so that it is past its loader.
fn start(program: &Path) -> Guard {
    let mut child = Guard(Command::new(program).stdout(Stdio::piped()).spawn().expect("the program starts"));
    let mut line = [0];
    child.0.stdout.as_mut().expect("stdout is a pipe").read_exact(&mut line).expect("the program says that it runs");
    child
}

fn read(file: &File) -> Result<choice::Contents, Unusable> {
    choice::read(file, None, &Asked::default(), Emulation { nops: true })
}

const OWN_ALLOCATOR: &str = "
#include <stddef.h>
static char arena[1 << 16]; static size_t used;
void *malloc(size_t n) { if (n > sizeof arena - used) return 0; used += n + 15 & ~15ul; return arena + used - (n + 15 & ~15ul); }
void free(void *p) { (void)p; }
__attribute__((alias(\"free\"))) void cfree(void *p);
";

const WAIT: &str = "
#include <unistd.h>
int main(void) { write(1, \"x\", 1); for (;;) pause(); }
";

/// In this process libc is found, and each of its functions where dlsym says that it is.
#[test]
fn own_libc() {
    let mut discovery = Discovery::new(std::process::id());
    let found = discovery.refresh().expect("own mappings can be read");
    let maps = fs::read("/proc/self/maps").expect("own mappings can be read");
    let libc = found.iter().find(|a| a.label().starts_with("glibc 2.") || a.path.ends_with("libc.so.6")).expect("libc");
    assert!(libc.build_id.as_ref().is_some_and(|id| id.len() == 40), "{libc:?}");
    for (function, _) in names::C {
        let name = std::ffi::CString::new(function).expect("names have no NUL");
        // SAFETY: the name ends in NUL; dlsym gives an address or null, which is only compared.
        let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) } as u64;
        let Some(mapping) = maps::parse(&maps).find(|m| m.start <= address && address < m.end) else { continue };
        if mapping.display_path() != libc.path {
            continue;
        }
        let entry = address - mapping.start + mapping.offset;
        let point = libc.points.iter().find(|p| p.is(function));
        assert_eq!(point.map(|p| p.entry), Some(entry), "{function}");
    }
    assert!(libc.points.iter().any(|p| p.name == "reallocarray"), "{libc:?}");
}

/// In the libc of this machine the instruction under the breakpoint on free is emulated; where that is not the entry, it is a
/// conditional jump, as in glibc 2.36.
#[test]
#[cfg(target_arch = "x86_64")]
fn own_free_is_emulated() {
    let found = Discovery::new(std::process::id()).refresh().expect("own mappings can be read");
    let libc = found.iter().find(|a| a.label().starts_with("glibc ")).expect("libc");
    let free = libc.points.iter().find(|p| p.name == "free").expect("free");
    let mut code = [0; 2];
    libc.file().read_exact_at(&mut code, free.offset).expect("code can be read");
    if libc.label() == "glibc 2.36" {
        assert!(free.placement.reason == Reason::LaterEmulated && !free.at_entry(), "{free:?}");
    }
    if free.placement.reason == Reason::LaterEmulated {
        let is_jcc = matches!(code, [0x70..=0x7f, _] | [0x0f, 0x80..=0x8f]);
        assert!(is_jcc || matches!(code, [0x50..=0x57, _] | [0x41, 0x50..=0x57]), "{code:x?}");
    }
}

/// The second look finds nothing new; a library that is loaded later is found alone, and again nothing after that.
#[test]
fn libraries_loaded_later() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library = compile(folder.path(), "own.so", OWN_ALLOCATOR, &["-shared", "-fPIC"]);
    let program = compile(
        folder.path(),
        "loads",
        "#include <dlfcn.h>\n#include <unistd.h>\nint main(int n, char **v) { char c; write(1, \"x\", 1); read(0, &c, 1);\n\
         if (!dlopen(v[1], RTLD_NOW)) return 1; write(1, \"y\", 1); for (;;) pause(); }",
        &["-ldl"],
    );
    let mut command = Command::new(&program);
    command.arg(&library).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Guard(command.spawn().expect("the program starts"));
    let mut line = [0];
    let mut wait = |child: &mut Guard| child.0.stdout.as_mut().expect("a pipe").read_exact(&mut line).expect("it runs");
    wait(&mut child);
    let mut discovery = Discovery::new(child.0.id());
    assert_eq!(discovery.refresh().expect("mappings can be read").len(), 1, "libc");
    assert!(discovery.refresh().expect("mappings can be read").is_empty());
    io::Write::write_all(child.0.stdin.as_mut().expect("a pipe"), b"z").expect("the child reads");
    wait(&mut child);
    let found = discovery.refresh().expect("mappings can be read");
    assert_eq!(found.iter().map(AllocatorFile::label).collect::<Vec<_>>(), ["own.so"]);
    assert!(discovery.refresh().expect("mappings can be read").is_empty());
}

/// A program that brings its own allocator and whose file is gone is found, beside libc; aliases share one probe, and the file
/// can be opened for attaching even when the process has ended.
#[test]
fn deleted_program_with_its_own_allocator() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = compile(folder.path(), "own", &format!("{OWN_ALLOCATOR}{WAIT}"), &["-rdynamic", "-fno-builtin"]);
    let child = start(&program);
    fs::remove_file(&program).expect("the program's file can be removed");
    let found = Discovery::new(child.0.id()).refresh().expect("mappings can be read");
    let own = found.iter().find(|a| a.path == program).expect("the program's allocator");
    assert_eq!(own.label(), "own");
    assert_eq!(own.points.len(), 2, "{:?}", own.points);
    let free = own.points.iter().find(|p| p.name == "free").expect("free");
    assert_eq!(free.aliases, ["cfree"]);
    assert!(found.iter().any(|a| a.path.to_string_lossy().contains("libc")));
    drop(child);
    let reopened = File::open(own.path_for_attach()).expect("the file is still there");
    assert_eq!(FileId::of(&reopened).ok(), Some(own.id));
}

/// A program that is linked statically has libc's functions in its symbol table.
#[test]
fn static_program() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = format!(
        "#include <stdlib.h>\nvoid *volatile p; __attribute__((constructor)) void f(void) {{ p = malloc(9); free(p); }}{WAIT}"
    );
    for flags in [&["-static"][..], &["-static-pie"]] {
        let program = compile(folder.path(), "static", &source, flags);
        let own = allocator_at(&program).expect("the file can be opened").expect("it has an allocator");
        assert!(own.label().starts_with("glibc"), "{flags:?}: {}", own.label());
        for function in ["malloc", "calloc", "realloc", "free"] {
            assert!(own.points.iter().any(|p| p.is(function)), "{flags:?}: {function} {:?}", own.points);
        }
        assert!(own.points.iter().all(|p| p.placement.reason.is_emulated()), "{:?}", own.points);
    }
}

/// A malloc that is chosen when the program starts cannot be probed, and that is said.
#[test]
fn indirect_functions() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = "#include <stddef.h>\nstatic void *real(size_t n) { (void)n; return 0; }\n\
        static void *pick(void) { return real; }\n\
        __attribute__((ifunc(\"pick\"))) void *malloc(size_t n);\nvoid free(void *p) { (void)p; }";
    let library = compile(folder.path(), "indirect.so", source, &["-shared", "-fPIC", "-fno-builtin"]);
    let outcome = allocator_at(&library).expect("the file can be opened").expect_err("malloc cannot be probed");
    assert!(matches!(outcome, Outcome::Unprobed(ref name, _) if name == "malloc"), "{outcome:?}");
    assert!(outcome.text().contains("malloc is an indirect function"), "{}", outcome.text());
}

/// A program that only calls malloc, or defines a lone cfree, is no allocator.
#[test]
fn users_of_allocators() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = "#include <stdlib.h>\nvoid cfree(void *p) { free(p); }\nint main(void) { cfree(malloc(9)); }";
    for flags in [&["-rdynamic"][..], &["-no-pie", "-rdynamic"]] {
        let program = compile(folder.path(), "user", source, flags);
        let outcome = allocator_at(&program).expect("the file can be opened").expect_err("it has no allocator");
        assert_eq!(outcome, Outcome::NoAllocator, "{flags:?}");
    }
}

/// Without an allocator the error says what was looked for and where.
#[test]
#[cfg(target_arch = "x86_64")]
fn no_allocator() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = "static long call(long n, long a, long b, long c) { long r;\n\
        __asm__ volatile(\"syscall\" : \"=a\"(r) : \"a\"(n), \"D\"(a), \"S\"(b), \"d\"(c) : \"rcx\", \"r11\", \"memory\"); return r; }\n\
        void _start(void) { call(1, 1, (long)\"x\", 1); for (;;) call(34, 0, 0, 0); }";
    let program = compile(folder.path(), "bare", source, &["-static", "-nostdlib", "-ffreestanding"]);
    let child = start(&program);
    let mut discovery = Discovery::new(child.0.id());
    assert!(discovery.refresh().expect("mappings can be read").is_empty());
    let text = discovery.no_allocator().to_string();
    let pid = child.0.id();
    assert!(text.starts_with(&format!("no allocator found in pid {pid}: looked for malloc, calloc, ")), "{text}");
    assert!(text.ends_with("/bare"), "{text}");
}

/// A process that is gone is an error that names it.
#[test]
fn process_that_is_gone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let child = start(&compile(folder.path(), "waits", WAIT, &[]));
    let pid = child.0.id();
    let mut discovery = Discovery::new(pid);
    assert_eq!(discovery.refresh().expect("mappings can be read").len(), 1);
    drop(child);
    let error = discovery.refresh().expect_err("it is gone");
    assert_eq!(error.to_string(), format!("no process with pid {pid}"));
}

/// Text, an empty file, and code of another machine are told apart.
#[test]
fn unusable_files() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library = compile(folder.path(), "own.so", OWN_ALLOCATOR, &["-shared", "-fPIC"]);
    let look = |bytes: &[u8]| {
        let path = folder.path().join("file");
        fs::write(&path, bytes).expect("the file can be written");
        read(&File::open(path).expect("the file can be opened"))
    };
    let bytes = fs::read(library).expect("the library can be read");
    assert!(look(&bytes).is_ok_and(|c| c.is_allocator()));
    assert_eq!(look(b""), Err(Unusable::NotElf));
    assert_eq!(look(b"#!/bin/sh\necho this is no ELF file\n"), Err(Unusable::NotElf));
    assert!(matches!(look(&bytes[..40]), Err(Unusable::Malformed(_))));
    let patched = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        look(&bytes)
    };
    assert_eq!(patched(4, 1), Err(Unusable::OtherMachine), "32-bit");
    assert_eq!(patched(18, 40), Err(Unusable::OtherMachine), "arm");
}

/// Damage anywhere in an ELF file gives an error or other contents, never a panic and no large allocation.
#[test]
fn damaged_files() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library = compile(folder.path(), "own.so", OWN_ALLOCATOR, &["-shared", "-fPIC"]);
    let bytes = fs::read(library).expect("the library can be read");
    let headers = bytes.len() - 64 * 40..bytes.len();
    let place = prop_oneof![0..64_usize, 64..2048_usize, headers, 0..bytes.len()];
    let damage = proptest::collection::vec((place, any::<u8>()), 1..12);
    let path = folder.path().join("damaged");
    proptest!(|(damage in damage, len in prop_oneof![Just(bytes.len()), 0..bytes.len()])| {
        let mut bytes = bytes.clone();
        for (at, value) in damage {
            bytes[at] = value;
        }
        fs::write(&path, &bytes[..len]).expect("the file can be written");
        let file = File::open(&path).expect("the file can be opened");
        if let Ok(contents) = read(&file) {
            for point in contents.points {
                prop_assert!(point.offset >= point.entry);
            }
        }
    });
}

/// What a library made of this source has of allocators.
fn contents(folder: &Path, source: &str, flags: &[&str]) -> choice::Contents {
    let flags = [&["-shared", "-fPIC", "-O2", "-fno-builtin"][..], flags].concat();
    let library = compile(folder, "made.so", source, &flags);
    read(&File::open(library).expect("the library can be opened")).expect("the library can be read")
}

const JEMALLOC_LIKE: &str = "
#include <stddef.h>
static char arena[1 << 16]; static size_t used;
__attribute__((noinline)) void *P(malloc)(size_t n) { used += n; return arena + used - n; }
__attribute__((noinline)) void *P(mallocx)(size_t n, int f) { used += n + f; return arena + used - n; }
__attribute__((noinline)) void P(free)(void *p) { used -= p != 0; }
__attribute__((noinline)) void P(sdallocx)(void *p, size_t n, int f) { used -= p ? n + f : 1; }
void *use(size_t n) { void *p = P(malloc)(n); P(free)(p); P(sdallocx)(p, n, 0); return P(mallocx)(n, 0); }
";

/// jemalloc under a prefix that nobody knows, which the library keeps to itself: found by its symbol table, and not without one.
#[test]
fn prefix_that_is_kept_inside() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let flags = ["-fvisibility=hidden", "-DP(x)=_xyz_##x"];
    let found = contents(folder.path(), JEMALLOC_LIKE, &flags);
    assert_eq!(found.families, [Some("jemalloc".to_owned())]);
    let mut names: Vec<_> = found.points.iter().map(|point| point.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["_xyz_free", "_xyz_malloc", "_xyz_mallocx", "_xyz_sdallocx"]);
    assert_eq!(contents(folder.path(), JEMALLOC_LIKE, &[&flags[..], &["-s"]].concat()).points, []);
}

/// A malloc and free that a library keeps to itself are its own affair, and so are wrappers of another name.
#[test]
fn functions_that_only_have_the_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let found = contents(folder.path(), OWN_ALLOCATOR, &["-fvisibility=hidden"]);
    assert_eq!(found.points, [], "hidden");
    let source = "#include <stdlib.h>\nvoid *xmalloc(size_t n) { return malloc(n + 8); }\nvoid xfree(void *p) { free(p); }\n\
                  void *tc_malloc(size_t n) { return malloc(n); }";
    assert_eq!(contents(folder.path(), source, &[]).points, [], "wrappers, and half an allocator");
}

/// Operators beside an allocator: left out, all of them, where what they hand out comes from malloc on every way; probed, all of
/// them, where it may not, even if delete does nothing but call free.
#[test]
#[cfg(target_arch = "x86_64")]
fn operators_that_wrap() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let with = |news: &str| {
        let source = format!(
            "{OWN_ALLOCATOR}\n#include <stdlib.h>\nstatic char own[4096]; static size_t taken;\n{news}\n\
             __attribute__((noinline)) void *_Znam(size_t n) {{ void *p = _Znwm(n); __asm__ volatile(\"\" : \"+r\"(p)); return p; }}\n\
             void _ZdlPv(void *p) {{ free(p); }}\nvoid _ZdaPv(void *p) {{ free(p ? (char *)p - 8 : p); }}\n"
        );
        let found = contents(folder.path(), &source, &[]);
        assert!(found.points.iter().any(|p| p.is("malloc")), "{:?}", found.points);
        ["_Znwm", "_Znam", "_ZdlPv", "_ZdaPv"].map(|name| found.points.iter().any(|p| p.is(name)))
    };
    let always = "void *_Znwm(size_t n) { char *p; while (!(p = malloc(n ? n : 1))) if (taken) abort(); else taken = n; return p; }";
    assert_eq!(with(always), [false; 4]);
    let sometimes =
        "void *_Znwm(size_t n) { if (n > 64) return (char *)malloc(n + 8) + 8; taken += n; return own + taken - n; }";
    assert_eq!(with(sometimes), [true; 4]);
}

/// A function that jumps on with the arguments that it got is another name of where it leads; one of other arguments is not.
#[test]
#[cfg(target_arch = "x86_64")]
fn names_of_one_function() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = format!(
        "{}\n__attribute__((noinline)) void *memalign(size_t a, size_t n) {{ return malloc(a + n); }}\n\
         void *aligned_alloc(size_t a, size_t n) {{ return memalign(a, n); }}\n\
         void *valloc(size_t n) {{ return malloc(n); }}\nvoid free_sized(void *p, size_t n) {{ (void)n; free(p); }}\n",
        OWN_ALLOCATOR.replace("void cfree", "void unused_cfree")
    );
    for flags in [&[][..], &["-Wl,-Bsymbolic", "-Wl,-z,now"]] {
        let found = contents(folder.path(), &source, flags);
        let mut names: Vec<_> = found.points.iter().map(|point| (point.name.as_str(), point.shape)).collect();
        names.sort_unstable();
        let expected = [("free", op::FREE), ("malloc", op::MALLOC), ("memalign", op::ALIGNED)];
        assert_eq!(names, expected, "{flags:?}");
        for (name, alias) in [("aligned_alloc", "memalign"), ("free", "free_sized"), ("malloc", "valloc")] {
            assert!(found.points.iter().any(|point| point.is(name) && point.is(alias)), "{flags:?} {:?}", found.points);
        }
    }
}

/// A file that two processes have is looked into once, and each gets its own path; a changed file is another.
#[test]
fn files_are_looked_into_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libc.so.6");
    let libc = fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .find_map(|line| line.split_whitespace().nth(5).filter(|path| path.contains("libc.so")).map(str::to_owned))
        .expect("this test is linked to libc");
    fs::copy(libc, &path).unwrap();
    let files = Files::default();
    let look = |seen_at: &str| {
        let mut discovery = Discovery::with(std::process::id(), files.clone());
        let found = discovery.look_into_file(File::open(&path).unwrap(), Path::new(seen_at));
        found.1.expect("libc has an allocator")
    };
    let (first, second) = (look("/a/libc.so.6"), look("/b/libc.so.6"));
    assert_eq!(files.len(), 1);
    assert!(Arc::ptr_eq(first.file(), second.file()));
    assert_eq!((first.path.to_str(), second.path.to_str()), (Some("/a/libc.so.6"), Some("/b/libc.so.6")));
    fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .set_len(first.file().metadata().unwrap().len() + 1)
        .unwrap();
    let third = look("/a/libc.so.6");
    assert_eq!(files.len(), 2);
    assert!(!Arc::ptr_eq(first.file(), third.file()));
}

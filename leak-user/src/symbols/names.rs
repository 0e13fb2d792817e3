//! Names of functions and lines for offsets of files, by blazesym.
//!
//! blazesym's symbolizer cannot be sent between threads and may panic on a damaged file, so a thread of its own has it. It
//! maps files into memory: a library that its owner cuts short while it is read here ends this program with SIGBUS.

use super::space::Module;
use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Reason, Sym, Symbolized, Symbolizer};
use std::fmt::{self, Write};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

/// Longer names are cut off, bytes. C++ templates and hostile symbols demangle to any length.
const MAX_NAME: usize = 4096;

/// One function at a place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name {
    pub function: Option<String>,
    pub file: Option<String>,
    pub line: Option<u32>,
    /// Into the next one.
    pub inlined: bool,
    pub language: Option<&'static str>,
    /// Why there is no function.
    pub reason: Option<String>,
}

impl Name {
    fn none(reason: impl Into<String>) -> Arc<[Self]> {
        Arc::from([Self { reason: Some(reason.into()), ..Self::default() }])
    }
}

struct Request {
    path: PathBuf,
    offsets: Vec<u64>,
    answer: Sender<Vec<Arc<[Name]>>>,
}

/// The thread that knows names. It ends when this is dropped.
#[derive(Debug)]
pub struct Names {
    requests: Sender<Request>,
}

impl Names {
    pub fn start() -> io::Result<Self> {
        let (requests, receiver) = mpsc::channel();
        // Deeply nested types and names recurse.
        thread::Builder::new().name("symbols".to_owned()).stack_size(8 << 20).spawn(move || serve(&receiver))?;
        Ok(Self { requests })
    }

    /// The functions at each of the file offsets, innermost first. As many as there are offsets, and each at least one.
    pub fn look_up(&self, module: &Module, offsets: &[u64]) -> Vec<Arc<[Name]>> {
        let Some(path) = module.path_to_open() else {
            return vec![Name::none("the file could not be opened"); offsets.len()];
        };
        let (answer, receiver) = mpsc::channel();
        let sent = self.requests.send(Request { path, offsets: offsets.to_vec(), answer }).ok();
        let found = sent.and_then(|()| receiver.recv().ok());
        found.unwrap_or_else(|| vec![Name::none("the thread that reads symbols has ended"); offsets.len()])
    }
}

fn serve(requests: &Receiver<Request>) {
    let mut symbolizer = new_symbolizer();
    while let Ok(Request { path, offsets, answer }) = requests.recv() {
        // AssertUnwindSafe: after a panic the symbolizer is not used again.
        let found = catch_unwind(AssertUnwindSafe(|| look_up(&symbolizer, &path, &offsets)));
        let found = found.unwrap_or_else(|_| {
            symbolizer = new_symbolizer();
            vec![Name::none("the file's symbols could not be read: they are damaged"); offsets.len()]
        });
        // Whoever asked may be gone.
        let _ = answer.send(found);
    }
}

fn new_symbolizer() -> Symbolizer {
    // Demangled here: blazesym does not tell the language, but a mangled name does.
    Symbolizer::builder().enable_code_info(true).enable_inlined_fns(true).enable_demangling(false).build()
}

fn look_up(symbolizer: &Symbolizer, path: &Path, offsets: &[u64]) -> Vec<Arc<[Name]>> {
    let symbolize = |debug_syms, offsets: &[u64]| {
        let mut elf = Elf::new(path);
        elf.debug_syms = debug_syms;
        symbolizer.symbolize(&Source::Elf(elf), Input::FileOffset(offsets))
    };
    // Damaged debug information, or some that belongs to another build, is no reason to do without symbols.
    let plain = |offset| match symbolize(false, &[offset]) {
        Ok(found) => found.first().map_or_else(|| Name::none("no answer"), |found| names_of(found)),
        Err(error) => Name::none(format!("the file's symbols could not be read: {error}")),
    };
    match symbolize(true, offsets) {
        Ok(found) if found.len() == offsets.len() => {
            let names = found.iter().zip(offsets).map(|(found, &offset)| match found {
                Symbolized::Sym(sym) if !sym.name.is_empty() => names_of(found),
                Symbolized::Unknown(reason) if *reason != Reason::IgnoredError => names_of(found),
                _ => plain(offset),
            });
            names.collect()
        }
        _ => offsets.iter().map(|&offset| plain(offset)).collect(),
    }
}

fn names_of(found: &Symbolized) -> Arc<[Name]> {
    match found {
        Symbolized::Sym(sym) if !sym.name.is_empty() => functions(sym),
        Symbolized::Sym(_) => Name::none("the symbol at this address has no name"),
        Symbolized::Unknown(reason) => Name::none(match reason {
            Reason::MissingSyms => "the file has no symbols (stripped)",
            Reason::UnknownAddr => "no symbol covers this address",
            Reason::InvalidFileOffset => "the file is shorter than what is mapped of it",
            _ => "the file's symbols could not be read",
        }),
    }
}

/// The function and what is inlined at the address, innermost first.
fn functions(sym: &Sym) -> Arc<[Name]> {
    let name = |function: &str, code: Option<&CodeInfo>, inlined| {
        let file = code.map(|code| code.to_path().to_string_lossy().into_owned());
        let (function, by_name) = demangle(function);
        let language = by_name.or_else(|| file.as_deref().and_then(language_of));
        Name { function: Some(function), line: code.and_then(|c| c.line), file, inlined, language, reason: None }
    };
    let inlined = sym.inlined.iter().rev().map(|inlined| name(&inlined.name, inlined.code_info.as_ref(), true));
    let outermost = name(&sym.name, sym.code_info.as_deref(), false);
    inlined.chain(std::iter::once(outermost)).collect()
}

/// By the ending of a source file's name.
fn language_of(file: &str) -> Option<&'static str> {
    let ending = Path::new(file).extension()?.to_str()?;
    Some(match ending {
        "c" => "c",
        "cc" | "cpp" | "cxx" | "c++" | "C" | "hh" | "hpp" | "hxx" | "tcc" => "c++",
        "rs" => "rust",
        "go" => "go",
        "zig" => "zig",
        "d" => "d",
        "swift" => "swift",
        "f" | "f77" | "f90" | "f95" | "f03" | "f08" | "for" => "fortran",
        "s" | "S" | "asm" => "assembly",
        _ => return None,
    })
}

/// The name as in the source, and the language that it was mangled for.
fn demangle(name: &str) -> (String, Option<&'static str>) {
    if let Ok(symbol) = rustc_demangle::try_demangle(name) {
        let mut text = Bounded::default();
        // An error is only the bound.
        let _ = write!(text, "{symbol:#}");
        return (text.finish(), Some("rust"));
    }
    if name.starts_with("_Z") {
        let mut text = Bounded::default();
        let options = cpp_demangle::DemangleOptions::default();
        if let Ok(symbol) = cpp_demangle::Symbol::new(name)
            && (symbol.structured_demangle(&mut text, &options).is_ok() || text.full)
        {
            return (text.finish(), Some("c++"));
        }
    }
    let mut text = Bounded::default();
    let _ = text.write_str(name);
    (text.finish(), None)
}

/// A text of up to [`MAX_NAME`] bytes.
#[derive(Default)]
struct Bounded {
    text: String,
    full: bool,
}

impl Bounded {
    fn finish(mut self) -> String {
        if self.full {
            self.text.push('…');
        }
        self.text
    }
}

impl Write for Bounded {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        if self.full {
            return Err(fmt::Error);
        }
        let room = MAX_NAME - self.text.len();
        self.full = s.len() > room;
        self.text.push_str(&s[..s.floor_char_boundary(room)]);
        if self.full { Err(fmt::Error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mangled names of Rust, old and new, and C++ tell their language; others are left alone.
    #[test]
    fn demangles() {
        let cases = [
            ("_ZN4core3ptr13drop_in_place17h0123456789abcdefE", "core::ptr::drop_in_place", Some("rust")),
            ("_RNvC6_123foo3bar", "123foo::bar", Some("rust")),
            ("_ZN3Foo3barEi", "Foo::bar(int)", Some("c++")),
            ("_Znwm", "operator new(unsigned long)", Some("c++")),
            ("main", "main", None),
            ("_ZN", "_ZN", None),
        ];
        for (mangled, name, language) in cases {
            assert_eq!(demangle(mangled), (name.to_owned(), language), "{mangled}");
        }
    }

    /// Names of any length are cut off at a bound, also those that grow only when they are demangled.
    #[test]
    fn long_names_are_cut() {
        let plain = "ä".repeat(MAX_NAME);
        let (cut, _) = demangle(&plain);
        assert_eq!(cut.len(), MAX_NAME + '…'.len_utf8());
        // Each parameter is a pair of the one before: doubles each time.
        let doubling = format!("_Z1fSt4pairIiiE{}", (0..30).fold(String::new(), |s, _| s + "S_IS0_S0_E"));
        assert!(demangle(&doubling).0.len() <= MAX_NAME + 3);
    }

    /// The ending of the source file tells the language of what is not mangled.
    #[test]
    fn languages() {
        assert_eq!(language_of("/src/a.c"), Some("c"));
        assert_eq!(language_of("lib.rs"), Some("rust"));
        assert_eq!(language_of("Makefile"), None);
    }

    /// Damage anywhere in a file and its debug information gives names or reasons, one or more for each offset, and no panic
    /// that reaches whoever asks.
    #[test]
    fn damaged_files() {
        use proptest::prelude::*;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (source, program) = (folder.path().join("a.c"), folder.path().join("a"));
        std::fs::write(&source, "int f(int n) { return n * 3; }\nint main(void) { return f(4); }\n").expect("a file");
        let compiler = std::process::Command::new("cc").arg("-g").arg("-o").arg(&program).arg(&source).status();
        assert!(compiler.is_ok_and(|status| status.success()));
        let bytes = std::fs::read(&program).expect("the program can be read");
        let offsets = [0, 64, 0x1000, 0x1129, 0x1140, u64::MAX];
        let path = folder.path().join("damaged");
        let damage = proptest::collection::vec((0..bytes.len(), any::<u8>()), 1..200);
        proptest!(ProptestConfig::with_cases(64), |(damage in damage)| {
            let mut bytes = bytes.clone();
            for (at, value) in damage {
                bytes[at] = value;
            }
            std::fs::write(&path, bytes).expect("the file can be written");
            let (requests, receiver) = mpsc::channel();
            let (answer, answers) = mpsc::channel();
            requests.send(Request { path: path.clone(), offsets: offsets.to_vec(), answer }).expect("it is received");
            drop(requests);
            serve(&receiver);
            let found = answers.recv().expect("an answer");
            prop_assert_eq!(found.len(), offsets.len());
            for names in found {
                prop_assert!(!names.is_empty());
                prop_assert!(names.iter().all(|n| n.function.is_some() != n.reason.is_some()));
            }
        });
    }
}

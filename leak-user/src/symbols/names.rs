//! Names of functions and lines for offsets of files, by blazesym.
//!
//! blazesym's symbolizer cannot be sent between threads and may panic on a damaged file, so a thread of its own has it. It
//! maps files into memory: a library that its owner cuts short while it is read here ends this program with SIGBUS.

use super::debug_files::{Source, Sources, path_by_build_id};
use super::image::Image;
use super::space::Module;
use crate::privileges::Keep;
use blazesym::symbolize::source::{self, Elf};
use blazesym::symbolize::{CodeInfo, Input, Reason, Sym, Symbolized, Symbolizer};
use std::fmt::{self, Write};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
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

enum Request {
    LookUp(LookUp),
    /// Everything that was read so far.
    Forget,
}

struct LookUp {
    module: Arc<Module>,
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

    /// Lets go of what was read from files.
    pub fn forget(&self) {
        // If the thread has ended there is nothing to forget.
        let _ = self.requests.send(Request::Forget);
    }

    /// The functions at each of the file offsets, innermost first. As many as there are offsets, and each at least one.
    pub fn look_up(&self, module: &Arc<Module>, offsets: &[u64]) -> Vec<Arc<[Name]>> {
        let (answer, receiver) = mpsc::channel();
        let request = Request::LookUp(LookUp { module: Arc::clone(module), offsets: offsets.to_vec(), answer });
        let sent = self.requests.send(request).ok();
        let found = sent.and_then(|()| receiver.recv().ok());
        found.unwrap_or_else(|| vec![Name::none("the thread that reads symbols has ended"); offsets.len()])
    }
}

fn serve(requests: &Receiver<Request>) {
    Keep::Reading.only();
    let mut reader = Reader::new();
    while let Ok(request) = requests.recv() {
        let Request::LookUp(LookUp { module, offsets, answer }) = request else {
            reader = Reader::new();
            continue;
        };
        // AssertUnwindSafe: what panicked is made anew, or was not made at all.
        let found = catch_unwind(AssertUnwindSafe(|| match module.sources() {
            Some(sources) => reader.look_up(sources, &offsets),
            None => vec![Name::none("the file could not be opened"); offsets.len()],
        }));
        let found = found.unwrap_or_else(|_| {
            reader = Reader::new();
            vec![Name::none("the file's symbols could not be read: they are damaged"); offsets.len()]
        });
        // Whoever asked may be gone.
        let _ = answer.send(found);
    }
}

/// What one file says of one address.
enum Found {
    Names(Arc<[Name]>),
    /// The file has no symbols at all.
    Stripped,
    /// It has, but none for this address.
    NotCovered,
    Error(String),
}

/// blazesym, kept from following links that files hold.
struct Reader {
    symbolizer: Symbolizer,
    /// The only folder in which blazesym looks for files that others refer to. It is there only while it is needed.
    links: PathBuf,
}

impl Reader {
    fn new() -> Self {
        let name = format!("leaktrace-{}-{:016x}", std::process::id(), random());
        let links = std::env::temp_dir().join(name);
        Self { symbolizer: new_symbolizer(&links), links }
    }

    fn look_up(&mut self, sources: &Sources, offsets: &[u64]) -> Vec<Arc<[Name]>> {
        let Some(image) = &sources.image else {
            return vec![Name::none("the file is no ELF file, or a damaged one"); offsets.len()];
        };
        let addresses: Vec<Option<u64>> = offsets.iter().map(|&offset| image.address_of(offset)).collect();
        let mut names: Vec<Option<Arc<[Name]>>> = vec![None; offsets.len()];
        let mut reasons: Vec<Option<String>> = vec![None; offsets.len()];
        for source in &sources.files {
            let asked: Vec<usize> =
                (0..offsets.len()).filter(|&i| addresses[i].is_some() && names[i].is_none()).collect();
            if asked.is_empty() {
                break;
            }
            let asked_for: Vec<u64> = asked.iter().filter_map(|&i| addresses[i]).collect();
            for (&i, found) in asked.iter().zip(self.ask(source, image, &asked_for)) {
                match found {
                    Found::Names(found) => names[i] = Some(found),
                    Found::Stripped => {}
                    Found::NotCovered => reasons[i] = Some("no symbol covers this address".to_owned()),
                    Found::Error(error) => {
                        reasons[i].get_or_insert(format!("the file's symbols could not be read: {error}"));
                    }
                }
            }
        }
        let reason = |i: usize| {
            let reason = match addresses[i] {
                None => "the file holds no code at this offset".to_owned(),
                Some(_) => reasons[i].clone().unwrap_or_else(|| "the file has no symbols (stripped)".to_owned()),
            };
            Name::none(sources.rejected.map_or(reason.clone(), |why| format!("{reason}; {why}")))
        };
        names.into_iter().enumerate().map(|(i, names)| names.unwrap_or_else(|| reason(i))).collect()
    }

    /// What one file says of addresses; as many answers as there are addresses.
    fn ask(&mut self, source: &Source, image: &Image, addresses: &[u64]) -> Vec<Found> {
        // AssertUnwindSafe: after a panic the symbolizer is not used again.
        let answer = catch_unwind(AssertUnwindSafe(|| -> Result<Vec<Found>, String> {
            let mut elf = Elf::new(source.path());
            elf.debug_syms = source.debug_info;
            let _links = source.supplement.as_ref().map(|s| Links::make(&self.links, &s.build_id, &s.path()));
            let found = self.symbolizer.symbolize(&source::Source::Elf(elf), Input::VirtOffset(addresses));
            let found = found.map_err(|error| error.to_string())?;
            Ok(found.iter().zip(addresses).map(|(found, &at)| names_of(found, at, image)).collect())
        }));
        let error = match answer {
            Ok(Ok(found)) if found.len() == addresses.len() => return found,
            Ok(Ok(_)) => "no answer".to_owned(),
            Ok(Err(error)) => error,
            Err(_) => {
                self.symbolizer = new_symbolizer(&self.links);
                "they are damaged".to_owned()
            }
        };
        addresses.iter().map(|_| Found::Error(error.clone())).collect()
    }
}

fn new_symbolizer(links: &Path) -> Symbolizer {
    // Demangled here: blazesym does not tell the language, but a mangled name does.
    let builder = Symbolizer::builder().enable_code_info(true).enable_inlined_fns(true).enable_demangling(false);
    builder.set_debug_dirs(Some([links])).build()
}

/// What sources have for file offsets, without a thread.
#[cfg(test)]
pub fn look_up(sources: &Sources, offsets: &[u64]) -> Vec<Arc<[Name]>> {
    Reader::new().look_up(sources, offsets)
}

/// A number that nobody can foresee.
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(())
}

/// The folder in which blazesym finds one supplementary file by its build id. Removed when dropped; blazesym has opened the
/// file by then.
struct Links(Vec<PathBuf>);

impl Links {
    fn make(folder: &Path, build_id: &[u8], target: &Path) -> io::Result<Self> {
        let mut made = Self(Vec::new());
        let link = path_by_build_id(folder, build_id).ok_or_else(|| io::Error::other("no build id"))?;
        let inside: Vec<&Path> = link.ancestors().skip(1).take_while(|path| path.starts_with(folder)).collect();
        for folder in inside.into_iter().rev() {
            // Fails where it exists: then it is somebody else's.
            std::fs::DirBuilder::new().mode(0o700).create(folder)?;
            made.0.push(folder.to_path_buf());
        }
        symlink(target, &link)?;
        made.0.push(link);
        Ok(made)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        while let Some(path) = self.0.pop() {
            let removed = if path.is_symlink() { std::fs::remove_file(&path) } else { std::fs::remove_dir(&path) };
            if let Err(error) = removed {
                log::debug!("failed to remove {}: {error}", path.display());
            }
        }
    }
}

/// What blazesym says of an address.
fn names_of(found: &Symbolized, address: u64, image: &Image) -> Found {
    match found {
        // A symbol without a size is taken to reach up to the next one; but not beyond its section: from `_init`, say, into
        // a function that has lost its symbol.
        Symbolized::Sym(sym) if sym.size.is_none() && sym.addr != 0 && !image.in_one_section(sym.addr, address) => {
            Found::NotCovered
        }
        Symbolized::Sym(sym) if !sym.name.is_empty() => Found::Names(functions(sym)),
        Symbolized::Sym(_) | Symbolized::Unknown(Reason::UnknownAddr) => Found::NotCovered,
        Symbolized::Unknown(Reason::MissingSyms) => Found::Stripped,
        Symbolized::Unknown(reason) => Found::Error(reason.to_string()),
    }
}

/// The function and what is inlined at the address, innermost first.
fn functions(sym: &Sym) -> Arc<[Name]> {
    let name = |function: &str, code: Option<&CodeInfo>, inlined| {
        let file = code.map(|code| code.to_path().to_string_lossy().into_owned());
        let (function, by_name) = demangle(function);
        let language = by_name.or_else(|| file.as_deref().and_then(language_of));
        // blazesym does not follow an inlined function's name into a file that is shared by several.
        let reason = function.is_empty().then(|| "the debug information gives the inlined function no name".to_owned());
        let function = Some(function).filter(|function| !function.is_empty());
        Name { function, line: code.and_then(|c| c.line).filter(|&line| line > 0), file, inlined, language, reason }
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
pub fn demangle(name: &str) -> (String, Option<&'static str>) {
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
            let file = std::fs::File::open(&path).expect("the file can be opened");
            let (requests, receiver) = mpsc::channel();
            let (answer, answers) = mpsc::channel();
            let module = Module::of_file(path.clone(), file);
            requests.send(Request::LookUp(LookUp { module, offsets: offsets.to_vec(), answer })).expect("it is received");
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

//! Compiles the fixtures of `tests/fixtures`, once per content, compiler and flags. On a machine without a compiler they are taken
//! from a folder that somebody else has filled, as `cargo xtask vm` does.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What fixtures include, so these count into each one's hash.
const HEADERS: [&str; 3] = ["fixture.h", "blocks.h", "stacks.h"];

/// Names a folder with compiled fixtures, each under its [`Program::file_name`]. Nothing is compiled then.
pub const PREBUILT_VARIABLE: &str = "LEAKTRACE_FIXTURES";

/// Frame pointers and calls that stay calls: what the stacks are compared with are function names.
const DEFAULT_FLAGS: [&str; 7] =
    ["-g", "-O2", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls", "-fno-builtin", "-fno-ipa-icf", "-pthread"];

/// A Rust program as it is released, with debug information.
const RUST_FLAGS: [&str; 6] =
    ["--edition=2024", "-Copt-level=3", "-Cdebuginfo=2", "-Ccodegen-units=1", "-D", "warnings"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Language {
    C,
    Cpp,
    Rust,
}

impl Language {
    /// What every program in it is compiled with.
    fn flags(self) -> &'static [&'static str] {
        if self == Self::Rust { &RUST_FLAGS } else { &DEFAULT_FLAGS }
    }
}

/// A fixture's source and how to compile it.
#[derive(Debug, Clone)]
pub struct Program {
    language: Language,
    /// Instead of the system's own compiler for the language.
    other_compiler: Option<OsString>,
    source: PathBuf,
    name: String,
    flags: Vec<String>,
    /// What stands behind the source, for the linker.
    libraries: Vec<String>,
}

impl Program {
    /// The C program `tests/fixtures/NAME.c`.
    pub fn c(name: &str) -> Self {
        Self::new(Language::C, name, "c")
    }

    /// The C++ program `tests/fixtures/NAME.cpp`.
    pub fn cpp(name: &str) -> Self {
        Self::new(Language::Cpp, name, "cpp")
    }

    /// The Rust program `tests/fixtures/NAME.rs`, optimised; its frame pointers are as rustc has them by default.
    pub fn rust(name: &str) -> Self {
        Self::new(Language::Rust, name, "rs")
    }

    fn new(language: Language, name: &str, extension: &str) -> Self {
        Self {
            language,
            other_compiler: None,
            source: fixtures().join(name).with_extension(extension),
            name: name.to_owned(),
            flags: language.flags().iter().map(|&flag| flag.to_owned()).collect(),
            libraries: Vec::new(),
        }
    }

    /// As distributions build: the frame pointer is a register like any other, and a call at a function's end is a jump.
    #[must_use]
    pub fn without_frame_pointers(self) -> Self {
        if self.language == Language::Rust {
            return self.flag("-Cforce-frame-pointers=no");
        }
        self.flag("-fomit-frame-pointer").flag("-foptimize-sibling-calls").flag("-DNO_FRAME_POINTER")
    }

    /// A library to be loaded by a fixture.
    #[must_use]
    pub fn library(self) -> Self {
        self.flag("-shared").flag("-fPIC")
    }

    fn compiler(&self) -> OsString {
        if let Some(compiler) = &self.other_compiler {
            return compiler.clone();
        }
        match self.language {
            Language::C => "cc".into(),
            Language::Cpp => "c++".into(),
            Language::Rust => env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()),
        }
    }

    /// Adds a flag after the usual ones, which it can thereby undo (`-fomit-frame-pointer`, `-static`).
    #[must_use]
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// Links a library (`-ljemalloc`) or an archive, after what is given already.
    #[must_use]
    pub fn link(mut self, library: &str) -> Self {
        self.libraries.push(library.to_owned());
        self
    }

    /// Whether it is in C++, so that the compiler for it is another.
    pub fn is_cpp(&self) -> bool {
        self.language == Language::Cpp
    }

    /// Compiles with this instead of the system's own compiler: for another machine.
    #[must_use]
    pub fn with_compiler(mut self, compiler: impl Into<OsString>) -> Self {
        self.other_compiler = Some(compiler.into());
        self
    }

    /// What it is called among compiled fixtures: its name, then the flags on top of the usual ones.
    pub fn file_name(&self) -> String {
        let stem = self.source.file_stem().unwrap_or_default().to_string_lossy();
        let usual = self.language.flags().len();
        self.flags.iter().skip(usual).chain(&self.libraries).fold(stem.into_owned(), |name, flag| name + flag)
    }

    /// The compiled program. Compiles only if this content has not been compiled with these flags yet.
    pub fn build(&self) -> Result<PathBuf> {
        if let Some(folder) = env::var_os(PREBUILT_VARIABLE) {
            let program = Path::new(&folder).join(self.file_name());
            if !program.is_file() {
                bail!("failed to find {}, which cannot be compiled here", program.display());
            }
            return Ok(program);
        }
        let folder = target_dir()?.join("fixtures");
        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        let mut hasher = DefaultHasher::new();
        for file in iter::once(self.source.clone()).chain(HEADERS.map(|header| fixtures().join(header))) {
            fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?.hash(&mut hasher);
        }
        self.language.hash(&mut hasher);
        self.other_compiler.hash(&mut hasher);
        self.flags.hash(&mut hasher);
        self.libraries.hash(&mut hasher);
        // The name alone is a folder: the program's own name is what /proc shows as comm.
        let folder = folder.join(format!("{:016x}", hasher.finish()));
        let program = folder.join(&self.name);
        if program.is_file() {
            return Ok(program);
        }

        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        // Compiled aside and renamed, so that tests running at the same time see a whole program or none.
        let unfinished = tempfile::Builder::new()
            .prefix(&self.name)
            .tempdir_in(&folder)
            .with_context(|| format!("failed to create a folder in {}", folder.display()))?;
        let output_file = unfinished.path().join(&self.name);
        let compiler = self.compiler();
        let mut command = Command::new(&compiler);
        command.args(&self.flags);
        if self.language == Language::Rust {
            // The pinned toolchain is the one of this folder.
            command.current_dir(env!("CARGO_MANIFEST_DIR"));
        } else {
            command.args(["-Wall", "-Wextra", "-Werror"]);
        }
        let output = command
            .arg("-o")
            .arg(&output_file)
            .arg(&self.source)
            .args(&self.libraries)
            .output()
            .with_context(|| format!("failed to start {}", compiler.display()))?;
        if !output.status.success() {
            bail!("failed to compile {}:\n{}", self.source.display(), String::from_utf8_lossy(&output.stderr));
        }
        fs::rename(&output_file, &program).with_context(|| format!("failed to move {}", program.display()))?;
        Ok(program)
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// cargo's target folder, wherever it was put: the one that this very program was built in.
pub fn target_dir() -> Result<PathBuf> {
    let this = env::current_exe().context("failed to find the path of this program")?;
    // cargo marks the root of a target folder with this file.
    let root = this.ancestors().skip(1).find(|folder| folder.join("CACHEDIR.TAG").is_file());
    // Named for tools that run a test binary outside of it.
    let named =
        || this.ancestors().find(|folder| folder.file_name() == Some(OsStr::new("target"))).map(Path::to_path_buf);
    root.map(Path::to_path_buf)
        .or_else(named)
        .with_context(|| format!("failed to find cargo's target folder above {}", this.display()))
}

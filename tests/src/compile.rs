//! Compiles the fixtures of `tests/fixtures` with the system's compiler, once per content and flags.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What fixtures include, so these count into each one's hash.
const HEADERS: [&str; 2] = ["fixture.h", "stacks.h"];

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

/// A fixture's source and how to compile it.
#[derive(Debug, Clone)]
pub struct Program {
    language: Language,
    source: PathBuf,
    name: String,
    flags: Vec<String>,
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
        let flags: &[&str] = if language == Language::Rust { &RUST_FLAGS } else { &DEFAULT_FLAGS };
        Self {
            language,
            source: fixtures().join(name).with_extension(extension),
            name: name.to_owned(),
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
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

    /// The compiled program. Compiles only if this content has not been compiled with these flags yet.
    pub fn build(&self) -> Result<PathBuf> {
        let folder = target_dir()?.join("fixtures");
        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        let mut hasher = DefaultHasher::new();
        for file in iter::once(self.source.clone()).chain(HEADERS.map(|header| fixtures().join(header))) {
            fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?.hash(&mut hasher);
        }
        self.language.hash(&mut hasher);
        self.flags.hash(&mut hasher);
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

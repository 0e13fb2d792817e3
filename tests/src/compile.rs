//! Compiles the fixtures of `tests/fixtures` with the system's compiler, once per content and flags.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Included by every fixture, so it counts into each one's hash.
const HEADER: &str = "fixture.h";

/// Frame pointers and calls that stay calls: what the stacks are compared with are function names.
const DEFAULT_FLAGS: [&str; 7] =
    ["-g", "-O2", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls", "-fno-builtin", "-fno-ipa-icf", "-pthread"];

/// A fixture's source and how to compile it.
#[derive(Debug, Clone)]
pub struct Program {
    compiler: &'static str,
    source: PathBuf,
    name: String,
    flags: Vec<String>,
}

impl Program {
    /// The C program `tests/fixtures/NAME.c`.
    pub fn c(name: &str) -> Self {
        Self::new("cc", name, "c")
    }

    /// The C++ program `tests/fixtures/NAME.cpp`.
    pub fn cpp(name: &str) -> Self {
        Self::new("c++", name, "cpp")
    }

    fn new(compiler: &'static str, name: &str, extension: &str) -> Self {
        Self {
            compiler,
            source: fixtures().join(name).with_extension(extension),
            name: name.to_owned(),
            flags: DEFAULT_FLAGS.map(str::to_owned).to_vec(),
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
        for file in [&self.source, &fixtures().join(HEADER)] {
            fs::read(file).with_context(|| format!("failed to read {}", file.display()))?.hash(&mut hasher);
        }
        self.compiler.hash(&mut hasher);
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
        let output = Command::new(self.compiler)
            .args(&self.flags)
            .args(["-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&output_file)
            .arg(&self.source)
            .output()
            .with_context(|| format!("failed to start {}", self.compiler))?;
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

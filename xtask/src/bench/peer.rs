//! The peer: bcc's memleak in its libbpf build, from PATH or brought here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use leaktrace_tests::target_dir;

use crate::process::{check, find_in_path, root};

/// How distributions call it. The python build is another program (`memleak-bpfcc`).
const NAMES: [&str; 2] = ["memleak", "memleak-libbpf"];

/// Installs it from Debian packages into the folder that it is given; beside the repository, not in it.
const SCRIPT: &str = "../shared/peers/install-memleak.sh";

/// One that the user has.
pub fn in_path() -> Option<PathBuf> {
    NAMES.iter().find_map(find_in_path)
}

/// A memleak that runs, or why there is none.
pub fn find(named: Option<&Path>) -> Result<PathBuf, String> {
    let found = match named {
        Some(path) => Ok(path.to_owned()),
        None => in_path().map_or_else(install, Ok),
    };
    found.and_then(try_out).map_err(|error| format!("{error:#}"))
}

fn install() -> Result<PathBuf> {
    let prefix = target_dir()?.join("peers");
    let memleak = prefix.join("memleak");
    if memleak.is_file() {
        return Ok(memleak);
    }
    let script = root().join(SCRIPT);
    if !script.is_file() {
        bail!("there is no memleak in PATH (on Debian: apt-get install libbpf-tools)");
    }
    eprintln!("bench: installing memleak into {}", prefix.display());
    fs::create_dir_all(&prefix).with_context(|| format!("failed to create {}", prefix.display()))?;
    check(Command::new("sh").arg(&script).arg(&prefix).stdin(Stdio::null()).stdout(Stdio::null()), "install memleak")?;
    Ok(memleak)
}

fn try_out(memleak: PathBuf) -> Result<PathBuf> {
    let output = Command::new(&memleak).arg("--help").stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("failed to start {}", memleak.display()))?;
    if !output.status.success() {
        bail!("{} does not run: {}", memleak.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(memleak)
}

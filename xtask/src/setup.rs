//! Brings what the BPF build needs: rust-src, and a bpf-linker for the toolchain's own LLVM.
//!
//! bpf-linker links the bitcode that rustc emits, so its LLVM must be rustc's. No LLVM package is needed for that: the shared
//! library that the toolchain itself brings is linked. All of it stays in `target/tools`. A stamp names the toolchain that it was
//! built for, so set-up is done again after a change of toolchain and otherwise takes no time. How the programs are then
//! built is left to leak-user's build script.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{capture, cargo, check, find_in_path, root};

/// The newest bpf-linker that builds against the LLVM of the pinned toolchain.
const BPF_LINKER: &str = "0.13.0";

pub fn setup() -> Result<()> {
    require_c_compiler()?;
    let toolchain = Toolchain::pinned()?;
    rust_src(&toolchain)?;
    bpf_linker(&toolchain)
}

/// Where the tools live; leak-user's build script looks in the same place.
pub fn tools() -> PathBuf {
    env::var_os("LEAKTRACE_TOOLS").map_or_else(|| root().join("target/tools"), PathBuf::from)
}

/// What set-up has to know of the toolchain that `rust-toolchain.toml` pins.
struct Toolchain {
    /// `rustc -vV`: version, commit, host and LLVM.
    version: String,
    sysroot: PathBuf,
}

impl Toolchain {
    fn pinned() -> Result<Self> {
        let rustc = || {
            let mut command = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
            command.current_dir(root());
            command
        };
        let version = capture(rustc().arg("-vV"))?;
        let sysroot = PathBuf::from(capture(rustc().args(["--print", "sysroot"]))?.trim_end());
        Ok(Self { version, sysroot })
    }

    /// A line of `rustc -vV`, such as `release` or `LLVM version`.
    fn field(&self, name: &str) -> Result<&str> {
        self.version
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .with_context(|| format!("failed to find `{name}` in the output of rustc -vV"))
    }

    /// The LLVM that rustc itself is linked with, such as `lib/libLLVM.so.22.1-rust-1.95.0-stable`.
    fn llvm(&self) -> Result<PathBuf> {
        let folder = self.sysroot.join("lib");
        let entries = fs::read_dir(&folder).with_context(|| format!("failed to read {}", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("failed to read {}", folder.display()))?;
            if entry.file_name().to_string_lossy().starts_with("libLLVM.so.") {
                return Ok(entry.path());
            }
        }
        bail!(
            "failed to find the toolchain's LLVM: there is no libLLVM.so.* in {}; the BPF build needs the toolchain that \
             rustup installs",
            folder.display()
        )
    }
}

/// cargo itself could not have built this program without one, but the demo and the test fixtures call it by this name.
fn require_c_compiler() -> Result<()> {
    if find_in_path("cc").is_none() {
        bail!("failed to find a C compiler: there is no cc in PATH (on Debian: apt-get install gcc libc6-dev)");
    }
    Ok(())
}

/// The source of core: there is no compiled core for the BPF target.
fn rust_src(toolchain: &Toolchain) -> Result<()> {
    let core = toolchain.sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
    if core.is_file() {
        return Ok(());
    }
    let release = toolchain.field("release")?;
    if find_in_path("rustup").is_none() {
        bail!("failed to install rust-src {release}: there is no rustup, and {} is missing", core.display());
    }
    eprintln!("setup: installing rust-src {release}");
    check(
        Command::new("rustup").current_dir(root()).args(["component", "add", "rust-src", "--toolchain", release]),
        "install rust-src",
    )
}

fn bpf_linker(toolchain: &Toolchain) -> Result<()> {
    let tools = tools();
    let linker = tools.join("bin/bpf-linker");
    let stamp = tools.join("bpf-linker.stamp");
    // The run path is absolute, so the place of the toolchain counts too.
    let wanted = format!("bpf-linker {BPF_LINKER}\n{}sysroot: {}\n", toolchain.version, toolchain.sysroot.display());
    let is_done = || linker.is_file() && fs::read_to_string(&stamp).is_ok_and(|found| found == wanted);
    if is_done() {
        return Ok(());
    }

    fs::create_dir_all(&tools).with_context(|| format!("failed to create {}", tools.display()))?;
    let lock = tools.join("lock");
    let lock = File::create(&lock).with_context(|| format!("failed to create {}", lock.display()))?;
    lock.lock().context("failed to wait for another set-up")?;
    if is_done() {
        return Ok(());
    }

    let llvm = toolchain.llvm()?;
    let llvm_version = toolchain.field("LLVM version")?;
    let llvm_major = llvm_version.split('.').next().unwrap_or(llvm_version);
    eprintln!("setup: building bpf-linker {BPF_LINKER} for LLVM {llvm_version} (about a minute, once)");
    // bpf-linker's build looks for LLVM under a prefix of its own and by the name without a version.
    let prefix = tools.join("llvm");
    link_anew(&llvm, &prefix.join("lib/libLLVM.so"))?;
    let build = tools.join("build");
    let lib = toolchain.sysroot.join("lib");
    let mut install = cargo();
    install
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force", "--no-default-features"])
        .args(["--features", &format!("llvm-{llvm_major}")])
        .arg("--root")
        .arg(&tools)
        .arg("--target-dir")
        .arg(&build)
        .env("LLVM_PREFIX", &prefix)
        // cargo would advise to add the folder to PATH, which nobody needs.
        .env("PATH", path_with(&tools.join("bin"))?)
        .env("CARGO_ENCODED_RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", lib.display()));
    // A build for another target, or one under clippy or a wrapper, is not what is wanted of a tool.
    for name in ["CARGO_BUILD_TARGET", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"] {
        install.env_remove(name);
    }
    check(&mut install, "build bpf-linker")?;
    capture(Command::new(&linker).arg("--version")).context("failed to try the bpf-linker that was just built")?;
    fs::remove_dir_all(&build).with_context(|| format!("failed to remove {}", build.display()))?;
    fs::write(&stamp, wanted).with_context(|| format!("failed to write {}", stamp.display()))
}

/// This process's PATH with `folder` at its end.
pub fn path_with(folder: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths(env::split_paths(&path).chain([folder.to_path_buf()]))
        .with_context(|| format!("failed to add {} to PATH", folder.display()))
}

/// Makes `link` point to `target`, whatever it pointed to before.
fn link_anew(target: &Path, link: &Path) -> Result<()> {
    let folder = link.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    if link.is_symlink() {
        fs::remove_file(link).with_context(|| format!("failed to remove {}", link.display()))?;
    }
    symlink(target, link).with_context(|| format!("failed to link {} to {}", link.display(), target.display()))
}

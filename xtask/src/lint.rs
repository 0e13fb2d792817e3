//! `cargo xtask lint`: formatting, lints, and that the fuzz targets build.

use std::env;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use leaktrace_tests::target_dir;
use nix::libc;
use nix::sys::signal::Signal;

use crate::process::{cargo, check, root};
use crate::setup::setup;

/// What leak-ebpf is built with, on top of what its target says.
const BPF_TARGET: &str = "bpfel-unknown-none";

/// Checks formatting and lints, host and BPF side, and that the fuzz targets build.
pub fn lint() -> Result<()> {
    setup()?;
    formatting()?;
    check_fuzz_targets()?;
    check(
        cargo()
            .args(["clippy", "--workspace", "--exclude", "leak-ebpf", "--all-targets", "--quiet"])
            .arg("--target-dir")
            .arg(folder()?)
            .args(["--", "-D", "warnings"]),
        "pass clippy",
    )?;
    check(
        cargo()
            .args(["clippy", "--package", "leak-ebpf", "--release", "--quiet", "--target", BPF_TARGET])
            .args(["-Z", "build-std=core"])
            .arg("--target-dir")
            .arg(root().join("target/bpf/lint"))
            .args(["--", "-D", "warnings"])
            // A call costs BPF code its few registers, and the probes' signatures are what aya's macros call.
            .args(["-A", "clippy::inline-always", "-A", "clippy::needless-pass-by-value"])
            .env("RUSTC_BOOTSTRAP", "1")
            // As leak-user's build script has it.
            .env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH)),
        "pass clippy for the BPF programs",
    )
}

/// The fuzz targets include modules of leak-user by their paths, so a change there can break them; they are no part of the workspace.
fn check_fuzz_targets() -> Result<()> {
    check(
        cargo()
            .args(["clippy", "--locked", "--quiet", "--manifest-path"])
            .arg(fuzz_targets())
            .arg("--target-dir")
            .arg(folder()?)
            .args(["--", "-D", "warnings"])
            // Nothing is linked, so libFuzzer's own code, which takes longest to build, need not be there.
            .env("CUSTOM_LIBFUZZER_PATH", "/nowhere/libFuzzer.a"),
        "build the fuzz targets",
    )
}

/// Where clippy keeps what it has built: not where tests are built and run, so that neither waits for the other. The fuzz targets use
/// some of the same packages.
fn folder() -> Result<PathBuf> {
    Ok(target_dir()?.join("lint"))
}

fn fuzz_targets() -> PathBuf {
    root().join("tests/fuzz/Cargo.toml")
}

/// Checks the formatting alone, which takes no time.
pub fn formatting() -> Result<()> {
    check(cargo().args(["fmt", "--all", "--check"]), "find the code formatted (run `cargo fmt --all`)")?;
    check(cargo().args(["fmt", "--check", "--manifest-path"]).arg(fuzz_targets()), "find the fuzz targets formatted")
}

/// `cargo xtask lint` beside something else, on what that leaves of the processors.
pub struct Aside {
    child: Child,
    output: File,
}

impl Aside {
    pub fn start() -> Result<Self> {
        let output = tempfile::tempfile().context("failed to create a temporary file")?;
        let this = env::current_exe().context("failed to find the path of this program")?;
        let mut command = Command::new(this);
        command.arg("lint").stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?);
        // SAFETY: between fork and exec only prctl(2) and sched_setscheduler(2) are called, which are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                // Where it is not allowed it only takes more of the processors.
                libc::sched_setscheduler(0, libc::SCHED_IDLE, &libc::sched_param { sched_priority: 0 });
                Ok(())
            });
        }
        let child = command.spawn().context("failed to start the lints")?;
        Ok(Self { child, output })
    }

    /// Waits for its end; false, with what it said, if it found something.
    pub fn finish(mut self) -> Result<bool> {
        let status = self.child.wait().context("failed to wait for the lints")?;
        let mut said = Vec::new();
        self.output.rewind().and_then(|()| self.output.read_to_end(&mut said)).context("failed to read the lints")?;
        eprint!("{}", String::from_utf8_lossy(&said));
        Ok(status.success())
    }
}

//! Builds the BPF programs of `leak-ebpf` and lays the object where the crate embeds it: `$OUT_DIR/leaktrace.bpf.o`.
//!
//! A plain cargo call with the pinned stable toolchain: `RUSTC_BOOTSTRAP=1` opens `-Z build-std=core` there, so no nightly is
//! needed. aya-build is not used because it leaves no way to add flags such as `-C target-cpu`. Getting the tools is left to
//! `cargo xtask setup`; what is missing is named here.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The BPF target for little-endian hosts; x86-64 and arm64, all that leaktrace knows, are that.
const TARGET: &str = "bpfel-unknown-none";

/// The binary that `leak-ebpf` builds, and the name under which it is embedded.
const PROGRAM: &str = "leaktrace-bpf";
const OBJECT: &str = "leaktrace.bpf.o";

/// Names a mistake to be made on purpose in the BPF programs (`cfg(leaktrace_broken)`), for trying the tests.
const BROKEN_VARIABLE: &str = "LEAKTRACE_BPF_BROKEN";

fn main() {
    if let Err(message) = build() {
        // cargo shows these lines as errors of this crate and fails the build. After a non-zero exit it would print
        // everything that the script has said instead, with the reason somewhere in it.
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<(), String> {
    let root = path_from_env("CARGO_MANIFEST_DIR")?
        .parent()
        .ok_or("failed to find the workspace: CARGO_MANIFEST_DIR has no parent")?
        .to_path_buf();
    for input in [
        "leak-ebpf/src",
        "leak-ebpf/Cargo.toml",
        "leak-common/src",
        "leak-common/Cargo.toml",
        // The profiles and the versions of what the programs depend on.
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }

    let out_dir = path_from_env("OUT_DIR")?;
    let arch = env::var("CARGO_CFG_TARGET_ARCH").map_err(|e| format!("failed to read CARGO_CFG_TARGET_ARCH: {e}"))?;
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let linker = find_linker(&root)?;
    require_rust_src(&rustc)?;

    // Not in OUT_DIR, which dev, release and clippy builds each have for themselves: core would be compiled for each. And not
    // the usual folder, whose lock the outer cargo holds while this runs.
    println!("cargo::rerun-if-env-changed={BROKEN_VARIABLE}");
    let broken = env::var(BROKEN_VARIABLE).ok();
    let folder = broken.as_ref().map_or_else(|| arch.clone(), |how| format!("{arch}-broken-{how}"));
    let target_dir = root.join("target/bpf").join(folder);
    let mut command = Command::new(cargo);
    command
        .current_dir(&root)
        .args([
            "build",
            "--quiet",
            "--package",
            "leak-ebpf",
            "--bins",
            "--release",
            "--target",
            TARGET,
            "-Z",
            "build-std=core",
        ])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC", rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&arch, broken.as_deref(), &linker).join("\x1f"));
    // Set by clippy, by wrappers such as sccache and by coverage tools for the host build; none of it fits the BPF target.
    for name in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        command.env_remove(name);
    }
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        // CARGO_CFG_*, CARGO_FEATURE_* and the like speak of this crate; CARGO_PROFILE_* could undo the profile that the
        // verifier needs.
        if ["CARGO_CFG_", "CARGO_FEATURE_", "CARGO_PROFILE_", "CARGO_PKG_"].iter().any(|p| text.starts_with(p)) {
            command.env_remove(&name);
        }
    }

    let output = command.output().map_err(|e| format!("failed to start cargo for the BPF programs: {e}"))?;
    if !output.status.success() {
        return Err(format!(
            "failed to build the BPF programs of leak-ebpf ({}):\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    forward_warnings(&String::from_utf8_lossy(&output.stderr));

    let built = target_dir.join(TARGET).join("release").join(PROGRAM);
    let object = out_dir.join(OBJECT);
    fs::copy(&built, &object)
        .map_err(|e| format!("failed to copy {} to {}: {e}", built.display(), object.display()))?;
    Ok(())
}

/// The flags of the BPF build. `bpf_target_arch` says whose registers and kernel structures the programs read, so an object
/// serves one architecture only.
fn rustflags(arch: &str, broken: Option<&str>, linker: &Path) -> Vec<String> {
    println!("cargo::rerun-if-env-changed=LEAKTRACE_BPF_CPU");
    let mut flags = vec![
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
    ];
    // v3 has the atomic operations with a result (5.12; the loader takes them out where they are not used) and 32-bit
    // jumps and arithmetic (5.1).
    let cpu = env::var("LEAKTRACE_BPF_CPU").unwrap_or_else(|_| "v3".to_owned());
    flags.push(format!("-Ctarget-cpu={cpu}"));
    flags.extend(broken.map(|how| format!("--cfg=leaktrace_broken=\"{how}\"")));
    flags
}

/// The bpf-linker that set-up built to match the toolchain's LLVM: in the workspace's own target folder, wherever
/// `CARGO_TARGET_DIR` points, or under `LEAKTRACE_TOOLS`. One from the user's PATH would seldom match, so none is looked for.
fn find_linker(root: &Path) -> Result<PathBuf, String> {
    println!("cargo::rerun-if-env-changed=LEAKTRACE_TOOLS");
    let tools = env::var_os("LEAKTRACE_TOOLS").map_or_else(|| root.join("target/tools"), PathBuf::from);
    let linker = tools.join("bin/bpf-linker");
    // A file that is not there counts as changed, so the build goes on by itself once set-up has run.
    println!("cargo::rerun-if-changed={}", linker.display());
    if linker.is_file() {
        Ok(linker)
    } else {
        Err(format!("the eBPF build needs bpf-linker; run `cargo xtask setup` ({} is missing)", linker.display()))
    }
}

/// The BPF target has no compiled core, so the library's source must be there.
fn require_rust_src(rustc: &OsString) -> Result<(), String> {
    let output = Command::new(rustc)
        .args(["--print", "sysroot"])
        .output()
        .map_err(|e| format!("failed to run {}: {e}", rustc.display()))?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end());
    let core = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
    if core.is_file() {
        Ok(())
    } else {
        println!("cargo::rerun-if-changed={}", core.display());
        Err(format!("the eBPF build needs rust-src; run `cargo xtask setup` ({} is missing)", core.display()))
    }
}

/// Shows the inner cargo's warnings, which would otherwise be hidden with the output of a build script that succeeded.
fn forward_warnings(stderr: &str) {
    let mut in_warning = false;
    for line in stderr.lines() {
        if line.starts_with("warning") {
            in_warning = !line.contains("generated ");
        } else if line.trim().is_empty() {
            in_warning = false;
        }
        if in_warning {
            println!("cargo::warning={line}");
        }
    }
}

fn path_from_env(name: &str) -> Result<PathBuf, String> {
    env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("failed to read {name}: cargo has not set it"))
}

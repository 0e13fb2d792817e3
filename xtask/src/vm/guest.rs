//! What is inside a virtual machine: leaktrace, the suite, the fixtures and a program of the system, with the libraries they need,
//! busybox, and an init that runs the suite and turns the machine off. All of it is in the initramfs; there is no disk.
//!
//! For the host's own machine these are the programs that are tested and installed here anyway. For the other one leaktrace and the suite
//! are built as they are released, as static programs, the fixtures by Debian's cross compiler, and the rest are Debian's packages.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use leaktrace_tests::{PREBUILT_VARIABLE, SLOWNESS_VARIABLE, host, kernels, target_dir};

use super::arch::Arch;
use super::broken::Broken;
use super::debian::{Suite, aside};
use crate::process::{capture, cargo, check, find_in_path, root};
use crate::tested;

/// The suite whose libc and compilers the guests get that are no host's.
const SUITE: &str = "bookworm";

/// Where things are in the guest.
const FIXTURES: &str = "usr/lib/fixtures";
const LEAKTRACE: &str = "usr/bin/leaktrace";
const TESTS: &str = "usr/bin/suite";

/// How many times longer things may take than on a busy host: the verifier alone goes through a hundred thousand instructions, which
/// is 0.3 s there and half a minute under an emulator that has half a processor.
const SLOWNESS: u32 = 4;

/// Lines that init prints around the suite; the runner reads them.
pub const DOCTOR_LINE: &str = "vm: doctor: ";
pub const KERNEL_LINE: &str = "vm: kernel: ";
pub const END_LINE: &str = "vm: the suite has ended with ";

/// The parameter of the kernel's command line with the tests' names, between commas; init finds it in its environment.
pub const FILTER_PARAMETER: &str = "LEAKTRACE_FILTER";

/// Makes the initramfs of `arch`, with a leaktrace that is broken if so wished; its path.
pub fn initramfs(cache: &Path, arch: Arch, broken: Option<Broken>) -> Result<PathBuf> {
    let (leaktrace, suite) = if arch == Arch::host() && broken.is_none() {
        let tested = tested::build()?;
        (tested.leaktrace, tested.kernels)
    } else {
        // Without the agent, whose TLS takes a C compiler.
        let leaktrace = ["build", "--package", "leak-user", "--bin", "leaktrace", "--no-default-features"];
        let suite = ["test", "--package", "leaktrace-tests", "--test", "kernels", "--no-run"];
        (build(arch, &leaktrace, broken)?, build(arch, &suite, None)?)
    };
    let busybox = busybox(cache, arch)?;

    let tree = aside(&cache.join(format!("guest-{}", arch.name())))?;
    for folder in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", FIXTURES, "proc", "sys", "dev", "tmp", "root"] {
        let folder = tree.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{name}"), tree.join(name)).with_context(|| format!("failed to link {name}"))?;
    }
    copy(&busybox, &tree.join("usr/bin/busybox"))?;
    copy(&leaktrace, &tree.join(LEAKTRACE))?;
    copy(&suite, &tree.join(TESTS))?;
    if arch == Arch::host() {
        host_programs(&tree, &[&leaktrace, &suite])?;
    } else {
        foreign_programs(cache, arch, &tree)?;
    }
    let init = tree.join("init");
    fs::write(&init, init_script()).with_context(|| format!("failed to write {}", init.display()))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("failed to make init executable")?;

    let archive = cache.join(format!("initramfs-{}.cpio", arch.name()));
    pack(&self::busybox(cache, Arch::host())?, &tree, &archive)?;
    fs::remove_dir_all(&tree).with_context(|| format!("failed to remove {}", tree.display()))?;
    Ok(archive)
}

/// Runs in the guest as process 1.
fn init_script() -> String {
    let patterns = "BUG:|WARNING:|Oops|general protection|unable to handle|rcu_.*stall|hung task";
    format!(
        "#!/usr/bin/busybox sh\n\
         /usr/bin/busybox --install -s /usr/bin\n\
         mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp\n\
         export PATH=/usr/bin:/usr/sbin HOME=/root TMPDIR=/tmp\n\
         export {}=/{LEAKTRACE} {PREBUILT_VARIABLE}=/{FIXTURES} {}=1 {SLOWNESS_VARIABLE}={SLOWNESS}\n\
         leaktrace doctor | sed 's/^/{DOCTOR_LINE}/'\n\
         /{TESTS} --test-threads=1 $(echo \"${FILTER_PARAMETER}\" | tr , ' ')\n\
         status=$?\n\
         dmesg | grep -E '{patterns}' | sed 's/^/{KERNEL_LINE}/'\n\
         echo \"{END_LINE}$status\"\n\
         sync\n\
         poweroff -f\n",
        leaktrace_tests::BINARY_VARIABLE,
        host::REQUIRE_VARIABLE,
    )
}

/// Builds a program, for another machine one that needs no library, and gives its path.
fn build(arch: Arch, arguments: &[&str], broken: Option<Broken>) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(arguments).args(["--release", "--message-format", "json-render-diagnostics"]);
    if let Some(broken) = broken {
        // Not where anybody would take it for the real one.
        command.env("LEAKTRACE_BPF_BROKEN", broken.name()).arg("--target-dir").arg(cache()?.join("broken"));
    }
    if arch != Arch::host() {
        let target = arch.rust_target();
        command.args(["--target", &target]);
        // Linked by what the toolchain brings: these programs hold no C code, so no compiler for the other machine is needed.
        let name = target.to_uppercase().replace('-', "_");
        command.env(format!("CARGO_TARGET_{name}_LINKER"), "rust-lld");
    }
    let messages = capture(&mut command)?;
    let executable = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    });
    executable.context("failed to find what cargo has built")
}

/// Brings all that [`initramfs`] needs from elsewhere.
pub fn bring(cache: &Path, arch: Arch) -> Result<()> {
    // The host's own packs the initramfs.
    for arch in [Arch::host(), arch] {
        busybox(cache, arch)?;
    }
    if arch == Arch::host() {
        return kernels::SYSTEM_PROGRAMS.iter().try_for_each(|name| system_program(name).map(drop));
    }
    bring_target(arch)?;
    unpack_programs(cache, arch)?;
    Compilers::bring(cache, arch).map(drop)
}

/// Makes rustc able to build for `arch`.
fn bring_target(arch: Arch) -> Result<()> {
    let target = arch.rust_target();
    let libraries =
        capture(Command::new("rustc").current_dir(root()).args(["--print", "target-libdir", "--target", &target]))?;
    if Path::new(libraries.trim_end()).is_dir() {
        return Ok(());
    }
    eprintln!("vm: installing Rust's libraries for {target}");
    // In the workspace, rustup takes the toolchain that is pinned there.
    check(Command::new("rustup").current_dir(root()).args(["target", "add", &target]), "install a Rust target")
}

fn busybox(cache: &Path, arch: Arch) -> Result<PathBuf> {
    let file = cache.join(format!("busybox-{}", arch.name()));
    if !file.is_file() {
        Suite::new(cache, SUITE, arch)?.extract("busybox-static", "./bin/busybox", &file)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).context("failed to make busybox executable")?;
    }
    Ok(file)
}

/// A program of an unpacked package; older packages have it in `/bin`.
fn binary(folder: &Path, name: &str) -> Result<PathBuf> {
    let places = ["usr/bin", "bin", "usr/sbin"].map(|place| folder.join(place).join(name));
    places
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("failed to find {name} under {}", folder.display()))
}

/// Fixtures by the host's compiler, and the host's own programs, with the libraries that the host's dynamic linker finds for them and
/// for what is there already.
fn host_programs(tree: &Path, present: &[&Path]) -> Result<()> {
    let mut needed = BTreeSet::new();
    for program in present {
        libraries(program, &mut needed)?;
    }
    for program in kernels::programs() {
        let built = program.build()?;
        libraries(&built, &mut needed)?;
        copy(&built, &tree.join(FIXTURES).join(program.file_name()))?;
    }
    for name in kernels::SYSTEM_PROGRAMS {
        let program = system_program(name)?;
        libraries(&program, &mut needed)?;
        copy(&program, &tree.join("usr/bin").join(name))?;
    }
    for library in needed {
        copy(&library, &place(tree, &library))?;
    }
    Ok(())
}

/// A program of the host that the suite traces.
fn system_program(name: &str) -> Result<PathBuf> {
    find_in_path(name).with_context(|| format!("failed to find {name}, which the suite traces"))
}

/// Adds the libraries of a program, and its dynamic linker, as ldd tells them; a static program has none.
fn libraries(program: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    let output = Command::new("ldd").arg(program).output().context("failed to start ldd")?;
    if !output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines() {
        if line.contains("not found") {
            bail!("failed to find a library of {}: {}", program.display(), line.trim());
        }
        // `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`.
        let path = line.split("=> ").last().and_then(|rest| rest.split_whitespace().next());
        found.extend(path.filter(|path| path.starts_with('/')).map(PathBuf::from));
    }
    Ok(())
}

/// Where a file of the root belongs in the guest, where `/lib` and the like are links into `/usr`.
fn place(tree: &Path, path: &Path) -> PathBuf {
    let inside = path.strip_prefix("/").unwrap_or(path);
    if inside.starts_with("usr") { tree.join(inside) } else { tree.join("usr").join(inside) }
}

/// Debian's programs and libraries for another machine: the folder that they are unpacked in.
fn unpack_programs(cache: &Path, arch: Arch) -> Result<PathBuf> {
    let unpacked = cache.join(format!("libraries-{}", arch.name()));
    let mut packages = vec!["libc6", "libgcc-s1", "libstdc++6"];
    packages.extend(kernels::SYSTEM_PROGRAMS);
    Suite::new(cache, SUITE, arch)?.unpack(&packages, &[], &unpacked)?;
    Ok(unpacked)
}

/// Fixtures by a cross compiler, and Debian's programs and libraries for the other machine.
fn foreign_programs(cache: &Path, arch: Arch, tree: &Path) -> Result<()> {
    let unpacked = unpack_programs(cache, arch)?;
    let libraries = Path::new("lib").join(arch.triplet());
    for folder in [libraries.clone(), Path::new("usr").join(&libraries)] {
        copy_libraries(&unpacked.join(&folder), &tree.join("usr").join(&libraries))?;
    }
    let interpreter = unpacked.join(arch.interpreter());
    copy(&interpreter, &tree.join("usr").join(arch.interpreter()))?;
    for name in kernels::SYSTEM_PROGRAMS {
        copy(&binary(&unpacked, name)?, &tree.join("usr/bin").join(name))?;
    }
    let compilers = Compilers::bring(cache, arch)?;
    for program in kernels::programs() {
        let compiler = if program.is_cpp() { &compilers.cpp } else { &compilers.c };
        let mut foreign = program.clone().with_compiler(compiler);
        if arch == Arch::Aarch64 {
            // Return addresses on the stack are signed then, as on distributions that build so.
            foreign = foreign.flag("-mbranch-protection=standard");
        }
        copy(&foreign.build()?, &tree.join(FIXTURES).join(program.file_name()))?;
    }
    Ok(())
}

/// Copies the shared libraries of a folder, links and all, but not what is below it.
fn copy_libraries(from: &Path, to: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().contains(".so") && entry.path().is_file() {
            copy(&entry.path(), &to.join(name))?;
        }
    }
    Ok(())
}

/// C and C++ compilers for another machine.
struct Compilers {
    c: PathBuf,
    cpp: PathBuf,
}

impl Compilers {
    fn bring(cache: &Path, arch: Arch) -> Result<Self> {
        let unpacked = cache.join(format!("compilers-{}", arch.name()));
        let host = Arch::host();
        let [c, cpp] = ["gcc", "g++"].map(|name| format!("{name}-{}", arch.package_triplet()));
        // Not the libc that the compilers run with: that is the host's, which their libraries must go with.
        Suite::new(cache, SUITE, host)?.unpack(&[&c, &cpp], &["libc6"], &unpacked)?;
        let wrap = |name: &str| -> Result<PathBuf> {
            let program = format!("{}-{name}", arch.triplet());
            let script = unpacked.join(&program);
            let text = format!(
                "#!/bin/sh\nLD_LIBRARY_PATH='{unpacked}/usr/lib/{triplet}:{unpacked}/lib/{triplet}' \
                 exec '{unpacked}/usr/bin/{program}' --sysroot='{unpacked}' \"$@\"\n",
                unpacked = unpacked.display(),
                triplet = host.triplet(),
            );
            fs::write(&script, text).with_context(|| format!("failed to write {}", script.display()))?;
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("failed to make {} executable", script.display()))?;
            Ok(script)
        };
        Ok(Self { c: wrap("gcc")?, cpp: wrap("g++")? })
    }
}

/// Copies what `from` is or points to.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("failed to copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Packs a folder into the archive that the kernel unpacks.
fn pack(busybox: &Path, tree: &Path, archive: &Path) -> Result<()> {
    let mut list = Command::new(busybox);
    let mut list =
        list.args(["find", "."]).current_dir(tree).stdout(Stdio::piped()).spawn().context("failed to start busybox")?;
    let names = list.stdout.take().context("failed to take busybox's standard output")?;
    let output = File::create(archive).with_context(|| format!("failed to create {}", archive.display()))?;
    let mut pack = Command::new(busybox);
    pack.args(["cpio", "-o", "-H", "newc"]).current_dir(tree).stdin(names).stdout(output).stderr(Stdio::null());
    check(&mut pack, "pack the initramfs")?;
    list.wait().context("failed to wait for busybox")?;
    Ok(())
}

/// Where everything for the machines is kept.
pub fn cache() -> Result<PathBuf> {
    Ok(target_dir()?.join("vm"))
}

//! `cargo xtask test`: all that is checked before a change lands.
//!
//! The tests themselves decide whether they can run (see `leaktrace_tests::host`); here what they need is brought as far as this
//! user may, and said where it cannot be had.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use leaktrace_tests::{host, target_dir};

use crate::lint::{self, Aside};
use crate::process::{capture, check, exit_code, find_in_path, is_root, root};
use crate::tested;
use crate::vm::Machines;

/// Programs that tests run as targets or compare with, and the Debian packages that bring them.
const SYSTEM_PROGRAMS: &[(&str, &str)] = &[
    ("c++", "g++"),
    ("python3", "python3"),
    ("sqlite3", "sqlite3"),
    ("gdb", "gdb"),
    ("perl", "perl"),
    ("node", "nodejs"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    // pgbench is with the server.
    ("initdb", "postgresql"),
    ("readelf", "binutils"),
    ("musl-gcc", "musl-tools"),
    ("xz", "xz-utils"),
    ("dwz", "dwz"),
    ("pprof", "golang-go"),
    ("chromium", "chromium"),
    ("curl", "curl"),
    ("openssl", "openssl"),
    ("pip3", "python3-pip"),
    // promtool is with the server.
    ("prometheus", "prometheus"),
    ("systemd-analyze", "systemd"),
    ("setcap", "libcap2-bin"),
];

/// The same for libraries that programs are linked with, and one that Python reads.
const SYSTEM_LIBRARIES: [(&str, &str); 4] = [
    ("libjemalloc.so", "libjemalloc-dev"),
    ("libtcmalloc_minimal.so", "libgoogle-perftools-dev"),
    ("libmimalloc.so", "libmimalloc-dev"),
    ("python3/dist-packages/prometheus_client/openmetrics/parser.py", "python3-prometheus-client"),
];

/// What Debian's packages ask whether they may start the service that they bring; 101 forbids it.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// While it lives, packages that are installed do not start their services: tests start what they need themselves.
struct NoServices {
    /// Whether the file is ours.
    written: bool,
}

impl NoServices {
    fn new() -> Result<Self> {
        // A container's image often has one that says the same; whatever it says is the owner's wish.
        if Path::new(POLICY).exists() {
            return Ok(Self { written: false });
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").with_context(|| format!("failed to write {POLICY}"))?;
        let guard = Self { written: true };
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("failed to make {POLICY} executable"))?;
        Ok(guard)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.written
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("test: failed to remove {POLICY}, which keeps services from being started: {error}");
        }
    }
}

/// Sets up, checks and tests; the exit code is cargo test's.
pub fn test(filters: &[String]) -> Result<ExitCode> {
    if filters.is_empty() {
        lint::formatting()?;
    }
    let leaktrace = tested::build()?.leaktrace;
    bring_system_programs();
    if let Err(error) = crate::deploy::bring_tools() {
        eprintln!("test: {error:#}; the tests that need it will say so");
    }

    let skipped = target_dir()?.join("skipped-tests");
    if let Err(error) = fs::remove_file(&skipped)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("failed to remove {}", skipped.display()));
    }
    // Tests mostly wait, so there is time for it beside them.
    let lints = if filters.is_empty() { Some(Aside::start()?) } else { None };
    let mut tests = tested::cargo_test();
    tests
        .arg("--no-fail-fast")
        .env(leaktrace_tests::BINARY_VARIABLE, leaktrace)
        .env(host::SKIP_LOG_VARIABLE, &skipped)
        .stdin(Stdio::null());
    if !filters.is_empty() {
        tests.arg("--").args(filters);
    }
    let runner = if is_root() { None } else { sudo_runner()? };
    match host::kernel_tests_possible() {
        // Where everything is there, a test that skips itself is a test that does not work.
        Ok(()) => {
            tests.env(host::REQUIRE_VARIABLE, "1");
        }
        Err(_) if runner.is_some() => {
            eprintln!("test: not root; the tests run under sudo");
        }
        Err(why) => eprintln!("test: the tests with real probes cannot run and will be skipped: {why}"),
    }
    if let Some((name, value)) = runner {
        tests.env(name, value);
    }
    let status = tests.status().context("failed to start cargo test")?;
    report_skipped(&skipped);
    if let Some(lints) = lints
        && !lints.finish()?
    {
        return Ok(ExitCode::FAILURE);
    }
    if !status.success() || !filters.is_empty() {
        return Ok(exit_code(status));
    }
    match Machines::bring_ends() {
        Ok(ends) => {
            eprintln!("\ntest: the oldest and the newest kernel, emulated");
            ends.run()
        }
        Err(why) => {
            eprintln!("\ntest: no other kernels can be tried here: {why:#}");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Installs the system programs and libraries that tests want, where that takes no question: as root, with apt. Elsewhere, and where
/// it fails, the tests that need them say so.
fn bring_system_programs() {
    let programs = SYSTEM_PROGRAMS.iter().filter(|(program, _)| host::find(program).is_none());
    let libraries = SYSTEM_LIBRARIES.iter().filter(|(library, _)| host::find_library(library).is_none());
    let packages: Vec<&str> = programs.chain(libraries).map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return;
    }
    if !is_root() || find_in_path("apt-get").is_none() {
        eprintln!("test: some tests need packages that are not installed: {}", packages.join(", "));
        return;
    }
    eprintln!("test: installing {}", packages.join(", "));
    let apt_get = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).env("DEBIAN_FRONTEND", "noninteractive");
        check(&mut command, "run apt-get")
    };
    let install: Vec<&str> =
        ["install", "--yes", "--quiet", "--no-install-recommends"].into_iter().chain(packages).collect();
    // The package lists of a fresh machine are often empty or old.
    let brought = NoServices::new().and_then(|_guard| apt_get(&["update", "--quiet"]).and_then(|()| apt_get(&install)));
    if let Err(error) = brought {
        eprintln!("test: {error:#}; the tests that need them will say so");
    }
}

/// The setting that makes cargo run each test under sudo, if sudo asks for no password.
fn sudo_runner() -> Result<Option<(String, String)>> {
    let works = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !works {
        return Ok(None);
    }
    let version = capture(Command::new("rustc").arg("-vV").current_dir(root()))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("failed to find rustc's host")?;
    let name = format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_"));
    // sudo replaces PATH even with -E, and cargo cuts the runner at spaces.
    let path = env::var("PATH").unwrap_or_default();
    let keep_path = if path.contains(char::is_whitespace) { String::new() } else { format!(" env PATH={path}") };
    Ok(Some((name, format!("sudo -n -E{keep_path}"))))
}

/// Says which tests did not run, and why; nothing where all did.
fn report_skipped(log: &Path) {
    let Ok(text) = fs::read_to_string(log) else { return };
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("\n{} tests were skipped:", lines.len());
    for line in lines {
        eprintln!("  {line}");
    }
}

//! `cargo xtask run`: leaktrace with the user's arguments, or the bundled demo and its verdict.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use leaktrace_tests::{Fixture, Program, target_dir};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::process::{as_root, cargo, check, exit_code};
use crate::setup::setup;

/// How long the demo is watched: the time within which a steady leak is named, and a little more.
const DEMO_DURATION: &str = "30s";

/// Sets up, builds and runs leaktrace.
pub fn run(args: &[OsString]) -> Result<ExitCode> {
    setup()?;
    let leaktrace = build()?;
    if args.is_empty() {
        return demo(&leaktrace);
    }
    // Replaced, not waited for: signals and the exit status are then leaktrace's own.
    let error = as_root(&leaktrace)?.args(args).exec();
    Err(error).with_context(|| format!("failed to start {}", leaktrace.display()))
}

/// Builds the release binary and gives its path.
pub fn build() -> Result<PathBuf> {
    check(cargo().args(["build", "--release", "--package", "leak-user"]), "build leaktrace")?;
    Ok(target_dir()?.join("release/leaktrace"))
}

/// Starts the leaking demo server, traces it, and ends it afterwards.
fn demo(leaktrace: &Path) -> Result<ExitCode> {
    // Ctrl-C is for leaktrace, which then prints its report; this program must live on to end the demo. A handler, and not
    // SIG_IGN, because leaktrace would inherit that.
    extern "C" fn nothing(_: nix::libc::c_int) {}
    // SAFETY: the handler does nothing, so it is async-signal-safe, and no other handler of this program is replaced.
    unsafe { signal(Signal::SIGINT, SigHandler::Handler(nothing)) }.context("failed to set a handler for SIGINT")?;

    let mut command = as_root(leaktrace)?;
    let demo = Fixture::builder(&Program::c("demo").build()?).own_process_group().start()?;
    eprintln!(
        "demo: a server with a cache that fills up and a session table that is never emptied, process {}; tracing it for \
         {DEMO_DURATION} (tests/fixtures/demo.c)",
        demo.pid()
    );
    let status = command
        .args(["-p", &demo.pid().to_string(), "--duration", DEMO_DURATION])
        .status()
        .with_context(|| format!("failed to start {}", leaktrace.display()))?;
    Ok(exit_code(status))
}

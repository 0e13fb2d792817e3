//! Starting other programs: cargo with the pinned toolchain, and what needs root with sudo.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

/// The root of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// The cargo that runs this xtask, started in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root());
    command
}

/// Runs `command` to its end; `what` completes "failed to" where it does not succeed.
pub fn check(command: &mut Command, what: &str) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("failed to {what}: could not start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("failed to {what}: {} ended with {status}", command.get_program().display());
    }
    Ok(())
}

/// What `command` writes to its standard output.
pub fn capture(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_owned();
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("failed to start {}", program.display()))?;
    if !output.status.success() {
        bail!("failed to run {}: it ended with {}", program.display(), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("failed to read the output of {}", program.display()))
}

/// The first file called `name` in PATH.
pub fn find_in_path(name: impl AsRef<Path>) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(&name)).find(|file| file.is_file())
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command that runs `program` as root: itself where this already is root, under sudo otherwise.
pub fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if find_in_path("sudo").is_none() {
        bail!("failed to become root, which loading BPF programs needs: there is no sudo; run this command as root");
    }
    let mut command = Command::new("sudo");
    command.arg("--").arg(program);
    Ok(command)
}

/// The exit code that says the same as `status`; 128 + the number after a signal, as shells have it.
pub fn exit_code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

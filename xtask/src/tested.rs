//! What is tested: leaktrace and the tests, built at once, so that each package is built for all of them alike and only once.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::{capture, cargo};
use crate::setup::setup;

/// Programs of the profile that tests are built in.
pub struct Tested {
    pub leaktrace: PathBuf,
    /// The suite for other kernels.
    pub kernels: PathBuf,
}

/// `cargo test` of all packages that are no BPF programs.
pub fn cargo_test() -> Command {
    let mut command = cargo();
    command.args(["test", "--workspace", "--exclude", "leak-ebpf"]);
    command
}

/// Sets up and builds.
pub fn build() -> Result<Tested> {
    setup()?;
    let messages = capture(cargo_test().args(["--no-run", "--message-format", "json-render-diagnostics"]))?;
    let messages: Vec<Value> = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let program = |kind: &str, name: &str| {
        messages
            .iter()
            .filter(|message| message["target"]["name"] == name && message["target"]["kind"][0] == kind)
            .find_map(|message| message["executable"].as_str())
            .map(PathBuf::from)
            .with_context(|| format!("failed to find {name} among what cargo has built"))
    };
    Ok(Tested { leaktrace: program("bin", "leaktrace")?, kernels: program("test", "kernels")? })
}

//! gdb's view of a process that waits: the ground truth for functions, lines and what was inlined where.
//!
//! Not to be used while probes are attached: gdb writes into the same code.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

/// A frame as gdb sees it, an inlined function being one too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GdbFrame {
    /// Return address, or where the thread is or was interrupted.
    pub pc: u64,
    pub function: Option<String>,
    /// Whether the name is from debug information; else it is one of a symbol's names.
    pub known: bool,
    /// Full path of the source file.
    pub file: Option<String>,
    pub line: Option<u64>,
    /// Whether it was inlined into the next outer frame.
    pub inlined: bool,
    /// The kernel's frame between a signal handler and what was interrupted.
    pub signal: bool,
}

/// The frames of the thread in which a function called `marker` is active, innermost first. Frames that gdb makes up for calls that
/// were jumps are left out: they are on no stack; and so is a return address of zero, which some stacks have behind their outermost frame.
pub fn gdb_frames(pid: u32, marker: &str) -> Result<Vec<GdbFrame>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gdb_frames.py");
    let output = Command::new("gdb")
        .args(["-nx", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set auto-load off"])
        .args([
            "-ex",
            "set backtrace past-main on",
            "-ex",
            "set backtrace past-entry on",
            "-ex",
            "set backtrace limit 4000",
        ])
        .arg("-p")
        .arg(pid.to_string())
        .arg("-x")
        .arg(script)
        .stdin(Stdio::null())
        .output()
        .context("failed to start gdb")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("frames: "));
    let problem = || format!("failed to read frames from gdb: {text}\n{}", String::from_utf8_lossy(&output.stderr));
    let threads: Vec<Vec<Value>> = serde_json::from_str(line.with_context(problem)?).with_context(problem)?;
    let wanted = threads.into_iter().find(|frames| frames.iter().any(|frame| frame["name"] == marker));
    let frames = wanted.with_context(|| format!("no thread is in {marker}: {text}"))?;
    let on_the_stack = |frame: &&Value| frame["tail_call"] != true && frame["pc"] != 0;
    Ok(frames.iter().filter(on_the_stack).map(read).collect())
}

fn read(frame: &Value) -> GdbFrame {
    let text = |key: &str| frame[key].as_str().map(str::to_owned);
    GdbFrame {
        pc: frame["pc"].as_u64().unwrap_or(0),
        function: text("name"),
        known: frame["known"] == true,
        file: text("file"),
        line: frame["line"].as_u64().filter(|&line| line != 0),
        inlined: frame["inlined"] == true,
        signal: frame["signal"] == true,
    }
}

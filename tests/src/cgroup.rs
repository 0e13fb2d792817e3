//! Control groups that tests make.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::host::wait_until;

/// Has the program started in the group whose `cgroup.procs` this is.
pub fn enter(command: &mut Command, processes: &Path) -> io::Result<()> {
    // The file is opened here: between fork and exec nothing may be allocated.
    let file = fs::OpenOptions::new().write(true).open(processes)?;
    let enter = move || (&file).write_all(b"0");
    // SAFETY: one write(2), which allocates nothing.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// A cgroup with a memory limit; of version 2 where that has the controller, else of version 1.
pub struct MemoryGroup {
    folder: PathBuf,
    peak: &'static str,
}

impl MemoryGroup {
    /// `None` where there is none to be had.
    pub fn new(limit: u64) -> Option<Self> {
        let name = format!("leaktrace-test-{}-{:x}", std::process::id(), std::ptr::from_ref(&limit).addr());
        for (root, controller, file, peak) in [
            ("/sys/fs/cgroup", "/sys/fs/cgroup/cgroup.subtree_control", "memory.max", "memory.peak"),
            (
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
            ),
        ] {
            if !Path::new(controller).exists() {
                continue;
            }
            let folder = Path::new(root).join(&name);
            if fs::create_dir(&folder).is_err() {
                continue;
            }
            let group = Self { folder, peak };
            // Where there is swap it would only be used for longer; version 1 has no such file.
            let _ = fs::write(group.folder.join("memory.swap.max"), "0");
            if fs::write(group.folder.join(file), limit.to_string()).is_ok() {
                return Some(group);
            }
        }
        None
    }

    /// Its name, which its path ends in.
    pub fn name(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Has the program started in it.
    pub fn enter(&self, command: &mut Command) {
        // Where that cannot be it stays where it is, and the group's peak tells.
        let _ = enter(command, &self.folder.join("cgroup.procs"));
    }

    /// The most memory that its processes have had, kernel memory that is charged to them included.
    pub fn peak(&self) -> Result<u64> {
        let text = fs::read_to_string(self.folder.join(self.peak)).context("failed to read the peak")?;
        text.trim().parse().context("failed to read the peak")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Its processes have ended; the kernel may take a moment to see that.
        wait_until(Duration::from_secs(5), || fs::remove_dir(&self.folder).is_ok());
    }
}

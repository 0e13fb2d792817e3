//! Small disks, other clocks and memory limits, undone when dropped.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// A file system in memory.
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    pub fn mount(bytes: u64) -> Result<Self> {
        let folder = tempfile::tempdir().context("failed to create a folder")?;
        let target = std::ffi::CString::new(folder.path().as_os_str().as_bytes())?;
        let options = std::ffi::CString::new(format!("size={bytes}"))?;
        let name = c"tmpfs".as_ptr();
        // SAFETY: all are strings that end in zero and outlive the call.
        if unsafe { libc::mount(name, target.as_ptr(), name, 0, options.as_ptr().cast()) } != 0 {
            return Err(io::Error::last_os_error()).context("failed to mount a file system");
        }
        Ok(Self { folder })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Takes all of its room.
    pub fn fill(&self) -> Result<()> {
        let mut ballast = File::create(self.path().join("ballast")).context("failed to create a file")?;
        loop {
            match ballast.write(&[0; 4096]) {
                Ok(1..) => {}
                Ok(0) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error).context("failed to fill the file system"),
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Ok(target) = std::ffi::CString::new(self.path().as_os_str().as_bytes()) {
            // SAFETY: a string that ends in zero. At once, or as soon as whoever still has a file there is done.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// Has the program started in a time namespace whose monotonic clock is ahead by so much. False where there are none.
pub fn in_time_namespace(command: &mut Command, ahead: Duration) -> bool {
    if !Path::new("/proc/self/timens_offsets").exists() {
        return false;
    }
    let offset = format!("monotonic {} 0\nboottime {} 0\n", ahead.as_secs(), ahead.as_secs());
    let enter = move || {
        const CLONE_NEWTIME: libc::c_int = 0x80;
        // SAFETY: no memory is passed. The namespace is that of children, which exec makes the caller's own.
        if unsafe { libc::unshare(CLONE_NEWTIME) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let path = c"/proc/self/timens_offsets".as_ptr();
        // SAFETY: between fork and exec only calls of the kernel are made, on memory that is there.
        unsafe {
            let file = libc::open(path, libc::O_WRONLY | libc::O_CLOEXEC);
            let written = libc::write(file, offset.as_ptr().cast(), offset.len());
            if file < 0 || usize::try_from(written) != Ok(offset.len()) {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: `enter` does what is allowed there, see above.
    unsafe { command.pre_exec(enter) };
    true
}

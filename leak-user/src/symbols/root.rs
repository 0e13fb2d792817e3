//! The root folders that processes see, held open so that files in them can be found by descriptor: also those of
//! containers, and after the process has ended.

use crate::discover::FileId;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// What tells one root from another: the mount namespace and the folder. A namespace's number is handed out again, but the
/// folder's device is not while the root is open.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    namespace: PathBuf,
    folder: FileId,
}

/// A root folder.
#[derive(Debug)]
pub struct Root {
    folder: File,
    key: Key,
    /// Where it is in this program's root, if it is there and not in another mount namespace.
    path: PathBuf,
}

impl Root {
    /// This program's own.
    pub fn own() -> io::Result<Self> {
        Self::open("self")
    }

    /// Of the process `pid`, a number or `self`.
    fn open(pid: &str) -> io::Result<Self> {
        let link = PathBuf::from(format!("/proc/{pid}/root"));
        let folder = open_folder(&link)?;
        let key = Key { namespace: fs::read_link(format!("/proc/{pid}/ns/mnt"))?, folder: FileId::of(&folder)? };
        Ok(Self { folder, key, path: fs::read_link(link)? })
    }

    /// A folder, as if it were some process's root.
    #[cfg(test)]
    pub fn at(folder: &Path) -> io::Result<Self> {
        let path = folder.canonicalize()?;
        let folder = open_folder(folder)?;
        let key = Key { namespace: PathBuf::new(), folder: FileId::of(&folder)? };
        Ok(Self { folder, key, path })
    }

    /// Whether a path leads to the same file in both.
    pub fn is_same(&self, other: &Self) -> bool {
        self.key == other.key
    }

    /// How a path from `/proc/PID/maps` reads inside the root: the kernel writes those from this program's root, as far as it
    /// leads there.
    pub fn inside(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.path).map_or_else(|_| path.to_owned(), |inside| Path::new("/").join(inside))
    }

    /// Opens a file as a process with this root would: links are followed, but none leads out of the root, nor through
    /// `/proc/PID/fd` and the like.
    ///
    /// # Errors
    /// Also where it is no regular file.
    pub fn open_regular(&self, path: &Path) -> io::Result<File> {
        self.regular(path, OFlag::empty())
    }

    /// The same, but not if the last component of the path is a link.
    pub fn open_no_link(&self, path: &Path) -> io::Result<File> {
        self.regular(path, OFlag::O_NOFOLLOW)
    }

    fn regular(&self, path: &Path, flags: OFlag) -> io::Result<File> {
        // First without opening what it is: that alone can wait for ever at a pipe, or start something at a device.
        let flags = flags | OFlag::O_PATH | OFlag::O_CLOEXEC;
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let found = openat2(self.folder.as_fd(), path, OpenHow::new().flags(flags).resolve(resolve))?;
        let found = File::from(found);
        if !found.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        // The very file that was looked at, whatever its name leads to by now.
        OpenOptions::new().read(true).open(format!("/proc/self/fd/{}", found.as_raw_fd()))
    }
}

fn open_folder(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path)
}

/// The roots of all processes; each is opened once.
#[derive(Debug, Default)]
pub struct Roots(HashMap<Key, Weak<Root>>);

impl Roots {
    /// The root of a process that lives; none if it has ended or may not be looked at.
    pub fn of(&mut self, pid: u32) -> Option<Arc<Root>> {
        let root = Root::open(&pid.to_string()).ok()?;
        if let Some(known) = self.0.get(&root.key).and_then(Weak::upgrade) {
            return Some(known);
        }
        self.0.retain(|_, root| root.strong_count() > 0);
        let root = Arc::new(root);
        self.0.insert(root.key.clone(), Arc::downgrade(&root));
        Some(root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Links stay inside the root: an absolute one starts there, and one that climbs stops there.
    #[test]
    fn links_stay_inside() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let inside = folder.path().join("inside");
        fs::create_dir(&inside).expect("a folder");
        fs::write(folder.path().join("secret"), "outside").expect("a file");
        fs::write(inside.join("secret"), "inside").expect("a file");
        symlink("/secret", inside.join("absolute")).expect("a link");
        symlink("../../../secret", inside.join("climbing")).expect("a link");
        symlink("/proc/self/root", inside.join("magic")).expect("a link");
        let root = Root::at(&inside).expect("the folder can be opened");
        for name in ["secret", "/secret", "absolute", "climbing", "../secret"] {
            let file = root.open_regular(Path::new(name)).expect(name);
            assert_eq!(io::read_to_string(file).expect("the file can be read"), "inside", "{name}");
        }
        assert!(root.open_regular(Path::new("magic/etc/passwd")).is_err());
        assert!(root.open_no_link(Path::new("absolute")).is_err());
        assert!(root.open_no_link(Path::new("secret")).is_ok());
    }

    /// A pipe neither holds us up nor is it opened; nor is a folder.
    #[test]
    fn regular_files_only() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRUSR).expect("a pipe");
        let root = Root::at(folder.path()).expect("the folder can be opened");
        assert!(root.open_regular(Path::new("pipe")).is_err());
        assert!(root.open_regular(Path::new(".")).is_err());
    }

    /// What is below a root that is a folder of ours reads as from there; all else as it is.
    #[test]
    fn paths_inside() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let root = Root::at(folder.path()).expect("the folder can be opened");
        assert_eq!(root.inside(&folder.path().join("usr/bin/a")), Path::new("/usr/bin/a"));
        assert_eq!(root.inside(Path::new("/usr/bin/a")), Path::new("/usr/bin/a"));
        let own = Root::own().expect("the own root can be opened");
        assert_eq!(own.inside(Path::new("/usr/bin/a")), Path::new("/usr/bin/a"));
    }

    /// All processes with one root share it, this program's own included.
    #[test]
    fn shared() {
        let mut roots = Roots::default();
        let first = roots.of(std::process::id()).expect("the own root can be opened");
        let again = roots.of(std::process::id()).expect("the own root can be opened");
        assert!(Arc::ptr_eq(&first, &again));
        assert!(first.is_same(&Root::own().expect("the own root can be opened")));
    }
}

//! The names that a just-in-time compiler writes down for the code it generates: `/tmp/perf-PID.map` in the process's own
//! root and pid namespace
//! (<https://git.kernel.org/pub/scm/linux/kernel/git/torvalds/linux.git/tree/tools/perf/Documentation/jit-interface.txt>).
//!
//! Anybody may write to `/tmp`, so a map is trusted only if it is the process's user's or root's, a regular file and no link,
//! with no second name, and not open to be written by everybody; all of that is asked of the open file. It is read by
//! [`MAX_FILE`] bytes at most, and further as it grows: compilers append to it, often much later than they generate code. It
//! stays open, so that what a process wrote last can be read after its end.

mod index;

pub use index::{Index, Parser};

use super::root::Root;
use crate::discover::FileId;
use crate::process::ProcessId;
use procfs::FromBufRead;
use procfs::process::Status;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

/// The largest map that is read, bytes. That of a large program has a few megabytes.
pub const MAX_FILE: u64 = 64 << 20;

/// So much before what is new is read again to see whether it is still what it was, bytes.
const TAIL: usize = 64;

const NONE: &str = "code that was generated at run time, and the process writes no perf map";
const NOT_COVERED: &str = "code that was generated at run time, and the process's perf map does not have it";
const NOT_OWNED: &str = "code that was generated at run time; the process's perf map is not its user's and not trusted";
const WRITABLE: &str =
    "code that was generated at run time; the process's perf map can be written by anybody, and is not trusted";
const LINKED: &str =
    "code that was generated at run time; the process's perf map has a second name, and is not trusted";
const TOO_LARGE: &str = "code that was generated at run time; the process's perf map is over 64 MiB";
const UNREADABLE: &str = "code that was generated at run time; the process's perf map cannot be read";

/// The map of one process.
#[derive(Debug)]
pub(super) struct PerfMap {
    /// What a parent had when this process was forked.
    inherited: Arc<Index>,
    own: Option<Open>,
    /// Why there is no answer.
    reason: &'static str,
}

/// A map that is trusted.
#[derive(Debug)]
struct Open {
    file: File,
    id: FileId,
    /// How far it has been read, bytes.
    read: u64,
    /// What stands before that.
    tail: Vec<u8>,
    parser: Parser,
}

/// Who may own the map of a process, and how it is called.
struct Owner {
    users: [u32; 3],
    /// In the process's pid namespace.
    pid: i32,
}

impl Owner {
    fn of(pid: u32) -> Option<Self> {
        // Bytes of its name that are no UTF-8 are replaced: procfs refuses them.
        let text = fs::read(format!("/proc/{pid}/status")).ok()?;
        let status = Status::from_buf_read(String::from_utf8_lossy(&text).as_bytes()).ok()?;
        let pid = status.nstgid.as_ref().and_then(|ids| ids.last()).copied().unwrap_or(status.tgid);
        Some(Self { users: [0, status.ruid, status.euid], pid })
    }
}

impl Default for PerfMap {
    fn default() -> Self {
        Self { inherited: Arc::default(), own: None, reason: NONE }
    }
}

impl PerfMap {
    /// The map of a child that has just been forked: it has the code of its parent, but will write to a file of its own.
    #[must_use]
    pub fn copy_for_child(&self) -> Self {
        let own = self.own.as_ref().map(|open| open.parser.index()).filter(|index| !index.is_empty());
        Self { inherited: own.cloned().map_or_else(|| Arc::clone(&self.inherited), Arc::new), ..Self::default() }
    }

    /// The name of the code at an address, or why there is none.
    pub fn find(&self, address: u64) -> Result<Arc<str>, &'static str> {
        let own = self.own.as_ref().and_then(|open| open.parser.index().find(address));
        own.or_else(|| self.inherited.find(address)).cloned().ok_or(self.reason)
    }

    /// Opens the map if it is there by now, and reads what has been added to it. `root` is the process's, `through` a thread
    /// of it that lives.
    pub fn refresh(&mut self, id: ProcessId, through: u32, root: Option<&Root>) {
        let owner = root.zip(Owner::of(through));
        // Whoever has this pid now, if it is not the process: its map is not ours.
        let alive = || ProcessId::current(id.tgid).is_ok_and(|now| now == id);
        if let Some((root, owner)) = owner
            && alive()
        {
            let path = format!("/tmp/perf-{}.map", owner.pid);
            self.open(root, Path::new(&path), &owner);
        }
        if let Some(Err(why)) = self.own.as_mut().map(Open::read) {
            (self.own, self.reason) = (None, why);
        }
    }

    fn open(&mut self, root: &Root, path: &Path, owner: &Owner) {
        let Ok(file) = root.open_no_link(path) else { return };
        match trusted(&file, owner) {
            Err(why) => (self.own, self.reason) = (None, why),
            Ok(id) if self.own.as_ref().is_none_or(|open| open.id != id) => {
                let open = Open { file, id, read: 0, tail: Vec::new(), parser: Parser::default() };
                (self.own, self.reason) = (Some(open), NOT_COVERED);
            }
            Ok(_) => {}
        }
    }
}

/// Which file it is, if its names are to be believed.
fn trusted(file: &File, owner: &Owner) -> Result<FileId, &'static str> {
    let meta = file.metadata().map_err(|_| UNREADABLE)?;
    if !owner.users.contains(&meta.uid()) {
        return Err(NOT_OWNED);
    }
    if meta.mode() & libc::S_IWOTH != 0 {
        return Err(WRITABLE);
    }
    // Somebody may have given this name to another of the user's files. None at all is left where it was removed.
    if meta.nlink() > 1 {
        return Err(LINKED);
    }
    if meta.len() > MAX_FILE {
        return Err(TOO_LARGE);
    }
    Ok(FileId { dev: meta.dev(), inode: meta.ino() })
}

impl Open {
    /// Reads what is new; or everything, where what was read has changed.
    fn read(&mut self) -> Result<(), &'static str> {
        let len = self.file.metadata().map_err(|_| UNREADABLE)?.len();
        if len > MAX_FILE {
            return Err(TOO_LARGE);
        }
        let mut before = vec![0; self.tail.len()];
        let at = self.read - self.tail.len() as u64;
        let grown = len >= self.read && self.file.read_exact_at(&mut before, at).is_ok() && before == self.tail;
        if !grown {
            (self.read, self.parser) = (0, Parser::default());
            self.tail.clear();
        }
        let mut piece = vec![0; 256 << 10];
        while self.read < len {
            let wanted = piece.len().min((len - self.read) as usize);
            let read = self.file.read_at(&mut piece[..wanted], self.read).map_err(|_| UNREADABLE)?;
            if read == 0 {
                break;
            }
            self.parser.feed(&piece[..read]);
            self.read += read as u64;
            self.tail.extend_from_slice(&piece[read.saturating_sub(TAIL)..read]);
            self.tail.drain(..self.tail.len().saturating_sub(TAIL));
        }
        Ok(())
    }
}

/// The language of code that its name gives away beyond doubt: those of V8, of `CPython` and of agents for the JVM.
pub(super) fn language_of(name: &str) -> Option<&'static str> {
    const V8: [&str; 6] = ["JS:", "LazyCompile:", "InterpretedFunction:", "Function:", "Eval:", "Script:"];
    if V8.iter().any(|prefix| name.starts_with(prefix)) {
        return Some("javascript");
    }
    if name.starts_with("py::") {
        return Some("python");
    }
    (name.starts_with('L') && name.contains(";::")).then_some("java")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{OpenOptions, Permissions};
    use std::io::{Seek, SeekFrom, Write};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    /// A root with a map in it, as this process would write it.
    struct Scene {
        folder: tempfile::TempDir,
        map: PerfMap,
        id: ProcessId,
    }

    impl Scene {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a temporary folder");
            fs::create_dir(folder.path().join("tmp")).expect("a folder");
            let id = ProcessId::current(std::process::id()).expect("this process lives");
            Self { folder, map: PerfMap::default(), id }
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join(format!("tmp/perf-{}.map", self.id.tgid))
        }

        fn append(&self, text: &str) {
            let mut file =
                OpenOptions::new().create(true).append(true).open(self.path()).expect("the map can be opened");
            file.set_permissions(Permissions::from_mode(0o644)).expect("it is ours");
            file.write_all(text.as_bytes()).expect("the map can be written");
        }

        fn find(&mut self, address: u64) -> Result<String, &'static str> {
            let root = Root::at(self.folder.path()).expect("the folder can be opened");
            self.map.refresh(self.id, self.id.tgid, Some(&root));
            self.map.find(address).map(|name| name.to_string())
        }
    }

    /// A map appears, grows in the middle of a line, and is removed: names are there as far as lines are whole, and stay.
    #[test]
    fn grows() {
        let mut scene = Scene::new();
        assert_eq!(scene.find(0x1000), Err(NONE));
        scene.append("1000 10 first\n2000 10 sec");
        assert_eq!(scene.find(0x100f), Ok("first".to_owned()));
        assert_eq!(scene.find(0x2000), Err(NOT_COVERED));
        scene.append("ond\n");
        assert_eq!(scene.find(0x2000), Ok("second".to_owned()));
        fs::remove_file(scene.path()).expect("it can be removed");
        assert_eq!(scene.find(0x2000), Ok("second".to_owned()));
    }

    /// What was written before the end of a process is read after it.
    #[test]
    fn read_after_the_end() {
        let mut scene = Scene::new();
        scene.append("1000 10 first\n");
        assert!(scene.find(0x1000).is_ok());
        scene.append("2000 10 last\n");
        let root = Root::at(scene.folder.path()).expect("the folder can be opened");
        // The pid has gone to another process since.
        let ended = ProcessId { start_time: scene.id.start_time + 1, ..scene.id };
        scene.map.refresh(ended, ended.tgid, Some(&root));
        assert_eq!(scene.map.find(0x2000).as_deref(), Ok("last"));
        let mut other = PerfMap::default();
        other.refresh(ended, ended.tgid, Some(&root));
        assert_eq!(other.find(0x2000), Err(NONE));
    }

    /// A map that is written anew, in place or as another file, is read anew.
    #[test]
    fn rewritten() {
        let mut scene = Scene::new();
        scene.append("1000 10 first\n");
        assert!(scene.find(0x1000).is_ok());
        let mut file = OpenOptions::new().write(true).open(scene.path()).expect("the map can be opened");
        file.write_all(b"3000 10 other\n4000 10 longer than before\n").expect("the map can be written");
        assert_eq!(scene.find(0x1000), Err(NOT_COVERED));
        assert_eq!(scene.find(0x4000), Ok("longer than before".to_owned()));
        file.set_len(0).expect("it can be cut");
        file.seek(SeekFrom::Start(0)).expect("it can be rewound");
        assert_eq!(scene.find(0x4000), Err(NOT_COVERED));
        fs::remove_file(scene.path()).expect("it can be removed");
        scene.append("5000 10 new file\n");
        assert_eq!(scene.find(0x5000), Ok("new file".to_owned()));
    }

    /// Not trusted: another user's, one that everybody may write to, a link, one with a second name, a pipe.
    #[test]
    fn not_trusted() {
        let mut scene = Scene::new();
        scene.append("1000 10 name\n");
        let path = scene.path();
        assert!(scene.find(0x1000).is_ok());
        fs::set_permissions(&path, Permissions::from_mode(0o666)).expect("it is ours");
        assert_eq!(scene.find(0x1000), Err(WRITABLE));
        fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("it is ours");
        assert!(scene.find(0x1000).is_ok());
        let second = scene.folder.path().join("second");
        fs::hard_link(&path, &second).expect("a link");
        assert_eq!(scene.find(0x1000), Err(LINKED));
        fs::remove_file(&path).expect("it can be removed");
        symlink("../second", &path).expect("a link");
        scene.map = PerfMap::default();
        assert_eq!(scene.find(0x1000), Err(NONE));
        fs::remove_file(&path).expect("it can be removed");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).expect("a pipe");
        assert_eq!(scene.find(0x1000), Err(NONE));
    }

    /// Whose it is decides, not who may read it: this process's user and root are believed, others are not.
    #[test]
    fn owners() {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(b"1000 10 name\n").expect("the file can be written");
        let user = file.metadata().expect("it is open").uid();
        // A file in no folder has no name, as one that was removed.
        let owner = |users| Owner { users, pid: 1 };
        assert!(trusted(&file, &owner([user, 1, 2])).is_ok());
        assert!(trusted(&file, &owner([1, 2, user])).is_ok());
        assert_eq!(trusted(&file, &owner([user + 1, user + 2, user + 3])), Err(NOT_OWNED));
        let own = Owner::of(std::process::id()).expect("this process lives");
        assert!(own.users.contains(&0) && own.users.contains(&user) && own.pid == std::process::id() as i32);
    }

    /// A map over the bound is not read, and one that grows over it is given up.
    #[test]
    fn too_large() {
        let mut scene = Scene::new();
        scene.append("1000 10 name\n");
        assert!(scene.find(0x1000).is_ok());
        let file = OpenOptions::new().write(true).open(scene.path()).expect("the map can be opened");
        file.set_len(MAX_FILE + 1).expect("a file with a hole");
        assert_eq!(scene.find(0x1000), Err(TOO_LARGE));
        scene.map = PerfMap::default();
        assert_eq!(scene.find(0x1000), Err(TOO_LARGE));
    }

    /// A forked child has the names of its parent until it writes others.
    #[test]
    fn inherited() {
        let mut scene = Scene::new();
        scene.append("1000 10 parent's\n2000 10 parent's too\n");
        assert!(scene.find(0x1000).is_ok());
        let mut child = Scene::new();
        child.map = scene.map.copy_for_child();
        child.append("2000 10 child's\n");
        assert_eq!(child.find(0x1000), Ok("parent's".to_owned()));
        assert_eq!(child.find(0x2000), Ok("child's".to_owned()));
        let grandchild = child.map.copy_for_child().copy_for_child();
        assert_eq!(grandchild.find(0x2000).as_deref(), Ok("child's"));
    }

    /// Only names that are of one language alone tell it.
    #[test]
    fn languages() {
        assert_eq!(language_of("JS:*handle /srv/app.js:10:5"), Some("javascript"));
        assert_eq!(language_of("py::load:/srv/app.py"), Some("python"));
        assert_eq!(language_of("Ljava/util/HashMap;::put"), Some("java"));
        assert_eq!(language_of("Lazy"), None);
        assert_eq!(language_of("Builtin:Call"), None);
    }
}

//! Reads `/proc/PID/maps`, and opens the files behind mappings: also those of containers, and deleted or replaced ones.
//!
//! Bytes, not text: paths are chosen by the traced process and need not be UTF-8.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file, as the kernel names it. Reused once nobody has the file open or mapped any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// As `st_dev` has it.
    pub dev: u64,
    pub inode: u64,
}

impl FileId {
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|meta| Self { dev: meta.dev(), inode: meta.ino() })
    }

    /// Whether an opened file is the one that a mapping names. A device without a block device below it (major 0) may have several
    /// numbers for one file.
    fn is(self, opened: Self) -> bool {
        let virtual_device = libc::major(self.dev) == 0 || libc::major(opened.dev) == 0;
        self.inode == opened.inode && (self.dev == opened.dev || virtual_device)
    }
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
    /// Where in the file `start` is.
    pub offset: u64,
    pub executable: bool,
    /// None of an anonymous mapping. On overlay file systems and btrfs the device may not be the one that `stat` tells.
    pub file: Option<FileId>,
    /// Untrusted; ends in ` (deleted)` if the file has no name any more. Or a name in brackets, or empty.
    pub path: &'a [u8],
}

impl<'a> Mapping<'a> {
    /// Reads one line; none if it is no such line.
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.splitn(6, |&b| b == b' ');
        let mut text = || std::str::from_utf8(fields.next()?).ok();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = text()?.split_once('-')?;
        let permissions = text()?;
        let offset = hex(text()?)?;
        let (major, minor) = text()?.split_once(':')?;
        let inode = text()?.parse().ok()?;
        let dev = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let path = fields.next().unwrap_or_default().trim_ascii_start();
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            offset,
            executable: permissions.as_bytes().get(2) == Some(&b'x'),
            file: (inode != 0).then_some(FileId { dev, inode }),
            path,
        })
    }

    /// The path without the mark of a deleted file.
    pub fn display_path(&self) -> PathBuf {
        let path = self.path.strip_suffix(b" (deleted)").unwrap_or(self.path);
        PathBuf::from(OsStr::from_bytes(path))
    }

    /// Opens the file behind it for reading.
    ///
    /// First through `map_files`, which is the mapped file whatever became of its name, but takes `CAP_SYS_ADMIN` or
    /// `CAP_CHECKPOINT_RESTORE`, and of another user's process `CAP_DAC_READ_SEARCH` (its folder is the user's alone); then by its path
    /// in the process's root, and as the program that the process runs, if that is still the same file.
    ///
    /// # Errors
    /// Also where it is no regular file: opening a device could do something.
    pub fn open(&self, pid: u32) -> io::Result<File> {
        let Some(id) = self.file else { return Err(io::Error::other("no file is mapped there")) };
        let direct = open_regular(Path::new(&format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end)));
        direct.or_else(|error| {
            let mut path = format!("/proc/{pid}/root").into_bytes();
            path.extend_from_slice(self.path);
            let by_name = open_regular(Path::new(OsStr::from_bytes(&path)));
            if let Ok(file) = &by_name
                && id.is(FileId::of(file)?)
            {
                return by_name;
            }
            let running = open_regular(Path::new(&format!("/proc/{pid}/exe")));
            match running {
                Ok(file) if id.is(FileId::of(&file)?) => Ok(file),
                _ if by_name.is_ok() => Err(io::Error::other("the file has been replaced")),
                _ => Err(error),
            }
        })
    }
}

/// Opens a regular file and nothing else; neither a pipe nor a terminal can hold us up.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // First without opening what it is, then the very file that was looked at, whatever its name leads to by now.
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    if !found.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// The mappings in the text of `/proc/PID/maps`, lowest first. Lines of another form are left out.
pub fn parse(text: &[u8]) -> impl Iterator<Item = Mapping<'_>> {
    text.split(|&b| b == b'\n').filter_map(Mapping::parse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A line with a file, one without, and a path with spaces and bytes that are no UTF-8.
    #[test]
    fn lines() {
        let text = b"7f12a000-7f12b000 r-xp 00028000 08:02 173521      /usr/lib/libc.so.6\n\
            7fff0000-7fff2000 rw-p 00000000 00:00 0       [stack]\n\
            1000-2000 --xp 00001000 fe:10 9 /tmp/a \xff b (deleted)\n\
            no such line\n";
        let found: Vec<_> = parse(text).collect();
        assert_eq!(found.len(), 3);
        let id = FileId { dev: libc::makedev(8, 2), inode: 173_521 };
        let first = Mapping {
            start: 0x7f12_a000,
            end: 0x7f12_b000,
            offset: 0x28000,
            executable: true,
            file: Some(id),
            path: b"/usr/lib/libc.so.6",
        };
        assert_eq!(found[0], first);
        assert_eq!((found[1].executable, found[1].file, found[1].path), (false, None, &b"[stack]"[..]));
        assert_eq!(found[2].path, b"/tmp/a \xff b (deleted)");
        assert_eq!(found[2].display_path().as_os_str().as_bytes(), b"/tmp/a \xff b");
        assert_eq!(found[2].file.map(|id| libc::major(id.dev)), Some(0xfe));
    }

    /// Each file that this process executes can be opened, and is the file of that line.
    #[test]
    fn opens_own_files() {
        let text = std::fs::read("/proc/self/maps").expect("maps can be read");
        let mut opened = 0;
        for mapping in parse(&text).filter(|m| m.executable && m.file.is_some()) {
            let file = mapping.open(std::process::id()).expect("own files can be opened");
            assert_eq!(FileId::of(&file).ok().map(|id| id.inode), mapping.file.map(|id| id.inode));
            opened += 1;
        }
        assert!(opened > 1, "the test itself and libc");
    }

    /// Neither a pipe nor a folder is opened.
    #[test]
    fn regular_files_only() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).expect("a pipe");
        for path in [pipe.as_path(), folder.path(), Path::new("/dev/null")] {
            assert!(open_regular(path).is_err(), "{}", path.display());
        }
    }

    proptest! {
        /// Any bytes give mappings or nothing, never a panic.
        #[test]
        fn total_on_arbitrary_text(text in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = parse(&text).count();
        }

        /// The same for lines that are nearly right.
        #[test]
        fn total_on_similar_lines(text in "[0-9a-f]{0,17}-[0-9a-f]{0,17} [rwxp-]{0,4} [0-9a-f]{0,9} [0-9a-f]{0,9}:[0-9a-f]{0,3} [0-9]{0,20} .{0,9}") {
            let _ = parse(text.as_bytes()).count();
        }
    }
}

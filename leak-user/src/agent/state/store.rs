//! The file of the state: there whole or as it was before, whenever power goes, and told from a damaged one by its checksum.
//!
//! The first line is `leaktrace-state VERSION CRC32 LENGTH`, what follows is JSON. A new file is written beside the old one and made
//! durable, takes its name, and then the folder is made durable, which is what rename(2) needs to survive (fsync(2)).

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;

/// Of the form of the file: goes up with each change that older versions could not read.
const VERSION: u32 = 1;
const MAGIC: &str = "leaktrace-state";
const NAME: &str = "baselines";
/// Damaged files that are kept.
const SET_ASIDE: usize = 3;

/// A folder with the file in it.
pub struct Store {
    folder: PathBuf,
    writer: Mutex<Writer>,
}

#[derive(Default)]
struct Writer {
    /// Held from the first write on, so that two agents do not overwrite each other's.
    lock: Option<File>,
    /// Of the latest contents.
    number: u64,
}

/// A file that could not be used.
#[derive(Debug)]
pub enum Damaged {
    /// It has another name now, or why it could not get one.
    SetAside { why: String, to: Result<PathBuf, io::Error> },
    /// It cannot be read, and is left alone.
    Unreadable { path: PathBuf, error: io::Error },
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetAside { why, to: Ok(path) } => {
                write!(f, "the file {why}; set aside as {}, begun anew", path.display())
            }
            Self::SetAside { why, to: Err(error) } => write!(f, "the file {why}, and cannot be set aside: {error}"),
            Self::Unreadable { path, error } => write!(f, "{}: cannot be read: {error}", path.display()),
        }
    }
}

impl Store {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), writer: Mutex::default() }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// What was written last, if there is something.
    pub fn read<T: for<'de> Deserialize<'de>>(&self, max_bytes: u64) -> Result<Option<T>, Damaged> {
        let path = self.path();
        let mut bytes = Vec::new();
        // One that was written with a larger bound is still read.
        let most = max_bytes.max(64 << 20) + 128;
        match File::open(&path).and_then(|file| file.take(most).read_to_end(&mut bytes)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Damaged::Unreadable { path, error }),
        }
        match parse(&bytes) {
            Ok(found) => Ok(Some(found)),
            Err(why) => Err(Damaged::SetAside { why, to: self.set_aside() }),
        }
    }

    /// Gives the file another name, and removes the oldest of those that have one.
    fn set_aside(&self) -> io::Result<PathBuf> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let prefix = format!("{NAME}.corrupt-");
        let mut aside: Vec<PathBuf> = fs::read_dir(&self.folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
            .collect();
        aside.sort();
        let to = self.folder.join(format!("{prefix}{time}"));
        fs::rename(self.path(), &to)?;
        aside.retain(|path| *path != to);
        for old in aside.iter().take((aside.len() + 1).saturating_sub(SET_ASIDE)) {
            fs::remove_file(old)?;
        }
        Ok(to)
    }

    /// Replaces the file, unless contents of a higher number were written meanwhile. On failure it stays as it was, and nothing else is left
    /// behind.
    pub fn write(&self, json: &[u8], number: u64) -> io::Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if number < writer.number {
            return Ok(());
        }
        fs::create_dir_all(&self.folder)?;
        self.hold(&mut writer.lock)?;
        let mut file = tempfile::Builder::new().prefix(".baselines-").tempfile_in(&self.folder)?;
        writeln!(file, "{MAGIC} {VERSION} {:08x} {}", crc32fast::hash(json), json.len())?;
        file.write_all(json)?;
        file.as_file().sync_all()?;
        file.persist(self.path()).map_err(|failed| failed.error)?;
        writer.number = number;
        File::open(&self.folder)?.sync_all()
    }

    fn hold(&self, held: &mut Option<File>) -> io::Result<()> {
        if held.is_none() {
            let file = File::options().create(true).truncate(false).write(true).open(self.folder.join("lock"))?;
            file.try_lock().map_err(|error| match error {
                TryLockError::WouldBlock => io::Error::other("another agent uses it"),
                TryLockError::Error(error) => error,
            })?;
            *held = Some(file);
        }
        Ok(())
    }
}

/// The contents of a file, or what is wrong with it.
fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, String> {
    let damaged = || "is damaged".to_owned();
    let end = bytes.iter().take(128).position(|&byte| byte == b'\n').ok_or_else(damaged)?;
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| damaged())?;
    let json = &bytes[end + 1..];
    let fields: Vec<&str> = head.split(' ').collect();
    let [MAGIC, version, crc, length] = fields[..] else { return Err(damaged()) };
    if version != VERSION.to_string() {
        return Err(format!("has version {}, where this agent writes {VERSION}", version.escape_debug()));
    }
    if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(json)) || length.parse() != Ok(json.len()) {
        return Err(damaged());
    }
    serde_json::from_slice(json).map_err(|error| format!("cannot be understood: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = entries.collect();
        names.sort();
        names
    }

    /// What is written is read again, replaced as a whole, and nothing else lies around.
    #[test]
    fn round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(&folder.path().join("made/on/the/way"));
        assert!(store.read::<Vec<u32>>(1 << 20).unwrap().is_none());
        // The last began before the one in front of it.
        for (numbers, number) in [("[1,2]", 0), ("[3]", 2), ("[4]", 1)] {
            store.write(numbers.as_bytes(), number).unwrap();
        }
        assert_eq!(store.read::<Vec<u32>>(1 << 20).unwrap(), Some(vec![3]));
        assert_eq!(names(store.folder()), ["baselines", "lock"]);
    }

    /// Whatever was cut off, changed or is of another version is set aside, however it is damaged, and what follows works.
    #[test]
    fn damaged_files() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        store.write(b"[1,2,3]", 0).unwrap();
        let whole = fs::read(store.path()).unwrap();
        let mut cases: Vec<Vec<u8>> = (0..whole.len()).map(|length| whole[..length].to_vec()).collect();
        for place in 0..whole.len() {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            cases.push(changed);
        }
        cases.push(b"leaktrace-state 2 00000000 0\n".to_vec());
        cases.push(vec![b'x'; 1000]);
        for case in cases {
            fs::write(store.path(), &case).unwrap();
            let Err(damaged) = store.read::<Vec<u32>>(1 << 20) else { panic!("{case:?} is damaged") };
            let text = damaged.to_string();
            assert!(text.contains("baselines.corrupt-"), "{text}");
            assert!(!store.path().exists());
            assert!(names(folder.path()).len() <= 1 + SET_ASIDE, "{:?}", names(folder.path()));
        }
        // JSON of another kind, with the right checksum.
        store.write(b"{\"a\":1}", 0).unwrap();
        assert!(store.read::<Vec<u32>>(1 << 20).is_err_and(|damaged| damaged.to_string().contains("understood")));
        store.write(b"[7]", 0).unwrap();
        assert_eq!(store.read::<Vec<u32>>(1 << 20).unwrap(), Some(vec![7]));
    }

    /// A folder belongs to one agent at a time, and a file in place of the folder is an error.
    #[test]
    fn whose_folder() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (Store::new(folder.path()), Store::new(folder.path()));
        one.write(b"[]", 0).unwrap();
        assert!(other.write(b"[]", 0).is_err_and(|error| error.to_string().contains("another agent")));
        drop(one);
        other.write(b"[]", 0).unwrap();
        assert!(Store::new(&other.path()).write(b"[]", 0).is_err());
    }
}

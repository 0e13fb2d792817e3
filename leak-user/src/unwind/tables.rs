//! Which files' rows are in the kernel's map, for which processes, and where in each process they hold.
//!
//! A file is loaded once, however many processes map it under however many names, also out of several containers. It is the
//! same file if its headers, its build id and its unwind information are the same, byte by byte (compared by a keyed hash). A build id
//! alone would let a process that lies about its own spoil the stacks of others.

use super::extents::{Extent, Placed, Residents};
use super::image::{Code, Data, Image, bias};
use super::packed::Packed;
use super::table::{Rows, Table, Why};
use crate::discover::{FileId, maps};
use crate::process::{self, ProcessId};
use leak_common::unwind::{Range, range_flag};
use object::ReadCache;
use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

/// The most of a vDSO that is read, in bytes. It has two pages.
const MAX_VDSO: u64 = 1 << 20;

/// How many files are remembered to be this or that, before all are looked at anew.
const MAX_KNOWN: usize = 1 << 14;

/// What is the same in copies of a file.
type Key = u64;

/// A file in one state. The inode alone may be another file's next time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stamp {
    id: FileId,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            id: FileId { dev: meta.dev(), inode: meta.ino() },
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// What is kept of a file's table while its rows are in the map.
#[derive(Clone, Debug)]
struct Loaded {
    base: u64,
    code: Vec<Code>,
    frame_pointers: bool,
    /// Words in the map: rules and rows.
    rows: u32,
    /// How many of them are rules.
    rules: u32,
    full: bool,
    /// Somebody needs all rows.
    wants_full: bool,
    missing: Option<&'static str>,
}

/// Where the rows of a process's code are.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    /// Sorted, without overlaps.
    pub ranges: Vec<Range>,
    /// Files whose code has no rows, by path (untrusted), and why.
    pub missing: Vec<(PathBuf, String)>,
    /// Other processes whose ranges name rows that are given up: they have to be made anew, too.
    pub stale: Vec<ProcessId>,
    /// More rows can be loaded once [`Tables::reclaim`] has freed some: make these ranges anew then.
    pub pending: bool,
}

/// How much is loaded, and what was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In all, in rows of eight bytes.
    pub capacity: u32,
    /// In use.
    pub rows: u32,
    /// Not in use, and not yet free.
    pub quarantined: u32,
    /// Tables that were made.
    pub built: u64,
    /// How often a file lost its rows while a process used it.
    pub pushed_out: u64,
}

/// A mapping of a process, as of the last time that its ranges were made.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    start: u64,
    end: u64,
    key: Key,
}

/// Writes rows into the map, from an index on.
pub trait Sink: FnMut(u32, &[u64]) -> io::Result<()> {}
impl<F: FnMut(u32, &[u64]) -> io::Result<()>> Sink for F {}

/// The rows of all traced processes.
#[derive(Debug)]
pub struct Tables {
    residents: Residents<Key, ProcessId>,
    files: HashMap<Key, Loaded>,
    known: HashMap<Stamp, Result<Key, Why>>,
    processes: HashMap<ProcessId, Vec<Mapped>>,
    /// Its keys are random: nobody can make a file that hashes like another.
    hasher: RandomState,
    built: u64,
}

/// How one mapping is walked.
#[derive(Clone, Debug)]
enum Walk {
    /// By the rows of a file, if there are any.
    File(Key),
    /// Generated code, or a file that is no program.
    Generated,
    Nothing(String),
}

impl Tables {
    /// For a map of so many rows.
    pub fn new(capacity: u32) -> Self {
        Self {
            residents: Residents::new(capacity),
            files: HashMap::new(),
            known: HashMap::new(),
            processes: HashMap::new(),
            hasher: RandomState::new(),
            built: 0,
        }
    }

    /// Loads what the process has mapped as code, and says where its rows are. To be called when a process is new, when it mapped code
    /// or executed another program, and when it is named in [`Ranges::stale`]. `through`: a thread of it that lives.
    ///
    /// The ranges of before hold until the new ones are in place; rows that they name are not written over before
    /// [`Self::reclaim`] has freed them.
    ///
    /// # Errors
    /// Only if the process's mappings cannot be read; then nothing has changed.
    pub fn refresh(&mut self, id: ProcessId, through: u32, mut sink: impl Sink) -> Result<Ranges, process::Error> {
        let mut text = Vec::new();
        let read = File::open(format!("/proc/{through}/maps")).and_then(|mut maps| maps.read_to_end(&mut text));
        read.map_err(|e| process::Error::reading(id.tgid, "memory mappings", e))?;
        self.residents.begin(id);
        self.residents.protect(self.processes.get(&id).into_iter().flatten().map(|mapped| &mapped.key));
        let mut found = Ranges::default();
        let mut extents = Vec::new();
        let mut mapped = Vec::new();
        // A file usually has one executable mapping, but may have many.
        let mut seen: HashMap<FileId, Walk> = HashMap::new();
        for mapping in maps::parse(&text).filter(|m| m.executable && m.start < m.end) {
            // Nothing can be on a stack there: the kernel runs these itself, or as part of a probe.
            if mapping.path == b"[vsyscall]" || mapping.path.starts_with(b"[uprobes") {
                continue;
            }
            let known = mapping.file.and_then(|file| seen.get(&file)).cloned();
            let (walk, is_new) = match known {
                Some(walk) => (walk, false),
                None => (self.load(id, through, &mapping, &mut found.pending, &mut sink), true),
            };
            if let Some(file) = mapping.file {
                seen.insert(file, walk.clone());
            }
            let mut range = Range { start: mapping.start, end: mapping.end, ..Range::default() };
            let missing = match &walk {
                Walk::Generated => {
                    range.flags = range_flag::FRAME_POINTERS;
                    None
                }
                Walk::Nothing(why) => Some(why.clone()),
                Walk::File(key) => {
                    mapped.push(Mapped { start: mapping.start, end: mapping.end, key: *key });
                    self.fill(*key, &mapping, &mut range, &mut extents)
                }
            };
            if let Some(why) = missing.filter(|_| is_new) {
                found.missing.push((mapping.display_path(), why));
            }
            push(&mut found.ranges, range);
        }
        self.residents.publish(id, extents);
        self.processes.insert(id, mapped);
        self.drop_unused();
        found.stale = self.residents.stale();
        Ok(found)
    }

    /// Completes the range of a mapping of a file; or says why it has no rows.
    fn fill(&self, key: Key, mapping: &maps::Mapping, range: &mut Range, extents: &mut Vec<Extent>) -> Option<String> {
        let file = &self.files[&key];
        if file.frame_pointers {
            range.flags |= range_flag::FRAME_POINTERS;
        }
        let Some(bias) = bias(&file.code, file.base, mapping.start, mapping.offset) else {
            return Some("the file does not say that this part of it is code".to_owned());
        };
        range.bias = bias;
        if let Some(extent) = self.residents.extent(&key) {
            // What is in the map are the words of this file as they are packed now.
            range.rules = file.rules;
            (range.first, range.rows) = (extent.first + file.rules, extent.rows.saturating_sub(file.rules));
            if file.full {
                range.flags |= range_flag::FULL;
            }
            extents.push(extent);
            return None;
        }
        if file.frame_pointers && file.rows == 0 {
            return None;
        }
        Some(file.missing.unwrap_or("no memory for unwind tables is left").to_owned())
    }

    /// Sees to it that the rows of a mapping are in the map, if there is room.
    fn load(
        &mut self,
        id: ProcessId,
        through: u32,
        mapping: &maps::Mapping,
        pending: &mut bool,
        sink: &mut impl Sink,
    ) -> Walk {
        if mapping.file.is_none() {
            return match mapping.path {
                b"[vdso]" => match vdso(through, mapping) {
                    Ok(bytes) => match Image::open(Data::Bytes(&bytes)) {
                        Ok(image) => self.load_image(id, self.key(&image), &image, pending, sink),
                        Err(why) => Walk::Nothing(why.to_string()),
                    },
                    Err(error) => Walk::Nothing(format!("cannot be read: {error}")),
                },
                _ => Walk::Generated,
            };
        }
        let opened = mapping.open(through).and_then(|file| Ok((Stamp::of(&file)?, file)));
        let (stamp, file) = match opened {
            Ok(opened) => opened,
            Err(error) => return Walk::Nothing(format!("cannot be opened: {error}")),
        };
        match self.known.get(&stamp) {
            Some(&Ok(key)) if self.files.contains_key(&key) => {
                self.residents.used(&key, id);
                if self.is_settled(key, pending) {
                    return Walk::File(key);
                }
            }
            Some(Err(why)) => return failed(why),
            _ => {}
        }
        let cache = ReadCache::new(&file);
        let image = Image::open(Data::File(&cache, &file));
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        match image {
            Ok(image) => {
                let key = self.key(&image);
                self.known.insert(stamp, Ok(key));
                let walk = self.load_image(id, key, &image, pending, sink);
                if let Walk::Nothing(_) = walk {
                    self.known.remove(&stamp);
                }
                walk
            }
            Err(why) => {
                let walk = failed(&why);
                // What could not be read may be readable next time.
                if !matches!(why, Why::Unreadable(_)) {
                    self.known.insert(stamp, Err(why));
                }
                walk
            }
        }
    }

    fn key(&self, image: &Image) -> Key {
        let mut hasher = self.hasher.build_hasher();
        image.hash_unwind_information(&mut hasher);
        hasher.finish()
    }

    /// Whether the file need not be read: it is loaded as it is wanted, or there is no room for it now.
    fn is_settled(&mut self, key: Key, pending: &mut bool) -> bool {
        let Some(file) = self.files.get(&key) else { return false };
        if file.rows == 0 || self.residents.extent(&key).is_some() {
            return file.full || !file.wants_full;
        }
        if self.residents.has_room(file.rows) {
            return false;
        }
        *pending |= self.residents.place(&key, file.rows) == Placed::Later;
        true
    }

    fn load_image(&mut self, id: ProcessId, key: Key, image: &Image, pending: &mut bool, sink: &mut impl Sink) -> Walk {
        self.residents.used(&key, id);
        if self.is_settled(key, pending) {
            return Walk::File(key);
        }
        let wants_full = self.files.get(&key).is_some_and(|file| file.wants_full);
        let table = match Table::of_image(image, if wants_full { Rows::Full } else { Rows::CallEnds }) {
            Ok(table) => table,
            Err(why) => return Walk::Nothing(why.to_string()),
        };
        self.built += 1;
        let packed = Packed::new(&table.rows);
        let rows = u32::try_from(packed.words().len()).unwrap_or(u32::MAX);
        let placed = if rows == 0 { None } else { Some(self.residents.place(&key, rows)) };
        let mut loaded = Loaded {
            base: table.base,
            frame_pointers: table.frame_pointers,
            rows,
            rules: packed.rules(),
            full: table.full,
            wants_full,
            missing: table.missing(),
            code: table.code,
        };
        match placed {
            None => {}
            Some(Placed::Now(extent)) => {
                if let Err(error) = sink(extent.first, packed.words()) {
                    self.residents.withdraw(&key);
                    return Walk::Nothing(format!("its unwind table cannot be written: {error}"));
                }
            }
            Some(other) => {
                *pending |= other == Placed::Later;
                if let Placed::No(why) = other {
                    loaded.missing = Some(why);
                }
                // All rows instead of the most useful ones: those that are there stay, and it is not tried again.
                if let Some(before) = self.files.get_mut(&key).filter(|_| wants_full) {
                    before.wants_full = other == Placed::Later;
                    return Walk::File(key);
                }
            }
        }
        self.files.insert(key, loaded);
        Walk::File(key)
    }

    /// A frame of the process was interrupted at this address, and rows for ends of calls are not enough. Returns whether there are
    /// better ones to be had: then the process's ranges have to be made anew.
    pub fn need_full(&mut self, id: ProcessId, address: u64) -> bool {
        let mapped = self.processes.get(&id).and_then(|m| m.iter().find(|m| (m.start..m.end).contains(&address)));
        let Some(file) = mapped.and_then(|mapped| self.files.get_mut(&mapped.key)) else { return false };
        let better = !file.full && !file.wants_full && file.rows > 0;
        file.wants_full |= better;
        better
    }

    /// The process is gone.
    pub fn forget(&mut self, id: ProcessId) {
        self.processes.remove(&id);
        self.residents.forget(id);
        self.drop_unused();
    }

    fn drop_unused(&mut self) {
        self.files.retain(|key, _| self.residents.contains(key));
    }

    /// To be called now and then, with more time between two calls than any walk takes: rows that were given up, and that no
    /// process's ranges named at the call before, become free. Returns their number.
    pub fn reclaim(&mut self) -> u32 {
        self.residents.reclaim()
    }

    pub fn usage(&self) -> Usage {
        Usage {
            capacity: self.residents.capacity(),
            rows: self.residents.rows(),
            quarantined: self.residents.quarantined_rows(),
            built: self.built,
            pushed_out: self.residents.pushed_out(),
        }
    }
}

/// How code of a file is walked that is no program for this machine, or a broken one.
fn failed(why: &Why) -> Walk {
    match why {
        Why::NotElf => Walk::Generated,
        other => Walk::Nothing(other.to_string()),
    }
}

/// The bytes of the process's vDSO.
fn vdso(pid: u32, mapping: &maps::Mapping) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; (mapping.end - mapping.start).min(MAX_VDSO) as usize];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut bytes, mapping.start)?;
    Ok(bytes)
}

/// Adds a range, or lets the last one reach further.
fn push(ranges: &mut Vec<Range>, range: Range) {
    if let Some(last) = ranges.last_mut() {
        // The kernel lists mappings by address, but the list may change while it is read.
        if range.start < last.end {
            return;
        }
        let same = Range { start: last.start, end: last.end, ..range };
        if last.end == range.start && *last == same {
            last.end = range.end;
            return;
        }
    }
    ranges.push(range);
}

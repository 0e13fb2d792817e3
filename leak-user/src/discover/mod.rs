//! Finds the functions of allocators in the files that a process has mapped, and where a breakpoint on them is cheap.
//!
//! [`Discovery`] reads the process's mappings ([`maps`]) and looks into each executable file once ([`elf`]); in the functions
//! found, [`breakpoint`] chooses the instruction. Any file that defines malloc and free is an allocator: the C library, a
//! static program, a library or a program that brings its own. Attaching probes is left to [`crate::attach`].

pub mod breakpoint;
pub mod elf;
pub mod maps;

#[cfg(test)]
mod tests;

use crate::process;
pub use breakpoint::{Emulation, Placement};
pub use elf::{Function, ProbePoint, Unusable};
pub use maps::FileId;
use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that holds an allocator.
#[derive(Clone, Debug)]
pub struct AllocatorFile {
    /// As `stat` tells it; the file is held open, so it stays its own.
    pub id: FileId,
    /// Where the process has it, in its own root; untrusted, for display only.
    pub path: PathBuf,
    /// In hexadecimal digits.
    pub build_id: Option<String>,
    /// Which allocator it is: `glibc 2.36`, or else the file's name; untrusted.
    pub label: String,
    /// Where to put probes; at least malloc and free, one per code and kind of arguments.
    pub points: Vec<ProbePoint>,
    /// Functions that are defined but cannot be probed, and why.
    pub unprobed: Vec<(Function, &'static str)>,
    file: Arc<File>,
}

impl AllocatorFile {
    /// A path by which the kernel finds this very file, also in a container, and when it was deleted or replaced. It holds
    /// within this program as long as the value or a clone of it lives.
    pub fn path_for_attach(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// The open file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// A file that was looked into, or could not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Searched {
    /// Untrusted.
    pub path: PathBuf,
    pub outcome: Outcome,
}

/// What looking into a file gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Allocator,
    /// It defines neither malloc nor free, or only one of them.
    NoAllocator,
    /// It defines them, but they cannot be probed.
    Unprobed(Function, &'static str),
    Unusable(Unusable),
    /// It could not be opened.
    Unreadable(String),
}

impl Outcome {
    /// Why nothing can be attached in the file.
    pub fn text(&self) -> String {
        match self {
            Self::Allocator => "allocator".to_owned(),
            Self::NoAllocator => "not defined".to_owned(),
            Self::Unprobed(function, why) => format!("{} is {why}", function.name()),
            Self::Unusable(why) => why.to_string(),
            Self::Unreadable(why) => format!("cannot be opened: {why}"),
        }
    }
}

/// The allocators of one process, and what has been looked into so far.
#[derive(Debug)]
pub struct Discovery {
    pid: u32,
    /// The thread whose memory is looked at, [`crate::process::Process::through`].
    through: u32,
    kernel: Emulation,
    /// Files that have been looked into, by what the mappings call them. Those of allocators are open, so their inode stays
    /// their own; the others are forgotten once they are no longer mapped.
    known: HashMap<FileId, Known>,
    /// Of the executable mappings, when they were last looked at.
    digest: Option<u64>,
    /// The text of the mappings; kept for its capacity.
    text: Vec<u8>,
}

#[derive(Debug)]
struct Known {
    searched: Searched,
    /// Held for an allocator.
    held: Option<Arc<File>>,
}

impl Discovery {
    /// Nothing is looked into yet.
    pub fn new(pid: u32) -> Self {
        Self {
            pid,
            through: pid,
            kernel: Emulation::of_this_kernel(),
            known: HashMap::new(),
            digest: None,
            text: Vec::new(),
        }
    }

    /// From now on looks at the process's memory through this thread of it: the first one may have ended.
    pub fn look_through(&mut self, tid: u32) {
        self.through = tid;
    }

    /// Looks into the files that were mapped since the last time, and returns the allocators among them. While nothing
    /// executable was mapped or unmapped this costs one read of `/proc/PID/maps`.
    ///
    /// # Errors
    /// Only if the mappings cannot be read; a file that cannot be is noted in [`Self::searched`].
    pub fn refresh(&mut self) -> Result<Vec<AllocatorFile>, process::Error> {
        let mut text = std::mem::take(&mut self.text);
        text.clear();
        let read = File::open(format!("/proc/{}/maps", self.through)).and_then(|mut maps| maps.read_to_end(&mut text));
        read.map_err(|e| process::Error::reading(self.pid, "memory mappings", e))?;
        let mapped: Vec<_> = maps::parse(&text).filter(|m| m.executable && m.file.is_some()).collect();
        let digest = digest(&mapped);
        let found = if self.digest == Some(digest) { Vec::new() } else { self.look_into(&mapped) };
        self.digest = Some(digest);
        drop(mapped);
        self.text = text;
        Ok(found)
    }

    fn look_into(&mut self, mapped: &[maps::Mapping]) -> Vec<AllocatorFile> {
        let is_mapped = |id: &FileId| mapped.iter().any(|m| m.file == Some(*id));
        self.known.retain(|id, known| known.held.is_some() || is_mapped(id));
        let mut found = Vec::new();
        for mapping in mapped {
            let Some(id) = mapping.file.filter(|id| !self.known.contains_key(id)) else { continue };
            let path = mapping.display_path();
            let (outcome, allocator) = match mapping.open(self.through) {
                Ok(file) => look_into(file, &path, self.kernel),
                Err(error) => (Outcome::Unreadable(error.to_string()), None),
            };
            let file = allocator.as_ref().map(|a| Arc::clone(&a.file));
            self.known.insert(id, Known { searched: Searched { path, outcome }, held: file });
            found.extend(allocator);
        }
        found
    }

    /// What has been looked into, in the order of the paths.
    pub fn searched(&self) -> Vec<&Searched> {
        let mut searched: Vec<_> = self.known.values().map(|k| &k.searched).collect();
        searched.sort_by(|a, b| a.path.cmp(&b.path));
        searched
    }

    /// The error for a process without an allocator.
    pub fn no_allocator(&self) -> NoAllocator {
        NoAllocator { pid: self.pid, searched: self.searched().into_iter().cloned().collect() }
    }
}

/// In a process no allocator was found that could be probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoAllocator {
    pub pid: u32,
    pub searched: Vec<Searched>,
}

impl std::fmt::Display for NoAllocator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = Function::ALL.map(Function::name).join(", ");
        write!(f, "no allocator found in pid {}: looked for {names} in ", self.pid)?;
        if self.searched.is_empty() {
            return write!(f, "no file at all: it has none mapped as executable");
        }
        for (i, Searched { path, outcome }) in self.searched.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            let path = path.to_string_lossy().escape_default().to_string();
            match outcome {
                Outcome::NoAllocator => write!(f, "{separator}{path}")?,
                other => write!(f, "{separator}{path} ({})", other.text())?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for NoAllocator {}

/// Looks into one file by its path, whoever has it mapped.
pub fn allocator_at(path: &Path) -> io::Result<Result<AllocatorFile, Outcome>> {
    let file = File::open(fs::canonicalize(path)?)?;
    let (outcome, allocator) = look_into(file, path, Emulation::of_this_kernel());
    Ok(allocator.ok_or(outcome))
}

fn look_into(file: File, path: &Path, kernel: Emulation) -> (Outcome, Option<AllocatorFile>) {
    let id = match FileId::of(&file) {
        Ok(id) => id,
        Err(error) => return (Outcome::Unreadable(error.to_string()), None),
    };
    let contents = match elf::read(&file, kernel) {
        Ok(contents) => contents,
        Err(why) => return (Outcome::Unusable(why), None),
    };
    if !contents.is_allocator() {
        let unprobed = contents.unprobed.first();
        return (unprobed.map_or(Outcome::NoAllocator, |&(f, why)| Outcome::Unprobed(f, why)), None);
    }
    let file_name = || path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let label = contents.glibc.map_or_else(file_name, |release| format!("glibc {release}"));
    let allocator = AllocatorFile {
        id,
        path: path.to_owned(),
        build_id: contents.build_id,
        label,
        points: contents.points,
        unprobed: contents.unprobed,
        file: Arc::new(file),
    };
    (Outcome::Allocator, Some(allocator))
}

fn digest(mapped: &[maps::Mapping]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for mapping in mapped {
        (mapping.start, mapping.end, mapping.file).hash(&mut hasher);
    }
    hasher.finish()
}

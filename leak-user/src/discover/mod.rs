//! Finds the functions of allocators in the files that a process has mapped, and where a breakpoint on them is cheap.
//!
//! [`Discovery`] reads the process's mappings ([`maps`]) and looks into each executable file once: at its symbols ([`elf`]), for
//! names that allocators have ([`names`]), which together make an allocator or do not ([`choice`]), without those that only
//! call others ([`forward`]). In the functions chosen, [`breakpoint`] finds the instruction. What is found so: the C library, a
//! static program, a library or a program that brings its own, under whatever prefix; and what the user names
//! ([`Named`]). Attaching probes is left to [`crate::attach`].

pub mod breakpoint;
mod choice;
pub mod elf;
mod files;
mod forward;
pub mod maps;
mod names;

#[cfg(test)]
mod tests;

use crate::process;
use crate::symbols;
pub use breakpoint::{Emulation, Placement};
use choice::Asked;
pub use choice::ProbePoint;
pub use elf::Unusable;
pub use files::Files;
use files::Version;
pub use maps::FileId;
use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
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
    /// Which allocators it holds, as [`ProbePoint::family`] counts them: `glibc 2.36`, `jemalloc`, or else the file's name;
    /// untrusted.
    pub families: Vec<String>,
    /// Where to put probes, one per code; at least one for what allocates and one for what frees.
    pub points: Vec<ProbePoint>,
    /// Functions that are defined but cannot be probed, and why.
    pub unprobed: Vec<(String, &'static str)>,
    file: Arc<File>,
}

impl AllocatorFile {
    /// A path by which the kernel finds this very file, also in a container, and when it was deleted or replaced. It holds
    /// within this program as long as the value or a clone of it lives.
    pub fn path_for_attach(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// All its families in a few words.
    pub fn label(&self) -> String {
        self.families.join(", ")
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
    /// It defines neither malloc nor free, or only one of them, under no prefix that is known.
    NoAllocator,
    /// It defines them, but they cannot be probed.
    Unprobed(String, &'static str),
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
            Self::Unprobed(function, why) => format!("{} is {why}", function.escape_default()),
            Self::Unusable(why) => why.to_string(),
            Self::Unreadable(why) => format!("cannot be opened: {why}"),
        }
    }
}

/// An allocator that the user names, because it is not found by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Of the program or library, as the traced process sees it.
    pub path: PathBuf,
    /// What its functions' names have before malloc, free and so on. Without one whatever looks like an allocator is taken.
    pub prefix: Option<String>,
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.to_string_lossy().escape_debug())?;
        self.prefix.as_ref().map_or(Ok(()), |prefix| write!(f, ":{}", prefix.escape_debug()))
    }
}

/// Why an allocator that the user named is not traced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedError {
    NotMapped {
        pid: u32,
        named: Named,
    },
    /// None of its functions is there.
    NoFunctions {
        named: Named,
    },
    /// It is mapped, but nothing can be attached in it.
    Unusable {
        named: Named,
        why: String,
    },
}

impl std::fmt::Display for NamedError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotMapped { pid, named } => write!(
                f,
                "--allocator {named}: pid {pid} has no such file mapped as executable; /proc/{pid}/maps lists those that it has"
            ),
            Self::NoFunctions { named } => {
                let prefix = named.prefix.as_deref().unwrap_or_default().escape_debug().to_string();
                let list = |frees: bool| {
                    let of = names::C.iter().filter(|(_, shape)| (*shape == leak_common::op::FREE) == frees);
                    of.map(|(name, _)| format!("{prefix}{name}")).collect::<Vec<_>>().join(", ")
                };
                write!(f, "--allocator {named}: its symbols have none of {}, or none of {}", list(false), list(true))
            }
            Self::Unusable { named, why } => write!(f, "--allocator {named}: {why}"),
        }
    }
}

impl std::error::Error for NamedError {}

/// The allocators of one process, and what has been looked into so far.
#[derive(Debug)]
pub struct Discovery {
    pid: u32,
    /// What the user named, and what came of it.
    named: Vec<(Named, Option<Outcome>)>,
    /// The root folders of processes, for debug files.
    roots: symbols::Roots,
    /// The thread whose memory is looked at, [`crate::process::Process::through`].
    through: u32,
    kernel: Emulation,
    /// What is known of files by now, also from other processes.
    files: Files,
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
    /// Nothing is looked into yet, and nothing known.
    pub fn new(pid: u32) -> Self {
        Self::with(pid, Files::default())
    }

    /// Nothing is looked into yet in this process.
    pub fn with(pid: u32, files: Files) -> Self {
        Self {
            pid,
            files,
            named: Vec::new(),
            roots: symbols::Roots::default(),
            through: pid,
            kernel: Emulation::of_this_kernel(),
            known: HashMap::new(),
            digest: None,
            text: Vec::new(),
        }
    }

    /// Takes these files as allocators too. To be called before the first [`Self::refresh`].
    pub fn name(&mut self, named: &[Named]) {
        self.named.extend(named.iter().map(|named| (named.clone(), None)));
    }

    /// Nothing is looked into yet, with what the user named as before: the process executes another program.
    #[must_use]
    pub fn renewed(&self) -> Self {
        let mut new = Self::with(self.pid, self.files.clone());
        new.named.extend(self.named.iter().map(|(named, _)| (named.clone(), None)));
        new
    }

    /// The error for what the user named and is not there, if that is so.
    ///
    /// # Errors
    /// The first of those.
    pub fn require_named(&self) -> Result<(), NamedError> {
        for (named, outcome) in &self.named {
            let named = || named.clone();
            match outcome {
                Some(Outcome::Allocator) => {}
                None => return Err(NamedError::NotMapped { pid: self.pid, named: named() }),
                Some(Outcome::NoAllocator) => return Err(NamedError::NoFunctions { named: named() }),
                Some(other) => return Err(NamedError::Unusable { named: named(), why: other.text() }),
            }
        }
        Ok(())
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
                Ok(file) => self.look_into_file(file, &path),
                Err(error) => (Outcome::Unreadable(error.to_string()), None),
            };
            let file = allocator.as_ref().map(|a| Arc::clone(&a.file));
            self.known.insert(id, Known { searched: Searched { path, outcome }, held: file });
            found.extend(allocator);
        }
        found
    }

    fn look_into_file(&mut self, file: File, path: &Path) -> (Outcome, Option<AllocatorFile>) {
        // What the user named is asked for in this process only.
        let version = if self.named.is_empty() { Version::of(&file).ok() } else { None };
        if let Some(found) = version.and_then(|version| self.files.get(version, path)) {
            return found;
        }
        let (root, own) = (self.roots.of(self.through), symbols::Root::own().ok());
        let roots: Vec<&symbols::Root> = root.iter().map(|root| &**root).chain(&own).collect();
        let apart = symbols::symbols_apart(&file, path, &roots);
        let mut asked = Asked::default();
        let mut meant = Vec::new();
        for (index, (named, _)) in self.named.iter().enumerate() {
            if self.is_named(named, &file, path) {
                meant.push(index);
                match &named.prefix {
                    Some(prefix) => asked.prefixes.push(prefix.clone()),
                    None => asked.anything = true,
                }
            }
        }
        let (outcome, allocator) = look_into(file, path, apart.as_ref(), &asked, self.kernel);
        for index in meant {
            let (named, noted) = &mut self.named[index];
            let prefix = named.prefix.as_deref().unwrap_or_default();
            let there = allocator.as_ref().is_some_and(|allocator| {
                let names =
                    || allocator.points.iter().flat_map(|point| std::iter::once(&point.name).chain(&point.aliases));
                prefix.is_empty() || names().any(|name| name.strip_prefix(prefix).is_some_and(names::is_c))
            });
            *noted = Some(match &outcome {
                Outcome::Allocator if !there => Outcome::NoAllocator,
                outcome => outcome.clone(),
            });
        }
        let found = (outcome, allocator);
        if let Some(version) = version {
            self.files.put(version, &found);
        }
        found
    }

    /// Whether the user meant this file: by its path, or by whatever path leads to it in the process's root.
    fn is_named(&self, named: &Named, file: &File, path: &Path) -> bool {
        let Ok(absolute) = std::path::absolute(&named.path) else { return false };
        if absolute == path {
            return true;
        }
        let mut in_root = PathBuf::from(format!("/proc/{}/root", self.through));
        in_root.extend(absolute.components().skip(1));
        let (Ok(there), Ok(here)) = (in_root.metadata(), FileId::of(file)) else { return false };
        FileId { dev: there.dev(), inode: there.ino() } == here
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
        let names = names::C.map(|(name, _)| name).join(", ");
        let pid = self.pid;
        write!(
            f,
            "no allocator found in pid {pid}: looked for {names}, with the prefixes of known allocators too, in "
        )?;
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

/// Looks into one file by its path, whoever has it mapped, for what is found by itself.
pub fn allocator_at(path: &Path) -> io::Result<Result<AllocatorFile, Outcome>> {
    let file = File::open(fs::canonicalize(path)?)?;
    let own = symbols::Root::own()?;
    let apart = symbols::symbols_apart(&file, path, &[&own]);
    let (outcome, allocator) = look_into(file, path, apart.as_ref(), &Asked::default(), Emulation::of_this_kernel());
    Ok(allocator.ok_or(outcome))
}

fn look_into(
    file: File,
    path: &Path,
    apart: Option<&File>,
    asked: &Asked,
    kernel: Emulation,
) -> (Outcome, Option<AllocatorFile>) {
    let id = match FileId::of(&file) {
        Ok(id) => id,
        Err(error) => return (Outcome::Unreadable(error.to_string()), None),
    };
    let contents = match choice::read(&file, apart, asked, kernel) {
        Ok(contents) => contents,
        Err(why) => return (Outcome::Unusable(why), None),
    };
    if !contents.is_allocator() {
        let unprobed = contents.unprobed.into_iter().next();
        return (unprobed.map_or(Outcome::NoAllocator, |(name, why)| Outcome::Unprobed(name, why)), None);
    }
    let file_name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let allocator = AllocatorFile {
        id,
        path: path.to_owned(),
        build_id: contents.build_id,
        families: contents.families.into_iter().map(|family| family.unwrap_or_else(|| file_name.clone())).collect(),
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

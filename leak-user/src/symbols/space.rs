//! Where in which file an address of a process is.

use crate::discover::{FileId, elf, maps};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// How many places a process's space remembers. Further ones are looked up in the latest mappings.
const MAX_PLACES: usize = 1 << 20;

/// How many files are opened as soon as they are seen to be mapped. Later ones are opened when an address in them is seen:
/// descriptors are not without limit.
const MAX_OPENED_EARLY: usize = 256;

/// An address in no known mapping makes the mappings be read again, but not more often than this.
const RELOAD_INTERVAL: Duration = Duration::from_millis(100);

/// A file that holds code.
#[derive(Debug)]
pub struct Module {
    /// Unlike an address or an inode never given to another.
    pub serial: u64,
    /// As the process sees it; untrusted.
    pub path: PathBuf,
    file: OnceLock<File>,
    build_id: OnceLock<Option<String>>,
}

impl Module {
    /// In hexadecimal digits.
    pub fn build_id(&self) -> Option<&str> {
        let file = self.file.get()?;
        self.build_id.get_or_init(|| elf::build_id(file)).as_deref()
    }

    /// A path by which this program can open the file as long as the module lives; none if the file could not be opened.
    pub fn path_to_open(&self) -> Option<PathBuf> {
        Some(PathBuf::from(format!("/proc/self/fd/{}", self.file.get()?.as_raw_fd())))
    }

    fn open(&self, mapping: &maps::Mapping, pid: u32) {
        if self.file.get().is_some() {
            return;
        }
        // A process that has just ended leaves its files: try its path in our own root, if it is the same file.
        let by_own_path = || {
            let file = maps::open_regular(&self.path).ok()?;
            (FileId::of(&file).ok() == mapping.file).then_some(file)
        };
        if let Some(file) = mapping.open(pid).ok().or_else(by_own_path) {
            let _ = self.file.set(file);
        }
    }
}

/// The files of all processes; each is one module while any process has it.
#[derive(Debug, Default)]
pub struct Modules {
    by_id: HashMap<FileId, Weak<Module>>,
    serial: u64,
}

impl Modules {
    fn of(&mut self, id: FileId, path: PathBuf) -> Arc<Module> {
        if let Some(module) = self.by_id.get(&id).and_then(Weak::upgrade) {
            return module;
        }
        self.by_id.retain(|_, module| module.strong_count() > 0);
        self.serial += 1;
        let module = Module { serial: self.serial, path, file: OnceLock::new(), build_id: OnceLock::new() };
        let module = Arc::new(module);
        self.by_id.insert(id, Arc::downgrade(&module));
        module
    }
}

/// Where an address is.
#[derive(Clone, Debug)]
pub enum Place {
    /// At an offset of a file. For a return address that of the byte before it.
    File { module: Arc<Module>, offset: u64 },
    /// Not in a file.
    Other { name: Option<&'static str>, reason: &'static str },
}

const NOT_MAPPED: Place = Place::Other { name: None, reason: "no code is mapped at this address" };
const ENDED: Place = Place::Other { name: None, reason: "the process ended before its memory mappings could be read" };

/// A range of executable memory. The mapping's text is kept for opening its file later.
#[derive(Clone, Debug)]
struct Range {
    start: u64,
    end: u64,
    offset: u64,
    /// None for code that is in no file.
    file: Option<(FileId, Arc<Module>)>,
    path: Box<[u8]>,
}

impl Range {
    fn mapping(&self) -> maps::Mapping<'_> {
        maps::Mapping {
            start: self.start,
            end: self.end,
            offset: self.offset,
            executable: true,
            file: self.file.as_ref().map(|(id, _)| *id),
            path: &self.path,
        }
    }
}

/// One process's address space.
#[derive(Clone, Debug)]
pub struct Space {
    pid: u32,
    /// By address, as of the last time that the mappings were read.
    ranges: Arc<[Range]>,
    /// Where addresses were when they were first seen; libraries come and go.
    places: HashMap<u64, Place>,
    expired: bool,
    /// When mappings were last read, or that was tried.
    loaded: Option<Instant>,
}

impl Space {
    /// Nothing is read yet.
    pub fn new(pid: u32) -> Self {
        Self { pid, ranges: Arc::from([]), places: HashMap::new(), expired: true, loaded: None }
    }

    /// The space of a child that has just been forked.
    pub fn copy_for(&self, pid: u32) -> Self {
        Self { pid, ..self.clone() }
    }

    /// The process's memory is seen through this thread of it from now on.
    pub fn look_through(&mut self, tid: u32) {
        self.pid = tid;
        self.expired = true;
    }

    /// The mappings may have changed.
    pub fn expire(&mut self) {
        self.expired = true;
    }

    /// Reads the mappings again. If that is no longer possible, what was read before stays.
    pub fn reload(&mut self, modules: &mut Modules) {
        self.loaded = Some(Instant::now());
        self.expired = false;
        let Ok(text) = fs::read(format!("/proc/{}/maps", self.pid)) else { return };
        let range = |mapping: maps::Mapping| {
            let file = mapping.file.map(|id| (id, modules.of(id, mapping.display_path())));
            if let Some((_, module)) = &file
                && modules.by_id.len() <= MAX_OPENED_EARLY
            {
                module.open(&mapping, self.pid);
            }
            Range { start: mapping.start, end: mapping.end, offset: mapping.offset, file, path: mapping.path.into() }
        };
        let ranges: Arc<[Range]> = maps::parse(&text).filter(|m| m.executable).map(range).collect();
        // A process that is about to end has no mappings left.
        if !ranges.is_empty() {
            self.ranges = ranges;
        }
    }

    /// Remembers where a return address is.
    pub fn note(&mut self, address: u64, modules: &mut Modules) {
        if self.places.contains_key(&address) {
            return;
        }
        let place = self.find(address, modules);
        if matches!(place, Place::File { .. }) && self.places.len() < MAX_PLACES {
            self.places.insert(address, place);
        }
    }

    /// Where a return address is, or was when it was noted.
    pub fn place(&mut self, address: u64, modules: &mut Modules) -> Place {
        match self.places.get(&address) {
            Some(place) => place.clone(),
            None => self.find(address, modules),
        }
    }

    fn find(&mut self, address: u64, modules: &mut Modules) -> Place {
        // The call is before the address that it returns to.
        let inside_call = address.saturating_sub(1);
        if self.expired {
            self.reload(modules);
        }
        let mut found = self.range(inside_call);
        if found.is_none() && self.loaded.is_none_or(|at| at.elapsed() >= RELOAD_INTERVAL) {
            self.reload(modules);
            found = self.range(inside_call);
        }
        let Some(range) = found else {
            return if self.ranges.is_empty() { ENDED } else { NOT_MAPPED };
        };
        if let Some((_, module)) = &range.file {
            module.open(&range.mapping(), self.pid);
            return Place::File { module: Arc::clone(module), offset: inside_call - range.start + range.offset };
        }
        let (name, reason) = match &*range.path {
            b"[vdso]" => ("[vdso]", "in the kernel's vDSO"),
            b"[vsyscall]" => ("[vsyscall]", "in the kernel's vsyscall page"),
            b"[uprobes]" => ("[uprobes]", "in the kernel's trampoline for probes"),
            _ => ("[anonymous]", "code that was generated at run time"),
        };
        Place::Other { name: Some(name), reason }
    }

    fn range(&self, address: u64) -> Option<&Range> {
        let behind = self.ranges.partition_point(|r| r.start <= address);
        self.ranges.get(behind.checked_sub(1)?).filter(|r| address < r.end)
    }
}

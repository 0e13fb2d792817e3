//! Where in which file an address of a process is.

use super::debug_files::Sources;
use super::perf_map::PerfMap;
use super::root::{Root, Roots};
use crate::discover::{FileId, elf, maps};
use crate::process::ProcessId;
use std::collections::HashMap;
use std::fs::{self, File};
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

/// How often the perf map of a process is looked at while its code is being noted.
const PERF_MAP_INTERVAL: Duration = Duration::from_secs(1);

/// A file that holds code.
#[derive(Debug)]
pub struct Module {
    /// Unlike an address or an inode never given to another.
    pub serial: u64,
    /// As the process sees it; untrusted.
    pub path: PathBuf,
    file: OnceLock<File>,
    build_id: OnceLock<Option<String>>,
    /// Of a process that maps it: its debug file may be there.
    root: Option<Arc<Root>>,
    sources: OnceLock<Sources>,
}

impl Module {
    fn new(serial: u64, path: PathBuf, root: Option<Arc<Root>>) -> Self {
        let (file, build_id, sources) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self { serial, path, file, build_id, root, sources }
    }

    /// A file that no process has.
    #[cfg(test)]
    pub fn of_file(path: PathBuf, file: File) -> Arc<Self> {
        let module = Self::new(0, path, None);
        let _ = module.file.set(file);
        Arc::new(module)
    }

    /// In hexadecimal digits.
    pub fn build_id(&self) -> Option<&str> {
        let file = self.file.get()?;
        self.build_id.get_or_init(|| elf::build_id(file)).as_deref()
    }

    /// The files to look names up in; none if the file could not be opened. They are searched for at the first call, which
    /// can take seconds.
    pub fn sources(&self) -> Option<&Sources> {
        let file = self.file.get()?;
        let find = || {
            let own = Root::own().ok().filter(|own| self.root.as_ref().is_none_or(|root| !root.is_same(own)));
            let roots: Vec<&Root> = self.root.as_deref().into_iter().chain(&own).collect();
            Sources::find(file, &self.path, &roots)
        };
        Some(self.sources.get_or_init(find))
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
    roots: Roots,
}

impl Modules {
    fn of(&mut self, id: FileId, path: PathBuf, root: Option<&Arc<Root>>) -> Arc<Module> {
        if let Some(module) = self.by_id.get(&id).and_then(Weak::upgrade) {
            return module;
        }
        self.by_id.retain(|_, module| module.strong_count() > 0);
        self.serial += 1;
        let module = Arc::new(Module::new(self.serial, path, root.cloned()));
        self.by_id.insert(id, Arc::downgrade(&module));
        module
    }
}

/// Where an address is.
#[derive(Clone, Debug)]
pub enum Place {
    /// At an offset of a file. For a return address that of the byte before it.
    File { module: Arc<Module>, offset: u64 },
    /// In code that a process generated, and what its compiler calls it, or why that is not known.
    Generated { name: Result<Arc<str>, &'static str> },
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

    /// Whether it is memory that only looks like a file: of `memfd_create`, or of System V.
    fn is_shared_memory(&self) -> bool {
        self.path.starts_with(b"/memfd:") || self.path.starts_with(b"/SYSV")
    }
}

/// One process's address space.
#[derive(Debug)]
pub struct Space {
    id: ProcessId,
    /// A thread of it that lives.
    through: u32,
    /// By address, as of the last time that the mappings were read.
    ranges: Arc<[Range]>,
    /// Where addresses were when they were first seen; libraries come and go.
    places: HashMap<u64, Place>,
    expired: bool,
    /// When mappings were last read, or that was tried.
    loaded: Option<Instant>,
    root: Option<Arc<Root>>,
    perf_map: PerfMap,
    /// When the perf map was last read, or that was tried.
    perf_map_read: Option<Instant>,
    /// Addresses among [`Self::places`] in generated code that has no name yet: compilers write late.
    unnamed: Vec<u64>,
}

impl Space {
    /// Nothing is read yet.
    pub fn new(id: ProcessId) -> Self {
        Self {
            id,
            through: id.tgid,
            ranges: Arc::from([]),
            places: HashMap::new(),
            expired: true,
            loaded: None,
            root: None,
            perf_map: PerfMap::default(),
            perf_map_read: None,
            unnamed: Vec::new(),
        }
    }

    /// The space of a child that has just been forked.
    pub fn copy_for(&self, child: ProcessId) -> Self {
        Self {
            ranges: Arc::clone(&self.ranges),
            places: self.places.clone(),
            expired: self.expired,
            loaded: self.loaded,
            root: self.root.clone(),
            perf_map: self.perf_map.copy_for_child(),
            unnamed: self.unnamed.clone(),
            ..Self::new(child)
        }
    }

    /// The process's memory is seen through this thread of it from now on.
    pub fn look_through(&mut self, tid: u32) {
        self.through = tid;
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
        let Ok(text) = fs::read(format!("/proc/{}/maps", self.through)) else { return };
        let root = modules.roots.of(self.through);
        // The pid may be another's by now.
        if ProcessId::current(self.id.tgid).map_or(true, |now| now != self.id) {
            return;
        }
        // What was opened while the process had its files stays better than nothing.
        self.root = root.or_else(|| self.root.take());
        let range = |mapping: maps::Mapping| {
            let file = mapping.file.map(|id| (id, modules.of(id, mapping.display_path(), self.root.as_ref())));
            if let Some((_, module)) = &file
                && modules.by_id.len() <= MAX_OPENED_EARLY
            {
                module.open(&mapping, self.through);
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
        if self.places.len() < MAX_PLACES {
            match &place {
                Place::Other { .. } => return,
                Place::Generated { name: Err(_) } => self.unnamed.push(address),
                _ => {}
            }
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

    /// Names generated code that has none yet, from what the process has written since.
    pub fn refresh(&mut self) {
        if self.unnamed.is_empty() {
            return;
        }
        self.read_perf_map();
        let Self { perf_map, places, .. } = self;
        self.unnamed.retain(|address| {
            let name = perf_map.find(address.saturating_sub(1));
            let found = name.is_ok();
            places.insert(*address, Place::Generated { name });
            !found
        });
    }

    fn read_perf_map(&mut self) {
        self.perf_map_read = Some(Instant::now());
        self.perf_map.refresh(self.id, self.through, self.root.as_deref());
    }

    /// The name of generated code at an address.
    fn generated(&mut self, address: u64) -> Result<Arc<str>, &'static str> {
        let found = self.perf_map.find(address);
        if found.is_ok() || self.perf_map_read.is_some_and(|at| at.elapsed() < PERF_MAP_INTERVAL) {
            return found;
        }
        self.read_perf_map();
        self.perf_map.find(address)
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
            module.open(&range.mapping(), self.through);
            let place = Place::File { module: Arc::clone(module), offset: inside_call - range.start + range.offset };
            // Some compilers map the memory for their code twice, by a file that has no name.
            if !range.is_shared_memory() {
                return place;
            }
            return self.generated(inside_call).map_or(place, |name| Place::Generated { name: Ok(name) });
        }
        let (name, reason) = match &*range.path {
            b"[vdso]" => ("[vdso]", "in the kernel's vDSO"),
            b"[vsyscall]" => ("[vsyscall]", "in the kernel's vsyscall page"),
            b"[uprobes]" => ("[uprobes]", "in the kernel's trampoline for probes"),
            _ => return Place::Generated { name: self.generated(inside_call) },
        };
        Place::Other { name: Some(name), reason }
    }

    /// As if there were code at these addresses that is in no file.
    #[cfg(test)]
    pub fn pretend_generated(&mut self, addresses: std::ops::Range<u64>, modules: &mut Modules) {
        self.reload(modules);
        let std::ops::Range { start, end } = addresses;
        let path = Box::from(&b""[..]);
        self.ranges = Arc::from([Range { start, end, offset: 0, file: None, path }]);
    }

    fn range(&self, address: u64) -> Option<&Range> {
        let behind = self.ranges.partition_point(|r| r.start <= address);
        self.ranges.get(behind.checked_sub(1)?).filter(|r| address < r.end)
    }
}

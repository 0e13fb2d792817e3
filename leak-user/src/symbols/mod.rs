//! Names for addresses, asked for only what is reported.
//!
//! In two steps, because a process may be gone by the time a report is made. When a stack is first seen, [`Symbols::note`]
//! finds in which file and where in it each address is, and keeps that file open ([`space`]). [`Symbols::resolve`] then
//! looks up names by file and offset, whether or not the process or the file's name still exist ([`names`]), in the file
//! itself and in what distributions keep apart from it ([`debug_files`]). Code that a process generates is named when it is
//! noted, by what its compiler writes down ([`perf_map`]).
//!
//! Nothing here makes names fit to print: they are the traced process's, and views have to escape them.

mod debug_files;
mod image;
mod names;
pub mod perf_map;
mod root;
mod space;

#[cfg(test)]
mod tests;

use crate::process::ProcessId;
use crate::report::Frame;
pub(crate) use debug_files::symbols_apart;
use names::{Name, Names};
pub(crate) use root::{Root, Roots};
use space::{Modules, Place, Space};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// How many named places are kept before all are forgotten and looked up anew.
const MAX_CACHED: usize = 1 << 16;

/// The address spaces of the traced processes, and the names of the code in them.
///
/// It can be sent between threads. [`Self::resolve`] blocks while debug information is read, for a large program seconds.
#[derive(Debug)]
pub struct Symbols {
    spaces: HashMap<ProcessId, Space>,
    modules: Modules,
    names: Names,
    cache: HashMap<(u64, u64), Arc<[Name]>>,
}

impl Symbols {
    /// # Errors
    /// If no thread can be started.
    pub fn new() -> io::Result<Self> {
        Ok(Self { spaces: HashMap::new(), modules: Modules::default(), names: Names::start()?, cache: HashMap::new() })
    }

    /// Takes down the mappings of a process while it lives. To be called when tracing begins; [`Self::note`] does it for a
    /// process that it does not know yet, but that can be too late for one that ends soon.
    pub fn add(&mut self, id: ProcessId) {
        let space = self.spaces.entry(id).or_insert_with(|| Space::new(id));
        space.reload(&mut self.modules);
    }

    /// From now on looks at a process's memory through this thread of it: the first one, by whose id the process is known,
    /// may have ended. To be called before [`Self::add`].
    pub fn look_through(&mut self, id: ProcessId, tid: u32) {
        self.spaces.entry(id).or_insert_with(|| Space::new(id)).look_through(tid);
    }

    /// Takes down where the return addresses of a stack are. To be called when the stack is first seen, in the order of
    /// events. Cheap for addresses that were seen before.
    pub fn note(&mut self, id: ProcessId, addresses: impl IntoIterator<Item = u64>) {
        let space = self.spaces.entry(id).or_insert_with(|| Space::new(id));
        for address in addresses {
            space.note(address, &mut self.modules);
        }
    }

    /// The process mapped code (`MAP_EXEC`): its mappings are read again at the next new address.
    pub fn mappings_changed(&mut self, id: ProcessId) {
        if let Some(space) = self.spaces.get_mut(&id) {
            space.expire();
        }
    }

    /// Names generated code whose compiler has written down its names only after it was noted. To be called now and then while
    /// the process lives: once it has ended, a map that was never seen is gone.
    pub fn refresh(&mut self, id: ProcessId) {
        if let Some(space) = self.spaces.get_mut(&id) {
            space.refresh();
        }
    }

    /// The process executed a new program: no earlier address means anything any more.
    pub fn exec(&mut self, id: ProcessId) {
        self.spaces.remove(&id);
        self.add(id);
    }

    /// A child came into being with a copy of the parent's mappings.
    pub fn fork(&mut self, parent: ProcessId, child: ProcessId) {
        if let Some(space) = self.spaces.get(&parent) {
            let copy = space.copy_for(child);
            self.spaces.insert(child, copy);
        }
    }

    /// How many places are kept with their names.
    pub fn names_kept(&self) -> usize {
        self.cache.len()
    }

    /// Forgets all names, and what was read from files to find them; they are read again when they are needed.
    pub fn forget_names(&mut self) {
        self.cache = HashMap::new();
        self.names.forget();
    }

    /// Forgets a process; files that no other process has are closed.
    pub fn forget(&mut self, id: ProcessId) {
        self.spaces.remove(&id);
    }

    /// The frames at each of the return addresses of a stack: usually one, more where functions were inlined, innermost first.
    ///
    /// Never empty: where there is no name, one frame says why. [`Frame::offset`] is the file offset of the last byte of the
    /// call instruction (the address looked up is the return address less one, since that may already be on the next line, or
    /// in the next function).
    pub fn resolve(&mut self, id: ProcessId, addresses: &[u64]) -> Vec<Vec<Frame>> {
        let space = self.spaces.entry(id).or_insert_with(|| Space::new(id));
        space.refresh();
        let places: Vec<Place> = addresses.iter().map(|&a| space.place(a, &mut self.modules)).collect();
        self.look_up(&places);
        places.iter().map(|place| self.frames_at(place)).collect()
    }

    /// The same in one list, innermost first.
    pub fn frames(&mut self, id: ProcessId, addresses: &[u64]) -> Vec<Frame> {
        self.resolve(id, addresses).into_iter().flatten().collect()
    }

    /// Brings the names of all places into the cache, asking once per file.
    fn look_up(&mut self, places: &[Place]) {
        if self.cache.len() > MAX_CACHED {
            self.cache.clear();
        }
        let mut wanted: HashMap<u64, (&Arc<space::Module>, Vec<u64>)> = HashMap::new();
        for place in places {
            if let Place::File { module, offset } = place
                && !self.cache.contains_key(&(module.serial, *offset))
            {
                wanted.entry(module.serial).or_insert_with(|| (module, Vec::new())).1.push(*offset);
            }
        }
        for (module, mut offsets) in wanted.into_values() {
            offsets.sort_unstable();
            offsets.dedup();
            let found = self.names.look_up(module, &offsets);
            self.cache.extend(offsets.iter().map(|o| (module.serial, *o)).zip(found));
        }
    }

    fn frames_at(&self, place: &Place) -> Vec<Frame> {
        let (module, offset) = match place {
            Place::File { module, offset } => (module, *offset),
            Place::Generated { name } => return vec![generated(name)],
            Place::Other { name, reason } => {
                let module = name.map(str::to_owned);
                return vec![Frame { module, reason: Some((*reason).to_owned()), ..Frame::default() }];
            }
        };
        let in_module = Frame {
            module: Some(module.path.to_string_lossy().into_owned()),
            build_id: module.build_id().map(str::to_owned),
            offset: Some(offset),
            ..Frame::default()
        };
        let names = self.cache.get(&(module.serial, offset));
        let frames = names.into_iter().flat_map(|names| names.iter()).map(|name| Frame {
            function: name.function.clone(),
            file: name.file.clone(),
            line: name.line,
            inlined: name.inlined,
            language: name.language.map(str::to_owned),
            reason: name.reason.clone(),
            ..in_module.clone()
        });
        frames.collect()
    }
}

/// A frame in code that is in no file.
fn generated(name: &Result<Arc<str>, &'static str>) -> Frame {
    let frame = Frame { module: Some("[anonymous]".to_owned()), ..Frame::default() };
    match name {
        Ok(name) => {
            let (function, by_name) = names::demangle(name);
            let language = perf_map::language_of(name).or(by_name).map(str::to_owned);
            Frame { function: Some(function), language, ..frame }
        }
        Err(reason) => Frame { reason: Some((*reason).to_owned()), ..frame },
    }
}

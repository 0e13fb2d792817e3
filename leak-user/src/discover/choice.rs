//! Which of a file's functions are an allocator, and at which of them probes go.
//!
//! Symbols come from the table of what other files can bind to, from the full one, and, where the file was stripped of that,
//! from its debug file or from those packed into it. Functions are taken together by the prefix of their names. Those without a
//! prefix are an allocator where malloc and free are there for everybody, which is what the dynamic linker goes by, or all of a
//! program that is linked statically; those with one wherever they are, because a library may keep its allocator to itself.
//!
//! Functions at one address get one probe, and so do those that only jump to another with the arguments that they were called
//! with. operator new and delete, and what Rust calls, are left out as a whole where all that they hand out provably comes from
//! functions that are probed ([`super::forward`]); otherwise they are probed, and what they call inside is not counted again: the
//! programs in the kernel see that it is nested.

use super::breakpoint::{Emulation, Placement};
use super::elf::{Bounded, Elf, Slot, Symbol, SymbolTable, Unusable};
use super::forward::{self, Target};
use super::names::{self, Api, MIMALLOC, TCMALLOC};
use leak_common::op;
use object::ReadCache;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;

/// At most so many prefixes are looked for in one file.
const MAX_PREFIXES: usize = 8;

/// At most so many functions of one file are probed: a thousand points attach and detach in a second.
const MAX_POINTS: usize = 1000;

/// A place for a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbePoint {
    /// The function's symbol.
    pub name: String,
    /// What its arguments mean, one of [`leak_common::op`], with `SHIFTED` where that applies.
    pub shape: u8,
    /// Other names of the same code.
    pub aliases: Vec<String>,
    /// Which allocator it belongs to: the index in [`Contents::families`].
    pub family: usize,
    /// File offset of the function's first instruction.
    pub entry: u64,
    /// File offset of the breakpoint.
    pub offset: u64,
    /// How the breakpoint got there.
    pub placement: Placement,
}

impl ProbePoint {
    /// See [`Self::shape`].
    pub fn op(&self) -> u8 {
        self.shape
    }

    /// The function's name as people write it.
    pub fn display_name(&self) -> String {
        names::display(&self.name)
    }

    /// Whether the breakpoint stands on the function's first instruction.
    pub fn at_entry(&self) -> bool {
        self.offset == self.entry
    }

    /// Whether this is the function of that name.
    pub fn is(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|alias| alias == name)
    }
}

/// What a file has of allocators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// By file offset; empty where it has no allocator.
    pub points: Vec<ProbePoint>,
    /// The allocators' names: `glibc 2.36`, `jemalloc`, or none where it is only known by its file.
    pub families: Vec<Option<String>>,
    /// Functions that are there but cannot be probed, and why.
    pub unprobed: Vec<(String, &'static str)>,
    /// Lower-case hexadecimal digits.
    pub build_id: Option<String>,
}

impl Contents {
    /// Whether a program can get memory here and give it back.
    pub fn is_allocator(&self) -> bool {
        !self.points.is_empty()
    }
}

/// What the user says of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The functions with these prefixes are an allocator.
    pub prefixes: Vec<String>,
    /// Whatever looks like one is.
    pub anything: bool,
}

/// A function that may belong to an allocator.
#[derive(Clone, Debug)]
struct Definition {
    name: String,
    api: Api,
    shape: u8,
    /// Everybody can bind to it.
    exported: bool,
    local: bool,
    address: u64,
    /// In the file.
    offset: u64,
    size: u64,
}

/// The functions with one prefix.
#[derive(Debug, Default)]
struct Group {
    prefix: String,
    definitions: Vec<Definition>,
    asked: bool,
}

impl Group {
    fn has(&self, rest: &str) -> bool {
        let name = format!("{}{rest}", self.prefix);
        self.definitions.iter().any(|d| d.name == name)
    }

    fn exports(&self, name: &str) -> bool {
        self.definitions.iter().any(|d| d.exported && d.name == name)
    }

    fn is_jemalloc(&self) -> bool {
        self.has(names::OF_JEMALLOC) && (self.has("dallocx") || self.has("sdallocx"))
    }

    fn is_allocator(&self) -> bool {
        if self.asked {
            let of = |frees: bool| self.definitions.iter().any(|d| (d.shape == op::FREE) == frees);
            return of(true) && of(false);
        }
        if self.prefix.is_empty() {
            (self.exports("malloc") && self.exports("free"))
                || (self.is_jemalloc() && self.has("malloc") && self.has("free"))
        } else {
            (self.has("malloc") && self.has("free")) || self.is_jemalloc()
        }
    }

    /// Leaves out what is no part of the allocator although it has the name: functions that only this file's own code can mean,
    /// where it is malloc and free for everybody that make it one.
    fn keep_own(&mut self) {
        if self.prefix.is_empty() && !self.asked && !self.is_jemalloc() {
            self.definitions.retain(|d| d.exported || !d.local);
        }
    }
}

/// Reads which allocators the file holds. `apart` is a file with the symbols that it was stripped of.
pub fn read(file: &File, apart: Option<&File>, asked: &Asked, kernel: Emulation) -> Result<Contents, Unusable> {
    let cache = ReadCache::new(file);
    let elf = Elf::open(file, Bounded(&cache))?;
    let mut contents = Contents { build_id: elf.build_id(), ..Contents::default() };
    let apart_cache = apart.map(ReadCache::new);
    // What is wrong with the debug file is no fault of the file.
    let apart = apart.zip(apart_cache.as_ref()).and_then(|(file, cache)| Elf::open(file, Bounded(cache)).ok());
    let all = match elf.all_symbols()? {
        Some(all) => Some(all),
        None => apart.as_ref().and_then(|apart| apart.all_symbols().ok().flatten()),
    };
    let tables = Tables { dynamic: elf.dynamic_symbols()?, all, is_static: elf.is_static() };
    let mut found = Found::default();
    let mut groups = tables.groups(&elf, asked, &mut found);
    contents.unprobed = std::mem::take(&mut found.unprobed);
    // Operators and Rust's functions are no allocator by themselves, unless the user says so.
    let wrappers: Vec<Definition> = groups
        .first_mut()
        .map(|plain| plain.definitions.extract_if(.., |d| d.api.wraps() && !asked.anything).collect())
        .unwrap_or_default();
    groups.retain(Group::is_allocator);
    groups.iter_mut().for_each(Group::keep_own);
    // Rust's are probed where nothing else is there. Elsewhere it takes their code to tell whether they are an allocator.
    let with_rust = cfg!(target_arch = "x86_64") || (groups.is_empty() && tables.is_static);
    if groups.is_empty() && wrappers.is_empty() {
        return Ok(contents);
    }
    let program = Code { elf: &elf, slots: slots(&elf), never_return: found.never_return };
    let probed: HashSet<u64> = groups.iter().flat_map(|g| &g.definitions).map(|d| d.address).collect();
    let mut kept_wrappers = Vec::new();
    for api in [Api::Cxx, Api::Rust] {
        let of_api: Vec<Definition> = wrappers.iter().filter(|d| d.api == api).cloned().collect();
        let wanted = match api {
            Api::Cxx => !groups.is_empty(),
            _ => with_rust && !found.rust_calls_malloc,
        };
        if wanted && of_api.iter().any(|d| d.shape == op::FREE) && !program.only_wraps(&of_api, &probed) {
            kept_wrappers.extend(of_api);
        }
    }
    if groups.is_empty() && kept_wrappers.is_empty() {
        return Ok(contents);
    }
    let mut all = Families::default();
    for group in &groups {
        let family = all.of(group, &groups, found.release.as_ref(), found.is_musl);
        all.add(family, &group.definitions);
    }
    for definition in kept_wrappers {
        // operator new is that of the allocator beside it.
        let name = if definition.api == Api::Rust {
            Some("Rust's own".to_owned())
        } else {
            all.names.first().cloned().flatten()
        };
        let family = all.index(name);
        all.add(family, std::slice::from_ref(&definition));
    }
    contents.families = all.names;
    contents.points = points(&elf, &program, all.definitions, kernel);
    Ok(contents)
}

/// Names of allocators, and the functions of each.
#[derive(Default)]
struct Families {
    names: Vec<Option<String>>,
    definitions: Vec<(usize, Definition)>,
}

impl Families {
    fn of(&mut self, group: &Group, groups: &[Group], release: Option<&String>, is_musl: bool) -> usize {
        let beside = |prefix: &str| {
            // malloc is the other's function of that name.
            let malloc = |g: &Group, name: &str| g.definitions.iter().find(|d| d.name == name).map(|d| d.address);
            let other = groups.iter().find(|g| g.prefix == prefix);
            let theirs = other.and_then(|g| malloc(g, &format!("{prefix}malloc")));
            group.prefix == prefix || (group.prefix.is_empty() && theirs.is_some() && theirs == malloc(group, "malloc"))
        };
        let name = if beside(TCMALLOC) {
            Some("tcmalloc".to_owned())
        } else if beside(MIMALLOC) {
            Some("mimalloc".to_owned())
        } else if group.is_jemalloc() {
            Some("jemalloc".to_owned())
        } else if group.prefix.is_empty() {
            release.cloned().or_else(|| is_musl.then(|| "musl".to_owned()))
        } else {
            None
        };
        self.index(name)
    }

    fn index(&mut self, name: Option<String>) -> usize {
        let known = self.names.iter().position(|known| *known == name);
        known.unwrap_or_else(|| {
            self.names.push(name);
            self.names.len() - 1
        })
    }

    fn add(&mut self, family: usize, definitions: &[Definition]) {
        self.definitions.extend(definitions.iter().map(|d| (family, d.clone())));
    }
}

/// A file's symbols.
struct Tables<'a> {
    dynamic: Option<SymbolTable<'a>>,
    all: Option<SymbolTable<'a>>,
    is_static: bool,
}

/// What else the symbols tell.
#[derive(Default)]
struct Found {
    unprobed: Vec<(String, &'static str)>,
    /// Addresses of functions that do not return.
    never_return: HashSet<u64>,
    /// `glibc` and its release.
    release: Option<String>,
    is_musl: bool,
    /// Rust's standard library is what its functions call: that calls those of C.
    rust_calls_malloc: bool,
}

impl Tables<'_> {
    /// The functions that may belong to an allocator, by their prefixes. Those without come first.
    fn groups(&self, elf: &Elf<'_>, asked: &Asked, found: &mut Found) -> Vec<Group> {
        let mut prefixes: BTreeSet<String> = [TCMALLOC, MIMALLOC].map(str::to_owned).into();
        for symbol in self.iter().map(|(symbol, _)| symbol).filter(|s| s.defined) {
            if let Some(prefix) = names::jemalloc_prefix(symbol.name)
                && prefixes.len() < MAX_PREFIXES
                && !prefixes.contains(prefix)
            {
                prefixes.insert(prefix.to_owned());
            }
        }
        let prefixes =
            asked.prefixes.iter().cloned().chain(prefixes.into_iter().filter(|p| !asked.prefixes.contains(p)));
        let mut groups: Vec<Group> = std::iter::once(String::new())
            .chain(prefixes.filter(|prefix| !prefix.is_empty()))
            .map(|prefix| {
                let named = asked.prefixes.contains(&prefix);
                Group { asked: named || asked.anything, prefix, definitions: Vec::new() }
            })
            .collect();
        for (symbol, exported) in self.iter().filter(|(symbol, _)| symbol.defined) {
            found.note(elf, &symbol);
            for group in &mut groups {
                let known = if group.prefix.is_empty() {
                    names::plain(symbol.name)
                } else {
                    let rest = symbol.name.strip_prefix(group.prefix.as_bytes());
                    rest.and_then(|rest| names::of_api(rest, &group.prefix))
                };
                let Some((api, shape)) = known else { continue };
                let name = String::from_utf8_lossy(symbol.name).into_owned();
                match elf.locate(&symbol) {
                    Err(why) => {
                        if exported || !group.prefix.is_empty() {
                            found.unprobed.push((name, why));
                        }
                    }
                    Ok(place) => group.definitions.push(Definition {
                        name,
                        api,
                        shape,
                        exported,
                        local: symbol.local,
                        address: symbol.address,
                        offset: place.offset,
                        size: symbol.size,
                    }),
                }
            }
        }
        groups.iter_mut().for_each(drop_ambiguous);
        if self.is_static {
            // Linking makes hidden functions such as glibc's malloc local.
            groups.iter_mut().flat_map(|g| &mut g.definitions).for_each(|d| d.exported = true);
        }
        groups
    }

    /// All symbols, and whether everybody can bind to them.
    fn iter(&self) -> impl Iterator<Item = (Symbol<'_>, bool)> {
        let exported = self.dynamic.iter().flat_map(SymbolTable::iter).map(|s| (s, true));
        exported.chain(self.all.iter().flat_map(SymbolTable::iter).map(|s| (s, false)))
    }
}

/// A local function is the one of its name only if no other has that name: anybody's `static void free(...)` is local.
fn drop_ambiguous(group: &mut Group) {
    let mut addresses: HashMap<String, BTreeSet<u64>> = HashMap::new();
    for definition in &group.definitions {
        addresses.entry(definition.name.clone()).or_default().insert(definition.address);
    }
    group.definitions.retain(|d| d.exported || !d.local || addresses[&d.name].len() == 1);
}

impl Found {
    fn note(&mut self, elf: &Elf<'_>, symbol: &Symbol<'_>) {
        match symbol.name {
            b"gnu_get_libc_version" => {
                let release = elf.glibc_release(symbol).map(|release| format!("glibc {release}"));
                self.release = release.or(self.release.take());
            }
            // In every program that has glibc's malloc linked in; of its release nothing need be there.
            b"_int_malloc" if self.release.is_none() => self.release = Some("glibc".to_owned()),
            // What its dynamic linker exports, and its allocator's own in static programs (both mallocs that it can have).
            b"__dls3" | b"__malloc_alloc_meta" | b"__malloc_donate" => self.is_musl = true,
            name if name.ends_with(b"___rdl_alloc") || name == b"__rdl_alloc" => self.rust_calls_malloc = true,
            name if names::never_returns(name) => drop(self.never_return.insert(symbol.address)),
            _ => {}
        }
    }
}

/// A file's code and slots.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "nobody asks there"))]
struct Code<'a> {
    elf: &'a Elf<'a>,
    slots: HashMap<u64, Target>,
    never_return: HashSet<u64>,
}

impl forward::Program for Code<'_> {
    fn code(&self, address: u64, len: usize) -> Vec<u8> {
        self.elf.place_of(address).map_or_else(|_| Vec::new(), |place| self.elf.code(place, len))
    }

    fn slot(&self, address: u64) -> Option<Target> {
        self.slots.get(&address).copied()
    }
}

impl Code<'_> {
    /// Whether all that these functions hand out comes from those that are probed here, or from another file's functions of
    /// the names that are always probed. Then what is given back goes there too.
    fn only_wraps(&self, definitions: &[Definition], probed: &HashSet<u64>) -> bool {
        let ends = |target| match target {
            Target::Inside(address) => self.never_return.contains(&address),
            Target::Outside(_) => false,
            Target::NoReturn => true,
        };
        let mut open: BTreeSet<u64> = definitions.iter().filter(|d| d.shape != op::FREE).map(|d| d.address).collect();
        let mut proven = probed.clone();
        // One may call the other, as operator new[] does operator new.
        loop {
            let wanted = |target| match target {
                Target::Inside(address) => proven.contains(&address),
                Target::Outside(_) => true,
                Target::NoReturn => false,
            };
            let shown: Vec<u64> =
                open.iter().copied().filter(|&at| forward::always_reaches(self, at, &wanted, &ends)).collect();
            if shown.is_empty() {
                return open.is_empty();
            }
            for address in shown {
                open.remove(&address);
                proven.insert(address);
            }
        }
    }
}

/// What the dynamic linker's slots lead to, of what matters.
fn slots(elf: &Elf<'_>) -> HashMap<u64, Target> {
    let target = |slot: Slot<'_>| {
        let symbol = match slot {
            Slot::Symbol(symbol) => symbol,
            Slot::Own(address) => return Some(Target::Inside(address)),
        };
        if symbol.defined {
            return Some(Target::Inside(symbol.address));
        }
        if names::never_returns(symbol.name) {
            return Some(Target::NoReturn);
        }
        // operator new of another file may itself only wrap; that is found there.
        names::plain(symbol.name).filter(|(api, _)| *api == Api::C).map(|(_, shape)| Target::Outside(shape))
    };
    elf.slots().into_iter().filter_map(|(at, slot)| Some((at, target(slot)?))).collect()
}

/// One probe for all functions at an address, and none for those that only lead there.
fn points(
    elf: &Elf<'_>,
    program: &Code<'_>,
    definitions: Vec<(usize, Definition)>,
    kernel: Emulation,
) -> Vec<ProbePoint> {
    let mut by_address: BTreeMap<u64, Vec<(usize, Definition)>> = BTreeMap::new();
    for (family, definition) in definitions {
        let here = by_address.entry(definition.address).or_default();
        if !here.iter().any(|(_, d)| d.name == definition.name) {
            here.push((family, definition));
        }
    }
    // The name that is known best stands for all: malloc before tc_malloc, operator new before operator new[].
    for known in by_address.values_mut() {
        known.sort_by_key(|(_, d)| (d.api, names::rank(&d.name), d.name.len(), Reverse(d.name.clone())));
    }
    let leads: HashMap<u64, u64> =
        by_address.keys().filter_map(|&at| Some((at, leads_to(program, &by_address, at)?))).collect();
    for &from in leads.keys() {
        // Round in a circle there is no end.
        let end = std::iter::successors(Some(from), |at| leads.get(at).copied()).take(leads.len() + 1).last();
        if let Some(end) = end.filter(|end| !leads.contains_key(end))
            && let Some(names) = by_address.remove(&from)
            && let Some(there) = by_address.get_mut(&end)
        {
            there.extend(names);
        }
    }
    let mut points: Vec<ProbePoint> = by_address
        .into_values()
        .filter_map(|names| {
            let mut names = names.into_iter();
            let (family, first) = names.next()?;
            let place = elf.place_of(first.address).ok()?;
            let placement = elf.place(place, first.size, kernel);
            Some(ProbePoint {
                name: first.name,
                shape: first.shape,
                aliases: names.map(|(_, d)| d.name).collect(),
                family,
                entry: first.offset,
                offset: first.offset + placement.skipped,
                placement,
            })
        })
        .collect();
    points.sort_by_key(|point| point.offset);
    // Several segments may show the same part of the file, and a name that is no longer here may have been a file's trick.
    points.dedup_by_key(|point| point.offset);
    points.truncate(MAX_POINTS);
    points
}

/// The address of the function that the one at `address` is another name of.
fn leads_to(program: &Code<'_>, known: &BTreeMap<u64, Vec<(usize, Definition)>>, address: u64) -> Option<u64> {
    let shape = |at: &u64| known.get(at)?.first().map(|(_, d)| d.shape);
    let wanted = shape(&address)?;
    match forward::same_call(program, address)? {
        Target::Inside(to) if shape(&to) == Some(wanted) => Some(to),
        _ => None,
    }
}

//! Loads the BPF programs and puts them where they belong. With `ring` and `losses` the only module that knows aya or
//! bpf(2). What is detached how: everything hangs on file descriptors, so that nothing stays behind when the tracer
//! dies, however it dies.

mod btf;
mod close;
mod elements;
mod floor;
mod hold;
mod oom;
mod pages;
mod ranges;
mod samplings;
mod sizes;
mod sys;
mod trap;

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{Array, HashMap as BpfHashMap, IterableMap, Map, MapData, MapType};
use aya::programs::RawTracePoint;
use aya::{Ebpf, EbpfLoader};
use aya_obj::Object;
use btf::Btf;
use close::close_all;
pub use floor::Floor;
use leak_common::ring::MARGIN;
use leak_common::sampling::{Address, Interval, Sampling};
use leak_common::unwind::Range;
use leak_common::{Hits, op};
use pages::Pages;
use ranges::{Ranges, Rows};
use samplings::Samplings;
pub use sizes::{Asked, LEAST as LEAST_KERNEL_MEMORY};
use sizes::{Definition, MAP_FLAGS, MAP_VALUE_SIZE, Wanted};
use sys::Hook;
pub use sys::{LinkSupport, RunTime, UprobeKind};
pub(crate) use sys::{lookup_and_delete, recursion_misses};
pub use trap::TrapCosts;

use crate::discover::ProbePoint;
use crate::ring::page_size;

/// The BPF object, built by this crate's build script.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/leaktrace.bpf.o"));

/// Programs at the kernel's functions for the mapping calls: entry, exit, name of the system call.
const MAPPING_FUNCTIONS: [(&str, &str, &str); 4] = [
    ("enter_mmap", "leave_mmap", "mmap"),
    ("enter_munmap", "leave_munmap", "munmap"),
    ("enter_mremap", "leave_mremap", "mremap"),
    ("enter_brk", "leave_brk", "brk"),
];

/// The prefix of the kernel's functions for system calls (`arch/*/include/asm/syscall_wrapper.h`).
#[cfg(target_arch = "x86_64")]
const SYSCALL_PREFIX: &str = "__x64_sys_";
#[cfg(target_arch = "aarch64")]
const SYSCALL_PREFIX: &str = "__arm64_sys_";

/// The same from the tracepoints of all system calls, where programs cannot be attached to functions: with typed arguments
/// (where the number of the system call can be read from them), and the last resort.
const TYPED_TRACEPOINTS: [(&str, &str); 2] = [("typed_sys_exit", "sys_exit"), ("typed_sys_enter", "sys_enter")];
const MAPPING_TRACEPOINTS: [(&str, &str); 2] = [("sys_enter", "sys_enter"), ("sys_exit", "sys_exit")];

/// What happens to processes.
const PROCESS_PROGRAMS: [(&str, &str); 2] =
    [("process_exec", "sched_process_exec"), ("process_exit", "sched_process_exit")];

/// The start of processes, which only matters where children are followed.
const FORK_PROGRAM: [(&str, &str); 1] = [("process_fork", "sched_process_fork")];

/// Processes that come, where all are traced from their start.
const BIRTH_PROGRAMS: [(&str, &str); 2] =
    [("born_by_exec", "sched_process_exec"), ("born_by_fork", "sched_process_fork")];

/// Whether tracing programs may use hash maps that allocate elements as they come. Before 6.1 the kernel holds that unsafe (a probe
/// inside its allocator would enter the allocator again) and says so by a `WARN_ONCE`, which takes down a host with
/// `panic_on_warn` (`check_map_prog_compatibility`,
/// <https://github.com/torvalds/linux/blob/v5.10/kernel/bpf/verifier.c>). Since then such maps have an allocator of their own. Trying
/// it would print the warning, so a type of map is asked for that came with the same release.
fn has_map_allocator() -> bool {
    aya::sys::is_map_supported(MapType::UserRingBuf).unwrap_or(false)
}

/// The object as it is loaded.
///
/// - Our own ring is made as large as it is to be. Without it, its map is made as small as can be, because kernels that lack what the ring rests on also refuse values of
///   more than 4 MiB (`KMALLOC_MAX_SIZE`, until 5.12).
/// - Without an allocator for maps the tables of threads and of addresses take their memory in advance.
fn object(maps: &BTreeMap<String, Definition>, own_ring: Option<u64>, map_allocator: bool) -> Result<Vec<u8>> {
    let ring = own_ring.unwrap_or(8);
    let mut changes: Vec<(&str, usize, u32)> = vec![("RING", MAP_VALUE_SIZE, u32::try_from(ring)?)];
    if !map_allocator {
        changes.push(("THREADS", MAP_FLAGS, 0));
        changes.push(("ADDRESSES", MAP_FLAGS, 0));
    }
    let mut bytes = OBJECT.to_vec();
    for (name, offset, value) in changes {
        let at = maps.get(name).with_context(|| format!("the BPF object lacks the map {name}"))?.at + offset;
        bytes.get_mut(at..at + 4).context("the BPF object is cut off")?.copy_from_slice(&value.to_ne_bytes());
    }
    Ok(bytes)
}

/// Bytes of the kernel's own ring buffer, where it is used: whole pages, a power of two.
fn kernel_ring(sizes: &sizes::Sizes) -> u32 {
    let usual = sizes.ring_limit == sizes.lane() - MARGIN;
    let asked = if usual { sizes.ring } else { sizes.ring_limit.next_power_of_two() };
    u32::try_from(asked.max(page_size() as u64)).unwrap_or(u32::MAX)
}

/// The entry program of a shape of function, where each has its own.
fn entry_program(shape: u8) -> &'static str {
    const HEAP_CALLOC: u8 = op::CALLOC | op::SHIFTED;
    const HEAP_REALLOC: u8 = op::REALLOC | op::SHIFTED;
    const HEAP_REALLOCARRAY: u8 = op::REALLOCARRAY | op::SHIFTED;
    const HEAP_REALLOCF: u8 = op::REALLOCF | op::SHIFTED;
    match shape {
        op::CALLOC => "enter_calloc",
        op::ALIGNED => "enter_aligned",
        op::REALLOC => "enter_realloc",
        op::REALLOCARRAY => "enter_reallocarray",
        op::POSIX_MEMALIGN => "enter_posix",
        op::FREE => "enter_free",
        op::FREE_UNNAMED => "enter_free_unnamed",
        op::CONTROL => "enter_control",
        op::CONTROL_BY_MIB => "enter_control_by_mib",
        op::XALLOCX => "enter_xallocx",
        op::REALLOCF => "enter_reallocf",
        op::RUST_REALLOC => "enter_rust_realloc",
        HEAP_CALLOC => "enter_heap_calloc",
        HEAP_REALLOC => "enter_heap_realloc",
        HEAP_REALLOCARRAY => "enter_heap_reallocarray",
        HEAP_REALLOCF => "enter_heap_reallocf",
        _ => "enter_malloc",
    }
}

/// What is fixed when the programs are loaded.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each switches one thing, and they go together in any way")]
pub struct Settings {
    /// Allocations below this many bytes are not followed.
    pub min_size: u64,
    /// Allocations above this many bytes are not followed.
    pub max_size: u64,
    /// Walks stacks like this instead of in the best way; but with [`StackWalk::Loop`] does without what else kernels lack that have
    /// to walk so: atomic operations with a result, and maps that grow.
    pub walk: Option<StackWalk>,
    /// Whether mapping system calls are followed.
    pub mappings: bool,
    /// Uses this kind of probe instead of the best one.
    pub kind: Option<UprobeKind>,
    /// Whether stacks are unwound with tables; otherwise by frame pointers alone.
    pub tables: bool,
    /// Rows of unwind tables that there is room for; eight bytes each.
    pub rows: u32,
    /// Bytes of kernel memory that all maps together may take.
    pub kernel_memory: u64,
    /// Sizes that a test asks for.
    pub asked: Asked,
    /// Watches mapping calls by this means instead of the best one.
    pub mapping_hook: Option<MappingHook>,
    /// Whether the start of children is told.
    pub forks: bool,
    /// Sampled blocks that there is room for, in all processes together: some 80 bytes each as they come, and 16 bytes in advance.
    pub addresses: u32,
    /// Whether it is told which processes come ([`Programs::take_births`]).
    pub births: bool,
    /// Whether it is told whom the kernel kills because memory has run out ([`Programs::take_oom_victims`]).
    pub oom_kills: bool,
    /// Whether page faults may have to be looked at ([`Programs::watch_pages`]).
    pub pages: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            min_size: 0,
            max_size: u64::MAX,
            walk: None,
            mappings: true,
            kind: None,
            tables: true,
            rows: 2 << 20,
            kernel_memory: 128 << 20,
            asked: Asked::default(),
            mapping_hook: None,
            forks: false,
            addresses: 1 << 18,
            births: false,
            oom_kills: false,
            pages: false,
        }
    }
}

/// Where probes go in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// A path that the kernel can open.
    pub file: PathBuf,
    pub points: Vec<Point>,
}

/// One probed function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// One of `leak_common::op`, with `SHIFTED` where that applies.
    pub shape: u8,
    /// Offset in the file of the instruction that the breakpoint replaces.
    pub offset: u64,
    /// Whether the kernel single-steps that instruction, as far as is known, instead of emulating it.
    pub stepped: bool,
}

impl Point {
    fn cookie(&self) -> u8 {
        self.shape | if self.stepped { op::STEPPED } else { 0 }
    }
}

impl From<&ProbePoint> for Point {
    fn from(point: &ProbePoint) -> Self {
        Self { shape: point.op(), offset: point.offset, stepped: !point.placement.reason.is_emulated() }
    }
}

/// The probes in one file for one process; they are removed when this is dropped.
#[derive(Debug, Default)]
pub struct Probes {
    links: Vec<OwnedFd>,
}

impl Drop for Probes {
    fn drop(&mut self) {
        close_all(std::mem::take(&mut self.links));
    }
}

/// Removes many probes at once, side by side.
pub fn detach(probes: impl IntoIterator<Item = Probes>) {
    close_all(probes.into_iter().flat_map(|mut probes| std::mem::take(&mut probes.links)).collect());
}

/// The loaded programs and their maps.
pub struct Programs {
    ebpf: Ebpf,
    uprobes: HashMap<&'static str, OwnedFd>,
    kind: UprobeKind,
    targets: BpfHashMap<MapData, u32, [u32; 6]>,
    samplings: Samplings,
    /// Where the kernel side counts what it lost of each target; read by `losses`.
    epochs: BpfHashMap<MapData, u32, u64>,
    rows: Rows,
    ranges: Ranges,
    clock: ClockSync,
    system_links: Vec<OwnedFd>,
    /// What hangs on those links.
    watchers: Vec<OwnedFd>,
    mapping_hook: MappingHook,
    /// The lanes of our own ring and the bytes of one, where records come through that.
    lanes: Option<(u64, u64)>,
    tables: bool,
    pages: Option<Pages>,
    births: Option<BpfHashMap<MapData, u32, u8>>,
    oom_victims: Option<oom::Victims>,
    /// All maps, to ask how much memory they take.
    accounted: Vec<OwnedFd>,
    /// Keeps the programs alive that others call: a map of programs lets go of them with the last descriptor of the map.
    _walkers: Vec<OwnedFd>,
}

/// How mapping calls are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingHook {
    /// At the kernel's functions for these calls.
    Functions,
    /// At the tracepoints of all system calls, which slows all of them down, return probes included.
    TypedTracepoints,
    /// The same, with programs that know less at once and so cost more.
    Tracepoints,
    NotAtAll,
}

impl MappingHook {
    pub fn name(self) -> &'static str {
        match self {
            Self::Functions => "the kernel's functions (fentry)",
            Self::TypedTracepoints => "typed tracepoints of all system calls (tp_btf)",
            Self::Tracepoints => "raw tracepoints of all system calls",
            Self::NotAtAll => "nothing",
        }
    }
}

/// Keeps `leak_common::Clock` current.
struct ClockSync {
    map: Array<MapData, [u64; 4]>,
}

impl ClockSync {
    fn new(ebpf: &mut Ebpf) -> Result<Self> {
        let program: &mut RawTracePoint = ebpf.program_mut("calibrate").context("no program calibrate")?.try_into()?;
        program.load().context("failed to load the BPF program calibrate")?;
        Ok(Self { map: Array::try_from(take_map(ebpf, "CLOCK")?)? })
    }

    fn sync(&mut self, ebpf: &Ebpf) -> Result<()> {
        let program: &RawTracePoint = ebpf.program("calibrate").context("no program calibrate")?.try_into()?;
        sys::run_once(program.fd()?.as_fd()).context("failed to run the program")?;
        let [_, _, jiffies, nanoseconds] = self.map.get(&0, 0)?;
        // The coarse clock advances once a jiffy.
        let tick = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)?;
        let tick = Duration::from(tick).as_nanos() as u64;
        let offset = nanoseconds.wrapping_sub(jiffies.wrapping_mul(tick));
        Ok(self.map.set(0, [tick, offset, jiffies, nanoseconds], 0)?)
    }
}

impl Programs {
    /// Loads everything; no allocator is attached to yet.
    pub fn load(settings: &Settings) -> Result<Self> {
        let kind = settings.kind.unwrap_or_else(|| LinkSupport::probe().best());
        let btf = kernel_types();
        let offset = |of, member| btf.as_ref().and_then(|btf| btf.member(of, member)).unwrap_or(0);
        let mut offsets = RETURN_PROBE_MEMBERS.map(|(of, member)| offset(of, member));
        // The first tells whether all are known; the stack and the list may well stand at zero.
        let known =
            btf.as_ref().is_some_and(|btf| RETURN_PROBE_MEMBERS.iter().all(|(of, m)| btf.member(of, m).is_some()));
        if !known {
            offsets[0] = 0;
        }
        let task_offsets = TASK_MEMBERS.map(|member| offset("task_struct", member));
        let mut loader = EbpfLoader::new();
        // Nothing is relocated against the kernel's types, and aya would parse all of them first: 100 ms.
        loader.btf(None);
        for (name, value) in RETURN_PROBE_SETTINGS.into_iter().zip(&offsets) {
            loader.override_global(name, value, true);
        }
        for (name, value) in TASK_SETTINGS.into_iter().zip(&task_offsets) {
            loader.override_global(name, value, true);
        }
        let walk = settings.walk.unwrap_or_else(StackWalk::probe);
        let (has_loop, tail_calls) = (walk == StackWalk::Loop, walk == StackWalk::TailCalls);
        let is_old = settings.walk.is_some() && !has_loop;
        let own_ring = sys::has_fetch_add() && !is_old;
        let tables = settings.tables && walk != StackWalk::PlainLoop;
        let map_allocator = has_map_allocator() && !is_old;
        let maps = sizes::definitions(OBJECT)?;
        let rows = if tables { settings.rows.max(1) } else { 1 };
        let sizes = sizes::plan(
            &maps,
            settings.kernel_memory,
            Wanted { rows, addresses: settings.addresses },
            map_allocator,
            settings.asked,
        )?
        .for_links(kind);
        let globals = [
            ("USE_TABLES", u64::from(tables)),
            ("OWN_RING", u64::from(own_ring)),
            ("HAS_LOOP", u64::from(has_loop)),
            ("TAIL_CALLS", u64::from(tail_calls)),
        ];
        let of_ring = sizes.globals();
        for (name, value) in globals.iter().chain(&of_ring) {
            loader.override_global(name, value, true);
        }
        let address_mask = address_mask();
        // Where nothing is signed the programs do not ask.
        loader.override_global("ADDRESS_MASK", &address_mask, cfg!(target_arch = "aarch64"));
        let bytes = object(&maps, own_ring.then_some(sizes.whole_ring()), map_allocator)?;
        if let Some(owners) = sizes.owners {
            loader.map_max_entries("OWNERS", owners);
        }
        let mut ebpf = loader
            .override_global("MIN_SIZE", &settings.min_size, true)
            .override_global("MAX_SIZE", &settings.max_size, true)
            // The one that is not used takes as little as there can be.
            .map_max_entries("EVENTS", if own_ring { page_size() as u32 } else { kernel_ring(&sizes) })
            .map_max_entries("ROWS", sizes.rows)
            .map_max_entries("MISSED", sizes.missed)
            .map_max_entries("THREADS", sizes.threads)
            .map_max_entries("ADDRESSES", sizes.addresses)
            .load(&bytes)
            .context("failed to load the BPF maps")?;
        let accounted = ebpf
            .maps()
            .map(|(_, map)| Ok(map_data(map).fd().as_fd().try_clone_to_owned()?))
            .collect::<Result<_>>()
            .context("failed to keep the BPF maps")?;
        let objects = Objects::parse(&bytes, &ebpf, own_ring, has_loop)?;
        let uprobes = load_uprobes(&objects, kind)?;
        let walkers = if tail_calls { load_walkers(&objects, &ebpf, kind)? } else { Vec::new() };
        let targets = BpfHashMap::try_from(take_map(&mut ebpf, "TARGETS")?)?;
        let epochs = BpfHashMap::try_from(take_map(&mut ebpf, "EPOCHS")?)?;
        let rows = Rows(elements::Elements::take(take_map(&mut ebpf, "ROWS")?)?);
        let ranges = Ranges::new(elements::Elements::take(take_map(&mut ebpf, "RANGES")?)?);
        let samplings = ["SAMPLINGS", "HITS", "ADDRESSES"].map(|name| take_map(&mut ebpf, name));
        let [words, hits, sampled] = samplings;
        let samplings = Samplings::take(words?, hits?, sampled?)?;
        let clock = ClockSync::new(&mut ebpf)?;
        let mut programs = Self {
            ebpf,
            uprobes,
            kind,
            targets,
            samplings,
            epochs,
            rows,
            ranges,
            clock,
            system_links: Vec::new(),
            watchers: Vec::new(),
            mapping_hook: MappingHook::NotAtAll,
            lanes: own_ring.then_some((sizes.lanes, sizes.lane())),
            tables,
            pages: None,
            births: None,
            oom_victims: None,
            accounted,
            _walkers: walkers,
        };
        programs.watch(&objects, btf.as_ref(), settings, has_loop)?;
        programs.sync_clock();
        Ok(programs)
    }

    /// Attaches what belongs to no allocator: processes, mapping calls and what else the settings ask for.
    fn watch(&mut self, objects: &Objects, btf: Option<&Btf>, settings: &Settings, has_loop: bool) -> Result<()> {
        self.attach_tracepoints(objects, &PROCESS_PROGRAMS)?;
        if settings.forks {
            self.attach_tracepoints(objects, &FORK_PROGRAM)?;
        }
        if settings.mappings {
            // Only programs at raw tracepoints can be followed by one of their type.
            let only = if has_loop { settings.mapping_hook } else { Some(MappingHook::Tracepoints) };
            self.watch_mappings(objects, btf, only)?;
        }
        if settings.births {
            self.attach_tracepoints(objects, &BIRTH_PROGRAMS)?;
            self.births = Some(BpfHashMap::try_from(take_map(&mut self.ebpf, "BORN")?)?);
        }
        if settings.oom_kills {
            // Without it a report lacks one of its reasons for an end.
            match oom::Victims::watch(objects, &mut self.ebpf) {
                Ok((victims, attached)) => {
                    self.keep(attached);
                    self.oom_victims = Some(victims);
                }
                Err(error) => log::info!("it is not told whom the kernel kills for want of memory: {error:#}"),
            }
        }
        if settings.pages && has_loop {
            // They are evidence: without them there is less of it.
            match Pages::load(objects, &mut self.ebpf) {
                Ok(pages) => self.pages = Some(pages),
                Err(error) => log::info!("page faults cannot be looked at: {error:#}"),
            }
        }
        Ok(())
    }

    /// Processes that were started or have executed a program since the last time; bounded.
    pub fn take_births(&mut self) -> Vec<u32> {
        let Some(births) = &mut self.births else { return Vec::new() };
        let born: Vec<u32> = births.keys().filter_map(Result::ok).collect();
        // Before anybody looks at them: what happens after that is told anew.
        born.into_iter().filter(|tgid| births.remove(tgid).is_ok()).collect()
    }

    /// Whom the kernel has killed for want of memory since the last time, and when, in nanoseconds of `CLOCK_MONOTONIC`; bounded. Before
    /// 6.8 it may be the id of another thread than the first.
    pub fn take_oom_victims(&mut self) -> Vec<(u32, u64)> {
        self.oom_victims.as_mut().map_or_else(Vec::new, oom::Victims::take)
    }

    /// Looks at one of so many page faults of this process from now on, and takes the stacks; false where that cannot be. The
    /// process has to be told as a target, for its code. No allocator is probed.
    pub fn watch_pages(&mut self, tgid: u32, every: u32) -> Result<bool> {
        self.pages.as_mut().map_or(Ok(false), |pages| pages.watch(tgid, every).map(|()| true))
    }

    /// Looks at its page faults no longer.
    pub fn forget_pages(&mut self, tgid: u32) {
        if let Some(pages) = &mut self.pages {
            pages.forget(tgid);
        }
    }

    /// Page faults since the last time: process, hash of the stack, how many.
    pub fn take_pages(&mut self) -> Vec<(u32, u64, u64)> {
        self.pages.as_mut().map_or_else(Vec::new, Pages::take)
    }

    /// Watches mapping calls by the best means that the kernel has, or by the given one.
    fn watch_mappings(&mut self, objects: &Objects, btf: Option<&Btf>, only: Option<MappingHook>) -> Result<()> {
        for (hook, attach) in [
            (MappingHook::Functions, attach_functions as fn(&Objects, &Btf) -> Result<Vec<Attached>>),
            (MappingHook::TypedTracepoints, attach_typed_tracepoints),
        ] {
            if only.is_some_and(|only| only != hook) {
                continue;
            }
            match btf.context("the kernel has no type information").and_then(|btf| attach(objects, btf)) {
                Ok(attached) => {
                    for attached in attached {
                        self.keep(attached);
                    }
                    self.mapping_hook = hook;
                    return Ok(());
                }
                Err(error) => log::info!("mapping calls cannot be watched by {}: {error:#}", hook.name()),
            }
        }
        self.mapping_hook = MappingHook::Tracepoints;
        self.attach_tracepoints(objects, &MAPPING_TRACEPOINTS)
    }

    fn attach_tracepoints(&mut self, objects: &Objects, programs: &[(&str, &str)]) -> Result<()> {
        for (name, tracepoint) in programs {
            let program = objects.load(name, Hook::RawTracepoint)?;
            let link = sys::link_raw_tracepoint(program.as_fd(), &CString::new(*tracepoint)?);
            let link = link.with_context(|| format!("failed to attach to the tracepoint {tracepoint}"))?;
            self.keep(Attached { program, link });
        }
        Ok(())
    }

    fn keep(&mut self, attached: Attached) {
        self.watchers.push(attached.program);
        self.system_links.push(attached.link);
    }

    /// The programs that see mapping calls and what happens to processes, for the module that counts what they miss.
    pub(crate) fn take_watchers(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.watchers)
    }

    /// The lanes of our own ring and the bytes of one, where records come through that.
    pub(crate) fn lanes(&self) -> Option<(u64, u64)> {
        self.lanes
    }

    /// Whether stacks are unwound with tables: where that was asked for, and the kernel follows such a walk.
    pub fn has_tables(&self) -> bool {
        self.tables
    }

    /// Bytes of kernel memory that the maps take now; `None` where the kernel does not say.
    pub fn kernel_bytes(&self) -> Option<u64> {
        sizes::used(&self.accounted)
    }

    /// How mapping calls are watched.
    pub fn mapping_hook(&self) -> MappingHook {
        self.mapping_hook
    }

    /// Brings the kernel side's jiffies into line with the clock again; they drift apart by what NTP corrects.
    pub fn sync_clock(&mut self) {
        // Without it the programs read the clock itself, which only costs more.
        if let Err(error) = self.clock.sync(&self.ebpf) {
            log::debug!("the programs' clock is not calibrated: {error:#}");
        }
    }

    /// Detaches from the system's tracepoints and functions.
    pub fn detach_system(&mut self) {
        close_all(std::mem::take(&mut self.system_links));
    }

    /// How uprobes are attached.
    pub fn kind(&self) -> UprobeKind {
        self.kind
    }

    /// Takes a map out, for the module that works with it.
    pub(crate) fn take_map(&mut self, name: &str) -> Result<Map> {
        take_map(&mut self.ebpf, name)
    }

    /// The map of what was lost of each process, which is written here and read elsewhere.
    pub(crate) fn take_epochs(&self) -> Result<Map> {
        let map: &MapData = IterableMap::map(&self.epochs);
        Ok(Map::HashMap(MapData::from_fd(map.fd().as_fd().try_clone_to_owned()?)?))
    }

    /// Sends what the BPF programs log to this process's log.
    pub fn forward_logs(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut self.ebpf).context("failed to read the BPF programs' log")
    }

    /// From now on this process is traced.
    pub fn add_target(&mut self, tgid: u32) -> Result<()> {
        // Its ranges may be there already.
        if self.ranges.has(tgid) {
            return Ok(());
        }
        self.set_target(tgid, &[])
    }

    /// This process is no longer traced.
    pub fn remove_target(&mut self, tgid: u32) {
        // It may have been removed before.
        let _ = self.targets.remove(&tgid);
        let _ = self.epochs.remove(&tgid);
        self.ranges.release(tgid);
        self.samplings.release(tgid);
    }

    /// Writes rows of unwind tables, from the element `first` of the map on.
    pub fn write_rows(&mut self, first: u32, rows: &[u64]) -> std::io::Result<()> {
        self.rows.0.write(first, rows)
    }

    /// Tells where the code of a traced process is. The new ranges take effect all at once.
    pub fn set_target(&mut self, tgid: u32, ranges: &[Range]) -> Result<()> {
        let target =
            self.ranges.replace(tgid, ranges).with_context(|| format!("failed to tell the code of pid {tgid}"))?;
        let (low, high) = (target.trampoline as u32, (target.trampoline >> 32) as u32);
        let sampling =
            self.samplings.place(tgid).with_context(|| format!("failed to tell how pid {tgid} is sampled"))?;
        let value = [target.first_range, target.ranges, low, high, sampling, 0];
        // Before its first record, and once: the kernel side counts there.
        if self.epochs.get(&tgid, 0).is_err() {
            let added = self.epochs.insert(tgid, 0, 0);
            added.with_context(|| format!("failed to keep count of what is lost of pid {tgid}"))?;
        }
        self.targets.insert(tgid, value, 0).with_context(|| format!("failed to add pid {tgid} to the traced processes"))
    }

    /// From now on this process, which must be traced, is sampled with this interval; `frees_filtered` says that frees of blocks that
    /// are not in the map of sampled ones may end in the kernel. So before it is set everything that user space holds to be live has
    /// to be in there ([`Self::keep_addresses`]). False where the process is not traced.
    pub fn set_sampling(&self, tgid: u32, interval: Interval, frees_filtered: bool) -> bool {
        self.samplings.set(tgid, interval, frees_filtered)
    }

    /// The breakpoints of a traced process, which were removed, are about to be set again.
    pub fn attach_again(&self, tgid: u32) {
        self.samplings.attach_again(tgid);
    }

    /// How a process is sampled.
    pub fn sampling(&self, tgid: u32) -> Option<Sampling> {
        self.samplings.get(tgid)
    }

    /// How often a traced process hit our breakpoints.
    pub fn hits(&self, tgid: u32) -> Option<Hits> {
        self.samplings.hits(tgid)
    }

    /// Adds blocks of a process to those whose frees are sent. An error where not all of them have room.
    pub fn keep_addresses(&self, tgid: u32, addresses: &[u64], time: u64) -> std::io::Result<()> {
        self.samplings.keep(tgid, addresses, time)
    }

    /// How many addresses there is room for.
    pub fn address_room(&self) -> u32 {
        self.samplings.room()
    }

    /// Every block whose free is sent where frees are filtered, and the time of its allocation.
    pub fn addresses(&self) -> std::io::Result<Vec<(Address, u64)>> {
        self.samplings.addresses()
    }

    /// Drops the blocks of a process that were allocated before `time`, because it has ended, or executed a new program.
    pub fn purge_addresses(&self, tgid: u32, time: u64) {
        match self.samplings.purge(tgid, time) {
            Ok(count) => log::debug!("pid {tgid}: {count} addresses dropped"),
            Err(error) => log::debug!("pid {tgid}: its addresses are not dropped: {error:#}"),
        }
    }

    /// Puts probes into a file for one process.
    pub fn attach(&self, tgid: u32, places: &Places) -> Result<Probes> {
        // The kernel places one breakpoint after the other. free's comes first: a block whose allocation was seen and whose
        // free was not would look leaked.
        let mut places = places.clone();
        places.points.sort_by_key(|point| point.shape != op::FREE);
        let places = &places;
        let links = match self.kind {
            UprobeKind::Session => self.attach_multi(tgid, places, &[("session", false)]),
            UprobeKind::Multi => self.attach_multi(tgid, places, &[("leave_any", true), ("enter_any", false)]),
            UprobeKind::Perf => self.attach_perf(tgid, places),
        };
        links
            .map(|links| Probes { links })
            .with_context(|| format!("failed to put probes into {} for pid {tgid}", places.file.display()))
    }

    fn attach_multi(&self, tgid: u32, places: &Places, programs: &[(&str, bool)]) -> Result<Vec<OwnedFd>> {
        let mut links = Vec::new();
        for (name, at_return) in programs {
            let points = places.points.iter().filter(|point| !at_return || point.shape != op::FREE);
            let (offsets, cookies): (Vec<u64>, Vec<u64>) =
                points.map(|point| (point.offset, u64::from(point.cookie()))).unzip();
            if offsets.is_empty() {
                continue;
            }
            let program = self.uprobe(name)?;
            links.push(sys::link_uprobe_multi(
                program.as_fd(),
                self.kind,
                &places.file,
                &offsets,
                &cookies,
                tgid,
                *at_return,
            )?);
        }
        Ok(links)
    }

    fn attach_perf(&self, tgid: u32, places: &Places) -> Result<Vec<OwnedFd>> {
        let mut links = Vec::new();
        let attach = |name: &str, offset, at_return| -> Result<OwnedFd> {
            Ok(sys::perf_uprobe(self.uprobe(name)?.as_fd(), &places.file, offset, tgid, at_return)?)
        };
        for point in &places.points {
            // The return first: an entry without its return would leave a call in flight.
            if point.shape != op::FREE {
                links.push(attach("leave_any", point.offset, true)?);
            }
            links.push(attach(entry_program(point.shape), point.offset, false)?);
        }
        Ok(links)
    }

    fn uprobe(&self, name: &str) -> Result<&OwnedFd> {
        self.uprobes.get(name).ok_or_else(|| anyhow!("the BPF program {name} is not loaded"))
    }

    /// Run time of each uprobe program, by name.
    pub fn run_times(&self) -> Vec<(&'static str, RunTime)> {
        self.uprobes.iter().filter_map(|(name, fd)| Some((*name, sys::run_time(fd.as_fd()).ok()?))).collect()
    }
}

/// Loads the programs that go on with walks, where the kernel has no `bpf_loop`.
fn load_walkers(objects: &Objects, ebpf: &Ebpf, kind: UprobeKind) -> Result<Vec<OwnedFd>> {
    let walkers = [
        ("walk_uprobe", Hook::Uprobe(kind), "WALK_UPROBE"),
        ("walk_tracepoint", Hook::RawTracepoint, "WALK_TRACEPOINT"),
    ];
    let load = |(name, hook, map): (&str, Hook, &str)| {
        let program = objects.load(name, hook)?;
        let programs = ebpf.map(map).with_context(|| format!("the BPF object lacks the map {map}"))?;
        sys::set_program(map_data(programs).fd().as_fd(), program.as_fd())
            .with_context(|| format!("failed to put the program {name} into its map"))?;
        Ok(program)
    };
    walkers.into_iter().map(load).collect()
}

/// How a stack of many frames is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackWalk {
    /// In one program, and verified rather than walked where possible: `bpf_loop` (5.17).
    Loop,
    /// By programs that follow one another (arm64: 6.0, for programs that have functions).
    TailCalls,
    /// In one program that the verifier follows step by step, which is too much for tables.
    PlainLoop,
}

impl StackWalk {
    /// The best way of the running kernel.
    fn probe() -> Self {
        if sys::has_loop() {
            Self::Loop
        } else if sys::has_mixed_tail_calls() {
            Self::TailCalls
        } else {
            Self::PlainLoop
        }
    }
}

/// What makes tracing cheaper where the kernel has it; found by trying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    pub walk: StackWalk,
    /// Atomic operations with a result, which our own ring rests on.
    pub own_ring: bool,
    /// Maps that grow while programs at probes use them; otherwise the memory for threads is taken in advance.
    pub map_allocator: bool,
    /// How mapping calls can be watched.
    pub mapping_hook: MappingHook,
}

impl Abilities {
    /// Of the running kernel.
    pub fn probe() -> Self {
        let btf = kernel_types();
        let tracing = |name: &str, hook: fn(u32) -> Hook| {
            btf.as_ref().and_then(|btf| btf.id(name)).is_some_and(|id| sys::attaches_empty(hook(id)))
        };
        let (walk, function) = (StackWalk::probe(), format!("{SYSCALL_PREFIX}mmap"));
        let loops = walk == StackWalk::Loop;
        Self {
            walk,
            own_ring: sys::has_fetch_add(),
            map_allocator: has_map_allocator(),
            mapping_hook: if loops && tracing(&function, Hook::FunctionExit) {
                MappingHook::Functions
            } else if loops && tracing("btf_trace_sys_exit", Hook::Tracepoint) {
                MappingHook::TypedTracepoints
            } else {
                MappingHook::Tracepoints
            },
        }
    }
}

fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name).ok_or_else(|| anyhow!("the BPF object lacks the map {name}"))
}

/// Members of kernel structures through which the pending return probes of a task are found, and the settings of the BPF
/// programs that take their offsets.
const RETURN_PROBE_MEMBERS: [(&str, &str); 5] = [
    ("task_struct", "utask"),
    ("uprobe_task", "return_instances"),
    ("return_instance", "stack"),
    ("return_instance", "orig_ret_vaddr"),
    ("return_instance", "next"),
];
const RETURN_PROBE_SETTINGS: [&str; 5] =
    ["UTASK_OFFSET", "INSTANCES_OFFSET", "INSTANCE_STACK_OFFSET", "INSTANCE_RETURN_OFFSET", "INSTANCE_NEXT_OFFSET"];

/// Members of `task_struct` that name a new process, and the settings that take their offsets.
const TASK_MEMBERS: [&str; 2] = ["tgid", "pid"];
const TASK_SETTINGS: [&str; 2] = ["TASK_TGID_OFFSET", "TASK_PID_OFFSET"];

/// What the running kernel's type information says of what we need; without it, there are fallbacks.
fn kernel_types() -> Option<Btf> {
    let functions = MAPPING_FUNCTIONS.map(|(_, _, call)| format!("{SYSCALL_PREFIX}{call}"));
    let names: Vec<&str> =
        functions.iter().map(String::as_str).chain(["btf_trace_sys_enter", "btf_trace_sys_exit"]).collect();
    let members: Vec<_> =
        RETURN_PROBE_MEMBERS.into_iter().chain(TASK_MEMBERS.map(|member| ("task_struct", member))).collect();
    Btf::of_this_kernel(&names, &members).inspect_err(|error| log::info!("{error}")).ok()
}

/// The bits that addresses of user space have on this host: arm64 has 39 to 48 of them, by its page size and configuration, and signs
/// return addresses in those above (Documentation/arch/arm64/memory.rst and pointer-authentication.rst). The first stack of a
/// process stands at the end of its address space, or, where that has 52 bits, of what is given to who does not ask for more.
fn address_mask() -> u64 {
    // SAFETY: no arguments that could be wrong. The answer points to random bytes on that stack, or is zero.
    let stack = unsafe { libc::getauxval(libc::AT_RANDOM) };
    if stack == 0 { (1 << 48) - 1 } else { u64::MAX >> stack.leading_zeros() }
}

/// A program that is attached to the system, and what removes it.
struct Attached {
    program: OwnedFd,
    link: OwnedFd,
}

/// Attaches to the kernel's functions for the mapping calls: to all of them or none.
fn attach_functions(objects: &Objects, btf: &Btf) -> Result<Vec<Attached>> {
    let mut attached = Vec::new();
    for (enter, leave, call) in MAPPING_FUNCTIONS {
        let function = format!("{SYSCALL_PREFIX}{call}");
        let id = btf.id(&function).with_context(|| format!("the kernel has no function {function}"))?;
        // The exit first: an entry without its exit would leave a call in flight.
        for (name, hook) in [(leave, Hook::FunctionExit(id)), (enter, Hook::FunctionEntry(id))] {
            let program = objects.load(name, hook)?;
            let link = sys::link_tracing(program.as_fd()).with_context(|| format!("failed to attach to {function}"))?;
            attached.push(Attached { program, link });
        }
    }
    Ok(attached)
}

/// Attaches to the tracepoints of all system calls, with typed arguments.
fn attach_typed_tracepoints(objects: &Objects, btf: &Btf) -> Result<Vec<Attached>> {
    let mut attached = Vec::new();
    for (name, tracepoint) in TYPED_TRACEPOINTS {
        let id = btf.id(&format!("btf_trace_{tracepoint}"));
        let id = id.with_context(|| format!("the kernel has no type for the tracepoint {tracepoint}"))?;
        let program = objects.load(name, Hook::Tracepoint(id))?;
        let link = sys::link_tracing(program.as_fd());
        let link = link.with_context(|| format!("failed to attach to the tracepoint {tracepoint}"))?;
        attached.push(Attached { program, link });
    }
    Ok(attached)
}

/// The BPF object, relocated against aya's maps, for the programs that aya cannot load: it knows no expected attach type for
/// uprobes, and would parse all of the kernel's types for functions.
struct Objects {
    object: Object,
    btf: Option<OwnedFd>,
}

impl Objects {
    fn parse(bytes: &[u8], ebpf: &Ebpf, own_ring: bool, has_loop: bool) -> Result<Self> {
        let mut object = Object::parse(bytes).context("failed to parse the BPF object")?;
        let btf = match aya::features().btf() {
            Some(features) => {
                object.fixup_and_sanitize_btf(features)?.map(|btf| sys::load_btf(&btf.to_bytes())).transpose()
            }
            None => Ok(None),
        }
        .context("failed to load the BPF type information")?;
        let maps = object.maps.clone();
        let sections = object.functions.keys().map(|(section, _)| *section).collect();
        let placed: Vec<_> = maps
            .iter()
            .filter_map(|(name, map)| Some((name.as_str(), map_data(ebpf.map(name)?).fd().as_fd().as_raw_fd(), map)))
            .collect();
        object.relocate_maps(placed.into_iter(), &sections)?;
        object.relocate_calls(&sections)?;
        object.sanitize_functions(aya::features());
        if !has_loop {
            object.functions.values_mut().for_each(|function| sys::remove_callbacks(&mut function.instructions));
        }
        if !own_ring {
            object.functions.values_mut().for_each(|function| sys::remove_fetch_add(&mut function.instructions));
        }
        Ok(Self { object, btf })
    }

    fn load(&self, name: &str, hook: Hook) -> Result<OwnedFd> {
        let object = &self.object;
        let program = object.programs.get(name).ok_or_else(|| anyhow!("the BPF object lacks the program {name}"))?;
        let function = &object.functions[&program.function_key()];
        sys::load_program(&sys::Program {
            name,
            instructions: &function.instructions,
            license: &program.license,
            hook,
            btf: self.btf.as_ref().map(OwnedFd::as_fd),
            func_info: function.func_info.func_info_bytes(),
            func_info_size: function.func_info_rec_size,
        })
        .with_context(|| format!("failed to load the BPF program {name}"))
    }
}

/// Loads the uprobe programs that this kind of probe needs.
fn load_uprobes(objects: &Objects, kind: UprobeKind) -> Result<HashMap<&'static str, OwnedFd>> {
    let names: &[&'static str] = match kind {
        UprobeKind::Session => &["session"],
        UprobeKind::Multi => &["enter_any", "leave_any"],
        UprobeKind::Perf => &[
            "enter_malloc",
            "enter_calloc",
            "enter_aligned",
            "enter_realloc",
            "enter_reallocarray",
            "enter_posix",
            "enter_free",
            "enter_free_unnamed",
            "enter_control",
            "enter_control_by_mib",
            "enter_xallocx",
            "enter_reallocf",
            "enter_rust_realloc",
            "enter_heap_calloc",
            "enter_heap_realloc",
            "enter_heap_reallocarray",
            "enter_heap_reallocf",
            "leave_any",
        ],
    };
    names.iter().map(|&name| Ok((name, objects.load(name, Hook::Uprobe(kind))?))).collect()
}

fn map_data(map: &Map) -> &MapData {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data)
        | Map::LruHashMap(data)
        | Map::ProgramArray(data)
        | Map::PerCpuHashMap(data)
        | Map::ArrayOfMaps(data)
        | Map::HashOfMaps(data)
        | Map::Unsupported(data) => data,
        other => unreachable!("the object has no map of this type: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No bit too few and none too many: the mask holds all that this process has mapped, and half of it would not.
    #[test]
    fn address_mask_fits_the_address_space() {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("own mappings can be read");
        let last = |line: &str| u64::from_str_radix(line.split(['-', ' ']).nth(1)?, 16).ok().map(|end| end - 1);
        // x86-64 has a page of the kernel's at the very top.
        let highest = maps.lines().filter_map(last).filter(|last| last >> 63 == 0).max().expect("a mapping");
        let mask = address_mask();
        assert_eq!(mask.count_ones(), mask.trailing_ones());
        assert_eq!((highest & mask, highest & (mask >> 1) == highest), (highest, false), "{highest:#x} {mask:#x}");
    }
}

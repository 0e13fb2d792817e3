//! Loads the BPF programs and puts them where they belong. With `ring` and `losses` the only module that knows aya or
//! bpf(2). What is detached how: everything hangs on file descriptors, so that nothing stays behind when the tracer
//! dies, however it dies.

mod floor;
mod hold;
mod sys;

use std::collections::HashMap;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData};
use aya::programs::RawTracePoint;
use aya::programs::raw_trace_point::RawTracePointLink;
use aya::{Ebpf, EbpfLoader};
use aya_obj::Object;
pub use floor::Floor;
use leak_common::op;
pub(crate) use sys::lookup_and_delete;
pub use sys::{LinkSupport, RunTime, UprobeKind};

/// The BPF object, built by this crate's build script.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/leaktrace.bpf.o"));

/// The tracepoints that are attached to the whole system: mapping calls, and what happens to processes.
const MAPPING_PROGRAMS: [(&str, &str); 2] = [("sys_enter", "sys_enter"), ("sys_exit", "sys_exit")];
const PROCESS_PROGRAMS: [(&str, &str); 2] =
    [("process_exec", "sched_process_exec"), ("process_exit", "sched_process_exit")];

/// The entry program of a shape of function, where each has its own.
fn entry_program(shape: u8) -> &'static str {
    match shape {
        op::CALLOC => "enter_calloc",
        op::ALIGNED => "enter_aligned",
        op::REALLOC => "enter_realloc",
        op::REALLOCARRAY => "enter_reallocarray",
        op::POSIX_MEMALIGN => "enter_posix",
        op::FREE => "enter_free",
        _ => "enter_malloc",
    }
}

/// What is fixed when the programs are loaded.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Allocations below this many bytes are not followed.
    pub min_size: u64,
    /// Allocations above this many bytes are not followed.
    pub max_size: u64,
    /// Size of the ring buffer; a power of two and a multiple of the page size.
    pub ring_bytes: u32,
    /// Whether mapping system calls are followed.
    pub mappings: bool,
    /// Uses this kind of probe instead of the best one.
    pub kind: Option<UprobeKind>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { min_size: 0, max_size: u64::MAX, ring_bytes: 16 << 20, mappings: true, kind: None }
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
    /// One of `leak_common::op`.
    pub shape: u8,
    /// Offset in the file of the instruction that the breakpoint replaces.
    pub offset: u64,
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

/// Closes links. A perf event waits for a grace period of its own (108 ms measured, whatever else is going on), so many
/// are closed side by side.
fn close_all(links: Vec<OwnedFd>) {
    std::thread::scope(|scope| {
        for link in links {
            scope.spawn(move || drop(link));
        }
    });
}

/// The loaded programs and their maps.
pub struct Programs {
    ebpf: Ebpf,
    uprobes: HashMap<&'static str, OwnedFd>,
    kind: UprobeKind,
    targets: BpfHashMap<MapData, u32, u32>,
    clock: ClockSync,
    system_links: Vec<RawTracePointLink>,
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
    /// Loads everything; nothing is attached yet.
    pub fn load(settings: &Settings) -> Result<Self> {
        let kind = settings.kind.unwrap_or_else(|| LinkSupport::probe().best());
        let mut ebpf = EbpfLoader::new()
            .override_global("MIN_SIZE", &settings.min_size, true)
            .override_global("MAX_SIZE", &settings.max_size, true)
            .map_max_entries("EVENTS", settings.ring_bytes)
            .load(OBJECT)
            .context("failed to load the BPF maps")?;
        let uprobes = load_uprobes(&ebpf, kind)?;
        let mut system: Vec<(&str, &str)> = PROCESS_PROGRAMS.to_vec();
        if settings.mappings {
            system.extend(MAPPING_PROGRAMS);
        }
        let mut system_links = Vec::new();
        for (name, tracepoint) in system {
            let program: &mut RawTracePoint =
                ebpf.program_mut(name).ok_or_else(|| anyhow!("the BPF object lacks the program {name}"))?.try_into()?;
            program.load().with_context(|| format!("failed to load the BPF program {name}"))?;
            let link = program.attach(tracepoint);
            let link = link.with_context(|| format!("failed to attach to the tracepoint {tracepoint}"))?;
            system_links.push(program.take_link(link)?);
        }
        let targets = BpfHashMap::try_from(take_map(&mut ebpf, "TARGETS")?)?;
        let clock = ClockSync::new(&mut ebpf)?;
        let mut programs = Self { ebpf, uprobes, kind, targets, clock, system_links };
        programs.sync_clock();
        Ok(programs)
    }

    /// Brings the kernel side's jiffies into line with the clock again; they drift apart by what NTP corrects.
    pub fn sync_clock(&mut self) {
        // Without it the programs read the clock itself, which only costs more.
        if let Err(error) = self.clock.sync(&self.ebpf) {
            log::debug!("the programs' clock is not calibrated: {error:#}");
        }
    }

    /// Detaches from the system's tracepoints.
    pub fn detach_system(&mut self) {
        self.system_links.clear();
    }

    /// How uprobes are attached.
    pub fn kind(&self) -> UprobeKind {
        self.kind
    }

    /// Takes a map out, for the module that works with it.
    pub(crate) fn take_map(&mut self, name: &str) -> Result<Map> {
        take_map(&mut self.ebpf, name)
    }

    /// Sends what the BPF programs log to this process's log.
    pub fn forward_logs(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut self.ebpf).context("failed to read the BPF programs' log")
    }

    /// From now on this process is traced.
    pub fn add_target(&mut self, tgid: u32) -> Result<()> {
        self.targets.insert(tgid, 0, 0).with_context(|| format!("failed to add pid {tgid} to the traced processes"))
    }

    /// This process is no longer traced.
    pub fn remove_target(&mut self, tgid: u32) {
        // It may have been removed before.
        let _ = self.targets.remove(&tgid);
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
                points.map(|point| (point.offset, u64::from(point.shape))).unzip();
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

fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name).ok_or_else(|| anyhow!("the BPF object lacks the map {name}"))
}

/// Loads the uprobe programs that this kind of probe needs. aya cannot: it knows no expected attach type for uprobes. So
/// the object is parsed once more, with aya's maps in it.
fn load_uprobes(ebpf: &Ebpf, kind: UprobeKind) -> Result<HashMap<&'static str, OwnedFd>> {
    let names: &[&str] = match kind {
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
            "leave_any",
        ],
    };
    let mut object = Object::parse(OBJECT).context("failed to parse the BPF object")?;
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
    let mut programs = HashMap::new();
    for &name in names {
        let program = object.programs.get(name).ok_or_else(|| anyhow!("the BPF object lacks the program {name}"))?;
        let function = &object.functions[&program.function_key()];
        let loaded = sys::load_program(&sys::Program {
            name,
            instructions: &function.instructions,
            license: &program.license,
            kind,
            btf: btf.as_ref().map(OwnedFd::as_fd),
            func_info: function.func_info.func_info_bytes(),
            func_info_size: function.func_info_rec_size,
        })
        .with_context(|| format!("failed to load the BPF program {name}"))?;
        programs.insert(name, loaded);
    }
    Ok(programs)
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

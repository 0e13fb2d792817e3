//! The bpf(2) and `perf_event_open(2)` calls that aya does not make: programs with an expected attach type for uprobes,
//! multi-uprobe and session links, perf events that stay open in their own descriptor, and programs at functions of the kernel.

use std::ffi::{CStr, CString, c_long};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn, bpf_map_type, bpf_prog_info, bpf_prog_type};

/// How a uprobe program will be attached; the kernel wants to know at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UprobeKind {
    /// A perf event, at one place (all kernels).
    Perf,
    /// Many places on one link (6.6).
    Multi,
    /// The same, running one program at entry and at return (6.13).
    Session,
}

impl UprobeKind {
    fn attach_type(self) -> u32 {
        match self {
            Self::Perf => 0,
            Self::Multi => bpf_attach_type::BPF_TRACE_UPROBE_MULTI as u32,
            // BPF_TRACE_UPROBE_SESSION is newer than aya-obj's bindings (include/uapi/linux/bpf.h, v6.13).
            Self::Session => 57,
        }
    }
}

/// What a program will be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Uprobe(UprobeKind),
    /// The entry of the kernel's function with this id.
    FunctionEntry(u32),
    /// Its return.
    FunctionExit(u32),
    /// A tracepoint with typed arguments, by the id of its type `btf_trace_*`.
    Tracepoint(u32),
    /// A raw tracepoint.
    RawTracepoint,
}

impl Hook {
    fn program_type(self) -> bpf_prog_type {
        match self {
            Self::Uprobe(_) => bpf_prog_type::BPF_PROG_TYPE_KPROBE,
            Self::FunctionEntry(_) | Self::FunctionExit(_) | Self::Tracepoint(_) => {
                bpf_prog_type::BPF_PROG_TYPE_TRACING
            }
            Self::RawTracepoint => bpf_prog_type::BPF_PROG_TYPE_RAW_TRACEPOINT,
        }
    }

    fn attach_type(self) -> u32 {
        match self {
            Self::Uprobe(kind) => kind.attach_type(),
            Self::FunctionEntry(_) => bpf_attach_type::BPF_TRACE_FENTRY as u32,
            Self::FunctionExit(_) => bpf_attach_type::BPF_TRACE_FEXIT as u32,
            Self::Tracepoint(_) => bpf_attach_type::BPF_TRACE_RAW_TP as u32,
            Self::RawTracepoint => 0,
        }
    }
}

/// A program as it comes out of the object file, relocated.
pub struct Program<'a> {
    pub name: &'a str,
    pub instructions: &'a [bpf_insn],
    pub license: &'a CString,
    pub hook: Hook,
    /// Needed by programs that pass a callback to `bpf_loop`: the kernel checks the callback's type.
    pub btf: Option<BorrowedFd<'a>>,
    pub func_info: Vec<u8>,
    pub func_info_size: usize,
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<c_long> {
    // SAFETY: attr is a valid, zero-padded bpf_attr of the size given; pointers in it were made from live references by
    // the callers in this file.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as c_long, std::ptr::from_mut(attr), size_of::<bpf_attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn zeroed() -> bpf_attr {
    // SAFETY: a union of plain integers, for which zero is a valid value.
    unsafe { std::mem::zeroed() }
}

fn fd(raw: c_long) -> OwnedFd {
    // SAFETY: the system call just returned this descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(raw as i32) }
}

/// Loads a program. The error carries the end of the verifier's log.
pub fn load_program(program: &Program<'_>) -> io::Result<OwnedFd> {
    let attempt = |log: &mut [u8]| {
        let mut attr = zeroed();
        // SAFETY: this is the union's member for BPF_PROG_LOAD, and all of it is zero.
        let load = unsafe { &mut attr.__bindgen_anon_3 };
        load.prog_type = program.hook.program_type() as u32;
        load.expected_attach_type = program.hook.attach_type();
        if let Hook::FunctionEntry(id) | Hook::FunctionExit(id) | Hook::Tracepoint(id) = program.hook {
            load.attach_btf_id = id;
        }
        load.insns = program.instructions.as_ptr() as u64;
        load.insn_cnt = program.instructions.len() as u32;
        load.license = program.license.as_ptr() as u64;
        for (to, from) in load.prog_name.iter_mut().take(15).zip(program.name.bytes()) {
            *to = from as _;
        }
        if let Some(btf) = program.btf {
            load.prog_btf_fd = btf.as_raw_fd() as u32;
            load.func_info = program.func_info.as_ptr() as u64;
            load.func_info_rec_size = program.func_info_size as u32;
            load.func_info_cnt = (program.func_info.len() / program.func_info_size.max(1)) as u32;
        }
        if !log.is_empty() {
            load.log_level = 1;
            load.log_buf = log.as_mut_ptr() as u64;
            load.log_size = log.len() as u32;
        }
        bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr).map(fd)
    };
    attempt(&mut []).or_else(|error| {
        if error.raw_os_error() == Some(libc::EPERM) {
            return Err(error);
        }
        let mut log = vec![0_u8; 16 << 20];
        attempt(&mut log).map_err(|error| {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            let text = String::from_utf8_lossy(&log[..end]);
            let lines: Vec<&str> = text.lines().rev().take(12).collect();
            let tail: Vec<&str> = lines.into_iter().rev().collect();
            io::Error::new(error.kind(), format!("{error}; the verifier says: {}", tail.join(" | ")))
        })
    })
}

/// Loads a program that does nothing but answer `answer`.
pub fn load_answer(name: &str, hook: Hook, answer: i32) -> io::Result<OwnedFd> {
    let license = c"Dual MIT/GPL".to_owned();
    // r0 = answer; exit
    let mut instructions: [bpf_insn; 2] = [
        // SAFETY: plain integers, for which zero is a valid value.
        unsafe { std::mem::zeroed() },
        // SAFETY: as above.
        unsafe { std::mem::zeroed() },
    ];
    instructions[0].code = 0xb7;
    instructions[0].imm = answer;
    instructions[1].code = 0x95;
    load_program(&Program {
        name,
        instructions: &instructions,
        license: &license,
        hook,
        btf: None,
        func_info: Vec::new(),
        func_info_size: 0,
    })
}

/// `r1 = atomic_fetch_add((u64 *)(r0), r1)` and the exchange are `BPF_STX | BPF_ATOMIC | BPF_DW` with the bit `BPF_FETCH`.
const ATOMIC: u8 = 0xdb;
const FETCH: i32 = 1;

/// Instructions as (code, dst, src, off, imm).
fn assemble<const N: usize>(code: [(u8, u8, u8, i16, i32); N]) -> [bpf_insn; N] {
    code.map(|(code, dst, src, off, imm)| {
        // SAFETY: plain integers, for which zero is a valid value.
        let mut instruction: bpf_insn = unsafe { std::mem::zeroed() };
        instruction.code = code;
        instruction.set_dst_reg(dst);
        instruction.set_src_reg(src);
        instruction.off = off;
        instruction.imm = imm;
        instruction
    })
}

/// Whether a program that does nothing can be put at this function or typed tracepoint. It is put there for a moment: some
/// kernels load what they then refuse to attach (arm64 before 6.4, which has the programs and not the way into them).
pub fn attaches_empty(hook: Hook) -> bool {
    load_answer("leak_probe", hook, 0).and_then(|program| link_tracing(program.as_fd())).is_ok()
}

fn load_instructions(instructions: &[bpf_insn]) -> io::Result<OwnedFd> {
    load_for(Hook::Uprobe(UprobeKind::Perf), instructions)
}

fn load_for(hook: Hook, instructions: &[bpf_insn]) -> io::Result<OwnedFd> {
    let license = c"Dual MIT/GPL".to_owned();
    load_program(&Program {
        name: "leak_probe",
        instructions,
        license: &license,
        hook,
        btf: None,
        func_info: Vec::new(),
        func_info_size: 0,
    })
}

/// Whether the kernel has atomic operations with a result (5.12), found by loading one.
pub fn has_fetch_add() -> bool {
    // r1 = 0; *(u64 *)(r10 - 8) = r1; r1 = atomic_fetch_add((u64 *)(r10 - 8), r1); r0 = 0; exit
    load_instructions(&assemble([
        (0xb7, 1, 0, 0, 0),
        (0x7b, 10, 1, -8, 0),
        (ATOMIC, 10, 1, -8, FETCH),
        (0xb7, 0, 0, 0, 0),
        (0x95, 0, 0, 0, 0),
    ]))
    .is_ok()
}

/// `BPF_PSEUDO_FUNC`: the constant is the address of a function of the program (5.13).
const PSEUDO_FUNC: u8 = 4;
const LOAD_CONSTANT: u8 = 0x18;

/// Whether the kernel has `bpf_loop` (5.17): as libbpf's `probe_bpf_helper` does, a call with wrong arguments is tried, and what
/// the verifier says of it tells whether it knows the function at all.
pub fn has_loop() -> bool {
    const BPF_FUNC_LOOP: i32 = 181;
    // r1 = r2 = r3 = r4 = 0; call bpf_loop; r0 = 0; exit
    let tried = load_instructions(&assemble([
        (0xb7, 1, 0, 0, 0),
        (0xb7, 2, 0, 0, 0),
        (0xb7, 3, 0, 0, 0),
        (0xb7, 4, 0, 0, 0),
        (0x85, 0, 0, 0, BPF_FUNC_LOOP),
        (0xb7, 0, 0, 0, 0),
        (0x95, 0, 0, 0, 0),
    ]));
    tried.err().is_none_or(|error| {
        let text = error.to_string();
        !text.contains("invalid func") && !text.contains("unknown func")
    })
}

/// Whether programs that have functions may be followed by others (arm64: 6.0): found by loading one. It is never run.
pub fn has_mixed_tail_calls() -> bool {
    /// `BPF_PSEUDO_CALL` and `BPF_PSEUDO_MAP_FD`: what the constant of these instructions is.
    const FUNCTION: u8 = 1;
    const MAP: u8 = 1;
    let Ok(programs) = program_array() else { return false };
    // r6 = r1; call function; r1 = r6; r2 = programs; r3 = 0; tail call; r0 = 0; exit; function: r0 = 0; exit
    load_instructions(&assemble([
        (0xbf, 6, 1, 0, 0),
        (0x85, 0, FUNCTION, 0, 7),
        (0xbf, 1, 6, 0, 0),
        (LOAD_CONSTANT, 2, MAP, 0, programs.as_raw_fd()),
        (0, 0, 0, 0, 0),
        (0xb7, 3, 0, 0, 0),
        (0x85, 0, 0, 0, 12),
        (0xb7, 0, 0, 0, 0),
        (0x95, 0, 0, 0, 0),
        (0xb7, 0, 0, 0, 0),
        (0x95, 0, 0, 0, 0),
    ]))
    .is_ok()
}

/// A map of programs with one place.
fn program_array() -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: this is the union's member for BPF_MAP_CREATE, and all of it is zero.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = bpf_map_type::BPF_MAP_TYPE_PROG_ARRAY as u32;
    create.key_size = 4;
    create.value_size = 4;
    create.max_entries = 1;
    bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr).map(fd)
}

/// Replaces addresses of functions, which stand where they are never reached, by zero: kernels that do not know them refuse
/// a program that contains one.
pub fn remove_callbacks(instructions: &mut [bpf_insn]) {
    for instruction in instructions {
        if instruction.code == LOAD_CONSTANT && instruction.src_reg() == PSEUDO_FUNC {
            instruction.set_src_reg(0);
            instruction.imm = 0;
        }
    }
}

/// Replaces atomic operations with a result, which stand where they are never reached, by loads of a constant: kernels that do not know them refuse a program that contains one.
pub fn remove_fetch_add(instructions: &mut [bpf_insn]) {
    for instruction in instructions {
        if instruction.code == ATOMIC && instruction.imm & FETCH != 0 {
            let result = instruction.src_reg();
            // result = 0
            instruction.code = 0xb7;
            instruction.set_dst_reg(result);
            instruction.set_src_reg(0);
            instruction.off = 0;
            instruction.imm = 0;
        }
    }
}

/// Loads BTF.
pub fn load_btf(btf: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: this is the union's member for BPF_BTF_LOAD, and all of it is zero.
    let load = unsafe { &mut attr.__bindgen_anon_7 };
    load.btf = btf.as_ptr() as u64;
    load.btf_size = btf.len() as u32;
    bpf(bpf_cmd::BPF_BTF_LOAD, &mut attr).map(fd)
}

/// Writes `count` elements of a map; `keys` and `values` point to so many of the map's types.
pub fn update_batch(map: BorrowedFd<'_>, count: usize, keys: *const u8, values: *const u8) -> io::Result<()> {
    let mut attr = zeroed();
    // SAFETY: plain integers.
    let batch = unsafe { &mut attr.batch };
    batch.keys = keys as u64;
    batch.values = values as u64;
    batch.count = count as u32;
    batch.map_fd = map.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr).map(drop)
}

/// What [`lookup_batch`] has read.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    pub count: usize,
    pub is_last: bool,
}

/// Reads up to `most` elements of a hash map, from `position` on (`None`: from the beginning), which moves on (5.6). An element that
/// is there all the time comes once; one that comes or goes meanwhile may come or not.
pub fn lookup_batch(
    map: BorrowedFd<'_>,
    position: &mut Option<u32>,
    most: usize,
    keys: *mut u8,
    values: *mut u8,
) -> io::Result<Batch> {
    let from = *position;
    let mut next = 0_u32;
    let mut attr = zeroed();
    // SAFETY: plain integers.
    let batch = unsafe { &mut attr.batch };
    batch.in_batch = from.as_ref().map_or(0, |from| std::ptr::from_ref(from) as u64);
    batch.out_batch = std::ptr::from_mut(&mut next) as u64;
    batch.keys = keys as u64;
    batch.values = values as u64;
    batch.count = most as u32;
    batch.map_fd = map.as_raw_fd() as u32;
    let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
    // SAFETY: as above; the kernel has written how many there were, also where that was the end (ENOENT).
    let count = unsafe { attr.batch.count } as usize;
    match result {
        Ok(_) => {
            *position = Some(next);
            Ok(Batch { count, is_last: false })
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Batch { count, is_last: true }),
        Err(error) => Err(error),
    }
}

/// Removes an element from a hash map.
pub fn delete<K>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut attr = zeroed();
    // SAFETY: this is the union's member for element commands, and all of it is zero.
    let element = unsafe { &mut attr.__bindgen_anon_2 };
    element.map_fd = map.as_raw_fd() as u32;
    element.key = std::ptr::from_ref(key) as u64;
    bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr).map(drop)
}

/// Puts a program into the first place of a map of programs.
pub fn set_program(map: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (0_u32, program.as_raw_fd() as u32);
    let mut attr = zeroed();
    // SAFETY: this is the union's member for element commands, and all of it is zero.
    let element = unsafe { &mut attr.__bindgen_anon_2 };
    element.map_fd = map.as_raw_fd() as u32;
    element.key = std::ptr::from_ref(&key) as u64;
    element.__bindgen_anon_1.value = std::ptr::from_ref(&value) as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Attaches a program to the function or the tracepoint that it was loaded for.
pub fn link_tracing(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // A name of zero: the program itself knows where.
    attr.raw_tracepoint.prog_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attr).map(fd)
}

/// Attaches a program to a raw tracepoint.
pub fn link_raw_tracepoint(program: BorrowedFd<'_>, tracepoint: &CStr) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.raw_tracepoint.name = tracepoint.as_ptr() as u64;
    attr.raw_tracepoint.prog_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attr).map(fd)
}

/// One link over many places of a file, for one process (0: every process).
pub fn link_uprobe_multi(
    program: BorrowedFd<'_>,
    kind: UprobeKind,
    file: &Path,
    offsets: &[u64],
    cookies: &[u64],
    tgid: u32,
    at_return: bool,
) -> io::Result<OwnedFd> {
    assert!(cookies.is_empty() || cookies.len() == offsets.len(), "a cookie for each place");
    let path = CString::new(file.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    // SAFETY: this is the union's member for BPF_LINK_CREATE, and all of it is zero.
    let link = unsafe { &mut attr.link_create };
    link.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    link.attach_type = kind.attach_type();
    // SAFETY: this is the member that the attach type selects.
    let multi = unsafe { &mut link.__bindgen_anon_3.uprobe_multi };
    multi.path = path.as_ptr() as u64;
    multi.offsets = offsets.as_ptr() as u64;
    multi.cookies = if cookies.is_empty() { 0 } else { cookies.as_ptr() as u64 };
    multi.cnt = offsets.len() as u32;
    multi.pid = tgid;
    // BPF_F_UPROBE_MULTI_RETURN
    multi.flags = u32::from(at_return);
    bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(fd)
}

/// A uprobe as a perf event with the program on it; detached when the descriptor is closed.
pub fn perf_uprobe(
    program: BorrowedFd<'_>,
    file: &Path,
    offset: u64,
    tgid: u32,
    at_return: bool,
) -> io::Result<OwnedFd> {
    let event = perf_event(file, offset, tgid, at_return)?;
    for (request, argument) in [(PERF_EVENT_IOC_SET_BPF, program.as_raw_fd()), (PERF_EVENT_IOC_ENABLE, 0)] {
        // SAFETY: both requests take an integer.
        if unsafe { libc::ioctl(event.as_raw_fd(), request, argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(event)
}

/// A uprobe as a perf event that is never enabled: a breakpoint in the memory of this thread, and nothing more.
pub fn perf_event(file: &Path, offset: u64, tgid: u32, at_return: bool) -> io::Result<OwnedFd> {
    let path = CString::new(file.as_os_str().as_bytes())?;
    let mut attr = [0_u64; 16];
    // struct perf_event_attr, PERF_ATTR_SIZE_VER6: type and size, config, sample_period, ..., config1 (uprobe_path) at
    // byte 56, config2 (probe_offset) at byte 64 (include/uapi/linux/perf_event.h).
    attr[0] = u64::from(uprobe_type()?) | (120 << 32);
    attr[1] = if at_return { return_bit()? } else { 0 };
    attr[2] = 1;
    // The first of the flags at byte 40: disabled.
    attr[5] = 1;
    attr[7] = path.as_ptr() as u64;
    attr[8] = offset;
    let pid = if tgid == 0 { -1 } else { tgid as i32 };
    let cpu = if tgid == 0 { 0 } else { -1 };
    // SAFETY: attr is longer than the size it states, and the path outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), pid, cpu, -1, PERF_FLAG_FD_CLOEXEC) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd(result))
}

const PERF_FLAG_FD_CLOEXEC: u64 = 8;
const PERF_EVENT_IOC_ENABLE: libc::Ioctl = 0x2400;
const PERF_EVENT_IOC_SET_BPF: libc::Ioctl = 0x4004_2408;

/// The perf event type of uprobes, which the kernel assigns at boot.
fn uprobe_type() -> io::Result<u32> {
    parse_sysfs("/sys/bus/event_source/devices/uprobe/type", "")
}

/// The bit of `config` that asks for the return.
fn return_bit() -> io::Result<u64> {
    let bit: u32 = parse_sysfs("/sys/bus/event_source/devices/uprobe/format/retprobe", "config:")?;
    Ok(1 << bit.min(63))
}

fn parse_sysfs(path: &str, prefix: &str) -> io::Result<u32> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("{path} holds no number"));
    let text = fs::read_to_string(path)?;
    text.trim().strip_prefix(prefix).and_then(|number| number.parse().ok()).ok_or_else(invalid)
}

/// Runs a raw tracepoint program once, now, with no arguments (5.10).
pub fn run_once(program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.test.prog_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr).map(drop)
}

/// Takes an entry out of a hash map in one step (5.14 for hash maps): `None` if it is absent.
pub fn lookup_and_delete(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<Option<()>> {
    let mut attr = zeroed();
    // SAFETY: this is the union's member for element commands, and all of it is zero.
    let element = unsafe { &mut attr.__bindgen_anon_2 };
    element.map_fd = map.as_raw_fd() as u32;
    element.key = key.as_ptr() as u64;
    element.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
    match bpf(bpf_cmd::BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(Some(())),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// How often a program ran and how long that took, with `kernel.bpf_stats_enabled`.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunTime {
    pub nanoseconds: u64,
    pub runs: u64,
}

/// Reads a program's run time.
pub fn run_time(program: BorrowedFd<'_>) -> io::Result<RunTime> {
    program_info(program).map(|info| RunTime { nanoseconds: info.run_time_ns, runs: info.run_cnt })
}

/// How often the kernel left out a run of a program since it was loaded, because the program was running on that processor
/// already; counted from 5.12 on, zero before (`recursion_misses` in `struct bpf_prog_info`).
pub fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    program_info(program).map(|info| info.recursion_misses)
}

/// What the kernel tells of a program; zero what it does not know of.
fn program_info(program: BorrowedFd<'_>) -> io::Result<bpf_prog_info> {
    // SAFETY: plain integers, for which zero is a valid value.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    let mut attr = zeroed();
    attr.info.bpf_fd = program.as_raw_fd() as u32;
    attr.info.info_len = size_of::<bpf_prog_info>() as u32;
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// What this kernel can link, found by trying to link: loading a program with an attach type that the kernel does not
/// know succeeds (measured on 5.10 and 6.1), so that would be no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkSupport {
    pub multi: bool,
    pub session: bool,
}

impl LinkSupport {
    /// Probes the running kernel on this process's own executable.
    pub fn probe() -> Self {
        Self { multi: links(UprobeKind::Multi), session: links(UprobeKind::Session) }
    }

    /// The best kind there is.
    pub fn best(self) -> UprobeKind {
        if self.session {
            UprobeKind::Session
        } else if self.multi {
            UprobeKind::Multi
        } else {
            UprobeKind::Perf
        }
    }
}

/// Whether a link of this kind can be made. As in libbpf's `probe_uprobe_multi_link`, the file is one that cannot hold
/// uprobes: a kernel that knows the link looks at the file and answers EBADF, one that does not answers EINVAL.
fn links(kind: UprobeKind) -> bool {
    let Ok(program) = load_answer("leak_probe", Hook::Uprobe(kind), 0) else {
        return false;
    };
    match link_uprobe_multi(program.as_fd(), kind, Path::new("/"), &[0], &[], 0, false) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() == Some(libc::EBADF),
    }
}

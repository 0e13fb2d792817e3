//! Walks of real stacks with the rows and ranges that the kernel gets, against what the C library's `backtrace` finds; and which rows
//! are loaded for whom.

use super::elf::{CODE, CODE_OFFSET, Elf, Frames};
use crate::process::ProcessId;
use crate::unwind::packed::lookup_packed;
use crate::unwind::tables::Sink;
use crate::unwind::{Ranges, Tables};
use leak_common::unwind::{Range, Rule, cfa, fp, range_flag};
use std::arch::naked_asm;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::sync::Mutex;

/// The kernel's map.
struct Map(Vec<u64>);

impl Map {
    fn new(rows: usize) -> Self {
        Self(vec![0; rows])
    }

    fn sink(&mut self) -> impl Sink {
        |first: u32, rows: &[u64]| {
            self.0[first as usize..first as usize + rows.len()].copy_from_slice(rows);
            Ok(())
        }
    }
}

fn me() -> ProcessId {
    ProcessId::current(std::process::id()).expect("this process")
}

fn range_at(ranges: &Ranges, address: u64) -> Option<&Range> {
    ranges.ranges.iter().find(|r| (r.start..r.end).contains(&address))
}

/// The registers that a walk begins with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Registers {
    pc: u64,
    sp: u64,
    fp: u64,
}

/// Its caller's registers once it has returned, as a probe at the entry of an allocator has them.
#[unsafe(naked)]
extern "C" fn caller(registers: &mut Registers) {
    naked_asm!(
        "mov rax, [rsp]",
        "mov [rdi], rax",
        "lea rax, [rsp + 8]",
        "mov [rdi + 8], rax",
        "mov [rdi + 16], rbp",
        "ret"
    )
}

/// How a walk ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Outermost,
    NoRow(u64),
    NotFollowed(u64, Rule),
    /// In code that has rows only for ends of calls a signal interrupted it.
    NeedsFull(u64),
}

/// A word of this process's stack, which is known to be there: the walk has not gone past the outermost frame.
fn word(address: u64) -> u64 {
    assert_eq!(address % 8, 0);
    // SAFETY: callers follow unwind information from a live frame of this thread outwards, so the address is in its stack.
    unsafe { ptr::with_exposed_provenance::<u64>(address as usize).read_volatile() }
}

/// Walks from the registers outwards: return addresses, innermost first, and the end.
fn walk(map: &Map, ranges: &Ranges, from: Registers) -> (Vec<u64>, End) {
    let Registers { mut pc, mut sp, fp: mut frame } = from;
    let mut found = Vec::new();
    let mut interrupted = false;
    for _ in 0..1000 {
        found.push(pc);
        let looked_up = if interrupted { pc } else { pc - 1 };
        let Some(range) = range_at(ranges, looked_up) else { return (found, End::NoRow(pc)) };
        if interrupted && range.flags & range_flag::FULL == 0 {
            return (found, End::NeedsFull(pc));
        }
        let words = &map.0[(range.first - range.rules) as usize..(range.first + range.rows) as usize];
        let Some(rule) = lookup_packed(words, range.rules, (looked_up - range.bias) as u32) else {
            return (found, End::NoRow(pc));
        };
        interrupted = false;
        let offset = rule.cfa_offset();
        let next = match rule.cfa() {
            cfa::END => return (found, End::Outermost),
            cfa::SP => sp.wrapping_add_signed(offset),
            cfa::FP => frame.wrapping_add_signed(offset),
            cfa::DEREF_SP => word(sp.wrapping_add_signed(offset)),
            cfa::DEREF_FP => word(frame.wrapping_add_signed(offset)),
            cfa::SIGNAL => {
                let registers = sp + 40;
                (frame, pc, sp) = (word(registers + 80), word(registers + 128), word(registers + 120));
                interrupted = true;
                continue;
            }
            _ => return (found, End::NotFollowed(pc, rule)),
        };
        frame = match rule.fp() {
            fp::SAME => frame,
            fp::AT_CFA => word(next.wrapping_add_signed(rule.fp_offset())),
            fp::AT_FP => word(frame.wrapping_add_signed(rule.fp_offset())),
            _ => 0,
        };
        pc = word(next - 8);
        sp = next;
    }
    panic!("a walk without end: {found:x?}");
}

/// The stack by `backtrace` and by the tables, each from the caller of this function outwards.
#[inline(never)]
fn both(map: &Map, ranges: &Ranges) -> (Vec<u64>, Vec<u64>, End) {
    let mut addresses = [ptr::null_mut(); 256];
    // SAFETY: the buffer has that many places.
    let count = unsafe { libc::backtrace(addresses.as_mut_ptr(), addresses.len() as i32) };
    let by_libc: Vec<u64> = addresses[..count as usize].iter().map(|a| a.addr() as u64).collect();
    let mut registers = Registers::default();
    caller(&mut registers);
    let (by_table, end) = walk(map, ranges, registers);
    // The innermost of each is in this function, at different calls of it.
    (by_libc[1..].to_vec(), by_table[1..].to_vec(), end)
}

#[inline(never)]
fn deeper(depth: usize, walk: &mut dyn FnMut()) {
    // What is on the stack differs from frame to frame.
    let fill = std::hint::black_box(vec![depth as u8; depth]);
    let sized = std::hint::black_box([depth; 37]);
    if depth == 0 {
        walk();
    } else {
        deeper(depth - 1, walk);
    }
    std::hint::black_box((fill, sized));
}

/// A walk through this program and the C library is the same as `backtrace`'s, and reaches the thread's first frame.
#[test]
fn own_stack() {
    let (mut tables, mut map) = (Tables::new(1 << 20), Map::new(1 << 20));
    let ranges = tables.refresh(me(), std::process::id(), map.sink()).expect("own mappings can be read");
    let mut seen = None;
    deeper(30, &mut || seen = Some(both(&map, &ranges)));
    let (by_libc, by_table, end) = seen.expect("it was walked");
    assert_eq!(by_table, by_libc);
    assert_eq!(end, End::Outermost);
    assert!(by_table.len() > 31);
}

/// What the handler below does, and what it found.
type InHandler = Box<dyn FnMut() + Send>;
static HANDLER: Mutex<Option<InHandler>> = Mutex::new(None);

extern "C" fn handle(_signal: i32) {
    if let Some(act) = HANDLER.lock().expect("not poisoned").as_mut() {
        act();
    }
}

/// A walk out of a signal's handler goes through its trampoline into the code that was interrupted, for which all rows are needed.
#[test]
fn through_a_signal() {
    let (mut tables, mut map) = (Tables::new(1 << 21), Map::new(1 << 21));
    let ranges = tables.refresh(me(), std::process::id(), map.sink()).expect("own mappings can be read");
    let signal = libc::SIGRTMIN() + 7;
    let ask = |map: Map, ranges: Ranges| {
        let (tell, told) = std::sync::mpsc::channel();
        let act: InHandler = Box::new(move || tell.send(both(&map, &ranges)).expect("somebody listens"));
        *HANDLER.lock().expect("not poisoned") = Some(act);
        // SAFETY: the handler takes a lock that nobody holds while the signal is raised: synchronously, here.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            assert_eq!(libc::sigaction(signal, &raw const action, ptr::null_mut()), 0);
            assert_eq!(libc::raise(signal), 0);
        }
        *HANDLER.lock().expect("not poisoned") = None;
        told.recv().expect("it was walked")
    };
    let (by_libc, by_table, end) = ask(Map(map.0.clone()), ranges);
    let End::NeedsFull(interrupted) = end else { panic!("{end:?}: {by_table:x?}") };
    assert_eq!(by_table, by_libc[..by_table.len()]);

    assert!(tables.need_full(me(), interrupted));
    assert!(!tables.need_full(me(), interrupted), "it is known by now");
    let built = tables.usage().built;
    let ranges = tables.refresh(me(), std::process::id(), map.sink()).expect("own mappings can be read");
    assert_eq!((tables.usage().built, ranges.stale.len()), (built + 1, 0));
    assert!(tables.usage().quarantined > 0, "the rows of before");
    assert_eq!(tables.reclaim(), 0, "a walk may be reading them");
    assert!(tables.reclaim() > 0);
    let (by_libc, by_table, end) = ask(Map(map.0.clone()), ranges);
    assert_eq!((by_table, end), (by_libc, End::Outermost));
}

/// A child that is killed and waited for when dropped.
struct Guard(Child);

impl Guard {
    fn sleeping() -> Self {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().expect("sleep starts");
        // It is forked, then executes: until it does, its files are ours.
        let exe = format!("/proc/{}/exe", child.id());
        while std::fs::read_link(&exe).ok() == std::env::current_exe().ok() {
            assert!(child.try_wait().expect("it can be asked").is_none(), "sleep has ended");
            std::thread::yield_now();
        }
        Self(child)
    }

    fn id(&self) -> ProcessId {
        ProcessId::current(self.0.id()).expect("it lives")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two processes of the same program share all rows; when both are gone these stay for a third.
#[test]
fn processes_share_files() {
    let (mut tables, mut map) = (Tables::new(1 << 18), Map::new(1 << 18));
    let children = [Guard::sleeping(), Guard::sleeping()];
    let ids = children.each_ref().map(Guard::id);
    // The loader maps the C library some time after the program has begun.
    let whole = loop {
        let ranges = tables.refresh(ids[0], ids[0].tgid, map.sink()).expect("its mappings can be read");
        if ranges.ranges.len() >= 4 {
            break ranges;
        }
        std::thread::yield_now();
    };
    let built = tables.usage().built;
    let extents = |ranges: &Ranges| {
        let mut extents: Vec<_> = ranges.ranges.iter().map(|r| (r.first, r.rows)).collect();
        extents.sort_unstable();
        extents
    };
    let shared = loop {
        let ranges = tables.refresh(ids[1], ids[1].tgid, map.sink()).expect("its mappings can be read");
        if ranges.ranges.len() == whole.ranges.len() {
            break ranges;
        }
        std::thread::yield_now();
    };
    assert_eq!(extents(&shared), extents(&whole));
    assert!(whole.missing.is_empty() && !whole.pending, "{whole:?}");
    let vdso = whole.ranges.last().expect("ranges");
    assert!(vdso.start > 0x7000_0000_0000 && whole.ranges.iter().all(|r| r.rows > 0), "{whole:?}");
    assert_eq!(tables.usage().built, built);
    let rows = tables.usage().rows;
    for id in ids {
        tables.forget(id);
    }
    let third = Guard::sleeping();
    while tables.refresh(third.id(), third.id().tgid, map.sink()).expect("its mappings can be read").ranges.len()
        < whole.ranges.len()
    {
        std::thread::yield_now();
    }
    assert_eq!((tables.usage().built, tables.usage().rows, tables.usage().quarantined), (built, rows, 0));
}

/// A process that has more files than there is memory for gets what fits, is told the rest, and nothing is built again for it.
#[test]
fn memory_is_bounded() {
    let (mut tables, mut map) = (Tables::new(300), Map::new(300));
    let child = Guard::sleeping();
    // Until its loader has mapped the C library.
    while !std::fs::read_to_string(format!("/proc/{}/maps", child.0.id())).expect("it lives").contains("libc.so.6") {
        std::thread::yield_now();
    }
    let first = tables.refresh(child.id(), child.id().tgid, map.sink()).expect("its mappings can be read");
    assert!(first.missing.iter().any(|(_, why)| why.contains("memory for unwind tables")), "{first:?}");
    let usage = tables.usage();
    assert!(usage.rows <= 300 && usage.pushed_out == 0, "{usage:?}");
    assert!(first.ranges.iter().any(|r| r.rows > 0) && first.ranges.iter().any(|r| r.rows == 0), "{first:?}");
    let second = tables.refresh(child.id(), child.id().tgid, map.sink()).expect("its mappings can be read");
    assert_eq!((second.ranges, tables.usage()), (first.ranges, usage));
}

/// An executable mapping of a file in this process.
struct Mapping {
    address: u64,
    len: usize,
}

impl Mapping {
    fn new(file: Option<&File>, len: usize, offset: u64) -> Self {
        let (fd, flags) = file.map_or((-1, libc::MAP_ANONYMOUS), |file| (file.as_raw_fd(), 0));
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: the kernel chooses where; nothing is replaced.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), len, protection, libc::MAP_PRIVATE | flags, fd, offset as libc::off_t)
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { address: at.addr() as u64, len }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let at = ptr::with_exposed_provenance_mut(self.address as usize);
        // SAFETY: it was mapped by `new`, and nothing refers to it.
        unsafe { libc::munmap(at, self.len) };
    }
}

/// A named file with these bytes.
fn file_of(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> File {
    let path = folder.path().join(name);
    File::create(&path).and_then(|mut file| file.write_all(bytes)).expect("room");
    File::open(path).expect("it is there")
}

/// Files that are gone, copies, Go, other machines, generated code, and code that is in no segment: each is walked as it has to be.
#[test]
fn every_kind_of_mapping() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut code = [0x90; 4096];
    code[30..35].copy_from_slice(b"\xe8\0\0\0\0");
    let frames = Frames::one(b"\x0e\x30");
    let bytes = Elf::new(&code, &frames.0).bytes();
    let map_code = |file: &File| Mapping::new(Some(file), 4096, CODE_OFFSET);
    let original = file_of(&folder, "original", &bytes);
    let copy = file_of(&folder, "copy", &bytes);
    let bare = file_of(&folder, "bare", &Elf { sections: Vec::new(), ..Elf::new(&code, b"") }.bytes());
    let go = Elf { sections: Vec::new(), note: Some(("Go", 4, b"id")), ..Elf::new(&code, b"") };
    let go = file_of(&folder, "go", &go.bytes());
    let text = file_of(&folder, "text", &[b'x'; 8192]);
    let mut other = bytes.clone();
    other[18] = 183;
    let other = file_of(&folder, "other", &other);
    let mapped =
        [map_code(&original), map_code(&copy), map_code(&bare), map_code(&go), map_code(&text), map_code(&other)];
    let no_code = Mapping::new(Some(&original), 4096, CODE_OFFSET + 0x10_0000);
    let anonymous = Mapping::new(None, 4096, 0);
    std::fs::remove_file(folder.path().join("original")).expect("it is there");

    let (mut tables, mut map) = (Tables::new(1 << 20), Map::new(1 << 20));
    let ranges = tables.refresh(me(), std::process::id(), map.sink()).expect("own mappings can be read");
    let [original, copy, bare, go, text, other] =
        mapped.each_ref().map(|m| *range_at(&ranges, m.address).expect("a range"));
    assert_eq!((original.rows, original.flags), (1, 0));
    assert_eq!((copy.first, copy.rows), (original.first, 1), "a copy has the same rows");
    for (range, mapping) in [(original, &mapped[0]), (copy, &mapped[1])] {
        // Memory is as far from the file's addresses as the bias says.
        assert_eq!(mapping.address - range.bias, CODE - super::elf::BASE);
        let rows = &map.0[range.first as usize..][..range.rows as usize];
        let rule = lookup_packed(rows, range.rules, (mapping.address + 34 - range.bias) as u32).expect("a row");
        assert_eq!((rule.cfa(), rule.cfa_offset()), (cfa::SP, 48));
    }
    assert_eq!((bare.rows, bare.flags), (0, 0));
    assert_eq!((go.rows, go.flags), (0, range_flag::FRAME_POINTERS));
    assert_eq!((text.rows, text.flags), (0, range_flag::FRAME_POINTERS));
    assert_eq!((other.rows, other.flags), (0, 0));
    let generated = range_at(&ranges, anonymous.address).expect("a range");
    assert_eq!((generated.rows, generated.flags), (0, range_flag::FRAME_POINTERS));
    assert_eq!(range_at(&ranges, no_code.address).map(|r| r.rows), Some(0));
    let why = |name: &str| {
        let found = ranges.missing.iter().find(|(path, _)| *path == folder.path().join(name));
        found.map(|(_, why)| why.as_str())
    };
    assert_eq!(why("bare"), Some("no unwind information"));
    assert_eq!(why("other"), Some("code for another kind of machine, or 32-bit code"));
    assert_eq!((why("go"), why("text"), why("copy")), (None, None, None));
    assert!(ranges.ranges.is_sorted_by(|a, b| a.end <= b.start));

    // Another file under the same name is another file.
    let changed = Frames::one(b"\x0e\x40");
    drop(mapped);
    let copy = file_of(&folder, "copy", &Elf::new(&code, &changed.0).bytes());
    let mapping = map_code(&copy);
    let ranges = tables.refresh(me(), std::process::id(), map.sink()).expect("own mappings can be read");
    let range = range_at(&ranges, mapping.address).expect("a range");
    assert_eq!(Rule(map.0[range.first as usize] as u32).cfa_offset(), 64);
}

/// Rows that cannot be written are not named, and no memory is lost.
#[test]
fn rows_that_cannot_be_written() {
    let mut tables = Tables::new(1 << 20);
    let fail = |_: u32, _: &[u64]| Err(io::Error::other("the map is gone"));
    let ranges = tables.refresh(me(), std::process::id(), fail).expect("own mappings can be read");
    assert!(ranges.ranges.iter().all(|r| r.rows == 0));
    assert!(ranges.missing.iter().any(|(_, why)| why == "its unwind table cannot be written: the map is gone"));
    assert_eq!(tables.usage().rows, 0);
    let mut map = Map::new(1 << 20);
    let ranges = tables.refresh(me(), std::process::id(), map.sink()).expect("own mappings can be read");
    assert!(ranges.ranges.iter().any(|r| r.rows > 0));
}

/// A process that is gone is an error, and leaves nothing.
#[test]
fn no_such_process() {
    let mut tables = Tables::new(100);
    let gone = ProcessId { tgid: 0x7fff_fff0, start_time: 1 };
    assert!(tables.refresh(gone, gone.tgid, |_: u32, _: &[u64]| Ok(())).is_err());
    tables.forget(gone);
    assert_eq!(tables.usage().rows, 0);
}

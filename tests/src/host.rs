//! What this host can do, and whether anything was left behind on it.
//!
//! A test that needs the kernel, or a program, asks here first. Where the answer is no it says so and returns, unless
//! `LEAKTRACE_REQUIRE_KERNEL=1` is set, as `cargo xtask test` does where everything is there: then a skip is a failure.

use std::env;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Set to 1 where every test must be able to run.
pub const REQUIRE_VARIABLE: &str = "LEAKTRACE_REQUIRE_KERNEL";

/// Names a file to which each skipped test adds a line.
pub const SKIP_LOG_VARIABLE: &str = "LEAKTRACE_SKIP_LOG";

/// `BPF_PROG_GET_NEXT_ID`: the commands of bpf(2) used here, from linux/bpf.h.
const BPF_PROG_GET_NEXT_ID: libc::c_int = 11;
const BPF_LINK_GET_NEXT_ID: libc::c_int = 31;

/// Why probes cannot be attached on this host, if they cannot.
pub fn kernel_tests_possible() -> Result<(), String> {
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err("not root".to_owned());
    }
    if let Err(error) = next_id(BPF_PROG_GET_NEXT_ID, 0) {
        return Err(format!("bpf(2) is not allowed: {error}"));
    }
    if !PathBuf::from("/sys/bus/event_source/devices/uprobe/type").exists() {
        return Err("the kernel has no uprobes".to_owned());
    }
    Ok(())
}

/// Whether `test` can attach probes. Where not, it has been reported as skipped and should return.
#[must_use]
pub fn can_trace(test: &str) -> bool {
    match kernel_tests_possible() {
        Ok(()) => true,
        Err(why) => skip(test, &why),
    }
}

/// The path of `program`, which `test` needs. Where there is none, the test has been reported as skipped and should return.
#[must_use]
pub fn program(test: &str, program: &str) -> Option<PathBuf> {
    let found = find(program);
    if found.is_none() {
        skip(test, &format!("{program} is not installed"));
    }
    found
}

/// The path of `program`, if it is installed.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // The system's own first: another in PATH may be a launcher script.
    let system = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    // Debian keeps postgres's programs in a folder for each version.
    let versions =
        fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
    // Go's helpers are with each Go, and only `go tool` knows where.
    let go = fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|folder| folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("go-")));
    let go = go.flat_map(|folder| ["amd64", "arm64"].map(|arch| folder.join(format!("pkg/tool/linux_{arch}"))));
    let folders = system.into_iter().chain(env::split_paths(&path)).chain(versions).chain(go);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The path of a library or archive of the system that programs are linked with, `libjemalloc.so`, if it is installed.
#[must_use]
pub fn find_library(name: &str) -> Option<PathBuf> {
    let triplets = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = ["/usr/lib64", "/usr/lib", "/lib64", "/usr/local/lib"].map(PathBuf::from);
    // Debian has a folder for each kind of machine; one for another libc is not meant.
    let own = triplets.filter(|folder| folder.to_string_lossy().ends_with("-linux-gnu"));
    own.chain(folders).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// The same for what `test` needs. Where it is not there, the test has been reported as skipped and should return.
#[must_use]
pub fn library(test: &str, name: &str) -> Option<PathBuf> {
    let found = find_library(name);
    if found.is_none() {
        skip(test, &format!("{name} is not installed"));
    }
    found
}

/// Reports `test` as skipped; always false, for use as an answer.
///
/// # Panics
/// Where no test may be skipped.
pub fn skip(test: &str, why: &str) -> bool {
    assert!(env::var(REQUIRE_VARIABLE).as_deref() != Ok("1"), "{test} cannot run here, but must: {why}");
    // Past the capture of println!, because a test that is skipped passes and its output would not be shown.
    let _ = writeln!(io::stderr(), "SKIPPED {test}: {why}");
    if let Some(log) = env::var_os(SKIP_LOG_VARIABLE) {
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .and_then(|mut file| file.write_all(format!("{test}: {why}\n").as_bytes()));
        if let Err(error) = written {
            let _ = writeln!(io::stderr(), "failed to write {}: {error}", log.display());
        }
    }
    false
}

/// Asks until `done` says yes or the time is up, for what has no event to wait for, such as the kernel letting go of a program.
pub fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Copies a dynamic program's libraries and its linker, by `ldd`, to the same paths below another root; gives the copies.
pub fn copy_libraries(program: &Path, root: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("failed to start ldd")?;
    let text = String::from_utf8(output.stdout)?;
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new);
    libraries
        .map(|library| {
            let copy = root.join(library.strip_prefix("/")?);
            fs::create_dir_all(copy.parent().context("no folder")?)?;
            fs::copy(library, &copy).with_context(|| format!("failed to copy {}", library.display()))?;
            Ok(copy)
        })
        .collect()
}

/// User and system time that a process has used.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    // The name may hold anything; behind it the state is the first field, and utime and stime are 12th and 13th.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // SAFETY: no memory is passed.
    let rate = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(Duration::from_secs_f64(ticks as f64 / rate as f64))
}

/// The most resident memory that a process has had, in bytes.
pub fn peak_rss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    let kilobytes: u64 = line.and_then(|number| number.parse().ok()).with_context(|| format!("no VmHWM in {path}"))?;
    Ok(kilobytes * 1024)
}

/// BPF programs and links by their ids, which are not handed out again until the 31-bit counter has wrapped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BpfObjects {
    pub programs: Vec<u32>,
    pub links: Vec<u32>,
}

impl BpfObjects {
    /// What `pid` holds open now.
    pub fn of_process(pid: u32) -> Result<Self> {
        let folder = format!("/proc/{pid}/fdinfo");
        let mut found = Self::default();
        for entry in fs::read_dir(&folder).with_context(|| format!("failed to read {folder}"))? {
            // A descriptor may be closed between the listing and the reading.
            let Ok(text) = entry.and_then(|entry| fs::read_to_string(entry.path())) else { continue };
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u32>().ok());
            // A link's own entry names its program too.
            found.links.extend(field("link_id:"));
            found.programs.extend(field("prog_id:"));
        }
        found.programs.sort_unstable();
        found.programs.dedup();
        Ok(found)
    }

    /// Those of them that the kernel still has.
    pub fn still_there(&self) -> Result<Self> {
        let exists = |command, id: u32| -> io::Result<bool> { Ok(next_id(command, id - 1)? == Some(id)) };
        let keep = |command, ids: &[u32]| -> io::Result<Vec<u32>> {
            let mut kept = Vec::new();
            for &id in ids {
                if exists(command, id)? {
                    kept.push(id);
                }
            }
            Ok(kept)
        };
        Ok(Self {
            programs: keep(BPF_PROG_GET_NEXT_ID, &self.programs).context("failed to list BPF programs")?,
            links: keep(BPF_LINK_GET_NEXT_ID, &self.links).context("failed to list BPF links")?,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.programs.is_empty() && self.links.is_empty()
    }
}

/// The smallest id above `id` that the kernel has handed out; `None` at the end.
fn next_id(command: libc::c_int, id: u32) -> io::Result<Option<u32>> {
    // The part of `union bpf_attr` for the *_GET_NEXT_ID commands: start_id, next_id, open_flags.
    let mut attr = [id, 0, 0];
    // SAFETY: the kernel reads and writes only the given number of bytes, which is the array's size; the array outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(&attr)) };
    if result == 0 {
        return Ok(Some(attr[1]));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) }
}

/// Where each thread of `pid` is in the kernel, for the message of a test that waited in vain: innermost function first, as far as
/// this kernel tells.
pub fn kernel_stacks(pid: u32) -> String {
    let mut text = String::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stack = read("stack");
        let functions = stack.lines().filter_map(|line| line.split_whitespace().nth(1)).collect::<Vec<_>>();
        let _ = writeln!(text, "{} {}: {}", task.file_name().display(), read("comm").trim(), functions.join(" < "));
    }
    text
}

/// How many bytes of `pid`'s code, its own and its libraries', differ from their files: each breakpoint that stands in it is one.
/// Where a process's first thread has ended, `pid` is the id of another thread of it.
pub fn breakpoints(pid: u32) -> Result<usize> {
    breakpoint_addresses(pid).map(|addresses| addresses.len())
}

/// Where in its memory those bytes are.
pub fn breakpoint_addresses(pid: u32) -> Result<Vec<u64>> {
    let maps = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&maps).with_context(|| format!("failed to read {maps}"))?;
    let memory = format!("/proc/{pid}/mem");
    let mut memory = File::open(&memory).with_context(|| format!("failed to open {memory}"))?;
    let mut differing = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(access), Some(offset)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let path = fields.nth(2).unwrap_or_default();
        if !access.contains('x') || !path.starts_with('/') {
            continue;
        }
        let (start, end) = range.split_once('-').with_context(|| format!("failed to read the range of {line:?}"))?;
        let hex = |text| u64::from_str_radix(text, 16).with_context(|| format!("failed to read {line:?}"));
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
        let length = usize::try_from(end - start)?;
        let mut in_memory = vec![0; length];
        memory.seek(SeekFrom::Start(start)).context("failed to seek in the process's memory")?;
        memory.read_exact(&mut in_memory).context("failed to read the process's memory")?;
        let mut in_file = Vec::with_capacity(length);
        let mut file = File::open(path).with_context(|| format!("failed to open {path}"))?;
        file.seek(SeekFrom::Start(offset)).with_context(|| format!("failed to seek in {path}"))?;
        file.take(end - start).read_to_end(&mut in_file).with_context(|| format!("failed to read {path}"))?;
        let bytes = in_memory.iter().zip(&in_file).zip(start..);
        differing.extend(bytes.filter(|((memory, file), _)| memory != file).map(|(_, address)| address));
    }
    Ok(differing)
}

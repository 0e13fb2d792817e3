//! What `/proc` and the cgroup hierarchy say of one process: who it is, how large it is, how large it may become, and when
//! it is gone. Which code is mapped into it is [`crate::discover`]'s business.
//!
//! Names (comm, exe, cgroup) are chosen by the traced process: they are carried as they are, and whoever prints them makes
//! them printable first.

use procfs::process::{MountInfo, MountInfos, Stat, StatFlags, Status};
use procfs::{Current, FromBufRead, FromRead, Meminfo, ProcessCGroup, ProcessCGroups};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{Interest, unix::AsyncFd};

/// A process for all time: the kernel hands out process ids again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The thread group, in the pid namespace of `/proc`.
    pub tgid: u32,
    /// When it started, in clock ticks since boot. execve keeps it.
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this id at the moment.
    pub fn current(tgid: u32) -> Result<Self, Error> {
        Ok(Self { tgid, start_time: read_stat(tgid)?.starttime })
    }
}

/// Why a process cannot be traced or looked at.
#[derive(Debug)]
pub enum Error {
    NoSuchProcess { pid: u32 },
    KernelThread { pid: u32, comm: String },
    Thread { pid: u32, process: u32 },
    Exited { pid: u32 },
    PermissionDenied { pid: u32, what: &'static str },
    Io { pid: u32, what: &'static str, source: io::Error },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoSuchProcess { pid } => write!(f, "no process with pid {pid}"),
            Self::KernelThread { pid, comm } => {
                let comm = comm.escape_default();
                write!(f, "pid {pid} ({comm}) is a kernel thread: it has no user memory to trace")
            }
            Self::Thread { pid, process } => {
                write!(f, "pid {pid} belongs to a thread of process {process}: pass -p {process}")
            }
            Self::Exited { pid } => write!(f, "process {pid} has exited"),
            Self::PermissionDenied { pid, what } => {
                write!(f, "no permission to read {what} of process {pid}: run as root, or as a user that may trace it")
            }
            Self::Io { pid, what, .. } => write!(f, "cannot read {what} of process {pid}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Error {
    /// The error of reading `what` of the process, told apart by what a person can do about it.
    pub(crate) fn reading(pid: u32, what: &'static str, source: io::Error) -> Self {
        match (source.kind(), source.raw_os_error()) {
            (io::ErrorKind::PermissionDenied, _) => Self::PermissionDenied { pid, what },
            // The process may end between any two of our steps.
            (io::ErrorKind::NotFound, _) | (_, Some(libc::ESRCH)) => Self::NoSuchProcess { pid },
            _ => Self::Io { pid, what, source },
        }
    }
}

/// Reads `/proc/PID/NAME`. Bytes that are no UTF-8 (a process can name itself anything) are replaced: procfs refuses them.
fn read_proc<T: FromBufRead>(pid: u32, name: &'static str) -> Result<T, Error> {
    let bytes = fs::read(format!("/proc/{pid}/{name}")).map_err(|e| Error::reading(pid, name, e))?;
    T::from_buf_read(String::from_utf8_lossy(&bytes).as_bytes()).map_err(|e| Error::Io {
        pid,
        what: name,
        source: io::Error::new(io::ErrorKind::InvalidData, e.to_string()),
    })
}

/// Works for the id of any thread, and then tells of that thread.
fn read_stat(pid: u32) -> Result<Stat, Error> {
    let bytes = fs::read(format!("/proc/{pid}/stat")).map_err(|e| Error::reading(pid, "stat", e))?;
    Stat::from_read(bytes.as_slice()).map_err(|e| Error::Io {
        pid,
        what: "stat",
        source: io::Error::new(io::ErrorKind::InvalidData, e.to_string()),
    })
}

/// A thread that still has the process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Thread {
    tid: u32,
    /// In clock ticks since boot: thread ids are handed out again.
    start_time: u64,
}

impl Thread {
    /// The thread of this process with this id, unless it has ended or has begun to: the kernel takes a thread's memory
    /// away (`exit_mm`) before it shows the thread as a zombie.
    fn living(tgid: u32, tid: u32) -> Option<Self> {
        let bytes = fs::read(format!("/proc/{tgid}/task/{tid}/stat")).ok()?;
        let stat = Stat::from_read(bytes.as_slice()).ok()?;
        let ends = StatFlags::from_bits_truncate(stat.flags).contains(StatFlags::PF_EXITING);
        (!ends && !matches!(stat.state, 'Z' | 'X')).then_some(Self { tid, start_time: stat.starttime })
    }

    /// The thread of the process that has lived longest and is likely to go on.
    fn oldest(tgid: u32) -> Option<Self> {
        let tids = threads(tgid).ok()?;
        tids.into_iter().filter_map(|tid| Self::living(tgid, tid)).min_by_key(|thread| (thread.start_time, thread.tid))
    }
}

fn threads(pid: u32) -> Result<Vec<u32>, Error> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| Error::reading(pid, "threads", e))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// A process that can be traced, held by a pidfd so that it is never mistaken for a later one with the same id.
///
/// Its first thread may have ended while others go on. What the kernel finds by the process's id (`/proc/PID`, uprobes for
/// a pid) is that first thread, which then has no memory any more; [`Self::through`] is the thread to name instead.
#[derive(Debug)]
pub struct Process {
    pub id: ProcessId,
    /// The name of its main thread when it was opened; untrusted.
    pub comm: String,
    /// The program, if it may be read; untrusted. Ends in ` (deleted)` if the file is gone.
    pub exe: Option<PathBuf>,
    /// Its control group: in the unified hierarchy unless only the memory controller's (version 1) is not the root; untrusted.
    pub cgroup: Option<String>,
    /// Effective user and group.
    pub uid: u32,
    pub gid: u32,
    pidfd: PidFd,
    /// Through whom its memory can be seen, if not through its first thread.
    stand_in: Option<Thread>,
}

impl Process {
    /// Opens the process with this id.
    ///
    /// # Errors
    /// Names the pid, and says so if there is no such process, if it is a kernel thread, a thread of another process, or has
    /// exited, with all its threads, and is only waiting for its parent.
    pub fn open(pid: u32) -> Result<Self, Error> {
        // Zero and numbers over i32 are no pids for pidfd_open, and /proc/0 does not exist.
        if i32::try_from(pid).is_err() {
            return Err(Error::NoSuchProcess { pid });
        }
        let status: Status = read_proc(pid, "status")?;
        if status.tgid != pid as i32 {
            return Err(Error::Thread { pid, process: status.tgid as u32 });
        }
        let stat = read_stat(pid)?;
        if StatFlags::from_bits_truncate(stat.flags).contains(StatFlags::PF_KTHREAD) {
            return Err(Error::KernelThread { pid, comm: stat.comm });
        }
        let stand_in = match Thread::living(pid, pid) {
            Some(_) => None,
            None => Some(Thread::oldest(pid).ok_or(Error::Exited { pid })?),
        };
        let through = stand_in.map_or(pid, |thread| thread.tid);
        let pidfd = PidFd::open(pid)?;
        let id = ProcessId { tgid: pid, start_time: stat.starttime };
        // Now that the pidfd is held: is this still the process that was looked at?
        if ProcessId::current(pid)? != id {
            return Err(Error::NoSuchProcess { pid });
        }
        Ok(Self {
            id,
            comm: stat.comm,
            exe: exe(through),
            cgroup: cgroups(through).ok().and_then(|groups| display_cgroup(&groups)),
            uid: status.euid,
            gid: status.egid,
            pidfd,
            stand_in,
        })
    }

    /// Reads anew what execve changes: comm, exe, the user, and who is the first thread: whichever called it.
    pub fn refresh(&mut self) -> Result<(), Error> {
        let pid = self.id.tgid;
        self.stand_in = None;
        let status: Status = read_proc(pid, "status")?;
        self.comm = read_stat(pid)?.comm;
        self.exe = exe(pid);
        (self.uid, self.gid) = (status.euid, status.egid);
        Ok(())
    }

    /// Whether it has not exited yet.
    pub fn is_alive(&self) -> bool {
        !self.pidfd.has_exited()
    }

    /// Its thread ids at the moment.
    pub fn threads(&self) -> Result<Vec<u32>, Error> {
        threads(self.id.tgid)
    }

    /// The id under which the kernel shows the process's memory (`/proc/ID/maps`): its own, or that of another thread if
    /// its first one has ended.
    pub fn through(&self) -> u32 {
        self.stand_in.map_or(self.id.tgid, |thread| thread.tid)
    }

    /// Whether its first thread has ended, as far as was noticed.
    pub fn leader_has_ended(&self) -> bool {
        self.stand_in.is_some()
    }

    /// Chooses another thread for [`Self::through`] if the one so far has ended; says whether it did. False too while the
    /// whole process is ending.
    pub fn follow_threads(&mut self) -> bool {
        let tgid = self.id.tgid;
        let before = match self.stand_in {
            Some(thread) => Thread::living(tgid, thread.tid).filter(|now| *now == thread),
            None => Thread::living(tgid, tgid),
        };
        if before.is_some() {
            return false;
        }
        let Some(next) = Thread::oldest(tgid) else { return false };
        // exec makes another thread the first one, and it has the process's id from then on.
        self.stand_in = (next.tid != tgid).then_some(next);
        true
    }

    /// For waiting until it exits.
    pub fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// Opens its resident set for sampling.
    pub fn rss(&self) -> Result<RssSampler, Error> {
        RssSampler::open(self.through())
    }

    /// How large it may become.
    pub fn memory_limit(&self) -> Option<MemoryLimit> {
        memory_limit(self.through())
    }
}

fn exe(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// A process's file descriptor; readable once the process has exited.
#[derive(Clone, Debug)]
pub struct PidFd {
    pid: u32,
    fd: Arc<OwnedFd>,
}

impl PidFd {
    /// # Errors
    /// `NoSuchProcess` also where `pid` is the id of a thread, not of a process.
    pub fn open(pid: u32) -> Result<Self, Error> {
        // SAFETY: pidfd_open takes two integers, touches no memory of ours, and gives a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINVAL | libc::ENOENT) => Err(Error::NoSuchProcess { pid }),
                _ => Err(Error::reading(pid, "pidfd", error)),
            };
        }
        // SAFETY: the system call has just made this descriptor for us, and nobody else knows its number.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self { pid, fd: Arc::new(fd) })
    }

    /// Whether the process has exited (it may still be waiting for its parent).
    pub fn has_exited(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which lives through the call; a timeout of zero returns at once.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 && poll.revents & libc::POLLIN != 0 }
    }

    /// Waits until the process has exited. To be called in a tokio runtime with I/O enabled; any number of tasks may wait.
    pub async fn exited(&self) -> io::Result<()> {
        // Each waiter has a duplicate: epoll takes a descriptor only once.
        let duplicate = self.fd.try_clone()?;
        // SAFETY: the descriptor is open, and the AsyncFd owns it: nothing else can close it while it is registered.
        let fd = unsafe { AsyncFd::register_with_interest(duplicate, Interest::READABLE) }.map_err(io::Error::from)?;
        fd.readable().await.map(|_| ())
    }

    /// The process id it was opened with.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The resident set at one moment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rss {
    /// All resident pages.
    pub total: u64,
    /// Those without a file or shared memory behind them: heap, stacks, anonymous mappings.
    pub anon: u64,
}

/// Bytes that this program has resident for itself, without the files that it has mapped.
pub fn own_memory() -> Option<u64> {
    RssSampler::open(std::process::id()).and_then(|sampler| sampler.sample()).ok().map(|rss| rss.anon)
}

/// Gives memory that was freed back to the system, as far as the allocator can.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers are passed.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Samples a process's resident set: one `pread` of `/proc/PID/statm`, kept open. It stays with its process even if the id is
/// handed out again.
#[derive(Debug)]
pub struct RssSampler {
    pid: u32,
    statm: File,
    page: u64,
}

impl RssSampler {
    pub fn open(pid: u32) -> Result<Self, Error> {
        let statm = File::open(format!("/proc/{pid}/statm")).map_err(|e| Error::reading(pid, "statm", e))?;
        Ok(Self { pid, statm, page: procfs::page_size() })
    }

    /// # Errors
    /// `NoSuchProcess` once it is gone, `Exited` while it waits for its parent.
    pub fn sample(&self) -> Result<Rss, Error> {
        let mut buffer = [0; 256];
        let len = self.statm.read_at(&mut buffer, 0).map_err(|e| Error::reading(self.pid, "statm", e))?;
        let text = std::str::from_utf8(&buffer[..len]).unwrap_or_default();
        let mut pages = text.split_ascii_whitespace().map_while(|n| n.parse::<u64>().ok());
        let (Some(size), Some(resident), Some(shared)) = (pages.next(), pages.next(), pages.next()) else {
            let source = io::Error::new(io::ErrorKind::InvalidData, "unexpected text");
            return Err(Error::Io { pid: self.pid, what: "statm", source });
        };
        if size == 0 {
            return Err(Error::Exited { pid: self.pid });
        }
        Ok(Rss { total: resident * self.page, anon: resident.saturating_sub(shared) * self.page })
    }
}

/// How large a process may become, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryLimit {
    /// A control group's limit, the tightest of the process's group and the groups above it (of a pod, of a slice). Its processes share
    /// it.
    Cgroup {
        bytes: u64,
        group: PathBuf,
        /// Where the group's files are.
        folder: PathBuf,
    },
    /// No tighter limit than the memory of the host.
    Host { bytes: u64 },
}

impl MemoryLimit {
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Cgroup { bytes, .. } | Self::Host { bytes } => *bytes,
        }
    }

    /// The group whose limit it is; none: it is the host's.
    pub fn group(&self) -> Option<&Path> {
        match self {
            Self::Cgroup { group, .. } => Some(group),
            Self::Host { .. } => None,
        }
    }

    /// How much of it is taken now, by all who share it, without the files' pages that the kernel drops before it kills anybody
    /// (<https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files>). What could be swapped out counts as taken.
    pub fn used(&self) -> Option<u64> {
        match self {
            Self::Cgroup { folder, .. } => used_by_group(folder),
            Self::Host { bytes } => Some(bytes.saturating_sub(Meminfo::current().ok()?.mem_available?)),
        }
    }
}

/// Version 2 has its numbers for a group with those below it; version 1 calls such numbers total.
fn used_by_group(folder: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let (charged, prefix) = match read("memory.current") {
        Some(text) => (text, ""),
        None => (read("memory.usage_in_bytes")?, "total_"),
    };
    let stat = read("memory.stat")?;
    let of = |name: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(prefix)?.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let charged = charged.trim().parse::<u64>().ok()?;
    Some(charged.saturating_sub(of("inactive_file")).saturating_sub(of("active_file")))
}

/// The limit of a process, or of this one's host if its control group cannot be read; none if nothing can be read.
pub fn memory_limit(pid: u32) -> Option<MemoryLimit> {
    let host = Meminfo::current().ok().map(|info| info.mem_total);
    let mounts: Vec<MountInfo> =
        read_proc::<MountInfos>(std::process::id(), "mountinfo").map(|m| m.0).unwrap_or_default();
    let groups = cgroups(pid).unwrap_or_default();
    match (tightest(&groups, &mounts).or_else(|| own_view(pid, &groups)), host) {
        (Some(limit), host) if host.is_none_or(|host| limit.bytes < host) => {
            Some(MemoryLimit::Cgroup { bytes: limit.bytes, group: limit.group, folder: limit.folder })
        }
        (_, host) => host.map(|bytes| MemoryLimit::Host { bytes }),
    }
}

fn cgroups(pid: u32) -> Result<Vec<ProcessCGroup>, Error> {
    read_proc::<ProcessCGroups>(pid, "cgroup").map(|groups| groups.0)
}

fn is_memory_v1(group: &ProcessCGroup) -> bool {
    group.controllers.iter().any(|c| c == "memory")
}

fn display_cgroup(groups: &[ProcessCGroup]) -> Option<String> {
    let unified = groups.iter().find(|g| g.hierarchy == 0);
    let memory = groups.iter().find(|g| is_memory_v1(g));
    unified.filter(|g| g.pathname != "/").or(memory).or(unified).map(|g| g.pathname.clone())
}

/// A group's limit.
#[derive(Debug, PartialEq, Eq)]
struct GroupLimit {
    bytes: u64,
    group: PathBuf,
    folder: PathBuf,
}

/// The limit as the process itself sees it. Where this program has a control group namespace of its own (a container that is not
/// privileged), paths of other groups begin with `..` and name no folder here; but containers have their own group mounted, with nothing
/// above it. Only that file system can answer: a process chooses what else it has mounted there.
fn own_view(pid: u32, groups: &[ProcessCGroup]) -> Option<GroupLimit> {
    let unified = groups.iter().find(|group| group.hierarchy == 0 && group.pathname.starts_with("/.."))?;
    let folder = PathBuf::from(format!("/proc/{pid}/root/sys/fs/cgroup"));
    let file = File::open(folder.join("memory.max")).ok()?;
    let is_cgroup = nix::sys::statfs::fstatfs(&file).ok()?.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC;
    is_cgroup
        .then(|| tightest_up(&folder, Path::new(""), "memory.max"))
        .flatten()
        .map(|limit| GroupLimit { group: PathBuf::from(&unified.pathname), ..limit })
}

/// The tightest limit of the groups and those above them, as seen through the mounts.
fn tightest(groups: &[ProcessCGroup], mounts: &[MountInfo]) -> Option<GroupLimit> {
    let limits = groups.iter().filter_map(|group| {
        let (file, mount) = if group.hierarchy == 0 {
            ("memory.max", mounts.iter().find(|m| m.fs_type == "cgroup2")?)
        } else if is_memory_v1(group) {
            let has_memory = |m: &&MountInfo| m.fs_type == "cgroup" && m.super_options.contains_key("memory");
            ("memory.limit_in_bytes", mounts.iter().find(has_memory)?)
        } else {
            return None;
        };
        // Inside a container the mount may show only a part of the hierarchy.
        let path = group.pathname.strip_prefix(mount.root.trim_end_matches('/')).unwrap_or(&group.pathname);
        tightest_up(&mount.mount_point, Path::new(path.trim_start_matches('/')), file)
    });
    limits.min_by_key(|limit| limit.bytes)
}

/// The lowest number in `file` of `mount/group` and the folders above it, up to `mount`.
fn tightest_up(mount: &Path, group: &Path, file: &str) -> Option<GroupLimit> {
    // `..` stands in the paths of processes outside this process's cgroup namespace.
    if group.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
        return None;
    }
    let limits = group.ancestors().filter_map(|group| {
        // "max" is no number, and version 1 writes the largest multiple of a page for "none".
        let folder = mount.join(group);
        let bytes = fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok()?;
        (bytes < i64::MAX as u64 / 2).then(|| GroupLimit { bytes, group: Path::new("/").join(group), folder })
    });
    limits.min_by_key(|limit| limit.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    /// A child that is killed and waited for when dropped.
    struct Guard(Child);

    impl Guard {
        fn sleeping() -> Self {
            Self(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().expect("sleep starts"))
        }
    }

    impl Drop for Guard {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// This very process is found with its name, program, user and all its threads.
    #[test]
    fn this_process() {
        let process = Process::open(std::process::id()).expect("this process can be opened");
        assert!(process.is_alive());
        assert_eq!(process.id, ProcessId::current(std::process::id()).expect("it has a start time"));
        assert_eq!(process.exe, std::env::current_exe().ok());
        assert_eq!(process.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(process.gid, nix::unistd::getegid().as_raw());
        let tid = nix::unistd::gettid().as_raw() as u32;
        assert!(process.threads().expect("threads can be listed").contains(&tid));
        assert!(process.cgroup.is_some_and(|path| path.starts_with('/')));
    }

    /// A pid that nobody has, zero, and one too large for the kernel are named in the error.
    #[test]
    fn no_such_process() {
        let mut child = Guard::sleeping();
        let pid = child.0.id();
        child.0.kill().and_then(|()| child.0.wait()).expect("the child can be killed");
        for pid in [pid, 0, u32::MAX] {
            let error = Process::open(pid).expect_err("nobody has this pid");
            assert_eq!(error.to_string(), format!("no process with pid {pid}"));
        }
    }

    /// A kernel thread is refused by name. In a pid namespace without any there is nothing to test.
    #[test]
    fn kernel_thread() {
        let Ok(comm) = fs::read_to_string("/proc/2/comm") else { return };
        if comm.trim() == "kthreadd" {
            let error = Process::open(2).expect_err("kthreadd is a kernel thread");
            assert_eq!(error.to_string(), "pid 2 (kthreadd) is a kernel thread: it has no user memory to trace");
        }
    }

    /// The id of a thread that leads no process names the process to pass.
    #[test]
    fn thread_of_a_process() {
        let tid = std::thread::spawn(|| {
            let tid = nix::unistd::gettid().as_raw() as u32;
            (tid, Process::open(tid).map(|p| p.id))
        });
        let (tid, opened) = tid.join().expect("the thread ends");
        let error = opened.expect_err("a thread's id is refused");
        let me = std::process::id();
        assert_eq!(error.to_string(), format!("pid {tid} belongs to a thread of process {me}: pass -p {me}"));
    }

    /// A process that exited but was not waited for is told from one that never was.
    #[test]
    fn zombie() {
        let mut child = Guard::sleeping();
        let process = Process::open(child.0.id()).expect("the child can be opened");
        let rss = process.rss().expect("statm can be opened");
        child.0.kill().expect("the child can be killed");
        while process.is_alive() {
            std::thread::yield_now();
        }
        assert!(matches!(Process::open(child.0.id()), Err(Error::Exited { .. })));
        assert!(matches!(rss.sample(), Err(Error::Exited { .. })));
        child.0.wait().expect("the child can be waited for");
        assert!(matches!(rss.sample(), Err(Error::NoSuchProcess { .. })));
        assert!(!process.is_alive());
    }

    /// Waiting ends when the process exits and not before, for each of several waiters.
    #[tokio::test]
    async fn waits_for_exit() {
        let mut child = Guard::sleeping();
        let pidfd = PidFd::open(child.0.id()).expect("the child has a pidfd");
        let early = tokio::time::timeout(Duration::from_millis(50), pidfd.exited()).await;
        assert!(early.is_err(), "the child still sleeps");
        let waiters = async { tokio::try_join!(pidfd.exited(), pidfd.exited()) };
        child.0.kill().expect("the child can be killed");
        let both = tokio::time::timeout(Duration::from_secs(30), waiters).await;
        both.expect("both waiters are woken").expect("pidfds can be waited for");
        assert!(pidfd.has_exited());
    }

    /// Touching 64 MiB shows as about that much more resident and anonymous memory.
    #[test]
    fn resident_set_grows() {
        let sampler = RssSampler::open(std::process::id()).expect("statm can be opened");
        let before = sampler.sample().expect("statm can be read");
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = sampler.sample().expect("statm can be read");
        drop(block);
        // Other tests of this process allocate and free at the same time.
        assert!(after.total > before.total + (48 << 20), "{before:?} {after:?}");
        assert!(after.anon > before.anon + (48 << 20), "{before:?} {after:?}");
        assert!(after.anon <= after.total);
    }

    /// The tightest limit counts wherever in the hierarchy it stands; "max", version 1's "none" and missing files do not.
    #[test]
    fn tightest_limit_up_the_hierarchy() {
        let root = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir_all(root.path().join("a/b/c")).expect("folders");
        let write = |name: &str, text: &str| fs::write(root.path().join(name), text).expect("a file");
        write("memory.max", "9223372036854771712\n");
        write("a/memory.max", "1048576\n");
        write("a/b/memory.max", "2097152\n");
        write("a/b/c/memory.max", "max\n");
        let limit = |group: &str| {
            tightest_up(root.path(), Path::new(group), "memory.max").map(|limit| (limit.bytes, limit.group))
        };
        assert_eq!(limit("a/b/c"), Some((1_048_576, PathBuf::from("/a"))));
        assert_eq!(limit(""), None);
        assert_eq!(limit("../.."), None);

        let mount = |kind: &str, options: &str| {
            let line = format!("30 20 0:27 / {} rw - {kind} none {options}", root.path().display());
            MountInfo::from_line(&line).expect("a line of mountinfo")
        };
        let groups = |text: &str| ProcessCGroups::from_buf_read(text.as_bytes()).expect("a cgroup file").0;
        let v2 = tightest(&groups("0::/a/b"), &[mount("cgroup2", "rw")]);
        let expected = |bytes, group: &str| {
            let folder = root.path().join(group.trim_start_matches('/'));
            Some(GroupLimit { bytes, group: PathBuf::from(group), folder })
        };
        assert_eq!(v2, expected(1_048_576, "/a"));
        write("a/b/memory.limit_in_bytes", "4096\n");
        let hybrid = [mount("cgroup2", "rw"), mount("cgroup", "rw,memory")];
        let v1 = tightest(&groups("4:memory:/a/b\n1:cpu:/a\n0::/"), &hybrid);
        assert_eq!(v1, expected(4096, "/a/b"));
        assert_eq!(display_cgroup(&groups("4:memory:/a/b\n0::/")).as_deref(), Some("/a/b"));
        assert_eq!(display_cgroup(&groups("4:memory:/a/b\n0::/c")).as_deref(), Some("/c"));
    }

    /// What a group has taken is what is charged to it less its files' pages, in both versions; without the charge nothing is known.
    #[test]
    fn used_by_a_group() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("a file");
        write(
            "memory.stat",
            "anon 5\ninactive_file 30\nactive_file 20\ntotal_inactive_file 300\ntotal_active_file 200\n",
        );
        assert_eq!(used_by_group(folder.path()), None);
        write("memory.usage_in_bytes", "1500\n");
        assert_eq!(used_by_group(folder.path()), Some(1000));
        write("memory.current", "150\n");
        assert_eq!(used_by_group(folder.path()), Some(100));
        write("memory.current", "40\n");
        assert_eq!(used_by_group(folder.path()), Some(0));
    }

    /// The host's memory is taken in part, and not all of it.
    #[test]
    fn used_of_the_host() {
        let bytes = Meminfo::current().expect("meminfo can be read").mem_total;
        let used = MemoryLimit::Host { bytes }.used().expect("what is available is known");
        assert!(used > 0 && used < bytes, "{used}");
    }

    /// This process has some limit, never more than the host's memory.
    #[test]
    fn this_process_has_a_limit() {
        let limit = memory_limit(std::process::id()).expect("a limit");
        let host = Meminfo::current().expect("meminfo can be read").mem_total;
        assert!(limit.bytes() > 0 && limit.bytes() <= host, "{limit:?}");
    }
}

//! Starts a program so that it is traced from its first allocation.
//!
//! The probes of a file can be placed only once the file is known, and the dynamic linker runs constructors right after
//! mapping it. So the child is started under ptrace and stopped at its exec and after each executable mapping until it
//! reaches its entry point; at each stop the caller puts probes into what is new. From the entry point on it runs free,
//! and later mappings (dlopen) are noticed like those of any process.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long a command that outlives the trace has from SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// A program that leaktrace started. Dropped while it runs, it is ended.
#[derive(Debug)]
pub struct Spawned {
    child: Child,
    /// Known as soon as somebody waited for it; a second wait would fail.
    status: Option<ExitStatus>,
    /// Whether it was leaktrace that ended it.
    ended_by_us: bool,
}

impl Spawned {
    /// Starts `command` and runs it to its entry point. `mapped` is called with the process stopped, after exec and after
    /// each executable mapping.
    pub fn start(command: &[OsString], mut mapped: impl FnMut(u32) -> Result<()>) -> Result<Self> {
        let (program, arguments) = command.split_first().ok_or_else(|| anyhow!("no command given"))?;
        let mut builder = Command::new(program);
        builder.args(arguments);
        // SAFETY: between fork and exec only ptrace(2) is called, which is async-signal-safe.
        unsafe { builder.pre_exec(|| ptrace::traceme().map_err(std::io::Error::from)) };
        let child = builder.spawn().with_context(|| format!("failed to start {}", program.display()))?;
        let mut spawned = Self { child, status: None, ended_by_us: false };
        if let Err(error) = spawned.run_to_entry(&mut mapped) {
            // It is stopped and would not hear of a polite signal.
            let _ = kill(spawned.pid(), Signal::SIGKILL);
            return Err(error.context(format!("failed to bring {} to its entry point", program.display())));
        }
        Ok(spawned)
    }

    /// How it ended, as far as that is known without waiting.
    pub fn status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, once its pidfd says that it did.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let status = self.child.wait().context("failed to wait for the command")?;
        self.status = Some(status);
        Ok(status)
    }

    /// Whether leaktrace ended it because the trace was over.
    pub fn ended_by_us(&self) -> bool {
        self.ended_by_us
    }

    /// Ends it if it still runs: politely, then not.
    pub fn end(&mut self) -> Result<ExitStatus> {
        if self.status.is_none()
            && let Some(status) = self.child.try_wait().context("failed to wait for the command")?
        {
            self.status = Some(status);
        }
        if self.status.is_none() {
            self.ended_by_us = true;
            let deadline = Instant::now() + GRACE;
            // It may end by itself at any time.
            let _ = kill(self.pid(), Signal::SIGTERM);
            while Instant::now() < deadline {
                if let Some(status) = self.child.try_wait().context("failed to wait for the command")? {
                    self.status = Some(status);
                    return Ok(status);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = kill(self.pid(), Signal::SIGKILL);
        }
        self.wait()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Drives the stopped child from its exec to its entry point, and lets it go there.
    fn run_to_entry(&mut self, mapped: &mut impl FnMut(u32) -> Result<()>) -> Result<()> {
        let pid = self.pid();
        let tgid = self.child.id();
        let Some(mut signal) = self.next_stop()? else { return Ok(()) };
        if signal != Stop::Trap {
            bail!("stopped by {signal:?} instead of its exec");
        }
        ptrace::setoptions(pid, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL)?;
        mapped(tgid)?;
        let entry = auxiliary_value(tgid, libc::AT_ENTRY)?;
        // Without an interpreter everything is mapped by now.
        if auxiliary_value(tgid, libc::AT_BASE).unwrap_or(0) == 0 {
            return Ok(ptrace::detach(pid, None)?);
        }
        let breakpoint = Breakpoint::set(pid, entry)?;
        let mut at_exit = false;
        let mut deliver = None;
        loop {
            ptrace::syscall(pid, deliver.take())?;
            signal = match self.next_stop()? {
                Some(stop) => stop,
                None => return Ok(()),
            };
            match signal {
                Stop::SystemCall => {
                    if at_exit && is_executable_mapping(pid)? {
                        mapped(tgid)?;
                    }
                    at_exit = !at_exit;
                }
                Stop::Trap if breakpoint.is_hit(pid)? => {
                    breakpoint.remove(pid)?;
                    mapped(tgid)?;
                    return Ok(ptrace::detach(pid, None)?);
                }
                Stop::Trap => deliver = Some(Signal::SIGTRAP),
                Stop::Signal(signal) => deliver = Some(signal),
            }
        }
    }

    /// Waits until the child stops; `None` once it has ended.
    fn next_stop(&mut self) -> Result<Option<Stop>> {
        loop {
            match waitpid(self.pid(), Some(WaitPidFlag::__WALL))? {
                WaitStatus::Exited(_, code) => {
                    self.status = Some(ExitStatus::from_raw(code << 8));
                    return Ok(None);
                }
                WaitStatus::Signaled(_, signal, core) => {
                    self.status = Some(ExitStatus::from_raw(signal as i32 | if core { 0x80 } else { 0 }));
                    return Ok(None);
                }
                WaitStatus::PtraceSyscall(_) => return Ok(Some(Stop::SystemCall)),
                WaitStatus::Stopped(_, Signal::SIGTRAP) => return Ok(Some(Stop::Trap)),
                WaitStatus::Stopped(_, signal) => return Ok(Some(Stop::Signal(signal))),
                _ => {}
            }
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Nobody is left to tell.
            let _ = self.end();
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    SystemCall,
    Trap,
    Signal(Signal),
}

/// A software breakpoint at the entry point, removed before the program goes on.
struct Breakpoint {
    address: u64,
    original: i64,
}

impl Breakpoint {
    fn set(pid: Pid, address: u64) -> Result<Self> {
        let original = ptrace::read(pid, address as ptrace::AddressType).context("failed to read the entry point")?;
        let patched = (original & !arch::TRAP_MASK) | arch::TRAP;
        ptrace::write(pid, address as ptrace::AddressType, patched)
            .context("failed to put a breakpoint at the entry point")?;
        Ok(Self { address, original })
    }

    fn is_hit(&self, pid: Pid) -> Result<bool> {
        Ok(arch::pc(pid)? == self.address + arch::PC_AFTER_TRAP)
    }

    fn remove(&self, pid: Pid) -> Result<()> {
        ptrace::write(pid, self.address as ptrace::AddressType, self.original)?;
        arch::set_pc(pid, self.address)
    }
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use super::{Pid, Result, ptrace};

    /// int3
    pub const TRAP: i64 = 0xcc;
    pub const TRAP_MASK: i64 = 0xff;
    pub const PC_AFTER_TRAP: u64 = 1;

    pub fn pc(pid: Pid) -> Result<u64> {
        Ok(ptrace::getregs(pid)?.rip)
    }

    pub fn set_pc(pid: Pid, pc: u64) -> Result<()> {
        let mut regs = ptrace::getregs(pid)?;
        regs.rip = pc;
        Ok(ptrace::setregs(pid, regs)?)
    }

    /// Number and third argument of the system call that just returned.
    pub fn system_call(pid: Pid) -> Result<(i64, u64)> {
        let regs = ptrace::getregs(pid)?;
        Ok((regs.orig_rax.cast_signed(), regs.rdx))
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use super::{Pid, Result, ptrace};

    /// brk #0, in the lower half of the word; the pc stays at it.
    pub const TRAP: i64 = 0xd420_0000;
    pub const TRAP_MASK: i64 = 0xffff_ffff;
    pub const PC_AFTER_TRAP: u64 = 0;

    pub fn pc(pid: Pid) -> Result<u64> {
        Ok(ptrace::getregs(pid)?.pc)
    }

    pub fn set_pc(pid: Pid, pc: u64) -> Result<()> {
        let mut regs = ptrace::getregs(pid)?;
        regs.pc = pc;
        Ok(ptrace::setregs(pid, regs)?)
    }

    /// Number and third argument of the system call that just returned; only x0 has changed by then.
    pub fn system_call(pid: Pid) -> Result<(i64, u64)> {
        let regs = ptrace::getregs(pid)?;
        Ok((regs.regs[8].cast_signed(), regs.regs[2]))
    }
}

fn is_executable_mapping(pid: Pid) -> Result<bool> {
    let (number, prot) = arch::system_call(pid)?;
    Ok(matches!(number, libc::SYS_mmap | libc::SYS_mprotect) && prot & libc::PROT_EXEC as u64 != 0)
}

/// A value of the auxiliary vector.
fn auxiliary_value(tgid: u32, key: u64) -> Result<u64> {
    let path = format!("/proc/{tgid}/auxv");
    let bytes = fs::read(&path).with_context(|| format!("failed to read {path}"))?;
    let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let pair = words.as_chunks::<2>().0.iter().find(|pair| pair[0] == key);
    pair.map(|pair| pair[1]).ok_or_else(|| anyhow!("{path} has no entry {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped_names(tgid: u32) -> String {
        fs::read_to_string(format!("/proc/{tgid}/maps")).expect("maps of a stopped child")
    }

    /// The caller sees libc mapped while the program has not run yet, and the program then runs to its own end.
    #[test]
    fn stops_with_libc_mapped_before_main() {
        let mut seen = Vec::new();
        let command = ["sh", "-c", "exit 7"].map(OsString::from);
        let mut child = Spawned::start(&command, |tgid| {
            seen.push(mapped_names(tgid).contains("libc.so"));
            Ok(())
        })
        .expect("sh starts");
        assert_eq!(seen.first(), Some(&false), "at exec only the program and its linker are mapped");
        assert_eq!(seen.last(), Some(&true));
        assert_eq!(child.wait().expect("it ends").code(), Some(7));
        assert!(!child.ended_by_us());
    }

    /// A command that does not exist is an error that names it.
    #[test]
    fn names_a_missing_command() {
        let error = Spawned::start(&[OsString::from("/no/such/program")], |_| Ok(())).expect_err("it cannot start");
        assert!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    }

    /// A command that outlives the trace is ended.
    #[test]
    fn ends_what_it_started() {
        let mut child = Spawned::start(&["sleep", "1000"].map(OsString::from), |_| Ok(())).expect("sleep starts");
        assert_eq!(child.end().expect("it ends").signal(), Some(libc::SIGTERM));
        assert!(child.ended_by_us());
    }

    /// When the caller fails, the child does not stay behind.
    #[test]
    fn failure_leaves_no_child() {
        let mut pid = 0;
        let result = Spawned::start(&["sleep", "1000"].map(OsString::from), |tgid| {
            pid = tgid;
            bail!("no probes")
        });
        assert!(result.is_err());
        assert!(!fs::exists(format!("/proc/{pid}")).expect("proc is there"));
    }
}

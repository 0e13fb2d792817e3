//! What a hit of a breakpoint costs on this host: measured on a child of our own, with empty programs at three functions that do
//! nothing. The traced processes are not touched by it.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use leak_common::op;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use super::{Floor, Places, Point};

/// Nanoseconds that the hits of breakpoints take, each with an empty program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrapCosts {
    /// At an entry, where the kernel emulates the instruction.
    pub entry: f64,
    /// At an entry, where it single-steps it.
    pub stepped: f64,
    /// At a return, beyond the entry.
    pub ret: f64,
}

/// Each measurement is the median of so many times, of so many calls each: a third of a millisecond where calls are cheap, five
/// where they are not.
const TIMES: usize = 25;
const CALLS: u32 = 16;

// Each begins with an instruction that `discover::breakpoint` says is emulated, or single-stepped.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".globl leaktrace_trap_entry, leaktrace_trap_return, leaktrace_trap_stepped",
    ".p2align 4",
    "leaktrace_trap_entry: push rbp",
    "pop rbp",
    "ret",
    ".p2align 4",
    "leaktrace_trap_return: push rbp",
    "pop rbp",
    "ret",
    ".p2align 4",
    "leaktrace_trap_stepped: test rdi, rdi",
    "ret",
);
#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".globl leaktrace_trap_entry, leaktrace_trap_return, leaktrace_trap_stepped",
    ".p2align 4",
    "leaktrace_trap_entry: b 1f",
    "1: ret",
    ".p2align 4",
    "leaktrace_trap_return: b 1f",
    "1: ret",
    ".p2align 4",
    "leaktrace_trap_stepped: add x0, x0, 0",
    "ret",
);

// SAFETY: the functions above, which take nothing and do nothing.
unsafe extern "C" {
    safe fn leaktrace_trap_entry();
    safe fn leaktrace_trap_return();
    safe fn leaktrace_trap_stepped();
}

const FUNCTIONS: [extern "C" fn(); 3] = [leaktrace_trap_entry, leaktrace_trap_return, leaktrace_trap_stepped];

impl TrapCosts {
    /// Measures: some ten milliseconds for the links, and a few for the calls.
    pub fn measure() -> Result<Self> {
        let floor = Floor::load()?;
        let points = [op::FREE, op::MALLOC, op::FREE];
        let points = FUNCTIONS.iter().zip(points).enumerate().map(|(index, (function, shape))| {
            Ok(Point { shape, offset: offset_in_file(*function as usize as u64)?, stepped: index == 2 })
        });
        let places = Places { file: PathBuf::from("/proc/self/exe"), points: points.collect::<Result<_>>()? };
        let mut child = Child::start()?;
        let probes = floor.attach(child.pid.as_raw() as u32, &places, true)?;
        let measured = child.measure();
        // Its memory goes first, and with it the breakpoints.
        drop(child);
        super::detach([probes]);
        let [entry, both, stepped] = measured?;
        Ok(Self { entry, stepped: stepped.max(entry), ret: (both - entry).max(0.0) })
    }
}

/// Where in this program's file the code at an address is.
fn offset_in_file(address: u64) -> Result<u64> {
    let text = std::fs::read("/proc/self/maps").context("failed to read the mappings of this process")?;
    crate::discover::maps::parse(&text)
        .find(|mapping| (mapping.start..mapping.end).contains(&address))
        .map(|mapping| address - mapping.start + mapping.offset)
        .context("this program's code is mapped nowhere")
}

/// A copy of this process that waits for its end, or for a word to measure; killed when dropped.
struct Child {
    pid: Pid,
    ask: std::fs::File,
    answer: std::fs::File,
}

impl Child {
    fn start() -> Result<Self> {
        let (asked, ask) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("failed to make a pipe")?;
        let (answer, answered) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("failed to make a pipe")?;
        // SAFETY: the child makes system calls and calls the functions above, all of which are safe after fork in a program of
        // several threads, and does not return.
        match unsafe { fork() }.context("failed to start a process to measure with")? {
            ForkResult::Parent { child } => Ok(Self { pid: child, ask: ask.into(), answer: answer.into() }),
            ForkResult::Child => {
                // SAFETY: nobody else uses this process's copy. Otherwise the end of the tracer would not end it.
                unsafe { libc::close(ask.as_raw_fd()) };
                serve(&asked, &answered)
            }
        }
    }

    fn measure(&mut self) -> Result<[f64; 3]> {
        self.ask.write_all(&[1]).context("failed to ask for a measurement")?;
        let mut bytes = [0_u8; 24];
        self.answer.read_exact(&mut bytes).context("the process to measure with has ended")?;
        let mut costs = [0.0; 3];
        for (cost, bytes) in costs.iter_mut().zip(bytes.chunks_exact(8)) {
            *cost = u64::from_ne_bytes(bytes.try_into()?) as f64 / f64::from(CALLS);
        }
        if costs.contains(&0.0) {
            bail!("a breakpoint took no time: {costs:?}");
        }
        Ok(costs)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// What the child does: it waits for a byte, and answers with three times. Nothing that allocates.
fn serve(asked: &OwnedFd, answered: &OwnedFd) -> ! {
    let mut byte = 0_u8;
    // SAFETY: an open descriptor, and room for a byte.
    let got = unsafe { libc::read(asked.as_raw_fd(), (&raw mut byte).cast(), 1) };
    if got == 1 {
        let times = FUNCTIONS.map(median);
        // SAFETY: an open descriptor, and so many initialised bytes.
        unsafe { libc::write(answered.as_raw_fd(), times.as_ptr().cast(), size_of_val(&times)) };
    }
    // SAFETY: ends the process, without running what the tracer left to be done at its exit.
    unsafe { libc::_exit(0) }
}

/// Nanoseconds of [`CALLS`] calls. The median, so that a time in which another process had the processor does not count.
fn median(function: extern "C" fn()) -> u64 {
    let mut times = [0_u64; TIMES];
    // The first call finds nothing in the caches.
    function();
    for time in &mut times {
        let start = now();
        for _ in 0..CALLS {
            function();
        }
        *time = now().wrapping_sub(start);
    }
    times.sort_unstable();
    times[TIMES / 2]
}

/// Nanoseconds, from the kernel's page of clocks: no call into the kernel.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three functions are in this program's file, and begin as [`crate::discover::breakpoint`] would have it.
    #[test]
    fn functions_are_found() {
        let exe = std::fs::read("/proc/self/exe").expect("this program can be read");
        let offsets =
            FUNCTIONS.map(|function| offset_in_file(function as usize as u64).expect("it is mapped") as usize);
        assert_eq!(exe[offsets[0]..][..4], exe[offsets[1]..][..4]);
        assert_ne!(exe[offsets[0]..][..4], exe[offsets[2]..][..4]);
        let kernel = crate::discover::breakpoint::Emulation::of_this_kernel();
        let emulated = offsets
            .map(|at| crate::discover::breakpoint::place(&exe[at..at + 8], Some(3), kernel).reason.is_emulated());
        #[cfg(target_arch = "x86_64")]
        assert_eq!(emulated, [true, true, false]);
        #[cfg(not(target_arch = "x86_64"))]
        let _ = emulated;
    }

    /// With real breakpoints each takes time, and a return more than none.
    #[test]
    fn breakpoints_cost_time() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let costs = TrapCosts::measure().expect("it can be measured");
        println!("{costs:?}");
        assert!(costs.entry > 50.0 && costs.stepped >= costs.entry && costs.ret > 0.0, "{costs:?}");
    }
}

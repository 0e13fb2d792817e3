//! Closes links, and with them removes their breakpoints, where a kill cannot spoil it.
//!
//! The kernel removes the breakpoints of a link while the last descriptor of it is closed, one by one, and reaches into the
//! traced process's memory for each. It gives up on each where the closing task is about to be killed (`fatal_signal_pending` in
//! `__get_user_pages`; `uprobe_unregister_nosync` then logs "failed to unregister, leaking uprobe", v6.18): the breakpoint
//! stays in the process for good, and each call costs it a trap that nobody wants, until somebody else's probe at the same
//! place is removed. An exit has no signal pending, so a tracer that is killed while it traces leaves nothing. One that is
//! killed while it removes its probes, or that ends by itself while another of its threads does, would.
//!
//! So the last descriptors are closed by child processes, which do nothing else and which no signal to the tracer reaches.

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setsid};

/// So many closers at most.
const CLOSERS: usize = 32;

/// Closes links and returns when their breakpoints are gone. Each waits for a grace period of its own (45 ms measured of a link,
/// 108 ms of a perf event, whatever else is going on), so several are closed side by side.
pub(super) fn close_all(links: Vec<OwnedFd>) {
    if links.is_empty() {
        return;
    }
    let parts: Vec<&[OwnedFd]> = links.chunks(links.len().div_ceil(CLOSERS)).collect();
    let barrier = Barrier::new();
    let closers: Vec<Pid> = parts.iter().filter_map(|part| start_closer(&links, part, barrier.as_ref())).collect();
    // Where a child could not be made, it is this that removes the breakpoints.
    drop(links);
    drop(barrier);
    for closer in closers {
        // It can have been collected by nobody else.
        if let Err(error) = waitpid(closer, None) {
            log::debug!("the process that removes probes cannot be waited for: {error}");
        }
    }
}

/// A pipe whose end is reached once every process has closed its writing end.
struct Barrier {
    read: OwnedFd,
    write: OwnedFd,
}

impl Barrier {
    /// Without one, links are closed one after the other, which only takes longer.
    fn new() -> Option<Self> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).ok()?;
        Some(Self { read, write })
    }

    /// Waits until all others are here, or have ended. Only system calls.
    fn wait(&self) {
        let mut byte = 0_u8;
        // SAFETY: both descriptors are open, this process does not touch `write` again, and `byte` has room for what is read.
        unsafe {
            libc::close(self.write.as_raw_fd());
            libc::read(self.read.as_raw_fd(), (&raw mut byte).cast(), 1);
        }
    }
}

/// A child that closes `all` links, `mine` last, when nobody else has them any more: whoever closes the last descriptor of a
/// link waits for its grace period.
fn start_closer(all: &[OwnedFd], mine: &[OwnedFd], barrier: Option<&Barrier>) -> Option<Pid> {
    // SAFETY: the child makes system calls only, all of which are safe after fork in a program of several threads, and does
    // not return.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => Some(child),
        Ok(ForkResult::Child) => {
            // Away from the tracer's process group, which a terminal's Ctrl-C, or a kill of the group, is sent to.
            let _ = setsid();
            let close = |link: &OwnedFd| {
                // SAFETY: the descriptor is open, and this process, which is about to end, does not touch it again.
                unsafe { libc::close(link.as_raw_fd()) };
            };
            let is_mine = |link: &OwnedFd| mine.as_ptr_range().contains(&std::ptr::from_ref(link));
            all.iter().filter(|link| !is_mine(link)).for_each(close);
            if let Some(barrier) = barrier {
                barrier.wait();
            }
            mine.iter().for_each(close);
            // SAFETY: ends the process, without running what the tracer left to be done at its exit.
            unsafe { libc::_exit(0) }
        }
        Err(error) => {
            log::debug!("probes are removed without a child process: {error}");
            None
        }
    }
}

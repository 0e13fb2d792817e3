//! Has the scheduler give a thread the processor soon after it wakes up, at the price of shorter turns.
//!
//! The thread that looks after the traced processes sleeps most of the time, and is waited for when it should not: breakpoints of a
//! window stand until it, and the child that it has remove them, get their turns. Beside 16 busy threads on two processors it woke up
//! 35 ms late as a rule, and with the shortest slice 8 ms (6.18). A slice is no priority: nobody gets more of the processor by it, and
//! no right is needed.

use std::io;

/// The shortest slice that the kernel allows, in nanoseconds (`sched_setattr(2)` as of 6.12; `__setparam_fair` in kernel/sched/fair.c).
/// Older kernels take no notice.
const SLICE: u64 = 100_000;

/// Asks for that, for the calling thread and for processes and threads that it starts from now on.
pub fn be_punctual() {
    if let Err(error) = set_slice(SLICE) {
        log::debug!("the scheduler is not asked for short turns: {error}");
    }
}

fn set_slice(slice: u64) -> io::Result<()> {
    let mut attributes = attributes()?;
    // Somebody has chosen another policy for leaktrace, and knows why.
    if attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    attributes.sched_runtime = slice;
    // SAFETY: a structure that says how large it is; this thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn attributes() -> io::Result<libc::sched_attr> {
    let mut attributes = libc::sched_attr {
        size: 0,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: room for so many bytes; this thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if result == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel takes the slice, where it knows of slices, and a thread's niceness stays as it was.
    #[test]
    fn shorter_turns() {
        let check = || {
            let before = attributes().expect("own attributes can be read");
            set_slice(SLICE).expect("the slice can be set");
            let after = attributes().expect("own attributes can be read");
            assert_eq!((after.sched_nice, after.sched_policy), (before.sched_nice, before.sched_policy));
            if before.sched_runtime == 0 {
                println!("skipped: this kernel has no slices to choose");
                return;
            }
            assert_eq!(after.sched_runtime, SLICE);
        };
        // A thread of its own: the test's own may have others after it.
        std::thread::scope(|scope| scope.spawn(check).join()).expect("it can be asked for");
    }
}

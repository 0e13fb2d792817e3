//! Gives up root's rights once they have served: what is attached stays attached without them, and a mistake in what reads other
//! people's files then costs less.
//!
//! Rights belong to threads. The one that looks after the traced processes keeps what it takes to attach to code that is
//! mapped later and to read other processes' files; the others keep less ([`Keep`]). Those that were not there to begin with are
//! not missed.

use std::collections::HashSet;

use caps::errors::CapsError;
use caps::{CapSet, Capability};

/// What a thread goes on to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Looks after the traced processes.
    Tracing {
        /// It will write a file, in whosoever folder it may be.
        writes: bool,
        /// It has started a program, which may have changed its user, and will end it.
        ends: bool,
    },
    /// Empties the ring, and asks for the start times of processes.
    Collecting,
    /// Reads files for names, of whoever they are.
    Reading,
    /// Waits for signals and timers.
    Nothing,
}

impl Keep {
    fn wanted(self) -> Vec<Capability> {
        // bpf(2) asks for CAP_BPF whatever is done where unprivileged BPF is off (before 5.19 also to look into maps).
        // CAP_CHECKPOINT_RESTORE is for `map_files`. CAP_SYS_ADMIN is what the kernel asks for to place a breakpoint by a perf event
        // (`perf_uprobe_event_init` in kernel/events/core.c, tried on 6.18), which is how probes are kept in a process whose first
        // thread ends, and how they are placed at all before 6.6.
        match self {
            Self::Tracing { writes, ends } => {
                let mut wanted = vec![
                    Capability::CAP_BPF,
                    Capability::CAP_PERFMON,
                    Capability::CAP_SYS_PTRACE,
                    Capability::CAP_SYS_ADMIN,
                    Capability::CAP_CHECKPOINT_RESTORE,
                    Capability::CAP_DAC_READ_SEARCH,
                ];
                if writes {
                    wanted.extend([Capability::CAP_DAC_OVERRIDE, Capability::CAP_CHOWN, Capability::CAP_FOWNER]);
                }
                if ends {
                    wanted.push(Capability::CAP_KILL);
                }
                wanted
            }
            Self::Collecting => vec![Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_SYS_PTRACE],
            Self::Reading => vec![Capability::CAP_DAC_READ_SEARCH],
            Self::Nothing => Vec::new(),
        }
    }

    /// Gives up all other rights of the calling thread, for good: no program that it starts has them either, unless as root's.
    pub fn only(self) {
        if let Err(error) = self.apply() {
            log::warn!("rights that are no longer needed could not be given up: {error}");
        }
    }

    fn apply(self) -> Result<(), CapsError> {
        let held = caps::read(None, CapSet::Permitted)?;
        let kept: HashSet<Capability> = self.wanted().into_iter().filter(|wanted| held.contains(wanted)).collect();
        // What is effective has to be permitted, so it goes first.
        caps::set(None, CapSet::Inheritable, &HashSet::new())?;
        caps::set(None, CapSet::Effective, &kept)?;
        caps::set(None, CapSet::Permitted, &kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that gives up its rights has exactly those of what it keeps that it had, and other threads still have theirs.
    #[test]
    fn each_thread_for_itself() {
        let read = |set| caps::read(None, set).expect("the own rights can be read");
        let before = read(CapSet::Permitted);
        for keep in [Keep::Tracing { writes: true, ends: true }, Keep::Collecting, Keep::Reading, Keep::Nothing] {
            let expected: HashSet<_> = keep.wanted().into_iter().filter(|right| before.contains(right)).collect();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    keep.apply().expect("rights can be given up");
                    for set in [CapSet::Effective, CapSet::Permitted] {
                        assert_eq!(read(set), expected, "{keep:?}");
                    }
                });
            });
            assert_eq!(read(CapSet::Permitted), before);
        }
    }
}

//! Keeps probes in a process whose first thread has ended while others go on.
//!
//! The kernel puts a probe for one process where a task's memory is (`uprobe_multi_link_filter` in `kernel/trace/bpf_trace.c`
//! compares with `link->task->mm`, v6.18), and that task is the first thread. Once it has ended its `mm` is NULL: new links
//! place no breakpoint, and those that stand are removed when any other user of the same place goes (`register_for_each_vma`
//! and `filter_chain` in `kernel/events/uprobes.c`), without a word to anybody. The programs of the links would still run
//! (`same_thread_group`).
//!
//! A perf event can be opened for any thread, and its filter (`uprobe_perf_filter` in `kernel/trace/trace_uprobe.c`) compares
//! with that thread's memory. So events that are never enabled, at the same places and for a thread that lives, put the
//! breakpoints there and hold them, and the links' programs run. They hold for as long as that thread lives.

use anyhow::{Context as _, Result};
use leak_common::op;

use super::{Places, Point, Probes, Programs, UprobeKind, sys};

impl Programs {
    /// [`Self::attach`] for a process whose first thread has ended, through another of its threads.
    pub fn attach_through(&self, tgid: u32, tid: u32, places: &Places) -> Result<(Probes, Probes)> {
        // A perf event refuses a thread that has ended, and is itself what holds.
        let probes = if self.kind == UprobeKind::Perf { Probes::default() } else { self.attach(tgid, places)? };
        Ok((probes, self.hold(tid, places)?))
    }

    /// Holds breakpoints for as long as thread `tid` lives, and puts back those that are gone.
    pub fn hold(&self, tid: u32, places: &Places) -> Result<Probes> {
        if self.kind == UprobeKind::Perf {
            // Its own program runs only where its own filter fits.
            return self.attach(tid, places);
        }
        // free's first, as in `attach`.
        let (frees, others): (Vec<Point>, Vec<Point>) = places.points.iter().partition(|point| point.shape == op::FREE);
        let event = |point: &Point| sys::perf_event(&places.file, point.offset, tid, false);
        let links = frees.iter().chain(&others).map(event).collect::<Result<_, _>>();
        let links =
            links.with_context(|| format!("failed to hold the probes in {} by thread {tid}", places.file.display()));
        Ok(Probes { links: links? })
    }
}

//! The page faults of processes that grow (`leak-ebpf/src/probes/pages.rs`).

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{HashMap as BpfHashMap, MapData};

use super::{Hook, Objects, close::close_all, sys, take_map};

/// Watches page faults; the program is attached only while there is a process to watch.
pub(super) struct Pages {
    program: OwnedFd,
    link: Option<OwnedFd>,
    processes: BpfHashMap<MapData, u32, u32>,
    /// The key is a `leak_common::PageKey`.
    counts: BpfHashMap<MapData, [u64; 2], u64>,
    watched: Vec<u32>,
}

impl Pages {
    /// Fails where the kernel has no such tracepoint; of those that are supported arm64's have none.
    pub fn load(objects: &Objects, ebpf: &mut Ebpf) -> Result<Self> {
        let program = objects.load("page_fault", Hook::RawTracepoint)?;
        // Whether it is there is found out by trying.
        close_all(vec![link(&program)?]);
        let processes = BpfHashMap::try_from(take_map(ebpf, "PAGED")?)?;
        let counts = BpfHashMap::try_from(take_map(ebpf, "PAGES")?)?;
        Ok(Self { program, link: None, processes, counts, watched: Vec::new() })
    }

    /// Looks at one of so many page faults of this process from now on.
    pub fn watch(&mut self, tgid: u32, every: u32) -> Result<()> {
        self.processes.insert(tgid, every.max(1), 0).context("failed to tell whose page faults to look at")?;
        if !self.watched.contains(&tgid) {
            self.watched.push(tgid);
        }
        if self.link.is_none() {
            self.link = Some(link(&self.program)?);
        }
        Ok(())
    }

    /// No longer.
    pub fn forget(&mut self, tgid: u32) {
        self.watched.retain(|watched| *watched != tgid);
        // It may not have been watched.
        let _ = self.processes.remove(&tgid);
        if self.watched.is_empty() {
            close_all(self.link.take().into_iter().collect());
        }
    }

    /// Page faults since the last time: process, hash of the stack, how many.
    pub fn take(&mut self) -> Vec<(u32, u64, u64)> {
        let keys: Vec<[u64; 2]> = self.counts.keys().filter_map(Result::ok).collect();
        let taken = keys.into_iter().filter_map(|key| {
            let count = self.counts.get(&key, 0).ok()?;
            // What comes between the two is lost to this sample.
            self.counts.remove(&key).ok()?;
            let [process, stack] = key;
            // Two words of 32 bits, of which the second is zero.
            let [a, b, c, d, ..] = process.to_ne_bytes();
            Some((u32::from_ne_bytes([a, b, c, d]), stack, count))
        });
        taken.collect()
    }
}

fn link(program: &OwnedFd) -> Result<OwnedFd> {
    sys::link_raw_tracepoint(program.as_fd(), c"page_fault_user").context("failed to attach to the page faults")
}

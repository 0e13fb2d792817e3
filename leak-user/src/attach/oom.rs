//! Whom the kernel kills because memory has run out (`leak-ebpf/src/probes/oom.rs`).

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{HashMap as BpfHashMap, MapData};

use super::{Attached, Hook, Objects, sys, take_map};

/// Victims that nobody has asked for yet.
pub(super) struct Victims {
    map: BpfHashMap<MapData, u32, u64>,
}

impl Victims {
    /// Attaches to the tracepoint; also what keeps it attached.
    pub fn watch(objects: &Objects, ebpf: &mut Ebpf) -> Result<(Self, Attached)> {
        let program = objects.load("oom_victim", Hook::RawTracepoint)?;
        let link = sys::link_raw_tracepoint(std::os::fd::AsFd::as_fd(&program), c"mark_victim")
            .context("failed to attach to the tracepoint mark_victim")?;
        let map = BpfHashMap::try_from(take_map(ebpf, "OOM_VICTIMS")?)?;
        Ok((Self { map }, Attached { program, link }))
    }

    /// Those since the last time: process (before 6.8 perhaps another thread of it) and time.
    pub fn take(&mut self) -> Vec<(u32, u64)> {
        let ids: Vec<u32> = self.map.keys().filter_map(Result::ok).collect();
        let mut victims: Vec<_> = ids.into_iter().filter_map(|id| Some((id, self.map.get(&id, 0).ok()?))).collect();
        victims.retain(|(id, _)| self.map.remove(id).is_ok());
        victims.sort_by_key(|(_, time)| *time);
        victims
    }
}

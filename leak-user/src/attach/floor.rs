//! Empty programs where leaktrace's own would stand: what the breakpoints alone cost a process. Only the bench asks.

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use leak_common::op;

use super::sys::{LinkSupport, UprobeKind, link_uprobe_multi, load_answer, perf_uprobe};
use super::{Places, Probes};

/// What a session program answers at entry: run at the return too, or not (`UPROBE_HANDLER_IGNORE`).
const WITH_RETURN: i32 = 0;
const NO_RETURN: i32 = 1;

/// Two programs that do nothing, of the kind that [`super::Programs::load`] would choose.
#[derive(Debug)]
pub struct Floor {
    kind: UprobeKind,
    /// For functions whose return matters as well.
    with_return: OwnedFd,
    /// For free.
    entry_only: OwnedFd,
}

impl Floor {
    /// Loads the programs; nothing is attached yet.
    pub fn load() -> Result<Self> {
        let kind = LinkSupport::probe().best();
        // As the result of anything but a session program 1 would remove the breakpoint.
        let without = if kind == UprobeKind::Session { NO_RETURN } else { 0 };
        let load = |answer| load_answer("floor", kind, answer).context("failed to load an empty BPF program");
        Ok(Self { kind, with_return: load(WITH_RETURN)?, entry_only: load(without)? })
    }

    /// How uprobes are attached.
    pub fn kind(&self) -> UprobeKind {
        self.kind
    }

    /// Puts the programs where [`super::Programs::attach`] would put leaktrace's: at the entries, and at the returns of all
    /// but free.
    pub fn attach(&self, tgid: u32, places: &Places) -> Result<Probes> {
        let offsets = |wanted: fn(u8) -> bool| -> Vec<u64> {
            places.points.iter().filter(|point| wanted(point.shape)).map(|point| point.offset).collect()
        };
        let allocate = offsets(|shape| shape != op::FREE);
        let release = offsets(|shape| shape == op::FREE);
        let mut links = Vec::new();
        let mut link = |program: &OwnedFd, offsets: &[u64], at_return| -> std::io::Result<()> {
            if offsets.is_empty() {
                return Ok(());
            }
            if self.kind == UprobeKind::Perf {
                for &offset in offsets {
                    links.push(perf_uprobe(program.as_fd(), &places.file, offset, tgid, at_return)?);
                }
            } else {
                links.push(link_uprobe_multi(program.as_fd(), self.kind, &places.file, offsets, &[], tgid, at_return)?);
            }
            Ok(())
        };
        // A session link is both in one.
        let placed = if self.kind == UprobeKind::Session { Ok(()) } else { link(&self.with_return, &allocate, true) };
        placed
            .and_then(|()| link(&self.with_return, &allocate, false))
            .and_then(|()| link(&self.entry_only, &release, false))
            .with_context(|| format!("failed to put empty programs into {} for pid {tgid}", places.file.display()))?;
        Ok(Probes { links })
    }
}

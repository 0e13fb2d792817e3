//! Empty programs where leaktrace's own would stand: what the breakpoints alone cost a process. Only the bench asks.

use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use leak_common::op;

use super::btf::Btf;
use super::sys::{
    self, Hook, LinkSupport, UprobeKind, link_raw_tracepoint, link_tracing, link_uprobe_multi, load_answer, perf_uprobe,
};
use super::{
    MAPPING_FUNCTIONS, MAPPING_TRACEPOINTS, MappingHook, Places, Probes, SYSCALL_PREFIX, TYPED_TRACEPOINTS,
    kernel_types,
};

/// What a session program answers at entry: run at the return too, or not (`UPROBE_HANDLER_IGNORE`).
const WITH_RETURN: i32 = 0;
const NO_RETURN: i32 = 1;

/// Two programs that do nothing, of the kind that [`super::Programs::load`] would choose.
#[derive(Debug)]
pub struct Floor {
    kind: UprobeKind,
    /// For functions whose return matters as well.
    with_return: OwnedFd,
    /// For free, and where returns are left out.
    entry_only: OwnedFd,
}

impl Floor {
    /// Loads the programs; nothing is attached yet.
    pub fn load() -> Result<Self> {
        let kind = LinkSupport::probe().best();
        // As the result of anything but a session program 1 would remove the breakpoint.
        let without = if kind == UprobeKind::Session { NO_RETURN } else { 0 };
        let load = |answer| load_uprobe(kind, answer).context("failed to load an empty BPF program");
        Ok(Self { kind, with_return: load(WITH_RETURN)?, entry_only: load(without)? })
    }

    /// How uprobes are attached.
    pub fn kind(&self) -> UprobeKind {
        self.kind
    }

    /// Puts empty programs where [`super::Programs::load`] would watch mapping calls, by the first means that this kernel has.
    pub fn watch_mappings(&self) -> Result<(MappingHook, Probes)> {
        let btf = kernel_types();
        // The programs at functions and typed tracepoints are left out where the kernel has no bpf_loop, as leaktrace's are.
        let btf = btf.as_ref().filter(|_| sys::has_loop());
        for (hook, attach) in [
            (MappingHook::Functions, at_functions as fn(&Btf) -> Result<Vec<OwnedFd>>),
            (MappingHook::TypedTracepoints, at_typed_tracepoints),
        ] {
            match btf.context("the kernel has no type information, or no bpf_loop").and_then(attach) {
                Ok(links) => return Ok((hook, Probes { links })),
                Err(error) => log::info!("mapping calls cannot be watched by {}: {error:#}", hook.name()),
            }
        }
        let links = at_tracepoints().context("failed to watch mapping calls with empty programs")?;
        Ok((MappingHook::Tracepoints, Probes { links }))
    }

    /// Puts the programs where [`super::Programs::attach`] would put leaktrace's: at the entries, and at the returns of all
    /// but free, or without `returns` at no return: as where no call is sampled.
    pub fn attach(&self, tgid: u32, places: &Places, returns: bool) -> Result<Probes> {
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
        let own_link = returns && self.kind != UprobeKind::Session;
        let placed = if own_link { link(&self.with_return, &allocate, true) } else { Ok(()) };
        let at_entry = if returns { &self.with_return } else { &self.entry_only };
        placed
            .and_then(|()| link(at_entry, &allocate, false))
            .and_then(|()| link(&self.entry_only, &release, false))
            .with_context(|| format!("failed to put empty programs into {} for pid {tgid}", places.file.display()))?;
        Ok(Probes { links })
    }
}

fn load_uprobe(kind: UprobeKind, answer: i32) -> std::io::Result<OwnedFd> {
    load_answer("floor", Hook::Uprobe(kind), answer)
}

fn at_functions(btf: &Btf) -> Result<Vec<OwnedFd>> {
    let mut links = Vec::new();
    for (_, _, call) in MAPPING_FUNCTIONS {
        let function = format!("{SYSCALL_PREFIX}{call}");
        let id = btf.id(&function).with_context(|| format!("the kernel has no function {function}"))?;
        for hook in [Hook::FunctionExit(id), Hook::FunctionEntry(id)] {
            links.push(typed(hook).with_context(|| format!("failed to attach to {function}"))?);
        }
    }
    Ok(links)
}

fn at_typed_tracepoints(btf: &Btf) -> Result<Vec<OwnedFd>> {
    let attach = |(_, tracepoint): (&str, &str)| {
        let id = btf.id(&format!("btf_trace_{tracepoint}"));
        let id = id.with_context(|| format!("the kernel has no type for the tracepoint {tracepoint}"))?;
        typed(Hook::Tracepoint(id)).with_context(|| format!("failed to attach to the tracepoint {tracepoint}"))
    };
    TYPED_TRACEPOINTS.into_iter().map(attach).collect()
}

/// A program at the function or tracepoint that `hook` names.
fn typed(hook: Hook) -> std::io::Result<OwnedFd> {
    link_tracing(load_answer("floor", hook, 0)?.as_fd())
}

fn at_tracepoints() -> Result<Vec<OwnedFd>> {
    let attach = |(_, tracepoint): (&str, &str)| {
        let name = CString::new(tracepoint)?;
        let program = load_answer("floor", Hook::RawTracepoint, 0)?;
        link_raw_tracepoint(program.as_fd(), &name)
            .with_context(|| format!("failed to attach to the tracepoint {tracepoint}"))
    };
    MAPPING_TRACEPOINTS.into_iter().map(attach).collect()
}

//! Where processes grow of which nothing else is known: the stacks of their page faults, looked at while their memory rises.
//!
//! No allocator is probed for this: the process's code is told to the kernel side, so that its stacks can be unwound, and every so
//! many page faults one is looked at. While no process grows none of it is there.

use std::collections::{BTreeMap, HashMap};

use super::Run;
use super::system::System;
use crate::decode::StackEnd;
use crate::process::{Process, ProcessId};
use crate::report;
use crate::ring::page_size;

/// Processes that are looked at for this at a time.
const MOST: usize = 8;
/// Processes whose stacks are kept, until they end.
const KEPT: usize = 64;
/// Stacks that are kept of each.
const STACKS: usize = 512;
/// Faults that are looked at of a process in a second, about.
const FAULTS_PER_S: f64 = 100.0;
/// Seconds after its memory rose last that a process is looked at on.
const HOLD: f64 = 30.0;
/// Stacks of a process in a report, and those that are given names for it.
const LISTED: usize = 10;
const NAMED: usize = 64;

/// A stack of page faults.
struct Stack {
    frames: Vec<u64>,
    end: StackEnd,
    faults: u64,
}

/// A process that grows.
struct Growing {
    id: ProcessId,
    /// By which of its threads `/proc` shows its memory.
    through: u32,
    /// Whether its page faults are looked at; and of how many one is.
    active: bool,
    every: u32,
    bytes_per_s: f64,
    /// When its memory rose last.
    rose: f64,
    stacks: HashMap<u64, Stack>,
    faults: u64,
}

/// The processes that grow, or did.
#[derive(Default)]
pub(super) struct Pages {
    growing: Vec<Growing>,
}

impl Pages {
    fn of(&mut self, tgid: u32) -> Option<&mut Growing> {
        self.growing.iter_mut().find(|growing| growing.id.tgid == tgid)
    }

    /// The process that is looked at under this id, and by which thread its memory is seen.
    pub fn watches(&mut self, tgid: u32) -> Option<(ProcessId, u32)> {
        self.of(tgid).filter(|growing| growing.active).map(|growing| (growing.id, growing.through))
    }

    /// A stack of a page fault.
    pub fn stack(&mut self, tgid: u32, id: u64, end: StackEnd, frames: Vec<u64>) {
        if let Some(growing) = self.of(tgid)
            && growing.stacks.len() < STACKS
        {
            growing.stacks.entry(id).or_insert(Stack { frames, end, faults: 0 });
        }
    }

    /// The process executes another program: its addresses mean something else.
    pub fn exec(&mut self, tgid: u32) {
        if let Some(growing) = self.of(tgid) {
            growing.stacks.clear();
            growing.faults = 0;
        }
    }

    /// The process's code is no longer told to the kernel side. What is known of its stacks stays, since the kernel side sends each
    /// only once.
    pub fn let_go(&mut self, id: ProcessId) {
        if let Some(growing) = self.growing.iter_mut().find(|growing| growing.id == id) {
            growing.active = false;
        }
    }
}

/// Of how many faults one is looked at, at this growth.
fn one_of(bytes_per_s: f64) -> u32 {
    (bytes_per_s / page_size() as f64 / FAULTS_PER_S).clamp(1.0, 1e6) as u32
}

impl Run<'_> {
    /// Looks after it, `time` seconds after the start; to be called about once a second.
    pub(super) fn tend_pages(&mut self, system: &mut System, time: f64) {
        let rising = system.unexplained(time);
        let mut pages = std::mem::take(&mut self.pages);
        for (tgid, stack, faults) in if pages.growing.is_empty() { Vec::new() } else { self.programs.take_pages() } {
            if let Some(growing) = pages.of(tgid) {
                growing.faults += faults;
                if let Some(stack) = growing.stacks.get_mut(&stack) {
                    stack.faults += faults;
                }
            }
        }
        for &(id, bytes_per_s) in &rising {
            let room = pages.growing.len() < KEPT;
            match pages.growing.iter_mut().find(|growing| growing.id == id) {
                Some(growing) => (growing.rose, growing.bytes_per_s) = (time, bytes_per_s),
                None if room => pages.growing.push(Growing {
                    id,
                    through: id.tgid,
                    active: false,
                    every: 0,
                    bytes_per_s,
                    rose: time,
                    stacks: HashMap::new(),
                    faults: 0,
                }),
                None => {}
            }
        }
        for growing in pages.growing.iter_mut().filter(|growing| growing.active) {
            let every = one_of(growing.bytes_per_s);
            if time - growing.rose > HOLD || !system.knows(growing.id) {
                self.stop_pages(growing);
            } else if every != growing.every {
                growing.every = every;
                // It was told before; at worst the old number stays.
                let _ = self.programs.watch_pages(growing.id.tgid, every);
            }
        }
        for ended in pages.growing.extract_if(.., |growing| !system.knows(growing.id)) {
            if !self.targets.iter().any(|target| target.id() == ended.id) {
                self.symbols.forget(ended.id);
            }
        }
        let mut active = pages.growing.iter().filter(|growing| growing.active).count();
        for (id, _) in rising {
            let Some(growing) = pages.growing.iter_mut().find(|growing| growing.id == id && !growing.active) else {
                continue;
            };
            if active == MOST {
                break;
            }
            match self.start_pages(growing) {
                Ok(true) => active += 1,
                // There are none on this host.
                Ok(false) => break,
                Err(error) => log::debug!("pid {}: its page faults cannot be looked at: {error:#}", id.tgid),
            }
        }
        self.pages = pages;
    }

    fn start_pages(&mut self, growing: &mut Growing) -> anyhow::Result<bool> {
        let id = growing.id;
        let process = Process::open(id.tgid)?;
        anyhow::ensure!(process.id == id, "it has ended");
        growing.every = one_of(growing.bytes_per_s);
        if !self.programs.watch_pages(id.tgid, growing.every)? {
            return Ok(false);
        }
        growing.active = true;
        if !self.targets.iter().any(|target| target.id() == id) {
            growing.through = process.through();
            self.symbols.look_through(id, growing.through);
            self.symbols.add(id);
            self.refresh_code(id, growing.through);
            self.programs.add_target(id.tgid)?;
        }
        log::info!("pid {}: grows, one of {} page faults is looked at", id.tgid, growing.every);
        Ok(true)
    }

    fn stop_pages(&mut self, growing: &mut Growing) {
        growing.active = false;
        self.programs.forget_pages(growing.id.tgid);
        if !self.targets.iter().any(|target| target.id() == growing.id) {
            self.programs.remove_target(growing.id.tgid);
            self.code.forget(growing.id);
        }
    }

    /// What the report says of it.
    pub(super) fn report_pages(&mut self, system: &System) -> Vec<report::NewPages> {
        let Self { pages, symbols, .. } = self;
        let mut all: Vec<&Growing> =
            pages.growing.iter().filter(|growing| growing.active && growing.faults > 0).collect();
        all.sort_by(|a, b| b.bytes_per_s.total_cmp(&a.bytes_per_s).then_with(|| a.id.cmp(&b.id)));
        let report = |growing: &Growing| report::NewPages {
            pid: growing.id.tgid,
            comm: system.comm(growing.id),
            bytes_per_s: growing.bytes_per_s,
            faults: growing.faults,
            stacks: growing.stacks(|frames| symbols.frames(growing.id, frames)),
        };
        all.into_iter().map(report).collect()
    }
}

/// A function, or where there is no name the place in its file.
type Place = (Option<String>, Option<u64>);

impl Growing {
    /// The stacks with the most faults. Those that differ only by where in its functions they stand are one.
    fn stacks(&self, mut name: impl FnMut(&[u64]) -> Vec<report::Frame>) -> Vec<report::PageStack> {
        let mut raw: Vec<&Stack> = self.stacks.values().filter(|stack| stack.faults > 0).collect();
        raw.sort_by(|a, b| b.faults.cmp(&a.faults).then_with(|| a.frames.cmp(&b.frames)));
        let mut merged: BTreeMap<Vec<Place>, report::PageStack> = BTreeMap::new();
        for stack in raw.into_iter().take(NAMED) {
            let frames = name(&stack.frames);
            let key =
                frames.iter().map(|frame| (frame.function.clone(), frame.offset.filter(|_| frame.function.is_none())));
            let into = merged.entry(key.collect()).or_insert_with(|| report::PageStack {
                faults: 0,
                share: 0.0,
                end: stack.end.into(),
                frames,
            });
            into.faults += stack.faults;
            into.share = into.faults as f64 / self.faults.max(1) as f64;
        }
        let mut stacks: Vec<report::PageStack> = merged.into_values().collect();
        stacks.sort_by_key(|stack| std::cmp::Reverse(stack.faults));
        stacks.truncate(LISTED);
        stacks
    }
}

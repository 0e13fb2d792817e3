//! Keeps the kernel side's picture of the traced processes' code current: unwind tables, and where in each process they hold.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::attach::Programs;
use crate::decode::StackEnd;
use crate::process::ProcessId;
use crate::unwind::Tables;
use crate::unwind::tables::Usage;

/// A process whose stacks end in unknown code is looked at again, but no more often than this.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Longer than any walk takes.
const RECLAIM_AFTER: Duration = Duration::from_secs(1);
/// Tables of how many other processes may have to be made anew because one has taken their room, before that waits for the
/// next time.
const MOST_STALE: usize = 64;

/// The code of the traced processes.
pub struct Code {
    /// None where stacks are unwound by frame pointers alone.
    tables: Option<Tables>,
    processes: Vec<Looked>,
    /// When rows that were given up were last freed.
    reclaimed: Instant,
}

/// When a process was looked at last.
struct Looked {
    id: ProcessId,
    /// By which of its threads `/proc` shows its memory.
    through: u32,
    at: Instant,
    /// There is a reason to look again.
    again: bool,
}

impl Code {
    /// With room for so many rows; without tables if there is to be none.
    pub fn new(rows: Option<u32>) -> Self {
        Self { tables: rows.map(Tables::new), processes: Vec::new(), reclaimed: Instant::now() }
    }

    /// Whether tables are in use.
    pub fn has_tables(&self) -> bool {
        self.tables.is_some()
    }

    /// Looks at the process's mappings and loads what is missing; `through` is the thread that its memory is seen through.
    /// To be called before its probes are placed, and whenever it mapped code.
    pub fn refresh(&mut self, programs: &mut Programs, id: ProcessId, through: u32) -> Result<()> {
        let mut left = vec![(id, through)];
        let mut result = Ok(());
        for _ in 0..MOST_STALE {
            let Some((next, through)) = left.pop() else { break };
            match self.load(programs, next, through) {
                Ok(stale) => {
                    let through = |id| self.processes.iter().find(|p| p.id == id).map_or(id.tgid, |p| p.through);
                    left.extend(stale.into_iter().map(|id| (id, through(id))));
                }
                Err(error) if next == id => result = Err(error),
                Err(error) => log::debug!("pid {}: its code cannot be looked at: {error:#}", next.tgid),
            }
        }
        result
    }

    /// The processes whose ranges have to be made anew.
    fn load(&mut self, programs: &mut Programs, id: ProcessId, through: u32) -> Result<Vec<ProcessId>> {
        let Some(tables) = &mut self.tables else { return Ok(Vec::new()) };
        let now = Instant::now();
        let found = tables.refresh(id, through, |first, rows: &[u64]| programs.write_rows(first, rows))?;
        programs.set_target(id.tgid, &found.ranges)?;
        for (path, why) in &found.missing {
            log::info!("pid {}: no unwind table for {}: {why}", id.tgid, path.display());
        }
        let looked = Looked { id, through, at: now, again: found.pending };
        match self.processes.iter_mut().find(|process| process.id == id) {
            Some(process) => *process = looked,
            None => self.processes.push(looked),
        }
        log::debug!("pid {}: {} ranges of code in {:.1?}", id.tgid, found.ranges.len(), now.elapsed());
        Ok(found.stale)
    }

    /// A stack of the process was taken that ends in this way at this outermost address: more may be known of the code
    /// there by now.
    pub fn stack_ended(&mut self, id: ProcessId, end: StackEnd, outermost: u64) {
        let again = match (end, &mut self.tables) {
            (StackEnd::Interrupted, Some(tables)) => tables.need_full(id, outermost),
            (StackEnd::NoTable, Some(_)) => true,
            _ => false,
        };
        if again && let Some(process) = self.processes.iter_mut().find(|process| process.id == id) {
            process.again = true;
        }
    }

    /// Does what has become due; to be called often.
    pub fn tend(&mut self, programs: &mut Programs) {
        let Some(tables) = &mut self.tables else { return };
        if self.reclaimed.elapsed() >= RECLAIM_AFTER {
            self.reclaimed = Instant::now();
            tables.reclaim();
        }
        let due = |process: &&Looked| process.again && process.at.elapsed() >= AGAIN_AFTER;
        let due: Vec<_> = self.processes.iter().filter(due).map(|process| (process.id, process.through)).collect();
        for (id, through) in due {
            if let Err(error) = self.refresh(programs, id, through) {
                log::debug!("pid {}: its code cannot be looked at: {error:#}", id.tgid);
                if let Some(process) = self.processes.iter_mut().find(|process| process.id == id) {
                    process.again = false;
                }
            }
        }
    }

    /// The process is gone: its tables make room for others'.
    pub fn forget(&mut self, id: ProcessId) {
        if let Some(tables) = &mut self.tables {
            tables.forget(id);
        }
        self.processes.retain(|process| process.id != id);
    }

    /// How much is loaded, and what was lost.
    pub fn usage(&self) -> Option<Usage> {
        self.tables.as_ref().map(Tables::usage)
    }
}

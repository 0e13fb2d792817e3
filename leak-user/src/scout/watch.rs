//! Reads the resident sets of all processes, cheaply: one `pread` a process and second of a file that is kept open.
//!
//! The open file is also what tells a process from a later one with the same pid: once the process is gone, reading it is an
//! error.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use crate::process::ProcessId;
use crate::ring::page_size;

/// Files that are kept open at most. Of further processes they are opened each time.
const OPEN: usize = 8192;

/// What a process has in memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Pages of its own, not of files or shared memory: what a leak of the heap makes grow, and reading files does not.
    pub own: u64,
    pub total: u64,
}

struct Watched {
    id: ProcessId,
    statm: Option<File>,
}

/// The processes of a host, or those of them that are wanted.
pub struct Watch {
    processes: HashMap<u32, Watched>,
    /// Seen and not wanted, so as not to ask at each look.
    unwanted: HashSet<u32>,
    /// Seen at the last look for the first time: most live for a moment only, and are never looked at.
    young: HashSet<u32>,
}

/// What a look at all processes gave.
#[derive(Debug, Default)]
pub struct Look {
    pub resident: Vec<(ProcessId, Resident)>,
    pub ended: Vec<ProcessId>,
}

impl Default for Watch {
    fn default() -> Self {
        Self::new()
    }
}

impl Watch {
    pub fn new() -> Self {
        Self { processes: HashMap::new(), unwanted: HashSet::new(), young: HashSet::new() }
    }

    /// Looks at all processes. Of one that is seen for the second time, `wants` is asked whether it is to be watched.
    pub fn look(&mut self, mut wants: impl FnMut(ProcessId) -> bool) -> Look {
        let mut look = Look::default();
        let page = page_size() as u64;
        let mut text = [0_u8; 128];
        self.processes.retain(|_, watched| {
            let opened = if watched.statm.is_some() { None } else { open(watched.id) };
            let file = watched.statm.as_ref().or(opened.as_ref());
            let found = file.and_then(|file| resident(file, &mut text, page));
            match found {
                Some(resident) => look.resident.push((watched.id, resident)),
                None => look.ended.push(watched.id),
            }
            found.is_some()
        });
        self.find_new(&mut wants);
        look
    }

    fn find_new(&mut self, wants: &mut impl FnMut(ProcessId) -> bool) {
        // Without /proc there is nothing to watch; that is found out before.
        let Ok(entries) = fs::read_dir("/proc") else { return };
        let pids: HashSet<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        self.unwanted.retain(|pid| pids.contains(pid));
        let mut young = HashSet::new();
        for pid in pids {
            if pid == std::process::id() || self.processes.contains_key(&pid) || self.unwanted.contains(&pid) {
                continue;
            }
            if !self.young.contains(&pid) {
                young.insert(pid);
                continue;
            }
            let Ok(id) = ProcessId::current(pid) else { continue };
            self.ask(id, &mut *wants);
        }
        self.young = young;
    }

    /// A process was started or executed a program: it is looked at now. If it is watched already, `wants` is not asked.
    pub fn born(&mut self, pid: u32, wants: impl FnOnce(ProcessId) -> bool) {
        if pid == std::process::id() || self.processes.contains_key(&pid) {
            return;
        }
        // What it was before may not have been wanted.
        self.unwanted.remove(&pid);
        if let Ok(id) = ProcessId::current(pid) {
            self.ask(id, wants);
        }
    }

    fn ask(&mut self, id: ProcessId, wants: impl FnOnce(ProcessId) -> bool) {
        if wants(id) {
            let statm = if self.processes.len() < OPEN { open(id) } else { None };
            self.processes.insert(id.tgid, Watched { id, statm });
        } else {
            self.unwanted.insert(id.tgid);
        }
    }

    /// Asks again about the processes that were not wanted: a program was executed in one, or its pid was handed out anew.
    pub fn ask_again(&mut self) {
        self.unwanted.clear();
    }

    /// It is not wanted any more.
    pub fn forget(&mut self, id: ProcessId) {
        if self.processes.get(&id.tgid).is_some_and(|watched| watched.id == id) {
            self.processes.remove(&id.tgid);
            self.unwanted.insert(id.tgid);
        }
    }

    /// How many are watched.
    pub fn len(&self) -> usize {
        self.processes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.processes.is_empty()
    }
}

/// The open file of this process; nothing where it has ended.
fn open(id: ProcessId) -> Option<File> {
    let file = File::open(format!("/proc/{}/statm", id.tgid)).ok()?;
    // In this order: whoever has the pid after the file was opened is whose file it is, or the file is dead.
    (ProcessId::current(id.tgid).ok()? == id).then_some(file)
}

/// `proc(5)`: size, resident, shared, ..., in pages. A kernel thread, and a process that has ended and was not collected,
/// have none.
fn resident(file: &File, text: &mut [u8], page: u64) -> Option<Resident> {
    let length = file.read_at(text, 0).ok()?;
    let text = std::str::from_utf8(&text[..length]).ok()?;
    let mut fields = text.split_ascii_whitespace().map(str::parse::<u64>);
    let (_, resident, shared) = (fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?);
    (resident > 0).then(|| Resident { own: resident.saturating_sub(shared) * page, total: resident * page })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A process is watched from the second look on, with its own pages, and reported when it has ended.
    #[test]
    fn from_start_to_end() {
        let mut child = Command::new("sleep").arg("100").stdout(Stdio::null()).spawn().unwrap();
        let mut watch = Watch::new();
        let wants = |id: ProcessId| id.tgid == child.id();
        assert!(watch.look(wants).resident.is_empty());
        assert!(watch.look(wants).resident.is_empty());
        let seen = watch.look(wants);
        assert_eq!(seen.resident.len(), 1);
        let (id, resident) = seen.resident[0];
        assert_eq!(id, ProcessId::current(child.id()).unwrap());
        assert!(resident.own > 0 && resident.own < resident.total && resident.total < 1 << 30, "{resident:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(watch.look(|_| false).ended, [id]);
        assert!(watch.is_empty());
    }

    /// Who is not wanted is asked after once, until told otherwise; the test itself never.
    #[test]
    fn not_wanted() {
        let mut asked = Vec::new();
        let mut watch = Watch::new();
        for _ in 0..4 {
            watch.look(|id| {
                asked.push(id);
                false
            });
        }
        assert!(!asked.is_empty());
        assert!(asked.iter().all(|id| id.tgid != std::process::id()));
        let first = asked[0];
        assert_eq!(asked.iter().filter(|id| **id == first).count(), 1);
    }
}

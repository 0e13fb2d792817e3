//! One traced process: what was found in it, the probes that stand in it, and its resident set over time.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::attach::{Places, Point, Probes, Programs};
use crate::detect::Sample;
use crate::discover::{AllocatorFile, Discovery, FileId, Files, Named, ProbePoint, maps};
use crate::labels::Labels;
use crate::process::{MemoryLimit, Process, ProcessId, RssSampler};
use crate::report;

/// The most samples of its memory that are kept; past it every second one is dropped.
const MAX_SAMPLES: usize = 4096;

/// How often its memory limit is read anew: a running container's can be changed.
const LIMIT_EVERY: Duration = Duration::from_secs(30);

/// An allocator with its probes.
struct Traced {
    file: AllocatorFile,
    probes: Probes,
    /// What holds the breakpoints once the first thread has ended ([`Programs::hold`]).
    held: Probes,
}

impl Traced {
    fn places(&self) -> Places {
        places(&self.file)
    }
}

fn places(file: &AllocatorFile) -> Places {
    let points = file.points.iter().map(Point::from).collect();
    Places { file: file.path_for_attach(), points }
}

/// What became of a process whose threads were looked after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Followed {
    /// The thread that its memory is seen through lives.
    AsBefore,
    /// It had ended, and another has taken its place before anything was lost.
    Moved,
    /// The same, but the kernel had removed breakpoints meanwhile: frees went unseen.
    Lost,
}

/// A traced process.
pub struct Target {
    pub process: Process,
    discovery: Discovery,
    files: HashMap<FileId, Traced>,
    rss: Option<RssSampler>,
    /// Its memory over time.
    pub samples: Vec<Sample>,
    pub memory_limit: Option<MemoryLimit>,
    limit_read: Instant,
    pub labels: report::Labels,
    /// An event told that its first thread ended; for [`Self::follow_threads`] to look at.
    pub leader_ended: bool,
    /// When it ended.
    pub ended: Option<Instant>,
    /// The process that forked it, where it is traced for that.
    pub parent: Option<u32>,
    /// Why it is traced, where nobody asked for it.
    pub reason: Option<report::Reason>,
}

impl Target {
    /// Looks at a process; nothing is attached yet.
    pub fn open(pid: u32, files: &Files) -> Result<Self> {
        let process = Process::open(pid)?;
        let mut discovery = Discovery::with(pid, files.clone());
        discovery.look_through(process.through());
        Ok(Self {
            rss: process.rss().ok(),
            memory_limit: process.memory_limit(),
            limit_read: Instant::now(),
            labels: Labels::read(process.through()).into(),
            discovery,
            files: HashMap::new(),
            samples: Vec::new(),
            leader_ended: false,
            ended: None,
            parent: None,
            reason: None,
            process,
        })
    }

    /// Its identity.
    pub fn id(&self) -> ProcessId {
        self.process.id
    }

    /// Puts probes into the allocators that were mapped since the last time. Cheap while nothing was.
    pub fn attach_new(&mut self, programs: &Programs) -> Result<()> {
        loop {
            let attached = self.attach_found(programs);
            // Its first thread may end between any two steps, and nothing is found through it from then on.
            if !self.files.is_empty() || !self.process.follow_threads() {
                return attached;
            }
            self.look_through(self.process.through());
        }
    }

    fn attach_found(&mut self, programs: &Programs) -> Result<()> {
        for file in self.discovery.refresh()? {
            self.attach_file(programs, file)?;
        }
        Ok(())
    }

    /// Sees the memory of the process through this thread from now on.
    fn look_through(&mut self, thread: u32) {
        self.discovery.look_through(thread);
        self.rss = self.process.rss().ok();
    }

    /// Takes what the user names as allocators too; before the first [`Self::attach_new`].
    pub fn name_allocators(&mut self, named: &[Named]) {
        self.discovery.name(named);
    }

    /// The error for what the user named and is not there, if that is so.
    pub fn require_named(&self) -> Result<()> {
        Ok(self.discovery.require_named()?)
    }

    fn attach_file(&mut self, programs: &Programs, file: AllocatorFile) -> Result<()> {
        if self.files.contains_key(&file.id) {
            return Ok(());
        }
        let places = places(&file);
        let attached = if self.process.leader_has_ended() {
            programs.attach_through(self.id().tgid, self.process.through(), &places)
        } else {
            programs.attach(self.id().tgid, &places).map(|probes| (probes, Probes::default()))
        };
        let (probes, held) = attached.with_context(|| format!("failed to probe {}", file.path.display()))?;
        log::info!(
            "pid {}: {} probes in {} ({})",
            self.id().tgid,
            places.points.len(),
            file.path.display(),
            file.label()
        );
        self.files.insert(file.id, Traced { file, probes, held });
        Ok(())
    }

    /// Goes on by another thread if the one that the process's memory is seen through has ended.
    pub fn follow_threads(&mut self, programs: &Programs) -> Result<Followed> {
        if !self.process.follow_threads() {
            return Ok(Followed::AsBefore);
        }
        let through = self.process.through();
        self.look_through(through);
        if !self.process.leader_has_ended() {
            // exec; the event of it says what to do.
            return Ok(Followed::Moved);
        }
        log::debug!("pid {}: goes on by thread {through}", self.id().tgid);
        // In this order: what is gone afterwards is put back by what holds.
        let stood = self.files.values().all(|traced| breakpoint_stands(through, &traced.file));
        for traced in self.files.values_mut() {
            let held = programs.hold(through, &traced.places())?;
            // The new ones stand by now, so that there is no moment without.
            crate::attach::detach([std::mem::replace(&mut traced.held, held)]);
        }
        Ok(if stood { Followed::Moved } else { Followed::Lost })
    }

    /// The error for a process in which no allocator was found, if that is so.
    pub fn require_allocator(&self) -> Result<()> {
        if self.files.is_empty() { Err(self.discovery.no_allocator().into()) } else { Ok(()) }
    }

    /// The process executed a new program. Probes in files that it has mapped again stay where they are (the kernel put
    /// them there as it mapped the file), unless another thread than the leader called exec: a link holds on to the
    /// leader that it was made for, and that is gone.
    pub fn exec(&mut self, programs: &Programs, by_leader: bool) -> Result<()> {
        self.process.refresh()?;
        self.discovery = self.discovery.renewed();
        let mut before = std::mem::take(&mut self.files);
        for file in self.discovery.refresh()? {
            match before.remove(&file.id).filter(|_| by_leader) {
                Some(kept) => drop(self.files.insert(file.id, kept)),
                None => self.attach_file(programs, file)?,
            }
        }
        Ok(())
    }

    /// Puts the probes back that [`Self::detach`] removed.
    pub fn attach_again(&mut self, programs: &Programs) -> Result<()> {
        let (tgid, through, leader) = (self.id().tgid, self.process.through(), !self.process.leader_has_ended());
        programs.attach_again(tgid);
        for traced in self.files.values_mut() {
            let places = traced.places();
            (traced.probes, traced.held) = if leader {
                (programs.attach(tgid, &places)?, Probes::default())
            } else {
                programs.attach_through(tgid, through, &places)?
            };
        }
        // What it has mapped meanwhile.
        self.attach_new(programs)
    }

    /// Removes all probes.
    pub fn detach(&mut self) -> Vec<Probes> {
        // The files stay for the report.
        let all = self.files.values_mut().flat_map(|traced| [&mut traced.probes, &mut traced.held]);
        all.map(std::mem::take).collect()
    }

    /// Takes a sample of the resident set, `time` seconds after the start, beside the live bytes that are known.
    pub fn sample(&mut self, time: f64, traced: u64) {
        let Some(rss) = self.rss.as_ref().and_then(|rss| rss.sample().ok()) else { return };
        if self.limit_read.elapsed() >= LIMIT_EVERY {
            self.limit_read = Instant::now();
            let limit = self.process.memory_limit();
            // Of a process that has ended only the host's would be left.
            if self.process.is_alive() {
                self.memory_limit = limit;
            }
        }
        self.samples.push(Sample { time, resident: rss.total, traced });
        if self.samples.len() > MAX_SAMPLES {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 0
            });
        }
    }

    /// Whether the process has ended; noticed once.
    pub fn notice_end(&mut self) -> bool {
        if self.ended.is_none() && !self.process.is_alive() {
            self.ended = Some(Instant::now());
        }
        self.ended.is_some()
    }

    /// The allocators that are traced: several may be in one file.
    pub fn allocators(&self) -> Vec<report::Allocator> {
        let of_file = |file: &AllocatorFile| {
            let allocator = |(index, family): (usize, &String)| report::Allocator {
                family: family.clone(),
                path: file.path.to_string_lossy().into_owned(),
                build_id: file.build_id.clone(),
                functions: file.points.iter().filter(|p| p.family == index).map(ProbePoint::display_name).collect(),
            };
            file.families.iter().enumerate().map(allocator).collect::<Vec<_>>()
        };
        let mut allocators: Vec<_> = self.files.values().flat_map(|traced| of_file(&traced.file)).collect();
        allocators.sort_by(|a, b| (&a.path, &a.family).cmp(&(&b.path, &b.family)));
        allocators
    }
}

/// Whether the breakpoint on free stands in the memory that thread `tid` has: a byte there differs from the file. True where
/// the file is not mapped any more, so that there is nothing to lose.
fn breakpoint_stands(tid: u32, file: &AllocatorFile) -> bool {
    let Some(free) = file.points.iter().find(|point| point.op() == leak_common::op::FREE) else { return true };
    let Ok(text) = std::fs::read(format!("/proc/{tid}/maps")) else { return true };
    // Overlay file systems give mappings another device than the file has.
    let here = |mapping: &maps::Mapping<'_>| {
        let within = mapping.offset..mapping.offset + (mapping.end - mapping.start);
        mapping.executable && mapping.file.is_some_and(|id| id.inode == file.id.inode) && within.contains(&free.offset)
    };
    let Some(mapping) = maps::parse(&text).find(here) else { return true };
    let (mut in_memory, mut in_file) = ([0_u8; 1], [0_u8; 1]);
    let address = free.offset - mapping.offset + mapping.start;
    let read = File::open(format!("/proc/{tid}/mem")).and_then(|memory| memory.read_exact_at(&mut in_memory, address));
    let read = read.and_then(|()| file.file().read_exact_at(&mut in_file, free.offset));
    read.is_err() || in_memory != in_file
}

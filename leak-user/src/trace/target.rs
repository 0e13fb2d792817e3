//! One traced process: what was found in it, the probes that stand in it, and its resident set over time.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::attach::{Places, Point, Probes, Programs};
use crate::discover::{self, AllocatorFile, Discovery, FileId};
use crate::process::{MemoryLimit, Process, ProcessId, RssSampler};
use crate::report;

/// The most resident set samples that are kept; past it every second one is dropped.
const MAX_SAMPLES: usize = 4096;

/// A traced process.
pub struct Target {
    pub process: Process,
    discovery: Discovery,
    /// Allocators with their probes, by file.
    files: HashMap<FileId, (AllocatorFile, Probes)>,
    rss: Option<RssSampler>,
    /// Seconds since the start of tracing, and resident bytes.
    pub rss_samples: Vec<(f64, u64)>,
    pub memory_limit: Option<MemoryLimit>,
    /// When it ended.
    pub ended: Option<Instant>,
}

impl Target {
    /// Looks at a process; nothing is attached yet.
    pub fn open(pid: u32) -> Result<Self> {
        let process = Process::open(pid)?;
        Ok(Self {
            rss: process.rss().ok(),
            memory_limit: process.memory_limit(),
            discovery: Discovery::new(pid),
            files: HashMap::new(),
            rss_samples: Vec::new(),
            ended: None,
            process,
        })
    }

    /// Its identity.
    pub fn id(&self) -> ProcessId {
        self.process.id
    }

    /// Puts probes into the allocators that were mapped since the last time. Cheap while nothing was.
    pub fn attach_new(&mut self, programs: &Programs) -> Result<()> {
        for file in self.discovery.refresh()? {
            self.attach_file(programs, file)?;
        }
        Ok(())
    }

    /// Puts probes into a file that the user named.
    pub fn attach_named(&mut self, programs: &Programs, path: &Path) -> Result<()> {
        let file = discover::allocator_at(path)
            .with_context(|| format!("failed to read the allocator {}", path.display()))?
            .map_err(|outcome| anyhow::anyhow!("no allocator in {}: {}", path.display(), outcome.text()))?;
        self.attach_file(programs, file)
    }

    fn attach_file(&mut self, programs: &Programs, file: AllocatorFile) -> Result<()> {
        if self.files.contains_key(&file.id) {
            return Ok(());
        }
        let points = file.points.iter().map(|point| Point { shape: point.op(), offset: point.offset }).collect();
        let places = Places { file: file.path_for_attach(), points };
        let probes = programs
            .attach(self.id().tgid, &places)
            .with_context(|| format!("failed to probe {}", file.path.display()))?;
        log::info!(
            "pid {}: {} probes in {} ({})",
            self.id().tgid,
            places.points.len(),
            file.path.display(),
            file.label
        );
        self.files.insert(file.id, (file, probes));
        Ok(())
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
        self.discovery = Discovery::new(self.id().tgid);
        let mut before = std::mem::take(&mut self.files);
        for file in self.discovery.refresh()? {
            match before.remove(&file.id).filter(|_| by_leader) {
                Some(kept) => drop(self.files.insert(file.id, kept)),
                None => self.attach_file(programs, file)?,
            }
        }
        Ok(())
    }

    /// Removes all probes.
    pub fn detach(&mut self) -> Vec<Probes> {
        // The files stay for the report.
        self.files.values_mut().map(|(_, probes)| std::mem::take(probes)).collect()
    }

    /// Takes a sample of the resident set, `at` seconds after the start.
    pub fn sample_rss(&mut self, at: f64) {
        let Some(sample) = self.rss.as_ref().and_then(|rss| rss.sample().ok()) else { return };
        self.rss_samples.push((at, sample.total));
        if self.rss_samples.len() > MAX_SAMPLES {
            let mut index = 0;
            self.rss_samples.retain(|_| {
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

    /// The allocators that are traced.
    pub fn allocators(&self) -> Vec<report::Allocator> {
        let mut allocators: Vec<_> = self
            .files
            .values()
            .map(|(file, _)| report::Allocator {
                family: file.label.clone(),
                path: file.path.to_string_lossy().into_owned(),
                build_id: file.build_id.clone(),
                functions: file.points.iter().map(|point| point.function.name().to_owned()).collect(),
            })
            .collect();
        allocators.sort_by(|a, b| a.path.cmp(&b.path));
        allocators
    }
}

//! What is known of files that many processes have mapped: each is looked into once.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::{AllocatorFile, Outcome};

/// So many files are known at most; past it those that hold no allocator are forgotten.
const MOST: usize = 4096;

/// A file as it was when it was looked into. Its inode alone is not enough: it is handed out again once the file is gone, and
/// a file can be written to in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Version {
    dev: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            dev: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// What looking into a file gave, without what differs between the processes that have it.
type Found = (Outcome, Option<AllocatorFile>);

/// Files that were looked into; clones share what they know.
#[derive(Clone, Debug, Default)]
pub struct Files {
    known: Arc<Mutex<HashMap<Version, Found>>>,
}

impl Files {
    /// What is known of this version of a file, as the process sees it that has it at `path`.
    pub(super) fn get(&self, version: Version, path: &Path) -> Option<Found> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (outcome, allocator) = known.get(&version)?;
        let allocator = allocator.clone().map(|allocator| AllocatorFile { path: path.to_owned(), ..allocator });
        Some((outcome.clone(), allocator))
    }

    pub(super) fn put(&self, version: Version, found: &Found) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.retain(|_, (_, allocator)| allocator.is_some());
        }
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(version, found.clone());
    }

    /// How many files are known.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

//! Takes records out of the ring buffer, in the order in which their places were handed out.
//!
//! Two kinds: the one that the programs write by themselves ([`shared`], the usual one), and the kernel's own
//! ([`kernel`]), where the kernel lacks an instruction that the first rests on.

mod kernel;
mod shared;

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use anyhow::{Context as _, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::attach::Programs;

/// How many records are taken before the other side is told, so that it has room again: a few KiB, small against the ring.
const BATCH: usize = 256;

/// The consumer's end of a ring buffer.
pub enum Ring {
    Shared(shared::Ring),
    Kernel(kernel::Ring),
}

impl Ring {
    /// The ring of these programs; it can be taken once.
    pub fn take(programs: &mut Programs) -> Result<Self> {
        match programs.lanes() {
            Some((lanes, size)) => shared::Ring::take(programs, lanes, size).map(Self::Shared),
            None => kernel::Ring::take(programs).map(Self::Kernel),
        }
    }

    /// Whether more than half of the room is taken.
    pub fn is_crowded(&self) -> bool {
        match self {
            Self::Shared(ring) => ring.is_crowded(),
            Self::Kernel(ring) => ring.is_crowded(),
        }
    }

    /// The next record's place in the order of records: behind all that have one by now.
    pub fn end(&self) -> u64 {
        match self {
            Self::Shared(ring) => ring.end(),
            Self::Kernel(ring) => ring.end(),
        }
    }

    /// Up to where records have been taken.
    pub fn position(&self) -> u64 {
        match self {
            Self::Shared(ring) => ring.position(),
            Self::Kernel(ring) => ring.position(),
        }
    }

    /// Hands records to `each`, oldest first and several at a time, up to [`Self::end`] as it was at some time. Ends early at
    /// a record that is still being written. Returns how many there were.
    pub fn drain(&mut self, end: u64, each: impl FnMut(&[&[u8]])) -> u64 {
        match self {
            Self::Shared(ring) => ring.drain(end, each),
            Self::Kernel(ring) => ring.drain(end, each),
        }
    }
}

/// A map's memory, shared with the kernel.
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: memory shared with the kernel, reached only through atomics and through `Ring`'s `&mut self` methods.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(crate) fn new(fd: BorrowedFd<'_>, length: usize, offset: usize, prot: ProtFlags) -> Result<Self> {
        let length_nonzero = NonZeroUsize::new(length).context("empty mapping")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length_nonzero, prot, MapFlags::MAP_SHARED, fd, offset as i64) }
            .context("failed to map the memory of a BPF map")?;
        Ok(Self { start, length })
    }

    /// A word of it, which must be mapped as writable where it is stored to.
    pub(crate) fn word_at(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * size_of::<AtomicU64>() <= self.length, "a word outside of the mapping");
        // SAFETY: within a live mapping, and aligned since the mapping is page aligned.
        unsafe { self.start.cast::<AtomicU64>().add(index).as_ref() }
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the first word of a live mapping, page aligned.
        unsafe { self.start.cast::<AtomicU64>().as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and unmapped once.
        let result = unsafe { munmap(self.start, self.length) };
        debug_assert!(result.is_ok(), "munmap of a mapping of ours");
    }
}

/// Bytes in a page of this host.
pub(crate) fn page_size() -> usize {
    // SAFETY: no arguments that could be wrong.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

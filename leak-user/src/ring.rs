//! Takes records out of the BPF ring buffer, in the order in which the kernel handed out their places.
//!
//! aya's consumer tells the kernel its position after each record. The kernel reads that position at each reservation, so
//! the cache line would travel between the two CPUs once a record; here it is written once a batch. The layout is that of
//! `kernel/bpf/ringbuf.c`: a page with the consumer's position, a page with the producer's, then the data, mapped twice in
//! a row so that a record which wraps around is in one piece.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail};
use aya::maps::Map;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::attach::Programs;

const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const HEADER: u64 = 8;

/// How many records are taken before the kernel is told, so that it has room again: a few KiB, small against the ring.
const BATCH: usize = 256;

/// The consumer's end of a ring buffer.
pub struct Ring {
    consumer: Mapping,
    producer: Mapping,
    data_offset: usize,
    size: u64,
    position: u64,
    /// Keeps the map alive.
    _map: aya::maps::MapData,
}

struct Mapping {
    start: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: memory shared with the kernel, reached only through atomics and through `Ring`'s `&mut self` methods.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, length: usize, offset: usize, prot: ProtFlags) -> Result<Self> {
        let length_nonzero = NonZeroUsize::new(length).context("empty mapping")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length_nonzero, prot, MapFlags::MAP_SHARED, fd, offset as i64) }
            .context("failed to map the ring buffer")?;
        Ok(Self { start, length })
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

impl Ring {
    /// The ring of these programs; it can be taken once.
    pub fn take(programs: &mut Programs, size: u32) -> Result<Self> {
        let Map::RingBuf(map) = programs.take_map("EVENTS")? else { bail!("EVENTS is not a ring buffer") };
        let page = page_size();
        let fd = map.fd().as_fd();
        let consumer = Mapping::new(fd, page, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        let producer = Mapping::new(fd, page + 2 * size as usize, page, ProtFlags::PROT_READ)?;
        let position = consumer.word().load(Ordering::Acquire);
        Ok(Self { consumer, producer, data_offset: page, size: u64::from(size), position, _map: map })
    }

    /// Bytes that wait to be taken.
    pub fn pending(&self) -> u64 {
        self.end().wrapping_sub(self.position)
    }

    /// Where the next record will be put: behind all for which the kernel has handed out a place by now.
    pub fn end(&self) -> u64 {
        self.producer.word().load(Ordering::Acquire)
    }

    /// Up to where records have been taken.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The ring's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Hands records to `each`, oldest first and several at a time, up to [`Self::end`] as it was at some time. Ends early at
    /// a record that is still being written. Returns how many there were.
    pub fn drain(&mut self, end: u64, mut each: impl FnMut(&[&[u8]])) -> u64 {
        let mut records = 0;
        let mut position = self.position;
        let mut batch = Vec::with_capacity(BATCH);
        while position < end {
            batch.clear();
            while batch.len() < BATCH && position < end {
                let Some((record, next)) = self.record_at(position, end) else { break };
                batch.extend(record);
                position = next;
            }
            if position == self.position {
                break;
            }
            each(&batch);
            records += batch.len() as u64;
            // Only now: until then the kernel leaves the records alone.
            self.consumer.word().store(position, Ordering::Release);
            self.position = position;
        }
        records
    }

    /// The record at a position, `None` in its place for a discarded one, and the position after it. Nothing where it is
    /// still being written.
    fn record_at(&self, position: u64, end: u64) -> Option<(Option<&'static [u8]>, u64)> {
        let at = self.data_offset + (position & (self.size - 1)) as usize;
        // SAFETY: at is within the first copy of the data, aligned to eight bytes as all positions are.
        let header = unsafe { self.producer.start.byte_add(at).cast::<AtomicU32>().as_ref() }.load(Ordering::Acquire);
        if header & BUSY != 0 {
            return None;
        }
        let length = u64::from(header & !(BUSY | DISCARD));
        let next = position + HEADER + length.next_multiple_of(8);
        if next > end || length > self.size {
            // The kernel does not write such a header; not to be read past the end if it did.
            return None;
        }
        if header & DISCARD != 0 {
            return Some((None, next));
        }
        // SAFETY: the record lies between consumer and producer position, both copies of the data are mapped, and the
        // kernel does not write there again before `drain` tells it the position; the slice does not leave `drain`.
        let record = unsafe {
            std::slice::from_raw_parts(
                self.producer.start.byte_add(at + HEADER as usize).cast().as_ptr(),
                length as usize,
            )
        };
        Some((Some(record), next))
    }
}

/// Bytes in a page of this host.
pub(crate) fn page_size() -> usize {
    // SAFETY: no arguments that could be wrong.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// The size that a ring of at least `bytes` must have: a power of two and a multiple of the page size.
pub fn ring_size(bytes: u32) -> io::Result<u32> {
    let page = u32::try_from(page_size()).map_err(io::Error::other)?;
    bytes.max(page).checked_next_power_of_two().ok_or_else(|| io::Error::other(format!("a ring of {bytes} bytes")))
}

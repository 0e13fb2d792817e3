//! The kernel's ring buffer, `BPF_MAP_TYPE_RINGBUF`.
//!
//! aya's consumer tells the kernel its position after each record. The kernel reads that position at each reservation, so
//! the cache line would travel between the two CPUs once a record; here it is written once a batch. The layout is that of
//! `kernel/bpf/ringbuf.c`: a page with the consumer's position, a page with the producer's, then the data, mapped twice in
//! a row so that a record which wraps around is in one piece.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail};
use aya::maps::Map;
use nix::sys::mman::ProtFlags;

use super::{BATCH, Mapping, page_size};
use crate::attach::Programs;

const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const HEADER: u64 = 8;

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

impl Ring {
    /// The ring of these programs; it can be taken once.
    pub fn take(programs: &mut Programs) -> Result<Self> {
        let Map::RingBuf(map) = programs.take_map("EVENTS")? else { bail!("EVENTS is not a ring buffer") };
        let (page, size) = (page_size(), map.info()?.max_entries());
        let fd = map.fd().as_fd();
        let consumer = Mapping::new(fd, page, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        let producer = Mapping::new(fd, page + 2 * size as usize, page, ProtFlags::PROT_READ)?;
        let position = consumer.word().load(Ordering::Acquire);
        Ok(Self { consumer, producer, data_offset: page, size: u64::from(size), position, _map: map })
    }

    /// See [`super::Ring::is_crowded`].
    pub fn is_crowded(&self) -> bool {
        self.end().wrapping_sub(self.position) > self.size / 2
    }

    /// Where the next record will be put: behind all for which the kernel has handed out a place by now.
    pub fn end(&self) -> u64 {
        self.producer.word().load(Ordering::Acquire)
    }

    /// Up to where records have been taken.
    pub fn position(&self) -> u64 {
        self.position
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

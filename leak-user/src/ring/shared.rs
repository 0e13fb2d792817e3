//! The ring buffer that the programs write by themselves; its layout is described in [`leak_common::ring`].

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use aya::maps::{Map, MapData};
use leak_common::ring::{COMMITTED, MAX_RECORD, Positions};
use nix::sys::mman::ProtFlags;

use super::{BATCH, Mapping};
use crate::attach::Programs;

const HEADER: u64 = 8;

/// The consumer's end.
pub struct Ring {
    data: Mapping,
    positions: Mapping,
    /// Bytes; a power of two.
    size: u64,
    position: u64,
    /// Keep the maps alive.
    _maps: [MapData; 2],
}

impl Ring {
    /// The ring of these programs; it can be taken once.
    pub fn take(programs: &mut Programs) -> Result<Self> {
        let Map::Array(data) = programs.take_map("RING")? else { bail!("RING is not an array") };
        let Map::Array(positions) = programs.take_map("POSITIONS")? else { bail!("POSITIONS is not an array") };
        let map = |map: &MapData, length| {
            Mapping::new(map.fd().as_fd(), length, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
        };
        let length = data.info()?.value_size() as usize;
        let size = length.saturating_sub(MAX_RECORD) as u64;
        if !size.is_power_of_two() {
            bail!("the ring has {size} bytes, which is no power of two");
        }
        Ok(Self {
            data: map(&data, length)?,
            size,
            positions: map(&positions, size_of::<Positions>())?,
            position: 0,
            _maps: [data, positions],
        })
    }

    fn position_word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: an aligned word of the structure, which is mapped as long as this lives.
        unsafe { self.positions.start.byte_add(offset).cast::<AtomicU64>().as_ref() }
    }

    /// See [`super::Ring::end`].
    pub fn end(&self) -> u64 {
        self.position_word(std::mem::offset_of!(Positions, producer)).load(Ordering::Acquire)
    }

    /// Bytes that wait to be taken.
    pub fn pending(&self) -> u64 {
        self.end().wrapping_sub(self.position)
    }

    /// See [`super::Ring::size`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// See [`super::Ring::position`].
    pub fn position(&self) -> u64 {
        self.position
    }

    /// See [`super::Ring::drain`].
    pub fn drain(&mut self, end: u64, mut each: impl FnMut(&[&[u8]])) -> u64 {
        let mut records = 0;
        let mut batch = Vec::with_capacity(BATCH);
        while self.position < end {
            batch.clear();
            let mut position = self.position;
            while batch.len() < BATCH && position < end {
                let Some(record) = self.record_at(position) else { break };
                position += HEADER + record.len() as u64;
                batch.push(record);
            }
            if position == self.position {
                break;
            }
            each(&batch);
            records += batch.len() as u64;
            self.clear(self.position, position);
            self.position = position;
            // Only now: until then the programs leave the records alone.
            self.position_word(std::mem::offset_of!(Positions, consumer)).store(position, Ordering::Release);
        }
        records
    }

    /// The record at a position; nothing where it is still being written.
    fn record_at(&self, position: u64) -> Option<&'static [u8]> {
        let at = (position & (self.size - 1)) as usize;
        // SAFETY: at is within the ring and aligned to eight bytes, as all positions are.
        let header = unsafe { self.data.start.byte_add(at).cast::<AtomicU64>().as_ref() }.load(Ordering::Acquire);
        let length = header & !COMMITTED;
        // The programs write no other header; not to be read past the end if something did.
        if header & COMMITTED == 0 || length > MAX_RECORD as u64 - HEADER || !length.is_multiple_of(8) {
            return None;
        }
        // SAFETY: the ring is longer than its size by the longest record; the programs do not write there again before the
        // consumer's position has passed it; the slice does not leave `drain`.
        let record = unsafe {
            let start = self.data.start.byte_add(at + HEADER as usize).cast().as_ptr();
            std::slice::from_raw_parts(start, length as usize)
        };
        Some(record)
    }

    /// Sets what lies between two positions to zero, so that whatever is written there next is not taken for complete too early. All at
    /// once: record by record took a good part of the time that taking them does.
    fn clear(&self, from: u64, to: u64) {
        let at = (from & (self.size - 1)) as usize;
        let end = at + (to - from) as usize;
        let size = self.size as usize;
        // SAFETY: whole records that were taken, which nobody reads or writes now. What begins near the ring's end runs on behind it;
        // the rest of that, and the bytes at the front that are left out for it, hold nothing.
        unsafe {
            self.data.start.byte_add(at).cast::<u8>().write_bytes(0, end.min(size + MAX_RECORD) - at);
            self.data.start.cast::<u8>().write_bytes(0, end.saturating_sub(size));
        }
    }
}

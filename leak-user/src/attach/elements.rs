//! Writing many elements of an array map at once (`BPF_MAP_UPDATE_BATCH`, 5.6 for arrays): 70,000 rows take 10 ms instead
//! of 48 (measured). aya has no batches.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd as _;

use anyhow::{Result, bail};
use aya::maps::{Map, MapData};

use super::sys;

/// A type whose bytes are all initialised: `#[repr(C)]` without padding.
///
/// # Safety
/// As the name says.
pub unsafe trait Plain: Copy {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: repr(C) of integers without implicit padding, which its size assertion shows.
unsafe impl Plain for leak_common::unwind::Range {}

/// An array map.
pub struct Elements<T> {
    map: MapData,
    capacity: u32,
    of: PhantomData<T>,
}

impl<T: Plain> Elements<T> {
    /// Takes an array map of elements of this type.
    pub fn take(map: Map) -> Result<Self> {
        match map {
            Map::Array(map) => {
                let capacity = map.info()?.max_entries();
                Ok(Self { map, capacity, of: PhantomData })
            }
            other => bail!("not an array map: {other:?}"),
        }
    }

    /// How many elements there are.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Writes elements from `first` on. All are there before this returns; until then each is either old or new.
    pub fn write(&mut self, first: u32, elements: &[T]) -> io::Result<()> {
        const AT_ONCE: usize = 1 << 16;
        if elements.len() as u64 + u64::from(first) > u64::from(self.capacity) {
            return Err(io::Error::other("the map is too small"));
        }
        let mut at = first;
        for elements in elements.chunks(AT_ONCE) {
            let keys: Vec<u32> = (at..at + elements.len() as u32).collect();
            sys::update_batch(self.map.fd().as_fd(), keys.len(), keys.as_ptr().cast(), elements.as_ptr().cast())?;
            at += elements.len() as u32;
        }
        Ok(())
    }
}

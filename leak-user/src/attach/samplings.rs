//! How each traced process is sampled, told to the programs by a store, and the map of the blocks that are followed where frees
//! are filtered.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData};
use leak_common::Hits;
use leak_common::sampling::{Address, Interval, Sampling};
use nix::sys::mman::ProtFlags;

use super::sys;
use crate::ring::Mapping;

/// Addresses that are given to the kernel, or asked for, with one call.
const AT_ONCE: usize = 4096;

pub struct Samplings {
    words: Mapping,
    hits: Mapping,
    /// Where each process's word stands.
    places: HashMap<u32, u32>,
    capacity: u32,
    addresses: MapData,
    /// How many addresses there is room for.
    most: u32,
    _maps: [MapData; 2],
}

impl super::Programs {
    /// Drops these blocks of a process; says how many were there.
    pub fn drop_addresses(&self, tgid: u32, addresses: &[u64]) -> usize {
        self.samplings.drop_addresses(tgid, addresses)
    }
}

impl Samplings {
    pub fn take(words: Map, hits: Map, addresses: Map) -> Result<Self> {
        let (Map::Array(map), Map::Array(hits_map), Map::HashMap(addresses)) = (words, hits, addresses) else {
            bail!("the maps of settings are of other types");
        };
        let capacity = map.info()?.max_entries();
        let most = addresses.info()?.max_entries();
        let length = capacity as usize * size_of::<u64>();
        let words = Mapping::new(map.fd().as_fd(), length, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        let length = capacity.min(hits_map.info()?.max_entries()) as usize * size_of::<Hits>();
        let hits = Mapping::new(hits_map.fd().as_fd(), length, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        Ok(Self { words, hits, places: HashMap::new(), capacity, addresses, most, _maps: [map, hits_map] })
    }

    fn word(&self, place: u32) -> &AtomicU64 {
        // Places are below the capacity, which is what is mapped.
        self.words.word_at(place as usize)
    }

    /// Where the word of a process stands; a new one says "exact".
    pub fn place(&mut self, tgid: u32) -> io::Result<u32> {
        if let Some(place) = self.places.get(&tgid) {
            return Ok(*place);
        }
        let free = |place: &u32| self.word(*place).load(Ordering::Relaxed) == 0;
        let place =
            (0..self.capacity).find(free).ok_or_else(|| io::Error::other("there is no room for so many processes"))?;
        for hits in self.hit_words(place) {
            hits.store(0, Ordering::Relaxed);
        }
        self.word(place).store(Sampling::new(tgid, Interval::EXACT, false).0, Ordering::Release);
        self.places.insert(tgid, place);
        Ok(place)
    }

    /// From now on the process is sampled so. False where it is not traced.
    pub fn set(&self, tgid: u32, interval: Interval, frees_filtered: bool) -> bool {
        let new = Sampling::new(tgid, interval, frees_filtered);
        self.update(tgid, |before| new.at_attachment(before.attachment()))
    }

    /// The breakpoints of the process are about to be set again: calls in flight when they were removed have ended unseen. False where
    /// it is not traced.
    pub fn attach_again(&self, tgid: u32) -> bool {
        self.update(tgid, |before| before.at_attachment(before.attachment().wrapping_add(1)))
    }

    fn update(&self, tgid: u32, change: impl Fn(Sampling) -> Sampling) -> bool {
        let Some(place) = self.places.get(&tgid) else { return false };
        let _ =
            self.word(*place).fetch_update(Ordering::SeqCst, Ordering::Relaxed, |word| Some(change(Sampling(word)).0));
        true
    }

    pub fn get(&self, tgid: u32) -> Option<Sampling> {
        self.places.get(&tgid).map(|place| Sampling(self.word(*place).load(Ordering::Relaxed)))
    }

    /// The words of a [`Hits`].
    fn hit_words(&self, place: u32) -> [&AtomicU64; 3] {
        [0, 1, 2].map(|word| self.hits.word_at(place as usize * (size_of::<Hits>() / size_of::<u64>()) + word))
    }

    /// How often the process hit breakpoints since it is traced. Each of its threads keeps up to 64 entries back.
    pub fn hits(&self, tgid: u32) -> Option<Hits> {
        let place = *self.places.get(&tgid)?;
        let [entries, returns, stepped] = self.hit_words(place).map(|word| word.load(Ordering::Relaxed));
        Some(Hits { entries, returns, stepped, reserved: 0 })
    }

    /// The process is no longer traced.
    pub fn release(&mut self, tgid: u32) {
        if let Some(place) = self.places.remove(&tgid) {
            self.word(place).store(0, Ordering::Release);
        }
    }

    /// How many addresses there is room for.
    pub fn room(&self) -> u32 {
        self.most
    }

    /// Adds blocks to those that are followed. An error where not all of them have room.
    pub fn keep(&self, tgid: u32, addresses: &[u64], time: u64) -> io::Result<()> {
        for addresses in addresses.chunks(AT_ONCE) {
            let keys: Vec<Address> = addresses.iter().map(|&addr| Address { tgid, reserved: 0, addr }).collect();
            let times = vec![time; keys.len()];
            sys::update_batch(self.addresses.fd().as_fd(), keys.len(), keys.as_ptr().cast(), times.as_ptr().cast())?;
        }
        Ok(())
    }

    /// Drops blocks; says how many were there.
    pub fn drop_addresses(&self, tgid: u32, addresses: &[u64]) -> usize {
        let key = |addr: &u64| Address { tgid, reserved: 0, addr: *addr };
        addresses.iter().filter(|addr| sys::delete(self.addresses.fd().as_fd(), &key(addr)).is_ok()).count()
    }

    /// Every block that is followed, and since when.
    pub fn addresses(&self) -> io::Result<Vec<(Address, u64)>> {
        let mut found = Vec::new();
        let (mut keys, mut times) = (vec![Address { tgid: 0, reserved: 0, addr: 0 }; AT_ONCE], vec![0_u64; AT_ONCE]);
        let mut position = None;
        loop {
            let batch = sys::lookup_batch(
                self.addresses.fd().as_fd(),
                &mut position,
                AT_ONCE,
                keys.as_mut_ptr().cast(),
                times.as_mut_ptr().cast(),
            )?;
            found.extend(keys.iter().copied().zip(times.iter().copied()).take(batch.count));
            if batch.is_last {
                return Ok(found);
            }
        }
    }

    /// Drops the blocks of a process that were allocated before `time`: it has ended, or executed a new program.
    pub fn purge(&self, tgid: u32, time: u64) -> Result<usize> {
        let all = self.addresses().context("failed to read the addresses of sampled blocks")?;
        let old = all.iter().filter(|(address, since)| address.tgid == tgid && *since < time);
        // What is gone meanwhile was freed.
        Ok(old.filter(|(address, _)| sys::delete(self.addresses.fd().as_fd(), address).is_ok()).count())
    }
}

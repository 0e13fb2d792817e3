//! Where the kernel side finds the code of each traced process: extents of the map of ranges, one a process, replaced as a
//! whole.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use leak_common::unwind::{Range, Target};

use super::elements::Elements;

/// The rows of all unwind tables.
pub struct Rows(pub Elements<u64>);

/// Longer than any walk takes: an extent that was replaced is not written to before this has passed.
const QUARANTINE: Duration = Duration::from_secs(1);

/// The extents of the map of ranges.
pub struct Ranges {
    elements: Elements<Range>,
    extents: HashMap<u32, Extent>,
    /// Extents that a walk may still be reading, and since when they are replaced.
    quarantine: Vec<(Extent, Instant)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    first: u32,
    count: u32,
}

impl Ranges {
    pub fn new(elements: Elements<Range>) -> Self {
        Self { elements, extents: HashMap::new(), quarantine: Vec::new() }
    }

    /// Whether a process has any.
    pub fn has(&self, tgid: u32) -> bool {
        self.extents.contains_key(&tgid)
    }

    /// Writes the ranges of a process to a new extent. The result is to be put into the map of targets.
    pub fn replace(&mut self, tgid: u32, ranges: &[Range]) -> io::Result<Target> {
        let now = Instant::now();
        self.quarantine.retain(|(_, since)| now.duration_since(*since) < QUARANTINE);
        let count = ranges.len() as u32;
        let taken = self.extents.values().chain(self.quarantine.iter().map(|(extent, _)| extent));
        let first = first_gap(taken, count, self.elements.capacity())
            .ok_or_else(|| io::Error::other("there is no room for the ranges of so many mappings"))?;
        self.elements.write(first, ranges)?;
        if let Some(old) = self.extents.insert(tgid, Extent { first, count }) {
            self.quarantine.push((old, now));
        }
        Ok(Target { first_range: first, ranges: count, ..Target::default() })
    }

    /// A process is no longer traced.
    pub fn release(&mut self, tgid: u32) {
        if let Some(old) = self.extents.remove(&tgid) {
            self.quarantine.push((old, Instant::now()));
        }
    }
}

/// The lowest place for `count` elements beside those that are taken.
fn first_gap<'a>(taken: impl Iterator<Item = &'a Extent>, count: u32, capacity: u32) -> Option<u32> {
    let mut taken: Vec<Extent> = taken.copied().filter(|extent| extent.count > 0).collect();
    taken.sort_by_key(|extent| extent.first);
    let mut at = 0;
    for extent in taken {
        if extent.first - at >= count {
            return Some(at);
        }
        at = extent.first + extent.count;
    }
    (capacity - at >= count).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first place that is large enough is taken, also at the end; where there is none, nothing.
    #[test]
    fn gaps() {
        let taken = [Extent { first: 8, count: 2 }, Extent { first: 2, count: 3 }, Extent { first: 0, count: 0 }];
        assert_eq!(first_gap(taken.iter(), 2, 20), Some(0));
        assert_eq!(first_gap(taken.iter(), 3, 20), Some(5));
        assert_eq!(first_gap(taken.iter(), 10, 20), Some(10));
        assert_eq!(first_gap(taken.iter(), 11, 20), None);
        assert_eq!(first_gap([].iter(), 20, 20), Some(0));
    }
}

//! Hands out places in the kernel's map of rows, and takes them back.
//!
//! The map has a fixed number of rows, the budget. Each loaded file has adjacent ones, an [`Extent`]. When there is no room,
//! files go that no process has mapped any more, the least recently used first; then, for a file that is new, those that
//! others have ([`Residents::pushed_out`] counts them): a pushed-out file comes back only where there is room, so that processes
//! with more files than the budget do not push each other out for ever.
//!
//! A walk in the kernel may be reading rows while they are taken back. So an extent that is given up stays in quarantine until no
//! process's ranges name it, and then for as long as a walk may take: between two calls of [`Residents::reclaim`].
//!
//! No map is touched here: this is bookkeeping, for any kind of files and processes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;

/// Adjacent rows of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    pub first: u32,
    /// Not zero.
    pub rows: u32,
}

/// Which rows are free.
#[derive(Clone, Debug)]
pub struct Extents {
    capacity: u32,
    /// First row to number of rows; neighbours are one.
    free: BTreeMap<u32, u32>,
}

impl Extents {
    pub fn new(capacity: u32) -> Self {
        Self { capacity, free: (capacity > 0).then_some((0, capacity)).into_iter().collect() }
    }

    /// In all, in rows.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// In rows.
    pub fn free_rows(&self) -> u32 {
        self.free.values().sum()
    }

    /// The smallest piece that is large enough, so that large ones stay for large files.
    pub fn allocate(&mut self, rows: u32) -> Option<Extent> {
        let large_enough = self.free.iter().filter(|&(_, &len)| len >= rows && rows > 0);
        let (&first, &len) = large_enough.min_by_key(|&(_, len)| len)?;
        self.free.remove(&first);
        if len > rows {
            self.free.insert(first + rows, len - rows);
        }
        Some(Extent { first, rows })
    }

    /// Takes back what [`Self::allocate`] gave.
    pub fn release(&mut self, extent: Extent) {
        let Extent { mut first, mut rows } = extent;
        if let Some((&before, &len)) = self.free.range(..first).next_back() {
            assert!(before + len <= first, "rows {first} and on are given back twice");
            if before + len == first {
                self.free.remove(&before);
                (first, rows) = (before, len + rows);
            }
        }
        if let Some((&behind, &len)) = self.free.range(first..).next() {
            assert!(first + rows <= behind, "rows {behind} and on are given back twice");
            if first + rows == behind {
                self.free.remove(&behind);
                rows += len;
            }
        }
        self.free.insert(first, rows);
    }

    fn fits(&self, rows: u32) -> bool {
        self.free.values().any(|&len| len >= rows)
    }
}

/// What became of the wish for rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// The rows belong here.
    Now(Extent),
    /// There will be room some calls of [`Residents::reclaim`] later.
    Later,
    /// Why there is none.
    No(&'static str),
}

/// How room can be made.
enum Plan<K> {
    Now,
    /// By taking out these, none if there is enough in quarantine.
    Later(Vec<K>),
    No(&'static str),
}

const NO_ROOM: &str = "no memory for unwind tables is left";

#[derive(Debug)]
struct Resident<P> {
    extent: Option<Extent>,
    /// Processes that have it mapped.
    users: HashSet<P>,
    /// When it was last used; grows.
    used: u64,
    pushed_out: bool,
    /// It was told that there will be room.
    waiting: bool,
}

/// An extent in quarantine.
#[derive(Clone, Copy, Debug)]
struct GivenUp {
    extent: Extent,
    /// No ranges named it the last time that we looked.
    unnamed: bool,
}

/// Which files have rows in the map, and which processes use them.
#[derive(Debug)]
pub struct Residents<K, P> {
    extents: Extents,
    files: HashMap<K, Resident<P>>,
    quarantine: Vec<GivenUp>,
    /// Extents that the ranges of a process name.
    published: HashMap<P, Vec<Extent>>,
    /// Processes whose ranges name what has been given up.
    stale: HashSet<P>,
    clock: u64,
    pushed_out: u64,
}

impl<K: Clone + Eq + Hash, P: Copy + Eq + Hash> Residents<K, P> {
    /// For a map of so many rows.
    pub fn new(capacity: u32) -> Self {
        Self {
            extents: Extents::new(capacity),
            files: HashMap::new(),
            quarantine: Vec::new(),
            published: HashMap::new(),
            stale: HashSet::new(),
            clock: 0,
            pushed_out: 0,
        }
    }

    /// A process's files are about to be named anew: those of before are used no longer, unless [`Self::used`] says so.
    pub fn begin(&mut self, process: P) {
        self.clock += 1;
        for resident in self.files.values_mut() {
            resident.users.remove(&process);
        }
        self.stale.remove(&process);
    }

    /// These files are not taken out before the next [`Self::begin`]: the process had them, and may have them still.
    pub fn protect<'k>(&mut self, keys: impl IntoIterator<Item = &'k K>)
    where
        K: 'k,
    {
        for key in keys {
            if let Some(resident) = self.files.get_mut(key) {
                resident.used = self.clock;
            }
        }
    }

    /// The process has the file mapped. Until the next [`Self::begin`] it is not taken out.
    pub fn used(&mut self, key: &K, process: P) {
        let used = self.clock;
        let fresh = || Resident { extent: None, users: HashSet::new(), used, pushed_out: false, waiting: false };
        let resident = self.files.entry(key.clone()).or_insert_with(fresh);
        resident.used = used;
        resident.users.insert(process);
    }

    /// Where the file's rows are.
    pub fn extent(&self, key: &K) -> Option<Extent> {
        self.files.get(key)?.extent
    }

    /// Finds room for a file that is used ([`Self::used`]). Rows that it had go to quarantine, but only once there are new ones.
    pub fn place(&mut self, key: &K, rows: u32) -> Placed {
        let plan = self.plan(key, rows);
        if let Some(resident) = self.files.get_mut(key) {
            resident.waiting = matches!(plan, Plan::Later(_));
        }
        match plan {
            Plan::Now => {
                let Some(extent) = self.extents.allocate(rows) else { return Placed::No(NO_ROOM) };
                self.put(key, extent);
                Placed::Now(extent)
            }
            Plan::Later(victims) => {
                for key in &victims {
                    self.take_out(key);
                }
                Placed::Later
            }
            Plan::No(why) => Placed::No(why),
        }
    }

    /// Whether [`Self::place`] would find room at once.
    pub fn has_room(&self, rows: u32) -> bool {
        self.extents.fits(rows)
    }

    fn plan(&self, key: &K, rows: u32) -> Plan<K> {
        let Some(resident) = self.files.get(key) else { return Plan::No("no process uses the file") };
        if rows == 0 {
            return Plan::No("it has no rows");
        }
        if rows > self.extents.capacity {
            return Plan::No("its rows do not fit into the memory for unwind tables");
        }
        // What was freed for another file is not for those that had to make room, or they would take turns for ever.
        let others_wait = || self.files.iter().any(|(k, r)| k != key && r.waiting && !r.users.is_empty());
        if resident.pushed_out && others_wait() {
            return Plan::No(NO_ROOM);
        }
        if self.extents.fits(rows) {
            return Plan::Now;
        }
        // What would be, were all quarantined rows free.
        let mut later = self.extents.clone();
        for &GivenUp { extent, .. } in &self.quarantine {
            later.release(extent);
        }
        // Taking rows away from others for a file that was there before would never end; nor is it done for better rows.
        let may_push = !resident.pushed_out && resident.extent.is_none();
        let mut candidates: Vec<(bool, u64, &K, Extent)> = self
            .files
            .iter()
            .filter(|(_, r)| r.used < self.clock && (r.users.is_empty() || may_push))
            .filter_map(|(key, r)| Some((!r.users.is_empty(), r.used, key, r.extent?)))
            .collect();
        candidates.sort_by_key(|&(in_use, used, ..)| (in_use, used));
        let mut victims = Vec::new();
        for (_, _, key, extent) in candidates {
            if later.fits(rows) {
                break;
            }
            later.release(extent);
            victims.push(key.clone());
        }
        if later.fits(rows) { Plan::Later(victims) } else { Plan::No(NO_ROOM) }
    }

    fn put(&mut self, key: &K, extent: Extent) {
        let Some(resident) = self.files.get_mut(key) else { return };
        resident.pushed_out = false;
        if let Some(old) = resident.extent.replace(extent) {
            self.give_up(old);
        }
    }

    /// Gives up the rows of a file. One that nobody uses is forgotten.
    pub fn take_out(&mut self, key: &K) {
        let Some(resident) = self.files.get_mut(key) else { return };
        let extent = resident.extent.take();
        if resident.users.is_empty() {
            self.files.remove(key);
        } else if extent.is_some() {
            resident.pushed_out = true;
            self.pushed_out += 1;
        }
        if let Some(extent) = extent {
            self.give_up(extent);
        }
    }

    fn give_up(&mut self, extent: Extent) {
        self.quarantine.push(GivenUp { extent, unnamed: false });
        let named = self.published.iter().filter(|(_, extents)| extents.contains(&extent)).map(|(process, _)| *process);
        self.stale.extend(named);
    }

    /// The rows could not be written: they are free again at once, for nobody has been told of them.
    pub fn withdraw(&mut self, key: &K) {
        if let Some(extent) = self.files.get_mut(key).and_then(|resident| resident.extent.take()) {
            self.extents.release(extent);
        }
    }

    /// The ranges of the process now name these extents and no others.
    pub fn publish(&mut self, process: P, extents: Vec<Extent>) {
        self.stale.remove(&process);
        self.published.insert(process, extents);
    }

    /// The process is gone, its ranges too.
    pub fn forget(&mut self, process: P) {
        self.begin(process);
        self.published.remove(&process);
        // Those without rows take no part any more; the others may be of use to the next process.
        self.files.retain(|_, resident| resident.extent.is_some() || !resident.users.is_empty());
    }

    /// Processes whose ranges name rows that have been given up, and have to be made anew.
    pub fn stale(&self) -> Vec<P> {
        self.stale.iter().copied().collect()
    }

    /// To be called now and then, with more time between two calls than any walk takes: frees what is in quarantine and was named by no
    /// process's ranges at the call before. Returns the number of rows freed.
    pub fn reclaim(&mut self) -> u32 {
        let published: HashSet<Extent> = self.published.values().flatten().copied().collect();
        let mut freed = 0;
        self.quarantine.retain_mut(|given_up| {
            let named = published.contains(&given_up.extent);
            let free = given_up.unnamed && !named;
            given_up.unnamed = !named;
            if free {
                self.extents.release(given_up.extent);
                freed += given_up.extent.rows;
            }
            !free
        });
        freed
    }

    /// In all, in rows.
    pub fn capacity(&self) -> u32 {
        self.extents.capacity()
    }

    /// Rows in quarantine.
    pub fn quarantined_rows(&self) -> u32 {
        self.quarantine.iter().map(|given_up| given_up.extent.rows).sum()
    }

    /// Rows that are neither free nor in quarantine.
    pub fn rows(&self) -> u32 {
        self.extents.capacity - self.extents.free_rows() - self.quarantined_rows()
    }

    /// How often a file lost its rows while a process used it.
    pub fn pushed_out(&self) -> u64 {
        self.pushed_out
    }

    /// Whether the file is known.
    pub fn contains(&self, key: &K) -> bool {
        self.files.contains_key(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lets a walk's time pass.
    fn reclaim<K: Clone + Eq + Hash, P: Copy + Eq + Hash>(residents: &mut Residents<K, P>) -> u32 {
        residents.reclaim() + residents.reclaim()
    }

    /// What was taken back can be handed out again as one piece, and the smallest piece that fits is taken.
    #[test]
    fn neighbours_become_one() {
        let mut extents = Extents::new(100);
        let all: Vec<Extent> = (0..4).map(|_| extents.allocate(25).expect("room")).collect();
        assert_eq!(extents.allocate(1), None);
        for i in [0, 2, 1] {
            extents.release(all[i]);
        }
        assert_eq!(extents.allocate(75), Some(Extent { first: 0, rows: 75 }));
        extents.release(Extent { first: 0, rows: 75 });
        extents.allocate(10);
        extents.release(all[3]);
        assert_eq!(extents.allocate(91), None);
        assert_eq!(extents.allocate(0), None);
        assert_eq!(extents.free_rows(), 90);
    }

    /// A file that nobody uses goes first, even if it was used later than one in use.
    #[test]
    fn unused_files_go_first() {
        let mut residents = Residents::new(30);
        for (process, key) in [(1, 'a'), (2, 'b'), (3, 'c')] {
            residents.begin(process);
            residents.used(&key, process);
            let Placed::Now(extent) = residents.place(&key, 10) else { panic!("there is room") };
            residents.publish(process, vec![extent]);
        }
        residents.forget(3);
        residents.begin(4);
        residents.used(&'d', 4);
        assert_eq!(residents.place(&'d', 10), Placed::Later);
        assert_eq!((residents.pushed_out(), residents.quarantined_rows()), (0, 10));
        assert!(!residents.contains(&'c'));
        assert_eq!(reclaim(&mut residents), 10);
        assert_eq!(residents.place(&'d', 10), Placed::Now(Extent { first: 20, rows: 10 }));
    }

    /// Rows of a file in use are taken for a new one, the least recently used first; they are not free before its process's
    /// ranges are made anew; and it does not take them back.
    #[test]
    fn files_in_use_are_pushed_out_once() {
        let mut residents = Residents::new(20);
        for (process, key) in [(1, 'a'), (2, 'b')] {
            residents.begin(process);
            residents.used(&key, process);
            let Placed::Now(extent) = residents.place(&key, 10) else { panic!("there is room") };
            residents.publish(process, vec![extent]);
        }
        residents.begin(3);
        residents.used(&'c', 3);
        assert_eq!(residents.place(&'c', 10), Placed::Later);
        residents.publish(3, Vec::new());
        assert_eq!((residents.pushed_out(), residents.stale()), (1, vec![1]));
        assert_eq!(reclaim(&mut residents), 0, "the first process may still read them");
        residents.begin(1);
        residents.used(&'a', 1);
        assert_eq!(residents.place(&'a', 10), Placed::No(NO_ROOM));
        residents.publish(1, Vec::new());
        assert_eq!((residents.stale(), residents.reclaim()), (vec![], 0));
        assert_eq!(residents.reclaim(), 10, "the first process's ranges did not name them for a walk's time");
        residents.begin(1);
        residents.used(&'a', 1);
        assert_eq!(residents.place(&'a', 10), Placed::No(NO_ROOM), "it is for the third");
        residents.begin(3);
        residents.used(&'c', 3);
        assert_eq!(residents.place(&'c', 10), Placed::Now(Extent { first: 0, rows: 10 }));
        assert_eq!(residents.place(&'a', 10), Placed::No(NO_ROOM), "it is full");
        residents.forget(2);
        residents.begin(1);
        residents.used(&'a', 1);
        assert_eq!(residents.place(&'a', 10), Placed::Later, "what nobody uses goes for it");
        assert_eq!((reclaim(&mut residents), residents.pushed_out()), (10, 1));
        assert_eq!(residents.place(&'a', 10), Placed::Now(Extent { first: 10, rows: 10 }));
        assert_eq!(residents.place(&'c', 21), Placed::No("its rows do not fit into the memory for unwind tables"));
    }

    /// One of the things that may happen.
    #[derive(Clone, Debug)]
    enum Step {
        Refresh { process: u8, files: Vec<(u8, u32)> },
        Forget(u8),
        Reclaim,
    }

    fn step() -> impl Strategy<Value = Step> {
        let file = (0_u8..12, 1_u32..60);
        prop_oneof![
            4 => (0_u8..5, proptest::collection::vec(file, 0..5)).prop_map(|(process, files)| Step::Refresh { process, files }),
            1 => (0_u8..5).prop_map(Step::Forget),
            2 => Just(Step::Reclaim),
        ]
    }

    proptest! {
        /// Whatever is asked for: no two files share rows, no published extent is written by another file, the budget holds, and
        /// when all processes are gone every row can be had again.
        #[test]
        fn no_overlap_and_no_leak(steps in proptest::collection::vec(step(), 1..60)) {
            let mut residents: Residents<u8, u8> = Residents::new(100);
            // Which file's rows each row holds, as the kernel's map would.
            let mut map = [None; 100];
            let mut published: HashMap<u8, Vec<(u8, Extent)>> = HashMap::new();
            for step in steps {
                match step {
                    Step::Refresh { process, files } => {
                        residents.begin(process);
                        let mut named = Vec::new();
                        for (key, rows) in files {
                            residents.used(&key, process);
                            if residents.extent(&key).is_none()
                                && let Placed::Now(extent) = residents.place(&key, rows)
                            {
                                let rows = extent.first as usize..(extent.first + extent.rows) as usize;
                                map[rows].fill(Some(key));
                            }
                            named.extend(residents.extent(&key).map(|extent| (key, extent)));
                        }
                        residents.publish(process, named.iter().map(|(_, extent)| *extent).collect());
                        published.insert(process, named);
                    }
                    Step::Forget(process) => {
                        residents.forget(process);
                        published.remove(&process);
                    }
                    Step::Reclaim => {
                        residents.reclaim();
                    }
                }
                let held: u32 = residents.files.values().filter_map(|r| r.extent).map(|e| e.rows).sum();
                prop_assert_eq!(held, residents.rows());
                for (key, extent) in published.values().flatten() {
                    let rows = extent.first as usize..(extent.first + extent.rows) as usize;
                    prop_assert!(map[rows].iter().all(|row| row == &Some(*key)), "rows of {key} were overwritten");
                }
            }
            for process in 0..5 {
                residents.forget(process);
            }
            let keys: Vec<u8> = residents.files.keys().copied().collect();
            for key in &keys {
                residents.take_out(key);
            }
            reclaim(&mut residents);
            prop_assert_eq!(residents.extents.free_rows(), 100);
            prop_assert_eq!(residents.extents.free.len(), 1);
            prop_assert!(residents.files.is_empty());
        }
    }
}

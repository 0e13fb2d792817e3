//! Who is worth tracing: decides from the resident sets of many processes whose allocators are probed, and for how long.
//!
//! Plain functions of samples, verdicts and time: [`watch`] reads `/proc`, and whoever runs the tracer does what is decided.
//! A process whose memory keeps rising is promoted; it is released once it has proved steady, or once its verdict is
//! settled and another one waits. At most [`Limits::most`] are traced at a time, the fastest growing first.

pub mod watch;

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::detect::ProcessVerdict;
use crate::process::ProcessId;

/// Seconds that memory must have been rising for, one after the other: a fast leak shows soon, a slow one only over longer.
const WINDOWS: [f64; 2] = [20.0, 60.0];
/// Growth through all of so many seconds is worth a look at where it comes from.
const GLANCE: f64 = 10.0;
/// Into so many parts a window is divided; the least of each must be above the least of the one before.
const PARTS: usize = 5;
/// The least rise of one part over the one before, in bytes: a page.
const PART_RISE: u64 = 4096;
/// The least growth over a window that is worth a look, in bytes. It doubles with each time that a process was released.
const LEAST_GROWTH: u64 = 64 << 10;
/// The least growth over a window in terms of what as many steps of the same sizes would give by chance, up or down each: its
/// standard deviation is the root of the sum of their squares. Of random walks few come so far.
const LEAST_DRIFT: f64 = 3.0;
/// Samples that are kept of a process, a second apart.
const SAMPLES: usize = 64;
/// A traced process that has been steady for so many seconds, by its verdict and by its resident set, is released.
const STEADY: f64 = 30.0;
/// What could not be traced within the budget is left alone for so many seconds, and twice as long each time after that.
const TOO_DEAR: f64 = 300.0;
/// A leak that has been known for so many seconds is settled.
const SETTLED: f64 = 120.0;

/// How much may be done at a time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Processes that are traced at a time.
    pub most: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { most: 16 }
    }
}

/// What to do with a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Promote,
    Release,
}

/// What was decided, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub id: ProcessId,
    pub action: Action,
    pub reason: Reason,
}

/// Why a process is traced, or is not any more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reason {
    /// Its memory rose by so much in so many seconds, and is still rising.
    Rising { bytes: u64, seconds: f64 },
    /// It has been steady for so many seconds.
    Steady { seconds: f64 },
    /// That it leaks has been known for so many seconds, and others wait.
    Settled { seconds: f64 },
    /// All are traced.
    All,
    /// It cannot be traced.
    Untraceable { error: String },
    /// It cannot be traced within the budget.
    OverBudget { why: String },
}

/// What is known of one process.
#[derive(Debug, Default)]
struct Track {
    /// Seconds and bytes, oldest first.
    samples: VecDeque<(f64, u64)>,
    /// Since when it is traced, and since when its verdict is what it is.
    traced: Option<Traced>,
    released: u32,
    /// Where its memory stood when it was released last.
    bar: u64,
    /// Until then it is not promoted.
    not_before: f64,
}

#[derive(Debug)]
struct Traced {
    verdict: ProcessVerdict,
    since: f64,
}

/// Growth that was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rise {
    bytes: u64,
    seconds: f64,
}

impl Track {
    /// Whether memory keeps rising, over any of the windows.
    fn rise(&self, now: f64) -> Option<Rise> {
        let least = LEAST_GROWTH << self.released.min(10);
        let last = self.samples.back()?.1;
        let mut rises = WINDOWS.into_iter().filter_map(|window| rise(&self.samples, window, now));
        rises.find(|rise| rise.bytes >= least && last >= self.bar.saturating_add(least))
    }
}

/// Whether memory rose all through the `window` seconds before `now`.
fn rise(samples: &VecDeque<(f64, u64)>, window: f64, now: f64) -> Option<Rise> {
    let start = now - window;
    // A window that is not seen whole says nothing; samples are a second apart.
    if samples.front()?.0 > start + window / (2 * PARTS) as f64 {
        return None;
    }
    let mut floors = [u64::MAX; PARTS];
    let (mut falls, mut squares, mut before) = (false, 0.0, None);
    for &(time, bytes) in samples.iter().filter(|(time, _)| *time >= start) {
        let part = ((time - start) / window * PARTS as f64) as usize;
        let floor = &mut floors[part.min(PARTS - 1)];
        *floor = bytes.min(*floor);
        if let Some(before) = before {
            falls |= bytes < before;
            squares += (bytes as f64 - before as f64).powi(2);
        }
        before = Some(bytes);
    }
    // And it is rising still: what stopped in the last part has its floor there.
    let steps = floors.into_iter().chain(before).collect::<Vec<_>>();
    let rises = steps.windows(2).all(|pair| pair[1] != u64::MAX && pair[1] >= pair[0].saturating_add(PART_RISE));
    let grown = floors[PARTS - 1].saturating_sub(floors[0]);
    // What never falls is no walk, however large its steps.
    let drifts = !falls || grown as f64 >= LEAST_DRIFT * f64::sqrt(squares);
    (rises && drifts).then_some(Rise { bytes: grown, seconds: window })
}

/// All processes that are watched.
#[derive(Debug)]
pub struct Scout {
    limits: Limits,
    tracks: HashMap<ProcessId, Track>,
}

impl Scout {
    pub fn new(limits: Limits) -> Self {
        Self { limits, tracks: HashMap::new() }
    }

    /// A process had so many bytes resident at `time`, in seconds. Times of one process must not go back.
    pub fn sample(&mut self, id: ProcessId, time: f64, bytes: u64) {
        let samples = &mut self.tracks.entry(id).or_default().samples;
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back((time, bytes));
    }

    /// A process has ended, or is not watched any more.
    pub fn forget(&mut self, id: ProcessId) {
        self.tracks.remove(&id);
    }

    /// What is thought of a process that is traced, at `time`.
    pub fn verdict(&mut self, id: ProcessId, verdict: ProcessVerdict, time: f64) {
        if let Some(traced) = self.tracks.get_mut(&id).and_then(|track| track.traced.as_mut())
            && traced.verdict != verdict
        {
            *traced = Traced { verdict, since: time };
        }
    }

    /// A promoted process could not be traced: it is only watched on, until it has grown by more.
    pub fn refuse(&mut self, id: ProcessId) {
        if let Some(track) = self.tracks.get_mut(&id) {
            track.release();
        }
    }

    /// A promoted process costs more than the budget allows: for a while it is only watched on, however fast it grows.
    pub fn too_dear(&mut self, id: ProcessId, time: f64) {
        if let Some(track) = self.tracks.get_mut(&id) {
            track.release();
            track.not_before = time + TOO_DEAR * f64::from(1_u32 << (track.released - 1).min(8));
        }
    }

    /// Processes whose memory rises and of which it is not known what leaks in them, with the growth in bytes a second, the
    /// fastest first.
    pub fn unexplained(&self, time: f64) -> Vec<(ProcessId, f64)> {
        let known =
            |track: &Track| track.traced.as_ref().is_some_and(|traced| traced.verdict == ProcessVerdict::Leaking);
        let rises = |track: &Track| {
            let rise = rise(&track.samples, GLANCE, time).filter(|rise| rise.bytes >= LEAST_GROWTH);
            rise.or_else(|| track.rise(time)).map(|rise| rise.bytes as f64 / rise.seconds)
        };
        let tracks = self.tracks.iter().filter(|(_, track)| !known(track));
        let mut growing: Vec<(ProcessId, f64)> = tracks.filter_map(|(id, track)| Some((*id, rises(track)?))).collect();
        growing.sort_by(|(a, ra), (b, rb)| rb.total_cmp(ra).then_with(|| a.cmp(b)));
        growing
    }

    /// How many are watched, the traced ones included, and how many are traced.
    pub fn counts(&self) -> (usize, usize) {
        (self.tracks.len(), self.traced())
    }

    fn traced(&self) -> usize {
        self.tracks.values().filter(|track| track.traced.is_some()).count()
    }

    /// Growth of a process in bytes a second over what is kept of it, and what it had last.
    pub fn slope(&self, id: ProcessId) -> Option<(f64, u64)> {
        let samples = &self.tracks.get(&id)?.samples;
        let (first, last) = (samples.front()?, samples.back()?);
        let seconds = last.0 - first.0;
        (seconds > 0.0).then(|| ((last.1 as f64 - first.1 as f64) / seconds, last.1))
    }

    /// Decides at `time`; what is decided is taken as done. To be called about once a second.
    pub fn decide(&mut self, time: f64) -> Vec<Decision> {
        let mut decisions = Vec::new();
        for (&id, track) in &mut self.tracks {
            let Some(traced) = &track.traced else { continue };
            let held = time - traced.since;
            let calm =
                matches!(traced.verdict, ProcessVerdict::Stable | ProcessVerdict::Plateau | ProcessVerdict::Spike);
            if calm && held >= STEADY && rise(&track.samples, WINDOWS[0], time).is_none() {
                decisions.push(Decision { id, action: Action::Release, reason: Reason::Steady { seconds: held } });
                track.release();
            }
        }
        let mut waiting: Vec<(ProcessId, Rise)> = self
            .tracks
            .iter()
            .filter(|(_, track)| track.traced.is_none() && time >= track.not_before)
            .filter_map(|(id, track)| Some((*id, track.rise(time)?)))
            .collect();
        waiting.sort_by(|(a, ra), (b, rb)| {
            (rb.bytes as f64 / rb.seconds).total_cmp(&(ra.bytes as f64 / ra.seconds)).then_with(|| a.cmp(b))
        });
        let mut free = self.limits.most.saturating_sub(self.traced());
        self.make_room(waiting.len(), &mut free, time, &mut decisions);
        for (id, rise) in waiting.into_iter().take(free) {
            let track = self.tracks.entry(id).or_default();
            track.traced = Some(Traced { verdict: ProcessVerdict::Warming, since: time });
            let reason = Reason::Rising { bytes: rise.bytes, seconds: rise.seconds };
            decisions.push(Decision { id, action: Action::Promote, reason });
        }
        decisions
    }

    /// Releases processes whose leak is settled where others wait, the longest known first.
    fn make_room(&mut self, waiting: usize, free: &mut usize, time: f64, decisions: &mut Vec<Decision>) {
        if waiting <= *free {
            return;
        }
        let mut settled: Vec<(f64, ProcessId)> = self
            .tracks
            .iter()
            .filter_map(|(id, track)| Some((track.traced.as_ref()?, id)))
            .filter(|(traced, _)| traced.verdict == ProcessVerdict::Leaking && time - traced.since >= SETTLED)
            .map(|(traced, id)| (traced.since, *id))
            .collect();
        settled.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        for (since, id) in settled.into_iter().take(waiting - *free) {
            let reason = Reason::Settled { seconds: time - since };
            decisions.push(Decision { id, action: Action::Release, reason });
            if let Some(track) = self.tracks.get_mut(&id) {
                track.release();
            }
            *free += 1;
        }
    }
}

impl Track {
    fn release(&mut self) {
        self.traced = None;
        self.released += 1;
        self.bar = self.samples.back().map_or(0, |sample| sample.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    const MIB: u64 = 1 << 20;

    /// What costs too much is not promoted again for minutes though it grows by megabytes, and for longer each time.
    #[test]
    fn too_dear_for_a_while() {
        let mut scout = Scout::new(Limits::default());
        let mut promoted = Vec::new();
        for second in 0..1200_u32 {
            let time = f64::from(second);
            scout.sample(id(1), time, u64::from(second) * 10 * MIB);
            if scout.decide(time).iter().any(|decision| decision.action == Action::Promote) {
                promoted.push(time);
                scout.too_dear(id(1), time);
            }
        }
        assert_eq!(promoted.len(), 3, "{promoted:?}");
        assert!(promoted[1] - promoted[0] >= TOO_DEAR && promoted[2] - promoted[1] >= 2.0 * TOO_DEAR, "{promoted:?}");
    }

    fn id(tgid: u32) -> ProcessId {
        ProcessId { tgid, start_time: 1 }
    }

    /// Watches one process for so many seconds; when it was promoted and released.
    fn watch(seconds: u32, mut bytes: impl FnMut(u32) -> u64, verdict: ProcessVerdict) -> Vec<(u32, Action)> {
        let mut scout = Scout::new(Limits::default());
        let mut seen = Vec::new();
        for second in 0..seconds {
            let time = f64::from(second);
            scout.sample(id(1), time, bytes(second));
            scout.verdict(id(1), verdict, time);
            seen.extend(scout.decide(time).into_iter().map(|decision| (second, decision.action)));
        }
        seen
    }

    /// A steady leak is promoted within a minute, from 2 KB/s on, and stays so.
    #[test]
    fn leaks_are_promoted() {
        for rate in [2 << 10, 10 << 10, 100 << 10, 1 << 20, 100 << 20] {
            let seen = watch(300, |second| 50 * MIB + u64::from(second) * rate / 4096 * 4096, ProcessVerdict::Leaking);
            assert_eq!(seen.len(), 1, "{rate}: {seen:?}");
            assert!(seen[0].1 == Action::Promote && seen[0].0 <= 60, "{rate}: {seen:?}");
        }
    }

    /// What holds still, comes and goes, or has grown while it started is not promoted.
    #[test]
    fn others_are_not() {
        let steady = watch(600, |_| 50 * MIB, ProcessVerdict::Warming);
        let sawtooth = watch(600, |second| 50 * MIB + u64::from(second % 13) * MIB, ProcessVerdict::Warming);
        let start = watch(600, |second| 50 * MIB + u64::from(second.min(12)) * 10 * MIB, ProcessVerdict::Warming);
        let noise = watch(600, |second| 50 * MIB + u64::from(second * 7919 % 101) * 4096, ProcessVerdict::Warming);
        for (name, seen) in [("steady", steady), ("sawtooth", sawtooth), ("start", start), ("noise", noise)] {
            assert!(seen.is_empty(), "{name}: {seen:?}");
        }
    }

    /// Of random walks, which rise for a while by chance, few are promoted in five minutes, and all are released again.
    #[test]
    fn random_walks() {
        let (mut promoted, mut left) = (0, 0);
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut at = 50 * MIB;
            let walk = move |_| {
                at = at.saturating_add_signed(rng.random_range(-64..=64) * 4096).max(10 * MIB);
                at
            };
            let seen = watch(300, walk, ProcessVerdict::Stable);
            promoted += usize::from(!seen.is_empty());
            left +=
                usize::from(seen.last().is_some_and(|(second, action)| *action == Action::Promote && *second < 240));
        }
        assert!(promoted <= 10, "{promoted} of 200 random walks are promoted");
        assert_eq!(left, 0, "promoted long ago and not released");
    }

    /// A cache that fills is promoted, released when it is full, and promoted again only if it grows on from there.
    #[test]
    fn released_when_steady() {
        let fills = |second: u32| 50 * MIB + u64::from(second.min(100)) * MIB / 4;
        let seen = watch(400, fills, ProcessVerdict::Stable);
        assert_eq!(seen.iter().map(|(_, action)| *action).collect::<Vec<_>>(), [Action::Promote, Action::Release]);
        assert!(seen[1].0 > 100, "{seen:?}");
        let again = |second: u32| fills(second) + u64::from(second.saturating_sub(200)) * MIB / 4;
        let seen = watch(400, again, ProcessVerdict::Stable);
        assert_eq!(seen.len(), 3, "{seen:?}");
    }

    /// No more than the limit are traced at a time, the fastest first; a settled leak makes room for those who wait.
    #[test]
    fn no_more_than_the_limit() {
        let mut scout = Scout::new(Limits { most: 2 });
        let mut log = Vec::new();
        for second in 0..200_u32 {
            let time = f64::from(second);
            for process in 1..=3 {
                scout.sample(id(process), time, u64::from(second * process) * MIB);
                scout.verdict(id(process), ProcessVerdict::Leaking, time);
            }
            log.extend(scout.decide(time).into_iter().map(|decision| (decision.id.tgid, decision.action)));
            assert!(scout.counts().1 <= 2);
        }
        assert_eq!(log[..2], [(3, Action::Promote), (2, Action::Promote)]);
        assert!(log[2..].contains(&(1, Action::Promote)), "{log:?}");
    }

    /// Who grows is told before it is promoted and while nothing explains it, and no longer once its leak is known.
    #[test]
    fn growth_is_unexplained_until_it_is_known() {
        let mut scout = Scout::new(Limits { most: 1 });
        let mut told = Vec::new();
        for second in 0..60_u32 {
            let time = f64::from(second);
            scout.sample(id(1), time, u64::from(second) * MIB);
            scout.sample(id(2), time, 50 * MIB + u64::from(second % 7) * MIB);
            scout.decide(time);
            if second == 40 {
                scout.verdict(id(1), ProcessVerdict::Leaking, time);
            }
            told.extend(scout.unexplained(time).into_iter().map(|(id, rate)| (second, id.tgid, rate)));
        }
        assert!(told.iter().all(|&(second, tgid, _)| tgid == 1 && (9..=40).contains(&second)), "{told:?}");
        assert!(told.iter().filter(|&&(second, ..)| second > 12).count() > 25, "{told:?}");
        assert!(told.iter().all(|&(_, _, rate)| (rate / MIB as f64 - 1.0).abs() < 0.4), "{told:?}");
    }

    /// Processes that end leave nothing.
    #[test]
    fn ended_processes_are_forgotten() {
        let mut scout = Scout::new(Limits::default());
        for process in 1..10_000 {
            scout.sample(id(process), f64::from(process), 1);
            scout.forget(id(process));
        }
        assert_eq!(scout.counts(), (0, 0));
    }
}

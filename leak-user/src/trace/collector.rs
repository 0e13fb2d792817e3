//! The thread between the ring and everything else: it takes records out by the clock, applies them to the ledger, and
//! tells the tracer of the few that ask for something to be done. It never waits for anybody: while a report is being
//! made, the ring is still emptied.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::BufWriter;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use leak_common::counter;
use tokio::sync::mpsc;

use super::windowed::Windowed;
use crate::decode::{Event, StackEnd, StackId, What, decode};
use crate::governor::windows::Plan;
use crate::ledger::{Ledger, ProcessLedger};
use crate::losses::{Doubt, Losses, Missed, MissedWhat, monotonic_now};
use crate::privileges::Keep;
use crate::process::ProcessId;
use crate::recording::{self, Entry};
use crate::ring::Ring;

/// How long the ring is left alone between two visits. At ten million records of forty bytes a second the default ring
/// would fill in about forty milliseconds.
const PAUSE: Duration = Duration::from_millis(4);

/// The same after a visit that found little: waking up costs more than what it is for, and even the highest rate from one
/// moment to the next leaves half of the ring free in this time.
const IDLE_PAUSE: Duration = Duration::from_millis(16);
/// The same while no process is traced: hardly anything comes then, and a node may have months of it. Ended by [`Collector::wake`].
const SLEEP: Duration = Duration::from_millis(100);
/// Records in a pause that are little.
const LITTLE: u64 = 1000;

/// How often the loss counters are read when nothing hints at a loss.
const COUNTERS_EVERY: Duration = Duration::from_millis(100);

/// How long a record that was begun may take to be finished; its program is preempted at worst.
const UNFINISHED: Duration = Duration::from_millis(200);

/// Something in the stream that asks for more than arithmetic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A stack was seen for the first time: take down where its code is while the process lives.
    Stack { tgid: u32, id: StackId, op: u8, end: StackEnd, frames: Vec<u64> },
    /// A process executed a new program; `tid` is the thread that did.
    Exec { tgid: u32, tid: u32, time: u64 },
    /// A process mapped code.
    MapExec { tgid: u32 },
    /// The first thread of a process ended; others may go on.
    LeaderExit { tgid: u32 },
    /// A process forked, and its child's ledger has begun as a copy of its own. No child: it has ended already.
    Fork { parent: u32, child: Option<ProcessId> },
}

/// What did not come through the ring.
struct Lost {
    /// What was kept aside.
    missed: Vec<Missed>,
    /// Whose frees, or changes of mappings and processes, nothing is known of.
    doubt: Doubt,
}

/// How many notices may wait. Beyond that they are dropped and counted: stacks then get their names later, and the slow
/// sweep finds new mappings.
const NOTICES: usize = 64 << 10;

/// What the collector works on, shared with whoever makes reports.
pub struct Core {
    pub ledger: Ledger,
    pub losses: Losses,
    /// Records taken from the ring.
    pub records: u64,
    /// Records that could not be decoded.
    pub undecodable: u64,
    /// Notices that nobody took in time.
    pub notices_dropped: u64,
    /// How often the kernel removed probes from a process by itself.
    pub probes_dropped: u64,
    /// Processes whose children are traced too; those become such themselves.
    followed: HashSet<u32>,
    /// Processes that are watched in windows: their heap is not in the ledger.
    windowed: HashMap<u32, Windowed>,
    ring: Ring,
    recording: Option<recording::Writer<BufWriter<File>>>,
    /// Why the recording ended early.
    pub recording_error: Option<std::io::Error>,
    notices: mpsc::Sender<Notice>,
    kept_aside: u64,
    counters_read: Instant,
    /// The kernel side's counters when the trace was cut; nothing is taken from the ring after that.
    cut: Option<BTreeMap<String, u64>>,
}

impl Core {
    fn new(
        ledger: Ledger,
        ring: Ring,
        losses: Losses,
        recording: Option<recording::Writer<BufWriter<File>>>,
    ) -> (Self, mpsc::Receiver<Notice>) {
        let (notices, receiver) = mpsc::channel(NOTICES);
        let core = Self {
            ledger,
            losses,
            records: 0,
            undecodable: 0,
            notices_dropped: 0,
            probes_dropped: 0,
            followed: HashSet::new(),
            windowed: HashMap::new(),
            ring,
            recording,
            recording_error: None,
            notices,
            kept_aside: 0,
            counters_read: Instant::now(),
            cut: None,
        };
        (core, receiver)
    }

    /// Tells the ledger something that does not come from the ring.
    pub fn tell(&mut self, entry: Entry<'_>) {
        record(&mut self.recording, &mut self.recording_error, entry);
        recording::apply(&mut self.ledger, entry);
    }

    /// From now on the children of this process are traced too: each one's ledger begins as a copy of its parent's.
    pub fn follow_children(&mut self, tgid: u32) {
        self.followed.insert(tgid);
    }

    /// From `time` on this process is watched in windows. What the ledger holds of its heap is of before, and stays as it is.
    pub fn watch_in_windows(&mut self, tgid: u32, time: u64) {
        self.collect();
        let stacks = self.ledger.process(tgid).into_iter().flat_map(ProcessLedger::stacks);
        self.windowed.insert(tgid, Windowed::new(time, stacks));
    }

    pub fn is_watched_in_windows(&self, tgid: u32) -> bool {
        self.windowed.contains_key(&tgid)
    }

    /// What is known of a process by windows, if it is watched so.
    pub fn windowed(&self, tgid: u32) -> Option<&Windowed> {
        self.windowed.get(&tgid)
    }

    /// All breakpoints of a process stand, and a window begins.
    pub fn open_window(&mut self, tgid: u32, time: u64, plan: Plan) {
        if let Some(windowed) = self.windowed.get_mut(&tgid) {
            windowed.open(time, plan);
        }
    }

    /// The windows of a process have ended by this time; to be called while its breakpoints still stand.
    pub fn close_windows(&mut self, tgid: u32, time: u64) {
        // With the counters: what was lost in this window has to be known before it counts.
        let lost = self.take_lost();
        self.drain(self.ring.end());
        self.apply_lost(lost);
        if let Some(windowed) = self.windowed.get_mut(&tgid) {
            windowed.advance(time);
        }
    }

    /// Forgets a process that is no longer traced.
    pub fn forget(&mut self, tgid: u32) {
        self.windowed.remove(&tgid);
        self.followed.remove(&tgid);
        self.tell(Entry::RemoveProcess { tgid });
    }

    /// The kernel removed probes from a process by itself, and they stand again: what was freed there meanwhile nobody knows.
    pub fn probes_dropped(&mut self, tgid: u32) {
        self.probes_dropped += 1;
        self.collect();
        self.tell(Entry::DistrustProcess { tgid, time: monotonic_now() });
    }

    /// Takes all that is in the ring by now, and what the kernel kept aside while it was full.
    pub fn collect(&mut self) {
        if self.cut.is_some() {
            return;
        }
        if !self.ring.is_crowded() && self.counters_read.elapsed() < COUNTERS_EVERY {
            self.drain(self.ring.end());
            return;
        }
        // First what was lost, then the ring: all records from before a kept free are then applied before it is.
        let lost = self.take_lost();
        self.drain(self.ring.end());
        self.apply_lost(lost);
    }

    /// Takes what was kept aside, and notes of whom something was lost for good.
    fn take_lost(&mut self) -> Lost {
        self.counters_read = Instant::now();
        let kept_aside = self.losses.get(counter::RING_FULL_FREE);
        let doubt = self.losses.doubt();
        let missed = if kept_aside == self.kept_aside { Vec::new() } else { self.losses.drain_missed() };
        self.kept_aside = kept_aside;
        Lost { missed, doubt }
    }

    fn apply_lost(&mut self, lost: Lost) {
        for Missed { tgid, what, time } in lost.missed {
            if let Some(windowed) = self.windowed.get_mut(&tgid) {
                match what {
                    MissedWhat::Free { addr } => windowed.missed_free(time, addr),
                    // Its block stays pending, and is taken for freed.
                    MissedWhat::ReallocEnd { .. } => {}
                }
                continue;
            }
            self.tell(match what {
                MissedWhat::Free { addr } => Entry::MissedFree { tgid, addr, time },
                MissedWhat::ReallocEnd { tid } => Entry::MissedReallocEnd { tgid, tid, time },
            });
        }
        let time = monotonic_now();
        match lost.doubt {
            Doubt::All => {
                self.windowed.values_mut().for_each(Windowed::lose);
                self.tell(Entry::Distrust { time });
            }
            Doubt::Of(processes) => {
                for tgid in processes {
                    self.windowed.get_mut(&tgid).into_iter().for_each(Windowed::lose);
                    self.tell(Entry::DistrustProcess { tgid, time });
                }
            }
        }
    }

    /// The end of the trace, to be called while all probes still stand: takes what has happened by now and nothing that
    /// comes later. The kernel removes breakpoints one by one, so what is seen meanwhile does not fit together: blocks
    /// would come whose release is no longer seen. Up to here, in contrast, every release was.
    pub fn cut(&mut self) {
        if self.cut.is_some() {
            return;
        }
        let end = self.ring.end();
        let start = Instant::now();
        self.drain(end);
        while self.ring.position() < end && start.elapsed() < UNFINISHED {
            std::thread::yield_now();
            self.drain(end);
        }
        // What was kept aside since the ring's end was read is a free too many at worst, never one too few.
        let lost = self.take_lost();
        self.apply_lost(lost);
        self.cut = Some(self.losses.counters());
    }

    /// The kernel side's counters, as of the cut if there was one.
    pub fn kernel_counters(&self) -> BTreeMap<String, u64> {
        self.cut.clone().unwrap_or_else(|| self.losses.counters())
    }

    fn drain(&mut self, end: u64) {
        let Self {
            ring,
            ledger,
            recording,
            recording_error,
            notices,
            undecodable,
            notices_dropped,
            followed,
            windowed,
            ..
        } = self;
        let mut tell = |notice: Notice| *notices_dropped += u64::from(notices.try_send(notice).is_err());
        self.records += ring.drain(end, |batch| {
            let mut decoded: Vec<Event<'_>> = Vec::with_capacity(batch.len());
            for bytes in batch {
                record(recording, recording_error, Entry::Record(bytes));
                let Ok(event) = decode(bytes) else {
                    *undecodable += 1;
                    continue;
                };
                if let Some(notice) = notice(&event) {
                    tell(notice);
                }
                let event = match windowed.get_mut(&event.tgid) {
                    None => event,
                    Some(windowed) => match windowed.take(event) {
                        Some(event) => event,
                        None => continue,
                    },
                };
                decoded.push(event);
                if let What::Fork { child, time, .. } = event.what
                    && followed.contains(&event.tgid)
                {
                    let Ok(id) = ProcessId::current(child) else {
                        tell(Notice::Fork { parent: event.tgid, child: None });
                        continue;
                    };
                    // Before anything else that its parent does, in the order of the ring.
                    ledger.apply_batch(&decoded);
                    decoded.clear();
                    followed.insert(child);
                    let (parent, start_time) = (event.tgid, id.start_time);
                    let entry = Entry::ForkProcess { parent, child, start_time, time };
                    record(recording, recording_error, entry);
                    recording::apply(ledger, entry);
                    tell(Notice::Fork { parent, child: Some(id) });
                }
            }
            ledger.apply_batch(&decoded);
        });
    }

    /// Ends the recording, if there is one.
    pub fn finish_recording(&mut self) -> Result<()> {
        if let Some(error) = self.recording_error.take() {
            return Err(error).context("failed to write the recording");
        }
        match self.recording.take() {
            Some(writer) => writer.finish().map(drop).context("failed to write the recording"),
            None => Ok(()),
        }
    }
}

/// Writes one entry to the recording; after a failure no more.
fn record(
    recording: &mut Option<recording::Writer<BufWriter<File>>>,
    failed: &mut Option<std::io::Error>,
    entry: Entry<'_>,
) {
    if let Some(writer) = recording
        && let Err(error) = writer.write(entry)
    {
        *failed = Some(error);
        *recording = None;
    }
}

fn notice(event: &Event<'_>) -> Option<Notice> {
    let tgid = event.tgid;
    match event.what {
        What::Stack { id, op, end, frames, .. } => {
            Some(Notice::Stack { tgid, id, op, end, frames: frames.iter().collect() })
        }
        What::Exec { tid, time } => Some(Notice::Exec { tgid, tid, time }),
        What::MapExec { .. } => Some(Notice::MapExec { tgid }),
        What::Exit { tid, .. } if tid == tgid => Some(Notice::LeaderExit { tgid }),
        _ => None,
    }
}

/// The running thread; dropping it stops the thread.
pub struct Collector {
    core: Arc<Mutex<Core>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    /// Starts collecting.
    pub fn start(
        ledger: Ledger,
        ring: Ring,
        losses: Losses,
        recording: Option<recording::Writer<BufWriter<File>>>,
    ) -> Result<(Self, mpsc::Receiver<Notice>)> {
        let (core, notices) = Core::new(ledger, ring, losses, recording);
        let core = Arc::new(Mutex::new(core));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("collector".to_owned()).spawn({
            let (core, stop) = (Arc::clone(&core), Arc::clone(&stop));
            move || {
                Keep::Collecting.only();
                let mut before = 0;
                while !stop.load(Ordering::Relaxed) {
                    let (records, sleeps) = {
                        let mut core = lock(&core);
                        core.collect();
                        (core.records, core.ledger.processes().next().is_none())
                    };
                    if sleeps {
                        std::thread::park_timeout(SLEEP);
                    } else {
                        std::thread::sleep(if records - before < LITTLE { IDLE_PAUSE } else { PAUSE });
                    }
                    before = records;
                }
            }
        });
        let thread = thread.context("failed to start the collector thread")?;
        Ok((Self { core, stop, thread: Some(thread) }, notices))
    }

    /// A process is traced from now on: the ring is to be emptied as often as that takes.
    pub fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// The ledger and its counters; the collector waits while this is held.
    pub fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// A collector that panicked leaves its state as it was between two records, which is still true.
fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

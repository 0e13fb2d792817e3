//! Every allocation of a run with its stack, as leaktrace recorded it, and the comparison with what a fixture knows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use leak_user::decode::{StackEnd, What, decode};
use leak_user::recording::{Entry, Reader};
use serde_json::Value;

/// Frames that a record holds at most.
pub const MAX_FRAMES: usize = 127;

/// A stack as the kernel side sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub end: StackEnd,
    /// Return addresses, innermost first.
    pub frames: Vec<u64>,
}

/// What was recorded of some processes.
#[derive(Debug, Default)]
pub struct Recording {
    stacks: HashMap<(u32, u64), Recorded>,
    /// Blocks by process, size and stack.
    allocations: HashMap<(u32, u64, u64), u64>,
}

impl Recording {
    /// Reads what `leaktrace --record FILE` has written.
    pub fn read(file: &Path) -> Result<Self> {
        let open = File::open(file).with_context(|| format!("failed to open {}", file.display()))?;
        let mut reader = Reader::new(open).context("failed to read the recording")?;
        let mut recording = Self::default();
        while let Some(entries) = reader.next_entries().context("failed to read the recording")? {
            for entry in entries {
                let Entry::Record(bytes) = entry.context("failed to read the recording")? else { continue };
                let event = decode(bytes).context("failed to read a record")?;
                match event.what {
                    What::Alloc { size, stack, .. } => {
                        *recording.allocations.entry((event.tgid, size, stack)).or_default() += 1;
                    }
                    What::ReallocEnd { addr, size, stack, .. } if addr != 0 => {
                        *recording.allocations.entry((event.tgid, size, stack)).or_default() += 1;
                    }
                    What::Stack { id, end, frames, .. } => {
                        recording.stacks.insert((event.tgid, id), Recorded { end, frames: frames.iter().collect() });
                    }
                    _ => {}
                }
            }
        }
        Ok(recording)
    }

    /// The stacks from which process `pid` allocated blocks of `size`, and how many blocks.
    pub fn of_size(&self, pid: u32, size: u64) -> Vec<(Option<&Recorded>, u64)> {
        let wanted = self.allocations.iter().filter(|((tgid, bytes, _), _)| (*tgid, *bytes) == (pid, size));
        wanted.map(|((tgid, _, id), count)| (self.stacks.get(&(*tgid, *id)), *count)).collect()
    }

    /// How many allocations, and how many different stacks, ended how. A stack that was lost on the way is `None`.
    pub fn ends(&self) -> BTreeMap<String, (u64, u64)> {
        let mut ends = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for ((tgid, _, id), count) in &self.allocations {
            let end =
                self.stacks.get(&(*tgid, *id)).map_or_else(|| "Lost".to_owned(), |stack| format!("{:?}", stack.end));
            let (allocations, stacks): &mut (u64, u64) = ends.entry(end).or_default();
            *allocations += count;
            *stacks += u64::from(seen.insert((*tgid, *id)));
        }
        ends
    }

    /// Where the complete stacks of process `pid` end: where programs and threads begin, if these are right.
    pub fn outermost(&self, pid: u32) -> BTreeSet<u64> {
        let stacks = self.stacks.iter().filter(|((tgid, _), stack)| *tgid == pid && stack.end.is_complete());
        stacks.filter_map(|(_, stack)| stack.frames.last().copied()).collect()
    }

    /// Stacks that are not complete with their numbers of allocations, most first.
    pub fn incomplete(&self) -> Vec<(&Recorded, u64, u32)> {
        let mut counts: HashMap<(u32, u64), u64> = HashMap::new();
        for ((tgid, _, id), count) in &self.allocations {
            *counts.entry((*tgid, *id)).or_default() += count;
        }
        let stacks = counts.into_iter().filter_map(|(id, count)| Some((self.stacks.get(&id)?, count, id.0)));
        let mut stacks: Vec<_> = stacks.filter(|(stack, ..)| !stack.end.is_complete()).collect();
        stacks.sort_by_key(|(_, count, _)| std::cmp::Reverse(*count));
        stacks
    }
}

/// A stack that a fixture allocated from, as it told it.
#[derive(Debug, Clone)]
pub struct Truth {
    pub name: String,
    pub size: u64,
    /// Frames between the allocator and the innermost frame; negative where that is not known.
    pub inner: i64,
    /// The innermost is another place in the same function.
    pub frames: Vec<u64>,
    /// How many blocks; `None` is one.
    pub blocks: Option<u64>,
}

impl Truth {
    /// From a fixture's answer; several where it answers with a list.
    pub fn read(name: &str, answer: &Value) -> Result<Vec<Self>> {
        let one = |value: &Value| {
            let number = |value: &Value| value.as_u64().with_context(|| format!("not a number in {name}: {value}"));
            let frames = value["frames"].as_array().with_context(|| format!("no frames in {name}: {value}"))?;
            Ok(Self {
                name: name.to_owned(),
                size: number(&value["size"])?,
                inner: value["inner"].as_i64().unwrap_or(0),
                frames: frames.iter().map(number).collect::<Result<_>>()?,
                blocks: value["blocks"].as_u64(),
            })
        };
        match answer {
            Value::Array(all) => all.iter().map(one).collect(),
            value => Ok(vec![one(value)?]),
        }
    }
}

/// What a stack may look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The whole stack, marked as complete; cut and marked where it is deeper than a record can be.
    Whole,
    /// The whole stack, or one that says that it is not.
    WholeOrMarked,
    /// By frame pointers: right as far as it goes, which is at least to `main` or the thread's function.
    FramePointers,
}

/// How many bytes the innermost return address may be away from the one that the fixture took in the same function.
const SAME_FUNCTION: u64 = 512;

/// The stacks that go through a signal's handler.
const SIGNALS: [&str; 6] = ["handler", "altstack", "nested", "fault", "entry", "step"];

/// Why a recorded stack is not the true one, if it is not.
pub fn difference(recorded: &Recorded, truth: &Truth, expected: Expected) -> Option<String> {
    let frames = &recorded.frames;
    let inner = usize::try_from(truth.inner).ok().or_else(|| {
        // As many as are more, which are few or none: the compiler may have inlined them.
        frames.len().checked_sub(truth.frames.len()).filter(|inner| (0..=4).contains(inner))
    });
    let Some(inner) = inner else {
        return Some(format!("{} frames recorded, {} known", frames.len(), truth.frames.len()));
    };
    let whole = inner + truth.frames.len();
    let one_more = |index: usize| {
        let pair = frames.get(inner + index).zip(truth.frames.get(index));
        pair.is_some_and(|(recorded, known)| *recorded == known + 1)
    };
    // leaktrace's addresses are looked up less one, so the two of a signal that are no return addresses are recorded as one
    // more: the trampoline's and the interrupted instruction's, side by side.
    let of_signal = |index: usize| {
        let has_signal = SIGNALS.iter().any(|name| truth.name.starts_with(name));
        has_signal && one_more(index) && (one_more(index + 1) || index.checked_sub(1).is_some_and(one_more))
    };
    let same = frames.iter().skip(inner).zip(&truth.frames).enumerate().take_while(|(index, (recorded, known))| {
        if *index == 0 { known.abs_diff(**recorded) < SAME_FUNCTION } else { recorded == known || of_signal(*index) }
    });
    let right = inner + same.count();
    let wrong = || {
        let at =
            |frames: &[u64], index: usize| frames.get(index).map_or("none".to_owned(), |frame| format!("{frame:#x}"));
        let known =
            truth.frames.get(right.saturating_sub(inner)).map_or("none".to_owned(), |frame| format!("{frame:#x}"));
        Some(format!(
            "{} frames that end {:?}, {whole} known, the first {right} are right, then {} is recorded for {known}",
            frames.len(),
            recorded.end,
            at(frames, right)
        ))
    };
    let is_right = match expected {
        Expected::WholeOrMarked if !recorded.end.is_complete() => true,
        Expected::Whole if whole > MAX_FRAMES => {
            right == MAX_FRAMES && frames.len() == MAX_FRAMES && recorded.end == StackEnd::TooDeep
        }
        Expected::Whole | Expected::WholeOrMarked => {
            right == whole && frames.len() == whole && recorded.end.is_complete()
        }
        // What is outside of main and of a thread's function is libc's.
        Expected::FramePointers => right == frames.len() && right + 3 >= whole.min(MAX_FRAMES),
    };
    if is_right { None } else { wrong() }
}

/// Compares each stack with what was recorded; the differences, a line each, with the mapping of the first wrong frame's caller.
pub fn compare(recording: &Recording, pid: u32, truths: &[(Truth, Expected)]) -> Vec<String> {
    let mut differences = Vec::new();
    for (truth, expected) in truths {
        let found = recording.of_size(pid, truth.size);
        let blocks: u64 = found.iter().map(|(_, count)| count).sum();
        if blocks != truth.blocks.unwrap_or(1) {
            differences
                .push(format!("{}: {blocks} blocks of {} recorded, {:?} known", truth.name, truth.size, truth.blocks));
        }
        for (stack, count) in found {
            let why = match stack {
                Some(stack) => difference(stack, truth, *expected),
                None => Some("the stack was lost".to_owned()),
            };
            if let Some(why) = why {
                differences.push(format!("{} ({count} blocks of {}): {why}", truth.name, truth.size));
            }
        }
    }
    differences
}

/// Fails with all of the differences, and the process's code for reading the addresses.
pub fn ensure_equal(differences: &[String], maps: &str) -> Result<()> {
    let code: String = maps.lines().filter(|line| line.contains("r-x")).fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "  {line}");
        text
    });
    ensure!(differences.is_empty(), "{} differences:\n{}\n{code}", differences.len(), differences.join("\n"));
    Ok(())
}

/// The process's mappings, for messages.
pub fn maps(pid: u32) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/maps")).context("failed to read the mappings")
}

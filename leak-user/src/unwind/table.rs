//! The rows of one file.
//!
//! The entries of a file become one sorted list. Where two cover the same code, the one that begins later is believed, as
//! the search tables of run-time unwinders have it; of two that begin at the same address the first. Code that no entry
//! covers has a row that says so.
//!
//! [`Rows::CallEnds`] keeps only rows that hold the last byte of a call or system call, by a scan of the code that takes for a call
//! whatever looks like one. So **for the last byte of every call the answer is exactly that of all rows**, and nothing is said
//! about other addresses: rows in between vanish into their neighbours, and neighbours that say the same become one. Signal
//! trampolines, which nobody calls, are kept whole.

use super::cfi::{self, Evaluated, Span};
use super::image::{self, Code, Data, Image};
use super::x86_64 as machine;
use leak_common::unwind::{Rule, none, row};
use object::ReadCache;
use std::fs::File;
use std::time::{Duration, Instant};

/// Why a file has no table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    NotElf,
    /// 32-bit, or for another machine than this.
    OtherMachine,
    Malformed(&'static str),
    /// More of this than is worked on.
    TooLarge(&'static str),
    Unreadable(String),
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotElf => write!(f, "not an ELF file"),
            Self::OtherMachine => write!(f, "code for another kind of machine, or 32-bit code"),
            Self::Malformed(what) => write!(f, "malformed ELF file: {what}"),
            Self::TooLarge(what) => write!(f, "too large: {what}"),
            Self::Unreadable(why) => write!(f, "cannot be read: {why}"),
        }
    }
}

impl std::error::Error for Why {}

/// Which rows to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Those that hold the last byte of a call, a system call, or code of a signal trampoline.
    CallEnds,
    /// All: right for every instruction.
    Full,
}

/// What became of the entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes of code.
    pub code: u64,
    /// Rows that the entries distinguish, before any are merged or dropped.
    pub raw_rows: usize,
    /// The same after neighbours that say the same were merged: what [`Rows::Full`] keeps.
    pub all_rows: usize,
    /// Kept rows, by [`leak_common::unwind::cfa`].
    pub by_cfa: [usize; 8],
    /// Kept rows, by [`leak_common::unwind::fp`].
    pub by_fp: [usize; 4],
    /// Kept rows that say that they cannot express what the entry says.
    pub inexpressible: usize,
    /// Entries that could not be read to their end.
    pub malformed: usize,
    /// There was more than is worked on, and the rest is missing.
    pub cut_off: bool,
    /// How long it took to make the table.
    pub duration: Duration,
}

/// How the frames of a file's code are left.
#[derive(Clone, Debug)]
pub struct Table {
    /// The file's lowest address; rows are relative to it.
    pub base: u64,
    /// By address.
    pub code: Vec<Code>,
    pub build_id: Option<Vec<u8>>,
    /// By address, see [`leak_common::unwind::row`].
    pub rows: Vec<u64>,
    /// The rows hold for every instruction, not only for ends of calls.
    pub full: bool,
    /// Code without rows has frame pointers: compiled Go, or by the looks of it in a file without any unwind information.
    pub frame_pointers: bool,
    pub stats: Stats,
}

impl Table {
    /// Reads a file.
    pub fn of_file(file: &File, keep: Rows) -> Result<Self, Why> {
        let cache = ReadCache::new(file);
        Self::of_image(&Image::open(Data::File(&cache, file))?, keep)
    }

    /// Reads an image in memory: the vDSO.
    pub fn of_bytes(bytes: &[u8], keep: Rows) -> Result<Self, Why> {
        Self::of_image(&Image::open(Data::Bytes(bytes))?, keep)
    }

    /// Reads an image that has been opened.
    pub fn of_image(image: &Image, keep: Rows) -> Result<Self, Why> {
        let begun = Instant::now();
        let mut seen = Seen::new(image);
        seen.scan(image)?;
        let mut evaluated = Evaluated::default();
        for frames in &image.frames {
            let believed = evaluated.spans.len();
            cfi::evaluate(&image.code, image.base, frames, &mut evaluated);
            drop_covered(&mut evaluated.spans, believed);
        }
        seen.add_trampolines(&mut evaluated);
        let mut rows = merge(&mut evaluated, &mut seen);
        let all_rows = rows.len();
        if keep == Rows::CallEnds {
            rows = keep_call_ends(&rows, &seen);
        }
        rows.shrink_to_fit();
        let mut stats = Stats {
            code: image.code.iter().map(|c| c.size).sum(),
            raw_rows: evaluated.raw_rows,
            all_rows,
            malformed: evaluated.malformed,
            cut_off: evaluated.cut_off,
            ..Stats::default()
        };
        for rule in rows.iter().map(|&row| Rule(row as u32)) {
            stats.by_cfa[rule.cfa() as usize] += 1;
            stats.by_fp[rule.fp() as usize] += 1;
            stats.inexpressible += usize::from(rule == machine::INEXPRESSIBLE);
        }
        stats.duration = begun.elapsed();
        Ok(Self {
            base: image.base,
            code: image.code.clone(),
            build_id: image.build_id.clone(),
            rows,
            full: keep == Rows::Full,
            frame_pointers: image.go || image.bare_with_frame_pointers,
            stats,
        })
    }

    /// What is taken off an address of a process to get the one in the rows, where the process has mapped the file from
    /// `offset` on at `start`: the row for `pc` is that of `(pc - bias) as u32`. None if the file has no code there.
    pub fn bias_for(&self, start: u64, offset: u64) -> Option<u64> {
        image::bias(&self.code, self.base, start, offset)
    }

    /// Why no frame can be left by the table; none if it has rows.
    pub fn missing(&self) -> Option<&'static str> {
        match (self.rows.is_empty(), self.frame_pointers) {
            (false, _) => None,
            (true, true) => Some("no unwind information, but frame pointers"),
            (true, false) => Some("no unwind information"),
        }
    }
}

/// Sorts the entries by address, and drops those of a section read later that begin in code that an earlier one covers.
fn drop_covered(spans: &mut Vec<Span>, believed: usize) {
    let (before, after) = spans.split_at_mut(believed);
    sort(after);
    let covered = |span: &Span| {
        let behind = before.partition_point(|b| b.start <= span.start);
        behind > 0 && before[..behind].last().is_some_and(|b| span.start < b.end)
    };
    let kept: Vec<Span> = after.iter().filter(|span| !covered(span)).copied().collect();
    spans.truncate(believed);
    spans.extend(kept);
    sort(spans);
}

/// Stable: of those with the same start the first stays first.
fn sort(spans: &mut [Span]) {
    if !spans.is_sorted_by_key(|s| s.start) {
        spans.sort_by_key(|s| s.start);
    }
}

/// One list of all rows, in which each neighbour says something else, and where trampolines are.
fn merge(evaluated: &mut Evaluated, seen: &mut Seen) -> Vec<u64> {
    evaluated.spans.dedup_by_key(|s| s.start);
    let spans = &evaluated.spans;
    let mut rows: Vec<u64> = Vec::with_capacity(evaluated.rows.len() + spans.len() / 8);
    let mut push = |address: u32, rule: Rule| {
        if rows.last().is_none_or(|&last| last as u32 != rule.0) {
            rows.push(row(address, rule));
        }
    };
    let nothing = Rule::none(none::NO_ENTRY);
    let mut covered_to = None;
    for (i, span) in spans.iter().enumerate() {
        let end = spans.get(i + 1).map_or(span.end, |next| span.end.min(next.start));
        match covered_to {
            Some(to) if to < span.start => push(to, nothing),
            // Before the first row there is no entry either.
            _ => {}
        }
        for &row in &evaluated.rows[span.first..span.first + span.count] {
            let address = (row >> 32) as u32;
            if address >= end {
                break;
            }
            push(address, Rule(row as u32));
        }
        if span.signal {
            seen.all_of(span.start, end);
        }
        covered_to = Some(end);
    }
    if let Some(to) = covered_to {
        push(to, nothing);
    }
    rows
}

/// Drops rows that hold no end of a call, and then those that say the same as the one before.
fn keep_call_ends(rows: &[u64], seen: &Seen) -> Vec<u64> {
    let mut kept: Vec<u64> = Vec::with_capacity(rows.len() / 4);
    let mut pieces = Pieces::new(seen);
    for (i, &row) in rows.iter().enumerate() {
        if kept.last().is_some_and(|&last| last as u32 == row as u32) {
            continue;
        }
        let start = (row >> 32) as u32;
        let end = rows.get(i + 1).map_or(u32::MAX, |&next| (next >> 32) as u32);
        if pieces.any(start, end) {
            kept.push(row);
        }
    }
    kept
}

/// A bit for each byte of code: whether a walk can look it up.
struct Bits {
    start: u32,
    /// The address behind it.
    end: u32,
    words: Vec<u64>,
}

impl Bits {
    fn set(&mut self, address: u32) {
        let bit = (address - self.start) as usize;
        self.words[bit / 64] |= 1 << (bit % 64);
    }

    /// Whether a bit is set from `start` up to `end`, which are inside.
    fn any(&self, start: u32, end: u32) -> bool {
        let (first, last) = ((start - self.start) as usize, (end - 1 - self.start) as usize);
        let (low, high) = (!0 << (first % 64), !0 >> (63 - last % 64));
        if first / 64 == last / 64 {
            return self.words[first / 64] & low & high != 0;
        }
        self.words[first / 64] & low != 0
            || self.words[last / 64] & high != 0
            || self.words[first / 64 + 1..last / 64].iter().any(|&word| word != 0)
    }
}

/// The addresses that a walk can look up, less the file's lowest one.
struct Seen {
    /// By address.
    pieces: Vec<Bits>,
    base: u64,
    /// Code that returns from a signal, by its looks.
    trampolines: Vec<(u32, u32)>,
}

/// Trampolines known by their looks that are taken down; a file has one.
const MAX_TRAMPOLINES: usize = 16;

/// How much code is read at a time, in bytes.
const PIECE: usize = 256 << 10;

impl Seen {
    fn new(image: &Image) -> Self {
        let base = image.base;
        let mut pieces: Vec<Bits> = Vec::new();
        for code in &image.code {
            // Segments that overlap are nonsense, but may come.
            let start = pieces.last().map_or(0, |last| last.end).max((code.address - base) as u32);
            let end = (code.end() - base) as u32;
            if start < end {
                pieces.push(Bits { start, end, words: vec![0; ((end - start) as usize).div_ceil(64)] });
            }
        }
        Self { pieces, base, trampolines: Vec::new() }
    }

    fn piece(&mut self, address: u32) -> Option<&mut Bits> {
        self.pieces.iter_mut().find(|p| (p.start..p.end).contains(&address))
    }

    /// Looks for calls in all code.
    fn scan(&mut self, image: &Image) -> Result<(), Why> {
        let mut buffer = vec![0; PIECE + 2 * machine::CONTEXT];
        for code in &image.code {
            let mut at = 0;
            while at < code.size {
                let before = (at as usize).min(machine::CONTEXT);
                let len = PIECE.min((code.size - at) as usize);
                let behind = machine::CONTEXT.min((code.size - at) as usize - len);
                let piece = &mut buffer[..before + len + behind];
                let begin = at - before as u64;
                image.data.copy_to(code.offset + begin, piece)?;
                let is_code = |target| image.relocated_code || image.is_code(target);
                machine::scan(piece, code.address + begin, before..before + len, is_code, self);
                at += len as u64;
            }
        }
        Ok(())
    }

    /// Adds the trampolines known by their looks, where no entry speaks of that code. C libraries other than glibc have none.
    fn add_trampolines(&self, evaluated: &mut Evaluated) {
        let believed = evaluated.spans.len();
        for &(start, end) in &self.trampolines {
            // It is returned to, so looked up at the byte before.
            let start = start.saturating_sub(1);
            let first = evaluated.rows.len();
            evaluated.rows.push(row(start, machine::SIGNAL));
            evaluated.spans.push(Span { start, end, first, count: 1, signal: true });
        }
        drop_covered(&mut evaluated.spans, believed);
    }

    fn all_of(&mut self, start: u32, end: u32) {
        if let Some(piece) = self.piece(start) {
            for address in start..end.min(piece.end) {
                piece.set(address);
            }
        }
    }
}

impl machine::Found for Seen {
    fn call(&mut self, last_byte: u64) {
        let address = (last_byte - self.base) as u32;
        if let Some(piece) = self.piece(address) {
            piece.set(address);
        }
    }

    fn trampoline(&mut self, start: u64, end: u64) {
        if self.trampolines.len() < MAX_TRAMPOLINES {
            self.trampolines.push(((start - self.base) as u32, (end - self.base) as u32));
        }
    }
}

/// Asks for ranges in ascending order.
struct Pieces<'s> {
    left: &'s [Bits],
}

impl<'s> Pieces<'s> {
    fn new(seen: &'s Seen) -> Self {
        Self { left: &seen.pieces }
    }

    /// Whether a walk can look up an address from `start` up to `end`.
    fn any(&mut self, start: u32, end: u32) -> bool {
        while self.left.first().is_some_and(|piece| piece.end <= start) {
            self.left = &self.left[1..];
        }
        let touched = self.left.iter().take_while(|piece| piece.start < end);
        touched.into_iter().any(|piece| {
            let (from, to) = (piece.start.max(start), piece.end.min(end));
            from < to && piece.any(from, to)
        })
    }
}

//! Turns the bytes of a ring buffer record into an [`Event`]. Total: any bytes give an event or an [`Error`], never a
//! panic. What an event means is the ledger's business.

use bytes::Buf;
use leak_common::sampling::Interval;
use leak_common::{MAX_FRAMES, flag, kind, stack_end};

/// Hash of a call stack's return addresses, as the kernel side computed it.
pub type StackId = u64;

/// Why bytes are not an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Fewer bytes than this kind of record has.
    Truncated,
    /// A kind of record that this version does not know.
    UnknownKind(u8),
    /// A stack that claims more frames than there can be, or than the record holds.
    BadFrameCount(u32),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Truncated => write!(f, "truncated record"),
            Self::UnknownKind(kind) => write!(f, "unknown kind of record {kind}"),
            Self::BadFrameCount(count) => write!(f, "stack record of {count} frames"),
        }
    }
}

impl std::error::Error for Error {}

/// Return addresses of a stack record, still as bytes, outermost first as the record has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames<'a>(&'a [u8]);

impl<'a> Frames<'a> {
    /// The addresses, innermost first.
    pub fn iter(self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.0.as_chunks::<8>().0.iter().rev().map(|bytes| u64::from_ne_bytes(*bytes))
    }

    /// From addresses in native byte order, outermost first; a partial last address is cut off. For tests and replays.
    pub fn from_bytes(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
}

/// How a call stack ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackEnd {
    Complete,
    TooDeep,
    BadRead,
    NoFramePointer,
    NoTable,
    NoRow,
    /// A signal interrupted code of which only the rows for calls are loaded.
    Interrupted,
    /// A reason that this version does not know.
    Unknown,
}

impl StackEnd {
    fn from_abi(end: u32) -> Self {
        match end {
            stack_end::COMPLETE => Self::Complete,
            stack_end::TOO_DEEP => Self::TooDeep,
            stack_end::BAD_READ => Self::BadRead,
            stack_end::NO_FRAME_POINTER => Self::NoFramePointer,
            stack_end::NO_TABLE => Self::NoTable,
            stack_end::NO_ROW => Self::NoRow,
            stack_end::INTERRUPTED => Self::Interrupted,
            _ => Self::Unknown,
        }
    }

    /// Whether the outermost frame of the thread was reached.
    pub fn is_complete(self) -> bool {
        self == Self::Complete
    }
}

/// One thing that happened in a traced process. Times are nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The process, in the initial pid namespace.
    pub tgid: u32,
    pub what: What<'a>,
}

/// What happened. The fields are those of the records in `leak_common`, which say what they mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What<'a> {
    Alloc { addr: u64, size: u64, stack: StackId, time: u64, interval: Interval },
    Free { addr: u64, time: u64 },
    ReallocBegin { tid: u32, addr: u64, time: u64 },
    ReallocEnd { tid: u32, addr: u64, size: u64, stack: StackId, time: u64, interval: Interval },
    Stack { id: StackId, end: StackEnd, op: u8, by_frame_pointers: bool, frames: Frames<'a> },
    Map { addr: u64, size: u64, stack: StackId, time: u64, file: bool, in_allocator: bool },
    Unmap { tid: u32, addr: u64, size: u64, time: u64 },
    UnmapFailed { tid: u32 },
    RemapBegin { tid: u32, addr: u64, size: u64, time: u64 },
    RemapEnd { tid: u32, addr: u64, size: u64, stack: StackId, time: u64 },
    Brk { addr: u64, stack: StackId, time: u64, in_allocator: bool },
    Exec { tid: u32, time: u64 },
    Exit { tid: u32, time: u64 },
    Fork { child: u32, time: u64 },
    MapExec { addr: u64, size: u64, time: u64 },
}

/// Reads one record.
pub fn decode(record: &[u8]) -> Result<Event<'_>, Error> {
    let mut r = record;
    if r.len() < 8 {
        return Err(Error::Truncated);
    }
    let kind = r.get_u8();
    let op = r.get_u8();
    let flags = r.get_u16_ne();
    let tgid = r.get_u32_ne();
    // In records of allocations. Every byte is an interval; no interval has another.
    let interval = Interval::from_code(flags as u8);
    let need = |r: &[u8], n: usize| if r.len() < n { Err(Error::Truncated) } else { Ok(()) };
    let what = match kind {
        kind::ALLOC => {
            need(r, 32)?;
            let (addr, size, stack, time) = (r.get_u64_ne(), r.get_u64_ne(), r.get_u64_ne(), r.get_u64_ne());
            What::Alloc { addr, size, stack, time, interval }
        }
        kind::FREE => {
            need(r, 16)?;
            What::Free { addr: r.get_u64_ne(), time: r.get_u64_ne() }
        }
        kind::REALLOC_BEGIN => {
            need(r, 24)?;
            let (addr, time) = (r.get_u64_ne(), r.get_u64_ne());
            What::ReallocBegin { tid: r.get_u32_ne(), addr, time }
        }
        kind::REALLOC_END | kind::REMAP_END => {
            need(r, 40)?;
            let (addr, size, stack, time) = (r.get_u64_ne(), r.get_u64_ne(), r.get_u64_ne(), r.get_u64_ne());
            let tid = r.get_u32_ne();
            if kind == kind::REALLOC_END {
                What::ReallocEnd { tid, addr, size, stack, time, interval }
            } else {
                What::RemapEnd { tid, addr, size, stack, time }
            }
        }
        kind::STACK => {
            need(r, 16)?;
            let id = r.get_u64_ne();
            let count = r.get_u32_ne();
            let end = StackEnd::from_abi(r.get_u32_ne());
            let bytes = usize::try_from(count).ok().filter(|&n| n <= MAX_FRAMES).map(|n| n * 8);
            let frames = bytes.and_then(|n| r.get(..n)).ok_or(Error::BadFrameCount(count))?;
            let by_frame_pointers = flags & flag::FRAME_POINTERS != 0;
            What::Stack { id, end, op, by_frame_pointers, frames: Frames(frames) }
        }
        kind::MAP | kind::BRK | kind::MAP_EXEC => {
            need(r, 32)?;
            let (addr, size, stack, time) = (r.get_u64_ne(), r.get_u64_ne(), r.get_u64_ne(), r.get_u64_ne());
            let in_allocator = flags & flag::IN_ALLOCATOR != 0;
            match kind {
                kind::MAP => What::Map { addr, size, stack, time, file: flags & flag::FILE != 0, in_allocator },
                kind::BRK => What::Brk { addr, stack, time, in_allocator },
                _ => What::MapExec { addr, size, time },
            }
        }
        kind::UNMAP | kind::REMAP_BEGIN => {
            need(r, 32)?;
            let (addr, size, time) = (r.get_u64_ne(), r.get_u64_ne(), r.get_u64_ne());
            let tid = r.get_u32_ne();
            if kind == kind::UNMAP {
                What::Unmap { tid, addr, size, time }
            } else {
                What::RemapBegin { tid, addr, size, time }
            }
        }
        kind::UNMAP_FAILED => {
            need(r, 8)?;
            What::UnmapFailed { tid: r.get_u32_ne() }
        }
        kind::EXEC | kind::EXIT | kind::FORK => {
            need(r, 16)?;
            let (time, tid, other) = (r.get_u64_ne(), r.get_u32_ne(), r.get_u32_ne());
            match kind {
                kind::EXEC => What::Exec { tid, time },
                kind::EXIT => What::Exit { tid, time },
                _ => What::Fork { child: other, time },
            }
        }
        other => return Err(Error::UnknownKind(other)),
    };
    Ok(Event { tgid, what })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Any bytes give an event or an error, never a panic.
        #[test]
        fn total_on_arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = decode(&bytes);
        }

        /// The same with a known kind in front, so that each arm is reached with every length.
        #[test]
        fn total_on_each_kind(kind in 0_u8..32, bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let record: Vec<u8> = std::iter::once(kind).chain(bytes).collect();
            if let Ok(Event { what: What::Stack { frames, .. }, .. }) = decode(&record) {
                prop_assert!(frames.iter().len() <= MAX_FRAMES);
            }
        }
    }

    /// A stack that claims more frames than its record holds is refused, not read past its end.
    #[test]
    fn frame_count_is_checked() {
        let mut record = vec![kind::STACK, 0, 0, 0, 1, 0, 0, 0];
        record.extend_from_slice(&7_u64.to_ne_bytes());
        record.extend_from_slice(&2_u32.to_ne_bytes());
        record.extend_from_slice(&0_u32.to_ne_bytes());
        record.extend_from_slice(&0x1234_u64.to_ne_bytes());
        assert_eq!(decode(&record), Err(Error::BadFrameCount(2)));
        record.extend_from_slice(&0x5678_u64.to_ne_bytes());
        let Ok(Event { tgid: 1, what: What::Stack { id: 7, end: StackEnd::Complete, frames, .. } }) = decode(&record)
        else {
            panic!("a well-formed stack record is an event")
        };
        assert_eq!(frames.iter().collect::<Vec<_>>(), [0x5678, 0x1234]);
    }
}

//! What leaktrace's BPF programs and its user space agree on: the records of the ring buffer, the values of the shared
//! maps and the numbers of the loss counters.
//!
//! Everything here is `#[repr(C)]` with fixed widths and no implicit padding, and a size assertion stands beside each
//! structure. User space never casts bytes to these types: it reads fields with a bounded reader (`leak_user::decode`).
#![no_std]

pub mod ring;
pub mod sampling;
pub mod unwind;

/// Changes whenever a record, a map value or the meaning of a field changes. A recorded stream carries it.
pub const ABI_VERSION: u32 = 3;

/// The most return addresses that a stack record carries.
pub const MAX_FRAMES: usize = 127;

/// What a ring buffer record is about: the first byte of each.
pub mod kind {
    /// [`crate::Alloc`]: an allocation succeeded.
    pub const ALLOC: u8 = 1;
    /// [`crate::Free`]: a block is about to be released.
    pub const FREE: u8 = 2;
    /// [`crate::ReallocBegin`]: a block is about to be resized and may move.
    pub const REALLOC_BEGIN: u8 = 3;
    /// [`crate::ReallocEnd`]: how that ended.
    pub const REALLOC_END: u8 = 4;
    /// [`crate::StackHeader`] and its return addresses: a call stack seen for the first time.
    pub const STACK: u8 = 5;
    /// [`crate::Map`]: a range of pages was mapped.
    pub const MAP: u8 = 6;
    /// [`crate::Unmap`]: a range of pages is about to be unmapped.
    pub const UNMAP: u8 = 7;
    /// [`crate::UnmapEnd`]: an announced `munmap` failed; the range stays as it was.
    pub const UNMAP_FAILED: u8 = 8;
    /// [`crate::Unmap`]: a range of pages is about to be moved or resized by `mremap`.
    pub const REMAP_BEGIN: u8 = 9;
    /// [`crate::RemapEnd`]: how that ended.
    pub const REMAP_END: u8 = 10;
    /// [`crate::Map`]: the program break was moved; `addr` is the new break.
    pub const BRK: u8 = 11;
    /// [`crate::Process`]: a traced process executed a new program.
    pub const EXEC: u8 = 12;
    /// [`crate::Process`]: the leader thread of a traced process ended.
    pub const EXIT: u8 = 13;
    /// [`crate::Process`]: a traced process forked; `other` is the child's thread group.
    pub const FORK: u8 = 14;
    /// [`crate::Map`]: a traced process mapped a file as executable, as `dlopen` does.
    pub const MAP_EXEC: u8 = 15;
}

/// Bits of [`Header::flags`]. In [`Alloc`] and [`ReallocEnd`] it is not bits but the code of the interval that the block was
/// sampled with ([`sampling::Interval`]).
pub mod flag {
    /// A mapping of a file (otherwise it is anonymous).
    pub const FILE: u16 = 1;
    /// The system call was made inside a probed allocator function: the pages are the allocator's, not the program's.
    pub const IN_ALLOCATOR: u16 = 2;
    /// A stack of which some frames were left by their frame pointer although tables are in use: generated code, or
    /// code without unwind information.
    pub const FRAME_POINTERS: u16 = 4;
}

/// The first eight bytes of each record.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// One of [`kind`].
    pub kind: u8,
    /// The allocator function, one of [`op`]; zero where it means nothing.
    pub op: u8,
    /// Bits of [`flag`], or the code of an interval.
    pub flags: u16,
    /// The process (thread group), in the initial pid namespace.
    pub tgid: u32,
}

/// Which shape of allocator function was called: where its arguments are and what its result means. The cookie of a probe is
/// one of these, with [`op::SHIFTED`] where that applies; a record carries it without.
pub mod op {
    /// A size comes first: malloc, valloc, pvalloc, mallocx, operator new.
    pub const MALLOC: u8 = 1;
    /// Two factors: calloc.
    pub const CALLOC: u8 = 2;
    /// The size comes second: `aligned_alloc`, memalign, and what takes a heap and a size.
    pub const ALIGNED: u8 = 3;
    /// Pointer, then size.
    pub const REALLOC: u8 = 4;
    /// Pointer, then two factors.
    pub const REALLOCARRAY: u8 = 5;
    /// Address by reference, alignment, size; the result is an error number.
    pub const POSIX_MEMALIGN: u8 = 6;
    /// The mmap, mremap and brk system calls.
    pub const MAPPING: u8 = 7;
    /// Releases the block that is its first argument: free, sdallocx, operator delete and the like.
    pub const FREE: u8 = 8;
    /// jemalloc's xallocx: pointer, size, extra. The block stays where it is; the result is its real size afterwards, which is
    /// less than the size asked for where that failed.
    pub const XALLOCX: u8 = 9;
    /// As [`REALLOC`], but a block that cannot be resized is released: reallocf.
    pub const REALLOCF: u8 = 10;
    /// Pointer, size until now, alignment, new size: Rust's `__rust_realloc`.
    pub const RUST_REALLOC: u8 = 11;

    /// Releases blocks that it does not name: mimalloc's `mi_heap_destroy`. Which ones is not known, so it counts as a lost free.
    pub const FREE_UNNAMED: u8 = 12;

    /// jemalloc's mallctl: a [`FREE_UNNAMED`] where the name that it is given is that of a reset or the end of an arena.
    pub const CONTROL: u8 = 13;
    /// The same for mallctlbymib, which is given numbers in place of the name.
    pub const CONTROL_BY_MIB: u8 = 14;

    /// No function: a page fault, for a page that the process did not have.
    pub const FAULT: u8 = 15;

    /// The breakpoint is one that the kernel single-steps, which costs many times as much. Only in cookies.
    pub const STEPPED: u8 = 0x80;

    /// All arguments come one later, because the first names a heap (mimalloc's `mi_heap_calloc` and the like).
    pub const SHIFTED: u8 = 0x40;

    /// Whether the function resizes a block that it is given.
    #[must_use]
    #[inline]
    pub const fn resizes(op: u8) -> bool {
        matches!(op, REALLOC | REALLOCARRAY | XALLOCX | REALLOCF | RUST_REALLOC)
    }
}

/// An allocation that succeeded.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Alloc {
    pub header: Header,
    /// Address of the block.
    pub addr: u64,
    /// Bytes asked for.
    pub size: u64,
    /// Hash of the call stack; a [`StackHeader`] with the same id comes earlier in the ring unless it was lost.
    pub stack: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC`, with the resolution of a tick.
    pub time: u64,
}
const _: () = assert!(size_of::<Alloc>() == 40);

/// A block that is about to be released; written before the allocator can hand its address out again.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Free {
    pub header: Header,
    pub addr: u64,
    pub time: u64,
}
const _: () = assert!(size_of::<Free>() == 24);

/// The block at `addr` is in the hands of realloc, called by thread `tid`: neither live nor free.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ReallocBegin {
    pub header: Header,
    pub addr: u64,
    pub time: u64,
    pub tid: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<ReallocBegin>() == 32);

/// How thread `tid`'s realloc ended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ReallocEnd {
    pub header: Header,
    /// The new address. Zero: it failed and the old block is back, unless `size` is zero too: then the block was freed.
    pub addr: u64,
    pub size: u64,
    pub stack: u64,
    pub time: u64,
    pub tid: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<ReallocEnd>() == 48);

/// A call stack; `count` return addresses (u64) follow, outermost first.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StackHeader {
    pub header: Header,
    /// The hash that allocations name.
    pub id: u64,
    /// Number of addresses that follow, at most [`MAX_FRAMES`].
    pub count: u32,
    /// How the stack ended, one of [`stack_end`].
    pub end: u32,
}
const _: () = assert!(size_of::<StackHeader>() == 24);

/// Why a stack ends where it does.
pub mod stack_end {
    /// The outermost frame of the thread was reached.
    pub const COMPLETE: u32 = 0;
    /// More than [`crate::MAX_FRAMES`] frames.
    pub const TOO_DEEP: u32 = 1;
    /// The stack's memory could not be read.
    pub const BAD_READ: u32 = 2;
    /// The frame pointer does not point to an outer frame: the code was built without frame pointers.
    pub const NO_FRAME_POINTER: u32 = 3;
    /// No unwind table is loaded for the code at this address.
    pub const NO_TABLE: u32 = 4;
    /// The table has no row for this address, or one that cannot be followed.
    pub const NO_ROW: u32 = 5;
    /// A signal interrupted code of which only the rows for calls are loaded.
    pub const INTERRUPTED: u32 = 6;
    /// Not the start of a reason: how many there are.
    pub const COUNT: usize = 7;
}

/// A range of pages that was mapped, or, for `BRK`, the new program break in `addr`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Map {
    pub header: Header,
    pub addr: u64,
    pub size: u64,
    pub stack: u64,
    pub time: u64,
}
const _: () = assert!(size_of::<Map>() == 40);

/// A range of pages that thread `tid` is about to unmap, or to move with `mremap`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Unmap {
    pub header: Header,
    pub addr: u64,
    pub size: u64,
    pub time: u64,
    pub tid: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Unmap>() == 40);

/// Thread `tid`'s munmap failed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct UnmapEnd {
    pub header: Header,
    pub tid: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<UnmapEnd>() == 16);

/// How thread `tid`'s mremap ended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RemapEnd {
    pub header: Header,
    /// The new address, or zero: it failed and the old range is back.
    pub addr: u64,
    pub size: u64,
    pub stack: u64,
    pub time: u64,
    pub tid: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<RemapEnd>() == 48);

/// A change in a traced process's life.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Process {
    pub header: Header,
    pub time: u64,
    /// The thread it happened in (before exec gave it the leader's id).
    pub tid: u32,
    /// The child's thread group, for `FORK`.
    pub other: u32,
}
const _: () = assert!(size_of::<Process>() == 24);

/// Slots of the loss and event counters, one per-CPU array of u64.
pub mod counter {
    /// Allocation records that found the ring full.
    pub const RING_FULL_ALLOC: u32 = 0;
    /// Free records, and ends of reallocs, that found the ring full and went to the overflow map.
    pub const RING_FULL_FREE: u32 = 1;
    /// The same that found the overflow map full too, and calls that are a [`crate::op::FREE_UNNAMED`]; each raises the process's epoch.
    pub const FREE_LOST: u32 = 2;
    /// Stack records that found the ring full; they are sent again with the next allocation from that stack.
    pub const RING_FULL_STACK: u32 = 3;
    /// Changes of mappings and processes that found the ring full, or whose thread found no room; each raises the process's epoch.
    pub const RING_FULL_OTHER: u32 = 4;
    /// Calls not followed because the table of threads was full.
    pub const THREADS_FULL: u32 = 5;
    /// Recorded calls that never returned (an exception, longjmp) and were replaced.
    pub const ABANDONED: u32 = 6;
    /// Calls ignored because they were made inside another allocator call.
    pub const NESTED: u32 = 7;
    /// Allocations that failed.
    pub const FAILED: u32 = 8;
    /// Returns that belong to no recorded call.
    pub const UNPAIRED_RETURN: u32 = 9;
    /// Records written.
    pub const RECORDS: u32 = 10;
    /// calloc and reallocarray calls whose product overflows.
    pub const OVERFLOWED: u32 = 11;
    /// The result of `posix_memalign` could not be read.
    pub const BAD_RESULT: u32 = 12;
    /// Frames of stacks that were unwound.
    pub const FRAMES_WALKED: u32 = 13;
    /// Frames that were the same as in the thread's stack before, and were verified instead.
    pub const FRAMES_REUSED: u32 = 14;
    /// Sampled allocations that were not followed because the map of their addresses was full, and the bytes that they stand for:
    /// the interval, or their size where that is more.
    pub const ADDRESSES_FULL: u32 = 20;
    pub const ADDRESSES_FULL_BYTES: u32 = 21;
    /// How many slots there are.
    pub const COUNT: u32 = 24;
}

/// Key of the overflow map: what found the ring full. The value is when that was, nanoseconds of `CLOCK_MONOTONIC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Missed {
    pub tgid: u32,
    /// The thread whose realloc ended; zero: a free.
    pub tid: u32,
    /// The block that was freed; zero for the end of a realloc.
    pub addr: u64,
}
const _: () = assert!(size_of::<Missed>() == 16);

/// Key of the map of page faults: a process, and the hash of a call stack in which it touched new pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageKey {
    pub tgid: u32,
    pub reserved: u32,
    pub stack: u64,
}
const _: () = assert!(size_of::<PageKey>() == 16);

/// How often a traced process hit breakpoints, in an element of a map that user space has mapped. Threads add to it now and then.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Entries of functions, whether or not anything was recorded.
    pub entries: u64,
    /// Returns of functions.
    pub returns: u64,
    /// Those of the entries that were single-stepped.
    pub stepped: u64,
    pub reserved: u64,
}
const _: () = assert!(size_of::<Hits>() == 32);

/// How the kernel side's jiffies become nanoseconds of `CLOCK_MONOTONIC`: jiffies * tick + offset, modulo 2^64.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Nanoseconds of a tick; zero: not calibrated, the clock itself is read.
    pub tick: u64,
    pub offset: u64,
    /// Written by the program that calibrates: jiffies and nanoseconds at one moment.
    pub sampled_jiffies: u64,
    pub sampled_ns: u64,
}
const _: () = assert!(size_of::<Clock>() == 32);

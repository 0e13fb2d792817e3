//! The ring buffer that the programs write by themselves, without a helper call.
//!
//! `BPF_MAP_TYPE_RINGBUF` costs three calls into the kernel, a lock and two atomic operations a record (95 ns of the 200 that
//! an event takes, measured); here a record takes two atomic additions and plain stores. It is memory shared with user space
//! (`BPF_F_MMAPABLE`, 5.5).
//!
//! It has several lanes, each a ring by itself, and a thread writes to the one that its id names: threads that allocate at the same
//! time on different processors would otherwise take the cache lines that they write from each other, which costs more than all the
//! rest of a record. What orders records across lanes is their number, which all threads draw from one counter.
//!
//! A record lies at its position modulo the lane's size: a header word, then the payload, a multiple of eight bytes. It does not
//! wrap around: one that begins near the end runs into the [`MAX_RECORD`] bytes behind it, and the first bytes of the lane
//! are then left out. The header is written last ([`header`]); user space sets all that it has read to zero before it moves the
//! consumer's position, so whatever is not zero has been written. A program may be interrupted between taking its place and taking its
//! number, so within a lane numbers may be out of order.

/// Bytes of the largest ring, all lanes together, and of the smallest; the loader makes it a power of two between them.
pub const RING_SIZE: u64 = 16 << 20;
pub const MIN_RING_SIZE: u64 = 2 * MARGIN;
/// Lanes at most; a power of two. More would leave each too little room for a thread that is busy while user space waits for its turn.
pub const LANES: usize = 4;
/// No record with its header has more bytes than this.
pub const MAX_RECORD: usize = 4096;
/// Programs see a full lane when less than this is left: each may find room at the same moment as others, before any has
/// taken it. Room for sixty of the largest records, thousands of the usual.
pub const MARGIN: u64 = 256 << 10;
/// Set in a header.
pub const COMMITTED: u64 = 1 << 63;
/// The bits of a record's number that its header has; at ten million records a second they last for five months, and then begin anew.
pub const NUMBERS: u64 = (1 << 47) - 1;
/// Bits below the number, which hold the payload's length.
const LENGTH_BITS: u32 = 16;

/// How far a lane is written and read, in bytes since the beginning. Different sides write them, hence on cache lines of their own (on
/// pairs of lines: they are fetched in pairs).
#[repr(C)]
pub struct Lane {
    pub producer: u64,
    pub reserved: [u64; 15],
    pub consumer: u64,
    pub reserved_too: [u64; 15],
}

#[repr(C)]
pub struct Positions {
    /// The next record's number.
    pub next: u64,
    pub reserved: [u64; 31],
    pub lanes: [Lane; LANES],
}
const _: () = assert!(size_of::<Lane>() == 256 && size_of::<Positions>() == 256 * (1 + LANES));

/// The header of a record that is written.
#[inline]
pub const fn header(number: u64, length: u64) -> u64 {
    COMMITTED | (number & NUMBERS) << LENGTH_BITS | length
}

/// Number and length out of a header; `None` where the record is still being written.
#[inline]
pub const fn parse(header: u64) -> Option<(u64, u64)> {
    if header & COMMITTED == 0 {
        return None;
    }
    Some(((header >> LENGTH_BITS) & NUMBERS, header & ((1 << LENGTH_BITS) - 1)))
}

/// Bytes from the beginning of a lane of this size to that of the next.
#[inline]
pub const fn stride(size: u64) -> u64 {
    size + MAX_RECORD as u64
}

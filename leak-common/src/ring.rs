//! The ring buffer that the programs write by themselves, without a helper call.
//!
//! `BPF_MAP_TYPE_RINGBUF` costs three calls into the kernel, a lock and two atomic operations a record (95 ns of the 200 that
//! an event takes, measured); here a record takes one atomic addition to the producer's position and plain stores. It is
//! memory shared with user space (`BPF_F_MMAPABLE`, 5.5).
//!
//! A record lies at its position modulo the ring's size: a header word, then the payload, a multiple of eight bytes. It does not
//! wrap around: one that begins near the end runs into the [`MAX_RECORD`] bytes behind it, and the first bytes of the ring
//! are then left out. The header is written last, and is the payload's length plus [`COMMITTED`]; user space sets all that it has read to
//! zero before it moves the consumer's position, so whatever is not zero has been written.

/// Bytes of the largest ring, and of the smallest; the loader makes it a power of two between them.
pub const RING_SIZE: u64 = 16 << 20;
pub const MIN_RING_SIZE: u64 = 2 * MARGIN;
/// No record with its header has more bytes than this.
pub const MAX_RECORD: usize = 4096;
/// Programs see a full ring when less than this is left: each may find room at the same moment as others, before any has
/// taken it. Room for two hundred of the largest records, thousands of the usual.
pub const MARGIN: u64 = 256 << 10;
/// Set in a header.
pub const COMMITTED: u64 = 1 << 63;

/// How far the ring is written and read, in bytes since the beginning; a page each, since they are written by different sides.
#[repr(C)]
pub struct Positions {
    pub producer: u64,
    pub reserved: [u64; 511],
    pub consumer: u64,
    pub reserved_too: [u64; 511],
}
const _: () = assert!(size_of::<Positions>() == 8192);

//! The call stack of the current thread, hashed; sent whole the first time its hash is seen.
//!
//! Taken at entry, where the caller is at [sp]: at return, the return probe's trampoline stands there. The walk follows
//! the frame pointers, and reads the stack in pieces: `bpf_probe_read_user` takes about 40 ns for 8 bytes and 52 for
//! 1024. A piece ends with its page, because a read that runs into an absent page is many times slower.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};
use leak_common::{MAX_FRAMES, StackHeader, counter, kind, stack_end};

use crate::emit::header;
use crate::maps::{EVENTS, SEEN, SEEN_SETS, SEEN_WAYS, count, generation};
use crate::regs::Frame;
use crate::thread::Thread;

/// Most bytes that are read at once.
const PIECE: u64 = 1024;
const PAGE: u64 = 4096;
/// A frame record: saved frame pointer, return address.
const RECORD: u64 = 16;

/// The walk's state and its buffers. In the thread's map value: neither fits on the BPF stack, and the verifier follows
/// a loop over a map value far more cheaply than one over registers.
#[repr(C)]
pub struct Walk {
    /// Address of the first byte in `piece`.
    base: u64,
    /// How many bytes of `piece` are valid.
    length: u64,
    /// Frame pointer to follow next.
    fp: u64,
    /// An outer frame's record lies at or above this address.
    above: u64,
    hash: u64,
    /// What is sent: the header and the addresses, in one piece.
    record: StackHeader,
    /// One more than is ever sent, so that the index is a plain mask.
    frames: [u64; MAX_FRAMES + 1],
    /// Sixteen bytes more than are ever read, so that a masked offset of the last byte still holds a record.
    piece: [u8; (PIECE + RECORD) as usize],
}

/// Not an end: the walk goes on.
const RUNNING: u32 = u32::MAX;

struct Context {
    walk: *mut Walk,
}

impl Walk {
    /// The innermost address of the last stack.
    #[inline(always)]
    pub fn caller(&self) -> u64 {
        self.frames[0]
    }
}

/// Multiplicative hashing with a fold; the constant is 2^64 over the golden ratio (Knuth, TAOCP 3, 6.4).
#[inline(always)]
fn mix(hash: u64, value: u64) -> u64 {
    let hash = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ (hash >> 29)
}

/// Reads the piece that starts at `address`.
#[inline(always)]
fn read_piece(walk: &mut Walk, address: u64) -> bool {
    let to_page_end = PAGE - (address & (PAGE - 1));
    // A record that straddles two pages is read for itself.
    let length = if to_page_end < RECORD {
        RECORD
    } else if to_page_end < PIECE {
        to_page_end
    } else {
        PIECE
    };
    walk.base = address;
    // SAFETY: length is at most PIECE, which piece holds; a bad address is an error result.
    let result = unsafe {
        bpf_probe_read_user(walk.piece.as_mut_ptr().cast::<c_void>(), length as u32, address as *const c_void)
    };
    walk.length = if result == 0 { length } else { 0 };
    result == 0
}

/// The eight bytes at offset `at` of the piece.
#[inline(always)]
fn word(walk: &Walk, at: u64) -> u64 {
    let at = (at & (PIECE - 1)) as usize;
    // SAFETY: at is below PIECE, and piece is RECORD bytes longer than that.
    unsafe { walk.piece.as_ptr().add(at).cast::<u64>().read_unaligned() }
}

/// How many frame pointers one call of [`step`] follows: a call costs more than a frame.
const FRAMES_A_STEP: u32 = 4;

/// Follows some frame pointers: 0 to go on, 1 at the end.
#[inline(never)]
extern "C" fn step(_index: u64, context: *mut Context) -> i64 {
    // SAFETY: bpf_loop passes on the pointer that `walk` gave it, and walk points into a map value.
    let walk = unsafe { &mut *(*context).walk };
    let mut fp = walk.fp;
    let mut above = walk.above;
    let mut hash = walk.hash;
    let mut count = walk.record.count;
    let mut end = RUNNING;
    for _ in 0..FRAMES_A_STEP {
        if fp < above || fp & 7 != 0 {
            // The ABI sets rbp to zero in the outermost frame (System V psABI x86-64, 3.4.1).
            end = if fp == 0 { stack_end::COMPLETE } else { stack_end::NO_FRAME_POINTER };
            break;
        }
        let mut at = fp.wrapping_sub(walk.base);
        if at >= PIECE || at + RECORD > walk.length {
            if !read_piece(walk, fp) {
                end = stack_end::BAD_READ;
                break;
            }
            at = 0;
        }
        let next = word(walk, at);
        let pc = word(walk, at + 8);
        if pc == 0 {
            end = stack_end::COMPLETE;
            break;
        }
        if count >= MAX_FRAMES as u32 {
            end = stack_end::TOO_DEEP;
            break;
        }
        walk.frames[count as usize & MAX_FRAMES] = pc;
        count += 1;
        hash = mix(hash, pc);
        above = fp.wrapping_add(RECORD);
        fp = next;
    }
    walk.fp = fp;
    walk.above = above;
    walk.hash = hash;
    walk.record.count = count;
    walk.record.end = end;
    i64::from(end != RUNNING)
}

/// Takes the stack of `thread` from `frame` and returns its hash; user space has been sent the stack, or will be with
/// the next allocation from it if the ring was full. With `at_entry` the innermost address is the one at [sp] (the
/// frame is that of a function's first instructions), otherwise it is the pc.
#[inline(always)]
pub fn take(thread: &mut Thread, frame: Frame, at_entry: bool, op: u8) -> u64 {
    let walk = &mut thread.walk;
    let mut hash = mix(generation(), u64::from(thread.tgid));
    walk.record.count = 0;
    walk.record.end = RUNNING;
    walk.above = frame.sp;
    walk.fp = frame.fp;
    let readable = read_piece(walk, frame.sp & !7);
    if !at_entry || readable {
        let first = if at_entry { word(walk, 0) } else { frame.pc };
        walk.frames[0] = first;
        hash = mix(hash, first);
        walk.record.count = 1;
    }
    walk.hash = hash;
    if readable {
        let mut context = Context { walk };
        // SAFETY: the callback has the signature that bpf_loop wants, and the context outlives the call.
        unsafe {
            bpf_loop(
                (MAX_FRAMES as u32).div_ceil(FRAMES_A_STEP),
                step as *mut c_void,
                (&raw mut context).cast::<c_void>(),
                0,
            );
        }
    } else {
        walk.record.end = stack_end::BAD_READ;
    }
    let hash = thread.walk.hash ^ u64::from(thread.walk.record.end);
    if hash != thread.last_stack && publish(thread, hash, op) {
        thread.last_stack = hash;
    }
    hash
}

/// Sends the stack unless user space has it. True once user space has it.
#[inline(never)]
fn publish(thread: &mut Thread, hash: u64, op: u8) -> bool {
    let Some(set) = SEEN.get_ptr_mut((hash as u32) & (SEEN_SETS - 1)) else {
        return false;
    };
    // SAFETY: a valid map value. Other CPUs may write it at the same time; each way is one aligned u64, so what is read
    // is some hash that was sent, or zero.
    let set = unsafe { &mut *set };
    for known in set.iter() {
        if *known == hash {
            return true;
        }
    }
    let walk = &mut thread.walk;
    walk.record.header = header(kind::STACK, op, 0, thread.tgid);
    walk.record.id = hash;
    let frames = u64::from(walk.record.count) & (MAX_FRAMES as u64);
    let bytes = size_of::<StackHeader>() as u64 + frames * 8;
    // SAFETY: record and frames are adjacent (both are multiples of eight bytes in a repr(C) structure) and hold at
    // least that many bytes.
    let sent = unsafe {
        aya_ebpf::helpers::generated::bpf_ringbuf_output(
            (&raw const EVENTS).cast_mut().cast::<c_void>(),
            (&raw mut walk.record).cast::<c_void>(),
            bytes,
            u64::from(BPF_RB_NO_WAKEUP),
        )
    };
    if sent != 0 {
        count(counter::RING_FULL_STACK);
        return false;
    }
    // Marked only now that it is in the ring. Which way is displaced does not matter.
    set[(hash >> 62) as usize & (SEEN_WAYS - 1)] = hash;
    true
}

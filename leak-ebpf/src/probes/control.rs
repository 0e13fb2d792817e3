//! jemalloc's mallctl: which of its calls release blocks without naming them.
//!
//! `arena.N.reset` and `arena.N.destroy` release all blocks of an arena (jemalloc(3)). By name they are recognised exactly. By
//! numbers they are recognised by what jemalloc 5 has for them: three numbers, of which the last is 3 or 4 (`arena_i_node`,
//! <https://github.com/jemalloc/jemalloc/blob/5.3.0/src/ctl.c>), and no value that goes in or out. What else is asked for like this,
//! `arena.N.purge`, `arena.N.decay` and `thread.tcache.flush`, ends in another number. jemalloc 4 has 2 for its reset, which is the
//! purge of version 5: there only the name tells.

use aya_ebpf::helpers::bpf_probe_read_user;
use aya_ebpf::helpers::generated::bpf_probe_read_user_str;
use aya_ebpf::programs::ProbeContext;
use leak_common::op;

/// Digits of the largest number that an arena can have.
const DIGITS: u64 = 10;

const PREFIX: &[u8; 6] = b"arena.";
const RESET: [u64; 2] = [u64::from_ne_bytes(*b".reset\0\0"), 0];
const DESTROY: [u64; 2] = [u64::from_ne_bytes(*b".destroy"), 0];

/// The same numbers for reset and destroy.
const RESET_NUMBER: u64 = 3;
const DESTROY_NUMBER: u64 = 4;

/// The first bytes of a string of the process; what is behind its end, or cannot be read, is zero.
#[inline(always)]
fn start_of(string: u64) -> [u64; 2] {
    let mut text = [0_u64; 2];
    // SAFETY: the buffer is as long as said; a bad address is an error result. The last byte is the string's end.
    unsafe { bpf_probe_read_user_str((&raw mut text).cast(), size_of_val(&text) as u32, string as *const _) };
    text
}

/// Whether this call, of the function that `shape` tells, releases blocks that it does not name.
#[inline(always)]
pub fn releases(ctx: &ProbeContext, shape: u8) -> bool {
    let argument = |n: usize| ctx.arg::<u64>(n).unwrap_or(0);
    match shape {
        op::CONTROL => names_release(argument(0)),
        op::CONTROL_BY_MIB => {
            // mib, its length, old value and its length, new value.
            if argument(1) != 3 || argument(2) != 0 || argument(3) != 0 || argument(4) != 0 {
                return false;
            }
            // SAFETY: a bad address is an error result.
            let last = unsafe { bpf_probe_read_user((argument(0) + 16) as *const u64) }.unwrap_or(0);
            last == RESET_NUMBER || last == DESTROY_NUMBER
        }
        _ => false,
    }
}

/// Whether the string is `arena.N.reset` or `arena.N.destroy`.
#[inline(never)]
fn names_release(name: u64) -> bool {
    let length = PREFIX.len();
    let mut prefix = [0_u8; 8];
    prefix[..length].copy_from_slice(PREFIX);
    if start_of(name)[0] & ((1 << (8 * length)) - 1) != u64::from_ne_bytes(prefix) {
        return false;
    }
    for digits in 1..=DIGITS {
        let rest = start_of(name + length as u64 + digits);
        if rest == RESET || rest == DESTROY {
            return true;
        }
    }
    false
}

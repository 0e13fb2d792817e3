//! Loops of many steps.
//!
//! `bpf_loop` (5.17) has its callback verified once, however often it runs. Where the kernel lacks it, the same callbacks are
//! called from plain loops, which the verifier follows step by step. That is too much for a whole stack: there a program
//! leaves four frames and calls itself anew ([`crate::stack::go_on`]). arm64 before 6.0 has no such calls for programs that have
//! functions; there plain loops have to do, which they can for frame pointers but not for tables.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;

use crate::maps::has_loop;

/// Calls `callback` until it answers other than zero, at most `STEPS` times.
#[inline(always)]
pub fn repeat<const STEPS: u32, T>(callback: unsafe extern "C" fn(u64, *mut T) -> i64, context: *mut T) {
    if has_loop() {
        // SAFETY: the callback has the signature that bpf_loop wants, and the caller's context outlives the call.
        unsafe {
            bpf_loop(STEPS, callback as *mut c_void, context.cast::<c_void>(), 0);
        }
        return;
    }
    for index in 0..u64::from(STEPS) {
        // SAFETY: as above.
        if unsafe { callback(index, context) } != 0 {
            return;
        }
    }
}

//! Registers, as `pt_regs` holds them on each architecture.

use aya_ebpf::bindings::pt_regs;

/// What a stack walk starts from.
#[derive(Clone, Copy)]
pub struct Frame {
    pub pc: u64,
    pub sp: u64,
    pub fp: u64,
    /// What a function that just returned has returned.
    pub result: u64,
}

#[cfg(bpf_target_arch = "x86_64")]
mod arch {
    use super::{Frame, pt_regs};

    /// Bytes that `ret` takes off the stack: at a return probe sp is this much above sp at entry.
    pub const RETURN_POPS: u64 = 8;

    #[inline(always)]
    pub fn frame(regs: &pt_regs) -> Frame {
        // Volatile, and so one load each: LLVM would otherwise address some of them from others, which the verifier does not
        // allow for a program's context.
        // SAFETY: fields of a live structure.
        unsafe {
            Frame {
                pc: core::ptr::read_volatile(&raw const regs.rip),
                sp: core::ptr::read_volatile(&raw const regs.rsp),
                fp: core::ptr::read_volatile(&raw const regs.rbp),
                result: core::ptr::read_volatile(&raw const regs.rax),
            }
        }
    }

    /// The first, second, ... argument of a system call; not those of a function (rcx is r10 here).
    #[inline(always)]
    pub fn syscall_args(regs: &pt_regs) -> [u64; 5] {
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8]
    }

    /// The number of the system call that these registers were saved for.
    ///
    /// # Safety
    /// The verifier must know the pointer as one to `pt_regs`.
    #[inline(always)]
    pub unsafe fn syscall_number(regs: *const pt_regs) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { core::ptr::read_volatile(&raw const (*regs).orig_rax) }
    }

    pub mod nr {
        pub const MMAP: u64 = 9;
        pub const MUNMAP: u64 = 11;
        pub const BRK: u64 = 12;
        pub const MREMAP: u64 = 25;
    }
}

pub use arch::*;

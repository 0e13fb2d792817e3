//! Registers, as `pt_regs` holds them on each architecture.

/// What a stack walk starts from.
#[derive(Clone, Copy)]
pub struct Frame {
    pub pc: u64,
    pub sp: u64,
    pub fp: u64,
    /// At a function's entry the address that it returns to, where that is in a register (see [`LINK_REGISTER`]).
    pub link: u64,
    /// What a function that just returned has returned.
    pub result: u64,
}

#[cfg(bpf_target_arch = "x86_64")]
mod arch {
    pub use aya_ebpf::bindings::pt_regs as Registers;
    use aya_ebpf::helpers::bpf_probe_read_kernel;

    use super::Frame;

    /// Whether a call leaves the return address in a register; otherwise it is at [sp].
    pub const LINK_REGISTER: bool = false;

    /// Bytes that `ret` takes off the stack: at a return probe sp is this much above sp at entry.
    pub const RETURN_POPS: u64 = 8;

    #[inline(always)]
    pub fn frame(regs: &Registers) -> Frame {
        // Volatile, and so one load each: LLVM would otherwise address some of them from others, which the verifier does not
        // allow for a program's context.
        // SAFETY: fields of a live structure.
        unsafe {
            Frame {
                pc: core::ptr::read_volatile(&raw const regs.rip),
                sp: core::ptr::read_volatile(&raw const regs.rsp),
                fp: core::ptr::read_volatile(&raw const regs.rbp),
                link: 0,
                result: core::ptr::read_volatile(&raw const regs.rax),
            }
        }
    }

    /// The first four arguments of a function; volatile as above.
    #[inline(always)]
    pub fn arguments(regs: &Registers) -> [u64; 4] {
        // SAFETY: fields of a live structure.
        unsafe {
            [
                core::ptr::read_volatile(&raw const regs.rdi),
                core::ptr::read_volatile(&raw const regs.rsi),
                core::ptr::read_volatile(&raw const regs.rdx),
                core::ptr::read_volatile(&raw const regs.rcx),
            ]
        }
    }

    /// The first, second, ... argument of the system call (not of a function: r10 is rcx there) that the registers at this
    /// address of the kernel's were saved for, and the frame it was made in.
    #[inline(always)]
    pub fn system_call(registers: u64) -> Option<([u64; 5], Frame)> {
        // SAFETY: a bad address is an error result.
        let regs = unsafe { bpf_probe_read_kernel(registers as *const Registers) }.ok()?;
        Some(([regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8], frame(&regs)))
    }

    /// The number of the system call that these registers were saved for.
    ///
    /// # Safety
    /// The verifier must know the pointer as one to `pt_regs`.
    #[inline(always)]
    pub unsafe fn syscall_number(regs: *const Registers) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { core::ptr::read_volatile(&raw const (*regs).orig_rax) }
    }

    /// The address of code in a word that was read as one.
    #[inline(always)]
    pub fn code_address(word: u64) -> u64 {
        word
    }

    pub mod nr {
        pub const MMAP: u64 = 9;
        pub const MUNMAP: u64 = 11;
        pub const BRK: u64 = 12;
        pub const MREMAP: u64 = 25;
    }
}

#[cfg(bpf_target_arch = "aarch64")]
mod arch {
    /// What the kernel gives to user space of its `pt_regs`, which begins with it.
    pub use aya_ebpf::bindings::user_pt_regs as Registers;
    use aya_ebpf::helpers::bpf_probe_read_kernel;

    use super::Frame;

    pub const LINK_REGISTER: bool = true;

    pub const RETURN_POPS: u64 = 0;

    #[inline(always)]
    pub fn frame(regs: &Registers) -> Frame {
        Frame { pc: regs.pc, sp: regs.sp, fp: regs.regs[29], link: code_address(regs.regs[30]), result: regs.regs[0] }
    }

    /// The first four arguments of a function, volatile as on x86-64.
    #[inline(always)]
    pub fn arguments(regs: &Registers) -> [u64; 4] {
        // SAFETY: fields of a live structure.
        unsafe {
            [
                core::ptr::read_volatile(&raw const regs.regs[0]),
                core::ptr::read_volatile(&raw const regs.regs[1]),
                core::ptr::read_volatile(&raw const regs.regs[2]),
                core::ptr::read_volatile(&raw const regs.regs[3]),
            ]
        }
    }

    /// As above. In two parts: all 272 bytes would leave too little of the 512 that a program and the functions it calls may have
    /// on their stacks.
    #[inline(always)]
    pub fn system_call(registers: u64) -> Option<([u64; 5], Frame)> {
        const FP: u64 = 29;
        // SAFETY: a bad address is an error result.
        let args = unsafe { bpf_probe_read_kernel(registers as *const [u64; 5]) }.ok()?;
        // x29, x30, sp and pc follow one another.
        // SAFETY: as above.
        let [fp, link, sp, pc] = unsafe { bpf_probe_read_kernel((registers + 8 * FP) as *const [u64; 4]) }.ok()?;
        Some((args, Frame { pc, sp, fp, link: code_address(link), result: 0 }))
    }

    /// # Safety
    /// As above.
    #[inline(always)]
    pub unsafe fn syscall_number(regs: *const Registers) -> u64 {
        // The user's x8, which the call leaves alone.
        // SAFETY: the caller's promise.
        unsafe { core::ptr::read_volatile(&raw const (*regs).regs[8]) }
    }

    /// Without the signature that `paciasp` has put into a return address that is on the stack: it is in all bits that addresses of
    /// user space do not have on this host, and the tag of the top byte is there too.
    #[inline(always)]
    pub fn code_address(word: u64) -> u64 {
        word & crate::maps::address_mask()
    }

    /// include/uapi/asm-generic/unistd.h
    pub mod nr {
        pub const BRK: u64 = 214;
        pub const MUNMAP: u64 = 215;
        pub const MREMAP: u64 = 216;
        pub const MMAP: u64 = 222;
    }
}

pub use arch::*;

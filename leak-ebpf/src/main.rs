//! leaktrace's BPF programs: they watch allocator functions and mapping system calls of traced processes, pair each call
//! with its return, take the call stack at entry and write records to a ring buffer.
//!
//! - [`maps`]: everything that programs share with each other and with user space;
//! - [`thread`]: what is remembered of each thread, above all the call in flight;
//! - [`stack`]: the call stack, hashed, and sent whole the first time it is seen;
//! - [`unwind`]: by which rule the frame of an address is left;
//! - [`mod@repeat`]: loops of many steps;
//! - [`returns`]: return addresses that a return probe has replaced;
//! - [`emit`]: records into the ring, and what happens when it is full;
//! - [`probes`]: the programs.
//!
//! Of kernel structures only `pt_regs` and the list of pending return probes are read, the latter by offsets that user space
//! finds; so no relocation against the running kernel is needed.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(unexpected_cfgs, reason = "bpf_target_arch is set by the build script of leak-user")]

mod emit;
mod maps;
mod probes;
mod regs;
mod repeat;
mod returns;
mod stack;
mod thread;
mod unwind;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No program contains a panicking path: the verifier refuses the endless loop.
    loop {}
}

// The helpers that read user memory are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

//! The checks for what is left behind must be able to fail, or they prove nothing.

use std::fs::OpenOptions;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, Result};
use leaktrace_tests::host::{self, BpfObjects};
use leaktrace_tests::{Fixture, PATIENCE};

/// Loads the smallest program there is: `r0 = 0; exit`.
fn load_program() -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
    let instructions: [u64; 2] = [0xb7, 0x95];
    let licence = c"MIT";
    // The part of `union bpf_attr` for BPF_PROG_LOAD up to the license: type and number of instructions, then two addresses.
    let attr = [
        u64::from(BPF_PROG_TYPE_SOCKET_FILTER) | (instructions.len() as u64) << 32,
        instructions.as_ptr() as u64,
        licence.as_ptr() as u64,
    ];
    // SAFETY: the kernel reads as many bytes as the array has, and what its two addresses point to, all of which outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attr.as_ptr(), size_of_val(&attr)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just handed out this descriptor, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A BPF program is found in the process that holds it and in the kernel, and is no longer found once let go.
#[test]
fn bpf_programs_are_found_until_they_are_gone() -> Result<()> {
    if !host::can_trace("bpf_programs_are_found_until_they_are_gone") {
        return Ok(());
    }
    let program = load_program().context("failed to load a BPF program")?;
    let held = BpfObjects::of_process(std::process::id())?;
    assert_eq!(held.programs.len(), 1, "{held:?}");
    assert_eq!(held.still_there()?, held);
    drop(program);
    assert!(
        host::wait_until(PATIENCE, || held.still_there().is_ok_and(|left| left.is_empty())),
        "{held:?} is still there"
    );
    Ok(())
}

/// One changed byte of a library's code is one breakpoint.
#[test]
fn a_changed_byte_of_code_is_a_breakpoint() -> Result<()> {
    let fixture = Fixture::start("threads")?;
    let maps = fs::read_to_string(format!("/proc/{}/maps", fixture.pid()))?;
    let code = maps
        .lines()
        .find(|line| line.contains("r-xp") && line.contains("/libc.so."))
        .and_then(|line| line.split_once('-'))
        .context("failed to find libc's code in the fixture")?;
    let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", fixture.pid()))?;
    // int3, as the kernel's breakpoints are; the first bytes of the mapping are no function that the idle fixture runs.
    memory.write_all_at(&[0xcc], u64::from_str_radix(code.0, 16)?).context("failed to write to the fixture's code")?;
    assert_eq!(host::breakpoints(fixture.pid())?, 1);
    Ok(())
}

/// Waiting ends at once when there is nothing to wait for, and ends at all when it never comes.
#[test]
fn waiting_ends() {
    assert!(host::wait_until(Duration::ZERO, || true));
    assert!(!host::wait_until(Duration::from_millis(1), || false));
}

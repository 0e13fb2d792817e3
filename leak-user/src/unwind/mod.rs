//! How each frame of a stack is left, for the walk in the kernel: tables made from the files of the traced processes.
//!
//! Compilers describe for every instruction where the caller's registers are (`.eh_frame`, "call frame information", DWARF 5,
//! section 6.4), so that exceptions work; programs without frame pointers can be walked with nothing else. Those descriptions
//! are programs for a small machine, too much for BPF. Here they are run once per file, and what they say is written down as
//! sorted rows of eight bytes ([`leak_common::unwind`]) that the BPF side searches.
//!
//! - [`image`]: what an ELF file, or the kernel's vDSO, has to say; bounded reads, any bytes may come;
//! - `pointers`: whether code has frame pointers that no unwind information speaks of;
//! - [`cfi`]: runs the descriptions;
//! - `x86_64`: what they mean on this machine, and where calls end;
//! - [`table`]: the rows of a file, all or only those that a walk can ask for;
//! - [`packed`]: the rows as they are put into the kernel's map;
//! - [`extents`]: hands out places in the kernel's map of rows;
//! - [`tables`]: which files are loaded, for which processes, within a budget.
//!
//! # Which row is for which address
//! A row holds from its address to the next row's. A frame that called another is looked up at its return address **less
//! one**, the last byte of its call instruction: a call that never returns may be the last instruction of a function, and its
//! return address is then already the next function's. A frame that a signal interrupted is looked up at its very address,
//! and only a full table answers for that. The trampoline that returns from a signal has its entry begin one byte early in
//! glibc, for lookups less one.
//!
//! Walking the stack and writing the BPF maps are left to others.

pub mod cfi;
pub mod extents;
pub mod image;
pub mod packed;
mod pointers;
pub mod table;
pub mod tables;
mod x86_64;

#[cfg(test)]
mod tests;

use leak_common::unwind::Rule;
pub use packed::Packed;
pub use table::{Rows, Table, Why};
pub use tables::{Ranges, Tables};

/// What the rows of a table say of an address, less the file's lowest one. None before the first row.
pub fn lookup(rows: &[u64], address: u32) -> Option<Rule> {
    let behind = rows.partition_point(|&row| (row >> 32) as u32 <= address);
    rows.get(behind.checked_sub(1)?).map(|&row| Rule(row as u32))
}

//! What the suite of `tests/tests/kernels.rs` needs on a machine that has nothing else: the kernels that `cargo xtask vm` boots.

use crate::Program;

/// The fixtures that the suite starts.
pub fn programs() -> Vec<Program> {
    let mut programs: Vec<Program> =
        ["allocators", "threads", "mappings", "lifecycle", "demo"].map(Program::c).to_vec();
    programs.extend([static_allocators(), Program::cpp("throw")]);
    programs
}

/// `allocators` with its libc in it.
pub fn static_allocators() -> Program {
    Program::c("allocators").flag("-static")
}

/// Programs of the system that the suite traces.
pub const SYSTEM_PROGRAMS: [&str; 1] = ["sqlite3"];

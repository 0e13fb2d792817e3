//! Finds the functions of allocators in the files that a process has mapped, and where a breakpoint on them is cheap.

pub mod breakpoint;

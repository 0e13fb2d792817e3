//! The programs, by what they watch.

mod alloc;
mod births;
mod control;
mod mappings;
mod oom;
mod pages;
mod process;

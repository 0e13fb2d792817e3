//! The programs, by what they watch.

mod alloc;
mod mappings;
mod process;

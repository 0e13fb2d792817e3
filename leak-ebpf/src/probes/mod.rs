//! The programs, by what they watch.

mod alloc;
mod control;
mod mappings;
mod pages;
mod process;

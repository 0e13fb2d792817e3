//! Call stacks of programs without frame pointers, frame by frame, and of real programs under load.

mod code;
mod gdb;
mod programs;
mod shapes;
mod traced;
mod truth;

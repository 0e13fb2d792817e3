//! Call stacks of programs without frame pointers, frame by frame.

mod code;
mod gdb;
mod shapes;
mod traced;
mod truth;

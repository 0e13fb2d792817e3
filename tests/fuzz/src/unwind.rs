//! The part of leak-user that reads unwind information, without the rest of it and its kernel side.
#![allow(dead_code, reason = "what the other parts use")]

#[path = "../../../leak-user/src/unwind/cfi.rs"]
pub mod cfi;
#[path = "../../../leak-user/src/unwind/image.rs"]
pub mod image;
#[path = "../../../leak-user/src/unwind/pointers.rs"]
mod pointers;
#[path = "../../../leak-user/src/unwind/table.rs"]
pub mod table;
#[path = "../../../leak-user/src/unwind/x86_64.rs"]
mod x86_64;

//! Files of any content: a table or a reason, never a panic; and a bias for no mapping that has no code.
#![no_main]

#[path = "../src/unwind.rs"]
mod unwind;

use libfuzzer_sys::fuzz_target;
use unwind::table::{Rows, Table};

fuzz_target!(|bytes: &[u8]| {
    let full = Table::of_bytes(bytes, Rows::Full);
    let compact = Table::of_bytes(bytes, Rows::CallEnds);
    match (full, compact) {
        (Ok(full), Ok(compact)) => {
            assert!(compact.rows.len() <= full.rows.len());
            assert_eq!(full.code, compact.code);
            for code in &full.code {
                assert!(code.offset + code.size <= bytes.len() as u64);
                assert!(full.bias_for(0x7000_0000_0000, code.offset & !0xfff).is_some());
            }
            assert_eq!(full.bias_for(0x7000_0000_0000, 1 << 60), None);
        }
        (full, compact) => assert_eq!(full.err(), compact.err()),
    }
});

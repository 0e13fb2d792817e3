//! Perf maps of any content, read in pieces of any size: the outcome is that of reading them at once, and no functions overlap in it.
#![no_main]

// The parser alone: leaktrace's library takes the tools that build its BPF programs, which a nightly compiler may not have.
#[path = "../../../leak-user/src/symbols/perf_map/index.rs"]
mod index;

use index::Parser;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u64, &[u8])| {
    let (size, address, text) = input;
    let mut whole = Parser::default();
    whole.feed(text);
    let mut pieces = Parser::default();
    for piece in text.chunks(usize::from(size).max(1)) {
        pieces.feed(piece);
    }
    assert_eq!(whole.index(), pieces.index());
    assert!(whole.index().len() <= text.len());
    assert!(whole.index().is_disjoint());
    assert!(whole.index().find(address).is_none() || !whole.index().is_empty());
});

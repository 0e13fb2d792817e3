//! Whether code that no unwind information speaks of was compiled to keep frame pointers, as its bytes say.
//!
//! Frame pointers are all that such a file can be walked by, and walking by them where there are none gives nonsense. What
//! tells is how functions begin, and functions are what direct calls lead to. A compiler that keeps frame pointers sets them
//! up in nearly all functions; one that does not, in the few that have a frame of variable size.

use std::collections::BTreeSet;

use super::image::{Code, Data};
use super::x86_64 as machine;

/// The most code that is searched for calls, in bytes.
const MAX_SEARCHED: u64 = 16 << 20;

/// The most functions that are looked at.
const MAX_FUNCTIONS: usize = 1024;

/// How much code is read at a time, in bytes.
const PIECE: usize = 256 << 10;

/// Whether more than half of the functions that are called set up a frame pointer. No where none is called, or the code cannot
/// be read.
pub fn are_kept(data: Data<'_>, code: &[Code]) -> bool {
    let (mut with, mut all) = (0, 0);
    for start in called(data, code) {
        let Some(code) = code.iter().find(|code| code.contains(start)) else { continue };
        let mut bytes = [0; machine::PROLOGUE];
        let len = machine::PROLOGUE.min((code.end() - start) as usize);
        if data.copy_to(code.offset + (start - code.address), &mut bytes[..len]).is_err() {
            continue;
        }
        if let Some(sets) = machine::sets_frame_pointer(&bytes[..len]) {
            all += 1;
            with += usize::from(sets);
        }
    }
    2 * with > all
}

/// The addresses in the file's code that its direct calls lead to, up to a bound of them.
fn called(data: Data<'_>, code: &[Code]) -> BTreeSet<u64> {
    let mut targets = BTreeSet::new();
    let mut left = MAX_SEARCHED;
    let mut buffer = vec![0; PIECE + machine::CONTEXT];
    for piece_of in code {
        let searched = piece_of.size.min(left);
        left -= searched;
        let mut at = 0;
        while at < searched {
            let len = PIECE.min((searched - at) as usize);
            let behind = machine::CONTEXT.min((piece_of.size - at) as usize - len);
            let piece = &mut buffer[..len + behind];
            if data.copy_to(piece_of.offset + at, piece).is_err() {
                return targets;
            }
            for i in 0..len {
                let Some(target) = machine::direct_call(piece, i, piece_of.address + at) else { continue };
                if code.iter().any(|code| code.contains(target)) {
                    targets.insert(target);
                    if targets.len() == MAX_FUNCTIONS {
                        return targets;
                    }
                }
            }
            at += len as u64;
        }
    }
    targets
}

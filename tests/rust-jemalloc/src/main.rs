//! A Rust program whose allocator is jemalloc, linked statically and with a prefix of its own (`_rjem_`), as many servers have it.
//! It speaks the protocol of the fixtures (`tests/fixtures/fixture.h`) and knows what it has allocated:
//!
//! - `leak VIA COUNT SIZE`: COUNT blocks that stay, from the function `leak_via_VIA`; VIA is boxed, zeroed, aligned or grown
//! - `release COUNT`: drops COUNT of all blocks, the oldest first
//! - `report`
//!
//! Nothing else allocates between commands: input and output go through arrays and read(2) and write(2).

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, realloc};
use std::fmt::{self, Write as _};
use std::hint::black_box;

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// The most blocks that stay at once.
const MAX_BLOCKS: usize = 4096;

/// Over what jemalloc aligns to by itself, so that it takes mallocx.
const ALIGNMENT: usize = 256;

type Leak = fn(usize) -> Block;

const VIAS: [(&str, Leak); 4] =
    [("boxed", leak_via_boxed), ("zeroed", leak_via_zeroed), ("aligned", leak_via_aligned), ("grown", leak_via_grown)];

#[derive(Clone, Copy)]
struct Block {
    address: *mut u8,
    layout: Layout,
    via: usize,
}

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size.max(1), align).expect("sizes are small")
}

fn block(address: *mut u8, layout: Layout) -> Block {
    assert!(!address.is_null(), "no memory");
    Block { address: black_box(address), layout, via: 0 }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "Rust" fn leak_via_boxed(size: usize) -> Block {
    let mut boxed = Vec::with_capacity(size);
    boxed.resize(size, 7_u8);
    let boxed = boxed.into_boxed_slice();
    block(Box::into_raw(boxed).cast(), layout(size, 1))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "Rust" fn leak_via_zeroed(size: usize) -> Block {
    let layout = layout(size, 8);
    // SAFETY: the size is not zero.
    block(unsafe { alloc_zeroed(layout) }, layout)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "Rust" fn leak_via_aligned(size: usize) -> Block {
    let layout = layout(size, ALIGNMENT);
    // SAFETY: the size is not zero.
    block(unsafe { alloc(layout) }, layout)
}

/// By way of a smaller block, aligned so that it takes rallocx.
#[unsafe(no_mangle)]
#[inline(never)]
extern "Rust" fn leak_via_grown(size: usize) -> Block {
    let (small, large) = (layout(size / 3, ALIGNMENT), layout(size, ALIGNMENT));
    // SAFETY: neither size is zero, and the block is of the first layout.
    block(unsafe { realloc(black_box(alloc(small)), small, large.size()) }, large)
}

/// A line of output.
struct Line {
    bytes: [u8; 2048],
    length: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        self.bytes.get_mut(self.length..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

fn say(text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; 2048], length: 0 };
    writeln!(line, "{text}").expect("lines are short");
    let mut at = 0;
    while at < line.length {
        // SAFETY: the bytes are initialised and outlive the call.
        let written = unsafe { libc::write(1, line.bytes[at..].as_ptr().cast(), line.length - at) };
        match usize::try_from(written) {
            Ok(written) => at += written,
            Err(_) => std::process::exit(1),
        }
    }
}

/// The next line of input; the program ends with its input.
fn next_command(line: &mut [u8; 256]) -> &str {
    let mut length = 0;
    loop {
        let mut byte = 0_u8;
        // SAFETY: one byte that outlives the call.
        if unsafe { libc::read(0, (&raw mut byte).cast(), 1) } != 1 {
            std::process::exit(0);
        }
        if byte == b'\n' {
            return std::str::from_utf8(&line[..length]).unwrap_or_default();
        }
        if length < line.len() {
            line[length] = byte;
            length += 1;
        }
    }
}

/// Bytes and blocks that came and went, of one function.
#[derive(Clone, Copy, Default)]
struct Site {
    bytes: [usize; 2],
    count: [usize; 2],
}

impl Site {
    fn live(&self) -> (usize, usize) {
        (self.bytes[0] - self.bytes[1], self.count[0] - self.count[1])
    }

    fn add(&mut self, gone: usize, bytes: usize) {
        self.bytes[gone] += bytes;
        self.count[gone] += 1;
    }
}

/// The answer to `report`.
struct Report<'a>(&'a [Site; VIAS.len()]);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"sites\":{{")?;
        let mut all = (0, 0);
        for (i, ((via, _), site)) in VIAS.iter().zip(self.0).enumerate() {
            let (bytes, count) = site.live();
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}\"leak_via_{via}\":{{\"live_bytes\":{bytes},\"live_count\":{count}}}")?;
            all = (all.0 + bytes, all.1 + count);
        }
        write!(f, "}},\"live_bytes\":{},\"live_count\":{}}}", all.0, all.1)
    }
}

fn main() {
    let mut blocks = Vec::with_capacity(MAX_BLOCKS);
    let mut sites = [Site::default(); VIAS.len()];
    let mut line = [0; 256];
    say(format_args!("ready {}", std::process::id()));
    loop {
        let mut words = next_command(&mut line).split(' ');
        let (command, first) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut number = || words.next().and_then(|word| word.parse::<usize>().ok());
        match command {
            "report" => say(format_args!("{}", Report(&sites))),
            "leak" => {
                let via = VIAS.iter().position(|(via, _)| *via == first);
                let (Some(via), Some(count), Some(size)) = (via, number(), number()) else {
                    say(format_args!("error leak {first}"));
                    continue;
                };
                for _ in 0..count {
                    assert!(blocks.len() < MAX_BLOCKS, "too many blocks");
                    let new = VIAS[via].1(size);
                    sites[via].add(0, new.layout.size());
                    blocks.push(Block { via, ..new });
                }
                say(format_args!("ok"));
            }
            "release" => {
                let count = first.parse().unwrap_or(0).min(blocks.len());
                for old in blocks.drain(..count) {
                    sites[old.via].add(1, old.layout.size());
                    // SAFETY: the block is of this layout, and nobody has it any more.
                    unsafe { dealloc(old.address, old.layout) };
                }
                say(format_args!("ok"));
            }
            other => say(format_args!("error {other}")),
        }
    }
}

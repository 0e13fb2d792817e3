//! Unwind information of any content, for code of any content: rows ascend, neighbours differ, and for each row that is kept the
//! full table says the same. As `.eh_frame` and as `.debug_frame`.
#![no_main]

#[path = "../src/unwind.rs"]
mod unwind;

use libfuzzer_sys::fuzz_target;
use unwind::image::{Code, Data, Form, Frames, Image};
use unwind::table::{Rows, Table};

const CODE: u64 = 0x1000;

fuzz_target!(|input: (bool, u16, &[u8])| {
    let (debug, code, bytes) = input;
    let (code, frames) = bytes.split_at(usize::from(code).min(bytes.len()));
    let form = if debug { Form::DebugFrame } else { Form::EhFrame };
    let image = Image {
        data: Data::Bytes(code),
        base: CODE,
        code: Vec::from_iter((!code.is_empty()).then_some(Code { offset: 0, address: CODE, size: code.len() as u64 })),
        build_id: None,
        go: false,
        bare_with_frame_pointers: false,
        relocated_code: false,
        frames: vec![Frames {
            form,
            bytes: frames.into(),
            bases: gimli::BaseAddresses::default().set_eh_frame(0x2000),
        }],
    };
    let full = Table::of_image(&image, Rows::Full).expect("the code is there");
    let compact = Table::of_image(&image, Rows::CallEnds).expect("the code is there");
    for table in [&full, &compact] {
        assert!(table.rows.is_sorted_by(|a, b| a >> 32 < b >> 32));
        assert!(table.rows.is_sorted_by(|a, b| *a as u32 != *b as u32));
    }
    for &row in &compact.rows {
        let behind = full.rows.partition_point(|other| other >> 32 <= row >> 32);
        assert_eq!(full.rows[behind - 1] as u32, row as u32);
    }
});

//! Tells what the unwind tables of files take: `unwind_tables [--json] FILE...`. With `--json` one object a file and line, for
//! `cargo xtask bench`.

use leak_user::unwind::{Packed, Rows, Table};
use serde_json::json;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let mut paths = std::env::args_os().skip(1).peekable();
    let as_json = paths.next_if(|first| first == "--json").is_some();
    if !as_json {
        println!(
            "   code KiB   raw rows   all rows     pieces  of raw       rows  of raw       KiB  inexpr  malformed  build ms  file"
        );
    }
    let mut code = ExitCode::SUCCESS;
    let (mut words, mut duration) = (0, Duration::ZERO);
    for path in paths {
        let path = Path::new(&path);
        let read = File::open(path).map_err(|e| e.to_string());
        // What leaktrace does for a file: opening the image counts.
        let begun = Instant::now();
        match read.and_then(|file| Table::of_file(&file, Rows::CallEnds).map_err(|e| e.to_string())) {
            Ok(table) => {
                let packed = Packed::new(&table.rows);
                let took = begun.elapsed();
                if as_json {
                    print_json(path, &table, &packed, took);
                } else {
                    print_text(path, &table, &packed, took);
                }
                words += packed.words().len();
                duration += took;
            }
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                code = ExitCode::FAILURE;
            }
        }
    }
    if !as_json {
        println!("together: {:.1} KiB, {:.2} ms", words as f64 * 8. / 1024., duration.as_secs_f64() * 1e3);
    }
    code
}

fn print_json(path: &Path, table: &Table, packed: &Packed, took: Duration) {
    let line = json!({
        "file": path.to_string_lossy(),
        "code_bytes": table.stats.code,
        "raw_rows": table.stats.raw_rows,
        "merged_rows": table.stats.all_rows,
        "pieces": table.rows.len(),
        "kept_rows": packed.rows().len(),
        "bytes": size_of_val(packed.words()),
        "build_s": took.as_secs_f64(),
        "missing": table.missing(),
    });
    println!("{line}");
}

fn print_text(path: &Path, table: &Table, packed: &Packed, took: Duration) {
    let (stats, pieces, rows) = (&table.stats, table.rows.len(), packed.rows().len());
    let of_raw = |count: usize| 100. * count as f64 / (stats.raw_rows.max(1) as f64);
    println!(
        "{:11} {:10} {:10} {pieces:10} {:6.1}% {rows:10} {:6.1}% {:9.1} {:7} {:10} {:9.2}  {}{}",
        stats.code >> 10,
        stats.raw_rows,
        stats.all_rows,
        of_raw(pieces),
        of_raw(rows),
        size_of_val(packed.words()) as f64 / 1024.,
        stats.inexpressible,
        stats.malformed,
        took.as_secs_f64() * 1e3,
        path.display(),
        table.missing().map(|why| format!(": {why}")).unwrap_or_default(),
    );
    println!("{:>12}by CFA {:?}, by frame pointer {:?}", "", stats.by_cfa, stats.by_fp);
}

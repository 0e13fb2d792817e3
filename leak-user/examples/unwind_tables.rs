//! Tells what the unwind tables of files take: `unwind_tables [--json] FILE...`. With `--json` one object a file and line, for
//! `cargo xtask bench`.

use leak_user::unwind::{Rows, Table};
use serde_json::json;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let mut paths = std::env::args_os().skip(1).peekable();
    let as_json = paths.next_if(|first| first == "--json").is_some();
    if !as_json {
        println!("   code KiB   raw rows   all rows  kept rows  of raw  kept KiB  inexpr  malformed  build ms  file");
    }
    let mut code = ExitCode::SUCCESS;
    let (mut rows, mut duration) = (0, Duration::ZERO);
    for path in paths {
        let path = Path::new(&path);
        let read = File::open(path).map_err(|e| e.to_string());
        // What leaktrace does for a file: opening the image counts.
        let begun = Instant::now();
        match read.and_then(|file| Table::of_file(&file, Rows::CallEnds).map_err(|e| e.to_string())) {
            Ok(table) => {
                let took = begun.elapsed();
                if as_json {
                    print_json(path, &table, took);
                } else {
                    print_text(path, &table, took);
                }
                rows += table.rows.len();
                duration += took;
            }
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                code = ExitCode::FAILURE;
            }
        }
    }
    if !as_json {
        println!("together: {rows} rows, {:.1} KiB, {:.2} ms", rows as f64 * 8. / 1024., duration.as_secs_f64() * 1e3);
    }
    code
}

fn print_json(path: &Path, table: &Table, took: Duration) {
    let line = json!({
        "file": path.to_string_lossy(),
        "code_bytes": table.stats.code,
        "raw_rows": table.stats.raw_rows,
        "merged_rows": table.stats.all_rows,
        "kept_rows": table.rows.len(),
        "bytes": size_of_val(table.rows.as_slice()),
        "build_s": took.as_secs_f64(),
        "missing": table.missing(),
    });
    println!("{line}");
}

fn print_text(path: &Path, table: &Table, took: Duration) {
    let (stats, kept) = (&table.stats, table.rows.len());
    println!(
        "{:11} {:10} {:10} {kept:10} {:6.1}% {:9.1} {:7} {:10} {:9.2}  {}{}",
        stats.code >> 10,
        stats.raw_rows,
        stats.all_rows,
        100. * kept as f64 / (stats.raw_rows.max(1) as f64),
        kept as f64 * 8. / 1024.,
        stats.inexpressible,
        stats.malformed,
        took.as_secs_f64() * 1e3,
        path.display(),
        table.missing().map(|why| format!(": {why}")).unwrap_or_default(),
    );
    println!("{:>12}by CFA {:?}, by frame pointer {:?}", "", stats.by_cfa, stats.by_fp);
}

//! Prints what the unwind tables of files take: `unwind_tables FILE...`.

use leak_user::unwind::{Rows, Table};
use std::fs::File;
use std::process::ExitCode;

fn main() -> ExitCode {
    println!("   code KiB   raw rows   all rows  kept rows  of raw  kept KiB  inexpr  malformed  build ms  file");
    let mut code = ExitCode::SUCCESS;
    let (mut rows, mut duration) = (0, std::time::Duration::ZERO);
    for path in std::env::args_os().skip(1) {
        let read = File::open(&path).map_err(|e| e.to_string());
        let begun = std::time::Instant::now();
        match read.and_then(|file| Table::of_file(&file, Rows::CallEnds).map_err(|e| e.to_string())) {
            Ok(table) => {
                let took = begun.elapsed();
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
                rows += kept;
                duration += took;
            }
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                code = ExitCode::FAILURE;
            }
        }
    }
    println!("together: {rows} rows, {:.1} KiB, {:.2} ms", rows as f64 * 8. / 1024., duration.as_secs_f64() * 1e3);
    code
}

//! `floor PID`: empty programs at the places in PID that leaktrace would choose, until the standard input is closed or a
//! signal comes. `cargo xtask bench` compares leaktrace with this: nothing that watches the same calls can be faster.

use std::io::{Read as _, stdin};

use anyhow::{Context as _, Result, ensure};
use leak_user::attach::{Floor, Places, Point};
use leak_user::discover::Discovery;

fn main() -> Result<()> {
    let pid = std::env::args().nth(1).context("usage: floor PID")?;
    let pid: u32 = pid.parse().with_context(|| format!("failed to read the pid {pid:?}"))?;
    let floor = Floor::load()?;
    let files = Discovery::new(pid).refresh().with_context(|| format!("failed to look into process {pid}"))?;
    ensure!(!files.is_empty(), "no allocator found in process {pid}");
    let mut probes = Vec::new();
    for file in &files {
        let points = file.points.iter().map(|point| Point { shape: point.op(), offset: point.offset }).collect();
        let places = Places { file: file.path_for_attach(), points };
        probes.push(floor.attach(pid, &places)?);
        eprintln!("{} empty probes in {} ({:?} links)", places.points.len(), file.path.display(), floor.kind());
    }
    let _ = stdin().read_to_end(&mut Vec::new());
    leak_user::attach::detach(probes);
    Ok(())
}

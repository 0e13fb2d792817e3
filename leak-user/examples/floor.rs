//! `floor PID [allocator|entries]`: empty programs at the places in PID that leaktrace would choose, and where it would watch mapping
//! calls unless `allocator` is given; with `entries` the returns of functions are left out. They stay until the standard input is closed or a signal comes. `cargo xtask bench` compares
//! leaktrace with this: nothing that watches the same calls can be faster.

use std::io::{Read as _, stdin};

use anyhow::{Context as _, Result, bail, ensure};
use leak_user::attach::{Floor, Places, Point};
use leak_user::discover::Discovery;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let pid = args.next().context("usage: floor PID [allocator|entries]")?;
    let (mappings, returns) = match args.next().as_deref() {
        None => (true, true),
        Some("allocator") => (false, true),
        Some("entries") => (true, false),
        Some(other) => bail!("failed to read {other:?}: usage: floor PID [allocator|entries]"),
    };
    let pid: u32 = pid.parse().with_context(|| format!("failed to read the pid {pid:?}"))?;
    let floor = Floor::load()?;
    let files = Discovery::new(pid).refresh().with_context(|| format!("failed to look into process {pid}"))?;
    ensure!(!files.is_empty(), "no allocator found in process {pid}");
    let mut probes = Vec::new();
    if mappings {
        let (hook, links) = floor.watch_mappings()?;
        probes.push(links);
        eprintln!("empty programs for mapping calls at {}", hook.name());
    }
    for file in &files {
        let points = file.points.iter().map(Point::from).collect();
        let places = Places { file: file.path_for_attach(), points };
        probes.push(floor.attach(pid, &places, returns)?);
        eprintln!("{} empty probes in {} ({:?} links)", places.points.len(), file.path.display(), floor.kind());
    }
    let _ = stdin().read_to_end(&mut Vec::new());
    leak_user::attach::detach(probes);
    Ok(())
}

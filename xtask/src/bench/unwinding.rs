//! What unwind tables take: for single libraries, and for all files that a real program maps.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use leaktrace_tests::{Fixture, host};
use serde::{Deserialize, Serialize};

use super::first;
use super::summary::{Bound, Target, TargetKind};

/// A node that says that it is ready and then waits for its input to end.
const NODE: &str = "console.log('ready ' + process.pid); process.stdin.on('data', () => {})";

/// The tables of one file or of several together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Tables {
    pub name: &'static str,
    pub files: Vec<PathBuf>,
    /// Bytes of text.
    pub code_bytes: u64,
    /// Rows that the unwind information distinguishes.
    pub raw_rows: u64,
    pub kept_rows: u64,
    /// Of the kept rows.
    pub bytes: u64,
    /// In the fastest round: what else the machine did only adds to it.
    pub build_s: f64,
}

/// A line of `unwind_tables --json`.
#[derive(Deserialize)]
struct OfFile {
    code_bytes: u64,
    raw_rows: u64,
    kept_rows: u64,
    bytes: u64,
    build_s: f64,
}

impl Tables {
    pub fn kept(&self) -> f64 {
        self.kept_rows as f64 / self.raw_rows as f64
    }

    /// What these tables are held to.
    pub fn targets(&self) -> Vec<Target> {
        let target =
            |name, kind, value, bound| Target { name, kind, bound: Some(Bound::AtMost(bound)), value: Some(value) };
        let mut targets = vec![target("kept rows, of raw", TargetKind::Ratio, self.kept(), 0.1)];
        match self.name {
            PYTHON_ALL => {
                targets.push(target("build time", TargetKind::Seconds, self.build_s, 0.05));
                targets.push(target("bytes", TargetKind::Count, self.bytes as f64, 1e6));
            }
            NODE_ALL => targets.push(target("build time", TargetKind::Seconds, self.build_s, 1.5)),
            _ => {}
        }
        targets
    }

    fn add(&mut self, file: &OfFile) {
        self.code_bytes += file.code_bytes;
        self.raw_rows += file.raw_rows;
        self.kept_rows += file.kept_rows;
        self.bytes += file.bytes;
        self.build_s += file.build_s;
    }
}

const PYTHON_ALL: &str = "python3, all files";
const NODE_ALL: &str = "node, all files";

/// Measures all of them in each round; those that are not installed are left out.
pub fn measure(tool: &Path, rounds: u32) -> Result<Vec<Tables>> {
    let mut measured = Vec::new();
    for (name, files) in what()? {
        let mut best: Option<Tables> = None;
        for _ in 0..rounds {
            let tables = build(tool, name, &files)?;
            best = match best {
                Some(best) if best.build_s <= tables.build_s => Some(best),
                _ => Some(tables),
            };
        }
        measured.extend(best);
    }
    Ok(measured)
}

/// Names and files of what is measured.
fn what() -> Result<Vec<(&'static str, Vec<PathBuf>)>> {
    let mut python = Vec::new();
    if let Some(running) = first::python() {
        python = code_files(running?.pid())?;
    }
    let mut node = Vec::new();
    if let Some(path) = host::find("node") {
        let running = Fixture::builder(&path).arg("-e").arg(NODE).start()?;
        node = code_files(running.pid())?;
    }
    let named = |start: &str| {
        let is = |file: &&PathBuf| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start));
        node.iter().chain(&python).find(is).cloned().into_iter().collect::<Vec<PathBuf>>()
    };
    let mut all = vec![
        ("libc", named("libc.so")),
        ("libstdc++", named("libstdc++.so")),
        ("python3", named("python3")),
        (PYTHON_ALL, python.clone()),
        (NODE_ALL, node.clone()),
    ];
    all.retain(|(_, files)| !files.is_empty());
    Ok(all)
}

/// The files that a process has mapped executable.
fn code_files(pid: u32) -> Result<Vec<PathBuf>> {
    let path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    Ok(executable(&maps).into_iter().map(PathBuf::from).collect())
}

/// Paths of executable mappings, each once.
fn executable(maps: &str) -> BTreeSet<&str> {
    maps.lines()
        .filter(|line| line.split_whitespace().nth(1).is_some_and(|access| access.contains('x')))
        .filter_map(|line| Some(&line[line.find('/')?..]))
        .collect()
}

/// Builds the tables of files once.
fn build(tool: &Path, name: &'static str, files: &[PathBuf]) -> Result<Tables> {
    let output = Command::new(tool).arg("--json").args(files).output();
    let output = output.with_context(|| format!("failed to start {}", tool.display()))?;
    if !output.status.success() {
        bail!("failed to build the unwind tables of {name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let mut tables = Tables { name, files: files.to_vec(), ..Tables::default() };
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        tables.add(&serde_json::from_str(line).with_context(|| format!("failed to read {line:?}"))?);
    }
    Ok(tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only files, only executable ones, each once, with blanks in their names.
    #[test]
    fn executable_files() {
        let maps = "\
            55a0-55b0 r--p 00000000 fe:01 7  /usr/bin/a\n\
            55b0-55c0 r-xp 00001000 fe:01 7  /usr/bin/a\n\
            55d0-55e0 r-xp 00002000 fe:01 7  /usr/bin/a\n\
            7f00-7f10 r-xp 00000000 00:00 0\n\
            7f20-7f30 r-xp 00001000 fe:01 8  /lib/with a blank.so\n\
            7f40-7f50 r-xp 00000000 00:00 0  [vdso]\n";
        assert_eq!(executable(maps).into_iter().collect::<Vec<_>>(), ["/lib/with a blank.so", "/usr/bin/a"]);
    }

    /// Several files count together, and what is missed is only what has a bound.
    #[test]
    fn tables_of_several_files() {
        let mut tables = Tables { name: PYTHON_ALL, ..Tables::default() };
        for build_s in [0.03, 0.04] {
            tables.add(&OfFile { code_bytes: 4096, raw_rows: 100, kept_rows: 9, bytes: 72, build_s });
        }
        assert_eq!((tables.code_bytes, tables.raw_rows, tables.kept_rows, tables.bytes), (8192, 200, 18, 144));
        let met: Vec<_> = tables.targets().iter().map(Target::is_met).collect();
        assert_eq!(met, [Some(true), Some(false), Some(true)]);
    }
}

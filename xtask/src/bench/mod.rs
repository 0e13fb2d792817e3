//! `cargo xtask bench`: what tracing costs, side by side with nothing, with the least that is possible and with a peer.
//!
//! Ten rows ([`tool`]) on five workloads; each cell ([`measure`]) is a fresh target. A machine is never quiet, so the rows
//! take turns over several rounds, and what is compared is compared within a round ([`summary`]); [`table`] shows it. Program
//! times cost time themselves, so throughput is measured without them. What unwind tables take ([`unwinding`]) and the time
//! to the first traced allocation ([`first`]) are measured apart, and so are heap profilers that have to be in the process ([`profilers`]).

use std::env;
use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use leaktrace_tests::target_dir;
use nix::sys::signal::{SigHandler, Signal, signal};

use self::first::First;
use self::measure::{Cell, Plan, Targets};
use self::summary::Summary;
use self::tool::{Row, Tools};
use crate::process::{as_root, cargo, check, is_root};
use crate::run;
use crate::setup::setup;

mod first;
mod many;
mod measure;
mod peer;
mod profilers;
mod summary;
mod table;
mod tool;
mod unwinding;

/// What is run in the target.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub threads: u32,
    /// Of the call stack that an allocation is made from, from malloc's caller to the thread's start.
    pub frames: u32,
    /// How many of them, nearly the innermost, are others for each allocation than for the one before.
    pub turn: u32,
    /// Whether the target was compiled to keep them. Without, memleak does not see the stack.
    pub frame_pointers: bool,
}

const WORKLOADS: [Workload; 5] = [
    Workload { threads: 1, frames: 10, turn: 0, frame_pointers: true },
    Workload { threads: 1, frames: 30, turn: 0, frame_pointers: true },
    Workload { threads: 2, frames: 10, turn: 0, frame_pointers: true },
    Workload { threads: 1, frames: 10, turn: 0, frame_pointers: false },
    Workload { threads: 1, frames: 30, turn: 5, frame_pointers: true },
];

#[derive(Args)]
pub struct Options {
    /// Write all figures to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds for each measurement; a traced one is made twice, without and with program times
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Times that the rows take turns
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// One round of half a second each: whether it works, and roughly how fast
    #[arg(long, conflicts_with_all = ["seconds", "rounds"])]
    quick: bool,
    /// Only leaktrace beside heap profilers that have to be in the process: heaptrack, and jemalloc's own
    #[arg(long)]
    profilers: bool,
    /// The memleak to compare with [default: one in PATH, or the one that this brings]
    #[arg(long, value_name = "FILE")]
    memleak: Option<PathBuf>,
    /// Everything is built already
    #[arg(long, hide = true)]
    built: bool,
}

impl Options {
    fn plan(&self) -> Plan {
        if self.quick {
            return Plan { rounds: 1, duration: Duration::from_millis(500) };
        }
        Plan { rounds: self.rounds, duration: Duration::from_secs(u64::from(self.seconds)) }
    }
}

/// Set by Ctrl-C and SIGTERM. What was started is ended by its owners' `Drop` as the error passes them.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Sets up, builds, measures and prints. Missing a target is a finding, not a failure.
pub fn bench(options: &Options) -> Result<ExitCode> {
    if !options.built {
        setup()?;
        build()?;
    }
    if !is_root() {
        return rerun_as_root(options);
    }
    watch_signals()?;
    if options.profilers {
        print!("{}", profilers::render(&profilers::measure(&tools(options)?)?));
        return Ok(ExitCode::SUCCESS);
    }
    let result = measure_all(options);
    if INTERRUPTED.load(Ordering::Relaxed) {
        eprintln!("bench: interrupted");
        return Ok(ExitCode::from(130));
    }
    let (summary, json) = result?;
    print!("{}", table::render(&summary));
    if let (Some(path), Some(mut file)) = (&options.json, json) {
        let text = serde_json::to_string_pretty(&summary.to_json())?;
        writeln!(file, "{text}")
            .and_then(|()| file.persist(path).map(drop).map_err(std::io::Error::from))
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn build() -> Result<()> {
    run::build()?;
    check(
        cargo().args(["build", "--release", "--quiet", "--package", "leak-user"]).args([
            "--example",
            "floor",
            "--example",
            "unwind_tables",
        ]),
        "build the empty programs and the tool for unwind tables",
    )?;
    Targets::build().map(drop)
}

/// Everything that cargo does was done as the user; the rest needs BPF.
fn rerun_as_root(options: &Options) -> Result<ExitCode> {
    let this = env::current_exe().context("failed to find the path of this program")?;
    let mut command = as_root(&this)?;
    command.args(["bench", "--built"]);
    if options.quick {
        command.arg("--quick");
    } else {
        command.args(["--seconds", &options.seconds.to_string(), "--rounds", &options.rounds.to_string()]);
    }
    if let Some(path) = &options.json {
        command.arg("--json").arg(path);
    }
    if options.profilers {
        command.arg("--profilers");
    }
    // sudo replaces PATH.
    if let Some(path) = options.memleak.clone().or_else(peer::in_path) {
        command.arg("--memleak").arg(path);
    }
    Err(command.exec()).with_context(|| format!("failed to start {} as root", this.display()))
}

fn watch_signals() -> Result<()> {
    extern "C" fn note(_: nix::libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for number in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler stores to an atomic, which is async-signal-safe, and replaces no other handler of this program.
        unsafe { signal(number, SigHandler::Handler(note)) }
            .with_context(|| format!("failed to set a handler for {number}"))?;
    }
    Ok(())
}

fn tools(options: &Options) -> Result<Tools> {
    let release = target_dir()?.join("release");
    let memleak = peer::find(options.memleak.as_deref());
    Ok(Tools { leaktrace: release.join("leaktrace"), floor: release.join("examples/floor"), memleak })
}

fn measure_all(options: &Options) -> Result<(Summary, Option<tempfile::NamedTempFile>)> {
    // Found out before minutes are spent.
    let json = options.json.as_deref().map(unfinished).transpose()?;
    let plan = options.plan();
    let release = target_dir()?.join("release");
    let tools = tools(options)?;
    if let Err(why) = &tools.memleak {
        eprintln!("bench: memleak is not measured: {why}");
    }
    let targets = Targets::build()?;
    let _stats = measure::without_run_times()?;
    let mut cells: Vec<Vec<Cell>> = Vec::new();
    for workload in WORKLOADS {
        let mut of_workload = Vec::new();
        for round in 0..plan.rounds {
            eprintln!("bench: {}, round {} of {}", table::title(workload), round + 1, plan.rounds);
            // Each row comes first in turn, so that none always has the machine as another one left it.
            for turn in 0..Row::ALL.len() {
                let row = Row::ALL[(turn + round as usize) % Row::ALL.len()];
                if !tools.has(row) {
                    continue;
                }
                if INTERRUPTED.load(Ordering::Relaxed) {
                    bail!("interrupted");
                }
                let cell = measure::cell(&tools, &targets, row, workload, round, plan)
                    .with_context(|| format!("failed to measure {}: {}", table::title(workload), row.name()))?;
                of_workload.push(cell);
            }
        }
        cells.push(of_workload);
    }
    eprintln!("bench: unwind tables");
    let tables = unwinding::measure(&release.join("examples/unwind_tables"), plan.rounds)?;
    let first = measure_first(&tools, &targets, plan)?;
    eprintln!("bench: many processes");
    let many = many::measure(&tools, &targets.frame_pointers, plan)?;
    eprintln!("bench: heap profilers");
    let profiled = profilers::measure(&tools)?;
    let summary = Summary::new(plan, &WORKLOADS, cells, tools.memleak.err()).with(tables, first, many, profiled);
    Ok((summary, json))
}

/// The time to the first traced allocation, in each round; a program that is not installed is left out.
fn measure_first(tools: &Tools, targets: &Targets, plan: Plan) -> Result<Vec<(first::Program, Vec<First>)>> {
    let mut measured = Vec::new();
    for program in first::Program::ALL {
        eprintln!("bench: first traced allocation of {}", program.name());
        let mut runs = Vec::new();
        for _ in 0..plan.rounds {
            if INTERRUPTED.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            let run = first::measure(tools, &targets.frame_pointers, program);
            runs.extend(run.with_context(|| format!("failed to measure {}", program.name()))?);
        }
        if !runs.is_empty() {
            measured.push((program, runs));
        }
    }
    Ok(measured)
}

/// A file beside `path`, to be renamed to it once it is whole.
fn unfinished(path: &Path) -> Result<tempfile::NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Readable as any file that is written here, and not for its owner alone.
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    if fs::metadata(path).is_ok_and(|found| found.is_dir()) {
        bail!("failed to write {}: it is a folder", path.display());
    }
    tempfile::Builder::new()
        .permissions(permissions)
        .tempfile_in(folder)
        .with_context(|| format!("failed to write {}", path.display()))
}

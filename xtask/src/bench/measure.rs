//! One cell: a fresh target, one tool or none, a time without and a time with the programs' run times.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use leaktrace_tests::{Fixture, PATIENCE, Program};
use nix::libc;
use serde::Serialize;
use serde_json::Value;

use super::Workload;
use super::tool::{Row, Tools, Tracer};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub rounds: u32,
    /// Of each measurement.
    pub duration: Duration,
}

/// The program `deep`, as it is built for the workloads.
pub struct Targets {
    pub frame_pointers: PathBuf,
    pub no_frame_pointers: PathBuf,
}

impl Targets {
    /// Compiles what has not been compiled yet.
    pub fn build() -> Result<Self> {
        let deep = Program::c("deep");
        Ok(Self { frame_pointers: deep.build()?, no_frame_pointers: deep.without_frame_pointers().build()? })
    }

    fn of(&self, workload: Workload) -> &Path {
        if workload.frame_pointers { &self.frame_pointers } else { &self.no_frame_pointers }
    }
}

/// The target runs so long before anything is measured: caches, the tool's tables, the processor's clock.
const WARM_UP: Duration = Duration::from_millis(200);

/// The fixture's own frames around its recursion: `churn_block`, `churn`, the innermost
/// `descend`, `work` and the thread's start.
const OWN_FRAMES: u32 = 5;

const BPF_STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// What was measured of one row in one round.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    #[serde(serialize_with = "row_key")]
    pub row: Row,
    pub round: u32,
    /// Pairs of malloc and free a second, without run times.
    pub pairs_per_s: f64,
    /// Processor time of the target in that time, over its length.
    pub target_cpus: f64,
    pub tracer: Option<TracerFigures>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn row_key<S: serde::Serializer>(row: &Row, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(row.key())
}

/// What was measured of a tool.
#[derive(Clone, Debug, Serialize)]
pub struct TracerFigures {
    /// Places in the target's code.
    pub breakpoints: usize,
    /// From its start to the last breakpoint.
    pub attach_s: f64,
    /// From SIGINT until no breakpoint was left.
    pub detach_s: f64,
    /// Processor time of the tool while the target ran without run times, over the length of that.
    pub cpus: f64,
    /// Processor seconds of the tool from its start until SIGINT.
    pub cpu_s: f64,
    pub peak_rss_bytes: u64,
    pub programs: ProgramTime,
    /// Run time of the probes' programs over the target's pairs.
    pub ns_per_run: f64,
    pub ns_per_pair: f64,
    /// Of the deepest stack that it shows.
    pub stack_frames: Option<usize>,
    /// What leaktrace itself says.
    pub report: Option<ReportFigures>,
}

/// Out of leaktrace's own report.
#[derive(Clone, Debug, Serialize)]
pub struct ReportFigures {
    pub libc: String,
    pub events: u64,
    /// malloc and free calls that the target made while it was attached.
    pub expected_events: u64,
    pub lost: u64,
    pub losses: BTreeMap<String, u64>,
    /// Frames that were taken over from the thread's last stack, and those that were unwound.
    pub frames_reused: u64,
    pub frames_unwound: u64,
}

impl ReportFigures {
    /// Of all frames; `None` where none were counted.
    pub fn reused(&self) -> Option<f64> {
        let all = self.frames_reused + self.frames_unwound;
        (all > 0).then(|| self.frames_reused as f64 / all as f64)
    }
}

/// Run time of a tool's programs, from the kernel's statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProgramTime {
    /// Of programs at probes.
    pub ns: u64,
    pub runs: u64,
    /// Of programs at tracepoints: they run for the whole system's system calls.
    pub tracepoint_ns: u64,
    pub tracepoint_runs: u64,
    /// Runs that the kernel left out because a program was running already.
    pub recursion_misses: u64,
}

/// What the target says of a run.
pub struct Run {
    pairs: u64,
    seconds: f64,
    cpu_seconds: f64,
}

impl Run {
    pub fn pairs_per_s(&self) -> f64 {
        self.pairs as f64 / self.seconds
    }
}

/// Measures one cell.
pub fn cell(tools: &Tools, targets: &Targets, row: Row, workload: Workload, round: u32, plan: Plan) -> Result<Cell> {
    let mut target = Fixture::builder(targets.of(workload))
        .arg("--threads")
        .arg(workload.threads.to_string())
        .arg("--frames")
        .arg(workload.frames.saturating_sub(OWN_FRAMES).to_string())
        .arg("--turn")
        .arg(workload.turn.to_string())
        .patience(plan.duration + PATIENCE)
        .start()?;
    let tracer = tools.attach(row, target.pid())?;
    let warm_up = run(&mut target, WARM_UP)?;
    let cpu_before = tracer.as_ref().map(Tracer::cpu).transpose()?.unwrap_or_default();
    let plain = run(&mut target, plan.duration)?;
    let cpu_after = tracer.as_ref().map(Tracer::cpu).transpose()?.unwrap_or_default();
    let mut cell = Cell {
        row,
        round,
        pairs_per_s: plain.pairs_per_s(),
        target_cpus: plain.cpu_seconds / plain.seconds,
        tracer: None,
    };
    let Some(tracer) = tracer else { return Ok(cell) };

    let before = program_time(tracer.pid())?;
    let stats = enable_run_times()?;
    let timed = run(&mut target, plan.duration)?;
    drop(stats);
    let programs = program_time(tracer.pid())?.since(before);
    let (cpu, peak_rss_bytes) = (tracer.cpu()?, tracer.peak_rss()?);
    let (breakpoints, attach) = (tracer.breakpoints, tracer.attach);
    let ended = tracer.finish()?;
    let calls = 2 * (warm_up.pairs + plain.pairs + timed.pairs);
    let (report, stack_frames) = match row {
        Row::Memleak => (None, memleak_frames(&ended.output)),
        _ if row.is_leaktrace() => {
            let (report, frames) = read_report(&ended.output, calls)?;
            (Some(report), Some(frames))
        }
        _ => (None, None),
    };
    cell.tracer = Some(TracerFigures {
        breakpoints,
        attach_s: attach.as_secs_f64(),
        detach_s: ended.detach.as_secs_f64(),
        cpus: (cpu_after.saturating_sub(cpu_before)).as_secs_f64() / plain.seconds,
        cpu_s: cpu.as_secs_f64(),
        peak_rss_bytes,
        programs,
        ns_per_run: programs.ns as f64 / programs.runs as f64,
        ns_per_pair: programs.ns as f64 / timed.pairs as f64,
        stack_frames,
        report,
    });
    Ok(cell)
}

/// Lets the target work for so long.
pub fn run(target: &mut Fixture, duration: Duration) -> Result<Run> {
    let answer = target.ask(&format!("run {}", duration.as_millis()))?;
    let number = |key: &str| {
        answer[key].as_f64().with_context(|| format!("failed to read {key} in the target's answer {answer}"))
    };
    let pairs = answer["pairs"].as_u64().filter(|pairs| *pairs > 0).context("failed to see the target do anything")?;
    Ok(Run { pairs, seconds: number("seconds")?, cpu_seconds: number("cpu_seconds")? })
}

/// Frames of the deepest stack in what memleak prints: under each line for a stack one for each frame, numbered from zero.
fn memleak_frames(text: &str) -> Option<usize> {
    let number = |line: &str| line.strip_prefix('\t')?.split_once(" [<")?.0.parse::<usize>().ok();
    text.lines().filter_map(number).max().map(|last| last + 1)
}

/// Also gives the frames of the deepest stack that held a block at the end.
fn read_report(text: &str, expected_events: u64) -> Result<(ReportFigures, usize)> {
    let report: Value = serde_json::from_str(text).with_context(|| format!("failed to read the report {text:?}"))?;
    let losses: BTreeMap<String, u64> =
        serde_json::from_value(report["losses"].clone()).context("failed to read the report's losses")?;
    let frames = |stack: &Value| {
        let holds = stack["live_count"].as_u64() > Some(0) && stack["op"] == "malloc";
        // Inlined functions have no frame of their own.
        let frames = stack["frames"].as_array().filter(|_| holds);
        frames.map_or(0, |frames| frames.iter().filter(|frame| frame["inlined"] != true).count())
    };
    let counter = |name: &str| report["counters"][name].as_u64().unwrap_or(0);
    let figures = ReportFigures {
        libc: report["processes"][0]["allocators"][0]["family"].as_str().unwrap_or_default().to_owned(),
        events: report["events"].as_u64().context("failed to read the report's number of events")?,
        expected_events,
        lost: losses.values().sum(),
        losses,
        frames_reused: counter("frames_reused"),
        frames_unwound: counter("frames_unwound"),
    };
    Ok((figures, leaktrace_tests::stacks(&report).map(frames).max().unwrap_or(0)))
}

/// The run times of all programs that `pid` holds, since they were loaded.
fn program_time(pid: u32) -> Result<ProgramTime> {
    /// `BPF_PROG_TYPE_KPROBE`, which uprobe programs are too.
    const KPROBE: u64 = 2;
    let folder = format!("/proc/{pid}/fdinfo");
    let mut seen = BTreeSet::new();
    let mut sum = ProgramTime::default();
    for entry in fs::read_dir(&folder).with_context(|| format!("failed to read {folder}"))? {
        // A descriptor may be closed between the listing and the reading.
        let Ok(text) = entry.and_then(|entry| fs::read_to_string(entry.path())) else { continue };
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse::<u64>().ok())
        };
        // Links name their program as well, but have no run time.
        let (Some(id), Some(ns), Some(runs)) = (field("prog_id"), field("run_time_ns"), field("run_cnt")) else {
            continue;
        };
        if !seen.insert(id) {
            continue;
        }
        if field("prog_type") == Some(KPROBE) {
            sum.ns += ns;
            sum.runs += runs;
        } else {
            sum.tracepoint_ns += ns;
            sum.tracepoint_runs += runs;
        }
        sum.recursion_misses += field("recursion_misses").unwrap_or(0);
    }
    Ok(sum)
}

impl ProgramTime {
    fn since(self, before: Self) -> Self {
        Self {
            ns: self.ns - before.ns,
            runs: self.runs - before.runs,
            tracepoint_ns: self.tracepoint_ns - before.tracepoint_ns,
            tracepoint_runs: self.tracepoint_runs - before.tracepoint_runs,
            recursion_misses: self.recursion_misses - before.recursion_misses,
        }
    }
}

/// The kernel counts run times until the result is closed (5.8). Nothing is left to restore, however this program ends.
fn enable_run_times() -> Result<OwnedFd> {
    const BPF_ENABLE_STATS: libc::c_long = 32;
    // The part of `union bpf_attr` for this command: the type of statistics, BPF_STATS_RUN_TIME.
    let attr = [0_u32];
    // SAFETY: the kernel reads only the given number of bytes, which is the array's size; the array outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_ENABLE_STATS, attr.as_ptr(), size_of_val(&attr)) };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("failed to enable BPF run times");
    }
    // SAFETY: the system call just returned this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// Switches off run times that the host has switched on; on again when dropped.
pub struct WithoutRunTimes {
    was: String,
}

pub fn without_run_times() -> Result<WithoutRunTimes> {
    let was = fs::read_to_string(BPF_STATS).with_context(|| format!("failed to read {BPF_STATS}"))?;
    if was.trim() != "0" {
        fs::write(BPF_STATS, "0").with_context(|| format!("failed to write {BPF_STATS}"))?;
    }
    Ok(WithoutRunTimes { was })
}

impl Drop for WithoutRunTimes {
    fn drop(&mut self) {
        if self.was.trim() != "0"
            && let Err(error) = fs::write(BPF_STATS, &self.was)
        {
            eprintln!("bench: failed to restore {BPF_STATS}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The deepest of memleak's stacks counts, with and without names; no stack is none.
    #[test]
    fn frames_of_memleak() {
        let text = "\
            Attaching to pid 22974, Ctrl+C to quit.\n\
            [9:50:7] Top 2 stacks with outstanding allocations:\n\
            210 bytes in 1 allocations from stack\n\
            \t0 [<000055e12dc7884d>] churn_block+0x1d [/deep]\n\
            \t1 [<00007f8e66eed1f5>] [/usr/lib/libc.so.6]\n\
            8 bytes in 1 allocations from stack\n\
            \t0 [<000055e12dc7884d>] churn_block+0x1d [/deep]\n";
        assert_eq!(memleak_frames(text), Some(2));
        assert_eq!(memleak_frames("[9:49:55] Top 0 stacks with outstanding allocations:\n"), None);
    }
}

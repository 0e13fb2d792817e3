//! What the cells say together: medians of each row, ratios between rows of the same round, and the targets they are held to.

use std::fs;

use serde_json::{Value, json};

use super::Workload;
use super::first::{self, First};
use super::many::Many;
use super::measure::{Cell, Plan, ReportFigures, TracerFigures};
use super::profilers::Profiled;
use super::tool::Row;
use super::unwinding::Tables;

/// All that was measured.
pub struct Summary {
    plan: Plan,
    pub workloads: Vec<Measured>,
    pub tables: Vec<Tables>,
    /// Of each program, each round.
    pub first: Vec<(first::Program, Vec<First>)>,
    pub many: Many,
    pub profiled: Vec<Profiled>,
    /// Why there is no memleak, if there is none.
    pub memleak_missing: Option<String>,
    pub host: Host,
}

/// The machine and what runs on it; empty where it cannot be read.
pub struct Host {
    pub kernel: String,
    pub processor: String,
    pub processors: usize,
    pub libc: String,
}

/// The cells of one workload.
pub struct Measured {
    pub workload: Workload,
    cells: Vec<Cell>,
}

/// What leaktrace is held to.
pub struct Target {
    pub name: &'static str,
    pub kind: TargetKind,
    /// `None` where the figure is shown without being held to anything.
    pub bound: Option<Bound>,
    /// `None` where it could not be measured.
    pub value: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    Ratio,
    Count,
    Seconds,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

impl Target {
    /// Whether it is met; `None` where there is nothing to compare.
    pub fn is_met(&self) -> Option<bool> {
        Some(self.bound?.is_met(self.value?))
    }
}

impl Summary {
    pub fn new(plan: Plan, workloads: &[Workload], cells: Vec<Vec<Cell>>, memleak_missing: Option<String>) -> Self {
        let workloads: Vec<Measured> =
            workloads.iter().zip(cells).map(|(&workload, cells)| Measured { workload, cells }).collect();
        let reports = workloads
            .iter()
            .flat_map(|measured| &measured.cells)
            .filter_map(|cell| cell.tracer.as_ref()?.report.as_ref());
        let libc = reports.map(|report| report.libc.clone()).next().unwrap_or_default();
        Self {
            plan,
            workloads,
            tables: Vec::new(),
            first: Vec::new(),
            many: Many::default(),
            profiled: Vec::new(),
            memleak_missing,
            host: Host::this(libc),
        }
    }

    /// Adds what is measured apart from the workloads.
    #[must_use]
    pub fn with(
        self,
        tables: Vec<Tables>,
        first: Vec<(first::Program, Vec<First>)>,
        many: Many,
        profiled: Vec<Profiled>,
    ) -> Self {
        Self { tables, first, many, profiled, ..self }
    }

    pub fn rounds(&self) -> u32 {
        self.plan.rounds
    }

    pub fn seconds(&self) -> f64 {
        self.plan.duration.as_secs_f64()
    }

    /// Everything, for machines.
    pub fn to_json(&self) -> Value {
        let workloads: Vec<Value> = self.workloads.iter().map(Measured::to_json).collect();
        json!({
            "schema": "leaktrace.bench/1",
            "host": {
                "kernel": self.host.kernel,
                "processor": self.host.processor,
                "processors": self.host.processors,
                "libc": self.host.libc,
            },
            "rounds": self.plan.rounds,
            "seconds": self.seconds(),
            "memleak_missing": self.memleak_missing,
            "workloads": workloads,
            "unwind_tables": self.tables.iter().map(|tables| json!({
                "tables": tables,
                "kept_of_raw": tables.kept(),
                "targets": targets_json(tables.targets()),
            })).collect::<Vec<_>>(),
            "many_processes": self.many,
            "profilers": self.profiled,
            "first_allocation": self.first.iter().map(|(program, runs)| json!({
                "program": program.name(),
                "seconds": first_seconds(runs),
                "rounds": runs,
                "doubts": first_doubts(runs),
            })).collect::<Vec<_>>(),
        })
    }
}

/// The median over the rounds.
pub fn first_seconds(runs: &[First]) -> Option<f64> {
    median(runs.iter().map(|run| run.seconds).collect())
}

/// Where what was slow was not traced, why the time is not to be trusted.
pub fn first_doubts(runs: &[First]) -> Vec<String> {
    let doubtful = runs.iter().enumerate().filter(|(_, run)| run.events < run.expected_events);
    let text = |(round, run): (usize, &First)| {
        format!("round {}: leaktrace saw {} of {} slow calls", round + 1, run.events, run.expected_events)
    };
    doubtful.map(text).collect()
}

fn targets_json(targets: Vec<Target>) -> Vec<Value> {
    let json = |target: Target| {
        let (at_least, at_most) = match target.bound {
            Some(Bound::AtLeast(bound)) => (Some(bound), None),
            Some(Bound::AtMost(bound)) => (None, Some(bound)),
            None => (None, None),
        };
        json!({
            "name": target.name,
            "value": target.value,
            "at_least": at_least,
            "at_most": at_most,
            "met": target.is_met(),
        })
    };
    targets.into_iter().map(json).collect()
}

impl Host {
    fn this(libc: String) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            processor: model.map_or("", |(_, model)| model).to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            libc,
        }
    }
}

impl Measured {
    fn of(&self, row: Row) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(move |cell| cell.row == row)
    }

    /// The median over the rounds; `None` where the row was not measured, or has no such figure.
    pub fn median(&self, row: Row, figure: impl Fn(&Cell) -> Option<f64>) -> Option<f64> {
        median(self.of(row).filter_map(figure).collect())
    }

    /// The same of a figure of the tool.
    pub fn tracer_median(&self, row: Row, figure: impl Fn(&TracerFigures) -> f64) -> Option<f64> {
        self.median(row, |cell| cell.tracer.as_ref().map(&figure))
    }

    /// The largest over the rounds.
    pub fn tracer_max(&self, row: Row, figure: impl Fn(&TracerFigures) -> Option<f64>) -> Option<f64> {
        self.of(row).filter_map(|cell| figure(cell.tracer.as_ref()?)).reduce(f64::max)
    }

    /// The median of the rounds' own ratios: what slows a whole round down falls out.
    pub fn ratio(&self, above: Row, below: Row, figure: impl Fn(&Cell) -> Option<f64>) -> Option<f64> {
        let of_round = |cell: &Cell| {
            let other = self.of(below).find(|other| other.round == cell.round)?;
            Some(figure(cell)? / figure(other)?).filter(|ratio| ratio.is_finite())
        };
        median(self.of(above).filter_map(of_round).collect())
    }

    /// The median of a figure in leaktrace's own report.
    pub fn report_median(&self, row: Row, figure: impl Fn(&ReportFigures) -> Option<f64>) -> Option<f64> {
        self.median(row, |cell| figure(cell.tracer.as_ref()?.report.as_ref()?))
    }

    /// Events that leaktrace lost in its worst round.
    pub fn lost(&self, row: Row) -> Option<f64> {
        self.tracer_max(row, |tracer| Some(tracer.report.as_ref()?.lost as f64))
    }

    /// Frames of the deepest stack that a row shows, in its worst round.
    pub fn frames(&self, row: Row) -> Option<f64> {
        let frames = |cell: &Cell| cell.tracer.as_ref()?.stack_frames.map(|frames| frames as f64);
        self.of(row).filter_map(frames).reduce(f64::min)
    }

    /// Where leaktrace's own report does not fit what the target did, why its figures are not to be trusted.
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        for cell in self.cells.iter().filter(|cell| cell.row.is_exact()) {
            let Some(tracer) = &cell.tracer else { continue };
            let Some(report) = &tracer.report else { continue };
            let place = format!("round {}, {}", cell.round + 1, cell.row.name());
            let missing = report.expected_events.saturating_sub(report.events + report.lost);
            // The first free of each thread is of a null pointer.
            if missing > u64::from(self.workload.threads) {
                doubts.push(format!(
                    "{place}: {} of {} calls are missing from leaktrace's events and not counted as lost",
                    missing, report.expected_events
                ));
            }
            let frames = tracer.stack_frames.unwrap_or(0);
            if let Some(expected) = self.expected_frames(cell.row)
                && frames != expected
            {
                doubts.push(format!("{place}: stacks have {frames} frames instead of {expected}"));
            }
        }
        doubts
    }

    /// Frames that leaktrace's stacks must have; `None` where nothing leads through them.
    fn expected_frames(&self, row: Row) -> Option<usize> {
        let frames = self.workload.frames as usize;
        match row {
            Row::FramePointers => self.workload.frame_pointers.then_some(frames),
            // The C library's code that makes the system call for a thread is left out of the chain of frame pointers.
            _ => Some(frames + 1),
        }
    }

    /// The smallest share of the processors it could use that the target got beside a tool that needs none; something else had
    /// the rest.
    pub fn share(&self) -> Option<f64> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let usable = processors.min(self.workload.threads as usize) as f64;
        let quiet = self.of(Row::Nothing).chain(self.of(Row::FloorAllocator)).chain(self.of(Row::Floor));
        quiet.map(|cell| cell.target_cpus / usable).reduce(f64::min)
    }

    /// The figures that have a target, in the order of the table.
    pub fn targets(&self) -> Vec<Target> {
        // What one busy thread reaches must be kept up with; how many more do depends on the processors.
        let one_thread = self.workload.threads == 1;
        // A memleak that sees two frames is nothing to be held to.
        let like_memleak = self.workload.frame_pointers;
        let (by_fp, by_tables) = if self.workload.frames < 30 { (0.45, 0.6) } else { (0.35, 0.5) };
        let ratio = |name, bound, value| Target { name, kind: TargetKind::Ratio, bound, value };
        let of_memleak = |name, row, bound| {
            let bound = like_memleak.then_some(Bound::AtMost(bound));
            ratio(name, bound, self.ratio(row, Row::Memleak, ns_per_pair))
        };
        let of_floor = |name, row: Row, bound| ratio(name, bound, self.ratio(row, row.floor(), throughput));
        vec![
            ratio(
                "pairs/s, of memleak's",
                like_memleak.then_some(Bound::AtLeast(5.0)),
                self.ratio(Row::Leaktrace, Row::Memleak, throughput),
            ),
            // What another program takes away falls out of these, and so does what the tool takes.
            ratio("pairs/CPU s, of memleak's", None, self.ratio(Row::Leaktrace, Row::Memleak, pairs_per_cpu_second)),
            // What an allocation costs more when its stack has changed, empty programs do not know: no bound was set for it.
            of_floor(
                "pairs/s, of empty programs'",
                Row::Leaktrace,
                (self.workload.turn == 0).then_some(Bound::AtLeast(0.8)),
            ),
            ratio("pairs/CPU s, of empty ones'", None, self.ratio(Row::Leaktrace, Row::Floor, pairs_per_cpu_second)),
            of_floor("heap only, of empty ones'", Row::HeapOnly, None),
            ratio("  pairs/CPU s", None, self.ratio(Row::HeapOnly, Row::HeapOnly.floor(), pairs_per_cpu_second)),
            of_memleak("ns/pair, of memleak's", Row::Leaktrace, by_fp),
            // The same figure, held to what unwinding without frame pointers may take.
            of_memleak("  as stacks by tables", Row::Leaktrace, by_tables),
            of_memleak("  with --unwind fp", Row::FramePointers, by_fp),
            of_floor("one in 512K, of empty entries'", Row::Sampled, one_thread.then_some(Bound::AtLeast(0.9))),
            of_memleak("  ns/pair, of memleak's", Row::Sampled, 0.15),
            Target {
                name: "events lost",
                kind: TargetKind::Count,
                bound: one_thread.then_some(Bound::AtMost(0.0)),
                value: self.lost(Row::Leaktrace),
            },
            Target {
                name: "time to detach",
                kind: TargetKind::Seconds,
                bound: Some(Bound::AtMost(0.5)),
                value: self.tracer_median(Row::Leaktrace, |tracer| tracer.detach_s),
            },
        ]
    }

    fn to_json(&self) -> Value {
        let rows: Vec<Value> = Row::ALL
            .into_iter()
            .filter(|row| self.of(*row).next().is_some())
            .map(|row| {
                json!({
                    "row": row.key(),
                    "pairs_per_s": self.median(row, throughput),
                    "of_nothing": self.ratio(row, Row::Nothing, throughput),
                    "of_floor": self.ratio(row, Row::Floor, throughput),
                    "of_floor_entry": self.ratio(row, Row::FloorEntry, throughput),
                    "of_floor_allocator": self.ratio(row, Row::FloorAllocator, throughput),
                    "of_memleak": self.ratio(row, Row::Memleak, throughput),
                    "target_cpus": self.median(row, |cell| Some(cell.target_cpus)),
                    "ns_per_run": self.tracer_median(row, |tracer| tracer.ns_per_run),
                    "ns_per_pair": self.median(row, ns_per_pair),
                    "ns_per_pair_of_memleak": self.ratio(row, Row::Memleak, ns_per_pair),
                    "tracer_cpus": self.tracer_median(row, |tracer| tracer.cpus),
                    "tracer_cpu_s": self.tracer_median(row, |tracer| tracer.cpu_s),
                    "peak_rss_bytes": self.tracer_max(row, |tracer| Some(tracer.peak_rss_bytes as f64)),
                    "attach_s": self.tracer_median(row, |tracer| tracer.attach_s),
                    "detach_s": self.tracer_median(row, |tracer| tracer.detach_s),
                    "lost": self.lost(row),
                    "frames": self.frames(row),
                    "frames_reused": self.report_median(row, ReportFigures::reused),
                    "cells": self.of(row).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "threads": self.workload.threads,
            "frames": self.workload.frames,
            "turn": self.workload.turn,
            "frame_pointers": self.workload.frame_pointers,
            "rows": rows,
            "targets": targets_json(self.targets()),
            "doubts": self.doubts(),
        })
    }
}

/// Pairs a second.
#[expect(clippy::unnecessary_wraps, reason = "one of the figures that a ratio is made of")]
pub fn throughput(cell: &Cell) -> Option<f64> {
    Some(cell.pairs_per_s)
}

/// Pairs for each second that the target had a processor.
#[expect(clippy::unnecessary_wraps, reason = "one of the figures that a ratio is made of")]
pub fn pairs_per_cpu_second(cell: &Cell) -> Option<f64> {
    Some(cell.pairs_per_s / cell.target_cpus)
}

/// Run time of the programs for each pair.
pub fn ns_per_pair(cell: &Cell) -> Option<f64> {
    cell.tracer.as_ref().map(|tracer| tracer.ns_per_pair)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { upper } else { f64::midpoint(values[middle - 1], upper) })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const WORKLOAD: Workload = Workload { threads: 1, frames: 10, turn: 0, frame_pointers: true };

    fn cell(row: Row, round: u32, pairs_per_s: f64) -> Cell {
        Cell { row, round, pairs_per_s, target_cpus: 1.0, tracer: None }
    }

    /// The middle value, or the mean of the two in the middle, in whatever order they come; none of nothing.
    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }

    /// A ratio is made within each round: a machine that is ten times slower in one round does not move it.
    #[test]
    fn ratios_are_of_one_round() {
        let cells = vec![
            cell(Row::Memleak, 0, 100.0),
            cell(Row::Leaktrace, 0, 500.0),
            cell(Row::Leaktrace, 1, 50.0),
            cell(Row::Memleak, 1, 10.0),
            // A round that ended early has no partner.
            cell(Row::Leaktrace, 2, 9999.0),
        ];
        let measured = Measured { workload: WORKLOAD, cells };
        assert_eq!(measured.ratio(Row::Leaktrace, Row::Memleak, throughput), Some(5.0));
        assert_eq!(measured.ratio(Row::Leaktrace, Row::Floor, throughput), None);
    }

    /// A target that could not be measured is neither met nor missed, also in JSON.
    #[test]
    fn unmeasured_targets_are_unknown() {
        let plan = Plan { rounds: 1, duration: Duration::from_secs(1) };
        let cells = vec![vec![cell(Row::Floor, 0, 400.0), cell(Row::Leaktrace, 0, 300.0)]];
        let summary = Summary::new(plan, &[WORKLOAD], cells, Some("not there".to_owned()));
        let targets = &summary.to_json()["workloads"][0]["targets"];
        assert_eq!((&targets[0]["value"], &targets[0]["met"]), (&Value::Null, &Value::Null));
        assert_eq!((&targets[2]["value"], &targets[2]["met"]), (&json!(0.75), &json!(false)));
    }

    /// Leaktrace without mapping calls is held against empty programs without them.
    #[test]
    fn heap_only_has_its_own_floor() {
        let cells = vec![
            cell(Row::FloorAllocator, 0, 500.0),
            cell(Row::Floor, 0, 250.0),
            cell(Row::HeapOnly, 0, 400.0),
            cell(Row::Leaktrace, 0, 225.0),
        ];
        let targets = Measured { workload: WORKLOAD, cells }.targets();
        let value = |name| targets.iter().find(|target| target.name == name).and_then(|target| target.value);
        assert_eq!(value("heap only, of empty ones'"), Some(0.8));
        assert_eq!(value("pairs/s, of empty programs'"), Some(0.9));
    }

    /// A report with fewer events than slow calls casts doubt on the time, one with more does not.
    #[test]
    fn untraced_slow_calls_are_doubtful() {
        let run = |events| First { seconds: 0.1, usual_ns: 30, slow_ns: 5000, expected_events: 128, events };
        assert_eq!(first_doubts(&[run(128), run(127), run(5000)]), ["round 2: leaktrace saw 127 of 128 slow calls"]);
    }
}

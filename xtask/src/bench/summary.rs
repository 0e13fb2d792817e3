//! What the cells say together: medians of each row, ratios between rows of the same round, and the targets they are held to.

use std::fs;

use serde_json::{Value, json};

use super::Workload;
use super::measure::{Cell, Plan, TracerFigures};
use super::tool::Row;

/// All that was measured.
pub struct Summary {
    plan: Plan,
    pub workloads: Vec<Measured>,
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
        Self { plan, workloads, memleak_missing, host: Host::this(libc) }
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
        })
    }
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

    /// Events that leaktrace lost in its worst round.
    pub fn lost(&self) -> Option<f64> {
        self.tracer_max(Row::Leaktrace, |tracer| Some(tracer.report.as_ref()?.lost as f64))
    }

    /// Where leaktrace's own report does not fit what the target did, why its figures are not to be trusted.
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        for cell in self.of(Row::Leaktrace) {
            let Some(report) = cell.tracer.as_ref().and_then(|tracer| tracer.report.as_ref()) else { continue };
            let missing = report.expected_events.saturating_sub(report.events + report.lost);
            // The first free of each thread is of a null pointer.
            if missing > u64::from(self.workload.threads) {
                doubts.push(format!(
                    "round {}: {} of {} calls are missing from leaktrace's events and not counted as lost",
                    cell.round + 1,
                    missing,
                    report.expected_events
                ));
            }
            if report.stack_frames != self.workload.frames as usize {
                doubts.push(format!(
                    "round {}: leaktrace's stacks have {} frames instead of {}",
                    cell.round + 1,
                    report.stack_frames,
                    self.workload.frames
                ));
            }
        }
        doubts
    }

    /// The smallest share of the processors it could use that the target got beside a tool that needs none; something else had
    /// the rest.
    pub fn share(&self) -> Option<f64> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let usable = processors.min(self.workload.threads as usize) as f64;
        let quiet = self.of(Row::Nothing).chain(self.of(Row::Floor));
        quiet.map(|cell| cell.target_cpus / usable).reduce(f64::min)
    }

    /// The figures that have a target, in the order of the table.
    pub fn targets(&self) -> Vec<Target> {
        // What one busy thread reaches must be kept up with; how many more do depends on the processors.
        let one_thread = self.workload.threads == 1;
        let per_pair = if self.workload.frames < 30 { 0.45 } else { 0.35 };
        let ratio = |name, bound, value| Target { name, kind: TargetKind::Ratio, bound: Some(bound), value };
        vec![
            ratio("pairs/s, of memleak's", Bound::AtLeast(5.0), self.ratio(Row::Leaktrace, Row::Memleak, throughput)),
            // What another program takes away falls out of these, and so does what the tool takes.
            Target {
                name: "pairs/CPU s, of memleak's",
                kind: TargetKind::Ratio,
                bound: None,
                value: self.ratio(Row::Leaktrace, Row::Memleak, pairs_per_cpu_second),
            },
            ratio(
                "pairs/s, of empty programs'",
                Bound::AtLeast(0.8),
                self.ratio(Row::Leaktrace, Row::Floor, throughput),
            ),
            Target {
                name: "pairs/CPU s, of empty programs'",
                kind: TargetKind::Ratio,
                bound: None,
                value: self.ratio(Row::Leaktrace, Row::Floor, pairs_per_cpu_second),
            },
            ratio(
                "ns/pair, of memleak's",
                Bound::AtMost(per_pair),
                self.ratio(Row::Leaktrace, Row::Memleak, ns_per_pair),
            ),
            Target {
                name: "events lost",
                kind: TargetKind::Count,
                bound: one_thread.then_some(Bound::AtMost(0.0)),
                value: self.lost(),
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
                    "lost": if row == Row::Leaktrace { self.lost() } else { None },
                    "cells": self.of(row).collect::<Vec<_>>(),
                })
            })
            .collect();
        let targets: Vec<Value> = self
            .targets()
            .into_iter()
            .map(|target| {
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
            })
            .collect();
        json!({
            "threads": self.workload.threads,
            "frames": self.workload.frames,
            "rows": rows,
            "targets": targets,
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
        let measured = Measured { workload: Workload { threads: 1, frames: 10 }, cells };
        assert_eq!(measured.ratio(Row::Leaktrace, Row::Memleak, throughput), Some(5.0));
        assert_eq!(measured.ratio(Row::Leaktrace, Row::Floor, throughput), None);
    }

    /// A target that could not be measured is neither met nor missed, also in JSON.
    #[test]
    fn unmeasured_targets_are_unknown() {
        let plan = Plan { rounds: 1, duration: Duration::from_secs(1) };
        let workload = Workload { threads: 1, frames: 10 };
        let cells = vec![vec![cell(Row::Floor, 0, 400.0), cell(Row::Leaktrace, 0, 300.0)]];
        let summary = Summary::new(plan, &[workload], cells, Some("not there".to_owned()));
        let targets = &summary.to_json()["workloads"][0]["targets"];
        assert_eq!((&targets[0]["value"], &targets[0]["met"]), (&Value::Null, &Value::Null));
        assert_eq!((&targets[2]["value"], &targets[2]["met"]), (&json!(0.75), &json!(false)));
    }
}

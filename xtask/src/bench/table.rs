//! The figures as text for a terminal of 120 columns, and for the README.

use std::fmt::Write as _;

use super::Workload;
use super::measure::ReportFigures;
use super::summary::{
    Bound, Measured, Summary, Target, TargetKind, first_doubts, first_seconds, ns_per_pair, throughput,
};
use super::tool::Row;

/// Width of the first column of the tables.
const LABEL: usize = 24;
const TARGET_LABEL: usize = 30;
const TARGET_WIDTH: usize = 21;

/// With less of the processors than this the target shared them with something else.
const QUIET: f64 = 0.95;

/// `1 thread, 10 frames`, and how many of those change, or whether the target has no frame pointers.
pub fn title(workload: Workload) -> String {
    let s = if workload.threads == 1 { "" } else { "s" };
    let rest = match (workload.turn, workload.frame_pointers) {
        (0, true) => "",
        (0, false) => ", no fp",
        (turn, true) => &format!(", {turn} new"),
        (turn, false) => &format!(", {turn} new, no fp"),
    };
    format!("{} thread{s}, {} frames{rest}", workload.threads, workload.frames)
}

/// The same for a narrow column.
fn short_title(workload: Workload) -> String {
    let s = if workload.threads == 1 { "" } else { "s" };
    let rest = match (workload.turn, workload.frame_pointers) {
        (0, true) => " frames",
        (0, false) => ", no fp",
        (turn, _) => &format!(", {turn} new"),
    };
    format!("{} thread{s}, {}{rest}", workload.threads, workload.frames)
}

/// All tables and what is to be known about them.
pub fn render(summary: &Summary) -> String {
    let mut text = String::new();
    let host = &summary.host;
    let rounds =
        if summary.rounds() == 1 { "one round".to_owned() } else { format!("medians of {} rounds", summary.rounds()) };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "malloc + free of 16 to 1000 bytes under leaktrace and others; {rounds}, {} s each",
        summary.seconds()
    );
    let _ = writeln!(text, "{}, Linux {}, {} x {}\n", host.libc, host.kernel, host.processors, host.processor);
    for measured in &summary.workloads {
        rows(&mut text, measured, summary.memleak_missing.as_deref());
    }
    targets(&mut text, summary);
    unwind_tables(&mut text, summary);
    first_allocation(&mut text, summary);
    text += &summary.many.render();
    text += &super::profilers::render(&summary.profiled);
    let share = summary.workloads.iter().filter_map(Measured::share).reduce(f64::min).filter(|share| *share < QUIET);
    if let Some(share) = share {
        let _ = writeln!(
            text,
            "\nThis machine was busy: at times the target got {:.0} % of the processors it could use.",
            share * 100.0
        );
    }
    let _ = write!(
        text,
        "\n\
         pairs/s       malloc + free of the target, all threads; program times are measured apart, as they cost time\n\
         pairs/CPU s   for the processor time that the target itself got, whatever else the machine did\n\
         empty         two-instruction programs at leaktrace's places: nothing that watches the same calls can be faster; for\n\
         \x20             heap only, which does not watch mapping calls, those at the allocator only; for one in 512K, those that\n\
         \x20             do not ask for returns\n\
         ns/run        run time of the programs at the probes, by the kernel's BPF statistics; ns/pair: for a malloc + free\n\
         lost          events that leaktrace counted as lost, worst round; memleak does not count its own\n\
         no fp         the target is compiled without frame pointers, as distributions compile; memleak needs them\n\
         new           so many frames are other functions' in each pair than in the one before, in about a thousand stacks\n\
         frames        of the deepest stack shown; by tables one more, the code that starts the thread\n\
         reused        share of frames that were taken over from the thread's last stack instead of unwound\n\
         CPU           of one processor, user + system time of the tool while the target runs\n\
         attach        from the start of the tool to its last breakpoint; detach: from SIGINT until none is left\n\
         \n\
         decode + ledger from a recorded stream: cargo bench -p leak-user --bench ledger\n"
    );
    text
}

fn rows(text: &mut String, measured: &Measured, memleak_missing: Option<&str>) {
    let columns = [
        "pairs/s",
        "of empty",
        "of memleak",
        "ns/run",
        "ns/pair",
        "lost",
        "frames",
        "reused",
        "CPU",
        "peak RSS",
        "attach",
        "detach",
    ];
    line(text, &title(measured.workload), &columns.map(str::to_owned));
    for row in Row::ALL {
        if let (Row::Memleak, Some(why)) = (row, memleak_missing) {
            let _ = writeln!(text, "  {:<LABEL$} not measured: {why}", row.name());
            continue;
        }
        line(
            text,
            &format!("  {}", row.name()),
            &[
                show(measured.median(row, throughput), grouped),
                show(measured.ratio(row, row.floor(), throughput).filter(|_| row != Row::Floor), times),
                show(measured.ratio(row, Row::Memleak, throughput).filter(|_| row != Row::Memleak), times),
                show(measured.tracer_median(row, |tracer| tracer.ns_per_run), grouped),
                show(measured.median(row, ns_per_pair), grouped),
                show(measured.lost(row), grouped),
                show(measured.frames(row), grouped),
                show(measured.report_median(row, ReportFigures::reused), percent),
                show(measured.tracer_median(row, |tracer| tracer.cpus), percent),
                show(measured.tracer_max(row, |tracer| Some(tracer.peak_rss_bytes as f64)), |bytes| {
                    format!("{:.0} MiB", bytes / f64::from(1 << 20))
                }),
                show(measured.tracer_median(row, |tracer| tracer.attach_s), seconds),
                show(measured.tracer_median(row, |tracer| tracer.detach_s), seconds),
            ],
        );
    }
    for doubt in measured.doubts() {
        let _ = writeln!(text, "  DOUBTFUL: {doubt}");
    }
    text.push('\n');
}

fn line(text: &mut String, label: &str, cells: &[String; 12]) {
    const WIDTHS: [usize; 12] = [11, 9, 11, 7, 8, 6, 7, 7, 6, 9, 7, 7];
    let mut line = format!("{label:<LABEL$}");
    // A label that is wider takes from the first column.
    let mut end = LABEL;
    for (cell, width) in cells.iter().zip(WIDTHS) {
        end += width;
        let width = end.saturating_sub(line.len()).max(cell.len() + 1);
        let _ = write!(line, "{cell:>width$}");
    }
    let _ = writeln!(text, "{}", line.trim_end());
}

fn targets(text: &mut String, summary: &Summary) {
    let all: Vec<Vec<Target>> = summary.workloads.iter().map(Measured::targets).collect();
    let _ = write!(text, "{:<TARGET_LABEL$}", "leaktrace against its targets");
    for measured in &summary.workloads {
        let _ = write!(text, " {:>TARGET_WIDTH$}", short_title(measured.workload));
    }
    text.push('\n');
    for index in 0..all.first().map_or(0, Vec::len) {
        let _ = write!(text, "  {:<width$}", all[0][index].name, width = TARGET_LABEL - 2);
        for targets in &all {
            let _ = write!(text, " {:>TARGET_WIDTH$}", verdict(&targets[index]));
        }
        text.push('\n');
    }
}

fn unwind_tables(text: &mut String, summary: &Summary) {
    if summary.tables.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "\n{:<LABEL$}{:>7}{:>12}{:>11}{:>11}{:>9}{:>11}{:>10}  targets",
        "unwind tables", "files", "code KiB", "raw rows", "kept rows", "of raw", "bytes", "built in"
    );
    for tables in &summary.tables {
        let missed: Vec<String> = tables
            .targets()
            .iter()
            .filter(|target| target.is_met() == Some(false))
            .map(|target| format!("{} {}", target.name, verdict(target)))
            .collect();
        let _ = writeln!(
            text,
            "  {:<width$}{:>7}{:>12}{:>11}{:>11}{:>9}{:>11}{:>10}  {}",
            tables.name,
            tables.files.len(),
            grouped((tables.code_bytes >> 10) as f64),
            grouped(tables.raw_rows as f64),
            grouped(tables.kept_rows as f64),
            format!("{:.1} %", tables.kept() * 100.0),
            grouped(tables.bytes as f64),
            seconds(tables.build_s),
            if missed.is_empty() { "met".to_owned() } else { missed.join(", ") },
            width = LABEL - 2,
        );
    }
}

fn first_allocation(text: &mut String, summary: &Summary) {
    for (program, runs) in &summary.first {
        let name = program.name();
        let _ = write!(text, "\nfrom leaktrace's start to the first traced allocation of {name}: ");
        let _ = write!(text, "{}", show(first_seconds(runs), seconds));
        for doubt in first_doubts(runs) {
            let _ = write!(text, "\n  DOUBTFUL: {doubt}");
        }
    }
    if !summary.first.is_empty() {
        text.push('\n');
    }
}

/// `4.10 (>= 5) MISSED`.
fn verdict(target: &Target) -> String {
    let figure = |value: f64| match target.kind {
        TargetKind::Ratio => format!("{value:.2}"),
        TargetKind::Count => grouped(value),
        TargetKind::Seconds => seconds(value),
    };
    let Some(value) = target.value else { return "not measured".to_owned() };
    let value = figure(value);
    // Plain numbers: a bound is not written in the precision of what is measured.
    let bound = match target.bound {
        None => return value,
        Some(Bound::AtLeast(bound)) => format!(">= {bound}"),
        Some(Bound::AtMost(0.0)) => "= 0".to_owned(),
        Some(Bound::AtMost(bound)) if target.kind == TargetKind::Seconds => format!("<= {bound} s"),
        Some(Bound::AtMost(bound)) => format!("<= {bound}"),
    };
    let missed = if target.is_met() == Some(false) { " MISSED" } else { "" };
    format!("{value} ({bound}){missed}")
}

fn show(value: Option<f64>, how: impl Fn(f64) -> String) -> String {
    value.filter(|value| value.is_finite()).map_or_else(|| "-".to_owned(), how)
}

/// Two decimals below ten.
fn times(ratio: f64) -> String {
    if ratio < 10.0 { format!("{ratio:.2} x") } else { format!("{} x", grouped(ratio)) }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn seconds(value: f64) -> String {
    if value < 1.0 { format!("{:.0} ms", value * 1000.0) } else { format!("{value:.2} s") }
}

/// A whole number with its thousands apart.
fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Thousands are set apart, from the right.
    #[test]
    fn thousands() {
        assert_eq!(
            ["0", "999", "1,000", "24,700,000"],
            [0.0, 999.2, 999.6, 24.7e6].map(grouped).each_ref().map(String::as_str)
        );
    }

    /// What is missed says so, what is met and what was not measured does not.
    #[test]
    fn verdicts() {
        let target = |value, bound| Target { name: "", kind: TargetKind::Ratio, bound, value };
        assert_eq!(verdict(&target(Some(4.1), Some(Bound::AtLeast(5.0)))), "4.10 (>= 5) MISSED");
        assert_eq!(verdict(&target(Some(0.4), Some(Bound::AtMost(0.45)))), "0.40 (<= 0.45)");
        assert_eq!(verdict(&target(Some(0.4), None)), "0.40");
        assert_eq!(verdict(&target(None, Some(Bound::AtMost(0.45)))), "not measured");
    }
}

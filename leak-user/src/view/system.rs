//! The table of processes, where there is more than one to look at.

use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::names::function;
use super::safe::{cut_end, safe, width};
use super::units::{bytes, count, duration, rate};
use crate::report::{
    Decided, EndedProcesses, Labels, NewPages, OomKill, Process, Report, Restart, Rss, Sampling, System, Verdict,
};

const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// Digits of a container's id that are shown: as many as its own tools show.
const CONTAINER_ID: usize = 12;
/// Watched processes that are listed, and decisions.
const WATCHED: usize = 10;
const DECISIONS: usize = 8;
/// Processes that the kernel killed that are listed.
const KILLS: usize = 8;
/// Stacks that are shown of each process that grows, their frames, and columns of each.
const PAGE_STACKS: usize = 3;
const PAGE_FRAMES: usize = 6;
const PAGE_COLUMNS: usize = 32;

/// Columns of the table: heading, and whether numbers stand in it.
const HEADINGS: [(&str, bool); 9] = [
    ("PID", true),
    ("NAME", false),
    ("VERDICT", false),
    ("LIVE", true),
    ("RSS", true),
    ("RSS SLOPE", true),
    ("EXPLAINED", true),
    ("ALLOCATOR", false),
    ("BELONGS TO", false),
];

type Row = [String; HEADINGS.len()];

/// A verdict's word and colour.
pub fn verdict(verdict: Verdict) -> (&'static str, Color) {
    match verdict {
        Verdict::Leaking => ("LEAKING", Color::Red),
        Verdict::Warming => ("WARMING UP", Color::Yellow),
        Verdict::Plateau => ("PLATEAU", Color::Cyan),
        Verdict::Spike => ("SPIKE", Color::Cyan),
        Verdict::Stable => ("STABLE", Color::Green),
    }
}

/// The traced processes in a line each, then those that are only watched, then what was decided.
pub fn table(out: &mut Vec<Line<'static>>, report: &Report) {
    let mut rows: Vec<(Row, Option<Verdict>)> = Vec::new();
    for process in &report.processes {
        rows.push((traced(process, report.mode.sampling), Some(process.verdict)));
    }
    for process in report.system.iter().flat_map(|system| system.processes.iter().take(WATCHED)) {
        let row = [
            process.pid.to_string(),
            cut_end(&safe(&process.comm), 16),
            "watched".to_owned(),
            String::new(),
            size(&process.rss),
            slope(&process.rss),
            String::new(),
            String::new(),
            belongs_to(&process.labels),
        ];
        rows.push((row, None));
    }
    if let Some(system) = &report.system {
        out.push(Line::from(headline(system)));
    }
    if rows.is_empty() {
        return;
    }
    let columns: [usize; HEADINGS.len()] = std::array::from_fn(|column| {
        rows.iter().map(|(row, _)| width(&row[column])).chain([HEADINGS[column].0.len()]).max().unwrap_or(0)
    });
    let headings: Row = std::array::from_fn(|column| HEADINGS[column].0.to_owned());
    out.push(Line::from(cells(&headings, &columns, None)).style(DIM));
    out.extend(rows.iter().map(|(row, verdict)| {
        let style = if verdict.is_none() { DIM } else { Style::new() };
        Line::from(cells(row, &columns, *verdict)).style(style)
    }));
}

/// Where those grow that nothing else is known of.
fn growing(out: &mut Vec<Line<'static>>, growing: &[NewPages]) {
    if growing.is_empty() {
        return;
    }
    out.push(Line::default());
    out.push(Line::styled("Growing, and touching new pages in", DIM.add_modifier(Modifier::BOLD)));
    for process in growing {
        let name = format!("  {} (pid {}) +{}", safe(&process.comm), process.pid, rate(process.bytes_per_s));
        out.push(Line::from(name));
        for stack in process.stacks.iter().take(PAGE_STACKS) {
            let mut names: Vec<String> =
                stack.frames.iter().take(PAGE_FRAMES).map(|frame| function(frame, PAGE_COLUMNS)).collect();
            if names.is_empty() {
                names.push("??".to_owned());
            }
            if stack.frames.len() > PAGE_FRAMES {
                names.push("...".to_owned());
            }
            out.push(Line::from(format!("    {:>3.0} %  {}", stack.share * 100.0, names.join(" < "))));
        }
    }
}

/// Who came back, and how large.
fn restarts(out: &mut Vec<Line<'static>>, restarts: &[Restart]) {
    if restarts.is_empty() {
        return;
    }
    out.push(Line::default());
    out.push(Line::styled("Restarts", DIM.add_modifier(Modifier::BOLD)));
    for restart in restarts {
        let back =
            if restart.back_to_baseline { "memory is back to baseline" } else { "memory is not back to baseline" };
        out.push(Line::from(format!(
            "  {} (pid {}): {back}: {}, {} before the restart",
            safe(&restart.comm),
            restart.pid,
            bytes(restart.now_bytes),
            bytes(restart.before_bytes)
        )));
    }
}

/// What was decided, and who has ended.
pub fn history(out: &mut Vec<Line<'static>>, report: &Report) {
    growing(out, report.system.as_ref().map_or(&[], |system| &system.growing));
    restarts(out, report.system.as_ref().map_or(&[], |system| &system.restarts));
    if let Some(system) = report.system.as_ref().filter(|system| !system.decisions.is_empty()) {
        out.push(Line::default());
        out.push(Line::styled("Decisions", DIM.add_modifier(Modifier::BOLD)));
        for decision in system.decisions.iter().rev().take(DECISIONS).rev() {
            let what = match decision.what {
                Decided::Promoted => "traced",
                Decided::Released => "released",
            };
            out.push(Line::from(format!(
                "  {:>6}  {what:8}  {} (pid {}): {}",
                duration(decision.at_s),
                safe(&decision.comm),
                decision.pid,
                super::words::reason(&decision.reason)
            )));
        }
    }
    if !report.oom_kills.is_empty() {
        out.push(Line::default());
        out.push(Line::styled("Killed because memory ran out", DIM.add_modifier(Modifier::BOLD)));
        out.extend(report.oom_kills.iter().rev().take(KILLS).rev().map(|kill| Line::from(killed(kill, report))));
    }
    if !report.ended_processes.is_empty() {
        out.push(Line::default());
        out.push(Line::styled("Ended", DIM.add_modifier(Modifier::BOLD)));
        for ended in &report.ended_processes {
            out.push(Line::from(ended_line(ended)));
        }
    }
}

fn killed(kill: &OomKill, report: &Report) -> String {
    let mut parts = vec![format!("{:>6}  {} (pid {})", duration(kill.at_s), safe(&kill.comm), kill.pid)];
    let place = belongs_to(&kill.labels);
    if !place.is_empty() {
        parts.push(format!("of {place}"));
    }
    if let Some(resident) = kill.rss.last_bytes {
        parts.push(format!("with {} RSS", bytes(resident)));
    }
    if let Some(process) = kill.process.as_deref().filter(|process| process.verdict == Verdict::Leaking) {
        parts.push(super::words::verdict(process, report).1);
    }
    format!("  {}", parts.join(", "))
}

fn ended_line(ended: &EndedProcesses) -> String {
    let exe = if ended.exe.is_empty() { "other programs".to_owned() } else { safe(&ended.exe) };
    let mut parts = vec![format!("at most {} RSS", bytes(ended.largest_rss_bytes))];
    if ended.live_bytes_at_end > 0 {
        parts.push(format!("{} not freed at the end", bytes(ended.live_bytes_at_end)));
    }
    if ended.leaking > 0 {
        parts.push(format!("{} leaking", ended.leaking));
    }
    format!("  {} of {exe}: {}", processes(ended.count), parts.join(", "))
}

fn headline(system: &System) -> Vec<Span<'static>> {
    let most = system.most_traced.map_or_else(String::new, |most| format!(" of at most {most}"));
    let text = format!("{} watched, {}{most} traced", processes(system.watched), system.traced);
    vec![Span::styled(text, BOLD)]
}

fn traced(process: &Process, sampling: Sampling) -> Row {
    let mut families: Vec<String> = process.allocators.iter().map(|allocator| safe(&allocator.family)).collect();
    families.dedup();
    let how = match sampling {
        Sampling::Exact => "",
        Sampling::Bytes => ", sampled",
    };
    [
        process.pid.to_string(),
        cut_end(&safe(&process.comm), 16),
        verdict(process.verdict).0.to_owned(),
        format!("{}{}", if process.live_bytes_ci95.is_some() { "~" } else { "" }, bytes(process.live_bytes)),
        size(&process.rss),
        slope(&process.rss),
        process.explained_growth_ratio.map_or_else(String::new, |ratio| format!("{:.0} %", ratio * 100.0)),
        if families.is_empty() { "none found".to_owned() } else { cut_end(&families.join(", "), 24) + how },
        belongs_to(&process.labels),
    ]
}

fn processes(n: u64) -> String {
    format!("{} process{}", count(n), if n == 1 { "" } else { "es" })
}

fn size(rss: &Rss) -> String {
    rss.last_bytes.map_or_else(String::new, bytes)
}

fn slope(rss: &Rss) -> String {
    match rss.growth_bytes_per_s {
        Some(slope) if slope.abs() < 1.0 => "flat".to_owned(),
        Some(slope) => format!("{}{}", if slope > 0.0 { "+" } else { "" }, rate(slope)),
        None => String::new(),
    }
}

/// The container, by its pod where that is known, or else the unit, and the pid there.
pub fn belongs_to(labels: &Labels) -> String {
    let pod = labels.pod.as_deref().map(|pod| {
        let of = [labels.namespace.as_deref(), Some(pod), labels.container_name.as_deref()];
        of.into_iter().flatten().map(safe).collect::<Vec<_>>().join("/")
    });
    let container = labels.container.as_deref().map(|id| {
        let id: String = safe(id).chars().take(CONTAINER_ID).collect();
        labels.container_runtime.as_deref().map_or_else(|| id.clone(), |runtime| format!("{} {id}", safe(runtime)))
    });
    let place = pod.or(container).or_else(|| labels.unit.as_deref().map(safe));
    let there = labels.pid_in_namespace.map(|pid| format!("pid {pid} there"));
    place.into_iter().chain(there).collect::<Vec<_>>().join(", ")
}

/// One line of the table; the verdict in its colour.
fn cells(row: &Row, columns: &[usize; HEADINGS.len()], of: Option<Verdict>) -> Vec<Span<'static>> {
    let mut spans = Vec::new();
    for (column, text) in row.iter().enumerate() {
        let pad = " ".repeat(columns[column].saturating_sub(width(text)));
        let text = if HEADINGS[column].1 { format!("{pad}{text}") } else { format!("{text}{pad}") };
        let style = match of {
            Some(of) if column == 2 => BOLD.fg(verdict(of).1),
            _ => Style::new(),
        };
        spans.push(Span::styled(text, style));
        spans.push(Span::raw("  "));
    }
    spans
}

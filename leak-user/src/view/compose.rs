//! Lays a report out in styled lines. The piped text, the text on a terminal and the live view all show these lines, so
//! they look the same everywhere. Everything that comes from the target is made safe here.

use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::bar;
use ratatui::text::{Line, Span};

use super::names::{culprit, function, location};
use super::safe::{cut_end, safe, width};
use super::system;
use super::units::{bytes, duration, estimated_bytes, events};
use super::words;
use crate::report::{Frame, Process, Report, Sampling, Stack, StackVerdict, Verdict};

/// Frames of a stack that are listed: so many innermost, and so many outermost.
const INNER: usize = 20;
const OUTER: usize = 3;
/// Among more processes than these, the line in the table says enough of those that do not leak.
const FEW: usize = 4;
/// Columns of the graph.
const GRAPH: usize = 24;

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const WARN: Style = Style::new().fg(Color::Yellow);

/// How much room there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Columns.
    pub width: usize,
    /// Whether names are shortened to fit. Otherwise lines may be longer than `width`.
    pub cut: bool,
    /// Growing stacks to list for each process; of the others, half as many.
    pub top: usize,
}

impl Look {
    fn room(self, columns: usize) -> usize {
        if self.cut { columns.max(8) } else { usize::MAX }
    }
}

/// The whole report.
pub fn lines(report: &Report, look: Look) -> Vec<Line<'static>> {
    let mut out = header(report, look);
    let many = report.system.is_some() || report.processes.len() > 1;
    if many {
        out.push(Line::default());
        system::table(&mut out, report);
    }
    let few = report.system.is_none() && report.processes.len() <= FEW;
    for process in report.processes.iter().filter(|process| few || process.verdict == Verdict::Leaking) {
        out.push(Line::default());
        self::process(&mut out, process, report, look);
    }
    if report.processes.is_empty() && report.system.is_none() {
        out.push(Line::default());
        out.push(Line::from("No process was seen."));
    }
    system::history(&mut out, report);
    if look.cut { out.into_iter().map(|line| fit(line, look.width)).collect() } else { out }
}

fn header(report: &Report, look: Look) -> Vec<Line<'static>> {
    let mut parts = vec![
        match (report.mode.sampling, report.mode.interval_bytes) {
            (Sampling::Exact, _) => "exact".to_owned(),
            (Sampling::Bytes, Some(interval)) => format!("sampled, one in {}", bytes(interval)),
            (Sampling::Bytes, None) => "sampled".to_owned(),
        },
        duration(report.duration_s),
    ];
    if let Some(rate) = report.events_per_s {
        parts.push(format!("{} events/s", events(rate)));
    }
    if report.is_final {
        parts.push(
            report
                .ended
                .map_or_else(|| "final report".to_owned(), |ended| format!("final report: {}", words::ended(ended))),
        );
    }
    let title = format!("{} {}", safe(&report.tool.name), safe(&report.tool.version));
    let mut out = Vec::new();
    let rest = format!(" · {}", parts.join(" · "));
    wrap(&mut out, vec![Span::styled(title, BOLD), Span::styled(rest, DIM)], 0, look.width);
    if let Some(command) = &report.command {
        let args: Vec<String> = command.args.iter().map(|arg| safe(arg)).collect();
        let end = words::how_ended(command.exit_code, command.signal).unwrap_or_else(|| "running".to_owned());
        let room = look.room(look.width.saturating_sub(width(&end) + 11));
        out.push(Line::from(format!("command: {}  ({end})", cut_end(&args.join(" "), room))));
    }
    if let Some(losses) = words::losses(report) {
        wrap(
            &mut out,
            vec![Span::styled("Lost: ", WARN.add_modifier(Modifier::BOLD)), Span::styled(losses, WARN)],
            6,
            look.width,
        );
    }
    out
}

fn process(out: &mut Vec<Line<'static>>, process: &Process, report: &Report, look: Look) {
    let name = format!("{} (pid {})", safe(&process.comm), process.pid);
    let room = look.room(look.width.saturating_sub(width(&name) + 2));
    let exe = process.exe.as_deref().map(|exe| format!("  {}", super::safe::cut_start(&safe(exe), room)));
    out.push(Line::from(vec![Span::styled(name, BOLD), Span::styled(exe.unwrap_or_default(), DIM)]));

    let (word, sentence) = words::verdict(process, report);
    let style = BOLD.fg(system::verdict(process.verdict).1);
    wrap(out, vec![Span::styled(format!("{word}: "), style), Span::styled(sentence, BOLD)], 0, look.width);
    wrap_parts(out, &words::facts(process), look.width);
    for remark in words::remarks(process) {
        wrap(out, vec![Span::raw(remark)], 0, look.width);
    }

    let (growing, others): (Vec<_>, Vec<_>) =
        process.stacks.iter().partition(|stack| stack.verdict == StackVerdict::Growing);
    for (i, stack) in growing.iter().take(look.top).enumerate() {
        out.push(Line::default());
        growing_stack(out, i + 1, stack, look);
    }
    let hidden = process.growing_stacks.max(growing.len() as u64).saturating_sub(growing.len().min(look.top) as u64);
    if hidden > 0 {
        out.push(Line::default());
        out.push(Line::styled(format!("{hidden} more that grow are not shown (--top)"), WARN));
    }
    let others: Vec<&Stack> =
        others.into_iter().filter(|stack| stack.live_bytes > 0).take(look.top.div_ceil(2)).collect();
    if !others.is_empty() {
        out.push(Line::default());
        out.push(Line::styled(
            if process.verdict == Verdict::Warming { "Largest so far" } else { "Large, but not growing" },
            DIM.add_modifier(Modifier::BOLD),
        ));
        calm_stacks(out, &others, look);
    }
}

fn growing_stack(out: &mut Vec<Line<'static>>, number: usize, stack: &Stack, look: Look) {
    let (rate, rest) = words::growth(stack);
    let tag = format!("#{number:<3}");
    out.push(Line::from(vec![
        Span::styled(tag, DIM),
        Span::styled(rate, BOLD.fg(Color::Red)),
        Span::styled(format!("  {}", rest.join(" · ")), DIM),
    ]));
    let mut live = vec![Span::raw(format!("    {}", words::held(stack)))];
    if let Some((graph, first, last)) = graph(&stack.series) {
        let graph = Span::styled(graph, Style::new().fg(Color::Red));
        let values = Span::styled(format!(" {} → {}", bytes(first), bytes(last)), DIM);
        if live[0].width() + 3 + graph.width() + values.width() > look.width {
            out.push(Line::from(std::mem::take(&mut live)));
            live.push(Span::raw("    "));
        } else {
            live.push(Span::raw("   "));
        }
        live.extend([graph, values]);
    }
    out.push(Line::from(live));
    frames(out, stack, look);
}

fn frames(out: &mut Vec<Line<'static>>, stack: &Stack, look: Look) {
    const INDENT: usize = 6;
    const INLINED: &str = " (inlined)";
    let named = culprit(stack).map(std::ptr::from_ref::<Frame>);
    let count = stack.frames.len();
    let skipped = if count > INNER + OUTER + 1 { INNER..count - OUTER } else { 0..0 };
    let shown = || stack.frames.iter().enumerate().filter(|(i, _)| !skipped.contains(i));
    let room = look.width.saturating_sub(INDENT);
    let most = look.room(room * 6 / 10);
    let column = shown().map(|(_, frame)| width(&function(frame, most))).max().unwrap_or(0).min(room * 6 / 10);
    for (i, frame) in shown() {
        if i == skipped.end && !skipped.is_empty() {
            out.push(Line::styled(format!("{:INDENT$}… {} frames …", "", skipped.len()), DIM));
        }
        // A name with no place beside it may use the whole line.
        let has_place = location(frame, 8).is_some();
        let name = function(frame, if has_place { most } else { look.room(room) });
        let style = if named == Some(std::ptr::from_ref(frame)) { BOLD } else { Style::new() };
        let pad = column.saturating_sub(width(&name));
        let mark = if frame.inlined { INLINED } else { "" };
        let left = look.room(room.saturating_sub(width(&name) + pad + 2 + mark.len()));
        let mut spans = vec![Span::raw(" ".repeat(INDENT)), Span::styled(name, style)];
        if let Some(place) = location(frame, left) {
            spans.push(Span::styled(format!("{:pad$}  {place}{mark}", ""), DIM));
        } else if frame.inlined {
            spans.push(Span::styled(mark, DIM));
        }
        out.push(Line::from(spans));
    }
    if let Some(reason) = words::stack_end(stack.end) {
        out.push(Line::styled(format!("{:INDENT$}({reason})", ""), DIM));
    }
}

/// One line for each stack: bytes, why it is calm, its function and place.
fn calm_stacks(out: &mut Vec<Line<'static>>, stacks: &[&Stack], look: Look) {
    let why = stacks.iter().map(|stack| width(words::calm(stack.verdict))).max().unwrap_or(0);
    let sizes: Vec<String> =
        stacks.iter().map(|stack| estimated_bytes(stack.live_bytes, stack.live_bytes_ci95)).collect();
    let column = sizes.iter().map(|size| width(size)).max().unwrap_or(0).max(8);
    for (stack, size) in stacks.iter().zip(&sizes) {
        let size = format!("  {size:>column$}  {:why$}  ", words::calm(stack.verdict));
        let room = look.room(look.width.saturating_sub(width(&size)));
        let mut spans = vec![Span::raw(size)];
        if let Some(frame) = culprit(stack) {
            let name = function(frame, room);
            let left = room.saturating_sub(width(&name) + 2);
            spans.push(Span::raw(name));
            // A place cut to a few columns says nothing.
            if left >= 12
                && let Some(place) = location(frame, left)
            {
                spans.push(Span::styled(format!("  {place}"), DIM));
            }
        } else if let Some(reason) = words::stack_end(stack.end) {
            spans.push(Span::styled(format!("({reason})"), DIM));
        }
        out.push(Line::from(spans));
    }
}

/// A small graph of bytes over time, with the first and the last value. The height shows the change, but a change of
/// less than a tenth stays low: noise must not look like a mountain. `None` for fewer than two points.
pub fn graph(series: &[(f64, u64)]) -> Option<(String, u64, u64)> {
    let (first, last) = (series.first()?, series.last()?);
    if series.len() < 2 {
        return None;
    }
    let columns = series.len().min(GRAPH);
    // The last value in each column's share of the points.
    let points = (1..=columns).map(|column| series[column * series.len() / columns - 1].1);
    let (low, high) = points.clone().fold((u64::MAX, 0), |(low, high), n| (low.min(n), high.max(n)));
    let span = (high - low).max(high / 10).max(1) as f64;
    let levels = bar::NINE_LEVELS;
    let levels = [
        levels.one_eighth,
        levels.one_quarter,
        levels.three_eighths,
        levels.half,
        levels.five_eighths,
        levels.three_quarters,
        levels.seven_eighths,
        levels.full,
    ];
    let graph = points.map(|n| levels[(((n - low) as f64 / span * 7.0).round() as usize).min(7)]).collect();
    Some((graph, first.1, last.1))
}

/// Cuts a line off at the right border.
fn fit(line: Line<'static>, columns: usize) -> Line<'static> {
    if line.width() <= columns {
        return line;
    }
    let mut left = columns;
    let mut spans = Vec::new();
    for span in line.spans {
        let text = cut_end(&span.content, left);
        left -= width(&text);
        spans.push(Span::styled(text, span.style));
    }
    Line { spans, ..line }
}

/// Breaks prose between words; lines after the first are indented.
fn wrap(out: &mut Vec<Line<'static>>, spans: Vec<Span<'static>>, indent: usize, columns: usize) {
    let mut line: Vec<Span<'static>> = Vec::new();
    let mut used = 0;
    for span in spans {
        for piece in span.content.split_inclusive(' ') {
            if used > indent && used + width(piece.trim_end()) > columns {
                if let Some(last) = line.last_mut() {
                    *last = Span::styled(last.content.trim_end().to_owned(), last.style);
                }
                out.push(Line::from(std::mem::take(&mut line)));
                line.push(Span::raw(" ".repeat(indent)));
                used = indent;
            }
            used += width(piece);
            match line.last_mut() {
                Some(last) if last.style == span.style => last.content.to_mut().push_str(piece),
                _ => line.push(Span::styled(piece.to_owned(), span.style)),
            }
        }
    }
    out.push(Line::from(line));
}

/// Short facts, parted by dots, broken only between facts.
fn wrap_parts(out: &mut Vec<Line<'static>>, parts: &[String], columns: usize) {
    let mut line = String::new();
    for part in parts {
        if !line.is_empty() && width(&line) + 3 + width(part) > columns {
            out.push(Line::styled(std::mem::take(&mut line), DIM));
        }
        if !line.is_empty() {
            line.push_str(" · ");
        }
        line.push_str(part);
    }
    if !line.is_empty() {
        out.push(Line::styled(line, DIM));
    }
}

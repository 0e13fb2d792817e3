//! The report as text: plain, or with colours for a terminal.

use std::io::{self, Write};

use clap::builder::styling::{AnsiColor, Style as Ansi};
use ratatui::style::{Color, Modifier, Style};

use super::compose::{Look, lines};
use crate::report::Report;

/// Columns where there is no terminal to ask.
pub const PLAIN_WIDTH: usize = 100;

/// Writes the report, with ANSI colours if asked to. One call of `write_all`, so that a reader never sees half of it
/// because of something else that writes to the same terminal.
pub fn write(out: &mut (impl Write + ?Sized), report: &Report, look: Look, colour: bool) -> io::Result<()> {
    let mut text = String::new();
    for line in lines(report, look) {
        for span in &line.spans {
            let style = ansi(line.style.patch(span.style));
            if colour && !style.is_plain() && !span.content.trim().is_empty() {
                text.extend([&style.render().to_string(), &*span.content, &style.render_reset().to_string()]);
            } else {
                text += &span.content;
            }
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
    out.write_all(text.as_bytes())
}

/// The colours and modifiers that [`super::compose`] uses.
fn ansi(style: Style) -> Ansi {
    let mut ansi = Ansi::new();
    if style.add_modifier.contains(Modifier::BOLD) {
        ansi = ansi.bold();
    }
    if style.add_modifier.contains(Modifier::DIM) {
        ansi = ansi.dimmed();
    }
    let colour = match style.fg {
        Some(Color::Red) => Some(AnsiColor::Red),
        Some(Color::Yellow) => Some(AnsiColor::Yellow),
        Some(Color::Green) => Some(AnsiColor::Green),
        Some(Color::Cyan) => Some(AnsiColor::Cyan),
        _ => None,
    };
    ansi.fg_color(colour.map(Into::into))
}

#[cfg(test)]
mod tests {
    use super::super::safe::width;
    use super::*;
    use crate::report::{StackVerdict, Verdict, sample};

    fn text(report: &Report, look: Look, colour: bool) -> String {
        let mut out = Vec::new();
        write(&mut out, report, look, colour).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// Compares with a golden file, or writes it where `LEAKTRACE_BLESS` is set (and the change is then read in the diff).
    fn golden(name: &str, text: &str) {
        let path = format!("{}/src/view/golden/{name}.txt", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("LEAKTRACE_BLESS").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(&path).unwrap());
    }

    const PLAIN: Look = Look { width: PLAIN_WIDTH, cut: false, top: 10 };

    /// The report of a leaking process, word for word.
    #[test]
    fn leaking() {
        golden("leaking", &text(&sample::leaking(), PLAIN, false));
    }

    /// The same on a terminal of 80 columns, where names are shortened.
    #[test]
    fn leaking_in_80_columns() {
        let look = Look { width: 80, cut: true, top: 10 };
        golden("leaking80", &text(&sample::leaking(), look, false));
    }

    /// Every figure of a sample is shown as an estimate with its interval.
    #[test]
    fn sampled() {
        golden("sampled", &text(&sample::sampled(), PLAIN, false));
        golden("sampled80", &text(&sample::sampled(), Look { width: 80, cut: true, top: 10 }, false));
    }

    /// A process that holds much and does not grow is said not to leak.
    #[test]
    fn steady() {
        golden("steady", &text(&sample::steady(), PLAIN, false));
    }

    /// A whole system: a line each process, details of those that leak, and what was decided.
    #[test]
    fn system() {
        golden("system", &text(&sample::system(), PLAIN, false));
    }

    /// Before there is a verdict the report says how long it has looked.
    #[test]
    fn warming() {
        golden("warming", &text(&sample::warming(), PLAIN, false));
    }

    /// Each other verdict has its sentence, and a growing RSS that no stack explains is not kept silent.
    #[test]
    fn other_verdicts() {
        let mut report = sample::steady();
        for (verdict, sentence) in [
            (Verdict::Plateau, "PLATEAU: memory grew and then stopped"),
            (Verdict::Spike, "SPIKE: memory rose and came back"),
        ] {
            report.processes[0].verdict = verdict;
            assert!(text(&report, PLAIN, false).contains(sentence));
        }
        report.processes[0].verdict = Verdict::Stable;
        report.processes[0].live_bytes = 1000;
        assert!(text(&report, PLAIN, false).contains("STABLE: no call stack grows"));
        assert!(!text(&report, PLAIN, false).contains("RSS still grew"));
        report.processes[0].rss.last_bytes = report.processes[0].rss.first_bytes.map(|first| first + (30 << 20));
        report.processes[0].rss.growth_bytes_per_s = Some(1e6);
        assert!(text(&report, PLAIN, false).contains("RSS still grew by 30 MiB"));
        report.processes.clear();
        assert!(text(&report, PLAIN, false).contains("No process was seen."));
    }

    /// However narrow the terminal, no line is wider, and nothing panics; every name survives where lines are not cut.
    #[test]
    fn every_width() {
        for report in [sample::leaking(), sample::steady(), sample::warming()] {
            for columns in 0..200 {
                let cut = text(&report, Look { width: columns, cut: true, top: 10 }, false);
                for line in cut.lines() {
                    assert!(width(line) <= columns, "{columns}: {line}");
                }
                let whole = text(&report, Look { width: columns, cut: false, top: 10 }, false);
                for frame in report.processes[0]
                    .stacks
                    .iter()
                    .filter(|s| s.verdict == StackVerdict::Growing)
                    .flat_map(|s| &s.frames)
                {
                    assert!(frame.function.as_ref().is_none_or(|name| whole.contains(name)));
                }
            }
        }
    }

    /// `--top` bounds the growing stacks that are listed, and says that there are more.
    #[test]
    fn top() {
        let shown = text(&sample::leaking(), Look { top: 1, ..PLAIN }, false);
        assert!(shown.contains("#1") && !shown.contains("#2"));
        assert!(shown.contains("1 more that grow"), "{shown}");
        assert!(!text(&sample::leaking(), PLAIN, false).contains("not shown"));
    }

    /// A deep stack keeps its two ends and says how much is left out between them.
    #[test]
    fn deep_stacks() {
        let mut report = sample::leaking();
        report.processes[0].stacks[0].frames =
            (0..90).map(|i| sample::frame(&format!("level_{i}_"), "/src/deep.c", i)).collect();
        let shown = text(&report, PLAIN, false);
        for (name, there) in [
            ("level_0_", true),
            ("level_19_", true),
            ("level_20_", false),
            ("level_86_", false),
            ("level_87_", true),
            ("level_89_", true),
        ] {
            assert_eq!(shown.contains(name), there, "{name}");
        }
        assert!(shown.contains("… 67 frames …"));
    }

    /// Every string that a target chooses reaches the terminal without control characters.
    #[test]
    fn hostile_target() {
        let evil = "\x1b[2J\x1b]0;x\x07\r\n\u{202e}\u{9b}";
        let mut report = sample::leaking();
        let process = &mut report.processes[0];
        evil.clone_into(&mut process.comm);
        process.exe = Some(evil.to_owned());
        process.hint = Some(evil.to_owned());
        process.allocators[0].family = evil.to_owned();
        for stack in &mut process.stacks {
            stack.op = Some(evil.to_owned());
            for (i, frame) in stack.frames.iter_mut().enumerate() {
                frame.function = (i % 2 == 0).then(|| evil.to_owned());
                frame.file = (i % 3 == 0).then(|| evil.to_owned());
                frame.module = Some(evil.to_owned());
                frame.reason = Some(evil.to_owned());
            }
        }
        report.losses.insert(evil.to_owned(), 1);
        report.command = Some(crate::report::Command { args: vec![evil.to_owned()], ..Default::default() });
        for cut in [false, true] {
            let shown = text(&report, Look { cut, ..PLAIN }, false);
            assert!(shown.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{shown:?}");
            let coloured = text(&report, Look { cut, ..PLAIN }, true);
            assert!(!coloured.contains("\x1b[2J") && !coloured.contains("\x1b]"));
        }
    }

    /// Colours change nothing but colours.
    #[test]
    fn colours() {
        let plain = text(&sample::leaking(), PLAIN, false);
        let coloured = text(&sample::leaking(), PLAIN, true);
        assert!(coloured.contains("\x1b[1m\x1b[31mLEAKING: "));
        assert!(!plain.contains('\x1b'));
        let mut stripped = String::new();
        let mut rest = coloured.as_str();
        while let Some(at) = rest.find('\x1b') {
            stripped += &rest[..at];
            rest = &rest[at + rest[at..].find('m').unwrap() + 1..];
        }
        assert_eq!(stripped + rest, plain);
    }

    /// Counters that tell of the target's doings are no losses.
    #[test]
    fn what_is_a_loss() {
        let mut report = sample::leaking();
        assert!(text(&report, PLAIN, false).contains("Lost: allocations_ring_full 1,204"));
        report.losses = [("calls_nested".to_owned(), 7)].into();
        assert!(!text(&report, PLAIN, false).contains("Lost"));
    }
}

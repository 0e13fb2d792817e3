//! Shows reports: as text, on a live terminal, as JSON. Reads nothing but [`Report`]; names and paths in it come from the
//! target and reach a terminal only through [`safe()`].

mod compose;
mod file;
pub mod json;
mod live;
pub mod names;
mod safe;
mod system;
pub mod text;
pub mod units;
pub mod words;

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub use compose::Look;
pub use live::{Input, LiveView, LogSink};
pub(crate) use names::culprit;
pub use safe::{safe, safe_bytes};
pub use units::{bytes, duration, rate};
pub use words::verdict as in_words;

use crate::config::{Config, Format, Target};
use crate::export::pprof;
use crate::report::Report;
use file::ReportFile;

/// Whether anybody still reads the reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "when the reader has gone, tracing should end quietly"]
pub enum Outcome {
    Open,
    /// The reader of the standard output went away: no failure, but the end.
    Closed,
}

/// Where the reports of one run go.
pub struct Output {
    sink: Sink,
    format: Format,
    top: usize,
    /// Whether text is written at each interval, or only at the end.
    intervals: bool,
    written: bool,
}

enum Sink {
    /// A live view to come: the terminal is taken over only when tracing runs, so that an error before that is seen.
    Terminal,
    Stream {
        out: Box<dyn Write + Send>,
        terminal: bool,
    },
    File(ReportFile),
    Live(Box<LiveView>),
}

impl Output {
    /// Gets the output ready before tracing starts; an output file that cannot be written is an error here.
    ///
    /// The live view is used when text goes to a terminal whose keyboard is ours too. A command that is started shares
    /// the terminal, so for its run the terminal is left alone and only the final report is written.
    pub fn open(config: &Config) -> Result<Self> {
        let stdout = io::stdout();
        let terminal = stdout.is_terminal();
        let alone = !matches!(config.target, Target::Command(_));
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        if config.format == Format::Pprof && config.output.is_none() && terminal {
            bail!("a profile is binary and does not go to a terminal: name a file by '-o FILE'");
        }
        let sink = if let Some(path) = &config.output {
            Sink::File(ReportFile::create(path)?)
        } else if config.format == Format::Text && terminal && alone && !dumb && io::stdin().is_terminal() {
            Sink::Terminal
        } else {
            Sink::Stream { out: Box::new(stdout), terminal }
        };
        Ok(Self { sink, format: config.format, top: config.top, intervals: alone || !terminal, written: false })
    }

    /// Whether there is a live view: then [`Output::poll_input`] should be called often.
    pub fn is_live(&self) -> bool {
        matches!(self.sink, Sink::Terminal | Sink::Live(_))
    }

    /// Handles the keyboard of the live view, waiting up to `timeout` for a key. The first call takes the terminal over.
    /// Without a live view: nothing, at once.
    pub fn poll_input(&mut self, timeout: Duration) -> Result<Option<Input>> {
        self.take_terminal()?;
        match &mut self.sink {
            Sink::Live(view) => view.poll_input(timeout).context("read the terminal"),
            _ => Ok(None),
        }
    }

    fn take_terminal(&mut self) -> Result<()> {
        if let Sink::Terminal = self.sink {
            self.sink = Sink::Live(Box::new(LiveView::new(self.top).context("set up the terminal")?));
        }
        Ok(())
    }

    /// Shows the report of an interval, where the format has such.
    pub fn interval(&mut self, report: &Report) -> Result<Outcome> {
        self.take_terminal()?;
        let (format, look) = (self.format, self.top);
        match (&mut self.sink, format) {
            (Sink::Live(view), _) => {
                view.draw(report).context("draw on the terminal")?;
                Ok(Outcome::Open)
            }
            (Sink::Stream { out, .. }, Format::Jsonl) => {
                outcome(json::write_line(out, report).and_then(|()| out.flush())).context("write the report")
            }
            (Sink::File(file), Format::Jsonl) => {
                let result = json::write_line(file, report);
                outcome(result).with_context(|| file.what_failed())
            }
            (Sink::Stream { out, terminal }, Format::Text) if self.intervals => {
                let result = write_text(out, report, look, *terminal, self.written);
                self.written = true;
                outcome(result).context("write the report")
            }
            _ => Ok(Outcome::Open),
        }
    }

    /// Writes the final report and, for a file, puts it in its place. A live view gives the terminal back first.
    pub fn finish(self, report: &Report) -> Result<Outcome> {
        let (mut out, terminal): (Box<dyn Write + Send>, _) = match self.sink {
            Sink::File(mut file) => {
                match self.format {
                    Format::Text => {
                        let look = Look { width: text::PLAIN_WIDTH, cut: false, top: self.top };
                        text::write(&mut file, report, look, false)
                    }
                    Format::Json => json::write_pretty(&mut file, report),
                    Format::Jsonl => json::write_line(&mut file, report),
                    Format::Pprof => pprof::write(&mut file, report),
                }
                .with_context(|| file.what_failed())?;
                file.finish()?;
                return Ok(Outcome::Open);
            }
            Sink::Stream { out, terminal } => (out, terminal),
            Sink::Terminal => (Box::new(io::stdout()), true),
            Sink::Live(view) => {
                drop(view);
                (Box::new(io::stdout()), true)
            }
        };
        outcome(
            match self.format {
                Format::Text => write_text(&mut out, report, self.top, terminal, self.written),
                Format::Json => json::write_pretty(&mut out, report),
                Format::Jsonl => json::write_line(&mut out, report),
                Format::Pprof => pprof::write(&mut out, report),
            }
            .and_then(|()| out.flush()),
        )
        .context("write the report")
    }
}

/// Text for a stream: as wide as the terminal and in colours, or plain with whole names.
fn write_text(out: &mut dyn Write, report: &Report, top: usize, terminal: bool, again: bool) -> io::Result<()> {
    if again {
        out.write_all(b"\n")?;
    }
    let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let size = if terminal { crossterm::terminal::size().ok() } else { None };
    let look = match size {
        Some((columns, _)) if columns > 0 => Look { width: columns.into(), cut: true, top },
        _ => Look { width: text::PLAIN_WIDTH, cut: false, top },
    };
    text::write(out, report, look, colour)?;
    out.flush()
}

/// A reader that went away is no failure.
fn outcome(result: io::Result<()>) -> Result<Outcome> {
    match result {
        Ok(()) => Ok(Outcome::Open),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Outcome::Closed),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;
    use std::fs;
    use std::io::{BufRead, BufReader, Read};
    use std::path::Path;

    fn config(args: &[&str]) -> Config {
        use clap::Parser;
        let flags = crate::cli::Flags::parse_from(["leaktrace", "-p", "1"].iter().chain(args));
        match crate::config::Invocation::check(flags).unwrap() {
            crate::config::Invocation::Trace(config) => *config,
            _ => unreachable!("-p was given"),
        }
    }

    fn to_pipe(format: Format) -> (Output, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let sink = Sink::Stream { out: Box::new(writer), terminal: false };
        (Output { sink, format, top: 10, intervals: true, written: false }, reader)
    }

    fn in_file(path: &Path, format: &str) -> String {
        let mut output = Output::open(&config(&["-o", path.to_str().unwrap(), "--format", format])).unwrap();
        assert_eq!(output.interval(&sample::warming()).unwrap(), Outcome::Open);
        assert!(!path.exists());
        assert_eq!(output.finish(&sample::leaking()).unwrap(), Outcome::Open);
        fs::read_to_string(path).unwrap()
    }

    /// A file holds the final report; for jsonl every report, the final one last.
    #[test]
    fn what_a_file_holds() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(in_file(&folder.path().join("a.txt"), "text"), include_str!("golden/leaking.txt"));
        let json = in_file(&folder.path().join("a.json"), "json");
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), sample::leaking());
        let lines = in_file(&folder.path().join("a.jsonl"), "jsonl");
        let reports: Vec<Report> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(reports, [sample::warming(), sample::leaking()]);
    }

    /// Piped, text and jsonl come at each interval and at once, json only at the end.
    #[test]
    fn what_a_pipe_gets() {
        let (mut output, reader) = to_pipe(Format::Jsonl);
        let mut reader = BufReader::new(reader);
        let mut line = String::new();
        let _ = output.interval(&sample::warming()).unwrap();
        reader.read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&line).unwrap(), sample::warming());

        let (mut output, mut reader) = to_pipe(Format::Text);
        let _ = output.interval(&sample::warming()).unwrap();
        let _ = output.finish(&sample::leaking()).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, concat!(include_str!("golden/warming.txt"), "\n", include_str!("golden/leaking.txt")));

        let (mut output, mut reader) = to_pipe(Format::Json);
        let _ = output.interval(&sample::warming()).unwrap();
        let _ = output.finish(&sample::leaking()).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), sample::leaking());
    }

    /// A reader that closes early is a quiet end, at an interval as at the end.
    #[test]
    fn closed_reader() {
        for format in [Format::Text, Format::Jsonl] {
            let (mut output, reader) = to_pipe(format);
            drop(reader);
            assert_eq!(output.interval(&sample::warming()).unwrap(), Outcome::Closed);
            assert_eq!(output.finish(&sample::leaking()).unwrap(), Outcome::Closed);
        }
    }

    /// Any other failure to write is an error: a full disk must not look like a report.
    #[test]
    fn full_disk_is_an_error() {
        let output = Output::open(&config(&["-o", "/dev/full", "--format", "json"])).unwrap();
        let error = format!("{:#}", output.finish(&sample::leaking()).unwrap_err());
        assert!(error.contains("No space left"), "{error}");
    }
}

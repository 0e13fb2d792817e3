//! leaktrace beside heap profilers that have to be in the process from its start: heaptrack (Debian's package), and jemalloc's own
//! (`MALLOC_CONF=prof:true`, with `jeprof`). What each costs a program that churns, and what it says of the same leak, which is beside
//! a cache that is larger and does not grow.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use leaktrace_tests::{Builder, Fixture, PATIENCE, Program, has_frame, stacks};
use serde::Serialize;
use serde_json::Value;

use super::tool::{Row, Tools, Tracer};
use crate::process::find_in_path;

/// The leak takes half a megabyte a second, the cache sixteen.
const ARGS: [&str; 8] = ["--rate", "524288", "--block", "256", "--cache-mb", "16", "--churn-threads", "1"];
const LEAK: &str = "leak_block";
/// Enough for a verdict.
const TIME: Duration = Duration::from_secs(20);
const SETTLE: Duration = Duration::from_secs(3);

const HEAPTRACK: &str = "/usr/lib/heaptrack/libheaptrack_preload.so";
const INTERPRET: &str = "/usr/lib/heaptrack/libexec/heaptrack_interpret";
const JEMALLOC: &str = "libjemalloc.so.2";

/// What the program runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum With {
    Nothing,
    /// A leaktrace that is attached once it runs.
    Leaktrace(Row),
    Heaptrack,
    Jemalloc,
    JemallocProfiler,
}

const ALL: [With; 7] = [
    With::Nothing,
    With::Leaktrace(Row::Auto),
    With::Leaktrace(Row::Sampled),
    With::Leaktrace(Row::Leaktrace),
    With::Heaptrack,
    With::Jemalloc,
    With::JemallocProfiler,
];

impl With {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Leaktrace(row) => row.name(),
            Self::Heaptrack => "heaptrack",
            Self::Jemalloc => "jemalloc",
            Self::JemallocProfiler => "jemalloc's profiler",
        }
    }

    /// The same program and allocator without it.
    fn base(self) -> Self {
        match self {
            Self::Jemalloc | Self::JemallocProfiler => Self::Jemalloc,
            _ => Self::Nothing,
        }
    }

    /// What it lacks on this host.
    fn lacks(self) -> Option<&'static str> {
        match self {
            Self::Heaptrack if !Path::new(HEAPTRACK).exists() || find_in_path("heaptrack_print").is_none() => {
                Some("heaptrack (on Debian: apt-get install heaptrack)")
            }
            Self::Jemalloc | Self::JemallocProfiler if find_in_path("jeprof").is_none() => {
                Some("jemalloc and jeprof (on Debian: apt-get install libjemalloc2 libjemalloc-dev)")
            }
            _ => None,
        }
    }
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
pub struct Profiled {
    pub name: &'static str,
    /// Pairs of churn a second, and what part that is of those without it.
    pub pairs_per_s: f64,
    pub of_nothing: f64,
    /// What it says.
    pub finds: String,
    /// Which place the leak has among what it says.
    pub place: Option<usize>,
}

/// Measures all that this host has.
pub fn measure(tools: &Tools) -> Result<Vec<Profiled>> {
    let program = Program::c("leak_slow").build()?;
    let mut measured: Vec<(With, Profiled)> = Vec::new();
    for with in ALL {
        if let Some(lacks) = with.lacks() {
            eprintln!("bench: {} is not measured: there is no {lacks}", with.name());
            continue;
        }
        let (pairs_per_s, found) =
            one(tools, &program, with).with_context(|| format!("failed to measure {}", with.name()))?;
        let base = measured.iter().find(|(of, _)| *of == with.base()).map_or(pairs_per_s, |(_, base)| base.pairs_per_s);
        let place = found.iter().position(|line| line.contains(LEAK)).map(|place| place + 1);
        let finds = found.first().cloned().unwrap_or_default();
        let row = Profiled { name: with.name(), pairs_per_s, of_nothing: pairs_per_s / base, finds, place };
        measured.push((with, row));
    }
    Ok(measured.into_iter().map(|(_, row)| row).collect())
}

/// Pairs a second, and what is said, the first first.
fn one(tools: &Tools, program: &Path, with: With) -> Result<(f64, Vec<String>)> {
    let folder = tempfile::tempdir().context("failed to create a temporary folder")?;
    let mut builder = ARGS.into_iter().fold(Fixture::builder(program), Builder::arg);
    let mut heaptrack = None;
    match with {
        With::Nothing | With::Leaktrace(_) => {}
        With::Heaptrack => {
            let started = Heaptrack::start(folder.path())?;
            let pipe = started.pipe.to_str().context("a path of a temporary folder")?;
            builder = builder.env("LD_PRELOAD", HEAPTRACK).env("DUMP_HEAPTRACK_OUTPUT", pipe);
            heaptrack = Some(started);
        }
        With::Jemalloc => builder = builder.env("LD_PRELOAD", JEMALLOC),
        With::JemallocProfiler => {
            // As it is by default, one in 512 KiB; a profile after each 2 GiB.
            let settings = format!("prof:true,lg_prof_interval:31,prof_prefix:{}/heap", folder.path().display());
            builder = builder.env("LD_PRELOAD", JEMALLOC).env("MALLOC_CONF", &settings);
        }
    }
    let mut fixture = builder.start()?;
    let tracer = match with {
        // Whether it is attached its breakpoints would tell only if they stayed.
        With::Leaktrace(row) => tools.start(row, fixture.pid())?,
        _ => None,
    };
    sleep(SETTLE);
    let (before, start) = (pairs(&mut fixture)?, Instant::now());
    sleep(TIME);
    let rate = (pairs(&mut fixture)? - before) / start.elapsed().as_secs_f64();
    let finds = match with {
        With::Nothing | With::Jemalloc => Vec::new(),
        With::Leaktrace(_) => {
            let output = tracer.map(Tracer::finish).transpose()?.context("it was attached")?.output;
            growing(&serde_json::from_str(&output).context("failed to read leaktrace's report")?)
        }
        With::Heaptrack => {
            // Its end is the end of what heaptrack reads.
            fixture.finish()?;
            heaptrack.context("it was started")?.finish()?
        }
        With::JemallocProfiler => in_use(program, folder.path())?,
    };
    Ok((rate, finds))
}

fn pairs(fixture: &mut Fixture) -> Result<f64> {
    let report = fixture.report()?;
    report["sites"]["churn_once"]["allocated_count"].as_f64().context("the fixture does not count its churn")
}

/// What leaktrace calls growing.
fn growing(report: &Value) -> Vec<String> {
    let growing = stacks(report).filter(|stack| stack["verdict"] == "growing");
    let line = |stack: &Value| {
        let function = if has_frame(stack, LEAK) { LEAK } else { "another function" };
        format!("{function} grows by {:.0} bytes/s", stack["growth"]["bytes_per_s"].as_f64().unwrap_or(f64::NAN))
    };
    let found: Vec<String> = growing.map(line).collect();
    if found.is_empty() {
        let overhead = &report["processes"][0]["overhead"];
        return vec![format!(
            "nothing yet ({} of the time watched)",
            overhead["duty"].as_f64().map_or_else(|| "?".to_owned(), |duty| format!("{:.1} %", duty * 100.0))
        )];
    }
    found
}

/// The program that takes heaptrack's stream, and the file that it makes.
struct Heaptrack {
    pipe: PathBuf,
    file: PathBuf,
    reader: Child,
}

impl Heaptrack {
    fn start(folder: &Path) -> Result<Self> {
        let (pipe, file) = (folder.join("pipe"), folder.join("heaptrack.gz"));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).context("failed to make a pipe")?;
        // What heaptrack's own script does.
        let reader = Command::new("sh")
            .args(["-c", r#""$0" < "$1" | gzip -1 > "$2""#, INTERPRET])
            .args([&pipe, &file])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("failed to start heaptrack_interpret")?;
        Ok(Self { pipe, file, reader })
    }

    fn finish(mut self) -> Result<Vec<String>> {
        let start = Instant::now();
        while self.reader.try_wait()?.is_none() {
            if start.elapsed() > PATIENCE {
                bail!("heaptrack_interpret did not end within {PATIENCE:?}");
            }
            sleep(Duration::from_millis(20));
        }
        let mut print = Command::new("heaptrack_print");
        print.arg("-f").arg(&self.file).args(["-a", "0", "-T", "0", "-p", "0", "-l", "1"]);
        let text = said(&mut print)?;
        // `SIZE leaked over N calls from:`, and then the functions, the innermost first.
        let mut lines = text.lines();
        let mut found = Vec::new();
        while let Some(line) = lines.next() {
            if let Some((size, _)) = line.split_once(" leaked over ") {
                let function = lines.next().unwrap_or_default().trim();
                found.push(format!("{function}: {size} outstanding"));
            }
        }
        Ok(found)
    }
}

impl Drop for Heaptrack {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.reader.kill();
        let _ = self.reader.wait();
    }
}

/// The functions that hold most by the last of jemalloc's profiles.
fn in_use(program: &Path, folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).context("failed to list the profiles")?.filter_map(Result::ok);
    let profiles = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".heap"));
    // heap.PID.NUMBER.iNUMBER.heap
    let last = profiles.max_by_key(|entry| entry.metadata().and_then(|found| found.modified()).ok());
    let last = last.context("jemalloc wrote no profile: it was built without its profiler")?.path();
    let mut jeprof = Command::new("jeprof");
    let text = said(jeprof.args(["--text", "--inuse_space"]).arg(program).arg(last))?;
    // Flat, share, sum, cumulative, share, function; after a line with the total.
    let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let functions = lines.filter(|fields| fields.len() >= 6 && fields[0].parse::<f64>().is_ok_and(|flat| flat > 0.0));
    Ok(functions.map(|fields| format!("{}: {} MB in use", fields[5], fields[0])).collect())
}

/// What a program writes to its standard output; how far it is, which it says elsewhere, is left out.
fn said(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let program = command.get_program().display();
    let output = output.with_context(|| format!("failed to start {program}"))?;
    if !output.status.success() {
        bail!("{program} ended with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// For people.
pub fn render(profiled: &[Profiled]) -> String {
    let mut text = String::from(
        "\nbeside heap profilers: a churning thread, a leak of 512 KiB/s, a cache of 16 MB that does not grow\n",
    );
    text += "                          pairs/s   of nothing's  place of the leak  says first\n";
    for row in profiled {
        let place = row.place.map_or_else(|| "-".to_owned(), |place| place.to_string());
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:<24}{:>11.0}  {:>12.3}  {place:>17}  {}",
            row.name, row.pairs_per_s, row.of_nothing, row.finds
        );
    }
    text
}

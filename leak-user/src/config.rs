//! The command line, checked: past [`Invocation::check`] nothing is validated again. A value that makes no sense, or an
//! option whose feature this version does not have, is a [`UsageError`]; nothing is silently ignored.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use leak_common::sampling::Interval;

use crate::attach::{Asked, LEAST_KERNEL_MEMORY};
pub use crate::cli::Format;
use crate::cli::{Feature, Flags, ResourceFlag, Subcommands, TraceFlags, UnwindFlag};
use crate::discover::Named;
use crate::select::{Kind, Selection};

/// The kernel's upper bound of process ids (`PID_MAX_LIMIT`).
const PID_MAX: u32 = 1 << 22;
/// User space has 47 bits of addresses on x86-64; no block is larger.
const SIZE_MAX: u64 = 1 << 47;
const DURATIONS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_hours(24 * 365);
const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_hours(24);
const AGES: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_hours(24 * 365);
const TOP_MAX: usize = 10_000;

/// What leaktrace was asked to do.
#[derive(Clone, Debug)]
pub enum Invocation {
    Trace(Box<Config>),
    Doctor,
    #[cfg(feature = "agent")]
    Agent(crate::cli::AgentFlags),
}

/// A checked request to trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub target: Target,
    /// `None`: until the targets have ended, or a signal.
    pub duration: Option<Duration>,
    /// Between reports; at least 100 ms.
    pub interval: Duration,
    pub format: Format,
    /// `None`: the standard output.
    pub output: Option<PathBuf>,
    /// Growing stacks to list for each process, at least 1.
    pub top: usize,
    pub sampling: Sampling,
    /// What comes after it, one at each SIGUSR1.
    pub resample: Vec<Sampling>,
    /// Addresses that the kernel side is to lose, for a test.
    pub lose_addresses: u32,
    /// How much tracing may cost; `None`: whatever it does.
    pub max_overhead: Option<Overhead>,
    /// Bytes; smaller allocations are left out in the kernel.
    pub min_size: u64,
    /// Bytes; larger allocations are left out in the kernel. Not below `min_size`.
    pub max_size: u64,
    /// Report only blocks of at least this age.
    pub older_than: Duration,
    pub unwind: Unwind,
    /// Bytes of kernel memory for everything.
    pub kernel_memory: u64,
    /// Bytes of it for unwind tables.
    pub unwind_memory: u64,
    /// Bytes of leaktrace's own memory.
    pub max_memory: u64,
    /// Sizes that a test asks for.
    pub sizes: Asked,
    /// Allocators that are not found by themselves.
    pub allocators: Vec<Named>,
    pub resources: Resources,
    pub fail_on_leak: bool,
    /// How many processes of the system are traced at a time; `None`: the usual number, or with all no bound.
    pub most_traced: Option<usize>,
    /// Trace the children of traced processes too.
    pub children: bool,
    /// Features of the kernel that are not used.
    pub without: Vec<Feature>,
    /// How often `-v` was given.
    pub verbosity: u8,
    /// Where to write the stream of kernel records.
    pub record: Option<PathBuf>,
}

/// What to trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Running processes: at least one, each once, as the user counts them.
    Pids(Vec<u32>),
    /// A program to start and its arguments; at least one element, the first not empty.
    Command(Vec<OsString>),
    /// The selected processes of the system, now and later: those whose memory keeps rising, or all of them.
    System { selection: Box<Selection>, all: bool },
}

/// Which allocations are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    /// All of them at first, and then as many as the overhead allows.
    Auto,
    /// All of them.
    Exact,
    /// One in so many bytes, on average.
    Every(Interval),
}

impl Sampling {
    /// The interval that every process is sampled with; `None` where that is for each to be chosen.
    pub fn interval(self) -> Option<Interval> {
        match self {
            Self::Auto => None,
            Self::Exact => Some(Interval::EXACT),
            Self::Every(interval) => Some(interval),
        }
    }
}

/// How much tracing may cost the traced processes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overhead {
    /// From 0.0001 to 1.
    pub share: f64,
    /// Of one processor, for all processes together; otherwise of each process's own time, or of one processor if that is more.
    pub of_processor: bool,
}

// Never NaN.
impl Eq for Overhead {}

/// How call stacks are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwind {
    /// By unwind tables where there are any.
    Tables,
    /// By the chain of frame pointers.
    FramePointers,
}

/// What kinds of memory are traced; at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    pub heap: bool,
    pub mmap: bool,
}

/// A command line that cannot be followed. The text names the option, the value and what is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError {
    /// The option that it is about, such as `--interval`, if it is about one alone.
    pub option: Option<String>,
    /// What is wrong; with an option, what follows its name and value.
    text: String,
    value: String,
}

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.option {
            Some(option) => write!(f, "invalid value '{}' for '{option}': {}", self.value, self.text),
            None => f.write_str(&self.text),
        }
    }
}

impl std::error::Error for UsageError {}

impl UsageError {
    fn value(option: &str, value: &str, accepted: impl std::fmt::Display) -> Self {
        let value = value.escape_debug().to_string();
        Self { option: Some(option.to_owned()), value, text: accepted.to_string() }
    }

    fn together(text: String) -> Self {
        Self { option: None, text, value: String::new() }
    }

    /// The same without the name of the option, for where it has another.
    pub fn without_option(&self) -> String {
        match &self.option {
            Some(_) => format!("invalid value '{}': {}", self.value, self.text),
            None => self.text.clone(),
        }
    }
}

impl Invocation {
    /// Checks a command line.
    pub fn check(flags: Flags) -> Result<Self, UsageError> {
        match flags.mode {
            Some(Subcommands::Doctor) => Ok(Self::Doctor),
            #[cfg(feature = "agent")]
            Some(Subcommands::Agent(flags)) => Ok(Self::Agent(flags)),
            None => Config::check(flags.trace).map(|config| Self::Trace(Box::new(config))),
        }
    }
}

impl Config {
    /// Takes over what can change while tracing goes on: the selected processes, the time between reports, what of them is listed, and
    /// what tracing may cost.
    pub fn go_on_with(&mut self, new: &Self) {
        if let (Target::System { selection, .. }, Target::System { selection: selected, .. }) =
            (&mut self.target, &new.target)
        {
            selection.clone_from(selected);
        }
        self.interval = new.interval;
        self.top = new.top;
        self.older_than = new.older_than;
        if self.max_overhead.is_some() && new.max_overhead.is_some() {
            self.max_overhead = new.max_overhead;
        }
    }

    /// Checks what a command line says of tracing.
    pub fn check(flags: TraceFlags) -> Result<Self, UsageError> {
        let selected = selected(&flags)?;
        let min_size = flags.min_size.as_deref().map(|value| size("--min-size", value)).transpose()?;
        let max_size = flags.max_size.as_deref().map(|value| size("--max-size", value)).transpose()?;
        if let (Some(min), Some(max)) = (min_size, max_size)
            && min > max
        {
            return Err(UsageError::value(
                "--max-size",
                flags.max_size.as_deref().unwrap_or_default(),
                format_args!("must not be below --min-size {}", flags.min_size.as_deref().unwrap_or_default()),
            ));
        }
        let resample = flags.resample.iter().map(|value| sampling(value)).collect::<Result<_, _>>()?;
        let sampling = sampling(&flags.sample)?;
        let kernel_memory = memory("--kernel-memory", &flags.kernel_memory, KERNEL_MEMORY)?;
        let target = target(&flags.pids, flags.command, selected, flags.all)?;
        let output = flags.output.map(|path| file("--output", path)).transpose()?;
        let record = flags.record.map(|path| file("--record", path)).transpose()?;
        if output.is_some() && output == record {
            return Err(UsageError::together("'--output' and '--record' name the same file".to_owned()));
        }
        Ok(Self {
            max_overhead: max_overhead(flags.max_overhead.as_deref(), &target)?,
            target,
            duration: flags.duration.map(|value| time("--duration", &value, DURATIONS)).transpose()?,
            interval: time("--interval", &flags.interval, INTERVALS)?,
            format: flags.format,
            output,
            top: top(&flags.top)?,
            sampling,
            resample,
            lose_addresses: flags.lose_addresses.unwrap_or(0),
            min_size: min_size.unwrap_or(0),
            max_size: max_size.unwrap_or(u64::MAX),
            older_than: flags
                .older_than
                .map(|value| time("--older-than", &value, AGES))
                .transpose()?
                .unwrap_or(Duration::ZERO),
            unwind: match flags.unwind {
                // What a row of a table says is x86-64's; on arm64 compilers keep frame pointers unless told otherwise.
                UnwindFlag::Auto if cfg!(target_arch = "x86_64") => Unwind::Tables,
                UnwindFlag::Auto | UnwindFlag::Fp => Unwind::FramePointers,
            },
            kernel_memory,
            unwind_memory: unwind_memory(flags.unwind_memory.as_deref(), kernel_memory)?,
            max_memory: memory("--max-memory", &flags.max_memory, MAX_MEMORY)?,
            sizes: asked(&flags.sizes)?,
            allocators: flags.allocators.into_iter().map(allocator).collect::<Result<_, _>>()?,
            resources: Resources {
                heap: flags.resources.is_empty() || flags.resources.contains(&ResourceFlag::Heap),
                mmap: flags.resources.is_empty() || flags.resources.contains(&ResourceFlag::Mmap),
            },
            fail_on_leak: flags.fail_on_leak,
            most_traced: None,
            children: flags.children,
            without: flags.without,
            verbosity: flags.verbose,
            record,
        })
    }
}

/// What the options say that choose among the system's processes; the name of the first of them, if there is one.
fn selected(flags: &TraceFlags) -> Result<(Selection, Option<&'static str>), UsageError> {
    let mut selection = Selection::default();
    let mut first = None;
    for (option, kind, values) in [
        ("--comm", Kind::Comm, &flags.comms),
        ("--exe", Kind::Exe, &flags.exes),
        ("--cgroup", Kind::Cgroup, &flags.cgroups),
        ("--uid", Kind::Uid, &flags.uids),
        ("--container", Kind::Container, &flags.containers),
    ] {
        for value in values {
            selection.include(kind, value).map_err(|refused| UsageError::value(option, value, refused))?;
            first = first.or(Some(option));
        }
    }
    for value in &flags.excludes {
        selection.exclude(value).map_err(|refused| UsageError::value("--exclude", value, refused))?;
        first = first.or(Some("--exclude"));
    }
    Ok((selection, first.or(flags.all.then_some("--all"))))
}

fn target(
    pids: &[String],
    command: Vec<OsString>,
    (selection, option): (Selection, Option<&str>),
    all: bool,
) -> Result<Target, UsageError> {
    if let (Some(option), false) = (option, pids.is_empty() && command.is_empty()) {
        let other = if pids.is_empty() { "-- COMMAND" } else { "--pid" };
        return Err(UsageError::together(format!(
            "'{option}' cannot be used with '{other}': it chooses among all processes of the system"
        )));
    }
    match (pids.is_empty(), command.first()) {
        (false, Some(command)) => Err(UsageError::together(format!(
            "'--pid {}' cannot be used with '-- {}': trace running processes or start a program, not both",
            pids.join(",").escape_debug(),
            command.to_string_lossy().escape_debug()
        ))),
        (true, None) => Ok(Target::System { selection: Box::new(selection), all }),
        (true, Some(program)) if program.is_empty() => Err(UsageError::value("COMMAND", "", "must name a program")),
        (true, Some(_)) => Ok(Target::Command(command)),
        (false, None) => {
            let mut checked = Vec::with_capacity(pids.len());
            for value in pids {
                let pid = value.trim().parse().ok().filter(|pid| (1..=PID_MAX).contains(pid)).ok_or_else(|| {
                    UsageError::value("--pid", value, format_args!("must be process ids from 1 to {PID_MAX}"))
                })?;
                if pid == std::process::id() {
                    return Err(UsageError::value("--pid", value, "leaktrace cannot trace itself"));
                }
                if checked.contains(&pid) {
                    return Err(UsageError::value("--pid", value, "must name each process once"));
                }
                checked.push(pid);
            }
            Ok(Target::Pids(checked))
        }
    }
}

fn time(option: &str, value: &str, accepted: RangeInclusive<Duration>) -> Result<Duration, UsageError> {
    humantime::parse_duration(value.trim()).ok().filter(|time| accepted.contains(time)).ok_or_else(|| {
        let (from, to) = (humantime::format_duration(*accepted.start()), accepted.end().as_secs() / (24 * 3600));
        let days = if to == 1 { "day" } else { "days" };
        UsageError::value(
            option,
            value,
            format_args!("must be a time with its unit, such as 30s or 5min, from {from} to {to} {days}"),
        )
    })
}

fn top(value: &str) -> Result<usize, UsageError> {
    value
        .trim()
        .parse()
        .ok()
        .filter(|top| (1..=TOP_MAX).contains(top))
        .ok_or_else(|| UsageError::value("--top", value, format_args!("must be a number from 1 to {TOP_MAX}")))
}

fn size(option: &str, value: &str) -> Result<u64, UsageError> {
    parse_size(value).filter(|size| (1..=SIZE_MAX).contains(size)).ok_or_else(|| {
        UsageError::value(option, value, "must be a size from 1 to 128TiB, such as 4096, 64K or 1MiB (K is 1024)")
    })
}

/// The map of rows is one array, whose elements the BPF programs reach by 24 halvings (see `leak-ebpf`): 2^24 of eight
/// bytes.
const UNWIND_MEMORY: RangeInclusive<u64> = 64 << 10..=128 << 20;

/// Kernel memory for unwind tables where the user says nothing; of all kernel memory a quarter at most.
const USUAL_UNWIND_MEMORY: u64 = 16 << 20;

/// From what the maps take at the least, with a quarter of it for tables.
const KERNEL_MEMORY: RangeInclusive<u64> = LEAST_KERNEL_MEMORY / 3 * 4..=4 << 30;
/// Below the lower end there would be no room for the programs themselves and the files that names are read from.
const MAX_MEMORY: RangeInclusive<u64> = 64 << 20..=1 << 40;

fn unwind_memory(value: Option<&str>, kernel_memory: u64) -> Result<u64, UsageError> {
    let Some(value) = value else {
        return Ok(USUAL_UNWIND_MEMORY.min(kernel_memory / 4));
    };
    let size = memory("--unwind-memory", value, UNWIND_MEMORY)?;
    if size > kernel_memory / 2 {
        return Err(UsageError::value("--unwind-memory", value, "must not be more than half of --kernel-memory"));
    }
    Ok(size)
}

fn memory(option: &str, value: &str, accepted: RangeInclusive<u64>) -> Result<u64, UsageError> {
    parse_size(value).filter(|size| accepted.contains(size)).ok_or_else(|| {
        let [from, to] = [accepted.start(), accepted.end()].map(|bytes| format!("{}KiB", bytes >> 10));
        UsageError::value(option, value, format_args!("must be a size from {from} to {to}, such as 64MiB"))
    })
}

/// The sizes that a test asks for.
fn asked(values: &[String]) -> Result<Asked, UsageError> {
    let mut asked = Asked::default();
    for value in values {
        let refused = || UsageError::value("--sizes", value, "must be ring=BYTES, threads=N or missed=N");
        let (name, number) = value.split_once('=').ok_or_else(refused)?;
        let number = parse_size(number).and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0);
        let place = match name {
            "ring" => &mut asked.ring,
            "threads" => &mut asked.threads,
            "missed" => &mut asked.missed,
            _ => return Err(refused()),
        };
        *place = Some(number.ok_or_else(refused)?);
    }
    Ok(asked)
}

/// Bytes of `4096`, `64K`, `64KiB`, `1.5MiB`; K, KB and KiB are all 1024. `None` if it is none of these.
pub(crate) fn parse_size(value: &str) -> Option<u64> {
    let value = value.trim();
    let digits = value.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(value.len());
    let (number, unit) = value.split_at(digits);
    let unit = unit.trim_start().to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
        "" if unit == "ib" => return None,
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    // A fraction of a byte is no size, so a fraction needs a unit.
    let bytes = number.parse::<f64>().ok()? * (1_u64 << shift) as f64;
    (shift > 0 && bytes < SIZE_MAX as f64 * 2.0).then_some(bytes as u64)
}

/// Means between samples: from the smallest block that allocators hand out.
const SAMPLE: RangeInclusive<u64> = 16..=16 << 30;

fn sampling(value: &str) -> Result<Sampling, UsageError> {
    match value {
        "auto" => Ok(Sampling::Auto),
        "exact" => Ok(Sampling::Exact),
        _ => parse_size(value)
            .filter(|size| SAMPLE.contains(size))
            .map(|size| Sampling::Every(Interval::near(size)))
            .ok_or_else(|| {
                UsageError::value("--sample", value, "must be auto, exact, or a size from 16 to 16GiB, such as 512K")
            }),
    }
}

/// The budget; `None` without one. By default a share of the time of what was named, and for the whole system of one processor.
fn max_overhead(value: Option<&str>, target: &Target) -> Result<Option<Overhead>, UsageError> {
    let of_processor = matches!(target, Target::System { .. });
    let percent = match value.map(str::trim) {
        Some("off") => return Ok(None),
        None if of_processor => 2.0,
        None => 5.0,
        Some(value) => value
            .trim_end_matches('%')
            .trim_end()
            .parse::<f64>()
            .ok()
            .filter(|percent| (0.01..=100.0).contains(percent))
            .ok_or_else(|| {
                UsageError::value("--max-overhead", value, "must be a percentage from 0.01 to 100, such as 5, or off")
            })?,
    };
    Ok(Some(Overhead { share: percent / 100.0, of_processor }))
}

fn file(option: &str, path: PathBuf) -> Result<PathBuf, UsageError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.ends_with(b"/") || bytes.contains(&0) {
        return Err(UsageError::value(option, &path.to_string_lossy(), "must be the path of a file"));
    }
    Ok(path)
}

fn allocator(value: OsString) -> Result<Named, UsageError> {
    let text = value.to_string_lossy().into_owned();
    let mut bytes = value.into_vec();
    // A colon in the middle of a path, as in /opt/a:b/lib.so, is not the one before a prefix.
    let colon = bytes.iter().rposition(|&byte| byte == b':').filter(|&at| !bytes[at..].contains(&b'/'));
    let prefix = colon.map(|at| bytes.split_off(at).split_off(1));
    if bytes.is_empty() || bytes.ends_with(b"/") {
        return Err(UsageError::value("--allocator", &text, "must be the path of a program or library"));
    }
    let symbol = |prefix: &[u8]| {
        !prefix.is_empty() && prefix.iter().all(|&byte| byte.is_ascii_alphanumeric() || b"_$.".contains(&byte))
    };
    let prefix = match prefix {
        None => None,
        Some(prefix) if symbol(&prefix) => String::from_utf8(prefix).ok(),
        Some(_) => {
            let must = "must have after the ':' what its functions' names have before malloc and free, such as je_";
            return Err(UsageError::value("--allocator", &text, must));
        }
    };
    Ok(Named { path: OsString::from_vec(bytes).into(), prefix })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn check(args: &[&str]) -> Result<Invocation, UsageError> {
        Invocation::check(Flags::try_parse_from(std::iter::once(&"leaktrace").chain(args)).unwrap())
    }

    fn config(args: &[&str]) -> Config {
        match check(args).unwrap() {
            Invocation::Trace(config) => *config,
            other => panic!("{args:?} is not about tracing: {other:?}"),
        }
    }

    /// The defaults are those of the manual.
    #[test]
    fn defaults() {
        assert_eq!(
            config(&["-p", "7"]),
            Config {
                target: Target::Pids(vec![7]),
                duration: None,
                interval: Duration::from_secs(5),
                format: Format::Text,
                output: None,
                top: 10,
                sampling: Sampling::Auto,
                resample: Vec::new(),
                lose_addresses: 0,
                max_overhead: Some(Overhead { share: 0.05, of_processor: false }),
                min_size: 0,
                max_size: u64::MAX,
                older_than: Duration::ZERO,
                unwind: Unwind::Tables,
                kernel_memory: 128 << 20,
                unwind_memory: 16 << 20,
                max_memory: 2 << 30,
                sizes: Asked::default(),
                allocators: Vec::new(),
                resources: Resources { heap: true, mmap: true },
                fail_on_leak: false,
                most_traced: None,
                children: false,
                without: Vec::new(),
                verbosity: 0,
                record: None,
            }
        );
        assert!(matches!(check(&["doctor"]), Ok(Invocation::Doctor)));
    }

    /// Each option arrives where it belongs.
    #[test]
    fn every_option() {
        let c = config(&[
            "--duration",
            "1min 30s",
            "--interval",
            "250ms",
            "--format",
            "jsonl",
            "-o",
            "out/report.jsonl",
            "--top",
            "3",
            "--sample",
            "exact",
            "--min-size",
            "64K",
            "--max-size",
            "1.5MiB",
            "--older-than",
            "10s",
            "--unwind",
            "fp",
            "--allocator",
            "/opt/a:b/libx.so",
            "--allocator",
            "/opt/a:b/libx.so:je_",
            "--resource",
            "mmap",
            "--fail-on-leak",
            "-vv",
            "--record",
            "s.rec",
            "--",
            "redis-server",
            "--port",
            "0",
        ]);
        assert_eq!(c.target, Target::Command(["redis-server", "--port", "0"].map(OsString::from).to_vec()));
        assert_eq!(c.duration, Some(Duration::from_secs(90)));
        assert_eq!(c.interval, Duration::from_millis(250));
        assert_eq!((c.format, c.top, c.verbosity, c.fail_on_leak), (Format::Jsonl, 3, 2, true));
        assert_eq!(c.output, Some("out/report.jsonl".into()));
        assert_eq!((c.min_size, c.max_size), (65_536, 1_572_864));
        assert_eq!(c.older_than, Duration::from_secs(10));
        let named = |prefix: Option<&str>| Named { path: "/opt/a:b/libx.so".into(), prefix: prefix.map(str::to_owned) };
        assert_eq!(c.allocators, [named(None), named(Some("je_"))]);
        assert_eq!(c.resources, Resources { heap: false, mmap: true });
        assert_eq!(c.record, Some("s.rec".into()));
        assert_eq!(config(&["-p", "7,8", "-p", "9"]).target, Target::Pids(vec![7, 8, 9]));
    }

    /// Each value that makes no sense is refused with the option, the value and what is accepted.
    #[test]
    fn senseless_values() {
        let cases: &[(&[&str], &str, &str, &str)] = &[
            (&["-p", "0"], "--pid", "'0'", "from 1"),
            (&["-p", "-4"], "--pid", "'-4'", "from 1"),
            (&["-p", "x"], "--pid", "'x'", "process ids"),
            (&["-p", "7,"], "--pid", "''", "process ids"),
            (&["-p", "99999999999"], "--pid", "'99999999999'", "4194304"),
            (&["-p", "7,8,7"], "--pid", "'7'", "once"),
            (&["--duration", "0s"], "--duration", "'0s'", "100ms"),
            (&["--duration", "-5s"], "--duration", "'-5s'", "100ms"),
            (&["--duration", "30"], "--duration", "'30'", "unit"),
            (&["--duration", "soon"], "--duration", "'soon'", "30s"),
            (&["--duration", "500y"], "--duration", "'500y'", "365 days"),
            (&["--duration", "99999999999999999999s"], "--duration", "'99999999999999999999s'", "365 days"),
            (&["--interval", "0ms"], "--interval", "'0ms'", "100ms"),
            (&["--interval", "1us"], "--interval", "'1us'", "100ms"),
            (&["--interval", "2d"], "--interval", "'2d'", "1 day"),
            (&["--older-than", "0s"], "--older-than", "'0s'", "1ms"),
            (&["--min-size", "0"], "--min-size", "'0'", "from 1"),
            (&["--min-size", "-1"], "--min-size", "'-1'", "from 1"),
            (&["--max-size", "many"], "--max-size", "'many'", "4096"),
            (&["--max-size", "129TiB"], "--max-size", "'129TiB'", "128TiB"),
            (&["--max-size", "99999999999999999999"], "--max-size", "'99999999999999999999'", "128TiB"),
            (&["--min-size", "2K", "--max-size", "1K"], "--max-size", "'1K'", "--min-size 2K"),
            (&["--top", "0"], "--top", "'0'", "from 1"),
            (&["--top", "-1"], "--top", "'-1'", "from 1"),
            (&["--top", "10001"], "--top", "'10001'", "10000"),
            (&["--sample", "some"], "--sample", "'some'", "exact"),
            (&["--sample", "0"], "--sample", "'0'", "exact"),
            (&["--max-overhead", "0"], "--max-overhead", "'0'", "from 0.01"),
            (&["--max-overhead", "nan"], "--max-overhead", "'nan'", "from 0.01"),
            (&["--max-overhead", "101"], "--max-overhead", "'101'", "0.01 to 100"),
            (&["--kernel-memory", "4MiB"], "--kernel-memory", "'4MiB'", "18432KiB"),
            (&["--kernel-memory", "20MiB", "--unwind-memory", "11MiB"], "--unwind-memory", "'11MiB'", "half"),
            (&["--max-memory", "1MiB"], "--max-memory", "'1MiB'", "65536KiB"),
            (&["--sizes", "ring"], "--sizes", "'ring'", "threads=N"),
            (&["--sizes", "ring=0"], "--sizes", "'ring=0'", "threads=N"),
            (&["--allocator", ":je_"], "--allocator", "':je_'", "path"),
            (&["--allocator", "/lib/:je_"], "--allocator", "'/lib/:je_'", "path"),
            (&["--allocator", "/lib/libx.so:"], "--allocator", "'/lib/libx.so:'", "je_"),
            (&["--allocator", "/lib/libx.so:a b"], "--allocator", "'/lib/libx.so:a b'", "je_"),
            (&["-o", "reports/"], "--output", "'reports/'", "path of a file"),
        ];
        for (args, option, value, accepted) in cases {
            let args: Vec<&str> =
                if args[0] == "-p" { args.to_vec() } else { args.iter().copied().chain(["-p", "7"]).collect() };
            let text = check(&args).unwrap_err().to_string();
            assert!(text.contains(option) && text.contains(value) && text.contains(accepted), "{args:?}: {text}");
        }
    }

    /// What cannot be done together, or at all, is refused and the way out named.
    #[test]
    fn targets_that_cannot_be() {
        for args in [["--comm", "x"], ["--exclude", "comm=x"]] {
            let text = check(&[args[0], args[1], "-p", "7"]).unwrap_err().to_string();
            assert!(text.contains(args[0]) && text.contains("--pid"), "{text}");
        }
        let text = check(&["--all", "--", "ls"]).unwrap_err().to_string();
        assert!(text.contains("--all") && text.contains("-- COMMAND"), "{text}");
        let both = check(&["-p", "7", "--", "ls"]).unwrap_err().to_string();
        assert!(both.contains("--pid 7") && both.contains("-- ls"), "{both}");
        assert!(check(&["--", ""]).unwrap_err().to_string().contains("COMMAND"));
        let own = std::process::id().to_string();
        assert!(check(&["-p", &own]).unwrap_err().to_string().contains("itself"));
        assert!(check(&["-p", "7", "-o", "a", "--record", "a"]).unwrap_err().to_string().contains("same file"));
    }

    /// Without pids and command it is the system, with what the options select; several values may share an option.
    #[test]
    fn the_system() {
        let system = |selection, all| Target::System { selection: Box::new(selection), all };
        assert_eq!(config(&["--duration", "1s"]).target, system(Selection::default(), false));
        assert_eq!(config(&["--all"]).target, system(Selection::default(), true));
        let mut selection = Selection::default();
        for (kind, value) in [
            (Kind::Comm, "nginx"),
            (Kind::Comm, "redis*"),
            (Kind::Comm, "x"),
            (Kind::Exe, "/opt/**"),
            (Kind::Cgroup, "/a"),
            (Kind::Uid, "0"),
            (Kind::Container, "4b1a"),
        ] {
            selection.include(kind, value).unwrap();
        }
        for text in ["comm=sh", "uid=1"] {
            selection.exclude(text).unwrap();
        }
        let args = "--comm nginx,redis* --comm x --exe /opt/** --cgroup /a --uid root --container 4b1a --exclude comm=sh \
                    --exclude uid=1 --children";
        let config = config(&args.split_whitespace().collect::<Vec<_>>());
        assert_eq!((config.target, config.children), (system(selection, false), true));
    }

    /// What can select no process is refused, with the option and the reason.
    #[test]
    fn senseless_selections() {
        for (args, accepted) in [
            (["--comm", "a,,b"], "empty"),
            (["--comm", "a-name-of-16-byt"], "15 bytes"),
            (["--exe", "/opt/[a"], "pattern"),
            (["--uid", "no such user"], "user of this host"),
            (["--container", "a/b"], "letters"),
            (["--exclude", "nginx"], "KIND=VALUE"),
            (["--exclude", "name=nginx"], "KIND=VALUE"),
            (["--exclude", "comm="], "empty"),
        ] {
            let text = check(&args).unwrap_err().to_string();
            assert!(text.contains(args[0]) && text.contains(accepted), "{args:?}: {text}");
        }
    }

    /// The budget of what was named is a share of its time, that of the system a share of a processor; and it can be left out.
    #[test]
    fn overheads() {
        let of = |args: &[&str]| config(args).max_overhead;
        assert_eq!(of(&["-p", "7"]), Some(Overhead { share: 0.05, of_processor: false }));
        assert_eq!(of(&["--", "true"]), Some(Overhead { share: 0.05, of_processor: false }));
        assert_eq!(of(&[]), Some(Overhead { share: 0.02, of_processor: true }));
        assert_eq!(of(&["--max-overhead", "10 %"]), Some(Overhead { share: 0.1, of_processor: true }));
        assert_eq!(of(&["--max-overhead", "0.5", "-p", "7"]), Some(Overhead { share: 0.005, of_processor: false }));
        assert_eq!(of(&["--max-overhead", "off", "-p", "7"]), None);
        for value in ["0", "-3", "101", "much", "", "NaN", "5 percent"] {
            let text = check(&[&format!("--max-overhead={value}"), "-p", "7"]).unwrap_err().to_string();
            assert!(text.contains("--max-overhead") && text.contains("from 0.01 to 100, such as 5, or off"), "{text}");
        }
    }

    /// Every way to say how many allocations are followed; sizes as everywhere, within bounds.
    #[test]
    fn sampling_intervals() {
        let sampling = |value| config(&["--sample", value, "-p", "7"]).sampling;
        assert_eq!((sampling("auto"), sampling("exact")), (Sampling::Auto, Sampling::Exact));
        for (value, bytes) in [("16", 16), ("512K", 512 << 10), ("1.5MiB", 3 << 19), ("16GiB", 16 << 30)] {
            assert_eq!(sampling(value), Sampling::Every(Interval::near(bytes)));
        }
        for value in ["15", "17GiB", "-1", "often", "512Q", ""] {
            let text = check(&[&format!("--sample={value}"), "-p", "7"]).unwrap_err().to_string();
            assert!(text.contains("--sample") && text.contains("from 16 to 16GiB"), "{text}");
        }
    }

    /// A control character in a value does not reach the terminal with the error.
    #[test]
    fn errors_are_safe_to_print() {
        for args in [["--duration", "\x1b[2J", "-p", "7"], ["-p", "7", "--", "\x1b[2J"]] {
            assert!(!check(&args).unwrap_err().to_string().contains('\x1b'));
        }
    }

    /// Unwind tables take a quarter of a small kernel memory, and what tests ask for arrives.
    #[test]
    fn memory_is_shared_out() {
        let c =
            config(&["--kernel-memory", "32MiB", "--max-memory", "64MiB", "--sizes", "ring=4K,missed=16", "-p", "7"]);
        assert_eq!((c.kernel_memory, c.unwind_memory, c.max_memory), (32 << 20, 8 << 20, 64 << 20));
        assert_eq!(c.sizes, Asked { ring: Some(4096), threads: None, missed: Some(16) });
        let c = config(&["--kernel-memory", "32MiB", "--unwind-memory", "1MiB", "-p", "7"]);
        assert_eq!(c.unwind_memory, 1 << 20);
    }

    /// Sizes in all their spellings, and what is none.
    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("512b", 512),
            ("64K", 65_536),
            ("64k", 65_536),
            ("64KB", 65_536),
            ("1MiB", 1 << 20),
            ("1 GiB", 1 << 30),
            ("2T", 2 << 40),
            ("0.5K", 512),
            ("1.5M", 3 << 19),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "K", "1.5", "1..5K", ".", "1X", "1KiBs", "1ib", "0x10", "1e3", "٣", "inf", "16777216T"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }
}

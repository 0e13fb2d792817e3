//! The command line as it was typed: names of options, help texts and exit codes. What the values mean, and whether they
//! make sense together, is for [`crate::config`] to check.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config::UsageError;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// What a run of leaktrace tells its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Traced to the end (for `doctor`: nothing that is needed is missing).
    Done = 0,
    /// Something went wrong.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// Something leaks, with `--fail-on-leak`.
    Leak = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Tells which call stack of a running process leaks memory, how fast, and how sure that is.
///
/// Needs root (or the capabilities that `leaktrace doctor` names) and nothing from the process: no restart, no rebuild,
/// no library.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "leaktrace",
    version,
    styles = STYLES,
    args_conflicts_with_subcommands = true,
    override_usage = "leaktrace [OPTIONS]\n       \
                      leaktrace [OPTIONS] -p PID[,PID...]\n       \
                      leaktrace [OPTIONS] -- COMMAND [ARG]...\n       \
                      leaktrace agent [OPTIONS]\n       \
                      leaktrace doctor",
    after_help = "Exit status: 0 done, 1 failed, 2 wrong usage, 3 something leaks (--fail-on-leak).\n\
                  With -- COMMAND and without --fail-on-leak, the status of COMMAND."
)]
pub struct Flags {
    #[command(subcommand)]
    pub mode: Option<Subcommands>,
    #[command(flatten)]
    pub trace: TraceFlags,
}

#[derive(Subcommand, Clone, Debug)]
pub enum Subcommands {
    /// Tell what this host can do, and for each missing thing how to get it
    Doctor,
    /// Trace the whole system for good and serve what is found over HTTP
    #[cfg(feature = "agent")]
    Agent(AgentFlags),
}

/// What `leaktrace agent` takes. Everything can be said in the file, by variables (`LEAKTRACE_HTTP_LISTEN`) and by `--set`, each over
/// the one before.
#[derive(Args, Clone, Debug, Default)]
#[cfg(feature = "agent")]
pub struct AgentFlags {
    /// The configuration [default: /etc/leaktrace/agent.toml, if it is there]
    #[arg(short, long, value_name = "FILE", env = "LEAKTRACE_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,

    /// Where to serve [default: 127.0.0.1:9790]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,

    /// Folder for what is kept from run to run [default: /var/lib/leaktrace]
    #[arg(long, value_name = "FOLDER")]
    pub state: Option<PathBuf>,

    /// A value of the configuration, such as trace.interval=30s
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Only say whether the configuration makes sense
    #[arg(long)]
    pub check_config: bool,

    /// More about what is done, to the standard error; twice for more
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What `leaktrace` without a subcommand takes.
#[derive(Args, Clone, Debug, Default)]
pub struct TraceFlags {
    /// Processes to trace
    #[arg(short, long = "pid", value_name = "PID[,PID...]", value_delimiter = ',', allow_negative_numbers = true)]
    pub pids: Vec<String>,

    /// A program to start and trace from its first allocation
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,

    /// Only processes with this name, or one that fits this pattern
    #[arg(long = "comm", value_name = "NAME", value_delimiter = ',', help_heading = "Which processes of the system")]
    pub comms: Vec<String>,

    /// Only processes of this program: a file name, or a pattern of a whole path
    #[arg(long = "exe", value_name = "PATH", value_delimiter = ',', help_heading = "Which processes of the system")]
    pub exes: Vec<String>,

    /// Only processes in this control group or below it
    #[arg(long = "cgroup", value_name = "PATH", value_delimiter = ',', help_heading = "Which processes of the system")]
    pub cgroups: Vec<String>,

    /// Only processes of this user
    #[arg(long = "uid", value_name = "USER", value_delimiter = ',', help_heading = "Which processes of the system")]
    pub uids: Vec<String>,

    /// Only processes in the container whose id starts like this
    #[arg(
        long = "container",
        value_name = "ID",
        value_delimiter = ',',
        help_heading = "Which processes of the system"
    )]
    pub containers: Vec<String>,

    /// Leave out processes by pid, comm, exe, cgroup, uid or container
    #[arg(long = "exclude", value_name = "KIND=VALUE", help_heading = "Which processes of the system")]
    pub excludes: Vec<String>,

    /// Trace all of them from the start, not only those whose memory keeps rising; costs every program time
    #[arg(long, help_heading = "Which processes of the system")]
    pub all: bool,

    /// Trace the processes that these start too, and what those start
    #[arg(long, help_heading = "What is followed")]
    pub children: bool,

    /// How long to trace [default: until the processes end, or Ctrl-C]
    #[arg(short, long, value_name = "TIME", allow_hyphen_values = true, help_heading = "How long")]
    pub duration: Option<String>,

    /// Time between reports
    #[arg(
        short,
        long,
        value_name = "TIME",
        default_value = "5s",
        allow_hyphen_values = true,
        help_heading = "How long"
    )]
    pub interval: String,

    /// How reports are written
    #[arg(short, long, value_enum, default_value_t, help_heading = "Report")]
    pub format: Format,

    /// File for the report instead of the standard output; written whole or not at all
    #[arg(short, long, value_name = "FILE", help_heading = "Report")]
    pub output: Option<PathBuf>,

    /// Call stacks to show for each process
    #[arg(long, value_name = "N", default_value = "10", allow_hyphen_values = true, help_heading = "Report")]
    pub top: String,

    /// Exit with status 3 if something leaks
    #[arg(long, help_heading = "Report")]
    pub fail_on_leak: bool,

    /// How many allocations are followed: auto, exact, or a mean number of bytes between samples
    #[arg(
        long,
        value_name = "auto|exact|SIZE",
        default_value = "auto",
        allow_hyphen_values = true,
        help_heading = "What is followed"
    )]
    pub sample: String,

    /// Share of its processor time (of one processor, if it takes less and there is time to spare) that tracing may cost each process, or off [default: 5; for
    /// the whole system 2 % of one processor, shared]
    #[arg(
        long,
        value_name = "PERCENT",
        env = "LEAKTRACE_MAX_OVERHEAD",
        hide_env_values = true,
        allow_hyphen_values = true,
        help_heading = "What is followed"
    )]
    pub max_overhead: Option<String>,

    /// Leave out allocations below this size, such as 4096, 64K, 1MiB
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = "What is followed")]
    pub min_size: Option<String>,

    /// Leave out allocations above this size
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = "What is followed")]
    pub max_size: Option<String>,

    /// Report only memory that has lived at least this long
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, help_heading = "What is followed")]
    pub older_than: Option<String>,

    /// What is traced: calls of the allocator, pages mapped by the program [default: heap,mmap]
    #[arg(
        long = "resource",
        value_enum,
        value_name = "heap,mmap",
        value_delimiter = ',',
        help_heading = "What is followed"
    )]
    pub resources: Vec<ResourceFlag>,

    /// A file with an allocator that is not found by itself, with a prefix of its function names
    #[arg(long = "allocator", value_name = "PATH[:PREFIX]", help_heading = "What is followed")]
    pub allocators: Vec<OsString>,

    /// How call stacks are taken
    #[arg(long, value_enum, default_value_t, help_heading = "What is followed")]
    pub unwind: UnwindFlag,

    /// Kernel memory for all that the probes keep: ring buffer, threads, unwind tables; threads that do not fit are not followed, and
    /// counted
    #[arg(long, value_name = "SIZE", default_value = "128MiB", allow_hyphen_values = true, help_heading = "Memory")]
    pub kernel_memory: String,

    /// Of that, for unwind tables; what does not fit makes stacks incomplete, and is counted [default: 16MiB, and at most a quarter
    /// of --kernel-memory]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = "Memory")]
    pub unwind_memory: Option<String>,

    /// Memory of leaktrace itself, for live blocks, call stacks and names; blocks and stacks that do not fit are not followed, and
    /// counted
    #[arg(long, value_name = "SIZE", default_value = "2GiB", allow_hyphen_values = true, help_heading = "Memory")]
    pub max_memory: String,

    /// Sizes of what is hard to fill otherwise; for tests of what happens then
    #[arg(long, value_name = "ring=BYTES,threads=N,missed=N", value_delimiter = ',', hide = true)]
    pub sizes: Vec<String>,

    /// What to do without, as if the kernel did not have it; for tests of the ways around it
    #[arg(long, value_enum, value_name = "WHAT", value_delimiter = ',', hide = true)]
    pub without: Vec<Feature>,

    /// What to sample with from each SIGUSR1 on, in turn; for tests of the way from one to another
    #[arg(long, value_name = "exact|SIZE", value_delimiter = ',', hide = true)]
    pub resample: Vec<String>,

    /// So many addresses of sampled blocks that the kernel side is to lose, and as many that it is to make up, once; for tests of how
    /// that is found
    #[arg(long, value_name = "N", hide = true)]
    pub lose_addresses: Option<u32>,

    /// More about what is done, to the standard error; twice for more
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// File for the stream of kernel records, to replay it later
    #[arg(long, value_name = "FILE", hide = true)]
    pub record: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people
    #[default]
    Text,
    /// One document at the end
    Json,
    /// One document a line, each interval
    Jsonl,
    /// A profile of the live memory for `go tool pprof` and the like, at the end; binary, so to a file or pipe
    Pprof,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceFlag {
    /// malloc, calloc, realloc, ...
    Heap,
    /// mmap, mremap, brk
    Mmap,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnwindFlag {
    /// By unwind tables, made from the traced files; by frame pointers where there are none
    #[default]
    Auto,
    /// By the chain of frame pointers
    Fp,
}

/// What newer kernels have.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Session links of uprobes (6.13).
    Session,
    /// Links over many uprobes (6.6).
    Multi,
    /// Programs at the kernel's functions.
    Functions,
    /// Tracepoints with typed arguments.
    Types,
    /// `bpf_loop` (5.17), atomic operations with a result (5.12), and maps that grow (6.1).
    Loop,
    /// Tail calls from programs that have functions (arm64: 6.0), which take the place of `bpf_loop`.
    TailCalls,
}

/// Ends the program the way clap does for an error of its own: message and usage to the standard error, status 2.
pub fn exit_usage(error: &UsageError) -> ! {
    Flags::command().error(clap::error::ErrorKind::ValueValidation, error).exit()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// clap's own checks of the definition hold (they run only when asked).
    #[test]
    fn definition_is_sound() {
        Flags::command().debug_assert();
    }

    /// After `--` everything belongs to the command, even what looks like ours.
    #[test]
    fn command_keeps_its_arguments() {
        let flags = Flags::try_parse_from(["leaktrace", "--top", "3", "--", "doctor", "-p", "1", "--help"]).unwrap();
        assert!(flags.mode.is_none());
        assert_eq!(flags.trace.command, ["doctor", "-p", "1", "--help"]);
        assert!(flags.trace.pids.is_empty());
    }

    /// doctor is a mode of its own and takes nothing that belongs to tracing.
    #[test]
    fn doctor_stands_alone() {
        assert!(matches!(Flags::try_parse_from(["leaktrace", "doctor"]).unwrap().mode, Some(Subcommands::Doctor)));
        assert_eq!(Flags::try_parse_from(["leaktrace", "-p", "1", "doctor"]).unwrap_err().exit_code(), 2);
    }

    /// Values from a fixed set are refused with the option, the value and what is accepted.
    #[test]
    fn fixed_sets_name_what_is_accepted() {
        for (option, value, accepted) in
            [("--format", "xml", "jsonl"), ("--unwind", "dwarf", "fp"), ("--resource", "heap,fds", "mmap")]
        {
            let error = Flags::try_parse_from(["leaktrace", option, value]).unwrap_err();
            let text = error.to_string();
            assert_eq!(error.exit_code(), 2);
            let value = value.rsplit(',').next().unwrap();
            assert!(text.contains(option) && text.contains(value) && text.contains(accepted), "{text}");
        }
    }
}

//! What was found, as one value: the JSON contract `leaktrace.report/1`, and the only thing that views read.
//!
//! Keys may be added, never renamed or given another meaning. What is not known is `null`, never zero. Strings that come
//! from the target (names of processes, files and functions) stand here as they are; whoever shows them on a terminal
//! passes them through [`crate::view::safe`]. How the numbers come about is the business of `ledger` and `detect`.

use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use crate::scout::Reason;

/// The value of [`Report::schema`].
pub const SCHEMA: &str = "leaktrace.report/1";

/// One report: of an interval, or the final one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: String,
    pub tool: Tool,
    pub host: Host,
    /// When tracing started, RFC 3339.
    pub started_at: Timestamp,
    /// Seconds from the start of tracing to this report.
    pub duration_s: f64,
    /// Whether this is the last report of the run.
    #[serde(rename = "final")]
    pub is_final: bool,
    /// Why tracing ended; only the final report knows.
    pub ended: Option<Ended>,
    pub mode: Mode,
    /// Events read from the kernel since the start.
    pub events: u64,
    /// Events a second, over the interval that this report closes (the final report: over the whole run).
    pub events_per_s: Option<f64>,
    /// What was lost, by counter; only counters that are not zero.
    pub losses: BTreeMap<String, u64>,
    /// What was met that is no loss but explains numbers, such as failed allocations; only counters that are not zero.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
    /// What became of the heap blocks that were seen.
    #[serde(default)]
    pub accounts: Accounts,
    /// What leaktrace itself takes.
    #[serde(default)]
    pub memory: Memory,
    /// The program that leaktrace started, if it did.
    pub command: Option<Command>,
    /// Worst first, see [`Report::sort`].
    pub processes: Vec<Process>,
    /// Traced processes that have ended and are not listed one by one, summed by executable.
    #[serde(default)]
    pub ended_processes: Vec<EndedProcesses>,
    /// Processes that the kernel killed because memory ran out, the latest last, bounded.
    #[serde(default)]
    pub oom_kills: Vec<OomKill>,
    /// What is seen of the processes that are not traced; only where leaktrace chooses by itself whom to trace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<System>,
}

/// What became of the heap blocks whose allocation was seen: `allocated` is the sum of the others. Those whose record was lost before
/// are in [`Report::losses`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    /// Blocks that malloc, realloc and the like gave, and copies in forked children that are traced.
    pub allocated: u64,
    /// Live, those out of verdicts included.
    pub live: u64,
    /// Freed, resized into another, or gone with their process or its program.
    pub ended: u64,
    /// Left out because a cap was met.
    pub not_kept: u64,
}

/// Memory that leaktrace takes, and the most that it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Of the maps of its BPF programs; `null` where the kernel does not say.
    pub kernel_bytes: Option<u64>,
    /// `--kernel-memory`.
    pub kernel_cap_bytes: u64,
    /// Resident and its own, without files that are mapped; `null` where that could not be read.
    pub user_bytes: Option<u64>,
    /// `--max-memory`.
    pub user_cap_bytes: u64,
    /// Live heap blocks that are kept, and how many may be.
    pub blocks: u64,
    pub blocks_cap: u64,
    /// Call stacks that are kept, and how many may be.
    pub stacks: u64,
    pub stacks_cap: u64,
    /// Places in the code whose names are kept.
    pub names: u64,
}

/// The processes that are watched from afar, and what was decided about them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct System {
    /// Processes that are watched, the traced ones included.
    pub watched: u64,
    /// How many of them are traced.
    pub traced: u64,
    /// How many may be traced at a time; `null`: all.
    pub most_traced: Option<u64>,
    /// Those that are not traced: the fastest growing, then the largest.
    pub processes: Vec<Watched>,
    /// Who was traced or released, and why; the latest last, bounded.
    pub decisions: Vec<Decision>,
    /// Where processes touch new pages that grow without that a leak in them is known, the fastest growing first.
    #[serde(default)]
    pub growing: Vec<NewPages>,
    /// Processes that took the place of one that leaked or was larger than usual, the latest last, bounded. Known to the agent only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restarts: Vec<Restart>,
}

/// What became of the memory of a program that was started anew.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Restart {
    pub pid: u32,
    pub comm: String,
    pub exe: Option<String>,
    #[serde(flatten)]
    pub labels: Labels,
    /// When the process before it ended, and whether it leaked.
    pub at: Timestamp,
    pub leaked: bool,
    /// Resident memory of that at its end, and of this now.
    pub before_bytes: u64,
    pub now_bytes: u64,
    /// At which the program is steady; `null` where it never was.
    pub baseline_bytes: Option<u64>,
    /// Whether, half a minute after its start, it was no larger than it is when it is steady.
    pub back_to_baseline: bool,
}

/// What earlier runs of a program were like, by what the agent keeps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// Of the executable that runs.
    pub build_id: Option<String>,
    /// Resident memory at which it was steady, with which build, and when it was so last.
    pub steady_bytes: Option<u64>,
    pub steady_build_id: Option<String>,
    pub steady_at: Option<Timestamp>,
    /// The build before it, where that was steady and this one leaks.
    pub grew_since_build: Option<String>,
    /// The build before it, where that leaked as well.
    pub leaked_with_build: Option<String>,
    /// Of the process whose place this one took, at its end, if that leaked or was larger than usual.
    pub before_restart_bytes: Option<u64>,
    /// The same in a sentence, where there is something to say.
    pub remark: Option<String>,
}

/// Where a process touches new pages, by its page faults; evidence of what it grows by, not an account of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewPages {
    pub pid: u32,
    pub comm: String,
    /// Growth of its own pages.
    pub bytes_per_s: f64,
    /// Faults since it is looked at for this; where many come, one stands for several.
    pub faults: u64,
    /// The stacks with the most faults, bounded.
    pub stacks: Vec<PageStack>,
}

/// A call stack in which new pages were touched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PageStack {
    pub faults: u64,
    /// Of all faults of the process, 0 to 1.
    pub share: f64,
    /// How the stack ended, and why there if it is not complete.
    pub end: StackEnd,
    /// Innermost first.
    pub frames: Vec<Frame>,
}

/// A process that is watched from afar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watched {
    pub pid: u32,
    pub comm: String,
    pub exe: Option<String>,
    #[serde(flatten)]
    pub labels: Labels,
    pub rss: Rss,
}

/// What leaktrace decided about a process, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Seconds since the start.
    pub at_s: f64,
    pub pid: u32,
    pub comm: String,
    pub what: Decided,
    pub reason: Reason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decided {
    /// To trace its allocator.
    Promoted,
    /// To go on watching it from afar.
    Released,
}

/// Where a process belongs, as far as its cgroups and namespaces tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// The container's id, and whose it is: `docker`, `containerd`, ...
    #[serde(default)]
    pub container: Option<String>,
    #[serde(default)]
    pub container_runtime: Option<String>,
    /// Of the Kubernetes pod.
    #[serde(default)]
    pub pod_uid: Option<String>,
    /// The systemd unit.
    #[serde(default)]
    pub unit: Option<String>,
    /// Its pid in its own pid namespace, where that is not the host's.
    #[serde(default)]
    pub pid_in_namespace: Option<u32>,
    /// What the Kubernetes API server says of the container; only the agent asks it.
    #[serde(default)]
    pub pod: Option<String>,
    #[serde(default)]
    pub namespace: Option<String>,
    /// The container's name in its pod, and the image that the pod asks for.
    #[serde(default)]
    pub container_name: Option<String>,
    #[serde(default)]
    pub image: Option<String>,
    /// The node's name.
    #[serde(default)]
    pub node: Option<String>,
}

impl From<crate::labels::Labels> for Labels {
    fn from(labels: crate::labels::Labels) -> Self {
        let (container, runtime) =
            labels.container.map(|container| (container.id, container.runtime.name().to_owned())).unzip();
        Self {
            container,
            container_runtime: runtime,
            pod_uid: labels.pod,
            unit: labels.unit,
            pid_in_namespace: labels.inner_pid,
            ..Self::default()
        }
    }
}

/// Traced processes of one executable that have ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EndedProcesses {
    /// Its path, or where that is not known its name; empty: many executables together.
    pub exe: String,
    pub count: u64,
    /// How many of them leaked.
    pub leaking: u64,
    /// Bytes that they had allocated and not freed when they ended.
    pub live_bytes_at_end: u64,
    /// Of the one that was largest.
    pub largest_rss_bytes: u64,
}

/// A traced or watched process that the kernel killed because memory ran out: of its cgroup, or of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OomKill {
    pub at: Timestamp,
    /// Seconds after the start of tracing.
    pub at_s: f64,
    pub pid: u32,
    pub comm: String,
    pub exe: Option<String>,
    #[serde(flatten)]
    pub labels: Labels,
    /// As it was last seen, at most some seconds before.
    pub rss: Rss,
    /// What was last known of it, with its call stacks, where it was traced.
    pub process: Option<Box<Process>>,
}

/// What wrote the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    pub name: String,
    pub version: String,
}

impl Default for Tool {
    fn default() -> Self {
        Self { name: "leaktrace".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

/// Where it ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    pub hostname: Option<String>,
    /// The kernel's release, such as `6.12.1-amd64`.
    pub kernel: Option<String>,
    /// The machine, such as `x86_64`.
    pub arch: Option<String>,
    /// Processors that are online.
    pub cpus: Option<u32>,
    pub memory_bytes: Option<u64>,
}

/// Why tracing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// `--duration` was over.
    Duration,
    /// Every traced process has ended.
    TargetsExited,
    /// A signal, or the user asked the terminal view to end.
    Interrupted,
    /// Nobody reads the reports any more.
    OutputClosed,
}

/// How allocations were seen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mode {
    pub sampling: Sampling,
    /// Mean bytes between samples; `null` when exact.
    pub interval_bytes: Option<u64>,
    pub unwinder: Unwinder,
    /// Bytes that unwind tables take in the kernel, and how many they may; `null` without tables.
    pub unwind_table_bytes: Option<u64>,
    pub unwind_memory_bytes: Option<u64>,
}

impl Default for Mode {
    fn default() -> Self {
        Self {
            sampling: Sampling::Exact,
            interval_bytes: None,
            unwinder: Unwinder::Fp,
            unwind_table_bytes: None,
            unwind_memory_bytes: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// Every allocation.
    Exact,
    /// A part of them, chosen by bytes.
    Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unwinder {
    /// By unwind tables.
    Tables,
    /// By the chain of frame pointers.
    Fp,
}

/// The program of `leaktrace -- COMMAND`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Command {
    pub args: Vec<String>,
    pub pid: u32,
    /// Its exit status; `null` while it runs or when a signal ended it.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

/// A traced process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub comm: String,
    /// Path of the executable, as the process sees it.
    pub exe: Option<String>,
    pub cgroup: Option<String>,
    #[serde(flatten)]
    pub labels: Labels,
    /// Why it is traced, where leaktrace chose it.
    #[serde(default)]
    pub reason: Option<Reason>,
    pub verdict: Verdict,
    /// Whether something was lost that the verdict, or the numbers, could be different with. What may have been freed unseen is out of
    /// both.
    #[serde(default)]
    pub affected_by_loss: bool,
    /// What earlier runs were like; known to the agent only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
    /// A sentence more about the verdict, where there is something to say that the numbers do not show.
    pub hint: Option<String>,
    /// Mean bytes between samples at the time of the report; `null`: every allocation is followed.
    #[serde(default)]
    pub interval_bytes: Option<u64>,
    /// What tracing costs it, and what is done to keep that within the budget; `null` without a budget.
    #[serde(default)]
    pub overhead: Option<Overhead>,
    /// Bytes allocated while traced and not freed.
    pub live_bytes: u64,
    pub live_count: u64,
    /// 95 % intervals of the two, where some of it is estimated from samples. That of the count is too narrow where most blocks are
    /// so small (a hundredth of the interval) that few of them were seen.
    #[serde(default)]
    pub live_bytes_ci95: Option<[u64; 2]>,
    #[serde(default)]
    pub live_count_ci95: Option<[u64; 2]>,
    pub rss: Rss,
    /// Growth of the growing stacks over the growth of RSS; `null` where RSS does not grow or no stack does.
    pub explained_growth_ratio: Option<f64>,
    /// The lowest memory limit that applies: of its cgroups, or of the host.
    pub memory_limit_bytes: Option<u64>,
    /// Whose limit that is: the cgroup's path; `null`: the host's.
    #[serde(default)]
    pub memory_limit_of: Option<String>,
    /// What is taken of it, by all who share it, without what the kernel can drop at once; looked at only where the process grows.
    #[serde(default)]
    pub memory_used_bytes: Option<u64>,
    /// Seconds until the limit is met, should it go on like this: what is left of it over the growth of those traced processes that share
    /// it.
    pub seconds_to_limit: Option<f64>,
    pub allocators: Vec<Allocator>,
    /// How it ended, if it did.
    pub ended: Option<ProcessEnd>,
    /// Call stacks that hold live memory or grow, also those that are not listed below.
    pub stacks_seen: u64,
    /// Call stacks that grow, also those that are not listed below.
    pub growing_stacks: u64,
    /// Growth of all of these, bytes a second.
    pub growing_bytes_per_s: Option<f64>,
    /// Worst first, see [`Report::sort`].
    pub stacks: Vec<Stack>,
}

/// What tracing costs a process, and how it is watched for that.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Overhead {
    /// How much it may cost, and of what: of the processor time of the `process`, or of one processor if it takes less and there is time to spare; or of one
    /// `processor`, which all traced processes share.
    pub budget_percent: f64,
    pub of: String,
    /// How much it costs now: hits of breakpoints, by what a hit costs on this host.
    pub measured_percent: f64,
    /// The share of the time in which breakpoints stand; 1 unless it is watched in windows, or not any more.
    pub duty: f64,
    /// Mean bytes between samples; `null`: every allocation is followed while breakpoints stand.
    pub interval_bytes: Option<u64>,
    /// `exact`, `sampled`, `windows` or `released`.
    pub state: String,
    /// Why it is in this state.
    pub reason: String,
}

/// Verdict on a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// At least one call stack leaks.
    Leaking,
    /// Not enough seen yet.
    Warming,
    /// It grew, and stopped.
    Plateau,
    /// It rose and came back.
    Spike,
    /// It does not grow.
    Stable,
}

/// Resident memory of a process over the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rss {
    pub first_bytes: Option<u64>,
    pub last_bytes: Option<u64>,
    pub growth_bytes_per_s: Option<f64>,
}

/// An allocator that is traced in a process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Allocator {
    /// `glibc`, `musl`, `jemalloc`, ...
    pub family: String,
    /// The file that holds it, as the process sees it.
    pub path: String,
    pub build_id: Option<String>,
    /// The functions that are traced.
    pub functions: Vec<String>,
}

/// How a traced process ended. For a process that is not leaktrace's child the status is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessEnd {
    /// Seconds after the start of tracing.
    pub at_s: f64,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
}

/// A call stack that allocates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the report of its own")]
pub struct Stack {
    /// The same for the same return addresses of the same process; a string, since JSON numbers end at 2^53.
    pub id: String,
    pub verdict: StackVerdict,
    pub resource: Resource,
    /// The function that was called, such as `malloc`.
    pub op: Option<String>,
    pub live_bytes: u64,
    pub live_count: u64,
    /// Bytes allocated since the start of tracing.
    pub allocated_bytes: u64,
    /// Blocks allocated since the start of tracing, an estimate where they are sampled; older reports do not have it.
    #[serde(default)]
    pub allocated_count: Option<u64>,
    /// Bytes of these that were freed again.
    pub freed_bytes: u64,
    /// 95 % intervals of what is live, allocated and freed, where they are estimated from samples.
    #[serde(default)]
    pub live_bytes_ci95: Option<[u64; 2]>,
    #[serde(default)]
    pub live_count_ci95: Option<[u64; 2]>,
    #[serde(default)]
    pub allocated_bytes_ci95: Option<[u64; 2]>,
    #[serde(default)]
    pub freed_bytes_ci95: Option<[u64; 2]>,
    /// Whether what it holds is estimated from short windows in which the process is watched: then all of this is of the time since
    /// the first window, and what was allocated before is not known.
    #[serde(default)]
    pub by_windows: bool,
    /// Age of the oldest live block, seconds.
    pub oldest_age_s: Option<f64>,
    pub growth: Growth,
    /// Whether blocks of it may have been freed unseen, and are out of the numbers; or allocations were lost, whose stacks nobody
    /// knows. The confidence is the less for it.
    #[serde(default)]
    pub affected_by_loss: bool,
    /// Live bytes over time: (seconds since the start, bytes), in order of time.
    pub series: Vec<(f64, u64)>,
    /// Whether the outermost frame was reached.
    pub complete: bool,
    /// How the stack ended, and why there if it is not complete.
    pub end: StackEnd,
    /// Whether some frames were found by frame pointers although tables are in use: generated code, or code without
    /// unwind information.
    pub by_frame_pointers: bool,
    /// Innermost first.
    pub frames: Vec<Frame>,
}

/// Verdict on a call stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StackVerdict {
    Growing,
    Warming,
    Plateau,
    Spike,
    Stable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    Heap,
    Mmap,
}

/// How fast a stack's live bytes grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    pub bytes_per_s: Option<f64>,
    /// The 95 % interval of `bytes_per_s`.
    pub ci95: Option<[f64; 2]>,
    /// How sure it is that the stack grows, 0 to 1.
    pub confidence: Option<f64>,
    /// Windows of time that this rests on.
    pub windows: u32,
}

/// How a call stack ends, and why there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StackEnd {
    Complete,
    TooDeep,
    BadRead,
    NoFramePointer,
    NoTable,
    NoRow,
    /// A signal interrupted code of which only the unwind rows for calls were loaded then.
    Interrupted,
    /// The kernel side told a reason that this version does not know.
    Unknown,
    /// The record with the addresses was lost.
    Lost,
}

impl From<crate::decode::StackEnd> for StackEnd {
    fn from(end: crate::decode::StackEnd) -> Self {
        use crate::decode::StackEnd as From;
        match end {
            From::Complete => Self::Complete,
            From::TooDeep => Self::TooDeep,
            From::BadRead => Self::BadRead,
            From::NoFramePointer => Self::NoFramePointer,
            From::NoTable => Self::NoTable,
            From::NoRow => Self::NoRow,
            From::Interrupted => Self::Interrupted,
            From::Unknown => Self::Unknown,
        }
    }
}

/// One frame of a call stack.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Frame {
    /// Demangled; `null` where there is no name, then `reason` says why.
    pub function: Option<String>,
    /// Path of the file that the code is in, as the process sees it.
    pub module: Option<String>,
    pub build_id: Option<String>,
    /// Offset of the code in that file, bytes.
    pub offset: Option<u64>,
    /// Source file.
    pub file: Option<String>,
    pub line: Option<u32>,
    /// Whether the function was inlined into the next outer frame.
    pub inlined: bool,
    pub language: Option<String>,
    /// Why there is no function name.
    pub reason: Option<String>,
}

impl Report {
    /// A report without processes, of a run that started now.
    pub fn new(mode: Mode, host: Host) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            tool: Tool::default(),
            host,
            started_at: Timestamp::now(),
            duration_s: 0.0,
            is_final: false,
            ended: None,
            mode,
            events: 0,
            events_per_s: None,
            losses: BTreeMap::new(),
            counters: BTreeMap::new(),
            accounts: Accounts::default(),
            memory: Memory::default(),
            command: None,
            processes: Vec::new(),
            ended_processes: Vec::new(),
            oom_kills: Vec::new(),
            system: None,
        }
    }

    /// Whether a process leaks: what `--fail-on-leak` asks.
    pub fn leaks(&self) -> bool {
        self.processes.iter().any(|process| process.verdict == Verdict::Leaking)
    }

    /// Puts the worst first: processes by verdict, then growth, then live bytes; growing stacks by growth, before the
    /// others by live bytes. The same report always comes out in the same order.
    pub fn sort(&mut self) {
        for process in &mut self.processes {
            process.stacks.sort_by(Stack::worse);
        }
        self.processes.sort_by(|a, b| {
            let growth = |p: &Process| p.growing_bytes_per_s.unwrap_or(0.0);
            a.verdict
                .cmp(&b.verdict)
                .then_with(|| growth(b).total_cmp(&growth(a)))
                .then_with(|| b.live_bytes.cmp(&a.live_bytes))
                .then_with(|| a.pid.cmp(&b.pid))
        });
    }
}

impl Stack {
    /// Orders stacks worst first.
    pub fn worse(&self, other: &Self) -> Ordering {
        let grows = |stack: &Self| stack.verdict == StackVerdict::Growing;
        let rate = |stack: &Self| if grows(stack) { stack.growth.bytes_per_s.unwrap_or(0.0) } else { 0.0 };
        Reverse(grows(self))
            .cmp(&Reverse(grows(other)))
            .then_with(|| rate(other).total_cmp(&rate(self)))
            .then_with(|| other.live_bytes.cmp(&self.live_bytes))
            .then_with(|| self.id.cmp(&other.id))
    }
}

/// Made-up reports for the tests of the views.
#[cfg(test)]
pub mod sample;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Every key of the contract is there under its name, with the type that it promises.
    #[test]
    fn keys_of_the_contract() {
        let json: Value = serde_json::to_value(sample::leaking()).unwrap();
        assert_eq!(json["schema"], "leaktrace.report/1");
        for key in ["tool", "host", "started_at", "duration_s", "mode", "losses", "processes"] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(json["started_at"], "2026-01-02T03:04:05Z");
        assert_eq!(json["mode"]["sampling"], "exact");
        assert_eq!(json["mode"]["interval_bytes"], Value::Null);
        assert_eq!(json["mode"]["unwinder"], "fp");
        assert!(json["losses"].as_object().unwrap().values().all(|n| n.as_u64() > Some(0)));
        let process = &json["processes"][0];
        assert_eq!(process["verdict"], "leaking");
        for key in [
            "pid",
            "comm",
            "exe",
            "cgroup",
            "verdict",
            "live_bytes",
            "live_count",
            "explained_growth_ratio",
            "memory_limit_bytes",
            "seconds_to_limit",
            "allocators",
            "stacks",
        ] {
            assert!(process.get(key).is_some(), "{key}");
        }
        for key in ["first_bytes", "last_bytes", "growth_bytes_per_s"] {
            assert!(process["rss"].get(key).is_some(), "{key}");
        }
        let stack = &process["stacks"][0];
        assert_eq!(stack["verdict"], "growing");
        assert_eq!(stack["resource"], "heap");
        for key in ["id", "live_bytes", "live_count", "allocated_bytes", "freed_bytes", "oldest_age_s", "complete"] {
            assert!(stack.get(key).is_some(), "{key}");
        }
        for key in ["bytes_per_s", "confidence", "windows"] {
            assert!(stack["growth"][key].is_number(), "{key}");
        }
        assert_eq!(stack["growth"]["ci95"].as_array().unwrap().len(), 2);
        assert_eq!(stack["series"][0].as_array().unwrap().len(), 2);
        let frame = &stack["frames"][0];
        for key in ["function", "module", "build_id", "offset", "file", "line", "inlined", "language"] {
            assert!(frame.get(key).is_some(), "{key}");
        }
    }

    /// What is estimated has its interval under keys of its own, and what is not has null there.
    #[test]
    fn keys_of_estimates() {
        let [exact, sampled] =
            [sample::leaking(), sample::sampled()].map(|report| serde_json::to_value(report).unwrap());
        assert_eq!(
            (&sampled["mode"]["sampling"], &sampled["mode"]["interval_bytes"]),
            (&"bytes".into(), &524_288.into())
        );
        assert_eq!(sampled["processes"][0]["interval_bytes"], 524_288);
        assert_eq!(exact["processes"][0]["interval_bytes"], Value::Null);
        let numbers = ["live_bytes", "live_count", "allocated_bytes", "freed_bytes"];
        let of = |report: &Value, key: &str| {
            let process = &report["processes"][0];
            let all = [process, &process["stacks"][0]].map(|part| part.get(key).cloned());
            all.into_iter().flatten().collect::<Vec<_>>()
        };
        for key in numbers.map(|number| format!("{number}_ci95")) {
            let (of_exact, of_sampled) = (of(&exact, &key), of(&sampled, &key));
            assert!(!of_exact.is_empty() && of_exact.iter().all(Value::is_null), "{key}");
            assert!(of_sampled.iter().all(|interval| interval.as_array().is_some_and(|ends| ends.len() == 2)), "{key}");
        }
    }

    /// A report survives being written and read again, and what is unknown stays unknown.
    #[test]
    fn round_trip() {
        for report in [sample::leaking(), sample::steady(), sample::warming(), sample::sampled()] {
            let text = serde_json::to_string(&report).unwrap();
            assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
        }
    }

    /// A newer version's keys do not keep an older one from reading its report.
    #[test]
    fn unknown_keys_are_skipped() {
        let mut json = serde_json::to_value(sample::leaking()).unwrap();
        json["processes"][0]["of_the_future"] = 1.into();
        assert!(serde_json::from_value::<Report>(json).is_ok());
    }

    /// Growing stacks come first, fastest first; the others by live bytes, whatever slope they have.
    #[test]
    fn worst_first() {
        let mut report = sample::leaking();
        let stacks = &mut report.processes[0].stacks;
        stacks.reverse();
        stacks[0].growth.bytes_per_s = Some(1e12);
        report.sort();
        let stacks = &report.processes[0].stacks;
        let growing = stacks.iter().take_while(|s| s.verdict == StackVerdict::Growing).count();
        assert_eq!(growing, 2);
        assert!(stacks[0].growth.bytes_per_s > stacks[1].growth.bytes_per_s);
        assert!(stacks[growing..].is_sorted_by(|a, b| a.live_bytes >= b.live_bytes));
        assert!(stacks[growing..].iter().all(|s| s.verdict != StackVerdict::Growing));
    }

    /// Only a leaking process makes `--fail-on-leak` fail.
    #[test]
    fn fail_on_leak_asks_for_leaking() {
        assert!(sample::leaking().leaks());
        assert!(!sample::steady().leaks());
        assert!(!sample::warming().leaks());
    }
}

//! What is attached to the target: how each tool is started, known to be attached, read and ended.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use leaktrace_tests::{PATIENCE, host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often a tool is asked whether it is there, or gone.
const POLL: Duration = Duration::from_millis(2);
/// A tool that has set no further breakpoint for so long has set them all.
const SETTLED: Duration = Duration::from_millis(500);

/// What a target is measured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    Nothing,
    /// Empty programs at the allocator's functions alone.
    FloorAllocator,
    /// And where mapping calls are watched.
    Floor,
    /// The same, but for the returns: what a call costs that is not sampled.
    FloorEntry,
    HeapOnly,
    Leaktrace,
    FramePointers,
    /// One in 512 KiB, on average.
    Sampled,
    /// As it is by default.
    Auto,
    Memleak,
}

impl Row {
    pub const ALL: [Self; 10] = [
        Self::Nothing,
        Self::FloorAllocator,
        Self::Floor,
        Self::FloorEntry,
        Self::HeapOnly,
        Self::Leaktrace,
        Self::FramePointers,
        Self::Sampled,
        Self::Auto,
        Self::Memleak,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing attached",
            Self::FloorAllocator => "empty, allocator only",
            Self::Floor => "empty programs",
            Self::FloorEntry => "empty, entries only",
            Self::HeapOnly => "leaktrace, heap only",
            Self::Leaktrace => "leaktrace, exact",
            Self::FramePointers => "leaktrace, --unwind fp",
            Self::Sampled => "leaktrace, one in 512K",
            Self::Auto => "leaktrace, auto",
            Self::Memleak => "bcc memleak",
        }
    }

    /// In JSON.
    pub fn key(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::FloorAllocator => "floor_allocator",
            Self::Floor => "floor",
            Self::FloorEntry => "floor_entry",
            Self::HeapOnly => "leaktrace_heap",
            Self::Leaktrace => "leaktrace",
            Self::FramePointers => "leaktrace_fp",
            Self::Sampled => "leaktrace_512k",
            Self::Auto => "leaktrace_auto",
            Self::Memleak => "memleak",
        }
    }

    /// Those that leaktrace reports of.
    pub fn is_leaktrace(self) -> bool {
        self.is_exact() || matches!(self, Self::Sampled | Self::Auto)
    }

    /// Those of them that follow every call, so that what they saw can be counted.
    pub fn is_exact(self) -> bool {
        matches!(self, Self::HeapOnly | Self::Leaktrace | Self::FramePointers)
    }

    /// The empty programs at the same places.
    pub fn floor(self) -> Self {
        match self {
            Self::HeapOnly => Self::FloorAllocator,
            Self::Sampled => Self::FloorEntry,
            _ => Self::Floor,
        }
    }
}

/// Where the tools are.
pub struct Tools {
    pub leaktrace: PathBuf,
    pub floor: PathBuf,
    /// Or why there is none.
    pub memleak: Result<PathBuf, String>,
}

impl Tools {
    pub fn has(&self, row: Row) -> bool {
        row != Row::Memleak || self.memleak.is_ok()
    }

    /// Attaches to `pid` and waits until all breakpoints are set; `None` for nothing.
    pub fn attach(&self, row: Row, pid: u32) -> Result<Option<Tracer>> {
        let Some(mut tracer) = self.start(row, pid)? else { return Ok(None) };
        tracer.wait_attached()?;
        Ok(Some(tracer))
    }

    /// Starts a tool on `pid` without waiting for it; `None` for nothing.
    pub fn start(&self, row: Row, pid: u32) -> Result<Option<Tracer>> {
        let pid_text = pid.to_string();
        let mut command;
        match row {
            Row::Nothing => return Ok(None),
            Row::FloorAllocator | Row::Floor | Row::FloorEntry => {
                command = Command::new(&self.floor);
                command.arg(&pid_text);
                if row == Row::FloorAllocator {
                    command.arg("allocator");
                } else if row == Row::FloorEntry {
                    command.arg("entries");
                }
            }
            Row::HeapOnly | Row::Leaktrace | Row::FramePointers | Row::Sampled | Row::Auto => {
                command = Command::new(&self.leaktrace);
                let sample = match row {
                    Row::Sampled => "512K",
                    Row::Auto => "auto",
                    _ => "exact",
                };
                command.args(["--sample", sample, "--format", "json", "-p", &pid_text]);
                if row != Row::Auto {
                    command.args(["--max-overhead", "off"]);
                }
                match row {
                    Row::HeapOnly => command.args(["--resource", "heap"]),
                    Row::FramePointers => command.args(["--unwind", "fp"]),
                    _ => &mut command,
                };
            }
            Row::Memleak => {
                let memleak = self.memleak.as_ref().map_err(|why| anyhow::anyhow!("{why}"))?;
                command = Command::new(memleak);
                // Its default interval, which is leaktrace's too. By default it does not print what is younger than half a second,
                // and so not the block that each thread holds at the end.
                command.args(["-p", &pid_text, "--older", "1", "5"]);
            }
        }
        Tracer::start(command, pid).map(Some)
    }
}

/// A tool that is attached; killed when dropped.
pub struct Tracer {
    child: Child,
    /// What reads it to its end, ends with this program.
    _stdin: Option<ChildStdin>,
    output: File,
    errors: File,
    target: u32,
    started: Instant,
    /// Breakpoints that it has set in the target.
    pub breakpoints: usize,
    /// From its start to the last breakpoint.
    pub attach: Duration,
}

/// How a tool ended.
pub struct Ended {
    /// From SIGINT until no breakpoint was left in the target.
    pub detach: Duration,
    pub output: String,
}

impl Tracer {
    fn start(mut command: Command, target: u32) -> Result<Self> {
        let output = tempfile::tempfile().context("failed to create a temporary file")?;
        let errors = tempfile::tempfile().context("failed to create a temporary file")?;
        command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(errors.try_clone()?);
        // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
        unsafe {
            // However this program ends, nothing stays attached.
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let started = Instant::now();
        let mut child =
            command.spawn().with_context(|| format!("failed to start {}", command.get_program().display()))?;
        let stdin = child.stdin.take();
        Ok(Self { child, _stdin: stdin, output, errors, target, started, breakpoints: 0, attach: Duration::ZERO })
    }

    fn wait_attached(&mut self) -> Result<()> {
        loop {
            let found = host::breakpoints(self.target)?;
            let now = self.started.elapsed();
            if found != self.breakpoints {
                (self.breakpoints, self.attach) = (found, now);
            }
            if self.breakpoints > 0 && now > self.attach + SETTLED {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status} before it was attached: {}", self.read_errors());
            }
            if now > PATIENCE {
                bail!("it was not attached within {PATIENCE:?}: {}", self.read_errors());
            }
            sleep(POLL);
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// User and system time that it has used.
    pub fn cpu(&self) -> Result<Duration> {
        host::cpu_time(self.pid())
    }

    /// The most resident memory that it has had, in bytes.
    pub fn peak_rss(&self) -> Result<u64> {
        host::peak_rss(self.pid())
    }

    /// Ends it as Ctrl-C does.
    pub fn finish(mut self) -> Result<Ended> {
        let start = Instant::now();
        kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGINT).context("failed to send SIGINT")?;
        while host::breakpoints(self.target)? > 0 {
            if start.elapsed() > PATIENCE {
                bail!("its breakpoints were not gone within {PATIENCE:?} after SIGINT");
            }
            sleep(POLL);
        }
        let detach = start.elapsed();
        let status = self.wait(start)?;
        // memleak and leaktrace end by themselves, the empty programs by the signal.
        if status.code().is_some_and(|code| code != 0) {
            bail!("it ended with {status}: {}", self.read_errors());
        }
        Ok(Ended { detach, output: read_whole(&mut self.output) })
    }

    fn wait(&mut self, start: Instant) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > PATIENCE {
                bail!("it did not end within {PATIENCE:?} after SIGINT");
            }
            sleep(POLL);
        }
    }

    fn read_errors(&mut self) -> String {
        read_whole(&mut self.errors).trim().to_owned()
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a child has written to a file of ours.
fn read_whole(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // Only for messages, and for a report whose parser says what is wrong with it.
    let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

//! One boot of one kernel: qemu is started, what the guest prints is passed on, and read for what the tests said.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::arch::Arch;
use super::debian::Suite;
use super::guest::{DOCTOR_LINE, END_LINE, FILTER_PARAMETER, KERNEL_LINE};

/// The suite whose emulator is used.
const SUITE: &str = "trixie";

/// Two, so that programs run at the same time. More would only share the host's.
const PROCESSORS: &str = "2";

/// For the initramfs, which is memory too, and for what is traced.
const MEMORY: &str = "768";

/// The emulator, unpacked.
pub struct Emulator {
    root: PathBuf,
    arch: Arch,
}

/// What a boot came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Each test that was started; `None` where it did not come to an end.
    pub tests: BTreeMap<String, Option<bool>>,
    /// Whether all that were announced have ended, and init after them.
    pub complete: bool,
    /// What `leaktrace doctor` says of the [`MEANS`], in its order.
    pub means: BTreeMap<&'static str, String>,
    /// What the kernel complained of.
    pub complaints: Vec<String>,
    /// From the start of qemu to the first test, and to the end.
    pub boot: Option<Duration>,
    pub total: Duration,
}

impl Outcome {
    /// Whether everything ran and all of it was right.
    pub fn is_good(&self) -> bool {
        self.complete
            && self.complaints.is_empty()
            && !self.tests.is_empty()
            && self.tests.values().all(|result| *result == Some(true))
    }

    /// Takes in a line of the guest.
    fn read(&mut self, line: &str, since: Duration) {
        if let Some(said) = line.strip_prefix(DOCTOR_LINE) {
            self.means.extend(means(said));
        } else if let Some(complaint) = line.strip_prefix(KERNEL_LINE) {
            self.complaints.push(complaint.to_owned());
        } else if line.contains("Kernel panic") {
            self.complaints.push(line.to_owned());
        } else if line.starts_with(END_LINE) {
            self.complete = true;
        } else if line.starts_with("running ") && self.boot.is_none() {
            self.boot = Some(since);
        } else if let Some((name, result)) = test_result(line) {
            self.tests.insert(name.to_owned(), result);
        }
    }
}

/// What `leaktrace doctor` names that differs between kernels.
pub const MEANS: [&str; 5] = ["probe links", "mapping calls", "stack walk", "ring buffer", "thread table"];

/// `STATUS NAME  DETAIL`, as doctor prints it, for one of the [`MEANS`]; of the detail what comes before the explanation.
fn means(line: &str) -> Option<(&'static str, String)> {
    let (_, rest) = line.split_once(' ')?;
    let rest = rest.trim_start();
    let name = MEANS.into_iter().find(|name| rest.starts_with(name))?;
    let detail = rest.strip_prefix(name)?.split([',', ';', '(']).next().unwrap_or_default().trim();
    Some((name, detail.to_owned()))
}

/// `test NAME ... ok`, as Rust's test harness prints it; without the result while it runs.
fn test_result(line: &str) -> Option<(&str, Option<bool>)> {
    let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let result = match result.trim() {
        "ok" => Some(true),
        "FAILED" => Some(false),
        _ => None,
    };
    name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':').then_some((name, result))
}

/// Ends qemu, whatever happens to the thread that reads it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Emulator {
    pub fn bring(cache: &Path, arch: Arch) -> Result<Self> {
        let root = cache.join(format!("emulator-{}", arch.name()));
        Suite::new(cache, SUITE, Arch::host())?.unpack(&[arch.emulator_package()], &[], &root)?;
        Ok(Self { root, arch })
    }

    /// qemu by its own libc, which need not be the host's.
    fn command(&self) -> Command {
        let host = Arch::host();
        let within = |path: &str| self.root.join(path);
        let libraries = ["usr/lib", "lib"].map(|folder| within(&format!("{folder}/{}", host.triplet())));
        let libraries = libraries.map(|folder| folder.display().to_string()).join(":");
        let mut command = Command::new("nice");
        command
            .args(["-n", "10"])
            .arg(within(&format!("usr/{}", host.interpreter())))
            .args(["--library-path", &libraries])
            .arg(within(&format!("usr/bin/qemu-system-{}", self.arch.name())));
        for folder in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(within(folder));
        }
        command
    }

    /// Boots `kernel` and passes the guest's lines to `each`, until it turns itself off or `limit` is over.
    pub fn run(
        &self,
        kernel: &Path,
        initramfs: &Path,
        filters: &[String],
        limit: Duration,
        mut each: impl FnMut(&str),
    ) -> Result<Outcome> {
        let (console, own) = (self.arch.console(), self.arch.parameters());
        let parameters = format!("console={console} panic=-1 quiet {own} {FILTER_PARAMETER}={}", filters.join(","));
        let mut command = self.command();
        command
            .args(self.arch.machine())
            // Never the host's own virtualisation, which these kernels do not all start under.
            .args(["-accel", "tcg,thread=multi", "-smp", PROCESSORS, "-m", MEMORY])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &parameters])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let start = Instant::now();
        let mut qemu = Running(command.spawn().context("failed to start qemu")?);
        let output = qemu.0.stdout.take().context("failed to take qemu's standard output")?;
        let (sender, lines) = channel();
        let reader = thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
                line.clear();
                if sender.send(text).is_err() {
                    break;
                }
            }
        });
        let mut outcome = Outcome::default();
        loop {
            match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
                Ok(line) => {
                    outcome.read(&line, start.elapsed());
                    each(&line);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    each(&format!("vm: ended after {} s, which is the limit", limit.as_secs()));
                    break;
                }
            }
        }
        outcome.total = start.elapsed();
        drop(qemu);
        // The pipe has ended with qemu.
        let _ = reader.join();
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(lines: &[&str]) -> Outcome {
        let mut outcome = Outcome::default();
        for line in lines {
            outcome.read(line, Duration::from_secs(1));
        }
        outcome
    }

    /// What the harness and init print comes to a result for each test.
    #[test]
    fn lines_of_a_good_run() {
        let good = outcome(&[
            "vm: doctor: ok       probe links                session (one link a file, entry and return)",
            "running 2 tests",
            "test one ... ok",
            "test two ... ok",
            "vm: the suite has ended with 0",
        ]);
        assert!(good.is_good(), "{good:?}");
        assert_eq!(good.means.get("probe links").map(String::as_str), Some("session"));
    }

    /// What doctor says is cut where it begins to explain, and its advice is no answer.
    #[test]
    fn means_of_doctor() {
        let line = "warn     probe links     perf events, one a place; attaching takes longer";
        assert_eq!(means(line), Some(("probe links", "perf events".to_owned())));
        assert_eq!(
            means("ok       ring buffer     our own (atomic operations)"),
            Some(("ring buffer", "our own".to_owned()))
        );
        assert_eq!(means("                         -> Linux 6.6 has multi-uprobe links, 6.13 session links"), None);
        assert_eq!(means("ok       kernel          5.10"), None);
    }

    /// A failed test, one that did not end, a kernel that complains, and a machine that stopped are each no good run.
    #[test]
    fn lines_of_bad_runs() {
        let end = "vm: the suite has ended with 0";
        for lines in [
            &["test one ... FAILED", end][..],
            &["test one ... ok", "test two ... ", end],
            &["test one ... ok", "vm: kernel: WARNING: CPU: 0", end],
            &["test one ... ok"],
            &[end],
            &["test one ... ok", "Kernel panic - not syncing: Attempted to kill init!", end],
        ] {
            assert!(!outcome(lines).is_good(), "{lines:?}");
        }
    }

    /// A line of a test's own output is not taken for a result.
    #[test]
    fn other_lines() {
        assert_eq!(test_result("test a::b ... ok"), Some(("a::b", Some(true))));
        assert_eq!(test_result("test result: ok. 14 passed; 0 failed"), None);
        assert_eq!(test_result("the test one ... ok"), None);
        assert_eq!(test_result("test of something ... ok"), None);
    }
}

//! Without root: by capabilities alone, and what is kept of root's rights while tracing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{Fixture, Leaktrace, Program, Session, host, live_in, patience, site, summary};
use tempfile::TempDir;

/// A user that no process has, so that only capabilities open the way to others' processes.
const NOBODY: &str = "64999";

/// `CAP_SYS_ADMIN` and what else is kept (`linux/capability.h`).
const SYS_ADMIN: u64 = 1 << 21;
const DAC_READ_SEARCH: u64 = 1 << 2;
const KEPT: u64 = 1 << 40 | 1 << 39 | 1 << 38 | 1 << 19 | DAC_READ_SEARCH;

/// leaktrace where any user can start it.
struct Copy {
    folder: TempDir,
}

impl Copy {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let mut command = Leaktrace::new()?;
        let program = PathBuf::from(command.command().get_program());
        let copy = folder.path().join("leaktrace");
        fs::copy(program, &copy).context("failed to copy leaktrace")?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok(Self { folder })
    }

    /// It by another user who has these capabilities and no others.
    fn command(&self, setpriv: &Path, capabilities: &str) -> Result<Leaktrace> {
        let mut command = Leaktrace::new()?;
        *command.command() = Command::new(setpriv);
        let sets = format!("-all,{capabilities}");
        let command = command
            .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"])
            .args(["--inh-caps", &sets, "--ambient-caps", &sets, "--bounding-set", &sets])
            .arg(self.folder.path().join("leaktrace"));
        Ok(command.piped())
    }
}

/// Another user's process is traced by capabilities alone, exactly; also one whose program was deleted, with those for deleted files and
/// without.
#[test]
fn capabilities_instead_of_root() -> Result<()> {
    const NAME: &str = "capabilities_instead_of_root";
    let Some(setpriv) = host::program(NAME, "setpriv").filter(|_| host::can_trace(NAME)) else { return Ok(()) };
    let copy = Copy::new()?;
    let program = Program::c("allocators").build()?;
    let deleted = copy.folder.path().join("deleted");
    let few = "+bpf,+perfmon,+sys_ptrace";
    let more = "+bpf,+perfmon,+sys_ptrace,+checkpoint_restore,+dac_read_search";
    for (program, capabilities) in [(&program, few), (&deleted, few), (&deleted, more)] {
        if program == &deleted {
            fs::copy(Program::c("allocators").build()?, &deleted)?;
        }
        let mut fixture = Fixture::builder(program).start()?;
        if program == &deleted {
            fs::remove_file(&deleted)?;
        }
        let pid = fixture.pid().to_string();
        let args = ["--format", "jsonl", "--top", "1000", "--interval", "200ms", "-p", &pid];
        let session = Session::attached(copy.command(&setpriv, capabilities)?.args(args).spawn()?)?;
        for command in ["leak malloc 21 1001", "churn calloc 300 77", "grow 11 100 30000"] {
            fixture.tell(command)?;
        }
        let truth = fixture.report()?;
        let report = session.stop()?;
        ensure!(report["losses"] == serde_json::json!({}), "something was lost: {}", summary(&report));
        let expected = site(&truth, "leak_via_malloc");
        ensure!(live_in(&report, "leak_via_malloc") == expected, "{capabilities}: {expected:?} {}", summary(&report));
    }
    Ok(())
}

/// Where a capability is missing it is named, and nothing is attached.
#[test]
fn what_is_missing_is_named() -> Result<()> {
    const NAME: &str = "what_is_missing_is_named";
    let Some(setpriv) = host::program(NAME, "setpriv").filter(|_| host::can_trace(NAME)) else { return Ok(()) };
    let copy = Copy::new()?;
    let fixture = Fixture::start("allocators")?;
    let pid = fixture.pid().to_string();
    for (capabilities, missing) in
        [("+bpf,+perfmon", "CAP_SYS_PTRACE"), ("+bpf,+sys_ptrace", "CAP_PERFMON"), ("+perfmon,+sys_ptrace", "CAP_BPF")]
    {
        let outcome = copy.command(&setpriv, capabilities)?.args(["-p", &pid, "--duration", "1s"]).run(patience())?;
        ensure!(outcome.code()? == 1, "{capabilities}: {}", outcome.status);
        let named = outcome.stderr.contains(&format!("{missing} missing"));
        ensure!(named, "{capabilities}: {missing} is not named: {}", outcome.stderr);
    }
    ensure!(host::breakpoints(fixture.pid())? == 0, "breakpoints are left");
    let doctor = copy.command(&setpriv, "+bpf,+perfmon,+sys_ptrace")?.arg("doctor").run(patience())?;
    ensure!(doctor.code()? == 0, "{}", doctor.stdout);
    ensure!(doctor.stdout.contains("grant CAP_CHECKPOINT_RESTORE"), "{}", doctor.stdout);
    Ok(())
}

/// Once attached, no thread of a tracer that root started has rights that it does not need any more, and what reads debug information
/// has least.
#[test]
fn rights_are_given_up() -> Result<()> {
    if !host::can_trace("rights_are_given_up") {
        return Ok(());
    }
    let fixture = Fixture::start("allocators")?;
    let mut session = Session::start(&[fixture.pid()], &[])?;
    let tracer = session.running().pid();
    let mut of_threads: BTreeMap<String, u64> = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{tracer}/task"))?.flatten() {
        let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (name, held) = (field("Name:").context("no name")?, field("CapPrm:").context("no rights")?);
        *of_threads.entry(name.to_owned()).or_default() |= u64::from_str_radix(held, 16)?;
    }
    ensure!(of_threads.values().all(|held| held & !(KEPT | SYS_ADMIN) == 0), "{of_threads:x?}");
    // The one that places breakpoints.
    let administers: Vec<_> = of_threads.iter().filter(|(_, held)| *held & SYS_ADMIN != 0).collect();
    ensure!(administers.len() == 1 && administers[0].0 == "leaktrace", "{of_threads:x?}");
    ensure!(of_threads.get("symbols").is_some_and(|held| held & !DAC_READ_SEARCH == 0), "{of_threads:x?}");
    session.stop().map(drop)
}

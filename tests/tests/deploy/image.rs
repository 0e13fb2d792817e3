//! The container image's two variants, without a container runtime: the program alone in another root, as Kubernetes would start it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::deploy::{self, text};
use leaktrace_tests::{Fixture, Leaktrace, Program, Session, host, live_in, patience, site, summary};
use tempfile::TempDir;

/// What the chart's container has (`securityContext.capabilities`), with Linux before 6.6 one more.
const BOUND: &str = "-all,+bpf,+perfmon,+sys_ptrace,+dac_read_search,+checkpoint_restore";

/// A root with nothing in it but leaktrace, what it is linked with here, and what plays the container runtime.
struct Image {
    root: TempDir,
    setpriv: PathBuf,
}

impl Image {
    fn new(test: &str) -> Result<Option<Self>> {
        let Some(setpriv) = host::program(test, "setpriv").filter(|_| host::can_trace(test)) else { return Ok(None) };
        let root = tempfile::tempdir()?;
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755))?;
        let mut leaktrace = Leaktrace::new()?;
        let program = PathBuf::from(leaktrace.command().get_program());
        for program in [&program, &setpriv] {
            let copy = root.path().join(program.file_name().context("no name")?);
            fs::copy(program, &copy).with_context(|| format!("failed to copy {}", program.display()))?;
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
            host::copy_libraries(program, root.path())?;
        }
        for folder in ["proc", "sys", "tmp"] {
            fs::create_dir(root.path().join(folder))?;
        }
        fs::set_permissions(root.path().join("tmp"), fs::Permissions::from_mode(0o1777))?;
        Ok(Some(Self { root, setpriv }))
    }

    /// Gives the file the capabilities that the Containerfile says; `false` where the file system keeps none.
    fn with_file_capabilities(&self, test: &str) -> Result<bool> {
        let Some(setcap) = host::program(test, "setcap") else { return Ok(false) };
        let container_file = fs::read_to_string(deploy::folder().join("container/Containerfile"))?;
        let line = container_file.lines().find_map(|line| line.trim().strip_prefix("&& setcap "));
        let capabilities =
            line.and_then(|line| line.split(' ').next()).context("there is no setcap in the Containerfile")?;
        let output = Command::new(setcap).arg(capabilities).arg(self.root.path().join("leaktrace")).output()?;
        if !output.status.success() {
            return Ok(host::skip(test, &String::from_utf8_lossy(&output.stderr)));
        }
        Ok(true)
    }

    /// leaktrace in it, by this user, bounded by the capabilities of the container.
    fn command(&self, user: &str, privileges: &[&str]) -> Result<Leaktrace> {
        // Mounts go with the namespace, so with the process.
        const START: &str = "set -e; mount --rbind /proc \"$0/proc\"; mount --rbind /sys \"$0/sys\"; \
                             export PATH=/; exec /usr/sbin/chroot \"$0\" \"$@\"";
        let mut command = Leaktrace::new()?;
        *command.command() = Command::new("unshare");
        let bound = if host_needs_sys_admin()? { format!("{BOUND},+sys_admin") } else { BOUND.to_owned() };
        let setpriv = Path::new("/").join(self.setpriv.file_name().context("no name")?);
        let command = command
            .args(["--mount", "--", "sh", "-c", START])
            .arg(self.root.path())
            .arg(setpriv)
            .args(["--reuid", user, "--regid", user, "--clear-groups", "--inh-caps", "-all", "--bounding-set", &bound])
            .args(privileges)
            .arg("/leaktrace");
        Ok(command.piped())
    }
}

/// Before Linux 6.6 the variants need `security.sysAdmin`.
fn host_needs_sys_admin() -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u32>().ok());
    Ok((numbers.next(), numbers.next()) < (Some(6), Some(6)))
}

/// Traces a process of another root and user, and finds all that it says it did.
fn traces_exactly(command: Leaktrace) -> Result<()> {
    let mut fixture = Fixture::builder(&Program::c("allocators").build()?).start()?;
    let pid = fixture.pid().to_string();
    let args = ["--format", "jsonl", "--top", "1000", "--interval", "200ms", "-p", &pid];
    let session = Session::attached(command.args(args).env("LEAKTRACE_MAX_OVERHEAD", "off").spawn()?)?;
    for command in ["leak malloc 21 1001", "churn calloc 300 77"] {
        fixture.tell(command)?;
    }
    let truth = fixture.report()?;
    let report = session.stop()?;
    ensure!(report["losses"] == serde_json::json!({}), "something was lost: {}", summary(&report));
    let expected = site(&truth, "leak_via_malloc");
    ensure!(live_in(&report, "leak_via_malloc") == expected, "{expected:?} {}", summary(&report));
    Ok(())
}

/// Root with the chart's capabilities, which may gain no others, traces processes of the host from a root with nothing else in it.
#[test]
fn root_with_few_capabilities() -> Result<()> {
    const NAME: &str = "root_with_few_capabilities";
    let Some(image) = Image::new(NAME)? else { return Ok(()) };
    traces_exactly(image.command("0", &["--no-new-privs"])?)
}

/// So does another user by the file's capabilities; without them it cannot, and says what is missing.
#[test]
fn another_user_by_the_files_capabilities() -> Result<()> {
    const NAME: &str = "another_user_by_the_files_capabilities";
    let Some(image) = Image::new(NAME)? else { return Ok(()) };
    let without = image.command("65532", &[])?.arg("doctor").run(patience())?;
    ensure!(without.code()? != 0 && without.stdout.contains("CAP_BPF"), "{}{}", without.stdout, without.stderr);
    if host_needs_sys_admin()? {
        let _ = host::skip(NAME, "before Linux 6.6 the file's capabilities are not enough");
        return Ok(());
    }
    if !image.with_file_capabilities(NAME)? {
        return Ok(());
    }
    let doctor = image.command("65532", &[])?.arg("doctor").run(patience())?;
    ensure!(doctor.code()? == 0, "{}{}", doctor.stdout, doctor.stderr);
    traces_exactly(image.command("65532", &[])?)?;
    Ok(())
}

/// The Containerfile makes both variants that the chart names, the one for root last, and gives the other's file just what the chart's
/// container is bounded by.
#[test]
fn the_container_file_fits_the_chart() -> Result<()> {
    let file = fs::read_to_string(deploy::folder().join("container/Containerfile"))?;
    let stages: Vec<&str> = file.lines().filter_map(|line| line.strip_prefix("FROM ")?.split(" AS ").nth(1)).collect();
    assert_eq!(stages, ["build", "base", "nonroot", "root"]);
    let chart = fs::read_to_string(deploy::folder().join("kustomize/base/leaktrace.yaml"))?;
    let list = chart.split("add:\n").nth(1).context("no capabilities")?;
    let mut of_chart: Vec<String> = list
        .lines()
        .take_while(|line| line.trim_start().starts_with(['-', '#']))
        .filter_map(|line| line.trim().strip_prefix("- "))
        .map(|name| format!("cap_{}", name.to_lowercase()))
        .collect();
    let line = file.lines().find_map(|line| line.trim().strip_prefix("&& setcap ")).context("no setcap")?;
    let mut of_file: Vec<&str> = line.split("=ep").next().context("no capabilities")?.split(',').collect();
    of_chart.sort_unstable();
    of_file.sort_unstable();
    assert_eq!(of_chart, of_file);
    let mut of_test: Vec<String> = BOUND.split(',').skip(1).map(|name| format!("cap_{}", &name[1..])).collect();
    of_test.sort_unstable();
    assert_eq!(of_chart, of_test);
    // The toolchain is the repository's.
    let toolchain = fs::read_to_string(deploy::folder().join("../rust-toolchain.toml"))?;
    let channel =
        toolchain.lines().find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix("\"")).context("none")?;
    let version = channel.strip_suffix(".0").unwrap_or(channel);
    ensure!(file.contains(&format!("rust:{version}-bookworm")), "the image is not of {version}");
    Ok(())
}

/// The shell's own check of the commands in the Containerfile, each as one script.
#[test]
fn the_container_files_commands_are_shell() -> Result<()> {
    let file = fs::read_to_string(deploy::folder().join("container/Containerfile"))?;
    let joined = file.replace("\\\n", " ");
    let mut seen = 0;
    for command in joined.lines().filter_map(|line| line.strip_prefix("RUN ")) {
        text(deploy::run(Command::new("sh").arg("-n"), command)?, "find shell in the Containerfile")?;
        seen += 1;
    }
    ensure!(seen >= 3, "{seen} commands");
    Ok(())
}

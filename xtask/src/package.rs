//! `cargo xtask package`: the Debian package, and whether it is what it should be: its contents, what lintian says, and that it can be
//! installed, run and purged without a trace, in a root of its own.
//!
//! Made by cargo-deb, which knows Debian's rules for settings, systemd units and dependencies; it is built once, into `target/tools`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use leaktrace_tests::target_dir;

use crate::process::{capture, cargo, check, find_in_path};
use crate::run::build;
use crate::setup::{self, setup};

const CARGO_DEB: &str = "3.8.0";

/// What lintian says that is so on purpose: there are no manual pages (`--help` has it all), no bug of Debian's is closed by the package,
/// its changelog is the project's, and its script tells people to call systemctl.
const LINTIAN: [&str; 5] = [
    "no-manual-page",
    "initial-upload-closes-no-bugs",
    "no-changelog",
    "bogus-mail-host",
    "maintainer-script-calls-systemctl",
];

/// Files that the package must bring.
const FILES: [&str; 7] = [
    "./usr/bin/leaktrace",
    "./etc/leaktrace/agent.toml",
    "./lib/systemd/system/leaktrace.service",
    "./usr/share/doc/leaktrace/copyright",
    "./usr/share/doc/leaktrace/RUNBOOK.md",
    "./usr/share/doc/leaktrace/examples/linux-6.6.conf",
    "./usr/share/doc/leaktrace/examples/prometheus-rules.yaml",
];

/// Builds the package, looks into it, and gives its path.
pub fn package() -> Result<PathBuf> {
    setup()?;
    build()?;
    bring_cargo_deb()?;
    let folder = target_dir()?.join("debian");
    let file = folder.join("leaktrace.deb");
    fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let mut deb = cargo();
    deb.env("PATH", setup::path_with(&setup::tools().join("bin"))?);
    check(
        deb.args(["deb", "--no-build", "--strip", "--package", "leak-user", "--output"]).arg(&file),
        "make the package",
    )?;
    contents(&file)?;
    lintian(&file)?;
    installation(&file)?;
    eprintln!("package: {}", file.display());
    Ok(file)
}

fn bring_cargo_deb() -> Result<()> {
    let tools = setup::tools();
    let is_there = capture(Command::new(tools.join("bin/cargo-deb")).arg("--version").stderr(Stdio::null()));
    if is_there.is_ok_and(|version| version.trim() == CARGO_DEB) {
        return Ok(());
    }
    eprintln!("setup: building cargo-deb {CARGO_DEB} (a minute or two, once)");
    let build = tools.join("build");
    let mut install = cargo();
    install.args(["install", "cargo-deb", "--version", CARGO_DEB, "--locked", "--force", "--root"]).arg(&tools);
    check(install.arg("--target-dir").arg(&build), "build cargo-deb")?;
    fs::remove_dir_all(&build).with_context(|| format!("failed to remove {}", build.display()))
}

/// All files are there, settings are the administrator's, and nothing stands elsewhere.
fn contents(file: &Path) -> Result<()> {
    let list = capture(Command::new("dpkg-deb").arg("--contents").arg(file))?;
    let files: BTreeSet<&str> =
        list.lines().filter(|line| !line.starts_with('d')).filter_map(|l| l.split_whitespace().nth(5)).collect();
    for wanted in FILES {
        // With merged /usr either is right.
        let merged = wanted.replace("./lib/", "./usr/lib/");
        ensure!(files.contains(wanted) || files.contains(merged.as_str()), "{wanted} is not in the package:\n{list}");
    }
    let allowed = [
        "./usr/bin/",
        "./usr/share/doc/leaktrace/",
        "./etc/leaktrace/",
        "./lib/systemd/system/",
        "./usr/lib/systemd/system/",
    ];
    let elsewhere = files.iter().find(|file| !allowed.iter().any(|folder| file.starts_with(folder)));
    ensure!(elsewhere.is_none(), "{elsewhere:?} does not belong into the package");
    let control = capture(Command::new("dpkg-deb").arg("--info").arg(file))?;
    for wanted in ["conffiles", "postinst", "Package: leaktrace", "libc6 (>="] {
        ensure!(control.contains(wanted), "the package lacks {wanted:?}:\n{control}");
    }
    Ok(())
}

fn lintian(file: &Path) -> Result<()> {
    if find_in_path("lintian").is_none() {
        eprintln!("package: lintian is not installed, so Debian's rules are not checked");
        return Ok(());
    }
    let suppressed = LINTIAN.join(",");
    let arguments = ["--allow-root", "--fail-on", "error,warning", "--suppress-tags", &suppressed];
    check(Command::new("lintian").args(arguments).arg(file), "find Debian's rules kept")
}

/// Installs it into a root of its own, where scripts are told so, runs what is installed, and purges it.
fn installation(file: &Path) -> Result<()> {
    let root = tempfile::tempdir().context("failed to create a folder")?;
    let root = root.path();
    for folder in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join("var/lib/dpkg/status"), "")?;
    let dpkg = |arguments: &[&str]| {
        let mut dpkg = Command::new("dpkg");
        dpkg.arg(format!("--root={}", root.display()));
        // What it depends on is this machine's; its scripts run here and are told of the root by DPKG_ROOT.
        dpkg.args(["--force-not-root", "--force-depends", "--force-script-chrootless", "--log=/dev/null"])
            .args(arguments);
        dpkg.stdin(Stdio::null()).stdout(Stdio::null());
        dpkg
    };
    check(dpkg(&["--install"]).arg(file), "install the package")?;
    let leaktrace = root.join("usr/bin/leaktrace");
    let version = capture(Command::new(&leaktrace).arg("--version"))?;
    ensure!(version.contains(env!("CARGO_PKG_VERSION")), "it calls itself {version}");
    let settings = root.join("etc/leaktrace/agent.toml");
    let mut agent = Command::new(&leaktrace);
    check(agent.args(["agent", "--check-config", "--config"]).arg(&settings), "find the package's settings in order")?;
    if find_in_path("systemd-analyze").is_some() {
        let unit = ["lib", "usr/lib"].map(|lib| root.join(lib).join("systemd/system/leaktrace.service"));
        let unit = unit.iter().find(|unit| unit.exists()).context("failed to find the unit")?;
        let text = fs::read_to_string(unit)?;
        ensure!(text.contains("ExecStart=/usr/bin/leaktrace agent --config /etc/leaktrace/agent.toml"), "{text}");
        let wanted = root.join("etc/systemd/system/multi-user.target.wants/leaktrace.service");
        ensure!(!wanted.is_symlink(), "the agent is enabled by its mere installation");
    }
    // Settings that were changed stay when it is removed, and go when it is purged; so does what it knew.
    fs::write(&settings, "# mine\n")?;
    fs::create_dir_all(root.join("var/lib/leaktrace"))?;
    check(&mut dpkg(&["--remove", "leaktrace"]), "remove the package")?;
    ensure!(settings.exists() && !leaktrace.exists(), "removing it takes the settings, or leaves the program");
    check(&mut dpkg(&["--purge", "leaktrace"]), "purge the package")?;
    for left in ["etc/leaktrace", "var/lib/leaktrace", "usr/share/doc/leaktrace"] {
        ensure!(!root.join(left).exists(), "{left} is left when the package is purged");
    }
    Ok(())
}

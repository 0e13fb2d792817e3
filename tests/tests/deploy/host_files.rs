//! The systemd unit and the settings of the package.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::deploy::{self, text};
use leaktrace_tests::{Leaktrace, PATIENCE, host};

use crate::certificate;

/// The unit under its own name, with a program that is there, and the drop-in if that is wanted.
fn laid_out(folder: &Path, with_drop_in: bool) -> Result<()> {
    let unit = fs::read_to_string(deploy::folder().join("systemd/leaktrace.service"))?;
    ensure!(unit.contains("/usr/bin/leaktrace "), "the program is elsewhere");
    fs::write(folder.join("leaktrace.service"), unit.replace("/usr/bin/leaktrace ", "/bin/true "))?;
    if with_drop_in {
        let drop_ins = folder.join("leaktrace.service.d");
        fs::create_dir_all(&drop_ins)?;
        fs::copy(deploy::folder().join("systemd/linux-6.6.conf"), drop_ins.join("linux-6.6.conf"))?;
    }
    Ok(())
}

/// systemd takes the unit without a remark, and rates its exposure as low; the more so with the drop-in for newer kernels.
#[test]
fn systemd_takes_the_unit() -> Result<()> {
    let Some(analyze) = host::program("systemd_takes_the_unit", "systemd-analyze") else { return Ok(()) };
    let mut exposures = Vec::new();
    for with_drop_in in [false, true] {
        let folder = tempfile::tempdir()?;
        laid_out(folder.path(), with_drop_in)?;
        let run = |args: &[&str]| {
            Command::new(&analyze)
                .args(args)
                .arg(folder.path().join("leaktrace.service"))
                // Nothing else is loaded beside it but what is in the system's own folders.
                .env("SYSTEMD_UNIT_PATH", format!("{}:", folder.path().display()))
                .stdin(Stdio::null())
                .output()
                .context("failed to start systemd-analyze")
        };
        let verified = run(&["verify", "--man=no"])?;
        let said = String::from_utf8_lossy(&verified.stderr).into_owned();
        let own: Vec<&str> = said.lines().filter(|line| line.contains("leaktrace")).collect();
        ensure!(verified.status.success() && own.is_empty(), "{said}");
        let rated = text(run(&["security", "--offline=true", "--no-pager"])?, "rate the unit")?;
        let exposure =
            rated.lines().find_map(|line| line.split("Overall exposure level for leaktrace.service: ").nth(1));
        let exposure = exposure.and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        exposures.push(exposure.with_context(|| format!("no exposure in {rated}"))?);
    }
    // The scale goes up to 10, and "medium" begins at 5.
    ensure!(exposures[0] < 3.0 && exposures[1] < exposures[0], "{exposures:?}");
    Ok(())
}

/// The unit's user has the capabilities that it is bounded by, and the drop-in takes `SYS_ADMIN` from both.
#[test]
fn the_unit_has_few_capabilities() -> Result<()> {
    let sets = |file: &str| -> Result<Vec<BTreeSet<String>>> {
        let text = fs::read_to_string(deploy::folder().join("systemd").join(file))?;
        let lines = ["AmbientCapabilities=", "CapabilityBoundingSet="].map(|key| {
            let line = text.lines().rfind(|line| line.starts_with(key) && line.len() > key.len());
            line.map(|line| line[key.len()..].split(' ').map(str::to_owned).collect::<BTreeSet<_>>())
        });
        lines.into_iter().map(|set| set.with_context(|| format!("{file} lacks a set"))).collect()
    };
    let mut unit = sets("leaktrace.service")?;
    let newer = sets("linux-6.6.conf")?;
    assert_eq!(unit[0], unit[1]);
    assert_eq!(newer[0], newer[1]);
    ensure!(unit[0].remove("CAP_SYS_ADMIN"), "SYS_ADMIN is not there for older kernels");
    assert_eq!(unit[0], newer[0]);
    assert_eq!(newer[0].len(), 5);
    Ok(())
}

/// The settings that the package brings make sense to the agent, as they are and with everything in them that is commented out.
#[test]
fn the_agent_takes_the_packages_settings() -> Result<()> {
    let settings = fs::read_to_string(deploy::folder().join("agent.toml"))?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("token"), "0123456789abcdef0123456789abcdef")?;
    if !certificate("the_agent_takes_the_packages_settings", folder.path())? {
        return Ok(());
    }
    let mut all = String::new();
    let mut shown = 0;
    for line in settings.lines() {
        // What is a setting has no space behind the mark.
        match line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')) {
            Some(setting) => {
                all += setting;
                shown += 1;
            }
            None => all += line,
        }
        all += "\n";
    }
    ensure!(shown >= 8, "{shown} settings are shown");
    let all = all.replace("/etc/leaktrace", &folder.path().to_string_lossy());
    for (text, name) in [(&settings, "as it is"), (&all, "all of it")] {
        let file = folder.path().join("agent.toml");
        fs::write(&file, text)?;
        let check = Leaktrace::new()?.args(["agent", "--check-config", "--config"]).arg(&file).run(PATIENCE)?;
        ensure!(check.code()? == 0, "{name}: {}", check.stderr);
    }
    // A check that takes everything would be none.
    fs::write(folder.path().join("agent.toml"), all.replace("max_stacks", "max_heaps"))?;
    let check = Leaktrace::new()?
        .args(["agent", "--check-config", "--config"])
        .arg(folder.path().join("agent.toml"))
        .run(PATIENCE)?;
    ensure!(check.code()? != 0 && check.stderr.contains("max_heaps"), "{}", check.stderr);
    Ok(())
}

/// All that the Debian package takes is there, with the unit's program and settings among it, and its scripts are shell with the place
/// for what cargo-deb puts in.
#[test]
fn the_package_takes_what_is_there() -> Result<()> {
    let package = deploy::folder().join("../leak-user");
    let manifest = fs::read_to_string(package.join("Cargo.toml"))?;
    let metadata = manifest.split("[package.metadata.deb]").nth(1).context("there is no package")?;
    let assets = metadata.lines().filter_map(|line| line.trim().strip_prefix("[\"")?.strip_suffix("\"],"));
    let assets: Vec<Vec<&str>> = assets.map(|asset| asset.split("\", \"").collect()).collect();
    ensure!(assets.len() >= 8, "{assets:?}");
    for asset in &assets {
        ensure!(asset[0].starts_with("target/") || package.join(asset[0]).is_file(), "{} is not there", asset[0]);
    }
    let unit = fs::read_to_string(deploy::folder().join("systemd/leaktrace.service"))?;
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("it starts nothing")?;
    for wanted in [&["target/release/leaktrace", "usr/bin/", "755"], &["../deploy/agent.toml", "etc/leaktrace/", "644"]]
    {
        ensure!(assets.iter().any(|asset| asset == wanted), "{wanted:?} is not in {assets:?}");
        let name = wanted[0].rsplit('/').next().unwrap_or_default();
        ensure!(start.contains(&format!("/{}{name}", wanted[1])), "{start} does not name {wanted:?}");
    }
    for script in ["postinst", "prerm", "postrm"] {
        let file = deploy::folder().join("debian").join(script);
        text(Command::new("sh").arg("-n").arg(&file).output()?, "find shell in a script")?;
        ensure!(fs::read_to_string(&file)?.contains("\n#DEBHELPER#\n"), "{script} has no place for more");
    }
    Ok(())
}

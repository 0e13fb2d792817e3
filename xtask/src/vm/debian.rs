//! Packages of Debian, of any suite and machine, downloaded and unpacked into the target folder; nothing is installed.
//!
//! apt is told to look at nothing of this machine's but its keys: sources, lists, cache and the record of what is installed are of
//! this module's own making, one set for each suite and machine. So a dependency is always downloaded too, the answer is the same on
//! every host, and no root is needed. The server is the one that the host itself uses.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::arch::Arch;
use crate::process::{capture, check, find_in_path};

/// Signs all of Debian's suites; the package debian-archive-keyring brings it.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A suite for a machine.
pub struct Suite {
    folder: PathBuf,
    arch: Arch,
}

impl Suite {
    /// Keeps what it needs under `cache`. Nothing is downloaded before something is asked for.
    pub fn new(cache: &Path, suite: &str, arch: Arch) -> Result<Self> {
        possible()?;
        let folder = cache.join("apt").join(format!("{suite}-{}", arch.debian()));
        for part in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(part)).with_context(|| format!("failed to create {}", folder.display()))?;
        }
        let this = Self { folder, arch };
        this.write("status", "")?;
        this.write("sources.list", &format!("deb [signed-by={KEYS}] {} {suite} main\n", site()?))?;
        let folder = this.folder.display();
        this.write(
            "apt.conf",
            &format!(
                "Dir::Etc::SourceList \"{folder}/sources.list\";\nDir::Etc::SourceParts \"/dev/null\";\nDir::Etc::Preferences \"/dev/null\";\n\
                 Dir::Etc::PreferencesParts \"/dev/null\";\nDir::State::Lists \"{folder}/lists\";\nDir::State::status \"{folder}/status\";\n\
                 Dir::Cache \"{folder}\";\nDir::Cache::archives \"{folder}/archives\";\nAPT::Architecture \"{arch}\";\n\
                 APT::Architectures {{ \"{arch}\"; }};\nAPT::Sandbox::User \"root\";\nAPT::Install-Recommends \"false\";\n\
                 APT::Get::Assume-Yes \"true\";\nAcquire::Languages \"none\";\nAcquire::Retries \"3\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 // Old suites are no longer signed anew.\nAcquire::Check-Valid-Until \"false\";\n",
                arch = arch.debian()
            ),
        )?;
        Ok(this)
    }

    /// The names of all packages that begin so.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        self.bring_lists()?;
        let names = capture(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Unpacks these packages and all that they depend on into `folder`, but for those in `without`. `folder` is there whole or not
    /// at all.
    pub fn unpack(&self, packages: &[&str], without: &[&str], folder: &Path) -> Result<()> {
        let wanted = format!("{packages:?} without {without:?}\n");
        let stamp = folder.join(".packages");
        if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
            return Ok(());
        }
        eprintln!("vm: downloading {} and what it needs, for {}", packages.join(", "), self.arch.debian());
        self.bring_lists()?;
        // What an earlier call has left there may not belong to these packages.
        self.clear("archives")?;
        self.download(|suite| {
            let mut command = suite.apt("apt-get");
            command.args(["--quiet", "install", "--download-only"]).args(packages);
            command
        })?;
        let unfinished = aside(folder)?;
        for archive in self.archives("archives")? {
            let name = archive.file_name().unwrap_or_default().to_string_lossy();
            if without.iter().any(|package| name.starts_with(&format!("{package}_"))) {
                continue;
            }
            check(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&unfinished), "unpack a package")?;
        }
        fs::write(unfinished.join(".packages"), wanted).context("failed to write what was unpacked")?;
        self.clear("archives")?;
        put(&unfinished, folder)
    }

    /// Takes the only file that fits `pattern` (such as `./boot/vmlinuz-*`) out of one package, without dependencies, as `file`.
    pub fn extract(&self, package: &str, pattern: &str, file: &Path) -> Result<()> {
        eprintln!("vm: downloading {package} for {}", self.arch.debian());
        self.clear("single")?;
        self.bring_lists()?;
        self.download(|suite| {
            let mut command = suite.apt("apt-get");
            command.args(["--quiet", "download", package]).current_dir(suite.folder.join("single"));
            command
        })?;
        let archive = self.archives("single")?.pop().context("failed to find the package that was downloaded")?;
        let mut contents = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&archive)
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start dpkg-deb")?;
        let pipe = contents.stdout.take().context("failed to take dpkg-deb's standard output")?;
        let unfinished = file.with_extension("unfinished");
        let output = File::create(&unfinished).with_context(|| format!("failed to create {}", unfinished.display()))?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--to-stdout", "--wildcards", pattern]).stdin(pipe).stdout(output);
        check(&mut tar, &format!("find {pattern} in {package}"))?;
        contents.wait().context("failed to wait for dpkg-deb")?;
        self.clear("single")?;
        fs::rename(&unfinished, file).with_context(|| format!("failed to move {}", unfinished.display()))
    }

    /// Runs what `command` makes; once more with new lists where it fails, because what old ones name may be gone.
    fn download(&self, command: impl Fn(&Self) -> Command) -> Result<()> {
        if check(command(self).stdout(Stdio::null()).stderr(Stdio::null()), "download packages").is_ok() {
            return Ok(());
        }
        self.update()?;
        check(command(self).stdout(Stdio::null()), "download packages")
    }

    fn bring_lists(&self) -> Result<()> {
        let lists = self.folder.join("lists");
        let has_list = |name: &str| name.contains("_Packages");
        let entries = fs::read_dir(&lists).with_context(|| format!("failed to read {}", lists.display()))?;
        if entries.flatten().any(|entry| has_list(&entry.file_name().to_string_lossy())) {
            return Ok(());
        }
        self.update()
    }

    fn update(&self) -> Result<()> {
        check(self.apt("apt-get").args(["--quiet", "update"]).stdout(Stdio::null()), "bring Debian's package lists")
    }

    /// One of apt's programs, which knows nothing but this suite.
    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).stdin(Stdio::null()).env("LC_ALL", "C");
        command
    }

    fn archives(&self, part: &str) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join(part);
        let entries = fs::read_dir(&folder).with_context(|| format!("failed to read {}", folder.display()))?;
        let mut found: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect();
        found.sort();
        Ok(found)
    }

    fn clear(&self, part: &str) -> Result<()> {
        let folder = self.folder.join(part);
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("failed to empty {}", folder.display()))?;
        }
        let partial = folder.join("partial");
        fs::create_dir_all(&partial).with_context(|| format!("failed to create {}", partial.display()))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let file = self.folder.join(name);
        // An unchanged time keeps apt's own cache valid.
        if fs::read_to_string(&file).is_ok_and(|found| found == text) {
            return Ok(());
        }
        fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))
    }
}

/// Why Debian's packages cannot be had here, if they cannot.
pub fn possible() -> Result<()> {
    for program in ["apt-get", "apt-cache", "dpkg-deb"] {
        if find_in_path(program).is_none() {
            bail!("failed to find {program}: emulator and kernels are Debian's packages");
        }
    }
    if !Path::new(KEYS).is_file() {
        bail!("failed to find Debian's keys, {KEYS} (package debian-archive-keyring)");
    }
    site().map(drop)
}

/// The server that this host's own apt takes Debian from.
fn site() -> Result<String> {
    let targets =
        capture(Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]))?;
    let site = targets.lines().find(|uri| uri.trim_end_matches('/').ends_with("/debian"));
    site.map(str::to_owned)
        .context("failed to find a Debian server: apt's sources name none whose path ends with /debian")
}

/// An empty folder beside `folder`, to be filled and then [`put`] in its place.
pub fn aside(folder: &Path) -> Result<PathBuf> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = folder.with_file_name(format!("{name}.unfinished"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| format!("failed to remove {}", unfinished.display()))?;
    }
    fs::create_dir_all(&unfinished).with_context(|| format!("failed to create {}", unfinished.display()))?;
    Ok(unfinished)
}

/// Puts a filled folder in its place.
fn put(unfinished: &Path, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("failed to remove {}", folder.display()))?;
    }
    fs::rename(unfinished, folder).with_context(|| format!("failed to move {}", unfinished.display()))
}

/// Keeps two runs from filling the same cache at once.
pub fn lock(cache: &Path) -> Result<File> {
    fs::create_dir_all(cache).with_context(|| format!("failed to create {}", cache.display()))?;
    let lock = cache.join("lock");
    let lock = File::create(&lock).with_context(|| format!("failed to create {}", lock.display()))?;
    lock.lock().context("failed to wait for another run")?;
    Ok(lock)
}

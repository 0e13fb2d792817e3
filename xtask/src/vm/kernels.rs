//! Which kernels are booted, and where they come from: Debian's packages for virtual machines, in which everything that is needed here
//! is built in, so that no modules have to be loaded. That is so in those with larger pages too, which Debian has for arm64 and only
//! for real machines: of 16 KiB. There are none of 64 KiB.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::arch::Arch;
use super::debian::Suite;

/// What is promised: version (`7` is the newest of 7.x, `7-16k` the one with such pages), Debian's suite that has it, and the machines.
const SUPPORTED: [(&str, &str, &[Arch]); 6] = [
    ("5.10", "bullseye", &Arch::ALL),
    ("6.1", "bookworm", &Arch::ALL),
    ("6.12", "trixie", &Arch::ALL),
    ("6.16", "trixie-backports", &[Arch::X86_64]),
    ("7", "trixie-backports", &Arch::ALL),
    ("7-16k", "trixie-backports", &[Arch::Aarch64]),
];

/// Has many versions, each for a while; those that are not promised are looked for there.
const OTHERS: &str = "trixie-backports";

/// A kernel to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub arch: Arch,
    /// As it was asked for, such as `6.1` or `7-16k`.
    pub version: String,
    suite: &'static str,
}

impl Kernel {
    /// All that are promised, or those of them that are asked for; others too, where they are named.
    pub fn choose(versions: &[String], archs: &[Arch]) -> Vec<Self> {
        let wanted = |arch: Arch| archs.is_empty() || archs.contains(&arch);
        let archs = || Arch::ALL.into_iter().filter(|arch| wanted(*arch));
        let known =
            SUPPORTED.iter().filter(|(version, _, _)| versions.is_empty() || versions.iter().any(|v| v == version));
        let mut chosen: Vec<Self> = archs()
            .flat_map(|arch| {
                known.clone().filter(move |(_, _, on)| on.contains(&arch)).map(move |(version, suite, _)| Self {
                    arch,
                    version: (*version).to_owned(),
                    suite,
                })
            })
            .collect();
        for version in versions.iter().filter(|version| SUPPORTED.iter().all(|(known, _, _)| known != version)) {
            chosen.extend(archs().map(|arch| Self { arch, version: version.clone(), suite: OTHERS }));
        }
        chosen
    }

    /// The oldest and the newest that are promised, for this host's own machine.
    pub fn ends() -> Vec<Self> {
        let all = Self::choose(&[], &[Arch::host()]);
        [all.first(), all.last()].into_iter().flatten().cloned().collect()
    }

    /// The kernel's image, called by its release; downloaded unless it is under `cache`.
    pub fn image(&self, cache: &Path) -> Result<PathBuf> {
        let folder = cache.join("kernels").join(format!("{}-{}", self.arch.name(), self.version));
        if let Some(image) = image_in(&folder) {
            return Ok(image);
        }
        let suite = Suite::new(cache, self.suite, self.arch)?;
        let package = newest(&suite.names("linux-")?, &self.version, self.arch).with_context(|| {
            format!("failed to find Linux {} for {} in Debian's {}", self.version, self.arch.name(), self.suite)
        })?;
        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        let pattern = if package.name.starts_with(BINARY) { "./usr/lib/modules/*/vmlinuz" } else { "./boot/vmlinuz-*" };
        suite.extract(&package.name, pattern, &folder.join(package.release))?;
        image_in(&folder).with_context(|| format!("failed to find a kernel in {}", folder.display()))
    }
}

/// Since 7.x the image itself is in a package of this name; the one of the other name then only depends on it.
const BINARY: &str = "linux-binary-";
const IMAGE: &str = "linux-image-";

fn image_in(folder: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.into_iter().find(|path| path.is_file() && path.extension().is_none_or(|extension| extension != "unfinished"))
}

/// A package with a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Package {
    name: String,
    /// As uname says it.
    release: String,
}

/// The newest package of `version` (a whole one, or its first numbers) for virtual machines, or with the pages that stand behind it.
fn newest(names: &[String], version: &str, arch: Arch) -> Result<Package> {
    let (version, suffix) = match version.split_once('-') {
        None => (version, format!("-cloud-{}", arch.debian())),
        Some((version, pages)) => (version, format!("-{}-{pages}", arch.debian())),
    };
    let wanted = numbers(version);
    let fitting = names.iter().filter_map(|name| {
        let release = name.strip_prefix(BINARY).or_else(|| name.strip_prefix(IMAGE))?;
        let numbers = numbers(release.strip_suffix(&suffix)?);
        let fits = release.starts_with(|c: char| c.is_ascii_digit()) && numbers.starts_with(&wanted);
        fits.then(|| ((numbers, name.starts_with(BINARY)), name, release))
    });
    let (_, name, release) = fitting.max().context("none of its packages fits")?;
    Ok(Package { name: name.clone(), release: release.to_owned() })
}

/// The numbers of a version, in order.
fn numbers(version: &str) -> Vec<u32> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn newest_of(version: &str, names: &[&str]) -> Option<String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        newest(&names, version, Arch::X86_64).ok().map(|package| package.name)
    }

    /// The newest release of a version is taken by its numbers, not by its letters; other machines and flavours are left out.
    #[test]
    fn newest_release() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-6.12.1-cloud-amd64",
            "linux-image-6.1.0-60-amd64",
            "linux-image-6.1.0-60-cloud-arm64",
            "linux-image-6.1.0-60-cloud-amd64-dbg",
            "linux-image-cloud-amd64",
        ];
        assert_eq!(newest_of("6.1", &names).as_deref(), Some("linux-image-6.1.0-50-cloud-amd64"));
        assert_eq!(newest_of("6", &names).as_deref(), Some("linux-image-6.12.1-cloud-amd64"));
        assert_eq!(newest_of("6.2", &names), None);
    }

    /// Pages of another size are taken where they are asked for, and only there.
    #[test]
    fn package_with_larger_pages() {
        let names = [
            "linux-binary-7.3.4+deb13-arm64-16k",
            "linux-image-7.3.4+deb13-arm64-16k-dbg",
            "linux-binary-7.3.3-cloud-arm64",
        ]
        .map(str::to_owned);
        let newest_of = |version| newest(&names, version, Arch::Aarch64).ok().map(|package| package.release);
        assert_eq!(newest_of("7-16k").as_deref(), Some("7.3.4+deb13-arm64-16k"));
        assert_eq!(newest_of("7").as_deref(), Some("7.3.3-cloud-arm64"));
        assert_eq!(newest_of("7-64k"), None);
    }

    /// Where a release is in two packages, the one with the image is taken; the one that is not signed is not.
    #[test]
    fn package_with_the_image() {
        let names = [
            "linux-image-7.3.4+deb13-cloud-amd64",
            "linux-binary-7.3.4+deb13-cloud-amd64",
            "linux-binary-unsigned-7.3.4+deb13-cloud-amd64",
        ];
        assert_eq!(newest_of("7", &names).as_deref(), Some("linux-binary-7.3.4+deb13-cloud-amd64"));
    }

    /// Without a wish all that is promised is booted; with one, only that, also a kernel that is not promised.
    #[test]
    fn choice() {
        let chosen = |versions: &[&str], archs: &[Arch]| -> Vec<(&str, String)> {
            let versions: Vec<String> = versions.iter().map(|version| (*version).to_owned()).collect();
            Kernel::choose(&versions, archs).into_iter().map(|k| (k.arch.name(), k.version)).collect()
        };
        assert_eq!(chosen(&[], &[]).len(), 10);
        assert_eq!(chosen(&["6.16"], &[]), [("x86_64", "6.16".to_owned())]);
        assert_eq!(
            chosen(&["6.1", "6.19"], &[Arch::Aarch64]),
            [("aarch64", "6.1".to_owned()), ("aarch64", "6.19".to_owned())]
        );
        let ends: Vec<String> = Kernel::ends().into_iter().map(|kernel| kernel.version).collect();
        assert_eq!(ends, ["5.10", "7"]);
    }
}

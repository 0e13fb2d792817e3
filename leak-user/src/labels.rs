//! What a process is part of: its control group, container, pod and systemd unit, and its pid inside its own namespace. All
//! of it is read off the text of `/proc/PID/cgroup` and `/proc/PID/status`; no container runtime is asked.
//!
//! Who may make control groups chooses their names, so the text is untrusted: bounded in length, carried as it is, and made
//! printable by whoever prints it. What is not recognised is `None`, never an error.

use std::fs::File;
use std::io::Read as _;

/// Bytes of a `/proc` file that are looked at. A path has at most 4096, and there are about a dozen lines.
const MAX_FILE: u64 = 64 << 10;
/// Bytes of a control group's path that are kept (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// Bytes of a name that are kept: a folder's name has no more (`NAME_MAX`).
const MAX_NAME: usize = 255;

/// Who made a container, as far as the control group's name tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Runtime {
    Docker,
    Containerd,
    CriO,
    Podman,
    Lxc,
    Nspawn,
    /// A pod's container whose group is named by its id alone (the cgroupfs driver).
    Unnamed,
}

impl Runtime {
    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Containerd => "containerd",
            Self::CriO => "cri-o",
            Self::Podman => "podman",
            Self::Lxc => "lxc",
            Self::Nspawn => "systemd-nspawn",
            Self::Unnamed => "container",
        }
    }
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Container {
    pub runtime: Runtime,
    /// Hexadecimal, at most 64 digits; for LXC and systemd-nspawn the container's name, at most 255 bytes.
    pub id: String,
}

/// What a process is part of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// At most 4096 bytes.
    pub cgroup: Option<String>,
    /// The innermost, where containers run in containers.
    pub container: Option<Container>,
    /// The innermost pod's uid, as Kubernetes shows it.
    pub pod: Option<String>,
    /// The innermost service or scope, with its escapes decoded.
    pub unit: Option<String>,
    /// Its pid as the process itself sees it, if it is in a pid namespace below that of `/proc`.
    pub inner_pid: Option<u32>,
}

impl Labels {
    /// Those of a process now. `pid` is of a thread that has not ended ([`crate::process::Process::through`]).
    pub fn read(pid: u32) -> Self {
        Self::parse(&start_of(&format!("/proc/{pid}/cgroup")), &start_of(&format!("/proc/{pid}/status")))
    }

    /// From the text of `/proc/PID/cgroup` and `/proc/PID/status`.
    pub fn parse(cgroup: &str, status: &str) -> Self {
        let groups: Vec<Group> = cgroup.lines().filter_map(Group::parse).collect();
        let shown = shown(&groups);
        // With version 1 beside version 2, containers may be in one hierarchy only; the shown one is asked first.
        let paths = || shown.into_iter().chain(groups.iter().map(|group| group.path));
        // systemd's own hierarchy, if it has one, is where it names its units.
        let systemd = groups.iter().find(|group| group.controllers == "name=systemd").map(|group| group.path);
        Self {
            cgroup: shown.map(|path| bounded(path, MAX_PATH)),
            container: paths().find_map(container),
            pod: paths().find_map(pod),
            unit: systemd.into_iter().chain(shown).find_map(unit),
            inner_pid: inner_pid(status),
        }
    }
}

/// The start of a file, or nothing. Bytes that are no UTF-8 are replaced.
fn start_of(path: &str) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    if read.is_ok() { String::from_utf8_lossy(&bytes).into_owned() } else { String::new() }
}

/// A line of `/proc/PID/cgroup`, see cgroups(7).
struct Group<'a> {
    unified: bool,
    controllers: &'a str,
    path: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        // Only the path, the last part, may have colons in it.
        let mut parts = line.splitn(3, ':');
        let (hierarchy, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        // The kernel says so after the name of a group that was removed while the process was ending.
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        path.starts_with('/').then_some(Self { unified: hierarchy == "0", controllers, path })
    }
}

/// The path to show: of the unified hierarchy, unless only another one groups processes.
fn shown<'a>(groups: &[Group<'a>]) -> Option<&'a str> {
    let unified = groups.iter().find(|group| group.unified);
    let memory = groups.iter().find(|group| group.controllers.split(',').any(|name| name == "memory"));
    let named = [unified, memory].into_iter().flatten().chain(groups).find(|group| group.path != "/");
    named.or(unified).or(groups.first()).map(|group| group.path)
}

fn bounded(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}

/// The innermost container of a path.
fn container(path: &str) -> Option<Container> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    (0..parts.len()).rev().find_map(|at| container_at(&parts, at))
}

/// The container that the part of a path stands for.
fn container_at(parts: &[&str], at: usize) -> Option<Container> {
    let part = parts[at];
    let above = |distance: usize| at.checked_sub(distance).map_or("", |at| parts[at]);
    let made = |runtime, id: &str| Some(Container { runtime, id: bounded(id, MAX_NAME) });
    let name = part.strip_suffix(".scope").unwrap_or(part);
    for (prefix, runtime) in [
        ("docker-", Runtime::Docker),
        ("cri-containerd-", Runtime::Containerd),
        ("nerdctl-", Runtime::Containerd),
        ("crio-", Runtime::CriO),
        ("libpod-payload-", Runtime::Podman),
        ("libpod-", Runtime::Podman),
    ] {
        // Not libpod-conmon-ID and crio-conmon-ID: the container's monitor runs beside it, on the host.
        if let Some(id) = name.strip_prefix(prefix).filter(|id| is_id(id)) {
            return made(runtime, id);
        }
    }
    // containerd told to use systemd's driver where runc does not: POD.slice:cri-containerd:ID.
    let mut colons = part.rsplitn(3, ':');
    if let (Some(id), Some(runtime), Some(_)) = (colons.next(), colons.next(), colons.next())
        && is_id(id)
    {
        return match runtime {
            "cri-containerd" | "nerdctl" => made(Runtime::Containerd, id),
            "docker" => made(Runtime::Docker, id),
            "crio" => made(Runtime::CriO, id),
            "libpod" => made(Runtime::Podman, id),
            _ => made(Runtime::Unnamed, id),
        };
    }
    if is_id(part) {
        // Amazon's ECS has Docker's containers below its tasks.
        if above(1) == "docker" || above(2) == "ecs" {
            return made(Runtime::Docker, part);
        }
        if pod_uid(above(1)).is_some() {
            return made(Runtime::Unnamed, part);
        }
    }
    if let Some(machine) = part.strip_prefix("machine-").and_then(|rest| rest.strip_suffix(".scope")) {
        let machine = unescaped(machine);
        // libvirt registers its guests as machines too: a virtual machine is no container.
        return match (machine.starts_with("qemu-"), machine.strip_prefix("lxc-")) {
            (true, _) => None,
            (_, Some(lxc)) => made(Runtime::Lxc, lxc),
            _ => made(Runtime::Nspawn, &machine),
        };
    }
    if let Some(machine) = part.strip_prefix("systemd-nspawn@").and_then(|rest| rest.strip_suffix(".service")) {
        return made(Runtime::Nspawn, &unescaped(machine));
    }
    let lxc = part.strip_prefix("lxc.payload.").or((above(1) == "lxc").then_some(part));
    lxc.filter(|name| !name.is_empty()).and_then(|name| made(Runtime::Lxc, name))
}

/// Whether it is a container's id and no word that happens to look like one.
fn is_id(text: &str) -> bool {
    (12..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// The uid of the innermost pod of a path.
fn pod(path: &str) -> Option<String> {
    path.split('/').rev().find_map(pod_uid)
}

/// From `podUID` (cgroupfs driver) or `kubepods-CLASS-podUID.slice` (systemd driver, which has underscores for dashes).
fn pod_uid(part: &str) -> Option<String> {
    let name = part.split_once(".slice").map_or(part, |(name, _)| name);
    let uid = match name.rsplit_once("-pod") {
        Some((above, uid)) if above.contains("kubepods") => uid,
        _ => name.strip_prefix("pod")?,
    };
    let uid = uid.replace('_', "-");
    let hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_uuid = uid.split('-').map(str::len).eq([8, 4, 4, 4, 12]) && uid.split('-').all(hex);
    // Pods from files on the node have a hash instead.
    (is_uuid || (uid.len() == 32 && hex(&uid))).then_some(uid)
}

/// The innermost service or scope of a path.
fn unit(path: &str) -> Option<String> {
    let part = path.split('/').rev().find(|part| {
        let stem = part.strip_suffix(".service").or(part.strip_suffix(".scope"));
        stem.is_some_and(|stem| !stem.is_empty())
    })?;
    // systemd puts an underscore before names that the kernel could take for its own files (cg_escape).
    Some(bounded(&unescaped(part.strip_prefix('_').unwrap_or(part)), MAX_NAME))
}

/// Decodes `\xNN` of unit names, see systemd-escape(1). An incomplete escape stays as it is.
fn unescaped(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = rest.strip_prefix(b"\\x").and_then(|digits| digits.get(..2));
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let code = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        if let Some(code) = code {
            bytes.push(code);
            rest = &rest[4..];
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last number of `NSpid`, which has one for each namespace from that of `/proc` inwards, see `proc_pid_status(5)`.
fn inner_pid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let mut pids = line.split_ascii_whitespace();
    pids.next()?;
    pids.last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4b1ae0e2c8a94d5f9f8f6f2b3f6f7c9f0f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c";
    const OUTER: &str = "00ffee2c8a94d5f9f8f6f2b3f6f7c9f0f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c1";
    const UID: &str = "1f0a9c3e-6d2b-4a7e-9c51-0d8e7f6a5b4c";
    const SLICE_UID: &str = "1f0a9c3e_6d2b_4a7e_9c51_0d8e7f6a5b4c";
    const HASH: &str = "d41d8cd98f00b204e9800998ecf8427e";

    type Expected<'a> = (Option<(Runtime, &'a str)>, Option<&'a str>, Option<&'a str>);

    /// The shapes of paths that runtimes, Kubernetes and systemd make give container, pod and unit.
    #[test]
    fn shapes() {
        use Runtime::{Containerd, CriO, Docker, Lxc, Nspawn, Podman, Unnamed};
        // ID, OUTER, UID, SLICE and HASH stand for the constants.
        let cases: &[(&str, Expected)] = &[
            ("0::/", (None, None, None)),
            ("0::/init.scope", (None, None, Some("init.scope"))),
            ("0::/system.slice/ssh.service", (None, None, Some("ssh.service"))),
            ("0::/system.slice/system-getty.slice/getty@tty1.service", (None, None, Some("getty@tty1.service"))),
            (r"0::/system.slice/system-a\x2db.slice/a\x2db@0.service", (None, None, Some("a-b@0.service"))),
            ("0::/system.slice/_cpu.service", (None, None, Some("cpu.service"))),
            ("0::/user.slice/user-1000.slice/session-3.scope", (None, None, Some("session-3.scope"))),
            (
                r"0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome\x2dx-71.scope",
                (None, None, Some("app-gnome-x-71.scope")),
            ),
            ("0::/user.slice/user-0.slice/user@0.service/init.scope (deleted)", (None, None, Some("init.scope"))),
            ("12:memory:/docker/ID\n1:name=systemd:/docker/ID\n0::/", (Some((Docker, ID)), None, None)),
            (
                "5:memory:/docker/ID\n1:name=systemd:/docker/ID\n0::/system.slice/containerd.service",
                (Some((Docker, ID)), None, Some("containerd.service")),
            ),
            ("0::/system.slice/docker-ID.scope", (Some((Docker, ID)), None, Some("docker-ID.scope"))),
            ("0::/system.slice/docker-ID.scope/init", (Some((Docker, ID)), None, Some("docker-ID.scope"))),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope",
                (Some((Docker, ID)), None, Some("docker-ID.scope")),
            ),
            ("4:memory:/ecs/HASH/ID", (Some((Docker, ID)), None, None)),
            ("0::/docker/OUTER/docker/ID", (Some((Docker, ID)), None, None)),
            ("0::/docker/OUTER/system.slice/cron.service", (Some((Docker, OUTER)), None, Some("cron.service"))),
            ("0::/docker/buildkit/k1v2x8s9f3", (None, None, None)),
            ("9:cpu,memory:/kubepods/burstable/podUID/ID", (Some((Unnamed, ID)), Some(UID), None)),
            ("0::/kubepods/podUID/ID", (Some((Unnamed, ID)), Some(UID), None)),
            ("0::/kubepods/burstable/podHASH/ID", (Some((Unnamed, ID)), Some(HASH), None)),
            ("0::/kubepods/besteffort/podUID", (None, Some(UID), None)),
            (
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podSLICE.slice/cri-containerd-ID.scope",
                (Some((Containerd, ID)), Some(UID), Some("cri-containerd-ID.scope")),
            ),
            (
                "0::/kubepods.slice/kubepods-podSLICE.slice/docker-ID.scope",
                (Some((Docker, ID)), Some(UID), Some("docker-ID.scope")),
            ),
            (
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podSLICE.slice/crio-ID.scope/container",
                (Some((CriO, ID)), Some(UID), Some("crio-ID.scope")),
            ),
            (
                "0::/kubepods.slice/kubepods-podSLICE.slice/crio-conmon-ID.scope",
                (None, Some(UID), Some("crio-conmon-ID.scope")),
            ),
            (
                "3:memory:/system.slice/containerd.service/kubepods-burstable-podSLICE.slice:cri-containerd:ID",
                (Some((Containerd, ID)), Some(UID), Some("containerd.service")),
            ),
            (
                "0::/docker/OUTER/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podSLICE.slice/cri-containerd-ID.scope",
                (Some((Containerd, ID)), Some(UID), Some("cri-containerd-ID.scope")),
            ),
            ("0::/system.slice/nerdctl-ID.scope", (Some((Containerd, ID)), None, Some("nerdctl-ID.scope"))),
            ("0::/machine.slice/libpod-ID.scope/container", (Some((Podman, ID)), None, Some("libpod-ID.scope"))),
            ("0::/machine.slice/libpod-conmon-ID.scope", (None, None, Some("libpod-conmon-ID.scope"))),
            ("7:memory:/libpod_parent/libpod-ID", (Some((Podman, ID)), None, None)),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/user.slice/podman-9.scope/libpod-payload-ID",
                (Some((Podman, ID)), None, Some("podman-9.scope")),
            ),
            (
                r"0::/machine.slice/machine-web\x2d1.scope/payload",
                (Some((Nspawn, "web-1")), None, Some("machine-web-1.scope")),
            ),
            (
                "0::/machine.slice/systemd-nspawn@web.service/payload/system.slice/cron.service",
                (Some((Nspawn, "web")), None, Some("cron.service")),
            ),
            (
                r"0::/machine.slice/machine-qemu\x2d1\x2dvm.scope/libvirt/emulator",
                (None, None, Some("machine-qemu-1-vm.scope")),
            ),
            ("4:memory:/lxc/web", (Some((Lxc, "web")), None, None)),
            ("0::/lxc.payload.web/init.scope", (Some((Lxc, "web")), None, Some("init.scope"))),
        ];
        let filled = |text: &str| {
            [("ID", ID), ("OUTER", OUTER), ("SLICE", SLICE_UID), ("HASH", HASH)]
                .iter()
                .fold(text.replace("podUID", &format!("pod{UID}")), |text, (name, value)| text.replace(name, value))
        };
        for (text, (container, pod, unit)) in cases {
            let labels = Labels::parse(&filled(text), "");
            let found = labels.container.as_ref().map(|found| (found.runtime, found.id.as_str()));
            assert_eq!(found, *container, "{text}");
            assert_eq!(labels.pod.as_deref(), *pod, "{text}");
            assert_eq!(labels.unit, unit.map(filled), "{text}");
        }
    }

    /// The path is the unified hierarchy's, unless that does not group the process.
    #[test]
    fn the_path_that_is_shown() {
        let cgroup = |text| Labels::parse(text, "").cgroup;
        assert_eq!(cgroup("3:cpu:/a\n2:memory:/b\n0::/c").as_deref(), Some("/c"));
        assert_eq!(cgroup("3:cpu:/a\n2:cpuset,memory:/b\n0::/").as_deref(), Some("/b"));
        assert_eq!(cgroup("3:cpu:/a:b\n2:memory:/").as_deref(), Some("/a:b"));
        assert_eq!(cgroup("0::/a (deleted)").as_deref(), Some("/a"));
        assert_eq!(cgroup("3:cpu:/\n0::/").as_deref(), Some("/"));
    }

    /// Text that is none of this, or endless, gives bounded labels or none.
    #[test]
    fn untrusted_text() {
        for text in ["", "\n\n", "0", "0:", "0::", "::", "0::relative", "\u{fffd}", "0:::::"] {
            assert_eq!(Labels::parse(text, text), Labels::default(), "{text:?}");
        }
        let long = "ü".repeat(10_000);
        let labels = Labels::parse(&format!("0::/lxc/{long}/{long}.service"), &format!("NSpid:\t1\t{long}"));
        assert_eq!(labels.cgroup.map(|path| path.len()), Some(4095));
        assert_eq!(labels.unit.map(|unit| unit.len()), Some(254));
        assert_eq!(labels.container.map(|container| container.id.len()), Some(254));
        assert_eq!(labels.inner_pid, None);
        assert_eq!(unit(r"/a\x.service"), Some(r"a\x.service".to_owned()));
        assert_eq!(unit(r"/a\x2"), None);
        assert_eq!(unit("/.service/.scope"), None);
    }

    /// Only a process in an inner pid namespace has an inner pid, and of several the innermost.
    #[test]
    fn inner_pids() {
        assert_eq!(inner_pid("Name:\tx\nNSpid:\t77\nNSpgid:\t9\t1\n"), None);
        assert_eq!(inner_pid("NStgid:\t77\t2\nNSpid:\t77\t12\t1\n"), Some(1));
        assert_eq!(inner_pid("NSpid:\t77\tx\n"), None);
    }

    /// This process can be labelled with what the kernel says of it, and one that does not exist has no labels.
    #[test]
    fn of_living_processes() {
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let labels = Labels::read(std::process::id());
        let cgroup = labels.cgroup.expect("every process is in a control group");
        assert!(text.contains(&format!(":{cgroup}")), "{cgroup} is in {text}");
        assert_eq!(Labels::read(u32::MAX), Labels::default());
    }
}

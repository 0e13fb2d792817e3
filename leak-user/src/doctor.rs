//! What this host can do: each thing that tracing needs, whether it is there, and what to do where it is not. The same
//! checks run before every trace. [`Facts`] is gathered in one place, so that [`checks`] is a plain function of it.

use std::fmt;
use std::fs;
use std::io::{self, Write};

use nix::sys::utsname::uname;

use crate::attach::{Abilities, LinkSupport, MappingHook, StackWalk, UprobeKind};
use crate::view::safe;

/// Where the kernel's type information stands.
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// The perf event source of uprobes: there exactly when the kernel has them (`CONFIG_UPROBE_EVENTS`).
const UPROBES: &str = "/sys/bus/event_source/devices/uprobe/type";
/// Oldest kernel: `BPF_MAP_TYPE_RINGBUF` is 5.8; running raw tracepoint programs on demand, and programs that have both functions
/// and tail calls, 5.10.
const OLDEST: (u32, u32) = (5, 10);

/// Bits of the effective capability set (include/uapi/linux/capability.h).
const CAPABILITIES: [(&str, u32); 6] = [
    ("CAP_SYS_ADMIN", 21),
    ("CAP_SYS_PTRACE", 19),
    ("CAP_PERFMON", 38),
    ("CAP_BPF", 39),
    ("CAP_CHECKPOINT_RESTORE", 40),
    ("CAP_DAC_READ_SEARCH", 2),
];

/// What was found out about the host; `None` where it could not be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Major, minor.
    pub kernel: Option<(u32, u32)>,
    /// Effective capabilities of this process, as bits.
    pub capabilities: u64,
    pub btf: bool,
    pub uprobes: bool,
    pub tracefs_mounted: bool,
    /// `none`, `integrity` or `confidentiality`.
    pub lockdown: Option<String>,
    /// Soft limit of locked memory, bytes; `None` is unlimited.
    pub memlock: Option<u64>,
    pub perf_event_paranoid: Option<i32>,
    pub unprivileged_bpf_disabled: Option<i32>,
    /// Whether pids here are those of the initial pid namespace.
    pub initial_pid_namespace: Option<bool>,
    /// Whether capabilities here are those that the kernel asks for.
    pub initial_user_namespace: Option<bool>,
    pub ptrace_scope: Option<i32>,
    pub bpf_jit_enable: Option<i32>,
    /// `None` where links cannot be tried, for want of permission.
    pub links: Option<LinkSupport>,
    /// The same.
    pub abilities: Option<Abilities>,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    /// Works, but less well.
    Warn,
    /// Tracing cannot work.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub name: &'static str,
    pub status: Status,
    pub detail: String,
    /// What to do about it.
    pub remedy: Option<&'static str>,
}

impl Check {
    fn new(name: &'static str, status: Status, detail: impl Into<String>, remedy: &'static str) -> Self {
        let remedy = (status != Status::Ok).then_some(remedy);
        Self { name, status, detail: detail.into(), remedy }
    }
}

/// What keeps this host from being traced.
#[derive(Debug, PartialEq, Eq)]
pub struct Blocked(Vec<Check>);

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, check) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", check.name, check.detail)?;
            if let Some(remedy) = check.remedy {
                write!(f, " ({remedy})")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Blocked {}

/// The check before every trace.
pub fn require() -> Result<(), Blocked> {
    blocking(&Facts::gather(false))
}

fn blocking(facts: &Facts) -> Result<(), Blocked> {
    let missing: Vec<Check> = checks(facts).into_iter().filter(|check| check.status == Status::Missing).collect();
    if missing.is_empty() { Ok(()) } else { Err(Blocked(missing)) }
}

/// `leaktrace doctor`: prints the checks. Whether nothing that is needed is missing.
pub fn run(out: &mut impl Write) -> io::Result<bool> {
    print(out, &checks(&Facts::gather(true)))
}

fn print(out: &mut impl Write, checks: &[Check]) -> io::Result<bool> {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for check in checks {
        let mark = match check.status {
            Status::Ok => "ok     ",
            Status::Warn => "warn   ",
            Status::Missing => "MISSING",
        };
        writeln!(out, "{mark}  {:width$}  {}", check.name, safe(&check.detail))?;
        if let Some(remedy) = check.remedy {
            writeln!(out, "         {:width$}  -> {remedy}", "")?;
        }
    }
    let ready = checks.iter().all(|check| check.status != Status::Missing);
    writeln!(out, "\n{}", if ready { "This host can be traced." } else { "This host cannot be traced yet." })?;
    out.flush()?;
    Ok(ready)
}

impl Facts {
    /// Looks at this host. With `probe` it also tries which links the kernel makes, which takes some milliseconds.
    pub fn gather(probe: bool) -> Self {
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<i32>().ok();
        let mut facts = Self {
            kernel: uname().ok().and_then(|names| parse_release(&names.release().to_string_lossy())),
            capabilities: capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default()),
            btf: fs::metadata(BTF).is_ok(),
            uprobes: fs::metadata(UPROBES).is_ok(),
            tracefs_mounted: fs::read_to_string("/proc/mounts")
                .is_ok_and(|mounts| mounts.lines().any(|mount| mount.split(' ').nth(2) == Some("tracefs"))),
            lockdown: fs::read_to_string("/sys/kernel/security/lockdown").ok().and_then(|text| lockdown(&text)),
            memlock: memlock(),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            unprivileged_bpf_disabled: number("/proc/sys/kernel/unprivileged_bpf_disabled"),
            initial_pid_namespace: initial_pid_namespace(),
            initial_user_namespace: fs::read_to_string("/proc/self/uid_map").ok().map(|map| maps_everyone(&map)),
            ptrace_scope: number("/proc/sys/kernel/yama/ptrace_scope"),
            bpf_jit_enable: number("/proc/sys/net/core/bpf_jit_enable"),
            links: None,
            abilities: None,
        };
        if probe && facts.may_load() {
            facts.links = Some(LinkSupport::probe());
            facts.abilities = Some(Abilities::probe());
        }
        facts
    }

    /// Whether a capability is held over the host; in another user namespace none is.
    fn has(&self, capability: &str) -> bool {
        let counts = self.initial_user_namespace != Some(false);
        counts && CAPABILITIES.iter().any(|(name, bit)| *name == capability && self.capabilities >> bit & 1 == 1)
    }

    /// Whether a capability is held, or the one that stood for it before it was split off (5.8, 5.9).
    fn stands_for(&self, capability: &str) -> bool {
        self.has(capability) || (capability != "CAP_SYS_PTRACE" && self.has("CAP_SYS_ADMIN"))
    }

    /// Whether BPF programs can be loaded and attached.
    fn may_load(&self) -> bool {
        self.stands_for("CAP_BPF") && self.stands_for("CAP_PERFMON")
    }
}

/// All checks, in the order in which they matter.
pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![privileges(facts), mapped_files(facts), kernel(facts)];
    checks.push(Check::new(
        "uprobes",
        if facts.uprobes { Status::Ok } else { Status::Missing },
        if facts.uprobes { "the kernel has them".to_owned() } else { format!("{UPROBES} is not there") },
        "use a kernel with CONFIG_UPROBE_EVENTS=y, as all distributions' are, and mount sysfs",
    ));
    checks.push(links(facts));
    checks.extend(facts.abilities.into_iter().flat_map(abilities));
    checks.push(Check::new(
        "BTF",
        if facts.btf { Status::Ok } else { Status::Missing },
        if facts.btf { BTF.to_owned() } else { format!("{BTF} is not there") },
        "use a kernel with CONFIG_DEBUG_INFO_BTF=y",
    ));
    checks.push(match facts.lockdown.as_deref() {
        Some("confidentiality") => Check::new(
            "lockdown",
            Status::Missing,
            "confidentiality: BPF programs may not read memory",
            "boot with lockdown=integrity or without",
        ),
        mode => Check::new("lockdown", Status::Ok, mode.unwrap_or("not in this kernel"), ""),
    });
    checks.push(memory_limit(facts));
    checks.push(match facts.initial_pid_namespace {
        Some(false) => Check::new(
            "pid namespace",
            Status::Missing,
            "not the initial one: pids here are not the kernel's",
            "run on the host, or in a container with the host's pid namespace (hostPID: true, --pid=host)",
        ),
        Some(true) => Check::new("pid namespace", Status::Ok, "the initial one", ""),
        None => Check::new("pid namespace", Status::Ok, "not known", ""),
    });
    // Only what is out of the ordinary: neither is there on every kernel, and neither is needed.
    if facts.bpf_jit_enable == Some(0) {
        checks.push(Check::new(
            "BPF compiler",
            Status::Warn,
            "off: each probe costs the target several times more",
            "sysctl net.core.bpf_jit_enable=1",
        ));
    }
    if facts.ptrace_scope.is_some_and(|scope| scope >= 3) {
        checks.push(Check::new(
            "ptrace",
            Status::Warn,
            "off (kernel.yama.ptrace_scope is 3): -p PID works, -- COMMAND cannot start a program",
            "boot with a lower kernel.yama.ptrace_scope; 3 cannot be taken back while running",
        ));
    }
    let tracefs = if facts.tracefs_mounted { "mounted" } else { "not mounted" };
    checks.push(Check::new("tracefs", Status::Ok, format!("{tracefs}; not needed (raw tracepoints)"), ""));
    for (name, value) in [
        ("perf_event_paranoid", facts.perf_event_paranoid),
        ("unprivileged_bpf_disabled", facts.unprivileged_bpf_disabled),
    ] {
        let value = value.map_or_else(|| "not in this kernel".to_owned(), |value| value.to_string());
        checks.push(Check::new(name, Status::Ok, format!("{value}; does not matter with CAP_BPF and CAP_PERFMON"), ""));
    }
    checks
}

fn privileges(facts: &Facts) -> Check {
    let held: Vec<&str> = CAPABILITIES.iter().map(|(name, _)| *name).filter(|name| facts.has(name)).collect();
    if facts.initial_user_namespace == Some(false) {
        return Check::new(
            "privileges",
            Status::Missing,
            "no permission to trace: in a user namespace, whose root has no rights over the kernel",
            "run as root outside of it; a rootless container cannot trace",
        );
    }
    let remedy = "run with sudo, or grant CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE";
    if facts.may_load() && facts.has("CAP_SYS_PTRACE") && !facts.has("CAP_SYS_ADMIN") {
        // It is what the kernel asks for where a perf event places a breakpoint.
        Check::new(
            "privileges",
            Status::Warn,
            format!("{}: a process is not followed further when its first thread ends before others", held.join(", ")),
            "grant CAP_SYS_ADMIN for that",
        )
    } else if facts.may_load() && facts.has("CAP_SYS_PTRACE") {
        Check::new("privileges", Status::Ok, held.join(", "), remedy)
    } else if held.is_empty() {
        Check::new("privileges", Status::Missing, "no permission to trace: no capability of those needed", remedy)
    } else {
        let needed = ["CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"];
        let missing: Vec<&str> = needed.into_iter().filter(|name| !facts.stands_for(name)).collect();
        let detail = format!("no permission to trace: {} missing, only {} held", missing.join(", "), held.join(", "));
        Check::new("privileges", Status::Missing, detail, remedy)
    }
}

/// How files of traced processes are opened.
fn mapped_files(facts: &Facts) -> Check {
    // The first opens what is in `map_files`, the second that folder, which belongs to the user of the process, and what only he may
    // read.
    if facts.stands_for("CAP_CHECKPOINT_RESTORE") && facts.has("CAP_DAC_READ_SEARCH") {
        return Check::new("mapped files", Status::Ok, "whatever became of their names (map_files)", "");
    }
    Check::new(
        "mapped files",
        Status::Warn,
        "by their names, as far as all may read them: libraries that were deleted or replaced since they were loaded are not traced",
        "grant CAP_CHECKPOINT_RESTORE and CAP_DAC_READ_SEARCH too",
    )
}

fn kernel(facts: &Facts) -> Check {
    let remedy = "use Linux 5.10 or newer";
    match facts.kernel {
        Some((major, minor)) if (major, minor) < OLDEST => {
            Check::new("kernel", Status::Missing, format!("{major}.{minor} lacks what the programs use"), remedy)
        }
        Some((major, minor)) => Check::new("kernel", Status::Ok, format!("{major}.{minor}"), remedy),
        None => Check::new("kernel", Status::Warn, "release not known", remedy),
    }
}

fn links(facts: &Facts) -> Check {
    let Some(links) = facts.links else {
        return Check::new("probe links", Status::Ok, "not tried", "");
    };
    match links.best() {
        UprobeKind::Session => Check::new("probe links", Status::Ok, "session (one link a file, entry and return)", ""),
        UprobeKind::Multi => Check::new("probe links", Status::Ok, "multi-uprobe (two links a file)", ""),
        UprobeKind::Perf => Check::new(
            "probe links",
            Status::Warn,
            "perf events, one a place; attaching and detaching take longer, and other processes of a traced file may pay",
            "Linux 6.6 has multi-uprobe links, 6.13 session links",
        ),
    }
}

/// How the programs do what newer kernels make cheaper: nothing to mend, but it explains what a trace costs.
fn abilities(abilities: Abilities) -> [Check; 4] {
    let mapping_calls = match abilities.mapping_hook {
        MappingHook::Functions => "at the kernel's functions (fentry)",
        MappingHook::TypedTracepoints | MappingHook::Tracepoints | MappingHook::NotAtAll => {
            "at the tracepoints of all system calls, since fentry is refused; each allocation costs somewhat more \
             (--resource heap does without)"
        }
    };
    let walk = match abilities.walk {
        StackWalk::Loop => "in one program (bpf_loop)",
        StackWalk::TailCalls => "by tail calls; Linux 5.17 has bpf_loop",
        StackWalk::PlainLoop => "by frame pointers only, in one program; Linux 5.17 has bpf_loop",
    };
    let ring = if abilities.own_ring {
        "our own (atomic operations with a result)"
    } else {
        "the kernel's; Linux 5.12 has what our own, cheaper one needs"
    };
    let threads = if abilities.map_allocator {
        "grows with the threads"
    } else {
        "30 MiB in advance, for 4,096 threads beyond the common 512; Linux 6.1 lets it grow"
    };
    [("mapping calls", mapping_calls), ("stack walk", walk), ("ring buffer", ring), ("thread table", threads)]
        .map(|(name, detail)| Check::new(name, Status::Ok, detail, ""))
}

fn memory_limit(facts: &Facts) -> Check {
    let counted = facts.kernel.is_some_and(|kernel| kernel < (5, 11));
    match facts.memlock {
        Some(bytes) if counted && bytes < 64 << 20 && !facts.has("CAP_SYS_ADMIN") => Check::new(
            "locked memory",
            Status::Missing,
            format!("limit of {bytes} bytes, which BPF maps count against before Linux 5.11"),
            "raise it: ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        ),
        Some(bytes) => Check::new("locked memory", Status::Ok, format!("limit of {bytes} bytes; enough"), ""),
        None => Check::new("locked memory", Status::Ok, "unlimited", ""),
    }
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn capabilities(status: &str) -> u64 {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// The mode in brackets: `none [integrity] confidentiality`.
fn lockdown(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Whether a `uid_map` is that of the initial user namespace.
fn maps_everyone(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn memlock() -> Option<u64> {
    use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
    getrlimit(Resource::RLIMIT_MEMLOCK).ok().map(|(soft, _)| soft).filter(|soft| *soft != RLIM_INFINITY)
}

/// The initial pid namespace has a fixed inode (`PROC_PID_INIT_INO`, `include/linux/proc_ns.h`).
fn initial_pid_namespace() -> Option<bool> {
    let link = fs::read_link("/proc/self/ns/pid").ok()?;
    Some(link.to_string_lossy() == "pid:[4026531836]")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Facts {
        Facts {
            kernel: Some((6, 12)),
            capabilities: u64::MAX,
            btf: true,
            uprobes: true,
            tracefs_mounted: false,
            lockdown: Some("none".to_owned()),
            memlock: None,
            perf_event_paranoid: Some(2),
            unprivileged_bpf_disabled: Some(2),
            initial_pid_namespace: Some(true),
            initial_user_namespace: Some(true),
            ptrace_scope: Some(1),
            bpf_jit_enable: Some(1),
            links: Some(LinkSupport { multi: true, session: false }),
            abilities: Some(Abilities {
                walk: StackWalk::Loop,
                own_ring: true,
                map_allocator: true,
                mapping_hook: MappingHook::Functions,
            }),
        }
    }

    /// A host that has everything passes, without tracefs too.
    #[test]
    fn healthy_host() {
        assert_eq!(blocking(&healthy()), Ok(()));
        assert!(checks(&healthy()).iter().all(|check| check.status == Status::Ok && check.remedy.is_none()));
    }

    /// Each missing thing blocks, is named, and comes with what to do.
    #[test]
    fn each_missing_thing_is_named_with_its_remedy() {
        let cases: [(&str, Facts); 8] = [
            ("privileges", Facts { capabilities: 0, ..healthy() }),
            ("privileges", Facts { capabilities: 1 << 39, ..healthy() }),
            ("privileges", Facts { initial_user_namespace: Some(false), ..healthy() }),
            ("pid namespace", Facts { initial_pid_namespace: Some(false), ..healthy() }),
            ("kernel", Facts { kernel: Some((5, 4)), ..healthy() }),
            ("uprobes", Facts { uprobes: false, ..healthy() }),
            ("BTF", Facts { btf: false, ..healthy() }),
            ("lockdown", Facts { lockdown: Some("confidentiality".to_owned()), ..healthy() }),
        ];
        for (name, facts) in cases {
            let blocked = blocking(&facts).expect_err(name);
            assert_eq!(blocked.0.len(), 1, "{blocked}");
            assert_eq!(blocked.0[0].name, name);
            assert!(blocked.0[0].remedy.is_some_and(|remedy| blocked.to_string().contains(remedy)), "{blocked}");
        }
    }

    /// What is missing of the capabilities is named, and what mapped files need is only a warning.
    #[test]
    fn missing_capabilities_are_named() {
        let facts = Facts { capabilities: 1 << 38 | 1 << 39, ..healthy() };
        let text = blocking(&facts).expect_err("no ptrace").to_string();
        assert!(text.contains("CAP_SYS_PTRACE missing, only CAP_PERFMON, CAP_BPF held"), "{text}");
        let files = |capabilities| mapped_files(&Facts { capabilities, ..healthy() });
        assert_eq!(files(1 << 19 | 1 << 38 | 1 << 39).status, Status::Warn);
        assert_eq!(files(1 << 40).status, Status::Warn);
        assert_eq!(files(1 << 40 | 1 << 2).status, Status::Ok);
        assert_eq!(files(1 << 21 | 1 << 2).status, Status::Ok);
    }

    /// The capabilities that take root's place are enough.
    #[test]
    fn capabilities_instead_of_root() {
        let facts = Facts { capabilities: 1 << 19 | 1 << 38 | 1 << 39, ..healthy() };
        assert_eq!(blocking(&facts), Ok(()));
    }

    /// Old kernels' links work, with a warning.
    #[test]
    fn perf_links_are_a_warning() {
        let facts = Facts { links: Some(LinkSupport { multi: false, session: false }), ..healthy() };
        assert_eq!(blocking(&facts), Ok(()));
        assert!(checks(&facts).iter().any(|check| check.name == "probe links" && check.status == Status::Warn));
    }

    /// What only limits tracing is told with its remedy and does not forbid it.
    #[test]
    fn limits_are_warnings() {
        for (name, facts) in [
            ("BPF compiler", Facts { bpf_jit_enable: Some(0), ..healthy() }),
            ("ptrace", Facts { ptrace_scope: Some(3), ..healthy() }),
            ("kernel", Facts { kernel: None, ..healthy() }),
        ] {
            assert_eq!(blocking(&facts), Ok(()));
            let mut warnings = checks(&facts).into_iter().filter(|check| check.status == Status::Warn);
            assert!(warnings.next().is_some_and(|check| check.name == name && check.remedy.is_some()));
            assert_eq!(warnings.next(), None);
        }
    }

    /// What is printed names each missing thing with its remedy, and what it comes to.
    #[test]
    fn printed() {
        let facts = Facts { uprobes: false, ..healthy() };
        let mut text = Vec::new();
        assert!(!print(&mut text, &checks(&facts)).unwrap());
        let text = String::from_utf8(text).unwrap();
        assert!(
            text.contains("MISSING  uprobes") && text.contains("-> use a kernel with CONFIG_UPROBE_EVENTS=y"),
            "{text}"
        );
        assert!(text.ends_with("cannot be traced yet.\n"), "{text}");
        assert!(print(&mut Vec::new(), &checks(&healthy())).unwrap());
    }

    /// A small limit of locked memory matters only where maps are counted against it.
    #[test]
    fn locked_memory_matters_on_old_kernels() {
        let facts = |kernel| Facts { memlock: Some(65536), capabilities: 1 << 19 | 3 << 38, kernel, ..healthy() };
        let is_missing = |facts: &Facts| memory_limit(facts).status == Status::Missing;
        assert!(is_missing(&facts(Some((5, 10)))));
        assert!(!is_missing(&facts(Some((5, 11)))));
    }

    /// The formats of the files that are read.
    #[test]
    fn formats() {
        assert_eq!(parse_release("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(parse_release("what"), None);
        assert!(maps_everyone("         0          0 4294967295\n") && !maps_everyone("0 1000 1\n"));
        assert_eq!(lockdown("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(capabilities("Name:\tx\nCapEff:\t000000c000080000\n"), 0xc0_0008_0000);
    }
}

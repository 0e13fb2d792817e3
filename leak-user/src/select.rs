//! Which processes of the system are meant: what `--comm`, `--exe`, `--cgroup`, `--uid`, `--container` and `--exclude` say, and
//! whether it holds for a process. Kernel threads and leaktrace itself are never meant.
//!
//! Several values of one kind are alternatives; of several kinds each must hold; what is excluded is out whatever else holds.
//! Patterns are globs over bytes: the names are chosen by the processes and need not be text.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use procfs::FromRead as _;
use procfs::process::{Stat, StatFlags};

use crate::labels::{Container, Labels};
use crate::process::Process;

/// Bytes of a process's name; the kernel cuts it there (`TASK_COMM_LEN` with its NUL).
const COMM_MAX: usize = 15;

/// What a process is selected by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessFacts {
    pub pid: u32,
    pub comm: String,
    /// Unknown for kernel threads, and where it may not be read.
    pub exe: Option<PathBuf>,
    pub cgroup: Option<String>,
    /// Effective.
    pub uid: u32,
    pub container: Option<Container>,
    pub kernel_thread: bool,
}

impl ProcessFacts {
    /// Of an open process, which is no kernel thread.
    pub fn of(process: &Process, labels: &Labels) -> Self {
        Self {
            pid: process.id.tgid,
            comm: process.comm.clone(),
            exe: process.exe.clone(),
            cgroup: labels.cgroup.clone(),
            uid: process.uid,
            container: labels.container.clone(),
            kernel_thread: false,
        }
    }
}

/// Whether a `/proc/PID/stat` is a kernel thread's; `false` for other text.
pub fn is_kernel_thread(stat: &[u8]) -> bool {
    Stat::from_read(stat).is_ok_and(|stat| StatFlags::from_bits_truncate(stat.flags).contains(StatFlags::PF_KTHREAD))
}

/// Why a value cannot select anything. Its text follows "invalid value '...' for '...': ".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    Empty,
    UnknownKind,
    Pid,
    /// With what is wrong with it.
    Glob(String),
    CommTooLong,
    UnknownUser,
    Users(String),
    Container,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Empty => f.write_str("must not be empty"),
            Self::UnknownKind => {
                f.write_str("must be KIND=VALUE, with pid, comm, exe, cgroup, uid or container as KIND")
            }
            Self::Pid => f.write_str("must be a process id"),
            Self::Glob(why) => write!(f, "must be a name or a pattern with *, ? or [...]: {why}"),
            Self::CommTooLong => {
                write!(
                    f,
                    "no process has a name of more than {COMM_MAX} bytes: shorten it, end it with '*', or use --exe"
                )
            }
            Self::UnknownUser => f.write_str("must be a user's number, or the name of a user of this host"),
            Self::Users(why) => write!(f, "cannot look up the user: {}", why.escape_debug()),
            Self::Container => {
                f.write_str("must be the start of a container's id, or its name, of letters, digits, '-', '_' and '.'")
            }
        }
    }
}

/// A glob; equal to another of the same text.
#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    matcher: GlobMatcher,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl Pattern {
    /// With `paths`, `*` and `?` stop at a slash. A backslash is itself: systemd's names are full of them.
    fn new(text: &str, paths: bool) -> Result<Self, Refused> {
        let glob = GlobBuilder::new(text).literal_separator(paths).backslash_escape(false).build();
        let matcher = glob.map_err(|e| Refused::Glob(e.kind().to_string()))?.compile_matcher();
        Ok(Self { text: text.to_owned(), matcher })
    }

    fn matches(&self, bytes: &[u8]) -> bool {
        self.matcher.is_match(OsStr::from_bytes(bytes))
    }
}

/// Something about a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Pid,
    Comm,
    Exe,
    Cgroup,
    Uid,
    Container,
}

impl Kind {
    const ALL: [(&str, Self); 6] = [
        ("pid", Self::Pid),
        ("comm", Self::Comm),
        ("exe", Self::Exe),
        ("cgroup", Self::Cgroup),
        ("uid", Self::Uid),
        ("container", Self::Container),
    ];
}

/// Values of each kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Values {
    pids: Vec<u32>,
    comms: Vec<Pattern>,
    exes: Vec<Pattern>,
    cgroups: Vec<Pattern>,
    uids: Vec<u32>,
    containers: Vec<String>,
}

impl Values {
    fn add(&mut self, kind: Kind, value: &str) -> Result<(), Refused> {
        if value.trim().is_empty() {
            return Err(Refused::Empty);
        }
        match kind {
            Kind::Pid => self.pids.push(value.trim().parse().ok().filter(|pid| *pid > 0).ok_or(Refused::Pid)?),
            Kind::Comm => {
                if value.len() > COMM_MAX && !value.contains(['*', '?', '[', '{']) {
                    return Err(Refused::CommTooLong);
                }
                self.comms.push(Pattern::new(value, false)?);
            }
            Kind::Exe => self.exes.push(Pattern::new(value, true)?),
            Kind::Cgroup => {
                let path = format!("/{}", value.trim_start_matches('/'));
                // The root alone keeps its slash.
                let path = path.strip_suffix('/').filter(|path| !path.is_empty()).unwrap_or(&path);
                self.cgroups.push(Pattern::new(path, true)?);
            }
            Kind::Uid => self.uids.push(uid(value.trim())?),
            Kind::Container => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
                if !value.bytes().all(plain) {
                    return Err(Refused::Container);
                }
                self.containers.push(value.to_owned());
            }
        }
        Ok(())
    }

    /// For each kind with values: whether one of them holds.
    fn hold<'a>(&'a self, facts: &'a ProcessFacts) -> impl Iterator<Item = bool> + 'a {
        let pids = (!self.pids.is_empty()).then(|| self.pids.contains(&facts.pid));
        let uids = (!self.uids.is_empty()).then(|| self.uids.contains(&facts.uid));
        let comm = facts.comm.as_bytes();
        let comms = (!self.comms.is_empty()).then(|| self.comms.iter().any(|pattern| pattern.matches(comm)));
        let exe = facts.exe.as_deref();
        let exes = (!self.exes.is_empty())
            .then(|| exe.is_some_and(|exe| self.exes.iter().any(|pattern| matches_exe(pattern, exe))));
        let cgroup = facts.cgroup.as_deref();
        let cgroups = (!self.cgroups.is_empty())
            .then(|| cgroup.is_some_and(|path| self.cgroups.iter().any(|pattern| matches_cgroup(pattern, path))));
        let container = facts.container.as_ref();
        let containers = (!self.containers.is_empty()).then(|| {
            container.is_some_and(|found| self.containers.iter().any(|start| found.id.starts_with(start.as_str())))
        });
        [pids, uids, comms, exes, cgroups, containers].into_iter().flatten()
    }
}

/// A pattern with a slash is for the whole path, one without for the file's name.
fn matches_exe(pattern: &Pattern, exe: &Path) -> bool {
    let bytes = exe.as_os_str().as_bytes();
    // The kernel says so after the name of a file that was removed, for instance by an upgrade.
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    let name = bytes.rsplit(|byte| *byte == b'/').next().unwrap_or(bytes);
    pattern.matches(if pattern.text.contains('/') { bytes } else { name })
}

/// A group is meant with all groups below it.
fn matches_cgroup(pattern: &Pattern, path: &str) -> bool {
    Path::new(path).ancestors().any(|group| pattern.matches(group.as_os_str().as_bytes()))
}

fn uid(value: &str) -> Result<u32, Refused> {
    if let Ok(uid) = value.parse() {
        return Ok(uid);
    }
    match nix::unistd::User::from_name(value) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err(Refused::UnknownUser),
        Err(error) => Err(Refused::Users(error.to_string())),
    }
}

/// Which processes are meant; all, to begin with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    include: Values,
    exclude: Values,
}

impl Selection {
    /// Means only processes with this value, or others of its kind.
    pub fn include(&mut self, kind: Kind, value: &str) -> Result<(), Refused> {
        self.include.add(kind, value)
    }

    /// Leaves out processes with what `KIND=VALUE` says.
    pub fn exclude(&mut self, text: &str) -> Result<(), Refused> {
        let (name, value) = text.split_once('=').ok_or(Refused::UnknownKind)?;
        let known = Kind::ALL.into_iter().find(|(known, _)| *known == name.trim());
        let (_, kind) = known.ok_or(Refused::UnknownKind)?;
        self.exclude.add(kind, value)
    }

    /// Whether this means all processes.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a process is meant.
    pub fn matches(&self, facts: &ProcessFacts) -> bool {
        !facts.kernel_thread
            && facts.pid != std::process::id()
            && self.include.hold(facts).all(|holds| holds)
            && !self.exclude.hold(facts).any(|holds| holds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::Runtime;

    fn nginx() -> ProcessFacts {
        ProcessFacts {
            pid: 70,
            comm: "nginx".to_owned(),
            exe: Some("/usr/sbin/nginx (deleted)".into()),
            cgroup: Some(r"/system.slice/web\x2dfront.service/workers".to_owned()),
            uid: 33,
            container: Some(Container { runtime: Runtime::Docker, id: "4b1ae0e2c8a9".to_owned() }),
            kernel_thread: false,
        }
    }

    fn selection(include: &[(Kind, &str)], exclude: &[&str]) -> Selection {
        let mut selection = Selection::default();
        for (kind, value) in include {
            selection.include(*kind, value).unwrap();
        }
        for text in exclude {
            selection.exclude(text).unwrap();
        }
        selection
    }

    /// Each kind by itself: what it takes and what it does not.
    #[test]
    fn each_kind() {
        let cases = [
            (Kind::Pid, "70", true),
            (Kind::Pid, "7", false),
            (Kind::Comm, "nginx", true),
            (Kind::Comm, "ngin", false),
            (Kind::Comm, "ng*", true),
            (Kind::Comm, "?ginx", true),
            (Kind::Comm, "[a-m]*", false),
            (Kind::Exe, "nginx", true),
            (Kind::Exe, "sbin", false),
            (Kind::Exe, "/usr/sbin/nginx", true),
            (Kind::Exe, "/usr/*/nginx", true),
            (Kind::Exe, "/usr/*", false),
            (Kind::Exe, "/usr/**", true),
            (Kind::Cgroup, "/system.slice", true),
            (Kind::Cgroup, "system.slice/", true),
            (Kind::Cgroup, "/system", false),
            (Kind::Cgroup, "/", true),
            (Kind::Cgroup, r"/system.slice/web\x2dfront.service", true),
            (Kind::Cgroup, "/*/web*", true),
            (Kind::Cgroup, "/web*", false),
            (Kind::Cgroup, "/**/workers", true),
            (Kind::Uid, "33", true),
            (Kind::Uid, "root", false),
            (Kind::Container, "4b1a", true),
            (Kind::Container, "b1a", false),
        ];
        for (kind, value, expected) in cases {
            assert_eq!(selection(&[(kind, value)], &[]).matches(&nginx()), expected, "{kind:?} {value}");
            let (name, _) = Kind::ALL.into_iter().find(|(_, known)| *known == kind).unwrap();
            let excluded = selection(&[], &[&format!("{name}={value}")]);
            assert_eq!(excluded.matches(&nginx()), !expected, "without {kind:?} {value}");
        }
    }

    /// Values of a kind are alternatives, kinds must all hold, and excluded is excluded.
    #[test]
    fn kinds_together() {
        let (comm, uid) = (Kind::Comm, Kind::Uid);
        assert!(selection(&[(comm, "redis"), (comm, "nginx")], &[]).matches(&nginx()));
        assert!(selection(&[(comm, "nginx"), (uid, "33")], &[]).matches(&nginx()));
        assert!(!selection(&[(comm, "nginx"), (uid, "0")], &[]).matches(&nginx()));
        assert!(!selection(&[(comm, "nginx")], &["uid=33", "comm=redis"]).matches(&nginx()));
        assert!(selection(&[(comm, "nginx")], &["uid=0", "comm=redis"]).matches(&nginx()));
    }

    /// What is not known of a process does not hold, neither to include nor to exclude it.
    #[test]
    fn unknown_facts() {
        let bare = ProcessFacts { exe: None, cgroup: None, container: None, ..nginx() };
        for (kind, value, excluded) in
            [(Kind::Exe, "*", "exe=*"), (Kind::Cgroup, "/**", "cgroup=/"), (Kind::Container, "4b", "container=4b")]
        {
            assert!(!selection(&[(kind, value)], &[]).matches(&bare), "{kind:?}");
            assert!(selection(&[], &[excluded]).matches(&bare), "{excluded}");
        }
    }

    /// Kernel threads and leaktrace itself are not meant even by name.
    #[test]
    fn never_meant() {
        let everything = Selection::default();
        assert!(everything.is_everything() && everything.matches(&nginx()));
        assert!(!everything.matches(&ProcessFacts { kernel_thread: true, ..nginx() }));
        let own = ProcessFacts { pid: std::process::id(), ..nginx() };
        assert!(!selection(&[(Kind::Pid, &own.pid.to_string())], &[]).matches(&own));
        assert!(!is_kernel_thread(&std::fs::read("/proc/self/stat").unwrap()));
        assert!(!is_kernel_thread(b"no stat"));
        let kernel = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 3 0 0 18446744073709551615 0 0 0 0 0 0 0 \
                      2147483647 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0";
        assert!(is_kernel_thread(kernel.as_bytes()));
    }

    /// Bytes that are no UTF-8 are matched too.
    #[test]
    fn names_that_are_no_text() {
        let odd = ProcessFacts { exe: Some(OsStr::from_bytes(b"/opt/\xff/x\xfe").into()), ..nginx() };
        assert!(selection(&[(Kind::Exe, "/opt/*/x?")], &[]).matches(&odd));
        assert!(!selection(&[(Kind::Exe, "/opt/*/y*")], &[]).matches(&odd));
    }

    /// Values that can select nothing are refused with the reason.
    #[test]
    fn refused() {
        let include = |kind, value| Selection::default().include(kind, value).unwrap_err();
        let exclude = |text| Selection::default().exclude(text).unwrap_err();
        for kind in Kind::ALL.map(|(_, kind)| kind) {
            assert_eq!(include(kind, " "), Refused::Empty);
        }
        assert_eq!(include(Kind::Pid, "0"), Refused::Pid);
        assert_eq!(include(Kind::Comm, "a-name-of-16-byt"), Refused::CommTooLong);
        assert!(Selection::default().include(Kind::Comm, "a-name-of-16-by*").is_ok());
        assert_eq!(include(Kind::Uid, "no such user"), Refused::UnknownUser);
        assert_eq!(include(Kind::Uid, "-1"), Refused::UnknownUser);
        assert_eq!(include(Kind::Container, "a/b"), Refused::Container);
        assert!(matches!(include(Kind::Exe, "/opt/[a"), Refused::Glob(_)));
        assert_eq!(exclude("nginx"), Refused::UnknownKind);
        assert_eq!(exclude("name=nginx"), Refused::UnknownKind);
        assert_eq!(exclude("comm="), Refused::Empty);
        assert!(selection(&[(Kind::Uid, "root")], &[]).matches(&ProcessFacts { uid: 0, ..nginx() }));
    }
}

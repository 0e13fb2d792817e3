//! What is known of each program: the sizes at which its builds were steady, and which of them leaked.
//!
//! A program is an executable's path within an image, or within a systemd unit on the host itself; its builds are told apart by build
//! id, which the linker makes from the contents. Where an executable has none its builds are one.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::process::ProcessId;
use crate::report::{Baseline, Labels, Process, Report, Restart, Verdict};
use crate::trace::Observed;
use crate::view::bytes;

/// Before this a process is not what it is going to be; its build id is not known either.
const YOUNG: Duration = Duration::from_secs(30);
/// Growth of less than this share of its size in an hour is none, nor is less than [`SMALL`] an hour.
const STILL: f64 = 0.1;
const SMALL: f64 = 1_048_576.0;
/// Up to this share of the size at which it was steady it is back there.
const BACK: f64 = 1.25;
/// A process that starts so long after another has ended is not its restart, seconds.
const RESTART: i64 = 600;
/// Of a new size so much goes into the mean: the last few minutes count.
const WEIGHT: f64 = 1.0 / 32.0;
/// Builds of one program that are kept, the latest.
const BUILDS: usize = 8;
/// Restarts that are told of, the latest.
const RESTARTS: usize = 20;
/// Longer names are not kept.
const NAME: usize = 1024;
/// What a program takes in the file at least, bytes; so many programs are kept at most.
const PROGRAM: u64 = 128;

/// The file's contents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Contents {
    programs: Vec<Program>,
}

/// A program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Program {
    /// The image without its tag, or the unit; empty: neither.
    within: String,
    exe: String,
    /// The latest last.
    builds: Vec<Build>,
    /// How the last process that leaked, or was larger than usual, ended.
    end: Option<End>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Build {
    id: Option<String>,
    /// Seconds since 1970.
    last_seen: i64,
    /// At which it was steady, and when it was so last.
    steady_bytes: Option<f64>,
    steady_at: Option<i64>,
    /// When it leaked last.
    leaked_at: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct End {
    at: i64,
    bytes: u64,
    leaked: bool,
}

type Key = (String, String);

/// A process at the last look.
struct Instance {
    key: Key,
    build: Option<String>,
    bytes: u64,
    leaking: bool,
    /// Since when it does not grow, seconds since 1970.
    still_since: Option<i64>,
    /// Whether it was asked whether it is a restart.
    asked: bool,
    /// It is one, of what had become so large.
    before_restart: Option<u64>,
}

/// All programs, and the processes that run.
pub struct Baselines {
    steady_after: i64,
    max_bytes: u64,
    programs: HashMap<Key, Program>,
    instances: HashMap<ProcessId, Instance>,
    restarts: Vec<(ProcessId, Restart)>,
}

impl Baselines {
    pub fn new(steady_after: Duration, max_bytes: u64) -> Self {
        Self {
            steady_after: i64::try_from(steady_after.as_secs()).unwrap_or(i64::MAX),
            max_bytes,
            programs: HashMap::new(),
            instances: HashMap::new(),
            restarts: Vec::new(),
        }
    }

    /// Takes what was kept.
    pub fn take(&mut self, contents: Contents) {
        for mut program in contents.programs {
            program.builds.truncate(BUILDS);
            self.programs.insert((program.within.clone(), program.exe.clone()), program);
        }
        self.bound();
    }

    /// Learns from the processes, of which the report has those that are traced, and adds to it what is known.
    pub fn observe(&mut self, processes: &mut dyn Iterator<Item = Observed<'_>>, report: &mut Report, now: Timestamp) {
        let now = now.as_second();
        let traced: HashMap<u32, Verdict> = report
            .processes
            .iter()
            .filter(|process| process.ended.is_none())
            .map(|process| (process.pid, process.verdict))
            .collect();
        let mut present = HashSet::new();
        for process in processes {
            present.insert(process.id);
            if process.watched >= YOUNG {
                self.one(&process, traced.get(&process.id.tgid).copied(), now);
            }
        }
        self.forget_ended(&present, now);
        self.bound();
        self.tell(report);
    }

    fn one(&mut self, process: &Observed<'_>, verdict: Option<Verdict>, now: i64) {
        let Some(key) = key(process) else { return };
        let build = process.build_id.map(str::to_owned);
        let fresh = || Instance {
            key: key.clone(),
            build: build.clone(),
            bytes: 0,
            leaking: false,
            still_since: None,
            asked: false,
            before_restart: None,
        };
        let instance = self.instances.entry(process.id).or_insert_with(fresh);
        if instance.key != key || instance.build != build {
            let same_file = instance.key.1 == key.1 && instance.build == build;
            match (instance.key.0.is_empty(), key.0.is_empty()) {
                // Its image was not known yet, or it cannot be asked for any more.
                (true, false) if same_file => (instance.key, instance.asked) = (key, false),
                (false, true) if same_file => {}
                // It has executed another program.
                _ => *instance = fresh(),
            }
        }
        let key = instance.key.clone();
        instance.bytes = process.resident_bytes;
        // At its end it is not in the report any more, for a look or two.
        instance.leaking = verdict.map_or(instance.leaking, |verdict| verdict == Verdict::Leaking);
        let size = process.resident_bytes as f64;
        let is_still = match (verdict, process.growth_bytes_per_s) {
            (Some(Verdict::Leaking | Verdict::Warming), _) | (_, None) => false,
            (_, Some(rate)) => rate * 3600.0 < (STILL * size).max(SMALL),
        };
        instance.still_since = if is_still { instance.still_since.or(Some(now)) } else { None };
        let steady = instance.still_since.is_some_and(|since| now - since >= self.steady_after);
        if let Some(program) = self.programs.get_mut(&key) {
            if !instance.asked {
                instance.asked = true;
                let restarted = program.end.take_if(|end| now - end.at <= RESTART);
                instance.before_restart = restarted.as_ref().map(|end| end.bytes);
                if let Some(end) = restarted {
                    let baseline = program.steady(instance.build.as_deref());
                    if self.restarts.len() == RESTARTS {
                        self.restarts.remove(0);
                    }
                    self.restarts.push((process.id, restart(process, &end, baseline)));
                }
            }
        } else {
            instance.asked = true;
        }
        if !steady && !instance.leaking && !self.programs.contains_key(&key) {
            // Nothing to remember yet.
            return;
        }
        let program = self.programs.entry(key.clone()).or_insert_with(|| Program {
            within: key.0.clone(),
            exe: key.1.clone(),
            ..Program::default()
        });
        let build = program.build(build.as_ref(), now);
        if steady {
            build.steady_bytes = Some(build.steady_bytes.map_or(size, |mean| mean + (size - mean) * WEIGHT));
            build.steady_at = Some(now);
        }
        if instance.leaking {
            build.leaked_at = Some(now);
        }
    }

    /// Notes how those ended that are gone.
    fn forget_ended(&mut self, present: &HashSet<ProcessId>, now: i64) {
        let Self { instances, programs, restarts, .. } = self;
        instances.retain(|id, instance| {
            if present.contains(id) {
                return true;
            }
            if let Some(program) = programs.get_mut(&instance.key) {
                let usual = program.steady(instance.build.as_deref());
                let was_large = usual.is_some_and(|usual| instance.bytes as f64 > usual * BACK);
                if instance.leaking || was_large {
                    program.end = Some(End { at: now, bytes: instance.bytes, leaked: instance.leaking });
                }
            }
            false
        });
        for (id, restart) in restarts {
            if let Some(instance) = instances.get(id) {
                restart.now_bytes = instance.bytes;
            }
        }
    }

    /// Forgets the programs that were not seen for longest where there are too many.
    fn bound(&mut self) {
        let most = usize::try_from(self.max_bytes / PROGRAM).unwrap_or(usize::MAX);
        if self.programs.len() > most {
            let mut seen: Vec<(i64, Key)> =
                self.programs.iter().map(|(key, program)| (program.last_seen(), key.clone())).collect();
            seen.sort();
            for (_, key) in seen.iter().take(self.programs.len() - most) {
                self.programs.remove(key);
            }
        }
    }

    fn tell(&self, report: &mut Report) {
        let by_pid: HashMap<u32, &Instance> = self.instances.iter().map(|(id, instance)| (id.tgid, instance)).collect();
        for process in report.processes.iter_mut().filter(|process| process.ended.is_none()) {
            let Some(instance) = by_pid.get(&process.pid) else { continue };
            let Some(program) = self.programs.get(&instance.key) else { continue };
            process.baseline = program.baseline(instance, process);
        }
        if let Some(system) = &mut report.system {
            system.restarts = self.restarts.iter().map(|(_, restart)| restart.clone()).collect();
        }
    }

    /// As the file has it: within the bound, the latest first.
    pub fn written(&self) -> Vec<u8> {
        let mut programs: Vec<&Program> = self.programs.values().collect();
        programs.sort_by_key(|program| (-program.last_seen(), &program.within, &program.exe));
        let mut text = b"{\"programs\":[".to_vec();
        for program in programs {
            // Numbers, texts and lists of them can always be written.
            let Ok(one) = serde_json::to_vec(program) else { continue };
            if (text.len() + one.len()) as u64 + 128 > self.max_bytes {
                break;
            }
            if !text.ends_with(b"[") {
                text.push(b',');
            }
            text.extend(one);
        }
        text.extend(b"]}");
        text
    }
}

/// The program of a process.
fn key(process: &Observed<'_>) -> Option<Key> {
    let exe = process.exe?;
    // A file that was replaced while it runs, which a package's update does.
    let exe = exe.strip_suffix(" (deleted)").unwrap_or(exe);
    let within = within(process.labels);
    (exe.len() <= NAME && within.len() <= NAME).then(|| (within, exe.to_owned()))
}

/// What has a name that outlives a deploy.
fn within(labels: &Labels) -> String {
    match (&labels.container, &labels.image, &labels.unit) {
        (Some(_), Some(image), _) => untagged(image).to_owned(),
        (None, _, Some(unit)) => unit.clone(),
        _ => String::new(),
    }
}

/// An image's name without its tag and digest, which are others with each deploy; nothing of an image that has a digest alone.
fn untagged(image: &str) -> &str {
    let name = image.split('@').next().unwrap_or(image);
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[last..].find(':') {
        // As a runtime says it that was not told a name.
        Some(_) if name.starts_with("sha256:") => "",
        // What stands before the last part may be a host with its port.
        Some(colon) => &name[..last + colon],
        None => name,
    }
}

fn restart(process: &Observed<'_>, end: &End, baseline: Option<f64>) -> Restart {
    let now = process.resident_bytes;
    // Where it was never steady half of what it was is all that can be said.
    let usual = baseline.unwrap_or(end.bytes as f64 / 2.0);
    Restart {
        pid: process.id.tgid,
        comm: process.comm.to_owned(),
        exe: process.exe.map(str::to_owned),
        labels: process.labels.clone(),
        at: Timestamp::from_second(end.at).unwrap_or_default(),
        leaked: end.leaked,
        before_bytes: end.bytes,
        now_bytes: now,
        baseline_bytes: baseline.map(|baseline| baseline as u64),
        back_to_baseline: now as f64 <= usual * BACK,
    }
}

impl Program {
    fn last_seen(&self) -> i64 {
        self.builds.iter().map(|build| build.last_seen).max().unwrap_or(0)
    }

    /// The build of this id, seen now.
    fn build(&mut self, id: Option<&String>, now: i64) -> &mut Build {
        let place = self.builds.iter().position(|build| build.id.as_ref() == id);
        let mut build = match place {
            Some(place) => self.builds.remove(place),
            None => Build { id: id.cloned(), ..Build::default() },
        };
        build.last_seen = now;
        if self.builds.len() >= BUILDS {
            self.builds.remove(0);
        }
        self.builds.push(build);
        let last = self.builds.len() - 1;
        &mut self.builds[last]
    }

    /// The size at which this build was steady; if it never was, the latest that was.
    fn steady(&self, id: Option<&str>) -> Option<f64> {
        let own = self.builds.iter().find(|build| build.id.as_deref() == id).and_then(|build| build.steady_bytes);
        own.or_else(|| self.builds.iter().rev().find_map(|build| build.steady_bytes))
    }

    /// What is known of a traced process from before.
    fn baseline(&self, instance: &Instance, process: &Process) -> Option<Baseline> {
        let own = self.builds.iter().find(|build| build.id == instance.build);
        let others = || self.builds.iter().filter(|build| build.id != instance.build);
        let steady = own
            .filter(|build| build.steady_bytes.is_some())
            .or_else(|| others().filter(|build| build.steady_bytes.is_some()).max_by_key(|build| build.steady_at));
        let leaks = process.verdict == Verdict::Leaking;
        // The latest other build says whether this one brought it.
        let before = others().filter(|build| build.steady_at.is_some() || build.leaked_at.is_some());
        let before = before.max_by_key(|build| build.last_seen);
        let own_steady = own.is_some_and(|build| build.steady_bytes.is_some());
        let brought =
            before.filter(|build| leaks && !own_steady && build.leaked_at.is_none()).and_then(|build| build.id.clone());
        let before_too = before.filter(|build| leaks && build.leaked_at.is_some()).and_then(|build| build.id.clone());
        let found = Baseline {
            build_id: instance.build.clone(),
            steady_bytes: steady.and_then(|build| build.steady_bytes).map(|bytes| bytes as u64),
            steady_build_id: steady.and_then(|build| build.id.clone()),
            steady_at: steady.and_then(|build| Timestamp::from_second(build.steady_at?).ok()),
            grew_since_build: brought,
            leaked_with_build: before_too,
            before_restart_bytes: instance.before_restart,
            remark: None,
        };
        let remark = remark(&found, leaks);
        (found.steady_bytes.is_some() || remark.is_some() || found.before_restart_bytes.is_some())
            .then_some(Baseline { remark, ..found })
    }
}

/// The same in a sentence.
fn remark(found: &Baseline, leaks: bool) -> Option<String> {
    let size = found.steady_bytes.map(|steady| format!(", which was steady at {}", bytes(steady)));
    if let Some(build) = &found.grew_since_build {
        return Some(format!("grows since build {}{}", short(build), size.unwrap_or_default()));
    }
    if let Some(build) = &found.leaked_with_build {
        return Some(format!("build {} leaked as well", short(build)));
    }
    let (Some(steady), true) = (found.steady_bytes, leaks) else { return None };
    let same = found.build_id == found.steady_build_id;
    same.then(|| format!("the same build was steady before, at {}", bytes(steady)))
}

/// As much of a build id as people compare.
fn short(build: &str) -> &str {
    build.get(..12).unwrap_or(build)
}

/// By program, for tests.
#[cfg(test)]
impl Baselines {
    fn contents(&self) -> Contents {
        let sorted: std::collections::BTreeMap<&Key, &Program> = self.programs.iter().collect();
        Contents { programs: sorted.into_values().cloned().collect() }
    }
}

#[cfg(test)]
mod tests;

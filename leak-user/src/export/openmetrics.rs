//! The report as `OpenMetrics` text, which Prometheus scrapes.
//!
//! A page is made from one report and nothing is kept between two, so a process that is gone leaves no series behind. How many
//! series there can be is bounded by [`Limits`]: the worst processes, and over all of them the worst stacks. A stack is labelled by
//! [`stable_id`], which a restart of the process does not change. What is not known has no series.
//!
//! By prometheus-client, the library of the Prometheus project: it has the escaping of labels, units in names and the end mark.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::stable_id;
use crate::report::{Process, Report, Stack, StackVerdict, Verdict};
use crate::view::culprit;

/// What an answer with this text says of itself.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Characters of a name in a label; more is cut off, since C++ names can have thousands.
const LABEL: usize = 200;

/// How much is told. Series: at most 18 a process, 3 a stack, and some 30 besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub processes: usize,
    /// Over all processes.
    pub stacks: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { processes: 50, stacks: 100 }
    }
}

/// What the tracer itself takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Own {
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub threads: u64,
    pub open_files: u64,
}

impl Own {
    /// Of this process, as /proc tells it; `None` where it does not.
    pub fn read() -> Option<Self> {
        let own = procfs::process::Process::myself().ok()?;
        let stat = own.stat().ok()?;
        Some(Self {
            cpu_seconds: (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64,
            resident_bytes: stat.rss * procfs::page_size(),
            threads: u64::try_from(stat.num_threads).ok()?,
            open_files: own.fd_count().ok()? as u64,
        })
    }
}

/// What the agent says of its parts, each by a name of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Whether it does not work.
    pub degraded: Vec<(&'static str, bool)>,
    /// What happened to it, and how often.
    pub counts: Vec<(&'static str, &'static str, u64)>,
}

type Labels = Vec<(&'static str, String)>;
type Values = Family<Labels, Gauge<f64, AtomicU64>>;
type Counts = Family<Labels, Counter<u64>>;

/// The metrics of one report.
struct Page {
    registry: Registry,
}

impl Page {
    fn values(&mut self, name: &str, help: &str, unit: Option<Unit>) -> Values {
        let values = Values::default();
        match unit {
            Some(unit) => self.registry.register_with_unit(name, help, unit, values.clone()),
            None => self.registry.register(name, help, values.clone()),
        }
        values
    }

    fn value(&mut self, name: &str, help: &str, unit: Option<Unit>, value: f64) {
        self.values(name, help, unit).get_or_create(&Labels::new()).set(value);
    }

    fn counts(&mut self, name: &str, help: &str) -> Counts {
        let counts = Counts::default();
        self.registry.register(name, help, counts.clone());
        counts
    }
}

/// The text of a scrape.
pub fn text(report: &Report, limits: Limits, own: Option<Own>, agent: &Figures) -> Result<String, fmt::Error> {
    let mut page = Page { registry: Registry::with_prefix("leaktrace") };
    whole(&mut page, report);
    if let Some(own) = own {
        page.value(
            "agent_resident_memory",
            "Resident memory of the tracer itself",
            Some(Unit::Bytes),
            own.resident_bytes as f64,
        );
        page.value("agent_threads", "Threads of the tracer itself", None, own.threads as f64);
        page.value("agent_open_files", "Open files of the tracer itself", None, own.open_files as f64);
        let cpu = Counter::<f64, AtomicU64>::default();
        cpu.inc_by(own.cpu_seconds);
        page.registry.register_with_unit("agent_cpu", "Processor time that the tracer itself took", Unit::Seconds, cpu);
    }
    parts(&mut page, agent);
    // The report has the worst first.
    let listed = &report.processes[..report.processes.len().min(limits.processes)];
    processes(&mut page, listed);
    stacks(&mut page, listed, limits.stacks);
    let mut text = String::new();
    encode(&mut text, &page.registry)?;
    Ok(text)
}

fn parts(page: &mut Page, agent: &Figures) {
    if !agent.degraded.is_empty() {
        let degraded =
            page.values("agent_degraded", "1 for a part of the agent that does not work; /readyz has the reason", None);
        for (part, is_degraded) in &agent.degraded {
            degraded.get_or_create(&vec![("part", (*part).to_owned())]).set(f64::from(u8::from(*is_degraded)));
        }
    }
    if !agent.counts.is_empty() {
        let counts = page.counts("agent_events", "What happened to the parts of the agent");
        for (part, what, count) in &agent.counts {
            counts.get_or_create(&vec![("part", (*part).to_owned()), ("event", (*what).to_owned())]).inc_by(*count);
        }
    }
}

fn whole(page: &mut Page, report: &Report) {
    page.registry.register("build", "The tracer's version", Info::new(vec![("version", report.tool.version.clone())]));
    let taken = report.started_at.as_nanosecond() as f64 / 1e9 + report.duration_s;
    page.value("report_timestamp", "When the report that this tells of was made", Some(Unit::Seconds), taken);
    let leaking = report.processes.iter().filter(|process| process.verdict == Verdict::Leaking).count();
    page.value("leaking_processes", "Traced processes with at least one call stack that leaks", None, leaking as f64);
    let traced = report.system.as_ref().map_or(report.processes.len() as u64, |system| system.traced);
    page.value("traced_processes", "Processes whose allocator is traced", None, traced as f64);
    if let Some(system) = &report.system {
        page.value(
            "watched_processes",
            "Processes that are watched, the traced ones included",
            None,
            system.watched as f64,
        );
    }
    page.counts("events", "Records read from the kernel").get_or_create(&Labels::new()).inc_by(report.events);
    let losses = page.counts("losses", "What was lost, by counter; what was not lost has no series");
    for (reason, count) in &report.losses {
        losses.get_or_create(&vec![("reason", reason.clone())]).inc_by(*count);
    }
}

fn processes(page: &mut Page, processes: &[Process]) {
    let bytes = || Some(Unit::Bytes);
    // The unit of a rate is the last word of its name too.
    let rate = || Some(Unit::Other("bytes_per_second".to_owned()));
    let live = page.values("process_live", "Bytes allocated while traced and not freed", bytes());
    let resident = page.values("process_resident", "Resident memory", bytes());
    let resident_growth = page.values("process_resident_growth", "How fast resident memory rises", rate());
    let growth =
        page.values("process_growth", "How fast the call stacks that leak grow together; 0: none leaks", rate());
    let growing = page.values("process_growing_stacks", "Call stacks that leak", None);
    let limit = page.values("process_memory_limit", "The lowest memory limit that applies", bytes());
    let to_limit = page.values(
        "process_time_to_limit",
        "Until resident memory meets the limit, should it go on like this",
        Some(Unit::Seconds),
    );
    let explained = page.values(
        "process_explained_growth",
        "Growth of the leaking stacks over that of resident memory",
        Some(Unit::Ratios),
    );
    let cost = page.values("process_overhead", "What tracing costs now", Some(Unit::Ratios));
    let budget = page.values("process_overhead_budget", "What tracing may cost", Some(Unit::Ratios));
    let baseline =
        page.values("process_baseline", "Resident memory at which earlier runs of the program were steady", bytes());
    let new_leak =
        page.values("process_new_leak", "1 for a program that leaks and whose build before this one was steady", None);
    let verdicts = page.values("process_verdict", "1 for the verdict that holds, 0 for the others", None);
    for process in processes {
        let labels = of_process(process);
        let set = |values: &Values, value: Option<f64>| {
            if let Some(value) = value {
                values.get_or_create(&labels).set(value);
            }
        };
        set(&live, Some(process.live_bytes as f64));
        set(&resident, process.rss.last_bytes.map(|bytes| bytes as f64));
        set(&resident_growth, process.rss.growth_bytes_per_s);
        set(&growth, Some(process.growing_bytes_per_s.unwrap_or(0.0)));
        set(&growing, Some(process.growing_stacks as f64));
        set(&limit, process.memory_limit_bytes.map(|bytes| bytes as f64));
        set(&to_limit, process.seconds_to_limit);
        set(&explained, process.explained_growth_ratio);
        // Both are of the process's own processor time, or both of one processor.
        set(&cost, process.overhead.as_ref().map(|overhead| overhead.measured_percent / 100.0));
        set(&budget, process.overhead.as_ref().map(|overhead| overhead.budget_percent / 100.0));
        if let Some(known) = &process.baseline {
            set(&baseline, known.steady_bytes.map(|bytes| bytes as f64));
            set(&new_leak, Some(f64::from(u8::from(known.grew_since_build.is_some()))));
        }
        for (verdict, name) in VERDICTS {
            let mut labels = labels.clone();
            labels.push(("verdict", name.to_owned()));
            verdicts.get_or_create(&labels).set(f64::from(u8::from(verdict == process.verdict)));
        }
    }
}

const VERDICTS: [(Verdict, &str); 5] = [
    (Verdict::Leaking, "leaking"),
    (Verdict::Warming, "warming"),
    (Verdict::Plateau, "plateau"),
    (Verdict::Spike, "spike"),
    (Verdict::Stable, "stable"),
];

fn stacks(page: &mut Page, processes: &[Process], most: usize) {
    let live =
        page.values("stack_live", "Bytes that this call stack allocated and that are not freed", Some(Unit::Bytes));
    let growth = page.values(
        "stack_growth",
        "How fast the live bytes of a call stack that leaks grow",
        Some(Unit::Other("bytes_per_second".to_owned())),
    );
    let confidence = page.values("stack_confidence", "How sure it is that this call stack leaks", Some(Unit::Ratios));
    let mut all: Vec<(&Process, &Stack)> =
        processes.iter().flat_map(|process| process.stacks.iter().map(move |stack| (process, stack))).collect();
    all.sort_by(|(_, a), (_, b)| a.worse(b));
    for (process, stack) in all.into_iter().take(most) {
        let mut labels = of_process(process);
        labels.push(("stack", stable_id(stack)));
        let named = culprit(stack).and_then(|frame| frame.function.as_deref());
        labels.push(("function", label(named.unwrap_or_default())));
        // Stacks that differ only where nothing is known of the code have one id: they count together.
        live.get_or_create(&labels).inc_by(stack.live_bytes as f64);
        if stack.verdict == StackVerdict::Growing {
            if let Some(rate) = stack.growth.bytes_per_s {
                growth.get_or_create(&labels).inc_by(rate);
            }
            if let Some(sure) = stack.growth.confidence {
                confidence.get_or_create(&labels).set(sure);
            }
        }
    }
}

fn of_process(process: &Process) -> Labels {
    let mut labels = vec![("pid", process.pid.to_string()), ("process", label(&process.comm))];
    let of = [
        ("exe", &process.exe),
        ("container_id", &process.labels.container),
        ("pod_uid", &process.labels.pod_uid),
        ("unit", &process.labels.unit),
        ("namespace", &process.labels.namespace),
        ("pod", &process.labels.pod),
        ("container", &process.labels.container_name),
        ("image", &process.labels.image),
        ("node", &process.labels.node),
    ];
    for (key, value) in of {
        if let Some(value) = value {
            labels.push((key, label(value)));
        }
    }
    labels
}

/// A name as a label has it: no control characters, and not too long.
fn label(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(LABEL).collect()
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "values are copied, not computed")]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::report::{Baseline, Overhead, sample};

    /// A report with everything in it that there is a metric of.
    fn everything() -> Report {
        let mut report = sample::system();
        report.processes[0].overhead =
            Some(Overhead { budget_percent: 5.0, measured_percent: 3.25, ..Overhead::default() });
        report.processes[0].baseline = Some(Baseline {
            steady_bytes: Some(64 << 20),
            grew_since_build: Some("4f0c9d".to_owned()),
            ..Baseline::default()
        });
        report
    }

    /// And an agent that says all of itself.
    fn agent() -> Figures {
        Figures { degraded: vec![("state", true)], counts: vec![("http", "requests_refused", 3)] }
    }

    fn page(report: &Report) -> String {
        text(report, Limits::default(), Own::read(), &Figures::default()).unwrap()
    }

    /// The series of a metric: what stands before the value, and the value.
    fn series<'a>(page: &'a str, name: &str) -> Vec<(&'a str, f64)> {
        let lines =
            page.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        lines
            .map(|line| line.rsplit_once(' ').unwrap())
            .map(|(series, value)| (series, value.parse().unwrap()))
            .collect()
    }

    /// What the report says of a process and its worst stack is there, under names with their unit.
    #[test]
    fn what_a_report_says() {
        let report = everything();
        let page = page(&report);
        assert!(page.ends_with("# EOF\n"));
        let one = |name: &str, part: &str| {
            let found: Vec<_> = series(&page, name).into_iter().filter(|(series, _)| series.contains(part)).collect();
            assert_eq!(found.len(), 1, "{name} {part}\n{page}");
            found[0].1
        };
        let process = &report.processes[0];
        let pid = format!("pid=\"{}\",process=\"orders\"", process.pid);
        assert_eq!(one("leaktrace_process_live_bytes", &pid), process.live_bytes as f64);
        assert_eq!(one("leaktrace_process_growth_bytes_per_second", &pid), process.growing_bytes_per_s.unwrap());
        assert_eq!(one("leaktrace_process_time_to_limit_seconds", &pid), process.seconds_to_limit.unwrap());
        for (verdict, holds) in [("leaking", 1.0), ("stable", 0.0), ("warming", 0.0)] {
            assert_eq!(
                one(
                    "leaktrace_process_verdict",
                    &format!(
                        "{pid},exe=\"/srv/orders/bin/orders\",container_id=\"{}\",pod_uid=\"{}\",namespace=\"shop\",\
                         pod=\"orders-6c9f7d5b8-x2x4q\",container=\"api\",image=\"registry.example/shop/orders:1.4.2\",\
                         node=\"web-3\",verdict=\"{verdict}\"",
                        process.labels.container.as_ref().unwrap(),
                        process.labels.pod_uid.as_ref().unwrap()
                    )
                ),
                holds
            );
        }
        assert_eq!(one("leaktrace_process_overhead_ratios", &pid), 0.0325);
        assert_eq!(one("leaktrace_process_overhead_budget_ratios", &pid), 0.05);
        assert_eq!(one("leaktrace_process_baseline_bytes", &pid), f64::from(64 << 20));
        assert_eq!(one("leaktrace_process_new_leak", &pid), 1.0);
        let stack = &process.stacks[0];
        let id = format!("stack=\"{}\",function=\"Session::remember(Order)\"", stable_id(stack));
        assert_eq!(one("leaktrace_stack_growth_bytes_per_second", &id), stack.growth.bytes_per_s.unwrap());
        assert_eq!(one("leaktrace_losses_total", "reason=\"allocations_ring_full\""), 1204.0);
        assert_eq!(one("leaktrace_watched_processes", ""), 212.0);
        assert_eq!(one("leaktrace_events_total", ""), report.events as f64);
        assert!(one("leaktrace_agent_resident_memory_bytes", "") > 1e6);
        assert!(one("leaktrace_agent_cpu_seconds_total", "") >= 0.0);
    }

    /// Every metric that the alert rules, the dashboard and the runbook speak of is there, under that very name.
    #[test]
    fn what_is_deployed_names_what_there_is() {
        let page = text(&everything(), Limits::default(), Own::read(), &agent()).unwrap();
        let there: HashSet<&str> = page
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect();
        for (file, text, at_least) in [
            ("rules.yaml", include_str!("../../../deploy/chart/leaktrace/files/rules.yaml"), 9),
            ("dashboard.json", include_str!("../../../deploy/chart/leaktrace/files/dashboard.json"), 15),
            ("RUNBOOK.md", include_str!("../../../deploy/RUNBOOK.md"), 5),
        ] {
            let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let named: HashSet<&str> = words.filter(|word| word.starts_with("leaktrace_")).collect();
            assert!(named.len() >= at_least, "{file} names {}", named.len());
            let unknown: Vec<_> = named.difference(&there).collect();
            assert!(unknown.is_empty(), "{file} names {unknown:?}; there are {there:#?}");
        }
    }

    /// However many processes and stacks there are, the page has so many series as the limits say, the worst, and none twice.
    #[test]
    fn series_are_bounded() {
        let mut report = sample::leaking();
        let model = report.processes[0].clone();
        report.processes = (0..500_u32)
            .map(|pid| {
                let mut process = Process { pid, ..model.clone() };
                for (n, stack) in process.stacks.iter_mut().enumerate() {
                    stack.frames[0].offset = Some(u64::from(pid) * 1000 + n as u64);
                }
                process
            })
            .collect();
        report.processes[499].verdict = Verdict::Stable;
        let page = text(&report, Limits { processes: 7, stacks: 9 }, None, &Figures::default()).unwrap();
        assert_eq!(series(&page, "leaktrace_process_live_bytes").len(), 7);
        assert_eq!(series(&page, "leaktrace_stack_live_bytes").len(), 9);
        assert_eq!(series(&page, "leaktrace_stack_growth_bytes_per_second").len(), 9);
        // The whole is counted, not what is listed.
        assert_eq!(series(&page, "leaktrace_leaking_processes"), [("leaktrace_leaking_processes", 499.0)]);
        let lines: Vec<&str> = page.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(lines.len() <= 18 * 7 + 3 * 9 + 30, "{}", lines.len());
        let unique: HashSet<&str> = lines.iter().map(|line| line.rsplit_once(' ').unwrap().0).collect();
        assert_eq!(unique.len(), lines.len());
    }

    /// Names with quotes, newlines, control characters and of great length stay inside their label.
    #[test]
    fn names_stay_labels() {
        let mut report = sample::leaking();
        report.processes[0].comm = "a\"} 1\nleaktrace_forged 7\n\\\u{1b}[2J".to_owned();
        report.processes[0].stacks[0].frames[2].function = Some(format!("f<{}>", "x".repeat(100_000)));
        let page = page(&report);
        assert!(!page.contains('\u{1b}') && page.len() < 100_000, "{}", page.len());
        assert!(series(&page, "leaktrace_forged").is_empty());
        assert!(page.lines().all(|line| line.starts_with("leaktrace_") || line.starts_with('#')), "{page}");
    }

    /// What is not known has no series, and nothing traced is a page all the same.
    #[test]
    fn what_is_not_known() {
        let mut report = sample::warming();
        report.processes[0].rss.growth_bytes_per_s = None;
        report.processes[0].memory_limit_bytes = None;
        let unknown = page(&report);
        for name in ["leaktrace_process_resident_growth_bytes_per_second", "leaktrace_process_memory_limit_bytes"] {
            assert!(series(&unknown, name).is_empty(), "{name}");
        }
        report.processes.clear();
        let nothing = page(&report);
        assert_eq!(series(&nothing, "leaktrace_leaking_processes").len(), 1);
        assert!(nothing.ends_with("# EOF\n"));
    }
}

use super::*;
use crate::report::sample;

const MIB: u64 = 1 << 20;
const STEADY: i64 = 60;

/// A host with processes, whose time goes on by seconds.
struct Host {
    baselines: Baselines,
    now: i64,
    /// Of all of them.
    labels: Labels,
}

/// One of its processes.
struct Fake<'a> {
    pid: u32,
    exe: &'a str,
    build: Option<&'a str>,
    mib: u64,
    rate: f64,
    verdict: Option<Verdict>,
}

impl Host {
    fn new() -> Self {
        let labels = Labels { unit: Some("orders.service".to_owned()), ..Labels::default() };
        Self { baselines: baselines(), now: 1_700_000_000, labels }
    }

    /// The report of a look at these processes, after some time.
    fn look(&mut self, seconds: i64, processes: &[Fake<'_>]) -> Report {
        self.now += seconds;
        let mut report = sample::system();
        let model = report.processes[0].clone();
        report.processes = processes
            .iter()
            .filter_map(|fake| Some(Process { pid: fake.pid, verdict: fake.verdict?, ..model.clone() }))
            .collect();
        let mut observed = processes.iter().map(|fake| Observed {
            id: ProcessId { tgid: fake.pid, start_time: 7 },
            comm: "orders",
            exe: Some(fake.exe),
            build_id: fake.build,
            labels: &self.labels,
            resident_bytes: fake.mib * MIB,
            growth_bytes_per_s: Some(fake.rate),
            watched: YOUNG,
        });
        self.baselines.observe(&mut observed, &mut report, Timestamp::from_second(self.now).unwrap());
        report
    }

    /// Its processes are in a container, of this image as far as that is known.
    fn of_image(&mut self, image: Option<&str>) {
        self.labels =
            Labels { container: Some("4b1a".to_owned()), image: image.map(str::to_owned), ..Labels::default() };
    }

    /// The same host after the agent was restarted.
    fn agent_restarted(self) -> Self {
        let written = self.baselines.written();
        let mut baselines = baselines();
        baselines.take(serde_json::from_slice(&written).unwrap());
        assert_eq!(baselines.contents(), self.baselines.contents());
        Self { baselines, ..self }
    }
}

fn baselines() -> Baselines {
    Baselines::new(Duration::from_secs(STEADY as u64), 1 << 20)
}

fn calm(pid: u32, build: &str, mib: u64) -> Fake<'_> {
    Fake { pid, exe: "/srv/orders", build: Some(build), mib, rate: 10.0, verdict: None }
}

fn leaking(pid: u32, build: &str, mib: u64) -> Fake<'_> {
    Fake { rate: 100_000.0, verdict: Some(Verdict::Leaking), ..calm(pid, build, mib) }
}

/// A build that leaks where the one before it was steady has brought the leak; after a restart of the agent that is still known.
#[test]
fn grew_since_a_build() {
    let mut host = Host::new();
    host.look(0, &[calm(1, "aaaa", 100)]);
    host.look(STEADY, &[calm(1, "aaaa", 100)]);
    let mut host = host.agent_restarted();
    let report = host.look(60, &[leaking(2, "bbbb", 150)]);
    let baseline = report.processes[0].baseline.as_ref().unwrap();
    assert_eq!(baseline.grew_since_build.as_deref(), Some("aaaa"));
    assert_eq!((baseline.steady_bytes, baseline.steady_build_id.as_deref()), (Some(100 * MIB), Some("aaaa")));
    assert_eq!(baseline.remark.as_deref(), Some("grows since build aaaa, which was steady at 100 MiB"));
    // The next build leaks as well, which is no news.
    let report = host.look(60, &[leaking(3, "cccc", 150)]);
    let baseline = report.processes[0].baseline.as_ref().unwrap();
    assert_eq!((baseline.grew_since_build.as_deref(), baseline.leaked_with_build.as_deref()), (None, Some("bbbb")));
}

/// A deploy that changes the image's tag or digest leaves the program the same one; another image has other programs, also where their
/// executables have the same path.
#[test]
fn grew_since_a_build_of_the_same_image() {
    for (image, same) in [
        ("registry.example:5000/shop/orders:1.5", true),
        ("registry.example:5000/shop/orders", true),
        ("registry.example:5000/shop/orders:1.5@sha256:07", true),
        ("registry.example:5000/shop/orders@sha256:07", true),
        ("registry.example:5000/shop/other:1.4", false),
        ("registry.example/shop/orders:1.4", false),
        ("sha256:07", false),
    ] {
        let mut host = Host::new();
        host.of_image(Some("registry.example:5000/shop/orders:1.4"));
        host.look(0, &[calm(1, "aaaa", 100)]);
        host.look(STEADY, &[calm(1, "aaaa", 100)]);
        let mut host = host.agent_restarted();
        host.of_image(Some(image));
        let report = host.look(60, &[leaking(2, "bbbb", 150)]);
        let grew = report.processes[0].baseline.as_ref().and_then(|baseline| baseline.grew_since_build.as_deref());
        assert_eq!(grew, same.then_some("aaaa"), "{image}");
    }
}

/// Where images become known only later, as after the API server was away, a process stays the same one, and so it does where its image
/// cannot be asked for any more.
#[test]
fn an_image_that_is_known_later() {
    let mut host = Host::new();
    host.of_image(None);
    host.look(0, &[calm(1, "aaaa", 100)]);
    host.of_image(Some("orders:1.4"));
    host.look(STEADY - 1, &[calm(1, "aaaa", 100)]);
    host.of_image(None);
    host.look(1, &[calm(1, "aaaa", 100)]);
    let programs = host.baselines.contents().programs;
    assert_eq!(programs.len(), 1, "{programs:?}");
    assert_eq!((programs[0].within.as_str(), programs[0].builds[0].steady_bytes), ("orders", Some((100 * MIB) as f64)));
    // Its successor is told to be one once that is known.
    host.of_image(Some("orders:1.4"));
    host.look(10, &[leaking(1, "aaaa", 400)]);
    host.look(10, &[]);
    host.of_image(None);
    assert!(host.look(10, &[calm(2, "aaaa", 100)]).system.unwrap().restarts.is_empty());
    host.of_image(Some("orders:1.5"));
    let restarts = host.look(10, &[calm(2, "aaaa", 100)]).system.unwrap().restarts;
    assert_eq!(restarts.iter().map(|restart| (restart.pid, restart.back_to_baseline)).collect::<Vec<_>>(), [(2, true)]);
}

/// A build that was steady and leaks now has not brought the leak by itself.
#[test]
fn the_same_build() {
    let mut host = Host::new();
    host.look(0, &[calm(1, "aaaa", 100)]);
    host.look(STEADY, &[calm(1, "aaaa", 100)]);
    host.look(1, &[calm(2, "bbbb", 80)]);
    host.look(STEADY, &[calm(2, "bbbb", 80)]);
    let report = host.look(60, &[leaking(2, "bbbb", 120)]);
    let baseline = report.processes[0].baseline.as_ref().unwrap();
    assert_eq!(baseline.grew_since_build, None);
    assert_eq!(baseline.remark.as_deref(), Some("the same build was steady before, at 80 MiB"));
}

/// After a restart it is told whether the memory is back to where it is when it is steady; for another program nothing is.
#[test]
fn back_to_baseline() {
    for (mib, back) in [(101, true), (124, true), (126, false), (380, false)] {
        let mut host = Host::new();
        host.look(0, &[calm(1, "aaaa", 100)]);
        host.look(STEADY, &[calm(1, "aaaa", 100)]);
        host.look(60, &[leaking(1, "aaaa", 400)]);
        // It ends between the report and the look.
        host.look(10, &[Fake { verdict: None, ..leaking(1, "aaaa", 400) }]);
        host.look(10, &[]);
        let mut host = host.agent_restarted();
        let other = Fake { exe: "/srv/other", ..calm(8, "aaaa", 400) };
        let report = host.look(30, &[calm(2, "aaaa", mib), other]);
        let restarts = report.system.unwrap().restarts;
        assert_eq!(restarts.len(), 1, "{restarts:?}");
        let restart = &restarts[0];
        assert_eq!((restart.pid, restart.leaked, restart.back_to_baseline), (2, true, back));
        assert_eq!((restart.before_bytes, restart.now_bytes), (400 * MIB, mib * MIB));
        assert_eq!(restart.baseline_bytes, Some(100 * MIB));
        // Told once, with the size that it has now.
        let restarts = host.look(10, &[calm(2, "aaaa", 200)]).system.unwrap().restarts;
        assert_eq!((restarts.len(), restarts[0].now_bytes), (1, 200 * MIB));
    }
}

/// One that starts much later is no restart, nor is one after an end at the usual size.
#[test]
fn no_restart() {
    let mut host = Host::new();
    host.look(0, &[leaking(1, "aaaa", 400)]);
    host.look(1, &[]);
    assert!(host.look(RESTART + 1, &[calm(2, "aaaa", 100)]).system.unwrap().restarts.is_empty());
    host.look(STEADY, &[calm(2, "aaaa", 100)]);
    host.look(1, &[]);
    assert!(host.look(1, &[calm(3, "aaaa", 100)]).system.unwrap().restarts.is_empty());
}

/// What grows is not steady, however long it is watched, nor is what is not yet judged; growth too small to matter is none.
#[test]
fn what_is_steady() {
    let steady = |fake: fn() -> Fake<'static>| {
        let mut host = Host::new();
        for _ in 0..20 {
            host.look(STEADY, &[fake()]);
        }
        !host.baselines.contents().programs.is_empty()
    };
    assert!(!steady(|| Fake { rate: 5000.0, ..calm(1, "a", 100) }));
    assert!(!steady(|| Fake { verdict: Some(Verdict::Warming), ..calm(1, "a", 100) }));
    assert!(steady(|| Fake { rate: 2500.0, ..calm(1, "a", 100) }));
    assert!(steady(|| Fake { rate: -5000.0, ..calm(1, "a", 100) }));
    assert!(steady(|| Fake { verdict: Some(Verdict::Plateau), ..calm(1, "a", 1) }));
}

/// Thousands of programs, builds and processes that come and go leave no more than the bounds say, and what was seen last stays.
#[test]
fn bounded() {
    let mut host = Host { baselines: Baselines::new(Duration::from_secs(1), 16 << 10), ..Host::new() };
    for n in 0..3000_u32 {
        let (exe, build) = (format!("/srv/program-{}", n % 1000), format!("{n:040x}"));
        let fake = || Fake { pid: n, exe: &exe, ..leaking(n, &build, 100) };
        host.look(1, &[fake()]);
        host.look(1, &[fake()]);
    }
    let baselines = &host.baselines;
    assert!(baselines.programs.len() as u64 <= (16 << 10) / PROGRAM);
    assert!(baselines.programs.values().all(|program| program.builds.len() <= BUILDS));
    assert_eq!((baselines.instances.len(), baselines.restarts.len().max(RESTARTS)), (1, RESTARTS));
    let written = baselines.written();
    assert!(written.len() <= 16 << 10, "{}", written.len());
    let contents: Contents = serde_json::from_slice(&written).unwrap();
    assert!(contents.programs.len() > 10 && contents.programs[0].exe == "/srv/program-999");
}

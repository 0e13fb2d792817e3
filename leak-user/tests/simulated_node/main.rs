//! A node with a hundred processes in control groups as Kubernetes makes them, and an API server that has its moods.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use leak_user::agent::kube::{Kubernetes, Server as At, Settings, State};
use leak_user::labels::Labels;
use leak_user::process::{give_back_memory, own_memory};
use leak_user::report::{self, Host, Mode, Report, Watched};
use leaktrace_tests::kubernetes::{Container, Mood, NODE, Server};
use leaktrace_tests::{host, patience};
use serde_json::{Value, json};

const PROCESSES: usize = 100;

/// A process that sleeps in a container of its own.
struct Member {
    child: Child,
    container: Container,
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn members(top: &str) -> Option<Vec<Member>> {
    let member = |n| {
        let container = Container::new(top, n)?;
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().ok()?;
        let member = Member { child, container };
        member.container.take(member.child.id()).ok()?;
        Some(member)
    };
    (0..PROCESSES).map(member).collect()
}

/// What the API server says of them; each time with other names.
fn pods(members: &[Member], generation: u32) -> BTreeMap<String, Value> {
    let pod = |member: &Member| (member.container.uid.clone(), member.container.pod(&generation.to_string()));
    members.iter().map(pod).collect()
}

fn watched(members: &[Member]) -> Report {
    let mut report = Report::new(Mode::default(), Host::default());
    let of = |member: &Member| Watched {
        pid: member.child.id(),
        labels: Labels::read(member.child.id()).into(),
        ..Watched::default()
    };
    let processes = members.iter().map(of).collect();
    report.system = Some(report::System { processes, ..report::System::default() });
    report
}

/// How many are named as this generation has them.
fn named(kubernetes: &mut Kubernetes, members: &[Member], generation: u32) -> usize {
    let mut report = watched(members);
    kubernetes.enrich(&mut report);
    let processes = report.system.expect("a system").processes;
    let is_named = |(n, process): (usize, &Watched)| {
        let labels = &process.labels;
        let expected = [
            format!("app-{n}-{generation}"),
            format!("team-{}", n % 7),
            format!("main-{n}"),
            format!("registry.example/app-{n}:{generation}"),
            NODE.to_owned(),
        ];
        let of = [&labels.pod, &labels.namespace, &labels.container_name, &labels.image, &labels.node];
        of.into_iter().zip(&expected).all(|(label, expected)| label.as_ref() == Some(expected))
    };
    processes.iter().enumerate().filter(|(n, process)| is_named((*n, process))).count()
}

fn all_named(kubernetes: &mut Kubernetes, members: &[Member], generation: u32) {
    let mut count = 0;
    let all = host::wait_until(patience(), || {
        count = named(kubernetes, members, generation);
        count == members.len()
    });
    let state = kubernetes.shared().state();
    assert!(all, "{count} of {} are named as of {generation}: {state}", members.len());
}

fn settings(server: &Server) -> Settings {
    Settings {
        server: Ok(At::At { url: server.url(), token_file: None, certificate_authority: None }),
        node: Some(NODE.to_owned()),
        events: true,
        watch: Duration::from_secs(1),
        longest_wait: Duration::from_millis(50),
        confirm: Duration::ZERO,
    }
}

/// A leak in the first of them.
fn leak(members: &[Member]) -> Report {
    let mut report = watched(members);
    let stack = json!({
        "id": "1", "verdict": "growing", "resource": "heap", "op": "malloc", "live_bytes": 1, "live_count": 1, "allocated_bytes": 1,
        "freed_bytes": 0, "oldest_age_s": 1.0, "growth": { "bytes_per_s": 20480.0, "ci95": [20000.0, 21000.0], "confidence": 0.99,
        "windows": 9 }, "series": [], "complete": true, "end": "complete", "by_frame_pointers": false,
        "frames": [{ "function": "remember", "module": "/srv/app", "build_id": null, "offset": 16, "file": "app.c", "line": 7,
        "inlined": false, "language": "c" }],
    });
    let mut process = json!({
        "pid": members[0].child.id(), "comm": "app", "exe": "/srv/app", "cgroup": null, "verdict": "leaking", "hint": null,
        "live_bytes": 1, "live_count": 1, "rss": { "first_bytes": 1, "last_bytes": 2, "growth_bytes_per_s": 20480.0 },
        "explained_growth_ratio": 1.0, "memory_limit_bytes": 1 << 28, "seconds_to_limit": 12000.0, "allocators": [], "ended": null,
        "stacks_seen": 1, "growing_stacks": 1, "growing_bytes_per_s": 20480.0,
    });
    process["stacks"] = json!([stack]);
    let mut process: report::Process = serde_json::from_value(process).expect("a process of a report");
    process.labels = report.system.as_ref().expect("a system").processes[0].labels.clone();
    report.processes.push(process);
    report
}

/// Each process is named by its pod, whatever runtime made its control group; after everything that the server does wrong labels are
/// current again as soon as it does right, what was known stays meanwhile, and neither that nor endless answers make memory grow. A leak
/// is told to the cluster once, also where that takes several attempts.
#[test]
fn simulated_node() {
    let test = "simulated_node";
    let top = format!("leaktrace-test-{}", std::process::id());
    let Some(members) = members(&top) else {
        host::skip(test, "control groups cannot be made");
        return;
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let entered = runtime.enter();
    let server = Server::start();
    let mut generation = 0;
    server.set_pods(pods(&members, generation));
    let mut kubernetes = Kubernetes::start(&settings(&server));
    all_named(&mut kubernetes, &members, generation);
    let asked = server.asked();
    assert!(asked[0].contains("fieldSelector=spec.nodeName%3Dnode-1"), "{asked:?}");

    let mut fault = |kubernetes: &mut Kubernetes, mood: Mood| {
        server.set_mood(mood);
        assert!(host::wait_until(patience(), || server.met() >= 2), "{mood:?} was not met");
        // What was known is still there.
        assert_eq!(named(kubernetes, &members, generation), members.len(), "{mood:?}");
        generation += 1;
        server.set_pods(pods(&members, generation));
        server.set_mood(Mood::Well);
        all_named(kubernetes, &members, generation);
        assert!(matches!(kubernetes.shared().state(), State::Current { pods: PROCESSES, left_out: 0 }), "{mood:?}");
    };
    let moods = [
        Mood::Slow,
        Mood::Broken,
        Mood::Forbidding,
        Mood::Hanging,
        Mood::Halfway,
        Mood::Noise,
        Mood::NoJson,
        Mood::OtherJson,
        Mood::Gone,
        Mood::Endless,
    ];
    let memory = || {
        give_back_memory();
        own_memory().expect("own memory")
    };
    let rounds: Vec<u64> = (0..4)
        .map(|_| {
            for mood in moods {
                fault(&mut kubernetes, mood);
            }
            memory()
        })
        .collect();
    assert!(server.met_bounds(), "an answer without an end was taken whole");
    eprintln!(
        "own memory after each round: {} KiB",
        rounds.iter().map(|bytes| (bytes >> 10).to_string()).collect::<Vec<_>>().join(", ")
    );
    // The first two find out how much each thread keeps for itself.
    assert!(rounds[3] < rounds[1] + (4 << 20), "{rounds:?}");
    fault(&mut kubernetes, Mood::Silent);

    // A pod that is gone, and one that comes, are told by the watch.
    generation += 1;
    let mut fewer = pods(&members, generation);
    fewer.remove(&members[5].container.uid);
    server.set_pods(fewer);
    let shared = kubernetes.shared();
    let one_less = || matches!(shared.state(), State::Current { pods, .. } if pods == PROCESSES - 1);
    assert!(host::wait_until(patience(), one_less), "{}", shared.state());
    server.set_pods(pods(&members, generation));
    all_named(&mut kubernetes, &members, generation);

    // Refused, which is told; then sent, and not twice.
    server.set_mood(Mood::Forbidding);
    let failing = || matches!(shared.state(), State::Failing { error, .. } if error.contains("pods is forbidden"));
    assert!(host::wait_until(patience(), failing), "{}", shared.state());
    // The right to make one may come later, too.
    let mut report = leak(&members);
    kubernetes.enrich(&mut report);
    let posted = || server.asked().iter().filter(|asked| asked.starts_with("POST")).count();
    assert!(host::wait_until(patience(), || posted() >= 2), "no attempt");
    server.set_mood(Mood::Broken);
    let before = posted();
    assert!(host::wait_until(patience(), || posted() > before), "no more attempts");
    server.set_mood(Mood::Well);
    assert!(host::wait_until(patience(), || server.events().len() == 1), "not sent");
    kubernetes.enrich(&mut report);
    drop(kubernetes);
    // Another agent's attempt finds it there.
    let mut another = Kubernetes::start(&settings(&server));
    all_named(&mut another, &members, generation);
    another.enrich(&mut leak(&members));
    let sent = || another.shared().events().sent.load(std::sync::atomic::Ordering::Relaxed) == 1;
    assert!(host::wait_until(patience(), sent), "not held to be sent");
    let events = server.events();
    assert_eq!(events.len(), 1, "{events:?}");
    let event = &events[0];
    assert_eq!(event["regarding"]["name"], format!("app-0-{generation}"));
    assert_eq!(event["regarding"]["uid"], members[0].container.uid);
    assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("MemoryLeak")));
    let note = event["note"].as_str().expect("a note");
    assert!(note.contains("remember") && note.contains("out of memory in about 3 h 20 min"), "{note}");
    drop(entered);
    runtime.shutdown_timeout(Duration::from_secs(5));
}

//! Made-up reports that look like real ones.

use super::*;

const MIB: u64 = 1 << 20;

pub fn frame(function: &str, file: &str, line: u32) -> Frame {
    Frame {
        function: Some(function.to_owned()),
        module: Some("/srv/orders/bin/orders".to_owned()),
        build_id: Some("7b2c4e5f".to_owned()),
        offset: Some(0x1_2a40),
        file: Some(file.to_owned()),
        line: Some(line),
        language: Some("c++".to_owned()),
        ..Frame::default()
    }
}

/// A frame of which only the place is known.
pub fn bare(module: &str, offset: u64) -> Frame {
    Frame {
        module: Some(module.to_owned()),
        offset: Some(offset),
        reason: Some("the file has no symbols".to_owned()),
        ..Frame::default()
    }
}

fn libc() -> Vec<Frame> {
    let module = Some("/usr/lib/x86_64-linux-gnu/libc.so.6".to_owned());
    ["__libc_start_call_main", "__libc_start_main_impl"]
        .into_iter()
        .zip([0x2_7249, 0x2_7304])
        .map(|(name, offset)| Frame {
            function: Some(name.to_owned()),
            module: module.clone(),
            offset: Some(offset),
            ..Frame::default()
        })
        .collect()
}

fn stack(id: &str, verdict: StackVerdict, series: impl Iterator<Item = u64>, mut frames: Vec<Frame>) -> Stack {
    frames.extend(libc());
    let series: Vec<(f64, u64)> = series.enumerate().map(|(i, bytes)| (i as f64, bytes)).collect();
    let live_bytes = series.last().map_or(0, |point| point.1);
    Stack {
        id: id.to_owned(),
        verdict,
        resource: Resource::Heap,
        op: Some("malloc".to_owned()),
        live_bytes,
        live_count: live_bytes / 512,
        allocated_bytes: live_bytes * 3,
        allocated_count: Some(live_bytes / 512 * 3),
        freed_bytes: live_bytes * 2,
        live_bytes_ci95: None,
        live_count_ci95: None,
        allocated_bytes_ci95: None,
        freed_bytes_ci95: None,
        oldest_age_s: Some(29.5),
        growth: Growth { windows: 12, ..Growth::default() },
        series,
        complete: true,
        end: StackEnd::Complete,
        by_windows: false,
        by_frame_pointers: false,
        affected_by_loss: false,
        frames,
    }
}

fn report(process: Process) -> Report {
    Report {
        schema: SCHEMA.to_owned(),
        tool: Tool { name: "leaktrace".to_owned(), version: "0.1.0".to_owned() },
        host: Host {
            hostname: Some("web-3".to_owned()),
            kernel: Some("6.12.1".to_owned()),
            arch: Some("x86_64".to_owned()),
            cpus: Some(2),
            memory_bytes: Some(8192 * MIB),
        },
        started_at: "2026-01-02T03:04:05Z".parse().unwrap(),
        duration_s: 30.0,
        is_final: true,
        ended: Some(Ended::Duration),
        mode: Mode {
            sampling: Sampling::Exact,
            interval_bytes: None,
            unwinder: Unwinder::Fp,
            unwind_table_bytes: None,
            unwind_memory_bytes: None,
        },
        events: 1_269_000,
        events_per_s: Some(42_300.0),
        counters: BTreeMap::new(),
        accounts: Accounts::default(),
        memory: Memory::default(),
        losses: BTreeMap::new(),
        command: None,
        processes: vec![process],
        ended_processes: Vec::new(),
        oom_kills: Vec::new(),
        system: None,
    }
}

fn process(verdict: Verdict) -> Process {
    Process {
        pid: 1234,
        comm: "orders".to_owned(),
        exe: Some("/srv/orders/bin/orders".to_owned()),
        cgroup: Some("/system.slice/orders.service".to_owned()),
        labels: Labels { unit: Some("orders.service".to_owned()), ..Labels::default() },
        reason: None,
        baseline: None,
        verdict,
        hint: None,
        live_bytes: 68 * MIB,
        live_count: 120_034,
        interval_bytes: None,
        overhead: None,
        live_bytes_ci95: None,
        live_count_ci95: None,
        rss: Rss { first_bytes: Some(120 * MIB), last_bytes: Some(120 * MIB + MIB / 2), growth_bytes_per_s: Some(0.0) },
        explained_growth_ratio: None,
        affected_by_loss: false,
        memory_limit_bytes: Some(512 * MIB),
        memory_limit_of: Some("/system.slice/orders.service".to_owned()),
        memory_used_bytes: None,
        seconds_to_limit: None,
        allocators: vec![Allocator {
            family: "glibc".to_owned(),
            path: "/usr/lib/x86_64-linux-gnu/libc.so.6".to_owned(),
            build_id: None,
            functions: vec!["malloc".to_owned(), "free".to_owned()],
        }],
        ended: None,
        stacks_seen: 214,
        growing_stacks: 0,
        growing_bytes_per_s: None,
        stacks: Vec::new(),
    }
}

/// Stacks that do not grow: a full cache, one that filled up, a burst.
fn others() -> Vec<Stack> {
    let wave = [0_u64, 3, 1, 4, 2, 5];
    vec![
        stack(
            "c000000000000003",
            StackVerdict::Stable,
            (0..30).map(|i| 50 * MIB + wave[i % 6] * 1000),
            vec![frame("Cache::insert(Key const&, Value)", "/srv/orders/src/cache.cc", 88)],
        ),
        stack(
            "d000000000000004",
            StackVerdict::Plateau,
            (0..30_u64).map(|i| i.min(12) * MIB / 2),
            vec![frame("Pool::grow()", "/srv/orders/src/pool.cc", 31)],
        ),
        stack(
            "e000000000000005",
            StackVerdict::Spike,
            (0..30_u64).map(|i| if (10..15).contains(&i) { 9 * MIB } else { MIB }),
            vec![bare("/srv/orders/lib/libcodec.so", 0x4f10)],
        ),
    ]
}

/// A process with two leaking stacks beside some that do not.
pub fn leaking() -> Report {
    let mut main = stack(
        "a000000000000001",
        StackVerdict::Growing,
        (0..30_u64).map(|i| 12 * MIB + i * 20_972),
        vec![
            Frame {
                function: Some("operator new(unsigned long)".to_owned()),
                ..bare("/usr/lib/libstdc++.so.6", 0xaf1c)
            },
            Frame {
                inlined: true,
                ..frame(
                    "std::vector<Order, std::allocator<Order> >::push_back(Order&&)",
                    "/usr/include/c++/12/bits/stl_vector.h",
                    1287,
                )
            },
            frame("Session::remember(Order)", "/srv/orders/src/session.cc", 142),
            frame(
                "handle_request(Connection&, std::unordered_map<std::string, std::vector<Session*, std::allocator<Session*> > > const&)",
                "/srv/orders/src/http.cc",
                75,
            ),
            frame("main", "/srv/orders/src/main.cc", 20),
        ],
    );
    main.growth =
        Growth { bytes_per_s: Some(20_972.0), ci95: Some([19_900.0, 22_100.0]), confidence: Some(0.998), windows: 12 };
    main.freed_bytes = 0;
    main.allocated_bytes = main.live_bytes;
    let mut slow = stack(
        "b000000000000002",
        StackVerdict::Growing,
        (0..30_u64).map(|i| i * 128),
        vec![bare("/srv/orders/lib/libaudit.so", 0x1c40)],
    );
    slow.growth = Growth { bytes_per_s: Some(128.0), ci95: Some([90.0, 160.0]), confidence: Some(0.97), windows: 12 };
    slow.complete = false;
    slow.end = StackEnd::NoFramePointer;
    slow.frames.truncate(1);
    let mut process = process(Verdict::Leaking);
    process.stacks = [main, slow].into_iter().chain(others()).collect();
    process.growing_stacks = 2;
    process.growing_bytes_per_s = Some(21_100.0);
    process.rss.growth_bytes_per_s = Some(21_700.0);
    process.explained_growth_ratio = Some(0.972);
    process.memory_used_bytes = Some(120 * MIB);
    process.seconds_to_limit = Some(18_920.0);
    let mut report = report(process);
    report.losses.insert("allocations_ring_full".to_owned(), 1204);
    report.processes[0].affected_by_loss = true;
    report.processes[0].stacks[0].affected_by_loss = true;
    report
}

/// The leak, of which only samples were seen.
pub fn sampled() -> Report {
    let mut report = leaking();
    report.mode.sampling = Sampling::Bytes;
    report.mode.interval_bytes = Some(512 << 10);
    let about = |n: u64, part: u64| Some([n - n / part, n + n / part]);
    let process = &mut report.processes[0];
    process.interval_bytes = Some(512 << 10);
    process.live_bytes_ci95 = about(process.live_bytes, 8);
    process.live_count_ci95 = about(process.live_count, 6);
    for stack in &mut process.stacks {
        stack.live_bytes_ci95 = about(stack.live_bytes, 5);
        stack.live_count_ci95 = about(stack.live_count, 4);
        stack.allocated_bytes_ci95 = about(stack.allocated_bytes, 5);
        stack.freed_bytes_ci95 = about(stack.freed_bytes, 5);
    }
    report
}

/// Much memory, none of it growing.
pub fn steady() -> Report {
    let mut process = process(Verdict::Stable);
    process.stacks = others();
    process.stacks.remove(2);
    process.stacks.remove(1);
    report(process)
}

/// Too short a time for a verdict.
pub fn warming() -> Report {
    let mut process = process(Verdict::Warming);
    process.stacks = others();
    for stack in &mut process.stacks {
        stack.verdict = StackVerdict::Warming;
        stack.series.truncate(4);
    }
    process.rss = Rss { first_bytes: Some(120 * MIB), last_bytes: Some(120 * MIB), growth_bytes_per_s: None };
    let mut report = report(process);
    report.duration_s = 4.0;
    report.is_final = false;
    report.ended = None;
    report
}

/// The report of a whole system: a leak in a container, a stable process, and others that are only watched.
pub fn system() -> Report {
    let mut report = leaking();
    let leak = &mut report.processes[0];
    leak.labels = Labels {
        container: Some("8c1f0be5a1d94c3ab4f30c6a4be43bcf3ed0c6d2a2f7e6f1b0e3c1a2d3e4f5a6".to_owned()),
        container_runtime: Some("containerd".to_owned()),
        pod_uid: Some("1f0a9c3e-6d2b-4a7e-9c51-0d8e7f6a5b4c".to_owned()),
        pid_in_namespace: Some(7),
        pod: Some("orders-6c9f7d5b8-x2x4q".to_owned()),
        namespace: Some("shop".to_owned()),
        container_name: Some("api".to_owned()),
        image: Some("registry.example/shop/orders:1.4.2".to_owned()),
        node: Some("web-3".to_owned()),
        ..Labels::default()
    };
    leak.reason = Some(Reason::Rising { bytes: 24 << 20, seconds: 20.0 });
    leak.baseline = Some(Baseline {
        build_id: Some("7b2c4e5f".to_owned()),
        steady_bytes: Some(96 * MIB),
        steady_build_id: Some("0ddba11".to_owned()),
        grew_since_build: Some("0ddba11".to_owned()),
        remark: Some("grows since build 0ddba11, which was steady at 96 MiB".to_owned()),
        ..Baseline::default()
    });
    let mut calm = steady().processes.remove(0);
    calm.pid = 4321;
    calm.comm = "indexer".to_owned();
    report.processes.push(calm);
    let watched = |pid, comm: &str, mib: u64, slope| Watched {
        pid,
        comm: comm.to_owned(),
        rss: Rss { first_bytes: Some(mib * MIB), last_bytes: Some(mib * MIB), growth_bytes_per_s: Some(slope) },
        ..Watched::default()
    };
    let killed = report.processes[0].clone();
    report.oom_kills = vec![OomKill {
        at: "2026-01-02T03:04:26Z".parse().unwrap(),
        at_s: 21.0,
        pid: 1200,
        comm: killed.comm.clone(),
        exe: killed.exe.clone(),
        labels: killed.labels.clone(),
        rss: Rss { last_bytes: Some(511 * MIB), ..killed.rss },
        process: Some(Box::new(Process { pid: 1200, ..killed })),
    }];
    report.system = Some(System {
        watched: 212,
        traced: 2,
        most_traced: Some(16),
        processes: vec![watched(88, "postgres", 900, 2048.0), watched(1, "systemd", 12, 0.0)],
        decisions: vec![
            Decision {
                at_s: 17.0,
                pid: 1234,
                comm: "orders".to_owned(),
                what: Decided::Promoted,
                reason: Reason::Rising { bytes: 24 << 20, seconds: 20.0 },
            },
            Decision {
                at_s: 28.0,
                pid: 88,
                comm: "postgres".to_owned(),
                what: Decided::Released,
                reason: Reason::Steady { seconds: 60.0 },
            },
        ],
        growing: vec![NewPages {
            pid: 88,
            comm: "postgres".to_owned(),
            bytes_per_s: 70_000.0,
            faults: 120,
            stacks: vec![PageStack {
                faults: 96,
                share: 0.8,
                end: StackEnd::Complete,
                frames: ["memset", "palloc0", "ExecInitNode", "main"]
                    .map(|name| Frame { function: Some(name.to_owned()), ..Frame::default() })
                    .into(),
            }],
        }],
        restarts: vec![Restart {
            pid: 512,
            comm: "billing".to_owned(),
            leaked: true,
            before_bytes: 400 * MIB,
            now_bytes: 52 * MIB,
            baseline_bytes: Some(50 * MIB),
            back_to_baseline: true,
            ..Restart::default()
        }],
    });
    report
}

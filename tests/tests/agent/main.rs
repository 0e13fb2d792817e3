//! The agent: what it serves, whom it serves, and what it does when something around it is wrong.

mod kubernetes;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::endpoints::{Endpoint, Manner};
use leaktrace_tests::{Agent, Answer, Leaktrace, PATIENCE, Traced, has_frame, host, metric, stacks};

/// Selects nobody, for tests of what is around tracing.
const NOBODY: &str = "trace.comm=nobody-at-all";
const TOKEN: &str = "a-token-for-this-test";

/// Runs one that is expected to end by itself, with the code and the text on its standard error.
fn refused(args: &[&str]) -> Result<(i32, String)> {
    let outcome = Leaktrace::new()?.arg("agent").args(args).run(PATIENCE)?;
    Ok((outcome.code()?, outcome.stderr))
}

/// What leaks is in the report, the process, the profile and the metrics; a reload goes on with what it can, and says what it
/// cannot; after SIGTERM no breakpoint is left.
#[test]
fn serves_what_it_finds() -> Result<()> {
    if !host::can_trace("serves_what_it_finds") {
        return Ok(());
    }
    let traced = Traced::new()?;
    let fixture = traced.builder().start()?;
    let pid = fixture.pid();
    traced.configure("")?;
    let mut agent = traced.agent()?;
    agent.wait_for("/readyz", |answer| answer.status == 200)?;
    let leaks = |answer: &Answer| {
        answer.json().is_ok_and(|report| {
            report["processes"][0]["verdict"] == "leaking"
                && stacks(&report).any(|stack| has_frame(stack, "leak_block"))
        })
    };
    let report = agent.wait_longer("/api/v1/report", PATIENCE * 2, leaks)?;
    ensure!(report.head.contains("application/json") && report.head.contains("nosniff"), "{}", report.head);
    ensure!(report.json()?["processes"][0]["pid"] == pid, "{}", report.text());
    let process = agent.get(&format!("/api/v1/processes/{pid}"))?;
    ensure!(process.status == 200 && process.json()?["pid"] == pid, "{}", process.text());
    for path in ["/api/v1/processes/1", "/api/v1/processes/x", "/debug/pprof/heap?pid=1"] {
        let answer = agent.get(path)?;
        ensure!(answer.status == 404 && answer.json()?["error"].is_string(), "{path}: {answer:?}");
    }
    for path in ["/debug/pprof/heap?type=x", "/debug/pprof/heap?pid=x"] {
        ensure!(agent.get(path)?.status == 400, "{path}");
    }
    ensure!(agent.get("/api/v1/report/")?.status == 404 && agent.get("/../etc/passwd")?.status == 404);
    ensure!(agent.say(b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?.status == 405);
    let page = agent.get("/metrics")?.text();
    ensure!(page.ends_with("# EOF\n"), "{page}");
    let series = format!("leaktrace_process_growth_bytes_per_second{{pid=\"{pid}\"");
    ensure!(metric(&page, &series).is_some_and(|rate| rate > 1000.0), "{page}");
    profile_is_read(&agent, pid, traced.folder())?;

    // A mistake changes nothing, and is said with its place.
    traced.configure("interval = 'often'\n")?;
    agent.signal(libc::SIGHUP)?;
    let answer = agent.wait_for("/readyz", |answer| answer.text().contains("configuration: degraded"))?;
    ensure!(answer.status == 200 && answer.text().contains("agent.toml:5: trace.interval"), "{}", answer.text());
    // Who is selected can change, and where it listens cannot.
    fs::write(
        traced.config(),
        "[trace]\ncomm = 'nobody-at-all'\nmax_overhead = 'off'\nall = true\ninterval = '1s'\nkernel_memory = '32MiB'\n",
    )?;
    agent.signal(libc::SIGHUP)?;
    let answer =
        agent.wait_for("/readyz", |answer| answer.text().contains("wait for a restart: trace.kernel_memory"))?;
    ensure!(answer.status == 200, "{}", answer.text());
    agent.wait_for("/api/v1/report", |answer| {
        answer.json().is_ok_and(|report| report["processes"] == serde_json::json!([]))
    })?;
    ensure!(host::breakpoints(pid)? == 0, "a process that is not selected any more has breakpoints");
    traced.configure("")?;
    agent.signal(libc::SIGHUP)?;
    agent
        .wait_for("/api/v1/report", |answer| answer.json().is_ok_and(|report| report["processes"][0]["pid"] == pid))?;
    agent.running().wait_attached(pid)?;
    let page = agent.get("/metrics")?.text();
    ensure!(
        metric(&page, "leaktrace_agent_events_total{part=\"configuration\",event=\"refused\"}") == Some(1.0),
        "{page}"
    );
    ensure!(
        metric(&page, "leaktrace_agent_events_total{part=\"configuration\",event=\"reloaded\"}") == Some(2.0),
        "{page}"
    );

    let outcome = agent.stop()?;
    ensure!(outcome.code()? == 0, "{}", outcome.stderr);
    ensure!(host::breakpoints(pid)? == 0, "breakpoints are left");
    Ok(())
}

/// Google's pprof reads the profile of a process, with the leaking function in it.
fn profile_is_read(agent: &Agent, pid: u32, folder: &Path) -> Result<()> {
    let Some(pprof) = host::program("serves_what_it_finds", "pprof") else { return Ok(()) };
    for (path, shown) in
        [("heap", "inuse_space"), ("allocs", "alloc_space"), ("heap?type=inuse_objects", "inuse_objects")]
    {
        let separator = if path.contains('?') { '&' } else { '?' };
        let answer = agent.get(&format!("/debug/pprof/{path}{separator}pid={pid}&seconds=1&gc=1"))?;
        ensure!(answer.status == 200, "{path}: {}", answer.head);
        let file = folder.join("profile.pb.gz");
        fs::write(&file, &answer.body)?;
        let output = Command::new(&pprof).args(["-top", "-symbolize=none"]).arg(&file).env("HOME", folder).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success() && text.contains("leak_block"), "{text}{output:?}");
        ensure!(text.contains(&format!("Type: {shown}")), "{text}");
    }
    Ok(())
}

/// A configuration with a mistake is refused before anything is traced, with its place and status 2; one without is said to make sense.
#[test]
fn mistakes_of_configuration() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("agent.toml");
    let path = file.to_str().context("the folder's name is text")?;
    fs::write(&file, "[http]\n\nlisten = '0.0.0.0:9790'\n")?;
    for args in [&["--config", path][..], &["--config", path, "--check-config"]] {
        let (code, text) = refused(args)?;
        ensure!(
            code == 2 && text.contains(&format!("{path}:3: http.listen: ")) && text.contains("token_file"),
            "{text}"
        );
    }
    let outcome = Leaktrace::new()?
        .env("LEAKTRACE_HTTP_TIMEOUT", "soon")
        .args(["agent", "--config", "/dev/null", "--check-config"])
        .run(PATIENCE)?;
    ensure!(outcome.code()? == 2 && outcome.stderr.contains("LEAKTRACE_HTTP_TIMEOUT: http.timeout: "), "{outcome:?}");
    let (code, text) = refused(&["--config", "/dev/null", "--check-config", "--set", "http.listen=\u{1b}[2J"])?;
    ensure!(code == 2 && text.contains("--set http.listen=") && !text.contains('\u{1b}'), "{text:?}");
    let outcome = Leaktrace::new()?.args(["agent", "--config", "/dev/null", "--check-config"]).run(PATIENCE)?;
    ensure!(outcome.code()? == 0 && outcome.stdout.contains("makes sense"), "{outcome:?}");
    Ok(())
}

/// A port that is taken is an error that names the address and what may be there.
#[test]
fn port_taken() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let (code, text) = refused(&["--config", "/dev/null", "--listen", &address])?;
    ensure!(code == 1, "{text}");
    ensure!(text.contains(&address) && text.contains("in use") && text.contains("another agent"), "{text}");
    Ok(())
}

/// A folder for the state that cannot be written takes nothing but the state; a damaged file is set aside, and both are said.
#[test]
fn state_that_cannot_be_kept() -> Result<()> {
    if !host::can_trace("state_that_cannot_be_kept") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    fs::write(&file, "")?;
    let agent = Agent::start(&file.join("state"), ["--config", "/dev/null", "--set", NOBODY])?;
    let answer = agent.wait_for("/readyz", |answer| answer.status == 200)?;
    ensure!(
        answer.text().contains("state: degraded: ") && answer.text().contains("Not a directory"),
        "{}",
        answer.text()
    );
    ensure!(metric(&agent.get("/metrics")?.text(), "leaktrace_agent_degraded{part=\"state\"}") == Some(1.0));
    ensure!(agent.stop()?.code()? == 0);

    let state = folder.path().join("state");
    fs::create_dir(&state)?;
    fs::write(state.join("baselines"), "leaktrace-state 1 00000000 3\n[7]")?;
    let agent = Agent::start(&state, ["--config", "/dev/null", "--set", NOBODY])?;
    let answer = agent.wait_for("/readyz", |answer| answer.status == 200)?;
    ensure!(answer.text().contains("state: ok (the file is damaged; set aside as "), "{}", answer.text());
    let page = agent.get("/metrics")?.text();
    ensure!(metric(&page, "leaktrace_agent_events_total{part=\"state\",event=\"set_aside\"}") == Some(1.0), "{page}");
    ensure!(agent.stop()?.code()? == 0);
    let names: Vec<String> = fs::read_dir(&state)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    ensure!(names.iter().any(|name| name.starts_with("baselines.corrupt-")), "{names:?}");
    ensure!(fs::read_to_string(state.join("baselines"))?.starts_with("leaktrace-state 1 "), "{names:?}");
    ensure!(names.len() == 3, "{names:?}");
    Ok(())
}

/// At SIGTERM and SIGINT the last report is pushed and the state is kept, though the next push would have been an hour later; an endpoint that
/// says nothing, or is not there, takes no more time than it may.
#[test]
fn the_end_leaves_nothing_behind() -> Result<()> {
    if !host::can_trace("the_end_leaves_nothing_behind") {
        return Ok(());
    }
    for (signal, manner, counts) in [
        (libc::SIGTERM, Manner::Takes, (1, 0)),
        (libc::SIGINT, Manner::Late, (1, 0)),
        (libc::SIGTERM, Manner::Hangs, (0, 1)),
        (libc::SIGTERM, Manner::Down, (0, 0)),
    ] {
        let folder = tempfile::tempdir()?;
        let mut endpoint = Endpoint::start("/v1/metrics")?;
        endpoint.behave(manner)?;
        let url = format!("push.otlp.url={}", endpoint.url());
        let sets = ["--set", NOBODY, "--set", &url, "--set", "push.otlp.interval=1h"];
        let agent = Agent::start(folder.path(), ["--config", "/dev/null"].into_iter().chain(sets))?;
        agent.wait_for("/readyz", |answer| answer.status == 200)?;
        fs::remove_file(folder.path().join("baselines"))?;
        ensure!(endpoint.counts()? == (0, 0), "pushed before the end");
        let began = Instant::now();
        agent.signal(signal)?;
        let outcome = agent.wait()?;
        // The flush takes two seconds at most, and a busy machine some more.
        let took = began.elapsed();
        ensure!(outcome.code()? == 0 && took < PATIENCE / 2, "{manner:?}, {took:?}: {}", outcome.stderr);
        ensure!(endpoint.counts()? == counts, "{manner:?}: {:?}", endpoint.counts()?);
        let said = outcome.stderr.contains("push.otlp: 1 payload of ") && outcome.stderr.contains("before the end");
        ensure!(said == (counts.0 == 0), "{manner:?}: {}", outcome.stderr);
        ensure!(fs::read_to_string(folder.path().join("baselines"))?.starts_with("leaktrace-state 1 "));
    }
    Ok(())
}

/// A file system that is unmounted when dropped.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// On a full disk the agent goes on and says so; once there is room the state is kept, and until then the old file stays whole.
#[test]
fn full_disk() -> Result<()> {
    if !host::can_trace("full_disk") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let disk = folder.path();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "leaktrace-test"]).arg(disk).output()?;
    if !mount.status.success() {
        host::skip(
            "full_disk",
            &format!("a file system cannot be mounted: {}", String::from_utf8_lossy(&mount.stderr)),
        );
        return Ok(());
    }
    let _mounted = Mounted(disk);
    let filler = disk.join("filler");
    // As much as there is room for; the error is that there is no more.
    let full = fs::File::create(&filler)?.write_all(&vec![0; 100 << 10]);
    ensure!(full.is_err(), "the disk of 64 KiB took 100");
    let agent = Agent::start(disk, ["--config", "/dev/null", "--set", NOBODY])?;
    let answer = agent.wait_for("/readyz", |answer| answer.status == 200)?;
    ensure!(
        answer.text().contains("state: degraded: ") && answer.text().contains("No space left"),
        "{}",
        answer.text()
    );
    ensure!(!disk.join("baselines").exists(), "a file that is not whole has the name");
    fs::remove_file(&filler)?;
    let outcome = agent.stop()?;
    ensure!(outcome.code()? == 0 && outcome.stderr.contains("state: works again"), "{}", outcome.stderr);
    ensure!(fs::read_to_string(disk.join("baselines"))?.starts_with("leaktrace-state 1 "));
    Ok(())
}

/// Only who shows the token gets data; what holds none needs none. Without a token only this host's own names are answered to.
#[test]
fn who_may_ask() -> Result<()> {
    if !host::can_trace("who_may_ask") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("token");
    fs::write(&file, format!("{TOKEN}\n"))?;
    let set = format!("http.token_file={}", file.display());
    let agent = Agent::start(folder.path(), ["--config", "/dev/null", "--set", NOBODY, "--set", &set])?;
    agent.wait_for("/readyz", |answer| answer.status == 200)?;
    let right = format!("Authorization: Bearer {TOKEN}\r\n");
    let elsewhere = format!("{right}Host: node7.example:9790\r\n");
    for path in ["/metrics", "/api/v1/report", "/api/v1/processes/1", "/debug/pprof/heap", "/debug/pprof/allocs"] {
        for wrong in ["", "Authorization: Bearer a-token-for-this-tesT\r\n", "Authorization: Basic eDp5\r\n"] {
            let answer = agent.ask(path, wrong)?;
            ensure!(
                answer.status == 401 && answer.head.to_lowercase().contains("www-authenticate: bearer"),
                "{answer:?}"
            );
            ensure!(!answer.text().contains("leaktrace_"), "{answer:?}");
        }
        ensure!(matches!(agent.ask(path, &right)?.status, 200 | 404), "{path}");
        ensure!(matches!(agent.ask(path, &elsewhere)?.status, 200 | 404), "{path}");
    }
    ensure!(agent.get("/healthz")?.status == 200);
    // Another token is taken over while it runs.
    fs::write(&file, "another-token-for-it\n")?;
    agent.signal(libc::SIGHUP)?;
    agent.wait_for("/readyz", |answer| answer.text().contains("configuration: ok"))?;
    ensure!(agent.ask("/metrics", &right)?.status == 401);
    ensure!(agent.ask("/metrics", "Authorization: Bearer another-token-for-it\r\n")?.status == 200);
    ensure!(agent.stop()?.code()? == 0);

    let agent = Agent::start(folder.path(), ["--config", "/dev/null", "--set", NOBODY])?;
    agent.wait_for("/readyz", |answer| answer.status == 200)?;
    for path in ["/metrics", "/api/v1/report", "/readyz", "/"] {
        ensure!(agent.ask(path, "Host: rebound.example\r\n")?.status == 403, "{path}");
    }
    ensure!(agent.ask("/metrics", "Host: 127.0.0.1:1\r\n")?.status == 200);
    ensure!(agent.stop()?.code()? == 0);
    Ok(())
}

/// Requests that are too large, clients that send or read too slowly, and too many connections are all ended; who asks properly is
/// served all the while.
#[test]
fn bad_clients() -> Result<()> {
    if !host::can_trace("bad_clients") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let sets = ["--set", NOBODY, "--set", "http.timeout=1s", "--set", "http.max_connections=6"];
    let agent = Agent::start(folder.path(), ["--config", "/dev/null"].into_iter().chain(sets))?;
    agent.wait_for("/readyz", |answer| answer.status == 200)?;
    let long = "x".repeat(64 << 10);
    for (request, status) in [
        (format!("GET /{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"), 431),
        (format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: {long}\r\n\r\n"), 431),
        ("GET /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n".to_owned(), 413),
        ("nonsense\r\n\r\n".to_owned(), 400),
        (format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "A: b\r\n".repeat(500)), 431),
    ] {
        let answer = agent.say(request.as_bytes()).with_context(|| request[..40].to_owned())?;
        ensure!(answer.status == status || (status == 431 && answer.status == 414), "{status}: {}", answer.head);
        ensure!(agent.get("/healthz")?.status == 200);
    }
    // It begins a request and never ends it.
    let mut slow = agent.connect()?;
    slow.write_all(b"GET /metrics HTTP/1.1\r\nHost: loc")?;
    let mut rest = Vec::new();
    // The end of the connection is the answer.
    let _ = slow.read_to_end(&mut rest);
    ensure!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));

    // It asks on and on, and reads nothing. Its requests are refused in the end because the connection is.
    let mut greedy = agent.connect()?;
    let asking = thread::spawn(move || -> std::io::Error {
        loop {
            if let Err(error) = greedy.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") {
                return error;
            }
        }
    });
    // As many as there may be, and silent; then one that asks, which has to wait for one of them to be ended.
    let silent: Vec<_> = (0..6).map(|_| agent.connect()).collect::<Result<_, _>>()?;
    ensure!(agent.get("/metrics")?.status == 200);
    drop(silent);
    let error = asking.join().ok().context("the thread that asks has panicked")?;
    ensure!(
        matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe),
        "the connection was not ended: {error}"
    );
    ensure!(agent.get("/readyz")?.status == 200);
    ensure!(agent.stop()?.code()? == 0);
    Ok(())
}

/// With a certificate it speaks TLS, and nothing else; a key that does not fit is refused.
#[test]
fn tls() -> Result<()> {
    if !host::can_trace("tls") {
        return Ok(());
    }
    let (Some(openssl), Some(curl)) = (host::program("tls", "openssl"), host::program("tls", "curl")) else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    for name in ["own", "other"] {
        let (key, certificate) = (path(&format!("{name}.key")), path(&format!("{name}.pem")));
        let made = Command::new(&openssl)
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-keyout", &key, "-out", &certificate])
            .output()?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let with = |key: &str| {
        vec![
            "--config".to_owned(),
            "/dev/null".to_owned(),
            "--set".to_owned(),
            NOBODY.to_owned(),
            "--set".to_owned(),
            format!("http.tls_certificate={}", path("own.pem")),
            "--set".to_owned(),
            format!("http.tls_key={}", path(key)),
        ]
    };
    let other = with("other.key");
    let (code, text) = refused(&other.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(code == 2 && text.contains("http.tls_key") && text.contains("does not fit"), "{text}");
    let own = with("own.key");
    let agent = Agent::start(&folder.path().join("state"), own.iter().map(String::as_str))?;
    let ask = |arguments: &[&str]| {
        let url = format!("https://{}/healthz", agent.address());
        Command::new(&curl).args(["--silent", "--show-error", "--max-time", "20"]).args(arguments).arg(url).output()
    };
    let answer = ask(&["--cacert", &path("own.pem")])?;
    ensure!(answer.stdout == b"ok\n", "{answer:?}");
    ensure!(!ask(&["--cacert", &path("other.pem")])?.status.success(), "curl trusts another certificate");
    ensure!(agent.get("/healthz").is_err(), "it answers without TLS");
    ensure!(agent.stop()?.code()? == 0);
    Ok(())
}

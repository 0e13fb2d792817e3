//! The whole agent on a made-up node: containers in control groups as runtimes make them, and an API server on loopback.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::kubernetes::{Container, NODE, Server};
use leaktrace_tests::{Agent, Answer, Leaktrace, PATIENCE, Program, Traced, host, metric};
use serde_json::{Value, json};

const TOKEN: &str = "a-token-of-the-service-account";

/// The process of this pid in an answer's report.
fn process(answer: &Answer, pid: u32) -> Option<Value> {
    let report = answer.json().ok()?;
    report["processes"].as_array()?.iter().find(|process| process["pid"] == pid).cloned()
}

/// What names a process, in a report or an Event's object.
fn names(of: &Value) -> [&Value; 5] {
    ["namespace", "pod", "container_name", "image", "node"].map(|name| &of[name])
}

fn names_of(container: &Container, tag: &str) -> [Value; 5] {
    let pod = container.pod(tag);
    let (metadata, inside) = (&pod["metadata"], &pod["spec"]["containers"][0]);
    [&metadata["namespace"], &metadata["name"], &inside["name"], &inside["image"], &pod["spec"]["nodeName"]]
        .map(Value::clone)
}

/// In the metrics of a process are the names of its pod.
fn metrics_name(agent: &Agent, pid: u32, names: &[Value; 5]) -> Result<()> {
    let page = agent.get("/metrics")?.text();
    let series = format!("leaktrace_process_live_bytes{{pid=\"{pid}\",");
    let line = page.lines().find(|line| line.starts_with(&series));
    let line = line.with_context(|| format!("nothing is told of {pid} in\n{page}"))?;
    for (label, value) in ["namespace", "pod", "container", "image", "node"].iter().zip(names) {
        ensure!(line.contains(&format!("{label}={value}")), "{label}={value} is not in {line}");
    }
    ensure!(metric(&page, "leaktrace_agent_degraded{part=\"kubernetes\"}") == Some(0.0), "{page}");
    Ok(())
}

/// A deploy goes on: a steady build of an image beside a new one under another tag, which leaks. The report and the metrics name both by
/// their pods, the leak is said to have come with the new build, and its pod, and no other, gets one Event.
#[test]
fn a_deploy_brings_a_leak() -> Result<()> {
    const TEST: &str = "a_deploy_brings_a_leak";
    if !host::can_trace(TEST) {
        return Ok(());
    }
    let top = format!("leaktrace-test-deploy-{}", std::process::id());
    // Of version 2 and, where that is there, of version 1: see `Container::new`.
    let (Some(old), Some(new)) = (Container::new(&top, 0), Container::new(&top, 8).or_else(|| Container::new(&top, 1)))
    else {
        host::skip(TEST, "control groups cannot be made");
        return Ok(());
    };
    // Two pods of one image.
    let mut of_new = new.pod("1.5");
    let image = "registry.example:5000/app-0:1.5";
    of_new["spec"]["containers"][0]["image"] = json!(image);
    let mut of_old = old.pod("1.4");
    of_old["spec"]["containers"][0]["image"] = json!("registry.example:5000/app-0:1.4");
    let server = Server::start();
    server.set_pods([(old.uid.clone(), of_old), (new.uid.clone(), of_new)].into());

    let traced = Traced::new()?;
    traced.configure(&format!(
        "[state]\nsteady_after = '1s'\n[kubernetes]\napi_server = '{}'\nnode_name = '{NODE}'\nevents = true\n",
        server.url()
    ))?;
    let mut steady = traced.builder();
    old.enter(steady.command())?;
    let mut steady = steady.start()?;
    steady.tell("rate 0")?;
    // As a package's update does: the path is the same, and the file another.
    traced.replace(&Program::c("leak_slow").flag("-O1").build()?)?;
    let mut leaking = traced.builder();
    new.enter(leaking.command())?;
    let leaking = leaking.start()?;
    let agent = traced.agent()?;

    let mut expected = names_of(&new, "1.5");
    expected[3] = json!(image);
    let named =
        |answer: &Answer| process(answer, leaking.pid()).is_some_and(|process| names(&process) == expected.each_ref());
    agent.wait_for("/api/v1/report", named)?;
    metrics_name(&agent, leaking.pid(), &expected)?;

    let came_with_it = |answer: &Answer| {
        process(answer, leaking.pid()).is_some_and(|process| {
            process["verdict"] == "leaking" && process["baseline"]["grew_since_build"].is_string()
        })
    };
    // What a process is usually like is learned once it has been there for half a minute.
    let answer = agent.wait_longer("/api/v1/report", PATIENCE * 3, came_with_it)?;
    let found = process(&answer, leaking.pid()).context("the process is gone")?;
    let before = process(&answer, steady.pid()).context("the steady process is gone")?;
    let (now, then) = (&found["baseline"]["build_id"], &before["baseline"]["build_id"]);
    ensure!(found["baseline"]["grew_since_build"] == *then && now != then, "{found}\n{before}");
    ensure!(before["verdict"] != "leaking", "{before}");

    let told = host::wait_until(PATIENCE * 2, || !server.events().is_empty());
    ensure!(told, "no Event: {}", agent.get("/readyz")?.text());
    // Each report would be another reason to tell it again.
    let reports = |answer: &Answer| answer.json().ok().and_then(|report| report["duration_s"].as_f64()).unwrap_or(0.0);
    let until = reports(&agent.get("/api/v1/report")?) + 3.0;
    agent.wait_for("/api/v1/report", |answer| reports(answer) > until)?;
    let events = server.events();
    ensure!(events.len() == 1, "{events:?}");
    let event = &events[0];
    let regarding = &event["regarding"];
    ensure!(regarding["kind"] == "Pod" && regarding["uid"] == new.uid.as_str(), "{event}");
    ensure!([&regarding["namespace"], &regarding["name"]] == [&expected[0], &expected[1]], "{event}");
    ensure!(event["note"].as_str().is_some_and(|note| note.contains("leak_block")), "{event}");
    let posted = server.asked().into_iter().filter(|asked| asked.starts_with("POST")).count();
    ensure!(posted == 1, "{:?}", server.asked());
    let sent = "leaktrace_agent_events_total{part=\"kubernetes\",event=\"events_sent\"}";
    ensure!(metric(&agent.get("/metrics")?.text(), sent) == Some(1.0));
    ensure!(agent.stop()?.code()? == 0);
    drop((leaking, steady));
    Ok(())
}

/// In a pod the agent finds its API server, the certificate of its authority and its token by what Kubernetes puts there, and tells
/// nobody anything who did not ask for that.
#[test]
fn in_a_pod() -> Result<()> {
    const TEST: &str = "in_a_pod";
    if !host::can_trace(TEST) {
        return Ok(());
    }
    let (Some(python), Some(openssl)) = (host::program(TEST, "python3"), host::program(TEST, "openssl")) else {
        return Ok(());
    };
    let top = format!("leaktrace-test-pod-{}", std::process::id());
    let Some(container) = Container::new(&top, 3) else {
        host::skip(TEST, "control groups cannot be made");
        return Ok(());
    };
    let server = Server::start_with(Some(TOKEN));
    server.set_pods([(container.uid.clone(), container.pod("2.0"))].into());
    let keys = tempfile::tempdir()?;
    certificates(&openssl, keys.path())?;
    let tls = Tls::start(&python, keys.path(), server.address())?;

    // What is at /run in the agent's sight.
    let run = tempfile::tempdir()?;
    let account = run.path().join("secrets/kubernetes.io/serviceaccount");
    fs::create_dir_all(&account)?;
    fs::copy(keys.path().join("ca.pem"), account.join("ca.crt"))?;
    fs::write(account.join("token"), TOKEN)?;
    fs::write(account.join("namespace"), "leaktrace")?;

    let traced = Traced::new()?;
    traced.configure("")?;
    let mut fixture = traced.builder();
    container.enter(fixture.command())?;
    let fixture = fixture.start()?;
    let mut leaktrace = Leaktrace::new()?
        .env("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        .env("KUBERNETES_SERVICE_PORT", &tls.port.to_string())
        .env("NODE_NAME", NODE);
    mount_in_place(leaktrace.command(), run.path(), &fs::canonicalize("/var/run")?)?;
    let agent = traced.agent_with(leaktrace)?;
    let expected = names_of(&container, "2.0");
    let leaks = |answer: &Answer| {
        process(answer, fixture.pid())
            .is_some_and(|process| names(&process) == expected.each_ref() && process["verdict"] == "leaking")
    };
    if let Err(error) = agent.wait_longer("/api/v1/report", PATIENCE * 2, leaks) {
        return Err(error.context(agent.get("/readyz")?.text()));
    }
    metrics_name(&agent, fixture.pid(), &expected)?;
    let asked = server.asked();
    ensure!(asked.iter().all(|asked| asked.starts_with("GET /api/v1/pods?")), "{asked:?}");
    ensure!(agent.stop()?.code()? == 0);
    drop(fixture);
    Ok(())
}

/// Makes an authority, and a certificate for 127.0.0.1 that it has signed: `ca.pem`, `server.pem` and `server.key`.
fn certificates(openssl: &Path, folder: &Path) -> Result<()> {
    let request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    for args in [
        &["-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"][..],
        &[
            "-subj",
            "/CN=kubernetes",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-keyout",
            "server.key",
            "-out",
            "server.pem",
        ],
    ] {
        let made = Command::new(openssl).args(request).args(args).current_dir(folder).output()?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    Ok(())
}

/// Takes off TLS of one request a connection, hands it on, and hands back what is answered. Ends with its input.
const TLS: &str = "
import socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('server.pem', 'server.key')
listener = socket.create_server(('127.0.0.1', 0))
def whole(data):
    head, found, body = data.partition(b'\\r\\n\\r\\n')
    lengths = [line.split(b':')[1] for line in head.lower().split(b'\\r\\n') if line.startswith(b'content-length:')]
    return found and len(body) >= int(lengths[0] if lengths else 0)
def serve(client):
    try:
        client = context.wrap_socket(client, server_side=True)
        request = b''
        while not whole(request):
            more = client.recv(65536)
            if not more:
                return
            request += more
        with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as server:
            server.sendall(request)
            while data := server.recv(65536):
                client.sendall(data)
    except OSError:
        pass
    finally:
        client.close()
def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
threading.Thread(target=accept, daemon=True).start()
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
";

/// Speaks TLS in front of a server that does not; ended when dropped. By Python, because a library for it in Rust would have to be built
/// for each machine that these tests run on.
struct Tls {
    /// Its input stays open as long as this does.
    child: Child,
    port: u16,
}

impl Tls {
    fn start(python: &Path, folder: &Path, server: SocketAddr) -> Result<Self> {
        let child = Command::new(python)
            .args(["-c", TLS, &server.port().to_string()])
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut tls = Self { child, port: 0 };
        let mut line = String::new();
        BufReader::new(tls.child.stdout.take().context("no output")?).read_line(&mut line)?;
        tls.port = line.trim().parse().with_context(|| format!("failed to read a port from {line:?}"))?;
        Ok(tls)
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the program see `folder` in the place of `place`, and nobody else.
fn mount_in_place(command: &mut Command, folder: &Path, place: &Path) -> Result<()> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (folder, place) = (text(folder)?, text(place)?);
    let mount = move || {
        let mount = |source: &CStr, target: &CStr, flags| {
            // SAFETY: both are strings that end in zero, and what is null is not looked at with these flags.
            match unsafe { libc::mount(source.as_ptr(), target.as_ptr(), std::ptr::null(), flags, std::ptr::null()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: no memory is passed.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE)?;
        mount(&folder, &place, libc::MS_BIND)
    };
    // SAFETY: between fork and exec only calls of the kernel are made, on memory that is there.
    unsafe { command.pre_exec(mount) };
    Ok(())
}

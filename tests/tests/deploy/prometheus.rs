//! A real Prometheus server that scrapes a real agent, by the scrape settings of the chart and with the alert rules, made shorter: whom
//! it wakes, and whom it does not.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use leaktrace_tests::deploy::{self, MONITORING, Tools, text};
use leaktrace_tests::{Agent, Fixture, PATIENCE, Program, host};
use serde_json::{Value, json};

/// How many times shorter all times in the rules are: ten minutes are three seconds.
const SCALE: f64 = 200.0;
/// A verdict takes half a minute, and as long again on a busy machine.
const UNTIL_IT_FIRES: Duration = Duration::from_mins(2);
const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// The rules with all their times shortened: after `for: ` and its like, in brackets, and after `offset`.
fn shortened(rules: &str) -> String {
    let mut out = String::new();
    let mut rest = rules;
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, from) = rest.split_at(start);
        out += before;
        let digits = from.find(|c: char| !c.is_ascii_digit()).unwrap_or(from.len());
        let (number, after) = from.split_at(digits);
        let unit = match after.chars().next() {
            Some('s') => 1.0,
            Some('m') => 60.0,
            Some('h') => 3600.0,
            _ => 0.0,
        };
        let stands_alone = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '.');
        let is_time = unit > 0.0 && stands_alone(before.chars().last()) && stands_alone(after.chars().nth(1));
        if is_time {
            let seconds = number.parse::<f64>().unwrap_or(0.0) * unit;
            out += &((seconds * 1000.0 / SCALE) as u64).to_string();
            out += "ms";
            rest = &after[1..];
        } else {
            out += number;
            rest = after;
        }
    }
    out + rest
}

/// All times in the rules are found, and nothing else is taken for one.
#[test]
fn rules_are_shortened() {
    let rules =
        "interval: 1m\nfor: 10m\nexpr: x[6h] offset 15m > 4 * 3600 and 384 * 1024\nsummary: 384 MiB, 15 minutes, s3m\n";
    let short = "interval: 300ms\nfor: 3000ms\nexpr: x[108000ms] offset 4500ms > 4 * 3600 and 384 * 1024\nsummary: 384 MiB, 15 minutes, s3m\n";
    assert_eq!(shortened(rules), short);
}

/// What `GET` answers: the head and the body.
fn get(address: &str, path: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("failed to reach {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    Ok((head.to_owned(), body.to_owned()))
}

/// A Prometheus server with its data in a folder of its own; ended when dropped.
struct Prometheus {
    child: Child,
    address: String,
    log: std::path::PathBuf,
}

impl Prometheus {
    fn start(program: &Path, folder: &Path, settings: &Value) -> Result<Self> {
        let file = folder.join("prometheus.yml");
        fs::write(&file, settings.to_string())?;
        let log = folder.join("prometheus.log");
        // Its log names the port as it was asked for, so a free one has to be found; another may take it in between.
        for _ in 0..5 {
            let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
            let mut command = Command::new(program);
            command
                .arg(format!("--config.file={}", file.display()))
                .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
                .arg(format!("--web.listen-address={address}"))
                .args(["--log.level=warn", "--query.lookback-delta=10s"])
                // Debian's looks for these relative to where it is started.
                .current_dir(folder)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(fs::File::create(&log)?);
            let mut started =
                Self { child: command.spawn().context("failed to start prometheus")?, address, log: log.clone() };
            let ready = host::wait_until(PATIENCE, || {
                started.child.try_wait().is_ok_and(|ended| ended.is_some()) || started.is_ready()
            });
            if ready && started.is_ready() {
                return Ok(started);
            }
        }
        bail!("failed to start prometheus: {}", fs::read_to_string(&log)?)
    }

    fn is_ready(&self) -> bool {
        get(&self.address, "/-/ready").is_ok_and(|(head, _)| head.contains(" 200 "))
    }

    fn api(&self, path: &str) -> Result<Value> {
        let (head, body) = get(&self.address, path)?;
        let log = || format!("{head}\n{body}\n{}", fs::read_to_string(&self.log).unwrap_or_default());
        let answer: Value = serde_json::from_str(&body).with_context(log)?;
        ensure!(answer["status"] == "success", "{}", log());
        Ok(answer["data"].clone())
    }

    /// The alerts that fire: their labels and annotations.
    fn firing(&self) -> Result<Vec<Value>> {
        let alerts = self.api("/api/v1/alerts")?["alerts"].as_array().cloned().context("no alerts")?;
        Ok(alerts.into_iter().filter(|alert| alert["state"] == "firing").collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the operator would make of the chart's `PodMonitor`, for one pod at this address.
fn scrape_settings(tools: &Tools, address: &str, token_file: &Path) -> Result<Value> {
    let objects = tools.documents(&tools.chart(&MONITORING)?)?;
    let monitor = objects.iter().find(|object| object["kind"] == "PodMonitor").context("no PodMonitor")?;
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    let mut relabelings = Vec::new();
    for relabeling in endpoint["relabelings"].as_array().context("no relabelings")? {
        let mut made = serde_json::Map::new();
        for (key, value) in relabeling.as_object().context("no relabeling")? {
            let key = match key.as_str() {
                "sourceLabels" => "source_labels",
                "targetLabel" => "target_label",
                key @ ("action" | "regex") => key,
                other => bail!("{other} is not known here"),
            };
            made.insert(key.to_owned(), value.clone());
        }
        relabelings.push(Value::Object(made));
    }
    Ok(json!({
        // As the operator names it.
        "job_name": "leaktrace/leaktrace",
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "honor_labels": endpoint["honorLabels"],
        "metrics_path": endpoint["path"],
        "authorization": {"type": endpoint["authorization"]["type"], "credentials_file": token_file},
        "static_configs": [{
            "targets": [address],
            "labels": {"pod": "leaktrace-x7k2p", "namespace": "leaktrace", "container": "agent", "endpoint": "http",
                       "__meta_kubernetes_pod_node_name": "node-1"},
        }],
        "relabel_configs": relabelings,
    }))
}

/// An agent that traces all processes of one program, which nobody else has.
fn start_agent(program: &Path, folder: &Path, token_file: &Path) -> Result<Agent> {
    let settings = format!(
        "[trace]\ninterval = '1s'\nall = true\nmax_overhead = 'off'\nexe = '{}'\n[http]\ntoken_file = '{}'\n",
        program.display(),
        token_file.display()
    );
    let file = folder.join("agent.toml");
    fs::write(&file, settings)?;
    let file = file.to_str().context("the folder's name is text")?;
    Agent::start(&folder.join("state"), ["--verbose", "--config", file])
}

/// Prometheus scrapes the agent with its token, the text is valid to the letter, and of a program that leaks and one whose cache fills
/// and then is full, an alert fires for the first, with its function in it, and none for the other.
#[test]
fn prometheus_wakes_for_leaks_only() -> Result<()> {
    const NAME: &str = "prometheus_wakes_for_leaks_only";
    if !host::can_trace(NAME) {
        return Ok(());
    }
    let (Some(prometheus), Some(tools)) = (host::program(NAME, "prometheus"), Tools::for_test(NAME)) else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("orders");
    fs::copy(Program::c("leak_slow").build()?, &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let leaking = Fixture::builder(&program).arg("--rate").arg("200000").arg("--block").arg("500").start()?;
    let mut filling = Fixture::builder(&program).arg("--rate").arg("0").start()?;
    let token_file = folder.path().join("token");
    fs::write(&token_file, TOKEN)?;
    fs::set_permissions(&token_file, fs::Permissions::from_mode(0o600))?;
    let agent = start_agent(&program, folder.path(), &token_file)?;
    agent.wait_for("/readyz", |answer| answer.status == 200)?;
    filling.tell("fill 4000000 8")?;
    let rules = folder.path().join("rules.yaml");
    fs::write(&rules, shortened(&fs::read_to_string(deploy::folder().join("chart/leaktrace/files/rules.yaml"))?))?;
    let settings = json!({
        "global": {"scrape_interval": "1s", "evaluation_interval": "300ms"},
        "rule_files": [rules],
        "scrape_configs": [scrape_settings(&tools, &agent.address().to_string(), &token_file)?],
    });
    let prometheus = Prometheus::start(&prometheus, folder.path(), &settings)?;

    let alert_of = |alerts: &[Value], name: &str, pid: u32| {
        let is =
            |alert: &&Value| alert["labels"]["alertname"] == name && alert["labels"]["pid"] == pid.to_string().as_str();
        alerts.iter().find(is).cloned()
    };
    let mut alerts = Vec::new();
    let fired = host::wait_until(UNTIL_IT_FIRES, || {
        alerts = prometheus.firing().unwrap_or_default();
        alert_of(&alerts, "LeaktraceGrowing", leaking.pid()).is_some()
    });
    let scrape = || agent.ask("/metrics", &format!("Authorization: Bearer {TOKEN}\r\n"));
    ensure!(fired, "nothing fired: {alerts:#?}\n{}\n{}", prometheus.api("/api/v1/targets")?, scrape()?.text());
    let alert = alert_of(&alerts, "LeaktraceGrowing", leaking.pid()).context("no alert")?;
    assert_eq!(alert["labels"]["process"], "orders");
    assert_eq!(alert["labels"]["node"], "node-1");
    // The agent's own pod would be a lie on a process.
    for label in ["pod", "namespace", "container"] {
        ensure!(alert["labels"][label].is_null(), "{alert}");
    }
    let description = alert["annotations"]["description"].as_str().context("no description")?;
    ensure!(description.contains("allocated in leak_block"), "{description}");

    // What fires besides is of the other process at most for information, and never that it leaks.
    let of_filling: Vec<&Value> =
        alerts.iter().filter(|alert| alert["labels"]["pid"] == filling.pid().to_string().as_str()).collect();
    ensure!(of_filling.iter().all(|alert| alert["labels"]["severity"] == "info"), "{of_filling:#?}");
    let agents: Vec<&Value> = alerts
        .iter()
        .filter(|alert| alert["labels"]["alertname"].as_str().is_some_and(|name| name.contains("Agent")))
        .collect();
    ensure!(agents.is_empty(), "{agents:#?}");
    let asked = format!("leaktrace_process_verdict%7Bpid%3D%22{}%22%2Cverdict%3D%22leaking%22%7D", filling.pid());
    let verdict = prometheus.api(&format!("/api/v1/query?query={asked}"))?;
    ensure!(verdict["result"][0]["value"][1] == "0", "the full cache: {verdict}");

    // The scrape as Prometheus gets it.
    let answer = scrape()?;
    let (head, page) = (&answer.head, answer.text());
    ensure!(head.to_lowercase().contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    ensure!(agent.get("/metrics")?.status == 401, "the page is for everybody");
    let targets = prometheus.api("/api/v1/targets")?;
    ensure!(targets["activeTargets"][0]["health"] == "up", "{targets}");
    if host::library(NAME, "python3/dist-packages/prometheus_client/openmetrics/parser.py").is_some() {
        const READ: &str = "import sys\nfrom prometheus_client.openmetrics.parser import text_string_to_metric_families as read\n\
                            print(sum(len(family.samples) for family in read(sys.stdin.read())))";
        let python = host::program(NAME, "python3").context("no python3")?;
        let samples = text(deploy::run(Command::new(python).args(["-c", READ]), &page)?, "read the scrape")?;
        ensure!(samples.trim().parse::<u32>()? > 30, "{samples} samples in\n{page}");
    }

    // When the agent ends, it is missed.
    let outcome = agent.stop()?;
    ensure!(outcome.code()? == 0, "{}", outcome.stderr);
    let down = host::wait_until(UNTIL_IT_FIRES, || {
        alerts = prometheus.firing().unwrap_or_default();
        alerts.iter().any(|alert| alert["labels"]["alertname"] == "LeaktraceAgentDown")
    });
    ensure!(down, "the agent is not missed: {alerts:#?}");
    drop((leaking, filling));
    Ok(())
}

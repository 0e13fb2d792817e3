//! What arrives at the other side, and what becomes of it where that misbehaves.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, Request, Response};
use base64::Engine as _;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;

use super::config::tests::endpoint;
use super::metrics::{ExportRequest, ExportResponse, PartialSuccess, metric};
use super::profiles::PushRequest;
use super::*;
use crate::agent::config::Settings as All;
use crate::agent::files::certificates;
use crate::agent::status::Status;
use crate::cli::AgentFlags;
use crate::export::pprof::proto::Profile;
use crate::report::sample;

/// How the other side behaves at one request.
#[derive(Clone, Debug)]
enum Does {
    Answers(u16, Vec<u8>),
    AsksToWait(u16, &'static str),
    /// Takes the request and says nothing.
    Hangs,
    /// Closes the connection without an answer.
    Leaves,
    /// Answers what is no HTTP.
    Babbles,
    /// Answers without an end.
    Floods,
}

/// What came: path, headers and body.
#[derive(Clone, Debug)]
struct Came {
    path: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

#[derive(Default)]
struct Script {
    /// For the next requests; after these all are taken.
    next: VecDeque<Does>,
    came: Vec<Came>,
}

/// The other side.
#[derive(Clone)]
struct Server {
    address: SocketAddr,
    script: Arc<Mutex<Script>>,
    /// Of `came`.
    count: watch::Receiver<usize>,
}

impl Server {
    async fn start(next: Vec<Does>) -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").await.unwrap(), next)
    }

    fn at(listener: TcpListener, next: Vec<Does>) -> Self {
        let address = listener.local_addr().unwrap();
        let script = Arc::new(Mutex::new(Script { next: next.into(), came: Vec::new() }));
        let (sender, count) = watch::channel(0);
        let server = Self { address, script: Arc::clone(&script), count };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(connection(stream, Arc::clone(&script), sender.clone()));
            }
        });
        server
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits until so many requests have come, and gives them.
    async fn came(&mut self, least: usize) -> Vec<Came> {
        let came = self.count.wait_for(|count| *count >= least);
        timeout(Duration::from_secs(30), came).await.expect("nothing comes").unwrap();
        self.script.lock().unwrap().came.clone()
    }
}

async fn connection(stream: tokio::net::TcpStream, script: Arc<Mutex<Script>>, count: watch::Sender<usize>) {
    let does = {
        let script = script.lock().unwrap_or_else(PoisonError::into_inner);
        script.next.front().cloned()
    };
    if let Some(Does::Leaves | Does::Babbles | Does::Floods) = does {
        // What misbehaves below HTTP does so before a request is read whole.
        let mut stream = stream;
        stream.readable().await.unwrap();
        script.lock().unwrap().next.pop_front();
        match does {
            Some(Does::Babbles) => stream.write_all(b"\0\xff garbage \r\n\r\n").await.unwrap(),
            Some(Does::Floods) => {
                let head = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n";
                let mut gone = stream.write_all(head).await.is_err();
                let chunk = format!("1000\r\n{}\r\n", "x".repeat(0x1000));
                while !gone {
                    gone = stream.write_all(chunk.as_bytes()).await.is_err();
                }
            }
            _ => {}
        }
        return;
    }
    serve(stream, script, count).await;
}

/// Speaks HTTP on a connection, plain or not.
async fn serve<S: AsyncRead + AsyncWrite + Unpin>(stream: S, script: Arc<Mutex<Script>>, count: watch::Sender<usize>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (script, count) = (Arc::clone(&script), count.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes().to_vec();
            let does = {
                let mut script = script.lock().unwrap();
                script.came.push(Came { path: parts.uri.path().to_owned(), headers: parts.headers, body });
                let does = script.next.pop_front();
                count.send_replace(script.came.len());
                does
            };
            let answer = match does {
                None => Response::new(Full::new(Bytes::new())),
                Some(Does::Answers(status, body)) => {
                    Response::builder().status(status).body(Full::new(body.into())).unwrap()
                }
                Some(Does::AsksToWait(status, rest)) => {
                    Response::builder().status(status).header(RETRY_AFTER, rest).body(Full::new(Bytes::new())).unwrap()
                }
                Some(_) => std::future::pending().await,
            };
            Ok::<_, Infallible>(answer)
        }
    });
    let _ = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service).await;
}

/// What the agent publishes, and the ends to change it.
struct Agent {
    published: Arc<Published>,
    reports: watch::Sender<Arc<Report>>,
    settings: watch::Sender<Arc<All>>,
}

impl Agent {
    fn new() -> Self {
        let flags = AgentFlags { config: None, ..AgentFlags::default() };
        let (settings, settings_receiver) = watch::channel(Arc::new(All::load(&flags).unwrap()));
        let (reports, report) = watch::channel(Arc::new(sample::system()));
        let published = Arc::new(Published { report, settings: settings_receiver, status: Status::default() });
        Self { published, reports, settings }
    }

    /// Publishes another report.
    fn next_report(&self) {
        let mut report = sample::system();
        report.duration_s = self.published.report.borrow().duration_s + 1.0;
        self.reports.send_replace(Arc::new(report));
    }

    fn count(&self, kind: Kind, what: &str) -> u64 {
        let counts = self.published.status.figures().counts;
        counts.iter().find(|(part, of, _)| *part == kind.part() && *of == what).map_or(0, |(_, _, count)| *count)
    }
}

/// Pushes at once, and again soon.
fn quick(url: &str) -> Endpoint {
    Endpoint { interval: Duration::from_millis(20), timeout: Duration::from_secs(20), ..endpoint(url) }
}

const SOON: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(20));

/// A profile out of its compressed form, checked for what every reader takes for granted.
fn profile(bytes: &[u8]) -> Profile {
    let mut raw = Vec::new();
    flate2::read::GzDecoder::new(bytes).read_to_end(&mut raw).unwrap();
    let profile = Profile::decode(&raw[..]).unwrap();
    let text = |index: i64| profile.string_table[usize::try_from(index).unwrap()].as_str();
    let types: Vec<_> = profile.sample_type.iter().map(|one| (text(one.r#type), text(one.unit))).collect();
    assert_eq!(types, [("inuse_objects", "count"), ("inuse_space", "bytes")]);
    assert!(profile.sample.iter().all(|sample| sample.value.len() == 2 && sample.label.is_empty()));
    let known = |id: &u64| profile.location.iter().any(|location| location.id == *id);
    assert!(profile.sample.iter().all(|sample| sample.location_id.iter().all(known)));
    profile
}

/// Bytes in use of all samples.
fn in_use(profile: &Profile) -> i64 {
    profile.sample.iter().map(|sample| sample.value[1]).sum()
}

/// Pyroscope gets a profile for each service, of the time of the report, with labels and the token.
#[tokio::test]
async fn pyroscope_takes_profiles() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "secret\n").unwrap();
    let mut server = Server::start(vec![]).await;
    let agent = Agent::new();
    let mut to = Endpoint { token_file: Some(token), ..quick(&format!("{}/base/", server.url())) };
    to.labels.insert("cluster".to_owned(), "night".to_owned());
    to.headers.insert("x-scope-orgid", "tenant".parse().unwrap());
    let tasks = start(Kind::Pyroscope, to, &agent.published, SOON);
    let came = server.came(1).await.remove(0);
    drop(tasks);
    assert_eq!(came.path, "/base/push.v1.PusherService/Push");
    assert_eq!(came.headers[CONTENT_TYPE], "application/proto");
    assert_eq!(came.headers[AUTHORIZATION], "Bearer secret");
    assert_eq!(came.headers["x-scope-orgid"], "tenant");
    let request = PushRequest::decode(&came.body[..]).unwrap();
    let report = sample::system();
    assert_eq!(request.series.len(), 2);
    let live: i64 = report.processes.iter().flat_map(|one| &one.stacks).map(|stack| stack.live_bytes as i64).sum();
    let profiles: Vec<Profile> = request.series.iter().map(|series| profile(&series.samples[0].raw_profile)).collect();
    assert_eq!(profiles.iter().map(in_use).sum::<i64>(), live);
    // 30 s after 2026-01-02T03:04:05Z.
    assert!(
        profiles.iter().all(|profile| profile.time_nanos == 1_767_323_075_000_000_000),
        "{}",
        profiles[0].time_nanos
    );
    let labels = |n: usize| -> BTreeMap<&str, &str> {
        request.series[n].labels.iter().map(|label| (label.name.as_str(), label.value.as_str())).collect()
    };
    let indexer = (0..2).map(labels).find(|labels| labels["process"] == "indexer").unwrap();
    for (name, value) in
        [("__name__", "memory"), ("service_name", "orders"), ("instance", "web-3"), ("cluster", "night")]
    {
        assert_eq!(indexer[name], value);
    }
}

/// Processes of one service are one series, since it has one profile at a time.
#[test]
fn one_series_a_service() {
    let mut report = sample::steady();
    let mut twin = report.processes[0].clone();
    twin.pid += 1;
    report.processes.push(twin);
    let series = profiles::series(&report, 10, &endpoint("http://x")).unwrap();
    assert_eq!(series.len(), 1);
    let request = PushRequest::decode(&profiles::pyroscope(&series)[..]).unwrap();
    let live = report.processes[0].stacks[0].live_bytes as i64;
    assert_eq!(in_use(&profile(&request.series[0].samples[0].raw_profile)), 2 * live);
    report.processes.clear();
    assert!(profiles::series(&report, 10, &endpoint("http://x")).is_none());
}

/// Parca's gateway gets the same as JSON.
#[tokio::test]
async fn parca_takes_profiles() {
    let mut server = Server::start(vec![]).await;
    let agent = Agent::new();
    let tasks = start(Kind::Parca, quick(&server.url()), &agent.published, SOON);
    let came = server.came(1).await.remove(0);
    drop(tasks);
    assert_eq!(came.path, "/api/profiles/writeraw");
    let request: serde_json::Value = serde_json::from_slice(&came.body).unwrap();
    assert_eq!(request["normalized"], false);
    let series = request["series"].as_array().unwrap();
    assert_eq!(series.len(), 2);
    for one in series {
        let labels = one["labels"]["labels"].as_array().unwrap();
        assert!(labels.contains(&serde_json::json!({"name": "__name__", "value": "memory"})));
        let raw = one["samples"][0]["rawProfile"].as_str().unwrap();
        let raw = base64::engine::general_purpose::STANDARD.decode(raw).unwrap();
        assert!(in_use(&profile(&raw)) > 0);
    }
}

/// A collector gets the metrics; what it rejects of them is told, and is no reason to send them again.
#[tokio::test]
async fn a_collector_takes_metrics() {
    let partial = PartialSuccess { rejected_data_points: 3, error_message: "too\u{1b} old".to_owned() };
    let rejecting = ExportResponse { partial_success: Some(partial) }.encode_to_vec();
    let mut server = Server::start(vec![Does::Answers(200, rejecting)]).await;
    let agent = Agent::new();
    let tasks = start(Kind::Otlp, quick(&server.url()), &agent.published, SOON);
    let came = server.came(1).await.remove(0);
    assert_eq!(
        (came.path.as_str(), &came.headers[CONTENT_TYPE]),
        ("/v1/metrics", &"application/x-protobuf".parse().unwrap())
    );
    let request = ExportRequest::decode(&came.body[..]).unwrap();
    let of = &request.resource_metrics[0];
    assert!(of.resource.as_ref().unwrap().attributes.iter().any(|one| one.key == "host.name"));
    assert!(of.scope_metrics[0].metrics.iter().any(|metric| metric.name == "leaktrace_stack_growth_bytes_per_second"));
    until(|| agent.published.status.readiness().1.contains("3 of the values: too\\u{1b} old")).await;
    agent.next_report();
    assert_eq!(server.came(2).await.len(), 2);
    until(|| agent.published.status.readiness().1.contains("push.otlp: ok")).await;
    assert_eq!(agent.count(Kind::Otlp, "sent"), 2);
    drop(tasks);
}

/// Awaits what no channel tells.
async fn until(done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(30), "it does not come");
        sleep(Duration::from_millis(2)).await;
    }
}

/// Whatever the other side does, the payload arrives whole once it takes it, and arrives once.
#[tokio::test]
async fn it_arrives_in_the_end() {
    let bad = vec![
        Does::Answers(503, b"\xff\xfe not now".to_vec()),
        Does::Leaves,
        Does::Babbles,
        Does::Floods,
        Does::Hangs,
        Does::AsksToWait(429, "0"),
        Does::Answers(500, vec![]),
        Does::Answers(401, b"no token".to_vec()),
    ];
    let mut server = Server::start(bad.clone()).await;
    let agent = Agent::new();
    let to = Endpoint { timeout: Duration::from_millis(300), ..quick(&server.url()) };
    let tasks = start(Kind::Pyroscope, to, &agent.published, SOON);
    until(|| agent.count(Kind::Pyroscope, "sent") == 1).await;
    until(|| agent.published.status.readiness().1.contains("push.pyroscope: ok")).await;
    assert_eq!(agent.count(Kind::Pyroscope, "failed"), bad.len() as u64);
    let came = server.came(6).await;
    assert!(came.iter().all(|one| one.body == came[0].body));
    assert_eq!((agent.count(Kind::Pyroscope, "dropped"), agent.count(Kind::Pyroscope, "refused")), (0, 0));
    drop(tasks);
}

/// What is refused for good is not sent again, and the next goes through.
#[tokio::test]
async fn refused_for_good() {
    let mut server = Server::start(vec![Does::Answers(400, b"bad profile".to_vec()), Does::Answers(302, vec![])]).await;
    let agent = Agent::new();
    let tasks = start(Kind::Parca, quick(&server.url()), &agent.published, SOON);
    until(|| agent.count(Kind::Parca, "refused") == 1).await;
    assert!(agent.published.status.readiness().1.contains("refused: http"), "{}", agent.published.status.readiness().1);
    agent.next_report();
    until(|| agent.count(Kind::Parca, "refused") == 2).await;
    agent.next_report();
    until(|| agent.count(Kind::Parca, "sent") == 1).await;
    assert_eq!(server.came(3).await.len(), 3);
    drop(tasks);
}

/// Where nobody is there, what waits stays within its bounds, what goes is counted, and once somebody comes the newest arrives.
#[tokio::test]
async fn nothing_grows_while_nobody_is_there() {
    // Ours, so that nobody else comes there, and refused as long as it does not listen.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    let agent = Agent::new();
    let to = Endpoint { most_queued: 3, ..quick(&format!("http://{address}")) };
    let tasks = start(Kind::Otlp, Endpoint { interval: Duration::from_millis(1), ..to }, &agent.published, SOON);
    let mut reports = 0;
    while agent.count(Kind::Otlp, "dropped") < 20 {
        agent.next_report();
        reports += 1;
        assert!(reports < 100_000, "nothing is dropped");
        sleep(Duration::from_millis(1)).await;
    }
    assert!(agent.count(Kind::Otlp, "failed") > 0);
    assert!(agent.published.status.readiness().1.contains("push.otlp: degraded"));

    let mut server = Server::at(socket.listen(16).unwrap(), vec![]);
    let newest = (agent.published.report.borrow().duration_s * 1e9) as u64 + 1_767_323_045_000_000_000;
    let time = |came: &Came| {
        let request = ExportRequest::decode(&came.body[..]).unwrap();
        let Some(metric::Data::Gauge(gauge)) = &request.resource_metrics[0].scope_metrics[0].metrics[1].data else {
            panic!("no gauge comes second");
        };
        gauge.data_points[0].time_unix_nano
    };
    // Three waited; the newest may have come to them only now.
    let mut came = server.came(3).await;
    if time(&came[2]) != newest {
        came = server.came(4).await;
    }
    let times: Vec<u64> = came.iter().map(time).collect();
    assert_eq!(times.last(), Some(&newest), "{times:?}");
    assert!(times.is_sorted() && times.len() <= 4, "{times:?}");
    drop(tasks);
}

/// A change of the settings is taken over: what is not wanted any more ends, what is new begins.
#[tokio::test]
async fn settings_change() {
    let (mut first, mut second) = (Server::start(vec![]).await, Server::start(vec![]).await);
    let agent = Agent::new();
    let (_end, ending) = oneshot::channel();
    let task = tokio::spawn(run(Arc::clone(&agent.published), ending));
    let change = |server: &Server| {
        let flags = AgentFlags {
            set: vec![format!("push.otlp.endpoint={}", server.url()), "push.otlp.interval=1s".to_owned()],
            ..AgentFlags::default()
        };
        agent.settings.send_replace(Arc::new(All::load(&flags).unwrap()));
    };
    change(&first);
    first.came(1).await;
    change(&second);
    second.came(1).await;
    agent.settings.send_replace(Arc::new(All::load(&AgentFlags::default()).unwrap()));
    task.abort();
}

/// At the end the last report is pushed as well, and one attempt is made at all that waits, however long the next one was to be waited for;
/// it ends when all is sent.
#[tokio::test]
async fn flushed_at_the_end() {
    let mut server = Server::start(vec![Does::AsksToWait(503, "600")]).await;
    let agent = Agent::new();
    let to = Endpoint { interval: Duration::from_millis(20), ..quick(&server.url()) };
    let pushing = start(Kind::Otlp, to, &agent.published, SOON);
    until(|| agent.count(Kind::Otlp, "failed") == 1).await;
    agent.next_report();
    until(|| pushing.queue.held().payloads == 2).await;
    agent.next_report();
    let began = Instant::now();
    pushing.finish(Duration::from_mins(1)).await;
    assert!(began.elapsed() < Duration::from_secs(30), "it was waited for");
    let came = server.came(4).await;
    // The first of them twice.
    assert!(came.len() == 4 && came[0].body == came[1].body && came[1].body != came[3].body);
    assert_eq!((agent.count(Kind::Otlp, "sent"), agent.count(Kind::Otlp, "dropped")), (3, 0));
}

/// An end is never waited for longer than it may take: by a server that says nothing until the time is over, by one that refuses not at all.
#[tokio::test]
async fn the_end_does_not_wait() {
    let server = Server::start(vec![Does::Hangs; 9]).await;
    let agent = Agent::new();
    let pushing = start(Kind::Parca, quick(&server.url()), &agent.published, SOON);
    until(|| pushing.queue.held().payloads == 1).await;
    let began = Instant::now();
    pushing.finish(Duration::from_millis(300)).await;
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(10), "{took:?}");

    let refusing = Server::start(vec![Does::Leaves; 99]).await;
    let long = (Duration::from_mins(10), Duration::from_mins(10));
    let pushing = start(Kind::Parca, quick(&refusing.url()), &agent.published, long);
    until(|| agent.count(Kind::Parca, "failed") >= 1).await;
    let began = Instant::now();
    pushing.finish(Duration::from_mins(1)).await;
    assert!(began.elapsed() < Duration::from_secs(30));
}

/// Over TLS the other side is trusted by the file of authorities, and not without it.
#[tokio::test]
async fn tls() {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("certificate.pem"), folder.path().join("key.pem"));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=collector", "-addext", "subjectAltName=IP:127.0.0.1"])
        // Otherwise it is an authority, which no server may be.
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-out"])
        .arg(&certificate)
        .arg("-keyout")
        .arg(&key)
        .output();
    let Ok(made) = made else {
        eprintln!("tls is skipped: openssl is not installed");
        return;
    };
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates(&certificate).unwrap(), PrivateKeyDer::from_pem_file(&key).unwrap())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let (script, (count, mut came)) = (Arc::new(Mutex::new(Script::default())), watch::channel(0));
    tokio::spawn({
        let script = Arc::clone(&script);
        async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(stream) = acceptor.accept(stream).await {
                    tokio::spawn(serve(stream, Arc::clone(&script), count.clone()));
                }
            }
        }
    });
    let agent = Agent::new();
    let trusting = Endpoint { ca_file: Some(certificate), ..quick(&url) };
    let tasks = start(Kind::Parca, trusting, &agent.published, SOON);
    timeout(Duration::from_secs(30), came.wait_for(|count| *count == 1)).await.unwrap().unwrap();
    until(|| agent.count(Kind::Parca, "sent") == 1).await;
    drop(tasks);
    // Another authority of the same name.
    let other = folder.path().join("other.pem");
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=collector", "-keyout", "/dev/null", "-out"])
        .arg(&other)
        .output();
    assert!(made.unwrap().status.success());
    agent.next_report();
    let tasks = start(Kind::Otlp, Endpoint { ca_file: Some(other), ..quick(&url) }, &agent.published, SOON);
    until(|| agent.count(Kind::Otlp, "failed") > 1).await;
    assert!(agent.published.status.readiness().1.contains("push.otlp: degraded"));
    assert_eq!((agent.count(Kind::Otlp, "sent"), script.lock().unwrap().came.len()), (0, 1));
    drop(tasks);
}

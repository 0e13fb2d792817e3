//! Kubernetes: names for what the control groups only number, and a word to the cluster about a leak.
//!
//! - [`pods`]: what is kept of the pods of this node, and who is looked up there;
//! - [`watch`]: keeps that current by the API server;
//! - [`events`]: an Event on the pod once a leak in it is confirmed, if that was asked for.
//!
//! [`crate::labels`] reads the pod's uid and the container's id from the control group's path; here a report gets the names that
//! belong to them, on its way from the trace to whoever reads it. Nothing goes back, and nobody waits: without the API server, or
//! without leave to ask it, labels are just fewer, which is said once and stands in [`State`]; as soon as it answers they are there
//! again.
//!
//! The rights that this needs, and no others: `get`, `list` and `watch` of `pods`, and with `events = true` `create` of `events` in
//! the group `events.k8s.io`.
//!
//! By the kube crate, which is kept by many, and knows how a watch is begun, kept and begun again (resource versions, bookmarks, pages,
//! 410 Gone). It rests on k8s-openapi, which takes long to build; of that the types for metadata and Events are used.

pub mod events;
pub mod pods;
pub mod watch;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use self::pods::{Found, Pods};
use crate::agent::config::{self, Mistake, Text};
use crate::agent::status::Status;
use crate::report::{Labels, Report};

/// What was found out of containers that may be gone by now, so that the reports of their end still name them.
const REMEMBERED: usize = 512;
/// Within these a watch is ended by the server and begun again; the longer, the later a silently dropped connection is noticed.
const WATCH: Duration = Duration::from_mins(4);
const SHORTEST_WATCH: Duration = Duration::from_secs(1);
const LONGEST_WATCH: Duration = Duration::from_hours(1);
/// The longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The last that is known of where the node's name is told (by the downward API, `spec.nodeName`).
const NODE_NAME: &str = "NODE_NAME";
/// Kubernetes tells every container of its API server by this.
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";

/// `[kubernetes]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    enabled: Enabled,
    /// The node to watch the pods of; otherwise the variable `NODE_NAME`.
    node_name: Option<String>,
    /// Where the API server is; otherwise, and usually, what every container is told.
    api_server: Option<String>,
    /// A bearer token, and the certificates that the server's is signed by (PEM); only with `api_server`.
    token_file: Option<PathBuf>,
    certificate_authority: Option<PathBuf>,
    /// Whether a pod gets an Event once a leak in it is confirmed.
    events: bool,
    /// How long a watch lasts before it is begun again.
    watch: Option<Text>,
}

/// Whether the API server is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "EnabledText")]
enum Enabled {
    /// Where this runs in a cluster, or `api_server` is given.
    #[default]
    Auto,
    Yes,
    No,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum EnabledText {
    Bool(bool),
    Text(String),
}

impl TryFrom<EnabledText> for Enabled {
    type Error = String;

    fn try_from(text: EnabledText) -> Result<Self, String> {
        match text {
            EnabledText::Bool(true) => Ok(Self::Yes),
            EnabledText::Bool(false) => Ok(Self::No),
            EnabledText::Text(text) if text == "auto" => Ok(Self::Auto),
            EnabledText::Text(text) => {
                Err(format!("invalid value '{}': must be auto, true or false", text.escape_debug()))
            }
        }
    }
}

/// Where the API server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    InCluster,
    At { url: String, token_file: Option<PathBuf>, certificate_authority: Option<PathBuf> },
}

/// Why the API server is not asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Off {
    /// Nobody wants it.
    Unwanted(String),
    /// It cannot be.
    Impossible(String),
}

/// Checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub server: Result<Server, Off>,
    pub node: Option<String>,
    pub events: bool,
    pub watch: Duration,
    /// The longest wait between two attempts.
    pub longest_wait: Duration,
    /// How long a process has to have been called leaking before an Event tells of it.
    pub confirm: Duration,
}

impl Config {
    /// By the variables of this process.
    pub fn check(self) -> Result<Settings, Mistake> {
        self.check_with(|name| std::env::var(name).ok())
    }

    fn check_with(self, variable: impl Fn(&str) -> Option<String>) -> Result<Settings, Mistake> {
        let given = |text: &String| !text.trim().is_empty();
        let node = self.node_name.or_else(|| variable(NODE_NAME)).filter(given);
        // A name of a node is one of a host (RFC 1123), and stands in a selector.
        let fits =
            |node: &str| node.len() <= 253 && node.bytes().all(|c| c.is_ascii_alphanumeric() || b".-".contains(&c));
        if let Some(node) = node.as_deref().filter(|node| !fits(node)) {
            return Err(Mistake::new("node_name", format!("'{}' is no name of a node", node.escape_debug())));
        }
        let watch = self.watch.map_or(Ok(WATCH), |text| config::time("watch", &text, SHORTEST_WATCH, LONGEST_WATCH))?;
        let url = self.api_server.filter(given);
        for (key, file) in [("token_file", &self.token_file), ("certificate_authority", &self.certificate_authority)] {
            match file {
                Some(_) if url.is_none() => return Err(Mistake::new(key, "is used with api_server only")),
                Some(file) if !file.is_file() => {
                    return Err(Mistake::new(key, format!("there is no file {}", file.display())));
                }
                _ => {}
            }
        }
        if let Some(url) = &url {
            let secure = url.starts_with("https://");
            if !secure && !url.starts_with("http://") || url.parse::<axum::http::Uri>().is_err() {
                return Err(Mistake::new(
                    "api_server",
                    "must be the address of a server, such as https://10.0.0.1:6443",
                ));
            }
            let is_local =
                ["http://127.0.0.1:", "http://[::1]:", "http://localhost:"].iter().any(|of| url.starts_with(of));
            if self.token_file.is_some() && !secure && !is_local {
                return Err(Mistake::new("api_server", "must begin with https://, so that the token stays secret"));
            }
        }
        let server = match (self.enabled, url) {
            (Enabled::No, _) => Err(Off::Unwanted("switched off by kubernetes.enabled".to_owned())),
            (_, Some(url)) => {
                Ok(Server::At { url, token_file: self.token_file, certificate_authority: self.certificate_authority })
            }
            (_, None) if variable(IN_CLUSTER).is_some() => Ok(Server::InCluster),
            (Enabled::Auto, None) => Err(Off::Unwanted("not in a cluster".to_owned())),
            (Enabled::Yes, None) => {
                return Err(Mistake::new(
                    "enabled",
                    "this is not in a cluster, and kubernetes.api_server is not given",
                ));
            }
        };
        let server = match (server, &node) {
            (Ok(_), None) if self.enabled == Enabled::Yes => {
                let what = format!("is not given, and neither is the variable {NODE_NAME} (see the downward API)");
                return Err(Mistake::new("node_name", what));
            }
            // Without it the pods of all nodes would be watched.
            (Ok(_), None) => {
                let why =
                    "the node's name is not known: neither kubernetes.node_name nor the variable NODE_NAME is given";
                Err(Off::Impossible(why.to_owned()))
            }
            (server, _) => server,
        };
        Ok(Settings { server, node, events: self.events, watch, longest_wait: LONGEST_WAIT, confirm: events::CONFIRM })
    }
}

/// How it stands with the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is not asked, and why.
    Off(Off),
    /// It has not answered yet.
    Starting,
    /// What is known of the pods is current.
    Current { pods: usize, left_out: u64 },
    /// It does not answer, or not with what was asked for; what was known before still is.
    Failing { error: String, pods: usize },
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off(Off::Unwanted(why) | Off::Impossible(why)) => write!(f, "not asked: {why}"),
            Self::Starting => f.write_str("the API server has not answered yet"),
            Self::Current { pods, left_out: 0 } => write!(f, "{pods} pods of this node are known"),
            Self::Current { pods, left_out } => {
                write!(f, "{pods} pods of this node are known, {left_out} are left out")
            }
            Self::Failing { error, pods } => {
                write!(f, "the API server cannot be asked: {error}; {pods} pods are known from before")
            }
        }
    }
}

/// What the watch and the reports share.
#[derive(Debug)]
pub struct Shared {
    pods: Mutex<Pods>,
    state: Mutex<State>,
    told: events::Counts,
}

/// A panic elsewhere leaves nothing half done behind these locks.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(state: State) -> Self {
        Self { pods: Mutex::default(), state: Mutex::new(state), told: events::Counts::default() }
    }

    /// How it stands with the API server.
    pub fn state(&self) -> State {
        locked(&self.state).clone()
    }

    /// What became of Events.
    pub fn events(&self) -> &events::Counts {
        &self.told
    }

    /// Changes the state; what is new is said, and said once.
    fn set_state(&self, state: State) {
        let mut current = locked(&self.state);
        match (&*current, &state) {
            (State::Failing { .. }, State::Failing { error, .. }) => log::debug!("kubernetes: {error}"),
            (_, State::Failing { .. }) => log::warn!("kubernetes: {state}; labels are fewer until it can"),
            (State::Current { .. }, State::Current { .. }) => {}
            (_, State::Current { .. }) => log::info!("kubernetes: {state}"),
            _ => log::debug!("kubernetes: {state}"),
        }
        *current = state;
    }
}

/// Names for reports. Ends with its watch when dropped.
pub struct Kubernetes {
    shared: Arc<Shared>,
    node: Option<String>,
    remembered: Remembered,
    teller: Option<events::Teller>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Kubernetes {
    /// Begins to watch, if that is wanted; to be called in a tokio runtime. Never fails: what is missing is in [`Shared::state`].
    pub fn start(settings: &Settings) -> Self {
        let server = match &settings.server {
            Ok(server) => server.clone(),
            Err(why) => {
                let state = State::Off(why.clone());
                let level = if matches!(why, Off::Unwanted(_)) { log::Level::Info } else { log::Level::Warn };
                log::log!(level, "kubernetes: the API server is {state}");
                let shared = Arc::new(Shared::new(state));
                let node = settings.node.clone();
                return Self { shared, node, remembered: Remembered::default(), teller: None, tasks: Vec::new() };
            }
        };
        let shared = Arc::new(Shared::new(State::Starting));
        let mut tasks = Vec::new();
        let node = settings.node.clone().unwrap_or_default();
        let client = watch::Connecting::new(server, settings.watch, settings.longest_wait);
        tasks.push(tokio::spawn(watch::watch(client.clone(), node.clone(), Arc::clone(&shared))));
        let teller = settings.events.then(|| {
            let (teller, queue) = events::Teller::new(node, settings.confirm, Arc::clone(&shared));
            tasks.push(tokio::spawn(events::send_all(client, queue, Arc::clone(&shared))));
            teller
        });
        Self { shared, node: settings.node.clone(), remembered: Remembered::default(), teller, tasks }
    }

    /// For those who tell how the agent is.
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Names everything in the report, and has Events sent about what is confirmed to leak.
    pub fn enrich(&mut self, report: &mut Report) {
        let system = report.system.iter_mut().flat_map(|system| {
            let watched = system.processes.iter_mut().map(|process| &mut process.labels);
            watched.chain(system.restarts.iter_mut().map(|restart| &mut restart.labels))
        });
        let processes = report.processes.iter_mut().map(|process| &mut process.labels);
        let killed = report.oom_kills.iter_mut().flat_map(|kill| {
            let process = kill.process.as_mut().map(|process| &mut process.labels);
            std::iter::once(&mut kill.labels).chain(process)
        });
        let pods = locked(&self.shared.pods);
        for labels in system.chain(processes).chain(killed) {
            label(labels, &pods, &mut self.remembered, self.node.as_deref());
        }
        drop(pods);
        if let Some(teller) = &mut self.teller {
            teller.look(report);
        }
    }

    /// Says how it is.
    pub fn tell(&self, status: &Status) {
        const PART: &str = "kubernetes";
        let state = self.shared.state();
        match state {
            State::Off(Off::Unwanted(_)) => return,
            State::Current { left_out: 0, .. } => status.set(PART, None),
            State::Off(Off::Impossible(_)) | State::Starting | State::Current { .. } | State::Failing { .. } => {
                status.set(PART, Some(state.to_string()));
            }
        }
        if self.teller.is_some() {
            let counts = self.shared.events();
            status.add(PART, "events_sent", counts.sent.swap(0, Ordering::Relaxed));
            status.add(PART, "events_dropped", counts.dropped.swap(0, Ordering::Relaxed));
        }
    }

    /// Names what these belong to.
    pub fn label(&mut self, labels: &mut Labels) {
        label(labels, &locked(&self.shared.pods), &mut self.remembered, self.node.as_deref());
    }
}

fn label(labels: &mut Labels, pods: &Pods, remembered: &mut Remembered, node: Option<&str>) {
    let Some(key) = labels.container.as_ref().or(labels.pod_uid.as_ref()) else { return };
    let found = match pods.find(labels.container.as_deref(), labels.pod_uid.as_deref()) {
        Some(found) => {
            remembered.keep(key, &found);
            found
        }
        None => match remembered.found.get(key) {
            Some(found) => found.clone(),
            // A container of no pod, or of one that is not known.
            None if labels.pod_uid.is_none() => return,
            None => Found::default(),
        },
    };
    (labels.pod, labels.namespace) = (found.pod, found.namespace);
    (labels.container_name, labels.image) = (found.container, found.image);
    labels.node = node.map(str::to_owned);
}

/// The latest that were found, by container, or by pod where that is all that is known.
#[derive(Debug, Default)]
struct Remembered {
    found: HashMap<String, Found>,
    order: VecDeque<String>,
}

impl Remembered {
    fn keep(&mut self, key: &str, found: &Found) {
        if let Some(before) = self.found.get_mut(key) {
            if before != found {
                before.clone_from(found);
            }
            return;
        }
        if self.order.len() == REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.found.remove(&oldest);
        }
        self.order.push_back(key.to_owned());
        self.found.insert(key.to_owned(), found.clone());
    }
}

#[cfg(test)]
mod tests;

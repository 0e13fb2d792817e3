//! Keeps what is known of this node's pods current.
//!
//! Begun again whenever it ends, for as long as the agent lives, with growing waits between two failures. Until a list is complete
//! what was known before stays. A silent server is given up on a little after the watch should have ended; what one answer may take of
//! memory is bounded.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, pin_mut};
use http_body_util::Limited;
use kube::client::ClientBuilder;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch_pods};
use kube::{Api, Client};
use tower::util::MapResponseLayer;

use super::pods::{Pod, Pods};
use super::{Server, Shared, State, locked};

/// The most bytes of one answer: a page of pods, or all of a watch. A pod has some 10 KB, and at most 1.5 MiB (the limit of etcd).
const MAX_ANSWER: usize = 32 << 20;
/// Pods in a page.
const PAGE: u32 = 50;
/// For a connection, and for a request to be sent.
const CONNECT: Duration = Duration::from_secs(10);
/// Beyond the length of a watch.
const GRACE: Duration = Duration::from_secs(2);
/// Characters of an error that are told.
const MAX_ERROR: usize = 300;

/// How a client comes about.
#[derive(Clone, Debug)]
pub struct Connecting {
    server: Server,
    watch: Duration,
    longest_wait: Duration,
}

impl Connecting {
    pub fn new(server: Server, watch: Duration, longest_wait: Duration) -> Self {
        Self { server, watch, longest_wait }
    }

    /// A client for the API server; it connects with its first request, and reads its token and certificates anew now and then.
    fn client(&self) -> Result<Client> {
        let mut config = match &self.server {
            Server::InCluster => kube::Config::incluster_env().context("this container has no service account")?,
            Server::At { url, token_file, certificate_authority } => {
                let mut config = kube::Config::new(url.parse().context("its address makes no sense")?);
                let token_file = token_file.as_ref().map(|path| path.to_string_lossy().into_owned());
                config.auth_info.token_file = token_file;
                config.root_cert_file.clone_from(certificate_authority);
                config
            }
        };
        config.connect_timeout = Some(CONNECT);
        config.write_timeout = Some(CONNECT);
        config.read_timeout = Some(self.watch + 2 * GRACE);
        config.reset_reader_on_write = true;
        // Attempts are spaced out here.
        config.default_retry = false;
        let bounded = |answer: axum::http::Response<_>| answer.map(|body| Limited::new(body, MAX_ANSWER));
        Ok(ClientBuilder::try_from(config)?.with_layer(&MapResponseLayer::new(bounded)).build())
    }

    /// The same, once there is one: the service account may come later.
    pub async fn connected(&self, shared: &Shared) -> Client {
        let mut waits = self.waits();
        loop {
            match self.client() {
                Ok(client) => return client,
                Err(error) => fail(shared, format!("{error:#}")),
            }
            tokio::time::sleep(waits.next().unwrap_or(self.longest_wait)).await;
        }
    }

    /// The waits between attempts: growing, with some chance in them, so that the nodes of a cluster do not come all at once.
    pub fn waits(&self) -> Waits {
        Waits { inner: DefaultBackoff::default(), longest: self.longest_wait }
    }
}

/// See [`Connecting::waits`].
pub struct Waits {
    inner: DefaultBackoff,
    longest: Duration,
}

impl Iterator for Waits {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.inner.next().map_or(self.longest, |wait| wait.min(self.longest)))
    }
}

impl Backoff for Waits {
    fn reset(&mut self) {
        self.inner.reset();
    }
}

/// Watches until the task is ended.
pub async fn watch(connecting: Connecting, node: String, shared: Arc<Shared>) {
    let client = connecting.connected(&shared).await;
    let config = watcher::Config::default()
        .fields(&format!("spec.nodeName={node}"))
        .page_size(PAGE)
        .timeout(u32::try_from(connecting.watch.as_secs()).unwrap_or(u32::MAX));
    let changes = watch_pods(Api::<Pod>::all(client), config).backoff(connecting.waits());
    pin_mut!(changes);
    // A list that is not complete yet.
    let mut coming = None;
    while let Some(change) = changes.next().await {
        match change {
            Ok(Event::Init) => coming = Some(Pods::default()),
            Ok(Event::InitApply(pod)) => coming.get_or_insert_default().put(pod, &node),
            Ok(Event::InitDone) => *locked(&shared.pods) = coming.take().unwrap_or_default(),
            Ok(Event::Apply(pod)) => locked(&shared.pods).put(pod, &node),
            Ok(Event::Delete(pod)) => locked(&shared.pods).remove(&pod),
            Err(error) => {
                fail(&shared, reason(&error));
                continue;
            }
        }
        if coming.is_none() {
            let (pods, left_out) = {
                let pods = locked(&shared.pods);
                (pods.count(), pods.left_out())
            };
            shared.set_state(State::Current { pods, left_out });
        }
    }
}

fn fail(shared: &Shared, error: String) {
    let pods = locked(&shared.pods).count();
    shared.set_state(State::Failing { error, pods });
}

/// What went wrong, without what the server may have put into it to be seen on a terminal, and not at any length.
fn reason(error: &watcher::Error) -> String {
    use watcher::Error::{InitialListFailed, WatchError, WatchFailed, WatchStartFailed};
    match error {
        WatchError(status) => refused(status),
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => told(error),
        error @ watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// The same of a request.
pub fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => refused(status),
        error => {
            // Most say no more than that something failed, and the reason is behind it.
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(error) = source {
                let more = error.to_string();
                if !text.contains(&more) {
                    text = format!("{text}: {more}");
                }
                source = error.source();
            }
            short(&text)
        }
    }
}

fn refused(status: &kube::core::Status) -> String {
    short(&format!("{} (HTTP {})", status.message, status.code))
}

fn short(text: &str) -> String {
    crate::view::safe(&text.chars().take(MAX_ERROR).collect::<String>())
}

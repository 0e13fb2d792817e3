//! Pushes what is found to the systems that people already use: profiles to Pyroscope and Parca, metrics to an OpenTelemetry collector.
//!
//! Each is optional and goes by itself: one task makes a payload of the latest report every `interval` and puts it into a bounded queue,
//! another sends what is in it. Where the other side is down or slow the queue is full after a while, and the oldest payload goes for
//! the newest; that is counted, and told by `/readyz` and the metrics. Tracing never waits for any of this: it only replaces the
//! report that is read here. At the agent's end the last report is pushed too, and what waits is sent once more, within [`FLUSH`].
//!
//! - [`config`]: the sections `[push.pyroscope]`, `[push.parca]` and `[push.otlp]`;
//! - [`profiles`]: what Pyroscope and Parca get, and [`metrics`]: what a collector gets;
//! - [`queue`]: what waits; [`client`]: one attempt to send it.

pub mod config;

mod client;
mod metrics;
mod profiles;
mod queue;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at, sleep, timeout};

use self::client::{Client, Outcome};
use self::config::{Endpoint, Settings};
use self::queue::{Payload, Queue};
use super::Published;
use crate::report::Report;

/// Between two attempts, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));
/// What the other side may ask for by `Retry-After`.
const LONGEST_REST: Duration = Duration::from_mins(10);
/// For what waits at the end, all endpoints side by side. Well within the time that Kubernetes and systemd give a program to end.
const FLUSH: Duration = Duration::from_secs(2);

/// Where payloads go, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Pyroscope,
    Parca,
    Otlp,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Pyroscope, Self::Parca, Self::Otlp];

    /// The part of the agent that this is, in `/readyz` and the metrics.
    pub fn part(self) -> &'static str {
        match self {
            Self::Pyroscope => "push.pyroscope",
            Self::Parca => "push.parca",
            Self::Otlp => "push.otlp",
        }
    }

    /// Behind the URL of the configuration.
    ///
    /// Pyroscope: the Connect service `push.v1.PusherService`, which `/ingest` is the older form of. Parca: the HTTP gateway of
    /// `parca.profilestore.v1alpha1.ProfileStoreService`, so that there need not be gRPC's HTTP/2. OTLP: the standard's.
    fn path(self) -> &'static str {
        match self {
            Self::Pyroscope => "/push.v1.PusherService/Push",
            Self::Parca => "/api/profiles/writeraw",
            Self::Otlp => "/v1/metrics",
        }
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::Pyroscope => "application/proto",
            Self::Parca => "application/json",
            Self::Otlp => "application/x-protobuf",
        }
    }

    /// What is sent of a report; `None` where there is nothing to send.
    fn payload(self, published: &Published, report: &Report, endpoint: &Endpoint) -> Option<Payload> {
        let limits = published.settings.borrow().metrics;
        let body = match self {
            Self::Pyroscope => profiles::pyroscope(&profiles::series(report, limits.processes, endpoint)?),
            Self::Parca => profiles::parca(&profiles::series(report, limits.processes, endpoint)?),
            Self::Otlp => metrics::request(report, limits, &published.status.figures(), endpoint),
        };
        Some(Payload::new(body))
    }
}

/// Pushes as the settings say, also after they have changed, until the `end`; then what waits gets one more attempt.
pub async fn run(published: Arc<Published>, mut end: oneshot::Receiver<()>) {
    let mut settings = published.settings.clone();
    let mut pushing: [Option<Pushing>; 3] = [None, None, None];
    let mut now = Settings::default();
    loop {
        let new = settings.borrow_and_update().push.clone();
        for (kind, pushing) in Kind::ALL.into_iter().zip(&mut pushing) {
            if now.of(kind) == new.of(kind) && pushing.is_some() {
                continue;
            }
            // What waited goes too: it was made for an endpoint that nobody wants any more.
            *pushing = new.of(kind).map(|endpoint| start(kind, endpoint.clone(), &published, BACKOFF));
        }
        now = new;
        tokio::select! {
            changed = settings.changed() => if changed.is_err() { break },
            _ = &mut end => break,
        }
    }
    let finishing: Vec<_> = pushing.into_iter().flatten().map(|one| tokio::spawn(one.finish(FLUSH))).collect();
    for one in finishing {
        // It would have panicked, which is in the log.
        let _ = one.await;
    }
}

/// The two tasks of one endpoint; ended when dropped.
struct Pushing {
    kind: Kind,
    tasks: JoinSet<()>,
    queue: Arc<Queue>,
    end: watch::Sender<bool>,
}

impl Pushing {
    /// Sends what waits as far as that goes at once and in this time.
    async fn finish(mut self, limit: Duration) {
        self.end.send_replace(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        // Where the time is over the tasks are ended, too.
        let _ = timeout(limit, all).await;
        let left = self.queue.held();
        if left.payloads > 0 {
            log::warn!("{}: {left} could not be sent before the end", self.kind.part());
        }
    }
}

/// Starts the two tasks of one endpoint.
fn start(kind: Kind, endpoint: Endpoint, published: &Arc<Published>, backoff: (Duration, Duration)) -> Pushing {
    let queue = Arc::new(Queue::new(endpoint.most_queued, endpoint.most_bytes));
    for what in ["sent", "failed", "refused", "dropped"] {
        published.status.add(kind.part(), what, 0);
    }
    let (end, ending) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(make(kind, endpoint.clone(), Arc::clone(published), Arc::clone(&queue), ending.clone()));
    tasks.spawn(send(kind, endpoint, Arc::clone(published), Arc::clone(&queue), ending, backoff));
    Pushing { kind, tasks, queue, end }
}

/// Waits until the end has come.
async fn ended(ending: &mut watch::Receiver<bool>) {
    // An end without a word is one as well.
    let _ = ending.wait_for(|end| *end).await;
}

/// Makes a payload of the latest report every interval. Nodes that were started together do not push together.
async fn make(
    kind: Kind,
    endpoint: Endpoint,
    published: Arc<Published>,
    queue: Arc<Queue>,
    mut ending: watch::Receiver<bool>,
) {
    let first = tokio::time::Instant::now() + endpoint.interval.mul_f64(fastrand::f64());
    let mut ticks = interval_at(first, endpoint.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last: Option<Arc<Report>> = None;
    loop {
        let at_end = tokio::select! {
            _ = ticks.tick() => false,
            () = ended(&mut ending) => true,
        };
        let report = Arc::clone(&published.report.borrow());
        if last.as_ref().is_none_or(|last| !Arc::ptr_eq(last, &report)) {
            last = Some(Arc::clone(&report));
            let (of, to) = (Arc::clone(&published), endpoint.clone());
            // Names and compression take milliseconds, which other tasks should not wait for.
            let made = tokio::task::spawn_blocking(move || kind.payload(&of, &report, &to)).await;
            if let Ok(Some(payload)) = made {
                published.status.add(kind.part(), "dropped", queue.put(payload));
                note(kind, &published, &queue);
            }
        }
        if at_end {
            return queue.close();
        }
    }
}

/// A time after the start of a report's trace, in nanoseconds since 1970.
fn nanoseconds(report: &Report, after_start_s: f64) -> u64 {
    u64::try_from(report.started_at.as_nanosecond()).unwrap_or(0) + (after_start_s * 1e9) as u64
}

/// Says how much waits.
fn note(kind: Kind, published: &Published, queue: &Queue) {
    published.status.note(kind.part(), format!("{} waiting", queue.held()));
}

/// Sends what waits, the oldest first.
async fn send(
    kind: Kind,
    endpoint: Endpoint,
    published: Arc<Published>,
    queue: Arc<Queue>,
    mut ending: watch::Receiver<bool>,
    (shortest, longest): (Duration, Duration),
) {
    let status = &published.status;
    let client = match Client::new(kind, &endpoint) {
        Ok(client) => client,
        Err(error) => return status.degraded(kind.part(), format!("{error:#}")),
    };
    let mut failures: u32 = 0;
    while let Some(payload) = queue.first().await {
        let is_last = *ending.borrow();
        match client.send(&payload).await {
            Outcome::Sent { rejected } => {
                failures = 0;
                queue.remove(&payload);
                status.count(kind.part(), "sent");
                match rejected {
                    None => status.works(kind.part()),
                    Some(why) => status.degraded(kind.part(), format!("a part was refused: {why}")),
                }
            }
            Outcome::Refused(why) => {
                // The same would be refused again.
                queue.remove(&payload);
                status.count(kind.part(), "refused");
                status.degraded(kind.part(), format!("refused: {why}"));
            }
            Outcome::Failed { why, rest } => {
                status.count(kind.part(), "failed");
                status.degraded(kind.part(), why);
                let grown = shortest.saturating_mul(1 << failures.min(16)).min(longest);
                failures += 1;
                // Half of it at least, the rest by chance: those that failed together do not come back together.
                let by_chance = grown.mul_f64(0.5 + fastrand::f64() / 2.0);
                let rest = rest.map_or(by_chance, |rest| rest.min(LONGEST_REST).max(by_chance));
                if is_last {
                    return;
                }
                tokio::select! {
                    () = sleep(rest) => {}
                    // There will be no later.
                    () = ended(&mut ending) => {}
                }
            }
        }
        note(kind, &published, &queue);
    }
}

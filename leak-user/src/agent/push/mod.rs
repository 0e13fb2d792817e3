//! Pushes what is found to the systems that people already use: profiles to Pyroscope and Parca, metrics to an OpenTelemetry collector.
//!
//! Each is optional and goes by itself: one task makes a payload of the latest report every `interval` and puts it into a bounded queue,
//! another sends what is in it. Where the other side is down or slow the queue is full after a while, and the oldest payload goes for
//! the newest; that is counted, and told by `/readyz` and the metrics. Tracing never waits for any of this: it only replaces the
//! report that is read here.
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

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at, sleep};

use self::client::{Client, Outcome};
use self::config::{Endpoint, Settings};
use self::queue::{Payload, Queue};
use super::Published;
use crate::report::Report;

/// Between two attempts, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));
/// What the other side may ask for by `Retry-After`.
const LONGEST_REST: Duration = Duration::from_mins(10);

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

/// Pushes as the settings say, also after they have changed, until it is dropped.
pub async fn run(published: Arc<Published>) {
    let mut settings = published.settings.clone();
    let mut tasks: [Option<JoinSet<()>>; 3] = [None, None, None];
    let mut now = Settings::default();
    loop {
        let new = settings.borrow_and_update().push.clone();
        for (kind, tasks) in Kind::ALL.into_iter().zip(&mut tasks) {
            if now.of(kind) == new.of(kind) && tasks.is_some() {
                continue;
            }
            // What waited goes too: it was made for an endpoint that nobody wants any more.
            *tasks = new.of(kind).map(|endpoint| start(kind, endpoint.clone(), &published, BACKOFF));
        }
        now = new;
        if settings.changed().await.is_err() {
            return;
        }
    }
}

/// Starts the two tasks of one endpoint.
fn start(kind: Kind, endpoint: Endpoint, published: &Arc<Published>, backoff: (Duration, Duration)) -> JoinSet<()> {
    let queue = Arc::new(Queue::new(endpoint.most_queued, endpoint.most_bytes));
    for what in ["sent", "failed", "refused", "dropped"] {
        published.status.add(kind.part(), what, 0);
    }
    let mut tasks = JoinSet::new();
    tasks.spawn(make(kind, endpoint.clone(), Arc::clone(published), Arc::clone(&queue)));
    tasks.spawn(send(kind, endpoint, Arc::clone(published), queue, backoff));
    tasks
}

/// Makes a payload of the latest report every interval. Nodes that were started together do not push together.
async fn make(kind: Kind, endpoint: Endpoint, published: Arc<Published>, queue: Arc<Queue>) {
    let first = tokio::time::Instant::now() + endpoint.interval.mul_f64(fastrand::f64());
    let mut ticks = interval_at(first, endpoint.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last: Option<Arc<Report>> = None;
    loop {
        ticks.tick().await;
        let report = Arc::clone(&published.report.borrow());
        if last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &report)) {
            continue;
        }
        last = Some(Arc::clone(&report));
        let (of, to) = (Arc::clone(&published), endpoint.clone());
        // Names and compression take milliseconds, which other tasks should not wait for.
        let made = tokio::task::spawn_blocking(move || kind.payload(&of, &report, &to)).await;
        if let Ok(Some(payload)) = made {
            published.status.add(kind.part(), "dropped", queue.put(payload));
        }
    }
}

/// A time after the start of a report's trace, in nanoseconds since 1970.
fn nanoseconds(report: &Report, after_start_s: f64) -> u64 {
    u64::try_from(report.started_at.as_nanosecond()).unwrap_or(0) + (after_start_s * 1e9) as u64
}

/// Sends what waits, the oldest first.
async fn send(
    kind: Kind,
    endpoint: Endpoint,
    published: Arc<Published>,
    queue: Arc<Queue>,
    (shortest, longest): (Duration, Duration),
) {
    let status = &published.status;
    let client = match Client::new(kind, &endpoint) {
        Ok(client) => client,
        Err(error) => return status.degraded(kind.part(), format!("{error:#}")),
    };
    let mut failures: u32 = 0;
    loop {
        let payload = queue.first().await;
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
                sleep(rest.map_or(by_chance, |rest| rest.min(LONGEST_REST).max(by_chance))).await;
            }
        }
    }
}

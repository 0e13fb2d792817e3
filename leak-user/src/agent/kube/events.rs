//! An Event on the pod once a leak in it is confirmed, so that `kubectl describe pod` tells of it.
//!
//! Confirmed: the process was called leaking in all reports of half a minute. Of one leak, which is a pod, a container and a call
//! stack, it is told once a day at most: its Event has a name that follows from these, so an agent that was started anew does not
//! tell again while the Event is there (the API server keeps Events for an hour unless told otherwise). How many are sent in how much time
//! is bounded too, and so is the queue: with the API server away Events wait there, the rest is counted as dropped, and reports go on.

use std::collections::HashMap;
use std::hash::Hasher as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fnv::FnvHasher;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use tokio::sync::mpsc;

use super::Shared;
use super::watch::{Connecting, told};
use crate::export::stable_id;
use crate::report::{Process, Report, StackVerdict, Verdict};

/// So long a process has to have been called leaking.
pub const CONFIRM: Duration = Duration::from_secs(30);
/// Of one leak it is told once in so long.
const AGAIN: Duration = Duration::from_hours(24);
/// Leaks that are remembered for that.
const REMEMBERED: usize = 1024;
/// Events that wait to be sent.
const QUEUE: usize = 64;
/// So many are sent at once, and then one in so long.
const BURST: u32 = 10;
const EVERY: Duration = Duration::from_mins(1);
/// Attempts, and how long one may take.
const ATTEMPTS: usize = 20;
const REQUEST: Duration = Duration::from_secs(10);
/// The most bytes of a note (`NoteLengthLimit`, pkg/apis/core/validation/events.go of Kubernetes).
const MAX_NOTE: usize = 1024;
/// Of the instance's name, there too.
const MAX_INSTANCE: usize = 128;

/// What became of Events.
#[derive(Debug, Default)]
pub struct Counts {
    pub sent: AtomicU64,
    /// For which the queue had no room, that the server refused, or that could not be sent for too long.
    pub dropped: AtomicU64,
}

/// Finds what is to be told.
pub struct Teller {
    node: String,
    queue: mpsc::Sender<Event>,
    /// Leaks that the last report had, and since when reports have them.
    seen: HashMap<u64, Instant>,
    /// When it was told of a leak.
    told: HashMap<u64, Instant>,
    confirm: Duration,
    shared: Arc<Shared>,
}

impl Teller {
    pub fn new(node: String, confirm: Duration, shared: Arc<Shared>) -> (Self, mpsc::Receiver<Event>) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        (Self { node, queue, seen: HashMap::new(), told: HashMap::new(), confirm, shared }, waiting)
    }

    /// Looks at a report with its labels. Waits for nobody.
    pub fn look(&mut self, report: &Report) {
        self.look_at(report, Instant::now());
    }

    fn look_at(&mut self, report: &Report, now: Instant) {
        let leaks =
            report.processes.iter().filter(|process| process.verdict == Verdict::Leaking && process.ended.is_none());
        let leaks: Vec<(u64, &Process)> = leaks.filter_map(|process| Some((key(process)?, process))).collect();
        self.seen.retain(|key, _| leaks.iter().any(|(leak, _)| leak == key));
        for (key, process) in leaks {
            let since = *self.seen.entry(key).or_insert(now);
            let is_new = self.told.get(&key).is_none_or(|at| now.duration_since(*at) >= AGAIN);
            if now.duration_since(since) < self.confirm || !is_new {
                continue;
            }
            if self.queue.try_send(self.event(key, process, report)).is_err() {
                // To be told with a later report.
                self.shared.told.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if self.told.len() >= REMEMBERED
                && let Some(oldest) = self.told.iter().min_by_key(|(_, at)| **at).map(|(key, _)| *key)
            {
                self.told.remove(&oldest);
            }
            self.told.insert(key, now);
        }
    }

    fn event(&self, key: u64, process: &Process, report: &Report) -> Event {
        let labels = &process.labels;
        let (_, finding) = crate::view::in_words(process, report);
        let note = format!("{} (pid {}): {finding}", crate::view::safe(&process.comm), process.pid);
        Event {
            metadata: ObjectMeta {
                name: Some(format!("leaktrace.{key:016x}")),
                namespace: labels.namespace.clone(),
                ..ObjectMeta::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: labels.pod.clone(),
                namespace: labels.namespace.clone(),
                uid: labels.pod_uid.clone(),
                field_path: labels.container_name.as_ref().map(|name| format!("spec.containers{{{name}}}")),
                resource_version: None,
            }),
            reason: Some("MemoryLeak".to_owned()),
            action: Some("Tracing".to_owned()),
            note: Some(note[..note.floor_char_boundary(MAX_NOTE)].to_owned()),
            type_: Some("Warning".to_owned()),
            event_time: Some(MicroTime(jiff::Timestamp::now())),
            reporting_controller: Some("leaktrace/agent".to_owned()),
            reporting_instance: Some(self.node[..self.node.floor_char_boundary(MAX_INSTANCE)].to_owned()),
            ..Event::default()
        }
    }
}

/// A leak: the pod, the container and the call stack that grows fastest; none of a process in no pod.
fn key(process: &Process) -> Option<u64> {
    let labels = &process.labels;
    let mut hasher = FnvHasher::default();
    let (pod, namespace) = (labels.pod.as_ref()?, labels.namespace.as_ref()?);
    let stack = process.stacks.iter().find(|stack| stack.verdict == StackVerdict::Growing).map(stable_id);
    for part in [Some(namespace), Some(pod), labels.pod_uid.as_ref(), labels.container_name.as_ref(), stack.as_ref()] {
        hasher.write(part.map_or("", String::as_str).as_bytes());
        hasher.write(&[0xff]);
    }
    Some(hasher.finish())
}

/// Sends what comes until the task is ended.
pub async fn send_all(connecting: Connecting, mut waiting: mpsc::Receiver<Event>, shared: Arc<Shared>) {
    let Some(mut event) = waiting.recv().await else { return };
    // Nothing is asked of the server before there is something to tell.
    let client = connecting.connected(&shared).await;
    let mut allowance = Allowance::new(Instant::now());
    loop {
        tokio::time::sleep(allowance.take(Instant::now())).await;
        let api: Api<Event> = Api::namespaced(client.clone(), event.metadata.namespace.as_deref().unwrap_or("default"));
        let sent = send(&api, &event, &connecting).await;
        let count = if sent { &shared.told.sent } else { &shared.told.dropped };
        count.fetch_add(1, Ordering::Relaxed);
        event = match waiting.recv().await {
            Some(event) => event,
            None => return,
        };
    }
}

/// Whether it is there.
async fn send(api: &Api<Event>, event: &Event, connecting: &Connecting) -> bool {
    let mut waits = connecting.waits();
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        let answer = tokio::time::timeout(REQUEST, api.create(&PostParams::default(), event)).await;
        last = match answer {
            Ok(Ok(_)) => return true,
            // By an attempt whose answer was lost, or by an agent before.
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => return true,
            // The pod's namespace is gone, or the server holds it to be wrong: it would be so again. A right that is missing may come.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 400 | 404 | 422) => {
                log::warn!("kubernetes: an Event was refused: {}", told(&kube::Error::Api(status)));
                return false;
            }
            Ok(Err(error)) => told(&error),
            Err(_) => "no answer in time".to_owned(),
        };
        log::debug!("kubernetes: an Event could not be sent: {last}");
        tokio::time::sleep(waits.next().unwrap_or(REQUEST)).await;
    }
    log::warn!("kubernetes: an Event could not be sent {ATTEMPTS} times, and is dropped: {last}");
    false
}

/// How much may be sent: at first [`BURST`], and one more each [`EVERY`].
struct Allowance {
    left: u32,
    since: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: BURST, since: now }
    }

    /// Takes one; how long to wait for it.
    fn take(&mut self, now: Instant) -> Duration {
        let periods =
            u32::try_from(now.saturating_duration_since(self.since).as_secs() / EVERY.as_secs()).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(periods);
        self.since += EVERY * periods;
        if self.left >= BURST {
            (self.left, self.since) = (BURST, now);
        }
        if self.left > 0 {
            self.left -= 1;
            return Duration::ZERO;
        }
        // The next period's is taken in advance.
        self.since += EVERY;
        self.since.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::kube::State;
    use crate::report::sample;

    fn teller() -> (Teller, mpsc::Receiver<Event>) {
        Teller::new("node-1".to_owned(), CONFIRM, Arc::new(Shared::new(State::Starting)))
    }

    /// A leak is told once it has been there for half a minute, and not again until the next day; one that went away has to be confirmed
    /// anew.
    #[test]
    fn confirmed_and_told_once() {
        let (mut teller, mut queue) = teller();
        let (report, start) = (sample::system(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for seconds in [0, 10, 29] {
            teller.look_at(&report, at(seconds));
        }
        assert!(queue.try_recv().is_err(), "not confirmed yet");
        teller.look_at(&sample::steady(), at(30));
        for seconds in [31, 60] {
            teller.look_at(&report, at(seconds));
        }
        assert!(queue.try_recv().is_err(), "it was away in between");
        for seconds in [61, 71, 5000] {
            teller.look_at(&report, at(seconds));
        }
        let event = queue.try_recv().expect("an Event");
        assert!(queue.try_recv().is_err(), "told twice");
        let name = event.metadata.name.clone();
        let regarding = event.regarding.expect("a pod");
        assert_eq!((regarding.kind.as_deref(), regarding.namespace.as_deref()), (Some("Pod"), Some("shop")));
        assert_eq!(regarding.field_path.as_deref(), Some("spec.containers{api}"));
        let note = event.note.expect("a note");
        assert!(note.contains("Session::remember") && note.contains("out of memory in about"), "{note}");
        teller.look_at(&report, at(61 + AGAIN.as_secs()));
        assert_eq!(queue.try_recv().expect("the next day's").metadata.name, name);
    }

    /// A full queue drops and counts, and the leak is told of once there is room; what is long or hostile is cut and harmless.
    #[test]
    fn full_queue() {
        let (mut teller, mut queue) = teller();
        teller.confirm = Duration::ZERO;
        let now = Instant::now();
        let mut report = sample::system();
        let model = report.processes[0].clone();
        report.processes = (0..QUEUE + 10)
            .map(|n| {
                let mut process = model.clone();
                process.labels.pod = Some(format!("pod-{n}"));
                process.comm = "\u{1b}[2J".repeat(2000);
                process
            })
            .collect();
        teller.look_at(&report, now);
        assert_eq!(teller.shared.told.dropped.load(Ordering::Relaxed), 10);
        let mut names = std::collections::HashSet::new();
        while let Ok(event) = queue.try_recv() {
            let note = event.note.expect("a note");
            assert!(note.len() <= MAX_NOTE && !note.chars().any(char::is_control), "{note:?}");
            names.insert(event.metadata.name);
        }
        assert_eq!(names.len(), QUEUE);
        teller.look_at(&report, now);
        while let Ok(event) = queue.try_recv() {
            names.insert(event.metadata.name);
        }
        assert_eq!(names.len(), QUEUE + 10);
    }

    /// At first several at once, then one a minute; what is not used is not saved up beyond the burst.
    #[test]
    fn allowance() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        for _ in 0..BURST {
            assert_eq!(allowance.take(start), Duration::ZERO);
        }
        assert_eq!(allowance.take(start), EVERY);
        assert_eq!(allowance.take(start + EVERY), EVERY);
        let later = start + EVERY * 1000;
        let free = (0..=BURST).filter(|_| allowance.take(later) == Duration::ZERO).count();
        assert_eq!(free, BURST as usize);
    }
}

//! How the agent is: what `/healthz`, `/readyz` and the metrics about itself are made of.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::export::openmetrics::Figures;

/// The loop that traces is held to be stuck where it has made no report for so long, beyond what lies between two.
const STUCK: Duration = Duration::from_mins(2);
/// Starting takes seconds; on a host that is out of memory or processors it can take longer.
const STARTING: Duration = Duration::from_mins(5);

/// Shared by all parts of the agent. A part goes by a name of its own, such as `state` or `kubernetes`.
#[derive(Debug)]
pub struct Status {
    started: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// What each part says of itself: nothing where it works.
    parts: BTreeMap<&'static str, Option<String>>,
    /// What is to be known of a part, whether it works or not.
    notes: BTreeMap<&'static str, String>,
    counts: BTreeMap<(&'static str, &'static str), u64>,
    reported: Option<Instant>,
    interval: Duration,
}

impl Default for Status {
    fn default() -> Self {
        Self { started: Instant::now(), inner: Mutex::default() }
    }
}

impl Status {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This part works.
    pub fn works(&self, part: &'static str) {
        if self.inner().parts.insert(part, None).flatten().is_some() {
            log::info!("{part}: works again");
        }
    }

    /// This part does not, for this reason; the rest goes on. Said once in the log as long as the reason stays.
    pub fn degraded(&self, part: &'static str, reason: impl Into<String>) {
        let reason = reason.into();
        let before = self.inner().parts.insert(part, Some(reason.clone())).flatten();
        if before.as_ref() != Some(&reason) {
            log::warn!("{part}: {reason}");
        }
    }

    /// Something to be known of this part for as long as the agent runs.
    pub fn note(&self, part: &'static str, note: impl Into<String>) {
        self.inner().notes.insert(part, note.into());
    }

    /// How a part is that logs by itself: what is wrong with it, if something is.
    pub fn set(&self, part: &'static str, reason: Option<String>) {
        self.inner().parts.insert(part, reason);
    }

    /// Counts what happened to a part.
    pub fn count(&self, part: &'static str, what: &'static str) {
        self.add(part, what, 1);
    }

    /// The same, several at once; none makes the series known.
    pub fn add(&self, part: &'static str, what: &'static str, times: u64) {
        *self.inner().counts.entry((part, what)).or_default() += times;
    }

    /// A report was made, and the next is to come after `interval`.
    pub fn reported(&self, interval: Duration) {
        let mut inner = self.inner();
        inner.reported = Some(Instant::now());
        inner.interval = interval;
    }

    /// Whether the loop that traces goes round.
    pub fn health(&self) -> (bool, String) {
        let inner = self.inner();
        let (since, patience) = match inner.reported {
            Some(at) => (at.elapsed(), inner.interval + STUCK),
            None => (self.started.elapsed(), STARTING),
        };
        if since <= patience {
            return (true, "ok\n".to_owned());
        }
        (false, format!("no report has been made for {} s\n", since.as_secs()))
    }

    /// Whether reports are made, with a line on each part.
    pub fn readiness(&self) -> (bool, String) {
        let inner = self.inner();
        let (ready, trace) = match inner.reported {
            None => (false, "starting".to_owned()),
            Some(at) if at.elapsed() > inner.interval + STUCK => {
                (false, format!("the last report is {} s old", at.elapsed().as_secs()))
            }
            Some(_) => (true, "ok".to_owned()),
        };
        let mut text = format!("{}\ntrace: {trace}\n", if ready { "ready" } else { "not ready" });
        for (part, reason) in &inner.parts {
            let reason = reason.as_deref().map_or_else(|| "ok".to_owned(), |reason| format!("degraded: {reason}"));
            let note = inner.notes.get(part).map(|note| format!(" ({note})")).unwrap_or_default();
            // Writing to a string does not fail.
            let _ = writeln!(text, "{part}: {}", crate::view::safe(&(reason + &note)));
        }
        (ready, text)
    }

    /// For the page of metrics.
    pub fn figures(&self) -> Figures {
        let inner = self.inner();
        Figures {
            degraded: inner.parts.iter().map(|(part, reason)| (*part, reason.is_some())).collect(),
            counts: inner.counts.iter().map(|((part, what), count)| (*part, *what, *count)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It is ready once there is a report; a part that does not work is named and takes nothing from that.
    #[test]
    fn readiness() {
        let status = Status::default();
        assert_eq!(status.readiness(), (false, "not ready\ntrace: starting\n".to_owned()));
        assert!(status.health().0);
        status.reported(Duration::from_secs(1));
        status.works("kubernetes");
        status.note("kubernetes", "of node a");
        status.degraded("state", "cannot be\u{1b} written");
        let (ready, text) = status.readiness();
        assert!(
            ready && text.contains("kubernetes: ok (of node a)\n") && text.contains("state: degraded: cannot be"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'));
        status.count("http", "refused");
        let figures = status.figures();
        assert_eq!(figures.degraded, [("kubernetes", false), ("state", true)]);
        assert_eq!(figures.counts, [("http", "refused", 1)]);
    }
}

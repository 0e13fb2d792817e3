//! What the agent keeps from run to run: at which size each build of a program was steady, and which leaked. So it can say after a
//! deploy "grew since build X", and after a restart "memory is back to baseline".
//!
//! - [`baselines`]: what is known, and what follows from it; no files, and time is an argument;
//! - [`store`]: the file.
//!
//! Without a folder that can be written all this goes on for as long as the agent lives, and `/readyz` says so.

mod baselines;
mod store;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Deserialize;

use self::baselines::Baselines;
use self::store::Store;
use super::Published;
use super::config::{Mistake, Text, path, size, time};
use crate::report::Report;
use crate::trace::Observed;

/// The name of this part in `/readyz` and metrics.
const PART: &str = "state";
/// Between two times that the file is written.
const SAVE_EVERY: Duration = Duration::from_mins(1);

/// `[state]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    folder: PathBuf,
    max_bytes: Text,
    steady_after: Text,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            folder: "/var/lib/leaktrace".into(),
            max_bytes: Text("1MiB".to_owned()),
            steady_after: Text("10min".to_owned()),
        }
    }
}

/// `[state]`, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `None`: nothing is kept.
    pub folder: Option<PathBuf>,
    /// Of the file.
    pub max_bytes: u64,
    /// A process whose memory does not grow for so long is steady.
    pub steady_after: Duration,
}

impl Config {
    pub fn check(&self) -> Result<Settings, Mistake> {
        let named = !self.folder.as_os_str().is_empty();
        Ok(Settings {
            folder: named.then(|| path("folder", &self.folder)).transpose()?,
            max_bytes: size("max_bytes", &self.max_bytes, 16 << 10, 64 << 20)?,
            steady_after: time("steady_after", &self.steady_after, Duration::from_secs(1), Duration::from_hours(24))?,
        })
    }
}

/// The baselines with their file.
pub struct State {
    baselines: Baselines,
    /// Where they go; `None` where nothing is kept.
    store: Option<Arc<Store>>,
    /// Whether a write is under way.
    writing: Arc<AtomicBool>,
    /// How often it was written.
    writes: u64,
    saved: Instant,
}

impl State {
    /// Reads what is there. Whatever is wrong with it is said, and nothing is kept then, or what was there is set aside.
    pub fn open(settings: &Settings, published: &Published) -> Self {
        let status = &published.status;
        let mut baselines = Baselines::new(settings.steady_after, settings.max_bytes);
        let store = settings.folder.as_ref().map(|folder| Arc::new(Store::new(folder)));
        if let Some(store) = &store {
            // So that the series is there before it happens.
            status.add(PART, "set_aside", 0);
            status.add(PART, "write_failed", 0);
            match store.read(settings.max_bytes) {
                Ok(None) => {}
                Ok(Some(found)) => baselines.take(found),
                Err(damaged) => {
                    status.count(PART, "set_aside");
                    status.note(PART, damaged.to_string());
                    log::warn!("state: {damaged}");
                }
            }
            // At once, so that a folder that cannot be written is known from the start.
            write(store, &baselines.written(), 0, published);
        }
        Self { baselines, store, writing: Arc::default(), writes: 0, saved: Instant::now() }
    }

    /// Learns from what is there, and adds to the report what is known from before.
    pub fn observe(
        &mut self,
        processes: &mut dyn Iterator<Item = Observed<'_>>,
        report: &mut Report,
        published: &Arc<Published>,
    ) {
        self.baselines.observe(processes, report, Timestamp::now());
        if self.saved.elapsed() < SAVE_EVERY || self.writing.swap(true, Ordering::Acquire) {
            return;
        }
        self.saved = Instant::now();
        let Some(store) = self.store.clone() else { return };
        self.writes += 1;
        let number = self.writes;
        let (bytes, published, writing) = (self.baselines.written(), Arc::clone(published), Arc::clone(&self.writing));
        // A disk can take seconds.
        tokio::task::spawn_blocking(move || {
            write(&store, &bytes, number, &published);
            writing.store(false, Ordering::Release);
        });
    }

    /// Keeps what is known at the end.
    pub fn finish(&mut self, published: &Published) {
        if let Some(store) = &self.store {
            // The one before may still be under way.
            write(store, &self.baselines.written(), self.writes + 1, published);
        }
    }
}

fn write(store: &Store, bytes: &[u8], number: u64, published: &Published) {
    match store.write(bytes, number) {
        Ok(()) => published.status.works(PART),
        Err(error) => {
            published.status.count(PART, "write_failed");
            let folder = store.folder().display();
            published
                .status
                .degraded(PART, format!("{folder}: cannot be written: {error}; goes on without keeping it"));
        }
    }
}

//! Tests that take half a minute each because they wait for a verdict in real time: all of a test binary's run side by side, however
//! few threads the test harness uses.

use std::collections::HashMap;
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

/// One of them. It tells failure by its result, not by a panic: the harness would show a panic's message with another test.
pub type Scenario = fn() -> Result<()>;

/// Those that were started and not yet waited for.
type Started = HashMap<&'static str, JoinHandle<Result<()>>>;

/// The scenarios of a test binary; the first test that asks for one starts all.
pub struct Together {
    scenarios: &'static [(&'static str, Scenario)],
    started: Mutex<Option<Started>>,
}

impl Together {
    pub const fn new(scenarios: &'static [(&'static str, Scenario)]) -> Self {
        Self { scenarios, started: Mutex::new(None) }
    }

    /// Waits for the scenario `name` and gives its result; each can be asked for once.
    pub fn result(&self, name: &str) -> Result<()> {
        let handle = {
            let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
            let started = started.get_or_insert_with(|| {
                self.scenarios.iter().map(|&(name, scenario)| (name, thread::spawn(scenario))).collect()
            });
            started.remove(name).with_context(|| format!("there is no scenario {name}, or it was asked for before"))?
        };
        handle.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

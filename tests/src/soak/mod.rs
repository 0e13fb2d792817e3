//! Faults that a production host brings, one at a time, each with a load that leaks nothing: whatever happens, nothing may be lost
//! silently and nothing may be called a leak. `cargo xtask soak` runs them for as long as it is told, the tests a short form.
//!
//! What is asserted stands on the report alone and on what the load knows of itself ([`account`]).

mod account;
mod agent;
mod faults;
mod namespaces;
mod steady;

use std::time::{Duration, Instant};

use anyhow::Result;

pub use agent::agent;
pub use steady::steady;

/// How long and how much.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// How long a load runs within a fault.
    pub load: Duration,
    /// How long the tracer is stopped.
    pub stopped: Duration,
    /// Threads that are started and ended.
    pub threads: u32,
}

impl Scale {
    /// As the issue of a soak has it.
    pub const FULL: Self = Self { load: Duration::from_secs(20), stopped: Duration::from_secs(5), threads: 20_000 };
    /// Each a few seconds.
    pub const SHORT: Self = Self { load: Duration::from_secs(2), stopped: Duration::from_secs(1), threads: 3000 };
}

/// What a fault showed, in words and numbers for a table.
pub type Figures = Vec<(&'static str, String)>;

/// One fault.
#[derive(Clone, Copy)]
pub struct Fault {
    pub name: &'static str,
    pub run: fn(Scale) -> Result<Figures>,
}

/// All of them.
pub const FAULTS: [Fault; 12] = [
    Fault { name: "ring of one page under full load", run: faults::small_ring },
    Fault { name: "overflow map of 16 frees", run: faults::small_overflow_map },
    Fault { name: "in-flight table of 16 threads", run: faults::few_threads },
    Fault { name: "tracer stopped under load", run: faults::tracer_stopped },
    Fault { name: "tracer killed and started again", run: faults::tracer_killed },
    Fault { name: "target killed", run: faults::target_killed },
    Fault { name: "fork bomb", run: faults::fork_bomb },
    Fault { name: "threads started and ended", run: faults::many_threads },
    Fault { name: "disk full for -o", run: faults::disk_full },
    Fault { name: "clock of another time namespace", run: faults::other_clock },
    Fault { name: "more live blocks than fit", run: faults::many_blocks },
    Fault { name: "memory limit on the tracer", run: faults::memory_limit },
];

/// A fault after it was run.
pub struct Outcome {
    pub name: &'static str,
    pub took: Duration,
    pub result: Result<Figures>,
}

impl Fault {
    pub fn run(self, scale: Scale) -> Outcome {
        let start = Instant::now();
        let result = (self.run)(scale);
        Outcome { name: self.name, took: start.elapsed(), result }
    }
}

//! What the end-to-end tests, the demo and the bench stand on: fixtures that know their own truth, a runner for the leaktrace
//! binary, and questions to the host.
//!
//! The tests themselves are in `tests/tests`. Everything that is started here is ended by its `Drop`, and ends by itself when this
//! process dies: a fixture reads commands and leaves when its standard input closes.

mod agent;
pub mod cgroup;
mod compile;
pub mod deploy;
pub mod endpoints;
mod fixture;
mod gdb;
pub mod host;
pub mod kernels;
pub mod kubernetes;
mod leaktrace;
mod lines;
pub mod programs;
mod session;
pub mod soak;
mod start;
mod together;

pub use agent::{Agent, Answer, Client, Traced, metric};
pub use compile::{PREBUILT_VARIABLE, Program, target_dir};
pub use fixture::{Builder, Fixture};
pub use gdb::{GdbFrame, gdb_frames};
pub use leaktrace::{BINARY_VARIABLE, Leaktrace, Outcome, Running, has_frame, live_in, stacks};
pub use session::{Session, live_of, only, site, summary};
pub use together::{Scenario, Together};

use std::time::Duration;

/// How long anything may take that should answer at once, on a busy machine with two cores.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Names how many times longer everything may take: on a machine that is emulated.
pub const SLOWNESS_VARIABLE: &str = "LEAKTRACE_SLOWNESS";

/// [`PATIENCE`] on this machine.
pub fn patience() -> Duration {
    let slowness = std::env::var(SLOWNESS_VARIABLE).ok().and_then(|times| times.parse::<u32>().ok());
    PATIENCE * slowness.unwrap_or(1)
}

//! leaktrace finds the call stacks of a running process whose memory keeps growing.
//!
//! The modules, in the order of the data:
//!
//! - [`select`]: which processes of the system are meant, and [`labels`]: what they are part of;
//! - [`discover`]: which files of a process hold an allocator, and where a breakpoint is cheap;
//! - [`unwind`]: how each frame of their code is left, for the walk in the kernel;
//! - [`attach`]: loads the BPF programs and puts them there;
//! - [`ring`]: takes records out of the ring buffer;
//! - [`decode`]: turns bytes into events, or into a counted error;
//! - [`ledger`]: live allocations, and their totals per call stack and time;
//! - [`detect`]: turns a call stack's history into a verdict with evidence;
//! - [`symbols`]: names for addresses, asked for only what is reported;
//! - [`report`]: what was found; the only thing that views and exporters read;
//! - [`export`]: the report in the formats of other tools;
//! - [`view`]: text, terminal and JSON.
//!
//! [`governor`] keeps what that costs a process within a budget.
//!
//! [`scout`] watches processes that are not traced, and decides who is worth it.
//!
//! [`privileges`] gives up what rights are no longer needed, and [`punctual`] has what must not wait come to its turn.
//!
//! [`agent`] runs on a node for good: a server, what it keeps, its configuration.
//!
//! [`trace`] ties them together; [`cli`] and [`config`] are the command line; [`doctor`] tells what this host can do.

#[cfg(feature = "agent")]
pub mod agent;
pub mod attach;
pub mod cli;
pub mod config;
pub mod decode;
pub mod detect;
pub mod discover;
pub mod doctor;
pub mod export;
pub mod governor;
pub mod labels;
pub mod ledger;
pub mod losses;
pub mod privileges;
pub mod process;
pub mod punctual;
pub mod recording;
pub mod report;
pub mod ring;
pub mod scout;
pub mod select;
pub mod spawn;
pub mod symbols;
pub mod trace;
pub mod unwind;
pub mod view;

//! `cargo xtask`: the commands of this repository.
//!
//! Each command first sets up what it needs, so that a fresh clone takes one command. What set-up brings stays in the
//! workspace's own target folder.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod deploy;
mod lint;
mod overhead;
mod package;
mod process;
mod run;
mod setup;
mod soak;
mod test;
mod tested;
mod vm;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set up, run and test leaktrace", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring what the build needs and this machine lacks: rust-src, and a bpf-linker that matches the toolchain
    Setup,
    /// Build leaktrace and run it with the arguments after `--`; without any, trace the bundled leaking demo for 30 s
    Run {
        /// Arguments for leaktrace
        #[arg(last = true)]
        args: Vec<OsString>,
    },
    /// Check the formatting and the lints
    Lint,
    /// Check formatting and lints, then run every test, those with real probes included
    Test {
        /// Run only tests whose names contain one of these, and no formatting or lint check
        filters: Vec<String>,
    },
    /// Measure what tracing costs a busy process, beside empty programs and bcc's memleak
    Bench(bench::Options),
    /// Make what a production host brings happen to leaktrace, and see that nothing is lost silently or falsely found
    Soak(soak::Options),
    /// See whether budgets of overhead are kept, beside a twin that is not traced
    Overhead(overhead::Options),
    /// Render what is generated of the manifests in deploy/
    Deploy,
    /// Make the Debian package, and see that it can be installed, run and purged
    Package,
    /// Run the end-to-end suite on every supported kernel, in emulated machines
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Task::Setup => setup::setup().map(|()| ExitCode::SUCCESS),
        Task::Run { args } => run::run(&args),
        Task::Lint => lint::lint().map(|()| ExitCode::SUCCESS),
        Task::Test { filters } => test::test(&filters),
        Task::Bench(options) => bench::bench(&options),
        Task::Soak(options) => soak::soak(&options),
        Task::Overhead(options) => overhead::overhead(&options).map(|()| ExitCode::SUCCESS),
        Task::Deploy => deploy::deploy().map(|()| ExitCode::SUCCESS),
        Task::Package => package::package().map(|_| ExitCode::SUCCESS),
        Task::Vm(options) => vm::vm(&options),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

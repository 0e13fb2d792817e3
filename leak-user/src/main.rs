//! The `leaktrace` command: one function a mode, and their results as exit statuses.

use std::io::ErrorKind;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use leak_user::cli::{Exit, Flags, exit_usage};
use leak_user::config::{Config, Invocation};
use leak_user::privileges::Keep;
use leak_user::view::{LogSink, safe};
use leak_user::{doctor, trace};

fn main() -> ExitCode {
    let invocation = match Invocation::check(Flags::parse()) {
        Ok(invocation) => invocation,
        Err(error) => exit_usage(&error),
    };
    let result = match invocation {
        Invocation::Trace(config) => trace(&config),
        Invocation::Doctor => doctor(),
    };
    result.unwrap_or_else(|error| {
        // The text may carry names from the target.
        eprintln!("leaktrace: {}", safe(&format!("{error:#}")));
        Exit::Failed.into()
    })
}

/// `leaktrace -p PID` and `leaktrace -- COMMAND`.
fn trace(config: &Config) -> Result<ExitCode> {
    start_logging(config.verbosity);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(|| Keep::Nothing.only())
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let finished = runtime.block_on(trace::run(config))?;
    if config.fail_on_leak {
        return Ok(if finished.leaks { Exit::Leak } else { Exit::Done }.into());
    }
    // As a shell tells it: the command's status, or 128 and the signal that ended it.
    let status = finished
        .command
        .map_or(0, |status| status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

/// `leaktrace doctor`.
fn doctor() -> Result<ExitCode> {
    match doctor::run(&mut std::io::stdout()) {
        Ok(ready) => Ok(if ready { Exit::Done } else { Exit::Failed }.into()),
        // Nobody reads it any more: no failure.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Exit::Done.into()),
        Err(error) => Err(error).context("failed to write to the standard output"),
    }
}

/// Messages go to the standard error; while the live view has the terminal they are held back.
fn start_logging(verbosity: u8) {
    let level = match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("LEAKTRACE_LOG", level))
        .format_target(false)
        .target(env_logger::Target::Pipe(Box::new(LogSink)))
        .init();
}

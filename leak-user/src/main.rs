//! The `leaktrace` command: one function a mode, and their results as exit statuses.

use std::io::ErrorKind;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
#[cfg(feature = "agent")]
use leak_user::agent::{self, config::Settings};
#[cfg(feature = "agent")]
use leak_user::cli::AgentFlags;
use leak_user::cli::{Exit, Flags, exit_usage};
use leak_user::config::{Config, Invocation};
use leak_user::privileges::Keep;
use leak_user::view::{LogSink, safe};
use leak_user::{doctor, trace};
use tokio::runtime::Runtime;

fn main() -> ExitCode {
    let invocation = match Invocation::check(Flags::parse()) {
        Ok(invocation) => invocation,
        Err(error) => exit_usage(&error),
    };
    let result = match invocation {
        Invocation::Trace(config) => trace(&config),
        Invocation::Doctor => doctor(),
        #[cfg(feature = "agent")]
        Invocation::Agent(flags) => agent(flags),
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
    let runtime = runtime()?;
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

/// `leaktrace agent`.
#[cfg(feature = "agent")]
fn agent(flags: AgentFlags) -> Result<ExitCode> {
    // What a service does is in its log.
    start_logging(flags.verbose.saturating_add(1));
    let settings = match Settings::load(&flags) {
        Ok(settings) => settings,
        Err(refused) => {
            for mistake in refused {
                eprintln!("leaktrace: {}", safe(&mistake.to_string()));
            }
            return Ok(Exit::Usage.into());
        }
    };
    if flags.check_config {
        println!("the configuration makes sense");
        return Ok(Exit::Done.into());
    }
    let runtime = runtime()?;
    runtime.block_on(agent::run(settings, flags))?;
    Ok(Exit::Done.into())
}

/// Its own threads have no rights; the calling thread, which traces, keeps its own.
fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(|| Keep::Nothing.only())
        .enable_all()
        .build()
        .context("failed to start the runtime")
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

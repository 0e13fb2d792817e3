//! `cargo xtask vm`: the suite `tests/tests/kernels.rs` on every kernel that is promised, each in an emulated machine.
//!
//! Everything it needs is brought into `target/vm` and stays there: Debian's kernels, qemu and busybox, for the other machine a
//! compiler and libraries too. Remove the folder to get newer ones. The kernel runs under pure emulation, so neither the host's kernel
//! nor its processor matters, and no right is needed.
//!
//! - `debian` brings packages without installing any,
//! - `kernels` knows which kernels there are,
//! - `guest` makes what is inside a machine,
//! - `machine` boots one,
//! - `table` says how all of them went.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use self::arch::Arch;
use self::kernels::Kernel;
use self::machine::Emulator;
use crate::setup::setup;

mod arch;
mod debian;
mod guest;
mod kernels;
mod machine;
mod table;

/// Seconds; four times what a kernel takes where nothing else is going on.
const LIMIT: u64 = 480;

#[derive(Args)]
pub struct Options {
    /// Only this kernel, such as 6.1; can be given more than once [default: all that are supported]
    #[arg(long, value_name = "VERSION")]
    kernel: Vec<String>,
    /// Only this machine
    #[arg(long, value_enum)]
    arch: Vec<Arch>,
    /// Only the oldest and the newest kernel, on this host's own machine, as CI does
    #[arg(long, conflicts_with_all = ["kernel", "arch"])]
    ends: bool,
    /// How many seconds a kernel may take
    #[arg(long, value_name = "SECONDS", default_value_t = LIMIT)]
    limit: u64,
    /// Only tests whose names contain one of these
    #[arg(last = true)]
    filters: Vec<String>,
}

/// Why no kernel can be booted here, if none can.
pub fn possible() -> Result<()> {
    debian::possible()
}

/// Boots the chosen kernels one after the other; fails if a test does on any of them.
pub fn vm(options: &Options) -> Result<ExitCode> {
    if let Some(filter) = options.filters.iter().find(|filter| filter.contains([',', ' ', '"'])) {
        bail!("failed to pass the filter {filter:?} to the kernel: it has a comma, a space or a quotation mark");
    }
    setup()?;
    let chosen = if options.ends { Kernel::ends() } else { Kernel::choose(&options.kernel, &options.arch) };
    let cache = guest::cache()?;
    let _lock = debian::lock(&cache)?;
    let mut results = Vec::new();
    for arch in Arch::ALL {
        let mut kernels = chosen.iter().filter(|kernel| kernel.arch == arch).peekable();
        if kernels.peek().is_none() {
            continue;
        }
        guest::bring_target(arch)?;
        let initramfs = guest::initramfs(&cache, arch)?;
        let emulator = Emulator::bring(&cache, arch)?;
        // All of them before the first is booted: what cannot be had should show at once.
        let kernels: Vec<_> = kernels.map(|kernel| Ok((kernel, kernel.image(&cache)?))).collect::<Result<_>>()?;
        for (kernel, image) in kernels {
            let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let prefix = format!("{} {}", arch.name(), kernel.version);
            eprintln!("vm: booting {name}");
            let limit = Duration::from_secs(options.limit);
            let outcome = emulator.run(&image, &initramfs, &options.filters, limit, |line| {
                println!("[{prefix}] {}", line.chars().filter(|c| !c.is_control()).collect::<String>());
            })?;
            results.push((kernel.clone(), outcome));
        }
    }
    print!("\n{}", table::table(&results));
    let good = results.iter().all(|(_, outcome)| outcome.is_good());
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

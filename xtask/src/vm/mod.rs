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
//! - `broken` are mistakes that the suite must find,
//! - `table` says how all of them went.

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use self::arch::Arch;
use self::broken::Broken;
use self::kernels::Kernel;
use self::machine::Emulator;
use crate::setup::setup;

mod arch;
mod broken;
mod debian;
mod guest;
mod kernels;
mod machine;
mod table;

/// For a kernel: four times what a kernel takes where nothing else is going on.
const LIMIT: Duration = Duration::from_mins(8);

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
    #[arg(long, value_name = "SECONDS", default_value_t = LIMIT.as_secs())]
    limit: u64,
    /// Make a mistake in the BPF programs; it is then a failure if not exactly those tests fail that look at it
    #[arg(long, value_enum, hide = true, conflicts_with = "filters")]
    broken: Option<Broken>,
    /// Only tests whose names contain one of these
    #[arg(last = true)]
    filters: Vec<String>,
}

/// Boots the chosen kernels one after the other; fails if a test does on any of them.
pub fn vm(options: &Options) -> Result<ExitCode> {
    if let Some(filter) = options.filters.iter().find(|filter| filter.contains([',', ' ', '"'])) {
        bail!("failed to pass the filter {filter:?} to the kernel: it has a comma, a space or a quotation mark");
    }
    setup()?;
    let chosen = if options.ends { Kernel::ends() } else { Kernel::choose(&options.kernel, &options.arch) };
    Machines::bring(&chosen)?.boot(&options.filters, Duration::from_secs(options.limit), options.broken)
}

/// All that comes from elsewhere and that booting some kernels takes. Nobody else brings or boots any while this lives.
pub struct Machines {
    cache: PathBuf,
    kinds: Vec<Kind>,
    _lock: File,
}

/// The machines of one architecture: what emulates them, and the kernels with their images.
struct Kind {
    arch: Arch,
    emulator: Emulator,
    kernels: Vec<(Kernel, PathBuf)>,
}

impl Machines {
    /// What the oldest and the newest kernel on this host's own machine take: what is checked before a change lands.
    pub fn bring_ends() -> Result<Self> {
        Self::bring(&Kernel::ends())
    }

    /// All of it before the first is booted: what cannot be had should show at once.
    fn bring(chosen: &[Kernel]) -> Result<Self> {
        debian::possible()?;
        let cache = guest::cache()?;
        let lock = debian::lock(&cache)?;
        let mut kinds = Vec::new();
        for arch in Arch::ALL {
            let kernels: Vec<Kernel> = chosen.iter().filter(|kernel| kernel.arch == arch).cloned().collect();
            if kernels.is_empty() {
                continue;
            }
            guest::bring(&cache, arch)?;
            let emulator = Emulator::bring(&cache, arch)?;
            let kernels = kernels.into_iter().map(|kernel| {
                let image = kernel.image(&cache)?;
                Ok((kernel, image))
            });
            kinds.push(Kind { arch, emulator, kernels: kernels.collect::<Result<_>>()? });
        }
        Ok(Self { cache, kinds, _lock: lock })
    }

    /// Tries everything on all of them; fails if a test does.
    pub fn run(&self) -> Result<ExitCode> {
        self.boot(&[], LIMIT, None)
    }

    /// Builds what runs inside, boots one kernel after the other, and prints the table; fails if a test does on any of them, or if
    /// not those do that must.
    fn boot(&self, filters: &[String], limit: Duration, broken: Option<Broken>) -> Result<ExitCode> {
        let mut results = Vec::new();
        for Kind { arch, emulator, kernels } in &self.kinds {
            let initramfs = guest::initramfs(&self.cache, *arch, broken)?;
            for (kernel, image) in kernels {
                let name = image.file_name().unwrap_or_default().to_string_lossy();
                let prefix = format!("{} {}", arch.name(), kernel.version);
                eprintln!("vm: booting {name}");
                let outcome = emulator.run(image, &initramfs, filters, limit, |line| {
                    println!("[{prefix}] {}", line.chars().filter(|c| !c.is_control()).collect::<String>());
                })?;
                results.push((kernel.clone(), outcome));
            }
        }
        print!("\n{}", table::table(&results));
        let good = results.iter().all(|(kernel, outcome)| match broken {
            Some(broken) => broken.is_found(kernel, outcome),
            None => outcome.is_good(),
        });
        if let Some(broken) = broken {
            let said = if good { "failed where they must, and nowhere else" } else { "did not fail as they must" };
            eprintln!("vm: with the mistake {:?} the tests {said}", broken.name());
        }
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

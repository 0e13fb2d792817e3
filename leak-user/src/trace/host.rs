//! The host that a report was made on.

use nix::sys::utsname::uname;
use procfs::{Current as _, Meminfo};

use crate::report::Host;

/// This host; what cannot be found out stays open.
pub fn host() -> Host {
    let names = uname().ok();
    let text = |of: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        names.as_ref().map(|names| of(names).to_string_lossy().into_owned())
    };
    Host {
        hostname: text(|names| names.nodename()),
        kernel: text(|names| names.release()),
        arch: text(|names| names.machine()),
        cpus: std::thread::available_parallelism().ok().and_then(|cpus| u32::try_from(cpus.get()).ok()),
        memory_bytes: Meminfo::current().ok().map(|memory| memory.mem_total),
    }
}

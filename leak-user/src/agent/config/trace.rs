//! `[trace]`: what the command line's options of the same names say, for the whole system.

use std::ffi::OsString;

use clap::ValueEnum;
use serde::Deserialize;

use super::{Mistake, Text, Texts};
use crate::cli::{Format, TraceFlags, UnwindFlag};
use crate::config;

/// Memory for live blocks, stacks and names on a node that has other things to do.
const MAX_MEMORY: &str = "512MiB";
/// Kernel memory, likewise.
const KERNEL_MEMORY: &str = "64MiB";
const INTERVAL: &str = "10s";
/// So many processes can be traced at a time.
const MOST_TRACED: usize = 1024;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trace {
    interval: Option<Text>,
    max_overhead: Option<Text>,
    max_memory: Option<Text>,
    kernel_memory: Option<Text>,
    unwind_memory: Option<Text>,
    sample: Option<Text>,
    top: Option<Text>,
    most_traced: Option<usize>,
    min_size: Option<Text>,
    max_size: Option<Text>,
    older_than: Option<Text>,
    unwind: Option<String>,
    resource: Texts,
    allocator: Texts,
    children: bool,
    all: bool,
    comm: Texts,
    exe: Texts,
    cgroup: Texts,
    uid: Texts,
    container: Texts,
    exclude: Texts,
}

impl Trace {
    /// By the checks of the command line.
    pub fn check(self, verbosity: u8) -> Result<config::Config, Mistake> {
        let text = |value: Option<Text>| value.map(|Text(text)| text);
        let most_traced = self.most_traced;
        if most_traced.is_some_and(|most| !(1..=MOST_TRACED).contains(&most)) {
            return Err(Mistake::new("most_traced", format!("must be a number from 1 to {MOST_TRACED}")));
        }
        let flags = TraceFlags {
            comms: self.comm.0,
            exes: self.exe.0,
            cgroups: self.cgroup.0,
            uids: self.uid.0,
            containers: self.container.0,
            excludes: self.exclude.0,
            all: self.all,
            children: self.children,
            interval: text(self.interval).unwrap_or_else(|| INTERVAL.to_owned()),
            // Nobody reads it; the reports are served.
            format: Format::Json,
            top: text(self.top).unwrap_or_else(|| "10".to_owned()),
            sample: text(self.sample).unwrap_or_else(|| "auto".to_owned()),
            max_overhead: text(self.max_overhead),
            min_size: text(self.min_size),
            max_size: text(self.max_size),
            older_than: text(self.older_than),
            resources: self.resource.0.iter().map(|name| choice("resource", name)).collect::<Result<_, _>>()?,
            allocators: self.allocator.0.into_iter().map(OsString::from).collect(),
            unwind: self.unwind.map_or(Ok(UnwindFlag::Auto), |name| choice("unwind", &name))?,
            kernel_memory: text(self.kernel_memory).unwrap_or_else(|| KERNEL_MEMORY.to_owned()),
            unwind_memory: text(self.unwind_memory),
            max_memory: text(self.max_memory).unwrap_or_else(|| MAX_MEMORY.to_owned()),
            verbose: verbosity,
            ..TraceFlags::default()
        };
        let config = config::Config::check(flags).map_err(|error| {
            // The options are named like the keys.
            let option = error.option.as_deref().map(|option| option.trim_start_matches('-').replace('-', "_"));
            Mistake::new(option.unwrap_or_default(), error.without_option())
        })?;
        Ok(config::Config { most_traced, ..config })
    }
}

/// One of the words that the command line takes.
fn choice<T: ValueEnum>(key: &str, name: &str) -> Result<T, Mistake> {
    T::from_str(name.trim(), false).map_err(|_| {
        let names: Vec<String> = T::value_variants()
            .iter()
            .filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()))
            .collect();
        Mistake::new(key, format!("invalid value '{}': must be {}", name.escape_debug(), names.join(" or ")))
    })
}

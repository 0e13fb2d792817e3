//! The agent's configuration: a TOML file, variables of the environment and flags, checked as a whole before anything starts.
//!
//! A section's keys are the fields of its type; whoever owns a section defines that type, with a check of its values, in its own
//! module. A mistake is told with the place of the value: the file and line, the variable, or the flag. The toml crate was chosen for
//! the places that it keeps of all keys and values.

mod source;
mod trace;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use self::source::Given;
pub use self::source::Refused;
use super::{http, kube, push, state};
use crate::cli::AgentFlags;
use crate::config::{self, parse_size};
use crate::export::openmetrics::Limits;

/// Where the configuration is looked for.
pub const USUAL_FILE: &str = "/etc/leaktrace/agent.toml";

/// All sections; variables are named by them.
const SECTIONS: [&str; 8] =
    ["trace", "http", "state", "metrics", "kubernetes", "push.pyroscope", "push.parca", "push.otlp"];

/// Keys, or sections, that are taken over by a reload; all others wait for a restart.
const LIVE: [&str; 15] = [
    "trace.interval",
    "trace.top",
    "trace.max_overhead",
    "trace.older_than",
    "trace.comm",
    "trace.exe",
    "trace.cgroup",
    "trace.uid",
    "trace.container",
    "trace.exclude",
    "http.token_file",
    "http.tls_certificate",
    "http.tls_key",
    "metrics",
    "push",
];

/// A value that makes no sense. The key is a section's own (`listen`) until the section's name is put in front of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub key: String,
    pub what: String,
}

impl Mistake {
    pub fn new(key: impl Into<String>, what: impl Into<String>) -> Self {
        Self { key: key.into(), what: what.into() }
    }

    fn within(self, section: &str) -> Self {
        Self { key: format!("{section}.{}", self.key), ..self }
    }
}

/// The file as it was written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raw {
    trace: trace::Trace,
    http: http::Config,
    state: state::Config,
    push: push::config::Config,
    metrics: Metrics,
    kubernetes: kube::Config,
}

/// `[metrics]`: how many series there may be.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Metrics {
    max_processes: usize,
    max_stacks: usize,
}

impl Default for Metrics {
    fn default() -> Self {
        let limits = Limits::default();
        Self { max_processes: limits.processes, max_stacks: limits.stacks }
    }
}

impl Metrics {
    fn limits(&self) -> Result<Limits, Mistake> {
        let within = |key: &str, value: usize| {
            let text = "must be a number from 1 to 10000";
            if (1..=10_000).contains(&value) { Ok(value) } else { Err(Mistake::new(key, text)) }
        };
        Ok(Limits {
            processes: within("max_processes", self.max_processes)?,
            stacks: within("max_stacks", self.max_stacks)?,
        })
    }
}

/// A checked configuration.
#[derive(Clone)]
pub struct Settings {
    pub trace: config::Config,
    pub http: http::Settings,
    pub state: state::Settings,
    pub push: push::config::Settings,
    pub metrics: Limits,
    pub kubernetes: kube::Settings,
    /// The file, if it is there or was named.
    pub file: PathBuf,
    given: Given,
}

impl Settings {
    /// Reads and checks what the flags, the variables and the file say. All mistakes that can be told at once are.
    pub fn load(flags: &AgentFlags) -> Result<Self, Vec<Refused>> {
        Self::load_with(
            flags,
            std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))),
        )
    }

    fn load_with(flags: &AgentFlags, variables: impl Iterator<Item = (String, String)>) -> Result<Self, Vec<Refused>> {
        let mut given = Given::default();
        let file = flags.config.clone().unwrap_or_else(|| USUAL_FILE.into());
        let mut refused: Vec<Refused> = Vec::new();
        refused.extend(given.file(&file, flags.config.is_some()).err());
        refused.extend(given.variables(variables).err());
        if let Some(listen) = &flags.listen {
            refused.extend(given.flag("--listen", "http.listen", listen).err());
        }
        if let Some(folder) = &flags.state {
            refused.extend(given.flag("--state", "state.folder", &folder.to_string_lossy()).err());
        }
        for set in &flags.set {
            let flag = format!("--set {}", set.escape_debug());
            refused.extend(match set.split_once('=') {
                Some((key, value)) => given.flag(&flag, key.trim(), value.trim()).err(),
                None => Some(Refused(format!("{flag}: must be KEY=VALUE, such as http.listen=127.0.0.1:9790"))),
            });
        }
        if !refused.is_empty() {
            return Err(refused);
        }
        let raw = given.raw().map_err(|refused| vec![refused])?;
        let trace = raw.trace.check(flags.verbose).map_err(|mistake| mistake.within("trace"));
        let http = raw.http.check().map_err(|mistake| mistake.within("http"));
        let state = raw.state.check().map_err(|mistake| mistake.within("state"));
        let metrics = raw.metrics.limits().map_err(|mistake| mistake.within("metrics"));
        let push = raw.push.check().map_err(|mistake| mistake.within("push"));
        let kubernetes = raw.kubernetes.check().map_err(|mistake| mistake.within("kubernetes"));
        match (trace, http, state, metrics, push, kubernetes) {
            (Ok(trace), Ok(http), Ok(state), Ok(metrics), Ok(push), Ok(kubernetes)) => {
                Ok(Self { trace, http, state, push, metrics, kubernetes, file, given })
            }
            (trace, http, state, metrics, push, kubernetes) => {
                let mistakes = [trace.err(), http.err(), state.err(), metrics.err(), push.err(), kubernetes.err()];
                Err(mistakes.iter().flatten().map(|mistake| given.refused(mistake)).collect())
            }
        }
    }

    /// What it is with what of `new` can be taken over while the agent runs; and the keys that wait for a restart.
    pub fn go_on_with(&self, new: Self) -> (Self, Vec<String>) {
        let mut waiting = self.given.differences(&new.given);
        let is_live = |key: &str| {
            LIVE.iter().any(|live| key == *live || key.strip_prefix(live).is_some_and(|rest| rest.starts_with('.')))
        };
        let moves = new.http.listen != self.http.listen;
        // Without a budget from the start nothing is there that could keep one.
        let governed = self.trace.max_overhead.is_some() == new.trace.max_overhead.is_some();
        waiting.retain(|key| {
            !is_live(key) || (moves && key.starts_with("http.")) || (!governed && key == "trace.max_overhead")
        });
        let mut settings = self.clone();
        settings.trace.go_on_with(&new.trace);
        // What guards an address is judged together with it.
        if !moves {
            settings.http.security = new.http.security;
        }
        settings.metrics = new.metrics;
        settings.push = new.push;
        // Not what is given: what waits is named again at the next reload.
        (settings, waiting)
    }
}

/// A text, a number or a fraction, as text: sizes and times are written either way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text(pub String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Text;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a text or a number")
            }
            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }
            fn visit_i64<E>(self, number: i64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
            fn visit_u64<E>(self, number: u64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
            fn visit_f64<E>(self, number: f64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// One text or several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts(pub Vec<String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Texts;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a text or a list of texts")
            }
            // As on the command line.
            fn visit_str<E>(self, text: &str) -> Result<Texts, E> {
                Ok(Texts(text.split(',').map(str::to_owned).collect()))
            }
            fn visit_i64<E>(self, number: i64) -> Result<Texts, E> {
                Ok(Texts(vec![number.to_string()]))
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Texts, A::Error> {
                let mut texts = Vec::new();
                while let Some(Text(text)) = list.next_element()? {
                    texts.push(text);
                }
                Ok(Texts(texts))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A size within bounds.
pub fn size(key: &str, text: &Text, least: u64, most: u64) -> Result<u64, Mistake> {
    parse_size(&text.0).filter(|size| (least..=most).contains(size)).ok_or_else(|| {
        let [least, most] = [least, most].map(|bytes| format!("{}KiB", bytes >> 10));
        Mistake::new(key, format!("invalid value '{}': must be a size from {least} to {most}", text.0.escape_debug()))
    })
}

/// A time within bounds.
pub fn time(key: &str, text: &Text, least: Duration, most: Duration) -> Result<Duration, Mistake> {
    humantime::parse_duration(text.0.trim()).ok().filter(|time| (least..=most).contains(time)).ok_or_else(|| {
        let [least, most] = [least, most].map(humantime::format_duration);
        let text = text.0.escape_debug();
        Mistake::new(key, format!("invalid value '{text}': must be a time with its unit, from {least} to {most}"))
    })
}

/// An address to listen on.
pub fn address(key: &str, text: &str) -> Result<SocketAddr, Mistake> {
    text.parse().map_err(|_| {
        let text = text.escape_debug();
        Mistake::new(key, format!("invalid value '{text}': must be ADDRESS:PORT, such as 127.0.0.1:9790 or [::]:9790"))
    })
}

/// An absolute path.
pub fn path(key: &str, path: &Path) -> Result<PathBuf, Mistake> {
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    let text = path.to_string_lossy();
    Err(Mistake::new(key, format!("invalid value '{}': must be a path that begins with '/'", text.escape_debug())))
}

#[cfg(test)]
mod tests;

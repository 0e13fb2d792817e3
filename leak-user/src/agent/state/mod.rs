//! What is kept on disk.

use std::path::PathBuf;

use serde::Deserialize;

use super::config::{Mistake, Text, path, size};

/// `[state]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    folder: PathBuf,
    max_bytes: Text,
}

impl Default for Config {
    fn default() -> Self {
        Self { folder: "/var/lib/leaktrace".into(), max_bytes: Text("1MiB".to_owned()) }
    }
}

/// `[state]`, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `None`: nothing is kept.
    pub folder: Option<PathBuf>,
    pub max_bytes: u64,
}

impl Config {
    pub fn check(&self) -> Result<Settings, Mistake> {
        let named = !self.folder.as_os_str().is_empty();
        Ok(Settings {
            folder: named.then(|| path("folder", &self.folder)).transpose()?,
            max_bytes: size("max_bytes", &self.max_bytes, 16 << 10, 64 << 20)?,
        })
    }
}

//! `[push.pyroscope]`, `[push.parca]` and `[push.otlp]`: the same keys each. What has no `url` is not pushed to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::Uri;
use axum::http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use super::Kind;
use crate::agent::config::{Mistake, Text, path, size, time};
use crate::agent::files;

const MOST_QUEUED: usize = 1024;
/// Labels and headers that may be added.
const MOST_ADDED: usize = 32;

/// `[push]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pyroscope: Section,
    parca: Section,
    otlp: Section,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Section {
    /// Where it is, without the path of the protocol.
    #[serde(alias = "endpoint")]
    url: Option<String>,
    interval: Text,
    timeout: Text,
    /// A bearer token, read anew for each request.
    token_file: Option<PathBuf>,
    /// Certificates of the authorities that are trusted, instead of the host's.
    ca_file: Option<PathBuf>,
    headers: BTreeMap<String, String>,
    /// Added to what is pushed: labels of profiles, attributes of the resource.
    labels: BTreeMap<String, String>,
    max_queued: usize,
    max_queued_bytes: Text,
}

impl Default for Section {
    fn default() -> Self {
        Self {
            url: None,
            interval: Text("1min".to_owned()),
            timeout: Text("10s".to_owned()),
            token_file: None,
            ca_file: None,
            headers: BTreeMap::new(),
            labels: BTreeMap::new(),
            max_queued: 16,
            max_queued_bytes: Text("8MiB".to_owned()),
        }
    }
}

/// `[push]`, checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    pyroscope: Option<Endpoint>,
    parca: Option<Endpoint>,
    otlp: Option<Endpoint>,
}

impl Settings {
    pub fn of(&self, kind: Kind) -> Option<&Endpoint> {
        match kind {
            Kind::Pyroscope => self.pyroscope.as_ref(),
            Kind::Parca => self.parca.as_ref(),
            Kind::Otlp => self.otlp.as_ref(),
        }
    }
}

/// One place to push to.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    pub url: Uri,
    pub interval: Duration,
    /// For the whole of an attempt.
    pub timeout: Duration,
    pub token_file: Option<PathBuf>,
    pub ca_file: Option<PathBuf>,
    pub headers: HeaderMap,
    pub labels: BTreeMap<String, String>,
    pub most_queued: usize,
    pub most_bytes: usize,
}

impl Config {
    /// Checks the values, and reads the files that they name.
    pub fn check(&self) -> Result<Settings, Mistake> {
        let of = |name: &str, section: &Section| {
            section.check().map_err(|mistake| Mistake::new(format!("{name}.{}", mistake.key), mistake.what))
        };
        Ok(Settings {
            pyroscope: of("pyroscope", &self.pyroscope)?,
            parca: of("parca", &self.parca)?,
            otlp: of("otlp", &self.otlp)?,
        })
    }
}

impl Section {
    fn check(&self) -> Result<Option<Endpoint>, Mistake> {
        let Some(text) = &self.url else {
            let alone = Self::default() == *self;
            return if alone {
                Ok(None)
            } else {
                Err(Mistake::new("url", "is missing, and without it nothing is pushed"))
            };
        };
        let url = url(text).map_err(|what| {
            // A password may stand in it.
            let shown = if text.contains('@') { "..." } else { text };
            Mistake::new("url", format!("invalid value '{}': {what}", shown.escape_debug()))
        })?;
        let file = |key: &str, file: &Option<PathBuf>| file.as_deref().map(|file| path(key, file)).transpose();
        let (token_file, ca_file) = (file("token_file", &self.token_file)?, file("ca_file", &self.ca_file)?);
        if let Some(file) = &token_file {
            read_token(file).map_err(|what| Mistake::new("token_file", what))?;
        }
        if let Some(file) = &ca_file {
            files::certificates(file).map_err(|what| Mistake::new("ca_file", what))?;
        }
        if !(1..=MOST_QUEUED).contains(&self.max_queued) {
            return Err(Mistake::new("max_queued", format!("must be a number from 1 to {MOST_QUEUED}")));
        }
        Ok(Some(Endpoint {
            url,
            interval: time("interval", &self.interval, Duration::from_secs(1), Duration::from_hours(24))?,
            timeout: time("timeout", &self.timeout, Duration::from_millis(100), Duration::from_mins(5))?,
            token_file,
            ca_file,
            headers: headers(&self.headers)?,
            labels: labels(&self.labels)?,
            most_queued: self.max_queued,
            most_bytes: size("max_queued_bytes", &self.max_queued_bytes, 64 << 10, 1 << 30)? as usize,
        }))
    }
}

fn url(text: &str) -> Result<Uri, &'static str> {
    let url: Uri = text.parse().map_err(|_| "must be a URL, such as http://pyroscope:4040")?;
    if !matches!(url.scheme_str(), Some("http" | "https")) {
        return Err("must begin with http:// or https://");
    }
    if url.authority().is_none_or(|authority| authority.as_str().contains('@')) {
        return Err("must have a host and no user: a token is in token_file");
    }
    if url.query().is_some() {
        return Err("must have no '?'");
    }
    Ok(url)
}

fn headers(texts: &BTreeMap<String, String>) -> Result<HeaderMap, Mistake> {
    let mut headers = HeaderMap::new();
    for (name, value) in texts {
        let key = || format!("headers.{name}");
        let name: HeaderName = name.parse().map_err(|_| Mistake::new(key(), "is no name of a header"))?;
        if name == AUTHORIZATION {
            return Err(Mistake::new(key(), "would be a secret in this file: use token_file"));
        }
        let value =
            HeaderValue::from_str(value).map_err(|_| Mistake::new(key(), "has a value that no header can have"))?;
        headers.insert(name, value);
    }
    if headers.len() > MOST_ADDED {
        return Err(Mistake::new("headers", format!("must be at most {MOST_ADDED}")));
    }
    Ok(headers)
}

/// The names of labels are those that Prometheus allows, which Pyroscope and Parca take over.
fn labels(labels: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Mistake> {
    for name in labels.keys() {
        let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !begins || name.starts_with("__") || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let what = "must have letters, digits and '_' only, begin with no digit, and not with '__'";
            return Err(Mistake::new(format!("labels.{name}"), what));
        }
    }
    if labels.len() > MOST_ADDED {
        return Err(Mistake::new("labels", format!("must be at most {MOST_ADDED}")));
    }
    Ok(labels.clone())
}

/// The header with the token of a file.
pub fn read_token(file: &Path) -> Result<HeaderValue, String> {
    let token = files::token(file, 1)?;
    // All of a token's characters are a header's, too.
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|error| error.to_string())?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An endpoint for tests.
    pub fn endpoint(url: &str) -> Endpoint {
        let section = Section { url: Some(url.to_owned()), ..Section::default() };
        section.check().unwrap().unwrap()
    }

    fn mistake(text: &str) -> String {
        let config: Config = toml::from_str(text).unwrap();
        let mistake = config.check().unwrap_err();
        format!("{}: {}", mistake.key, mistake.what)
    }

    /// Each key arrives, and what is not named is not pushed to.
    #[test]
    fn keys() {
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join("token");
        std::fs::write(&token, "secret\n").unwrap();
        let config: Config = toml::from_str(&format!(
            r#"
            [pyroscope]
            url = "https://pyroscope.example:4040/base/"
            interval = "15s"
            timeout = "1s"
            token_file = {token:?}
            headers = {{ X-Scope-OrgID = "night" }}
            labels = {{ cluster = "a" }}
            max_queued = 3
            max_queued_bytes = "1MiB"
            [otlp]
            endpoint = "http://collector:4318"
            "#
        ))
        .unwrap();
        let settings = config.check().unwrap();
        assert_eq!(settings.of(Kind::Parca), None);
        let endpoint = settings.of(Kind::Pyroscope).unwrap();
        assert_eq!(endpoint.url.to_string(), "https://pyroscope.example:4040/base/");
        assert_eq!((endpoint.interval, endpoint.timeout), (Duration::from_secs(15), Duration::from_secs(1)));
        assert_eq!((endpoint.most_queued, endpoint.most_bytes), (3, 1 << 20));
        assert_eq!(endpoint.headers["x-scope-orgid"], "night");
        assert_eq!(endpoint.labels["cluster"], "a");
        assert_eq!(read_token(endpoint.token_file.as_deref().unwrap()).unwrap(), "Bearer secret");
        assert_eq!(settings.of(Kind::Otlp).unwrap().interval, Duration::from_mins(1));
    }

    /// A mistake is told by its key and what to do.
    #[test]
    fn mistakes() {
        for (text, said) in [
            ("[parca]\ninterval = '5s'", "parca.url: is missing"),
            ("[parca]\nurl = 'parca:7070'", "parca.url: invalid value 'parca:7070'"),
            ("[parca]\nurl = 'ftp://parca'", "http:// or https://"),
            ("[parca]\nurl = 'http://me:hunter2@parca'", "token_file"),
            ("[parca]\nurl = 'http://parca/?a=b'", "no '?'"),
            ("[parca]\nurl = 'http://parca'\ninterval = '0s'", "parca.interval: "),
            ("[parca]\nurl = 'http://parca'\nmax_queued = 0", "parca.max_queued: "),
            ("[parca]\nurl = 'http://parca'\ntoken_file = '/nonexistent/token'", "/nonexistent/token"),
            ("[parca]\nurl = 'http://parca'\nca_file = '/nonexistent/ca'", "parca.ca_file: "),
            ("[otlp]\nurl = 'http://c'\nheaders = { Authorization = 'hunter2' }", "otlp.headers.Authorization: "),
            ("[otlp]\nurl = 'http://c'\nheaders = { 'a b' = 'x' }", "otlp.headers.a b: "),
            ("[otlp]\nurl = 'http://c'\nheaders = { a = \"x\\ny\" }", "otlp.headers.a: "),
            ("[otlp]\nurl = 'http://c'\nlabels = { __name__ = 'x' }", "otlp.labels.__name__: "),
        ] {
            let told = mistake(text);
            assert!(told.contains(said), "{text}: {told}");
            assert!(!told.contains("hunter2"), "{told}");
        }
        assert!(toml::from_str::<Config>("[parca]\nurll = 'x'").is_err());
    }
}

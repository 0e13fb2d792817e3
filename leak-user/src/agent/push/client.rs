//! One attempt to send a payload, bounded in time and in what is read of the answer.
//!
//! By hyper's client with rustls, which the API server of Kubernetes is asked with too. Redirects are not followed: a token would go with
//! them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER, USER_AGENT};
use axum::http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use prost::Message as _;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::Kind;
use super::config::{Endpoint, read_token};
use super::metrics::ExportResponse;
use super::queue::Payload;
use crate::agent::files::certificates;
use crate::view::safe_bytes;

/// Of an answer; more is no answer to this.
const MOST_ANSWER: usize = 64 << 10;
/// Of the answer's text, in what is said of it.
const SAID: usize = 200;

/// What became of an attempt.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was taken; a part of it may have been rejected.
    Sent { rejected: Option<String> },
    /// Another attempt would end the same way.
    Refused(String),
    /// Another may not, after the time that the other side asked for.
    Failed { why: String, rest: Option<Duration> },
}

pub struct Client {
    kind: Kind,
    http: hyper_util::client::legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    url: Uri,
    headers: HeaderMap,
    token_file: Option<PathBuf>,
    timeout: Duration,
}

impl Client {
    pub fn new(kind: Kind, endpoint: &Endpoint) -> Result<Self> {
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(endpoint)?)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().build();
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(1)
            .build(connector);
        let base = endpoint.url.to_string();
        let url = format!("{}{}", base.trim_end_matches('/'), kind.path());
        let mut headers = endpoint.headers.clone();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind.content_type()));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("leaktrace/", env!("CARGO_PKG_VERSION"))));
        if kind == Kind::Pyroscope {
            headers.insert("connect-protocol-version", HeaderValue::from_static("1"));
        }
        Ok(Self {
            kind,
            http,
            url: url.parse().with_context(|| format!("failed to make an address of {url}"))?,
            headers,
            token_file: endpoint.token_file.clone(),
            timeout: endpoint.timeout,
        })
    }

    pub async fn send(&self, payload: &Payload) -> Outcome {
        match tokio::time::timeout(self.timeout, self.attempt(payload)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Outcome::Failed { why: format!("{}: {error:#}", self.url), rest: None },
            Err(_) => {
                let why = format!("{}: no answer within {}", self.url, humantime::format_duration(self.timeout));
                Outcome::Failed { why, rest: None }
            }
        }
    }

    async fn attempt(&self, payload: &Payload) -> Result<Outcome> {
        let mut request = Request::post(self.url.clone()).body(Full::new(payload.body()))?;
        *request.headers_mut() = self.headers.clone();
        // Read anew each time: tokens of service accounts are replaced every hour or so.
        if let Some(file) = self.token_file.clone() {
            let token = tokio::task::spawn_blocking(move || read_token(&file)).await?.map_err(anyhow::Error::msg)?;
            request.headers_mut().insert(AUTHORIZATION, token);
        }
        let answer = self.http.request(request).await.context("failed to send")?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = Limited::new(answer.into_body(), MOST_ANSWER).collect().await;
        let body = match body {
            Ok(body) => body.to_bytes(),
            // That it was taken is known by its status already.
            Err(_) if status.is_success() => Bytes::new(),
            Err(error) => anyhow::bail!("status {status}, and then {error}"),
        };
        Ok(self.judge(status, &headers, &body))
    }

    fn judge(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Outcome {
        if status.is_success() {
            return Outcome::Sent { rejected: self.rejected(body) };
        }
        let text = safe_bytes(&body[..body.len().min(SAID)]);
        let why = format!("{}: status {status}: {text}", self.url);
        if self.is_passing(status) {
            return Outcome::Failed { why, rest: rest(headers, Timestamp::now()) };
        }
        Outcome::Refused(why)
    }

    /// Whether a status may be another one at the next attempt. The standard of OTLP has a list of its own (OTLP/HTTP, "Failures"). Where a token
    /// is not taken, the next one in its file may be.
    fn is_passing(&self, status: StatusCode) -> bool {
        match status.as_u16() {
            401 | 403 | 429 | 502 | 503 | 504 => true,
            408 | 425 | 500 => self.kind != Kind::Otlp,
            _ => false,
        }
    }

    /// What a collector did not take of what it took.
    fn rejected(&self, body: &[u8]) -> Option<String> {
        if self.kind != Kind::Otlp {
            return None;
        }
        let partial = ExportResponse::decode(body).ok()?.partial_success?;
        (partial.rejected_data_points > 0).then(|| {
            format!("{} of the values: {}", partial.rejected_data_points, safe_bytes(partial.error_message.as_bytes()))
        })
    }
}

/// How long the other side wants to be left alone: seconds, or the time until a date (RFC 9110, section 10.2.3) by its own clock, which need
/// not be right.
fn rest(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let date = |text: &str| rfc2822::parse(text).ok().map(|date| date.timestamp());
    let after = text(RETRY_AFTER)?;
    if let Ok(seconds) = after.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = date(after)?;
    let now = text(DATE).and_then(date).unwrap_or(now);
    // One that is over already asks for nothing.
    Some(Duration::try_from(then.duration_since(now)).unwrap_or_default())
}

/// Who is trusted: the file's certificates if one is named, else the host's.
fn roots(endpoint: &Endpoint) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    if let Some(file) = &endpoint.ca_file {
        for certificate in certificates(file).map_err(anyhow::Error::msg)? {
            roots.add(certificate).with_context(|| format!("failed to take a certificate of {}", file.display()))?;
        }
    } else if endpoint.url.scheme_str() == Some("https") {
        let (taken, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        ensure!(
            taken > 0,
            "this host has no certificates of authorities (package ca-certificates): name some by ca_file"
        );
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both forms of `Retry-After`; a date is one of the other side's clock where that is told, and nonsense asks for nothing.
    #[test]
    fn how_long_to_wait() {
        let now: Timestamp = "2026-03-01T12:00:00Z".parse().unwrap();
        for (after, date, expected) in [
            ("120", None, Some(120)),
            (" 7 ", Some("Sun, 01 Mar 2026 10:00:00 GMT"), Some(7)),
            ("Sun, 01 Mar 2026 12:01:30 GMT", None, Some(90)),
            ("Sun, 01 Mar 2026 10:00:05 GMT", Some("Sun, 01 Mar 2026 10:00:00 GMT"), Some(5)),
            ("Sun, 01 Mar 2026 12:00:05 GMT", Some("yesterday"), Some(5)),
            ("Sun, 01 Mar 2026 11:00:00 GMT", None, Some(0)),
            ("Fri, 01 Mar 2126 12:00:00 GMT", None, Some(3_155_673_600)),
            ("Fri, 31 Dec 9999 23:59:59 GMT", None, None),
            ("Sun, 30 Feb 2026 12:00:00 GMT", None, None),
            ("-1", None, None),
            ("soon", None, None),
            ("99999999999999999999", None, None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, after.parse().unwrap());
            headers.extend(date.map(|date: &str| (DATE, date.parse().unwrap())));
            assert_eq!(rest(&headers, now), expected.map(Duration::from_secs), "{after} {date:?}");
        }
        assert_eq!(rest(&HeaderMap::new(), now), None);
    }
}

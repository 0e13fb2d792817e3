//! What is answered to what.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue,
    REFERRER_POLICY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;

use super::access::is_to_this_host;
use crate::agent::{Published, page};
use crate::export::openmetrics::{self, Own};
use crate::export::pprof;
use crate::report::Report;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

#[derive(Clone)]
struct Shared {
    published: Arc<Published>,
    max_request: usize,
}

/// All routes. What needs no token is under no guard but that of the host's name.
pub fn router(published: &Arc<Published>, max_request: usize) -> Router {
    let shared = Shared { published: Arc::clone(published), max_request };
    let guarded = Router::new()
        .route("/metrics", get(metrics))
        .route("/api/v1/report", get(report))
        .route("/api/v1/processes/{pid}", get(process))
        .route("/debug/pprof/heap", get(heap))
        .route("/debug/pprof/allocs", get(allocs))
        .route_layer(middleware::from_fn_with_state(shared.clone(), require_token));
    Router::new()
        .merge(guarded)
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .fallback(asset)
        .method_not_allowed_fallback(only_get)
        .layer(middleware::from_fn_with_state(shared.clone(), check))
        .with_state(shared)
}

/// What holds for every request and every answer.
async fn check(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let length = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let open = shared.published.settings.borrow().http.security.token.is_none();
    let mut answer = if length.is_some_and(|length| length > shared.max_request as u64) {
        (StatusCode::PAYLOAD_TOO_LARGE, "the request is too large\n").into_response()
    } else if open && !is_to_this_host(request.headers(), request.uri()) {
        let text = "this name is not the host's own: ask 127.0.0.1 or localhost, or set http.token_file\n";
        (StatusCode::FORBIDDEN, text).into_response()
    } else {
        next.run(request).await
    };
    let headers = answer.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, page::POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    answer
}

async fn require_token(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let shown = match &shared.published.settings.borrow().http.security.token {
        Some(token) => token.is_shown(request.headers()),
        None => true,
    };
    if shown {
        return next.run(request).await;
    }
    shared.published.status.count("http", "unauthorized");
    let challenge = [(WWW_AUTHENTICATE, "Bearer realm=\"leaktrace\"")];
    (StatusCode::UNAUTHORIZED, challenge, "this needs the header 'Authorization: Bearer TOKEN'\n").into_response()
}

async fn only_get() -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "GET, HEAD")], "only GET\n").into_response()
}

fn answer(content_type: &'static str, body: impl Into<Body>) -> Response {
    ([(CONTENT_TYPE, content_type)], body.into()).into_response()
}

fn failed(error: &dyn std::fmt::Display) -> Response {
    log::warn!("an answer cannot be made: {error}");
    (StatusCode::INTERNAL_SERVER_ERROR, "the answer cannot be made; the log has the reason\n").into_response()
}

/// The page and what it loads; they hold no data.
async fn asset(request: Request) -> Response {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return only_get().await;
    }
    if let Some((content_type, body)) = page::asset(request.uri().path()) {
        return answer(content_type, body);
    }
    (StatusCode::NOT_FOUND, [(CONTENT_TYPE, TEXT)], "there is nothing here\n").into_response()
}

/// Whether the loop that traces goes round.
async fn health(State(shared): State<Shared>) -> Response {
    let (alive, text) = shared.published.status.health();
    let status = if alive { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, answer(TEXT, text)).into_response()
}

/// Whether it traces, and what of the rest does not work.
async fn ready(State(shared): State<Shared>) -> Response {
    let (ready, text) = shared.published.status.readiness();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, answer(TEXT, text)).into_response()
}

fn latest(shared: &Shared) -> Arc<Report> {
    Arc::clone(&shared.published.report.borrow())
}

/// Makes an answer of the latest report. On a large node that takes so long that other answers should not wait for it.
async fn made(shared: &Shared, make: impl FnOnce(&Report) -> Response + Send + 'static) -> Response {
    let report = latest(shared);
    match tokio::task::spawn_blocking(move || make(&report)).await {
        Ok(answer) => answer,
        Err(error) => failed(&error),
    }
}

fn json(value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(text) => answer(JSON, text),
        Err(error) => failed(&error),
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let limits = shared.published.settings.borrow().metrics;
    let agent = shared.published.status.figures();
    let make = move |report: &Report| match openmetrics::text(report, limits, Own::read(), &agent) {
        Ok(text) => answer(openmetrics::CONTENT_TYPE, text),
        Err(error) => failed(&error),
    };
    made(&shared, make).await
}

async fn report(State(shared): State<Shared>) -> Response {
    made(&shared, json).await
}

/// One process, as the report has it.
async fn process(State(shared): State<Shared>, Path(pid): Path<String>) -> Response {
    let make = move |report: &Report| {
        let found = pid.parse().ok().and_then(|pid: u32| report.processes.iter().find(|process| process.pid == pid));
        found.map_or_else(|| not_traced(report, &pid), json)
    };
    made(&shared, make).await
}

fn not_traced(report: &Report, pid: &str) -> Response {
    let watched = report.system.as_ref().is_some_and(|system| {
        pid.parse().is_ok_and(|pid: u32| system.processes.iter().any(|process| process.pid == pid))
    });
    let error = if watched {
        "this process is watched, and not traced: its memory does not keep rising"
    } else {
        "no process with this pid is traced"
    };
    (StatusCode::NOT_FOUND, answer(JSON, serde_json::json!({ "error": error }).to_string())).into_response()
}

/// What may be said of a profile. Readers add more, such as `seconds` and `gc`, which has no meaning here.
#[derive(Deserialize)]
struct Wanted {
    pid: Option<u32>,
    /// What is shown if the reader does not choose.
    r#type: Option<String>,
}

async fn heap(State(shared): State<Shared>, Query(wanted): Query<Wanted>) -> Response {
    made(&shared, move |report| profile(report, &wanted, "inuse_space")).await
}

/// The same profile under the name by which profilers ask for what was allocated.
async fn allocs(State(shared): State<Shared>, Query(wanted): Query<Wanted>) -> Response {
    made(&shared, move |report| profile(report, &wanted, "alloc_space")).await
}

fn profile(report: &Report, wanted: &Wanted, usual: &str) -> Response {
    let processes = report.processes.iter().filter(|process| wanted.pid.is_none_or(|pid| pid == process.pid));
    if let Some(pid) = wanted.pid
        && !report.processes.iter().any(|process| process.pid == pid)
    {
        return not_traced(report, &pid.to_string());
    }
    let mut profile = pprof::profile(report, processes);
    if !profile.show(wanted.r#type.as_deref().unwrap_or(usual)) {
        let text = "type must be inuse_space, inuse_objects, alloc_space or alloc_objects\n";
        return (StatusCode::BAD_REQUEST, text).into_response();
    }
    match pprof::compressed(&profile) {
        Ok(bytes) => answer("application/octet-stream", bytes),
        Err(error) => failed(&error),
    }
}
